"""What the programs share: their common flags, and one run from flags to files."""

import os
import random
from datetime import datetime

import torch

from utils import checkpoint, distributed
from utils.cli import UserError, number, warn
from utils.data import test_loader, train_loader
from utils.optimizers import load_optimizer, make_optimizer
from utils.statistics import neuron_layers
from utils.training import Run, evaluate

NEURON_SETTINGS = ("timesteps", "Vth", "tau", "delta_t", "alpha", "Vth_bound")
MODEL_SETTINGS = (*NEURON_SETTINGS, "backward", "dropout_mask", "Vth_grad_scale", "engine")
# How the processes of a run were started; some differ between them.
LAUNCHING = ("multiprocessing_distributed", "cpu_processes", "world_size", "rank", "local_rank", "dist_url")
# What may differ in a run that goes on by itself: where, not what, is computed.
NEUTRAL = (
    "workers",
    "path",
    "name",
    "checkpoint",
    "resume",
    "device",
    "gpu",
    "pin_memory",
    "evaluate",
    "started",
)
NEUTRAL += ("rate_stat", "save_every", "print_freq", "compile", "preset", "manualSeed", "deterministic")
NEUTRAL += ("dist_backend", "test_batch", "pre_train", "load_Vth", "engine")
NEUTRAL += LAUNCHING

count, natural = number(int, 1), number(int, 0)
positive, non_negative = number(float, 0, open_low=True), number(float, 0)


def add_flags(parser, backwards, engines, **defaults):
    """The flags of every program; each program has `defaults` of its own."""
    add = parser.add_argument
    text = "processes that load data besides the program's own"
    add("-j", "--workers", type=number(int, 0, high=256), default=4, help=text)
    add("--name", default="", help="goes into the names of the run's files")
    add("--timesteps", type=count, help="T, the latency")
    add("--Vth", type=positive, help="initial threshold")
    add("--tau", type=positive, help="LIF: time constant of the membrane")
    add("--delta_t", type=positive, help="LIF: length of a time step")
    add("--alpha", type=number(float, 0, open_low=True, high=1), help="fire at alpha*Vth")
    add("--train_Vth", type=int, choices=(0, 1), default=1, help="1: thresholds are trained; 0: fixed")
    add("--Vth_bound", type=positive, help="thresholds stay above this")
    add("--rate_stat", type=int, choices=(0, 1), default=0, help="1: --evaluate saves firing rates")
    add("--epochs", type=count, help="passes over the training set")
    add("--start-epoch", type=natural, default=0, help="epoch to start from without --resume")
    add("--lr", "--learning-rate", type=positive, help="initial learning rate; cosine to 0")
    add("--warmup", type=natural, help="iterations of linear warm-up")
    add("--momentum", type=non_negative, default=0.9, help="of SGD")
    add("--nesterov", action="store_true", help="Nesterov's momentum, of SGD")
    add("--weight-decay", "--wd", type=non_negative, help="of weights and thresholds alike")
    add("--optimizer", type=str.lower, choices=("sgd", "adam"), help="SGD or adam")
    add("-c", "--checkpoint", default="./checkpoint", help="files go to a folder of the data set in it")
    add("--resume", default="", help="checkpoint to go on from; auto: this run's own, if there is one")
    add("-e", "--evaluate", action="store_true", help="only test the model")
    add("--pin_memory", action="store_true", help="load batches into page-locked memory (GPU)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    text = "collapsed: exact and fast; unrolled: the same, literally; rate: a cheaper approximation"
    add("--backward", choices=backwards, default="collapsed", help=text)
    text = "auto: spike by spike on CPUs, where that pays; dense: by tensors; events: spike by spike"
    add("--engine", choices=engines, default="auto", help=text)
    text = "bf16: spikes and their convolutions in bfloat16"
    add("--precision", choices=("fp32", "bf16"), default="fp32", help=text)
    text = "a mask a time step, as published (training then unrolls time), or one shared by all"
    add("--dropout_mask", choices=("step", "shared"), default="step", help=text)
    add("--compile", action="store_true", help="run the time loops through torch.compile")
    add("--Vth_grad_scale", type=positive, help="factor of the thresholds' gradient")
    text = "also write a checkpoint every so many iterations within an epoch; 0: none"
    add("--save_every", type=natural, default=0, metavar="N", help=text)
    text = "only operations that give the same result every time, on GPUs too"
    add("--deterministic", action="store_true", help=text)
    add("--sync_bn", action="store_true", help="batch norm over the batches of all processes")
    parser.set_defaults(**dict(print_freq=0, warmup_within_first_epoch=False) | defaults)


def run(args, files, device, load, create_model, prepare=None):
    """Train or evaluate as the flags say, in one process or several. Raises UserError.

    `load()` -> Data; `prepare(model)` gives a model its first weights.
    """
    if "/" in args.name or "\\" in args.name:
        raise UserError(f"--name {args.name!r} must not contain a slash; choose the folder by --checkpoint")
    if args.Vth < args.Vth_bound:
        raise UserError(f"--Vth {args.Vth} lies below --Vth_bound {args.Vth_bound}; raise it or lower that")
    if args.nesterov and not args.momentum:
        raise UserError("--nesterov needs a --momentum above 0")
    resumed, source = checkpoint.resume(args.resume, files)
    earlier = resumed["args"] if resumed else {}
    distributed.agree(vars(args) | dict(resumed=resumed and (resumed["epoch"], resumed["iteration"])))
    n = distributed.world_size()
    if args.train_batch % n:
        raise UserError(
            f"the batch size {args.train_batch} is the total of {n} processes: use a multiple of it"
        )
    if args.manualSeed is None:
        args.manualSeed = earlier.get("manualSeed", distributed.share(random.randint(1, 10000)))
    now = distributed.share(datetime.now().isoformat(timespec="microseconds"))
    args.started = earlier.get("started") if resumed else now
    if resumed:
        compare(args, resumed, source)
    torch.manual_seed(args.manualSeed)
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with distributed.first_on_each_machine():
        data = load()
    name = files.folder.name
    print(f"data: {name}, {len(data.train)} training, {len(data.test)} test, {data.classes} classes")
    model = build_model(args, data.classes, device, create_model)
    loading = dict(workers=args.workers, pin_memory=args.pin_memory and device.type == "cuda")
    test = test_loader(data.test, batch_size=args.test_batch, **loading)
    if resumed:
        checkpoint.load_weights(model, resumed["state_dict"], source)
        done = f"{resumed['epoch']} epochs"
        if resumed["iteration"]:
            done += f" and {resumed['iteration']} iterations"
        if resumed["best_acc"] >= 0:  # no epoch is done otherwise
            done += f", best top-1 {resumed['best_acc']:.2f} %"
        print(f"resumed from {source}: {done}")
    prepared = not resumed and prepare is not None and prepare(model)
    if args.evaluate:
        if not resumed and not prepared:
            warn("no --resume: these weights are not trained")
        report(model, test, device, args.precision, files.firing_rates if args.rate_stat else None)
        return
    train = train_loader(data.train, batch_size=args.train_batch, seed=args.manualSeed, **loading)
    if (len(train.sampler) % train.batch_size or train.batch_size) * model.timesteps == 1:
        raise UserError("batch norm cannot work on one image at one time step; use another batch size")
    recipe = dict(lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay, nesterov=args.nesterov)
    optimizer = make_optimizer(args.optimizer, model.parameters(), **recipe)
    if resumed and "optimizer" in resumed:
        load_optimizer(optimizer, resumed["optimizer"], source)
    Run(model, optimizer, train, test, args, files, resumed, source, device).train()
    for what in ("checkpoint", "best", "log", "curves", "arguments", "tensorboard"):
        if getattr(files, what).exists():
            print(f"{what + ':':13}{getattr(files, what)}")


def compare(args, resumed, source):
    """Refuse a checkpoint of another model; name the settings that differ, and refuse them under `auto`."""
    earlier = resumed["args"]
    model = earlier.get("model", resumed.get("arch", args.model))
    if model != args.model:
        raise UserError(f"{source} is a checkpoint of {model}, not of {args.model}; choose that model")
    differing = [name for name, value in vars(args).items() if earlier.get(name, value) != value]
    differing = [name for name in differing if name not in NEUTRAL]
    if args.evaluate:
        differing = [name for name in differing if name in NEURON_SETTINGS]
    if not differing:
        return
    text = "; ".join(f"{name} {str(earlier[name])[:60]}, now {getattr(args, name)}" for name in differing)
    if args.resume == "auto" and not args.evaluate:
        raise UserError(f"{source} was trained with {text}; to go on with that, say --resume {source}")
    warn(f"{source} was trained with {text}")
    if resumed["iteration"] and "train_batch" in differing:
        warn("the epoch that was under way starts again, since its batches differ")
        resumed["iteration"] = 0


def build_model(args, classes, device, create_model):
    """The network of the flags, on the device."""
    settings = {name: getattr(args, name) for name in MODEL_SETTINGS}
    model = create_model(args.model, num_classes=classes, train_Vth=bool(args.train_Vth), **settings).to(
        device
    )
    if args.compile:
        try:
            model.compile_loops()
        except RuntimeError as error:
            warn(f"--compile is left out: {error}")
    if model.backward != "unrolled":
        say_engine(model, device, args.precision)
    if args.sync_bn and distributed.world_size() > 1:
        model.synchronize()
    return model


def say_engine(model, device, precision):
    """Print which engine computes the spiking layers, and why it is not the event engine."""
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            engine, reason = model.engine_in_use(device)
    except RuntimeError as error:
        raise UserError(f"--engine events: {error}; leave it out for the dense engine") from None
    print(f"engine: {engine.name}" + (f" ({reason})" if reason else ""))


def report(model, loader, device, precision, firing_rate_file):
    """Print loss and accuracy on the test set; with a file to save them to, the firing rates as well."""
    if firing_rate_file is not None:
        if not list(neuron_layers(model)):
            raise UserError("--rate_stat 1: an ANN has no firing rates; evaluate an _if or _lif model")
        checkpoint.make_folder(firing_rate_file.parent)
    result, rates = evaluate(model, loader, device, precision)
    print(f"test: loss {result.loss:.4f}, top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %")
    if firing_rate_file is None:
        return
    for layer, rate in rates.items():
        print(f"{layer:20} {100 * rate:6.2f} %")
    if distributed.rank() == 0:
        checkpoint.save(rates, firing_rate_file)
    print(f"firing rates: {firing_rate_file}")

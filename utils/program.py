"""What the programs share: their common flags, and one run from flags to files."""

import ctypes
import os
import random
from contextlib import suppress
from datetime import datetime

import torch

from utils import checkpoint, distributed, foreign
from utils.cli import UserError, explained, is_line, number, require, warn
from utils.data import load_data, test_loader, train_loader
from utils.records import TAKEN, alone
from utils.statistics import neuron_layers
from utils.thresholds import compare_neurons, load_thresholds, start_thresholds
from utils.training import Run, autocast, evaluate

NEURON_SETTINGS = ("timesteps", "Vth", "tau", "delta_t", "alpha", "Vth_bound")
MODEL_SETTINGS = (*NEURON_SETTINGS, "backward", "dropout_mask", "Vth_grad_scale", "engine")

count, natural = number(int, 1), number(int, 0)
positive, non_negative = number(float, 0, open_low=True), number(float, 0)


def threshold(text):
    """The argparse type of --Vth."""
    return text if text == "auto" else positive(text)


def add_flags(parser, *, models, model_flags, seed_flag, backwards, engines, neurons, **defaults):
    """The flags of every program, in groups; each has its own `defaults`, and those of `neurons`."""
    add = parser.group("network and neurons")
    add(*model_flags, dest="model", choices=models, metavar="NAME", help="one of: " + ", ".join(models))
    add("--timesteps", type=count, metavar="T", help="time steps, 1 or more: the latency")
    text = "initial threshold, in the unit of the currents, above 0; auto: fitted to some training images"
    add("--Vth", type=threshold, metavar="VTH", help=text)
    add("--tau", type=positive, help="LIF: time constant of the membrane, in the unit of --delta_t; above 0")
    add("--delta_t", type=positive, help="LIF: length of a time step; above 0")
    add("--alpha", type=number(float, 0, open_low=True, high=1), help="fire at alpha*Vth; above 0, at most 1")
    add("--train_Vth", type=int, choices=(0, 1), default=1, help="1: thresholds are trained; 0: fixed")
    add("--Vth_bound", type=positive, help="thresholds do not fall below this; above 0, at most --Vth")
    text = "weights to start from, of this network or of its ANN; or the name of a network that comes trained"
    add("--pre_train", default="", metavar="FILE", may_change=True, help=text)
    add = parser.group("recipe")
    add("--epochs", type=count, help="passes over the training set, 1 or more")
    add("--start-epoch", type=natural, default=0, help="epoch to start from without --resume, from 0")
    add("--lr", "--learning-rate", type=positive, help="initial learning rate, above 0; cosine to 0")
    add("--warmup", type=natural, help="iterations of linear warm-up, 0 or more")
    add("--optimizer", type=str.lower, choices=("sgd", "adam"), help="SGD or adam")
    add("--momentum", type=non_negative, default=0.9, help="of SGD, 0 or more")
    add("--nesterov", action="store_true", help="Nesterov's momentum, of SGD")
    add("--weight-decay", "--wd", type=non_negative, help="of weights and thresholds alike, 0 or more")
    add("--Vth_grad_scale", type=positive, help="factor of the thresholds' gradient, above 0")
    add("--sync_bn", action="store_true", help="batch norm over the batches of all processes")
    add_run_flags(parser.group("run (a resumed run may change these)", may_change=True), seed_flag)
    add = parser.group("engine")
    add("--device", default="auto", may_change=True, help="auto, cpu, cuda or cuda:N")
    text = "collapsed: exact and fast; unrolled: the same, literally; rate: a cheaper approximation"
    add("--backward", choices=backwards, default="collapsed", help=text)
    text = "auto: spike by spike on CPUs, where that pays; events: always; dense: by tensors"
    add("--engine", choices=engines, default="auto", may_change=True, help=text)
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: spikes and their convolutions")
    text = "a mask a time step, as published (training then unrolls time), or one shared by all"
    add("--dropout_mask", choices=("step", "shared"), default="step", help=text)
    add("--compile", action="store_true", may_change=True, help="time loops through torch.compile")
    add("--deterministic", action="store_true", may_change=True, help="only operations that repeat exactly")
    settings = {name: neurons[name] for name in NEURON_SETTINGS}
    parser.set_defaults(**settings | dict(warmup_within_first_epoch=False) | defaults)


def add_run_flags(add, seed_flag):
    add("--name", default="", help="goes into the names of the run's files")
    text = "of everything random, from 0; drawn and recorded if not given"
    add(seed_flag, dest="manualSeed", type=number(int, 0, high=2**63 - 1), metavar="SEED", help=text)
    add("-c", "--checkpoint", default="./checkpoint", help="files go to its folder of the data set")
    add("--resume", default="", help="checkpoint to go on from; auto: this run's own, if there is one")
    add("--save_every", type=natural, default=0, metavar="N", help="a checkpoint every N iterations; 0: none")
    add("-p", "--print-freq", type=natural, default=0, metavar="N", help="a line every N iterations; 0: none")
    text = "print thresholds, representation errors and firing rates, and what --Vth auto would choose"
    add("--show_Vth", action="store_true", help=text)
    add("-e", "--evaluate", action="store_true", help="only test the model")
    add("--rate_stat", type=int, choices=(0, 1), default=0, help="1: --evaluate saves firing rates")
    text = "processes to load data, 0 to 256, as far as there are cores"
    add("-j", "--workers", type=number(int, 0, high=256), default=4, help=text)
    add("--pin_memory", action="store_true", help="load batches into page-locked memory (GPU)")


def load(args):
    """The Data of a run with these arguments."""
    return load_data(args.dataset, args.path, args.timesteps, getattr(args, "image_size", None))


def run(args, *, files, device, fixed, create_model, fit_thresholds, transfer=False):
    """Train or evaluate as the flags say; a run that goes on must keep the `fixed` ones. Raises UserError.

    `transfer`: the weights of --pre_train may be of another number of classes.
    """
    validate(args)
    seen = files.age()
    resumed, source = resume(args, files, fixed)
    set_up(args)
    with distributed.first_on_each_machine():
        data = load(args)
    found = distributed.gather((str(data), str(getattr(data.train, "classes", ""))))
    require(len(set(found)) == 1, f"the machines hold different data in {args.path}; give all the same")
    print(f"data: {args.dataset}, {data}")
    model = build_model(args, data.classes, device, create_model)
    trained = bool(resumed or args.pre_train)
    if resumed:
        checkpoint.load_weights(model, resumed["state_dict"], source)
        checkpoint.compare_classes(resumed, data.train, source)
        steps = f" and {resumed['iteration']} iterations" if resumed["iteration"] else ""
        best = f", best top-1 {resumed['best_acc']:.2f} %" if resumed["best_acc"] >= 0 else ""
        label = f", trained on {resumed['args']['trained_on']}" if "trained_on" in resumed["args"] else ""
        print(f"resumed from {source}: {resumed['epoch']} epochs{steps}{best}{label}")
    else:
        start_from(args, files, model, data.classes if transfer and not args.evaluate else None)
    workers = min(args.workers, os.cpu_count() or args.workers)
    loading = dict(workers=workers, pin_memory=args.pin_memory and device.type == "cuda")
    test = test_loader(data.test, batch_size=args.test_batch, **loading)
    if args.evaluate:
        if not trained:
            warn("no --resume, no --pre_train: these weights are not trained")
        model.train(not trained)  # untrained batch norms have no statistics yet
        start_thresholds(model, fit_thresholds, data, args, resumed, device)
        report(model, test, device, args.precision, files.firing_rates if args.rate_stat else None)
        return
    train = train_loader(data.train, batch_size=args.train_batch, seed=args.manualSeed, **loading)
    run = Run(args=args, files=files, device=device, model=model, train_loader=train, test_loader=test)
    if resumed:
        run.go_on(resumed, source)
    checkpoint.make_folder(files.folder)
    with alone(files):
        newer = f"{files.checkpoint} was written by another run while this one started; start again"
        require(distributed.broadcast(files.age() == seen), newer)
        start_thresholds(model.train(), fit_thresholds, data, args, resumed, device)
        run.train()
    for what in ("checkpoint", "best", "log", "curves", "arguments", "tensorboard"):
        if getattr(files, what).exists():
            print(f"{what + ':':13}{getattr(files, what)}")


def set_up(args):
    """The process as the flags want it: its seed, whether it repeats exactly, its memory."""
    torch.manual_seed(args.manualSeed)
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    keep_freed_memory()


def keep_freed_memory():
    """Have glibc's malloc, unless the environment sets it, keep what a step frees: new pages take time."""
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks, too, come from the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: whose end is not given back


def validate(args):
    """Refuse flags that do not fit each other."""
    odd = ", ".join(f"--{name}" for name, x in vars(args).items() if isinstance(x, str) and not is_line(x))
    require(not odd, f"{odd}: characters in it that no line can show; choose another name")
    slash, n = "/" in args.name or "\\" in args.name, distributed.world_size()
    require(not slash, f"--name {args.name!r} must not contain a slash; choose the folder by --checkpoint")
    taken = f"--name {args.name}: the files of another run may be called so; choose another ending"
    require(not args.name.endswith(TAKEN), taken)
    low = f"--Vth {args.Vth} lies below --Vth_bound {args.Vth_bound}; raise it or lower that"
    require(args.Vth == "auto" or args.Vth >= args.Vth_bound, low)
    require(args.momentum or not args.nesterov, "--nesterov needs a --momentum above 0")
    if args.rate_stat and not args.evaluate:
        warn("--rate_stat 1 counts spikes under --evaluate alone; training logs its own firing rates")
    share = f"the batch size {args.train_batch} is the total of {n} processes: use a multiple of it"
    require(args.train_batch % n == 0, share)


def resume(args, files, fixed):
    """The checkpoint to go on from and where it lay, or (None, None); completes the seed and the start."""
    resumed, source = checkpoint.resume(args.resume, files)
    lost = f"--resume auto: no checkpoint of this run in {files.folder} to evaluate; train first, or name one"
    require(resumed or args.pre_train or not args.evaluate or args.resume != "auto", lost)
    mine = vars(args) | dict(resumed=resumed and (resumed["epoch"], resumed["iteration"]))
    differing = {name for other in distributed.gather(mine) for name in mine if other[name] != mine[name]}
    differing = ", ".join(sorted(differing))
    shared = "all machines must share the folder of --checkpoint, and of --resume"
    require(differing != "resumed", f"the processes found different checkpoints: {shared}")
    require(not differing, f"the processes got different {differing}; start them alike")
    earlier = resumed["args"] if resumed else {}
    seed, now = distributed.broadcast((random.randint(1, 10000), datetime.now().isoformat()))
    if args.manualSeed is None:
        args.manualSeed = earlier.get("manualSeed", seed)
    args.started = earlier.get("started") if resumed else now
    if resumed:
        compare(args, resumed, source, fixed)
        own = source in files.checkpoints
        args.pre_train = earlier.get("pre_train", "")  # this and the next for the tables
        args.went_on_from = earlier.get("went_on_from", "") if own else str(args.resume)
    return resumed, source


def compare(args, resumed, source, fixed):
    """Refuse a checkpoint of another model; name the settings that differ, and refuse them under `auto`."""
    earlier = resumed["args"]
    model = earlier.get("model", resumed.get("arch", args.model))
    if model != args.model:
        raise UserError(f"{source} is a checkpoint of {model}, not of {args.model}; choose that model")
    names = [name for name in fixed if not args.evaluate or name in (*NEURON_SETTINGS, "image_size")]
    differing = [name for name in names if name in earlier and earlier[name] != getattr(args, name)]
    if not differing:
        return
    text = "; ".join(f"{name} {str(earlier[name])[:60]}, now {getattr(args, name)}" for name in differing)
    if args.resume == "auto" and not args.evaluate:
        raise UserError(f"{source} was trained with {text}; to change that, say --resume {source}")
    warn(f"{source} was trained with {text}")
    if resumed["iteration"] and "train_batch" in differing:
        warn("the epoch that was under way starts again, since its batches differ")
        resumed["iteration"] = 0


def start_from(args, files, model, classes):
    """Copy the weights of --pre_train, for `classes` see `load_weights`, and the thresholds of --load_Vth."""
    if args.pre_train:
        path = checkpoint.find(args.pre_train, files.folder)
        content = foreign.load(path)
        checkpoint.load_weights(model, content["state_dict"], path, optional=("Vth",), classes=classes)
        compare_neurons(args, model, content, path)
    if getattr(args, "load_Vth", ""):
        load_thresholds(model, checkpoint.find(args.load_Vth, files.folder))


def build_model(args, classes, device, create_model):
    """The network of the flags, on the device."""
    settings, auto = {name: getattr(args, name) for name in MODEL_SETTINGS}, args.Vth == "auto"
    if auto:
        settings["Vth"] = max(1.0, args.Vth_bound)
    with explained(lambda why: f"no network {args.model} with these settings: {why}", TypeError, ValueError):
        model = create_model(args.model, num_classes=classes, train_Vth=bool(args.train_Vth), **settings)
    for _, neuron in neuron_layers(model) if auto else ():  # until they are fitted: spikes of size 1
        neuron.Vth.data.fill_(max(neuron.unit, args.Vth_bound))
    model = model.to(device)
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
    device, hint = torch.device(device), "leave it out for the dense engine"
    with explained(lambda why: f"--engine events: {why}; {hint}", RuntimeError), autocast(device, precision):
        engine, reason = model.engine_in_use(device)
    print(f"engine: {engine.name}" + (f" ({reason})" if reason else ""))


def report(model, loader, device, precision, firing_rate_file):
    """Print loss and accuracy on the test set; with a file to save them to, the firing rates as well."""
    if firing_rate_file is not None:
        spiking = any(neuron_layers(model))
        require(spiking, "--rate_stat 1: an ANN has no firing rates; evaluate an _if or _lif model")
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

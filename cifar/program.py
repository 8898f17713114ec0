"""What the CIFAR programs share: the published flags, and one run from flags to files."""

import random
from datetime import datetime
from pathlib import Path

import torch

from cifar.presets import PRESETS
from models import create_model, list_models
from models.neurons import ReLU
from models.registry import BACKWARDS, CIFAR_SETTINGS
from models.synchronized import synchronize
from utils import checkpoint, distributed
from utils.cli import Parser, UserError, choose_device, number, warn
from utils.data import DATASETS, EVENT_DATASETS, load_data, test_loader, train_loader
from utils.records import RunFiles
from utils.training import evaluate, fit, load_optimizer, make_optimizer

NEURON_SETTINGS = ("timesteps", "Vth", "tau", "delta_t", "alpha", "Vth_bound")

count, natural = number(int, 1), number(int, 0)
positive, non_negative = number(float, 0, open_low=True), number(float, 0)


def get_parser(description, lr, processes=False):
    """The published flags with their defaults, and ours: --preset, --device and those behind it."""
    parser = Parser(PRESETS, description=description)
    add = parser.add_argument
    names = ", ".join(DATASETS)
    add("-d", "--dataset", choices=DATASETS, metavar="NAME", default="cifar10", help=f"one of: {names}")
    add("--path", default="./data", help="folder of the data set")
    add("-j", "--workers", type=natural, default=4, help="processes that load data besides the program's own")
    names = ", ".join(list_models())
    models = dict(choices=list_models(), metavar="NAME", help=f"one of: {names}")
    add("--model", default="preresnet.resnet18_if", **models)
    add("--name", default="", help="suffix of the names of the run's files")
    add("--timesteps", type=count, default=CIFAR_SETTINGS["timesteps"], help="T, the latency")
    add("--Vth", type=positive, default=CIFAR_SETTINGS["Vth"], help="initial threshold")
    add("--tau", type=positive, default=CIFAR_SETTINGS["tau"], help="LIF: time constant of the membrane")
    add("--delta_t", type=positive, default=CIFAR_SETTINGS["delta_t"], help="LIF: length of a time step")
    alpha = number(float, 0, open_low=True, high=1)
    add("--alpha", type=alpha, default=CIFAR_SETTINGS["alpha"], help="fire at alpha*Vth")
    add("--train_Vth", type=int, choices=(0, 1), default=1, help="1: thresholds are trained; 0: fixed")
    add("--Vth_bound", type=positive, default=CIFAR_SETTINGS["Vth_bound"], help="thresholds stay above this")
    add("--rate_stat", type=int, choices=(0, 1), default=0, help="1: --evaluate saves firing rates")
    add("--epochs", type=count, default=200)
    add("--start-epoch", type=natural, default=0, help="epoch to start from without --resume")
    add("--train-batch", type=count, default=128)
    add("--test-batch", type=count, default=50)
    add("--lr", "--learning-rate", type=positive, default=lr, help="initial learning rate; cosine to 0")
    add("--warmup", type=natural, default=400, help="iterations of linear warm-up")
    add("--momentum", type=non_negative, default=0.9)
    add("--nesterov", action="store_true")
    add("--weight-decay", "--wd", type=non_negative, default=5e-4)
    add("--optimizer", type=str.lower, choices=("sgd", "adam"), default="SGD", help="SGD or adam")
    add("-c", "--checkpoint", default="./checkpoint", help="files go to <checkpoint>/<dataset>/")
    add("--resume", default="", help="checkpoint to go on from; auto: this run's own, if there is one")
    seed = number(int, 0, high=2**63 - 1)
    add("--manualSeed", type=seed, help="seed of everything random; drawn and recorded if not given")
    add("-e", "--evaluate", action="store_true", help="only test the model (of --resume)")
    add("--pin_memory", action="store_true", help="load batches into page-locked memory (GPU)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    text = "collapsed: exact and fast; unrolled: the same, literally; rate: a cheaper approximation"
    add("--backward", choices=BACKWARDS, default="collapsed", help=text)
    text = "bf16: spikes and their convolutions in bfloat16"
    add("--precision", choices=("fp32", "bf16"), default="fp32", help=text)
    text = "a mask a time step, as published (training then unrolls time), or one shared by all"
    add("--dropout_mask", choices=("step", "shared"), default="step", help=text)
    add("--compile", action="store_true", help="run the time loops through torch.compile")
    scale = "factor of the thresholds' gradient"
    add("--Vth_grad_scale", type=positive, default=1.0, help=scale)
    if processes:
        add("--sync_bn", action="store_true", help="batch norm over the batches of all processes")
        add("--local_rank", "--local-rank", type=int, help="set by the launcher")
    return parser


def main(argv, description, lr, processes=False):
    """Train or evaluate as the flags say, in one process or several. Raises UserError."""
    args = get_parser(description, lr, processes).parse(argv)
    device = choose_device(args.device)
    if processes:
        del args.local_rank  # the environment holds it as well
        device = distributed.join(device)
    if "/" in args.name or "\\" in args.name:
        raise UserError(f"--name {args.name!r} must not contain a slash; choose the folder by --checkpoint")
    if args.Vth < args.Vth_bound:
        raise UserError(f"--Vth {args.Vth} lies below --Vth_bound {args.Vth_bound}; raise it or lower that")
    if args.nesterov and not args.momentum:
        raise UserError("--nesterov needs a --momentum above 0")
    if args.model.startswith("vgg.") != (args.dataset in EVENT_DATASETS):
        raise UserError(
            f"--model {args.model} does not fit --dataset {args.dataset}: vgg.* takes event frames"
        )
    files = RunFiles(Path(args.checkpoint, args.dataset), args.model + args.name)
    resumed, source = checkpoint.resume(args.resume, files)
    earlier = resumed["args"] if resumed else {}
    distributed.agree(vars(args) | dict(resumed_epoch=resumed and resumed["epoch"]))
    if args.train_batch % distributed.world_size():
        n = distributed.world_size()
        raise UserError(
            f"--train-batch {args.train_batch} is the total of {n} processes: use a multiple of {n}"
        )
    if args.manualSeed is None:
        args.manualSeed = earlier.get("manualSeed", distributed.share(random.randint(1, 10000)))
    compare_settings(args, earlier, source)
    now = distributed.share(datetime.now().isoformat(timespec="microseconds"))
    args.started = earlier.get("started") if resumed else now

    torch.manual_seed(args.manualSeed)
    torch.backends.cudnn.benchmark = True
    with distributed.first_on_each_machine():
        data = load_data(args.dataset, args.path, args.timesteps)
    print(f"data: {args.dataset}, {len(data.train)} training, {len(data.test)} test, {data.classes} classes")
    model = build_model(args, data.classes, device)
    loading = dict(workers=args.workers, pin_memory=args.pin_memory and device.type == "cuda")
    test = test_loader(data.test, batch_size=args.test_batch, **loading)
    if resumed:
        checkpoint.load_weights(model, resumed["state_dict"], source)
        print(f"resumed from {source}: {resumed['epoch']} epochs, best top-1 {resumed['best_acc']:.2f} %")
    if args.evaluate:
        if not resumed:
            warn("no --resume: these weights are not trained")
        report(model, test, device, args.precision, files.firing_rates if args.rate_stat else None)
        return

    train = train_loader(data.train, batch_size=args.train_batch, seed=args.manualSeed, **loading)
    if (len(train.sampler) % train.batch_size or train.batch_size) * model.timesteps == 1:
        raise UserError("batch norm cannot work on one image at one time step; change --train-batch")
    recipe = dict(lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay, nesterov=args.nesterov)
    optimizer = make_optimizer(args.optimizer, model.parameters(), **recipe)
    if resumed and "optimizer" in resumed:
        load_optimizer(optimizer, resumed["optimizer"], source)
    fit(model, optimizer, train, test, args, files, resumed, source, device)
    for what in ("checkpoint", "best", "log", "curves", "arguments", "tensorboard"):
        if getattr(files, what).exists():
            print(f"{what + ':':13}{getattr(files, what)}")


def compare_settings(args, earlier, source):
    """Refuse a checkpoint of another model; say which settings of the neurons differ from its own."""
    if earlier.get("model", args.model) != args.model:
        raise UserError(f"{source} is a checkpoint of {earlier['model']}; give --model {earlier['model']}")
    settings = {name: getattr(args, name) for name in NEURON_SETTINGS}
    differing = [
        f"{n} {earlier[n]}, now {value}" for n, value in settings.items() if earlier.get(n, value) != value
    ]
    if differing:
        warn(f"{source} was trained with {'; '.join(differing)}")


def build_model(args, classes, device):
    """The network of the flags, on the device."""
    settings = {name: getattr(args, name) for name in NEURON_SETTINGS}
    settings.update(backward=args.backward, dropout_mask=args.dropout_mask, train_Vth=bool(args.train_Vth))
    settings.update(Vth_grad_scale=args.Vth_grad_scale)
    model = create_model(args.model, num_classes=classes, **settings).to(device)
    if args.compile:
        try:
            model.compile_loops()
        except RuntimeError as error:
            warn(f"--compile is left out: {error}")
    if getattr(args, "sync_bn", False) and distributed.world_size() > 1:
        synchronize(model)
    return model


def report(model, loader, device, precision, firing_rate_file):
    """Print loss and accuracy on the test set; with a file to save them to, the firing rates as well."""
    if firing_rate_file is not None:
        if isinstance(model.last_neuron, ReLU):
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

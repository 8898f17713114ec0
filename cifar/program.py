"""What the CIFAR programs share: the published flags and their defaults."""

from pathlib import Path

from cifar.presets import PRESETS
from models import create_model, list_models
from models.engines import ENGINES
from models.layers import BACKWARDS
from models.registry import CIFAR_SETTINGS
from utils import distributed
from utils.cli import Parser, UserError, choose_device, number
from utils.data import DATASETS, EVENT_DATASETS, load_data
from utils.program import add_flags, count, run
from utils.records import RunFiles


def get_parser(description, lr, processes=False):
    """The published flags with their defaults, and ours: --preset, --device and those behind it."""
    parser = Parser(PRESETS, description=description)
    add = parser.add_argument
    names = ", ".join(DATASETS)
    add("-d", "--dataset", choices=DATASETS, metavar="NAME", default="cifar10", help=f"one of: {names}")
    add("--path", default="./data", help="folder of the data set")
    models = [name for name in list_models() if name.startswith(("preresnet.", "vgg."))]
    text = "one of: " + ", ".join(models)
    add("--model", choices=models, metavar="NAME", default="preresnet.resnet18_if", help=text)
    add("--train-batch", type=count, default=128)
    add("--test-batch", type=count, default=50)
    seed = number(int, 0, high=2**63 - 1)
    add("--manualSeed", type=seed, help="seed of everything random; drawn and recorded if not given")
    neurons = {name: value for name, value in CIFAR_SETTINGS.items() if name != "num_classes"}
    training = dict(epochs=200, lr=lr, warmup=400, weight_decay=5e-4, optimizer="SGD")
    add_flags(parser, BACKWARDS, ENGINES, **neurons, **training)
    if processes:
        add("--local_rank", "--local-rank", type=int, help="set by the launcher")
    return parser


def main(argv, description, lr, processes=False):
    """Train or evaluate as the flags say, in one process or several. Raises UserError."""
    args = get_parser(description, lr, processes).parse(argv)
    device = choose_device(args.device)
    if processes:
        del args.local_rank  # the environment holds it as well
        device = distributed.join(device)
    if args.model.startswith("vgg.") != (args.dataset in EVENT_DATASETS):
        raise UserError(
            f"--model {args.model} does not fit --dataset {args.dataset}: vgg.* takes event frames"
        )
    files = RunFiles(Path(args.checkpoint, args.dataset), args.model + args.name)
    run(args, files, device, lambda: load_data(args.dataset, args.path, args.timesteps), create_model)

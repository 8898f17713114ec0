"""What the CIFAR programs share: the published flags and their defaults."""

from pathlib import Path

from models import create_model, fit_thresholds, list_models
from models.engines import ENGINES
from models.layers import BACKWARDS
from models.registry import NETWORKS
from utils import distributed
from utils.cli import Parser, choose_device, read_presets, require
from utils.data import DATASETS
from utils.program import add_flags, count, run
from utils.records import RunFiles

SCRIPT, SEED_FLAG = "cifar/main_single_gpu.py", "--manualSeed"
ROWS, OTHERS = read_presets(Path(__file__).with_name("presets.md"))
MODELS = list_models("cifar")


def get_parser(description="", lr=0.1, processes=False):
    """The published flags with their defaults, and ours."""
    parser = Parser(ROWS | OTHERS, description=description)
    add, names = parser.group("data"), [name for name in DATASETS if name != "imagenet"]
    add("-d", "--dataset", choices=names, metavar="NAME", help="one of: " + ", ".join(names))
    add("--path", may_change=True, help="folder of the data set")
    add("--train-batch", type=count, help="images a step, of all processes together; 1 or more")
    add("--test-batch", type=count, may_change=True, help="the same in tests")
    if processes:
        add("--local_rank", "--local-rank", type=int, may_change=True, help="set by the launcher")
    defaults = dict(dataset="cifar10", path="./data", train_batch=128, test_batch=50, epochs=200, lr=lr)
    defaults |= dict(warmup=400, weight_decay=5e-4, optimizer="sgd", model="preresnet.resnet18_if")
    names = dict(models=MODELS, model_flags=["--model"], seed_flag=SEED_FLAG)
    names |= dict(backwards=BACKWARDS, engines=ENGINES)
    add_flags(parser, **names, neurons=NETWORKS[defaults["model"]].defaults, **defaults)
    return parser


def run_files(args):
    """Where the run with these arguments leaves its files."""
    return RunFiles(Path(args.checkpoint, args.dataset), args.model + args.name)


def main(argv=None, description="", lr=0.1, processes=False):
    """Train or evaluate as the flags say, in one process or several. Raises UserError."""
    parser = get_parser(description, lr, processes)
    args = parser.parse(argv)
    device = choose_device(args.device)
    if processes:
        del args.local_rank  # the environment holds it as well
        device = distributed.join(device)
    source, takes = DATASETS[args.dataset], NETWORKS[args.model]
    fit = f"--model {args.model} takes {takes.inputs} of {takes.shape}, --dataset {args.dataset} holds"
    same = (takes.inputs, takes.shape) == (source.inputs, source.shape)
    require(same, f"{fit} {source.inputs} of {source.shape}; choose others")
    own = dict(create_model=create_model, fit_thresholds=fit_thresholds, transfer=True)
    run(args, files=run_files(args), device=device, fixed=parser.fixed, **own)
    distributed.leave()

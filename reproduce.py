"""The paper's tables, row by row: what there is, run one, write the table of results, look into a network.

    python reproduce.py list
    python reproduce.py run latency-lif-t5 --seeds 3 --path ./data
    python reproduce.py table
    python reproduce.py report CHECKPOINT --timesteps 5 10 20

`run` takes all flags of the row's program. It starts that program once for each seed, goes on where it was
stopped and skips what is finished. With flags that change the row (fewer epochs, another copy of the data)
the run gets a name of its own, and `list` and `table` keep it apart from the runs of the row itself.
"""

import argparse
import sys
import zlib
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Subset

import cifar.presets
import cifar.program
import imagenet.main
import imagenet.presets
from models import create_model, list_models
from utils import checkpoint, report, results, session
from utils.calibration import load_thresholds
from utils.cli import Parser, UserError, choose_device, run_program
from utils.data import load_data
from utils.program import NEUTRAL, build_model, count
from utils.records import RunFiles


class Program(NamedTuple):
    """What this file needs to know of a program."""

    script: str
    rows: dict  # name -> (the paper's figure, settings)
    get_parser: callable
    seed: str  # its flag for the seed

    def files(self, args):
        """Where the run with these arguments leaves its files."""
        if self is CIFAR:
            return RunFiles(Path(args.checkpoint, args.dataset), args.model + args.name)
        return RunFiles(Path(args.checkpoint, "imagenet"), args.name or args.model, accuracy="acc1")

    def load(self, args, timesteps):
        """The Data that a run with these arguments sees, but for the time steps."""
        if self is CIFAR:
            return load_data(args.dataset, args.path, timesteps)
        return imagenet.main.imagenet(Path(args.path), args.image_size)


parser_of_cifar = partial(cifar.program.get_parser, "", lr=0.1)
CIFAR = Program("cifar/main_single_gpu.py", cifar.presets.ROWS, parser_of_cifar, "--manualSeed")
IMAGENET = Program("imagenet/main.py", imagenet.presets.ROWS, imagenet.main.get_parser, "--seed")
PROGRAMS = {row: program for program in (CIFAR, IMAGENET) for row in program.rows}
ROWS = CIFAR.rows | IMAGENET.rows
# A row may stand in several tables, as T=20 does: what has the same settings is run once, by its first name.
FIRST = {row: next(r for r in ROWS if ROWS[r][1] == settings) for row, (_, settings) in ROWS.items()}
IMAGES = {"cifar10": 50000, "cifar100": 50000, "CIFAR10DVS": 9000, "imagenet": 1281167}  # of training
# 1.64 s for 8 images at T=20 through a ResNet-18 of 0.48 GMAC (read-me): days for 10^15 of them on 2 cores.
DAYS = 1.64 / (8 * 20 * 0.48e9) * 1e15 / 86400


def departures(row, args):
    """In what the arguments `args` (a dict) depart from the row: text for readers, text for a file's name.

    Image folders, which nothing checks, count as another copy unless they lie where the row has them.
    """
    expected = vars(PROGRAMS[row].get_parser().parse(["--preset", row]))
    names = [name for name in expected if name not in NEUTRAL]
    if PROGRAMS[row] is IMAGENET or args["dataset"] == "imagefolder":
        names.append("path")
    names = [name for name in sorted(names) if args.get(name, expected[name]) != expected[name]]
    values = {name: Path(args[name]).name if name == "path" else args[name] for name in names}
    text = "; ".join(f"{name} {value} instead of {expected[name]}" for name, value in values.items())
    stem = "".join(f"_{name}-{Path(str(value)).name}" for name, value in values.items())
    return text, stem if len(stem) <= 60 else f"_{zlib.crc32(stem.encode()):08x}"


def name_of(row, seed, flags):
    """The name of a run, which is that of a run with the same settings."""
    args = PROGRAMS[row].get_parser().parse(["--preset", row, *flags])
    return f"{row}_s{seed}{departures(row, vars(args))[1]}"


def plan(row, seed, flags):
    """The command line of a run, without the script; its arguments; its files."""
    program = PROGRAMS[row]
    for flag in ("--preset", "--name", "--resume", program.seed, "--evaluate", "-e"):
        if any(word.partition("=")[0] == flag for word in flags):
            raise UserError(f"{flag} is not for `run`, which sets it; start {program.script} itself")
    argv = ["--preset", row, *flags, program.seed, str(seed), "--resume", "auto"]
    args = program.get_parser().parse(argv)
    argv += ["--name", ("_" if program is CIFAR else "") + name_of(row, seed, flags)]
    for name in ("pre_train", "calculate_Vth", "load_Vth"):  # files of the chain, named after their rows
        file = ROWS[row][1].get(name)
        if file and file == getattr(args, name):
            argv += [f"--{name}", name_of(Path(file).stem, seed, flags) + Path(file).suffix]
    args = program.get_parser().parse(argv)
    return argv, args, program.files(args)


def run(row, seeds, flags, command):
    """Start the row's program once for each seed that is not finished; end with its status if it fails."""
    if FIRST[row] != row:
        print(f"{row} has the settings of {FIRST[row]}: its runs are those")
    for seed in range(1, seeds + 1):
        argv, args, files = plan(FIRST[row], seed, flags)
        thresholds = getattr(args, "calculate_Vth", "")
        result = files.folder / f"{thresholds}.dict" if thresholds else files.log
        if result.exists() and (thresholds or len(results.epochs_done(files, args.epochs)) >= args.epochs):
            print(f"{row}, seed {seed}, is finished: {result}")
            continue
        where = dict(record=files.session, device=args.device, command=command)
        if status := session.start(PROGRAMS[row].script, argv, **where):
            sys.exit(status if status > 0 else 128 - status)


def find_runs(folder):
    """(row, departures) -> the Outcomes of the runs below `folder`, one a seed, in the order of the rows."""
    found = {}
    for file in sorted(folder.glob("*/*.json")):
        outcome = results.read_outcome(file)
        if outcome is None or outcome.args.get("preset") not in ROWS:
            continue
        row, done = FIRST[outcome.args["preset"]], len(outcome.epochs)
        text, _ = departures(row, outcome.args)
        if done < outcome.args["epochs"]:
            text += "; " * bool(text) + f"stopped after {done} of {outcome.args['epochs']} epochs"
        found.setdefault((row, text), {})[outcome.args["manualSeed"]] = outcome
    ordered = sorted(found, key=lambda key: (list(ROWS).index(key[0]), key[1]))
    return {key: list(found[key].values()) for key in ordered}


def list_rows(folder):
    """Print the rows: the paper's figure, the estimated cost, what has been measured."""
    found = find_runs(folder)
    print(f"{'row':32}{'paper':14}{'PMAC':>9}{'days on 2 cores':>17}  measured so far (n seeds)")
    for row, (paper, _) in ROWS.items():
        measured = [
            f"{results.spread(o.last for o in outcomes)} (n={len(outcomes)}{', ' * bool(text)}{text})"
            for (name, text), outcomes in found.items()
            if name == FIRST[row]
        ]
        pmac = cost(row)
        print(f"{row:32}{paper or '-':14}{pmac:9.3g}{DAYS * pmac:17.3g}  {' | '.join(measured) or '-'}")
    print("PMAC: 10^15 multiply-accumulates in the forward passes of training. Days: at the speed of the")
    print("read-me's ResNet-18 on a CPU.")


def cost(row):
    """An estimate of a row's cost: 10^15 multiply-accumulates in the forward passes of its training."""
    args = PROGRAMS[row].get_parser().parse(["--preset", row])
    images = args.epochs * IMAGES[getattr(args, "dataset", "imagenet")]
    if getattr(args, "calculate_Vth", ""):
        images = args.calibrate_batches * args.train_batch
    spiking = args.model.endswith(("_if", "_lif"))
    return macs(args.model) * images * (args.timesteps if spiking else 1) / 1e15


@cache
def macs(model):
    """Multiply-accumulates of one image through the network at one time step."""
    size = (1, 1, 2, 48, 48) if model.startswith("vgg") else (1, 3, 32, 32)
    size = (1, 3, 224, 224) if model.startswith("preresnet_") else size
    network = create_model(model, timesteps=1).eval()
    with torch.no_grad(), report.watch(network) as sums:
        network(torch.zeros(size))
    return sum(float(value) for (what, _), value in sums.items() if what == "dense")


def report_checkpoint(options):
    """Write the report of a checkpoint beside it, as Markdown and a picture."""
    file = checkpoint.find(options.checkpoint, ".")
    content = checkpoint.load(file)
    settings = content.get("args")
    if not isinstance(settings, dict) or "model" not in settings:
        raise UserError(f"{file} does not hold the settings of its run (args), which a report needs")
    program = IMAGENET if settings["model"].startswith("preresnet_") else CIFAR
    args = program.get_parser().parse([])
    vars(args).update(settings, compile=False, sync_bn=False)
    network, _, kind = args.model.rpartition("_")
    if kind not in ("if", "lif"):
        raise UserError(f"{file} is of {args.model}, an ANN; give a checkpoint of an _if or _lif model")
    ann = network.replace("_snn", "_ann") if program is IMAGENET else f"{network}_ann"
    if options.ann and ann not in list_models():
        raise UserError(f"--ann: there is no {ann}")
    if options.thresholds and not options.ann:
        raise UserError("--thresholds needs the weights of an ANN: --ann FILE")
    args.path, device = options.path or args.path, choose_device(options.device)

    def of(T, model=args.model, source=file, thresholds=None):
        """The Measurement of the network with the weights in `source` and T time steps."""
        data = program.load(args, T)
        n = min(options.limit or len(data.test), len(data.test))
        chosen = Subset(data.test, [i * len(data.test) // n for i in range(n)])  # of all classes
        setting = argparse.Namespace(**vars(args) | dict(model=model, timesteps=T))
        snn = build_model(setting, data.classes, device, create_model)
        weights = content if source == file else checkpoint.load(source)
        checkpoint.load_weights(snn, weights["state_dict"], source, ("Vth",) if thresholds else ())
        if thresholds:
            load_thresholds(snn, thresholds)
        batches = DataLoader(chosen, options.batch, num_workers=options.workers)
        return report.measure(snn, ((x.to(device), y.to(device)) for x, y in batches))

    steps, chain = sorted({args.timesteps, *options.timesteps}), None
    measured = [of(T) for T in steps]
    if options.ann:
        source = checkpoint.find(options.ann, file.parent)
        thresholds = options.thresholds and checkpoint.find(options.thresholds, file.parent)
        converted = [of(T, source=source, thresholds=thresholds) for T in steps] if thresholds else []
        chain = of(1, ann, source).accuracy, converted
    data = getattr(args, "dataset", "imagenet")
    text = (
        f"{file.name}: {args.model}, {content.get('epoch')} epochs on {data} from {args.path}. Measured on "
    )
    text += f"{measured[0].images} test images, {session.hardware(options.device)}."
    page = file.with_name(f"{file.stem}_report.md")
    report.make_page(page, text, measured, args.timesteps, chain)
    print(f"report: {page}\npicture: {page.with_suffix('.png')}")


def get_parser():
    parser = Parser({}, description=__doc__)
    tasks = parser.add_subparsers(dest="task", required=True, parser_class=partial(Parser, {}))
    text = "the programs' folder of results"
    for name in ("list", "table"):
        task = tasks.add_parser(name)
        task.add_argument("-c", "--checkpoint", type=Path, default=Path("checkpoint"), help=text)
    task.add_argument("--out", type=Path, default=session.ROOT / "RESULTS.md")
    task = tasks.add_parser("run", description="All other flags go to the program of the row.")
    task.add_argument("row", metavar="ROW", help="a name of `list`")
    task.add_argument("--seeds", type=count, default=1, help="run with the seeds 1 to this")
    task = tasks.add_parser("report")
    add = task.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="of a spiking network; the report is put beside it")
    add("--timesteps", type=count, nargs="+", default=[], help="also evaluate with these T")
    add("--limit", type=count, help="only so many test images, of all classes")
    add("--ann", help="weights of the ANN of the same shape, for its accuracy")
    add("--thresholds", help="with --ann: thresholds, for the SNN straight after conversion")
    add("--path", help="folder of the data set, if not that of training")
    add("--batch", type=count, default=10)
    add("--workers", type=int, default=0)
    add("--device", default="auto")
    return parser


def main(argv=None):
    options, flags = get_parser().parse_known_args(argv)
    if options.task == "run":
        if options.row not in ROWS:
            raise UserError(f"unknown row {options.row!r}; choose from: {', '.join(ROWS)}")
        command = ["python", "reproduce.py", *(sys.argv[1:] if argv is None else argv)]
        return run(options.row, options.seeds, flags, command)
    if flags:
        raise UserError(f"unrecognized arguments: {' '.join(flags)}; --help lists the flags")
    if options.task == "list":
        return list_rows(options.checkpoint)
    if options.task == "table":
        rows = {row: (paper, FIRST[row]) for row, (paper, _) in ROWS.items()}
        checkpoint.save_text(results.make_page(rows, find_runs(options.checkpoint)), options.out)
        return print(f"results: {options.out}")
    return report_checkpoint(options)


if __name__ == "__main__":
    run_program(main)

"""The paper's tables, row by row: what there is, run one, write the table of results, look into a network.

    python reproduce.py list
    python reproduce.py run latency-lif-t5 --seeds 3 --path ./data
    python reproduce.py table
    python reproduce.py curves
    python reproduce.py report CHECKPOINT --timesteps 5 10 20 --bits 8 4
    python reproduce.py publish CHECKPOINT NAME --trained_on "a JPEG copy of CIFAR-10"

`run` takes all flags of the row's program. It starts that program once for each seed, goes on where it was
stopped and skips what is finished. With flags that change the row (fewer epochs, another copy of the data)
the run gets a name of its own, and `list` and `table` keep it apart from the runs of the row itself.
`publish` puts a finished run's last weights among the networks that come trained (checkpoint/README.md).
"""

import argparse
import shlex
import sys
from functools import cache, partial
from pathlib import Path

from torch.utils.data import DataLoader, Subset

from cifar import program as cifar
from cifar.predict import load_network
from imagenet import main as imagenet
from models import create_model
from models.registry import NETWORKS
from utils import checkpoint, curves, foreign, pretrained, report, results
from utils.cli import Parser, choose_device, number, refuse, require, run_program, unknown, warn
from utils.data import load_data
from utils.program import build_model, count, load
from utils.quantized import round_weights
from utils.records import alone
from utils.thresholds import load_thresholds

PROGRAMS = dict.fromkeys(cifar.ROWS, cifar) | dict.fromkeys(imagenet.ROWS, imagenet)
ROWS = cifar.ROWS | imagenet.ROWS
# A row may stand in several tables, as T=20 does: what has the same flags is run once, by its first name.
FIRST = {row: next(r for r in ROWS if ROWS[r].flags == preset.flags) for row, preset in ROWS.items()}
CURVES = "docs/curves.png"  # beside RESULTS.md


def name_of(row, seed, flags):
    """The name of a run, which is that of a run with the same settings."""
    parser = PROGRAMS[row].get_parser()
    args = parser.parse(["--preset", row, *flags])
    return f"{row}_s{seed}{results.departures(parser, row, vars(args))[1]}"


def plan(row, seed, flags):
    """The command line of a run, without the script; its arguments; its files."""
    program = PROGRAMS[row]
    parse, argv = program.get_parser().parse, ["--preset", row, *flags]
    for flag in ("--preset", "--name", "--resume", program.SEED_FLAG, "--evaluate", "-e"):
        given = any(word.partition("=")[0] == flag for word in flags)
        require(not given, f"{flag} is not for `run`, which trains and names; start {program.SCRIPT} itself")
    published, given = parse(argv[:2]), parse(argv)
    argv += [program.SEED_FLAG, str(seed), "--resume", "auto"]
    argv += ["--name", ("_" if program is cifar else "") + name_of(row, seed, flags)]
    for name in ("pre_train", "calculate_Vth", "load_Vth"):  # files of the chain, named after their rows
        file = getattr(published, name, "")
        if file and file == getattr(given, name):
            argv += [f"--{name}", name_of(Path(file).stem, seed, flags) + Path(file).suffix]
    args = parse(argv)
    return argv, args, program.run_files(args)


def run(row, seeds, flags, command):
    """Run the row's program once for each of the seeds that is not finished."""
    if FIRST[row] != row:
        print(f"{row} has the settings of {FIRST[row]}: its runs are those")
    for seed in seeds:
        argv, args, files = plan(FIRST[row], seed, flags)
        results.compare_sources(files, args)
        thresholds = getattr(args, "calculate_Vth", "")
        result = files.folder / f"{thresholds}.dict" if thresholds else files.log
        if result.exists() and (thresholds or len(foreign.read_log(result)) >= args.epochs):
            print(f"{row}, seed {seed}, is finished: {result}")
            continue
        checkpoint.make_folder(files.folder)
        with alone(files):
            results.add_session(files.session, args.device, command)
        print("python", PROGRAMS[row].SCRIPT, shlex.join(argv), flush=True)
        PROGRAMS[row].main(argv)


def find_runs(folder):
    """(row, departures) -> the Outcomes of the runs below `folder`, by seed, in the order of the rows."""
    found = {}
    for file in sorted(set(folder.glob("*/*.json")) - set(folder.glob("*/*.run.json"))):
        outcome = results.Outcome(file)
        if not outcome.epochs or outcome.args.get("preset") not in ROWS:
            continue
        row, done = FIRST[outcome.args["preset"]], len(outcome.epochs)
        text, _ = results.departures(PROGRAMS[row].get_parser(), row, outcome.args)
        if done < outcome.args["epochs"]:
            text += "; " * bool(text) + f"stopped after {done} of {outcome.args['epochs']} epochs"
        runs, seed = found.setdefault((row, text), {}), outcome.args["manualSeed"]
        if seed in runs:
            warn(f"{file.stem} is left out: {runs[seed].files.log.stem} has the same settings and seed")
        runs.setdefault(seed, outcome)
    ordered = sorted(found, key=lambda key: (list(ROWS).index(key[0]), key[1]))
    return {key: [outcome for _, outcome in sorted(found[key].items())] for key in ordered}


def list_rows(options):
    """Print the rows: the paper's figure, the estimated cost, what has been measured; and other presets."""
    found = find_runs(options.checkpoint)
    print(f"{'row':32}{'paper':14}{'PMAC':>9}{'days on 2 cores':>17}  measured so far (n seeds)")
    for row, preset in ROWS.items():
        args = PROGRAMS[row].get_parser().parse(["--preset", row])
        T = args.timesteps if NETWORKS[args.model].kind != "ann" else 1
        measured = [
            f"{results.last_accuracy(outcomes)} (n={len(outcomes)}{', ' * bool(text)}{text})"
            for (name, text), outcomes in found.items()
            if name == FIRST[row]
        ]
        cost = f"{preset.cost:>9}{results.days(float(preset.cost), T):17.3g}"
        print(f"{row:32}{preset.paper:14}{cost}  {' | '.join(measured) or '-'}")
    print("PMAC: 10^15 multiply-accumulates in the forward passes of training. Days: if they take as long as")
    print(f"in the read-me's ResNet-18 LIF. Presets that are no rows: {', '.join(cifar.OTHERS)}")


def report_checkpoint(options):
    """Write the report of a checkpoint beside it, as Markdown and a picture."""
    file = checkpoint.find(options.checkpoint, ".")
    content = foreign.load(file)
    settings = content["args"] if isinstance(content.get("args"), dict) else {}
    require("model" in settings, f"{file} does not hold the settings of its run (args), which a report needs")
    program = cifar if settings["model"] in cifar.MODELS else imagenet
    args = program.get_parser().parse([])
    vars(args).update(settings, compile=False, sync_bn=False, engine="auto")
    entry = NETWORKS.get(str(args.model))
    spiking = f"{file} is of {args.model}, an ANN or unknown; give a checkpoint of an _if or _lif model"
    require(entry and entry.kind != "ann", spiking)
    require(not options.ann or entry.ann, f"--ann: there is no ANN of the shape of {args.model}")
    require(options.ann or not options.thresholds, "--thresholds needs the weights of an ANN: --ann FILE")
    trained_on = getattr(args, "trained_on", f"{args.dataset} from {args.path}")
    args.path, device = options.path or args.path, choose_device(options.device)
    data_of = cache(lambda T: load(argparse.Namespace(**vars(args) | dict(timesteps=T))))
    checkpoint.make_folder(file.parent, "place: copy the checkpoint there")

    def of(T, model=args.model, source=file, thresholds=None, bits=None):
        """The Measurement of the network with the weights in `source`, perhaps rounded, and T time steps."""
        setting = argparse.Namespace(**vars(args) | dict(model=model, timesteps=T))
        data = data_of(T if entry.inputs == "event frames" else args.timesteps)
        n = min(options.limit or len(data.test), len(data.test))
        chosen = Subset(data.test, [i * len(data.test) // n for i in range(n)])  # of all classes
        snn = build_model(setting, data.classes, device, create_model)
        weights = content if source == file else foreign.load(source)
        checkpoint.load_weights(snn, weights["state_dict"], source, ("Vth",) if thresholds else ())
        checkpoint.compare_classes(weights, data.train, source)
        if thresholds:
            load_thresholds(snn, thresholds)
        if bits:
            round_weights(snn, bits)
        batches = DataLoader(chosen, options.batch, num_workers=options.workers)
        found = report.Measurement(snn, ((x.to(device), y.to(device)) for x, y in batches))
        print(f"{model}, T={T}{f', {bits} bits' if bits else ''}: top-1 {found.accuracy:.2f} %", flush=True)
        return found

    source, thresholds = (f and checkpoint.find(f, file.parent) for f in (options.ann, options.thresholds))
    steps, chain = sorted({args.timesteps, *options.timesteps}), None
    measured, rounded = [of(T) for T in steps], {bits: of(args.timesteps, bits=bits) for bits in options.bits}
    if options.ann:
        converted = [of(T, source=source, thresholds=thresholds) for T in steps] if thresholds else []
        chain = of(1, entry.ann, source).accuracy, converted
    text = f"{file.name}: {args.model}, {content.get('epoch')} epochs on {trained_on}. "
    text += f"Measured on {measured[0].images} test images, {results.hardware(options.device)}."
    page = file.with_name(f"{file.stem}_report.md")
    report.make_page(page, text, measured, args.timesteps, chain, rounded)
    print(f"report: {page}\npicture: {page.with_suffix('.png')}")


def publish(options):
    """Put the last weights of a finished run among the networks that come trained."""
    file = checkpoint.find(options.checkpoint, ".")
    content, sessions = foreign.load_run(file, "acc"), results.read_sessions(file.with_suffix(".run.json"))
    args, done = content["args"], content["epoch"]
    finished = sessions and "log" in content and not content["iteration"] and done == args.get("epochs")
    require(finished, f"{file} is not the last checkpoint of a finished run of `reproduce.py run`; finish it")
    files = f"{file} was trained on {args['dataset']}; only --dataset imagefolder has image files to ship"
    require(args["dataset"] == "imagefolder", files)
    test = load_data("imagefolder", options.path or args["path"]).test
    model = load_network(content, file, len(test.classes))
    checkpoint.compare_classes(content, test, file)
    about = dict(trained_on=options.trained_on, test=test, model=model)
    pretrained.publish(options.name, options.out, content, sessions, **about)
    print(f"network: {options.out / options.name}.pth\nhow it was made: {options.out / options.name}.json")


def draw_curves(options):
    """Draw the accuracy of the chosen runs, or of all, against epochs and hours."""
    runs = [(o.files.arguments.stem, o) for group in find_runs(options.checkpoint).values() for o in group]
    unknown = [text for text in options.runs if not any(text in stem for stem, _ in runs)]
    refuse(f"no run below {options.checkpoint} has in its name", unknown)
    chosen = [outcome for stem, outcome in runs if any(text in stem for text in options.runs or [""])]
    require(chosen, f"no run below {options.checkpoint} has finished an epoch; start one by `run`")
    curves.draw(chosen, options.out)
    print(f"picture: {options.out}")


def write_table(options):
    """Write the page of results, with the picture of `curves` if there is one beside it."""
    rows = {row: (preset.paper, FIRST[row]) for row, preset in ROWS.items()}
    picture, runs = CURVES if (options.out.parent / CURVES).exists() else "", find_runs(options.checkpoint)
    require(runs, f"no run below {options.checkpoint} has finished an epoch: {options.out} stays as it is")
    checkpoint.save_text(results.make_page(rows, runs, picture), options.out)
    print(f"results: {options.out}")


def get_parser():
    parser = Parser({}, description=__doc__)
    tasks = parser.add_subparsers(dest="task", required=True, parser_class=partial(Parser, {}))

    def add_task(name, do, **settings):
        tasks.add_parser(name, **settings).set_defaults(do=do)
        return tasks.choices[name].add_argument

    folder = dict(type=Path, default=Path("checkpoint"), help="the programs' folder of results")
    add_task("list", list_rows)("-c", "--checkpoint", **folder)
    add = add_task("table", write_table)
    add("-c", "--checkpoint", **folder)
    add("--out", type=Path, default=results.ROOT / "RESULTS.md")
    add = add_task("curves", draw_curves)
    add("runs", nargs="*", metavar="RUN", help="a part of a run's file names; all runs if none")
    add("-c", "--checkpoint", **folder)
    add("--out", type=Path, default=results.ROOT / CURVES)
    add = add_task("run", None, description="All other flags go to the program of the row.")
    add("row", metavar="ROW", help="a name of `list`")
    add("--seeds", type=count, default=1, help="run with the seeds 1 to this")
    add("--seed", type=count, nargs=1, help="run with this one alone")
    add = add_task("publish", publish)
    add("checkpoint", metavar="CHECKPOINT", help="the last one of a finished run on CIFAR-10")
    add("name", metavar="NAME", help="such as resnet20_lif_cifar10")
    add("--trained_on", required=True, help='the data in words: "a JPEG copy of CIFAR-10"')
    add("--path", help="folder of the data set, if not that of training")
    add("--out", type=Path, default=checkpoint.PRETRAINED)
    add = add_task("report", report_checkpoint)
    text = "a spiking network's, or the name of one that comes trained; the report is put beside it"
    add("checkpoint", metavar="CHECKPOINT", help=text)
    add("--timesteps", type=count, nargs="+", default=[], help="also evaluate with these T")
    add("--bits", type=number(int, 2, high=32), nargs="+", default=[], help="and with such weights")
    add("--limit", type=count, help="only so many test images, of all classes")
    add("--ann", help="weights of the ANN of the same shape, for its accuracy")
    add("--thresholds", help="with --ann: thresholds, for the SNN straight after conversion")
    add("--path", help="folder of the data set, if not that of training")
    add("--batch", type=count, default=10)
    add("--workers", type=number(int, 0, high=256), default=0)
    add("--device", default="auto")
    return parser


def main(argv=None):
    options, flags = get_parser().parse_known_args(argv)
    if options.task == "run":
        require(options.row in ROWS, unknown("row", options.row, ROWS))
        command = ["python", "reproduce.py", *(sys.argv[1:] if argv is None else argv)]
        return run(options.row, options.seed or range(1, options.seeds + 1), flags, command)
    require(not flags, f"unrecognized arguments: {' '.join(flags)}; --help lists the flags")
    return options.do(options)


if __name__ == "__main__":
    run_program(main)

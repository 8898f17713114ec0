"""Published thresholds against `--Vth auto`: IF and LIF, T = 1 to 10, three data sets; and conversion.

    python benchmarks/thresholds.py --plan
    python benchmarks/thresholds.py --jobs cifar digits --only if T2
    python benchmarks/thresholds.py --page

A cell is a run of the published program, in --out; what it finds goes into --results. Started again, what is
finished is skipped and what was stopped goes on. --page writes the tables and pictures of docs/thresholds.md.
"""

import argparse
import io
import json
import re
import sys
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torchvision.datasets.folder import IMG_EXTENSIONS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rounded import rounded  # noqa: E402

from cifar import program as cifar  # noqa: E402
from imagenet import main as imagenet  # noqa: E402
from models import create_model, fit_thresholds  # noqa: E402
from utils import checkpoint, foreign, results  # noqa: E402
from utils.cli import UserError, require, run_program  # noqa: E402
from utils.data import load_data, test_loader, train_loader  # noqa: E402
from utils.program import build_model, load  # noqa: E402
from utils.statistics import hits  # noqa: E402
from utils.thresholds import IMAGES, load_thresholds, some_batches, start_thresholds  # noqa: E402

KINDS, SETTINGS = ("if", "lif"), ("published", "auto")
SHORT = "--dataset imagefolder --model preresnet.resnet20_{kind} --lr 0.05 --epochs 5 --train-batch 64"
RECIPES = {  # but for the neurons
    "digits": cifar.OTHERS["quickstart"].flags.replace("resnet20_if", "resnet20_{kind}"),
    "cifar": SHORT,
    "tiny": SHORT,
}
IMAGES_SEEN = {"digits": 10 * 1437 + 1200, "cifar": 5 * 10_000 + 3000, "tiny": 5 * 10_000 + 1500}
CHAIN = "--image_size 48 --seed 1 --workers 0 --arch"
ANN = f"{CHAIN} preresnet_ann.resnet18 --name ann --optimizer SGD --wd 1e-4 --batch-size 32 --lr 0.05"
ANN += " --warmup 200 --epochs 10 --save_every 100 --resume auto"


class Cell(NamedTuple):
    """A run, or, of the job "convert", an ANN's accuracy as an SNN; setting: how thresholds are chosen."""

    job: str
    kind: str
    T: int
    setting: str
    seed: int = 1

    def __str__(self):
        return f"{self.job}-{self.kind}-T{self.T}-{self.setting}-s{self.seed}"

    def minutes(self):
        """About what the cell takes on one core."""
        if self.job == "convert":
            return 0.5 + 0.1 * self.T
        return IMAGES_SEEN[self.job] * (0.0035 + 0.0009 * self.T) / 60


def all_cells():
    """The most telling first."""

    def pairs(job, *timesteps, seeds=(1,)):
        chosen = product([job], timesteps, seeds, KINDS, SETTINGS)
        return [Cell(job, kind, T, setting, seed) for job, T, seed, kind, setting in chosen]

    rest = range(2, 6)
    quickstart = [Cell("digits", "if", 2, "quickstart", seed) for seed in range(1, 6)]
    convert = [
        Cell("convert", "if", T, by, 1) for T in (4, 8, 16, 32) for by in ("quantile", "error", "auto")
    ]
    cells = [*pairs("digits", 2, 1), *pairs("cifar", 2, 1)]
    cells += [*quickstart, *pairs("digits", 2, seeds=rest), *pairs("digits", 5, 3), *convert]
    cells += [*pairs("cifar", 5, 3), *pairs("tiny", 2, 1, 5, 3)]
    cells += [*pairs("digits", 1, 3, 5, seeds=rest), *pairs("cifar", 10), *pairs("tiny", 10)]
    return [*cells, *pairs("digits", 10, seeds=range(1, 6))]


def neurons(kind, T):
    """The published flags of the neurons at the nearest published T; alpha and the rest stay under auto."""
    flags = cifar.ROWS[f"latency-{kind}-t{10 if T == 10 else 5}"].flags.split()
    chosen = ("--Vth", "--alpha", "--Vth_bound", "--delta_t")
    return [word for i in range(0, len(flags), 2) if flags[i] in chosen for word in flags[i : i + 2]]


def command(cell, options):
    """The flags of the cell's run."""
    argv = [*RECIPES[cell.job].format(kind=cell.kind).split()]
    argv += ["--Vth", "1"] if cell.setting == "quickstart" else neurons(cell.kind, cell.T)
    argv += ["--Vth", "auto"] if cell.setting == "auto" else []
    path = dict(digits="-", cifar=options.out / "cifar_fifth", tiny=options.tiny)[cell.job]
    argv += ["--timesteps", cell.T, "--path", path, "--workers", 0, "--manualSeed", cell.seed]
    argv += ["--name", f"_{cell.setting}_T{cell.T}_s{cell.seed}", "--checkpoint", options.out / cell.job]
    return [str(word) for word in [*argv, "--save_every", 50, "--resume", "auto"]]


def link_fifth(source, target):
    """A folder of links to the first fifth of every class of a folder of images, training and test."""
    for split in ("train", "test"):
        for folder in sorted(filter(Path.is_dir, (source / split).iterdir())):
            files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMG_EXTENSIONS)
            links = target / split / folder.name
            links.mkdir(parents=True, exist_ok=True)
            for file in files[: len(files) // 5]:
                if not (links / file.name).exists():
                    (links / file.name).symlink_to(file.resolve())


def start(args):
    """The data and the network of a run, as its program starts it."""
    torch.manual_seed(args.manualSeed)
    data, device = load(args), torch.device("cpu")
    model = build_model(args, data.classes, device, create_model).train()
    start_thresholds(model, fit_thresholds, data, args, None, device)
    return data, model


def by_layer(model, data, args):
    """Layer -> threshold, representation error, firing rate, on images that no threshold was fitted to."""
    batches = some_batches(data, IMAGES, args.train_batch, args.manualSeed + 1000, torch.device("cpu"))
    fits = fit_thresholds(model, batches, apply=False)
    return {layer: vars(fit.given) | dict(best_error=fit.fitted.error) for layer, fit in fits.items()}


def first_gradient(model, data, args):
    """Loss of the first step, and the norm of its gradient at the first layer."""
    loader = train_loader(
        data.train, batch_size=args.train_batch, workers=0, seed=args.manualSeed, pin_memory=False
    )
    loader.sampler.start(0)
    images, labels = next(iter(loader))
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    weight = next(parameter for parameter in model.parameters() if parameter.dim() > 1)
    return loss.item(), weight.grad.norm().item()


def look_at_start(cell, options):
    """What a run has before its first step: its layers, and the first gradient."""
    args = cifar.get_parser().parse(command(cell, options))
    data, model = start(args)
    found = dict(before=by_layer(model, data, args))
    found["first_loss"], found["first_gradient"] = first_gradient(model, data, args)
    print(f"first gradient {found['first_gradient']:.3g}", flush=True)
    return found


def train(cell, options):
    """Train; -> what was found in every epoch, and of the layers at the end."""
    argv = command(cell, options)
    try:
        cifar.main(argv)
    except UserError as error:  # such as a loss that is NaN: a result as well
        if not re.search("is (nan|-?inf|not finite)", str(error)):
            raise
        return dict(failed=str(error))
    args = cifar.get_parser().parse(argv)
    files = cifar.run_files(args)
    data, model = start(args)
    model.load_state_dict(foreign.load(files.checkpoint)["state_dict"])
    found = dict(after=by_layer(model.eval(), data, args))
    found["epochs"] = foreign.read_log(files.log)  # lr, loss of training and test, accuracies of both
    flags = " ".join(argv).replace(str(options.out), "OUT").replace(str(options.tiny), "TINY")
    return found | dict(command=f"python {cifar.SCRIPT} {flags}")


def convert(cell, options):
    """The accuracy of an ANN, and that of the SNN with thresholds from its activations, untrained."""
    common = ["--data", str(options.tiny), "--checkpoint", str(options.out / "convert"), *CHAIN.split()]
    spiking = [*common, "preresnet_snn.resnet18_if", "--pre_train", "ann.pth", "--timesteps", str(cell.T)]
    imagenet.main([*common[:4], *ANN.split()])
    name = f"{cell.setting}_T{cell.T}"
    if cell.setting == "auto":
        thresholds = ["--Vth", "auto"]
    else:
        calibrate = ["preresnet_cal_Vth.resnet18", "--pre_train", "ann.pth", "--calculate_Vth", name]
        calibrate += ["--calibrate_by", cell.setting, "--timesteps", str(cell.T), "--alpha", "0.5"]
        imagenet.main([*common, *calibrate])
        thresholds = ["--load_Vth", f"{name}.dict"]
    heard = io.StringIO()
    with redirect_stdout(heard):
        imagenet.main([*spiking, *thresholds, "--batch-size", "50", "--evaluate"])
    print(heard.getvalue())
    log = foreign.read_log(options.out / "convert" / "imagenet" / "ann.txt")
    return dict(top1=float(re.search(r"top-1 ([\d.]+) %", heard.getvalue())[1]), ann=log[-1][-1])


def round_off(cell, options):
    """The accuracy of the ANN with as many levels below the same thresholds: spikes that come evenly."""
    data = load_data("imagenet", options.tiny, image_size=48)
    folder = options.out / "convert" / "imagenet"
    spiking = create_model("preresnet_snn.resnet18_if", num_classes=data.classes, timesteps=cell.T)
    load_thresholds(spiking, folder / f"{cell.setting}_T{cell.T}.dict")
    ann = create_model("preresnet_ann.resnet18", num_classes=data.classes)
    checkpoint.load_weights(ann, foreign.load(folder / "ann.pth")["state_dict"], folder / "ann.pth")
    few = rounded(ann, spiking).eval()
    batches = test_loader(data.test, batch_size=50, workers=0, pin_memory=False)
    with torch.no_grad():
        right = sum(hits(few(images), labels)[:, 0].sum().item() for images, labels in batches)
    return dict(levels=100 * right / len(data.test))


def run(cells, options):
    """Run what is not finished; the results are written after every cell."""
    checkpoint.make_folder(options.out, "--out")
    jobs = {cell.job for cell in cells}
    for folder, users in ((options.cifar, {"cifar"}), (options.tiny, {"tiny", "convert"})):
        there = folder.is_dir() or not jobs & users
        require(there, f"no folder {folder}; say --cifar or --tiny FOLDER, with train/<class>/*")
    if "cifar" in jobs:
        link_fifth(options.cifar, options.out / "cifar_fifth")
    early = [cell for cell in cells if cell.job == "cifar"]  # seconds each, and telling
    for step in (*((look_at_start, cell) for cell in early), *plan_of(cells)):
        do(*step, options)


def plan_of(cells):
    """The steps of every cell."""
    for cell in cells:
        steps = [convert, round_off] if cell.job == "convert" else [look_at_start, train]
        if cell.job == "convert" and cell.setting == "auto":  # fitted to spikes, no file of thresholds
            steps.remove(round_off)
        yield from ((step, cell) for step in steps)


def do(step, cell, options):
    """Take a step of a cell, unless the results hold what it finds, and add that."""
    finds = dict(look_at_start="before", train="epochs", convert="top1", round_off="levels")[step.__name__]
    if {finds, "failed"} & read_results(options.results).get(str(cell), {}).keys():
        return
    print(f"\n{cell}: {step.__name__}", flush=True)
    of_cell = step(cell, options)
    found = read_results(options.results)  # again: another process may have added to it
    machine = {finds: f"{results.hardware('cpu')}, torch {torch.__version__}"}
    of_cell["machine"] = found.setdefault(str(cell), {}).get("machine", {}) | machine
    found[str(cell)] |= of_cell
    checkpoint.save_text(as_text(found), options.results)


def as_text(found):
    """JSON with a line for each cell, and figures of six digits."""
    found = json.loads(json.dumps(found), parse_float=lambda figure: float(f"{float(figure):.6g}"))
    lines = [f"{json.dumps(name)}: {json.dumps(cell)}" for name, cell in found.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_results(file):
    """Cell -> what was found."""
    return json.loads(file.read_text()) if file.exists() else {}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", nargs="+", choices=[*RECIPES, "convert"], default=[*RECIPES, "convert"])
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="such as: lif T2 auto s1")
    parser.add_argument("--plan", action="store_true", help="print the cells and what they cost")
    parser.add_argument("--page", action="store_true", help="write docs/thresholds.md's tables and pictures")
    parser.add_argument("--out", type=Path, default=Path("checkpoint/thresholds_experiment"))
    results_file = dict(type=Path, default=Path(__file__).with_suffix(".json"), metavar="FILE")
    parser.add_argument("--results", **results_file, help="JSON of what the cells found, kept with the page")
    parser.add_argument("--cifar", type=Path, default=Path("data/cifar10_jpeg"), help="images by class")
    parser.add_argument("--tiny", type=Path, default=Path("data/tiny20"), help="20 classes of Tiny ImageNet")
    options = parser.parse_args(argv)
    options.out = options.out.resolve()
    cells = [cell for cell in all_cells() if cell.job in options.jobs]
    cells = [cell for cell in cells if set(options.only) <= set(str(cell).split("-"))]
    if options.plan:
        found, total = read_results(options.results), 0.0
        for cell in cells:
            total += cell.minutes()
            done = "done" if {"epochs", "failed", "top1"} & found.get(str(cell), {}).keys() else ""
            print(f"{cell!s:32}{cell.minutes():7.1f} min{total:8.0f} in all  {done}")
        return
    if options.page:
        from thresholds_page import write_page  # beside this script

        found = read_results(options.results)
        require(found, f"no {options.results}; run some cells first")
        write_page(found)
        return
    run(cells, options)


if __name__ == "__main__":
    run_program(main)

"""What runs leave: where each was started, how far it has come; and the Markdown page of it."""

import json
import logging
import platform
import shlex
import statistics
import subprocess
import zlib
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import torch

from utils import checkpoint, foreign
from utils.cli import UserError, choose_device, explained, warn
from utils.records import TAKEN, RunFiles

ROOT = Path(__file__).resolve().parents[1]
BY_FOLDER = ("imagefolder", "imagenet", "CIFAR10DVS")  # data sets that are what lies in a folder


def days(cost, T):
    """What a run of `cost` PMAC takes on 2 cores by the read-me's ResNet-18 LIF; T=1: by its ANN."""
    step = 0.167 if T == 1 else 0.225 + (0.360 - 0.225) * (T - 5) / 15  # s for 8 images; at T=5 and 20
    return cost * 1e15 / (8 * T * 0.48e9) * step / 86400  # 0.48 GMAC an image and time step


def departures(parser, row, args):
    """In what the arguments `args` (a dict) depart from the row: text for readers, text for a file's name."""
    files = ("path", "pre_train", "went_on_from")
    expected = vars(parser.parse(["--preset", row])) | dict(went_on_from="", neurons="ours")
    names = [*parser.fixed, "went_on_from", *["pre_train"] * (not expected["pre_train"])]  # else the chain's
    names += ["path"] * (args.get("dataset", "imagenet") in BY_FOLDER)

    def last(name, value):  # of a path, which may be written in many ways
        return Path(value).absolute().name if value and name in files else value

    names = [*sorted(names), "neurons"]  # others than ours: benchmarks/replaced.py
    values = {name: last(name, args.get(name, expected[name])) for name in names}
    values = {name: value for name, value in values.items() if value != last(name, expected[name])}
    expected |= dict.fromkeys(files[1:], "none")
    text = "; ".join(f"{name} {value} instead of {expected[name]}" for name, value in values.items())
    stem = "".join(f"_{name}-{Path(str(value)).name}" for name, value in values.items())
    plain = len(stem) <= 60 and not stem.endswith(TAKEN)
    return text, stem if plain else f"_{zlib.crc32(stem.encode()):08x}"


class Outcome:
    """What the run of the arguments `file` has left; `epochs` are the rows of its log, the accuracy last."""

    def __init__(self, file):
        with explained(lambda why: f"{file} is damaged ({why}); remove it"):
            self.args = dict(json.loads(file.read_text()))
        self.files = RunFiles(file.parent, file.stem)
        self.epochs = epochs_done(self.files, self.args)
        self.sessions = read_sessions(self.files.session)

    @property
    def title(self):
        """What was trained, in few words; `neurons` says whose, if not ours (benchmarks/replaced.py)."""
        args = self.args
        neurons = f", T={args['timesteps']}, Vth {args['Vth']}, alpha {args['alpha']}"
        neurons = "" if "_ann" in args["model"] else neurons + ", fixed" * (not args["train_Vth"])
        whose = f", neurons of {args['neurons']}" if "neurons" in args else ""
        trained = args.get("pre_train") or args.get("went_on_from")
        return args["model"] + neurons + whose + ", pre-trained" * bool(trained)


def epochs_done(files, args):
    """The rows of a run's log; a run killed just after its checkpoint has the last row in that alone."""
    rows = foreign.read_log(files.log) if files.log.exists() else []
    if files.checkpoint.exists() and len(rows) < args.get("epochs", 0):
        try:
            content = foreign.load(files.checkpoint)
        except UserError as error:  # the run goes on from an older one
            warn(error)
            return rows
        if content.get("args", {}).get("started") == args.get("started"):  # not of an earlier run
            rows = content.get("log", rows)
    return rows


def compare_sources(files, args):
    """Warn if this run began on other data or weights: its name has the last parts of their paths alone."""
    earlier = checkpoint.read_arguments(files.arguments)
    for name in ["pre_train", *["path"] * (args.dataset in BY_FOLDER)]:
        before, now = str(earlier.get(name) or ""), getattr(args, name)
        with suppress(OSError, ValueError):  # of what is there no longer, closed to this user, or no path
            if before and now and not Path(before).samefile(now):
                warn(f"{files.log.stem} began on {before}, not {now}: unless it is the same, say another -c")


def add_session(record, device, command):
    """Add to the JSON file `record` where a run starts, from which commit, and what the user typed."""
    now = datetime.now().isoformat(timespec="seconds")
    session = dict(started=now, hardware=hardware(device), torch=str(torch.__version__), commit=commit())
    sessions = [*read_sessions(record), session | dict(command=shlex.join(command))]
    checkpoint.save_text(json.dumps(sessions, indent=2) + "\n", record)


def read_sessions(record):
    """The sessions of a run, the oldest first; none of a run that was started in another way."""
    try:
        sessions = json.loads(record.read_text())
    except (OSError, ValueError):
        return []
    return sessions if isinstance(sessions, list) else []


def hardware(device):
    """The name of the GPU, or of the CPU with the number of threads."""
    device = choose_device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, threads: {torch.get_num_threads()}"


def commit():
    """The checked-out commit; `-dirty` where files differ from it."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def spread(values):
    """Of several values mean, standard deviation and each of them."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    each = ", ".join(f"{value:.2f}" for value in values)
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} ({each})"


def last_accuracy(outcomes):
    return spread([outcome.epochs[-1][-1] for outcome in outcomes])


def markdown(head, rows):
    """The lines of a Markdown table."""
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, ["---"] * len(head), *rows)]


INTRODUCTION = """\
# Results

Generated by `python reproduce.py table` from what the runs have left; not edited.

Top-1 accuracy in percent on the test set: after the last epoch, and of the best one, which the test set
itself chose. Of n seeds: mean ± standard deviation (each seed). The paper's figures are taken from secondary
sources; its standard deviations, and the rows of depth and ablation, could not be checked against it."""
DEPARTING = "A run that departs from its row says nothing about the paper's figure."
HOW = """\
Times and memory are medians over the epochs (memory: of the process, or of a GPU's tensors), the firing rate
is that of the most active layer at the end. Times of different hardware or numbers of threads do not
compare; a run that went on elsewhere has the median over both."""


def make_page(rows, found, picture=""):
    """`rows`: row -> (paper's figure, name of its runs); `found`: (name, departures or "") -> Outcomes.

    `picture`: where the curves lie, as seen from the page.
    """
    head = ["last epoch", "best epoch (by the test set)", "n", "epochs", "data"]
    ran = [[o[0].title, *figures(o), name, text or "nothing"] for (name, text), o in found.items()]
    how = [[o[0].title, name, *conditions(o).values()] for (name, _), o in found.items()]
    full = [[row, paper, *figures(found.get((name, ""), []))] for row, (paper, name) in rows.items()]
    lines = [INTRODUCTION, ""] + [f"![accuracy against epochs and hours]({picture})", ""] * bool(picture)
    lines += ["## What was run", "", DEPARTING, ""]
    lines += markdown(["network", *head, "row", "departs from it by"], ran)
    lines += ["", "## How it was run", "", HOW, "", *markdown(["network", "row", *conditions([])], how)]
    lines += ["", "## The paper's rows, as published", "", *markdown(["row", "paper", *head], full)]
    return "\n".join(lines) + "\n"


def figures(outcomes):
    """The cells of accuracies, n, epochs and data."""
    if not outcomes:
        return ["-"] * 5
    best = spread([max(row[-1] for row in outcome.epochs) for outcome in outcomes])
    epochs, data = {str(len(outcome.epochs)) for outcome in outcomes}, set()
    for outcome in outcomes:
        name, folder = outcome.args.get("dataset", "imagenet"), Path(outcome.args["path"]).name
        data.add(f"{name} ({folder})" if name in BY_FOLDER else name)
    epochs, data = ", ".join(sorted(epochs, key=int)), ", ".join(sorted(data))
    return [last_accuracy(outcomes), best, len(outcomes), epochs, data]


def conditions(outcomes):
    """How runs were run: title of a column -> its cell."""
    scalars = [scalar for outcome in outcomes for scalar in read_scalars(outcome.files.tensorboard)]
    titles = {"seconds an epoch": "s an epoch", "images per second": "images/s"}
    cells = {}
    for tag, title in (titles | {"peak memory (MB)": "peak memory MB"}).items():
        values = [value for name, values in scalars if name == tag for value in values]
        cells[title] = f"{statistics.median(values):.4g}" if values else "-"
    rates = [100 * values[-1] for name, values in scalars if name.startswith("firing rate/")]
    cells["highest firing rate %"] = f"{max(rates):.1f}" if rates else "-"
    for what in ("hardware", "torch", "commit", "command"):
        values = sorted({session[what] for outcome in outcomes for session in outcome.sessions})
        cells[what] = ", ".join(f"`{value}`" if what == "command" else value for value in values) or "-"
    return cells


def read_scalars(folder):
    """(tag, values) of TensorBoard's scalars in `folder`, none if there is no such folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # a run that went on after a kill is no news
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    if folder.is_dir():
        events.Reload()
    return [(tag, [scalar.value for scalar in events.Scalars(tag)]) for tag in events.Tags()["scalars"]]

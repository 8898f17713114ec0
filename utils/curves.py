"""Accuracy against epochs and against time, of several runs in one picture."""

from itertools import accumulate

from matplotlib.figure import Figure

from utils.checkpoint import save
from utils.cli import require
from utils.results import read_scalars


def draw(outcomes, file):
    """Write the figure to a file of the kind that its name ends in."""
    kind, figure = file.suffix[1:].lower(), plot(outcomes)
    require(kind in ("png", "pdf", "svg"), f"--out {file}: its name must end in .png, .pdf or .svg")
    save(figure, file, write=lambda figure, file: figure.savefig(file, format=kind, dpi=120))


def plot(outcomes):
    """A figure of the test accuracy of Outcomes after every epoch, against epochs and wall-clock hours.

    Hours are those of training and tests together, as they passed: a machine that was shared or paused shows.
    Of an epoch that was interrupted they are those since its last start. A run whose time is not known for
    every epoch is drawn against epochs alone. Seeds of one title and number of epochs share a colour.
    """
    groups = {}
    for outcome in outcomes:
        groups.setdefault((outcome.title, outcome.args["epochs"]), []).append(outcome)
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    epochs, time = figure.subplots(1, 2, sharey=True)
    for i, ((title, _), seeds) in enumerate(groups.items()):
        last = [f"{outcome.epochs[-1][-1]:.2f} % (seed {outcome.args['manualSeed']})" for outcome in seeds]
        style, label = dict(color=f"C{i}", marker=".", ls="-"), f"{title}: {', '.join(last)}"
        for outcome in seeds:
            accuracy = [row[-1] for row in outcome.epochs]
            scalars = dict(read_scalars(outcome.files.tensorboard))
            hours = [seconds / 3600 for seconds in accumulate(scalars.get("seconds an epoch", []))]
            epochs.plot(range(1, len(accuracy) + 1), accuracy, label=label, **style)
            if len(hours) == len(accuracy):
                time.plot(hours, accuracy, **style)
            style["ls"], label = "--", None
    epochs.set(xlabel="epoch", ylabel="top-1 accuracy on the test set (%)")
    epochs.xaxis.get_major_locator().set_params(integer=True)
    time.set(xlabel="hours (wall clock)")
    for axes in (epochs, time):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=7.5)
    return figure

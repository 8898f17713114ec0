"""The tables and pictures of docs/thresholds.md, from the results of thresholds.py."""

import re
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from utils.checkpoint import save_text
from utils.results import markdown, spread

PAGE = Path(__file__).resolve().parents[1] / "docs" / "thresholds.md"
TITLES = {"digits": "handwritten digits", "cifar": "CIFAR-10, a fifth", "tiny": "20 Tiny ImageNet classes"}
KINDS, SETTINGS, STEPS = ("if", "lif"), ("published", "auto"), (1, 2, 3, 5, 10)
COLOURS = {"published": "tab:gray", "auto": "tab:blue", "quantile": "tab:gray", "error": "tab:orange"}


def write_page(found):
    """Renew the pictures, and each table of the page between `<!-- table: NAME -->` and `<!-- end -->`."""
    tables = {f"starts {job}": starts(found, job) for job in TITLES}
    tables |= {f"accuracy {job}": accuracies(found, job) for job in TITLES}
    tables |= {"quickstart": quickstart(found), "conversion": conversion(found)}

    def renew(match):
        head, rows = tables[match[2]]
        return "\n".join([match[1], *(markdown(head, rows) if rows else ["Not run yet."]), match[3]])

    text = PAGE.read_text(encoding="utf-8")
    block = r"(<!-- table: ([\w ]+) -->)\n.*?(<!-- end -->)"
    save_text(re.sub(block, renew, text, flags=re.DOTALL), PAGE)
    draw_accuracies(found, PAGE.with_name("thresholds_accuracy.png"))
    draw_layers(found, PAGE.with_name("thresholds_layers.png"))


def of_seeds(found, job, kind, T, setting, what):
    """What the cells of all seeds have found; none where none has run."""
    cells = [found.get(f"{job}-{kind}-T{T}-{setting}-s{seed}", {}) for seed in range(1, 6)]
    return [cell[what] for cell in cells if what in cell]


def starts(found, job):
    """Before the first step: the gradient, and the layers' firing rates and representation errors."""
    head = ["", "T", "Vth", "first gradient", "silent layers", "median firing rate %", "median error %"]
    rows = []
    for kind in KINDS:
        for T in STEPS:
            for setting in SETTINGS:
                gradients = of_seeds(found, job, kind, T, setting, "first_gradient")
                for layers in of_seeds(found, job, kind, T, setting, "before")[:1]:
                    rates = [layer["rate"] for layer in layers.values()]
                    errors = [layer["error"] for layer in layers.values() if layer["error"]]
                    figures = [f"{100 * statistics.median(values):.1f}" for values in (rates, errors)]
                    silent = f"{rates.count(0)} of {len(rates)}"
                    rows.append([kind.upper(), T, setting, f"{gradients[0]:.3g}", silent, *figures])
    return head, rows


def accuracies(found, job):
    """After the last epoch and at the best one, and the loss of the last: published beside auto."""
    head = [
        "",
        "T",
        "n",
        *[f"{setting}: {what}" for what in ("last %", "best %", "loss") for setting in SETTINGS],
    ]
    rows = []
    for kind in KINDS:
        for T in STEPS:
            logs = [of_seeds(found, job, kind, T, setting, "epochs") for setting in SETTINGS]
            if not any(logs):
                continue
            last = [spread([log[-1][4] for log in of]) if of else "-" for of in logs]
            best = [brief([max(row[4] for row in log) for log in of]) if of else "-" for of in logs]
            loss = [brief([log[-1][1] for log in of]) if of else "-" for of in logs]
            counts = [str(len(of)) for of in logs]
            n = counts[0] if counts[0] == counts[1] else ", ".join(counts)
            rows.append([kind.upper(), T, n, *last, *best, *loss])
    return head, rows


def brief(values):
    """Mean and standard deviation, without each value."""
    return spread(values).partition(" (")[0]


def quickstart(found):
    """The read-me's first command, whose thresholds are fitted, beside Vth=1 and the published one."""
    head, rows = ["Vth", "last epoch %", "best epoch %", "n"], []
    for setting, Vth in (("quickstart", "1"), ("published", "6"), ("auto", "auto")):
        if logs := of_seeds(found, "digits", "if", 2, setting, "epochs"):
            best = spread([max(row[4] for row in log) for log in logs])
            rows.append([Vth, spread([log[-1][4] for log in logs]), best, len(logs)])
    return head, rows


def conversion(found):
    """The accuracy of the SNN, untrained, against T; and of an ANN with T+1 levels below its thresholds."""
    ways, rows = ("quantile", "error", "auto"), []
    for T in (4, 8, 16, 32):
        top1 = [of_seeds(found, "convert", "if", T, way, "top1") for way in ways]
        levels = [of_seeds(found, "convert", "if", T, way, "levels") for way in ways[:2]]
        if any(top1):
            rows.append([T, *[f"{of[0]:.1f}" if of else "-" for of in (*top1, *levels)]])
    names = ["`--calibrate_by quantile` %", "`--calibrate_by error` %", "`--Vth auto` %"]
    return ["T", *names, "levels alone: quantile %", "error %"], rows


def draw_accuracies(found, file):
    """Accuracy after the last epoch against T, a panel a data set; and after conversion."""
    figure = Figure(figsize=(14, 4), layout="constrained")
    *panels, converted = figure.subplots(1, 4)
    for axes, (job, title) in zip(panels, TITLES.items()):
        for kind in KINDS:
            for setting in SETTINGS:
                logs = {T: of_seeds(found, job, kind, T, setting, "epochs") for T in STEPS}
                means = {T: statistics.mean([log[-1][4] for log in of]) for T, of in logs.items() if of}
                style = dict(color=COLOURS[setting], ls="-" if kind == "if" else "--", marker="o")
                axes.plot(means.keys(), means.values(), label=f"{kind.upper()}, {setting}", **style)
        axes.set(title=title, xlabel="time steps T", ylabel="top-1 accuracy (%)", xticks=STEPS, ylim=(0, 100))
    for way in ("quantile", "error", "auto"):
        top1 = {T: of_seeds(found, "convert", "if", T, way, "top1") for T in (4, 8, 16, 32)}
        points = {T: of[0] for T, of in top1.items() if of}
        converted.plot(points.keys(), points.values(), label=way, color=COLOURS[way], marker="s")
    for accuracy in of_seeds(found, "convert", "if", 4, "quantile", "ann"):
        converted.axhline(accuracy, color="black", lw=0.8, ls=":", label="the ANN")
    converted.set(title="converted, untrained", xlabel="time steps T", xticks=(4, 8, 16, 32))
    for axes in (*panels, converted):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(file, format="png", dpi=90)


def draw_layers(found, file, T=2):
    """The layers on CIFAR-10: representation errors and firing rates, before the first step and after."""
    figure = Figure(figsize=(14, 7), layout="constrained")
    for row, (what, name) in zip(
        figure.subplots(2, 2), (("error", "representation error"), ("rate", "firing rate"))
    ):
        for axes, kind in zip(row, KINDS):
            for setting in SETTINGS:
                for when, ls in (("before", "--"), ("after", "-")):
                    for layers in of_seeds(found, "cifar", kind, T, setting, when)[:1]:
                        values = [100 * layer[what] for layer in layers.values()]
                        style = dict(color=COLOURS[setting], ls=ls, marker=".")
                        axes.plot(layers.keys(), values, label=f"{setting}, {when} training", **style)
            axes.set(
                title=f"{kind.upper()}, T={T}",
                ylabel=f"{name} (%)",
                ylim=(0, 110 if what == "error" else None),
            )
            axes.tick_params("x", rotation=90, labelsize=7)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    figure.savefig(file, format="png", dpi=90)

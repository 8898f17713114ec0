"""What a trained spiking network does beside its accuracy: spikes, operations, energy, representation error.

An *accumulate* is one spike that arrives at one synapse: spikes times fan-out, borders and strides exactly
counted. An average pool moves into the weights behind it, so that each spike that enters it counts at every
synapse behind. What no neuron layer has emitted, the input, is real-valued: multiply-accumulates, of its
entries that are not zero. A still image's first currents are the same for all steps and count once. Not
counted, in the SNN and the ANN alike: pools, batch norms (which fold into the weights), sums and activations.
"""

import math
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import nn

from utils.checkpoint import save, save_text
from utils.results import markdown
from utils.statistics import published_name, unrolled

ACCUMULATE, MULTIPLY_ACCUMULATE = 0.9e-6, 4.6e-6  # microjoules, 45 nm, 32-bit floats (Horowitz, ISSCC 2014)


@dataclass
class Measurement:
    """Of one pass over a test set. Operations are means an image; energies in microjoules an image."""

    timesteps: int
    images: int
    accuracy: float  # percent
    rates: dict  # layer -> fraction of (sample, neuron, step) that fired
    overall: float  # the same of all layers together
    errors: dict  # layer -> mean |representation of the spikes - clamp(representation of the input)|
    relative: dict  # the same in units of the clamp's upper end, the representation of a spike a step
    accumulates: float
    multiplies: float
    dense: float  # multiply-accumulates of the ANN of the same shape
    milliseconds: float  # an image, in batches; on this machine

    @property
    def energy(self):
        return ACCUMULATE * self.accumulates + MULTIPLY_ACCUMULATE * self.multiplies

    @property
    def dense_energy(self):
        return MULTIPLY_ACCUMULATE * self.dense


@contextmanager
def watch(model):
    """While open, sums up what `measure` needs in a dict (what, layer) -> sum, over unrolled passes.

    A tensor of spikes carries the `unit` that one spike has in it, on through pools and reshapes. The hook is
    that of all modules, as a network may make a pool or a Flatten in passing.
    """
    names = {module: published_name(name) for name, module in model.named_modules()}
    sums = defaultdict(float)

    def hook(module, inputs, output):
        x, name = inputs[0], names.get(module)
        unit = getattr(x, "unit", None)
        if hasattr(module, "Vth"):
            output.unit = module.amplitude
            sums["fired", name] += output.count_nonzero().double()
            sums["possible", name] += output.numel()
            expected = module.gain * module.decode(x)
            expected = expected.clamp(min=0).minimum(module.amplitude)
            error = (module.decode(output) - expected).abs().double()
            sums["error", name] += error.sum()
            sums["neurons", name] += error.numel()
            sums["relative", name] += error.sum() / module.amplitude
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            synapses = fan_out(module, x, output)
            sums["dense", name] = synapses.sum()
            arrived = x != 0 if unit is None else (x / unit).round()
            sums["real" if unit is None else "spikes", name] += (arrived.sum(0).double() * synapses).sum()
        elif unit is not None and isinstance(module, (nn.AvgPool2d, nn.AdaptiveAvgPool2d)):
            if size := window(module, x, output):
                output.unit = unit / size
        elif unit is not None and isinstance(module, (nn.Flatten, nn.Identity, nn.Dropout)):
            output.unit = unit

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        with unrolled(model):
            yield sums
    finally:
        handle.remove()


def fan_out(layer, x, output):
    """How many outputs of one image each of its inputs feeds, in the shape of the inputs."""
    if isinstance(layer, nn.Linear):
        return x.new_full(x.shape[1:], layer.out_features).double()
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups
    ones = torch.ones_like(layer.weight), torch.ones_like(output[:1])
    return nn.grad.conv2d_input(x[:1].shape, *ones, *geometry)[0].double().round()


def window(pool, x, output):
    """How many inputs each output of the pool averages; 0 if not all outputs average as many."""
    if isinstance(pool, nn.AvgPool2d):
        size = pool.kernel_size
        return size**2 if isinstance(size, int) else math.prod(size)
    sides = zip(x.shape[-2:], output.shape[-2:])
    return math.prod(i // o if i % o == 0 else int(o % i == 0) for i, o in sides)


@torch.no_grad()
def measure(model, batches):
    """A Measurement of `model` on `batches`, an iterable of (images, labels) on its device."""
    model.eval()
    hits = n = 0
    with watch(model) as sums:
        for images, labels in batches:
            hits, n = hits + (model(images).argmax(1) == labels).sum(), n + len(labels)
    steps = getattr(model, "timesteps", 1)
    parts = defaultdict(dict)
    for (what, layer), value in sums.items():
        parts[what][layer] = float(value)
    fired, possible, neurons = parts["fired"], parts["possible"], parts["neurons"]
    return Measurement(
        timesteps=steps,
        images=n,
        accuracy=100 * float(hits) / n,
        rates={layer: fired[layer] / possible[layer] for layer in fired},
        overall=sum(fired.values()) / max(sum(possible.values()), 1),
        errors={layer: error / neurons[layer] for layer, error in parts["error"].items()},
        relative={layer: error / neurons[layer] for layer, error in parts["relative"].items()},
        accumulates=sum(parts["spikes"].values()) / n,
        multiplies=sum(parts["real"].values()) / n / (steps if images.dim() == 4 else 1),
        dense=sum(parts["dense"].values()),
        milliseconds=milliseconds(model, images),
    )


@torch.no_grad()
def milliseconds(model, images, repeats=3):
    """The median time of a forward pass over a batch, an image."""
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        float(model(images).sum())  # waits for a GPU
        times.append(1000 * (time.perf_counter() - start) / len(images))
    return sorted(times[1:])[repeats // 2]


def make_page(file, text, measured, trained, chain):
    """Write the Markdown page `file` and its picture. `measured`: Measurements; `trained`: the T of one.

    `chain`: None or (the ANN's accuracy, Measurements of the SNN straight after conversion, perhaps none).
    """
    main = next(m for m in measured if m.timesteps == trained)
    picture = file.with_suffix(".png")
    save(None, picture, write=partial(draw, measured=measured, main=main, chain=chain))
    lines = [f"# {file.stem}", "", text, "", f"![]({picture.name})", ""]
    head = ["T", "top-1 %", "ms an image", "firing rate %", "highest layer %", "representation error %"]
    head += ["accumulates", "multiply-accumulates", "energy µJ", "of the ANN's energy"]
    lines += markdown(head, map(cells, measured))
    lines += [
        "",
        f"Trained with T={trained}. The ANN of the same shape: {main.dense:.4g} multiply-accumulates, ",
    ]
    lines[-1] += f"{main.dense_energy:.4g} µJ" + (f", top-1 {chain[0]:.2f} %." if chain else ".")
    if chain and chain[1]:
        lines += ["", "The SNN straight after conversion, without training:", ""]
        lines += markdown(["T", "top-1 %"], [(m.timesteps, f"{m.accuracy:.2f}") for m in chain[1]])
    lines += ["", f"## Layers at T={trained}", ""]
    head = ["layer", "firing rate %", "representation error", "in % of the layer's maximum"]
    errors = [(f"{main.errors[layer]:.4g}", f"{100 * main.relative[layer]:.2f}") for layer in main.rates]
    lines += markdown(
        head, [(x, f"{100 * rate:.2f}", *e) for (x, rate), e in zip(main.rates.items(), errors)]
    )
    save_text("\n".join([*lines, "", NOTES]) + "\n", file)


def cells(m):
    """The row of a Measurement in the table over T."""
    error = sum(m.relative.values()) / len(m.relative)
    percentages = [f"{100 * value:.2f}" for value in (m.overall, max(m.rates.values()), error)]
    costs = [f"{value:.4g}" for value in (m.accumulates, m.multiplies, m.energy)]
    speed = f"{m.milliseconds:.2f}"
    return m.timesteps, f"{m.accuracy:.2f}", speed, *percentages, *costs, f"{m.energy / m.dense_energy:.1%}"


NOTES = """\
The paper's claim: every layer fires at most 20 %, all together 7.5 to 9.5 %. Representation error: the mean
of |representation of the spikes - clamp(representation of the input)|; a layer's maximum is what a spike at
every step represents. Accumulates, 0.9 pJ each: spikes times fan-out. Multiply-accumulates, 4.6 pJ each: the
first layer, on real-valued input, once for a still image. 45 nm; an estimate of arithmetic alone, without
memory. An average pool counts as part of the weights behind it; batch norms, sums and activations do not
count."""


def draw(_, file, measured, main, chain):
    """Accuracy and energy against T; firing rate and representation error of each layer."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    (left, right), (rate, error) = figure.subplots(2, 2)
    steps = [m.timesteps for m in measured]
    left.plot(steps, [m.accuracy for m in measured], marker="o", label="SNN")
    if chain:
        accuracy, converted = chain
        left.axhline(accuracy, color="gray", ls="--", label="ANN")
        if converted:
            points = [m.timesteps for m in converted], [m.accuracy for m in converted]
            left.plot(*points, marker="s", label="SNN after conversion, untrained")
    left.axvline(main.timesteps, color="gray", lw=0.8, ls=":", label="T of training")
    left.set(xlabel="time steps T", ylabel="top-1 accuracy (%)")
    right.plot(steps, [m.energy for m in measured], marker="o", label="SNN")
    right.axhline(main.dense_energy, color="gray", ls="--", label="ANN of the same shape")
    right.set(xlabel="time steps T", ylabel="energy of an image (µJ, estimate)", ylim=(0, None))
    layers = range(len(main.rates))
    rate.bar(layers, [100 * value for value in main.rates.values()], label=f"T={main.timesteps}")
    rate.axhline(100 * main.overall, color="black", lw=1, label="all layers together")
    rate.axhline(20, color="gray", ls="--", label="the paper's bound for a layer")
    rate.set(ylabel="firing rate (%)")
    error.bar(layers, [100 * value for value in main.relative.values()], label=f"T={main.timesteps}")
    error.set(ylabel="representation error (% of maximum)")
    for axes in (left, right):
        axes.set_xticks(steps)
    for axes in (rate, error):
        axes.set_xticks(layers, main.rates, rotation=90, fontsize=8 if len(layers) <= 40 else 4)
        axes.set_ylim(top=1.3 * axes.get_ylim()[1])  # room for the legend
    for axes in (left, right, rate, error):
        axes.set_axisbelow(True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="best" if axes in (left, right) else "upper right")
    figure.savefig(file, format="png", dpi=120)

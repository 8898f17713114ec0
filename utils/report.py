"""What a trained spiking network does beside its accuracy: spikes, operations, energy, representation error.

The paper's claim, as secondary sources have it: every layer fires at most 20 %, all together 7.5 to 9.5 %.
Representation error: the mean of |representation of the spikes - clamp(representation of the input)|; a
layer's maximum is what a spike at every step represents. Accumulates, 0.9 pJ each: spikes times fan-out,
borders and strides exactly counted; an average pool counts as part of the weights behind it, so that each
spike that enters it counts at every synapse behind. Multiply-accumulates, 4.6 pJ each: the first layer, on
what of its real-valued input is not zero, once for a still image. 45 nm; an estimate of arithmetic alone,
without memory. Not counted, in the SNN and the ANN alike: pools, batch norms (which fold into the weights),
sums and activations.
"""

import math
import time
from collections import defaultdict
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from utils.checkpoint import save, save_text
from utils.results import markdown
from utils.statistics import hits, published_name, unrolled

ACCUMULATE, MULTIPLY_ACCUMULATE = 0.9e-6, 4.6e-6  # microjoules, 45 nm, 32-bit floats (Horowitz, ISSCC 2014)

ROUNDED = """\
Weights rounded after training, symmetrically per output channel, the largest one of a channel to the largest
number, batch norm folded; the shifts of batch norm, biases and thresholds are not rounded. The paper's exact
quantisation scheme is not known."""


class Counter:
    """A hook of every forward pass; `units`: what a spike amounts to in a tensor, on through pools."""

    def __init__(self, model):
        self.names = {module: published_name(name) for name, module in model.named_modules()}
        self.timesteps = model.timesteps
        self.sums, self.units = defaultdict(partial(defaultdict, float)), WeakTensorKeyDictionary()

    def __call__(self, module, inputs, output):
        x, name = inputs[0], self.names.get(module)
        unit = self.units.get(x) if torch.is_tensor(x) else None
        if hasattr(module, "Vth"):
            self.units[output] = module.amplitude
            self.count_neurons(module, name, x, output)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            synapses = fan_out(module, x, output)
            self.sums["dense"][name] = float(synapses.sum())
            arrived = x != 0 if unit is None else (x / unit).round()
            kind, T = "real" if unit is None else "spikes", self.timesteps
            once = T if kind == "real" and stays(x, T) else 1  # for all steps of a still image
            self.sums[kind][name] += float((arrived.sum(0).double() * synapses).sum()) / once
        elif unit is not None and isinstance(module, (nn.AvgPool2d, nn.AdaptiveAvgPool2d)):
            if size := window(module, x, output):
                self.units[output] = unit / size
        elif unit is not None and isinstance(module, (nn.Flatten, nn.Identity, nn.Dropout)):
            self.units[output] = unit

    def count_neurons(self, neuron, name, x, spikes):
        expected = (neuron.gain * neuron.decode(x)).clamp(min=0).minimum(neuron.gain * neuron.ceiling)
        error = (neuron.decode(spikes) - expected).abs().double()
        found = dict(fired=spikes.count_nonzero(), possible=spikes.numel(), neurons=error.numel())
        found |= dict(error=error.sum(), relative=error.sum() / neuron.amplitude)
        for what, value in found.items():
            self.sums[what][name] += float(value)


def stays(x, T):
    """Whether the rows of x, (T*B, ...), are the same at every step."""
    return len(x) % T == 0 and bool((x.unflatten(0, (T, -1)) == x[: len(x) // T]).all())


def fan_out(layer, x, output):
    """How many outputs of one image each of its inputs feeds, in the shape of the inputs."""
    if isinstance(layer, nn.Linear):
        return x.new_full(x.shape[1:], layer.out_features).double()
    geometry = dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups)
    weight, fed = torch.ones_like(layer.weight), torch.ones_like(output[:1])
    return nn.grad.conv2d_input(x[:1].shape, weight, fed, **geometry)[0].double().round()


def window(pool, x, output):
    """How many inputs each output of the pool averages; 0 if not all outputs average as many."""
    if isinstance(pool, nn.AvgPool2d):
        size = pool.kernel_size
        return size**2 if isinstance(size, int) else math.prod(size)
    sides = zip(x.shape[-2:], output.shape[-2:])
    return math.prod(i // o if i % o == 0 else int(o % i == 0) for i, o in sides)


class Measurement:
    """Of one pass over batches (images, labels) of a test set. Operations and energies (µJ) are per image.

    `timed`: the last batch is shown to the network again, four times, for its speed.
    """

    @torch.no_grad()
    def __init__(self, model, batches, timed=True):
        model.eval()
        self.timesteps, self.images, right = model.timesteps, 0, 0
        counter = Counter(model)
        # A hook of all modules there are, as a network may make a pool or a Flatten in passing.
        with unrolled(model), nn.modules.module.register_module_forward_hook(counter):
            for images, labels in batches:
                right += int(hits(model(images), labels)[:, 0].sum())
                self.images += len(labels)
        self.milliseconds = milliseconds(model, images) if timed else None
        sums = counter.sums
        fired, possible, neurons = sums["fired"], sums["possible"], sums["neurons"]
        self.accuracy = 100 * right / self.images  # percent
        # Layer -> fraction of (sample, neuron, step) that fired; the same of all layers together.
        self.rates = {layer: fired[layer] / possible[layer] for layer in fired}
        self.spikes = sum(fired.values()) / self.images
        self.overall = sum(fired.values()) / max(sum(possible.values()), 1)
        # Layer -> representation error, see above; the same as a fraction of the layer's maximum.
        self.errors = {layer: error / neurons[layer] for layer, error in sums["error"].items()}
        self.relative = {layer: error / neurons[layer] for layer, error in sums["relative"].items()}
        self.accumulates = sum(sums["spikes"].values()) / self.images
        self.multiplies = sum(sums["real"].values()) / self.images
        self.dense = sum(sums["dense"].values())  # multiply-accumulates of the ANN of the same shape
        self.energy = ACCUMULATE * self.accumulates + MULTIPLY_ACCUMULATE * self.multiplies
        self.dense_energy = MULTIPLY_ACCUMULATE * self.dense


def milliseconds(model, images):
    """An image of a batch takes the network so long, on this machine: the median of three."""
    times = []
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        float(model(images).sum())  # waits for a GPU
        times.append(1000 * (time.perf_counter() - start) / len(images))
    return sorted(times[1:])[1]


# The columns of the table over T.
COLUMNS = {
    "T": lambda m: m.timesteps,
    "top-1 %": lambda m: f"{m.accuracy:.2f}",
    "ms an image": lambda m: f"{m.milliseconds:.2f}",
    "firing rate %": lambda m: f"{100 * m.overall:.2f}",
    "highest layer %": lambda m: f"{100 * max(m.rates.values()):.2f}",
    "representation error %": lambda m: f"{100 * sum(m.relative.values()) / len(m.relative):.2f}",
    "accumulates": lambda m: f"{m.accumulates:.4g}",
    "multiply-accumulates": lambda m: f"{m.multiplies:.4g}",
    "energy µJ": lambda m: f"{m.energy:.4g}",
    "of the ANN's energy": lambda m: f"{m.energy / m.dense_energy:.1%}",
}


def make_page(file, text, measured, trained, chain, rounded):
    """Write the page `file` and its picture, of Measurements, one of them with T=`trained`.

    `chain`: None or (the ANN's accuracy, Measurements of the SNN straight after conversion, perhaps none).
    `rounded`: bits -> Measurement with weights of so many bits, at that T.
    """
    main, picture = next(m for m in measured if m.timesteps == trained), file.with_suffix(".png")
    save(None, picture, write=partial(draw, measured=measured, main=main, chain=chain))
    table = markdown(COLUMNS, [[cell(m) for cell in COLUMNS.values()] for m in measured])
    ann = f"{main.dense:.4g} multiply-accumulates, {main.dense_energy:.4g} µJ"
    ann += f", top-1 {chain[0]:.2f} %." if chain else "."
    lines = [f"# {file.stem}", "", text, "", f"![]({picture.name})", "", *table, ""]
    lines += [f"Trained with T={trained}. The ANN of the same shape: {ann}", ""]
    if chain and chain[1]:
        lines += ["The SNN straight after conversion, without training:", ""]
        lines += [*markdown(["T", "top-1 %"], [(m.timesteps, f"{m.accuracy:.2f}") for m in chain[1]]), ""]
    if rounded:
        rows = [("as trained", main), *rounded.items()]
        rows = [(bits, f"{m.accuracy:.2f}", f"{m.accuracy - main.accuracy:+.2f}") for bits, m in rows]
        table = markdown(["bits", "top-1 %", "change"], rows)
        lines += [f"## Weights of a few bits at T={trained}", "", *table, "", ROUNDED, ""]
    head = ["layer", "firing rate %", "representation error", "in % of the layer's maximum"]
    layers = [
        (layer, f"{100 * rate:.2f}", f"{main.errors[layer]:.4g}", f"{100 * main.relative[layer]:.2f}")
        for layer, rate in main.rates.items()
    ]
    lines += [f"## Layers at T={trained}", "", *markdown(head, layers), "", __doc__]
    save_text("\n".join(lines), file)


def draw(_, file, measured, main, chain):
    """Accuracy and energy against T; firing rate and representation error of each layer."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    (accuracy, energy), (rate, error) = figure.subplots(2, 2)
    steps, dashed = [m.timesteps for m in measured], dict(color="gray", ls="--")
    accuracy.plot(steps, [m.accuracy for m in measured], marker="o", label="SNN")
    if chain:
        accuracy.axhline(chain[0], label="ANN", **dashed)
        points = [m.timesteps for m in chain[1]], [m.accuracy for m in chain[1]]
        accuracy.plot(*points, marker="s", label="SNN after conversion, untrained" if chain[1] else None)
    accuracy.axvline(main.timesteps, color="gray", lw=0.8, ls=":", label="T of training")
    accuracy.set(xlabel="time steps T", ylabel="top-1 accuracy (%)", xticks=steps)
    energy.plot(steps, [m.energy for m in measured], marker="o", label="SNN")
    energy.axhline(main.dense_energy, label="ANN of the same shape", **dashed)
    estimate = "energy of an image (µJ, estimate)"
    energy.set(xlabel="time steps T", ylabel=estimate, ylim=(0, None), xticks=steps)
    for axes, values in ((rate, main.rates), (error, main.relative)):
        axes.bar(values.keys(), [100 * value for value in values.values()], label=f"T={main.timesteps}")
        axes.tick_params("x", rotation=90, labelsize=8 if len(values) <= 40 else 4)
    rate.axhline(100 * main.overall, color="black", lw=1, label="all layers together")
    rate.axhline(20, label="the paper's bound for a layer", **dashed)
    rate.set(ylabel="firing rate (%)")
    error.set(ylabel="representation error (% of maximum)")
    for axes in (accuracy, energy, rate, error):
        axes.set_axisbelow(True)
        axes.grid(alpha=0.3)
        axes.margins(y=0.2)  # room for the legend
        axes.legend(fontsize=8)
    figure.savefig(file, format="png", dpi=120)

"""The step from an ANN to an SNN: thresholds from the activations of the ANN's ReLUs (section 5.1)."""

import math

import torch
from torch import nn

from utils import checkpoint
from utils.cli import UserError
from utils.statistics import neuron_layers, published_name


@torch.no_grad()
def calibrate(model, batches, samples, fraction=0.999):
    """Layer -> the value that `fraction` of a ReLU's outputs lie below: element int(fraction*n) of n, sorted.

    Exact, for any split of the `samples` images into batches: as their number is known beforehand, so is how
    many of the largest values can matter; no more (one in a thousand) are kept while the batches stream by.
    """
    largest = {}

    def keep(name):
        def hook(_relu, inputs):
            values = inputs[0].relu().flatten()
            n = values.numel() // len(inputs[0]) * samples
            count = n - int(fraction * n)
            values = torch.cat([largest.get(name, values[:0]), values])
            largest[name] = values.topk(min(count, len(values))).values

        return hook

    relus = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ReLU)]
    hooks = [relu.register_forward_pre_hook(keep(threshold_name(name))) for name, relu in relus]
    model.eval()
    try:
        for images in batches:
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: values[-1].cpu() for name, values in largest.items()}


def threshold_name(layer):
    """The published name of a layer's threshold: `layer1[0].storein2` for `layer1.0.relu2`."""
    return published_name(layer).replace("relu", "storein")


def load_thresholds(model, path):
    """Start every neuron layer at the value of a threshold file: an IF at it, a LIF at it times delta_t.

    Official files, with tensors and 1-tuples of a tensor, load as ours. Raises UserError for a file of
    another network, or with a value that is no positive number.
    """
    content = checkpoint.read(path)
    if not checkpoint.is_named(content):
        raise UserError(f"{path} holds no thresholds; write them by --calculate_Vth")
    neurons = {threshold_name(name): neuron for name, neuron in neuron_layers(model)}
    if not neurons:
        raise UserError(f"an ANN takes no thresholds, such as those in {path}; choose an SNN")
    wrong = [f"{name} is missing" for name in neurons if name not in content]
    wrong += [f"{name[:60]} is unknown" for name in content if name not in neurons]
    values = {name: number(content[name]) for name in neurons if name in content}
    wrong += [f"{name} is no positive number" for name, value in values.items() if not 0 < value < 1e30]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"the thresholds in {path} do not fit this model: {', '.join(wrong[:3])}{more}")
    for name, neuron in neurons.items():
        neuron.Vth.data.fill_(values[name] * getattr(neuron, "delta_t", 1))


def number(value):
    """A float from a number, a tensor of one element or a 1-tuple of it; NaN for anything else."""
    if isinstance(value, (tuple, list)) and len(value) == 1:
        value = value[0]
    single = isinstance(value, (int, float)) or torch.is_tensor(value) and value.numel() == 1
    try:
        return float(value) if single else math.nan
    except (OverflowError, RuntimeError):  # too large, or complex
        return math.nan

"""The step from an ANN to an SNN: thresholds from the activations of the ANN's ReLUs (section 5.1)."""

import torch
from torch import nn

from utils.cli import require
from utils.foreign import read_thresholds
from utils.statistics import neuron_layers, threshold_name


@torch.no_grad()
def calibrate(model, batches, samples, fraction=0.999):
    """Layer -> the value that `fraction` of a ReLU's outputs lie below: element int(fraction*n) of n, sorted.

    Exact, for any split of the `samples` images into batches: as their number is known beforehand, so is how
    many of the largest values can matter; no more (one in a thousand) are kept while the batches stream by.
    """
    largest, names = {}, {module: threshold_name(name) for name, module in model.named_modules()}

    def keep(module, inputs):
        if not isinstance(module, nn.ReLU):
            return
        name, values = names[module], inputs[0].relu().flatten()
        n = values.numel() // len(inputs[0]) * samples
        count = n - int(fraction * n)
        values = torch.cat([largest.get(name, values[:0]), values])
        largest[name] = values.topk(min(count, len(values))).values

    model.eval()
    with nn.modules.module.register_module_forward_pre_hook(keep):
        for images in batches:
            model(images)
    return {name: values[-1].cpu().clone() for name, values in largest.items()}


def load_thresholds(model, path):
    """Start every neuron layer at the value of a threshold file: an IF at it, a LIF at it times delta_t."""
    neurons = {threshold_name(name): neuron for name, neuron in neuron_layers(model)}
    require(neurons, f"an ANN takes no thresholds, such as those in {path}; choose an SNN")
    for name, value in read_thresholds(path, list(neurons)).items():
        neurons[name].Vth.data.fill_(value * getattr(neurons[name], "delta_t", 1))

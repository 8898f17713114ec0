"""Firing rates and thresholds of the neuron layers of any network: the modules that hold a `Vth`."""

import re
from contextlib import contextmanager

import torch


def neuron_layers(model):
    """(published name, module) of each neuron layer; blocks are indexed as in `layer1[0].relu1`."""
    for name, module in model.named_modules():
        if hasattr(module, "Vth"):
            yield re.sub(r"\.(\d+)\.", r"[\1].", name), module


def thresholds(model):
    return {name: neuron.Vth.item() for name, neuron in neuron_layers(model)}


@contextmanager
def count_spikes(model):
    """While open, counts [spikes, opportunities to spike] of each layer, for `firing_rates`."""
    neurons = dict(neuron_layers(model))
    counts = {name: torch.zeros(2, dtype=torch.long, device=n.Vth.device) for name, n in neurons.items()}

    def counter(name):
        def count(spikes):
            fired = spikes.count_nonzero()
            counts[name] += torch.stack([fired, torch.full_like(fired, spikes.numel())])

        return count

    for name, neuron in neurons.items():
        neuron.observer = counter(name)
    try:
        yield counts
    finally:
        for neuron in neurons.values():
            neuron.observer = None


def firing_rates(counts):
    """Layer -> fraction of its (sample, neuron, step) triples that fired."""
    return {name: float(fired) / max(float(possible), 1) for name, (fired, possible) in counts.items()}

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
    """While open, counts (spikes, opportunities to spike) of each layer for `firing_rates`."""
    counts = {}

    def counter(name):
        def count(spikes):
            fired, possible = counts.get(name, (0, 0))
            counts[name] = (
                fired + spikes.count_nonzero(),
                possible + spikes.new_full((), spikes.numel(), dtype=torch.long),
            )

        return count

    neurons = dict(neuron_layers(model))
    for name, neuron in neurons.items():
        neuron.observer = counter(name)
    try:
        yield counts
    finally:
        for neuron in neurons.values():
            neuron.observer = None


def firing_rates(counts):
    """Layer -> fraction of its (sample, neuron, step) triples that fired, in the order of the network."""
    return {name: float(fired) / float(possible) for name, (fired, possible) in counts.items()}

"""An ANN with few levels: what a spiking network would be if its spikes came evenly."""

import torch
from torch import nn


def round_to_levels(x, levels, Vth):
    """x -> the nearest of the values 0, Vth/levels, ..., Vth; and its number, from 0 to `levels`.

    The gradient is that of clamp(x, 0, Vth).
    """
    clamped, step = torch.minimum(x.relu(), Vth), (Vth / levels).detach()
    numbers = (clamped / step).detach().round()
    return clamped + (numbers * step - clamped).detach(), numbers


class RoundedReLU(nn.Module):
    """A ReLU of T+1 levels."""

    timesteps = 1  # of the network: an ANN's

    def __init__(self, levels, Vth):
        super().__init__()
        self.levels, self.Vth = levels, nn.Parameter(Vth.detach().clone())

    def forward(self, x):
        return round_to_levels(x, self.levels, self.Vth)[0]

    def decode(self, activations):
        return activations


def rounded(ann, spiking):
    """`ann`, with T+1 levels below the spiking network's thresholds in the place of its ReLUs."""
    for name, neuron in [pair for pair in spiking.named_modules() if hasattr(pair[1], "Vth")]:
        ann.set_submodule(name, RoundedReLU(neuron.timesteps, neuron.Vth))
    return ann

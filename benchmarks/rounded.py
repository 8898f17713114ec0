"""An ANN with few levels: what a spiking network would be if its spikes came evenly."""

import torch
from torch import nn


class RoundedReLU(nn.Module):
    """x -> the nearest of the T+1 values 0, Vth/T, ..., Vth; its gradient is that of clamp(x, 0, Vth)."""

    timesteps = 1  # of the network: an ANN's

    def __init__(self, levels, Vth):
        super().__init__()
        self.levels, self.Vth = levels, nn.Parameter(Vth.detach().clone())

    def forward(self, x):
        clamped = torch.minimum(x.relu(), self.Vth)
        step = (self.Vth / self.levels).detach()
        return clamped + ((clamped / step).round() * step - clamped).detach()

    def decode(self, activations):
        return activations


def rounded(ann, spiking):
    """`ann`, with T+1 levels below the spiking network's thresholds in the place of its ReLUs."""
    for name, neuron in [pair for pair in spiking.named_modules() if hasattr(pair[1], "Vth")]:
        ann.set_submodule(name, RoundedReLU(neuron.timesteps, neuron.Vth))
    return ann

"""What the networks are written in: spike trains, branches of linear maps, and spiking layers.

A network is a chain of spiking layers [branches -> sum -> batch norm -> neuron]. A branch is a pair (linear
map, spike train). A block of a residual network returns the branches that end in its sum instead of adding
them, since the sum stands in front of the next batch norm and so belongs to the next spiking layer. Nothing
else touches a spike train but maps that act on every time step alike (pooling, flattening, dropout).
"""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class SpikeTrain:
    """The output of a spiking layer: `spikes`, shape (T*B, ...), row t*B+b, amplitude included."""

    spikes: torch.Tensor

    def map(self, function):
        """The same train after a map that acts on every time step alike."""
        return SpikeTrain(function(self.spikes))


def spiking_layer(branches, bn, neuron):
    """Sum the currents of the branches, normalise over time and batch (`bn` may be None), fire (section 2).

    The literal computation, which autograd unrolls over time.
    """
    first, *rest = [linear(train.spikes) for linear, train in branches]
    currents = sum(rest, start=first)
    return SpikeTrain(neuron(currents if bn is None else bn(currents)))


class SpikingNetwork(nn.Module):
    """Images (B, 3, H, W), or event frames (B, T, 2, H, W), to logits (B, classes).

    A subclass defines `spike`, from the input's train to the last layer's, and `last_neuron`, which decodes
    it.
    """

    @property
    def timesteps(self):
        return self.last_neuron.timesteps

    def forward(self, x):
        return self.last_neuron.decode(self.spike(self.encode(x)).spikes)

    def encode(self, x):
        """Static images repeat T times; event frames give one frame a step. -> train of (T*B, ...)."""
        if x.dim() == 4:
            return SpikeTrain(x.repeat(self.timesteps, 1, 1, 1))
        if x.dim() != 5 or x.shape[1] != self.timesteps:
            expected = f"images (B, 3, H, W) or event frames (B, {self.timesteps}, 2, H, W)"
            raise ValueError(f"the network takes {expected}, not a tensor of shape {tuple(x.shape)}")
        return SpikeTrain(x.transpose(0, 1).flatten(0, 1))

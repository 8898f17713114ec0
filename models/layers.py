"""What the networks are written in: spike trains, branches of linear maps, and spiking layers.

A network is a chain of spiking layers [branches -> sum -> batch norm -> neuron]. A branch is a pair (linear
map, spike train). A block of a residual network returns the branches that end in its sum instead of adding
them, since the sum stands in front of the next batch norm and so belongs to the next spiking layer. Nothing
else touches a spike train but maps that act on every time step alike (pooling, flattening, dropout).
"""

import warnings
from dataclasses import dataclass, replace

import torch
from torch import nn

from models.collapsed import collapsed_layer
from models.functional import membrane
from models.synchronized import synchronize


@dataclass
class SpikeTrain:
    """The output of a spiking layer: `spikes`, shape (T*B, ...), row t*B+b.

    In unrolled networks that is all, and the spikes carry their amplitude. In collapsed ones the spikes are 0
    and 1 (or anything, once pooled) with the `amplitude` apart, and autograd sees only the `representation`,
    (B, ...); `mean` is their time mean. A `static` train has one copy of its spikes for all steps.
    """

    spikes: torch.Tensor
    timesteps: int
    backward: str = "unrolled"
    amplitude: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    representation: torch.Tensor | None = None
    static: bool = False

    def values(self):
        """The spikes, amplitude included."""
        if self.amplitude is None:
            return self.spikes
        return self.spikes.to(self.amplitude.dtype) * self.amplitude

    def map(self, function):
        """The same train after a linear map that acts on every time step alike."""
        if self.representation is None:
            return replace(self, spikes=function(self.values()), amplitude=None)
        with torch.no_grad():
            # Amplitude first, as in unrolled networks: pooled spikes may tie with a threshold. A few steps at
            # a time: these copies could be the largest tensors of all.
            parts = self.spikes.split(len(self.mean) * max(1, self.timesteps // 4))
            parts = [function(replace(self, spikes=part).values()) for part in parts]
            spikes, mean = torch.cat(parts), function(self.mean)
        representation = function(self.representation)
        return replace(self, spikes=spikes, amplitude=None, mean=mean, representation=representation)

    def drop(self, dropout):
        """After dropout, with a mask a time step or, if `dropout.shared`, one for all."""
        if not (dropout.training and dropout.p):
            return self
        if not getattr(dropout, "shared", False):
            return self.map(dropout)
        steps = self.spikes.unflatten(0, (1 if self.static else self.timesteps, -1))
        mask = dropout(torch.ones(steps[0].shape, device=steps.device))
        return self.map(lambda x: (x.unflatten(0, (-1, len(mask))) * mask).flatten(0, 1))


def spiking_layer(branches, bn, neuron):
    """Sum the currents of the branches, normalise over time and batch (or not: `bn` None), fire."""
    T, backward = neuron.timesteps, branches[0][1].backward
    if backward != "unrolled":
        spikes, mean, representation = collapsed_layer(branches, bn, neuron, rate_only=backward == "rate")
        amplitude = neuron.amplitude.detach().clone()
        return SpikeTrain(spikes, T, backward, amplitude, mean, representation)
    first, *rest = [linear(train.spikes) for linear, train in branches]
    currents = sum(rest, start=first)
    return SpikeTrain(neuron(currents if bn is None else bn(currents)), T)


class SpikingNetwork(nn.Module):
    """Images (B, 3, H, W), or event frames (B, T, 2, H, W), to logits (B, classes).

    A subclass defines `spike`, from the input's train to the last layer's, and `last_neuron`, which decodes
    it.
    """

    backward = "unrolled"

    @property
    def timesteps(self):
        return self.last_neuron.timesteps

    def forward(self, x):
        train = self.spike(self.encode(x))
        if train.representation is None:
            return self.last_neuron.decode(train.values())
        if train.representation.requires_grad:  # decoding spreads a gradient over time, by the same weights
            train.representation.register_hook(lambda grad: grad * self.last_neuron.decoding_gain)
            return train.representation.clone()  # whose own gradient is that of the logits
        return train.representation

    def synchronize(self):
        """Let batch norm work over the batches of all processes."""
        synchronize(self)

    def compile_loops(self):
        """Run the time loops of collapsed layers through torch.compile. RuntimeError without a compiler."""
        torch._dynamo.config.recompile_limit = 64  # training, evaluation, a static image: each its own loop
        torch._dynamo.config.specialize_float = True
        loop = torch.compile(membrane, dynamic=True)
        neurons = [module for module in self.modules() if hasattr(module, "loop")]
        if neurons:
            try:
                like = neurons[0].Vth.detach()
                loop([like.new_ones(2, 2)], [like.new_empty(2, 2)], like, like, 1.0, like, like)
            except Exception as error:
                raise RuntimeError(f"torch.compile does not work here: {error}".splitlines()[0]) from error
        for neuron in neurons:
            neuron.loop = loop

    def encode(self, x):
        """Static images repeat T times; event frames give one frame a step. -> train of (T*B, ...)."""
        T, static = self.timesteps, x.dim() == 4
        if not static and (x.dim() != 5 or x.shape[1] != T):
            expected = f"images (B, 3, H, W) or event frames (B, {T}, 2, H, W)"
            raise ValueError(f"the network takes {expected}, not a tensor of shape {tuple(x.shape)}")
        if not self.collapsible(x):
            return SpikeTrain(x.repeat(T, 1, 1, 1) if static else x.transpose(0, 1).flatten(0, 1), T)
        mean = x if static else x.mean(1)
        frames = x if static else x.transpose(0, 1).flatten(0, 1)
        frames = frames.contiguous(memory_format=torch.channels_last)
        return SpikeTrain(frames, T, self.backward, None, mean, mean, static)

    def collapsible(self, x):
        """Whether the backward pass need not unroll time; for the gradient of x or a mask a step it must."""
        if self.backward == "unrolled" or torch.is_grad_enabled() and x.requires_grad:
            return False
        drops = [m for m in self.modules() if isinstance(m, nn.Dropout) and m.training and m.p]
        if all(getattr(dropout, "shared", False) for dropout in drops):
            return True
        warnings.warn("dropout with a mask a time step: the backward pass unrolls time", stacklevel=2)
        return False

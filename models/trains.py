"""Spike trains: what travels between the layers of a network."""

from dataclasses import dataclass, replace

import torch

from models.engines.dense import Spikes
from models.functional import Read


@dataclass
class SpikeTrain:
    """The output of a spiking layer, T steps of a batch of B samples; row t*B+b is step t of sample b.

    In unrolled networks `spikes` is a tensor (T*B, ...) that carries the amplitude, and that is all. In
    collapsed ones the spikes belong to the `engine`, and only it looks into them: 0 and 1, with the
    `amplitude` apart (None: values, as once pooled); autograd sees only the `representation`, (B, ...), at
    which the gradient is dL/do_t, the same for every t (see `functional.Read`); `mean` is the time mean of
    the values. A `static` train has one copy of its spikes for all steps.
    """

    spikes: object
    timesteps: int
    backward: str = "unrolled"
    engine: object = None
    amplitude: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    representation: torch.Tensor | None = None
    static: bool = False

    @property
    def unrolled(self):
        return self.backward == "unrolled"

    def values(self):
        """The values of all steps, (T*B, ...); autograd sees them in unrolled networks alone."""
        if self.unrolled:
            return self.spikes
        if self.amplitude is None:
            return self.spikes.dense()
        return self.spikes.dense(self.amplitude.dtype) * self.amplitude

    def rate(self):
        """The time mean of the values, (B, ...), differentiable: for a penalty on the firing rate, say."""
        if self.unrolled:
            return self.spikes.unflatten(0, (self.timesteps, -1)).mean(0)
        return Read.apply(self.mean, self.representation, 1 / self.timesteps)

    def map(self, function):
        """The same train after a linear map that acts on every time step alike."""
        if self.unrolled:
            return replace(self, spikes=function(self.spikes))
        with torch.no_grad():
            # Amplitude first, as in unrolled networks: pooled spikes may tie with a threshold. A few steps at
            # a time: these copies could be the largest tensors of all.
            batch = self.spikes.shape[0] // (1 if self.static else self.timesteps)
            parts = self.spikes.split(batch * max(1, self.timesteps // 4))
            parts = [function(part if self.amplitude is None else part * self.amplitude) for part in parts]
            spikes = Spikes(torch.cat(parts))
            if self.mean is None:  # nothing will be differentiated
                return replace(self, spikes=spikes, amplitude=None)
            mean = function(self.mean)
        representation = function(self.representation)
        return replace(self, spikes=spikes, amplitude=None, mean=mean, representation=representation)

    def drop(self, dropout):
        """After dropout, with a mask for each time step or, if `dropout.shared`, one for all."""
        if not (dropout.training and dropout.p):
            return self
        if not getattr(dropout, "shared", False):
            return self.map(dropout)
        values = self.values()
        shape = len(values) // (1 if self.static else self.timesteps), *values.shape[1:]
        mask = dropout(torch.ones(shape, device=values.device))
        return self.map(lambda x: (x.unflatten(0, (-1, len(mask))) * mask).flatten(0, 1))

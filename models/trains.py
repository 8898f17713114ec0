"""Spike trains: what travels between the layers of a network."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from models.engines.dense import Spikes
from models.engines.interface import calls
from models.functional import Read, without_autocast

DROPOUTS = nn.modules.dropout._DropoutNd  # of all kinds
# Linear, and without parameters: `map` takes them unseen.
LINEAR = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.Flatten, nn.Unflatten, nn.Identity)
LINEAR += (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


class Dropout(nn.Dropout):
    """Dropout of a train: a mask for each time step, as published, or, by `train.drop`, one `shared`."""

    def __init__(self, p=0.5, shared=False):
        super().__init__(p)
        self.shared = shared


@dataclass
class SpikeTrain:
    """The output of a spiking layer, T steps of a batch of B samples; row t*B+b is step t of sample b.

    In unrolled networks `spikes` is a tensor (T*B, ...) that carries the amplitude, and that is all. In
    collapsed ones the spikes belong to the `engine`, and only it looks into them: 0 and 1, with the
    `amplitude` apart (None: values, as once pooled); autograd sees only the `representation`, (B, ...), at
    which the gradient is dL/do_t, the same for every t (see `functional.Read`); `mean` is the time mean of
    the values. A `static` train has one copy of its spikes for all steps. `neuron`: the layer that fired.
    """

    spikes: object
    timesteps: int
    backward: str = "unrolled"
    engine: object = None
    amplitude: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    representation: torch.Tensor | None = None
    static: bool = False
    neuron: nn.Module | None = None

    @property
    def unrolled(self):
        return self.backward == "unrolled"

    def values(self):
        """The values, (T*B, ...), static ones (B, ...); autograd sees them in unrolled networks alone."""
        if self.unrolled:
            return self.spikes
        if self.amplitude is None:
            return self.spikes.dense()
        return self.spikes.dense(self.amplitude.dtype) * self.amplitude

    def rate(self):
        """The time mean of the values, (B, ...), differentiable: for a penalty on the firing rate, say."""
        if self.mean is None:  # unrolled, or nothing to differentiate
            return self.values().unflatten(0, (self.timesteps, -1)).mean(0)
        return Read.apply(self.mean, self.representation, 1 / self.timesteps)

    def completed(self, static):
        """As a collapsed layer takes it: with a mean, even from under no_grad; T copies unless `static`."""
        train = self
        if self.mean is None and torch.is_grad_enabled():
            mean = self.rate().to(self.neuron.Vth.dtype)
            train = replace(self, mean=mean, representation=mean)  # of which only the shape counts
        if self.static and not static:  # a still image beside spikes
            frames = self.spikes.dense()
            copies = frames.repeat(self.timesteps, *[1] * (frames.dim() - 1))
            train = replace(train, static=False, spikes=Spikes(copies))
        return train

    def decode(self):
        """The representation of the values, (B, ...), differentiable: of the last layer, the logits."""
        if self.neuron is None:
            raise TypeError("the input has no representation: only a train that a neuron layer fired has one")
        if self.representation is None:  # unrolled, or nothing to differentiate
            return self.neuron.decode(self.values())
        return Read.apply(self.representation.detach(), self.representation, self.neuron.decoding_gain)

    def map(self, function):
        """The same train after a linear map that acts on every time step alike, as an average pool does.

        `function` gets the rows of one or several steps, (n*B, ...), with any n.
        Where time is not unrolled, raises ValueError for a function that does not commute with the mean over
        time (a max pool, a LayerNorm), and for one with parameters, which belongs into a branch. One that it
        does not know (see LINEAR) it tries at every step of training, as it may change; a GPU waits for that.
        A still image may go through any, once for all time steps.
        """
        if not (self.unrolled or self.static or is_known(function)) and torch.is_grad_enabled():
            if self.mean is not None:
                check_linear(function, self.mean)
            elif function(next(iter(self.spikes.split(1)))).requires_grad:  # of a part under no_grad
                refuse_parameters(function)
        return self.at_every_step(function)

    def at_every_step(self, function):
        """`map`, unchecked."""
        if self.unrolled:
            return replace(self, spikes=function(self.spikes))
        if self.static:  # once, as the function may draw numbers, keep statistics, or work in place
            image = self.spikes.dense().clone()
            with without_autocast(image.device):
                image = function(image)
            if image.requires_grad:
                refuse_parameters(function)
            moments = {} if self.mean is None else dict(mean=image, representation=image)
            return replace(self, spikes=Spikes(image.detach()), **moments)
        with torch.no_grad():
            # Amplitude first, as in unrolled networks: pooled spikes may tie with a threshold. A few steps at
            # a time: these copies could be the largest tensors of all.
            batch = self.spikes.shape[0] // self.timesteps
            parts = self.spikes.split(batch * max(1, self.timesteps // 4))
            parts = [function(part if self.amplitude is None else part * self.amplitude) for part in parts]
            spikes = Spikes(torch.cat(parts))
        if self.mean is None:  # nothing will be differentiated
            return replace(self, spikes=spikes, amplitude=None)
        with without_autocast(self.mean.device):
            mean, representation = function(self.mean), function(self.representation)
        return replace(self, spikes=spikes, amplitude=None, mean=mean, representation=representation)

    def drop(self, dropout):
        """After dropout, with a mask for each time step or, from a `Dropout` that says so, one for all."""
        if not (dropout.training and dropout.p):
            return self
        if not getattr(dropout, "shared", False):  # as torch's own
            if not self.unrolled:
                raise ValueError('a mask for each time step needs backward = "unrolled", or a shared Dropout')
            return self.at_every_step(dropout)
        batch, masks = self.spikes.shape[0] // (1 if self.static else self.timesteps), []

        def masked(x):
            if not masks:
                dtype = self.neuron.Vth.dtype if self.neuron else x.dtype if x.is_floating_point() else None
                masks.append(dropout(torch.ones(batch, *x.shape[1:], dtype=dtype, device=x.device)))
            return (x.unflatten(0, (-1, batch)) * masks[0]).flatten(0, 1)

        return self.at_every_step(masked)


def is_hooked(function):
    return bool(getattr(function, "_forward_hooks", None) or getattr(function, "_forward_pre_hooks", None))


def is_known(function):
    """Whether it is linear as far as `map` knows, or a sequence of such."""
    if not is_hooked(function) and calls(function, nn.Sequential):
        return all(map(is_known, function))
    return not is_hooked(function) and calls(function, *LINEAR)


def refuse_parameters(function):
    way_out = 'make it a branch of a spiking_layer, or set backward = "unrolled"'
    raise ValueError(f"`map` trains no parameters, such as those of {function}: {way_out}")


def random_state(like):
    """Of the generator from which a function of tensors like this one draws."""
    return torch.cuda.get_rng_state(like.device) if like.is_cuda else torch.get_rng_state()


def check_linear(function, like):
    """Raise ValueError unless f(a + b) + f(0) = f(a) + f(b) for normal a and b of the shape of `like`.

    So an offset may stand beside a linear map: it, too, is the same for sequence, mean and representation.
    f takes the four as four steps, and b once more alone, which tells whether steps stay apart. The numbers
    come from a generator of their own, so that a run stays what it is.
    """
    generator, state = torch.Generator().manual_seed(0), random_state(like)
    a, b = (torch.randn(like.shape, generator=generator, device="cpu").to(like) for _ in range(2))
    with without_autocast(like.device):
        alone = function(b)
        try:
            steps = function(torch.cat([torch.zeros_like(a), a, b, a + b]))
        except RuntimeError as error:
            raise ValueError(f"{function} fails on the rows of several steps: {error}") from error
    if alone.requires_grad:
        refuse_parameters(function)
    if alike := steps.shape == (4 * len(alone), *alone.shape[1:]):
        at_zero, at_a, at_b, at_sum = steps.split(len(alone))
        error = (at_sum + at_zero - at_a - at_b).abs().max() + (at_b - alone).abs().max()
        # a GPU may round the factors of a product to 10 bits (TF32)
        rounding = max(1e-2 if like.is_cuda else 1e-4, 16 * torch.finfo(like.dtype).eps)
        alike = error <= rounding * (at_a.abs() + at_b.abs()).max()
    if not alike or not torch.equal(state, random_state(like)):  # which draws other numbers every time
        hint = 'use a linear map of every step, as an average pool is, or backward = "unrolled"'
        raise ValueError(f"{function} is not linear, so the backward pass has to unroll time: {hint}")

"""The event engine: spiking layers on a CPU, spike by spike. The kernels, and all layouts, are in events.cpp.

It takes layers whose branches are square convolutions without groups and dilation, linear maps or identities
on trains of spikes. Currents from anything else (images, pooled spikes, trains too dense to be worth it) are
computed by the dense engine, and only fire here.
"""

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models import functional
from models.engines import dense, kernels
from models.engines.interface import Observation

TILE_GRADIENT = 1024  # outputs of a tile for a weight's gradient
FEW = 64  # output channels, below which the dense engine computes a weight's gradient faster


@dataclass
class PackedQ:
    """Q as the kernels leave it: `blocks` (copies, O/OB, k*k*C, OB), times the `amplitude` of the spikes."""

    blocks: torch.Tensor
    amplitude: torch.Tensor | None = None

    def unpacked(self, shape):
        """In the shape of the weight."""
        Q = self.blocks.sum(0) if len(self.blocks) > 1 else self.blocks[0]
        if self.amplitude is not None:
            Q = Q * self.amplitude
        kernel, block = shape[2:] or (1, 1), Q.shape[-1]
        Q = Q.view(len(Q), *kernel, -1, block).permute(0, 4, 1, 2, 3).flatten(0, 1)
        return Q[: shape[0], ..., : shape[1]].permute(0, 3, 1, 2).reshape(shape)


class EventEngine(dense.DenseEngine):
    """The methods that `interface` asks for. Layers denser than `limit` go the dense way."""

    name = "events"

    def __init__(self, library, limit=1.0):
        super().__init__()
        self.kernels, self.limit = kernels.Kernels(library), limit

    def currents(self, branches, neuron, dtype):
        if neuron.dynamics is not functional.membrane:
            return dense.Currents(self, branches, neuron, dtype)
        shapes = {currents_shape(branch) for branch in branches} if all(map(self.takes, branches)) else ()
        if len(shapes) == 1 and min(*shapes) > 0:  # else the dense engine says what does not fit
            currents = Currents(self, branches, neuron)
            if currents.layer.fits():
                return currents
        return StoredCurrents(self, branches, neuron, dtype)

    def takes(self, branch):
        spikes = branch.train.spikes
        if not isinstance(spikes, kernels.Spikes) or spikes.density > self.limit:
            return False
        if branch.weight is None:
            return True
        fits = branch.weight.shape[1] == spikes.channels
        return fits and kernels.is_plain(branch.linear, branch.weight, spikes.width)

    def clamped(self, clamp, g):
        return Clamped(self, clamp, g)

    def weight_gradient(self, linear, weight, x, grad, scaled_Qs):
        """By events too, as most neurons never fire: pass A of a layer whose currents are `grad`."""
        if not self.suits(linear, weight, x, grad, scaled_Qs):
            scaled_Qs = [(c, self.unpacked(Q, weight.shape)) for c, Q in scaled_Qs]
            return super().weight_gradient(linear, weight, x, grad, scaled_Qs)
        inputs, outputs = kernels.whole_words(x), kernels.whole_words(grad)
        layer = kernels.KernelLayer(self.kernels, outputs.shape, 1, [weight], outputs)
        Q = layer.new_Q(weight, inputs.shape[-1], self.sum_of(scaled_Qs, layer))
        layer.add(inputs.shape, linear, values=inputs, Q=Q)
        layer.add(outputs.shape, values=outputs)
        layer.tile(TILE_GRADIENT, 1)
        layer.statistics()
        return PackedQ(Q).unpacked(weight.shape)

    def suits(self, linear, weight, x, grad, scaled_Qs):
        """Whether the kernels take, and are worth, a weight's gradient: all Q must have come in one form."""
        if not isinstance(linear, nn.Conv2d) or len(weight) < FEW:
            return False
        forms = {Q.blocks.shape if isinstance(Q, PackedQ) else None for _, Q in scaled_Qs}
        fits = kernels.cells(*grad.shape[2:]) <= kernels.CELLS
        return fits and len(forms) < 2 and None not in forms and kernels.is_plain(linear, weight, x.shape[-1])

    def sum_of(self, scaled_Qs, layer):
        """sum c*Q in the form in which a weight's gradient is added to it, or None."""
        total = None
        for c, Q in scaled_Qs:
            layer.block = Q.blocks.shape[-1]
            scaled = Q.blocks * kernels.filled_up(c * Q.amplitude, layer.channels).view(-1, 1, layer.block)
            total = scaled if total is None else total.add_(scaled)
        return total

    def unpacked(self, Q, shape):
        return Q.unpacked(shape) if isinstance(Q, PackedQ) else Q


def currents_shape(branch):
    """The shape of a branch's currents, (T*B, C, H, W)."""
    spikes = branch.train.spikes
    channels, size = spikes.channels, (spikes.height, spikes.width)
    if branch.weight is not None:
        kernel, stride, padding = (numbers[0] for numbers in kernels.geometry(branch.linear))
        channels, size = len(branch.weight), [(n + 2 * padding - kernel) // stride + 1 for n in size]
    return spikes.images, channels, *size


class Clamped:
    """The gradient g of a layer behind its clamp: G. See `interface`."""

    def __init__(self, engine, clamp, g):
        self.kernels, self.g, self.channels = engine.kernels, kernels.channels_last(g), g.shape[1]
        vectors = self.of_channels(clamp.scale), self.of_channels(clamp.shift)
        self.kept = [self.g, kernels.channels_last(clamp.r), *vectors]
        pointers = [tensor.data_ptr() for tensor in self.kept]
        size = g.numel() // self.channels, self.channels
        arguments = kernels.ClampArguments(*pointers, clamp.ceiling.item(), clamp.gain, *size, clamp.closed)
        self.arguments = ctypes.byref(arguments)

    def of_channels(self, v):
        return v.expand(self.channels).to(self.g.dtype).contiguous()

    def sums(self, y_mean, mu):
        sums, y_mean = self.g.new_empty(3, self.channels), kernels.channels_last(y_mean)
        self.kernels("clamp_sums", self.g, self.arguments, y_mean, self.of_channels(mu), sums)
        S1, S2, above = sums
        return S1, S2, above.sum()

    def parts(self, a, d, c, sequence, times):
        vectors, times = [self.of_channels(v) for v in (a, d, c)], kernels.DOUBLE(times)
        constant, out = torch.empty_like(self.g), torch.empty_like(self.g)
        sequence = None if sequence is None else kernels.channels_last(sequence)
        self.kernels("gradient", self.g, self.arguments, *vectors, sequence, times, constant, out)
        return constant.movedim(-1, 1), out.movedim(-1, 1)


class StoredCurrents(dense.Currents):
    """Currents that the dense engine has computed, to fire by events."""

    def fire(self, scale, shift, needed):
        T, y = self.neuron.timesteps, kernels.whole_words(self.y)
        images = T * len(y) if self.static else len(y)
        layer = kernels.KernelLayer(self.engine.kernels, (images, *y.shape[1:]), T, [], y)
        layer.add(y.shape, values=y, still=self.static)
        layer.tile()
        return layer.fire(self.neuron, scale, shift, (images, *self.y.shape[1:]), needed)


class Currents:
    """A layer's currents from its spikes, computed when they are needed, and kept where `keep` says so."""

    def __init__(self, engine, branches, neuron):
        self.branches, self.neuron, like = branches, neuron, neuron.Vth.detach()
        weighted = [branch for branch in branches if branch.weight is not None]
        weights, densities = [b.weight for b in weighted], [b.train.spikes.density for b in weighted]
        # how many spikes reach an output
        self.spikes = sum(density * weight[0].numel() for density, weight in zip(densities, weights))
        images, channels, *size = currents_shape(branches[0])
        self.shape = (images, channels, *size)[: len(branches[0].train.spikes.shape)]
        channels = -(-channels // kernels.WORD) * kernels.WORD  # whole words
        shape, densest = (images, *size, channels), max(densities, default=0.0)
        self.layer = kernels.KernelLayer(engine.kernels, shape, neuron.timesteps, weights, like, densest)
        for branch in branches:
            self.add(branch)
        self.layer.tile(*(kernels.TILE_SPLIT, kernels.TILE_SPLIT) if self.layer.split else ())

    def add(self, branch):
        spikes, amplitude = branch.train.spikes, branch.train.amplitude
        shape = spikes.images, spikes.height, spikes.width, spikes.padded
        if branch.weight is None:
            self.layer.add(shape, scale=amplitude.item(), bits=spikes.bits)
            return
        active, ptr = spikes.lists
        weights = self.pack(branch.weight, amplitude, spikes.padded)
        self.layer.add(shape, branch.linear, active=active, base=spikes.base, ptr=ptr, weights=weights)
        if branch.bias is not None:
            self.layer.bias.narrow(0, 0, len(branch.bias)).add_(branch.bias.detach())

    def pack(self, weight, amplitude, inputs):
        """The weights, amplitude included, as the kernels want them: see events.cpp."""
        outputs, features, *kernel = weight.shape
        block, channels, (k, _) = self.layer.block, self.layer.channels, kernel or (1, 1)
        if (channels, inputs) != (outputs, features):
            fill = 0, 0, 0, 0, 0, inputs - features, 0, channels - outputs
            weight = F.pad(weight.view(outputs, features, k, k), fill)
        packed = self.layer.like.new_zeros(channels // block, k * k * inputs + 1, block)
        rows = packed[:, :-1].view(-1, k, k, inputs, block).permute(0, 4, 3, 1, 2)
        rows.copy_(weight.detach().view(-1, block, inputs, k, k)).mul_(amplitude)
        return packed

    def observe(self, wanted):
        Qs = [None] * len(wanted)
        for k, branch in enumerate(self.branches):
            if wanted[k]:
                Q = self.layer.new_Q(branch.weight, branch.train.spikes.padded)
                Qs[k] = PackedQ(Q, branch.train.amplitude)
                self.layer.branches[k].Q = Q.data_ptr()
        n = self.layer.images * self.layer.height * self.layer.width
        self.layer.keep(self.spikes)
        mean, var = (v[: self.shape[1]] for v in self.layer.statistics())
        for Q in filter(None, Qs):  # which is kept until the backward pass: one copy, of however many threads
            Q.blocks = Q.blocks.sum(0, keepdim=True) if len(Q.blocks) > 1 else Q.blocks
        return Observation(mean, var, n, Qs)

    def fire(self, scale, shift, needed):
        return self.layer.fire(self.neuron, scale, shift, self.shape, needed)

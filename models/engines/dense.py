"""The dense engine: spikes as tensors, layers by PyTorch's own operators. Any device, any precision."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models import functional
from models.engines.interface import Moments, Observation
from models.functional import along_channels, per_channel


@dataclass(frozen=True)
class Spikes:
    """A spike train as a tensor (T*B, ...): 0 and 1, or the real values that a pool has made of them."""

    tensor: torch.Tensor

    @property
    def shape(self):
        return self.tensor.shape

    def dense(self, dtype=None):
        """As a tensor (T*B, ...), of this type or of the spikes' own."""
        return self.tensor if dtype is None else self.tensor.to(dtype)

    def split(self, rows):
        """The same, some rows at a time."""
        return self.tensor.split(rows)

    def count(self):
        """How many are not zero."""
        return self.tensor.count_nonzero()


class DenseEngine:
    """The methods that `interface` asks for. `loop`: `functional.membrane`, or a compiled version of it."""

    name = "dense"

    def __init__(self, loop=functional.membrane):
        self.loop = loop

    def currents(self, branches, neuron, dtype):
        return Currents(self, branches, neuron, dtype)

    def clamped(self, clamp, g):
        return Clamped(clamp, g)

    def weight_gradient(self, linear, weight, x, grad, scaled_Qs):
        gradient = correlation(linear, weight, x, grad)
        for c, Q in scaled_Qs:
            gradient.addcmul_(c.view(-1, *[1] * (Q.dim() - 1)), Q)
        return gradient

    def unpacked(self, Q, shape):
        return Q

    def transpose(self, linear, weight, grad, like):
        if weight is None:  # the identity
            return grad
        if isinstance(linear, nn.Linear):
            return grad @ weight
        return convolution_backward(linear, weight, like, grad, [True, False, False], linear.stride)[0]


class Clamped:
    """The gradient g of a layer behind its clamp: G. See `interface`."""

    def __init__(self, clamp, g):
        inside, self.above = clamp.zones()
        self.g, self.G = g, g * inside * clamp.gain

    def sums(self, y_mean, mu):
        centred = y_mean - along_channels(mu, y_mean)
        return per_channel(self.G), per_channel(self.G * centred), (self.g * self.above).sum()

    def parts(self, a, d, c, sequence, times):
        A = along_channels(a, self.G) * self.G + along_channels(d, self.G)
        return times * A, None if sequence is None else A.addcmul_(along_channels(c, A), sequence)


class Currents:
    """A layer's currents y_t, the sum of its branches' maps, as one tensor (T*B, ...)."""

    def __init__(self, engine, branches, neuron, dtype):
        self.engine, self.branches, self.neuron, self.dtype = engine, branches, neuron, dtype
        self.static = branches[0].train.static
        self.y = None
        for branch in branches:
            self.y = charge(self.y, branch, dtype)

    def observe(self, wanted):
        """See `interface`. A static image's one step counts T times."""
        zeros = torch.zeros_like(self.neuron.Vth).repeat(self.y.shape[1])  # of the precision of the results
        if self.y.device.type in ("cpu", "cuda", "xpu"):
            mean, var = torch.batch_norm_update_stats(self.y, zeros, zeros.clone(), 0.0)
        else:  # where there is none
            var, mean = torch.var_mean(self.y, [0, *range(2, self.y.dim())], correction=0)
        mean, var = mean.to(zeros.dtype), var.to(zeros.dtype)  # of half precision, GPUs give float32
        n = self.y.numel() // self.y.shape[1] * (self.neuron.timesteps if self.static else 1)
        Qs = [self.Q(branch) if wants else None for branch, wants in zip(self.branches, wanted)]
        return Observation(mean, var, n, Qs)

    def Q(self, branch):
        """sum_t corr(values_t, y_t)."""
        dtype = self.dtype if isinstance(branch.linear, nn.Conv2d) else self.neuron.Vth.dtype
        dtype = self.neuron.Vth.dtype if dtype == torch.float16 else dtype  # whose range sums exceed
        x, y = branch.train.spikes.dense(dtype), self.y.to(dtype)
        Q = correlation(branch.linear, branch.weight, x, y).to(self.neuron.Vth.dtype)
        return Q if branch.train.amplitude is None else Q * branch.train.amplitude

    def fire(self, scale, shift, needed):
        """See `interface`. Spikes overwrite the currents where they fit."""
        T, y = self.neuron.timesteps, self.y
        layout = torch.channels_last if y.dim() == 4 else torch.contiguous_format
        spikes, steps = y, rows(y, 1 if self.static else T)
        if self.static or y.dtype != self.dtype or not y.is_contiguous(memory_format=layout):
            shape = T * len(y) if self.static else len(y), *y.shape[1:]
            spikes = torch.empty(shape, dtype=self.dtype, device=y.device, memory_format=layout)
        neuron, (lam, kappa) = self.neuron, self.neuron.leak
        scale, shift = (kappa * v.expand(y.shape[1]) for v in (scale, shift))
        settings = neuron.Vth, neuron.alpha * neuron.Vth, lam, scale, shift
        weights = ([[1.0] * T] + ([neuron.weights] if neuron.weights else [])) if needed else []
        loop = self.engine.loop if neuron.dynamics is functional.membrane else neuron.dynamics
        sums = loop(steps, steps if spikes is y else rows(spikes, T), *settings, weights)
        moments = self.moments(sums, spikes[: len(spikes) // T]) if needed else None
        return Spikes(spikes), moments

    def moments(self, sums, like):
        """The loop's sums over time as the layer's moments, in the shape of one step."""
        amplitude, shape = self.neuron.amplitude, like.movedim(1, -1).shape
        sums = [[x.view(shape).movedim(-1, 1) for x in pair] for pair in sums]
        y_mean, mean = sums[0][0] / self.neuron.timesteps, sums[0][1] * (amplitude / self.neuron.timesteps)
        if len(sums) == 1:
            return Moments(y_mean, y_mean, mean, mean.clone())
        return Moments(y_mean, sums[1][0], mean, sums[1][1] * amplitude)


def compiled_loop(like):
    """`functional.membrane` through torch.compile; RuntimeError without a compiler. `like`: a scalar."""
    compiled = torch.compile(functional.membrane, dynamic=True)

    def loop(*arguments):
        # Training, evaluation, a static image, each type and number of channels: each its own loop.
        with torch._dynamo.config.patch(recompile_limit=64, specialize_float=True):
            return compiled(*arguments)

    try:
        loop([like.new_ones(2, 2)], [like.new_empty(2, 2)], like, like, 1.0, like, like)
    except Exception as error:
        raise RuntimeError(f"torch.compile does not work here: {error}".splitlines()[0]) from error
    return loop


def rows(x, T):
    """The time loop sees T matrices of neurons by channels, whatever the layer's shape."""
    return x.movedim(1, -1).reshape(T, -1, x.shape[1]).unbind(0)


def charge(y, branch, dtype):
    """y + L(values), in y's place; a convolution runs in the precision of the spikes. y may be None."""
    spikes, amplitude, weight = branch.train.spikes, branch.train.amplitude, branch.weight
    if weight is None:  # the identity
        if y is None:
            return branch.train.values().clone()
        return y.add_(spikes.dense()) if amplitude is None else y.addcmul_(spikes.dense(), amplitude)
    if amplitude is not None:
        weight = weight * amplitude  # in place of the spikes, which stay 0 and 1
    if isinstance(branch.linear, nn.Linear):
        current = F.linear(spikes.dense(weight.dtype), weight, branch.bias)
    else:
        conv, bias = branch.linear, None if branch.bias is None else branch.bias.to(dtype)
        geometry = conv.stride, conv.padding, conv.dilation, conv.groups
        current = F.conv2d(spikes.dense(dtype), weight.to(dtype), bias, *geometry)
    if y is not None and y.shape != current.shape:
        raise ValueError(f"branches that give {tuple(y.shape)} and {tuple(current.shape)} do not add up")
    return current if y is None else y.add_(current)


def convolution_backward(conv, weight, x, grad, mask, stride):
    geometry = stride, conv.padding, conv.dilation, False, [0, 0], conv.groups
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, mask)


def correlation(linear, weight, x, grad):
    """The gradient of the map's weight for input x and output gradient `grad`."""
    if isinstance(linear, nn.Linear):
        return grad.t() @ x
    stride = linear.stride
    if linear.kernel_size == (1, 1) and linear.padding == (0, 0):
        # Only these pixels count. Given all of less than 8 channels, oneDNN on AVX2 corrupts the memory.
        x, stride = x[..., :: stride[0], :: stride[1]], (1, 1)
    if prefers_patches(linear, weight, x):
        return correlation_of_patches(linear, x, grad, stride)
    like = torch.empty_like(weight, dtype=x.dtype)  # only its shape counts
    return convolution_backward(linear, like, x, grad, [False, True, False], stride)[1]


def prefers_patches(conv, weight, x):
    """With AVX2 and no AVX-512, products of matrices beat oneDNN's kernel, unless they are small."""
    plain = conv.groups == 1 and conv.dilation == (1, 1) and x.dtype.itemsize >= 4
    if not plain or weight.numel() < 2**15 or x.device.type != "cpu":
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def correlation_of_patches(conv, x, grad, stride):
    """The gradient of a convolution's weight as a product of matrices, some images at a time."""
    (height, width), (above, left) = conv.kernel_size, conv.padding
    Q = x.new_zeros(height * width * x.shape[1], grad.shape[1])
    some = max(1, 2**21 // (len(Q) * grad[0, 0].numel()))  # patches of 8 MB, which a cache may hold
    for images, grads in zip(x.split(some), grad.split(some)):
        padded = F.pad(images.movedim(1, -1), (0, 0, left, left, above, above))
        patches = padded.unfold(1, height, stride[0]).unfold(2, width, stride[1]).movedim(3, -1)
        Q.addmm_(patches.reshape(-1, len(Q)).t(), grads.movedim(1, -1).reshape(-1, grad.shape[1]))
    return Q.view(height, width, x.shape[1], -1).permute(3, 2, 0, 1)

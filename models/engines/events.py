"""The event engine: spiking layers on a CPU, spike by spike. The kernels, and all layouts, are in events.cpp.

It takes layers whose branches are square convolutions without groups and dilation, linear maps or identities
on trains of spikes. Currents from anything else (images, pooled spikes, trains too dense to be worth it) are
computed by the dense engine, and only fire here.
"""

import ctypes
import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from models import functional
from models.engines import dense
from models.engines.interface import Moments, Observation

WORD = 16  # channels in a word of bits
BLOCK_BYTES = 300 * 2**10  # of the weights of a block of output channels, which a cache may hold
SPLIT_BYTES = 2**20  # of a layer's weights, from which on threads share its output channels, not its images
SCATTER_BYTES = 2**18  # of a tile of pass B, where currents are computed by channel
TILE_A, TILE_B, TILE_SPLIT = 256, 640, 1280  # outputs of a tile of pass A and of pass B; of both, if split
TILE_GRADIENT = 1024  # outputs of a tile for a weight's gradient
FEW = 64  # output channels, below which the dense engine computes a weight's gradient faster


def structure(name, **types):
    """A structure of the kernels': type -> names, in the order of events.cpp."""
    fields = [(field, kind) for kind, names in types.values() for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


POINTERS, DOUBLES, INTS, LONGS = ctypes.c_void_p, ctypes.c_double, ctypes.c_int, ctypes.c_int64
BranchArguments = structure(
    "BranchArguments",
    a=(POINTERS, "bits active base ptr weights values Q"),
    b=(DOUBLES, "scale"),
    c=(INTS, "H W C k s p still"),
)
LayerArguments = structure(
    "LayerArguments",
    a=(POINTERS, "branches bias"),
    b=(INTS, "n_branches T B H W O OB scatter split frames images rows"),
)
FiringArguments = structure(
    "FiringArguments",
    a=(DOUBLES, "lam point Vth of_y of_mean of_repr"),
    b=(POINTERS, "scale shift w y_mean y_repr mean repr bits"),
)
ClampArguments = structure(
    "ClampArguments",
    a=(POINTERS, "g y_repr scale shift"),
    b=(DOUBLES, "low high ceiling gain"),
    c=(LONGS, "M C"),
)


class Kernels:
    """The functions of the built library, for tensors: `kernels("fire", like, ...)`."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))

    def __call__(self, name, like, *arguments):
        """`like`: a tensor of the type to compute in, or None."""
        if like is not None:
            name += "_f64" if like.dtype == torch.float64 else "_f32"
        function = getattr(self.library, name)
        function(*[POINTERS(x.data_ptr()) if torch.is_tensor(x) else x for x in arguments])


class Spikes:
    """A spike train as bits, (T*B*H*W, words of 16 channels), and lists of the active channels by pixel."""

    def __init__(self, kernels, bits, shape, dtype):
        self.kernels, self.bits, self.shape, self.dtype = kernels, bits, torch.Size(shape), dtype
        self.images, self.channels, self.height, self.width = (*shape, 1, 1)[:4]
        self.base = torch.empty(self.images + 1, dtype=torch.int64)
        size = LONGS(self.images), LONGS(bits.numel() // max(1, self.images))
        kernels("count_spikes", None, bits, self.base, *size)

    @property
    def padded(self):
        """Channels, as many as whole words hold."""
        return WORD * self.bits.shape[1]

    @cached_property
    def density(self):
        return self.base[-1].item() / max(1, self.shape.numel())

    @cached_property
    def lists(self):
        """(active, ptr), see events.cpp; with room for what vectors read and write beyond the end."""
        size = [LONGS(n) for n in (self.images, self.height, self.width, self.bits.shape[1])]
        ptr = torch.empty(self.images * (self.height * self.width + 1), dtype=torch.int32)
        active = torch.empty(self.base[-1].item() + 4 * self.images + 64, dtype=torch.int16)
        self.kernels("list_spikes", None, self.bits, self.base, ptr, active, *size)
        return active, ptr

    def dense(self, dtype=None):
        """As a tensor (T*B, ...) of 0 and 1."""
        return torch.cat(list(self.split(self.images))).to(dtype or self.dtype)

    def split(self, rows):
        """The same, some rows at a time."""
        pixels = self.height * self.width
        bytes_ = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
        of_byte = (bytes_ >> torch.arange(8, dtype=torch.uint8) & 1).to(self.dtype)  # (256, 8)
        for bits in self.bits.split(rows * pixels):
            values = F.embedding(bits.view(torch.uint8).int(), of_byte).flatten(1)[:, : self.channels]
            values = values.view(-1, *self.shape[2:], self.channels)
            yield values.movedim(-1, 1)

    def count(self):
        """How many are not zero."""
        return self.base[-1].clone()


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
        self.kernels, self.limit = Kernels(library), limit

    def currents(self, branches, neuron, dtype):
        if neuron.dynamics is not functional.membrane:
            return dense.Currents(self, branches, neuron, dtype)
        if all(self.takes(branch) for branch in branches):
            return Currents(self, branches, neuron)
        return StoredCurrents(self, branches, neuron, dtype)

    def takes(self, branch):
        spikes = branch.train.spikes
        if not isinstance(spikes, Spikes) or spikes.density > self.limit:
            return False
        return branch.weight is None or is_plain(branch.linear, spikes.width)

    def clamped(self, clamp, g):
        return Clamped(self.kernels, clamp, g)

    def weight_gradient(self, linear, x, grad, scaled_Qs):
        """By events too, as most neurons never fire: pass A of a layer whose currents are `grad`."""
        weight = linear.weight
        forms = {Q.blocks.shape if isinstance(Q, PackedQ) else None for _, Q in scaled_Qs}
        packed = len(forms) < 2 and None not in forms
        if not (
            packed and isinstance(linear, nn.Conv2d) and len(weight) >= FEW and is_plain(linear, x.shape[-1])
        ):
            scaled_Qs = [(c, self.unpacked(Q, weight.shape)) for c, Q in scaled_Qs]
            return super().weight_gradient(linear, x, grad, scaled_Qs)
        inputs, outputs = whole_words(x), whole_words(grad)
        layer = KernelLayer(self.kernels, outputs.shape, 1, [weight], outputs)
        Q = self.sum_of(scaled_Qs, layer)
        if Q is None:
            Q = layer.new_Q(weight, inputs.shape[-1])
        layer.add(inputs.shape, linear, values=inputs, Q=Q)
        layer.add(outputs.shape, values=outputs)
        layer.tile(TILE_GRADIENT, 1)
        layer.sums()
        return PackedQ(Q).unpacked(weight.shape)

    def sum_of(self, scaled_Qs, layer):
        """sum c*Q in the form in which a weight's gradient is added to it, or None."""
        total = None
        for c, Q in scaled_Qs:
            layer.block, layer.split = Q.blocks.shape[-1], len(Q.blocks) < layer.threads
            scaled = Q.blocks * filled_up(c * Q.amplitude, layer.channels).view(-1, 1, layer.block)
            total = scaled if total is None else total.add_(scaled)
        return total

    def unpacked(self, Q, shape):
        return Q.unpacked(shape) if isinstance(Q, PackedQ) else Q


class Clamped:
    """The gradient g of a layer behind its clamp: G. See `interface`."""

    def __init__(self, kernels, clamp, g):
        self.kernels, self.g, self.gain, self.channels = kernels, channels_last(g), clamp.gain, g.shape[1]
        self.r, ceiling = channels_last(clamp.r), clamp.ceiling
        self.kept = [self.g, self.r, self.of_channels(clamp.scale), self.of_channels(clamp.shift)]
        low, high = 0.0, ceiling
        if not clamp.closed:
            low, high = torch.finfo(g.dtype).tiny, torch.nextafter(ceiling, torch.zeros_like(ceiling))
        numbers = low, high.item(), ceiling.item(), clamp.gain
        pointers = [tensor.data_ptr() for tensor in self.kept]
        arguments = ClampArguments(*pointers, *numbers, g.numel() // self.channels, self.channels)
        self.arguments = ctypes.byref(arguments)

    def of_channels(self, v):
        return v if len(v) == self.channels else v.expand(self.channels).contiguous()

    def sums(self, y_mean, mu):
        sums = torch.zeros(torch.get_num_threads(), 3, self.channels, dtype=torch.float64)
        self.kernels("clamp_sums", self.g, self.arguments, channels_last(y_mean), self.of_channels(mu), sums)
        S1, S2, above = sums.sum(0).to(self.g.dtype)
        return self.gain * S1, self.gain * S2, above.sum()

    def affine(self, a, d, c, sequence):
        if sequence is None:
            sequence, c = self.r, torch.zeros_like(c)
        else:
            sequence = channels_last(sequence)
        out = torch.empty_like(sequence)
        vectors = [self.of_channels(v) for v in (a, d, c)]
        self.kernels("gradient", self.g, self.arguments, *vectors, sequence, out)
        return out.movedim(-1, 1)


class KernelLayer:
    """A layer as the kernels see it: its branches, its blocks of channels, its tiles."""

    def __init__(self, kernels, shape, timesteps, weights, like):
        """shape: (T*B, H, W, O), O whole words. `like`: a tensor of the type to compute in."""
        self.kernels, self.like, self.timesteps = kernels, like, timesteps
        self.images, self.height, self.width, self.channels = shape
        self.threads = torch.get_num_threads()
        size = sum(weight.numel() for weight in weights) * like.element_size()
        self.block = 32 if self.channels % 32 == 0 and size / self.channels * 32 <= BLOCK_BYTES else WORD
        self.split = size > SPLIT_BYTES and self.channels // self.block >= self.threads
        self.scatter = bool(weights) and self.channels == WORD
        self.branches, self.kept, self.bias = [], [], like.new_zeros(self.channels)

    def add(self, shape, linear=None, scale=1.0, still=False, **tensors):
        """A branch with an input of `shape` (rows, H, W, C): bits, active, base, ptr, weights, values, Q."""
        kernel, stride, padding = geometry(linear)
        numbers = dict(
            H=shape[1], W=shape[2], C=shape[3], k=kernel[0], s=stride[0], p=padding[0], still=still
        )
        pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        self.branches.append(BranchArguments(**pointers, **numbers, scale=scale))
        self.kept.append(tensors)

    def new_Q(self, weight, inputs):
        """Zeros for a Q of `inputs` channels, whole words."""
        rows = inputs * weight[0, 0].numel()
        return self.like.new_zeros(
            1 if self.split else self.threads, self.channels // self.block, rows, self.block
        )

    def tile(self, of_a, of_b):
        """Choose the tiles of the passes: so many outputs."""
        pixels, batch = self.height * self.width, self.images // self.timesteps
        share = 1 if self.split else self.threads
        self.frames = max(1, min(of_a // pixels, -(-self.images // share)))
        if self.scatter:
            of_b = SCATTER_BYTES // (WORD * self.like.element_size())
        rows = min(self.height, max(1, of_b // (self.timesteps * self.width)))
        self.rows = -(-self.height // -(-self.height // rows))  # strips of about the same height
        self.batch_of_tile = max(1, min(of_b // (self.timesteps * pixels), -(-batch // share)))

    def arguments(self):
        self.array = (BranchArguments * len(self.branches))(*self.branches)
        size = self.timesteps, self.images // self.timesteps, self.height, self.width, self.channels
        tiles = self.frames, self.batch_of_tile, self.rows
        pointers = ctypes.addressof(self.array), self.bias.data_ptr()
        layer = LayerArguments(
            *pointers, len(self.branches), *size, self.block, self.scatter, self.split, *tiles
        )
        return ctypes.byref(layer)

    def sums(self):
        """Pass A: -> the sums of y and of y*y over time, batch and space, (2, O)."""
        sums = torch.zeros(self.threads, 2, self.channels, dtype=torch.float64)
        self.kernels("statistics", self.like, self.arguments(), sums)
        return sums.sum(0)

    def fire(self, neuron, scale, shift, shape, needed):
        """Pass B: -> Spikes and Moments of a layer of `shape`, (T*B, ...)."""
        (lam, kappa), T, channels, like = neuron.leak, neuron.timesteps, shape[1], self.like
        weights = neuron.weights or [1 / T] * T

        def of_channels(v):
            return filled_up((kappa * v).expand(channels), self.channels).contiguous()

        scale, shift, w = of_channels(scale), of_channels(shift), like.new_tensor(weights)
        one_step = (shape[0] // T, *shape[2:], self.channels)
        moments = [like.new_empty(one_step) for _ in range(4)]
        bits = torch.empty(self.images * self.height * self.width, self.channels // WORD, dtype=torch.int16)
        amplitude, Vth = neuron.amplitude.item(), neuron.Vth.item()
        numbers = lam, neuron.alpha * Vth, Vth, 1 / T, amplitude / T, amplitude
        pointers = [tensor.data_ptr() for tensor in (scale, shift, w, *moments, bits)]
        self.kernels("fire", like, self.arguments(), ctypes.byref(FiringArguments(*numbers, *pointers)))
        y_mean, y_repr, mean, representation = [x[..., :channels].movedim(-1, 1) for x in moments]
        spikes = Spikes(self.kernels, bits, shape, like.dtype)
        return spikes, Moments(y_mean, y_repr, mean, representation) if needed else None


class StoredCurrents(dense.Currents):
    """Currents that the dense engine has computed, to fire by events."""

    def fire(self, scale, shift, needed):
        T, y = self.neuron.timesteps, whole_words(self.y)
        images = T * len(y) if self.static else len(y)
        layer = KernelLayer(self.engine.kernels, (images, *y.shape[1:]), T, [], y)
        layer.add(y.shape, values=y, still=self.static)
        layer.tile(TILE_A, TILE_B)
        return layer.fire(self.neuron, scale, shift, (images, *self.y.shape[1:]), needed)


class Currents:
    """A layer's currents from its spikes, computed when they are needed, and not kept."""

    def __init__(self, engine, branches, neuron):
        self.branches, self.neuron, like = branches, neuron, neuron.Vth.detach()
        train = branches[0].train.spikes
        weights = [branch.weight for branch in branches if branch.weight is not None]
        channels, size = train.channels, (train.height, train.width)
        if weights:
            linear, channels = next(b.linear for b in branches if b.weight is not None), len(weights[0])
            kernel, stride, padding = (numbers[0] for numbers in geometry(linear))
            size = [(n + 2 * padding - kernel) // stride + 1 for n in size]
        self.shape = (train.images, channels, *(size if len(train.shape) == 4 else ()))
        whole = -(-channels // WORD) * WORD
        self.layer = KernelLayer(
            engine.kernels, (train.images, *size, whole), neuron.timesteps, weights, like
        )
        for branch in branches:
            self.add(branch)
        self.layer.tile(*(TILE_SPLIT, TILE_SPLIT) if self.layer.split else (TILE_A, TILE_B))

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
            self.layer.bias[: len(branch.bias)] += branch.bias.detach()

    def pack(self, weight, amplitude, inputs):
        """The weights, amplitude included, as the kernels want them: see events.cpp."""
        outputs, features, *kernel = weight.shape
        block, channels, (k, _) = self.layer.block, self.layer.channels, kernel or (1, 1)
        if (channels, inputs) != (outputs, features):
            fill = 0, 0, 0, 0, 0, inputs - features, 0, channels - outputs
            weight = F.pad(weight.view(outputs, features, k, k), fill)
        packed = weight.new_zeros(channels // block, k * k * inputs + 1, block)
        rows = packed[:, :-1].view(-1, k, k, inputs, block).permute(0, 4, 3, 1, 2)
        torch.mul(weight.detach().view(-1, block, inputs, k, k), amplitude, out=rows)
        return packed

    def observe(self, wanted):
        Qs = [None] * len(wanted)
        for k, branch in enumerate(self.branches):
            if wanted[k]:
                Qs[k] = PackedQ(
                    self.layer.new_Q(branch.weight, branch.train.spikes.padded), branch.train.amplitude
                )
                self.layer.branches[k].Q = Qs[k].blocks.data_ptr()
        n = self.layer.images * self.layer.height * self.layer.width
        mean, squares = self.layer.sums()[:, : self.shape[1]] / n
        var = (squares - mean.square()).clamp_(min=0)
        like = self.layer.like
        return Observation(mean.to(like.dtype), var.to(like.dtype), n, Qs)

    def fire(self, scale, shift, needed):
        return self.layer.fire(self.neuron, scale, shift, self.shape, needed)


def channels_last(x):
    """(B, C, ...) -> contiguous (B, ..., C)."""
    return x.movedim(1, -1).contiguous()


def whole_words(x):
    """(B, C, H, W), or (B, C) -> contiguous (B, H, W, C), C filled up by zeros to whole words."""
    x = channels_last(x)
    return filled_up(x.view(len(x), *x.shape[1:-1] or (1, 1), -1), -(-x.shape[-1] // WORD) * WORD)


def filled_up(x, channels):
    """x (..., C) with zeros for the channels that it lacks."""
    return x if x.shape[-1] == channels else F.pad(x, (0, channels - x.shape[-1]))


def geometry(linear):
    """Kernel, stride, padding of a convolution; a linear map is one of 1x1, the identity one of 0x0."""
    if isinstance(linear, nn.Conv2d):
        return linear.kernel_size, linear.stride, linear.padding
    return ((0, 0) if linear is None or isinstance(linear, nn.Identity) else (1, 1)), (1, 1), (0, 0)


def is_plain(linear, width):
    """Whether the kernels take the map: square, three outputs a row for a spike, places of 16 bits."""
    if isinstance(linear, nn.Conv2d) and (linear.groups != 1 or linear.dilation != (1, 1)):
        return False
    kernel, stride, padding = geometry(linear)
    if any(a != b for a, b in (kernel, stride, padding)):
        return False
    channels = -(-linear.weight.shape[1] // WORD) * WORD
    fits = math.prod(kernel) * channels < 2**16 and width * channels <= 2**16 and (width + 4) ** 2 < 2**16
    return fits and kernel[0] <= 3 * stride[0]

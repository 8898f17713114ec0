"""The kernels of events.cpp, called with tensors: their structures, spikes, and a layer as they see it."""

import ctypes
import math
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from models.engines.interface import Moments

WORD = 16  # channels in a word of bits
BLOCK_BYTES = 300 * 2**10  # of the weights of a block of output channels, which a cache may hold
SPLIT_BYTES = 2**20  # of a layer's weights, from which on threads share its output channels, not its images
SCATTER_BYTES = 2**18  # of a tile of pass B, where currents are computed by channel: that is
SCATTER_TO = 0.13  # faster for layers of one word, as long as fewer neurons of the inputs fire
KEPT_FROM, KEPT_BYTES = 40, 2**21  # spikes an output, bytes a sample: from and to which currents are kept
CELLS = 2**16  # of a tile at most: 16 bits name one
TILE_A, TILE_B, TILE_SPLIT = 256, 640, 1280  # outputs of a tile of pass A and of pass B; of both, if split

POINTER, DOUBLE, INT, LONG = ctypes.c_void_p, ctypes.c_double, ctypes.c_int, ctypes.c_int64


def fields(kind, names):
    """The fields of a structure that have one kind."""
    return [(name, kind) for name in names.split()]


class BranchArguments(ctypes.Structure):
    """`Branch` of events.cpp; so are the next three its `Layer`, `Firing` and `Clamp`."""

    _fields_ = fields(POINTER, "bits active base ptr weights values Q") + fields(DOUBLE, "scale")
    _fields_ += fields(INT, "H W C k s p still")


class LayerArguments(ctypes.Structure):
    _fields_ = fields(POINTER, "branches bias y")
    _fields_ += fields(INT, "n_branches T B H W O OB scatter split frames images rows")


class FiringArguments(ctypes.Structure):
    _fields_ = fields(DOUBLE, "lam kappa point Vth of_y of_mean of_repr")
    _fields_ += fields(POINTER, "w scale shift y_mean y_repr mean repr bits")


class ClampArguments(ctypes.Structure):
    _fields_ = fields(POINTER, "g y_repr scale shift") + fields(DOUBLE, "ceiling gain")
    _fields_ += fields(LONG, "M C closed")


class Kernels:
    """The functions of the built library, for tensors: `kernels("fire", like, ...)`."""

    def __init__(self, library):
        self.library = library  # by ctypes

    def __call__(self, name, like, *arguments):
        """`like`: a tensor of the type to compute in, or None."""
        if like is not None:
            name += "_f64" if like.dtype == torch.float64 else "_f32"
        function = getattr(self.library, name)
        if function(*[POINTER(x.data_ptr()) if torch.is_tensor(x) else x for x in arguments]):
            raise MemoryError("out of memory in the event engine")


class Spikes:
    """A spike train as bits, (T*B*H*W, words of 16 channels), and lists of the active channels by pixel."""

    def __init__(self, kernels, bits, shape, dtype):
        self.kernels, self.bits, self.shape, self.dtype = kernels, bits, torch.Size(shape), dtype
        self.images, self.channels, self.height, self.width = (*shape, 1, 1)[:4]
        self.base = bits.new_empty(self.images + 1, dtype=torch.int64)
        size = LONG(self.images), LONG(bits.numel() // max(1, self.images))
        kernels("count_spikes", None, bits, self.base, *size)

    @property
    def padded(self):
        """Channels, as many as whole words hold."""
        return WORD * self.bits.shape[1]

    @cached_property
    def number(self):
        """How many spikes there are."""
        return self.base[-1].item()

    @property
    def density(self):
        return self.number / max(1, self.shape.numel())

    @cached_property
    def lists(self):
        """(active, ptr), see events.cpp; with room for what vectors read and write beyond the end."""
        size = [LONG(n) for n in (self.images, self.height, self.width, self.bits.shape[1])]
        ptr = self.bits.new_empty(self.images * (self.height * self.width + 1), dtype=torch.int32)
        active = self.bits.new_empty(self.number + WORD * self.images)
        self.kernels("list_spikes", None, self.bits, self.base, ptr, active, *size)
        return active, ptr

    def dense(self, dtype=None):
        """As a tensor (T*B, ...) of 0 and 1."""
        return torch.cat(list(self.split(self.images))).to(dtype or self.dtype)

    def split(self, rows):
        """The same, some rows at a time."""
        pixels = self.height * self.width
        bytes_ = torch.arange(256, device="cpu").unsqueeze(1)
        of_byte = (bytes_ >> torch.arange(8, device="cpu") & 1).to(self.dtype)  # (256, 8)
        for bits in self.bits.split(rows * pixels):
            values = F.embedding(bits.view(torch.uint8).int(), of_byte).flatten(1)[:, : self.channels]
            values = values.view(-1, *self.shape[2:], self.channels)
            yield values.movedim(-1, 1)

    def count(self):
        """How many are not zero."""
        return self.base[-1].clone()


class KernelLayer:
    """A layer as the kernels see it: its branches, its blocks of channels, its tiles."""

    def __init__(self, kernels, shape, timesteps, weights, like, density=1.0):
        """shape: (T*B, H, W, O), O whole words. `like`: a tensor of the type to compute in."""
        self.kernels, self.like, self.timesteps = kernels, like, timesteps
        self.images, self.height, self.width, self.channels = shape
        self.threads = torch.get_num_threads()
        size = sum(weight.numel() for weight in weights) * like.element_size()
        self.block = 32 if self.channels % 32 == 0 and size / self.channels * 32 <= BLOCK_BYTES else WORD
        self.split = size > SPLIT_BYTES and self.channels // self.block >= self.threads
        self.scatter = bool(weights) and self.channels == WORD and density < SCATTER_TO
        self.branches, self.kept, self.bias = [], [], like.new_zeros(self.channels)
        self.y = like.new_empty(0)

    def add(self, shape, linear=None, scale=1.0, still=False, **tensors):
        """A branch with an input of `shape` (rows, H, W, C): bits, active, base, ptr, weights, values, Q."""
        (_, H, W, C), ((k, _), (s, _), (p, _)) = shape, geometry(linear)
        numbers = dict(H=H, W=W, C=C, k=k, s=s, p=p, still=still, scale=scale)
        pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        self.branches.append(BranchArguments(**pointers, **numbers))
        self.kept.append(tensors)

    def new_Q(self, weight, inputs, first=None):
        """For a Q of `inputs` channels, whole words, that threads add to: zeros but for the `first` copy."""
        rows, copies = inputs * weight[0, 0].numel(), 1 if self.split else self.threads
        if first is not None and copies == 1:
            return first
        Q = self.like.new_zeros(copies, self.channels // self.block, rows, self.block)
        if first is not None:
            Q[:1] = first
        return Q

    def tile(self, of_a=TILE_A, of_b=TILE_B):
        """Choose the tiles of the passes: so many outputs."""
        pixels, batch = self.height * self.width, self.images // self.timesteps
        share, T = 1 if self.split else self.threads, self.timesteps
        most = CELLS // cells(self.height, self.width)
        self.frames = max(1, min(of_a // pixels, -(-self.images // share), most))
        if self.scatter:
            of_b = SCATTER_BYTES // (WORD * self.like.element_size())
        rows = min(self.height, max(1, of_b // (T * self.width)))
        self.rows = -(-self.height // -(-self.height // rows))  # strips of about the same height
        most = CELLS // (T * cells(self.rows, self.width))
        self.batch_of_tile = max(1, min(of_b // (T * pixels), -(-batch // share), most))

    def keep(self, spikes):
        """Have pass A keep the currents for pass B, if they are of so many spikes that this is faster."""
        outputs = self.height * self.width * self.channels
        if spikes >= KEPT_FROM and self.timesteps * outputs * self.like.element_size() <= KEPT_BYTES:
            self.y = self.like.new_empty(self.images * outputs)

    def fits(self):
        """Whether 16 bits name each cell of the smallest tiles, one image in pass A, T in pass B."""
        return max(cells(self.height, self.width), self.timesteps * cells(self.rows, self.width)) <= CELLS

    def arguments(self):
        self.array = (BranchArguments * len(self.branches))(*self.branches)
        size = self.timesteps, self.images // self.timesteps, self.height, self.width, self.channels
        tiles = self.frames, self.batch_of_tile, self.rows
        pointers = ctypes.addressof(self.array), self.bias.data_ptr(), self.y.data_ptr()
        numbers = len(self.branches), *size, self.block, self.scatter, self.split, *tiles
        return ctypes.byref(LayerArguments(*pointers, *numbers))

    def statistics(self):
        """Pass A: -> mean and variance of y over time, batch and space, (O)."""
        mean, var = self.like.new_empty(self.channels), self.like.new_empty(self.channels)
        self.kernels("statistics", self.like, self.arguments(), mean, var)
        return mean, var

    def fire(self, neuron, scale, shift, shape, needed):
        """Pass B: -> Spikes and Moments of a layer of `shape`, (T*B, ...)."""
        (lam, kappa), T, channels, like = neuron.leak, neuron.timesteps, shape[1], self.like
        weights, amplitude, Vth = neuron.weights, neuron.amplitude.item(), neuron.Vth.item()
        vectors = [filled_up(v.expand(channels), self.channels) for v in (scale, shift)]
        scale, shift = (v.to(like.dtype).contiguous() for v in vectors)
        w = (DOUBLE * T)(*weights or [1 / T] * T)
        one_step = (shape[0] // T, *shape[2:], self.channels)
        y_mean, mean = like.new_empty(one_step), like.new_empty(one_step)
        y_repr, representation = y_mean, mean  # of neurons whose representation is the mean
        if weights is not None:
            y_repr, representation = torch.empty_like(y_mean), torch.empty_like(mean)
        moments = y_mean, y_repr, mean, representation
        words = self.images * self.height * self.width, self.channels // WORD
        bits = like.new_empty(words, dtype=torch.int16)
        numbers = lam, kappa, neuron.alpha * Vth, Vth, 1 / T, amplitude / T, amplitude
        pointers = ctypes.addressof(w), *[tensor.data_ptr() for tensor in (scale, shift, *moments, bits)]
        self.kernels("fire", like, self.arguments(), ctypes.byref(FiringArguments(*numbers, *pointers)))
        moments = Moments(*[x.narrow(-1, 0, channels).movedim(-1, 1) for x in moments])
        return Spikes(self.kernels, bits, shape, like.dtype), moments if needed else None


def cells(rows, width):
    """Of a tile of one frame, with as wide a border as there can be."""
    return (rows + 6) * (width + 6)


def channels_last(x):
    """(B, C, ...) -> contiguous (B, ..., C)."""
    return x.movedim(1, -1).contiguous()


def whole_words(x):
    """(B, C, H, W), or (B, C) -> contiguous (B, H, W, C), C filled up by zeros to whole words."""
    x = channels_last(x)
    x = x.view(len(x), *x.shape[1:-1] or (1, 1), x.shape[-1])
    return filled_up(x, -(-x.shape[-1] // WORD) * WORD).contiguous()  # a pad may choose another layout


def filled_up(x, channels):
    """x (..., C) with zeros for the channels that it lacks."""
    return x if x.shape[-1] == channels else F.pad(x, (0, channels - x.shape[-1]))


def geometry(linear):
    """Kernel, stride, padding of a convolution; a linear map is one of 1x1, the identity one of 0x0."""
    if isinstance(linear, nn.Conv2d):
        return linear.kernel_size, linear.stride, linear.padding
    return ((0, 0) if linear is None or isinstance(linear, nn.Identity) else (1, 1)), (1, 1), (0, 0)


def is_plain(linear, weight, width):
    """Whether the kernels take the map: square, three outputs a row for a spike, rows of 16 bits."""
    if isinstance(linear, nn.Conv2d) and (linear.groups != 1 or linear.dilation != (1, 1)):
        return False
    kernel, stride, padding = geometry(linear)
    if any(a != b for a, b in (kernel, stride, padding)):
        return False
    channels = -(-weight.shape[1] // WORD) * WORD
    return math.prod(kernel) * channels < 2**16 and width * channels <= 2**16 and kernel[0] <= 3 * stride[0]

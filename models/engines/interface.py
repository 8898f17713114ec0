"""What the algebra of a collapsed layer (`models.collapsed`) asks of an engine.

    currents(branches, neuron, dtype)    the layer's y_t = sum_k L_k(values^k_t), in whatever form, with
        .observe(wanted)                 -> Observation; wanted[k]: whether branch k needs its Q
        .fire(scale, shift, needed)      -> the spikes of the neuron for currents scale*y_t + shift; and
                                         Moments, or None unless needed
    clamped(clamp, g)                    G, the gradient g behind the clamp, in whatever form, with
        .sums(y_mean, mu)                -> per channel the sums of G and of G*(y_mean - mu); and the sum of
                                         the g above the ceiling
        .parts(a, d, c, sequence, n)     -> n*(a*G + d), and a*G + d + c*sequence, of no use if the sequence
                                         is None: each (B, ...)
    weight_gradient(linear, weight, x, g, Qs)
                                         -> the gradient of the map's weight for input x and output gradient
                                         g, (B, ...), plus c*Q for each (c, Q)
    transpose(linear, weight, g, like)   -> the gradient of the map's input, of the shape of `like`;
                                         weight None: the identity
    unpacked(Q, shape)                   -> Q as a tensor in the shape of its weight

Vectors (scale, shift, mu, a, d, c) hold one number a channel. What a layer emits, its spikes, is known to its
engine alone; for everybody else it has a `shape`, (T*B, ...), a `count()` of spikes, and the methods
`dense()` and `split(rows)`, which give tensors: all of it, or some rows at a time.
"""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Branch:
    """A linear map on a spike train. weight, bias: those of `linear`, a batch norm behind it folded in."""

    linear: nn.Module
    weight: torch.Tensor | None  # None for the identity
    bias: torch.Tensor | None
    train: object


@dataclass
class Observation:
    """Per channel the mean and variance of the y_t over time, batch and space, of n values each; and Qs.

    Q_k = sum_t corr(values^k_t, y_t), in a form of the engine's own, or None.
    """

    mean: torch.Tensor
    var: torch.Tensor
    n: int
    Qs: list


@dataclass
class Moments:
    """Time mean and representation of the y_t, and of the output's values: each (B, ...)."""

    y_mean: torch.Tensor
    y_repr: torch.Tensor
    mean: torch.Tensor
    representation: torch.Tensor


def calls(module, *kinds):
    """Whether it is a module of these kinds that calls what they call: no forward of its own, no hook before.

    By such hooks the older weight norm, spectral norm and pruning make the weight.
    """
    if not isinstance(module, kinds):
        return False
    own = getattr(module.forward, "__func__", None) in [kind.forward for kind in kinds]
    plain = getattr(type(module), "_conv_forward", None) in (None, nn.Conv2d._conv_forward)
    return own and plain and not module._forward_pre_hooks


def affine(module):
    """(weight, bias) of a map or a batch norm; None where it has none."""
    return getattr(module, "weight", None), getattr(module, "bias", None)

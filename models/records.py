"""What a collapsed layer (`models.collapsed`) keeps between its forward and its backward pass."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from models.functional import Clamp


class PerBranch(NamedTuple):
    """What autograd sees of a branch; in the backward pass, the gradients in the same places."""

    representation: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    gamma: torch.Tensor | None = None  # of the batch norm inside the branch
    beta: torch.Tensor | None = None


@dataclass
class Norm:
    """A batch norm at work: its statistics, and z = a*y + shift. `frozen`: they are not of this batch."""

    mu: torch.Tensor
    sigma: torch.Tensor
    a: torch.Tensor
    shift: torch.Tensor
    local_mean: torch.Tensor  # of this process
    module: nn.Module | None
    frozen: bool


@dataclass
class InnerRecord:
    """What the backward pass needs of the batch norm inside a branch."""

    norm: Norm
    y_mean: torch.Tensor
    y_repr: torch.Tensor
    cross: torch.Tensor  # sum over time, batch and space of y*y^d, per channel
    Q: torch.Tensor | None


@dataclass
class BranchRecord:
    """What the backward pass needs of a branch."""

    linear: nn.Module
    weight: torch.Tensor | None
    mean: torch.Tensor
    Q: torch.Tensor | None
    inner: InnerRecord | None


@dataclass
class Record:
    """What the backward pass needs of a layer: tensors of one step, or of a weight's shape."""

    norm: Norm
    clamp: Clamp
    y_mean: torch.Tensor
    branches: list = field(default_factory=list)


def per_branch(flat):
    """A flat sequence, cut into PerBranch."""
    size = len(PerBranch._fields)
    return [PerBranch(*flat[i : i + size]) for i in range(0, len(flat), size)]


class Slot(int):
    """Where a record's tensor was, while autograd keeps it."""


def stow(ctx, record):
    """Save a record for the backward pass, its tensors in autograd's keeping."""
    tensors = []

    def put(tensor):
        tensors.append(tensor)
        return Slot(len(tensors) - 1)

    ctx.record = replaced(record, torch.Tensor, put)
    ctx.save_for_backward(*tensors)


def unstow(ctx):
    """The record that was saved."""
    tensors = ctx.saved_tensors
    return replaced(ctx.record, Slot, tensors.__getitem__)


def replaced(value, kind, function):
    """A copy of a record, list or leaf, and of all in it, with function(leaf) for each leaf of this kind."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, list):
        return [replaced(item, kind, function) for item in value]
    if not hasattr(type(value), "__dataclass_fields__"):
        return value
    copied = object.__new__(type(value))  # faster than `dataclasses.replace`, which counts in small layers
    copied.__dict__ = {name: replaced(item, kind, function) for name, item in vars(value).items()}
    return copied

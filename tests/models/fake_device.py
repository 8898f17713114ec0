"""A network on a GPU that is not there: tensors of torch's FakeTensorMode know their device and shape alone.

They find what only a GPU would show: tensors left on the CPU, and what makes the host wait for the device.
The autograd engine wants a driver, so `backward` walks the graph in its place.

    python -m tests.models.fake_device preresnet.resnet18_lif --timesteps 5 20

prints how many operations a training step sends to the device: about as many kernels as it launches.
"""

import argparse
import itertools
from collections import Counter
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models import create_model, list_models

COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class HostSynchronizationError(Exception):
    """A copy between the host and the device for which the host waits."""


@torch.library.register_fake("aten::batch_norm_update_stats")
def _statistics(x, running_mean, running_var, momentum):
    """torch has none; its own operations that have one are slower and round to bfloat16 (docs/gpu.md)."""
    dtype = torch.float32 if x.dtype.itemsize < 4 else x.dtype  # as CUDA's, whatever running_mean is of
    return running_mean.new_empty(x.shape[1], dtype=dtype), running_mean.new_empty(x.shape[1], dtype=dtype)


class Watch(TorchDispatchMode):
    """Counts the operations that compute on the device; raises HostSynchronizationError."""

    def __init__(self):
        super().__init__()
        self.operations = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in COPIES:
            refuse_to_wait(function, args, kwargs or {})
        if not function.is_view and function.namespace == "aten" and "empty" not in function.name():
            self.operations[function] += 1
        return function(*args, **(kwargs or {}))


def refuse_to_wait(copy, args, settings):
    """Raise HostSynchronizationError if a copy goes from one device to another and the host waits for it."""
    to_copy = copy is torch.ops.aten._to_copy.default
    source = args[0] if to_copy else args[1]
    target = settings.get("device", source.device) if to_copy else args[0].device
    waits = not (settings.get("non_blocking") or args[2:3] == (True,))
    if waits and torch.device(target).type != source.device.type:
        raise HostSynchronizationError(f"a copy from {source.device} to {target} without non_blocking=True")


@contextmanager
def fake_gpu():
    """While open, tensors may be made on a device "cuda" that is not there. -> Watch"""
    with FakeTensorMode(), Watch() as watch:
        yield watch


def to_fake_gpu(model):
    """Put parameters and buffers there; `model.to` cannot, as it swaps tensors that others refer to."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(fake_like(p), p.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fake_like(buffer)
    return model


def fake_like(x):
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")


def backward(loss):
    """What `loss.backward()` does, without the engine's threads. -> parameter -> its gradient"""
    order, users = [loss.grad_fn], Counter()
    for node in order:
        for below, _ in node.next_functions:
            if below is not None and not users[below]:
                order.append(below)
            users[below] += 1
    arrived, ready, gradients = {loss.grad_fn: [torch.ones_like(loss)]}, [loss.grad_fn], {}
    while ready:
        node = ready.pop()
        given = arrived.pop(node, [])
        if hasattr(node, "variable"):  # a parameter
            gradients[node.variable] = given[0]
            continue
        for (below, slot), grad in edges(node, given):
            collect(arrived.setdefault(below, []), slot, grad, below._input_metadata[slot].shape)
            users[below] -= 1
            if not users[below]:
                ready.append(below)
    return gradients


def edges(node, given):
    """Run a node's backward. -> pairs of (node below, number of its output) and the gradient that it gets"""
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # has no edges for what is no tensor
        results = node.apply(*given)
        results = results if type(results) is tuple else (results,)
        results = [grad for grad, needed in zip(results, node.needs_input_grad) if needed]
    else:
        results = node(*given)
        results = results if type(results) is tuple else (results,)
        results = [grad for grad, (below, _) in zip(results, node.next_functions) if below is not None]
    return zip([edge for edge in node.next_functions if edge[0] is not None], results, strict=True)


def collect(grads, slot, grad, shape):
    """Add to the gradient of a node's output number `slot`."""
    grads += [None] * (slot + 1 - len(grads))
    if grad is not None:
        grad = grad.sum_to_size(shape)
        grads[slot] = grad if grads[slot] is None else grads[slot] + grad


def step(model, batch=2, bfloat16=False, dtype=torch.float32):
    """A training step's passes on the fake GPU, inside `fake_gpu()`. -> parameter -> its gradient"""
    shape = (model.timesteps, 2, 48, 48) if hasattr(model, "classifier") else (3, 32, 32)
    with autocast(bfloat16):
        logits = model(torch.empty(batch, *shape, device="cuda", dtype=dtype))
    return backward(F.cross_entropy(logits, torch.empty(batch, dtype=torch.long, device="cuda")))


@contextmanager
def autocast(enabled):
    """Autocast on GPUs, which `torch.autocast` refuses where there are none."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", enabled)
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.clear_autocast_cache()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=list_models(), metavar="NAME")
    parser.add_argument("--timesteps", type=int, nargs="+", default=[5, 20])
    args = parser.parse_args()
    for timesteps, backward_pass in itertools.product(args.timesteps, ("unrolled", "collapsed")):
        model = create_model(args.model, timesteps=timesteps, dropout=0.0, backward=backward_pass)
        with fake_gpu() as watch:
            step(to_fake_gpu(model))
        often = ", ".join(f"{n} {function.name()}" for function, n in watch.operations.most_common(6))
        print(f"{args.model}, T={timesteps}, {backward_pass}: {watch.operations.total()} operations: {often}")


if __name__ == "__main__":
    main()

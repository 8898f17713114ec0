"""The processes of one run, as `torch.distributed.launch` or `torchrun` start them; idle in a run of one."""

import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from utils.cli import explained, require, warn

DAY = timedelta(days=1)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def join(device, backend=None):
    """Join the launcher's processes, if there is one: nccl on GPUs, gloo on CPUs. -> this one's device"""
    if "RANK" not in os.environ:
        return device
    if device.type == "cuda":
        local, found = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if device.index is not None and backend != "gloo" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
            warn(f"{device} serves one process: of several on a machine each takes a GPU of its own")
            device = torch.device("cuda")
        lonely = f"process {local} of this machine has no GPU of its own ({found} found); start fewer"
        require(device.index is not None or local < found, lonely)
        device = torch.device("cuda", local) if device.index is None else device
        torch.cuda.set_device(device)
    elif backend == "nccl":
        warn("--dist-backend nccl needs GPUs; the processes talk by gloo")
    backend = f"cpu:gloo,cuda:{backend or 'nccl'}" if device.type == "cuda" else "gloo"
    with explained(lambda why: f"the processes cannot meet: {why}", RuntimeError, ValueError):
        store, number, world = next(dist.rendezvous("env://", timeout=timedelta(minutes=30)))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # The launcher may keep its store: restarted processes must not read where earlier ones listened.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        store.set_timeout(DAY)  # the first process may have data to prepare
        dist.init_process_group(backend, timeout=DAY, store=store, rank=number, world_size=world)
    if rank():
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  (rank 0 speaks for all)
    return device


def leave():
    """Part from the other processes once all have come here: none ends while another still needs it."""
    if dist.is_initialized():
        gather(None)
        dist.destroy_process_group()


def gather(value):
    """The values of all processes, in every one of them."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def broadcast(value, source=0):
    """The value of rank `source`, in every process."""
    return gather(value)[source]


@contextmanager
def first_on_each_machine():
    """One process of each machine runs the body before the others do: it prepares what they then find."""
    waits = int(os.environ.get("LOCAL_RANK", 0)) > 0
    if waits:
        with explained(lambda _: "the first process of this machine has ended", RuntimeError):
            gather(None)
    yield
    if not waits:
        gather(None)


def parallel(model, device):
    """The model whose gradients are averaged over the processes after every backward pass."""
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def total(tensor):
    """The sum over all processes."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def any_process(number):
    """The largest of the processes' whole numbers; on CPUs, so that no GPU is waited for."""
    if not dist.is_initialized():
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def same_buffers(model):
    """Rank 0's buffers, batch norm's running statistics, for all: they then evaluate the same model."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)

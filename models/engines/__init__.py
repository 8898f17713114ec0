"""Engines compute spiking layers: `dense` by PyTorch's operators, `events` spike by spike."""

import functools

import torch

from models.engines.dense import DenseEngine

ENGINES = ("auto", "dense", "events")
# Under "auto" denser spike trains go the dense way: up to here events are measured to be faster, at 41 %
# by 1.7 (benchmarks/RESULTS.md).
DENSE_FROM = 0.4


@functools.cache
def choose_engine(name, device, dtype=torch.float32):
    """-> (engine, why it is not the event engine, or None). device: "cpu", "cuda", ...; dtype: of
    the spikes' convolutions.

    "auto" takes events where they work: on a CPU, in float32 and float64, where the kernels can be built.
    "events" takes them for every train, however dense, and raises RuntimeError where there are none.
    """
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; choose from: {', '.join(ENGINES)}")
    library = reason = None
    if name == "dense":
        reason = "dense was chosen"
    elif device != "cpu":
        reason = f"it is for CPUs, not for {device}"
    elif dtype not in (torch.float32, torch.float64):
        reason = f"it computes in float32 and float64, not in {str(dtype).removeprefix('torch.')}"
    else:
        from models.engines.build import find_kernels  # here, as it takes a second to import

        library, reason = find_kernels()
    if reason is not None:
        if name == "events":
            raise RuntimeError(f"no event engine: {reason}")
        return DenseEngine(), reason
    from models.engines.events import EventEngine

    return EventEngine(library, limit=1.0 if name == "events" else DENSE_FROM), None

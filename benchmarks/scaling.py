"""Weak scaling: the same batch a process, one thread each, and what the averaging of gradients costs.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 1 benchmarks/scaling.py
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 benchmarks/scaling.py

Steps with and without the all-reduce take turns; a figure is the median.
"""

import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import create_model  # noqa: E402
from utils import distributed  # noqa: E402


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="preresnet.resnet18_lif")
    parser.add_argument("--timesteps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="images a process")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = distributed.join(torch.device(args.device))
    model = create_model(args.model, timesteps=args.timesteps).to(device)
    network = distributed.parallel(model, device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    images = torch.randn(args.batch, 3, 32, 32, device=device)
    labels = torch.randint(10, (args.batch,), device=device)

    def step(context):
        with context:
            F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    times = {True: [], False: []}
    for repeat in range(-2, args.repeats):
        for reduced, seconds in times.items():
            dist.barrier()
            start = time.perf_counter()
            step(nullcontext() if reduced else network.no_sync())
            if repeat >= 0:
                seconds.append(time.perf_counter() - start)
    whole, alone = (statistics.median(times[reduced]) for reduced in (True, False))
    n = distributed.world_size()
    print(f"{args.model}, T={args.timesteps}, {n} processes of {torch.get_num_threads()} threads")
    share = 100 * (1 - alone / whole)
    print(f"{n * args.batch / whole:.2f} images/s; the all-reduce takes {share:.1f} % of a step")


if __name__ == "__main__":
    main()

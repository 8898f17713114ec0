"""What slows an SNN's training down: its few levels, or its spikes? An ANN whose ReLUs have T+1 levels tells.

    python benchmarks/levels.py --path ./data/cifar10_jpeg --timesteps 5 20

An IF layer passes on one of T+1 values, 0 to Vth. So does the rounded ANN here, with the SNN's fitted
thresholds and the same straight-through gradient, but without spikes: nothing fluctuates over time. ANN,
rounded ANN and SNN start from the same weights and see the same batches; the table has their mean training
loss by stages.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rounded import rounded  # noqa: E402
from thresholds import start as start_run  # noqa: E402

from cifar import program as cifar  # noqa: E402
from models import create_model  # noqa: E402
from utils import results  # noqa: E402
from utils.cli import require, run_program  # noqa: E402
from utils.data import train_loader  # noqa: E402
from utils.program import count, positive  # noqa: E402

SHAPE = "preresnet.resnet20"
STAGES = 5


def of_same_weights(spiking, classes):
    """The ANN of a spiking network: its weights, ReLUs in the place of its neurons."""
    ann = create_model(f"{SHAPE}_ann", num_classes=classes).train()
    ann.load_state_dict(spiking.state_dict(), strict=False)
    return ann


def losses(model, data, args, steps):
    """The training loss of every step, SGD as in the flags."""
    settings = dict(batch_size=args.train_batch, workers=0, seed=args.manualSeed, pin_memory=False)
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    found, epoch = [], 0
    while len(found) < steps:
        loader = train_loader(data.train, **settings)
        loader.sampler.start(epoch)
        for images, labels in loader:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1, (len(found) + 1) / args.warmup)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
            if len(found) == steps:
                break
        epoch += 1
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--path", required=True, help="images by class: train/<class>/*, test/<class>/*")
    parser.add_argument("--timesteps", type=count, nargs="+", default=[5])
    parser.add_argument("--steps", type=count, default=250, help=f"a multiple of {STAGES}")
    parser.add_argument("--lr", type=positive, default=0.1)
    options = parser.parse_args(argv)
    require(options.steps % STAGES == 0, f"--steps {options.steps} must be a multiple of {STAGES}")
    size = options.steps // STAGES
    table = [f"| network | {' | '.join(f'to {(i + 1) * size}' for i in range(STAGES))} | s |"]
    table.append("|" + " --- |" * (STAGES + 2))
    for T in options.timesteps:
        flags = f"--preset latency-if-t5 --model {SHAPE}_if --Vth auto --dataset imagefolder --timesteps {T}"
        flags += f" --lr {options.lr} --warmup 60 --manualSeed 1 --path"
        args = cifar.get_parser().parse([*flags.split(), options.path])
        data, spiking = start_run(args)
        few = rounded(of_same_weights(spiking, data.classes), spiking)
        networks = {f"ANN of {T + 1} levels": few, f"IF, T={T}": spiking}
        if len(table) == 2:
            networks = {"ANN": of_same_weights(spiking, data.classes)} | networks
        for name, model in networks.items():
            start = time.perf_counter()
            found = losses(model, data, args, options.steps)
            means = [f"{sum(found[i * size : (i + 1) * size]) / size:.3f}" for i in range(STAGES)]
            table.append(f"| {name} | {' | '.join(means)} | {time.perf_counter() - start:.0f} |")
            print(f"{name}: {means[-1]}", flush=True)
    print("\n".join(["", *table]))
    print(f"\n{results.hardware('cpu')}, torch {torch.__version__}")


if __name__ == "__main__":
    run_program(main)

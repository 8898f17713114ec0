"""Time and peak memory of a training step, and of inference, side by side in one process.

    python benchmarks/step_time.py --model preresnet.resnet18_lif --timesteps 5 20 --batch 8
    python benchmarks/step_time.py --inference --batch 50
    python benchmarks/step_time.py --sweep sweep.png --timesteps 1 2 5 10 20 50
    python benchmarks/step_time.py --weights checkpoint/.../NAME.pth --images FOLDER/train

Variants: `peer` (SpikingJelly's DSR nodes in the same network), `unrolled`; by the engines `events` and
`dense`, the latter also with `-bf16` and `-compile`; the approximation `rate-` of these; `ann` (ReLUs, one
time step), and `floor` (the forward convolutions of all T steps, alone). On GPUs also `-tf32`: without it, or
`-bf16`, TF32 is off. They take turns, step by step; a figure is the median. In inference batch norm has the
statistics of the images.
Peak memory is that of a process of its own, or the median of `--processes` of them: VmHWM, or
max_memory_allocated on a GPU. Time follows the firing rates: those of the first step are printed as well.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from torchvision import datasets, transforms  # noqa: E402

from models import create_model, registry  # noqa: E402
from utils import foreign, results  # noqa: E402
from utils.cli import run_program  # noqa: E402

VARIANTS = [
    "peer", "unrolled", "unrolled-bf16", "events", "dense", "dense-compile", "dense-bf16",
    "dense-bf16-compile", "rate-events", "rate-dense", "rate-dense-bf16", "rate-dense-compile",
    "rate-dense-bf16-compile", "ann", "floor",
]  # fmt: skip
GPU_VARIANTS = ["peer-tf32", "peer-bf16", "unrolled-tf32", "dense-tf32", "ann-tf32", "ann-bf16"]


NEURONS = ("Vth", "alpha", "Vth_bound", "tau", "delta_t")


class Peer(nn.Module):
    """SpikingJelly's DSR neuron in the place of one of ours."""

    def __init__(self, kind, settings):
        super().__init__()
        from spikingjelly.activation_based import neuron

        self.timesteps = T = settings["timesteps"]
        self.decode = registry.activation_factory(kind, settings)().decode
        own = dict(T=T, v_threshold=settings["Vth"], v_threshold_lower_bound=settings["Vth_bound"])
        node, leak = neuron.DSRIFNode, {}
        if kind == "lif":
            node, leak = neuron.DSRLIFNode, {key: settings[key] for key in ("tau", "delta_t")}
        self.node = node(**own, **leak, alpha=settings["alpha"])

    def forward(self, x):
        return self.node(x.unflatten(0, (self.timesteps, -1))).flatten(0, 1)


def build(variant, args, timesteps):
    """The network of a variant."""
    entry = registry.NETWORKS[args.model]
    neurons = {name: value for name in NEURONS if (value := getattr(args, name)) is not None}
    settings = entry.defaults | neurons | dict(timesteps=timesteps, dropout=0.0)
    torch.manual_seed(0)
    if variant.startswith("ann"):
        return create_model(entry.ann, num_classes=settings["num_classes"]).to(args.device)
    if variant.startswith("peer"):
        for name in ("num_classes", "dropout"):
            del settings[name]
        model = entry.build(activation=partial(Peer, entry.kind, settings), num_classes=10, dropout=0.0)
        model.backward = "unrolled"
        return model.to(args.device)
    backward = (
        "rate" if variant.startswith("rate") else "unrolled" if variant.startswith("un") else "collapsed"
    )
    engine = "events" if variant.endswith("events") else "dense"
    model = create_model(args.model, **settings, backward=backward, engine=engine)
    if args.weights:
        model.load_state_dict(foreign.load(args.weights)["state_dict"])
    model = model.to(args.device)
    if variant.endswith("-compile"):
        model.compile_loops()
    return model


def step(variant, args, timesteps, model=None):
    """A function that does one training step (or a forward pass, with --inference) of the variant."""
    torch.manual_seed(1)
    torch.backends.cudnn.benchmark = True  # as the programs have it
    entry = registry.NETWORKS[args.model]
    frames = entry.inputs == "event frames"
    shape = (timesteps, *entry.shape) if frames else (3, args.image_size, args.image_size)
    x = torch.randn(args.batch, *shape, device=args.device)
    if args.images:
        x = pictures(args.images, args.batch, args.image_size).to(args.device)
    labels = torch.randint(10, (args.batch,), device=args.device)
    if variant == "floor":
        return floor(args, timesteps, x)
    model = build(variant, args, timesteps) if model is None else model
    if args.inference:
        settle(model, x)

        def run():
            with torch.no_grad(), arithmetic(variant, args.device):
                model(x)

        return run
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)

    def run():
        optimizer.zero_grad()
        with arithmetic(variant, args.device):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()

    return run


@torch.no_grad()
def settle(model, x):
    """To eval mode, with batch norm's running statistics those of `x`, as after training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    model.train()(x)
    model.eval()


def arithmetic(variant, device):
    """Autocast for `-bf16`. TF32 for it and `-tf32` alone, from here on: the backward pass wants it too."""
    allowed = "tf32" in variant or "bf16" in variant
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    return torch.autocast(device, torch.bfloat16, enabled="bf16" in variant)


def pictures(folder, count, size):
    """Some images of a folder of classes, drawn by a fixed seed, normalised as CIFAR-10."""
    to_tensor = [transforms.Resize((size, size)), transforms.ToTensor()]
    normalize = transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    images = datasets.ImageFolder(folder, transforms.Compose([*to_tensor, normalize]))
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    return torch.stack([images[i][0] for i in chosen.tolist()])


def print_firing_rates(args, timesteps):
    """Of each layer in the first forward pass, in percent."""
    model, rates = build("dense", args, timesteps), []
    run = step("dense", args, timesteps, model)
    for module in model.modules():
        if hasattr(module, "register_spike_hook"):
            module.register_spike_hook(lambda s: rates.append(100 * s.count().item() / s.shape.numel()))
    run()
    print("firing rates of the layers (%): " + ", ".join(f"{rate:.1f}" for rate in rates))


def floor(args, timesteps, x):
    """The convolutions of all steps (the stem's of one, if the image is static), channels_last, float32."""
    model, calls = create_model(args.model, timesteps=timesteps, dropout=0.0, backward="unrolled"), []
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))

    def record(conv, inputs, _output):
        rows = args.batch if conv is first and x.dim() == 4 else timesteps * args.batch
        shape = rows, *inputs[0].shape[1:]
        calls.append((conv, shape))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(record)
    with torch.no_grad():
        model(x[:1].cpu())
    layout = dict(device=args.device, memory_format=torch.channels_last)
    calls = [(conv.to(args.device), torch.empty(shape, **layout).normal_()) for conv, shape in calls]

    @torch.no_grad()
    def run():
        with arithmetic("floor", args.device):
            for conv, x in calls:
                conv._conv_forward(x, conv.weight, conv.bias)  # without the hook

    return run


def synchronize(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure(variants, args, timesteps):
    """variant -> median seconds; the variants take turns."""
    steps = {variant: step(variant, args, timesteps) for variant in variants}
    times = {variant: [] for variant in variants}
    for repeat in range(-args.warmup, args.repeats):
        for variant, run in steps.items():
            synchronize(args.device)
            start = time.perf_counter()
            run()
            synchronize(args.device)
            if repeat >= 0:
                times[variant].append(time.perf_counter() - start)
    return {variant: statistics.median(seconds) for variant, seconds in times.items()}


def peak_memory(variant, args, timesteps):
    """Peak bytes of two steps in a process of their own, the median of some processes."""
    command = [sys.executable, __file__, "--peak", variant, "--timesteps", str(timesteps)]
    for name in ("model", "batch", "device", "image_size", *NEURONS, "weights", "images"):
        command += [f"--{name}", str(getattr(args, name))] if getattr(args, name) is not None else []
    command += ["--inference"] * args.inference
    peaks = []
    for _ in range(args.processes):
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(int(run.stdout.split()[-1]))
    return statistics.median(peaks)


def print_peak(variant, args):
    run = step(variant, args, args.timesteps[0])
    run(), run()
    if args.device.startswith("cuda"):
        print(torch.cuda.max_memory_allocated())
        return
    status = Path("/proc/self/status").read_text()
    print(1024 * int(status.split("VmHWM:")[1].split()[0]))


def machine(device):
    """What the figures depend on, in a line."""
    name = results.hardware("cpu")
    if Path("/proc/cpuinfo").exists():  # the name is of clouds a mere "AMD EPYC"
        info = Path("/proc/cpuinfo").read_text()
        entries = dict(map(str.strip, line.split(":", 1)) for line in info.splitlines() if ":" in line)
        name += "".join(f", {key} {entries[key]}" for key in ("cpu family", "model") if key in entries)
        name += "".join(f", {flag}" for flag in ("avx512_bf16", "amx_bf16") if flag in info)
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name() + "; " + name
    malloc = {key: value for key, value in os.environ.items() if key.startswith(("MALLOC_", "LD_PRELOAD"))}
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    with suppress(metadata.PackageNotFoundError):
        versions += f", spikingjelly {metadata.version('spikingjelly')}"
    allocator = " ".join(f"{k}={v}" for k, v in malloc.items()) or "malloc as the system has it"
    return f"{name}; {os.cpu_count()} cores; {versions}; {allocator}"


def get_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", choices=registry.list_models(), metavar="NAME", default="preresnet.resnet18_lif"
    )
    parser.add_argument("--timesteps", type=int, nargs="+", default=[20])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image_size", type=int, default=32, help="of other networks than vgg.*")
    for name in NEURONS:
        parser.add_argument(f"--{name}", type=float, help="if not the default of the model's program")
    parser.add_argument("--weights", type=Path, help="a checkpoint to measure, in place of a fresh network")
    parser.add_argument("--images", help="a folder of classes to draw the batch from, in place of noise")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1, help="to take the median of peak memory of")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--variants", nargs="+", default=VARIANTS, choices=VARIANTS + GPU_VARIANTS, metavar="NAME"
    )
    parser.add_argument("--inference", action="store_true", help="eval-mode forward passes in place of steps")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--sweep", help="also draw time and memory against T into this picture")
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--peak", choices=VARIANTS + GPU_VARIANTS, help=argparse.SUPPRESS)
    return parser


def draw(rows, args):
    """Time a step and peak memory above the ANN's, against T."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        T = [row["timesteps"] for row in own]
        axes[0].plot(T, [row["seconds"] for row in own], "o-", label=variant)
        if all(row.get("above_ann") is not None for row in own):
            axes[1].plot(T, [row["above_ann"] / 1e6 for row in own], "o-", label=variant)
    axes[0].set(xlabel="time steps T", ylabel="seconds a step", ylim=(0, None))
    axes[1].set(xlabel="time steps T", ylabel="peak memory above the ANN's (MB)", ylim=(0, None))
    axes[0].legend()
    figure.suptitle(f"{args.model}, batch {args.batch}, {args.device}")
    figure.savefig(args.sweep, dpi=120)
    print(f"picture: {args.sweep}")


def main(argv=None):
    args = get_parser().parse_args(argv)
    if args.peak:
        print_peak(args.peak, args)
        return
    variants = [v for v in args.variants if registry.NETWORKS[args.model].ann or not v.startswith("ann")]
    if "peer" in variants:
        try:
            from spikingjelly.activation_based.neuron import DSRIFNode  # noqa: F401
        except ImportError:
            print("no spikingjelly 2 (of Python 3.11): no peer")
            variants.remove("peer")
    print(machine(args.device))
    rows = []
    for T in args.timesteps:
        what = "inference" if args.inference else "training step"
        print(f"\n{args.model}, {what}, T={T}, batch {args.batch}: median of {args.repeats}")
        seconds = measure(variants, args, T)
        memory = {}
        if not args.no_memory:
            memory = {variant: peak_memory(variant, args, T) for variant in variants if variant != "floor"}
        print_firing_rates(args, T)
        print(f"| {'variant':22} | seconds | images/s | x ANN | x peer | x floor | MB above the ANN |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for variant in variants:
            t = seconds[variant]
            above = memory[variant] - memory["ann"] if variant in memory and "ann" in memory else None
            rows.append(
                dict(timesteps=T, variant=variant, seconds=t, peak=memory.get(variant), above_ann=above)
            )
            ann = f"{t / seconds['ann']:5.2f}" if "ann" in seconds else ""
            peer = f"{seconds['peer'] / t:6.2f}" if "peer" in seconds else ""
            base = f"{t / seconds['floor']:6.2f}" if "floor" in seconds else ""
            mb = "" if above is None else f"{above / 1e6:6.0f}"
            figures = f"{t:7.3f} | {args.batch / t:8.1f} | {ann:5} | {peer:6} | {base:7} | {mb:16}"
            print(f"| {variant:22} | {figures} |", flush=True)
    if args.json:
        Path(args.json).write_text(
            json.dumps(dict(machine=machine(args.device), args=vars(args), rows=rows), indent=1, default=str)
        )
    if args.sweep:
        draw(rows, args)


if __name__ == "__main__":
    run_program(main)

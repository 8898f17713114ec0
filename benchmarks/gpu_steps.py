"""A stage of `gpu.py`: time and memory of training steps, one variant after the other."""

import gc
import json
import statistics
import time
from contextlib import suppress

import torch

from benchmarks import step_time

LIF, IF, SMALL = "preresnet.resnet18_lif", "preresnet.resnet18_if", "preresnet.resnet20_lif"
# (model, T, variants), the most wanted first, since the stage's time may not do for all.
STEPS = [
    (LIF, 20, "peer peer-bf16 unrolled unrolled-bf16 dense dense-tf32 dense-bf16 graph-dense-bf16"),
    (LIF, 20, "rate-dense-bf16 graph-ann-bf16 ann ann-tf32 ann-bf16 floor"),
    (LIF, 5, "peer peer-bf16 unrolled unrolled-bf16 dense dense-tf32 dense-bf16 graph-dense-bf16 floor"),
    (LIF, 50, "peer unrolled unrolled-bf16 dense dense-tf32 dense-bf16 graph-dense-bf16 floor"),
    (IF, 20, "peer unrolled-bf16 dense dense-bf16 graph-dense-bf16"),
    (IF, 5, "peer unrolled-bf16 dense dense-bf16 graph-dense-bf16"),
    (LIF, 10, "peer unrolled-bf16 dense dense-bf16 graph-dense-bf16"),
    (IF, 10, "peer dense dense-bf16"),
    (IF, 50, "peer dense dense-bf16"),
    (LIF, 5, "dense-compile dense-bf16-compile"),
    (LIF, 20, "dense-bf16-compile"),
]
SMOKE_STEPS = [(SMALL, 2, "peer unrolled-bf16 dense-tf32 dense-bf16 ann floor")]


def steps(args):
    """Time and memory of a training step: a row for each network, T and variant."""
    rows, known = [], has_peer()
    for model, T, variants in SMOKE_STEPS if args.smoke else STEPS:
        settings = step_time.get_parser().parse_args(["--device", args.device, "--model", model])
        settings.batch = 2 if args.smoke else 128
        for variant in variants.split():
            if known or not variant.startswith("peer"):
                rows.append(dict(model=model, timesteps=T, batch=settings.batch, variant=variant))
                rows[-1] |= measured(variant, settings, T, repeats=2 if args.smoke else 7)
                print(rows[-1])
                save(rows, args.out / "steps.json")
                (args.out / "steps.md").write_text(table(rows))
        draw(rows, args.out / "steps.png")  # here, as the stage may be stopped


def has_peer():
    try:
        from spikingjelly.activation_based.neuron import DSRIFNode  # noqa: F401
    except ImportError:
        print("no spikingjelly 2 (of Python 3.11): no peer")
        return False
    return True


def measured(variant, settings, T, repeats):
    """Median seconds of a step after three, and its peak memory (on a GPU); or what went wrong."""
    gc.collect()
    if settings.device == "cuda":
        torch._C._cuda_clearCublasWorkspaces()  # one for each stream, as of graphs
        with suppress(RuntimeError):  # after a graph whose capture failed
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        run = step_time.step(variant.removeprefix("graph-"), settings, T)
        run = captured(run) if variant.startswith("graph-") else run
        seconds = [timed(run, settings.device) for _ in range(repeats + 3)][3:]
    except RuntimeError as error:  # out of memory, or what a graph cannot hold
        return dict(error=str(error).splitlines()[0][:200])
    found = dict(seconds=statistics.median(seconds), slowest=max(seconds))
    if settings.device == "cuda":
        found["peak_MB"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def timed(run, device):
    step_time.synchronize(device)
    start = time.perf_counter()
    run()
    step_time.synchronize(device)
    return time.perf_counter() - start


def captured(run):
    """The step as a CUDA graph: one launch."""
    before, stream, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    before.wait_stream(stream)
    try:
        with torch.cuda.graph(graph):
            run()
    finally:
        torch.cuda.set_stream(before)  # which a capture that fails leaves behind

    def replay(_step=run):  # keeps the tensors that the graph reads and writes
        graph.replay()

    return replay


def table(rows):
    """The rows as Markdown, with the speed as a multiple of the peer's."""
    peers = {(r["model"], r["timesteps"]): r.get("seconds") for r in rows if r["variant"] == "peer"}
    lines = ["| network | T | variant | ms a step | images/s | x peer | peak MB |", "| --- " * 7 + "|"]
    for row in rows:
        start = f"| {row['model']} | {row['timesteps']} | {row['variant']} |"
        if "error" in row:
            lines.append(f"{start} {row['error']} | | | |")
            continue
        t, peer = row["seconds"], peers.get((row["model"], row["timesteps"]))
        faster = f"{peer / t:.2f}" if peer else ""
        memory = f"{row['peak_MB']:.0f}" if "peak_MB" in row else ""
        lines.append(f"{start} {1000 * t:.1f} | {row['batch'] / t:.0f} | {faster} | {memory} |")
    return "\n".join(lines) + "\n"


def draw(rows, file):
    """Time and memory of a step against T."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("seconds", "peak_MB"), ("s a step", "peak MB")):
        for model, variant in dict.fromkeys((row["model"], row["variant"]) for row in rows):
            own = [r for r in rows if (r["model"], r["variant"]) == (model, variant) and key in r]
            points = sorted((r["timesteps"], r[key]) for r in own)
            axes.plot(*zip(*points), "o-", label=f"{variant} {model[-3:].strip('_')}") if points else None
        axes.set(xlabel="T", ylabel=label, yscale="log")
        axes.legend(fontsize=6, ncols=2)
    figure.savefig(file, dpi=110)


def save(figures, file):
    file.write_text(json.dumps(figures, indent=1) + "\n")

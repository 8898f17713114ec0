"""What `gpu.sh` runs: stages, each in a process of its own, with a time limit, whether or not others fail."""

import argparse
import gc
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import step_time  # noqa: E402
from cifar.program import main as train  # noqa: E402
from utils.data import DATASETS, load_data, train_loader  # noqa: E402

LIF, IF = "preresnet.resnet18_lif", "preresnet.resnet18_if"
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
SMOKE_STEPS = [("preresnet.resnet20_lif", 2, "peer unrolled-bf16 dense-tf32 dense-bf16 ann floor")]
RECIPE = "--timesteps 5 --lr 0.05 --Vth 0.6 --alpha 0.5 --Vth_bound 0.001 --delta_t 0.1 --manualSeed 1"


def machine(args):
    """What all figures depend on; fails where there is no GPU."""
    print(step_time.machine(args.device))
    if args.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        print(subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())
        print(
            "TF32: as torch has it in the tests and the training run; in the steps for -tf32 and -bf16 alone"
        )


def acceptance(args):
    """The tests marked gpu; with --smoke one of them, on the CPU."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--durations=15", "tests/test_gpu.py"]
    chosen = ["-n", "0", "-k", "autocast"] if args.smoke else []
    environment = os.environ | dict(DSR_TEST_DEVICE=args.device)
    subprocess.run([*command, *chosen], cwd=ROOT, env=environment, check=True)


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
    draw(rows, args.out / "steps.png")


def has_peer():
    try:
        import spikingjelly.activation_based.neuron  # noqa: F401
    except ImportError:
        print("spikingjelly is not installed: no peer")
        return False
    return True


def measured(variant, settings, T, repeats):
    """Median seconds of a step after three, and its peak memory (on a GPU); or what went wrong."""
    gc.collect()
    if settings.device == "cuda":
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
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


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


def profile(args):
    """What a step spends its time on, and how many kernels it launches."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    settings = step_time.get_parser().parse_args(["--device", args.device])
    settings.model, settings.batch = (SMOKE_STEPS[0][0], 2) if args.smoke else (LIF, 128)
    cuda, counts = args.device == "cuda", {}
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
    for T, variant in (
        [(2, "dense")] if args.smoke else [(5, "dense-bf16"), (20, "dense-bf16"), (20, "dense")]
    ):
        run = step_time.step(variant, settings, T)
        run(), run()
        step_time.synchronize(args.device)
        with profiled(activities=kinds) as seen:
            run()
            step_time.synchronize(args.device)
        events = seen.events()
        kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        counts[f"{variant} T={T}"] = (
            len(kernels) if cuda else sum(e.name.startswith("aten::") for e in events)
        )
        sort = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        text = seen.key_averages().table(sort_by=sort, row_limit=40, max_name_column_width=70)
        (args.out / f"profile_{variant}_T{T}.txt").write_text(text)
        if cuda:
            seen.export_chrome_trace(str(args.out / f"trace_{variant}_T{T}.json.gz"))
    print(counts)
    save(counts, args.out / "kernels.json")


def loader(args):
    """Images a second that the loader alone delivers, by its number of workers."""
    name, found = dataset(args), {}
    data, batch = load_data(name, args.images), 16 if args.smoke else 128
    for workers in [0] if args.smoke else sorted({1, 4, 8, os.cpu_count()}):
        settings = dict(workers=workers, seed=1, pin_memory=args.device == "cuda")
        batches = train_loader(data.train, batch_size=batch, **settings)
        batches.sampler.start(0)
        images, start = 0, None
        for pictures, _ in batches:
            images += len(pictures) if start else 0
            start = start or time.perf_counter()  # the workers' start apart
            if time.perf_counter() - start > (0.2 if args.smoke else 4):
                break
        found[workers] = images / (time.perf_counter() - start)
        print(f"{name}, {workers} workers: {found[workers]:.0f} images/s")
    save(found, args.out / "loader.json")


def dataset(args):
    """The images given, or else scikit-learn's digits."""
    if (args.images / "train").is_dir() and not args.smoke:
        return "imagefolder"
    print(f"no images used from {args.images}: scikit-learn's digits instead")
    return "digits"


def training(args):
    """Five epochs by the published recipe of T=5; with --smoke, one step."""
    name, model, workers = dataset(args), LIF, min(16, os.cpu_count())
    how = f"--epochs 5 --precision bf16 --pin_memory --workers {workers} --test-batch 500"
    if args.smoke:
        DATASETS["digits"] = SimpleNamespace(**vars(DATASETS["digits"]) | dict(load=few_digits))
        model, how = SMOKE_STEPS[0][0], "--epochs 1 --workers 0 --test-batch 8 --train-batch 8"
    with tempfile.TemporaryDirectory() as folder:  # whose checkpoints are too large to be kept
        flags = f"--dataset {name} --path {args.images} -c {folder} --model {model} --device {args.device}"
        train(f"{flags} {RECIPE} {how}".split(), lr=0.05)
        for ending in (".txt", ".json", ".pdf"):
            shutil.copy(Path(folder, name, model + ending), args.out / f"training{ending}")


def few_digits(*arguments, load=DATASETS["digits"].load, **settings):
    """Eight images to train on and eight to test on."""
    return [torch.utils.data.Subset(part, range(8)) for part in load(*arguments, **settings)]


def save(figures, file):
    file.write_text(json.dumps(figures, indent=1) + "\n")


def run_stage(stage, args):
    """In a process of its own, which prints to a file of its own."""
    os.setsid()  # so that its processes can be ended together
    printed = (args.out / f"{stage.__name__}.txt").open("w", buffering=1)
    os.dup2(printed.fileno(), 1)
    os.dup2(printed.fileno(), 2)
    stage(args)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument(
        "--images", type=Path, default=ROOT / "data/cifar10_jpeg", help="with train/ and test/"
    )
    parser.add_argument("--smoke", action="store_true", help="everything in small, on the CPU")
    args = parser.parse_args()
    args.out, args.images, args.device = (
        args.out.resolve(),
        args.images.resolve(),
        "cpu" if args.smoke else "cuda",
    )
    args.out.mkdir(parents=True, exist_ok=True)
    # Forked processes can use a GPU only if this one never touches it.
    processes, lines = multiprocessing.get_context("fork"), []
    limits = {machine: 20, acceptance: 180, steps: 140, profile: 45, loader: 35, training: 110}
    for stage, limit in limits.items():
        start = time.monotonic()
        process = processes.Process(target=run_stage, args=(stage, args))
        process.start()
        process.join(limit)
        how = "done" if process.exitcode == 0 else f"failed, see {stage.__name__}.txt"
        if process.is_alive():
            how = f"stopped after its {limit} s; what it had measured is kept"
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        lines.append(f"| {stage.__name__} | {how} | {time.monotonic() - start:.0f} |")
        print(lines[-1])
        summarize(args.out, lines)
        if stage is machine and how != "done":
            sys.exit(
                f"error: no GPU can be used here, see {args.out}/machine.txt; --smoke tries all on the CPU"
            )


def summarize(folder, lines):
    """Write summary.md: the machine, the stages, and the tables so far."""
    text = (
        (folder / "machine.txt").read_text() + "\n| stage | | s |\n| --- | --- | --- |\n" + "\n".join(lines)
    )
    for file in ("steps.md", "loader.txt", "training.txt"):
        if (folder / file).exists():
            text += f"\n\n## {file}\n\n{(folder / file).read_text()}"
    (folder / "summary.md").write_text(text)


if __name__ == "__main__":
    main()

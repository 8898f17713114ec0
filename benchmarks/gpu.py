"""What `gpu.sh` runs: stages, each in a process of its own, with a time limit, whether or not others fail."""

import argparse
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import step_time  # noqa: E402
from benchmarks.gpu_steps import LIF, SMALL, save, steps  # noqa: E402
from cifar.program import main as train  # noqa: E402
from utils.data import DATASETS, load_data, train_loader  # noqa: E402

RECIPE = "--timesteps 5 --lr 0.05 --Vth 0.6 --alpha 0.5 --Vth_bound 0.001 --delta_t 0.1 --manualSeed 1"


def machine(args):
    """What all figures depend on; fails where there is no GPU."""
    print(step_time.machine(args.device))
    if args.device == "cuda":
        torch.zeros(1, device="cuda")
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        with suppress(OSError):  # not in every container
            print(subprocess.run(query, capture_output=True, text=True).stdout.strip())
        print(
            "TF32: as torch has it in the tests and the training run; in the steps for -tf32 and -bf16 alone"
        )


def acceptance(args):
    """The tests marked gpu; with --smoke one of them, on the CPU."""
    options = "-m gpu -v --tb=short --durations=15 tests/test_gpu.py"
    command = [sys.executable, "-m", "pytest", *options.split()]
    chosen = ["-n", "0", "-k", "autocast"] if args.smoke else []
    environment = os.environ | dict(DSR_TEST_DEVICE=args.device)
    os.chdir(ROOT)
    os.execve(sys.executable, [*command, *chosen], environment)  # so that pytest itself gets the signal


def profile(args):
    """What a step spends its time on, and how many kernels it launches."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    settings = step_time.get_parser().parse_args(["--device", args.device])
    settings.model, settings.batch = (SMALL, 2) if args.smoke else (LIF, 128)
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
        sort = "self_device_time_total" if cuda else "self_cpu_time_total"
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
        model, how = SMALL, "--epochs 1 --workers 0 --test-batch 8 --train-batch 8"
    with tempfile.TemporaryDirectory() as folder:  # whose checkpoints are too large to be kept
        flags = f"--dataset {name} --model {model} --device {args.device} {RECIPE} {how}"
        try:
            train([*flags.split(), "--path", str(args.images), "-c", folder], lr=0.05)
        finally:
            for ending, to in {".txt": "_log.txt", ".json": ".json", ".pdf": ".pdf"}.items():
                with suppress(OSError):  # of a run that was stopped before
                    shutil.copy(Path(folder, name, model + ending), args.out / f"training{to}")


def few_digits(*arguments, load=DATASETS["digits"].load, **settings):
    """Eight images to train on and eight to test on."""
    return [torch.utils.data.Subset(part, range(8)) for part in load(*arguments, **settings)]


def run_stage(stage, args):
    """In a process of its own, which prints to a file of its own."""
    os.setsid()  # so that its processes can be ended together
    printed = (args.out / f"{stage.__name__}.txt").open("w", buffering=1)
    os.dup2(printed.fileno(), 1)
    os.dup2(printed.fileno(), 2)
    sys.stdout = sys.stderr = printed
    stage(args)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument(
        "--images", type=Path, help="with train/ and test/; data/cifar10_jpeg if it is there, else digits"
    )
    parser.add_argument("--smoke", action="store_true", help="everything in small, on the CPU")
    args = parser.parse_args()
    if args.images and not (args.images / "train").is_dir():
        sys.exit(f"error: no folder {args.images}/train")
    args.images = args.images or ROOT / "data/cifar10_jpeg"
    args.out, args.images, args.device = (
        args.out.resolve(),
        args.images.resolve(),
        "cpu" if args.smoke else "cuda",
    )
    args.out.mkdir(parents=True, exist_ok=True)
    lines = run_stages({machine: 30}, args, [])
    no_gpu = f"no GPU can be used here, see {args.out}/machine.txt; --smoke tries all on the CPU"
    if "| done |" not in lines[0]:
        sys.exit(f"error: {no_gpu}")
    run_stages({acceptance: 170, steps: 130, profile: 45, loader: 30, training: 105}, args, lines)


def run_stages(limits, args, lines):
    """Run each stage for so many seconds at most, and add to the lines of the summary. -> lines"""
    processes = multiprocessing.get_context("fork")  # can use a GPU, as this process never touches it
    for stage, limit in limits.items():
        start = time.monotonic()
        process = processes.Process(target=run_stage, args=(stage, args))
        process.start()
        process.join(limit)
        how = "done" if process.exitcode == 0 else f"failed, see {stage.__name__}.txt"
        if process.is_alive():
            how = f"stopped after its {limit} s; what it had measured is kept"
            os.killpg(process.pid, signal.SIGINT)  # pytest then says what it has found, training saves
            process.join(10)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        lines.append(f"| {stage.__name__} | {how} | {time.monotonic() - start:.0f} |")
        print(lines[-1], flush=True)
        summarize(args.out, lines)
    return lines


def summarize(folder, lines):
    """Write summary.md: the machine, the stages, and the tables so far."""
    text = (
        (folder / "machine.txt").read_text() + "\n| stage | | s |\n| --- | --- | --- |\n" + "\n".join(lines)
    )
    for file in ("steps.md", "loader.txt", "training.txt", "training_log.txt"):
        if (folder / file).exists():
            text += f"\n\n## {file}\n\n{(folder / file).read_text()}"
    (folder / "summary.md").write_text(text)


if __name__ == "__main__":
    main()

"""Kills real runs at random moments, starts them again with --resume auto, and compares what they leave.

    python tests/chaos.py --kills 60 --seed 0

CIFAR, DVS and ImageNet runs on a few images, in one process and in two. Each is the same command every time.
Half of the kills wait for a checkpoint that is being written. With two processes a third of the kills hit
one of them alone, and the launcher has to end the rest. A run that ends is compared with an undisturbed one:
weights, optimizer, best checkpoint and log must be the same, bit for bit, and TensorBoard without gap or
overlap. The exit status is 1 if anything was lost.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

from utils import foreign  # noqa: E402
from utils.cli import UserError  # noqa: E402
from utils.recorder import record, write_aedat  # noqa: E402

LIF = "--Vth 0.3 --alpha 0.3 --delta_t 0.2"
COMMON = "--timesteps 2 --device cpu --warmup 2 --resume auto --save_every 1"
CIFAR = f"--dataset imagefolder --model preresnet.resnet20_lif --manualSeed 1 --train-batch 4 {LIF} {COMMON}"
DVS = f"--dataset CIFAR10DVS --model vgg.vgg11_lif --manualSeed 1 --train-batch 4 --lr 0.05 {LIF} {COMMON}"
IMAGENET = "--arch preresnet_snn.resnet18_if --seed 1 --batch-size 4 --image_size 32 --Vth 1 --lr 0.01"
IMAGENET = f"{IMAGENET} --optimizer SGD --dist-backend gloo {COMMON}"
# name -> (script, processes, flags)
CASES = {
    "cifar": ("cifar/main_single_gpu.py", 1, f"{CIFAR} --epochs 3 --workers 2"),
    "cifar, 2 processes": ("cifar/main_multiple_gpus.py", 2, f"{CIFAR} --epochs 3 --workers 0"),
    "dvs": ("cifar/main_single_gpu.py", 1, f"{DVS} --epochs 2 --workers 0"),
    "dvs, 2 processes": ("cifar/main_multiple_gpus.py", 2, f"{DVS} --epochs 2 --workers 0"),
    "imagenet": ("imagenet/main.py", 1, f"{IMAGENET} --epochs 2 --workers 1"),
    "imagenet, 2 processes": ("imagenet/main.py", 2, f"{IMAGENET} --epochs 2 --workers 0"),
}
COSTS = ("images per second", "seconds an epoch", "peak memory (MB)")  # of the machine, not of the run
HUNG = 120  # seconds; a run takes fewer than ten


class Kill(NamedTuple):
    """What a kill met: `saved` is how far the newest checkpoint was, `drafts` the files half written."""

    case: str
    after: float
    phase: str
    saved: str
    drafts: list
    target: str


def make_data(folder):
    """A few images of noise, and recordings of them, for all of the programs."""
    rng = np.random.default_rng(0)
    for split, first, count in (("train", 0, 5), ("test", 900, 3)):
        for channel, name in ((0, "red"), (2, "blue")):
            for number in range(first, first + count):
                pixels = rng.integers(0, 128, (36, 30, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                path = folder / "images" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
                recording = folder / "recordings" / "events" / name / f"cifar10_{name}_{number}.aedat"
                write_aedat(recording, *record(Image.open(path), seed=number))
    shutil.copytree(folder / "images" / "test", folder / "images" / "val")


def command(case, data, out):
    """The command of a run, the same at every start. A run of DVS builds its frames in its own folder."""
    script, processes, flags = CASES[case]
    path = data / "images"
    if "DVS" in flags:
        path = out / "recordings"
        if not path.exists():
            shutil.copytree(data / "recordings", path)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
    data_flag = "--data" if "imagenet" in script else "--path"
    where = [data_flag, str(path), "--checkpoint", str(out / "checkpoint")]
    return [sys.executable, "-u", *start, str(ROOT / script), *flags.split(), *where]


def start(command, out):
    """The run, in a session of its own; what it prints goes to <out>/output."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    with (out / "output").open("wb") as file:
        settings = dict(stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environment)
        return subprocess.Popen(command, **settings)


def family(pid):
    """The process, its children, theirs and so on: torchrun puts each into a group of its own."""
    found = [pid]
    for parent in found:
        with suppress(OSError):
            for children in Path(f"/proc/{parent}/task").glob("*/children"):
                found += map(int, children.read_text().split())
    return found


def kill(pids):
    """SIGKILL them and wait until they are gone."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in pids:
        with suppress(OSError):  # a dead one whose parent has not looked yet is a zombie: it holds nothing
            while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                time.sleep(0.01)


def drafts(folder):
    """The files below the --checkpoint folder that are being written, and when each was begun."""
    found = {}
    for path in folder.glob("*/*.tmp"):
        with suppress(FileNotFoundError):
            found[path.name] = path.stat().st_mtime_ns
    return found


def has_begun(out):
    return b"data: " in (out / "output").read_bytes()


def wait_for_moment(run, out, rng, span):
    """Sleep until a random moment of the run, or until it ends."""
    begins = time.monotonic()

    def sleep_until(done, step):
        while run.poll() is None and not done() and time.monotonic() - begins < HUNG:
            time.sleep(step)

    kind = rng.choice(["start", *["time"] * 3, *["write"] * 5])
    if kind == "start":
        end = begins + rng.uniform(0, 8)
        sleep_until(lambda: time.monotonic() > end, 0.01)
        return
    sleep_until(lambda: has_begun(out), 0.01)
    if kind == "time":
        end = time.monotonic() + rng.uniform(0, span)
        sleep_until(lambda: time.monotonic() > end, 0.002)
        return
    seen = set(drafts(out / "checkpoint").items())  # of a run that was killed before

    def another_write():
        return any(name.endswith(".pth.tmp") for name, _ in drafts(out / "checkpoint").items() - seen)

    for _ in range(rng.randint(1, 4)):
        sleep_until(another_write, 0.0005)
        seen |= drafts(out / "checkpoint").items()
    time.sleep(rng.choice([0, rng.uniform(0, 0.03)]))


def saved(out):
    """How far the newest checkpoint has come; every file that has its final name must be whole."""
    newest = "nothing"
    for path in sorted((out / "checkpoint").glob("*/*.pth")):
        content = foreign.load(path)
        if not path.stem.endswith(("_best", "_previous")):
            newest = f"epoch {content['epoch']} iteration {content['iteration']}"
    return newest


def kill_once(case, data, out, rng, span):
    """Start the run and kill it at a random moment. -> Kill, or None if it ended before that"""
    before = drafts(out / "checkpoint")
    run = start(command(case, data, out), out)
    begins = time.monotonic()
    wait_for_moment(run, out, rng, span)
    after, pids, target = time.monotonic() - begins, family(run.pid), "all"
    if run.poll() is not None:
        return None
    workers = [pid for pid in pids[1:] if CASES[case][1] == 2 and is_python_worker(pid, run.pid)]
    if workers and rng.random() < 1 / 3:
        target = "one process"
        kill([rng.choice(workers)])
        left = {name for name, begun in drafts(out / "checkpoint").items() if before.get(name) != begun}
        with suppress(subprocess.TimeoutExpired):
            run.wait(timeout=HUNG)
        if run.poll() is None:
            kill(family(run.pid))
            raise UserError(f"{case}: the launcher did not end after one of its processes was killed")
        target += f" (status {run.returncode})"
    else:
        kill(pids)
        left = {name for name, begun in drafts(out / "checkpoint").items() if before.get(name) != begun}
    run.wait()
    phase = "running" if has_begun(out) else "starting"
    return Kill(case, after, phase, saved(out), sorted(left), target)


def is_python_worker(pid, launcher):
    """Whether torchrun started this one itself."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == launcher
    return False


def finish(case, data, out):
    """Let the run end. Raises UserError unless it does, with status 0."""
    run = start(command(case, data, out), out)
    try:
        status = run.wait(timeout=5 * HUNG)
    except subprocess.TimeoutExpired:
        kill(family(run.pid))
        status = "hung"
    if status != 0:
        text = (out / "output").read_text(errors="replace")
        raise UserError(f"{case}: ended with {status}: {text[-2000:]!r}")


def read_curves(folder):
    """TensorBoard's curves but for the speed: name -> [(epoch, value)]."""
    curves = EventAccumulator(str(folder))
    curves.Reload()
    names = [name for name in curves.Tags()["scalars"] if name not in COSTS]
    return {name: [(event.step, event.value) for event in curves.Scalars(name)] for name in names}


def result(log):
    """What a run with this log leaves: log, TensorBoard's curves, each checkpoint's tensors and figures."""
    found = {"log": log.read_text(), "curves": read_curves(log.with_suffix(""))}
    for ending in (".pth", "_best.pth"):
        content = foreign.load(log.with_name(log.stem + ending))
        keys = ["epoch", "iteration", "state_dict", "optimizer", "log", "best_acc", "best_acc1"]
        found[ending] = {key: content[key] for key in keys if key in content}
    return found


def log_of(out):
    (log,) = (out / "checkpoint").glob("*/*.txt")
    return log


def same(a, b):
    """Equal, tensors bit for bit."""
    if torch.is_tensor(a):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def chaos(case, data, folder, kills, rng):
    """Kill runs of `case` so many times in all, letting each end. -> (Kills, runs, problems)"""
    whole = folder / "whole"
    whole.mkdir(parents=True)
    begins = time.monotonic()
    finish(case, data, whole)
    span = (time.monotonic() - begins) / 2  # the other half is the start of Python and torch
    expected, met, problems, runs = result(log_of(whole)), [], [], 0
    while len(met) < kills:
        out = folder / f"run{runs}"
        out.mkdir()
        runs += 1
        try:
            while len(met) < kills and (one := kill_once(case, data, out, rng, span)):
                met.append(one)
                print(describe(len(met), one), flush=True)
            finish(case, data, out)
            left = result(log_of(out))
            different = [key for key in expected if not same(expected[key], left[key])]
            if different:
                problems.append(f"{case}, run {runs}: other {', '.join(different)} in {out}")
        except UserError as error:
            problems.append(f"{case}, run {runs}: {error}")
        if not problems:
            shutil.rmtree(out)
    return met, runs, problems


def describe(number, one):
    half = ", ".join(one.drafts) or "-"
    moment = f"{one.after:6.2f} s, {one.phase}, saved: {one.saved}"
    return f"{one.case:22} {number:3}  {moment:58}  half written: {half:36}  killed: {one.target}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    args = parser.parse_args()
    shares = [
        args.kills // len(args.cases) + (i < args.kills % len(args.cases)) for i in range(len(args.cases))
    ]
    folder, begins = Path(tempfile.mkdtemp(prefix="chaos")), time.monotonic()
    make_data(folder)
    lines, problems, total = [], [], [0] * 5
    for i, (case, kills) in enumerate(zip(args.cases, shares)):
        rng = random.Random(f"{args.seed} {case}")
        met, runs, wrong = chaos(case, folder, folder / str(i), kills, rng)
        problems += wrong
        writing = sum(any(".pth" in name for name in one.drafts) for one in met)
        alone = sum(one.target != "all" for one in met)
        row = [len(met), writing, alone, runs, len(wrong)]
        total = [a + b for a, b in zip(total, row)]
        lines.append((case, *row))
    titles = ("kills", "while a checkpoint was written", "one process alone", "runs", "lost or different")
    print("\n" + f"{'':22}" + "".join(f"{title:>{len(title) + 2}}" for title in titles))
    for case, *row in [*lines, ("all", *total)]:
        print(f"{case:22}" + "".join(f"{n:>{len(title) + 2}}" for n, title in zip(row, titles)))
    print(f"seed {args.seed}, {(time.monotonic() - begins) / 60:.1f} minutes, torch {torch.__version__}")
    if problems:
        sys.exit("\n".join(problems))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()

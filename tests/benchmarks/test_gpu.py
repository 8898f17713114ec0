"""What `benchmarks/gpu.sh` leaves, in small and on the CPU, and what it does when a stage goes wrong."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from benchmarks import gpu, gpu_steps

ROOT = Path(__file__).parents[2]
STAGES = ("machine", "acceptance", "steps", "profile", "loader", "training")


def test_the_smoke_run_leaves_every_table_and_picture(tmp_path):
    environment = os.environ | dict(PYTHON=sys.executable, OMP_NUM_THREADS="1")
    command = [ROOT / "benchmarks/gpu.sh", tmp_path / "out", "--smoke"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=300)
    summary = (tmp_path / "out/summary.md").read_text()
    for stage in STAGES:
        assert f"\n| {stage} | done |" in summary, (tmp_path / f"out/{stage}.txt").read_text()[-2000:]
    rows = {row["variant"]: row for row in json.loads((tmp_path / "out/steps.json").read_text())}
    assert {"unrolled-bf16", "dense-bf16", "ann", "floor"} <= rows.keys()
    assert all(row["slowest"] >= row["seconds"] > 0 for row in rows.values())
    assert f"{1000 * rows['dense-bf16']['seconds']:.1f} |" in summary
    assert " images/s\n" in (tmp_path / "out/training.txt").read_text()
    header, row = (tmp_path / "out/training_log.txt").read_text().splitlines()
    assert header.startswith("Learning Rate\tTrain Loss") and row.startswith("0.050000\t")
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert {"steps.png", "training.pdf", "training.json", "loader.json", "kernels.json"} <= files.keys()
    assert max(files.values()) < 10**6


def fails(args):
    raise RuntimeError("no such luck")


def hangs(args):
    print("so far", flush=True)
    time.sleep(60)


def works(args):
    print("as ever")


def test_a_stage_that_fails_or_hangs_does_not_stop_the_others(tmp_path, capsys):
    args = SimpleNamespace(out=tmp_path)
    (tmp_path / "machine.txt").write_text("a machine\n")
    began = time.monotonic()
    lines = gpu.run_stages({fails: 20, hangs: 1, works: 20}, args, [])
    assert time.monotonic() - began < 40
    assert [line.split(" | ")[1].split(",")[0] for line in lines][::2] == ["failed", "done"]
    assert "| hangs | stopped after its 1 s" in (tmp_path / "summary.md").read_text()
    assert "no such luck" in (tmp_path / "fails.txt").read_text()
    assert (tmp_path / "works.txt").read_text() == "as ever\n"


def test_without_a_gpu_one_line_says_so(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/gpu.py", tmp_path]
    environment = os.environ | dict(CUDA_VISIBLE_DEVICES="")
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: no GPU can be used here, see ") and "--smoke" in line
    # Not "Cannot re-initialize CUDA in forked subprocess": the stages can use a GPU where there is one.
    reason = (tmp_path / "machine.txt").read_text().splitlines()[-1]
    assert "no NVIDIA driver" in reason or "No CUDA GPUs" in reason, reason


def test_the_table_of_steps():
    row = dict(model="m_lif", timesteps=5, batch=10)
    rows = [row | dict(variant="peer", seconds=0.4, peak_MB=300.0), row | dict(variant="dense", seconds=0.1)]
    lines = gpu_steps.table([*rows, row | dict(variant="floor", error="out of memory")]).splitlines()
    assert lines[2] == "| m_lif | 5 | peer | 400.0 | 25 | 1.00 | 300 |"
    assert lines[3] == "| m_lif | 5 | dense | 100.0 | 100 | 4.00 |  |"
    assert lines[4] == "| m_lif | 5 | floor | out of memory | | | |"

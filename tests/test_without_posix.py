"""The programs where fcntl, resource, SIGUSR1 and process groups do not exist, as on Windows."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from utils import foreign

ROOT = Path(__file__).parents[1]
HIDE = """
import multiprocessing, os, signal, sys
sys.modules["fcntl"] = sys.modules["resource"] = None
del signal.SIGUSR1, os.setpgrp
multiprocessing.set_start_method("spawn")
sys.path.insert(0, {root!r})
import reproduce
from cifar import program
from utils.cli import run_program
"""
ROW = "preresnet.resnet20_lif_depth-lif-20_s1_"


def start(code, folder):
    """Python with these modules hidden, running `code`; what it prints goes to <folder>/printed."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    with (folder / "printed").open("a") as printed:
        command = [sys.executable, "-c", HIDE.format(root=str(ROOT)) + code]
        settings = dict(cwd=folder, stdout=printed, stderr=subprocess.STDOUT, env=environment)
        return subprocess.Popen(command, **settings)


def call(program, flags):
    return f"run_program({program}.main, {flags.split()})\n"


def test_trains_stops_by_ctrl_c_resumes_evaluates_and_reports(images, tmp_path):
    data = f"--dataset imagefolder --path {images} --device cpu --timesteps 1 --Vth 0.3 --delta_t 0.2"
    run = f"run depth-lif-20 {data} --train-batch 2 --epochs 4 --save_every 1"
    folder = tmp_path / "checkpoint" / "imagefolder"
    running, deadline = start(call("reproduce", f"{run} --workers 0"), tmp_path), time.monotonic() + 100
    while not list(folder.glob(f"{ROW}*.pth")):
        assert running.poll() is None and time.monotonic() < deadline, (tmp_path / "printed").read_text()
        time.sleep(0.001)
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 128 + signal.SIGINT
    assert "stopped by SIGINT" in (tmp_path / "printed").read_text()
    (file,) = (path for path in folder.glob(f"{ROW}*.pth") if path.with_suffix(".json").exists())
    assert foreign.load(file)["epoch"] < 4
    code = call("reproduce", f"{run} --workers 1")  # a worker that is not forked
    code += call("program", f"{data} --model preresnet.resnet20_lif --evaluate --resume {file} --workers 0")
    code += call("reproduce", f"report {file}") + call("reproduce", "table --out RESULTS.md")
    assert start(code, tmp_path).wait(200) == 0, (tmp_path / "printed").read_text()
    printed = (tmp_path / "printed").read_text()
    assert foreign.load(file)["epoch"] == 4 and len(file.with_suffix(".txt").read_text().splitlines()) == 5
    assert "resumed from" in printed and "test: loss" in printed and "Traceback" not in printed
    assert file.with_name(f"{file.stem}_report.md").is_file()
    assert "| depth-lif-20 | " in (tmp_path / "RESULTS.md").read_text()

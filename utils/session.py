"""A program started as a subprocess, with a record of where it ran, from which commit, by which command."""

import fcntl
import json
import platform
import shlex
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import torch

from utils.checkpoint import make_folder
from utils.cli import UserError, choose_device

ROOT = Path(__file__).resolve().parents[1]


def start(script, argv, *, record, device, command):
    """Run the script to its end; add a session to the JSON file `record`. -> the script's exit status

    The record is locked as long as the script lives, even if this process is killed before it. `command`:
    what the user typed, which is recorded.
    """
    make_folder(record.parent)
    with record.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{record.stem} is running already; wait for it or stop it") from None
        now = datetime.now().isoformat(timespec="seconds")
        session = dict(started=now, hardware=hardware(device), torch=str(torch.__version__), commit=commit())
        sessions = [*read_sessions(record), session | dict(command=shlex.join(command))]
        file.truncate(0)
        file.write(json.dumps(sessions, indent=2) + "\n")
        file.flush()
        print(shlex.join(["python", script, *argv]), flush=True)
        process = subprocess.Popen(
            [sys.executable, "-u", str(ROOT / script), *argv], pass_fds=[file.fileno()]
        )
        # Ctrl-C reaches the program by itself, and a second one would end it without a checkpoint.
        before = {signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None)}
        for number in (signal.SIGTERM, signal.SIGUSR1):
            before[number] = signal.signal(number, lambda number, _: process.send_signal(number))
        try:
            return process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def read_sessions(record):
    """The sessions of a run, the oldest first; none of a run that was started in another way."""
    try:
        return json.loads(record.read_text() or "[]")
    except (OSError, ValueError):
        return []


def hardware(device):
    """The name of the GPU, or of the CPU with the number of threads."""
    device = choose_device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, threads: {torch.get_num_threads()}"


def commit():
    """The checked-out commit; `-dirty` where files differ from it."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

"""Processes forked from the one that runs the tests: to start Python and import torch anew takes seconds."""

import os
import signal
import socket
import sys
import time
import traceback
import warnings
from functools import partial

import pytest
import torch
from torch.distributed import run


def fork(action, output, **environment):
    """Call `action` in a process of its own, which prints to the file `output`. -> its id

    It ends as a program does: a SystemExit with a text prints it and has status 1.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # threads of other tests, which the child does not use
        sys.stdout.flush()
        pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        file = output.open("w", buffering=1)
        sys.stdout = sys.stderr = file
        os.dup2(file.fileno(), 1)  # for what its own children print
        os.dup2(file.fileno(), 2)
        os.environ.update(environment)
        torch.set_num_threads(1)
        action()
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = 1 if isinstance(end.code, str) else end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        file.flush()
        os._exit(status)


def ended(pid, seconds=30):
    """Wait for the process. -> its exit status, or the negative number of the signal that killed it"""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail(f"the process did not end within {seconds} s")


def side_by_side(actions, folder):
    """Call each action in a process of its own, which meet as a launcher's do. -> [(status, printed)]

    If the first fails, the others are asked to end.
    """
    meet = dict(WORLD_SIZE=str(len(actions)), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    started = []
    for rank, action in enumerate(actions):
        output = folder / f"printed_by_{rank}_of_{len(actions)}"
        started.append((fork(action, output, RANK=str(rank), LOCAL_RANK=str(rank), **meet), output))
    results = []
    for pid, output in started:
        if results and results[0][0] != 0:
            os.kill(pid, signal.SIGTERM)
        results.append((ended(pid, 200), output.read_text()))
    return results


def torchrun(argv, output):
    """torchrun in a forked process. -> its id

    Its workers are programs that it starts, not forks: its store answers the first of them in a thread of its
    own meanwhile, whose locks a fork would inherit, and wait for.
    """
    return fork(partial(run.main, argv), output)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

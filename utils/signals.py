"""Signals that ask a run to stop: it finishes its step, writes a checkpoint and ends with 128 + signal."""

import os
import signal
from contextlib import suppress

from utils.distributed import any_process, rank

# A scheduler's kill, Ctrl-C, Slurm's warning; Windows lacks the last.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class StopRequest:
    """While open, notes these signals instead of dying of them; a second SIGINT ends the program at once."""

    def __init__(self):
        self.received = 0

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, _frame):
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if rank() == 0:  # by the system's write: a print may be under way
            with suppress(OSError):  # of `| tee`, which dies of the same Ctrl-C
                os.write(2, b"\nstopping after this step, with a checkpoint; a second Ctrl-C stops at once\n")

    def signal(self):
        """The signal that any process of the run has received, or 0. All must ask at the same points."""
        return any_process(self.received)


def leave_group(_worker):
    """In a worker that loads data: what is sent to all processes is for the run; SIGTERM still ends it."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    for number in set(SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)

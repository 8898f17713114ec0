"""Signals that ask a run to stop: it finishes its step, writes a checkpoint and ends with 128 + signal."""

import signal
from multiprocessing import active_children

from utils.distributed import any_process

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # a scheduler's kill, Ctrl-C, Slurm's warning


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

    def signal(self):
        """The signal that any process of the run has received, or 0. All must ask at the same points."""
        return any_process(self.received)


def ignore_signals(_worker):
    """In a worker that loads data: the run that it works for decides when to stop."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def kill_workers():
    """At the end of the program: Python would send SIGTERM, which they ignore, and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where torch would complain
    for worker in active_children():
        worker.kill()

"""The command line that the programs share: errors in one line, flags in groups, presets, the device."""

import argparse
import difflib
import math
import os
import re
import shlex
import signal
import sys
import time
import unicodedata
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch


class UserError(Exception):
    """Something that the user can mend. The text is one line: what is wrong and what to do."""

    def __str__(self):
        # A data loader's worker wraps its exception's text into a traceback, of which the last line counts.
        return super().__str__().strip().splitlines()[-1].removeprefix("utils.cli.UserError: ")


class Stopped(Exception):  # noqa: N818  (nothing is wrong)
    """The run was asked to stop by the signal that is its argument, and has saved its state."""


def require(condition, message):
    """Raise UserError with this line unless the condition holds."""
    if not condition:
        raise UserError(message)


def refuse(what, wrong):
    """Raise UserError with the first three of what is `wrong`, if anything is."""
    if wrong:
        raise UserError(f"{what}: {few(wrong)}")


def few(names):
    """The first three of a list, in words."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def is_line(text):
    """Whether a line can show the text as it is: no control characters, line ends or changes of direction."""
    turns = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    kinds = {unicodedata.category(c) for c in text}, {unicodedata.bidirectional(c) for c in text}
    return kinds[0].isdisjoint(("Cc", "Cs", "Zl", "Zp")) and kinds[1].isdisjoint(turns)


def unknown(what, name, known):
    """One line about a name that is none of those `known`: which come near to it, or all."""
    near = [one for one in known if name and name in one]
    near = near if 0 < len(near) < 4 else difflib.get_close_matches(name, known)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from: {', '.join(known)}"
    return f"unknown {what} {name!r}; {hint}"


@contextmanager
def explained(explain, *kinds):
    """Within, an exception of these `kinds` (by default any other) becomes UserError(explain(reason))."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, kinds or Exception) or isinstance(error, UserError) and not kinds:
            raise
        lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
        missing = "no entry " if isinstance(error, KeyError) else ""
        reason = missing + lines[0][:200] if lines else type(error).__name__
        if reason.startswith("Weights only"):  # torch advises to run the code that the file holds
            reason = "not what torch.save writes of tensors, numbers and text"
        raise UserError(explain(reason)) from None


def run_program(main, argv=None):
    """Call `main(argv)`; a UserError or a signal ends the program with one line and a non-zero status."""
    rank = os.environ.get("RANK", "0")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name of a file need not be text
    try:
        main(argv)
    except UserError as error:
        if rank != "0":
            time.sleep(10)  # rank 0 speaks for all: the launcher has ended this process by now, if it did
        sys.exit(f"error: {error}" if rank == "0" else f"error: process {rank}: {error}")
    except (OSError, MemoryError, RuntimeError) as error:  # a full disk, a name too long, a network too large
        text = str(error) or "out of memory"
        if "RANK" in os.environ and re.search("Connection (closed|reset) by peer", text):
            sys.exit("error: another process of this run has ended; its own message says why")
        shared = "out of shared memory|allocate shared memory|file </torch_"
        known = re.search(f".*(out of memory|[Cc]an(?:'t|not) allocate memory|({shared})).*", text)
        if isinstance(error, RuntimeError) and not known:
            raise
        hint = "; enlarge /dev/shm, or say --workers 0" if known and known[2] else ""
        # of a data loader's worker the text is a traceback
        sys.exit(f"error: {known[0] if known else text.strip().splitlines()[-1]}{hint}")
    except Stopped as stopped:
        name = signal.Signals(stopped.args[0]).name
        warn(f"stopped by {name}; --resume auto goes on from the checkpoint")
        sys.exit(128 + stopped.args[0])
    except KeyboardInterrupt:
        with suppress(OSError):
            print("\ninterrupted; --resume auto goes on with training from its checkpoint", file=sys.stderr)
        sys.exit(130)


def warn(message):
    """One line on stderr, from rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # a pipe that nobody reads any more
            print(f"warning: {message}", file=sys.stderr)


class Preset(NamedTuple):
    """A named set of flags; of a row of the paper the accuracy there, and the cost in PMAC."""

    paper: str
    cost: str
    flags: str


def read_presets(page):
    """The tables `name | paper | PMAC | flags` of a Markdown page, each as name -> Preset."""
    tables = re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE)
    row = re.compile(r"^\| (\S+) \| (.*?) \| (.*?) \| `(.*)` \|$", re.MULTILINE)
    return [{name: Preset(*cells) for name, *cells in row.findall(table)} for table in tables]


class Formatter(argparse.RawDescriptionHelpFormatter):
    """With the default of every flag that has one."""

    def _get_help_string(self, action):
        without = not action.option_strings or str(action.default) in ("None", "", "False", argparse.SUPPRESS)
        return action.help if without or not action.help else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argument parser with presets; `fixed` are the flags that a run which goes on must keep."""

    def __init__(self, presets, **settings):
        super().__init__(formatter_class=Formatter, allow_abbrev=False, **settings)
        self.presets, self.fixed = presets, []
        if presets:
            text = "named set of flags, such as a row of the paper; `python reproduce.py list` shows them"
            self.add_argument("--preset", metavar="NAME", help=text)

    def group(self, title, may_change=False):
        """A function that adds flags to a new group of --help; `may_change`: even in a resumed run."""
        group = self.add_argument_group(title)

        def add(*flags, may_change=may_change, **settings):
            name = group.add_argument(*flags, **settings).dest
            self.fixed += [] if may_change else [name]

        return add

    def error(self, message):
        choice = re.fullmatch(r"argument (?:.*/)?(.*): invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice:
            message = unknown(choice[1], choice[2], re.findall(r"[^', ]+", choice[3]))
        self.exit(2, f"error: {message}{'' if message.endswith('?') else ';'} --help lists the flags\n")

    def parse(self, argv=None):
        """Command line before preset before default."""
        argv = sys.argv[1:] if argv is None else argv
        name = getattr(self.parse_known_args(argv)[0], "preset", None)
        require(name in (None, *self.presets), unknown("preset", name or "", self.presets))
        return self.parse_args([*shlex.split(self.presets[name].flags if name else ""), *argv])


def number(kind, low, *, open_low=False, high=None):
    """An argparse type: an int or float in [low, high], or in (low, high] with `open_low`."""
    high = high or (2**31 - 1 if kind is int else 1e30)  # what 32 bits hold, with room for a product
    noun = "whole number" if kind is int else "number"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if open_low else low <= value) or not value <= high:
            bound = f"{'above' if open_low else 'at least'} {low} and at most {high}"
            raise argparse.ArgumentTypeError(f"must be a {noun} {bound}, not {text!r}")
        return value

    return parse


def choose_device(text):
    """`auto`, `cpu`, `cuda` or `cuda:N` -> torch.device."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    known, found = re.fullmatch(r"cpu|cuda(:(0|[1-9]\d?))?", text, re.ASCII), torch.cuda.device_count()
    require(known, f"unknown --device {text!r}; choose from: auto, cpu, cuda, cuda:N")
    lacking = f"--device {text}: this machine has {found} CUDA devices; use --device cpu or auto"
    require(text == "cpu" or int(known[2] or 0) < found, lacking)
    return torch.device(text)

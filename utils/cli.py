"""The command line that the programs share: errors in one line, checked numbers, presets, the device."""

import argparse
import math
import os
import signal
import sys
import time

import torch


class UserError(Exception):
    """Something that the user can mend. The text is one line: what is wrong and what to do."""

    def __str__(self):
        # A data loader's worker wraps its exception's text into a traceback, of which the last line counts.
        return super().__str__().strip().splitlines()[-1].removeprefix("utils.cli.UserError: ")


class Stopped(Exception):  # noqa: N818  (nothing is wrong)
    """The run was asked to stop by `signal` and has saved its state."""

    def __init__(self, number):
        super().__init__(number)
        self.signal = number


def run_program(main, argv=None):
    """Call `main(argv)`; a UserError or a signal ends the program with one line and a non-zero status."""
    try:
        main(argv)
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)  # rank 0 speaks for all: the launcher has ended this process by now, if it did
            sys.exit(f"error: process {os.environ['RANK']}: {error}")
        sys.exit(f"error: {error}")
    except (OSError, MemoryError, RuntimeError) as error:  # a full disk, a name too long, a network too large
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        sys.exit(f"error: {(str(error).splitlines() or ['out of memory'])[0]}")
    except Stopped as stopped:
        warn(f"stopped by {signal.Signals(stopped.signal).name}; --resume auto goes on from the checkpoint")
        sys.exit(128 + stopped.signal)
    except KeyboardInterrupt:
        print("\ninterrupted; --resume auto goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def is_out_of_memory(error):
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def warn(message):
    """One line on stderr, from rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """An argument parser with presets, whose complaints are one line."""

    def __init__(self, presets, **settings):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)
        self.presets = presets
        if presets:
            self.add_argument("--preset", help="named set of defaults: " + ", ".join(presets))

    def error(self, message):
        self.exit(2, f"error: {message}; --help lists the flags\n")

    def parse(self, argv=None):
        """Command line before preset before default."""
        name = getattr(self.parse_known_args(argv)[0], "preset", None)
        if name is not None and name not in self.presets:
            raise UserError(f"unknown preset {name!r}; choose from: {', '.join(self.presets)}")
        self.set_defaults(**self.presets.get(name, {}))
        return self.parse_args(argv)


def number(kind, low, *, open_low=False, high=None):
    """An argparse type: an int or float in [low, high], or in (low, high] with `open_low`.

    By default `high` is what 32 bits hold, with room for a product.
    """
    high = high or (2**31 - 1 if kind is int else 1e30)
    bound = f"{'above' if open_low else 'at least'} {low} and at most {high}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if open_low else low <= value) or not value <= high:
            noun = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a {noun} {bound}, not {text!r}")
        return value

    return parse


def choose_device(text):
    """`auto`, `cpu`, `cuda` or `cuda:N` -> torch.device."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise UserError(f"unknown --device {text!r}; choose from: auto, cpu, cuda, cuda:N")
    found = torch.cuda.device_count() if kind == "cuda" else 1
    if int(index or 0) >= found:
        raise UserError(f"--device {text}: this machine has {found} CUDA devices; use --device cpu or auto")
    return torch.device(text)

"""One checkpoint format, written whole or not at all, read without running code."""

import json
import os
import shutil
import tempfile
import zipfile
from contextlib import suppress
from math import inf
from pathlib import Path

import torch

from utils.cli import UserError, warn


def make_folder(folder, flag="--checkpoint"):
    """Make sure that files can be written to `folder`, which `flag` chooses, or raise UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = f"cannot write to {folder} ({error.strerror})"
        raise UserError(f"{reason}; choose another {flag}") from None


def save(content, path, previous=None, write=torch.save):
    """Write `content` to `path`: a reader finds the old file or the new one, never a part of one.

    The old one is kept as `previous`, if that is given.
    """
    draft = path.with_name(path.name + ".tmp")
    try:
        with draft.open("wb") as file:
            write(content, file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            previous.unlink(missing_ok=True)
            keep(path, previous)
        draft.replace(path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            draft.unlink()
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot write {path} ({reason}); free some space, then go on with --resume auto"
        ) from None


def keep(path, copy):
    """Give a file a second name, or a copy where the file system has no such thing."""
    try:
        os.link(path, copy)
    except OSError:
        shutil.copyfile(path, copy)


def sync_folder(folder):
    """Put the folder's new names on the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def save_text(text, path):
    """Write a text file, whole or not at all."""
    save(text, path, write=lambda text, file: file.write(text.encode()))


def find(name, folder):
    """The file called `name` in `folder`, else at the path `name`."""
    for path in (Path(folder, name), Path(name)):
        with suppress(OSError):  # a name that is too long
            if path.is_file():
                return path
    raise UserError(f"no file {name}, neither in {folder} nor as a path")


def read(path):
    """What torch.save wrote to `path`, on the CPU, without running code; UserError unless it is whole."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.load reads flipped bits without a word
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    raise ValueError("its entries claim more bytes than it has")
                if archive.testzip() is not None:
                    raise ValueError("checksum error")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not all(map(is_dense, tensors(content))):
            raise ValueError("a tensor claims more elements than are stored")
    except Exception as error:  # a damaged or foreign file can fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{path} is damaged or not a checkpoint ({reason}); give another file") from None
    return content


def tensors(content):
    """The tensors in nested dicts, lists and tuples."""
    if torch.is_tensor(content):
        yield content
    elif isinstance(content, (dict, list, tuple)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from tensors(value)


def is_dense(tensor):
    """Whether every element has a place of its own; a stride of 0 makes terabytes of a few bytes."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def is_named(content):
    """Whether this is a dict of which every key is a name that can be printed."""
    return isinstance(content, dict) and all(
        isinstance(key, str) and key.isprintable() and len(key) < 200 for key in content
    )


def load(path):
    """The checkpoint in `path`, on the CPU; raises UserError unless it is a whole one."""
    content = read(path)
    if not isinstance(content, dict) or not is_named(content.get("state_dict")):
        raise UserError(f"{path} is not a checkpoint: it holds no state_dict; give another file")
    return content


def resume(name, files):
    """The checkpoint that `--resume NAME` asks for and where it lay; (None, None) for a fresh start.

    NAME is a file, in the folder of `files` or a path, or `auto`: the newest whole checkpoint of this run, if
    any.
    """
    if name == "auto":
        for path in filter(Path.is_file, (files.checkpoint, files.previous, files.best)):
            try:
                content = load_run(path, files.accuracy)
            except UserError as error:
                warn(error)
                continue
            if started(files.arguments) in (None, content["args"].get("started")):
                return content, path
        print("no checkpoint of this run yet: starting afresh")
        return None, None
    path = find(name, files.folder) if name else None
    return (load_run(path, files.accuracy), path) if path else (None, None)


def started(arguments_file):
    """When the run of these arguments began, or None: tells its checkpoints from an earlier run's."""
    try:
        return json.loads(arguments_file.read_text()).get("started")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def load_run(path, accuracy):
    """The checkpoint in `path`, which must say how far its run had come, its best as `best_<accuracy>`."""
    content = load(path)
    try:
        content["best_acc"] = float(content[f"best_{accuracy}"])  # a number or a tensor of one element
        content["epoch"], content["iteration"] = int(content["epoch"]), int(content.get("iteration", 0))
        if not all(0 <= content[key] < 2**31 for key in ("epoch", "iteration")):
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError):
        raise UserError(
            f"{path} lacks epoch or best_{accuracy}, so no run can go on from it; give another file"
        ) from None
    if not isinstance(content.get("args"), dict):  # an official one holds no arguments
        content["args"] = {}
    args, rows, sums = content["args"], content.get("log", []), content.get("sums", [0.0] * 4)
    seed = args.get("manualSeed", 0)
    if not (
        all(is_plain(value) for value in (content.get("arch"), *args.values()))
        and (isinstance(seed, int) and seed >= 0)
        and (isinstance(rows, list) and all(is_row(row, 5) for row in rows) and is_row(sums, 4))
    ):
        raise UserError(f"{path} has arguments or a log that no run writes; give another file")
    return content


def is_plain(value):
    """Whether a command line can give it."""
    return value is None or isinstance(value, (str, float)) or isinstance(value, int) and abs(value) < 2**63


def is_row(row, n):
    """Whether these are n numbers that can be drawn."""
    return (
        isinstance(row, list)
        and len(row) == n
        and all(isinstance(x, (int, float)) and not 1e30 < abs(x) < inf for x in row)
    )


def load_weights(model, state_dict, path, optional=()):
    """Copy published or own weights, keys with or without `module.`, into `model`; refuse misfits.

    Keys whose last part is `optional` may be missing.
    """
    given = {key.removeprefix("module."): value for key, value in state_dict.items()}
    own = model.state_dict()
    wrong = [
        f"{key} is {list(getattr(given[key], 'shape', '?'))} instead of {list(own[key].shape)}"
        for key in given.keys() & own.keys()
        if getattr(given[key], "shape", None) != own[key].shape
    ]
    if not wrong:
        try:
            missing, unexpected = model.load_state_dict(given, strict=False)
        except RuntimeError as error:  # values of a kind that cannot be copied
            raise UserError(
                f"{path} does not fit this model: {str(error).splitlines()[-1].strip()}"
            ) from None
        missing = [key for key in missing if key.rpartition(".")[2] not in optional]
        wrong = [f"{key} is missing" for key in missing] + [f"{key} is unknown" for key in unexpected]
    if wrong:
        wrong = sorted(wrong)
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{path} does not fit this model and number of classes: {', '.join(wrong[:3])}{more}")

"""One checkpoint format, written whole or not at all, and where a run finds the one to go on from."""

import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import torch

from utils.cli import UserError, explained, refuse, warn
from utils.foreign import load_run

# The networks that come trained.
PRETRAINED = Path(__file__).resolve().parents[1] / "checkpoint" / "pretrained"


def make_folder(folder, flag="--checkpoint"):
    """Make sure that files can be written to `folder`, which `flag` chooses, or raise UserError."""
    with explained(lambda why: f"cannot write to {folder} ({why}); choose another {flag}", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def save(content, path, previous=None, write=torch.save):
    """Write `content`: a reader finds the old file or the new one, never a part; `previous` keeps the old."""
    draft = path.with_name(path.name + ".tmp")
    advice = "make room or choose another place; a run then goes on by --resume auto"
    with explained(lambda why: f"cannot write {path} ({why}); {advice}", OSError, RuntimeError):
        try:
            with draft.open("wb") as file:
                write(content, file)
                file.flush()
                os.fsync(file.fileno())
            if previous and path.exists():
                previous.unlink(missing_ok=True)
                try:
                    os.link(path, previous)
                except OSError:  # a file system without second names
                    shutil.copyfile(path, previous)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)  # of a write that failed
        if os.name == "posix":  # put the new names on the disk as well
            folder = os.open(path.parent, os.O_RDONLY)
            with suppress(OSError):  # not every file system can
                os.fsync(folder)
            os.close(folder)


def save_text(text, path):
    """Write a text file, whole or not at all."""
    save(text, path, write=lambda text, file: file.write(text.encode(errors="backslashreplace")))


def find(name, folder):
    """The file called `name` in `folder`, else at the path `name`, else the network that comes trained."""
    for path in (Path(folder, name), Path(name), PRETRAINED / f"{name}.pth"):
        with suppress(OSError):  # a name that is too long
            if path.is_file():
                return path
    raise UserError(f"no file {name}, neither in {folder} nor as a path")


def resume(name, files):
    """The checkpoint that `--resume NAME` asks for and where it lay; (None, None) for a fresh start.

    `auto` asks for the newest whole checkpoint of this run, if any.
    """
    if name != "auto":
        if not name:
            return None, None
        path = find(name, files.folder)  # this run's own by whatever name
        path = next((own for own in files.checkpoints if own.is_file() and own.samefile(path)), path)
        return load_run(path, files.accuracy), path
    for path in filter(Path.is_file, files.checkpoints):
        try:
            content = load_run(path, files.accuracy)
        except UserError as error:
            warn(error)
            continue
        if read_arguments(files.arguments).get("started") in (None, content["args"].get("started")):
            return content, path
    print("no checkpoint of this run yet: starting afresh")
    return None, None


def read_arguments(file):
    """The arguments of a run, its start among them; {} without such a file, or if it is damaged."""
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def compare_classes(content, data, path):
    """Warn if the data set's classes are not those of the checkpoint: a label then means another thing."""
    before, now = content.get("classes"), [str(name) for name in getattr(data, "classes", [])]
    if now and isinstance(before, list) and before != now:
        first = next((pair for pair in zip(before, now) if pair[0] != pair[1]), (len(before), len(now)))
        warn(f"{path} was trained on other class names than those here: {first[0]}, now {first[1]}")


def load_weights(model, state_dict, path, optional=(), classes=None):
    """Copy weights, keys with or without `module.`, into `model`; refuse misfits but for `optional` names.

    classes: their number here; what is of another number of them starts afresh, with a warning.
    """
    given, own = {key.removeprefix("module."): x for key, x in state_dict.items()}, model.state_dict()
    shapes = {key: getattr(given[key], "shape", "?") for key in own.keys() & given.keys()}
    shapes = {key: shape for key, shape in shapes.items() if shape != own[key].shape}
    of_classes = {key: own[key] for key in shapes if own[key].shape[:1] == (classes,)}
    fresh = {key: x for key, x in of_classes.items() if x.shape[1:] == shapes[key][1:]}
    if layers := ", ".join(sorted({key.rpartition(".")[0] for key in fresh})):
        warn(f"{path} is of another number of classes, not {classes}: {layers} start afresh")
    given, misfits = given | fresh, shapes.keys() - fresh
    wrong = [f"{key} is {list(shapes[key])} instead of {list(own[key].shape)}" for key in misfits]
    if not wrong:
        with explained(lambda why: f"{path} does not fit this model: {why}"):  # values that cannot be copied
            missing, unknown = model.load_state_dict(given, strict=False)
        wrong = [f"{key} is missing" for key in missing if key.rpartition(".")[2] not in optional]
        wrong += [f"{key} is unknown" for key in unknown]
    refuse(f"{path} does not fit this model and number of classes", sorted(wrong))

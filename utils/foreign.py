"""Files that anybody may have written: read without running code, and refused in one line unless they fit."""

import math
import zipfile

import numpy as np
import torch

from utils.cli import explained, is_line, refuse, require


def read(path):
    """What torch.save wrote to `path`, on the CPU, without running code; UserError unless it is whole."""
    with explained(lambda why: f"{path} is damaged or not a checkpoint ({why}); give another file"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.load reads flipped bits without a word
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    raise ValueError("its entries claim more bytes than it has")
                if archive.testzip() is not None:
                    raise ValueError("checksum error")
        content = torch.load(path, map_location="cpu", weights_only=True)
        inspect(content)
    return content


def inspect(content):
    """ValueError for a tensor without its memory or a name that is no short line, in dicts, lists, tuples."""
    if torch.is_tensor(content):
        claimed = content.numel() * content.element_size()  # a stride of 0 makes terabytes of a few bytes
        if content.layout != torch.strided or content.is_meta or claimed > content.untyped_storage().nbytes():
            raise ValueError("a tensor claims more elements than are stored")
    elif isinstance(content, (dict, list, tuple)):
        names = content if isinstance(content, dict) else ()
        if not all(is_plain(name) and len(str(name)) < 200 for name in names):
            raise ValueError("a name that cannot be printed")
        for value in content.values() if names else content:
            inspect(value)


def is_plain(x):
    """Whether a command line can give it, and a line can show it; or it is a table of such (thresholds)."""
    text = isinstance(x, str) and is_line(x)
    table = isinstance(x, dict) and all(map(is_plain, x.values()))
    return x is None or text or table or isinstance(x, float) or isinstance(x, int) and abs(x) < 2**63


def load(path):
    """The checkpoint in `path`, on the CPU; raises UserError unless it is a whole one."""
    content = read(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    named = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    require(named, f"{path} is not a checkpoint: it holds no state_dict; give another file")
    return content


def load_run(path, accuracy):
    """The checkpoint in `path`, which must say how far its run had come, its best as `best_<accuracy>`."""
    content = load(path)
    lacking = f"{path} lacks epoch or best_{accuracy}, so no run can go on from it; give another file"
    with explained(lambda _: lacking):
        content["best_acc"] = float(content[f"best_{accuracy}"])  # a number or a tensor of one element
        content["epoch"], content["iteration"] = int(content["epoch"]), int(content.get("iteration", 0))
        require(all(0 <= content[key] < 2**31 for key in ("epoch", "iteration")), lacking)
    content["args"] = args if isinstance(args := content.get("args"), dict) else {}  # official ones have none
    with explained(lambda _: f"{path} has arguments or a log that no run writes; give another file"):
        seed, values = content["args"].get("manualSeed", 0), [content.get("arch"), *content["args"].values()]
        if not (all(map(is_plain, values)) and isinstance(seed, int) and seed >= 0):
            raise ValueError
        if "log" in content:
            content["log"] = numbers(content["log"], 5)
        if "sums" in content:
            (content["sums"],) = numbers([content["sums"]], 4)
    return content


def numbers(rows, n):
    """Rows of n numbers as lists of floats that can be drawn; ValueError or TypeError for anything else."""
    table = np.asarray(rows, dtype=np.float64)
    if len(table) and table.shape[1:] != (n,) or ((abs(table) > 1e30) & (abs(table) < math.inf)).any():
        raise ValueError(f"a row without {n} numbers")
    return table.tolist()


def read_log(path):
    """The rows of a log: [learning rate, training loss, test loss, training accuracy, test accuracy]."""
    with explained(lambda why: f"the log {path} is damaged ({why}); mend it or move it away"):
        return numbers([line.split() for line in path.read_text().splitlines()[1:]], 5)


def read_thresholds(path, layers):
    """Layer -> threshold, from a file of just these layers; official ones, with 1-tuples of a tensor, too."""
    content = read(path)
    require(isinstance(content, dict), f"{path} holds no thresholds; write them by --calculate_Vth")
    values = {name: number(content[name]) for name in layers if name in content}
    wrong = [f"{name} is missing" for name in layers if name not in content]
    wrong += [f"{str(name)[:60]} is unknown" for name in content if name not in layers]
    wrong += [f"{name} is no positive number" for name, value in values.items() if not 0 < value < 1e30]
    refuse(f"the thresholds in {path} do not fit this model", wrong)
    return values


def number(value):
    """A float from a number, a tensor of one element or a 1-tuple of it; NaN for anything else."""
    value = value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value
    try:
        return math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # nothing, too large, or complex
        return math.nan


def check_optimizer(optimizer):
    """ValueError unless each parameter's state is that of SGD with momentum or of Adam, or empty."""
    names = ("exp_avg", "exp_avg_sq", "step") if "betas" in optimizer.defaults else ("momentum_buffer",)
    for parameter, state in optimizer.state.items():
        for name in names if state else ():
            value, shape = state[name], torch.Size() if name == "step" else parameter.shape
            lacking = value is None and name == "momentum_buffer"  # of a run without momentum
            if not lacking and (value.shape != shape or not value.is_floating_point()):
                raise ValueError(f"a {name} of shape {list(value.shape)}, not {list(shape)}")

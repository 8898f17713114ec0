"""Damaged, foreign and malicious files, and random command lines: each ends well or in one clear line.

    python tests/fuzz.py --files 2000 --lines 300 --seed 0

Checkpoints, threshold files, images, recordings, frames, logs and argument files are random bytes, mutated
valid files, files whose entries are replaced by absurd values, and pickles with a payload. They go to the
functions that read them; a part goes through the programs. What counts as a defect: an exception other than
UserError, a message of more than a line, more than 30 s, a payload that ran.
"""

import argparse
import io
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed.run  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision import transforms  # noqa: E402

import cifar.program  # noqa: E402
import imagenet.main  # noqa: E402
import utils.training  # noqa: E402
from models import create_model  # noqa: E402
from utils import checkpoint, foreign  # noqa: E402
from utils.cli import UserError, run_program  # noqa: E402
from utils.data import read_image  # noqa: E402
from utils.events import build_one, read_frames  # noqa: E402
from utils.foreign import read_log  # noqa: E402
from utils.recipe import load_optimizer, make_optimizer  # noqa: E402
from utils.recorder import write_aedat  # noqa: E402
from utils.records import Recorder, RunFiles  # noqa: E402
from utils.statistics import neuron_layers, threshold_name  # noqa: E402
from utils.thresholds import load_thresholds  # noqa: E402

LIMIT = 30  # seconds
CIFAR_MODEL, IMAGENET_MODEL = "preresnet.resnet20_lif", "preresnet_snn.resnet18_if"
RECIPE = dict(lr=0.1, momentum=0.9, weight_decay=0.0)


class Hung(BaseException):  # noqa: N818  (no `except Exception` may swallow it)
    pass


class StepDone(BaseException):  # noqa: N818
    """A run that has done a step is right: it need not end."""


def attempt(action, *args):
    """Call it for at most 30 s. -> (what came of it, the defect or None)"""

    def stop(*_):
        raise Hung

    out, before = io.StringIO(), signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        with redirect_stdout(out), redirect_stderr(out), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action(*args)
        outcome, message = "fine", None
    except StepDone:
        outcome, message = "a step", None
    except UserError as error:
        outcome, message = "one line", error.args[0] if isinstance(error.args[0], str) else str(error)
    except SystemExit as end:
        outcome = "one line" if end.code else "fine"
        message = end.code if isinstance(end.code, str) else out.getvalue().strip() if end.code else None
        if isinstance(end.code, int) and end.code not in (0, 2):
            return "status", f"status {end.code}"
        if message and not message.splitlines()[-1].startswith("error: "):
            return "no error", message
        message = message and message.splitlines()[-1] if end.code == 2 else message
    except Hung:
        return "hung", "".join(traceback.format_exc().splitlines(True)[-9:])
    except BaseException:
        return "traceback", traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if message is not None and not (message.strip() and len(message.splitlines()) == 1):
        return "unclear", f"the message is {message[:300]!r}"
    return outcome, "a traceback in the output" if "Traceback" in out.getvalue() else None


# Contents.


def mutate(content, rng):
    """Bytes like `content`, with one to three mishaps."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 3])):
        n = max(len(content), 1)
        at, length = rng.randrange(n), rng.choice([1, 1, 2, 4, 8, 64, 4096])
        kind = rng.choice(
            ["flip", "flip", "flip", "cut", "zero", "ones", "insert", "remove", "copy", "noise"]
        )
        if kind == "flip" and content:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del content[at:]
        elif kind == "zero":
            content[at : at + length] = bytes(length)
        elif kind == "ones":
            content[at : at + length] = b"\xff" * length
        elif kind == "insert":
            content[at:at] = rng.randbytes(length)
        elif kind == "remove":
            del content[at : at + length]
        elif kind == "copy":
            source = rng.randrange(n)
            content[at:at] = content[source : source + length]
        elif kind == "noise":
            content[at : at + length] = rng.randbytes(length)
    return bytes(content)


def noise(content, rng):
    """Random bytes, at times behind the first ones of `content`."""
    return content[: rng.choice([0, 0, 2, 8, 64])] + rng.randbytes(rng.choice([0, 1, 10, 1000, 20000]))


def absurd_values():
    """What no program ever saves, and weights_only lets through."""
    nested = []
    for _ in range(200):
        nested = [nested]
    one = torch.ones(1)
    values = [
        None,
        "",
        "x" * 100_000,
        "two\nlines",
        "../../x",
        -1,
        0,
        2**63,
        10**400,
        10**6000,
        -(10**30),
        True,
    ]
    values += [float("nan"), float("inf"), -float("inf"), 1e308, 1e-320, b"bytes", [], {}, (), set(), nested]
    values += [one.expand(10**12), one.double().expand(10**12), torch.empty(0), torch.empty(0, 10**15)]
    values += [torch.tensor(1j), torch.tensor([float("nan")]), torch.tensor(1e300, dtype=torch.float64)]
    values += [torch.tensor(True), torch.tensor(2**62), torch.ones(2, 2).to_sparse(), torch.ones(1, 1, 1, 1)]
    values += [torch.empty(3, device="meta"), torch.tensor(7, dtype=torch.uint8), torch.ones(2, 3), [1, "a"]]
    values += [{1: 2}, {"a": one}, [one], (one,), (one, one), "1", torch.float16, torch.Size([1])]
    return values


def distort(content, rng, depth=0):
    """A copy of nested dicts and lists in which one entry is absurd, missing, new or renamed."""
    if not isinstance(content, (dict, list)) or not content or depth and rng.random() < 0.3:
        return rng.choice(absurd_values())
    content = content.copy()
    key = rng.choice(list(content)) if isinstance(content, dict) else rng.randrange(len(content))
    kind = rng.choice(["deeper", "deeper", "deeper", "value", "missing", "new", "renamed"])
    if kind == "deeper":
        content[key] = distort(content[key], rng, depth + 1)
    elif kind == "value" or isinstance(content, list) and kind != "missing":
        content[key] = rng.choice(absurd_values())
    elif kind == "missing":
        del content[key]
    elif kind == "new":
        content[rng.choice(["x", "a\nb", 1, None, "y" * 10_000, 10**6000])] = rng.choice(absurd_values())
    else:
        content[rng.choice(["x", 1, f"module.{key}"])] = content.pop(key)
    return content


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


class Payload:
    """Unpickled by a reader that runs code, it makes a folder at `path`."""

    def __init__(self, path, call=os.mkdir):
        self.path, self.call = str(path), call

    def __reduce__(self):
        return self.call, (
            f"__import__('os').mkdir({self.path!r})" if self.call in (eval, exec) else self.path,
        )


def malicious(content, marker, rng):
    """Bytes of a pickle with a payload, in each form that torch.load or numpy.load knows."""
    payload = Payload(marker, rng.choice([os.mkdir, os.system, eval, exec]))
    if payload.call is os.system:
        payload.path = f"mkdir {marker}"
    content = {**content, "acc": payload} if isinstance(content, dict) and rng.random() < 0.7 else payload
    form = rng.choice(["zip", "legacy", "pickle", "npy", "zip of pickles"])
    file = io.BytesIO()
    if form in ("zip", "legacy"):
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    elif form == "pickle":
        pickle.dump(content, file, protocol=rng.choice([0, 2, 4, 5]))
    elif form == "npy":
        np.save(file, np.array([payload], dtype=object), allow_pickle=True)
    else:
        with zipfile.ZipFile(file, "w") as archive:
            for name in ("archive/data.pkl", "data.pkl", "archive/constants.pkl", "archive/version"):
                archive.writestr(name, pickle.dumps(content))
    return file.getvalue()


def bomb(content):
    """A valid checkpoint, its entries compressed, with a hundred megabytes of zeros."""
    file = io.BytesIO()
    deflated = zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(io.BytesIO(saved(content))) as source, deflated as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
        archive.writestr("archive/data/99999", bytes(10**8))
    return file.getvalue()


# The readers. Each takes the bytes of a file.


class Readers:
    """What reads files, with what it needs: models, an optimizer, a folder."""

    def __init__(self, folder):
        self.folder, self.images = folder, folder / "images"
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        for split in ("train", "test", "val"):
            for name in ("a", "b"):
                for number in range(2):
                    path = self.images / split / name / f"{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(rng.integers(0, 255, (33, 32, 3), dtype=np.uint8)).save(path)
        self.model = create_model(CIFAR_MODEL, num_classes=2, timesteps=1)
        parser = cifar.program.get_parser("", 0.1)
        self.args, self.fixed = parser.parse(cifar_base(self)), parser.fixed
        self.args.manualSeed, self.args.started = 1, "now"
        self.big_model = create_model(IMAGENET_MODEL, num_classes=2, timesteps=1)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            cifar.program.main([*cifar_base(self), "--epochs", "1"], "", 0.1)
        self.checkpoint = foreign.read(folder / "out" / "imagefolder" / f"{CIFAR_MODEL}.pth")
        self.files = RunFiles(folder / "log", "run")
        self.files.folder.mkdir()

    def read_checkpoint(self, path):
        """As `run` and `Run` do, up to the first step of the optimizer."""
        content, source = checkpoint.resume(str(path), self.files)
        utils.program.compare(self.args, content, source, self.fixed)
        checkpoint.load_weights(self.model, content["state_dict"], source)
        optimizer = make_optimizer("sgd", self.model.parameters(), **RECIPE)
        if "optimizer" in content:
            load_optimizer(optimizer, content["optimizer"], source)
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()

    def resume(self, path):
        """The CIFAR program."""
        argv = [*cifar_base(self), "--epochs", "2", "--resume", str(path)]
        run_program(lambda argv: cifar.program.main(argv, "", 0.1), argv)

    def pre_train(self, path):
        checkpoint.load_weights(self.big_model, foreign.load(path)["state_dict"], path, optional=("Vth",))

    def pre_train_program(self, path):
        with one_step():
            run_program(imagenet.main.main, [*imagenet_base(self), "--pre_train", str(path)])

    def thresholds(self, path):
        load_thresholds(self.big_model, path)

    def thresholds_program(self, path):
        with one_step():
            run_program(imagenet.main.main, [*imagenet_base(self), "--load_Vth", str(path)])

    def image(self, path):
        transforms.ToTensor()(transforms.Resize((32, 32))(read_image(path)))

    def recording(self, path):
        cached = path.with_name("frames.npy")
        build_one(2, (cached, path))
        read_frames(2, cached)

    def frames(self, path):
        read_frames(2, path)

    def log(self, path):
        Recorder(self.files, 1, read_log(path)).tensorboard.close()

    def arguments(self, path):
        checkpoint.read_arguments(path)


def cifar_base(readers):
    flags = f"--model {CIFAR_MODEL} --timesteps 1 --workers 0 --train-batch 4 --device cpu --warmup 1"
    where = ["--path", str(readers.images), "--checkpoint", str(readers.folder / "out")]
    return ["--dataset", "imagefolder", *flags.split(), *where]


def imagenet_base(readers):
    flags = f"--arch {IMAGENET_MODEL} --timesteps 1 --workers 0 -b 4 --image_size 32 --epochs 1 --device cpu"
    where = ["--data", str(readers.images), "--checkpoint", str(readers.folder / "out")]
    return [*flags.split(), *where]


class one_step:  # noqa: N801
    """While open, a run ends with StepDone after its first step."""

    def __enter__(self):
        self.before = utils.training.train_steps

        def train_steps(*args, **settings):
            for _ in self.before(*args, **settings):
                raise StepDone
            yield 0

        utils.training.train_steps = train_steps

    def __exit__(self, *_):
        utils.training.train_steps = self.before


def sources(readers):
    """(reader, name of the file, valid contents as bytes or objects, its weight)"""
    small = dict(
        readers.checkpoint, state_dict={"w": torch.ones(3)}, optimizer={"state": {}, "param_groups": []}
    )
    big = dict(state_dict=readers.big_model.state_dict())
    names = [threshold_name(name) for name, _ in neuron_layers(readers.big_model)]
    Vth = {name: torch.tensor(1.5) for name in names}
    pictures = []
    for form in ("png", "jpeg", "bmp", "gif", "webp", "tiff", "ppm"):
        file = io.BytesIO()
        Image.open(readers.images / "train" / "a" / "0.png").save(file, form)
        pictures.append(file.getvalue())
    rng = np.random.default_rng(0)
    path = readers.folder / "valid.aedat"
    write_aedat(path, np.arange(500), *rng.integers(0, 128, (2, 500)), rng.integers(0, 2, 500))
    npy = io.BytesIO()
    np.save(npy, np.ones((2, 2, 48, 48), np.uint8))
    log = (readers.folder / "out" / "imagefolder" / f"{CIFAR_MODEL}.txt").read_bytes()
    json = (readers.folder / "out" / "imagefolder" / f"{CIFAR_MODEL}.json").read_bytes()
    return [
        (readers.read_checkpoint, "a.pth", [readers.checkpoint, small], 8),
        (readers.resume, "a.pth", [readers.checkpoint], 1),
        (readers.pre_train, "a.pth", [big, small], 1),
        (readers.pre_train_program, "a.pth", [big], 0.2),
        (readers.thresholds, "a.dict", [Vth, {name: (value,) for name, value in Vth.items()}], 4),
        (readers.thresholds_program, "a.dict", [Vth], 0.2),
        (readers.image, "a.png", pictures, 5),
        (readers.recording, "a.aedat", [path.read_bytes()], 3),
        (readers.frames, "a.npy", [npy.getvalue()], 3),
        (readers.log, "a.txt", [log], 2),
        (readers.arguments, "a.json", [json], 1),
    ]


def random_file(valid, marker, rng):
    """-> (how it was made, bytes)"""
    if isinstance(valid, bytes):
        kind = rng.choice(["mutated", "mutated", "mutated", "mutated", "noise", "malicious"])
        content = valid
    else:
        kind = rng.choice(
            ["mutated", "mutated", "distorted", "distorted", "distorted", "noise", "malicious", "bomb"]
        )
        if kind == "bomb" and rng.random() < 0.8:
            kind = "distorted"
        content = valid if kind in ("distorted", "malicious", "bomb") else saved(valid)
    make = dict(mutated=mutate, noise=noise, malicious=partial(malicious, marker=marker))
    if kind == "distorted":
        return kind, saved(distort(content, rng))
    return kind, bomb(content) if kind == "bomb" else make[kind](content, rng=rng)


def fuzz_files(readers, count, rng):
    """-> Counter of (reader, kind, outcome), defects"""
    outcomes, defects, marker = Counter(), [], readers.folder / "payload"
    every = sources(readers)
    for number in range(count):
        reader, name, contents, _ = rng.choices(every, [weight for *_, weight in every])[0]
        kind, content = random_file(rng.choice(contents), marker, rng)
        path = readers.folder / "case" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        outcome, defect = attempt(reader, path)
        if marker.exists():
            defect = "the payload ran"
            marker.rmdir()
        outcomes[reader.__name__, outcome] += 1
        if defect:
            defects.append(keep(readers, path, f"{reader.__name__}, {kind}, case {number}: {defect}"))
        shutil.rmtree(path.parent)
    return outcomes, defects


def keep(readers, path, text):
    """Keep the file of a defect beside the others."""
    copy = readers.folder / "defects" / f"{len(list((readers.folder / 'defects').glob('*')))}_{path.name}"
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(path, copy)
    print(f"{text}\n  file: {copy}", flush=True)
    return f"{text} ({copy})"


# Command lines.

WHOLE = [
    "0",
    "1",
    "2",
    "3",
    "-1",
    "1.5",
    "x",
    "",
    "1e3",
    "9" * 20,
    "9" * 400,
    "9" * 5000,
    " 2",
    "1_0",
    "nan",
    "²",
]
REAL = [
    "0",
    "1",
    "0.5",
    "-0.5",
    "nan",
    "inf",
    "-inf",
    "1e-320",
    "1e-30",
    "1e30",
    "1e308",
    "1e309",
    "x",
    "",
    "0.1",
]
TEXT = [
    "",
    "x",
    "..",
    "/",
    "a/b",
    ".",
    "\n",
    "é",
    "x" * 300,
    "-",
    "/dev/null",
    "/dev/null/x",
    "auto",
    "cpu",
    "cpu:0",
]
TEXT += [
    "cuda",
    "cuda:0",
    "cuda:" + "9" * 30,
    "cuda:-1",
    "{images}",
    "{file}",
    "{valid}",
    "{tmp}/new",
    "{file}/x",
]
TEXT += ["tcp://127.0.0.1:1", "tcp://", "env://", "quickstart", "\udcff", "a b", "%s", "{tmp}/" + "y/" * 2500]


def random_line(parser, base, rng, places):
    """Flags of `parser` with values from all over; those of `base` make the run small."""
    argv = list(base)
    actions = [action for action in parser._actions if action.option_strings]
    actions = [action for action in actions if action.dest != "compile"]  # which takes minutes
    for action in rng.sample(actions, rng.choice([1, 1, 2, 2, 3, 5])):
        flag = rng.choice(action.option_strings)
        if action.nargs == 0:
            argv.append(flag)
            continue
        pool = WHOLE + REAL + TEXT
        if action.choices and rng.random() < 0.8:
            pool = [str(choice) for choice in action.choices]
        elif action.type and rng.random() < 0.5:
            pool = ["1", "2", "3"]
        elif action.type and rng.random() < 0.8:
            pool = (
                WHOLE
                if action.type is int or "int" in repr(getattr(action.type, "__closure__", ""))
                else REAL
            )
        elif rng.random() < 0.8:
            pool = TEXT
        value = rng.choice(pool)
        for name, place in places.items():
            value = value.replace(name, place)
        argv += [flag + "=" + value] if rng.random() < 0.5 and flag.startswith("--") else [flag, value]
    if rng.random() < 0.1:
        argv += [rng.choice(["--no-such", "stray", "--", "--Vth", "-", "--model"])]
    return argv


def fuzz_lines(readers, count, rng):
    """-> Counter of (program, outcome), defects"""
    outcomes, defects = Counter(), []
    (readers.folder / "file").write_text("text")
    valid = readers.folder / "valid.pth"
    valid.write_bytes(saved(readers.checkpoint))
    places = {
        "{images}": readers.images,
        "{file}": readers.folder / "file",
        "{valid}": valid,
        "{tmp}": readers.folder,
    }
    places = {name: str(path) for name, path in places.items()}
    parsers = [cifar.program.get_parser("", 0.1), imagenet.main.get_parser()]
    programs = [lambda argv: cifar.program.main(argv, "", 0.1), imagenet.main.main]
    launcher, here = torch.distributed.run.main, Path.cwd()
    torch.distributed.run.main = done
    work = readers.folder / "work"
    work.mkdir()
    os.chdir(work)  # relative paths lead here
    for number in range(count):
        which = number % 2
        base = (cifar_base, imagenet_base)[which](readers)
        argv = random_line(parsers[which], [*base, "--epochs", "1"], rng, places)
        with one_step() if rng.random() < 0.8 else shortened():
            outcome, defect = attempt(run_program, programs[which], argv)
        outcomes[("cifar line", "imagenet line")[which], outcome] += 1
        if defect:
            text = " ".join(word[:80] for word in argv[len(base) :])
            defects.append(f"line {number}, {('cifar', 'imagenet')[which]}: {text!r}: {defect}")
            print(defects[-1], flush=True)
        torch.use_deterministic_algorithms(False)
    os.chdir(here)
    torch.distributed.run.main = launcher
    return outcomes, defects


def done(*_):
    raise StepDone


class shortened:  # noqa: N801
    """While open, a run ends after its first epoch."""

    def __enter__(self):
        self.before = Recorder.write

        def write(recorder):
            self.before(recorder)
            if recorder.rows:
                raise StepDone

        Recorder.write = write

    def __exit__(self, *_):
        Recorder.write = self.before


def fuzz(folder, files, lines, seed):
    """-> Counter of outcomes, defects"""
    torch.set_num_threads(1)
    readers = Readers(folder)
    outcomes, defects = fuzz_files(readers, files, random.Random(seed))
    more, wrong = fuzz_lines(readers, lines, random.Random(seed + 1))
    return outcomes + more, defects + wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--lines", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30))
    folder, begins = Path(tempfile.mkdtemp(prefix="fuzz")), time.monotonic()
    outcomes, defects = fuzz(folder, args.files, args.lines, args.seed)
    kinds = sorted({outcome for _, outcome in outcomes})
    print(f"{'':22}" + "".join(f"{kind:>12}" for kind in kinds))
    for name in sorted({name for name, _ in outcomes}):
        print(f"{name:22}" + "".join(f"{outcomes[name, kind]:12}" for kind in kinds))
    took = f"seed {args.seed}, {time.monotonic() - begins:.0f} s"
    print(f"{outcomes.total()} cases, {len(defects)} defects, {took}")
    if defects:
        sys.exit(f"the files are in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()

"""Runs that are killed, damaged, lied to and stopped; chaos.py and fuzz.py in short."""

import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cifar.program
import imagenet.main
import utils.events
import utils.training
from models import create_model
from tests import chaos, fuzz
from tests.forks import ended, fork, torchrun
from utils import checkpoint, foreign
from utils.cli import UserError, run_program
from utils.records import RunFiles
from utils.signals import StopRequest
from utils.thresholds import load_thresholds

ROOT = Path(__file__).parents[1]
STEM = "preresnet.resnet20_lif"
SMALL = f"--dataset imagefolder --model {STEM} --timesteps 1 --Vth 0.3 --alpha 0.3 --delta_t 0.2 --device cpu"
SMALL = f"{SMALL} --train-batch 4 --warmup 2 --manualSeed 1 --epochs 2 --workers 0 --save_every 1"
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of noise: 8 training images, which are two steps an epoch, and 4 test images."""
    folder, rng = tmp_path_factory.mktemp("data") / "images", np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 2)):
        for channel, name in ((0, "red"), (2, "blue")):
            for number in range(count):
                pixels = rng.integers(0, 128, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                path = folder / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return folder


def start(images, out, flags="", before=None):
    """A run of the CIFAR program in a process of its own, forked. -> its id

    `before()` is called first. What the run prints goes to <out>/output.
    """
    argv = shlex.split(f"{SMALL} --path {images} --checkpoint {out} {flags}")
    out.mkdir(exist_ok=True)

    def program():
        if before:
            before()
        run_program(lambda argv: cifar.program.main(argv, "test", lr=0.1), argv)

    return fork(program, out / "output")


def run(images, out, flags="", before=None):
    """A run that must end well. -> what it printed"""
    status = ended(start(images, out, flags, before))
    assert status == 0, printed(out)
    return printed(out)


def printed(out):
    return (out / "output").read_text()


def files_of(out):
    return RunFiles(out / "imagefolder", STEM)


def result(out):
    return chaos.result(files_of(out).log)


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.001)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(images, out)
    return out


@pytest.fixture(scope="module")
def expected(whole):
    return result(whole)


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the undisturbed run, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "out"))


def saved_at(step):
    """A hook: the process kills itself once it has done so many steps and saved the last."""

    def install():
        save, done = checkpoint.save, []

        def count(content, path, *args, **settings):
            save(content, path, *args, **settings)
            done.extend([1] if path.suffix == ".pth" and content.get("iteration") else [])
            if len(done) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.save = count

    return install


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_within_an_epoch_and_resumed_is_the_same_run(workers, images, expected, tmp_path):
    out, flags = tmp_path / "out", f"--resume auto --workers {workers}"
    assert ended(start(images, out, flags, saved_at(1))) == -signal.SIGKILL
    assert foreign.load(files_of(out).checkpoint)["iteration"] == 1
    assert ended(start(images, out, flags, saved_at(2))) == -signal.SIGKILL
    assert "1 epochs and 1 iterations" in run(images, out, flags)
    assert chaos.same(expected, result(out))
    assert "nothing left to train" in run(images, out, flags)
    assert chaos.same(expected, result(out))


def kill_at_random(pid, out, rng):
    """Kill the run at one of its next writes, or at any time. -> the files half written; None if it ended"""
    seen, skipped = set(chaos.drafts(out).items()), rng.randint(0, 3)
    deadline = time.monotonic() + rng.choice([30, rng.uniform(0, 2)])
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        new = {name for name, _ in chaos.drafts(out).items() - seen if name.endswith(".pth.tmp")}
        if new and skipped:
            seen, skipped = seen | chaos.drafts(out).items(), skipped - 1
        elif new or time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return chaos.drafts(out).items() - seen
        time.sleep(0.0005)
    return None


def test_kills_at_random_moments(images, expected, tmp_path):
    """tests/chaos.py does this with the programs as they are typed, with two processes and with events."""
    rng, out, kills, writing = random.Random(1), tmp_path / "out", 0, 0
    while kills < 5:
        half = kill_at_random(start(images, out, "--resume auto"), out, rng)
        for path in (out / "imagefolder").glob("*.pth"):
            foreign.load(path)  # whole, whatever happened
        if half is not None:
            kills, writing = kills + 1, writing + bool(half)
        elif chaos.same(expected, result(out)):
            shutil.rmtree(out)
        else:
            pytest.fail("the run that was killed is another one")
    run(images, out, "--resume auto")
    assert chaos.same(expected, result(out)) and writing


def test_log_and_curves_go_on_without_gap_or_overlap(images, expected, tmp_path):
    """Killed when the second epoch's curves are written and its checkpoint is not."""

    def die_before_the_last_checkpoint():
        save = checkpoint.save

        def killed(content, path, *args, **settings):
            if path.suffix == ".pth" and content.get("epoch") == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            save(content, path, *args, **settings)

        checkpoint.save = killed

    out = tmp_path / "out"
    assert ended(start(images, out, "--resume auto", die_before_the_last_checkpoint)) == -signal.SIGKILL
    curves = chaos.read_curves(files_of(out).tensorboard)
    assert [step for step, _ in curves["loss/test"]] == [0, 1]
    run(images, out, "--resume auto")
    assert chaos.same(expected, result(out))
    curves = chaos.read_curves(files_of(out).tensorboard)
    assert all([step for step, _ in points] == [0, 1] for points in curves.values()) and len(curves) > 40
    assert len(files_of(out).log.read_text().splitlines()) == 3


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_after_the_step(number, images, tmp_path):
    out = tmp_path / "out"
    pid = start(images, out, "--resume auto --epochs 2")
    until(files_of(out).checkpoint.exists)
    os.kill(pid, number)
    assert ended(pid) == 128 + number
    assert f"stopped by {number.name}" in printed(out).splitlines()[-1]
    assert "stopping after this step" in printed(out)
    assert foreign.load(files_of(out).checkpoint)["epoch"] < 2


def test_ctrl_c_while_nobody_reads_the_errors(images, tmp_path):
    """`2>&1 | tee log`: the same Ctrl-C ends tee, first."""

    def unread():
        read, write = os.pipe()
        os.dup2(write, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        os.close(read)

    out = tmp_path / "out"
    pid = start(images, out, "--resume auto --epochs 50", unread)
    until(files_of(out).checkpoint.exists)
    before = files_of(out).checkpoint.stat().st_mtime_ns
    os.kill(pid, signal.SIGINT)
    assert ended(pid) == 128 + signal.SIGINT
    assert files_of(out).checkpoint.stat().st_mtime_ns > before


LACKING = {  # as torch words it, from a worker that loads data: -> what to read
    "RuntimeError: unable to allocate shared memory(shm) for file </torch_7>: No space left": "/dev/shm",
    "RuntimeError: unable to write to file </torch_7_1>: No space left on device (28)": "say --workers 0",
    "RuntimeError: unable to mmap 8 bytes from file <x>: Cannot allocate memory (12)": "mmap",
    "OSError: [Errno 5] Input/output error: 'x.png'": "x.png",
}


@pytest.mark.parametrize("text", LACKING)
def test_what_a_worker_lacks_gets_one_line(text):
    def fail(_):
        kind = text.partition(":")[0]
        caught = (
            f"Caught {kind} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        )
        raise (OSError if kind == "OSError" else RuntimeError)(caught + text)

    with pytest.raises(SystemExit) as end:
        run_program(fail)
    assert LACKING[text] in end.value.code and text in end.value.code
    assert len(end.value.code.splitlines()) == 1


def test_a_second_ctrl_c_stops_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_ends_the_program(images, tmp_path):
    def slow_steps():
        count = utils.training.Metrics.add

        def add(*args):
            print("in a step")
            time.sleep(20)
            count(*args)

        utils.training.Metrics.add = add

    pid = start(images, tmp_path / "out", "", slow_steps)
    until(lambda: (tmp_path / "out" / "output").exists() and "in a step" in printed(tmp_path / "out"))
    os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)  # the first waits for the step
    os.kill(pid, signal.SIGINT)
    assert ended(pid, 5) == 130
    assert printed(tmp_path / "out").splitlines()[-1].startswith("interrupted")


def test_sigterm_to_two_processes(images, tmp_path):
    """As a scheduler sends it: to the launcher, which hands it on."""
    argv = shlex.split(f"{SMALL} --epochs 500 --path {images} --checkpoint {tmp_path}")
    command = ["--nproc_per_node", "2", str(ROOT / "cifar" / "main_multiple_gpus.py"), *argv]
    launched = torchrun(["--standalone", *command], tmp_path / "output")
    file = files_of(tmp_path).checkpoint
    until(file.exists, 60)
    workers = chaos.family(launched)[1:]
    os.kill(launched, signal.SIGTERM)
    assert ended(launched, 30) != 0
    assert printed(tmp_path).count("stopped by SIGTERM") == 1
    assert len(workers) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in workers)
    saved = foreign.load(file)
    assert saved["epoch"] < 500 and file.stat().st_mtime > time.time() - 30


def test_a_finished_run_exits_at_once(images, copy):
    before = files_of(copy).checkpoint.stat().st_mtime_ns
    assert "nothing left to train: 2 of 2 epochs are done" in run(images, copy, "--resume auto")
    assert files_of(copy).checkpoint.stat().st_mtime_ns == before


def test_resume_auto_refuses_other_mathematics(images, copy):
    flags = "--resume auto --lr 0.02 --tau 2 --workers 1 --epochs 3"
    assert ended(start(images, copy, flags)) == 1
    (line,) = [line for line in printed(copy).splitlines() if line.startswith("error: ")]
    for difference in ("lr 0.1, now 0.02", "tau 1.0, now 2.0", "epochs 2, now 3", "--resume "):
        assert difference in line
    assert "workers" not in line
    asked = run(images, copy, f"--resume {STEM}.pth --lr 0.02 --epochs 3")  # by name it may
    assert "was trained with" in asked and foreign.load(files_of(copy).checkpoint)["epoch"] == 3


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_used(images, expected, copy):
    file = files_of(copy).checkpoint
    file.write_bytes(file.read_bytes()[:1000])
    text = run(images, copy, "--resume auto")
    assert re.search(rf"warning: \S+{STEM}.pth is damaged", text)
    assert f"resumed from {files_of(copy).previous}" in text
    assert chaos.same(expected, result(copy))


def test_a_deleted_checkpoint(images, expected, copy):
    files_of(copy).checkpoint.unlink()
    assert f"resumed from {files_of(copy).previous}" in run(images, copy, "--resume auto")
    assert chaos.same(expected, result(copy))
    for file in (files_of(copy).checkpoint, files_of(copy).previous, files_of(copy).best):
        file.unlink()
    assert "starting afresh" in run(images, copy, "--resume auto")
    assert chaos.same(expected, result(copy))


def test_cut_at_every_sixteenth(whole, tmp_path):
    content, path = files_of(whole).checkpoint.read_bytes(), tmp_path / "cut.pth"
    for part in range(16):
        path.write_bytes(content[: len(content) * part // 16])
        with pytest.raises(UserError, match="is damaged or not a checkpoint") as error:
            foreign.load(path)
        assert len(error.value.args[0].splitlines()) == 1


def test_a_pickle_that_refers_to_nothing(tmp_path):
    path = tmp_path / "refers.pth"
    path.write_bytes(b"\x80\x02h\x65.")  # protocol 2; what was remembered as 101, which nothing was; end
    with pytest.raises(UserError, match=r"refers.pth is damaged or not a checkpoint \(no entry 101\); give"):
        foreign.load(path)


def test_a_flipped_byte_is_found_or_of_no_matter(whole, tmp_path):
    """At 200 random places, half of them in the zip's directory at the end and in the headers."""
    file, path, rng = files_of(whole).checkpoint, tmp_path / "flipped.pth", random.Random(0)
    content, expected, found = file.read_bytes(), foreign.load(file), 0
    with zipfile.ZipFile(file) as archive:
        headers = [entry.header_offset + k for entry in archive.infolist() for k in range(64)]
        headers += range(archive.start_dir, len(content))
    for number in range(200):
        at = rng.choice(headers) if number % 2 else rng.randrange(len(content))
        damaged = bytearray(content)
        damaged[at] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            assert chaos.same(expected, foreign.load(path)), f"byte {at}"
        except UserError as error:
            assert "is damaged or not a checkpoint" in str(error)
            found += 1
    assert found > 100  # the others lie in padding or in dates


@pytest.mark.parametrize("limit", [4000, 100_000, 1_500_000])
def test_disk_full(limit, images, expected, tmp_path):
    """Too little room from the second epoch on: one line; the checkpoint of before is whole, and goes on."""
    out = tmp_path / "out"
    assert ended(start(images, out, "", saved_at(2))) == -signal.SIGKILL
    before = foreign.load(files_of(out).checkpoint)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    assert ended(start(images, out, "--resume auto", fill)) == 1
    lines = printed(out).splitlines()
    assert "Traceback" not in printed(out) and sum(line.startswith("error: ") for line in lines) == 1
    assert chaos.same(before["state_dict"], foreign.load(files_of(out).checkpoint)["state_dict"])
    run(images, out, "--resume auto")
    assert chaos.same(expected, result(out))


def test_a_folder_that_cannot_be_written(images, tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "out"
    assert ended(start(images, out, f"--checkpoint {tmp_path / 'file' / 'below'}")) == 1
    assert re.search("^error: cannot write to .*--checkpoint$", printed(out), re.MULTILINE)
    with pytest.raises(UserError, match="cannot write"):
        checkpoint.save({}, tmp_path / "file" / "x.pth")


def test_a_mistake_met_by_a_worker_ends_the_program(images, tmp_path):
    """Python ends its children at exit by SIGTERM, and waits: a worker must not ignore it."""
    bad = shutil.copytree(images, tmp_path / "bad")
    (bad / "train" / "red" / "3.png").write_text("no image")
    command = [sys.executable, str(ROOT / "cifar" / "main_single_gpu.py"), *SMALL.split(), "--workers", "2"]
    command += ["--path", str(bad), "--checkpoint", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and "3.png" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize("flag", ["--resume", "--pre_train", "--load_Vth"])
def test_a_malicious_pickle_is_refused_and_its_payload_not_run(flag, images, tmp_path, capsys):
    marker, rng = tmp_path / "payload", random.Random(0)
    file = tmp_path / "evil.pth"
    pickle.loads(pickle.dumps(fuzz.Payload(marker)))
    assert marker.is_dir()  # the payload works
    marker.rmdir()
    torch.save({"state_dict": {}, "acc": fuzz.Payload(marker)}, file)
    valid = {"state_dict": {"w": torch.ones(1)}, "epoch": 1, "best_acc": 1.0}
    for content in [file.read_bytes(), *(fuzz.malicious(valid, marker, rng) for _ in range(10))]:
        file.write_bytes(content)
        if flag == "--resume":
            argv = shlex.split(f"{SMALL} --path {images} --checkpoint {tmp_path / 'out'} --resume {file}")
            program = lambda argv: cifar.program.main(argv, "", 0.1)  # noqa: E731
        else:
            (images / "val").exists() or (images / "val").symlink_to(images / "test")
            argv = shlex.split(
                f"--data {images} --image_size 32 --timesteps 1 --workers 0 {flag} {file} -c {tmp_path}"
            )
            program = imagenet.main.main
        with pytest.raises(SystemExit) as end:
            run_program(program, argv)
        assert re.fullmatch(
            r"error: \S+evil.pth is damaged or not a checkpoint \(.*\); give another file", end.value.code
        )
        assert not marker.exists()


def test_absurd_checkpoints_and_thresholds(tmp_path):
    file, huge = tmp_path / "absurd.pth", torch.ones(1).expand(10**12)
    run_fields = dict(state_dict={}, epoch=1, best_acc=1.0)
    for wrong in (
        dict(state_dict={"w": huge}),
        dict(epoch=10**30),
        dict(iteration=-1),
        dict(best_acc=huge),
        dict(log=[[huge] * 5]),
        dict(log=[1.0] * 5),
        dict(args={"manualSeed": "1"}),
        dict(sums="1"),
        dict(args={"lr": huge}),
        dict(state_dict={"a\nb": torch.ones(1)}),
    ):
        torch.save(run_fields | wrong, file)
        with pytest.raises(UserError) as error:
            foreign.load_run(file, "acc")
        assert len(error.value.args[0].splitlines()) == 1
    model = create_model(STEM, num_classes=2)
    for value in (huge, 1e300, 10**400, torch.tensor(1j), float("nan"), -1, torch.ones(2), "1"):
        torch.save(dict.fromkeys(("relu1", "relu2"), value), file)
        with pytest.raises(UserError):
            load_thresholds(model, file)


def test_a_compressed_bomb_is_not_unpacked(tmp_path):
    (tmp_path / "bomb.pth").write_bytes(fuzz.bomb({"state_dict": {}}))
    with pytest.raises(UserError, match="more bytes than it has"):
        foreign.load(tmp_path / "bomb.pth")


def test_an_archive_does_not_write_outside_its_folder(tmp_path, monkeypatch):
    root = tmp_path / "a" / "root"
    root.mkdir(parents=True)
    with zipfile.ZipFile(root / "cat.zip", "w") as archive:
        for name in ("../../evil", str(tmp_path / "evil"), "cat/../../../evil", "cat/cifar10_cat_0.aedat"):
            archive.writestr(name, "x")
        link = zipfile.ZipInfo("cat/link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, str(tmp_path))
        archive.writestr("cat/link/evil", "x")
    module = utils.events.spikingjelly_parts()[0]
    monkeypatch.setattr(module, "resource_url_md5", staticmethod(lambda: [("cat.zip", "", None)]))
    with pytest.raises(UserError, match="cat.zip fails"):  # a file stands where a folder should
        utils.events.unpack(root, root / "events")
    assert {path.name for path in tmp_path.iterdir()} == {"a"} and not list(tmp_path.rglob("link/evil"))
    outside = [path for path in tmp_path.rglob("evil") if root not in path.parents]
    assert not outside


def spoil(parameter):
    """The parameter is NaN from the third training step on, which is the first of the second epoch."""

    def install():
        create = cifar.program.create_model

        def create_spoilt(*args, **settings):
            model, steps = create(*args, **settings), []

            def hook(_model, _inputs):
                steps.extend([1] if model.training else [])
                if len(steps) >= 3:
                    model.get_parameter(parameter).data.fill_(float("nan"))

            model.register_forward_pre_hook(hook)
            return model

        cifar.program.create_model = create_spoilt

    return install


SPOILT = {
    "relu3.Vth": "the loss is nan at iteration 1 of epoch 2/2, first in relu3.Vth; ",
    "layer2.1.bn1.weight": "layer2.1.bn1.weight is not finite after iteration 1 of epoch 2/2; ",
}


@pytest.mark.parametrize("parameter", SPOILT)
def test_a_run_that_goes_wrong_names_iteration_and_layer(parameter, images, expected, tmp_path):
    """And the last good checkpoint stays."""
    out = tmp_path / "out"
    assert ended(start(images, out, "", spoil(parameter))) == 1
    assert printed(out).splitlines()[-1].startswith("error: " + SPOILT[parameter])
    assert foreign.load(files_of(out).checkpoint)["epoch"] == 1
    run(images, out, "--resume auto")
    assert chaos.same(expected, result(out))


def test_deterministic_runs_are_the_same_run(images, expected, tmp_path):
    run(images, tmp_path / "out", "--deterministic")
    assert chaos.same(expected, result(tmp_path / "out"))


def test_fuzz(tmp_path):
    threads = torch.get_num_threads()
    outcomes, defects = fuzz.fuzz(tmp_path, files=200, lines=12, seed=0)
    torch.set_num_threads(threads)
    assert not defects
    assert outcomes.total() == 212 and sum(n for (_, what), n in outcomes.items() if what == "one line") > 70

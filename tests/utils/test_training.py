"""The schedule against its formula, metrics against a direct count, checkpoints against interruptions."""

import ast
import math
import os
import platform
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import create_model
from tests import fuzz
from utils import checkpoint, foreign
from utils.cli import UserError
from utils.data import train_loader
from utils.foreign import read_log
from utils.recipe import warmup_cosine
from utils.records import Recorder, RunFiles
from utils.statistics import count_spikes, firing_rates
from utils.training import Metrics, Result, evaluate, train_steps

PAGES = """
import resource, torch
from utils.program import keep_freed_memory
keep_freed_memory()
for i in range(16):
    torch.ones(2**25)
    first = first if i > 7 else resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first)
"""


PEAKS = """
import subprocess, sys
touched = b"x" * (2**20 * int(sys.argv[1]))
how = dict(stdout=subprocess.PIPE, text=True, check=True)
child = "import torch; from utils.statistics import peak_memory; print(peak_memory(torch.device('cpu')))"
print(subprocess.run([sys.executable, "-c", child], **how).stdout)
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="it is about Linux's accounts")
def test_peak_memory_is_that_of_the_process_alone():
    """A process starts with its parent's figure in `ru_maxrss`, if that is higher."""
    how = dict(cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, check=True)
    of_small, of_large = (
        ast.literal_eval(subprocess.run([sys.executable, "-c", PEAKS, mb], **how).stdout)["peak memory (MB)"]
        for mb in ("1", "1000")
    )
    assert of_small > 50 and abs(of_large - of_small) < 100


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or "LD_PRELOAD" in os.environ, reason="it is about glibc's malloc"
)
def test_freed_memory_is_used_again_unless_the_environment_says_how():
    """Pages that the kernel hands out for 128 MB, eight times after as many others, as it counts them."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    how = dict(cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, check=True)
    kept, plain = (
        int(subprocess.run([sys.executable, "-c", PAGES], env=env | settings, **how).stdout)
        for settings in ({}, {"MALLOC_ARENA_TEST": "8"})
    )
    assert plain >= 8 * 64  # were each of 2 MB
    assert kept < plain / 8


@pytest.mark.parametrize(("steps", "warmup"), [(391, 400), (100, 250), (7, 0)])
@pytest.mark.parametrize("first_epoch", [0, 1, 57])
def test_learning_rate_at_every_iteration(steps, warmup, first_epoch):
    """0.5*lr*(1+cos(pi*epoch/epochs)) * min(1, (it+1)/warmup); warm-up crosses epochs and is not repeated."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    curve = dict(lr=0.1, epochs=200, steps_per_epoch=steps, warmup=warmup)
    schedule = warmup_cosine(optimizer, **curve, first_step=first_epoch * steps)
    for it in range(first_epoch * steps, 200 * steps):
        expected = 0.5 * 0.1 * (1 + math.cos(math.pi * (it // steps) / 200))
        if it < warmup:
            expected *= (it + 1) / warmup
        assert math.isclose(optimizer.param_groups[0]["lr"], expected, rel_tol=1e-12)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(("steps", "warmup"), [(100, 250), (100, 40), (7, 0)])
@pytest.mark.parametrize("first_step", [0, 33, 150])
def test_warmup_within_the_first_epoch(steps, warmup, first_step):
    """(it+1)/warmup holds in epoch 0 alone, in a resumed run too; then the plain cosine."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    curve = dict(lr=0.1, epochs=3, steps_per_epoch=steps, warmup=warmup, within=True)
    schedule = warmup_cosine(optimizer, **curve, first_step=first_step)
    for it in range(first_step, 3 * steps):
        expected = 0.5 * 0.1 * (1 + math.cos(math.pi * (it // steps) / 3))
        if it < min(steps, warmup):
            expected *= (it + 1) / warmup
        assert math.isclose(optimizer.param_groups[0]["lr"], expected, rel_tol=1e-12)
        optimizer.step()
        schedule.step()


def test_metrics_count_every_sample():
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 8), torch.randint(0, 8, (50,))
    metrics = Metrics("cpu")
    for part in (slice(0, 32), slice(32, 50)):
        metrics.add(F.cross_entropy(logits[part], labels[part]), logits[part], labels[part])
    result = metrics.result()
    ranks = [
        sorted(range(8), key=lambda k: -row[k].item()).index(label) for row, label in zip(logits, labels)
    ]
    assert result.top1 == pytest.approx(100 * sum(rank == 0 for rank in ranks) / 50)
    assert result.top5 == pytest.approx(100 * sum(rank < 5 for rank in ranks) / 50)
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)


def test_evaluation_is_without_gradients_and_keeps_the_model():
    torch.manual_seed(0)
    model = create_model("preresnet.resnet20_if", num_classes=3, timesteps=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    samples = [(torch.randn(3, 32, 32), i % 3) for i in range(7)]
    loader = torch.utils.data.DataLoader(samples, batch_size=4)
    result, rates = evaluate(model, loader, "cpu")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        logits = torch.cat([model(x) for x, _ in loader])
    labels = torch.tensor([label for _, label in samples])
    assert result.top1 == pytest.approx(100 * (logits.argmax(1) == labels).sum().item() / 7)
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert len(rates) == 21


def steps_of(model, loader):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = warmup_cosine(optimizer, lr=0.1, epochs=1, steps_per_epoch=3, warmup=0)
    parts = dict(loader=loader, optimizer=optimizer, schedule=schedule, metrics=Metrics("cpu"))
    return train_steps(model, **parts, device="cpu", title="", precision="fp32", first=0)


@pytest.mark.parametrize("frozen", [1, 2])
def test_layers_may_be_frozen(frozen, capsys):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    for layer in model[:frozen]:
        layer.weight.requires_grad_(False)
    before = [layer.weight.clone() for layer in model]
    samples = [(torch.randn(6), i % 3) for i in range(12)]
    loader = train_loader(samples, batch_size=4, workers=0, seed=0, pin_memory=False)
    assert list(steps_of(model, loader)) == [1, 2, 3] and "warning" not in capsys.readouterr().err
    assert [torch.equal(layer.weight, old) for layer, old in zip(model, before)] == [True, frozen == 2]


def test_a_forward_pass_has_the_memory_of_the_last_gradients():
    torch.manual_seed(0)
    model, seen = nn.Linear(6, 3), []
    model.register_forward_pre_hook(lambda *_: seen.append([p.grad is None for p in model.parameters()]))
    loader = train_loader(
        [(torch.randn(6), i % 3) for i in range(12)], batch_size=4, workers=0, seed=0, pin_memory=False
    )
    steps = steps_of(model, loader)
    assert [(step, bool(model.weight.grad.any())) for step in steps] == [(1, True), (2, True), (3, True)]
    assert seen == [[True, True]] * 3


def test_firing_rates_by_hand():
    """T=2, Vth=1, alpha=1, rows t*B+b: 0.5+0.5 fires once, 1+1 twice, 0 never: 3 of 6."""
    model = nn.Sequential(create_model("vgg.vgg11_if", timesteps=2, Vth=1.0, alpha=1.0).classifier[-1])
    with count_spikes(model) as counts:
        model(torch.tensor([[0.5], [1.0], [0.0]] * 2))
    assert firing_rates(counts) == {"0": 0.5}
    with count_spikes(model) as counts:
        pass
    model(torch.ones(2, 1))
    assert counts["0"].tolist() == [0, 0]


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "run.pth"
    checkpoint.save({"state_dict": {}, "epoch": 1}, path)

    def disk_full(content, file):
        file.write(b"half a checkpo")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        checkpoint.save({"state_dict": {}, "epoch": 2}, path, write=disk_full)
    assert foreign.load(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["run.pth"]


def test_a_file_system_that_cannot_flush_folders(tmp_path, monkeypatch):
    flush = os.fsync

    def files_alone(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(22, "Invalid argument")
        flush(number)

    monkeypatch.setattr(os, "fsync", files_alone)
    checkpoint.save({"state_dict": {}, "epoch": 1}, tmp_path / "run.pth")
    assert foreign.load(tmp_path / "run.pth")["epoch"] == 1


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    torch.save({"state_dict": {}, "payload": fuzz.Payload(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="evil.pth"):
        foreign.load(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_damaged_newest_checkpoint_gives_way_to_the_best(tmp_path, capsys):
    files = RunFiles(tmp_path, "run")
    checkpoint.save({"state_dict": {}, "epoch": 3, "best_acc": 50.0}, files.best)
    files.checkpoint.write_bytes(b"PK damaged")
    content, path = checkpoint.resume("auto", files)
    assert content["epoch"] == 3 and path == files.best
    assert "run.pth is damaged" in capsys.readouterr().err


def test_resume_auto_without_the_arguments_file_still_finds_the_run(tmp_path):
    files = RunFiles(tmp_path, "run")
    checkpoint.save(
        {"state_dict": {}, "epoch": 3, "best_acc": 50.0, "args": {"started": "then"}}, files.checkpoint
    )
    assert checkpoint.resume("auto", files)[1] == files.checkpoint
    files.arguments.write_text('{"started": "later"}')
    assert checkpoint.resume("auto", files) == (None, None)


def record(recorder, epoch):
    result = Result(loss=float(epoch), top1=10.0, top5=20.0, images_per_second=1.0)
    recorder.add(epoch, lr=0.1, train=result, test=result, thresholds={}, firing_rates={})
    recorder.write()


def test_the_log_of_a_resumed_run_has_each_epoch_once(tmp_path):
    files = RunFiles(tmp_path, "run")
    checkpoint.make_folder(files.tensorboard)
    recorder = Recorder(files, 0, None)
    for epoch in range(3):
        record(recorder, epoch)
    record(Recorder(files, 2, recorder.rows[:2]), 2)  # goes on from the checkpoint of epoch 2
    rows = [line.split("\t")[1] for line in files.log.read_text().splitlines()[1:]]
    assert rows == ["0.000000", "1.000000", "2.000000"]


def test_a_name_may_look_like_a_formula(tmp_path):
    """Matplotlib takes what stands between two dollars for TeX."""
    files = RunFiles(tmp_path, "run_$5_$6$$")
    checkpoint.make_folder(files.tensorboard)
    record(Recorder(files, 0, None), 0)
    assert files.curves.read_bytes().startswith(b"%PDF")


def test_an_official_log_is_read(tmp_path):
    """The official code ends every field in a tab."""
    files = RunFiles(tmp_path, "run")
    checkpoint.make_folder(files.tensorboard)
    files.log.write_text(
        "Learning Rate\tTrain Loss\tValid Loss\tTrain Acc.\tValid Acc.\t\n" + "0.1\t" * 5 + "\n"
    )
    assert read_log(files.log) == [[0.1] * 5]
    files.log.write_text("Learning Rate\nhello\n")
    with pytest.raises(UserError, match="run.txt is damaged"):
        read_log(files.log)

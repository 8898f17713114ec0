"""Several processes of one run, gloo on the CPU: the same numbers as one, and what happens when one dies."""

import itertools
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

import cifar.program
from models import create_model
from models.blocks import basic
from models.preresnet import PreActResNet
from models.registry import activation_factory
from tests import chaos
from tests.forks import ended, fork, free_port, side_by_side, torchrun
from utils import distributed
from utils.cli import UserError, run_program
from utils.data import test_loader as make_loader
from utils.training import evaluate

ROOT = Path(__file__).parents[2]
PROGRAM = str(ROOT / "cifar" / "main_multiple_gpus.py")
SMALL = "--model preresnet.resnet20_lif --timesteps 2 --Vth 0.3 --alpha 0.3 --delta_t 0.2 --device cpu"
SMALL = f"{SMALL} --epochs 2 --warmup 2 --manualSeed 1 --workers 0 --test-batch 2 --train-batch 4".split()
STEM = "preresnet.resnet20_lif"


def environment():
    return dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


def launch(n, argv, _folder):
    """`python -m torch.distributed.launch` as a user types it, with n processes. -> what was printed"""
    start = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node", str(n)]
    start += ["--master_port", str(free_port()), PROGRAM, *argv]
    finished = subprocess.run(start, capture_output=True, text=True, timeout=300, env=environment())
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def script(argv):
    """The script, as Python runs it."""
    sys.argv = [PROGRAM, *argv]
    runpy.run_path(PROGRAM, run_name="__main__")


def torchrun_script(n, argv, folder):
    """torchrun with n processes that run the script. -> what was printed"""
    flags = ["--nproc_per_node", str(n), "--master_port", str(free_port())]
    status = ended(torchrun([*flags, PROGRAM, *argv], folder / "printed"), 300)
    printed = (folder / "printed").read_text()
    assert status == 0, printed
    return printed


def program(argv, lr=0.05, processes=True):
    """The program of several processes in a process that is forked, or the other one."""
    run_program(partial(cifar.program.main, description="", lr=lr, processes=processes), [*argv])


def run(n, argv, folder):
    """A run of the program in n processes that must end well."""
    results = side_by_side([partial(program, argv)] * n, folder)
    assert [status for status, _ in results] == [0] * n, results


def load(folder, name=f"{STEM}.pth"):
    return torch.load(folder / "imagefolder" / name, weights_only=True)


@pytest.fixture
def data(images):
    return ["--dataset", "imagefolder", "--path", str(images)]


def train(kind, backward, frozen):
    """5 steps on the same 4 images a step, however many processes share them. -> the final state"""
    torch.manual_seed(0)
    settings = dict(Vth=1.0, alpha=0.2) if kind == "if" else dict(Vth=0.3, alpha=0.3, delta_t=0.2)
    activation = activation_factory(kind, dict(settings, timesteps=2))
    model = PreActResNet(basic, [1, 1, 1], [8, 12, 16], activation=activation, num_classes=5, dropout=0.0)
    model.backward, block = backward, model.layer2[0]
    block.bn1 = torch.nn.BatchNorm2d(block.bn1.num_features, affine=False)  # one without weight and bias
    block.shortcut = torch.nn.Sequential(block.shortcut, torch.nn.BatchNorm2d(12, affine=False))
    for parameter in model.parameters():  # else the currents of silent channels are 0, the end of the clamp
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model(torch.randn(8, 3, 32, 32))  # running statistics to freeze
    if distributed.world_size() > 1 and not frozen:
        model.synchronize()
    network = distributed.parallel(model, torch.device("cpu")).train(not frozen)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    rank, world = distributed.rank(), distributed.world_size()
    for _ in range(5):
        images, labels = torch.randn(4, 3, 32, 32), torch.randint(5, (4,))
        loss = F.cross_entropy(network(images[rank::world]), labels[rank::world])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


CASES = [*itertools.product(("if", "lif"), ("unrolled", "collapsed"), (False, True))]


def test_n_processes_compute_what_one_does(float64, tmp_path):
    """1, 2 and 4, with batch norm synchronized or frozen: every parameter, threshold and buffer."""

    def train_all(file):
        torch.set_default_dtype(torch.float64)
        distributed.join(torch.device("cpu"))
        states = [train(*case) for case in CASES]
        if distributed.rank() == 0:
            torch.save(states, file)

    one_process = [train(*case) for case in CASES]
    for n in (2, 4):
        results = side_by_side([partial(train_all, tmp_path / "states.pt")] * n, tmp_path)
        assert [status for status, _ in results] == [0] * n, results
        states = torch.load(tmp_path / "states.pt", weights_only=True)
        (tmp_path / "states.pt").unlink()
        for case, state, expected in zip(CASES, states, one_process):
            for key, value in state.items():
                message = f"{n} processes, {case} {key}"
                torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-12, msg=message)


@pytest.mark.parametrize(("start", "n"), [(launch, 2), (torchrun_script, 4)])
def test_a_run_of_several_processes(start, n, data, tmp_path, capfd):
    printed = start(n, [*data, *SMALL, "-c", str(tmp_path)], tmp_path)
    assert printed.count("epoch 2/2: loss") == 1 and printed.count("data: ") == 1
    log = (tmp_path / "imagefolder" / f"{STEM}.txt").read_text().splitlines()
    assert len(log) == 3
    saved = load(tmp_path)
    assert not any(key.startswith("module.") for key in saved["state_dict"])
    # The single-process program evaluates the checkpoint to the same accuracy, and goes on from it.
    single = partial(program, lr=0.1, processes=False)
    flags = [*data, *SMALL, "-c", str(tmp_path), "--resume", f"{STEM}.pth"]
    single([*flags, "--evaluate"])
    loss, top1 = re.search(r"test: loss ([\d.]+), top-1 ([\d.]+) %", capfd.readouterr().out).groups()
    assert float(top1) == pytest.approx(saved["acc"], abs=0.005)
    assert float(loss) == pytest.approx(float(log[2].split()[2]), abs=1e-4)
    single([*flags, "--epochs", "3"])
    assert "resumed from" in capfd.readouterr().out and load(tmp_path)["epoch"] == 3


def test_every_test_sample_counts_once(tmp_path):
    """1,003 samples: the same hits and loss for 1 to 4 processes, of which not all get equally many."""

    def count():
        device = distributed.join(torch.device("cpu"))
        torch.manual_seed(0)
        settings = dict(workers=0, pin_memory=False)
        samples = TensorDataset(torch.randn(1003, 12), torch.arange(1003) % 7)
        result, _ = evaluate(torch.nn.Linear(12, 7), make_loader(samples, batch_size=50, **settings), device)
        few = TensorDataset(torch.ones(1, 3, 32, 32), torch.ones(1).long())
        snn = create_model("preresnet.resnet20_if", timesteps=2, Vth=1.0, alpha=0.1)
        _, rates = evaluate(snn, make_loader(few, batch_size=1, **settings), device)
        assert len(rates) == 21 and max(rates.values()) > 0
        print(f"RESULT {result.loss:.12f} {result.top1 * 10.03:.6f} {result.top5 * 10.03:.6f}")

    results = []
    for n in (1, 2, 3, 4):
        (_, printed), *others = side_by_side([count] * n, tmp_path)
        assert all(status == 0 and "RESULT" not in printed for status, printed in others)
        results.append([float(figure) for figure in re.search(r"RESULT (.*)", printed)[1].split()])
    assert all(hits == pytest.approx(round(hits), abs=1e-4) for hits in results[0][1:])
    for loss, *hits in results[1:]:
        assert hits == results[0][1:] and loss == pytest.approx(results[0][0], abs=1e-6)


def test_two_machines_train_as_one(data, tmp_path):
    """Two launchers that meet on the loopback interface, one process each, against two without one."""
    meet = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "a"]
    meet += ["--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    command = [*meet, PROGRAM, *data, *SMALL, "-c", str(tmp_path / "two")]
    nodes = [torchrun(command, tmp_path / f"printed_{node}") for node in range(2)]
    assert [ended(node, 300) for node in nodes] == [0, 0]
    run(2, [*data, *SMALL, "-c", str(tmp_path / "one")], tmp_path)
    two, one = load(tmp_path / "two")["state_dict"], load(tmp_path / "one")["state_dict"]
    assert all(torch.equal(two[key], one[key]) for key in one)


def kill_one(folder, after_epoch, group):
    """SIGKILL one of the worker processes as soon as the checkpoint of an epoch is there. -> when"""
    file = folder / "imagefolder" / f"{STEM}.pth"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (file.exists() and load(folder)["epoch"] >= after_epoch):
        time.sleep(0.05)
    os.kill(chaos.family(group)[-1], signal.SIGKILL)
    return time.monotonic()


def test_a_killed_process(data, tmp_path):
    """With a restart the run goes on by itself. Without one left the others end within a minute."""
    flags = [*data, *SMALL, "--epochs", "6", "--resume", "auto", "-c", str(tmp_path / "out")]
    restarts = ["--nproc_per_node", "2", "--master_port", str(free_port()), "--max-restarts", "1"]
    launched = torchrun([*restarts, PROGRAM, *flags], tmp_path / "printed")
    kill_one(tmp_path / "out", 1, launched)
    killed = kill_one(tmp_path / "out", 3, launched)
    assert ended(launched, 100) != 0 and time.monotonic() - killed < 60
    printed = (tmp_path / "printed").read_text()
    # The launcher names the killed one or, if it was faster, the other, which lost it.
    assert re.search(r"rank\s*:\s*[01]", printed) and re.search("SIGKILL|remote worker", printed)
    run(2, flags, tmp_path)  # as if nothing had happened
    run(2, [*flags, "-c", str(tmp_path / "whole")], tmp_path)
    restarted, whole = load(tmp_path / "out"), load(tmp_path / "whole")
    assert all(torch.equal(restarted["state_dict"][k], v) for k, v in whole["state_dict"].items())
    assert restarted["epoch"] == 6 and len(restarted["log"]) == 6


def test_mistakes_get_one_line_from_rank_0(data, tmp_path):
    argv = [*data, *SMALL, "-c", str(tmp_path / "out")]
    mistakes = {
        "--train-batch 3": "total of 2 processes",
        "--train-batch 1": "total of 2 processes",
        f"--path {tmp_path}/nowhere": "nowhere",
        "--device cuda": "--device",
    }
    for flags, expected in mistakes.items():
        results = side_by_side([partial(program, [*argv, *flags.split()])] * 2, tmp_path)
        check_mistake(*results[0], expected)
        assert "Traceback" not in results[1][1]  # of the one that waits for the first
    command, printed = [PROGRAM, *argv, "--train-batch", "3"], tmp_path / "printed"
    status = ended(torchrun(["--standalone", "--nproc_per_node", "2", *command], printed), 100)
    check_mistake(status, printed.read_text(), "total of 2 processes")
    assert "[rank1]" not in printed.read_text()
    assert not (tmp_path / "out").exists()


def check_mistake(status, printed, expected):
    errors = [line for line in printed.splitlines() if "error: " in line and "torch" not in line]
    assert status != 0 and len(errors) == 1 and expected in errors[0], printed


def test_processes_with_different_arguments(data, tmp_path):
    argv = [*data, *SMALL, "-c", str(tmp_path)]
    differing = [partial(program, [*argv, "--tau", str(1 + rank)]) for rank in range(2)]
    check_mistake(*side_by_side(differing, tmp_path)[0], "different tau")


def test_machines_that_hold_different_things(data, images, tmp_path):
    """Data, then checkpoints: each machine has folders of its own, of the same names."""
    machines = [tmp_path / "first", tmp_path / "second"]
    for machine in machines:
        shutil.copytree(images, machine / "images")

    def start(machine):
        os.chdir(machine)
        program(["--dataset", "imagefolder", "--path", "images", *SMALL, "--resume", "auto", "-c", "out"])

    picture = min((machines[1] / "images" / "train").glob("*/*"))
    picture.rename(machines[1] / picture.name)
    actions = [partial(start, machine) for machine in machines]
    check_mistake(*side_by_side(actions, tmp_path)[0], "different data in images")
    (machines[1] / picture.name).rename(picture)
    run(1, [*data, *SMALL, "-c", str(machines[0] / "out")], tmp_path)
    check_mistake(*side_by_side(actions, tmp_path)[0], "different checkpoints")


def test_an_error_that_one_process_alone_meets(tmp_path):
    """The other, in a sum over both, says so; neither shows a traceback."""

    def action(_):
        distributed.join(torch.device("cpu"))
        time.sleep = lambda _: None
        if distributed.rank():
            raise UserError("this picture is damaged")
        distributed.total(torch.zeros(1))

    (status, first), (_, second) = side_by_side([partial(run_program, action)] * 2, tmp_path)
    check_mistake(status, first, "another process of this run has ended")
    assert "error: process 1: this picture is damaged" in second
    assert "Traceback" not in first + second


def test_a_plain_start_is_a_run_of_one_process(data, tmp_path):
    argv = [*data, *SMALL, "-c", str(tmp_path), "--epochs", "1", "--sync_bn"]
    assert ended(fork(partial(script, argv), tmp_path / "printed"), 100) == 0
    arguments = json.loads((tmp_path / "imagefolder" / f"{STEM}.json").read_text())
    assert arguments["lr"] == 0.05 and load(tmp_path)["epoch"] == 1

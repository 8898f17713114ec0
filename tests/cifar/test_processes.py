"""Several processes of one run, gloo on the CPU: the same numbers as one, and what happens when one dies."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.cifar import processes_worker

ROOT = Path(__file__).parents[2]
PROGRAM = str(ROOT / "cifar" / "main_multiple_gpus.py")
LAUNCH = [sys.executable, "-m", "torch.distributed.launch"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SMALL = "--model preresnet.resnet20_lif --timesteps 2 --Vth 0.3 --alpha 0.3 --delta_t 0.2 --device cpu"
SMALL = f"{SMALL} --epochs 2 --warmup 2 --manualSeed 1 --workers 0 --test-batch 2 --train-batch 4".split()
STEM = "preresnet.resnet20_lif"


def environment():
    return dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


def launch(launcher, n, *command, check=True):
    """Run the command in n processes. -> what was printed"""
    start = [*launcher, "--nproc_per_node", str(n), "--master_port", str(free_port()), *command]
    ended = subprocess.run(start, capture_output=True, text=True, timeout=300, env=environment())
    assert not check or ended.returncode == 0, ended.stderr
    return ended


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def load(folder, name=f"{STEM}.pth"):
    return torch.load(folder / "imagefolder" / name, weights_only=True)


@pytest.fixture
def data(images):
    return ["--dataset", "imagefolder", "--path", str(images)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    file = tmp_path_factory.mktemp("one") / "states.pt"
    launch(TORCHRUN, 1, processes_worker.__file__, str(file))
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("n", [2, 4])
def test_n_processes_compute_what_one_does(n, one_process, tmp_path):
    """With batch norm synchronized, or frozen: every parameter, threshold and buffer after 5 steps."""
    file = tmp_path / "states.pt"
    launch(TORCHRUN, n, processes_worker.__file__, str(file))
    states = torch.load(file, weights_only=True)
    assert states.keys() == one_process.keys() and len(states) == 8
    for case, state in states.items():
        for key, value in state.items():
            torch.testing.assert_close(
                value, one_process[case][key], rtol=1e-9, atol=1e-12, msg=f"{case} {key}"
            )


@pytest.mark.parametrize(("launcher", "n"), [(LAUNCH, 2), (TORCHRUN, 4)])
def test_a_run_of_several_processes(launcher, n, data, tmp_path, capsys):
    ended = launch(launcher, n, PROGRAM, *data, *SMALL, "-c", str(tmp_path))
    assert ended.stdout.count("epoch 2/2: loss") == 1 and ended.stdout.count("data: ") == 1
    log = (tmp_path / "imagefolder" / f"{STEM}.txt").read_text().splitlines()
    assert len(log) == 3
    saved = load(tmp_path)
    assert not any(key.startswith("module.") for key in saved["state_dict"])
    # The single-process program evaluates the checkpoint to the same accuracy, and goes on from it.
    single = [sys.executable, str(ROOT / "cifar" / "main_single_gpu.py"), *data, *SMALL, "-c", str(tmp_path)]
    single += ["--resume", f"{STEM}.pth"]
    evaluated = subprocess.run([*single, "--evaluate"], capture_output=True, text=True, env=environment())
    loss, top1 = re.search(r"test: loss ([\d.]+), top-1 ([\d.]+) %", evaluated.stdout).groups()
    assert float(top1) == pytest.approx(saved["acc"], abs=0.005)
    assert float(loss) == pytest.approx(float(log[2].split()[2]), abs=1e-4)
    further = subprocess.run([*single, "--epochs", "3"], capture_output=True, text=True, env=environment())
    assert "resumed from" in further.stdout and load(tmp_path)["epoch"] == 3, further.stderr


def test_every_test_sample_counts_once(tmp_path):
    """1,003 samples: the same hits and loss for 1, 2, 3 processes, of which not all get equally many."""
    script = tmp_path / "evaluate.py"
    script.write_text(
        "import sys, torch\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from models import create_model\n"
        "from utils import distributed\n"
        "from utils.data import test_loader\n"
        "from utils.training import evaluate\n"
        "device = distributed.join(torch.device('cpu'))\n"
        "torch.manual_seed(0)\n"
        "samples = torch.utils.data.TensorDataset(torch.randn(1003, 12), torch.arange(1003) % 7)\n"
        "loader = test_loader(samples, batch_size=50, workers=0, pin_memory=False)\n"
        "result, _ = evaluate(torch.nn.Linear(12, 7), loader, device)\n"
        "few = torch.utils.data.TensorDataset(torch.ones(1, 3, 32, 32), torch.ones(1).long())\n"
        "snn = create_model('preresnet.resnet20_if', timesteps=2, Vth=1.0, alpha=0.1)\n"
        "_, rates = evaluate(snn, test_loader(few, batch_size=1, workers=0, pin_memory=False), device)\n"
        "assert len(rates) == 21 and max(rates.values()) > 0\n"
        "print(f'RESULT {result.loss:.12f} {result.top1 * 10.03:.6f} {result.top5 * 10.03:.6f}')\n"
    )
    results = []
    for n in (1, 2, 3, 4):
        (line,) = re.findall(r"RESULT (.*)", launch(TORCHRUN, n, str(script)).stdout)
        results.append([float(figure) for figure in line.split()])
    assert all(hits == pytest.approx(round(hits), abs=1e-4) for hits in results[0][1:])
    for loss, *hits in results[1:]:
        assert hits == results[0][1:] and loss == pytest.approx(results[0][0], abs=1e-6)


def test_two_machines_train_as_one(data, tmp_path):
    """Two launchers that meet on the loopback interface, one process each, against one launcher with two."""
    port = str(free_port())
    meet = [*TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "a"]
    command = [
        *meet,
        "--rdzv_endpoint",
        f"127.0.0.1:{port}",
        PROGRAM,
        *data,
        *SMALL,
        "-c",
        str(tmp_path / "two"),
    ]
    nodes = [subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [node.wait(timeout=300) for node in nodes] == [0, 0]
    launch(TORCHRUN, 2, PROGRAM, *data, *SMALL, "-c", str(tmp_path / "one"))
    two, one = load(tmp_path / "two")["state_dict"], load(tmp_path / "one")["state_dict"]
    assert all(torch.equal(two[key], one[key]) for key in one)


def kill_one(folder, after_epoch, group):
    """SIGKILL one of the worker processes as soon as the checkpoint of an epoch is there. -> when"""
    file = folder / "imagefolder" / f"{STEM}.pth"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (file.exists() and load(folder)["epoch"] >= after_epoch):
        time.sleep(0.05)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(group)], capture_output=True, text=True
    ).stdout
    os.kill(int(children.split()[-1]), signal.SIGKILL)
    return time.monotonic()


def test_a_killed_process(data, tmp_path):
    """The others end within a minute; with restarts the run goes on by itself, as if nothing had happened."""
    flags = [*data, *SMALL, "--epochs", "6", "--resume", "auto"]
    plain = [*TORCHRUN, "--nproc_per_node", "2", "--master_port"]
    command = [*plain, str(free_port()), PROGRAM, *flags, "-c", str(tmp_path / "dies")]
    run = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    killed = kill_one(tmp_path / "dies", 1, run.pid)
    _, err = run.communicate(timeout=100)
    assert run.returncode != 0 and time.monotonic() - killed < 60
    assert re.search(r"rank\s*:\s*[01]", err) and "SIGKILL" in err
    command = [
        *plain,
        str(free_port()),
        "--max-restarts",
        "2",
        PROGRAM,
        *flags,
        "-c",
        str(tmp_path / "restarts"),
    ]
    run = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    kill_one(tmp_path / "restarts", 2, run.pid)
    assert run.wait(timeout=200) == 0
    launch(TORCHRUN, 2, PROGRAM, *flags, "-c", str(tmp_path / "whole"))
    restarted, whole = load(tmp_path / "restarts"), load(tmp_path / "whole")
    assert all(torch.equal(restarted["state_dict"][k], v) for k, v in whole["state_dict"].items())
    assert restarted["epoch"] == 6 and len(restarted["log"]) == 6


def test_mistakes_get_one_line_from_rank_0(data, tmp_path):
    for flags, expected in (
        (["--train-batch", "3"], "total of 2 processes"),
        (["--train-batch", "1"], "total of 2 processes"),
        (["--path", str(tmp_path / "nowhere")], "nowhere"),
        (["--device", "cuda"], "--device"),
    ):
        ended = launch(TORCHRUN, 2, PROGRAM, *data, *SMALL, "-c", str(tmp_path / "out"), *flags, check=False)
        errors = [line for line in ended.stderr.splitlines() if "error: " in line and "torch" not in line]
        assert ended.returncode != 0 and len(errors) == 1 and expected in errors[0], ended.stderr
        assert "[rank1]" not in ended.stderr  # no traceback of the one that waits for the first
    assert not (tmp_path / "out").exists()


def test_processes_with_different_arguments(data, tmp_path):
    port, runs = str(free_port()), []
    for rank in range(2):
        joined = dict(environment(), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_PORT=port)
        command = [sys.executable, PROGRAM, *data, *SMALL, "-c", str(tmp_path), "--tau", str(1 + rank)]
        joined["MASTER_ADDR"] = "127.0.0.1"
        runs.append(subprocess.Popen(command, env=joined, stderr=subprocess.PIPE, text=True))
    errors = [run.communicate(timeout=100)[1] for run in runs]
    assert all(run.returncode == 1 for run in runs)
    assert "different tau" in errors[0] and errors[0].count("error:") == 1


def test_a_plain_start_is_a_run_of_one_process(data, tmp_path):
    command = [sys.executable, PROGRAM, *data, *SMALL, "-c", str(tmp_path), "--epochs", "1", "--sync_bn"]
    subprocess.run(command, check=True, env=environment(), capture_output=True)
    arguments = json.loads((tmp_path / "imagefolder" / f"{STEM}.json").read_text())
    assert arguments["lr"] == 0.05 and load(tmp_path)["epoch"] == 1

"""The ImageNet program as a user meets it: the chain, launch styles, resuming, one line for every mistake.

But for the published commands and the launch styles, the networks are thin (see `thin`).
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imagenet.main import get_parser, main
from models import create_model, registry
from tests.imagenet import thin
from tests.imagenet.images import make_images
from utils.cli import run_program

ROOT = Path(__file__).parents[2]
MAIN = str(ROOT / "imagenet" / "main.py")
IF, ANN = "preresnet_snn.resnet18_if", "preresnet_ann.resnet18"
SIZES = "--image_size 32 --batch-size 4 --epochs 1 --timesteps 2 -j 0"
ALIVE = "--Vth 0.5 --Vth_bound 0.01 --alpha 0.3"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working directory with ./data/imagenet: 3 classes, 12 training and 7 validation images."""
    folder = tmp_path_factory.mktemp("home")
    make_images(folder / "data" / "imagenet", train=4, val=(3, 2, 2))
    return folder


@pytest.fixture
def program(home, tmp_path, monkeypatch):
    """Run the program with thin networks in this process; -> the folder of the run's files."""

    def run(flags="", out="out"):
        fixed = f"--data {home}/data/imagenet -c {tmp_path / out} --seed 1 --device cpu {SIZES} {ALIVE}"
        monkeypatch.setattr(registry, "NETWORKS", registry.NETWORKS | thin.NETWORKS)
        run_program(main, shlex.split(f"{fixed} {flags}"))
        return tmp_path / out / "imagenet"

    return run


def load(path):
    return torch.load(path, weights_only=True)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def environment(**more):
    return dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="") | more


def finish(*command, cwd, **more):
    settings = dict(capture_output=True, text=True, timeout=300, env=environment(**more))
    ended = subprocess.run([*map(str, command)], cwd=cwd, **settings)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def published_commands():
    """As in the paper's repository; see the program's docstring and its read-me."""
    return [
        "imagenet/main.py --arch preresnet_ann.resnet18 --data ./data/imagenet --name model_ann "
        "--optimizer SGD --wd 1e-4 --batch-size 256 --lr 0.1",
        "imagenet/main.py --arch preresnet_cal_Vth.resnet18 --data ./data/imagenet "
        "--pre_train model_ann.pth --calculate_Vth resnet18_Vth",
        "imagenet/main.py --dist-url tcp://127.0.0.1:20500 --dist-backend nccl --multiprocessing-distributed "
        "--world-size 1 --rank 0 --arch preresnet_snn.resnet18_if --data ./data/imagenet "
        "--pre_train model_ann.pth --load_Vth resnet18_Vth.dict",
    ]


def test_the_published_chain(home):
    """The three commands as written, but for the sizes (and a free port): the last in two processes."""
    port = f"127.0.0.1:{free_port()}"
    commands = [command.replace("127.0.0.1:20500", port).split() for command in published_commands()]
    outputs = [finish(sys.executable, ROOT / c[0], *c[1:], *SIZES.split(), cwd=home) for c in commands]
    folder = home / "checkpoint" / "imagenet"
    for output, stem in ((outputs[0], "model_ann"), (outputs[2], IF)):
        assert output.count("data: imagenet, 12 training, 7 test, 3 classes") == 1
        assert output.count("epoch 1/1: loss") == 1
        for ending in (".pth", "_best.pth", ".txt", ".pdf", ".json"):
            assert (folder / (stem + ending)).is_file()
    ann, snn = load(folder / "model_ann.pth"), load(folder / f"{IF}.pth")
    for saved, arch in ((ann, ANN), (snn, IF)):
        assert saved["arch"] == arch and saved["epoch"] == 1 and saved["best_acc1"] >= saved["acc1"]
        hits = saved["acc1"] * 7 / 100  # each of the 7 images counted once
        assert hits == pytest.approx(round(hits)) and saved.keys() >= {"state_dict", "optimizer"}
    thresholds = load(folder / "resnet18_Vth.dict")
    assert len(thresholds) == 20 and {"storein1", "storein4", "layer4[1].storein2"} < thresholds.keys()
    for name, value in thresholds.items():
        assert f"{name:24} {value:10.4f}" in outputs[1]
    # One epoch of three iterations, of which Adam moves a threshold by at most the warm learning rate.
    moved = abs(snn["state_dict"]["layer2.0.relu1.Vth"] - thresholds["layer2[0].storein1"])
    assert moved < 3 * 0.001 * 3 / 5000
    assert set(snn["state_dict"]) - set(ann["state_dict"]) == {
        key for key in snn["state_dict"] if key.endswith(".Vth")
    }


def test_torchrun_and_two_machines_count_every_image_once(home, tmp_path):
    """One process; torchrun with the published env://; two starts that meet on the loopback interface."""
    torch.manual_seed(0)
    model = create_model(ANN, num_classes=3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "ann.pth")
    flags = [*f"-a {ANN} --pre_train {tmp_path}/ann.pth -e".split(), *SIZES.split()]
    expected = finish(sys.executable, MAIN, *flags, cwd=home).splitlines()[-1]
    assert re.fullmatch(r"test: loss [\d.]+, top-1 [\d.]+ %, top-5 [\d.]+ %", expected)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--master_port"]
    command = [*torchrun, free_port(), MAIN, *flags, "--dist-url", "env://"]
    assert finish(*command, cwd=home).splitlines()[-1] == expected
    meet = ["--dist-url", f"tcp://127.0.0.1:{free_port()}", "--world-size", "2", "--dist-backend", "gloo"]
    command = [sys.executable, MAIN, *flags, *meet, "--rank"]
    settings = dict(cwd=home, env=environment(), text=True, stdout=subprocess.PIPE)
    nodes = [subprocess.Popen([*command, str(rank)], **settings) for rank in (0, 1)]
    printed = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0] and printed[1] == ""
    assert printed[0].splitlines()[-1] == expected


LAUNCHES = {
    "--multiprocessing-distributed --cpu_processes 3": "--standalone --nproc_per_node 3",
    "--multiprocessing-distributed --world-size 1 --rank 0 --dist-url tcp://127.0.0.1:20500": (
        "--nnodes 1 --master_addr 127.0.0.1 --master_port 20500 --nproc_per_node 2"
    ),
    "--world-size 3 --rank 2 --dist-url tcp://host:1": (
        "--nnodes 3 --node_rank 2 --master_addr host --master_port 1 --nproc_per_node 1"
    ),
    "--multiprocessing-distributed --dist-url env://": (
        "--nnodes 4 --node_rank 1 --master_addr there --master_port 7 --nproc_per_node 2"
    ),
}


@pytest.mark.parametrize("flags", LAUNCHES)
def test_launch_styles(flags, monkeypatch):
    started = []
    monkeypatch.setattr("torch.distributed.run.main", started.append)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for name, value in dict(WORLD_SIZE=4, RANK=1, MASTER_ADDR="there", MASTER_PORT=7).items():
        monkeypatch.setenv(name, str(value))
    main([*flags.split(), "--device", "cpu"])
    assert started == [[*LAUNCHES[flags].split(), MAIN, *flags.split(), "--device", "cpu"]]


def test_published_defaults():
    args = vars(get_parser().parse([]))
    published = dict(path="./data/imagenet", checkpoint="./checkpoint", model=IF, workers=4, epochs=90)
    published |= dict(start_epoch=0, train_batch=144, lr=0.001, momentum=0.9, weight_decay=0.0)
    published |= dict(print_freq=1000, resume="", pre_train="", evaluate=False, world_size=-1, rank=-1)
    published |= dict(dist_url="tcp://224.66.41.62:23456", dist_backend="nccl", manualSeed=None, gpu=None)
    published |= dict(warmup=5000, calculate_Vth="", load_Vth="", multiprocessing_distributed=False)
    published |= dict(optimizer="adam", name="", timesteps=50, Vth=6.0, tau=1.0, delta_t=0.05, alpha=0.5)
    published |= dict(train_Vth=1, Vth_bound=0.01, rate_stat=0)
    assert {key: args[key] for key in published} == published
    spelled = (
        "--data d -c c -a preresnet_ann.preresnet50 -j 1 --epochs 2 --start-epoch 1 -b 3 --learning-rate 1"
    )
    spelled += " --momentum 0 --wd 1 -p 5 --resume r --pre_train p -e --world-size 2 --rank 1 --dist-url u"
    spelled += " --dist-backend gloo --seed 3 --gpu 0 --warmup 1 --calculate_Vth n --load_Vth v --name m"
    spelled += " --multiprocessing-distributed --optimizer SGD --rate_stat 1"
    changed = vars(get_parser().parse(spelled.split()))
    assert not [key for key in published if changed[key] == published[key]] != sorted(
        ["timesteps", "Vth", "tau", "delta_t", "alpha", "train_Vth", "Vth_bound"], key=[*published].index
    )
    weights = create_model(IF, num_classes=2)
    assert weights.relu1.Vth_grad_scale == 0.001
    assert create_model("preresnet_snn.resnet18_lif", num_classes=2).relu1.Vth_grad_scale == 1

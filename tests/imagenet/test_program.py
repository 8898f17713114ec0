"""The ImageNet program as a user meets it: the chain, launch styles, resuming, one line for every mistake.

But for the published commands and the launch styles, the networks are thin (see `thin`).
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from imagenet.main import get_parser, main
from models import create_model, registry
from tests.forks import ended, fork, free_port, torchrun
from tests.imagenet import thin
from tests.imagenet.images import make_images
from utils.cli import UserError, run_program
from utils.data import load_data

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


def published_commands():
    """As in the read-me of the authors' repository."""
    return [
        "imagenet/main.py --arch preresnet_ann.resnet18 --data ./data/imagenet --name model_ann "
        "--optimizer SGD --wd 1e-4 --batch-size 256 --lr 0.1",
        "imagenet/main.py --arch preresnet_cal_Vth.resnet18 --data ./data/imagenet "
        "--pre_train model_ann.pth --calculate_Vth resnet18_Vth",
        "imagenet/main.py --dist-url tcp://127.0.0.1:20500 --dist-backend nccl --multiprocessing-distributed "
        "--world-size 1 --rank 0 --arch preresnet_snn.resnet18_if --data ./data/imagenet "
        "--pre_train model_ann.pth --load_Vth resnet18_Vth.dict",
    ]


def test_the_read_me_gives_the_published_commands():
    lines = (ROOT / "imagenet" / "README.md").read_text().splitlines()
    assert all(f"python {command}" in lines for command in published_commands())
    for line in lines:
        if line.startswith("python imagenet/main.py"):
            assert get_parser().parse(line.split()[2:]).path == "./data/imagenet"


def test_the_published_chain(home, monkeypatch):
    """The three commands as written, but for the sizes (and a free port): the last in two processes.

    It is started as a user does; the others are forked.
    """
    port = f"127.0.0.1:{free_port()}"
    commands = [command.replace("127.0.0.1:20500", port).split() for command in published_commands()]
    small = [*SIZES.split(), "--seed", "3"]  # after three steps, not every seed gives a logit above 0
    monkeypatch.chdir(home)
    *forked, (script, *last) = commands
    outputs = []
    for _, *flags in forked:
        action = partial(run_program, main, [*flags, *small])
        assert ended(fork(action, home / "printed", CUDA_VISIBLE_DEVICES=""), 100) == 0
        outputs.append((home / "printed").read_text())
    outputs.append(finish(sys.executable, ROOT / script, *last, *small, cwd=home))
    folder = home / "checkpoint" / "imagenet"
    for output in outputs:
        assert output.count("data: imagenet, 12 training, 7 test, 3 classes") == 1
    for output, stem in ((outputs[0], "model_ann"), (outputs[2], IF)):
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


def test_torchrun_and_two_machines_count_every_image_once(home, tmp_path, monkeypatch, capsys):
    """One process; torchrun with the published env://; two starts that meet on the loopback interface."""
    torch.manual_seed(0)
    model = create_model(ANN, num_classes=3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "ann.pth")
    flags = f"-a {ANN} --pre_train {tmp_path}/ann.pth -e --device cpu {SIZES}".split()
    monkeypatch.chdir(home)
    main(flags)
    expected = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"test: loss [\d.]+, top-1 [\d.]+ %, top-5 [\d.]+ %", expected)
    printed = [tmp_path / name for name in ("torchrun", "first", "second")]
    command = ["--standalone", "--nproc_per_node", "1", MAIN, *flags, "--dist-url", "env://"]
    meet = [*flags, "--dist-url", f"tcp://127.0.0.1:{free_port()}", "--world-size", "2", "--dist-backend"]
    meet += ["gloo", "--rank"]
    launched = [torchrun(command, printed[0])]
    nodes = zip(("0", "1"), printed[1:])
    launched += [fork(partial(run_program, main, [*meet, rank]), output) for rank, output in nodes]
    assert [ended(pid, 200) for pid in launched] == [0, 0, 0]
    for output in printed[:2]:
        assert output.read_text().splitlines().count(expected) == 1
    assert not re.search("^(data|test): ", printed[2].read_text(), re.MULTILINE)  # rank 0 speaks for all


LAUNCHES = {
    "--multiprocessing-distributed --cpu_processes 3": "--standalone --nproc_per_node 3",
    "--multiprocessing-distributed --world-size 1 --rank 0 --dist-url tcp://127.0.0.1:20500": (
        "--nnodes 1 --node_rank 0 --master_addr 127.0.0.1 --master_port 20500 --nproc_per_node 2"
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
    patience = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # torchrun's, with 30 s: less than a step on a CPU may take
    monkeypatch.setenv(patience, "")
    monkeypatch.delenv(patience)
    main([*flags.split(), "--device", "cpu"])
    signals = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]  # torchrun's own, and Slurm's
    assert started == [[*LAUNCHES[flags].split(), *signals, MAIN, *flags.split(), "--device", "cpu"]]
    assert os.environ[patience] == "3600"


def test_a_launcher_whose_numbers_are_none(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE, RANK: .*'two'"):
        main(["--multiprocessing-distributed", "--dist-url", "env://"])


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
    spelled = "--data d -c c -a preresnet_ann.preresnet50 -j 1 --epochs 2 --start-epoch 1 -b 3"
    spelled += " --learning-rate 1 --momentum 0 --wd 1 -p 5 --resume r --pre_train p -e --world-size 2"
    spelled += " --rank 1 --dist-url u --dist-backend gloo --seed 3 --gpu 0 --warmup 1 --calculate_Vth n"
    spelled += " --load_Vth v --name m --multiprocessing-distributed --optimizer SGD --rate_stat 1"
    spelled += " --timesteps 1 --Vth 1 --tau 2 --delta_t 1 --alpha 1 --train_Vth 0 --Vth_bound 1"
    changed = vars(get_parser().parse(spelled.split()))
    assert not [key for key in published if changed[key] == published[key]]
    assert create_model(IF, num_classes=2).relu1.Vth_grad_scale == 0.001
    assert create_model("preresnet_snn.resnet18_lif", num_classes=2).relu1.Vth_grad_scale == 1


def official(name, path, prefix="", **figures):
    """A checkpoint as the official code writes it, of the thin network `name`. -> its weights"""
    torch.manual_seed(5)
    model = create_model(name, num_classes=3, timesteps=2, Vth=0.5)
    optimizer = torch.optim.Adam(model.parameters(), 0.001)
    state = {prefix + key: value for key, value in model.state_dict().items()}
    content = dict(epoch=1, arch=name, state_dict=state, optimizer=optimizer.state_dict()) | figures
    torch.save(content, path)
    return model.state_dict()


@pytest.mark.parametrize("prefix", ["", "module."])
def test_official_checkpoints_load(prefix, program, tmp_path, monkeypatch, capsys):
    """Figures in tensors of one element, keys with or without `module.`: by --resume and by --pre_train."""
    monkeypatch.setattr(registry, "NETWORKS", registry.NETWORKS | thin.NETWORKS)
    figures = dict(best_acc1=torch.tensor(50.0), acc1=torch.tensor([40.0]))
    official(IF, tmp_path / "snn.pth", prefix, **figures)
    folder = program(f"--resume {tmp_path}/snn.pth --epochs 2")
    assert "1 epochs, best top-1 50.00 %" in capsys.readouterr().out
    saved = load(folder / f"{IF}.pth")
    assert saved["epoch"] == 2 and not any(key.startswith("module.") for key in saved["state_dict"])
    weights = official(ANN, tmp_path / "ann.pth", prefix, **figures)
    folder = program(f"--pre_train {tmp_path}/ann.pth --optimizer SGD --lr 1e-30", out="pre")
    state = load(folder / f"{IF}.pth")["state_dict"]
    learned = [key for key in weights if key.endswith(("weight", "bias"))]
    assert all((state[key] - weights[key]).abs().max() < 1e-20 for key in learned)


def test_evaluation_of_a_converted_network(program, capsys):
    """`-e` straight after conversion; thresholds that are not trained stay those of the file."""
    folder = program(f"-a {ANN} --name ann")
    program("-a preresnet_cal_Vth.resnet18 --pre_train ann.pth --calculate_Vth Vth --calibrate_batches 2")
    assert "thresholds of 8 images of train" in capsys.readouterr().out
    program("-e --pre_train ann.pth --load_Vth Vth.dict --timesteps 16")
    printed = capsys.readouterr()
    assert re.fullmatch(r"test: loss [\d.]+, top-1 [\d.]+ %, top-5 100.00 %", printed.out.splitlines()[-1])
    assert "not trained" not in printed.err and not (folder / f"{IF}.pth").exists()
    thresholds = load(folder / "Vth.dict")
    program("--pre_train ann.pth --load_Vth Vth.dict --train_Vth 0 --lr 0.1")
    state = load(folder / f"{IF}.pth")["state_dict"]
    assert state["relu2.Vth"] == thresholds["storein2"]
    assert state["layer1.0.relu2.Vth"] == thresholds["layer1[0].storein2"]
    program("-a preresnet_snn.resnet18_lif --pre_train ann.pth --load_Vth Vth.dict --train_Vth 0 --lr 0.1")
    state = load(folder / "preresnet_snn.resnet18_lif.pth")["state_dict"]
    assert state["relu2.Vth"].item() == pytest.approx(thresholds["storein2"].item() * 0.05)


def test_calibration_reads_a_fixed_choice_of_training_images(program):
    """The same for any batch size; validation images only if asked for."""
    folder = program(f"-a {ANN} --name ann")
    base = "-a preresnet_cal_Vth.resnet18 --pre_train ann.pth --calculate_Vth"
    program(f"{base} a --calibrate_batches 4 -b 2")
    program(f"{base} b --calibrate_batches 1 -b 8")
    program(f"{base} c --calibrate_batches 9 -b 8")
    program(f"{base} d.dict --calibrate_split val")
    files = [load(folder / f"{name}.dict") for name in "abcd"]
    for name, value in files[0].items():
        assert value.item() == pytest.approx(files[1][name].item(), rel=1e-5)
    assert len({thresholds["storein1"].item() for thresholds in files[1:]}) == 3


def test_calibration_by_the_least_error_fits_the_time_steps(program):
    """Thresholds for few steps differ from those for many, and a network starts from them."""
    folder = program(f"-a {ANN} --name ann")
    base = "-a preresnet_cal_Vth.resnet18 --pre_train ann.pth --calibrate_by error --calibrate_batches 2"
    program(f"{base} --calculate_Vth a --timesteps 2")
    program(f"{base} --calculate_Vth b --timesteps 16")
    program(f"{base} --calculate_Vth c --timesteps 16 --calibrate_neuron lif")
    few, many, lif = (load(folder / f"{name}.dict") for name in "abc")
    assert few.keys() == many.keys() == lif.keys() and len(few) == 12
    assert all(value > 0 for file in (few, many, lif) for value in file.values())
    assert few["storein2"] != many["storein2"]
    program("-e --pre_train ann.pth --load_Vth b.dict --timesteps 16")


def test_learning_rate_of_the_second_epoch_is_not_warmed_up(program):
    """0.5*lr*(1+cos(pi*1/2)) in the second of two epochs, though but 5 of 5000 warm-up steps are done."""
    folder = program("--epochs 2 --save_every 2 --lr 0.01")
    middle = load(folder / f"{IF}_previous.pth")
    assert (middle["epoch"], middle["iteration"]) == (1, 2)
    assert middle["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.005, rel=1e-12)


def test_other_image_sizes(program, home, capsys):
    """The resize side is in proportion 256/224, whatever the size and the colour mode."""
    for size, side in ((224, 256), (64, 73), (160, 183)):
        data = load_data("imagenet", home / "data" / "imagenet", image_size=size)
        assert data.test.transform.transforms[0].size == side
        assert {data.test[i][0].shape for i in range(3)} == {(3, size, size)}  # RGB, gray, CMYK
        assert data.train[1][0].shape == (3, size, size)
    assert (program("--image_size 65") / f"{IF}.pth").is_file()
    program(f"--evaluate --resume {IF}.pth --image_size 64")
    assert "was trained with image_size 65, now 64" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_within_an_epoch_and_resumed(workers, program, tmp_path):
    """SIGKILL once a checkpoint of the middle of the second epoch is there: the same weights, bit for bit."""
    make_images(tmp_path / "more", train=16, val=(1, 1, 1))
    flags = f"--data {tmp_path}/more --epochs 2 --batch-size 2"
    whole = load(program(flags, out="whole") / f"{IF}.pth")
    file = tmp_path / "killed" / "imagenet" / f"{IF}.pth"
    again = f"{flags} -j {workers} --save_every 1"
    pid = fork(lambda: program(again, out="killed"), tmp_path / "printed")
    progress = (0, 0)
    while progress < (1, 2) and os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(0.02)
        progress = (load(file)["epoch"], load(file)["iteration"]) if file.exists() else progress
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    stopped = load(file)
    assert stopped["epoch"] == 1 and 2 <= stopped["iteration"] < 24
    program(f"{again} --resume auto", out="killed")
    resumed = load(file)
    assert resumed["epoch"] == 2 and same(resumed["state_dict"], whole["state_dict"])
    assert not torch.equal(resumed["state_dict"]["conv1.weight"], stopped["state_dict"]["conv1.weight"])
    assert resumed["log"] == [pytest.approx(row) for row in whole["log"]]


MISTAKES = {
    "--data {tmp}/nowhere": "{tmp}/nowhere/train",
    "--data {tmp}/no_val": "{tmp}/no_val/val",
    "--data {tmp}/no_train": "{tmp}/no_train/train",
    "--data {tmp}/differing": "n04",
    "--data {tmp}/truncated": "train/n02/bad.JPEG",
    "--data {tmp}/truncated -j 1": "train/n02/bad.JPEG",
    "--data {tmp}/truncated_val -e": "val/n02/bad.JPEG",
    "--load_Vth nothing.dict": "nothing.dict",
    "--load_Vth {tmp}/other.dict": "layer1[1].storein1 is unknown",
    "--load_Vth {tmp}/missing.dict": "storein3 is missing",
    "--load_Vth {tmp}/zero.dict": "storein1 is no positive number",
    "--load_Vth {tmp}/nan.dict": "storein1 is no positive number",
    "--load_Vth {tmp}/text.pth": "text.pth",
    "--load_Vth {tmp}/good.dict -a preresnet_ann.resnet18": "an ANN",
    "--pre_train nothing.pth": "nothing.pth",
    "--pre_train {tmp}/text.pth": "text.pth",
    "--pre_train {tmp}/truncated.pth": "truncated.pth",
    "--pre_train {tmp}/classes.pth": "bn3.bias is [5] instead of [3]",
    "--pre_train {tmp}/deeper.pth": "layer1.1.bn1.bias is unknown",
    "--pre_train {tmp}/headless.pth": "fc.weight is missing",
    "--pre_train {tmp}/good.dict": "no state_dict",
    "--resume {tmp}/text.pth": "text.pth",
    "--resume {tmp}/truncated.pth": "truncated.pth",
    "--resume {tmp}/headless.pth": "best_acc1",
    "--resume {tmp}/classes.pth": "checkpoint of preresnet_ann.resnet18",
    "--calculate_Vth name": "--pre_train",
    "--calculate_Vth name --pre_train {tmp}/headless.pth": "--arch preresnet_cal_Vth",
    "--calculate_Vth name --pre_train {tmp}/dead.pth -a preresnet_cal_Vth.resnet18": "storein4",
    "--calculate_Vth a/b --pre_train {tmp}/dead.pth -a preresnet_cal_Vth.resnet18": "--calculate_Vth",
    "--dist-url tcp://127.0.0.1 --multiprocessing-distributed": "--dist-url",
    "--dist-url 127.0.0.1:20500 --multiprocessing-distributed": "tcp://HOST:PORT",
    "--dist-url tcp://127.0.0.1:99999 --multiprocessing-distributed": "--dist-url",
    "--dist-url tcp://127.0.0.1:{port} --multiprocessing-distributed": "--dist-url",
    "--world-size 2 --rank 2 --dist-url tcp://127.0.0.1:20500": "--rank 0 to 1",
    "--world-size 2 --dist-url tcp://127.0.0.1:20500": "--rank 0 to 1",
    "--world-size 2 --rank 0": "--dist-url",
    "--world-size 1 --rank 1 --multiprocessing-distributed": "--rank 1",
    "--dist-backend mpi": "--dist-backend",
    "--gpu 0": "--gpu 0",
    "--gpu -1": "--gpu",
    "--arch resnet18": "preresnet_snn.resnet18_if",
    "--image_size 8": "--image_size",
    "--timesteps 0": "--timesteps",
    "--optimizer rmsprop": "sgd",
    "--name a/b": "--name",
    "--Vth 0.001": "--Vth_bound",
    "--checkpoint {tmp}/text.pth/below": "--checkpoint",
}


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    """A folder of damaged data sets and files."""
    tmp = tmp_path_factory.mktemp("mistakes")
    for name in ("no_val", "no_train", "differing", "truncated", "truncated_val"):
        make_images(tmp / name, train=2, val=(1, 1, 1))
    (tmp / "no_val" / "val").rename(tmp / "elsewhere")
    (tmp / "no_train" / "train").rename(tmp / "away")
    (tmp / "differing" / "val" / "n03").rename(tmp / "differing" / "val" / "n04")
    whole = (tmp / "differing" / "train" / "n01" / "0.JPEG").read_bytes()
    for name, split in (("truncated", "train"), ("truncated_val", "val")):
        (tmp / name / split / "n02" / "bad.JPEG").write_bytes(whole[: len(whole) // 2])
    (tmp / "text.pth").write_text("hello")
    blocks = [f"layer{stage}[0].storein{i}" for stage in (1, 2, 3, 4) for i in (1, 2)]
    good = {name: (torch.tensor(1.0),) for name in blocks}
    good |= {f"storein{i}": torch.tensor(1.0) for i in (1, 2, 3, 4)}
    torch.save(good, tmp / "good.dict")
    torch.save(good | {"layer1[1].storein1": (torch.tensor(1.0),)}, tmp / "other.dict")
    torch.save({name: value for name, value in good.items() if name != "storein3"}, tmp / "missing.dict")
    torch.save(good | {"storein1": torch.tensor(0.0)}, tmp / "zero.dict")
    torch.save(good | {"storein1": torch.tensor(float("nan"))}, tmp / "nan.dict")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "NETWORKS", registry.NETWORKS | thin.NETWORKS)
        state = create_model(ANN, num_classes=3).state_dict()
        classes = create_model(ANN, num_classes=5).state_dict()
    deeper = state | {f"layer1.1.bn1.{kind}": torch.ones(8) for kind in ("weight", "bias")}
    dead = state | {"bn3.weight": torch.zeros(3), "bn3.bias": -torch.ones(3)}
    headless = {key: value for key, value in state.items() if not key.startswith("fc")}
    for name, weights in (("classes", classes), ("deeper", deeper), ("dead", dead)):
        torch.save(dict(epoch=1, arch=ANN, acc1=1.0, best_acc1=1.0, state_dict=weights), tmp / f"{name}.pth")
    torch.save({"state_dict": headless}, tmp / "headless.pth")
    whole = (tmp / "classes.pth").read_bytes()
    (tmp / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    return tmp


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_gets_one_line(flags, program, mistakes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        fill = {"{tmp}": str(mistakes), "{port}": str(taken.getsockname()[1])}
        mended, named = flags, MISTAKES[flags]
        for hole, text in fill.items():
            mended, named = mended.replace(hole, text), named.replace(hole, text)
        with pytest.raises(SystemExit) as end:
            program(mended)
    message = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err
    assert end.value.code not in (0, None)
    assert message.startswith("error: ") and len(message.strip().splitlines()) == 1 and named in message
    assert not [*tmp_path.glob("out/imagenet/*.pth"), *tmp_path.glob("out/imagenet/*.dict")]

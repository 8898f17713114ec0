"""What a GPU must show: `python -m pytest -m gpu`, in some two minutes. Without CUDA one line says: skipped.

The figures of the authors' implementation and the comparison of the two backward passes are the tests of
tests/models, run here on the GPU. DSR_TEST_DEVICE=cpu tries the logic of these tests where there is none.
"""

import copy
import gc
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import LIFNeuron, create_model
from models.engines.dense import DenseEngine, Spikes
from models.layers import spiking_layer
from models.trains import SpikeTrain
from tests.imagenet.images import make_images
from tests.models import test_collapsed
from tests.models.test_collapsed import (  # noqa: F401
    test_every_kind_of_branch,
    test_frozen_batch_norms_and_thresholds,
    test_imagenet_networks,
    test_narrow_resnet,
    test_nothing_of_size_T_is_kept_for_the_backward_pass,
    test_wide_networks,
)
from tests.models.test_golden import test_network, test_neuron_layer  # noqa: F401
from utils.recipe import make_optimizer, warmup_cosine
from utils.training import Metrics, train_steps

ROOT = Path(__file__).parents[1]
DEVICE = os.environ.get("DSR_TEST_DEVICE", "cuda")
SETTINGS = dict(num_classes=5, timesteps=4, Vth=0.3, alpha=0.3, delta_t=0.2)
RECIPE = "--timesteps 2 --Vth 0.3 --alpha 0.3 --delta_t 0.2 --train-batch 4 --warmup 2 --lr 0.05 --workers 0"

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_the_gpu(request, monkeypatch):
    """New tensors lie on the GPU, those from NumPy too; TF32 off; a bare engine."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here: the tests marked gpu were not run")
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("engine") == "events":
        pytest.skip("the event engine is for CPUs")
    from_numpy = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda array: from_numpy(array).to(DEVICE))
    monkeypatch.setattr(test_collapsed, "available", lambda: ["dense"])
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.device(DEVICE):
        yield


@pytest.fixture
def cuda():
    if DEVICE != "cuda":
        pytest.skip("CUDA's own: its memory and its graphs")


@contextmanager
def never_waiting():
    """Within, an operation for which the host waits raises RuntimeError."""
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")


class Noise:
    """A loader of images that lie on the device, with what the training loop asks of one."""

    seed = epoch = 0

    def __init__(self, steps, batch):
        self.steps, self.batch_size = steps, batch
        self.dataset = self.sampler = self
        self.images, self.labels = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 5

    def __len__(self):
        return self.steps * self.batch_size

    def __iter__(self):
        return iter([(self.images, self.labels)] * self.steps)


def training(model, precision="fp32", steps=5, batch=4):
    """The iterator of the programs' training loop over some noise."""
    optimizer = make_optimizer("sgd", model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    schedule = warmup_cosine(optimizer, lr=0.01, epochs=1, steps_per_epoch=steps, warmup=0)
    parts = dict(loader=Noise(steps, batch), optimizer=optimizer, schedule=schedule, metrics=Metrics(DEVICE))
    return train_steps(model, **parts, device=DEVICE, title="test", precision=precision, first=0)


WAYS = [("collapsed", False), ("collapsed", True), ("rate", False), ("rate", True), ("unrolled", False)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("backward", "compiled"), WAYS)
def test_a_step_does_not_wait_for_the_device(backward, compiled, precision):
    model = create_model("preresnet.resnet20_lif", backward=backward, engine="dense", **SETTINGS)
    if compiled:
        try:
            model.compile_loops()
        except RuntimeError as error:  # no compiler
            pytest.skip(str(error))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps = training(model, precision)
    next(steps), next(steps)  # the first looks at its gradient, and compiles
    with never_waiting():
        assert list(steps) == [3, 4, 5]
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_precision_on_identical_spikes(dtype):
    """Small whole weights on spikes add up exactly, so that both backward passes see the same currents."""
    conv, bn, neuron = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), LIFNeuron(timesteps=5)
    conv.weight.data = torch.randint(-1, 2, conv.weight.shape).float()
    neuron.Vth.data.fill_(0.05)
    spikes = (torch.rand(5, 8, 8, 16, 16) < 0.2).float()
    mean = neuron.representation(spikes).requires_grad_()
    flat = spikes.flatten(0, 1).to(dtype, memory_format=torch.channels_last)
    train = SpikeTrain(Spikes(flat), 5, "collapsed", DenseEngine(), torch.ones(()), spikes.mean(0), mean)
    unrolled_in = spikes.flatten(0, 1).requires_grad_()
    unrolled = neuron(copy.deepcopy(bn)(conv(unrolled_in)))
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = spiking_layer([(conv, train)], bn, neuron)
    assert out.spikes.dense().dtype == dtype
    assert (out.values() != unrolled).float().mean() < 1e-4  # where the potential meets the threshold
    g = torch.randn_like(out.representation)
    leaves = [neuron.Vth, conv.weight]
    expected = torch.autograd.grad(unrolled, leaves, g.repeat(5, 1, 1, 1))
    got = torch.autograd.grad(out.representation, leaves, g)
    for a, b in zip(got, expected):
        assert (a - b).norm() < (0.01 if dtype == torch.bfloat16 else 1e-4) * b.norm()


@pytest.mark.parametrize("backward", ["collapsed", "unrolled"])
def test_autocast(backward):
    model = create_model("preresnet.resnet20_lif", backward=backward, **SETTINGS)
    with torch.autocast(DEVICE, torch.bfloat16):
        logits = model(torch.randn(8, 3, 32, 32))
    F.cross_entropy(logits, torch.arange(8) % 5).backward()
    assert logits.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def program(flags, **settings):
    """Start a program in a process of its own, to its end."""
    command = [sys.executable, "-u", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200, **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def weights(folder):
    return torch.load(folder / "imagefolder/preresnet.resnet20_lif.pth", weights_only=True)["state_dict"]


def log(folder, model="preresnet.resnet20_lif"):
    return (folder / f"imagefolder/{model}.txt").read_text()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def flags(images, out, script="main_single_gpu.py"):
    data = f"--dataset imagefolder --path {images} -c {out} --model preresnet.resnet20_lif --manualSeed 1"
    return f"cifar/{script} {data} --device {DEVICE} {RECIPE}"


def test_deterministic_twice_and_after_a_kill(images, tmp_path):
    how = "--deterministic --epochs 4 --save_every 1 --resume auto"
    for out in ("first", "second"):
        program(f"{flags(images, tmp_path / out)} {how}")
    file = tmp_path / "killed/imagefolder/preresnet.resnet20_lif.pth"
    command = [sys.executable, *f"{flags(images, tmp_path / 'killed')} {how}".split()]
    killed, deadline = subprocess.Popen(command, cwd=ROOT), time.monotonic() + 100
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    killed.kill()
    assert killed.wait() < 0  # it had not ended by itself
    assert "resumed from" in program(f"{flags(images, tmp_path / 'killed')} {how}")
    first = weights(tmp_path / "first")
    assert same(first, weights(tmp_path / "second")) and same(first, weights(tmp_path / "killed"))


@pytest.mark.parametrize("processes", [1, 2])
def test_processes(processes, images, tmp_path):
    """N of them with --sync_bn compute what one program does, but for rounding: by nccl on GPUs."""
    if DEVICE == "cuda" and torch.cuda.device_count() < processes:
        pytest.skip("one GPU here: two processes were not tried")
    launcher = f"-m torch.distributed.run --standalone --nproc_per_node {processes}"
    several = flags(images, tmp_path / "several", "main_multiple_gpus.py")
    recipe = "--epochs 1 --lr 0.0001 --deterministic"  # so that cuDNN does not choose by the clock
    program(f"{launcher} {several} {recipe} --sync_bn")
    assert len(log(tmp_path / "several").splitlines()) == 2
    # In an ANN no rounding flips a spike, which would spoil all that follows.
    ann, recipe = "preresnet.resnet20_ann", f"{recipe} --train-batch 6"
    program(f"{launcher} {several} {recipe} --sync_bn --model {ann}")
    program(f"{flags(images, tmp_path / 'one')} {recipe} --model {ann}")
    losses = [log(tmp_path / out, ann).splitlines()[1].split("\t")[1] for out in ("several", "one")]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=0.01)


def test_quickstart(tmp_path):
    epochs = 10 if DEVICE == "cuda" else 1
    run = f"cifar/main_single_gpu.py --preset quickstart -c {tmp_path} --device {DEVICE} --epochs {epochs}"
    program(run)
    rows = (tmp_path / "digits/preresnet.resnet20_if.txt").read_text().splitlines()
    assert len(rows) == 1 + epochs
    assert float(rows[-1].split("\t")[4]) > (95 if DEVICE == "cuda" else 15)  # the read-me: 97.5 and more


def test_the_imagenet_chain(tmp_path):
    make_images(tmp_path / "data", train=4, val=(3, 2, 2))
    fixed = f"--data {tmp_path}/data -c {tmp_path} --image_size 32 --batch-size 4 -j 0 --epochs 1 --seed 1"
    fixed = f"imagenet/main.py {fixed} {'' if DEVICE == 'cuda' else '--device cpu'}"
    one = dict(env=os.environ | dict(CUDA_VISIBLE_DEVICES="0"))  # twelve images are too few for more GPUs
    program(f"{fixed} --arch preresnet_ann.resnet18 --name ann --optimizer SGD --lr 0.01", **one)
    program(f"{fixed} --arch preresnet_cal_Vth.resnet18 --pre_train ann.pth --calculate_Vth Vth", **one)
    processes = "--multiprocessing-distributed --world-size 1 --rank 0 --cpu_processes 1"
    snn = "--arch preresnet_snn.resnet18_if --pre_train ann.pth --load_Vth Vth.dict --timesteps 2 --name snn"
    program(f"{fixed} {processes} --dist-url tcp://127.0.0.1:20517 {snn}", **one)
    thresholds = torch.load(tmp_path / "imagenet/Vth.dict", weights_only=True)
    saved = torch.load(tmp_path / "imagenet/snn.pth", weights_only=True, map_location="cpu")
    assert len(thresholds) == 20 and all(value.device.type == "cpu" for value in thresholds.values())
    assert saved["epoch"] == 1 and all(v.isfinite().all() for v in saved["state_dict"].values())


def peak(model, batch, steps=2):
    """The most memory, in bytes, that training steps take on the GPU."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    list(training(model, steps=steps, batch=batch))
    return torch.cuda.max_memory_allocated()


def test_memory(cuda):
    """T=50 at batch 128 fits; what stays between steps does not grow; T=20 takes half of unrolled."""
    model = create_model("preresnet.resnet18_lif", timesteps=50)
    steps, left = training(model, steps=4, batch=128), []
    for _ in steps:
        left.append(torch.cuda.memory_allocated())
    assert left[-1] <= 1.01 * left[1]
    del model, steps
    collapsed = peak(create_model("preresnet.resnet18_lif", timesteps=20), 128)
    unrolled = peak(create_model("preresnet.resnet18_lif", timesteps=20, backward="unrolled"), 128)
    assert collapsed < unrolled / 2


def test_a_third_of_the_peers_memory(cuda):
    pytest.importorskip("spikingjelly", reason="no spikingjelly: the peer's memory was not measured")
    from benchmarks.step_time import build, get_parser

    collapsed = peak(create_model("preresnet.resnet18_lif", timesteps=20), 128)
    args = get_parser().parse_args(["--device", "cuda"])
    assert collapsed < peak(build("peer", args, 20), 128) / 3


def test_a_step_can_be_captured_as_a_graph(cuda, monkeypatch):
    """One launch a step: the replayed graph computes what the steps one by one do."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    model = create_model("preresnet.resnet20_lif", **SETTINGS)
    twin, x, labels = copy.deepcopy(model), torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    optimizers = [torch.optim.SGD(net.parameters(), 0.01) for net in (model, twin)]

    def step(net, optimizer):
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(net(x), labels).backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, optimizers[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, optimizers[0])
    graph.replay()
    for _ in range(4):
        step(twin, optimizers[1])
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert (p - q).norm() <= 2e-2 * q.norm() + 1e-4, name

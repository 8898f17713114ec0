"""The contract of engines: the event engine against the dense one, in float64, layer by layer."""

import copy
import ctypes
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from models import IFNeuron, LIFNeuron, create_model
from models.collapsed import collapsed_layer
from models.engines import build, choose_engine, kernels
from models.engines.dense import Spikes
from models.functional import Clamp
from models.layers import spiking_layer
from models.trains import SpikeTrain
from tests.models.engines import LACKING

pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"no event engine: {LACKING}")
NEURONS = {
    "if": lambda T: IFNeuron(timesteps=T, Vth=0.7, alpha=0.5),
    "lif": lambda T: LIFNeuron(timesteps=T, Vth=0.4, alpha=0.6, tau=1.3, delta_t=0.4),
}
GEOMETRIES = [(3, 1, 1), (3, 2, 1), (1, 1, 0), (1, 2, 0), (2, 2, 0), (3, 1, 0), (5, 2, 2), (1, 1, 2)]


def events():
    return choose_engine("events", "cpu")[0]


def spike_train(T, B, shape, density, engine, seed=0):
    """A train of the engine, of random spikes, as a layer would have emitted it; the last image is silent.

    Under the event engine an identity and an IF layer that fires at once make bits of a dense train.
    """
    generator = torch.Generator().manual_seed(seed)
    spikes = (torch.rand(T, B, *shape, generator=generator) < density).double()
    spikes[-1, -1] = 0
    m = spikes.mean(0)
    train = SpikeTrain(Spikes(spikes.flatten(0, 1)), T, "collapsed", engine, torch.ones(()), m, m)
    if engine.name == "events":
        neuron = IFNeuron(timesteps=T, Vth=1.0, alpha=1.0)
        with torch.no_grad():
            train.spikes, _, _ = collapsed_layer([(nn.Identity(), train)], None, neuron)
    train.amplitude = torch.tensor(0.8)
    train.mean = train.amplitude * m
    train.representation = (train.amplitude * m).requires_grad_()
    return train


def outcome(layer, engine, train_of):
    """Spikes, moments, gradients and running statistics of a layer (branches, bn, neuron) under an engine."""
    maps, bn, neuron = copy.deepcopy(layer)
    trains = [train_of(engine, k) for k in range(len(maps))]
    out = spiking_layer(list(zip(maps, trains)), bn, neuron)
    assert out.mean.shape == out.representation.shape
    weights = torch.randn(out.representation.shape, generator=torch.Generator().manual_seed(1))
    parameters = [p for module in (*maps, bn, neuron) if module for p in module.parameters()]
    leaves = [train.representation for train in trains] + parameters
    grads = torch.autograd.grad(out.representation, leaves, weights)
    buffers = [b.clone() for module in (*maps, bn) if module for b in module.buffers()]
    return [out.spikes.dense(), out.mean, out.representation, *grads, *buffers]


def assert_engines_agree(layer, train_of, atol=1e-10):
    for module in (*layer[0], layer[1]):  # a representation of exactly 0 would be a tie
        for norm in module.modules() if module else ():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.affine:
                norm.weight.data.uniform_(0.5, 2)
                norm.bias.data.uniform_(-0.5, 0.5)
    expected = outcome(layer, choose_engine("dense", "cpu")[0], train_of)
    for spikes in (0, math.inf):  # currents are kept for pass B, or computed twice
        with mock.patch.object(kernels, "KEPT_FROM", spikes):
            got = outcome(layer, events(), train_of)
        assert torch.equal(got[0], expected[0])  # the same spikes
        for a, b in zip(got[1:], expected[1:]):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=atol)


@pytest.mark.parametrize(("kernel", "stride", "padding"), GEOMETRIES)
@pytest.mark.parametrize("kind", NEURONS)
def test_geometries(kind, kernel, stride, padding, float64):
    conv = nn.Conv2d(20, 33, kernel, stride, padding)
    layer = [conv], nn.BatchNorm2d(33), NEURONS[kind](4)
    assert_engines_agree(layer, lambda engine, k: spike_train(4, 3, (20, 9, 7), 0.2, engine))


@pytest.mark.parametrize("density", [0.0, 0.03, 0.3, 1.0])
@pytest.mark.parametrize(("T", "B", "outputs"), [(1, 1, 16), (1, 5, 70), (6, 1, 64), (5, 3, 10)])
def test_densities_and_sizes(density, T, B, outputs, float64):
    torch.manual_seed(T)
    layer = [nn.Conv2d(16, outputs, 3, padding=1)], nn.BatchNorm2d(outputs), NEURONS["lif"](T)
    if not density and T == B == 1:
        layer = layer[0], None, layer[2]
    assert_engines_agree(layer, lambda engine, k: spike_train(T, B, (16, 8, 8), density, engine))


NORMS = {
    "training": lambda: nn.BatchNorm2d(48),
    "without affine parameters": lambda: nn.BatchNorm2d(48, affine=False),
    "none": lambda: None,
    "frozen": lambda: nn.BatchNorm2d(48).eval(),
}


@pytest.mark.parametrize("norm", NORMS)
def test_branches(norm, float64):
    """A convolution, a shortcut with a batch norm of its own, another without, and an identity."""
    shortcut = nn.Sequential(nn.Conv2d(48, 48, 1, bias=False), nn.BatchNorm2d(48))
    maps = [nn.Conv2d(48, 48, 3, padding=1), shortcut]
    maps += [nn.Conv2d(48, 48, 1, bias=False), nn.Identity()]
    train_of = lambda engine, k: spike_train(4, 2, (48, 6, 5), 0.15, engine, seed=k)  # noqa: E731
    assert_engines_agree((maps, NORMS[norm](), NEURONS["lif"](4)), train_of)


@pytest.mark.parametrize(("inputs", "outputs"), [(20, 12), (64, 96)])
def test_linear_maps(inputs, outputs, float64):
    layer = [nn.Linear(inputs, outputs)], nn.BatchNorm1d(outputs), NEURONS["if"](5)
    assert_engines_agree(layer, lambda engine, k: spike_train(5, 7, (inputs,), 0.2, engine))


def test_large_weights_are_shared_by_channel(float64):
    layer = [nn.Conv2d(128, 128, 3, padding=1)], nn.BatchNorm2d(128), NEURONS["lif"](3)
    assert_engines_agree(layer, lambda engine, k: spike_train(3, 2, (128, 5, 6), 0.1, engine))


def test_what_the_kernels_do_not_take_goes_the_dense_way(float64):
    grouped, dilated = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 8, 3, dilation=2)
    for conv in (grouped, dilated, nn.Conv2d(8, 8, (1, 3)), nn.Conv2d(8, 8, 7, padding=3)):
        layer = [conv], nn.BatchNorm2d(8), NEURONS["lif"](4)
        assert_engines_agree(layer, lambda engine, k: spike_train(4, 2, (8, 9, 9), 0.2, engine))


@pytest.mark.parametrize(("T", "shape"), [(600, (16, 6, 20)), (1, (16, 3, 2100)), (2, (16, 300, 300))])
def test_tiles_beyond_what_16_bits_name(T, shape, float64):
    """Many steps of wide images, and images of many pixels: more cells in a tile than 16 bits tell apart."""
    layer = [nn.Conv2d(16, 64, 3, padding=1)], nn.BatchNorm2d(64), NEURONS["lif"](T)
    atol = 1e-9 if shape[1] == 300 else 1e-10  # sums over 180,000 outputs round more
    assert_engines_agree(layer, lambda engine, k: spike_train(T, 2, shape, 0.02, engine), atol)


@pytest.mark.parametrize("kind", NEURONS)
def test_sums_that_are_written_past_the_caches(kind, float64):
    """From 1 MB on, here 1.1; and the last pixel of a row by itself."""
    layer = [nn.Conv2d(16, 64, 3, padding=1)], nn.BatchNorm2d(64), NEURONS[kind](3)
    assert_engines_agree(layer, lambda engine, k: spike_train(3, 2, (16, 33, 33), 0.1, engine))


@pytest.mark.parametrize("engine", ["dense", "events"])
def test_what_does_not_fit_is_refused(engine, float64):
    """Channels or pixels of a sum that differ, or of a map and its input; shapes that a map does not take."""
    spikes, neuron = spike_train(2, 3, (16, 8, 8), 0.3, choose_engine(engine, "cpu")[0]), NEURONS["if"](2)
    conv, identity, flat = nn.Conv2d(16, 32, 3, padding=1), nn.Identity(), nn.Flatten(2)
    narrow, strided = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, 2, 1)
    for maps in ((conv, identity), (identity, conv), (strided, identity), (narrow,), (nn.Conv2d(16, 16, 9),)):
        complaint = pytest.raises((RuntimeError, ValueError), match="size of|channels|Kernel size|add up")
        with torch.no_grad(), complaint:
            spiking_layer([(linear, spikes) for linear in maps], None, neuron)
    for linear, train in ((nn.Linear(8, 4), spikes), (conv, spikes.map(flat)), (identity, spikes.map(flat))):
        with torch.no_grad(), pytest.raises(ValueError, match="a collapsed layer's .* takes .*, not"):
            spiking_layer([(linear, train)], None, neuron)


def test_a_train_denser_than_the_limit_goes_the_dense_way(float64):
    engine = choose_engine("auto", "cpu")[0]
    trains = [spike_train(3, 2, (16, 5, 5), density, engine) for density in (0.5, 0.05)]
    currents = []
    for train in trains:
        branch = type(
            "Branch", (), dict(linear=nn.Conv2d(16, 16, 3), weight=torch.ones(16, 16, 3, 3), train=train)
        )
        currents.append(engine.takes(branch))
    assert currents == [False, True]


@pytest.mark.parametrize("engine", ["dense", "events"])
def test_currents_that_are_nan_show_in_the_statistics(engine, float64):
    train, bn = spike_train(2, 3, (16, 8, 8), 0.3, choose_engine(engine, "cpu")[0]), nn.BatchNorm2d(16)
    conv = nn.Conv2d(16, 16, 3, padding=1)
    nn.init.constant_(conv.weight[5], math.nan)
    with torch.no_grad():
        spiking_layer([(conv, train)], bn, NEURONS["if"](2))
    spoilt = torch.arange(16) == 5
    assert torch.equal(bn.running_mean.isnan(), spoilt)
    assert torch.equal(bn.running_var.isnan(), spoilt)


@pytest.mark.parametrize(("backward", "threads"), [*itertools.product(("collapsed", "rate"), (1, 3))])
def test_networks_repeat_bit_by_bit_and_agree(backward, threads, float64):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = create_model("preresnet.resnet20_lif", timesteps=3, Vth=0.3, delta_t=0.3, backward=backward)
        x, results = torch.randn(3, 3, 32, 32), []
        for model.engine in ("dense", "events", "events"):
            net = copy.deepcopy(model)
            logits = net(x)
            nn.functional.cross_entropy(logits, torch.arange(3)).backward()
            results.append(
                torch.cat([logits.detach().flatten(), *[p.grad.flatten() for p in net.parameters()]])
            )
        assert torch.equal(results[1], results[2])
        assert (results[1] - results[0]).norm() < 1e-9 * results[0].norm()
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("channels", [64, 128])
def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_threads(channels, four_threads, float64):
    """Four threads add to copies of Q, but for large weights, of which they share the channels."""
    layer = [nn.Conv2d(channels, channels, 3, padding=1)], nn.BatchNorm2d(channels), NEURONS["lif"](3)
    train = spike_train(3, 8, (channels, 5, 6), 0.1, events())
    out = spiking_layer(list(zip(layer[0], [train])), *layer[1:])
    kept = sum(tensor.numel() for tensor in out.representation.grad_fn.saved_tensors)
    assert kept < 1.5 * (layer[0][0].weight.numel() * 2 + 4 * train.mean.numel())
    assert_engines_agree(layer, lambda engine, k: spike_train(3, 8, (channels, 5, 6), 0.1, engine))


def test_a_lack_of_memory_in_a_kernel_is_an_error():
    x = torch.zeros(1)
    arguments = kernels.ClampArguments(M=0, C=2**59)  # more sums than there can be
    with pytest.raises(MemoryError, match="event engine"):
        events().kernels("clamp_sums", x, ctypes.byref(arguments), x, x, x)


def test_spikes_are_counted_and_given_in_parts(float64):
    train = spike_train(4, 3, (20, 5, 6), 0.2, events())
    dense = train.spikes.dense()
    assert train.spikes.count() == dense.sum() > 0 and train.spikes.shape == dense.shape
    assert torch.equal(torch.cat(list(train.spikes.split(5))), dense)


def test_two_processes_build_once_and_without_a_compiler_the_dense_engine_runs(tmp_path):
    code = "from models.engines.build import find_kernels; library, why = find_kernels()"
    code += "; print(library and library._name, why)"
    environment = dict(os.environ, TORCH_EXTENSIONS_DIR=str(tmp_path), DSR_MARCH="native")
    start = dict(cwd=Path(build.SOURCE).parents[2], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    lost = subprocess.run([sys.executable, "-c", code], env=dict(environment, CXX="/nowhere/c++"), **start)
    assert "None no C++ compiler" in lost.stdout
    broken = tmp_path / "c++"  # as one is on a machine where only its name is installed
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    lost = subprocess.run([sys.executable, "-c", code], env=dict(environment, CXX=str(broken)), **start)
    assert lost.stdout.startswith("None ") and lost.returncode == 0, lost.stderr
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment, **start) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert len({out for out, _ in outputs}) == 1 and ".so" in outputs[0][0]
    assert sum("building the event engine, once" in err for _, err in outputs) == 1
    (library,) = tmp_path.rglob("*.so")
    assert library.name == "dsr_events.so"
    wrong = dict(environment, DSR_MARCH="no-such-cpu")
    lost = subprocess.run([sys.executable, "-c", code], env=wrong, **start)
    assert "error: " in lost.stdout and "no-such-cpu" in lost.stdout and len(lost.stdout.splitlines()) == 1
    library.write_bytes(b"built elsewhere")
    lost = subprocess.run([sys.executable, "-c", code], env=environment, **start)
    assert lost.stdout.startswith(f"None {library}: ")


def test_types_that_the_kernels_do_not_know():
    model = create_model("preresnet.resnet20_if", timesteps=2).bfloat16()
    engine, reason = model.engine_in_use(torch.device("cpu"))
    assert engine.name == "dense" and "bfloat16" in reason
    assert model.float().engine_in_use(torch.device("cpu"))[0].name == "events"


def test_unknown_engines_are_refused():
    with pytest.raises(ValueError, match="unknown engine"):
        create_model("preresnet.resnet20_if", engine="sparse")


@pytest.mark.parametrize("name", ["dense", "events"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("closed, passed", [(True, [0, 1, 1, 1, 1, 0]), (False, [0, 0, 1, 1, 0, 0])])
def test_where_the_clamp_passes_at_its_ends(name, dtype, closed, passed):
    """IF on [0, ceiling], LIF between (section 4); the gradient of the ceiling is from above it alone."""
    x = torch.tensor([-1.0, 0.0, 1e-30, 0.6, 0.7, 0.8], dtype=dtype).view(6, 1)
    one, ceiling = x.new_ones(1), x.new_tensor(0.7)
    clamp = Clamp(x, one, x.new_zeros(1), ceiling, closed, gain=2.0)
    clamped = choose_engine(name, "cpu")[0].clamped(clamp, 3 * torch.ones_like(x))
    G = clamped.parts(one, x.new_zeros(1), x.new_zeros(1), None, 1)[0]
    assert G.flatten().tolist() == [6.0 * passes for passes in passed]
    S1, _, above = clamped.sums(x, x.new_zeros(1))
    assert (S1.item(), above.item()) == (6.0 * sum(passed), 3.0)


@pytest.mark.parametrize("name", ["dense", "events"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_of_if_neurons_behind_a_pool(name, dtype):
    """Quarters of spikes often meet the point of firing, two of them, and the ends of the clamp exactly."""
    torch.manual_seed(0)
    T, engine, pool = 5, choose_engine(name, "cpu")[0], nn.AvgPool2d(2)
    spikes = (torch.rand(T, 3, 16, 6, 6) < 0.5).to(dtype)
    spikes[:, 0], spikes[:, 1] = 0, 1
    mean = spikes.mean(0).requires_grad_()
    train = SpikeTrain(
        Spikes(spikes.flatten(0, 1)), T, "collapsed", engine, torch.ones((), dtype=dtype), mean, mean
    )
    neuron = IFNeuron(timesteps=T, Vth=1.0, alpha=0.5).to(dtype)
    out = spiking_layer([(nn.Identity(), train.map(pool))], None, neuron)
    potential, expected = 0, []
    for quarters in (4 * pool(spikes.flatten(0, 1))).round().int().unflatten(0, (T, 3)):
        potential = potential + quarters
        fired = potential >= 2
        expected.append(fired)
        potential = potential - 4 * fired.int()
    assert torch.equal(out.spikes.dense().bool(), torch.cat(expected))
    g = torch.randn(3, 16, 3, 3, dtype=dtype)
    grad, of_Vth = torch.autograd.grad(out.representation, (mean, neuron.Vth), g)
    torch.testing.assert_close(
        grad, g.repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    )  # all of it passes
    assert of_Vth == 0

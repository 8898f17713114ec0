"""Every network on a GPU that is not there: nothing stays on the CPU, and nothing makes the host wait."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from models import create_model, list_models, trains
from tests.models.fake_device import HostSynchronizationError, fake_gpu, step, to_fake_gpu

SMALL = "preresnet.resnet20_lif"


def network(name=SMALL, **settings):
    return create_model(name, **dict(num_classes=10, timesteps=2, dropout=0.0) | settings)


def assert_trains_on_the_gpu(model, **how):
    """Forward and backward pass: every parameter gets a gradient of its shape, on its device."""
    with fake_gpu():
        gradients = step(to_fake_gpu(model), **how)
        parameters = dict(model.named_parameters())
        assert len(gradients) == len(parameters)
        for name, p in parameters.items():
            grad = gradients[p]
            assert (grad.shape, grad.dtype, grad.device.type) == (p.shape, p.dtype, "cuda"), name


@pytest.mark.parametrize("name", list_models())
def test_every_network_trains(name):
    assert_trains_on_the_gpu(network(name, timesteps=1))  # more steps: below


OTHERS = [dict(), dict(backward="unrolled"), dict(backward="rate", train_Vth=False)]


@pytest.mark.parametrize("settings", OTHERS)
@pytest.mark.parametrize("name", [SMALL, "vgg.vgg11_if", "preresnet_snn.resnet18_if"])
def test_two_time_steps_and_other_backward_passes(name, settings):
    assert_trains_on_the_gpu(network(name, **settings))


@pytest.mark.parametrize("backward", ["collapsed", "unrolled"])
def test_bfloat16(backward):
    model = network(backward=backward)
    seen = []
    model.layer1[0].relu1.register_spike_hook(lambda spikes: seen.append(spikes.dense().dtype))
    assert_trains_on_the_gpu(model, bfloat16=True)
    assert seen == [torch.bfloat16 if backward == "collapsed" else torch.float32]


@pytest.mark.parametrize("backward", ["collapsed", "unrolled"])
def test_a_network_of_bfloat16(backward):
    assert_trains_on_the_gpu(network(backward=backward).bfloat16(), dtype=torch.bfloat16)


@pytest.mark.parametrize("mask", ["shared", "step"])
def test_dropout(mask, recwarn):
    assert_trains_on_the_gpu(network("vgg.vgg11_lif", dropout=0.1, dropout_mask=mask))


def test_inference():
    model = network().eval()
    with fake_gpu(), torch.no_grad():
        logits = to_fake_gpu(model)(torch.empty(2, 3, 32, 32, device="cuda"))
        assert (logits.shape, logits.device.type) == ((2, 10), "cuda")


class Planted(nn.AvgPool2d):
    """A pool with a mistake in it."""

    def __init__(self, mistake):
        super().__init__(8)
        self.mistake = mistake

    def forward(self, x):
        return self.mistake(super().forward(x))


MISTAKES = {
    "a tensor on the CPU": (lambda x: x + torch.zeros(x.shape[1:]), RuntimeError, "devices"),
    "item": (lambda x: x * x.sum().item(), DataDependentOutputException, "_local_scalar_dense"),
    "if": (lambda x: x if x.any() else -x, DataDependentOutputException, "_local_scalar_dense"),
    "nonzero": (lambda x: x + x.nonzero().sum(), DynamicOutputShapeException, "nonzero"),
    "fetched": (lambda x: x.cpu().cuda(non_blocking=True), HostSynchronizationError, "cuda:0 to cpu"),
    "sent": (lambda x: x + torch.ones(x.shape).to(x.device), HostSynchronizationError, "cpu to cuda:0"),
}


@pytest.mark.parametrize("backward", ["collapsed", "unrolled"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake, backward, monkeypatch):
    function, error, text = MISTAKES[mistake]
    monkeypatch.setattr(trains, "LINEAR", (*trains.LINEAR, Planted))  # or `map` would try it, and wait
    model = network(backward=backward)
    model.pool = Planted(function)
    with pytest.raises(error, match=text):
        assert_trains_on_the_gpu(model)


# Of what these networks use: operations that torch refuses on GPUs under use_deterministic_algorithms.
REFUSED = {"aten::_adaptive_avg_pool2d_backward", "aten::index_put_", "aten::put_"}
VGG = pytest.mark.xfail(strict=True, reason="AdaptiveAvgPool2d's backward pass; see docs/gpu.md")


@pytest.mark.parametrize(
    "name", [SMALL, "preresnet_snn.resnet18_if", pytest.param("vgg.vgg11_lif", marks=VGG)]
)
def test_deterministic_algorithms_refuse_nothing(name):
    model = network(name)
    with fake_gpu() as watch:
        step(to_fake_gpu(model))
    assert watch.operations.total() > 500
    assert not REFUSED & {function.name() for function in watch.operations}


def test_how_many_operations_a_step_sends_to_the_device():
    """Each is a kernel to launch, or so. A time step adds to each LIF layer the 8 operations of its loop."""
    totals = []
    for timesteps in (4, 8):  # both of which a pool takes in four parts
        model = network(timesteps=timesteps)
        with fake_gpu() as watch:
            step(to_fake_gpu(model))
        totals.append(watch.operations.total())
    assert totals[1] - totals[0] == 4 * 8 * 21  # 21 neuron layers
    assert totals[0] < 4 * 8 * 21 + 90 * 21

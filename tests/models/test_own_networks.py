"""What networks of users combine and the published ones do not: collapsed as unrolled, or refused."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from models import IFNeuron, LIFNeuron
from models.layers import SpikingNetwork, spiking_layer
from tests.models.engines import available

T = 4


def make_if():
    return IFNeuron(timesteps=T, Vth=0.7, alpha=0.5)


def make_lif(tau=1.0):
    return LIFNeuron(timesteps=T, Vth=0.2, alpha=0.5, tau=tau, delta_t=0.3)


class Net(SpikingNetwork):
    """Two layers on images of 2x8x8; `more` gives branches of the second beside its convolution."""

    def __init__(self, neuron1=make_if, neuron2=make_if, conv=None, bn=None, more=None, extra=None):
        super().__init__()
        self.conv1, self.bn1, self.neuron1 = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), neuron1()
        self.conv2, self.neuron2 = conv or nn.Conv2d(8, 8, 3, padding=1), neuron2()
        self.bn2, self.more, self.extra = nn.BatchNorm2d(8) if bn is None else bn, more, extra

    def spike(self, image):
        train = spiking_layer([(self.conv1, image)], self.bn1, self.neuron1)
        more = self.more(self, image, train) if self.more else []
        return spiking_layer([(self.conv2, train), *more], self.bn2, self.neuron2)


def step(network, x):
    """The logits of a training step, and the gradients and buffers it leaves."""
    logits = network(x)
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {name: p.grad for name, p in network.named_parameters()}, network.state_dict()


def assert_as_unrolled(network, batch=3):
    x = torch.randn(batch, 2, 8, 8)
    expected = copy.deepcopy(network)
    expected.backward = "unrolled"
    logits, grads, state = step(expected, x)
    assert max(grad.norm() for grad in grads.values() if grad is not None) > 0.1
    for engine in available():
        collapsed = copy.deepcopy(network)
        collapsed.engine = engine
        own_logits, own_grads, own_state = step(collapsed, x)
        torch.testing.assert_close(own_logits, logits, rtol=0, atol=1e-12)
        torch.testing.assert_close(own_grads, grads, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(own_state, state, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "neurons", [(make_if, make_lif), (make_lif, make_if), (make_lif, lambda: make_lif(3.0))]
)
def test_neurons_of_different_leaks_unroll_time(neurons, float64):
    """Each averages over time by its own weights, and a layer passes down one mean."""
    network = Net(*neurons)
    with pytest.warns(UserWarning, match="different leaks: the backward pass unrolls time"):
        assert_as_unrolled(network)
    with torch.no_grad():
        assert network.encode(torch.randn(2, 2, 8, 8)).backward == "collapsed"


@pytest.mark.parametrize("batch", [1, 3])
def test_the_image_beside_spikes(batch, float64):
    more = lambda net, image, train: [(net.extra, image)]  # noqa: E731
    assert_as_unrolled(Net(more=more, extra=nn.Conv2d(2, 8, 3, padding=1)), batch)


def test_a_frozen_part_under_no_grad(float64):
    class Tuned(Net):
        def spike(self, image):
            with torch.no_grad():
                train = spiking_layer([(self.conv1, image)], self.bn1, self.neuron1)
            return spiking_layer([(self.conv2, train)], self.bn2, self.neuron2)

    for make in (make_if, make_lif):
        assert_as_unrolled(Tuned(make, make))


@pytest.mark.parametrize("engine", available())
def test_a_frozen_part_pooled_in_bfloat16(engine):
    """Its mean, too, is of the precision of the gradients."""

    class Pooled(Net):
        def spike(self, image):
            with torch.no_grad():
                train = spiking_layer([(self.conv1, image)], self.bn1, self.neuron1).map(nn.AvgPool2d(2))
            return spiking_layer([(self.conv2, train)], self.bn2, self.neuron2)

    network = Pooled()
    network.engine = engine if engine == "dense" else "auto"
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(torch.randn(2, 2, 8, 8))
    logits.sum().backward()
    assert network.conv2.weight.grad.dtype == torch.float32 and network.conv2.weight.grad.any()


@pytest.mark.parametrize("within", [lambda conv: conv, lambda conv: lambda x: conv(x)])
def test_a_map_of_a_frozen_part_trains_no_parameters(within):
    class Mapped(Net):
        def spike(self, image):
            with torch.no_grad():
                train = spiking_layer([(self.conv1, image)], self.bn1, self.neuron1)
            train = train.map(nn.MaxPool2d(2)).map(within(self.extra))
            return spiking_layer([(self.conv2, train)], self.bn2, self.neuron2)

    with pytest.raises(ValueError, match="`map` trains no parameters"):
        Mapped(extra=nn.Conv2d(8, 8, 1))(torch.randn(2, 2, 8, 8))


def test_leaks_that_differ_by_rounding_are_one(float64):
    in_other_units = lambda: LIFNeuron(timesteps=T, Vth=0.6, alpha=0.5, tau=3.0, delta_t=0.9)  # noqa: E731
    network = Net(make_lif, in_other_units)
    assert network.neuron1.weights != network.neuron2.weights
    assert network.encode(torch.randn(2, 2, 8, 8)).backward == "collapsed"
    assert_as_unrolled(network)


def test_the_average_over_all_batches_as_running_statistics(float64):
    """momentum None, which torch.optim.swa_utils.update_bn sets."""
    network = Net(bn=nn.BatchNorm2d(8, momentum=None))
    for _ in range(2):
        network(torch.randn(3, 2, 8, 8))
    assert_as_unrolled(network)


def test_a_parametrized_weight_is_made_once_a_pass(float64):
    """It may be random, or keep a state; with a batch norm inside the branch as well."""

    class Counted(nn.Module):
        made = 0

        def forward(self, weight):
            type(self).made += 1
            return 2 * weight

    conv = parametrize.register_parametrization(nn.Conv2d(8, 8, 3, padding=1), "weight", Counted())
    network = Net(conv=nn.Sequential(conv, nn.BatchNorm2d(8)))
    assert_as_unrolled(network)
    for network.backward in ("unrolled", "collapsed"):
        Counted.made = 0
        network(torch.randn(2, 2, 8, 8))
        assert Counted.made == 1


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Halved(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / 2, bias)


class Twice(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def pruned(conv):
    """The weight is made in a hook before the forward pass."""
    return prune.random_unstructured(conv, "weight", 0.5)


def normed(conv):
    """So is this one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, in use
        return nn.utils.weight_norm(conv)


def patched(conv):
    conv.forward = lambda x: 2 * conv._conv_forward(x, conv.weight, conv.bias)
    return conv


@pytest.mark.parametrize(
    "network",
    [
        lambda: Net(conv=Standardized(8, 8, 3, padding=1)),
        lambda: Net(conv=nn.Sequential(Standardized(8, 8, 3, padding=1), nn.BatchNorm2d(8))),
        lambda: Net(conv=Halved(8, 8, 3, padding=1)),
        lambda: Net(conv=Twice(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))),
        lambda: Net(conv=pruned(nn.Conv2d(8, 8, 3, padding=1))),
        lambda: Net(conv=normed(nn.Conv2d(8, 8, 3, padding=1))),
        lambda: Net(conv=patched(nn.Conv2d(8, 8, 3, padding=1))),
        lambda: Net(bn=Doubled(8)),
        lambda: Net(bn=nn.SyncBatchNorm(8)),
    ],
)
@pytest.mark.parametrize("engine", available())
def test_what_is_not_computed_by_its_own_forward_pass_is_refused(network, engine):
    network = network()
    network.engine = engine
    with pytest.raises(TypeError, match='(?s)no collapsed layer .*; else backward = "unrolled"'):
        network(torch.randn(2, 2, 8, 8))


@pytest.mark.parametrize("engine", available())
def test_branches_that_would_be_broadcast_are_refused(engine):
    pool = lambda net, image, train: [(net.extra, train.map(nn.AdaptiveAvgPool2d(1)))]  # noqa: E731
    network = Net(more=pool, extra=nn.Conv2d(8, 8, 3, padding=1))
    network.engine = engine
    with pytest.raises(ValueError, match="do not add up"):
        network(torch.randn(2, 2, 8, 8))


def test_a_network_with_a_method_called_decode(float64):
    class Autoencoder(Net):
        def decode(self, train):
            return train

    assert_as_unrolled(Autoencoder())


@pytest.mark.parametrize("engine", available())
def test_no_images(engine):
    network = Net().eval()
    network.engine = engine
    with torch.no_grad():
        assert network(torch.zeros(0, 2, 8, 8)).shape == (0, 8, 8, 8)


@pytest.mark.parametrize("engine", available())
def test_a_network_within_torch_compile(engine, float64):
    network, x = Net(make_lif, make_lif), torch.randn(3, 2, 8, 8)
    network.engine, compiled = engine, copy.deepcopy(network)
    compiled.engine = engine
    expected = step(network, x)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Dynamo does not know how to trace")
        logits = torch.compile(compiled, backend="eager")(x)
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    torch.testing.assert_close(logits.detach(), expected[0])
    torch.testing.assert_close({name: p.grad for name, p in compiled.named_parameters()}, expected[1])


def test_a_time_constant_may_be_changed():
    neuron, currents = make_lif(1.0), torch.rand(T * 3, 4)
    neuron.tau = 5.0
    assert torch.equal(neuron(currents), make_lif(5.0)(currents))
    assert not torch.equal(neuron(currents), make_lif(1.0)(currents))

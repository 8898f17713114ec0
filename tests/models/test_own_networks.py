"""What networks of users combine and the published ones do not: collapsed as unrolled, or refused."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.utils import parametrize, prune

from models import IFNeuron, LIFNeuron, fit_thresholds
from models.engines.dense import DenseEngine
from models.layers import SpikingNetwork, spiking_layer
from models.neurons import ReLU
from models.trains import Dropout
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


def test_neurons_of_different_leaks_that_the_network_does_not_know(float64):
    """They cannot unroll time any more; in a list, say, where no module looks."""

    class Headed(Net):
        def spike(self, image):
            train = spiking_layer([(self.conv1, image)], self.bn1, self.neuron1)
            return spiking_layer([(self.conv2, train)], self.bn2, self.heads[0])

    network = Headed()
    network.heads = [make_lif()]
    with pytest.raises(ValueError, match="different leaks cannot be collapsed"):
        network(torch.randn(2, 2, 8, 8))
    with torch.no_grad():
        assert network(torch.randn(2, 2, 8, 8)).shape == (2, 8, 8, 8)


@pytest.mark.parametrize("make", [make_if, make_lif])
@pytest.mark.parametrize("backward", ["collapsed", "unrolled"])
def test_settings_that_change_before_the_backward_pass(make, backward, float64):
    """The gradients are of the settings with which the layer fired: so is training across several T."""
    network, x = Net(make, make), torch.randn(3, 2, 8, 8)
    network.backward = backward

    def loss(timesteps, tau):
        for neuron in (network.neuron1, network.neuron2):
            neuron.timesteps, neuron.tau = timesteps, tau
        return network(x).square().sum()

    settings = (8, 1.0), (2, 3.0)
    for setting in settings:
        loss(*setting).backward()
    expected = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    sum(loss(*setting) for setting in settings).backward()
    torch.testing.assert_close([p.grad for p in network.parameters()], expected)
    assert expected[0].any()


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


class Noisy(IFNeuron):
    def forward(self, currents):
        return super().forward(currents + 0.3)


class Inverted(IFNeuron):
    def fire(self, currents):
        return self.amplitude - super().fire(currents)


class Late(IFNeuron):
    """Reads the second half of the steps alone."""

    def representation(self, sequence):
        return sequence[len(sequence) // 2 :].mean(0)


def fired_otherwise():
    neuron = make_if()
    neuron.fire = lambda currents: torch.ones_like(currents)
    return neuron


def watched():
    neuron = make_if()
    neuron.register_forward_pre_hook(lambda module, inputs: None)
    return neuron


@pytest.mark.parametrize(
    "make",
    [*(lambda kind=kind: kind(timesteps=T) for kind in (Noisy, Inverted, Late)), watched, fired_otherwise],
)
def test_a_neuron_with_methods_of_its_own_is_refused(make):
    network = Net(make_if, make)
    with pytest.raises(TypeError, match='no collapsed layer .*; else backward = "unrolled"'):
        network(torch.randn(2, 2, 8, 8))
    network.backward = "unrolled"
    assert network(torch.randn(2, 2, 8, 8)).any()


def test_a_representation_of_its_own_counts_in_both_passes(float64):
    """Of currents (T*B, ...) = (4, 2) the last two steps decide, and every step gets the mean of theirs."""
    neuron = Late(timesteps=4, Vth=1.0)
    currents = torch.tensor([[9.0, 0.5], [9.0, 0.5], [0.2, 0.5], [0.4, 2.5]], requires_grad=True)
    (neuron(currents) * torch.tensor([[5.0], [7.0], [1.0], [3.0]])).sum().backward()
    torch.testing.assert_close(currents.grad, torch.tensor([[2.0, 0.0]]).expand(4, 2))  # 0.3 passes, 1.5 not
    assert neuron.Vth.grad == 4 * 2.0  # T times the gradient of what lies above Vth


class Squared(nn.AvgPool2d):
    def forward(self, x):
        return super().forward(x).square()


def hooked():
    pool = nn.AvgPool2d(2)
    pool.register_forward_hook(lambda module, inputs, output: output.square())
    return pool


def delayed(x):
    return torch.cat([torch.zeros_like(x[:3]), x[:-3]])


@pytest.mark.parametrize("function", [Squared(2), hooked(), delayed, lambda x: x - x.mean(0)])
def test_what_map_refuses(function):
    """What is not linear in spite of its class, and linear maps that do not keep the steps apart."""

    class Mapped(Net):
        def spike(self, image):
            train = spiking_layer([(self.conv1, image)], self.bn1, self.neuron1).map(function)
            return spiking_layer([(self.conv2, train)], self.bn2, self.neuron2)

    network = Mapped()
    with pytest.raises(ValueError, match="is not linear, so the backward pass has to unroll time"):
        network(torch.randn(3, 2, 8, 8))
    network.backward = "unrolled"
    assert network(torch.randn(3, 2, 8, 8)).any()


@pytest.mark.parametrize("channels, kernel", [(64, (3, 3)), (1, (3, 1))])
def test_signals_of_one_channel_and_width_one(channels, kernel, float64):
    """As (B, 1, L, 1): a pad of one channel lies in memory as no other does."""

    class Signal(Net):
        def spike(self, image):
            return spiking_layer([(self.conv1, image)], self.bn1, self.neuron1)

    network = Signal()
    network.conv1 = nn.Conv2d(1, channels, kernel, padding=(kernel[0] // 2, kernel[1] // 2))
    network.bn1 = nn.BatchNorm2d(channels)
    x, results = torch.randn(8, 1, 16, 1), []
    for network.backward, network.engine in [("unrolled", "dense"), *(("collapsed", e) for e in available())]:
        network.zero_grad()
        logits = network(x)
        (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        results.append((logits.detach(), network.conv1.weight.grad.clone()))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.uint8, torch.bool])
@pytest.mark.parametrize("frames", [False, True])
@pytest.mark.parametrize("engine", [*available(), "unrolled"])
def test_inputs_of_another_type(dtype, frames, engine):
    network, other = Net(make_lif, make_lif), torch.rand(2, *[T] * frames, 2, 8, 8).round().to(dtype)
    setattr(network, "backward" if engine == "unrolled" else "engine", engine)
    expected = step(copy.deepcopy(network), other.float())
    torch.testing.assert_close(step(network, other), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backward", ["collapsed", "unrolled"])
def test_shared_dropout_and_a_pool_of_ones_own_in_half_precision(dtype, backward):
    class Own(nn.AvgPool2d):
        def forward(self, x):
            return super().forward(x) * 0.5

    class Dropped(Net):
        def spike(self, image):
            train = spiking_layer([(self.conv1, image)], self.bn1, self.neuron1)
            train = train.map(Own(2)).drop(Dropout(0.3, shared=True))
            return spiking_layer([(self.conv2, train)], self.bn2, self.neuron2)

    network = Dropped().to(dtype)
    network.backward = backward
    logits, grads, _ = step(network, torch.rand(2, 2, 8, 8, dtype=dtype))
    assert logits.dtype == dtype and all(g.dtype == dtype and g.isfinite().all() for g in grads.values())


def test_batch_norms_without_a_bias(float64):
    own = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    network = Net(more=lambda net, image, train: [(net.extra, train)], extra=own)
    for norm in (network.bn2, own[1]):
        norm.register_parameter("bias", None)
    assert_as_unrolled(network)


def test_batch_norms_that_shall_not_keep_statistics_now(float64):
    """As for a pass on adversarial images, with the buffers in place."""
    network = Net()
    network.bn1.track_running_stats = network.bn2.track_running_stats = False
    before = copy.deepcopy(network.state_dict())
    assert_as_unrolled(network)
    network(torch.randn(3, 2, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("backward", ["collapsed", "unrolled"])
def test_batch_norms_of_float32_in_a_network_of_bfloat16(backward):
    network = Net().bfloat16()
    network.bn1.float(), network.bn2.float()
    network.backward = backward
    network(torch.randn(3, 2, 8, 8).bfloat16()).sum().backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in network.parameters())


class Mapped(Net):
    """The `extra` module between the layers."""

    def spike(self, image):
        train = spiking_layer([(self.conv1, image)], self.bn1, self.neuron1).map(self.extra)
        return spiking_layer([(self.conv2, train)], self.bn2, self.neuron2)


def test_a_map_that_draws_is_refused():
    """Stochastic depth, of which two draws agree as often as not."""

    class Depth(nn.Module):
        def forward(self, x):
            return x * (torch.rand(()) < 0.9)

    for seed in range(3):
        torch.manual_seed(seed)
        with pytest.raises(ValueError, match="is not linear"):
            Mapped(extra=Depth())(torch.randn(2, 2, 8, 8))


def test_a_map_that_changes_is_looked_at_again():
    x, network = torch.randn(2, 2, 8, 8), Mapped(extra=nn.Sequential(nn.AvgPool2d(2)))
    network(x)
    network.extra[0] = nn.MaxPool2d(2)
    norm = nn.BatchNorm2d(8, affine=False)
    other = Mapped(extra=nn.Sequential(nn.AvgPool2d(2), norm.eval()))
    other(x)
    norm.train()
    pool = nn.AvgPool2d(2)
    hooked = Mapped(extra=pool)
    hooked(x)
    pool.register_forward_pre_hook(lambda _, inputs: (inputs[0] ** 2,))
    scheduled = Mapped(extra=torchvision.ops.StochasticDepth(p=0.0, mode="row"))
    scheduled(x)
    scheduled.extra.p = 0.5
    for changed in (network, other, hooked, scheduled):
        with pytest.raises(ValueError, match="is not linear"):
            changed(x)


class MappedImage(Net):
    """The `extra` module in front of the layers."""

    def spike(self, image):
        train = spiking_layer([(self.conv1, image.map(self.extra))], self.bn1, self.neuron1)
        return spiking_layer([(self.conv2, train)], self.bn2, self.neuron2)


def test_an_image_that_is_mapped_in_place(float64):
    assert_as_unrolled(MappedImage(extra=lambda x: x.sub_(0.5).div_(2)))
    x = torch.randn(3, 2, 8, 8)
    image, network = x.clone(), MappedImage(extra=lambda x: x.sub_(0.5))
    network(x), network.eval()(x)
    assert torch.equal(x, image)


@pytest.mark.parametrize("engine", available())
def test_noise_on_an_image_is_drawn_once(engine, float64):
    """For the forward pass, and for the mean of which the first layer's gradient is made."""
    plain, x = Net(), torch.randn(3, 2, 8, 8)
    noisy = MappedImage(extra=lambda x: x + torch.randn(x.shape))
    noisy.load_state_dict(plain.state_dict())
    plain.engine = noisy.engine = engine
    torch.manual_seed(1)
    expected = step(plain, x + torch.randn(x.shape))
    torch.manual_seed(1)
    torch.testing.assert_close(step(noisy, x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_float64_alone(dtype, float64):
    network, x = Net(make_lif, make_lif), torch.randn(3, 2, 8, 8)
    exact = network.eval()(x)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(network(x), exact)
        assert_as_unrolled(network.train())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_a_batch_norm_of_other_channels(inner, training):
    """One of a single channel would fit behind any."""
    norm = nn.BatchNorm2d(1)
    network = Net(conv=nn.Sequential(nn.Conv2d(8, 8, 1), norm)) if inner else Net(bn=norm)
    with pytest.raises(ValueError, match="cannot normalise currents of 8 channels"):
        network.train(training)(torch.randn(2, 2, 8, 8))


def test_an_input_is_not_decoded():
    with pytest.raises(TypeError, match="has no representation"):
        Net().encode(torch.randn(2, 2, 8, 8)).decode()


@pytest.fixture
def alone():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("change", [lambda network: network, lambda network: network.bfloat16()])
@pytest.mark.parametrize("tracks", [True, False])
def test_synchronized_batch_norm_unrolled(change, tracks, alone):
    """Of one process it is torch's own, also without running statistics and in half precision."""
    plain = change(Net(bn=nn.BatchNorm2d(8, track_running_stats=tracks)))
    plain.backward = "unrolled"
    network, x = copy.deepcopy(plain), torch.randn(4, 2, 8, 8, dtype=plain.bn2.weight.dtype)
    network.synchronize()
    with torch.no_grad():
        assert network(x).dtype == plain(x).dtype == x.dtype
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=2e-2, atol=2e-2)


class Blurred(Net):
    """A fixed convolution in a `map`."""

    def spike(self, image):
        train = spiking_layer([(self.conv1, image)], self.bn1, self.neuron1)
        kernel = torch.ones(8, 1, 3, 3) / 9
        train = train.map(lambda x: nn.functional.conv2d(x, kernel, padding=1, groups=8))
        return spiking_layer([(self.conv2, train)], self.bn2, self.neuron2)


class Flat(Net):
    """A linear map whose weight is a product of matrices."""

    def __init__(self):
        linear = nn.utils.parametrizations.orthogonal(nn.Linear(512, 8))
        super().__init__(conv=linear, bn=nn.BatchNorm1d(8))

    def spike(self, image):
        train = spiking_layer([(self.conv1, image)], self.bn1, self.neuron1).map(nn.Flatten())
        return spiking_layer([(self.conv2, train)], self.bn2, self.neuron2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [Blurred, Flat])
def test_maps_and_computed_weights_under_autocast(kind, dtype):
    """Only spikes and their convolutions are of autocast's type."""
    network, results = kind(), []
    for on in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", dtype, enabled=on):
            logits = network(torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1)))
        logits.square().sum().backward()
        results.append(network.conv1.weight.grad.clone())
    exact, rounded = results
    assert rounded.dtype == torch.float32
    assert nn.functional.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.9


def test_float16_holds_what_is_summed_up():
    """200 samples of 64 pixels that fire at every step, currents of some tens: sums far above 65,504."""
    network = Net(conv=nn.Conv2d(8, 8, 1))
    network.conv2.weight.data.fill_(10.0)
    network.bn1.bias.data.fill_(1e3)
    with torch.autocast("cpu", torch.float16):
        logits = network(torch.randn(200, 2, 8, 8))
    logits.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_on_a_device_of_shapes_alone():
    """`meta`, which counts operations and memory, has neither autocast nor all of torch's kernels."""
    network = Net(make_lif, make_lif).to("meta")
    logits = network(torch.empty(3, 2, 8, 8, device="meta"))
    logits.sum().backward()
    assert logits.shape == (3, 8, 8, 8) and all(p.grad.shape == p.shape for p in network.parameters())


def test_a_network_with_compiled_loops_is_stored_without_them():
    network, x = Net().eval(), torch.randn(2, 2, 8, 8)
    expected = network(x)
    network._compiled = DenseEngine(lambda *_: None)  # no pickle holds a function without a name
    torch.testing.assert_close(pickle.loads(pickle.dumps(network))(x), expected)


@pytest.mark.parametrize("engine", available())
def test_under_another_default_device(engine):
    class Pooled(Net):
        def spike(self, image):
            train = spiking_layer([(self.conv1, image)], self.bn1, self.neuron1).map(nn.AvgPool2d(2))
            return spiking_layer([(self.conv2, train)], self.bn2, self.neuron2)

    for network in (Net(make_lif, make_lif), Pooled(make_lif, make_lif)):
        network.engine, x = engine, torch.randn(2, 2, 8, 8)
        expected = copy.deepcopy(network)(x)
        expected.sum().backward()
        with torch.device("meta"):
            logits = network(x)
            logits.sum().backward()
        assert torch.equal(logits, expected) and network.conv1.weight.grad.any()


def test_an_ann_unrolls_time():
    network = Net(ReLU, ReLU)
    with pytest.warns(UserWarning, match="an ANN: the backward pass unrolls time"):
        assert network(torch.randn(2, 2, 8, 8)).shape == (2, 8, 8, 8)


def test_settings_and_batches_that_are_none():
    for timesteps in (2.5, 0):
        with pytest.raises(ValueError, match="timesteps must be a whole number, at least 1"):
            IFNeuron(timesteps=timesteps)
    with pytest.raises(TypeError, match="a layer has one threshold"):
        make_if().Vth = nn.Parameter(torch.ones(4))
    with pytest.raises(TypeError, match="batches must be tensors"):
        fit_thresholds(Net(), [(torch.randn(2, 2, 8, 8), torch.zeros(2))])
    IFNeuron(train_Vth=False, Vth_grad_scale=None)(torch.ones(20, 1, requires_grad=True)).sum().backward()
    network = Net(list, list)
    with pytest.raises(TypeError, match="no neuron layer among its modules"):
        network(torch.randn(2, 2, 8, 8))


def test_a_spike_hook_may_remove_itself():
    network, seen = Net(), []
    handle = network.neuron1.register_spike_hook(lambda spikes: handle.remove())
    network.neuron1.register_spike_hook(lambda spikes: seen.append(spikes.shape))
    for _ in range(2):
        network(torch.randn(2, 2, 8, 8))
    assert seen == [(2 * T, 8, 8, 8)] * 2


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

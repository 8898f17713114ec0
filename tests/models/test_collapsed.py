"""The collapsed backward pass against the unrolled one, in float64, wherever a network can take it."""

import copy
import gc
import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import IFNeuron, LIFNeuron, create_model
from models.blocks import basic
from models.engines.dense import DenseEngine, Spikes, correlation, correlation_of_patches
from models.functional import clamp_zones
from models.layers import SpikingNetwork, spiking_layer
from models.preresnet_imagenet import ImageNetPreActResNet
from models.thresholds import draw
from models.trains import SpikeTrain, check_linear
from tests.models.engines import available
from utils.statistics import count_spikes, firing_rates

SETTINGS = dict(Vth=0.4, alpha=0.4, delta_t=0.3, tau=1.7)
KINDS = {"if": IFNeuron, "lif": LIFNeuron}


class Net(SpikingNetwork):
    """What the published networks do not combine: a batch norm in a branch, and layers without one."""

    def __init__(self, neuron, T, static=True, train_Vth=True):
        super().__init__()
        settings = dict(timesteps=T, train_Vth=train_Vth, Vth=0.4, alpha=0.4)
        make = {
            "if": lambda: IFNeuron(**settings),
            "lif": lambda: LIFNeuron(**settings, delta_t=0.3, tau=1.7),
        }
        self.stem = nn.Conv2d(3 if static else 2, 4, 3, padding=1, bias=False)
        self.conv1, self.conv2 = (
            nn.Conv2d(4, 6, 3, stride=2, padding=1),
            nn.Conv2d(6, 6, 3, padding=1, groups=2),
        )
        self.down = nn.Sequential(nn.Conv2d(4, 6, 1, stride=2, bias=False), nn.BatchNorm2d(6))
        self.bn0, self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False)
        self.hidden, self.head, self.bn3 = nn.Linear(6, 7), nn.Linear(7, 5, bias=False), nn.BatchNorm1d(5)
        self.n0, self.n1, self.n2, self.n3, self.n4, self.n5 = (make[neuron]() for _ in range(6))

    def spike(self, train):
        first = spiking_layer([(self.stem, train)], self.bn0, self.n0)
        second = spiking_layer([(self.conv1, first)], self.bn1, self.n1)
        train = spiking_layer(
            [(self.conv2, second), (self.down, first), (nn.Identity(), second)], self.bn2, self.n2
        )
        train = spiking_layer([(nn.Identity(), train.map(nn.AdaptiveAvgPool2d(1)))], None, self.n3)
        train = spiking_layer([(self.hidden, train.map(nn.Flatten()))], None, self.n4)
        return spiking_layer([(self.head, train)], self.bn3, self.n5)


def randomize(model, seed=0):
    """Affine parameters and thresholds with which all zones of the clamp occur."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("Vth"):
            parameter.data *= 0.6 + torch.rand(())
        elif parameter.dim() == 1:
            parameter.data += 0.4 * torch.randn_like(parameter)


def zones(model, x):
    """Whether elements below, within and above the clamp occur in the layers of the unrolled network."""
    seen = torch.zeros(3, dtype=torch.long)

    def watch(neuron, inputs, _):
        r = neuron.representation(inputs[0].unflatten(0, (neuron.timesteps, -1)))
        inside, above = clamp_zones(r, neuron.ceiling, neuron.closed)
        seen.add_(torch.stack([(~inside & ~above).sum(), inside.sum(), above.sum()]))

    watched = copy.deepcopy(model)
    watched.backward = "unrolled"
    for module in watched.modules():
        if isinstance(module, (IFNeuron, LIFNeuron)):
            module.register_forward_hook(watch)
    watched(x)
    return seen


def assert_same(model, x, backward_passes=1):
    """Logits, gradients and buffers of the model, unrolled and by every engine; returns the former."""
    labels = torch.arange(len(x)) % 5
    unrolled, *collapsed = (copy.deepcopy(model) for _ in ("unrolled", *available()))
    unrolled.backward = "unrolled"
    for net, net.engine in zip(collapsed, available()):
        net.backward = "collapsed"
    for net in (unrolled, *collapsed):
        for _ in range(backward_passes):
            logits = net(x)
            F.cross_entropy(logits, labels).backward()
        net.logits = logits.detach()
    largest = max(p.grad.norm() for p in unrolled.parameters())
    assert largest > 1e-6
    for net in collapsed:
        torch.testing.assert_close(net.logits, unrolled.logits, rtol=0, atol=1e-12)
        for (name, p), q in zip(unrolled.named_parameters(), net.parameters()):
            # A bias before a batch norm has a gradient of zero: rounding apart.
            error, scale = (p.grad - q.grad).norm(), p.grad.norm()
            assert error <= 1e-9 * scale or error <= 1e-13 * largest, f"{name}: {error} of {scale}"
        for (name, p), q in zip(unrolled.named_buffers(), net.buffers()):
            torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-12, msg=name)
    return unrolled


@pytest.mark.parametrize(("kind", "T", "B"), [*itertools.product(KINDS, (1, 2, 5, 20), (2, 3))])
def test_narrow_resnet(kind, T, B, float64):
    settings = SETTINGS | dict(num_classes=5, timesteps=T)
    model = create_model(f"preresnet.resnet20_{kind}", **settings)
    randomize(model, seed=T)
    x = torch.randn(B, 3, 32, 32)
    assert (zones(model, x) > 0).all()
    assert_same(model, x)


@pytest.mark.parametrize("backward", ["collapsed", "rate", "unrolled"])
@pytest.mark.parametrize("engine", available())
def test_a_step_leaves_no_tensors_to_the_garbage_collector(engine, backward):
    """What only the collector can free stays for many steps: it counts objects, not their megabytes."""
    model = Net("lif", 3)
    model.engine, model.backward = engine, backward
    gc.collect()
    gc.disable()
    try:
        gc.set_debug(gc.DEBUG_SAVEALL)
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        gc.collect()
        left = [tuple(found.shape) for found in gc.garbage if isinstance(found, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert left == []


@pytest.mark.parametrize(
    "name", ["preresnet.resnet18_if", "preresnet.resnet50_lif", "vgg.vgg11_lif", "vgg.vgg11_if"]
)
def test_wide_networks(name, float64):
    model = create_model(name, num_classes=5, timesteps=2, dropout=0.0, **SETTINGS | dict(Vth=0.3, alpha=0.3))
    randomize(model)
    assert_same(model, torch.randn(2, 3, 32, 32) if "resnet" in name else 3 * torch.rand(2, 2, 2, 48, 48))


def shrunk_imagenet(kind, train_Vth):
    """The ImageNet network with one block a stage and a sixteenth of the channels."""
    settings = dict(timesteps=4, Vth=0.4, alpha=0.4, train_Vth=train_Vth)
    settings |= dict(delta_t=0.3, tau=1.7) if kind == "lif" else {}
    return ImageNetPreActResNet(
        lambda in_channels, channels, stride: basic(in_channels, channels // 16, stride),
        [1, 1, 1, 1],
        activation=lambda: KINDS[kind](**settings),
        num_classes=5,
        dropout=0.0,
        norms_last=True,
    )


@pytest.mark.parametrize("train_Vth", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_imagenet_networks(kind, training, train_Vth, float64):
    model = shrunk_imagenet(kind, train_Vth)
    randomize(model, seed=3)
    x = torch.randn(4, 3, 32, 32)
    for _ in range(20):  # running statistics for eval
        model(x)
    model.train(training)
    assert (zones(model, x) > 0).all()
    unrolled = assert_same(model, x)
    assert unrolled.conv1.weight.grad.any()
    assert (unrolled.relu1.Vth.grad is not None) is train_Vth


@pytest.mark.parametrize(("kind", "static", "T"), [*itertools.product(KINDS, (True, False), (1, 4))])
def test_every_kind_of_branch(kind, static, T, float64):
    model = Net(kind, T, static)
    randomize(model)
    x = torch.randn(3, 3, 9, 11) if static else torch.rand(3, T, 2, 9, 11)
    assert (zones(model, x) > 0).all()
    assert_same(model, x, backward_passes=2)  # whose gradients add up


def freeze(model, norms):
    for norm in norms:
        norm.eval()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_batch_norms_and_thresholds(kind, float64):
    model = Net(kind, 4)
    randomize(model)
    x = torch.randn(3, 3, 9, 9)
    model(x)
    assert_same(copy.deepcopy(model).eval(), x)
    assert_same(freeze(copy.deepcopy(model), [model.bn2, model.bn0]), x)
    assert_same(freeze(copy.deepcopy(model), [copy.deepcopy(model).down[1]]), x)
    for norms in (["down.1"], ["bn2"], ["bn2", "down.1"], ["bn0", "bn1", "bn3"]):
        frozen = copy.deepcopy(model)
        assert_same(freeze(frozen, [frozen.get_submodule(name) for name in norms]), x)
    fixed = Net(kind, 4, train_Vth=False)
    randomize(fixed)
    assert_same(fixed, x)


def test_two_forward_passes_before_one_backward(float64):
    model, x = Net("lif", 3), torch.randn(2, 2, 3, 8, 8)
    randomize(model)
    grads = []
    for backward in ("unrolled", "collapsed"):
        net = copy.deepcopy(model)
        net.backward = backward
        (net(x[0]).square().sum() + net(x[1]).square().sum()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-11 * grads[0].norm().item())


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups", "dilation"),
    [(3, 1, 1, 1, 1), (3, 2, 1, 1, 1), (1, 2, 0, 1, 1), (7, 2, 3, 1, 1), (3, 1, 1, 2, 1), (3, 1, 2, 1, 2)]
    + [((3, 5), (2, 1), (0, 2), 1, 1)],
)
def test_gradient_of_a_convolutions_weight(kernel, stride, padding, groups, dilation, float64):
    conv = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups)
    x = torch.rand(300, 4, 17, 14).contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(conv(x))
    expected = nn.grad.conv2d_weight(x, conv.weight.shape, grad, stride, padding, dilation, groups)
    close = dict(rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(correlation(conv, conv.weight, x, grad), expected, **close)
    if groups == dilation == 1:  # as on CPUs with AVX2 and no AVX-512
        torch.testing.assert_close(correlation_of_patches(conv, x, grad, conv.stride), expected, **close)


def test_frozen_weights_get_no_gradient(float64):
    model, x = Net("if", 3), torch.randn(2, 3, 8, 8)
    model.conv1.requires_grad_(False)
    model.down.requires_grad_(False)
    model.backward = "collapsed"
    model(x).square().sum().backward()
    assert model.conv1.weight.grad is None and model.down[1].weight.grad is None
    assert model.stem.weight.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_inference_and_firing_rates(kind, float64):
    model = create_model(f"preresnet.resnet20_{kind}", num_classes=5, timesteps=4, **SETTINGS).eval()
    x, results = torch.randn(3, 3, 32, 32), []
    for model.backward in ("unrolled", "collapsed"):
        with torch.no_grad(), count_spikes(model) as counts:
            logits = model(x)
        assert not logits.requires_grad
        results.append((logits, firing_rates(counts)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=1e-12)
    assert results[0][1] == results[1][1] and max(results[0][1].values()) > 0


def test_float32_logits_agree_but_where_a_spike_flipped():
    model = create_model("preresnet.resnet20_lif", num_classes=5, timesteps=5, **SETTINGS).eval()
    x, logits = torch.randn(32, 3, 32, 32), []
    for model.backward in ("unrolled", "collapsed"):
        with torch.no_grad():
            logits.append(model(x))
    flipped = ((logits[1] - logits[0]).abs() > 1e-4).any(1).sum().item()
    assert flipped <= 16  # one rounding may flip a spike, and that spike others


def saved_bytes(model, x):
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return total


def test_nothing_of_size_T_is_kept_for_the_backward_pass():
    x, kept = torch.randn(2, 3, 32, 32), {}
    for backward, T in itertools.product(("unrolled", "collapsed"), (2, 8)):
        model = create_model("preresnet.resnet20_lif", timesteps=T, backward=backward)
        kept[backward, T] = saved_bytes(model, x)
    assert kept["collapsed", 8] == kept["collapsed", 2] < kept["unrolled", 2]
    assert kept["unrolled", 8] > 3 * kept["unrolled", 2]


def test_rate_leaves_out_Q_of_the_convolutions_alone(float64):
    """The head's gradient stays exact; a convolution's becomes T*corr(m, Gm), which is exact where T = 1."""
    for T in (1, 5):
        model = create_model("preresnet.resnet20_lif", num_classes=5, timesteps=T, **SETTINGS)
        randomize(model)
        x, grads = torch.randn(4, 3, 32, 32), []
        for model.backward in ("unrolled", "rate"):
            model.zero_grad()
            F.cross_entropy(model(x), torch.arange(4)).backward()
            grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
        torch.testing.assert_close(grads[1]["linear.weight"], grads[0]["linear.weight"])
        exact, rate = (grad["layer3.2.conv1.weight"].flatten() for grad in grads)
        cosine = F.cosine_similarity(exact, rate, dim=0).item()
        assert cosine == pytest.approx(1.0, abs=1e-9) if T == 1 else 0.8 < cosine < 1 - 1e-6


def test_bfloat16_spikes_under_autocast():
    """Weights of -1, 0, 1 on spikes of 0 and 1 add up exactly in bfloat16: the same spikes as in float32."""
    torch.manual_seed(0)
    conv, bn, neuron = nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), LIFNeuron(timesteps=5, delta_t=0.2)
    conv.weight.data = torch.randint(-1, 2, conv.weight.shape).float()
    spikes, results = torch.rand(5 * 8, 4, 9, 9) < 0.2, []
    for dtype in (torch.float32, torch.bfloat16):
        r = spikes.unflatten(0, (5, 8)).float().mean(0).requires_grad_()
        train = SpikeTrain(
            Spikes(spikes.to(dtype)), 5, "collapsed", DenseEngine(), torch.tensor(1.0), r.detach(), r
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = spiking_layer([(conv, train)], bn, neuron)
        grad = torch.randn(out.representation.shape, generator=torch.Generator().manual_seed(0))
        grads = torch.autograd.grad(out.representation, [r, bn.weight, neuron.Vth, conv.weight], grad)
        assert out.spikes.dense().dtype == dtype and out.representation.dtype == torch.float32
        results.append((out.spikes.dense().float(), out.representation, *grads))
    *exact, weight = results[0]
    *same, rounded = results[1]
    torch.testing.assert_close(same, exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rounded, weight, rtol=0, atol=0.01 * weight.abs().max().item())
    assert not torch.equal(rounded, weight)


def test_networks_train_in_bfloat16():
    model = create_model("preresnet.resnet20_lif", num_classes=5, timesteps=5, Vth=0.3, delta_t=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(8, 3, 32, 32))
    F.cross_entropy(logits, torch.arange(8) % 5).backward()
    assert logits.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_shared_dropout_mask_collapses_and_a_mask_a_step_falls_back(float64):
    frames = 3 * torch.rand(2, 3, 2, 48, 48)
    settings = SETTINGS | dict(num_classes=5, timesteps=3, dropout=0.3)
    model = create_model("vgg.vgg11_lif", dropout_mask="shared", **settings)
    grads = []
    for model.backward in ("unrolled", "collapsed"):
        torch.manual_seed(0)
        model.zero_grad()
        F.cross_entropy(model(frames), torch.tensor([0, 1])).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-10 * grads[0].norm().item())
    model = create_model("vgg.vgg11_lif", **settings)
    with pytest.warns(UserWarning, match="unrolls time"):
        assert model.encode(frames).backward == "unrolled"
    assert model.eval().encode(frames).backward == "collapsed"


class Dropping(SpikingNetwork):
    """Two layers on images of 3x8x8 with dropout between them, of which the network does not know."""

    def __init__(self, dropout):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(144, 5)
        self.first, self.last = (IFNeuron(timesteps=4, Vth=0.4) for _ in range(2))
        self.dropouts = [dropout]

    def spike(self, train):
        train = spiking_layer([(self.conv, train)], None, self.first)
        return spiking_layer([(self.head, train.drop(self.dropouts[0]).map(FLAT))], None, self.last)


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d, nn.AlphaDropout])
def test_no_kind_of_dropout_collapses_with_a_mask_a_step(kind):
    model, x = Dropping(kind(0.5)), torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="unrolled"):
        model(x)
    model.dropouts = nn.ModuleList(model.dropouts)
    with pytest.warns(UserWarning, match="unrolls time"):
        assert model.encode(x).backward == "unrolled"
    assert model.eval().encode(x).backward == "collapsed"


def test_a_default_device_is_not_that_of_random_choices():
    """As on a GPU: what a CPU's generator draws lies on the CPU."""
    with torch.device("meta"):
        check_linear(lambda x: 2 * x, torch.zeros(3, device="cpu"))
        drawn = draw(torch.zeros(2, 99, device="cpu"), 5, torch.Generator(device="cpu"))
    assert drawn.shape == (2, 5)


def test_gradient_of_the_logits_and_of_a_part_of_a_batch_norm(float64):
    model, x, grads = Net("lif", 3), torch.randn(2, 3, 8, 8), []
    randomize(model)
    model.bn1.weight.requires_grad_(False)
    for model.backward in ("unrolled", "collapsed"):
        model.zero_grad()
        logits = model(x)
        loss = F.cross_entropy(logits, torch.arange(2))
        (of_logits,) = torch.autograd.grad(loss, logits, retain_graph=True)
        loss.backward()
        grads.append((of_logits, model.bn1.bias.grad))
    torch.testing.assert_close(grads[1], grads[0])


def test_what_a_collapsed_layer_cannot_take_is_refused():
    model, x = Net("if", 3), torch.randn(2, 3, 8, 8)
    model.backward = "collapsed"
    for break_it, error in (
        (lambda net: setattr(net, "conv1", nn.Conv2d(4, 6, 3, 2, 1, padding_mode="circular")), TypeError),
        (lambda net: setattr(net, "conv1", nn.Conv2d(4, 6, 3, padding="same")), TypeError),
        (lambda net: setattr(net, "hidden", nn.ReLU()), TypeError),
        (lambda net: setattr(net, "stem", nn.Sequential(net.stem, nn.BatchNorm2d(4))), ValueError),
        (lambda net: setattr(net, "bn1", nn.BatchNorm2d(6, track_running_stats=False)), ValueError),
        (lambda net: setattr(net, "bn1", nn.GroupNorm(2, 6)), TypeError),
        (lambda net: setattr(net, "bn1", nn.InstanceNorm2d(6, track_running_stats=True)), TypeError),
        (lambda net: setattr(net, "conv1", nn.Sequential(net.conv1, nn.ReLU())), TypeError),
        (lambda net: setattr(net, "conv1", nn.Sequential(net.conv1)), TypeError),
    ):
        broken = copy.deepcopy(model)
        break_it(broken)
        with pytest.raises(error):
            broken(x)


def test_gradient_of_the_images(float64):
    """For an attack, say: autograd then unrolls time."""
    model, x = Net("if", 3), torch.randn(2, 3, 8, 8)
    randomize(model)
    grads = []
    for model.backward in ("unrolled", "collapsed"):
        image = x.clone().requires_grad_()
        model(image).square().sum().backward()
        grads.append(image.grad)
    torch.testing.assert_close(grads[1], grads[0])
    assert grads[0].any()


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a compiler"
)
def test_compiled_loops(float64):
    model, x = Net("lif", 3), torch.randn(2, 3, 8, 8)
    randomize(model)
    model.backward = "collapsed"
    compiled = copy.deepcopy(model)
    compiled.compile_loops()
    logits = [net(x) for net in (model, compiled)]
    for output in logits:
        output.square().sum().backward()
    torch.testing.assert_close(logits[1], logits[0])
    for p, q in zip(model.parameters(), compiled.parameters()):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("settings", [dict(name="preresnet.resnet20_ann"), dict(backward="unrolled")])
def test_without_collapsed_loops_none_are_compiled(settings):
    model = create_model(**dict(name="preresnet.resnet20_if", timesteps=2) | settings)
    with pytest.raises(RuntimeError, match="no loops"):
        model.compile_loops()


@pytest.mark.parametrize("kind", KINDS)
def test_a_penalty_on_the_firing_rate_of_a_hidden_layer(kind, float64):
    """Its gradient is that of autograd through the unrolled network, whatever its weights."""

    class Penalized(Net):
        def spike(self, train):
            first = spiking_layer([(self.stem, train)], self.bn0, self.n0)
            self.penalty = first.rate().square().sum()
            second = spiking_layer([(self.conv1, first)], self.bn1, self.n1)
            pooled = second.map(nn.AdaptiveAvgPool2d(1)).map(nn.Flatten())
            return spiking_layer([(nn.Linear(6, 5, bias=False), pooled)], self.bn3, self.n5)

    model, x, grads = Penalized(kind, 4), torch.randn(3, 3, 8, 8), []
    randomize(model)
    for model.backward in ("unrolled", "collapsed"):
        torch.manual_seed(3)
        model.zero_grad()
        (model(x).square().sum() + model.penalty).backward()
        grads.append([model.stem.weight.grad.clone(), model.n0.Vth.grad.clone()])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-12)
    assert grads[0][0].any()


def test_unknown_backward_passes_and_trains_of_another_length_are_refused():
    model = Net("if", 3)
    assert model.backward == "collapsed"
    with pytest.raises(ValueError, match="unknown backward"):
        model.backward = "colapsed"
    model.n1.timesteps = 5
    with pytest.raises(ValueError, match="3 time steps meets a neuron layer of 5"):
        model(torch.randn(2, 3, 8, 8))


class Mapped(SpikingNetwork):
    """Two layers on images of 3x8x8, with maps between them."""

    def __init__(self, *maps):
        super().__init__()
        self.conv, self.head, self.maps = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(64, 5), maps
        self.bn, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm1d(5)
        self.first, self.last = (IFNeuron(timesteps=4, Vth=0.4, alpha=0.4) for _ in range(2))

    def spike(self, train):
        train = spiking_layer([(self.conv, train)], self.bn, self.first)
        for function in self.maps:
            train = train.map(function)
        return spiking_layer([(self.head, train)], self.bn2, self.last)


POOLED, FLAT = nn.AvgPool2d(2), nn.Flatten()


@pytest.mark.parametrize(
    "maps",
    [
        (POOLED, FLAT),
        (lambda x: F.avg_pool2d(x, 2), lambda x: x.flatten(1)),
        (lambda x: 3 * x[..., ::2, ::2] + 1, FLAT),  # the offset is the same for every step and the mean
    ],
)
def test_linear_maps_keep_the_gradients(maps, float64):
    torch.manual_seed(1)
    model, x, before = Mapped(*maps), torch.randn(3, 3, 8, 8), torch.get_rng_state()
    assert_same(model, x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("maps", "complaint"),
    [
        ((nn.MaxPool2d(2), FLAT), "MaxPool2d.* not linear"),
        ((nn.LayerNorm(8, elementwise_affine=False), POOLED, FLAT), "LayerNorm.* not linear"),
        ((lambda x: x.clamp(0, 1), POOLED, FLAT), "not linear"),
        ((lambda x: x + 0.01 * x.square(), POOLED, FLAT), "not linear"),
        ((nn.Conv2d(4, 4, 2, 2), FLAT), "branch"),
    ],
)
def test_maps_that_do_not_commute_with_the_mean_are_refused(maps, complaint):
    if isinstance(maps[0], nn.Conv2d):
        maps[0].reset_parameters()  # by this test's seed, not by what was collected before it
    model, x = Mapped(*maps), torch.randn(3, 3, 8, 8)
    with pytest.raises(ValueError, match=complaint):
        model(x)
    model.backward = "unrolled"
    model(x).sum().backward()
    assert model.conv.weight.grad.any()


def test_a_map_of_the_image_trains_no_parameters():
    class Stem(Mapped):
        def spike(self, train):
            train = spiking_layer([(nn.Identity(), train.map(self.conv))], self.bn, self.first)
            return spiking_layer([(self.head, train.map(POOLED).map(FLAT))], self.bn2, self.last)

    model, x = Stem(), torch.randn(3, 3, 8, 8)
    with pytest.raises(ValueError, match="trains no parameters"):
        model(x)
    model.conv.requires_grad_(False)
    grads = []
    for model.backward in ("unrolled", "collapsed"):
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append(model.bn.weight.grad.clone())
    torch.testing.assert_close(grads[1], grads[0])
    assert grads[0].any()


def test_a_map_is_checked_again_when_its_parameters_train():
    conv, x = nn.Conv2d(4, 4, 2, 2).requires_grad_(False), torch.randn(3, 3, 8, 8)
    model = Mapped(conv, FLAT)
    model(x).sum().backward()
    assert model.conv.weight.grad.any() and conv.weight.grad is None
    conv.requires_grad_(True)
    with pytest.raises(ValueError, match="trains no parameters"):
        model(x)


def test_a_map_is_checked_in_the_mode_that_trains():
    """In eval mode dropout is linear; in training it draws other masks for the mean than for the spikes."""
    dropout = nn.Dropout(0.5)
    model, x = Mapped(POOLED, dropout, FLAT), torch.randn(3, 3, 8, 8)
    dropout.eval()
    model(x)
    dropout.train()
    with pytest.raises(ValueError, match="not linear"):
        model(x)


def test_a_network_ends_in_a_spiking_layer():
    class Ends(Mapped):
        def spike(self, train):
            return self.end(train)

    model, x = Ends(), torch.randn(3, 3, 8, 8)
    for model.end in (lambda train: train, lambda train: train.values()):
        with pytest.raises(TypeError, match="in which a network ends"):
            model(x)


class Perceptron(SpikingNetwork):
    def __init__(self, kind):
        super().__init__()
        self.hidden, self.head = nn.Linear(20, 16), nn.Linear(16, 5)
        self.bn, self.bn2 = nn.BatchNorm1d(16), nn.BatchNorm1d(5)
        settings = SETTINGS if kind == "lif" else dict(Vth=0.4, alpha=0.4)
        self.first, self.last = (KINDS[kind](timesteps=4, **settings) for _ in range(2))

    def spike(self, train):
        train = spiking_layer([(self.hidden, train)], self.bn, self.first)
        return spiking_layer([(self.head, train)], self.bn2, self.last)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_and_sequences_of_vectors(kind, float64):
    model, x = Perceptron(kind), torch.randn(6, 20)
    randomize(model)
    unrolled = assert_same(model, x)
    assert torch.equal(unrolled(x), unrolled(x.unsqueeze(1).repeat(1, 4, 1)))
    assert_same(model, torch.randn(6, 4, 20))
    for wrong in (torch.randn(6, 3, 20), torch.randn(20)):
        with pytest.raises(ValueError, match=r"vectors \(B, F\).*not a tensor of shape"):
            model(wrong)


def test_a_rate_can_be_read_where_nothing_is_differentiated(float64):
    model, x, rates = Net("if", 3), torch.randn(2, 3, 8, 8), []
    for model.backward in ("unrolled", "collapsed"):
        with torch.no_grad():
            rates.append(spiking_layer([(model.stem, model.encode(x))], model.bn0, model.n0).rate())
    torch.testing.assert_close(rates[1], rates[0])
    assert rates[0].any()

"""Networks by name: sizes from the literature, settings, official checkpoints, which way the imports run."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from models import LIFNeuron, create_model, list_models
from models.registry import NETWORKS

ROOT = Path(__file__).parents[2]


def test_every_published_name_is_there():
    depths, kinds = (18, 20, 32, 34, 44, 50, 56, 110), ("if", "lif", "ann")
    static = {f"preresnet.resnet{depth}_{kind}" for depth in depths for kind in kinds}
    events = {f"vgg.vgg{depth}_{kind}" for depth in (11, 13, 16, 19) for kind in ("if", "lif")}
    imagenet = {f"preresnet_snn.resnet{depth}_{kind}" for depth in (18, 34, 50) for kind in ("if", "lif")}
    for family in ("preresnet_ann", "preresnet_cal_Vth"):
        imagenet |= {f"{family}.{name}" for name in ("resnet18", "resnet34", "resnet50", "preresnet50")}
    assert set(list_models()) == static | events | imagenet


@pytest.mark.parametrize("name", list_models())
def test_layers_in_depth(name):
    """The number in the name counts the convolutions, but not the shortcuts', and the linear layer."""
    model = create_model(name, timesteps=2, tau=2.0, train_Vth=False, dropout=0.2, Vth_grad_scale=0.5)
    kinds = (nn.Conv2d, nn.Linear)
    apart = re.compile("shortcut|downsample")
    maps = [n for n, module in model.named_modules() if isinstance(module, kinds) and not apart.search(n)]
    depth = int(re.findall(r"\d+", name)[-1])
    # VGG-11 counts three fully connected layers, of which this network has one.
    assert len(maps) == (depth if "resnet" in name else depth - 2)
    assert not any(key.endswith("Vth") for key, _ in model.named_parameters())


# He et al. 2016, table 6: 0.27, 0.46, 0.66, 0.85, 1.7 million parameters; wide ResNet-18 has 11.17 million.
@pytest.mark.parametrize(
    ("depth", "millions"),
    [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.73), (18, 11.17), (34, 21.28)],
)
def test_number_of_parameters(depth, millions):
    model = create_model(f"preresnet.resnet{depth}_ann")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01, rel=0.005)


@pytest.mark.parametrize("name", ["preresnet.resnet50_lif", "preresnet.resnet20_if"])
def test_images_to_logits_and_a_gradient_everywhere(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=7, timesteps=3, Vth=0.3, alpha=0.3, delta_t=0.2)
    logits = model(torch.randn(4, 3, 32, 32))
    assert logits.shape == (4, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_static_images_are_constant_event_frames():
    model = create_model("vgg.vgg11_if", timesteps=3).eval()
    x = torch.rand(2, 2, 48, 48)
    assert torch.equal(model(x), model(x.unsqueeze(1).repeat(1, 3, 1, 1, 1)))
    with pytest.raises(ValueError, match="2, 4, 2, 48, 48"):
        model(torch.rand(2, 4, 2, 48, 48))


def test_ann_is_a_preact_resnet_with_relus():
    """Against the same layers called one by one, in the order of the specification."""
    torch.manual_seed(0)
    model = create_model("preresnet.resnet20_ann", timesteps=9).eval()
    x = torch.randn(2, 3, 32, 32)
    out = model.conv1(x)
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            first = block.bn1(out).relu()
            out = block.conv2(block.bn2(block.conv1(first)).relu()) + block.shortcut(first)
    out = nn.functional.avg_pool2d(model.bn1(out).relu(), 8).flatten(1)
    torch.testing.assert_close(model(x), model.bn2(model.linear(out)).relu())


def test_an_ann_has_its_loss_in_float32_under_autocast():
    model, x = create_model("preresnet.resnet20_ann"), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.float32
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_where_a_preact_resnet_drops():
    """Before the last convolution of every block, and before the linear layer: as specified, one by one."""
    model = create_model("preresnet.resnet20_ann", dropout=0.4)
    x = torch.randn(4, 3, 32, 32)
    torch.manual_seed(1)
    logits = model(x)
    torch.manual_seed(1)
    out = model.conv1(x)
    for block in (*model.layer1, *model.layer2, *model.layer3):
        first = block.bn1(out).relu()
        inner = nn.functional.dropout(block.bn2(block.conv1(first)).relu(), 0.4)
        out = block.conv2(inner) + block.shortcut(first)
    out = nn.functional.avg_pool2d(model.bn1(out).relu(), 8).flatten(1)
    expected = model.bn2(model.linear(nn.functional.dropout(out, 0.4))).relu()
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize(
    "name", ["preresnet.resnet18_lif", "preresnet.resnet20_if", "vgg.vgg11_lif", "preresnet_snn.resnet50_if"]
)
def test_weights_start_as_specified(name):
    """Convolutions normal with variance 2/(k*k*outputs); a VGG's linear layer with a deviation of 0.01."""
    torch.manual_seed(0)
    for layer_name, layer in create_model(name).named_modules():
        if isinstance(layer, nn.Conv2d):
            deviation = (2 / (layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels)) ** 0.5
            few = 4 / layer.weight.numel() ** 0.5  # standard errors, of a deviation 1/sqrt(2n)
            assert layer.weight.std().item() == pytest.approx(deviation, rel=few), layer_name
            assert abs(layer.weight.mean().item()) < few * deviation
        if isinstance(layer, nn.Linear) and name.startswith("vgg"):
            assert layer.weight.std().item() == pytest.approx(0.01, rel=0.02)
        if isinstance(layer, nn.Linear) and not name.startswith("preresnet_snn"):
            assert not layer.bias.any()
        if isinstance(layer, nn.Conv2d) and name.startswith("vgg"):
            assert not layer.bias.any()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            assert (layer.weight == 1).all() and (layer.bias == 0).all()


def test_dropout_defaults():
    rates = {
        name: {m.p for m in create_model(name).modules() if isinstance(m, nn.Dropout)}
        for name in ("vgg.vgg11_lif", "preresnet.resnet20_if")
    }
    assert rates == {"vgg.vgg11_lif": {0.1}, "preresnet.resnet20_if": {0.0}}


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="preresnet.resnet18_lif"):
        create_model("resnet18")
    with pytest.raises(ValueError, match="unrolled"):
        create_model("preresnet.resnet20_if", backward="sideways")
    with pytest.raises(ValueError, match="shared"):
        create_model("vgg.vgg11_if", dropout_mask="none")


def test_entries_say_what_programs_decide_by():
    """As published: the settings that each program starts from, what networks take, the ANN of each shape."""
    cifar = dict(timesteps=20, Vth=0.3, tau=1.0, delta_t=0.05, alpha=0.3, Vth_bound=0.0005)
    imagenet = dict(timesteps=50, Vth=6.0, tau=1.0, delta_t=0.05, alpha=0.5, Vth_bound=0.01)
    for name in list_models():
        entry, family = NETWORKS[name], name.partition(".")[0]
        program = "cifar" if family in ("preresnet", "vgg") else "imagenet"
        assert entry.program == program and name in list_models(program)
        assert entry.defaults.items() >= (cifar if program == "cifar" else imagenet).items()
        assert entry.defaults["num_classes"] == (10 if program == "cifar" else 1000)
        assert entry.defaults["dropout"] == (0.1 if family == "vgg" else 0.0)
        assert entry.defaults["Vth_grad_scale"] == (0.001 if re.match("preresnet_snn.*_if", name) else 1.0)
        assert (entry.ann in list_models()) == (family != "vgg")
    assert NETWORKS["preresnet_snn.resnet34_lif"].ann == "preresnet_ann.resnet34"
    assert NETWORKS["preresnet.resnet20_if"].ann == "preresnet.resnet20_ann"
    assert (NETWORKS["vgg.vgg11_if"].inputs, NETWORKS["vgg.vgg11_if"].shape) == ("event frames", (2, 48, 48))


def test_a_neuron_without_settings_has_those_of_the_cifar_programs():
    layer = LIFNeuron()
    found = {name: getattr(layer, name) for name in ("timesteps", "tau", "delta_t", "alpha", "Vth_bound")}
    assert found == dict(timesteps=20, tau=1.0, delta_t=0.05, alpha=0.3, Vth_bound=0.0005)
    assert layer.Vth.item() == pytest.approx(0.3)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("models", {"utils", "cifar", "imagenet"}),
        ("utils", {"models", "cifar", "imagenet"}),
        ("cifar", {"imagenet"}),
        ("imagenet", {"cifar"}),
    ],
)
def test_imports_run_one_way(folder, forbidden):
    used = {name for path in (ROOT / folder).rglob("*.py") for name in imported(path)}
    assert "utils" in used or "torch" in used
    assert not used & forbidden
    if folder == "models":
        own = {"torch", "models", "filelock"}  # the last comes with torch, whose dependency it is
        assert used - own <= sys.stdlib_module_names

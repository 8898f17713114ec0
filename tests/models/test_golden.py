"""Every figure of the authors' implementation, in float64."""

import pytest
import torch
import torch.nn.functional as F

from models import IFNeuron, LIFNeuron, create_model
from tests import golden
from tests.models.engines import available

NEURONS = golden.neuron_cases()
IMAGENET = golden.network_cases("imagenet_models.json")
NETWORKS = golden.network_cases() | {name: case for name, case in IMAGENET.items() if "case" in name}
SETTINGS = ("timesteps", "Vth", "tau", "delta_t", "alpha", "Vth_bound", "train_Vth")


def test_all_cases_are_there():
    assert len(NEURONS) == 35
    assert {case["model"].partition(".")[0] for case in NETWORKS.values()} == {
        "preresnet",
        "vgg",
        "preresnet_snn",
        "preresnet_ann",
    }


@pytest.mark.parametrize("name", NEURONS)
def test_neuron_layer(name):
    case = NEURONS[name]
    kind, ignored = (LIFNeuron, ()) if case["kind"] == "lif" else (IFNeuron, ("tau", "delta_t"))
    layer = kind(**{key: case[key] for key in SETTINGS if key not in ignored})
    layer.Vth.data = torch.tensor(case["Vth"], dtype=torch.float64)
    x, gy = (torch.from_numpy(case[key]) for key in ("x", "gy"))
    x.requires_grad_()
    y = layer(x)
    y.backward(gy)
    close = dict(rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(y.detach(), torch.from_numpy(case["y"]), **close)
    torch.testing.assert_close(x.grad, torch.from_numpy(case["gx"]), **close)
    torch.testing.assert_close(layer.decode(y).detach(), torch.from_numpy(case["rep"]), **close)
    assert layer.Vth.grad.item() == pytest.approx(case["Vth_grad"], rel=1e-9)
    assert y.count_nonzero() == case["spike_count"]


def assert_close_to(figures, tensor):
    """`figures`: [L2 norm, first entries]. Absolute too: a bias before batch norm has a zero gradient."""
    norm, head = figures
    got = [tensor.double().norm().item(), *tensor.flatten()[: len(head)].tolist()]
    assert got == pytest.approx([norm, *head], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("engine", ["none", *available()])
@pytest.mark.parametrize("name", NETWORKS)
def test_network(name, engine, float64):
    case = NETWORKS[name]
    settings = {key: case["setting"][key] for key in SETTINGS}
    model = create_model(
        case["model"],
        num_classes=case["num_classes"],
        dropout=0.0,
        backward="unrolled" if engine == "none" else "collapsed",
        engine="auto" if engine == "none" else engine,
        **settings,
    )
    assert {key: list(entry.shape) for key, entry in model.state_dict().items()} == case["keys"]
    assert list(model.state_dict()) == list(case["keys"])  # an official optimizer state goes by this order
    golden.fill(model, case["seed"])
    x, labels = golden.batch(name, case)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    losses = []
    for step in range(3):
        logits = model(x)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            torch.testing.assert_close(logits.detach(), torch.tensor(case["logits"]), rtol=1e-6, atol=1e-9)
            parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
            assert parameters.keys() == case["grads"].keys()
            for key, figures in case["grads"].items():
                assert_close_to(figures, parameters[key].grad)
            for key, figures in case["buffers"].items():
                assert_close_to(figures, buffers[key])
        optimizer.step()
    assert losses == pytest.approx(case["losses"], rel=1e-6)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), torch.tensor(case["eval_logits"]), rtol=1e-6, atol=1e-9)

"""Other neurons in the place of ours: SpikingJelly's compute the same, levels without spikes nearly so."""

import json
import shlex
import sys

import pytest
import torch

import reproduce
from benchmarks import levels
from models import IFNeuron, LIFNeuron, create_model

if sys.version_info < (3, 11):
    pytest.skip("the peer is SpikingJelly 2, which needs Python 3.11", allow_module_level=True)
from benchmarks.peer_run import main, peer_model, peer_of  # noqa: E402


@pytest.mark.parametrize("kind", ["if", "lif"])
def test_the_same_logits(kind):
    settings = dict(timesteps=3, Vth=0.3, alpha=0.5, delta_t=0.2)
    name = f"preresnet.resnet20_{kind}"
    ours, peer = create_model(name, **settings, backward="unrolled"), peer_model(name, **settings)
    peer.load_state_dict(ours.state_dict())
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(peer(images), ours(images))


@pytest.mark.parametrize("neuron", [IFNeuron, LIFNeuron])
def test_the_same_gradients(neuron):
    ours = neuron(timesteps=5, Vth=0.3, alpha=0.6, **dict(delta_t=0.2) if neuron is LIFNeuron else {})
    node, g = peer_of(ours), torch.randn(5 * 8, 30)
    start = torch.linspace(-1, 2, 8 * 30).view(8, 30) + torch.randn(5, 8, 30) / 10
    x, y = start.flatten(0, 1).requires_grad_(), start.clone().requires_grad_()
    ours(x).backward(g)
    node(y).flatten(0, 1).backward(g)
    torch.testing.assert_close(x.grad, y.grad.flatten(0, 1))
    torch.testing.assert_close(ours.Vth.grad, node.v_threshold.grad)
    assert x.grad.any() and not x.grad.all() and ours.Vth.grad  # in all zones of the clamp


def test_levels_are_what_spikes_of_currents_that_stay_represent():
    """And their gradients those of the neuron: with the same current at every step, spikes come evenly."""
    neuron = IFNeuron(timesteps=5, Vth=0.3, alpha=0.5)
    (_, layer), *_ = levels.neuron_layers(levels.levels_model("preresnet.resnet20_if", timesteps=5, Vth=0.3))
    x = torch.linspace(-0.2, 0.6, 999).requires_grad_()
    y, g = x.detach().clone().requires_grad_(), torch.randn(999)
    represented = neuron.decode(neuron(x.expand(5, -1).flatten()[:, None]))[:, 0]
    represented.backward(g)
    layer(y).backward(g)
    torch.testing.assert_close(layer(y), represented)
    torch.testing.assert_close(y.grad, x.grad)
    torch.testing.assert_close(layer.Vth.grad, neuron.Vth.grad)


@pytest.mark.parametrize(
    "start, suffix, neurons",
    [(main, "peer", "spikingjelly 2.0.0"), (levels.main, "levels", "3 levels without spikes")],
)
def test_a_run_is_named_and_listed_apart(start, suffix, neurons, images, tmp_path):
    flags = (
        f"--dataset imagefolder --path {images} --checkpoint {tmp_path} --epochs 1 --timesteps 2 --Vth auto"
    )
    start(["depth-if-20", *shlex.split(f"{flags} --train-batch 5 --workers 0 --device cpu")])
    (log,) = (tmp_path / "imagefolder").glob(f"*_{suffix}.txt")
    state = torch.load(log.with_suffix(".pth"), weights_only=True)["state_dict"]
    fitted = json.loads(log.with_suffix(".json").read_text())["fitted_Vth"]
    assert state.keys() == create_model("preresnet.resnet20_if").state_dict().keys()
    assert all(state[f"{name}.Vth"] != value for name, value in fitted.items() if "[" not in name)  # trained
    ((_, text),) = reproduce.find_runs(tmp_path)
    assert f"neurons {neurons} instead of ours" in text

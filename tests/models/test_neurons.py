"""Spike trains and gradients worked out by hand, and what a layer promises to whoever builds it in."""

import math

import pytest
import torch

from models import IFNeuron, LIFNeuron

HALF = math.log(2)  # with tau = 1 and this delta_t the membrane halves at every step


def run(layer, currents):
    """One neuron, T steps of current -> list of 0/1 spikes and the layer's output."""
    out = layer(torch.tensor(currents).unsqueeze(1)).squeeze(1)
    return (out != 0).int().tolist(), out


# On paper, Vth = 1. U after each current, a spike where U >= alpha, 1 subtracted after a spike:
IF_TRAINS = [
    # U: .625 1.25* .875 1.5* 1.125* .75
    (1.0, [0.625] * 6, [0, 1, 0, 1, 1, 0]),
    # U: .625* .25 .875* .5* .125 .75*  (V dips below 0 after an early spike; .5 = alpha*Vth fires)
    (0.5, [0.625] * 6, [1, 0, 1, 1, 0, 1]),
    # U: -1 0.5 1.0* 0 (a tie fires)
    (1.0, [-1.0, 1.5, 0.5, 0.0], [0, 0, 1, 0]),
    # U: 3* 2* 1* 0 : one spike a step, the rest is carried over
    (1.0, [3.0, 0.0, 0.0, 0.0], [1, 1, 1, 0]),
]
# U = V/2 + x/2
LIF_TRAINS = [
    # U: .6 .9 1.05* .625 .9125 1.05625*
    (1.0, [1.2] * 6, [0, 0, 1, 0, 0, 1]),
    # U: .65* .475 .8875* .59375* .446875 .8734375*
    (0.5, [1.3] * 6, [1, 0, 1, 1, 0, 1]),
    # U: 2* .5 1.25* : the membrane forgets
    (1.0, [4.0, 0.0, 2.0], [1, 0, 1]),
]


@pytest.mark.parametrize(("alpha", "currents", "spikes"), IF_TRAINS)
def test_if_spikes(alpha, currents, spikes):
    layer = IFNeuron(timesteps=len(currents), Vth=1.0, alpha=alpha)
    fired, out = run(layer, currents)
    assert fired == spikes
    assert out.tolist() == spikes  # amplitude Vth = 1


@pytest.mark.parametrize(("alpha", "currents", "spikes"), LIF_TRAINS)
def test_lif_spikes(alpha, currents, spikes):
    layer = LIFNeuron(timesteps=len(currents), Vth=1.0, alpha=alpha, tau=1.0, delta_t=HALF)
    fired, out = run(layer, currents)
    assert fired == spikes
    assert out.tolist() == pytest.approx([s / HALF for s in spikes])  # amplitude Vth / delta_t


def test_threshold_below_its_bound_is_projected_and_keeps_its_gradient():
    layer = IFNeuron(timesteps=2, Vth=1.0, alpha=1.0, Vth_bound=0.5)
    layer.Vth.data.fill_(0.1)
    fired, out = run(layer, [0.5, 0.75])  # U: .5* .75*, with Vth = .5; at Vth = .1 the output would be .1
    assert out.tolist() == [0.5, 0.5]
    assert layer.Vth.item() == 0.5
    out.sum().backward()  # rate .625 > Vth: G = 1, grad = T*G
    assert layer.Vth.grad.item() == 2.0


def test_lif_threshold_at_its_bound():
    layer = LIFNeuron(timesteps=3, Vth=1.0, alpha=1.0, Vth_bound=0.5, tau=1.0, delta_t=HALF)
    layer.Vth.data.fill_(-2.0)
    fired, out = run(layer, [0.6, 1.0, 0.6])  # Vth = .5; U: .3 .65* .375 (V = .15, halved, and .3)
    assert fired == [0, 1, 0] and layer.Vth.item() == 0.5
    assert out.tolist() == pytest.approx([0, 0.5 / HALF, 0])


def test_dynamics_can_be_called_with_a_trainable_threshold():
    spikes = IFNeuron(timesteps=2, Vth=1.0, alpha=1.0).fire(torch.tensor([[2.0], [0.0]]))
    assert spikes.tolist() == [[1.0], [1.0]] and not spikes.requires_grad


def gradients(layer, currents, grad):
    x = torch.tensor(currents).unsqueeze(1).requires_grad_()
    layer(x).backward(torch.tensor(grad).unsqueeze(1))
    return x.grad.squeeze(1).tolist(), layer.Vth.grad.item()


def test_if_gradient_by_hand():
    settings = dict(timesteps=2, Vth=1.0, alpha=1.0)
    assert gradients(IFNeuron(**settings), [0.5, 1.0], [1.0, 3.0]) == ([2.0, 2.0], 0.0)
    assert gradients(IFNeuron(**settings), [1.5, 1.0], [1.0, 3.0]) == ([0.0, 0.0], 4.0)
    assert gradients(IFNeuron(**settings), [-1.5, 1.0], [1.0, 3.0]) == ([0.0, 0.0], 0.0)
    # The interval is closed: rates of exactly 0 and exactly Vth pass.
    assert gradients(IFNeuron(**settings), [-1.0, 1.0], [1.0, 3.0]) == ([2.0, 2.0], 0.0)
    assert gradients(IFNeuron(**settings), [1.0, 1.0], [1.0, 3.0]) == ([2.0, 2.0], 0.0)
    assert gradients(IFNeuron(**settings, Vth_grad_scale=0.5), [1.5, 1.0], [1.0, 3.0])[1] == 2.0


def test_lif_gradient_by_hand():
    # Weights 1/3, 2/3; the clamp ends at Vth*tau/delta_t = 1/HALF = 1.44; G = 3/3 + 2*6/3 = 5, over tau.
    settings = dict(timesteps=2, Vth=1.0, alpha=1.0, tau=2.0, delta_t=2 * HALF)
    inside, grad = gradients(LIFNeuron(**settings), [1.0, 1.0], [3.0, 6.0])
    assert inside == pytest.approx([2.5, 2.5]) and grad == 0.0
    above, grad = gradients(LIFNeuron(**settings), [2.0, 2.0], [3.0, 6.0])
    assert above == [0.0, 0.0] and grad == pytest.approx(2 * HALF * 2 * 5)
    # The interval is open: a weighted rate of exactly 0 does not pass.
    assert gradients(LIFNeuron(**settings), [0.0, 0.0], [3.0, 6.0]) == ([0.0, 0.0], 0.0)


@pytest.mark.parametrize("kind", [IFNeuron, LIFNeuron])
def test_works_alone_in_any_shape_and_precision(kind):
    layer = kind(timesteps=4, Vth=0.5, alpha=0.5)
    x = 10 * torch.rand(8, 3, 5, 5)
    expected = layer(x)
    assert expected.shape == x.shape and expected.any()
    assert torch.equal(layer(x.flatten(1)), expected.flatten(1))
    assert torch.equal(layer(x.to(memory_format=torch.channels_last)), expected)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer.double()(x.double()).dtype == torch.float64
    with pytest.raises(ValueError, match="10 rows cannot be split into 4"):
        layer(torch.rand(10, 3))


def test_autocast_keeps_the_membrane_in_float32():
    layer = IFNeuron(timesteps=20, Vth=1.0, alpha=1.0)
    currents = torch.full((20, 1), 0.0625).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(currents)
    assert out.dtype == torch.float32
    assert out.sum() == 1.0  # 20 * 0.0625 = 1.25: one spike


def test_nothing_but_the_threshold_has_a_gradient():
    class Leaky(IFNeuron):
        def __init__(self):
            super().__init__()
            self.decay = torch.nn.Parameter(torch.tensor(0.9))

    with pytest.raises(TypeError, match="decay: only Vth has a gradient"):
        Leaky()


def test_fixed_threshold_is_a_buffer_that_a_checkpoint_may_lack():
    layer = IFNeuron(Vth=0.7, train_Vth=False)
    assert not list(layer.parameters()) and list(layer.state_dict()) == ["Vth"]
    layer.load_state_dict({})
    assert layer.Vth.item() == pytest.approx(0.7)
    layer.load_state_dict({"Vth": torch.tensor(0.9)})
    assert layer.Vth.item() == pytest.approx(0.9)
    with pytest.raises(RuntimeError, match="Vth"):
        IFNeuron().load_state_dict({})


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (dict(timesteps=0), "timesteps"),
        (dict(Vth=0), "Vth"),
        (dict(alpha=0), "alpha"),
        (dict(alpha=1.5), "alpha"),
        (dict(tau=0), "tau"),
        (dict(delta_t=-1), "delta_t"),
        (dict(Vth=float("nan")), "Vth"),
        (dict(Vth=0.1, Vth_bound=0.2), "Vth_bound"),
    ],
)
def test_settings_out_of_range(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        LIFNeuron(**settings)

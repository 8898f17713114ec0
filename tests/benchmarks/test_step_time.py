"""What benchmarks/step_time.py measures."""

import sys

import pytest
import torch

from benchmarks.rounded import rounded
from benchmarks.step_time import build, get_parser, step
from models import create_model


def test_weights_of_a_checkpoint_are_measured(tmp_path):
    torch.manual_seed(3)
    state = create_model("preresnet.resnet20_if", num_classes=10).state_dict()
    torch.save(dict(state_dict=state), tmp_path / "trained.pth")
    flags = ["--model", "preresnet.resnet20_if", "--weights", str(tmp_path / "trained.pth")]
    built = build("dense", get_parser().parse_args(flags), 2).state_dict()
    assert built.keys() == state.keys() and all(torch.equal(built[key], state[key]) for key in state)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="SpikingJelly 2 needs Python 3.11")
def test_the_peer_computes_what_the_unrolled_network_does():
    """SpikingJelly's neurons in the same network, with the same weights."""
    args = get_parser().parse_args(["--model", "preresnet.resnet20_if", "--batch", "2", "--Vth", "0.5"])
    x, logits = torch.randn(2, 3, 32, 32), []
    for variant in ("peer", "unrolled"):
        logits.append(build(variant, args, 2)(x).detach())
        weights = build(variant, args, 2)
        before = weights.conv1.weight.detach().clone()
        step(variant, args, 2, weights)()
        assert not torch.equal(weights.conv1.weight, before)
    torch.testing.assert_close(*logits)
    assert logits[0].any()


def test_few_levels_in_the_place_of_relus():
    """Many of them are a ReLU, cut off at the threshold."""
    torch.manual_seed(0)
    ann, x = create_model("preresnet.resnet20_ann").eval(), torch.randn(2, 3, 32, 32)
    expected = ann(x)
    few = rounded(ann, create_model("preresnet.resnet20_if", Vth=100.0, timesteps=10**6))
    torch.testing.assert_close(few(x), expected, rtol=1e-2, atol=1e-3)

"""SpikingJelly's neurons in our network compute what ours do, and a run by them stands apart from ours."""

import json
import shlex

import pytest
import torch

import reproduce
from benchmarks.peer_run import main, peer_model
from models import create_model


@pytest.mark.parametrize("kind", ["if", "lif"])
def test_the_same_logits(kind):
    settings = dict(timesteps=3, Vth=0.3, alpha=0.5, delta_t=0.2)
    name = f"preresnet.resnet20_{kind}"
    ours, peer = create_model(name, **settings, backward="unrolled"), peer_model(name, **settings)
    peer.load_state_dict(ours.state_dict())
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(peer(images), ours(images))


def test_a_run_is_named_and_listed_apart(images, tmp_path):
    flags = (
        f"--dataset imagefolder --path {images} --checkpoint {tmp_path} --epochs 1 --timesteps 2 --Vth auto"
    )
    main(["depth-if-20", *shlex.split(f"{flags} --train-batch 5 --workers 0 --device cpu")])
    (log,) = (tmp_path / "imagefolder").glob("*_peer.txt")
    state = torch.load(log.with_suffix(".pth"), weights_only=True)["state_dict"]
    fitted = json.loads(log.with_suffix(".json").read_text())["fitted_Vth"]
    assert state.keys() == create_model("preresnet.resnet20_if").state_dict().keys()
    assert all(state[f"{name}.Vth"] != value for name, value in fitted.items() if "[" not in name)  # trained
    ((_, text),) = reproduce.find_runs(tmp_path)
    assert "neurons spikingjelly 2.0.0 instead of ours" in text

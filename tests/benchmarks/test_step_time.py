"""What benchmarks/step_time.py measures."""

import torch

from benchmarks.step_time import build, get_parser
from models import create_model


def test_weights_of_a_checkpoint_are_measured(tmp_path):
    torch.manual_seed(3)
    state = create_model("preresnet.resnet20_if", num_classes=10).state_dict()
    torch.save(dict(state_dict=state), tmp_path / "trained.pth")
    flags = ["--model", "preresnet.resnet20_if", "--weights", str(tmp_path / "trained.pth")]
    built = build("dense", get_parser().parse_args(flags), 2).state_dict()
    assert built.keys() == state.keys() and all(torch.equal(built[key], state[key]) for key in state)

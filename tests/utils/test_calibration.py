"""Calibration against the golden figures and a full sort; threshold files, official and broken."""

import math

import pytest
import torch
from torch import nn

from models import create_model
from tests import golden
from utils import checkpoint
from utils.cli import UserError
from utils.thresholds import calibrate, load_thresholds

CASES = golden.network_cases("imagenet_models.json")
CASES = {name: case for name, case in CASES.items() if name.startswith("preresnet_cal_Vth")}


@pytest.mark.parametrize("name", CASES)
def test_golden_thresholds_in_any_batch_split(name, float64):
    case = CASES[name]
    expected = {key: value for key, (value, _) in case["thresholds"].items()}
    model = create_model(name, num_classes=case["thresholds"]["storein4"][1] // 12)
    golden.fill(model, case["seed"])
    batches = [golden.generator(1000 + b).standard_normal((4, 3, 64, 64)) for b in case["batches"]]
    batches = [torch.from_numpy(batch) for batch in batches]
    for sizes in ([4, 4, 4], [5, 1, 6]):
        thresholds = calibrate(model, torch.cat(batches).split(sizes), 12)
        recorded = {key.replace("[", ".").replace("]", ""): value for key, value in thresholds.items()}
        assert {key: value.item() for key, value in recorded.items()} == pytest.approx(expected, rel=1e-9)


def test_the_fraction_counts_by_hand():
    """Of 1 to 2000 element int(0.999*2000) = 1998 is 1999; of 999 zeros and a 7 the last; no negatives."""
    relu = nn.Sequential(nn.Identity(), nn.ReLU())
    shuffled = 1 + torch.randperm(2000, generator=torch.Generator().manual_seed(0)).float().view(20, 100)
    one = torch.zeros(10, 100)
    one[3, 4] = 7.0
    for images, value in ((shuffled, 1999.0), (one, 7.0), (one - 9, 0.0), (one[:9], 7.0)):
        for size in (1, 3, 20):
            assert calibrate(relu, images.split(size), len(images)) == {"1": torch.tensor(value)}


@pytest.mark.parametrize("fraction", [0.0, 0.37, 0.999])
def test_against_a_full_sort(fraction):
    images = torch.randn(37, 2, 9, generator=torch.Generator().manual_seed(1))
    (value,) = calibrate(nn.Sequential(nn.ReLU()), images.split(8), 37, fraction).values()
    everything = sorted(max(x, 0.0) for x in images.flatten().tolist())
    assert value.item() == everything[int(fraction * len(everything))]
    assert value.untyped_storage().nbytes() == 4  # a file of thresholds holds nothing else


def official(value=0.5):
    """A threshold file as the official code writes it for a ResNet-18."""
    layers = [
        f"layer{stage}[{block}].storein{i}" for stage in (1, 2, 3, 4) for block in (0, 1) for i in (1, 2)
    ]
    thresholds = {layer: (torch.tensor(value + i),) for i, layer in enumerate(layers)}
    return thresholds | {f"storein{i}": torch.tensor(value + 100 * i) for i in (1, 2, 3, 4)}


@pytest.mark.parametrize("train_Vth", [True, False])
@pytest.mark.parametrize(("kind", "factor"), [("if", 1), ("lif", 0.05)])
def test_official_thresholds_load(kind, factor, train_Vth, tmp_path):
    torch.save(official(), tmp_path / "official.dict")
    model = create_model(f"preresnet_snn.resnet18_{kind}", num_classes=2, train_Vth=train_Vth)
    load_thresholds(model, tmp_path / "official.dict")
    state = model.state_dict()
    assert len([key for key in state if key.endswith("Vth")]) == 20
    assert state["relu3.Vth"].item() == pytest.approx(300.5 * factor)
    assert state["layer3.1.relu2.Vth"].item() == pytest.approx(11.5 * factor)
    assert model.relu3.Vth.requires_grad is train_Vth


def test_own_thresholds_load(tmp_path):
    torch.manual_seed(0)
    ann = create_model("preresnet_cal_Vth.resnet18", num_classes=5)
    thresholds = calibrate(ann, [torch.randn(4, 3, 32, 32)], 4)
    checkpoint.save(thresholds, tmp_path / "own.dict")
    model = create_model("preresnet_snn.resnet18_if", num_classes=5)
    load_thresholds(model, tmp_path / "own.dict")
    assert model.layer2[1].relu1.Vth.item() == thresholds["layer2[1].storein1"].item() > 0


BROKEN = {
    "missing layer": ({"storein3": None}, "storein3 is missing"),
    "another network": ({"layer3[5].storein2": (torch.tensor(1.0),)}, "layer3[5].storein2 is unknown"),
    "zero": ({"layer2[0].storein1": (torch.tensor(0.0),)}, "layer2[0].storein1"),
    "NaN": ({"storein1": torch.tensor(math.nan)}, "storein1"),
    "infinite": ({"storein1": torch.tensor(math.inf)}, "storein1"),
    "negative": ({"storein1": -1.0}, "storein1"),
    "text": ({"storein1": "6"}, "storein1"),
    "a vector": ({"storein1": torch.ones(3)}, "storein1"),
    "complex": ({"storein1": torch.tensor(1j)}, "storein1"),
    "two values": ({"layer1[0].storein1": (1.0, 2.0)}, "layer1[0].storein1"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_thresholds_are_refused(what, tmp_path):
    change, named = BROKEN[what]
    content = {key: value for key, value in (official() | change).items() if value is not None}
    torch.save(content, tmp_path / "broken.dict")
    model = create_model("preresnet_snn.resnet18_if", num_classes=2, Vth=3.0)
    with pytest.raises(UserError, match="broken.dict") as error:
        load_thresholds(model, tmp_path / "broken.dict")
    assert named in str(error.value) and len(str(error.value).splitlines()) == 1
    assert {neuron.Vth.item() for neuron in (model.relu1, model.relu4, model.layer1[0].relu1)} == {3.0}


@pytest.mark.parametrize("content", [[1.0], torch.ones(3), {"state_dict": {"conv1.weight": torch.ones(3)}}])
def test_a_file_without_thresholds_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "other.dict")
    with pytest.raises(UserError, match="other.dict"):
        load_thresholds(create_model("preresnet_snn.resnet18_if", num_classes=2), tmp_path / "other.dict")

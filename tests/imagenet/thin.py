"""The ImageNet program with thin networks of four blocks in place of the published ones."""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from imagenet.main import main  # noqa: E402
from models import registry  # noqa: E402
from models.preresnet_imagenet import ImageNetPreActResNet, basic  # noqa: E402
from utils.cli import run_program  # noqa: E402

network = partial(ImageNetPreActResNet, lambda *shape: basic(shape[0], shape[1] // 8, shape[2]), [1, 1, 1, 1])
NETWORKS = {
    f"preresnet_{family}": (partial(network, norms_last=family.startswith("snn")), kind)
    for family, kind in (
        ("ann.resnet18", "ann"),
        ("cal_Vth.resnet18", "ann"),
        ("snn.resnet18_if", "if"),
        ("snn.resnet18_lif", "lif"),
    )
}

if __name__ == "__main__":
    registry.NETWORKS.update(NETWORKS)
    run_program(main)

"""Thin networks of four blocks, to be registered in place of the published ones."""

from functools import partial

from models.preresnet_imagenet import ImageNetPreActResNet, basic

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

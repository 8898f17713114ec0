"""Thin networks of four blocks, to be registered in place of the published ones."""

from dataclasses import replace
from functools import partial

from models import registry
from models.blocks import basic
from models.preresnet_imagenet import ImageNetPreActResNet

network = partial(ImageNetPreActResNet, lambda *shape: basic(shape[0], shape[1] // 8, shape[2]), [1, 1, 1, 1])

NETWORKS = {
    name: replace(
        registry.NETWORKS[name], build=partial(network, norms_last=registry.NETWORKS[name].kind != "ann")
    )
    for name in (
        "preresnet_ann.resnet18",
        "preresnet_cal_Vth.resnet18",
        "preresnet_snn.resnet18_if",
        "preresnet_snn.resnet18_lif",
    )
}

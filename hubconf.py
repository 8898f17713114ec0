"""Entry points of torch.hub: `torch.hub.load(REPOSITORY, "create_model", "preresnet.resnet18_lif")`.

REPOSITORY is `owner/name` on GitHub or, with source="local", a folder. `list_models` gives the names.
`torch.hub.load(REPOSITORY, "resnet20_lif_cifar10", pretrained=True)` is a network that comes trained, on a
JPEG copy of CIFAR-10; checkpoint/README.md says how, and what it takes.
"""

from pathlib import Path as _Path

import torch

from models import IFNeuron, LIFNeuron, create_model, list_models  # noqa: F401  (entry points as well)

dependencies = ["torch"]
PRETRAINED = _Path(__file__).parent / "checkpoint" / "pretrained"
SETTINGS = ("timesteps", "tau", "delta_t", "alpha", "Vth_bound")


def resnet20_if_cifar10(pretrained=False):
    """ResNet-20 of IF neurons, trained on a JPEG copy of CIFAR-10: (B, 3, 32, 32) -> logits (B, 10)."""
    return _network("resnet20_if_cifar10", pretrained)


def resnet20_lif_cifar10(pretrained=False):
    """ResNet-20 of LIF neurons, trained on a JPEG copy of CIFAR-10: (B, 3, 32, 32) -> logits (B, 10)."""
    return _network("resnet20_lif_cifar10", pretrained)


def resnet20_ann_cifar10(pretrained=False):
    """ResNet-20 with ReLUs, an ANN, trained on a JPEG copy of CIFAR-10; SNNs may start from it."""
    return _network("resnet20_ann_cifar10", pretrained)


def _network(name, pretrained):
    """The network with its settings of training and, if `pretrained`, its weights, thresholds among them.

    It takes images normalised as CIFAR-10, and classifies in eval mode. `models.fit_thresholds` fits the
    thresholds of one without weights to its data.
    """
    content = torch.load(PRETRAINED / f"{name}.pth", map_location="cpu", weights_only=True)
    args = content["args"]
    settings = {key: args[key] for key in SETTINGS}
    model = create_model(args["model"], num_classes=len(content["classes"]), **settings)
    if pretrained:
        model.load_state_dict(content["state_dict"])
    return model

"""Networks by their published names: `create_model("preresnet.resnet18_lif", num_classes=10)`."""

from functools import partial

import torch
from torch import nn

from models.neurons import IFNeuron, LIFNeuron, ReLU
from models.preresnet import BasicBlock, Bottleneck, PreActResNet
from models.preresnet_imagenet import ImageNetPreActResNet, basic, bottleneck
from models.vgg import STAGES, VGG

# The settings that the program of a network starts from.
CIFAR_SETTINGS = dict(
    num_classes=10, timesteps=20, Vth=0.3, tau=1.0, delta_t=0.05, alpha=0.3, Vth_bound=0.0005
)
IMAGENET_SETTINGS = dict(
    num_classes=1000, timesteps=50, Vth=6.0, tau=1.0, delta_t=0.05, alpha=0.5, Vth_bound=0.01
)

WIDE = {
    "resnet18": partial(PreActResNet, BasicBlock, [2, 2, 2, 2], [64, 128, 256, 512]),
    "resnet34": partial(PreActResNet, BasicBlock, [3, 4, 6, 3], [64, 128, 256, 512]),
    "resnet50": partial(PreActResNet, Bottleneck, [3, 4, 6, 3], [64, 128, 256, 512]),
}
NARROW = {
    f"resnet{depth}": partial(PreActResNet, BasicBlock, [(depth - 2) // 6] * 3, [16, 32, 64])
    for depth in (20, 32, 44, 56, 110)
}
EVENT = {f"vgg{depth}": partial(VGG, depth) for depth in STAGES}
IMAGENET = {
    "resnet18": partial(ImageNetPreActResNet, basic, [2, 2, 2, 2]),
    "resnet34": partial(ImageNetPreActResNet, basic, [3, 4, 6, 3]),
    "resnet50": partial(ImageNetPreActResNet, bottleneck, [3, 4, 6, 3]),
}

# name -> (network, kind of its activations)
NETWORKS = {
    **{
        f"preresnet.{n}_{kind}": (net, kind)
        for n, net in (WIDE | NARROW).items()
        for kind in ("if", "lif", "ann")
    },
    **{f"vgg.{n}_{kind}": (net, kind) for n, net in EVENT.items() for kind in ("if", "lif")},
    **{
        f"preresnet_snn.{n}_{kind}": (partial(net, norms_last=True), kind)
        for n, net in IMAGENET.items()
        for kind in ("if", "lif")
    },
    **{  # an ANN twice, and ResNet-50 under a second published name
        f"{family}.{n}": (partial(net, norms_last=False), "ann")
        for family in ("preresnet_ann", "preresnet_cal_Vth")
        for n, net in (IMAGENET | {"preresnet50": IMAGENET["resnet50"]}).items()
    },
}


def list_models():
    """The names that `create_model` knows, sorted."""
    return sorted(NETWORKS)


def create_model(
    name,
    *,
    num_classes=None,
    timesteps=None,
    Vth=None,
    tau=None,
    delta_t=None,
    alpha=None,
    Vth_bound=None,
    train_Vth=True,
    dropout=None,
    Vth_grad_scale=None,
    backward="collapsed",
    dropout_mask="step",
    engine="auto",
):
    """The network `name` of `list_models()`: images (B, 3, H, W) or event frames (B, T, 2, H, W) to logits.

    Every name takes every setting and ignores those that do not apply (an ANN all that concern neurons). None
    stands for the default of the name's program; dropout: 0, VGG 0.1; Vth_grad_scale: 1, and 0.001 for
    `preresnet_snn.*_if`. backward: "collapsed" (exact, see `collapsed`), "unrolled" (the same, literally) or
    "rate" (an approximation). dropout_mask: "step", as published, under which training unrolls time, or
    "shared" by all time steps. engine: "auto", "dense" or "events" (see `engines`). Raises ValueError for an
    unknown name, backward pass, mask or engine, or for settings out of range.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown model {name!r}; choose from: {', '.join(list_models())}")
    if dropout_mask not in ("step", "shared"):
        raise ValueError(f"unknown dropout_mask {dropout_mask!r}; choose from: step, shared")
    network, kind = NETWORKS[name]
    given = dict(timesteps=timesteps, Vth=Vth, tau=tau, delta_t=delta_t, alpha=alpha, Vth_bound=Vth_bound)
    given = {key: value for key, value in dict(given, num_classes=num_classes).items() if value is not None}
    settings = (CIFAR_SETTINGS if name.startswith(("preresnet.", "vgg.")) else IMAGENET_SETTINGS) | given
    classes = settings.pop("num_classes")
    if dropout is None:
        dropout = 0.1 if name.startswith("vgg.") else 0.0
    if Vth_grad_scale is None:
        Vth_grad_scale = 0.001 if name.startswith("preresnet_snn.") and kind == "if" else 1.0
    settings.update(train_Vth=train_Vth, Vth_grad_scale=Vth_grad_scale)
    model = network(activation=activation_factory(kind, settings), num_classes=classes, dropout=dropout)
    model.backward, model.engine = "unrolled" if kind == "ann" else backward, engine
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.shared = dropout_mask == "shared"
    return model if model.backward == "unrolled" else model.to(memory_format=torch.channels_last)


def activation_factory(kind, settings):
    """A function that makes one activation: "if" and "lif" neuron layers with `settings`, "ann" a ReLU."""
    if kind == "ann":
        return ReLU
    if kind == "lif":
        return partial(LIFNeuron, **settings)
    return partial(
        IFNeuron, **{key: value for key, value in settings.items() if key not in ("tau", "delta_t")}
    )

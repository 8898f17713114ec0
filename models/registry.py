"""Networks by their published names: `create_model("preresnet.resnet18_lif", num_classes=10)`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from models import preresnet, preresnet_imagenet
from models.blocks import basic
from models.neurons import DEFAULTS, IFNeuron, LIFNeuron, ReLU
from models.preresnet import PreActResNet
from models.preresnet_imagenet import ImageNetPreActResNet
from models.trains import Dropout
from models.vgg import STAGES, VGG

KINDS = {"if": IFNeuron, "lif": LIFNeuron, "ann": ReLU}
CIFAR = DEFAULTS | dict(num_classes=10, dropout=0.0, Vth_grad_scale=1.0)
IMAGENET = CIFAR | dict(num_classes=1000, timesteps=50, Vth=6.0, alpha=0.5, Vth_bound=0.01)

WIDE = {
    "resnet18": partial(PreActResNet, basic, [2, 2, 2, 2], [64, 128, 256, 512]),
    "resnet34": partial(PreActResNet, basic, [3, 4, 6, 3], [64, 128, 256, 512]),
    "resnet50": partial(PreActResNet, preresnet.bottleneck, [3, 4, 6, 3], [64, 128, 256, 512]),
}
NARROW = {
    f"resnet{depth}": partial(PreActResNet, basic, [(depth - 2) // 6] * 3, [16, 32, 64])
    for depth in (20, 32, 44, 56, 110)
}
LARGE = {
    "resnet18": partial(ImageNetPreActResNet, basic, [2, 2, 2, 2]),
    "resnet34": partial(ImageNetPreActResNet, basic, [3, 4, 6, 3]),
    "resnet50": partial(ImageNetPreActResNet, preresnet_imagenet.bottleneck, [3, 4, 6, 3]),
}


@dataclass(frozen=True)
class Entry:
    """What is known of a network: all that programs decide by.

    build(activation=, num_classes=, dropout=) makes it. kind: of its activations, see `KINDS`. program: the
    one that trains it. inputs, shape: what it takes, in the words of the data sets, and the size of one.
    ann: the name of the ANN of the same shape, if there is one. defaults: of `create_model`'s settings.
    """

    build: Callable
    kind: str
    program: str = "cifar"
    inputs: str = "images"
    shape: tuple = (3, 32, 32)
    ann: str | None = None
    defaults: dict = field(default_factory=lambda: CIFAR)


def published():
    """Name -> Entry of every network."""
    found = {}
    for name, build in (WIDE | NARROW).items():
        for kind in KINDS:
            found[f"preresnet.{name}_{kind}"] = Entry(build, kind, ann=f"preresnet.{name}_ann")
    frames = dict(inputs="event frames", shape=(2, 48, 48), defaults=CIFAR | dict(dropout=0.1))
    for depth in STAGES:
        for kind in ("if", "lif"):
            found[f"vgg.vgg{depth}_{kind}"] = Entry(partial(VGG, depth), kind, **frames)
    large = dict(program="imagenet", shape=(3, 224, 224))
    for name, build in LARGE.items():
        for kind, scale in (("if", 0.001), ("lif", 1.0)):
            defaults, ann = IMAGENET | dict(Vth_grad_scale=scale), f"preresnet_ann.{name}"
            snn = partial(build, norms_last=True)
            found[f"preresnet_snn.{name}_{kind}"] = Entry(snn, kind, ann=ann, defaults=defaults, **large)
    for name, build in (LARGE | {"preresnet50": LARGE["resnet50"]}).items():  # under two published names
        for family in ("preresnet_ann", "preresnet_cal_Vth"):
            ann = f"preresnet_ann.{name}"
            build_ann = partial(build, norms_last=False)
            found[f"{family}.{name}"] = Entry(build_ann, "ann", ann=ann, defaults=IMAGENET, **large)
    return found


NETWORKS = published()


def list_models(program=None):
    """The names that `create_model` knows, sorted: all, or those that "cifar" or "imagenet" trains."""
    return sorted(name for name, entry in NETWORKS.items() if program in (None, entry.program))


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
    entry = NETWORKS[name]
    given = dict(timesteps=timesteps, Vth=Vth, tau=tau, delta_t=delta_t, alpha=alpha, Vth_bound=Vth_bound)
    given |= dict(num_classes=num_classes, dropout=dropout, Vth_grad_scale=Vth_grad_scale)
    settings = entry.defaults | {key: value for key, value in given.items() if value is not None}
    sizes = {key: settings.pop(key) for key in ("num_classes", "dropout")}
    settings["train_Vth"] = train_Vth
    model = entry.build(activation=activation_factory(entry.kind, settings), **sizes)
    model.backward, model.engine = backward, engine
    if entry.kind == "ann":
        model.backward = "unrolled"
    for module in model.modules():
        if isinstance(module, Dropout):
            module.shared = dropout_mask == "shared"
    return model if model.backward == "unrolled" else model.to(memory_format=torch.channels_last)


def activation_factory(kind, settings):
    """A function that makes one activation of the kind, with those of the `settings` that it has."""
    activation = KINDS[kind]
    if kind == "ann":
        return activation
    foreign = {"tau", "delta_t"} - set(activation.time_constants)
    return partial(activation, **{key: value for key, value in settings.items() if key not in foreign})

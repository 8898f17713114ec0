"""The residual block of every PreAct-ResNet."""

from torch import nn

from models.layers import spiking_layer
from models.trains import Dropout


class Block(nn.Module):
    """Convolutions of `shapes` (in, out, kernel, stride) behind batch norms and neurons.

    Takes the branches of the sum before it, returns those of its own. The residual connection, the module
    `shortcut` under its published name, starts after the first neuron layer. norms_last: see `register`.
    """

    def __init__(self, shapes, shortcut, activation, *, bias, norms_last=False, dropout=0.0):
        super().__init__()
        modules = {}
        for i, (in_channels, out_channels, kernel, stride) in enumerate(shapes, start=1):
            modules[f"bn{i}"] = nn.BatchNorm2d(in_channels)
            modules[f"conv{i}"] = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=bias)
        self.depth = len(shapes)
        self.shortcut_name, make_shortcut = shortcut
        stride, ends = max(shape[3] for shape in shapes), (shapes[0][0], shapes[-1][1])
        same = stride == 1 and ends[0] == ends[1]
        modules[self.shortcut_name] = nn.Identity() if same else make_shortcut(*ends, stride)
        register(self, modules, norms_last)
        for i in range(1, self.depth + 1):
            self.add_module(f"relu{i}", activation())
        self.dropout = Dropout(dropout)

    def forward(self, branches):
        for i in range(1, self.depth + 1):
            train = spiking_layer(branches, getattr(self, f"bn{i}"), getattr(self, f"relu{i}"))
            if i == 1:
                first = train
            branches = [(getattr(self, f"conv{i}"), train)]
        conv, train = branches[0]
        return [(conv, train.drop(self.dropout)), (getattr(self, self.shortcut_name), first)]


def basic(in_channels, channels, stride):
    """Two 3x3 convolutions. -> the shapes of the block's convolutions"""
    return [(in_channels, channels, 3, stride), (channels, channels, 3, 1)]


def register(owner, modules, norms_last):
    """Add the modules in the order of the official files (SNNs': batch norms last): optimizers go by it."""
    for name in sorted(modules, key=lambda name: norms_last and name.startswith("bn")):
        owner.add_module(name, modules[name])

"""PreAct-ResNets for 32x32 images: the wide family (18, 34, 50) and the narrow one (20 to 110 layers)."""

from torch import nn

from models.blocks import Block
from models.layers import SpikingNetwork, spiking_layer
from models.trains import Dropout, SpikeTrain


def bottleneck(in_channels, channels, stride):
    """1x1 with the stride, 3x3, 1x1 to four times the channels. -> the shapes of the block's convolutions"""
    return [(in_channels, channels, 1, stride), (channels, channels, 3, 1), (channels, 4 * channels, 1, 1)]


def shortcut(in_channels, out_channels, stride):
    return nn.Conv2d(in_channels, out_channels, 1, stride)


class PreActResNet(SpikingNetwork):
    """PreAct-ResNet on 3x32x32 images: (B, 3, 32, 32) -> logits (B, num_classes).

    `block(in_channels, channels, stride)` gives the shapes of a block's convolutions, `activation()` makes
    the neuron layers (or an ANN's ReLUs), `depths` and `widths` count the blocks and the channels of the
    stages; all but the first stage halve the image.
    """

    def __init__(self, block, depths, widths, *, activation, num_classes, dropout):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        in_channels = widths[0]
        for stage, (depth, width) in enumerate(zip(depths, widths), start=1):
            blocks = []
            for i in range(depth):
                shapes = block(in_channels, width, 2 if stage > 1 and i == 0 else 1)
                residual = "shortcut", shortcut
                blocks.append(Block(shapes, residual, activation, bias=True, dropout=dropout))
                in_channels = shapes[-1][1]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.stages = len(depths)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.pool = nn.AvgPool2d(32 >> (len(depths) - 1))
        self.dropout = Dropout(dropout)
        self.linear = nn.Linear(in_channels, num_classes)
        self.bn2 = nn.BatchNorm1d(num_classes)
        self.relu1, self.relu2, self.relu3 = activation(), activation(), activation()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def spike(self, image: SpikeTrain):
        branches = [(self.conv1, image)]
        for stage in range(1, self.stages + 1):
            branches = getattr(self, f"layer{stage}")(branches)
        train = spiking_layer(branches, self.bn1, self.relu1)
        train = spiking_layer([(nn.Identity(), train.map(self.pool))], None, self.relu2)
        train = train.map(nn.Flatten()).drop(self.dropout)
        return spiking_layer([(self.linear, train)], self.bn2, self.relu3)

"""PreAct-ResNets for 32x32 images: the wide family (18, 34, 50) and the narrow one (20 to 110 layers)."""

from torch import nn

from models.layers import SpikingNetwork, spiking_layer
from models.trains import Dropout, SpikeTrain


class BasicBlock(nn.Module):
    """Two 3x3 convolutions. Takes the branches of the sum before it, returns those of its own."""

    expansion = 1

    def __init__(self, in_channels, channels, stride, activation, dropout):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.shortcut = make_shortcut(in_channels, channels, stride)
        self.relu1, self.relu2 = activation(), activation()
        self.dropout = Dropout(dropout)

    def forward(self, branches):
        first = spiking_layer(branches, self.bn1, self.relu1)
        second = spiking_layer([(self.conv1, first)], self.bn2, self.relu2)
        return [(self.conv2, second.drop(self.dropout)), (self.shortcut, first)]


class Bottleneck(nn.Module):
    """1x1 convolution with the stride, 3x3, 1x1 to four times the channels."""

    expansion = 4

    def __init__(self, in_channels, channels, stride, activation, dropout):
        super().__init__()
        out_channels = self.expansion * channels
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1)
        self.shortcut = make_shortcut(in_channels, out_channels, stride)
        self.relu1, self.relu2, self.relu3 = activation(), activation(), activation()
        self.dropout = Dropout(dropout)

    def forward(self, branches):
        first = spiking_layer(branches, self.bn1, self.relu1)
        second = spiking_layer([(self.conv1, first)], self.bn2, self.relu2)
        third = spiking_layer([(self.conv2, second)], self.bn3, self.relu3)
        return [(self.conv3, third.drop(self.dropout)), (self.shortcut, first)]


def make_shortcut(in_channels, out_channels, stride):
    """The residual connection, which starts after the first neuron layer of its block."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Conv2d(in_channels, out_channels, 1, stride)


class PreActResNet(SpikingNetwork):
    """PreAct-ResNet on 3x32x32 images: (B, 3, 32, 32) -> logits (B, num_classes).

    `activation()` makes the neuron layers (or an ANN's ReLUs), `depths` and `widths` count the blocks and the
    channels of the stages; all but the first stage halve the image.
    """

    def __init__(self, block, depths, widths, *, activation, num_classes, dropout):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        in_channels = widths[0]
        for stage, (depth, width) in enumerate(zip(depths, widths), start=1):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 1 and i == 0 else 1
                blocks.append(block(in_channels, width, stride, activation, dropout))
                in_channels = block.expansion * width
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

    @property
    def last_neuron(self):
        return self.relu3

    def spike(self, image: SpikeTrain):
        branches = [(self.conv1, image)]
        for stage in range(1, self.stages + 1):
            branches = getattr(self, f"layer{stage}")(branches)
        train = spiking_layer(branches, self.bn1, self.relu1)
        train = spiking_layer([(nn.Identity(), train.map(self.pool))], None, self.relu2)
        train = train.map(nn.Flatten()).drop(self.dropout)
        return spiking_layer([(self.linear, train)], self.bn2, self.relu3)

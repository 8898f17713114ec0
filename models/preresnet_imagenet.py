"""PreAct-ResNets for ImageNet: one definition for the ANN, its calibration and the SNN."""

import math
from itertools import chain

from torch import nn

from models.blocks import Block, register
from models.layers import SpikingNetwork, spiking_layer
from models.trains import SpikeTrain


def bottleneck(in_channels, channels, stride):
    """1x1, 3x3 with the stride, 1x1 to four times the channels. -> the shapes of the block's convolutions"""
    return [(in_channels, channels, 1, 1), (channels, channels, 3, stride), (channels, 4 * channels, 1, 1)]


def downsample(in_channels, out_channels, stride):
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class ImageNetPreActResNet(SpikingNetwork):
    """PreAct-ResNet on images of any size, as of 224x224: (B, 3, H, W) -> logits (B, num_classes).

    `block` and `activation` as in `PreActResNet`, `depths` count the blocks of the stages. An activation also
    stands behind the last pool and at the very end, in the ANN too: its weights are those of the SNN.
    """

    def __init__(self, block, depths, *, activation, num_classes, dropout, norms_last):
        super().__init__()  # dropout: these networks have none
        modules = {"conv1": nn.Conv2d(3, 64, 7, 2, 3, bias=False), "bn1": nn.BatchNorm2d(64)}
        in_channels = 64
        for stage, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                shapes = block(in_channels, 64 << stage, 2 if stage and i == 0 else 1)
                residual = "downsample", downsample
                blocks.append(Block(shapes, residual, activation, bias=False, norms_last=norms_last))
                in_channels = shapes[-1][1]
            modules[f"layer{stage + 1}"] = nn.Sequential(*blocks)
        modules |= {"bn2": nn.BatchNorm2d(in_channels), "fc": nn.Linear(in_channels, num_classes)}
        register(self, modules | {"bn3": nn.BatchNorm1d(num_classes)}, norms_last)
        self.maxpool = nn.AvgPool2d(3, 2, 1)  # the official name
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.relu1, self.relu2, self.relu3, self.relu4 = (activation() for _ in range(4))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                k, _ = module.kernel_size
                nn.init.normal_(module.weight, 0, math.sqrt(2 / (k * k * module.out_channels)))

    def spike(self, image: SpikeTrain):
        first = [(self.conv1, image)]  # no name for its spikes, the largest of all: they would stay
        branches = [(nn.Identity(), spiking_layer(first, self.bn1, self.relu1).map(self.maxpool))]
        for block in chain(self.layer1, self.layer2, self.layer3, self.layer4):
            branches = block(branches)
        train = spiking_layer(branches, self.bn2, self.relu2)
        train = spiking_layer([(nn.Identity(), train.map(self.avgpool))], None, self.relu3)
        return spiking_layer([(self.fc, train.map(nn.Flatten()))], self.bn3, self.relu4)

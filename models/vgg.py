"""VGG networks for event frames of 48x48 pixels and two polarities."""

from torch import nn

from models.layers import SpikingNetwork, spiking_layer
from models.trains import Dropout

# Channels of the convolutions of each stage; an average pool halves the frame after every stage.
STAGES = {
    11: [[64], [128], [256, 256], [512, 512], [512, 512]],
    13: [[64, 64], [128, 128], [256, 256], [512, 512], [512, 512]],
    16: [[64, 64], [128, 128], [256, 256, 256], [512, 512, 512], [512, 512, 512]],
    19: [[64, 64], [128, 128], [256] * 4, [512] * 4, [512] * 4],
}


class VGG(SpikingNetwork):
    """VGG with batch norm: event frames (B, T, 2, 48, 48) -> logits (B, num_classes).

    The stages are Sequentials of [convolution, batch norm, neuron, dropout]... and a pool, for the sake of
    the published state-dict names; `spike` reads them as spiking layers.
    """

    def __init__(self, depth, *, activation, num_classes, dropout):
        super().__init__()
        in_channels = 2
        for stage, widths in enumerate(STAGES[depth], start=1):
            modules = []
            for channels in widths:
                conv = nn.Conv2d(in_channels, channels, 3, padding=1)
                modules += [conv, nn.BatchNorm2d(channels), activation(), Dropout(dropout)]
                in_channels = channels
            setattr(self, f"layer{stage}", nn.Sequential(*modules, nn.AvgPool2d(2)))
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        linear = nn.Linear(in_channels * 49, num_classes)
        self.classifier = nn.Sequential(nn.Flatten(), linear, nn.BatchNorm1d(num_classes), activation())
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)

    def spike(self, train):
        stages = [self.layer1, self.layer2, self.layer3, self.layer4, self.layer5]
        modules = iter([module for stage in (*stages, [self.avgpool], self.classifier) for module in stage])
        for module in modules:
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                bn, neuron = next(modules), next(modules)
                train = spiking_layer([(module, train)], bn, neuron)
            elif isinstance(module, Dropout):
                train = train.drop(module)
            else:
                train = train.map(module)
        return train

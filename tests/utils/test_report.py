"""Synaptic operations, firing rates and representation errors against counts made by hand."""

import pytest
import torch
from torch import nn

from models import IFNeuron, LIFNeuron, create_model
from models.layers import SpikingNetwork, spiking_layer
from utils.report import Measurement, fan_out
from utils.statistics import hits
from utils.training import Metrics


class TwoLayers(SpikingNetwork):
    """Convolution (1 -> 2 channels, the second silent), neurons, perhaps a pool, linear map, neurons."""

    def __init__(self, neuron, pool, features):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.Linear(features, 3)
        self.relu1, self.relu2, self.pool = neuron(), neuron(), pool
        nn.init.zeros_(self.conv.weight)
        self.conv.weight.data[0, 0, 1, 1] = 1  # the first channel's currents are the image

    @property
    def last_neuron(self):
        return self.relu2

    def spike(self, image):
        train = spiking_layer([(self.conv, image)], None, self.relu1).map(self.pool).map(nn.Flatten())
        return spiking_layer([(self.linear, train)], None, self.relu2)


POOLS = [  # pool, the features behind it, the values that a spike ends up in
    (nn.Identity(), 8, 1),
    (nn.AvgPool2d(2), 2, 1),
    (nn.AdaptiveAvgPool2d(1), 2, 1),
    (nn.AdaptiveAvgPool2d(4), 32, 4),
]


@pytest.mark.parametrize(("pool", "features", "copies"), POOLS)
@pytest.mark.parametrize("backward", ["collapsed", "unrolled"])
def test_two_layers_by_hand(pool, features, copies, backward):
    """T=2, Vth=1, alpha=0.5. The potentials of the currents 1, 0.4, 0, 2 before firing are

    1 1, 0.4 0.8, 0 0 and 2 3: they fire 2, 1, 0 and 2 times.
    """
    model = TwoLayers(lambda: IFNeuron(timesteps=2, Vth=1.0, alpha=0.5), pool, features)
    model.backward = backward
    image = torch.tensor([[1.0, 0.4], [0.0, 2.0]])
    batches = [(image.repeat(n, 1, 1, 1), torch.zeros(n, dtype=torch.long)) for n in (3, 2)]
    m = Measurement(model, batches)
    assert (m.images, m.timesteps) == (5, 2)
    assert m.accumulates == 5 * copies * 3  # 5 spikes, 3 synapses each
    assert (
        m.multiplies == 3 * 8
    )  # 3 pixels that are not 0, each at 4 places of 2 channels, once for both steps
    assert m.dense == 4 * 8 + features * 3
    assert m.energy == pytest.approx(0.9e-6 * m.accumulates + 4.6e-6 * 24)
    assert m.rates["relu1"] == 5 / 16
    assert m.errors["relu1"] == pytest.approx(0.1 / 8)  # 0.4 is represented by 0.5, all else exactly
    assert m.relative == pytest.approx(m.errors)  # Vth is 1
    assert model.backward == backward


def test_vectors_stay_as_images_do():
    """A linear map 2 -> 3: six multiplications, once for all four steps, less those by zero."""

    class Vectors(SpikingNetwork):
        def __init__(self):
            super().__init__()
            self.linear, self.relu = nn.Linear(2, 3), IFNeuron(timesteps=4)

        def spike(self, train):
            return spiking_layer([(self.linear, train)], None, self.relu)

    labels = torch.zeros(2, dtype=torch.long)
    m = Measurement(Vectors(), [(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), labels)], timed=False)
    assert (m.multiplies, m.dense) == (4.5, 6)


def test_values_that_are_no_spikes_count_at_every_step():
    """A map that the report does not know, behind a neuron that fires at the second of two steps alone."""
    model = TwoLayers(lambda: IFNeuron(timesteps=2, Vth=1.0, alpha=1.0), lambda x: x * 1.0, 8)
    m = Measurement(model, [(torch.full((1, 1, 2, 2), 0.6), torch.zeros(1))], timed=False)
    assert m.accumulates == 0
    assert m.multiplies == 4 * 8 + 4 * 3  # the image's pixels once; four spikes at three synapses


class Low(IFNeuron):
    """Its map is cut off at half of what a spike at every step represents."""

    ceiling = property(lambda self: 0.5 * self.Vth)


def test_representation_error_below_a_ceiling_of_ones_own():
    """Currents of 0.9 fire at both steps, which represent 1; expected is 0.5 at each of four pixels."""
    model = TwoLayers(lambda: Low(timesteps=2, Vth=1.0, alpha=0.5), nn.Identity(), 8)
    m = Measurement(model, [(torch.full((1, 1, 2, 2), 0.9), torch.zeros(1))], timed=False)
    assert m.errors["relu1"] == pytest.approx(0.5 * 4 / 8)


def test_layers_outside_the_spiking_part_are_counted():
    class Stem(TwoLayers):
        def forward(self, x):
            return super().forward(self.stem(x))

    model = Stem(lambda: IFNeuron(timesteps=2, Vth=1.0), nn.Identity(), 8)
    model.stem = nn.Conv2d(1, 1, 1, bias=False)
    m = Measurement(model, [(torch.rand(3, 1, 2, 2) + 1, torch.zeros(3))], timed=False)  # 3 rows, T=2
    assert m.multiplies == 4 + 4 * 8


def test_equal_logits_are_ranked_as_in_training():
    """Which of them comes first is the choice of torch's topk."""
    model = TwoLayers(lambda: IFNeuron(timesteps=2, Vth=1.0), nn.Identity(), 8)
    model.linear.bias.data.fill_(-9)  # nothing fires: all logits are 0
    labels = torch.arange(3)
    m = Measurement(model, [(torch.rand(3, 1, 2, 2), labels)], timed=False)
    metrics = Metrics("cpu")
    metrics.add(torch.zeros(()), torch.zeros(3, 3), labels)
    first = torch.zeros(1, 3).topk(3).indices[0, 0]
    assert m.accuracy == pytest.approx(metrics.result().top1) == pytest.approx(100 / 3)
    assert hits(torch.zeros(3, 3), labels)[:, 0].nonzero().item() == first


def test_representation_error_of_lif():
    """T=1: U = (1-exp(-0.2))*x = 0.181*x fires at 0.25. A spike represents Vth/delta_t = 1.25.

    x represents x/tau. Of 1, 1.5, -1 and 4 the second and the last fire; they represent, clamped, 0.5, 0.75,
    0 and 1.25.
    """
    settings = dict(timesteps=1, Vth=0.5, alpha=0.5, tau=2.0, delta_t=0.4)
    model = TwoLayers(lambda: LIFNeuron(**settings), nn.Identity(), 8)
    m = Measurement(model, [(torch.tensor([[[[1.0, 1.5], [-1.0, 4.0]]]]), torch.zeros(1, dtype=torch.long))])
    assert m.errors["relu1"] == pytest.approx((0.5 + 0.5) / 8)
    assert m.relative["relu1"] == pytest.approx(1.0 / 8 / 1.25)
    assert m.rates["relu1"] == 2 / 8


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(2, 6, 3, 2, 1), nn.Conv2d(2, 6, 3, padding=1, groups=2), nn.Conv2d(2, 4, (1, 3), dilation=2)],
)
def test_fan_out_is_what_one_spike_reaches(conv):
    conv = nn.Conv2d(
        2, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    )
    x = torch.zeros(1, 2, 6, 5)
    counted = torch.zeros(2, 6, 5)
    for position in range(x.numel()):
        one = x.flatten().index_fill(0, torch.tensor(position), 1.0).view(x.shape)
        counted.view(-1)[position] = torch.ne(conv(one), conv(x)).sum()
    assert torch.equal(fan_out(conv, x, conv(x)), counted.double())


def test_published_networks_in_multiply_accumulates():
    """ResNet-20 is known to have 41 million, the borders' padding included; and all layers are seen."""
    model, images = create_model("preresnet.resnet20_lif", timesteps=2), torch.randn(2, 3, 32, 32)
    m = Measurement(model, [(images, torch.zeros(2))])
    assert 0.9 * 0.0408e9 < m.dense < 0.0408e9
    assert len(m.rates) == len(m.errors) == 21 and 0 < m.overall < 1

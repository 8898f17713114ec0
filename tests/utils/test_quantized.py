"""Rounded weights against batch norm folded by hand, and against figures by hand."""

import pytest
import torch
from torch import nn

from utils.quantized import round_weights


def test_by_hand():
    """4 bits: -7 to 7. The first channel's step is 0.7/7 = 0.1, the second's 14/7 = 2; zeros stay."""
    layer = nn.Linear(3, 3)
    layer.weight.data = torch.tensor([[0.7, -0.34, 0.06], [-14.0, 2.9, 0.9], [0.0, 0.0, 0.0]])
    bias = layer.bias.clone()
    round_weights(layer, 4)
    expected = torch.tensor([[0.7, -0.3, 0.1], [-14.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(layer.weight.data, expected)
    assert torch.equal(layer.bias, bias)


@pytest.mark.parametrize("bits", [2, 25, 26, 32])
def test_a_channel_of_zeros_stays(bits):
    layer = nn.Linear(3, 2)
    layer.weight.data = torch.tensor([[0.0, 0.0, 0.0], [1e-12, 0.0, -1.0]])
    round_weights(layer, bits)
    assert layer.weight.tolist() == [[0, 0, 0], [0, 0, -1]]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_batch_norm_is_folded(bits, float64):
    """Convolution and batch norm as one convolution, whose weights are then rounded: the same outputs."""
    conv, norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5).eval()
    for values in (norm.weight.data, norm.bias.data, norm.running_mean):
        values.copy_(torch.randn(5))  # factors of either sign
    norm.running_var.copy_(torch.rand(5) + 0.1)
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    folded = conv.weight * factor.view(-1, 1, 1, 1)
    bias = (conv.bias - norm.running_mean) * factor + norm.bias
    highest = 2 ** (bits - 1) - 1
    for channel in folded.data:
        step = channel.abs().max() / highest
        channel.copy_(torch.round(channel / step) * step)
    x = torch.randn(2, 3, 6, 6)
    expected = nn.functional.conv2d(x, folded, bias)
    round_weights(nn.Sequential(conv, norm), bits)
    torch.testing.assert_close(norm(conv(x)), expected)
    assert all(len(channel.unique()) <= 2 * highest + 1 for channel in conv.weight)

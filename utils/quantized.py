"""Weights of a few bits."""

import torch
from torch import nn


@torch.no_grad()
def round_weights(model, bits):
    """Round the weights of every convolution and linear map, in place, symmetrically per output channel.

    w <- s * round(w / s) with s = max|w| / (2^(bits-1) - 1) over the weights of an output channel; bits: 2 or
    more. Batch norm counts as folded: it multiplies all weights of a channel alike, s included, so that
    rounding before and after folding are the same. An identity shortcut is one weight a channel, which is its
    own maximum and stays. Biases, the shifts of batch norm and thresholds stay as they are. The paper's exact
    scheme is not known.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight
            largest = weight.abs().flatten(1).amax(1).view(-1, *[1] * (weight.dim() - 1))
            step = (largest / (2 ** (bits - 1) - 1)).clamp(min=torch.finfo(weight.dtype).tiny)
            weight.copy_((weight / step).round() * step)

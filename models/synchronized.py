"""Batch norm: how a collapsed layer does it, and over the batches of all processes, on any device.

Synchronized, N processes compute what one would on the whole batch.
"""

import torch
import torch.distributed as dist
from torch import nn

from models.engines.interface import calls
from models.records import Norm


class SynchronizedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """torch's own SyncBatchNorm, which wants a GPU, in tensor operations: statistics over all processes."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dtype, shape = x.dtype, (-1, *[1] * (x.dim() - 2))
        x = x.float() if dtype.itemsize < 4 else x
        var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        mean, var, n = self.combine(mean, var, x.numel() // x.shape[1])
        track(self, mean.detach(), var.detach(), n)
        sigma = (var + self.eps).sqrt()
        scale = 1 / sigma if self.weight is None else self.weight / sigma
        x = (x - mean.view(shape)) * scale.view(shape)
        return (x if self.bias is None else x + self.bias.view(shape)).to(dtype)

    def combine(self, mean, var, n):
        """Mean, variance and number of the values of all processes, from those of each."""
        sums = Total.apply(torch.stack([n * mean, torch.full_like(mean, n)]))
        mean_all, n_all = sums[0] / sums[1], sums[1]
        return mean_all, Total.apply(n * (var + (mean - mean_all).square())) / n_all, n_all.detach()

    def _check_input_dim(self, x):
        pass


def track(bn, mean, var, n):
    """Bring running statistics up to date; n: how many values the mean and the variance are of."""
    if bn.running_mean is None or not bn.track_running_stats:
        return
    bn.num_batches_tracked.add_(1)
    mean, var = mean.to(bn.running_mean), (var * (n / (n - 1))).to(bn.running_var)
    momentum = 1 / bn.num_batches_tracked.to(mean) if bn.momentum is None else bn.momentum
    bn.running_mean.lerp_(mean, momentum)
    bn.running_var.lerp_(var, momentum)


class Total(torch.autograd.Function):
    """The sum of x over all processes; every process's x receives the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return Total.apply(grad)


def normalization(bn, seen, gamma, beta, channels, like):
    """A Norm from what was seen (None: eval mode); keeps the running statistics. `bn` None: z = y."""
    if bn is None:
        zero, one = torch.zeros_like(like).view(1), torch.ones_like(like).view(1)
        return Norm(zero, one, one, zero, zero, None, frozen=True)
    if not calls(bn, nn.modules.batchnorm._BatchNorm, SynchronizedBatchNorm):
        allowed = "a batch norm with torch's own forward pass and no hook before it, or None"
        allowed += "; `network.synchronize()` for one of all processes"
        raise TypeError(f'no collapsed layer with {bn}: {allowed}; else backward = "unrolled"')
    if bn.num_features != channels:
        raise ValueError(f"{bn} cannot normalise currents of {channels} channels")
    if bn.running_mean is None:
        raise ValueError(f"no collapsed layer with {bn}: it needs running statistics")
    if seen is None:
        mu, var = bn.running_mean.clone(), bn.running_var
    else:
        mu, var, n = seen.mean, seen.var, seen.n
        if n == 1:
            raise ValueError("batch norm cannot train on one value per channel")
        if isinstance(bn, SynchronizedBatchNorm):
            mu, var, n = bn.combine(mu, var, n)
        track(bn, mu, var, n)
    sigma = (var + bn.eps).sqrt()
    a = 1 / sigma if gamma is None else gamma / sigma
    shift = -mu * a if beta is None else beta - mu * a
    # a batch norm may be of float32 in a network of bfloat16
    vectors = (v.to(like.dtype) for v in (mu, sigma, a, shift, seen.mean if seen else mu))
    return Norm(*vectors, bn, frozen=seen is None)


def means(S1, S2, n, norm):
    """The sums over n elements as means, over all processes if synchronized; 0 for a frozen batch norm."""
    if norm.frozen:
        return torch.zeros_like(S1), torch.zeros_like(S2)
    if isinstance(norm.module, SynchronizedBatchNorm):
        S1, S2, n = Total.apply(torch.stack([S1, S2, torch.full_like(S1, n)]))
    return S1 / n, S2 / n

"""Batch norm over the batches of all processes, on any device: N processes then compute what one would."""

import torch
import torch.distributed as dist
from torch import nn


class SynchronizedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """torch's own SyncBatchNorm, which wants a GPU, in tensor operations: statistics over all processes."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        x, shape = x.float() if x.dtype.itemsize < 4 else x, (-1, *[1] * (x.dim() - 2))
        var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        mean, var, n = self.combine(mean, var, x.numel() // x.shape[1])
        track(self, mean.detach(), var.detach(), n)
        scale = self.weight / (var + self.eps).sqrt()
        return (x - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)

    def combine(self, mean, var, n):
        """Mean, variance and number of the values of all processes, from those of each."""
        sums = Total.apply(torch.stack([n * mean, torch.full_like(mean, n)]))
        mean_all, n_all = sums[0] / sums[1], sums[1]
        return mean_all, Total.apply(n * (var + (mean - mean_all).square())) / n_all, n_all.detach()

    def _check_input_dim(self, x):
        pass


def track(bn, mean, var, n):
    """Bring running statistics up to date; n: how many values the mean and the variance are of."""
    bn.num_batches_tracked += 1
    bn.running_mean.lerp_(mean, bn.momentum)
    bn.running_var.lerp_(var * (n / (n - 1)), bn.momentum)


def total(x):
    """The sum of x over all processes, outside autograd."""
    x = x.clone()
    dist.all_reduce(x)
    return x


class Total(torch.autograd.Function):
    """`total` under autograd: every process's x receives the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx, x):
        return total(x)

    @staticmethod
    def backward(ctx, grad):
        return total(grad)


def synchronize(module):
    """Put a SynchronizedBatchNorm in the place of every batch norm inside `module`, with its parameters."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            twin = SynchronizedBatchNorm(child.num_features)
            twin.__dict__.update(child.__dict__)
            setattr(module, name, twin)
        else:
            synchronize(child)

"""The learning rate of the paper's recipe."""

import math

from torch.optim.lr_scheduler import LambdaLR


def cosine(epoch, epochs):
    """The factor of an epoch: (1 + cos(pi*epoch/epochs)) / 2."""
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def warmup_cosine(optimizer, *, lr, epochs, steps_per_epoch, warmup, first_step=0, within=False):
    """Per-epoch cosine, times (step+1)/warmup over the first `warmup` steps of the run; stepped once a batch.

    A resumed run starts at `first_step` of the same curve, so that its warm-up is not repeated. `within` the
    first epoch, the warm-up ends with it, as in the official ImageNet program.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = lr

    def factor(step):
        warm = within and step >= steps_per_epoch or step + 1 >= warmup
        return cosine(step // steps_per_epoch, epochs) * (1.0 if warm else (step + 1) / warmup)

    return LambdaLR(optimizer, factor, last_epoch=first_step - 1)

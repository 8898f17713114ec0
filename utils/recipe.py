"""The paper's recipe: its optimizers and the learning rate."""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from utils.cli import explained
from utils.foreign import check_optimizer

LARGEST_STEP = 0.02  # of a fitted threshold, as a fraction of it: docs/thresholds.md says why,
SMALLEST = 0.5  # and what training may leave of it


def make_optimizer(name, parameters, *, lr, momentum, weight_decay, nesterov=False):
    """ "sgd" or "adam"; thresholds get the learning rate and weight decay of the weights."""
    if name == "adam":
        return torch.optim.Adam(parameters, lr, betas=(0.9, 0.999), weight_decay=weight_decay)
    return torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay, nesterov=nesterov)


def limit_steps(optimizer, thresholds, fitted):
    """Have no step change a threshold by more than LARGEST_STEP of it, or to below SMALLEST of the `fitted`.

    Both are dicts by layer, in which `fitted` may lack some.
    """
    if not thresholds:
        return
    least = [threshold.new_tensor(SMALLEST * fitted.get(layer, 0)) for layer, threshold in thresholds.items()]
    least, bounds = torch.stack(least), []

    def remember(*_):
        before = torch.stack([*thresholds.values()]).detach()
        bounds[:] = (before * (1 - LARGEST_STEP)).maximum(least), before * (1 + LARGEST_STEP)

    def limit(*_):
        for threshold, low, high in zip(thresholds.values(), *bounds):
            threshold.data.clamp_(low, high)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(limit)


def load_optimizer(optimizer, state, path):
    """Take over the state of a checkpoint's optimizer, but not its settings; refuse another kind's."""
    settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    with explained(lambda why: f"the optimizer state in {path} does not fit: {why}"):
        if state["param_groups"][0].keys().isdisjoint(settings.keys() & {"momentum", "betas"}):
            raise ValueError("it belongs to another --optimizer")
        optimizer.load_state_dict(state)
        check_optimizer(optimizer)
    for group in optimizer.param_groups:
        group.update(settings)


def cosine(epoch, epochs):
    """The factor of an epoch: (1 + cos(pi*epoch/epochs)) / 2."""
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def warmup_cosine(optimizer, *, lr, epochs, steps_per_epoch, warmup, first_step=0, within=False):
    """Per-epoch cosine, times (step+1)/warmup over the first `warmup` steps of the run; stepped once a batch.

    Resumed runs start at `first_step`; `within`: warm-up ends with the first epoch, officially on ImageNet.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = lr

    def factor(step):
        warm = within and step >= steps_per_epoch or step + 1 >= warmup
        return cosine(step // steps_per_epoch, epochs) * (1.0 if warm else (step + 1) / warmup)

    return LambdaLR(optimizer, factor, last_epoch=first_step - 1)

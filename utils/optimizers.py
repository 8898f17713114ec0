"""The published optimizers, and their states from a checkpoint."""

import torch

from utils.cli import UserError


def make_optimizer(name, parameters, *, lr, momentum, weight_decay, nesterov=False):
    """ "sgd" or "adam"; thresholds get the learning rate and weight decay of the weights."""
    if name == "adam":
        return torch.optim.Adam(parameters, lr, betas=(0.9, 0.999), weight_decay=weight_decay)
    return torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay, nesterov=nesterov)


def load_optimizer(optimizer, state, path):
    """Take over the state of a checkpoint's optimizer, but not its learning rate; refuse another kind's."""
    settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    try:
        if state["param_groups"][0].keys().isdisjoint(settings.keys() & {"momentum", "betas"}):
            raise ValueError("it belongs to another --optimizer")
        optimizer.load_state_dict(state)
        check_state(optimizer)
    except Exception as error:  # a foreign state can fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"the optimizer state in {path} does not fit: {reason}") from None
    for group in optimizer.param_groups:
        group.update(settings)


def check_state(optimizer):
    """Raise ValueError unless each parameter's state is that of SGD with momentum or of Adam, or empty."""
    names = ("exp_avg", "exp_avg_sq", "step") if "betas" in optimizer.defaults else ("momentum_buffer",)
    for parameter, state in optimizer.state.items():
        for name in names if state else ():
            value, shape = state[name], torch.Size() if name == "step" else parameter.shape
            if value is None and name == "momentum_buffer":  # of a run without momentum
                continue
            if value.shape != shape or not value.is_floating_point():
                raise ValueError(f"a {name} of shape {list(value.shape)}, not {list(shape)}")

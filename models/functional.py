"""The method in pure functions and one gradient rule (Meng et al., CVPR 2022, sections 3 and 4).

Sequences have time first: shape (T, B, ...). Potentials and thresholds share the unit of the input current.
The dynamics stand outside autograd, which only knows `DSR` (and the layers of `collapsed`).
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable


def membrane(steps, spikes, Vth, firing_point, lam, scale, shift, weights=()):
    """The dynamics: U = lam*V + scale*y_t + shift; s_t = 1 where U >= firing_point, else 0; V = U - Vth*s_t.

    scale and shift fold kappa and the batch norm x_t = a*y_t + b: kappa*a and kappa*b, with (lam, kappa) the
    neuron's `leak`. firing_point = alpha*Vth.
    steps: the y_t, T tensors of one shape, or one for all; spikes: T such tensors to write the s_t to, which
    may be the y_t. scale, shift: one number, or one for each channel, which are the last dimension then.
    Returns for every w of `weights`, T numbers each, the pair (sum_t w_t*y_t, sum_t w_t*s_t).
    """
    potential = torch.zeros_like(spikes[0], dtype=scale.dtype)
    buffer = torch.empty_like(potential)
    sums = [(torch.zeros_like(potential), torch.zeros_like(potential)) for _ in weights]
    for t, spike in enumerate(spikes):
        y = steps[t % len(steps)]
        torch.add(torch.addcmul(shift, y, scale), potential, alpha=lam, out=potential)
        for w, (y_sum, _) in zip(weights, sums):
            y_sum.add_(y, alpha=w[t])
        fired = torch.ge(potential, firing_point, out=spike if spike.dtype == potential.dtype else buffer)
        potential.addcmul_(fired, Vth, value=-1)
        if fired is not spike:
            spike.copy_(fired)
        for w, (_, spike_sum) in zip(weights, sums):
            spike_sum.add_(fired, alpha=w[t])
    return sums


def autocast_dtype(device):
    """The type of autocast on the device; None where it is off, or unknown, as on `meta`."""
    known = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if known else None


def working_dtype(device, dtype):
    """The type of the convolutions of a network of this type: autocast's, which leaves float64 alone."""
    return dtype if dtype == torch.float64 else autocast_dtype(device) or dtype


def without_autocast(device):
    """A context in which autocast is off."""
    on = autocast_dtype(device) is not None
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def leak(tau, delta_t):
    """(lam, 1 - lam), lam = exp(-delta_t/tau); `tau` and `delta_t` are times in one unit."""
    lam = math.exp(-delta_t / tau)
    return lam, 1 - lam


def decay_weights(timesteps, tau, delta_t):
    """w_t / sum w_t, with w_t = exp(-(T-t)*delta_t/tau), t = 1..T."""
    weights = [math.exp(-age * delta_t / tau) for age in reversed(range(timesteps))]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def representation(sequence, weights):
    """IF (`weights` None): rate(y) = mean_t y_t. LIF: wrate(y) = sum_t w_t*y_t. (T, B, ...) -> (B, ...)."""
    if weights is None:
        return sequence.mean(0)
    total = sequence[0] * weights[0]
    for weight, step in zip(weights[1:], sequence[1:]):
        total = total.add(step, alpha=weight)
    return total


@dataclass
class Clamp:
    """The map on representations, x -> clamp(gain*x, 0, gain*ceiling), at x = scale*r + shift (section 4).

    Its derivative lets a gradient pass, times `gain`, where 0 <= x <= ceiling (`closed`), or 0 < x < ceiling.
    scale and shift: one number a channel; r: (B, C, ...).
    """

    r: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    ceiling: torch.Tensor
    closed: bool
    gain: float

    def zones(self):
        """Where the clamp passes x, and where it cuts x off at the ceiling."""
        x = torch.addcmul(along_channels(self.shift, self.r), self.r, along_channels(self.scale, self.r))
        return clamp_zones(x, self.ceiling, self.closed)


def clamp_zones(x, ceiling, closed):
    above = x > ceiling
    return ((x >= 0) & ~above if closed else (x > 0) & (x < ceiling)), above


def along_channels(v, x):
    """One number a channel (or one for all), shaped to be broadcast against x (N, C, ...)."""
    return v.view(-1, *[1] * (x.dim() - 2))


def per_channel(x):
    """Sum over all but the channels: (N, C, ...) -> (C,)."""
    return x.sum([0, *range(2, x.dim())])


class Read(torch.autograd.Function):
    """What a loss reads from a spike train, with the gradient in the convention of its representation.

    The gradient at a train's representation is dL/do_t, the same for every step t. Who reads a weighted mean
    y = sum_t v_t*o_t causes dL/do_t = v_t*dL/dy, of which the layer takes sum_t w_t*dL/do_t, with w_t the
    weights of its representation: `gain` = sum_t w_t*v_t. For the representation itself that is sum_t w_t^2
    (1/T for IF), for the time mean 1/T.
    """

    @staticmethod
    def forward(ctx, y, representation, gain):
        ctx.gain = gain
        return y.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, grad * ctx.gain, None


class DSR(torch.autograd.Function):
    """Spikes in the forward pass, the derivative of the map on representations in the backward (section 4).

    currents (T, B, ...) -> spikes (T, B, ...) by `neuron.fire`. With x the representation of the currents, g
    that of the incoming gradient, every step of the currents receives G = `neuron.gain` * g where the clamp
    passes x, else 0, and Vth receives `neuron.Vth_gain` * sum of g over the elements whose x lies above the
    clamp. Of IF: dL/drate(o) = T*g and drate(x)/dx_t = 1/T, so T cancels for x_t and stays for Vth; LIF keeps
    this form with weighted means.
    """

    @staticmethod
    def forward(ctx, currents, Vth, neuron):
        # settings as they are now
        ctx.representation, ctx.gain = neuron.representation_of_now(), neuron.gain
        ctx.Vth_gain = neuron.Vth_gain if ctx.needs_input_grad[1] else None
        x = ctx.representation(currents)
        ctx.save_for_backward(*clamp_zones(x, neuron.ceiling, neuron.closed))
        return neuron.fire(currents)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_spikes):
        inside, above = ctx.saved_tensors
        g = ctx.representation(grad_spikes)
        G = g * inside * ctx.gain
        grad_Vth = None if ctx.Vth_gain is None else ctx.Vth_gain * (g * above).sum()
        return G.expand_as(grad_spikes), grad_Vth, None

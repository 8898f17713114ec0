"""Neuron layers: the dynamics and the DSR gradient of `functional`, with a trainable threshold `Vth`."""

import math
from collections import OrderedDict
from functools import partial
from numbers import Integral

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from models import functional
from models.engines.dense import Spikes
from models.engines.interface import calls

# The published ones of the CIFAR programs, and of a layer that is told nothing else.
DEFAULTS = dict(timesteps=20, Vth=0.3, tau=1.0, delta_t=0.05, alpha=0.3, Vth_bound=0.0005)


class Neuron(nn.Module):
    """What neuron layers share: the threshold, its lower bound, and the time-major layout.

    timesteps: T. Vth: initial threshold, in the unit of the currents. alpha: in (0, 1], fire at alpha*Vth.
    Vth_bound: lower bound of Vth. train_Vth: a parameter, or else a buffer. Vth_grad_scale: factor of the
    gradient of Vth. Raises ValueError for settings out of range.

    A subclass states what differs from IF (docs/own_network.md has a whole one), one of LIF by properties:
    time_constants: the names of its own settings. leak: the factors of V and x_t in U. weights: those of its
    representation, T numbers that sum up to 1 (None: all alike). unit: a spike has the value Vth/unit.
    gain: of its map on representations, x -> clamp(gain*x, 0, gain*ceiling). ceiling: the largest x that it
    passes, at which a spike comes at every step: amplitude/gain. closed: whether the gradient passes at both
    ends. Vth_gain: factor of the threshold's gradient. dynamics: the loop over time, `functional.membrane` or
    one with its arguments.
    """

    time_constants = ()
    leak = 1.0, 1.0
    weights = None
    unit = gain = 1.0
    closed = True
    dynamics = staticmethod(functional.membrane)

    def __init__(
        self,
        *,
        timesteps=DEFAULTS["timesteps"],
        Vth=DEFAULTS["Vth"],
        alpha=DEFAULTS["alpha"],
        Vth_bound=DEFAULTS["Vth_bound"],
        train_Vth=True,
        Vth_grad_scale=1.0,
    ):
        super().__init__()
        check_settings(timesteps=timesteps, Vth=Vth, alpha=alpha, Vth_bound=Vth_bound)
        self.timesteps, self.alpha = timesteps, alpha
        self._spike_hooks = OrderedDict()
        self.Vth_bound, self.Vth_grad_scale = Vth_bound, Vth_grad_scale
        if train_Vth:
            self.Vth = nn.Parameter(torch.tensor(float(Vth)))
        else:
            self.register_buffer("Vth", torch.tensor(float(Vth)))
            self.register_load_state_dict_pre_hook(_keep_fixed_threshold)

    def register_parameter(self, name, param):
        if param is not None and name != "Vth":
            raise TypeError(f"{name}: only Vth has a gradient; keep it as a number or a buffer")
        if param is not None and param.requires_grad and param.dim():
            raise TypeError(f"Vth: a layer has one threshold, not a tensor of shape {tuple(param.shape)}")
        super().register_parameter(name, param)

    @property
    def amplitude(self):
        """The value of a spike: the representation of spikes at every step."""
        return self.Vth / self.unit

    @property
    def ceiling(self):
        return self.Vth * (1 / (self.gain * self.unit))

    @property
    def Vth_gain(self):
        return self.Vth_grad_scale * self.unit * self.timesteps

    def forward(self, currents):
        """Currents (T*B, ...), row t*B+b -> spikes of that shape; ValueError unless T divides the rows."""
        if len(currents) % self.timesteps:
            raise ValueError(f"{len(currents)} rows cannot be split into {self.timesteps} time steps")
        if currents.dtype.itemsize < 4 and functional.autocast_dtype(currents.device):
            currents = currents.float()  # the potential sums up T currents: too much for half precision
        self.project_threshold()
        currents = currents.unflatten(0, (self.timesteps, -1))
        if torch.is_grad_enabled():
            spikes = functional.DSR.apply(currents, self.Vth, self)
        else:  # nothing to differentiate: no need of the zones of the clamp
            spikes = self.fire(currents)
        spikes = spikes.flatten(0, 1)
        self.report_spikes(Spikes(spikes))
        return spikes

    def register_spike_hook(self, hook):
        """Have `hook(spikes)` called in every forward pass; -> a handle whose `remove()` ends that.

        spikes: `shape` (T*B, ...), `count()`, and `dense()`: 1 (unrolled: the amplitude) for a spike, else 0.
        """
        handle = RemovableHandle(self._spike_hooks)
        self._spike_hooks[handle.id] = hook
        return handle

    def report_spikes(self, spikes):
        for hook in list(self._spike_hooks.values()):
            hook(spikes)

    @torch.no_grad()
    def fire(self, currents):
        """Currents (T, B, ...) -> spikes of that shape, amplitude included."""
        spikes, (lam, kappa) = torch.empty_like(currents), self.leak
        scale, shift = currents.new_full((), kappa), currents.new_zeros(())
        self.dynamics(currents, spikes, self.Vth, self.alpha * self.Vth, lam, scale, shift)
        return spikes.mul_(self.amplitude)

    def project_threshold(self):
        """Vth <- max(Vth, Vth_bound), on the parameter: a clamp in the graph would kill its gradient."""
        self.Vth.data.clamp_(min=self.Vth_bound)

    def decode(self, spikes):
        """The representation of this layer's spikes: (T*B, ...) -> (B, ...), differentiable."""
        return self.representation(spikes.unflatten(0, (self.timesteps, -1)))

    def representation(self, sequence):
        """(T, B, ...) -> (B, ...): the mean over time, by `weights`."""
        return functional.representation(sequence, self.weights)

    def representation_of_now(self):
        """`representation`, whatever becomes of the settings later."""
        if type(self).representation is not Neuron.representation:
            return self.representation
        return partial(functional.representation, weights=self.weights)

    @property
    def decoding_gain(self):
        """sum_t w_t^2: see `functional.Read`."""
        return math.fsum(w * w for w in self.weights) if self.weights else 1 / self.timesteps

    def extra_repr(self):
        names = ("timesteps", "alpha", "Vth_bound", *self.time_constants)
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


class IFNeuron(Neuron):
    """Integrate-and-fire layer: (T*B, ...) -> Vth * spikes of the same shape.

    Representations: rate(out) ~ clamp(rate(x), 0, Vth). Its gradient passes where 0 <= rate(x) <= Vth, and
    grad Vth = Vth_grad_scale * T * sum of the time-mean gradient where rate(x) > Vth (section 4.1).
    For the settings see `Neuron`, whose constants are its own.
    """


class LIFNeuron(Neuron):
    """Leaky integrate-and-fire layer: (T*B, ...) -> Vth/delta_t * spikes of the same shape.

    Representations: wrate(out) ~ clamp(wrate(x)/tau, 0, Vth/delta_t). Its gradient passes, divided by tau,
    where 0 < wrate(x) < Vth*tau/delta_t, and grad Vth = Vth_grad_scale * delta_t * T * sum of the weighted
    mean gradient where wrate(x) lies above. The derivative of the clamp has 1/delta_t where this has delta_t;
    the published results were trained with delta_t, so it stands (section 4.2). The slope 1/tau stands for
    (1 - lam)/delta_t, its limit for small delta_t/tau, as published. Beside the settings of `Neuron`: tau,
    time constant of the membrane, and delta_t, length of a time step, in one unit of time.
    """

    time_constants = ("tau", "delta_t")
    closed = False
    leak = property(lambda self: functional.leak(self.tau, self.delta_t))
    unit = property(lambda self: self.delta_t)
    gain = property(lambda self: 1 / self.tau)

    def __init__(self, *, tau=DEFAULTS["tau"], delta_t=DEFAULTS["delta_t"], **settings):
        super().__init__(**settings)
        check_settings(tau=tau, delta_t=delta_t)
        self.tau, self.delta_t = tau, delta_t

    @property
    def weights(self):
        return functional.decay_weights(self.timesteps, self.tau, self.delta_t)


class ReLU(nn.ReLU):
    """What an ANN has in a neuron's place: one time step, and its output is its own representation."""

    timesteps = 1

    def decode(self, activations):
        return activations.float() if functional.autocast_dtype(activations.device) else activations


def check_settings(**settings):
    """Raise ValueError, naming the setting, unless the given ones make a neuron that can fire."""
    for name, value in settings.items():
        if name == "timesteps" and not (isinstance(value, Integral) and value >= 1):
            raise ValueError(f"timesteps must be a whole number, at least 1, not {value}")
        if name == "alpha" and not 0 < value <= 1:
            raise ValueError(f"alpha must lie in (0, 1], not {value}")
        if name in ("Vth", "Vth_bound", "tau", "delta_t") and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a positive number, not {value}")
    if settings.get("Vth", 1) < settings.get("Vth_bound", 0):
        raise ValueError(f"Vth ({settings['Vth']}) must not be below Vth_bound ({settings['Vth_bound']})")


def check_collapsed(neuron, trains):
    """TypeError, ValueError for a neuron whose gradients a collapsed layer of `trains` does not know."""
    methods = [(name, getattr(neuron, name, None)) for name in ("fire", "representation", "decode")]
    plain = all(getattr(method, "__func__", None) is getattr(Neuron, name) for name, method in methods)
    if not (plain and calls(neuron, Neuron)):
        allowed = "a Neuron with constants and `dynamics` alone of its own, and no hook before it"
        raise TypeError(f'no collapsed layer with {neuron}: {allowed}; else backward = "unrolled"')
    below = [train.neuron for train in trains if getattr(train.representation, "requires_grad", False)]
    others = [other for other in below if other is not None and other.weights != neuron.weights]
    if any(averaging(other) != averaging(neuron) for other in others):
        raise ValueError('neurons of different leaks cannot be collapsed: set backward = "unrolled"')


def averaging(neuron):
    """The weights by which it averages over time, rounded: neurons that share them may be collapsed."""
    return tuple(round(w, 12) for w in neuron.weights or [1 / neuron.timesteps] * neuron.timesteps)


def _keep_fixed_threshold(neuron, state_dict, prefix, *_):
    """A fixed threshold is a setting: a state-dict without it (an official one) leaves its value in force."""
    state_dict.setdefault(prefix + "Vth", neuron.Vth)

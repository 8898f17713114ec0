"""Neuron layers: the dynamics and the DSR gradient of `functional`, with a trainable threshold `Vth`."""

import torch
from torch import nn

from models import functional


class Neuron(nn.Module):
    """What IF and LIF layers share: the threshold, its lower bound, and the time-major layout.

    timesteps: T. Vth: initial threshold, in the unit of the currents. alpha: in (0, 1], fire at alpha*Vth.
    Vth_bound: lower bound of Vth. train_Vth: a parameter, or else a buffer. Vth_grad_scale: factor of the
    gradient of Vth. Raises ValueError for settings out of range.
    """

    def __init__(
        self, *, timesteps=20, Vth=0.3, alpha=0.3, Vth_bound=0.0005, train_Vth=True, Vth_grad_scale=1.0
    ):
        super().__init__()
        check_settings(timesteps=timesteps, Vth=Vth, alpha=alpha, Vth_bound=Vth_bound)
        self.timesteps, self.alpha = timesteps, alpha
        self.Vth_bound, self.Vth_grad_scale = Vth_bound, Vth_grad_scale
        if train_Vth:
            self.Vth = nn.Parameter(torch.tensor(float(Vth)))
        else:
            self.register_buffer("Vth", torch.tensor(float(Vth)))
            self.register_load_state_dict_pre_hook(_keep_fixed_threshold)

    def forward(self, currents):
        """Currents (T*B, ...), row t*B+b -> spikes of that shape; ValueError unless T divides the rows."""
        if len(currents) % self.timesteps:
            raise ValueError(f"{len(currents)} rows cannot be split into {self.timesteps} time steps")
        if torch.is_autocast_enabled(currents.device.type) and currents.dtype.itemsize < 4:
            currents = currents.float()  # the potential sums up T currents: too much for half precision
        self.project_threshold()
        currents = currents.unflatten(0, (self.timesteps, -1))
        if not torch.is_grad_enabled():  # nothing to differentiate: no need of the zones of the clamp
            return self.fire(currents).flatten(0, 1)
        return functional.DSR.apply(currents, self.Vth, self).flatten(0, 1)

    def project_threshold(self):
        """Vth <- max(Vth, Vth_bound), on the parameter: a clamp in the graph would kill its gradient."""
        self.Vth.data.clamp_(min=self.Vth_bound)

    def decode(self, spikes):
        """The representation of this layer's spikes: (T*B, ...) -> (B, ...), differentiable."""
        return self.representation(spikes.unflatten(0, (self.timesteps, -1)))

    def extra_repr(self):
        return f"timesteps={self.timesteps}, alpha={self.alpha}, Vth_bound={self.Vth_bound}"


class IFNeuron(Neuron):
    """Integrate-and-fire layer: (T*B, ...) -> Vth * spikes of the same shape.

    Representations: rate(out) ~ clamp(rate(x), 0, Vth). Its gradient passes where 0 <= rate(x) <= Vth, and
    grad Vth = Vth_grad_scale * T * sum of the time-mean gradient where rate(x) > Vth (section 4.1).
    For the settings see `Neuron`.
    """

    gain = 1.0

    @property
    def Vth_gain(self):
        return self.Vth_grad_scale * self.timesteps

    def fire(self, currents):
        return functional.integrate_and_fire(currents, self.Vth, self.alpha)

    def representation(self, sequence):
        return functional.rate(sequence)

    def clamp_zones(self, rate):
        """Where the clamp passes the rate of the currents, ends included, and where it cuts it off at Vth."""
        above = rate > self.Vth
        return (rate >= 0) & ~above, above


class LIFNeuron(Neuron):
    """Leaky integrate-and-fire layer: (T*B, ...) -> Vth/delta_t * spikes of the same shape.

    Representations: wrate(out) ~ clamp(wrate(x)/tau, 0, Vth/delta_t). Its gradient passes, divided by tau,
    where 0 < wrate(x) < Vth*tau/delta_t, and grad Vth = Vth_grad_scale * delta_t * T * sum of the weighted
    mean gradient where wrate(x) lies above. The derivative of the clamp has 1/delta_t where this has delta_t;
    the published results were trained with delta_t, so it stands (section 4.2). Beside the settings of
    `Neuron`: tau, time constant of the membrane, and delta_t, length of a time step, in one unit of time.
    """

    def __init__(self, *, tau=1.0, delta_t=0.05, **settings):
        super().__init__(**settings)
        check_settings(tau=tau, delta_t=delta_t)
        self.tau, self.delta_t = tau, delta_t

    @property
    def gain(self):
        return 1 / self.tau

    @property
    def Vth_gain(self):
        return self.Vth_grad_scale * self.delta_t * self.timesteps

    def fire(self, currents):
        return functional.leaky_integrate_and_fire(currents, self.Vth, self.alpha, self.tau, self.delta_t)

    def representation(self, sequence):
        return functional.weighted_rate(sequence, self.tau, self.delta_t)

    def clamp_zones(self, weighted_rate):
        """Where the clamp passes the weighted rate of the currents, ends excluded, and where it cuts."""
        ceiling = self.Vth * (self.tau / self.delta_t)
        return (weighted_rate > 0) & (weighted_rate < ceiling), weighted_rate > ceiling

    def extra_repr(self):
        return f"{super().extra_repr()}, tau={self.tau}, delta_t={self.delta_t}"


class ReLU(nn.ReLU):
    """What an ANN has in a neuron's place: one time step, and its output is its own representation."""

    timesteps = 1

    def decode(self, activations):
        return activations


def check_settings(**settings):
    """Raise ValueError, naming the setting, unless the given ones make a neuron that can fire."""
    for name, value in settings.items():
        if name == "timesteps" and not value >= 1:
            raise ValueError(f"timesteps must be at least 1, not {value}")
        if name == "alpha" and not 0 < value <= 1:
            raise ValueError(f"alpha must lie in (0, 1], not {value}")
        if name in ("Vth", "Vth_bound", "tau", "delta_t") and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a positive number, not {value}")
    if settings.get("Vth", 1) < settings.get("Vth_bound", 0):
        raise ValueError(f"Vth ({settings['Vth']}) must not be below Vth_bound ({settings['Vth_bound']})")


def _keep_fixed_threshold(neuron, state_dict, prefix, *_):
    """A fixed threshold is a setting: a state-dict without it (an official one) leaves its value in force."""
    state_dict.setdefault(prefix + "Vth", neuron.Vth)

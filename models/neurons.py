"""Neuron layers: the dynamics and the DSR gradient of `functional`, with a trainable threshold `Vth`."""

import math

import torch
from torch import nn

from models import functional


class Neuron(nn.Module):
    """What IF and LIF layers share: the threshold, its lower bound, and the time-major layout.

    timesteps: T. Vth: initial threshold, in the unit of the currents. alpha: in (0, 1], fire at alpha*Vth.
    Vth_bound: lower bound of Vth. train_Vth: a parameter, or else a buffer. Vth_grad_scale: factor of the
    gradient of Vth. Raises ValueError for settings out of range. A subclass defines the map on
    representations (`representation` and its `weights`, None if all alike; `clamp_zones`; `gain` and
    `Vth_gain`), the `leak`, which is the factors of V and x_t in U, and the `amplitude` of a spike.
    """

    def __init__(
        self, *, timesteps=20, Vth=0.3, alpha=0.3, Vth_bound=0.0005, train_Vth=True, Vth_grad_scale=1.0
    ):
        super().__init__()
        check_settings(timesteps=timesteps, Vth=Vth, alpha=alpha, Vth_bound=Vth_bound)
        self.timesteps, self.alpha = timesteps, alpha
        self.loop = functional.membrane
        self.observer = None  # called with the spikes of every forward pass, zero where there is none
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
        if torch.is_grad_enabled():
            spikes = functional.DSR.apply(currents, self.Vth, self)
        else:  # nothing to differentiate: no need of the zones of the clamp
            spikes = self.fire(currents)
        if self.observer is not None:
            self.observer(spikes)
        return spikes.flatten(0, 1)

    def fire(self, currents):
        """Currents (T, B, ...) -> spikes of that shape, amplitude included."""
        return functional.fire(currents, self.Vth, self.alpha, *self.leak).mul_(self.amplitude.detach())

    def project_threshold(self):
        """Vth <- max(Vth, Vth_bound), on the parameter: a clamp in the graph would kill its gradient."""
        self.Vth.data.clamp_(min=self.Vth_bound)

    def decode(self, spikes):
        """The representation of this layer's spikes: (T*B, ...) -> (B, ...), differentiable."""
        return self.representation(spikes.unflatten(0, (self.timesteps, -1)))

    def simulate(self, y, static, scale, shift, dtype, needed):
        """The spikes, 0 and 1 in `dtype`, (T*B, ...), that the currents scale*y + shift give; and moments.

        y: (T*B, ...), or if `static` (B, ...) for every step; the spikes overwrite it where they fit. The
        moments, if needed, are the time mean and the representation of y and the same of the output,
        amplitude included, each (B, ...).
        """
        if y.dim() not in (2, 4):
            raise ValueError(f"collapsed layers take (T*B, C) or (T*B, C, H, W), not {y.dim()} dimensions")
        T, layout = self.timesteps, torch.channels_last if y.dim() == 4 else torch.contiguous_format

        def rows(x, T):  # the loop sees T matrices of neurons by channels, whatever the layer's shape
            return x.movedim(1, -1).reshape(T, -1, x.shape[1]).unbind(0)

        spikes, steps = y, rows(y, 1 if static else T)
        if static or y.dtype != dtype or not y.is_contiguous(memory_format=layout):
            shape = T * len(y) if static else len(y), *y.shape[1:]
            spikes = torch.empty(shape, dtype=dtype, device=y.device, memory_format=layout)
        lam, kappa = self.leak
        scale, shift = (kappa * v.flatten().expand(y.shape[1]) for v in (scale, shift))
        settings = self.Vth, self.alpha * self.Vth, lam, scale, shift
        weights = [[1.0] * T] + ([self.weights] if self.weights else []) if needed else []
        sums = self.loop(steps, steps if spikes is y else rows(spikes, T), *settings, weights)
        if self.observer is not None:
            self.observer(spikes)
        if not needed:
            return spikes, None
        one = spikes[: len(spikes) // T].movedim(1, -1).shape
        (y_mean, mean), *weighted = [[x.view(one).movedim(-1, 1) for x in pair] for pair in sums]
        y_mean, mean = y_mean / T, mean * (self.amplitude / T)
        if not weighted:
            return spikes, (y_mean, y_mean, mean, mean.clone())
        y_repr, representation = weighted[0]
        return spikes, (y_mean, y_repr, mean, representation * self.amplitude)

    def moments(self, sequence):
        """Time mean and representation: (T*B, ...) -> two of (B, ...)."""
        steps = sequence.movedim(1, -1).unflatten(0, (self.timesteps, -1))  # contiguous if channels_last
        return [x.movedim(-1, 1) for x in (functional.rate(steps), self.representation(steps))]

    def extra_repr(self):
        return f"timesteps={self.timesteps}, alpha={self.alpha}, Vth_bound={self.Vth_bound}"


class IFNeuron(Neuron):
    """Integrate-and-fire layer: (T*B, ...) -> Vth * spikes of the same shape.

    Representations: rate(out) ~ clamp(rate(x), 0, Vth). Its gradient passes where 0 <= rate(x) <= Vth, and
    grad Vth = Vth_grad_scale * T * sum of the time-mean gradient where rate(x) > Vth (section 4.1).
    For the settings see `Neuron`.
    """

    gain = 1.0
    leak = 1.0, 1.0
    weights = None

    @property
    def amplitude(self):
        return self.Vth

    @property
    def decoding_gain(self):
        return 1 / self.timesteps

    @property
    def Vth_gain(self):
        return self.Vth_grad_scale * self.timesteps

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
    def leak(self):
        return functional.leak(self.tau, self.delta_t)

    @property
    def weights(self):
        return functional.decay_weights(self.timesteps, self.tau, self.delta_t)

    @property
    def amplitude(self):
        return self.Vth / self.delta_t

    @property
    def decoding_gain(self):
        return math.fsum(w * w for w in self.weights)

    @property
    def gain(self):
        return 1 / self.tau

    @property
    def Vth_gain(self):
        return self.Vth_grad_scale * self.delta_t * self.timesteps

    def representation(self, sequence):
        return functional.weighted_rate(sequence, self.weights)

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

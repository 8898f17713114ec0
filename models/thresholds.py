"""Thresholds that fit the data, for any data set, network and number of time steps (section 4.3).

A neuron layer stands for a ReLU of its currents' representation. A threshold that is too high makes few,
coarse spikes, or none; one that is too low cuts off what lies above it. The best one in between follows from
the currents themselves.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from models.layers import SpikingNetwork
from models.trains import DROPOUTS

LOWEST_QUANTILE = 0.1  # of the positive representations: no lower threshold is tried
COARSE, FINE, ROUNDS = 32, 10, 2  # how many thresholds are tried: at first, then near the best, twice
FEW = 2**12  # elements are enough at first
NEAR = 1.2  # the last round looks that far, as a factor
TELLING = 0.9  # the correlation that is needed, as a fraction of the highest that any threshold has
NOISE = 0.01  # errors that differ by less, relatively, count as equal


@dataclass
class Fit:
    """A threshold, and how a layer does with it on a sample of its currents.

    error: mean square of what the spikes represent less what they should, the ReLU of what the currents
    represent, as a multiple of the mean square of the latter; 1 for a silent layer. rate: fraction of
    (neuron, step) that fires. correlation: squared, of the two over the elements: a factor and an offset, as
    of the next batch norm, do not count.
    """

    Vth: float
    error: float
    rate: float
    correlation: float


@dataclass
class LayerFit:
    """Of a neuron layer: the threshold that it had, the one that fits, and whether any makes it fire."""

    given: Fit
    fitted: Fit
    alive: bool


def fit_thresholds(model, batches, *, apply=True, samples=2**16, seed=0):
    """Start every neuron layer of `model` at the threshold that fits its currents; -> layer -> LayerFit.

    Of all Vth of at least Vth_bound that make the layer fire, the one of least error (see `Fit`) over about
    `samples` elements, drawn by `seed`. Thresholds whose spikes tell the elements apart much worse than
    others do are left out: behind a pool, where all currents are positive, the least error can be spikes that
    always come. Each batch passes forward once, and in it each layer sees the spikes of the layers before it
    at their new thresholds. A layer that no such threshold makes fire keeps its own, but at least Vth_bound.

    batches: tensors that the model takes, on its device. The model runs in the mode that it is in, but
    without dropout; nothing but the thresholds changes, trained and fixed ones alike, and under apply=False
    not even these. Layers come in the order of the forward pass, under their names in the state-dict. Raises
    ValueError for no batches, TypeError for pairs with labels, and whatever the model raises for batches
    that do not suit it.
    """

    def currents(neuron, x):
        steps = x.unflatten(0, (neuron.timesteps, -1))
        return steps, steps

    layers = [(name, module, module) for name, module in model.named_modules() if hasattr(module, "Vth")]
    return fit_layers(model, batches, layers, currents, apply, samples, seed)


def fit_to_activations(ann, batches, neuron, *, samples=2**16, seed=0):
    """Thresholds for the neuron layers that will stand in the ReLUs' place; -> layer -> LayerFit.

    As `fit_thresholds`, but the currents are what enters the ReLUs of `ann`, the same at every time step.
    neuron: an IF or LIF layer with the settings of those to come; its threshold stays as it is.
    """

    def currents(neuron, x):
        return x.flatten().expand(neuron.timesteps, -1), x.max().expand(neuron.timesteps, 1)

    layers = [(name, module, neuron) for name, module in ann.named_modules() if isinstance(module, nn.ReLU)]
    return fit_layers(ann, batches, layers, currents, False, samples, seed)


@torch.no_grad()
def fit_layers(model, batches, layers, currents, apply, samples, seed):
    """Name -> LayerFit of the `layers` (name, module, neuron), by what enters their modules.

    currents(neuron, input) -> currents (T, ...), and those of them that charge highest.
    """
    batches, fits = list(batches), {}
    if not batches:
        raise ValueError("no batches to fit thresholds to")
    if isinstance(model, SpikingNetwork) and not all(map(torch.is_tensor, batches)):
        raise TypeError("batches must be tensors; of pairs (input, label) give [x for x, _ in batches]")
    share = math.ceil(samples / len(batches))

    def watch(name, module, neuron):
        sample, highest, given = [], [], neuron.Vth.item()
        generator = torch.Generator().manual_seed(seed)  # alike in every process and on every device

        def fit(_module, inputs):
            steps, strongest = currents(neuron, inputs[0])
            sample.append(draw(steps.flatten(1), share, generator))
            highest.append(highest_potential(neuron, strongest))
            fits[name] = fit_layer(neuron, torch.cat(sample, 1), max(highest), given)
            if apply:
                neuron.Vth.data.fill_(fits[name].fitted.Vth)

        return module.register_forward_pre_hook(fit)

    with undisturbed(model, [watch(*layer) for layer in layers]):
        for batch in batches:
            model(batch)
    if layers and not fits:
        raise ValueError("the forward pass of the model calls none of its neuron layers")
    return fits


@contextmanager
def undisturbed(model, hooks):
    """While open, the forward pass calls every layer and has no dropout; then all is as before, unhooked."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    dropouts = [module for module in model.modules() if isinstance(module, DROPOUTS) and module.training]
    networks = [(module, module.backward) for module in model.modules() if isinstance(module, SpikingNetwork)]
    for network, _ in networks:
        network.backward = "unrolled"
    for dropout in dropouts:
        dropout.eval()
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for dropout in dropouts:
            dropout.train()
        for buffer, value in statistics:
            buffer.copy_(value)
        for network, backward in networks:
            network.backward = backward


def draw(currents, share, generator):
    """At most `share` elements of currents (T, n)."""
    if currents.shape[1] <= share:
        return currents
    chosen = torch.randint(currents.shape[1], (share,), generator=generator, device="cpu")
    return currents[:, chosen.to(currents.device)]


def highest_potential(neuron, currents):
    """The highest membrane potential that currents (T, B, ...) charge up to where nothing fires."""
    lam, kappa = neuron.leak
    potential, highest = torch.zeros_like(currents[0]), []
    for current in currents:
        potential.mul_(lam).add_(current, alpha=kappa)
        highest.append(potential.max())
    return torch.stack(highest).max().item()


def fit_layer(neuron, currents, highest, given):
    """The LayerFit of a layer at the threshold `given`, on currents (T, n) that charge it up to `highest`."""
    given = try_thresholds(neuron, currents, [max(given, neuron.Vth_bound)])[0]
    silent_above = highest / neuron.alpha
    alive = neuron.Vth_bound < silent_above < math.inf
    return LayerFit(given, search(neuron, currents, silent_above) if alive else given, alive)


def search(neuron, currents, silent_above):
    """The Fit of least error among thresholds from a low quantile to `silent_above`, coarse to fine."""
    highest = 0.999 * silent_above  # still below it after rounding
    lowest = max(neuron.Vth_bound, min(lowest_threshold(neuron, currents), highest / 2))
    highest = max(lowest, highest)
    tried = geometric(lowest, highest, COARSE)
    fits = try_thresholds(neuron, currents[:, :: math.ceil(currents.shape[1] / FEW)], tried)
    needed = TELLING * max(fit.correlation for fit in fits)

    def rank(fit, slack=0.0):
        return fit.correlation < needed, fit.error * (1 - slack)

    i = min(range(COARSE), key=lambda i: rank(fits[i]))
    best, low, high = tried[i], tried[max(i - 1, 0)], tried[min(i + 1, COARSE - 1)]
    for _ in range(ROUNDS):
        fits = try_thresholds(neuron, currents, [best, *geometric(low, high, FINE)])
        smooth = try_thresholds(neuron, currents, [lowest_point(fits[1:])])[0]
        fit = min([smooth, *fits], key=lambda fit: rank(fit, NOISE if fit is smooth else 0.0))
        best, low, high = fit.Vth, max(lowest, fit.Vth / NEAR), min(highest, fit.Vth * NEAR)
    return fit


def lowest_point(fits):
    """The threshold where a parabola through the errors is lowest: it evens out the noise of the sample."""
    x = torch.tensor([math.log(fit.Vth) for fit in fits], dtype=torch.float64)
    middle, width = (x[0] + x[-1]) / 2, max((x[-1] - x[0]) / 2, 1e-9)
    x = (x - middle) / width
    errors = torch.tensor([[fit.error] for fit in fits], dtype=torch.float64)
    _, slope, curvature = torch.linalg.lstsq(torch.stack([x**0, x, x**2], 1), errors).solution.flatten()
    lowest = (-slope / (2 * curvature)).clamp(-1, 1) if curvature > 0 else -slope.sign()
    return math.exp(middle + width * lowest)


def geometric(low, high, n):
    """n numbers from low to high, each the same multiple of the one before."""
    return [low * (high / low) ** (i / (n - 1)) for i in range(n)]


def wanted(neuron, currents):
    """What the spikes of currents (T, n) should represent: the ReLU of their representation, times gain."""
    return neuron.representation(currents).relu() * neuron.gain


def lowest_threshold(neuron, currents):
    """A threshold that would cut off nearly all that there is; infinite if there is nothing."""
    positive = wanted(neuron, currents)
    positive = positive[positive > 0]
    rank = 1 + int(LOWEST_QUANTILE * (len(positive) - 1))
    return positive.sort().values[rank - 1].item() * neuron.unit if len(positive) else math.inf


def try_thresholds(neuron, currents, thresholds):
    """How the layer would do with each threshold on currents (T, n); -> as many Fits."""
    own, target, figures = neuron.Vth.item(), wanted(neuron, currents), []
    for Vth in thresholds:
        neuron.Vth.data.fill_(Vth)
        spikes = neuron.fire(currents)
        represented = neuron.representation(spikes)
        error, rate = (represented - target).square().mean(), spikes.count_nonzero() / spikes.numel()
        figures.append(torch.stack([error, rate, squared_correlation(represented, target)]))
    neuron.Vth.data.fill_(own)
    scale = target.square().mean().item()
    figures = torch.stack(figures).tolist()  # at once, as a GPU waits
    return [Fit(Vth, relative(error, scale), *others) for Vth, (error, *others) in zip(thresholds, figures)]


def squared_correlation(x, y):
    """Of two tensors over their elements, between 0 and 1; 0 where one is constant."""
    x, y = x - x.mean(), y - y.mean()
    return (x * y).mean().square() / (x.square().mean() * y.square().mean()).clamp(min=1e-30)


def relative(error, scale):
    """error / scale; where nothing is wanted any error is infinitely large."""
    return error / scale if scale else math.inf if error else 0.0

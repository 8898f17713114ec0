"""Fitted thresholds against closed forms and searches by brute force; what must not change, and odd data."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from models import IFNeuron, LIFNeuron, create_model, fit_thresholds
from models.thresholds import fit_to_activations

TAU, DELTA_T = 1.3, 0.2


def neuron(kind, **settings):
    if kind == "if":
        return IFNeuron(**dict(Vth=6.0, Vth_bound=0.0005) | settings)
    return LIFNeuron(**dict(Vth=6.0, Vth_bound=0.0005, tau=TAU, delta_t=DELTA_T) | settings)


def scenes(n):
    """Images that differ from each other in more than noise."""
    return nn.functional.interpolate(torch.randn(n, 3, 4, 4), size=32, mode="bilinear")


def fit_one(layer, currents, **settings):
    """The fit of a layer alone to currents (T, n), or (n,) for the same at every step."""
    currents = torch.as_tensor(currents).float()
    if currents.dim() == 1:
        currents = currents.expand(layer.timesteps, -1)
    (fit,) = fit_thresholds(nn.Sequential(layer), [currents.reshape(-1, 1)], **settings).values()
    return fit


def quantiles(n):
    """n values that stand for a normal distribution of mean 0 and deviation 1 without noise."""
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n).numpy()


def mean_square(x, Vth, alpha, kind):
    """The objective by the equations of the paper, in NumPy; x: (T, n)."""
    T, lam, kappa, tau, unit = len(x), 1.0, 1.0, 1.0, 1.0
    weights = np.ones(T)
    if kind == "lif":
        lam, tau, unit = math.exp(-DELTA_T / TAU), TAU, DELTA_T
        kappa, weights = 1 - lam, lam ** np.arange(T - 1, -1, -1)
    weights = weights / weights.sum()
    V = np.zeros_like(x[0])
    error = -np.maximum(np.tensordot(weights, x, 1), 0) / tau
    for t in range(T):
        U = lam * V + kappa * x[t]
        spikes = alpha * Vth <= U
        V = U - Vth * spikes
        error += weights[t] * Vth / unit * spikes
    return (error**2).mean()


def brute_force(x, alpha, kind):
    """The threshold of least error among 60 over three decades, and 40 around the best of them, smoothed."""
    unit = DELTA_T if kind == "lif" else 1.0
    objective = partial(mean_square, x, alpha=alpha, kind=kind)
    coarse = unit * np.geomspace(0.03, 30, 60)
    best = coarse[np.argmin([objective(Vth) for Vth in coarse])]
    fine = best * np.geomspace(0.75, 1.33, 40)
    curve = np.polyfit(np.log(fine), [objective(Vth) for Vth in fine], 4)
    dense = np.linspace(np.log(fine[0]), np.log(fine[-1]), 2000)
    return math.exp(dense[np.argmin(np.polyval(curve, dense))])


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_one_step_of_normal_currents(alpha):
    """T=1: the error is 1/2 + V^2*Q(alpha*V) - 2*V*phi(alpha*V), Q and phi of the normal distribution."""

    def error(V):
        tail = 0.5 * math.erfc(alpha * V / math.sqrt(2))
        return 0.5 + V**2 * tail - 2 * V * math.exp(-((alpha * V) ** 2) / 2) / math.sqrt(2 * math.pi)

    best = min((0.001 * i for i in range(1, 5000)), key=error)
    fit = fit_one(neuron("if", timesteps=1, alpha=alpha), torch.randn(200_000))
    assert fit.fitted.Vth == pytest.approx(best, rel=0.03)
    assert fit.fitted.error == pytest.approx(error(best) / 0.5, rel=0.03)
    assert fit.given.error == pytest.approx(error(6.0) / 0.5, rel=0.03)
    assert fit.given.rate == pytest.approx(0.5 * math.erfc(alpha * 6 / math.sqrt(2)), abs=2e-4)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("T", [1, 2, 4, 20])
@pytest.mark.parametrize("kind", ["if", "lif"])
def test_normal_currents_that_stay(kind, T, alpha):
    """The same normal current at every step, as of a static image."""
    best = brute_force(np.tile(quantiles(40_000), (T, 1)), alpha, kind)
    fit = fit_one(neuron(kind, timesteps=T, alpha=alpha), quantiles(2**16))
    assert fit.alive and fit.fitted.Vth == pytest.approx(best, rel=0.03)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize(("kind", "T"), [("if", 2), ("if", 4), ("if", 20), ("lif", 2), ("lif", 4)])
def test_normal_currents_that_are_drawn_anew_at_every_step(kind, T, alpha):
    """The brute force sees other draws than the fit."""
    n = 300_000
    x = np.random.default_rng(0).standard_normal((T, n), dtype=np.float32)
    best = brute_force(x, alpha, kind)
    fit = fit_one(neuron(kind, timesteps=T, alpha=alpha), torch.randn(T, n), samples=n)
    assert fit.fitted.Vth == pytest.approx(best, rel=0.03)


def test_a_threshold_that_represents_all_exactly():
    """T=2, alpha=1: of currents 1 and 0.5 Vth=1 makes spikes at both steps and at the second: no error.

    A hair above, the current 1 fires but once: the least error lies at the foot of a cliff.
    """
    fit = fit_one(neuron("if", timesteps=2, alpha=1.0), [1.0, 0.5, -1.0] * 40)
    assert fit.fitted.Vth == pytest.approx(1, rel=0.03) and fit.fitted.error < 1e-3
    assert fit.fitted.rate == pytest.approx(3 / 6)


def test_each_layer_sees_the_spikes_of_the_layers_before_it():
    """In one pass: the second threshold is the one that fits the spikes that the first now makes."""
    first, linear, second = neuron("if", timesteps=3), nn.Linear(5, 7), neuron("lif", timesteps=3)
    network, passes = nn.Sequential(first, linear, second), []
    linear.register_forward_hook(lambda *_: passes.append(1))
    currents = torch.randn(3 * 400, 5)
    fits = fit_thresholds(network, [currents])
    assert list(fits) == ["0", "2"] and len(passes) == 1
    alone = neuron("lif", timesteps=3)
    spikes = first(currents)
    assert spikes.any() and spikes.max() == first.Vth
    expected = fit_thresholds(nn.Sequential(alone), [linear(spikes)])["0"].fitted
    assert fits["2"].fitted == expected
    assert second.Vth.item() == pytest.approx(expected.Vth)


def test_several_batches_count_together():
    """Two batches of unlike size of currents: the threshold that fits both."""
    small, large = torch.randn(1, 2000), 5 * torch.randn(1, 2000)
    layer = neuron("if", timesteps=1)
    (fit,) = fit_thresholds(nn.Sequential(layer), [small.view(-1, 1), large.view(-1, 1)]).values()
    both = fit_one(neuron("if", timesteps=1), torch.cat([small, large], 1))
    assert fit.fitted == both.fitted and fit.given == both.given
    assert fit.fitted.Vth > 2 * fit_one(neuron("if", timesteps=1), small).fitted.Vth


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["preresnet.resnet20_if", "preresnet.resnet20_lif", "vgg.vgg11_if"])
def test_nothing_but_the_thresholds_changes(name, training):
    model = create_model(name, num_classes=3, timesteps=2, Vth=0.5, Vth_bound=0.01).train(training)
    x = torch.randn(4, 2, 2, 48, 48) if name.startswith("vgg") else scenes(4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    report = fit_thresholds(model, [x], apply=False, samples=500)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    fits = fit_thresholds(model, [x, x], samples=500)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {f"{layer}.Vth" for layer in fits} == {key for key in before if key.endswith("Vth")}
    assert changed == {f"{layer}.Vth" for layer, fit in fits.items() if fit.alive}
    assert len(changed) >= len(fits) - 1  # untrained, the last layer may get no positive current
    assert report.keys() == fits.keys()
    assert all(fit.given.Vth == 0.5 for fit in [*report.values(), *fits.values()])
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert model.backward == "collapsed" and not any(p.grad is not None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("kind", ["if", "lif"])
def test_no_layer_of_a_network_starts_silent(kind, T):
    model = create_model(f"preresnet.resnet20_{kind}", timesteps=T, Vth=6.0, delta_t=0.1)
    images = scenes(16)
    given = fit_thresholds(model, [images], apply=False, samples=2000)
    fits = fit_thresholds(model, [images], samples=2000)
    assert list(fits)[0] == "layer1.0.relu1" and list(fits)[-3:] == ["relu1", "relu2", "relu3"]
    assert all(fit.alive and fit.fitted.rate > 0.02 for fit in fits.values())
    assert fits["relu2"].fitted.correlation > max(0.3, given["relu2"].given.correlation)
    nn.functional.cross_entropy(model(images), torch.arange(16) % 10).backward()
    assert model.conv1.weight.grad.any()


def test_spikes_that_always_come_are_no_choice():
    """Currents about 1: the least error are spikes of 1 at every step, which tell no element from another.

    At one step an indicator of x > c has with x, uniform, the squared correlation 3p(1-p), p the fraction
    above c: the highest is 3/4, so that p(1-p) >= 0.9/4, and of these the lowest threshold errs least.
    """
    currents = torch.linspace(0.8, 1.2, 4001)
    fit = fit_one(neuron("if", timesteps=1, alpha=0.5), currents).fitted
    p = (1 + math.sqrt(0.1)) / 2
    assert fit.rate == pytest.approx(p, abs=0.03) and fit.correlation == pytest.approx(0.675, abs=0.03)
    assert fit.Vth == pytest.approx((0.8 + 0.4 * (1 - p)) / 0.5, rel=0.01)
    assert fit.error == pytest.approx(
        (p * fit.Vth**2 - 2 * fit.Vth * (p * (1.2 - 0.2 * p)) + 1.0133) / 1.0133, abs=0.03
    )
    same = fit_one(neuron("if", timesteps=1, alpha=0.5), torch.ones(2001)).fitted
    assert same.rate == 1 and same.Vth == pytest.approx(1.0, rel=0.01)  # there is nothing to tell apart


def test_the_same_every_time_and_another_sample_by_another_seed():
    x = torch.randn(4, 30_000)
    fits = [fit_one(neuron("if", timesteps=4), x, samples=1000, seed=seed).fitted.Vth for seed in (3, 3, 4)]
    assert fits[0] == fits[1] != fits[2] and fits[2] == pytest.approx(fits[0], rel=0.3)


@pytest.mark.parametrize("train_Vth", [True, False])
@pytest.mark.parametrize("kind", ["if", "lif"])
def test_layers_that_cannot_fire_keep_their_threshold(kind, train_Vth):
    """Currents of 0 and below; NaN, which no threshold can mend."""
    for value in (0.0, -1.0, math.nan):
        layer = neuron(kind, timesteps=3, train_Vth=train_Vth)
        fit = fit_one(layer, [value] * 9)
        assert not fit.alive and fit.fitted.Vth == layer.Vth == 6 and fit.fitted.rate == 0
        assert math.isnan(value) or fit.fitted.error == 0


@pytest.mark.parametrize("train_Vth", [True, False])
def test_the_bound_holds(train_Vth):
    """Above the optimum, about 1.2, the bound itself is best; above 8, the highest alpha*U, none fires."""
    currents = torch.cat([torch.randn(5000).clamp(max=4), torch.tensor([4.0])])
    for bound, alive in ((2.0, True), (7.9, True), (8.1, False), (100.0, False)):
        layer = neuron("if", timesteps=1, alpha=0.5, Vth=100.0, Vth_bound=bound, train_Vth=train_Vth)
        fit = fit_one(layer, currents)
        assert fit.alive == alive and (fit.fitted.rate > 0) == alive
        assert layer.Vth.item() == pytest.approx(bound if alive else 100.0, rel=0.01)
        assert not isinstance(layer.Vth, nn.Parameter) or train_Vth


@pytest.mark.parametrize("kind", ["if", "lif"])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_one_positive_current_of_many_is_enough_to_fire(kind, alpha):
    """Even if the sample misses it, and if what it does is no good: the second step takes it back."""
    for positive in ([1e-3, 1e-3], [1.0, -5.0], [-0.5, 2.0]):
        currents = -torch.ones(2, 50_000)
        currents[:, 777] = torch.tensor(positive)
        layer = neuron(kind, timesteps=2, alpha=alpha, Vth_bound=1e-6)
        fit = fit_one(layer, currents, samples=100)
        assert fit.alive and layer(currents.view(-1, 1)).count_nonzero() > 0


def test_tiny_batches_and_pools():
    """One image, one element; behind a pool, where currents are multiples of a fraction of a threshold."""
    for n in (1, 2, 3):
        fit = fit_one(neuron("if", timesteps=4, alpha=1.0), [0.8] * n)
        assert fit.fitted.error < 1e-3 and fit.fitted.rate > 0
    first, second = neuron("if", timesteps=2), neuron("if", timesteps=2)
    network = nn.Sequential(first, nn.AvgPool2d(4), nn.Flatten(), second)
    fits = fit_thresholds(network, [torch.randn(2 * 1, 3, 4, 4)])
    assert fits["3"].alive and fits["3"].fitted.error < 0.2


def test_no_batches():
    for fit in (fit_thresholds, partial(fit_to_activations, neuron=neuron("if"))):
        with pytest.raises(ValueError, match="no batches"):
            fit(nn.Sequential(nn.ReLU()), [])


def test_a_network_inside_another_module():
    model, images = create_model("preresnet.resnet20_if", timesteps=2), [scenes(8)]
    alone, outer = fit_thresholds(model, images, apply=False), nn.Sequential(model)
    inside = fit_thresholds(outer, images, apply=False)
    assert {name.removeprefix("0."): fit for name, fit in inside.items()} == alone and len(alone) == 21
    assert model.backward == "collapsed" and not hasattr(outer, "backward")


def test_layers_that_are_never_called():
    model = nn.Linear(2, 2)
    model.spare = neuron("if")
    with pytest.raises(ValueError, match="calls none of its neuron layers"):
        fit_thresholds(model, [torch.randn(4, 2)])


def test_a_network_without_neurons_has_nothing_to_fit():
    model = create_model("preresnet.resnet20_ann", num_classes=2)
    assert fit_thresholds(model, [torch.randn(2, 3, 32, 32)]) == {}


@pytest.mark.parametrize("kind", ["if", "lif"])
def test_activations_are_currents_that_stay(kind):
    """What enters an ANN's ReLUs, as currents that are the same at every step; in any layout."""
    layer = neuron(kind, timesteps=4, alpha=0.5)
    activations = torch.randn(50, 3, 8, 8)
    ann = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(192, 5), nn.ReLU())
    fits = fit_to_activations(ann, activations.split(25), layer, samples=10**6)
    assert list(fits) == ["0", "3"] and layer.Vth == 6
    best = brute_force(np.tile(activations.double().numpy().ravel(), (4, 1)), 0.5, kind)
    assert fits["0"].fitted.Vth == pytest.approx(best, rel=0.03)
    second = fit_one(layer, ann[:3](activations).flatten())  # the order of the elements does not matter
    assert fits["3"].fitted.Vth == pytest.approx(second.fitted.Vth, rel=1e-6)
    strided = fit_to_activations(
        ann[:1], [activations.to(memory_format=torch.channels_last)], layer, samples=10**6
    )
    assert strided["0"].fitted.Vth == pytest.approx(fits["0"].fitted.Vth, rel=1e-6)

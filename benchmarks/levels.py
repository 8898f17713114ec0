"""What does an SNN lose to its few levels, and what to its spikes? An ANN whose ReLUs have T+1 levels tells.

    python benchmarks/levels.py latency-if-t5 --seed 1 --model preresnet.resnet20_if --Vth auto \
        --pre_train resnet20_ann_cifar10 --dataset imagefolder --path ./data/cifar10_jpeg \
        --epochs 12 --lr 0.01

An IF layer passes on one of T+1 values, 0 to Vth. So does each ReLU here, with a threshold that starts and
is trained like the SNN's, and with the same gradient, but without spikes: nothing fluctuates over time. Takes
the flags of `reproduce.py run ROW` and starts from the same weights as that run with the same seed, sees the
same batches, and fits thresholds in the same way. The same command goes on where a run was stopped;
`reproduce.py table` and `curves` show it beside ours, under its own name.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])
from replaced import run_row  # noqa: E402
from rounded import round_to_levels  # noqa: E402

import models  # noqa: E402
from utils.cli import require, run_program  # noqa: E402
from utils.statistics import neuron_layers  # noqa: E402


@dataclass
class Levels:
    """What stands for the spikes: numbers from 0 to T, each for as many spikes of T steps."""

    numbers: torch.Tensor
    timesteps: int

    @property
    def shape(self):
        return torch.Size([self.timesteps, *self.numbers.shape])

    def count(self):
        return self.numbers.long().sum()


def forward(neuron, timesteps, x):
    """x (B, ...) -> the nearest of T+1 levels, by the threshold of the layer."""
    neuron.project_threshold()
    activations, numbers = round_to_levels(x, timesteps, neuron.Vth)
    neuron.report_spikes(Levels(numbers, timesteps))
    return activations


def levels_model(name, *, timesteps, **settings):
    """The network of IF neurons, but with one time step, in which T+1 levels stand for T steps."""
    model = models.create_model(name, timesteps=1, **settings | dict(backward="unrolled"))
    for _, neuron in neuron_layers(model):
        require(
            type(neuron) is models.IFNeuron, f"{name}: the levels are those of IF neurons; give an _if one"
        )
        neuron.forward = partial(forward, neuron, timesteps)
    model.spiking = partial(models.create_model, name, timesteps=timesteps, **settings)
    return model


def fit_thresholds(model, batches, apply):
    """The fits of the SNN of the same weights, which is what its thresholds start at."""
    spiking = model.spiking().to(next(model.parameters()).device)
    spiking.load_state_dict(model.state_dict())
    return models.fit_thresholds(spiking.train(), batches, apply=False)


def main(argv=None):
    ours = dict(create_model=levels_model, fit_thresholds=fit_thresholds)
    names = dict(suffix="_levels", neurons=lambda args: f"{args.timesteps + 1} levels without spikes")
    run_row(__file__, __doc__, argv, **names, **ours)


if __name__ == "__main__":
    run_program(main)

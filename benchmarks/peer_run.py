"""A row of the paper by SpikingJelly's DSR neurons: our network, data, recipe, seed and loop, their neurons.

    python benchmarks/peer_run.py latency-if-t5 --seed 1 --model preresnet.resnet20_if --Vth auto \
        --dataset imagefolder --path ./data/cifar10_jpeg --epochs 30

takes the flags of `reproduce.py run ROW` and starts from the same weights as that run with the same seed,
sees the same batches, and fits thresholds in the same way. It unrolls time, as their neurons do. Stop it when
you like (Ctrl-C): the same command goes on, and an epoch that is done counts. `reproduce.py table` and
`curves` show it beside ours, under its own name.
"""

import sys
from functools import partial
from importlib import metadata
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])

from replaced import run_row  # noqa: E402
from spikingjelly.activation_based.neuron import DSRIFNode, DSRLIFNode  # noqa: E402

from models import LIFNeuron, create_model, fit_thresholds  # noqa: E402
from models.engines.dense import Spikes  # noqa: E402
from utils.cli import run_program  # noqa: E402
from utils.statistics import neuron_layers  # noqa: E402


def peer_model(name, **settings):
    """Our network, in which every neuron layer's forward pass is that of their node."""
    model = create_model(name, **settings | dict(backward="unrolled"))
    for _, neuron in neuron_layers(model):
        neuron.forward = partial(forward, neuron, peer_of(neuron))
    return model


def peer_of(neuron):
    """Their node with the settings of our layer."""
    settings = dict(T=neuron.timesteps, alpha=neuron.alpha, v_threshold=neuron.Vth.item())
    settings |= dict(v_threshold_lower_bound=neuron.Vth_bound, v_threshold_grad_scaling=neuron.Vth_grad_scale)
    if isinstance(neuron, LIFNeuron):
        return DSRLIFNode(**settings, tau=neuron.tau, delta_t=neuron.delta_t)
    return DSRIFNode(**settings)


def forward(neuron, node, currents):
    """Currents (T*B, ...) -> spikes of that shape, by their node with the threshold of our layer."""
    if node.v_threshold is not neuron.Vth:
        del node.v_threshold
        node.v_threshold = neuron.Vth  # the parameter, which the optimizer and the checkpoint know
    spikes = node(currents.unflatten(0, (neuron.timesteps, -1))).flatten(0, 1)
    neuron.report_spikes(Spikes(spikes))
    return spikes


def main(argv=None):
    version = metadata.version("spikingjelly")
    theirs = dict(suffix="_peer", neurons=lambda args: f"spikingjelly {version}", create_model=peer_model)
    run_row(__file__, __doc__, argv, **theirs, fit_thresholds=fit_thresholds)


if __name__ == "__main__":
    run_program(main)

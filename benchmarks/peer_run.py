"""A row of the paper by SpikingJelly's DSR neurons: our network, data, recipe, seed and loop, their neurons.

    python benchmarks/peer_run.py latency-if-t5 --seed 1 --model preresnet.resnet20_if --Vth auto \
        --dataset imagefolder --path ./data/cifar10_jpeg --epochs 30

takes the flags of `reproduce.py run ROW` and starts from the same weights as that run with the same seed,
sees the same batches, and fits thresholds in the same way. It unrolls time, as their neurons do. Stop it when
you like (Ctrl-C): the same command goes on, and an epoch that is done counts. `reproduce.py table` and
`curves` show it beside ours, under its own name.
"""

import argparse
import sys
from functools import partial
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from spikingjelly.activation_based.neuron import DSRIFNode, DSRLIFNode  # noqa: E402

import reproduce  # noqa: E402
from models import LIFNeuron, create_model, fit_thresholds  # noqa: E402
from models.engines.dense import Spikes  # noqa: E402
from utils import checkpoint, program, results  # noqa: E402
from utils.cli import choose_device, run_program  # noqa: E402
from utils.records import alone  # noqa: E402
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("row", choices=reproduce.cifar.ROWS, metavar="ROW", help="of `reproduce.py list`")
    parser.add_argument("--seed", type=program.count, default=1)
    options, flags = parser.parse_known_args(argv)
    _, args, _ = reproduce.plan(options.row, options.seed, flags)
    args.name, args.neurons = args.name + "_peer", f"spikingjelly {metadata.version('spikingjelly')}"
    files = reproduce.cifar.run_files(args)
    checkpoint.make_folder(files.folder)
    command = ["python", "benchmarks/peer_run.py", *(sys.argv[1:] if argv is None else argv)]
    how = dict(device=choose_device(args.device), fixed=reproduce.cifar.get_parser().fixed)
    with alone(files):
        results.add_session(files.session, args.device, command)
        program.run(args, files=files, **how, create_model=peer_model, fit_thresholds=fit_thresholds)


if __name__ == "__main__":
    run_program(main)

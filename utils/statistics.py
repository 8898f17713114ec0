"""What layers do: firing rates of the modules that hold a `Vth`, where a NaN began; and peak memory."""

import platform
import re
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn


def neuron_layers(model):
    """(published name, module) of each neuron layer; blocks are indexed as in `layer1[0].relu1`."""
    for name, module in model.named_modules():
        if hasattr(module, "Vth"):
            yield published_name(name), module


def published_name(layer):
    """`layer1[0].relu1` for `layer1.0.relu1`."""
    return re.sub(r"\.(\d+)\.", r"[\1].", layer)


def threshold_name(layer):
    """The published name of a layer's threshold: `layer1[0].storein2` for `layer1.0.relu2`."""
    return published_name(layer).replace("relu", "storein")


@contextmanager
def count_spikes(model):
    """While open, counts [spikes, opportunities to spike] of each layer, for `firing_rates`."""
    neurons = dict(neuron_layers(model))
    counts = {name: torch.zeros(2, dtype=torch.long, device=n.Vth.device) for name, n in neurons.items()}

    def count(name, spikes):
        fired = spikes.count()
        counts[name] += torch.stack([fired, torch.full_like(fired, spikes.shape.numel())])

    with ExitStack() as hooks:
        for name, neuron in neurons.items():
            hooks.enter_context(neuron.register_spike_hook(partial(count, name)))
        yield counts


def firing_rates(counts):
    """Layer -> fraction of its (sample, neuron, step) triples that fired."""
    return {name: float(fired) / max(float(possible), 1) for name, (fired, possible) in counts.items()}


@contextmanager
def unrolled(model):
    """While open, a network's forward pass calls every module of it, which the collapsed one does not."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(getattr(module, "backward", None), str):
                stack.callback(setattr, module, "backward", module.backward)
                module.backward = "unrolled"
        yield


def hits(logits, labels):
    """Whether the label is the likeliest class, the second, ...: (B, at most 5).

    Equal logits, of which few time steps make many, are ranked as topk does, in all accuracies alike.
    """
    return logits.topk(min(5, logits.shape[1])).indices == labels[:, None]


def not_finite(state):
    """The names in a state-dict whose values hold a NaN or an infinity."""
    return [name for name, value in state.items() if not value.isfinite().all()]


@torch.no_grad()
def first_not_finite(model, images):
    """The parameter, or else the first module of the forward pass, with a NaN or an infinity; or None."""
    found, names = not_finite(dict(model.named_parameters())), {m: name for name, m in model.named_modules()}

    def look(module, _inputs, output):
        if names.get(module) and torch.is_tensor(output) and not output.isfinite().all():
            found.append(names[module])

    with unrolled(model), nn.modules.module.register_module_forward_hook(look):
        if not found:
            model(images)
    return found[0] if found else None


def peak_memory(device):
    """What -> the most memory this process has had, in MB (2^20 bytes): a GPU's tensors, or all; if known."""
    if device.type == "cuda":
        return {"peak memory (MB)": torch.cuda.max_memory_allocated(device) / 2**20}
    status = Path("/proc/self/status")  # of Linux, where `resource` starts with what the parent has had
    if status.exists() and (peak := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return {"peak memory (MB)": int(peak[1]) / 2**10}
    try:
        import resource
    except ImportError:  # on Windows
        return {}
    unit = 1 if platform.system() == "Darwin" else 1024
    return {"peak memory (MB)": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}

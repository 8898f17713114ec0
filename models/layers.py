"""What the networks are written in: spike trains, branches of linear maps, and spiking layers.

A network is a chain of spiking layers [branches -> sum -> batch norm -> neuron]. A branch is a pair (linear
map, spike train). A block of a residual network returns the branches that end in its sum instead of adding
them, since the sum stands in front of the next batch norm and so belongs to the next spiking layer. Nothing
else touches a spike train but maps that act on every time step alike (pooling, flattening, dropout).
"""

import warnings
from itertools import chain

import torch
from torch import nn

from models.collapsed import collapsed_layer
from models.engines import ENGINES, choose_engine
from models.engines.dense import DenseEngine, Spikes, compiled_loop
from models.functional import working_dtype
from models.neurons import Neuron, averaging
from models.synchronized import SynchronizedBatchNorm
from models.trains import DROPOUTS, SpikeTrain

BACKWARDS = ("collapsed", "unrolled", "rate")


def spiking_layer(branches, bn, neuron):
    """Sum the currents of the branches, normalise over time and batch (or not: `bn` None), fire."""
    first, T = branches[0][1], neuron.timesteps
    for _, train in branches:
        if train.timesteps != T:
            raise ValueError(f"a train of {train.timesteps} time steps meets a neuron layer of {T}")
    if not first.unrolled:
        still = all(train.static for _, train in branches)
        branches = [(linear, train.completed(still)) for linear, train in branches]
        # not seen through by torch.compile of the network
        run = torch.compiler.disable(collapsed_layer) if torch.compiler.is_compiling() else collapsed_layer
        spikes, mean, representation = run(branches, bn, neuron)
        amplitude = neuron.amplitude.detach().clone()
        parts = dict(amplitude=amplitude, mean=mean, representation=representation, neuron=neuron)
        return SpikeTrain(spikes, T, first.backward, first.engine, **parts)
    currents, *others = [linear(train.spikes) for linear, train in branches]
    currents = sum(others, start=currents)
    return SpikeTrain(neuron(currents if bn is None else bn(currents)), T, neuron=neuron)


class SpikingNetwork(nn.Module):
    """Vectors (B, F), images (B, C, H, W) or event frames (B, T, ...) of either to logits (B, classes).

    A subclass defines `spike`, from the input's train to the last layer's. backward and engine: as of
    `create_model`.
    """

    def __init__(self, backward="collapsed", engine="auto"):
        super().__init__()
        self.backward, self.engine = backward, engine
        self._compiled = None  # an engine of compiled loops

    def __setattr__(self, name, value):
        for setting, known in (("backward", BACKWARDS), ("engine", ENGINES)):
            if name == setting and value not in known:
                raise ValueError(f"unknown {name} {value!r}; choose from: {', '.join(known)}")
        super().__setattr__(name, value)

    def __getstate__(self):
        return super().__getstate__() | {"_compiled": None}  # which no pickle holds; copies lose it as well

    @property
    def _neuron(self):
        """One of the neuron layers (or what stands in for them), which have the same T and precision."""
        neurons = (module for module in self.modules() if isinstance(module, Neuron))
        parts = (module for module in self.modules() if not isinstance(module, SpikingNetwork))
        others = (part for part in parts if hasattr(part, "decode") and hasattr(part, "timesteps"))
        neuron = next(chain(neurons, others), None)
        if neuron is None:
            raise TypeError("the network has no neuron layer among its modules")
        return neuron

    @property
    def timesteps(self):
        return self._neuron.timesteps

    def forward(self, x):
        train = self.spike(self.encode(x))
        if not isinstance(train, SpikeTrain) or train.neuron is None:
            raise TypeError("`spike` must return the train of a spiking_layer, in which a network ends")
        return train.decode()

    def synchronize(self):
        """Let batch norm work over the batches of all processes."""
        for norm in self.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.__class__ = SynchronizedBatchNorm

    def compile_loops(self):
        """Run the dense engine's time loops through torch.compile. RuntimeError without loops or compiler."""
        if self.backward == "unrolled":
            raise RuntimeError("an unrolled network, as every ANN is, has no loops to compile")
        self._compiled = DenseEngine(compiled_loop(self._neuron.Vth.detach()))

    def engine_in_use(self, device):
        """-> (the engine that computes this network on the device, why it is not the event engine)."""
        if self._compiled is not None:
            return self._compiled, "compiled loops are dense"
        return choose_engine(self.engine, device.type, working_dtype(device, self._neuron.Vth.dtype))

    def encode(self, x):
        """Inputs that stay, (B, F) or (B, C, H, W), repeat T times; (B, T, ...) are one a step. -> train."""
        T, static = self.timesteps, x.dim() in (2, 4)
        if not static and (x.dim() not in (3, 5) or x.shape[1] != T):
            frames = f"event frames (B, {T}, F) or (B, {T}, C, H, W)"
            expected = f"vectors (B, F), images (B, C, H, W), or {frames}"
            raise ValueError(f"the network takes {expected}, not a tensor of shape {tuple(x.shape)}")
        x = x.to(getattr(self._neuron, "Vth", x).dtype)
        steps = x if static else x.transpose(0, 1).flatten(0, 1)
        if not self.collapsible(x):
            return SpikeTrain(steps.repeat(T, *[1] * (x.dim() - 1)) if static else steps, T)
        mean = x if static else x.mean(1)
        layout = torch.channels_last if steps.dim() == 4 else torch.contiguous_format
        engine, _ = self.engine_in_use(x.device)
        frames = Spikes(steps.contiguous(memory_format=layout))
        # of the representation only the shape counts: nobody asks for the gradient of the input here
        return SpikeTrain(frames, T, self.backward, engine, None, mean, mean, static)

    def collapsible(self, x):
        """Whether the backward pass need not unroll time; for the gradient of x, say, it must."""
        if self.backward == "unrolled" or torch.is_grad_enabled() and x.requires_grad:
            return False
        drops = [m for m in self.modules() if isinstance(m, DROPOUTS) and m.training and m.p]
        neurons = [m for m in self.modules() if isinstance(m, Neuron)] if torch.is_grad_enabled() else []
        reasons = ["dropout with a mask a time step"] * any(not getattr(d, "shared", False) for d in drops)
        reasons += ["neurons of different leaks"] * (len(set(map(averaging, neurons))) > 1)
        reasons += ["an ANN"] * (not isinstance(self._neuron, Neuron))
        if reasons:
            warnings.warn(f"{' and '.join(reasons)}: the backward pass unrolls time", stacklevel=2)
        return not reasons

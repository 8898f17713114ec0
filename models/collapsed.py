"""A spiking layer whose backward pass does not unroll time: exact, and it keeps no tensor of T steps.

Two facts make it possible. The DSR gradient that a neuron layer passes down is the same for every step, and
all that it needs from above is a (weighted) mean over time; between two neuron layers stand only linear maps
and batch norms. So gradients travel as tensors (B, ...), and what a weight needs of the T steps is one tensor
of its own shape, which the forward pass computes. The layer, with k counting its branches:

    y_t = sum_k L_k(s^k_t);    x_t = gamma*yhat_t + beta,  yhat_t = (y_t - mu)/sigma;    o_t = neuron(x_t)

With g the gradient at every o_t, G = gain*g where the clamp passes the representation of x, else 0,
a = gamma/sigma, and m1, m2 the means of G and of G*mean_t(yhat) over batch and space, batch norm gives

    dL/dy_t = A + c*y_t    with c = -a*m2/sigma,  A = a*G + d,  d = a*(m2*mu/sigma - m1)

a constant plus a multiple of a sequence that the forward pass knew. With corr(s, y) the gradient of a linear
map's weight for input s and output gradient y, and m^k the time mean of s^k, it follows that

    dL/dW_k = T*corr(m^k, A) + c*Q_k,    Q_k = sum_t corr(s^k_t, y_t)

and the layer below receives L_k^T(A + c*repr(y)), if its repr() has the same weights. Eval-mode batch norm:
m1 = m2 = 0. Without Q this is an approximation: dL/dW_k = T*corr(m^k, A + c*mean_t(y)), the rate-based one.

A batch norm inside a branch (ImageNet's `downsample`), y_t = ... + gamma_d*yhat^d_t + beta_d with
y^d_t = L_d(s_t), makes the branch a linear map of the weight a_d*W_d, a_d = gamma_d/sigma_d: so the forward
pass folds it. Backward, it turns A + c*y_t into a constant plus multiples of two sequences,

    dL/dy^d_t = A_d + a_d*c*y_t + c_d*y^d_t    with c_d = -a_d*m2_d/sigma_d,
                                                    A_d = a_d*(A + m2_d*mu_d/sigma_d - m1_d)

m1_d and m2_d are the means of A + c*y_t and of (A + c*y_t)*yhat^d_t over time, batch and space. The latter
needs sum_t y_t*y^d_t, per channel: that is the inner product of W_d and Q.

Who computes y_t, its statistics, Q and the spikes is the engine's affair (`models.engines`).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from models.engines.interface import Branch, affine, calls
from models.functional import Clamp, along_channels, per_channel, without_autocast, working_dtype
from models.neurons import check_collapsed
from models.records import BranchRecord, InnerRecord, PerBranch, Record, per_branch, stow, unstow
from models.synchronized import means, normalization


@dataclass
class Layer:
    """A spiking layer to be run once: its parts, how, and, after the forward pass, its `spikes`."""

    branches: list  # of (linear map, batch norm of its own or None, spike train)
    bn: nn.Module | None
    neuron: nn.Module
    first: object  # the first branch's train: engine, backward and static are the same in all
    dtype: torch.dtype  # of spikes as tensors, and of the convolutions that take them
    needed: bool  # will there be a backward pass
    spikes: object = None


def collapsed_layer(branches, bn, neuron):
    """-> the spikes of the engine, and under autograd their time mean and representation, (B, ...).

    Under autocast the spikes, and the convolutions that take them, are of its type; all else stays.
    """
    check_collapsed(neuron, [train for _, train in branches])
    neuron.project_threshold()
    first = branches[0][1]
    branches = [(*split(linear, train), train) for linear, train in branches]
    dtype = working_dtype(neuron.Vth.device, neuron.Vth.dtype)
    layer = Layer(branches, bn, neuron, first, dtype, needed=torch.is_grad_enabled())
    with without_autocast(neuron.Vth.device):  # also for weights that are computed, as parametrizations do
        flat = []
        for linear, inner, train in branches:
            flat += [train.representation, *affine(linear), *affine(inner)]
        mean, representation = CollapsedLayer.apply(layer, neuron.Vth, *affine(bn), *flat)
    return layer.spikes, mean, representation


class CollapsedLayer(torch.autograd.Function):
    """The algebra above, with its names; the index d belongs to the batch norm inside a branch."""

    @staticmethod
    def forward(ctx, layer, Vth, gamma, beta, *inputs):
        inputs, needs = per_branch(inputs), per_branch(ctx.needs_input_grad[4:])
        neuron, engine = layer.neuron, layer.first.engine
        frozen = layer.bn is None or not layer.bn.training
        inner = [inner_norm(layer, *branch) for branch in zip(layer.branches, inputs, needs)]
        folded = [
            Branch(linear, *fold(x, own and own.norm), train)
            for (linear, _, train), x, own in zip(layer.branches, inputs, inner)
        ]
        currents = engine.currents(folded, neuron, layer.dtype)
        wanted = [
            not frozen and (own is not None or wants_Q(layer, branch.linear, need))
            for branch, own, need in zip(folded, inner, needs)
        ]
        seen = None if frozen else currents.observe(wanted if layer.needed else [False] * len(wanted))
        norm = normalization(layer.bn, seen, gamma, beta, outputs(folded[0]), like=Vth)
        layer.spikes, moments = currents.fire(norm.a, norm.shift, layer.needed)
        neuron.report_spikes(layer.spikes)
        if not layer.needed:
            return None, None
        ceiling = neuron.ceiling.detach().clone()
        clamp = Clamp(moments.y_repr, norm.a, norm.shift, ceiling, neuron.closed, neuron.gain)
        record = Record(norm, clamp, moments.y_mean)
        Qs = seen.Qs if seen else [None] * len(folded)
        for branch, x, own, Q, need in zip(folded, inputs, inner, Qs, needs):
            if own is not None and Q is not None:
                own.cross = cross_sum(x, engine.unpacked(Q, x.weight.shape), moments.y_mean, neuron.timesteps)
                Q = Q if wants_Q(layer, branch.linear, need) else None
            record.branches.append(BranchRecord(branch.linear, x.weight, branch.train.mean, Q, own))
        ctx.engine, ctx.T = engine, neuron.timesteps  # settings as they are now
        ctx.Vth_gain = neuron.Vth_gain if ctx.needs_input_grad[1] else None
        stow(ctx, record)
        ctx.mark_non_differentiable(moments.mean)
        ctx.set_materialize_grads(False)
        return moments.mean, moments.representation

    @staticmethod
    @once_differentiable
    def backward(ctx, _mean, g):
        record, engine, T = unstow(ctx), ctx.engine, ctx.T
        norm, n = record.norm, g.numel() // g.shape[1]
        clamped = engine.clamped(record.clamp, g)  # S1, S2: per channel, sums of G and of G*(mean_t(y) - mu)
        S1, S2, above = clamped.sums(record.y_mean, norm.mu)
        S2 = S2 / norm.sigma
        m1, m2 = means(S1, S2, n, norm)
        c, d = -norm.a * m2 / norm.sigma, norm.a * (m2 * norm.mu / norm.sigma - m1)
        layer = LayerGradient(engine, record, clamped, c, d, T, S1)
        grads = []
        for branch, need in zip(record.branches, per_branch(ctx.needs_input_grad[4:])):
            own = branch.inner is not None
            grads += behind_inner_norm(layer, branch, need) if own else layer.of_branch(branch, need)
        grad_Vth = None if ctx.Vth_gain is None else ctx.Vth_gain * above
        gamma, beta = ctx.needs_input_grad[2:4]
        return None, grad_Vth, T * S2 if gamma else None, T * S1 if beta else None, *grads


@dataclass
class LayerGradient:
    """dL/dy_t = A + c*y_t with A = a*G + d."""

    engine: object
    record: Record
    clamped: object  # by which the engine knows G
    c: torch.Tensor
    d: torch.Tensor
    T: int
    S1: torch.Tensor  # per channel, the sum of G

    @cached_property
    def sum(self):
        """Of dL/dy_t over time, batch and space, per channel."""
        norm, y_mean = self.record.norm, self.record.y_mean
        n = y_mean.numel() // y_mean.shape[1]
        return self.T * (norm.a * self.S1 + n * (self.d + self.c * norm.local_mean))  # of this process

    def at(self, sequence, times=1):
        """times * (A + c*sequence), (B, ...); times * A without a sequence."""
        a, d, c = (v if times == 1 else times * v for v in (self.record.norm.a, self.d, self.c))
        return self.clamped.parts(a, d, c, sequence, 1)[sequence is not None]

    @cached_property
    def parts(self):
        """T*A, for a weight with a Q, and A + c*repr(y), which the layer below receives by its map."""
        return self.clamped.parts(self.record.norm.a, self.d, self.c, self.record.clamp.r, self.T)

    def of_branch(self, branch, need):
        """The gradients of a branch without a batch norm of its own."""
        grads, linear = {}, branch.linear
        if need.representation:
            grads["representation"] = self.engine.transpose(linear, branch.weight, self.parts[1], branch.mean)
        if need.weight:
            constant = self.parts[0] if branch.Q is not None else self.at(self.record.y_mean, times=self.T)
            Qs = [] if branch.Q is None else [(self.c, branch.Q)]
            grads["weight"] = self.engine.weight_gradient(linear, branch.weight, branch.mean, constant, Qs)
        if need.bias:
            grads["bias"] = self.sum
        return PerBranch(**grads)


def behind_inner_norm(layer, branch, need):
    """The gradients of a branch with a batch norm of its own: dL/dy^d_t = A_d + a_d*c*y_t + c_d*y^d_t."""
    own, norm, engine, T, c = branch.inner, branch.inner.norm, layer.engine, layer.T, layer.c
    y_mean, y_repr = layer.record.y_mean, layer.record.clamp.r
    A, n = layer.at(None), y_mean.numel() // y_mean.shape[1]
    S1 = layer.sum
    # the sum of (A + c*y_t)*(y^d_t - mu_d): the part of A, then that of c*y_t
    S2 = per_channel(A * (own.y_mean - along_channels(norm.mu, A)))
    S2 = (T * S2 + c * (own.cross - T * norm.mu * per_channel(y_mean))) / norm.sigma
    m1, m2 = means(S1, S2, T * n, norm)
    A_d = along_channels(norm.a, A) * A + along_channels(norm.a * (m2 * norm.mu / norm.sigma - m1), A)
    c_y, c_d = norm.a * c, -norm.a * m2 / norm.sigma

    def at(y, y_d):
        return A_d + along_channels(c_y, A) * y + along_channels(c_d, A) * y_d

    grads = {"gamma": S2 if need.gamma else None, "beta": S1 if need.beta else None}
    if need.representation:
        grad = at(y_repr, own.y_repr)
        grads["representation"] = engine.transpose(branch.linear, branch.weight, grad, branch.mean)
    if need.weight:
        y = 0 if branch.Q is not None else y_mean
        y_d = 0 if own.Q is not None else own.y_mean
        Qs = [(c, Q) for c, Q in ((c_y, branch.Q), (c_d, own.Q)) if Q is not None]
        constant, linear = T * at(y, y_d), branch.linear
        grads["weight"] = engine.weight_gradient(linear, branch.weight, branch.mean, constant, Qs)
    if need.bias:
        grads["bias"] = T * per_channel(at(y_mean, own.y_mean))
    return PerBranch(**grads)


def inner_norm(layer, branch, x, need):
    """Let the batch norm inside a branch see the branch's own currents. -> InnerRecord, None without one."""
    linear, inner, train = branch
    if inner is None:
        return None
    seen = None
    if inner.training:
        own = Branch(linear, x.weight, x.bias, train)
        currents = layer.first.engine.currents([own], layer.neuron, layer.dtype)
        seen = currents.observe([layer.needed and wants_Q(layer, linear, need)])
    norm = normalization(inner, seen, x.gamma, x.beta, len(x.weight), like=layer.neuron.Vth)
    if not layer.needed:
        return InnerRecord(norm, None, None, None, None)
    apply = nn.functional.linear if isinstance(linear, nn.Linear) else linear._conv_forward
    y_mean, y_repr = (apply(m, x.weight, x.bias) for m in (train.mean, train.representation))
    cross = torch.zeros_like(norm.mu)  # matters only where c is not 0, and is computed there
    return InnerRecord(norm, y_mean, y_repr, cross, seen and seen.Qs[0])


def outputs(branch):
    """Channels of its currents."""
    return branch.train.spikes.shape[1] if branch.weight is None else len(branch.weight)


def wants_Q(layer, linear, need):
    """Whether the weight's gradient takes Q of a batch norm that trains; what stays the same needs none."""
    rate_only = layer.first.backward == "rate" and isinstance(linear, nn.Conv2d)
    return need.weight and not layer.first.static and not rate_only


def cross_sum(x, Q, y_mean, T):
    """sum over time, batch and space of y*y^d per channel, y^d = W_d*s + b_d: the product of W_d and Q."""
    cross = (x.weight * Q).flatten(1).sum(1)
    return cross if x.bias is None else cross + x.bias * T * per_channel(y_mean)


def fold(x, norm):
    """A branch's weight and bias with the batch norm behind it folded in."""
    if norm is None:
        return x.weight, x.bias
    weight = norm.a.view(-1, *[1] * (x.weight.dim() - 1)) * x.weight
    return weight, norm.shift if x.bias is None else norm.a * x.bias + norm.shift


def split(linear, train):
    """A branch's map as (linear map, its own batch norm or None).

    TypeError for a map of another kind, ValueError for a train of a shape that it does not take.
    """
    linear, inner = linear if calls(linear, nn.Sequential) and len(linear) == 2 else (linear, None)
    known = calls(linear, nn.Conv2d, nn.Linear, *[nn.Identity] * (inner is None))
    by_zeros = getattr(linear, "padding_mode", "zeros") == "zeros"
    if not (known and by_zeros) or isinstance(getattr(linear, "padding", 0), str):
        allowed = "Conv2d padded by a number of zeros or Linear, alone or before a batch norm, or Identity"
        allowed += ", with torch's own forward pass and no hook before it"
        raise TypeError(f'no collapsed layer for {linear}: {allowed}; else backward = "unrolled"')
    if inner is not None and train.static:
        raise ValueError("a branch on the image itself cannot have a batch norm of its own")
    dims = (4,) if isinstance(linear, nn.Conv2d) else (2,) if isinstance(linear, nn.Linear) else (2, 4)
    if len(train.spikes.shape) not in dims:
        taken = " or ".join({2: "(T*B, C)", 4: "(T*B, C, H, W)"}[n] for n in dims)
        raise ValueError(f"a collapsed layer's {linear} takes {taken}, not {tuple(train.spikes.shape)}")
    return linear, inner

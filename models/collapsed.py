"""A spiking layer whose backward pass does not unroll time: exact, and it keeps no tensor of T steps.

Two facts make it possible. The DSR gradient that a neuron layer passes down is the same for every step, and
all that it needs from above is a (weighted) mean over time; between two neuron layers stand only linear maps
and batch norms. So gradients travel as tensors (B, ...), and what a weight needs of the T steps is one tensor
of its own shape, which the forward pass computes. The layer, with k counting its branches:

    y_t = sum_k L_k(s^k_t);    z_t = gamma*yhat_t + beta,  yhat_t = (y_t - mu)/sigma;    o_t = neuron(z_t)

With g the gradient at every o_t, G = gain*g where the clamp passes the representation of z, else 0,
a = gamma/sigma, and m1, m2 the means of G and of G*mean_t(yhat) over batch and space, batch norm gives

    dL/dy_t = a*(G - m1 - m2*yhat_t) = A + c*y_t    with c = -a*m2/sigma, A = a*(G - m1 + m2*mu/sigma)

a constant plus a multiple of a sequence that the forward pass knew. With corr(s, y) the gradient of a linear
map's weight for input s and output gradient y, and m^k the time mean of s^k, it follows that

    dL/dW_k = T*corr(m^k, A) + c*Q_k,    Q_k = sum_t corr(s^k_t, y_t)

and the layer below receives L_k^T(A + c*repr(y)). A batch norm inside a branch (ImageNet's `downsample`) adds
a term of its own sequence to A + c*y_t. Eval-mode batch norm: m1 = m2 = 0. Without Q this is an
approximation: dL/dW_k = T*corr(m^k, A + c*mean_t(y)), the rate-based gradient.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from models.synchronized import SynchronizedBatchNorm, total, track


def collapsed_layer(branches, bn, neuron, rate_only):
    """-> spikes of 0 and 1, (T*B, ...), and under autograd their time mean and representation, (B, ...).

    Under autocast the spikes, and the convolutions that take them, are of its type; all else stays.
    """
    neuron.project_threshold()
    branches = [(*split(linear), train) for linear, train in branches]
    inputs = []
    for linear, inner, train in branches:
        if inner is not None and train.static:
            raise ValueError("a branch on the image itself cannot have a batch norm of its own")
        inputs += [train.representation, *affine(linear), *affine(inner)]
    device, dtype = neuron.Vth.device.type, neuron.Vth.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        settings = branches, bn, neuron, rate_only, dtype, torch.is_grad_enabled()
        return CollapsedLayer.apply(*settings, neuron.Vth, *affine(bn), *inputs)


class CollapsedLayer(torch.autograd.Function):
    """The algebra above, with its names; `inner` and the index d belong to the batch norm of a branch."""

    @staticmethod
    def forward(ctx, branches, bn, neuron, rate_only, dtype, needed, Vth, gamma, beta, *inputs):
        static = branches[0][-1].static
        y, own = None, []
        for linear, inner, train in branches:
            if inner is None:
                y = charge(y, linear, train)
                own.append(None)
            else:
                y_d = charge(None, linear, train).to(Vth.dtype)
                mu_d, sigma_d = statistics(y_d, inner)
                scale_d, shift_d = scale_and_shift(mu_d, sigma_d, *affine(inner))
                own.append((y_d, scale_d, mu_d, sigma_d))
                u = torch.addcmul(shift_d, y_d, scale_d)
                y = u if y is None else y.add_(u)
        mu, sigma = statistics(y, bn, copies=neuron.timesteps if static else 1)
        scale, shift = scale_and_shift(mu, sigma, gamma, beta)
        ctx.neuron, ctx.frozen, ctx.branches = neuron, bn is None or not bn.training, []
        ctx.bn, ctx.affine = bn, gamma is not None
        of_branches = []
        for k, ((linear, inner, train), sequence) in enumerate(zip(branches, own) if needed else ()):
            exact = not static and not (rate_only and isinstance(linear, nn.Conv2d))
            exact = exact and ctx.needs_input_grad[10 + 5 * k]
            Q = corr_T(linear, train, y) if exact and not ctx.frozen else None
            of_branches += [affine(linear)[0], train.mean, train.amplitude, Q]
            if inner is not None:
                y_d, *normalization = sequence
                Q_d = corr_T(linear, train, y_d) if exact and inner.training else None
                of_branches += [*normalization, *neuron.moments(y_d), Q_d, per_channel(y * y_d)]
            ctx.branches.append((linear, inner, inner is not None and not inner.training))
        spikes, moments = neuron.simulate(y, static, scale, shift, dtype, needed)  # perhaps in y's place
        if not needed:
            return spikes, None, None
        y_mean, y_repr, mean, representation = moments
        zones = neuron.clamp_zones(torch.addcmul(shift, y_repr, scale))
        ctx.save_for_backward(scale, mu, sigma, y_mean, y_repr, *zones, *of_branches)
        ctx.mark_non_differentiable(spikes, mean)
        ctx.set_materialize_grads(False)  # they would be zeros of the size of the spikes
        return spikes, mean, representation

    @staticmethod
    @once_differentiable
    def backward(ctx, _spikes, _mean, g):
        neuron, T, saved = ctx.neuron, ctx.neuron.timesteps, iter(ctx.saved_tensors)
        a, mu, sigma, y_mean, y_repr, inside, above = (next(saved) for _ in range(7))
        grad_Vth = neuron.Vth_gain * (g * above).sum() if ctx.needs_input_grad[6] else None
        G = g * inside * neuron.gain
        n = G.numel() // G.shape[1]
        S1, S2 = per_channel(G), per_channel(G * (y_mean - mu) / sigma)
        m1, m2 = means(S1, S2, n, ctx.bn, ctx.frozen)
        A, c = a * (G - m1 + m2 * mu / sigma), -a * m2 / sigma
        grads = []
        for k, (linear, inner, frozen_d) in enumerate(ctx.branches):
            weight, mean, amplitude, Q = (next(saved) for _ in range(4))
            # The gradient at step t is A_k + sum_j c_j*x^j_t; `terms` holds c_j and x^j's mean, repr and Q.
            A_k, terms, grad_inner = A, [(c, y_mean, y_repr, Q)], (None, None)
            if inner is not None:
                a_d, mu_d, sigma_d, d_mean, d_repr, Q_d, cross = (next(saved) for _ in range(7))
                S1_d = T * per_channel(A + c * y_mean)
                S2_d = T * per_channel(A * (d_mean - mu_d)) + c * (cross - T * mu_d * per_channel(y_mean))
                S2_d = S2_d / sigma_d
                m1_d, m2_d = means(S1_d, S2_d, T * n, inner, frozen_d)
                A_k = a_d * (A - m1_d + m2_d * mu_d / sigma_d)
                terms = [(a_d * c, y_mean, y_repr, Q), (-a_d * m2_d / sigma_d, d_mean, d_repr, Q_d)]
                if inner.affine:
                    grad_inner = S2_d.flatten(), S1_d.flatten()
            grad_repr = grad_weight = grad_bias = None
            if ctx.needs_input_grad[9 + 5 * k]:
                grad_repr = transpose(linear, weight, A_k + sum(c_j * x for c_j, _, x, _ in terms), mean)
            if ctx.needs_input_grad[10 + 5 * k]:
                constant = A_k + sum(c_j * x for c_j, x, _, Q_j in terms if Q_j is None)
                grad_weight = corr(linear, weight, mean, T * constant)
                for c_j, Q_j in [(c_j, Q_j) for c_j, _, _, Q_j in terms if Q_j is not None]:
                    c_j = c_j if amplitude is None else amplitude * c_j
                    grad_weight.addcmul_(c_j.view(-1, *[1] * (Q_j.dim() - 1)), Q_j)
            if ctx.needs_input_grad[11 + 5 * k]:
                grad_bias = T * per_channel(A_k + sum(c_j * x for c_j, x, _, _ in terms)).flatten()
            grads += [grad_repr, grad_weight, grad_bias, *grad_inner]
        grad_affine = (T * S2.flatten(), T * S1.flatten()) if ctx.affine else (None, None)
        return None, None, None, None, None, None, grad_Vth, *grad_affine, *grads


def split(linear):
    """A branch's map as (linear map, its own batch norm or None). TypeError for a map of another kind."""
    linear, inner = linear if isinstance(linear, nn.Sequential) else (linear, None)
    known = isinstance(linear, (nn.Conv2d, nn.Linear, nn.Identity))
    by_zeros = getattr(linear, "padding_mode", "zeros") == "zeros"
    if not (known and by_zeros) or isinstance(getattr(linear, "padding", 0), str):
        allowed = "Conv2d padded by a number of zeros, Linear or Identity"
        raise TypeError(f"no collapsed layer for {linear}: {allowed}; else `map`")
    return linear, inner


def affine(module):
    return getattr(module, "weight", None), getattr(module, "bias", None)


def charge(y, linear, train):
    """y + L(s), in y's place; a convolution runs in the precision of the spikes. y may be None."""
    spikes, amplitude = train.spikes, train.amplitude
    weight, bias = affine(linear)
    if weight is None:  # the identity
        if y is None:
            return train.values() if amplitude is not None else spikes.clone()
        return y.add_(spikes) if amplitude is None else y.addcmul_(spikes, amplitude)
    if amplitude is not None:
        weight = weight * amplitude  # in place of the spikes, which stay 0 and 1
    if isinstance(linear, nn.Linear):
        current = F.linear(spikes.to(weight.dtype), weight, bias)
    else:
        bias = None if bias is None else bias.to(spikes.dtype)
        geometry = linear.stride, linear.padding, linear.dilation, linear.groups
        current = F.conv2d(spikes, weight.to(spikes.dtype), bias, *geometry)
    return current if y is None else y.add_(current)


def corr_T(linear, train, y):
    """sum_t corr(s_t, y_t): Q, but for the amplitude of the spikes."""
    dtype = train.spikes.dtype if isinstance(linear, nn.Conv2d) else linear.weight.dtype
    like = torch.empty_like(linear.weight, dtype=dtype)  # only its shape counts
    return corr(linear, like, train.spikes.to(dtype), y.to(dtype)).to(linear.weight.dtype)


def corr(linear, weight, x, grad):
    """The gradient of the weight for input x and output gradient `grad`."""
    if isinstance(linear, nn.Linear):
        return grad.t() @ x
    stride = linear.stride
    if linear.kernel_size == (1, 1) and linear.padding == (0, 0):
        # Only these pixels count. Given all of less than 8 channels, oneDNN on AVX2 corrupts the memory.
        x, stride = x[..., :: stride[0], :: stride[1]], (1, 1)
    if prefers_patches(linear, x):
        return corr_of_patches(linear, x, grad, stride)
    return conv_backward(linear, weight, x, grad, [False, True, False], stride)[1]


def prefers_patches(conv, x):
    """With AVX2 and no AVX-512, products of matrices beat oneDNN's kernel, unless they are small."""
    plain = conv.groups == 1 and conv.dilation == (1, 1) and x.dtype.itemsize >= 4
    if not plain or conv.weight.numel() < 2**15 or x.device.type != "cpu":
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def corr_of_patches(conv, x, grad, stride):
    """`corr` of a convolution as a product of matrices, some images at a time."""
    (height, width), (above, left) = conv.kernel_size, conv.padding
    Q = x.new_zeros(height * width * x.shape[1], grad.shape[1])
    some = max(1, 2**21 // (len(Q) * grad[0, 0].numel()))  # patches of 8 MB, which a cache may hold
    for images, grads in zip(x.split(some), grad.split(some)):
        padded = F.pad(images.movedim(1, -1), (0, 0, left, left, above, above))
        patches = padded.unfold(1, height, stride[0]).unfold(2, width, stride[1]).movedim(3, -1)
        Q.addmm_(patches.reshape(-1, len(Q)).t(), grads.movedim(1, -1).reshape(-1, grad.shape[1]))
    return Q.view(height, width, x.shape[1], -1).permute(3, 2, 0, 1)


def transpose(linear, weight, grad, like):
    """L^T(grad): the gradient of the input, whose shape is that of `like`."""
    if weight is None:
        return grad
    if isinstance(linear, nn.Linear):
        return grad @ weight
    return conv_backward(linear, weight, like, grad, [True, False, False], linear.stride)[0]


def conv_backward(conv, weight, x, grad, mask, stride):
    geometry = stride, conv.padding, conv.dilation, False, [0, 0], conv.groups
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, mask)


def per_channel(x):
    """Sum over all but the channels, shaped to be broadcast against x."""
    return x.sum([0, *range(2, x.dim())]).view(-1, *[1] * (x.dim() - 2))


def means(S1, S2, n, bn, frozen):
    """The sums over n elements as means, over all processes if synchronized; 0 for a frozen batch norm."""
    if frozen:
        return 0 * S1, 0 * S2
    if not isinstance(bn, SynchronizedBatchNorm):
        return S1 / n, S2 / n
    S1, S2, n = total(torch.stack([S1, S2, torch.full_like(S1, n)]))
    return S1 / n, S2 / n


def statistics(y, bn, copies=1):
    """Mean and standard deviation over time, batch and space, per channel; keeps the running statistics.

    `copies`: how many time steps the one given stands for (a static image's).
    """
    if bn is None:
        dtype = y.dtype if y.dtype.itemsize >= 4 else torch.float32
        return y.new_zeros((), dtype=dtype), y.new_ones((), dtype=dtype)
    if bn.running_mean is None or bn.momentum is None:
        raise ValueError(f"no collapsed layer with {bn}: it needs running statistics and a momentum")
    mu, var = bn.running_mean, bn.running_var
    if bn.training:
        # Its own update would count a static image once; the clones give the statistics their precision.
        mu, var = torch.batch_norm_update_stats(y, mu.clone(), var.clone(), 0.0)
        n = copies * y.numel() // y.shape[1]
        if n == 1:
            raise ValueError("batch norm cannot train on one value per channel")
        if isinstance(bn, SynchronizedBatchNorm):
            mu, var, n = bn.combine(mu, var, n)
        track(bn, mu, var, n)
    shape = -1, *[1] * (y.dim() - 2)
    return mu.view(shape), (var + bn.eps).sqrt().view(shape)


def scale_and_shift(mu, sigma, gamma, beta):
    """A batch norm as one multiplication and one addition: z = scale*y + shift."""
    scale = 1 / sigma if gamma is None else gamma.view(sigma.shape) / sigma
    return scale, -mu * scale if beta is None else beta.view(mu.shape) - mu * scale

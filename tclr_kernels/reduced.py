"""Losses that are a sum of the terms of `symmetric.py`: a small one takes one call of a backend.

The kernels of a small loss take less time than Python and autograd around them. A backend may therefore have two more
functions, whose results have the same bits as those of `composed`:

    reduced(inputs, tau, normalize, cross, one_sided, factor, count, gradient) -> (loss, kept)
    reduced_backward(inputs, tau, normalize, cross, one_sided, factor, count, kept, upstream) -> gradients

kept: if `gradient`, the tensors from which `reduced_backward` computes the gradients of upstream times the loss: of
every input and, if tau is a tensor, the sum of <z, dz> over all rows. They may be the gradients for an upstream of 1,
which are then multiplied. This is exact for a power of two, and takes one more rounding than `composed` otherwise.
torch.compile, the transforms of torch.func, forward mode and tensor subclasses get `composed`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, checks
from .symmetric import SUMMED_AT_ONCE, Eager, Once, _transforms_active, blocks, ordered_sum, total, wants_gradient

LARGEST = 1 << 21  # on the CPU: rows times (columns + features); the gradient then takes about a millisecond

Settings = tuple[bool, bool, bool, float, int]


def reduced(
    inputs: Sequence[Tensor],
    tau: float | Tensor,
    backend: str | None,
    normalize: bool,
    cross: bool,
    *,
    one_sided: bool = False,
    factor: float = 1.0,
    count: int = 1,
) -> Tensor:
    """The sum of the operation's terms, times factor / count.

    inputs: the sets, [..., N, D] each, or all of them as one tensor [V, N, D].
    one_sided: only the terms of the first set's rows against the second set.
    """
    settings = normalize, cross, one_sided, factor, count
    z = inputs[0]
    leading, (N, D) = z.shape[:-2], z.shape[-2:]
    V, rows = len(inputs), leading.numel() * N
    if V == 1:  # views
        V, rows = leading[0], N
    name = backends.choose(backend, z.device, V * rows, D, z.dtype, normalize)
    small = len(leading) < 2 and V * V * rows <= SUMMED_AT_ONCE and (z.is_cuda or V * rows * (V * N + D) <= LARGEST)
    if not small or not hasattr(backends.BACKENDS[name], "reduced") or must_be_composed(inputs):
        return composed(name, settings, tau, *inputs)
    if wants_gradient(tau, *inputs):
        return _apply(name, settings, tau, *inputs)
    return backends.BACKENDS[name].reduced(inputs, tau, *settings, False)[0]


def composed(name: str, settings: Settings, tau: float | Tensor, *inputs: Tensor) -> Tensor:
    """The same loss by `blocks` or `total` and a sum, which defines it."""
    normalize, cross, one_sided, factor, count = settings
    how = dict(normalize=normalize, cross=cross, backend=name)
    if len(inputs) == 1:
        sets = [inputs[0].unsqueeze(1)]
    else:
        sets = [z if z.dim() == 3 else z.reshape(-1, *z.shape[-2:]) for z in inputs]
    if not one_sided:
        return total(sets, tau, count * round(1 / factor), **how)
    return ordered_sum(blocks(sets, tau, **how)[0][:, 0, 1]) * factor / count


def must_be_composed(inputs: Sequence[Tensor]) -> bool:
    """Whether the compiler, a transform or a tensor subclass must see the single operations."""
    if torch.compiler.is_compiling() or _transforms_active() or forward_ad._current_level >= 0:
        return True
    return any(type(z) not in checks.PLAIN for z in inputs)


class Reduced(Eager, torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, settings: Settings, tau: float | Tensor, *inputs: Tensor) -> Tensor:
        loss, kept = backends.BACKENDS[name].reduced(inputs, tau, *settings, True)
        ctx.name, ctx.settings = name, settings
        ctx.tau = None if isinstance(tau, torch.Tensor) else tau
        ctx.save_for_backward(tau if ctx.tau is None else None, *inputs, *kept)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        tau, *saved = ctx.saved_tensors
        tau = tau if ctx.tau is None else ctx.tau
        call = ReducedBackward.apply if torch.is_grad_enabled() else ReducedBackward.forward
        results = call(ctx.name, ctx.settings, ctx.needs_input_grad[2:], tau, upstream, *saved)
        return None, None, *results


_apply = super(torch.autograd.Function, Reduced).apply  # as Eager.apply does, which looks for transforms once more


class ReducedBackward(Once, torch.autograd.Function):
    @staticmethod
    def forward(
        name: str, settings: Settings, needed: Sequence[bool], tau: float | Tensor, upstream: Tensor, *saved: Tensor
    ) -> tuple[Tensor | None, ...]:
        n = len(needed) - 1
        inputs, kept = saved[:n], saved[n:]
        gradients = backends.BACKENDS[name].reduced_backward(inputs, tau, *settings, kept, upstream)
        d_tau = (gradients[n] / (-2 * tau)).to(tau) if needed[0] else None
        return d_tau, *[d if need else None for d, need in zip(gradients, needed[1:], strict=False)]

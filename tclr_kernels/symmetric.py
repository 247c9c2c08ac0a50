"""The operation below every loss, and its gradient: all rows against all rows.

There are G independent groups of V sets of N rows each, with similarities S[(a,i),(c,j)] = sim(z_(a,i), z_(c,j)). In
every block (a, c), the candidates of anchor i are all j != i:

    neg[g,a,c,i]  = log sum_{j != i} exp S[(a,i),(c,j)]
    pos[g,a,c,i]  = S[(a,i),(c,i)],  c != a
    term[g,a,c,i] = log(1 + (exp neg[g,a,a,i] + exp neg[g,a,c,i]) / exp pos[g,a,c,i]),  c != a

(without the first exponential if only cross blocks exist). The gradient of a row, as an anchor and as a candidate:

    W[(a,i),(c,j)] = [j != i] g_neg[a,c,i] exp(S - neg[a,c,i]) + [j = i, c != a] g_pos[a,c,i]
    dz_(a,i) = 1/tau sum_(c,j) (W + W^T)[(a,i),(c,j)] z_(c,j)              dL/dtau = -<z, dz> / (2 tau)

A backend has two functions for this: `forward(sets, tau, normalize, cross) -> (term, neg, pos)` and `backward(sets,
tau, normalize, cross, neg, pos, g_term, g_neg, g_pos) -> (dz of each set, <z, dz> of each row: [G, V, N])`. The
upstream gradient of an output that a loss does not use is None. If the backend says `DIVIDES = True`, both functions
take two more arguments. `count`: the first output is term / count, its gradient g_term may be one number for all of it,
and dz is one tensor [V, G, N, D]. `half`: as in `general.py`.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, checks

# Up to so many elements, ATen adds in one thread; the sums of the rows of a matrix take one thread for each row.
SUMMED_AT_ONCE = 32768
ORDERED = ["cuda"]  # types of devices whose sum always has the same order
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def blocks(
    sets: Sequence[Tensor],
    tau: float | Tensor,
    *,
    normalize: bool = True,
    cross: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compares every set of rows with every set, without storing their Gram matrix.

    sets: V tensors [G, N, D] of one dtype and device.
    tau: a float or a 0-d tensor.
    normalize: whether the similarity is the cosine or the plain dot product.
    cross: whether only the blocks between the first and the second half of the sets exist.
    Returns term, neg, pos: [G, V, V, N], float32 (float64 for float64 sets).
    """
    device, (G, N, D) = sets[0].device, sets[0].shape
    name = backends.choose(backend, device, G * len(sets) * N, D, sets[0].dtype, normalize)
    if name != "reference":
        if not torch.compiler.is_compiling():
            return EagerGram.apply(name, tau, normalize, cross, None, False, *sets)
        return traced(Gram, name, tau, normalize, cross, None, False, *sets)
    with torch.autocast(checks.autocast_type(device), enabled=False):
        return backends.reference.gram(sets, tau, normalize, cross)


def total(
    inputs: Sequence[Tensor],
    tau: float | Tensor,
    count: int,
    *,
    normalize: bool,
    cross: bool,
    backend: str | None,
    half: bool = False,
) -> Tensor:
    """The sum of all terms of `blocks`, divided by count.

    inputs: sets [G, N, D], or stacks of sets [..., G, N, D].
    half: whether they were of half precision, so that products of that accuracy are enough; see `general.py`.
    """
    sets = _sets(inputs)
    G, N, D = sets[0].shape
    name = backends.choose(backend, sets[0].device, G * len(sets) * N, D, sets[0].dtype, normalize)
    if not getattr(backends.BACKENDS[name], "DIVIDES", False):
        return ordered_sum(blocks(sets, tau, normalize=normalize, cross=cross, backend=name)[0]) / count
    if not torch.compiler.is_compiling():
        return EagerGram.apply(name, tau, normalize, cross, count, half, *inputs)[0]
    return traced(Gram, name, tau, normalize, cross, count, half, *inputs)[0]


def divides(backend: str | None, like: Tensor, rows: int) -> bool:
    """Whether the backend that would be chosen has `DIVIDES = True`, so that `total` takes one call and one sum."""
    name = backends.choose(backend, like.device, rows, like.shape[-1], like.dtype)
    return getattr(backends.BACKENDS[name], "DIVIDES", False)


def _sets(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [z for x in inputs for z in (_sets(x.unbind(0)) if x.dim() > 3 else (x,))]


def wants_gradient(*inputs: object) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)


def traced(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """function.apply, or its forward alone where torch.compile would refuse it: if nothing requires a gradient."""
    if torch.compiler.is_compiling() and not wants_gradient(*arguments):
        return function.forward(*arguments)
    return function.apply(*arguments)


def ordered_sum(x: Tensor) -> Tensor:
    """The sum of all elements, in an order that does not depend on the number of threads."""
    x = x.flatten()
    while x.numel() > SUMMED_AT_ONCE and x.device.type not in ORDERED:
        x = F.pad(x, (0, -x.numel() % 4096)).view(-1, 4096).sum(1)
    return x.sum()


class Gram(torch.autograd.Function):
    @staticmethod
    def forward(
        name: str, tau: float | Tensor, normalize: bool, cross: bool, count: int | None, half: bool, *inputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """term, neg, pos of sets; or, with a count, the sum of all terms / count in the place of term."""
        call = backends.BACKENDS[name].forward
        if count is None:
            return call(inputs, tau, normalize, cross)
        term, neg, pos = call(_sets(inputs), tau, normalize, cross, count, half)
        return ordered_sum(term), neg, pos

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.name, tau, ctx.normalize, ctx.cross, ctx.count, ctx.half, *sets = inputs
        _, neg, pos = output
        if ctx.count is not None:
            ctx.mark_non_differentiable(neg, pos)
        ctx.tau = None if isinstance(tau, torch.Tensor) else tau
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(tau if ctx.tau is None else None, neg, pos, *sets)

    @staticmethod
    def backward(
        ctx: Any, g_term: Tensor | None, g_neg: Tensor | None, g_pos: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        tau, neg, pos, *sets = ctx.saved_tensors
        tau = tau if ctx.tau is None else ctx.tau
        settings = ctx.name, ctx.normalize, ctx.cross, ctx.count, ctx.half, ctx.needs_input_grad[1]
        call = GramBackward.apply if torch.is_grad_enabled() else GramBackward.forward
        d_tau, *d_sets = call(*settings, tau, neg, pos, g_term, g_neg, g_pos, *sets)
        d_sets = [d if needed else None for d, needed in zip(d_sets, ctx.needs_input_grad[6:], strict=True)]
        return None, d_tau, None, None, None, None, *d_sets


class Eager:
    """Mixin for eager mode: a faster `apply`, and errors for vmap and forward mode that say what to use instead.

    The first argument of the functions is the name of the backend.
    """

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        if _transforms_active():
            return super().apply(*arguments)
        # skips Function.apply, which inspects forward's signature at every call: that takes longer than a small loss
        return super(torch.autograd.Function, cls).apply(*arguments)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        raise _only_reference("forward mode differentiation", ctx.name)

    @staticmethod
    def vmap(info: Any, in_dims: Any, name: str, *_: Any) -> NoReturn:
        raise _only_reference("vmap", name)


class Once:
    """Mixin for the function that computes a gradient: a second derivative is an error, instead of a silent zero."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise _only_reference("a second derivative", ctx.name)

    @staticmethod
    def vmap(info: Any, in_dims: Any, name: str, *_: Any) -> NoReturn:
        raise _only_reference("vmap", name)


class EagerGram(Eager, Gram):
    """Gram for eager mode; torch.compile cannot trace a function with the methods of `Eager`."""


def cast_together(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors, which have one dtype, in another. On a GPU, contiguous ones share a kernel."""
    made = [torch.empty_like(x, dtype=dtype) for x in tensors]
    torch._foreach_copy_(made, tensors)
    return made


class Widened(Eager, torch.autograd.Function):
    """Inputs of half precision in float32: one kernel converts all of them, and one all of their gradients."""

    @staticmethod
    def forward(name: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(cast_together(inputs, torch.float32))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name, first, *_ = inputs
        ctx.dtype = first.dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [d for d in gradients if d is not None]
        if torch.is_grad_enabled():  # differentiable, so that a second derivative reaches `Once` and its error
            made = iter([d.to(ctx.dtype) for d in given])
        else:
            made = iter(cast_together(given, ctx.dtype))
        return None, *(d if d is None else next(made) for d in gradients)


def widened(backend: str | None, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The inputs, which have one dtype, in float32 if they are of half precision. backend: whose kernels take them"""
    if inputs[0].element_size() > 2:
        return inputs
    if backend == "reference" or torch.compiler.is_compiling():
        return tuple(x.float() for x in inputs)
    return Widened.apply(backend, *inputs)


class GramBackward(Once, torch.autograd.Function):
    @staticmethod
    def forward(
        name: str,
        normalize: bool,
        cross: bool,
        count: int | None,
        half: bool,
        tau_needs_grad: bool,
        tau: float | Tensor,
        neg: Tensor,
        pos: Tensor,
        g_term: Tensor | None,
        g_neg: Tensor | None,
        g_pos: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor | None, ...]:
        call, arguments = backends.BACKENDS[name].backward, (tau, normalize, cross, neg, pos, g_term, g_neg, g_pos)
        if count is None:
            d_sets, zdz = call(inputs, *arguments)
        else:
            dz, zdz = call(_sets(inputs), *arguments, count, half)
            parts = dz.split([x.shape[:-3].numel() for x in inputs])
            d_sets = [d.view(x.shape) for d, x in zip(parts, inputs, strict=True)]
        d_tau = (ordered_sum(zdz) / (-2 * tau)).to(tau) if tau_needs_grad else None
        return d_tau, *d_sets


def _only_reference(what: str, name: str) -> NotImplementedError:
    return NotImplementedError(
        f'{what} is not provided by backend {name!r}: use backend="reference", or set TCLR_KERNELS_BACKEND=reference'
    )

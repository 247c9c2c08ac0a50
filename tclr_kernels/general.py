"""The general operation below the losses: some rows against some columns, with labels.

There are G independent groups, each with A sets of n rows and C sets of K columns, and the similarities
S[(a,i),(c,j)] = sim(r_(a,i), z_(c,j)). A candidate (c,j) of the anchor (a,i)

- has the same index, if the rows are the columns first .. first + n and j = first + i;
- has the same key (label), if column_key_j = row_key_i >= 0;
- is the anchor itself, if it has the same index and c = a;
- is a positive, if it has the same key and is not the anchor itself.

    neg[g,a,c,i]     = log sum exp S over the candidates with neither the same index nor the same key
    pos[g,a,c,i]     = S of the candidate with the same index, c != a
    pos_lse[g,a,c,i] = log sum exp S over the P positives;                count = P
    spread[g,a,c,i]  = pos_lse - 1/P sum S over the positives;             0 where P = 0
    pairs[g,a,c,i]   = sum softplus(negatives[g,a,c,i] - S) over the positives

The gradient, where g_* are the upstream gradients of the outputs:

    W[(a,i),(c,j)] = g_neg exp(S - neg)                                     of a candidate in neg
                   = g_pos_lse exp(S - pos_lse) + g_spread (exp(S - pos_lse) - 1/P) - g_pairs sigmoid(negatives - S)
                                                                            of a positive one
    plus g_pos for the candidate with the same index, c != a
    dr_(a,i) = 1/tau sum_(c,j) W z_(c,j),     dz_(c,j) = 1/tau sum_(a,i) W r_(a,i),     dL/dtau = -<r, dr> / tau

A backend has three functions for this. Sets are lists of tensors [G, n, D]. An empty list of rows means that the rows
are the columns, and the kernels use the symmetry. first is -1 if no candidate has the index of an anchor.

    rectangle(rows, columns, tau, normalize, cross, first, row_keys, column_keys, mean, half)
        -> neg, pos, pos_lse, spread, count: float64 [G, A, C, n]. If `mean` is True, also the mean of the columns with
           weights exp(S - neg), [G, n, D]. pos_lse, spread and count are empty tensors without keys, and so is the mean
           without `mean`.
    pairs(rows, columns, tau, normalize, cross, first, row_keys, column_keys, negatives, half)
        -> pairs, and their derivative with respect to the negatives
    rectangle_backward(rows, columns, tau, normalize, cross, first, row_keys, column_keys, of_rows, of_columns,
                       for_rows, for_columns, half) -> dr of each set, dz of each set, <r, dr> of each row
        of_rows: what the weights W of the rows as anchors are computed from, float64 [G, A, C, n]: neg, g_neg, g_pos;
        with keys also pos_lse, g_pos_lse, g_spread, count; for pairs, negatives and g_pairs.
        of_columns: the same for the columns as anchors, [G, C, A, K]. Either list may be empty.
        for_rows, for_columns: which of dr and dz to compute, from the weights of both; the other is empty. Without dr,
        the last output is <z, dz> of the columns.
        If the rows are the columns, only of_rows and for_rows count, and dr has both sides, as in `symmetric.py`.

half: whether the sets are rows of half precision that were converted to float32, so that autograd adds the gradients of
several calls in float32. Products may then be as exact as those of half precision, which are faster on a GPU.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, checks
from .symmetric import Eager, Once, ordered_sum, traced, wants_gradient


class Settings(NamedTuple):
    """The arguments of a call other than its tensors.

    first: where the rows begin among the columns, or -1. half: whether the sets were of half precision, see above.
    """

    name: str
    normalize: bool
    cross: bool = False
    first: int = -1
    half: bool = False


Keys = tuple[Tensor | None, Tensor | None]  # labels of the rows [G, n] and of the columns [G, K], int64; < 0: none
NO_KEYS: Keys = (None, None)


def rectangle(
    settings: Settings, tau: float | Tensor, keys: Keys, rows: Sequence[Tensor], columns: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """neg, pos and, with keys, pos_lse, spread, count: [G, A, C, n], float64 from all kernels."""
    if settings.name == "reference":
        return _reference(backends.reference.rectangle, settings, tau, keys, rows, columns)
    mean = keys[0] is None and settings.first < 0 and wants_gradient(tau, *rows) and not wants_gradient(*columns)
    call = Rectangle if torch.compiler.is_compiling() else EagerRectangle
    outputs = traced(call, settings.name, settings, tau, *keys, mean, len(rows), *rows, *columns)
    return outputs[:2] if keys[0] is None else outputs[:5]


def pairs(
    settings: Settings,
    tau: float | Tensor,
    keys: Keys,
    negatives: Tensor,
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
) -> Tensor:
    """The sum of softplus(negatives - S) over the positives. negatives: [G, A, C, n], in the dtype of `wide_dtype`."""
    if settings.name == "reference":
        return _reference(backends.reference.pairs, settings, tau, keys, rows, columns, negatives)
    call = Pairs if torch.compiler.is_compiling() else EagerPairs
    return traced(call, settings.name, settings, tau, *keys, negatives, len(rows), *rows, *columns)[0]


def _reference(call, settings, tau, keys, rows, columns, *more):
    with torch.autocast(checks.autocast_type(columns[0].device), enabled=False):
        return call(rows, columns, tau, *settings[1:4], *keys, *more)


def at_least_float32(x: Any) -> Any:
    """A tensor of half precision in float32; anything else unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if isinstance(x, torch.Tensor) else x


def wide_dtype(name: str, x: Tensor) -> torch.dtype:
    """The dtype of a backend's outputs of `rectangle`, and of their gradients."""
    computed = torch.promote_types(x.dtype, torch.float32)
    return computed if name == "reference" and x.device.type != "cpu" else torch.float64


def terms(
    neg: Tensor,
    pos: Tensor,
    cross: bool,
    further: Tensor | None = None,
    decoupled: bool = False,
    one_sided: bool = False,
) -> Tensor:
    """The terms that `symmetric.py` defines, from neg and pos: [G, V, V, n]. Exactly 0 for a row without negatives.

    further: the log-sum-exp of each anchor's further negatives, [G, V, n], or None.
    decoupled: as for `cost`.
    one_sided: return only the terms of the first set against the second, [G, n]. The others of `further` do not matter,
    which may then be [G, 1, n].
    """
    negatives, itself = [neg], None
    if not (cross and one_sided):
        sets = torch.arange(neg.shape[1], device=neg.device)
        itself = (sets[:, None] == sets)[:, :, None]
    if not cross:
        negatives.append(neg.where(itself, 0).sum(2, keepdim=True))  # each set's block with itself
    if further is not None:
        negatives.append(further[:, :, None])
    costs = cost(negatives, pos, decoupled)
    return first_with_second(costs) if one_sided else costs.masked_fill(itself, 0)


def first_with_second(x: Tensor) -> Tensor:
    """The block of the first set with the second: [G, V, V, n] as [G, n]."""
    return x.flatten(1, 2)[:, 1]  # the gradient of two selections would take two more kernels


def cost(negatives: Sequence[Tensor], positive: Tensor, decoupled: bool = False) -> Tensor:
    """log(1 + sum exp(negatives) / exp(positive)) of log-sum-exps: 0, with gradient 0, if all negatives are -inf.

    decoupled: leave the positive out of the denominator: log sum exp(negatives) - positive.
    """
    if decoupled:
        together = functools.reduce(log_add, negatives)
        none = together == -torch.inf
        return (together.masked_fill(none, 0) - positive).where(~none, 0 * (positive - positive.detach()))
    first, *others = (x - positive for x in negatives)
    total = softplus(first)
    for x in others:  # log(1 + e^x + e^y) = t + log(1 + e^(y - t)), where t = log(1 + e^x)
        total = total + softplus(x - total)
    return total


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp x), exact in float64: PyTorch's default threshold is too low. 0 at -inf, as are all derivatives."""
    return F.softplus(x, threshold=40)


def log_add(x: Tensor, y: Tensor) -> Tensor:
    """log(exp x + exp y), whose derivatives of every order are finite where one or both are -inf."""
    no_x, no_y = x == -torch.inf, y == -torch.inf
    either = no_x | no_y
    both = torch.logaddexp(x.masked_fill(either, 0), y.masked_fill(either, 0))
    return both.where(~either, y.where(no_x, x))


def _keep(ctx: Any, settings: Settings, tau: float | Tensor, n_rows: int, *tensors: Tensor | None) -> None:
    ctx.name, ctx.settings, ctx.n_rows = settings.name, settings, n_rows
    ctx.tau = None if isinstance(tau, torch.Tensor) else tau
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(tau if ctx.tau is None else None, *tensors)


def _gradients(
    ctx: Any, tau: float | Tensor, keys: Keys, of_rows: list[Tensor], sets: Sequence[Tensor]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of tau and of every set, None where none is needed."""
    n = ctx.n_rows
    needed = ctx.needs_input_grad[-len(sets) :]
    wanted = ctx.needs_input_grad[2], any(needed[:n]), any(needed[n:])
    call = RectangleBackward.apply if torch.is_grad_enabled() else RectangleBackward.forward
    d_tau, *d_sets = call(ctx.settings.name, ctx.settings, wanted, tau, *keys, n, len(of_rows), *of_rows, *sets)
    return d_tau, [d if need else None for d, need in zip(d_sets, needed, strict=True)]


class Rectangle(torch.autograd.Function):
    @staticmethod
    def forward(
        name: str,
        settings: Settings,
        tau: float | Tensor,
        row_keys: Tensor | None,
        column_keys: Tensor | None,
        mean: bool,
        n_rows: int,
        *sets: Tensor,
    ) -> tuple[Tensor, ...]:
        call = backends.BACKENDS[name].rectangle
        how = *settings[1:4], row_keys, column_keys
        return call(sets[:n_rows], sets[n_rows:], tau, *how, mean, settings.half)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, settings, tau, *keys, ctx.mean, n_rows = inputs[:7]
        neg, _, pos_lse, _, count, mean = output
        ctx.mark_non_differentiable(count, mean)
        sets = inputs[7 : 7 + n_rows] if ctx.mean else inputs[7:]  # the backward needs the mean instead of the columns
        _keep(ctx, settings, tau, n_rows, *keys, neg, pos_lse, count, mean, *sets)

    @staticmethod
    def backward(
        ctx: Any, g_neg: Tensor | None, g_pos: Tensor | None, g_pos_lse: Tensor | None, g_spread: Tensor | None, *_: Any
    ) -> tuple[Any, ...]:
        tau, row_keys, column_keys, neg, pos_lse, count, mean, *sets = ctx.saved_tensors
        tau = tau if ctx.tau is None else ctx.tau
        if ctx.mean:
            g_neg = torch.zeros_like(neg) if g_neg is None else g_neg
            call = MeanBackward.apply if torch.is_grad_enabled() else MeanBackward.forward
            of_tau, of_rows = ctx.needs_input_grad[2], ctx.needs_input_grad[7]
            d_tau, d_rows = call(ctx.settings.name, ctx.settings.normalize, tau, sets[0], mean, neg, g_neg)
            return None, None, d_tau if of_tau else None, None, None, None, None, d_rows if of_rows else None, None
        of_rows = [neg, g_neg, g_pos]
        if row_keys is not None:
            of_rows += [pos_lse, g_pos_lse, g_spread, count]
        of_rows = [torch.zeros_like(neg) if x is None else x for x in of_rows]
        d_tau, d_sets = _gradients(ctx, tau, (row_keys, column_keys), of_rows, sets)
        return None, None, d_tau, None, None, None, None, *d_sets


class Pairs(torch.autograd.Function):
    @staticmethod
    def forward(
        name: str,
        settings: Settings,
        tau: float | Tensor,
        row_keys: Tensor,
        column_keys: Tensor,
        negatives: Tensor,
        n_rows: int,
        *sets: Tensor,
    ) -> tuple[Tensor, ...]:
        call = backends.BACKENDS[name].pairs
        how = *settings[1:4], row_keys, column_keys
        return call(sets[:n_rows], sets[n_rows:], tau, *how, negatives, settings.half)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, settings, tau, *keys, negatives, n_rows = inputs[:7]
        ctx.mark_non_differentiable(output[1])
        _keep(ctx, settings, tau, n_rows, *keys, negatives, output[1], *inputs[7:])

    @staticmethod
    def backward(ctx: Any, g_pairs: Tensor | None, _: Any) -> tuple[Any, ...]:
        tau, row_keys, column_keys, negatives, slope, *sets = ctx.saved_tensors
        tau = tau if ctx.tau is None else ctx.tau
        g_pairs = torch.zeros_like(negatives) if g_pairs is None else g_pairs
        d_tau, d_sets = _gradients(ctx, tau, (row_keys, column_keys), [negatives, g_pairs], sets)
        return None, None, d_tau, None, None, g_pairs * slope, None, *d_sets


class EagerRectangle(Eager, Rectangle):
    """Rectangle for eager mode; torch.compile cannot trace a function with the methods of `Eager`."""


class EagerPairs(Eager, Pairs):
    """Pairs for eager mode, likewise."""


class RectangleBackward(Once, torch.autograd.Function):
    @staticmethod
    def forward(
        name: str,
        settings: Settings,
        wanted: tuple[bool, bool, bool],
        tau: float | Tensor,
        row_keys: Tensor | None,
        column_keys: Tensor | None,
        n_rows: int,
        n_anchors: int,
        *tensors: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """wanted: whether tau, rows, columns need a gradient. tensors: of_rows, then the sets."""
        of_tau, of_rows, of_columns = wanted
        anchors, sets = list(tensors[:n_anchors]), tensors[n_anchors:]
        rows, columns = sets[:n_rows], sets[n_rows:]
        symmetric = n_rows == 0
        for_rows = symmetric or of_rows or not of_columns
        d_rows, d_columns, along = backends.BACKENDS[name].rectangle_backward(
            rows,
            columns,
            tau,
            *settings[1:4],
            row_keys,
            column_keys,
            anchors,
            [],
            for_rows,
            of_columns and not symmetric,
            settings.half,
        )
        d_tau = (ordered_sum(along) / (-2 * tau if symmetric else -tau)).to(tau) if of_tau else None
        if symmetric:
            return d_tau, *d_rows
        return d_tau, *(d_rows or [None] * len(rows)), *(d_columns or [None] * len(columns))


class MeanBackward(Once, torch.autograd.Function):
    @staticmethod
    def forward(
        name: str, normalize: bool, tau: float | Tensor, x: Tensor, mean: Tensor, neg: Tensor, g_neg: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """The gradients of tau (if a tensor) and of the rows x [G, n, D], from the weighted mean of the columns."""
        g = g_neg.masked_fill(neg == -torch.inf, 0)[:, 0, 0, :, None] / tau
        z, largest = x, None
        if normalize:
            if x.dtype == torch.float64:  # the squares of float32 fit
                largest = x.abs().amax(-1, keepdim=True)
                largest = largest.masked_fill(largest == 0, 1)
                z = x / largest
            length = torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=torch.float64)
            zero = length == 0
            z = z / length
        along = (z.double() * mean).sum(-1, keepdim=True)
        if normalize:
            dz = (torch.addcmul(mean, z, along, value=-1) * (g / length)).masked_fill(zero, 0)
            dz = dz if largest is None else dz / largest
        else:
            dz = g * mean
        d_tau = None
        if isinstance(tau, torch.Tensor):
            along = g * (along.masked_fill(zero, 0) if normalize else along)
            d_tau = (ordered_sum(along) / -tau).to(tau)
        return d_tau, dz.to(x.dtype)

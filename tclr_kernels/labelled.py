"""Losses of rows with labels: a small one takes one call of a backend, others the operation of `general.py`.

The kernels of a small loss take less time than Python and autograd around them. A backend may therefore have one more
function:

    labelled(rows, columns, tau, normalize, first, row_keys, column_keys, spread, count, for_rows, for_columns)
        -> (loss, gradients)

Its values are those of `composed`, except for rounding.
gradients: those of the rows and of the columns that are wanted, for an upstream gradient of 1. They are multiplied by
the upstream gradient later, so the list is empty if one of them overflows or nearly underflows.
torch.compile, the transforms of torch.func, forward mode and tensor subclasses get `composed`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, general
from .reduced import LARGEST, must_be_composed
from .symmetric import Eager, Once, ordered_sum, wants_gradient

BLOCK = 96  # rows; so all terms together are also few enough to be summed at once


def labelled(
    settings: general.Settings,
    tau: float | Tensor,
    keys: tuple[Tensor, Tensor],
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    *,
    spread: bool,
    count: float | Tensor | None = None,
) -> Tensor:
    """The sum over the rows of softplus(neg - pos_lse) + spread, divided by `count`.

    rows: one set [G, n, D], or none where the rows are the columns. columns: one set [G, K, D]. keys: of both.
    spread: if False, that part of the sum is left out; if True, rows without positives have the term 0.
    count: None divides by the number of rows that have positives.
    """
    anchors = rows or columns
    (G, n, D), K = anchors[0].shape, columns[0].shape[1]
    tile = max(n, BLOCK) * max(K, BLOCK)  # similarities kept for a group: a block of each side or more
    small = columns[0].device.type == "cpu" and G * (tile + (n + K) * D) <= LARGEST and min(G, n, K) > 0
    call = getattr(backends.BACKENDS[settings.name], "labelled", None)
    fixed = not isinstance(tau, torch.Tensor) and not isinstance(count, torch.Tensor)
    if not small or call is None or not fixed or must_be_composed([*rows, *columns]):
        return composed(settings, tau, keys, rows, columns, spread, count)
    if wants_gradient(*rows, *columns):
        return Labelled.apply(settings.name, settings, tau, keys, spread, count, len(rows), *rows, *columns)
    return _call(settings, tau, keys, rows, columns, spread, count, False, False)[0]


def composed(
    settings: general.Settings,
    tau: float | Tensor,
    keys: tuple[Tensor, Tensor],
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    spread: bool,
    count: float | Tensor | None,
) -> Tensor:
    """The same loss by `general.rectangle`, which defines it."""
    neg, _, pos_lse, of_each, positives = general.rectangle(settings, tau, keys, rows, columns)
    terms = supervised(neg, pos_lse, of_each, positives) if spread else general.cost([neg], pos_lse)
    divisor = (positives > 0).sum().clamp(min=1) if count is None else count
    return ordered_sum(terms.to(torch.promote_types(columns[0].dtype, torch.float32))) / divisor


def supervised(neg: Tensor, pos_lse: Tensor, spread: Tensor, count: Tensor) -> Tensor:
    """The supervised contrastive loss (L_out) of each row, from what `general.rectangle` gives; 0 without positives.

    It is the log-sum-exp of all candidates minus the mean of the positives, as a sum of two parts which are not
    negative, so that a small loss keeps its digits.
    """
    alone = count == 0
    return (general.cost([neg], pos_lse.masked_fill(alone, 0)) + spread).masked_fill(alone, 0)


def _call(
    settings: general.Settings,
    tau: float,
    keys: tuple[Tensor, Tensor],
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    spread: bool,
    count: float | Tensor | None,
    for_rows: bool,
    for_columns: bool,
) -> tuple[Tensor, list[Tensor]]:
    call = backends.BACKENDS[settings.name].labelled
    how = tau, settings.normalize, settings.first, *keys
    return call(rows, columns, *how, spread, count or 0.0, for_rows, for_columns)


class Labelled(Eager, torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        settings: general.Settings,
        tau: float,
        keys: tuple[Tensor, Tensor],
        spread: bool,
        count: float | Tensor | None,
        n_rows: int,
        *sets: Tensor,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[7:]
        rows, columns = sets[:n_rows], sets[n_rows:]
        sides = (any(wanted[:n_rows]), wanted[-1]) if rows else (True, False)
        loss, gradients = _call(settings, tau, keys, rows, columns, spread, count, *sides)
        ctx.fixed = settings, tau, spread, count, n_rows, wanted
        ctx.save_for_backward(*keys, *sets, *gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        call = LabelledBackward.apply if torch.is_grad_enabled() else LabelledBackward.forward
        return *[None] * 7, *call(ctx.fixed[0].name, ctx.fixed, upstream, *ctx.saved_tensors)


class LabelledBackward(Once, torch.autograd.Function):
    @staticmethod
    def forward(name: str, fixed: Sequence[Any], upstream: Tensor, *saved: Tensor) -> tuple[Tensor | None, ...]:
        settings, tau, spread, count, n_rows, wanted = fixed
        keys, sets, made = saved[:2], saved[2 : 2 + len(wanted)], iter(saved[2 + len(wanted) :])
        if len(saved) > 2 + len(wanted):
            results = [(next(made) * upstream).to(z) if need else None for z, need in zip(sets, wanted, strict=True)]
            return tuple(results)
        with torch.enable_grad():
            sets = [z.detach().requires_grad_(need) for z, need in zip(sets, wanted, strict=True)]
            loss = composed(settings, tau, keys, sets[:n_rows], sets[n_rows:], spread, count)
        found = iter(torch.autograd.grad(loss, [z for z, need in zip(sets, wanted, strict=True) if need], upstream))
        return tuple(next(found) if need else None for need in wanted)

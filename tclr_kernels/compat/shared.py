"""What several of the drop-ins need."""

import numbers
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, checks, distributed, general
from ..distributed import Group, Shares
from ..symmetric import Eager, ordered_sum

LARGEST = torch.iinfo(torch.int64).max


def temperature(value: float | Tensor, smallest: float = 0.0) -> None:
    """Raises TypeError or ValueError if the value is not a temperature. The value of a tensor is not read."""
    checks.temperature(value)
    if isinstance(value, numbers.Real) and value < smallest:
        raise ValueError(f"temperature: found {value!r}, wanted a number >= {smallest}")


def unsupported(argument: str, found: object, wanted: str) -> NoReturn:
    """Raises the error for an option that the other library has and these kernels cannot compute."""
    raise NotImplementedError(f"{argument}: found {found!r}, wanted {wanted}; see docs/drop-ins.md")


@distributed.collective
def rows(tensors: dict[str, Tensor], *, group: Group = None, shares: Shares = None) -> list[Tensor]:
    """Embeddings [N, D] of one shape, dtype and device, checked under the names that the other library gives them.

    group: the processes that learn of an error, since they may already wait for this one in the loss.
    """
    return checks.embeddings("N D", group is not None, **tensors)


def width(name: str, kept: Tensor, beside: Tensor) -> None:
    """Raises ValueError for rows kept from earlier batches, [K, D], that are not as wide as those beside them."""
    if kept.shape[1] != beside.shape[1]:
        raise ValueError(f"{name}: found rows of D = {kept.shape[1]}, wanted D = {beside.shape[1]}, as in this batch")


@distributed.collective
def keys(name: str, labels: Tensor, beside: Tensor, *, group: Group = None, shares: Shares = None) -> Tensor:
    """Labels [N] of any dtype, of rows [N, D], as integers that are equal where the labels are, and never negative.

    In the other libraries a negative label is a label like all others; here it would be equal to nothing.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: found {labels!r}, wanted a tensor of shape [{len(beside)}]")
    if labels.shape != beside.shape[:1]:
        raise ValueError(f"{name}: found shape {list(labels.shape)}, wanted [{len(beside)}], one for each row")
    labels = labels.to(beside.device)
    if labels.is_floating_point():
        labels = (labels.double() + 0.0).view(torch.int64) >> 1  # -0.0 becomes 0.0; the sign moves out of the sign bit
    return labels.to(torch.int64) & LARGEST


class Rectangle(NamedTuple):
    """Rows [n, D] against columns [K, D], as `general.py` takes them; no rows mean that they are the columns."""

    settings: general.Settings
    tau: float | Tensor
    keys: general.Keys
    rows: list[Tensor]
    columns: list[Tensor]

    def sums(self) -> tuple[Tensor, ...]:
        """neg and, with keys, pos_lse, spread, count: [1, 1, 1, n] each"""
        neg, _, *labelled = general.rectangle(*self)
        return neg, *labelled

    def total(self, spread: bool, factor: float) -> Tensor:
        """factor times the sum over the rows of log(1 + exp(neg - pos_lse)), and of the spread if it is asked for."""
        known = isinstance(self.tau, float) and self.settings.name != "reference"
        if known and not torch.compiler.is_compiling():
            fixed = self.settings.name, self.settings, self.tau, *self.keys, spread, factor, len(self.rows)
            return Total.apply(*fixed, *self.rows, *self.columns)
        neg, pos_lse, of_each, _ = self.sums()
        terms = cost(neg, pos_lse)
        return ordered_sum(terms + of_each if spread else terms) * factor

    def pairs(self, negatives: Tensor) -> Tensor:
        """The sum of softplus(negatives - S) over the positives of each row: [1, 1, 1, n]"""
        return general.pairs(*self[:3], negatives, *self[3:])


class Total(Eager, torch.autograd.Function):
    """`Rectangle.total` as one node of autograd's graph: around a small batch, ten take longer than the kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        settings: general.Settings,
        tau: float,
        row_keys: Tensor,
        column_keys: Tensor,
        spread: bool,
        factor: float,
        n_rows: int,
        *sets: Tensor,
    ) -> Tensor:
        call = backends.BACKENDS[name].rectangle
        outputs = call(sets[:n_rows], sets[n_rows:], tau, *settings[1:], row_keys, column_keys, False)
        neg, _, pos_lse, of_each, count, _ = outputs
        difference = pos_lse - neg
        terms = F.logsigmoid(difference)
        total = ordered_sum(of_each - terms if spread else -terms)
        ctx.name, ctx.settings, ctx.tau, ctx.n_rows = name, settings, tau, n_rows
        ctx.spread, ctx.factor = spread, factor
        ctx.save_for_backward(row_keys, column_keys, neg, pos_lse, count, difference, *sets)
        return (total * factor).to(sets[0].dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        row_keys, column_keys, neg, pos_lse, count, difference, *sets = ctx.saved_tensors
        g = g.to(neg.dtype) * ctx.factor
        slope, zero = torch.sigmoid(-difference) * g, torch.zeros_like(neg)
        of_rows = neg, slope, zero, pos_lse, -slope, zero + g if ctx.spread else zero, count
        n, needed = ctx.n_rows, ctx.needs_input_grad[8:]
        wanted = False, any(needed[:n]), any(needed[n:])
        call = general.RectangleBackward.apply if torch.is_grad_enabled() else general.RectangleBackward.forward
        fixed = ctx.name, ctx.settings, wanted, ctx.tau, row_keys, column_keys, n, len(of_rows)
        _, *gradients = call(*fixed, *of_rows, *sets)
        return *[None] * 8, *[d if need else None for d, need in zip(gradients, needed, strict=True)]


def rectangle(
    rows: Tensor | None,
    columns: Tensor,
    temperature: float | Tensor,
    normalize: bool,
    keys: general.Keys = general.NO_KEYS,
    first: int = -1,
) -> Rectangle:
    """Checked rows [n, D] against columns [K, D], with the keys of both, [n] and [K].

    rows: None where they are the columns. first: the column that is no candidate of row 0 (as the next one of row 1),
    or -1.
    """
    tau = checks.temperature(temperature, columns.device)
    sides = [distributed.widened(x)[None] for x in (rows, columns) if x is not None]  # where their gradients are added
    name = backends.choose(None, columns.device, sum(x.shape[1] for x in sides), columns.shape[1], columns.dtype)
    settings = general.Settings(name, normalize, False, first)
    in_groups = tuple(k if k is None else k[None] for k in keys)
    return Rectangle(settings, tau, in_groups, sides[:-1], sides[-1:])


def cost(neg: Tensor, positive: Tensor) -> Tensor:
    """log(1 + exp(neg - positive)), and 0 without a gradient where there are no negatives; the positive is finite."""
    return -F.logsigmoid(positive - neg)


def supervised(neg: Tensor, pos_lse: Tensor, spread: Tensor, count: Tensor) -> Tensor:
    """The supervised contrastive loss (L_out) of each row, from what `general.rectangle` gives; 0 without positives."""
    alone = count == 0
    return (cost(neg, pos_lse.masked_fill(alone, 0)) + spread).masked_fill(alone, 0)


def as_given(loss: Tensor, like: Tensor) -> Tensor:
    """The loss in the dtype that the other libraries return: that of the rows, but float32 under autocast."""
    if torch.is_autocast_enabled(checks.autocast_type(like.device)):
        return loss.to(torch.promote_types(like.dtype, torch.float32))
    return loss.to(like.dtype)


@distributed.collective
def everybody(x: Tensor, *, group: Group = None, shares: Shares = None) -> Tensor:
    """The rows [n, D] of all processes, in the order of ranks, without a gradient."""
    if group is None:
        return x.detach()
    group.agree(x, 1)
    return group.gather(x.detach(), -2, group.shares)

"""What several of the drop-ins need."""

import numbers
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from .. import backends, checks, distributed, general
from ..distributed import Group, Shares
from ..labelled import labelled

LARGEST = torch.iinfo(torch.int64).max


def temperature(value: float | Tensor, smallest: float = 0.0, name: str = "temperature") -> float | Tensor:
    """The temperature as a float or a 0-d tensor, whose value is not read. Raises TypeError or ValueError.

    A tensor of one element may have any shape, and integers, as in the other libraries.
    """
    if isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex():
        value = value.float()
    if isinstance(value, numbers.Real) and 0 < value < smallest:
        raise ValueError(f"{name}: found {value!r}, wanted a number >= {smallest}")
    return checks.temperature(value, name=name)


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
    """Labels [N] of rows [N, D], real numbers or truth values, as integers that are equal where the labels are.

    The integers are not negative, since a negative one would be equal to nothing here, and in the other libraries it is
    a label like all others. A NaN, which is equal to nothing there too, becomes -1. One bit of 64 is lost: two integers
    that differ by 2^63 become equal, and two float64 numbers that differ in their last bit.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: found {labels!r}, wanted a tensor of shape [{len(beside)}]")
    if labels.shape != beside.shape[:1]:
        raise ValueError(f"{name}: found shape {list(labels.shape)}, wanted [{len(beside)}], one for each row")
    if labels.is_complex():
        raise TypeError(f"{name}: found dtype {labels.dtype}, wanted real numbers or truth values")
    labels = labels.to(beside.device)
    if labels.is_floating_point():
        bits = (labels.double() + 0.0).view(torch.int64) >> 1  # -0.0 becomes 0.0; the sign moves out of the sign bit
        return (bits & LARGEST).where(labels == labels, -1)
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

    def total(self, spread: bool, count: float | Tensor) -> Tensor:
        """The sum over the rows, divided by `count`: see `labelled.labelled`."""
        return labelled(*self[:3], self.rows, self.columns, spread=spread, count=count)

    def pairs(self, negatives: Tensor) -> Tensor:
        """The sum of softplus(negatives - S) over the positives of each row: [1, 1, 1, n]"""
        return general.pairs(*self[:3], negatives, *self[3:])


def rectangle(
    rows: Tensor | None,
    columns: Tensor,
    temperature: float | Tensor,
    normalize: bool,
    keys: general.Keys = general.NO_KEYS,
    first: int = -1,
    half: bool = False,
) -> Rectangle:
    """Checked rows [n, D] against columns [K, D], with the keys of both, [n] and [K].

    rows: None where they are the columns. first: the column that is no candidate of row 0 (as the next one of row 1),
    or -1. half: whether rows and columns were of half precision. If they still are, it need not be given.
    """
    tau = checks.temperature(temperature, columns.device)
    # the gradients of several calls are added in this dtype
    sides = [general.at_least_float32(x)[None] for x in (rows, columns) if x is not None]
    name = backends.choose(None, columns.device, sum(x.shape[1] for x in sides), columns.shape[1], columns.dtype)
    settings = general.Settings(name, normalize, False, first, half or columns.element_size() == 2)
    in_groups = tuple(k if k is None else k[None] for k in keys)
    return Rectangle(settings, tau, in_groups, sides[:-1], sides[-1:])


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

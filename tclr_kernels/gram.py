"""The operation itself, for losses of one's own: blocks of the Gram matrix, its rectangles, and labels.

Rows and columns are float64, float32, bfloat16 or float16 with any strides; sim(u, v) = <u, v> / (|u| |v| tau), or
<u, v> / tau with `normalize=False`. Results are float32 (float64 for float64 inputs) and can be differentiated by rows,
columns and temperature. The matrix of similarities is never held. Each function raises TypeError or ValueError, naming
the argument, for a wrong type, rank, size, dtype or device.

Source: the losses of TCLR, https://arxiv.org/abs/2101.07974, and of Khosla et al., https://arxiv.org/abs/2004.11362,
are functions of these outputs.
"""

from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

from . import backends, checks, distributed, general
from .symmetric import blocks

Temperature = float | Tensor


class Blocks(NamedTuple):
    """What `gram` returns: tensors [G, V, V, n], of the anchor (a, i) and the set c."""

    term: Tensor
    neg: Tensor
    pos: Tensor


class LabelledBlocks(NamedTuple):
    """What `gram` returns with keys: tensors [G, V, V, n], of the anchor (a, i) and the set c."""

    term: Tensor
    neg: Tensor
    pos: Tensor
    pos_lse: Tensor
    spread: Tensor
    count: Tensor


class LabelledRows(NamedTuple):
    """What `rectangle` returns with keys: tensors [..., n]."""

    neg: Tensor
    pos_lse: Tensor
    spread: Tensor
    count: Tensor


@overload
def gram(
    sets: Sequence[Tensor],
    temperature: Temperature = ...,
    *,
    normalize: bool = ...,
    cross: bool = ...,
    rows: tuple[int, int] | None = ...,
    keys: None = ...,
    backend: str | None = ...,
) -> Blocks: ...
@overload
def gram(
    sets: Sequence[Tensor],
    temperature: Temperature = ...,
    *,
    normalize: bool = ...,
    cross: bool = ...,
    rows: tuple[int, int] | None = ...,
    keys: Tensor,
    backend: str | None = ...,
) -> LabelledBlocks: ...
def gram(
    sets: Sequence[Tensor],
    temperature: Temperature = 0.1,
    *,
    normalize: bool = True,
    cross: bool = False,
    rows: tuple[int, int] | None = None,
    keys: Tensor | None = None,
    backend: str | None = None,
) -> Blocks | LabelledBlocks:
    """Every set of rows against every other: the blocks of their Gram matrix S, each row an anchor.

        neg[g,a,c,i]     = log sum exp S[(a,i),(c,j)] over j != i; with keys, over key_j != key_i as well
        pos[g,a,c,i]     = S[(a,i),(c,i)],  c != a                                            0 where a = c
        term[g,a,c,i]    = log(1 + (exp neg[g,a,a,i] + exp neg[g,a,c,i]) / exp pos[g,a,c,i])  0 where a = c
        pos_lse[g,a,c,i] = log sum exp S[(a,i),(c,j)] over the positives: key_j = key_i, (c, j) != (a, i)
        spread[g,a,c,i]  = pos_lse - mean of S over the positives, whose gradient is exact where they are alike
        count[g,a,c,i]   = the number of positives, which takes no gradient

    sets: V tensors [G, N, D] of one dtype and device: V sets of N rows in each of G independent groups.
    cross: only the blocks between the first and the second half of the sets exist, and the term is without
    neg[g,a,a,i]; elsewhere neg and pos_lse are -inf, the other outputs 0.
    rows: (o, n): the anchors are rows o .. o + n of each set, the candidates all rows. None: all are anchors, n = N.
    keys: integers [N] or [G, N], the rows' labels in every set; a negative one is equal to nothing.
    Without negatives neg is -inf, the term and its gradient 0; without positives pos_lse is -inf, the spread 0.
    Returns Blocks, or LabelledBlocks with keys.
    """
    sets = checks.sets(sets)
    checks.flag("normalize", normalize)
    checks.flag("cross", cross)
    tau = checks.temperature(temperature, sets[0].device)
    if rows is None and keys is None:
        return Blocks(*blocks(sets, tau, normalize=normalize, cross=cross, backend=backend))
    G, N, D = sets[0].shape
    first, n = (0, N) if rows is None else checks.span("rows", rows, N)
    of_columns = None if keys is None else checks.keys("keys", keys, sets[0])
    of_rows = None if of_columns is None else of_columns.narrow(1, first, n)
    if rows is not None:  # the gradients of anchors and candidates are added: in float16, that may be inf - inf
        sets = [distributed.widened(z) for z in sets]
    anchors = [] if rows is None else [z.narrow(1, first, n) for z in sets]
    name = backends.choose(backend, sets[0].device, G * len(sets) * N, D, sets[0].dtype)
    settings = general.Settings(name, normalize, cross, first)
    neg, pos, *labelled = general.rectangle(settings, tau, (of_rows, of_columns), anchors, sets)
    outputs = _narrowed(sets[0], general.terms(neg, pos, cross), neg, pos, *labelled)
    return Blocks(*outputs) if keys is None else LabelledBlocks(*outputs)


@overload
def rectangle(
    rows: Tensor,
    columns: Tensor,
    temperature: Temperature = ...,
    *,
    row_keys: None = ...,
    column_keys: None = ...,
    normalize: bool = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def rectangle(
    rows: Tensor,
    columns: Tensor,
    temperature: Temperature = ...,
    *,
    row_keys: Tensor,
    column_keys: Tensor,
    normalize: bool = ...,
    backend: str | None = ...,
) -> LabelledRows: ...
def rectangle(
    rows: Tensor,
    columns: Tensor,
    temperature: Temperature = 0.1,
    *,
    row_keys: Tensor | None = None,
    column_keys: Tensor | None = None,
    normalize: bool = True,
    backend: str | None = None,
) -> Tensor | LabelledRows:
    """Rows against other columns, none of them left out: a queue of negatives, hard negatives, reference embeddings.

        neg[i]     = log sum_j exp sim(r_i, z_j); with keys, over column_key_j != row_key_i
        pos_lse[i] = log sum_j exp sim(r_i, z_j) over the positives, column_key_j = row_key_i
        spread[i]  = pos_lse[i] - mean of sim(r_i, z_j) over the positives, whose gradient is exact where they are alike
        count[i]   = the number of positives, which takes no gradient

    rows: [..., n, D]; columns: [K, D] for all rows, or [..., K, D] with the rows' leading dimensions, which are groups.
    row_keys: integers [n] or [..., n]; column_keys: integers [K] or [..., K]; a negative one is equal to nothing.
    Several rectangles of the same rows are merged by torch.logaddexp. Where the columns require no gradient, that of
    the rows is made along with the result, by two products in the place of three.
    Returns neg [..., n], or LabelledRows with keys.
    """
    if columns is None:  # which means the rows themselves to `pair_sum`
        raise TypeError("columns: found None, wanted a torch.Tensor [K, D] or [..., K, D]")
    call = _call(rows, columns, temperature, normalize, row_keys, column_keys, backend)
    neg, _, *labelled = general.rectangle(call.settings, call.tau, call.keys, call.rows, call.columns)
    outputs = [x.reshape(rows.shape[:-1]) for x in _narrowed(rows, neg, *labelled)]
    return LabelledRows(*outputs) if labelled else outputs[0]


def pair_sum(
    negatives: Tensor,
    rows: Tensor,
    columns: Tensor | None = None,
    temperature: Temperature = 0.1,
    *,
    row_keys: Tensor,
    column_keys: Tensor | None = None,
    normalize: bool = True,
    backend: str | None = None,
) -> Tensor:
    """A term for every positive pair, each against the same negatives of its anchor, and their sum.

        pairs[i] = sum_j log(1 + exp negatives[i] / exp sim(r_i, z_j)) over the positives, column_key_j = row_key_i

    negatives: [..., n], the log-sum-exp of each anchor's negatives, as `gram` or `rectangle` gives it, or several of
    them merged; it may require a gradient. rows: [..., n, D], row_keys: integers [n] or [..., n].
    columns, column_keys: as for `rectangle`; both None: the rows against themselves, each row itself left out.
    Returns the sums: [..., n], 0 where there is no positive.
    """
    if row_keys is None:
        raise TypeError("row_keys: found None, wanted a tensor of integers [n] or [..., n]")
    call = _call(rows, columns, temperature, normalize, row_keys, column_keys, backend)
    negatives = checks.beside("negatives", negatives, rows)
    wide = negatives.to(torch.promote_types(negatives.dtype, general.wide_dtype(call.settings.name, rows)))
    wide = wide.reshape(len(call.columns[0]), 1, 1, -1)
    sums = general.pairs(call.settings, call.tau, call.keys, wide, call.rows, call.columns)
    return _narrowed(rows, sums)[0].reshape(rows.shape[:-1])


class _Call(NamedTuple):
    """A rectangle as `general.py` takes it."""

    settings: general.Settings
    tau: float | Tensor
    keys: general.Keys
    rows: list[Tensor]  # a set [G, n, D], or none where the rows are the columns
    columns: list[Tensor]  # a set [G, K, D]


def _call(
    rows: Tensor,
    columns: Tensor | None,
    temperature: Temperature,
    normalize: bool,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    backend: str | None,
) -> _Call:
    """The arguments of a rectangle, checked. Columns that are the same for all groups make one group of them."""
    checks.flag("normalize", normalize)
    itself = columns is None
    if columns is None:
        (rows,) = checks.embeddings("... n D", rows=rows)
        if column_keys is not None:
            raise ValueError("column_keys: found a tensor without columns, wanted None")
        columns, column_keys = rows, row_keys
    else:
        rows, columns = checks.sides(rows=rows, columns=columns)
        checks.keys_of_both(row_keys, column_keys)
    tau = checks.temperature(temperature, rows.device)
    D = rows.shape[-1]
    keys = general.NO_KEYS
    if row_keys is not None:
        keys = checks.keys("row_keys", row_keys, rows), checks.keys("column_keys", column_keys, columns)
    if columns.dim() == 2:
        rows, columns = rows.reshape(1, -1, D), columns[None]
    rows, columns = (x.reshape(-1, *x.shape[-2:]) for x in (rows, columns))
    keys = tuple(k if k is None else k.reshape(len(x), -1) for k, x in zip(keys, (rows, columns), strict=True))
    name = backends.choose(backend, rows.device, rows.shape[:-1].numel() + columns.shape[:-1].numel(), D, rows.dtype)
    settings = general.Settings(name, normalize, False, 0 if itself else -1)
    return _Call(settings, tau, keys, [] if itself else [rows], [columns])


def _narrowed(like: Tensor, *outputs: Tensor) -> list[Tensor]:
    dtype = torch.promote_types(like.dtype, torch.float32)
    return [x.to(dtype) for x in outputs]

"""The operation below the losses, as public functions for losses of your own.

The similarity is sim(u, v) = <u, v> / (|u| |v| tau), or <u, v> / tau with `normalize=False`. Rows and columns are
float64, float32, bfloat16 or float16, with any strides. Results are float32, or float64 for float64 inputs, and can be
differentiated with respect to rows, columns and temperature. The matrix of similarities is never stored. Each function
raises TypeError or ValueError, naming the argument, for a wrong type, rank, size, dtype or device.

Source: the losses of TCLR, https://arxiv.org/abs/2101.07974, and of Khosla et al., https://arxiv.org/abs/2004.11362,
are functions of these outputs.
"""

from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

from . import backends, checks, general
from .symmetric import blocks

Temperature = float | Tensor


class Blocks(NamedTuple):
    """What `gram` returns: tensors [G, V, V, n], with entry [g, a, c, i] for the anchor (a, i) against the set c."""

    term: Tensor
    neg: Tensor
    pos: Tensor


class LabelledBlocks(NamedTuple):
    """What `gram` returns with keys: tensors [G, V, V, n], with entry [g, a, c, i] as in `Blocks`."""

    term: Tensor
    neg: Tensor
    pos: Tensor
    pos_lse: Tensor
    spread: Tensor
    count: Tensor


class LabelledRows(NamedTuple):
    """What `rectangle` returns with keys: tensors [..., n], an entry for each row."""

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
    """Compares every set of rows with every set: the blocks of their Gram matrix S, where each row is an anchor.

        neg[g,a,c,i]     = log sum exp S[(a,i),(c,j)] over j != i; with keys, only over key_j != key_i
        pos[g,a,c,i]     = S[(a,i),(c,i)],  c != a                                            0 where a = c
        term[g,a,c,i]    = log(1 + (exp neg[g,a,a,i] + exp neg[g,a,c,i]) / exp pos[g,a,c,i])  0 where a = c
        pos_lse[g,a,c,i] = log sum exp S[(a,i),(c,j)] over the positives: key_j = key_i, (c, j) != (a, i)
        spread[g,a,c,i]  = pos_lse - mean of S over the positives, with a gradient that is exact for similar positives
        count[g,a,c,i]   = the number of positives, without gradient

    sets: V tensors [G, N, D] of one dtype and device: V sets of N rows in each of G independent groups.
    cross: compare only the first half of the sets with the second half, and leave neg[g,a,a,i] out of the term. For the
    other blocks neg and pos_lse are -inf and the other outputs 0.
    rows: (o, n): only rows o .. o + n of each set are anchors, and all rows are candidates. None: all are anchors.
    keys: integers [N] or [G, N], the labels of the rows, the same in every set. A negative label matches nothing.
    Returns Blocks, or LabelledBlocks with keys. An anchor without negatives has neg -inf, and term 0 with gradient 0.
    An anchor without positives has pos_lse -inf and spread 0.
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
    half = sets[0].element_size() == 2
    if rows is not None:  # autograd adds two gradients of a row: in float16, that could be inf - inf
        sets = [general.at_least_float32(z) for z in sets]
    anchors = [] if rows is None else [z.narrow(1, first, n) for z in sets]
    name = backends.choose(backend, sets[0].device, G * len(sets) * N, D, sets[0].dtype)
    settings = general.Settings(name, normalize, cross, first, half)
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
    """Compares rows with other columns, such as a queue of negatives, hard negatives or reference embeddings.

        neg[i]     = log sum_j exp sim(r_i, z_j); with keys, only over column_key_j != row_key_i
        pos_lse[i] = log sum_j exp sim(r_i, z_j) over the positives, column_key_j = row_key_i
        spread[i]  = pos_lse[i] - mean of sim(r_i, z_j) over the positives, with a gradient exact for similar positives
        count[i]   = the number of positives, without gradient

    rows: [..., n, D]; leading dimensions are independent groups.
    columns: [K, D], the same for all groups, or [..., K, D] with the leading dimensions of the rows.
    row_keys: integers [n] or [..., n], labels of the rows. A negative label matches nothing.
    column_keys: integers [K] or [..., K], labels of the columns.
    Returns neg [..., n], or LabelledRows with keys. To combine the results for several sets of columns, use
    torch.logaddexp. If the columns need no gradient, forward and backward together take two matrix products.
    """
    if columns is None:  # to `pair_sum`, None means the rows themselves
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
    """Adds up one NT-Xent term for each positive pair of a row.

        pairs[i] = sum_j log(1 + exp negatives[i] / exp sim(r_i, z_j)) over the positives, column_key_j = row_key_i

    negatives: [..., n], the log-sum-exp of each row's negatives, from `gram` or `rectangle`, or several combined by
    torch.logaddexp. It may require a gradient.
    rows: [..., n, D]; leading dimensions are independent groups.
    columns, column_keys: as for `rectangle`. Both None: the rows are compared with each other, but not with themselves.
    row_keys: integers [n] or [..., n], labels of the rows. A negative label matches nothing.
    Returns the sums, [..., n]; 0 for a row without positives.
    """
    if row_keys is None:
        raise TypeError("row_keys: found None, wanted a tensor of integers [n] or [..., n]")
    call = _call(rows, columns, temperature, normalize, row_keys, column_keys, backend)
    negatives = checks.one_for_each_row("negatives", negatives, rows)
    wide = negatives.to(torch.promote_types(negatives.dtype, general.wide_dtype(call.settings.name, rows)))
    wide = wide.reshape(len(call.columns[0]), 1, 1, -1)
    sums = general.pairs(call.settings, call.tau, call.keys, wide, call.rows, call.columns)
    return _narrowed(rows, sums)[0].reshape(rows.shape[:-1])


class _Call(NamedTuple):
    """The arguments of a rectangle in the form that `general.py` takes."""

    settings: general.Settings
    tau: float | Tensor
    keys: general.Keys
    rows: list[Tensor]  # one set [G, n, D]; empty if the rows are the columns
    columns: list[Tensor]  # one set [G, K, D]


def _call(
    rows: Tensor,
    columns: Tensor | None,
    temperature: Temperature,
    normalize: bool,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    backend: str | None,
) -> _Call:
    """Checks the arguments of a rectangle. If all groups share the columns, they become one group."""
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
    """The outputs in the dtype of results: float32, or float64 for float64 inputs."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return [x.to(dtype) for x in outputs]

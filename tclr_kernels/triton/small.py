"""Many small groups: as many groups as fit share one tile of R rows, and one program computes everything for them.

    S = z z^T / tau,  [R, R], of which a row uses only the columns of its own group
    neg[a,c,i] = log sum_{j != i} exp S[(a,i),(c,j)],  pos[a,c,i] = S[(a,i),(c,i)],  term as in `epilogue.py`
    W = g_neg exp(S - neg) off the diagonals and g_pos on them,  dz = (W + W^T) z / tau

Products are computed in float32, or in float64 for float64 rows, since lower precision would not be faster here. There
is one launch in the forward and one in the backward.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue import (
    exists,
    exponent_of,
    factors,
    finite_size,
    gradient_scale,
    inverse_length,
    inverse_of,
    narrowed,
    pair_gradients,
    power_of_two,
    scaled,
    start_of,
    term_of,
    widened,
)
from .sets import INTERPRETED, accumulator, cdiv, launch, one_array, temperature, upstream

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def places(program, G, V, N, R: tl.constexpr):
    """For each row of the tile: its group, its set, its index in the set, and whether it exists."""
    M = V * N
    groups = R // M
    r = tl.arange(0, R)
    g = program.to(tl.int64) * groups + r // M
    row = r % M
    return g, row // N, row % N, (r < groups * M) & (g < G)


@triton.jit
def read(x, rows, valid, d0, D, stride_d, BD: tl.constexpr):
    """Features d0 .. d0 + BD of the tile's rows, padded with zeros. x + rows: pointers to the rows; valid: [R]"""
    d = d0 + tl.arange(0, BD)
    offsets = rows[:, None] + d.to(tl.int64)[None, :] * stride_d
    return tl.load(x + offsets, mask=valid[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def lengths(x, rows, valid, D, stride_d, NORMALIZE: tl.constexpr, R: tl.constexpr, BD: tl.constexpr):
    """A scale for each row, and the inverse length of row / scale, in float64.

    The scale is the largest entry of a float64 row, whose squares could overflow, and 1 for all other rows.
    """
    scale = tl.full([R], 1.0, tl.float64)
    inverse = tl.full([R], 1.0, tl.float64)
    if NORMALIZE:
        if x.dtype.element_ty == tl.float64:
            largest = tl.zeros([R], tl.float64)
            for d0 in range(0, D, BD):
                largest = tl.maximum(largest, tl.max(tl.abs(read(x, rows, valid, d0, D, stride_d, BD)), 1))
            scale = tl.where(largest == 0, 1.0, largest)
        squares = tl.zeros([R], tl.float64)
        for d0 in range(0, D, BD):
            wide = widened(read(x, rows, valid, d0, D, stride_d, BD), scale)
            squares += tl.sum(tl.fma(wide, wide, 0.0), 1)  # rounded products, see log_of_slots in large.py
        inverse = inverse_length(squares)
    return scale, inverse


@triton.jit
def units(x, rows, valid, d0, D, stride_d, scale, inverse, ACC: tl.constexpr, BD: tl.constexpr):
    """Features d0 .. d0 + BD of the unit rows."""
    return (widened(read(x, rows, valid, d0, D, stride_d, BD), scale) * inverse[:, None]).to(ACC)


@triton.jit
def similarities(
    x, rows, valid, D, stride_d, scale, inverse, ACC: tl.constexpr, R: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """<z, z'> of all pairs of rows: [R, R]"""
    S = tl.zeros([R, R], ACC)
    for d0 in range(0, D, BD):
        z = units(x, rows, valid, d0, D, stride_d, scale, inverse, ACC, BD)
        S += tl.dot(z, tl.trans(z), input_precision="ieee", out_dtype=ACC)
    return S


@triton.jit
def log_sum(S, mask):
    """log sum exp of each row's entries in the mask, in float64; -inf for a row without entries."""
    masked = tl.where(mask, S, float("-inf"))
    largest = tl.max(masked, 1)
    offset = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp2((masked - offset[:, None]) * LOG2E), 1)
    return tl.log(total.to(tl.float64)) + offset.to(tl.float64)


@triton.jit(do_not_specialize=["count", "G", "V", "N", "inner"])
def forward_kernel(
    x, tau, term, neg, pos, count, G, V, N, D, inner, stride_w: tl.int64,
    stride_v: tl.int64, stride_g, stride_n, stride_d,
    TENSOR: tl.constexpr, NORMALIZE: tl.constexpr, CROSS: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """term / count, neg, pos: [G, V, V, N]. x: V sets [G, N, D], as `one_array` returns them"""
    g, a, i, valid = places(tl.program_id(0), G, V, N, R)
    rows = g * stride_g + start_of(a.to(tl.int64), inner, stride_w, stride_v) + i.to(tl.int64) * stride_n
    scale, inverse = lengths(x, rows, valid, D, stride_d, NORMALIZE, R, BD)
    S = similarities(x, rows, valid, D, stride_d, scale, inverse, ACC, R, BD) * inverse_of(tau, TENSOR, ACC)
    group = (g[:, None] == g[None, :]) & valid[:, None] & valid[None, :]
    other = group & (i[:, None] != i[None, :])
    own = log_sum(S, other & (a[:, None] == a[None, :]))
    for c in range(V):
        column = (a == c)[None, :]
        there = exists(a, c, V, CROSS)
        paired = there & (a != c)
        value = log_sum(S, other & column & there[:, None])
        positive = tl.sum(tl.where(group & column & (i[:, None] == i[None, :]), S, 0.0), 1).to(tl.float64)
        positive = tl.where(paired, positive, 0.0)
        loss = tl.where(N > 1, term_of(own, value, positive, CROSS), positive - positive)
        at = ((g * V + a) * V + c) * N + i
        tl.store(neg + at, value, mask=valid)
        tl.store(pos + at, positive, mask=valid)
        tl.store(term + at, tl.where(paired, loss / count, 0.0), mask=valid)


@triton.jit(do_not_specialize=["count", "G", "V", "N", "inner"])
def backward_kernel(
    x, tau, neg, pos, g_term, g_neg, g_pos, dx, zdz, count, G, V, N, D, inner, stride_w: tl.int64,
    stride_v: tl.int64, stride_g, stride_n, stride_d,
    TENSOR: tl.constexpr, NORMALIZE: tl.constexpr, CROSS: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
    BD: tl.constexpr, TERM: tl.constexpr, NEG: tl.constexpr, POS: tl.constexpr,
):  # fmt: skip
    """dx: [V, G, N, D] and zdz: [G, V, N]"""
    g, a, i, valid = places(tl.program_id(0), G, V, N, R)
    rows = g * stride_g + start_of(a.to(tl.int64), inner, stride_w, stride_v) + i.to(tl.int64) * stride_n
    largest, inverse = lengths(x, rows, valid, D, stride_d, NORMALIZE, R, BD)
    cosines = similarities(x, rows, valid, D, stride_d, largest, inverse, ACC, R, BD)
    inverse_tau = inverse_of(tau, TENSOR, ACC)
    S = cosines * inverse_tau
    group = (g[:, None] == g[None, :]) & valid[:, None] & valid[None, :]

    first = (g * V + a) * V
    to_own = (first + a) * N + i
    own = tl.load(neg + to_own, mask=valid, other=0.0).to(tl.float64)
    for_own = tl.zeros([R], tl.float64)
    if NEG:
        for_own += tl.load(g_neg + to_own, mask=valid & exists(a, a, V, CROSS), other=0.0).to(tl.float64)
    top = tl.zeros([R], tl.float64)
    for c in range(V):
        at = (first + c) * N + i
        mask = valid & (a != c) & exists(a, c, V, CROSS)
        for_neg, for_pos, more = pair_gradients(
            neg, pos, g_term, g_neg, g_pos, count, own, at, mask, TERM, NEG, POS, CROSS
        )  # fmt: skip
        for_own += more
        top = tl.maximum(top, tl.maximum(finite_size(for_neg), finite_size(for_pos)))
    top = tl.maximum(top, finite_size(for_own))
    exponent = exponent_of(tl.max(tl.where(group, top[None, :], 0.0), 1))  # that of the group's largest gradient
    shrink = power_of_two(-exponent)

    same = a[:, None] == a[None, :]
    scale = tl.where(same, (for_own * shrink)[:, None], 0.0).to(ACC)
    shift = tl.where(same, own[:, None], float("inf")).to(ACC)
    positives = tl.zeros([R, R], ACC)
    for c in range(V):
        at = (first + c) * N + i
        mask = valid & (a != c) & exists(a, c, V, CROSS)
        for_neg, for_pos, _ = pair_gradients(
            neg, pos, g_term, g_neg, g_pos, count, own, at, mask, TERM, NEG, POS, CROSS
        )  # fmt: skip
        value = tl.load(neg + at, mask=mask, other=float("inf"))
        here = mask[:, None] & (a == c)[None, :]
        scale = tl.where(here, (for_neg * shrink).to(ACC)[:, None], scale)
        shift = tl.where(here, value[:, None], shift)
        positives = tl.where(here, (for_pos * shrink).to(ACC)[:, None], positives)
    shift = tl.where(scale == 0, float("inf"), shift)  # exp(S - inf) is 0, and neg may be -inf here
    W = tl.exp2((S - shift) * LOG2E) * scale
    W = tl.where(group, tl.where(i[:, None] == i[None, :], positives, W), 0.0)

    W += tl.trans(W)

    first = (g * V + a) * N + i
    unit = power_of_two(exponent)
    along = tl.sum(tl.where(group, W * cosines, 0.0), 1)  # <z, dz>, computed without dz
    norm = tl.where(inverse == 0, 0.0, largest / tl.where(inverse == 0, 1.0, inverse))
    tl.store(zdz + first, along.to(tl.float64) * (unit * inverse_tau.to(tl.float64)), mask=valid)
    one, other = factors(gradient_scale(norm, unit, inverse_tau, NORMALIZE), ACC)
    to = ((a.to(tl.int64) * G + g) * N + i) * D
    for d0 in range(0, D, BD):
        z = units(x, rows, valid, d0, D, stride_d, largest, inverse, ACC, BD)
        # W already carries a row that is not finite to its own group; here 0 * inf would make NaN in other groups
        dz = tl.dot(W, tl.where(tl.abs(z) < float("inf"), z, 0.0), input_precision="ieee", out_dtype=ACC)
        if NORMALIZE:
            dz -= z * along[:, None]
        d = d0 + tl.arange(0, BD)
        gradient = narrowed(scaled(dz, norm, one, other), dx.dtype.element_ty)
        tl.store(dx + to[:, None] + d[None, :], gradient, mask=valid[:, None] & (d < D)[None, :])


LARGEST = 32  # the largest number of rows in a small group
ROWS = 128 if INTERPRETED else LARGEST  # rows of a tile; with 64, the backward would spill registers
FEATURES = 128 if INTERPRETED else 32  # features that are read at a time; the interpreter is faster with more


def serves(V: int, N: int) -> bool:
    """Whether this module computes groups of this size."""
    return V * N <= LARGEST


def settings(x: Tensor, tau: float | Tensor, normalize: bool, cross: bool) -> dict[str, Any]:
    return dict(
        TENSOR=isinstance(tau, torch.Tensor),
        NORMALIZE=normalize,
        CROSS=cross,
        ACC=accumulator(x),
        R=ROWS,
        BD=FEATURES,
        num_warps=8,  # with 4, the backward of more than two sets would spill registers
        num_stages=1,
    )


def forward(
    sets: Sequence[Tensor], tau: float | Tensor, normalize: bool, cross: bool, count: int = 1, half: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """term / count, neg, pos by one launch. half: ignored, since all products are of float32 here"""
    x, strides = one_array(sets)
    G, N, D = sets[0].shape
    V = len(sets)
    dtype = torch.promote_types(x.dtype, torch.float32)
    outputs = [x.new_empty((G, V, V, N), dtype=dtype) for _ in range(3)]
    grid = cdiv(G, ROWS // (V * N))
    how = settings(x, tau, normalize, cross)
    launch(forward_kernel, grid, x, temperature(tau, x), *outputs, count, G, V, N, D, *strides, **how)
    return tuple(outputs)


def backward(
    sets: Sequence[Tensor],
    tau: float | Tensor,
    normalize: bool,
    cross: bool,
    neg: Tensor,
    pos: Tensor,
    g_term: Tensor | None,
    g_neg: Tensor | None,
    g_pos: Tensor | None,
    count: int = 1,
    half: bool = False,
) -> tuple[Tensor, Tensor]:
    """dx [V, G, N, D] and <z, dz> [G, V, N] by one launch. g_term: the gradient of each term / count, or one for all"""
    x, strides = one_array(sets)
    G, N, D = sets[0].shape
    V = len(sets)
    dx = x.new_empty((V, G, N, D))
    zdz = neg.new_empty((G, V, N))
    gradients, given = upstream(g_term if N > 1 else None, g_neg, g_pos, neg)
    grid = cdiv(G, ROWS // (V * N))
    launch(
        backward_kernel, grid, x, temperature(tau, x), neg, pos, *gradients, dx, zdz, count, G, V, N, D, *strides,
        **given, **settings(x, tau, normalize, cross),
    )  # fmt: skip
    return dx, zdz

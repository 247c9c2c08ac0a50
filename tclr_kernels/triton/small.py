"""Many small groups: as many as fit share one tile of R rows, and one program does all there is to do for them.

    S = z z^T / tau,  [R, R], of which a row uses what belongs to its own group
    neg[a,c,i] = log sum_{j != i} exp S[(a,i),(c,j)],  pos[a,c,i] = S[(a,i),(c,i)],  term as in `epilogue.py`
    W = g_neg exp(S - neg) off the diagonals and g_pos on them,  dz = (W + W^T) z / tau

Rows stay in float32 (float64): there is no speed to be had from less. One launch forward, one backward.
"""

import torch
import triton
import triton.language as tl

from .epilogue import (
    exists,
    exponent_of,
    finite_size,
    inverse_of,
    pair_gradients,
    power_of_two,
    project,
    term_of,
    unit_rows,
)
from .sets import accumulator, launch, one_array, pointer

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def places(program, G, V, N, R: tl.constexpr):
    """Of the tile's rows: group, set, row within it, and whether there is one."""
    M = V * N
    groups = R // M
    r = tl.arange(0, R)
    g = program.to(tl.int64) * groups + r // M
    row = r % M
    return g, row // N, row % N, (r < groups * M) & (g < G)


@triton.jit
def read(x, g, a, i, valid, D, stride_g, stride_v, stride_n, stride_d, DP: tl.constexpr):
    """The tile's rows, padded with zeros: [R, DP]"""
    d = tl.arange(0, DP)
    first = g * stride_g + a.to(tl.int64) * stride_v + i.to(tl.int64) * stride_n
    offsets = first[:, None] + d.to(tl.int64)[None, :] * stride_d
    return tl.load(x + offsets, mask=valid[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def similarities(z, inverse_tau, ACC: tl.constexpr):
    return tl.dot(z, tl.trans(z), input_precision="ieee", out_dtype=ACC) * inverse_tau


@triton.jit
def log_sum(S, mask):
    """log sum exp of each row's entries under the mask, in float64; -inf where there are none."""
    masked = tl.where(mask, S, float("-inf"))
    largest = tl.max(masked, 1)
    offset = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp2((masked - offset[:, None]) * LOG2E).to(tl.float64), 1)
    return tl.log(total) + offset.to(tl.float64)


@triton.jit
def forward_kernel(
    x, tau, term, neg, pos, G, V, N, D, stride_g, stride_v, stride_n, stride_d,
    TENSOR: tl.constexpr, NORMALIZE: tl.constexpr, CROSS: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
    DP: tl.constexpr,
):  # fmt: skip
    """term, neg, pos: [G, V, V, N] of x: V sets [G, N, D] of equal strides, stride_v apart."""
    g, a, i, valid = places(tl.program_id(0), G, V, N, R)
    z, _ = unit_rows(read(x, g, a, i, valid, D, stride_g, stride_v, stride_n, stride_d, DP), NORMALIZE, ACC)
    S = similarities(z, inverse_of(tau, TENSOR, ACC), ACC)
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
        tl.store(term + at, tl.where(paired, loss, 0.0), mask=valid)


@triton.jit
def backward_kernel(
    x, tau, neg, pos, g_term, g_neg, g_pos, dx, zdz, G, V, N, D, stride_g, stride_v, stride_n, stride_d,
    TENSOR: tl.constexpr, NORMALIZE: tl.constexpr, CROSS: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
    DP: tl.constexpr, TERM: tl.constexpr, NEG: tl.constexpr, POS: tl.constexpr,
):  # fmt: skip
    """dx: [V, G, N, D] and zdz: [G, V, N]"""
    g, a, i, valid = places(tl.program_id(0), G, V, N, R)
    z, norm = unit_rows(read(x, g, a, i, valid, D, stride_g, stride_v, stride_n, stride_d, DP), NORMALIZE, ACC)
    inverse_tau = inverse_of(tau, TENSOR, ACC)
    S = similarities(z, inverse_tau, ACC)
    group = (g[:, None] == g[None, :]) & valid[:, None] & valid[None, :]

    first = (g * V + a) * V
    to_own = (first + a) * N + i
    own = tl.load(neg + to_own, mask=valid, other=0.0).to(tl.float64)
    for_own = tl.zeros([R], tl.float64)
    if NEG:
        for_own += tl.load(g_neg + to_own, mask=valid & exists(a, a, V, CROSS), other=0.0).to(tl.float64)
    largest = tl.zeros([R], tl.float64)
    for c in range(V):
        at = (first + c) * N + i
        mask = valid & (a != c) & exists(a, c, V, CROSS)
        for_neg, for_pos, more = pair_gradients(neg, pos, g_term, g_neg, g_pos, own, at, mask, TERM, NEG, POS, CROSS)
        for_own += more
        largest = tl.maximum(largest, tl.maximum(finite_size(for_neg), finite_size(for_pos)))
    largest = tl.maximum(largest, finite_size(for_own))
    exponent = exponent_of(tl.max(tl.where(group, largest[None, :], 0.0), 1))  # of the group
    shrink = power_of_two(-exponent)

    same = a[:, None] == a[None, :]
    scale = tl.where(same, (for_own * shrink)[:, None], 0.0).to(ACC)
    shift = tl.where(same, own[:, None], float("inf")).to(ACC)
    positives = tl.zeros([R, R], ACC)
    for c in range(V):
        at = (first + c) * N + i
        mask = valid & (a != c) & exists(a, c, V, CROSS)
        for_neg, for_pos, _ = pair_gradients(neg, pos, g_term, g_neg, g_pos, own, at, mask, TERM, NEG, POS, CROSS)
        value = tl.load(neg + at, mask=mask, other=float("inf"))
        here = mask[:, None] & (a == c)[None, :]
        scale = tl.where(here, (for_neg * shrink).to(ACC)[:, None], scale)
        shift = tl.where(here, value[:, None], shift)
        positives = tl.where(here, (for_pos * shrink).to(ACC)[:, None], positives)
    shift = tl.where(scale == 0, float("inf"), shift)  # exp(S - inf) is 0, and neg may be -inf here
    W = tl.exp2((S - shift) * LOG2E) * scale
    W = tl.where(group, tl.where(i[:, None] == i[None, :], positives, W), 0.0)

    # a row that is not finite makes W so within its group; beside other groups' zeros it must not
    finite = tl.where(tl.abs(z) < float("inf"), z, 0.0)
    dz = tl.dot(W + tl.trans(W), finite, input_precision="ieee", out_dtype=ACC)
    along, gradient = project(z, dz, norm, power_of_two(exponent), inverse_tau, NORMALIZE)
    d = tl.arange(0, DP)
    tl.store(zdz + (g * V + a) * N + i, along, mask=valid)
    to = ((a.to(tl.int64) * G + g) * N + i) * D
    gradient = gradient.to(tl.float32) if dx.dtype.element_ty != tl.float64 else gradient
    tl.store(dx + to[:, None] + d[None, :], gradient.to(dx.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])


def tile_rows(D):
    """The rows of a tile of width D: what fits the registers, at least what a matrix product takes."""
    return 64 if D <= 128 else 32 if D <= 256 else 16 if D <= 512 else 0


def serves(V, N, D):
    return V * N <= tile_rows(D)


def settings(x, tau, D, normalize, cross):
    return dict(
        TENSOR=isinstance(tau, torch.Tensor),
        NORMALIZE=normalize,
        CROSS=cross,
        ACC=accumulator(x),
        R=tile_rows(D),
        DP=max(16, triton.next_power_of_2(D)),
        num_warps=4,
        num_stages=1,
    )


def forward(sets, tau, normalize, cross):
    """term, neg, pos by one launch."""
    x, strides = one_array(sets)
    G, N, D = sets[0].shape
    V = len(sets)
    dtype = torch.promote_types(x.dtype, torch.float32)
    outputs = [x.new_empty((G, V, V, N), dtype=dtype) for _ in range(3)]
    grid = triton.cdiv(G, tile_rows(D) // (V * N))
    launch(
        forward_kernel, grid, x, tau, *outputs, G, V, N, D, *strides, **settings(x, tau, D, normalize, cross)
    )  # fmt: skip
    return tuple(outputs)


def backward(sets, tau, normalize, cross, neg, pos, g_term, g_neg, g_pos):
    """dx [V, G, N, D] and <z, dz> [G, V, N] by one launch."""
    x, strides = one_array(sets)
    G, N, D = sets[0].shape
    V = len(sets)
    dx = x.new_empty((V, G, N, D))
    zdz = neg.new_empty((G, V, N))
    gradients = (g_term if N > 1 else None, g_neg, g_pos)
    given = {name: g is not None for name, g in zip(("TERM", "NEG", "POS"), gradients, strict=True)}
    grid = triton.cdiv(G, tile_rows(D) // (V * N))
    launch(
        backward_kernel, grid, x, tau, neg, pos, *(pointer(g, neg) for g in gradients), dx, zdz, G, V, N, D, *strides,
        **given, **settings(x, tau, D, normalize, cross),
    )  # fmt: skip
    return dx, zdz

"""The gradient of rows of more than 512 features, with both matrix products by the vendor's library (torch.bmm).

A program of `large.py` keeps dz of its rows in registers, at most 256 features at a time, and computes S again for
every 256 features. For many features, the library is faster, although blocks of S then go through memory.

    S = z_r z^T for a block of rows r                                    torch.bmm
    W_ij = exp S_ij (alpha_i + alpha_j), 0 if j is not a candidate       weights_kernel
    dz_r = W z                                                           torch.bmm
    dx from dz, the positives and the projection                         wide_join_kernel

This is used only where exp S cannot overflow ("bounded"). Elsewhere, S must have the same bits as in the forward.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue import factors, gradient_scale, inverse_of, narrowed, power_of_two, scaled
from .large import LOG2E, factor_at, features, largest_exponent, partners_of, precision, to_tf32
from .sets import INTERPRETED, accumulator, cdiv, launch

NARROWEST = 512  # used for rows with more features than this
ENTRIES = 1 << 23  # entries of S at a time, which take a few dozen MiB
FEWEST = 256  # but at least this many rows at a time, even if they have more entries


@triton.jit(do_not_specialize=["V", "N", "first_group", "first_row", "first_column", "columns_per_program", "blocks"])
def weights_kernel(
    s, w, tau, limit, alpha, exponents, V, N, NP, first_group, first_row, first_column, rows, columns,
    columns_per_program, blocks, TENSOR: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BI: tl.constexpr, BOOST: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """The weights w from the cosines s: [groups, rows, columns]. rows and columns are whole tiles.

    exponents: one for every BI rows; the other arguments are those of `gradient_kernel`.
    """
    inverse_tau = inverse_of(tau, TENSOR, ACC)
    if not (inverse_tau <= limit):
        return
    spans = tl.cdiv(columns, columns_per_program)
    begin = (tl.program_id(0) // spans % (rows // BM)) * BM
    k = tl.program_id(0) // spans // (rows // BM)
    span = (tl.program_id(0) % spans) * columns_per_program
    g = k.to(tl.int64) + first_group
    a = (first_row + begin) // NP
    i = (first_row + begin) % NP + tl.arange(0, BM)
    top = largest_exponent(exponents + g * V * V * blocks, V * V * blocks, BE)
    scale = inverse_tau * LOG2E
    line = (k.to(tl.int64) * rows + begin + tl.arange(0, BM))[:, None] * columns
    for start in range(span, tl.minimum(span + columns_per_program, columns), BN):
        c = (first_column + start) // NP
        j = (first_column + start) % NP + tl.arange(0, BN)
        row_block = (g * V + a) * V + c
        column_block = (g * V + c) * V + a
        row_factor = factor_at(exponents + row_block * blocks + i // BI, top, ACC)
        column_factor = factor_at(exponents + column_block * blocks + j // BI, top, ACC)
        of_rows = tl.load(alpha + row_block * N + i, mask=i < N, other=0.0) * row_factor
        of_columns = tl.load(alpha + column_block * N + j, mask=j < N, other=0.0) * column_factor
        at = line + tl.multiple_of(start, BN) + tl.arange(0, BN)[None, :]
        e = tl.exp2(tl.load(s + at) * scale)
        weight = e * ((of_rows[:, None] + of_columns[None, :]) * BOOST)
        candidate = (i[:, None] != j[None, :]) & (i < N)[:, None] & (j < N)[None, :]
        weight = tl.where(candidate, weight, 0.0)
        if PRECISION == "tf32":
            weight = to_tf32(weight)
        tl.store(w + at, weight.to(w.dtype.element_ty))


@triton.jit
def features_of_dz(
    dz, z, beta, exponents, d, begin, a, g, top, V, N, NP, blocks,
    CROSS: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, DP: tl.constexpr, BOOST: tl.constexpr,
):  # fmt: skip
    """Features d of the gradient dz of BM unit rows: the products' result, and the positives with unrounded weights."""
    i = begin + tl.arange(0, BM)
    part = features(dz + ((g * V + a) * NP + begin) * DP, d, BM, DP, False) * (1.0 / BOOST)
    first, last = partners_of(a, V, CROSS)
    for c in range(first, last):
        if c != a:
            row_block = (g * V + a) * V + c
            column_block = (g * V + c) * V + a
            to_row = factor_at(exponents + row_block * blocks + i // BI, top, ACC)
            to_column = factor_at(exponents + column_block * blocks + i // BI, top, ACC)
            weight = tl.load(beta + row_block * N + i, mask=i < N, other=0.0) * to_row
            weight += tl.load(beta + column_block * N + i, mask=i < N, other=0.0) * to_column
            partners = features(z + ((g * V + c) * NP + begin) * DP, d, BM, DP, False)
            part += weight[:, None] * partners.to(ACC)
    return part


@triton.jit(do_not_specialize=["G", "V", "N", "blocks"])
def wide_join_kernel(
    z, tau, limit, norms, beta, exponents, dz, dx, zdz, G, V, N, NP, D, blocks, TENSOR: tl.constexpr,
    CROSS: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
    BOOST: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dx: [V, G, N, D] and zdz: [G, V, N] from dz: [G, V, NP, DP], for unit rows. A program computes BM rows."""
    inverse_tau = inverse_of(tau, TENSOR, ACC)
    if not (inverse_tau <= limit):
        return
    begin = (tl.program_id(0) % (NP // BM)) * BM
    a = (tl.program_id(0) // (NP // BM)) % V
    g = (tl.program_id(0) // (NP // BM) // V).to(tl.int64)
    i = begin + tl.arange(0, BM)
    z_i = z + ((g * V + a) * NP + begin) * DP
    top = largest_exponent(exponents + g * V * V * blocks, V * V * blocks, BE)
    along = tl.zeros([BM], ACC)
    for start in range(0, DP, BK):
        d = start + tl.arange(0, BK)
        part = features_of_dz(
            dz, z, beta, exponents, d, begin, a, g, top, V, N, NP, blocks, CROSS, ACC, BM, BI, DP, BOOST
        )  # fmt: skip
        along += tl.sum(features(z_i, d, BM, DP, False).to(ACC) * part, 1)
    unit = power_of_two(top)
    tl.store(zdz + (g * V + a) * N + i, along.to(tl.float64) * (unit * inverse_tau.to(tl.float64)), mask=i < N)
    norm = tl.load(norms + (g * V + a) * NP + i)
    one, other = factors(gradient_scale(norm, unit, inverse_tau, True), ACC)
    to = dx + (a.to(tl.int64) * G + g) * N * D + i.to(tl.int64)[:, None] * D
    for start in range(0, DP, BK):
        d = start + tl.arange(0, BK)
        part = features_of_dz(
            dz, z, beta, exponents, d, begin, a, g, top, V, N, NP, blocks, CROSS, ACC, BM, BI, DP, BOOST
        )  # fmt: skip
        part -= features(z_i, d, BM, DP, False).to(ACC) * along[:, None]
        gradient = narrowed(scaled(part, norm, one, other), dx.dtype.element_ty)
        tl.store(to + d[None, :], gradient, mask=(i < N)[:, None] & (d < D)[None, :])


def serves(D: int, V: int, normalize: bool, cross: bool) -> bool:
    """Whether to use this module. It needs unit rows, which are bounded, and a second half of the sets if `cross`."""
    return D > NARROWEST and normalize and not (cross and V == 1)


def chunks(G: int, V: int, NP: int, cross: bool, step: int) -> Iterator[tuple[slice, slice, slice]]:
    """(groups, rows, columns) of every product: several whole groups, or some rows of one group, a multiple of step."""
    half = (V + 1) // 2
    sides = [((0, half), (half, V)), ((half, V), (0, half))] if cross else [((0, V), (0, V))]
    for (first, last), (left, right) in sides:
        begin, end, columns = first * NP, last * NP, slice(left * NP, right * NP)
        width = (right - left) * NP
        rows = min(end - begin, max(FEWEST, ENTRIES // width) // step * step)
        groups = max(1, ENTRIES // (rows * width)) if rows == end - begin else 1
        for g in range(0, G, groups):
            for r in range(begin, end, rows):
                yield slice(g, min(g + groups, G)), slice(r, min(r + rows, end)), columns


def product(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The batched matrix product, accumulated and returned in `dtype`, which may be wider than that of the inputs."""
    if left.dtype == dtype:
        return torch.bmm(left, right, out=out)
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=dtype, out=out)
    return torch.bmm(left.to(dtype), right.to(dtype), out=out)


def gradient(
    z: Tensor, number: float | Tensor, limit: float, norms: Tensor, alpha: Tensor, beta: Tensor, exponents: Tensor,
    dx: Tensor, zdz: Tensor, cross: bool, step: int,
) -> None:  # fmt: skip
    """Computes dx and zdz for packed rows z: [G, V, NP, DP]. step divides NP; the others are as in `large.backward`."""
    G, V, NP, DP = z.shape
    N, D = dx.shape[2:]
    blocks, BI = exponents.shape[-1], NP // exponents.shape[-1]
    wide, rows_of = zdz.dtype, z.view(G, V * NP, DP)
    dz = zdz.new_empty(G, V * NP, DP)
    BM = min(step, 64) if INTERPRETED else 8  # the interpreter is faster with more rows
    how: dict[str, Any] = dict(
        TENSOR=isinstance(number, torch.Tensor), ACC=accumulator(z), BI=BI,
        BOOST=8192.0 if z.dtype == torch.float16 else 1.0, BE=1024, num_warps=4,
    )  # fmt: skip
    for groups, rows, columns in chunks(G, V, NP, cross, step):
        left, right = rows_of[groups, rows], rows_of[groups, columns]
        s = product(left, right.mT, wide)
        w = s if z.dtype == wide else torch.empty_like(s, dtype=z.dtype)
        k, n, m = s.shape
        BN = min(NP & -NP, 256)  # divides NP, so that a tile has columns of one set only
        span = BN * max(1, 512 // BN)
        launch(
            weights_kernel, k * (n // BM) * cdiv(m, span), s, w, number, limit, alpha, exponents, V, N, NP,
            groups.start, rows.start, columns.start, n, m, span, blocks, BM=BM, BN=BN,
            PRECISION=precision(z.dtype, True, DP), **how,
        )  # fmt: skip
        product(w, right, wide, dz[groups, rows])
    BK = min(DP & -DP, 256)
    launch(
        wide_join_kernel, G * V * (NP // BM), z, number, limit, norms, beta, exponents, dz, dx, zdz, G, V, N, NP, D,
        blocks, CROSS=cross, BM=BM, DP=DP, BK=BK, **how,
    )  # fmt: skip

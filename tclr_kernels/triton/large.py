"""Few large groups: the Gram matrix is computed by tiles and never stored, and only half of it if it is symmetric.

    rows          z = x / |x|, packed and padded to whole tiles: N rows to NP, D features to DP
    sums          sum_j exp S[(a,i),(c,j)] over j != i, and pos[a,c,i] = S[(a,i),(c,i)]
    finish        neg = log of the sums, and term
    coefficients  alpha = g_neg, or g_neg exp(-neg) in the bounded case, and beta = g_pos
    gradient      dz_(a,i) = 1/tau sum_(c,j) exp S (alpha_i + alpha_j) z_j + 1/tau sum_c (g_pos_ac + g_pos_ca) z_(c,i)
    join          adds up partial dz, if there are few rows and several programs share the columns of a row

"Bounded" means that rows have length one and 1/tau <= LIMIT. Then |S| <= LIMIT, so exp S and its sums cannot overflow,
and the kernels sum exp S itself. Otherwise they keep the largest S and a sum relative to it, and the gradient needs two
exponentials for each S.

In the sums kernel, each program has two super-blocks, which are parts of a set. It adds up the sums of its tiles in a
fixed order, and writes them to slots that no other program writes, so results are deterministic. In the bounded case
it adds exp S of a tile to both the rows' and the columns' sums. Otherwise, rows and columns would need an exponential
each, so S is computed twice instead, once for either side.

Unit rows of half precision are stored as float16, which is as fast as bfloat16 and more exact (11 bits instead of 8).
Unit rows of float32 are stored as sums of two float16 ("pairs") unless TF32 is used. A product then takes three
products of float16, which on tensor cores are many times as fast as float32 arithmetic and nearly as exact.

Triton compiles a kernel again when an int argument is 1 (which then becomes a constant) or divisible by 16, except for
the arguments in do_not_specialize. N, G and D are not listed there in kernels that would spill registers otherwise.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tclr_kernels.checks import tf32_allowed

from . import tiles, tuning
from .epilogue import (
    exists,
    exponent_of,
    factors,
    finite_size,
    gradient_scale,
    inverse_length,
    inverse_of,
    largest_entry,
    log1p,
    narrowed,
    pair_gradients,
    power_of_two,
    scaled,
    start_of,
    term_of,
    widened,
)
from .sets import INTERPRETED, accumulator, cdiv, launch, one_array, temperature, upstream
from .tiles import Tile

LIMITS = {torch.float32: 60.0, torch.float64: 300.0}  # largest 1 / tau for which exp S and its sums cannot overflow
LOG2E = tl.constexpr(1.4426950408889634)
UNIT = tl.constexpr(4096.0)  # factor of pairs, so that only very small features have a subnormal lower float16
RUN = tl.constexpr(64)  # consecutive features that go to the same half of dz
WIDEST = tl.constexpr(128)  # the most features in a part of a row whose length is not a power of two


@triton.jit
def to_tf32(x):
    """x rounded to the nearest TF32 number.

    The tensor cores ignore the last 13 bits of a float32, so without rounding every operand would be too small.
    """
    rounded = ((x.to(tl.int32, bitcast=True) + (1 << 12)) & -(1 << 13)).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < 3.4e38, rounded, x)  # keeps NaN, infinity, and numbers that would round to infinity


@triton.jit(do_not_specialize=["V", "N", "inner"])
def rows_kernel(
    x, z, u, norms, V, N, NP, D, lower: tl.int64, inner, stride_w: tl.int64, stride_v: tl.int64, stride_g, stride_n,
    stride_d, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, BR: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """z: [G, V, NP, DP], padded with zeros, and norms: [G, V, NP]. x: V sets [G, N, D], as `one_array` returns them.

    With pairs, also u: UNIT * z in float16 and, from offset `lower` on, the rounding error of that in float16.
    """
    block = tl.program_id(0).to(tl.int64) * BR
    i = (block % NP).to(tl.int32) + tl.arange(0, BR)
    a = (block // NP) % V
    g = block // NP // V
    d = tl.arange(0, BD)
    offsets = i.to(tl.int64)[:, None] * stride_n + d.to(tl.int64)[None, :] * stride_d
    first = x + g * stride_g + start_of(a, inner, stride_w, stride_v)
    values = tl.load(first + offsets, mask=(i < N)[:, None] & (d < D)[None, :], other=0.0)
    to = z + (block + tl.arange(0, BR))[:, None] * DP + d[None, :]
    if NORMALIZE:
        scale = tl.full([BR], 1.0, tl.float64)
        if x.dtype.element_ty == tl.float64:
            scale = largest_entry(values)
        wide = widened(values, scale)
        squares = tl.sum(wide * wide, 1)
        tl.store(norms + block + tl.arange(0, BR), scale * tl.sqrt(squares))
        values = narrowed(wide * inverse_length(squares)[:, None], z.dtype.element_ty)
    if PRECISION == "tf32":
        values = to_tf32(values)
    tl.store(to, values, mask=(d < DP)[None, :])
    if PRECISION == "pairs":
        high, low = halves_of(values * UNIT)
        to = u + (block + tl.arange(0, BR))[:, None] * DP + d[None, :]
        tl.store(to, high, mask=(d < DP)[None, :])
        tl.store(to + lower, low, mask=(d < DP)[None, :])


@triton.jit
def halves_of(x):
    """A float32 as a sum of two float16, exact to 22 bits if it is between 2^-14 and 65504."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def features(z, d, ROWS: tl.constexpr, DP: tl.constexpr, UPCAST: tl.constexpr, AGAIN: tl.constexpr = False):
    """Features d of ROWS rows. z: a pointer to the first row.

    UPCAST: convert to float32, since the interpreter computes wrongly in bfloat16.
    AGAIN: read them from memory again, so that the compiler does not keep an earlier read in registers.
    """
    x = tl.load(z + (tl.arange(0, ROWS)[:, None] * DP + d[None, :]), cache_modifier=".cg" if AGAIN else "")
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def operand(u, lower, d, ROWS: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Features d of ROWS rows as an operand of `plus_product`: one tensor, or two with pairs."""
    high = features(u, d, ROWS, DP, UPCAST)
    return (high, features(u + lower, d, ROWS, DP, UPCAST)) if PRECISION == "pairs" else (high,)


@triton.constexpr_function
def part_count(size):
    """The number of tensors for `size` features: a tensor has a power of two of them, so other sizes take several."""
    return 1 if size & (size - 1) == 0 else -(-size // WIDEST.value)


@triton.constexpr_function
def part_width(size, part):
    return size if size & (size - 1) == 0 else min(WIDEST.value, size - part * WIDEST.value)


@triton.jit
def operands(
    u, lower, size: tl.constexpr, ROWS: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):
    """The first `size` features of ROWS rows as operands of products, one for each part."""
    made = ()
    for k in tl.static_range(part_count(size)):
        d = tl.arange(0, part_width(size, k))
        made = made + (operand(u + k * WIDEST, lower, d, ROWS, DP, PRECISION, UPCAST),)
    return made


@triton.jit
def zero_parts(size: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr):
    made = ()
    for k in tl.static_range(part_count(size)):
        made = made + (tl.zeros([ROWS, part_width(size, k)], ACC),)
    return made


@triton.jit
def times(parts, factor):
    made = ()
    for k in tl.static_range(len(parts)):
        made = made + (parts[k] * factor,)
    return made


@triton.jit
def plus_product(total, left, right, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """total + left @ right. With pairs, the product of the two lower halves is left out: it is below rounding.

    The tensor cores truncate sums. So with pairs, each product is summed from 0, and added to the total outside of
    the tensor cores, with proper rounding.
    """
    if PRECISION == "pairs":
        small = tl.dot(left[1], right[0], out_dtype=ACC)
        small = tl.dot(left[0], right[1], small, out_dtype=ACC)
        total += tl.dot(left[0], right[0], small, out_dtype=ACC)
    else:
        total = tl.dot(left[0], right[0], total, input_precision=PRECISION, out_dtype=ACC)
    return total


@triton.jit
def plus_products(totals, left, rights, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """total + left @ right for each part."""
    made = ()
    for k in tl.static_range(len(totals)):
        made = made + (plus_product(totals[k], left, rights[k], PRECISION, ACC),)
    return made


@triton.jit
def as_operand(w, dtype: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Weights as an operand of a product with rows of this dtype."""
    if PRECISION == "pairs":
        made = halves_of(w)
    elif PRECISION == "tf32":
        made = (to_tf32(w),)
    elif UPCAST:
        made = (w,)
    else:
        made = (w.to(dtype),)
    return made


@triton.jit
def transposed(x, PRECISION: tl.constexpr):
    return (tl.trans(x[0]), tl.trans(x[1])) if PRECISION == "pairs" else (tl.trans(x[0]),)


@triton.jit
def cosines(
    u_i, u_j, lower_i, lower_j, rows, columns, BM: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """<u_i, u_j>: [BM, BN]. u_i, u_j: pointers to rows and columns; rows, columns: their operands, used if BK = DP."""
    s = tl.zeros([BM, BN], ACC)
    if BK == DP:
        s = plus_product(s, rows[0], transposed(columns[0], PRECISION), PRECISION, ACC)
        one = tl.full([BM, BN], 1.0, ACC)
        for k in tl.static_range(1, len(rows)):
            more = plus_product(tl.zeros([BM, BN], ACC), rows[k], transposed(columns[k], PRECISION), PRECISION, ACC)
            # Of a plain sum, Triton makes a chain, which each half of the warps computes whole.
            s = tl.fma(more, one, s)
    else:
        for d0 in range(0, DP, BK):
            left = operand(u_i + d0, lower_i, tl.arange(0, BK), BM, DP, PRECISION, UPCAST)
            right = operand(u_j + d0, lower_j, tl.arange(0, BK), BN, DP, PRECISION, UPCAST)
            s = plus_product(s, left, transposed(right, PRECISION), PRECISION, ACC)
    return s


@triton.jit
def exponential(t):
    """exp t. If t is a difference, it must be taken before the scaling by log2 e, which would round large terms."""
    return tl.exp2(t * LOG2E)


@triton.jit
def of_product(x, PRECISION: tl.constexpr):
    """x, divided by UNIT^2 with pairs: the factor for a product of two operands instead of two unit rows."""
    return x * (1.0 / (UNIT * UNIT)) if PRECISION == "pairs" else x


@triton.jit
def rounded(cosine, inverse_tau):
    """S, rounded to its dtype, as neg and pos were computed from it.

    Without this, the compiler could fuse the product with the subtraction in exp(S - neg). S would then differ from the
    rounded one by its rounding error, and the gradient of a large logit would be wrong in its third digit.
    """
    return tl.fma(cosine, tl.zeros_like(cosine) + inverse_tau, 0.0)


@triton.jit
def finite(largest):
    """The offset of a sum of exponentials: the largest S, or 0 if all of them are -inf."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def merged(largest, total, m, s):
    """The sum of total * exp(largest) and s * exp(m), again as a pair (largest, total)."""
    top = tl.maximum(largest, m)
    offset = finite(top)
    return top, total * exponential(largest - offset) + s * exponential(m - offset)


@triton.jit
def pair_of_supers(program, supers, left, CROSS: tl.constexpr):
    """The super-blocks p <= q of a program, or q = -1 if it has none. left: how many the first half of the sets has"""
    if CROSS:
        p = program % left
        q = left + program // left
    else:  # arranged in a ring, each one is paired with itself and with the half of the others that follow it
        one = program % supers
        step = program // supers
        other = (one + step) % supers
        p = tl.minimum(one, other)
        q = tl.maximum(one, other)
        q = tl.where((step * 2 == supers) & (one >= step), -1, q)
    return p, q


@triton.jit
def ordered_supers(program, supers, left, CROSS: tl.constexpr):
    """The super-block of rows p and that of columns q of a program, for all pairs in both orders."""
    if CROSS:
        right = supers - left
        turned = program >= left * right
        k = program - tl.where(turned, left * right, 0)
        p = tl.where(turned, left + k // left, k % left)
        q = tl.where(turned, k % left, left + k // left)
    else:
        p = program % supers
        q = program // supers
    return p, q


@triton.jit
def negatives(s, begin, start, N, BM: tl.constexpr, BN: tl.constexpr):
    """The cosines of a tile, with -inf where row and column have the same index or one of them is padding."""
    i = tl.arange(0, BM)
    j = tl.arange(0, BN) + (start - begin)
    last = N - begin
    return tl.where((i[:, None] != j[None, :]) & (i < last)[:, None] & (j < last)[None, :], s, float("-inf"))


@triton.jit
def has_others(begin, start, N, BM: tl.constexpr, BN: tl.constexpr):
    """Whether a tile has entries that are not negatives: those of the same index, or padding."""
    return ((start < begin + BM) & (begin < start + BN)) | (begin + BM > N) | (start + BN > N)


@triton.jit
def store_positives(
    z, pos, first, end, a, c, g, V, N, NP, inverse_tau, ACC: tl.constexpr, BM: tl.constexpr, DP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """pos of the rows first .. end of the sets a and c."""
    BD: tl.constexpr = 32 if DP % 32 == 0 else 16
    for begin in range(first, end, BM):
        i = begin + tl.arange(0, BM)
        positive = tl.zeros([BM], ACC)
        for d0 in range(0, DP, BD):
            left = features(z + ((g * V + a) * NP + begin) * DP + d0, tl.arange(0, BD), BM, DP, UPCAST)
            right = features(z + ((g * V + c) * NP + begin) * DP + d0, tl.arange(0, BD), BM, DP, UPCAST)
            positive += tl.sum(left.to(ACC) * right.to(ACC), 1)
        positive *= inverse_tau
        tl.store(pos + ((g * V + a) * V + c) * N + i, positive, mask=i < N)
        tl.store(pos + ((g * V + c) * V + a) * N + i, positive, mask=i < N)


SUPERS = ["V", "supers", "left", "supers_per_set", "programs"]


@triton.jit(do_not_specialize=SUPERS)
def sums_kernel(
    z, u, lower: tl.int64, tau, limit, sums, pos, V, N, NP, supers, left, supers_per_set, rows_per_super, programs,
    TENSOR: tl.constexpr, CROSS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """sums: [G, supers, V, NP]; slot x of a row has sum exp S over its candidates in super-block x.

    A super-block is rows_per_super rows, a multiple of BM and BN, or the rest of its set. The outer loop is over the
    columns of a tile, the inner loop over its rows. So the columns' sums stay in registers, one number for each entry
    of a tile (HELD), which are added up after the inner loop; the rows' sums are added up in memory. If the features
    are read in parts, the registers are needed for the products, and each tile's column sums are formed at once.
    """
    HELD: tl.constexpr = BK == DP
    inverse_tau = inverse_of(tau, TENSOR, ACC)
    if not (inverse_tau <= limit):
        return
    g = tl.program_id(0).to(tl.int64) // programs
    p, q = pair_of_supers(tl.program_id(0) % programs, supers, left, CROSS)
    if q < 0:
        return
    a = p // supers_per_set
    c = q // supers_per_set
    first_i = (p % supers_per_set) * rows_per_super
    first_j = (q % supers_per_set) * rows_per_super
    end_i = tl.minimum(first_i + rows_per_super, N)
    end_j = tl.minimum(first_j + rows_per_super, N)
    M = V * NP
    first_row = g * M + a * NP
    first_column = g * M + c * NP
    to_rows = sums + ((g * supers + q) * M + a * NP)
    to_columns = sums + ((g * supers + p) * M + c * NP)
    scale = of_product(inverse_tau, PRECISION) * LOG2E

    if (a < c) & (first_i == first_j):
        store_positives(z, pos, first_i, end_i, a, c, g, V, N, NP, inverse_tau, ACC, BM, DP, UPCAST)
    for start in range(first_j, end_j, BN):
        j = start + tl.arange(0, BN)
        u_j = u + (first_column + start) * DP
        columns = operands(u_j, lower, BK, BN, DP, PRECISION, UPCAST)
        column_sums = tl.zeros([BM, BN] if HELD else [BN], ACC)
        again = tl.where(start > first_j, NP, 0)
        for begin in range(first_i, end_i, BM):
            i = begin + tl.arange(0, BM)
            row_sum = tl.load(to_rows + i, mask=i < again, other=0.0)
            u_i = u + (first_row + begin) * DP
            rows = operands(u_i, lower, BK, BM, DP, PRECISION, UPCAST)
            s = cosines(u_i, u_j, lower, lower, rows, columns, BM, BN, DP, BK, ACC, PRECISION, UPCAST)
            if has_others(begin, start, N, BM, BN):
                s = negatives(s, begin, start, N, BM, BN)
            e = tl.exp2(s * scale)
            column_sums += e if HELD else tl.sum(e, 0)
            tl.store(to_rows + i, row_sum + tl.sum(e, 1))
        if HELD:
            column_sums = tl.sum(column_sums, 0)
        # if p = q, the columns are the rows, whose sums are complete
        tl.store(to_columns + j, column_sums, mask=j < tl.where(p != q, NP, 0))
        tl.debug_barrier()  # in the next pass, other threads may read the rows' sums


@triton.jit(do_not_specialize=SUPERS)
def unbounded_sums_kernel(
    z, u, lower: tl.int64, tau, limit, sums, largest, pos, V, N, NP, supers, left, supers_per_set, rows_per_super,
    programs, TENSOR: tl.constexpr, CROSS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """sums, largest: [G, supers, V, NP]; as in sums_kernel, but each sum is relative to exp of the largest S.

    The columns' sums would need other exponentials than the rows' sums, so each pair of super-blocks is visited twice,
    with the rows of either one.
    """
    inverse_tau = inverse_of(tau, TENSOR, ACC)
    if inverse_tau <= limit:
        return
    g = tl.program_id(0).to(tl.int64) // programs
    p, q = ordered_supers(tl.program_id(0) % programs, supers, left, CROSS)
    a = p // supers_per_set
    c = q // supers_per_set
    first_i = (p % supers_per_set) * rows_per_super
    first_j = (q % supers_per_set) * rows_per_super
    end_i = tl.minimum(first_i + rows_per_super, N)
    end_j = tl.minimum(first_j + rows_per_super, N)
    M = V * NP
    slot = (g * supers + q) * M + a * NP

    if (a < c) & (first_i == first_j):
        store_positives(z, pos, first_i, end_i, a, c, g, V, N, NP, inverse_tau, ACC, BM, DP, UPCAST)
    for begin in range(first_i, end_i, BM):
        i = begin + tl.arange(0, BM)
        u_i = u + (g * M + a * NP + begin) * DP
        rows = operands(u_i, lower, BK, BM, DP, PRECISION, UPCAST)
        total = tl.zeros([BM], ACC)
        top = tl.full([BM], float("-inf"), ACC)
        for start in range(first_j, end_j, BN):
            u_j = u + (g * M + c * NP + start) * DP
            columns = operands(u_j, lower, BK, BN, DP, PRECISION, UPCAST)
            s = cosines(u_i, u_j, lower, lower, rows, columns, BM, BN, DP, BK, ACC, PRECISION, UPCAST)
            if has_others(begin, start, N, BM, BN):
                s = negatives(s, begin, start, N, BM, BN)
            s = rounded(s, of_product(inverse_tau, PRECISION))
            higher = tl.maximum(top, tl.max(s, 1))
            offset = finite(higher)
            total = total * exponential(top - offset) + tl.sum(exponential(s - offset[:, None]), 1)
            top = higher
        tl.store(sums + slot + i, total)
        tl.store(largest + slot + i, top)


@triton.jit
def log_of_slots(sums, largest, first, M, supers, BI: tl.constexpr, SLOTS: tl.constexpr):
    """neg of BI rows in float64, from the slots first, first + M, ...; -inf where first is negative."""
    total = tl.zeros([BI], tl.float64)
    top = tl.full([BI], float("-inf"), tl.float64)
    for x0 in range(0, supers, SLOTS):
        x = x0 + tl.arange(0, SLOTS)
        at = first[None, :] + x.to(tl.int64)[:, None] * M
        there = (x < supers)[:, None] & (first >= 0)[None, :]
        s = tl.load(sums + at, mask=there, other=0.0).to(tl.float64)
        m = tl.load(largest + at, mask=there, other=float("-inf")).to(tl.float64)
        highest = tl.max(m, 0)
        # Rounded products: fused with another lane's product, the lanes of a row would get different last bits.
        products = tl.fma(s, exponential(m - finite(highest)[None, :]), 0.0)
        top, total = merged(top, total, highest, tl.sum(products, 0))
    return tl.log(total) + finite(top)


@triton.jit
def sum_of_slots(sums, first, M, supers, BI: tl.constexpr, SLOTS: tl.constexpr):
    """The sums over the slots first, first + M, ... of BI rows, in float64; 0 where first is negative."""
    total = tl.zeros([BI], tl.float64)
    for x0 in range(0, supers, SLOTS):
        x = x0 + tl.arange(0, SLOTS)
        there = (x < supers)[:, None] & (first >= 0)[None, :]
        total += tl.sum(tl.load(sums + first[None, :] + x.to(tl.int64)[:, None] * M, mask=there, other=0.0), 0)
    return total


@triton.jit(do_not_specialize=["count", "V", "N", "supers", "supers_per_set"])
def finish_kernel(
    sums, largest, tau, limit, term, neg, pos, count, V, N, NP, supers, supers_per_set,
    TENSOR: tl.constexpr, CROSS: tl.constexpr, ACC: tl.constexpr, BI: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """neg and term / count: [G, V, V, N], from the slots and pos. Writes 0 to pos in blocks without pairs.

    In the bounded case, slots are added up, and neg and the term take one logarithm each. Otherwise, each slot takes
    an exponential in float64.
    """
    blocks = tl.cdiv(N, BI)
    block = tl.program_id(0)
    i = (block % blocks) * BI + tl.arange(0, BI)
    c = (block // blocks) % V
    a = (block // blocks // V) % V
    g = (block // blocks // V // V).to(tl.int64)
    M = V * NP
    there = exists(a, c, V, CROSS)
    paired = there & (a != c)
    first = g * supers * M + a * NP + i
    step = supers_per_set.to(tl.int64) * M
    from_slots = tl.where(i < tl.where(there, N, 0), first + c * step, -1)
    from_own = tl.where(i < tl.where(paired, N, 0), first + a * step, -1)
    at = ((g * V + a) * V + c) * N + i
    positive = tl.load(pos + at, mask=i < tl.where(paired, N, 0), other=0.0).to(tl.float64)
    if inverse_of(tau, TENSOR, ACC) <= limit:
        total = sum_of_slots(sums, from_slots, M, supers_per_set, BI, SLOTS)
        value = tl.log(total)
        if not CROSS:
            total += sum_of_slots(sums, from_own, M, supers_per_set, BI, SLOTS)
        loss = log1p(total * tl.exp(-positive))
    else:
        value = log_of_slots(sums, largest, from_slots, M, supers_per_set, BI, SLOTS)
        own = value
        if not CROSS:
            own = log_of_slots(sums, largest, from_own, M, supers_per_set, BI, SLOTS)
        loss = term_of(own, value, positive, CROSS)
    loss = tl.where(N > 1, loss, positive - positive) / count
    tl.store(neg + at, value, mask=i < N)
    tl.store(pos + at, positive, mask=i < N)
    tl.store(term + at, tl.where(paired, loss, 0.0), mask=i < N)


@triton.jit
def store_scaled(for_neg, for_pos, alpha, beta, to_exponent, at, damping, mask):
    """Stores the gradients of neg and pos, divided by a power of two, since they may be too small for float32.

    damping: another factor of alpha, exp(-neg) in the bounded case.
    """
    exponent = exponent_of(tl.maximum(tl.max(finite_size(for_neg), 0), tl.max(finite_size(for_pos), 0)))
    shrink = power_of_two(-exponent)
    tl.store(alpha + at, tl.where(for_neg == 0, 0.0, for_neg * shrink * damping), mask=mask)
    tl.store(beta + at, for_pos * shrink, mask=mask)
    tl.store(to_exponent, exponent)


@triton.jit(do_not_specialize=["count", "V", "N", "blocks"])
def coefficients_kernel(
    neg, tau, limit, pos, g_term, g_neg, g_pos, alpha, beta, exponents, count, V, N, blocks,
    TENSOR: tl.constexpr, CROSS: tl.constexpr, ACC: tl.constexpr, TERM: tl.constexpr, NEG: tl.constexpr,
    POS: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """alpha from g_neg, and beta from g_pos: [G, V, V, N], in units of 2^exponents: [G, V, V, blocks of BI rows]"""
    inverse_tau = inverse_of(tau, TENSOR, ACC)
    bounded = (inverse_tau <= limit).to(tl.float64)
    block = tl.program_id(0) % blocks
    i = block * BI + tl.arange(0, BI)
    a = (tl.program_id(0) // blocks) % V
    g = (tl.program_id(0) // blocks // V).to(tl.int64)
    first = (g * V + a) * V
    to_own = (first + a) * N + i
    own = tl.load(neg + to_own, mask=i < N, other=0.0).to(tl.float64)
    for_own = tl.zeros([BI], tl.float64)
    if NEG:
        for_own += tl.load(g_neg + to_own, mask=i < (0 if CROSS else N), other=0.0).to(tl.float64)
    for c in range(V):
        if c != a:
            at = (first + c) * N + i
            there = i < tl.where(exists(a, c, V, CROSS), N, 0)
            for_neg, for_pos, more = pair_gradients(
                neg, pos, g_term, g_neg, g_pos, count, own, at, there, TERM, NEG, POS, CROSS
            )  # fmt: skip
            for_own += more
            value = tl.load(neg + at, mask=there, other=0.0).to(tl.float64)
            to_exponent = exponents + (first + c) * blocks + block
            store_scaled(for_neg, for_pos, alpha, beta, to_exponent, at, tl.exp(-value * bounded), i < N)
    none = tl.zeros([BI], tl.float64)
    to_exponent = exponents + (first + a) * blocks + block
    store_scaled(for_own, none, alpha, beta, to_exponent, to_own, tl.exp(-own * bounded), i < N)


@triton.jit
def largest_exponent(exponents, count, BE: tl.constexpr):
    top = tl.full([BE], -1000, tl.int32)
    for start in range(0, count, BE):
        k = start + tl.arange(0, BE)
        top = tl.maximum(top, tl.load(exponents + k, mask=k < count, other=-1000))
    return tl.max(top, 0)


@triton.jit
def factor_at(exponents, top, ACC: tl.constexpr):
    """2^(exponent - top), or 0 if that is below the range of ACC. exponents: pointers to int32 <= top"""
    exponent = tl.load(exponents) - top
    if tl.float64 == ACC:
        factor = tl.where(exponent < -1000, 0.0, power_of_two(tl.maximum(exponent, -1000)))
    else:
        factor = (tl.maximum(exponent + 127, 0) << 23).to(tl.float32, bitcast=True)
    return factor


@triton.jit
def weights_of(alpha, neg, at, mask, factor, BOUNDED: tl.constexpr):
    """scale and shift of some anchors, whose weights are W = scale * exp(S - shift).

    If scale is 0, shift is inf, so that W is 0 even if neg is -inf.
    """
    scale = tl.load(alpha + at, mask=mask, other=0.0) * factor
    if BOUNDED:
        shift = scale
    else:
        value = tl.load(neg + at, mask=mask, other=float("inf"))
        shift = tl.where(scale == 0, float("inf"), value)
    return scale, shift


@triton.jit
def partners_of(a, V, CROSS: tl.constexpr):
    """The range of sets with which set a is compared."""
    first = a * 0
    last = V
    if CROSS:
        half = (V + 1) // 2
        first = tl.where(a < half, half, 0)
        last = tl.where(a < half, V, half)
    return first, last


@triton.jit
def halved(dz, BM: tl.constexpr, DC: tl.constexpr):
    """Splits the DC features of dz in two: every other run of RUN features, and the rest. No data leaves its thread."""
    dz = tl.reshape(dz, [BM, DC // (2 * RUN), 2, RUN])
    one, other = tl.split(tl.permute(dz, (0, 1, 3, 2)))
    return tl.reshape(one, [BM, DC // 2]), tl.reshape(other, [BM, DC // 2])


@triton.jit
def features_of(part, DC: tl.constexpr, HALVES: tl.constexpr):
    """The features in a part of dz; HALVES: in one of the two results of `halved`."""
    d = tl.arange(0, DC // 2 if HALVES else part_width(DC, part))
    return d // RUN * (2 * RUN) + d % RUN + part * RUN if HALVES else d + part * WIDEST


@triton.jit
def store_gradient(
    dz, along, chunk, begin, a, g, top, inverse_tau, z, norms, pos, beta, exponents, dx, zdz, G, V, N, NP, D, blocks,
    NORMALIZE: tl.constexpr, CROSS: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DP: tl.constexpr, DC: tl.constexpr, HALVES: tl.constexpr, UPCAST: tl.constexpr, BOOST: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of some rows: adds the positives to the parts of dz of the negatives, and projects it."""
    i = begin + tl.arange(0, BM)
    z_i = z + ((g * V + a) * NP + begin) * DP
    parts = times(halved(dz[0], BM, DC) if HALVES else dz, 1.0 / BOOST)
    along *= 1.0 / BOOST
    first, last = partners_of(a, V, CROSS)
    for c in range(first, last):  # the positives, whose weights are not rounded to the dtype of products
        if c != a:
            row_block = (g * V + a) * V + c
            column_block = (g * V + c) * V + a
            to_row = factor_at(exponents + row_block * blocks + i // BN, top, ACC)
            to_column = factor_at(exponents + column_block * blocks + i // BN, top, ACC)
            weight = tl.load(beta + row_block * N + i, mask=i < N, other=0.0) * to_row
            weight += tl.load(beta + column_block * N + i, mask=i < N, other=0.0) * to_column
            z_c = z + ((g * V + c) * NP + begin) * DP
            added = ()
            for k in tl.static_range(len(parts)):
                partners = features(z_c + chunk, features_of(k, DC, HALVES), BM, DP, UPCAST)
                added = added + (parts[k] + weight[:, None] * partners.to(ACC),)
            parts = added
            if DC != DP:
                along += weight * (tl.load(pos + row_block * N + i, mask=i < N, other=0.0) / inverse_tau)

    if DC == DP:
        for k in tl.static_range(len(parts)):
            own = features(z_i, features_of(k, DC, HALVES), BM, DP, UPCAST, True)
            along += tl.sum(own.to(ACC) * parts[k], 1)
    unit = power_of_two(top)
    tl.store(
        zdz + (g * V + a) * N + i,
        along.to(tl.float64) * (unit * inverse_tau.to(tl.float64)),
        mask=i < tl.where(chunk == 0, N, 0),
    )
    norm = tl.full([BM], 1.0, tl.float64)
    if NORMALIZE:
        norm = tl.load(norms + (g * V + a) * NP + i)
    one, other = factors(gradient_scale(norm, unit, inverse_tau, NORMALIZE), ACC)
    to = dx + (a.to(tl.int64) * G + g) * N * D
    row = i.to(tl.int64)[:, None] * D
    for k in tl.static_range(len(parts)):
        d = chunk + features_of(k, DC, HALVES)
        gradient = parts[k]
        if NORMALIZE:
            gradient -= features(z_i, d, BM, DP, UPCAST, True).to(ACC) * along[:, None]
        gradient = narrowed(scaled(gradient, norm, one, other), dx.dtype.element_ty)
        tl.store(to + (row + d[None, :]), gradient, mask=(i < N)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["programs", "V", "blocks"])
def gradient_kernel(
    z, u, lower: tl.int64, tau, limit, norms, neg, pos, alpha, beta, exponents, partial, partial_along, dx, zdz,
    programs, columns_per_split, G, V, N, NP, D, blocks, BOUNDED: tl.constexpr, TENSOR: tl.constexpr,
    NORMALIZE: tl.constexpr, CROSS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr, DC: tl.constexpr, SPLIT: tl.constexpr, HALVES: tl.constexpr,
    UPCAST: tl.constexpr, BOOST: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dx: [V, G, N, D] and zdz: [G, V, N]. A program computes BM rows and DC of their features.

    SPLIT: a program has only columns_per_split candidates of every set. It stores its part of dz and <z, dz> for
    join_kernel, in partial: [splits, G, V, NP, DP] and partial_along: [splits, G, V, NP].
    blocks: the number of blocks of BN rows in a set, one for each of `exponents`.
    BOOST: a factor that keeps all but very small weights out of float16's subnormal range.
    HALVES: store dz in two halves, since dz and a read of as many features do not fit the registers together.
    """
    inverse_tau = inverse_of(tau, TENSOR, ACC)
    if (inverse_tau <= limit) != BOUNDED:
        return
    program = tl.program_id(0)
    split = 0
    start_j = 0
    end_j = N
    if SPLIT:
        split = program // programs
        program = program % programs
        start_j = tl.multiple_of(split * columns_per_split, BN)
        end_j = tl.minimum(start_j + columns_per_split, N)
    chunk = (program % (DP // DC)) * DC
    block = program // (DP // DC)
    begin = (block % (NP // BM)) * BM
    a = (block // (NP // BM)) % V
    g = (block // (NP // BM) // V).to(tl.int64)
    i = begin + tl.arange(0, BM)
    top = largest_exponent(exponents + g * V * V * blocks, V * V * blocks, BE)
    scale_s = of_product(inverse_tau, PRECISION)
    u_i = u + ((g * V + a) * NP + begin) * DP
    rows = operands(u_i, lower, BK, BM, DP, PRECISION, UPCAST)
    dz = zero_parts(DC, BM, ACC)
    along = tl.zeros([BM], ACC)  # <z, dz>, added up here if a program does not have all features of dz

    first, last = partners_of(a, V, CROSS)
    for c in range(first, last):
        row_block = (g * V + a) * V + c
        column_block = (g * V + c) * V + a
        row_factor = factor_at(exponents + row_block * blocks + i // BN, top, ACC) * BOOST
        row_scale, row_shift = weights_of(alpha, neg, row_block * N + i, i < N, row_factor, BOUNDED)
        for start in range(start_j, end_j, BN):
            j = start + tl.arange(0, BN)
            u_j = u + ((g * V + c) * NP + start) * DP
            columns = operands(u_j, lower, BK, BN, DP, PRECISION, UPCAST)
            cosine = cosines(u_i, u_j, lower, lower, rows, columns, BM, BN, DP, BK, ACC, PRECISION, UPCAST)
            factor = factor_at(exponents + column_block * blocks + start // BN, top, ACC) * BOOST
            scale, shift = weights_of(alpha, neg, column_block * N + j, j < N, factor, BOUNDED)
            if BOUNDED:
                w = tl.exp2(cosine * (scale_s * LOG2E)) * (row_scale[:, None] + scale[None, :])
            else:
                s = rounded(cosine, scale_s)
                w = exponential(s - row_shift[:, None]) * row_scale[:, None]
                w += exponential(s - shift[None, :]) * scale[None, :]
            if ((start < begin + BM) & (begin < start + BN)) | (start + BN > N):
                k = tl.arange(0, BN) + (start - begin)  # the weight of a padded row may be infinite
                w = tl.where((tl.arange(0, BM)[:, None] != k[None, :]) & (k < N - begin)[None, :], w, 0.0)
            if DC != DP:
                along += tl.sum(w * cosine, 1)
            if DC != DP or BK != DP:
                columns = operands(u_j + chunk, lower, DC, BN, DP, PRECISION, UPCAST)
            dz = plus_products(dz, as_operand(w, u.dtype.element_ty, PRECISION, UPCAST), columns, PRECISION, ACC)

    if PRECISION == "pairs":
        dz = times(dz, 1.0 / UNIT)
        along = of_product(along, PRECISION)
    if SPLIT:
        row = ((split * G + g) * V + a) * NP + begin
        k = tl.arange(0, BM)
        parts = halved(dz[0], BM, DC) if HALVES else dz
        for part in tl.static_range(len(parts)):
            d = features_of(part, DC, HALVES)
            tl.store(partial + (row * DP + chunk) + (k[:, None] * DP + d[None, :]), parts[part])
        if DC != DP:
            tl.store(partial_along + row + k, along, mask=k < tl.where(chunk == 0, BM, 0))
    else:
        store_gradient(
            dz, along, chunk, begin, a, g, top, inverse_tau, z, norms, pos, beta, exponents, dx, zdz, G, V, N, NP, D,
            blocks, NORMALIZE, CROSS, ACC, BM, BN, DP, DC, HALVES, UPCAST, BOOST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["splits", "G", "V", "blocks"])
def join_kernel(
    z, tau, norms, pos, beta, exponents, partial, partial_along, dx, zdz, splits, G, V, N, NP, D, blocks,
    TENSOR: tl.constexpr, NORMALIZE: tl.constexpr, CROSS: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, DP: tl.constexpr, DC: tl.constexpr, UPCAST: tl.constexpr, BOOST: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """The gradient of BM rows and DC of their features: adds up the partial results of the splits, in their order."""
    chunk = (tl.program_id(0) % (DP // DC)) * DC
    block = tl.program_id(0) // (DP // DC)
    begin = (block % (NP // BM)) * BM
    a = (block // (NP // BM)) % V
    g = (block // (NP // BM) // V).to(tl.int64)
    top = largest_exponent(exponents + g * V * V * blocks, V * V * blocks, BE)
    dz = zero_parts(DC, BM, ACC)
    along = tl.zeros([BM], ACC)
    for split in range(splits):
        row = ((split * G + g) * V + a) * NP + begin
        added = ()
        for part in tl.static_range(len(dz)):
            d = features_of(part, DC, False)
            added = added + (dz[part] + features(partial + (row * DP + chunk), d, BM, DP, False),)
        dz = added
        if DC != DP:
            along += tl.load(partial_along + row + tl.arange(0, BM))
    store_gradient(
        dz, along, chunk, begin, a, g, top, inverse_of(tau, TENSOR, ACC), z, norms, pos, beta, exponents, dx, zdz, G, V,
        N, NP, D, blocks, NORMALIZE, CROSS, ACC, BM, BN, DP, DC, False, UPCAST, BOOST,
    )  # fmt: skip


def table_of(x: Tensor) -> tuple[str, int]:
    """The name of the table of tiles for x's device, and the number of its multiprocessors."""
    if INTERPRETED:
        return "interpreter", 1
    return tiles.device_class(x.device.index)


def carrier(x: Tensor, normalize: bool, half: bool = False) -> torch.dtype:
    """The dtype of the packed rows. Unit rows of half precision are stored as float16, which is more exact.

    half: whether float32 rows were of half precision, as `general.py` says.

    With fewer than 64 features, rounding errors average out less, and a loss would be off by 1e-3 or more, so these
    rows are stored as float32.
    """
    if normalize and (half or x.element_size() == 2):
        return torch.float16 if x.shape[-1] >= 64 else torch.float32
    return x.dtype


def ranges(tau: float | Tensor, dtype: torch.dtype, normalize: bool) -> list[tuple[bool, float]]:
    """(BOUNDED, limit) of each launch. A bounded kernel returns at once if 1 / tau > limit, an unbounded one otherwise.

    If tau is a tensor, its value is not known on the host, and both kernels are launched.
    """
    limit = LIMITS[torch.promote_types(dtype, torch.float32)]
    if normalize and isinstance(tau, torch.Tensor):
        return [(True, limit), (False, limit)]
    bounded = normalize and 1 / tau <= limit
    return [(bounded, math.inf if bounded else -math.inf)]


class Packed(NamedTuple):
    """z: [G, V, NP, DP], padded; norms: [G, V, NP]; u: the operands of products, either z itself or pairs.

    Pairs are float16 [2, G, V, NP, DP], whose sum is UNIT * z; the second halves begin at offset `lower`.
    """

    z: Tensor
    norms: Tensor
    u: Tensor
    lower: int


def packed(sets: Sequence[Tensor], normalize: bool, DP: int, whole: int, half: bool = False) -> Packed:
    """Packs sets [G, N, D] by one launch. N is padded to NP, a multiple of `whole`."""
    x, strides = one_array(sets)
    G, N, D = sets[0].shape
    V, NP = len(sets), cdiv(N, whole) * whole
    z = x.new_empty((G, V, NP, DP), dtype=carrier(x, normalize, half))
    how = precision(z.dtype, normalize, DP)
    u, lower = (z.new_empty((2, *z.shape), dtype=torch.float16), z.numel()) if how == "pairs" else (z, 0)
    norms = x.new_empty((G, V, NP), dtype=torch.float64)
    BD = 1 << (DP - 1).bit_length()
    BR = whole if INTERPRETED else min(whole, 64, max(1, 4096 // BD))
    launch(
        rows_kernel, G * V * NP // BR, x, z, u, norms, V, N, NP, D, lower, *strides,
        NORMALIZE=normalize, PRECISION=how, BR=BR, DP=DP, BD=BD, num_warps=4,
    )  # fmt: skip
    return Packed(z, norms, u, lower)


def precision(carried: torch.dtype, normalize: bool, DP: int) -> str:
    """The precision of products: a name of Triton's, or "pairs" of float16 for unit rows of float32.

    If TF32 is allowed, it is used for more than 128 features only: with 128, pairs are faster on an H100.
    """
    if carried != torch.float32:
        return "ieee"
    allowed = tf32_allowed()
    return "pairs" if normalize and not (allowed and DP > 128) else "tf32" if allowed else "ieee"


def of_tiles(z: Tensor, normalize: bool, tile: Tile) -> dict[str, Any]:
    """The settings that all kernels have that compute tiles of S."""
    return dict(
        ACC=accumulator(z),
        PRECISION=precision(z.dtype, normalize, tile.DP),
        BM=tile.BM,
        BN=tile.BN,
        DP=tile.DP,
        BK=tile.BK,
        UPCAST=INTERPRETED and z.dtype == torch.bfloat16,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def super_blocks(V: int, blocks: int, groups: int, enough: int) -> tuple[int, int]:
    """The number of blocks in a super-block, and of super-blocks in a set.

    Every super-block is a slot of every row, so there are only as many as give the device `enough` programs, one for
    each pair of super-blocks. But super-blocks of one block would load new columns for every tile or two, so they have
    two blocks if that leaves a quarter of `enough`. blocks: the number of blocks in a set.
    """

    def of(programs):
        return V * blocks // (math.isqrt(2 * programs // groups) + 1)

    size = max(1, of(enough), min(2, of(enough // 4)))
    return size, cdiv(blocks, size)


@functools.lru_cache(maxsize=1024)
def splits_of(programs: int, processors: int, alone: float, tiles: int, partners: int) -> tuple[int, int]:
    """(splits, tiles in a split) of the columns: the split with the least work for the busiest multiprocessor.

    The columns are split only if that saves a tenth of this work. There are at most four programs for each
    multiprocessor, so that the memory for partial results does not grow with the rows.
    alone: the time of a program that has a multiprocessor to itself, relative to its share of the time when several
    run there; above 1 if it leaves units idle.
    tiles: the number of tiles of columns in a set; partners: the number of sets with which a row is compared.
    """

    def busiest(tiles_per_split):
        splits = -(-tiles // tiles_per_split)
        handed_over = 3 if splits > 1 else 0  # the time to write and read dz, in tiles; an estimate
        return max(-(-programs * splits // processors), alone) * (tiles_per_split * partners + handed_over)

    most = max(1, 4 * processors // programs)
    fewest_tiles = -(-tiles // most)
    best = min(range(tiles, fewest_tiles - 1, -1), key=busiest)
    if busiest(best) > 0.9 * busiest(tiles):
        best = tiles
    return -(-tiles // best), best


def kind_of(sets: Sequence[Tensor], tau: float | Tensor, normalize: bool, cross: bool) -> tuple[Any, ...]:
    """The properties of a call that decide which tile is the fastest; calls with equal ones share a tile."""
    first = sets[0]
    G, N, D = first.shape
    rows = tuple(size.bit_length() for size in (G, len(sets), N))
    settings = (
        isinstance(tau, torch.Tensor) or ranges(tau, first.dtype, normalize)[0][0],
        normalize,
        cross,
        tf32_allowed(),
    )
    features = tiles.by_parts(D) if D > 64 else tiles.padded(D)  # so that they also have the same DP
    return first.device, first.dtype, features, rows, settings


def tile_of(kernel: str, x: Tensor, normalize: bool, bounded: bool, half: bool = False) -> Tile:
    """The tile of "sums" or "gradient" from the table. x: a set; half: as in `carrier`"""
    name = kernel if bounded else f"{kernel} unbounded"
    carried, D = carrier(x, normalize, half), x.shape[-1]
    return tiles.choose(table_of(x)[0], name, carried, D, precision(carried, normalize, tiles.padded(D)))


def forward(
    sets: Sequence[Tensor],
    tau: float | Tensor,
    normalize: bool,
    cross: bool,
    count: int = 1,
    half: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """term / count, neg, pos by three launches, or four if tau is a tensor. tile: replaces those of the table"""
    first = sets[0]
    G, N, D = first.shape
    V = len(sets)
    launches = ranges(tau, first.dtype, normalize)
    if tile is None and tuning.ENABLED:
        kind = "sums", half, *kind_of(sets, tau, normalize, cross)
        start = tile_of("sums", first, normalize, launches[0][0], half)
        tile = tuning.by_trial(kind, start, lambda tile: forward(sets, tau, normalize, cross, count, half, tile))
    chosen = {bounded: tile or tile_of("sums", first, normalize, bounded, half) for bounded, _ in launches}
    whole = max(size for tile in chosen.values() for size in (tile.BM, tile.BN))
    z, _, *products = packed(sets, normalize, chosen[launches[0][0]].DP, whole, half)
    NP = z.shape[2]
    blocks_per_super, supers_per_set = super_blocks(V, NP // whole, G, 12 * table_of(first)[1])
    supers, left = V * supers_per_set, (V + 1) // 2 * supers_per_set
    dtype = torch.promote_types(first.dtype, torch.float32)
    term, neg, pos = (first.new_empty((G, V, V, N), dtype=dtype) for _ in range(3))
    sums = first.new_empty((G, supers, V, NP), dtype=dtype)
    largest = sums if launches == [(True, math.inf)] else torch.empty_like(sums)
    number, limit = temperature(tau, first), launches[0][1]
    how = dict(TENSOR=isinstance(number, torch.Tensor), CROSS=cross)
    places = V, N, NP, supers, left, supers_per_set, blocks_per_super * whole
    for bounded, _ in launches:
        if bounded:
            programs = left * (supers - left) if cross else supers * (supers // 2 + 1)
            kernel, results = sums_kernel, (sums, pos)
        else:
            programs = 2 * left * (supers - left) if cross else supers * supers
            kernel, results = unbounded_sums_kernel, (sums, largest, pos)
        launch(
            kernel, G * programs, z, *products, number, limit, *results, *places, programs, **how,
            **of_tiles(z, normalize, chosen[bounded]),
        )  # fmt: skip
    BI = 64
    launch(
        finish_kernel, G * V * V * cdiv(N, BI), sums, largest, number, limit, term, neg, pos, count, V, N, NP,
        supers, supers_per_set, **how, ACC=accumulator(z), BI=BI, SLOTS=8, num_warps=4,
    )  # fmt: skip
    return term, neg, pos


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
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """dx [V, G, N, D] and <z, dz> [G, V, N] by three launches, one more if tau is a tensor, one more if rows are few.

    g_term: the gradient of each term / count, or one number for all. For more than 512 features, see `wide.py`.
    """
    first = sets[0]
    G, N, D = first.shape
    V = len(sets)
    launches = ranges(tau, first.dtype, normalize)
    if tile is None and tuning.ENABLED:
        kind = "gradient", half, *kind_of(sets, tau, normalize, cross)
        arguments = sets, tau, normalize, cross, neg, pos, g_term, g_neg, g_pos, count, half
        start = tile_of("gradient", first, normalize, launches[0][0], half)
        tile = tuning.by_trial(kind, start, lambda tile: backward(*arguments, tile))
    chosen = {bounded: tile or tile_of("gradient", first, normalize, bounded, half) for bounded, _ in launches}
    tile = chosen[launches[0][0]]
    from . import wide  # not at the top of the file, since it imports this module

    by_library = wide.serves(D, V, normalize, cross) and launches[0][0]
    DP = cdiv(D, 64) * 64 if by_library and len(launches) == 1 else tile.DP
    z, norms, *products = packed(sets, normalize, DP, max(tile.BM, tile.BN), half)
    NP = z.shape[2]
    blocks = NP // tile.BN
    dx, zdz = first.new_empty((V, G, N, D)), neg.new_empty((G, V, N))
    alpha, beta = torch.empty_like(neg), torch.empty_like(neg)
    exponents = neg.new_empty((G, V, V, blocks), dtype=torch.int32)
    number, limit = temperature(tau, first), launches[0][1]
    how = dict(TENSOR=isinstance(number, torch.Tensor), CROSS=cross)
    gradients, given = upstream(g_term if N > 1 else None, g_neg, g_pos, neg)
    launch(
        coefficients_kernel, G * V * blocks, neg, number, limit, pos, *gradients, alpha, beta, exponents, count, V, N,
        blocks, **given, **how, ACC=accumulator(z), BI=tile.BN, num_warps=2,
    )  # fmt: skip
    boost = 8192.0 if products[0].dtype == torch.float16 else 1.0
    if by_library:
        wide.gradient(z, number, limit, norms, alpha, beta, exponents, dx, zdz, cross, max(tile.BM, tile.BN))
        launches = launches[1:]
    in_halves = part_count(tile.DC) == 1 and tile.DC * z.element_size() >= 512 and tile.DC % (2 * RUN.value) == 0
    programs, tiles_per_set = G * V * (NP // tile.BM) * (tile.DP // tile.DC), cdiv(N, tile.BN)
    alone = 1.5 if tile.warps == 4 else 1.0  # one program of 4 warps does not fill a multiprocessor; an estimate
    partners = V // 2 if cross else V
    splits, tiles_per_split = splits_of(programs, table_of(first)[1], alone, tiles_per_set, partners)
    if by_library:  # join_kernel would overwrite its results
        splits = 1
    partial, partial_along, columns_per_split = neg, neg, 0
    if splits > 1:
        columns_per_split = tiles_per_split * tile.BN
        partial = neg.new_empty((splits, G, V, NP, tile.DP))
        partial_along = neg.new_empty((splits, G, V, NP)) if tile.DC != tile.DP else neg
    for bounded, _ in launches:
        launch(
            gradient_kernel, programs * splits, z, *products, number, limit, norms, neg, pos, alpha, beta, exponents,
            partial, partial_along, dx, zdz, programs if splits > 1 else 0, columns_per_split, G, V, N, NP, D, blocks,
            BOUNDED=bounded, NORMALIZE=normalize, DC=tile.DC, SPLIT=splits > 1, HALVES=in_halves,
            BOOST=boost, BE=1024, **how, **of_tiles(z, normalize, chosen[bounded]),
        )  # fmt: skip
    if splits > 1:
        BM = 16
        launch(
            join_kernel, programs * (tile.BM // BM), z, number, norms, pos, beta, exponents, partial, partial_along, dx,
            zdz, splits, G, V, N, NP, D, blocks, **how, NORMALIZE=normalize, ACC=accumulator(z), BM=BM, BN=tile.BN,
            DP=tile.DP, DC=tile.DC, UPCAST=INTERPRETED and z.dtype == torch.bfloat16, BOOST=boost, BE=1024, num_warps=4,
        )  # fmt: skip
    return dx, zdz

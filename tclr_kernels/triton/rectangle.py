"""The operation of `general.py` by tiles: some rows against some columns, with positives given by labels.

`tclr_kernels/general.py` defines its outputs and gradients. These are the kernels, in the order of their launches:

    rows          unit rows of both sides, packed and padded to whole tiles (`large.py`)
    sums          sum exp S and the largest S over the negatives; with keys, the same over the positives, and the sum of
                  S over them and their number; if requested, the sum of the columns with weights exp S
    pairs         the sums of softplus(negatives - S) and of its derivative over the positives
    finish, mean  neg, pos_lse, spread and count in float64, and the columns' mean, from the partial sums of all splits
    units         the largest gradient of each block of rows, as a power of two
    coefficients  the factors of an anchor's weights, in units of the group's largest gradient
    gradient      partial sums of dz_i = sum_j W_ij z_j, for the rows of one side
    join          their sum, the pairs of the same index, and the projection: the gradient of the inputs

In every launch, only one program writes to a row. In the gradient, x is the side whose gradient is computed, with index
i, and y is the other side, with index j. W_ij is the sum of the weights of i as an anchor and of j as an anchor.

The kernels compute exp(S - neg), never exp S, so they cannot overflow at any temperature, and a temperature on the
device needs no second launch. Compared with the bounded kernels of `large.py`, this takes a maximum and a subtraction
more for each similarity, and a second exponential if both sides are anchors. neg has float64 precision: its nearest
float32 number is subtracted, and the coefficient contains the exponential of the rest.

Rows are padded to whole tiles, or to 16 if there are at most 16. Apart from the packed rows of both sides, dz takes as
much float32 memory as the rows of one side, or a few times that if there are few rows and the columns are split.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import large, tiles, tuning
from .epilogue import (
    exists,
    exponent_of,
    factors,
    finite_size,
    gradient_scale,
    inverse_of,
    log1p,
    narrowed,
    power_of_two,
    scaled,
)
from .large import (
    UNIT,
    as_operand,
    cosines,
    exponential,
    features_of,
    finite,
    largest_exponent,
    log_of_slots,
    of_product,
    of_tiles,
    operands,
    packed,
    partners_of,
    plus_products,
    rounded,
    splits_of,
    times,
    zero_parts,
)
from .sets import INTERPRETED, accumulator, cdiv, launch, temperature
from .tiles import Tile

ROW_KEY, COLUMN_KEY = tl.constexpr(-1), tl.constexpr(-2)  # replace negative keys, so that these never match


@triton.jit
def keys_of(keys, i, n, none: tl.constexpr):
    """The keys of rows i out of n, or `none` for rows without a key and for padded rows."""
    key = tl.load(keys + i, mask=i < n, other=none)
    return tl.where(key < 0, none, key)


@triton.jit
def candidates(
    s, x_key, y_key, i, j, begin, start, offset, end, alike, INDEX: tl.constexpr, KEYS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """S, set to -inf for columns that are in no sum, and with KEYS a mask of the positives.

    i, j: indices of rows and columns, which start at `begin` and `start`. Column i + offset has the index of row i.
    end: the number of columns; alike: whether rows and columns are the same set, so that column i + offset is row i.
    """
    if KEYS:
        positive = x_key[:, None] == y_key[None, :]
    if INDEX:  # noqa: SIM102
        if (start < begin + offset + BM) & (begin + offset < start + BN):
            index = (i + offset)[:, None] == j[None, :]
            if KEYS:
                positive = positive & ~(index & alike)
                index = index & ~positive
            s = tl.where(index, float("-inf"), s)
    if start + BN > end:
        s = tl.where((j < end)[None, :], s, float("-inf"))
    return s, positive if KEYS else s


@triton.jit
def accumulated(total, largest, top, added):
    """The sum total * exp(largest) plus added * exp(top), divided by exp(top)."""
    return total * exponential(largest - finite(top)) + added


SIZES = ["G", "A", "C", "n", "K", "first"]  # the other sizes are always divisible by 16


@triton.jit(do_not_specialize=SIZES)
def rectangle_sums_kernel(
    r, z, r_lower: tl.int64, z_lower: tl.int64, tau, row_keys, column_keys, pos, sums, largest, positive_sums,
    positive_largest, similarities, counts, weighted, G, A, C, n, K, NP, KP, first, columns_per_split,
    TENSOR: tl.constexpr, CROSS: tl.constexpr, INDEX: tl.constexpr, KEYS: tl.constexpr, MEAN: tl.constexpr,
    BOOST: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DP: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """sums, largest and so on: [splits, G, A, C, n]; pos: [G, A, C, n]. A program has BM rows and a split of columns.

    MEAN: also weighted [splits, G, NP, DP], the sum of exp(S - largest) z_j, for one set of rows and one of columns.
    """
    block, a, c, g, split = places(tl.program_id(0), G, A, C, NP // BM)
    inverse_tau = inverse_of(tau, TENSOR, ACC)
    begin = block * BM
    i = begin + tl.arange(0, BM)
    z_i = r + ((g * A + a) * NP + begin) * DP
    rows = operands(z_i, r_lower, BK, BM, DP, PRECISION, UPCAST)
    cell = ((g * A + a) * C + c) * n + i
    row_key = i
    if KEYS:
        row_key = keys_of(row_keys + g * n, i, n, ROW_KEY)
        positive_total = tl.zeros([BM], ACC)
        positive_top = tl.full([BM], float("-inf"), ACC)
        similarity = tl.zeros([BM], tl.float64)
        count = tl.zeros([BM], tl.int32)
    if MEAN:
        sum_z = zero_parts(DP, BM, ACC)
    total = tl.zeros([BM], ACC)
    top = tl.full([BM], float("-inf"), ACC)
    start_j = split * columns_per_split
    end_j = tl.minimum(start_j + columns_per_split, K)
    if CROSS:
        end_j = tl.where(exists(a, c, A, CROSS), end_j, start_j)
    for start in range(start_j, end_j, BN):
        j = start + tl.arange(0, BN)
        z_j = z + ((g * C + c) * KP + start) * DP
        columns = operands(z_j, z_lower, BK, BN, DP, PRECISION, UPCAST)
        s = cosines(z_i, z_j, r_lower, z_lower, rows, columns, BM, BN, DP, BK, ACC, PRECISION, UPCAST)
        s = rounded(s, of_product(inverse_tau, PRECISION))
        if INDEX:  # noqa: SIM102
            if (start < begin + first + BM) & (begin + first < start + BN) & (a != c):
                partner = i + first
                value = tl.sum(tl.where(partner[:, None] == j[None, :], s, 0.0), 1)
                here = (i < n) & (partner >= start) & (partner < start + BN)
                tl.store(pos + cell, value.to(tl.float64), mask=here)
        column_key = j
        if KEYS:
            column_key = keys_of(column_keys + g * K, j, K, COLUMN_KEY)
        s, positive = candidates(s, row_key, column_key, i, j, begin, start, first, K, a == c, INDEX, KEYS, BM, BN)
        if KEYS:
            higher = tl.maximum(top, tl.max(tl.where(positive, float("-inf"), s), 1))
            positive_higher = tl.maximum(positive_top, tl.max(tl.where(positive, s, float("-inf")), 1))
            e = exponential(s - tl.where(positive, finite(positive_higher)[:, None], finite(higher)[:, None]))
            added = tl.sum(tl.where(positive, 0.0, e), 1)
            positive_added = tl.sum(tl.where(positive, e, 0.0), 1)
            positive_total = accumulated(positive_total, positive_top, positive_higher, positive_added)
            positive_top = positive_higher
            similarity += tl.sum(tl.where(positive, s, 0.0), 1).to(tl.float64)
            count += tl.sum(positive.to(tl.int32), 1)
        else:
            higher = tl.maximum(top, tl.max(s, 1))
            e = exponential(s - finite(higher)[:, None])
            added = tl.sum(e, 1)
        if MEAN:
            if BK != DP:
                columns = operands(z_j, z_lower, DP, BN, DP, PRECISION, UPCAST)
            sum_z = times(sum_z, exponential(top - finite(higher))[:, None])
            weight = as_operand(e * BOOST, z.dtype.element_ty, PRECISION, UPCAST)
            sum_z = plus_products(sum_z, weight, columns, PRECISION, ACC)
        total = accumulated(total, top, higher, added)
        top = higher
    slot = split.to(tl.int64) * (G.to(tl.int64) * A * C * n) + cell
    tl.store(sums + slot, total, mask=i < n)
    tl.store(largest + slot, top, mask=i < n)
    if KEYS:
        tl.store(positive_sums + slot, positive_total, mask=i < n)
        tl.store(positive_largest + slot, positive_top, mask=i < n)
        tl.store(similarities + slot, similarity, mask=i < n)
        tl.store(counts + slot, count, mask=i < n)
    if MEAN:
        if PRECISION == "pairs":
            sum_z = times(sum_z, 1.0 / UNIT)
        store_parts(weighted + ((split * G + g) * NP + begin) * DP, sum_z, DP, BM, DP)


@triton.jit
def store_parts(to, parts, size: tl.constexpr, ROWS: tl.constexpr, DP: tl.constexpr):
    """Stores ROWS rows of `size` features from their parts. to: a pointer to the first row"""
    for k in tl.static_range(len(parts)):
        d = features_of(k, size, False)
        tl.store(to + (tl.arange(0, ROWS)[:, None] * DP + d[None, :]), parts[k])


@triton.jit
def places(program, G, A, C, blocks):
    """A program's block of rows, its set, the other set, its group, and its split of the columns.

    The programs with the same columns have consecutive numbers, so that they find the columns in the cache.
    """
    block = program % blocks
    pair = program // blocks
    c = pair % C
    a = pair // C % A
    g = (pair // C // A % G).to(tl.int64)
    return block, a, c, g, pair // C // A // G


@triton.jit(do_not_specialize=["A", "C", "n", "splits", "cells"])
def rectangle_finish_kernel(
    sums, largest, positive_sums, positive_largest, similarities, counts, neg, pos, pos_lse, spread, count,
    A, C, n, splits, cells: tl.int64,
    CROSS: tl.constexpr, INDEX: tl.constexpr, KEYS: tl.constexpr, BI: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The outputs of BI cells (g, a, c, i), in float64. Writes 0 to pos where there is no pair."""
    at = tl.program_id(0).to(tl.int64) * BI + tl.arange(0, BI)
    inside = at < cells
    c = at // n % C
    a = at // n // C % A
    there = exists(a, c, A, CROSS) & inside
    from_slots = tl.where(there, at, -1)
    value = log_of_slots(sums, largest, from_slots, cells, splits, BI, SLOTS)
    tl.store(neg + at, value, mask=inside)
    paired = tl.zeros([BI], tl.float64)
    if INDEX:
        paired = tl.load(pos + at, mask=there & (a != c), other=0.0)
    tl.store(pos + at, paired, mask=inside)
    if KEYS:
        value = log_of_slots(positive_sums, positive_largest, from_slots, cells, splits, BI, SLOTS)
        number = tl.zeros([BI], tl.int32)
        similarity = tl.zeros([BI], tl.float64)
        for split in range(splits):
            slot = split * cells + at
            number += tl.load(counts + slot, mask=there, other=0)
            similarity += tl.load(similarities + slot, mask=there, other=0.0)
        several = tl.where(number > 1, number, 1).to(tl.float64)
        # exactly 0 for a single positive, but NaN if its similarity is NaN
        apart = tl.where(number > 1, value - similarity / several, similarity - similarity)
        tl.store(pos_lse + at, value, mask=inside)
        tl.store(spread + at, tl.where(number > 0, apart, 0.0), mask=inside)
        tl.store(count + at, number.to(tl.float64), mask=inside)


@triton.jit(do_not_specialize=["splits", "G", "n", "D"])
def rectangle_mean_kernel(
    largest, neg, weighted, mean, splits, G, n, NP, D, ACC: tl.constexpr, BR: tl.constexpr, DP: tl.constexpr,
    BD: tl.constexpr, BOOST: tl.constexpr,
):  # fmt: skip
    """mean: [G, n, D], BR rows of it, from the splits' weighted: [splits, G, NP, DP] and largest: [splits, G, n]."""
    begin = (tl.program_id(0) % (NP // BR)) * BR
    g = (tl.program_id(0) // (NP // BR)).to(tl.int64)
    i = begin + tl.arange(0, BR)
    d = tl.arange(0, BD)
    elements = tl.arange(0, BR)[:, None] * DP + d[None, :]
    value = tl.load(neg + g * n + i, mask=i < n, other=0.0)
    total = tl.zeros([BR, BD], ACC)
    for split in range(splits):
        top = tl.load(largest + (split * G + g) * n + i, mask=i < n, other=float("-inf"))
        share = tl.where(top == float("-inf"), 0.0, tl.exp(top.to(tl.float64) - value) / BOOST)
        part = tl.load(weighted + ((split * G + g) * NP + begin) * DP + elements, mask=(d < DP)[None, :], other=0.0)
        total += part * share.to(ACC)[:, None]
    to = mean + (g * n + i)[:, None] * D + d[None, :]
    tl.store(to, total, mask=(i < n)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=SIZES)
def rectangle_pairs_kernel(
    r, z, r_lower: tl.int64, z_lower: tl.int64, tau, row_keys, column_keys, negatives, pairs, slopes, G, A, C, n, K, NP,
    KP, first, columns_per_split,
    TENSOR: tl.constexpr, CROSS: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """pairs, slopes: [splits, G, A, C, n], sums of softplus(negatives - S) and of its derivative over the positives."""
    block, a, c, g, split = places(tl.program_id(0), G, A, C, NP // BM)
    inverse_tau = inverse_of(tau, TENSOR, ACC)
    begin = block * BM
    i = begin + tl.arange(0, BM)
    z_i = r + ((g * A + a) * NP + begin) * DP
    rows = operands(z_i, r_lower, BK, BM, DP, PRECISION, UPCAST)
    cell = ((g * A + a) * C + c) * n + i
    negative_lse = tl.load(negatives + cell, mask=i < n, other=0.0).to(ACC)
    row_key = keys_of(row_keys + g * n, i, n, ROW_KEY)
    total = tl.zeros([BM], tl.float64)
    slope = tl.zeros([BM], tl.float64)
    start_j = split * columns_per_split
    end_j = tl.minimum(start_j + columns_per_split, K)
    if CROSS:
        end_j = tl.where(exists(a, c, A, CROSS), end_j, start_j)
    for start in range(start_j, end_j, BN):
        j = start + tl.arange(0, BN)
        z_j = z + ((g * C + c) * KP + start) * DP
        columns = operands(z_j, z_lower, BK, BN, DP, PRECISION, UPCAST)
        s = cosines(z_i, z_j, r_lower, z_lower, rows, columns, BM, BN, DP, BK, ACC, PRECISION, UPCAST)
        s = rounded(s, of_product(inverse_tau, PRECISION))
        column_key = keys_of(column_keys + g * K, j, K, COLUMN_KEY)
        s, positive = candidates(s, row_key, column_key, i, j, begin, start, first, K, a == c, INDEX, True, BM, BN)
        t = negative_lse[:, None] - s
        e = exponential(-tl.abs(t))
        loss = tl.where(t > 0, t, 0.0) + log1p(e)
        total += tl.sum(tl.where(positive, loss, 0.0), 1).to(tl.float64)
        slope += tl.sum(tl.where(positive, tl.where(t > 0, 1.0, e) / (1.0 + e), 0.0), 1).to(tl.float64)
    slot = split.to(tl.int64) * (G.to(tl.int64) * A * C * n) + cell
    tl.store(pairs + slot, total, mask=i < n)
    tl.store(slopes + slot, slope, mask=i < n)


@triton.jit(do_not_specialize=["cells", "blocks", "before", "all_blocks"])
def rectangle_units_kernel(
    first, second, third, fourth, exponents, cells: tl.int64, blocks, before, all_blocks,
    GRADIENTS: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """exponents: [G, all_blocks], one for the largest gradient of every BI cells.

    A launch writes the `blocks` exponents that follow the first `before` ones of each group.
    """
    block = tl.program_id(0) % blocks
    g = (tl.program_id(0) // blocks).to(tl.int64)
    k = block.to(tl.int64) * BI + tl.arange(0, BI)
    at = g * cells + k
    gradients = (first, second, third, fourth)
    top = tl.zeros([BI], tl.float64)
    for one in tl.static_range(GRADIENTS):
        top = tl.maximum(top, finite_size(tl.load(gradients[one] + at, mask=k < cells, other=0.0)))
    tl.store(exponents + g * all_blocks + before + block, exponent_of(tl.max(top, 0)))


@triton.jit
def relative_to(level, g, ACC: tl.constexpr):
    """(shift, scale) with scale exp(S - shift) = exp(S - level), shift in ACC; (inf, 0) where the gradient g is 0."""
    none = (g == 0) | (level == float("-inf"))
    level = tl.where(none, 0.0, level)
    shift = level.to(ACC)
    scale = tl.exp(shift.to(tl.float64) - level)
    return tl.where(none, float("inf"), shift), tl.where(none, 0.0, scale)


@triton.jit(do_not_specialize=["G", "pairs_of_sets", "n", "all_blocks"])
def rectangle_coefficients_kernel(
    neg, g_neg, g_pos, pos_lse, g_pos_lse, g_spread, count, exponents, coefficients, G, pairs_of_sets, n, NP,
    all_blocks, KIND: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, BOOST: tl.constexpr, BI: tl.constexpr,
    BE: tl.constexpr,
):  # fmt: skip
    """coefficients: [fields, G, A, C, NP], in units of the group's largest gradient. Padded rows get weight 0.

    The fields are the shift and the scale of the negatives; with keys, the positives' shift, the factor of
    e = exp(S - shift), the factor of (e - share), and the share; and g_pos. (e - share) is formed before anything is
    added to it, since it may be a small difference. KIND "pairs" has two fields, negatives and g_pairs.
    """
    blocks = tl.cdiv(NP, BI)
    i = tl.program_id(0) % blocks * BI + tl.arange(0, BI)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    g = pair // pairs_of_sets
    unit = power_of_two(-largest_exponent(exponents + g * all_blocks, all_blocks, BE))
    at = pair * n + i
    to = coefficients + pair * NP + i
    step = (G * pairs_of_sets).to(tl.int64) * NP
    valid = i < n
    inside = i < NP
    level = tl.load(neg + at, mask=valid, other=0.0)
    gradient = tl.load(g_neg + at, mask=valid, other=0.0) * unit * BOOST
    if KIND == "pairs":
        tl.store(to, level.to(ACC), mask=inside)
        tl.store(to + step, gradient.to(ACC), mask=inside)
    else:
        shift, scale = relative_to(level, gradient, ACC)
        tl.store(to, shift, mask=inside)
        tl.store(to + step, tl.where(scale == 0, 0.0, gradient * scale).to(ACC), mask=inside)
        if KIND == "keys":
            of_lse = tl.load(g_pos_lse + at, mask=valid, other=0.0) * unit * BOOST
            of_spread = tl.load(g_spread + at, mask=valid, other=0.0) * unit * BOOST
            number = tl.load(count + at, mask=valid, other=0.0)
            of_spread = tl.where(number > 1, of_spread, 0.0)  # with one positive, the spread is constantly 0
            level = tl.load(pos_lse + at, mask=valid, other=0.0)
            shift, scale = relative_to(level, tl.abs(of_lse) + tl.abs(of_spread), ACC)
            share = 1.0 / (tl.where(number > 1, number, 1.0) * tl.where(scale == 0, 1.0, scale))
            tl.store(to + 2 * step, shift, mask=inside)
            tl.store(to + 3 * step, (of_lse * scale).to(ACC), mask=inside)
            tl.store(to + 4 * step, (of_spread * scale).to(ACC), mask=inside)
            tl.store(to + 5 * step, share.to(ACC), mask=inside)
        if INDEX:
            last: tl.constexpr = 6 if KIND == "keys" else 2
            beta = tl.load(g_pos + at, mask=valid, other=0.0) * unit
            tl.store(to + last * step, beta.to(ACC), mask=inside)


@triton.jit
def anchor_of(coefficients, step, KIND: tl.constexpr):
    """The fields of some anchors. coefficients: pointers to their first field"""
    fields = (tl.load(coefficients), tl.load(coefficients + step))
    if KIND == "keys":
        fields = fields + (
            tl.load(coefficients + 2 * step),
            tl.load(coefficients + 3 * step),
            tl.load(coefficients + 4 * step),
            tl.load(coefficients + 5 * step),
        )
    return fields


@triton.jit
def weights(s, positive, fields, ROWS: tl.constexpr, KIND: tl.constexpr):
    """The weights in W of the anchors on one side: the rows of S (ROWS), or its columns."""
    axis: tl.constexpr = 1 if ROWS else 0
    shift = tl.expand_dims(fields[0], axis)
    scale = tl.expand_dims(fields[1], axis)
    if KIND == "plain":
        w = scale * exponential(s - shift)
    elif KIND == "keys":
        e = exponential(s - tl.where(positive, tl.expand_dims(fields[2], axis), shift))
        of_positive = tl.expand_dims(fields[3], axis) * e
        of_positive += tl.expand_dims(fields[4], axis) * (e - tl.expand_dims(fields[5], axis))
        w = tl.where(positive, of_positive, scale * e)
    else:
        t = shift - s
        e = exponential(-tl.abs(t))
        w = tl.where(positive, -scale * tl.where(t > 0, 1.0, e) / (1.0 + e), 0.0)
    return w


@triton.jit(do_not_specialize=["programs", "G", "A", "C", "n", "K", "offset"])
def rectangle_gradient_kernel(
    x, y, x_lower: tl.int64, y_lower: tl.int64, tau, x_keys, y_keys, of_x, of_y, partial, programs, G, A, C, n, K,
    NP, KP, offset, columns_per_split,
    TENSOR: tl.constexpr, CROSS: tl.constexpr, INDEX: tl.constexpr, KIND: tl.constexpr, OF_X: tl.constexpr,
    OF_Y: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DP: tl.constexpr, BK: tl.constexpr, DC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """partial: [splits, G, A, NP, DP], the sum of W_ij y_j over a split of the columns of every set.

    A program computes BM rows of a set of x and DC of their features. of_x: [fields, G, A, C, NP], the coefficients of
    x if its rows are anchors (OF_X); of_y: [fields, G, C, A, KP], those of y if its rows are anchors (OF_Y).
    """
    KEYS: tl.constexpr = KIND != "plain"
    split = tl.program_id(0) // programs
    program = tl.program_id(0) % programs
    chunk = (program % (DP // DC)) * DC
    block = program // (DP // DC)
    begin = (block % (NP // BM)) * BM
    a = block // (NP // BM) % A
    g = (block // (NP // BM) // A).to(tl.int64)
    inverse_tau = inverse_of(tau, TENSOR, ACC)
    i = begin + tl.arange(0, BM)
    z_i = x + ((g * A + a) * NP + begin) * DP
    rows = operands(z_i, x_lower, BK, BM, DP, PRECISION, UPCAST)
    x_key = i
    if KEYS:
        x_key = keys_of(x_keys + g * n, i, n, ROW_KEY)
    x_step = (G * A * C).to(tl.int64) * NP
    y_step = (G * A * C).to(tl.int64) * KP
    start_j = split * columns_per_split
    end_j = tl.minimum(start_j + columns_per_split, K)
    dz = zero_parts(DC, BM, ACC)
    first_set, last_set = partners_of(a, C, CROSS)
    for c in range(first_set, last_set):
        if OF_X:
            x_fields = anchor_of(of_x + ((g * A + a) * C + c) * NP + i, x_step, KIND)
        for start in range(start_j, end_j, BN):
            j = start + tl.arange(0, BN)
            z_j = y + ((g * C + c) * KP + start) * DP
            columns = operands(z_j, y_lower, BK, BN, DP, PRECISION, UPCAST)
            s = cosines(z_i, z_j, x_lower, y_lower, rows, columns, BM, BN, DP, BK, ACC, PRECISION, UPCAST)
            s = rounded(s, of_product(inverse_tau, PRECISION))
            y_key = j
            if KEYS:
                y_key = keys_of(y_keys + g * K, j, K, COLUMN_KEY)
            s, positive = candidates(s, x_key, y_key, i, j, begin, start, offset, K, a == c, INDEX, KEYS, BM, BN)
            w = tl.zeros([BM, BN], ACC)
            if OF_X:
                w += weights(s, positive, x_fields, True, KIND)
            if OF_Y:
                y_fields = anchor_of(of_y + ((g * C + c) * A + a) * KP + j, y_step, KIND)
                w += weights(s, positive, y_fields, False, KIND)
            if DC != DP or BK != DP:
                columns = operands(z_j + chunk, y_lower, DC, BN, DP, PRECISION, UPCAST)
            dz = plus_products(dz, as_operand(w, y.dtype.element_ty, PRECISION, UPCAST), columns, PRECISION, ACC)
    if PRECISION == "pairs":
        dz = times(dz, 1.0 / UNIT)
    store_parts(partial + (((split * G + g) * A + a) * NP + begin) * DP + chunk, dz, DC, BM, DP)


@triton.jit(do_not_specialize=["splits", "G", "A", "C", "n", "K", "D", "offset", "all_blocks"])
def rectangle_join_kernel(
    x, y, tau, norms, of_x, of_y, exponents, partial, dx, along, splits, G, A, C, n, K, NP, KP, D, offset, all_blocks,
    TENSOR: tl.constexpr, NORMALIZE: tl.constexpr, CROSS: tl.constexpr, INDEX: tl.constexpr, LAST: tl.constexpr,
    OF_X: tl.constexpr, OF_Y: tl.constexpr, ACC: tl.constexpr, BR: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr,
    UPCAST: tl.constexpr, BOOST: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dx: [A, G, n, D] and along = <z, dz>: [G, A, n], BR rows of them, from partial: [splits, G, A, NP, DP].

    LAST: the number of the field that has g_pos.
    """
    begin = (tl.program_id(0) % (NP // BR)) * BR
    a = tl.program_id(0) // (NP // BR) % A
    g = (tl.program_id(0) // (NP // BR) // A).to(tl.int64)
    i = begin + tl.arange(0, BR)
    d = tl.arange(0, BD)
    inside = (d < DP)[None, :]
    elements = tl.arange(0, BR)[:, None] * DP + d[None, :]
    row = (g * A + a) * NP + begin
    dz = tl.zeros([BR, BD], ACC)
    for split in range(splits):
        dz += tl.load(partial + (split * G * A * NP + row) * DP + elements, mask=inside, other=0.0)
    dz *= 1.0 / BOOST
    if INDEX:  # the pairs with the same index, whose weights are not rounded to the dtype of products
        partner = i + offset
        paired = (i < n) & (partner >= 0) & (partner < K)
        first_set, last_set = partners_of(a, C, CROSS)
        for c in range(first_set, last_set):
            if c != a:
                weight = tl.zeros([BR], ACC)
                if OF_X:
                    field = of_x + LAST * G.to(tl.int64) * A * C * NP
                    weight += tl.load(field + ((g * A + a) * C + c) * NP + i, mask=paired, other=0.0)
                if OF_Y:
                    field = of_y + LAST * G.to(tl.int64) * A * C * KP
                    weight += tl.load(field + ((g * C + c) * A + a) * KP + partner, mask=paired, other=0.0)
                z_c = y + ((g * C + c) * KP + begin + offset) * DP
                other = tl.load(z_c + elements, mask=paired[:, None] & inside, other=0.0)
                dz += weight[:, None] * (other.to(tl.float32) if UPCAST else other).to(ACC)
    own = tl.load(x + row * DP + elements, mask=inside, other=0.0)
    own = (own.to(tl.float32) if UPCAST else own).to(ACC)
    length = tl.sum(own * dz, 1)
    unit = power_of_two(largest_exponent(exponents + g * all_blocks, all_blocks, BE))
    inverse_tau = inverse_of(tau, TENSOR, ACC)
    tl.store(along + (g * A + a) * n + i, length.to(tl.float64) * (unit * inverse_tau.to(tl.float64)), mask=i < n)
    norm = tl.full([BR], 1.0, tl.float64)
    if NORMALIZE:
        norm = tl.load(norms + row + tl.arange(0, BR))
        dz -= own * length[:, None]
    one, other_factor = factors(gradient_scale(norm, unit, inverse_tau, NORMALIZE), ACC)
    gradient = narrowed(scaled(dz, norm, one, other_factor), dx.dtype.element_ty)
    to = dx + (a.to(tl.int64) * G + g) * n * D + i.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(to, gradient, mask=(i < n)[:, None] & (d < D)[None, :])


class Side(NamedTuple):
    """The rows or the columns of a call, packed, with their lengths and keys."""

    sets: Sequence[Tensor]
    z: Tensor
    norms: Tensor
    u: Tensor  # the operands of products; `lower` is the offset of the second halves of pairs, see `large.Packed`
    lower: int
    keys: Tensor

    @property
    def count(self) -> int:
        return len(self.sets)

    @property
    def n(self) -> int:
        return self.sets[0].shape[1]

    @property
    def padded(self) -> int:
        return self.z.shape[2]


class Problem(NamedTuple):
    """The arguments that all launches of a call need. `rows is columns` if the rows are the columns."""

    rows: Side
    columns: Side
    tau: float | Tensor  # a result of `sets.temperature`
    tile: Tile
    normalize: bool
    cross: bool
    first: int

    def settings(self) -> dict[str, Any]:
        return dict(TENSOR=isinstance(self.tau, torch.Tensor), CROSS=self.cross, INDEX=self.first >= 0)


def fitted(tile: Tile, rows: int, columns: int) -> Tile:
    """The tile, reduced to 16 rows or columns, the fewest that a product can have, if there are at most 16."""
    return tile._replace(BM=16 if rows <= 16 else tile.BM, BN=16 if columns <= 16 else tile.BN)


def problem(
    served: Sequence[Tile],
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    tau: float | Tensor,
    normalize: bool,
    cross: bool,
    first: int,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    half: bool,
) -> Problem:
    """Packs both sides, or the columns only if there are no rows, which means that the rows are the columns.

    served: the tiles of all kernels of the call. Each side is padded to whole tiles for all of them, both as the rows
    and as the columns of a tile.
    """
    n, K = (rows or columns)[0].shape[1], columns[0].shape[1]

    def side(sets, size, other, keys):
        whole = max(max(fitted(tile, size, other).BM, fitted(tile, other, size).BN) for tile in served)
        rows = packed(sets, normalize, served[0].DP, whole, half)
        return Side(sets, *rows, rows.z if keys is None else keys.contiguous())

    of_columns = side(columns, K, n, column_keys)
    of_rows = side(rows, n, K, row_keys) if rows else of_columns
    return Problem(of_rows, of_columns, temperature(tau, columns[0]), served[0], normalize, cross, first)


def from_table(kernel: str, x: Tensor, normalize: bool, KEYS: bool, half: bool = False) -> Tile:
    """The tile of "sums" or "gradient" from the table. x: a set; KEYS: whether the call has keys"""
    name, dtype = f"{kernel} unbounded rectangle" + " keys" * KEYS, large.carrier(x, normalize, half)
    how = large.precision(dtype, normalize, tiles.padded(x.shape[-1]))
    return tiles.choose(large.table_of(x)[0], name, dtype, x.shape[-1], how)


def tile_for(
    kernel: str, call: Any, half: bool, rows: Sequence[Tensor], columns: Sequence[Tensor], *settings: Any
) -> Tile:
    """The tile of "sums" or "gradient" from the table, or by measurement with TCLR_KERNELS_AUTOTUNE=1."""
    tau, normalize, cross, first, row_keys = settings[:5]
    tile = from_table(kernel, columns[0], normalize, row_keys is not None, half)
    if not tuning.ENABLED:
        return tile
    n = rows[0].shape[1].bit_length() if rows else 0
    kind = "rectangle", call, half, n, len(rows), first >= 0, row_keys is None
    kind += large.kind_of(columns, tau, normalize, cross)
    return tuning.by_trial(kind, tile, lambda one: call(rows, columns, *settings, half, one)) or tile


def split(programs: int, tile: Tile, y: Side, partners: int) -> tuple[int, int]:
    """The number of splits of the columns, and the number of columns in a split."""
    alone = 1.5 if tile.warps == 4 else 1.0  # the estimate of `large.backward`
    tiles_per_set = cdiv(y.n, tile.BN)
    splits, tiles_per_split = splits_of(programs, large.table_of(y.z)[1], alone, tiles_per_set, partners)
    return splits, tiles_per_split * tile.BN


def boost(x: Side) -> float:
    """A factor that keeps all but very small weights, which are at most 8, out of float16's subnormal range."""
    return 4096.0 if x.u.dtype == torch.float16 else 1.0


def rows_per_program(x: Side) -> int:
    """The rows of a program that holds whole rows: as many as fit the registers."""
    return 16 if INTERPRETED else min(16, max(1, 2048 // triton.next_power_of_2(x.z.shape[3])))


def over_pairs(
    kernel: Any,
    p: Problem,
    inputs: Sequence[Tensor],
    outputs: Sequence[torch.dtype | None],
    rows: Sequence[torch.dtype | None] = (),
    **settings: Any,
) -> list[Tensor]:
    """Launches a kernel whose programs have a block of rows and a split of a set's columns. Returns its outputs.

    outputs: the dtypes of the outputs [splits, G, A, C, n]; None for one that is not needed, which is then empty.
    rows: the same for the outputs [splits, G, NP, DP].
    """
    x, y = p.rows, p.columns
    G, tile = len(x.z), fitted(p.tile, x.n, y.n)
    programs = G * x.count * y.count * (x.padded // tile.BM)
    splits, columns_per_split = split(programs, tile, y, 1)
    shape = splits, G, x.count, y.count, x.n
    slots = [x.z.new_empty(shape if dtype else 0, dtype=dtype) for dtype in outputs]
    slots += [x.z.new_empty((splits, G, *x.z.shape[2:]) if dtype else 0, dtype=dtype) for dtype in rows]
    launch(
        kernel, programs * splits, x.u, y.u, x.lower, y.lower, p.tau, x.keys, y.keys, *inputs, *slots, G, x.count,
        y.count, x.n, y.n, x.padded, y.padded, p.first, columns_per_split, **settings, **p.settings(),
        **of_tiles(x.z, p.normalize, tile),
    )  # fmt: skip
    return slots


def forward(
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    tau: float | Tensor,
    normalize: bool,
    cross: bool,
    first: int,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    mean: bool,
    half: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, ...]:
    """neg, pos, pos_lse, spread, count, mean by four launches, or three if the rows are the columns.

    The mean takes one more launch if all features of a row fit the registers, and is then computed with the sums;
    otherwise it takes three. tile: replaces that of the table
    """
    settings = tau, normalize, cross, first, row_keys, column_keys
    for_mean = from_table("gradient", columns[0], normalize, False, half)
    at_once = mean and for_mean.DC == for_mean.DP
    tile = tile or tile_for("gradient" if at_once else "sums", forward, half, rows, columns, *settings, mean)
    if mean:  # both read the same packed rows
        tile = tile._replace(DP=for_mean.DP)
    p = problem([tile, for_mean] if mean else [tile], rows, columns, *settings, half)
    x, y, KEYS = p.rows, p.columns, row_keys is not None
    real = torch.promote_types(columns[0].dtype, torch.float32)
    pos = x.z.new_empty((len(x.z), x.count, y.count, x.n), dtype=torch.float64)
    slots = [real, real, *([real, real, torch.float64, torch.int32] if KEYS else [None] * 4)]
    *slots, weighted = over_pairs(
        rectangle_sums_kernel, p, [pos], slots, [real if at_once else None], KEYS=KEYS, MEAN=at_once, BOOST=boost(x)
    )
    outputs = [torch.empty_like(pos) for _ in range(4 if KEYS else 1)]
    neg, *labelled = outputs
    BI = 128
    launch(
        rectangle_finish_kernel, cdiv(pos.numel(), BI), *slots, neg, pos, *(labelled or [neg] * 3), x.count,
        y.count, x.n, len(slots[0]), pos.numel(), CROSS=cross, INDEX=first >= 0, KEYS=KEYS, BI=BI, SLOTS=8, num_warps=4,
    )  # fmt: skip
    if at_once:
        average = mean_of(p, slots[1], neg, weighted)
    else:
        average = mean_by_gradient(p._replace(tile=for_mean), neg) if mean else pos.new_empty(0, dtype=real)
    return neg, pos, *(labelled or [pos.new_empty(0) for _ in range(3)]), average


def mean_of(p: Problem, largest: Tensor, neg: Tensor, weighted: Tensor) -> Tensor:
    """The mean of the columns with weights exp(S - neg): [G, n, D], from the partial sums of the splits."""
    x = p.rows
    G, n, D = x.sets[0].shape
    mean = weighted.new_empty((G, n, D))
    launch(
        rectangle_mean_kernel, G * (x.padded // rows_per_program(x)), largest, neg, weighted, mean, len(weighted), G, n,
        x.padded, D, ACC=accumulator(x.z), BR=rows_per_program(x), DP=p.tile.DP, BD=triton.next_power_of_2(p.tile.DP),
        BOOST=boost(x), num_warps=4,
    )  # fmt: skip
    return mean


def mean_by_gradient(p: Problem, neg: Tensor) -> Tensor:
    """The same mean, as the gradient of sum neg, which computes all similarities again."""
    w = coefficients(p, [neg, torch.ones_like(neg), neg], [])
    G, n, D = p.rows.sets[0].shape
    return partial_gradient(p, w, for_rows=True)[:, :, 0, :n, :D].sum(0).div_(boost(p.rows))


def pairs(
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    tau: float | Tensor,
    normalize: bool,
    cross: bool,
    first: int,
    row_keys: Tensor,
    column_keys: Tensor,
    negatives: Tensor,
    half: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """The sums over the positives of softplus(negatives - S) and of its derivative: [G, A, C, n]"""
    settings = tau, normalize, cross, first, row_keys, column_keys
    tile = tile or tile_for("sums", pairs, half, rows, columns, *settings, negatives)
    p = problem([tile], rows, columns, *settings, half)
    slots = over_pairs(rectangle_pairs_kernel, p, [negatives.contiguous()], [torch.float64] * 2)
    sums, slopes = (x.sum(0) for x in slots)
    return sums, slopes


KINDS: dict[int, tuple[str, tuple[int, ...]]] = {
    2: ("pairs", (1,)),
    3: ("plain", (1, 2)),
    7: ("keys", (1, 4, 5, 2)),
}  # number of inputs -> (kind, which of the inputs are gradients, with that of pos the last)


class Weights(NamedTuple):
    """The coefficients of the rows and of the columns, each None if this side has no anchors."""

    kind: str
    of_rows: Tensor | None
    of_columns: Tensor | None
    exponents: Tensor

    def of(self, for_rows: bool) -> tuple[tuple[Tensor | None, Tensor | None], dict[str, bool]]:
        """The coefficients of the side whose gradient is computed and of the other side, and which of them exist."""
        of_x, of_y = (self.of_rows, self.of_columns) if for_rows else (self.of_columns, self.of_rows)
        there = dict(OF_X=of_x is not None, OF_Y=of_y is not None)
        return (of_y if of_x is None else of_x, of_x if of_y is None else of_y), there


def coefficients(p: Problem, of_rows: Sequence[Tensor], of_columns: Sequence[Tensor]) -> Weights:
    """The coefficients of both sides. of_rows, of_columns: as in `general.py`; if rows are columns, only of_rows."""
    anchors = [(p.rows, [x.contiguous() for x in of_rows])] if of_rows else []
    if of_columns and p.columns is not p.rows:
        anchors.append((p.columns, [x.contiguous() for x in of_columns]))
    kind, gradients = KINDS[len(anchors[0][1])]
    INDEX = p.first >= 0 and kind != "pairs"
    if kind != "pairs" and not INDEX:
        gradients = gradients[:-1]
    exponents = units([[x[at] for at in gradients] for _, x in anchors])
    z, BI = p.rows.z, 256
    made = []
    for side, x in anchors:
        G, A, C, n = x[0].shape
        shape = (6 if kind == "keys" else 2) + INDEX, G, A, C, side.padded
        made.append(z.new_empty(shape, dtype=torch.promote_types(z.dtype, torch.float32)))
        launch(
            rectangle_coefficients_kernel, G * A * C * cdiv(side.padded, BI), *(x * 4)[:7], exponents, made[-1],
            G, A * C, n, side.padded, exponents.shape[1], KIND=kind, INDEX=INDEX, ACC=accumulator(z),
            BOOST=boost(p.rows), BI=BI, BE=256, num_warps=4,
        )  # fmt: skip
    by_rows = made[0] if of_rows else None
    by_columns = by_rows if p.columns is p.rows else made[-1] if of_columns else None
    return Weights(kind, by_rows, by_columns, exponents)


def units(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """The exponents [G, blocks] of the largest gradients in each group. gradients: a list for each side with anchors"""
    G, BI = len(gradients[0][0]), 1024
    cells = [x[0].numel() // G for x in gradients]
    blocks = [cdiv(count, BI) for count in cells]
    exponents = gradients[0][0].new_empty((G, sum(blocks)), dtype=torch.int32)
    for k, x in enumerate(gradients):
        launch(
            rectangle_units_kernel, G * blocks[k], *(x * 4)[:4], exponents, cells[k], blocks[k], sum(blocks[:k]),
            sum(blocks), GRADIENTS=len(x), BI=BI, num_warps=4,
        )  # fmt: skip
    return exponents


def partial_gradient(p: Problem, w: Weights, for_rows: bool) -> Tensor:
    """The contribution of each split of the other side to dz of this side's rows: [splits, G, A, NP, DP]"""
    x, y = (p.rows, p.columns) if for_rows else (p.columns, p.rows)
    G, tile = len(x.z), fitted(p.tile, x.n, y.n)
    programs = G * x.count * (x.padded // tile.BM) * (tile.DP // tile.DC)
    splits, columns_per_split = split(programs, tile, y, y.count // 2 if p.cross else y.count)
    dtype = torch.promote_types(x.z.dtype, torch.float32)
    partial = x.z.new_empty((splits, G, x.count, x.padded, tile.DP), dtype=dtype)
    of, there = w.of(for_rows)
    launch(
        rectangle_gradient_kernel, programs * splits, x.u, y.u, x.lower, y.lower, p.tau, x.keys, y.keys, *of, partial,
        programs, G, x.count, y.count, x.n, y.n, x.padded, y.padded, p.first if for_rows else -p.first,
        columns_per_split, KIND=w.kind, DC=tile.DC, **there, **p.settings(), **of_tiles(x.z, p.normalize, tile),
    )  # fmt: skip
    return partial


def gradient(p: Problem, w: Weights, for_rows: bool) -> tuple[Tensor, Tensor]:
    """The gradient of one side's sets [A, G, n, D], and <z, dz> of their rows [G, A, n]."""
    partial = partial_gradient(p, w, for_rows)
    x, y = (p.rows, p.columns) if for_rows else (p.columns, p.rows)
    G, n, D = x.sets[0].shape
    dx = x.sets[0].new_empty((x.count, G, n, D))
    along = partial.new_empty((G, x.count, n))
    DP = p.tile.DP
    BD, BR = triton.next_power_of_2(DP), rows_per_program(x)
    of, there = w.of(for_rows)
    settings = p.settings() | dict(INDEX=p.first >= 0 and w.kind != "pairs")
    launch(
        rectangle_join_kernel, G * x.count * (x.padded // BR), x.z, y.z, p.tau, x.norms, *of, w.exponents, partial, dx,
        along, len(partial), G, x.count, y.count, x.n, y.n, x.padded, y.padded, D, p.first if for_rows else -p.first,
        w.exponents.shape[1], NORMALIZE=p.normalize, LAST=6 if w.kind == "keys" else 2, BR=BR, DP=DP, BD=BD,
        ACC=accumulator(x.z), UPCAST=INTERPRETED and x.z.dtype == torch.bfloat16, BOOST=boost(x), BE=256, num_warps=4,
        **there, **settings,
    )  # fmt: skip
    return dx, along


def backward(
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    tau: float | Tensor,
    normalize: bool,
    cross: bool,
    first: int,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    of_rows: Sequence[Tensor],
    of_columns: Sequence[Tensor],
    for_rows: bool,
    for_columns: bool,
    half: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dr [A, G, n, D] and dz [C, G, K, D], empty if not requested, and <r, dr> [G, A, n], or <z, dz> without dr.

    This takes six launches for one side and eight for both, two more if both sides have anchors, and one less if the
    rows are the columns.
    """
    settings = tau, normalize, cross, first, row_keys, column_keys
    rest = of_rows, of_columns, for_rows, for_columns
    tile = tile or tile_for("gradient", backward, half, rows, columns, *settings, *rest)
    p = problem([tile], rows, columns, *settings, half)
    w = coefficients(p, of_rows, of_columns)
    dr, dz = (columns[0].new_empty(0) for _ in range(2))
    if for_columns:
        dz, along = gradient(p, w, for_rows=False)
    if for_rows:
        dr, along = gradient(p, w, for_rows=True)
    return dr, dz, along

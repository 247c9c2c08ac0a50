"""The elementwise functions of the kernels. They compute in float64, since they are O(M V) and the products O(M^2).

unit rows       z = x / |x|, 0 for a zero row, NaN for one that is not finite
term            log(1 + (exp own + exp neg) / exp pos)
its gradient    g = g_term sigmoid(log(exp own + exp neg) - pos):  -g for pos, and g for own and neg, in proportion to
                exp own and exp neg
dx              (dz - z <z, dz>) / |x|
"""

import triton
import triton.language as tl


@triton.jit
def inverse_of(tau, TENSOR: tl.constexpr, ACC: tl.constexpr):
    """1 / tau. tau: a number, the bits of one as an integer where ACC is float64, or a pointer to one of any dtype"""
    if TENSOR:
        value = tl.load(tau).to(tl.float32) if tau.dtype.element_ty != tl.float64 else tl.load(tau)
        inverse = 1.0 / value.to(ACC)
    elif tl.float64 == ACC:
        inverse = 1.0 / tl.cast(tl.cast(tau, tl.int64), tl.float64, bitcast=True)
    else:
        inverse = 1.0 / tau
    return inverse


@triton.jit
def widened(x, scale):
    """x / scale in float64. Only float64 rows need a scale: the squares of narrower floats cannot overflow a double."""
    return x / scale[:, None] if x.dtype == tl.float64 else x.to(tl.float32).to(tl.float64)


@triton.jit
def largest_entry(x):
    """The largest |x| of each row, or 1 for a row of zeros."""
    largest = tl.max(tl.abs(x), 1)
    return tl.where(largest == 0, 1.0, largest)


@triton.jit
def inverse_length(squares):
    """1 / length: 0 for a row of zeros, NaN for a row that is not finite. squares: the sum of the row's squares"""
    length = tl.sqrt(squares)
    inverse = tl.where(length == 0, 0.0, 1.0 / tl.where(length == 0, 1.0, length))
    return tl.where(length * 0 == 0, inverse, float("nan"))


@triton.jit
def log1p(x):
    """log(1 + x), exact for small x. x: float64"""
    one_more = 1.0 + x
    rounded = one_more - 1.0
    return tl.where(rounded == 0, x, tl.log(one_more) * (x / tl.where(rounded == 0, 1.0, rounded)))


@triton.jit
def softplus(t):
    return tl.where(t > 0, t, 0.0) + log1p(tl.exp(-tl.abs(t)))


@triton.jit
def sigmoid(t):
    e = tl.exp(-tl.abs(t))
    return tl.where(t > 0, 1.0, e) / (1.0 + e)


@triton.jit
def log_add(x, y):
    """log(exp x + exp y): -inf if both are -inf, NaN if one is NaN."""
    high = tl.where(x > y, x, y)
    low = tl.where(x > y, y, x)
    return tl.where(low == float("-inf"), high, high + log1p(tl.exp(low - high)))


@triton.jit
def term_of(own, neg, pos, CROSS: tl.constexpr):
    """The term of anchors that have negatives."""
    negatives = neg
    if not CROSS:
        negatives = log_add(own, neg)
    return softplus(negatives - pos)


@triton.jit
def start_of(a, inner, stride_w, stride_v):
    """The offset of set a in the grid of sets that `one_array` describes."""
    return (a // inner) * stride_w + (a % inner) * stride_v


@triton.jit
def exists(a, c, V, CROSS: tl.constexpr):
    """Whether the block of sets a and c exists. a or c may be vectors."""
    half = (V + 1) // 2
    return (a < half) != (c < half) if CROSS else (a >= 0) | (c >= 0)


@triton.jit
def given(pointer, at, mask, GIVEN: tl.constexpr):
    """An upstream gradient in float64, 0 if it is not given."""
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float64) if GIVEN else tl.zeros(at.shape, tl.float64)


@triton.jit
def pair_gradients(
    neg, pos, g_term, g_neg, g_pos, count, own, at, mask, TERM: tl.constexpr, NEG: tl.constexpr, POS: tl.constexpr,
    CROSS: tl.constexpr,
):  # fmt: skip
    """The gradients of neg and pos in a block of two different sets, and its contribution to the gradient of own.

    own: neg of each row's own set; at: the rows' offsets in the block; mask: rows that exist, in an existing block.
    TERM: "each" if g_term has a number for every term / count, "one" if it has one number for all, None if not given.
    """
    for_neg = given(g_neg, at, mask, NEG)
    for_pos = given(g_pos, at, mask, POS)
    for_own = tl.zeros(at.shape, tl.float64)
    if TERM is not None:
        value = tl.load(neg + at, mask=mask, other=0.0).to(tl.float64)
        negatives = value
        if not CROSS:
            negatives = log_add(own, value)
        upstream = given(g_term, at if TERM == "each" else at * 0, mask, True) / count
        positive = tl.load(pos + at, mask=mask, other=0.0).to(tl.float64)
        g = tl.where(upstream == 0, 0.0, upstream * sigmoid(negatives - positive))
        for_neg += tl.where(g == 0, 0.0, g * tl.exp(value - negatives))
        if not CROSS:
            for_own += tl.where(g == 0, 0.0, g * tl.exp(own - negatives))
        for_pos -= g
    return for_neg, for_pos, for_own


@triton.jit
def finite_size(g):
    """|g|, or 0 if g is not finite, so that it does not determine the scale of the other gradients."""
    size = tl.abs(g)
    return tl.where(size < float("inf"), size, 0.0)


@triton.jit
def exponent_of(x):
    """floor(log2 x), at least -1000. x: float64 >= 0, finite"""
    bits = x.to(tl.int64, bitcast=True)
    return tl.maximum(((bits >> 52) & 2047) - 1023, -1000).to(tl.int32)


@triton.jit
def power_of_two(exponent):
    """2^exponent in float64. exponent: int32 between -1000 and 1000"""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def gradient_scale(norm, unit, inverse_tau, NORMALIZE: tl.constexpr):
    """The factor from dz (projected, if rows are normalised) to the gradient of x, in float64; 0 for a row of zeros."""
    scale = (unit * inverse_tau).to(tl.float64) + tl.zeros_like(norm)
    if NORMALIZE:
        scale = tl.where(norm == 0, 0.0, scale / tl.where(norm == 0, 1.0, norm))
    return scale


@triton.jit
def factors(scale, ACC: tl.constexpr):
    """Two numbers of dtype ACC whose product is scale, which itself may be outside the range of ACC."""
    if tl.float64 != ACC:
        scale = tl.where(scale > 1e75, 1e75, scale)  # an infinite scale would make NaN of a gradient of 0
    half = power_of_two(exponent_of(scale) // 2)
    return half.to(ACC), (scale / half).to(ACC)


@triton.jit
def scaled(dz, norm, one, other):
    """dz times the two factors of each row; 0 for a row of zeros, even if dz is not finite there."""
    return tl.where(norm[:, None] == 0, 0.0, dz * one[:, None] * other[:, None])


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """Converts x to any dtype, by way of float32, since the interpreter cannot convert float64 to bfloat16."""
    return x if dtype == tl.float64 else x.to(tl.float32).to(dtype)

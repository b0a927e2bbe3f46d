"""The functions of csrc/math/vocabulary.h, mirrored: what a loss is written in.

All numbers of a call have one type, float32 or float64. Only operations that every backend of Triton
has are used, so not its libdevice.

Where a float32 function is a polynomial, it has the coefficients of the C++ function of its name;
but logarithms reduce to another interval here, and C++ has tables for AVX-512. Errors are in ULP,
the largest found in Triton's interpreter, which does not fuse multiply-add; tests/test_triton_primitives.py
holds them. The functions that a comment calls Triton's own come from the GPU vendor's mathematical
library, and in the interpreter from NumPy.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ---- on a known domain ---------------------------------------------------------------------------


@triton.jit
def divide(x, y):
    """x / y, rounded once."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def horner(x, coefficients):
    """A polynomial, from its highest coefficient down: in float32 by fused multiply-add."""
    if x.dtype == tl.float64:
        p = x * coefficients[0] + coefficients[1]
        for k in tl.static_range(2, len(coefficients)):
            p = x * p + coefficients[k]
    else:
        p = tl.fma(x, coefficients[0], coefficients[1])
        for k in tl.static_range(2, len(coefficients)):
            p = tl.fma(x, p, coefficients[k])
    return p


@triton.jit
def exp_nonpositive(x):
    """e^x for x in [-inf, 0] or nan; in float32, 0 below -87.33.

    tl.exp multiplies x by log2(e) first, which costs 7 bits where x is large. Error 1.3 in float32.
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        # Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
        shifted = x * 1.4426950408889634 + 12582912.0
        n = shifted - 12582912.0
        # ln 2 in two parts; the first has 15 bits, so that n times it is exact.
        r = (x - n * 0.693145751953125) - n * 1.42860682030941723e-6
        scale = (shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000
        p = tl.exp2(r * 1.4426950408889634) * scale.to(tl.float32, bitcast=True)
        return tl.where(x < -87.33, 0.0, p)


@triton.jit
def log1p_finite(x):
    """log(1 + x) for x in [-1, inf): what 1 + x rounds away is added in first order. Error 3.3 in
    float32, 1 in float64."""
    u = 1.0 + x
    lost = x - (u - 1.0)
    # u = 0: lost is 0 as well, and the logarithm -inf.
    return tl.log(u) + divide(lost, tl.maximum(u, 1e-30))


@triton.jit
def log1p_unit(x):
    """log(1 + x) for x in [0, 1] or nan. Error 2 in float32, 1 in float64."""
    if x.dtype == tl.float64:
        return log1p_finite(x)
    else:
        # = 2 atanh(s) = 2 s + s^3 q(s^2).
        s = tl.div_rn(x, 2.0 + x)
        s2 = s * s
        q = horner(s2, (0.24289557, 0.21430741, 0.28616595, 0.3999889, 0.66666675))
        return tl.fma(s2 * s, q, s + s)


@triton.jit
def clamp_min(x, low):
    return tl.where(x < low, low, x)


@triton.jit
def clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


# ---- on every number -----------------------------------------------------------------------------
# What a custom loss may call with anything, infinities and nan included.


@triton.jit
def select(condition, yes, no):
    return tl.where(condition, yes, no)


# As integers, since Triton's interpreter has no scalar conditions.


@triton.jit
def logical_and(a, b):
    return (a.to(tl.int32) & b.to(tl.int32)) != 0


@triton.jit
def logical_or(a, b):
    return (a.to(tl.int32) | b.to(tl.int32)) != 0


@triton.jit
def logical_not(a):
    return a == 0


@triton.jit
def abs(x):
    return tl.abs(x)


@triton.jit
def maximum(a, b):
    """nan where either is, as in torch."""
    return tl.where(logical_or(a > b, a != a), a, b)


@triton.jit
def minimum(a, b):
    return tl.where(logical_or(a < b, a != a), a, b)


@triton.jit
def sign(x):
    """0 for zeros and nan, as in torch."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0)).to(x.dtype)


@triton.jit
def sqrt(x):
    """Rounded once."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def sin(x):
    """Triton's own."""
    return tl.sin(x)


@triton.jit
def cos(x):
    """Triton's own."""
    return tl.cos(x)


@triton.jit
def _whole(shifted):
    """The integer n of n + 1.5 * 2^23, from its bits."""
    return shifted.to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _power_of_two(n):
    """2^n for n in [-126, 127]."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _reduce_exp(x):
    """x = n ln 2 + r with |r| <= ln(2) / 2: n, and e^r - 1. |x| < 2^15, or nan."""
    shifted = tl.fma(x, 1.44269504, 12582912.0)
    n = shifted - 12582912.0
    r = tl.fma(n, -0.693145751953125, x)
    r = tl.fma(n, -1.42860682030941723e-6, r)
    # e^r = 1 + r + r^2 q(r).
    q = horner(r, (0.0013821468, 0.008368663, 0.041668255, 0.16666521, 0.49999994))
    return _whole(shifted), tl.fma(r * r, q, r)


@triton.jit
def _exp_times(x, more):
    """e^x (1 + more) for small |more|: e to a product, and to what that was rounded by."""
    if x.dtype == tl.float64:
        e = tl.exp(x)
        return tl.where(e < float("inf"), e + e * more, e)
    else:
        n, p = _reduce_exp(clamp(x, -104.0, 89.0))
        # In two steps of scaling, to reach subnormals and infinity.
        half = n >> 1
        first = _power_of_two(half)
        return tl.fma(first, tl.fma(more, 1.0 + p, p), first) * _power_of_two(n - half)


@triton.jit
def exp(x):
    """Error 1.1 in float32; in float64 Triton's own."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return _exp_times(x, 0.0)


@triton.jit
def expm1(x):
    """e^x - 1. Error 1.6 in float32, 2.5 in float64."""
    if x.dtype == tl.float64:
        # Taylor's series where the difference would cancel.
        small = clamp(x, -0.35, 0.35)
        p = horner(small, (
            1.1470745597729725e-11, 1.6059043836821613e-10, 2.08767569878681e-09,
            2.505210838544172e-08, 2.755731922398589e-07, 2.7557319223985893e-06,
            2.48015873015873e-05, 0.0001984126984126984, 0.001388888888888889,
            0.008333333333333333, 0.041666666666666664, 0.16666666666666666, 0.5
        ))  # fmt: skip
        return tl.where(small == x, small * small * p + small, tl.exp(x) - 1.0)
    else:
        n, p = _reduce_exp(clamp(x, -25.0, 89.0))
        # 2^128 is no float: there the last doubling waits.
        beyond = tl.where(n == 128, 1, 0)
        scale = _power_of_two(n - beyond)
        sum = tl.fma(p, scale, scale - 1.0)
        return tl.where(x == 0.0, x, sum * _power_of_two(beyond))  # -0


@triton.jit
def _split(t):
    """n and f of a normal float32 t = 2^n (1 + f) > 0, with 1 + f in [sqrt(1/2), sqrt(2)), so that f
    is exact and small."""
    bits = t.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -0x800000
    n = exponent.to(tl.float32) * 1.1920928955078125e-07
    return n, (bits - exponent).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def _log_normal(t, addend):
    """log(t) for normal t > 0; addend joins where it loses least."""
    n, f = _split(t)
    # log(1 + f) = f - f^2 / 2 + f^3 q(f).
    q = horner(f, (
        -0.076344974, 0.12761578, -0.13160183, 0.14201757, -0.16623357, 0.20001227, -0.2500082,
        0.3333333
    ))  # fmt: skip
    f2 = f * f
    low = tl.fma(f2 * f, q, addend)
    low = tl.fma(n, 1.42860682030941723e-6, low)
    low = tl.fma(f2, -0.5, low)
    return tl.fma(n, 0.693145751953125, f + low)


@triton.jit
def log(x):
    """Natural logarithm: nan below 0. Error 0.9 in float32; in float64 Triton's own."""
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        tiny = x < 1.17549435e-38
        usable = (x > 0.0) & (x < float("inf"))
        normal = tl.where(usable, tl.where(tiny, x * 8388608.0, x), 1.0)
        result = _log_normal(normal, 0.0) - tl.where(tiny, 15.9423847, 0.0)
        edge = tl.where(x == 0.0, float("-inf"), tl.where(x > 0.0, x, float("nan")))
        return tl.where(usable, result, edge)


@triton.jit
def log1p(x):
    """log(1 + x): nan below -1. Error 1.3 in float32, 1 in float64."""
    if x.dtype == tl.float64:
        return tl.where(x == float("inf"), x, log1p_finite(x))
    else:
        t = 1.0 + x
        usable = (t > 0.0) & (x < float("inf"))
        # What the sum lost joins with the slope of the logarithm there, near enough a line.
        lost = (x - (t - 1.0)) * clamp_min(tl.fma(x, -0.5, 1.0), 0.0)
        result = _log_normal(tl.where(usable, t, 1.0), lost)
        edge = tl.where(t == 0.0, float("-inf"), tl.where(x > 0.0, x, float("nan")))
        return tl.where(usable, result, edge)


@triton.jit
def xlogy(x, y):
    """x log(y), 0 where x is 0 and y a number, as in torch."""
    return tl.where(logical_and(x == 0.0, y == y), 0.0, x * log(y))


@triton.jit
def tanh(x):
    """Error 2.5 in float32, 2.8 in float64."""
    e = expm1(-2.0 * tl.abs(x))
    size = divide(-e, 2.0 + e)
    return tl.where(x < 0.0, -size, tl.where(x == 0.0, x, size))


@triton.jit
def erf(x):
    """Error 1.4 in float32; in float64 Triton's own."""
    if x.dtype == tl.float64:
        return tl.erf(x)
    else:
        size = clamp(tl.abs(x), 0.0, 4.0)
        # x + x p(x^2), and 1 - exp(-r(|x|)).
        z = size * size
        p = horner(z, (
            8.535948e-05, -0.00081812846, 0.005204383, -0.026860733, 0.112837195, -0.37612635,
            0.1283792
        ))  # fmt: skip
        r = horner(size, (
            1.0657806e-06, 6.9814655e-06, -0.00035455555, 0.0039183586, -0.024630973, 0.10768884,
            0.6337849, 1.1293333, -0.00014233188
        ))  # fmt: skip
        big = 1.0 - exp_nonpositive(-r)
        big = tl.where(x < 0.0, -big, big)
        return tl.where(size < 0.9, tl.fma(x, p, x), big)


# ---- rows ----------------------------------------------------------------------------------------


@triton.jit
def origin(max):
    """The max to subtract from a row: 0 where all of it is -inf, and x - max would be nan."""
    return tl.where(max == float("-inf"), 0.0, max)


@triton.jit
def weighted(weight, x):
    """weight * x, and 0 where the weight is 0: a class of probability 0 does not count, whatever the
    logarithm of that is."""
    return tl.where(weight == 0.0, 0.0, weight * x)


@triton.jit
def logofsum(others, e):
    """log(others + e), with all digits where others is small and e is 1."""
    return log1p(others + (e - 1.0))


# ---- powers --------------------------------------------------------------------------------------


@triton.jit
def _halves(a):
    """a in two parts, whose products with such parts are exact. |a| far from the largest number."""
    if a.dtype == tl.float64:
        shifted = a * 134217729.0
    else:
        shifted = a * 4097.0
    high = shifted - (shifted - a)
    return high, a - high


@triton.jit
def _product(a, b):
    """a b, and what it was rounded by."""
    product = a * b
    a1, a2 = _halves(a)
    b1, b2 = _halves(b)
    return product, ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


@triton.jit
def _log_in_two(x):
    """log(x) for finite x > 0, as a sum of two numbers of which the second is small."""
    # x = 2^n m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s) = 2 (s + s^3/3 + s^5/5 + ...),
    # s = f / (2 + f), f = m - 1. All but the first term are a hundredth of it.
    if x.dtype == tl.float64:
        tiny = x < 2.2250738585072014e-308
        bits = tl.where(tiny, x * 18014398509481984.0, x).to(tl.int64, bitcast=True)
        biased = (bits - 0x3FE6A09E667F3BCD) & -0x10000000000000
        n = biased.to(tl.float64) * 2.220446049250313e-16 - tl.where(tiny, 54.0, 0.0)
        f = (bits - biased).to(tl.float64, bitcast=True) - 1.0
        exponent, rest = n * 0.6931471803691238, n * 1.9082149292705877e-10
    else:
        tiny = x < 1.17549435e-38
        n, f = _split(tl.where(tiny, x * 8388608.0, x))
        n = n - tl.where(tiny, 23.0, 0.0)
        exponent, rest = n * 0.693145751953125, n * 1.42860682030941723e-6
    d = 2.0 + f
    s = divide(f, d)
    product, lost = _product(s, d)
    s_low = divide(((f - product) - lost) - s * (f - (d - 2.0)), d)
    z = s * s
    if x.dtype == tl.float64:
        q = horner(z, (
            0.043478260869565216, 0.047619047619047616, 0.05263157894736842, 0.058823529411764705,
            0.06666666666666667, 0.07692307692307693, 0.09090909090909091, 0.1111111111111111
        ))  # fmt: skip
    else:
        q = z * 0.09090909090909091 + 0.1111111111111111
    q = z * q + 0.14285714285714285
    q = z * q + 0.2
    q = z * q + 0.3333333333333333
    most = 2.0 * s
    sum = exponent + most
    low = (most - (sum - exponent)) + (rest + 2.0 * (s_low + s * (z * q)))
    high = sum + low
    return high, low - (high - sum)


@triton.jit
def pow(x, y):
    """x^y, by a logarithm in two numbers, so that a large exponent keeps its digits. nan for a
    negative x, unless y is an integer. Error 1.2 for results of usual size; towards the smallest and the
    largest number 4 in float32, 12 in float64."""
    x, y = tl.broadcast(x, y)
    size = tl.abs(x)
    usable = (size > 0.0) & (size < float("inf"))
    high, low = _log_in_two(tl.where(usable, size, 1.0))
    # Beyond these bounds any exponent gives the same result, and splitting would overflow.
    far = clamp(y, -1.0e24, 1.0e24)
    exponent, lost = _product(far, high)
    more = lost + far * low
    result = _exp_times(exponent, tl.where(tl.abs(more) < 1.0, more, 0.0))
    # 0 and infinity have no logarithm.
    limit = tl.where(y < 0.0, float("inf"), 0.0)
    other = tl.where(y < 0.0, 0.0, float("inf"))
    result = tl.where(size == 0.0, limit, tl.where(size < float("inf"), result, other))
    result = tl.where((y == 0.0) | (x == 1.0), 1.0, tl.where((x == x) & (y == y), result, x + y))
    whole = tl.floor(y) == y
    half = y * 0.5
    odd = whole & (tl.floor(half) != half)
    known = whole | (size == 0.0) | (size == float("inf"))
    of_negative = tl.where(known, tl.where(odd, -result, result), float("nan"))
    if x.dtype == tl.float64:
        negative = x.to(tl.int64, bitcast=True) < 0
    else:
        negative = x.to(tl.int32, bitcast=True) < 0
    return tl.where(negative, of_negative, result)


@triton.jit
def power(x, exponent):
    """x^exponent for a number that is the same for all elements: products for the usual ones."""
    if exponent == 2.0:
        result = x * x
    elif exponent == 1.0:
        result = x
    elif exponent == 3.0:
        result = x * x * x
    elif exponent == 0.5:
        result = sqrt(x)
    elif exponent == 0.0:
        result = tl.zeros_like(x) + 1.0
    else:
        result = pow(x, exponent)
    return result


@triton.jit
def power_slope(x, value, exponent):
    """Its derivative, where value is x^exponent; at 0 the limit."""
    if exponent == 2.0:
        slope = x + x
    elif exponent == 1.0:
        slope = tl.zeros_like(x) + 1.0
    elif exponent == 3.0:
        slope = 3.0 * x * x
    elif exponent == 0.0:
        slope = tl.zeros_like(x)
    else:
        at_zero = tl.where(exponent > 1.0, 0.0, exponent * float("inf"))
        slope = tl.where(x == 0.0, at_zero, divide(exponent * value, x))
    return slope


# ---- e^(-x^2) and logarithms of the gamma function -----------------------------------------------


@triton.jit
def exp_minus_square(x):
    """e^(-x^2), without the rounding error of x^2. Error 1.2."""
    size = clamp(x, -40.0, 40.0)
    square, lost = _product(size, size)
    return _exp_times(-square, -lost)


@triton.jit
def _reciprocal(x):
    return divide(tl.full((), 1.0, x.dtype), x)


@triton.jit
def erfc(x):
    """1 - erf(x). Error 3.5 in float32, 5 in float64."""
    # Beyond 1/2, e^(-x^2) t p(t - 1/2) with t = 1 / (1 + x / 2).
    size = clamp(tl.abs(x), 0.5, 30.0)
    square, lost = _product(size, size)
    t = _reciprocal(1.0 + 0.5 * size)
    product, rest = _product(t, 0.5 * size)
    more = (1.0 - t) - product - rest  # t (1 + more) is exact
    u = (t - 0.5) + t * more
    if x.dtype == tl.float64:
        p = horner(u, (
            0.09783621877709633, 0.0378301172432229, -0.11600063146152338, 0.007150217725821691,
            0.07435192995353039, -0.06003939520834159, -0.010290490981768851, 0.06599734183987672,
            -0.04435418728263451, -0.034962980399141676, 0.07396534183406045, -0.008799405452629616,
            -0.08487330479898404, 0.053586957317400444, 0.09889958420087991, -0.10366696122192594,
            -0.17208529510174758, 0.14576892602840924, 0.5589441851120631, 0.687160684413809,
            0.5107913526210115
        ))  # fmt: skip
    else:
        p = horner(u, (
            -0.0616230592, 0.0513126925, 0.0963139087, -0.103522368, -0.171970561, 0.14576596,
            0.558942437, 0.687160671, 0.510791361
        ))  # fmt: skip
    big = _exp_times(-square, more - lost) * (t * p)
    return tl.where(tl.abs(x) < 0.5, 1.0 - erf(x), tl.where(x < 0.0, 2.0 - big, big))


@triton.jit
def _from_pole(x):
    """x minus the nearest integer."""
    return tl.where(tl.floor(x) == x, 0.0, x - tl.floor(x + 0.5))


@triton.jit
def _sum_of_ten(x, square: tl.constexpr):
    """1 / x + 1 / (x + 1) + ... + 1 / (x + 9), or the sum of their squares."""
    sum = tl.zeros_like(x)
    for k in tl.static_range(10):
        term = _reciprocal(x + (9.0 - k))
        sum += term * term if square else term
    return sum


@triton.jit
def lgamma(x):
    """log|gamma(x)|. Error for x > 0: 2.6 in float32; in float64 50 units of the last place of 1, or of
    the result if that is larger. For other x, by reflection, 9 and 50 such units."""
    positive = x > 0.0
    y = tl.where(positive, x, 1.0 - x)
    usable = y < float("inf")
    y = tl.where(usable, y, 1.0)
    if x.dtype == tl.float64:
        product = y
        for k in tl.static_range(1, 10):
            product = product * (y + k)
        below = y < 10.0
        far = tl.where(below, y + 10.0, y)
        z = _reciprocal(far)
        p = horner(z * z, (
            -0.029550653594771242, 0.00641025641025641, -0.0019175269175269176,
            0.0008417508417508417, -0.0005952380952380953, 0.0007936507936507937,
            -0.002777777777777778, 0.08333333333333333
        ))  # fmt: skip
        result = (far - 0.5) * (tl.log(far) - 1.0) + (z * p + 0.4189385332046727)
        result = result - tl.where(below, tl.log(tl.where(below, product, 1.0)), 0.0)
    else:
        # Below 3, (y - 1) (y - 2) times a polynomial; from there Stirling's series.
        high, low = _log_in_two(y)
        small = y < 1.0
        from_one = tl.where(small, y, y - 1.0)
        from_two = from_one - 1.0
        near = (from_one * from_two) * horner(from_two, (
            -3.87460823e-05, 7.81938579e-05, -5.23886229e-05, 0.000130587083, -0.000425599923,
            0.000944336061, -0.00210205023, 0.00499154674, -0.0123849772, 0.0329656266, -0.10031727,
            0.422784328
        ))  # fmt: skip
        z = _reciprocal(tl.maximum(y, 1.0))
        tail = tl.fma(z, horner(z * z, (0.000678978511, -0.00276988791, 0.0833331645)), 0.418938533)
        factor = y - 0.5
        far = tl.fma(factor, high - 1.0, tl.fma(factor, low, tail))
        result = tl.where(small, near - high, tl.where(y < 3.0, near, far))
    rest = _from_pole(tl.where(usable, x, 0.0))
    # gamma(x) gamma(1 - x) sin(pi x) = pi; 1.14... is log(pi).
    of_sine = tl.abs(tl.sin(3.141592653589793 * rest))
    at_pole = of_sine == 0.0
    reflected = 1.1447298858494002 - log(tl.where(at_pole, 1.0, of_sine)) - result
    reflected = tl.where(at_pole, float("inf"), reflected)
    result = tl.where(positive, result, reflected)
    return tl.where(x == x, tl.where(usable, result, float("inf")), x)


@triton.jit
def digamma(x):
    """The derivative of lgamma. Error for x > 0: 2.6 in float32; in float64 9 units of the last place of
    1, or of the result if that is larger. For other x, by reflection, 9 such units."""
    positive = x > 0.0
    y = tl.where(positive, x, 1.0 - x)
    if x.dtype == tl.float64:
        below = y < 10.0
        far = tl.where(below, y + 10.0, y)
        z = _reciprocal(far)
        tail = z * z * horner(z * z, (
            0.08333333333333333, -0.021092796092796094, 0.007575757575757576, -0.004166666666666667,
            0.003968253968253968, -0.008333333333333333, 0.08333333333333333
        ))  # fmt: skip
        result = tl.log(far) - (z * 0.5 + tail)
        result = result - tl.where(below, _sum_of_ten(y, False), 0.0)
    else:
        # Its root is at 1.461632133 + 1.24e-8; below 2 it is a polynomial.
        small = y < 1.0
        from_one = tl.where(small, y, y - 1.0)
        near = ((from_one - 0.461632133) - 1.24381499e-08) * horner(from_one - 0.5, (
            -0.0162213296, 0.0239243302, -0.0258723572, 0.0393618196, -0.0620400012, 0.0951174051,
            -0.148399964, 0.240538388, -0.423627466, 0.951055884
        ))  # fmt: skip
        z = _reciprocal(y)
        # 0 instead of the square of a large number.
        inside = tl.where(y < 2.0, 0.0, z)
        square = inside * inside
        tail = square * horner(square, (
            -0.00182888168, 0.00356146693, -0.00830013491, 0.0833323896
        ))  # fmt: skip
        far = log(y) - tl.fma(inside, 0.5, tail)
        result = tl.where(small, near - z, tl.where(y < 2.0, near, far))
    angle = 3.141592653589793 * _from_pole(x)
    at_pole = angle == 0.0
    sine = tl.where(at_pole, 1.0, tl.sin(angle))
    reflected = result - 3.141592653589793 * divide(tl.cos(angle), sine)
    edge = tl.where(x == 0.0, -_reciprocal(x), float("nan"))
    return tl.where(positive, result, tl.where(at_pole, edge, reflected))


@triton.jit
def trigamma(x):
    """The derivative of digamma. Error for x > 0: 2.8; for other x, by reflection, 9 units of the last
    place of 1, or of the result if that is larger."""
    positive = x > 0.0
    y = tl.where(positive, x, 1.0 - x)
    below = y < 10.0
    z = _reciprocal(tl.where(below, y + 10.0, y))
    tail = z * z * horner(z * z, (
        -7.092156862745098, 1.1666666666666667, -0.2531135531135531, 0.07575757575757576,
        -0.03333333333333333, 0.023809523809523808, -0.03333333333333333, 0.16666666666666666
    ))  # fmt: skip
    result = z + z * (z * 0.5 + tail)
    result = result + tl.where(below, _sum_of_ten(y, True), 0.0)
    sine = tl.sin(3.141592653589793 * _from_pole(x))
    root = 3.141592653589793 * _reciprocal(sine)
    reflected = tl.where(x == float("-inf"), float("nan"), root * root - result)
    return tl.where(positive, result, reflected)

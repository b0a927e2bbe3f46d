"""The primitives of the Triton backend: errors, infinities and nan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import DEVICE
from helpers import FUSED

pytest.importorskip("triton")
mpmath = pytest.importorskip("mpmath")
import triton
import triton.language as tl

from fusedloss.backends.triton import primitives, runtime

pytestmark = [
    pytest.mark.skipif(FUSED != "triton", reason="FUSEDLOSS_TEST_BACKEND is not triton"),
    pytest.mark.interpret_all,
    pytest.mark.usefixtures("fused"),
]
by_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
INF, NAN = math.inf, math.nan


@triton.jit
def _apply(operands, out, PRIMITIVE: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    numbers = ()
    for k in tl.static_range(len(operands)):
        numbers = numbers + (tl.load(operands[k] + at),)  # type: ignore[assignment]
    tl.store(out + at, PRIMITIVE(*numbers))


@triton.jit
def _apply_power(x, exponent, value, slope, N: tl.constexpr):
    at = tl.arange(0, N)
    base, e = tl.load(x + at), tl.load(exponent)
    v = primitives.power(base, e)
    tl.store(value + at, v)
    tl.store(slope + at, primitives.power_slope(base, v, e))


def apply(primitive: Any, *operands: Tensor) -> Tensor:
    n = operands[0].numel()
    size = 1 << (n - 1).bit_length()
    padded = [torch.nn.functional.pad(t, (0, size - n)).to(DEVICE) for t in operands]
    out = torch.empty_like(padded[0])
    with runtime.on_device(out.device):
        _apply[(1,)](tuple(padded), out, PRIMITIVE=primitive, N=size, **runtime.NO_FUSION)
    return out[:n].cpu()


@pytest.fixture(autouse=True)
def many_digits() -> Iterator[None]:
    with mpmath.workprec(240):
        yield


def near(x: Any) -> float:
    """The float nearest to a number with many digits."""
    try:
        return float(x)
    except OverflowError:
        return INF if x > 0 else -INF


def check(
    got: Tensor, right: Sequence[Any], points: Sequence[Any], most: float, least: float = 0.0
) -> None:
    """got is within the given units in the last place, and infinite or nan where the truth is. Results
    below `least` have its units."""
    info = torch.finfo(got.dtype)
    expected = torch.tensor([near(r) for r in right], dtype=torch.float64).to(got.dtype)
    worst, where = 0.0, None
    rows = zip(got.tolist(), expected.tolist(), right, points, strict=True)
    for mine, rounded, exact, at in rows:
        if not (math.isfinite(mine) and math.isfinite(rounded)):
            assert mine == rounded or (math.isnan(mine) and math.isnan(rounded)), (
                f"{mine} at {at}, not {rounded}"
            )
            continue
        size = max(abs(rounded), least)
        exponent = math.frexp(size)[1] - 1 if size else -2000
        unit = max(2.0**exponent * info.eps, info.smallest_normal * info.eps)
        off = float(abs(mpmath.mpf(mine) - exact) / mpmath.mpf(unit))
        if off > worst:
            worst, where = off, at
    assert worst <= most, f"{worst:.2f} ULP off at {where!r}"


def spread(dtype: torch.dtype, low: float = -INF, high: float = INF) -> Tensor:
    """Points of every magnitude and of usual size, within bounds, including their ends."""
    generator = torch.Generator().manual_seed(0)
    info = torch.finfo(dtype)
    lowest, highest = math.log(info.smallest_normal) - 9, math.log(info.max)
    with torch.device("cpu"):
        uniform = torch.rand(700, generator=generator, dtype=torch.float64)
        every = torch.exp(lowest + uniform * (highest - lowest))
        usual = torch.rand(900, generator=generator, dtype=torch.float64) * 6
        larger = torch.exp(torch.rand(300, generator=generator, dtype=torch.float64) * 7)
        ends = torch.tensor([0.0, 1e-30, 0.35, 0.5, 1.0, 2.0, 87.3, 88.8, 104.0, 709.5, 746.0, INF])
        x = torch.cat([every, usual, larger, ends.double()])
        x = torch.cat([x, -x, torch.tensor([NAN])]).to(dtype)
    return x[~((x < low) | (x > high))]


def exp(x: Any) -> Any:
    return mpmath.exp(x) if x < 1000 else mpmath.inf


def log(x: Any) -> Any:
    if x == 0:
        return mpmath.ninf
    return mpmath.nan if x < 0 else mpmath.log(x) if x < INF else x


def log1p(x: Any) -> Any:
    return mpmath.log1p(x) if abs(x) < 1 else log(1 + x)


def expm1(x: Any) -> Any:
    return mpmath.expm1(x) if abs(x) < 1000 else exp(x) - 1


def exp_minus_square(x: Any) -> Any:
    return mpmath.exp(-x * x) if abs(x) < 100 else mpmath.mpf(0)


def erfc(x: Any) -> Any:
    return mpmath.erfc(x) if abs(x) < 100 else 1 - mpmath.sign(x)


def lgamma(x: Any) -> Any:
    if abs(x) == INF or (x <= 0 and x == mpmath.floor(x)):
        return mpmath.inf
    return mpmath.re(mpmath.loggamma(x))


def digamma(x: Any) -> Any:
    if x == 0:
        return -mpmath.inf * math.copysign(1, x)
    if x == INF or (x < 0 and x == mpmath.floor(x)):
        return mpmath.inf if x == INF else mpmath.nan
    return mpmath.digamma(x)


def trigamma(x: Any) -> Any:
    if x == INF or (x <= 0 and x == mpmath.floor(x)):
        return mpmath.mpf(0) if x == INF else mpmath.inf
    return mpmath.psi(1, x)


# Each primitive: its truth; the largest errors in float32 and float64, in ULP, and its domain.
ERRORS: dict[str, tuple[Callable[[Any], Any], float, float, float, float]] = {
    "exp": (exp, 1.1, 1.0, -INF, INF),
    "expm1": (expm1, 1.6, 2.5, -INF, INF),
    "log": (log, 0.9, 1.0, -INF, INF),
    "log1p": (log1p, 1.3, 1.0, -INF, INF),
    "tanh": (
        lambda x: mpmath.tanh(x) if abs(x) < 1000 else mpmath.sign(x),
        *(2.5, 2.8, -INF, INF),
    ),
    "erf": (lambda x: mpmath.erf(x) if abs(x) < 30 else mpmath.sign(x), 1.4, 1.0, -INF, INF),
    "sqrt": (lambda x: mpmath.sqrt(x) if x >= 0 else mpmath.nan, 0.5, 0.5, -INF, INF),
    "sin": (lambda x: mpmath.sin(x) if abs(x) < INF else mpmath.nan, 1.7, 1.0, -INF, INF),
    "cos": (lambda x: mpmath.cos(x) if abs(x) < INF else mpmath.nan, 1.7, 1.0, -INF, INF),
    "exp_minus_square": (exp_minus_square, 1.2, 1.2, -INF, INF),
    "erfc": (erfc, 3.5, 5.0, -INF, INF),
    # In float64 roots are off: see IN_UNITS_OF_ONE.
    "lgamma": (lgamma, 2.6, INF, 0.0, INF),
    "digamma": (digamma, 2.6, INF, 1e-38, INF),
    "trigamma": (trigamma, 2.8, 2.8, 1e-18, 1e18),
    "exp_nonpositive": (exp, 1.3, 1.0, -87.33, 0.0),
    "log1p_finite": (log1p, 3.3, 1.0, -1.0, 1e30),
    "log1p_unit": (log1p, 2.0, 1.0, 0.0, 1.0),
}


# The largest errors in units of the last place of 1, or of the result if that is larger.
IN_UNITS_OF_ONE: dict[str, tuple[Callable[[Any], Any], float, float, float, float]] = {
    "lgamma": (lgamma, 9.0, 50.0, -40.0, 1e6),
    "digamma": (digamma, 9.0, 9.0, -40.0, 1e6),
    "trigamma": (trigamma, 9.0, 9.0, -40.0, 1e6),
}


@by_dtype
@pytest.mark.parametrize("primitive", IN_UNITS_OF_ONE)
def test_errors_in_units_of_one(primitive: str, dtype: torch.dtype) -> None:
    truth, *most, low, high = IN_UNITS_OF_ONE[primitive]
    x = spread(dtype, low, high)
    right = [
        mpmath.nan if math.isnan(at) else truth(mpmath.mpf(at) if at else at) for at in x.tolist()
    ]
    got = apply(getattr(primitives, primitive), x)
    check(got, right, x.tolist(), most[dtype is torch.float64], least=1.0)


@by_dtype
@pytest.mark.parametrize("primitive", ERRORS)
def test_errors(primitive: str, dtype: torch.dtype) -> None:
    truth, *most, low, high = ERRORS[primitive]
    x = spread(dtype, low, high)
    right = [
        mpmath.nan if math.isnan(at) else truth(mpmath.mpf(at) if at else at) for at in x.tolist()
    ]
    got = apply(getattr(primitives, primitive), x)
    check(got, right, x.tolist(), most[dtype is torch.float64])


def test_far_below() -> None:
    """Where e^x is no longer a normal float32."""
    x = torch.tensor([-87.34, -1e4, -1e30, -INF])
    assert apply(primitives.exp_nonpositive, x).tolist() == [0.0] * 4


def power(x: float, y: float) -> Any:
    """x^y as in C."""
    if y == 0 or x == 1:
        return mpmath.mpf(1)
    if math.isnan(x) or math.isnan(y):
        return mpmath.nan
    whole = math.isinf(y) or y == math.floor(y)
    negative = math.copysign(1, x) < 0 and whole and not math.isinf(y) and y % 2 == 1
    size = abs(x)
    if size == 0 or math.isinf(size):
        result = mpmath.inf if (size == 0) == (y < 0) else mpmath.mpf(0)
    elif x < 0 and not whole:
        return mpmath.nan
    elif math.isinf(y):
        result = mpmath.mpf(1) if size == 1 else mpmath.inf
        result = result if size == 1 or (size > 1) == (y > 0) else mpmath.mpf(0)
    else:
        result = mpmath.exp(mpmath.mpf(y) * mpmath.log(mpmath.mpf(size)))
    return -result if negative else result


def pairs(dtype: torch.dtype) -> dict[str, tuple[list[float], list[float], float]]:
    """Several kinds of bases and exponents, and the largest error there."""
    wide = dtype is torch.float64
    generator = torch.Generator().manual_seed(1)
    top = math.log(torch.finfo(dtype).max)
    with torch.device("cpu"):
        a, b, c, d = torch.rand(4, 600, generator=generator, dtype=torch.float64)
    scales = torch.tensor([1.0, 0.1, 0.01, 1e-4]).double().repeat(150)
    any_base = torch.exp((2 * a - 1) * top * scales).to(dtype)
    to_the_end = ((2 * b - 1) * 1.06 * top / any_base.double().log()).to(dtype)
    usual = (4 * a).to(dtype), (10 * b - 5).to(dtype)
    whole = (6 * c - 3).to(dtype), (80 * d - 40).round().to(dtype)
    ends = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 0.5, -0.5, 2.7, -2.7, 1e-30, 1e30]
    ends += [INF, -INF, NAN, torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal / 4]
    ends = torch.tensor(ends, dtype=dtype).tolist()
    return {
        "usual": (usual[0].tolist(), usual[1].tolist(), 1.2),
        "whole": (whole[0].tolist(), whole[1].tolist(), 2.0),
        "to the end": (any_base.tolist(), to_the_end.tolist(), 12.0 if wide else 4.0),
        "special": ([x for x in ends for _ in ends], ends * len(ends), 4.0),
    }


@by_dtype
@pytest.mark.parametrize("kind", pairs(torch.float32))
def test_pow(kind: str, dtype: torch.dtype) -> None:
    x, y, most = pairs(dtype)[kind]
    got = apply(primitives.pow, *(torch.tensor(t, dtype=dtype) for t in (x, y)))
    points = list(zip(x, y, strict=True))
    check(got, [power(*at) for at in points], points, most)


@by_dtype
@pytest.mark.parametrize("exponent", [2.0, 1.0, 3.0, 0.5, 0.0, 2.7, -1.5, 1.3, 0.7, -2.0])
def test_power(exponent: float, dtype: torch.dtype) -> None:
    """With one exponent for all elements; the slope is as exact as the value."""
    x = torch.tensor([0.0, 1e-10, 0.3, 1.0, 1.7, 3.0, 40.0, -0.3, -2.0, NAN], dtype=dtype)
    e = torch.tensor([exponent], dtype=dtype)
    padded = torch.nn.functional.pad(x, (0, 16 - x.numel())).to(DEVICE)
    value, slope = torch.empty_like(padded), torch.empty_like(padded)
    with runtime.on_device(value.device):
        _apply_power[(1,)](padded, e.to(DEVICE), value, slope, N=16, **runtime.NO_FUSION)
    x.requires_grad_()
    right = x.double() ** e.double()
    (right_slope,) = torch.autograd.grad(right.sum(), x)
    n = x.numel()
    rtol = 8 * torch.finfo(dtype).eps
    kwargs = {"rtol": rtol, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(value[:n].cpu(), right.detach().to(dtype), **kwargs)
    torch.testing.assert_close(slope[:n].cpu(), right_slope, **kwargs)


# The primitive and torch's function: the same bits.
EXACT: dict[str, tuple[Any, Callable[..., Tensor]]] = {
    "abs": (primitives.abs, torch.abs),
    "sign": (primitives.sign, torch.sign),
    "maximum": (primitives.maximum, torch.maximum),
    "minimum": (primitives.minimum, torch.minimum),
    "divide": (primitives.divide, torch.div),
    "clamp_min": (primitives.clamp_min, lambda x, low: torch.where(x < low, low, x)),
}


@by_dtype
@pytest.mark.parametrize("primitive", EXACT)
def test_exact(primitive: str, dtype: torch.dtype) -> None:
    ours, theirs = EXACT[primitive]
    ends = torch.tensor([0.0, -0.0, 1.0, -2.5, 3.0, 1e-30, INF, -INF, NAN], dtype=dtype)
    with torch.device("cpu"):
        operands = torch.cartesian_prod(ends, ends).unbind(1)
    operands = operands[:1] if primitive in ("abs", "sign") else operands
    got = apply(ours, *operands)
    torch.testing.assert_close(got, theirs(*operands), rtol=0, atol=0, equal_nan=True)


@by_dtype
def test_xlogy(dtype: torch.dtype) -> None:
    ends = torch.tensor([0.0, -0.0, 1.0, -2.5, 3.0, 1e-30, INF, -INF, NAN], dtype=dtype)
    with torch.device("cpu"):
        x, y = torch.cartesian_prod(ends, ends).unbind(1)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        apply(primitives.xlogy, x, y), torch.xlogy(x, y), rtol=4 * eps, atol=0, equal_nan=True
    )

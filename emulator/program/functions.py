"""Exponentials, logarithms and their like of FP32 numbers, with the same bits on every host.

XLA evaluates these with other instructions on other processors, whose results differ in their last
bits, and what the vector cores of either machine return is not published. Here each is computed in
FP64 by additions, products, quotients and square roots, which every processor rounds alike, and
rounded to FP32. Before that it is off by 2^-46 at most (measured), so for nearly all arguments the
result is the FP32 number nearest to the true value. Arguments and results below 2^-126 are zeros,
as XLA:CPU has them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

_LEAST = 2.0**-126  # of FP32's normal numbers
_LOG2 = math.log(2)
_LOG2_HIGH = round(_LOG2 * 2**42) / 2**42  # its product with an exponent is exact
_LOG2_LOW = 5.497923018708371e-14  # log(2) less that


def no_contraction(product: Array) -> Array:
    """The same values, behind a select on NaN that keeps XLA from fusing the product into a later
    addition, or what else it is into what follows.
    """
    return lax.select(product != product, lax.full_like(product, math.nan), product)


def _times(x: Array, y: Array | float) -> Array:
    return no_contraction(x * y)


def _polynomial(x: Array, coefficients: Sequence[float]) -> Array:
    """The last coefficient plus `x` times the one before it, and so on."""
    total = lax.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = _times(total, x) + coefficient
    return total


# In FP64. Arguments are FP32 numbers, or such combinations of them that nothing overflows.


_WHOLE = 1.5 * 2.0**52  # beside it, the last place of a double is 1
_WHOLE_WORD = 0x4338000000000000  # of that number


def _rounded(x: Array) -> tuple[Array, Array]:
    """The nearest whole number n, and `2^n`, for -1022 <= n <= 1023."""
    n = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    word = lax.bitcast_convert_type(n + _WHOLE, jnp.int64)  # n in its last bits
    return n, lax.bitcast_convert_type((word + 1023) << 52, jnp.float64)


def _reduced(x: Array) -> tuple[Array, Array]:
    """`2^n` and a rest r of at most log(2) / 2 with `exp(x) = 2^n exp(r)`."""
    x = lax.clamp(-700.0, x, 700.0)
    n, power = _rounded(_times(x, 1 / _LOG2))
    return power, (x - _times(n, _LOG2_HIGH)) - _times(n, _LOG2_LOW)


_TAYLOR = [1 / math.factorial(k) for k in range(12, 0, -1)]  # of (e^r - 1) / r


def _exp_less_one(r: Array) -> Array:
    return _times(r, _polynomial(r, _TAYLOR))


def _exp_of_small(r: Array) -> Array:
    """As the eighth power of another, which takes fewer terms."""
    eighth = 0.125 * r
    root = 1.0 + _times(eighth, _polynomial(eighth, _TAYLOR[-8:]))
    square = root * root
    return (square * square) * (square * square)


def _exp(x: Array) -> Array:
    power, r = _reduced(x)
    return power * _exp_of_small(r)


def _exp2(x: Array) -> Array:
    x = lax.clamp(-1000.0, x, 1000.0)
    n, power = _rounded(x)
    return power * _exp_of_small(_times(x - n, _LOG2))


def _expm1(x: Array) -> Array:
    power, r = _reduced(x)
    result = (power - 1.0) + _times(power, _exp_less_one(r))
    return jnp.where(x == 0.0, x, result)  # of the same sign


_ROOT_OF_HALF = 0x3FE6A09E667F3BCD  # the word of sqrt(1/2)
_ODD = [2 / (2 * k + 1) for k in range(10, 0, -1)]  # of 2 atanh(s) - 2 s, in powers of s


def _twice_atanh(s: Array) -> Array:
    """For an |s| up to 0.18."""
    square = _times(s, s)
    return 2.0 * s + _times(s, _times(square, _polynomial(square, _ODD)))


def _log_parts(x: Array) -> tuple[Array, Array]:
    """A whole number n and `log(x / 2^n)`, of positive normal numbers."""
    word = lax.bitcast_convert_type(x, jnp.int64)
    n = (word - _ROOT_OF_HALF) >> 52
    m = lax.bitcast_convert_type(word - (n << 52), jnp.float64)
    whole = lax.bitcast_convert_type(n + _WHOLE_WORD, jnp.float64) - _WHOLE
    return whole, _twice_atanh((m - 1.0) / (m + 1.0))


def _ends(x: Array, result: Array) -> Array:
    """A logarithm where there is none of a positive number."""
    result = jnp.where(x == jnp.inf, jnp.inf, result)
    result = jnp.where(x == 0.0, -jnp.inf, result)
    return jnp.where(x >= 0.0, result, jnp.nan)


def _log(x: Array) -> Array:
    n, rest = _log_parts(x)
    return _ends(x, _times(n, _LOG2_HIGH) + (_times(n, _LOG2_LOW) + rest))


def _log2(x: Array) -> Array:
    n, rest = _log_parts(x)
    return _ends(x, n + _times(rest, 1 / _LOG2))


def _log1p(x: Array) -> Array:
    near = jnp.abs(x) < 0.25  # where `1 + x` would lose what counts
    small = _twice_atanh(jnp.where(near, x, 0.0) / (2.0 + jnp.where(near, x, 0.0)))
    return jnp.where(near, small, _log(1.0 + jnp.where(near, 0.0, x)))


def _rsqrt(x: Array) -> Array:
    return 1.0 / no_contraction(lax.sqrt(x))  # else XLA takes a function of its own


def _cbrt(x: Array) -> Array:
    n, rest = _log_parts(jnp.abs(x))
    third = _times(_times(n, _LOG2) + rest, 1 / 3)
    usual = (jnp.abs(x) < jnp.inf) & (x != 0.0)
    return jnp.where(usual, jnp.copysign(_exp(third), x), x)


def _tanh(x: Array) -> Array:
    t = _expm1(lax.clamp(0.0, 2.0 * jnp.abs(x), 100.0))
    return jnp.copysign(t / (t + 2.0), x)


def _sinh(x: Array) -> Array:
    t = _expm1(jnp.abs(x))
    return jnp.copysign(0.5 * (t + t / (t + 1.0)), x)


def _cosh(x: Array) -> Array:
    e = _exp(jnp.abs(x))
    return 0.5 * (e + 1.0 / e)


def _logistic(x: Array) -> Array:
    return 1.0 / (1.0 + _exp(-x))


def _asinh(x: Array) -> Array:
    size = jnp.abs(x)
    square = _times(size, size)
    far = jnp.where(size < jnp.inf, square / (1.0 + lax.sqrt(1.0 + square)), 0.0)
    return jnp.copysign(_log1p(size + far), x)


def _acosh(x: Array) -> Array:
    t = x - 1.0
    return jnp.where(t >= 0.0, _log1p(t + lax.sqrt(2.0 * t + _times(t, t))), jnp.nan)


def _atanh(x: Array) -> Array:
    size = jnp.abs(x)
    return jnp.copysign(0.5 * _log1p(2.0 * size / (1.0 - size)), x)


# M. J. Wichura, Algorithm AS 241: The Percentage Points of the Normal Distribution, Applied
# Statistics 37 (1988): numerators and denominators of PPND16, the highest power first.
_MIDDLE = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457)
    + (13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608),
    (5226.495278852854561, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867)
    + (5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0),
)
_NEAR = (
    (7.7454501427834140764e-4, 2.27238449892691845833e-2, 0.24178072517745061177)
    + (1.27045825245236838258, 3.64784832476320460504, 5.7694972214606914055)
    + (4.6303378461565452959, 1.42343711074968357734),
    (1.05075007164441684324e-9, 5.475938084995344946e-4, 1.51986665636164571966e-2)
    + (0.14810397642748007459, 0.68976733498510000455, 1.6763848301838038494)
    + (2.05319162663775882187, 1.0),
)
_FAR = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.2426609473880784386e-3)
    + (2.65321895265761230930e-2, 0.29656057182850489123, 1.7848265399172913358)
    + (5.4637849111641143699, 6.6579046435011037772),
    (2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5)
    + (7.868691311456132591e-4, 1.48753612908506148525e-2, 0.13692988092273580531)
    + (0.59983220655588793769, 1.0),
)


def _quotient(x: Array, of: tuple[Sequence[float], Sequence[float]]) -> Array:
    return _polynomial(x, of[0]) / _polynomial(x, of[1])


def _erf_inv(x: Array) -> Array:
    q = 0.5 * jnp.abs(x)  # of the normal distribution, from its middle
    tail = 0.5 - q  # exact
    r = lax.sqrt(-_log(jnp.where(tail > 0.0, tail, 0.5)))
    middle = _times(q, _quotient(0.180625 - _times(q, q), _MIDDLE))
    outside = jnp.where(r <= 5.0, _quotient(r - 1.6, _NEAR), _quotient(r - 5.0, _FAR))
    size = _times(jnp.where(q <= 0.425, middle, outside), math.sqrt(0.5))
    size = jnp.where(tail == 0.0, jnp.inf, size)
    return jnp.copysign(jnp.where(tail >= 0.0, size, jnp.nan), x)


# Sun Microsystems, fdlibm, s_erf.c (1993): numerators and denominators by ranges of |x|, the
# highest power first.
_ERF_AT_ONE = 0.845062911510467529297
_BELOW_FIRST = (  # (erf(x) - x) / x, by x^2
    (-2.37630166566501626084e-5, -5.77027029648944159157e-3, -2.84817495755985104766e-2)
    + (-0.325042107247001499370, 0.128379167095512558561),
    (-3.96022827877536812320e-6, 1.32494738004321644526e-4, 5.08130628187576562776e-3)
    + (6.50222499887672944485e-2, 0.397917223959155352819, 1.0),
)
_BELOW_SECOND = (  # erf(x) less _ERF_AT_ONE, by |x| - 1
    (-2.16637559486879084300e-3, 3.54783043256182359371e-2, -0.110894694282396677476)
    + (0.318346619901161753674, -0.372207876035701323847, 0.414856118683748331666)
    + (-2.36211856075265944077e-3,),
    (1.19844998467991074170e-2, 1.36370839120290507362e-2, 0.126171219808761642112)
    + (7.18286544141962662868e-2, 0.540397917702171048937, 0.106420880400844228286, 1.0),
)
_BELOW_THIRD = (  # log(x erfc(x)) + x^2 + 0.5625, by 1 / x^2
    (-9.81432934416914548592, -81.2874355063065934246, -184.605092906711035994)
    + (-162.396669462573470355, -62.3753324503260060396, -10.5586262253232909814)
    + (-0.693858572707181764372, -9.86494403484714822705e-3),
    (-6.04244152148580987438e-2, 6.57024977031928170135, 108.635005541779435134)
    + (429.008140027567833386, 645.387271733267880336, 434.565877475229228821)
    + (137.657754143519042600, 19.6512716674392571292, 1.0),
)
_BEYOND = (
    (-483.519191608651397019, -1025.09513161107724954, -637.566443368389627722)
    + (-160.636384855821916062, -17.7579549177547519889, -0.799283237680523006574)
    + (-9.86494292470009928597e-3,),
    (-22.4409524465858183362, 474.528541206955367215, 2553.05040643316442583)
    + (3199.85821950859553908, 1536.72958608443695994, 325.792512996573918826)
    + (30.3380607434824582924, 1.0),
)


def _erf_parts(x: Array) -> tuple[Array, Array, Array]:
    """`erf(x)` where |x| is below 0.84375; of |x|, `erf` less its value about 1, up to 1.25; and
    `erfc` beyond.
    """
    size = lax.clamp(0.0, jnp.abs(x), 20.0)  # of which the complement is below 2^-149
    square = _times(size, size)
    first = x + _times(x, _quotient(lax.clamp(0.0, square, 1.0), _BELOW_FIRST))
    second = _quotient(lax.clamp(-0.2, size - 1.0, 0.3), _BELOW_SECOND)
    far = lax.clamp(1.25, size, 20.0)
    inverse = 1.0 / _times(far, far)
    third = jnp.where(far < 1 / 0.35, _quotient(inverse, _BELOW_THIRD), _quotient(inverse, _BEYOND))
    return first, second, _exp((third - 0.5625) - _times(far, far)) / far


def _erf(x: Array) -> Array:
    first, second, beyond = _erf_parts(x)
    size = jnp.abs(x)
    rest = jnp.where(size < 1.25, _ERF_AT_ONE + second, 1.0 - beyond)
    return jnp.where(size < 0.84375, first, jnp.copysign(rest, x))


def _erfc(x: Array) -> Array:
    first, second, beyond = _erf_parts(x)
    size = jnp.abs(x)
    rest = jnp.where(size < 1.25, (1.0 - _ERF_AT_ONE) - second, beyond)
    return jnp.where(size < 0.84375, 1.0 - first, jnp.where(x < 0.0, 2.0 - rest, rest))


IN_FP64: dict[str, Callable[[Array], Array]] = {
    "exp": _exp,
    "exp2": _exp2,
    "expm1": _expm1,
    "log": _log,
    "log2": _log2,
    "log1p": _log1p,
    "rsqrt": _rsqrt,
    "cbrt": _cbrt,
    "tanh": _tanh,
    "sinh": _sinh,
    "cosh": _cosh,
    "logistic": _logistic,
    "asinh": _asinh,
    "acosh": _acosh,
    "atanh": _atanh,
    "erf": _erf,
    "erfc": _erfc,
    "erf_inv": _erf_inv,
}


def _of_fp32(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    @functools.wraps(function)
    def of_fp32(x: Array) -> Array:
        with jax.enable_x64(True):
            wide = x.astype(jnp.float64)
            wide = jnp.where(jnp.abs(wide) < _LEAST, wide * 0.0, wide)
            result = function(wide)
            kept = jnp.where(jnp.abs(result) < _LEAST, result * 0.0, result)
            return kept.astype(jnp.float32)

    return of_fp32


OWN = {name: _of_fp32(function) for name, function in IN_FP64.items()}
"""Of one FP32 array, by the names of JAX's primitives."""

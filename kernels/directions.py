"""Directions: the elementwise half of an optimizer, one formula each.

``scalars(h, t)`` are formed once a tensor and step, in float64, from the hyper-parameters at ``h``;
``advance(g, s, c)`` gives the new state, ``direction(g, s, c)`` the step u from the new state,
where `scalar` reads scalar k from ``c``, rounded once to the dtype of the arithmetic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arithmetic import larger, power, quotient, root, sign


class Direction(NamedTuple):
    """The functions of a direction, and what is to know of its states."""

    scalars: Any
    advance: Any
    direction: Any
    states: int
    rate: Any  # factor on lr at step t
    first_order: bool = False  # a gradient rule scales g before the state sees it
    nonnegative: int = 0  # bit k: state k is never below 0


@triton.jit
def scalar(c, k: tl.constexpr, g):
    """Scalar k of the coming step in the dtype of g."""
    return tl.load(c + k).to(g.dtype)


@triton.jit
def _full_rate(h, t):
    return tl.zeros_like(t) + 1.0


@triton.jit
def _first_state(g, s, c):
    return s[0]


@triton.jit
def _second_state(g, s, c):
    return s[1]


@triton.jit
def _third_state(g, s, c):
    return s[2]


# -- sgd ------------------------------------------------------------------------------------------


@triton.jit
def _sgd_scalars(h, t):
    return ()


@triton.jit
def _sgd_advance(g, s, c):
    return ()


@triton.jit
def _sgd_direction(g, s, c):
    """``u = g``."""
    return g


@triton.jit
def _momentum_scalars(h, t):
    """``mu, gain``; the first step is not dampened."""
    return tl.load(h), tl.where(t == 1, 1.0, 1.0 - tl.load(h + 1))


@triton.jit
def _averaged_scalars(h, t):
    """``mu, gain``."""
    return tl.load(h), 1.0 - tl.load(h)


@triton.jit
def _momentum_advance(g, s, c):
    """``m <- mu*m + gain*g``."""
    return (s[0] * scalar(c, 0, g) + g * scalar(c, 1, g),)


@triton.jit
def _nesterov_direction(g, s, c):
    """``u = g + mu*m``."""
    return g + s[0] * scalar(c, 0, g)


# -- adagrad --------------------------------------------------------------------------------------


@triton.jit
def _adagrad_scalars(h, t):
    """``eps``."""
    return (tl.load(h),)


@triton.jit
def _adagrad_rate(h, t):
    """``1 / (1 + (t - 1)*lr_decay)``."""
    return 1.0 / (1.0 + (t - 1.0) * tl.load(h + 1))


@triton.jit
def _adagrad_advance(g, s, c):
    """``s <- s + g^2``."""
    return (s[0] + g * g,)


@triton.jit
def _adagrad_direction(g, s, c):
    """``u = g / (sqrt(s) + eps)``."""
    return quotient(g, root(s[0]) + scalar(c, 0, g))


# -- rmsprop --------------------------------------------------------------------------------------


@triton.jit
def _rmsprop_scalars(h, t):
    """``alpha, 1 - alpha, eps, mu``."""
    alpha = tl.load(h)
    return alpha, 1.0 - alpha, tl.load(h + 1), tl.load(h + 2)


@triton.jit
def _average(old, x, c):
    return old * scalar(c, 0, x) + x * scalar(c, 1, x)


@triton.jit
def _normalised(g, square, c):
    return quotient(g, root(square) + scalar(c, 2, g))


@triton.jit
def _rmsprop_advance(g, s, c):
    """``v <- a*v + (1-a)*g^2``."""
    return (_average(s[0], g * g, c),)


@triton.jit
def _rmsprop_direction(g, s, c):
    """``u = g / (sqrt(v) + eps)``."""
    return _normalised(g, s[0], c)


@triton.jit
def _centered_advance(g, s, c):
    """``v <- a*v + (1-a)*g^2``, ``r <- a*r + (1-a)*g``."""
    return _average(s[0], g * g, c), _average(s[1], g, c)


@triton.jit
def _centered_direction(g, s, c):
    """``u = g / (sqrt(v - r^2) + eps)``."""
    return _normalised(g, s[0] - s[1] * s[1], c)


@triton.jit
def _rmsprop_momentum_advance(g, s, c):
    """As rmsprop, then ``m <- mu*m + g / (sqrt(v) + eps)``."""
    square = _average(s[0], g * g, c)
    return square, s[1] * scalar(c, 3, g) + _normalised(g, square, c)


@triton.jit
def _centered_momentum_advance(g, s, c):
    """As centered rmsprop, then ``m <- mu*m + g / (sqrt(v - r^2) + eps)``."""
    square = _average(s[0], g * g, c)
    mean = _average(s[1], g, c)
    return square, mean, s[2] * scalar(c, 3, g) + _normalised(g, square - mean * mean, c)


# -- adam -----------------------------------------------------------------------------------------


@triton.jit
def _adam_scalars(h, t):
    """``beta1, gain, beta2, 1 - beta2, eps, 1/(1 - beta1^t), 1/sqrt(1 - beta2^t)``."""
    beta1, beta2 = tl.load(h), tl.load(h + 1)
    both = tl.load(h + tl.arange(0, 2))[None, :]
    power1, power2 = tl.split(power(both, t[:, None]))
    corrects = tl.load(h + 3) != 0
    unbias1 = tl.where(corrects, 1.0 / (1.0 - power1), 1.0)
    unbias2 = tl.where(corrects, 1.0 / root(1.0 - power2), 1.0)
    gain = tl.where(tl.load(h + 4) != 0, 1.0 - beta1, 1.0)
    return beta1, gain, beta2, 1.0 - beta2, tl.load(h + 2), unbias1, unbias2


@triton.jit
def _adam_advance(g, s, c):
    """``m <- b1*m + gain*g``, ``v <- b2*v + (1-b2)*g^2``."""
    mean = s[0] * scalar(c, 0, g) + g * scalar(c, 1, g)
    return mean, s[1] * scalar(c, 2, g) + (g * g) * scalar(c, 3, g)


@triton.jit
def _corrected(mean, square, c):
    m = mean * scalar(c, 5, mean)
    return quotient(m, root(square) * scalar(c, 6, mean) + scalar(c, 4, mean))


@triton.jit
def _adam_direction(g, s, c):
    """``u = m_hat / (sqrt(v_hat) + eps)``."""
    return _corrected(s[0], s[1], c)


@triton.jit
def _amsgrad_advance(g, s, c):
    """As adam, and the largest v so far."""
    mean, square = _adam_advance(g, s, c)
    return mean, square, larger(s[2], square)


@triton.jit
def _amsgrad_direction(g, s, c):
    """As adam, over the largest v."""
    return _corrected(s[0], s[2], c)


# -- lion -----------------------------------------------------------------------------------------


@triton.jit
def _lion_scalars(h, t):
    """``beta2, 1 - beta2, alpha, 1 - alpha`` with alpha = beta1/beta2."""
    beta2 = tl.load(h + 1)
    alpha = tl.load(h) / beta2
    return beta2, 1.0 - beta2, alpha, 1.0 - alpha


@triton.jit
def _lion_direction(g, s, c):
    """``u = sign(alpha*m + (1-alpha)*g)``; m moves as a momentum does."""
    return sign(s[0] * scalar(c, 2, g) + g * scalar(c, 3, g))


#: name -> direction, in the order of the C++ engine's
DIRECTIONS: dict[str, Direction] = {
    "sgd": Direction(_sgd_scalars, _sgd_advance, _sgd_direction, 0, _full_rate, True),
    "momentum": Direction(_momentum_scalars, _momentum_advance, _first_state, 1, _full_rate, True),
    "nesterov": Direction(
        _momentum_scalars, _momentum_advance, _nesterov_direction, 1, _full_rate, True
    ),
    "averaged_momentum": Direction(
        _averaged_scalars, _momentum_advance, _first_state, 1, _full_rate, True
    ),
    "adagrad": Direction(
        _adagrad_scalars, _adagrad_advance, _adagrad_direction, 1, _adagrad_rate, nonnegative=1
    ),
    "rmsprop": Direction(
        _rmsprop_scalars, _rmsprop_advance, _rmsprop_direction, 1, _full_rate, nonnegative=1
    ),
    "rmsprop_centered": Direction(
        _rmsprop_scalars, _centered_advance, _centered_direction, 2, _full_rate, nonnegative=1
    ),
    "rmsprop_momentum": Direction(
        _rmsprop_scalars, _rmsprop_momentum_advance, _second_state, 2, _full_rate, nonnegative=1
    ),
    "rmsprop_centered_momentum": Direction(
        _rmsprop_scalars, _centered_momentum_advance, _third_state, 3, _full_rate, nonnegative=1
    ),
    "adam": Direction(_adam_scalars, _adam_advance, _adam_direction, 2, _full_rate, nonnegative=2),
    "amsgrad": Direction(
        _adam_scalars, _amsgrad_advance, _amsgrad_direction, 3, _full_rate, nonnegative=6
    ),
    "lion": Direction(_lion_scalars, _momentum_advance, _lion_direction, 1, _full_rate),
}

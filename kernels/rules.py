"""Rules: the sums of each layer in, its scale out; all numbers float64, one entry a layer.

Each is ``(ww, gg, uu, wu, lr, l2, memory, h) -> (grad, a, b, scale)`` for ``u = direction(grad*g)``
and ``w <- a*w + b*u``; ``h`` points to the rule's hyper-parameters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Rule(NamedTuple):
    """A rule's function, and what it wants to be measured."""

    scale: Any
    update: bool = False  # scales the step, not the gradient
    measures_ww: bool = False  # the first pass reads the weights
    raw_gradient: bool = False  # gg before L2 decay is added
    latches: bool = False  # the memory is the layer's radius
    decays_apart: bool = False  # decoupled decay is no part of the step it sees
    averages: bool = False  # the memory is a running mean of gg/n, see `rows.decide`
    plain_at_zero: bool = False  # a layer of zeros takes the plain step


@triton.jit
def plain(ww, gg, uu, wu, lr, l2, memory, h):
    """``f = 1``, or ``b = -lr``."""
    return 1.0, 1.0, -lr, 1.0


@triton.jit
def _singh(ww, gg, uu, wu, lr, l2, memory, h):
    """``f = 1 + log(1 + 1/|g|)``, 0 for a zero gradient."""
    n = tl.sqrt(gg)
    f = tl.where(n > 0, 1.0 + tl.log((1.0 + n) / n), 0.0)
    return f, 1.0, 0.0, f


@triton.jit
def _lars(ww, gg, uu, wu, lr, l2, memory, h):
    """``f = trust*|w| / (|g| + l2*|w| + eps)``; h: trust, eps, clip (``f = min(f/lr, 1)``)."""
    w, g = tl.sqrt(ww), tl.sqrt(gg)
    f = tl.load(h) * w / (g + l2 * w + tl.load(h + 1))
    f = tl.where(tl.load(h + 2) != 0, tl.where(f < lr, f / lr, 1.0), f)
    f = tl.where((w > 0) & (g > 0), f, 1.0)
    return f, 1.0, 0.0, f


@triton.jit
def _lamb(ww, gg, uu, wu, lr, l2, memory, h):
    """``b = -lr*r``, ``r = min(|w|, clip)/|u|`` between bounds; h: clip, least, most."""
    norm, u, clip = tl.sqrt(ww), tl.sqrt(uu), tl.load(h)
    least, most = tl.load(h + 1), tl.load(h + 2)
    r = tl.where(norm < clip, norm, clip) / u
    r = tl.where(r < least, least, r)
    r = tl.where(r > most, most, r)
    r = tl.where((norm > 0) & (u > 0), r, 1.0)
    return 1.0, 1.0, tl.where(u > 0, -(lr * r), 0.0), r


@triton.jit
def _layca(ww, gg, uu, wu, lr, l2, memory, h):
    """Rotation on the sphere of the radius in memory (0: the present norm).

    h: eps, cosine and sine of the largest angle (a cosine above 1: the angle is atan(lr)), whether
    the radius is the present norm.
    """
    norm, eps, cap = tl.sqrt(ww), tl.load(h), tl.load(h + 1)
    perp2 = uu - wu * wu / ww
    turns = (norm > 0) & (perp2 > eps * eps * uu)  # else nothing orthogonal is left
    perp = tl.sqrt(tl.where(turns, perp2, 1.0))
    memory = tl.where(tl.load(h + 3) != 0, 0.0, memory)
    radius = tl.where(memory > 0, memory, norm)
    capped = cap <= 1
    along = tl.where(capped, norm - lr * wu / norm, 1.0)
    across = tl.where(capped, lr * perp, lr)
    side = tl.sqrt(along * along + across * across)
    cosine, sine = along / side, across / side
    beyond = cosine < tl.where(capped, cap, -2.0)
    cosine, sine = tl.where(beyond, cap, cosine), tl.where(beyond, tl.load(h + 2), sine)
    step = sine * radius / perp
    moves = turns & (lr > 0)
    a = tl.where(moves, cosine * (radius / norm) + step * wu / ww, 1.0)
    b = tl.where(norm > 0, tl.where(moves, -step, 0.0), -lr)
    shown = tl.where(turns, tl.where(lr > 0, step / lr, radius / perp), 0.0)
    return 1.0, a, b, tl.where(norm > 0, shown, 1.0)


@triton.jit
def _rated(ww, gg, uu, wu, lr, l2, memory, h):
    """``b = -lr*memory``."""
    return 1.0, 1.0, -(lr * memory), memory


@triton.jit
def _hyperball(ww, gg, uu, wu, lr, l2, memory, h):
    """``w <- R*(w - s*u)/|w - s*u|``, ``s = lr*R/|u|``.

    h: R (0: the memory), whether it is the present norm.
    """
    norm, u, radius = tl.sqrt(ww), tl.sqrt(uu), tl.load(h)
    memory = tl.where(tl.load(h + 1) != 0, 0.0, memory)
    radius = tl.where(radius > 0, radius, tl.where(memory > 0, memory, norm))
    length = lr * radius / u
    square = ww - 2.0 * length * wu + length * length * uu
    moves = (u > 0) & (lr > 0) & (square > 0)
    k = radius / tl.sqrt(tl.where(moves, square, 1.0))
    a = tl.where((radius > 0) & moves, k, 1.0)
    b = tl.where(radius > 0, tl.where(moves, -(k * length), 0.0), -lr)
    shown = tl.where(u > 0, tl.where(moves, k * radius / u, radius / u), 0.0)
    return 1.0, a, b, tl.where(radius > 0, shown, 1.0)


@triton.jit
def _brake(ww, gg, uu, wu, lr, l2, memory, h):
    """The plain step; where it lengthens w, a part of the growth; h: that part."""
    norm = tl.sqrt(ww)
    square = ww - 2.0 * lr * wu + lr * lr * uu
    moved = tl.sqrt(tl.where(square > 0, square, 0.0))
    grows = moved > norm
    longer = (norm + tl.load(h) * (moved - norm)) / tl.where(grows, moved, 1.0)
    k = tl.where(grows, longer, 1.0)
    return 1.0, k, -(k * lr), k


#: name -> rule, in the order of the C++ engine's
RULES: dict[str, Rule] = {
    "plain": Rule(plain),
    "singh": Rule(_singh),
    "lars": Rule(_lars, measures_ww=True, raw_gradient=True, plain_at_zero=True),
    "lamb": Rule(_lamb, update=True, measures_ww=True, plain_at_zero=True),
    "layca": Rule(_layca, update=True, measures_ww=True, latches=True, plain_at_zero=True),
    "rated": Rule(_rated, update=True, measures_ww=True),
    "hyperball": Rule(_hyperball, update=True, measures_ww=True, latches=True, plain_at_zero=True),
    "relative": Rule(_lamb, update=True, measures_ww=True, decays_apart=True, plain_at_zero=True),
    "brake": Rule(_brake, update=True, measures_ww=True),
    "adam_mini": Rule(_rated, update=True, measures_ww=True, decays_apart=True, averages=True),
}

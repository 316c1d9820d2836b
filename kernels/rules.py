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
    latches: bool = False  # keeps the norm of the layer's first step


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
    """``b = -lr*r``, ``r = min(|w|, clip)/|u|``; h: clip, limit r to 1."""
    norm, u, clip = tl.sqrt(ww), tl.sqrt(uu), tl.load(h)
    w = tl.where(norm < clip, norm, clip)
    r = tl.where((w > 0) & (u > 0), w / u, 1.0)
    r = tl.where(tl.load(h + 1) != 0, tl.where(r > 1, 1.0, r), r)
    return 1.0, 1.0, tl.where(u > 0, -(lr * r), 0.0), r


@triton.jit
def _layca(ww, gg, uu, wu, lr, l2, memory, h):
    """Rotation by atan(lr) on the sphere of the radius in memory (0: the present norm); h: eps."""
    norm, eps = tl.sqrt(ww), tl.load(h)
    perp2 = uu - wu * wu / ww
    rotates = perp2 > eps * eps * uu  # else nothing orthogonal is left
    perp = tl.sqrt(tl.where(rotates, perp2, 1.0))
    k = 1.0 / tl.sqrt(1.0 + lr * lr) * tl.where(memory > 0, memory / norm, 1.0)
    c = lr * norm / perp
    moves = (norm > 0) & rotates & (lr > 0)
    a = tl.where(moves, k * (1.0 + c * wu / ww), 1.0)
    b = tl.where(norm > 0, tl.where(moves, -(k * c), 0.0), -lr)
    return 1.0, a, b, tl.where(norm > 0, tl.where(rotates, k * norm / perp, 0.0), 1.0)


@triton.jit
def _rated(ww, gg, uu, wu, lr, l2, memory, h):
    """``b = -lr*memory``."""
    return 1.0, 1.0, -(lr * memory), memory


#: name -> rule, in the order of the C++ engine's
RULES: dict[str, Rule] = {
    "plain": Rule(plain),
    "singh": Rule(_singh),
    "lars": Rule(_lars, measures_ww=True, raw_gradient=True),
    "lamb": Rule(_lamb, update=True, measures_ww=True),
    "layca": Rule(_layca, update=True, measures_ww=True, latches=True),
    "rated": Rule(_rated, update=True, measures_ww=True),
}

"""How 16-bit weights keep what rounding to nearest would lose: the group key ``precision``.

====================  ==========================================  ==================================
``precision``         the arithmetic weight w                     held after the step to x
====================  ==========================================  ==================================
None                  ``p``                                       ``p = round(x)``
``"master"``          ``m``, float32                              ``m = x; p = round(x)``
``"kahan"``           ``p + c``, c of p's dtype                   ``p = round(x); c = round(x - p)``
``"stochastic"``      ``p``                                       ``p = random(x)``, bfloat16 only
====================  ==========================================  ==================================

p is what counts: where somebody has written into it, what is kept beside it is that of another
weight and goes unread. A master counts where it rounds to p, a compensation where it is not larger
than a unit in p's last place (``round(p + c/2) == p``). No copy, loaded model or pruning mask is
undone by an optimizer that was built before it, and no step has to be told.

`random` adds 16 random bits to the bits of x and cuts the lower 16 off: up or down in proportion,
without bias. The bits are a function of the parameter's ``rounding_seed``, the number t of the step
and the element's place in memory (that of a contiguous copy, for tensors with gaps), so a run that
goes on from a state dict and every engine round alike::

    bits = fmix32(upper half of splitmix64(rounding_seed, t) ^ place mod 2^32) >> 16

`fmix32` is MurmurHash3's finaliser.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from . import _C

Precision = Literal["master", "stochastic", "kahan"] | None

#: precision -> key of what the state holds for it
KEYS = {"master": "master", "kahan": "compensation", "stochastic": "rounding_seed"}


def applies(p: Tensor) -> bool:
    """Whether a parameter's weights can be held in another way than as they are."""
    return p.dtype in (torch.bfloat16, torch.float16)


def of(params: Iterable[Tensor], precision: Precision) -> Precision:
    """The precision of a table: None where it has no parameter that the key is about."""
    return precision if any(map(applies, params)) else None


def complete(
    state: dict[str, Any], p: Tensor, precision: str, seed: int | None, number: int
) -> Tensor:
    """What the state of p holds, or else its first value.

    The seed of the optimizer's parameter ``number`` is the number-th that splitmix64 draws from
    ``seed``, or from 0: copies of a model round alike, whatever the seeds of their processes.
    """
    key = KEYS[precision]
    value = state.get(key)
    if precision == "stochastic":
        if value is None:
            seed_of = torch.tensor(_signed(seed or 0), device="cpu")
            value = splitmix64(seed_of, torch.tensor(number, device="cpu"))
        return value.to("cpu", torch.int64)
    dtype = torch.float32 if precision == "master" else p.dtype
    if value is None:
        value = p.detach().clone() if precision == "master" else torch.zeros_like(p.detach())
    return value.to(p.device, dtype)


def load(p: Tensor, state: dict[str, Any], precision: Precision) -> Tensor:
    """The arithmetic weights."""
    near = p.float()
    if precision == "master":
        master = state["master"]
        return torch.where(_nearest(master, p) == near, master, near)
    if precision == "kahan":
        rest = state["compensation"].float()
        return torch.where(_nearest(near + rest * 0.5, p) == near, near + rest, near)
    return near


def store(
    p: Tensor,
    state: dict[str, Any],
    precision: Precision,
    w: Tensor,
    x: Tensor,
    t: float | Tensor,
    place: Tensor,
    skip: Tensor,
) -> None:
    """Store x where w was loaded from; ``skip``: leave these elements alone."""
    if precision == "stochastic":
        x = _random(
            x,
            splitmix64(state["rounding_seed"], torch.as_tensor(t, dtype=torch.float64).long()),
            place,
        )
    elif precision == "master":
        _put(state["master"], x, skip)
    elif precision == "kahan":
        skip = skip | (x == w)  # two pairs of numbers can have one sum
        rest = x - _nearest(x, p)
        rest = torch.where(torch.isfinite(rest), rest, 0.0)  # p has overflowed
        _put(state["compensation"], rest, skip)
    _put(p, x, skip)


def places(p: Tensor, split: bool, codes: bool) -> Tensor:
    """Place of each element in memory; ``split``: rows of p belong to several layers.

    ``codes``: its state is in codes of 8 bits, which have one order whatever that of the weights.
    """
    count = torch.arange(p.numel(), device=p.device)
    if _C.is_dense(p, split) and not codes:
        return count.as_strided(p.shape, p.stride())
    return count.view(p.shape)


def _put(target: Tensor, value: Tensor, skip: Tensor) -> None:
    target.copy_(torch.where(skip, target, value.to(target.dtype)))


def _nearest(x: Tensor, p: Tensor) -> Tensor:
    return x.to(p.dtype).float()


# -- random bits -----------------------------------------------------------------------------------

_LOW = 0xFFFFFFFF


def _signed(x: int) -> int:
    """The int64 of the same 64 bits."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def _shifted(x: Tensor, n: int) -> Tensor:
    """``x >> n``, x being unsigned."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def splitmix64(seed: Tensor, n: Tensor) -> Tensor:
    """The n-th number that the generator SplitMix64 draws from a seed; all int64."""
    x = seed + n * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _fmix32(x: Tensor) -> Tensor:
    """MurmurHash3's finaliser of 32-bit numbers, each in an int64."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW
    return x ^ (x >> 16)


def _random(x: Tensor, key: Tensor, place: Tensor) -> Tensor:
    """x rounded up or down to a bfloat16, which is returned as float32."""
    noise = _fmix32(_shifted(key, 32) ^ (place & _LOW)) >> 16
    bits = (x.view(torch.int32) + noise) & -0x10000
    return torch.where(x.isnan(), x, bits.to(torch.int32).view(torch.float32))

"""The launches of a step, of its halves and of norms, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton.language as tl

from .directions import DIRECTIONS
from .rows import begin, decide, finish, total
from .rules import RULES
from .tiles import advance, apply, measure


class Blocks(NamedTuple):
    """What one program works on. The bits of the sums depend on it: there is no tuning."""

    tiles: int = 1
    elements: int = 2048  # of a tile
    rows: int = 1  # of tensors and of layers
    slots: int = 1024  # tiles of a layer whose sums are added side by side


#: the interpreter takes its time for each operation, however many elements it is on
INTERPRETED = Blocks(tiles=8, elements=512, rows=16, slots=32)


class Launches(NamedTuple):
    """What is launched for each of a plan's methods, in order."""

    step: list[Launch]
    measure: list[Launch]  # the two halves of a step
    apply: list[Launch]
    norms: list[Launch]


class Stored(NamedTuple):
    """How elements are stored: what tiles have in common."""

    dtype: str  # of parameter and gradient
    states: str  # "plain", "bfloat16" or "codes"


class Launch(NamedTuple):
    """A kernel over all rows, or over the tiles that are stored alike."""

    kernel: Any
    stored: Stored | None
    constants: dict[str, Any]
    warps: int = 8

    @property
    def options(self) -> dict[str, Any]:
        """Options of the compiler: no fused multiply-add that is not written."""
        return {"num_warps": self.warps, "enable_fp_fusion": False}


def launches(
    direction: str,
    rule: str,
    measured: bool,
    kinds: Sequence[Stored],
    blocks: Blocks,
    precision: str | None = None,
) -> Launches:
    """The launches of a plan; ``measured``: there are sums to take, by the rule or to skip."""
    d, r = DIRECTIONS[direction], RULES[rule]
    of_rows = {"ROWS": blocks.rows, "SLOTS": blocks.slots}
    formulas = {"ADVANCE": d.advance, "DIRECTION": d.direction, "STATES": d.states}
    passes = {"UPDATE": r.update, "MEASURED": measured}

    def over_tiles(kernel: Any, **constants: Any) -> list[Launch]:
        return [
            Launch(kernel, kind, {**_of(kind, blocks, precision), **constants}) for kind in kinds
        ]

    def over_states(kernel: Any, **constants: Any) -> list[Launch]:
        return over_tiles(kernel, NONNEGATIVE=d.nonnegative, **formulas, **constants)

    def totals(update: bool, ww: bool) -> Launch:
        return Launch(total, None, {"UPDATE": update, "MEASURES_WW": ww, **of_rows})

    first = [Launch(begin, None, {"MAKE": d.scalars, "RATE_OF": d.rate, "ROWS": blocks.rows}, 1)]
    if measured and r.update:
        first += over_states(advance)
    elif measured:
        first += over_tiles(measure, MEASURES_WW=r.measures_ww, RAW=r.raw_gradient, BARE=False)
    asked = {"SCALE": r.scale, "MEASURES_WW": r.measures_ww, "LATCHES": r.latches}
    asked["DECAYS_APART"], asked["AVERAGES"] = r.decays_apart, r.averages
    asked["PLAIN_AT_ZERO"], asked["FIRST_ORDER"] = r.plain_at_zero, d.first_order
    here, given = (
        Launch(decide, None, {**asked, **passes, "TOTAL": t, **of_rows}) for t in (False, True)
    )
    second = [
        *over_states(apply, **passes),
        Launch(finish, None, {"TELLS": measured and not r.update, **of_rows}),
    ]
    return Launches(
        step=[*first, here, *second],
        measure=[*first, totals(r.update, r.measures_ww)],
        apply=[given, *second],
        norms=[
            *over_tiles(measure, MEASURES_WW=False, RAW=True, BARE=True),
            totals(False, False),
        ],
    )


def _of(kind: Stored, blocks: Blocks, precision: str | None) -> dict[str, Any]:
    arithmetic = tl.float64 if kind.dtype == "float64" else tl.float32
    sizes = {"TILES": blocks.tiles, "BLOCK": blocks.elements}
    of_weights = precision if kind.dtype in ("bfloat16", "float16") else None
    stored = {"PRECISION": of_weights, "STORED": kind.states}
    return {"DT": getattr(tl, kind.dtype), "T": arithmetic, **stored, **sizes}

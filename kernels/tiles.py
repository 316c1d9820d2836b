"""The passes over the elements; a program for each tile of one dtype.

In Triton's interpreter, which takes its time for each operation, a program takes several tiles side
by side: what is a number for each tile is a column then.
"""

import triton
import triton.language as tl

from .arithmetic import add_step, finite
from .memory import (
    addresses,
    load,
    load_states,
    load_weights,
    places,
    store_states,
    store_weights,
)
from .tables import (
    GRAD_FACTOR,
    L2,
    RULED,
    SKIPPED,
    SPAN,
    SUMS,
    WIDTH,
    is_active,
    nothing,
    skipped,
)


@triton.jit
def _tiles(t, order, program, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """Number of a program's tile, its tensor, layer, first element and length."""
    place = program * TILES
    if TILES > 1:
        place += tl.arange(0, TILES)[:, None]
    tile = tl.load(order + place).to(tl.int64)
    at = t.spans + tl.load(t.tiles + tile) * SPAN
    tensor = tl.load(at)
    first = tl.load(at + 2) + tile * BLOCK
    count = tl.minimum(tl.load(at + 3) - first, BLOCK)
    count = tl.where(is_active(t, tensor), count, 0)  # else there is nothing to do
    return tile, tensor, tl.load(at + 1), first, count


@triton.jit
def _decayed(g, w, l2):
    return tl.where(l2 != 0, g + w * l2.to(g.dtype), g)


@triton.jit
def _sum(product):
    if product.shape[0] == 1:
        total = tl.sum(product)
    else:
        total = tl.sum(product, 1, keep_dims=True)
    return total


@triton.jit
def measure(
    t,
    order,
    MEASURES_WW: tl.constexpr,
    RAW: tl.constexpr,
    BARE: tl.constexpr,
    STORED: tl.constexpr,
    PRECISION: tl.constexpr,
    DT: tl.constexpr,
    T: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First pass of a gradient rule: gg, and ww where the rule wants it; BARE: gg without decay."""
    if nothing(t):
        return
    tile, tensor, layer, begin, count = _tiles(t, order, tl.program_id(0), TILES, BLOCK)
    first, lane, inside, whole = places(t, tensor, begin, count, STORED, BLOCK)
    w_at, g_at, _, _, aux, full = addresses(
        t, tensor, begin, first, whole, 0, STORED, PRECISION, DT, T
    )
    sums = t.sums + tile * SUMS
    g = load(g_at, lane, inside, full, DT, T) * tl.load(t.config + GRAD_FACTOR).to(T)
    if not BARE:
        l2 = tl.load(t.config + L2)
        if MEASURES_WW or l2 != 0:
            w = load_weights(w_at, aux, lane, inside, full, PRECISION, DT, T)
            if RAW:  # parameters outside the layers are measured as they are used
                l2 = tl.where(tl.load(t.layers + layer * WIDTH + RULED) != 0, 0.0, l2)
            g = _decayed(g, w, l2)
            w = w.to(tl.float64)
            tl.store(sums, _sum(w * w))
    g = g.to(tl.float64)
    tl.store(sums + 1, _sum(g * g))


@triton.jit
def advance(
    t,
    order,
    ADVANCE: tl.constexpr,
    DIRECTION: tl.constexpr,
    STATES: tl.constexpr,
    NONNEGATIVE: tl.constexpr,
    STORED: tl.constexpr,
    PRECISION: tl.constexpr,
    DT: tl.constexpr,
    T: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First pass of an update rule: the new state, and all sums."""
    if nothing(t):
        return
    tile, tensor, _, begin, count = _tiles(t, order, tl.program_id(0), TILES, BLOCK)
    first, lane, inside, whole = places(t, tensor, begin, count, STORED, BLOCK)
    w_at, g_at, s_at, scales_at, aux, full = addresses(
        t, tensor, begin, first, whole, STATES, STORED, PRECISION, DT, T
    )
    w = load_weights(w_at, aux, lane, inside, full, PRECISION, DT, T)
    raw = load(g_at, lane, inside, full, DT, T) * tl.load(t.config + GRAD_FACTOR).to(T)
    old = load_states(s_at, scales_at, lane, inside, full, STORED, NONNEGATIVE, T)
    g = _decayed(raw, w, tl.load(t.config + L2))
    c = t.scalars + tensor * WIDTH
    new = ADVANCE(g, old, c)
    skip = skipped(t, finite(raw))
    s = ()
    for k in tl.static_range(STATES):  # an element with a bad gradient keeps its state
        s = s + (tl.where(skip, old[k], new[k]),)
    s = store_states(s_at, scales_at, s, lane, inside, full, STORED, NONNEGATIVE, T)
    u = tl.where(inside, DIRECTION(g, s, c), 0.0).to(tl.float64)
    w, g = w.to(tl.float64), g.to(tl.float64)
    sums = t.sums + tile * SUMS
    tl.store(sums, _sum(w * w))
    tl.store(sums + 1, _sum(g * g))
    tl.store(sums + 2, _sum(u * u))
    tl.store(sums + 3, _sum(w * u))


@triton.jit
def apply(
    t,
    order,
    ADVANCE: tl.constexpr,
    DIRECTION: tl.constexpr,
    STATES: tl.constexpr,
    UPDATE: tl.constexpr,
    MEASURED: tl.constexpr,
    NONNEGATIVE: tl.constexpr,
    STORED: tl.constexpr,
    PRECISION: tl.constexpr,
    DT: tl.constexpr,
    T: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``w <- a*w + b*u``, u formed from the state, which a gradient rule advances here."""
    if nothing(t):
        return
    last_first = tl.num_programs(0) - 1 - tl.program_id(0)  # what was read last is still in cache
    tile, tensor, layer, begin, count = _tiles(t, order, last_first, TILES, BLOCK)
    scale = t.scales + layer * WIDTH
    count = tl.where(tl.load(scale + SKIPPED) == 0, count, 0)
    first, lane, inside, whole = places(t, tensor, begin, count, STORED, BLOCK)
    w_at, g_at, s_at, scales_at, aux, full = addresses(
        t, tensor, begin, first, whole, STATES, STORED, PRECISION, DT, T
    )
    w = load_weights(w_at, aux, lane, inside, full, PRECISION, DT, T)
    g = load(g_at, lane, inside, full, DT, T) * tl.load(t.config + GRAD_FACTOR).to(T)
    s = load_states(s_at, scales_at, lane, inside, full, STORED, NONNEGATIVE, T)
    g = _decayed(g, w, tl.load(t.config + L2))
    c = t.scalars + tensor * WIDTH
    if not UPDATE:
        g = g * tl.load(scale).to(T)
        s = ADVANCE(g, s, c)
        s = store_states(s_at, scales_at, s, lane, inside, full, STORED, NONNEGATIVE, T)
    u = DIRECTION(g, s, c)
    moved = add_step(w * tl.load(scale + 1).to(T), u * tl.load(scale + 2).to(T))
    store_weights(t, tensor, first, w_at, aux, w, moved, lane, inside, full, PRECISION, DT, T)
    if MEASURED and not UPDATE:
        w, u = w.to(tl.float64), tl.where(inside, u, 0.0).to(tl.float64)
        sums = t.sums + tile * SUMS
        tl.store(sums, _sum(w * w))
        tl.store(sums + 2, _sum(u * u))
        tl.store(sums + 3, _sum(w * u))

"""The passes over the elements; a program for each tile of one dtype.

``DT`` is the dtype of parameter and gradient, ``T`` that of state and arithmetic, ``PRECISION`` how
16-bit weights are stored (None: rounded). In Triton's interpreter, which takes its time for each
operation, a program takes several tiles side by side: what is a number for each tile is a column
then.
"""

import triton
import triton.language as tl

from .arithmetic import add_step, at_random, finite, narrow, nearest, rounding_key, widen
from .rows import count_steps
from .tables import (
    AUX,
    GRAD,
    GRAD_FACTOR,
    L2,
    RULED,
    SKIPPED,
    STATE,
    WIDTH,
    is_active,
    nothing,
    skipped,
)


@triton.jit
def _tiles(t, order, program, TILES: tl.constexpr):
    """Number of a program's tile, its tensor, layer, first element and length."""
    place = program * TILES
    if TILES > 1:
        place += tl.arange(0, TILES)[:, None]
    tile = tl.load(order + place)
    at = t.tiles + tile * WIDTH
    tensor = tl.load(at)
    active = tl.load(t.tensors + tensor * WIDTH + GRAD) != 0
    count = tl.where(active, tl.load(at + 3), 0)  # else there is nothing to do
    return tile, tensor, tl.load(at + 1), tl.load(at + 2), count


@triton.jit
def _addresses(
    t,
    tensor,
    begin,
    count,
    STATES: tl.constexpr,
    PRECISION: tl.constexpr,
    DT: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Addresses of weights, gradient, states and of what lies beside the weights.

    The last is the seed where weights are rounded by it. Then: whether all can be read 16 bytes at
    a time.
    """
    row = t.tensors + tensor * WIDTH
    w = tl.load(row) + begin * (DT.primitive_bitwidth // 8)
    g = tl.load(row + GRAD) + begin * (DT.primitive_bitwidth // 8)
    s = ()
    bits = w | g
    for k in tl.static_range(STATES):
        state = tl.load(row + STATE + k) + begin * (T.primitive_bitwidth // 8)
        s = s + (state,)
        bits = bits | state
    aux = w
    if PRECISION is not None:
        aux = tl.load(row + AUX)
    if PRECISION == "master" or PRECISION == "kahan":
        aux += begin * ((T if PRECISION == "master" else DT).primitive_bitwidth // 8)
        bits = bits | aux
    return w, g, s, aux, (count == BLOCK) & (bits % 16 == 0)


@triton.jit
def _load(address, lane, inside, full, DT: tl.constexpr, T: tl.constexpr):
    """Elements in the dtype of the arithmetic. Both ways end in one layout, hence in equal sums."""
    p = address.to(tl.pointer_type(tl.uint16 if DT == tl.bfloat16 else DT))
    if len(address.shape) == 0 and full:
        x = tl.load(tl.multiple_of(p, 16) + lane)
    else:
        x = tl.load(p + lane, mask=inside, other=0)
    return widen(x) if DT == tl.bfloat16 else x.to(T)


@triton.jit
def _load_states(addresses, lane, inside, full, T: tl.constexpr):
    s = ()
    for k in tl.static_range(len(addresses)):
        s = s + (_load(addresses[k], lane, inside, full, T, T),)
    return s


@triton.jit
def _store(address, x, lane, inside, full, DT: tl.constexpr):
    p = address.to(tl.pointer_type(tl.uint16 if DT == tl.bfloat16 else DT))
    y = narrow(x) if DT == tl.bfloat16 else x.to(DT)
    if len(address.shape) == 0 and full:
        tl.store(tl.multiple_of(p, 16) + lane, y)
    else:
        tl.store(p + lane, y, mask=inside)


@triton.jit
def _load_weights(
    address, aux, lane, inside, full, PRECISION: tl.constexpr, DT: tl.constexpr, T: tl.constexpr
):
    """The arithmetic weights."""
    w = _load(address, lane, inside, full, DT, T)
    if PRECISION == "master":
        x = _load(aux, lane, inside, full, T, T)
        w = tl.where(nearest(x, DT) == w, x, w)
    if PRECISION == "kahan":
        rest = _load(aux, lane, inside, full, DT, T)
        w = tl.where(nearest(w + rest * 0.5, DT) == w, w + rest, w)
    return w


@triton.jit
def _store_weights(
    t,
    tensor,
    begin,
    address,
    aux,
    w,
    x,
    lane,
    inside,
    full,
    PRECISION: tl.constexpr,
    DT: tl.constexpr,
    T: tl.constexpr,
):
    """Store x where there was w."""
    if PRECISION == "master":
        _store(aux, x, lane, inside, full, T)
    if PRECISION == "kahan":  # two pairs of numbers can have one sum
        rest = x - nearest(x, DT)
        rest = tl.where(finite(rest), rest, 0.0)
        rest = tl.where(x == w, _load(aux, lane, inside, full, DT, T), rest)
        _store(aux, rest, lane, inside, full, DT)
        x = tl.where(x == w, _load(address, lane, inside, full, DT, T), x)
    if PRECISION == "stochastic":
        _, _, count = count_steps(t, tensor, is_active(t, tensor))
        x = at_random(x, rounding_key(aux, count + 1.0), (begin + lane).to(tl.uint32))
    _store(address, x, lane, inside, full, DT)


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
    PRECISION: tl.constexpr,
    DT: tl.constexpr,
    T: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First pass of a gradient rule: gg, and ww where the rule wants it; BARE: gg without decay."""
    if nothing(t):
        return
    tile, tensor, layer, begin, count = _tiles(t, order, tl.program_id(0), TILES)
    w_at, g_at, _, aux, full = _addresses(t, tensor, begin, count, 0, PRECISION, DT, T, BLOCK)
    lane = tl.arange(0, BLOCK)[None, :]
    inside = lane < count
    sums = t.sums + tile * WIDTH
    g = _load(g_at, lane, inside, full, DT, T) * tl.load(t.config + GRAD_FACTOR).to(T)
    if not BARE:
        l2 = tl.load(t.config + L2)
        if MEASURES_WW or l2 != 0:
            w = _load_weights(w_at, aux, lane, inside, full, PRECISION, DT, T)
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
    PRECISION: tl.constexpr,
    DT: tl.constexpr,
    T: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First pass of an update rule: the new state, and all sums."""
    if nothing(t):
        return
    tile, tensor, _, begin, count = _tiles(t, order, tl.program_id(0), TILES)
    w_at, g_at, s_at, aux, full = _addresses(
        t, tensor, begin, count, STATES, PRECISION, DT, T, BLOCK
    )
    lane = tl.arange(0, BLOCK)[None, :]
    inside = lane < count
    w = _load_weights(w_at, aux, lane, inside, full, PRECISION, DT, T)
    raw = _load(g_at, lane, inside, full, DT, T) * tl.load(t.config + GRAD_FACTOR).to(T)
    old = _load_states(s_at, lane, inside, full, T)
    g = _decayed(raw, w, tl.load(t.config + L2))
    c = t.scalars + tensor * WIDTH
    new = ADVANCE(g, old, c)
    skip = skipped(t, finite(raw))
    s = ()
    for k in tl.static_range(STATES):  # an element with a bad gradient keeps its state
        s = s + (tl.where(skip, old[k], new[k]),)
        _store(s_at[k], s[k], lane, inside, full, T)
    u = tl.where(inside, DIRECTION(g, s, c), 0.0).to(tl.float64)
    w, g = w.to(tl.float64), g.to(tl.float64)
    sums = t.sums + tile * WIDTH
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
    tile, tensor, layer, begin, count = _tiles(t, order, last_first, TILES)
    scale = t.scales + layer * WIDTH
    count = tl.where(tl.load(scale + SKIPPED) == 0, count, 0)
    w_at, g_at, s_at, aux, full = _addresses(
        t, tensor, begin, count, STATES, PRECISION, DT, T, BLOCK
    )
    lane = tl.arange(0, BLOCK)[None, :]
    inside = lane < count
    w = _load_weights(w_at, aux, lane, inside, full, PRECISION, DT, T)
    g = _load(g_at, lane, inside, full, DT, T) * tl.load(t.config + GRAD_FACTOR).to(T)
    s = _load_states(s_at, lane, inside, full, T)
    g = _decayed(g, w, tl.load(t.config + L2))
    c = t.scalars + tensor * WIDTH
    if not UPDATE:
        g = g * tl.load(scale).to(T)
        s = ADVANCE(g, s, c)
        for k in tl.static_range(STATES):
            _store(s_at[k], s[k], lane, inside, full, T)
    u = DIRECTION(g, s, c)
    moved = add_step(w * tl.load(scale + 1).to(T), u * tl.load(scale + 2).to(T))
    _store_weights(t, tensor, begin, w_at, aux, w, moved, lane, inside, full, PRECISION, DT, T)
    if MEASURED and not UPDATE:
        w, u = w.to(tl.float64), tl.where(inside, u, 0.0).to(tl.float64)
        sums = t.sums + tile * WIDTH
        tl.store(sums, _sum(w * w))
        tl.store(sums + 2, _sum(u * u))
        tl.store(sums + 3, _sum(w * u))

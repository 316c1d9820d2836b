"""What is done once a tensor or layer; a program for each block of rows."""

import triton
import triton.language as tl

from .arithmetic import finite, power
from .rules import plain
from .tables import (
    DECOUPLED_DECAY,
    DIRECTION_HYPER,
    L2,
    LR,
    PLAIN,
    RATE,
    ROW,
    RULE_HYPER,
    RULED,
    SKIP_COUNT,
    SKIPPED,
    SPAN,
    STATS,
    STEP,
    STEP_IS_DOUBLE,
    SUMS,
    TAKEN,
    WIDTH,
    is_active,
    nothing,
    skipped,
    tensor_of,
)


@triton.jit
def count_steps(t, tensor, active):
    """Addresses of the step counts, which of them are float64, and the counts."""
    at = tl.load(t.tensors + tensor * ROW + STEP, mask=active, other=0)
    wide = active & (tl.load(t.tensors + tensor * ROW + STEP_IS_DOUBLE, mask=active, other=0) != 0)
    double = tl.load(at.to(tl.pointer_type(tl.float64)), mask=wide, other=0.0)
    single = tl.load(at.to(tl.pointer_type(tl.float32)), mask=active & ~wide, other=0.0)
    return at, wide, double + single.to(tl.float64)


@triton.jit
def begin(t, MAKE: tl.constexpr, RATE_OF: tl.constexpr, ROWS: tl.constexpr):
    """Scalars of each tensor's coming step: formed in float64 once, rounded by who reads them."""
    if nothing(t):
        return
    tensor = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    active = is_active(t, tensor)
    _, _, count = count_steps(t, tensor, active)
    h, to = t.config + DIRECTION_HYPER, t.scalars + tensor * WIDTH
    values = MAKE(h, count + 1.0)
    for k in tl.static_range(len(values)):
        tl.store(to + k, values[k])
    tl.store(to + RATE, RATE_OF(h, count + 1.0))


@triton.jit
def _gather(t, layer, SLOTS: tl.constexpr):
    """Add the sums of each layer's active tiles.

    Returns ww, gg, uu, wu, the first active tensor, whether there is one, whether all are active.
    """
    begin = tl.load(t.layers + layer * WIDTH)
    end = tl.load(t.layers + layer * WIDTH + 1)
    ww = tl.zeros([layer.shape[0], SLOTS], tl.float64)
    gg, uu, wu = ww, ww, ww
    first, absent = end, end - end
    longest = tl.max(end - begin)
    start = 0
    while start < longest:
        tile = begin[:, None] + start + tl.arange(0, SLOTS)[None, :]
        inside = tile < end[:, None]
        active = inside & is_active(t, tensor_of(t, tile, inside))
        at = t.sums + tile * SUMS
        ww += tl.load(at, mask=active, other=0.0)
        gg += tl.load(at + 1, mask=active, other=0.0)
        uu += tl.load(at + 2, mask=active, other=0.0)
        wu += tl.load(at + 3, mask=active, other=0.0)
        first = tl.minimum(first, tl.min(tl.where(active, tile, end[:, None]), 1))
        absent += tl.sum((inside & ~active).to(tl.int64), 1)
        start += SLOTS
    tensor = tensor_of(t, first, first < end)
    ww, gg, uu, wu = tl.sum(ww, 1), tl.sum(gg, 1), tl.sum(uu, 1), tl.sum(wu, 1)
    return ww, gg, uu, wu, tensor, first < end, absent == 0


@triton.jit
def total(
    t, UPDATE: tl.constexpr, MEASURES_WW: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr
):
    """The first half of a step ends with each layer's sums; 0 where there is none."""
    if nothing(t):
        return
    layer = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ww, gg, uu, wu, _, _, _ = _gather(t, layer, SLOTS)
    to = t.totals + layer * SUMS
    tl.store(to, ww if MEASURES_WW else 0.0)
    tl.store(to + 1, gg)
    tl.store(to + 2, uu if UPDATE else 0.0)
    tl.store(to + 3, wu if UPDATE else 0.0)


@triton.jit
def _radius(memory, ww, start, stored):
    """A layer's radius as its memory has it, and the coming step's: see csrc/decide.h."""
    arrived = (memory < 0) & (ww >= memory * memory)
    begins = stored & (memory == 0) & (ww == 0)
    return tl.where(begins, 0.0 - start, tl.where(arrived, -memory, memory))


@triton.jit
def _second_moment(memory, square, beta, step):
    """A layer's second moment, corrected for its start: see csrc/decide.h."""
    share = (1.0 - beta) / (1.0 - power(beta, step))
    return tl.where(memory < 0, square, memory + share * (square - memory))


@triton.jit
def decide(
    t,
    SCALE: tl.constexpr,
    UPDATE: tl.constexpr,
    MEASURES_WW: tl.constexpr,
    LATCHES: tl.constexpr,
    DECAYS_APART: tl.constexpr,
    AVERAGES: tl.constexpr,
    PLAIN_AT_ZERO: tl.constexpr,
    FIRST_ORDER: tl.constexpr,
    MEASURED: tl.constexpr,
    TOTAL: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """From each layer's sums to what is applied: decay, edge rules, memory."""
    if nothing(t):
        return
    layer = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ww, gg, uu, wu, tensor, takes_part, whole = _gather(t, layer, SLOTS)
    if TOTAL:
        at = t.totals + layer * SUMS
        ww, gg, uu, wu = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    ruled = tl.load(t.layers + layer * WIDTH + RULED) != 0
    rate = tl.load(t.scalars + tensor * WIDTH + RATE)
    lr = tl.load(t.config + LR) * tl.load(t.lr_scale + layer) * rate
    h, l2 = t.config + RULE_HYPER, tl.load(t.config + L2)
    decay = tl.load(t.config + DECOUPLED_DECAY)
    if UPDATE:
        skip = skipped(t, finite(ww) & finite(gg) & finite(uu) & finite(wu))
        taken = tl.load(t.config + TAKEN)
        is_taken, pace = taken != 0, tl.where(taken != 0, taken, 1.0)
        before = ww + 2.0 * wu + uu  # of weights w = v - taken*u
        ww = tl.where(is_taken, tl.where(before < 0, 0.0, before), ww)
        wu = tl.where(is_taken, (wu + uu) / pace, wu)
        uu = uu / (pace * pace)
        # the rule sees u + decay*w, whose sums follow from those of u
        inside = tl.where(ruled, 0.0, decay) if DECAYS_APART else decay
        uu = uu + 2.0 * inside * wu + inside * inside * ww
        uu = tl.where(uu < 0, 0.0, uu)
        wu = wu + inside * ww
        at = tl.load(t.memory + layer)
        stored = at != 0
        if LATCHES:  # the norm of a part of the layer is no radius
            stored = stored & whole
        at = at.to(tl.pointer_type(tl.float64))
        memory = tl.load(at, mask=stored, other=0.0)
        if LATCHES:
            memory = _radius(memory, ww, tl.load(t.start_radius + layer), stored)
        if AVERAGES:
            _, _, count = count_steps(t, tensor, takes_part)
            square = gg / tl.load(t.start_radius + layer)
            memory = tl.where(stored, memory, -1.0)
            memory = _second_moment(memory, square, tl.load(h + 1), count + 1.0)
            tl.store(at, memory, mask=stored & takes_part & ~skip)
            below = tl.sqrt(memory) + tl.load(h + 2)
            memory = 1.0 / ((1.0 - power(tl.load(h), count + 1.0)) * below)
    else:
        good = finite(gg)
        if MEASURES_WW:
            good = good & (finite(ww) | ~ruled)
        skip = skipped(t, good)
        memory = 0.0
    grad, a, b, scale = SCALE(ww, gg, uu, wu, lr, l2, memory, h)
    if PLAIN_AT_ZERO:
        share = tl.where(ww > 0, 1.0, tl.load(t.config + PLAIN))
        b, scale = b * share, scale * share
        grad = grad if UPDATE else grad * share
    plain_grad, plain_a, plain_b, plain_scale = plain(ww, gg, uu, wu, lr, l2, memory, h)
    grad = tl.where(ruled, grad, plain_grad)
    a, b = tl.where(ruled, a, plain_a), tl.where(ruled, b, plain_b)
    scale = tl.where(ruled, scale, plain_scale)
    if UPDATE:
        if LATCHES:
            grows, steps = memory < 0, tl.load(t.config + PLAIN)
            a, b = tl.where(grows, 1.0, a), tl.where(grows, -(lr * steps), b)
            scale = tl.where(grows, steps, scale)
            first = (memory == 0) & (ww > 0) & (b != 0)
            moves = stored & ~skip & (lr > 0) & (uu > 0)  # a step of nothing leaves no trace
            tl.store(at, tl.where(first, tl.sqrt(ww), memory), mask=moves)
        a = a - lr * (decay - inside)
        shown_a, shown_b = a, b
        a = a + b * inside
        b = tl.where(is_taken, b / pace + a, b)
    else:
        b = -lr if FIRST_ORDER else -(lr * grad)
        grad = grad if FIRST_ORDER else 1.0
        a = 1.0 - lr * decay
        shown_a, shown_b = a, b
    to = t.scales + layer * WIDTH
    tl.store(to, grad)
    tl.store(to + 1, a)
    tl.store(to + 2, b)
    tl.store(to + SKIPPED, skip.to(tl.float64))
    if MEASURED:
        to = t.stats + layer * STATS
        values = (ww, gg, uu, wu, scale, lr * scale, shown_a, shown_b)
        for k in tl.static_range(8):
            tl.store(to + k, values[k], mask=takes_part & ~skip)
        more = takes_part & skip
        tl.store(to + SKIP_COUNT, tl.load(to + SKIP_COUNT, mask=more, other=0.0) + 1.0, mask=more)


@triton.jit
def finish(t, TELLS: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """Advance the step counts; tell what a gradient rule's step was, which is known only now."""
    if nothing(t):
        return
    if TELLS:
        layer = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        ww, _, uu, wu, _, takes_part, _ = _gather(t, layer, SLOTS)
        moved = takes_part & (tl.load(t.scales + layer * WIDTH + SKIPPED) == 0)
        to = t.stats + layer * STATS
        tl.store(to, ww, mask=moved)
        tl.store(to + 2, uu, mask=moved)
        tl.store(to + 3, wu, mask=moved)
    tensor = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.load(t.parts + tensor * WIDTH)
    last = tl.load(t.parts + tensor * WIDTH + 1)
    counts = tensor < 0
    while tl.max(last - part) > 0:  # a count stands still where all layers were left alone
        owner = tl.load(t.spans + part * SPAN + 1, mask=part < last, other=0)
        skip = tl.load(t.scales + owner * WIDTH + SKIPPED, mask=part < last, other=1.0)
        counts = counts | (skip == 0)
        part += 1
    counts = counts & is_active(t, tensor)
    at, wide, count = count_steps(t, tensor, counts)
    tl.store(at.to(tl.pointer_type(tl.float64)), count + 1.0, mask=wide)
    tl.store(at.to(tl.pointer_type(tl.float32)), (count + 1.0).to(tl.float32), mask=counts & ~wide)

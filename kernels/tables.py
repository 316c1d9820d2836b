"""What the kernels walk. Every table has whole blocks: rows beyond the last take no part."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Tables(NamedTuple):
    """Device memory of a plan, rows of 8 numbers; float64 where nothing else is said.

    A span is a part of one tensor, all of it in one layer; a tile is at most a block of its
    elements. Each tile has room of its own for its sums, and a layer's are added in an order that
    depends on their number alone: no atomics, and the same bits wherever the layer stands. A tile
    takes 40 bytes of tables: less than 0.02 an element.
    """

    #: int64, rows of ROW numbers: each tensor's row, as ``csrc/row.h`` has it
    tensors: Any
    #: int64, rows of 4, by tensor: tensor, layer, where tile 0 would begin, last element + 1; an
    #: empty one at the end
    spans: Any
    #: int32, by layer: place in ``spans``
    tiles: Any
    #: int64: first tile, last tile + 1, whether the rule governs the layer
    layers: Any
    #: int64: first and last + 1 of the tensor's places in ``spans``
    parts: Any
    #: one a layer
    lr_scale: Any
    #: one a layer, see the rules with a radius; its number of weights under one that averages
    start_radius: Any
    #: int64, one a layer: address of its memory, or 0
    memory: Any
    #: the numbers of the step, at the places below
    config: Any
    #: each tensor's scalars of the coming step, and the factor on lr
    scalars: Any
    #: rows of 4, of each tile: ww, gg, uu, wu
    sums: Any
    #: rows of 4, of each layer: the same, perhaps with those of other processes
    totals: Any
    #: of each layer: grad, a, b, skip
    scales: Any
    #: rows of 9, of each layer: ww, gg, uu, wu, scale, lr, a, b, skipped
    stats: Any


WIDTH = tl.constexpr(8)
STATS = tl.constexpr(9)
SUMS = tl.constexpr(4)
SPAN = tl.constexpr(4)
# places in a tensor's row: arrays of ARRAY numbers, address first, then other numbers
ROW = tl.constexpr(21)
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(3)
STATE = tl.constexpr(6)
STEP = tl.constexpr(15)
STEP_IS_DOUBLE = tl.constexpr(16)
SEED = tl.constexpr(17)
BLOCK_SIZE = tl.constexpr(18)  # elements that share a scale
ARRAY = tl.constexpr(3)
AUX = tl.constexpr(1)  # of an array: address of what lies beside its elements
# columns
RULED = tl.constexpr(2)
RATE = tl.constexpr(7)
SKIPPED = tl.constexpr(3)
SKIP_COUNT = tl.constexpr(8)
# places in config
LR = tl.constexpr(0)
L2 = tl.constexpr(1)  # weight decay that is added to the gradient
DECOUPLED_DECAY = tl.constexpr(2)  # weight decay that is not
GRAD_FACTOR = tl.constexpr(3)  # factor on the gradient
SKIP = tl.constexpr(4)  # leave layers with a sum that is not finite alone
FOUND_INF = tl.constexpr(5)  # else nothing changes at all
PLAIN = tl.constexpr(6)  # on lr, for layers under the rule that take plain steps at first
TAKEN = tl.constexpr(7)  # rate of the step that weights have taken already, or 0
DIRECTION_HYPER = tl.constexpr(8)  # 5 numbers
RULE_HYPER = tl.constexpr(13)  # 4 numbers


@triton.jit
def is_active(t, tensor):
    """Whether tensors have a gradient in this step."""
    return tl.load(t.tensors + tensor * ROW + GRAD) != 0


@triton.jit
def tensor_of(t, tile, known):
    """The tensors of the tiles that are known, 0 of others."""
    span = tl.load(t.tiles + tile, mask=known, other=0)
    return tl.load(t.spans + span * SPAN, mask=known, other=0)


@triton.jit
def nothing(t):
    """Whether the step changes nothing at all."""
    return tl.load(t.config + FOUND_INF) != 0


@triton.jit
def skipped(t, good):
    """What is left alone, of what is not finite: all of it, or nothing if nothing is skipped."""
    return tl.where(tl.load(t.config + SKIP) != 0, ~good, False)

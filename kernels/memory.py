"""Elements between memory and registers: weights, gradients, states, as they are stored.

``DT`` is the dtype of parameter and gradient, ``T`` that of state and arithmetic, ``PRECISION`` how
16-bit weights are stored (None: rounded), ``STORED`` how states are ("plain", "bfloat16", "codes").
"""

import triton
import triton.language as tl

from .arithmetic import at_random, finite, narrow, nearest, rounding_key, widen
from .codes import BLOCK_OF_CODES, any_of_blocks, decode, encode, largest, scales, spread
from .rows import count_steps
from .tables import ARRAY, AUX, BLOCK_SIZE, GRAD, PARAM, ROW, SEED, STATE, is_active


@triton.jit
def places(t, tensor, begin, count, STORED: tl.constexpr, BLOCK: tl.constexpr):
    """First element of a tile; place of each from there on; which there are; whether they are all.

    The tiles of a tensor with codes are counted as if its blocks were whole.
    """
    lane = tl.arange(0, BLOCK)[None, :]
    inside = lane < count
    whole = count == BLOCK
    if STORED == "codes":
        size = tl.load(t.tensors + tensor * ROW + BLOCK_SIZE)
        within = lane % BLOCK_OF_CODES
        inside = inside & (within < size)
        whole = whole & (size == BLOCK_OF_CODES)
        lane = lane // BLOCK_OF_CODES * size + within
        begin = begin // BLOCK_OF_CODES * size
    return begin, lane, inside, whole


@triton.jit
def addresses(
    t,
    tensor,
    tile_begin,
    begin,
    whole,
    STATES: tl.constexpr,
    STORED: tl.constexpr,
    PRECISION: tl.constexpr,
    DT: tl.constexpr,
    T: tl.constexpr,
):
    """Addresses of weights, gradient, states, their scales, and of what lies beside the weights.

    The last is the seed where weights are rounded by it. Then: whether all can be read 16 bytes at
    a time.
    """
    row = t.tensors + tensor * ROW
    w = tl.load(row + PARAM) + begin * (DT.primitive_bitwidth // 8)
    g = tl.load(row + GRAD) + begin * (DT.primitive_bitwidth // 8)
    s = ()
    scales = ()
    bits = w | g
    wide: tl.constexpr = 2 if STORED == "bfloat16" else T.primitive_bitwidth // 8
    size: tl.constexpr = 1 if STORED == "codes" else wide
    for k in tl.static_range(STATES):
        at = row + STATE + k * ARRAY
        state = tl.load(at) + begin * size
        s = s + (state,)
        if STORED == "codes":
            scales = scales + (tl.load(at + AUX) + tile_begin // BLOCK_OF_CODES * 4,)
        bits = bits | state
    aux = w
    if PRECISION == "stochastic":
        aux = tl.load(row + SEED)
    elif PRECISION is not None:
        beside = (T if PRECISION == "master" else DT).primitive_bitwidth // 8
        aux = tl.load(row + PARAM + AUX) + begin * beside
        bits = bits | aux
    return w, g, s, scales, aux, whole & (bits % 16 == 0)


@triton.jit
def load(address, lane, inside, full, DT: tl.constexpr, T: tl.constexpr):
    """Elements in the dtype of the arithmetic. Both ways end in one layout, hence in equal sums."""
    p = address.to(tl.pointer_type(tl.uint16 if DT == tl.bfloat16 else DT))
    if len(address.shape) == 0 and full:
        x = tl.load(tl.multiple_of(p, 16) + lane)
    else:
        x = tl.load(p + lane, mask=inside, other=0)
    return widen(x) if DT == tl.bfloat16 else x.to(T)


@triton.jit
def _load_codes(
    address, scale_address, lane, inside, full, NONNEGATIVE: tl.constexpr, T: tl.constexpr
):
    byte: tl.constexpr = tl.uint8 if NONNEGATIVE else tl.int8
    c = load(address, lane, inside, full, byte, T)
    block = tl.arange(0, lane.shape[1])[None, :] // BLOCK_OF_CODES
    p = scale_address.to(tl.pointer_type(tl.float32)) + block
    return decode(c, tl.load(p, mask=inside, other=0.0), NONNEGATIVE)


@triton.jit
def _store_codes(address, scale_address, x, lane, inside, full, NONNEGATIVE: tl.constexpr):
    """Store codes and scales; the answer is what they stand for."""
    x = tl.where(inside, x, 0.0)
    to_z, scale = scales(largest(x), NONNEGATIVE)
    c = encode(x, spread(to_z), NONNEGATIVE)
    store(address, c.to(tl.int32), lane, inside, full, tl.int8)
    block = tl.arange(0, scale.shape[1])[None, :]
    p = scale_address.to(tl.pointer_type(tl.float32)) + block
    tl.store(p, scale, mask=any_of_blocks(inside))
    return decode(c, spread(scale), NONNEGATIVE)


@triton.jit
def load_states(
    addresses,
    scales,
    lane,
    inside,
    full,
    STORED: tl.constexpr,
    NONNEGATIVE: tl.constexpr,
    T: tl.constexpr,
):
    """The arithmetic states; bit k of NONNEGATIVE: state k is never below 0."""
    s = ()
    for k in tl.static_range(len(addresses)):
        if STORED == "codes":
            x = _load_codes(addresses[k], scales[k], lane, inside, full, NONNEGATIVE >> k & 1, T)
            s = s + (x,)
        elif STORED == "bfloat16":
            s = s + (load(addresses[k], lane, inside, full, tl.bfloat16, T),)
        else:
            s = s + (load(addresses[k], lane, inside, full, T, T),)
    return s


@triton.jit
def store_states(
    addresses,
    scale_addresses,
    s,
    lane,
    inside,
    full,
    STORED: tl.constexpr,
    NONNEGATIVE: tl.constexpr,
    T: tl.constexpr,
):
    """Store the states; the answer is what a load will find."""
    stored = ()
    for k in tl.static_range(len(addresses)):
        if STORED == "codes":
            at = scale_addresses[k]
            x = _store_codes(addresses[k], at, s[k], lane, inside, full, NONNEGATIVE >> k & 1)
            stored = stored + (x,)
        elif STORED == "bfloat16":
            store(addresses[k], s[k], lane, inside, full, tl.bfloat16)
            stored = stored + (nearest(s[k], tl.bfloat16),)
        else:
            store(addresses[k], s[k], lane, inside, full, T)
            stored = stored + (s[k],)
    return stored


@triton.jit
def store(address, x, lane, inside, full, DT: tl.constexpr):
    """Elements, rounded to their dtype."""
    p = address.to(tl.pointer_type(tl.uint16 if DT == tl.bfloat16 else DT))
    y = narrow(x) if DT == tl.bfloat16 else x.to(DT)
    if len(address.shape) == 0 and full:
        tl.store(tl.multiple_of(p, 16) + lane, y)
    else:
        tl.store(p + lane, y, mask=inside)


@triton.jit
def load_weights(
    address, aux, lane, inside, full, PRECISION: tl.constexpr, DT: tl.constexpr, T: tl.constexpr
):
    """The arithmetic weights."""
    w = load(address, lane, inside, full, DT, T)
    if PRECISION == "master":
        x = load(aux, lane, inside, full, T, T)
        w = tl.where(nearest(x, DT) == w, x, w)
    if PRECISION == "kahan":
        rest = load(aux, lane, inside, full, DT, T)
        w = tl.where(nearest(w + rest * 0.5, DT) == w, w + rest, w)
    return w


@triton.jit
def store_weights(
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
        store(aux, x, lane, inside, full, T)
    if PRECISION == "kahan":  # two pairs of numbers can have one sum
        rest = x - nearest(x, DT)
        rest = tl.where(finite(rest), rest, 0.0)
        rest = tl.where(x == w, load(aux, lane, inside, full, DT, T), rest)
        store(aux, rest, lane, inside, full, DT)
        x = tl.where(x == w, load(address, lane, inside, full, DT, T), x)
    if PRECISION == "stochastic":
        _, _, count = count_steps(t, tensor, is_active(t, tensor))
        x = at_random(x, rounding_key(aux, count + 1.0), (begin + lane).to(tl.uint32))
    store(address, x, lane, inside, full, DT)

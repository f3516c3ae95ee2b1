"""Which head a program of `attention` and `gradients` has, and which blocks it visits.

By position and length, and by what `bounds` found out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attend_shared import call
from attend_shared.kernels import sizes
from attend_shared.kernels.tiles import INTERPRETED

FAR = tl.constexpr(call.FAR)  # no array reaches as far
PADDED = tl.constexpr(sizes.PADDED)  # P, of rows that a head has on the way back, is a multiple of it


@triton.jit
def told(x, UNIT: tl.constexpr):
    """x, a multiple of UNIT, which the compiler is told: launchers say it of no number. It can be said only of what a
    kernel makes, and what leaves all bits as they are becomes no instruction.
    """
    if INTERPRETED or UNIT == 1:
        return x
    else:
        return tl.multiple_of(x.to(tl.float32, bitcast=True).to(tl.int32, bitcast=True), UNIT)


@triton.jit
def _reach(q_offset, b, offset, left, right, OFFSET: tl.constexpr):
    """Key j is allowed for query t where low <= j - t <= high."""
    if OFFSET:
        at = tl.load(q_offset + b * (OFFSET - 1)).to(tl.int64)
    else:
        at = tl.full((), 0, tl.int64) + offset
    at = tl.minimum(tl.maximum(at, -FAR), FAR)
    low = tl.minimum(tl.maximum(at - left, -FAR), FAR).to(tl.int32)
    high = tl.minimum(tl.maximum(at + right, -FAR), FAR).to(tl.int32)
    return low, high


@triton.jit
def length_of(lengths, b, most, HAS: tl.constexpr):
    """A length within 0 and most."""
    if HAS:
        return tl.minimum(tl.maximum(tl.load(lengths + b), 0), most).to(tl.int32)
    return tl.full((), 0, tl.int32) + most


@triton.jit
def _below(before, b, x, J, PACKED: tl.constexpr):
    """How many of the keys that are gone over lie below x. PACKED: they are those that the item has."""
    if PACKED:
        return tl.load(before + b.to(tl.int64) * (J + 3) + _within(x, 0, J))
    return x


@triton.jit
def _ends(kv_lengths, before, b, J, PACKED: tl.constexpr, KV_LENGTHS: tl.constexpr):
    """How many keys are gone over."""
    if PACKED:
        return _below(before, b, J, J, PACKED)
    return length_of(kv_lengths, b, J, KV_LENGTHS)


@triton.jit
def _blocks(x, BLOCK: tl.constexpr):
    """How many whole blocks lie below x."""
    return tl.maximum(x, 0) // BLOCK


@triton.jit
def _blocks_up(x, BLOCK: tl.constexpr):
    """How many blocks hold what lies below x."""
    return (tl.maximum(x, 0) + BLOCK - 1) // BLOCK


@triton.jit
def _within(x, least, most):
    return tl.minimum(tl.maximum(x, least), most)


@triton.jit
def _clip(start, whole_from, whole_to, stop, most):
    """The four in order, and at most this."""
    start = tl.minimum(start, most)
    stop = _within(stop, start, most)
    whole_from = _within(whole_from, start, stop)
    return start, whole_from, _within(whole_to, whole_from, stop), stop


@triton.jit
def _hull(bounds, groups_before, block, groups, RATIO: tl.constexpr):
    """Of what `overlaps` found for a block's RATIO groups: from the first to behind the last of the other side's groups
    that some of them meet, and the run of groups with which all of them have one id.
    """
    place = bounds + (groups_before + block * RATIO) * 4
    some_from, some_to, same_from, same_to = tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)
    for n in tl.static_range(1, RATIO):
        inside = block * RATIO + n < groups
        some_from = tl.minimum(some_from, tl.load(place + 4 * n, mask=inside, other=2147483647))
        some_to = tl.maximum(some_to, tl.load(place + 4 * n + 1, mask=inside, other=0))
        same_from = tl.maximum(same_from, tl.load(place + 4 * n + 2, mask=inside, other=0))
        same_to = tl.minimum(same_to, tl.load(place + 4 * n + 3, mask=inside, other=2147483647))
    return some_from, some_to, same_from, same_to


@triton.jit
def _visited_keys(
    q_lengths, kv_lengths, q_offset, before, bounds, b, block, I, J, offset, left, right,
    BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, OFFSET: tl.constexpr,
    SEGMENTS: tl.constexpr, LISTED: tl.constexpr, PACKED: tl.constexpr, WHOLE: tl.constexpr, Q_LENGTHS: tl.constexpr,
    KV_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Where queries and keys end; the reach of a query; and, for a block of queries, where the blocks of keys begin,
    are whole, end being whole, and end: in the list of blocks with a key that some query may see, where there is one.
    And how far a whole block lies behind its place in that list.

    PACKED: counted in keys that the item has. In the midst are blocks of neighbours in memory (WHOLE: and whole), and
    `behind` is by how many keys they lie behind their place. seen_from and seen_to, the last two, are where blocks are
    whole: of no meaning for a list, whose blocks are all looked at but for those in its midst.
    """
    first = block * BM
    i_end, j_end = length_of(q_lengths, b, I, Q_LENGTHS), _ends(kv_lengths, before, b, J, PACKED, KV_LENGTHS)
    low, high = _reach(q_offset, b, offset, left, right, OFFSET)
    most = _blocks_up(j_end, BN)
    start, stop = tl.full((), 0, tl.int32), most
    whole_from, whole_to = tl.full((), 0, tl.int32), _blocks(j_end, BN)
    if LEFT:
        start = _blocks(_below(before, b, first + low, J, PACKED), BN)
        whole_from = _blocks_up(_below(before, b, first + BM - 1 + low, J, PACKED), BN)
    if RIGHT:
        stop = tl.minimum(stop, _blocks_up(_below(before, b, first + BM + high, J, PACKED), BN))
        whole_to = tl.minimum(whole_to, _blocks(_below(before, b, first + high + 1, J, PACKED), BN))
    if SEGMENTS:
        groups = tl.cdiv(I, G)
        some_from, some_to, same_from, same_to = _hull(bounds, b * (groups + tl.cdiv(J, G)), block, groups, BM // G)
        start = tl.maximum(start, some_from // (BN // G))
        stop = tl.minimum(stop, (some_to + BN // G - 1) // (BN // G))
        whole_from = tl.maximum(whole_from, (same_from + BN // G - 1) // (BN // G))
        whole_to = tl.minimum(whole_to, same_to // (BN // G))
    if LISTED:
        blocks = tl.cdiv(J, BN)
        before += b * (blocks + 3)
        if not SEGMENTS:  # whose runs look at each key as well
            whole_from = tl.maximum(whole_from, tl.load(before + blocks + 1))
            whole_to = tl.minimum(whole_to, tl.load(before + blocks + 2))
    start, whole_from, whole_to, stop = _clip(start, whole_from, whole_to, stop, most)
    seen_from, seen_to, behind = whole_from, whole_to, tl.full((), 0, tl.int32)
    if PACKED:
        run = before + b.to(tl.int64) * (J + 3) + J + 1
        run_from, run_to = tl.load(run), tl.load(run + 1)
        behind = run_from - _below(before, b, run_from, J, PACKED)
        least, most = (seen_from, seen_to) if WHOLE else (start, stop)
        whole_from = _within(_blocks_up(run_from - behind, BN), least, most)
        whole_to = _within(_blocks(run_to - behind, BN), whole_from, most)
    if LISTED:
        behind = whole_from
        start, whole_from = tl.load(before + start), tl.load(before + whole_from)
        whole_to, stop = tl.load(before + whole_to), tl.load(before + stop)
        behind -= whole_from
    if Q_LENGTHS:  # a block of dead rows visits nothing
        stop = tl.where(first < i_end, stop, start)
        whole_from, whole_to = tl.minimum(whole_from, stop), tl.minimum(whole_to, stop)
    return i_end, j_end, low, high, start, whole_from, whole_to, stop, behind, seen_from, seen_to


@triton.jit
def _item_and_head(H, SHARED: tl.constexpr):
    """Which item's which head a program has, in one number. SHARED: all items of a head are under way at once, so that
    the bias that they share is read from memory once.
    """
    n = tl.program_id(1)
    if SHARED:
        items = tl.num_programs(1) // H
        n = n % items * H + n // items
    return n

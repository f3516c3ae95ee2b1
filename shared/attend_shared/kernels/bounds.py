"""What the kernels of `attention` and `gradients` need not visit, or not look at: found out on the device.

Bounds from segments, the list of blocks that have a key at all, and the keys that an item has, one behind the other. G
is how many rows or keys are taken together. Arguments are as in `attention`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attend_shared.kernels.visits import FAR, _blocks, _blocks_up, _hull, length_of
from attend_shared.runs import CHANGED

SAID = tl.constexpr(CHANGED)


@triton.jit
def _range(ids, inside):
    """The lowest and the highest of the ids; of none low > high."""
    return (
        tl.min(tl.where(inside, ids, 0x7FFFFFFFFFFFFFFF), 0),
        tl.max(tl.where(inside, ids, -0x7FFFFFFFFFFFFFFF), 0),
    )


@triton.jit
def query_ranges(q_ids, q_lengths, I, low_id, high_id, Q_LENGTHS: tl.constexpr, G: tl.constexpr):
    """The lowest and highest segment id of each G queries."""
    block, b = tl.program_id(0), tl.program_id(1)
    rows = block * G + tl.arange(0, G)
    inside = rows < length_of(q_lengths, b, I, Q_LENGTHS)
    low, high = _range(tl.load(q_ids + b.to(tl.int64) * I + rows, mask=inside, other=0).to(tl.int64), inside)
    blocks = tl.cdiv(I, G)
    tl.store(low_id + b * blocks + block, low, mask=block < blocks)
    tl.store(high_id + b * blocks + block, high, mask=block < blocks)


@triton.jit
def key_ranges(
    mask, q_ids, kv_ids, q_lengths, kv_lengths, q_low, q_high, I, J, mb, mj, alive_keys, live, low_id, high_id,
    made_low, made_high,
    MASK: tl.constexpr, SEGMENTS: tl.constexpr, SEARCH: tl.constexpr, Q_LENGTHS: tl.constexpr,
    KV_LENGTHS: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Which keys a query of the item may see, as far as key mask, length and segment say, a bit each; whether some (1)
    or all (2) of each G keys are such; and the lowest and highest id of these.

    SEARCH: a key whose segment no query has is none. The search goes over ranges of queries, BLOCK at a time, looks
    into those that meet the range of the keys, and stops when every key is found. Where there is no search, this does
    what `query_ranges` does as well.
    """
    block, b = tl.program_id(0), tl.program_id(1)
    b64 = b.to(tl.int64)
    keys = block * G + tl.arange(0, G)
    alive = keys < length_of(kv_lengths, b, J, KV_LENGTHS)
    if MASK:
        alive &= tl.load(mask + b64 * mb + keys * mj, mask=alive, other=0) != 0
    groups = tl.cdiv(J, G)
    place, there = b * groups + block, block < groups
    if SEGMENTS:
        ids = tl.load(kv_ids + b64 * J + keys, mask=alive, other=0).to(tl.int64)
        low, high = _range(ids, alive)
        if SEARCH:
            i_end = length_of(q_lengths, b, I, Q_LENGTHS)
            blocks, turn = tl.cdiv(I, G), tl.full((), 0, tl.int32)
            found = tl.zeros((G,), tl.int32)
            missing = tl.max(alive.to(tl.int32), 0)
            while (turn < blocks) & (missing > 0):
                n = turn + tl.arange(0, BLOCK)
                inside = n < blocks
                near = (tl.load(q_low + b * blocks + n, mask=inside, other=0) <= high) & inside
                near &= tl.load(q_high + b * blocks + n, mask=inside, other=0) >= low
                hit = tl.min(tl.where(near, n, FAR), 0)
                turn = tl.minimum(turn + BLOCK, hit + 1)
                if hit < FAR:
                    rows = hit * G + tl.arange(0, G)
                    others = tl.load(q_ids + b64 * I + rows, mask=rows < i_end, other=0).to(tl.int64)
                    equal = (ids[:, None] == others[None, :]) & (rows < i_end)[None, :]
                    found = tl.maximum(found, tl.max(equal.to(tl.int32), 1))
                    missing = tl.max(tl.where(alive, 1 - found, 0), 0)
            alive &= found > 0
            low, high = _range(ids, alive)
        else:
            query_ranges(q_ids, q_lengths, I, made_low, made_high, Q_LENGTHS, G)
        tl.store(low_id + place, low, mask=there)
        tl.store(high_id + place, high, mask=there)
    WORD: tl.constexpr = 32 if G > 32 else G
    words = tl.sum(tl.reshape(alive.to(tl.int32), (G // WORD, WORD)) << tl.arange(0, WORD)[None, :], 1)
    n = block * (G // WORD) + tl.arange(0, G // WORD)
    tl.store(alive_keys + b64 * tl.cdiv(J, WORD) + n, words, mask=n < tl.cdiv(J, WORD))
    tl.store(live + place, tl.max(alive.to(tl.int32), 0) + tl.min(alive.to(tl.int32), 0), mask=there)


@triton.jit
def _first_run(run_from, run_to, n, good):
    """The first run of good among the numbers that came before, in order, and those of n; open where run_to is FAR."""
    run_from = tl.minimum(run_from, tl.min(tl.where(good, n, FAR), 0))
    return run_from, tl.minimum(run_to, tl.min(tl.where((n > run_from) & (good == 0), n, FAR), 0))


@triton.jit
def _overlap(low, high, other_low, other_high, live, others, bounds, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    least, most = tl.full((BLOCK,), 2147483647, tl.int32), tl.zeros((BLOCK,), tl.int32)
    same_from, same_to = tl.full((), 0, tl.int32) + FAR, tl.full((), 0, tl.int32) + FAR
    for turn in range(tl.cdiv(others, BLOCK)):
        n = turn * BLOCK + tl.arange(0, BLOCK)
        inside = n < others
        their_low = tl.load(other_low + n, mask=inside, other=0x7FFFFFFFFFFFFFFF)
        their_high = tl.load(other_high + n, mask=inside, other=-0x7FFFFFFFFFFFFFFF)
        meets = (their_low <= high) & (their_high >= low) & inside
        least, most = tl.where(meets, tl.minimum(least, n), least), tl.where(meets, n + 1, most)
        same = (their_low == low) & (their_high == high) & (low == high) & inside
        if KEYS:
            same &= tl.load(live + n, mask=inside, other=0) == 2
        same_from, same_to = _first_run(same_from, same_to, n, same)
    nobody = low > high  # whom nothing cuts
    tl.store(bounds, tl.min(least, 0))
    tl.store(bounds + 1, tl.max(most, 0))
    tl.store(bounds + 2, tl.where(nobody, 0, same_from))
    tl.store(bounds + 3, tl.where(nobody, FAR, tl.minimum(same_to, others)))


@triton.jit
def overlaps(q_low, q_high, k_low, k_high, live, queries, keys, bounds, BLOCK: tl.constexpr):
    """For each group of queries, and then of keys: from the first to behind the last group of the other side whose
    range of ids meets its own, and the first run of groups that have its one id and no other. (b, groups, 4).

    In a run all keys are alive; a group of keys need not be: what those get that are not is thrown away.
    """
    group, b = tl.program_id(0), tl.program_id(1)
    bounds += (b * (queries + keys) + group) * 4
    q_low += b * queries
    q_high += b * queries
    k_low += b * keys
    k_high += b * keys
    if group < queries:
        low, high = tl.load(q_low + group), tl.load(q_high + group)
        _overlap(low, high, k_low, k_high, live + b * keys, keys, bounds, BLOCK, True)
    else:
        low, high = tl.load(k_low + group - queries), tl.load(k_high + group - queries)
        _overlap(low, high, q_low, q_high, live, queries, bounds, BLOCK, False)


@triton.jit
def list_blocks(live, groups, blocks, listed, before, RATIO: tl.constexpr, BLOCK: tl.constexpr):
    """The blocks of RATIO groups that have a key, in order; and how many of them lie before each block and before the
    end, followed by where the first run of blocks whose keys are all alive begins and ends.
    """
    b = tl.program_id(0)
    before += b * (blocks + 3)
    count = tl.full((), 0, tl.int32)
    whole_from, whole_to = count + FAR, count + FAR
    tl.store(before, count)
    for turn in range(tl.cdiv(blocks, BLOCK)):
        n = turn * BLOCK + tl.arange(0, BLOCK)
        some, least = tl.zeros((BLOCK,), tl.int32), tl.full((BLOCK,), 2, tl.int32)
        for part in tl.static_range(RATIO):
            group = n * RATIO + part
            found = tl.load(live + b * groups + group, mask=(group < groups) & (n < blocks), other=0)
            some, least = tl.maximum(some, tl.minimum(found, 1)), tl.minimum(least, found)
        whole_from, whole_to = _first_run(whole_from, whole_to, n, least == 2)
        upto = count + tl.cumsum(some, 0)
        tl.store(before + 1 + n, upto, mask=n < blocks)
        tl.store(listed + b * blocks + upto - 1, n, mask=some > 0)
        count += tl.sum(some, 0)
    tl.store(before + blocks + 1, whole_from)
    tl.store(before + blocks + 2, tl.minimum(whole_to, blocks))


@triton.jit
def pack_keys(
    alive_keys, live, J, words, groups, listed, before,
    G: tl.constexpr, WORD: tl.constexpr, BLOCK: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """The keys that an item has, in order (b, J); and how many of them lie below each key and below the end, followed
    by where the first run of groups whose keys are all alive begins and ends (b, J + 3).

    A program does the WORD keys of each of BLOCK words, and counts what lies before these itself, MANY at a time.
    """
    block, b = tl.program_id(0), tl.program_id(1)
    first, b64 = block * BLOCK, b.to(tl.int64)
    alive_keys += b * words
    counts = tl.zeros((MANY,), tl.int32)
    for turn in range(tl.cdiv(first, MANY)):
        n = turn * MANY + tl.arange(0, MANY)
        counts += _ones(tl.load(alive_keys + n, mask=n < first, other=0))
    n = first + tl.arange(0, BLOCK)
    some = tl.load(alive_keys + n, mask=n < words, other=0)
    ones = _ones(some)
    start = tl.sum(counts, 0) + tl.cumsum(ones, 0) - ones
    bit = tl.arange(0, WORD)[None, :]
    alive = ((some[:, None] >> bit) & 1) != 0
    upto = start[:, None] + tl.cumsum(alive.to(tl.int32), 1)
    keys = n[:, None] * WORD + bit
    before += b64 * (J + 3)
    if block == 0:
        run_from, run_to = tl.full((), FAR, tl.int32), tl.full((), FAR, tl.int32)
        for turn in range(tl.cdiv(groups, MANY)):
            group = turn * MANY + tl.arange(0, MANY)
            least = tl.load(live + b * groups + group, mask=group < groups, other=0)
            run_from, run_to = _first_run(run_from, run_to, group, least == 2)
        tl.store(before, 0)
        tl.store(before + J + 1, tl.minimum(run_from, groups) * G)
        tl.store(before + J + 2, tl.minimum(run_to, groups) * G)
    tl.store(before + 1 + keys, upto, mask=keys < J)
    tl.store(listed + b64 * J + upto - 1, keys, mask=alive)


@triton.jit
def _ones(x):
    """How many bits are set."""
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit(debug=True)
def compare(now, then, N, BLOCK: tl.constexpr):
    """Whether N segment ids are what they were: else it ends the program, in words."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < N
    same = tl.load(now + place, mask=inside, other=0) == tl.load(then + place, mask=inside, other=0)
    tl.device_assert(same, SAID)


@triton.jit
def _visits(
    bounds, groups_before, groups, tile, tiles, others, low, high,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """How many blocks of keys tiles of SIZE queries visit: at least one."""
    tile = tl.minimum(tile, tiles - 1)
    some_from, some_to, _, _ = _hull(bounds, groups_before, tile, groups, SIZE // G)
    start, stop = some_from // (BLOCK // G), tl.minimum((some_to + BLOCK // G - 1) // (BLOCK // G), others)
    if LEFT:
        start = tl.maximum(start, _blocks(tile * SIZE + low, BLOCK))
    if RIGHT:
        stop = tl.minimum(stop, _blocks_up(tile * SIZE + SIZE + high, BLOCK))
    return tl.maximum(stop - start, 1)


@triton.jit
def order_tiles(
    bounds, groups, all_groups, tiles, others, together, low, high, order,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    PART: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """In which order programs that stay go over the tiles of all heads, as n * tiles + tile: for each item and so many
    heads together, those that visit most blocks first. From run of heads to run it begins elsewhere, so that a program,
    which has the same places of all runs, visits as many blocks as any other, and heads come one after the other.

    groups, all_groups: of G queries; of these and of as many keys.
    tiles, others: how many tiles of SIZE queries there are, and blocks of keys.
    low, high: query t sees the keys from t + low (LEFT) to t + high (RIGHT).
    together: of all heads, whose number it divides; and the runs of so many heads divide a run's tiles.
    """
    part, h, H, b = tl.program_id(0), tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    groups_before = b * all_groups
    tile = part * PART + tl.arange(0, PART)
    cost = _visits(bounds, groups_before, groups, tile, tiles, others, low, high, SIZE, BLOCK, G, LEFT, RIGHT)
    rank = tl.zeros((PART,), tl.int32)
    for turn in range(tl.cdiv(tiles, MANY)):
        n = turn * MANY + tl.arange(0, MANY)
        its = _visits(bounds, groups_before, groups, n, tiles, others, low, high, SIZE, BLOCK, G, LEFT, RIGHT)[None, :]
        first = (its > cost[:, None]) | ((its == cost[:, None]) & (n[None, :] < tile[:, None]))
        rank += tl.sum((first & (n < tiles)[None, :]).to(tl.int32), 1)
    runs, places, run = H // together, together * tiles, h // together
    step = places // runs
    at = rank * together + h % together
    at = tl.where(run % 2 == 0, at, at // step * step + step - 1 - at % step)
    at = (at + run * step) % places
    tl.store(order + (b * runs + run) * places + at, (b * H + h) * tiles + tile, mask=tile < tiles)

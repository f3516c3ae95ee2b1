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
    SIZE: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """How many blocks of the other side tiles of SIZE rows visit: at least one."""
    tile = tl.minimum(tile, tiles - 1)
    some_from, some_to, _, _ = _hull(bounds, groups_before, tile, groups, SIZE // G)
    start, stop = some_from // (BLOCK // G), tl.minimum((some_to + BLOCK // G - 1) // (BLOCK // G), others)
    start = tl.maximum(start, _blocks(tile * SIZE + low, BLOCK))
    stop = tl.minimum(stop, _blocks_up(tile * SIZE + SIZE + high, BLOCK))
    return tl.maximum(stop - start, 1)


@triton.jit
def _store_whether_runs(falls, parts, items, runs, ITEMS: tl.constexpr, MANY: tl.constexpr):
    """Of what `find_runs` counted."""
    most = tl.full((), 0, tl.int32)
    for turn in range(tl.cdiv(items, ITEMS)):
        item = turn * ITEMS + tl.arange(0, ITEMS)[:, None]
        fallen = tl.zeros((ITEMS,), tl.int32)
        for turn_of_item in range(tl.cdiv(parts, MANY)):
            n = turn_of_item * MANY + tl.arange(0, MANY)[None, :]
            fallen += tl.sum(tl.load(falls + item * parts + n, mask=(item < items) & (n < parts), other=0), 1)
        most = tl.maximum(most, tl.max(fallen, 0))
    tl.store(runs, (most < 2).to(tl.int32))


@triton.jit
def order_tiles(
    bounds, falls, groups, parts, tiles, others, heads, together, keys_together, low, high, query_order,
    key_order, runs,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr,
    ITEMS: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """In which order programs that stay go over the tiles of all heads, as n * tiles + tile: for each item and so many
    heads together, those that visit most blocks first. From run of heads to run it begins elsewhere, so that a program,
    which has the same places of all runs, visits as many blocks as any other, and heads come one after the other.

    Of as many heads of queries as `heads` says (none, where their order is not asked for), then of those of keys
    (KEYS). For keys also whether all items have their equal ids side by side, as far as `find_runs` can tell.

    groups: of G queries, and of as many keys. parts: of `find_runs`, of an item.
    tiles, others: how many tiles of SIZE there are, and blocks on the other side; of keys as of queries.
    low, high: query t sees the keys from t + low to t + high.
    together, keys_together: of all heads, whose number it divides; and the runs of so many heads divide a run's tiles.
    """
    part, h, H, b = tl.program_id(0), tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    if KEYS and part + h + b == 0:
        _store_whether_runs(falls, parts, tl.num_programs(2), runs, ITEMS, MANY)
    groups_before = b * (2 * groups)
    if KEYS:
        of_keys = h >= heads
        h, H = tl.where(of_keys, h - heads, h), tl.where(of_keys, H - heads, heads)
        groups_before += tl.where(of_keys, groups, 0)
        low, high = tl.where(of_keys, -high, low), tl.where(of_keys, -low, high)
        together = tl.where(of_keys, keys_together, together)
    tile = part * PART + tl.arange(0, PART)
    cost = _visits(bounds, groups_before, groups, tile, tiles, others, low, high, SIZE, BLOCK, G)
    rank = tl.zeros((PART,), tl.int32)
    for turn in range(tl.cdiv(tiles, MANY)):
        n = turn * MANY + tl.arange(0, MANY)
        its = _visits(bounds, groups_before, groups, n, tiles, others, low, high, SIZE, BLOCK, G)[None, :]
        first = (its > cost[:, None]) | ((its == cost[:, None]) & (n[None, :] < tile[:, None]))
        rank += tl.sum((first & (n < tiles)[None, :]).to(tl.int32), 1)
    in_runs, places, run = H // together, together * tiles, h // together
    step = places // in_runs
    at = rank * together + h % together
    at = tl.where(run % 2 == 0, at, at // step * step + step - 1 - at % step)
    at = (b * in_runs + run) * places + (at + run * step) % places
    which = (b * H + h) * tiles + tile
    if KEYS:
        tl.store(key_order + at, which, mask=(tile < tiles) & of_keys)
        tl.store(query_order + at, which, mask=(tile < tiles) & (of_keys == 0))
    else:
        tl.store(query_order + at, which, mask=tile < tiles)


@triton.jit
def find_runs(ids, J, spans, falls, PART: tl.constexpr, MANY: tl.constexpr):
    """For each place of an item where the run of its id begins, and behind which it ends (b, J, 2); and for each PART
    places how often an id is lower than the one before it (b, parts), twice as often where the item's last id is not
    lower than its first.

    Where that is 1 at most in an item, its ids ascend, from one of them on, round to the one before: no id has two
    runs. Of other orders it may be more though none has.
    """
    part, b = tl.program_id(0), tl.program_id(1)
    ids += b.to(tl.int64) * J
    first = part * PART
    place = first + tl.arange(0, PART)
    inside = place < J
    here = tl.load(ids + place, mask=inside, other=0)
    before = tl.load(ids + place - 1, mask=inside & (place > 0), other=0)
    after = tl.load(ids + place + 1, mask=place + 1 < J, other=0)
    fallen = tl.sum((inside & (place > 0) & (here < before)).to(tl.int32), 0)
    round_once = tl.load(ids + J - 1) < tl.load(ids)
    tl.store(falls + b * tl.num_programs(0) + part, tl.where(round_once, fallen, 2 * fallen))

    begins, ends = (place == 0) | (here != before), (place >= J - 1) | (here != after)
    row, column = place[:, None], place[None, :]
    begin = tl.max(tl.where(begins[None, :] & (column <= row), column, -1), 1)
    end = tl.min(tl.where(ends[None, :] & (column >= row), column + 1, FAR), 1)
    start, turn = tl.min(begin, 0), first  # -1: the first place's run began before
    while (start < 0) & (turn > 0):
        n = turn - 1 - tl.arange(0, MANY)
        differs = tl.load(ids + n, mask=n > 0, other=0) != tl.load(ids + n - 1, mask=n > 0, other=0)
        start = tl.max(tl.where(differs, n, -1), 0)
        turn -= MANY
    stop, turn = tl.max(end, 0), first + PART
    while (stop >= FAR) & (turn < J):
        n = turn + tl.arange(0, MANY)
        differs = tl.load(ids + n - 1, mask=n < J, other=0) != tl.load(ids + n, mask=n < J, other=0)
        stop = tl.min(tl.where(differs, n, FAR), 0)
        turn += MANY
    spans += (b.to(tl.int64) * J + place) * 2
    tl.store(spans, tl.where(begin < 0, tl.maximum(start, 0), begin), mask=inside)
    tl.store(spans + 1, tl.minimum(tl.where(end < FAR, end, stop), J), mask=inside)

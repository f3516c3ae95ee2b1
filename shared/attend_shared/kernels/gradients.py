"""Attention in Triton, the way back: what `attention` says holds here as well.

What it takes of each row lies in arrays of P rows a head, P a multiple of every block of queries: what lies behind the
last row stands for rows that see nothing, so that it is read without a look at where the rows end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attend_shared.kernels.dropout import (
    _bits_by_key,
    _bits_by_query,
    _columns,
    _drawn_bits,
    _drop,
    _seed,
    _where_bit,
    _where_kept,
)
from attend_shared.kernels.sinks import _weigh
from attend_shared.kernels.tiles import (
    LOG2E,
    NOTHING,
    _along,
    _cut,
    _dot,
    _exp,
    _ids,
    _is_cut,
    _keys,
    _keys_anew,
    _load,
    _logits,
    _pairs,
    _store,
)
from attend_shared.kernels.visits import (
    _below,
    _blocks,
    _blocks_up,
    _clip,
    _ends,
    _hull,
    _item_and_head,
    _reach,
    _visited_keys,
    length_of,
    told,
)


@triton.jit
def row_sums(
    out, dout, dlse, top, inverse, sinks, q_lengths, H, I, P, dob, doh, kept, known, partial, term, weight, largest,
    squares,
    DV: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, UNIT: tl.constexpr, DON: tl.constexpr, BNHD: tl.constexpr,
    Q_LENGTHS: tl.constexpr, LSE: tl.constexpr, SINKS: tl.constexpr, BASE2: tl.constexpr, WEIGHED: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    """What the gradients take of each row: top; what every logit gets besides its own share, sum(out dout) - dlse,
    over what dropout multiplies by, the slope; and inverse: (P, 2, 2), top and slope before inverse and log2(inverse),
    or (PRECISE) the slope without dlse. And each block's part of dsinks, or what `sinks.sum_rows` makes these of
    (WEIGHED).
    """
    block, n = tl.program_id(0), tl.program_id(1)
    b, h = n // H, n % H
    first = block * BM
    rows, local, lanes = first + tl.arange(0, BM), tl.arange(0, BM)[:, None], tl.arange(0, BDV)[None, :]
    i_end = length_of(q_lengths, b, I, Q_LENGTHS)
    alive = (rows < i_end)[:, None]
    stride = H * DV if BNHD else DV
    whole = n.to(tl.int64) * I
    out += (b.to(tl.int64) * I * H + h) * DV + first.to(tl.int64) * stride if BNHD else (whole + first) * DV
    dout += (b.to(tl.int64) * dob + h.to(tl.int64) * doh) * UNIT + first.to(tl.int64) * DON
    x = _load(out, local * stride, lanes, alive, DV, BDV, False).to(tl.float32)
    y = _load(dout, local * DON, lanes, alive, DV, BDV, False).to(tl.float32)
    result = tl.sum(x * y, 1)
    inside = rows < P
    of_row = n.to(tl.int64) * P + rows
    m = tl.load(top + of_row, mask=inside, other=float("inf"))
    one = tl.zeros_like(m)
    if SINKS or not BASE2:
        one = tl.load(inverse + of_row, mask=inside, other=0.0)
    unseen = m == float("inf")
    ignored = unseen
    if SINKS:
        share = one
        if not BASE2:
            sink = tl.load(sinks + h).to(tl.float32)
            alone = tl.where(sink == NOTHING, 0.0, 1.0)
            share = tl.where(unseen, alone, _exp(sink - m, False) * one)
        ignored = ignored & (share == 0)
    delta = result
    if LSE:
        slope = tl.load(dlse + whole + rows, mask=rows < I, other=0.0).to(tl.float32)
        result -= tl.where(ignored, 0.0, slope)
    if WEIGHED:
        _weigh(x * y, share, tl.where(share == 0, 0.0, result), n, block, rows, P, term, weight, largest, squares)
    elif SINKS:
        tl.store(partial + n * tl.num_programs(0) + block, -tl.sum(share * result, 0))
    slope = tl.where(unseen, 0.0, result / kept)
    last = tl.where(unseen, 0.0, delta / kept) if PRECISE else tl.log2(one)
    four = tl.join(tl.join(m, one), tl.join(slope, last))  # (BM, 2, 2)
    two = tl.arange(0, 2)
    places = of_row[:, None, None] * 4 + two[None, :, None] * 2 + two[None, None, :]
    tl.store(known + places, four, mask=inside[:, None, None])


@triton.jit
def _known(known, of_row):
    """top, slope, inverse, and its log2 or delta, of rows. Four are read at once: few loads give a thread all."""
    two = tl.arange(0, 2)
    m_and_one, slope_and_last = tl.split(
        tl.load(known + of_row[:, None, None] * 4 + two[None, :, None] * 2 + two[None, None, :])
    )
    m, one = tl.split(m_and_one)
    slope, last = tl.split(slope_and_last)
    return m, slope, one, last


@triton.jit
def _of_one(dp, p, one, delta, PRECISE: tl.constexpr):
    """dp, of a row whose weight is all one key's exactly delta: dk sums over the rows what would be left of dp - delta.

    Such a row's total is 1, to two units in the last place; one is 1 / total.
    """
    if PRECISE:
        dp = tl.where(p > tl.where(tl.abs(one - 1) <= 2.0**-22, 0.5, 2.0), delta, dp)
    return dp


@triton.jit
def sum_sinks(partial, H, B, blocks, dsinks, BLOCK: tl.constexpr):
    """dsinks of a head from the parts of every item and block, in one order."""
    h = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for n in range(tl.cdiv(B * blocks, BLOCK)):
        place = n * BLOCK + tl.arange(0, BLOCK)
        b, block = place // blocks, place % blocks
        total += tl.load(partial + (b * H + h) * blocks + block, mask=place < B * blocks, other=0.0)
    tl.store(dsinks + h, tl.sum(total, 0).to(dsinks.dtype.element_ty))


@triton.jit
def _uncapped(ds, capped, SOFTCAP: tl.constexpr, REST: tl.constexpr):
    """Gradients of logits times the slope of their softcap, 1 - tanh^2; REST: times r + r^2, -1/4 of it."""
    if REST:
        ds *= capped + capped * capped
    elif SOFTCAP:
        ds *= 1 - capped * capped
    return ds


@triton.jit
def _store_rows(
    base, x, b64, h64, first64, local, inside, H, I, D: tl.constexpr, BD: tl.constexpr, BNHD: tl.constexpr
):  # fmt: skip
    """A block of rows of a gradient that lies as the caller laid out its arrays."""
    stride = H * D if BNHD else D
    base += (b64 * I * H + h64) * D + first64 * stride if BNHD else ((b64 * H + h64) * I + first64) * D
    _store(base, local[:, None] * stride, tl.arange(0, BD)[None, :], x, inside[:, None], D)


@triton.jit
def query_gradients(
    q, k, v, mask, bias, alive_keys, q_ids, kv_ids, q_lengths, kv_lengths, q_offset, seed, listed, before,
    bounds, dout, known, H, I, J, P, qb, qh, kb, kh, vb, vh, dob, doh,
    mb, mh, mi, bb, bh, bi, offset, left, right, factor, cap, kept, scale, dq,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, G: tl.constexpr, UNIT: tl.constexpr, QN: tl.constexpr, KN: tl.constexpr, VN: tl.constexpr,
    DON: tl.constexpr, MASK_UNIT: tl.constexpr, MJ: tl.constexpr, BIAS_UNIT: tl.constexpr, BJ: tl.constexpr,
    BNHD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    OFFSET: tl.constexpr, SEGMENTS: tl.constexpr, Q_LENGTHS: tl.constexpr, KV_LENGTHS: tl.constexpr,
    ALIVE: tl.constexpr, LISTED: tl.constexpr, PACKED: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr,
    SHARED: tl.constexpr, SOFTCAP: tl.constexpr,
    THRESHOLD: tl.constexpr, BASE2: tl.constexpr, POSITIVE: tl.constexpr, EVEN: tl.constexpr, EVEN_KEYS: tl.constexpr,
    I_UNIT: tl.constexpr, J_UNIT: tl.constexpr,
    PRECISE: tl.constexpr, WIDEN: tl.constexpr, DRAWN: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, over the blocks of keys that the way forward visited.

    DRAWN, here and below: in the place of the seed stands what `draw` left, WORDS for each query.
    """
    I, J = told(I, I_UNIT), told(J, J_UNIT)
    turns = tl.num_programs(0)
    block = turns - 1 - tl.program_id(0) if RIGHT else tl.program_id(0)
    n = _item_and_head(H, SHARED)
    b, h = n // H, n % H
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    first = block * BM
    first64 = first.to(tl.int64)
    NEAR: tl.constexpr = THRESHOLD > 0 and not (MASK or BIAS or PRECISE)  # drawn or not: one order of sums
    rows, local, columns = first + tl.arange(0, BM), tl.arange(0, BM), _columns(BN, NEAR)
    REST: tl.constexpr = SOFTCAP == 1 and BASE2
    i_end, j_end, low, high, start, whole_from, whole_to, stop, behind, seen_from, seen_to = _visited_keys(
        q_lengths, kv_lengths, q_offset, before, bounds, b, block, I, J, offset, left, right,
        BM, BN, G, LEFT, RIGHT, OFFSET, SEGMENTS, LISTED, PACKED, REST, Q_LENGTHS, KV_LENGTHS,
    )  # fmt: skip

    q += (b64 * qb + h64 * qh) * UNIT + first64 * QN
    dout += (b64 * dob + h64 * doh) * UNIT + first64 * DON
    k += (b64 * kb + (h64 // GROUP) * kh) * UNIT
    v += (b64 * vb + (h64 // GROUP) * vh) * UNIT
    mask += (b64 * mb + h64 * mh + first64 * mi) * MASK_UNIT
    bias += (b64 * bb + h64 * bh + first64 * bi) * BIAS_UNIT
    alive_rows = (rows < i_end)[:, None]
    tile_q = _load(q, local[:, None] * QN, tl.arange(0, BD)[None, :], alive_rows, D, BD, False)
    tile_do = _load(dout, local[:, None] * DON, tl.arange(0, BDV)[None, :], alive_rows, DV, BDV, False)
    of_row = n.to(tl.int64) * P + rows
    m, slope, one, delta = _known(known, of_row)
    m, slope, one, delta = m[:, None], slope[:, None], one[:, None], delta[:, None]
    if REST:
        m -= cap + 2  # for 4 p, as `_uncapped` gives -1/4 of ds
        scale = -scale
    q_id = _ids(q_ids, b64, rows, I, False, SEGMENTS)

    FULL: tl.constexpr = PACKED or (EVEN and not ALIVE)
    FRONT: tl.constexpr = LEFT or SEGMENTS
    BEHIND: tl.constexpr = RIGHT or SEGMENTS or PACKED
    CUTS: tl.constexpr = FRONT or BEHIND
    ONE: tl.constexpr = FULL and CUTS and not (REST or PACKED)
    BEFORE: tl.constexpr = (FRONT or ALIVE or PACKED) and not ONE
    AFTER: tl.constexpr = (CUTS or not FULL) and not ONE
    LATE: tl.constexpr = BASE2 and POSITIVE and not (SOFTCAP or (THRESHOLD and not DRAWN))
    CUT_LAST: tl.constexpr = THRESHOLD > 0 and not LATE  # fewer registers; and drawn or not, one order of roundings
    FEW: tl.constexpr = ALIVE and BD <= 64 and not (PRECISE or MASK or BIAS)  # as forward
    FAR_APART: tl.constexpr = PACKED and BD == 128 and not PRECISE
    AHEAD: tl.constexpr = 2 if FEW else (5 if FAR_APART else None)
    # Before a loop that may have no turns LLVM parts the ways where a bias or a mask is read, with zeros made anew on
    # the one without, and ptxas then waits for each product of the loop before it starts the next.
    if (BIAS or MASK) and FULL:
        unseen = (start >= stop) if CUTS else (whole_from >= whole_to)
        if unseen:
            _store_rows(dq, tl.zeros((BM, BD), tl.float32), b64, h64, first64, local, rows < I, H, I, D, BD, BNHD)
            return
    acc = tl.zeros((BM, BD), tl.float32)
    EARLY: tl.constexpr = DRAWN and not LISTED  # as forward of 64
    of_head, last = n.to(tl.int64) * WORDS * P, tl.cdiv(J, BN) - 1
    for stage in tl.static_range(3):
        if (stage == 0 and BEFORE) or (stage == 1) or (stage == 2 and AFTER):
            from_block = start if (stage == 0 or ONE) else (whole_from if stage == 1 else whole_to)
            to_block = whole_from if stage == 0 else (whole_to if (stage == 1 and not ONE) else stop)
            if EARLY:
                coming = _bits_by_query(seed, of_head, rows, tl.minimum(from_block + behind, last) * BN, P, BN)
            for turn in tl.range(from_block, to_block, num_stages=AHEAD if stage != 1 else None):
                at = turn + behind
                if LISTED and (stage != 1):
                    at = tl.load(listed + b * tl.cdiv(J, BN) + turn)
                begin = at * BN
                if PACKED:
                    begin = turn * BN + behind if stage == 1 else turn * BN
                begin64 = begin.to(tl.int64)
                keys, alive, of_key, of_block = _keys(
                    alive_keys, listed, b64, begin, columns, J, j_end, BN, G, ALIVE and (stage != 1),
                    PACKED and (stage != 1),
                )  # fmt: skip
                if MASK:
                    seen = _pairs(
                        mask + begin64 * MJ, local[:, None] * mi * MASK_UNIT, columns[None, :] * MJ,
                        (rows < I)[:, None], (keys < J)[None, :], 0, EVEN_KEYS or (stage == 1),
                    )  # fmt: skip
                else:
                    seen = 0
                tile_k = _load(
                    k + of_block * KN, of_key[None, :] * KN, tl.arange(0, BD)[:, None], alive[None, :],
                    D, BD, FULL or (stage == 1),
                )  # fmt: skip
                tile_v = _load(
                    v + of_block * VN, of_key[None, :] * VN, tl.arange(0, BDV)[:, None], alive[None, :],
                    DV, BDV, FULL or (stage == 1),
                )  # fmt: skip
                if EARLY:
                    bits = coming
                    coming = _bits_by_query(seed, of_head, rows, tl.minimum(at + 1, last) * BN, P, BN)
                elif DRAWN:
                    bits = _bits_by_query(seed, of_head, rows, begin, P, BN)
                s = _dot(tile_q, tile_k, tl.zeros((BM, BN), tl.float32), WIDEN)
                if BIAS:
                    added = _pairs(
                        bias + begin64 * BJ, local[:, None] * bi * BIAS_UNIT, columns[None, :] * BJ,
                        (rows < I)[:, None], (keys < J)[None, :], 0.0, EVEN_KEYS or (stage == 1),
                    )  # fmt: skip
                else:
                    added = 0.0
                s, capped = _logits(
                    s, seen, added, 1.0 if LATE else factor, cap, MASK, BIAS, SOFTCAP, REST,
                    (stage == 1) and not MASK,
                )  # fmt: skip
                if not CUT_LAST and _is_cut(
                    turn, seen_from, seen_to, stage, ONE or (PACKED and not (REST and stage == 1)), FRONT,
                    BEHIND and (RIGHT or SEGMENTS or stage != 1),
                ):  # fmt: skip
                    kv_id = _ids(kv_ids, b64, keys, J, EVEN_KEYS, SEGMENTS)
                    if PACKED and (stage != 1) and (LEFT or RIGHT):
                        keys = _keys_anew(listed, b64, begin + columns, J, j_end)
                    s = _cut(
                        s, keys[None, :], rows[:, None] + low, rows[:, None] + high, q_id[:, None], kv_id[None, :],
                        alive[None, :], NOTHING, LEFT, RIGHT, SEGMENTS,
                        (stage != 1) and not RIGHT if PACKED else not FULL,
                    )  # fmt: skip
                if LATE:
                    s = s * factor
                p = _exp(s - m, BASE2)  # times 1 / total at the end, unless m has it
                if CUT_LAST and _is_cut(turn, seen_from, seen_to, stage, ONE, FRONT, BEHIND):
                    kv_id = _ids(kv_ids, b64, keys, J, EVEN_KEYS, SEGMENTS)
                    p = _cut(
                        p, keys[None, :], rows[:, None] + low, rows[:, None] + high, q_id[:, None], kv_id[None, :],
                        alive[None, :], 0.0, LEFT, RIGHT, SEGMENTS, not FULL,
                    )  # fmt: skip
                dp = _dot(tile_do, tile_v, tl.zeros((BM, BN), tl.float32), WIDEN)
                if DRAWN:
                    dp = _where_kept(bits, begin, columns[None, :], dp, BN, NEAR)
                elif THRESHOLD:
                    dp = _drop(dp, seed, b, h, rows, at * (BN // 4), THRESHOLD, BM, BN, NEAR)
                dp = _of_one(dp, p, one, delta, PRECISE)
                ds = _uncapped(p * (dp - slope), capped, SOFTCAP, REST)
                acc = _dot(ds.to(k.dtype.element_ty), tl.trans(tile_k), acc, WIDEN)

    acc *= scale * kept if BASE2 else scale * kept * one
    if Q_LENGTHS:
        acc = tl.where(alive_rows, acc, 0.0)
    _store_rows(dq, acc, b64, h64, first64, local, rows < I, H, I, D, BD, BNHD)


@triton.jit
def query_and_bias_gradients(
    q, k, v, mask, bias, alive_keys, q_ids, kv_ids, q_lengths, kv_lengths, q_offset, seed,
    dout, known, H, I, J, P, qb, qh, kb, kh, vb, vh, dob, doh,
    mb, mh, mi, bb, bh, bi, offset, left, right, factor, cap, kept, scale, dq, dbias,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, G: tl.constexpr, UNIT: tl.constexpr, QN: tl.constexpr, KN: tl.constexpr, VN: tl.constexpr,
    DON: tl.constexpr, MASK_UNIT: tl.constexpr, MJ: tl.constexpr, BIAS_UNIT: tl.constexpr, BJ: tl.constexpr,
    BNHD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, OFFSET: tl.constexpr, Q_LENGTHS: tl.constexpr,
    KV_LENGTHS: tl.constexpr, ALIVE: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, THRESHOLD: tl.constexpr,
    EVEN: tl.constexpr, EVEN_KEYS: tl.constexpr, I_UNIT: tl.constexpr, J_UNIT: tl.constexpr, PRECISE: tl.constexpr,
    WIDEN: tl.constexpr, ITEMS: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    """dq and dbias of a block of queries, for the ITEMS that have one bias: its tile is read and its gradient written
    once for all of them, and dq has the bits that query_gradients gives it.
    """
    I, J = told(I, I_UNIT), told(J, J_UNIT)
    # Programs of many items are few: the longest rows of all heads first. Else those first that read the same keys.
    BLOCKS: tl.constexpr = 1 if ITEMS > 1 else 0
    block, n = tl.program_id(BLOCKS), tl.program_id(1 - BLOCKS)
    if RIGHT:
        block = tl.num_programs(BLOCKS) - 1 - block
    first = block * BM
    h, h64, first64 = n % H, (n % H).to(tl.int64), first.to(tl.int64)
    rows, local, columns = first + tl.arange(0, BM), tl.arange(0, BM), tl.arange(0, BN)
    low, high = _reach(q_offset, 0, offset, left, right, OFFSET)
    last = tl.cdiv(J, BN)
    start, stop = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32) + last
    if RIGHT:
        stop = tl.minimum(stop, _blocks_up(first + BM + high, BN))
    if LEFT:
        start = tl.minimum(_blocks(first + low, BN), stop)

    stride = J // EIGHT * EIGHT  # which the compiler sees to be a multiple
    places = local[:, None] * stride + columns[None, :]
    dbias += (n.to(tl.int64) * I + first64) * stride
    bias += ((n // H).to(tl.int64) * bb + h64 * bh + first64 * bi) * BIAS_UNIT
    mask += (h64 * mh + first64 * mi) * MASK_UNIT
    q += h64 * qh * UNIT + first64 * QN
    dout += h64 * doh * UNIT + first64 * DON
    k += h64 // GROUP * kh * UNIT
    v += h64 // GROUP * vh * UNIT
    none = tl.zeros((BM, BN), dbias.dtype.element_ty)  # what no query of the block sees
    for turn in range(last - (stop - start)):
        begin = tl.where(turn < start, turn, turn + stop - start) * BN
        inside = (rows < I)[:, None] if EVEN_KEYS else (rows < I)[:, None] & (begin + columns < J)[None, :]
        tl.store(dbias + places + begin, none, mask=inside)

    lanes, lanes_v = tl.arange(0, BD), tl.arange(0, BDV)
    if start >= stop:
        for item in tl.static_range(ITEMS):
            b64 = (n // H * ITEMS + item).to(tl.int64)
            _store_rows(dq, tl.zeros((BM, BD), tl.float32), b64, h64, first64, local, rows < I, H, I, D, BD, BNHD)
        return
    tiles_q, tiles_do, sums = (), (), ()
    for item in tl.static_range(ITEMS):
        b = n // H * ITEMS + item
        b64 = b.to(tl.int64)
        alive_rows = (rows < length_of(q_lengths, b, I, Q_LENGTHS))[:, None]
        tiles_q += (_load(q + b64 * qb * UNIT, local[:, None] * QN, lanes[None, :], alive_rows, D, BD, False),)
        tiles_do += (
            _load(dout + b64 * dob * UNIT, local[:, None] * DON, lanes_v[None, :], alive_rows, DV, BDV, False),
        )
        sums += (tl.zeros((BM, BD), tl.float32),)

    for turn in range(start, stop):
        begin = turn * BN
        begin64 = begin.to(tl.int64)
        tile = tl.zeros((BM, BN), tl.float32)
        new = ()
        for item in tl.static_range(ITEMS):
            b = n // H * ITEMS + item
            b64 = b.to(tl.int64)
            j_end = length_of(kv_lengths, b, J, KV_LENGTHS)
            keys, alive, _, _ = _keys(alive_keys, alive_keys, b64, begin, columns, J, j_end, BN, G, ALIVE, False)
            if MASK:
                seen = _pairs(
                    mask + b64 * mb * MASK_UNIT + begin64 * MJ, local[:, None] * mi * MASK_UNIT, columns[None, :] * MJ,
                    (rows < I)[:, None], (keys < J)[None, :], 0, EVEN_KEYS,
                )  # fmt: skip
            else:
                seen = 0
            tile_k = _load(
                k + b64 * kb * UNIT + begin64 * KN, columns[None, :] * KN, lanes[:, None], alive[None, :], D, BD,
                EVEN and not ALIVE,
            )  # fmt: skip
            tile_v = _load(
                v + b64 * vb * UNIT + begin64 * VN, columns[None, :] * VN, lanes_v[:, None], alive[None, :], DV, BDV,
                EVEN and not ALIVE,
            )  # fmt: skip
            s = _dot(tiles_q[item], tile_k, tl.zeros((BM, BN), tl.float32), WIDEN)
            if item == 0:
                added = _pairs(
                    bias + begin64 * BJ, local[:, None] * bi * BIAS_UNIT, columns[None, :] * BJ, (rows < I)[:, None],
                    (begin + columns < J)[None, :], 0.0, EVEN_KEYS,
                )  # fmt: skip
            s, capped = _logits(s, seen, added, factor, cap, MASK, True, SOFTCAP, False, False)
            s = _cut(
                s, keys[None, :], rows[:, None] + low, rows[:, None] + high, 0, 0, alive[None, :], NOTHING, LEFT, RIGHT,
                False, ALIVE or not EVEN,
            )  # fmt: skip
            m, slope, one, delta = _known(known, (b64 * H + h64) * P + rows)
            p = _exp(s - m[:, None], False)
            dp = _dot(tiles_do[item], tile_v, tl.zeros((BM, BN), tl.float32), WIDEN)
            if THRESHOLD:
                dp = _drop(dp, seed, b, h, rows, begin // 4, THRESHOLD, BM, BN, False)
            dp = _of_one(dp, p, one[:, None], delta[:, None], PRECISE)
            ds = p * (dp - slope[:, None])
            tile += ds * one[:, None]
            ds = _uncapped(ds, capped, SOFTCAP, False)
            new += (_dot(ds.to(k.dtype.element_ty), tl.trans(tile_k), sums[item], WIDEN),)
        sums = new
        inside = (rows < I)[:, None] if EVEN_KEYS else (rows < I)[:, None] & (begin + columns < J)[None, :]
        if THRESHOLD:
            tile *= kept
        tl.store(dbias + places + begin, tile.to(dbias.dtype.element_ty), mask=inside)

    for item in tl.static_range(ITEMS):
        b = n // H * ITEMS + item
        b64 = b.to(tl.int64)
        _, _, one, _ = _known(known, (b64 * H + h64) * P + rows)
        acc = sums[item] * (scale * kept * one[:, None])
        if Q_LENGTHS:
            acc = tl.where((rows < length_of(q_lengths, b, I, Q_LENGTHS))[:, None], acc, 0.0)
        _store_rows(dq, acc, b64, h64, first64, local, rows < I, H, I, D, BD, BNHD)


@triton.jit
def key_gradients(
    q, k, v, mask, bias, alive_keys, q_ids, kv_ids, q_lengths, kv_lengths, q_offset, seed, listed, before,
    bounds, dout, known, runs, H, I, J, P, qb, qh, kb, kh, vb, vh, dob, doh,
    mb, mh, mi, bb, bh, bi, offset, left, right, factor, cap, kept, scale, dk, dv,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, G: tl.constexpr, UNIT: tl.constexpr, QN: tl.constexpr, KN: tl.constexpr, VN: tl.constexpr,
    DON: tl.constexpr, MASK_UNIT: tl.constexpr, MJ: tl.constexpr, BIAS_UNIT: tl.constexpr, BJ: tl.constexpr,
    BNHD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    OFFSET: tl.constexpr, SEGMENTS: tl.constexpr, Q_LENGTHS: tl.constexpr, KV_LENGTHS: tl.constexpr,
    ALIVE: tl.constexpr, PACKED: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, SHARED: tl.constexpr,
    SOFTCAP: tl.constexpr, THRESHOLD: tl.constexpr, BASE2: tl.constexpr, POSITIVE: tl.constexpr, EVEN: tl.constexpr,
    EVEN_KEYS: tl.constexpr, I_UNIT: tl.constexpr, J_UNIT: tl.constexpr, PRECISE: tl.constexpr, WIDEN: tl.constexpr,
    DRAWN: tl.constexpr, WORDS: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys, over the heads that read it and the blocks of queries that see it.

    KEYS, VALUES: whether dk and dv are made: where rows are long the sums of both fill more registers than there are.
    RUNS: whether, where segments are `runs`, `keys.long_key_gradients` makes them.
    """
    if RUNS and tl.load(runs) != 0:
        return
    I, J = told(I, I_UNIT), told(J, J_UNIT)
    block, HK = tl.program_id(0), H // GROUP
    n = _item_and_head(HK, SHARED)
    b, hk = n // HK, n % HK
    b64, hk64 = b.to(tl.int64), hk.to(tl.int64)
    first = block * BN
    first64 = first.to(tl.int64)
    columns, local = tl.arange(0, BN), tl.arange(0, BM)
    i_end, j_end = length_of(q_lengths, b, I, Q_LENGTHS), _ends(kv_lengths, before, b, J, PACKED, KV_LENGTHS)
    low, high = _reach(q_offset, b, offset, left, right, OFFSET)
    keys, alive, of_key, of_block = _keys(alive_keys, listed, b64, first, columns, J, j_end, BN, G, ALIVE, PACKED)
    lowest, highest = first, first + BN - 1
    if PACKED:
        lowest, highest = tl.min(keys, 0), tl.max(keys, 0)
    kv_id = _ids(kv_ids, b64, keys, J, EVEN_KEYS, SEGMENTS)

    most = _blocks_up(i_end, BM)
    start, stop = tl.full((), 0, tl.int32), most
    whole_from, whole_to = tl.full((), 0, tl.int32), most
    if RIGHT:
        start = _blocks(lowest - high, BM)
        whole_from = _blocks_up(highest - high, BM)
    if LEFT:
        stop = tl.minimum(stop, _blocks_up(highest + 1 - low, BM))
        whole_to = tl.minimum(whole_to, _blocks(lowest - low + 1, BM))
    if SEGMENTS:
        groups, others = tl.cdiv(J, G), tl.cdiv(I, G)
        some_from, some_to, same_from, same_to = _hull(bounds, b * (groups + others) + others, block, groups, BN // G)
        start = tl.maximum(start, some_from // (BM // G))
        stop = tl.minimum(stop, (some_to + BM // G - 1) // (BM // G))
        whole_from = tl.maximum(whole_from, (same_from + BM // G - 1) // (BM // G))
        whole_to = tl.minimum(whole_to, same_to // (BM // G))
    if ALIVE:
        stop = tl.where(tl.max(alive.to(tl.int32), 0) > 0, stop, 0)
    if KV_LENGTHS or PACKED:
        stop = tl.where(first < j_end, stop, 0)
    start, whole_from, whole_to, stop = _clip(start, whole_from, whole_to, stop, most)

    FRONT: tl.constexpr = RIGHT or SEGMENTS
    BEHIND: tl.constexpr = LEFT or SEGMENTS
    LATE: tl.constexpr = BASE2 and POSITIVE and not SOFTCAP
    ONE: tl.constexpr = (FRONT or BEHIND) and BD < 128 and BDV < 128 and ((DRAWN and LATE) or not THRESHOLD)
    if BIAS or MASK:  # as in query_gradients
        unseen = (start >= stop) if FRONT or BEHIND else (whole_from >= whole_to)
        if unseen:
            if KEYS:
                none = tl.zeros((BN, BD), tl.float32)
                _store_rows(dk, none, b64, hk64, first64, columns, keys < J, HK, J, D, BD, BNHD)
            if VALUES:
                none_v = tl.zeros((BN, BDV), tl.float32)
                _store_rows(dv, none_v, b64, hk64, first64, columns, keys < J, HK, J, DV, BDV, BNHD)
            return
    k += (b64 * kb + hk64 * kh) * UNIT + of_block * KN
    v += (b64 * vb + hk64 * vh) * UNIT + of_block * VN
    tile_k = _load(k, of_key[:, None] * KN, tl.arange(0, BD)[None, :], alive[:, None], D, BD, False)
    REST: tl.constexpr = SOFTCAP == 1 and BASE2
    if REST:  # as in query_gradients
        scale = -scale
    QUADS: tl.constexpr = BN // 4 if BN < 32 else 8
    if KEYS:
        tile_v = _load(v, of_key[:, None] * VN, tl.arange(0, BDV)[None, :], alive[:, None], DV, BDV, False)
        sum_k = tl.zeros((BN, BD), tl.float32)
    if VALUES:
        sum_v = tl.zeros((BN, BDV), tl.float32)

    BEFORE: tl.constexpr = FRONT and not ONE
    AFTER: tl.constexpr = BEHIND and not ONE
    ALL: tl.constexpr = BD == 128 and BM < 64 and not PRECISE
    for member in range(GROUP):
        h = hk * GROUP + member
        h64 = h.to(tl.int64)
        base_q = q + (b64 * qb + h64 * qh) * UNIT
        base_do = dout + (b64 * dob + h64 * doh) * UNIT
        of_head = (b64 * H + h64) * P
        base_mask = mask + (b64 * mb + h64 * mh) * MASK_UNIT + first64 * MJ
        base_bias = bias + (b64 * bb + h64 * bh) * BIAS_UNIT + first64 * BJ
        for stage in tl.static_range(3):  # as forward
            if (stage == 0 and BEFORE) or (stage == 1) or (stage == 2 and AFTER):
                from_block = start if (stage == 0 or ONE) else (whole_from if stage == 1 else whole_to)
                to_block = whole_from if stage == 0 else (whole_to if (stage == 1 and not ONE) else stop)
                for turn in range(from_block, to_block):
                    begin = turn * BM
                    begin64 = begin.to(tl.int64)
                    rows = begin + local
                    alive_rows = rows < i_end
                    if MASK:
                        seen = _pairs(
                            base_mask + begin64 * mi * MASK_UNIT, local[None, :] * mi * MASK_UNIT,
                            columns[:, None] * MJ, (rows < I)[None, :], (keys < J)[:, None], 0, EVEN_KEYS,
                        )  # fmt: skip
                    else:
                        seen = 0
                    if BIAS:
                        added = _pairs(
                            base_bias + begin64 * bi * BIAS_UNIT, local[None, :] * bi * BIAS_UNIT,
                            columns[:, None] * BJ, (rows < I)[None, :], (keys < J)[:, None], 0.0, EVEN_KEYS,
                        )  # fmt: skip
                    else:
                        added = 0.0
                    tile_q = _load(
                        base_q + begin64 * QN, _along(local, BM, QN, ALL)[None, :], tl.arange(0, BD)[:, None],
                        alive_rows[None, :], D, BD, EVEN,
                    )  # fmt: skip
                    tile_do = _load(
                        base_do + begin64 * DON, _along(local, BM, DON, ALL)[:, None], tl.arange(0, BDV)[None, :],
                        alive_rows[:, None], DV, BDV, EVEN,
                    )  # fmt: skip
                    m, slope, one, last = _known(known, of_head + rows)
                    if DRAWN:
                        bits = _bits_by_key(seed, of_head * WORDS, rows, first, P, BN, BM)
                    s = _dot(tile_k, tile_q, tl.zeros((BN, BM), tl.float32), WIDEN)
                    s, capped = _logits(
                        s, seen, added, 1.0 if LATE else factor, cap, MASK, BIAS, SOFTCAP, REST, False
                    )  # fmt: skip
                    if _is_cut(turn, whole_from, whole_to, stage, ONE, FRONT, BEHIND):
                        q_id = _ids(q_ids, b64, rows, I, EVEN, SEGMENTS)
                        s = _cut(  # what a key gets that is not alive is thrown away at the end
                            s, rows[None, :], keys[:, None] - high, keys[:, None] - low, q_id[None, :], kv_id[:, None],
                            alive[:, None], NOTHING, RIGHT, LEFT, SEGMENTS, False,
                        )  # fmt: skip
                    if LATE:
                        s = s * factor
                    if REST:
                        m -= cap + 2
                    if BASE2 or PRECISE:
                        p = _exp(s - m[None, :], BASE2)
                        if not BASE2:
                            p *= one[None, :]
                    else:  # the factor comes with the exponent
                        p = tl.exp2((s - m[None, :]) * LOG2E + last[None, :])
                    if KEYS:
                        dp = _dot(tile_v, tl.trans(tile_do), tl.zeros((BN, BM), tl.float32), WIDEN)
                    dropped = p
                    if DRAWN:
                        dropped = _where_kept(bits, first, columns[:, None], p, BN, False)
                    elif THRESHOLD:
                        k0, k1 = _seed(seed)
                        bits = _drawn_bits(k0, k1, b, h, begin, first // 4, THRESHOLD, QUADS, BN // (4 * QUADS), BM)
                        bits = tl.reshape(tl.broadcast_to(bits, (BN // (4 * QUADS), 4 * QUADS, BM)), (BN, BM))
                        dropped = _where_bit(bits, (1 << (columns % (4 * QUADS)))[:, None], p)
                    if VALUES:
                        sum_v = _dot(dropped.to(v.dtype.element_ty), tile_do, sum_v, WIDEN)
                    if KEYS:
                        if THRESHOLD:  # p (dp - slope), dp being dropped as p is
                            dropped = _of_one(dropped * dp, p, one[None, :], p * last[None, :], PRECISE)
                            ds = dropped - p * slope[None, :]
                        else:
                            dp = _of_one(dp, p, one[None, :], last[None, :], PRECISE)
                            ds = p * (dp - slope[None, :])
                        ds = _uncapped(ds, capped, SOFTCAP, REST)
                        sum_k = _dot(ds.to(k.dtype.element_ty), tl.trans(tile_q), sum_k, WIDEN)

    if PACKED:  # those of the block of rows that are not gone over get nothing
        places = first + columns
        j_end = tl.load(before + b64 * (J + 3) + J, volatile=True)  # once more, rather than in registers all the time
        alive = places < j_end
        of_key = tl.load(listed + b64 * J + places, mask=alive, other=0, volatile=True).to(tl.int64)
        dead = _below(before, b, places, J, PACKED) == _below(before, b, places + 1, J, PACKED)
        dead &= places < J
        inside = alive[:, None]
    else:
        inside = (keys < J)[:, None]
    if KEYS:
        sum_k = tl.where(alive[:, None], sum_k * (scale * kept), 0.0)
        stride_k, lanes_k = HK * D if BNHD else D, tl.arange(0, BD)[None, :]
        dk += (b64 * J * HK + hk64) * D if BNHD else n.to(tl.int64) * J * D
        _store(dk + of_block * stride_k, of_key[:, None] * stride_k, lanes_k, sum_k, inside, D)
        if PACKED:
            rows_k = columns[:, None] * stride_k
            _store(dk + first64 * stride_k, rows_k, lanes_k, tl.zeros_like(sum_k), dead[:, None], D)
    if VALUES:
        sum_v = tl.where(alive[:, None], sum_v * (0.25 * kept if REST else kept), 0.0)
        stride_v, lanes_v = HK * DV if BNHD else DV, tl.arange(0, BDV)[None, :]
        dv += (b64 * J * HK + hk64) * DV if BNHD else n.to(tl.int64) * J * DV
        _store(dv + of_block * stride_v, of_key[:, None] * stride_v, lanes_v, sum_v, inside, DV)
        if PACKED:
            rows_v = columns[:, None] * stride_v
            _store(dv + first64 * stride_v, rows_v, lanes_v, tl.zeros_like(sum_v), dead[:, None], DV)


@triton.jit
def bias_gradients(
    q, k, v, mask, bias, alive_keys, q_ids, kv_ids, q_lengths, kv_lengths, q_offset, seed,
    dout, known, B, H, I, J, P, qb, qh, kb, kh, vb, vh, dob, doh,
    mb, mh, mi, bb, bh, bi, offset, left, right, factor, cap, kept, dbias,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, G: tl.constexpr, UNIT: tl.constexpr, QN: tl.constexpr, KN: tl.constexpr, VN: tl.constexpr,
    DON: tl.constexpr, MASK_UNIT: tl.constexpr, MJ: tl.constexpr, BIAS_UNIT: tl.constexpr, BJ: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, OFFSET: tl.constexpr, SEGMENTS: tl.constexpr, Q_LENGTHS: tl.constexpr,
    KV_LENGTHS: tl.constexpr, ALIVE: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, THRESHOLD: tl.constexpr,
    EVEN_KEYS: tl.constexpr, I_UNIT: tl.constexpr, J_UNIT: tl.constexpr, PRECISE: tl.constexpr, WIDEN: tl.constexpr,
    DRAWN: tl.constexpr, WORDS: tl.constexpr,
    ALL_B: tl.constexpr, ALL_H: tl.constexpr, ALL_I: tl.constexpr, ALL_J: tl.constexpr,
):  # fmt: skip
    """A tile of dbias: the sum over the axes along which the bias is one for all (ALL_), in one order."""
    I, J = told(I, I_UNIT), told(J, J_UNIT)
    item_head = tl.program_id(2)
    heads = 1 if ALL_H else H
    local, columns = tl.arange(0, BM), tl.arange(0, BN)
    from_i, to_i = (0, tl.cdiv(I, BM)) if ALL_I else (tl.program_id(1), tl.program_id(1) + 1)
    from_j, to_j = (0, tl.cdiv(J, BN)) if ALL_J else (tl.program_id(0), tl.program_id(0) + 1)
    if (not OFFSET) and (not (ALL_I and ALL_J)):  # one reach for all turns
        low, high = _reach(q_offset, 0, offset, left, right, OFFSET)
        if RIGHT:
            from_i = tl.maximum(from_i, _blocks(from_j * BN - high, BM))
            to_j = tl.minimum(to_j, _blocks_up(to_i * BM + high, BN))
        if LEFT:
            to_i = tl.minimum(to_i, _blocks_up(to_j * BN - low, BM))
            from_j = tl.maximum(from_j, _blocks(from_i * BM + low, BN))
    turns_i, turns_j = tl.maximum(to_i - from_i, 0), tl.maximum(to_j - from_j, 0)
    turns = (B if ALL_B else 1) * (H if ALL_H else 1) * turns_i * turns_j
    FIXED: tl.constexpr = not (ALL_I or ALL_J)  # all turns have the same tile of the bias
    if FIXED:
        rows, keys = tl.program_id(1) * BM + local, tl.program_id(0) * BN + columns
        of_bias = (item_head // heads).to(tl.int64) * bb + (item_head % heads).to(tl.int64) * bh
        added = _pairs(
            bias + of_bias * BIAS_UNIT, rows[:, None].to(tl.int64) * bi * BIAS_UNIT, keys[None, :].to(tl.int64) * BJ,
            (rows < I)[:, None], (keys < J)[None, :], 0.0, EVEN_KEYS,
        )  # fmt: skip
    acc = tl.zeros((BM, BN), tl.float32)
    for turn in range(turns):
        first_j = (from_j + turn % turns_j) * BN
        first_i = (from_i + turn // turns_j % turns_i) * BM
        other = turn // (turns_j * turns_i)
        h = other % H if ALL_H else item_head % heads
        b = (other // H if ALL_H else other) if ALL_B else item_head // heads
        b64, h64, i64, j64 = b.to(tl.int64), h.to(tl.int64), first_i.to(tl.int64), first_j.to(tl.int64)
        i_end, j_end = length_of(q_lengths, b, I, Q_LENGTHS), length_of(kv_lengths, b, J, KV_LENGTHS)
        low, high = _reach(q_offset, b, offset, left, right, OFFSET)
        rows = first_i + local
        alive_rows = (rows < i_end)[:, None]
        of_row = (b64 * H + h64) * P + rows
        keys, alive, _, _ = _keys(alive_keys, alive_keys, b64, first_j, columns, J, j_end, BN, G, ALIVE, False)
        if not FIXED:
            added = _pairs(
                bias + (b64 * bb + h64 * bh + i64 * bi) * BIAS_UNIT + j64 * BJ, local[:, None] * bi * BIAS_UNIT,
                columns[None, :] * BJ, (rows < I)[:, None], (keys < J)[None, :], 0.0, EVEN_KEYS,
            )  # fmt: skip
        if MASK:
            seen = _pairs(
                mask + (b64 * mb + h64 * mh + i64 * mi) * MASK_UNIT + j64 * MJ, local[:, None] * mi * MASK_UNIT,
                columns[None, :] * MJ, (rows < I)[:, None], (keys < J)[None, :], 0, EVEN_KEYS,
            )  # fmt: skip
        else:
            seen = 0
        tile_q = _load(
            q + (b64 * qb + h64 * qh) * UNIT + i64 * QN, local[:, None] * QN, tl.arange(0, BD)[None, :], alive_rows,
            D, BD, False,
        )  # fmt: skip
        tile_do = _load(
            dout + (b64 * dob + h64 * doh) * UNIT + i64 * DON, local[:, None] * DON, tl.arange(0, BDV)[None, :],
            alive_rows, DV, BDV, False,
        )  # fmt: skip
        tile_k = _load(
            k + (b64 * kb + (h64 // GROUP) * kh) * UNIT + j64 * KN, columns[None, :] * KN, tl.arange(0, BD)[:, None],
            alive[None, :], D, BD, False,
        )  # fmt: skip
        tile_v = _load(
            v + (b64 * vb + (h64 // GROUP) * vh) * UNIT + j64 * VN, columns[None, :] * VN, tl.arange(0, BDV)[:, None],
            alive[None, :], DV, BDV, False,
        )  # fmt: skip
        s = _dot(tile_q, tile_k, tl.zeros((BM, BN), tl.float32), WIDEN)
        q_id = _ids(q_ids, b64, rows, I, False, SEGMENTS)
        kv_id = _ids(kv_ids, b64, keys, J, EVEN_KEYS, SEGMENTS)
        s, _ = _logits(s, seen, added, factor, cap, MASK, True, SOFTCAP, False, False)
        s = _cut(
            s, keys[None, :], rows[:, None] + low, rows[:, None] + high, q_id[:, None], kv_id[None, :], alive[None, :],
            NOTHING, LEFT, RIGHT, SEGMENTS, True,
        )  # fmt: skip
        m, slope, one, delta = _known(known, of_row)
        p = _exp(s - m[:, None], False) * one[:, None]
        dp = _dot(tile_do, tile_v, tl.zeros((BM, BN), tl.float32), WIDEN)
        if DRAWN:
            bits = _bits_by_query(seed, (b64 * H + h64) * WORDS * P, rows, first_j, P, BN)
            dp = _where_kept(bits, first_j, columns[None, :], dp, BN, False)
        elif THRESHOLD:
            dp = _drop(dp, seed, b, h, rows, first_j // 4, THRESHOLD, BM, BN, False)
        dp = _of_one(dp, p, one[:, None], delta[:, None], PRECISE)
        acc += p * (dp - slope[:, None])

    acc *= kept
    # (b|1, h|1, i|1, j|1), contiguous
    wide, tall = 1 if ALL_J else J, 1 if ALL_I else I
    base = dbias + item_head.to(tl.int64) * tall * wide
    rows, keys = tl.program_id(1) * BM + local, tl.program_id(0) * BN + columns
    if ALL_I and ALL_J:
        tl.store(base, tl.sum(tl.sum(acc, 1), 0).to(dbias.dtype.element_ty))
    elif ALL_I:
        tl.store(base + keys, tl.sum(acc, 0).to(dbias.dtype.element_ty), mask=keys < J)
    elif ALL_J:
        tl.store(base + rows, tl.sum(acc, 1).to(dbias.dtype.element_ty), mask=rows < I)
    else:
        places = rows[:, None].to(tl.int64) * J + keys[None, :]
        inside = (rows < I)[:, None] & (keys < J)[None, :]
        tl.store(base + places, acc.to(dbias.dtype.element_ty), mask=inside)

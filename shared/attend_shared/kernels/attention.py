"""Attention in Triton, the way forward: one source that torch and JAX launch alike, so that both get the same bits.

The way back is in `gradients`. What both are put together from is in `visits` (where loops begin and end), `tiles`
(what is loaded and made of it in a turn) and `dropout`.

Every kernel takes its inputs, then numbers, then its outputs, then what is fixed when it is compiled (in capitals).
An input that a call has not got stands for nothing: any pointer will do. Strides of q, k, v and their like by item and
head are in units of UNIT elements, so that the compiler sees that rows are aligned where they are; those by row are
fixed when it is compiled. The last axis is contiguous.

Nothing is masked twice: a whole block of keys or queries, one that is allowed by position, segment and key mask alike,
is visited without a look at any of them; one that is wholly ruled out is not visited; and keys that a whole item
excludes are read as zeros, or not at all, so that what stands there (NaN, say) reaches nothing.

References:
    Dao, Fu, Ermon, Rudra, Ré: FlashAttention (2022); Dao: FlashAttention-2 (2023), whose order of loops the gradients
    follow. Dao, Haziza, Massa, Sizov: Flash-Decoding (2023), for the split over keys. Tillet, Kung, Cox: Triton (2019).
"""

from __future__ import annotations

import triton
import triton.language as tl

from attend_shared.kernels.dropout import _bits_by_query, _columns, _drop, _where_kept
from attend_shared.kernels.tiles import (
    LEAST,
    LN2,
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
    _tanh,
)
from attend_shared.kernels.visits import PADDED, _item_and_head, _visited_keys, length_of, told

HUGE = tl.constexpr(2.0**29)


@triton.jit
def _unit(m):
    """In which units exponents are taken where the largest of a row is m: exp2(x unit - m unit), of which m unit is
    rounded, alike for the whole row. From HUGE on numbers are so far apart that any unit gives 0 or 1.
    """
    return tl.where(tl.abs(m) < HUGE, LOG2E, 1.0)


@triton.jit
def with_sink(natural, sink):
    """lse of rows with a sink beside their keys, whether nothing is in it, and the shares of the keys and of the sink:
    in natural units, as a sink may be as low as numbers go.
    """
    most = tl.maximum(natural, sink)
    shift = tl.where(most == NOTHING, 0.0, most)
    ours, its = _exp(natural - shift, False), _exp(sink - shift, False)
    both = ours + its
    empty = both == 0
    both = tl.where(empty, 1.0, both)
    keys = ours / both
    return most + LN2 * tl.log2(both), empty, keys, its / both


@triton.jit
def _finish(
    acc, m, total, sinks, b, heads, rows, inside, alive, H, I, P, kept, out, lse, top, inverse, exact,
    DV: tl.constexpr, BDV: tl.constexpr, BNHD: tl.constexpr, Q_LENGTHS: tl.constexpr, SINKS: tl.constexpr,
    BASE2: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out, lse and what the way back needs of some rows, from their largest logit, total and sum of values."""
    if Q_LENGTHS:
        total, m = tl.where(alive, total, 0.0), tl.where(alive, m, NOTHING)
    empty = total == 0
    if SINKS:
        sink = tl.load(sinks + heads).to(tl.float32) + tl.zeros_like(m)
    of_row = b.to(tl.int64) * H + heads
    places = of_row * P + rows
    if BASE2:
        total = tl.where(empty, 1.0, total)
        shrink = 1 / total
        joined = m + tl.log2(total)
        natural = joined * LN2
        if SINKS:
            natural, empty, ours, its = with_sink(natural, sink)
            shrink *= ours
            joined = tl.maximum(natural * LOG2E, LEAST)
            tl.store(inverse + places, its, mask=inside)
        seen = joined
    else:
        shrink = tl.full((1,), 1.0, tl.float32)
        if SINKS:
            most = tl.maximum(m, sink)
            shift = tl.where(most == NOTHING, 0.0, most)
            shrink = tl.where(empty, 0.0, _exp(m - shift, False))
            total = total * shrink + _exp(sink - shift, False)
            m = most
            empty = total == 0
        total = tl.where(empty, 1.0, total)
        shrink = shrink / total
        natural = m + LN2 * tl.log2(total)
        seen = m
        tl.store(inverse + places, 1 / total, mask=inside)
    none = empty
    if Q_LENGTHS:
        none = none | (alive == 0)
    tl.store(top + places, tl.where(none, float("inf"), seen), mask=inside)
    natural = tl.where(empty, NOTHING, natural)
    tl.store(lse + of_row * I + rows, natural, mask=inside)
    acc *= (shrink * kept)[:, None]
    if Q_LENGTHS:
        acc = tl.where(alive[:, None], acc, 0.0)
    lanes = tl.arange(0, BDV)[None, :]
    if BNHD:
        first = ((b.to(tl.int64) * I + rows) * H + heads) * DV
    else:
        first = (of_row * I + rows) * DV
    here = inside[:, None] & (lanes < DV)
    tl.store(out + first[:, None] + lanes, acc.to(out.dtype.element_ty), mask=here)
    if EXACT:
        tl.store(exact + first[:, None] + lanes, acc, mask=here)


@triton.jit
def _pad(top, inverse, of_head, I, P, BASE2: tl.constexpr, SINKS: tl.constexpr):
    """Rows behind the last: they see nothing."""
    behind = I + tl.arange(0, PADDED)
    tl.store(top + of_head * P + behind, tl.full((PADDED,), float("inf"), tl.float32), mask=behind < P)
    if SINKS or (not BASE2):
        tl.store(inverse + of_head * P + behind, tl.zeros((PADDED,), tl.float32), mask=behind < P)


@triton.jit
def forward(
    q, k, v, mask, bias, alive_keys, q_ids, kv_ids, q_lengths, kv_lengths, q_offset, sinks, seed, listed, before,
    bounds, H, I, J, P, qb, qh, kb, kh, vb, vh, mb, mh, mi, bb, bh, bi,
    offset, left, right, factor, cap, kept, out, lse, top, inverse, exact,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, G: tl.constexpr, UNIT: tl.constexpr, QN: tl.constexpr, KN: tl.constexpr, VN: tl.constexpr,
    MASK_UNIT: tl.constexpr, MJ: tl.constexpr, BIAS_UNIT: tl.constexpr, BJ: tl.constexpr,
    BNHD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    OFFSET: tl.constexpr, SEGMENTS: tl.constexpr, Q_LENGTHS: tl.constexpr, KV_LENGTHS: tl.constexpr,
    ALIVE: tl.constexpr, LISTED: tl.constexpr, PACKED: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr,
    SHARED: tl.constexpr, SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr, THRESHOLD: tl.constexpr, BASE2: tl.constexpr, POSITIVE: tl.constexpr, EVEN: tl.constexpr,
    EVEN_KEYS: tl.constexpr, I_UNIT: tl.constexpr, J_UNIT: tl.constexpr, PRECISE: tl.constexpr, WIDEN: tl.constexpr,
    EXACT: tl.constexpr, SPLIT: tl.constexpr, DRAWN: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """out, lse, and what the way back needs: a row's largest logit and 1 / total, or both in one (BASE2).

    EXACT: out in float32 as well, its weights not rounded, where a gradient is finer than out. SPLIT: the rows of a
    program are the queries of all heads that read the same keys; its part of these is the third axis of the grid; and
    out, lse and top are the sum of values, total and largest logit of that part, which `join` joins. DRAWN: in the
    place of the seed stands what `draw` left, WORDS for each query; not of parts.
    """
    I, J = told(I, I_UNIT), told(J, J_UNIT)
    turns = tl.num_programs(0)
    block = turns - 1 - tl.program_id(0) if RIGHT else tl.program_id(0)  # the longest rows first
    n = _item_and_head(H // GROUP if SPLIT else H, SHARED)
    local = tl.arange(0, BM)
    NEAR: tl.constexpr = THRESHOLD > 0 and not (MASK or BIAS or PRECISE)  # whose rows would be read piece by piece
    columns = _columns(BN, NEAR)
    first = block * BM
    if SPLIT:
        b, hk = n // (H // GROUP), n % (H // GROUP)
        heads = (hk * GROUP + local // I).to(tl.int64)
        rows = tl.where(local < GROUP * I, local % I, I)
    else:
        b, hk = n // H, n % H // GROUP
        heads = (n % H).to(tl.int64)
        rows = first + local
    b64, hk64 = b.to(tl.int64), hk.to(tl.int64)
    i_end, j_end, low, high, start, whole_from, whole_to, stop, behind, seen_from, seen_to = _visited_keys(
        q_lengths, kv_lengths, q_offset, before, bounds, b, block, I, J, offset, left, right,
        BM, BN, G, LEFT, RIGHT, OFFSET, SEGMENTS, LISTED, PACKED, False, Q_LENGTHS, KV_LENGTHS,
    )  # fmt: skip
    if SPLIT:
        part, parts = tl.program_id(2), tl.num_programs(2)
        each = tl.cdiv(stop - start, parts)
        whole_from = start + part * each
        stop = tl.minimum(whole_from + each, stop)
        whole_to = whole_from

    q += b64 * qb * UNIT
    k += (b64 * kb + hk64 * kh) * UNIT
    v += (b64 * vb + hk64 * vh) * UNIT
    mask += b64 * mb * MASK_UNIT
    bias += b64 * bb * BIAS_UNIT
    if SPLIT:
        of_q = (heads * qh * UNIT + rows * QN)[:, None]
        of_mask, of_bias = (heads * mh + rows * mi)[:, None], (heads * bh + rows * bi)[:, None]
    else:
        first64 = first.to(tl.int64)
        q += heads * qh * UNIT + first64 * QN
        mask += (heads * mh + first64 * mi) * MASK_UNIT
        bias += (heads * bh + first64 * bi) * BIAS_UNIT
        of_q, of_mask, of_bias = local[:, None] * QN, local[:, None] * mi, local[:, None] * bi
    alive_rows = rows < i_end
    tile_q = _load(q, of_q, tl.arange(0, BD)[None, :], alive_rows[:, None], D, BD, False)
    q_id = _ids(q_ids, b64, rows, I, False, SEGMENTS)

    LATE: tl.constexpr = BASE2 and POSITIVE and not SOFTCAP  # the factor comes with the exponent
    UNITS: tl.constexpr = BIAS and not (PRECISE or BASE2)
    m = tl.full((BM,), NOTHING, tl.float32)
    unit = _unit(m)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BDV), tl.float32)
    # every block of keys is, or reads as if it were, so that all may be read in one loop
    FULL: tl.constexpr = PACKED or (EVEN and not ALIVE)
    FRONT: tl.constexpr = LEFT or SEGMENTS
    BEHIND: tl.constexpr = RIGHT or SEGMENTS or PACKED
    CUTS: tl.constexpr = FRONT or BEHIND
    ONE: tl.constexpr = FULL and CUTS and not (SPLIT or PACKED)
    BEFORE: tl.constexpr = (FRONT or ALIVE or PACKED) and not (ONE or SPLIT)
    AFTER: tl.constexpr = (CUTS or SPLIT or not FULL) and not ONE
    # Loads ahead take registers, with which one more program would fit a multiprocessor. Not where masks or biases are
    # read: ptxas 12.8 then ran out of uniform registers, and took a product's address from one that it had used anew.
    FEW: tl.constexpr = ALIVE and BD <= 64 and not (PRECISE or SPLIT or MASK or BIAS)
    # Rows that lie apart come after their places: five stages read places four turns ahead and rows two, where three
    # read them two and one. Short rows gain nothing by that.
    FAR_APART: tl.constexpr = PACKED and BD == 128 and not PRECISE
    ALL: tl.constexpr = BD == 128 and not (PACKED or PRECISE or BIAS)
    AHEAD: tl.constexpr = 1 if FEW else (5 if FAR_APART else None)
    EARLY: tl.constexpr = DRAWN and not LISTED and BD <= 64  # bits are read a turn ahead, into registers
    of_head, last = n.to(tl.int64) * WORDS * P, tl.cdiv(J, BN) - 1
    for stage in tl.static_range(3):  # blocks that may be cut, whole blocks, and blocks that may be cut
        if (stage == 0 and BEFORE) or (stage == 1 and not SPLIT) or (stage == 2 and AFTER):
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
                        mask + begin64 * MJ, of_mask * MASK_UNIT, columns[None, :] * MJ, (rows < I)[:, None],
                        (keys < J)[None, :], 0, EVEN_KEYS or (stage == 1),
                    )  # fmt: skip
                else:
                    seen = 0
                if BIAS:
                    added = _pairs(
                        bias + begin64 * BJ, of_bias * BIAS_UNIT, columns[None, :] * BJ, (rows < I)[:, None],
                        (keys < J)[None, :], 0.0, EVEN_KEYS or (stage == 1),
                    )  # fmt: skip
                else:
                    added = 0.0
                tile_k = _load(
                    k + of_block * KN, _along(of_key, BN, KN, ALL)[None, :], tl.arange(0, BD)[:, None], alive[None, :],
                    D, BD, FULL or (stage == 1),
                )  # fmt: skip
                if EARLY:
                    bits = coming
                    coming = _bits_by_query(seed, of_head, rows, tl.minimum(at + 1, last) * BN, P, BN)
                elif DRAWN:
                    bits = _bits_by_query(seed, of_head, rows, begin, P, BN)
                s = _dot(tile_q, tile_k, tl.zeros((BM, BN), tl.float32), WIDEN)
                if SOFTCAP == 1:
                    s = _tanh(s, factor, cap)
                s, _ = _logits(
                    s, seen, added, 1.0 if LATE or SOFTCAP == 1 else factor, cap, MASK, BIAS,
                    2 if SOFTCAP == 2 else 0, False, False,
                )  # fmt: skip
                if PRECISE:  # the product is rounded, and not a part of s - m, which is 0 where s is the largest
                    s += 0.0
                if _is_cut(
                    turn, seen_from, seen_to, stage, ONE or (PACKED and not SPLIT), FRONT,
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
                    new = tl.maximum(m, tl.max(s, 1) * factor)
                    shift = tl.where(new == NOTHING, 0.0, new)
                    p = tl.exp2(s * factor - shift[:, None])
                    shrink = _exp(m - shift, BASE2)
                elif UNITS:
                    new = tl.maximum(m, tl.max(s, 1))
                    now = _unit(new)
                    shift = tl.where(new == NOTHING, 0.0, new * now)
                    p = tl.exp2(s * now[:, None] - shift[:, None])
                    shrink = tl.where(now == unit, tl.exp2(m * unit - shift), 0.0)
                    unit = now
                else:
                    new = tl.maximum(m, tl.max(s, 1))
                    shift = tl.where(new == NOTHING, 0.0, new)
                    p = _exp(s - shift[:, None], BASE2)
                    shrink = _exp(m - shift, BASE2)
                total = total * shrink + tl.sum(p, 1)
                if DRAWN:
                    p = _where_kept(bits, begin, columns[None, :], p, BN, NEAR)
                elif THRESHOLD:
                    of_rows = heads.to(tl.int32)[:, None] if SPLIT else n % H
                    p = _drop(p, seed, b, of_rows, rows, at * (BN // 4), THRESHOLD, BM, BN, NEAR)
                acc = acc * shrink[:, None]
                tile_v = _load(
                    v + of_block * VN, _along(of_key, BN, VN, ALL)[:, None], tl.arange(0, BDV)[None, :], alive[:, None],
                    DV, BDV, FULL or (stage == 1),
                )  # fmt: skip
                rounded = p.to(v.dtype.element_ty)
                acc = _dot(rounded, tile_v, acc, WIDEN)
                if EXACT:  # what the rounding lost, in two more products
                    for _ in tl.static_range(2):
                        p -= rounded.to(tl.float32)
                        rounded = p.to(v.dtype.element_ty)
                        acc = _dot(rounded, tile_v, acc, WIDEN)
                m = new

    if UNITS:  # what was subtracted is off by as much as it was rounded by
        off = tl.exp2(tl.where(m == NOTHING, 0.0, -tl.fma(m, unit, -(m * unit))))
        total *= off
        acc *= off[:, None]
    if SPLIT:
        place = (n.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)) * (GROUP * I) + local
        inside = local < GROUP * I
        tl.store(top + place, m, mask=inside)
        tl.store(lse + place, total, mask=inside)
        lanes = tl.arange(0, BDV)[None, :]
        tl.store(out + place[:, None] * DV + lanes, acc, mask=inside[:, None] & (lanes < DV))
    else:
        _finish(
            acc, m, total, sinks, b, heads, rows, rows < I, alive_rows, H, I, P, kept, out, lse, top, inverse, exact,
            DV, BDV, BNHD, Q_LENGTHS, SINKS, BASE2, EXACT,
        )  # fmt: skip
        if block == turns - 1:
            _pad(top, inverse, n.to(tl.int64), I, P, BASE2, SINKS)


@triton.jit
def join(
    sums, totals, tops, sinks, q_lengths, H, I, P, parts, kept, out, lse, top, inverse, exact,
    GROUP: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, PARTS: tl.constexpr, BNHD: tl.constexpr,
    Q_LENGTHS: tl.constexpr, SINKS: tl.constexpr, BASE2: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out, lse and what the way back needs of a row whose keys were seen in parts: as `merge`."""
    r, n = tl.program_id(0), tl.program_id(1)
    b, head = n // (H // GROUP), (n % (H // GROUP)) * GROUP + r // I
    part = tl.arange(0, PARTS)
    place = (n.to(tl.int64) * parts + part) * (GROUP * I) + r
    m_of = tl.load(tops + place, mask=part < parts, other=NOTHING)
    m = tl.max(m_of, 0)
    share = _exp(m_of - tl.where(m == NOTHING, 0.0, m), BASE2)
    total = tl.sum(tl.load(totals + place, mask=part < parts, other=0.0) * share, 0)
    lanes = tl.arange(0, BDV)
    there = (part < parts)[:, None] & (lanes < DV)[None, :]
    values = tl.load(sums + place[:, None] * DV + lanes[None, :], mask=there, other=0.0)
    acc = tl.sum(values * share[:, None], 0)
    rows = r % I + tl.arange(0, 1)
    heads = head.to(tl.int64)
    alive = rows < length_of(q_lengths, b, I, Q_LENGTHS)
    one = tl.zeros((1,), tl.float32)
    _finish(
        acc[None, :], m + one, total + one, sinks, b, heads, rows, rows < I, alive, H, I, P, kept, out, lse, top,
        inverse, exact, DV, BDV, BNHD, Q_LENGTHS, SINKS, BASE2, EXACT,
    )  # fmt: skip
    if r % I == I - 1:
        _pad(top, inverse, b.to(tl.int64) * H + heads, I, P, BASE2, SINKS)

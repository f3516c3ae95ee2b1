"""dsinks of kernels that keep out in half precision: of `triton`, and of FlashAttention's packages.

    dsinks = -sum over rows of share * delta,   share = exp(sink - lse),   delta = dout . out - dlse

What out loses by its rounding is the same part of out in every row, but not of delta, which may be small because its
terms cancel. Over many rows alike that is averaged out. Where few rows count for the most, as where logits are large,
where a gradient comes to few rows or where a call has few, it is not: their delta is made anew from q, k and v.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attend_shared.kernels.dropout import _drop
from attend_shared.kernels.tiles import LEAST, LOG2E, NOTHING, _load, _softcap
from attend_shared.kernels.visits import _reach, length_of

FEW = tl.constexpr(16)  # rows of a head are made anew at most: those whose square is more than one in so many of all
TINY = tl.constexpr(2.0**-100)  # rows that are smaller are not: some of their exponentials would be 0
MANY = tl.constexpr(1024)  # starts of runs that are looked at together


@triton.jit
def _weigh(x, share, delta, n, block, rows, P, term, weight, largest, squares):
    """Of rows whose terms of dout . out are x: share * delta, and the weight; and what is kept of a block's weights."""
    size = tl.sum(tl.abs(x), 1)
    w = tl.where(share == 0, 0.0, tl.where(size < TINY, 0.0, share * size))
    place = n.to(tl.int64) * P + rows
    tl.store(term + place, share * delta, mask=rows < P)
    tl.store(weight + place, w, mask=rows < P)
    most = tl.max(w, 0)
    part = w / tl.where(most == 0, 1.0, most)
    tl.store(largest + n * tl.num_programs(0) + block, most)
    tl.store(squares + n * tl.num_programs(0) + block, tl.sum(part * part, 0))


@triton.jit
def weigh_rows(
    out, dout, lse, dlse, sinks, q_lengths, H, I, P, ob, oh, dob, doh, term, weight, largest, squares,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, UNIT: tl.constexpr, ON: tl.constexpr, DON: tl.constexpr,
    LSE: tl.constexpr, Q_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Of each row share * delta, and its weight: what rounding may do to that, share * sum |dout * out|. Of a block of
    rows the largest weight, and the sum of squares of weights over that.
    """
    block, n = tl.program_id(0), tl.program_id(1)
    b64, h64 = (n // H).to(tl.int64), (n % H).to(tl.int64)
    first, local = block * BM, tl.arange(0, BM)
    rows, lanes = first + local, tl.arange(0, BD)[None, :]
    alive = rows < length_of(q_lengths, n // H, I, Q_LENGTHS)
    out += (b64 * ob + h64 * oh) * UNIT + first.to(tl.int64) * ON
    dout += (b64 * dob + h64 * doh) * UNIT + first.to(tl.int64) * DON
    x = _load(out, local[:, None] * ON, lanes, alive[:, None], D, BD, False).to(tl.float32)
    x *= _load(dout, local[:, None] * DON, lanes, alive[:, None], D, BD, False).to(tl.float32)
    delta, of_row = tl.sum(x, 1), n.to(tl.int64) * I + rows
    if LSE:
        delta -= tl.load(dlse + of_row, mask=alive, other=0.0)
    share = _share(lse, tl.load(sinks + n % H).to(tl.float32), of_row, alive)
    delta = tl.where(share == 0, 0.0, delta)
    _weigh(x, share, delta, n, block, rows, P, term, weight, largest, squares)


@triton.jit
def _share(lse, sink, of_row, alive):
    """exp(sink - lse), 0 for rows that are not alive, and for a sink of -inf."""
    x = tl.load(lse + of_row, mask=alive, other=float("inf"))
    x = tl.where(x == NOTHING, float("inf"), x)
    return tl.exp2((tl.where(sink == NOTHING, LEAST, sink) - x) * LOG2E)


@triton.jit
def sum_rows(
    q, k, v, mask, bias, q_ids, kv_ids, q_lengths, kv_lengths, q_offset, seed, starts, dout, lse, dlse, sinks,
    term, weight, largest, squares, B, H, I, J, P, COUNT, qb, qh, kb, kh, vb, vh, dob, doh, mb, mh, mi, bb, bh, bi,
    offset, left, right, scale, cap, kept, partial,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, QN: tl.constexpr, KN: tl.constexpr, VN: tl.constexpr,
    DON: tl.constexpr, MJ: tl.constexpr, BJ: tl.constexpr, LSE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    OFFSET: tl.constexpr, ENDS: tl.constexpr, Q_LENGTHS: tl.constexpr, KV_LENGTHS: tl.constexpr, RUNS: tl.constexpr,
    SEGMENTS: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Each block's part of dsinks, the rows that weigh most made anew: a softmax of their own, in float32.

    ENDS: positions are counted from where the used queries and keys of an item end. RUNS: segments are COUNT - 1 runs,
    within which all is counted, and `starts` says where each begins.
    """
    block, n = tl.program_id(0), tl.program_id(1)
    b, h = n // H, n % H
    b64, h64, first, local = b.to(tl.int64), h.to(tl.int64), block * BM, tl.arange(0, BM)
    place = n.to(tl.int64) * P + first + local
    terms = tl.load(term + place, mask=first + local < P, other=0.0)
    w = tl.load(weight + place, mask=first + local < P, other=0.0)

    blocks, some = tl.num_programs(0), tl.arange(0, PARTS)
    most = tl.zeros((PARTS,), tl.float32)
    for turn in range(tl.cdiv(B * blocks, PARTS)):
        at = turn * PARTS + some
        of_head = (at // blocks * H + h) * blocks + at % blocks
        most = tl.maximum(most, tl.load(largest + of_head, mask=at < B * blocks, other=0.0))
    top = tl.max(most, 0)
    over = tl.where(top == 0, 0.0, 1 / tl.where(top == 0, 1.0, top))
    total = tl.zeros((PARTS,), tl.float32)
    for turn in range(tl.cdiv(B * blocks, PARTS)):
        at = turn * PARTS + some
        of_head = (at // blocks * H + h) * blocks + at % blocks
        its = tl.load(largest + of_head, mask=at < B * blocks, other=0.0) * over
        total += its * its * tl.load(squares + of_head, mask=at < B * blocks, other=0.0)
    w *= over
    heavy = w * w * FEW > tl.sum(total, 0)

    sink = tl.load(sinks + h).to(tl.float32)
    i_end, j_end = length_of(q_lengths, b, I, Q_LENGTHS), length_of(kv_lengths, b, J, KV_LENGTHS)
    low, high = _reach(q_offset, b, offset, left, right, OFFSET)
    if ENDS:
        low, high = low + j_end - i_end, high + j_end - i_end
    q += (b64 * qb + h64 * qh) * UNIT
    k += (b64 * kb + (h64 // GROUP) * kh) * UNIT
    v += (b64 * vb + (h64 // GROUP) * vh) * UNIT
    dout += (b64 * dob + h64 * doh) * UNIT
    mask += b64 * mb + h64 * mh
    bias += b64 * bb + h64 * bh
    lanes, lanes_v, columns = tl.arange(0, BD), tl.arange(0, BDV), tl.arange(0, BN)
    for _ in range(tl.sum(heavy.to(tl.int32), 0)):
        at = tl.min(tl.where(heavy, local, BM), 0)
        heavy = heavy & (local != at)
        row = first + at
        row64, of_row = row.to(tl.int64), n.to(tl.int64) * I + row
        from_key, to_key = tl.full((), 0, tl.int32), j_end
        if RUNS:
            for turn in range(tl.cdiv(COUNT, MANY)):
                which = turn * MANY + tl.arange(0, MANY)
                begins = tl.load(starts + which, mask=which < COUNT, other=2147483647)
                from_key = tl.maximum(from_key, tl.max(tl.where(begins <= row, begins, 0), 0))
                to_key = tl.minimum(to_key, tl.min(tl.where(begins > row, begins, 2147483647), 0))
        if LEFT:
            from_key = tl.maximum(from_key, row + low)
        if RIGHT:
            to_key = tl.minimum(to_key, row + high + 1)
        x = tl.load(q + row64 * QN + lanes, mask=lanes < D, other=0.0).to(tl.float32)
        y = tl.load(dout + row64 * DON + lanes_v, mask=lanes_v < DV, other=0.0).to(tl.float32)
        shift = tl.load(lse + of_row)
        if SEGMENTS:
            q_id = tl.load(q_ids + b64 * I + row)
        sums, products = tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
        start = from_key // 4 * 4  # a counter of Philox has four keys
        for turn in range(tl.cdiv(tl.maximum(to_key - start, 0), BN)):
            begin = start + turn * BN
            begin64, keys = begin.to(tl.int64), begin + columns
            seen = (keys >= from_key) & (keys < to_key)
            if SEGMENTS:
                seen = seen & (tl.load(kv_ids + b64 * J + keys, mask=seen) == q_id)
            if MASK:
                seen = seen & (tl.load(mask + row64 * mi + keys.to(tl.int64) * MJ, mask=seen, other=0) != 0)
            tile = _load(k + begin64 * KN, columns[:, None] * KN, lanes[None, :], seen[:, None], D, BD, False)
            s = tl.sum(tile.to(tl.float32) * x[None, :], 1)
            if SOFTCAP:
                s, _bend = _softcap(s, scale / cap, cap, True)
            else:
                s = s * scale
            if BIAS:
                s += tl.load(bias + row64 * bi + keys.to(tl.int64) * BJ, mask=seen, other=0.0).to(tl.float32)
            p = tl.where(seen, tl.exp2((s - shift) * LOG2E), 0.0)
            tile = _load(v + begin64 * VN, columns[:, None] * VN, lanes_v[None, :], seen[:, None], DV, BDV, False)
            dp = tl.sum(tile.to(tl.float32) * y[None, :], 1)
            if THRESHOLD:
                dp = _drop(dp[None, :], seed, b, h, row + tl.arange(0, 1), begin // 4, THRESHOLD, 1, BN, False)
                dp = tl.reshape(dp, (BN,))
            sums += p
            products += p * dp
        share = tl.exp2((sink - shift) * LOG2E)
        whole = tl.sum(sums, 0) + share  # 1, but for what lse is off
        delta = tl.sum(products, 0) * kept / whole
        if LSE:
            delta -= tl.load(dlse + of_row).to(tl.float32)
        terms = tl.where(local == at, share / whole * delta, terms)
    tl.store(partial + n * blocks + block, -tl.sum(terms, 0))

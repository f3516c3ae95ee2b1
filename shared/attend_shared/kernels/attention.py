"""Attention in Triton: one source that torch and JAX launch alike, so that both get the same bits.

Every kernel takes its inputs, then numbers, then its outputs, then what is fixed when it is compiled (in capitals).
An input that a call has not got stands for nothing: any pointer will do. Strides of q, k, v and their like are in
units of UNIT elements, so that the compiler sees that rows are aligned where they are. The last axis is contiguous.

Nothing is masked twice: a block of keys or queries that is wholly allowed by position is visited without a look at
positions, one that is wholly ruled out is not visited, and keys that a whole item excludes are read as zeros, so that
what stands there (NaN, say) reaches nothing.

References:
    Dao, Fu, Ermon, Rudra, Ré: FlashAttention (2022); Dao: FlashAttention-2 (2023), whose order of loops the gradients
    follow. Tillet, Kung, Cox: Triton (2019). Salmon et al.: Parallel random numbers: as easy as 1, 2, 3 (2011).
"""

from __future__ import annotations

import triton
import triton.language as tl

FAR = tl.constexpr(2**30)  # no array reaches as far
LN2 = tl.constexpr(0.6931471805599453)
NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def _dot(a, b, acc, WIDEN: tl.constexpr):
    """a b + acc, products of float32 in full. WIDEN: the interpreter knows no products of bfloat16."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _load(base, rows, columns, stride, alive, D: tl.constexpr, BD: tl.constexpr, WHOLE: tl.constexpr):
    """A tile of rows, zeros where they are not alive; WHOLE: all are. One of rows and columns stands up, one lies."""
    if WHOLE:
        if D == BD:
            return tl.load(base + rows * stride + columns)
        return tl.load(base + rows * stride + columns, mask=columns < D, other=0.0)
    if D == BD:
        return tl.load(base + rows * stride + columns, mask=alive, other=0.0)
    return tl.load(base + rows * stride + columns, mask=alive & (columns < D), other=0.0)


@triton.jit
def _tanh(x, PRECISE: tl.constexpr):
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)
    t = (1 - e) / (1 + e)
    t = tl.where(x < 0, -t, t)
    if PRECISE:  # near 0 the difference above loses what the series has
        y = x * x
        series = 0.0035921280365724810 * y - 0.0088632355299021966
        series = (series * y + 0.0218694885361552029) * y - 0.0539682539682539683
        series = (series * y + 0.1333333333333333333) * y - 0.3333333333333333333
        t = tl.where(y < 0.16, x + x * y * series, t)
    return t


@triton.jit
def _exp(x, BASE2: tl.constexpr):
    return tl.exp2(x) if BASE2 else tl.exp(x)


@triton.jit
def _keep(
    seed, b, h, rows, quads, threshold: tl.constexpr, R: tl.constexpr, C: tl.constexpr, KEYS_FIRST: tl.constexpr
):  # fmt: skip
    """Which weights of a tile dropout keeps: Philox4x32-7 draws the words of four neighbouring keys at once."""
    key = tl.load(seed).to(tl.uint64) | (tl.load(seed + 1).to(tl.uint64) << 32)
    if KEYS_FIRST:  # (C keys, R queries)
        w0, w1, w2, w3 = tl.philox(key, quads[:, None], rows[None, :], h, b, n_rounds=7)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (C / 4, R, 2, 2)
        words = tl.reshape(tl.permute(words, (0, 2, 3, 1)), (C, R))
    else:  # (R queries, C keys)
        w0, w1, w2, w3 = tl.philox(key, quads[None, :], rows[:, None], h, b, n_rounds=7)
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (R, C))
    return words >= threshold


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
def _length(lengths, b, most, HAS: tl.constexpr):
    """A length within 0 and most."""
    if HAS:
        return tl.minimum(tl.maximum(tl.load(lengths + b), 0), most).to(tl.int32)
    return tl.full((), 0, tl.int32) + most


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
def _key_bounds(
    first, end, low, high, b, block, blocks, keys_from, keys_to, before,
    BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SEGMENTS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Where the blocks of keys of the queries first .. first + BM begin, are whole, end being whole, and end.

    end: the keys that there are. In the list of blocks with a key that some query may see, where there is one.
    """
    most = _blocks_up(end, BN)
    start, stop = tl.full((), 0, tl.int32), most
    whole_from, whole_to = tl.full((), 0, tl.int32), _blocks(end, BN)
    if LEFT:
        start = _blocks(first + low, BN)
        whole_from = _blocks_up(first + BM - 1 + low, BN)
    if RIGHT:
        stop = tl.minimum(stop, _blocks_up(first + BM + high, BN))
        whole_to = tl.minimum(whole_to, _blocks(first + high + 1, BN))
    if SEGMENTS:
        g = b * blocks + block * (BM // G)
        some_from, some_to = tl.load(keys_from + g), tl.load(keys_to + g)
        for n in tl.static_range(1, BM // G):
            inside = block * (BM // G) + n < blocks
            some_from = tl.minimum(some_from, tl.load(keys_from + g + n, mask=inside, other=2147483647))
            some_to = tl.maximum(some_to, tl.load(keys_to + g + n, mask=inside, other=0))
        start = tl.maximum(start, some_from // (BN // G))
        stop = tl.minimum(stop, (some_to + BN // G - 1) // (BN // G))
    start = tl.minimum(start, most)
    stop = _within(stop, start, most)
    whole_from = _within(whole_from, start, stop)
    whole_to = _within(whole_to, whole_from, stop)
    if LISTED:
        start, whole_from = tl.load(before + start), tl.load(before + whole_from)
        whole_to, stop = tl.load(before + whole_to), tl.load(before + stop)
    return start, whole_from, whole_to, stop


@triton.jit
def _tile(
    s, ahead, low, high, q_id, kv_id, alive, mask, bias, pairs_mask, pairs_bias, inside, factor, cap,
    BY_PLACE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SEGMENTS: tl.constexpr, ALIVE: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Products to logits (times log2(e) where BASE2), -inf where not allowed; and tanh of the softcap."""
    capped = s
    if SOFTCAP:
        capped = _tanh(s * factor, PRECISE)
        s = capped * cap
    else:
        s = s * factor
    if BIAS:
        s += tl.load(bias + pairs_bias, mask=inside, other=0.0).to(tl.float32)
    if BY_PLACE:
        if RIGHT:
            s = tl.where(ahead <= high, s, NOTHING)
        if LEFT:
            s = tl.where(ahead >= low, s, NOTHING)
    if SEGMENTS:
        s = tl.where(q_id == kv_id, s, NOTHING)
    if ALIVE:
        s = tl.where(alive, s, NOTHING)
    if MASK:
        s = tl.where(tl.load(mask + pairs_mask, mask=inside, other=0) != 0, s, NOTHING)
    return s, capped


@triton.jit
def forward(
    q, k, v, mask, bias, alive_keys, q_ids, kv_ids, q_lengths, kv_lengths, q_offset, sinks, seed, listed, before,
    keys_from, keys_to, H, I, J, qb, qh, qn, kb, kh, kn, vb, vh, vn, mb, mh, mi, mj, bb, bh, bi, bj, ab,
    offset, left, right, factor, cap, kept, out, lse, top, inverse, exact,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, G: tl.constexpr, UNIT: tl.constexpr, BNHD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    OFFSET: tl.constexpr, SEGMENTS: tl.constexpr, Q_LENGTHS: tl.constexpr, KV_LENGTHS: tl.constexpr,
    ALIVE: tl.constexpr, LISTED: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr, THRESHOLD: tl.constexpr, BASE2: tl.constexpr, POSITIVE: tl.constexpr, EVEN: tl.constexpr,
    PRECISE: tl.constexpr, WIDEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out, lse, and what the way back needs: a row's largest logit and 1 / total, or both in one (BASE2).

    EXACT: out in float32 as well, its weights not rounded, where a gradient is finer than out.
    """
    turns = tl.num_programs(0)
    block = turns - 1 - tl.program_id(0) if RIGHT else tl.program_id(0)  # the longest rows first
    n = tl.program_id(1)
    b, h = n // H, n % H
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    first = block * BM
    rows, local = first + tl.arange(0, BM), tl.arange(0, BM)
    columns = tl.arange(0, BN)
    i_end, j_end = _length(q_lengths, b, I, Q_LENGTHS), _length(kv_lengths, b, J, KV_LENGTHS)
    low, high = _reach(q_offset, b, offset, left, right, OFFSET)
    start, whole_from, whole_to, stop = _key_bounds(
        first, j_end, low, high, b, block, tl.cdiv(I, G), keys_from, keys_to, before + b * (tl.cdiv(J, BN) + 1),
        BM, BN, G, LEFT, RIGHT, SEGMENTS, LISTED,
    )  # fmt: skip
    if Q_LENGTHS:  # a block of dead rows visits nothing
        stop = tl.where(first < i_end, stop, start)
        whole_from, whole_to = tl.minimum(whole_from, stop), tl.minimum(whole_to, stop)

    q += (b64 * qb + h64 * qh + first.to(tl.int64) * qn) * UNIT
    k += (b64 * kb + (h64 // GROUP) * kh) * UNIT
    v += (b64 * vb + (h64 // GROUP) * vh) * UNIT
    alive_rows = (rows < i_end)[:, None]
    tile_q = _load(q, local[:, None], tl.arange(0, BD)[None, :], qn * UNIT, alive_rows, D, BD, False)
    if SEGMENTS:
        q_id = tl.load(q_ids + b64 * I + rows, mask=rows < I, other=0)[:, None]
    else:
        q_id = 0
    if MASK:
        mask += b64 * mb + h64 * mh + first.to(tl.int64) * mi
    if BIAS:
        bias += b64 * bb + h64 * bh + first.to(tl.int64) * bi

    m = tl.full((BM,), NOTHING, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BDV), tl.float32)
    for stage in tl.static_range(3):  # blocks cut on the left, whole blocks, blocks cut on the right
        if (stage == 1) or ((stage == 0) and LEFT) or ((stage == 2) and (RIGHT or not EVEN)):
            from_block = start if stage == 0 else (whole_from if stage == 1 else whole_to)
            to_block = whole_from if stage == 0 else (whole_to if stage == 1 else stop)
            for turn in range(from_block, to_block):
                at = turn
                if LISTED:
                    at = tl.load(listed + b * tl.cdiv(J, BN) + turn)
                begin = at * BN
                begin64 = begin.to(tl.int64)
                keys = begin + columns
                alive = keys < j_end
                if ALIVE:
                    alive &= tl.load(alive_keys + b64 * ab + keys, mask=alive, other=0) != 0
                tile_k = _load(
                    k + begin64 * kn * UNIT, columns[None, :], tl.arange(0, BD)[:, None], kn * UNIT, alive[None, :],
                    D, BD, (stage == 1) and (not ALIVE),
                )  # fmt: skip
                s = _dot(tile_q, tile_k, tl.zeros((BM, BN), tl.float32), WIDEN)
                if SEGMENTS:
                    kv_id = tl.load(kv_ids + b64 * J + keys, mask=keys < J, other=0)[None, :]
                else:
                    kv_id = 0
                if (BASE2 and POSITIVE) and (not SOFTCAP):  # the factor comes with the exponent
                    s, _ = _tile(
                        s, keys[None, :] - rows[:, None], low, high, q_id, kv_id, alive[None, :], mask + begin64 * mj,
                        bias, local[:, None] * mi + columns[None, :] * mj, 0, (rows[:, None] < I) & (keys[None, :] < J),
                        1.0, cap, stage != 1, LEFT, RIGHT, SEGMENTS, (stage != 1) or ALIVE, MASK, False, False, PRECISE,
                    )  # fmt: skip
                    new = tl.maximum(m, tl.max(s, 1) * factor)
                    shift = tl.where(new == NOTHING, 0.0, new)
                    p = tl.exp2(s * factor - shift[:, None])
                else:
                    s, _ = _tile(
                        s, keys[None, :] - rows[:, None], low, high, q_id, kv_id, alive[None, :], mask + begin64 * mj,
                        bias + begin64 * bj, local[:, None] * mi + columns[None, :] * mj,
                        local[:, None] * bi + columns[None, :] * bj, (rows[:, None] < I) & (keys[None, :] < J),
                        factor, cap, stage != 1, LEFT, RIGHT, SEGMENTS, (stage != 1) or ALIVE, MASK, BIAS, SOFTCAP,
                        PRECISE,
                    )  # fmt: skip
                    new = tl.maximum(m, tl.max(s, 1))
                    shift = tl.where(new == NOTHING, 0.0, new)
                    p = _exp(s - shift[:, None], BASE2)
                shrink = _exp(m - shift, BASE2)
                total = total * shrink + tl.sum(p, 1)
                if THRESHOLD:
                    quads = begin // 4 + tl.arange(0, BN // 4)
                    p = tl.where(_keep(seed, b, h, rows, quads, THRESHOLD, BM, BN, False), p, 0.0)
                acc = acc * shrink[:, None]
                tile_v = _load(
                    v + begin64 * vn * UNIT, columns[:, None], tl.arange(0, BDV)[None, :], vn * UNIT, alive[:, None],
                    DV, BDV, (stage == 1) and (not ALIVE),
                )  # fmt: skip
                rounded = p.to(v.dtype.element_ty)
                acc = _dot(rounded, tile_v, acc, WIDEN)
                if EXACT:  # what the rounding lost, in two more products
                    for _ in tl.static_range(2):
                        p -= rounded.to(tl.float32)
                        rounded = p.to(v.dtype.element_ty)
                        acc = _dot(rounded, tile_v, acc, WIDEN)
                m = new

    if Q_LENGTHS:
        total = tl.where(rows < i_end, total, 0.0)
        m = tl.where(rows < i_end, m, NOTHING)
    shrink = tl.full((BM,), 1.0, tl.float32)
    if SINKS:
        sink = tl.load(sinks + h).to(tl.float32)
        new = tl.maximum(m, sink)
        shift = tl.where(new == NOTHING, 0.0, new)
        shrink = tl.where(total == 0, 0.0, _exp(m - shift, BASE2))
        total = total * shrink + _exp(sink - shift, BASE2)
        m = new
    empty = total == 0
    one = 1 / tl.where(empty, 1.0, total)
    acc = acc * (shrink * one * kept)[:, None]
    if Q_LENGTHS:
        acc = tl.where((rows < i_end)[:, None], acc, 0.0)
    if BASE2:
        joined = m + tl.log2(tl.where(empty, 1.0, total))
        tl.store(top + n.to(tl.int64) * I + rows, tl.where(empty, float("inf"), joined), mask=rows < I)
        tl.store(lse + n.to(tl.int64) * I + rows, tl.where(empty, NOTHING, joined * LN2), mask=rows < I)
    else:
        joined = m + tl.log(tl.where(empty, 1.0, total))
        tl.store(top + n.to(tl.int64) * I + rows, tl.where(empty, float("inf"), m), mask=rows < I)
        tl.store(inverse + n.to(tl.int64) * I + rows, tl.where(empty, 0.0, one), mask=rows < I)
        tl.store(lse + n.to(tl.int64) * I + rows, tl.where(empty, NOTHING, joined), mask=rows < I)
    stride = H * DV if BNHD else DV
    base = (b64 * I * H + h64) * DV + first.to(tl.int64) * stride if BNHD else (n.to(tl.int64) * I + first) * DV
    places = base + local[:, None] * stride + tl.arange(0, BDV)[None, :]
    inside = (rows < I)[:, None] & (tl.arange(0, BDV) < DV)[None, :]
    tl.store(out + places, acc.to(out.dtype.element_ty), mask=inside)
    if EXACT:
        tl.store(exact + places, acc, mask=inside)


@triton.jit
def row_sums(
    out, dout, dlse, top, inverse, sinks, q_lengths, H, I, dob, doh, don, delta, partial,
    DV: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, UNIT: tl.constexpr, BNHD: tl.constexpr,
    Q_LENGTHS: tl.constexpr, LSE: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """What every logit of a row gets besides its own share: sum(out dout) - dlse; and each block's part of dsinks."""
    block, n = tl.program_id(0), tl.program_id(1)
    b, h = n // H, n % H
    first = block * BM
    rows, local, lanes = first + tl.arange(0, BM), tl.arange(0, BM)[:, None], tl.arange(0, BDV)[None, :]
    i_end = _length(q_lengths, b, I, Q_LENGTHS)
    alive = (rows < i_end)[:, None]
    stride = H * DV if BNHD else DV
    whole = n.to(tl.int64) * I
    out += (b.to(tl.int64) * I * H + h) * DV + first.to(tl.int64) * stride if BNHD else (whole + first) * DV
    dout += (b.to(tl.int64) * dob + h.to(tl.int64) * doh + first.to(tl.int64) * don) * UNIT
    x = _load(out, local, lanes, stride, alive, DV, BDV, False).to(tl.float32)
    y = _load(dout, local, lanes, don * UNIT, alive, DV, BDV, False).to(tl.float32)
    result = tl.sum(x * y, 1)
    inside = rows < I
    m = tl.load(top + n.to(tl.int64) * I + rows, mask=inside, other=float("inf"))
    if LSE:
        slope = tl.load(dlse + n.to(tl.int64) * I + rows, mask=inside, other=0.0).to(tl.float32)
        result -= tl.where(m == float("inf"), 0.0, slope)
    tl.store(delta + n.to(tl.int64) * I + rows, result, mask=inside)
    if SINKS:
        sink = tl.load(sinks + h).to(tl.float32)
        one = tl.load(inverse + n.to(tl.int64) * I + rows, mask=inside, other=0.0)
        share = tl.where(m == float("inf"), 0.0, tl.exp(sink - m) * one)
        tl.store(partial + n * tl.num_programs(0) + block, -tl.sum(share * result, 0))


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
def query_gradients(
    q, k, v, mask, bias, alive_keys, q_ids, kv_ids, q_lengths, kv_lengths, q_offset, seed, listed, before,
    keys_from, keys_to, dout, top, inverse, delta, H, I, J, qb, qh, qn, kb, kh, kn, vb, vh, vn, dob, doh, don,
    mb, mh, mi, mj, bb, bh, bi, bj, ab, offset, left, right, factor, cap, kept, scale, dq,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, G: tl.constexpr, UNIT: tl.constexpr, BNHD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    OFFSET: tl.constexpr, SEGMENTS: tl.constexpr, Q_LENGTHS: tl.constexpr, KV_LENGTHS: tl.constexpr,
    ALIVE: tl.constexpr, LISTED: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    THRESHOLD: tl.constexpr, BASE2: tl.constexpr, EVEN: tl.constexpr, PRECISE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, over the blocks of keys that the way forward visited."""
    turns = tl.num_programs(0)
    block = turns - 1 - tl.program_id(0) if RIGHT else tl.program_id(0)
    n = tl.program_id(1)
    b, h = n // H, n % H
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    first = block * BM
    rows, local, columns = first + tl.arange(0, BM), tl.arange(0, BM), tl.arange(0, BN)
    i_end, j_end = _length(q_lengths, b, I, Q_LENGTHS), _length(kv_lengths, b, J, KV_LENGTHS)
    low, high = _reach(q_offset, b, offset, left, right, OFFSET)
    start, whole_from, whole_to, stop = _key_bounds(
        first, j_end, low, high, b, block, tl.cdiv(I, G), keys_from, keys_to, before + b * (tl.cdiv(J, BN) + 1),
        BM, BN, G, LEFT, RIGHT, SEGMENTS, LISTED,
    )  # fmt: skip
    if Q_LENGTHS:
        stop = tl.where(first < i_end, stop, start)
        whole_from, whole_to = tl.minimum(whole_from, stop), tl.minimum(whole_to, stop)

    q += (b64 * qb + h64 * qh + first.to(tl.int64) * qn) * UNIT
    dout += (b64 * dob + h64 * doh + first.to(tl.int64) * don) * UNIT
    k += (b64 * kb + (h64 // GROUP) * kh) * UNIT
    v += (b64 * vb + (h64 // GROUP) * vh) * UNIT
    alive_rows = (rows < i_end)[:, None]
    tile_q = _load(q, local[:, None], tl.arange(0, BD)[None, :], qn * UNIT, alive_rows, D, BD, False)
    tile_do = _load(dout, local[:, None], tl.arange(0, BDV)[None, :], don * UNIT, alive_rows, DV, BDV, False)
    of_row = n.to(tl.int64) * I + rows
    m = tl.load(top + of_row, mask=rows < i_end, other=float("inf"))[:, None]
    slope = tl.load(delta + of_row, mask=rows < i_end, other=0.0)[:, None]
    if BASE2:
        one = slope
    else:
        one = tl.load(inverse + of_row, mask=rows < i_end, other=0.0)[:, None]
    if SEGMENTS:
        q_id = tl.load(q_ids + b64 * I + rows, mask=rows < I, other=0)[:, None]
    else:
        q_id = 0
    if MASK:
        mask += b64 * mb + h64 * mh + first.to(tl.int64) * mi
    if BIAS:
        bias += b64 * bb + h64 * bh + first.to(tl.int64) * bi

    acc = tl.zeros((BM, BD), tl.float32)
    for stage in tl.static_range(3):
        if (stage == 1) or ((stage == 0) and LEFT) or ((stage == 2) and (RIGHT or not EVEN)):
            from_block = start if stage == 0 else (whole_from if stage == 1 else whole_to)
            to_block = whole_from if stage == 0 else (whole_to if stage == 1 else stop)
            for turn in range(from_block, to_block):
                at = turn
                if LISTED:
                    at = tl.load(listed + b * tl.cdiv(J, BN) + turn)
                begin = at * BN
                begin64 = begin.to(tl.int64)
                keys = begin + columns
                alive = keys < j_end
                if ALIVE:
                    alive &= tl.load(alive_keys + b64 * ab + keys, mask=alive, other=0) != 0
                tile_k = _load(
                    k + begin64 * kn * UNIT, columns[None, :], tl.arange(0, BD)[:, None], kn * UNIT, alive[None, :],
                    D, BD, (stage == 1) and (not ALIVE),
                )  # fmt: skip
                tile_v = _load(
                    v + begin64 * vn * UNIT, columns[None, :], tl.arange(0, BDV)[:, None], vn * UNIT, alive[None, :],
                    DV, BDV, (stage == 1) and (not ALIVE),
                )  # fmt: skip
                s = _dot(tile_q, tile_k, tl.zeros((BM, BN), tl.float32), WIDEN)
                if SEGMENTS:
                    kv_id = tl.load(kv_ids + b64 * J + keys, mask=keys < J, other=0)[None, :]
                else:
                    kv_id = 0
                s, capped = _tile(
                    s, keys[None, :] - rows[:, None], low, high, q_id, kv_id, alive[None, :], mask + begin64 * mj,
                    bias + begin64 * bj, local[:, None] * mi + columns[None, :] * mj,
                    local[:, None] * bi + columns[None, :] * bj, (rows[:, None] < I) & (keys[None, :] < J),
                    factor, cap, stage != 1, LEFT, RIGHT, SEGMENTS, (stage != 1) or ALIVE, MASK, BIAS, SOFTCAP, PRECISE,
                )  # fmt: skip
                p = _exp(s - m, BASE2)
                if not BASE2:
                    p *= one
                dp = _dot(tile_do, tile_v, tl.zeros((BM, BN), tl.float32), WIDEN)
                if THRESHOLD:
                    quads = begin // 4 + tl.arange(0, BN // 4)
                    dp = tl.where(_keep(seed, b, h, rows, quads, THRESHOLD, BM, BN, False), dp * kept, 0.0)
                ds = p * (dp - slope)
                if SOFTCAP:
                    ds *= 1 - capped * capped
                acc = _dot(ds.to(k.dtype.element_ty), tl.trans(tile_k), acc, WIDEN)

    acc *= scale
    if Q_LENGTHS:
        acc = tl.where(alive_rows, acc, 0.0)
    stride = H * D if BNHD else D
    dq += (b64 * I * H + h64) * D + first.to(tl.int64) * stride if BNHD else (n.to(tl.int64) * I + first) * D
    places = local[:, None] * stride + tl.arange(0, BD)[None, :]
    tl.store(dq + places, acc.to(dq.dtype.element_ty), mask=(rows < I)[:, None] & (tl.arange(0, BD) < D)[None, :])


@triton.jit
def key_gradients(
    q, k, v, mask, bias, alive_keys, q_ids, kv_ids, q_lengths, kv_lengths, q_offset, seed, queries_from, queries_to,
    dout, top, inverse, delta, H, I, J, qb, qh, qn, kb, kh, kn, vb, vh, vn, dob, doh, don,
    mb, mh, mi, mj, bb, bh, bi, bj, ab, offset, left, right, factor, cap, kept, scale, dk, dv,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, G: tl.constexpr, UNIT: tl.constexpr, BNHD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    OFFSET: tl.constexpr, SEGMENTS: tl.constexpr, Q_LENGTHS: tl.constexpr, KV_LENGTHS: tl.constexpr,
    ALIVE: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, THRESHOLD: tl.constexpr,
    BASE2: tl.constexpr, EVEN: tl.constexpr, PRECISE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys, over the heads that read it and the blocks of queries that see it."""
    block, n = tl.program_id(0), tl.program_id(1)
    HK = H // GROUP
    b, hk = n // HK, n % HK
    b64, hk64 = b.to(tl.int64), hk.to(tl.int64)
    first = block * BN
    first64 = first.to(tl.int64)
    keys, columns, local = first + tl.arange(0, BN), tl.arange(0, BN), tl.arange(0, BM)
    i_end, j_end = _length(q_lengths, b, I, Q_LENGTHS), _length(kv_lengths, b, J, KV_LENGTHS)
    low, high = _reach(q_offset, b, offset, left, right, OFFSET)

    most = _blocks_up(i_end, BM)
    start, stop = tl.full((), 0, tl.int32), most
    whole_from, whole_to = tl.full((), 0, tl.int32), most
    if RIGHT:
        start = _blocks(first - high, BM)
        whole_from = _blocks_up(first + BN - 1 - high, BM)
    if LEFT:
        stop = tl.minimum(stop, _blocks_up(first + BN - low, BM))
        whole_to = tl.minimum(whole_to, _blocks(first - low + 1, BM))
    if SEGMENTS:
        groups = tl.cdiv(J, G)
        g = b * groups + block * (BN // G)
        some_from, some_to = tl.load(queries_from + g), tl.load(queries_to + g)
        for part in tl.static_range(1, BN // G):
            inside = block * (BN // G) + part < groups
            some_from = tl.minimum(some_from, tl.load(queries_from + g + part, mask=inside, other=2147483647))
            some_to = tl.maximum(some_to, tl.load(queries_to + g + part, mask=inside, other=0))
        start = tl.maximum(start, some_from // (BM // G))
        stop = tl.minimum(stop, (some_to + BM // G - 1) // (BM // G))
    alive = keys < j_end
    if ALIVE:
        alive &= tl.load(alive_keys + b64 * ab + keys, mask=alive, other=0) != 0
        stop = tl.where(tl.max(alive.to(tl.int32), 0) > 0, stop, 0)
    if KV_LENGTHS:
        stop = tl.where(first < j_end, stop, 0)
    start = tl.minimum(start, most)
    stop = _within(stop, start, most)
    whole_from = _within(whole_from, start, stop)
    whole_to = _within(whole_to, whole_from, stop)

    k += (b64 * kb + hk64 * kh + first64 * kn) * UNIT
    v += (b64 * vb + hk64 * vh + first64 * vn) * UNIT
    tile_k = _load(k, columns[:, None], tl.arange(0, BD)[None, :], kn * UNIT, alive[:, None], D, BD, False)
    tile_v = _load(v, columns[:, None], tl.arange(0, BDV)[None, :], vn * UNIT, alive[:, None], DV, BDV, False)
    if SEGMENTS:
        kv_id = tl.load(kv_ids + b64 * J + keys, mask=keys < J, other=0)[:, None]
    else:
        kv_id = 0

    sum_k = tl.zeros((BN, BD), tl.float32)
    sum_v = tl.zeros((BN, BDV), tl.float32)
    for member in range(GROUP):
        h = hk * GROUP + member
        h64 = h.to(tl.int64)
        base_q = q + (b64 * qb + h64 * qh) * UNIT
        base_do = dout + (b64 * dob + h64 * doh) * UNIT
        of_head = (b64 * H + h64) * I
        base_mask = mask
        base_bias = bias
        if MASK:
            base_mask += b64 * mb + h64 * mh + first64 * mj
        if BIAS:
            base_bias += b64 * bb + h64 * bh + first64 * bj
        for stage in tl.static_range(3):  # blocks cut on the right, whole blocks, blocks cut on the left
            if (stage == 1) or ((stage == 0) and RIGHT) or ((stage == 2) and LEFT):
                from_block = start if stage == 0 else (whole_from if stage == 1 else whole_to)
                to_block = whole_from if stage == 0 else (whole_to if stage == 1 else stop)
                for turn in range(from_block, to_block):
                    begin = turn * BM
                    begin64 = begin.to(tl.int64)
                    rows = begin + local
                    alive_rows = rows < i_end
                    tile_q = _load(
                        base_q + begin64 * qn * UNIT, local[None, :], tl.arange(0, BD)[:, None], qn * UNIT,
                        alive_rows[None, :], D, BD, EVEN,
                    )  # fmt: skip
                    tile_do = _load(
                        base_do + begin64 * don * UNIT, local[:, None], tl.arange(0, BDV)[None, :], don * UNIT,
                        alive_rows[:, None], DV, BDV, EVEN,
                    )  # fmt: skip
                    m = tl.load(top + of_head + rows, mask=alive_rows, other=float("inf"))[None, :]
                    slope = tl.load(delta + of_head + rows, mask=alive_rows, other=0.0)[None, :]
                    s = _dot(tile_k, tile_q, tl.zeros((BN, BM), tl.float32), WIDEN)
                    if SEGMENTS:
                        q_id = tl.load(q_ids + b64 * I + rows, mask=rows < I, other=0)[None, :]
                    else:
                        q_id = 0
                    s, capped = _tile(
                        s, keys[:, None] - rows[None, :], low, high, q_id, kv_id, alive[:, None],
                        base_mask + begin64 * mi, base_bias + begin64 * bi,
                        local[None, :] * mi + columns[:, None] * mj, local[None, :] * bi + columns[:, None] * bj,
                        (rows[None, :] < I) & (keys[:, None] < J),
                        factor, cap, stage != 1, LEFT, RIGHT, SEGMENTS, ALIVE, MASK, BIAS, SOFTCAP, PRECISE,
                    )  # fmt: skip
                    p = _exp(s - m, BASE2)
                    if not BASE2:
                        p *= tl.load(inverse + of_head + rows, mask=alive_rows, other=0.0)[None, :]
                    dp = _dot(tile_v, tl.trans(tile_do), tl.zeros((BN, BM), tl.float32), WIDEN)
                    dropped = p
                    if THRESHOLD:
                        quads = first // 4 + tl.arange(0, BN // 4)
                        keep = _keep(seed, b, h, rows, quads, THRESHOLD, BM, BN, True)
                        dropped = tl.where(keep, p, 0.0)
                        dp = tl.where(keep, dp * kept, 0.0)
                    sum_v = _dot(dropped.to(v.dtype.element_ty), tile_do, sum_v, WIDEN)
                    ds = p * (dp - slope)
                    if SOFTCAP:
                        ds *= 1 - capped * capped
                    sum_k = _dot(ds.to(k.dtype.element_ty), tl.trans(tile_q), sum_k, WIDEN)

    sum_k = tl.where(alive[:, None], sum_k * scale, 0.0)
    sum_v = tl.where(alive[:, None], sum_v * kept, 0.0)
    stride_k, stride_v = HK * D if BNHD else D, HK * DV if BNHD else DV
    dk += (b64 * J * HK + hk64) * D + first64 * stride_k if BNHD else (n.to(tl.int64) * J + first64) * D
    dv += (b64 * J * HK + hk64) * DV + first64 * stride_v if BNHD else (n.to(tl.int64) * J + first64) * DV
    lanes_k, lanes_v = tl.arange(0, BD)[None, :], tl.arange(0, BDV)[None, :]
    inside = (keys < J)[:, None]
    tl.store(dk + columns[:, None] * stride_k + lanes_k, sum_k.to(dk.dtype.element_ty), mask=inside & (lanes_k < D))
    tl.store(dv + columns[:, None] * stride_v + lanes_v, sum_v.to(dv.dtype.element_ty), mask=inside & (lanes_v < DV))


@triton.jit
def bias_gradients(
    q, k, v, mask, bias, alive_keys, q_ids, kv_ids, q_lengths, kv_lengths, q_offset, seed,
    dout, top, inverse, delta, B, H, I, J, qb, qh, qn, kb, kh, kn, vb, vh, vn, dob, doh, don,
    mb, mh, mi, mj, bb, bh, bi, bj, ab, offset, left, right, factor, cap, kept, dbias,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, UNIT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    OFFSET: tl.constexpr, SEGMENTS: tl.constexpr, Q_LENGTHS: tl.constexpr, KV_LENGTHS: tl.constexpr,
    ALIVE: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, THRESHOLD: tl.constexpr, PRECISE: tl.constexpr,
    WIDEN: tl.constexpr, ALL_B: tl.constexpr, ALL_H: tl.constexpr, ALL_I: tl.constexpr, ALL_J: tl.constexpr,
):  # fmt: skip
    """A tile of dbias: the sum over the axes along which the bias is one for all (ALL_), in one order."""
    item_head = tl.program_id(2)
    heads = 1 if ALL_H else H
    local, columns = tl.arange(0, BM), tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for item in range(B if ALL_B else 1):
        b = item if ALL_B else item_head // heads
        b64 = b.to(tl.int64)
        i_end, j_end = _length(q_lengths, b, I, Q_LENGTHS), _length(kv_lengths, b, J, KV_LENGTHS)
        low, high = _reach(q_offset, b, offset, left, right, OFFSET)
        for head in range(H if ALL_H else 1):
            h = head if ALL_H else item_head % heads
            h64 = h.to(tl.int64)
            for turn_i in range(tl.cdiv(I, BM) if ALL_I else 1):
                first_i = (turn_i if ALL_I else tl.program_id(1)) * BM
                rows = first_i + local
                i64 = first_i.to(tl.int64)
                alive_rows = (rows < i_end)[:, None]
                of_row = (b64 * H + h64) * I + rows
                m = tl.load(top + of_row, mask=rows < i_end, other=float("inf"))[:, None]
                slope = tl.load(delta + of_row, mask=rows < i_end, other=0.0)[:, None]
                one = tl.load(inverse + of_row, mask=rows < i_end, other=0.0)[:, None]
                tile_q = _load(
                    q + (b64 * qb + h64 * qh + i64 * qn) * UNIT, local[:, None], tl.arange(0, BD)[None, :], qn * UNIT,
                    alive_rows, D, BD, False,
                )  # fmt: skip
                tile_do = _load(
                    dout + (b64 * dob + h64 * doh + i64 * don) * UNIT, local[:, None], tl.arange(0, BDV)[None, :],
                    don * UNIT, alive_rows, DV, BDV, False,
                )  # fmt: skip
                if SEGMENTS:
                    q_id = tl.load(q_ids + b64 * I + rows, mask=rows < I, other=0)[:, None]
                else:
                    q_id = 0
                for turn_j in range(tl.cdiv(J, BN) if ALL_J else 1):
                    first_j = (turn_j if ALL_J else tl.program_id(0)) * BN
                    some = (first_i < i_end) & (first_j < j_end)
                    if RIGHT:
                        some &= first_j <= first_i + BM - 1 + high
                    if LEFT:
                        some &= first_j + BN - 1 >= first_i + low
                    if some:
                        keys = first_j + columns
                        j64 = first_j.to(tl.int64)
                        alive = keys < j_end
                        if ALIVE:
                            alive &= tl.load(alive_keys + b64 * ab + keys, mask=alive, other=0) != 0
                        tile_k = _load(
                            k + (b64 * kb + (h64 // GROUP) * kh + j64 * kn) * UNIT, columns[None, :],
                            tl.arange(0, BD)[:, None], kn * UNIT, alive[None, :], D, BD, False,
                        )  # fmt: skip
                        tile_v = _load(
                            v + (b64 * vb + (h64 // GROUP) * vh + j64 * vn) * UNIT, columns[None, :],
                            tl.arange(0, BDV)[:, None], vn * UNIT, alive[None, :], DV, BDV, False,
                        )  # fmt: skip
                        s = _dot(tile_q, tile_k, tl.zeros((BM, BN), tl.float32), WIDEN)
                        if SEGMENTS:
                            kv_id = tl.load(kv_ids + b64 * J + keys, mask=keys < J, other=0)[None, :]
                        else:
                            kv_id = 0
                        s, _ = _tile(
                            s, keys[None, :] - rows[:, None], low, high, q_id, kv_id, alive[None, :],
                            mask + b64 * mb + h64 * mh + i64 * mi + j64 * mj,
                            bias + b64 * bb + h64 * bh + i64 * bi + j64 * bj,
                            local[:, None] * mi + columns[None, :] * mj, local[:, None] * bi + columns[None, :] * bj,
                            (rows[:, None] < I) & (keys[None, :] < J),
                            factor, cap, True, LEFT, RIGHT, SEGMENTS, True, MASK, True, SOFTCAP, PRECISE,
                        )  # fmt: skip
                        p = tl.exp(s - m) * one
                        dp = _dot(tile_do, tile_v, tl.zeros((BM, BN), tl.float32), WIDEN)
                        if THRESHOLD:
                            quads = first_j // 4 + tl.arange(0, BN // 4)
                            keep = _keep(seed, b, h, rows, quads, THRESHOLD, BM, BN, False)
                            dp = tl.where(keep, dp * kept, 0.0)
                        acc += p * (dp - slope)

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


# What is not visited: bounds from segments, and the list of blocks that have a key at all. G rows or keys at a time.


@triton.jit
def query_ranges(q_ids, q_lengths, I, low_id, high_id, Q_LENGTHS: tl.constexpr, G: tl.constexpr):
    """The lowest and highest segment id of each G queries; none has low > high."""
    block, b = tl.program_id(0), tl.program_id(1)
    rows = block * G + tl.arange(0, G)
    inside = rows < _length(q_lengths, b, I, Q_LENGTHS)
    ids = tl.load(q_ids + b.to(tl.int64) * I + rows, mask=inside, other=0).to(tl.int64)
    place = b * tl.num_programs(0) + block
    tl.store(low_id + place, tl.min(tl.where(inside, ids, 0x7FFFFFFFFFFFFFFF), 0))
    tl.store(high_id + place, tl.max(tl.where(inside, ids, -0x7FFFFFFFFFFFFFFF), 0))


@triton.jit
def key_ranges(
    mask, q_ids, kv_ids, q_lengths, kv_lengths, q_low, q_high, I, J, mb, mj, alive_keys, live, low_id, high_id,
    MASK: tl.constexpr, SEGMENTS: tl.constexpr, SEARCH: tl.constexpr, Q_LENGTHS: tl.constexpr,
    KV_LENGTHS: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Which keys a query of the item may see, as far as key mask, length and segment say; and as `query_ranges`.

    SEARCH: a key whose segment no query has is none. The search stops when every key of the block is found.
    """
    block, b = tl.program_id(0), tl.program_id(1)
    b64 = b.to(tl.int64)
    keys = block * G + tl.arange(0, G)
    alive = keys < _length(kv_lengths, b, J, KV_LENGTHS)
    if MASK:
        alive &= tl.load(mask + b64 * mb + keys * mj, mask=alive, other=0) != 0
    place = b * tl.num_programs(0) + block
    if SEGMENTS:
        ids = tl.load(kv_ids + b64 * J + keys, mask=alive, other=0).to(tl.int64)
        low = tl.min(tl.where(alive, ids, 0x7FFFFFFFFFFFFFFF), 0)
        high = tl.max(tl.where(alive, ids, -0x7FFFFFFFFFFFFFFF), 0)
        if SEARCH:
            i_end = _length(q_lengths, b, I, Q_LENGTHS)
            blocks, turn = tl.cdiv(I, G), 0
            found = tl.zeros((G,), tl.int32)
            missing = tl.max(alive.to(tl.int32), 0)
            while (turn < blocks) & (missing > 0):
                near = (tl.load(q_low + b * blocks + turn) <= high) & (tl.load(q_high + b * blocks + turn) >= low)
                if near:
                    rows = turn * G + tl.arange(0, G)
                    others = tl.load(q_ids + b64 * I + rows, mask=rows < i_end, other=0).to(tl.int64)
                    equal = (ids[:, None] == others[None, :]) & (rows < i_end)[None, :]
                    found = tl.maximum(found, tl.max(equal.to(tl.int32), 1))
                    missing = tl.max(tl.where(alive, 1 - found, 0), 0)
                turn += 1
            alive &= found > 0
            low = tl.min(tl.where(alive, ids, 0x7FFFFFFFFFFFFFFF), 0)
            high = tl.max(tl.where(alive, ids, -0x7FFFFFFFFFFFFFFF), 0)
        tl.store(low_id + place, low)
        tl.store(high_id + place, high)
    tl.store(alive_keys + b64 * J + keys, alive.to(tl.uint8), mask=keys < J)
    tl.store(live + place, tl.max(alive.to(tl.int32), 0))


@triton.jit
def overlaps(low_id, high_id, other_low, other_high, others, first, end, BLOCK: tl.constexpr):
    """From the first to behind the last block of the others whose range of ids meets that of each block."""
    block, b = tl.program_id(0), tl.program_id(1)
    place = b * tl.num_programs(0) + block
    low, high = tl.load(low_id + place), tl.load(high_id + place)
    least, most = tl.full((BLOCK,), 2147483647, tl.int32), tl.zeros((BLOCK,), tl.int32)
    for turn in range(tl.cdiv(others, BLOCK)):
        n = turn * BLOCK + tl.arange(0, BLOCK)
        inside = n < others
        meets = tl.load(other_low + b * others + n, mask=inside, other=0x7FFFFFFFFFFFFFFF) <= high
        meets &= (tl.load(other_high + b * others + n, mask=inside, other=-0x7FFFFFFFFFFFFFFF) >= low) & inside
        least, most = tl.where(meets, tl.minimum(least, n), least), tl.where(meets, n + 1, most)
    tl.store(first + place, tl.min(least, 0))
    tl.store(end + place, tl.max(most, 0))


@triton.jit
def list_blocks(live, groups, blocks, listed, before, RATIO: tl.constexpr, BLOCK: tl.constexpr):
    """The blocks of RATIO groups that have a key, in order; and how many of them lie before each block."""
    b = tl.program_id(0)
    count = tl.full((), 0, tl.int32)
    tl.store(before + b * (blocks + 1), count)
    for turn in range(tl.cdiv(blocks, BLOCK)):
        n = turn * BLOCK + tl.arange(0, BLOCK)
        some = tl.zeros((BLOCK,), tl.int32)
        for part in tl.static_range(RATIO):
            group = n * RATIO + part
            some = tl.maximum(some, tl.load(live + b * groups + group, mask=(group < groups) & (n < blocks), other=0))
        upto = count + tl.cumsum(some, 0)
        tl.store(before + b * (blocks + 1) + 1 + n, upto, mask=n < blocks)
        tl.store(listed + b * blocks + upto - 1, n, mask=some > 0)
        count += tl.sum(some, 0)

"""Attention in Triton: one source that torch and JAX launch alike, so that both get the same bits.

Every kernel takes its inputs, then numbers, then its outputs, then what is fixed when it is compiled (in capitals).
An input that a call has not got stands for nothing: any pointer will do. Strides of q, k, v and their like by item and
head are in units of UNIT elements, so that the compiler sees that rows are aligned where they are; those by row are
fixed when it is compiled. The last axis is contiguous.

Nothing is masked twice: a whole block of keys or queries, one that is allowed by position, segment and key mask alike,
is visited without a look at any of them; one that is wholly ruled out is not visited; and keys that a whole item
excludes are read as zeros, or not at all, so that what stands there (NaN, say) reaches nothing.

What the way back takes of each row lies in arrays of P rows a head, P a multiple of every block of queries: what lies
behind the last row stands for rows that see nothing, so that it is read without a look at where the rows end.

References:
    Dao, Fu, Ermon, Rudra, Ré: FlashAttention (2022); Dao: FlashAttention-2 (2023), whose order of loops the gradients
    follow. Dao, Haziza, Massa, Sizov: Flash-Decoding (2023), for the split over keys. Tillet, Kung, Cox: Triton (2019).
    Salmon et al.: Parallel random numbers: as easy as 1, 2, 3 (2011).
"""

from __future__ import annotations

import triton
import triton.language as tl

from attend_shared.kernels import plan

FAR = tl.constexpr(plan.FAR)  # no array reaches as far
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(plan.LOG2E)
HUGE = tl.constexpr(2.0**29)
LEAST = tl.constexpr(-3.4028234663852886e38)
NOTHING = tl.constexpr(float("-inf"))
PADDED = tl.constexpr(plan.PADDED)  # P is a multiple of it
INTERPRETED = tl.constexpr(plan.INTERPRETED)


@triton.jit
def _thirds(x):
    """float32 as the sum of three of bfloat16. The first is cut, not rounded: it is infinite only where x is, and its
    product with another such overflows wherever those of the others do, to the same side. The others of an infinity are
    NaN.
    """
    return tl.inline_asm_elementwise(
        """{
            .reg .f32 a, b, c, d;
            cvt.rz.bf16x2.f32 $0, $4, $3;
            shl.b32 a, $0, 16;
            and.b32 b, $0, 0xffff0000;
            sub.f32 a, $3, a;
            sub.f32 b, $4, b;
            cvt.rn.bf16x2.f32 $1, b, a;
            shl.b32 c, $1, 16;
            and.b32 d, $1, 0xffff0000;
            sub.f32 a, a, c;
            sub.f32 b, b, d;
            cvt.rn.bf16x2.f32 $2, b, a;
        }""",
        "=&r,=&r,=r,r,r", [x], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _dot(a, b, acc, WIDEN: tl.constexpr):
    """a b + acc, products of float32 in full. WIDEN: 1: the interpreter knows no products of bfloat16; 2: those of
    float32 are put together from six of bfloat16, which leave out what is below 2^-25 of each.
    """
    if WIDEN == 1:
        a, b = a.to(tl.float32), b.to(tl.float32)
    if a.dtype == tl.float32:
        # Each block is summed apart: one chain of additions over thousands of keys would lose three bits.
        if WIDEN == 2:
            a0, a1, a2 = _thirds(a)
            b0, b1, b2 = _thirds(b)
            rest = tl.dot(a0, b2)  # the smallest first
            rest = tl.dot(a2, b0, rest)
            rest = tl.dot(a1, b1, rest)
            rest = tl.dot(a0, b1, rest)
            rest = tl.dot(a1, b0, rest)
            rest = tl.maximum(rest, LEAST / 32)  # NaN of infinities: the last product alone says what these give
            return acc + tl.dot(a0, b0, rest)
        else:  # the number means nothing here, but with one the compiler leaves the sum as it is
            return acc + tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=1)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _load(base, rows, columns, alive, D: tl.constexpr, BD: tl.constexpr, WHOLE: tl.constexpr):
    """A tile of rows, zeros where they are not alive; WHOLE: all are. One of rows and columns stands up, one lies.

    rows: where they begin.
    """
    if WHOLE:
        if D == BD:
            return tl.load(base + rows + columns)
        return tl.load(base + rows + columns, mask=columns < D, other=0.0)
    if D == BD:
        return tl.load(base + rows + columns, mask=alive, other=0.0)
    return tl.load(base + rows + columns, mask=alive & (columns < D), other=0.0)


@triton.jit
def _store(base, rows, columns, x, inside, D: tl.constexpr):
    """The opposite of `_load`."""
    tl.store(base + rows + columns, x.to(base.dtype.element_ty), mask=inside & (columns < D))


@triton.jit
def _pairs(base, rows, keys, rows_inside, keys_inside, other: tl.constexpr, WHOLE: tl.constexpr):
    """A tile of what each query has for each key. WHOLE: all its keys are there. rows, keys: where they lie."""
    if WHOLE:
        return tl.load(base + rows + keys, mask=rows_inside, other=other)
    return tl.load(base + rows + keys, mask=rows_inside & keys_inside, other=other)


@triton.jit
def _one_over(x):
    """1 / x, to 1 ulp."""
    if INTERPRETED:
        return 1 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _one_over_of_two(x):
    """1 / x, two neighbours by one reciprocal: 1 / a = b / (a b)."""
    return tl.inline_asm_elementwise(
        """{
            .reg .f32 r;
            mul.f32 r, $2, $3;
            rcp.approx.ftz.f32 r, r;
            mul.f32 $0, r, $3;
            mul.f32 $1, r, $2;
        }""",
        "=&f,=&f,f,f", [x], dtype=tl.float32, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _rest(x, factor, TOGETHER: tl.constexpr):
    """(tanh(x factor) - 1) / 2. TOGETHER: four of a row by one reciprocal, so that NaN in one is NaN in all."""
    x *= factor * 2.8853900817779268
    if INTERPRETED or not TOGETHER:
        return _one_over(-1 - tl.exp2(x))
    else:
        R: tl.constexpr = x.shape[0]
        C: tl.constexpr = x.shape[1]
        x = -1 - tl.exp2(tl.minimum(x, 31.0, propagate_nan=tl.PropagateNan.ALL))  # no product of four is infinite
        a, b = tl.split(tl.permute(tl.reshape(x, (R, C // 16, 2, 8)), (0, 1, 3, 2)))  # a thread has both
        r = _one_over_of_two(a * b)
        return tl.reshape(tl.permute(tl.join(r * b, r * a), (0, 1, 3, 2)), (R, C))


@triton.jit
def _softcap(x, factor, cap, PRECISE: tl.constexpr):
    """cap tanh(x factor), and the tanh."""
    rest = _rest(x, factor, False)
    t, capped = 1 + 2 * rest, cap + (2 * cap) * rest
    if PRECISE:  # near 0 the difference above loses what the series has
        x *= factor
        y = x * x
        series = 0.0035921280365724810 * y - 0.0088632355299021966
        series = (series * y + 0.0218694885361552029) * y - 0.0539682539682539683
        series = (series * y + 0.1333333333333333333) * y - 0.3333333333333333333
        t = tl.where(y < 0.16, x + x * y * series, t)
        capped = t * cap
    return capped, t


@triton.jit
def _exp(x, BASE2: tl.constexpr):
    return tl.exp2(x) if BASE2 else tl.exp2(x * LOG2E)  # tl.exp would look after denormal numbers as well


@triton.jit
def _unit(m):
    """In which units exponents are taken where the largest of a row is m: exp2(x unit - m unit), of which m unit is
    rounded, alike for the whole row. From HUGE on numbers are so far apart that any unit gives 0 or 1.
    """
    return tl.where(tl.abs(m) < HUGE, LOG2E, 1.0)


@triton.jit
def _times(a, M: tl.constexpr):
    """The high and the low half of a M, by one product."""
    product = a.to(tl.uint64) * tl.full((), M, tl.uint64)
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-7."""
    for _ in tl.static_range(7):
        hi0, lo0 = _times(c0, 0xD2511F53)
        hi1, lo1 = _times(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _seed(seed):
    return tl.load(seed).to(tl.uint32), tl.load(seed + 1).to(tl.uint32)


@triton.jit
def _columns(BLOCK: tl.constexpr, NEAR: tl.constexpr):
    """The keys of a block in the order of a tile's columns. NEAR: the four keys of a counter of Philox lie where tensor
    cores have them in one thread, which draws for itself then: columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of 16.
    """
    columns = tl.arange(0, BLOCK)
    if NEAR:
        columns = (columns & -15) | ((columns & 6) << 1) | ((columns & 8) >> 2)
    return columns


@triton.jit
def _drawn(seed, b, h, rows, quads, R: tl.constexpr, C: tl.constexpr, NEAR: tl.constexpr):
    """Dropout's words for a tile: four neighbouring keys have theirs drawn at once. NEAR: as in `_columns`."""
    k0, k1 = _seed(seed)
    h, b, rows, quads = h.to(tl.uint32), b.to(tl.uint32), rows.to(tl.uint32), quads.to(tl.uint32)
    w0, w1, w2, w3 = _philox(quads[None, :], rows[:, None], h, b, k0, k1)
    if NEAR:  # two pairs, not the one of the other: while it has not seen the product the compiler parts neither
        words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
        words = tl.permute(tl.reshape(words, (R, C // 16, 4, 2, 2)), (0, 1, 4, 2, 3))
    else:
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(words, (R, C))


@triton.jit
def _where_drawn(word, threshold: tl.constexpr, x):
    """x where a word is at least the threshold, else 0; in one piece, or the compiler would choose after x is rounded,
    between halves of registers, and then have to join these.
    """
    if INTERPRETED:
        return tl.where(word >= threshold, x, 0.0)
    return tl.inline_asm_elementwise(
        """{
            .reg .pred p;
            setp.ge.u32 p, $1, $2;
            selp.f32 $0, $3, 0f00000000, p;
        }""",
        "=f,r,r,f", [word, tl.full((), threshold, tl.uint32), x], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _drawn_bits(
    k0, k1, b, h, rows, quads, threshold: tl.constexpr, QUADS: tl.constexpr, PARTS: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """Which words are at least the threshold, for a tile of keys by R queries, a bit each: (PARTS, 1, R), of 4 QUADS
    keys. rows, quads: the first ones. A thread draws all that go into a number, and only such numbers are moved.
    """
    place, quad = tl.arange(0, PARTS * R)[None, :], tl.arange(0, QUADS)[:, None]
    quads, rows = (quads + place // R * QUADS + quad).to(tl.uint32), (rows + place % R).to(tl.uint32)
    w0, w1, w2, w3 = _philox(quads, rows, h.to(tl.uint32), b.to(tl.uint32), k0, k1)
    bits = tl.sum(_four_bits(w0, w1, w2, w3, threshold) << (4 * quad), 0)
    if not INTERPRETED:  # what may have effects is not done again by every thread that needs it
        bits = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [bits], dtype=tl.int32, is_pure=False, pack=1)
    return tl.reshape(bits, (PARTS, 1, R))


@triton.jit
def _four_bits(w0, w1, w2, w3, threshold: tl.constexpr):
    """Bit c: whether word c is at least the threshold."""
    if INTERPRETED:
        low = (w0 >= threshold).to(tl.int32) | ((w1 >= threshold).to(tl.int32) << 1)
        return low | ((w2 >= threshold).to(tl.int32) << 2) | ((w3 >= threshold).to(tl.int32) << 3)
    # it is where its sum with 2^32 - threshold carries; each carry makes the number longer by a bit
    return tl.inline_asm_elementwise(
        """{
            .reg .u32 n;
            add.cc.u32 n, $4, $5;
            addc.u32 $0, 0, 0;
            add.cc.u32 n, $3, $5;
            addc.u32 $0, $0, $0;
            add.cc.u32 n, $2, $5;
            addc.u32 $0, $0, $0;
            add.cc.u32 n, $1, $5;
            addc.u32 $0, $0, $0;
        }""",
        "=&r,r,r,r,r,r", [w0, w1, w2, w3, tl.full((), 2**32 - threshold, tl.uint32)], dtype=tl.int32, is_pure=True,
        pack=1,
    )  # fmt: skip


@triton.jit
def _where_bit(bits, bit, x):
    """x where the bit is set, else 0; in one piece as in `_where_drawn`."""
    if INTERPRETED:
        return tl.where((bits & bit) != 0, x, 0.0)
    return tl.inline_asm_elementwise(
        """{
            .reg .pred p;
            .reg .b32 n;
            and.b32 n, $1, $2;
            setp.ne.u32 p, n, 0;
            selp.f32 $0, $3, 0f00000000, p;
        }""",
        "=f,r,r,f", [bits, bit, x], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _bits_by_query(drawn, of_head, rows, first, P, BN: tl.constexpr):
    """What `draw` left for a tile of queries by BN keys from the first on. of_head: words before those of the head."""
    place = drawn + of_head + (first // 32).to(tl.int64) * P + rows
    bits = tl.load(place)[:, None]
    for part in tl.static_range(1, BN // 32):
        bits = tl.where(tl.arange(0, BN)[None, :] < 32 * part, bits, tl.load(place + part * P)[:, None])
    return bits


@triton.jit
def _bits_by_key(drawn, of_head, rows, first, P, BN: tl.constexpr, BM: tl.constexpr):
    """The same for BN keys by BM queries."""
    PARTS: tl.constexpr = BN // 32 if BN > 32 else 1
    place = drawn + of_head + (first // 32).to(tl.int64) * P
    bits = tl.load(place + tl.arange(0, PARTS)[:, None] * P + rows[None, :])
    bits = tl.broadcast_to(tl.reshape(bits, (PARTS, 1, BM)), (PARTS, BN // PARTS, BM))
    return tl.reshape(bits, (BN, BM))


@triton.jit
def _where_kept(bits, keys, x, NEAR: tl.constexpr):
    """x where the bit of a key is set, else 0. NEAR: as in `_columns`, so that two bits become predicates at once."""
    if NEAR:
        return _where_bit(bits >> (keys & 12), 1 << (keys & 19), x)
    return _where_bit(bits, 1 << (keys & 31), x)


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
def _keys(
    alive_keys, listed, b64, begin, columns, J, j_end, BN: tl.constexpr, G: tl.constexpr, ALIVE: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """A block of keys: which they are, which of them the item has, and where they lie, from which row on.

    PACKED: of the keys that the item has; what lies behind the last of these reads as that.
    """
    keys = begin + columns
    of_key, of_block = columns, begin.to(tl.int64)
    if PACKED:
        alive = keys < j_end
        keys = tl.load(listed + b64 * J + tl.minimum(keys, tl.maximum(j_end - 1, 0)))
        of_key, of_block = keys.to(tl.int64), tl.full((), 0, tl.int64)
    elif ALIVE:  # a bit each, of words that all threads have: a byte each would take all registers
        WORD: tl.constexpr = 32 if G > 32 else G
        place = alive_keys + b64 * tl.cdiv(J, WORD) + begin // WORD
        word = tl.load(place)
        for part in tl.static_range(1, BN // WORD):
            word = tl.where(columns < part * WORD, word, tl.load(place + part, mask=begin + part * WORD < J, other=0))
        alive = ((word >> (columns % WORD)) & 1) != 0
    else:
        alive = keys < j_end
    return keys, alive, of_key, of_block


@triton.jit
def _keys_anew(listed, b64, places, J, j_end):
    """Which packed keys stand at some places, read once more, rather than kept in registers; where there is none, what
    no position reaches, which are at most twice FAR.
    """
    return tl.load(listed + b64 * J + places, mask=places < j_end, other=2147483647)


@triton.jit
def _ids(ids, b64, n, length, EVEN: tl.constexpr, SEGMENTS: tl.constexpr):
    """Segments of queries or of keys. EVEN: there are as many as n says."""
    if SEGMENTS:
        return tl.load(ids + b64 * length + n, mask=None if EVEN else n < length)
    else:
        return n


@triton.jit
def _logits(
    s, seen, added, factor, cap, MASK: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISE: tl.constexpr,
    REST: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Products to logits (times log2(e) where BASE2), -inf where a dense mask says so; and tanh of the softcap.

    REST: logits less cap, 2 cap r, and r = (tanh - 1) / 2 instead of tanh.
    """
    capped = s
    if REST:
        capped = _rest(s, factor, TOGETHER)
        s = capped * (2 * cap)
    elif SOFTCAP:
        s, capped = _softcap(s, factor, cap, PRECISE)
    else:
        s = s * factor
    if BIAS:
        s += added.to(tl.float32)
    if MASK:
        s = tl.where(seen != 0, s, NOTHING)
    return s, capped


@triton.jit
def _is_cut(
    turn, whole_from, whole_to, stage: tl.constexpr, ONE: tl.constexpr, FRONT: tl.constexpr, BEHIND: tl.constexpr
):
    """Whether a block is to be looked at: a question only where cut ones and whole ones are visited in one loop. FRONT,
    BEHIND: whether there are such before and after whole ones.
    """
    if not ONE:
        return tl.full((), 0 if stage == 1 else 1, tl.int1)
    if FRONT and BEHIND:
        return (turn < whole_from) | (turn >= whole_to)
    if FRONT:
        return turn < whole_from
    return turn >= whole_to if BEHIND else tl.full((), 0, tl.int1)


@triton.jit
def _cut(
    x, place, least, most, q_id, kv_id, alive, other: tl.constexpr,
    LEAST: tl.constexpr, MOST: tl.constexpr, SEGMENTS: tl.constexpr, ALIVE: tl.constexpr,
):  # fmt: skip
    """x where position, segment and key say yes, else the other.

    place: of what moves along while the rest stays; with what stays it is allowed from `least` to `most`.
    """
    if MOST:
        x = tl.where(place <= most, x, other)
    if LEAST:
        x = tl.where(place >= least, x, other)
    if SEGMENTS:
        x = tl.where(q_id == kv_id, x, other)
    if ALIVE:
        x = tl.where(alive, x, other)
    return x


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
    EVEN_KEYS: tl.constexpr, PRECISE: tl.constexpr, WIDEN: tl.constexpr, EXACT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out, lse, and what the way back needs: a row's largest logit and 1 / total, or both in one (BASE2).

    EXACT: out in float32 as well, its weights not rounded, where a gradient is finer than out. SPLIT: the rows of a
    program are the queries of all heads that read the same keys; its part of these is the third axis of the grid; and
    out, lse and top are the sum of values, total and largest logit of that part, which `join` joins.
    """
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
    REST: tl.constexpr = SOFTCAP and BASE2 and not PRECISE
    i_end, j_end, low, high, start, whole_from, whole_to, stop, behind, seen_from, seen_to = _visited_keys(
        q_lengths, kv_lengths, q_offset, before, bounds, b, block, I, J, offset, left, right,
        BM, BN, G, LEFT, RIGHT, OFFSET, SEGMENTS, LISTED, PACKED, REST, Q_LENGTHS, KV_LENGTHS,
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

    LATE: tl.constexpr = REST or (BASE2 and POSITIVE and not SOFTCAP)  # the factor comes with the exponent
    late = 2 * cap if REST else factor
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
    # One loop, unless a whole block has a reciprocal for four of a row.
    ONE: tl.constexpr = FULL and CUTS and not (SPLIT or REST or PACKED)
    BEFORE: tl.constexpr = (FRONT or ALIVE or PACKED) and not (ONE or SPLIT)
    AFTER: tl.constexpr = (CUTS or SPLIT or not FULL) and not ONE
    # Loads ahead take registers, with which one more program would fit a multiprocessor. Not where masks or biases are
    # read: ptxas 12.8 then ran out of uniform registers, and took a product's address from one that it had used anew.
    FEW: tl.constexpr = ALIVE and BD <= 64 and not (PRECISE or SPLIT or MASK or BIAS)
    # Rows that lie apart come after their places: five stages read places four turns ahead and rows two, where three
    # read them two and one. Short rows gain nothing by that.
    FAR_APART: tl.constexpr = PACKED and BD == 128 and not PRECISE
    AHEAD: tl.constexpr = 1 if FEW else (5 if FAR_APART else None)
    for stage in tl.static_range(3):  # blocks that may be cut, whole blocks, and blocks that may be cut
        if (stage == 0 and BEFORE) or (stage == 1 and not SPLIT) or (stage == 2 and AFTER):
            from_block = start if (stage == 0 or ONE) else (whole_from if stage == 1 else whole_to)
            to_block = whole_from if stage == 0 else (whole_to if (stage == 1 and not ONE) else stop)
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
                    k + of_block * KN, of_key[None, :] * KN, tl.arange(0, BD)[:, None], alive[None, :],
                    D, BD, FULL or (stage == 1),
                )  # fmt: skip
                s = _dot(tile_q, tile_k, tl.zeros((BM, BN), tl.float32), WIDEN)
                s, _ = _logits(
                    s, seen, added, 1.0 if LATE and not REST else factor, 0.5 if REST else cap, MASK, BIAS, SOFTCAP,
                    PRECISE, REST, (stage == 1) and not MASK,
                )  # fmt: skip
                if _is_cut(
                    turn, seen_from, seen_to, stage, ONE or (PACKED and not (SPLIT or (REST and stage == 1))), FRONT,
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
                    new = tl.maximum(m, tl.max(s, 1) * late)
                    shift = tl.where(new == NOTHING, 0.0, new)
                    p = tl.exp2(s * late - shift[:, None])
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
                if THRESHOLD:
                    quads = at * (BN // 4) + tl.arange(0, BN // 4)
                    of_rows = heads.to(tl.int32)[:, None] if SPLIT else n % H
                    words = _drawn(seed, b, of_rows, rows, quads, BM, BN, NEAR)
                    p = _where_drawn(words, THRESHOLD, p)
                acc = acc * shrink[:, None]
                tile_v = _load(
                    v + of_block * VN, of_key[:, None] * VN, tl.arange(0, BDV)[None, :], alive[:, None],
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

    if REST:
        m += cap
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


@triton.jit
def row_sums(
    out, dout, dlse, top, inverse, sinks, q_lengths, H, I, P, dob, doh, kept, known, partial,
    DV: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, UNIT: tl.constexpr, DON: tl.constexpr, BNHD: tl.constexpr,
    Q_LENGTHS: tl.constexpr, LSE: tl.constexpr, SINKS: tl.constexpr, BASE2: tl.constexpr,
):  # fmt: skip
    """What the gradients take of each row: top; what every logit gets besides its own share, sum(out dout) - dlse,
    over what dropout multiplies by, the slope; and inverse: (P, 2, 2), top and slope before inverse and log2(inverse).
    And each block's part of dsinks.
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
    if LSE:
        slope = tl.load(dlse + whole + rows, mask=rows < I, other=0.0).to(tl.float32)
        result -= tl.where(ignored, 0.0, slope)
    if SINKS:
        tl.store(partial + n * tl.num_programs(0) + block, -tl.sum(share * result, 0))
    slope = tl.where(unseen, 0.0, result / kept)
    four = tl.join(tl.join(m, one), tl.join(slope, tl.log2(one)))  # (BM, 2, 2)
    two = tl.arange(0, 2)
    places = of_row[:, None, None] * 4 + two[None, :, None] * 2 + two[None, None, :]
    tl.store(known + places, four, mask=inside[:, None, None])


@triton.jit
def _known(known, of_row):
    """top, slope, inverse and its log2, of rows. Four are read at once: few loads give a thread what it needs."""
    two = tl.arange(0, 2)
    m_and_one, slope_and_power = tl.split(
        tl.load(known + of_row[:, None, None] * 4 + two[None, :, None] * 2 + two[None, None, :])
    )
    m, one = tl.split(m_and_one)
    slope, power = tl.split(slope_and_power)
    return m, slope, one, power


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
def _store_rows(
    base, x, b64, h64, first64, local, inside, H, I, D: tl.constexpr, BD: tl.constexpr, BNHD: tl.constexpr
):  # fmt: skip
    """A block of rows of a gradient that lies as the caller laid out its arrays."""
    stride = H * D if BNHD else D
    base += (b64 * I * H + h64) * D + first64 * stride if BNHD else ((b64 * H + h64) * I + first64) * D
    _store(base, local[:, None] * stride, tl.arange(0, BD)[None, :], x, inside[:, None], D)


@triton.jit
def draw(
    seed, q_lengths, kv_lengths, q_offset, H, I, J, P, offset, left, right, drawn,
    BM: tl.constexpr, TURN: tl.constexpr, TURNS: tl.constexpr, WORDS: tl.constexpr, THRESHOLD: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, OFFSET: tl.constexpr, Q_LENGTHS: tl.constexpr, KV_LENGTHS: tl.constexpr,
):  # fmt: skip
    """What dropout keeps, once for all that need it on the way back: (b, h, WORDS, P), a bit for each of 32 keys.
    PADDED queries by PADDED keys of which no position is allowed are left out: no block in them is visited.

    TURN: words at a time; TURNS: how often, in a program.
    """
    block, n, part = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = n // H, n % H
    first = block * BM
    corner = first - first % PADDED
    low, high = _reach(q_offset, b, offset, left, right, OFFSET)
    start, stop = part * TURN * TURNS, tl.minimum((part + 1) * TURN * TURNS, WORDS)
    EACH: tl.constexpr = PADDED // 32
    if LEFT:
        start = tl.maximum(start, _blocks(corner + low, PADDED) * EACH)
    if RIGHT:
        stop = tl.minimum(stop, _blocks_up(corner + PADDED + high, PADDED) * EACH)
    if KV_LENGTHS:
        stop = tl.minimum(stop, _blocks_up(length_of(kv_lengths, b, J, KV_LENGTHS), PADDED) * EACH)
    if Q_LENGTHS:
        stop = tl.where(corner < length_of(q_lengths, b, I, Q_LENGTHS), stop, 0)
    rows, words = tl.arange(0, BM)[None, :], tl.arange(0, TURN)[:, None]
    k0, k1 = _seed(seed)
    drawn += n.to(tl.int64) * WORDS * P + first
    for turn in range(tl.cdiv(tl.maximum(stop - start, 0), TURN)):
        word = start + turn * TURN
        bits = _drawn_bits(k0, k1, b, h, first, word * 8, THRESHOLD, 8, TURN, BM)
        tl.store(drawn + word.to(tl.int64) * P + words * P + rows, tl.reshape(bits, (TURN, BM)))


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
    PRECISE: tl.constexpr, WIDEN: tl.constexpr, DRAWN: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, over the blocks of keys that the way forward visited.

    DRAWN, here and below: in the place of the seed stands what `draw` left, WORDS for each query.
    """
    turns = tl.num_programs(0)
    block = turns - 1 - tl.program_id(0) if RIGHT else tl.program_id(0)
    n = _item_and_head(H, SHARED)
    b, h = n // H, n % H
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    first = block * BM
    first64 = first.to(tl.int64)
    NEAR: tl.constexpr = THRESHOLD > 0 and not (MASK or BIAS or PRECISE)  # drawn or not: one order of sums
    rows, local, columns = first + tl.arange(0, BM), tl.arange(0, BM), _columns(BN, NEAR)
    REST: tl.constexpr = SOFTCAP and BASE2 and not PRECISE
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
    m, slope, one, _ = _known(known, of_row)
    m, slope, one = m[:, None], slope[:, None], one[:, None]
    if REST:
        m -= cap + 2  # for 4 p; the slope of tanh is -4 (r + r^2), which needs no factor then
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
    for stage in tl.static_range(3):
        if (stage == 0 and BEFORE) or (stage == 1) or (stage == 2 and AFTER):
            from_block = start if (stage == 0 or ONE) else (whole_from if stage == 1 else whole_to)
            to_block = whole_from if stage == 0 else (whole_to if (stage == 1 and not ONE) else stop)
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
                if DRAWN:
                    bits = _bits_by_query(seed, n.to(tl.int64) * WORDS * P, rows, begin, P, BN)
                s = _dot(tile_q, tile_k, tl.zeros((BM, BN), tl.float32), WIDEN)
                if BIAS:
                    added = _pairs(
                        bias + begin64 * BJ, local[:, None] * bi * BIAS_UNIT, columns[None, :] * BJ,
                        (rows < I)[:, None], (keys < J)[None, :], 0.0, EVEN_KEYS or (stage == 1),
                    )  # fmt: skip
                else:
                    added = 0.0
                s, capped = _logits(
                    s, seen, added, 1.0 if LATE else factor, cap, MASK, BIAS, SOFTCAP, PRECISE, REST,
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
                    dp = _where_kept(bits, (columns if BN >= 32 else begin + columns)[None, :], dp, NEAR)
                elif THRESHOLD:
                    quads = at * (BN // 4) + tl.arange(0, BN // 4)
                    dp = _where_drawn(_drawn(seed, b, h, rows, quads, BM, BN, NEAR), THRESHOLD, dp)
                ds = p * (dp - slope)
                if REST:
                    ds *= capped + capped * capped
                elif SOFTCAP:
                    ds *= 1 - capped * capped
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
    EVEN: tl.constexpr, EVEN_KEYS: tl.constexpr, PRECISE: tl.constexpr, WIDEN: tl.constexpr, ITEMS: tl.constexpr,
    EIGHT: tl.constexpr,
):  # fmt: skip
    """dq and dbias of a block of queries, for the ITEMS that have one bias: its tile is read and its gradient written
    once for all of them, and dq has the bits that query_gradients gives it.
    """
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
            s, capped = _logits(s, seen, added, factor, cap, MASK, True, SOFTCAP, PRECISE, False, False)
            s = _cut(
                s, keys[None, :], rows[:, None] + low, rows[:, None] + high, 0, 0, alive[None, :], NOTHING, LEFT, RIGHT,
                False, ALIVE or not EVEN,
            )  # fmt: skip
            m, slope, one, _ = _known(known, (b64 * H + h64) * P + rows)
            p = _exp(s - m[:, None], False)
            dp = _dot(tiles_do[item], tile_v, tl.zeros((BM, BN), tl.float32), WIDEN)
            if THRESHOLD:
                quads = begin // 4 + tl.arange(0, BN // 4)
                dp = _where_drawn(_drawn(seed, b, h, rows, quads, BM, BN, False), THRESHOLD, dp)
            ds = p * (dp - slope[:, None])
            tile += ds * one[:, None]
            if SOFTCAP:
                ds *= 1 - capped * capped
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
    bounds, dout, known, H, I, J, P, qb, qh, kb, kh, vb, vh, dob, doh,
    mb, mh, mi, bb, bh, bi, offset, left, right, factor, cap, kept, scale, dk, dv,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, G: tl.constexpr, UNIT: tl.constexpr, QN: tl.constexpr, KN: tl.constexpr, VN: tl.constexpr,
    DON: tl.constexpr, MASK_UNIT: tl.constexpr, MJ: tl.constexpr, BIAS_UNIT: tl.constexpr, BJ: tl.constexpr,
    BNHD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    OFFSET: tl.constexpr, SEGMENTS: tl.constexpr, Q_LENGTHS: tl.constexpr, KV_LENGTHS: tl.constexpr,
    ALIVE: tl.constexpr, PACKED: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, SHARED: tl.constexpr,
    SOFTCAP: tl.constexpr, THRESHOLD: tl.constexpr, BASE2: tl.constexpr, POSITIVE: tl.constexpr, EVEN: tl.constexpr,
    EVEN_KEYS: tl.constexpr, PRECISE: tl.constexpr, WIDEN: tl.constexpr, DRAWN: tl.constexpr, WORDS: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys, over the heads that read it and the blocks of queries that see it.

    KEYS, VALUES: whether dk and dv are made: where rows are long the sums of both fill more registers than there are.
    """
    block, HK = tl.program_id(0), H // GROUP
    n = _item_and_head(HK, SHARED)
    b, hk = n // HK, n % HK
    b64, hk64 = b.to(tl.int64), hk.to(tl.int64)
    first = block * BN
    first64 = first.to(tl.int64)
    columns, local = tl.arange(0, BN), tl.arange(0, BM)
    i_end, j_end = length_of(q_lengths, b, I, Q_LENGTHS), _ends(kv_lengths, before, b, J, PACKED, KV_LENGTHS)
    low, high = _reach(q_offset, b, offset, left, right, OFFSET)
    keys, alive, of_key, of_block = _keys(
        alive_keys, listed, b64, first, columns, J, j_end, BN, G, ALIVE, PACKED
    )
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
    REST: tl.constexpr = SOFTCAP and BASE2 and not PRECISE
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
                        base_q + begin64 * QN, local[None, :] * QN, tl.arange(0, BD)[:, None],
                        alive_rows[None, :], D, BD, EVEN,
                    )  # fmt: skip
                    tile_do = _load(
                        base_do + begin64 * DON, local[:, None] * DON, tl.arange(0, BDV)[None, :],
                        alive_rows[:, None], DV, BDV, EVEN,
                    )  # fmt: skip
                    m, slope, one, power = _known(known, of_head + rows)
                    if DRAWN:
                        bits = _bits_by_key(seed, of_head * WORDS, rows, first, P, BN, BM)
                    s = _dot(tile_k, tile_q, tl.zeros((BN, BM), tl.float32), WIDEN)
                    s, capped = _logits(
                        s, seen, added, 1.0 if LATE else factor, cap, MASK, BIAS, SOFTCAP, PRECISE, REST, False
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
                        p = tl.exp2((s - m[None, :]) * LOG2E + power[None, :])
                    if KEYS:
                        dp = _dot(tile_v, tl.trans(tile_do), tl.zeros((BN, BM), tl.float32), WIDEN)
                    dropped = p
                    if DRAWN:
                        dropped = _where_kept(bits, (columns if BN >= 32 else first + columns)[:, None], p, False)
                    elif THRESHOLD:
                        k0, k1 = _seed(seed)
                        bits = _drawn_bits(k0, k1, b, h, begin, first // 4, THRESHOLD, QUADS, BN // (4 * QUADS), BM)
                        bits = tl.reshape(tl.broadcast_to(bits, (BN // (4 * QUADS), 4 * QUADS, BM)), (BN, BM))
                        dropped = _where_bit(bits, (1 << (columns % (4 * QUADS)))[:, None], p)
                    if VALUES:
                        sum_v = _dot(dropped.to(v.dtype.element_ty), tile_do, sum_v, WIDEN)
                    if KEYS:
                        if THRESHOLD:  # p (dp - slope), dp being dropped as p is
                            ds = dropped * dp - p * slope[None, :]
                        else:
                            ds = p * (dp - slope[None, :])
                        if REST:
                            ds *= capped + capped * capped
                        elif SOFTCAP:
                            ds *= 1 - capped * capped
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
    EVEN_KEYS: tl.constexpr, PRECISE: tl.constexpr, WIDEN: tl.constexpr, DRAWN: tl.constexpr, WORDS: tl.constexpr,
    ALL_B: tl.constexpr, ALL_H: tl.constexpr, ALL_I: tl.constexpr, ALL_J: tl.constexpr,
):  # fmt: skip
    """A tile of dbias: the sum over the axes along which the bias is one for all (ALL_), in one order."""
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
        s, _ = _logits(s, seen, added, factor, cap, MASK, True, SOFTCAP, PRECISE, False, False)
        s = _cut(
            s, keys[None, :], rows[:, None] + low, rows[:, None] + high, q_id[:, None], kv_id[None, :], alive[None, :],
            NOTHING, LEFT, RIGHT, SEGMENTS, True,
        )  # fmt: skip
        m, slope, one, _ = _known(known, of_row)
        p = _exp(s - m[:, None], False) * one[:, None]
        dp = _dot(tile_do, tile_v, tl.zeros((BM, BN), tl.float32), WIDEN)
        if DRAWN:
            bits = _bits_by_query(seed, (b64 * H + h64) * WORDS * P, rows, first_j, P, BN)
            dp = _where_kept(bits, (columns if BN >= 32 else first_j + columns)[None, :], dp, False)
        elif THRESHOLD:
            quads = first_j // 4 + tl.arange(0, BN // 4)
            dp = _where_drawn(_drawn(seed, b, h, rows, quads, BM, BN, False), THRESHOLD, dp)
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

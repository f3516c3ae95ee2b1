"""What dropout keeps: drawn where it is needed, or once for all that need it.

References:
    Salmon et al.: Parallel random numbers: as easy as 1, 2, 3 (2011).
"""

from __future__ import annotations

import triton
import triton.language as tl

from attend_shared.kernels.tiles import INTERPRETED
from attend_shared.kernels.visits import PADDED, _blocks, _blocks_up, _reach, length_of, told


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
def _drop(
    x, seed, b, h, rows, first_quad, THRESHOLD: tl.constexpr, R: tl.constexpr, C: tl.constexpr, NEAR: tl.constexpr
):  # fmt: skip
    """x where dropout keeps a query's key, else 0, for a tile of R queries by C keys. Four neighbouring keys have their
    words drawn at once. NEAR: as in `_columns`.
    """
    quads = first_quad + tl.arange(0, C // 4)
    k0, k1 = _seed(seed)
    h, b, rows, quads = h.to(tl.uint32), b.to(tl.uint32), rows.to(tl.uint32), quads.to(tl.uint32)
    w0, w1, w2, w3 = _philox(quads[None, :], rows[:, None], h, b, k0, k1)
    if NEAR:  # two pairs, not the one of the other: while it has not seen the product the compiler parts neither
        words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
        words = tl.permute(tl.reshape(words, (R, C // 16, 4, 2, 2)), (0, 1, 4, 2, 3))
    else:
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return _where_drawn(tl.reshape(words, (R, C)), THRESHOLD, x)


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
def _where_kept(bits, first, columns, x, BN: tl.constexpr, NEAR: tl.constexpr):
    """x where the bit of a key is set, else 0, for the BN keys from the first on. NEAR: as in `_columns`, so that two
    bits become predicates at once.
    """
    keys = columns if BN >= 32 else first + columns  # a block of whole words begins where one does
    if NEAR:
        return _where_bit(bits >> (keys & 12), 1 << (keys & 19), x)
    return _where_bit(bits, 1 << (keys & 31), x)


@triton.jit
def draw(
    seed, q_lengths, kv_lengths, q_offset, H, I, J, P, offset, left, right, drawn,
    BM: tl.constexpr, TURN: tl.constexpr, TURNS: tl.constexpr, WORDS: tl.constexpr, THRESHOLD: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, OFFSET: tl.constexpr, Q_LENGTHS: tl.constexpr, KV_LENGTHS: tl.constexpr,
):  # fmt: skip
    """What dropout keeps, once for all that need it: (b, h, WORDS, P), a bit for each of 32 keys.
    PADDED queries by PADDED keys of which no position is allowed are left out: no block in them is visited.

    TURN: words at a time; TURNS: how often, in a program.
    """
    P = told(P, PADDED)
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

"""What a turn of a loop of `attention` and `gradients` is made of: loads, products, logits, and what is cut of them."""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from attend_shared.kernels import launch, sizes

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(launch.LOG2E)
LEAST = tl.constexpr(-3.4028234663852886e38)
NOTHING = tl.constexpr(float("-inf"))
INTERPRETED = tl.constexpr(sizes.INTERPRETED)


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
def _along(rows, N: tl.constexpr, STRIDE: tl.constexpr, ALL: tl.constexpr):
    """Where rows begin. ALL: they are 0 to N - 1, and those that a thread has lie at one address and constant offsets.

    Of a number that is compared elsewhere LLVM takes no constant out: each row then has an address of its own, which is
    kept in registers and made anew in each turn.
    """
    if not ALL:
        return rows * STRIDE
    else:
        starts = tl.arange(0, N // 8)[:, None] * (8 * STRIDE) + tl.arange(0, 8)[None, :] * STRIDE
        return tl.multiple_of(tl.reshape(starts, (N,)), (STRIDE & -STRIDE if STRIDE else 1,))


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
    """cap tanh(x factor), and the tanh: to an ulp of 1, or PRECISE, of itself."""
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


# Up to |x| = SMALL tanh(x) is x times a polynomial of x^2, to 1.4e-7 of itself in float32: here of w = 2 x / SMALL, for
# then one bit of w says which it is.
SMALL = 0.5
OF_X, OF_W = tl.constexpr(2 / SMALL), tl.constexpr(SMALL * launch.LOG2E)  # w / x; log2(exp(2 x)) / w
TANH0, TANH1, TANH2 = tl.constexpr(0.25), tl.constexpr(-0.005208292), tl.constexpr(0.0001301248)
TANH3, TANH4 = tl.constexpr(-3.2340133e-6), tl.constexpr(6.5364858e-8)


def _made_anew(n: int) -> str:
    """PTX for n neighbours: by tanh(x), of what the polynomial says, the bits of w, by and -2 by.

    Whether more is done than to look hangs on the neighbours, but |w| < 2 alone says which of the two an x gets. The
    highest bit of an exponent is set from 2 on, and in NaN.
    """
    bits = [f"${2 * n + k}" for k in range(n)]
    larger = "".join(
        f"""
        mov.b32 w, {bits[k]};
        mul.f32 e, w, 0f{struct.pack(">f", OF_W.value).hex()};
        ex2.approx.ftz.f32 e, e;
        add.f32 e, e, 0f3F800000;
        rcp.approx.ftz.f32 e, e;
        fma.rn.f32 e, e, ${4 * n}, ${3 * n};
        abs.f32 w, w;
        setp.lt.f32 small, w, 0f40000000;
        selp.f32 ${k}, ${k}, e, small;"""
        for k in range(n)
    )
    return f"""{{
        .reg .pred any, small;
        .reg .b32 all;
        .reg .f32 w, e;
        {" ".join(f"mov.f32 ${k}, ${n + k};" for k in range(n))}
        mov.b32 all, {bits[0]};
        {" ".join(f"or.b32 all, all, {x};" for x in bits[1:])}
        and.b32 all, all, 0x40000000;
        setp.ne.b32 any, all, 0;
        @!any bra DONE;
        {larger}
        DONE:
    }}"""


PACK = tl.constexpr(16)  # a branch for so many
MADE_ANEW = tl.constexpr(_made_anew(PACK.value))
GIVEN = tl.constexpr(",".join(x for x in ("=&f", "f", "r", "f", "f") for _ in range(PACK.value)))


@triton.jit
def _tanh(x, factor, by):
    """by tanh(x factor). Of what is small, as most of a softcap is, to some ulp, without the special function unit."""
    w = x * (factor * OF_X)
    y = w * w
    t = (((TANH4 * by * y + TANH3 * by) * y + TANH2 * by) * y + TANH1 * by) * y + TANH0 * by
    t *= w
    if INTERPRETED:
        return tl.where(tl.abs(w) < 2, t, by - 2 * by / (1 + tl.exp2(w * OF_W)))
    bits = w.to(tl.int32, bitcast=True)
    return tl.inline_asm_elementwise(
        MADE_ANEW, GIVEN, [t, bits, by, -2 * by], dtype=tl.float32, is_pure=True, pack=PACK
    )


@triton.jit
def _exp(x, BASE2: tl.constexpr):
    return tl.exp2(x) if BASE2 else tl.exp2(x * LOG2E)  # tl.exp would look after denormal numbers as well


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
    s, seen, added, factor, cap, MASK: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, REST: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """Products to logits (times log2(e) where BASE2), -inf where a dense mask says so; and tanh of the softcap.

    SOFTCAP: 2: where an ulp of cap is too much. REST: logits less cap, 2 cap r, and r = (tanh - 1) / 2 instead of tanh.
    """
    capped = s
    if REST:
        capped = _rest(s, factor, TOGETHER)
        s = capped * (2 * cap)
    elif SOFTCAP:
        s, capped = _softcap(s, factor, cap, SOFTCAP == 2)
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

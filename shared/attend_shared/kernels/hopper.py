"""Plain attention forward on compute capability 9.0, in Gluon: the same for torch and JAX.

Two groups of four warps have 64 queries each and share the keys and values that a third group loads. Each starts the
product of the next block of keys and the sum of values of this one at once, and makes the exponentials of the next
while the sum of values runs. Triton's own compiler waits for every product where it stands. All rows come by tensor
descriptors, which are made on the host: one thread asks for a block, and the chip moves it. A program goes over tiles
of several heads, and loads for the next while the last one's results are stored.

Blocks of keys that position cuts are the first and the last of a row, and looked at key by key; those between are not
(as in `attention`).

References:
    Shah, Bikshandi, Zhang, Thakkar, Ramani, Dao: FlashAttention-3 (2024), whose roles of warps and order these are.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from attend_shared.kernels.visits import _blocks, _blocks_up, _clip

LN2 = gl.constexpr(0.6931471805599453)
NOTHING = gl.constexpr(float("-inf"))
ROWS = gl.constexpr(64)  # of a group of warps
HIGHEST = gl.constexpr(100.0)  # exponent of a weight under a softcap: so heavy, 4096 values of 30000 fit in float32


def block_layout(block: tuple[int, ...], dtype: str = "bfloat16") -> gl.NVMMASharedLayout:
    """How a block that a descriptor loads lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(list(block), getattr(gl, dtype))


@gluon.jit
def _tile(k, N, J, low, high, BN: gl.constexpr, EACH: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """The k-th tile of a program: its item and head in one number, its first query, where the blocks of keys begin, are
    whole, end being whole, and end. One block at least, which is looked at.

    A program has EACH heads, and goes over the queries of every second from the other end: so it has as many blocks as
    others where a row has the more the further down it is.
    """
    turns = gl.num_programs(0)
    n = gl.minimum(gl.program_id(1) * EACH + k, N - 1)
    block = gl.program_id(0)
    if RIGHT:  # the longest rows first
        block = gl.where(k % 2 == 0, turns - 1 - block, block)
    first = block * (2 * ROWS)
    most = J // BN
    start, whole_from, whole_to, stop = J * 0, J * 0, most, most
    if LEFT:
        start = _blocks(first + low, BN)
        whole_from = _blocks_up(first + 2 * ROWS - 1 + low, BN)
    if RIGHT:
        stop = gl.minimum(stop, _blocks_up(first + 2 * ROWS + high, BN))
        whole_to = gl.minimum(whole_to, _blocks(first + high + 1, BN))
    start, whole_from, whole_to, stop = _clip(start, whole_from, whole_to, stop, most)
    start = gl.minimum(start, most - 1)
    stop = gl.maximum(stop, start + 1)
    whole_from = gl.minimum(gl.maximum(whole_from, start), stop)
    whole_to = gl.minimum(gl.maximum(whole_to, whole_from), stop)
    return n, first, start, whole_from, whole_to, stop


@gluon.jit
def _heads(N, EACH: gl.constexpr):
    """How many heads a program has."""
    return gl.minimum(EACH, N - gl.program_id(1) * EACH) if EACH > 1 else 1


@gluon.jit
def _fetch(array, item, head, first, place, loaded, COUNT: gl.constexpr):
    """Begin to load a block."""
    mbarrier.expect(loaded, COUNT * 2)
    tma.async_copy_global_to_shared(array, [item, head, first, 0], loaded, place)


@gluon.jit
def _load(
    q, k, v, N, H, J, low, high, queries_of, keys_of, values_of, bars,
    GROUP: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, EACH: gl.constexpr,
    QB: gl.constexpr, QH: gl.constexpr, KB: gl.constexpr, KH: gl.constexpr, VB: gl.constexpr, VH: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, STAGES_K: gl.constexpr, STAGES_V: gl.constexpr,
):  # fmt: skip
    """Queries, and block after block of keys and of values, each into the oldest place that is done with."""
    OF_V: gl.constexpr = 2 * STAGES_K
    OF_Q: gl.constexpr = OF_V + 2 * STAGES_V
    count = 0
    for n in range(_heads(N, EACH)):
        head, first, start, _, _, stop = _tile(n, N, J, low, high, BN, EACH, LEFT, RIGHT)
        b, h = head // H, head % H
        hk = h // GROUP
        place = n % 2
        mbarrier.wait(bars.index(OF_Q + 2 + place), (n // 2) & 1 ^ 1)
        for group in gl.static_range(2):
            _fetch(q, b * QB, h * QH, first + group * ROWS, queries_of.index(place * 2 + group),
                   bars.index(OF_Q + place), ROWS * D)  # fmt: skip
        for turn in range(start, stop):
            at = count % STAGES_K
            mbarrier.wait(bars.index(STAGES_K + at), (count // STAGES_K) & 1 ^ 1)
            _fetch(k, b * KB, hk * KH, turn * BN, keys_of.index(at), bars.index(at), BN * D)
            at = count % STAGES_V
            mbarrier.wait(bars.index(OF_V + STAGES_V + at), (count // STAGES_V) & 1 ^ 1)
            _fetch(v, b * VB, hk * VH, turn * BN, values_of.index(at), bars.index(OF_V + at), BN * D)
            count += 1


@gluon.jit
def _tanh(s, inner):
    """tanh(s inner), off by 2^-11 of itself at most: one operation of the special function unit."""
    return gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [s * inner], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _masked(s, begin, least, most, LOGITS: gl.constexpr, BN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """Products, -inf where position says so.

    Of a key's place in its block, the bits by which the lanes of a warp differ are moved to the other side: what stays
    is a number that is known when this is compiled.
    """
    columns = gl.arange(0, BN, gl.SliceLayout(0, LOGITS))[None, :]
    of_lane, place = begin + (columns & 6), columns & -7
    if RIGHT:
        s = gl.where(place <= most[:, None] - of_lane, s, NOTHING)
    if LEFT:
        s = gl.where(place >= least[:, None] - of_lane, s, NOTHING)
    return s


@gluon.jit
def _weights(s, m, total, factor, SOFTCAP: gl.constexpr, SUMS: gl.constexpr, dtype: gl.constexpr):
    """Products to weights, not yet over their total; what the sums so far shrink by; largest logit and total.

    SOFTCAP bounds logits, and so weights, whatever they are over: m stays as it is.
    """
    if SOFTCAP:
        shift, shrink = m, gl.full_like(m, 1.0)
    else:
        before, m = m, gl.maximum(m, gl.max(s, 1) * factor)
        shift = gl.where(m == NOTHING, 0.0, m)
        shrink = gl.exp2(before - shift)
    p = gl.exp2(s * factor - shift[:, None])
    total = total * shrink + gl.sum(p, 1)
    p = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, SUMS, 2))
    return p, gl.convert_layout(shrink, gl.SliceLayout(1, SUMS)), m, total


@gluon.jit
def _turn(
    count, begin, queries, keys_of, values_of, spare, bars, acc, p, m, total, least, most, inner,
    factor, LOGITS: gl.constexpr, SUMS: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, CUT: gl.constexpr,
    SOFTCAP: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, STAGES_K: gl.constexpr, STAGES_V: gl.constexpr,
):  # fmt: skip
    """The sum of values of the block with this count, and the weights of the next, which begins at a key."""
    ahead = count + 1
    at_k, at_v = ahead % STAGES_K, count % STAGES_V
    mbarrier.wait(bars.index(at_k), (ahead // STAGES_K) & 1)
    zeros = gl.zeros((ROWS, BN), gl.float32, LOGITS)
    block = keys_of.index(at_k).reshape((BN, D)).permute((1, 0))
    s = warpgroup_mma(queries, block, zeros, use_acc=False, is_async=True)
    mbarrier.wait(bars.index(2 * STAGES_K + at_v), (count // STAGES_V) & 1)
    acc = warpgroup_mma(p, values_of.index(at_v).reshape((BN, D)), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(bars.index(STAGES_K + at_k), count=1)
    if SOFTCAP:
        s = _tanh(s, inner)
    if CUT:
        s = _masked(s, begin, least, most, LOGITS, BN, LEFT, RIGHT)
    later, shrink, m, total = _weights(s, m, total, factor, SOFTCAP, SUMS, p.dtype)
    # ptxas would wait for the sum of values before the exponentials; past a barrier with a store before it, it can't.
    spare.store(total)
    gl.thread_barrier()
    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    mbarrier.arrive(bars.index(2 * STAGES_K + STAGES_V + at_v), count=1)
    return acc * shrink[:, None], later, m, total


@gluon.jit
def _attend(
    WHICH: gl.constexpr, queries_of, keys_of, values_of, spares, bars, N, H, I, J, P, low, high, inner, factor,
    out, lse, top, D: gl.constexpr, BN: gl.constexpr, EACH: gl.constexpr, BNHD: gl.constexpr, SOFTCAP: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, STAGES_K: gl.constexpr, STAGES_V: gl.constexpr,
):  # fmt: skip
    """out, lse and top of 64 queries of each tile."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OF_V: gl.constexpr = 2 * STAGES_K
    OF_Q: gl.constexpr = OF_V + 2 * STAGES_V
    dtype: gl.constexpr = out.dtype.element_ty
    spare = spares.index(WHICH)
    count = 0  # of blocks so far
    heads = _heads(N, EACH)
    for tile in range(heads):
        # Not kept from turn to turn: Triton 3.6 takes two such numbers for what they were before the loop.
        n, first, start, whole_from, whole_to, stop = _tile(tile, N, J, low, high, BN, EACH, LEFT, RIGHT)
        b, head = n // H, n % H
        first += WHICH * ROWS
        rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, LOGITS))
        least, most = rows + low, rows + high
        m = gl.full((ROWS,), NOTHING, gl.float32, gl.SliceLayout(1, LOGITS))
        total = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, LOGITS))
        acc = gl.zeros((ROWS, D), gl.float32, SUMS)
        queries = queries_of.index(tile % 2 * 2 + WHICH).reshape((ROWS, D))
        mbarrier.wait(bars.index(OF_Q + tile % 2), (tile // 2) & 1)
        at = count % STAGES_K
        mbarrier.wait(bars.index(at), (count // STAGES_K) & 1)
        zeros = gl.zeros((ROWS, BN), gl.float32, LOGITS)
        s = warpgroup_mma(queries, keys_of.index(at).reshape((BN, D)).permute((1, 0)), zeros, use_acc=False)
        mbarrier.arrive(bars.index(STAGES_K + at), count=1)
        if SOFTCAP:
            s = _tanh(s, inner)
        s = _masked(s, start * BN, least, most, LOGITS, BN, LEFT, RIGHT)
        if SOFTCAP:  # so that the weight of a row's only key is 1
            m = gl.maximum(gl.max(s, 1) * factor, factor - HIGHEST)
        p, _, m, total = _weights(s, m, total, factor, SOFTCAP, SUMS, dtype)
        behind = count - start
        if LEFT:
            for turn in range(start, whole_from - 1):
                acc, p, m, total = _turn(
                    turn + behind, (turn + 1) * BN, queries, keys_of, values_of, spare, bars, acc, p, m, total, least,
                    most, inner, factor, LOGITS, SUMS, D, BN, True, SOFTCAP, LEFT, RIGHT, STAGES_K, STAGES_V,
                )  # fmt: skip
        for turn in range(gl.maximum(whole_from - 1, start), whole_to - 1):
            acc, p, m, total = _turn(
                turn + behind, (turn + 1) * BN, queries, keys_of, values_of, spare, bars, acc, p, m, total, least, most,
                inner, factor, LOGITS, SUMS, D, BN, False, SOFTCAP, LEFT, RIGHT, STAGES_K, STAGES_V,
            )  # fmt: skip
        if RIGHT:
            for turn in range(gl.maximum(whole_to - 1, start), stop - 1):
                acc, p, m, total = _turn(
                    turn + behind, (turn + 1) * BN, queries, keys_of, values_of, spare, bars, acc, p, m, total, least,
                    most, inner, factor, LOGITS, SUMS, D, BN, True, SOFTCAP, LEFT, RIGHT, STAGES_K, STAGES_V,
                )  # fmt: skip
        count += stop - start
        mbarrier.arrive(bars.index(OF_Q + 2 + tile % 2), count=1)
        at = (count - 1) % STAGES_V
        mbarrier.wait(bars.index(OF_V + at), ((count - 1) // STAGES_V) & 1)
        acc = warpgroup_mma(p, values_of.index(at).reshape((BN, D)), acc)
        mbarrier.arrive(bars.index(OF_V + STAGES_V + at), count=1)

        inside = rows < I
        empty = total == 0
        total = gl.where(empty, 1.0, total)
        shrink = gl.convert_layout(1 / total, gl.SliceLayout(1, SUMS))
        seen = m + gl.log2(total)
        if LEFT or RIGHT:
            acc = gl.where(gl.convert_layout(empty, gl.SliceLayout(1, SUMS))[:, None], 0.0, acc)
        # rows behind the last see nothing
        gl.store(top + n.to(gl.int64) * P + rows, gl.where(empty | (rows >= I), float("inf"), seen))
        gl.store(lse + n.to(gl.int64) * I + rows, gl.where(empty, NOTHING, seen * LN2), mask=inside)
        places = first + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
        if BNHD:
            starts = ((b.to(gl.int64) * I + places) * H + head) * D
        else:
            starts = (n.to(gl.int64) * I + places) * D
        lanes = gl.arange(0, D, gl.SliceLayout(0, SUMS))[None, :]
        gl.store(out + starts[:, None] + lanes, (acc * shrink[:, None]).to(dtype), mask=(places < I)[:, None])


@gluon.jit
def plain(
    q, k, v, N, H, I, J, P, low, high, inner, factor, out, lse, top, inverse, exact,
    GROUP: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, EACH: gl.constexpr,
    QB: gl.constexpr, QH: gl.constexpr, KB: gl.constexpr, KH: gl.constexpr, VB: gl.constexpr, VH: gl.constexpr,
    BNHD: gl.constexpr, SOFTCAP: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    STAGES_K: gl.constexpr, STAGES_V: gl.constexpr,
):  # fmt: skip
    """out, lse and top, as `attention.forward` makes them (inverse and exact stay unwritten); J a multiple of BN.

    q, k, v: descriptors of (b, h or hk, I or J, D), which load a block of one head.
    QB, QH, KB, KH, VB, VH: 1, or 0 where all items or heads have the same.
    N: items times heads. EACH: heads of a program.
    inner, factor: SOFTCAP: logits in base 2 are factor * tanh(q . k * inner); else factor * q . k.
    LEFT, RIGHT: key j is seen by query t where low <= j - t, and j - t <= high.
    """
    keys_of = gl.allocate_shared_memory(k.dtype, [STAGES_K, 1, 1, BN, D], k.layout)
    values_of = gl.allocate_shared_memory(v.dtype, [STAGES_V, 1, 1, BN, D], v.layout)
    queries_of = gl.allocate_shared_memory(q.dtype, [4, 1, 1, ROWS, D], q.layout)  # of two tiles
    spares = gl.allocate_shared_memory(gl.float32, [2, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # of keys: loaded, done with; of values; of queries
    bars = gl.allocate_shared_memory(gl.int64, [2 * (STAGES_K + STAGES_V) + 4, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES_K):
        mbarrier.init(bars.index(stage), count=1)
        mbarrier.init(bars.index(STAGES_K + stage), count=2)
    for stage in gl.static_range(STAGES_V):
        mbarrier.init(bars.index(2 * STAGES_K + stage), count=1)
        mbarrier.init(bars.index(2 * STAGES_K + STAGES_V + stage), count=2)
    OF_Q: gl.constexpr = 2 * (STAGES_K + STAGES_V)
    for stage in gl.static_range(2):
        mbarrier.init(bars.index(OF_Q + stage), count=2)
        mbarrier.init(bars.index(OF_Q + 2 + stage), count=2)
    gl.warp_specialize(
        [
            (_attend, (
                gl.constexpr(0), queries_of, keys_of, values_of, spares, bars, N, H, I, J, P, low, high, inner,
                factor, out, lse, top, D, BN, EACH, BNHD, SOFTCAP, LEFT, RIGHT, STAGES_K, STAGES_V,
            )),
            (_attend, (
                gl.constexpr(1), queries_of, keys_of, values_of, spares, bars, N, H, I, J, P, low, high, inner,
                factor, out, lse, top, D, BN, EACH, BNHD, SOFTCAP, LEFT, RIGHT, STAGES_K, STAGES_V,
            )),
            (_load, (
                q, k, v, N, H, J, low, high, queries_of, keys_of, values_of, bars, GROUP, D, BN, EACH, QB, QH, KB, KH,
                VB, VH, LEFT, RIGHT, STAGES_K, STAGES_V,
            )),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip

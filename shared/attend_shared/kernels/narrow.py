"""Attention forward of rows of 64 on compute capability 9.0, in Gluon: the same for torch and JAX.

Three groups of four warps have 64 queries each and share the keys and values that one more warp loads. A group asks for
the sum of values of one block and the products of the next at once, and makes exponentials when both are there: what
the tensor cores do meanwhile is what the other two groups asked for. Half of the time of rows of 64 is exponentials, so
what counts is how little else there is between them. A program stays, and goes over its share of all heads and queries:
what the next tile needs is loaded while this one is worked on, and no group waits for another at its end.

References:
    Shah, Bikshandi, Zhang, Thakkar, Ramani, Dao: FlashAttention-3 (2024), whose roles of warps these are.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from attend_shared.kernels import launch
from attend_shared.kernels.attention import with_sink
from attend_shared.kernels.gluon_plan import NARROW
from attend_shared.kernels.groups import ROWS, fetch, in_words, operand, tile_of, tiles_of

LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(launch.LOG2E)
LEAST = gl.constexpr(-3.4028234663852886e38)
NOTHING = gl.constexpr(float("-inf"))
GROUPS = gl.constexpr(3)
D = gl.constexpr(64)
BN = gl.constexpr(NARROW.keys)
STAGES = gl.constexpr(NARROW.stages)
LOGITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, NARROW.keys, 16]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))


@gluon.jit
def _tile(k, N, blocks, together, J, high):
    """The k-th tile of a program: its item and head in one number, its first query, how many blocks of keys it sees.

    Of so many heads together the longest rows come first. One block at least is looked at.
    """
    n, block = tile_of(k, N, blocks, together)
    first = (blocks - 1 - block) * (GROUPS * ROWS)
    stop = gl.minimum(J // BN, (gl.maximum(first + GROUPS * ROWS + high, 0) + BN - 1) // BN)
    return n, first, gl.maximum(stop, 1)


@gluon.jit
def _load(
    q, k, v, N, H, J, blocks, together, high, queries_of, keys_of, values_of, q_loaded, q_done, first_loaded,
    first_done, loaded, done, GROUP: gl.constexpr, QB: gl.constexpr, QH: gl.constexpr, KB: gl.constexpr,
    KH: gl.constexpr, VB: gl.constexpr, VH: gl.constexpr,
):  # fmt: skip
    """Of each tile the queries and the first block of keys; then values of each block and keys of the next together."""
    count = 0
    for tile in range(tiles_of(blocks, N)):
        n, first, stop = _tile(tile, N, blocks, together, J, high)
        b, h, hk = n // H, n % H, n % H // GROUP
        place = tile % 2
        mbarrier.wait(q_done.index(place), (tile // 2) & 1 ^ 1)
        mbarrier.expect(q_loaded.index(place), GROUPS * ROWS * D * 2)
        for group in gl.static_range(GROUPS):
            fetch(q, b * QB, h * QH, first + group * ROWS, queries_of.index(place * GROUPS + group),
                   q_loaded.index(place))  # fmt: skip
        mbarrier.wait(first_done.index(0), tile & 1 ^ 1)
        mbarrier.expect(first_loaded.index(0), BN * D * 2)
        fetch(k, b * KB, hk * KH, 0, keys_of.index(STAGES), first_loaded.index(0))
        for turn in range(stop):
            at = count % STAGES
            mbarrier.wait(done.index(at), (count // STAGES) & 1 ^ 1)
            if turn < stop - 1:
                mbarrier.expect(loaded.index(at), 2 * BN * D * 2)
                fetch(k, b * KB, hk * KH, turn * BN + BN, keys_of.index(at), loaded.index(at))
            else:
                mbarrier.expect(loaded.index(at), BN * D * 2)
            fetch(v, b * VB, hk * VH, turn * BN, values_of.index(at), loaded.index(at))
            count += 1


@gluon.jit
def _parts(p):
    """Sums of every eighth column: those that a thread has."""
    return gl.sum(p.reshape((ROWS, BN // 8, 8)), 1)


@gluon.jit
def _weights(s, m, total, begin, rows, high, factor, dtype: gl.constexpr, CUT: gl.constexpr):
    """Products to weights, in words, not yet over their total; what the sums so far shrink by; largest logit, parts of
    the total.
    """
    if CUT:  # the bits of a column by which threads differ are on the other side: what stays is a constant
        columns = gl.arange(0, BN, gl.SliceLayout(0, LOGITS))[None, :]
        s = gl.where((columns & -7) <= (rows + (high - begin))[:, None] - (columns & 6), s, NOTHING)
    new = gl.maximum(m, gl.max(s, 1) * factor)
    shift = gl.where(new == NOTHING, 0.0, new)
    p = gl.exp2(s * factor - shift[:, None])
    shrink = gl.exp2(m - shift)
    total = total * gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))[:, None] + _parts(p)
    return in_words(p, dtype, BN), gl.convert_layout(shrink, gl.SliceLayout(1, SUMS)), new, total


@gluon.jit
def _turn(
    count, begin, queries, keys_of, values_of, loaded, done, acc, words, m, total, rows, high, factor,
    dtype: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    """The sum of values of the block with this count, and the weights of the next, which begins at a key."""
    at = count % STAGES
    zeros = gl.zeros((ROWS, BN), gl.float32, LOGITS)
    mbarrier.wait(loaded.index(at), (count // STAGES) & 1)
    acc = warpgroup_mma(operand(words, acc, dtype, BN), values_of.index(at).reshape((BN, D)), acc, is_async=True)
    keys = keys_of.index(at).reshape((BN, D)).permute((1, 0))
    s = warpgroup_mma(queries, keys, zeros, use_acc=False, is_async=True)
    acc, s, words = warpgroup_mma_wait(0, deps=(acc, s, words))
    mbarrier.arrive(done.index(at), count=1)
    words, shrink, m, total = _weights(s, m, total, begin, rows, high, factor, dtype, CUT)
    return acc * shrink[:, None], words, m, total


@gluon.jit
def _attend(
    WHICH: gl.constexpr, queries_of, keys_of, values_of, q_loaded, q_done, first_loaded, first_done, loaded, done,
    N, H, I, J, P, blocks, together, high, factor, sinks, out, lse, top, inverse, exact, BNHD: gl.constexpr,
    SINKS: gl.constexpr, EXACT: gl.constexpr,
):  # fmt: skip
    """out, lse and what the way back takes of 64 queries of each tile."""
    dtype: gl.constexpr = out.dtype.element_ty
    count = 0  # of blocks of the tiles before
    for tile in range(tiles_of(blocks, N)):
        n, first, stop = _tile(tile, N, blocks, together, J, high)
        first += WHICH * ROWS
        rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, LOGITS))
        last = gl.where(first < I, stop, 1)  # of blocks that these queries see; at least one is looked at
        last = gl.maximum(gl.minimum(last, (gl.maximum(first + ROWS + high, 0) + BN - 1) // BN), 1)
        whole = gl.minimum(last, gl.maximum(first + high + 1, 0) // BN)
        m = gl.full((ROWS,), NOTHING, gl.float32, gl.SliceLayout(1, LOGITS))
        zeros = gl.zeros((ROWS, BN), gl.float32, LOGITS)
        total = _parts(zeros)
        acc = gl.zeros((ROWS, D), gl.float32, SUMS)
        place = tile % 2
        queries = queries_of.index(place * GROUPS + WHICH).reshape((ROWS, D))
        mbarrier.wait(q_loaded.index(place), (tile // 2) & 1)
        mbarrier.wait(first_loaded.index(0), tile & 1)
        s = warpgroup_mma(queries, keys_of.index(STAGES).reshape((BN, D)).permute((1, 0)), zeros, use_acc=False)
        mbarrier.arrive(first_done.index(0), count=1)
        words, _, m, total = _weights(s, m, total, 0, rows, high, factor, dtype, True)
        for turn in range(whole - 1):
            acc, words, m, total = _turn(
                count + turn, (turn + 1) * BN, queries, keys_of, values_of, loaded, done, acc, words, m, total, rows,
                high, factor, dtype, False,
            )  # fmt: skip
        for turn in range(gl.maximum(whole - 1, 0), last - 1):
            acc, words, m, total = _turn(
                count + turn, (turn + 1) * BN, queries, keys_of, values_of, loaded, done, acc, words, m, total, rows,
                high, factor, dtype, True,
            )  # fmt: skip
        mbarrier.arrive(q_done.index(place), count=1)
        at = (count + last - 1) % STAGES
        mbarrier.wait(loaded.index(at), ((count + last - 1) // STAGES) & 1)
        acc = warpgroup_mma(operand(words, acc, dtype, BN), values_of.index(at).reshape((BN, D)), acc)
        mbarrier.arrive(done.index(at), count=1)
        for turn in range(last, stop):  # what only the other groups see is given back unread
            at = (count + turn) % STAGES
            mbarrier.wait(loaded.index(at), ((count + turn) // STAGES) & 1)
            mbarrier.arrive(done.index(at), count=1)
        count += stop

        total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, LOGITS))
        b, head = n // H, n % H
        inside = rows < I
        empty = total == 0
        total = gl.where(empty, 1.0, total)
        shrink = 1 / total
        seen = m + gl.log2(total)
        natural = seen * LN2
        kept = n.to(gl.int64) * P + rows
        if SINKS:
            sink = gl.load(sinks + head).to(gl.float32) + gl.zeros_like(m)
            natural, empty, ours, its = with_sink(natural, sink)
            shrink *= ours
            seen = gl.maximum(natural * LOG2E, LEAST)
            gl.store(inverse + kept, gl.where(rows < I, its, 0.0), mask=rows < P)
        # rows behind the last see nothing
        gl.store(top + kept, gl.where(empty | (rows >= I), float("inf"), seen), mask=rows < P)
        if WHICH == GROUPS - 1:  # and those behind the last tile
            behind = (rows + ROWS >= blocks * (GROUPS * ROWS)) & (rows + ROWS < P)
            gl.store(top + kept + ROWS, gl.full_like(m, float("inf")), mask=behind)
            if SINKS:
                gl.store(inverse + kept + ROWS, gl.zeros_like(m), mask=behind)
        gl.store(lse + n.to(gl.int64) * I + rows, gl.where(empty, NOTHING, natural), mask=inside)
        acc *= gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None]
        places = first + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
        if BNHD:
            starts = ((b.to(gl.int64) * I + places) * H + head) * D
        else:
            starts = (n.to(gl.int64) * I + places) * D
        offsets = starts[:, None] + gl.arange(0, D, gl.SliceLayout(0, SUMS))[None, :]
        here = (places < I)[:, None]
        gl.store(out + offsets, acc.to(dtype), mask=here)
        if EXACT:
            gl.store(exact + offsets, acc, mask=here)


@gluon.jit
def narrow(
    q, k, v, sinks, N, H, I, J, P, blocks, together, high, factor, out, lse, top, inverse, exact,
    GROUP: gl.constexpr, QB: gl.constexpr, QH: gl.constexpr, KB: gl.constexpr, KH: gl.constexpr, VB: gl.constexpr,
    VH: gl.constexpr, BNHD: gl.constexpr, SINKS: gl.constexpr, EXACT: gl.constexpr,
):  # fmt: skip
    """out, lse, top, inverse and exact, as `attention.forward` makes them; J a multiple of the keys of a block.

    q, k, v: descriptors of (b, h, n, 64), which load rows of one head.
    N: items times heads. blocks: of queries, in I. together: of how many heads the longest rows come first.
    QB, QH, KB, KH, VB, VH: 1, or 0 where all items or heads have the same queries, keys or values.
    high: key j is seen by query t where j - t <= high.
    """
    dtype: gl.constexpr = out.dtype.element_ty
    keys_of = gl.allocate_shared_memory(dtype, [STAGES + 1, 1, 1, BN, D], k.layout)
    values_of = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], v.layout)
    queries_of = gl.allocate_shared_memory(dtype, [2 * GROUPS, 1, 1, ROWS, D], q.layout)
    # each an allocation of its own: the compiler puts a barrier of all threads between accesses to one
    q_loaded = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    first_loaded = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    first_done = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(2):
        mbarrier.init(q_loaded.index(place), count=1)
        mbarrier.init(q_done.index(place), count=GROUPS)
    mbarrier.init(first_loaded.index(0), count=1)
    mbarrier.init(first_done.index(0), count=GROUPS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(loaded.index(stage), count=1)
        mbarrier.init(done.index(stage), count=GROUPS)
    gl.warp_specialize(
        [
            (_attend, (
                gl.constexpr(0), queries_of, keys_of, values_of, q_loaded, q_done, first_loaded, first_done, loaded,
                done, N, H, I, J, P, blocks, together, high, factor, sinks, out, lse, top, inverse, exact, BNHD,
                SINKS, EXACT,
            )),
            (_attend, (
                gl.constexpr(1), queries_of, keys_of, values_of, q_loaded, q_done, first_loaded, first_done, loaded,
                done, N, H, I, J, P, blocks, together, high, factor, sinks, out, lse, top, inverse, exact, BNHD,
                SINKS, EXACT,
            )),
            (_attend, (
                gl.constexpr(2), queries_of, keys_of, values_of, q_loaded, q_done, first_loaded, first_done, loaded,
                done, N, H, I, J, P, blocks, together, high, factor, sinks, out, lse, top, inverse, exact, BNHD,
                SINKS, EXACT,
            )),
            (_load, (
                q, k, v, N, H, J, blocks, together, high, queries_of, keys_of, values_of, q_loaded, q_done,
                first_loaded, first_done, loaded, done, GROUP, QB, QH, KB, KH, VB, VH,
            )),
        ],
        [4, 4, 1], [160, 160, 24],
    )  # fmt: skip

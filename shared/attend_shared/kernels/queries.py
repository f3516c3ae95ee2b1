"""dq of rows of 64 and 128 on compute capability 9.0, in Gluon: the same for torch and JAX.

Groups of four warps have 64 queries each, whose rows of q and dout stay in shared memory, and share the keys and values
that one more warp loads. A group asks for the logits of the next block of keys, the part of dq that this one has, and
dout times the next block's values, and makes the next block's exponentials while the last two run. Keys are read twice:
across for the logits, and as they lie for dq. A program stays, and goes over its share of all heads and queries. Where
segments say what is seen, `order_tiles` says which these are, and blocks that `bounds` found whole compare no ids.

References:
    Shah, Bikshandi, Zhang, Thakkar, Ramani, Dao: FlashAttention-3 (2024), whose roles of warps these are.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attend_shared.kernels.groups import ROWS, fetch, in_words, operand, tile_of, tiles_of
from attend_shared.kernels.hopper import _masked as _placed
from attend_shared.kernels.visits import _blocks, _blocks_up, _clip, _hull


@gluon.jit
def _tile(order, k, N, blocks, together, GROUPS: gl.constexpr, SEGMENTS: gl.constexpr):
    """The k-th tile of a program: its item and head in one number, and its first query. Of so many heads together the
    longest rows come first; with segments, as the order says.
    """
    if SEGMENTS:
        at = gl.load(order + k * gl.num_programs(0) + gl.program_id(0))
        n, block = at // blocks, at % blocks
    else:
        n, block = tile_of(k, N, blocks, together)
        block = blocks - 1 - block
    return n, block * (GROUPS * ROWS)


@gluon.jit
def _span(
    bounds, b, first, I, J, low, high, COUNT: gl.constexpr, BN: gl.constexpr, G: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr, SEGMENTS: gl.constexpr,
):  # fmt: skip
    """Where the blocks of keys that COUNT queries see begin, are whole, end being whole, and end."""
    most = J // BN
    start, whole_from, whole_to, stop = J * 0, J * 0, most, most
    if LEFT:
        start = _blocks(first + low, BN)
        whole_from = _blocks_up(first + COUNT - 1 + low, BN)
    if RIGHT:
        stop = gl.minimum(stop, _blocks_up(first + COUNT + high, BN))
        whole_to = gl.minimum(whole_to, _blocks(first + high + 1, BN))
    if SEGMENTS:
        groups = (I + G - 1) // G
        some_from, some_to, same_from, same_to = _hull(
            bounds, b * (groups + (J + G - 1) // G), first // COUNT, groups, COUNT // G
        )
        start = gl.maximum(start, some_from // (BN // G))
        stop = gl.minimum(stop, (some_to + BN // G - 1) // (BN // G))
        whole_from = gl.maximum(whole_from, (same_from + BN // G - 1) // (BN // G))
        whole_to = gl.minimum(whole_to, same_to // (BN // G))
    return _clip(start, whole_from, whole_to, stop, most)


@gluon.jit
def _loaded(
    bounds, b, first, I, J, low, high, COUNT: gl.constexpr, BN: gl.constexpr, G: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr, SEGMENTS: gl.constexpr,
):  # fmt: skip
    """From which to behind which block of keys is loaded for a tile: one at least."""
    start, _, _, stop = _span(bounds, b, first, I, J, low, high, COUNT, BN, G, LEFT, RIGHT, SEGMENTS)
    start = gl.minimum(start, J // BN - 1)
    return start, gl.maximum(stop, start + 1)


@gluon.jit
def _load(
    q, dout, k, v, bounds, order, N, H, I, J, blocks, together, low, high, places, bars,
    GROUP: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, GROUPS: gl.constexpr, G: gl.constexpr,
    QB: gl.constexpr, QH: gl.constexpr, KB: gl.constexpr, KH: gl.constexpr, VB: gl.constexpr, VH: gl.constexpr,
    DOB: gl.constexpr, DOH: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, SEGMENTS: gl.constexpr,
    STAGES_K: gl.constexpr, STAGES_V: gl.constexpr,
):  # fmt: skip
    """Of each tile the rows of q and dout, and block after block of keys and of values."""
    queries_of, douts_of, keys_of, values_of = places
    q_loaded, q_done, k_loaded, k_done, v_loaded, v_done = bars
    count = 0
    for tile in range(tiles_of(blocks, N)):
        n, first = _tile(order, tile, N, blocks, together, GROUPS, SEGMENTS)
        b, h, hk = n // H, n % H, n % H // GROUP
        start, stop = _loaded(bounds, b, first, I, J, low, high, GROUPS * ROWS, BN, G, LEFT, RIGHT, SEGMENTS)
        for group in gl.static_range(GROUPS):
            mbarrier.wait(q_done.index(group), tile & 1 ^ 1)
            mbarrier.expect(q_loaded.index(group), 2 * ROWS * D * 2)
            fetch(q, b * QB, h * QH, first + group * ROWS, queries_of.index(group), q_loaded.index(group))
            fetch(dout, b * DOB, h * DOH, first + group * ROWS, douts_of.index(group), q_loaded.index(group))
        for turn in range(start, stop):
            at = count % STAGES_K
            mbarrier.wait(k_done.index(at), (count // STAGES_K) & 1 ^ 1)
            mbarrier.expect(k_loaded.index(at), BN * D * 2)
            fetch(k, b * KB, hk * KH, turn * BN, keys_of.index(at), k_loaded.index(at))
            at = count % STAGES_V
            mbarrier.wait(v_done.index(at), (count // STAGES_V) & 1 ^ 1)
            mbarrier.expect(v_loaded.index(at), BN * D * 2)
            fetch(v, b * VB, hk * VH, turn * BN, values_of.index(at), v_loaded.index(at))
            count += 1


@gluon.jit
def _give_back(count, bars, STAGES_K: gl.constexpr, STAGES_V: gl.constexpr):
    """A block unread, which only other groups see."""
    _, _, k_loaded, k_done, v_loaded, v_done = bars
    at = count % STAGES_K
    mbarrier.wait(k_loaded.index(at), (count // STAGES_K) & 1)
    mbarrier.arrive(k_done.index(at), count=1)
    at = count % STAGES_V
    mbarrier.wait(v_loaded.index(at), (count // STAGES_V) & 1)
    mbarrier.arrive(v_done.index(at), count=1)


@gluon.jit
def _either(a, b):
    return a | b


@gluon.jit
def _hold(p, spare, BN: gl.constexpr):
    """ptxas would wait for products before the exponentials; past a barrier with a store of all of them, it can't."""
    low, up = p.to(gl.int32, bitcast=True).reshape((ROWS, BN // 2, 2)).split()
    low = gl.reduce(low.reshape((ROWS, BN // 8, 4)), 1, _either)
    up = gl.reduce(up.reshape((ROWS, BN // 8, 4)), 1, _either)
    spare.store((low | up).reshape((ROWS * 4,)))
    gl.thread_barrier()


@gluon.jit
def _words(p, dp, slope, dtype: gl.constexpr, BN: gl.constexpr):
    """Gradients of logits, in words."""
    return in_words(p * (dp - slope[:, None]), dtype, BN)


@gluon.jit
def _masked(
    s, begin, least, most, q_id, kv_ids, LOGITS: gl.constexpr, BN: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr, SEGMENTS: gl.constexpr,
):  # fmt: skip
    """Products, -inf where position or segment says so."""
    if LEFT or RIGHT:
        s = _placed(s, begin, least, most, LOGITS, BN, LEFT, RIGHT)
    if SEGMENTS:
        kv_id = gl.load(kv_ids + begin + gl.arange(0, BN, gl.SliceLayout(0, LOGITS)))
        s = gl.where(q_id[:, None] == kv_id[None, :], s, float("-inf"))
    return s


@gluon.jit
def _turn(
    count, begin, queries, douts, places, bars, spare, acc, words, m, slope, least, most, q_id, kv_ids, factor,
    LOGITS: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, CUT: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr, SEGMENTS: gl.constexpr, STAGES_K: gl.constexpr, STAGES_V: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """The part of dq of the block with this count, and the gradients of logits of the next, which begins at a key."""
    _, _, keys_of, values_of = places
    _, _, k_loaded, k_done, v_loaded, v_done = bars
    ahead = count + 1
    at_k, at_v, old = ahead % STAGES_K, ahead % STAGES_V, count % STAGES_K
    zeros = gl.zeros((ROWS, BN), gl.float32, LOGITS)
    mbarrier.wait(k_loaded.index(at_k), (ahead // STAGES_K) & 1)
    keys = keys_of.index(at_k).reshape((BN, D)).permute((1, 0))
    s = warpgroup_mma(queries, keys, zeros, use_acc=False, is_async=True)
    acc = warpgroup_mma(operand(words, acc, dtype, BN), keys_of.index(old).reshape((BN, D)), acc, is_async=True)
    mbarrier.wait(v_loaded.index(at_v), (ahead // STAGES_V) & 1)
    values = values_of.index(at_v).reshape((BN, D)).permute((1, 0))
    dp = warpgroup_mma(douts, values, zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(2, deps=(s,))
    if CUT:
        s = _masked(s, begin, least, most, q_id, kv_ids, LOGITS, BN, LEFT, RIGHT, SEGMENTS)
    p = gl.exp2(s * factor - m[:, None])
    _hold(p, spare, BN)
    acc, dp, words, p = warpgroup_mma_wait(0, deps=(acc, dp, words, p))
    mbarrier.arrive(k_done.index(old), count=1)
    mbarrier.arrive(v_done.index(at_v), count=1)
    return acc, _words(p, dp, slope, dtype, BN)


@gluon.jit
def _visited(
    bounds, order, tile, N, H, I, J, blocks, together, low, high, WHICH: gl.constexpr, BN: gl.constexpr,
    GROUPS: gl.constexpr, G: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, SEGMENTS: gl.constexpr,
):  # fmt: skip
    """A tile's item and head, its first query, which blocks are loaded for it, and which a group visits: one at least.
    And whether it sees any.
    """
    n, begin = _tile(order, tile, N, blocks, together, GROUPS, SEGMENTS)
    b = n // H
    from_block, to_block = _loaded(bounds, b, begin, I, J, low, high, GROUPS * ROWS, BN, G, LEFT, RIGHT, SEGMENTS)
    first = begin + WHICH * ROWS
    start, whole_from, whole_to, stop = _span(bounds, b, first, I, J, low, high, ROWS, BN, G, LEFT, RIGHT, SEGMENTS)
    sees = (start < stop) & (first < I)
    start = gl.minimum(gl.maximum(start, from_block), to_block - 1)
    stop = gl.where(first < I, gl.minimum(gl.maximum(stop, start + 1), to_block), start + 1)
    whole_from = gl.minimum(gl.maximum(whole_from, start), stop)
    whole_to = gl.minimum(gl.maximum(whole_to, whole_from), stop)
    return n, first, from_block, to_block, start, whole_from, whole_to, stop, sees


@gluon.jit
def _of_rows(known, q_ids, n, first, H, I, P, LOGITS: gl.constexpr, SEGMENTS: gl.constexpr):
    """Maximum and slope of the rows of a group, and their segments."""
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, LOGITS))
    kept = known + (n.to(gl.int64) * P + rows) * 4
    m = gl.load(kept, mask=rows < I, other=float("inf"))
    slope = gl.load(kept + 1, mask=rows < I, other=0.0)
    if SEGMENTS:
        q_id = gl.load(q_ids + (n // H).to(gl.int64) * I + rows, mask=rows < I, other=0)
    else:
        q_id = rows
    return m, slope, q_id


@gluon.jit
def _attend(
    WHICH: gl.constexpr, places, bars, spares, known, q_ids, kv_ids, bounds, order, N, H, I, J, P, blocks, together,
    low, high, factor, scale, dq, D: gl.constexpr, BN: gl.constexpr, GROUPS: gl.constexpr, G: gl.constexpr,
    BNHD: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, SEGMENTS: gl.constexpr, STAGES_K: gl.constexpr,
    STAGES_V: gl.constexpr,
):  # fmt: skip
    """dq of 64 queries of each tile."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = dq.dtype.element_ty
    queries_of, douts_of, keys_of, values_of = places
    q_loaded, q_done, k_loaded, k_done, v_loaded, v_done = bars
    spare = spares.index(WHICH)
    tiles = tiles_of(blocks, N)
    count = 0  # of blocks of the tiles before
    acc = gl.zeros((ROWS, D), gl.float32, SUMS)
    words = in_words(gl.zeros((ROWS, BN), gl.float32, LOGITS), dtype, BN)
    n, first, _, _, _, _, _, _, _ = _visited(
        bounds, order, 0, N, H, I, J, blocks, together, low, high, WHICH, BN, GROUPS, G, LEFT, RIGHT, SEGMENTS
    )  # fmt: skip
    m, slope, q_id = _of_rows(known, q_ids, n, first, H, I, P, LOGITS, SEGMENTS)
    for tile in range(tiles):
        # Not kept from turn to turn: Triton 3.6 takes two such numbers for what they were before the loop.
        n, first, from_block, to_block, start, whole_from, whole_to, stop, sees = _visited(
            bounds, order, tile, N, H, I, J, blocks, together, low, high, WHICH, BN, GROUPS, G, LEFT, RIGHT, SEGMENTS
        )  # fmt: skip
        b = n // H
        ids = kv_ids + b.to(gl.int64) * J if SEGMENTS else kv_ids
        rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, LOGITS))
        least, most = rows + low, rows + high
        queries = queries_of.index(WHICH).reshape((ROWS, D))
        douts = douts_of.index(WHICH).reshape((ROWS, D))
        behind = count - from_block
        mbarrier.wait(q_loaded.index(WHICH), tile & 1)
        for turn in range(from_block, start):
            _give_back(behind + turn, bars, STAGES_K, STAGES_V)
        at_k, at_v = (behind + start) % STAGES_K, (behind + start) % STAGES_V
        zeros = gl.zeros((ROWS, BN), gl.float32, LOGITS)
        mbarrier.wait(k_loaded.index(at_k), ((behind + start) // STAGES_K) & 1)
        s = warpgroup_mma(queries, keys_of.index(at_k).reshape((BN, D)).permute((1, 0)), zeros, use_acc=False)
        mbarrier.wait(v_loaded.index(at_v), ((behind + start) // STAGES_V) & 1)
        dp = warpgroup_mma(douts, values_of.index(at_v).reshape((BN, D)).permute((1, 0)), zeros, use_acc=False)
        mbarrier.arrive(v_done.index(at_v), count=1)
        s = _masked(s, start * BN, least, most, q_id, ids, LOGITS, BN, LEFT, RIGHT, SEGMENTS)
        words = _words(gl.exp2(s * factor - m[:, None]), dp, slope, dtype, BN)
        if LEFT or SEGMENTS:
            for turn in range(start, whole_from - 1):
                acc, words = _turn(
                    behind + turn, (turn + 1) * BN, queries, douts, places, bars, spare, acc, words,
                    m, slope, least, most, q_id, ids, factor, LOGITS, D, BN, True, LEFT, RIGHT, SEGMENTS,
                    STAGES_K, STAGES_V, dtype,
                )  # fmt: skip
        for turn in range(gl.maximum(whole_from - 1, start), whole_to - 1):
            acc, words = _turn(
                behind + turn, (turn + 1) * BN, queries, douts, places, bars, spare, acc, words,
                m, slope, least, most, q_id, ids, factor, LOGITS, D, BN, False, LEFT, RIGHT, SEGMENTS, STAGES_K,
                STAGES_V, dtype,
            )  # fmt: skip
        if RIGHT or SEGMENTS:
            for turn in range(gl.maximum(whole_to - 1, start), stop - 1):
                acc, words = _turn(
                    behind + turn, (turn + 1) * BN, queries, douts, places, bars, spare, acc, words,
                    m, slope, least, most, q_id, ids, factor, LOGITS, D, BN, True, LEFT, RIGHT, SEGMENTS,
                    STAGES_K, STAGES_V, dtype,
                )  # fmt: skip
        last = behind + stop - 1
        count += to_block - from_block
        acc = warpgroup_mma(operand(words, acc, dtype, BN), keys_of.index(last % STAGES_K).reshape((BN, D)), acc)
        mbarrier.arrive(k_done.index(last % STAGES_K), count=1)
        for turn in range(stop, to_block):
            _give_back(behind + turn, bars, STAGES_K, STAGES_V)
        if tile + 1 < tiles:
            n_next, first_next, _, _, _, _, _, _, _ = _visited(
                bounds, order, tile + 1, N, H, I, J, blocks, together, low, high, WHICH, BN, GROUPS, G, LEFT, RIGHT,
                SEGMENTS,
            )  # fmt: skip
            m, slope, q_id = _of_rows(known, q_ids, n_next, first_next, H, I, P, LOGITS, SEGMENTS)

        rounded = gl.where(sees, acc * scale, 0.0).to(dtype)
        acc = gl.zeros((ROWS, D), gl.float32, SUMS)
        queries.store(rounded)  # from where whole lines are stored
        lines = queries.load(LINES)
        fence_async_shared()
        mbarrier.arrive(q_done.index(WHICH), count=1)
        at = first + gl.arange(0, ROWS, gl.SliceLayout(1, LINES))
        lanes = gl.arange(0, D, gl.SliceLayout(0, LINES))[None, :]
        if BNHD:
            starts = ((b.to(gl.int64) * I + at) * H + n % H) * D
        else:
            starts = (n.to(gl.int64) * I + at) * D
        gl.store(dq + starts[:, None] + lanes, lines, mask=(at < I)[:, None])


@gluon.jit(do_not_specialize=("N", "H", "I", "J", "P", "blocks", "together", "low", "high"))  # compiled once for all
def long_query_gradients(
    q, k, v, dout, known, q_ids, kv_ids, bounds, order, N, H, I, J, P, blocks, together, low, high, factor, scale, dq,
    GROUP: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, GROUPS: gl.constexpr, G: gl.constexpr,
    QB: gl.constexpr, QH: gl.constexpr, KB: gl.constexpr, KH: gl.constexpr, VB: gl.constexpr, VH: gl.constexpr,
    DOB: gl.constexpr, DOH: gl.constexpr, BNHD: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    SEGMENTS: gl.constexpr, STAGES_K: gl.constexpr, STAGES_V: gl.constexpr,
):  # fmt: skip
    """dq, as `gradients.query_gradients` makes it, to the bit; J a multiple of BN.

    q, k, v, dout: descriptors of (b, h or hk, I or J, D), which load rows of one head.
    q_ids, kv_ids, bounds, order: segments (SEGMENTS), what `overlaps` says of G rows or keys each, and `order_tiles`.
    N: items times heads. blocks: of queries, in I. together: of how many heads the longest rows come first.
    QB, QH, KB, KH, VB, VH, DOB, DOH: 1, or 0 where all items or heads have the same.
    LEFT, RIGHT: key j is seen by query t where low <= j - t, and j - t <= high.
    """
    places = (
        gl.allocate_shared_memory(q.dtype, [GROUPS, 1, 1, ROWS, D], q.layout),
        gl.allocate_shared_memory(dout.dtype, [GROUPS, 1, 1, ROWS, D], dout.layout),
        gl.allocate_shared_memory(k.dtype, [STAGES_K, 1, 1, BN, D], k.layout),
        gl.allocate_shared_memory(v.dtype, [STAGES_V, 1, 1, BN, D], v.layout),
    )
    spares = gl.allocate_shared_memory(gl.int32, [GROUPS, ROWS * 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # each an allocation of its own: the compiler puts a barrier of all threads between accesses to one
    q_loaded = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    q_done = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    k_loaded = gl.allocate_shared_memory(gl.int64, [STAGES_K, 1], mbarrier.MBarrierLayout())
    k_done = gl.allocate_shared_memory(gl.int64, [STAGES_K, 1], mbarrier.MBarrierLayout())
    v_loaded = gl.allocate_shared_memory(gl.int64, [STAGES_V, 1], mbarrier.MBarrierLayout())
    v_done = gl.allocate_shared_memory(gl.int64, [STAGES_V, 1], mbarrier.MBarrierLayout())
    bars = (q_loaded, q_done, k_loaded, k_done, v_loaded, v_done)
    for group in gl.static_range(GROUPS):
        mbarrier.init(q_loaded.index(group), count=1)
        mbarrier.init(q_done.index(group), count=1)
    for stage in gl.static_range(STAGES_K):
        mbarrier.init(k_loaded.index(stage), count=1)
        mbarrier.init(k_done.index(stage), count=GROUPS)
    for stage in gl.static_range(STAGES_V):
        mbarrier.init(v_loaded.index(stage), count=1)
        mbarrier.init(v_done.index(stage), count=GROUPS)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_attend, (
                    gl.constexpr(0), places, bars, spares, known, q_ids, kv_ids, bounds, order, N, H, I, J, P,
                    blocks, together, low, high, factor, scale, dq, D, BN, GROUPS, G, BNHD, LEFT, RIGHT, SEGMENTS,
                    STAGES_K, STAGES_V,
                )),
                (_attend, (
                    gl.constexpr(1), places, bars, spares, known, q_ids, kv_ids, bounds, order, N, H, I, J, P,
                    blocks, together, low, high, factor, scale, dq, D, BN, GROUPS, G, BNHD, LEFT, RIGHT, SEGMENTS,
                    STAGES_K, STAGES_V,
                )),
                (_load, (
                    q, dout, k, v, bounds, order, N, H, I, J, blocks, together, low, high, places, bars, GROUP, D, BN,
                    GROUPS, G, QB, QH, KB, KH, VB, VH, DOB, DOH, LEFT, RIGHT, SEGMENTS, STAGES_K, STAGES_V,
                )),
            ],
            [4, 1], [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_attend, (
                    gl.constexpr(0), places, bars, spares, known, q_ids, kv_ids, bounds, order, N, H, I, J, P,
                    blocks, together, low, high, factor, scale, dq, D, BN, GROUPS, G, BNHD, LEFT, RIGHT, SEGMENTS,
                    STAGES_K, STAGES_V,
                )),
                (_attend, (
                    gl.constexpr(1), places, bars, spares, known, q_ids, kv_ids, bounds, order, N, H, I, J, P,
                    blocks, together, low, high, factor, scale, dq, D, BN, GROUPS, G, BNHD, LEFT, RIGHT, SEGMENTS,
                    STAGES_K, STAGES_V,
                )),
                (_attend, (
                    gl.constexpr(2), places, bars, spares, known, q_ids, kv_ids, bounds, order, N, H, I, J, P,
                    blocks, together, low, high, factor, scale, dq, D, BN, GROUPS, G, BNHD, LEFT, RIGHT, SEGMENTS,
                    STAGES_K, STAGES_V,
                )),
                (_load, (
                    q, dout, k, v, bounds, order, N, H, I, J, blocks, together, low, high, places, bars, GROUP, D, BN,
                    GROUPS, G, QB, QH, KB, KH, VB, VH, DOB, DOH, LEFT, RIGHT, SEGMENTS, STAGES_K, STAGES_V,
                )),
            ],
            [4, 4, 1], [160, 160, 24],
        )  # fmt: skip

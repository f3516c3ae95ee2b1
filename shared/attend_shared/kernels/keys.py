"""dk and dv of long rows on compute capability 9.0, in Gluon: the same for torch and JAX.

Two groups of four warps have 64 keys each; one more warp loads queries and dout, a block at a time, for both. Keys are
the rows of all products, so that weights, and what dk takes of them, are in registers where the next product reads
them. A group asks at once for the products of its keys with a block of queries, for dk of the block before, and for the
products of its values with dout. While the last two run it makes the exponentials, and while dv is summed what dk will
take. A program stays, and goes over its share of the keys of all heads: the next keys, and ahead of them the first of
their queries, are loaded while the last ones' dk is summed and their results are stored.

Blocks of queries that position cuts are looked at one by one, the others are not (as in `attention`). Sums are of 16
queries at a time, in their order, as `gradients.key_gradients` makes them.

References:
    Shah, Bikshandi, Zhang, Thakkar, Ramani, Dao: FlashAttention-3 (2024), whose roles of warps and layouts these are.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from attend_shared.kernels import launch
from attend_shared.kernels.groups import ROWS, in_words, operand, tile_of, tiles_of
from attend_shared.kernels.visits import _blocks, _blocks_up, _clip

NOTHING = gl.constexpr(float("-inf"))
LOG2E = gl.constexpr(launch.LOG2E)
GROUPS = gl.constexpr(2)
BM = gl.constexpr(64)  # queries of a block
AHEAD = gl.constexpr(2)  # blocks of a tile's queries that are loaded before its keys, which wait for room
PIECE = gl.constexpr(64)  # numbers of a row that go by way of shared memory at a time


@gluon.jit
def _tile(order, k, N, blocks, together, RUNS: gl.constexpr):
    """The k-th tile of a program: its item and head in one number, and its block. RUNS: as the order says."""
    if RUNS:
        at = gl.load(order + k * gl.num_programs(0) + gl.program_id(0))
        return at // blocks, at % blocks
    else:
        return tile_of(k, N, blocks, together)


@gluon.jit
def _item_and_head(n, N, HK, SHARED: gl.constexpr):
    """Of the number of both. SHARED: items with one head are neighbours, so that the bias that they share is read from
    memory once.
    """
    items = N // HK
    return (n % items, n // items) if SHARED else (n // HK, n % HK)


@gluon.jit
def _tiles(runs, blocks, N, RUNS: gl.constexpr):
    """How many tiles a program has. RUNS: none where another kernel makes dk and dv."""
    tiles = tiles_of(blocks, N)
    if RUNS:
        tiles = gl.where(gl.load(runs) != 0, tiles, 0)
    return tiles


@gluon.jit
def _seen_by(
    spans, block, I, J, low, high, KEYS: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, RUNS: gl.constexpr
):
    """Where the blocks of queries that see a block of so many keys begin, are whole, end being whole, and end."""
    first = block * KEYS
    most = (I + BM - 1) // BM
    start, whole_from, whole_to, stop = I * 0, I * 0, most, most
    if RIGHT:
        start = _blocks(first - high, BM)
        whole_from = _blocks_up(first + KEYS - 1 - high, BM)
    if LEFT:
        stop = gl.minimum(stop, _blocks_up(first + KEYS - low, BM))
        whole_to = gl.minimum(whole_to, _blocks(first - low + 1, BM))
    if RUNS:
        of_first, of_last = spans + gl.minimum(first, J - 1) * 2, spans + gl.minimum(first + KEYS - 1, J - 1) * 2
        start = gl.maximum(start, _blocks(gl.load(of_first), BM))
        whole_from = gl.maximum(whole_from, _blocks_up(gl.load(of_last), BM))
        whole_to = gl.minimum(whole_to, _blocks(gl.load(of_first + 1), BM))
        stop = gl.minimum(stop, _blocks_up(gl.load(of_last + 1), BM))
    return _clip(start, whole_from, whole_to, stop, most)


@gluon.jit
def _loaded(spans, block, I, J, low, high, LEFT: gl.constexpr, RIGHT: gl.constexpr, RUNS: gl.constexpr):
    """From which to behind which block of queries is loaded for a tile: one at least."""
    start, _, _, stop = _seen_by(spans, block, I, J, low, high, GROUPS * ROWS, LEFT, RIGHT, RUNS)
    start = gl.minimum(start, (I + BM - 1) // BM - 1)
    return start, gl.maximum(stop, start + 1)


@gluon.jit
def _load_keys(
    k, v, tile, b, hk, first, keys_of, values_of, kv_loaded, kv_done, D: gl.constexpr, KB: gl.constexpr,
    KH: gl.constexpr, VB: gl.constexpr, VH: gl.constexpr,
):  # fmt: skip
    """Of a tile, when no group reads the last one's."""
    bar = kv_loaded.index(0)
    mbarrier.wait(kv_done.index(0), tile & 1 ^ 1)
    mbarrier.expect(bar, 2 * GROUPS * ROWS * D * 2)
    for group in gl.static_range(GROUPS):
        at_k, at_v = [b * KB, hk * KH, first + group * ROWS, 0], [b * VB, hk * VH, first + group * ROWS, 0]
        tma.async_copy_global_to_shared(k, at_k, bar, keys_of.index(group))
        tma.async_copy_global_to_shared(v, at_v, bar, values_of.index(group))


@gluon.jit
def _load(
    q, k, v, dout, known, bias, spans, order, runs, N, H, I, J, blocks, together, low, high, keys_of, values_of,
    queries_of, outs_of, known_of, biases_of, kv_loaded, kv_done, loaded, done, GROUP: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, QB: gl.constexpr, QH: gl.constexpr, KB: gl.constexpr, KH: gl.constexpr, VB: gl.constexpr,
    VH: gl.constexpr, DOB: gl.constexpr, DOH: gl.constexpr, BB: gl.constexpr, BH: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr, RUNS: gl.constexpr, BIAS: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    """Of each tile block after block of queries, dout, what is known of their rows, and their bias; behind the first,
    its keys and values.
    """
    HK = H // GROUP
    count = 0
    for tile in range(_tiles(runs, blocks, N, RUNS)):
        n, block = _tile(order, tile, N, blocks, together, RUNS)
        b, hk = _item_and_head(n, N, HK, SHARED)
        first = block * (GROUPS * ROWS)
        start, stop = _loaded(_of_item(spans, b, J, RUNS), block, I, J, low, high, LEFT, RIGHT, RUNS)
        for member in range(GROUP):
            h = hk * GROUP + member
            for turn in range(start, stop):
                at = count % STAGES
                bar = loaded.index(at)
                mbarrier.wait(done.index(at), (count // STAGES) & 1 ^ 1)
                mbarrier.expect(bar, 2 * BM * D * 2 + BM * 16 + BIAS * GROUPS * ROWS * BM * 2)
                tma.async_copy_global_to_shared(q, [b * QB, h * QH, turn * BM, 0], bar, queries_of.index(at))
                tma.async_copy_global_to_shared(known, [b * H + h, turn * BM, 0], bar, known_of.index(at))
                tma.async_copy_global_to_shared(dout, [b * DOB, h * DOH, turn * BM, 0], bar, outs_of.index(at))
                if BIAS:
                    for group in gl.static_range(GROUPS):
                        place = [b * BB, h * BH, turn * BM, first + group * ROWS]
                        tma.async_copy_global_to_shared(bias, place, bar, biases_of.index(at * GROUPS + group))
                count += 1
                if (member == 0) & (turn == gl.minimum(start + AHEAD, stop) - 1):
                    _load_keys(
                        k, v, tile, b, hk, first, keys_of, values_of, kv_loaded, kv_done, D, KB, KH, VB, VH
                    )  # fmt: skip


@gluon.jit
def _give_back(count, number, loaded, done, STAGES: gl.constexpr):
    """Let so many blocks go unread: those that only the other group sees."""
    for n in range(count, count + number):
        mbarrier.wait(loaded.index(n % STAGES), (n // STAGES) & 1)
        mbarrier.arrive(done.index(n % STAGES), count=1)


@gluon.jit
def _masked(s, cut, begin, least, most, LOGITS: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """Products, of a block that is cut -inf where position says so.

    Of a query's place, the bits by which the lanes of a warp differ change sides, as in `hopper`.
    """
    if cut:
        columns = gl.arange(0, BM, gl.SliceLayout(0, LOGITS))
        of_lane, place = begin + (columns & 6)[None, :], (columns & -7)[None, :]
        if RIGHT:
            s = gl.where(place >= least[:, None] - of_lane, s, NOTHING)
        if LEFT:
            s = gl.where(place <= most[:, None] - of_lane, s, NOTHING)
    return s


@gluon.jit
def _of_rows(known, WHICH: gl.constexpr, LOGITS: gl.constexpr):
    """top (0), slope (1) or the exponent of 1 / total (3) of a block of queries: more than one at once would take
    registers that there are not.
    """
    COLUMN: gl.constexpr = gl.DistributedLinearLayout(
        [[1, 0], [8, 0], [16, 0], [32, 0]], [[2, 0], [4, 0], [0, 0], [0, 0], [0, 0]], [[0, 0], [0, 0]], [], [BM, 1]
    )
    x = known.reshape((BM, 4)).slice(WHICH, 1, dim=1).load(COLUMN).reshape((BM,))
    return gl.convert_layout(x, gl.SliceLayout(0, LOGITS), assert_trivial=True)


@gluon.jit
def _summed(words, block, acc, dtype: gl.constexpr, D: gl.constexpr):
    """Ask for the sum of a block's rows, by such words."""
    rows = operand(words, acc, dtype, BM)
    return warpgroup_mma(rows, block.reshape((BM, D)), acc, is_async=True)


@gluon.jit
def _products(rows, block, LOGITS: gl.constexpr, D: gl.constexpr):
    """Ask for the products of keys or values with a block."""
    zeros = gl.zeros((ROWS, BM), gl.float32, LOGITS)
    return warpgroup_mma(rows, block.reshape((BM, D)).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _turn(
    WHICH: gl.constexpr, count, begin, cut, keys, values, queries_of, outs_of, known_of, biases_of, loaded, done, dk,
    dv, ds, least, most, factor, dtype: gl.constexpr, LOGITS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, BIAS: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """dk of the block before (not FIRST), and all but dk of the block with this count, which begins at a query."""
    at, before = count % STAGES, (count + STAGES - 1) % STAGES
    mbarrier.wait(loaded.index(at), (count // STAGES) & 1)
    s = _products(keys, queries_of.index(at), LOGITS, D)
    if not FIRST:
        dk = _summed(ds, queries_of.index(before), dk, dtype, D)
    dp = _products(values, outs_of.index(at), LOGITS, D)
    s = warpgroup_mma_wait(1 if FIRST else 2, deps=(s,))
    m = _of_rows(known_of.index(at), 0, LOGITS)
    if BIAS:
        its = biases_of.index(at * GROUPS + WHICH).reshape((BM, ROWS)).permute((1, 0))
        s = s * factor + its.load(LOGITS).to(gl.float32)
    if LEFT or RIGHT:
        s = _masked(s, cut, begin, least, most, LOGITS, LEFT, RIGHT)
    if BIAS:  # m is apart: beside large biases 1 / total would drown
        p = gl.exp2((s - m[None, :]) * LOG2E + _of_rows(known_of.index(at), 3, LOGITS)[None, :])
    else:
        p = gl.exp2(s * factor - m[None, :])
    weights = in_words(p, dtype, BM)
    dv = _summed(weights, outs_of.index(at), dv, dtype, D)
    if FIRST:
        dp = warpgroup_mma_wait(1, deps=(dp,))
    else:
        dp, dk, ds = warpgroup_mma_wait(1, deps=(dp, dk, ds))
        mbarrier.arrive(done.index(before), count=1)
    slope = _of_rows(known_of.index(at), 1, LOGITS)
    ds = in_words(p * (dp - slope[None, :]), dtype, BM)
    dv, weights = warpgroup_mma_wait(0, deps=(dv, weights))  # ptxas would serialise what runs on
    return dk, dv, ds


@gluon.jit
def _put(x, starts, here, spare, PIECES: gl.constexpr):
    """Store a piece of a group's rows as whole lines of memory, by way of shared memory."""
    lanes = gl.arange(0, PIECE, gl.SliceLayout(0, PIECES))
    spare.store(x)
    gl.store(starts[:, None] + lanes[None, :], spare.load(PIECES), mask=here)


@gluon.jit
def _put_rows(x, starts, here, spare, D: gl.constexpr, PIECES: gl.constexpr):
    """Store a group's rows."""
    if D == PIECE:
        _put(x, starts, here, spare, PIECES)
    else:
        left, right = x.reshape((ROWS, 2, PIECE)).permute((0, 2, 1)).split()
        _put(left, starts, here, spare, PIECES)
        _put(right, starts + PIECE, here, spare, PIECES)


@gluon.jit
def _of_item(spans, b, J, RUNS: gl.constexpr):
    """Its spans."""
    if RUNS:
        spans += b.to(gl.int64) * J * 2
    return spans


@gluon.jit
def _reach_of(spans, rows, J, low, high, LEFT: gl.constexpr, RIGHT: gl.constexpr, RUNS: gl.constexpr):
    """The first and the last query that see keys; neither goes down from key to key."""
    least, most = rows - high, rows - low
    if RUNS:
        begin = gl.load(spans + rows * 2, mask=rows < J, other=0)
        last = gl.load(spans + rows * 2 + 1, mask=rows < J, other=0) - 1
        least, most = gl.maximum(least, begin) if RIGHT else begin, gl.minimum(most, last) if LEFT else last
    return least, most


@gluon.jit
def _sum(
    WHICH: gl.constexpr, keys_of, values_of, queries_of, outs_of, known_of, biases_of, spares, kv_loaded, kv_done,
    loaded, done, N, H, I, J, blocks, together, low, high, factor, scale, spans, order, runs, dk_of, dv_of,
    GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, BNHD: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr, RUNS: gl.constexpr, BIAS: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    """dk and dv of 64 keys of each tile."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    PIECES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    dtype: gl.constexpr = dk_of.dtype.element_ty
    ROOM: gl.constexpr = D < 128  # in the registers
    BEFORE: gl.constexpr = RIGHT or RUNS  # whether a tile's first, or last, blocks of queries are cut
    BEHIND: gl.constexpr = LEFT or RUNS
    OWN: gl.constexpr = ROOM and (BEFORE or BEHIND)
    HK = H // GROUP
    count = 0  # of blocks so far
    for tile in range(_tiles(runs, blocks, N, RUNS)):
        n, block = _tile(order, tile, N, blocks, together, RUNS)
        b, hk = _item_and_head(n, N, HK, SHARED)
        its = _of_item(spans, b, J, RUNS)
        start, stop = _loaded(its, block, I, J, low, high, LEFT, RIGHT, RUNS)
        if OWN:  # without what only the other group sees
            begin, whole_from, whole_to, end = _seen_by(
                its, block * GROUPS + WHICH, I, J, low, high, ROWS, LEFT, RIGHT, RUNS
            )  # fmt: skip
            seen = begin < end
            begin = gl.minimum(begin, stop - 1)
            end = gl.maximum(end, begin + 1)
        else:
            begin, whole_from, whole_to, end = _seen_by(
                its, block, I, J, low, high, GROUPS * ROWS, LEFT, RIGHT, RUNS
            )  # fmt: skip
            seen = begin < end
            begin, end = start, stop
        first = (block * GROUPS + WHICH) * ROWS
        rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, LOGITS))
        least, most = _reach_of(its, rows, J, low, high, LEFT, RIGHT, RUNS)
        dk = gl.zeros((ROWS, D), gl.float32, SUMS)
        dv = gl.zeros((ROWS, D), gl.float32, SUMS)
        keys = keys_of.index(WHICH).reshape((ROWS, D))
        values = values_of.index(WHICH).reshape((ROWS, D))
        mbarrier.wait(kv_loaded.index(0), tile & 1)
        if ROOM:
            keys = keys.load(gl.DotOperandLayout(0, LOGITS, 2))
            values = values.load(gl.DotOperandLayout(0, LOGITS, 2))
            mbarrier.arrive(kv_done.index(0), count=1)
        for member in range(GROUP):
            if OWN:
                _give_back(count, begin - start, loaded, done, STAGES)
            ds = in_words(gl.zeros((ROWS, BM), gl.float32, LOGITS), dtype, BM)
            behind = count - start
            dk, dv, ds = _turn(
                WHICH, behind + begin, begin * BM, (begin < whole_from) | (begin >= whole_to), keys, values, queries_of,
                outs_of, known_of, biases_of, loaded, done, dk, dv, ds, least, most, factor, dtype, LOGITS, D, STAGES,
                BEHIND, BEFORE, BIAS, True,
            )  # fmt: skip
            for turn in range(begin + 1, end):
                dk, dv, ds = _turn(
                    WHICH, behind + turn, turn * BM, (turn < whole_from) | (turn >= whole_to), keys, values, queries_of,
                    outs_of, known_of, biases_of, loaded, done, dk, dv, ds, least, most, factor, dtype, LOGITS, D,
                    STAGES, BEHIND, BEFORE, BIAS, False,
                )  # fmt: skip
            if not ROOM and member == GROUP - 1:
                mbarrier.arrive(kv_done.index(0), count=1)
            at = (behind + end - 1) % STAGES
            dk = _summed(ds, queries_of.index(at), dk, dtype, D)
            dk, ds = warpgroup_mma_wait(0, deps=(dk, ds))
            mbarrier.arrive(done.index(at), count=1)
            if OWN:
                _give_back(behind + end, stop - end, loaded, done, STAGES)
            count += stop - start

        if BEFORE or BEHIND:  # what none sees gets nothing, not even what a NaN left
            dk = gl.where(seen, dk, 0.0)
            dv = gl.where(seen, dv, 0.0)
        places = first + gl.arange(0, ROWS, gl.SliceLayout(1, PIECES))
        if BNHD:
            starts = ((b.to(gl.int64) * J + places) * HK + hk) * D
        else:
            starts = ((b * HK + hk).to(gl.int64) * J + places) * D
        here, spare = (places < J)[:, None], spares.index(WHICH)
        _put_rows(dv.to(dtype), dv_of + starts, here, spare, D, PIECES)
        _put_rows((dk * scale).to(dtype), dk_of + starts, here, spare, D, PIECES)


@gluon.jit
def long_key_gradients(
    q, k, v, dout, known, bias, spans, order, runs, old_dk, old_dv, N, H, I, J, blocks, together, low, high, factor,
    scale, dk, dv,
    GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, QB: gl.constexpr, QH: gl.constexpr, KB: gl.constexpr,
    KH: gl.constexpr, VB: gl.constexpr, VH: gl.constexpr, DOB: gl.constexpr, DOH: gl.constexpr, BB: gl.constexpr,
    BH: gl.constexpr, BNHD: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, RUNS: gl.constexpr,
    BIAS: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    """dk and dv, as `gradients.key_gradients` makes them.

    q, k, v, dout: descriptors of (b, h or hk, I or J, D), which load 64 rows of a head; known: of (b h, P, 4).
    bias: BIAS: a descriptor of (b, h, I, J), which loads 64 queries of 64 keys. SHARED: all items have the same.
    spans, order, runs: what `find_runs` and `order_tiles` say (RUNS) of segments; where these are no runs nothing is
    written, and dk and dv stay what they are: the memory of old_dk and old_dv.
    N: items times heads of keys. blocks: of keys, in J. together: of how many heads the first keys come first.
    low, high: key j is seen by query t where low <= j - t (LEFT), and j - t <= high (RIGHT).
    QB, QH, KB, KH, VB, VH, DOB, DOH, BB, BH: 1, or 0 where all items or heads have the same.
    """
    dtype: gl.constexpr = q.dtype
    keys_of = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, ROWS, D], k.layout)
    values_of = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, ROWS, D], v.layout)
    queries_of = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BM, D], q.layout)
    outs_of = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BM, D], dout.layout)
    known_of = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BM, 4], known.layout)
    biases_of = known_of
    if BIAS:
        biases_of = gl.allocate_shared_memory(bias.dtype, [STAGES * GROUPS, 1, 1, BM, ROWS], bias.layout)
    spares = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, PIECE], gl.NVMMASharedLayout(128, 16, 2))
    # each an allocation of its own, as in `narrow`
    kv_loaded = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    kv_done = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_loaded.index(0), count=1)
    mbarrier.init(kv_done.index(0), count=GROUPS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(loaded.index(stage), count=1)
        mbarrier.init(done.index(stage), count=GROUPS)
    gl.warp_specialize(
        [
            (_sum, (
                gl.constexpr(0), keys_of, values_of, queries_of, outs_of, known_of, biases_of, spares, kv_loaded,
                kv_done, loaded, done, N, H, I, J, blocks, together, low, high, factor, scale, spans, order, runs, dk,
                dv, GROUP, D, STAGES, BNHD, LEFT, RIGHT, RUNS, BIAS, SHARED,
            )),
            (_sum, (
                gl.constexpr(1), keys_of, values_of, queries_of, outs_of, known_of, biases_of, spares, kv_loaded,
                kv_done, loaded, done, N, H, I, J, blocks, together, low, high, factor, scale, spans, order, runs, dk,
                dv, GROUP, D, STAGES, BNHD, LEFT, RIGHT, RUNS, BIAS, SHARED,
            )),
            (_load, (
                q, k, v, dout, known, bias, spans, order, runs, N, H, I, J, blocks, together, low, high, keys_of,
                values_of, queries_of, outs_of, known_of, biases_of, kv_loaded, kv_done, loaded, done, GROUP, D, STAGES,
                QB, QH, KB, KH, VB, VH, DOB, DOH, BB, BH, LEFT, RIGHT, RUNS, BIAS, SHARED,
            )),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip

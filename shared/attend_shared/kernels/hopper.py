"""Plain attention forward on compute capability 9.0, in Gluon: the same for torch and JAX.

Two groups of four warps have 64 queries each and share the keys and values that a third group loads. Each starts the
product of the next block of keys and the sum of values of this one at once, and makes the exponentials of the next
while the sum of values runs. Triton's own compiler waits for every product where it stands. Keys and values come by
tensor descriptors, which are made on the host: one thread asks for a block, and the chip moves it.

References:
    Shah, Bikshandi, Zhang, Thakkar, Ramani, Dao: FlashAttention-3 (2024), whose roles of warps and order these are.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from attend_shared.kernels import plan

LN2 = gl.constexpr(0.6931471805599453)
NOTHING = gl.constexpr(float("-inf"))
PADDED = gl.constexpr(plan.PADDED)
ROWS = gl.constexpr(64)  # of a group of warps


def block_layout(block: tuple[int, ...]) -> gl.NVMMASharedLayout:
    """How a block that a descriptor loads, of numbers of 2 bytes, lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)


@gluon.jit
def _load(
    k, v, b, h, stop, keys_of, values_of, bars, D: gl.constexpr, BN: gl.constexpr, KB: gl.constexpr, KH: gl.constexpr,
    VB: gl.constexpr, VH: gl.constexpr, STAGES_K: gl.constexpr, STAGES_V: gl.constexpr,
):  # fmt: skip
    """Block after block of keys and of values, each into the oldest place that both groups have done with."""
    for turn in range(stop):
        at = turn % STAGES_K
        mbarrier.wait(bars.index(STAGES_K + at), (turn // STAGES_K) & 1 ^ 1)
        loaded = bars.index(at)
        mbarrier.expect(loaded, BN * D * 2)
        tma.async_copy_global_to_shared(k, [b * KB, h * KH, turn * BN, 0], loaded, keys_of.index(at))
        at = turn % STAGES_V
        mbarrier.wait(bars.index(2 * STAGES_K + STAGES_V + at), (turn // STAGES_V) & 1 ^ 1)
        loaded = bars.index(2 * STAGES_K + at)
        mbarrier.expect(loaded, BN * D * 2)
        tma.async_copy_global_to_shared(v, [b * VB, h * VH, turn * BN, 0], loaded, values_of.index(at))


@gluon.jit
def _weights(
    s, m, total, begin, rows, high, factor, LOGITS: gl.constexpr, SUMS: gl.constexpr, BN: gl.constexpr,
    dtype: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    """Products to weights, not yet over their total; what the sums so far shrink by; largest logit and total."""
    if CUT:
        keys = begin + gl.arange(0, BN, gl.SliceLayout(0, LOGITS))[None, :]
        s = gl.where(keys - rows[:, None] <= high, s, NOTHING)
    new = gl.maximum(m, gl.max(s, 1) * factor)
    shift = gl.where(new == NOTHING, 0.0, new)
    p = gl.exp2(s * factor - shift[:, None])
    shrink = gl.exp2(m - shift)
    total = total * shrink + gl.sum(p, 1)
    p = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, SUMS, 2))
    return p, gl.convert_layout(shrink, gl.SliceLayout(1, SUMS)), new, total


@gluon.jit
def _turn(
    turn, queries, keys_of, values_of, spare, bars, acc, p, m, total, rows, high, factor, LOGITS: gl.constexpr,
    SUMS: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, CUT: gl.constexpr, STAGES_K: gl.constexpr,
    STAGES_V: gl.constexpr,
):  # fmt: skip
    """The sum of values of this block, and the weights of the next."""
    ahead = turn + 1
    at_k, at_v = ahead % STAGES_K, turn % STAGES_V
    mbarrier.wait(bars.index(at_k), (ahead // STAGES_K) & 1)
    zeros = gl.zeros((ROWS, BN), gl.float32, LOGITS)
    keys = keys_of.index(at_k).reshape((BN, D)).permute((1, 0))
    s = warpgroup_mma(queries, keys, zeros, use_acc=False, is_async=True)
    mbarrier.wait(bars.index(2 * STAGES_K + at_v), (turn // STAGES_V) & 1)
    acc = warpgroup_mma(p, values_of.index(at_v).reshape((BN, D)), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(bars.index(STAGES_K + at_k), count=1)
    later, shrink, m, total = _weights(s, m, total, ahead * BN, rows, high, factor, LOGITS, SUMS, BN, p.dtype, CUT)
    # ptxas would wait for the sum of values before the exponentials; past a barrier with a store before it, it can't.
    spare.store(total)
    gl.thread_barrier()
    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    mbarrier.arrive(bars.index(2 * STAGES_K + STAGES_V + at_v), count=1)
    return acc * shrink[:, None], later, m, total


@gluon.jit
def _attend(
    WHICH: gl.constexpr, queries_of, keys_of, values_of, spares, bars, first, n, H, I, P, high, factor,
    whole, stop, out, lse, top, D: gl.constexpr, BN: gl.constexpr, BNHD: gl.constexpr, RIGHT: gl.constexpr,
    STAGES_K: gl.constexpr, STAGES_V: gl.constexpr,
):  # fmt: skip
    """out, lse and top of 64 queries."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    dtype: gl.constexpr = out.dtype.element_ty
    queries, spare = queries_of.index(WHICH), spares.index(WHICH)
    first += WHICH * ROWS
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, LOGITS))
    m = gl.full((ROWS,), NOTHING, gl.float32, gl.SliceLayout(1, LOGITS))
    total = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, LOGITS))
    acc = gl.zeros((ROWS, D), gl.float32, SUMS)
    mbarrier.wait(bars.index(0), 0)
    zeros = gl.zeros((ROWS, BN), gl.float32, LOGITS)
    s = warpgroup_mma(queries, keys_of.index(0).reshape((BN, D)).permute((1, 0)), zeros, use_acc=False)
    mbarrier.arrive(bars.index(STAGES_K), count=1)
    p, _, m, total = _weights(s, m, total, 0, rows, high, factor, LOGITS, SUMS, BN, dtype, RIGHT)
    for turn in range(whole - 1):
        acc, p, m, total = _turn(
            turn, queries, keys_of, values_of, spare, bars, acc, p, m, total, rows, high, factor, LOGITS, SUMS, D,
            BN, False, STAGES_K, STAGES_V,
        )  # fmt: skip
    if RIGHT:
        for turn in range(gl.maximum(whole - 1, 0), stop - 1):
            acc, p, m, total = _turn(
                turn, queries, keys_of, values_of, spare, bars, acc, p, m, total, rows, high, factor, LOGITS, SUMS,
                D, BN, True, STAGES_K, STAGES_V,
            )  # fmt: skip
    turn = stop - 1
    mbarrier.wait(bars.index(2 * STAGES_K + turn % STAGES_V), (turn // STAGES_V) & 1)
    acc = warpgroup_mma(p, values_of.index(turn % STAGES_V).reshape((BN, D)), acc)

    empty = total == 0
    total = gl.where(empty, 1.0, total)
    shrink = gl.convert_layout(1 / total, gl.SliceLayout(1, SUMS))
    seen = m + gl.log2(total)
    b, head = n // H, n % H
    inside = rows < I
    gl.store(top + n.to(gl.int64) * P + rows, gl.where(empty, float("inf"), seen), mask=inside)
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
    q, k, v, H, I, J, P, qb, qh, high, factor, out, lse, top, inverse, exact,
    GROUP: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, UNIT: gl.constexpr, QN: gl.constexpr, KB: gl.constexpr,
    KH: gl.constexpr, VB: gl.constexpr, VH: gl.constexpr, BNHD: gl.constexpr, RIGHT: gl.constexpr,
    STAGES_K: gl.constexpr, STAGES_V: gl.constexpr,
):  # fmt: skip
    """out, lse and top, as `attention.forward` makes them (inverse and exact stay unwritten); J a multiple of BN.

    k, v: descriptors of (b, hk, J, D), which load a block of one head.
    KB, KH, VB, VH: 1, or 0 where all items or heads have the same keys or values.
    RIGHT: key j is seen by query t where j - t <= high.
    """
    turns = gl.num_programs(0)
    block = turns - 1 - gl.program_id(0) if RIGHT else gl.program_id(0)  # the longest rows first
    n = gl.program_id(1)
    b, h = (n // H).to(gl.int64), (n % H).to(gl.int64)
    first = block * (2 * ROWS)
    stop = J // BN
    whole = stop
    if RIGHT:
        stop = gl.maximum(gl.minimum(stop, (gl.maximum(first + 2 * ROWS + high, 0) + BN - 1) // BN), 1)
        whole = gl.minimum(whole, gl.maximum(first + high + 1, 0) // BN)

    keys_of = gl.allocate_shared_memory(q.dtype.element_ty, [STAGES_K, 1, 1, BN, D], k.layout)
    values_of = gl.allocate_shared_memory(q.dtype.element_ty, [STAGES_V, 1, 1, BN, D], v.layout)
    queries_of = gl.allocate_shared_memory(
        q.dtype.element_ty, [2, ROWS, D], gl.NVMMASharedLayout.get_default_for([ROWS, D], q.dtype.element_ty)
    )
    spares = gl.allocate_shared_memory(gl.float32, [2, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # of keys: loaded, done with; of values: loaded, done with
    bars = gl.allocate_shared_memory(gl.int64, [2 * (STAGES_K + STAGES_V), 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES_K):
        mbarrier.init(bars.index(stage), count=1)
        mbarrier.init(bars.index(STAGES_K + stage), count=2)
    for stage in gl.static_range(STAGES_V):
        mbarrier.init(bars.index(2 * STAGES_K + stage), count=1)
        mbarrier.init(bars.index(2 * STAGES_K + STAGES_V + stage), count=2)

    PLACES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    local = gl.arange(0, ROWS, gl.SliceLayout(1, PLACES))
    q += (b * qb + h * qh) * UNIT + first.to(gl.int64) * QN
    for group in gl.static_range(2):
        rows = group * ROWS + local
        async_copy.async_copy_global_to_shared(
            queries_of.index(group), q + rows[:, None] * QN + gl.arange(0, D, gl.SliceLayout(0, PLACES))[None, :],
            mask=(first + rows < I)[:, None],
        )  # fmt: skip
    async_copy.commit_group()
    async_copy.wait_group(0)
    gl.warp_specialize(
        [
            (_attend, (
                gl.constexpr(0), queries_of, keys_of, values_of, spares, bars, first, n, H, I, P, high, factor,
                whole, stop, out, lse, top, D, BN, BNHD, RIGHT, STAGES_K, STAGES_V,
            )),
            (_attend, (
                gl.constexpr(1), queries_of, keys_of, values_of, spares, bars, first, n, H, I, P, high, factor,
                whole, stop, out, lse, top, D, BN, BNHD, RIGHT, STAGES_K, STAGES_V,
            )),
            (_load, (
                k, v, n // H, n % H // GROUP, stop, keys_of, values_of, bars, D, BN, KB, KH, VB, VH, STAGES_K, STAGES_V,
            )),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip
    if block == turns - 1:  # rows behind the last see nothing
        ALONG: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        behind = I + gl.arange(0, PADDED, ALONG)
        nothing = gl.full((PADDED,), float("inf"), gl.float32, ALONG)
        gl.store(top + n.to(gl.int64) * P + behind, nothing, mask=behind < P)

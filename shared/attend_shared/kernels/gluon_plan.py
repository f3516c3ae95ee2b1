"""Which calls the kernels in Gluon take, and their launches: long rows of half precision, with little else.

Programs stay, one a multiprocessor, and go over tiles; in which order is decided here too.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from attend_shared.call import FAR, Call
from attend_shared.kernels.arguments import Shared, is_exact
from attend_shared.kernels.launch import Blocks, Launch, Layout, Output, Strides, Tile, cdiv, far
from attend_shared.kernels.sizes import INTERPRETED, MANY, PERSISTENT

PLAIN = Tile(128, 128, 4, 2)  # of hopper.plain: queries of a program, warps of each group, stages of keys and of values
PLAIN_KEYS = 1024  # from which on it is faster: there is one program of it a multiprocessor, whose start nothing hides
WIDE = 512  # keys of a window, from which on it is faster: a tile costs it as much as 4 blocks of keys do
LONG = 8192  # keys, beyond which rows are so long that a program has one head: few programs end apart
MANY_TILES = 2**12  # too many to go through them one by one when a call is planned
NEIGHBOURS = 2**16, 2**17, 2**18  # keys of the heads whose longest rows come first; the L2 cache holds twice the first
SHORT_TANH = 50.0  # of softcaps up to which tanh is that of the chip; see docs/kernel-notes.md
NARROW = Tile(192, 128, 4, 3)  # of narrow.narrow, the same
NARROW_KEYS = 2048  # the same
LONG_KEYS = Tile(64, 128, 4, 4)  # of keys.long_key_gradients, the same
LONG_KEYS_SEEN = 512  # by how many queries, on average, from which on it is faster
LONG_KEYS_WIDE = {64: 2048, 128: 1024}  # the same in a window, by d
LONG_KEYS_TILES = 67  # from which on half as many keys a program would not use more multiprocessors
TOGETHER = 1, 2, 3, 6, 11, 16, 22, 33  # heads of which the first tiles of keys come first: as many as are tried
LONG_QUERIES = {64: Tile(192, 64, 4, 4), 128: Tile(128, 64, 4, 5)}  # of queries.long_query_gradients, by d: the same
LONG_QUERIES_VALUES = 4  # blocks of values for which there is room
RANKED = 16  # tiles, by a program of order_tiles
RUN_PART, RUN_MANY = 128, 2048  # places of a program of find_runs, and at which it looks at a time beyond these
ORDERED = 128  # queries or keys of a tile in `order_tiles`; blocks of the others have half as many
DOCUMENTS = 2048  # keys, from which on kernels in Gluon take segments
ENOUGH = 120  # programs that go over tiles in that order, at least
LONG_QUERIES_KEYS = {64: (4096, 4096), 128: (1024, 2048)}  # the same, by d; where positions rule out some
LONG_QUERIES_WIDE = 1024  # keys of a window, from which on it is faster


@cache
def runs_gluon(capability: str) -> bool:
    """Whether a GPU of this compute capability runs them with the Triton that is here."""
    try:
        release = Version(version("triton")).release
    except PackageNotFoundError:
        return False
    return capability == "9.0" and release[:2] == (3, 6) and not INTERPRETED  # Gluon changes with each release


def is_plain(call: Call, layout: Layout) -> bool:
    """Whether `hopper.plain` makes the same, faster: nothing but a window and a softcap."""
    if _has_short_tanh(call):
        call = call._replace(softcap=None)
    return _is_long(call, layout, 128, PLAIN_KEYS, PLAIN) and _width(call) >= WIDE and call.sinks is None


def _has_short_tanh(call: Call) -> bool:
    """Whether tanh may be 2^-11 of itself off, and a weight SHORT_TANH times that: less than the budget of results in
    bfloat16, if not that of lse.
    """
    return call.softcap is not None and call.softcap <= SHORT_TANH and call.dtype == "bfloat16" and not call.return_lse


def _is_long(call: Call, layout: Layout, d: int, keys: int, size: Tile) -> bool:
    """Whether it has long rows of this size in whole blocks, and nothing but a window and sinks."""
    if call.j < keys or call.i < size.queries or call.j % size.keys or call.scale <= 0:
        return False
    return _is_bare(call, layout, d)


def _is_bare(call: Call, layout: Layout, d: int) -> bool:
    """Whether kernels in Gluon take it: rows of this size in half precision, and nothing but a window and sinks.

    Never by how arrays lie: then the bits would hang on it.
    """
    if not layout.gluon or not call.d == call.dv == d or call.dtype == "float32":
        return False
    if call.offset == "data" and (layout.offset or layout.at not in (0, call.j - call.i)):
        return False  # other numbers are data in JAX
    arrays = (call.mask, call.bias, call.softcap)
    return all(x is None for x in arrays) and not (call.segments or call.q_lengths or call.kv_lengths or call.dropout)


def _width(call: Call) -> int:
    """How many keys the window of a query has at most."""
    return call.j if call.left is None else call.left + 1 + (call.j if call.right is None else call.right)


def _several(**strides: Strides) -> dict[str, int]:
    """By name and axis: 0 where all items ("B") or heads ("H") are one in memory, else 1."""
    return {name + axis: min(step, 1) for name, of in strides.items() for axis, step in zip("BH", of, strict=False)}


def _heads_each(call: Call) -> int:
    """How many heads a program of `hopper.plain` has, whose keys it loads while it stores what the last one gave.

    As many as have the least to wait for: to begin costs a sixteenth of a tile, and programs go round together.
    """
    if call.left is None and call.j > LONG:
        return 1
    turns, heads = cdiv(call.i, PLAIN.queries), call.b * call.h
    return min((4, 2, 1), key=lambda each: cdiv(turns * cdiv(heads, each), PERSISTENT) * (16 * each + 1))


def plain(call: Call, shared: Shared, results: tuple[Output, ...]) -> Launch:
    """Of `hopper.plain`."""
    at, left, right, *_ = shared.rest
    q, k, v = shared.layout[:3]
    low, high = far(at - left), far(at + right)
    each = _heads_each(call)
    return Launch(
        "plain", (cdiv(call.i, PLAIN.queries), cdiv(call.b * call.h, each), 1),
        ("q", "k", "v"),
        (call.b * call.h, call.h, call.i, call.j, shared.rows, low, high, shared.factor, shared.cap or shared.factor),
        results,
        {"GROUP": call.h // call.hk, "D": call.d, "BN": PLAIN.keys, "EACH": each, **_several(Q=q, K=k, V=v),
         "BNHD": shared.bnhd, "SOFTCAP": call.softcap is not None, "LEFT": call.left is not None,
         "RIGHT": call.right is not None, "STAGES_K": PLAIN.stages, "STAGES_V": PLAIN.stages},
        PLAIN.warps, 1, "hopper",
        {"q": _blocks(call, q, call.h, call.i, PLAIN.queries // 2), "k": _blocks(call, k, call.hk, call.j, PLAIN.keys),
         "v": _blocks(call, v, call.hk, call.j, PLAIN.keys)},
    )  # fmt: skip


def is_narrow(call: Call, layout: Layout) -> bool:
    """Whether `narrow.narrow` makes the same, faster: as `_is_plain`, of rows of 64, sinks or not."""
    return _is_long(call, layout, 64, NARROW_KEYS, NARROW) and call.left is None and call.sinks != "float64"


def narrow(call: Call, shared: Shared, results: tuple[Output, ...]) -> Launch:
    """Of `narrow.narrow`."""
    at, _, right, *_ = shared.rest
    high = FAR if call.right is None else far(at + right)
    q, k, v = shared.layout[:3]
    heads, blocks = call.b * call.h, cdiv(call.i, NARROW.queries)
    return Launch(
        "narrow", (min(PERSISTENT, heads * blocks), 1, 1), ("q", "k", "v", "sinks" if call.sinks else None),
        (heads, call.h, call.i, call.j, shared.rows, blocks, _neighbours(heads, blocks, call.j, high), high,
         shared.factor), results,
        {"GROUP": call.h // call.hk, **_several(Q=q, K=k, V=v), "BNHD": shared.bnhd,
         "SINKS": call.sinks is not None, "EXACT": is_exact(call)},
        NARROW.warps, 1, "narrow",
        {"q": _blocks(call, q, call.h, call.i, NARROW.queries // 3),
         "k": _blocks(call, k, call.hk, call.j, NARROW.keys), "v": _blocks(call, v, call.hk, call.j, NARROW.keys)},
    )  # fmt: skip


def takes_long_queries(call: Call, layout: Layout) -> bool:
    """Whether `queries.long_query_gradients` makes dq, faster: nothing but a window or sinks, causal rows of 64."""
    d = call.d
    if d not in LONG_QUERIES or (d == 64 and (call.left is not None or call.right is None)):
        return False
    wide = call.left is None or _width(call) >= LONG_QUERIES_WIDE
    if call.segments:
        if not _is_ordered(call, layout, call.h):
            return False
        call = call._replace(segments=False)
    return wide and _is_long(call, layout, d, LONG_QUERIES_KEYS[d][call.positional], LONG_QUERIES[d])


def _is_ordered(call: Call, layout: Layout, heads: int) -> bool:
    """Whether tiles have an order that is made on the device, where segments say how many blocks each of them visits:
    there is enough to do, of rows of 128.
    """
    programs, _ = _rounds(heads, cdiv(call.i, ORDERED))
    return call.d == ORDERED and layout.one_id and call.j >= DOCUMENTS and programs >= ENOUGH


def long_queries(call: Call, shared: Shared, dout: Strides) -> Launch:
    """Of `queries.long_query_gradients`."""
    at, left, right, *_ = shared.rest
    low = -FAR if call.left is None else far(at - left)
    high = FAR if call.right is None else far(at + right)
    (q, k, v), size, rows = shared.layout[:3], LONG_QUERIES[call.d], 64
    heads, blocks = call.b * call.h, cdiv(call.i, size.queries)
    sizes = tuple(1 << n for n in range(heads.bit_length()))
    together = _neighbours(heads, blocks, call.j, high, size, low, sizes, 1.05)
    segments = "q_segment_ids", "kv_segment_ids", "bounds", "query_order"
    programs = _rounds(call.h, blocks)[0] if call.segments else min(PERSISTENT, heads * blocks)
    return Launch(
        "long_query_gradients", (programs, 1, 1),
        ("q", "k", "v", "dout", "known", *(segments if call.segments else (None,) * 4)),
        (heads, call.h, call.i, call.j, shared.rows, blocks, together, low, high, shared.factor, call.scale),
        (Output("dq", shared.shape(call.h, call.i, call.d), call.dtype),),
        {"GROUP": call.h // call.hk, "D": call.d, "BN": size.keys, "GROUPS": size.queries // rows,
         "G": shared.ahead.group, **_several(Q=q, K=k, V=v, DO=dout), "BNHD": shared.bnhd,
         "LEFT": call.left is not None, "RIGHT": call.right is not None, "SEGMENTS": call.segments,
         "STAGES_K": size.stages, "STAGES_V": LONG_QUERIES_VALUES},
        size.warps, 1, "queries",
        {"q": _blocks(call, q, call.h, call.i, rows), "k": _blocks(call, k, call.hk, call.j, size.keys),
         "v": _blocks(call, v, call.hk, call.j, size.keys), "dout": _blocks(call, dout, call.h, call.i, rows)},
    )  # fmt: skip


def order(call: Call, shared: Shared, queries: bool, keys: bool) -> tuple[Launch, ...]:
    """What makes the orders of tiles of queries, of keys or of both, where segments say how many blocks each visits. An
    array (b * heads * tiles,): the k-th tile of program p is [k * programs + p], which says n * tiles + tile. And, for
    keys, where runs of ids begin and end, and whether no id has two.
    """
    at, left, right, *_ = shared.rest
    low, high = -FAR if call.left is None else far(at - left), FAR if call.right is None else far(at + right)
    size, block, g, parts = ORDERED, ORDERED // 2, shared.ahead.group, cdiv(call.j, RUN_PART)
    tiles = cdiv(call.i, size)
    of_keys, of_queries = call.hk if keys else 0, call.h if queries else 0
    unused = Output("unused", (1,), "int32", False)
    found = Launch(
        "find_runs", (parts, call.b, 1), ("q_segment_ids",), (call.j,),
        (Output("spans", (call.b, call.j, 2), "int32"), Output("falls", (call.b, parts), "int32")),
        {"PART": RUN_PART, "MANY": RUN_MANY}, 4, 1, "bounds",
    )  # fmt: skip
    order = Launch(
        "order_tiles", (cdiv(tiles, RANKED), of_queries + of_keys, call.b), ("bounds", "falls" if keys else None),
        (cdiv(call.i, g), parts, tiles, cdiv(call.j, block), of_queries, _rounds(call.h, tiles)[1],
         _rounds(call.hk, tiles)[1], low, high),
        (Output("query_order", (call.b * call.h * tiles,), "int32") if queries else unused,
         *((Output("key_order", (call.b * call.hk * tiles,), "int32"), Output("runs", (1,), "int32"))
           if keys else (unused,) * 2)),
        {"SIZE": size, "BLOCK": block, "G": g, "KEYS": keys, "PART": RANKED, "ITEMS": RANKED, "MANY": MANY}, 4, 1,
        "bounds",
    )  # fmt: skip
    return (found, order) if keys else (order,)


@cache
def _rounds(heads: int, tiles: int) -> tuple[int, int]:
    """How many programs go over the tiles of an item whose heads have so many, and of how many heads the tiles are
    ordered together, so that programs have as many places, and `order_tiles` can turn the order from run to run.
    """
    found = []
    for together in range(1, heads + 1):
        places, runs = together * tiles, heads // together
        if heads % together == 0 == places % runs:
            programs = next(n for n in range(min(places, PERSISTENT), 0, -1) if places % n == 0)
            found.append((programs, -together))
    programs, together = max(found)
    return programs, -together


def _neighbours(
    heads: int, blocks: int, j: int, high: int, size: Tile = NARROW, low: int = -FAR, sizes: tuple[int, ...] = (),
    slack: float = 1.03,
) -> int:  # fmt: skip
    """Of how many heads the longest rows come first: the fewest that leave no program much more than others.

    What few heads read is still in the L2 cache when it is read again; of many, programs have shares more alike. sizes,
    slack: what there is to choose from, in order, and what is not much.
    """
    most = j // size.keys
    sizes = sizes or tuple(max(2, keys // j) for keys in NEIGHBOURS)
    costs = []
    for n in range(blocks):
        start = max(0, n * size.queries + low) // size.keys
        costs.append(1 + max(1, min(most, cdiv(max(0, (n + 1) * size.queries + high), size.keys)) - start))
    if costs[0] == costs[-1] or heads * blocks > MANY_TILES:
        return 2 if costs[0] == costs[-1] else sizes[0]
    found = {}
    for together in sizes:
        shares = [0] * PERSISTENT
        runs = (min(together, heads - first) for first in range(0, heads, together))
        order = (cost for run in runs for cost in costs[::-1] for _ in range(run))
        for n, cost in enumerate(order):
            turn, at = divmod(n, PERSISTENT)
            shares[PERSISTENT - 1 - at if turn % 2 else at] += cost
        found[together] = max(shares)
    return min(together for together, share in found.items() if share <= slack * min(found.values()))


def takes_long_keys(call: Call, layout: Layout) -> bool:
    """Whether `keys.long_key_gradients` makes dk and dv, faster: nothing but a window, sinks and, of rows of 64, a
    bias of 16 bits for each query and key.
    """
    bare = call._replace(segments=False, bias=None)
    if call.d not in LONG_KEYS_WIDE or not _is_bare(bare, layout, call.d):
        return False
    if call.bias is not None:  # which a descriptor is to load
        whole = call.bias[2:] == (call.i, call.j) and call.bias_dtype in ("float16", "bfloat16")
        if call.d != 64 or call.segments or call.j % 8 or not whole:
            return False
    elif call.scale <= 0 and (call.positional or call.segments):  # what is cut would be +inf or NaN
        return False
    if call.segments and not _is_ordered(call, layout, call.hk):
        return False
    seen, least = call.i, LONG_KEYS_SEEN  # by queries, a key
    if call.left is not None and call.right is not None:
        seen, least = min(seen, call.left + call.right + 1), LONG_KEYS_WIDE[call.d]
    elif call.left is not None or call.right is not None:
        seen //= 2
    few = call.b * call.hk * cdiv(call.j, LONG_KEYS.keys) < LONG_KEYS_TILES
    return not few and call.j >= LONG_KEYS.keys and seen >= least


def long_keys(call: Call, shared: Shared, dout: Strides) -> Launch:
    """Of `keys.long_key_gradients`."""
    at, left, right, *_ = shared.rest
    low, high = far(at - left), far(at + right)
    (q, k, v), size, group = shared.layout[:3], LONG_KEYS, call.h // call.hk
    heads, blocks, most = call.b * call.hk, cdiv(call.j, size.keys), cdiv(call.i, size.queries)
    costs = []
    for n in range(blocks):
        start = 0 if call.right is None else max(0, n * size.keys - high) // size.queries
        stop = most if call.left is None else min(most, cdiv(max(0, (n + 1) * size.keys - low), size.queries))
        costs.append(2 + group * max(1, stop - start))  # to begin and to end is as much as two blocks
    programs, together = _rounds(call.hk, blocks) if call.segments else _shares(heads, costs)
    segments = "spans", "key_order", "runs", "dk", "dv"
    of_bias, shape = shared.layout.bias or (0, 0, 0, 0), (call.b, call.h, call.i, call.j)
    described = {} if call.bias is None else {"bias": _described(shape, of_bias, (size.queries, size.keys // 2))}
    return Launch(
        "long_key_gradients", (programs, 1, 1),
        ("q", "k", "v", "dout", "known", "bias" if call.bias else None,
         *(segments if call.segments else (None,) * 5)),
        (heads, call.h, call.i, call.j, blocks, together, low, high, shared.factor, call.scale),
        (Output("dk", shared.shape(call.hk, call.j, call.d), call.dtype),
         Output("dv", shared.shape(call.hk, call.j, call.d), call.dtype)),
        {"GROUP": group, "D": call.d, "STAGES": size.stages, **_several(Q=q, K=k, V=v, DO=dout, B=of_bias),
         "BNHD": shared.bnhd, "LEFT": call.left is not None, "RIGHT": call.right is not None, "RUNS": call.segments,
         "BIAS": call.bias is not None, "SHARED": call.bias is not None and call.bias[0] < call.b},
        size.warps, 1, "keys",
        {"q": _blocks(call, q, call.h, call.i, size.queries), "k": _blocks(call, k, call.hk, call.j, size.keys // 2),
         "v": _blocks(call, v, call.hk, call.j, size.keys // 2),
         "dout": _blocks(call, dout, call.h, call.i, size.queries),
         "known": Blocks((call.b * call.h, shared.rows, 4), (4 * shared.rows, 4, 1), (1, size.queries, 4)),
         **described},
    )  # fmt: skip


def _shares(heads: int, costs: list[int]) -> tuple[int, int]:
    """How many programs go over the tiles of so many heads, and of how many heads the first tiles come first, so that
    no program has much more than others: costs, of the tiles of one head. Few heads, where that is as good: what they
    read is in the L2 cache.
    """
    tiles = heads * len(costs)
    fewest = cdiv(tiles, cdiv(tiles, PERSISTENT))  # with as many turns
    if tiles <= PERSISTENT or tiles > MANY_TILES or min(costs) == max(costs):
        return fewest, 1
    found = {}
    for together in (n for n in TOGETHER if n <= heads):
        runs = (min(together, heads - first) for first in range(0, heads, together))
        order = [cost for run in runs for cost in costs for _ in range(run)]
        for programs in (fewest, PERSISTENT):
            shares = [0] * programs
            for turn, n in enumerate(range(0, tiles, programs)):
                for at, cost in enumerate(order[n : n + programs]):
                    shares[programs - 1 - at if turn % 2 else at] += cost
            found[programs, together] = max(shares)
    least = min(found.values())
    return next(each for each, share in found.items() if share <= 1.01 * least)


def _blocks(call: Call, strides: Strides, heads: int, length: int, block: int) -> Blocks:
    """Rows as a descriptor has them."""
    return _described((call.b, heads, length, call.d), strides, (block, call.d))


def _described(shape: tuple[int, ...], strides: Strides, block: tuple[int, int]) -> Blocks:
    """Of items or heads that are one in memory one, for no stride may be 0."""
    sizes = [1 if stride == 0 else size for size, stride in zip(shape[:2], strides, strict=False)]
    steps = [stride or shape[3] for stride in strides[:3]]
    return Blocks((*sizes, *shape[2:]), (*steps, 1), (1, 1, *block))

"""What a call launches: kernels, grids, numbers and outputs as data, so that torch and JAX launch the same.

A plan is a list of `Launch`. A framework keeps a dictionary of arrays by name, runs the launches in order, and puts
each one's outputs into the dictionary. Names of inputs are those of `Inputs` and of earlier outputs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from packaging.version import Version

from attend_shared.call import FAR, Call
from attend_shared.philox import threshold

LOG2E = math.log2(math.e)
Strides = tuple[int, ...]


class Output(NamedTuple):
    """An array that a launch writes: whole, but for `listed`, of which nobody reads the rest. One that is an input as
    well is written where it is, or left: of the two launches that have it one writes it, which is found on the device.

    Attributes:
        name: in the dictionary of arrays.
        shape: contiguous.
        dtype: its plain name.
        used: whether it is written at all; where it is not, any place will do.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    used: bool = True


class Blocks(NamedTuple):
    """An array as a tensor descriptor has it, which loads a block of it at once.

    Attributes:
        shape, strides: its own, in elements.
        block: the shape of a block.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]


class Launch(NamedTuple):
    """One launch of a kernel: kernel[grid](*inputs, *numbers, *outputs, **constants).

    Attributes:
        kernel: its name.
        grid: how many programs along each axis.
        inputs: names of arrays; None where the call has no such array, and any will do.
        numbers: ints and floats (float32).
        outputs: what it writes.
        constants: what is fixed when it is compiled.
        warps, stages: num_warps and num_stages.
        module: where it is: "attention", "gradients", "dropout", "bounds", "sinks", "hopper", "narrow", "queries" or
            "keys".
        blocks: inputs that are given as tensor descriptors, by their names.
    """

    kernel: str
    grid: tuple[int, int, int]
    inputs: tuple[str | None, ...]
    numbers: tuple[int | float, ...]
    outputs: tuple[Output, ...]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    module: str = "attention"
    blocks: Mapping[str, Blocks] = {}

    @property
    def function(self) -> Any:
        """The kernel itself.

        Triton's launcher tells the compiler which numbers are multiples of 16, and jax-triton does not; what is laid
        out by that has another order of its sums. So neither does: kernels say it, of lengths, by `visits.told`.
        """
        found = getattr(import_module(f"attend_shared.kernels.{self.module}"), self.kernel)
        parameters = getattr(found, "params", ())  # the interpreter's has none
        for parameter in parameters[len(self.inputs) : len(self.inputs) + len(self.numbers)]:
            parameter.do_not_specialize_on_alignment = True
        return found

    @property
    def given(self) -> tuple[int | float, ...]:
        """The numbers as launchers get them: 1.0 is 1, which both fix when they compile; jax-triton fixes 1.0 too."""
        return tuple(1 if x == 1 else x for x in self.numbers)

    @property
    def in_place(self) -> dict[int, int]:
        """Which inputs are where which outputs are written."""
        return {self.inputs.index(each.name): n for n, each in enumerate(self.outputs) if each.name in self.inputs}

    @property
    def gluon(self) -> bool:
        """Whether it is in Gluon."""
        return self.module in ("hopper", "narrow", "queries", "keys")


class Layout(NamedTuple):
    """How the arrays of a call lie in memory: strides in elements, by the canonical axes, the last of q, k, v being 1.

    Attributes:
        q, k, v: (b, h, n).
        mask, bias: (b, h, i, j), 0 where an axis is 1; or None.
        offset: 0 where q_offset is a number (`at`), 1 where it is an array (), 2 where it is (b,).
        at: q_offset where it is a number.
        one_id: whether q_segment_ids and kv_segment_ids are the same array.
        capability: the compute capability of the GPU, such as "9.0": what tiles fit it, how float32 is multiplied.
        gluon: whether this GPU runs the kernels in Gluon; the rows of what those take must begin at multiples of 16
            bytes.
    """

    q: Strides
    k: Strides
    v: Strides
    mask: Strides | None = None
    bias: Strides | None = None
    offset: int = 0
    at: int = 0
    one_id: bool = False
    capability: str = "9.0"
    gluon: bool = False


class Tile(NamedTuple):
    """Sizes of a kernel's blocks, of queries and of keys, with its warps and stages."""

    queries: int
    keys: int
    warps: int
    stages: int


# Whether Triton's interpreter runs the kernels, on a CPU; Triton looks once, when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
SMALL_TILES = Tile(16, 16, 1, 1), Tile(64, 64, 1, 1)  # there: many blocks, but not too many
TILES: dict[tuple[str, int, int], Tile] = {
    # (kernel, bytes of an element, the larger of d and dv, padded)
    ("forward", 2, 64): Tile(64, 64, 4, 3),
    ("forward", 2, 128): Tile(64, 64, 4, 3),
    ("forward", 2, 256): Tile(128, 64, 8, 2),
    ("forward with dropout", 2, 64): Tile(64, 64, 4, 2),
    ("forward with dropout", 2, 128): Tile(64, 64, 4, 2),
    ("query_gradients", 2, 64): Tile(64, 64, 4, 3),
    ("query_gradients with a window", 2, 128): Tile(64, 64, 4, 2),
    ("query_gradients with segments", 2, 128): Tile(64, 64, 4, 2),
    ("query_gradients", 2, 128): Tile(128, 64, 8, 3),
    ("query_gradients", 2, 256): Tile(128, 64, 8, 1),
    ("key_gradients", 2, 64): Tile(64, 64, 4, 3),
    ("key_gradients", 2, 128): Tile(64, 64, 4, 2),
    ("key_gradients", 2, 256): Tile(32, 128, 8, 2),  # dk alone
    ("value_gradients", 2, 256): Tile(64, 128, 8, 2),
    ("key_gradients with dropout", 2, 128): Tile(32, 64, 4, 3),
    ("key_gradients with softcap", 2, 128): Tile(32, 64, 4, 3),
    ("key_gradients with a window", 2, 128): Tile(32, 64, 4, 3),
    ("key_gradients with segments", 2, 128): Tile(32, 64, 4, 3),
    ("bias_gradients", 2, 64): Tile(64, 64, 4, 3),
    ("bias_gradients", 2, 128): Tile(64, 64, 8, 2),
    ("bias_gradients", 2, 256): Tile(64, 32, 8, 1),
    ("query_and_bias_gradients", 2, 64): Tile(64, 64, 4, 3),
    ("query_and_bias_gradients", 2, 128): Tile(64, 64, 4, 2),
    ("query_and_bias_gradients of items", 2, 64): Tile(128, 32, 8, 2),
    ("query_and_bias_gradients of items", 2, 128): Tile(128, 32, 8, 2),
    ("forward", 4, 64): Tile(64, 64, 4, 3),
    ("forward", 4, 128): Tile(64, 64, 4, 1),
    ("forward", 4, 256): Tile(32, 16, 4, 1),
    ("query_gradients", 4, 64): Tile(64, 64, 4, 1),
    ("query_gradients", 4, 128): Tile(128, 32, 8, 1),
    ("query_gradients", 4, 256): Tile(16, 16, 4, 1),
    ("query_and_bias_gradients", 4, 64): Tile(32, 32, 4, 2),
    ("key_gradients", 4, 64): Tile(64, 64, 4, 2),
    ("key_gradients", 4, 128): Tile(32, 128, 8, 1),
    ("key_gradients", 4, 256): Tile(16, 16, 4, 1),
    ("bias_gradients", 4, 64): Tile(32, 32, 4, 2),
    ("bias_gradients", 4, 128): Tile(32, 32, 4, 1),
    ("bias_gradients", 4, 256): Tile(16, 16, 4, 1),
    # forward where keys are seen in parts; its queries are those that at most share a program
    ("split", 2, 64): Tile(64, 64, 4, 3),
    ("split", 2, 128): Tile(64, 64, 4, 3),
    ("split", 2, 256): Tile(64, 32, 4, 2),
    ("split", 4, 64): Tile(64, 32, 4, 2),
    ("split", 4, 128): Tile(32, 32, 4, 2),
    ("split", 4, 256): Tile(16, 16, 4, 2),
}
IN_FULL: dict[tuple[str, int], Tile] = {
    # of float32 where its products are not put together from those of bfloat16: (kernel, as above)
    ("forward", 64): Tile(64, 32, 4, 2),
    ("query_gradients", 64): Tile(32, 32, 4, 2),
    ("key_gradients", 64): Tile(32, 32, 4, 2),
    ("forward", 128): Tile(32, 32, 4, 2),
    ("query_gradients", 128): Tile(32, 32, 4, 1),
    ("key_gradients", 128): Tile(32, 32, 4, 1),
}
PLAIN = Tile(128, 128, 4, 2)  # of hopper.plain: queries of a program, warps of each group, stages of keys and of values
PLAIN_KEYS = 1024  # from which on it is faster: there is one program of it a multiprocessor, whose start nothing hides
WIDE = 512  # keys of a window, from which on it is faster: a tile costs it as much as 4 blocks of keys do
LONG = 8192  # keys, beyond which rows are so long that a program has one head: few programs end apart
MANY_TILES = 2**12  # too many to go through them one by one when a call is planned
PERSISTENT = 132  # programs that stay, one a multiprocessor, each of which goes over its share of the tiles
NEIGHBOURS = 2**16, 2**17, 2**18  # keys of the heads whose longest rows come first; the L2 cache holds twice the first
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
ROWS = 64  # at a time, in row_sums
MANY = 256  # at a time, in sum_sinks, key_ranges, pack_keys, overlaps and list_blocks
WORDS = 32  # of a bit for each key, that a program of pack_keys does
MUCH_SHARED = ("9.0", "10.0", "10.3")  # compute capabilities whose programs may have 227 KB of shared memory
BY_THIRDS = ("9.0",)  # where products of float32 are put together from those of bfloat16; 10.0 has no room for the sums
FEW = 16  # queries, up to which products of float32 are made in full all the same
BOUNDS = ("alive", "listed", "before", "bounds")  # what is found out ahead, which the way back may be given
SAVED = ("out", "lse", "top", "inverse", "exact", "drawn", *BOUNDS)  # what the way back takes of the way forward
PADDED = 128  # the rows of what the way back takes of each row are a multiple of it, and of every block of queries
DRAWN = Tile(128, 128, 1, 1) if INTERPRETED else Tile(128, 32, 2, 1)  # of `draw`, at a time
DRAWN_TURNS = 4  # times, in a program
MUCH_DRAWN = 0 if INTERPRETED else 2**22  # pairs, from which on drawing them anew costs more than a launch
HELD = 0.5  # of the memory of q, k, v and out: what is drawn may take so much where it is kept for the way back
PROGRAMS = 8 * PERSISTENT  # that fill a GPU
PART = 1 if INTERPRETED else 8  # blocks of keys in a part, at least


@cache
def runs_gluon(capability: str) -> bool:
    """Whether a GPU of this compute capability runs `hopper` and `narrow` with the Triton that is here."""
    try:
        release = Version(version("triton")).release
    except PackageNotFoundError:
        return False
    return capability == "9.0" and release[:2] == (3, 6) and not INTERPRETED  # Gluon changes with each release


def in_full(call: Call, capability: str) -> bool:
    """Whether products of float32 are made in full, rather than put together from those of bfloat16."""
    # The parts of rows of 256 fill the registers; few queries wait for memory; and with dropout the gradients of a row
    # with one key, which are 0, missed the budget.
    wide = max(call.d, call.dv) > 128
    return capability not in BY_THIRDS or wide or call.i <= FEW or call.dropout > 0


def refusal(call: Call) -> str | None:
    """Why the kernels cannot serve this call on any device, or None."""
    if call.dtype == "float64":
        return "it has no float64"
    if max(call.d, call.dv) > 256:
        return "it takes head sizes of up to 256"
    return None


def tile(kernel: str, call: Call, capability: str, drawn: bool = False) -> Tile:
    """The sizes of a kernel's blocks for a call, on a GPU of this compute capability. drawn: whether forward has bits.

    How many keys forward has at a time must not hang on that, nor its results.
    """
    if INTERPRETED:
        return SMALL_TILES[call.i * call.j > 64**2]
    width, size = 4 if call.dtype == "float32" else 2, max(64, _padded(call.d), _padded(call.dv))
    has = {"bits": drawn, "dropout": call.dropout, "softcap": call.softcap is not None,
           "a window": call.left is not None, "segments": call.segments}  # fmt: skip
    with_what = next((f" with {what}" for what in has if has[what]), "")
    found = next(TILES[key] for key in ((name, width, size) for name in (kernel + with_what, kernel)) if key in TILES)
    if width == 4:
        return IN_FULL.get((kernel, size), found) if in_full(call, capability) else found
    if capability not in MUCH_SHARED:
        return Tile(min(found.queries, 64 if size < 256 else 32), 32, 4, 2 if size < 256 else 1)
    return found


def _padded(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def padded_rows(i: int) -> int:
    """The rows that `top` and its like have for a head, for i queries."""
    return _cdiv(i, PADDED) * PADDED


def parts(call: Call, capability: str) -> int:
    """In how many parts the keys are seen, each with the queries of all heads that read them together; 0: not so."""
    size = tile("split", call, capability)
    if call.segments or call.h // call.hk * call.i > size.queries:
        return 0
    number = min(64, _cdiv(call.j, size.keys) // PART, _cdiv(PROGRAMS, call.b * call.hk))
    return number if number > 1 else 0


def _is_plain(call: Call, layout: Layout) -> bool:
    """Whether `hopper.plain` makes the same, faster: nothing but a window."""
    return _is_long(call, layout, 128, PLAIN_KEYS, PLAIN) and _width(call) >= WIDE and call.sinks is None


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


def _far(x: int) -> int:
    """A bound, no further than counts."""
    return max(-FAR, min(FAR, x))


def _several(**strides: Strides) -> dict[str, int]:
    """By name and axis: 0 where all items ("B") or heads ("H") are one in memory, else 1."""
    return {name + axis: min(step, 1) for name, of in strides.items() for axis, step in zip("BH", of, strict=False)}


def _heads_each(call: Call) -> int:
    """How many heads a program of `hopper.plain` has, whose keys it loads while it stores what the last one gave.

    As many as have the least to wait for: to begin costs a sixteenth of a tile, and programs go round together.
    """
    if call.left is None and call.j > LONG:
        return 1
    turns, heads = _cdiv(call.i, PLAIN.queries), call.b * call.h
    return min((4, 2, 1), key=lambda each: _cdiv(turns * _cdiv(heads, each), PERSISTENT) * (16 * each + 1))


def _plain(call: Call, shared: _Shared, results: tuple[Output, ...]) -> Launch:
    at, left, right, *_ = shared.rest
    q, k, v = shared.layout[:3]
    low, high = _far(at - left), _far(at + right)
    each = _heads_each(call)
    return Launch(
        "plain", (_cdiv(call.i, PLAIN.queries), _cdiv(call.b * call.h, each), 1),
        ("q", "k", "v"),
        (call.b * call.h, call.h, call.i, call.j, shared.rows, low, high, shared.factor), results,
        {"GROUP": call.h // call.hk, "D": call.d, "BN": PLAIN.keys, "EACH": each, **_several(Q=q, K=k, V=v),
         "BNHD": shared.bnhd, "LEFT": call.left is not None, "RIGHT": call.right is not None,
         "STAGES_K": PLAIN.stages, "STAGES_V": PLAIN.stages},
        PLAIN.warps, 1, "hopper",
        {"q": _blocks(call, q, call.h, call.i, PLAIN.queries // 2), "k": _blocks(call, k, call.hk, call.j, PLAIN.keys),
         "v": _blocks(call, v, call.hk, call.j, PLAIN.keys)},
    )  # fmt: skip


def _is_narrow(call: Call, layout: Layout) -> bool:
    """Whether `narrow.narrow` makes the same, faster: as `_is_plain`, of rows of 64, sinks or not."""
    return _is_long(call, layout, 64, NARROW_KEYS, NARROW) and call.left is None and call.sinks != "float64"


def _narrow(call: Call, shared: _Shared, results: tuple[Output, ...]) -> Launch:
    at, _, right, *_ = shared.rest
    high = FAR if call.right is None else _far(at + right)
    q, k, v = shared.layout[:3]
    heads, blocks = call.b * call.h, _cdiv(call.i, NARROW.queries)
    return Launch(
        "narrow", (min(PERSISTENT, heads * blocks), 1, 1), ("q", "k", "v", "sinks" if call.sinks else None),
        (heads, call.h, call.i, call.j, shared.rows, blocks, _neighbours(heads, blocks, call.j, high), high,
         shared.factor), results,
        {"GROUP": call.h // call.hk, **_several(Q=q, K=k, V=v), "BNHD": shared.bnhd,
         "SINKS": call.sinks is not None, "EXACT": _exact(call)},
        NARROW.warps, 1, "narrow",
        {"q": _blocks(call, q, call.h, call.i, NARROW.queries // 3),
         "k": _blocks(call, k, call.hk, call.j, NARROW.keys), "v": _blocks(call, v, call.hk, call.j, NARROW.keys)},
    )  # fmt: skip


def _takes_long_queries(call: Call, layout: Layout) -> bool:
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
    programs, _ = _rounds(heads, _cdiv(call.i, ORDERED))
    return call.d == ORDERED and layout.one_id and call.j >= DOCUMENTS and programs >= ENOUGH


def _long_queries(call: Call, shared: _Shared, dout: Strides) -> Launch:
    at, left, right, *_ = shared.rest
    low = -FAR if call.left is None else _far(at - left)
    high = FAR if call.right is None else _far(at + right)
    (q, k, v), size, rows = shared.layout[:3], LONG_QUERIES[call.d], 64
    heads, blocks = call.b * call.h, _cdiv(call.i, size.queries)
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


def _order(call: Call, shared: _Shared, queries: bool, keys: bool) -> tuple[Launch, ...]:
    """What makes the orders of tiles of queries, of keys or of both, where segments say how many blocks each visits. An
    array (b * heads * tiles,): the k-th tile of program p is [k * programs + p], which says n * tiles + tile. And, for
    keys, where runs of ids begin and end, and whether no id has two.
    """
    at, left, right, *_ = shared.rest
    low, high = -FAR if call.left is None else _far(at - left), FAR if call.right is None else _far(at + right)
    size, block, g, parts = ORDERED, ORDERED // 2, shared.ahead.group, _cdiv(call.j, RUN_PART)
    tiles = _cdiv(call.i, size)
    of_keys, of_queries = call.hk if keys else 0, call.h if queries else 0
    unused = Output("unused", (1,), "int32", False)
    found = Launch(
        "find_runs", (parts, call.b, 1), ("q_segment_ids",), (call.j,),
        (Output("spans", (call.b, call.j, 2), "int32"), Output("falls", (call.b, parts), "int32")),
        {"PART": RUN_PART, "MANY": RUN_MANY}, 4, 1, "bounds",
    )  # fmt: skip
    order = Launch(
        "order_tiles", (_cdiv(tiles, RANKED), of_queries + of_keys, call.b), ("bounds", "falls" if keys else None),
        (_cdiv(call.i, g), parts, tiles, _cdiv(call.j, block), of_queries, _rounds(call.h, tiles)[1],
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
        costs.append(1 + max(1, min(most, _cdiv(max(0, (n + 1) * size.queries + high), size.keys)) - start))
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


def _takes_long_keys(call: Call, layout: Layout) -> bool:
    """Whether `keys.long_key_gradients` makes dk and dv, faster: nothing but a window and sinks."""
    bare = call._replace(segments=False)
    if call.d not in LONG_KEYS_WIDE or not _is_bare(bare, layout, call.d):
        return False
    if call.segments and not _is_ordered(call, layout, call.hk):
        return False
    seen, least = call.i, LONG_KEYS_SEEN  # by queries, a key
    if call.left is not None and call.right is not None:
        seen, least = min(seen, call.left + call.right + 1), LONG_KEYS_WIDE[call.d]
    elif call.left is not None or call.right is not None:
        seen //= 2
    few = call.b * call.hk * _cdiv(call.j, LONG_KEYS.keys) < LONG_KEYS_TILES
    return not few and call.j >= LONG_KEYS.keys and seen >= least


def _long_keys(call: Call, shared: _Shared, dout: Strides) -> Launch:
    at, left, right, *_ = shared.rest
    low, high = _far(at - left), _far(at + right)
    (q, k, v), size, group = shared.layout[:3], LONG_KEYS, call.h // call.hk
    heads, blocks, most = call.b * call.hk, _cdiv(call.j, size.keys), _cdiv(call.i, size.queries)
    costs = []
    for n in range(blocks):
        start = 0 if call.right is None else max(0, n * size.keys - high) // size.queries
        stop = most if call.left is None else min(most, _cdiv(max(0, (n + 1) * size.keys - low), size.queries))
        costs.append(2 + group * max(1, stop - start))  # to begin and to end is as much as two blocks
    programs, together = _rounds(call.hk, blocks) if call.segments else _shares(heads, costs)
    segments = "spans", "key_order", "runs", "dk", "dv"
    return Launch(
        "long_key_gradients", (programs, 1, 1),
        ("q", "k", "v", "dout", "known", *(segments if call.segments else (None,) * 5)),
        (heads, call.h, call.i, call.j, blocks, together, low, high, shared.factor, call.scale),
        (Output("dk", shared.shape(call.hk, call.j, call.d), call.dtype),
         Output("dv", shared.shape(call.hk, call.j, call.d), call.dtype)),
        {"GROUP": group, "D": call.d, "STAGES": size.stages, **_several(Q=q, K=k, V=v, DO=dout),
         "BNHD": shared.bnhd, "LEFT": call.left is not None, "RIGHT": call.right is not None, "RUNS": call.segments},
        size.warps, 1, "keys",
        {"q": _blocks(call, q, call.h, call.i, size.queries), "k": _blocks(call, k, call.hk, call.j, size.keys // 2),
         "v": _blocks(call, v, call.hk, call.j, size.keys // 2),
         "dout": _blocks(call, dout, call.h, call.i, size.queries),
         "known": Blocks((call.b * call.h, shared.rows, 4), (4 * shared.rows, 4, 1), (1, size.queries, 4))},
    )  # fmt: skip


def _shares(heads: int, costs: list[int]) -> tuple[int, int]:
    """How many programs go over the tiles of so many heads, and of how many heads the first tiles come first, so that
    no program has much more than others: costs, of the tiles of one head. Few heads, where that is as good: what they
    read is in the L2 cache.
    """
    tiles = heads * len(costs)
    fewest = _cdiv(tiles, _cdiv(tiles, PERSISTENT))  # with as many turns
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
    """Rows as a descriptor has them: of items or heads that are one in memory one, for no stride may be 0."""
    sizes = [1 if stride == 0 else size for size, stride in zip((call.b, heads), strides, strict=False)]
    steps = [stride or call.d for stride in strides]
    return Blocks((*sizes, length, call.d), (*steps, 1), (1, 1, block, call.d))


def _key_passes(call: Call) -> tuple[tuple[str, bool, bool], ...]:
    """The passes over queries that make dk and dv: whose tile, and which of the two it makes.

    The sums of both, of rows of 256, fill more registers than there are: in two passes the logits are made twice.
    """
    if call.dtype == "float32" or max(_padded(call.d), _padded(call.dv)) < 256:
        return (("key_gradients", True, True),)
    return ("value_gradients", False, True), ("key_gradients", True, False)


def draws_once(call: Call, share: float = 1.0) -> bool:
    """Whether dropout's decisions are drawn by one launch for all others of the way back, with the same results.

    They take a bit each, in memory: no more than this share of what q, k, v and out take together, so that memory is
    linear in these. And not where one launch more costs as much as it saves.
    """
    if not call.dropout or (call.b * call.h * call.i * call.j < MUCH_DRAWN):
        return False
    inputs = call.b * (call.d + call.dv) * (call.h * call.i + call.hk * call.j) * (4 if call.dtype == "float32" else 2)
    return 4 * call.b * call.h * words(call) * padded_rows(call.i) <= share * inputs


def keeps_drawn(call: Call) -> bool:
    """Whether they are drawn on the way forward, for both: until the way back each layer of a model holds its own."""
    return call.i >= PADDED and draws_once(call, HELD)  # of fewer queries most would be padding


def drawn_shape(call: Call) -> tuple[int, int, int, int]:
    """Of what `draw` leaves."""
    return call.b, call.h, words(call), padded_rows(call.i)


def words(call: Call) -> int:
    """The words of 32 keys that `draw` has for a query: as many as whole blocks of keys have, of any kernel."""
    return _cdiv(call.j, PADDED) * (PADDED // 32)


def _exact(call: Call) -> bool:
    """Whether a gradient may be finer than out is, so that the way back needs it as it was before it was rounded."""
    return call.dtype != "float32" and any(name not in (None, call.dtype) for name in (call.bias_dtype, call.sinks))


class Ahead(NamedTuple):
    """What the launches of a call share.

    Attributes:
        group: rows or keys for which a range of segment ids is known.
        ranged: whether segments bound what is visited.
        searched: whether keys whose segment no query has are looked for.
        listed: whether only listed blocks of keys are visited.
        packed: whether only the keys that an item has are gone over, as if there were no others.
    """

    group: int
    ranged: bool
    searched: bool
    listed: bool
    packed: bool


def _ahead(call: Call, layout: Layout) -> Ahead:
    names = "forward", "split", "query_gradients", *(name for name, *_ in _key_passes(call))
    sizes = [tile(name, call, layout.capability) for name in names]
    searched = call.segments and (not layout.one_id or call.q_lengths)
    group = min(size for each in sizes for size in each[:2])
    packed = call.key_masked and not (call.segments or call.bias or call.dropout)  # whose columns are neighbours
    return Ahead(group, call.segments, searched, searched or (call.key_masked and not packed), packed)


def _bounds(call: Call, layout: Layout, ahead: Ahead, size: int) -> list[Launch]:
    """The launches that find out what is not visited and what is whole, blocks of keys having this size."""
    if not (ahead.ranged or ahead.listed or ahead.packed):
        return []
    b, g = call.b, ahead.group
    rows, keys = _cdiv(call.i, g), _cdiv(call.j, g)
    q_lengths = "q_lengths" if call.q_lengths else None
    ids_of = ("q_segment_ids", "kv_segment_ids") if call.segments else (None, None)
    q_ranges = (Output("q_low", (b, rows), "int64"), Output("q_high", (b, rows), "int64"))
    unused = (Output("unused", (1,), "int64", False),) * 2
    launches = []
    if ahead.searched:
        launches.append(Launch(
            "query_ranges", (rows, b, 1), ("q_segment_ids", q_lengths), (call.i,), q_ranges,
            {"Q_LENGTHS": call.q_lengths, "G": g}, 4, 1, "bounds",
        ))  # fmt: skip
    mask = layout.mask if call.key_masked and layout.mask is not None else (0, 0, 0, 0)
    together = ahead.ranged and not ahead.searched
    launches.append(Launch(
        "key_ranges", (max(rows, keys) if together else keys, b, 1),
        ("mask" if call.key_masked else None, *ids_of, q_lengths, "kv_lengths" if call.kv_lengths else None,
         *(("q_low", "q_high") if ahead.searched else (None, None))),
        (call.i, call.j, mask[0], mask[3]),
        (Output("alive", (b, _cdiv(call.j, min(32, g))), "int32"), Output("live", (b, keys), "int32"),
         Output("k_low", (b, keys), "int64"), Output("k_high", (b, keys), "int64"),
         *(q_ranges if together else unused)),
        {"MASK": call.key_masked, "SEGMENTS": call.segments, "SEARCH": ahead.searched, "Q_LENGTHS": call.q_lengths,
         "KV_LENGTHS": call.kv_lengths, "G": g, "BLOCK": MANY}, 4, 1, "bounds",
    ))  # fmt: skip
    if ahead.ranged:
        launches.append(Launch(
            "overlaps", (rows + keys, b, 1), ("q_low", "q_high", "k_low", "k_high", "live"), (rows, keys),
            (Output("bounds", (b, rows + keys, 4), "int32"),), {"BLOCK": MANY}, 4, 1, "bounds",
        ))  # fmt: skip
    if ahead.packed:
        word = min(32, g)
        words = _cdiv(call.j, word)
        launches.append(Launch(
            "pack_keys", (_cdiv(words, WORDS), b, 1), ("alive", "live"), (call.j, words, keys),
            (Output("listed", (b, call.j), "int32"), Output("before", (b, call.j + 3), "int32")),
            {"G": g, "WORD": word, "BLOCK": WORDS, "MANY": MANY}, 4, 1, "bounds",
        ))  # fmt: skip
    if ahead.listed:
        blocks = _cdiv(call.j, size)
        launches.append(Launch(
            "list_blocks", (b, 1, 1), ("live",), (keys, blocks),
            (Output("listed", (b, blocks), "int32"), Output("before", (b, blocks + 3), "int32")),
            {"RATIO": size // g, "BLOCK": MANY}, 4, 1, "bounds",
        ))  # fmt: skip
    return launches


class Plan(NamedTuple):
    """The launches of a way forward and of a way back.

    Attributes:
        forward: gives "out", "lse", and what the way back takes of it: "top", "inverse", "exact" and "drawn".
        alone: gives the same "out" and "lse", faster, where there is no way back: it keeps nothing that is drawn.
        bounds: names of what it found out about what is not visited, which the way back finds out anew or is given.
        backward: takes all those, "dout" and "dlse", and gives "dq", "dk", "dv", and "dbias" and "dsinks" where asked
            for; a function of the strides of dout, and of whether dbias is wanted, whether there is a dlse, and whether
            it is given the bounds.
        aligned: whether rows of q, k and v, and on the way back those of dout, must begin at multiples of 16 bytes.
    """

    forward: tuple[Launch, ...]
    alone: tuple[Launch, ...]
    bounds: tuple[str, ...]
    backward: Callable[[Strides, bool, bool, bool], tuple[Launch, ...]]
    aligned: bool = False


@lru_cache(maxsize=4096)
def plan(call: Call, layout: Layout) -> Plan:
    """What a call launches.

    Args:
        call: canonical, none of b, i and j 0; float16, bfloat16 or float32; d and dv at most 256.
        layout: how its arrays lie.
    """
    ahead = _ahead(call, layout)
    shared = _Shared(call, layout, ahead)
    b, h, hk, i = call.b, call.h, call.hk, call.i
    split, exact = parts(call, layout.capability), _exact(call)
    size = tile("split" if split else "forward", call, layout.capability)
    if split:
        size = size._replace(queries=_padded(h // hk * i))
    launches = _bounds(call, layout, ahead, size.keys)
    again = tile("query_gradients", call, layout.capability).keys
    bounds = BOUNDS if launches and (size.keys == again or not ahead.listed) else ()
    plain = shared.base2 and not call.sinks
    results = (
        Output("out", shared.shape(h, i, call.dv), call.dtype), Output("lse", (b, h, i), "float32"),
        Output("top", (b, h, shared.rows), "float32"),
        Output("inverse", (b, h, 1 if plain else shared.rows), "float32", not plain),
        Output("exact", shared.shape(h, i, call.dv) if exact else (b, 1), "float32", exact),
    )  # fmt: skip
    partial = (b * hk, split, h // hk * i)

    def attention(drawn: bool) -> Launch:
        tiles = tile("forward", call, layout.capability, drawn) if drawn else size
        constants = shared.constants(tiles, call.j % tiles.keys == 0 and not call.kv_lengths)
        return Launch(
            "forward", (1, b * hk, split) if split else (_cdiv(i, tiles.queries), b * h, 1),
            (*shared.inputs[:11], "sinks" if call.sinks else None, "drawn" if drawn else shared.seed, *shared.lists),
            (h, i, call.j, shared.rows, *shared.qkv, *shared.pairs, *shared.rest),
            (Output("sums", (*partial, call.dv), "float32"), Output("totals", partial, "float32"),
             Output("tops", partial, "float32"), *(Output("unused", (1,), "float32", False),) * 2)
            if split else results,
            constants | {"BNHD": shared.bnhd, "LISTED": ahead.listed, "SINKS": call.sinks is not None,
                         "EXACT": exact, "SPLIT": split > 0, "DRAWN": drawn, "WORDS": words(call) if drawn else 0},
            tiles.warps, tiles.stages,
        )  # fmt: skip

    alone = None
    if keeps_drawn(call):
        alone = *launches, attention(False)
        launches.append(_draw(call, layout, shared))
    launches.append(attention(alone is not None))
    if not split and _is_plain(call, layout):
        launches[-1] = _plain(call, shared, results)
    if not split and _is_narrow(call, layout):
        launches[-1] = _narrow(call, shared, results)
    if split:
        launches.append(Launch(
            "join", (h // hk * i, b * hk, 1),
            ("sums", "totals", "tops", "sinks" if call.sinks else None, "q_lengths" if call.q_lengths else None),
            (h, i, shared.rows, split, shared.kept), results,
            {"GROUP": h // hk, "DV": call.dv, "BDV": _padded(call.dv), "PARTS": 1 << (split - 1).bit_length(),
             "BNHD": shared.bnhd, "Q_LENGTHS": call.q_lengths, "SINKS": call.sinks is not None,
             "BASE2": shared.base2, "EXACT": exact}, 4, 1,
        ))  # fmt: skip

    @lru_cache(maxsize=64)
    def backward(dout: Strides, wants_bias: bool, has_dlse: bool, has_bounds: bool) -> tuple[Launch, ...]:
        found = [] if has_bounds else _bounds(call, layout, ahead, again)
        return *found, *_backward(call, layout, ahead, shared, dout, wants_bias, has_dlse)

    made = {output.name for launch in launches for output in launch.outputs}
    aligned = any(launch.gluon for launch in launches)
    aligned = aligned or _takes_long_queries(call, layout) or _takes_long_keys(call, layout)
    forward = tuple(launches)
    return Plan(forward, alone or forward, tuple(name for name in bounds if name in made), backward, aligned)


class _Shared:
    """Arguments that the kernels have in common."""

    def __init__(self, call: Call, layout: Layout, ahead: Ahead) -> None:
        self.call, self.layout, self.ahead = call, layout, ahead
        self.bnhd = call.layout == "bnhd"
        self.base2 = call.bias is None  # which may be as low as numbers go
        self.rows = padded_rows(call.i)
        log2e = LOG2E if self.base2 else 1.0
        self.factor = call.scale * log2e if call.softcap is None else call.scale / call.softcap
        self.cap = 0.0 if call.softcap is None else call.softcap * log2e
        self.kept = 1 / (1 - call.dropout)
        self.seed = "dropout_seed" if call.dropout else None
        self.inputs = (
            "q", "k", "v", "mask" if self.dense_mask else None, "bias" if call.bias else None,
            "alive" if ahead.listed else None, "q_segment_ids" if call.segments else None,
            "kv_segment_ids" if call.segments else None, "q_lengths" if call.q_lengths else None,
            "kv_lengths" if call.kv_lengths else None, "q_offset" if layout.offset else None,
        )  # fmt: skip
        self.unit = 8 if all(x % 8 == 0 for x in (*layout.q, *layout.k, *layout.v)) else 1
        self.qkv = tuple(x // self.unit for of in layout[:3] for x in of[:2])
        self.mask, self.mask_unit = _in_units(layout.mask if self.dense_mask else None, 16)
        self.bias, self.bias_unit = _in_units(layout.bias, 8)
        self.pairs = (*self.mask[:3], *self.bias[:3])
        left, right = (0 if x is None else min(x, 2 * FAR) for x in (call.left, call.right))
        at = _far({"zero": 0, "end": call.j - call.i, "data": layout.at}[call.offset])
        self.rest = (at, left, right, self.factor, self.cap, self.kept)

    @property
    def dense_mask(self) -> bool:
        """Whether there is a mask that is more than a key mask."""
        return self.call.mask is not None and not self.call.key_masked

    def shape(self, heads: int, length: int, size: int) -> tuple[int, ...]:
        """Of an array of heads, in the caller's layout."""
        return (self.call.b, length, heads, size) if self.bnhd else (self.call.b, heads, length, size)

    @property
    def softcap(self) -> int:
        """2 where gradients, of the bias, are so fine that an ulp of the cap is too much; 0 where there is none."""
        if self.call.softcap is None:
            return 0
        return 2 if "float32" in (self.call.dtype, self.call.bias_dtype) else 1

    @property
    def _widen(self) -> int:
        """What `_dot` is to do about what tensor cores, or the interpreter, have no products of."""
        if INTERPRETED:
            return int(self.call.dtype == "bfloat16")
        return 2 if self.call.dtype == "float32" and not in_full(self.call, self.layout.capability) else 0

    @property
    def lists(self) -> tuple[str | None, ...]:
        """What says which blocks of keys, or which keys, are visited."""
        listed = ("listed", "before") if self.ahead.listed or self.ahead.packed else (None, None)
        return *listed, "bounds" if self.ahead.ranged else None

    def _lanes(self, size: int) -> int:
        """The columns of a tile of rows.

        Of rows that are not aligned, which no loop reads ahead, tiles of 16 and 32 found two faults of compilers on
        compute capability 9.0: ptxas 12.8 took the address of a product from a register that held something else, and
        LLVM stopped. Each in one kernel of the list of cases.
        """
        apart = self.unit == 1 and self.call.dtype != "float32" and not INTERPRETED
        return max(64 if apart else 16, _padded(size))

    def constants(self, size: Tile, even: bool) -> dict[str, Any]:
        """But for those that not all of the larger kernels have."""
        call = self.call
        return {
            "GROUP": call.h // call.hk, "D": call.d, "DV": call.dv, "BD": self._lanes(call.d),
            "BDV": self._lanes(call.dv), "BM": size.queries, "BN": size.keys, "G": self.ahead.group, "UNIT": self.unit,
            "QN": self.layout.q[2], "KN": self.layout.k[2], "VN": self.layout.v[2],
            "MASK_UNIT": self.mask_unit, "MJ": self.mask[3], "BIAS_UNIT": self.bias_unit, "BJ": self.bias[3],
            "LEFT": call.left is not None, "RIGHT": call.right is not None, "OFFSET": self.layout.offset,
            "SEGMENTS": call.segments, "Q_LENGTHS": call.q_lengths, "KV_LENGTHS": call.kv_lengths,
            "ALIVE": self.ahead.listed, "PACKED": self.ahead.packed, "MASK": self.dense_mask,
            "BIAS": call.bias is not None, "SHARED": call.bias is not None and call.bias[0] < call.b,
            "SOFTCAP": self.softcap, "THRESHOLD": threshold(call.dropout) if call.dropout else 0,
            "BASE2": self.base2, "POSITIVE": call.scale > 0, "EVEN": even, "EVEN_KEYS": call.j % size.keys == 0,
            "I_UNIT": _unit(call.i), "J_UNIT": _unit(call.j), "PRECISE": call.dtype == "float32", "WIDEN": self._widen,
        }  # fmt: skip


def _unit(length: int) -> int:
    """16 if a length is a multiple of it, else 1: what kernels tell the compiler of it, as `visits.told`."""
    return 1 if length % 16 else 16


def _in_units(strides: Strides | None, unit: int) -> tuple[Strides, int]:
    """Strides of (b, h, i, j), all but the last in units of so many elements; and the unit, 1 where that can't be."""
    if strides is None:
        return (0, 0, 0, 0), 1
    unit = unit if strides[3] in (0, 1) and all(x % unit == 0 for x in strides[:3]) else 1
    return (*(x // unit for x in strides[:3]), strides[3]), unit


def _together(call: Call, layout: Layout) -> int:
    """How many items have one bias whose gradient is made with dq, in one pass; 0: it has a pass of its own.

    The sums of their dq are in registers at once, their queries and the keys of two turns in shared memory: of more
    items, or longer rows, these are too many.
    """
    if call.bias is None or call.segments or layout.offset == 2:
        return 0
    if any(has == 1 < whole for has, whole in zip(call.bias[1:], (call.h, call.i, call.j), strict=True)):
        return 0
    items = call.b if call.bias[0] == 1 else 1
    size = max(64, _padded(call.d), _padded(call.dv))
    if (_with_items(items), 4 if call.dtype == "float32" else 2, size) not in TILES:
        return 0
    most = 256 // size - (call.bias_dtype != call.dtype or (call.mask is not None and not call.key_masked))
    return items if items == 1 or (items <= most and (INTERPRETED or layout.capability in MUCH_SHARED)) else 0


def _with_items(items: int) -> str:
    return "query_and_bias_gradients" + " of items" * (items > 1)


def _queries_and_bias(
    call: Call, layout: Layout, shared: _Shared, items: int, more: dict[str, Any], qkv: tuple[int, ...], dbias: Output
) -> Launch:
    size = tile(_with_items(items), call, layout.capability)
    blocks, heads = _cdiv(call.i, size.queries), call.b // items * call.h
    constants = shared.constants(size, call.j % size.keys == 0 and not call.kv_lengths) | more
    foreign = "BIAS", "SHARED", "BASE2", "POSITIVE", "PACKED", "SEGMENTS", "DRAWN", "WORDS"  # it draws for itself
    constants = {name: x for name, x in constants.items() if name not in foreign}
    return Launch(
        "query_and_bias_gradients", (heads, blocks, 1) if items > 1 else (blocks, heads, 1),
        (*shared.inputs, shared.seed, "dout", "known"),
        (call.h, call.i, call.j, shared.rows, *qkv, *shared.pairs, *shared.rest, call.scale),
        (Output("dq", shared.shape(call.h, call.i, call.d), call.dtype), dbias),
        constants | {"BNHD": shared.bnhd, "ITEMS": items, "EIGHT": 1 if call.j % 8 else 8}, size.warps, size.stages,
        "gradients",
    )  # fmt: skip


def _draw(call: Call, layout: Layout, shared: _Shared) -> Launch:
    size = DRAWN
    turns = size.keys // 32
    return Launch(
        "draw", (shared.rows // size.queries, call.b * call.h, _cdiv(words(call), turns * DRAWN_TURNS)),
        (shared.seed, "q_lengths" if call.q_lengths else None, "kv_lengths" if call.kv_lengths else None,
         "q_offset" if layout.offset else None),
        (call.h, call.i, call.j, shared.rows, *shared.rest[:3]),
        (Output("drawn", drawn_shape(call), "int32"),),
        {"BM": size.queries, "TURN": turns, "TURNS": DRAWN_TURNS, "WORDS": words(call),
         "THRESHOLD": threshold(call.dropout), "LEFT": call.left is not None, "RIGHT": call.right is not None,
         "OFFSET": layout.offset, "Q_LENGTHS": call.q_lengths, "KV_LENGTHS": call.kv_lengths}, size.warps, size.stages,
        "dropout",
    )  # fmt: skip


def _heavy_rows(
    call: Call, layout: Layout, shared: _Shared, qkv: tuple[int, ...], unit: int, by_row: int, has_dlse: bool,
    partial: tuple[int, int, int],
) -> Launch:  # fmt: skip
    """dsinks of the rows that weigh most, made anew, in with the others."""
    from attend_shared.kernels import of_sinks

    has = {"mask": call.mask is not None, "bias": call.bias is not None, "q_segment_ids": call.segments,
           "kv_segment_ids": call.segments, "q_lengths": call.q_lengths, "kv_lengths": call.kv_lengths,
           "q_offset": layout.offset > 0, "dropout_seed": call.dropout > 0, "dlse": has_dlse}  # fmt: skip
    mask, bias = layout.mask or (0, 0, 0, 0), layout.bias or (0, 0, 0, 0)
    return of_sinks.sum_rows(
        {name: name for name in ("q", "k", "v", *(each for each in has if has[each]))},
        (call.b, call.h, call.i, call.j, shared.rows, 0, *qkv, *mask[:3], *bias[:3], *shared.rest[:3], call.scale,
         call.softcap or 0.0, shared.kept),
        partial,
        {"GROUP": call.h // call.hk, "D": call.d, "DV": call.dv, "UNIT": unit, "QN": layout.q[2], "KN": layout.k[2],
         "VN": layout.v[2], "DON": by_row, "MJ": mask[3], "BJ": bias[3], "LSE": has_dlse,
         "LEFT": call.left is not None, "RIGHT": call.right is not None, "OFFSET": layout.offset,
         "Q_LENGTHS": call.q_lengths, "KV_LENGTHS": call.kv_lengths, "SEGMENTS": call.segments, "MASK": has["mask"],
         "BIAS": has["bias"], "SOFTCAP": call.softcap is not None,
         "THRESHOLD": threshold(call.dropout) if call.dropout else 0},
    )  # fmt: skip


def _backward(
    call: Call, layout: Layout, ahead: Ahead, shared: _Shared, dout: Strides, wants_bias: bool, has_dlse: bool
) -> tuple[Launch, ...]:
    from attend_shared.kernels import of_sinks

    b, h, hk, i, j, d, dv = call.b, call.h, call.hk, call.i, call.j, call.d, call.dv
    unit = shared.unit if all(x % shared.unit == 0 for x in dout) else 1
    qkv = tuple(x * shared.unit // unit for x in shared.qkv) + tuple(x // unit for x in dout[:2])
    rows, blocks = shared.rows, shared.rows // ROWS
    sinks = "sinks" if call.sinks else None
    weighs = call.sinks == call.dtype != "float32" and not _exact(call)  # an out that is rounded
    weighed = of_sinks.weighed(b, h, rows) if weighs else (Output("unused", (1,), "float32", False),) * 4
    partial = (b, h, blocks) if call.sinks else (b, 1, 1)
    launches = [Launch(
        "row_sums", (blocks, b * h, 1),
        ("exact" if _exact(call) else "out", "dout", "dlse" if has_dlse else None, "top",
         "inverse" if call.sinks or not shared.base2 else None, sinks, "q_lengths" if call.q_lengths else None),
        (h, i, rows, *qkv[-2:], shared.kept),
        (Output("known", (b, h, rows, 2, 2), "float32"),
         Output("partial", partial, "float32", call.sinks is not None and not weighs), *weighed),
        {"DV": dv, "BDV": _padded(dv), "BM": ROWS, "UNIT": unit, "DON": dout[2], "BNHD": shared.bnhd,
         "Q_LENGTHS": call.q_lengths, "LSE": has_dlse, "SINKS": call.sinks is not None, "BASE2": shared.base2,
         "WEIGHED": weighs}, 4, 1, "gradients",
    )]  # fmt: skip
    if weighs:
        launches.append(_heavy_rows(call, layout, shared, qkv, unit, dout[2], has_dlse, partial))
    if call.sinks is not None:
        launches.append(Launch(
            "sum_sinks", (h, 1, 1), ("partial",), (h, b, blocks), (Output("dsinks", (h,), call.sinks),),
            {"BLOCK": MANY}, 4, 1, "gradients",
        ))  # fmt: skip
    once = draws_once(call)
    if once and not keeps_drawn(call):
        launches.append(_draw(call, layout, shared))
    base = (*shared.inputs, "drawn" if once else shared.seed)
    saved = ("dout", "known")
    size = tile("query_gradients", call, layout.capability)
    more = {"UNIT": unit, "DON": dout[2], "DRAWN": once, "WORDS": words(call) if once else 0}
    constants = shared.constants(size, j % size.keys == 0 and not call.kv_lengths) | more
    dbias, together = None, 0
    if wants_bias and call.bias is not None and call.bias_dtype is not None:
        dbias, together = Output("dbias", call.bias, call.bias_dtype), _together(call, layout)
    long_queries, long_keys = _takes_long_queries(call, layout), _takes_long_keys(call, layout)
    if call.segments and (long_queries or long_keys):
        launches.extend(_order(call, shared, long_queries, long_keys))
    if dbias and together:
        launches.append(_queries_and_bias(call, layout, shared, together, more, qkv, dbias))
    elif long_queries:
        launches.append(_long_queries(call, shared, dout))
    else:
        launches.append(Launch(
            "query_gradients", (_cdiv(i, size.queries), b * h, 1),
            (*base, *shared.lists, *saved), (h, i, j, rows, *qkv, *shared.pairs, *shared.rest, call.scale),
            (Output("dq", shared.shape(h, i, d), call.dtype),),
            constants | {"BNHD": shared.bnhd, "LISTED": ahead.listed}, size.warps, size.stages, "gradients",
        ))  # fmt: skip
    unused = Output("unused", (1,), call.dtype, False)
    for kernel, keys, values in _key_passes(call) if call.segments or not long_keys else ():
        size = tile(kernel, call, layout.capability)
        constants = shared.constants(size, i % size.queries == 0 and not call.q_lengths) | more
        launches.append(Launch(
            "key_gradients", (_cdiv(j, size.keys), b * hk, 1),
            (*base, *shared.lists, *saved, "runs" if long_keys else None),
            (h, i, j, rows, *qkv, *shared.pairs, *shared.rest, call.scale),
            (Output("dk", shared.shape(hk, j, d), call.dtype) if keys else unused,
             Output("dv", shared.shape(hk, j, dv), call.dtype) if values else unused),
            constants | {"BNHD": shared.bnhd, "KEYS": keys, "VALUES": values, "RUNS": long_keys}, size.warps,
            size.stages, "gradients",
        ))  # fmt: skip
    if long_keys:
        launches.append(_long_keys(call, shared, dout))
    if dbias and not together:
        size = tile("bias_gradients", call, layout.capability)
        full_b, full_h, full_i, full_j = (x > 1 for x in dbias.shape)
        grid = (_cdiv(j, size.keys) if full_j else 1, _cdiv(i, size.queries) if full_i else 1,
                (b if full_b else 1) * (h if full_h else 1))  # fmt: skip
        constants = shared.constants(size, False) | more
        foreign = "BIAS", "SHARED", "BASE2", "POSITIVE", "EVEN", "PACKED"
        constants = {name: x for name, x in constants.items() if name not in foreign}
        launches.append(Launch(
            "bias_gradients", grid, (*base, *saved), (b, h, i, j, rows, *qkv, *shared.pairs, *shared.rest),
            (dbias,),
            constants | {"ALL_B": not full_b, "ALL_H": not full_h, "ALL_I": not full_i,
                         "ALL_J": not full_j},
            size.warps, size.stages, "gradients",
        ))  # fmt: skip
    return tuple(launches)

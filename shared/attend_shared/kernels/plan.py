"""What a call launches: kernels, grids, numbers and outputs as data, so that torch and JAX launch the same.

A plan is a list of `Launch`. A framework keeps a dictionary of arrays by name, runs the launches in order, and puts
each one's outputs into the dictionary. Names of inputs are those of `Inputs` and of earlier outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from attend_shared.call import Call
from attend_shared.kernels import gluon_plan, of_sinks
from attend_shared.kernels.arguments import Ahead, Shared, ahead_of, is_exact, key_passes
from attend_shared.kernels.launch import Launch, Layout, Output, Strides, cdiv, padded
from attend_shared.kernels.sizes import (
    DRAWN,
    DRAWN_TURNS,
    HELD,
    INTERPRETED,
    MANY,
    MUCH_DRAWN,
    MUCH_SHARED,
    PADDED,
    ROWS,
    TILES,
    WORDS,
    padded_rows,
    parts,
    tile,
)
from attend_shared.philox import threshold

BOUNDS = ("alive", "listed", "before", "bounds")  # what is found out ahead, which the way back may be given
SAVED = ("out", "lse", "top", "inverse", "exact", "drawn", *BOUNDS)  # what the way back takes of the way forward


def refusal(call: Call) -> str | None:
    """Why the kernels cannot serve this call on any device, or None."""
    if call.dtype == "float64":
        return "it has no float64"
    if max(call.d, call.dv) > 256:
        return "it takes head sizes of up to 256"
    return None


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
    return cdiv(call.j, PADDED) * (PADDED // 32)


def _bounds(call: Call, layout: Layout, ahead: Ahead, size: int) -> list[Launch]:
    """The launches that find out what is not visited and what is whole, blocks of keys having this size."""
    if not (ahead.ranged or ahead.listed or ahead.packed):
        return []
    b, g = call.b, ahead.group
    rows, keys = cdiv(call.i, g), cdiv(call.j, g)
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
        (Output("alive", (b, cdiv(call.j, min(32, g))), "int32"), Output("live", (b, keys), "int32"),
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
        words = cdiv(call.j, word)
        launches.append(Launch(
            "pack_keys", (cdiv(words, WORDS), b, 1), ("alive", "live"), (call.j, words, keys),
            (Output("listed", (b, call.j), "int32"), Output("before", (b, call.j + 3), "int32")),
            {"G": g, "WORD": word, "BLOCK": WORDS, "MANY": MANY}, 4, 1, "bounds",
        ))  # fmt: skip
    if ahead.listed:
        blocks = cdiv(call.j, size)
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
        aligned: arrays of which rows must begin at multiples of 16 bytes: q, k and v, and on the way back dout and,
            where it is named, the bias.
    """

    forward: tuple[Launch, ...]
    alone: tuple[Launch, ...]
    bounds: tuple[str, ...]
    backward: Callable[[Strides, bool, bool, bool], tuple[Launch, ...]]
    aligned: tuple[str, ...] = ()


@lru_cache(maxsize=4096)
def plan(call: Call, layout: Layout) -> Plan:
    """What a call launches.

    Args:
        call: canonical, none of b, i and j 0; float16, bfloat16 or float32; d and dv at most 256.
        layout: how its arrays lie.
    """
    ahead = ahead_of(call, layout)
    shared = Shared(call, layout, ahead)
    b, h, hk, i = call.b, call.h, call.hk, call.i
    split, exact = parts(call, layout.capability), is_exact(call)
    size = tile("split" if split else "forward", call, layout.capability)
    if split:
        size = size._replace(queries=padded(h // hk * i))
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
            "forward", (1, b * hk, split) if split else (cdiv(i, tiles.queries), b * h, 1),
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
    if not split and gluon_plan.is_plain(call, layout):
        launches[-1] = gluon_plan.plain(call, shared, results)
    if not split and gluon_plan.is_narrow(call, layout):
        launches[-1] = gluon_plan.narrow(call, shared, results)
    if split:
        launches.append(Launch(
            "join", (h // hk * i, b * hk, 1),
            ("sums", "totals", "tops", "sinks" if call.sinks else None, "q_lengths" if call.q_lengths else None),
            (h, i, shared.rows, split, shared.kept), results,
            {"GROUP": h // hk, "DV": call.dv, "BDV": padded(call.dv), "PARTS": 1 << (split - 1).bit_length(),
             "BNHD": shared.bnhd, "Q_LENGTHS": call.q_lengths, "SINKS": call.sinks is not None,
             "BASE2": shared.base2, "EXACT": exact}, 4, 1,
        ))  # fmt: skip

    @lru_cache(maxsize=64)
    def backward(dout: Strides, wants_bias: bool, has_dlse: bool, has_bounds: bool) -> tuple[Launch, ...]:
        found = [] if has_bounds else _bounds(call, layout, ahead, again)
        return *found, *_backward(call, layout, ahead, shared, dout, wants_bias, has_dlse)

    made = {output.name for launch in launches for output in launch.outputs}
    long_keys = gluon_plan.takes_long_keys(call, layout)
    gluon = long_keys or gluon_plan.takes_long_queries(call, layout) or any(launch.gluon for launch in launches)
    aligned = (("q", "k", "v") if gluon else ()) + (("bias",) if long_keys and call.bias else ())
    forward = tuple(launches)
    return Plan(forward, alone or forward, tuple(name for name in bounds if name in made), backward, aligned)


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
    size = max(64, padded(call.d), padded(call.dv))
    if (_with_items(items), 4 if call.dtype == "float32" else 2, size) not in TILES:
        return 0
    most = 256 // size - (call.bias_dtype != call.dtype or (call.mask is not None and not call.key_masked))
    return items if items == 1 or (items <= most and (INTERPRETED or layout.capability in MUCH_SHARED)) else 0


def _with_items(items: int) -> str:
    return "query_and_bias_gradients" + " of items" * (items > 1)


def _queries_and_bias(
    call: Call, layout: Layout, shared: Shared, items: int, more: dict[str, Any], qkv: tuple[int, ...], dbias: Output
) -> Launch:
    size = tile(_with_items(items), call, layout.capability)
    blocks, heads = cdiv(call.i, size.queries), call.b // items * call.h
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


def _draw(call: Call, layout: Layout, shared: Shared) -> Launch:
    size = DRAWN
    turns = size.keys // 32
    return Launch(
        "draw", (shared.rows // size.queries, call.b * call.h, cdiv(words(call), turns * DRAWN_TURNS)),
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
    call: Call, layout: Layout, shared: Shared, qkv: tuple[int, ...], unit: int, by_row: int, has_dlse: bool,
    partial: tuple[int, int, int],
) -> Launch:  # fmt: skip
    """dsinks of the rows that weigh most, made anew, in with the others."""
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
    call: Call, layout: Layout, ahead: Ahead, shared: Shared, dout: Strides, wants_bias: bool, has_dlse: bool
) -> tuple[Launch, ...]:
    b, h, hk, i, j, d, dv = call.b, call.h, call.hk, call.i, call.j, call.d, call.dv
    unit = shared.unit if all(x % shared.unit == 0 for x in dout) else 1
    qkv = tuple(x * shared.unit // unit for x in shared.qkv) + tuple(x // unit for x in dout[:2])
    rows, blocks = shared.rows, shared.rows // ROWS
    sinks = "sinks" if call.sinks else None
    weighs = call.sinks == call.dtype != "float32" and not is_exact(call)  # an out that is rounded
    weighed = of_sinks.weighed(b, h, rows) if weighs else (Output("unused", (1,), "float32", False),) * 4
    partial = (b, h, blocks) if call.sinks else (b, 1, 1)
    launches = [Launch(
        "row_sums", (blocks, b * h, 1),
        ("exact" if is_exact(call) else "out", "dout", "dlse" if has_dlse else None, "top",
         "inverse" if call.sinks or not shared.base2 else None, sinks, "q_lengths" if call.q_lengths else None),
        (h, i, rows, *qkv[-2:], shared.kept),
        (Output("known", (b, h, rows, 2, 2), "float32"),
         Output("partial", partial, "float32", call.sinks is not None and not weighs), *weighed),
        {"DV": dv, "BDV": padded(dv), "BM": ROWS, "UNIT": unit, "DON": dout[2], "BNHD": shared.bnhd,
         "Q_LENGTHS": call.q_lengths, "LSE": has_dlse, "SINKS": call.sinks is not None, "BASE2": shared.base2,
         "WEIGHED": weighs, "PRECISE": call.dtype == "float32"}, 4, 1, "gradients",
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
    long_queries, long_keys = gluon_plan.takes_long_queries(call, layout), gluon_plan.takes_long_keys(call, layout)
    if call.segments and (long_queries or long_keys):
        launches.extend(gluon_plan.order(call, shared, long_queries, long_keys))
    if dbias and together:
        launches.append(_queries_and_bias(call, layout, shared, together, more, qkv, dbias))
    elif long_queries:
        launches.append(gluon_plan.long_queries(call, shared, dout))
    else:
        launches.append(Launch(
            "query_gradients", (cdiv(i, size.queries), b * h, 1),
            (*base, *shared.lists, *saved), (h, i, j, rows, *qkv, *shared.pairs, *shared.rest, call.scale),
            (Output("dq", shared.shape(h, i, d), call.dtype),),
            constants | {"BNHD": shared.bnhd, "LISTED": ahead.listed}, size.warps, size.stages, "gradients",
        ))  # fmt: skip
    unused = Output("unused", (1,), call.dtype, False)
    for kernel, keys, values in key_passes(call) if call.segments or not long_keys else ():
        size = tile(kernel, call, layout.capability)
        constants = shared.constants(size, i % size.queries == 0 and not call.q_lengths) | more
        launches.append(Launch(
            "key_gradients", (cdiv(j, size.keys), b * hk, 1),
            (*base, *shared.lists, *saved, "runs" if long_keys else None),
            (h, i, j, rows, *qkv, *shared.pairs, *shared.rest, call.scale),
            (Output("dk", shared.shape(hk, j, d), call.dtype) if keys else unused,
             Output("dv", shared.shape(hk, j, dv), call.dtype) if values else unused),
            constants | {"BNHD": shared.bnhd, "KEYS": keys, "VALUES": values, "RUNS": long_keys}, size.warps,
            size.stages, "gradients",
        ))  # fmt: skip
    if long_keys:
        launches.append(gluon_plan.long_keys(call, shared, dout))
    if dbias and not together:
        size = tile("bias_gradients", call, layout.capability)
        full_b, full_h, full_i, full_j = (x > 1 for x in dbias.shape)
        grid = (cdiv(j, size.keys) if full_j else 1, cdiv(i, size.queries) if full_i else 1,
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

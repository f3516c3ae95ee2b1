"""The arrays of a case: a call with its cotangents, in NumPy, from the names of its levels.

Each part of a call is drawn by a function of its own, from random numbers of its own. Combined at random, the rules
about who attends to whom would soon leave nothing, or make each other superfluous; so every rule spares one query with
two keys (`_Setting.keys`), and a draw in which a rule rules out nothing is drawn again (`idle_rules`).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attend_shared import oracle
from attend_shared.dtypes import LARGEST, accumulation, round_to
from attend_shared.factors import EDGES, SIZES
from attend_shared.functions import MaskFn, ScoreFn

__all__ = ["Problem", "build", "excluded_keys", "idle_rules"]

# More draws help no case that these do not.
_ATTEMPTS = 24

# The arguments that rule pairs out, one rule each.
_RULES = (
    ("mask",),
    ("bias",),
    ("is_causal", "window_size", "q_offset"),
    ("q_segment_ids", "kv_segment_ids"),
    ("q_lengths",),
    ("kv_lengths",),
    ("mask_fn",),
)


class Problem(NamedTuple):
    """A call with its cotangents, in NumPy, for any framework to evaluate.

    Attributes:
        arguments: keywords of `attend`; what is absent has its default. Floating-point arrays as `attend_shared.dtypes`
            says, rounded to their dtype; masks bool; ids and lengths integers; q, k and v in the call's layout.
        dtypes: the dtype's name for q, k, v and, where given, bias, sinks and "table", which is what a score_fn
            captures. A score_fn and a mask_fn are those of `attend_shared.functions`.
        out_cotangent: shape and layout of out, rounded to q's dtype.
        lse_cotangent: (b, h, i), or None where the call does not ask for lse.
        memory: how q, k and v should lie there: "contiguous"; "strided", every second row of a larger block;
            "expanded", k and v one item with a batch stride of 0.
    """

    arguments: dict[str, Any]
    dtypes: dict[str, str]
    out_cotangent: NDArray[Any]
    lse_cotangent: NDArray[Any] | None
    memory: str


def build(name: str, levels: Mapping[str, str]) -> Problem:
    """The problem of a case, the same each time.

    Args:
        name: the seed of everything random.
        levels: for each factor of `attend_shared.factors`, the name of one level; a combination that can be.

    Example:
        >>> from attend_shared.cases import case
        >>> problem = case("wide", "float16", "heads_grouped").build()
        >>> problem.arguments["q"].shape, problem.arguments["k"].shape, problem.dtypes["q"]
        ((3, 4, 9, 8), (3, 2, 21, 8), 'float16')
    """
    b, h, i, j, d = SIZES[levels["shape"]]
    hk = {"heads_equal": h, "heads_grouped": 2, "heads_one": 1}[levels["heads"]]
    dv = {"value_equal": d, "value_smaller": d // 2, "value_larger": d + 8}[levels["value size"]]
    offset = _offset(levels["offset"], b, i, j)
    row, keys = _spared(levels["position"], offset, b, i, j)
    setting = _Setting(name, levels, b, h, hk, i, j, d, dv, levels["dtype"], row, keys)
    dtype = setting.dtype

    q, k, v = (round_to(x, dtype) for x in _data(setting))
    if levels["memory"] == "expanded":
        k, v = np.repeat(k[:1], b, axis=0), np.repeat(v[:1], b, axis=0)
    dtypes = {"q": dtype, "k": dtype, "v": dtype}
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v}
    arguments |= _position(levels["position"], j)
    if offset is not None:
        arguments["q_offset"] = offset
    # Drawn again, a few times, while something that should rule out pairs rules out none that the rest leaves.
    draws = (arguments | _ruling(setting._replace(attempt=attempt), dtypes) for attempt in range(_ATTEMPTS))
    arguments = _first_busy(draws, 1 if levels["shape"] in EDGES else _ATTEMPTS)
    arguments |= _sinks(setting, dtypes) | _score_fn(setting, dtypes)
    arguments |= _options(setting)

    rng = setting.rng("cotangents")
    out_cotangent = round_to(rng.standard_normal((b, h, i, dv)), dtype)
    lse_cotangent = None
    if levels["lse"] == "lse":
        lse_cotangent = round_to(rng.standard_normal((b, h, i)), accumulation(dtype))
    _poison(setting, arguments, out_cotangent, lse_cotangent)
    if levels["layout"] == "bnhd":
        for each in ("q", "k", "v"):
            arguments[each] = np.ascontiguousarray(arguments[each].swapaxes(1, 2))
        out_cotangent = np.ascontiguousarray(out_cotangent.swapaxes(1, 2))
        arguments["layout"] = "bnhd"
    return Problem(arguments, dtypes, out_cotangent, lse_cotangent, levels["memory"])


def excluded_keys(arguments: dict[str, Any]) -> NDArray[np.bool_]:
    """The keys that a call excludes for a whole item, which nothing may leak from: (b, j).

    They are those that a mask excludes whose head and query axes are both 1, that lie beyond kv_lengths, or that have a
    segment id that no query of their item has.

    Example:
        >>> from attend_shared.cases import case
        >>> excluded_keys(case("square", "lengths_kv").build().arguments).sum(1)
        array([ 4, 10,  0])
    """
    b, j = arguments["k"].shape[0], arguments["k"].shape[2 if arguments.get("layout", "bhnd") == "bhnd" else 1]
    excluded = np.zeros((b, j), np.bool_)
    mask = arguments.get("mask")
    if mask is not None and (mask.ndim == 2 or mask.shape[1:3] == (1, 1)):
        excluded |= ~(mask if mask.ndim == 2 else mask[:, 0, 0])
    if "kv_lengths" in arguments:
        excluded |= np.arange(j) >= arguments["kv_lengths"][:, None]
    if "q_segment_ids" in arguments and "kv_segment_ids" in arguments:
        excluded |= ~(arguments["q_segment_ids"][:, :, None] == arguments["kv_segment_ids"][:, None, :]).any(1)
    return excluded


def idle_rules(arguments: dict[str, Any]) -> tuple[str, ...]:
    """The arguments that rule out no pair which the others leave: a case says nothing about those.

    Example:
        >>> from attend_shared.cases import case
        >>> idle_rules(case("window_open").build().arguments)
        ('window_size',)
    """
    arguments = {name: value for name, value in arguments.items() if not name.startswith("dropout")}
    everything = oracle.allowed(**arguments)
    idle: list[str] = []
    for names in _RULES:
        given = [name for name in names if name in arguments]
        rest = {name: value for name, value in arguments.items() if name not in given}
        rules = given and (given != ["bias"] or np.isneginf(arguments["bias"]).any())
        if rules and np.array_equal(oracle.allowed(**rest), everything):
            idle += given
    return tuple(idle)


def _first_busy(draws: Iterable[dict[str, Any]], attempts: int) -> dict[str, Any]:
    """The first draw in which nothing is idle, or else that with the least."""
    best, fewest = {}, None
    for draw in itertools.islice(draws, attempts):
        idle = len(idle_rules(draw))
        if fewest is None or idle < fewest:
            best, fewest = draw, idle
        if not idle:
            break
    return best


class _Setting(NamedTuple):
    """What the parts of a problem share.

    So that combinations do not rule out everything, every part spares some pairs: in item 0, the query `row` and the
    keys `keys`.
    """

    name: str
    levels: Mapping[str, str]
    b: int
    h: int
    hk: int
    i: int
    j: int
    d: int
    dv: int
    dtype: str
    row: int
    keys: tuple[int, ...]
    attempt: int = 0

    def rng(self, part: str) -> np.random.Generator:
        """Random numbers for one part, which no other part shifts."""
        digest = hashlib.sha256(f"{self.name}/{part}/{self.attempt}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:16], "little"))

    def spare(self, array: NDArray[Any], value: Any) -> None:
        """Put a value where a rank-4 array has the spared pairs."""
        if self.keys:
            full = array.shape
            array[0, :, self.row if full[2] > 1 else 0, list(self.keys) if full[3] > 1 else [0]] = value

    def other_row(self, item: int, rng: np.random.Generator) -> int | None:
        """A row of an item, not the spared one."""
        rows = [row for row in range(self.i) if item or row != self.row]
        return int(rng.choice(rows)) if rows else None


def _ruling(s: _Setting, dtypes: dict[str, str]) -> dict[str, Any]:
    """What rules pairs out, but for positions."""
    return _mask(s) | _bias(s, dtypes) | _segments(s) | _lengths(s) | _mask_fn(s)


def _offset(level: str, b: int, i: int, j: int) -> int | NDArray[np.int32] | None:
    end, items = j - i, np.arange(b)
    match level:
        case "offset_0":
            return 0
        case "offset_end":
            return end
        case "offset_int":
            return -2
        case "offset_huge":
            return 2**40
        case "offset_scalar":
            return np.array(end // 2 + 1, np.int32)
        case "offset_items" | "offset_idle":
            return np.choose(items % 3, [end, 1, -2]).astype(np.int32)
        case "offset_far":
            return np.choose(items % 3, [-(i // 2), 2**31 - 1, -(2**31)]).astype(np.int32)
    return None


def _spared(level: str, offset: Any, b: int, i: int, j: int) -> tuple[int, tuple[int, ...]]:
    """A query of item 0, and the keys at its position and one before: no rule about positions need exclude them."""
    if not (b and i and j):
        return 0, ()
    row = i // 2
    position = j // 2
    if level != "anywhere":
        first = 0 if offset is None else int(np.ravel(offset)[0])
        row = min(max(1 - first, 0), i - 1)
        position = row + first
    return row, tuple(key for key in (position - 1, position) if 0 <= key < j)


def _data(s: _Setting) -> list[NDArray[np.float64]]:
    """q (b h i d), k (b hk j d), v (b hk j dv)."""
    shapes = ((s.b, s.h, s.i, s.d), (s.b, s.hk, s.j, s.d), (s.b, s.hk, s.j, s.dv))
    rng = s.rng("data")
    q, k, v = (rng.standard_normal(shape) for shape in shapes)
    match s.levels["data"]:
        case "large":
            q, k = 5 * q, 5 * k
        case "negative":
            q, k = 5.5 + q / 2, -5.5 + k / 2
        case "constant":
            q, k, v = 1 + q / 16, 1 + k / 16, 1 + v / 16
        case "activations":
            q, k, v = (_activations(shape, part) for part, shape in enumerate(shapes))
    # The logits are what they would be at the default scale. A large scale on top would leave one key to a query, by
    # which no scale is told from another, and of the gradients rounding only: a fused kernel's backward pass makes the
    # logits again, by other products than forward on some processors.
    scale = _options(s).get("scale", 0.0)
    shrink = min(1.0, (s.d**0.5 * scale) ** -0.5) if scale > 0 else 1.0
    return [shrink * q, shrink * k, v]


def _activations(shape: tuple[int, ...], part: int) -> NDArray[np.float64]:
    """Numbers like those in trained models, without chance.

    Channels turn with the position, some channels are far larger than others, and the first position is larger in q and
    k, smaller in v.
    """
    item, head, place, channel = np.ogrid[tuple(slice(size) for size in shape)]
    turned = np.cos(place * 100.0 ** (-channel / shape[-1]) + 0.7 * head + 1.3 * item + part * (channel % 3))
    outlier = np.where(channel % 7 == 1, 4.0, 1.0)
    first = np.where(place == 0, 2.0 if part < 2 else 0.1, 1.0)
    return (turned + 0.25) * outlier * first


def _mask(s: _Setting) -> dict[str, Any]:
    level, rng = s.levels["mask"], s.rng("mask")
    b, h, i, j = s.b, s.h, s.i, s.j
    shape = {
        "mask_key": (b, 1, 1, j),
        "mask_key_shared": (1, 1, 1, j),
        "mask_key_rank4": (b, 1, 1, j),
        "mask_left_padding": (b, 1, 1, j),
        "mask_empty_item": (b, 1, 1, j),
        "mask_head": (1, h, 1, 1),
        "mask_head_key": (b, h, 1, j),
        "mask_rows": (b, 1, i, 1),
        "mask_dense": (b, h, i, j),
        "mask_dense_shared": (1, 1, i, j),
        "mask_empty_rows": (b, 1, i, j),
    }.get(level)
    if shape is None:
        return {}
    mask = rng.random(shape) < 0.75
    if level == "mask_head":
        mask[:] = (np.arange(h) != 1)[:, None, None]
        return {"mask": mask}
    if level == "mask_left_padding":
        mask[:, 0, 0] = np.arange(j) >= np.arange(b)[:, None] * j // (b + 2)
        return {"mask": mask[:, 0, 0]}
    s.spare(mask, True)
    if level in ("mask_rows", "mask_empty_rows"):
        for item in range(b):
            row = s.other_row(item, rng)
            if row is not None:
                mask[item, 0, row] = False
    elif shape[1:3] == (1, 1):  # every item has a key that is excluded and, where it can, one that is not
        for item in range(len(mask)):
            keys = [key for key in range(j) if item or key not in s.keys or j == 1 == len(mask)]
            if keys:
                excluded, kept = rng.permutation(keys)[[0, -1]]
                mask[item, ..., kept] = True
                mask[item, ..., excluded] = False
    if level == "mask_empty_item":
        mask[-1:] = False
    return {"mask": mask if level not in ("mask_key", "mask_key_shared", "mask_empty_item") else mask[:, 0, 0]}


def _bias(s: _Setting, dtypes: dict[str, str]) -> dict[str, Any]:
    level, rng = s.levels["bias"], s.rng("bias")
    if level == "bias_none":
        return {}
    b, h, i, j = full = (s.b, s.h, s.i, s.j)
    shapes = {"bias_over_b": (1, h, i, j), "bias_over_h": (b, 1, i, j), "bias_over_i": (b, h, 1, j),
              "bias_over_j": (b, h, i, 1), "bias_one": (1, 1, 1, 1)}  # fmt: skip
    dtypes["bias"] = dtype = _dtype_of(s.levels["bias dtype"], s.dtype)
    bias = 1.5 * rng.standard_normal(shapes.get(level, full))
    # The lowest number stays finite where float64 meets float32.
    low = -np.inf if level != "bias_lowest" else -min(LARGEST[dtype], LARGEST["float32"])
    if level in ("bias_inf", "bias_inf_rows", "bias_lowest"):
        hit = rng.random(full) < 0.2
        s.spare(hit, False)
        bias[hit] = low
    if level in ("bias_inf_rows", "bias_lowest"):
        for item in range(s.b):
            row = s.other_row(item, rng)
            if row is not None:
                bias[item, :-1, row] = low  # the last head keeps its row
    return {"bias": round_to(bias, dtype)}


def _dtype_of(level: str, dtype: str) -> str:
    if level.endswith("_float32"):
        return "float32"
    if level.endswith("_other"):
        return {"float16": "bfloat16", "bfloat16": "float16", "float32": "float64", "float64": "bfloat16"}[dtype]
    return dtype


def _position(level: str, j: int) -> dict[str, Any]:
    left, right, own = max(2, j // 5), max(1, j // 8), max(2, j // 4)
    arguments: dict[str, dict[str, Any]] = {
        "anywhere": {},
        "causal": {"is_causal": True},
        "window": {"window_size": (left, right)},
        "window_left": {"window_size": (left, None)},
        "window_right": {"window_size": (None, right)},
        "window_self": {"window_size": (own - 1, 0)},
        "window_causal": {"is_causal": True, "window_size": (left, right)},
        "window_zero": {"window_size": (0, 0)},
        "window_open": {"window_size": (None, None)},
    }
    return arguments[level]


def _segments(s: _Setting) -> dict[str, Any]:
    level, rng = s.levels["segments"], s.rng("segments")
    if level == "segments_none":
        return {}
    keys = list(s.keys)

    def runs(size: int) -> NDArray[Any]:
        """Ids in runs, as packing makes them, but with ids that come again; every third item in order."""
        length = max(2, size // 6)
        ids = np.repeat(rng.integers(1, 4, (s.b, size // length + 1)), length, axis=1)[:, :size]
        ids[2::3].sort(axis=1)
        return ids

    q_ids, kv_ids = runs(s.i), runs(s.j)
    if level in ("segments_q", "segments_kv"):
        kv_ids = q_ids
    if level == "segments_alien":
        for item in range(s.b):
            row, others = s.other_row(item, rng), [key for key in range(s.j) if item or key not in keys]
            if others:
                kv_ids[item, rng.random(s.j) < 0.25] = 9
                kv_ids[item, rng.choice(others)] = 9
            if row is not None:
                q_ids[item, row] = 8
    if keys:
        kv_ids[0, keys] = q_ids[0, s.row]
    if level == "segments_negative":
        q_ids, kv_ids = q_ids - 2, kv_ids - 2
    dtypes = {"segments_negative": (np.int8, np.int8), "segments_mixed": (np.uint8, np.int64)}
    q_dtype, kv_dtype = dtypes.get(level, (np.int32, np.int32))
    given = {"q_segment_ids": q_ids.astype(q_dtype), "kv_segment_ids": kv_ids.astype(kv_dtype)}
    unused = {"segments_q": "kv_segment_ids", "segments_kv": "q_segment_ids"}.get(level)
    return {name: ids for name, ids in given.items() if name != unused}


def _lengths(s: _Setting) -> dict[str, Any]:
    level = s.levels["lengths"]
    if level == "lengths_none":
        return {}
    rng, items = s.rng("lengths"), np.arange(s.b) % 3

    def inside(size: int, spared: int) -> NDArray[Any]:
        """Item 0: enough for the spared pairs; item 1: any; item 2: all. In long ones, at the edges of tiles."""
        if size > 64:
            first, second = rng.choice([length for length in (64, 65, 128, 129) if length < size], 2)
        else:
            first, second = 2 * size // 3, int(rng.integers(max(size, 1)))
        return np.choose(items, [max(int(first), spared), second, size])

    q_lengths, kv_lengths = inside(s.i, s.row + 1 if s.keys else 0), inside(s.j, max(s.keys, default=-1) + 1)
    if level == "lengths_outside":
        low = rng.permutation([0, -3])
        q_lengths, kv_lengths = np.choose(items, [s.i + 3, s.i, low[0]]), np.choose(items, [s.j + 7, low[1], s.j + 1])
    q_dtype, kv_dtype = (np.uint8, np.int64) if level == "lengths_mixed" else (np.int32, np.int32)
    given = {"q_lengths": q_lengths.astype(q_dtype), "kv_lengths": kv_lengths.astype(kv_dtype)}
    unused = {"lengths_kv": "q_lengths", "lengths_q": "kv_lengths"}.get(level)
    return {name: lengths for name, lengths in given.items() if name != unused}


def _sinks(s: _Setting, dtypes: dict[str, str]) -> dict[str, Any]:
    level = s.levels["sinks"]
    if level == "sinks_none":
        return {}
    dtypes["sinks"] = _dtype_of(level, s.dtype)
    sinks = 2 * s.rng("sinks").standard_normal(s.h)
    if level == "sinks_inf":
        sinks[1] = -np.inf
    return {"sinks": round_to(sinks, dtypes["sinks"])}


def _score_fn(s: _Setting, dtypes: dict[str, str]) -> dict[str, Any]:
    """Its table is in the accumulation dtype: sums over all the pairs that read an entry are made in it."""
    kind, rng = s.levels["score_fn"].removeprefix("score_"), s.rng("score_fn")
    if kind == "none":
        return {}
    dtypes["table"] = accumulation(s.dtype)
    reach = max(1, min(s.i, s.j) // 2)
    table = {
        "relative": lambda: rng.standard_normal((s.h, 2 * reach + 1)),
        "alibi": lambda: 2.0 ** -rng.uniform(1, 6, s.h),
        "temperature": lambda: rng.uniform(0.5, 1.5, (s.b, s.h)),
        "bound": lambda: 1 / rng.uniform(2, 6, s.h),
    }[kind]()
    return {"score_fn": ScoreFn(kind, round_to(table, dtypes["table"]))}


def _mask_fn(s: _Setting) -> dict[str, Any]:
    kind, rng = s.levels["mask_fn"].removeprefix("rule_"), s.rng("mask_fn")
    length = max(s.i, s.j)
    match kind:
        case "document":
            table = rng.integers(0, 3, (s.b, length))
            if s.keys:
                table[0, list(s.keys)] = table[0, s.row]
        case "near":
            table = rng.integers(max(1, length // 4), max(2, length // 2), s.h)
            table[:] = np.maximum(table, max((abs(key - s.row) for key in s.keys), default=0))
        case "prefix":
            table = rng.integers(0, max(1, s.j // 2), s.b)
            table[:1] = np.maximum(table[:1], max(s.keys, default=-1) + 1)
        case "rows":
            alive = rng.random((s.b, length)) < 0.75
            for item in range(s.b):
                row = s.other_row(item, rng)
                if row is not None:
                    alive[item, row] = False
            if s.keys:
                alive[0, s.row] = True
            return {"mask_fn": MaskFn(kind, alive)}
        case _:
            return {}
    return {"mask_fn": MaskFn(kind, table.astype(np.int32))}


def _options(s: _Setting) -> dict[str, Any]:
    """softcap, scale, dropout and its seed."""
    words = s.rng("dropout").integers(0, 2**32, 2, dtype=np.uint32)
    by_level: dict[str, dict[str, Any]] = {
        "softcap_2": {"softcap": 2.0},
        "softcap_30": {"softcap": 30.0},
        "scale_0": {"scale": 0.0},
        "scale_negative": {"scale": -0.3},
        "scale_10": {"scale": 10.0},
        "scale_tiny": {"scale": 0.001},
        "scale_int": {"scale": 1},
        "dropout_tenth": {"dropout": 0.1, "dropout_seed": 2**32 + int(words[0])},
        "dropout_half": {"dropout": 0.5, "dropout_seed": words},
        "dropout_most": {"dropout": 0.75, "dropout_seed": 2**64 - 1},
        "dropout_unused": {"dropout_seed": int(words[0])},
    }
    options: dict[str, Any] = {}
    for factor in ("softcap", "scale", "dropout"):
        options |= by_level.get(s.levels[factor], {})
    return options


def _poison(
    s: _Setting, arguments: dict[str, Any], out_cotangent: NDArray[Any], lse_cotangent: NDArray[Any] | None
) -> None:
    """Write NaN and infinities where nothing may leak from; everything is (b h n d) still."""
    level, rng = s.levels["poison"], s.rng("poison")
    if level in ("poison_nan", "poison_inf"):
        keys = excluded_keys(arguments)
        if s.levels["memory"] == "expanded":
            keys[:] = keys.all(0)
        for name in ("k", "v"):
            hit = np.broadcast_to(keys[:, None, :, None], arguments[name].shape)
            signs = np.where(rng.random(arguments[name].shape) < 0.5, -1, 1)
            arguments[name][hit] = np.nan if level == "poison_nan" else (signs * np.inf)[hit]
            if s.levels["memory"] == "expanded":
                arguments[name][:] = arguments[name][:1]
    if level == "poison_rows":
        rows = np.arange(s.i) >= arguments["q_lengths"][:, None]
        arguments["q"][np.broadcast_to(rows[:, None, :, None], arguments["q"].shape)] = np.nan
        out_cotangent[np.broadcast_to(rows[:, None, :, None], out_cotangent.shape)] = np.inf
        # With a sink the lse of such a row is the sink, whose gradient is that row's cotangent.
        if lse_cotangent is not None and "sinks" not in arguments:
            lse_cotangent[np.broadcast_to(rows[:, None], lse_cotangent.shape)] = np.nan

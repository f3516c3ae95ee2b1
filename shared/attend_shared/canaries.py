"""The calls that kernels are known to get wrong, as data: what `attend doctor` runs on a machine.

Each is one danger: the smallest call that has it. Its `traits` say which calls share that danger (`avoid.TRAITS`): what
comes out wrong here is wrong wherever they hold, or nothing is known that tells those calls apart. Where the danger is
in the numbers themselves nothing does, and the trait is "any call".

The cases of `attend_shared.cases` ask whether every clause is kept, at sizes that compile quickly. These ask whether
the kernels of this machine are right, at sizes at which they take the roads that are known to be bad.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attend_shared.dtypes import LARGEST, accumulation, round_to
from attend_shared.problems import Problem, excluded_keys

__all__ = ["CANARIES", "Canary", "Size", "find"]


class Size(NamedTuple):
    """b batch, h query heads, hk key/value heads, i query length, j key length, d head size, dv value head size."""

    b: int = 2
    h: int = 2
    hk: int = 2
    i: int = 128
    j: int = 128
    d: int = 64
    dv: int = 64


class Canary(NamedTuple):
    """One danger.

    Attributes:
        name: in words.
        danger: what goes wrong where, in a sentence.
        traits: the calls that share it: those of which all of these hold.
        size: of the call.
        data: what q, k and v are like: a key of `DATA`.
        options: keywords of `attend` that are not arrays.
        arrays: keywords of `attend` that are, each with the name of what it is: a key of `ARRAYS`.
        sees_empty_rows: whether the loss touches rows without a key.
        poison: whether NaN lies in keys and values that are excluded for a whole item.
        lse: whether lse is asked for.
        quick: whether a quick run has it.
        repeat: whether it is run twice, to compare the bits.
    """

    name: str
    danger: str
    traits: tuple[str, ...]
    size: Size = Size()
    data: str = "normal"
    options: Mapping[str, Any] = {}
    arrays: Mapping[str, str] = {}
    sees_empty_rows: bool = True
    poison: bool = False
    lse: bool = False
    quick: bool = False
    repeat: bool = False

    def build(self, dtype: str) -> Problem:
        """The call with its cotangents, the same each time.

        Args:
            dtype: of q, k and v.

        Example:
            >>> problem = find("decoding").build("bfloat16")
            >>> problem.arguments["q"].shape, problem.arguments["k"].shape, problem.dtypes["q"]
            ((2, 4, 1, 64), (2, 2, 1000, 64), 'bfloat16')
        """
        return _build(self, dtype)


CAUSAL = {"is_causal": True}
ANY = ("any call",)
EMPTY = ("may have empty rows",)
LONG = Size(b=1, i=32, j=4224)
LONG64 = Size(b=1, h=4, i=200, j=2048)
LONG128 = Size(b=1, h=4, i=200, j=2048, d=128, dv=128)
MANY128 = Size(b=1, h=9, hk=9, i=1024, j=1024, d=128, dv=128)
DECODE = Size(h=4, hk=2, i=1, j=1000)
L64, K64 = "q_len % 128 == 64", "kv_len % 128 == 64"

CANARIES = (
    # Nothing special, and numbers that are not random.
    Canary("plain", "nothing at all: what is wrong here is wrong everywhere", ANY, quick=True, repeat=True),
    Canary("very low logits", "a softmax that takes off no maximum underflows: 0 / 0, or a row taken for an empty one",
           ANY, data="low", quick=True),
    Canary("equal keys", "every weight is alike: dq and dk cancel to 0, and what does not cancel shows", ANY,
           data="equal", quick=True),
    Canary("constant rows", "every channel of a row is alike, as in an initialised model", ANY, data="constant"),
    Canary("one outlier", "one key far larger than the others, which takes nearly all weight", ANY, data="outlier",
           quick=True),
    Canary("rising keys", "logits that rise along the row: a running maximum changes with every block", ANY,
           data="rising"),
    Canary("falling keys", "logits that fall along the row: all but the first block weigh next to nothing", ANY,
           data="falling"),
    Canary("activations", "rotations by position, outlier channels, a first key that draws weight", ANY,
           data="activations"),
    # Lengths.
    Canary("64 of 128 queries", "a last block that is half full", (L64,), Size(i=192), quick=True),
    Canary("64 of 128 keys", "a last block that is half full", (K64,), Size(j=192)),
    Canary("64 of 128, causal", "a last block that is half full, on the diagonal", (L64,), Size(i=192, j=192),
           options=CAUSAL, quick=True),
    Canary("1 of 32 keys", "a last block, or a last vector, with a single key in it", ("kv_len % 32 == 1",),
           Size(j=129), quick=True),
    Canary("odd lengths", "rows and keys that no vector ends at", ("q_len % 8 != 0", "kv_len % 8 != 0"),
           Size(i=77, j=91)),
    Canary("one key", "every weight is 1: dq and dk are 0", ("kv_len == 1",), Size(i=32, j=1), quick=True),
    Canary("many blocks", "sums over several blocks of queries and keys, in whatever order they are done",
           ("q_len > 512",), Size(b=1, i=577, j=577), options=CAUSAL, repeat=True),
    Canary("long rows", "sums over thousands of keys", ("kv_len >= 4096",), LONG),
    Canary("long rows of 128", "what kernels of their own are for: warps with roles, which wait for each other",
           ("kv_len >= 2048", "d == 128"), LONG128, repeat=True),
    Canary("long rows of 128, causal", "the same, the diagonal in the last blocks",
           ("kv_len >= 2048", "d == 128", "causal"), LONG128, options={**CAUSAL, "q_offset": 1848}),
    Canary("long rows of 128, window", "the same, its ends in the first and the last blocks",
           ("kv_len >= 2048", "d == 128", "window"), LONG128, options={"window_size": (600, 0), "q_offset": 1848}),
    Canary("long rows of 128, softcap", "the same with weights over the first block's largest logit, not the row's",
           ("kv_len >= 2048", "d == 128", "softcap"), LONG128, data="climbing", options={"softcap": 50.0}),
    Canary("long rows of 64", "the same with three groups of warps, which have other queries and see other keys",
           ("kv_len >= 2048, d == 64",), LONG64, repeat=True),
    Canary("long rows of 64, causal, sinks", "the same, the diagonal in the last blocks, and one more term at the end",
           ("kv_len >= 2048, d == 64", "causal", "sinks"), LONG64, options={**CAUSAL, "q_offset": 1848},
           arrays={"sinks": "sinks"}),
    Canary("many queries of 128", "the same on the way back, where keys go over queries, and programs over keys",
           ("q_len >= 1024", "d == 128"), MANY128, repeat=True),
    Canary("many queries of 128, negative scale", "the same, and a fill before the scale",
           ("q_len >= 1024", "d == 128", "scale <= 0", "causal"), MANY128, options={**CAUSAL, "scale": -0.3}),
    Canary("many queries of 64, trained bias", "the same, and tiles of a bias that keys read by their side",
           ("q_len >= 1024", "bias"), MANY128._replace(d=64, dv=64), options=CAUSAL, arrays={"bias": "normal"}),
    # Rows without a key.
    Canary("left padding", "causal with keys masked on the left: the first rows have no key, and the loss sees them",
           EMPTY, options=CAUSAL, arrays={"mask": "left"}, quick=True),
    Canary("left padding, not in the loss", "the same with a loss that leaves those rows out", EMPTY, options=CAUSAL,
           arrays={"mask": "left"}, sees_empty_rows=False),
    Canary("left padding, 64 of 128", "the same at a last block that is half full", (*EMPTY, L64),
           Size(i=192, j=192), options=CAUSAL, arrays={"mask": "left"}, quick=True),
    Canary("left padding, 64 of 128, not in the loss", "the same with a loss that leaves those rows out", (*EMPTY, L64),
           Size(i=192, j=192), options=CAUSAL, arrays={"mask": "left"}, sees_empty_rows=False, quick=True),
    Canary("empty item", "a key mask that leaves an item without a key", ("key mask",), arrays={"mask": "no item"},
           quick=True),
    Canary("empty rows", "a mask over pairs that leaves some rows without a key", ("dense mask",),
           arrays={"mask": "rows"}),
    Canary("empty head", "a mask that leaves a head without a key", ("dense mask",), arrays={"mask": "head"}),
    Canary("no real key", "kv_lengths of 0", ("kv_lengths",), arrays={"kv_lengths": "some 0"}, quick=True),
    Canary("no real query", "q_lengths of 0, and NaN in what they cut off", ("q_lengths",),
           arrays={"q_lengths": "some 0", "kv_lengths": "some"}, poison=True),
    Canary("foreign segments", "segment ids that no key has", ("segment ids",),
           arrays={"q_segment_ids": "queries", "kv_segment_ids": "keys"}),
    Canary("documents", "packed sequences that end within blocks, where the next one's keys are loaded with theirs",
           ("segment ids", "causal"), Size(b=1, i=258, j=258), options=CAUSAL, arrays={"q_segment_ids": "documents"}),
    Canary("rows of -inf", "a bias that rules out whole rows", ("bias",), arrays={"bias": "-inf rows"}),
    Canary("rows of the lowest number", "a bias of the lowest finite number in a whole row: a mean, not an empty row",
           ("bias",), arrays={"bias": "lowest rows"}),
    Canary("before the first key", "causal with an offset that puts the first rows before every key",
           (*EMPTY, "q_offset"), options={**CAUSAL, "q_offset": -16}),
    Canary("window past the keys", "a window and lengths that leave the last rows without a key",
           ("window", "kv_lengths"), options={"window_size": (16, 0)}, arrays={"kv_lengths": "some"}),
    # What must not leak.
    Canary("NaN in masked keys", "0 * NaN is NaN", ("key mask",), arrays={"mask": "holes"}, poison=True, quick=True),
    Canary("NaN beyond kv_lengths", "0 * NaN is NaN", ("kv_lengths",), arrays={"kv_lengths": "some"}, poison=True),
    Canary("NaN in foreign segments", "0 * NaN is NaN", ("segment ids",),
           arrays={"q_segment_ids": "queries", "kv_segment_ids": "keys"}, poison=True),
    # Options.
    Canary("scale of 0", "weights that are alike whatever q and k are", ("scale <= 0",), options={"scale": 0.0}),
    Canary("scale of 0, 24 keys", "the same where no tile is full: a fill behind the last key is NaN there",
           ("scale <= 0",), Size(i=24, j=24), options={"scale": 0.0}, quick=True),
    Canary("negative scale, empty rows", "the same of a mask, whose fill is +inf then", ("scale <= 0",),
           Size(d=128, dv=128), options={"scale": -0.3}, arrays={"mask": "rows"}),
    Canary("negative scale, causal", "a fill before the scale is +inf after it", ("scale <= 0", "causal"),
           options={**CAUSAL, "scale": -0.3}, quick=True),
    Canary("softcap", "a bound on the logits, and its derivative", ("softcap",), options={"softcap": 5.0}),
    Canary("sinks", "one more term in the denominator, the only one in rows without a key", ("sinks",),
           options=CAUSAL, arrays={"mask": "left", "sinks": "sinks"}),
    Canary("trained bias", "a bias with a gradient of its own", ("bias",), arrays={"bias": "normal"}),
    Canary("dropout", "weights that are dropped, the same ones forward and backward", ("dropout",),
           options={"dropout": 0.25, "dropout_seed": 2**40 + 7}),
    Canary("lse", "-inf in rows without a key, and a gradient", ("lse",), options=CAUSAL, arrays={"mask": "left"},
           lse=True, quick=True),
    # Heads and sizes.
    Canary("grouped heads", "eight query heads on two key heads", ("grouped heads",), Size(h=8), options=CAUSAL,
           quick=True, repeat=True),
    Canary("one key head", "four query heads on one key head", ("grouped heads",), Size(h=4, hk=1)),
    Canary("d = 20", "rows that no vector ends at", ("d % 8 != 0",), Size(d=20, dv=20)),
    Canary("d = 72", "half a tile of the tensor cores", ("d % 16 != 0",), Size(d=72, dv=72)),
    Canary("d = 256", "tiles that no longer fit", ("d > 128",), Size(d=256, dv=256)),
    Canary("dv < d", "another head size for values", ("dv != d",), Size(dv=32)),
    Canary("dv > d", "another head size for values", ("dv != d",), Size(dv=128)),
    Canary("layout bnhd", "heads inside, with strides that are not those of a block", ("layout bnhd",),
           Size(h=4, hk=2), options={**CAUSAL, "layout": "bnhd"}),
    # Positions.
    Canary("causal", "the diagonal", ("causal",), options=CAUSAL, quick=True),
    Canary("window of 64", "a window that ends where a block does", ("window",), Size(i=256, j=256),
           options={"window_size": (63, 0)}, quick=True),
    Canary("window of 65", "a window that ends one key into a block", ("window",), Size(i=256, j=256),
           options={"window_size": (64, 0)}),
    Canary("window to both sides", "a window that begins and ends within blocks", ("window",), Size(i=192, j=256),
           options={"window_size": (31, 33), "q_offset": 0}),
    Canary("decoding", "one query against many keys", ("q_len == 1",), DECODE, options={**CAUSAL, "q_offset": 999},
           quick=True),
    Canary("decoding, ragged", "one query of each item at a place of its own", ("q_len == 1", "q_offset"), DECODE,
           options=CAUSAL, arrays={"q_offset": "places"}),
    Canary("decoding in chunks", "a few queries at the end of many keys", ("q_offset",), Size(i=16, j=272),
           options={**CAUSAL, "q_offset": 256}),
)  # fmt: skip
"""Every danger, in the order of a table."""


def find(name: str) -> Canary:
    """The canary of a name.

    Raises:
        ValueError: there is none.
    """
    for canary in CANARIES:
        if canary.name == name:
            return canary
    raise ValueError(f"canary: expected one of {', '.join(it.name for it in CANARIES)}, got {name!r}")


# How their arrays are made.


def _rng(*seeds: str) -> np.random.Generator:
    digest = hashlib.sha256("/".join(seeds).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def _build(canary: Canary, dtype: str) -> Problem:
    size = canary.size
    q, k, v = (round_to(x, dtype) for x in _data(canary))
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, **canary.options}
    dtypes = {"q": dtype, "k": dtype, "v": dtype}
    for name, kind in canary.arrays.items():
        arguments[name] = _array(kind, size, dtype, _rng(canary.name, name))
        if name in ("bias", "sinks"):
            dtypes[name] = dtype
    rng = _rng(canary.name, "cotangents")
    out_cotangent = round_to(rng.standard_normal((size.b, size.h, size.i, size.dv)), dtype)
    lse_cotangent = None
    if canary.lse:
        lse_cotangent = round_to(rng.standard_normal((size.b, size.h, size.i)), accumulation(dtype))
    if not canary.sees_empty_rows:
        alive = np.broadcast_to(_alive(arguments, size), out_cotangent.shape[:3])
        out_cotangent[~alive] = 0
    if canary.poison:
        _poison(arguments, out_cotangent)
    if canary.options.get("layout") == "bnhd":
        for name in ("q", "k", "v"):
            arguments[name] = np.ascontiguousarray(arguments[name].swapaxes(1, 2))
        out_cotangent = np.ascontiguousarray(out_cotangent.swapaxes(1, 2))
    return Problem(arguments, dtypes, out_cotangent, lse_cotangent, "contiguous")


def _data(canary: Canary) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """q (b h i d), k (b hk j d), v (b hk j dv)."""
    s, rng = canary.size, _rng(canary.name, "data")
    q, k, v = (rng.standard_normal(shape) for shape in
               ((s.b, s.h, s.i, s.d), (s.b, s.hk, s.j, s.d), (s.b, s.hk, s.j, s.dv)))  # fmt: skip
    places = np.linspace(0, 1, s.j)[:, None]
    match canary.data:
        case "low":  # logits about -5.5 * 5.5 * sqrt(d)
            q, k = 5.5 + q / 4, -5.5 + k / 4
        case "equal":
            k[:] = k[:, :, :1]
        case "constant":
            q, k = np.broadcast_to(q[..., :1], q.shape), np.broadcast_to(k[..., :1] / 4, k.shape)
        case "outlier":
            k[:, :, s.j // 3] *= 30
        case "rising":
            q, k = np.abs(q), k / 8 + 2 * places
        case "falling":
            q, k = np.abs(q), k / 8 - 2 * places
        case "climbing":  # logits from about -0.8 * 6 * sqrt(d) to as much above 0
            q, k = np.abs(q), k / 8 + 12 * places - 6
        case "activations":
            q, k, v = (_activations(x.shape, part) for part, x in enumerate((q, k, v)))
    return q, k, v


def _activations(shape: tuple[int, ...], part: int) -> NDArray[np.float64]:
    """Channels that turn with the position, some far larger than others, and a first position of its own."""
    item, head, place, channel = np.ogrid[tuple(slice(size) for size in shape)]
    turned = np.cos(place * 50.0 ** (-channel / shape[-1]) + 0.5 * head + 1.1 * item + part)
    return (turned + 0.2) * np.where(channel % 13 == 4, 4.0, 0.5) * np.where((place == 0) & (part < 2), 2.0, 1.0)


def _array(kind: str, s: Size, dtype: str, rng: np.random.Generator) -> NDArray[Any]:
    """An argument that is no q, k or v: masks True where may attend, the last item always the odd one."""
    items = np.arange(s.b)[:, None]
    match kind:
        case "left":  # (b, j): the first keys of each item are padding
            return np.arange(s.j) >= 11 + 32 * items
        case "no item":
            return np.broadcast_to(items != s.b - 1, (s.b, s.j)).copy()
        case "holes":
            return (rng.random((s.b, s.j)) < 0.7) | (np.arange(s.j) == 0)
        case "rows":
            mask = rng.random((s.b, 1, s.i, s.j)) < 0.7
            mask[:, :, 3::17] = False
            return mask
        case "head":
            return (np.arange(s.h) != 1)[None, :, None, None]
        case "some":
            return np.where(np.arange(s.b) == s.b - 1, 41, 100).astype(np.int32)
        case "some 0":
            return np.where(np.arange(s.b) == s.b - 1, 0, 100).astype(np.int32)
        case "queries":  # runs of 32, one of them an id that no key has
            return np.where(np.arange(s.i) // 32 == 1, 7, np.arange(s.i) // 32 % 3) + 0 * items.astype(np.int32)
        case "keys":  # runs of 24, one of them an id that no query has
            return np.where(np.arange(s.j) // 24 == 1, 9, np.arange(s.j) // 24 % 3) + 0 * items.astype(np.int32)
        case "documents":
            return np.repeat([5, 3, 8, 0, 2], [1, 63, 64, 65, s.i - 193]).astype(np.int32)[None]
        case "normal":
            return round_to(rng.standard_normal((1, s.h, s.i, s.j)), dtype)
        case "-inf rows" | "lowest rows":
            bias = rng.standard_normal((s.b, s.h, s.i, s.j))
            bias[:, :, 5::19] = -np.inf if kind == "-inf rows" else -min(LARGEST[dtype], LARGEST["float32"])
            return round_to(bias, dtype)
        case "sinks":
            return round_to(rng.standard_normal(s.h), dtype)
        case "places":
            return np.where(np.arange(s.b) == s.b - 1, 63, s.j - 1).astype(np.int32)
    raise ValueError(f"arrays: {kind!r} is nothing that a canary has")


def _alive(arguments: Mapping[str, Any], s: Size) -> NDArray[np.bool_]:
    """Which rows have a key, (b, 1, i), under a key mask and causal."""
    return (arguments["mask"][:, None, None] & np.tri(s.i, s.j, dtype=bool)).any(-1)


def _poison(arguments: dict[str, Any], out_cotangent: NDArray[Any]) -> None:
    """NaN in keys and values that are excluded for a whole item, and in rows that q_lengths empties."""
    keys = excluded_keys(arguments)
    for name in ("k", "v"):
        arguments[name][np.broadcast_to(keys[:, None, :, None], arguments[name].shape)] = np.nan
    if "q_lengths" in arguments:
        rows = (np.arange(arguments["q"].shape[2]) >= arguments["q_lengths"][:, None])[:, None, :, None]
        for x in (arguments["q"], out_cotangent):
            x[np.broadcast_to(rows, x.shape)] = np.nan

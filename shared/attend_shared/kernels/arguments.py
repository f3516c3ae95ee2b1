"""What the launches of a call have in common: what is found out ahead, and the arguments that kernels share."""

from __future__ import annotations

from typing import Any, NamedTuple

from attend_shared.call import FAR, Call
from attend_shared.kernels.launch import LOG2E, Layout, Strides, Tile, far, padded
from attend_shared.kernels.sizes import INTERPRETED, in_full, padded_rows, tile
from attend_shared.philox import threshold


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


def ahead_of(call: Call, layout: Layout) -> Ahead:
    """What is found out ahead for a call."""
    names = "forward", "split", "query_gradients", *(name for name, *_ in key_passes(call))
    sizes = [tile(name, call, layout.capability) for name in names]
    searched = call.segments and (not layout.one_id or call.q_lengths)
    group = min(size for each in sizes for size in each[:2])
    packed = call.key_masked and not (call.segments or call.bias or call.dropout)  # whose columns are neighbours
    return Ahead(group, call.segments, searched, searched or (call.key_masked and not packed), packed)


def key_passes(call: Call) -> tuple[tuple[str, bool, bool], ...]:
    """The passes over queries that make dk and dv: whose tile, and which of the two it makes.

    The sums of both, of rows of 256, fill more registers than there are: in two passes the logits are made twice.
    """
    if call.dtype == "float32" or max(padded(call.d), padded(call.dv)) < 256:
        return (("key_gradients", True, True),)
    return ("value_gradients", False, True), ("key_gradients", True, False)


def is_exact(call: Call) -> bool:
    """Whether a gradient may be finer than out is, so that the way back needs it as it was before it was rounded."""
    return call.dtype != "float32" and any(name not in (None, call.dtype) for name in (call.bias_dtype, call.sinks))


class Shared:
    """Arguments that the kernels have in common."""

    def __init__(self, call: Call, layout: Layout, ahead: Ahead) -> None:
        self.call, self.layout, self.ahead = call, layout, ahead
        self.bnhd = call.layout == "bnhd"
        # A bias may be as low as numbers go; and of large logits lse in float32 has too few digits left for weights.
        self.base2 = call.bias is None and call.dtype != "float32"
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
        at = far({"zero": 0, "end": call.j - call.i, "data": layout.at}[call.offset])
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
        return max(64 if apart else 16, padded(size))

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

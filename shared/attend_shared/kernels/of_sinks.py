"""What dsinks of half precision launches, `attend_shared.kernels.sinks`: data, for torch and JAX alike.

`launches` is for FlashAttention's packages; `plan` has for `triton` what it shares with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from attend_shared.kernels.launch import Launch, Output, Strides, cdiv, far, padded
from attend_shared.kernels.sizes import MANY, PADDED, ROWS

LANES = 8192  # numbers of a tile of keys
WEIGHED = "term", "weight", "largest", "squares"


def weighed(b: int, h: int, rows: int) -> tuple[Output, ...]:
    """What rows are weighed by, of which there are so many, with those that fill blocks up."""
    shapes = (b, h, rows), (b, h, rows), (b, h, rows // ROWS), (b, h, rows // ROWS)
    return tuple(Output(name, shape, "float32") for name, shape in zip(WEIGHED, shapes, strict=True))


def sum_rows(
    inputs: Mapping[str, str | None], numbers: tuple[int | float, ...], blocks: tuple[int, int, int],
    constants: Mapping[str, Any],
) -> Launch:  # fmt: skip
    """The launch of this kernel: what a call has not got may be left out. blocks: the shape of "partial"."""
    b, h, count = blocks
    d, dv = padded(constants["D"]), padded(constants["DV"])
    names = ("q", "k", "v", "mask", "bias", "q_segment_ids", "kv_segment_ids", "q_lengths", "kv_lengths", "q_offset",
             "dropout_seed", "starts")  # fmt: skip
    given = (*(inputs.get(name) for name in names), "dout", "lse", inputs.get("dlse"), "sinks", *WEIGHED)
    fixed = dict.fromkeys(("OFFSET", "THRESHOLD", "MJ", "BJ"), 0)
    fixed |= dict.fromkeys(("ENDS", "RUNS", "SEGMENTS", "MASK", "BIAS"), False)
    fixed |= {"BD": d, "BDV": dv, "BM": ROWS, "BN": max(16, LANES // max(d, dv)), "PARTS": MANY}
    return Launch(
        "sum_rows", (count, b * h, 1), given, numbers, (Output("partial", blocks, "float32"),), fixed | {**constants},
        4, 1, "sinks",
    )  # fmt: skip


class Rows(NamedTuple):
    """A call as a package has it.

    Attributes:
        b, h, hk, i, j, d: the sizes, d of q, k, v and out alike.
        left, right: as `attend_shared.flash.window` counts them, or None.
        scale, softcap: floats, softcap None where there is none.
        q_lengths, kv_lengths, dlse: whether they are given.
        starts: how many starts of runs there are, the end among them; 0: none.
        sinks: their dtype.
    """

    b: int
    h: int
    hk: int
    i: int
    j: int
    d: int
    left: int | None
    right: int | None
    scale: float
    softcap: float | None
    q_lengths: bool
    kv_lengths: bool
    dlse: bool
    starts: int
    sinks: str


@lru_cache(maxsize=1024)
def launches(rows: Rows, q: Strides, k: Strides, v: Strides, out: Strides, dout: Strides) -> tuple[Launch, ...]:
    """They take "q", "k", "v", "out", "dout", "lse" (b h i), "sinks", "dlse", "q_lengths", "kv_lengths" and "starts",
    and give "dsinks".

    Args:
        q, k, v, out, dout: their strides by (b, h, n), in elements, the last axis being contiguous.
    """
    b, h, i, d = rows.b, rows.h, rows.i, rows.d
    unit = 8 if all(x % 8 == 0 for of in (q, k, v, out, dout) for x in of) else 1
    blocks = cdiv(i, PADDED) * (PADDED // ROWS)
    of_blocks = (b, h, blocks)
    (ob, oh, on), (dob, doh, don) = out, dout
    dlse = "dlse" if rows.dlse else None
    lengths = "q_lengths" if rows.q_lengths else None, "kv_lengths" if rows.kv_lengths else None
    left, right = (0 if x is None else far(x) for x in (rows.left, rows.right))
    units = tuple(x // unit for of in (q, k, v, dout) for x in of[:2])
    return (
        Launch(
            "weigh_rows", (blocks, b * h, 1), ("out", "dout", "lse", dlse, "sinks", lengths[0]),
            (h, i, blocks * ROWS, ob // unit, oh // unit, dob // unit, doh // unit), weighed(b, h, blocks * ROWS),
            {"D": d, "BD": padded(d), "BM": ROWS, "UNIT": unit, "ON": on, "DON": don, "LSE": rows.dlse,
             "Q_LENGTHS": rows.q_lengths}, 4, 1, "sinks",
        ),
        sum_rows(
            {"q": "q", "k": "k", "v": "v", "q_lengths": lengths[0], "kv_lengths": lengths[1], "dlse": dlse,
             "starts": "starts" if rows.starts else None},
            (b, h, i, rows.j, blocks * ROWS, rows.starts, *units, *(0,) * 6, 0, left, right, rows.scale,
             rows.softcap or 0.0, 1.0),
            of_blocks,
            {"GROUP": h // rows.hk, "D": d, "DV": d, "UNIT": unit, "QN": q[2], "KN": k[2], "VN": v[2], "DON": don,
             "LSE": rows.dlse, "LEFT": rows.left is not None, "RIGHT": rows.right is not None, "ENDS": True,
             "Q_LENGTHS": rows.q_lengths, "KV_LENGTHS": rows.kv_lengths, "RUNS": rows.starts > 0,
             "SOFTCAP": rows.softcap is not None},
        ),
        Launch(
            "sum_sinks", (h, 1, 1), ("partial",), (h, b, blocks), (Output("dsinks", (h,), rows.sinks),),
            {"BLOCK": MANY}, 4, 1, "gradients",
        ),
    )  # fmt: skip

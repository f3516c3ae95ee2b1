"""What dsinks of FlashAttention's packages launches, `attend_shared.kernels.sinks`: data, for torch and JAX alike."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from attend_shared.call import FAR
from attend_shared.kernels.plan import MANY, PADDED, ROWS, Launch, Output, Strides, _cdiv, _padded

LANES = 8192  # numbers of a tile of keys


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
    blocks = _cdiv(i, PADDED) * (PADDED // ROWS)
    of_rows, of_blocks = (b, h, blocks * ROWS), (b, h, blocks)
    (ob, oh, on), (dob, doh, don) = out, dout
    dlse = "dlse" if rows.dlse else None
    lengths = "q_lengths" if rows.q_lengths else None, "kv_lengths" if rows.kv_lengths else None
    weighed = tuple(Output(name, of_rows, "float32") for name in ("term", "weight"))
    weighed += tuple(Output(name, of_blocks, "float32") for name in ("largest", "squares"))
    shape = {"D": d, "BD": _padded(d), "BM": ROWS, "UNIT": unit, "DON": don, "LSE": rows.dlse,
             "Q_LENGTHS": rows.q_lengths}  # fmt: skip
    left, right = (0 if x is None else max(-FAR, min(FAR, x)) for x in (rows.left, rows.right))
    units = tuple(x // unit for of in (q, k, v, dout) for x in of[:2])
    return (
        Launch(
            "weigh_rows", (blocks, b * h, 1), ("out", "dout", "lse", dlse, "sinks", lengths[0]),
            (h, i, blocks * ROWS, ob // unit, oh // unit, dob // unit, doh // unit), weighed, shape | {"ON": on}, 4, 1,
            "sinks",
        ),
        Launch(
            "sum_rows", (blocks, b * h, 1),
            ("q", "k", "v", "dout", "lse", dlse, "sinks", *lengths, "starts" if rows.starts else None,
             *(output.name for output in weighed)),
            (b, h, i, rows.j, blocks * ROWS, rows.starts, *units, left, right, rows.scale,
             rows.softcap or 0.0),
            (Output("partial", of_blocks, "float32"),),
            shape | {"GROUP": h // rows.hk, "BN": max(16, LANES // _padded(d)), "PARTS": MANY, "QN": q[2], "KN": k[2],
                     "VN": v[2], "KV_LENGTHS": rows.kv_lengths, "RUNS": rows.starts > 0, "LEFT": rows.left is not None,
                     "RIGHT": rows.right is not None, "SOFTCAP": rows.softcap is not None}, 4, 1, "sinks",
        ),
        Launch(
            "sum_sinks", (h, 1, 1), ("partial",), (h, b, blocks), (Output("dsinks", (h,), rows.sinks),),
            {"BLOCK": MANY}, 4, 1, "gradients",
        ),
    )  # fmt: skip

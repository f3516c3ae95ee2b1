"""Whether a peer computes what its row says: its results against the formula, before it is timed.

Compared is one batch item with the query heads of one key/value head, in float32, by the relative size of the
difference. Dropout of another library's random numbers is held to what dropout is: the mean is what it was, and the
scatter around it has the size that its rate gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.gpu.workloads import Workload

LIMITS = {"out": 1.5e-2, "dq": 3e-2, "dk": 3e-2, "dv": 3e-2}  # of bfloat16; its rounding alone is 2e-3 to 6e-3
RATE, SLOPE = 0.03, 0.05  # by how much a dropout rate may be off, and the mean of what remains


class Unsupported(Exception):
    """An entry has no such call, or computes something else; the reason is a result."""


def refuse(*lacking: tuple[Any, str]) -> None:
    """Raise Unsupported at the first thing that a workload has and a peer lacks: (what it has of it, a word for it)."""
    for what, word in lacking:
        if what:
            raise Unsupported(f"it has no {word}")


class Part(NamedTuple):
    """What is compared: a batch item, the one with the most ruled out, so many query heads, the rows from one on."""

    item: int
    heads: int
    rows: int


def sliced(load: Workload) -> Part:
    """With dropout not the rows of few keys, which would outweigh the others and are nearly 0 or nearly doubled."""
    return Part(load.b - 1, load.h // load.hk, load.i // 2 if load.dropout else 0)


def allowed(load: Workload, given: Mapping[str, Any], query: Any, key: Any, may: Any) -> Any:
    """What is allowed, as a boolean mask, no axis larger than it must be: in the framework of what it is given.

    Args:
        load: the workload.
        given: its ids, lengths and mask, where it has them.
        query, key: where each query (i, 1) and each key (j,) stands.
        may: True, (1, 1, 1, j).
    """
    if load.causal:
        may = may & (key <= query)
    if load.window is not None:
        may = may & (key > query - load.window)
    if (ids := given.get("q_segment_ids")) is not None:
        may = may & (ids[:, None, :, None] == ids[:, None, None, :])
    if (lengths := given.get("kv_lengths")) is not None:
        may = may & (key < lengths[:, None, None, None])
    if (mask := given.get("mask")) is not None:
        may = may & (mask[:, None, None] if mask.ndim == 2 else mask)
    return may


def compared(load: Workload, sums: Mapping[str, tuple[float, float, float]]) -> dict[str, Any]:
    """The errors, from (x . x, x . y, y . y) of each result x and what is expected of it, y.

    Raises:
        Unsupported: x is something else.
    """
    errors = {name: math.sqrt(abs(xx - 2 * xy + yy) / yy) for name, (xx, xy, yy) in sums.items()}
    if load.dropout:
        _, xy, yy = sums["out"]
        slope = xy / yy
        if not abs(slope - 1) < SLOPE:
            raise Unsupported(f"it computes something else: dropout leaves {slope:.3f} of the output in the mean")
        if not all(error < 1 for error in errors.values()):
            raise Unsupported("it computes something else: what dropout adds is larger than what was there")
        return {"slope": slope, "scatter": errors["out"]}
    for name, error in errors.items():
        if not error < LIMITS[name]:  # NaN as well
            raise Unsupported(f"it computes something else: {name} is off by {error:.2g} of its size")
    return errors


def rate(scatter: float, ours: float, dropout: float) -> float:
    """The dropout rate that gives this scatter, where ours, at a rate of `dropout`, gives that of ours.

    The variance of keep / (1 - rate) is rate / (1 - rate).

    Example:
        >>> round(rate(0.2, 0.2, 0.1), 3), round(rate(0.3, 0.2, 0.1), 3)
        (0.1, 0.2)
    """
    odds = dropout / (1 - dropout) * (scatter / ours) ** 2
    return odds / (1 + odds)

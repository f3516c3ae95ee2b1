"""Partial results over split keys, joined exactly. Written once over functions that NumPy, torch and jax.numpy share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

from attend_shared.call import LAYOUT_ADVICE, LAYOUT_NAMES, LAYOUTS, Framework, describe


def check_merge(framework: Framework, outs: Sequence[Any], lses: Sequence[Any], layout: str) -> None:
    """The arguments of `merge`, in one fixed order.

    Raises:
        TypeError, ValueError: which argument, what was expected, what came, what to try.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected {LAYOUT_NAMES}, got {describe(layout)}. {LAYOUT_ADVICE}")
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (tuple, list)):
            raise TypeError(f"{name}: expected a list or tuple of arrays, got {describe(parts)}. One array for each part.")
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"lses: expected as many parts as outs, and at least one, got {len(lses)} for {len(outs)}. "
            "Pass what attend(..., return_lse=True) gave for each part."
        )
    for n, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        for name, value in ((f"outs[{n}]", out), (f"lses[{n}]", lse)):
            if not isinstance(value, framework.arrays):
                raise TypeError(f"{name}: expected an array of the framework that is called, got {describe(value)}. "
                                "attend_torch takes torch tensors, attend_jax takes JAX and NumPy arrays.")  # fmt: skip
        same = tuple(out.shape) == tuple(outs[0].shape) and framework.dtype(out) == framework.dtype(outs[0])
        if len(out.shape) != 4 or not same:
            raise ValueError(f"outs[{n}]: expected rank 4, shape and dtype as outs[0], got {describe(out)}. "
                             "Parts split the keys, never the queries.")  # fmt: skip
        b, x, y, _ = out.shape
        rows = (b, x, y) if layout == "bhnd" else (b, y, x)
        if tuple(lse.shape) != rows or framework.dtype(lse) not in ("float32", "float64"):
            raise ValueError(f"lses[{n}]: expected float32 or float64 of shape (b, h, i) = {rows}, got {describe(lse)}. "
                             "lse is (b, h, i) in both layouts; is layout right?")  # fmt: skip


def merge_parts(xp: Any, outs: Sequence[Any], lses: Sequence[Any], layout: str) -> tuple[Any, Any]:
    """lse = log sum_n exp(lse_n) and out = sum_n exp(lse_n - lse) out_n; empty parts (lse -inf) weigh 0.

    Args:
        xp: a namespace with exp, log, where and maximum.
        outs, lses, layout: as in `merge`, checked.
    """
    minus_inf = float("-inf")
    top = reduce(xp.maximum, lses)
    top = xp.where(top == minus_inf, 0.0, top)
    weights = [xp.exp(lse - top) for lse in lses]
    total = sum(weights[1:], weights[0])
    empty = total == 0
    safe = xp.where(empty, 1.0, total)
    lse = xp.where(empty, minus_inf, xp.log(safe) + top)

    def rows(x: Any) -> Any:
        return (x.swapaxes(1, 2) if layout == "bnhd" else x)[..., None]

    parts = [rows(weight / safe) * out for weight, out in zip(weights, outs, strict=True)]
    out = sum(parts[1:], parts[0])
    return out, lse

"""Partial results over split keys, joined exactly, over functions that NumPy, torch and jax.numpy share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

from attend_shared.call import (
    DTYPES,
    LAYOUT_ADVICE,
    LAYOUT_NAMES,
    LAYOUTS,
    Framework,
    check_array,
    check_float64,
    wrong,
)


def check_merge(framework: Framework, outs: Sequence[Any], lses: Sequence[Any], layout: str) -> None:
    """The arguments of `merge`, in one fixed order.

    Raises:
        TypeError, ValueError: which argument, what was expected, what came, what to try.
    """
    if not (isinstance(layout, str) and layout in LAYOUTS):
        raise wrong(ValueError, "layout", LAYOUT_NAMES, layout, LAYOUT_ADVICE)
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (tuple, list)):
            raise wrong(TypeError, name, "a list or tuple of arrays", parts, "One array for each part.")
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"lses: expected as many parts as outs, and at least one, got {len(lses)} for {len(outs)}. "
            "Pass what attend(..., return_lse=True) gave for each part."
        )
    for n, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        _check_part(framework, f"outs[{n}]", out, outs[0], "outs[0]", DTYPES)
        shape = tuple(outs[0].shape)
        if len(shape) != 4:
            letters = "(b, h, i, dv)" if layout == "bhnd" else "(b, i, h, dv)"
            raise wrong(
                ValueError, "outs[0]", f"rank 4, {letters}", out, "Pass what attend(..., return_lse=True) gave."
            )
        if tuple(out.shape) != shape:
            raise wrong(
                ValueError,
                f"outs[{n}]",
                f"the shape of outs[0], {shape}",
                out,
                "Parts split the keys, not the queries.",
            )
        _check_part(framework, f"lses[{n}]", lse, lses[0], "lses[0]", ("float32", "float64"))
        b, x, y, _ = shape
        rows = (b, x, y) if layout == "bhnd" else (b, y, x)
        if tuple(lse.shape) != rows:
            raise wrong(
                ValueError,
                f"lses[{n}]",
                f"shape (b, h, i) = {rows}",
                lse,
                "lse is (b, h, i) in both layouts; is layout right?",
            )
    home = framework.device(outs[0])
    for n, part in enumerate(zip(outs, lses, strict=True)):
        for name, value in zip(("outs", "lses"), part, strict=True):
            place = framework.device(value)
            if place != home and place is not None and home is not None:
                raise ValueError(
                    f"{name}[{n}]: expected device {home}, where outs[0] is, got {place}. Move it there first."
                )


def _check_part(framework: Framework, name: str, value: Any, first: Any, of: str, dtypes: tuple[str, ...]) -> None:
    """An array of one of these dtypes, alike in all parts."""
    check_array(framework, name, value)
    dtype = framework.dtype(value)
    if dtype not in dtypes:
        raise wrong(
            TypeError,
            name,
            f"one of {', '.join(dtypes)}",
            value,
            "Pass what attend(..., return_lse=True) gave for each part.",
        )
    if dtype != framework.dtype(first):
        raise wrong(TypeError, name, f"{framework.dtype(first)}, the dtype of {of}", value, "Give all parts one dtype.")
    if dtype == "float64":
        check_float64(framework, name, value)


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

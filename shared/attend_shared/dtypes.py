"""The four floating-point dtypes of a call, in NumPy.

NumPy has no bfloat16. A value of dtype "float16", "bfloat16" or "float32" therefore travels as a float32 array that is
already rounded to its dtype, a "float64" value as float64, and the dtype's name travels beside it. The names are those
of both frameworks without their prefix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["EPS", "FLOATS", "LARGEST", "TINY", "accumulation", "round_to", "ulp"]

FLOATS = ("float16", "bfloat16", "float32", "float64")

EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
"""Distance from 1 to the next larger number."""

TINY = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}
"""Smallest positive number, a subnormal."""

LARGEST = {
    "float16": 65504.0,
    "bfloat16": (2 - 2.0**-7) * 2.0**127,
    "float32": (2 - 2.0**-23) * 2.0**127,
    "float64": float(np.finfo(np.float64).max),
}
"""Largest finite number."""


def _known(name: str) -> str:
    if name not in FLOATS:
        raise ValueError(f"dtype: expected one of {', '.join(FLOATS)}; got {name!r}")
    return name


def accumulation(name: str) -> str:
    """The dtype that logits, softmax, lse and gradients are accumulated in: float32, or float64 for float64.

    Example:
        >>> [accumulation(name) for name in FLOATS]
        ['float32', 'float32', 'float32', 'float64']
    """
    return "float64" if _known(name) == "float64" else "float32"


def round_to(x: ArrayLike, name: str) -> NDArray[Any]:
    """Round to the nearest number of a dtype, ties to even, once; what is too large becomes infinite.

    Args:
        x: float array of any shape; NaN and infinities are kept.
        name: one of `FLOATS`.

    Returns:
        A new array of the shape of `x`: float64 for "float64", else float32, which holds the numbers of the other
        three exactly.

    Raises:
        ValueError: the name is unknown.

    Example:
        >>> round_to([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38], "bfloat16")   # two ties, and an overflow
        array([1.      , 1.015625,      inf], dtype=float32)
        >>> round_to(0.1, "float16").item()
        0.0999755859375
    """
    array = np.asarray(x)
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # invalid: signalling NaN
        match _known(name):
            case "float64":
                return array.astype(np.float64)
            case "float32":
                return array.astype(np.float32)
            case "float16":
                return array.astype(np.float16).astype(np.float32)
        if array.dtype == np.float64:
            array = _to_odd(array)
    # bfloat16 is the upper half of float32. Adding half of the last kept place, or just under half where the last kept
    # bit is even, carries exactly when rounding goes up; the carry runs into the exponent and, from the largest number,
    # to infinity.
    bits = np.array(array, dtype=np.float32, order="C").view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(array), array, rounded.view(np.float32))


def _to_odd(x: NDArray[np.float64]) -> NDArray[np.float32]:
    """float64 to float32, cut towards 0, with the last bit set where something was cut.

    The set bit remembers on which side of a tie the number was, so that the result of the rounding to bfloat16 that
    follows is that of a single one (Boldo and Melquiond, Emulation of FMA and correctly rounded sums: proved algorithms
    using rounding to odd, 2008).
    """
    near = x.astype(np.float32)
    cut = np.where(np.abs(near.astype(np.float64)) > np.abs(x), np.nextafter(near, np.float32(0)), near)
    inexact = (cut.astype(np.float64) != x) & ~np.isnan(x)
    return (cut.view(np.uint32) | inexact.astype(np.uint32)).view(np.float32)


def ulp(value: ArrayLike, name: str) -> Any:
    """The distance between neighbouring numbers of a dtype at a value (a unit in the last place).

    Args:
        value: any shape. At 0 and among the subnormals the answer is the smallest positive number; beyond the largest
            finite number it is the distance below that one.
        name: one of `FLOATS`.

    Returns:
        float64, the shape of `value`; NaN for NaN.

    Raises:
        ValueError: the name is unknown.

    Example:
        >>> float(ulp(1.0, "bfloat16")), float(ulp(-0.75, "bfloat16"))
        (0.0078125, 0.00390625)
        >>> bool(ulp(1.5, "float64") == np.spacing(1.5))
        True
    """
    magnitude = np.minimum(np.abs(np.asarray(value, dtype=np.float64)), LARGEST[_known(name)])
    _, exponent = np.frexp(magnitude)  # magnitude = fraction * 2**exponent with 0.5 <= fraction < 1
    with np.errstate(under="ignore"):
        spacing = np.maximum(np.ldexp(EPS[name], exponent - 1), TINY[name])
    return np.where(magnitude == 0, TINY[name], np.where(np.isnan(magnitude), np.nan, spacing))[()]

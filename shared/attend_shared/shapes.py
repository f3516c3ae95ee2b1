"""Calls from shapes alone: nothing is computed, and nothing asks what this machine has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from attend_shared.call import Arrays, Call, Framework, check

_OPTIONS = {
    "is_causal": False, "window_size": None, "softcap": None, "scale": None, "dropout": 0.0, "return_lse": False,
    "layout": "bhnd", "implementation": None, "flash": None, "score_fn": None, "mask_fn": None,
}  # fmt: skip


class Shape(NamedTuple):
    """All that the door needs of an array.

    Attributes:
        shape: its own.
        dtype: its plain name.
        trained: whether its gradient is wanted, in torch; in JAX nobody knows.
    """

    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    trained: bool = False


def call_of(framework: str, platform: str, arguments: Mapping[str, Any]) -> Call:
    """The call as it would be there.

    Args:
        framework: "torch" or "jax".
        platform: "cpu" or "cuda".
        arguments: of `attend`, and flash; each array a `Shape`.

    Example:
        >>> x = Shape((1, 2, 3, 4))
        >>> call_of("jax", "cuda", {"q": x, "k": x, "v": x}).platform
        'cuda'
    """
    view = Framework(
        name=framework,
        arrays=Shape,
        dtype=lambda array: array.dtype,
        device=lambda array: None,
        platform=lambda array: platform,
        has_float64=lambda: True,
        wants_gradient=lambda array: framework == "jax" or array.trained,
        takes_int64_seed=False,
    )
    arrays = Arrays(**{name: x for name, x in arguments.items() if name not in _OPTIONS})
    return check(view, arrays, **{name: arguments.get(name, default) for name, default in _OPTIONS.items()})

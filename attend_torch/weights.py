"""The parameters of a model by path: what weight rules ask for, and what they give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from attend_shared.call import describe
from attend_shared.rules import Value, fitting, value

__all__ = ["assign", "shapes", "values"]


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and buffer of the state dict, by path.

    Args:
        model: the module.

    Returns:
        Shapes, under paths with dots: what `carry` takes as expected.

    Raises:
        TypeError: no module.

    Example:
        >>> shapes(torch.nn.Linear(2, 3))
        {'weight': (3, 2), 'bias': (3,)}
    """
    return {path: tuple(leaf.shape) for path, leaf in _leaves(model).items()}


def values(model: torch.nn.Module) -> dict[str, Value]:
    """Every parameter and buffer of the state dict, by path; read when it is asked for.

    Args:
        model: the module.

    Returns:
        What `carry` takes.

    Raises:
        TypeError: no module.

    Example:
        >>> values(torch.nn.LayerNorm(2))["weight"].array()
        array([1., 1.], dtype=float32)
    """
    return {path: value(leaf) for path, leaf in _leaves(model).items()}


def assign(model: torch.nn.Module, given: Mapping[str, Any]) -> None:
    """Give a model its parameters, all of them, in place. They are copied, in the dtype that they come in.

    Args:
        model: the module.
        given: what `carry` returned, or arrays, by path.

    Raises:
        TypeError: no module, or no mapping of arrays.
        WeightsError: a parameter is missing, unexpected or misshapen; then nothing is changed.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> assign(layer, {"weight": value(torch.full((1, 1), 2.0)), "bias": value(torch.ones(1))})
        >>> layer(torch.ones(1, 1)).tolist()
        [[3.0]]
    """
    leaves = _leaves(model)
    found = fitting({path: tuple(leaf.shape) for path, leaf in leaves.items()}, given)
    model.load_state_dict({path: _tensor(found[path]) for path in leaves}, assign=True)


def _leaves(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {describe(model)}. carry takes a state dict as it is.")
    return model.state_dict()


def _tensor(each: Value) -> torch.Tensor:
    """A copy of a value, in its own dtype."""
    raw = np.array(each.read())  # 2 bytes of bfloat16 come as uint16
    return torch.from_numpy(raw).view(getattr(torch, each.dtype))

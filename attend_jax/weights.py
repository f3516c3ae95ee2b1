"""The parameters of a model by path: what weight rules ask for, and what they give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attend_shared.call import describe
from attend_shared.rules import ITEMSIZE, Value, fitting, value

__all__ = ["assign", "shapes", "values"]


def shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and running statistic, by path.

    Args:
        model: the module.

    Returns:
        Shapes, under paths with dots: what `carry` takes as expected.

    Raises:
        TypeError: no module.

    Example:
        >>> shapes(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        {'bias': (3,), 'kernel': (2, 3)}
    """
    return {path: tuple(leaf.shape) for path, leaf in _leaves(model).items()}


def values(model: nnx.Module) -> dict[str, Value]:
    """Every parameter and running statistic, by path; read when it is asked for.

    Args:
        model: the module.

    Returns:
        What `carry` takes.

    Raises:
        TypeError: no module.

    Example:
        >>> values(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))["bias"].array()
        array([0., 0., 0.], dtype=float32)
    """
    return {path: value(leaf[...]) for path, leaf in _leaves(model).items()}


def assign(model: nnx.Module, given: Mapping[str, Any]) -> None:
    """Give a model its parameters, all of them, in place. They are copied, in the dtype that they come in.

    Args:
        model: the module.
        given: what `carry` returned, or arrays, by path.

    Raises:
        TypeError: no module, or no mapping of arrays; or float64, or integers of 64 bits, while JAX would cut them to
            32; then nothing is changed.
        WeightsError: a parameter is missing, unexpected or misshapen; then nothing is changed.

    Example:
        >>> layer = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
        >>> assign(layer, {"kernel": value(jnp.full((1, 1), 2.0)), "bias": value(jnp.ones(1))})
        >>> layer(jnp.ones((1, 1)))
        Array([[3.]], dtype=float32)
    """
    leaves = _leaves(model)
    found = fitting({path: tuple(leaf.shape) for path, leaf in leaves.items()}, given)
    for path in leaves:
        if ITEMSIZE[found[path].dtype] == 8 and not jax.config.read("jax_enable_x64"):
            raise TypeError(f"{path}: {found[path].dtype} needs jax_enable_x64, without which JAX would cut it to 32 "
                            "bits. Convert it first.")  # fmt: skip
    for path, leaf in leaves.items():
        leaf.set_value(jnp.array(found[path].array(), copy=True))


def _leaves(model: nnx.Module) -> dict[str, Any]:
    """The variables themselves, by path."""
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model: expected an nnx.Module, got {describe(model)}. The parameters of a Linen module go to "
                        'carry as flax.traverse_util.flatten_dict(params, sep=".").')  # fmt: skip
    kinds = (nnx.Param, nnx.BatchStat)
    found = {".".join(map(str, path)): leaf for path, leaf in nnx.iter_graph(model) if isinstance(leaf, kinds)}
    return dict(sorted(found.items()))

"""What a family of models is: the options that it takes, what it builds of them, and a rule for each parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from attend_jax.models.options import Options


class Plan(NamedTuple):
    """A config that has been read.

    Attributes:
        make: a module of these sizes, from a dtype and rngs.
        rules: for every parameter, its path in transformers and in the module.
        sizes: of the axes that the rules name.
        prefix: what the names begin with, unless the checkpoint is one of the model without its head.
    """

    make: Callable[[Any, nnx.Rngs], nnx.Module]
    rules: list[str]
    sizes: dict[str, int]
    prefix: str = ""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter of the module, by path; nothing is allocated."""
        state = nnx.state(nnx.eval_shape(lambda: self.make(jnp.float32, nnx.Rngs(0))))
        return {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(state)}


class Family(NamedTuple):
    """A model_type of transformers.

    Attributes:
        model_type: as config.json has it.
        title: for errors and docs.
        architectures: the classes of transformers whose checkpoints can be read, the usual one first.
        plan: reads the options of a config for one of those classes. It takes every option it knows and leaves it to
            the caller to refuse the rest.
    """

    model_type: str
    title: str
    architectures: tuple[str, ...]
    plan: Callable[[Options, str], Plan]

"""What a family of models is: the options that it takes, what it builds of them, and a rule for each parameter."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from attend_jax.models.options import Options
from attend_shared.rules import Value

OLD = {"gamma": "weight", "beta": "bias"}


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

    def named(self, stored: Mapping[str, Value]) -> dict[str, Value]:
        """The parameters of a file under the names that the rules have: old files of BERT call the two of a norm gamma
        and beta, and one of the model without its head lacks the prefix."""
        renamed = {re.sub(r"LayerNorm\.(gamma|beta)$", lambda x: f"LayerNorm.{OLD[x[1]]}", name): each
                   for name, each in stored.items()}  # fmt: skip
        if not self.prefix or any(name.startswith(self.prefix) for name in renamed):
            return renamed
        return {self.prefix + name: each for name, each in renamed.items()}

    def abstract(self, dtype: Any) -> nnx.Module:
        """The module with shapes for parameters; nothing is allocated, drawn or compiled."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        return nnx.eval_shape(lambda key: self.make(dtype, cast(nnx.Rngs, _OneKey(key))), key)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter of the module, by path."""
        state = nnx.state(self.abstract(jnp.float32))
        return {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(state)}


def under(prefix: str, rules: list[str]) -> list[str]:
    """Rules whose names in transformers get a prefix, as those of a model do that has a head beside it."""
    return [prefix + rule.replace(" = ", f" = {prefix}") for rule in rules]


def bare(prefix: str, rules: list[str]) -> list[str]:
    """Rules whose names in transformers lose a prefix, as those of a model do that has no head."""
    return [rule.removeprefix(prefix).replace(f" = {prefix}", " = ") for rule in rules]


def unread(name: str) -> list[str]:
    """Rules for a layer that a file may have from another class: passed over, as transformers passes it over."""
    return [f"{name}.weight <-> -", f"{name}.bias <-> -"]


class _OneKey:
    """In the place of `nnx.Rngs` where only shapes are wanted: under a trace each count of those costs milliseconds."""

    def __init__(self, key: Any) -> None:
        self.key = key

    def params(self) -> Any:
        """The same key for every parameter."""
        return self.key


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

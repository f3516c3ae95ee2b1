"""Score and mask functions by name, as data: over NumPy, torch and JAX arrays alike, with derivatives for the oracle.

Each reads one table, which is captured: floats, learned, for scores; integers or bools for masks. The functions are
those that models have, and between them they add to scores, multiply them and bend them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["MASKS", "SCORES", "MaskFn", "ScoreFn"]

Array = NDArray[Any]


class _Score(NamedTuple):
    """A function of a table and a score, and what the oracle must know of it.

    Attributes:
        value: (table, score, b, h, q_index, kv_index) -> the new score.
        slope: the same arguments -> its derivative by the score.
        entry: the same arguments -> which entry of the table it reads, an index of arrays, and its derivative by that.
        terms: the same arguments -> the largest term of the sum that each of these derivatives is, where it is one.
    """

    value: Callable[..., Any]
    slope: Callable[..., Any]
    entry: Callable[..., tuple[tuple[Any, ...], Any]]
    terms: Callable[..., tuple[Any, Any]] | None = None


def _distance(table: Any, q: Any, k: Any) -> Any:
    """The column of a table of distances, the middle of which is 0: what lies further counts as the furthest."""
    reach = table.shape[1] // 2
    return (k - q).clip(-reach, reach) + reach


SCORES: dict[str, _Score] = {
    "relative": _Score(  # table (h, 2 reach + 1): a learned bias by distance, as in T5 without its buckets
        lambda table, s, b, h, q, k: s + table[h, _distance(table, q, k)],
        lambda table, s, b, h, q, k: np.ones_like(s),
        lambda table, s, b, h, q, k: ((h, _distance(table, q, k)), np.ones_like(s)),
    ),
    "alibi": _Score(  # table (h,): a slope for each head
        lambda table, s, b, h, q, k: s - table[h] * abs(k - q),
        lambda table, s, b, h, q, k: np.ones_like(s),
        lambda table, s, b, h, q, k: ((h,), -abs(k - q).astype(s.dtype)),
    ),
    "temperature": _Score(  # table (b, h)
        lambda table, s, b, h, q, k: s * table[b, h],
        lambda table, s, b, h, q, k: table[b, h],
        lambda table, s, b, h, q, k: ((b, h), s),
    ),
    "bound": _Score(  # table (h,) of 1 / cap: s / (1 + |s| / cap), a softcap by arithmetic alone
        lambda table, s, b, h, q, k: s / (1 + table[h] * abs(s)),
        lambda table, s, b, h, q, k: (1 + table[h] * abs(s)) ** -2.0,
        lambda table, s, b, h, q, k: ((h,), -s * abs(s) * (1 + table[h] * abs(s)) ** -2.0),
        lambda table, s, b, h, q, k: (1 / (1 + table[h] * abs(s)), s**2 * (1 + table[h] * abs(s)) ** -2.0),
    ),
}
MASKS: dict[str, Callable[..., Any]] = {
    "document": lambda table, b, h, q, k: table[b, q] == table[b, k],  # table (b, n): ids by position
    "near": lambda table, b, h, q, k: abs(k - q) <= table[h],  # table (h,): a window for each head
    "prefix": lambda table, b, h, q, k: (k <= q) | (k < table[b]),  # table (b,): a prefix that all see, then causal
    "rows": lambda table, b, h, q, k: table[b, q],  # table (b, n) of bool: the rows that may attend at all
}


@dataclass(frozen=True, eq=False)
class ScoreFn:
    """A score_fn over NumPy arrays, and the same over any other's.

    Args:
        kind: a name in `SCORES`.
        table: what it captures.

    Example:
        >>> score_fn = ScoreFn("alibi", np.array([0.5, 0.25]))
        >>> score_fn(np.zeros((1, 1)), 0, 1, np.array([[3]]), np.array([[1]]))
        array([[-0.5]])
    """

    kind: str
    table: Array

    def __call__(self, score: Any, b: Any, h: Any, q_index: Any, kv_index: Any) -> Any:
        return SCORES[self.kind].value(self.table, score, b, h, q_index, kv_index)

    def of(self, table: Any) -> Callable[..., Any]:
        """The same function of another table, of any framework."""
        value = SCORES[self.kind].value
        return lambda score, b, h, q_index, kv_index: value(table, score, b, h, q_index, kv_index)

    def slope(self, score: Array, b: Any, h: Any, q_index: Array, kv_index: Array) -> Array:
        """The derivative of the new score by the old one, in the shape of score."""
        slope = SCORES[self.kind].slope(self.table, score, b, h, q_index, kv_index)
        return np.broadcast_to(slope, score.shape)

    def entries(self, score: Array, b: Any, h: Any, q_index: Array, kv_index: Array) -> tuple[Array, Array]:
        """The entry of the table that each pair reads, in the table's own order, and the derivative by it."""
        index, factor = SCORES[self.kind].entry(self.table, score, b, h, q_index, kv_index)
        entry = np.ravel_multi_index(np.broadcast_arrays(*index), self.table.shape)
        return np.broadcast_to(entry, score.shape), np.broadcast_to(factor, score.shape)

    def terms(self, score: Array, b: Any, h: Any, q_index: Array, kv_index: Array) -> tuple[Array, Array]:
        """The sizes of the terms behind `slope` and behind the derivative of `entries`."""
        kind, pairs = SCORES[self.kind], (score, b, h, q_index, kv_index)
        if kind.terms is None:
            return np.abs(self.slope(*pairs)), np.abs(self.entries(*pairs)[1])
        slope, factor = kind.terms(self.table, *pairs)
        return np.broadcast_to(slope, score.shape), np.broadcast_to(factor, score.shape)


@dataclass(frozen=True, eq=False)
class MaskFn:
    """A mask_fn over NumPy arrays, and the same over any other's.

    Args:
        kind: a name in `MASKS`.
        table: what it captures.

    Example:
        >>> MaskFn("prefix", np.array([2]))(0, 0, np.arange(3)[:, None], np.arange(3)).astype(int)
        array([[1, 1, 0],
               [1, 1, 0],
               [1, 1, 1]])
    """

    kind: str
    table: Array

    def __call__(self, b: Any, h: Any, q_index: Any, kv_index: Any) -> Any:
        return MASKS[self.kind](self.table, b, h, q_index, kv_index)

    def of(self, table: Any) -> Callable[..., Any]:
        """The same function of another table, of any framework."""
        value = MASKS[self.kind]
        return lambda b, h, q_index, kv_index: value(table, b, h, q_index, kv_index)

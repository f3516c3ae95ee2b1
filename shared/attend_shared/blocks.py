"""Blocks of queries and keys: their sizes, and which blocks of keys a block of queries can see at all.

Written over operators, like `meaning`: the values may be Python ints, NumPy, torch or JAX arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from attend_shared.call import Call

BLOCK = (
    256  # queries and keys of a block: their logits and weights stay in a core's cache, and products are large enough
)


@dataclass(frozen=True)
class Blocks:
    """An axis cut into `count` blocks of `size`; the last may reach over its end."""

    size: int
    count: int

    @property
    def padded(self) -> int:
        """The length that the blocks cover."""
        return self.size * self.count


def cut(length: int, coarse: int = 1, multiple: int = 1) -> Blocks:
    """The fewest blocks of at most `coarse` times BLOCK, as equal as can be, their size a multiple of `multiple`.

    Example:
        >>> cut(512), cut(512, coarse=2), cut(300), cut(5, multiple=4)
        (Blocks(size=256, count=2), Blocks(size=512, count=1), Blocks(size=150, count=2), Blocks(size=8, count=1))
    """
    count = max(1, -(-length // (coarse * BLOCK)))
    size = -(-length // count)
    return Blocks(max(multiple, -(-size // multiple) * multiple), count)


def is_small(call: Call) -> bool:
    """Whether one product for all heads beats blocks of them, and its logits fit.

    On a CPU blocks win from one of them on, unless queries or keys are few; elsewhere a loop over blocks is for what
    would not fit.
    """
    logits = call.b * call.h * call.i * call.j
    if call.platform != "cpu":
        return logits <= 2**28
    few = min(call.i, call.j) < BLOCK // 4 or call.i * call.j < BLOCK * BLOCK
    return few and logits <= 2**26


def is_large(call: Call) -> bool:
    """Whether blocks beat a fused library whose own path for this call makes whole arrays of logits."""
    return call.i * call.j >= 4 * BLOCK * BLOCK


class Seen(NamedTuple):
    """What is known of a block of queries, or of each block of keys, of one batch item.

    Attributes:
        first, last: the first and last index.
        low_id, high_id: the least and greatest segment id, or None without segments.
        length: the item's q_length or kv_length, or None.
    """

    first: Any
    last: Any
    low_id: Any = None
    high_id: Any = None
    length: Any = None


def reach(call: Call, offset: Any, first: int, size: int) -> tuple[int, int]:
    """The keys, from and up to, that positions let any of some queries see; all keys where the offset is an array.

    Example:
        >>> from types import SimpleNamespace
        >>> reach(SimpleNamespace(j=9, left=2, right=0), 0, first=4, size=2), reach(SimpleNamespace(j=9), None, 4, 2)
        ((2, 6), (0, 9))
    """
    if not isinstance(offset, int):
        return 0, call.j
    low = 0 if call.left is None else first + offset - call.left
    high = call.j if call.right is None else first + size + offset + call.right
    low = min(max(low, 0), call.j)
    return low, max(low, min(high, call.j))


def visible(call: Call, offset: Any, queries: Seen, keys: Seen) -> Any:
    """Whether any query of the block may see any key of each block, as far as positions, lengths and segments tell.

    Args:
        call: canonical.
        offset: q_offset of this item.
        queries: one block of queries.
        keys: blocks of keys, their fields arrays (n,) or scalars.

    Returns:
        bool, the shape of keys.first. Where it is False there is nothing to compute.
    """
    some = keys.first < call.j
    if call.right is not None:
        some = some & (keys.first - queries.last - call.right <= offset)
    if call.left is not None:
        some = some & (keys.last - queries.first + call.left >= offset)
    if call.segments:  # ids between the extremes may be missing: then the block is computed for nothing
        some = some & (keys.low_id <= queries.high_id) & (queries.low_id <= keys.high_id)
    if call.kv_lengths:
        some = some & (keys.first < keys.length)
    if call.q_lengths:
        some = some & (queries.first < queries.length)
    return some

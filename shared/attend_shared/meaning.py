"""Who may attend to whom: the formula, written once over operators that NumPy, torch and JAX arrays share.

Index arrays come from the caller, so that the same lines serve a whole call and any block of one. Integers must be of
one dtype family already (JAX promotes strictly); positions are compared by differences, which cannot overflow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attend_shared.call import Arrays, Call, Framework, wrong


def both(a: Any, b: Any) -> Any:
    """Both conditions, of which the first may be None: no condition."""
    return b if a is None else a & b


def offset_of(call: Call, arrays: Arrays) -> Any:
    """q_offset as something to compare (b|1, 1, i, j) differences with: an int, or an array () or (b, 1, 1, 1)."""
    if call.offset == "zero":
        return 0
    if call.offset == "end":
        return call.j - call.i
    offset = arrays.q_offset
    return offset if isinstance(offset, int) or len(offset.shape) == 0 else offset[:, None, None, None]


def structured(call: Call, arrays: Arrays, query: Any, key: Any) -> Any:
    """Where positions, segments and lengths allow it; None where they rule nothing out.

    Args:
        call, arrays: canonical.
        query: integers (n,), indices of queries, or all of them: (i,).
        key: integers (m,), indices of keys.

    Returns:
        bool, broadcastable to (b, h, n, m), or None. Segment ids in `arrays` must be those of these indices.
    """
    allowed = None
    if call.positional:
        offset = offset_of(call, arrays)
        ahead = (key[None, :] - query[:, None])[None, None]  # (1, 1, n, m): how far the key is in front at offset 0
        if call.right is not None:
            allowed = ahead - call.right <= offset
        if call.left is not None:
            allowed = both(allowed, ahead + call.left >= offset)
    if call.segments:
        allowed = both(allowed, arrays.q_segment_ids[:, None, :, None] == arrays.kv_segment_ids[:, None, None, :])
    if call.kv_lengths:
        allowed = both(allowed, (key[None] < arrays.kv_lengths[:, None])[:, None, None, :])
    if call.q_lengths:
        allowed = both(allowed, (query[None] < arrays.q_lengths[:, None])[:, None, :, None])
    return allowed


def allowed(call: Call, arrays: Arrays, query: Any, key: Any) -> Any:
    """Everything ANDed: mask, positions, segments, lengths, and a bias above -inf. Arguments as in `structured`.

    Returns:
        bool, broadcastable to (b, h, i, j), or None where every query may attend to every key.
    """
    result = structured(call, arrays, query, key)
    if arrays.mask is not None:
        result = both(result, arrays.mask)
    if arrays.bias is not None:
        result = both(result, arrays.bias != float("-inf"))
    return result


def custom(
    framework: Framework, call: Call, s: Any, may: Any, pairs: tuple[Any, Any, Any, Any],
    where: Callable[[Any, Any, Any], Any],
) -> tuple[Any, Any]:  # fmt: skip
    """score_fn and mask_fn on the logits of a call, or of a block of one.

    A pair that the rest rules out is shown to score_fn with the score 0, and what comes back for it goes nowhere: so
    that neither an infinity nor what lies in padding reaches the caller's function or its derivative.

    Args:
        framework: how this framework's arrays are looked at.
        call: canonical; where it has neither function nothing changes.
        s: (b h n m), logits with softcap and bias.
        may: bool, broadcastable to s, or None: what all the rest allows.
        pairs: the call's own indices b, h, q_index, kv_index: integers that broadcast to s, (b 1 1 1), (1 h 1 1),
            (1 1 n 1), (1 1 1 m).
        where: the framework's `where(condition, a, b)`.

    Returns:
        s and may. Where the new may is False s may be anything.

    Raises:
        TypeError, ValueError: what a function gave is no array, or of another dtype or shape.
    """
    if call.is_empty:  # there is no pair to show
        return s, may
    if call.mask_fn is not None:
        may = both(may, _may(framework, call.mask_fn(*pairs), tuple(s.shape)))
    if call.score_fn is not None:
        s = s if may is None else where(may, s, 0)
        s = _scored(framework, call.score_fn(s, *pairs), framework.dtype(s), tuple(s.shape))
    return s, may


def _scored(framework: Framework, result: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    """What a score_fn gave, checked."""
    expected = f"a result of {dtype} and shape {shape}, those of score"
    is_array = isinstance(result, framework.arrays)
    if not is_array or framework.dtype(result) != dtype:
        raise wrong(TypeError, "score_fn", expected, result,
                     "Return score changed; convert what is added to it to its dtype.")  # fmt: skip
    if tuple(result.shape) != shape:
        raise wrong(ValueError, "score_fn", expected, result,
                     "Return score changed, pair by pair: score + table[h, kv_index], for example.")  # fmt: skip
    return result


def _may(framework: Framework, result: Any, shape: tuple[int, ...]) -> Any:
    """What a mask_fn gave, checked."""
    expected = f"a result of bool, each axis 1 or full, against (b, h, i, j) = {shape}"
    is_array = isinstance(result, framework.arrays)
    if not is_array or framework.dtype(result) != "bool":
        raise wrong(TypeError, "mask_fn", expected, result,
                     "Compare, and combine with &, | and ~; what changes scores is a score_fn.")  # fmt: skip
    if len(result.shape) != 4 or any(size not in (1, full) for size, full in zip(result.shape, shape, strict=True)):
        raise wrong(ValueError, "mask_fn", expected, result,
                     "Its arguments broadcast against each other; keep their axes.")  # fmt: skip
    return result


def excluded_keys(call: Call, arrays: Arrays, key: Any, contains: Callable[[Any, Any], Any]) -> Any:
    """Keys that a key mask, a length or a segment id excludes for their whole batch item: bool (b|1, j), or None."""
    kept = None
    if call.key_masked:
        kept = arrays.mask[:, 0, 0, :]
    if call.kv_lengths:
        kept = both(kept, key[None] < arrays.kv_lengths[:, None])
    if call.segments:
        kept = both(kept, contains(arrays.q_segment_ids, arrays.kv_segment_ids))
    return None if kept is None else ~kept


def dead_queries(call: Call, arrays: Arrays, query: Any) -> Any:
    """Rows that q_lengths empties: bool (b, i), or None."""
    return (query[None] >= arrays.q_lengths[:, None]) if call.q_lengths else None


def hide(
    call: Call,
    arrays: Arrays,
    query: Any,
    key: Any,
    where: Callable[[Any, Any, Any], Any],
    contains: Callable[[Any, Any], Any],
) -> Arrays:
    """Put zeros where nothing may leak from, so that NaN and Inf there change neither output nor gradient.

    A product with weight 0 is not enough: 0 * NaN is NaN. This copies k and v where keys may be excluded, and q where
    rows are dead. Gradients of what is hidden are exactly 0, since `where` passes none.

    Args:
        call, arrays: canonical.
        query, key: integers (i,) and (j,).
        where: the framework's `where(condition, a, b)`.
        contains: the framework's `contains(ids, wanted)`: which of wanted (b, m) are among the item's ids (b, n).
    """
    keys = excluded_keys(call, arrays, key, contains)
    if keys is not None:
        gone = keys[:, None, :, None]  # (b|1, 1, j, 1)
        arrays = arrays._replace(k=where(gone, 0, arrays.k), v=where(gone, 0, arrays.v))
    rows = dead_queries(call, arrays, query)
    if rows is not None:
        arrays = arrays._replace(q=where(rows[:, None, :, None], 0, arrays.q))
    return arrays

"""Segments as runs: when packed sequences mean what segment ids mean, and where each of them starts.

Equal ids attend to each other wherever they stand. Packed sequences lie one after the other, and what is packed is
given by where each starts. Both mean the same where q and k have the same ids and no id comes back after another: then
every segment is one run, and causal and windows, which are differences of positions, are the same within it.

Whether that holds is in the ids, which are data. It is known of ids that `convert.segments_from_cu_seqlens` made;
others are looked at where an implementation that takes packed sequences is asked for by name. `Call.runs` says what is
known: one of the names below.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import numpy as np

from attend_shared.call import Arrays, Call
from attend_shared.choice import Entry, refusal

PACKED = "packed"
NOT_LOOKED, RETURNS, DIFFER, TRACED, CAPTURED, FEW, UNREAD = (
    "", "returns", "differ", "traced", "captured", "few", "unread",
)  # fmt: skip
REASONS = {
    NOT_LOOKED: "it takes segments that lie one after the other, and whether these do was not looked at",
    RETURNS: "segment ids: it expected each id in one run, got an id that comes back after another. Sort "
             "the tokens by id, or number the runs if they are segments of their own",
    DIFFER: "kv_segment_ids: it expected the ids of q_segment_ids, of their dtype, got another dtype or other ids. "
            "Pass q_segment_ids alone where they are the same",
    TRACED: "it must read segment ids before it is launched, and here they are not known until then: call attend "
            "outside what compiles or transforms it; in JAX make them there with convert.segments_from_cu_seqlens",
    CAPTURED: "while a CUDA graph is captured it takes no segment ids, of which replays would keep the bounds of now",
    FEW: "on so few logits it gains too little where there are segments; asked for by name it takes them",
    UNREAD: "it takes segments that lie one after the other, and a choice does not read ids: make them with "
            "convert.segments_from_cu_seqlens (in torch not in inference mode), which knows, or ask for it by name, "
            "which reads them once",
}  # fmt: skip
CHANGED = (
    "attend: segment ids that fa4 knew were changed in a way that torch does not count (by a collective, a kernel or "
    ".data). Pass a new tensor, or make them anew with convert.segments_from_cu_seqlens."
)
WORTH = 2**28  # logits within runs, allowed or not, whose computation hides that packed sequences are launched slowly
KEPT = 32  # arrays whose bounds are remembered


def reaches(table: Iterable[Entry], call: Call, name: str) -> bool:
    """Whether the choice comes to this implementation, and takes it where ids are runs.

    Args:
        table: in order of preference, for this call.
        call: with segments that were not looked at.
        name: of the implementation.
    """
    by_name = {entry.name: entry for entry in table}
    for each in by_name if call.names is None else call.names:
        entry = by_name.get(each)
        if each == name:
            return entry is not None and refusal(entry, call._replace(runs=PACKED)) is None
        if entry is not None and refusal(entry, call) is None:
            return False
    return False


def told(
    tell: Callable[[Call, Arrays, list[Any]], tuple[str, Any]], table: Callable[[Call], Iterable[Entry]], call: Call,
    arrays: Arrays, *names: str,
) -> tuple[Call, Any]:  # fmt: skip
    """The call with what its ids are, and the framework's array of where runs start, or None.

    Args:
        tell: the framework's: what is known of the ids of a call, as `Call.runs` says it, and the starts. The last
            argument is the arrays of ids: two, or one where q and k have the same.
        table: gives the implementations in order of preference.
        call: with segments.
        arrays: as the caller passed them: an array that the door converts would be another one on every call.
        names: the implementations that take packed sequences.
    """
    if call.is_empty:
        return call._replace(runs=PACKED), None  # nothing is launched
    if not any(reaches(table(call), call, name) for name in names):
        return call, None
    state, starts = tell(call, arrays, ids_of(arrays))
    return call._replace(runs=state), starts


def ids_of(arrays: Arrays) -> list[Any]:
    """The arrays of ids of a call with segments: two, or one where q and k have the same."""
    ids = [x for x in (arrays.q_segment_ids, arrays.kv_segment_ids) if x is not None]
    return ids[:1] if ids[0] is ids[-1] else ids


def settled(call: Call, arrays: Arrays, takes: bool, starts: Any) -> tuple[Call, Arrays]:
    """What an implementation gets: one that takes runs their starts for ids, the others ids, and the call as it was.

    Args:
        call, starts: by `told`.
        arrays: of the call.
        takes: whether it takes them.
    """
    if not takes:
        return call._replace(runs=NOT_LOOKED, sequences=0), arrays
    return call, arrays if starts is None else arrays._replace(q_segment_ids=starts, kv_segment_ids=starts)


def starts(ids: np.ndarray) -> np.ndarray | None:
    """Where the runs start, and where the last ends: int32 (runs + 1,).

    Args:
        ids: integers (1, n).

    Returns:
        None where an id comes back after another one.

    Example:
        >>> starts(np.array([[3, 3, 1, 1, 1, 0]]))
        array([0, 2, 5, 6], dtype=int32)
        >>> starts(np.array([[3, 1, 3]]))
    """
    row = ids[0]
    found = np.flatnonzero(np.append(True, row[1:] != row[:-1]))
    if len(np.unique(row[found])) < len(found):
        return None
    return np.append(found, len(row)).astype(np.int32)


def look(q_ids: np.ndarray, kv_ids: np.ndarray | None) -> tuple[str, np.ndarray | None]:
    """What ids are, as `Call.runs` says it, and the starts where they are runs.

    Args:
        q_ids: integers (1, n).
        kv_ids: the same of k, or None where they are the same.
    """
    if kv_ids is not None and (q_ids.dtype != kv_ids.dtype or not np.array_equal(q_ids, kv_ids)):
        return DIFFER, None
    found = starts(q_ids)
    return (RETURNS, None) if found is None else (PACKED, found)


def is_few(call: Call, count: int) -> bool:
    """Whether so many runs, were they alike, leave little to compute."""
    return call.h * call.i * call.i < WORTH * count


# What was found is remembered by what does not outlive the array, so that all layers that share it look once.


class Known(NamedTuple):
    """What is remembered of an array.

    Attributes:
        alive: whether the array is still there.
        state: as `Call.runs`.
        starts: the framework's array of where runs start, or None.
        made: whether this library made the ids, and knows without having read them.
        kept: the ids as they were, where they may change.
    """

    alive: Callable[[], bool]
    state: str
    starts: Any
    made: bool = False
    kept: Any = ()


def remember(memory: dict[Hashable, Known], key: Hashable, known: Known) -> None:
    """Add to a memory, and have it forget what is gone, and the oldest beyond so many.

    Args:
        memory: by key, the oldest first.
        key: what tells an array, in this state, from every other.
        known: what was found.
    """
    for each, other in list(memory.items()):
        if not other.alive():
            memory.pop(each, None)
    for each in list(memory)[: max(0, len(memory) + 1 - KEPT)]:
        memory.pop(each, None)
    memory[key] = known

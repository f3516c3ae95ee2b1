"""What is known of segment ids, for implementations that take packed sequences: asked by the door before it chooses.

What ids are is `attend_shared.runs`. To look is to wait for the device, once for each array of ids, whose contents
never change; NumPy arrays are looked at on every call. Ids that are known when a jit is traced are constants in it, and
of ids that are made in a jit it is known there. Starts are a NumPy array where it is known what they hold.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attend_jax.arrays import to_int32
from attend_shared import runs
from attend_shared.call import Arrays, Call

_KNOWN: dict[Hashable, runs.Known] = {}
_TRACED, _UNREAD, _FEW = (runs.Known(lambda: False, state, None) for state in (runs.TRACED, runs.UNREAD, runs.FEW))
_BOUNDED = ("fa3",)  # which are launched for runs that are all as long as the longest


def tell(call: Call, arrays: Arrays, ids: list[Any]) -> tuple[str, Any]:
    """What the ids of a call are, and where runs start: int32, or None, for `attend_shared.runs.told`. Behind the last
    run are empty ones.

    Args:
        call: with segments.
        arrays: as the caller passed them.
        ids: one or two arrays of them.
    """
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in ids):
        return runs.NOT_LOOKED, None
    known = _known(ids) if call.names else _made(call, ids)
    return known.state, known.starts


def bounded(call: Call, name: str, starts: Any) -> Call:
    """The call with how many tokens a run has at the most, as a power of two, where the implementation asks for it.

    It is known of starts that were read, or made of a NumPy array. Of others it is all that there are.
    """
    if name not in _BOUNDED or starts is None:
        return call
    longest = int(np.diff(starts).max()) if isinstance(starts, np.ndarray) else call.i
    return call._replace(longest=min(call.i, 1 << (longest - 1).bit_length()))


def _made(call: Call, ids: list[Any]) -> runs.Known:
    """What is known of ids that were not looked at: another call may have, and a choice must not depend on that."""
    known = _KNOWN.get(tuple(map(id, ids)))
    if known is None or not (known.made and known.alive()):
        return _UNREAD
    if runs.is_few(call, known.starts.shape[0] - 3):  # beside their starts are 0, the last end and the length
        return _FEW
    return known


def _known(ids: list[Any]) -> runs.Known:
    """What is known of one or two arrays of ids. They are looked at where nothing is."""
    if any(isinstance(x, np.ndarray) for x in ids):
        return _TRACED if any(isinstance(x, jax.core.Tracer) for x in ids) else _looked(ids, lambda: False)
    known = _KNOWN.get(key := tuple(map(id, ids)))
    if known is not None and known.alive():
        return known
    if any(isinstance(x, jax.core.Tracer) for x in ids):
        return _TRACED
    known = _looked(ids, _alive(ids, key))
    runs.remember(_KNOWN, key, known)
    return known


def _alive(ids: list[Any], key: Hashable) -> Callable[[], bool]:
    """Whether they still are. What is remembered goes with the first that goes: a tracer must not be kept."""
    weak = [weakref.ref(x, lambda _: _KNOWN.pop(key, None)) for x in ids]
    return lambda: not any(each() is None for each in weak)


def _looked(ids: list[Any], alive: Callable[[], bool]) -> runs.Known:
    """What ids are. This waits for the device."""
    state, starts = runs.look(np.asarray(ids[0]), np.asarray(ids[1]) if len(ids) > 1 else None)
    return runs.Known(alive, state, None if starts is None else _rounded(starts))


def _rounded(starts: np.ndarray) -> np.ndarray:
    """The same with as many empty runs at the end as make a power of two: what is compiled knows how many there are."""
    count = 1 << (len(starts) - 2).bit_length()
    return np.append(starts, np.full(count + 1 - len(starts), starts[-1], np.int32))


def made(ids: jax.Array, cu_seqlens: Any) -> None:
    """Remember that ids (1, length) were made of cumulative lengths. Nothing is read.

    Args:
        ids: by `attend_shared.convert.segments_from_cu_seqlens`.
        cu_seqlens: integers (n + 1,), in any order and of any size.
    """
    length, xp = ids.shape[1], np if isinstance(cu_seqlens, np.ndarray) else jnp
    bounds: Any = xp.asarray(to_int32(cu_seqlens)).clip(0, length)
    first, last = xp.minimum(bounds[:-1], bounds[-1:]), bounds[-1:]
    starts = xp.sort(xp.concatenate([xp.zeros(1, np.int32), first, last, xp.full(1, length, np.int32)]))
    key = (id(ids),)
    runs.remember(_KNOWN, key, runs.Known(_alive([ids], key), runs.PACKED, starts, made=True))

"""What is known of segment ids, for implementations that take packed sequences: asked by the door before it chooses.

What ids are is `attend_shared.runs`. To look is to wait for the device, once for each tensor of ids: what was found is
remembered by its storage, place, strides and version, which views share and writing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from attend_shared import runs
from attend_shared.call import Arrays, Call
from attend_shared.kernels.launch import Launch
from attend_torch import launches
from attend_torch.arrays import is_traced, is_watched
from attend_torch.implementations import triton

_KNOWN: dict[Hashable, runs.Known] = {}
_UNREAD, _FEW = (runs.Known(lambda: False, state, None) for state in (runs.UNREAD, runs.FEW))


def tell(call: Call, arrays: Arrays, ids: list[torch.Tensor]) -> tuple[str, torch.Tensor | None]:
    """What the ids of a call are, and where runs start: int32 (runs + 1,), or None, for `attend_shared.runs.told`.

    Args:
        call: with segments.
        arrays: as the caller passed them.
        ids: one or two tensors of them.
    """
    state = _closed(call, arrays, ids)
    if state:
        return state, None
    known = _known(call, ids)
    return known.state, known.starts


def _closed(call: Call, arrays: Arrays, ids: list[torch.Tensor]) -> str:
    """Why ids do not matter, or ""."""
    if call.platform == "meta" or any(x.is_meta for x in ids):
        return runs.NOT_LOOKED
    if any(is_traced(x) for x in (*arrays[:3], *ids)) or is_watched():
        return runs.TRACED
    if arrays.q.is_cuda and torch.cuda.is_current_stream_capturing():
        return runs.CAPTURED
    return ""


def _key(ids: list[torch.Tensor]) -> Hashable:
    """What tells these tensors, as they are now, from all that were and will be; None where writes are not counted."""
    if any(x.is_inference() for x in ids):
        return None
    return tuple(
        (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype, x._version) for x in ids
    )


def _alive(ids: list[torch.Tensor]) -> Callable[[], bool]:
    """Whether they still are; as long as this is kept, no other storage has the address of theirs."""
    weak = [StorageWeakRef(x.untyped_storage()) for x in ids]
    return lambda: not any(each.expired() for each in weak)


def _known(call: Call, ids: list[torch.Tensor]) -> runs.Known:
    """What is known of one or two tensors of ids. Where it must be, they are looked at."""
    key = _key(ids)
    known = None if key is None else _KNOWN.get(key)
    if call.names is None:  # another call may have looked: a choice must not depend on that
        if known is None or not known.made:
            return _UNREAD
        if runs.is_few(call, known.starts.shape[0] - 3):  # beside their starts are 0, the last end and the length
            return _FEW
    elif known is None or not known.alive():
        known = _looked(ids)
        if key is not None:
            runs.remember(_KNOWN, key, known)
        return known
    _follow(known)
    for now, then in zip(map(_signed, ids), known.kept.ids, strict=False):
        _compare(now, then)
    return known


def _compare(now: torch.Tensor, then: torch.Tensor) -> None:
    """Have the device stop, in words, if ids are not what they were: by one kernel where there is Triton, not three."""
    if now.is_cuda and now.is_contiguous() and triton.unavailable() is None:
        launches.run(_comparison(now.shape[1]), {"now": now, "then": then})
    else:
        torch._assert_async((now == then).all(), runs.CHANGED)


@lru_cache(maxsize=64)
def _comparison(length: int) -> launches.Kernels:
    """Of so many ids; what looks for the overflow of sums, where there are assertions, is left out."""
    many = 1024
    options = {"BLOCK": many, "sanitize_overflow": False}
    grid = -(-length // many), 1, 1
    return launches.Kernels([Launch("compare", grid, ("now", "then"), (length,), (), options, 4, 1, "bounds")])


class _Kept(NamedTuple):
    """The ids as they were, and the stream on which they and their starts were made, as `_stream` gives it."""

    ids: list[torch.Tensor]
    home: int | None


def _stream(x: torch.Tensor) -> int | None:
    """The current stream of the device of x, as a number; None where there are none."""
    return torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else None


def _follow(known: runs.Known) -> None:
    """Have the memory of what is remembered wait for the current stream too, where it was made on another."""
    ids, home = known.kept
    if _stream(ids[0]) != home:
        stream = torch.cuda.current_stream(ids[0].device)
        for x in (*ids, *([] if known.starts is None else [known.starts])):
            x.record_stream(stream)


def _signed(ids: torch.Tensor) -> torch.Tensor:
    """As torch compares them everywhere."""
    return ids if ids.dtype.is_signed else ids.long()


def _looked(ids: list[torch.Tensor]) -> runs.Known:
    """What ids are. This waits for the device."""
    kept = [_signed(x.detach()).clone() for x in ids]
    host = [x.detach().cpu().numpy() for x in ids]  # which waits for what is kept as well
    state, starts = runs.look(host[0], host[1] if len(host) > 1 else None)
    found = None if starts is None else torch.from_numpy(starts).to(ids[0].device)
    return runs.Known(_alive(ids), state, found, kept=_Kept(kept, _stream(ids[0])))


def made(ids: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    """Remember that ids (1, length) were made of cumulative lengths. Nothing is read.

    Args:
        ids: by `attend_shared.convert.segments_from_cu_seqlens`.
        cu_seqlens: integers (n + 1,), in any order and of any size.
    """
    if is_traced(ids) or is_watched() or (key := _key([ids])) is None:
        return
    length = ids.shape[1]
    bounds = cu_seqlens.long().clamp(0, length).int()
    first, last = torch.minimum(bounds[:-1], bounds[-1:]).sort().values, bounds[-1:]
    starts = torch.cat([bounds.new_zeros(1), first, last, bounds.new_full((1,), length)])
    kept = _Kept([_signed(ids).clone()], _stream(ids))
    runs.remember(_KNOWN, key, runs.Known(_alive([ids]), runs.PACKED, starts, True, kept))

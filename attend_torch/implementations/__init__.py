"""The table of implementations: one file each, in order of preference."""

from collections.abc import Iterable, Iterator
from functools import lru_cache

import torch

from attend_shared import devices
from attend_shared.blocks import is_large, is_small
from attend_shared.call import Call
from attend_shared.choice import Entry
from attend_torch.implementations import blockwise, einsum, fa4, flex, rowwise, sdpa, triton
from attend_torch.machine import capability

FA4 = Entry("fa4", True, fa4)
SDPA, TRITON = Entry("sdpa", True, sdpa), Entry("triton", True, triton)
FLEX = Entry("flex", True, flex, custom=True)
BLOCKWISE = Entry("blockwise", True, blockwise, custom=True)
ROWWISE, EINSUM = Entry("rowwise", True, rowwise, custom=True), Entry("einsum", False, einsum, custom=True)
PACKING = FA4.name  # which takes segments that are runs, as packed sequences
LITTLE = 2**22  # logits
ENTRIES = {entry.name: entry for entry in (FA4, SDPA, TRITON, FLEX, BLOCKWISE, ROWWISE, EINSUM)}


def table(call: Call | None = None) -> Iterable[Entry]:
    """In order of preference, for a call or in general."""
    if call is None:
        return _ANY
    if call.platform != "cuda":
        return _elsewhere(call)
    if torch.compiler.is_compiling():  # sizes may be symbols, and what is exported is not bound to what one device is
        return _on_gpu(call, "" if torch.compiler.is_exporting() else capability())
    return _safe(call) if call.custom else _remembered(call, capability())


def _elsewhere(call: Call | None) -> Iterator[Entry]:
    """Sizes are looked at only where sdpa leaves a choice: looking costs time, and binds what torch.export exports."""
    slow = call is not None and sdpa.is_quadratic(call) and not torch.compiler.is_exporting() and is_large(call)
    if not slow:
        yield SDPA
    yield from (FA4, TRITON, FLEX)
    yield from (EINSUM, BLOCKWISE) if call is not None and is_small(call) else (BLOCKWISE, EINSUM)
    yield ROWWISE
    if slow:
        yield SDPA


def _on_gpu(call: Call, capability: str) -> Iterable[Entry]:
    """As it was measured on such a GPU."""
    return devices.ordered(devices.order(call, capability), _safe(call), ENTRIES)


@lru_cache(maxsize=4096)
def _remembered(call: Call, capability: str) -> tuple[Entry, ...]:
    """The same, at the cost of looking it up."""
    return tuple(_on_gpu(call, capability))


def _safe(call: Call) -> Iterator[Entry]:
    """In order of preference on a GPU of which nothing is known."""
    if call.custom:
        yield from _with_functions(call)
        return
    yield FA4
    half = call.dtype != "float32"  # whose products in full are not what tensor cores do
    yield from (TRITON, SDPA) if half and sdpa.makes_mask(call) else (SDPA, TRITON) if half else (SDPA,)
    yield FLEX
    yield from (EINSUM, BLOCKWISE) if is_small(call) else (BLOCKWISE, EINSUM)
    yield from (ROWWISE,) if half else (TRITON, ROWWISE)


def _with_functions(call: Call) -> Iterator[Entry]:
    """The same with functions: what is little is done before FlexAttention has been called, let alone compiled."""
    little = call.b * call.h * call.i * call.j <= LITTLE
    yield from (EINSUM, FLEX) if little else (FLEX,)
    yield from () if little or not is_small(call) else (EINSUM,)
    yield BLOCKWISE
    yield from () if is_small(call) else (EINSUM,)
    yield from (ROWWISE, FA4, SDPA, TRITON)


_ANY = tuple(_elsewhere(None))

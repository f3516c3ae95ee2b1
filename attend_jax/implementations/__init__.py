"""The table of implementations: one file each, in order of preference."""

from functools import lru_cache

import jax

from attend_jax.implementations import blockwise, cudnn, einsum, fa3, fa4, rowwise, triton, xla
from attend_jax.machine import capability
from attend_shared import devices
from attend_shared.blocks import is_small
from attend_shared.call import Call
from attend_shared.choice import Entry

FA4, FA3 = Entry("fa4", True, fa4), Entry("fa3", True, fa3)
CUDNN, TRITON, XLA = Entry("cudnn", True, cudnn), Entry("triton", True, triton), Entry("xla", False, xla)
BLOCKWISE = Entry("blockwise", True, blockwise, custom=True)
ROWWISE, EINSUM = Entry("rowwise", True, rowwise, custom=True), Entry("einsum", False, einsum, custom=True)
PACKING = (FA4.name, FA3.name)  # which take segments that are runs, as packed sequences
ENTRIES = {entry.name: entry for entry in (FA4, FA3, CUDNN, TRITON, XLA, BLOCKWISE, ROWWISE, EINSUM)}


def table(call: Call | None = None) -> tuple[Entry, ...]:
    """In order of preference where JAX runs, for a call or in general."""
    if call is None or call.platform != "cuda" or call.custom:
        return _safe(call)
    return _remembered(call, capability())


@lru_cache(maxsize=4096)
def _remembered(call: Call, capability: str) -> tuple[Entry, ...]:
    """As it was measured on such a GPU, at the cost of looking it up."""
    return tuple(devices.ordered(devices.order(call, capability), _safe(call), ENTRIES))


def _safe(call: Call | None) -> tuple[Entry, ...]:
    """In order of preference on a device of which nothing is known."""
    first, second = (EINSUM, XLA) if jax.default_backend() == "cpu" else (XLA, EINSUM)
    if call is not None and is_small(call):
        return FA4, FA3, CUDNN, TRITON, first, second, BLOCKWISE, ROWWISE
    return FA4, FA3, CUDNN, TRITON, BLOCKWISE, first, second, ROWWISE

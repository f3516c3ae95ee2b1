"""The table of implementations: one file each, in order of preference."""

import jax

from attend_jax.implementations import blockwise, cudnn, einsum, rowwise, xla
from attend_shared.blocks import is_small
from attend_shared.call import Call
from attend_shared.choice import Entry

CUDNN, BLOCKWISE, XLA = Entry("cudnn", True, cudnn), Entry("blockwise", True, blockwise), Entry("xla", False, xla)
ROWWISE, EINSUM = Entry("rowwise", True, rowwise), Entry("einsum", False, einsum)


def table(call: Call | None = None) -> tuple[Entry, ...]:
    """In order of preference where JAX runs, for a call or in general."""
    first, second = (EINSUM, XLA) if jax.default_backend() == "cpu" else (XLA, EINSUM)
    if call is not None and is_small(call):
        return CUDNN, first, second, BLOCKWISE, ROWWISE
    return CUDNN, BLOCKWISE, first, second, ROWWISE

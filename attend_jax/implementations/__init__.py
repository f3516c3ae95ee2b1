"""The table of implementations: one file each, in order of preference."""

import jax

from attend_jax.implementations import blockwise, cudnn, einsum, rowwise, triton, xla
from attend_shared.blocks import is_small
from attend_shared.call import Call
from attend_shared.choice import Entry

CUDNN, TRITON, XLA = Entry("cudnn", True, cudnn), Entry("triton", True, triton), Entry("xla", False, xla)
BLOCKWISE = Entry("blockwise", True, blockwise, custom=True)
ROWWISE, EINSUM = Entry("rowwise", True, rowwise, custom=True), Entry("einsum", False, einsum, custom=True)


def table(call: Call | None = None) -> tuple[Entry, ...]:
    """In order of preference where JAX runs, for a call or in general."""
    first, second = (EINSUM, XLA) if jax.default_backend() == "cpu" else (XLA, EINSUM)
    if call is not None and is_small(call):
        return CUDNN, TRITON, first, second, BLOCKWISE, ROWWISE
    return CUDNN, TRITON, BLOCKWISE, first, second, ROWWISE

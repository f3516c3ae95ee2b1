"""The table of implementations: one file each, in order of preference."""

from collections.abc import Iterator

import torch

from attend_shared.blocks import is_large, is_small
from attend_shared.call import Call
from attend_shared.choice import Entry
from attend_torch.implementations import blockwise, einsum, rowwise, sdpa, triton

SDPA, TRITON = Entry("sdpa", True, sdpa), Entry("triton", True, triton)
BLOCKWISE = Entry("blockwise", True, blockwise, custom=True)
ROWWISE, EINSUM = Entry("rowwise", True, rowwise, custom=True), Entry("einsum", False, einsum, custom=True)


def table(call: Call | None = None) -> Iterator[Entry]:
    """In order of preference, for a call or in general.

    Sizes are looked at only where sdpa leaves a choice: looking costs time, and binds what torch.export exports.
    """
    if call is None or call.platform != "cuda":
        slow = call is not None and sdpa.is_quadratic(call) and not torch.compiler.is_exporting() and is_large(call)
        if not slow:
            yield SDPA
        yield TRITON
        yield from (EINSUM, BLOCKWISE) if call is not None and is_small(call) else (BLOCKWISE, EINSUM)
        yield ROWWISE
        if slow:
            yield SDPA
        return
    half = call.dtype != "float32"  # whose products in full are not what tensor cores do
    yield from (TRITON, SDPA) if half and sdpa.makes_mask(call) else (SDPA, TRITON) if half else (SDPA,)
    yield from (EINSUM, BLOCKWISE) if is_small(call) else (BLOCKWISE, EINSUM)
    yield from (ROWWISE,) if half else (TRITON, ROWWISE)

"""The table of implementations: one file each, in order of preference."""

from collections.abc import Iterator

from attend_shared.blocks import is_small
from attend_shared.call import Call
from attend_shared.choice import Entry
from attend_torch.implementations import blockwise, einsum, rowwise, sdpa

SDPA, BLOCKWISE = Entry("sdpa", True, sdpa), Entry("blockwise", True, blockwise)
ROWWISE, EINSUM = Entry("rowwise", True, rowwise), Entry("einsum", False, einsum)


def table(call: Call | None = None) -> Iterator[Entry]:
    """In order of preference, for a call or in general.

    Sizes are looked at only where sdpa leaves a choice: looking costs time, and binds what torch.export exports.
    """
    yield SDPA
    yield from (EINSUM, BLOCKWISE) if call is not None and is_small(call) else (BLOCKWISE, EINSUM)
    yield ROWWISE

"""The table of implementations: one file each, in order of preference."""

from attend_shared.choice import Entry

from attend_torch.implementations import einsum, sdpa

SDPA, EINSUM = Entry("sdpa", True, sdpa), Entry("einsum", False, einsum)
_TABLE = (SDPA, EINSUM)


def table() -> tuple[Entry, ...]:
    """In order of preference."""
    return _TABLE

"""The table of implementations: one file each, in order of preference."""

import jax
from attend_shared.choice import Entry

from attend_jax.implementations import cudnn, einsum, xla

CUDNN, XLA, EINSUM = Entry("cudnn", True, cudnn), Entry("xla", False, xla), Entry("einsum", False, einsum)


def table() -> tuple[Entry, ...]:
    """In order of preference where JAX runs: on a CPU einsum is the faster of two that make the same array."""
    return (CUDNN, EINSUM, XLA) if jax.default_backend() == "cpu" else (CUDNN, XLA, EINSUM)

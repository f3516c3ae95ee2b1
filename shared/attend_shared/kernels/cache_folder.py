"""The folder in which Triton keeps what it compiled, which importing jax_triton takes from the whole process.

jax_triton 0.3.1, which tokamax imports as well, sets TRITON_CACHE_DIR to "" when it is imported. It does without the
folder itself, but Triton's own launches do not, those of PyTorch's compiler among them, nor those in processes that are
started afterwards: each raises "Could not create or locate cache dir".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "TRITON_CACHE_DIR"


def restore(folder: str | None = None) -> None:
    """Where the variable is empty, give it this value, or none, so that Triton takes its default."""
    if os.environ.get(VARIABLE) == "":
        os.environ.pop(VARIABLE)
        if folder:
            os.environ[VARIABLE] = folder


@contextmanager
def kept() -> Iterator[None]:
    """What is imported in here leaves the variable as it was."""
    folder = os.environ.get(VARIABLE)
    try:
        yield
    finally:
        restore(folder)

"""Attention that means the same in PyTorch and in JAX/Flax: the JAX side."""

from attend_jax.attend import attend, explain, implementations, merge
from attend_jax.module import Attend
from attend_shared.choice import Explanation, Implementation
from attend_shared.errors import UnsupportedError

__all__ = [
    "Attend",
    "Explanation",
    "Implementation",
    "UnsupportedError",
    "attend",
    "explain",
    "implementations",
    "merge",
]

"""Attention that means the same in PyTorch and in JAX/Flax: the PyTorch side."""

from attend_shared.choice import Explanation, Implementation
from attend_shared.errors import UnsupportedError
from attend_torch.attend import attend, explain, implementations, merge
from attend_torch.module import Attend

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

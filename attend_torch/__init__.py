"""Attention that means the same in PyTorch and in JAX/Flax: the PyTorch side."""

from attend_shared.choice import Explanation, Implementation
from attend_shared.errors import UnsupportedError
from attend_shared.layers import Cache
from attend_shared.rotary import Rotary
from attend_torch import convert
from attend_torch.attend import attend, explain, implementations, merge
from attend_torch.module import Attend
from attend_torch.multihead import MultiHeadAttention

__all__ = [
    "Attend",
    "Cache",
    "Explanation",
    "Implementation",
    "MultiHeadAttention",
    "Rotary",
    "UnsupportedError",
    "attend",
    "convert",
    "explain",
    "implementations",
    "merge",
]

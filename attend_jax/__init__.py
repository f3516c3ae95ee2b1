"""Attention that means the same in PyTorch and in JAX/Flax: the JAX side."""

from attend_jax import convert
from attend_jax.attend import attend, explain, implementations, merge
from attend_jax.module import Attend
from attend_jax.multihead import MultiHeadAttention
from attend_shared.choice import Explanation, Implementation
from attend_shared.errors import UnsupportedError
from attend_shared.layers import Cache
from attend_shared.rotary import Rotary

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

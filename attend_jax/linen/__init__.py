"""The modules for Flax Linen."""

from attend_jax.linen.module import Attend
from attend_jax.linen.multihead import MultiHeadAttention

__all__ = ["Attend", "MultiHeadAttention"]

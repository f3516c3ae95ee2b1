"""Models of Hugging Face in Flax NNX, on `MultiHeadAttention`: read a checkpoint folder, run it, write it back."""

from attend_jax.models.generation import generate
from attend_jax.models.loading import FAMILIES, from_pretrained, save_pretrained

__all__ = ["FAMILIES", "from_pretrained", "generate", "save_pretrained"]

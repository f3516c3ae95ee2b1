"""Encoders of images: patches as tokens, layers that normalise before each part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attend_jax.models import blocks
from attend_jax.models.blocks import HIGHEST, LayerNorm
from attend_jax.models.encoder import EncoderOutput, LogitsOutput
from attend_jax.multihead import MultiHeadAttention


@dataclass(frozen=True)
class VisionSizes:
    """What is to be built. `image` and `patch` are heights and widths in pixels; `bias` is of query, key and value;
    `labels` is what a classifier in the pooler's place tells apart, 0 where there is none."""

    width: int
    inner: int
    layers: int
    heads: int
    channels: int
    image: tuple[int, int]
    patch: tuple[int, int]
    bias: bool
    activation: str
    eps: float
    pooled: int
    pooled_activation: str
    labels: int = 0


class VisionLayer(nnx.Module):
    """x = x + attention(norm(x)); x = x + mlp(norm(x))."""

    def __init__(self, sizes: VisionSizes, dtype: Any, rngs: nnx.Rngs) -> None:
        bias = (sizes.bias,) * 3 + (True,)
        self.attention_norm = LayerNorm(sizes.width, sizes.eps, dtype=dtype, rngs=rngs)
        self.attention = MultiHeadAttention(sizes.width, sizes.heads, use_bias=bias, param_dtype=dtype, rngs=rngs)
        self.mlp_norm = LayerNorm(sizes.width, sizes.eps, dtype=dtype, rngs=rngs)
        self.mlp = blocks.MLP(sizes.width, sizes.inner, sizes.activation, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, n, width) to the same."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class VisionEncoder(nnx.Module):
    """Patches, a class token before them, learned positions, layers, a norm, and on the class token a pooler or a
    classifier."""

    def __init__(self, sizes: VisionSizes, dtype: Any, rngs: nnx.Rngs) -> None:
        self.sizes = sizes
        self.dtype = dtype
        count = (sizes.image[0] // sizes.patch[0]) * (sizes.image[1] // sizes.patch[1])
        self.patches = nnx.Conv(
            sizes.channels, sizes.width, sizes.patch, strides=sizes.patch, padding="VALID", param_dtype=dtype,
            precision=HIGHEST, rngs=rngs,
        )  # fmt: skip
        self.class_token = nnx.Param(jnp.zeros((1, 1, sizes.width), dtype))
        self.positions = nnx.Param(jnp.zeros((1, count + 1, sizes.width), dtype))
        self.layers = nnx.List([VisionLayer(sizes, dtype, rngs) for _ in range(sizes.layers)])
        self.norm = LayerNorm(sizes.width, sizes.eps, dtype=dtype, rngs=rngs)
        self.pooler, self.head = (
            blocks.linear(sizes.width, count, dtype=dtype, rngs=rngs) if wanted else None
            for count, wanted in ((sizes.pooled, not sizes.labels), (sizes.labels, bool(sizes.labels)))
        )

    def __call__(
        self, pixel_values: Any, *, output_hidden_states: bool = False
    ) -> EncoderOutput | LogitsOutput:
        """Encode images.

        Args:
            pixel_values: floating (b, channels, height, width), of the size that the model was made for.
            output_hidden_states: whether to return what every layer gives, before the final norm.

        Returns:
            EncoderOutput, or the classifier's logits, under the names that transformers has; n is 1 more than the
            number of patches.
        """
        pixels = jnp.asarray(pixel_values)
        expected = (self.sizes.channels, *self.sizes.image)
        if pixels.ndim != 4 or pixels.shape[1:] != expected:
            raise ValueError(f"pixel_values: expected (b, channels, height, width) with {expected}, got "
                             f"{pixels.shape}. Resize the images: positions are not interpolated.")  # fmt: skip
        x = self.patches(pixels.astype(self.positions.dtype).transpose(0, 2, 3, 1))  # (b, rows, columns, width)
        x = x.reshape(x.shape[0], -1, x.shape[3])  # (b, rows columns, width)
        first = jnp.broadcast_to(self.class_token[...], (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([first, x], 1) + self.positions[...]
        states = [x]
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        x = self.norm(x)
        kept = tuple(states) if output_hidden_states else None
        if self.head is not None:
            return LogitsOutput(self.head(x[:, 0]), kept)
        assert self.pooler is not None
        return EncoderOutput(x, blocks.ACTIVATIONS[self.sizes.pooled_activation](self.pooler(x[:, 0])), kept)

"""What the families are built from. Every product of float32 is a full one, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attend_jax.multihead import product

HIGHEST = jax.lax.Precision.HIGHEST


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


# By the names that config.json has for them. jax.nn.gelu approximates unless it is told not to.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def linear(width: int, out: int, *, bias: bool = True, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    """A dense layer, (..., width) to (..., out)."""
    return nnx.Linear(
        width, out, use_bias=bias, param_dtype=dtype, precision=HIGHEST, dot_general=product, rngs=rngs
    )


def embed(count: int, width: int, *, dtype: Any, rngs: nnx.Rngs) -> nnx.Embed:
    """A table of vectors, integers (...) to (..., width)."""
    return nnx.Embed(count, width, param_dtype=dtype, rngs=rngs)


def unembed(table: nnx.Embed, x: jax.Array) -> jax.Array:
    """The logits of a tied head: (..., width) to (..., vocabulary)."""
    return product(x, table.embedding[...], (((x.ndim - 1,), (1,)), ((), ())), precision=HIGHEST)


def _wide(x: jax.Array) -> jax.Array:
    """In float32, or float64 where it is that already."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis, in float32, in x's dtype."""

    def __init__(self, width: int, eps: float, *, bias: bool = True, dtype: Any, rngs: nnx.Rngs) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.bias = nnx.Param(jnp.zeros((width,), dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., width) to the same."""
        wide = _wide(x)
        centred = wide - wide.mean(-1, keepdims=True)
        out = centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + self.eps)
        out = out * self.scale[...].astype(out.dtype)
        return (out if self.bias is None else out + self.bias[...].astype(out.dtype)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, the quotient in float32.

    Llama, Mistral, Qwen and T5 round the quotient to x's dtype before they scale it. Gemma does not, and its scale is
    stored as the distance from 1.
    """

    def __init__(self, width: int, eps: float, *, from_one: bool = False, dtype: Any, rngs: nnx.Rngs) -> None:
        self.eps = eps
        self.from_one = from_one
        self.scale = nnx.Param((jnp.zeros if from_one else jnp.ones)((width,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., width) to the same."""
        wide = _wide(x)
        out = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + self.eps)
        if self.from_one:
            return (out * (1.0 + self.scale[...].astype(out.dtype))).astype(x.dtype)
        return out.astype(x.dtype) * self.scale[...]


class MLP(nnx.Module):
    """down(act(up(x))), or gated: down(act(gate(x)) * up(x))."""

    def __init__(
        self, width: int, inner: int, activation: str, *, gated: bool = False, bias: bool = True, dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.activation = activation
        self.gate = linear(width, inner, bias=bias, dtype=dtype, rngs=rngs) if gated else None
        self.up = linear(width, inner, bias=bias, dtype=dtype, rngs=rngs)
        self.down = linear(inner, width, bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., width) to the same."""
        act = ACTIVATIONS[self.activation]
        return self.down(act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x))


def key_mask(attention_mask: Any, shape: tuple[int, ...]) -> jax.Array | None:
    """A tokenizer's mask, 1 or true where a token is real, as `attend` takes it: (b, n) bool.

    Raises:
        ValueError: another shape.
    """
    if attention_mask is None:
        return None
    mask = jnp.asarray(attention_mask)
    if mask.shape != shape:
        raise ValueError(f"attention_mask: expected shape {shape}, that of input_ids, got {mask.shape}. "
                         "Pass the tokenizer's own, 1 for a real token and 0 for padding.")  # fmt: skip
    return mask.astype(bool)


def mask_bias(mask: jax.Array | None, dtype: Any) -> jax.Array | None:
    """A key mask (b, n) as a bias (b, 1, 1, n) of 0 and -inf, for keys that are known to be finite.

    `attend` promises that NaN in a masked key reaches nothing, and for that copies all keys and values. Those of a
    cache come from the model itself, which would be lost to NaN anyhow, and are many for a single query.
    """
    if mask is None:
        return None
    return jnp.where(mask, 0.0, -jnp.inf).astype(dtype)[:, None, None]


def token_ids(input_ids: Any) -> jax.Array:
    """(b, n) integers.

    Raises:
        TypeError, ValueError: anything else.
    """
    ids = jnp.asarray(input_ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"input_ids: expected integers (b, n), got {ids.dtype} {ids.shape}.")
    if ids.ndim != 2:
        raise ValueError(f"input_ids: expected integers (b, n), got shape {ids.shape}. Add the batch axis.")
    return ids

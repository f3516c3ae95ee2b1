"""`MultiHeadAttention`: the projections around `attend`, for Flax NNX."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attend_jax.arrays import FRAMEWORK, to_int32
from attend_jax.attend import Array
from attend_jax.module import Attend
from attend_jax.rotary import rotate
from attend_shared.call import is_int
from attend_shared.layers import (
    Cache,
    Sizes,
    check_cache_size,
    check_context,
    check_inputs,
    check_layer,
    check_store,
    sees_no_later,
)
from attend_shared.rotary import Rotary, rotation

HIGHEST = jax.lax.Precision.HIGHEST  # float32 products in full, where a device would shorten them
_BAND = 32
"""Rows of a matrix that `product` takes at a time."""


def product(x: jax.Array, kernel: jax.Array, dimensions: Any, **options: Any) -> jax.Array:
    """`jax.lax.dot_general` of x (..., c) and a kernel (c, ..., o) as a layer asks for it, by a faster way on a CPU.

    There XLA takes four times as long over bfloat16 unless the sum is float32, as it is inside anyhow, and there are
    two rows or more: so they are, and the sum is rounded as it would be. For two to four rows of float32, as in a step
    of decoding, it takes a sixth less time where a matrix goes in bands of its rows, each band's product by itself.
    """
    if jax.default_backend() != "cpu":
        return jax.lax.dot_general(x, kernel, dimensions, **options)
    (axes, kernel_axes), batch = dimensions
    outer = x.shape[: x.ndim - len(axes)]
    rows, width = math.prod(outer), math.prod(x.shape[len(outer) :])
    if x.dtype == kernel.dtype == jnp.bfloat16 and not batch[0]:
        wide = jnp.concatenate([x, x]) if rows == 1 else x
        sums = jax.lax.dot_general(wide, kernel, dimensions, **options | {"preferred_element_type": jnp.float32})
        return sums[: len(x)].astype(x.dtype)
    leads = tuple(kernel_axes) == tuple(range(len(axes))) and not batch[0]
    if x.dtype == kernel.dtype == jnp.float32 and 2 <= rows <= 4 and leads and not width % _BAND:
        bands = width // _BAND
        parts = jax.lax.dot_general(  # (bands, rows, o)
            x.reshape(rows, bands, _BAND), kernel.reshape(bands, _BAND, -1), (((2,), (1,)), ((1,), (0,))), **options
        )
        return parts.sum(0).reshape(*outer, *kernel.shape[len(axes) :])
    return jax.lax.dot_general(x, kernel, dimensions, **options)


class MultiHeadAttention(nnx.Module):
    """Multi-head attention with its projections, over `attend`: self-attention, cross-attention, cached decoding.

    JAX: a Flax NNX module. dtype is that of the computation (None: what inputs and parameters promote to), param_dtype
    that of the parameters. It drops unless deterministic, which train() and eval() set, as does the call.

        q = rotate(norm(query(x)))    k = rotate(norm(key(context)))    v = value(context)
        out(attend(q, k, v, ...))     context is x where there is none

    Parameters: query, key, value and out, each with a weight and perhaps a bias; query_norm and key_norm where there is
    a qk_norm; sinks where there are sinks. Weights start uniform in (-a, a) with a = sqrt(6 / (fan_in + fan_out)), of
    the projection as a matrix (embed_dim x num_heads head_dim, and so on); biases and sinks at 0, norms at 1.
    docs/layers.md says how they carry over between the frameworks.

    Args:
        embed_dim: width of x.
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of num_heads; None is num_heads.
        head_dim: size of a head of queries and keys; None is embed_dim // num_heads.
        value_dim: size of a head of values; None is head_dim.
        kv_dim: width of the context; None is embed_dim.
        out_dim: width of what comes out; None is embed_dim.
        use_bias: whether the projections have a bias: a bool, or four of them for query, key, value and out.
        qk_norm: "rms" or "layer": queries and keys are normalised, each head by itself, before they turn; None.
        norm_eps: of qk_norm.
        rotary: a `Rotary`, or None.
        is_causal, window_size, softcap, scale, implementation: as in `attend`.
        sinks: whether there is a learned sink for each query head.
        dropout: the probability of dropping an attention weight in training.

    Called with x, and as needed context, mask, bias, positions, kv_positions, cache, q_offset, q_segment_ids,
    kv_segment_ids, q_lengths, kv_lengths, dropout_seed, score_fn and mask_fn.

    Returns:
        (b, i, out_dim); with a cache, that and the cache with the new keys and values.

    Raises:
        TypeError, ValueError: a wrong option, when the module is made; a wrong argument, when it is called.
        UnsupportedError: no implementation that was asked for can serve the call.

    Example:
        >>> import numpy as np
        >>> layer = MultiHeadAttention(8, 4, num_kv_heads=2, rotary=Rotary(), is_causal=True, rngs=nnx.Rngs(0))
        >>> x = jnp.sin(jnp.arange(24.0)).reshape(1, 3, 8)                # (b, i, embed_dim)
        >>> whole = layer(x)
        >>> cache = layer.make_cache(1, 4)
        >>> steps = []
        >>> for t in range(3):
        ...     out, cache = layer(x[:, t : t + 1], cache=cache)
        ...     steps.append(out)
        >>> bool(jnp.allclose(whole, jnp.concatenate(steps, 1), atol=1e-5)), int(cache.length)
        (True, 3)

    References:
        docs/layers.md: every option and input, the cache, and how weights carry over.
        Vaswani et al., Attention is all you need (2017). Glorot, Bengio, Understanding the difficulty of training deep
        feedforward neural networks (2010): the initial weights. Henry et al., Query-key normalization (2020).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        *,
        kv_dim: int | None = None,
        out_dim: int | None = None,
        use_bias: bool | Sequence[bool] = True,
        qk_norm: str | None = None,
        norm_eps: float = 1e-6,
        rotary: Rotary | None = None,
        is_causal: bool = False,
        window_size: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        sinks: bool = False,
        dropout: float = 0.0,
        implementation: str | Sequence[str] | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        deterministic: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        sizes = check_layer(
            embed_dim, num_heads, num_kv_heads, head_dim, value_dim, kv_dim, out_dim, use_bias, qk_norm, norm_eps,
            rotary, sinks,
        )  # fmt: skip
        self.attend = Attend(
            dropout, None, scale, is_causal=is_causal, window_size=window_size, softcap=softcap,
            implementation=implementation, deterministic=deterministic, rngs=rngs if dropout else None,
        )  # fmt: skip
        self.sizes = sizes
        self.rotary = rotary
        self.dtype = dtype
        self.param_dtype = param_dtype

        def linear(
            width: int | tuple[int, int], heads: int | tuple[int, int], bias: bool, axis: Any = -1
        ) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                width, heads, axis=axis, use_bias=bias, dtype=dtype, param_dtype=param_dtype, precision=HIGHEST,
                kernel_init=nnx.initializers.glorot_uniform(), dot_general=product, rngs=rngs,
            )  # fmt: skip

        c, _, _, h, hk, d, dv, bias = sizes
        self.query = linear(c, (h, d), bias[0])
        self.key = linear(sizes.kv_dim, (hk, d), bias[1])
        self.value = linear(sizes.kv_dim, (hk, dv), bias[2])
        self.out = linear((h, dv), sizes.out_dim, bias[3], (-2, -1))
        self.query_norm, self.key_norm = (
            Norm(qk_norm, d, norm_eps, param_dtype) if qk_norm else None for _ in range(2)
        )
        self.sinks = nnx.Param(jnp.zeros((h,), param_dtype)) if sinks else None

    def __call__(
        self,
        x: Array,
        context: Array | tuple[Array, Array] | None = None,
        mask: Array | None = None,
        *,
        bias: Array | None = None,
        positions: Array | None = None,
        kv_positions: Array | None = None,
        cache: Cache | None = None,
        q_offset: int | Array | None = None,
        q_segment_ids: Array | None = None,
        kv_segment_ids: Array | None = None,
        q_lengths: Array | None = None,
        kv_lengths: Array | None = None,
        dropout_seed: int | Array | None = None,
        score_fn: Callable[..., Any] | None = None,
        mask_fn: Callable[..., Any] | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> Any:
        """Attend from x to the context, or to x itself, after what the cache holds.

        Args:
            x: (b, i, embed_dim), floating.
            context: (b, j, kv_dim), or the pair (k, v) that `project` made of it; None is x.
            mask, bias: as in `attend`, against (b, num_heads, i, j); with a cache, j is its size.
            positions: integers (i,), (1, i) or (b, i), what the queries and keys of x turn by where there is a rotary;
                None counts from 0, or from what the cache holds.
            kv_positions: the same of the context: (j,), (1, j) or (b, j); None counts from 0.
            cache: keys and values of what came before; query t then stands at key cache.length + t.
            q_offset, q_segment_ids, kv_segment_ids, q_lengths, kv_lengths, dropout_seed, score_fn, mask_fn: as in
                `attend`.
            deterministic, rngs: as in `Attend`.

        Returns:
            (b, i, out_dim); with a cache, (that, the cache with i more slots filled). Where a cache whose length is an
            array overflows, what comes out is NaN; where its length is an int, it is a ValueError.
        """
        return forward(
            self, None if self.sinks is None else self.sinks[...], x, context, mask, bias, positions, kv_positions,
            cache, q_offset, q_segment_ids, kv_segment_ids, q_lengths, kv_lengths, dropout_seed=dropout_seed,
            score_fn=score_fn, mask_fn=mask_fn, deterministic=deterministic, rngs=rngs,
        )  # fmt: skip

    def project(self, context: Array, kv_positions: Array | None = None) -> tuple[jax.Array, jax.Array]:
        """The keys and values of a context, to be passed as context: computed once, and read by many calls.

        Args:
            context: (b, j, kv_dim).
            kv_positions: as in the call.

        Returns:
            k (b, hk, j, head_dim) and v (b, hk, j, value_dim).
        """
        check_context(FRAMEWORK, self.sizes, context, kv_positions)
        return keys_values(self, context, kv_positions)

    def make_cache(self, batch: int, length: int, dtype: Any = None) -> Cache:
        """An empty cache of a fixed size.

        Args:
            batch: b.
            length: the slots, for as many tokens as will ever be cached.
            dtype: of keys and values as they are computed; None is that of the module, or of its parameters.

        Returns:
            Cache(k, v, length) of zeros: (b, hk, length, head_dim), (b, hk, length, value_dim), and an integer ().
        """
        return empty_cache(self.sizes, batch, length, dtype or self.dtype or self.param_dtype)


def forward(
    layer: Any, sinks: Array | None, x: Array, context: Any, mask: Array | None, bias: Array | None,
    positions: Array | None, kv_positions: Array | None, cache: Cache | None, q_offset: int | Array | None,
    q_segment_ids: Array | None, kv_segment_ids: Array | None, q_lengths: Array | None, kv_lengths: Array | None,
    **others: Any,
) -> Any:  # fmt: skip
    """The call of a layer: its sizes, rotary, attend, projections and norms, and its inputs in the order of the call.

    `others` go to attend as they are.
    """
    check_inputs(FRAMEWORK, layer.sizes, x, context, positions, kv_positions, cache, q_offset, kv_lengths)
    b, i, _ = x.shape
    start: Any = 0 if cache is None else cache.length
    if positions is None:
        positions = jnp.arange(i, dtype=jnp.int32) + to_int32(start)
    q = _turn(layer, _normed(layer.query_norm, layer.query(x)), positions)  # (b h i d)
    if isinstance(context, tuple):
        k, v = context
    elif context is None:
        k, v = keys_values(layer, x, positions)
    else:
        k, v = keys_values(layer, context, kv_positions)
    if cache is not None:
        check_store(cache, k, v)
        cache = store(cache, k, v)
        k, v, q_offset = cache.k, cache.v, start
        if not sees_no_later(layer.attend.is_causal, layer.attend.window_size):
            kv_lengths = filled(cache.length, b, kv_lengths)
    out = layer.attend(
        q, k, v, mask, bias=bias, q_offset=q_offset, q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids,
        q_lengths=q_lengths, kv_lengths=kv_lengths, sinks=sinks, **others,
    )  # fmt: skip
    out = layer.out(out.swapaxes(1, 2))  # (b h i dv) -> (b i h dv) -> (b i out_dim)
    return out if cache is None else (overflowed(start, cache, out), cache)


def keys_values(layer: Any, context: Array, positions: Array | None) -> tuple[jax.Array, jax.Array]:
    """k (b hk j d), normalised and turned, and v (b hk j dv) of a context (b j kv_dim)."""
    if positions is None:
        positions = jnp.arange(context.shape[1], dtype=jnp.int32)
    k = _turn(layer, _normed(layer.key_norm, layer.key(context)), positions)
    return k, layer.value(context).swapaxes(1, 2)


def empty_cache(sizes: Sizes, batch: int, length: int, dtype: Any) -> Cache:
    """A cache of zeros."""
    check_cache_size(batch, length)
    k, v = (jnp.zeros((batch, sizes.hk, length, size), dtype) for size in (sizes.d, sizes.dv))
    return Cache(k, v, jnp.zeros((), jnp.int32))


def store(cache: Cache, k: jax.Array, v: jax.Array) -> Cache:
    """A cache with new keys and values (b hk i d), (b hk i dv) behind those that it holds."""
    at = (jnp.int32(0), jnp.int32(0), jnp.asarray(to_int32(cache.length)), jnp.int32(0))
    keys, values = (
        jax.lax.dynamic_update_slice(jnp.asarray(old), new, at) for old, new in ((cache.k, k), (cache.v, v))
    )
    return Cache(keys, values, cache.length + k.shape[2])


def filled(length: int | Array, b: int, kv_lengths: Array | None) -> jax.Array:
    """The filled slots of a cache as kv_lengths (b,), or those given where they are less."""
    lengths = jnp.broadcast_to(jnp.asarray(to_int32(length)), (b,))
    return lengths if kv_lengths is None else jnp.minimum(lengths, to_int32(jnp.asarray(kv_lengths)))


def overflowed(start: int | Array, cache: Cache, out: jax.Array) -> jax.Array:
    """NaN where more was stored than the cache has room for: its length is data, so this cannot be an error."""
    if is_int(start):
        return out
    return jnp.where((start < 0) | (cache.length > cache.k.shape[2]), jnp.nan, out)


class Norm(nnx.Module):
    """`normalise` with its parameters, under Flax's names. Flax's own norms do not run under strict promotion.

    Args:
        kind: "rms" or "layer". d: the size of a head. eps: see `normalise`. param_dtype: of the parameters.
    """

    def __init__(self, kind: str, d: int, eps: float, param_dtype: Any) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((d,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((d,), param_dtype)) if kind == "layer" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (... d), normalised."""
        return normalise(x, self.scale[...], None if self.bias is None else self.bias[...], self.eps)


def normalise(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """scale * x / sqrt(mean(x ** 2) + eps), or with a bias that of x - mean(x), plus the bias; rounded once, to x's
    dtype."""
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    y = x.astype(wide)
    if bias is not None:
        y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + eps) * scale.astype(wide)
    return (y if bias is None else y + bias.astype(wide)).astype(x.dtype)


def _normed(norm: Any, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


def _turn(layer: Any, x: jax.Array, positions: Array) -> jax.Array:
    """(b n h d) -> (b h n d), rotated where the layer is rotary."""
    x = x.swapaxes(1, 2)
    return x if layer.rotary is None else rotate(x, positions, rotation(layer.rotary, layer.sizes.d))

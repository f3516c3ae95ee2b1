"""`MultiHeadAttention`: the projections around `attend`, for Flax Linen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attend_jax.arrays import FRAMEWORK
from attend_jax.attend import Array
from attend_jax.linen.module import Attend
from attend_jax.multihead import HIGHEST, empty_cache, forward, keys_values, normalise, product
from attend_shared.call import check_module
from attend_shared.layers import Cache, Sizes, check_context, check_layer
from attend_shared.rotary import Rotary


class MultiHeadAttention(nn.Module):
    """Multi-head attention with its projections, over `attend`: self-attention, cross-attention, cached decoding.

    JAX: a Flax Linen module. dtype is that of the computation (None: what inputs and parameters promote to),
    param_dtype that of the parameters. It drops unless the call's deterministic, which must be given if dropout > 0.

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
        >>> layer = MultiHeadAttention(8, 4, num_kv_heads=2, rotary=Rotary(), is_causal=True)
        >>> x = jnp.sin(jnp.arange(24.0)).reshape(1, 3, 8)                # (b, i, embed_dim)
        >>> weights = layer.init(jax.random.key(0), x)
        >>> whole = layer.apply(weights, x)
        >>> cache = layer.make_cache(1, 4)
        >>> steps = []
        >>> for t in range(3):
        ...     out, cache = layer.apply(weights, x[:, t : t + 1], cache=cache)
        ...     steps.append(out)
        >>> bool(jnp.allclose(whole, jnp.concatenate(steps, 1), atol=1e-5)), int(cache.length)
        (True, 3)

    References:
        docs/layers.md: every option and input, the cache, and how weights carry over.
        Vaswani et al., Attention is all you need (2017). Glorot, Bengio, Understanding the difficulty of training deep
        feedforward neural networks (2010): the initial weights. Henry et al., Query-key normalization (2020).
    """

    embed_dim: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    kv_dim: int | None = None
    out_dim: int | None = None
    use_bias: bool | Sequence[bool] = True
    qk_norm: str | None = None
    norm_eps: float = 1e-6
    rotary: Rotary | None = None
    is_causal: bool = False
    window_size: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    scale: float | None = None
    sinks: bool = False
    dropout: float = 0.0
    implementation: str | Sequence[str] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        self.use_bias = self.sizes.bias  # checks, and makes a tuple of a list
        self.window_size, self.implementation = check_module(
            self.dropout, None, self.scale, self.is_causal, self.window_size, self.softcap, "bhnd", self.implementation
        )
        super().__post_init__()

    @property
    def sizes(self) -> Sizes:
        """What the options come to."""
        return check_layer(
            self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim, self.value_dim, self.kv_dim, self.out_dim,
            self.use_bias, self.qk_norm, self.norm_eps, self.rotary, self.sinks,
        )  # fmt: skip

    def setup(self) -> None:
        """The projections, norms and sinks, under the names that they have in NNX."""

        def linear(heads: int | tuple[int, int], bias: bool, axis: Any = -1) -> nn.DenseGeneral:
            return nn.DenseGeneral(
                heads, axis=axis, use_bias=bias, dtype=self.dtype, param_dtype=self.param_dtype, precision=HIGHEST,
                kernel_init=nn.initializers.glorot_uniform(), dot_general=product,
            )  # fmt: skip

        _, _, out_dim, h, hk, d, dv, bias = self.sizes
        self.attend = Attend(
            self.dropout, None, self.scale, is_causal=self.is_causal, window_size=self.window_size,
            softcap=self.softcap, implementation=self.implementation,
        )  # fmt: skip
        self.query, self.key, self.value = linear((h, d), bias[0]), linear((hk, d), bias[1]), linear((hk, dv), bias[2])
        self.out = linear(out_dim, bias[3], (-2, -1))
        self.query_norm, self.key_norm = (
            Norm(self.qk_norm, self.norm_eps, self.param_dtype) if self.qk_norm else None for _ in range(2)
        )
        self.sink_logits = self.param("sinks", nn.initializers.zeros, (h,), self.param_dtype) if self.sinks else None

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
            deterministic: as in `Attend`.

        Returns:
            (b, i, out_dim); with a cache, (that, the cache with i more slots filled). Where a cache whose length is an
            array overflows, what comes out is NaN; where its length is an int, it is a ValueError.
        """
        return forward(
            self, self.sink_logits, x, context, mask, bias, positions, kv_positions, cache, q_offset, q_segment_ids,
            kv_segment_ids, q_lengths, kv_lengths, dropout_seed=dropout_seed, score_fn=score_fn,
            mask_fn=mask_fn, deterministic=deterministic,
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


class Norm(nn.Module):
    """`normalise` with its parameters, under Flax's names. Flax's own norms do not run under strict promotion.

    Args:
        kind: "rms" or "layer". eps: see `normalise`. param_dtype: of the parameters.
    """

    kind: str
    eps: float
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (... d), normalised."""
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype) if self.kind == "layer" else None
        return normalise(x, scale, bias, self.eps)

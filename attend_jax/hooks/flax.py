"""Flax's own attention modules on `attend`: pass one of these two functions as their `attention_fn=`.

Linen hands a function only those keywords that stand by name in its signature, so a function with **kwargs gets no mask
and no error. Everything that Linen 0.12 and NNX 0.12 pass is therefore named here: used, without effect and said to be,
or refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from attend_jax.attend import Array, attend
from attend_jax.convert import seed_from_key
from attend_shared.call import describe
from attend_shared.errors import UnsupportedError

HEADLINE = "attend cannot stand in for Flax's own attention with:"
ADVICE = "Leave them at None or False, or keep Flax's own attention_fn for this layer."
WEIGHTS = "a fused attention has no weights to sow; take attend_shared.oracle.attend(...).p to look at them"
EINSUM = "the products are attend's own, and a replaced einsum would be dropped without a word"


def linen_attention_fn(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    qk_attn_weights_einsum: Callable[..., Array] | None = None,
    attn_weights_value_einsum: Callable[..., Array] | None = None,
    q_offset: int | Array | None = None,
    window_size: tuple[int | None, int | None] | None = None,
    sinks: Array | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """`attend` as the `attention_fn` of `flax.linen.MultiHeadDotProductAttention`.

    out = attend(query, key, value, mask != 0, bias=bias, layout="bnhd"), the batch axes folded into one

    The last six arguments are `attend`'s own. Linen does not pass them: bind them with functools.partial, whose
    signature Linen reads as well.

    Args:
        query: (*batch, i, h, d), any number of batch axes, floating.
        key, value: (*batch, j, h, d) and (*batch, j, h, dv). Divisors of h heads are grouped as in `attend`.
        bias: floating, broadcastable to (*batch, h, i, j) as NumPy broadcasts, added to the logits.
        mask: any dtype, broadcastable to (*batch, h, i, j) as NumPy broadcasts; not 0 means may attend. So (i, j) is a
            mask of query and key here, where `attend` reads rank 2 as a key mask.
        broadcast_dropout: without effect. Dropout is independent for each batch item, head, query and key.
        dropout_rng: a JAX key, from which the seed is taken; needed where dropout_rate > 0 and not deterministic.
        dropout_rate: the probability of dropping a weight. deterministic: True drops none.
        dtype: query, key and value are cast to it; None is the dtype that holds all three.
        precision: without effect: products of float32 are always full, as jax.lax.Precision.HIGHEST makes them.
        module: None. Linen passes itself where sow_weights=True.
        force_fp32_for_softmax: without effect: the softmax is never narrower than float32.
        qk_attn_weights_einsum, attn_weights_value_einsum: None.
        q_offset, window_size, sinks, softcap, scale, implementation: as in `attend`.

    Returns:
        (*batch, i, h, dv) in the common dtype. A row that may attend to nothing is 0; Flax's own is the mean of value.

    Raises:
        UnsupportedError: sow_weights=True or an einsum of the caller's.
        TypeError, ValueError: shapes that do not fit, dropout without a key, and what `attend` raises.

    Example:
        >>> import flax.linen as nn
        >>> layer = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=linen_attention_fn)
        >>> x, mask = jnp.ones((3, 5, 8)), nn.make_causal_mask(jnp.ones((3, 5)))
        >>> layer.apply(layer.init(jax.random.key(0), x), x, mask=mask).shape
        (3, 5, 8)

    References:
        flax.linen.dot_product_attention, whose arguments these are.
    """
    _refuse(("sow_weights", module, WEIGHTS), ("qk_attn_weights_einsum", qk_attn_weights_einsum, EINSUM),
            ("attn_weights_value_einsum", attn_weights_value_einsum, EINSUM))  # fmt: skip
    return _attend(
        query, key, value, bias, mask, dropout_rng, 0.0 if deterministic else dropout_rate, dtype, q_offset=q_offset,
        window_size=window_size, sinks=sinks, softcap=softcap, scale=scale, implementation=implementation,
    )  # fmt: skip


def nnx_attention_fn(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
    q_offset: int | Array | None = None,
    window_size: tuple[int | None, int | None] | None = None,
    sinks: Array | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """`attend` as the `attention_fn` of `flax.nnx.MultiHeadAttention`.

    out = attend(query, key, value, mask != 0, bias=bias, is_causal=is_causal, layout="bnhd"), the batch axes folded

    NNX says is_causal but not where the queries sit. Without a q_offset
      - as many queries as keys: query t sits at key t;
      - one query, more keys: that is cached decoding, where NNX's mask already ends at the query's own position, so
        is_causal adds nothing. (Flax's own function puts the query at key 0 there, and sees that key only.)
      - else: q_offset=0, which is how Flax's own function aligns them.
    A window_size has none of that to lean on: where i != j it needs a q_offset, as in `attend`.

    The last six arguments are `attend`'s own. NNX does not pass them: bind them with functools.partial.

    Args:
        query: (*batch, i, h, d), any number of batch axes, floating.
        key, value: (*batch, j, hk, d) and (*batch, j, hk, dv), where h is a multiple of hk (num_kv_heads); query head n
            reads head n // (h // hk), as in Flax.
        bias: floating, broadcastable to (*batch, h, i, j) as NumPy broadcasts, added to the logits.
        mask: any dtype, broadcastable to (*batch, h, i, j) as NumPy broadcasts; not 0 means may attend. So (i, j) is a
            mask of query and key here, where `attend` reads rank 2 as a key mask.
        broadcast_dropout: without effect. Dropout is independent for each batch item, head, query and key.
        dropout_rng: a JAX key, from which the seed is taken; needed where dropout_rate > 0 and not deterministic.
        dropout_rate: the probability of dropping a weight. deterministic: True drops none.
        dtype: query, key and value are cast to it; None is the dtype that holds all three.
        precision: without effect: products of float32 are always full, as jax.lax.Precision.HIGHEST makes them.
        module: None. NNX passes itself where sow_weights=True.
        is_causal: whether queries see no later key, ANDed with the mask.
        q_offset, window_size, sinks, softcap, scale, implementation: as in `attend`.

    Returns:
        (*batch, i, h, dv) in the common dtype. A row that may attend to nothing is 0; Flax's own is the mean of value.

    Raises:
        UnsupportedError: sow_weights=True.
        TypeError, ValueError: shapes that do not fit, dropout without a key, and what `attend` raises.

    Example:
        >>> from functools import partial
        >>> from flax import nnx
        >>> local = partial(nnx_attention_fn, window_size=(2, 0))
        >>> layer = nnx.MultiHeadAttention(4, 8, num_kv_heads=2, decode=False, rngs=nnx.Rngs(0), attention_fn=local)
        >>> layer(jnp.ones((3, 5, 8)), is_causal=True).shape
        (3, 5, 8)

    References:
        flax.nnx.dot_product_attention, whose arguments these are.
    """
    _refuse(("sow_weights", module, WEIGHTS))
    if is_causal and q_offset is None and window_size is None and min(query.ndim, key.ndim) >= 3:
        i, j = query.shape[-3], key.shape[-3]
        q_offset = j - i if i == 1 else 0
    return _attend(
        query, key, value, bias, mask, dropout_rng, 0.0 if deterministic else dropout_rate, dtype, is_causal=is_causal,
        q_offset=q_offset, window_size=window_size, sinks=sinks, softcap=softcap, scale=scale,
        implementation=implementation,
    )  # fmt: skip


def _refuse(*arguments: tuple[str, Any, str]) -> None:
    reasons = tuple((name, reason) for name, value, reason in arguments if value is not None)
    if reasons:
        raise UnsupportedError(reasons, HEADLINE, ADVICE)


def _attend(
    query: Array, key: Array, value: Array, bias: Array | None, mask: Array | None, dropout_rng: Array | None,
    dropout: float, dtype: Any, **options: Any,
) -> jax.Array:  # fmt: skip
    """What both functions share: the batch axes, and the mask as Flax reads it."""
    query, key, value = promote_dtype(query, key, value, dtype=dtype)
    batch = query.shape[:-3]
    for name, array, letters in (("query", query, "i, h, d"), ("key", key, "j, hk, d"), ("value", value, "j, hk, dv")):
        if array.ndim < 3 or array.shape[:-3] != batch:
            axes = f" with the batch axes {batch} of query" if name != "query" else ""
            raise ValueError(
                f"{name}: expected (*batch, {letters}){axes}, got {describe(array)}. Any number of batch axes will do."
            )
    if mask is not None:
        mask = _fold("mask", jnp.asarray(mask).astype(bool), batch)
    if bias is not None:
        bias = _fold("bias", bias, batch)
    seed = None
    if dropout:
        if dropout_rng is None:
            raise ValueError(
                "dropout_rng: expected a JAX key where dropout_rate > 0 and deterministic is False, got None. "
                "Give the module its dropout rngs, or pass deterministic=True."
            )
        seed = seed_from_key(dropout_rng)
    q, k, v = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value))  # (b, n, h, d)
    out = attend(q, k, v, mask, bias=bias, dropout=dropout, dropout_seed=seed, layout="bnhd", **options)
    return out.reshape(*batch, *out.shape[1:])


def _fold(argument: str, array: Array, batch: tuple[int, ...]) -> Array:
    """A mask or a bias that broadcasts to (*batch, h, i, j), as rank 4 against (b, h, i, j)."""
    missing = len(batch) + 3 - array.ndim
    shape = (1,) * missing + array.shape
    if missing < 0 or any(size not in (1, full) for size, full in zip(shape[:-3], batch, strict=True)):
        raise ValueError(
            f"{argument}: expected a shape that broadcasts to (*batch, h, i, j) with the batch axes {batch}, "
            f"got {describe(array)}. Leading axes may be left out or 1."
        )
    if all(size == 1 for size in shape[:-3]):
        return array.reshape(1, *shape[-3:])  # stays small
    return jnp.broadcast_to(array.reshape(shape), (*batch, *shape[-3:])).reshape(math.prod(batch), *shape[-3:])

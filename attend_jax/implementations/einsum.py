"""The formula as it is written: einsum, a softmax in the accumulation dtype, einsum. It refuses nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange

from attend_jax import philox
from attend_jax.arrays import allowed, custom, hide, hide_rows
from attend_shared.call import Arrays, Call

HIGHEST = jax.lax.Precision.HIGHEST  # float32 products in full, where a device would shorten them


def unavailable() -> str | None:
    """None: it can always run."""
    return None


def refusal(call: Call) -> str | None:
    """None: it serves every call."""
    return None


def attend(call: Call, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """out (b h i dv) in q's dtype, and lse (b h i) in the accumulation dtype.

    Differentiable any number of times, forward and reverse.
    """
    arrays = hide(call, arrays)
    out, lse = compute(call, arrays)
    return hide_rows(call, arrays, out) if call.q_lengths else out, lse


def compute(
    call: Call, arrays: Arrays, first: int | jax.Array = 0, first_key: int | jax.Array = 0
) -> tuple[jax.Array, jax.Array]:
    """The formula on arrays from which nothing can leak.

    `first` and `first_key` are what the indices of queries and keys begin with, for custom scores; dropout's keys
    begin with 0.
    """
    wide = jnp.dtype(call.accumulation)
    q = rearrange(arrays.q.astype(wide), "b (hk g) i d -> b hk g i d", hk=call.hk)
    s = jnp.einsum("bkgid,bkjd->bkgij", q, arrays.k.astype(wide), precision=HIGHEST)
    s = rearrange(s, "b hk g i j -> b (hk g) i j")
    s = times(s, call.scale) if call.softcap is None else call.softcap * jnp.tanh(s * call.scale / call.softcap)
    if arrays.bias is not None:
        s = s + arrays.bias.astype(wide)
    may = allowed(call, arrays)
    if call.custom:
        s, may = custom(call, s, may, first, first_key)
    if may is not None:
        s = jnp.where(may, s, -jnp.inf)
    sink = jnp.full((), -jnp.inf, wide) if arrays.sinks is None else arrays.sinks.astype(wide)[None, :, None]
    p, _, lse = _softmax(s, sink)
    if call.dropout:
        keep = philox.keep_mask(arrays.dropout_seed, call.b, call.h, call.i, call.j, call.dropout, first)
        p = jnp.where(keep, p, 0) / (1 - call.dropout)
    p = rearrange(p, "b (hk g) i j -> b hk g i j", hk=call.hk)
    out = jnp.einsum("bkgij,bkje->bkgie", p, arrays.v.astype(wide), precision=HIGHEST)
    out = rearrange(out, "b hk g i e -> b (hk g) i e").astype(arrays.q.dtype)
    return out, lse


def times(s: jax.Array, factor: float) -> jax.Array:
    """s * factor, rounded.

    XLA joins a product with the subtraction of the largest such product, and does not round it there as it did before:
    of logits of 1e9 and more exp may be 0 or inf for every key then. What is chosen it joins with nothing.
    """
    return jnp.where(s == s, s * factor, s)


@jax.custom_jvp
def _softmax(s: jax.Array, sink: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """exp(s - lse), exp(sink - lse) and lse of logits (b h i j), an empty row giving zeros and -inf.

    With a sink, (1 h 1), it gives that. The second of them is for derivatives: not by lse, which loses log(total) where
    logits are huge.
    """
    top = jnp.maximum(s.max(-1, initial=-jnp.inf), sink)
    top = jnp.where(top == -jnp.inf, 0, top)  # a shift, so any constant serves; -inf - -inf would be NaN
    weights, weight = jnp.exp(s - top[..., None]), jnp.exp(sink - top)
    total = weights.sum(-1) + weight
    empty = total == 0
    total = jnp.where(empty, 1, total)
    return weights / total[..., None], weight / total, jnp.where(empty, -jnp.inf, jnp.log(total) + top)


@_softmax.defjvp
def _softmax_jvp(primals: tuple, tangents: tuple) -> tuple:
    """Said outright, it keeps one array of (i, j) for the way back instead of four."""
    (s_dot, sink_dot), (p, p_sink, lse) = tangents, _softmax(*primals)
    lse_dot = (p * s_dot).sum(-1) + p_sink * sink_dot
    lse_dot = jnp.where(lse == -jnp.inf, 0, lse_dot)  # 0 already, but not what comes back through it: 0 * inf is NaN
    return (p, p_sink, lse), (p * (s_dot - lse_dot[..., None]), p_sink * (sink_dot - lse_dot), lse_dot)

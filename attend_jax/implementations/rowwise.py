"""The formula by blocks of queries, each against all keys: memory linear in the lengths, and every derivative.

Slower than `blockwise`, since nothing is skipped and the way back computes each block again, but it is plain
differentiable code: forward mode, reverse mode, and any mixture of them stay linear in memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from attend_jax.arrays import hide, hide_rows
from attend_jax.implementations import einsum
from attend_shared.call import Arrays, Call

LOGITS = 2**21  # of a block, all heads together


def unavailable() -> str | None:
    """None: it can always run."""
    return None


def refusal(call: Call) -> str | None:
    """None: it serves every call."""
    return None


def attend(call: Call, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """out (b h i dv) in q's dtype, and lse (b h i) in the accumulation dtype."""
    arrays = hide(call, arrays)
    out, lse = rows(call, arrays)
    return hide_rows(call, arrays, out) if call.q_lengths else out, lse


def rows(call: Call, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """The same on arrays from which nothing can leak."""
    size = max(1, min(call.i, LOGITS // max(1, call.b * call.h * call.j)))
    whole = call.i // size
    parts = []
    if whole:
        starts = jnp.arange(whole, dtype=jnp.int32) * size
        out, lse = lax.map(
            jax.checkpoint(lambda first: _block(call, arrays, first, size)), starts
        )  # (whole, b, h, size, ...)
        parts.append((jnp.moveaxis(out, 0, 2).reshape(call.b, call.h, whole * size, call.dv),
                      jnp.moveaxis(lse, 0, 2).reshape(call.b, call.h, whole * size)))  # fmt: skip
    if rest := call.i - whole * size:
        parts.append(_block(call, arrays, jnp.int32(whole * size), rest))
    if not parts:
        return einsum.compute(call, arrays)
    out, lse = zip(*parts, strict=True)
    return jnp.concatenate(out, 2), jnp.concatenate(lse, 2)


def _block(call: Call, arrays: Arrays, first: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The queries from `first` on, as a call of their own."""

    def pick(x: jax.Array | None, axis: int) -> jax.Array | None:
        return x if x is None or x.shape[axis] == 1 else lax.dynamic_slice_in_dim(x, first, size, axis)

    def shape(x: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return x if x is None or x[2] == 1 else (*x[:2], size, x[3])

    offset = {"zero": 0, "end": call.j - call.i, "data": arrays.q_offset}[call.offset]
    part = call._replace(
        i=size, mask=shape(call.mask), bias=shape(call.bias), offset="data" if call.positional else "zero"
    )
    return einsum.compute(part, arrays._replace(
        q=pick(arrays.q, 2), mask=pick(arrays.mask, 2), bias=pick(arrays.bias, 2), q_offset=offset + first,
        q_segment_ids=pick(arrays.q_segment_ids, 1),
        q_lengths=None if arrays.q_lengths is None else arrays.q_lengths - first), first)  # fmt: skip

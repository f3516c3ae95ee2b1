"""The formula by blocks of queries, each against all keys: memory linear in the lengths, and every derivative.

Slower than `blockwise`, since nothing is skipped and the way back computes each block again, but it is plain
differentiable code: forward mode, reverse mode, and any mixture of them stay linear in memory.

Custom scores are served here, for `blockwise` too: there keys that no query of some blocks can reach are skipped.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attend_jax.arrays import hide, hide_rows
from attend_jax.implementations import einsum
from attend_shared import blocks
from attend_shared.call import Arrays, Call

LOGITS = 2**21  # of a block, all heads together
GROUPS = 4  # of blocks that skip the same keys: each is compiled by itself


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
    # Where queries see all keys before them, blocks are taken in groups, each with the keys that any of it sees.
    offset = {"zero": 0, "end": call.j - call.i}.get(call.offset)
    grouped = _skips(call) and offset is not None and None in (call.left, call.right)
    together = -(-whole // GROUPS) if grouped else max(whole, 1)
    parts = []
    for start in range(0, whole, together):
        stop = min(start + together, whole)
        low, high = blocks.reach(call, offset if grouped else None, start * size, (stop - start) * size)
        some = _keys(call, arrays, offset, low, high - low) if grouped else (call, arrays)
        parts.append(_blocks(*some, start, stop, size, low))
    if rest := call.i - whole * size:
        parts.append(_block(call, arrays, jnp.int32(whole * size), rest))
    if not parts:
        return einsum.compute(call, arrays)
    out, lse = zip(*parts, strict=True)
    return jnp.concatenate(out, 2), jnp.concatenate(lse, 2)


def _skips(call: Call) -> bool:
    """Whether keys out of reach are left out: with custom scores, but for dropout, whose keys begin with 0."""
    return call.custom and call.positional and not call.dropout


def _blocks(
    call: Call, arrays: Arrays, start: int, stop: int, size: int, first_key: int
) -> tuple[jax.Array, jax.Array]:
    """These blocks of queries, one after the other."""

    @jax.checkpoint
    def block(first: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _block(call, arrays, first, size, first_key)

    out, lse = lax.map(block, jnp.arange(start, stop, dtype=jnp.int32) * size)  # (blocks, b, h, size, ...)
    rows = (stop - start) * size
    return (jnp.moveaxis(out, 0, 2).reshape(call.b, call.h, rows, call.dv),
            jnp.moveaxis(lse, 0, 2).reshape(call.b, call.h, rows))  # fmt: skip


def _keys(call: Call, arrays: Arrays, offset: Any, first: int | jax.Array, count: int) -> tuple[Call, Arrays]:
    """A call with these keys alone, counted from the first; offset is where query 0 sits among all of them."""

    def pick(x: jax.Array, axis: int) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, first, count, axis)

    def of_pairs(x: jax.Array | None) -> jax.Array | None:
        return x if x is None or x.shape[3] == 1 else pick(x, 3)

    mask, bias = of_pairs(arrays.mask), of_pairs(arrays.bias)
    mask_shape, bias_shape = (None if x is None else x.shape for x in (mask, bias))
    return call._replace(j=count, mask=mask_shape, bias=bias_shape, offset="data"), arrays._replace(
        k=pick(arrays.k, 2), v=pick(arrays.v, 2), mask=mask, bias=bias, q_offset=jnp.int32(offset - first),
        kv_segment_ids=pick(arrays.kv_segment_ids, 1) if call.segments else None,
        kv_lengths=arrays.kv_lengths - first if call.kv_lengths else None,
    )  # fmt: skip


def _block(
    call: Call, arrays: Arrays, first: jax.Array, size: int, first_key: int | jax.Array = 0
) -> tuple[jax.Array, jax.Array]:
    """The queries from `first` on, as a call of their own, whose keys begin with `first_key`."""
    offset = {"zero": 0, "end": call.j - call.i, "data": arrays.q_offset}[call.offset]
    if _skips(call) and call.left is not None and call.right is not None and np.ndim(offset) == 0:
        width = size + call.left + call.right  # all that a window lets them see
        if width < call.j:
            first_key = jnp.clip(first + offset - call.left, 0, call.j - width)
            call, arrays = _keys(call, arrays, offset, first_key, width)
            offset = arrays.q_offset

    def pick(x: jax.Array | None, axis: int) -> jax.Array | None:
        return x if x is None or x.shape[axis] == 1 else lax.dynamic_slice_in_dim(x, first, size, axis)

    def shape(x: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return x if x is None or x[2] == 1 else (*x[:2], size, x[3])

    part = call._replace(
        i=size, mask=shape(call.mask), bias=shape(call.bias), offset="data" if call.positional else "zero"
    )
    return einsum.compute(part, arrays._replace(
        q=pick(arrays.q, 2), mask=pick(arrays.mask, 2), bias=pick(arrays.bias, 2), q_offset=offset + first,
        q_segment_ids=pick(arrays.q_segment_ids, 1),
        q_lengths=None if arrays.q_lengths is None else arrays.q_lengths - first), first, first_key)  # fmt: skip

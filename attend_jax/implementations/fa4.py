"""FlashAttention-4's CuTe kernels, from the package fa4-jax, on Hopper GPUs.

What they take, and how a call is put to them, is `attend_shared.flash`. A kernel is compiled when a call is, for some
seconds; lengths are no part of a kernel.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from attend_jax.arrays import hide, hide_rows
from attend_jax.implementations import einsum
from attend_jax.implementations.blockwise import Floats
from attend_jax.implementations.triton import batching
from attend_shared import flash
from attend_shared.call import Arrays, Call

PACKAGE = flash.FA4_JAX
MISSING = flash.missing(PACKAGE)


def unavailable() -> str | None:
    """Why the kernels cannot run here, or None."""
    return MISSING or no_device()


def no_device() -> str | None:
    """Why FlashAttention's kernels cannot run on the first device, or None."""
    if jax.default_backend() != "gpu":
        return "it needs an NVIDIA GPU"
    major, _, minor = str(getattr(jax.devices()[0], "compute_capability", "0.0")).partition(".")
    return flash.wrong_device((int(major), int(minor or 0)))


def refusal(call: Call) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    if call.platform != "cuda":
        return "it runs on an NVIDIA GPU"
    if jax.sharding.get_abstract_mesh().manual_axes:  # unless check_vma=False, which cannot be seen from here
        return "inside a shard_map fa4-jax's gradients raise"
    return flash.refusal(call, PACKAGE)


def attend(call: Call, arrays: Arrays) -> tuple[jax.Array, None]:
    """out (b h i dv) in q's dtype; there is no lse. Differentiable in reverse."""
    if call.is_empty:
        return einsum.attend(call, arrays)[0], None
    import fa4_jax

    counts_q, counts_kv = flash.counted(call)
    if call.q_lengths and not counts_q:
        arrays = hide(call, arrays)
    size = flash.size(call, PACKAGE)
    if call.segments:
        q, k, v = (padded(x, size) for x in arrays[:3])
        return _packed(call, Floats(q, k, v, None, None), arrays.q_segment_ids)[..., : call.dv], None
    q, k, v = (padded(x, size).swapaxes(1, 2) for x in arrays[:3])  # (b n h size)
    options = {"window_size": flash.window(call), "scale": call.scale}
    if counts_q or counts_kv:
        bounds = (jnp.array(flash.starts(call.b, n), jnp.int32) for n in (call.i, call.j))
        out = fa4_jax.flash_attn_varlen(
            *(x.reshape(-1, *x.shape[2:]) for x in (q, k, v)), *bounds,  # (b * n, h, size)
            seqused_q=flash.used(arrays.q_lengths, call.i) if counts_q else None,
            seqused_k=flash.used(arrays.kv_lengths, call.j) if counts_kv else None,
            defined_padding=True, **options,
        ).reshape(q.shape)  # fmt: skip
    else:
        out = fa4_jax.flash_attn(q, k, v, **options)
    out = out.swapaxes(1, 2)[..., : call.dv]
    return (hide_rows(call, arrays, out) if call.q_lengths and not counts_q else out), None


def padded(x: jax.Array, size: int) -> jax.Array:
    """x (b h n d), with zeros behind it up to the size."""
    return x if x.shape[3] == size else jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, size - x.shape[3])))


# Packed sequences. fa4-jax raises under jax.vmap where they are; here lane goes after lane. Runs leave no row out, so
# what it writes is not filled with zeros beforehand.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed(call: Call, floats: Floats, starts: jax.Array) -> jax.Array:
    """out (b h i d). starts: of runs, what the door makes of ids."""
    return batching(call, partial(_forward, False))(Arrays(**floats._asdict(), q_segment_ids=starts))[0]


def _packed_fwd(call: Call, floats: Floats, starts: jax.Array) -> tuple:
    out, lse = batching(call, partial(_forward, True))(Arrays(**floats._asdict(), q_segment_ids=starts))
    return out, (floats, starts, out, lse)


def _packed_bwd(call: Call, kept: tuple, dout: jax.Array) -> tuple:
    floats, starts, out, lse = kept
    dq, dk, dv = batching(call, _gradients)(Arrays(**floats._asdict(), q_segment_ids=starts), out, lse, dout)
    return Floats(dq, dk, dv, None, None), None


_packed.defvjp(_packed_fwd, _packed_bwd)


def laid(x: jax.Array) -> jax.Array:
    """x (1 h n d) as packed sequences lie: (n h d)."""
    return x[0].swapaxes(0, 1)


def back(x: jax.Array) -> jax.Array:
    """The opposite."""
    return x.swapaxes(0, 1)[None]


def _forward(lse: bool, call: Call, arrays: Arrays) -> tuple[jax.Array, ...]:
    """out (1 h i d), and lse (h i) if it is wanted."""
    import fa4_jax

    found = fa4_jax.flash_attn_varlen(
        *map(laid, arrays[:3]), arrays.q_segment_ids, arrays.q_segment_ids, window_size=flash.window(call),
        scale=call.scale, return_lse=lse,
    )  # fmt: skip
    return (back(found[0]), found[1]) if lse else (back(found),)


def _gradients(call: Call, arrays: Arrays, out: jax.Array, lse: jax.Array, dout: jax.Array) -> tuple[Any, ...]:
    """dq, dk, dv."""
    from fa4_jax import attention

    (q, k, v), starts = map(laid, arrays[:3]), arrays.q_segment_ids
    config = attention._make_config(q, False, flash.window(call), call.scale, None, None, varlen=True)
    bounds = (starts, starts, *(starts[1:] - starts[:-1],) * 2)  # of all of which everything is used
    found = attention.fa4_vjp_p.bind(q, k, v, laid(out), lse, laid(dout), *bounds, cfg=config, has_d_lse=False)
    return tuple(map(back, found))

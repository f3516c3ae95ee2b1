"""FlashAttention-4's CuTe kernels, from the package fa4-jax, on Hopper GPUs.

What they take, and how a call is put to them, is `attend_shared.flash`. A kernel is compiled when a call is, for some
seconds; lengths are no part of a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from attend_jax.arrays import hide, indices
from attend_jax.implementations import einsum, triton
from attend_jax.implementations.blockwise import Floats
from attend_jax.implementations.triton import batching, instantiated
from attend_shared import flash, meaning, runs
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
    return flash.refusal(call, PACKAGE, triton.unavailable)


def attend(call: Call, arrays: Arrays) -> tuple[jax.Array, jax.Array | None]:
    """out (b h i dv) in q's dtype, and lse (b h i) in float32 where it is asked for. Differentiable in reverse."""
    if call.is_empty:
        return einsum.attend(call, arrays)
    counted = flash.counted(call)
    hidden = call.q_lengths and not counted[0]
    if hidden:
        arrays = hide(call, arrays)
    size = flash.size(call, PACKAGE)
    q, k, v = (padded(x, size) for x in arrays[:3])
    floats = Floats(q, k, v, None, None)
    data = arrays._replace(q=None, k=None, v=None)
    if call.segments or call.return_lse or any(counted):
        out, lse = _attend(call, floats, data)
    else:  # the package's own derivatives
        out, lse = _forward(call, data._replace(**floats._asdict()), False)
    out = out[..., : call.dv]
    return _empty(call, arrays, out, lse) if hidden else (out, lse)


def _empty(call: Call, arrays: Arrays, out: jax.Array, lse: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Nothing in the rows that q_lengths empties, and that the kernels computed."""
    rows: Any = meaning.dead_queries(call, arrays, indices(call)[0])
    out = jnp.where(rows[:, None, :, None], 0, out)
    return out, None if lse is None else jnp.where(rows[:, None], -jnp.inf, lse)


def padded(x: jax.Array, size: int) -> jax.Array:
    """x (b h n d), with zeros behind it up to the size."""
    return x if x.shape[3] == size else jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, size - x.shape[3])))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: Call, floats: Floats, data: Arrays) -> tuple[jax.Array, jax.Array | None]:
    """out (b h i d) and lse (b h i). Ids of data: of runs, what the door makes of them."""
    return batching(call, partial(_forward, lse=call.return_lse))(data._replace(**floats._asdict()))


def _attend_fwd(call: Call, floats: Any, data: Any) -> tuple:
    floats, data = jax.tree.map(lambda x: x.value, (floats, data))
    out, lse = batching(call, partial(_forward, lse=True))(data._replace(**floats._asdict()))
    return (out, lse if call.return_lse else None), (floats, data, out, lse)


def _attend_bwd(call: Call, kept: tuple, cotangents: tuple) -> tuple:
    floats, data, *made = kept
    return Floats(*gradients(_gradients, call, data._replace(**floats._asdict()), *made, *cotangents)), None


_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


def gradients(theirs: Callable, call: Call, arrays: Arrays, out: Any, lse: Any, dout: Any, dlse: Any) -> tuple:
    """Of `Floats`: the package's own, which have no part of lse; where that has a cotangent, those of Triton's kernels.

    Args:
        theirs: called with call, arrays, out, lse and dout.
    """
    dout = instantiated(dout, arrays.q)
    if dlse is None or isinstance(dlse, SymbolicZero):
        return batching(call, theirs)(arrays, out, lse, dout)
    if call.segments:  # from where runs start to ids
        ids = jnp.searchsorted(arrays.q_segment_ids, jnp.arange(call.i), side="right")[None]
        arrays = arrays._replace(q_segment_ids=ids, kv_segment_ids=None)
        call = call._replace(runs=runs.NOT_LOOKED, sequences=0)
    call = call._replace(d=arrays.q.shape[3], dv=arrays.v.shape[3])
    return batching(call, triton.gradients_of)(arrays, out, lse, dout, dlse)


def laid(x: jax.Array) -> jax.Array:
    """x (b h n d) as packed sequences lie: (b * n, h, d)."""
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def back(x: jax.Array, b: int = 1) -> jax.Array:
    """The opposite."""
    return x.reshape(b, -1, *x.shape[1:]).swapaxes(1, 2)


# fa4-jax raises under jax.vmap where sequences are packed: `batching` makes lanes of lengths items, and has runs go one
# lane after another. Runs leave no row out, so what it writes is not filled with zeros beforehand; lengths do.


def _bounds(call: Call, arrays: Arrays) -> tuple[Any, ...] | None:
    """Where packed sequences of q and k start, and how much of each is used; None where nothing is packed."""
    if call.segments:
        starts = arrays.q_segment_ids
        return starts, starts, *(starts[1:] - starts[:-1],) * 2
    of_q, of_kv = flash.counted(call)
    if not (of_q or of_kv):
        return None
    sides = ((of_q, arrays.q_lengths, call.i), (of_kv, arrays.kv_lengths, call.j))
    used = (flash.used(x, n) if counts else jnp.full((call.b,), n, jnp.int32) for counts, x, n in sides)
    return *(jnp.array(flash.starts(call.b, n), jnp.int32) for n in (call.i, call.j)), *used


def _forward(call: Call, arrays: Arrays, lse: bool) -> tuple[jax.Array, jax.Array | None]:
    """out (b h i d), and lse (b h i) if it is wanted."""
    import fa4_jax

    options: dict[str, Any] = {"window_size": flash.window(call), "scale": call.scale, "return_lse": lse}
    bounds = _bounds(call, arrays)
    if bounds is None:
        found = fa4_jax.flash_attn(*(x.swapaxes(1, 2) for x in arrays[:3]), **options)
        out, lse_of = found if lse else (found, None)
        return out.swapaxes(1, 2), lse_of
    starts_q, starts_kv, q_used, kv_used = bounds
    if not call.segments:
        options |= {"seqused_q": q_used, "seqused_k": kv_used, "defined_padding": True}
    found = fa4_jax.flash_attn_varlen(*map(laid, arrays[:3]), starts_q, starts_kv, **options)
    out, lse_of = found if lse else (found, None)
    return back(out, call.b), None if lse_of is None else lse_of.reshape(call.h, call.b, call.i).swapaxes(0, 1)


def _gradients(call: Call, arrays: Arrays, out: jax.Array, lse: jax.Array, dout: jax.Array) -> tuple[Any, ...]:
    """dq, dk, dv of `Floats`."""
    from fa4_jax import attention

    bounds = _bounds(call, arrays)
    packed = bounds is not None
    q, k, v, out, dout = (laid(x) if packed else x.swapaxes(1, 2) for x in (*arrays[:3], out, dout))
    lse = lse.swapaxes(0, 1).reshape(call.h, -1) if packed else lse
    config = attention._make_config(
        q, False, flash.window(call), call.scale, None, None, varlen=packed,
        defined_padding=packed and not call.segments,
    )  # fmt: skip
    found = attention.fa4_vjp_p.bind(q, k, v, out, lse, dout, *(bounds or ()), cfg=config, has_d_lse=False)
    return *(back(x, call.b) if packed else x.swapaxes(1, 2) for x in found), None, None

"""FlashAttention-3's kernels, from the package dew-flash-attn-cu13, on Hopper GPUs.

What they take, and how a call is put to them, is `attend_shared.flash`. The package has them compiled.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from attend_jax.arrays import varying
from attend_jax.implementations import einsum, triton
from attend_jax.implementations.blockwise import Floats
from attend_jax.implementations.fa4 import back, gradients, laid, no_device, padded
from attend_jax.implementations.triton import batching
from attend_shared import flash
from attend_shared.call import Arrays, Call
from attend_shared.kernels import of_sinks

Array = jax.Array
PACKAGE = flash.DEW_FLASH_ATTN
MISSING = flash.missing(PACKAGE)


def unavailable() -> str | None:
    """Why the kernels cannot run here, or None."""
    return MISSING or no_device()


def refusal(call: Call) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    if call.platform != "cuda":
        return "it runs on an NVIDIA GPU"
    return flash.refusal(call, PACKAGE, triton.unavailable)


def attend(call: Call, arrays: Arrays) -> tuple[Array, Array]:
    """out (b h i dv) in q's dtype, and lse (b h i) in float32. Differentiable once, in reverse.

    What positions leave without a part is cut off, and is 0: so no bound is negative, which would be read as none.
    """
    if call.is_empty:
        return einsum.attend(call, arrays)
    rows, keys = flash.reach(call)
    size = flash.size(call, PACKAGE)
    q, k, v = (padded(x, size) for x in (arrays.q[:, :, rows], arrays.k[:, :, :keys], arrays.v[:, :, :keys]))
    seen = call._replace(i=rows.stop - rows.start, j=keys)
    data = arrays._replace(q=None, k=None, v=None, sinks=None)
    out, lse = _attend(seen, Floats(q, k, v, None, arrays.sinks), data)
    out = out[..., : call.dv]
    ends = rows.start, call.i - rows.stop
    if any(ends):
        out, lse = jnp.pad(out, ((0, 0), (0, 0), ends, (0, 0))), _extended(lse, arrays.sinks, ends)
    return out, lse


def _extended(lse: Array, sinks: Array | None, ends: tuple[int, int]) -> Array:
    """lse (b h i) with rows that have no key before and behind: -inf, or their sink."""
    nothing = jnp.full(lse.shape[1], -jnp.inf) if sinks is None else sinks.astype(lse.dtype)
    nothing = jnp.where(nothing == -jnp.inf, -jnp.inf, nothing)  # whose cotangent is no sink's
    before, behind = (jnp.broadcast_to(nothing[:, None], (*lse.shape[:2], n)) for n in ends)
    return jnp.concatenate([before, lse, behind], 2)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: Call, floats: Floats, data: Arrays) -> tuple[Array, Array]:
    """out (b h i d) and lse (b h i). Ids of data: of runs, what the door makes of them."""
    return batching(call, _forward)(data._replace(**floats._asdict()))


def _attend_fwd(call: Call, floats: Any, data: Any) -> tuple:
    floats, data = jax.tree.map(lambda x: x.value, (floats, data))
    made = _attend(call, floats, data)
    return made, (floats, data, *made)


def _attend_bwd(call: Call, kept: tuple, cotangents: tuple) -> tuple:
    floats, data, *made = kept
    return Floats(*gradients(_gradients, call, data._replace(**floats._asdict()), *made, *cotangents)), None


_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


def _asked(call: Call, starts: Array | None) -> tuple:
    """Where runs of q and k start, and how long they are at the most; scale, whether it is causal, and (left, right).

    -1 is no bound.
    """
    left, right = (-1 if bound is None else bound for bound in flash.window(call))
    of_runs = (None, None) if starts is None else ((starts, starts), (call.longest, call.longest))
    return *of_runs, call.scale, right == 0, (left, right)


def _forward(call: Call, arrays: Arrays) -> tuple[Array, Array]:
    """out (b h i d) and lse (b h i).

    The kernels have no sinks: of what a row is without its sink, sigmoid(lse - sink) is left.
    """
    from dew_flash_attn import _forward3

    given = (laid(x) if call.segments else x.swapaxes(1, 2) for x in arrays[:3])
    out, lse = _forward3(*given, *_asked(call, arrays.q_segment_ids))
    out, lse = (back(out), lse[None]) if call.segments else (out.swapaxes(1, 2), lse)
    if call.sinks:
        sinks = arrays.sinks.astype(jnp.float32)[:, None]
        out = (jax.nn.sigmoid(lse - sinks)[..., None] * out.astype(jnp.float32)).astype(out.dtype)
        lse = jnp.logaddexp(lse, sinks)
    return varying((out, lse), arrays.q)  # of which a kernel says nothing


def _gradients(call: Call, arrays: Arrays, out: Array, lse: Array, dout: Array) -> tuple[Array | None, ...]:
    """dq, dk, dv; None, as there is no bias; and dsinks, or None.

    The kernels make weights of an lse that has the sinks in it.
    """
    from dew_flash_attn import _backward3

    given = (laid(x) if call.segments else x.swapaxes(1, 2) for x in (dout, *arrays[:3], out))
    found = _backward3(*given, lse[0] if call.segments else lse, *_asked(call, arrays.q_segment_ids))
    turned = (back(x) if call.segments else x.swapaxes(1, 2) for x in found)
    return varying((*turned, None, _dsinks(call, arrays, out, lse, dout) if call.sinks else None), arrays.q)


def _dsinks(call: Call, arrays: Arrays, out: Array, lse: Array, dout: Array) -> Array:
    """-sum over rows of exp(sink - lse) * dout . out, of the rows that weigh most by an out that is not rounded."""
    starts = arrays.q_segment_ids
    rows = of_sinks.Rows(
        call.b, call.h, call.hk, call.i, call.j, out.shape[3], *flash.window(call), call.scale, None, False, False,
        False, 0 if starts is None else len(starts), str(arrays.sinks.dtype),
    )  # fmt: skip
    given = zip(("q", "k", "v", "out", "dout"), (*arrays[:3], out, dout), strict=True)
    known = {name: x.swapaxes(1, 2) for name, x in given}  # as the package has them
    strides = [(n * h * d, d, h * d) for _, n, h, d in (x.shape for x in known.values())]
    launches = of_sinks.launches(rows, *strides)
    known |= {"lse": lse, "sinks": arrays.sinks} | ({} if starts is None else {"starts": starts})
    triton.run(launches, known)
    return known["dsinks"]

"""FlashAttention-3's kernels, from the package dew-flash-attn-cu13, on Hopper GPUs.

What they take, and how a call is put to them, is `attend_shared.flash`. The package has them compiled.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from attend_jax.arrays import varying
from attend_jax.implementations import einsum, triton
from attend_jax.implementations.blockwise import Floats
from attend_jax.implementations.fa4 import back, laid, no_device, padded
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


def attend(call: Call, arrays: Arrays) -> tuple[Array, None]:
    """out (b h i dv) in q's dtype; there is no lse. Differentiable once, in reverse.

    What positions leave without a part is cut off, and is 0: so no bound is negative, which would be read as none.
    """
    if call.is_empty:
        return einsum.attend(call, arrays)[0], None
    rows, keys = flash.reach(call)
    size = flash.size(call, PACKAGE)
    q, k, v = (padded(x, size) for x in (arrays.q[:, :, rows], arrays.k[:, :, :keys], arrays.v[:, :, :keys]))
    seen = call._replace(i=rows.stop - rows.start, j=keys)
    out = _attend(seen, Floats(q, k, v, None, arrays.sinks), arrays.q_segment_ids)[..., : call.dv]
    before, behind = rows.start, call.i - rows.stop
    return (jnp.pad(out, ((0, 0), (0, 0), (before, behind), (0, 0))) if before or behind else out), None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: Call, floats: Floats, starts: Array | None) -> Array:
    """out (b h i d). starts: of runs, what the door makes of ids, or None."""
    return _attend_fwd(call, floats, starts)[0]


def _attend_fwd(call: Call, floats: Floats, starts: Array | None) -> tuple:
    out, lse = batching(call, _forward)(Arrays(**floats._asdict(), q_segment_ids=starts))
    return out, (floats, starts, out, lse)


def _attend_bwd(call: Call, kept: tuple, dout: Array) -> tuple:
    floats, starts, out, lse = kept
    found = batching(call, _gradients)(Arrays(**floats._asdict(), q_segment_ids=starts), out, lse, dout)
    return Floats(*found), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _asked(call: Call, starts: Array | None) -> tuple:
    """Where runs of q and k start, and how long they are at the most; scale, whether it is causal, and (left, right).

    -1 is no bound.
    """
    left, right = (-1 if bound is None else bound for bound in flash.window(call))
    of_runs = (None, None) if starts is None else ((starts, starts), (call.longest, call.longest))
    return *of_runs, call.scale, right == 0, (left, right)


def _forward(call: Call, arrays: Arrays) -> tuple[Array, ...]:
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
    gradients = (back(x) if call.segments else x.swapaxes(1, 2) for x in found)
    return varying((*gradients, None, _dsinks(call, arrays, out, lse, dout) if call.sinks else None), arrays.q)


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

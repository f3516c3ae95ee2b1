"""FlashAttention-3's kernels, from the package dew-flash-attn-cu13, on Hopper GPUs.

What they take, and how a call is put to them, is `attend_shared.flash`. The package has them compiled.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from attend_jax.arrays import varying
from attend_jax.implementations import einsum
from attend_jax.implementations.fa4 import no_device, padded
from attend_jax.implementations.triton import batching
from attend_shared import flash
from attend_shared.call import Arrays, Call

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
    return flash.refusal(call, PACKAGE)


def attend(call: Call, arrays: Arrays) -> tuple[Array, None]:
    """out (b h i dv) in q's dtype; there is no lse. Differentiable once, in reverse.

    The kernels see no row that has no key: what positions empty is cut off, and is 0.
    """
    if call.is_empty:
        return einsum.attend(call, arrays)[0], None
    rows, keys = flash.reach(call)
    size = flash.size(call, PACKAGE)
    q, k, v = (padded(x, size) for x in (arrays.q[:, :, rows], arrays.k[:, :, :keys], arrays.v[:, :, :keys]))
    seen = call._replace(i=rows.stop - rows.start, j=keys)
    out = _attend(seen, Arrays(q, k, v, sinks=arrays.sinks))[..., : call.dv]
    before, behind = rows.start, call.i - rows.stop
    return (jnp.pad(out, ((0, 0), (0, 0), (before, behind), (0, 0))) if before or behind else out), None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: Call, arrays: Arrays) -> Array:
    return _attend_fwd(call, arrays)[0]


def _attend_fwd(call: Call, arrays: Arrays) -> tuple:
    saved = batching(call, _forward)(arrays)
    return saved[0], (arrays, saved)


def _attend_bwd(call: Call, kept: tuple, dout: Array) -> tuple[Arrays]:
    return (Arrays(*batching(call, _gradients)(*kept, dout)),)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _asked(call: Call) -> tuple[float, bool, tuple[int, int]]:
    """scale, whether it is causal, and (left, right), where -1 is no bound."""
    left, right = (-1 if bound is None else bound for bound in flash.window(call))
    return call.scale, right == 0, (left, right)


def _forward(call: Call, arrays: Arrays) -> tuple[Array, ...]:
    """out (b h i d); what its gradients are made of: lse (b h i), and with sinks out as it is without them."""
    import dew_flash_attn

    q, k, v = (x.swapaxes(1, 2) for x in arrays[:3])
    out, (*_, plain, lse) = dew_flash_attn._attend_forward(q, k, v, arrays.sinks, None, None, *_asked(call))
    wanted = () if arrays.sinks is None else (plain.swapaxes(1, 2),)
    return _typed(arrays, (out.swapaxes(1, 2), lse, *wanted))


def _gradients(call: Call, arrays: Arrays, saved: tuple[Array, ...], dout: Array) -> tuple[Array | None, ...]:
    """Of the fields of `Arrays`."""
    import dew_flash_attn

    out, lse, *plain = saved
    q, k, v, out, dout = (x.swapaxes(1, 2) for x in (*arrays[:3], *(plain or (out,)), dout))
    kept = q, k, v, arrays.sinks, None, out, lse
    dq, dk, dv, dsinks, _ = dew_flash_attn._attend_backward(None, *_asked(call), kept, dout)
    dq, dk, dv = (x.swapaxes(1, 2) for x in (dq, dk, dv))
    return _typed(arrays, tuple(Arrays(dq, dk, dv, sinks=dsinks)))


def _typed(arrays: Arrays, made: Any) -> Any:
    """What a kernel made, which says nothing of the devices that it varies between, typed as what it was made of."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return made
    return jax.tree.map(lambda x: varying(x, arrays.q), made)

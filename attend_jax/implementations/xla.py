"""jax.nn.dot_product_attention in its XLA form, on every platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attend_jax.arrays import allowed, hide
from attend_shared.call import Arrays, Call

FEW = 32  # keys, up to which XLA on a CPU may make one loop of all of it (8 do, 16 do not)


def unavailable() -> str | None:
    """None: every JAX that Flax works with has it."""
    return None


def refusal(call: Call) -> str | None:
    """Why jax.nn cannot serve this call in its XLA form, or None."""
    if reason := jax_nn_refusal(call):
        return reason
    if call.dtype == "float16" and (call.platform == "cpu" or min(call.i, call.j) == 1):
        return "XLA has not all of the float16 products that it asks for: none on a CPU, none with a vector on a GPU"
    if call.bias_dtype is not None and call.bias_dtype != call.dtype != "float32":
        return f"its gradient of a {call.bias_dtype} bias would be rounded to {call.dtype}"
    if call.dtype != "float32" and jax.config.jax_numpy_dtype_promotion == "strict":  # type: ignore[attr-defined]
        return f"its gradients of {call.dtype} break under strict dtype promotion"
    return None


def jax_nn_refusal(call: Call) -> str | None:
    """What jax.nn cannot do in either form."""
    if call.return_lse:
        return "it has no differentiable lse"
    if call.softcap is not None:
        return "it has no softcap"
    if call.sinks is not None:
        return "it has no sinks"
    if call.dropout:
        return "it has no dropout"
    if call.dv != call.d:
        return "it needs dv == d"
    if call.dtype == "float64":
        return "it takes the softmax of float64 in float32"
    if call.is_empty:
        return "it averages padding where there is no key"
    return None


def is_aligned(call: Call) -> bool:
    """Whether jax.nn's is_causal and local_window_size say what the call says: they are top-left."""
    return call.offset == "zero"


def attend(call: Call, arrays: Arrays) -> tuple[jax.Array, None]:
    """out (b h i dv); there is no lse.

    Where a mask rules out a whole row jax.nn averages v, so such rows are found and zeroed here; with a bias its
    finite fill could be outranked by a bias of that size, so there everything becomes a bias of -inf.
    """
    options: dict = {}
    arrays = hide(call, arrays)
    plain = call.mask is None and arrays.bias is None and not (call.segments or call.q_lengths or call.kv_lengths)
    if plain and is_aligned(call) and call.right == 0 and call.left is None:
        options["is_causal"] = True
        may = None
    else:
        may = allowed(call, arrays)
    alive = None
    if may is not None:
        alive = may.any(-1, keepdims=True)  # (b|1, h|1, i|1, 1)
        if arrays.bias is None:
            options["mask"] = may
        else:
            bias = jnp.where(may, arrays.bias.astype(jnp.float32), 0)
            options["bias"] = jnp.where(may | ~alive, bias, -jnp.inf)
    q, k, v, scale = *arrays[:3], call.scale
    if call.j <= FEW:  # in one loop, logits less the largest are not rounded as it is: 0 / 0 where they are huge
        q, k, v, scale = q.astype(jnp.float32) * scale, k.astype(jnp.float32), v.astype(jnp.float32), 1.0
    # Settings of this trace: float32 products in full; and jax.nn widens float16 by itself, which strict mode forbids.
    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        out = jax.nn.dot_product_attention(
            *(x.swapaxes(1, 2) for x in (q, k, v)), scale=scale, implementation="xla", **options
        )
        out = out.swapaxes(1, 2).astype(call.dtype)
    return (out if alive is None else jnp.where(alive, out, 0)), None

"""jax.nn.dot_product_attention in its cuDNN form, on NVIDIA GPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attend_jax.arrays import hide, indices
from attend_jax.implementations import xla
from attend_shared.call import Arrays, Call


def unavailable() -> str | None:
    """A reason where JAX runs on no NVIDIA GPU."""
    if jax.default_backend() != "gpu":
        return f"it needs an NVIDIA GPU, and JAX runs on {jax.default_backend()}"
    return None


def refusal(call: Call) -> str | None:
    """Why cuDNN cannot serve this call, or None."""
    if reason := xla.jax_nn_refusal(call):
        return reason
    if call.dtype not in ("float16", "bfloat16"):
        return f"it takes float16 and bfloat16, not {call.dtype}"
    if call.d % 8 or call.d > 128:
        return f"it takes head sizes that are multiples of 8 up to 128, not {call.d}"
    if call.j % 2:
        return "jax.nn has no gradient of it where kv_len is odd"
    if call.mask is not None:
        return "its rows that may attend to nothing are not 0, and its gradients beside them are wrong"
    if call.bias is not None:
        return "a bias of -inf is not exactly no key there"
    if call.segments:
        return "segments would become a q_len x kv_len mask"
    if call.scale <= 0:
        return "it fills what is ruled out, and what is behind the last key, before it scales, which takes a scale > 0"
    if call.positional and not xla.is_aligned(call):
        return "its causal and window are top-left, so a q_offset other than 0 would need a mask"
    if call.left is not None and call.right != 0:
        return "it has a left window only beside causal"
    if call.right not in (None, 0):
        return "it has no right window"
    if call.left is not None and (call.q_lengths or call.kv_lengths or call.i > call.j):
        return "a window with lengths can leave rows without a key, which are not 0 there"
    return None


def attend(call: Call, arrays: Arrays) -> tuple[jax.Array, None]:
    """out (b h i dv); there is no lse. Rows without a key can only come from lengths here, and are zeroed.

    jax.nn refuses the gradient of an odd number of queries, too: they get one more, which is dropped.
    """
    arrays = hide(call, arrays)
    query, _ = indices(call)
    options: dict = {"is_causal": call.right == 0}
    if call.left is not None:
        options["local_window_size"] = (call.left, 0)
    alive = None
    if call.q_lengths:
        options["query_seq_lengths"] = jnp.clip(arrays.q_lengths, 0, call.i)
        alive = query < arrays.q_lengths[:, None]  # (b, i)
    if call.kv_lengths:
        options["key_value_seq_lengths"] = jnp.clip(arrays.kv_lengths, 0, call.j)
        some = arrays.kv_lengths[:, None] > 0  # (b, 1)
        alive = some if alive is None else alive & some
    q = jnp.pad(arrays.q, ((0, 0), (0, 0), (0, call.i % 2), (0, 0))) if call.i % 2 else arrays.q
    out = jax.nn.dot_product_attention(
        *(x.swapaxes(1, 2) for x in (q, *arrays[1:3])), scale=call.scale, implementation="cudnn", **options
    ).swapaxes(1, 2)[:, :, : call.i]
    return (out if alive is None else jnp.where(alive[:, None, :, None], out, 0)), None

"""torch.nn.functional.scaled_dot_product_attention: flash, efficient, cuDNN or math, as torch chooses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from attend_shared.call import Arrays, Call

from attend_torch.arrays import allowed, hide, hide_rows


def unavailable() -> str | None:
    """None: torch 2.5 and later have it, grouped heads included."""
    return None


def refusal(call: Call) -> str | None:
    """Why torch's attention cannot serve this call, or None."""
    if call.return_lse:
        return "it has no differentiable lse"
    if call.softcap is not None:
        return "it has no softcap"
    if call.sinks is not None:
        return "it has no sinks"
    if call.dropout:
        return "its dropout draws from torch's generator, not from dropout_seed"
    if call.bias_dtype is not None and call.bias_dtype != call.dtype:
        return f"it adds a bias in q's dtype, and a {call.bias_dtype} bias would be rounded to {call.dtype}"
    if call.is_empty:
        return "some of its kernels take no empty arrays"
    if call.flash:
        return _quadratic(call)
    return None


def _quadratic(call: Call) -> str | None:
    """Why a q_len x kv_len array would be made, or None."""
    if _needs_mask(call) and (call.positional or call.segments or call.q_lengths):
        return "positions, segments or q_lengths would become a q_len x kv_len mask"
    if call.mask is not None and (call.bias is not None or call.platform == "cuda") and call.mask[2] * call.mask[3] > call.j:
        return "mask would become a second array of its size"
    if call.bias_gradient:
        return "a bias that needs a gradient takes torch's math path"
    if call.dv != call.d:
        return "dv != d takes torch's math path"
    if call.platform == "cuda" and call.dtype == "float64":
        return "float64 takes torch's math path on a GPU"
    return None


def _is_causal(call: Call) -> bool:
    """Whether is_causal says it all: torch aligns it top-left, and gives NaN with it at scale <= 0."""
    return (
        call.right == 0 and call.left is None and call.offset == "zero" and call.scale > 0
        and call.mask is None and call.bias is None
        and not (call.segments or call.q_lengths or call.kv_lengths)
    )  # fmt: skip


def _needs_mask(call: Call) -> bool:
    return (call.masked or call.bias is not None) and not _is_causal(call)


def attend(call: Call, arrays: Arrays) -> tuple[torch.Tensor, None]:
    """out (b h i dv); there is no lse."""
    mask = None
    if needs_mask := _needs_mask(call):
        arrays = hide(call, arrays)
        mask = _mask(call, arrays)
    causal = call.right == 0 and not needs_mask
    out = F.scaled_dot_product_attention(
        arrays.q, arrays.k, arrays.v, mask, is_causal=causal, scale=call.scale, enable_gqa=call.h != call.hk
    )
    return hide_rows(call, arrays, out) if call.q_lengths else out, None


def _mask(call: Call, arrays: Arrays) -> torch.Tensor | None:
    """What torch calls attn_mask: bool on a CPU; additive with a bias, and on a GPU.

    On a GPU a boolean mask is not safe: cuDNN gives rows that may attend to nothing ordinary-looking numbers, and
    their neighbours wrong gradients. An additive one is right in every kernel.
    """
    if arrays.bias is None:
        may = allowed(call, arrays)
        if may is None or call.platform != "cuda":
            return may
        return torch.zeros((), dtype=arrays.q.dtype, device=may.device).where(may, -torch.inf)
    if not call.masked:
        return arrays.bias
    may = allowed(call, arrays._replace(bias=None))
    return torch.where(may, arrays.bias, -torch.inf)

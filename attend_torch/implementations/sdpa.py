"""torch.nn.functional.scaled_dot_product_attention: flash, efficient, cuDNN or math, as torch chooses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

from attend_shared.call import Arrays, Call
from attend_torch.arrays import allowed, hide, hide_rows
from attend_torch.implementations import blockwise

FULL = ("float32", "float64")


def _scales_factors() -> bool:
    """Whether this processor's matrix products multiply a factor by alpha, and round it, ahead of the product.

    torch's fused kernel on a CPU multiplies products by the scale on the way forward, and has it as alpha on the way
    back, where it makes p = exp(s - lse) again: of logits that are rounded otherwise, p no longer has the sum 1, and
    gradients miss the error budget. MKL does so on AMD's processors.
    """
    with _disable_current_modes(), torch.no_grad():
        x = torch.arange(1.0, 257, dtype=torch.float32, device="cpu").sqrt().reshape(16, 16)
        scaled = torch.addmm(torch.zeros_like(x), x, x.T, beta=0, alpha=1 / 3)
        return not torch.equal(scaled, (x @ x.T) * (1 / 3))


SCALES_FACTORS = _scales_factors()


def _differs(call: Call) -> bool:
    """Whether torch's gradients would be of other logits than its output, or a sum of differences that should be 0.

    With one key, dp is delta; torch's differ in their last bits, and dk sums that over the queries.
    """
    exact = abs(math.frexp(call.scale)[0]) in (0, 0.5)  # a power of two rounds nothing
    differs = call.j == 1 or (SCALES_FACTORS and not exact)
    return bool(differs) and call.platform == "cpu" and call.gradient and call.dtype in FULL


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
    if call.platform == "cuda" and call.scale <= 0:
        return "its kernels on a GPU fill what is behind the last key before they scale, which takes a scale > 0"
    if call.platform == "cuda" and call.dtype == "float32":
        return "its float32 products on a GPU are put together from shorter ones, and miss the error budget"
    if call.biased_gradient and (call.platform == "cuda" or not call.bias_gradient):
        return "its backward makes the weights from lse, in which a row of large biases drowns the sum"
    if call.flash:
        return _quadratic(call)
    return None


def _quadratic(call: Call) -> str | None:
    """Why a q_len x kv_len array would be made, or None."""
    if _needs_mask(call):
        by_row = call.positional or call.segments or call.q_lengths
        by_row = by_row or any(x is not None and x[2] > 1 for x in (call.mask, call.bias))
        as_it_is = call.bias is not None and not call.masked and call.platform == "cpu"
        if by_row and not as_it_is:
            return "what the call rules out would become a q_len x kv_len mask"
    if call.bias_gradient:
        return "a bias that needs a gradient takes torch's math path"
    if call.dv != call.d:
        return "dv != d takes torch's math path"
    if call.platform == "cuda" and call.dtype == "float64":
        return "float64 takes torch's math path on a GPU"
    return None


def makes_mask(call: Call) -> bool:
    """Whether positions, segments or lengths would become a q_len x kv_len mask that the caller did not pass."""
    by_row = call.positional or call.segments or call.q_lengths
    given = any(x is not None and x[2] > 1 for x in (call.mask, call.bias))
    return bool(by_row) and not given and _needs_mask(call)


def is_quadratic(call: Call) -> bool:
    """Whether torch takes its math path on a CPU, whose every array of logits goes through memory."""
    return call.platform == "cpu" and (call.bias_gradient or call.dv != call.d)


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
    if _differs(call):
        return blockwise.attend(call, arrays)[0], None
    mask = None
    if needs_mask := _needs_mask(call):
        arrays = hide(call, arrays)
        mask = _mask(call, arrays)
        if mask is not None and arrays.bias is None and call.platform == "cpu" and call.gradient and call.dtype in FULL:
            arrays = _without_lone(call, arrays, mask)
    causal = call.right == 0 and not needs_mask
    out = F.scaled_dot_product_attention(
        arrays.q, arrays.k, arrays.v, mask, is_causal=causal, scale=call.scale, enable_gqa=_grouped(call)
    )
    return hide_rows(call, arrays, out) if call.q_lengths else out, None


def _without_lone(call: Call, arrays: Arrays, mask: torch.Tensor) -> Arrays:
    """With 0 for the queries that see one key alone, on whose logit nothing depends; NaN stays.

    Their dp is delta, of which torch's kernel leaves the last bits: dk sums these, over the queries.
    """
    keys = mask.sum(-1, keepdim=True) * (1 if mask.shape[-1] == call.j else call.j)  # (b|1, h|1, i|1, 1)
    return arrays._replace(q=arrays.q * (keys != 1))


def _grouped(call: Call) -> bool:
    """Whether heads are grouped; where sizes are dynamic or traced, a comparison alone is no bool."""
    return True if call.h != call.hk else False  # noqa: SIM210


def plain(call: Call) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """(q, k, v) -> out, all in the caller's layout, for calls of nothing else; None where they need a mask."""
    if _needs_mask(call) or _differs(call):
        return None
    said = {"is_causal": call.right == 0, "scale": call.scale, "enable_gqa": _grouped(call)}
    usual = {"is_causal": False, "scale": 1 / math.sqrt(call.d), "enable_gqa": False}
    options: Any = {name: value for name, value in said.items() if value != usual[name]}  # each takes time to read

    def result(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options)

    if call.layout == "bhnd":
        return result
    return lambda q, k, v: result(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


attend.plain = plain  # type: ignore[attr-defined]


def _mask(call: Call, arrays: Arrays) -> torch.Tensor | None:
    """What torch calls attn_mask: bool on a CPU; additive with a bias, and on a GPU.

    On a GPU a boolean mask is not safe: cuDNN gives rows that may attend to nothing ordinary-looking numbers, and
    their neighbours wrong gradients. An additive one is right in every kernel, if its last axis is laid out.
    """
    gpu = call.platform == "cuda"
    bias = arrays.bias
    if bias is not None and gpu:
        bias = _within_reach(bias)
    may = allowed(call, arrays._replace(bias=None))
    if bias is None:
        if may is None or not gpu:
            return may
        mask = torch.zeros((), dtype=arrays.q.dtype, device=may.device).where(may, -torch.inf)
    else:
        mask = bias if may is None else torch.where(may, bias, -torch.inf)
    if gpu and mask.shape[-1] != call.j:
        mask = mask.expand(*mask.shape[:-1], call.j).contiguous()
    return mask


def _within_reach(bias: torch.Tensor) -> torch.Tensor:
    """The bias with what is finite and lower than -1e38 halved; its gradient is that of the bias.

    Kernels take the softmax to base 2, and log2(e) times finfo.min is -inf: a row of finite, very low scores would
    come out empty where the formula gives it a mean.
    """
    if bias.dtype == torch.float16:
        return bias
    low = (bias < -1e38) & (bias != -torch.inf)
    return torch.where(low, (bias * 0.5).detach() + (bias - bias.detach()), bias)

"""FlashAttention-4's CuTe kernels, from the package flash-attn-4, on Hopper GPUs.

What they take, and how a call is put to them, is `attend_shared.flash`. A kernel is compiled when a call first needs
it, for some seconds; lengths are no part of a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from attend_shared import flash, meaning
from attend_shared.call import Arrays, Call
from attend_torch.arrays import hide, indices, is_traced, is_watched, needs_gradients
from attend_torch.implementations import einsum, rowwise

Tensor = torch.Tensor
PACKAGE = flash.FLASH_ATTN_4
MISSING = flash.missing(PACKAGE)  # once: a compiler cannot follow what reads the metadata of packages


def unavailable() -> str | None:
    """Why the kernels cannot run here, or None."""
    if MISSING:
        return MISSING
    if not torch.cuda.is_available():
        return "it needs an NVIDIA GPU"
    return flash.wrong_device(torch.cuda.get_device_capability())


def refusal(call: Call) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    if call.platform != "cuda":
        return "it runs on an NVIDIA GPU"
    return flash.refusal(call, PACKAGE)


def attend(call: Call, arrays: Arrays) -> tuple[Tensor, Tensor]:
    """out (b h i dv) in q's dtype, and lse (b h i) in float32. Differentiable once, in reverse."""
    if call.is_empty:
        return einsum.attend(call, arrays)
    if not call.segments:  # where ids are the same in q and k they hide nothing
        arrays = hide(call, arrays)  # a tile of keys is loaded whole, and its weights of 0 do not keep a NaN out
    lengths = zip(flash.counted(call), (arrays.q_lengths, arrays.kv_lengths), (call.i, call.j), strict=True)
    q_used, kv_used = (flash.used(x, n).int() if given else None for given, x, n in lengths)
    size = flash.size(call, PACKAGE)
    starts = arrays.q_segment_ids  # of runs: what the door makes of ids
    inputs = (*(_padded(x, size) for x in arrays[:3]), arrays.sinks, q_used, kv_used, starts)
    options = (*flash.window(call), call.scale, call.softcap, call.layout == "bnhd")
    if is_traced(arrays.q):  # what looks on takes the operator whole
        out, lse = torch.ops.attend_torch.fa4(*inputs, *options)
    elif is_watched() or needs_gradients(arrays):
        out, lse = _Attend.apply(options, *inputs)
    else:  # a Function looks its signature up each time it is called
        out, lse = _forward(inputs, *options)
    if size != call.dv:
        out = out[..., : call.dv]
    return _empty(call, arrays, out, lse) if call.q_lengths else (out, lse)


def _padded(x: Tensor, size: int) -> Tensor:
    """x (b h n d), with zeros behind it up to the size."""
    return x if x.shape[3] == size else F.pad(x, (0, size - x.shape[3]))


def _empty(call: Call, arrays: Arrays, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that q_lengths empties, which the kernels do not write."""
    rows: Any = meaning.dead_queries(call, arrays, indices(call, arrays)[0])
    nothing: Any = -torch.inf
    if (sinks := arrays.sinks) is not None:  # the cotangent of an lse of -inf is no sink's
        nothing = torch.where(sinks == -torch.inf, sinks.detach(), sinks).to(lse.dtype)[:, None]
    return torch.where(rows[:, None, :, None], 0, out), torch.where(rows[:, None], nothing, lse)


INPUTS = ("q", "k", "v", "sinks", "q_lengths", "kv_lengths", "starts")


class _Attend(torch.autograd.Function):
    """(options, *inputs) -> out, lse."""

    @staticmethod
    def forward(options: tuple, *inputs: Any) -> tuple[Tensor, Tensor]:
        return _forward(inputs, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.options = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:], *output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
        dout = torch.zeros_like(ctx.saved_tensors[-2]) if dout is None else dout
        dq, dk, dv, dsinks = _Gradients.apply(ctx.options, *ctx.saved_tensors, dout, dlse)
        return None, dq, dk, dv, dsinks if ctx.needs_input_grad[4] else None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        return rowwise.each_lane(_Attend.apply, info, in_dims, inputs)


def _forward(
    inputs: Sequence[Any], left: int | None, right: int | None, scale: float, softcap: float | None, bnhd: bool
) -> tuple[Tensor, Tensor]:
    """out (b h i dv), lying as the caller's q does, and lse (b h i)."""
    from flash_attn.cute import interface

    q, k, v, sinks, q_used, kv_used, starts = inputs
    out = _made(q, v, bnhd)
    with torch.cuda.device_of(q):
        lse = interface._flash_attn_fwd(
            *(_laid(x.detach(), starts) for x in (q, k, v)), cu_seqlens_q=starts, cu_seqlens_k=starts, seqused_q=q_used,
            seqused_k=kv_used, softmax_scale=scale, softcap=softcap, window_size_left=left, window_size_right=right,
            learnable_sink=None if sinks is None else sinks.detach(), return_lse=True, out=_laid(out, starts),
        )[1]  # fmt: skip
    return out, lse if starts is None else lse.unsqueeze(0)


def _laid(x: Tensor, starts: Tensor | None) -> Tensor:
    """x (b h n d) as (b n h d), or (n h d) where it goes as packed sequences."""
    return x.transpose(1, 2) if starts is None else x.squeeze(0).transpose(0, 1)


def _made(q: Tensor, v: Tensor, bnhd: bool) -> Tensor:
    """Memory for out (b h i dv), in the caller's layout."""
    b, h, i, _ = q.shape
    return q.new_empty(b, i, h, v.shape[3]).transpose(1, 2) if bnhd else q.new_empty(b, h, i, v.shape[3])


def _gradients(
    inputs: Sequence[Any], left: int | None, right: int | None, scale: float, softcap: float | None, bnhd: bool
) -> tuple[Tensor, ...]:
    """dq, dk, dv as q, k, v lie, and dsinks, of shape (0,) where there are none."""
    from flash_attn.cute import interface

    q, k, v, sinks, q_used, kv_used, starts, out, lse, dout, dlse = inputs
    if dlse is not None:  # that of an lse of -inf counts for nothing
        dlse = torch.where(lse == -torch.inf, 0, dlse)
    if starts is not None:
        lse, dlse = lse.squeeze(0), None if dlse is None else dlse.squeeze(0)
    with torch.cuda.device_of(q):
        gradients = interface._flash_attn_bwd(
            *(_laid(x.detach(), starts) for x in (q, k, v, out, dout)), lse, scale, softcap=softcap or 0.0,
            window_size_left=left, window_size_right=right, cu_seqlens_q=starts, cu_seqlens_k=starts,
            seqused_q=q_used, seqused_k=kv_used,
            deterministic=torch.are_deterministic_algorithms_enabled(), dlse=dlse,
            learnable_sink=None if sinks is None else sinks.detach(),
        )  # fmt: skip
    found = gradients[:3] if starts is None else [x.unsqueeze(0) for x in gradients[:3]]
    dq, dk, dv = (x.transpose(1, 2) for x in found)
    return dq, dk, dv, q.new_empty(0) if sinks is None else gradients[3]


_Gradients = rowwise.first_only("fa4", lambda options, *inputs: _gradients(inputs, *options))


# The operators, for compilers: fa4(*inputs, *options), and fa4_gradients(*inputs, out, lse, dout, dlse, *options).


def _operator(*given: Any) -> tuple[Tensor, Tensor]:
    return _forward(given[: len(INPUTS)], *given[len(INPUTS) :])


def _operator_fake(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    return _made(q, v, given[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _operator_gradients(*given: Any) -> tuple[Tensor, ...]:
    behind = len(INPUTS) + 4
    return _gradients(given[:behind], *given[behind:])


def _operator_gradients_fake(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    like = (torch.empty_like(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))
    return *like, q.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.options = inputs[len(INPUTS) :]
    ctx.save_for_backward(*inputs[: len(INPUTS)], *output)


def _derive(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple:
    gradients = torch.ops.attend_torch.fa4_gradients(*ctx.saved_tensors, dout, dlse, *ctx.options)
    found = [x if wanted else None for x, wanted in zip(gradients, ctx.needs_input_grad, strict=False)]
    return (*found, *(None for _ in range(3 + len(ctx.options))))


_ARRAYS = "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? q_lengths, Tensor? kv_lengths, Tensor? starts"
_OPTIONS = "SymInt? left, SymInt? right, float scale, float? softcap, bool bnhd"
_LIBRARY = torch.library.Library("attend_torch", "FRAGMENT")
_LIBRARY.define(f"fa4({_ARRAYS}, {_OPTIONS}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"fa4_gradients({_ARRAYS}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
for _name, _function, _fake in (
    ("fa4", _operator, _operator_fake),
    ("fa4_gradients", _operator_gradients, _operator_gradients_fake),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attend_torch::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("attend_torch::fa4", _derive, setup_context=_keep, lib=_LIBRARY)

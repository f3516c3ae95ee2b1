"""FlashAttention-4's CuTe kernels, from the package flash-attn-4, on Hopper GPUs.

What they take, and how a call is put to them, is `attend_shared.flash`. A kernel is compiled when a call first needs
it, for some seconds; lengths are no part of a kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from attend_shared import flash, meaning
from attend_shared.call import Arrays, Call
from attend_shared.kernels import of_sinks
from attend_torch import launches
from attend_torch.arrays import hide, indices, is_traced, is_watched, needs_gradients
from attend_torch.implementations import einsum, rowwise, triton
from attend_torch.machine import capability
from attend_torch.tape import Tapes

Tensor = torch.Tensor
PACKAGE = flash.FLASH_ATTN_4
FUNCTIONS = "flash_attn.cute.interface"
MISSING = flash.missing(PACKAGE)  # once: a compiler cannot follow what reads the metadata of packages


def unavailable() -> str | None:
    """Why the kernels cannot run here, or None."""
    return MISSING or _wrong_device(capability())


@cache
def _wrong_device(found: str) -> str | None:
    return flash.wrong_device(tuple(map(int, found.split(".")))) if found else "it needs an NVIDIA GPU"


_wrong_device._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in attend_torch.attend


def refusal(call: Call) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    if call.platform != "cuda":
        return "it runs on an NVIDIA GPU"
    return flash.refusal(call, PACKAGE, triton.missing)


def attend(call: Call, arrays: Arrays) -> tuple[Tensor, Tensor]:
    """out (b h i dv) in q's dtype, and lse (b h i) in float32. Differentiable once, in reverse."""
    if call.is_empty:
        return einsum.attend(call, arrays)
    if not call.segments:  # where ids are the same in q and k they hide nothing
        arrays = hide(call, arrays)  # a tile of keys is loaded whole, and its weights of 0 do not keep a NaN out
    traced = is_traced(arrays.q)
    size, of_q, of_kv, options = _put(call) if traced else _remembered(call)
    q, k, v, *_ = arrays
    if not call.d == call.dv == size:
        q, k, v = _padded(q, size), _padded(k, size), _padded(v, size)
    q_used = flash.used(arrays.q_lengths, call.i).int() if of_q else None
    kv_used = flash.used(arrays.kv_lengths, call.j).int() if of_kv else None
    inputs = (q, k, v, arrays.sinks, q_used, kv_used, arrays.q_segment_ids)  # starts of runs, by the door
    if traced:  # what looks on takes the operator whole
        out, lse = torch.ops.attend_torch.fa4(*inputs, *options)
    elif is_watched():
        out, lse = _Attend.apply(options, *inputs)
    elif needs_gradients(arrays):
        out, lse = _Eager.apply(call, options, *inputs)
    else:
        out, lse = _forward(inputs, options, call)
    if size != call.dv:
        out = out[..., : call.dv]
    return _empty(call, arrays, out, lse) if call.q_lengths else (out, lse)


class _Put(NamedTuple):
    """How a call is put to the package.

    Attributes:
        size: of heads.
        of_q, of_kv: whether the kernel heeds q_lengths and kv_lengths.
        options: left and right as the package counts, scale, softcap, and whether the layout is "bnhd".
    """

    size: int
    of_q: bool
    of_kv: bool
    options: tuple[int | None, int | None, float, float | None, bool]


def _put(call: Call) -> _Put:
    options = (*flash.window(call), call.scale, call.softcap, call.layout == "bnhd")
    return _Put(flash.size(call, PACKAGE), *flash.counted(call), options)


_remembered = lru_cache(maxsize=1024)(_put)


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


class _Eager(torch.autograd.Function):
    """(call, options, *inputs) -> out, lse. For no transformation: those that serve one cost more with each call."""

    @staticmethod
    def forward(ctx: Any, call: Call, options: tuple, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(inputs, options, call)
        ctx.call = call
        _keep(ctx, options, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
        inputs = ctx.saved_tensors
        if dout is None or torch.is_grad_enabled() or is_watched() or is_traced(dout):
            return None, *_way_back(ctx, inputs, dout, dlse)
        wants_sinks = ctx.needs_input_grad[2 + INPUTS.index("sinks")]
        return None, None, *_gradients((*inputs, dout, dlse), ctx.options, ctx.call, wants_sinks), None, None, None


class _Attend(torch.autograd.Function):
    """The same, for transformations."""

    @staticmethod
    def forward(options: tuple, *inputs: Any) -> tuple[Tensor, Tensor]:
        return _forward(inputs, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _keep(ctx, inputs[0], inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
        return _way_back(ctx, ctx.saved_tensors, dout, dlse)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        return rowwise.each_lane(_Attend.apply, info, in_dims, inputs)


def _keep(ctx: Any, options: tuple, inputs: tuple, output: tuple) -> None:
    ctx.options = options
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _way_back(ctx: Any, inputs: tuple, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    dout = torch.zeros_like(inputs[-2]) if dout is None else dout
    dq, dk, dv, dsinks = _Gradients.apply(ctx.options, *inputs, dout, dlse)
    return None, dq, dk, dv, dsinks if inputs[3] is not None else None, None, None, None


def _forward(inputs: Sequence[Any], options: tuple, call: Call | None = None) -> tuple[Tensor, Tensor]:
    """out (b h i dv), lying as the caller's q does, and lse (b h i).

    Args:
        inputs: of `INPUTS`.
        options: as in `_Put`.
        call: where nothing looks on.
    """
    starts = inputs[6]
    alike = None if call is None else call if starts is None else (call, starts.shape)
    return _launched(_FORWARD, _interface()._flash_attn_fwd, inputs, options, alike)


def _interface() -> Any:
    """The package's functions; an import statement would take longer, of a module that is there."""
    return sys.modules.get(FUNCTIONS) or import_module(FUNCTIONS)


def _launched(tapes: Tapes, function: Any, arrays: Sequence[Any], options: tuple, alike: Any) -> Any:
    """What the package's function gives, by a tape where nothing looks on. alike: as in `Tapes`, or None."""
    if alike is None:
        if is_watched() or is_traced(arrays[0]):
            with torch.cuda.device_of(arrays[0]):
                return tapes.call(function, arrays, options)
        alike = (options, *(None if x is None else (x.dtype, x.shape) for x in arrays))
    return tapes(function, arrays, options, alike)


def _called(function: Any, arrays: Sequence[Any], options: tuple) -> tuple[Tensor, Tensor]:
    q, k, v, sinks, q_used, kv_used, starts = arrays
    left, right, scale, softcap, bnhd = options
    out = _made(q, v, bnhd)
    lse = function(
        _laid(q, starts), _laid(k, starts), _laid(v, starts), cu_seqlens_q=starts, cu_seqlens_k=starts,
        seqused_q=q_used, seqused_k=kv_used, softmax_scale=scale, softcap=softcap, window_size_left=left,
        window_size_right=right, learnable_sink=None if sinks is None else sinks.detach(), return_lse=True,
        out=_laid(out, starts),
    )[1]  # fmt: skip
    return out, lse if starts is None else lse.unsqueeze(0)


_FORWARD = Tapes(_called)


def _laid(x: Tensor, starts: Tensor | None) -> Tensor:
    """x (b h n d) as (b n h d), or (n h d) where it goes as packed sequences; without a gradient."""
    x = x.transpose(1, 2) if starts is None else x.squeeze(0).transpose(0, 1)
    return x.detach() if x.requires_grad else x


def _made(q: Tensor, v: Tensor, bnhd: bool) -> Tensor:
    """Memory for out (b h i dv), in the caller's layout."""
    b, h, i, _ = q.shape
    return q.new_empty(b, i, h, v.shape[3]).transpose(1, 2) if bnhd else q.new_empty(b, h, i, v.shape[3])


def _gradients(
    inputs: Sequence[Any], options: tuple, call: Call | None = None, wants_sinks: bool = True
) -> tuple[Tensor | None, ...]:
    """dq, dk, dv as q, k, v lie, and dsinks, or None. inputs: of `INPUTS`, then out, lse, dout, dlse.

    The package's own dsinks is made of the rounded out alone, which is too coarse where few rows count.
    """
    starts, lse, dout, dlse = inputs[6], *inputs[8:11]
    if dlse is not None:  # that of an lse of -inf counts for nothing
        dlse = torch.where(lse == -torch.inf, 0, dlse)
    inputs = (*inputs[:9], dout.resolve_neg(), dlse)
    deterministic = torch.are_deterministic_algorithms_enabled()
    alike = None if call is None else (call, deterministic, dlse is None, None if starts is None else starts.shape)
    without = (*inputs[:3], None, *inputs[4:])
    found = _launched(_BACKWARD, _interface()._flash_attn_bwd, without, (*options, deterministic), alike)
    return *found, _dsinks(inputs, options) if inputs[3] is not None and wants_sinks else None


def _dsinks(inputs: Sequence[Any], options: tuple) -> Tensor:
    """inputs: as in `_gradients`."""
    q, k, v, sinks, q_used, kv_used, starts, out, lse, dout, dlse = inputs
    left, right, scale, softcap, _ = options
    known = {"q": q, "k": k, "v": v, "out": out, "dout": dout}
    for name, x in known.items():
        known[name] = x if x.stride(3) == 1 else x.contiguous()
    strides = [x.stride()[:3] for x in known.values()]
    b, h, i, d = q.shape
    rows = of_sinks.Rows(
        b, h, k.shape[1], i, k.shape[2], d, left, right, scale, softcap, q_used is not None, kv_used is not None,
        dlse is not None, 0 if starts is None else len(starts), str(sinks.dtype).split(".")[1],
    )  # fmt: skip
    more = {"lse": lse, "dlse": dlse, "sinks": sinks, "q_lengths": q_used, "kv_lengths": kv_used, "starts": starts}
    known |= {name: x.contiguous() for name, x in more.items() if x is not None}
    launches.run(_kernels(rows, *strides), known)
    return known["dsinks"]


@lru_cache(maxsize=1024)
def _kernels(rows: of_sinks.Rows, *strides: tuple[int, ...]) -> launches.Kernels:
    return launches.Kernels(of_sinks.launches(rows, *strides))


def _called_back(function: Any, arrays: Sequence[Any], options: tuple) -> tuple[Tensor | None, ...]:
    q, k, v, _, q_used, kv_used, starts, out, lse, dout, dlse = arrays
    left, right, scale, softcap, _, deterministic = options
    if starts is not None:
        lse, dlse = lse.squeeze(0), None if dlse is None else dlse.squeeze(0)
    found = function(
        *(_laid(x, starts) for x in (q, k, v, out, dout)), lse, scale, softcap=softcap or 0.0, window_size_left=left,
        window_size_right=right, cu_seqlens_q=starts, cu_seqlens_k=starts, seqused_q=q_used, seqused_k=kv_used,
        deterministic=deterministic, dlse=dlse, learnable_sink=None,
    )  # fmt: skip
    return tuple((x if starts is None else x.unsqueeze(0)).transpose(1, 2) for x in found)


_BACKWARD = Tapes(_called_back)


def _whole(inputs: Sequence[Any], options: tuple) -> tuple[Tensor, ...]:
    """`_gradients`, dsinks of shape (0,) where there are none, for those who take arrays alone."""
    return tuple(inputs[0].new_empty(0) if x is None else x for x in _gradients(inputs, options))


_Gradients = rowwise.first_only("fa4", lambda options, *inputs: _whole(inputs, options))


# The operators, for compilers: fa4(*inputs, *options), and fa4_gradients(*inputs, out, lse, dout, dlse, *options).


def _operator(*given: Any) -> tuple[Tensor, Tensor]:
    return _forward(given[: len(INPUTS)], given[len(INPUTS) :])


def _operator_fake(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    return _made(q, v, given[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _operator_gradients(*given: Any) -> tuple[Tensor, ...]:
    behind = len(INPUTS) + 4
    return _whole(given[:behind], given[behind:])


def _operator_gradients_fake(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    like = (torch.empty_like(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))
    return *like, q.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _keep_operator(ctx: Any, inputs: tuple, output: tuple) -> None:
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
torch.library.register_autograd("attend_torch::fa4", _derive, setup_context=_keep_operator, lib=_LIBRARY)

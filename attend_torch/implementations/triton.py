"""One Triton kernel for every clause, launched here as it is in JAX: the same bits in both.

The kernels and what a call launches are `attend_shared.kernels`. Here are the memory, the launches and the operator
that a compiler takes whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch

from attend_shared import meaning
from attend_shared.call import Arrays, Call
from attend_shared.kernels import plan as plans
from attend_shared.kernels.plan import Launch, Layout, Plan
from attend_torch.implementations import blockwise, einsum, rowwise
from attend_torch.implementations.blockwise import COUNT, FLOATS

Tensor = torch.Tensor
INSTALLED = find_spec("triton") is not None


def unavailable() -> str | None:
    """Why Triton's kernels cannot run here, or None."""
    if not INSTALLED:
        return 'it needs Triton: pip install "attend-twin[triton]"'
    if plans.INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "it needs an NVIDIA GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs an NVIDIA GPU of compute capability 8.0 or later"
    return None


def refusal(call: Call) -> str | None:
    """Why Triton's kernels cannot serve this call, or None."""
    if call.platform != ("cpu" if plans.INTERPRETED else "cuda"):
        return "it runs on an NVIDIA GPU"
    return plans.refusal(call)


def attend(call: Call, arrays: Arrays) -> tuple[Tensor, Tensor]:
    """out (b h i dv) in q's dtype, and lse (b h i) in float32. Differentiable once, in reverse."""
    if call.is_empty:
        return einsum.attend(call, arrays)
    if torch.compiler.is_compiling():  # it takes the operator whole
        offset = _offset(call, arrays)
        arrays = arrays if isinstance(arrays.q_offset, Tensor) else arrays._replace(q_offset=None)
        options = call.left, call.right, offset, call.scale, call.softcap, call.dropout
        out, lse, *_ = torch.ops.attend_torch.triton(*arrays, *options)
    else:
        out, lse, *_ = _Attend.apply(call, *arrays)
    return out, lse


SAVED = ("out", "lse", "top", "inverse", "exact")


class _Attend(torch.autograd.Function):
    """(call, *arrays) -> out, lse, and what else the way back needs."""

    @staticmethod
    def forward(call: Call, *arrays: Any) -> tuple[Tensor, ...]:
        return _forward(call, Arrays(*arrays))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.call, *arrays = inputs
        ctx.others = [None if isinstance(x, Tensor) else x for x in arrays]
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in arrays), *output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: Any) -> tuple:
        given, saved = ctx.saved_tensors[:COUNT], ctx.saved_tensors[COUNT:]
        arrays = (x if other is None else other for x, other in zip(given, ctx.others, strict=True))
        dout = torch.zeros_like(saved[0]) if dout is None else dout
        wanted = ctx.needs_input_grad[1:]
        gradients = iter(_Gradients.apply(ctx.call, wanted, *arrays, *saved, dout, dlse))
        return None, *(next(gradients) if wants else None for wants in wanted)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        return rowwise.each_lane(_Attend.apply, info, in_dims, inputs)


class _Gradients(torch.autograd.Function):
    """(call, which are wanted, *arrays, *saved, dout, dlse) -> the gradients that are. It has none itself."""

    @staticmethod
    def forward(call: Call, wanted: Sequence[bool], *inputs: Any) -> tuple[Tensor, ...]:
        *saved, dout, dlse = inputs[COUNT:]
        gradients = _gradients(call, Arrays(*inputs[:COUNT]), saved, dout, dlse, wanted)
        return tuple(x for x in gradients if x is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "triton has first derivatives only; blockwise, rowwise and einsum have every derivative: "
            'implementation="blockwise".'
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        return rowwise.each_lane(_Gradients.apply, info, in_dims, inputs)


def _offset(call: Call, arrays: Arrays) -> int:
    """q_offset where it is a number."""
    if isinstance(arrays.q_offset, Tensor):
        return 0
    return meaning.offset_of(call, arrays)


def _rows(x: Tensor) -> Tensor:
    """x, its last axis contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, ...] | None:
    """Strides of what broadcasts: 0 along axes of size 1."""
    return None if x is None else tuple(0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))


def _prepare(call: Call, arrays: Arrays) -> tuple[Plan, dict[str, Tensor]]:
    """What the call launches, and its arrays by name."""
    arrays = arrays._replace(q=_rows(arrays.q), k=_rows(arrays.k), v=_rows(arrays.v))
    offset = arrays.q_offset.ndim + 1 if isinstance(arrays.q_offset, Tensor) and call.offset == "data" else 0
    q, k, v = (x.stride()[:3] for x in arrays[:3])
    layout = Layout(
        q, k, v, _strides(arrays.mask), _strides(arrays.bias), offset,
        0 if offset else _offset(call, arrays), arrays.q_segment_ids is arrays.kv_segment_ids,
    )  # fmt: skip
    names = ("q_segment_ids", "kv_segment_ids", "q_lengths", "kv_lengths", "sinks", "dropout_seed")
    contiguous = {name: x.contiguous() for name in names if isinstance(x := getattr(arrays, name), Tensor)}
    known = {name: x for name, x in arrays._asdict().items() if isinstance(x, Tensor)} | contiguous
    return plans.plan(call, layout), known


def _run(launches: Sequence[Launch], arrays: dict[str, Tensor]) -> None:
    """Run the launches in order, their outputs put among the arrays."""
    from attend_shared.kernels import attention

    nothing = arrays["q"]
    with _device(nothing):
        for launch in launches:
            made = [nothing.new_empty(shape, dtype=getattr(torch, dtype)) for _, shape, dtype in launch.outputs]
            given = [nothing if name is None else arrays[name] for name in launch.inputs]
            getattr(attention, launch.kernel)[launch.grid](
                *given, *launch.numbers, *made, **launch.constants, num_warps=launch.warps, num_stages=launch.stages
            )
            arrays.update(zip((output.name for output in launch.outputs), made, strict=True))


def _device(x: Tensor) -> AbstractContextManager:
    """The device of x made the current one, where it is not."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def _turned(call: Call, x: Tensor) -> Tensor:
    """(b h n d) of what lies as the caller laid it out, or the opposite."""
    return x.transpose(1, 2) if call.layout == "bnhd" else x


def _forward(call: Call, arrays: Arrays) -> tuple[Tensor, ...]:
    """out (b h i dv), and the others of `SAVED`."""
    plan, known = _prepare(call, arrays)
    _run(plan.forward, known)
    return _turned(call, known["out"]), *(known[name] for name in SAVED[1:])


def _gradients(
    call: Call, arrays: Arrays, saved: Sequence[Tensor], dout: Tensor, dlse: Tensor | None, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of the arrays, None for those that have none or are not wanted."""
    plan, known = _prepare(call, arrays)
    known |= zip(SAVED, saved, strict=True)
    known["out"], known["dout"] = _turned(call, known["out"]), _rows(dout)
    if dlse is not None:
        known["dlse"] = dlse.contiguous()
    _run(plan.backward(known["dout"].stride()[:3], wanted[FLOATS[3]], dlse is not None), known)
    gradients: list[Tensor | None] = [None] * COUNT
    for place in FLOATS:
        name = Arrays._fields[place]
        if wanted[place]:
            gradients[place] = _turned(call, known[f"d{name}"]) if name in "qkv" else known[f"d{name}"]
    return gradients


# The operators, for compilers: triton(*arrays, *options), and triton_gradients(*arrays, *saved, wants_bias, *options).


def _operator(*inputs: Any) -> tuple[Tensor, ...]:
    return _forward(*blockwise.canonical(inputs[:COUNT], *inputs[COUNT:]))


def _operator_fake(q: Tensor, _: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    data = Arrays(q, _, v, *rest[: COUNT - 3])
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    finer = q.dtype != torch.float32 and any(x is not None and x.dtype != q.dtype for x in (data.bias, data.sinks))
    exact = q.new_empty(out.shape if finer else (q.shape[0], 1), dtype=torch.float32)
    return out, *(q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(3)), exact


def _operator_gradients(*inputs: Any) -> tuple[Tensor, ...]:
    """dq, dk, dv, dbias and dsinks, the last two of shape (0,) where there are none or they are not wanted."""
    behind = COUNT + len(SAVED)
    saved, (dout, dlse, wants_bias) = inputs[COUNT:behind], inputs[behind : behind + 3]
    call, arrays = blockwise.canonical(inputs[:COUNT], *inputs[behind + 3 :])
    wanted = [x is not None for x in arrays]
    wanted[FLOATS[3]] = wants_bias
    gradients = _gradients(call, arrays, saved, dout, dlse, wanted)
    found = (gradients[place] for place in FLOATS)
    return tuple(dout.new_empty(0) if x is None else x for x in found)


def _operator_gradients_fake(*inputs: Any) -> tuple[Tensor, ...]:
    data, wants_bias = Arrays(*inputs[:COUNT]), inputs[COUNT + len(SAVED) + 2]
    nothing = data.q.new_empty(0)
    dbias = data.bias.new_empty(data.bias.shape) if wants_bias else nothing
    dsinks = nothing if data.sinks is None else data.sinks.new_empty(data.sinks.shape)
    return *(x.new_empty(x.shape) for x in data[:3]), dbias, dsinks


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.options = inputs[COUNT:]
    ctx.save_for_backward(*inputs[:COUNT], *output)


def _derive(ctx: Any, dout: Tensor, dlse: Tensor, *_: Any) -> tuple:
    wants_bias = ctx.needs_input_grad[FLOATS[3]]
    gradients = torch.ops.attend_torch.triton_gradients(*ctx.saved_tensors, dout, dlse, wants_bias, *ctx.options)
    result: list[Tensor | None] = [None] * (COUNT + len(ctx.options))
    for place, gradient in zip(FLOATS, gradients, strict=True):
        result[place] = gradient if ctx.needs_input_grad[place] else None
    return tuple(result)


_FIVE = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
_TENSORS = ", ".join(f"Tensor {name}" for name in (*SAVED, "dout", "dlse"))
_LIBRARY = torch.library.Library("attend_torch", "FRAGMENT")
_LIBRARY.define(f"triton({blockwise.ARRAYS}, {blockwise.OPTIONS}) -> {_FIVE}")
_LIBRARY.define(
    f"triton_gradients({blockwise.ARRAYS}, {_TENSORS}, bool wants_bias, {blockwise.OPTIONS}) -> {_FIVE}"
)
for _name, _function, _fake in (
    ("triton", _operator, _operator_fake),
    ("triton_gradients", _operator_gradients, _operator_gradients_fake),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attend_torch::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("attend_torch::triton", _derive, setup_context=_keep, lib=_LIBRARY)

"""One Triton kernel for every clause, launched here as it is in JAX: the same bits in both.

The kernels and what a call launches are `attend_shared.kernels`. Here are the memory, the launches and the operator
that a compiler takes whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch.autograd import forward_ad

from attend_shared import meaning
from attend_shared.call import Arrays, Call
from attend_shared.kernels import plan as plans
from attend_shared.kernels.plan import Launch, Layout
from attend_torch.arrays import is_traced
from attend_torch.implementations import blockwise, einsum, rowwise
from attend_torch.implementations.blockwise import COUNT, FLOATS
from attend_torch.machine import capability

Tensor = torch.Tensor
INSTALLED = find_spec("triton") is not None


def unavailable() -> str | None:
    """Why Triton's kernels cannot run here, or None."""
    return _unavailable()


unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in attend_torch.attend


@cache
def _unavailable() -> str | None:
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
    if is_traced(arrays.q):  # what looks on takes the operator whole
        offset = _offset(call, arrays)
        arrays = arrays if isinstance(arrays.q_offset, Tensor) else arrays._replace(q_offset=None)
        options = call.left, call.right, offset, call.scale, call.softcap, call.dropout
        out, lse, *_ = torch.ops.attend_torch.triton(*arrays, *options)
    elif _is_watched():
        out, lse, *_ = _Attend.apply(call, *arrays)
    elif torch.is_grad_enabled() and any(arrays[n] is not None and arrays[n].requires_grad for n in FLOATS):
        out, lse, *_ = _Eager.apply(call, *arrays)
    else:
        out, lse, *_ = _forward(call, arrays)
    return out, lse


def _is_watched() -> bool:
    """Whether a transformation looks on: lanes, tangents, gradients of functions."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


SAVED = ("out", "lse", "top", "inverse", "exact", *plans.BOUNDS)
COMPILED = len(SAVED) - len(plans.BOUNDS)  # of them are what the operator gives: the way back finds the bounds anew


class _Eager(torch.autograd.Function):
    """(call, *arrays) -> out, lse, and what else the way back needs.

    For no transformation: a Function that has them looks its signature up each time it is called.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, *arrays: Any) -> tuple[Tensor | None, ...]:
        output = _forward(call, Arrays(*arrays))
        _keep(ctx, (call, *arrays), output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: Any) -> tuple:
        tensors = ctx.saved_tensors
        given, saved = tensors[:COUNT], tensors[COUNT:]
        arrays = [x if other is None else other for x, other in zip(given, ctx.others, strict=True)]
        dout = torch.zeros_like(saved[0]) if dout is None else dout
        wanted = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or _is_watched():
            gradients = iter(_Gradients.apply(ctx.call, wanted, *arrays, *saved, dout, dlse))
            return None, *(next(gradients) if wants else None for wants in wanted)
        return None, *_gradients(ctx.call, Arrays(*arrays), saved, dout, dlse, wanted)


class _Attend(_Eager):
    """The same, for transformations."""

    @staticmethod
    def forward(call: Call, *arrays: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        return _whole(arrays[0], _forward(call, Arrays(*arrays)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _keep(ctx, inputs, output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        return rowwise.each_lane(_Attend.apply, info, in_dims, inputs)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.call, *arrays = inputs
    ctx.others = [None if isinstance(x, Tensor) else x for x in arrays]
    ctx.mark_non_differentiable(*(x for x in output[2:] if x is not None))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in arrays), *output)


def _wanted_gradients(call: Call, wanted: Sequence[bool], *inputs: Any) -> tuple[Tensor, ...]:
    """Those that are wanted, of (*arrays, *saved, dout, dlse)."""
    *saved, dout, dlse = inputs[COUNT:]
    gradients = _gradients(call, Arrays(*inputs[:COUNT]), saved, dout, dlse, wanted)
    return tuple(x for x in gradients if x is not None)


_Gradients = rowwise.first_only("triton", _wanted_gradients)


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


class _Kernel:
    """One launch, and what Triton compiled it to, by what it looks at: devices, dtypes and whether arrays are aligned.

    Triton's own launcher looks at each argument anew, which takes many times as long as the launch.
    """

    def __init__(self, launch: Launch) -> None:
        from attend_shared.kernels import attention

        self.launch = launch
        self.kernel = getattr(attention, launch.kernel)
        self.given = tuple({name: None for name in launch.inputs if name is not None})
        self.made = tuple((x.name, x.shape, getattr(torch, x.dtype)) for x in launch.outputs if x.used)
        self.names = tuple(x.name if x.used else self.made[0][0] for x in launch.outputs)
        self.constants = tuple(launch.constants[name] for name in self.kernel.arg_names if name in launch.constants)
        self.order = tuple(-1 if name is None else self.given.index(name) for name in launch.inputs)
        self.compiled: dict[tuple, Any] = {}

    def __call__(self, arrays: dict[str, Tensor], device: int, stream: int) -> None:
        """Run it on the current device, its outputs put among the arrays."""
        any_array, launch = arrays["q"], self.launch
        for name, shape, dtype in self.made:
            arrays[name] = any_array.new_empty(shape, dtype=dtype)
        given = [arrays[name] for name in self.given]
        places = [x.data_ptr() for x in given]
        key = (device, *[x.dtype for x in given], *[place % 16 == 0 for place in places])
        compiled = self.compiled.get(key)
        if compiled is None:
            compiled = self.kernel[launch.grid](
                *(any_array if name is None else arrays[name] for name in launch.inputs), *launch.numbers,
                *(arrays[name] for name in self.names), **launch.constants,
                num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
            if not plans.INTERPRETED:
                self.compiled[key] = compiled
        else:
            places.append(0)  # for what the call has not got
            outputs = [arrays[name].data_ptr() for name in self.names]
            inputs = [places[n] for n in self.order]
            compiled[launch.grid](*inputs, *launch.numbers, *outputs, *self.constants, stream=stream)


class _Plan:
    """A plan, ready to run."""

    def __init__(self, call: Call, layout: Layout) -> None:
        plan = plans.plan(call, layout)
        inputs = {name for launch in plan.forward for name in launch.inputs}
        self.names = [name for name in _SMALL if name in inputs]
        self.bounds = plan.bounds
        self.forward = tuple(map(_Kernel, plan.forward))
        self.backward = lru_cache(maxsize=64)(lambda *how: tuple(map(_Kernel, plan.backward(*how))))


_plan = lru_cache(maxsize=1024)(_Plan)


_SMALL = ("q_offset", "q_segment_ids", "kv_segment_ids", "q_lengths", "kv_lengths", "sinks", "dropout_seed")


def _prepare(call: Call, arrays: Arrays) -> tuple[_Plan, dict[str, Tensor]]:
    """What the call launches, and its arrays by name."""
    q, k, v = _rows(arrays.q), _rows(arrays.k), _rows(arrays.v)
    known = {"q": q, "k": k, "v": v}
    if arrays.mask is not None:
        known["mask"] = arrays.mask
    if arrays.bias is not None:
        known["bias"] = arrays.bias
    offset = arrays.q_offset.ndim + 1 if isinstance(arrays.q_offset, Tensor) and call.offset == "data" else 0
    layout = Layout(
        q.stride()[:3], k.stride()[:3], v.stride()[:3], _strides(arrays.mask), _strides(arrays.bias), offset,
        0 if offset else _offset(call, arrays), arrays.q_segment_ids is arrays.kv_segment_ids,
        capability() not in plans.MUCH_SHARED,
    )  # fmt: skip
    plan = _plan(call, layout)
    for name in plan.names:
        known[name] = getattr(arrays, name).contiguous()
    return plan, known


def _run(kernels: Sequence[_Kernel], arrays: dict[str, Tensor]) -> None:
    """Run them in order."""
    if plans.INTERPRETED:
        for kernel in kernels:
            kernel(arrays, -1, 0)
        return
    device = arrays["q"].get_device()
    with _device(device):
        stream = _streams()(device)
        for kernel in kernels:
            kernel(arrays, device, stream)


@cache
def _streams() -> Callable[[int], int]:
    """What gives Triton the current stream of a device."""
    from triton.runtime import driver

    return driver.active.get_current_stream


def _device(device: int) -> AbstractContextManager:
    """This made the current device, where it is not."""
    return nullcontext() if device == torch.cuda.current_device() else torch.cuda.device(device)


def _turned(call: Call, x: Tensor) -> Tensor:
    """(b h n d) of what lies as the caller laid it out, or the opposite."""
    return x.transpose(1, 2) if call.layout == "bnhd" else x


def _forward(call: Call, arrays: Arrays) -> tuple[Tensor | None, ...]:
    """out (b h i dv), and the others of `SAVED`, None those that the way back does not need."""
    plan, known = _prepare(call, arrays)
    _run(plan.forward, known)
    bounds = (known[name] if name in plan.bounds else None for name in plans.BOUNDS)
    return _turned(call, known["out"]), *(known.get(name) for name in SAVED[1:COMPILED]), *bounds


def _whole(nothing: Tensor, output: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The output, an empty array in the place of each that there is not, for those who take arrays alone."""
    return tuple(nothing.new_empty(0, dtype=torch.float32) if x is None else x for x in output)


def _gradients(
    call: Call, arrays: Arrays, saved: Sequence[Tensor | None], dout: Tensor, dlse: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of the arrays, None for those that have none or are not wanted. saved: as `SAVED`, or its head."""
    plan, known = _prepare(call, arrays)
    known |= ((name, x) for name, x in zip(SAVED, saved, strict=False) if x is not None and x.numel())
    known["out"], known["dout"] = _turned(call, known["out"]), _rows(dout)
    if dlse is not None:
        known["dlse"] = dlse.contiguous()
    has_bounds = bool(plan.bounds) and all(name in known for name in plan.bounds)
    _run(plan.backward(known["dout"].stride()[:3], wanted[FLOATS[3]], dlse is not None, has_bounds), known)
    gradients: list[Tensor | None] = [None] * COUNT
    for place in FLOATS:
        name = Arrays._fields[place]
        if wanted[place]:
            gradients[place] = _turned(call, known[f"d{name}"]) if name in "qkv" else known[f"d{name}"]
    return gradients


# The operators, for compilers: triton(*arrays, *options), and triton_gradients(*arrays, *saved, wants_bias, *options).


def _operator(*inputs: Any) -> tuple[Tensor, ...]:
    return _whole(inputs[0], _forward(*blockwise.canonical(inputs[:COUNT], *inputs[COUNT:]))[:COMPILED])


def _operator_fake(q: Tensor, _: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    data = Arrays(q, _, v, *rest[: COUNT - 3])
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    finer = q.dtype != torch.float32 and any(x is not None and x.dtype != q.dtype for x in (data.bias, data.sinks))
    b, h, i = q.shape[:3]
    rows = plans.padded_rows(i)
    plain = data.bias is None and data.sinks is None
    shapes = (b, h, i), (b, h, rows), (0,) if plain else (b, h, rows), out.shape if finer else (0,)
    return out, *(q.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _operator_gradients(*inputs: Any) -> tuple[Tensor, ...]:
    """dq, dk, dv, dbias and dsinks, the last two of shape (0,) where there are none or they are not wanted."""
    behind = COUNT + COMPILED
    saved, (dout, dlse, wants_bias) = inputs[COUNT:behind], inputs[behind : behind + 3]
    call, arrays = blockwise.canonical(inputs[:COUNT], *inputs[behind + 3 :])
    wanted = [x is not None for x in arrays]
    wanted[FLOATS[3]] = wants_bias
    gradients = _gradients(call, arrays, saved, dout, dlse, wanted)
    found = (gradients[place] for place in FLOATS)
    return tuple(dout.new_empty(0) if x is None else x for x in found)


def _operator_gradients_fake(*inputs: Any) -> tuple[Tensor, ...]:
    data, wants_bias = Arrays(*inputs[:COUNT]), inputs[COUNT + COMPILED + 2]
    nothing = data.q.new_empty(0)
    dbias = data.bias.new_empty(data.bias.shape) if wants_bias else nothing
    dsinks = nothing if data.sinks is None else data.sinks.new_empty(data.sinks.shape)
    return *(x.new_empty(x.shape) for x in data[:3]), dbias, dsinks


def _keep_operator(ctx: Any, inputs: tuple, output: tuple) -> None:
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
_TENSORS = ", ".join(f"Tensor {name}" for name in (*SAVED[:COMPILED], "dout", "dlse"))
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
torch.library.register_autograd("attend_torch::triton", _derive, setup_context=_keep_operator, lib=_LIBRARY)

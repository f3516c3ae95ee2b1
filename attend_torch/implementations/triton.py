"""Triton kernels for every clause, launched here as they are in JAX: the same bits in both.

The kernels and what a call launches are `attend_shared.kernels`, how launches go `attend_torch.launches`. Here are the
memory, the way back and the operator that a compiler takes whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from typing import Any

import torch

from attend_shared import meaning
from attend_shared.call import Arrays, Call, canonical
from attend_shared.kernels import plan as plans
from attend_shared.kernels.gluon_plan import runs_gluon
from attend_shared.kernels.launch import Layout
from attend_shared.kernels.plan import BOUNDS, SAVED
from attend_shared.kernels.sizes import INTERPRETED, padded_rows
from attend_torch import launches
from attend_torch.arrays import is_traced, is_watched, needs_gradients
from attend_torch.implementations import blockwise, einsum, rowwise
from attend_torch.implementations.blockwise import COUNT, FLOATS
from attend_torch.launches import Kernels
from attend_torch.machine import capability

Tensor = torch.Tensor
INSTALLED = find_spec("triton") is not None


def unavailable() -> str | None:
    """Why Triton's kernels cannot run here, or None."""
    return _unavailable()


unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in attend_torch.attend


def missing() -> str | None:
    """Why there are no Triton kernels at all, or None."""
    return None if INSTALLED else 'it needs Triton: pip install "attend-twin[triton]"'


@cache
def _unavailable() -> str | None:
    if without := missing():
        return without
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "it needs an NVIDIA GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs an NVIDIA GPU of compute capability 8.0 or later"
    return None


def refusal(call: Call) -> str | None:
    """Why Triton's kernels cannot serve this call, or None."""
    if call.platform != ("cpu" if INTERPRETED else "cuda"):
        return "it runs on an NVIDIA GPU"
    return plans.refusal(call)


def attend(call: Call, arrays: Arrays) -> tuple[Tensor, Tensor]:
    """out (b h i dv) in q's dtype, and lse (b h i) in float32. Differentiable once, in reverse."""
    if call.is_empty:
        return einsum.attend(call, arrays)
    if is_traced(arrays.q):  # what looks on takes the operator whole
        offset = _offset(call, arrays)
        arrays = arrays if isinstance(arrays.q_offset, Tensor) else arrays._replace(q_offset=None)
        options = call.left, call.right, offset, call.scale, call.softcap, call.dropout, call.return_lse
        out, lse, *_ = torch.ops.attend_torch.triton(*arrays, *options)
    elif is_watched():
        out, lse, *_ = _Attend.apply(call, *arrays)
    elif needs_gradients(arrays):
        out, lse = _Eager.apply(call, arrays, None, arrays.q, arrays.k, arrays.v, arrays.bias, arrays.sinks)
    else:
        _, known = _forward(call, arrays, True)
        out, lse = known["out"], known["lse"]
    return out, lse


def plain(call: Call) -> Callable[[Tensor, Tensor, Tensor], Any] | None:
    """(q, k, v) -> what `attend` of the library returns, for calls of nothing else, or None."""
    if call.is_empty or INTERPRETED:
        return None
    if call.gradient:
        recorded = _recorded(call, partial(canonical, call))
        return lambda q, k, v: recorded(Arrays(q, k, v))
    with_lse, alike = call.return_lse, _Alike(call, partial(canonical, call), True)

    def result(q: Tensor, k: Tensor, v: Tensor) -> Any:
        ends, key = alike.ahead.send_three(q, k, v)
        out, lse = ends or alike.planned(Arrays(q, k, v), key)
        return (out, lse) if with_lse else out

    return result


attend.plain = plain  # type: ignore[attr-defined]


def short(call: Call, canonical: Callable[[Arrays], Arrays]) -> Callable[[Arrays], Any] | None:
    """(arrays as the caller has them) -> what `attend` of the library returns, where nothing looks on, or None.

    Args:
        call: any.
        canonical: what gives arrays their one form.
    """
    if call.is_empty or INTERPRETED:
        return None
    if call.gradient:
        return _recorded(call, canonical)
    with_lse, alike = call.return_lse, _Alike(call, canonical, True)

    def result(arrays: Arrays) -> Any:
        ends, key = alike.ahead.send(arrays, arrays.q_segment_ids is arrays.kv_segment_ids)
        out, lse = ends or alike.planned(arrays, key)
        return (out, lse) if with_lse else out

    return result


def _recorded(call: Call, canonical: Callable[[Arrays], Arrays]) -> Callable[[Arrays], Any]:
    """The same where autograd is to know."""
    with_lse, alike = call.return_lse, _Alike(call, lambda arrays: arrays, False)

    def result(arrays: Arrays) -> Any:
        arrays = canonical(arrays)
        out, lse = _Eager.apply(call, arrays, alike, arrays.q, arrays.k, arrays.v, arrays.bias, arrays.sinks)
        out = _turned(call, out)
        return (out, lse) if with_lse else out

    return result


attend.short = short  # type: ignore[attr-defined]


class _Alike:
    """Calls that are alike but for strides, launched as `launches.Alike` does, or as calls that are planned are.

    Attributes:
        call: at which nothing looks on.
        canonical: what gives arrays their one form.
        alone: as in `Plan`.
        ends: names of what is given back, as it lies.
        ahead, behind: what was launched before, forward and back.
    """

    def __init__(self, call: Call, canonical: Callable[[Arrays], Arrays], alone: bool) -> None:
        self.call, self.canonical, self.alone = call, canonical, alone
        self.ends = SAVED[:2] if alone else SAVED
        self.ahead = launches.Alike(Arrays._fields)
        self.behind = launches.Alike((*Arrays._fields, *SAVED, "dout", "dlse"))

    def planned(self, arrays: Arrays, key: tuple | None) -> Sequence[Any]:
        """The ends where `ahead` gives none, None for those that there are not. key: as it gives it."""
        plan, known = _forward(self.call, self.canonical(arrays), self.alone)
        ends = _given(plan, known, self.ends)
        self.ahead.keep(key, arrays, plan.ahead(self.alone), known, ends)
        out = _turned(self.call, known["out"])
        return tuple(None if name is None else out if name == "out" else known[name] for name in ends)

    def backward(
        self, arrays: Arrays, saved: Sequence[Tensor | None], dout: Tensor, dlse: Tensor | None,
        wanted: Sequence[bool],
    ) -> Sequence[Tensor | None]:  # fmt: skip
        """As `_gradients`."""
        given, one_id = (*arrays, *saved, dout, dlse), arrays.q_segment_ids is arrays.kv_segment_ids
        gradients, key = self.behind.send(given, wanted, dlse is None, one_id)
        if gradients is None:
            kernels, known = _backward(self.call, arrays, saved, dout, dlse, wanted)
            ends = [name if wants else None for name, wants in zip(GRADIENTS, wanted, strict=True)]
            self.behind.keep(key, given, kernels, known, ends)
            return _found(self.call, known, wanted)
        if self.call.layout == "bnhd":
            return [x if x is None or n > 2 else _turned(self.call, x) for n, x in enumerate(gradients)]
        return gradients


def _given(plan: _Plan, known: Mapping[str, Tensor], ends: Sequence[str]) -> list[str | None]:
    """The ends, None for those that there are not, and for bounds that the way back finds anew."""
    return [name if name in known and (name not in BOUNDS or name in plan.bounds) else None for name in ends]


GRADIENTS = tuple(f"d{Arrays._fields[place]}" for place in FLOATS)
COMPILED = len(SAVED) - len(BOUNDS)  # of them are what the operator gives: the way back finds the bounds anew


class _Eager(torch.autograd.Function):
    """(call, arrays, how they are sent off or None, *those of them that have gradients) -> out, lse.

    For no transformation: a Function that has them looks its signature up each time it is called, and what else the way
    back needs would have to be among its results. Each of those, and each argument, costs time.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, arrays: Arrays, alike: _Alike | None, *_: Any) -> tuple[Tensor | None, ...]:
        if alike is None:
            output = _saved(*_forward(call, arrays))
        else:
            ends, key = alike.ahead.send(arrays, arrays.q_segment_ids is arrays.kv_segment_ids)
            out, *others = ends or alike.planned(arrays, key)
            output = _turned(call, out), *others
        _keep(ctx, call, arrays, output)
        ctx.alike = alike
        return output[:2]

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
        return None, None, None, *_way_back(ctx, ctx.needs_input_grad[3:], dout, dlse, ctx.alike)


class _Attend(torch.autograd.Function):
    """(call, *arrays) -> out, lse, and what else the way back needs. For transformations."""

    @staticmethod
    def forward(call: Call, *arrays: Any) -> tuple[Tensor, ...]:
        return _whole(arrays[0], _saved(*_forward(call, Arrays(*arrays))))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.mark_non_differentiable(*output[2:])
        _keep(ctx, inputs[0], Arrays(*inputs[1:]), output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: Any) -> tuple:
        result: list[Tensor | None] = [None] * COUNT
        wanted = [ctx.needs_input_grad[1 + place] for place in FLOATS]
        for place, gradient in zip(FLOATS, _way_back(ctx, wanted, dout, dlse), strict=True):
            result[place] = gradient
        return None, *result

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        return rowwise.each_lane(_Attend.apply, info, in_dims, inputs)


def _keep(ctx: Any, call: Call, arrays: Arrays, output: Sequence[Tensor | None]) -> None:
    at = None if isinstance(arrays.q_offset, Tensor) else arrays.q_offset
    ctx.call, ctx.at = call, at  # a number is not for save_for_backward
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(arrays if at is None else arrays._replace(q_offset=None)), *output)


def _way_back(
    ctx: Any, wanted: Sequence[bool], dout: Tensor | None, dlse: Tensor | None, alike: _Alike | None = None
) -> Sequence[Tensor | None]:
    """The gradients of those that have some, None where they are not wanted."""
    tensors = ctx.saved_tensors
    arrays, saved = Arrays(*tensors[:COUNT]), tensors[COUNT:]
    if ctx.at is not None:
        arrays = arrays._replace(q_offset=ctx.at)
    dout = torch.zeros_like(saved[0]) if dout is None else dout
    if torch.is_grad_enabled() or is_watched():
        gradients = iter(_Gradients.apply(ctx.call, wanted, *arrays, *saved, dout, dlse))
        return [next(gradients) if wants else None for wants in wanted]
    if alike is not None:
        return alike.backward(arrays, saved, dout, dlse, wanted)
    return _gradients(ctx.call, arrays, saved, dout, dlse, wanted)


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


def _is_aligned(x: Tensor) -> bool:
    """Whether each row of x begins at a multiple of 16 bytes, in a place of its own."""
    a, b, c, d = x.stride()
    return x.data_ptr() % 16 == 0 and (a | b | c) % 8 == 0 and c > 0 and d == 1


def _aligned(x: Tensor) -> Tensor:
    """The same numbers where they are: where an array lies must not decide which kernel it gets."""
    return x if _is_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def _strides(x: Tensor | None) -> tuple[int, ...] | None:
    """Strides of what broadcasts: 0 along axes of size 1."""
    return None if x is None else tuple(0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))


class _Plan:
    """A plan, ready to run."""

    def __init__(self, call: Call, layout: Layout) -> None:
        plan = plans.plan(call, layout)
        inputs = {name for launch in plan.forward for name in launch.inputs}
        self.names = [name for name in _SMALL if name in inputs]
        self.bounds = plan.bounds
        self.aligned = plan.aligned
        self.forward = Kernels(plan.forward)
        self.alone = self.forward if plan.alone is plan.forward else Kernels(plan.alone)
        self.backward = lru_cache(maxsize=64)(lambda *how: Kernels(plan.backward(*how)))

    def ahead(self, alone: bool) -> Kernels:
        """What is launched on the way forward. alone: there is none back."""
        return self.alone if alone else self.forward


@lru_cache(maxsize=1024)
def _plan(
    call: Call, q: tuple, k: tuple, v: tuple, mask: tuple | None, bias: tuple | None, offset: int, at: int, one_id: bool
) -> _Plan:
    """For arrays of these strides; the others as in `Layout`."""
    gluon = runs_gluon(capability())
    return _Plan(call, Layout(q[:3], k[:3], v[:3], mask, bias, offset, at, one_id, capability(), gluon))


_SMALL = ("q_offset", "q_segment_ids", "kv_segment_ids", "q_lengths", "kv_lengths", "sinks", "dropout_seed")


def _prepare(call: Call, arrays: Arrays, back: bool = False) -> tuple[_Plan, dict[str, Tensor]]:
    """What the call launches, and its arrays by name, as the way forward or the way back takes them."""
    q, k, v, mask, bias, at, q_ids, kv_ids, *_ = arrays
    of_q, of_k, of_v = q.stride(), k.stride(), v.stride()
    if not of_q[3] == of_k[3] == of_v[3] == 1:
        q, k, v = _rows(q), _rows(k), _rows(v)
        of_q, of_k, of_v = q.stride(), k.stride(), v.stride()
    known = {"q": q, "k": k, "v": v}
    if mask is not None:
        known["mask"] = mask
    if bias is not None:
        known["bias"] = bias
    offset = 0
    if at is None:
        at = 0
    elif isinstance(at, Tensor):
        offset, at = at.ndim + 1, 0
    plan = _plan(call, of_q, of_k, of_v, _strides(mask), _strides(bias), offset, at, q_ids is kv_ids)
    aligned = plan.aligned if back else plan.aligned[:3]
    if not all(_is_aligned(known[name]) for name in aligned):  # what is copied is
        return _prepare(call, arrays._replace(**{name: _aligned(known[name]) for name in aligned}), back)
    for name in plan.names:
        known[name] = getattr(arrays, name).contiguous()
    return plan, known


def _turned(call: Call, x: Tensor) -> Tensor:
    """(b h n d) of what lies as the caller laid it out, or the opposite."""
    return x.transpose(1, 2) if call.layout == "bnhd" else x


def _forward(call: Call, arrays: Arrays, alone: bool = False) -> tuple[_Plan, dict[str, Tensor]]:
    """What was launched, and its arrays by name: inputs and outputs, out (b h i dv) among them. alone: as in `Plan`."""
    plan, known = _prepare(call, arrays)
    launches.run(plan.ahead(alone), known)
    known["out"] = _turned(call, known["out"])
    return plan, known


def _saved(plan: _Plan, known: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    """Those of `SAVED`, None where the way back does not need them."""
    return tuple(None if name is None else known[name] for name in _given(plan, known, SAVED))


def _whole(nothing: Tensor, output: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The output, an empty array in the place of each that there is not, for those who take arrays alone."""
    return tuple(nothing.new_empty(0, dtype=torch.float32) if x is None else x for x in output)


def _gradients(
    call: Call, arrays: Arrays, saved: Sequence[Tensor | None], dout: Tensor, dlse: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of `FLOATS`, None for those that are not wanted. saved: as `SAVED`, or its head."""
    _, known = _backward(call, arrays, saved, dout, dlse, wanted)
    return _found(call, known, wanted)


def _backward(
    call: Call, arrays: Arrays, saved: Sequence[Tensor | None], dout: Tensor, dlse: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Kernels, dict[str, Tensor]]:  # fmt: skip
    """What was launched, and its arrays by name."""
    plan, known = _prepare(call, arrays, True)
    for name, x in zip(SAVED, saved, strict=False):
        if x is not None and x.numel():
            known[name] = x
    dout = _rows(dout.resolve_neg())
    known["out"], known["dout"] = _turned(call, known["out"]), _aligned(dout) if plan.aligned else dout
    if dlse is not None:
        known["dlse"] = dlse.resolve_neg().contiguous()
    has_bounds = bool(plan.bounds) and all(name in known for name in plan.bounds)
    kernels = plan.backward(known["dout"].stride()[:3], wanted[3], dlse is not None, has_bounds)
    launches.run(kernels, known)
    return kernels, known


def _found(call: Call, known: dict[str, Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of `FLOATS`, None for those that are not wanted."""
    found = [known[name] if wants else None for name, wants in zip(GRADIENTS, wanted, strict=True)]
    if call.layout == "bnhd":
        found[:3] = [None if x is None else _turned(call, x) for x in found[:3]]
    return found


# The operators, for compilers: triton(*arrays, *options), and triton_gradients(*arrays, *saved, wants_bias, *options).


def _canonical(arrays: Sequence[Tensor | None], *options: Any) -> tuple[Call, Arrays]:
    """As `blockwise.canonical`; the last option says whether lse is wanted, on which the kernel may hang."""
    call, data = blockwise.canonical(arrays, *options[:-1])
    return call._replace(return_lse=options[-1]), data


def _operator(*inputs: Any) -> tuple[Tensor, ...]:
    found = _saved(*_forward(*_canonical(inputs[:COUNT], *inputs[COUNT:])))
    return _whole(inputs[0], found[:COMPILED])


def _operator_fake(*inputs: Any) -> tuple[Tensor, ...]:
    data = Arrays(*inputs[:COUNT])
    q, v = data.q, data.v
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    finer = q.dtype != torch.float32 and any(x is not None and x.dtype != q.dtype for x in (data.bias, data.sinks))
    b, h, i = q.shape[:3]
    rows = padded_rows(i)
    plain = data.bias is None and data.sinks is None
    shapes = (b, h, i), (b, h, rows), (0,) if plain else (b, h, rows), out.shape if finer else (0,)
    saved = [q.new_empty(shape, dtype=torch.float32) for shape in (*shapes, (0,))]
    if inputs[-2]:  # dropout
        call, _ = _canonical(inputs[:COUNT], *inputs[COUNT:])
        if plans.keeps_drawn(call):
            saved[-1] = q.new_empty(plans.drawn_shape(call), dtype=torch.int32)
    return out, *saved


def _operator_gradients(*inputs: Any) -> tuple[Tensor, ...]:
    """dq, dk, dv, dbias and dsinks, the last two of shape (0,) where there are none or they are not wanted."""
    behind = COUNT + COMPILED
    saved, (dout, dlse, wants_bias) = inputs[COUNT:behind], inputs[behind : behind + 3]
    call, arrays = _canonical(inputs[:COUNT], *inputs[behind + 3 :])
    wanted = True, True, True, wants_bias, arrays.sinks is not None
    gradients = _gradients(call, arrays, saved, dout, dlse, wanted)
    return tuple(dout.new_empty(0) if x is None else x for x in gradients)


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


_FIVE, _SIX = ("(" + ", ".join(["Tensor"] * n) + ")" for n in (5, 6))
_TENSORS = ", ".join(f"Tensor {name}" for name in (*SAVED[:COMPILED], "dout", "dlse"))
_LIBRARY = torch.library.Library("attend_torch", "FRAGMENT")
_OPTIONS = f"{blockwise.OPTIONS}, bool return_lse"
_LIBRARY.define(f"triton({blockwise.ARRAYS}, {_OPTIONS}) -> {_SIX}")
_LIBRARY.define(f"triton_gradients({blockwise.ARRAYS}, {_TENSORS}, bool wants_bias, {_OPTIONS}) -> {_FIVE}")
for _name, _function, _fake in (
    ("triton", _operator, _operator_fake),
    ("triton_gradients", _operator_gradients, _operator_gradients_fake),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attend_torch::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("attend_torch::triton", _derive, setup_context=_keep_operator, lib=_LIBRARY)

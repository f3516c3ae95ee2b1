"""The formula by blocks of queries, each against all keys: memory linear in the lengths, and every derivative.

Slower than `blockwise`, since nothing is skipped and the way back computes each block again, but its derivatives are
those of plain code: forward mode, reverse mode, and any mixture of them stay linear in memory.

Custom scores are served here, for `blockwise` too: there keys that no query of a block can reach are left out, and on a
CPU, where looking at data waits for nothing, those behind every length and of other segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from attend_shared import blocks
from attend_shared.call import FAR, Arrays, Call
from attend_torch.arrays import hide, hide_rows
from attend_torch.implementations import einsum

Tensor = torch.Tensor
LOGITS = 2**21  # of a block, all heads together


def unavailable() -> str | None:
    """None: it can always run."""
    return None


def refusal(call: Call) -> str | None:
    """Why it cannot serve this call, or None."""
    if call.custom and in_gradient():
        return "inside torch.func.grad, where it cannot compute scores again, it would keep all of them"
    return None


def in_gradient() -> bool:
    """Whether this is inside a torch.func transform that records a graph of its own."""
    functorch = torch._C._functorch
    if torch.compiler.is_compiling() or functorch.peek_interpreter_stack() is None:
        return False
    return any(each.key() == functorch.TransformType.Grad for each in functorch.get_interpreter_stack())


def attend(call: Call, arrays: Arrays) -> tuple[Tensor, Tensor]:
    """out (b h i dv) in q's dtype, and lse (b h i) in the accumulation dtype."""
    arrays = hide(call, arrays)
    out, lse = rows(call, arrays)
    return hide_rows(call, arrays, out) if call.q_lengths else out, lse


def rows(call: Call, arrays: Arrays) -> tuple[Tensor, Tensor]:
    """The same on arrays from which nothing can leak."""
    if call.is_empty:
        return einsum.compute(call, arrays)
    size = max(1, min(call.i, LOGITS // max(1, call.b * call.h * call.j)))
    axes = Arrays(2, None, None, None if call.mask is None or call.mask[2] == 1 else 2,
                  None if call.bias is None or call.bias[2] == 1 else 2, q_segment_ids=1)  # fmt: skip
    # What every block of queries shares gets a gradient from each of them: summed in the accumulation dtype.
    wide = getattr(torch, call.accumulation)
    shared = {name: x.to(wide) for name in ("k", "v", "bias", "sinks")
              if (x := getattr(arrays, name)) is not None and getattr(axes, name) is None}  # fmt: skip
    plan = _Plan(partial(_block, call), call.i, size, axes, (2, 2))
    # A compiler follows this form alone, and knows first derivatives only; what custom scores capture is no input.
    if torch.compiler.is_compiling() or call.custom:
        return _each(plan, arrays._replace(**shared))
    return _Rows.apply(plan, *arrays._replace(**shared))


def _block(call: Call, first: int, *data: Any) -> tuple[Tensor, Tensor]:
    """The queries from `first` on, as a call of their own; q, and what has an axis of queries, are theirs alone."""

    def moved(x: Any, by: int) -> Any:
        return x.long().clamp(-FAR, FAR) + by if isinstance(x, Tensor) else x + by  # a far one must not wrap

    arrays = Arrays(*data)
    i, j, first_key = arrays.q.shape[2], call.j, 0
    offset = {"zero": 0, "end": call.j - call.i, "data": arrays.q_offset}[call.offset] if call.positional else 0
    if call.custom and not call.dropout:  # whose keys begin with 0
        first_key, end = blocks.reach(call, offset, first, i)
        if _may_look(call, arrays):
            first_key, end = _within(call, arrays, first, first_key, end)
        if (first_key, end) != (0, call.j):
            arrays, j = _keys(call, arrays, first_key, end), end - first_key
    if call.positional:
        arrays = arrays._replace(q_offset=moved(offset, first - first_key))
    if call.q_lengths:
        arrays = arrays._replace(q_lengths=moved(arrays.q_lengths, -first))
    mask, bias = (None if x is None else tuple(x.shape) for x in (arrays.mask, arrays.bias))
    offset_is = "data" if call.positional else "zero"
    part = call._replace(i=i, j=j, mask=mask, bias=bias, offset=offset_is)
    return einsum.compute(part, arrays, first, first_key)


def _keys(call: Call, arrays: Arrays, first: int, end: int) -> Arrays:
    """The arrays with these keys alone, counted from the first."""
    keys = slice(first, end)

    def of_pairs(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.shape[3] == 1 else x[..., keys]

    return arrays._replace(
        k=arrays.k[:, :, keys], v=arrays.v[:, :, keys], mask=of_pairs(arrays.mask), bias=of_pairs(arrays.bias),
        kv_segment_ids=arrays.kv_segment_ids[:, keys] if call.segments else None,
        kv_lengths=arrays.kv_lengths.long() - first if call.kv_lengths else None,
    )  # fmt: skip


def _may_look(call: Call, arrays: Arrays) -> bool:
    """Whether lengths and segments may be looked at: they are where Python runs, and no one follows what it does."""
    if call.platform != "cpu" or torch.compiler.is_compiling():
        return False
    return (call.segments or call.q_lengths or call.kv_lengths) and torch._C._functorch.peek_interpreter_stack() is None


def _within(call: Call, arrays: Arrays, first: int, low: int, high: int) -> tuple[int, int]:
    """Of the keys from low up to high those from the first to the last that some item lets a query of a block see.

    Segment ids in `arrays` are those of the block, which begins at `first`.
    """
    if call.q_lengths and not bool((arrays.q_lengths > first).any()):
        return low, low
    if call.kv_lengths:
        high = max(low, min(high, int(arrays.kv_lengths.max())))
    if call.segments and low < high:
        least, greatest = torch.aminmax(arrays.q_segment_ids, dim=1, keepdim=True)
        ids = arrays.kv_segment_ids[:, low:high]
        seen = ((ids >= least) & (ids <= greatest)).any(0).nonzero()
        low, high = (low + int(seen[0]), low + int(seen[-1]) + 1) if len(seen) else (low, low)
    return low, high


class _Plan(NamedTuple):
    """How a function of some rows becomes one of all rows.

    Attributes:
        function: takes the index of the first row and inputs, and gives a tuple of tensors.
        rows, size: how many rows there are, and how many it takes at a time.
        inputs: for each input its axis of rows, or None where all rows share it.
        outputs: for each output its axis of rows, or None where those of all rows are to be summed.
    """

    function: Callable
    rows: int
    size: int
    inputs: Sequence[int | None]
    outputs: Sequence[int | None]


class _Rows(torch.autograd.Function):
    """(plan, *inputs) -> outputs. Nothing but inputs is kept; derivatives are functions of the same kind.

    Floating-point inputs have derivatives. The gradient of what all rows share is a sum, that of rows has rows.
    """

    @staticmethod
    def forward(plan: _Plan, *inputs: Any) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        for first in range(0, plan.rows, plan.size):
            size = min(plan.size, plan.rows - first)
            parts = plan.function(first, *_some(plan.inputs, inputs, first, size))
            for place, (part, axis) in enumerate(zip(parts, plan.outputs, strict=True)):
                if not first:
                    shape = list(part.shape)
                    if axis is not None:
                        shape[axis] = plan.rows
                    outputs.append(part.new_zeros(shape))
                if axis is None:
                    outputs[place] += part
                else:
                    outputs[place].narrow(axis, first, size).copy_(part)
        return tuple(outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.plan, *values = inputs
        ctx.others = [None if isinstance(x, Tensor) else x for x in values]
        tensors = [x if isinstance(x, Tensor) else None for x in values]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        plan, inputs, places = _kept(ctx)

        def pull(first: int, *values: Any) -> tuple[Tensor, ...]:
            some, cotangents = values[: len(plan.inputs)], values[len(plan.inputs) :]
            return torch.func.vjp(_of(plan.function, first, some, places), *(some[n] for n in places))[1](cotangents)

        axes = tuple(plan.inputs[place] for place in places)
        backward = plan._replace(function=pull, inputs=(*plan.inputs, *plan.outputs), outputs=axes)
        gradients = dict(zip(places, _Rows.apply(backward, *inputs, *cotangents), strict=True))
        return None, *(gradients.get(place) for place in range(len(inputs)))

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> tuple[Tensor, ...]:
        plan, inputs, places = _kept(ctx)

        def push(first: int, *values: Any) -> tuple[Tensor, ...]:
            some, along = values[: len(plan.inputs)], values[len(plan.inputs) :]
            return pushed(_of(plan.function, first, some, places), [some[place] for place in places], along)

        forward = plan._replace(function=push, inputs=(*plan.inputs, *(plan.inputs[place] for place in places)))
        return _Rows.apply(forward, *inputs, *(filled(tangents[place], inputs[place]) for place in places))

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        return each_lane(_Rows.apply, info, in_dims, inputs)


def _some(axes: Sequence[int | None], inputs: Sequence[Any], first: int, size: int) -> list[Any]:
    """The inputs of some rows."""
    return [
        x if axis is None or not isinstance(x, Tensor) else x.narrow(axis, first, size)
        for axis, x in zip(axes, inputs, strict=True)
    ]


def _each(plan: _Plan, inputs: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """`_Rows` of out and lse, in a form that a compiler follows."""
    parts = [
        checkpoint(plan.function, first, *_some(plan.inputs, inputs, first, min(plan.size, plan.rows - first)),
                   use_reentrant=False)
        for first in range(0, plan.rows, plan.size)
    ]  # fmt: skip
    out, lse = zip(*parts, strict=True)
    return torch.cat(out, 2), torch.cat(lse, 2)


def _kept(ctx: Any) -> tuple[_Plan, list[Any], list[int]]:
    """The plan, its inputs, and the places of those that have derivatives."""
    inputs = [x if other is None else other for x, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
    return ctx.plan, inputs, [n for n, x in enumerate(inputs) if isinstance(x, Tensor) and x.is_floating_point()]


def _of(function: Callable, first: int, inputs: Sequence[Any], places: Sequence[int]) -> Callable:
    """The function of the inputs at these places alone."""

    def of(*some: Tensor) -> tuple[Tensor, ...]:
        values = list(inputs)
        for place, x in zip(places, some, strict=True):
            values[place] = x
        return function(first, *values)

    return of


def pushed(function: Callable, inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The derivative of a function, to a tuple of tensors, along tangents: in reverse, twice.

    What vjp gives is linear in its cotangents, so its own derivative is the transpose. Forward mode does not nest.
    """
    outputs, pull = torch.func.vjp(function, *inputs)[:2]
    push = torch.func.vjp(pull, tuple(torch.zeros_like(x) for x in outputs))[1]
    return push(tuple(tangents))[0]


def filled(tangent: Tensor | None, x: Tensor) -> Tensor:
    """A tangent, zeros where there is none."""
    return torch.zeros_like(x) if tangent is None else tangent


def each_lane(function: Callable, info: Any, in_dims: tuple, inputs: tuple) -> tuple:
    """vmap, one lane after the other: each is a call of its own, with indices of its own."""
    lanes = [
        function(*(x if dim is None or not isinstance(x, Tensor) else x.select(dim, lane)
                   for dim, x in zip(in_dims, inputs, strict=True)))
        for lane in range(info.batch_size)
    ]  # fmt: skip
    return tuple(torch.stack(each) for each in zip(*lanes, strict=True)), (0,) * len(lanes[0])


def first_only(name: str, gradients: Callable[..., tuple]) -> type[torch.autograd.Function]:
    """A Function of gradients, lane by lane under vmap, that have none themselves.

    Args:
        name: of the implementation.
        gradients: of whatever the Function is applied to.
    """

    class Gradients(torch.autograd.Function):
        forward = staticmethod(gradients)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            raise RuntimeError(
                f"{name} has first derivatives only; blockwise, rowwise and einsum have every derivative: "
                'implementation="blockwise".'
            )

        @staticmethod
        def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
            return each_lane(Gradients.apply, info, in_dims, inputs)

    return Gradients

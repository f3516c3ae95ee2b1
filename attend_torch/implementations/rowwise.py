"""The formula by blocks of queries, each against all keys: memory linear in the lengths, and every derivative.

Slower than `blockwise`, since nothing is skipped and the way back computes each block again, but its derivatives are
those of plain code: forward mode, reverse mode, and any mixture of them stay linear in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from attend_shared.call import FAR, Arrays, Call
from attend_torch.arrays import hide, hide_rows
from attend_torch.implementations import einsum

Tensor = torch.Tensor
LOGITS = 2**21  # of a block, all heads together


def unavailable() -> str | None:
    """None: it can always run."""
    return None


def refusal(call: Call) -> str | None:
    """None: it serves every call."""
    return None


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
    out, lse = zip(
        *(_block(call, arrays, first, min(size, call.i - first)) for first in range(0, call.i, size)), strict=True
    )
    return torch.cat(out, 2), torch.cat(lse, 2)


def _block(call: Call, arrays: Arrays, first: int, size: int) -> tuple[Tensor, Tensor]:
    """The queries from `first` on, as a call of their own."""

    def pick(x: Tensor | None, axis: int) -> Tensor | None:
        return x if x is None or x.shape[axis] == 1 else x.narrow(axis, first, size)

    def shape(x: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return x if x is None or x[2] == 1 else (*x[:2], size, x[3])

    def moved(x: Any, by: int) -> Any:
        return x.long().clamp(-FAR, FAR) + by if isinstance(x, Tensor) else x + by  # a far one must not wrap

    offset = {"zero": 0, "end": call.j - call.i, "data": arrays.q_offset}[call.offset] if call.positional else None
    part = call._replace(
        i=size, mask=shape(call.mask), bias=shape(call.bias), offset="data" if call.positional else "zero"
    )
    data = arrays._replace(
        q=pick(arrays.q, 2), mask=pick(arrays.mask, 2), bias=pick(arrays.bias, 2),
        q_offset=None if offset is None else moved(offset, first), q_segment_ids=pick(arrays.q_segment_ids, 1),
        q_lengths=None if arrays.q_lengths is None else moved(arrays.q_lengths, -first))  # fmt: skip

    def function(*data: Any) -> tuple[Tensor, Tensor]:
        return einsum.compute(part, Arrays(*data), first)

    if torch.compiler.is_compiling():  # a compiler follows this form alone, and knows first derivatives only
        return checkpoint(function, *data, use_reentrant=False)
    return _Again.apply(function, *data)


class _Again(torch.autograd.Function):
    """function(*inputs), keeping its inputs alone: its derivatives compute it again, and are functions of that kind.

    The function takes tensors and what is none, and gives a tuple of tensors; floating-point inputs have derivatives.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable, *inputs: Any) -> tuple[Tensor, ...]:
        return function(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.function, *values = inputs
        ctx.others = [None if isinstance(x, Tensor) else x for x in values]
        tensors = [x if isinstance(x, Tensor) else None for x in values]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        function, inputs, places = _parts(ctx)

        def pull(*values: Any) -> tuple[Tensor, ...]:
            inputs, cotangents = values[: len(ctx.others)], values[len(ctx.others) :]
            return torch.func.vjp(_of(function, inputs, places), *(inputs[place] for place in places))[1](cotangents)

        gradients = _Again.apply(pull, *inputs, *cotangents)
        result = [None] * (1 + len(inputs))
        for place, gradient in zip(places, gradients, strict=True):
            result[1 + place] = gradient
        return tuple(result)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> tuple[Tensor, ...]:
        function, inputs, places = _parts(ctx)

        def push(*values: Any) -> tuple[Tensor, ...]:
            inputs, tangents = values[: len(ctx.others)], values[len(ctx.others) :]
            return pushed(_of(function, inputs, places), [inputs[place] for place in places], tangents)

        return _Again.apply(push, *inputs, *(filled(tangents[place], inputs[place]) for place in places))


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


def _parts(ctx: Any) -> tuple[Callable, list[Any], list[int]]:
    """The function, its inputs, and the places of those that have derivatives."""
    inputs = [x if other is None else other for x, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
    return ctx.function, inputs, [n for n, x in enumerate(inputs) if isinstance(x, Tensor) and x.is_floating_point()]


def _of(function: Callable, inputs: tuple, places: list[int]) -> Callable:
    """The function of the inputs at these places alone."""

    def of(*some: Tensor) -> tuple[Tensor, ...]:
        values = list(inputs)
        for place, x in zip(places, some, strict=True):
            values[place] = x
        return function(*values)

    return of

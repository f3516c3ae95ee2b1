"""How the door looks at torch tensors, and the index arrays that the meaning is written over."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from attend_shared import meaning
from attend_shared.call import FAR, Arrays, Call, Framework

_NAMES = {
    getattr(torch, name): name
    for name in ("float16", "bfloat16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32", "int64",
                 "uint16", "uint32", "uint64")
}  # fmt: skip


def _dtype(array: torch.Tensor) -> str:
    return _NAMES.get(array.dtype) or str(array.dtype).removeprefix("torch.")


def device_type(array: torch.Tensor) -> str:
    """`array.device.type`; the two usual ones without making a device object."""
    return "cpu" if array.is_cpu else "cuda" if array.is_cuda else array.device.type


_PYTHON = torch._C.DispatchKey.Python


def is_traced(array: torch.Tensor) -> bool:
    """Whether what is called counts, and not its data: for compilers, fake tensors, and modes as make_fx has them."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return array.__class__ is not torch.Tensor and torch._C._dispatch_keys(array).has(_PYTHON)


def is_watched() -> bool:
    """Whether a transformation looks on: lanes, tangents, gradients of functions."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def needs_gradients(arrays: Arrays) -> bool:
    """Whether autograd is to know of a call of these; written out, for this is asked in each call."""
    if not torch.is_grad_enabled():
        return False
    if arrays.q.requires_grad or arrays.k.requires_grad or arrays.v.requires_grad:
        return True
    bias, sinks = arrays.bias, arrays.sinks
    return (bias is not None and bias.requires_grad) or (sinks is not None and sinks.requires_grad)


FRAMEWORK = Framework(
    name="torch",
    arrays=torch.Tensor,
    dtype=_dtype,
    device=lambda array: array.device,
    platform=device_type,
    has_float64=lambda: True,
    wants_gradient=lambda array: array.requires_grad and torch.is_grad_enabled(),
    takes_int64_seed=True,
    is_dense=lambda array: array.layout is torch.strided,
)


def negated(arrays: Arrays) -> Arrays:
    """Numbers as they lie in memory, which kernels read: the imaginary part of a conjugate is negated lazily."""
    if torch.compiler.is_compiling():  # which knows of no such tensors
        return arrays
    floats = {name: getattr(arrays, name) for name in ("q", "k", "v", "bias", "sinks")}
    changed = {name: x.resolve_neg() for name, x in floats.items() if x is not None and x.is_neg()}
    return arrays._replace(**changed) if changed else arrays


def signed(arrays: Arrays) -> Arrays:
    """Unsigned integers as int64: torch compares and subtracts few of the unsigned ones."""
    wide = {}
    others = {"q_segment_ids": arrays.kv_segment_ids, "kv_segment_ids": arrays.q_segment_ids}
    for name in ("q_offset", "q_segment_ids", "kv_segment_ids", "q_lengths", "kv_lengths"):
        value, other = getattr(arrays, name), others.get(name)
        if isinstance(value, torch.Tensor) and not value.dtype.is_signed:
            wide[name] = value.long()
            if value.dtype == torch.uint64 and (other is None or other.dtype.is_signed):
                # What int64 does not hold lies beyond every key, and is no signed id.
                beyond = FAR if other is None else torch.iinfo(torch.int64).max
                wide[name] = torch.where(wide[name] < 0, beyond, wide[name])
    if wide and arrays.kv_segment_ids is arrays.q_segment_ids:  # one tensor, which stays one
        wide["kv_segment_ids"] = wide.get("q_segment_ids", arrays.q_segment_ids)
    return arrays._replace(**wide) if wide else arrays


def indices(call: Call, arrays: Arrays) -> tuple[torch.Tensor, torch.Tensor]:
    """The indices of all queries (i,) and all keys (j,), int64."""
    device = arrays.q.device
    return torch.arange(call.i, device=device), torch.arange(call.j, device=device)


def positions(length: int, integers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The indices up to a length, and integers to compare them with, both int64."""
    return torch.arange(length, device=integers.device), integers.long()


def allowed(call: Call, arrays: Arrays) -> torch.Tensor | None:
    """`meaning.allowed` for the whole call: bool, broadcastable to (b, h, i, j), or None."""
    return meaning.allowed(call, arrays, *indices(call, arrays))


def custom(
    call: Call, s: torch.Tensor, may: torch.Tensor | None, first: int = 0, first_key: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`meaning.custom` for logits (b h n m) of all heads, and which pairs are allowed; first, first_key: of n and m."""
    b, h, query, key = (torch.arange(n, device=s.device) for n in s.shape)
    pairs = (b[:, None, None, None], h[None, :, None, None], (first + query)[None, None, :, None],
             (first_key + key)[None, None, None])  # fmt: skip
    return meaning.custom(FRAMEWORK, call, s, may, pairs, torch.where)


def contains(ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Which of wanted (b, m) are among ids (b, n), in memory linear in both: bool (b, m).

    Sorted together, ids before wanted where equal, an element is present if the nearest of ids before it is its equal.
    """
    n = ids.shape[1]
    values, order = torch.sort(torch.cat([ids, wanted], 1), stable=True)
    place = torch.arange(order.shape[1], device=ids.device).expand(order.shape)
    nearest = torch.where(order < n, place, -1).cummax(1).values
    found = (values.gather(1, nearest.clamp(min=0)) == values) & (nearest >= 0)
    return torch.zeros_like(found).scatter(1, order, found)[:, n:]


def hide(call: Call, arrays: Arrays) -> Arrays:
    """`meaning.hide` for the whole call."""
    if call.key_masked or call.kv_lengths or call.segments or call.q_lengths:
        return meaning.hide(call, arrays, *indices(call, arrays), torch.where, contains)
    return arrays


def hide_rows(call: Call, arrays: Arrays, out: torch.Tensor) -> torch.Tensor:
    """0 in the rows of out (b h i dv) that q_lengths empties, which keeps their cotangents out as well."""
    rows: Any = meaning.dead_queries(call, arrays, indices(call, arrays)[0])
    return torch.where(rows[:, None, :, None], 0, out)

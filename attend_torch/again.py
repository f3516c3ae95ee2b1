"""What the door finds of a call, remembered for calls like it.

To check a call and to choose for it takes longer than a short call runs. Both hang on shapes, dtypes, devices, options
and on whether a gradient may be asked for, and on the file of ATTEND_AVOID, with which all of this is forgotten. So
they are done once for all calls that are equal in these, and looked up for the others.

What has no key here is found anew each time: a call at which something looks on (a compiler, a mode, a transformation),
which may see more in it than that; one with functions; and one with arguments of another type than the usual, which may
be equal to what is right, and wrong: 1 is True.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from attend_shared import avoid, choice, runs
from attend_shared.call import Arrays, Call, canonical, check
from attend_torch.arrays import FRAMEWORK, negated, signed
from attend_torch.implementations import PACKING, table
from attend_torch.philox import seed_words

Result = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]
_Tensor, _Parameter, _dense = torch.Tensor, torch.nn.Parameter, torch.strided
_is_compiling, _has_gradients = torch.compiler.is_compiling, torch.is_grad_enabled
_has_autocast, _has_modes = torch._C._is_any_autocast_enabled, torch._C._len_torch_dispatch_stack
_interpreter = torch._C._functorch.peek_interpreter_stack


class Choice(NamedTuple):
    """What an implementation gets.

    Attributes:
        call: as it takes it.
        module: of the implementation.
        packs: whether it takes where runs start in the place of segment ids.
    """

    call: Call
    module: Any
    packs: bool


class Way(NamedTuple):
    """Where a call goes.

    Attributes:
        call: as `check` gave it.
        looks: whether its segment ids have to be looked at first.
        state: else what they are, as in `Call.runs`.
        choices: by what they are.
        shorts: the same, for calls at which nothing looks on: (arrays as the caller passed them) -> what `attend` of
            the library returns, or None.
    """

    call: Call
    looks: bool
    state: str
    choices: dict[str, Choice]
    shorts: dict[str, Callable[[Arrays], Any] | None]

    def short(self, state: str) -> Callable[[Arrays], Any] | None:
        """The shortest way that what is chosen has.

        Raises:
            As `choice`.
        """
        try:
            return self.shorts[state]
        except KeyError:
            call, module, packs = self.choice(state)
            make = None if packs else getattr(module.attend, "short", None)
            found = self.shorts[state] = make and make(call, partial(form, call))
            return found

    def choice(self, state: str) -> Choice:
        """What is chosen where segment ids are this.

        Raises:
            UnsupportedError: no implementation that was asked for can serve the call.
        """
        found = self.choices.get(state)
        if found is None:
            call = self.call._replace(runs=state) if state else self.call
            entry = choice.choose(table(None if call.names else call), call)
            packs = entry.name == PACKING
            found = self.choices[state] = Choice(call if packs else self.call, entry.module, packs and bool(state))
        return found


def form(call: Call, arrays: Arrays) -> Arrays:
    """What implementations get of what the caller passed."""
    arrays = canonical(call, negated(arrays))
    if call.segments or call.q_lengths or call.kv_lengths or call.offset == "data":
        arrays = signed(arrays)
    if call.dropout:
        arrays = arrays._replace(dropout_seed=seed_words(arrays.dropout_seed, arrays.q.device))
    return arrays


def way(key: Hashable, arrays: Arrays, *options: Any) -> Way:
    """Where the call goes, remembered by its key if it has one.

    Args:
        key: as `key` gives it.
        arrays: as the caller passed them.
        options: as `check` takes them behind the arrays.

    Raises:
        As `check`.
    """
    call = check(FRAMEWORK, arrays, *options)
    looks = call.segments and not call.is_empty and runs.reaches(table(call), call, PACKING)
    found = Way(call, looks, runs.PACKED if call.segments and call.is_empty else runs.NOT_LOOKED, {}, {})
    if key is not None:
        avoid.remember(key, found)
    return found


def result(
    q: Any, k: Any, v: Any, is_causal: Any, window_size: Any, softcap: Any, scale: Any, dropout: Any, return_lse: Any,
    layout: Any, implementation: Any,
) -> Result | None:  # fmt: skip
    """The shortest way, for calls of q, k, v and nothing else.

    Args:
        As in `attend`.

    Returns:
        (q, k, v) -> what `attend` returns; None where a call has no key.

    Raises:
        As `attend`.
    """
    if not (
        q.__class__ is k.__class__ is v.__class__ is _Tensor
        and _is_usual(is_causal, window_size, softcap, scale, dropout, return_lse)
        and (dtype := q.dtype) is k.dtype is v.dtype
        and (device := q.device) == k.device == v.device
        and q.layout is k.layout is v.layout is _dense
        and not (q.is_neg() or k.is_neg() or v.is_neg())
    ):
        return None
    gradient = _has_gradients() and (q.requires_grad or k.requires_grad or v.requires_grad)
    key = (q.shape, k.shape, v.shape, dtype, device, gradient, is_causal, window_size, softcap, scale, dropout,
           return_lse, layout, implementation)  # fmt: skip
    try:
        return avoid.CHOICES[key]
    except KeyError:
        pass
    except TypeError:  # a list of names has no hash
        return None
    options = is_causal, window_size, softcap, scale, dropout, return_lse, layout, implementation
    call = check(FRAMEWORK, Arrays(q, k, v), *options)
    module = choice.choose(table(None if call.names else call), call).module
    shorter = getattr(module.attend, "plain", None)
    found: Result = (shorter(call) if shorter else None) or _plain(module, call)
    if not torch.jit.is_tracing():  # where sizes are tensors
        avoid.remember(key, found)
    return found


def _is_usual(
    is_causal: Any, window_size: Any, softcap: Any, scale: Any, dropout: Any, return_lse: Any
) -> bool:  # fmt: skip
    """Whether nothing looks on, and options are of types in which only equals are equal."""
    return (
        not (_is_compiling() or _has_autocast() or _has_modes())
        and _interpreter() is None and forward_ad._current_level < 0
        and is_causal.__class__ is return_lse.__class__ is bool
        and dropout.__class__ is float
        and (scale is None or scale.__class__ is float)
        and (softcap is None or softcap.__class__ is float)
        and (window_size is None
             or (window_size.__class__ is tuple and all(x is None or x.__class__ is int for x in window_size)))
    )  # fmt: skip


def key(
    arrays: Arrays, is_causal: Any, window_size: Any, softcap: Any, scale: Any, dropout: Any, return_lse: Any,
    layout: Any, implementation: Any, flash: Any, score_fn: Any, mask_fn: Any,
) -> Hashable:  # fmt: skip
    """What the door finds hangs on this; None: on more."""
    if score_fn is not None or mask_fn is not None or not (flash is None or flash.__class__ is bool):
        return None
    if not _is_usual(is_causal, window_size, softcap, scale, dropout, return_lse) or torch.jit.is_tracing():
        return None
    parts: list[Any] = [
        _has_gradients(), is_causal, window_size, softcap, scale, dropout, return_lse, layout, implementation, flash,
        arrays.q_lengths is arrays.kv_lengths,
    ]  # fmt: skip
    for x in arrays:
        if x is None:
            parts.append(None)
        elif x.__class__ is _Tensor or x.__class__ is _Parameter:
            parts += x.shape, x.dtype, x.device, x.layout, x.requires_grad
        elif x is arrays.q_offset and x.__class__ is int:
            parts.append(x)
        else:
            return None
    found = tuple(parts)
    try:
        hash(found)
    except TypeError:  # a list of names
        return None
    return found


def _plain(module: Any, call: Call) -> Result:
    """By what every implementation has. `attend.plain` of some is shorter, and goes where another takes its place."""

    def found(q: Any, k: Any, v: Any) -> Any:
        out, lse = module.attend(call, canonical(call, Arrays(q, k, v)))
        if call.layout == "bnhd":
            out = out.transpose(1, 2)
        return (out, lse) if call.return_lse else out

    return found

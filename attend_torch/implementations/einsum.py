"""The formula as it is written: einsum, a softmax in the accumulation dtype, einsum. It refuses nothing."""

from __future__ import annotations

import torch
from einops import rearrange

from attend_shared.call import Arrays, Call
from attend_torch import philox
from attend_torch.arrays import allowed, custom, hide, hide_rows


def unavailable() -> str | None:
    """None: it can always run."""
    return None


def refusal(call: Call) -> str | None:
    """None: it serves every call."""
    return None


def attend(call: Call, arrays: Arrays) -> tuple[torch.Tensor, torch.Tensor]:
    """out (b h i dv) in q's dtype, and lse (b h i) in the accumulation dtype.

    Differentiable any number of times, forward and reverse.
    """
    arrays = hide(call, arrays)
    out, lse = compute(call, arrays)
    return hide_rows(call, arrays, out) if call.q_lengths else out, lse


def compute(call: Call, arrays: Arrays, first: int = 0, first_key: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula on arrays from which nothing can leak.

    `first` and `first_key` are what the indices of queries and keys begin with, for custom scores; dropout's keys
    begin with 0.
    """
    wide = getattr(torch, call.accumulation)
    q = rearrange(arrays.q.to(wide), "b (hk g) i d -> b hk g i d", hk=call.hk)
    s = torch.einsum("b k g i d, b k j d -> b k g i j", q, arrays.k.to(wide)) * call.scale
    s = rearrange(s, "b hk g i j -> b (hk g) i j")
    if call.softcap is not None:
        s = call.softcap * torch.tanh(s / call.softcap)
    if arrays.bias is not None:
        s = s + arrays.bias.to(wide)
    may = allowed(call, arrays)
    if call.custom:
        s, may = custom(call, s, may, first, first_key)
    if may is not None:
        s = torch.where(may, s, -torch.inf)
    p, lse = _softmax(s, arrays.sinks)
    if call.dropout:
        keep = philox.keep_mask(arrays.dropout_seed, call.b, call.h, call.i, call.j, call.dropout, first)
        p = torch.where(keep, p, 0) / (1 - call.dropout)
    p = rearrange(p, "b (hk g) i j -> b hk g i j", hk=call.hk)
    out = torch.einsum("b k g i j, b k j e -> b k g i e", p, arrays.v.to(wide))
    out = rearrange(out, "b hk g i e -> b (hk g) i e").to(arrays.q.dtype)
    return out, lse


def _softmax(s: torch.Tensor, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(s - lse) and lse of logits (b h i j), an empty row giving zeros and -inf (or its sink).

    By PyTorch's own softmax: on the way back it rounds less than exp, sum and division do one after the other.
    """
    keys = s.shape[-1]
    if sinks is not None:
        s = torch.cat((s, sinks.to(s.dtype)[:, None, None].expand(*s.shape[:-1], 1)), -1)
    top = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -torch.inf)
    empty = top == -torch.inf
    s, top = s.masked_fill(empty, 0), top.masked_fill(empty, 0)  # -inf - -inf would be NaN, here and on the way back
    p = (torch.softmax(s, -1) * ~empty)[..., :keys]
    # Not by logsumexp, which makes exp(s - lse) on the way back: where logits are huge, log(total) is lost in lse.
    lse = torch.log(torch.exp(s - top).sum(-1, keepdim=True)) + top
    return p, torch.where(empty, -torch.inf, lse).squeeze(-1)

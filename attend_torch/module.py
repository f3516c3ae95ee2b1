"""`Attend`: the module that models hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from attend_shared.call import Arrays, check_module
from attend_torch.attend import attend, run


class Attend(nn.Module):
    """`attend` as a module without parameters: it holds the options, the call brings the arrays.

    PyTorch: a torch.nn.Module. It drops in training, as train() and eval() say, with a seed from torch's default
    generator.

        Attend(options)(q, k, v, mask, ...) = attend(q, k, v, mask, ..., options)

    Args:
        dropout: the probability of dropping a weight in training, 0 <= dropout < 1.
        flash: None chooses; True demands an implementation that makes no q_len x kv_len array beyond one that the
            caller passes; False is einsum.
        scale: any finite number; None is d ** -0.5.
        is_causal: key j is allowed where j <= t + q_offset.
        window_size: (left, right), each a whole number >= 0 or None; see `attend`.
        softcap: a number > 0, or None for none.
        layout: "bhnd" or "bnhd".
        implementation: a name, a sequence of names, or None; not together with flash.

    Called with q, k, v, mask, bias, q_offset, q_segment_ids, kv_segment_ids, q_lengths, kv_lengths, sinks,
    dropout_seed, return_lse, score_fn and mask_fn, all as in `attend`: functions come with the call, since what they
    capture, such as a model's table of biases, may change from call to call. Where it drops and is given no
    dropout_seed, it draws one.

    Returns:
        What `attend` returns.

    Raises:
        TypeError, ValueError: a wrong option, when the module is made; a wrong argument, when it is called.
        UnsupportedError: no implementation that was asked for can serve the call.

    Example:
        >>> attention = Attend(scale=1.0, is_causal=True)
        >>> x = torch.eye(2)[None, None]                                 # (b, h, n, d) = (1, 1, 2, 2)
        >>> attention(x, x, x)[0, 0]
        tensor([[1.0000, 0.0000],
                [0.2689, 0.7311]])

    References:
        docs/semantics.md: every argument with a worked example.
    """

    def __init__(
        self,
        dropout: float = 0.0,
        flash: bool | None = None,
        scale: float | None = None,
        *,
        is_causal: bool = False,
        window_size: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        layout: str = "bhnd",
        implementation: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        window_size, implementation = check_module(
            dropout, flash, scale, is_causal, window_size, softcap, layout, implementation
        )
        self.dropout = dropout
        self.flash = flash
        self.scale = scale
        self.is_causal = is_causal
        self.window_size = window_size
        self.softcap = softcap
        self.layout = layout
        self.implementation = implementation

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        bias: torch.Tensor | None = None,
        q_offset: int | torch.Tensor | None = None,
        q_segment_ids: torch.Tensor | None = None,
        kv_segment_ids: torch.Tensor | None = None,
        q_lengths: torch.Tensor | None = None,
        kv_lengths: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        dropout_seed: int | torch.Tensor | None = None,
        return_lse: bool = False,
        score_fn: Callable[..., Any] | None = None,
        mask_fn: Callable[..., Any] | None = None,
    ) -> Any:
        """`attend` with this module's options. In training with dropout > 0 and no seed, one is drawn from torch's
        default generator of q's device."""
        dropout = self.dropout if self.training else 0.0
        if dropout and dropout_seed is None and isinstance(q, torch.Tensor):
            dropout_seed = torch.randint(-(2**63), 2**63 - 1, (), device=q.device)
        if self.flash is None:
            return attend(
                q, k, v, mask, bias=bias, is_causal=self.is_causal, q_offset=q_offset, window_size=self.window_size,
                q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids, q_lengths=q_lengths, kv_lengths=kv_lengths,
                sinks=sinks, softcap=self.softcap, scale=self.scale, dropout=dropout, dropout_seed=dropout_seed,
                return_lse=return_lse, layout=self.layout, implementation=self.implementation, score_fn=score_fn,
                mask_fn=mask_fn,
            )  # fmt: skip
        arrays = Arrays(
            q, k, v, mask, bias, q_offset, q_segment_ids, kv_segment_ids, q_lengths, kv_lengths, sinks, dropout_seed
        )
        return run(arrays, self.is_causal, self.window_size, self.softcap, self.scale, dropout, return_lse, self.layout,
                   self.implementation, self.flash, score_fn, mask_fn)  # fmt: skip

    def extra_repr(self) -> str:
        """The options that are not at their defaults."""
        defaults = {"dropout": 0.0, "is_causal": False, "layout": "bhnd"}
        names = ("dropout", "flash", "scale", "is_causal", "window_size", "softcap", "layout", "implementation")
        return ", ".join(f"{n}={getattr(self, n)!r}" for n in names if getattr(self, n) != defaults.get(n))

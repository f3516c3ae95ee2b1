"""`Attend` in the place of x_transformers' own, for what both can say: causal, mask, attn_bias, scale, dropout.

    import x_transformers.x_transformers as host
    host.Attend = attend_torch.hooks.x_transformers.Attend    # before the model is built

Everything else that x_transformers 2.31 can do between logits and output is refused by the name of its option.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from einops import rearrange
from torch import nn

from attend_shared.errors import UnsupportedError
from attend_torch import module
from attend_torch.attend import attend

HEADLINE = "attend cannot stand in for the Attend of x_transformers with:"
ADVICE = "Leave them at their defaults, or keep the Attend of x_transformers for this layer."
TALKING = "it mixes the weights of different heads"
SOFTMAX = "its weights are not a softmax of the logits"
WEIGHTS = "a fused attention keeps neither logits nor weights"
SDP_KWARGS = {"enable_flash": True, "enable_math": True, "enable_mem_efficient": True}

# Options that must be off, and why: in the order of the host's constructor, then of its call.
REFUSED = {
    "pre_talking_heads": TALKING,
    "post_talking_heads": TALKING,
    "pre_scale_post_talking_heads": TALKING,
    "sparse_topk": "it keeps the largest logits only",
    "l2_distance": "its logits are distances, not products",
    "sigmoid": SOFTMAX,
    "gumbel_softmax": SOFTMAX,
    "cog_signed": SOFTMAX,
    "custom_attn_fn": SOFTMAX,
    "softclamp_logits": "it clamps after attn_bias is added, where attend caps before",
    "add_zero_kv": "it adds a key and a value of zeros",
    "head_learned_sink": "the sinks are a parameter of the host's Attend, and this one has none",
    "selective": "it lets logits lower each other",
    "hard": SOFTMAX,
    "cope": "it adds positions that depend on the logits",
    "onnxable": "its operators are chosen for an export to ONNX",
    "inverted_attention": "it normalises over the queries",
    "sdp_kwargs": "it names kernels of torch; implementation= names one here",
    "flash_pack_seq": "it needs packed sequences of flash-attn",
    "prev_attn": "it adds the logits of the layer before (residual attention)",
    "attn_delta": "it adds to the weights",
    "flash_pack_seq_kwargs": "it needs packed sequences of flash-attn",
}


class Attend(nn.Module):
    """The Attend of x_transformers on `attend`, with the same arguments.

    out = attend(q, k, v, mask, bias=attn_bias, is_causal=causal, q_offset=j - i, scale=scale)

    What the host means, kept:
      - causal is aligned bottom-right: the last query sits at the last key;
      - query head n reads key/value head n % hk, where `attend` reads n // (h // hk);
      - attn_bias may have rank 2 (i, j), 3 (h, i, j) or 4.
    What differs:
      - a row that may attend to nothing is 0, whatever emptied it. The host gives 0 where the mask alone does, and the
        mean of all values, later ones too, where the mask and causal do it together (left padding), or causal (i > j);
      - the logits and weights of the intermediates cannot be read: UnsupportedError;
      - flash is without effect: `implementation` decides.

    Args:
        dropout: the probability of dropping a weight in training. The seed comes from torch's default generator.
        causal: whether queries see no later key.
        heads, qk_norm, flash: accepted, without effect. The softmax is never narrower than float32.
        scale: None for d ** -0.5, or a number.
        implementation: as in `attend`; the host has no such argument.
        sparse_topk_straight_through, gumbel_softmax_temp, gumbel_softmax_hard, logit_softclamp_value: accepted, without
            effect, since what they belong to must be off.
        The rest: off, as by default.

    Raises:
        UnsupportedError: an option that must be off; it names every one.
        TypeError, ValueError: a wrong argument.

    Example:
        >>> Attend(causal=True, scale=10, heads=4)
        Attend(causal=True, scale=10)
        >>> Attend(causal=True, softclamp_logits=True, heads=4)
        Traceback (most recent call last):
        ...
        attend_shared.errors.UnsupportedError: attend cannot stand in for the Attend of x_transformers with:
          softclamp_logits: it clamps after attn_bias is added, where attend caps before
        Leave them at their defaults, or keep the Attend of x_transformers for this layer.

    References:
        x_transformers.attend.Attend, https://github.com/lucidrains/x-transformers
    """

    def __init__(
        self,
        *,
        dropout: float = 0.0,
        causal: bool = False,
        heads: int | None = None,
        pre_talking_heads: bool = False,
        post_talking_heads: bool = False,
        pre_scale_post_talking_heads: bool = False,
        sparse_topk: int | None = None,
        sparse_topk_straight_through: bool = False,
        scale: float | None = None,
        qk_norm: bool = False,
        l2_distance: bool = False,
        sigmoid: bool = False,
        gumbel_softmax: bool = False,
        gumbel_softmax_temp: float = 1.0,
        gumbel_softmax_hard: bool = True,
        cog_signed: bool = False,
        custom_attn_fn: Any = None,
        flash: bool = False,
        softclamp_logits: bool = False,
        logit_softclamp_value: float = 50.0,
        add_zero_kv: bool = False,
        head_learned_sink: bool = False,
        selective: bool = False,
        hard: bool = False,
        cope: Any = None,
        onnxable: bool = False,
        inverted_attention: bool = False,
        sdp_kwargs: dict[str, bool] | None = None,
        flash_pack_seq: bool = False,
        implementation: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        _refuse(
            pre_talking_heads=pre_talking_heads, post_talking_heads=post_talking_heads,
            pre_scale_post_talking_heads=pre_scale_post_talking_heads, sparse_topk=sparse_topk, l2_distance=l2_distance,
            sigmoid=sigmoid, gumbel_softmax=gumbel_softmax, cog_signed=cog_signed, custom_attn_fn=custom_attn_fn,
            softclamp_logits=softclamp_logits, add_zero_kv=add_zero_kv, head_learned_sink=head_learned_sink,
            selective=selective, hard=hard, cope=cope, onnxable=onnxable, inverted_attention=inverted_attention,
            sdp_kwargs=sdp_kwargs is not None and sdp_kwargs != SDP_KWARGS, flash_pack_seq=flash_pack_seq,
        )  # fmt: skip
        checked = module.Attend(dropout, scale=scale, is_causal=causal, implementation=implementation)
        self.implementation = checked.implementation
        self.dropout = dropout
        self.causal = causal
        self.scale = scale

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None = None,
        attn_bias: torch.Tensor | None = None,
        prev_attn: torch.Tensor | None = None,
        attn_delta: torch.Tensor | None = None,
        row_mask: torch.Tensor | None = None,
        flash_pack_seq_kwargs: dict | None = None,
        causal: bool | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """What the host's Attend returns: the output and its Intermediates.

        Args:
            q, k, v: (b, h, i, d), (b, hk, j, d), (b, hk, j, dv); h is a multiple of hk.
            mask: bool, True = may attend: (b, j), or rank 4 against (b, h, i, j).
            attn_bias: floating (i, j), (h, i, j), or rank 4 against (b, h, i, j), each axis 1 or full.
            row_mask: without effect, as in the host: inverted_attention alone reads it.
            causal: instead of the constructor's, where it is not None.
            prev_attn, attn_delta, flash_pack_seq_kwargs: None.

        Returns:
            out (b, h, i, dv), and x_transformers.attend.Intermediates without logits and weights.

        Raises:
            UnsupportedError: an option that must be None; it names every one.
            TypeError, ValueError: what `attend` raises.
        """
        _refuse(prev_attn=prev_attn, attn_delta=attn_delta, flash_pack_seq_kwargs=flash_pack_seq_kwargs)
        if attn_bias is not None and attn_bias.ndim in (2, 3):
            attn_bias = attn_bias[(None,) * (4 - attn_bias.ndim)]
        h, hk = q.shape[1], k.shape[1]
        tiled = 1 < hk < h and h % hk == 0
        if tiled:  # query heads go where attend groups them, which costs less than copies of k and v
            q, mask, attn_bias = (_per_head(x, h, "b (g hk) i d -> b (hk g) i d", hk) for x in (q, mask, attn_bias))
        causal = self.causal if causal is None else causal
        dropout = self.dropout if self.training else 0.0
        seed = torch.randint(-(2**63), 2**63 - 1, (), device=q.device) if dropout else None
        out = attend(
            q, k, v, mask, bias=attn_bias, is_causal=causal, q_offset=k.shape[2] - q.shape[2] if causal else None,
            scale=self.scale, dropout=dropout, dropout_seed=seed, implementation=self.implementation,
        )  # fmt: skip
        if tiled:
            out = _per_head(out, h, "b (hk g) i d -> b (g hk) i d", hk)
        return out, _intermediates()()

    def extra_repr(self) -> str:
        """The options that are not at their defaults."""
        defaults = {"dropout": 0.0, "causal": False, "scale": None, "implementation": None}
        return ", ".join(f"{n}={getattr(self, n)!r}" for n, default in defaults.items() if getattr(self, n) != default)


def _refuse(**options: Any) -> None:
    """Raise where an option is on: neither None nor False."""
    on = tuple((name, REFUSED[name]) for name, value in options.items() if value is not None and value is not False)
    if on:
        raise UnsupportedError(on, HEADLINE, ADVICE)


def _per_head(x: torch.Tensor | None, h: int, pattern: str, hk: int) -> Any:
    """Reorder the head axis of a rank-4 array that has one."""
    return x if x is None or x.ndim != 4 or x.shape[1] != h else rearrange(x, pattern, hk=hk)


@cache
def _intermediates() -> type:
    """The host's Intermediates, of which the logits and weights cannot be read.

    None would not do: AttentionLayers(residual_attn=True) takes a None for "no layer before" and goes on without.
    """
    from x_transformers.attend import Intermediates

    def unreadable(name: str) -> property:
        def read(self: Any) -> None:
            raise UnsupportedError(((name, WEIGHTS),), HEADLINE, ADVICE)

        return property(read, lambda self, value: None)

    names = ("qk_similarities", "pre_softmax_attn", "post_softmax_attn")
    members = {name: unreadable(name) for name in names} | {"__repr__": object.__repr__}
    return type("Intermediates", (Intermediates,), members)

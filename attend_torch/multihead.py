"""`MultiHeadAttention`: the projections around `attend`, for torch.nn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attend_shared.call import is_int
from attend_shared.layers import (
    Cache,
    Sizes,
    check_cache_size,
    check_context,
    check_inputs,
    check_layer,
    check_store,
    sees_no_later,
)
from attend_shared.rotary import Rotary, rotation
from attend_torch.arrays import FRAMEWORK
from attend_torch.module import Attend
from attend_torch.rotary import rotate


class MultiHeadAttention(nn.Module):
    """Multi-head attention with its projections, over `attend`: self-attention, cross-attention, cached decoding.

    PyTorch: a torch.nn.Module. device and dtype are those of the parameters. It drops in training, as train() and
    eval() say, with a seed from torch's default generator.

        q = rotate(norm(query(x)))    k = rotate(norm(key(context)))    v = value(context)
        out(attend(q, k, v, ...))     context is x where there is none

    Parameters: query, key, value and out, each with a weight and perhaps a bias; query_norm and key_norm where there is
    a qk_norm; sinks where there are sinks. Weights start uniform in (-a, a) with a = sqrt(6 / (fan_in + fan_out)), of
    the projection as a matrix (embed_dim x num_heads head_dim, and so on); biases and sinks at 0, norms at 1.
    docs/layers.md says how they carry over between the frameworks.

    Args:
        embed_dim: width of x.
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of num_heads; None is num_heads.
        head_dim: size of a head of queries and keys; None is embed_dim // num_heads.
        value_dim: size of a head of values; None is head_dim.
        kv_dim: width of the context; None is embed_dim.
        out_dim: width of what comes out; None is embed_dim.
        use_bias: whether the projections have a bias: a bool, or four of them for query, key, value and out.
        qk_norm: "rms" or "layer": queries and keys are normalised, each head by itself, before they turn; None.
        norm_eps: of qk_norm.
        rotary: a `Rotary`, or None.
        is_causal, window_size, softcap, scale, implementation: as in `attend`.
        sinks: whether there is a learned sink for each query head.
        dropout: the probability of dropping an attention weight in training.

    Called with x, and as needed context, mask, bias, positions, kv_positions, cache, q_offset, q_segment_ids,
    kv_segment_ids, q_lengths, kv_lengths, dropout_seed, score_fn and mask_fn.

    Returns:
        (b, i, out_dim); with a cache, that and the cache with the new keys and values.

    Raises:
        TypeError, ValueError: a wrong option, when the module is made; a wrong argument, when it is called.
        UnsupportedError: no implementation that was asked for can serve the call.

    Example:
        >>> layer = MultiHeadAttention(8, 4, num_kv_heads=2, rotary=Rotary(), is_causal=True)
        >>> x = torch.arange(24.0).sin().reshape(1, 3, 8)                # (b, i, embed_dim)
        >>> whole = layer(x)
        >>> cache = layer.make_cache(1, 4)
        >>> steps = []
        >>> for t in range(3):
        ...     out, cache = layer(x[:, t : t + 1], cache=cache)
        ...     steps.append(out)
        >>> torch.allclose(whole, torch.cat(steps, 1), atol=1e-5), int(cache.length)
        (True, 3)

    References:
        docs/layers.md: every option and input, the cache, and how weights carry over.
        Vaswani et al., Attention is all you need (2017). Glorot, Bengio, Understanding the difficulty of training deep
        feedforward neural networks (2010): the initial weights. Henry et al., Query-key normalization (2020).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        *,
        kv_dim: int | None = None,
        out_dim: int | None = None,
        use_bias: bool | Sequence[bool] = True,
        qk_norm: str | None = None,
        norm_eps: float = 1e-6,
        rotary: Rotary | None = None,
        is_causal: bool = False,
        window_size: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        sinks: bool = False,
        dropout: float = 0.0,
        implementation: str | Sequence[str] | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = check_layer(
            embed_dim, num_heads, num_kv_heads, head_dim, value_dim, kv_dim, out_dim, use_bias, qk_norm, norm_eps,
            rotary, sinks,
        )  # fmt: skip
        super().__init__()
        self.attend = Attend(
            dropout, None, scale, is_causal=is_causal, window_size=window_size, softcap=softcap,
            implementation=implementation,
        )  # fmt: skip
        self.sizes = sizes
        self.rotary = rotary
        self.turning = None if rotary is None else rotation(rotary, sizes.d)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        c, _, _, h, hk, d, dv, bias = sizes
        self.query = nn.Linear(c, h * d, bias[0], **made)
        self.key = nn.Linear(sizes.kv_dim, hk * d, bias[1], **made)
        self.value = nn.Linear(sizes.kv_dim, hk * dv, bias[2], **made)
        self.out = nn.Linear(h * dv, sizes.out_dim, bias[3], **made)
        self.query_norm, self.key_norm = (Norm(qk_norm, d, norm_eps, **made) if qk_norm else None for _ in range(2))
        self.sinks = nn.Parameter(torch.empty(h, **made)) if sinks else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, from torch's default generator."""
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for norm in (self.query_norm, self.key_norm):
            if norm is not None:
                norm.reset_parameters()
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def forward(
        self,
        x: Tensor,
        context: Tensor | tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        positions: Tensor | None = None,
        kv_positions: Tensor | None = None,
        cache: Cache | None = None,
        q_offset: int | Tensor | None = None,
        q_segment_ids: Tensor | None = None,
        kv_segment_ids: Tensor | None = None,
        q_lengths: Tensor | None = None,
        kv_lengths: Tensor | None = None,
        dropout_seed: int | Tensor | None = None,
        score_fn: Callable[..., Any] | None = None,
        mask_fn: Callable[..., Any] | None = None,
    ) -> Any:
        """Attend from x to the context, or to x itself, after what the cache holds.

        Args:
            x: (b, i, embed_dim), floating.
            context: (b, j, kv_dim), or the pair (k, v) that `project` made of it; None is x.
            mask, bias: as in `attend`, against (b, num_heads, i, j); with a cache, j is its size.
            positions: integers (i,), (1, i) or (b, i), what the queries and keys of x turn by where there is a rotary;
                None counts from 0, or from what the cache holds.
            kv_positions: the same of the context: (j,), (1, j) or (b, j); None counts from 0.
            cache: keys and values of what came before; query t then stands at key cache.length + t.
            q_offset, q_segment_ids, kv_segment_ids, q_lengths, kv_lengths, dropout_seed, score_fn, mask_fn: as in
                `attend`.

        Returns:
            (b, i, out_dim); with a cache, (that, the cache with i more slots filled). Where a cache whose length is an
            array overflows, what comes out is NaN; where its length is an int, it is a ValueError.
        """
        return forward(
            self, self.sinks, x, context, mask, bias, positions, kv_positions, cache, q_offset, q_segment_ids,
            kv_segment_ids, q_lengths, kv_lengths, dropout_seed=dropout_seed, score_fn=score_fn, mask_fn=mask_fn,
        )  # fmt: skip

    def project(self, context: Tensor, kv_positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The keys and values of a context, to be passed as context: computed once, and read by many calls.

        Args:
            context: (b, j, kv_dim).
            kv_positions: as in the call.

        Returns:
            k (b, hk, j, head_dim) and v (b, hk, j, value_dim).
        """
        check_context(FRAMEWORK, self.sizes, context, kv_positions)
        return keys_values(self, context, kv_positions)

    def make_cache(self, batch: int, length: int, dtype: torch.dtype | None = None) -> Cache:
        """An empty cache of a fixed size.

        Args:
            batch: b.
            length: the slots, for as many tokens as will ever be cached.
            dtype: of keys and values as they are computed; None is that of the module, or of its parameters.

        Returns:
            Cache(k, v, length) of zeros: (b, hk, length, head_dim), (b, hk, length, value_dim), and an integer ().
        """
        return empty_cache(self.sizes, batch, length, dtype or self.query.weight.dtype, self.query.weight.device)


def forward(
    layer: Any, sinks: Tensor | None, x: Tensor, context: Any, mask: Tensor | None, bias: Tensor | None,
    positions: Tensor | None, kv_positions: Tensor | None, cache: Cache | None, q_offset: int | Tensor | None,
    q_segment_ids: Tensor | None, kv_segment_ids: Tensor | None, q_lengths: Tensor | None, kv_lengths: Tensor | None,
    **others: Any,
) -> Any:  # fmt: skip
    """The call of a layer: its sizes, rotary, attend, projections and norms, and its inputs in the order of the call.

    `others` go to attend as they are.
    """
    check_inputs(FRAMEWORK, layer.sizes, x, context, positions, kv_positions, cache, q_offset, kv_lengths)
    b, i, _ = x.shape
    start: Any = 0 if cache is None else cache.length
    if positions is None:
        positions = torch.arange(i, device=x.device) + start
    q = _turn(layer, _normed(layer.query_norm, _heads(layer.query(x), layer.sizes.h)), positions)  # (b h i d)
    if isinstance(context, tuple):
        k, v = context
    elif context is None:
        k, v = keys_values(layer, x, positions)
    else:
        k, v = keys_values(layer, context, kv_positions)
    if cache is not None:
        check_store(cache, k, v)
        cache = store(cache, k, v)
        k, v, q_offset = cache.k, cache.v, start
        if not sees_no_later(layer.attend.is_causal, layer.attend.window_size):
            kv_lengths = filled(cache.length, b, kv_lengths, x.device)
    out = layer.attend(
        q, k, v, mask, bias=bias, q_offset=q_offset, q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids,
        q_lengths=q_lengths, kv_lengths=kv_lengths, sinks=sinks, **others,
    )  # fmt: skip
    out = layer.out(out.transpose(1, 2).flatten(2))  # (b h i dv) -> (b i (h dv)) -> (b i out_dim)
    return out if cache is None else (overflowed(start, cache, out), cache)


def keys_values(layer: Any, context: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """k (b hk j d), normalised and turned, and v (b hk j dv) of a context (b j kv_dim)."""
    if positions is None:
        positions = torch.arange(context.shape[1], device=context.device)
    k = _turn(layer, _normed(layer.key_norm, _heads(layer.key(context), layer.sizes.hk)), positions)
    return k, _heads(layer.value(context), layer.sizes.hk).transpose(1, 2)


def empty_cache(sizes: Sizes, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Cache:
    """A cache of zeros."""
    check_cache_size(batch, length)
    k, v = (torch.zeros((batch, sizes.hk, length, d), dtype=dtype, device=device) for d in (sizes.d, sizes.dv))
    return Cache(k, v, torch.zeros((), dtype=torch.int64, device=device))


def store(cache: Cache, k: Tensor, v: Tensor) -> Cache:
    """A cache with new keys and values (b hk i d), (b hk i dv) behind those that it holds."""
    i = k.shape[2]
    slots = torch.arange(i, device=k.device) + cache.length
    if not is_int(cache.length):
        slots = slots.clamp(0, cache.k.shape[2] - 1)  # beyond it is an overflow, which `overflowed` tells
    return Cache(cache.k.index_copy(2, slots, k), cache.v.index_copy(2, slots, v), cache.length + i)


def filled(length: int | Tensor, b: int, kv_lengths: Tensor | None, device: torch.device) -> Tensor:
    """The filled slots of a cache as kv_lengths (b,), or those given where they are less."""
    lengths = torch.as_tensor(length, dtype=torch.int64, device=device).expand(b)
    return lengths if kv_lengths is None else torch.minimum(lengths, kv_lengths.long())


def overflowed(start: int | Tensor, cache: Cache, out: Tensor) -> Tensor:
    """NaN where more was stored than the cache has room for: its length is data, so this cannot be an error."""
    if is_int(start):
        return out
    outside = (start < 0) | (cache.length > cache.k.shape[2])
    return torch.where(outside.to(out.device), torch.nan, out)


class Norm(nn.Module):
    """`normalise` with its parameters, under torch's names. torch's own RMS norm warns under autocast.

    Args:
        kind: "rms" or "layer". d: the size of a head. eps: see `normalise`. device, dtype: of the parameters.
    """

    def __init__(
        self, kind: str, d: int, eps: float, device: torch.device | str | int | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(d, device=device, dtype=dtype)) if kind == "layer" else None

    def reset_parameters(self) -> None:
        """Back to 1 and 0."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (... d), normalised."""
        return normalise(x, self.weight, self.bias, self.eps)


def normalise(x: Tensor, scale: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """scale * x / sqrt(mean(x ** 2) + eps), or with a bias that of x - mean(x), plus the bias; rounded once, to x's
    dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    if bias is not None:
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + eps) * scale.to(wide)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def _normed(norm: Any, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(b n (h d)) -> (b n h d)."""
    return x.unflatten(-1, (heads, -1))


def _turn(layer: Any, x: Tensor, positions: Tensor) -> Tensor:
    """(b n h d) -> (b h n d), rotated where the layer is rotary."""
    x = x.transpose(1, 2)
    return x if layer.turning is None else rotate(x, positions, layer.turning)

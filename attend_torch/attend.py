"""`attend` and its companions: check at the door, choose, compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from attend_shared import avoid, choice, devices
from attend_shared.call import Arrays, Call, check
from attend_shared.choice import Explanation, Implementation
from attend_shared.merging import check_merge, merge_parts
from attend_shared.runs import ids_of, told
from attend_torch import again, runs
from attend_torch.arrays import FRAMEWORK, device_type
from attend_torch.implementations import PACKING, table
from attend_torch.machine import capability

# Found when a call is compiled, and a constant in it: what torch.compiler.assume_constant_result says, which would load
# the compiler here.
avoid.in_force._dynamo_marked_constant = True  # type: ignore[attr-defined]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    is_causal: bool = False,
    q_offset: int | torch.Tensor | None = None,
    window_size: tuple[int | None, int | None] | None = None,
    q_segment_ids: torch.Tensor | None = None,
    kv_segment_ids: torch.Tensor | None = None,
    q_lengths: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_seed: int | torch.Tensor | None = None,
    return_lse: bool = False,
    layout: str = "bhnd",
    implementation: str | Sequence[str] | None = None,
    score_fn: Callable[..., Any] | None = None,
    mask_fn: Callable[..., Any] | None = None,
) -> Any:
    """Softmax attention that means the same in PyTorch and in JAX.

    PyTorch: runs eagerly, under torch.compile(fullgraph=True) and torch.func; autocast casts q, k, v. dropout_seed may
    also be an int64 scalar tensor, read as its 64 bits.

        s   = scale * q . k                    accumulated in float32 (float64 for float64)
        s   = softcap * tanh(s / softcap)      if softcap is given
        s   = s + bias                         if bias is given
        s   = score_fn(s, b, h, t, j)          if score_fn is given
        s   = -inf                             where the pair (t, j) is not allowed
        lse = log(sum_j exp(s) + exp(sink))    natural logarithm; no sinks, no second term
        p   = exp(s - lse)                     0 throughout where a row allows no key
        p   = p * keep / (1 - dropout)         if dropout > 0
        out = p . v                            in q's dtype

    Query t and key j are an allowed pair where mask, mask_fn, is_causal, window_size, segment ids and lengths all allow
    it and neither the bias nor what score_fn gives is -inf. A row that allows no key gives out = 0 and lse = -inf (its
    sink, if there are sinks), and no gradient but that of its sink.

    Letters: b batch, h query heads, hk key/value heads, i queries, j keys, d head size, dv value head size. h is a
    multiple of hk, and query head n reads key/value head n // (h // hk). Any of b, i, j may be 0.

    Args:
        q: (b, h, i, d); float16, bfloat16, float32 or float64.
        k: (b, hk, j, d), the dtype of q.
        v: (b, hk, j, dv), the dtype of q.
        mask: bool, True means may attend. Rank 2 is always a key mask, (b, j) or (1, j); otherwise rank 4, each axis 1
            or full, against (b, h, i, j).
        bias: rank 4, each axis 1 or full, against (b, h, i, j); any of the four dtypes, added in the accumulation
            dtype. -inf counts as not allowed.
        is_causal: key j is allowed where j <= t + q_offset.
        q_offset: the key position of query 0: an int, or an integer array () or (b,). None is 0 where i == j; where
            i != j it is an error with is_causal or a window.
        window_size: (left, right): t + q_offset - left <= j <= t + q_offset + right; None is no bound on that side. The
            query's own position does not count: w tokens that end with it are (w - 1, 0).
        q_segment_ids: integers (b, i).
        kv_segment_ids: integers (b, j); a pair is allowed where its ids are equal. Where i == j one may stand for both.
        q_lengths: integers (b,); rows t >= q_lengths[b] allow no key.
        kv_lengths: integers (b,); keys j >= kv_lengths[b] are not allowed.
        sinks: (h,), any of the four dtypes: one more logit for each head, in the denominator only.
        softcap: a number > 0, or None for none.
        scale: any finite number; None is d ** -0.5.
        dropout: the probability of dropping a weight, 0 <= dropout < 1.
        dropout_seed: an int in [0, 2**64) or a uint32 array (2,) = (low, high); needed where dropout > 0. The same seed
            drops the same pairs everywhere.
        return_lse: whether lse is returned as well; it is differentiable.
        layout: "bhnd", or "bnhd" for q (b, i, h, d), k (b, j, hk, d), v (b, j, hk, dv) and out (b, i, h, dv). The axes
            of mask, bias and lse stay as they are.
        implementation: a name, a sequence of names of which the first that can is taken, or None for the fastest that
            can.
        score_fn: (score, b, h, q_index, kv_index) -> score, a function of each pair by itself. score has rank 4 and the
            accumulation dtype, as the result must; the others are integers that broadcast to it: indices of this call's
            items, query heads, queries and keys. Arrays that it captures have gradients.
        mask_fn: (b, h, q_index, kv_index) -> bool, True means may attend; the same indices, each axis of the result 1
            or full.

        is_causal, window_size, softcap, scale, dropout, return_lse, layout and implementation are Python or NumPy
        values, fixed when a call is compiled. score_fn and mask_fn are functions. The others are data, whose contents
        are never read, but for segment ids where implementation names "fa4" or "fa3".

    Returns:
        out (b, h, i, dv), in the layout and dtype of q; or (out, lse), with lse (b, h, i) in float32 (float64 for
        float64).

    Raises:
        TypeError, ValueError: a wrong argument: which one, what was expected, what came, what to try. The words are the
            same in both frameworks.
        UnsupportedError: no implementation that was asked for can serve the call; every reason is given.

    Example:
        >>> q = k = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]]])    # (b, h, i, d) = (1, 1, 3, 2)
        >>> v = torch.eye(3)[None, None]                                      # then out is p
        >>> mask = torch.tensor([[True, False, True]])                        # (b, j): key 1 is padding
        >>> out, lse = attend(q, k, v, mask, is_causal=True, scale=1.0, return_lse=True)
        >>> out[0, 0]
        tensor([[1.0000, 0.0000, 0.0000],
                [1.0000, 0.0000, 0.0000],
                [0.2689, 0.0000, 0.7311]])
        >>> lse[0, 0]
        tensor([1.0000, 0.0000, 2.3133])

    References:
        docs/semantics.md: every argument with a worked example.
        Vaswani et al., Attention is all you need (2017). Ainslie et al., GQA (2023): grouped heads. Gemma Team, Gemma 2
        (2024): softcap. Xiao et al., Efficient streaming language models with attention sinks (2023). Salmon et al.,
        Parallel random numbers: as easy as 1, 2, 3 (2011): dropout.
    """
    if (mask is bias is q_offset is q_segment_ids is kv_segment_ids is q_lengths is kv_lengths is sinks is dropout_seed
            is None and score_fn is None and mask_fn is None):  # fmt: skip
        result = again.result(
            q, k, v, is_causal, window_size, softcap, scale, dropout, return_lse, layout, implementation
        )  # fmt: skip
        if result is not None:
            return result(q, k, v)
    arrays = Arrays(
        q, k, v, mask, bias, q_offset, q_segment_ids, kv_segment_ids, q_lengths, kv_lengths, sinks, dropout_seed
    )
    return run(arrays, is_causal, window_size, softcap, scale, dropout, return_lse, layout, implementation, None,
               score_fn, mask_fn)  # fmt: skip


def run(arrays: Arrays, *options: Any) -> Any:
    """What `attend` and `Attend` share: the data, and the options in the order in which `check` takes them."""
    key = again.key(arrays, *options)
    way = None if key is None else avoid.CHOICES.get(key)
    if way is None:
        if kind := _autocasts(arrays.q):
            with torch.autocast(kind, enabled=False):
                return run(_autocast(arrays, torch.get_autocast_dtype(kind)), *options)
        way = again.way(key, arrays, *options)
    state, starts = runs.tell(way.call, arrays, ids_of(arrays)) if way.looks else (way.state, None)
    if key is not None and (short := way.short(state)) is not None:
        return short(arrays)
    call, module, packs = way.choice(state)
    if packs and starts is not None:
        arrays = arrays._replace(q_segment_ids=starts, kv_segment_ids=starts)
    out, lse = module.attend(call, again.form(call, arrays))
    if call.layout == "bnhd":
        out = out.transpose(1, 2)
    return (out, lse) if call.return_lse else out


def looked(call: Call, arrays: Arrays) -> tuple[Call, torch.Tensor | None]:
    """What is known of segment ids, for what takes packed sequences."""
    return told(runs.tell, table, call, arrays, PACKING)


def _autocasts(q: Any) -> str | None:
    """The type of the device of q where autocast is on for it."""
    if isinstance(q, torch.Tensor) and not q.is_meta and torch.is_autocast_enabled(kind := device_type(q)):
        return kind
    return None


def _autocast(arrays: Arrays, dtype: torch.dtype) -> Arrays:
    """q, k, v in autocast's dtype, as torch casts for its own attention: float64 stays what it is."""

    def cast(x: Any) -> Any:
        ours = isinstance(x, torch.Tensor) and x.dtype in (torch.float16, torch.bfloat16, torch.float32)
        return x.to(dtype) if ours else x

    return arrays._replace(q=cast(arrays.q), k=cast(arrays.k), v=cast(arrays.v))


def explain(
    q: Any, k: Any, v: Any, mask: Any = None, *, bias: Any = None, is_causal: bool = False, q_offset: Any = None,
    window_size: tuple[int | None, int | None] | None = None, q_segment_ids: Any = None, kv_segment_ids: Any = None,
    q_lengths: Any = None, kv_lengths: Any = None, sinks: Any = None, softcap: float | None = None,
    scale: float | None = None, dropout: float = 0.0, dropout_seed: Any = None, return_lse: bool = False,
    layout: str = "bhnd", implementation: str | Sequence[str] | None = None,
    score_fn: Callable[..., Any] | None = None, mask_fn: Callable[..., Any] | None = None,
) -> Explanation:  # fmt: skip
    """Which implementation `attend` would take for these arguments, and why the others do not serve them.

    PyTorch: tensors on the meta device will do.

    Args:
        As in `attend`, and checked alike. Only shapes, dtypes and options matter, and segment ids where
        implementation names "fa4" or "fa3", or `convert.segments_from_cu_seqlens` made them.

    Returns:
        Explanation(chosen, rows, notes): the name or None; (name, None or the reason of its refusal) for every
        implementation, in order of preference, with what the file of ATTEND_AVOID rules out; and why that file does not
        hold here, if so. str() is a table.

    Raises:
        TypeError, ValueError: as in `attend`. A call that nothing can serve raises nothing: chosen is None.

    Example:
        >>> x = torch.empty(1, 8, 4096, 64, device="meta")
        >>> explanation = explain(x, x, x, softcap=30.0, implementation=("sdpa", "einsum"))
        >>> explanation.chosen, dict(explanation.rows)["sdpa"]
        ('einsum', 'it has no softcap')

    References:
        docs/implementations.md: what each implementation can do. docs/doctor.md: what ATTEND_AVOID is.
    """
    arrays = Arrays(
        q, k, v, mask, bias, q_offset, q_segment_ids, kv_segment_ids, q_lengths, kv_lengths, sinks, dropout_seed
    )
    if kind := _autocasts(q):
        arrays = _autocast(arrays, torch.get_autocast_dtype(kind))
    call = check(FRAMEWORK, arrays, is_causal, window_size, softcap, scale, dropout, return_lse, layout, implementation,
                 None, score_fn, mask_fn)  # fmt: skip
    if call.segments:
        call, _ = looked(call, arrays)
    return devices.explained(choice.explain(table(call), call), table(call), call, capability())


def implementations() -> tuple[Implementation, ...]:
    """The implementations, in order of preference, and whether they can run on this machine.

    Returns:
        Implementation(name, fused, available, reason) for each: fused says that it makes no q_len x kv_len array beyond
        one that the caller passed; reason says why it is not available, or is None.

    Example:
        >>> {each.name: each for each in implementations()}["einsum"]
        Implementation(name='einsum', fused=False, available=True, reason=None)

    References:
        docs/implementations.md: what each implementation can do.
    """
    return choice.implementations(table())


def merge(
    outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor], *, layout: str = "bhnd"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join partial results over split keys: the answer that attending to all keys at once would have given.

        lse = log(sum_n exp(lse_n))
        out = sum_n exp(lse_n - lse) * out_n

    Rows that allow no key in one part (lse -inf) weigh nothing there; rows that allow none in any part are 0, with lse
    -inf. A sink belongs to one part only, and dropout to none: its indices are those of each call. Differentiable.

    Args:
        outs: a list or tuple of out, (b, h, i, dv) or, with layout="bnhd", (b, i, h, dv), one for each part.
        lses: as many lse, (b, h, i), float32 or float64, as attend(..., return_lse=True) gives them.
        layout: of outs, as in `attend`.

    Returns:
        (out, lse), in the dtype and layout of outs and the dtype of lses.

    Raises:
        TypeError, ValueError: a wrong argument: which one, what was expected, what came, what to try.

    Example:
        >>> q, k, v = torch.ones(1, 1, 1, 2), torch.eye(2)[None, None], torch.eye(2)[None, None]
        >>> parts = [attend(q, k[:, :, n : n + 1], v[:, :, n : n + 1], return_lse=True) for n in (0, 1)]
        >>> merge(*zip(*parts))[0].tolist(), attend(q, k, v).tolist()
        ([[[[0.5, 0.5]]]], [[[[0.5, 0.5]]]])

    References:
        Milakov, Gimelshein, Online normalizer calculation for softmax (2018).
    """
    check_merge(FRAMEWORK, outs, lses, layout)
    out, lse = merge_parts(torch, [out.to(lse.dtype) for out, lse in zip(outs, lses, strict=True)], lses, layout)
    return out.to(outs[0].dtype), lse

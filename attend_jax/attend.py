"""`attend` and its companions: check at the door, choose, compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attend_jax import runs
from attend_jax.arrays import FRAMEWORK, SHAPES, alike, segment_ids, to_int32
from attend_jax.functions import Captured, lift, lower
from attend_jax.implementations import PACKING, table
from attend_jax.machine import capability
from attend_jax.philox import seed_words
from attend_shared import choice, devices
from attend_shared.call import Arrays, Call, canonical, check
from attend_shared.choice import Explanation, Implementation
from attend_shared.merging import check_merge, merge_parts
from attend_shared.runs import settled, told

Array = jax.Array | np.ndarray


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    *,
    bias: Array | None = None,
    is_causal: bool = False,
    q_offset: int | Array | None = None,
    window_size: tuple[int | None, int | None] | None = None,
    q_segment_ids: Array | None = None,
    kv_segment_ids: Array | None = None,
    q_lengths: Array | None = None,
    kv_lengths: Array | None = None,
    sinks: Array | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_seed: int | Array | None = None,
    return_lse: bool = False,
    layout: str = "bhnd",
    implementation: str | Sequence[str] | None = None,
    score_fn: Callable[..., Any] | None = None,
    mask_fn: Callable[..., Any] | None = None,
) -> Any:
    """Softmax attention that means the same in PyTorch and in JAX.

    JAX: compiled inside, and usable under jit, grad, vmap, scan and shard_map. Takes NumPy arrays as well; float64
    needs jax_enable_x64.

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
        >>> q = k = jnp.array([[[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]]])    # (b, h, i, d) = (1, 1, 3, 2)
        >>> v = jnp.eye(3)[None, None]                                     # then out is p
        >>> mask = jnp.array([[True, False, True]])                        # (b, j): key 1 is padding
        >>> out, lse = attend(q, k, v, mask, is_causal=True, scale=1.0, return_lse=True)
        >>> np.asarray(out)[0, 0].round(4)
        array([[1.    , 0.    , 0.    ],
               [1.    , 0.    , 0.    ],
               [0.2689, 0.    , 0.7311]], dtype=float32)
        >>> np.asarray(lse)[0, 0].round(4)
        array([1.    , 0.    , 2.3133], dtype=float32)

    References:
        docs/semantics.md: every argument with a worked example.
        Vaswani et al., Attention is all you need (2017). Ainslie et al., GQA (2023): grouped heads. Gemma Team, Gemma 2
        (2024): softcap. Xiao et al., Efficient streaming language models with attention sinks (2023). Salmon et al.,
        Parallel random numbers: as easy as 1, 2, 3 (2011): dropout.
    """
    arrays = Arrays(
        q, k, v, mask, bias, q_offset, q_segment_ids, kv_segment_ids, q_lengths, kv_lengths, sinks, dropout_seed
    )
    return run(arrays, is_causal, window_size, softcap, scale, dropout, return_lse, layout, implementation, None,
               score_fn, mask_fn)  # fmt: skip


def run(arrays: Arrays, *options: Any) -> Any:
    """What `attend` and `Attend` share: the data, and the options in the order in which `check` takes them."""
    call = check(FRAMEWORK, arrays, *options)
    call, starts = looked(call, arrays) if call.segments else (call, None)
    name = choice.choose(table(None if call.names else call), call).name
    captured: Captured = ((), ())
    if call.custom:
        call, captured = lift(call)
    arrays = _canonical(call, arrays)
    if call.runs:
        call, arrays = settled(runs.bounded(call, name, starts), arrays, name in PACKING, starts)
    out, lse = _compute(call, name, alone(call, name), arrays, captured)
    return (out, lse) if call.return_lse else out


def looked(call: Call, arrays: Arrays) -> tuple[Call, Any]:
    """What is known of segment ids, for what takes packed sequences."""
    call, starts = told(runs.tell, table, call, arrays, *PACKING)
    return (call if starts is None else call._replace(sequences=starts.shape[0] - 1)), starts


def alone(call: Call, name: str) -> str:
    """The implementation where nothing is differentiated: another than where something is, if that was measured faster.

    Args:
        call: as the door made it.
        name: what is chosen for it. It is this one too where the caller named it, and for segment ids, which are put to
            an implementation in its own form, and for lse, whose cotangent is then known to be none where it is.
    """
    forward = call._replace(gradient=False)
    if call.names is not None or call.platform != "cuda" or call.segments or call.return_lse:
        return name
    if table(forward) == table(call):
        return name
    return choice.choose(table(forward), forward).name


def _canonical(call: Call, arrays: Arrays) -> Arrays:
    """What must happen before a jit: host integers are cut to what 32 bits hold, or split, where the caller sees it."""
    if call.offset == "data":
        arrays = arrays._replace(q_offset=to_int32(arrays.q_offset))
    else:
        arrays = arrays._replace(q_offset=None)
    host = {
        name: to_int32(value)
        for name in ("q_lengths", "kv_lengths")
        if isinstance(value := getattr(arrays, name), np.ndarray)
    }
    host |= {name: _host_ids(name, value) for name in ("q_segment_ids", "kv_segment_ids")
             if isinstance(value := getattr(arrays, name), np.ndarray)}  # fmt: skip
    if arrays.kv_segment_ids is arrays.q_segment_ids:  # one array, which a jit would take for two
        host["kv_segment_ids"] = None
    seed = seed_words(arrays.dropout_seed) if call.dropout else None
    return arrays._replace(dropout_seed=seed, **host)


def _host_ids(argument: str, ids: np.ndarray) -> np.ndarray:
    """NumPy ids as they are, unless JAX would cut them to 32 bits and they do not fit."""
    if ids.dtype.itemsize == 8 and not jax.config.read("jax_enable_x64") and ids.size:
        if ids.min() < -(2**31) or ids.max() >= 2**31:
            raise ValueError(
                f"{argument}: expected ids that 32 bits hold, got {ids.dtype} up to {ids.max()}. "
                "Number the segments from 0."
            )
        return ids.astype(np.int32)
    return ids


@partial(jax.jit, static_argnums=(0, 1, 2))
def _compute(
    call: Call, name: str, first: str, arrays: Arrays, captured: Captured
) -> tuple[jax.Array, jax.Array | None]:
    """The named implementation, compiled: un-jitted, every operation would be dispatched by itself."""
    arrays, captured = alike((jax.tree.map(jnp.asarray, arrays), captured))
    arrays = canonical(call, arrays)
    if call.segments:
        q_ids, kv_ids = segment_ids(arrays.q_segment_ids, arrays.kv_segment_ids)
        arrays = arrays._replace(q_segment_ids=q_ids, kv_segment_ids=kv_ids)
    if call.q_lengths:
        arrays = arrays._replace(q_lengths=to_int32(arrays.q_lengths))
    if call.kv_lengths:
        arrays = arrays._replace(kv_lengths=to_int32(arrays.kv_lengths))
    if call.custom:
        call = lower(call, captured)
    if first == name:
        out, lse = _by(name, call, arrays)
    else:
        floats = {each: getattr(arrays, each) for each in ("q", "k", "v", "bias", "sinks")}
        out, lse = _either(call, name, first, floats, arrays._replace(**dict.fromkeys(floats)))
    return (out.swapaxes(1, 2) if call.layout == "bnhd" else out), lse


def _by(name: str, call: Call, arrays: Arrays) -> tuple[jax.Array, jax.Array | None]:
    """What an implementation makes of a call. An lse that is not asked for is left out, and has no cotangent."""
    out, lse = next(entry.module for entry in table() if entry.name == name).attend(call, arrays)
    return out, lse if call.return_lse else None


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _either(call: Call, name: str, first: str, floats: dict[str, Any], data: Arrays) -> tuple:
    """By the first, and where it is differentiated by the other, in both directions."""
    return _by(first, call, data._replace(**floats))


def _either_fwd(call: Call, name: str, first: str, floats: dict[str, Any], data: Arrays) -> tuple:
    return jax.vjp(lambda floats: _by(name, call, data._replace(**floats)), floats)


def _either_bwd(call: Call, name: str, first: str, pull: Callable[..., tuple], cotangents: tuple) -> tuple:
    return *pull(cotangents), None


_either.defvjp(_either_fwd, _either_bwd)


def explain(
    q: Any, k: Any, v: Any, mask: Any = None, *, bias: Any = None, is_causal: bool = False, q_offset: Any = None,
    window_size: tuple[int | None, int | None] | None = None, q_segment_ids: Any = None, kv_segment_ids: Any = None,
    q_lengths: Any = None, kv_lengths: Any = None, sinks: Any = None, softcap: float | None = None,
    scale: float | None = None, dropout: float = 0.0, dropout_seed: Any = None, return_lse: bool = False,
    layout: str = "bhnd", implementation: str | Sequence[str] | None = None,
    score_fn: Callable[..., Any] | None = None, mask_fn: Callable[..., Any] | None = None,
) -> Explanation:  # fmt: skip
    """Which implementation `attend` would take for these arguments, and why the others do not serve them.

    JAX: jax.ShapeDtypeStruct will do.

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
        >>> x = jax.ShapeDtypeStruct((1, 8, 4096, 64), jnp.float32)
        >>> explanation = explain(x, x, x, softcap=30.0, implementation=("xla", "einsum"))
        >>> explanation.chosen, dict(explanation.rows)["xla"]
        ('einsum', 'it has no softcap')

    References:
        docs/implementations.md: what each implementation can do. docs/doctor.md: what ATTEND_AVOID is.
    """
    arrays = Arrays(
        q, k, v, mask, bias, q_offset, q_segment_ids, kv_segment_ids, q_lengths, kv_lengths, sinks, dropout_seed
    )
    call = check(SHAPES, arrays, is_causal, window_size, softcap, scale, dropout, return_lse, layout, implementation,
                 None, score_fn, mask_fn)  # fmt: skip
    if call.segments:
        call, _ = looked(call, arrays)
    found = devices.explained(choice.explain(table(call), call), table(call), call, capability())
    if found.chosen and (first := alone(call, found.chosen)) != found.chosen:
        found = found._replace(notes=(*found.notes, f"where nothing is differentiated: {first}"))
    return found


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


def merge(outs: Sequence[Array], lses: Sequence[Array], *, layout: str = "bhnd") -> tuple[jax.Array, jax.Array]:
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
        >>> q, k, v = jnp.ones((1, 1, 1, 2)), jnp.eye(2)[None, None], jnp.eye(2)[None, None]
        >>> parts = [attend(q, k[:, :, n : n + 1], v[:, :, n : n + 1], return_lse=True) for n in (0, 1)]
        >>> merge(*zip(*parts))[0].tolist(), attend(q, k, v).tolist()
        ([[[[0.5, 0.5]]]], [[[[0.5, 0.5]]]])

    References:
        Milakov, Gimelshein, Online normalizer calculation for softmax (2018).
    """
    check_merge(FRAMEWORK, outs, lses, layout)
    return _merge(list(outs), list(lses), layout)


@partial(jax.jit, static_argnums=2)
def _merge(outs: list[Array], lses: list[Array], layout: str) -> tuple[jax.Array, jax.Array]:
    out, lse = merge_parts(jnp, [out.astype(lse.dtype) for out, lse in zip(outs, lses, strict=True)], lses, layout)
    return out.astype(outs[0].dtype), lse

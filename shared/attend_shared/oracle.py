"""What attention is, in NumPy and float64: the definition that every implementation is measured against.

Written to be read, and independent of the code that the implementations share. One head at a time, one query a row.
Masks, positions, segments, lengths and biases of -inf all become one boolean array, `allowed`, and a pair that is not
allowed takes no part in anything.

Float arrays are widened to float64 on entry, so that a bfloat16 value that travels as float32 is used exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attend_shared import philox
from attend_shared.functions import ScoreFn

if TYPE_CHECKING:
    from attend_shared.cases import Problem

__all__ = ["Answer", "Outcome", "Size", "allowed", "attend", "backward", "evaluate", "terms"]

_T = TypeVar("_T")
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Answer(NamedTuple):
    """The oracle's answer, in float64.

    Attributes:
        out: in the call's layout, (b h i dv) or (b i h dv).
        lse: (b h i), -inf where a row allows no key and has no sink.
        p: (b h i j), the probabilities before dropout; 0 throughout where a row allows no key.
    """

    out: Floats
    lse: Floats
    p: Floats


class Outcome(NamedTuple):
    """All that one evaluation of a `Problem` gives, whoever evaluated it: float64 arrays that hold its results exactly.

    Attributes:
        out: in the call's layout.
        lse: (b h i), or None where the problem does not ask for it.
        gradients: of sum(out * out_cotangent) + sum(lse * lse_cotangent), by argument: q, k, v and, where given, bias,
            sinks and the table of a score_fn, each in the shape and layout of its argument.
    """

    out: Floats
    lse: Floats | None
    gradients: dict[str, Floats]


class Size(NamedTuple):
    """How large numbers are: the largest absolute value and the mean one."""

    largest: float
    mean: float


def attend(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    bias: ArrayLike | None = None,
    is_causal: bool = False,
    q_offset: ArrayLike | None = None,
    window_size: tuple[int | None, int | None] | None = None,
    q_segment_ids: ArrayLike | None = None,
    kv_segment_ids: ArrayLike | None = None,
    q_lengths: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_seed: Any = None,
    layout: str = "bhnd",
    score_fn: Callable[..., Any] | None = None,
    mask_fn: Callable[..., Any] | None = None,
) -> Answer:
    """Attention by its definition, for every query t of every head of every batch item:

        u_j = scale * q_t . k_j
        s_j = softcap * tanh(u_j / softcap)                      if softcap is given, else u_j
        s_j = s_j + bias_tj                                      if bias is given
        s_j = score_fn(s_j, b, h, t, j)                          if score_fn is given
        s_j = -inf                                               where the pair (t, j) is not allowed
        lse = log(sum_j exp(s_j) + exp(sink))                    natural logarithm; no sink is a sink of -inf
        p_j = exp(s_j - lse)                                     0 where lse is -inf
        out = sum_j p_j * keep_tj / (1 - dropout) * v_j

    Args:
        q: (b h i d), or (b i h d) with layout "bnhd".
        k, v: (b hk j d) and (b hk j dv), or with layout "bnhd" as q. h is a multiple of hk, and query head n reads
            key/value head n // (h // hk). Any of b, i, j may be 0.
        mask: bool, True means "may attend"; (b|1, j) masks keys, rank 4 broadcasts to (b h i j).
        bias: rank 4, broadcasts to (b h i j); -inf counts as not allowed.
        is_causal: key j is allowed where j <= t + q_offset.
        q_offset: the key position of query 0, an integer or integers () or (b,). None is 0, and needs i == j where a
            position matters.
        window_size: (left, right), each a count or None: t + q_offset - left <= j <= t + q_offset + right.
        q_segment_ids, kv_segment_ids: integers (b i) and (b j), allowed where equal; one may stand for both if i == j.
        q_lengths, kv_lengths: integers (b,); rows t >= q_lengths[b] allow no key, keys j >= kv_lengths[b] no row.
        sinks: (h,), one more logit for each query head in the denominator.
        softcap: a number > 0.
        scale: any finite number, d ** -0.5 by default.
        dropout, dropout_seed: see `attend_shared.philox.keep_mask`.
        layout: "bhnd" or "bnhd".
        score_fn: (score, b, h, q_index, kv_index) -> score, of a head at a time: score is (i j), b and h are ints,
            q_index is (i 1) and kv_index (1 j). It is shown 0 for a pair that is not allowed.
        mask_fn: (b, h, q_index, kv_index) -> bool, of integers (b 1 1 1), (1 h 1 1), (1 1 i 1), (1 1 1 j).

    Returns:
        Answer(out, lse, p).

    Raises:
        TypeError: a mask that is not boolean.
        ValueError: shapes that do not fit, an alignment or a seed that is missing.

    Example:
        >>> q = k = v = np.eye(2).reshape(1, 1, 2, 2)
        >>> answer = attend(q, k, v, is_causal=True, scale=1.0)
        >>> answer.p[0, 0].round(4)
        array([[1.    , 0.    ],
               [0.2689, 0.7311]])
        >>> answer.lse[0, 0].round(4)     # 1, and log(1 + e)
        array([1.    , 1.3133])
    """
    call = _read(
        q, k, v, mask, bias=bias, is_causal=is_causal, q_offset=q_offset, window_size=window_size,
        q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids, q_lengths=q_lengths, kv_lengths=kv_lengths,
        sinks=sinks, softcap=softcap, scale=scale, dropout=dropout, dropout_seed=dropout_seed, layout=layout,
        score_fn=score_fn, mask_fn=mask_fn,
    )  # fmt: skip
    out = np.zeros((*call.q.shape[:3], call.v.shape[3]))
    lse = np.zeros(call.q.shape[:3])
    p = np.zeros(call.allowed.shape)
    for item, head in np.ndindex(call.q.shape[:2]):
        it = _forward(call, item, head)
        out[item, head] = (it.p * it.keep) @ it.v
        lse[item, head] = it.lse
        p[item, head] = it.p
    return Answer(_swap_axes(out, layout), lse, p)


def backward(
    *arguments: Any, out_cotangent: ArrayLike, lse_cotangent: ArrayLike | None = None, **keywords: Any
) -> dict[str, Floats]:
    """The gradient of sum(out * out_cotangent) + sum(lse * lse_cotangent), derived by hand. For every query t:

        dv_j  = sum_t p_j keep_tj / (1 - dropout) * dout_t    over the query heads that read this key/value head, too
        dp_j  = keep_tj / (1 - dropout) * dout_t . v_j
        delta = sum_j p_j dp_j
        ds_j  = p_j (dp_j - delta + dlse)                     s + e adds p_j (e_j - sum p e) to p_j, sum p e to lse
        dsink = sum_t exp(sink - lse) (dlse - delta)          the same for a key whose value is 0
        dT_n  = sum ds_tj dscore_fn / dT_n                    over the pairs that read entry n of a score_fn's table T
        ds_j  = ds_j dscore_fn / ds_j                         without a score_fn, as it is
        dbias = ds                                            summed over the axes that were broadcast
        du_j  = ds_j (1 - tanh(u_j / softcap)**2)             without a softcap, du = ds
        dq_t  = scale * sum_j du_j k_j
        dk_j  = scale * sum_t du_j q_t                        over the query heads that read this key/value head, too

    A row without an allowed key has p = 0 and gives 0 to all of them but to its sink, whose logit is then the lse.
    Where lse is -inf its cotangent is ignored.

    Args:
        arguments, keywords: as in `attend`.
        out_cotangent: the shape and layout of out.
        lse_cotangent: (b h i), or None for 0.

    Returns:
        The gradients of q, k, v and, where given, bias, sinks and the table of a score_fn, each in the shape and layout
        of its argument.

    Raises:
        TypeError, ValueError: as in `attend`. A score_fn must be an `attend_shared.functions.ScoreFn`: its derivatives
            are known.

    Example:
        >>> q = k = np.zeros((1, 1, 2, 3))
        >>> v = dout = np.ones((1, 1, 2, 1))
        >>> backward(q, k, v, is_causal=True, out_cotangent=dout)["v"][0, 0, :, 0]
        array([1.5, 0.5])
    """
    call = _read(*arguments, **keywords)
    dout, dlse = _cotangents(call, out_cotangent, lse_cotangent)
    dq, dk, dv = np.zeros(call.q.shape), np.zeros(call.k.shape), np.zeros(call.v.shape)
    ds, dsinks = np.zeros(call.allowed.shape), np.zeros(call.sinks.shape)
    dtable = np.zeros(_table_shape(call))
    for item, head in np.ndindex(call.q.shape[:2]):
        it = _forward(call, item, head)
        back = _backward(it, dout[item, head], dlse[item, head])
        ds[item, head] = it.p * (back.dp - back.delta + back.dlse)
        if call.score_fn is not None:
            bend = _read_table(call.score_fn, it, item, head, ds[item, head], dtable)
            ds[item, head] *= bend
        du = ds[item, head] * it.slope
        dq[item, head] = call.scale * (du @ it.k)
        dk[item, call.reads(head)] += call.scale * (du.T @ it.q)
        dv[item, call.reads(head)] += (it.p * it.keep).T @ back.dout
        dsinks[head] += np.sum(it.p_sink * (back.dlse - back.delta))
    gradients = {name: _swap_axes(x, call.layout) for name, x in (("q", dq), ("k", dk), ("v", dv))}
    gradients |= {"bias": ds.sum(call.broadcast, keepdims=True), "sinks": dsinks, "table": dtable}
    return _of_given(call, gradients)


def terms(
    *arguments: Any,
    out_cotangent: ArrayLike,
    lse_cotangent: ArrayLike | None = None,
    finer: float = 1.0,
    **keywords: Any,
) -> dict[str, Size]:
    """How large the terms are in the sums behind lse and behind each gradient.

    A sum that cancels cannot be more exact than its terms. Where a row allows a single key, for example, its dq is 0 by
    mathematics, and an honest computation leaves its rounding times these terms. They are what `backward` sums, with
    absolute values for values, and a maximum for every sum that comes after dp and delta:

        ds_j  = p_j max(|dp_j|, |delta|, |dlse|)
        du_j  = ds_j max(1 - tanh**2, finer)                with a softcap; 1 - tanh**2 is a sum that cancels, too
        dq_t  = |scale| max_j du_j |k_j|                    by the largest, and by the mean, of a vector |k_j|
                and |scale| |delta sum_j p_j (1 - tanh**2) k_j|: delta is one number for all keys of a row, so that its
                rounding is not averaged out over them
        dk_j  = |scale| max_t du_j |q_t|
        dv_j  = max_t p_j keep_tj / (1 - dropout) |dout_t|
        dT    = sqrt(sum (ds |dscore_fn / dT|)**2)          with a score_fn, and then
        ds_j  = ds_j |dscore_fn / ds_j|                     each by its largest term, where it is a sum
        dbias = sqrt(sum ds**2), dsink = sqrt(sum_t (exp(sink - lse) max(|delta|, |dlse|))**2): one number may stand for
                thousands of terms here, and this is the size that their partial sums have
        lse_t = max_j p_j max(|u_j|, |bias_tj|), |s_j| too with a score_fn, and at least 1 where more than one
                exponential is summed: the logarithm turns the relative error of their sum into an absolute one

    Args:
        arguments, out_cotangent, lse_cotangent, keywords: as in `backward`.
        finer: the ulp of 1 in which 1 - tanh**2 is computed, by that in which the result is given; 1 or less.

    Raises:
        TypeError, ValueError: as in `attend`.

    Returns:
        The size of the terms by "lse" and the keys of `backward`: the largest of all elements and their mean.

    Example:
        >>> x = np.full((1, 1, 1, 1), 3.0)
        >>> backward(x, x, x, out_cotangent=x)["q"].item(), terms(x, x, x, out_cotangent=x)["q"].largest
        (0.0, 27.0)
    """
    call = _read(*arguments, **keywords)
    dout, dlse = _cotangents(call, out_cotangent, lse_cotangent)
    b, h, i, j = call.allowed.shape
    ds, dsinks, lse = np.zeros((b, h, i, j)), np.zeros(h), np.zeros((b, h, i))
    dq, dk, dv = np.zeros((2, b, h, i)), np.zeros((2, b, call.k.shape[1], j)), np.zeros((2, b, call.k.shape[1], j))
    dtable = np.zeros(_table_shape(call))
    for item, head in np.ndindex(b, h):
        it, group = _forward(call, item, head), call.reads(head)
        back = _backward(it, dout[item, head], dlse[item, head])
        rest = np.maximum(np.abs(back.delta), np.abs(back.dlse))
        ds[item, head] = it.p * np.maximum(np.abs(back.dp), rest)
        bend = np.ones_like(it.u)
        if call.score_fn is not None:
            pairs = it.scored, item, head, *_indices(it.scored)
            bend, factor = call.score_fn.terms(*pairs)
            np.add.at(dtable.reshape(-1), call.score_fn.entries(*pairs)[0], (ds[item, head] * factor) ** 2)
            ds[item, head] *= bend
        du = abs(call.scale) * ds[item, head] * np.maximum(it.slope, finer)  # the slope is 1 without a softcap
        by_delta = np.abs(call.scale * back.delta * ((it.p * bend * it.slope) @ it.k))  # (i d)
        dq[:, item, head] = np.maximum(_largest_terms(du, it.k), (by_delta.max(axis=1), by_delta.mean(axis=1)))
        dk[:, item, group] = np.maximum(dk[:, item, group], _largest_terms(du.T, it.q))
        dv[:, item, group] = np.maximum(dv[:, item, group], _largest_terms((it.p * it.keep).T, back.dout))
        dsinks[head] = np.hypot(dsinks[head], np.linalg.norm(it.p_sink * rest))
        logits = np.where(it.allowed, np.maximum(np.abs(it.u), np.abs(call.bias[item, head])), 0.0)
        if call.score_fn is not None:
            logits = np.where(it.allowed, np.maximum(logits, np.abs(it.s)), 0.0)
        several = np.sum(it.p > 0, axis=1) + np.sum(it.p_sink > 0, axis=1) > 1
        lse[item, head] = np.maximum(np.max(it.p * logits, axis=1, initial=0.0), several)
    ds = np.sqrt(np.sum(ds**2, axis=call.broadcast, keepdims=True))
    dtable = np.sqrt(dtable)
    sizes = {"lse": _size(lse, lse), "q": _size(*dq), "k": _size(*dk), "v": _size(*dv), "table": _size(dtable, dtable)}
    return _of_given(call, sizes | {"bias": _size(ds, ds), "sinks": _size(dsinks, dsinks)})


def allowed(*arguments: Any, **keywords: Any) -> Bools:
    """Which query may attend to which key: every condition of the call, ANDed.

    Args, Raises:
        As in `attend`.

    Returns:
        bool (b h i j).

    Example:
        >>> x = np.zeros((1, 1, 3, 1))
        >>> allowed(x, x, x, is_causal=True, window_size=(1, None))[0, 0].astype(int)
        array([[1, 0, 0],
               [1, 1, 0],
               [0, 1, 1]])
    """
    return _read(*arguments, **keywords).allowed


def evaluate(problem: Problem) -> Outcome:
    """The outcome of a problem by the definition: `attend` and `backward` on its arguments and cotangents."""
    answer = attend(**problem.arguments)
    gradients = backward(**problem.arguments, out_cotangent=problem.out_cotangent, lse_cotangent=problem.lse_cotangent)
    return Outcome(answer.out, None if problem.lse_cotangent is None else answer.lse, gradients)


class _Call(NamedTuple):
    """The arguments in one form, with the neutral value of each that was not given."""

    q: Floats  # (b h i d)
    k: Floats  # (b hk j d)
    v: Floats  # (b hk j dv)
    allowed: Bools  # (b h i j)
    bias: Floats  # (b h i j); 0 if not given
    bias_shape: tuple[int, ...] | None
    sinks: Floats  # (h,); -inf if not given
    has_sinks: bool
    keep: Floats  # (b h i j), 0 or 1 / (1 - dropout); 1 if not given
    scale: float
    softcap: float | None
    layout: str
    score_fn: Any

    def reads(self, head: int) -> int:
        """The key/value head that a query head reads."""
        return head // (self.q.shape[1] // self.k.shape[1])

    @property
    def broadcast(self) -> tuple[int, ...]:
        """The axes along which the bias was broadcast."""
        return tuple(axis for axis, size in enumerate(self.bias_shape or ()) if size == 1)


class _Forward(NamedTuple):
    """One head of one batch item: i queries against j keys."""

    q: Floats  # (i d), 0 in rows that allow no key
    k: Floats  # (j d), 0 in keys that no row allows
    v: Floats  # (j dv), the same
    allowed: Bools  # (i j)
    keep: Floats  # (i j)
    u: Floats  # (i j), scale * q . k
    scored: Floats  # (i j), with softcap and bias, as score_fn is shown it: 0 where not allowed
    s: Floats  # (i j), the logits
    slope: Floats  # (i j), the derivative of the softcap at u
    lse: Floats  # (i,)
    p: Floats  # (i j)
    p_sink: Floats  # (i 1), the probability of the sink; 0 where lse is -inf


class _Backward(NamedTuple):
    """What one head's gradients are made of, besides its forward pass."""

    dout: Floats  # (i dv), 0 in rows that allow no key
    dlse: Floats  # (i 1), 0 where lse is -inf
    dp: Floats  # (i j)
    delta: Floats  # (i 1)


def _forward(call: _Call, item: int, head: int) -> _Forward:
    group, ok, keep = call.reads(head), call.allowed[item, head], call.keep[item, head]
    # What takes no part is not even read: 0 * NaN would be NaN.
    row, key = ok.any(axis=1, keepdims=True), ok.any(axis=0)[:, np.newaxis]
    q = np.where(row, call.q[item, head], 0.0)
    k = np.where(key, call.k[item, group], 0.0)
    v = np.where(key, call.v[item, group], 0.0)
    u = call.scale * (q @ k.T)
    if call.softcap is None:
        capped, slope = u, np.ones_like(u)
    else:
        capped = call.softcap * np.tanh(u / call.softcap)
        with np.errstate(over="ignore"):
            slope = np.cosh(u / call.softcap) ** -2.0  # 1 - tanh**2, without its cancellation
    scored = np.where(ok, capped + call.bias[item, head], 0.0)
    logits = scored if call.score_fn is None else call.score_fn(scored, item, head, *_indices(scored))
    logits = np.where(ok, logits, -np.inf)
    sink = np.full((len(q), 1), call.sinks[head])
    # lse = shift + log(total) and p = exp(s - lse) = exp(s - shift) / total. With the row's largest logit for a shift
    # nothing overflows, and p is right even where lse is so large that log(total) is lost in it.
    top = np.max(logits, axis=1, keepdims=True, initial=call.sinks[head])
    shift = np.where(top == -np.inf, 0.0, top)  # -inf - -inf would be NaN
    weight, weight_sink = np.exp(logits - shift), np.exp(sink - shift)
    total = np.sum(weight, axis=1, keepdims=True) + weight_sink
    with np.errstate(divide="ignore"):
        lse = (shift + np.log(total))[:, 0]
    total = np.where(total == 0.0, 1.0, total)
    return _Forward(q, k, v, ok, keep, u, scored, logits, slope, lse, weight / total, weight_sink / total)


def _indices(x: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The queries (i 1) and the keys (1 j) of a head."""
    query, key = np.ogrid[: x.shape[0], : x.shape[1]]
    return query, key


def _table_shape(call: _Call) -> tuple[int, ...]:
    """Of the table of the call's score_fn; without one ()."""
    if call.score_fn is None:
        return ()
    if not isinstance(call.score_fn, ScoreFn):
        kind = type(call.score_fn).__name__
        raise TypeError(f"score_fn: expected a ScoreFn, whose derivatives are known; got {kind}")
    return call.score_fn.table.shape


def _read_table(score_fn: ScoreFn, it: _Forward, item: int, head: int, ds: Floats, table: Floats) -> Floats:
    """Add to `table` what every pair gives to the entry that it reads. Returns dscore_fn / ds (i j)."""
    pairs = it.scored, item, head, *_indices(it.scored)
    entry, factor = score_fn.entries(*pairs)
    np.add.at(table.reshape(-1), entry, ds * factor)
    return score_fn.slope(*pairs)


def _backward(it: _Forward, dout: Floats, dlse: Floats) -> _Backward:
    dout = np.where(it.allowed.any(axis=1, keepdims=True), dout, 0.0)
    dp = it.keep * (dout @ it.v.T)
    delta = np.sum(it.p * dp, axis=1, keepdims=True)
    return _Backward(dout, np.where(it.lse == -np.inf, 0.0, dlse)[:, None], dp, delta)


def _largest_terms(weights: Floats, vectors: Floats) -> Floats:
    """(m n), (n p) -> (2 m): the largest of n terms |weight * vector|, by the maximum and the mean of |vector|."""
    vectors = np.abs(vectors)
    sizes = np.stack([np.max(vectors, axis=1), np.mean(vectors, axis=1)])  # (2 n)
    return np.max(np.abs(weights) * sizes[:, np.newaxis], axis=2, initial=0.0)


def _size(peaks: Floats, means: Floats) -> Size:
    return Size(float(np.max(peaks, initial=0.0)), float(np.mean(means)) if means.size else 0.0)


def _read(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    bias: ArrayLike | None = None,
    is_causal: bool = False,
    q_offset: ArrayLike | None = None,
    window_size: tuple[int | None, int | None] | None = None,
    q_segment_ids: ArrayLike | None = None,
    kv_segment_ids: ArrayLike | None = None,
    q_lengths: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_seed: Any = None,
    layout: str = "bhnd",
    score_fn: Callable[..., Any] | None = None,
    mask_fn: Callable[..., Any] | None = None,
) -> _Call:
    """Bring the arguments of `attend` into one form."""
    if layout not in ("bhnd", "bnhd"):
        raise ValueError(f'layout: expected "bhnd" or "bnhd"; got {layout!r}')
    q, k, v = (_swap_axes(np.asarray(x, dtype=np.float64), layout) for x in (q, k, v))
    (b, h, i, d), (hk, j) = q.shape, k.shape[1:3]
    if k.shape != (b, hk, j, d) or v.shape[:3] != (b, hk, j) or hk == 0 or h % hk:
        raise ValueError("q, k, v: expected (b h i d), (b hk j d), (b hk j dv) with hk dividing h; "
                         f"got {q.shape}, {k.shape}, {v.shape}")  # fmt: skip
    ok = np.ones((b, h, i, j), dtype=np.bool_)
    if mask is not None:
        ok &= _fit("mask", _key_mask(np.asarray(mask), j), ok.shape)
    biased = None if bias is None else _fit("bias", np.asarray(bias, dtype=np.float64), ok.shape)
    if biased is not None:
        ok &= biased != -np.inf
    left, right = (None, None) if window_size is None else window_size
    if is_causal or left is not None or right is not None:
        if q_offset is None and i != j:
            raise ValueError(f"q_offset: expected a value where i != j; got None with i={i}, j={j}. 0 aligns the first "
                             f"query with the first key, kv_len - q_len = {j - i} the last with the last")  # fmt: skip
        offset = np.broadcast_to(np.asarray(0 if q_offset is None else q_offset, dtype=np.int64), (b,))
        # (b 1 i j): how far key j lies behind the position of query t, which is t + q_offset
        behind = offset[:, None, None, None] + np.arange(i)[:, None] - np.arange(j)
        if is_causal:
            ok &= behind >= 0
        if left is not None:
            ok &= behind <= left
        if right is not None:
            ok &= behind >= -right
    if q_segment_ids is not None or kv_segment_ids is not None:
        if i != j and (q_segment_ids is None or kv_segment_ids is None):
            raise ValueError(f"segment ids: expected both where i != j; got one with i={i}, j={j}")
        of_q = np.asarray(kv_segment_ids if q_segment_ids is None else q_segment_ids)
        of_k = np.asarray(q_segment_ids if kv_segment_ids is None else kv_segment_ids)
        ok &= (of_q[:, :, None] == of_k[:, None, :])[:, None]
    if q_lengths is not None:
        ok &= np.arange(i)[:, None] < np.asarray(q_lengths)[:, None, None, None]
    if kv_lengths is not None:
        ok &= np.arange(j) < np.asarray(kv_lengths)[:, None, None, None]
    if mask_fn is not None:
        ok &= mask_fn(*np.ogrid[:b, :h, :i, :j])
    if dropout and dropout_seed is None:
        raise ValueError("dropout_seed: expected a seed where dropout > 0; got None")
    keep = philox.keep_mask(dropout_seed, ok.shape, dropout) / (1 - dropout) if dropout else np.ones(ok.shape)
    return _Call(
        q, k, v, ok,
        bias=np.broadcast_to(0.0 if biased is None else biased, ok.shape),
        bias_shape=None if biased is None else biased.shape,
        sinks=np.full(h, -np.inf) if sinks is None else np.asarray(sinks, dtype=np.float64),
        has_sinks=sinks is not None,
        keep=keep,
        scale=d**-0.5 if scale is None else float(scale),
        softcap=softcap,
        layout=layout,
        score_fn=score_fn,
    )  # fmt: skip


def _key_mask(mask: NDArray[Any], j: int) -> NDArray[Any]:
    """A mask of rank 2 as the rank 4 it stands for."""
    if mask.dtype != np.bool_:
        raise TypeError(f"mask: expected bool, True is may attend; got {mask.dtype}. What is added to logits is bias")
    if mask.ndim == 2 and mask.shape[1] != j:
        raise ValueError(f"mask: expected rank 2 to be (b|1, j) with j={j}; got {mask.shape}")
    return mask[:, None, None, :] if mask.ndim == 2 else mask


def _fit(name: str, x: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if x.ndim != 4 or any(size not in (1, full) for size, full in zip(x.shape, shape, strict=True)):
        raise ValueError(f"{name}: expected each axis 1 or that of (b, h, i, j) = {shape}; got {x.shape}")
    return x


def _cotangents(call: _Call, out_cotangent: ArrayLike, lse_cotangent: ArrayLike | None) -> tuple[Floats, Floats]:
    dout = _swap_axes(np.asarray(out_cotangent, dtype=np.float64), call.layout)
    dlse = np.zeros(call.q.shape[:3]) if lse_cotangent is None else np.asarray(lse_cotangent, dtype=np.float64)
    expected = (*call.q.shape[:3], call.v.shape[3])
    if dout.shape != expected or dlse.shape != expected[:3]:
        raise ValueError(f"cotangents: expected (b h i dv) = {expected} and (b h i); got {dout.shape} and {dlse.shape}")
    return dout, dlse


def _swap_axes(x: NDArray[Any], layout: str) -> NDArray[Any]:
    """Between a call's layout and (b h n d); its own inverse."""
    return x if layout == "bhnd" else x.swapaxes(1, 2)


def _of_given(call: _Call, found: dict[str, _T]) -> dict[str, _T]:
    """Without bias, sinks and a table where the call has none."""
    given = {"bias": call.bias_shape is not None, "sinks": call.has_sinks, "table": call.score_fn is not None}
    return {name: x for name, x in found.items() if given.get(name, True)}

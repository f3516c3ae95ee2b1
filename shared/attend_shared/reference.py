"""Attention as an einsum in NumPy, at the precision of its dtype: what sets the error budget.

Products, softmax and sums in float32 (float64 for float64), results rounded to their dtypes once, at the end. The error
that this makes against `attend_shared.oracle` is what the dtype costs anyone; `attend_shared.compare` allows twice that
and a little. Three things make it a fair measure:

- Sums are plain loops, one term after the other, since how `numpy.einsum` sums depends on strides and on the machine's
  vectors. And they can be made in several orders, since a single one may be lucky.
- The backward pass makes p from lse again, as fused kernels do, whose forward pass leaves them nothing else.
- The arithmetic is its own. In float64, too, its rounding is that of another computation than the oracle's: grouped
  heads as an axis of their own, tanh through expm1, its derivative as 1 - tanh**2. Only the question which query may
  attend to which key, where nothing is rounded, is the oracle's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attend_shared import dtypes, oracle, philox
from attend_shared.functions import ScoreFn
from attend_shared.oracle import Outcome

if TYPE_CHECKING:
    from attend_shared.cases import Problem

__all__ = ["evaluate"]

Array = NDArray[Any]


def evaluate(problem: Problem, order: int = 0) -> Outcome:
    """The outcome of a problem with every step in the accumulation dtype and every result rounded to its own.

    Args:
        problem: see `attend_shared.cases.Problem`.
        order: of summation: 0 as terms come, 1 backwards, every other number a shuffle of its own.

    Returns:
        out and the gradients of q, k, v in the dtype of q, those of bias, sinks and a score_fn's table in theirs, lse
        in the accumulation dtype.

    Example:
        >>> from types import SimpleNamespace
        >>> x = np.float32([[[[1e8], [-1e8], [1.0]]]])
        >>> problem = SimpleNamespace(arguments=dict(q=0 * x, k=x, v=x), dtypes=dict.fromkeys("qkv", "float32"),
        ...                           out_cotangent=x, lse_cotangent=None)
        >>> [float(evaluate(problem, order).out[0, 0, 0, 0].round(4)) for order in (0, 1)]   # what is lost is all of it
        [0.3333, 0.0]
    """
    given, names = problem.arguments, problem.dtypes
    work = np.dtype(dtypes.accumulation(names["q"]))
    bnhd = given.get("layout", "bhnd") == "bnhd"

    def load(x: Any) -> Array:
        array = np.asarray(x, dtype=work)
        return array.swapaxes(1, 2) if bnhd else array

    q, k, v, dout = (load(x) for x in (given["q"], given["k"], given["v"], problem.out_cotangent))
    (b, h, i, d), (hk, j), dv = q.shape, k.shape[1:3], v.shape[3]
    group = h // hk
    pairs = oracle.allowed(**given)
    scale = d**-0.5 if given.get("scale") is None else float(given["scale"])
    softcap = given.get("softcap")
    dropout = given.get("dropout", 0.0)

    # What takes no part is not read: 0 * NaN would be NaN.
    rows = pairs.any(axis=3, keepdims=True)  # (b h i 1)
    keys = pairs.reshape(b, hk, group * i, j, 1).any(axis=2)  # (b hk j 1)
    grouped = (b, hk, group, i)
    q = np.where(rows, q, 0).reshape(*grouped, d)
    dout = np.where(rows, dout, 0).reshape(*grouped, dv)
    k, v = np.where(keys, k, 0), np.where(keys, v, 0)
    ok = pairs.reshape(*grouped, j)

    k_grouped, v_grouped = k[:, :, None], v[:, :, None]  # (b hk 1 j d), (b hk 1 j dv)
    s = _product(q, k_grouped.swapaxes(3, 4), order) * work.type(scale)
    if softcap is not None:
        capped = _tanh(s / work.type(softcap))
        s = work.type(softcap) * capped
    if given.get("bias") is not None:
        bias = dtypes.round_to(given["bias"], work.name)
        s = s + np.broadcast_to(bias, pairs.shape).reshape(ok.shape)
    score_fn = given.get("score_fn")
    if score_fn is not None:
        score_fn = ScoreFn(score_fn.kind, score_fn.table.astype(work))
        scored = np.where(pairs, s.reshape(pairs.shape), 0), *np.ogrid[:b, :h, :i, :j]
        s = score_fn(*scored).reshape(ok.shape)
    s = np.where(ok, s, -np.inf)
    sinks = (
        np.full(h, -np.inf, dtype=work) if given.get("sinks") is None else dtypes.round_to(given["sinks"], work.name)
    )
    sink = sinks.reshape(1, hk, group, 1, 1)
    top = np.maximum(s.max(axis=-1, keepdims=True, initial=-np.inf), sink)
    shift = np.where(top == -np.inf, 0, top)
    e, e_sink = np.exp(s - shift), np.exp(sink - shift)
    total = _sum(e, (4,), order) + e_sink
    with np.errstate(divide="ignore"):
        lse = shift + np.log(total)  # (b hk group i 1)
    p = e / np.where(total == 0, 1, total)
    keep = np.ones(ok.shape, dtype=work)
    if dropout:
        keep = philox.keep_mask(given["dropout_seed"], pairs.shape, dropout).reshape(ok.shape) / work.type(1 - dropout)
    out = _product(p * keep, v_grouped, order).reshape(b, h, i, dv)

    # p = exp(s - lse), but for rows whose lse is so large that log(total) is lost in it, or nearly.
    finite = np.where(lse == -np.inf, 0, lse)
    from_lse = dtypes.ulp(finite, work.name) < 2.0**-10
    total = np.where(total == 0, 1, total)
    p = np.where(from_lse, np.exp(s - finite), p)
    p_sink = np.where(from_lse, np.exp(sink - finite), e_sink / total)
    dropped = p * keep

    flat = (b, hk, group * i)  # all the queries that read a key/value head
    gradient = {"v": _product(dropped.reshape(*flat, j).swapaxes(2, 3), dout.reshape(*flat, dv), order)}
    dp = _product(dout, v_grouped.swapaxes(3, 4), order) * keep
    dlse = np.zeros((b, h, i)) if problem.lse_cotangent is None else problem.lse_cotangent
    dlse = np.where(lse == -np.inf, 0, np.asarray(dlse, dtype=work).reshape(lse.shape))
    delta = _sum(p * dp, (4,), order)
    ds = p * (dp - delta + dlse)
    if score_fn is not None:
        entry, factor = score_fn.entries(*scored)
        ds_pairs = ds.reshape(pairs.shape)
        gradient["table"] = _scatter(ds_pairs * factor, entry, score_fn.table, order)
        ds = (ds_pairs * score_fn.slope(*scored)).reshape(ok.shape)
    if given.get("bias") is not None:
        broadcast = tuple(axis for axis, size in enumerate(bias.shape) if size == 1)
        gradient["bias"] = _sum(ds.reshape(pairs.shape), broadcast, order)
    if given.get("sinks") is not None:
        gradient["sinks"] = _sum(p_sink * (dlse - delta), (0, 3, 4), order).reshape(h)
    if softcap is not None:
        ds = ds * (1 - capped * capped)
    gradient["q"] = _product(ds, k_grouped, order).reshape(b, h, i, d) * work.type(scale)
    gradient["k"] = _product(ds.reshape(*flat, j).swapaxes(2, 3), q.reshape(*flat, d), order) * work.type(scale)

    def store(x: Array, name: str, heads: bool) -> NDArray[np.float64]:
        return dtypes.round_to(x.swapaxes(1, 2) if heads and bnhd else x, name).astype(np.float64)

    return Outcome(
        store(out, names["q"], True),
        None if problem.lse_cotangent is None else lse.reshape(b, h, i).astype(np.float64),
        {name: store(gradient[name], names[name], name in "qkv") for name in names},
    )


def _order(n: int, order: int) -> NDArray[np.intp]:
    """In which order n terms are summed: as they come, backwards, or shuffled."""
    if order < 2:
        return np.arange(n)[:: 1 if order == 0 else -1]
    return np.random.default_rng(order).permutation(n)


def _product(a: Array, b: Array, order: int) -> Array:
    """(... m n), (... n p) -> (... m p), one term at a time: each product is rounded, and each partial sum."""
    shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    total, term = np.zeros(shape, dtype=a.dtype), np.empty(shape, dtype=a.dtype)
    for n in _order(a.shape[-1], order):
        total += np.multiply(a[..., n, None], b[..., None, n, :], out=term)
    return total


def _sum(x: Array, axes: tuple[int, ...], order: int) -> Array:
    """The sum over these axes, which stay with size 1, one term at a time."""
    kept = tuple(axis for axis in range(x.ndim) if axis not in axes)
    flat = x.transpose(*kept, *axes).reshape(*(x.shape[axis] for axis in kept), -1 if x.size else 0)
    total = np.zeros(flat.shape[:-1], dtype=x.dtype)
    if flat.size:
        total = np.add.accumulate(flat[..., _order(flat.shape[-1], order)], axis=-1)[..., -1]
    return total.reshape([1 if axis in axes else size for axis, size in enumerate(x.shape)])


def _scatter(x: Array, entry: NDArray[np.intp], like: Array, order: int) -> Array:
    """What is added up at each entry, one term at a time."""
    total, at = np.zeros(like.size, dtype=x.dtype), _order(x.size, order)
    np.add.at(total, entry.reshape(-1)[at], x.reshape(-1)[at])
    return total.reshape(like.shape)


def _tanh(x: Array) -> Array:
    """tanh in another way than NumPy's, which is the oracle's."""
    less = np.expm1(-2 * np.abs(x))
    return np.copysign(less / (less + 2), x)

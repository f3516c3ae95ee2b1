"""Is a result right? The error budget of every result, and the comparison that raises.

The rule, for out, lse and each gradient alike, by maximum and by mean:

    error <= FACTOR * (the reference's error) + ULPS * ulp(size)

An error is a distance from `attend_shared.oracle`. The reference is `attend_shared.reference`, NumPy at the same dtype,
at its worst of ORDERS orders of summation. Size is the largest (for the mean: the mean) absolute value of the result. A
maximum alone lets a small bias of every element pass, a mean alone hides one bad row.

Three things make the rule fit every case; each is as narrow as it can be:

- ulp is that of the result's dtype, or of the accumulation dtype where that is coarser: the gradient of a float64 bias
  of float32 queries is a float32 computation.
- Size is not below that of the terms which are summed into the result (`oracle.terms`). Where rows allow a single key,
  dq is 0 by mathematics: it is a sum that cancels, and no sum is more exact than its terms.
- What the formula makes exact has no budget: lse is -inf exactly where the oracle's is, out and dq are exactly 0 in
  rows without an allowed key, as is every gradient that no allowed pair contributes to, and nothing is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attend_shared import dtypes, oracle, reference
from attend_shared.call import describe
from attend_shared.oracle import Bools, Floats, Outcome, Size
from attend_shared.problems import Problem

__all__ = [
    "FACTOR",
    "ORDERS",
    "ULPS",
    "Budget",
    "Mismatch",
    "Outcome",
    "Row",
    "against_oracle",
    "budgets",
    "check",
    "errors",
]

FACTOR = 2.0
"""How many times the reference's error is allowed."""

ULPS = 4.0
"""How many units in the last place of the result's size are allowed besides."""

ORDERS = 3
"""In how many orders the reference sums. Where few rows have large logits, one is often lucky by more than FACTOR."""


class Mismatch(AssertionError):
    """A result that is not what the oracle says: which, where, both values, the budget, and where to look."""


class Row(NamedTuple):
    """One result in a table of errors. Its verdict is `check`'s: what must be exact is not a number here.

    Attributes:
        name: "out", "lse", or "d" and the argument: "dq", "dk", "dv", "dbias", "dsinks".
        max_error, max_budget, mean_error, mean_budget: absolute; a NaN, or an infinity in the wrong place, is an
            infinite error.
    """

    name: str
    max_error: float
    max_budget: float
    mean_error: float
    mean_budget: float


class Budget(NamedTuple):
    """What one result should be, and how far from it a result may lie.

    Attributes:
        name: as in `Row`.
        dtype: the result's.
        resolution: the dtype whose ulp counts: the result's, or the accumulation dtype where that is coarser.
        axes: the names of the result's axes, in its layout.
        expected: the oracle's answer.
        exact: bool, the shape of `expected`; True where 0 is required exactly.
        overflows: bool, the shape of `expected`; True where the value, finite, is too large for the dtype.
        reference_max, reference_mean: the reference's error.
        size: the largest and mean absolute value of the result, or those of its terms where they are larger.
    """

    name: str
    dtype: str
    resolution: str
    axes: tuple[str, ...]
    expected: Floats
    exact: Bools
    overflows: Bools
    reference_max: float
    reference_mean: float
    size: Size

    @property
    def maximum(self) -> float:
        """The largest error that an element may have."""
        return FACTOR * self.reference_max + ULPS * float(dtypes.ulp(self.size.largest, self.resolution))

    @property
    def mean(self) -> float:
        """The mean error that all elements may have."""
        return FACTOR * self.reference_mean + ULPS * float(dtypes.ulp(self.size.mean, self.resolution))


def budgets(problem: Problem) -> dict[str, Budget]:
    """The budget of each result of a problem by its name as in `Row`: out, lse where it is asked for, the gradients.

    Worth keeping where several implementations are checked on one problem.

    Args:
        problem: see `attend_shared.cases.Problem`.

    Returns:
        Budgets in the order of a table.

    Raises:
        ValueError: the problem is beyond its dtype: the reference itself misses it by an eighth of its size.
    """
    truth = dict(_results(oracle.evaluate(problem)))
    attempts = [dict(_results(reference.evaluate(problem, order))) for order in range(ORDERS)]
    accumulation = dtypes.accumulation(problem.dtypes["q"])
    sizes = oracle.terms(
        **problem.arguments,
        out_cotangent=problem.out_cotangent,
        lse_cotangent=problem.lse_cotangent,
        finer=dtypes.EPS[accumulation] / dtypes.EPS[problem.dtypes["q"]],
    )
    exact = _exact_zeros(problem)
    found = {}
    for name, expected in truth.items():
        dtype = accumulation if name == "lse" else problem.dtypes["q" if name == "out" else name[1:]]
        magnitude = np.abs(np.where(np.isfinite(expected), expected, 0.0))
        terms = sizes.get(name.removeprefix("d"), Size(0.0, 0.0))
        overflows = np.isinf(dtypes.round_to(magnitude, dtype))
        misses = [_distance(attempt[name], expected, overflows) for attempt in attempts]
        size = Size(max(_max(magnitude), terms.largest), max(_mean(magnitude), terms.mean))
        found[name] = Budget(
            name=name,
            dtype=dtype,
            resolution=max(dtype, accumulation, key=dtypes.EPS.__getitem__),
            axes=_axes(name, problem.arguments.get("layout", "bhnd"), expected.ndim),
            expected=expected,
            exact=exact.get(name, np.zeros(expected.shape, dtype=np.bool_)),
            overflows=overflows,
            reference_max=max(_max(miss) for miss in misses),
            reference_mean=max(_mean(miss) for miss in misses),
            size=size,
        )
        # A reference that is lost would make a budget in which everything passes.
        if not found[name].reference_max <= size.largest / 8 + dtypes.ulp(size.largest, found[name].resolution):
            off = f"off by {found[name].reference_max:.3g} where the largest number is {size.largest:.3g}"
            raise ValueError(f"{name}: expected a problem that {accumulation} can hold; NumPy itself is {off}")
    return found


def errors(outcome: Outcome, problem: Problem, known: Mapping[str, Budget] | None = None) -> list[Row]:
    """The errors of an outcome beside their budgets, for a table.

    Args:
        outcome: what was computed, float64 arrays that hold it exactly.
        problem: what was to be computed.
        known: `budgets(problem)`, if it is at hand; a part of it checks these results alone.

    Returns:
        A row for each result.

    Raises:
        Mismatch: a result is missing, not asked for, or of the wrong shape.
    """
    rows = []
    for budget, got in _pairs(outcome, budgets(problem) if known is None else known):
        error = _distance(got, budget.expected, budget.overflows)
        rows.append(Row(budget.name, _max(error), budget.maximum, _mean(error), budget.mean))
    return rows


def check(outcome: Outcome, problem: Problem, known: Mapping[str, Budget] | None = None) -> None:
    """Raise where an outcome breaks the rule of this module.

    Args:
        outcome, problem, known: as in `errors`.

    Raises:
        Mismatch: with a paragraph for each result that is wrong.

    Example:
        >>> from attend_shared.cases import Problem
        >>> q = np.ones((1, 1, 2, 4), np.float32)
        >>> v = np.array([[[[1.0], [5.0]]]], np.float32)
        >>> names = dict.fromkeys("qkv", "float32")
        >>> problem = Problem(dict(q=q, k=q, v=v, is_causal=True), names, v, None, "contiguous")
        >>> outcome = oracle.evaluate(problem)
        >>> check(outcome, problem)                             # nothing to say: it is right
        >>> outcome.out[0, 0, 0] = 3.0                          # as if the first query saw both keys
        >>> check(outcome, problem)
        Traceback (most recent call last):
        attend_shared.compare.Mismatch: out (float32): 1 of 2 elements over the budget
          worst at (b=0, h=0, i=0, dv=0): got 3, expected 1, error 2
          budget 9.54e-07 = 2 x 0 (NumPy at this dtype) + 4 ulp of 3 (float32)
          only at i=0
    """
    pairs = _pairs(outcome, budgets(problem) if known is None else known)
    faults = [fault for budget, got in pairs for fault in _faults(budget, got)]
    if faults:
        raise Mismatch("\n".join(faults))


def against_oracle(attention: Callable[..., Any], problem: Problem) -> list[Row]:
    """Hold an attention of your own against the oracle.

    Args:
        attention: called with the problem's arguments as NumPy arrays, by keyword, and with return_lse=True where the
            problem asks for lse. It returns out, or (out, lse), as anything that `numpy.asarray` reads; or it returns
            an `Outcome`, and its gradients are checked as well.
        problem: see `attend_shared.cases.Problem`.

    Returns:
        The rows of `errors`, for the results that were returned.

    Raises:
        TypeError: problem is none; or attention returns no pair where it is asked for lse.
        Mismatch: a result is wrong.

    Example:
        >>> from attend_shared.cases import Problem
        >>> def mine(q, k, v, *, scale):
        ...     p = np.exp(scale * q @ k.swapaxes(2, 3))
        ...     return p / p.sum(3, keepdims=True) @ v
        >>> q, k, v, dout = np.random.default_rng(0).standard_normal((4, 1, 2, 8, 4))
        >>> problem = Problem(dict(q=q, k=k, v=v, scale=0.3), dict.fromkeys("qkv", "float64"), dout, None, "contiguous")
        >>> [row.name for row in against_oracle(mine, problem)]
        ['out']
        >>> against_oracle(lambda q, k, v, scale: mine(q, k, v, scale=0.5), problem)
        Traceback (most recent call last):
        attend_shared.compare.Mismatch: out (float64): 64 of 64 elements over the budget
          ...
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"problem: expected a Problem, got {describe(problem)}. Cases make one: case(...).build().")
    asks = {} if problem.lse_cotangent is None else {"return_lse": True}
    answer = attention(**problem.arguments, **asks)
    known = budgets(problem)
    if not isinstance(answer, Outcome):
        if asks and not (isinstance(answer, (tuple, list)) and len(answer) == 2):
            raise TypeError(f"attention: expected (out, lse) where return_lse=True, got {describe(answer)}.")
        out, lse = answer if asks else (answer, None)
        answer = Outcome(np.asarray(out, np.float64), None if lse is None else np.asarray(lse, np.float64), {})
        known = {name: budget for name, budget in known.items() if name in ("out", "lse")}
    check(answer, problem, known)
    return errors(answer, problem, known)


def _results(outcome: Outcome) -> Iterator[tuple[str, Floats]]:
    yield "out", outcome.out
    if outcome.lse is not None:
        yield "lse", outcome.lse
    for name, gradient in outcome.gradients.items():
        yield f"d{name}", gradient


def _pairs(outcome: Outcome, known: Mapping[str, Budget]) -> list[tuple[Budget, Floats]]:
    """Each result beside its budget; one that is missing, or of another shape, is a mismatch like any other."""
    results = {name: np.asarray(x, dtype=np.float64) for name, x in _results(outcome)}
    if set(results) != set(known):
        raise Mismatch(f"results: expected {', '.join(known)}; got {', '.join(results)}")
    for name, budget in known.items():
        if results[name].shape != budget.expected.shape:
            letters = f"({' '.join(budget.axes)})"
            raise Mismatch(f"{name}: expected shape {letters} = {budget.expected.shape}; got {results[name].shape}")
    return [(budget, results[name]) for name, budget in known.items()]


def _distance(got: Floats, expected: Floats, overflows: Bools) -> Floats:
    """|got - expected|, where equal infinities are equal, and NaN is infinitely far from anything."""
    same = (got == expected) | (overflows & np.isinf(got) & (np.sign(got) == np.sign(expected)))
    with np.errstate(invalid="ignore"):  # inf - inf
        distance = np.abs(got - expected)
    return np.where(same, 0.0, np.where(np.isnan(distance), np.inf, distance))


def _max(x: NDArray[Any]) -> float:
    return float(np.max(x, initial=0.0))


def _mean(x: NDArray[Any]) -> float:
    return float(np.mean(x)) if x.size else 0.0


def _axes(name: str, layout: str, rank: int) -> tuple[str, ...]:
    match name:
        case "dtable":
            return tuple(f"axis {n}" for n in range(rank))
        case "lse":
            return ("b", "h", "i")
        case "dbias":
            return ("b", "h", "i", "j")
        case "dsinks":
            return ("h",)
    heads, length = ("h", "i") if name in ("out", "dq") else ("hk", "j")
    size = "dv" if name in ("out", "dv") else "d"
    return ("b", heads, length, size) if layout == "bhnd" else ("b", length, heads, size)


def _exact_zeros(problem: Problem) -> dict[str, Bools]:
    """Where the sum behind an element is over no allowed pair at all, in the shapes of the results."""
    given = problem.arguments
    pairs = oracle.allowed(**given)
    b, h, i, j = pairs.shape
    bnhd = given.get("layout", "bhnd") == "bnhd"
    hk = np.shape(given["k"])[2 if bnhd else 1]
    rows = ~np.any(pairs, axis=3, keepdims=True)  # (b h i 1)
    keys = ~np.any(pairs.reshape(b, hk, h // hk * i, j, 1), axis=2)  # (b hk j 1)
    zeros = {}
    for name, x, like in (
        ("out", rows, problem.out_cotangent),
        ("dq", rows, given["q"]),
        ("dk", keys, given["k"]),
        ("dv", keys, given["v"]),
    ):
        zeros[name] = np.broadcast_to(x.swapaxes(1, 2) if bnhd else x, np.shape(like))
    if given.get("bias") is not None:
        broadcast = tuple(axis for axis, size in enumerate(np.shape(given["bias"])) if size == 1)
        zeros["dbias"] = ~np.any(pairs, axis=broadcast, keepdims=True)
    if given.get("sinks") is not None:
        zeros["dsinks"] = np.equal(given["sinks"], -np.inf)
    if given.get("score_fn") is not None:
        entry, _ = given["score_fn"].entries(np.ones(pairs.shape), *np.ogrid[:b, :h, :i, :j])
        table = given["score_fn"].table
        zeros["dtable"] = np.bincount(entry[pairs], minlength=table.size).reshape(table.shape) == 0
    return zeros


def _faults(budget: Budget, got: Floats) -> Iterator[str]:
    """What is wrong with a result, in a paragraph; nothing where nothing is."""
    error = _distance(got, budget.expected, budget.overflows)
    title = f"{budget.name} ({budget.dtype})"

    def worst(among: Bools) -> str:
        at = np.unravel_index(int(np.argmax(np.where(among, error, -1.0))), error.shape)
        where = ", ".join(f"{axis}={n}" for axis, n in zip(budget.axes, at, strict=True))
        return f"worst at ({where}): got {got[at]:.9g}, expected {budget.expected[at]:.9g}, error {error[at]:.3g}"

    def rule(limit: float, of_reference: float, size: float) -> str:
        ulps = f"{ULPS:g} ulp of {size:.3g} ({budget.resolution})"
        return f"budget {limit:.3g} = {FACTOR:g} x {of_reference:.3g} (NumPy at this dtype) + {ulps}"

    misplaced = (budget.name == "lse") & ((got == -np.inf) != (budget.expected == -np.inf))
    exactly = (
        (np.isnan(got), "NaN", "an empty row (-inf minus -inf), or a leak from where nothing may be read"),
        (misplaced, "-inf in one and finite in the other", "lse is -inf where a row has no allowed key and no sink"),
        (budget.exact & (got != 0), "not exactly 0", "a query without keys, a key without queries, or a sink of -inf"),
    )
    for bad, what, hint in exactly:
        if bad.any():
            yield f"{title}: {np.sum(bad)} of {bad.size} elements {what}\n  {worst(bad)}\n  {hint}"
            return
    over, mean = error > budget.maximum, _mean(error)
    if over.any():
        yield (
            f"{title}: {np.sum(over)} of {over.size} elements over the budget\n  {worst(over)}\n"
            f"  {rule(budget.maximum, budget.reference_max, budget.size.largest)}\n  {_hint(budget, got, over)}"
        )
    elif mean > budget.mean:
        over = error > budget.mean
        yield (
            f"{title}: mean error {mean:.3g} over the budget, by small errors of many elements\n  {worst(over)}\n"
            f"  {rule(budget.mean, budget.reference_mean, budget.size.mean)}\n  {_hint(budget, got, over)}"
        )


def _hint(budget: Budget, got: Floats, bad: Bools) -> str:
    """What the wrong elements have in common: a factor, or the places they are confined to."""
    usable = np.isfinite(budget.expected) & np.isfinite(got)
    expected, found = np.where(usable, budget.expected, 0.0), np.where(usable, got, 0.0)
    power = float(np.sum(expected * expected))
    if bad.size > 1 and power > 0:
        factor = float(np.sum(found * expected)) / power
        limit = max(1.0, abs(factor)) * budget.maximum
        if abs(factor - 1) > 1e-3 and _max(np.abs(found - factor * expected)) <= limit:
            base = ": 1 / log(2), a logarithm of base 2" if abs(factor * np.log(2) - 1) < 1e-2 else ""
            return f"all of it is {factor:.6g} times what is expected{base}"
    places = []
    for axis, name in enumerate(budget.axes):
        at = np.flatnonzero(bad.any(axis=tuple(other for other in range(bad.ndim) if other != axis)))
        if len(at) < bad.shape[axis]:
            places.append(f"{name}={', '.join(map(str, at[:8]))}{', ...' if len(at) > 8 else ''}")
    return f"only at {'; '.join(places)}" if places else f"along the whole of {', '.join(budget.axes)}"

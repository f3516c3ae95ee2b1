"""Every case on every implementation of both frameworks: against the oracle, and one framework against the other.

What `attend parity` and the tests run. A framework is loaded by its name when it is asked for, never before; what one
case needs of the oracle is computed once and shared. Nothing here raises because an implementation is wrong: wrong is a
result like any other.
"""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager, nullcontext
from importlib import import_module, metadata
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from attend_shared import compare, wrong_calls
from attend_shared.cases import FEATURES, Case, Problem
from attend_shared.choice import Explanation, Implementation
from attend_shared.compare import Budget, Mismatch, Outcome, Row
from attend_shared.errors import UnsupportedError
from attend_shared.processes import CRASHES, START, Lost, Process, Processes
from attend_shared.wrong_calls import WrongCall

__all__ = ["CHECKS", "EVERYTHING", "FRAMEWORKS", "INSTALL", "LIMIT", "Difference", "MissingError", "Report", "Result",
           "Summary", "Twin", "call_wrongly", "difference", "examine", "explain", "hold", "load", "reasons", "refusals",
           "run", "shapes", "share", "stop_words", "summarise", "versions", "where", "work"]  # fmt: skip

FRAMEWORKS = ("torch", "jax")
INSTALL = {name: f'pip install "attend-twin[{name}]"' for name in FRAMEWORKS}

EVERYTHING = "everything"
"""The feature of a `Summary` that counts every case of an implementation."""

CHECKS = "checks"
"""Stands for an implementation in the results of wrong calls, which no implementation ever sees."""

LIMIT = 600.0
"""Seconds that one implementation may take for one case, in one of several processes, before it counts as hung, where
nothing else is said."""

_PACKAGES = {"torch": ("torch",), "jax": ("jax", "jaxlib", "flax")}
# Implementations that play one role in their frameworks, besides those of one name.
_SAME_ROLE = (("sdpa", "xla"), ("sdpa", "cudnn"))
# Those that promise the same bits in both frameworks.
_SAME_BITS = ("triton",)


class MissingError(ImportError):
    """A framework that was asked for is not installed."""


class Twin(NamedTuple):
    """A framework that is installed, with what is run of it.

    Attributes:
        framework: "torch" or "jax".
        package: attend_torch or attend_jax.
        bridge: its bridge: evaluate, call, implementations, devices.
        table: its implementations on this machine, in order of preference.
    """

    framework: str
    package: Any
    bridge: Any
    table: tuple[Implementation, ...]


class Result(NamedTuple):
    """What one implementation made of one case, or the checks of one wrong call.

    Attributes:
        framework, implementation: which; the implementation is `CHECKS` for a wrong call.
        case: the case's name.
        features: the rows in which it counts.
        verdict: "ok", "refused" or "failed".
        text: the reason of a refusal, or what is wrong, or None.
        share: the worst error as a share of its budget, by maximum or by mean; 0 where nothing was computed. The
            verdict is more than this number: a value that must be exact has no budget.
        worst: the name of that result, as in `attend_shared.compare.Row`, or "".
        errors: every result's error and budget.
        seconds: what it took, compilation included.
    """

    framework: str
    implementation: str
    case: str
    features: tuple[str, ...]
    verdict: str
    text: str | None
    share: float
    worst: str
    errors: tuple[Row, ...]
    seconds: float


class Difference(NamedTuple):
    """How far two implementations of different frameworks lie apart in one case.

    Attributes:
        first, second: framework and implementation.
        case: the case's name.
        share: the largest difference as a share of the budget of its result. Two that keep to the budget lie at most
            two budgets apart.
        worst: the name of that result, or "".
    """

    first: tuple[str, str]
    second: tuple[str, str]
    case: str
    share: float
    worst: str


class Report(NamedTuple):
    """All that came of one case."""

    case: Case
    results: tuple[Result, ...]
    differences: tuple[Difference, ...]


class Summary(NamedTuple):
    """One row of the table: the cases of one feature on one implementation.

    Attributes:
        framework, implementation, feature: which.
        cases, refused, failed: how many there are, and how many of them came out so.
        share, worst, case: the worst error as a share of its budget, of which result, in which case.
        seconds: of all of them together.
    """

    framework: str
    implementation: str
    feature: str
    cases: int
    refused: int
    failed: int
    share: float
    worst: str
    case: str
    seconds: float

    @property
    def verdict(self) -> str:
        """ "failed" if anything did; "refused" if nothing was served; else "ok"."""
        if self.failed:
            return "failed"
        return "refused" if self.refused == self.cases else "ok"


def load(framework: str) -> Twin:
    """Import a framework's twin.

    Args:
        framework: "torch" or "jax".

    Raises:
        MissingError: the framework is not installed. Any other import error is a fault and stays what it is.
    """
    try:
        package = import_module(f"attend_{framework}")
        bridge = import_module(f"attend_{framework}.bridge")
    except ModuleNotFoundError as error:
        if error.name not in (*_PACKAGES[framework], f"attend_{framework}"):
            raise
        raise MissingError(f"{framework} is left out: {error.name} is not installed. {INSTALL[framework]}") from error
    return Twin(framework, package, bridge, package.implementations())


def run(
    twins: Sequence[Twin],
    cases: Iterable[Case],
    device: str = "cpu",
    implementations: Sequence[str] = (),
    jobs: int = 1,
    limit: float | None = None,
) -> Generator[Report, None, None]:
    """Run cases, one report after the other.

    Args:
        twins: of `load`.
        cases: for example `attend_shared.cases.CASES`, or what `select` gives.
        device: "cpu" or "cuda".
        implementations: names; none are all.
        jobs: how many processes run them. One is this process where there is no limit; others load the frameworks of
            twins anew. What dies or hangs in one of those has failed, and the rest goes on in a fresh process.
        limit: seconds that one implementation may take for one case; None is `LIMIT` where there are several processes.

    Yields:
        A report for each case: of one process in their order, of several as they come. Whoever stops listening closes
        it, and ends with it what still runs.
    """
    if jobs == 1 and limit is None:
        for case in cases:
            yield examine(case, twins, device, implementations)
        return
    job = tuple(twin.framework for twin in twins), device, implementations
    table = [(twin, it) for twin in twins for it in twin.table if it.name in implementations or not implementations]
    able = [(twin.framework, it.name) for twin, it in table if it.available]
    losses: Counter[tuple[str, str]] = Counter()
    idle: SimpleQueue[Process | None] = SimpleQueue()
    for _ in range(jobs):
        idle.put(None)  # one that has not been started

    def there(case: Case) -> Report:
        lost = {key: f"given up after {CRASHES} processes were lost" for key in able if losses[key] >= CRASHES}
        while len(lost) < len(able):
            known = idle.get()
            process = known or processes.start("attend_shared.parity:work")
            at = found = None
            try:
                if known is None:
                    process.ask(job)
                    process.answer(START)
                process.ask((case, lost))
                while found is None:
                    at, found = process.answer(LIMIT if limit is None else limit)
            except Lost as error:
                processes.end(process)
                idle.put(None)
                if processes.stopped:
                    raise
                for key in able if at is None else [at]:  # all, where the case could not even be made
                    lost.setdefault(key, str(error))
                    losses[key] += 1
            else:
                idle.put(process)
                return Report(case, *found)
        return Report(case, tuple(_lost(case, twin, it, lost) for twin, it in table), ())

    with Processes(jobs) as processes:
        for each in as_completed([processes.pool.submit(there, case) for case in cases]):
            yield each.result()


def _lost(case: Case, twin: Twin, it: Implementation, lost: Mapping[tuple[str, str], str]) -> Result:
    """The result of an implementation in a case of which nothing is left to run."""
    verdict, text = ("failed", lost[twin.framework, it.name]) if it.available else ("refused", it.reason)
    return Result(twin.framework, it.name, case.name, case.features, verdict, text, 0.0, "", (), 0.0)


def work(asked: Iterator[Any], say: Callable[[Any], None]) -> None:
    """The other end of `run`, where other processes run the cases.

    Args:
        asked: names of frameworks, device and implementations; then cases, each with what is lost: texts, by framework
            and implementation, of what is not to be run again.
        say: is told that all is ready; then for each case, in pairs with None, each framework and implementation that
            begins to run, and the results and differences.
    """
    frameworks, device, implementations = next(asked)
    twins = [load(framework) for framework in frameworks]
    say(None)
    for case, lost in asked:
        watched = [twin._replace(bridge=SimpleNamespace(evaluate=_watched(twin, lost, say))) for twin in twins]
        say((None, examine(case, watched, device, implementations)[1:]))


def _watched(twin: Twin, lost: Mapping[tuple[str, str], str], say: Callable[[Any], None]) -> Callable[..., Outcome]:
    """The evaluate of a twin, which says what begins to run, and runs nothing that is lost."""

    def evaluate(problem: Problem, implementation: str, device: str) -> Outcome:
        key = twin.framework, implementation
        if key in lost:
            raise Lost(lost[key])
        say((key, None))
        return twin.bridge.evaluate(problem, implementation, device)

    return evaluate


def examine(case: Case, twins: Sequence[Twin], device: str = "cpu", implementations: Sequence[str] = ()) -> Report:
    """Run one case.

    Args:
        case, twins, device, implementations: as in `run`.

    Returns:
        Its report.
    """
    return Report(case, *hold(case.name, case.build(), twins, device, implementations, case.features))


def hold(
    name: str,
    problem: Problem,
    twins: Sequence[Twin],
    device: str = "cpu",
    implementations: Sequence[str] = (),
    features: tuple[str, ...] = (),
) -> tuple[tuple[Result, ...], tuple[Difference, ...]]:
    """Take any problem through every implementation, each once, and compare with the oracle and across the frameworks.

    Args:
        name: of the problem, for the results.
        problem: see `attend_shared.cases.Problem`.
        twins, device, implementations: as in `run`.
        features: for the results.

    Returns:
        results and differences, in the order of the twins' tables.
    """
    known = compare.budgets(problem)
    results: list[Result] = []
    outcomes: dict[tuple[str, str], Outcome] = {}
    for twin in twins:
        for implementation in twin.table:
            if implementations and implementation.name not in implementations:
                continue
            result, outcome = _evaluate(name, features, problem, known, twin, implementation, device)
            results.append(result)
            if outcome is not None:
                outcomes[twin.framework, implementation.name] = outcome
    differences = tuple(
        Difference(first, second, name, *difference(outcomes[first], outcomes[second], known))
        for first, second in _pairs(outcomes)
    )
    return tuple(_of_same_bits(result, differences) for result in results), differences


def _of_same_bits(result: Result, differences: Iterable[Difference]) -> Result:
    """The result, failed if it promises the bits of the other framework and has not got them."""
    for each in differences:
        ours = each.second == (result.framework, result.implementation) and each.first[1] == result.implementation
        if ours and result.implementation in _SAME_BITS and each.share:
            return result._replace(verdict="failed", text=f"{each.worst}: not the bits of attend_{each.first[0]}")
    return result


def _evaluate(
    name: str,
    features: tuple[str, ...],
    problem: Problem,
    known: Mapping[str, Budget],
    twin: Twin,
    implementation: Implementation,
    device: str,
) -> tuple[Result, Outcome | None]:
    """The result, and the outcome if there is one of the right form."""
    started = time.perf_counter()
    verdict, text, outcome = "ok", None, None
    rows: tuple[Row, ...] = ()
    try:
        if not implementation.available:
            raise UnsupportedError(((implementation.name, str(implementation.reason)),))
        outcome = twin.bridge.evaluate(problem, implementation.name, device)
    except UnsupportedError as error:
        verdict, text = "refused", "; ".join(reason for _, reason in error.reasons)
    except Lost as lost:
        verdict, text = "failed", str(lost)
    except Exception as error:  # noqa: BLE001 (whatever an implementation raises is its result)
        verdict, text = "failed", _raised(error)
    seconds = time.perf_counter() - started
    if outcome is not None:
        text, rows = _judge(outcome, problem, known)
        verdict = "ok" if text is None else "failed"
        outcome = outcome if rows else None
    shares = [(share(row), row.name) for row in rows]
    most, worst = max(shares, default=(0.0, ""), key=lambda pair: pair[0])
    return Result(
        twin.framework, implementation.name, name, features, verdict, text, most, worst, rows, seconds
    ), outcome


def _raised(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _judge(outcome: Outcome, problem: Problem, known: Mapping[str, Budget]) -> tuple[str | None, tuple[Row, ...]]:
    """What is wrong, if anything, and the errors, if they can be had."""
    try:
        rows = tuple(compare.errors(outcome, problem, known))
    except Mismatch as mismatch:  # something is missing or of another shape
        return str(mismatch), ()
    try:
        compare.check(outcome, problem, known)
    except Mismatch as mismatch:
        return str(mismatch), rows
    return None, rows


def share(row: Row) -> float:
    """The error of a result as a share of its budget: the larger of maximum and mean.

    Example:
        >>> share(Row("out", max_error=1e-7, max_budget=4e-7, mean_error=1e-8, mean_budget=2e-8))
        0.5
        >>> share(Row("out", 0.0, 0.0, 0.0, 0.0)), share(Row("out", 1.0, 0.0, 1.0, 0.0))
        (0.0, inf)
    """
    return max(_ratio(row.max_error, row.max_budget), _ratio(row.mean_error, row.mean_budget))


def _ratio(error: float, budget: float) -> float:
    return 0.0 if error == 0 else error / budget if budget else float("inf")


def _pairs(outcomes: Iterable[tuple[str, str]]) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Those of two frameworks that have one name or one role, the first framework first."""
    keys = list(outcomes)
    return [
        (first, second)
        for n, first in enumerate(keys)
        for second in keys[n + 1 :]
        if first[0] != second[0]
        and (first[1] == second[1] or (first[1], second[1]) in _SAME_ROLE or (second[1], first[1]) in _SAME_ROLE)
    ]


def difference(first: Outcome, second: Outcome, known: Mapping[str, Budget]) -> tuple[float, str]:
    """The largest difference of two outcomes as a share of the budget of its result, and the name of that result.

    Equal infinities do not differ, nor do overflows that the dtype cannot hold; a NaN differs from everything.

    Args:
        first, second: outcomes of the form of the problem.
        known: `attend_shared.compare.budgets` of the problem.
    """
    results = [
        {"out": it.out, "lse": it.lse} | {f"d{name}": x for name, x in it.gradients.items()} for it in (first, second)
    ]
    worst = (0.0, "")
    for name, budget in known.items():
        a, b = (np.asarray(result[name], np.float64) for result in results)
        with np.errstate(invalid="ignore"):
            apart = np.abs(a - b)
        apart = np.where((a == b) | (budget.overflows & (np.isinf(a) | np.isinf(b))), 0.0, apart)
        apart = np.where(np.isnan(apart), np.inf, apart)
        worst = max(worst, (_ratio(float(np.max(apart, initial=0.0)), budget.maximum), name), key=lambda pair: pair[0])
    return worst


def call_wrongly(
    twins: Sequence[Twin], device: str = "cpu", calls: Iterable[WrongCall] | None = None
) -> Iterator[Result]:
    """Make every wrong call in every framework: each must raise its error with its words.

    Args:
        twins, device: as in `run`.
        calls: what must raise; None is `attend_shared.wrong_calls.WRONG_CALLS`.

    Yields:
        A result for each call and framework, with `CHECKS` for its implementation.
    """
    for wrong in wrong_calls.WRONG_CALLS if calls is None else calls:
        for twin in twins:
            started = time.perf_counter()
            text = _call_wrongly(wrong, twin, device)
            verdict = "ok" if text is None else "failed"
            seconds = time.perf_counter() - started
            yield Result(twin.framework, CHECKS, wrong.name, ("wrong calls",), verdict, text, 0.0, "", (), seconds)


def _call_wrongly(wrong: WrongCall, twin: Twin, device: str) -> str | None:
    """What is wrong with how a wrong call was answered, or None."""
    expected = f"{wrong.error.__name__}: {wrong.text}"
    try:
        twin.bridge.call(wrong.build(), device)
    except Exception as error:  # noqa: BLE001 (which error it is, is the question)
        same = type(error) is wrong.error and str(error) == wrong.text
        return None if same else f"it raised other words\n  expected {expected}\n  got      {_raised(error)}"
    return f"it raised nothing\n  expected {expected}"


# What to say about many results.


def summarise(results: Iterable[Result]) -> list[Summary]:
    """The rows of the table: for each implementation all its cases, then those of each feature.

    Example:
        >>> one = Result("torch", "einsum", "square-float32", ("shape: i = j",), "ok", None, 0.25, "dq", (), 0.5)
        >>> two = one._replace(case="lse", features=("shape: i = j", "lse"), verdict="refused", worst="", share=0.0)
        >>> [(row.feature, row.cases, row.refused, row.share, row.verdict) for row in summarise([one, two])]
        [('everything', 2, 1, 0.25, 'ok'), ('shape: i = j', 2, 1, 0.25, 'ok'), ('lse', 1, 1, 0.0, 'refused')]
    """
    groups: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for result in results:
        group = groups.setdefault((result.framework, result.implementation), {})
        rows = result.features if result.implementation == CHECKS else (EVERYTHING, *result.features)
        for feature in rows:
            group.setdefault(feature, []).append(result)
    place = {feature: n for n, feature in enumerate((EVERYTHING, *FEATURES, "wrong calls"))}
    return [
        _row(framework, implementation, feature, group[feature])
        for (framework, implementation), group in groups.items()
        for feature in sorted(group, key=place.__getitem__)
    ]


def _row(framework: str, implementation: str, feature: str, results: list[Result]) -> Summary:
    verdicts = Counter(result.verdict for result in results)
    worst = max(results, key=lambda result: result.share)
    seconds = sum(result.seconds for result in results)
    counts = (len(results), verdicts["refused"], verdicts["failed"])
    case = worst.case if worst.worst else ""
    return Summary(framework, implementation, feature, *counts, worst.share, worst.worst, case, seconds)


def reasons(results: Iterable[Result]) -> list[tuple[str, str, str, int]]:
    """Refusals counted: (framework, implementation, reason, how many), each implementation's commonest first."""
    counts = Counter(
        (result.framework, result.implementation, str(result.text)) for result in results if result.verdict == "refused"
    )
    order = {key[:2]: n for n, key in enumerate(counts)}
    return [(*key, n) for key, n in sorted(counts.items(), key=lambda item: (order[item[0][:2]], -item[1], item[0]))]


def stop_words(stopped: tuple[int, int] | None, of: str) -> str:
    """What to say of a run that was stopped before its end, or "".

    Example:
        >>> stop_words((57, 303), "cases")
        'stopped after 57 of 303 cases'
    """
    return "" if stopped is None else f"stopped after {stopped[0]} of {stopped[1]} {of}"


def refusals(twins: Sequence[Twin], cases: Sequence[Case], device: str | None = None) -> dict[str, Any]:
    """What every implementation refuses, by asking it: nothing is computed.

    Args:
        twins, cases: as in `run`.
        device: where torch's arrays are said to be; None is nowhere.

    Returns:
        framework -> implementation -> {"serves": how many cases, "refuses": {reason: how many cases},
        "serves nothing of": the features of which it serves no case}, or {"unavailable": the reason}; fit for JSON.
    """
    asked = [(twin, case, dict(explain(twin, case.build(), device).rows)) for case in cases for twin in twins]
    met = {feature for case in cases for feature in case.features}
    found: dict[str, Any] = {}
    for twin in twins:
        for implementation in twin.table:
            entry: dict[str, Any] = {"unavailable": implementation.reason}
            if implementation.available:
                answers = [(case, rows[implementation.name]) for it, case, rows in asked if it is twin]
                counts = Counter(reason for _, reason in answers if reason is not None)
                served = {feature for case, reason in answers if reason is None for feature in case.features}
                entry = {
                    "serves": len(answers) - counts.total(),
                    "refuses": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
                    "serves nothing of": [feature for feature in FEATURES if feature in met - served],
                }
            found.setdefault(twin.framework, {})[implementation.name] = entry
    return found


def explain(twin: Twin, problem: Problem, device: str | None = None) -> Explanation:
    """`explain` of a framework on a problem, from shapes and dtypes alone.

    Args:
        twin: of `load`.
        problem: see `attend_shared.cases.Problem`.
        device: as in `refusals`.
    """
    given = problem.arguments
    dtypes = {name: x.dtype.name for name, x in given.items() if isinstance(x, np.ndarray)} | problem.dtypes
    with shapes(twin.framework, device, "float64" in dtypes.values()) as shape:
        arguments = {name: shape(x.shape, dtypes[name]) if name in dtypes else x for name, x in given.items()}
        for name in {"score_fn", "mask_fn"} & given.keys():
            table = given[name].table
            dtype = dtypes.get("table", table.dtype.name) if name == "score_fn" else table.dtype.name
            arguments[name] = given[name].of(shape(table.shape, dtype))
        return twin.package.explain(**arguments, return_lse=problem.lse_cotangent is not None)


@contextmanager
def shapes(framework: str, device: str | None = None, float64: bool = False) -> Iterator[Callable[..., Any]]:
    """A maker of arrays without contents, for `explain`: called with a shape and the name of a dtype.

    Args:
        framework: "torch" or "jax".
        device: where torch's are said to be, whether that is here or not; None is the meta device. JAX's are nowhere.
        float64: whether JAX should take float64 while this lasts.
    """
    module = import_module(framework)
    if framework == "torch":
        place = device or "meta"
        with import_module("torch._subclasses").FakeTensorMode():
            yield lambda shape, dtype: module.empty(tuple(shape), dtype=getattr(module, dtype), device=place)
    else:
        numpy = import_module("jax.numpy")
        with module.enable_x64(True) if float64 else nullcontext():
            yield lambda shape, dtype: module.ShapeDtypeStruct(tuple(shape), numpy.dtype(dtype))


def versions(twins: Iterable[Twin] = ()) -> dict[str, str]:
    """Versions of what takes part, by name: Python, the project, NumPy, and what stands behind each twin."""
    names = ["attend-twin", "numpy", *(package for twin in twins for package in _PACKAGES[twin.framework])]
    return {"python": platform.python_version()} | {name: _version(name) for name in names}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed as a distribution"


def where(twins: Sequence[Twin], device: str) -> str:
    """The device in words, with the names that the frameworks know it by.

    Args:
        twins: what runs there.
        device: "cpu" or "cuda".

    Raises:
        ValueError: a framework has no such device here.
    """
    for twin in twins:
        there = twin.bridge.devices()
        if device not in there:
            raise ValueError(f"{twin.framework} has no device {device!r} here: it runs on {', '.join(there)}.")
    names = {"cpu": _processor}.get(device, lambda: _accelerator(twins))()
    return f"{device}: {names}, {platform.system()}"


def _processor() -> str:
    return platform.machine() or "unknown processor"


def _accelerator(twins: Sequence[Twin]) -> str:
    kinds = []
    for twin in twins:
        module = import_module(twin.framework)
        kinds.append(module.cuda.get_device_name() if twin.framework == "torch" else module.devices()[0].device_kind)
    return ", ".join(dict.fromkeys(kinds))

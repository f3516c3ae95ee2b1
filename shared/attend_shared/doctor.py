"""Which implementations are right on this machine, in the calls that kernels are known to get wrong.

What `attend doctor` runs. Every implementation computes in processes of its own, where it may crash, hang, or leave a
GPU's context broken behind it: each of these is a finding, and the rest goes on in a fresh process. What it computed is
judged here, by the budget of `attend_shared.compare` against the oracle. Nothing here raises because an implementation
is wrong.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from attend_shared import avoid, canaries, choice, compare, parity, runs, shapes
from attend_shared.avoid import Machine, Rule
from attend_shared.call import NAMES, Call
from attend_shared.canaries import Canary
from attend_shared.choice import Explanation
from attend_shared.compare import Budget, Mismatch, Outcome
from attend_shared.errors import UnsupportedError
from attend_shared.parity import Twin
from attend_shared.problems import Problem
from attend_shared.processes import CRASHES, START, Lost, Process, Processes
from attend_shared.shapes import Shape

__all__ = ["DTYPES", "LIMIT", "PART", "QUICK_DTYPES", "VERDICTS", "Finding", "Run", "Target",
           "as_json", "call_of", "examine", "explain", "plan", "reasons", "rules", "targets", "work"]  # fmt: skip

VERDICTS = ("safe", "refuses", "wrong", "crashed", "hung", "not run")

DTYPES = ("bfloat16", "float16", "float32")
"""What is run unless others are asked for."""

QUICK_DTYPES = ("bfloat16", "float32")

LIMIT = 120.0
"""Seconds that one call may take, compiling included, before it counts as hung."""

PART = 12
"""Calls that a process runs at least, where an implementation's are shared out among several."""

_BAD = ("wrong", "crashed", "hung")
_BEFORE = (NotImplementedError, RecursionError)


class Target(NamedTuple):
    """What is run.

    Attributes:
        framework: "torch" or "jax".
        implementation: its name; in reports, where `evaluate` is given.
        platform: "cpu" or "cuda".
        evaluate: "module:function", called with a problem, the name and the platform, and giving an `Outcome`, instead
            of the evaluate of the framework's bridge. For attentions of one's own.
    """

    framework: str
    implementation: str
    platform: str
    evaluate: str = ""


class Finding(NamedTuple):
    """What came of one canary on one implementation.

    Attributes:
        framework, platform, implementation, dtype, canary: which.
        verdict: of `VERDICTS`. An exception other than a refusal is a crash.
        text: why it refuses, what is wrong and where, or how it died; or None.
        results: of `avoid.RESULTS`, what is wrong.
        share: the worst error as a share of its budget, by maximum or by mean.
        bits: where it was run twice, the results whose bits were others the second time; else None.
        chosen: whether implementation=None takes it for this call.
        seconds: what it took, compiling included.
    """

    framework: str
    platform: str
    implementation: str
    dtype: str
    canary: str
    verdict: str
    text: str | None = None
    results: tuple[str, ...] = ()
    share: float = 0.0
    bits: tuple[str, ...] | None = None
    chosen: bool = False
    seconds: float = 0.0


class Run(NamedTuple):
    """A whole examination.

    Attributes:
        device: in words.
        machines: for which it holds.
        missing: for each framework that is not installed, how to get it; and what else bears on the choice.
        findings: all of them.
        gradients: whether gradients were judged.
        seconds: what all of it took.
        stopped: of one that was stopped before its end, how many calls were run and how many were asked for.
    """

    device: str
    machines: tuple[Machine, ...]
    missing: tuple[str, ...]
    findings: tuple[Finding, ...]
    gradients: bool
    seconds: float
    stopped: tuple[int, int] | None = None

    @property
    def bad(self) -> tuple[Finding, ...]:
        """What is wrong, crashed or hung; what is chosen first."""
        found = [it for it in self.findings if it.verdict in _BAD]
        return tuple(sorted(found, key=lambda it: not it.chosen))

    @property
    def taken(self) -> tuple[Finding, ...]:
        """What is wrong, crashed or hung, and would be chosen."""
        return tuple(it for it in self.bad if it.chosen)

    @property
    def verdict(self) -> str:
        """The run in one line."""
        counts = Counter(it.verdict for it in self.findings)
        taken, others = len(self.taken), len(self.bad) - len(self.taken)
        head = "safe: all that implementation=None takes is right here"
        if self.stopped:
            head = "not known to be safe: nothing that was run of what implementation=None takes is wrong here"
        if taken:
            head = f"NOT SAFE: {taken} calls for which implementation=None takes what is wrong here"
        elif others:
            head += f", but {others} of what it does not take is not"
        if self.stopped:
            head = f"{parity.stop_words(self.stopped, 'calls')}, {head}"
        parts = [f"{counts['safe']} safe", f"{counts['refuses']} refused", f"{counts['wrong']} wrong"]
        parts += [f"{counts[name]} {name}" for name in ("crashed", "hung", "not run") if counts[name]]
        return f"{head} ({', '.join(parts)}, in {self.seconds:.0f} s)"


def targets(twins: Sequence[Twin], platforms: Mapping[str, str], implementations: Sequence[str] = ()) -> list[Target]:
    """The implementations of frameworks, in order of preference.

    Args:
        twins: of `attend_shared.parity.load`.
        platforms: where each framework runs.
        implementations: names; none are all.
    """
    return [
        Target(twin.framework, it.name, platforms[twin.framework])
        for twin in twins
        for it in twin.table
        if not implementations or it.name in implementations
    ]


def plan(dtypes: Sequence[str] = DTYPES, quick: bool = False) -> list[tuple[Canary, str]]:
    """Every canary, or the quick ones, in every dtype."""
    return [(canary, dtype) for dtype in dtypes for canary in canaries.CANARIES if canary.quick or not quick]


def examine(
    them: Sequence[Target],
    pairs: Sequence[tuple[Canary, str]],
    *,
    jobs: int = 1,
    limit: float = LIMIT,
    gradients: bool = True,
) -> Generator[Finding, None, None]:
    """Run canaries on implementations, `jobs` processes at a time.

    Args:
        them: what is run; their frameworks are installed.
        pairs: canaries and dtypes.
        jobs: how many processes there may be at a time.
        limit: seconds that a call may take.
        gradients: whether gradients are judged; they are computed in any case.

    Yields:
        Findings as they come; one for each target and pair. Whoever stops listening closes it, and with it every
        process that still runs.
    """
    units: list[tuple[Target, list[_Item]]] = []
    asked: dict[tuple[str, str, str, str], Explanation] = {}
    uses: Counter[tuple[str, str]] = Counter()
    for target in them:
        items: list[_Item] = []
        for canary, dtype in pairs:
            key = (target.framework, target.platform, canary.name, dtype)
            if key not in asked:
                asked[key] = explain(canary.build(dtype), *key[:2])
            item = _Item(canary, dtype, asked[key].chosen == target.implementation)
            reason = None if target.evaluate else _refusal(asked[key], target.implementation)
            if reason is None:
                items.append(item)
                uses[canary.name, dtype] += 1
            else:
                yield _finding(target, item, "refuses", text=reason)
        units.append((target, items))
    # Cut where there are more processors than implementations; a part is worth the time that a process takes to start.
    if jobs > len(them):
        size = max(PART, -(-sum(len(part) for _, part in units) // (3 * jobs)))
        units = [(target, part[at : at + size]) for target, part in units for at in range(0, len(part), size)]
    units = [unit for unit in units if unit[1]]
    units.sort(key=lambda unit: (unit[0].framework != "jax", -len(unit[1])))  # what compiles longest first
    known = _Known(uses, gradients)
    found: queue.SimpleQueue[Finding | BaseException] = queue.SimpleQueue()

    def run(target: Target, part: list[_Item]) -> None:
        try:
            for finding in _examine(target, part, known, limit, processes):
                found.put(finding)
        except BaseException as error:  # noqa: BLE001 (raised again below, in the thread that asked)
            found.put(error)

    with Processes(jobs) as processes:
        for unit in units:
            processes.pool.submit(run, *unit)
        for _ in range(sum(len(part) for _, part in units)):
            it = found.get()
            if isinstance(it, BaseException):
                raise it
            yield it


class _Item(NamedTuple):
    canary: Canary
    dtype: str
    chosen: bool

    @property
    def asked(self) -> tuple[str, str]:
        return self.canary.name, self.dtype


def _finding(target: Target, item: _Item, verdict: str, **more: Any) -> Finding:
    where = target.framework, target.platform, target.implementation
    return Finding(*where, item.dtype, item.canary.name, verdict, chosen=item.chosen, **more)


# What is asked without computing anything.


def call_of(problem: Problem, framework: str, platform: str) -> Call:
    """The call of a problem as it would be there, from its shapes, with gradients.

    Args:
        problem: without a score_fn and a mask_fn.
        framework, platform: where.
    """
    given = {
        name: Shape(x.shape, problem.dtypes.get(name, x.dtype.name), name in problem.dtypes)
        if isinstance(x, np.ndarray)
        else x
        for name, x in problem.arguments.items()
    }
    return shapes.call_of(framework, platform, given | {"return_lse": problem.lse_cotangent is not None})


def explain(problem: Problem, framework: str, platform: str) -> Explanation:
    """What implementation=None takes for a problem there, and why not the others, ATTEND_AVOID included.

    Segment ids, which a choice does not read, count for the others as what they are.
    """
    call = call_of(problem, framework, platform)
    table = tuple(import_module(f"attend_{framework}.implementations").table(call))
    found = choice.explain(table, call._replace(runs=runs.UNREAD))
    if not call.segments or call.b > 1:
        return found
    q_ids, kv_ids = (problem.arguments.get(f"{side}_segment_ids") for side in ("q", "kv"))
    state, _ = runs.look(*((kv_ids, None) if q_ids is None else (q_ids, kv_ids)))
    return choice.explain(table, call._replace(runs=state))._replace(chosen=found.chosen)


def _refusal(explanation: Explanation, implementation: str) -> str | None:
    """Why an implementation cannot run, or None; one that is avoided can."""
    reason = dict(explanation.rows)[implementation]
    return None if reason is None or reason.startswith(avoid.AVOIDED) else reason


# What is computed, in processes of its own.


class _Known:
    """The budgets of problems, made once for all targets, and dropped when the last has been judged by them."""

    def __init__(self, uses: Counter[tuple[str, str]], gradients: bool) -> None:
        self._uses = uses
        self._gradients = gradients
        self._locks = {key: threading.Lock() for key in uses}
        self._made: dict[tuple[str, str], tuple[Problem, dict[str, Budget]]] = {}

    def get(self, item: _Item) -> tuple[Problem, dict[str, Budget]]:
        key = item.canary.name, item.dtype
        with self._locks[key]:
            if key not in self._made:
                problem = item.canary.build(item.dtype)
                budgets = compare.budgets(problem)
                kept = {name: it for name, it in budgets.items() if self._gradients or name in ("out", "lse")}
                self._made[key] = problem, kept
            return self._made[key]

    def done(self, item: _Item) -> None:
        key = item.canary.name, item.dtype
        with self._locks[key]:
            self._uses[key] -= 1
            if not self._uses[key]:
                self._made.pop(key, None)


def _examine(
    target: Target, items: list[_Item], known: _Known, limit: float, processes: Processes
) -> Iterator[Finding]:
    """Findings of one target, in as many processes as it takes."""
    lost, at = 0, 0
    while at < len(items) and not processes.stopped:
        if lost == CRASHES:
            for item in items[at:]:
                known.done(item)
                yield _finding(target, item, "not run", text=f"given up after {CRASHES} processes were lost")
            return
        process = processes.start("attend_shared.doctor:work")
        try:
            for finding in _process(process, target, items[at:], known, limit):
                known.done(items[at])
                at += 1
                yield finding
        finally:
            processes.end(process)
        lost += 1


def _process(process: Process, target: Target, items: list[_Item], known: _Known, limit: float) -> Iterator[Finding]:
    """Findings of one process, the one that ended it the last. It computes the next while one is judged."""
    process.ask(target)
    process.ask(items[0].asked)
    for place, item in enumerate(items):
        for ahead in items[place + 1 : place + 2]:
            process.ask(ahead.asked)
        try:
            if not place:
                process.answer(START)
            answer = process.answer(limit)
        except Lost as lost:
            yield _finding(target, item, lost.how, text=str(lost), results=(lost.how,), seconds=lost.seconds)
            return
        yield _judge(target, item, answer, known)
        if answer.get("broken"):
            return


def _judge(target: Target, item: _Item, answer: dict[str, Any], known: _Known) -> Finding:
    seconds = float(answer["seconds"])
    if "refused" in answer:
        return _finding(target, item, "refuses", text=answer["refused"], seconds=seconds)
    if "raised" in answer:
        return _finding(target, item, "crashed", text=answer["raised"], results=("crashed",), seconds=seconds)
    held = {name: np.asarray(x, np.float64) for name, x in answer["held"].items()}
    problem, budgets = known.get(item)
    judged = {name: x for name, x in held.items() if name in budgets}
    gradients = {name[1:]: x for name, x in judged.items() if name not in ("out", "lse")}
    outcome = Outcome(held["out"], held.get("lse"), gradients)
    text: str | None = None
    wrong: tuple[str, ...] = ()
    share = 0.0
    try:
        share = max(parity.share(row) for row in compare.errors(outcome, problem, budgets))
        try:
            compare.check(outcome, problem, budgets)
        except Mismatch as mismatch:  # a paragraph for each, that begins with its name
            text = str(mismatch)
            wrong = tuple(name for name in budgets if any(line.startswith(f"{name} (") for line in text.splitlines()))
    except Mismatch as mismatch:  # something is missing or of another shape
        text, wrong = str(mismatch), tuple(budgets)
    more = {"results": wrong, "share": share, "bits": answer["bits"], "seconds": seconds}
    return _finding(target, item, "wrong" if wrong else "safe", text=text, **more)


def work(asked: Iterator[Any], say: Callable[[dict[str, Any]], None]) -> None:
    """The other end: compute canaries on a target.

    Args:
        asked: the target, then names of canaries with a dtype.
        say: is told that all is ready, then what came of each canary. Where a kernel has failed on a GPU nothing that
            follows in this process can be trusted, which is said.
    """
    target: Target = next(asked)
    module, _, function = (target.evaluate or f"attend_{target.framework}.bridge:evaluate").partition(":")
    evaluate: Callable[..., Outcome] = getattr(import_module(module), function)
    if target.platform != "cpu":  # what a first call has to start there is no call's own time
        bridge = import_module(f"attend_{target.framework}.bridge")
        bridge.evaluate(canaries.find("one key").build("float32"), "einsum", target.platform)
    say({"ready": True})
    for name, dtype in asked:
        canary = canaries.find(name)
        problem = canary.build(dtype)
        started = time.perf_counter()
        try:
            outcome = evaluate(problem, target.implementation, target.platform)
            again = evaluate(problem, target.implementation, target.platform) if canary.repeat else None
        except UnsupportedError as error:
            refused = "; ".join(reason for _, reason in error.reasons)
            say({"refused": refused, "seconds": time.perf_counter() - started})
            continue
        except Exception as error:  # noqa: BLE001 (whatever an implementation raises is its result)
            seconds = time.perf_counter() - started
            # What a framework's runtime raises; what Python raised before a kernel ran has broken nothing.
            broken = target.platform != "cpu" and isinstance(error, RuntimeError) and not isinstance(error, _BEFORE)
            say({"raised": f"{type(error).__name__}: {error}"[:4000], "seconds": seconds, "broken": broken})
            continue
        seconds = time.perf_counter() - started
        held = _held(outcome)
        bits = None
        if again is not None:
            bits = tuple(name for name, x in _held(again).items() if x.tobytes() != held[name].tobytes())
        say({"seconds": seconds, "bits": bits, "held": held})


def _held(outcome: Outcome) -> dict[str, np.ndarray]:
    held = {"out": outcome.out, **{f"d{name}": x for name, x in outcome.gradients.items()}}
    return held if outcome.lse is None else {**held, "lse": outcome.lse}


# What to say about findings.


def rules(findings: Iterable[Finding]) -> list[Rule]:
    """What to avoid: for each implementation and dtype the traits of the canaries that came out wrong.

    Example:
        >>> one = Finding("torch", "cuda", "sdpa", "float16", "one key", "wrong", "...", ("dq",))
        >>> [rule.traits for rule in rules([one, one._replace(canary="left padding", verdict="safe")])]
        [('kv_len == 1',)]
    """
    groups: dict[tuple[tuple[str, ...], ...], list[Finding]] = {}
    for it in findings:
        if it.verdict in _BAD and it.implementation in NAMES:
            where = it.framework, it.platform, it.implementation, it.dtype
            groups.setdefault((where, canaries.find(it.canary).traits), []).append(it)
    found = []
    for ((framework, platform, implementation, dtype), traits), group in groups.items():
        results = tuple(name for name in avoid.RESULTS if any(name in it.results for it in group))
        names = tuple(it.canary for it in group)
        found.append(Rule(framework, platform, implementation, dtype, traits, results, names))
    return found


def reasons(findings: Iterable[Finding]) -> list[tuple[str, str, str, int]]:
    """Refusals counted: framework, implementation, reason, how many; each implementation's commonest first."""
    counts = Counter((it.framework, it.implementation, str(it.text)) for it in findings if it.verdict == "refuses")
    order = {key[:2]: n for n, key in enumerate(counts)}
    return [(*key, n) for key, n in sorted(counts.items(), key=lambda item: (order[item[0][:2]], -item[1], item[0]))]


def as_json(run: Run) -> dict[str, Any]:
    """A run as the file that ATTEND_AVOID names; `attend_shared.avoid` reads it.

    Returns:
        format, version, written; gradients: whether they were judged; machines and avoid, which the choice reads; and
        results, for people: `found`, by framework, implementation, dtype and canary, a number (safe: the worst error as
        a share of its budget), a text (the reason of a refusal) or an object (what is wrong); `chosen`, what
        implementation=None takes; `bits`, for what was run twice, the results that came out in other bits.

    Raises:
        ValueError: the run was stopped. Such a file would let through what was not run.
    """
    if run.stopped:
        raise ValueError(f"run: expected a whole one, got one that was {parity.stop_words(run.stopped, 'calls')}.")
    found: dict[str, Any] = {}
    chosen: dict[str, Any] = {}
    bits: dict[str, Any] = {}
    room = min(600, max(0, avoid.LIMIT // 2 // max(1, len(run.bad)) - 250))  # where all is wrong it must fit, too
    for it in run.findings:
        text = (it.text or "")[:room]
        said: Any = {"verdict": it.verdict, "results": list(it.results), "share": _number(it.share), "text": text}
        said = _number(it.share) if it.verdict == "safe" else it.text if it.verdict == "refuses" else said
        _put(found, (it.framework, it.implementation, it.dtype, it.canary), said)
        if it.chosen:
            _put(chosen, (it.framework, it.dtype, it.canary), it.implementation)
        if it.bits is not None:
            _put(bits, (it.framework, it.implementation, it.dtype, it.canary), list(it.bits))
    return {
        "format": avoid.FORMAT,
        "version": avoid.VERSION,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "gradients": run.gradients,
        "machines": [it._asdict() for it in run.machines],
        "avoid": [{**it._asdict(), **{name: list(getattr(it, name)) for name in ("traits", "results", "canaries")}}
                  for it in rules(run.findings)],
        "results": {"device": run.device, "seconds": round(run.seconds, 1), "found": found, "chosen": chosen,
                    "bits": bits},
    }  # fmt: skip


def _put(into: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        into = into.setdefault(name, {})
    into[path[-1]] = value


def _number(x: float) -> float | str:
    return float(f"{x:.3g}") if np.isfinite(x) else "inf"

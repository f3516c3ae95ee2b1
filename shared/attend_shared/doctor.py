"""Which implementations are right on this machine, in the calls that kernels are known to get wrong.

What `attend doctor` runs. Every implementation computes in processes of its own, where it may crash, hang, or leave a
GPU's context broken behind it: each of these is a finding, and the rest goes on in a fresh process. What it computed is
judged here, by the budget of `attend_shared.compare` against the oracle. Nothing here raises because an implementation
is wrong.

    python -m attend_shared.doctor      # the other end: reads a job from standard input, answers line by line
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from pathlib import Path
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
from attend_shared.shapes import Shape

__all__ = ["CRASHES", "DTYPES", "LIMIT", "PART", "QUICK_DTYPES", "START", "VERDICTS", "Finding", "Run", "Target",
           "as_json", "call_of", "examine", "explain", "plan", "reasons", "rules", "targets", "work"]  # fmt: skip

VERDICTS = ("safe", "refuses", "wrong", "crashed", "hung", "not run")

DTYPES = ("bfloat16", "float16", "float32")
"""What is run unless others are asked for."""

QUICK_DTYPES = ("bfloat16", "float32")

LIMIT = 120.0
"""Seconds that one call may take, compiling included, before it counts as hung."""

START = 300.0
"""Seconds that a process may take until it is ready: it loads a framework, and starts a GPU."""

PART = 12
"""Calls that a process runs at least, where an implementation's are shared out among several."""

CRASHES = 5
"""Processes that one implementation may lose before the rest of its calls is given up."""

_BAD = ("wrong", "crashed", "hung")
_BROKEN = 3  # the exit status of a process that another should follow
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
    """

    device: str
    machines: tuple[Machine, ...]
    missing: tuple[str, ...]
    findings: tuple[Finding, ...]
    gradients: bool
    seconds: float

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
        if taken:
            head = f"NOT SAFE: {taken} calls for which implementation=None takes what is wrong here"
        elif others:
            head += f", but {others} of what it does not take is not"
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
    running = _Running()

    def run(target: Target, part: list[_Item]) -> None:
        try:
            for finding in _examine(target, part, known, limit, running):
                found.put(finding)
        except BaseException as error:  # noqa: BLE001 (raised again below, in the thread that asked)
            found.put(error)

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        try:
            for unit in units:
                pool.submit(run, *unit)
            for _ in range(sum(len(part) for _, part in units)):
                it = found.get()
                if isinstance(it, BaseException):
                    raise it
                yield it
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            running.stop()


class _Item(NamedTuple):
    canary: Canary
    dtype: str
    chosen: bool


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


class _Running:
    """The processes that are running, so that all can be ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[str]] = set()
        self.stopped = False

    def add(self, process: subprocess.Popen[str]) -> None:
        with self._lock:
            self._processes.add(process)
            if self.stopped:
                process.kill()

    def remove(self, process: subprocess.Popen[str]) -> None:
        with self._lock:
            self._processes.discard(process)

    def stop(self) -> None:
        with self._lock:
            self.stopped = True
            for process in self._processes:
                process.kill()


def _examine(target: Target, items: list[_Item], known: _Known, limit: float, running: _Running) -> Iterator[Finding]:
    """Findings of one target, in as many processes as it takes."""
    lost, at = 0, 0
    while at < len(items) and not running.stopped:
        if lost == CRASHES:
            for item in items[at:]:
                known.done(item)
                yield _finding(target, item, "not run", text=f"given up after {CRASHES} processes were lost")
            return
        before = at
        with tempfile.TemporaryDirectory(prefix="attend-doctor-") as folder:
            for finding in _process(target, items[at:], Path(folder), known, limit, running):
                known.done(items[at])
                at += 1
                yield finding
        lost += 1
        if at == before:  # it ended in peace and answered nothing
            raise RuntimeError(f"{target.framework} {target.implementation}: a process ended without an answer")


def _process(
    target: Target, items: list[_Item], folder: Path, known: _Known, limit: float, running: _Running
) -> Iterator[Finding]:
    """Findings of one process, the one that ended it the last."""
    job = {
        **target._asdict(),
        "folder": str(folder),
        "items": [(item.canary.name, item.dtype) for item in items],
    }
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
    with open(folder / "stderr", "w+", errors="replace") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "attend_shared.doctor"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )  # fmt: skip
        running.add(process)
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it died at once: said below, by its exit status
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()  # and stays open: where it closes, the process ends
            answers = _answers(process)
            ready = _next(answers, START)
            for place, item in enumerate(items):
                answer = ready and _next(answers, limit)
                if answer is None:
                    seconds = START if ready is None else limit
                    text = f"no answer in {seconds:g} s"
                    yield _finding(target, item, "hung", text=text, results=("hung",), seconds=seconds)
                    return
                if not answer:
                    status = _status(process)
                    if status == _BROKEN:  # it has said so, and what it was
                        return
                    text = _died(status, stderr)
                    yield _finding(target, item, "crashed", text=text, results=("crashed",))
                    return
                yield _judge(target, item, answer, folder / f"{place}.npz", known)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # what it did not read any more
                    if pipe is not None:
                        pipe.close()
            running.remove(process)


def _answers(process: subprocess.Popen[str]) -> queue.SimpleQueue[dict[str, Any]]:
    """What a process says, line by line; an empty answer where it has ended."""
    said: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    stdout = process.stdout
    assert stdout is not None

    def listen() -> None:
        try:
            for line in stdout:
                said.put(json.loads(line))
        except ValueError:  # half a line, or a pipe that was closed: it has died
            pass
        said.put({})

    threading.Thread(target=listen, daemon=True).start()
    return said


def _next(answers: queue.SimpleQueue[dict[str, Any]], limit: float) -> dict[str, Any] | None:
    """The next answer, or None where there is none in time."""
    try:
        return answers.get(timeout=limit)
    except queue.Empty:
        return None


def _status(process: subprocess.Popen[str]) -> int:
    """How a process ended that answers no more; one that does not end is ended."""
    try:
        return process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _died(status: int, stderr: Any) -> str:
    """How a process ended, with the last of what it said."""
    stderr.seek(0)
    lines = [line.rstrip() for line in stderr.read().splitlines() if line.strip()]
    head = f"its process was ended by signal {-status}" if status < 0 else f"its process ended with status {status}"
    return "\n  ".join([head, *(line[:200] for line in lines[-12:])])


def _judge(target: Target, item: _Item, answer: dict[str, Any], file: Path, known: _Known) -> Finding:
    seconds = float(answer["seconds"])
    if "refused" in answer:
        return _finding(target, item, "refuses", text=answer["refused"], seconds=seconds)
    if "raised" in answer:
        return _finding(target, item, "crashed", text=answer["raised"], results=("crashed",), seconds=seconds)
    with np.load(file) as arrays:
        held = {name: np.asarray(arrays[name], np.float64) for name in arrays.files}
    file.unlink()
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
    bits = None if answer["bits"] is None else tuple(answer["bits"])
    more = {"results": wrong, "share": share, "bits": bits, "seconds": seconds}
    return _finding(target, item, "wrong" if wrong else "safe", text=text, **more)


def work() -> None:
    """The other end: compute what a job on standard input asks for, and answer line by line on standard output.

    Everything else that is printed goes to standard error. Where a kernel has failed on a GPU nothing that follows in
    this process can be trusted, so it ends. So it does when standard input is closed, as where whoever asked has died.
    """
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_mourn, daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**said: Any) -> None:
        answers.write(json.dumps(said) + "\n")
        answers.flush()

    module, _, function = (job["evaluate"] or f"attend_{job['framework']}.bridge:evaluate").partition(":")
    evaluate: Callable[..., Outcome] = getattr(import_module(module), function)
    if job["platform"] != "cpu":  # what a first call has to start there is no call's own time
        bridge = import_module(f"attend_{job['framework']}.bridge")
        bridge.evaluate(canaries.find("one key").build("float32"), "einsum", job["platform"])
    answer(ready=True)
    for place, (name, dtype) in enumerate(job["items"]):
        canary = canaries.find(name)
        problem = canary.build(dtype)
        started = time.perf_counter()
        try:
            outcome = evaluate(problem, job["implementation"], job["platform"])
            again = evaluate(problem, job["implementation"], job["platform"]) if canary.repeat else None
        except UnsupportedError as error:
            refused = "; ".join(reason for _, reason in error.reasons)
            answer(refused=refused, seconds=time.perf_counter() - started)
            continue
        except Exception as error:  # noqa: BLE001 (whatever an implementation raises is its result)
            answer(raised=f"{type(error).__name__}: {error}"[:4000], seconds=time.perf_counter() - started)
            # What a framework's runtime raises; what Python raised before a kernel ran has broken nothing.
            if job["platform"] != "cpu" and isinstance(error, RuntimeError) and not isinstance(error, _BEFORE):
                answers.close()
                os._exit(_BROKEN)
            continue
        seconds = time.perf_counter() - started
        held = _held(outcome)
        bits = None
        if again is not None:
            bits = [name for name, x in _held(again).items() if x.tobytes() != held[name].tobytes()]
        np.savez(Path(job["folder"]) / f"{place}.npz", **held)  # type: ignore[arg-type]
        answer(seconds=seconds, bits=bits)


def _mourn() -> None:
    """Wait for the end of standard input, past Python's own locks, and end."""
    while os.read(0, 1):
        pass
    os._exit(1)


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
    """
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


if __name__ == "__main__":
    work()

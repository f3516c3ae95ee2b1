"""CPU time on one pinned core, and peak memory, in processes of their own.

`Worker` starts `python -m benchmarks.measure CORE`, which pins itself to the core before it imports a framework, then
answers one line of JSON for each line that it gets. The parent imports no framework: a process begins its life with
the peak memory of the one that started it.

Time is CPU time of the whole process (all its threads, which share the one core), so that what else runs on the
machine adds little. Memory is the peak of the resident set during a call, less what was resident before it: inputs,
frameworks and compiled code do not count, results do. Linux forgets an earlier peak, such as that of compiling, when 5
is written to /proc/self/clear_refs; elsewhere the difference of the two marks is given, and may be too small.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

LEAST_SECONDS = 0.03  # a run repeats a shorter call until it has taken as long
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
ONE_CORE = {**ONE_THREAD, "JAX_PLATFORMS": "cpu", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
Actions = Mapping[str, Callable[..., Any]]


def cores() -> list[int]:
    """The cores of which this process may use two."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return allowed[-2:]


class Lost(RuntimeError):
    """A worker failed, ended, or was out of time."""


class Worker:
    """A fresh process: of a module that answers requests, by default this one, which keeps to one core.

    Args:
        argument: what the module is told: here the core.
        module, environment: which module, and what its environment has besides.
    """

    def __init__(
        self, argument: int | str, module: str = "benchmarks.measure", environment: Mapping[str, str] = ONE_CORE
    ) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        inherited = {**os.environ, **environment}
        inherited.pop("JAX_NUMPY_DTYPE_PROMOTION", None)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, str(argument)],
            cwd=Path(__file__).resolve().parent.parent, env=inherited, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip

    def ask(self, seconds: float, do: str, **request: Any) -> Any:
        """The answer; Lost if it takes longer, or fails."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        alarm = threading.Timer(max(seconds, 0.1), self.process.kill)
        alarm.start()
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            alarm.cancel()
        if not line:
            code = self.process.wait()
            self.log.seek(0)
            last = "" if code == -9 else self.log.read().strip().rpartition("\n")[2]
            killed = f"ended by signal {-code} (out of memory or of time)"
            raise Lost(killed if code < 0 else f"ended with {code}: {last}")
        answer = json.loads(line)
        if "error" in answer:
            raise Lost(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()
        self.log.close()


def resident() -> int:
    """Bytes resident now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return peak()


def peak() -> int:
    """The most bytes that were resident, since the start or the last `forget_peak`."""
    with contextlib.suppress(OSError):  # getrusage would count what the process that started this one had, for ever
        status = Path("/proc/self/status").read_text()
        if found := re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE):
            return int(found[1]) * 1024
    mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return mark if sys.platform == "darwin" else mark * 1024


def forget_peak() -> bool:
    """Begin a new mark, freed memory given back first; False where the system cannot."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return False
    return True


def measure(call: Any, number: int) -> dict[str, Any]:
    """CPU and wall seconds of one call (of `number` calls, divided), and the extra peak memory in bytes."""
    forgotten = forget_peak()
    before = resident() if forgotten else peak()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(number):
        results = call()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    extra = peak() - before
    del results
    return {"cpu": cpu / number, "wall": wall / number, "extra": max(0, extra), "number": number}


def serve(core: int) -> None:
    """Answer requests until there are no more."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    with contextlib.suppress(OSError):  # where memory runs out, let it be this process that ends
        Path("/proc/self/oom_score_adj").write_text("1000")
    answers = only_answers()
    from benchmarks import peers
    from benchmarks.workloads import Entry, Workload

    ready: dict[str, Any] = {}
    numbers: dict[str, int] = {}

    def prepare(entry: list, workload: list) -> dict[str, Any]:
        if (framework := entry[1]) == "torch":
            import torch

            torch.set_num_threads(1)
        found = peers.prepare(Entry(*entry), Workload(*workload))
        ready[entry[0]] = found.call
        gc.collect()
        gc.freeze()  # what is loaded is not looked through before every call, which takes longer than a short call
        return {"framework": framework, **{name: getattr(found, name) for name in found._fields if name != "call"}}

    def call(name: str, once: bool) -> dict[str, Any]:
        found = measure(ready[name], 1 if once else numbers.get(name, 1))
        numbers.setdefault(name, max(1, math.ceil(LEAST_SECONDS / max(found["cpu"], 1e-6))))
        return found

    actions: Actions = {
        "prepare": prepare, "call": call, "versions": peers.versions, "products": peers.products,
        "compilations": peers.compilations,
    }  # fmt: skip
    answer_all(actions, answers)


def only_answers() -> IO[str]:
    """Standard output, for answers alone: what libraries print goes to standard error from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def reason(error: Exception) -> str:
    """Its type, and the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


def answer_all(actions: Actions, answers: IO[str]) -> None:
    """Do what each line of standard input asks for, and answer with a line: the value, or the error."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer: dict[str, Any] = {"value": actions[request.pop("do")](**request)}
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is its result
            answer = {"error": reason(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]))

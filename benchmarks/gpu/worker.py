"""One framework on the device, for `python -m benchmarks.gpu`: it answers requests, a line of JSON each.

`open` makes a workload's arrays and what is expected of them; `prepare` compiles an entry, holds its results against
that, and finds out how many calls make a run; `run` is one run; `close` forgets the workload. `warm` compiles alone.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.gpu.checking import Unsupported
from benchmarks.gpu.workloads import REFERENCE, Workload, modes
from benchmarks.measure import answer_all, only_answers, reason


class OfTorch:
    """What a request does in PyTorch."""

    def __init__(self) -> None:
        from benchmarks.gpu import torch_side

        self.side = torch_side
        self.ready: dict[str, Any] = {}

    def open(self, load: list) -> None:
        """Arrays and the reference."""
        self.load = Workload(*_tuples(load))
        self.inputs = self.side.data(self.load)
        self.expected = self.side.reference(self.load, self.inputs, self.load.backward)

    def prepare(self, entry: str, least: float) -> dict[str, Any]:
        """For each mode: its errors, calls, memory; or a reason."""
        ready = self.side.prepare(entry, self.load, self.inputs)
        found: dict[str, Any] = {"chosen": None, "modes": {}}
        for mode in modes(self.load):
            try:
                errors = self.side.check(ready, self.load, mode, self.expected)
                chosen = ready.chosen and ready.chosen[mode]
                found["modes"][mode] = {"chosen": chosen, "errors": errors, **self.side.calibrate(ready, mode, least)}
            except Exception as error:  # noqa: BLE001 - whatever a peer raises is its result
                found["modes"][mode] = {"not_run": _words(error)}
        self.ready[entry] = ready
        return found

    def run(self, entry: str, mode: str, calls: int, host: float) -> dict[str, Any]:
        """One run."""
        return self.side.run(self.ready[entry], mode, calls, host)

    def close(self) -> None:
        """Drop what the workload needed."""
        self.ready.clear()
        self.inputs = self.expected = None
        self.side.forget()

    def warm(self, load: list, entry: str) -> None:
        """Compile: what is compiled is kept on disk, for the process that measures."""
        load = Workload(*_tuples(load))
        inputs = self.side.data(load)
        ready = self.side.prepare(entry, load, inputs)
        for mode in modes(load):
            ready.call(mode, 0)
        del ready, inputs
        self.side.forget()


class OfJax:
    """What a request does in JAX."""

    def __init__(self) -> None:
        from benchmarks.gpu import jax_side

        jax_side.keep_kernels()
        self.side = jax_side
        self.ready: dict[tuple[str, str], Any] = {}

    def open(self, load: list) -> None:
        """Arrays and the reference."""
        self.load = Workload(*_tuples(load))
        self.inputs = self.side.data(self.load)
        self.expected = self.side.reference(self.load, self.inputs, self.load.backward)

    def prepare(self, entry: str, least: float) -> dict[str, Any]:
        """For each mode: its errors, calls, memory; or a reason."""
        found: dict[str, Any] = {"chosen": None, "modes": {}}
        for mode in modes(self.load):
            try:
                ready = self.side.compiled(entry, self.load, mode, self.inputs)
                found["chosen"] = ready.chosen
                errors = self.side.check(ready, self.load, mode, self.expected)
                found["modes"][mode] = {
                    "chosen": ready.chosen, "errors": errors, **self.side.calibrate(ready, self.load, least)
                }  # fmt: skip
                self.ready[entry, mode] = ready
            except Exception as error:  # noqa: BLE001 - whatever a peer raises is its result
                found["modes"][mode] = {"not_run": _words(error)}
        return found

    def run(self, entry: str, mode: str, calls: int, host: float) -> dict[str, Any]:
        """One run."""
        return self.side.run(self.ready[entry, mode], self.load, calls)

    def close(self) -> None:
        """Drop what the workload needed."""
        self.ready.clear()
        self.inputs = self.expected = None

    def warm(self, load: list, entry: str) -> None:
        """Compile, into the folder of programs."""
        load = Workload(*_tuples(load))
        inputs = self.side.data(load)
        if entry == REFERENCE:
            self.side.reference(load, inputs, load.backward)
            return
        for mode in modes(load):
            self.side.compiled(entry, load, mode, inputs)


def _tuples(load: list) -> list:
    """JSON has no tuples."""
    return [tuple(x) if isinstance(x, list) else x for x in load]


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, Unsupported) else reason(error)


def serve(framework: str) -> None:
    """Answer until there are no more requests."""
    answers = only_answers()
    does: Any = {"torch": OfTorch, "jax": OfJax}[framework]()
    actions = {name: getattr(does, name) for name in ("open", "prepare", "run", "close", "warm")}
    actions |= {name: getattr(does.side, name) for name in ("versions", "machine", "overheads")}
    if framework == "torch":
        actions["rates"] = does.side.rates
    answer_all(actions, answers)


if __name__ == "__main__":
    serve(sys.argv[1])

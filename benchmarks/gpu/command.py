"""Time and memory of attention on a GPU: `attend bench --device cuda`, or `python -m benchmarks.gpu --help`.

Compiles first, in many processes at once where --warm says so; then measures in one process for each framework, torch
first, with nothing else on the device. In a process the entries of a workload take turns, one run each in a round.
Every run is kept in a JSON file, written anew after each workload, of which benchmarks/gpu/report.py makes the tables.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.gpu import report
from benchmarks.gpu.workloads import CHOICE, FOLDER, MODES, REFERENCE, TIME_IS_UP, TRY_OUT, WORKLOADS, Workload, entries
from benchmarks.measure import Lost, Worker
from benchmarks.report import show

SCHEMA = 1
REPEATS = 7
FEWEST = 3  # runs of what takes so long that a run is one call
LEAST = {"torch": 0.01, "jax": 0.004}  # seconds that the calls of a run take at the least; JAX makes four times as many
SHORTEST = 3  # seconds without which no workload is begun
FRAMEWORKS = ("torch", "jax")
QUICK = (CHOICE, "SDPA", "SDPA cuDNN", "SDPA flash", "SDPA efficient", "attend sdpa")  # there is nothing to compile
SLOW = ("attend flex",)  # compiles for a minute where it is given lists of blocks: only ahead of time, and last
NOT_COMPILED = "it was not compiled ahead, in the time that there was for it"
PATIENCE = 90  # seconds for compiling and checking an entry
BROKEN = re.compile(r"CUDA error|CUDA_ERROR|illegal (memory|instr)|misaligned|unspecified launch")  # of a context


class Run:
    """One run of the benchmark and its results so far."""

    def __init__(self, path: Path, minutes: float, repeats: int, programs: Path) -> None:
        self.path, self.repeats = path, repeats
        self.started = time.monotonic()
        self.end = self.started + 60 * minutes
        self.uncompiled: set[tuple[str, str, str]] = set()
        self.environment = {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3", FOLDER: str(programs),
            "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }  # fmt: skip
        self.session: dict[str, Any] = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"), "minutes": minutes, "seconds": 0,
            "repeats": repeats, "sources": {},
        }  # fmt: skip
        self.results: dict[str, Any] = {
            "schema": SCHEMA, "machine": {}, "sessions": [self.session], "versions": {}, "rates": {}, "overheads": {},
            "workloads": {}, "measurements": [],
        }  # fmt: skip

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def worker(self, framework: str) -> Worker:
        """A fresh process."""
        return Worker(framework, "benchmarks.gpu.worker", self.environment)

    def resume(self) -> None:
        """Go on with the file of an earlier run: what is whole there is kept, and the rest is measured."""
        before = json.loads(self.path.read_text())
        kept = [each for each in before["measurements"] if each["not_run"] != TIME_IS_UP]
        self.results.update(before, sessions=[*before["sessions"], self.session], measurements=kept)

    def is_done(self, framework: str, load: Workload) -> bool:
        """Whether the file that was resumed has everything of it."""
        asked = set(entries(framework, load))
        found = {
            each["entry"] for each in self.results["measurements"]
            if each["framework"] == framework and each["workload"] == load.name
        }  # fmt: skip
        return asked <= found

    def save(self) -> None:
        """Write what there is, beside the file and then in its place."""
        self.session["seconds"] = round(time.monotonic() - self.started)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.results, indent=None, separators=(",", ":")).replace("},{", "},\n{") + "\n")
        beside.replace(self.path)

    def facts(self, worker: Worker, framework: str) -> None:
        """Versions, the device, its rates, and what a call costs the host."""
        versions, machine = worker.ask(120, "versions"), worker.ask(120, "machine")
        self.session["sources"][framework] = versions.pop("sources")  # may change from one session to the next
        known = self.results["versions"].get(framework, versions)
        if known != versions:
            raise click.ClickException(f"{self.path} was measured with {known}, not {versions}")
        if self.results["machine"].get("device", machine["device"]) != machine["device"]:
            raise click.ClickException(f"{self.path} was measured on {self.results['machine']['device']}")
        self.results["machine"] = {**machine, **self.results["machine"]}
        self.results["versions"][framework] = versions
        if framework == "torch" and not self.results["rates"]:
            self.results["rates"] = worker.ask(60, "rates")
        if framework not in self.results["overheads"]:
            try:
                self.results["overheads"][framework] = worker.ask(90, "overheads")
            except Lost as lost:
                self.results["overheads"][framework] = {}
                click.echo(f"overheads in {framework}: {lost}")
        self.save()

    def measure(self, framework: str, loads: Sequence[Workload], end: float) -> None:
        """The workloads of one framework, in order, in one process unless an entry breaks it."""
        worker = self.worker(framework)
        try:
            self.facts(worker, framework)
        except Lost as lost:
            worker.close()
            click.echo(f"{framework}: {lost}")
            return
        for load in loads:
            self.results["workloads"][load.name] = load._asdict()
            if self.is_done(framework, load):
                continue
            self.results["measurements"] = [
                each for each in self.results["measurements"]
                if (each["framework"], each["workload"]) != (framework, load.name)
            ]  # fmt: skip
            started = time.monotonic()
            found = {entry: self._record(framework, load, entry) for entry in entries(framework, load)}
            worker = self._workload(framework, load, found, worker, end)
            self.results["measurements"] += [each for records in found.values() for each in records.values()]
            self.save()
            parts = [f"{entry} {report.cell(list(records.values())) or '–'}" for entry, records in found.items()]
            click.echo(f"[{time.monotonic() - started:.1f} s] {framework} {load.name}: {'; '.join(parts)}")
        worker.close()

    def _record(self, framework: str, load: Workload, entry: str) -> dict[str, dict[str, Any]]:
        return {
            mode: {
                "workload": load.name, "framework": framework, "entry": entry, "mode": mode, "chosen": None,
                "session": len(self.results["sessions"]) - 1, "not_run": TIME_IS_UP, "runs": [],
            }
            for mode in MODES if mode == "forward" or load.backward
        }  # fmt: skip

    def _workload(
        self, framework: str, load: Workload, found: dict[str, dict[str, dict[str, Any]]], worker: Worker, end: float
    ) -> Worker:
        """Fill in the records of a workload; the worker that goes on, another one where an entry broke it."""
        left = [entry for entry in found if (framework, load.name, entry) not in self.uncompiled]
        for entry in found.keys() - set(left):
            self._forget(found[entry].values(), NOT_COMPILED)
        while left and time.monotonic() < end - SHORTEST:
            at: str | None = None  # the entry that is at work
            try:
                worker.ask(end - time.monotonic(), "open", load=list(load))
                for at in list(left):
                    self._prepare(worker, found[at], framework, at, end)
                    broken = [text for each in found[at].values() if BROKEN.search(text := str(each["not_run"]))]
                    if broken:
                        raise Lost(broken[0])
                for _ in range(self.repeats):
                    for at in left:
                        for mode, record in found[at].items():
                            if time.monotonic() > end:
                                raise Lost("")
                            if "calls" in record and not (record["calls"] == 1 and len(record["runs"]) >= FEWEST):
                                asked = {"entry": at, "mode": mode, "calls": record["calls"], "host": record["host"]}
                                record["runs"].append(worker.ask(end - time.monotonic(), "run", **asked))
                at = None
                worker.ask(end - time.monotonic(), "close")
                break
            except Lost as lost:
                worker.close()
                worker = self.worker(framework)
                reason = str(lost) if time.monotonic() < end else TIME_IS_UP
                if at is None:
                    left = []
                    self._forget((each for records in found.values() for each in records.values()), reason)
                else:
                    left.remove(at)
                    self._forget(found[at].values(), reason)
                for entry in left:
                    for record in found[entry].values():
                        record["runs"] = []
        every = [each for records in found.values() for each in records.values()]
        self._forget((each for each in every if not self._whole(each)), TIME_IS_UP)
        return worker

    def _whole(self, record: dict[str, Any]) -> bool:
        """Whether it has the runs that it was to have, or a reason."""
        wanted = FEWEST if record.get("calls") == 1 else self.repeats
        return len(record["runs"]) >= wanted or record["not_run"] not in (None, TIME_IS_UP)

    def _forget(self, records: Iterable[dict[str, Any]], reason: str) -> None:
        """Instead of runs, a reason."""
        for record in records:
            record.update(runs=[], not_run=reason)
            record.pop("calls", None)

    def _prepare(
        self, worker: Worker, records: dict[str, dict[str, Any]], framework: str, entry: str, end: float
    ) -> None:
        """Compile and check an entry; a reason where it cannot be measured."""
        if time.monotonic() > end:
            return
        try:
            answer = worker.ask(min(PATIENCE, end - time.monotonic()), "prepare", entry=entry, least=LEAST[framework])
        except Lost as lost:
            if worker.process.poll() is not None:
                raise
            for record in records.values():
                record["not_run"] = str(lost).removeprefix("Unsupported: ")
            return
        for mode, record in records.items():
            record.update({"chosen": answer["chosen"], "not_run": None, **answer["modes"][mode]})

    def warm(self, frameworks: Sequence[str], loads: Sequence[Workload], processes: int, seconds: float) -> None:
        """Compile what is to be measured in many processes at once, the most important first."""
        end = min(time.monotonic() + seconds, self.end)
        todo = [  # what the choice takes is compiled under its own name
            (framework, load, entry)
            for load in loads for framework in frameworks if not self.is_done(framework, load)
            for entry in (*[REFERENCE] * (framework == "jax"), *entries(framework, load)) if entry not in QUICK
        ]  # fmt: skip
        todo.sort(key=lambda each: each[2] in SLOW)
        done: set[tuple[str, str, str]] = set()
        slow = {(framework, load.name, entry) for framework, load, entry in todo if entry in SLOW}
        lock = threading.Lock()
        failed: list[str] = []

        def go(framework: str) -> None:
            worker = self.worker(framework)
            while time.monotonic() < end:
                with lock:
                    if not todo:
                        break
                    mine = next((each for each in todo if each[0] == framework), todo[0])
                    todo.remove(mine)
                if mine[0] != framework:  # nothing is left of one framework
                    worker.close()
                    framework = mine[0]
                    worker = self.worker(framework)
                try:
                    worker.ask(end - time.monotonic(), "warm", load=list(mine[1]), entry=mine[2])
                    done.add((framework, mine[1].name, mine[2]))
                except Lost as lost:
                    failed.append(f"{mine[2]} {mine[1].name}: {lost}")
                    if time.monotonic() < end:
                        done.add((framework, mine[1].name, mine[2]))
                    if worker.process.poll() is not None or BROKEN.search(str(lost)):
                        worker.close()
                        worker = self.worker(framework)
            worker.close()

        threads = [threading.Thread(target=go, args=(frameworks[n % len(frameworks)],)) for n in range(processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.uncompiled = slow - done
        seconds = 60 * self.session["minutes"] - self.left
        click.echo(f"compiled in {seconds:.0f} s, {len(todo)} left, {len(failed)} refused or failed")


@click.command()
@click.option(
    "--out", default="out/benchmarks-gpu.json", show_default=True, type=click.Path(path_type=Path), help="The results."
)
@click.option("--minutes", default=30.0, show_default=True, help="What is not done by then is recorded as not run.")
@click.option("--framework", "frameworks", multiple=True, type=click.Choice(FRAMEWORKS), help="Default: both.")
@click.option("--repeats", default=REPEATS, show_default=True, help="Runs of each entry.")
@click.option("--warm", default=0, show_default=True, help="Compile in so many processes at once first.")
@click.option("--warm-seconds", default=150.0, show_default=True, help="For so long at the most.")
@click.option("--quick", "short", is_flag=True, help="Small workloads, to try every entry out.")
@click.option(
    "--only", default="", help="Only what has each of these words in its name, such as 'causal 4x16x4096x64'."
)
@click.option("--resume", is_flag=True, help="Measure what the run before, in the same file, did not come to.")
@click.option("--publish", is_flag=True, help="Renew docs/results/gpu-h100.json, docs/benchmarks-gpu.md and its plot.")
def main(
    out: Path, minutes: float, frameworks: tuple[str, ...], repeats: int, warm: int, warm_seconds: float, short: bool,
    only: str, resume: bool, publish: bool,
) -> None:  # fmt: skip
    """Measure attention on this GPU against its peers, and print the tables."""
    loads = [
        load
        for load in (TRY_OUT if short else WORKLOADS)
        if all(word in load.name.replace(",", "").split() for word in only.split())
    ]
    asked = frameworks or FRAMEWORKS
    programs = os.environ.get(FOLDER)
    with tempfile.TemporaryDirectory() as place:
        run = Run(out, minutes, repeats, Path(programs or place))
        if resume:
            run.resume()
        if warm:
            run.warm(asked, loads, warm, warm_seconds)
        for n, framework in enumerate(asked):
            run.measure(framework, loads, time.monotonic() + run.left / (len(asked) - n))
    if not run.results["machine"]:
        raise click.ClickException(f"{' and '.join(asked)}: no GPU that can be measured here.")
    run.save()
    console = Console(width=max(shutil.get_terminal_size((200, 24)).columns, 200))
    show(console, report.tables(run.results), out)
    if publish:
        report.publish(run.results)

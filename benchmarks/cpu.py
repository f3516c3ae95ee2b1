"""Time and memory of attention on a CPU, one core: `make bench`, or `python -m benchmarks.cpu --help`.

Runs the jobs of benchmarks/workloads.py, the most important first, two at a time on two cores, until they are done or
the time is up. Every run is kept in a JSON file, which is written anew after each job; benchmarks/report.py makes the
tables of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import report
from benchmarks.measure import Lost, Worker, cores
from benchmarks.workloads import PRINCIPAL, Entry, Job, Workload, jobs, quick

SCHEMA = 1
TIME_IS_UP = "the time of this run was up"
SPARE = 2e9  # bytes of the machine's memory that are left to others
LARGE = 0.5e9  # bytes from which on an entry waits for its memory to be free
COMPILED_TWICE = ((8192, False), (2048, True))  # lengths, and whether with gradients, at which compilations are counted


class Memory:
    """The machine's memory, which the lanes share with each other and with whatever else runs."""

    def __init__(self) -> None:
        self.taken_by_us, self.lock = 0.0, threading.Lock()

    @contextlib.contextmanager
    def taken(self, size: float, end: float) -> Iterator[None]:
        """Wait until as much is free beyond what is taken already, whether in use yet or not; Lost where it is not."""
        while size:
            with self.lock:
                if available() - self.taken_by_us >= size + SPARE:
                    self.taken_by_us += size
                    break
            if time.monotonic() > end:
                raise Lost("")
            time.sleep(0.5)
        try:
            yield
        finally:
            with self.lock:
                self.taken_by_us -= size


def available() -> float:
    """Bytes of memory that this machine could give now."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    return 1024 * float(path.read_text().partition("MemAvailable:")[2].split()[0])


def machine() -> dict[str, Any]:
    """What the figures depend on, and nothing that names the machine."""
    facts = {"system": platform.system(), "architecture": platform.machine(), "cores": os.cpu_count()}
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    for name, field in (("cpu", "model name"), ("cpu model number", "model\t"), ("L3 cache", "cache size")):
        if field in text:
            facts[name] = text.partition(field)[2].partition(":")[2].partition("\n")[0].strip()
    facts["avx512"] = "avx512f" in text
    facts["memory in GB"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9)
    return facts


class Run:
    """One run of the benchmark: its results so far, and what its lanes share."""

    def __init__(self, path: Path, minutes: float, most: float, lanes: list[int]) -> None:
        self.path, self.lanes = path, lanes
        self.end = time.monotonic() + 60 * minutes
        self.most, self.memory = most, Memory()
        self.lock = threading.Lock()
        self.session: dict[str, Any] = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"), "minutes": minutes, "seconds": 0,
            "lanes": len(lanes), "load at start": os.getloadavg()[0], "most": self.most,
        }  # fmt: skip
        self.results: dict[str, Any] = {
            "schema": SCHEMA, "machine": machine(), "sessions": [self.session], "versions": {}, "products": {},
            "compilations": {}, "measurements": [],
        }  # fmt: skip

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def resume(self, todo: list[Job], again: str = "") -> list[Job]:
        """The jobs that an earlier run, whose file this one goes on with, did not come to, or did not finish.

        `again` says which jobs these are where all of them are to be measured anew, whatever the run before has.
        """
        before = json.loads(self.path.read_text())
        if before["machine"] != self.results["machine"]:
            raise click.ClickException(f"{self.path} was measured on another machine: {before['machine']}")
        if again:
            self.session["again"] = again
        done = {
            (Workload(**each["workload"]), each["entry"], each["fresh"])
            for each in before["measurements"]
            if not again and TIME_IS_UP not in (each["not_run"], each.get("cut_short"))
        }
        left = [job for job in todo if any((job.workload, entry.name, job.fresh) not in done for entry in job.entries)]
        again = {(job.workload, entry.name, job.fresh) for job in left for entry in job.entries}
        kept = [
            each for each in before["measurements"]
            if (Workload(**each["workload"]), each["entry"], each["fresh"]) not in again
        ]  # fmt: skip
        self.results.update(before, sessions=[*before["sessions"], self.session], measurements=kept)
        return left

    def save(self, **more: Any) -> None:
        """Write what there is, beside the file and then in its place."""
        with self.lock:
            self.session["seconds"] = round(60 * self.session["minutes"] - self.left)
            self.results.update(more)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside = self.path.with_suffix(".tmp")
            beside.write_text(json.dumps(self.results, indent=1) + "\n")
            beside.replace(self.path)

    def facts(self, counted: bool) -> None:
        """Versions, the rate of products, and how often JAX compiles."""
        worker = Worker(self.lanes[0])
        try:
            versions = worker.ask(120, "versions")
            if "again" in self.session:  # other sources are what is to be measured
                self.session["sources"] = versions["sources"]
                versions["sources"] = self.results["versions"]["sources"]
            if self.results["versions"] not in ({}, versions):
                raise click.ClickException(f"{self.path} was measured with {self.results['versions']}, not {versions}")
            self.save(versions=versions)
            if not self.results["products"]:
                self.save(products=worker.ask(120, "products"))
            for n, backward in COMPILED_TWICE if counted else ((256, False),):
                name = f"{'forward + backward' if backward else 'forward'} {n}"
                if name not in self.results["compilations"]:
                    value = worker.ask(self.left, "compilations", n=n, backward=backward)
                    self.save(compilations={**self.results["compilations"], name: value})
        finally:
            worker.close()

    def perform(self, job: Job, lane: int) -> list[dict[str, Any]]:
        """One measurement for each entry: its runs, or why there are none."""
        found: dict[str, dict[str, Any]] = {
            entry.name: {
                "workload": job.workload._asdict(), "entry": entry.name, "fresh": job.fresh, "lane": lane, "runs": [],
                "not_run": None,
            }
            for entry in job.entries
        }  # fmt: skip
        workers: dict[str, Worker] = {}
        goals = dict.fromkeys(found, job.rounds)
        waiting = list(job.entries)
        try:
            for turn in range(job.rounds + (not job.fresh)):  # without a process of its own, an entry warms up first
                for entry in list(waiting):
                    record = found[entry.name]
                    key = entry.name if job.fresh else ""
                    try:
                        self._one(job, entry, record, workers, key, lane, turn)
                    except Lost as lost:
                        record["not_run"] = str(lost) if self.left > 0 else TIME_IS_UP
                        waiting.remove(entry)
                        if key in workers and (job.fresh or workers[key].process.poll() is not None):
                            workers.pop(key).close()
                            if not job.fresh:
                                raise
                        continue
                    if turn == 0:
                        cost = record["first" if not job.fresh else "runs"][0]["cpu"]
                        allowance = job.allowance[entry in PRINCIPAL]
                        goals[entry.name] = min(job.rounds, max(1, int(allowance / max(cost, 1e-6))))
                    if len(record["runs"]) >= goals[entry.name]:
                        waiting.remove(entry)
                        if job.fresh:
                            workers.pop(entry.name).close()
        except Lost:
            for entry in waiting:
                reason = "the process that all shared was lost" if self.left > 0 else TIME_IS_UP
                found[entry.name]["not_run"] = reason
        finally:
            for worker in workers.values():
                worker.close()
        for record in found.values():
            if record["runs"] and record["not_run"]:
                record["cut_short"] = record.pop("not_run")
                record["not_run"] = None
        return list(found.values())

    def _one(
        self, job: Job, entry: Entry, record: dict[str, Any], workers: dict[str, Worker], key: str, lane: int, turn: int
    ) -> None:  # fmt: skip
        """One run of one entry."""
        needs = entry.needs(job.workload)
        if needs > self.most:
            raise Lost(f"needs about {needs / 1e9:.0f} GB, and this run allows {self.most / 1e9:.1f}")
        if self.left <= 0:
            raise Lost("")
        with self.memory.taken(needs if needs > LARGE else 0, self.end):
            if key not in workers:
                workers[key] = Worker(self.lanes[lane])
            if turn == 0:
                record.update(workers[key].ask(self.left, "prepare", entry=entry, workload=job.workload))
            run = workers[key].ask(self.left, "call", name=entry.name, once=job.fresh)
        run["at"] = round(60 * self.session["minutes"] - self.left, 2)
        record.setdefault("first", []).append(run) if turn == 0 and not job.fresh else record["runs"].append(run)

    def work(self, todo: list[Job], progress: Progress) -> None:
        """All jobs, on all lanes at once."""
        bar = progress.add_task("jobs", total=len(todo))
        failures: list[BaseException] = []

        def go(lane: int) -> None:
            try:
                while True:
                    with self.lock:
                        if not todo:
                            return
                        job = todo.pop(0)
                    progress.update(bar, description=job.title)
                    found = self.perform(job, lane)
                    self.results["measurements"] += found
                    self.save()
                    if self.left > 0:
                        parts = (f"{each['entry']} {report.milliseconds(each) or each['not_run']}" for each in found)
                        progress.console.print(f"[dim]{job.title}:[/] {'; '.join(parts)}", highlight=False)
                    progress.advance(bar)
            except BaseException as error:
                failures.append(error)
                raise

        threads = [threading.Thread(target=go, args=(lane,), daemon=True) for lane in range(len(self.lanes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


@click.command()
@click.option(
    "--out", default="out/benchmarks-cpu.json", show_default=True, type=click.Path(path_type=Path), help="The results."
)
@click.option("--minutes", default=90.0, show_default=True, help="What is not done by then is recorded as not run.")
@click.option("--gigabytes", default=8.0, show_default=True, help="What is expected to need more is not started.")
@click.option("--quick", "short", is_flag=True, help="The smallest workload, once.")
@click.option("--only", default="", help="Only what has each of these words in its title, such as 'causal 2048'.")
@click.option("--resume", is_flag=True, help="Measure what the run before, in the same file, did not come to.")
@click.option("--again", is_flag=True, help="Measure what --only names anew, and keep the rest of the same file.")
@click.option("--publish", is_flag=True, help="Renew docs/results/cpu.json, docs/benchmarks-cpu.md and its plot.")
def main(
    out: Path, minutes: float, gigabytes: float, short: bool, only: str, resume: bool, again: bool, publish: bool
) -> None:  # fmt: skip
    """Measure attention on this CPU against its peers, and print the tables."""
    width = shutil.get_terminal_size((150, 24)).columns
    console = Console(width=max(width, 150))
    run, todo = Run(out, minutes, 1e9 * gigabytes, cores()), quick() if short else jobs(minutes)
    todo = [job for job in todo if all(word in job.title.replace(",", "").split() for word in only.split())]
    if again and not only:
        raise click.UsageError("--again needs --only: which jobs?")
    if resume or again:
        todo = run.resume(todo, only if again else "")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        run.facts(counted=not short)
        run.work(todo, progress)
    report.show(console, report.tables(run.results), out)
    if publish:
        report.publish(run.results)


if __name__ == "__main__":
    main()

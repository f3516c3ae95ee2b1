"""The benchmark runs, keeps every run, and its page says what its results say. Nothing here asserts a time."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from benchmarks import report
from benchmarks.cpu import SCHEMA, TIME_IS_UP, Run
from benchmarks.measure import Lost, Worker, cores
from benchmarks.workloads import ENTRIES, FEATURES, JAX_BLOCKWISE, LENGTHS, TORCH_BLOCKWISE, Workload, jobs, quick
from conftest import require

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "docs" / "results" / "cpu.json"
FACTS = {"schema", "machine", "sessions", "versions", "products", "compilations", "measurements"}


def conforms(results: dict[str, Any]) -> None:
    """Every measurement is whole: runs with all their figures, or a reason why there are none."""
    assert set(results) == FACTS
    assert results["schema"] == SCHEMA
    assert {"python", "torch", "jax", "flax", "numpy"} <= set(results["versions"])
    assert {"cpu", "cores", "memory in GB"} <= set(results["machine"])
    for session in results["sessions"]:
        again = {"again", "sources"} & session.keys()
        assert {"started", "minutes", "seconds", "lanes", "load at start", "most"} == session.keys() - again
        assert len(again) in (0, 2)
    for each in results["measurements"]:
        load = Workload(**each["workload"])
        assert load.n in LENGTHS
        assert not load.feature or load.feature in FEATURES
        assert bool(each["runs"]) != bool(each["not_run"]), each
        for run in (*each["runs"], *each.get("first", ())):
            assert run["cpu"] > 0
            assert run["wall"] > 0
            assert run["extra"] >= 0
            assert run["number"] == 1 or not each["fresh"]


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The results of the smallest workload, run once as a user would, and what was printed."""
    require("x_transformers")
    path = tmp_path_factory.mktemp("benchmark") / "results" / "cpu.json"
    command = [sys.executable, "-m", "benchmarks.cpu", "--quick", "--minutes", "5", "--out", str(path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert list(path.parent.iterdir()) == [path]  # nothing is left beside it
    return json.loads(path.read_text()), run.stdout


def test_the_smallest_workload_runs_on_every_entry(smallest: tuple[dict[str, Any], str]) -> None:
    results, printed = smallest
    conforms(results)
    found = {(each["entry"], each["fresh"]): each for each in results["measurements"]}
    expected = {(entry.name, job.fresh) for job in quick() for entry in job.entries}
    assert found.keys() == expected
    assert {key: each["not_run"] for key, each in found.items() if not each["runs"]} == {}
    assert {len(each["runs"]) for each in found.values()} == {1}
    assert results["compilations"] == {"forward 256": 1}
    assert found["attend_jax blockwise", True]["compile_seconds"] > 0
    assert found["attend_torch blockwise", False]["chosen"] == "blockwise"
    for entry in ENTRIES:
        assert entry.name in printed


def test_results_name_no_path_of_the_machine(smallest: tuple[dict[str, Any], str]) -> None:
    for text in (json.dumps(smallest[0]), PUBLISHED.read_text()):
        assert str(ROOT) not in text
        assert str(Path.home()) + os.sep not in text


def test_published_results_are_whole() -> None:
    conforms(json.loads(PUBLISHED.read_text()))


def test_page_says_what_the_results_say() -> None:
    """`python -m benchmarks.report docs/results/cpu.json` renews it."""
    page = (ROOT / "docs" / "benchmarks-cpu.md").read_text()
    assert report.SECTION.findall(page) == [report.section(json.loads(PUBLISHED.read_text()))]
    assert (ROOT / "docs" / "benchmarks-cpu.png").stat().st_size < 200_000


def test_a_run_goes_on_where_an_earlier_one_stopped(smallest: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    """Only what had no time is measured again; with another machine's results nothing is."""
    results = json.loads(json.dumps(smallest[0]))
    for each in results["measurements"]:
        if each["fresh"] and each["entry"] == TORCH_BLOCKWISE.name:
            each.update(runs=[], not_run=TIME_IS_UP)
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(results))
    run = Run(path, 1, 1e9, [0])
    (left,) = run.resume(quick())
    assert left.fresh
    assert TORCH_BLOCKWISE in left.entries
    assert not any(each["fresh"] for each in run.results["measurements"])
    assert len(run.results["sessions"]) == 2
    jobs_again = Run(path, 1, 1e9, [0]).resume(quick(), "256")
    assert [job.title for job in jobs_again] == [job.title for job in quick()]
    path.write_text(json.dumps({**results, "machine": {"cpu": "another"}}))
    with pytest.raises(click.ClickException, match="another machine"):
        Run(path, 1, 1e9, [0]).resume(quick())


def test_jobs_are_named_once() -> None:
    """No entry is measured twice in the same way on the same workload."""
    for minutes in (15, 90):
        keys = [(job.workload, entry.name, job.fresh) for job in jobs(minutes) for entry in job.entries]
        assert len(keys) == len(set(keys))


def test_peak_memory_is_that_of_the_call() -> None:
    """An array of q_len x kv_len is 34 MB at 1024: einsum has them, blockwise has not."""
    load, extra = Workload(1024), {}
    einsum = next(entry for entry in ENTRIES if entry.name == "attend_jax einsum")
    for entry in (einsum, JAX_BLOCKWISE, TORCH_BLOCKWISE):
        worker = Worker(cores()[0])
        try:
            worker.ask(120, "prepare", entry=entry, workload=load)
            extra[entry.name] = worker.ask(120, "call", name=entry.name, once=True)["extra"]
        finally:
            worker.close()
    assert extra[einsum.name] > load.logits
    assert max(extra[JAX_BLOCKWISE.name], extra[TORCH_BLOCKWISE.name]) < load.logits


def test_a_failure_in_a_worker_is_a_reason() -> None:
    worker = Worker(cores()[0])
    try:
        with pytest.raises(Lost, match=r"KeyError: 'nobody'"):
            worker.ask(60, "call", name="nobody", once=True)
        with pytest.raises(Lost, match="out of memory or of time"):
            worker.ask(0.1, "compilations", n=8192, backward=True)
    finally:
        worker.close()

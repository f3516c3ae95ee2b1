"""The command `attend`: what it prints, what it writes, and its exit status."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import attend_jax
import attend_torch
from attend_shared import avoid, cases, demo, parity, processes, report, wrong_calls
from attend_shared.cases import Case
from attend_shared.command import main
from doctor_plants import Hung, Lost

FEW = ("--case", "square-float32-causal")
JAX, TORCH = ("jax", "jaxlib", "flax"), ("torch",)


def attend(*arguments: str | Path) -> Result:
    """A run in this process; what it raises besides its exit status is raised here."""
    run = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if run.exception is not None and not isinstance(run.exception, SystemExit):
        raise run.exception
    return run


def elsewhere(
    *arguments: str, absent: tuple[str, ...] = (), cwd: Path
) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """A run in a process of its own, where some packages are not installed; and the top-level modules it loaded."""
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Absent())
from attend_shared.command import main
try:
    main({list(arguments)})
finally:
    print("LOADED", *sorted({{name.partition(".")[0] for name in sys.modules}}))
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=cwd, capture_output=True, text=True)
    return run, set(run.stdout.partition("LOADED")[2].split())


@pytest.fixture
def wrong_einsum(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's einsum gives a hundredth too much."""
    from attend_torch.implementations import einsum

    right = einsum.attend
    monkeypatch.setattr(einsum, "attend", lambda *arguments: ((answer := right(*arguments))[0] * 1.01, answer[1]))


# attend parity


def test_parity_passes_and_says_what_it_did() -> None:
    run = attend("parity", *FEW)
    assert run.exit_code == 0, run.output
    for framework, package in (("torch", attend_torch), ("jax", attend_jax)):
        for implementation in package.implementations():
            assert f"{framework} {implementation.name}" in run.output
    for words in ("everything", "causal", "error/budget", "Between the frameworks", "passed:", "0 wrong"):
        assert words in run.output
    if not any(it.available for it in attend_jax.implementations() if it.name == "cudnn"):
        assert "it needs an NVIDIA GPU" in run.output


def test_parity_writes_json_and_a_page(tmp_path: Path) -> None:
    file, page = tmp_path / "parity.json", tmp_path / "parity.html"
    run = attend("parity", "--case", "decode-float32-lse", "--json", file, "--html", page)
    assert run.exit_code == 0, run.output
    assert sorted(tmp_path.iterdir()) == [page, file]  # nothing half-written stays
    found = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert found["verdict"] == "passed"
    assert {"python", "numpy", "torch", "jax", "flax", "attend-twin"} <= found["versions"].keys()
    assert found["device"].startswith("cpu")
    served = {(it["framework"], it["implementation"]) for it in found["results"] if it["verdict"] == "ok"}
    assert {("torch", "einsum"), ("jax", "einsum")} <= served
    (mine,) = (it for it in found["results"] if (it["framework"], it["implementation"]) == ("jax", "einsum"))
    assert [row["name"] for row in mine["errors"]] == ["out", "lse", "dq", "dk", "dv"]
    assert 0 < mine["share"] <= 1 and mine["worst"] in {row["name"] for row in mine["errors"]}
    refused = {(it["framework"], it["implementation"]): it["reason"] for it in found["refusals"]}
    assert refused["torch", "sdpa"] == "it has no differentiable lse"
    assert found["rows"][0]["feature"] == parity.EVERYTHING
    text = page.read_text()
    assert text.startswith("<!doctype html>") and text.endswith("</html>\n")
    assert "decode-float32-lse" in text and "it has no differentiable lse" in text
    assert re.search(r"(src|href)\s*=|https?:|@import|url\(", text) is None  # the page needs nothing else


def test_a_wrong_implementation_is_a_failure(wrong_einsum: None, tmp_path: Path) -> None:
    file, page = tmp_path / "parity.json", tmp_path / "parity.html"
    which = ("--framework", "torch", "--implementation", "sdpa", "--implementation", "einsum")
    run = attend("parity", *FEW, *which, "--json", file, "--html", page)
    assert run.exit_code == 1
    assert "FAILED: 1 results as they should be, 0 refused with a reason, 1 wrong" in run.output
    assert "torch einsum: square-float32-causal" in run.output
    assert "out (float32)" in run.output and "over the budget" in run.output
    again = "attend parity --framework torch --implementation einsum --case square-float32-causal"
    assert again in run.output
    found = json.loads(file.read_text())
    assert (found["verdict"], found["failures"]) == ("failed", 1)
    assert "over the budget" in page.read_text()
    assert attend(*again.split()[1:]).exit_code == 1


def test_an_exception_is_a_failure_with_its_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from attend_torch.implementations import einsum

    def explode(*arguments: Any) -> Any:
        raise RuntimeError("no <b>memory</b> [left]")

    monkeypatch.setattr(einsum, "attend", explode)
    page = tmp_path / "parity.html"
    run = attend("parity", "--case", "square causal !tiles !bias", "--framework", "torch", "--html", page)
    assert run.exit_code == 1
    assert run.output.count("RuntimeError: no <b>memory</b> [left]") == 5  # the first ones in full
    assert re.search(r"and \d+ more", run.output)
    text = page.read_text()
    assert "RuntimeError: no &lt;b&gt;memory&lt;/b&gt; [left]" in text and "<b>memory" not in text


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("verdict", ["ok", "failed"])
@pytest.mark.parametrize("swallowed", [False, True])
def test_a_run_that_is_stopped_loses_nothing_and_passes_for_no_whole_one(
    number: int, status: int, verdict: str, swallowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = cases.CASES[:5]

    def examine(case: Case, *_: Any) -> parity.Report:
        it = parity.Result("torch", "einsum", case.name, case.features, verdict, None, 0.5, "out", (), 0.0)
        if case == chosen[2]:
            try:
                os.kill(os.getpid(), number)
            except KeyboardInterrupt:  # as a framework may, which makes an error of it
                if not swallowed:
                    raise
        return parity.Report(case, (it,), ())

    monkeypatch.setattr(parity, "examine", examine)
    monkeypatch.setattr(cases, "select", lambda _: chosen)
    file, page = tmp_path / "parity.json", tmp_path / "parity.html"
    which = "--framework", "torch", "--implementation", "einsum"
    run = attend("parity", *which, "--json", file, "--html", page)
    assert run.exit_code == status, run.output
    words = f"{'FAILED, ' if verdict == 'failed' else ''}stopped after 2 of 5 cases: "
    assert words in run.output and "torch einsum" in run.output and f"written: {page}" in run.output
    assert "passed" not in run.output + file.read_text() + page.read_text()
    found = json.loads(file.read_text())
    assert found["verdict"] == ("failed" if verdict == "failed" else "stopped")
    assert found["stopped"] == {"done": 2, "of": 5}
    assert [it["case"] for it in found["results"]] == [case.name for case in chosen[:2]]
    assert words in page.read_text()
    assert sorted(tmp_path.iterdir()) == [page, file]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "what comes later ends the command"


def test_a_whole_run_is_marked_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "examine", lambda case, *_: parity.Report(case, (), ()))
    assert attend("parity", *FEW, "--framework", "torch", "--json", tmp_path / "x.json").exit_code == 0
    found = json.loads((tmp_path / "x.json").read_text())
    assert (found["verdict"], found["stopped"]) == ("passed", None)


def test_ctrl_c_before_anything_runs_is_no_failure_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(framework: str) -> parity.Twin:
        raise KeyboardInterrupt

    monkeypatch.setattr(parity, "load", load)
    assert attend("parity", *FEW).exit_code == 130


@pytest.fixture
def unkilled() -> Iterator[None]:
    """SIGTERM where the command leaves it as it was is an error of the test, and not its end."""

    def fail(number: int, _: object) -> None:
        raise RuntimeError("killed")

    before = signal.signal(signal.SIGTERM, fail)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_stops_it_while_a_file_is_written_leaves_no_half_of_it(
    number: int, status: int, unkilled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "examine", lambda case, *_: os.kill(os.getpid(), signal.SIGINT))
    write = Path.write_bytes

    def half(self: Path, content: bytes) -> None:
        write(self, content[: len(content) // 2])
        os.kill(os.getpid(), number)

    monkeypatch.setattr(Path, "write_bytes", half)
    assert attend("parity", *FEW, "--framework", "torch", "--json", tmp_path / "x.json").exit_code == status
    assert list(tmp_path.iterdir()) == []


def test_a_ctrl_c_at_a_terminal_reaches_no_process_of_a_run() -> None:
    process = processes.Process("attend_shared.parity:work")
    try:
        assert os.getpgid(process._process.pid) == process._process.pid
    finally:
        process.close()


@pytest.mark.parametrize(("name", "status"), [("INT", 130), ("TERM", 143)])
def test_a_benchmark_ends_with_the_command(
    name: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nsleep 0.2\nkill -{name} $PPID\nexec sleep 60\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    assert attend("bench", "--device", "cpu").exit_code == status
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_wrong_calls_are_run_by_name_and_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    run = attend("parity", "--case", parity.CHECKS)
    assert run.exit_code == 0, run.output
    assert f"{2 * len(wrong_calls.WRONG_CALLS)} results as they should be" in run.output
    first = wrong_calls.WRONG_CALLS[0]
    changed = type(first)(first.name, first.error, first.text.upper(), first.build)
    monkeypatch.setattr(wrong_calls, "WRONG_CALLS", (changed,))
    monkeypatch.setattr(cases, "select", lambda pattern: (cases.case(),) if not pattern else ())
    run = attend("parity", "--framework", "torch")
    assert run.exit_code == 1
    assert f"torch checks: {first.name}" in run.output and first.text.upper() in run.output.replace("\n", " ")


def test_cases_are_chosen_by_name_by_words_and_by_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    monkeypatch.setattr(parity, "examine", lambda case, *_: taken.append(case.name) or parity.Report(case, (), ()))

    def chosen(*arguments: str) -> list[str]:
        taken.clear()
        assert attend("parity", "--framework", "torch", *arguments).exit_code == 0
        return list(taken)

    assert chosen("--case", "square-float32-causal") == ["square-float32-causal"]
    assert chosen("--case", "wide-float16-mask_key-lse") == ["wide-float16-mask_key-lse"]  # on no list
    assert chosen("--case", "sinks !lse") == [case.name for case in cases.select("sinks !lse")]
    assert chosen("--case", "sinks", "--dtype", "float64", "--dtype", "float16") == [
        case.name for case in cases.select("sinks") if case.level("dtype") in ("float64", "float16")
    ]
    assert chosen() == [case.name for case in cases.CASES]


def test_several_processes_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attend_shared.command.common.processors", lambda: 2)

    def found(jobs: int) -> dict[str, Any]:
        file = tmp_path / f"{jobs}.json"
        which = "--case", "square float32 causal", "--framework", "torch", "--implementation", "einsum"
        run = attend("parity", *which, "--jobs", str(jobs), "--json", file)
        assert run.exit_code == 0, run.output
        return json.loads(file.read_text())

    one, two = ([{**row, "seconds": 0} for row in found(jobs)["results"]] for jobs in (1, 2))
    assert len({row["case"] for row in one}) > 2
    assert one == two


def test_what_dies_or_hangs_in_one_of_several_processes_has_failed_and_the_rest_goes_on() -> None:
    chosen = [cases.find(name) for name in ("square-float32-causal", "square-float32-lse", "square-float32-softcap_30")]
    planted = [chosen[0], Lost(chosen[1].levels), chosen[2]]
    twins, names = [parity.load(framework) for framework in parity.FRAMEWORKS], ("einsum", "rowwise", "xla", "cudnn")
    one = list(parity.run(twins, chosen, implementations=names))
    several = list(parity.run(twins, planted, implementations=names, jobs=2, limit=8.0))
    several.sort(key=lambda it: planted.index(it.case))
    assert [it.case for it in several] == planted
    lost = {}
    for expected, found in zip(one, several, strict=True):
        assert len(expected.results) == len(found.results) > 3
        for right, it in zip(expected.results, found.results, strict=True):
            if it.implementation == "einsum" and it.case == chosen[1].name:
                lost[it.framework] = it
            else:
                assert it._replace(seconds=0) == right._replace(seconds=0)
        apart = [it for it in expected.differences if (it.case, it.first[1]) != (chosen[1].name, "einsum")]
        assert list(found.differences) == apart
    assert {it.verdict for it in lost.values()} == {"failed"}
    died = str(lost["torch"].text)
    assert died.startswith("its process was ended by signal 11") and "doctor_plants.py" in died
    assert lost["jax"].text == "no answer in 8 s"


def test_with_a_limit_what_hangs_has_failed_in_one_process_too(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [cases.find(name) for name in ("square-float32-lse", "square-float32-causal")]
    monkeypatch.setattr(cases, "select", lambda _: (Hung(chosen[0].levels), chosen[1]))
    run = attend("parity", "--framework", "torch", "--implementation", "einsum", "--limit", "3")
    assert run.exit_code == 1, run.output
    assert "torch einsum: square-float32-lse\nno answer in 3 s" in run.output
    assert "FAILED: 1 results as they should be, 0 refused with a reason, 1 wrong" in run.output


@pytest.mark.parametrize(("asked", "there", "used"), [(999, 2, 2), (3, 4, 3), (2, 2, 2), (2, 1, 1), (None, 9, None)])
@pytest.mark.parametrize(("name", "function", "default"), [("parity", "run", 1), ("doctor", "examine", 4)])
def test_there_are_at_most_as_many_processes_as_processors(
    name: str, function: str, default: int, asked: int | None, there: int, used: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    taken: list[int] = []

    def fake(*given: Any, jobs: int = 0, **_: Any) -> Iterator[Any]:
        taken.append(jobs or given[4])
        yield from ()

    monkeypatch.setattr(f"attend_shared.{name}.{function}", fake)
    monkeypatch.setattr("attend_shared.command.common.processors", lambda: there)
    few = FEW if name == "parity" else ("--device", "cpu")
    run = attend(name, "--framework", "torch", *few, *(() if asked is None else ("--jobs", str(asked))))
    assert taken == [used or default]
    assert (f"--jobs {asked}: {there}, one for each processor" in run.output) == (asked is not None and asked > there)


class Killed(Case):
    """A case that cannot even be read where it is to be run."""

    def __reduce__(self) -> tuple:
        return os._exit, (7,)


def test_a_case_that_no_process_survives_is_a_failure_of_all_until_they_are_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parity, "CRASHES", 2)
    monkeypatch.setattr("attend_shared.command.common.processors", lambda: 2)
    chosen = [Killed(each.levels) for each in cases.CASES[:2]]
    monkeypatch.setattr(cases, "select", lambda _: (*chosen, *cases.CASES[2:3]))
    monkeypatch.setattr(parity, "Processes", lambda jobs: processes.Processes(1))  # one after the other
    which = "--framework", "jax", "--implementation", "einsum", "--implementation", "cudnn"
    run = attend("parity", *which, "--jobs", "2")
    assert run.exit_code == 1
    assert run.output.count("its process ended with status 7") == 2
    assert run.output.count("given up after 2 processes were lost") == 1
    unavailable = [it for it in attend_jax.implementations() if it.name == "cudnn" and not it.available]
    assert all(str(it.reason) in run.output for it in unavailable)
    assert "3 refused" in run.output or not unavailable


def test_who_stops_listening_waits_for_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(Case):  # where a process reads it
        def __reduce__(self) -> tuple:
            return time.sleep, (600,)

    children: list[Any] = []
    start = processes.Process

    def started(work: str) -> Any:
        children.append(start(work))
        return children[-1]

    monkeypatch.setattr(processes, "Process", started)
    first = cases.find("square-float32-causal")
    reports = parity.run([parity.load("torch")], [Endless(first.levels), first], implementations=["einsum"], jobs=2)
    assert [it.verdict for it in next(reports).results] == ["ok"]
    started = time.perf_counter()
    reports.close()
    assert time.perf_counter() - started < 60
    assert len(children) == 2 and all(child._process.returncode == -9 for child in children)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--jobs", "0"), "Invalid value for '--jobs'"),
        (("--limit", "0"), "Invalid value for '--limit'"),
        (("--limit", "nan"), "--limit: expected at most 9223372036 seconds, got nan"),
        (("--limit", "inf"), "--limit: expected at most 9223372036 seconds, got inf"),
        (("--implementation", "flash3"), "--implementation: expected one of"),
        (("--case", "sqare"), "Did you mean square"),
        (("--case", "square-float32-causal", "--dtype", "float64"), "none of the 1 cases is float64"),
        (("--json", "no/such/folder/parity.json"), "there is no folder"),
        (("--html", ""), "--html: expected the name of a file to write, got none"),
        (("--html", "x" * 300), "it cannot be written: File name too long"),
        (("--case", "checks", "--implementation", "einsum"), "--case: checks are of no implementation or dtype"),
        (("--case", "checks", "--dtype", "float32"), "--case: checks are of no implementation or dtype"),
        (("--json", "x", "--html", "x"), "--html: expected another file than that of --json, got x for both"),
        (("--device", "tpu"), "Invalid value for '--device'"),
        (("--framework", "numpy"), "Invalid value for '--framework'"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_line(arguments: tuple[str, ...], words: str) -> None:
    run = attend("parity", *arguments)
    assert run.exit_code == 2
    assert words in run.output


def test_a_folder_that_nothing_may_be_made_in_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    file = tmp_path / "x.json"
    run = attend("parity", *FEW, "--json", file)
    assert run.exit_code == 2
    assert run.output.strip() == f"Error: {file}: it cannot be written: nothing may be made in {tmp_path}."


@pytest.mark.parametrize(("option", "value"), [("--q", "9" * 5000 + ",1,1,1"), ("--window", "0,-" + "9" * 5000)])
def test_a_number_without_end_is_said(option: str, value: str) -> None:
    sizes = () if option == "--q" else ("--q", "1,1,1,1")
    run = attend("explain", "--framework", "torch", *sizes, option, value)
    assert run.exit_code == 2 and "of at most 100 digits, got 500" in run.output


def test_the_demo_says_what_is_wrong_with_the_file_of_what_to_avoid(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(step: Any) -> demo.Demo:
        raise avoid.AvoidFileError("ATTEND_AVOID=x: expected a file")

    monkeypatch.setattr(demo, "run", run)
    result = attend("demo")
    assert result.exit_code == 2 and "Error: ATTEND_AVOID=x: expected a file" in result.output


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for framework in parity.FRAMEWORKS:
        monkeypatch.setattr(f"attend_{framework}.bridge.devices", lambda: ("cpu",))
        run = attend("parity", *FEW, "--framework", framework, "--device", "cuda")
        assert run.exit_code == 2
        assert f"{framework} has no device 'cuda' here: it runs on cpu" in run.output


# One framework, or none.


def test_help_loads_no_framework(tmp_path: Path) -> None:
    run, loaded = elsewhere("--help", cwd=tmp_path)
    assert run.returncode == 0 and "Usage: " in run.stdout, run.stdout + run.stderr
    assert loaded.isdisjoint((*JAX, *TORCH, "attend_torch", "attend_jax", "triton", "matplotlib", "transformers"))


@pytest.mark.parametrize(("framework", "absent"), [("torch", JAX), ("jax", TORCH)])
def test_parity_runs_with_one_framework(framework: str, absent: tuple[str, ...], tmp_path: Path) -> None:
    run, loaded = elsewhere("parity", *FEW, absent=absent, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{absent[0]} is left out: {absent[0]} is not installed" in run.stdout
    assert "passed:" in run.stdout and f"{framework} einsum" in run.stdout
    assert loaded.isdisjoint(absent)


@pytest.mark.parametrize(("framework", "other"), [("torch", JAX), ("jax", TORCH)])
def test_what_is_not_asked_for_is_not_loaded(framework: str, other: tuple[str, ...], tmp_path: Path) -> None:
    run, loaded = elsewhere("parity", *FEW, "--framework", framework, "--implementation", "einsum", cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert framework in loaded
    assert loaded.isdisjoint((*other, "matplotlib", "transformers"))


@pytest.mark.parametrize(
    "arguments", [("parity", "--framework", "jax"), ("explain", "--framework", "jax", "--q", "1,2,3,4")]
)
def test_a_framework_that_is_asked_for_must_be_there(arguments: tuple[str, ...], tmp_path: Path) -> None:
    run, _ = elsewhere(*arguments, absent=("flax",), cwd=tmp_path)
    assert run.returncode == 2
    assert 'flax is not installed. pip install "attend-twin[jax]"' in run.stderr


def test_without_a_framework(tmp_path: Path) -> None:
    run, _ = elsewhere("parity", absent=JAX + TORCH, cwd=tmp_path)
    assert run.returncode == 2
    assert "No framework is installed" in run.stderr
    assert 'pip install "attend-twin[torch]"' in run.stderr and 'pip install "attend-twin[jax]"' in run.stderr


def test_a_broken_installation_is_not_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "attend_torch.bridge")
    monkeypatch.setitem(sys.modules, "einops", None)
    with pytest.raises(ModuleNotFoundError, match="einops"):
        monkeypatch.delitem(sys.modules, "attend_torch.implementations.einsum")
        monkeypatch.delitem(sys.modules, "attend_torch.implementations")
        monkeypatch.delitem(sys.modules, "attend_torch.attend")
        monkeypatch.delitem(sys.modules, "attend_torch")
        parity.load("torch")


# attend explain

SHAPES = ("--q", "2,8,16,32", "--k", "2,2,24,32")


@pytest.mark.parametrize("framework", parity.FRAMEWORKS)
def test_explain_says_what_attend_would_take(framework: str) -> None:
    run = attend("explain", "--framework", framework, *SHAPES, "--causal", "--q-offset", "8")
    assert run.exit_code == 0, run.output
    package = {"torch": attend_torch, "jax": attend_jax}[framework]
    assert run.output.splitlines()[0] == "implementation  serves  why not"
    names = {line.split()[0] for line in run.output.splitlines()[1:]}
    assert names == {implementation.name for implementation in package.implementations()}
    assert run.output.count("chosen") == 1


@pytest.mark.parametrize("framework", parity.FRAMEWORKS)
def test_explain_takes_every_argument(framework: str) -> None:
    run = attend(
        "explain", "--framework", framework, *SHAPES, "--v", "2,2,24,64", "--dtype", "bfloat16", "--mask", "2,24",
        "--bias", "1,8,16,24", "--bias-dtype", "float64", "--causal", "--window", "7,none", "--q-offset", "data",
        "--segments", "--q-lengths", "--kv-lengths", "--sinks", "--softcap", "30", "--scale", "0.5", "--dropout", "0.1",
        "--lse",
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    assert "einsum" in run.output
    bnhd = ("--q", "2,16,8,32", "--k", "2,24,2,32", "--layout", "bnhd", "--q-lengths", "--segments", "--sinks")
    run = attend("explain", "--framework", framework, *bnhd)
    assert run.exit_code == 0, run.output
    run = attend("explain", "--framework", framework, *SHAPES, "--lse", "--implementation", "einsum")
    assert re.search(r"^einsum +chosen$", run.output, re.MULTILINE)


@pytest.mark.parametrize("framework", parity.FRAMEWORKS)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--q", "1,8,16"), "Error: q: expected rank 4"),
        (("--k", "2,3,24,32"), "Error: k: expected a number of key/value heads that divides the 8 heads of q"),
        (("--causal",), "Error: q_offset: expected"),
        (("--mask", "2,16,24"), "Error: mask: expected rank 4"),
        (("--softcap", "-1"), "Error: softcap: expected a number > 0"),
        (("--window", "-1,0"), "Error: window_size: expected"),
        (("--window", "3"), "Error: window_size: expected"),
        (("--bias-dtype", "float16"), "Error: --bias-dtype: expected --bias as well"),
    ],
)
def test_explain_says_what_is_wrong_in_a_line(framework: str, arguments: tuple[str, ...], words: str) -> None:
    run = attend("explain", "--framework", framework, *SHAPES, *arguments)
    assert run.exit_code == 2
    assert run.output.startswith(words), run.output
    assert run.output.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [("--q", "1,eight,16,32"), ("--window", "wide"), ("--q-offset", "end"), ("--dtype", "float8"),
     ("--v", "4000000000,4000000000,40,4"), ("--mask", f"1,{10**30}")],
)  # fmt: skip
def test_explain_says_what_it_cannot_read(arguments: tuple[str, ...]) -> None:
    run = attend("explain", "--framework", "torch", *SHAPES, *arguments)
    assert run.exit_code == 2
    assert arguments[1] in run.output


def test_explain_knows_the_other_device() -> None:
    run = attend("explain", "--framework", "torch", *SHAPES, "--device", "cuda")
    assert run.exit_code == 0, run.output
    if "cuda" not in parity.load("jax").bridge.devices():
        run = attend("explain", "--framework", "jax", *SHAPES, "--device", "cuda")
        assert (run.exit_code, run.output) == (2, "Error: --device: JAX runs on cpu here.\n")


# The rest.


def test_help_and_version() -> None:
    assert attend("--version").output.startswith("attend, version ")
    overview = attend("--help").output
    for command in ("demo", "parity", "explain"):
        assert command in overview
        assert attend(command, "--help").exit_code == 0


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    report.write(file, "before")

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            report.write(file, "after")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]


def test_what_is_no_plain_file_stays_and_is_written_to(tmp_path: Path) -> None:
    file, link, pipe = (tmp_path / name for name in ("file", "link", "pipe"))
    link.symlink_to(file)
    report.write(link, "through")
    assert link.is_symlink() and file.read_text() == "through"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    report.write(pipe, "through")
    assert os.read(reader, 99) == b"through" and pipe.is_fifo()
    os.close(reader)


@pytest.mark.parametrize("command", ["parity", "demo"])
def test_what_cannot_be_written_is_said_in_a_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "file" / "new"
    if command == "demo":
        monkeypatch.setattr(demo, "run", lambda step: pytest.fail("it is said before anything runs"))
        (tmp_path / "file").touch()
        run = attend(command, "--out", place)
        assert run.exit_code == 2
        words = f"Error: {tmp_path / 'file' / 'demo.png'}: there is no folder {tmp_path / 'file'} to write it to."
        assert run.output.strip() == words
        return
    else:
        monkeypatch.setattr(parity, "examine", lambda case, *_: parity.Report(case, (), ()))
        (tmp_path / "file").mkdir()
        monkeypatch.setattr(Path, "replace", lambda self, target: os.stat(tmp_path / "gone"))
        run = attend(command, *FEW, "--framework", "torch", "--json", place)
    assert run.exit_code == 2
    assert f"Error: {place}: it cannot be written: N" in run.output.replace("\n", " ")

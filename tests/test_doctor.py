"""attend doctor finds what is wrong, survives what crashes and hangs, and writes what makes the choice avoid it."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import attend_jax
import attend_torch
from attend_shared import UnsupportedError, avoid, canaries, choice, compare, doctor, doctor_picture
from attend_shared.avoid import AvoidFileError, Machine, Rule
from attend_shared.call import NAMES
from attend_shared.command import main
from attend_shared.doctor import Finding, Target

FRAMEWORKS = pytest.mark.parametrize("framework", ["torch", "jax"])
PACKAGES: dict[str, Any] = {"torch": attend_torch, "jax": attend_jax}
# What a framework takes for a small float32 call on a CPU.
FIRST = {"torch": "sdpa", "jax": "einsum"}


@pytest.fixture(autouse=True)
def _no_file(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test has the choice avoid ends with it."""
    monkeypatch.delenv(avoid.VARIABLE, raising=False)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    avoid.forget()
    yield
    avoid.forget()


def plant(name: str, implementation: str = "planted", framework: str = "torch") -> Target:
    return Target(framework, implementation, "cpu", f"doctor_plants:{name}")


def examine(target: Target, *names: str, dtype: str = "float32", **options: Any) -> dict[str, Finding]:
    pairs = [(canaries.find(name), dtype) for name in names]
    found = {it.canary: it for it in doctor.examine([target], pairs, **options)}
    assert found.keys() == set(names)
    return found


def content(*rules: Rule, machines: tuple[Machine, ...] | None = None) -> dict[str, Any]:
    """A file that holds for this machine."""
    if machines is None:
        both = (avoid.machine("torch", "cpu"), avoid.machine("jax", "cpu"))
        machines = tuple(it for it in both if it is not None)
    run = doctor.Run("a CPU", machines, (), (), True, 1.0)
    return doctor.as_json(run) | {"avoid": [it._asdict() for it in rules]}


def rule(framework: str, implementation: str, *traits: str, results: tuple[str, ...] = ("dq",)) -> Rule:
    return Rule(framework, "cpu", implementation, "float32", traits or ("q_len % 128 == 64",), results, ("plain",))


@pytest.fixture
def avoiding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], Path]:
    """Have the choice avoid what a file says."""

    def write(file: dict[str, Any]) -> Path:
        path = tmp_path / "machine.json"
        path.write_text(json.dumps(file))
        monkeypatch.setenv(avoid.VARIABLE, str(path))
        avoid.forget()
        return path

    return write


def shapes(framework: str, n: int, dtype: str = "float32") -> list[Any]:
    shape = (1, 2, n, 8)
    if framework == "torch":
        return [torch.zeros(shape, dtype=getattr(torch, dtype))] * 3
    return [jax.ShapeDtypeStruct(shape, dtype)] * 3


def chosen(framework: str, n: int, dtype: str = "float32", **options: Any) -> str:
    return PACKAGES[framework].explain(*shapes(framework, n, dtype), **options).chosen


# The canaries.


def test_canaries_have_the_traits_that_they_name() -> None:
    """What comes out wrong is avoided by these, so each must hold for the call itself, and say what it is about."""
    used = set()
    for canary in canaries.CANARIES:
        problem = canary.build("bfloat16")
        for framework in PACKAGES:
            call = doctor.call_of(problem, framework, "cuda")
            assert [name for name in canary.traits if not avoid.TRAITS[name](call)] == [], canary.name
        used |= set(canary.traits)
    assert used == set(avoid.TRAITS), "a trait that no canary has is never written"
    assert len({canary.name for canary in canaries.CANARIES}) == len(canaries.CANARIES)


def test_a_plain_call_has_no_trait_but_one() -> None:
    call = doctor.call_of(canaries.find("plain").build("float32"), "torch", "cpu")
    assert [name for name, holds in avoid.TRAITS.items() if holds(call)] == ["any call"]


@pytest.mark.parametrize("name", ["very low logits", "one outlier", "rising keys", "rows of the lowest number"])
def test_canaries_stay_within_what_their_dtype_holds(name: str) -> None:
    compare.budgets(canaries.find(name).build("float16"))  # raises where NumPy itself is lost


def test_canaries_are_what_their_names_say() -> None:
    def rows_alive(name: str) -> np.ndarray:
        given = canaries.find(name).build("float32").arguments
        return (given["mask"][:, None, :] & np.tri(given["q"].shape[2], given["k"].shape[2], dtype=bool)).any(-1)

    alive = rows_alive("left padding, 64 of 128, not in the loss")
    assert 0 < (~alive).sum() < alive.size
    blind = canaries.find("left padding, 64 of 128, not in the loss").build("float32").out_cotangent
    assert not blind[np.broadcast_to(~alive[:, None], blind.shape[:3])].any()
    seeing = canaries.find("left padding, 64 of 128").build("float32").out_cotangent
    assert seeing[np.broadcast_to(~alive[:, None], seeing.shape[:3])].all()
    assert np.isnan(canaries.find("NaN in masked keys").build("float32").arguments["v"]).any()
    again = canaries.find("plain").build("float16").arguments["q"]
    assert np.array_equal(again, canaries.find("plain").build("float16").arguments["q"])
    with pytest.raises(ValueError, match=r"canary: expected one of plain, .*got 'pigeon'"):
        canaries.find("pigeon")


@FRAMEWORKS
def test_the_doctor_knows_what_would_be_chosen(framework: str) -> None:
    """It asks by shapes and without the arrays; `explain` on the arrays says the same."""
    for name in ("plain", "lse", "left padding", "trained bias", "decoding, ragged"):
        problem = canaries.find(name).build("float32")
        given: dict[str, Any] = dict(problem.arguments)
        if framework == "torch":
            given = {key: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for key, x in given.items()}
            for key in problem.dtypes:
                given[key].requires_grad_()
        said = PACKAGES[framework].explain(**given, return_lse=problem.lse_cotangent is not None)
        assert doctor.explain(problem, framework, "cpu") == said


# What it finds.


def test_a_planted_fault_is_found_and_the_choice_avoids_just_that(
    avoiding: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    names = ("plain", "64 of 128 queries", "left padding, 64 of 128", "causal")
    found = examine(plant("wrong_at_64", "sdpa"), *names)
    assert [found[name].verdict for name in names] == ["safe", "wrong", "wrong", "safe"]
    wrong = found["64 of 128 queries"]
    assert wrong.chosen and wrong.results == ("out",) and wrong.share > 1
    assert wrong.text is not None
    for words in ("out (float32)", "worst at (b=", "got ", "expected ", "all of it is 1.01 times what is expected"):
        assert words in wrong.text
    machine = avoid.machine("torch", "cpu")
    assert machine is not None
    run = doctor.Run("a CPU", (machine,), (), tuple(found.values()), True, 1.0)
    assert len(run.taken) == 2 and run.verdict.startswith("NOT SAFE: 2 calls for which implementation=None takes what")

    assert (chosen("torch", 64), chosen("torch", 128)) == ("sdpa", "sdpa")
    file = json.loads(json.dumps(doctor.as_json(run)))
    path = avoiding(file)
    assert [it.traits for it in avoid.read(path).rules] == [
        ("q_len % 128 == 64",), ("may have empty rows", "q_len % 128 == 64"),
    ]  # fmt: skip
    assert (chosen("torch", 64), chosen("torch", 192), chosen("torch", 128)) == ("einsum", "einsum", "sdpa")
    assert chosen("torch", 64, "float64") == "sdpa", "another dtype was not found wrong"
    assert chosen("jax", 64) == FIRST["jax"], "another framework"
    why = dict(attend_torch.explain(*shapes("torch", 64)).rows)["sdpa"]
    assert why == "it is avoided: machine.json has its out wrong in float32 where q_len % 128 == 64"
    x = torch.randn(1, 2, 64, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        attend_torch.attend(x, x, x), attend_torch.attend(x, x, x, implementation="einsum"), rtol=0, atol=0
    )
    compiled = torch.compile(lambda q: attend_torch.attend(q, q, q), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), attend_torch.attend(x, x, x), rtol=0, atol=0)
    torch._dynamo.reset()


def test_sdpa_as_it_is_is_found_out() -> None:
    """On a CPU, too: a negative scale with is_causal, NaN behind a mask, rows of one finite fill (docs/traps.md)."""
    wrong = ("negative scale, causal", "NaN in masked keys", "rows of the lowest number")
    found = examine(plant("raw_sdpa", "raw sdpa"), *wrong, "plain", "left padding", "softcap")
    assert [found[name].verdict for name in wrong] == ["wrong"] * 3
    assert found["rows of the lowest number"].results == ("dq", "dk", "dv"), "forward it is right"
    assert [found[name].verdict for name in ("plain", "left padding", "softcap")] == ["safe", "safe", "refuses"]
    assert not any(it.chosen for it in found.values())
    assert doctor.rules(found.values()) == [], "it is none of ours to avoid"


def test_jax_runs_in_a_process_of_its_own() -> None:
    found = examine(Target("jax", "einsum", "cpu"), "one key")["one key"]
    assert (found.verdict, found.text, found.chosen) == ("safe", None, True)
    assert examine(Target("jax", "xla", "cpu"), "lse")["lse"].text == "it has no differentiable lse"


def test_a_wrong_gradient_is_named_and_may_be_left_out() -> None:
    found = examine(plant("wrong_gradient"), "causal", dtype="bfloat16")["causal"]
    assert (found.verdict, found.results) == ("wrong", ("dk",))
    assert found.text is not None and "worst at (b=0, hk=1, j=2, d=3)" in found.text
    assert examine(plant("wrong_gradient"), "causal", gradients=False)["causal"].verdict == "safe"


def test_what_crashes_hangs_raises_or_refuses_is_a_finding_and_the_rest_goes_on() -> None:
    names = ("plain", "decoding", "one key", "64 of 128 queries", "causal", "left padding", "window of 64")
    found = examine(plant("trouble"), *names, limit=3.0)
    verdicts = {name: it.verdict for name, it in found.items()}
    assert verdicts == {
        "plain": "safe", "decoding": "crashed", "one key": "hung", "64 of 128 queries": "crashed", "causal": "safe",
        "left padding": "refuses", "window of 64": "crashed",
    }  # fmt: skip
    assert found["one key"].text == "no answer in 3 s"
    assert found["window of 64"].text == "RuntimeError: an illegal memory access was encountered"
    died = str(found["decoding"].text)
    assert died.startswith("its process was ended by signal 11") and "doctor_plants.py" in died
    assert found["left padding"].text == "it has no mask"
    assert found["plain"].bits == ()
    named = [it._replace(implementation="triton") for it in found.values()]
    assert {rule.traits: rule.results for rule in doctor.rules(named)} == {
        ("q_len == 1",): ("crashed",), ("kv_len == 1",): ("hung",), ("q_len % 128 == 64",): ("crashed",),
        ("window",): ("crashed",),
    }  # fmt: skip


def test_one_that_always_dies_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CRASHES", 2)
    found = examine(plant("deadly"), "plain", "causal", "one key")
    assert [it.verdict for it in found.values()] == ["crashed", "crashed", "not run"]
    assert str(found["plain"].text).startswith("its process ended with status 7")
    assert found["one key"].text == "given up after 2 processes were lost"


def test_bits_that_differ_are_reported_and_are_no_fault() -> None:
    found = examine(plant("fickle"), "plain", "causal")
    assert (found["plain"].verdict, found["plain"].bits) == ("safe", ("out",))
    assert found["causal"].bits is None, "it is not run twice"


def test_nothing_is_left_running_where_no_one_listens() -> None:
    children: list[subprocess.Popen[str]] = []
    start = subprocess.Popen

    def started(*arguments: Any, **options: Any) -> Any:
        children.append(start(*arguments, **options))
        return children[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", started)
        pairs = [(canaries.find(name), "float32") for name in ("plain", "one key", "causal")]
        findings = doctor.examine([plant("trouble")], pairs)
        assert next(findings).verdict == "safe"
        findings.close()
    assert children and all(child.poll() is not None for child in children)


def test_a_process_ends_with_the_one_that_asked() -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, "-m", "attend_shared.processes", "attend_shared.doctor:work"],
        env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    pickle.dump(plant("trouble"), process.stdin)
    pickle.dump(("one key", "float32"), process.stdin)  # hangs
    process.stdin.flush()
    assert pickle.load(process.stdout) == {"ready": True}
    process.stdin.close()
    assert process.wait(timeout=60) == 1
    process.stdout.close()


# The file.

GOOD = rule("torch", "sdpa")._asdict()
BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another format": (lambda it: it | {"format": "holiday photos"}, "format: expected 'attend doctor', got"),
    "no object": (lambda it: [it], "format: expected 'attend doctor', got"),
    "another version": (lambda it: it | {"version": 2}, "version: expected 1, which this release of attend reads"),
    "a version of true": (lambda it: it | {"version": True}, "version: expected 1"),
    "a missing part": (lambda it: {key: x for key, x in it.items() if key != "machines"}, "machines: expected a value"),
    "a part too many": (lambda it: it | {"run": "rm"}, "the file: expected no fields but format, version"),
    "rules as an object": (lambda it: it | {"avoid": {}}, "avoid: expected a list, got {}"),
    "a rule as text": (lambda it: it | {"avoid": ["sdpa"]}, "avoid[0]: expected an object, got 'sdpa'"),
    "an unknown trait": (
        lambda it: it | {"avoid": [GOOD, GOOD | {"traits": ["__import__('os')"]}]},
        "avoid[1].traits[0]: expected one of any call, q_len == 1",
    ),
    "no trait": (lambda it: it | {"avoid": [GOOD | {"traits": []}]}, "avoid[0].traits: expected at least one"),
    "an unknown implementation": (
        lambda it: it | {"avoid": [GOOD | {"implementation": "flash9"}]}, "implementation: expected one of ",
    ),
    "an unknown dtype": (lambda it: it | {"avoid": [GOOD | {"dtype": "float8"}]}, "dtype: expected one of float16"),
    "an unknown result": (lambda it: it | {"avoid": [GOOD | {"results": ["dz"]}]}, "results[0]: expected one of out"),
    "a number as text": (lambda it: it | {"written": 7}, "written: expected text that can be printed, got 7"),
    "what a terminal would obey": (
        lambda it: it | {"machines": [it["machines"][0] | {"device": "\x1b[2J"}]}, r"device: expected text that can be",
    ),
    "half a character": (
        lambda it: it | {"machines": [it["machines"][0] | {"versions": {"\ud800": "1"}}]}, "versions: expected text",
    ),
    "gradients of 1": (lambda it: it | {"gradients": 1}, "gradients: expected true or false, got 1"),
    "a machine twice": (lambda it: it | {"machines": [it["machines"][0]] * 2}, "machines[1]: expected one for each"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_file_in_another_form_is_refused_by_name_and_place(name: str, tmp_path: Path) -> None:
    change, words = BAD[name]
    path = tmp_path / "strange.json"
    path.write_text(json.dumps(change(content(rule("torch", "sdpa")))))
    with pytest.raises(AvoidFileError) as caught:
        avoid.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "expected JSON as attend doctor writes it, got: Expecting value"),
        (b"{" + b'"a":' * 3, "expected JSON"),
        (b"\xff\xfe", "expected JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"version": NaN}', "NaN, which JSON does not have"),
        (b'{"version": 1, "version": 1}', "a name that comes twice"),
        (b'{"version": ' + b"9" * 5000 + b"}", "expected JSON"),
        (b" " * (avoid.LIMIT + 1), f"expected at most {avoid.LIMIT} bytes"),
    ],
    ids=["empty", "half", "no text", "deep", "NaN", "twice", "a long number", "huge"],
)
def test_what_is_no_json_is_refused(text: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "strange.json"
    path.write_bytes(text)
    with pytest.raises(AvoidFileError) as caught:
        avoid.read(path)
    assert str(path) in str(caught.value) and words in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AvoidFileError, match="No such file"):
        avoid.read(tmp_path / "none.json")
    with pytest.raises(AvoidFileError, match=r"Is a directory|got something else"):
        avoid.read(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")  # which nothing ever writes to
        with pytest.raises(AvoidFileError, match="got something else"):
            avoid.read(tmp_path / "pipe")


def test_a_file_fits_where_everything_is_wrong() -> None:
    machine = avoid.machine("torch", "cpu")
    assert machine is not None
    results = ("out", "dq", "dk", "dv")
    findings = tuple(
        Finding(framework, "cpu", name, dtype, canary.name, "wrong", "it is wrong " * 99, results, float("inf"))
        for framework in PACKAGES for name in NAMES for canary, dtype in doctor.plan(tuple(avoid.DTYPES))
    )  # fmt: skip
    text = json.dumps(doctor.as_json(doctor.Run("a CPU", (machine,), (), findings, True, 1.0)), indent=1)
    assert len(avoid.parse(text.encode(), "all.json").rules) > 500
    assert len(text) < avoid.LIMIT


def test_a_file_that_was_written_is_read_as_it_was_meant(tmp_path: Path) -> None:
    rules = (rule("torch", "sdpa"), rule("jax", "xla", "lse", "causal", results=("out", "crashed")))
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(content(*rules)))
    held = avoid.read(path)
    assert held.rules == rules
    assert held.machines == (avoid.machine("torch", "cpu"), avoid.machine("jax", "cpu"))
    assert len(path.read_bytes()) < avoid.LIMIT / 10


# What the choice makes of it.


@FRAMEWORKS
def test_nothing_is_read_before_the_first_choice_and_then_once(
    framework: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reads: list[Any] = []
    text = json.dumps(content(rule(framework, FIRST[framework]))).encode()

    def read(path: str) -> avoid.Avoided:
        reads.append(path)
        return avoid.parse(text, path)

    monkeypatch.setattr(avoid, "read", read)
    monkeypatch.setenv(avoid.VARIABLE, "somewhere.json")
    assert reads == []
    for _ in range(3):
        assert chosen(framework, 64) != FIRST[framework]
        assert chosen(framework, 65) == FIRST[framework]
    assert reads == ["somewhere.json"]
    monkeypatch.delenv(avoid.VARIABLE)
    assert chosen(framework, 64) != FIRST[framework], "it is read once"


@FRAMEWORKS
def test_a_file_that_cannot_be_read_is_an_error_of_the_call(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(avoid.VARIABLE, "no/such/file.json")
    x = np.zeros((1, 2, 4, 8), np.float32)
    call = attend_jax.attend if framework == "jax" else lambda *it: attend_torch.attend(*map(torch.from_numpy, it))
    for _ in range(2):
        with pytest.raises(AvoidFileError) as caught:
            call(x, x, x)
        words = "no/such/file.json: expected a file that attend doctor wrote, got: No such file or directory."
        assert str(caught.value) == f"ATTEND_AVOID={words}"


@FRAMEWORKS
def test_one_that_is_avoided_runs_where_it_is_named_and_explain_tells(
    framework: str, avoiding: Callable[[dict[str, Any]], Path]
) -> None:
    avoiding(content(rule(framework, FIRST[framework], "any call", results=("dq", "dk", "hung"))))
    explanation = PACKAGES[framework].explain(*shapes(framework, 4), implementation=FIRST[framework])
    words = "it is avoided: machine.json has its dq and dk wrong and it down as hanging in float32 where any call"
    assert explanation.chosen == FIRST[framework]
    assert dict(explanation.rows)[FIRST[framework]] == words
    assert f"chosen  {words}" in str(explanation)
    assert explanation.notes == ()


@FRAMEWORKS
def test_where_everything_is_avoided_the_error_says_so(
    framework: str, avoiding: Callable[[dict[str, Any]], Path]
) -> None:
    avoiding(content(*(rule(framework, name, "any call") for name in NAMES)))
    x = np.zeros((1, 2, 4, 8), np.float32)
    call = attend_jax.attend if framework == "jax" else lambda *it: attend_torch.attend(*map(torch.from_numpy, it))
    with pytest.raises(UnsupportedError) as caught:
        call(x, x, x)
    words = "it is avoided: machine.json has its dq wrong in float32 where any call"
    assert dict(caught.value.reasons)["einsum"] == words


@FRAMEWORKS
def test_a_file_of_another_machine_is_not_applied_and_explain_says_why(
    framework: str, avoiding: Callable[[dict[str, Any]], Path]
) -> None:
    here = avoid.machine(framework, "cpu")
    assert here is not None
    others = {
        f"it was written for abacus, and here is {here.device}": here._replace(device="abacus"),
        f"it was written for 9.0, and here is {here.capability or 'none'}": here._replace(capability="9.0"),
        f"it was written with {framework} 0.1, and here it is {here.versions[framework]}": here._replace(
            versions={**here.versions, framework: "0.1"}
        ),
        "it was written with triton 3.6.0, and here it is missing": here._replace(
            versions={**here.versions, "triton": "3.6.0"}
        ),
        f"it was not written for {framework} on cpu": here._replace(platform="cuda"),
    }
    for words, machine in others.items():
        path = avoiding(content(rule(framework, FIRST[framework]), machines=(machine,)))
        explanation = PACKAGES[framework].explain(*shapes(framework, 64))
        assert explanation.chosen == FIRST[framework]
        assert explanation.notes == (f"ATTEND_AVOID={path} is not applied: {words}",)
        assert str(explanation).splitlines()[-1] == explanation.notes[0]


def test_without_a_file_explain_has_nothing_to_say_of_one() -> None:
    assert attend_torch.explain(*shapes("torch", 64)).notes == ()
    assert choice.Explanation("einsum", (("einsum", None),)) == ("einsum", (("einsum", None),), ())


# The command.


def attend(*arguments: str | Path) -> Result:
    run = CliRunner().invoke(main, ["doctor", "--device", "cpu", "--framework", "torch", *map(str, arguments)])
    if run.exception is not None and not isinstance(run.exception, SystemExit):
        raise run.exception
    return run


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the command run these targets on two calls; at least one plants a fault that is no framework's."""

    def use(*them: Target) -> None:
        monkeypatch.setattr(doctor, "targets", lambda *_: list(them))
        pairs = [(canaries.find(name), "float32") for name in ("causal", "one key")]
        monkeypatch.setattr(doctor, "plan", lambda *_: pairs)

    return use


def test_the_command_says_writes_and_is_not_asked_twice(
    few: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few(plant("wrong_gradient", "sdpa"), plant("right", "einsum"))
    file, picture = tmp_path / "machine.json", tmp_path / "machine.png"
    run = attend("--output", file, "--picture", picture)
    assert run.exit_code == 1, run.output
    for words in ("torch sdpa float32, causal: dk wrong, which implementation=None takes",
                  "worst at (b=0, hk=1, j=2, d=3)", "WRONG f32*", "safe", "NOT SAFE: 1 calls",
                  f"export {avoid.VARIABLE}={file}"):  # fmt: skip
        assert words in run.output, run.output
    assert sorted(tmp_path.iterdir()) == [file, picture]  # nothing half-written stays
    assert picture.read_bytes().startswith(b"\x89PNG")
    held = avoid.read(file)
    assert held.rules == (rule("torch", "sdpa", "causal", results=("dk",))._replace(canaries=("causal",)),)
    found = json.loads(file.read_text(), parse_constant=pytest.fail)["results"]
    assert found["chosen"] == {"torch": {"float32": {"causal": "sdpa", "one key": "sdpa"}}}
    assert isinstance(found["found"]["torch"]["einsum"]["float32"]["causal"], float)

    before = file.read_bytes()
    run = attend("--output", file)
    assert (run.exit_code, run.output) == (2, f"Error: {file}: there is such a file. --force replaces it.\n")
    assert file.read_bytes() == before
    # With the file in force nothing wrong is taken.
    monkeypatch.setenv(avoid.VARIABLE, str(file))
    avoid.forget()
    run = attend("--output", tmp_path / "again.json")
    assert run.exit_code == 0, run.output
    assert "safe: all that implementation=None takes is right here, but 1 of what it does not take is not" in run.output
    assert f"{avoid.VARIABLE}={file} has its say" in run.output
    assert avoid.read(tmp_path / "again.json").rules == held.rules, "what is avoided is still found"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_prints_all_it_found_and_writes_nothing(
    number: int, status: int, few: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few(*(plant("right", f"mine {n}") for n in range(7)))

    def examine(them: list[Target], pairs: list[Any], **_: Any) -> Iterator[Finding]:
        for it in them:
            yield Finding(*it[:1], "cpu", it.implementation, "float32", "one key", "wrong", "dq is wrong", ("dq",))
        os.kill(os.getpid(), number)

    monkeypatch.setattr(doctor, "examine", examine)
    file, picture = tmp_path / "machine.json", tmp_path / "machine.png"
    file.write_text("a whole one")
    run = attend("--output", file, "--picture", picture, "--force")
    assert run.exit_code == status, run.output
    assert "stopped after 7 of 14 calls, not known to be safe" in run.output
    assert run.output.count("dq is wrong") == 7, "no file has the rest"
    assert "safe: all" not in run.output and "export" not in run.output
    assert f"not written, as the run is not whole: {file}" in run.output
    assert file.read_text() == "a whole one" and not picture.exists()


def test_a_stopped_run_makes_no_file_of_what_to_avoid() -> None:
    with pytest.raises(ValueError, match="expected a whole one, got one that was stopped after 3 of 9 calls"):
        doctor.as_json(doctor.Run("a CPU", (), (), (), True, 1.0, (3, 9)))


def test_what_is_wrong_but_not_taken_is_no_failure(few: Callable[..., None]) -> None:
    few(plant("wrong_gradient", "rowwise"))
    run = attend()
    assert run.exit_code == 0 and "1 wrong" in run.output
    assert attend("--forward").output.count("WRONG") == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--implementation", "flash9"), "--implementation: expected one of"),
        (("--output", "no/such/folder/file.json"), "there is no folder"),
        (("--picture", ""), "--picture: expected the name of a file to write, got none"),
        (("--output", "x", "--picture", "./x"), "--picture: expected another file than that of --output, got x"),
        (("--limit", "0"), "Invalid value for '--limit'"),
        (("--limit", "nan"), "--limit: expected at most 9223372036 seconds, got nan"),
        (("--limit", "inf"), "--limit: expected at most 9223372036 seconds, got inf"),
        (("--dtype", "float8"), "Invalid value for '--dtype'"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_line(arguments: tuple[str, ...], words: str) -> None:
    run = attend(*arguments)
    assert run.exit_code == 2 and words in run.output


def test_a_picture_that_cannot_be_drawn_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attend_shared.command.doctor.find_spec", lambda name: None)
    run = attend("--picture", "x.png")
    assert run.exit_code == 2 and run.output.startswith("Error: --picture: it needs matplotlib")


def test_a_file_in_force_that_cannot_be_read_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(avoid.VARIABLE, "no/such/file.json")
    run = attend()
    assert run.exit_code == 2
    assert run.output.startswith("Error: ATTEND_AVOID=no/such/file.json: expected a file")


def test_a_file_of_another_machine_is_said(few: Callable[..., None], avoiding: Callable[..., Path]) -> None:
    few(plant("right", "einsum"))
    machine = avoid.machine("torch", "cpu")
    assert machine is not None
    path = avoiding(content(machines=(machine._replace(device="abacus"),)))
    assert f"{avoid.VARIABLE}={path} is not applied: it was written for abacus" in attend().output


def test_a_picture_has_every_verdict() -> None:
    one = Finding("torch", "cpu", "sdpa", "float32", "plain", "safe", share=0.5, chosen=True)
    verdicts = [one._replace(verdict=verdict, canary=verdict) for verdict in doctor.VERDICTS]
    run = doctor.Run("a CPU", (), (), tuple(verdicts), True, 1.0)
    assert doctor_picture.draw(run).startswith(b"\x89PNG")

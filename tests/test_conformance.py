"""Every case on the implementations of both frameworks: against the oracle, and one framework against the other.

What each implementation refuses, and for which reason, stands in refusals.json beside this file, for a CPU and as it
would be on an NVIDIA GPU. A new refusal, or one that is gone, changes it: `python tests/test_conformance.py` writes it
anew, and the change is to be read like code.
"""

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from attend_jax.implementations import fa3 as jax_fa3
from attend_jax.implementations import fa4 as jax_fa4
from attend_jax.implementations import triton as jax_triton
from attend_shared import cases, compare, parity, reference, wrong_calls
from attend_shared.cases import Case
from attend_shared.choice import Implementation
from attend_shared.compare import Outcome
from attend_shared.errors import UnsupportedError
from attend_shared.parity import Result, Twin
from attend_torch.implementations import fa4 as torch_fa4
from attend_torch.implementations import flex as torch_flex
from attend_torch.implementations import triton as torch_triton

REFUSALS = Path(__file__).parent / "refusals.json"
TWINS = [parity.load(framework) for framework in parity.FRAMEWORKS]
DEVICE = "cpu" if all("cpu" in twin.bridge.devices() for twin in TWINS) else "cuda"

# How far einsum in one framework may lie from einsum in the other: as far as either may lie from the oracle. Both
# budgets together would allow twice that.
APART = 1.0

# JAX compiles each of these for about a second. They share the cases among them: each has every level that it serves at
# least once. JAX's einsum and all of torch run every case, and `attend parity` runs everything on everything.
IN_TURN = ("xla", "rowwise", "blockwise")


@cache
def served() -> dict[Case, set[str]]:
    """Those of `IN_TURN` that serve a case."""
    rows = {case: parity.explain(TWINS[1], case.build(), DEVICE).rows for case in cases.CASES}
    return {
        case: {name for name, reason in found if name in IN_TURN and reason is None} for case, found in rows.items()
    }


@cache
def turns() -> dict[Case, set[str]]:
    """Those of `IN_TURN` whose turn a case is: of those that serve it the one that knows fewest of its levels."""
    known: dict[str, Counter[str]] = {name: Counter() for name in IN_TURN}
    taken: dict[Case, set[str]] = {}
    for case, names in served().items():
        least = min(names, key=lambda name: sorted(known[name][level] for level in case.levels), default=None)
        taken[case] = {least} if least else set()
        known[least or IN_TURN[0]].update(case.levels if least else ())
    for case, names in served().items():  # what is left
        for name in names - taken[case]:
            if any(not known[name][level] for level in case.levels):
                known[name].update(case.levels)
                taken[case].add(name)
    return taken


def twins(case: Case) -> list[Twin]:
    """The frameworks, with those implementations in JAX's table whose turn the case is, or that refuse it."""
    torch, jax = TWINS
    left_out = served()[case] - turns()[case]
    return [torch, jax._replace(table=tuple(it for it in jax.table if it.name not in left_out))]


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_case(case: Case) -> None:
    report = parity.examine(case, twins(case), DEVICE)
    problem = case.build()
    said = {twin.framework: dict(parity.explain(twin, problem, DEVICE).rows) for twin in TWINS}
    wrong = [f"{it.framework} {it.implementation}: {it.text}" for it in report.results if it.verdict == "failed"]
    assert not wrong, "\n".join(wrong)
    for result in report.results:  # it refuses what it says, and nothing else
        assert result.text == said[result.framework][result.implementation], result
    served = {(result.framework, result.implementation) for result in report.results if result.verdict == "ok"}
    assert {("torch", "einsum"), ("jax", "einsum")} <= served
    (einsum,) = (it for it in report.differences if it.first[1] == it.second[1] == "einsum")
    assert einsum.share <= APART, einsum


def test_those_that_take_turns_meet_every_level_that_they_serve() -> None:
    for name in IN_TURN:
        mine = [case for case in cases.CASES if name in turns()[case]]
        assert mine
        could = {level for case in cases.CASES if name in served()[case] for level in case.levels}
        assert {level for case in mine for level in case.levels} == could
    for case in cases.CASES:
        assert not served()[case] or turns()[case]
        assert len(twins(case)[0].table) == len(TWINS[0].table)


def found() -> dict[str, Any]:
    """What refusals.json should hold. JAX is told where it runs; torch looks at where the arrays are said to be.

    fa4, fa3, flex and triton look for a GPU themselves, and are told that it is not there, then that it is.
    """
    platforms = {}
    for platform, backend in (("cpu", "cpu"), ("cuda", "gpu")):
        reason = "it needs an NVIDIA GPU" if platform == "cpu" else None
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch("jax.default_backend", lambda backend=backend: backend))
            stack.enter_context(jax.numpy_dtype_promotion("standard"))
            for module in (torch_fa4, jax_fa4, jax_fa3, torch_flex, torch_triton, jax_triton):
                stack.enter_context(mock.patch.object(module, "unavailable", lambda reason=reason: reason))
            twins = [parity.load(framework) for framework in parity.FRAMEWORKS]
            platforms[platform] = parity.refusals(twins, cases.CASES, platform)
    return platforms


def test_refusals_are_those_on_the_list() -> None:
    listed = json.loads(REFUSALS.read_text())
    assert found() == listed, "read what changed, then: python tests/test_conformance.py"
    for platform in listed.values():
        for framework in platform.values():
            assert framework["einsum"] == {"serves": len(cases.CASES), "refuses": {}, "serves nothing of": []}


# A comparison that cannot fail proves nothing.


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Outcome], Any]], list[Result]]:
    """The results of a case in which torch's outcomes are spoilt."""

    def run(spoil: Callable[[Outcome], Any]) -> list[Result]:
        evaluate = TWINS[0].bridge.evaluate
        monkeypatch.setattr(TWINS[0].bridge, "evaluate", lambda *arguments: spoil(evaluate(*arguments)))
        return list(parity.examine(cases.case("lse"), TWINS[:1], DEVICE, ("einsum",)).results)

    return run


def raises(error: Exception) -> Callable[[Outcome], Any]:
    def spoil(outcome: Outcome) -> Any:
        raise error

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda it: it._replace(out=1.001 * it.out), "out (float32)"),
        (lambda it: it._replace(lse=it.lse / np.log(2)), "lse (float32)"),
        (lambda it: it._replace(gradients={**it.gradients, "k": np.nan * it.gradients["k"]}), "NaN"),
        (lambda it: it._replace(gradients={**it.gradients, "v": it.gradients["v"][:1]}), "dv: expected shape"),
        (lambda it: it._replace(lse=None), "results: expected out, lse"),
        (raises(RuntimeError("out of memory")), "RuntimeError: out of memory"),
        (raises(NotImplementedError("some day")), "NotImplementedError: some day"),
    ],
)
def test_a_wrong_implementation_fails(planted: Any, spoil: Any, words: str) -> None:
    (result,) = planted(spoil)
    assert result.verdict == "failed"
    assert words in str(result.text)


def test_only_unsupported_error_is_a_refusal(planted: Any) -> None:
    (result,) = planted(raises(UnsupportedError((("einsum", "not today"),))))
    assert (result.verdict, result.text, result.errors) == ("refused", "not today", ())


def test_an_outcome_that_is_right_passes(planted: Any) -> None:
    (result,) = planted(lambda outcome: outcome)
    assert (result.verdict, result.text) == ("ok", None)
    assert {row.name for row in result.errors} == {"out", "lse", "dq", "dk", "dv"}
    assert 0 < result.share <= 1


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "ok"), (1 + 2.0**-22, "failed")])
@pytest.mark.parametrize("name", ["triton", "einsum"])
def test_who_promises_the_same_bits_must_have_them(factor: float, verdict: str, name: str) -> None:
    """Far within the budget, and yet not the same."""
    problem = cases.case("lse").build()
    table = (Implementation(name, True, True, None),)

    def twin(framework: str, factor: float) -> Twin:
        answer = reference.evaluate(problem)
        answer = answer._replace(out=np.float64(np.float32(answer.out * factor)))
        return Twin(framework, None, SimpleNamespace(evaluate=lambda *_: answer), table)

    results, _ = parity.hold("it", problem, [twin("torch", 1.0), twin("jax", factor)])
    assert [it.verdict for it in results] == ["ok", verdict if name == "triton" else "ok"]
    assert results[1].text == (None if results[1].verdict == "ok" else "out: not the bits of attend_torch")


def test_what_is_not_available_refuses_every_case() -> None:
    lacking = [implementation for implementation in TWINS[0].table if implementation.name == "sdpa"]
    twin = TWINS[0]._replace(table=tuple(it._replace(available=False, reason="no such chip") for it in lacking))
    (result,) = parity.examine(cases.case("causal"), [twin], DEVICE).results
    assert (result.verdict, result.text) == ("refused", "no such chip")


def test_difference_is_a_share_of_the_budget() -> None:
    problem = cases.case("bfloat16", "lse", "mask_empty_rows").build()
    known = compare.budgets(problem)
    right = Outcome(known["out"].expected, known["lse"].expected, {name: known[f"d{name}"].expected for name in "qkv"})
    assert np.isneginf(known["lse"].expected).any()
    assert parity.difference(right, right, known) == (0.0, "")
    apart, worst = parity.difference(right, right._replace(out=right.out + 3 * known["out"].maximum), known)
    assert (round(apart, 6), worst) == (3.0, "out")
    assert parity.difference(right, right._replace(out=np.nan * right.out), known) == (np.inf, "out")
    assert parity.difference(right, right._replace(lse=np.abs(right.lse)), known) == (np.inf, "lse")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"text": "q: something else"}, "it raised other words"),
        ({"error": RuntimeError}, "it raised other words"),
        ({"build": wrong_calls.right_call}, "it raised nothing"),
    ],
)
def test_a_wrong_call_must_raise_its_error_with_its_words(change: dict[str, Any], words: str | None) -> None:
    call = dataclasses.replace(wrong_calls.WRONG_CALLS[0], **change)
    results = list(parity.call_wrongly(TWINS, DEVICE, [call]))
    assert [it.framework for it in results] == ["torch", "jax"]
    for result in results:
        assert result.implementation == parity.CHECKS
        assert result.verdict == ("ok" if words is None else "failed")
        assert (result.text is None) if words is None else (words in str(result.text))


if __name__ == "__main__":
    REFUSALS.write_text(json.dumps(found(), indent=2) + "\n")

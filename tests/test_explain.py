"""explain says what attend does, and implementations lists what there is."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import attend_jax
import attend_jax.bridge
import attend_torch
import attend_torch.bridge
from attend_jax.implementations import table as jax_table
from attend_shared import Explanation, Implementation, UnsupportedError
from attend_shared.call import NAMES
from attend_shared.choice import Entry
from attend_torch.implementations import table as torch_table

FRAMEWORKS = pytest.mark.parametrize("framework", ["torch", "jax"])
PACKAGES: dict[str, Any] = {"torch": attend_torch, "jax": attend_jax}
BRIDGES: dict[str, Any] = {"torch": attend_torch.bridge, "jax": attend_jax.bridge}
TABLES: dict[str, Any] = {"torch": torch_table, "jax": jax_table}


def f(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def arguments(n: int = 6, **options: Any) -> dict[str, Any]:
    return {"q": f(2, 4, n, 8), "k": f(2, 2, n, 8), "v": f(2, 2, n, 8), **options}


# Calls that differ in who can serve them.
CALLS: dict[str, dict[str, Any]] = {
    "plain": arguments(),
    "long": arguments(600),
    "lse": arguments(return_lse=True),
    "softcap": arguments(softcap=30.0),
    "sinks": arguments(sinks=f(4)),
    "dropout": arguments(dropout=0.1, dropout_seed=7),
    "empty": arguments(0),
    "dv": arguments(v=f(2, 2, 6, 5)),
    "float16 bias": arguments(bias=np.zeros((1, 1, 6, 6), np.float16)),
    "causal": arguments(is_causal=True),
    "window": arguments(window_size=(2, 0)),
}  # fmt: skip
EACH_CALL = pytest.mark.parametrize("call", CALLS)


def explain(framework: str, call: dict[str, Any]) -> Explanation:
    if framework == "torch":
        call = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in call.items()}
    return PACKAGES[framework].explain(**call)


def spy(framework: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the implementations that run from now on."""
    ran: list[str] = []

    def watched(entry: Entry) -> Any:
        original = entry.module.attend

        def attend(*inputs: Any) -> Any:
            ran.append(entry.name)
            with monkeypatch.context() as inner:  # those that build on another count once
                for other, function in originals.items():
                    inner.setattr(other, "attend", function)
                return original(*inputs)

        return attend

    originals = {entry.module: entry.module.attend for entry in TABLES[framework]()}
    for entry in TABLES[framework]():
        monkeypatch.setattr(entry.module, "attend", watched(entry))
    return ran


@FRAMEWORKS
@EACH_CALL
def test_what_explain_says_attend_does(call: str, framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    explanation = explain(framework, CALLS[call])
    able = [name for name, reason in explanation.rows if reason is None]
    assert explanation.chosen == able[0]
    ran = spy(framework, monkeypatch)
    if framework == "jax":  # compiled programs are kept by what they are made for: traced afresh, nothing computed
        jax.clear_caches()
        arrays = {name: x for name, x in CALLS[call].items() if isinstance(x, np.ndarray)}
        options = {name: x for name, x in CALLS[call].items() if name not in arrays}
        jax.eval_shape(lambda arrays: attend_jax.attend(**arrays, **options), arrays)
    else:
        BRIDGES[framework].call(CALLS[call])
    assert ran == [explanation.chosen]


@FRAMEWORKS
@EACH_CALL
def test_rows(call: str, framework: str) -> None:
    """Every implementation once, and a reason in words where it refuses."""
    explanation = explain(framework, CALLS[call])
    assert isinstance(explanation, Explanation)
    assert {name for name, _ in explanation.rows} == set(BRIDGES[framework].implementations())
    assert dict(explanation.rows)["einsum"] is None
    for _, reason in explanation.rows:
        assert reason is None or re.fullmatch(r"[a-z].*[^.\s]", reason)


@FRAMEWORKS
def test_names_limit_the_choice_and_not_the_rows(framework: str) -> None:
    call = arguments(return_lse=True, softcap=2.0)
    rows = explain(framework, call).rows
    reasons = dict(rows)
    for names in ("einsum", ["einsum"], [*NAMES], [*reversed(NAMES)], ("xla", "sdpa"), "cudnn"):
        explanation = explain(framework, call | {"implementation": names})
        asked = [names] if isinstance(names, str) else list(names)
        able = [name for name in asked if name in reasons and reasons[name] is None]
        missing = f"attend_{framework} has no implementation of this name"
        foreign = tuple((name, missing) for name in asked if name not in reasons)
        assert explanation == Explanation(able[0] if able else None, rows + foreign)


@FRAMEWORKS
def test_a_call_that_nothing_can_serve_raises_in_attend_only(framework: str) -> None:
    call = arguments(softcap=2.0, implementation=("sdpa", "xla", "cudnn"))
    explanation = explain(framework, call)
    assert explanation.chosen is None
    with pytest.raises(UnsupportedError) as caught:
        BRIDGES[framework].call(call)
    mine = dict(explanation.rows)
    assert caught.value.reasons == tuple((name, mine[name]) for name in call["implementation"])


@FRAMEWORKS
def test_the_table_that_is_shown(framework: str) -> None:
    explanation = explain(framework, arguments(softcap=2.0))
    head, *lines = str(explanation).split("\n")
    assert head.split() == ["implementation", "serves", "why", "not"]
    assert len(lines) == len(explanation.rows)
    column = head.index("why not")
    for line, (name, reason) in zip(lines, explanation.rows, strict=True):
        verdict = "no" if reason else "chosen" if name == explanation.chosen else "yes"
        assert line.split()[:2] == [name, verdict]
        assert line[column:] == (reason or "")
        assert line == line.rstrip()


@FRAMEWORKS
def test_implementations(framework: str) -> None:
    listed = PACKAGES[framework].implementations()
    assert all(isinstance(each, Implementation) for each in listed)
    assert [each.name for each in listed] == list(BRIDGES[framework].implementations())
    assert {each.name for each in listed} <= set(NAMES)
    for each in listed:
        assert each.available == (each.reason is None)
        if not each.available:
            assert dict(explain(framework, arguments()).rows)[each.name] == each.reason
            with pytest.raises(UnsupportedError, match=re.escape(f"{each.name}: {each.reason}")):
                BRIDGES[framework].call(arguments(implementation=each.name))
    (einsum,) = (each for each in listed if each.name == "einsum")
    assert einsum == Implementation("einsum", fused=False, available=True, reason=None)


def test_every_name_is_an_implementation_somewhere() -> None:
    found = {name for bridge in BRIDGES.values() for name in bridge.implementations()}
    assert found == set(NAMES)


@EACH_CALL
def test_shapes_alone_will_do(call: str) -> None:
    """There is nothing to compute with. The order of preference is that of a device, and meta is another one."""
    arrays = {name: x for name, x in CALLS[call].items() if isinstance(x, np.ndarray)}
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
    assert attend_jax.explain(**CALLS[call] | shapes) == explain("jax", CALLS[call])
    meta = {name: torch.from_numpy(x).to("meta") for name, x in arrays.items()}
    assert dict(attend_torch.explain(**CALLS[call] | meta).rows) == dict(explain("torch", CALLS[call]).rows)


def test_large_shapes_cost_nothing() -> None:
    meta, shape = torch.empty(4, 64, 2**20, 128, device="meta"), jax.ShapeDtypeStruct((4, 64, 2**20, 128), jnp.bfloat16)
    assert attend_torch.explain(meta, meta, meta, is_causal=True).chosen
    assert attend_jax.explain(shape, shape, shape, is_causal=True).chosen


def test_explain_changes_nothing_in_what_attend_then_does() -> None:
    x = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    before = attend_torch.attend(x, x, x)
    attend_torch.explain(x, x, x, implementation="einsum")
    torch.testing.assert_close(attend_torch.attend(x, x, x), before, rtol=0, atol=0)

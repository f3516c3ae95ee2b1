"""The benchmark of a GPU without one: what is counted, compared, kept and concluded. Nothing here asserts a time."""

import json
import os
import random
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import click
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import attend_jax
import attend_jax.machine
import attend_torch.machine
from attend_jax.implementations import einsum
from attend_jax.implementations import table as jax_table
from attend_shared import command as attend_command
from attend_shared import devices, measured, oracle
from attend_shared.call import NAMES
from attend_shared.choice import Entry, Explanation
from attend_shared.orders import Device, Order
from attend_torch.implementations import ENTRIES as TORCH_ENTRIES
from attend_torch.implementations import sdpa
from attend_torch.implementations import table as torch_table
from benchmarks.gpu import command, jax_side, learn, report, workloads
from benchmarks.gpu.checking import LIMITS, Unsupported, compared, rate, sliced
from benchmarks.gpu.command import TIME_IS_UP, Run
from benchmarks.gpu.report import Results
from benchmarks.gpu.workloads import (
    CHOICE,
    DOCUMENTS,
    MODES,
    TRY_OUT,
    WORKLOADS,
    Workload,
    entries,
    flops,
    options,
    pairs,
    structure,
)
from benchmarks.measure import Lost

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORKS = ("torch", "jax")
pytestmark = pytest.mark.usefixtures("compile_fast")
EACH_FRAMEWORK = pytest.mark.parametrize("framework", FRAMEWORKS)
FACTS = {"schema", "machine", "sessions", "versions", "rates", "overheads", "workloads", "measurements"}


def small(load: Workload) -> Workload:
    """The same kind of call, of a size at which every pair can be looked at."""
    i = 1 if load.i == 1 else 24 if load.i < load.j else 48
    return load._replace(
        b=min(load.b, 3), h=4, hk=2 if load.h != load.hk else 4, i=i, j=48, d=8,
        window=load.window and 10, documents=load.documents and 4,
        bias=load.bias and (min(load.bias[0], 3), 4, i, 48),
    )  # fmt: skip


# What is counted.


@pytest.mark.parametrize("load", [*WORKLOADS, *TRY_OUT], ids=lambda load: load.name)
def test_useful_pairs_are_those_that_the_oracle_allows(load: Workload) -> None:
    load = small(load)
    q, k = np.zeros((load.b, load.h, load.i, load.d)), np.zeros((load.b, load.hk, load.j, load.d))
    asked = {name: x for name, x in options(load).items() if name in ("is_causal", "q_offset", "window_size")}
    allowed = oracle.allowed(q, k, k, **asked, **structure(load))
    assert pairs(load) == int(np.broadcast_to(allowed, (load.b, load.h, load.i, load.j)).sum()) > 0
    assert flops(load, "forward") == 4 * load.d * pairs(load)
    assert flops(load, "both") == 3.5 * flops(load, "forward")


def test_workloads_and_their_entries_have_names_of_their_own() -> None:
    loads = [*WORKLOADS, *TRY_OUT]
    assert len({load.name for load in loads}) == len(loads)
    for framework in FRAMEWORKS:
        for load in loads:
            asked = entries(framework, load)
            assert len(set(asked)) == len(asked)
            assert asked[0] == CHOICE
            assert {name for name in map(workloads.own, asked) if name} <= set(NAMES)


@EACH_FRAMEWORK
@pytest.mark.parametrize("load", WORKLOADS, ids=lambda load: load.name)
def test_a_workload_is_a_call_under_a_rule(load: Workload, framework: str) -> None:
    """Its arguments pass the checks, and what is special about it decides the rule."""
    call = learn.call_of(framework, load)
    assert (call.b, call.h, call.hk, call.i, call.j, call.d) == load[:6]
    assert (call.key_masked, call.segments, call.kv_lengths) == (
        load.keys in ("padding", "holes"),
        load.documents > 0,
        load.keys == "lengths",
    )
    rule = devices.rule(call).name
    expected = {
        "dropout": load.dropout, "a bias": load.bias, "segment ids": load.documents, "few queries": load.i == 1,
        "float32": load.dtype == "float32", "a softcap": load.softcap,
    }  # fmt: skip
    for name, given in expected.items():
        assert bool(given) == (rule == name)


# What is compared.


def sums(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    return float((x * x).sum()), float((x * y).sum()), float((y * y).sum())


def test_a_peer_that_computes_something_else_is_not_timed() -> None:
    load = workloads.CAUSAL_64
    y = np.random.default_rng(0).standard_normal(1000)
    rounded = y * (1 + 2e-3 * np.random.default_rng(1).standard_normal(1000))
    assert compared(load, {"out": sums(rounded, y), "dq": sums(rounded, y)})["dq"] == pytest.approx(2e-3, rel=0.2)
    for wrong in (1.02 * y, -y, np.roll(y, 1), 0 * y, y + 0.02, np.where(np.arange(1000) == 7, np.nan, y)):
        with pytest.raises(Unsupported, match="it computes something else: out is off by"):
            compared(load, {"out": sums(wrong, y)})
    with pytest.raises(Unsupported, match="dk is off by"):
        compared(load, {"out": sums(y, y), "dk": sums((1 + 2 * LIMITS["dk"]) * y, y)})


def test_dropout_of_other_random_numbers_is_held_to_its_rate() -> None:
    load = workloads.DROPOUT_64
    random_ = np.random.default_rng(0)
    p, v = random_.exponential(size=(400, 256)), random_.standard_normal((256, 8))
    p /= p.sum(1, keepdims=True)

    def dropped(rate: float) -> np.ndarray:
        return (p * (random_.random(p.shape) >= rate) / (1 - rate)) @ v

    found = {rate: compared(load, {"out": sums(dropped(rate), p @ v)})["scatter"] for rate in (0.1, 0.2)}
    assert rate(found[0.1], found[0.1], 0.1) == pytest.approx(0.1)
    assert rate(found[0.2], found[0.1], 0.1) == pytest.approx(0.2, rel=0.1)
    with pytest.raises(Unsupported, match="dropout leaves"):
        compared(load, {"out": sums((p * (random_.random(p.shape) >= 0.1)) @ v, p @ v)})


@pytest.mark.parametrize("load", TRY_OUT, ids=lambda load: load.name)
def test_adapters_for_torch_mean_what_we_mean(load: Workload) -> None:
    from benchmarks.gpu import torch_side

    load = small(load)._replace(d=16)
    inputs = torch_side.data(load, "cpu")
    expected = torch_side.reference(load, inputs, load.backward)
    served = []
    for entry in (CHOICE, "SDPA", "FA4"):
        try:
            ready = torch_side.prepare(entry, load, inputs)
            for mode in workloads.modes(load):
                torch_side.check(ready, load, mode, expected)
            served.append(entry)
        except Unsupported as refusal:
            assert not str(refusal).startswith("it computes something else") or load.dropout
    sdpa_has_it = not (load.softcap or load.sinks or load.lse or load.dropout)
    assert served[:1] == [CHOICE] or load.dropout
    assert ("SDPA" in served) == sdpa_has_it or load.dropout


@pytest.mark.parametrize("load", [workloads.WINDOW, workloads.CAUSAL_PADDED], ids=lambda load: load.name)
def test_adapters_for_flex_and_jax_mean_what_we_mean(load: Workload) -> None:
    import jax
    import torch

    from benchmarks.gpu import torch_side

    load = small(load)._replace(d=16, backward=False)
    given = torch_side.data(load, "cpu")
    for each in given.sets:
        for x in each.values():
            x.requires_grad_(False)  # which flex on a CPU does not take
    expected = torch_side.reference(load, given, False)
    torch_side.check(torch_side.prepare("FlexAttention", load, given), load, "forward", expected)
    torch.compiler.reset()
    inputs = jax_side.data(load)
    expected = jax_side.reference(load, inputs, False)
    with jax.numpy_dtype_promotion("standard"):  # as the benchmark has it
        ready = jax_side.compiled("jax.nn xla", load, "forward", inputs)
    jax_side.check(ready, load, "forward", expected)


# What is kept.


class Fake:
    """A worker without a device: of `wrong` entries it says so, at `deadly` ones it ends."""

    made: ClassVar[list["Fake"]] = []
    deadly: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    pause = 0.0

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.process = SimpleNamespace(poll=lambda: None)
        Fake.made.append(self)

    def ask(self, seconds: float, do: str, **request: Any) -> Any:
        entry = request.get("entry", "")
        self.asked.append((do, entry))
        if do == "prepare":
            if entry in self.deadly:
                self.process = SimpleNamespace(poll=lambda: -11)
                raise Lost("ended by signal 11 (out of memory or of time)")
            if entry == "FA4":
                raise Lost("Unsupported: it has no bias")
            known = {"errors": {"out": 2e-3}, "calls": 3, "host": 1e-4, "extra": 1000}
            if entry in self.broken:
                known = {"not_run": "AcceleratorError: CUDA error: an illegal memory access was encountered"}
            return {"chosen": "triton" if entry == CHOICE else None, "modes": dict.fromkeys(MODES, known)}
        if do == "run":
            time.sleep(self.pause)
            return {"ms": 1.0, "host": 0.1, "single": 1.5}
        return {"versions": {"torch": "1", "sources": "abc"}, "machine": {"device": "none"}}.get(do, {})

    def close(self) -> None:
        pass


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setattr(command, "Worker", lambda *_: Fake())
    monkeypatch.setattr(Fake, "made", [])
    return Fake


def measured_by(run: Run, load: Workload) -> dict[tuple[str, str], dict[str, Any]]:
    run.measure("torch", [load], run.end)
    return {(each["entry"], each["mode"]): each for each in run.results["measurements"]}


def test_an_entry_that_refuses_dies_or_breaks_the_device_leaves_the_others_whole(
    fake: type[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fake, "deadly", ("SDPA flash",))
    monkeypatch.setattr(Fake, "broken", ("SDPA cuDNN",))
    run = Run(tmp_path / "gpu.json", 1, 5, tmp_path)
    load = workloads.CAUSAL_64
    found = measured_by(run, load)
    assert found.keys() == {(entry, mode) for entry in entries("torch", load) for mode in MODES}
    for (entry, _), each in found.items():
        assert len(each["runs"]) == (0 if entry in ("FA4", "SDPA flash", "SDPA cuDNN") else 5)
        assert (each["not_run"] is None) == bool(each["runs"])
    assert found["FA4", "both"]["not_run"] == "it has no bias"
    assert "illegal memory access" in found["SDPA cuDNN", "both"]["not_run"]
    assert "signal 11" in found["SDPA flash", "forward"]["not_run"]
    assert len(Fake.made) == 3
    kept = json.loads((tmp_path / "gpu.json").read_text())
    conforms(kept)
    assert list(tmp_path.iterdir()) == [tmp_path / "gpu.json"]  # nothing is left beside it


def test_a_run_goes_on_where_an_earlier_one_stopped(fake: type[Fake], tmp_path: Path) -> None:
    path, load = tmp_path / "gpu.json", workloads.CAUSAL_64
    late = Run(path, 0, 5, tmp_path)
    assert {each["not_run"] for each in measured_by(late, load).values()} == {TIME_IS_UP}
    again = Run(path, 1, 5, tmp_path)
    again.resume()
    found = measured_by(again, load)
    assert len(found) == len(again.results["measurements"])
    assert sum(bool(each["runs"]) for each in found.values()) > 10
    assert len(again.results["sessions"]) == 2
    conforms(again.results)
    third, count = Run(path, 1, 5, tmp_path), len(Fake.made)
    third.resume()
    measured_by(third, load)
    assert [do for do, _ in Fake.made[count].asked if do in ("open", "run")] == []
    path.write_text(json.dumps({**again.results, "machine": {"device": "another"}}))
    other = Run(path, 1, 5, tmp_path)
    other.resume()
    with pytest.raises(click.ClickException, match="measured on another"):
        measured_by(other, load)


def test_a_workload_that_is_cut_short_counts_as_not_run(
    fake: type[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "SHORTEST", 0)
    monkeypatch.setattr(Fake, "pause", 0.01)
    run = Run(tmp_path / "gpu.json", 0.3 / 60, 5, tmp_path)
    found = measured_by(run, workloads.CAUSAL_64)
    conforms(run.results)
    assert found["FA4", "both"]["not_run"] == "it has no bias"
    assert {each["not_run"] for (entry, _), each in found.items() if entry != "FA4"} == {TIME_IS_UP}
    assert len([do for do, _ in Fake.made[0].asked if do == "run"]) > 10


def test_what_takes_minutes_to_compile_is_compiled_ahead_of_time_or_left_out(
    fake: type[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = workloads.CAUSAL_64
    monkeypatch.setattr(Fake, "deadly", ("attend flex",))
    run = Run(tmp_path / "gpu.json", 1, 5, tmp_path)
    run.warm(("torch",), [load], 1, 10)
    assert [entry for do, entry in Fake.made[0].asked if do == "warm"][-1] == "attend flex"
    assert run.uncompiled == set()
    late = Run(tmp_path / "gpu.json", 1, 5, tmp_path)
    late.warm(("torch",), [load], 1, 0)
    assert late.uncompiled == {("torch", load.name, "attend flex")}
    found = measured_by(late, load)
    assert found["attend flex", "both"]["not_run"] == command.NOT_COMPILED
    assert len(found["attend fa4", "both"]["runs"]) == 5
    again = Run(tmp_path / "gpu.json", 1, 5, tmp_path)
    again.resume()
    made = len(Fake.made)
    again.warm(("torch",), [load], 1, 10)
    assert [do for worker in Fake.made[made:] for do, _ in worker.asked] == []  # it is measured


def conforms(run: dict[str, Any]) -> None:
    """Every measurement is whole: runs with all their figures, or a reason why there are none."""
    assert set(run) == FACTS
    assert run["schema"] == command.SCHEMA
    for each in run["sessions"]:
        assert set(each) == {"started", "minutes", "seconds", "repeats", "sources"}
    loads = Results(json.loads(json.dumps(run))).loads
    for name, load in loads.items():
        assert load.name == name
    for each in run["measurements"]:
        assert each["mode"] in MODES
        assert each["workload"] in loads
        assert each["framework"] in FRAMEWORKS
        assert 0 <= each["session"] < len(run["sessions"])
        assert bool(each["runs"]) != bool(each["not_run"]), each
        for one in each["runs"]:
            assert one["ms"] > 0
            assert one["host"] > 0
        if each["runs"]:
            assert each["calls"] > 0
            assert each["extra"] >= 0
            assert each["errors"]


# What is concluded.


def synthetic(times: Callable[[str, str, str], float | None]) -> dict[str, Any]:
    """A run in which an entry of a framework takes so many milliseconds on every workload."""
    found = []
    for framework in FRAMEWORKS:
        for load in WORKLOADS:
            for entry in entries(framework, load):
                for mode in workloads.modes(load):
                    ms = times(framework, entry, mode)
                    each = {"ms": ms, "host": 0.01, "single": ms}
                    found.append({
                        "workload": load.name, "framework": framework, "entry": entry, "mode": mode, "session": 0,
                        "not_run": None if ms else "no", "extra": 10**6,
                        "chosen": "triton" if entry == CHOICE else workloads.own(entry), "calls": 2,
                        "runs": [each] * 5 if ms else [], "errors": {"out": 1e-3, "scatter": 0.3},
                    })  # fmt: skip
    return {
        "schema": 1, "machine": {"device": "a GPU", "capability": "9.0"},
        "versions": {"torch": {"torch": "2"}, "jax": {"jax": "0"}},
        "sessions": [
            {"started": "2026-11-22T00:00:00+00:00", "minutes": 1, "seconds": 60, "repeats": 5,
             "sources": dict.fromkeys(FRAMEWORKS, "a")}
        ],
        "rates": {"copy GB/s": 3000.0, "product TFLOP/s": 700.0},
        "overheads": {"torch": {"SDPA": [10.0] * 5, CHOICE: [35.0] * 5, f"{CHOICE} triton": [45.0] * 5}},
        "workloads": {load.name: load._asdict() for load in WORKLOADS}, "measurements": found,
    }  # fmt: skip


def verdicts(run: dict[str, Any]) -> dict[str, tuple[bool | None, str]]:
    return {each.what: (each.met, each.reached) for each in report.aims(Results(run))}


def test_aims_are_met_or_missed_by_what_was_measured() -> None:
    even = verdicts(synthetic(lambda framework, entry, mode: 1.0))
    missed = {what for what, (met, _) in even.items() if not met}
    assert all(any(word in what for word in ("FlexAttention", "Flax", "triton launched", "reading")) for what in missed)
    assert even[f"{CHOICE} triton launched from torch"] == (False, "35 us beyond the 10 of SDPA")
    assert even[f"{CHOICE} launched from torch"][0]
    slow = verdicts(synthetic(lambda framework, entry, mode: 1.1 if entry in (CHOICE, f"{CHOICE} triton") else 1.0))
    what = "implementation=None in PyTorch within 3 % or the spread of the best peer"
    assert even[what][0]
    assert slow[what][0] is False
    assert "the worst +10 %" in slow[what][1]
    cudnn = "triton against cuDNN: causal 4x16x4096x128, forward"
    assert slow[cudnn] == (True, "0.91x (0 %)")
    assert slow["triton against cuDNN: causal 4x16x4096x64, forward"] == (False, "0.91x (0 %)")
    apart = verdicts(synthetic(lambda framework, entry, mode: 1.06 if framework == "jax" else 1.0))
    assert apart["triton in JAX against torch, rows (b, n, h, d) in both"][0] is False
    nothing = verdicts(synthetic(lambda framework, entry, mode: None))
    assert {met for what, (met, _) in nothing.items() if "launched" not in what} == {None}


def test_what_scatters_is_allowed_its_spread_and_outliers_are_not_spread() -> None:
    run = synthetic(lambda framework, entry, mode: 1.0)
    for each in run["measurements"]:
        if each["entry"] == CHOICE:
            each["runs"] = [{"ms": ms, "host": 0.1, "single": None} for ms in (1.0, 1.04, 1.05, 1.06, 9.0)]
    found = report.choices(Results(run), "torch", report.is_ours)
    assert {round(each.slower_by, 3) for each in found} == {0.05}
    assert {round(each.allowed, 3) for each in found} == {0.03}
    assert not any(each.is_within for each in found)


def test_a_peer_that_drops_at_another_rate_is_marked() -> None:
    run = synthetic(lambda framework, entry, mode: 1.0)
    for each in run["measurements"]:
        if each["entry"] == "SDPA cuDNN":
            each["errors"] = {"scatter": 0.45}
    results = Results(run)
    assert results.get("torch", workloads.DROPOUT_64.name, "SDPA cuDNN", "both") is None
    assert results.get("torch", workloads.DROPOUT_64.name, "SDPA", "both")
    assert results.get("torch", workloads.CAUSAL_64.name, "SDPA cuDNN", "both")


def test_a_run_teaches_orders(tmp_path: Path) -> None:
    """The fastest in the mean comes first; what it writes is a module that says so, and what it loses is said."""
    speed = {"fa4": 1.0, "triton": 1.2, "sdpa": 1.1, "cudnn": 1.1, "flex": 2.0}
    run = synthetic(lambda _, entry, mode: 1.2 if entry == CHOICE else speed.get(str(workloads.own(entry)), 5.0))
    results = Results(run)
    for framework in FRAMEWORKS:
        by_rule = learn.orders(results, framework)
        first = ("fa4", "sdpa" if framework == "torch" else "cudnn", "triton")
        assert {names[:3] for names in by_rule["head sizes up to 64"].values()} == {first}
        assert {loss.slower_by for loss in learn.losses(results, framework, by_rule)} == {0.0}
        worse = {name: {mode: names[1:] for mode, names in found.items()} for name, found in by_rule.items()}
        assert max(loss.slower_by for loss in learn.losses(results, framework, worse)) == pytest.approx(0.1)
    space: dict[str, Any] = {}
    exec(learn.source(results), space)
    device = space["DEVICES"]["9.0"]
    assert device.name == "a GPU"
    assert device.orders["torch"]["sinks"].names[0] == "fa4"
    assert device.orders["jax"]["sinks"].times[workloads.SINKS.name]["triton"] == (1.2, 1.2)


@EACH_FRAMEWORK
def test_each_direction_is_taught_an_order(framework: str) -> None:
    quick = {"torch": "sdpa", "jax": "cudnn"}[framework]
    speed = {(quick, "forward"): 1.0, ("triton", "both"): 1.5}
    results = Results(synthetic(lambda _, entry, mode: speed.get((workloads.own(entry) or "triton", mode), 2.0)))
    found = learn.orders(results, framework)
    assert (found["lse"]["forward"][0], found["lse"]["both"][0]) == (quick, "triton")
    assert [loss for loss in learn.losses(results, framework, found) if loss.slower_by] == []
    worse = {rule: dict.fromkeys(MODES, names["forward"]) for rule, names in found.items()}
    late = [loss for loss in learn.losses(results, framework, worse) if loss.slower_by > loss.allowed]
    assert {loss.mode for loss in late} == {"both"}


def test_without_gradients_torch_takes_the_order_of_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    order = Order(("triton", "sdpa"), ("sdpa", "triton"), {})
    rule = devices.rule(learn.call_of("torch", workloads.CAUSAL_64)).name
    found = Device("a GPU", "2026-11-22", "", {}, {its: {rule: order} for its in FRAMEWORKS})
    monkeypatch.setattr(measured, "DEVICES", {"9.0": found})
    for framework in FRAMEWORKS:
        call = learn.call_of(framework, workloads.CAUSAL_64)
        assert call.gradient
        assert devices.order(call, "9.0") == ("triton", "sdpa")
    assert devices.order(learn.call_of("torch", workloads.CAUSAL_64._replace(backward=False)), "9.0")[0] == "sdpa"
    with torch.no_grad():
        assert devices.order(learn.call_of("torch", workloads.CAUSAL_64), "9.0")[0] == "sdpa"
    assert learn.call_of("jax", workloads.CAUSAL_64._replace(backward=False)).gradient


JAX_ATTEND = import_module("attend_jax.attend")


def test_where_nothing_is_differentiated_jax_takes_the_order_of_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    call = learn.call_of("jax", workloads.CAUSAL_64)
    order = Order(("blockwise", "einsum"), ("einsum", "blockwise"), {})
    rules = {devices.rule(learn.call_of("jax", load)).name: order for load in (workloads.CAUSAL_64, DOCUMENTS)}
    found = Device("a GPU", "2026-11-22", "", {its: {} for its in FRAMEWORKS}, dict.fromkeys(FRAMEWORKS, rules))
    monkeypatch.setattr(measured, "DEVICES", {"a.b": found})  # which nothing else has asked for
    monkeypatch.setattr(attend_jax.machine, "_CAPABILITY", ["a.b"])
    assert JAX_ATTEND.alone(call, "blockwise") == "einsum"
    assert JAX_ATTEND.alone(call._replace(names=("blockwise",)), "blockwise") == "blockwise"
    assert JAX_ATTEND.alone(call._replace(platform="cpu"), "blockwise") == "blockwise"
    assert JAX_ATTEND.alone(learn.call_of("jax", DOCUMENTS), "blockwise") == "blockwise"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = jax.ShapeDtypeStruct((4, 16, 4096, 64), jnp.bfloat16)
    explanation = attend_jax.explain(x, x, x, is_causal=True)
    assert explanation.chosen == "blockwise"
    assert explanation.notes[-1] == "where nothing is differentiated: einsum"
    assert jax_side.chosen_alone(workloads.CAUSAL_64, "blockwise") == "einsum"


@pytest.mark.parametrize("return_lse", [False, True])
def test_what_is_differentiated_is_computed_by_one_implementation(
    return_lse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both directions by the one, forward alone by the other: here it gives 7."""

    def sevens(call: Any, arrays: Any) -> tuple:
        return tuple(x * 0 + 7 for x in einsum.attend(call, arrays))

    draw = np.random.default_rng(0)
    q, k, v, sinks = (jnp.asarray(draw.standard_normal(n), jnp.float32) for n in ((2, 4, 5, 8),) * 3 + ((4,),))
    mask = jnp.asarray(draw.random((2, 5)) > 0.3)
    asked = {"implementation": "einsum", "return_lse": return_lse, "is_causal": True}

    def loss(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        found = attend_jax.attend(q, k, v, mask, sinks=sinks, **asked)
        return sum((x * jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)).sum() for x in jax.tree.leaves(found))

    ways = (
        lambda f: jax.value_and_grad(f, (0, 1, 2, 3)), lambda f: jax.jit(jax.value_and_grad(f, (0, 1, 2, 3))),
        lambda f: jax.value_and_grad(jax.checkpoint(f), (0, 1, 2, 3)),
        lambda f: lambda *x: jax.tree.map(
            lambda y: y[0], jax.vmap(jax.value_and_grad(f, (0, 1, 2, 3)))(*(y[None] for y in x))
        ),
    )  # fmt: skip
    expected = [way(loss)(q, k, v, sinks) for way in ways]
    monkeypatch.setattr(JAX_ATTEND, "alone", lambda call, name: "rowwise")
    monkeypatch.setattr(jax_table.__globals__["rowwise"], "attend", sevens)
    jax.clear_caches()
    for way, want in zip(ways, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, way(loss)(q, k, v, sinks), want)
    for attend in (attend_jax.attend, jax.jit(attend_jax.attend, static_argnames=(*asked,))):
        for x in jax.tree.leaves(attend(q, k, v, mask, sinks=sinks, **asked)):
            np.testing.assert_array_equal(x, 7)
    jax.clear_caches()


# The rules.


def test_rules_have_names_of_their_own_and_every_call_has_one() -> None:
    assert len({rule.name for rule in devices.RULES}) == len(devices.RULES)
    call = learn.call_of("torch", workloads.CAUSAL_64)
    of_size = {d: devices.rule(call._replace(d=d)).name for d in (64, 72, 96, 128, 256)}
    assert [*of_size.values()] == [*(f"head sizes up to {n}" for n in (64, 96, 96, 128)), devices.RULES[-1].name]
    for device in measured.DEVICES.values():
        for framework in FRAMEWORKS:
            assert set(device.orders[framework]) <= {rule.name for rule in devices.RULES}
            for found in device.orders[framework].values():
                assert set(found.names) <= set(NAMES)


def test_devices_that_were_not_measured_keep_the_safe_order(monkeypatch: pytest.MonkeyPatch) -> None:
    call = learn.call_of("torch", workloads.CAUSAL_64)
    assert devices.order(call, "9.0") is not None
    assert devices.order(call, "7.5") is None
    assert devices.order(call._replace(dtype="float64"), "9.0") is None
    assert devices.order(call._replace(custom=True), "9.0") is None
    monkeypatch.setattr(attend_torch.machine, "_CAPABILITY", ["7.5"])
    assert {entry.name for entry in torch_table(call)} == set(TORCH_ENTRIES)
    note = devices.explained(Explanation("sdpa", ()), torch_table(call), call, "7.5").notes
    assert note == ("order: the safe one, for nothing was measured on compute capability 7.5",)


@EACH_FRAMEWORK
@pytest.mark.parametrize("load", WORKLOADS, ids=lambda load: load.name)
def test_an_order_has_every_implementation_once(
    load: Workload, framework: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And structure does not become a dense mask while a kernel takes it as it is."""
    machine = {"torch": attend_torch.machine, "jax": attend_jax.machine}[framework]
    monkeypatch.setattr(machine, "_CAPABILITY", ["9.0"])
    table = {"torch": torch_table, "jax": jax_table}[framework]
    call = learn.call_of(framework, load)
    names = [entry.name for entry in table(call)]
    assert sorted(names) == sorted(entry.name for entry in table())
    if framework == "torch" and sdpa.makes_mask(call) and sdpa.refusal(call) is None:
        assert names.index("triton") < names.index("sdpa")


def test_explain_says_which_rule_and_what_an_extra_would_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    call = learn.call_of("torch", workloads.SINKS)
    missing = SimpleNamespace(
        unavailable=lambda: 'it needs flash-attn-4 4.0: pip install "attend-twin[fa4]"', refusal=lambda call: None
    )
    table = [Entry("fa4", True, missing), TORCH_ENTRIES["triton"]]
    times = {"sinks, causal": {"fa4": (0.25, 1.0), "triton": (0.5, 2.0)}}
    orders = {"sinks": Order(("fa4", "triton"), ("triton",), times)}
    device = Device("a GPU", "2026-11-22", "", {"torch": {"torch": "2"}}, {"torch": orders})
    monkeypatch.setattr(measured, "DEVICES", {"9.0": device})
    notes = devices.explained(Explanation("triton", ()), table, call, "9.0").notes
    assert notes == (
        "order: fa4, triton, the rule for sinks, from a GPU, 2026-11-22, torch 2",
        'fa4 would come first here: pip install "attend-twin[fa4]"; sinks, causal: 0.25 / 1 ms, and triton 0.5 / 2 ms '
        "(forward / with gradients)",
    )
    alone = devices.explained(Explanation("triton", ()), table[1:], call._replace(gradient=False), "9.0").notes
    assert alone == ("order: triton, the rule for sinks without gradients, from a GPU, 2026-11-22, torch 2",)
    assert devices.explained(Explanation("triton", ()), table, call._replace(names=("triton",)), "9.0").notes == ()
    assert devices.explained(Explanation("triton", ()), table, call._replace(platform="cpu"), "9.0").notes == ()


# What was published.


def published() -> dict[str, Any]:
    return json.loads(report.RESULTS.read_text())


def test_published_results_are_whole() -> None:
    run = published()
    conforms(run)
    assert "H100" in run["machine"]["device"]
    assert {"torch", "triton"} <= set(run["versions"]["torch"])
    assert {"jax", "jaxlib"} <= set(run["versions"]["jax"])
    assert str(Path.home()) + os.sep not in report.RESULTS.read_text()
    for each in run["measurements"]:
        assert len(each["runs"]) >= 5 or each["not_run"] or each["calls"] == 1


def test_page_says_what_the_results_say() -> None:
    """`python -m benchmarks.gpu.report docs/results/gpu-h100.json` renews it."""
    page = (ROOT / "docs" / "benchmarks-gpu.md").read_text()
    assert report.SECTION.findall(page) == [report.section(published())]
    assert (ROOT / "docs" / "benchmarks-gpu.png").stat().st_size < 300_000


def test_orders_are_those_that_the_results_teach() -> None:
    """`python -m benchmarks.gpu.learn` renews them."""
    assert learn.TARGET.read_text() == learn.source(Results(published()))


@EACH_FRAMEWORK
def test_the_order_takes_the_fastest_of_ours(framework: str) -> None:
    """Within 3 % or the spread, at every workload that was measured, in each direction."""
    results = Results(published())
    known = measured.DEVICES["9.0"].orders[framework]
    by_rule = {name: {"forward": order.forward, "both": order.names} for name, order in known.items()}
    found = list(learn.losses(results, framework, by_rule))
    assert {loss.name for loss in found} == {*results.names()}
    assert [loss for loss in found if loss.slower_by > loss.allowed] == []


# The command.


def test_the_command_says_where_the_benchmarks_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[Any] = []

    def record(arguments: list[str], env: dict[str, str]) -> SimpleNamespace:
        ran.append((arguments[1:], env["PYTHONPATH"].split(os.pathsep)[0]))
        return SimpleNamespace(wait=lambda: 3, kill=lambda: None)

    monkeypatch.setattr("attend_shared.command.bench.subprocess.Popen", record)
    result = CliRunner().invoke(attend_command.main, ["bench", "--device", "cuda", "--minutes", "1"])
    assert result.exit_code == 3
    assert ran == [(["-m", "benchmarks.gpu", "--minutes", "1"], str(ROOT))]
    monkeypatch.setattr("attend_shared.command.bench.__file__", str(tmp_path / "a" / "b" / "c" / "d" / "bench.py"))
    result = CliRunner().invoke(attend_command.main, ["bench"])
    assert result.exit_code == 2
    assert "The benchmarks are not installed with the packages. Get a checkout" in result.output


def test_random_slices_stay_inside() -> None:
    for load in random.Random(0).sample([*WORKLOADS], 8):
        part = sliced(load)
        assert 0 <= part.item < load.b
        assert part.heads * load.hk == load.h
        assert 0 <= part.rows < load.i


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_without_a_gpu_nothing_is_measured(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor's times must not be read as a GPU's."""
    from benchmarks.gpu import torch_side

    monkeypatch.setattr(torch_side.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(jax_side.jax, "default_backend", lambda: "cpu")
    name, side = {"torch": ("torch", torch_side), "jax": ("JAX", jax_side)}[framework]
    with pytest.raises(Unsupported, match=f"^{name} finds no GPU$"):
        side.machine()

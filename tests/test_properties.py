"""Laws of attention over random combinations: against the oracle, and of one call against another.

A law turns a problem into another one and says how their results hang together. Both are evaluated, forward and
backward, and may lie as far apart as two results may that both keep to the error budget.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attend_jax.bridge
import attend_torch.bridge
from attend_shared import compare, dtypes, oracle
from attend_shared.cases import Case, random_case
from attend_shared.compare import Outcome
from attend_shared.problems import Problem

BRIDGES: dict[str, Any] = {"torch": attend_torch.bridge, "jax": attend_jax.bridge}
# A JAX example is two compilations. The examples are the same each time: a budget is a rule of thumb, and one
# problem in a thousand is so ill conditioned that an honest float32 result breaks it.
COUNTS = {"torch": 50, "jax": 3}


@pytest.fixture(autouse=True, scope="module")
def compile_fast() -> Any:
    """Each program runs once."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


def mild(case: Case) -> Case:
    """The case with ordinary numbers: logits of hundreds magnify every rounding, and the parity tests have those."""
    return case.replace("normal")


CASES = st.integers(0, 2**32 - 1).map(lambda seed: mild(random_case(np.random.default_rng(seed))))
SEEDS = st.integers(0, 2**32 - 1)


def law(test: Callable[..., None], *frameworks: str) -> Any:
    """Run a test of (framework, case, seed) on random cases, in both frameworks or in those that are named."""

    def run(framework: str) -> None:
        @settings(max_examples=COUNTS[framework], derandomize=True, database=None)
        @given(case=CASES, seed=SEEDS)
        def property_(case: Case, seed: int) -> None:
            test(framework, case, np.random.default_rng(seed))

        property_()

    run.__doc__ = test.__doc__
    return pytest.mark.parametrize("framework", frameworks or list(BRIDGES))(run)


def law_of_meaning(test: Callable[..., None]) -> Any:
    """One of what arguments mean, which is written once for both frameworks: JAX need not compile for it."""
    return law(test, "torch")


def evaluate(framework: str, problem: Problem) -> Outcome:
    return BRIDGES[framework].evaluate(problem, "einsum")


def simple(case: Case) -> Problem:
    """The problem of a case in one form: bhnd, contiguous, nothing poisoned, what has a default made explicit.

    The mask has rank 4, both segment ids are there, lengths and q_offset where they mean something.
    """
    problem = case.replace("bhnd", "contiguous", "poison_none").build()
    given = dict(problem.arguments)
    b, j = given["k"].shape[0], given["k"].shape[2]
    if given.get("mask") is not None and given["mask"].ndim == 2:
        given["mask"] = given["mask"][:, None, None, :]
    if "q_segment_ids" in given or "kv_segment_ids" in given:
        ids = given.get("q_segment_ids"), given.get("kv_segment_ids")
        given["q_segment_ids"] = (ids[1] if ids[0] is None else ids[0]).astype(np.int64)
        given["kv_segment_ids"] = (ids[0] if ids[1] is None else ids[1]).astype(np.int64)
    given["kv_lengths"] = given.get("kv_lengths", np.full(b, j)).astype(np.int64)
    if given.get("is_causal") or given.get("window_size"):
        given.setdefault("q_offset", 0)
    return problem._replace(arguments=given)


def anywhere(case: Case) -> Problem:
    """The simple problem of a case without functions of indices: items and keys may move."""
    return simple(case.replace("score_none", "rule_none"))


def change(problem: Problem, **arguments: Any) -> Problem:
    return problem._replace(arguments=problem.arguments | arguments)


def assert_close(ours: Outcome, theirs: Outcome, problem: Problem) -> None:
    """Two outcomes of one problem, no further apart than twice its budget; infinities and exact zeros alike."""
    for name, budget in compare.budgets(problem).items():
        a, b = (getattr(each, name) if name in ("out", "lse") else each.gradients[name[1:]] for each in (ours, theirs))
        finite = np.isfinite(b)
        np.testing.assert_array_equal(a[~finite], b[~finite], err_msg=name)
        distance = np.abs(np.where(finite, a, 0) - np.where(finite, b, 0))
        assert distance.max(initial=0.0) <= 2 * budget.maximum, f"{name}: {distance.max()} > 2 * {budget.maximum}"
        exact = np.broadcast_to(budget.exact, a.shape)
        assert not a[exact].any() and not b[exact].any(), f"{name}: not exactly 0"


def per_item(given: dict[str, Any], pick: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
    """What has a value for each batch item, picked; what is broadcast over the batch stays."""
    b = given["q"].shape[0]
    changed = {}
    for name, x in given.items():
        if isinstance(x, np.ndarray) and name != "sinks" and x.ndim and len(x) == b:
            changed[name] = pick(x)
    return changed


# Against the oracle.


@law
def test_any_combination_is_what_the_oracle_says(framework: str, case: Case, rng: np.random.Generator) -> None:
    """Layouts, memory and poison too, forward and backward."""
    problem = case.build()
    compare.check(evaluate(framework, problem), problem)


# Of one call against another.


@law_of_meaning
def test_batch_items_do_not_know_of_each_other(framework: str, case: Case, rng: np.random.Generator) -> None:
    """Items in another order give the same results in that order; their common gradients are the same sums."""
    problem = anywhere(case)
    given = {name: x for name, x in problem.arguments.items() if not name.startswith("dropout")}  # b is counted there
    problem = problem._replace(arguments=given)
    order = rng.permutation(len(given["q"]))
    back = np.argsort(order)
    lse = problem.lse_cotangent
    moved = problem._replace(
        arguments=given | per_item(given, lambda x: x[order]),
        out_cotangent=problem.out_cotangent[order],
        lse_cotangent=None if lse is None else lse[order],
    )
    found = evaluate(framework, moved)
    gradients = {name: x if name == "sinks" or len(x) != len(order) else x[back] for name, x in found.gradients.items()}
    found = Outcome(found.out[back], None if found.lse is None else found.lse[back], gradients)
    assert_close(found, evaluate(framework, problem), problem)


@law
def test_keys_that_are_excluded_change_nothing(framework: str, case: Case, rng: np.random.Generator) -> None:
    """Any number behind the end, with NaN in them, whatever mask, bias and ids say of them."""
    problem = anywhere(case)
    given, extra = problem.arguments, int(rng.integers(1, 7))
    b, j = given["k"].shape[0], given["k"].shape[2]

    def grown(x: np.ndarray, axis: int, value: Any) -> np.ndarray:
        shape = tuple(extra if n == axis % x.ndim else size for n, size in enumerate(x.shape))
        return np.concatenate([x, np.broadcast_to(value, shape).astype(x.dtype)], axis)

    wider = {"kv_lengths": np.minimum(given["kv_lengths"], j)}
    wider |= {name: grown(given[name], 2, np.nan) for name in ("k", "v")}
    wider |= {name: grown(given[name], 3, value) for name, value in (("mask", True), ("bias", 1.0))
              if given.get(name) is not None and given[name].shape[3] == j}  # fmt: skip
    if "kv_segment_ids" in given:
        wider["kv_segment_ids"] = grown(given["kv_segment_ids"], 1, given["kv_segment_ids"][:, :1] if j else 1)
    found = evaluate(framework, change(problem, **wider))
    assert not found.gradients["k"][:, :, j:].any() and not found.gradients["v"][:, :, j:].any()
    cut = {name: x[:, :, :j] if name in "kv" else x for name, x in found.gradients.items()}
    if "bias" in wider:
        assert not found.gradients["bias"][..., j:].any()
        cut["bias"] = cut["bias"][..., :j]
    assert b == len(found.out)
    assert_close(found._replace(gradients=cut), evaluate(framework, problem), problem)


@law
def test_keys_in_parts_merge_to_the_whole(framework: str, case: Case, rng: np.random.Generator) -> None:
    """out and lse, whatever excludes keys; test_merge has the gradients."""
    if case.level("bias") == "bias_lowest":  # beside -3e38 an lse has no room for the number of its keys
        case = case.replace("bias_full")
    problem = anywhere(case.replace("lse", "dropout_none"))
    given = problem.arguments
    j = given["k"].shape[2]
    bounds = [0, *sorted(rng.integers(0, j + 1, 2).tolist()), j]
    outs, lses = [], []
    for n, (first, last) in enumerate(itertools.pairwise(bounds)):
        part = {"k": given["k"][:, :, first:last], "v": given["v"][:, :, first:last]}
        part["kv_lengths"] = given["kv_lengths"] - first
        part |= {name: given[name][..., first:last] for name in ("mask", "bias")
                 if given.get(name) is not None and given[name].shape[3] == j}  # fmt: skip
        if "kv_segment_ids" in given:
            part["kv_segment_ids"] = given["kv_segment_ids"][:, first:last]
        if "q_offset" in given:
            part["q_offset"] = np.asarray(given["q_offset"], np.int64) - first
        rest = {name: x for name, x in given.items() if not (name == "sinks" and n)}  # the sink belongs to one part
        found = evaluate(framework, problem._replace(arguments=rest | part, dtypes=without(problem.dtypes, rest)))
        assert found.lse is not None
        outs.append(found.out)
        lses.append(found.lse)
    out, lse = merged(framework, outs, lses)
    whole = evaluate(framework, problem)
    assert_close(Outcome(out, lse, whole.gradients), whole, problem)


def without(names: dict[str, str], given: dict[str, Any]) -> dict[str, str]:
    return {name: dtype for name, dtype in names.items() if name in given}


def merged(framework: str, outs: list[np.ndarray], lses: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Parts in float64, where merging adds no rounding to speak of."""
    if framework == "torch":
        out, lse = attend_torch.merge([torch.from_numpy(x) for x in outs], [torch.from_numpy(x) for x in lses])
        return out.numpy(), lse.numpy()
    with jax.enable_x64(True):
        return tuple(map(np.asarray, attend_jax.merge(outs, lses)))


@law_of_meaning
def test_positions_said_in_other_ways(framework: str, case: Case, rng: np.random.Generator) -> None:
    """causal is a window, lengths are a key mask, ids are a dense mask, q_lengths and all the rest too."""
    problem = simple(case)
    given = problem.arguments
    j = given["k"].shape[2]
    rules = ("mask", "is_causal", "window_size", "q_offset", "q_segment_ids", "kv_segment_ids", "kv_lengths")
    said = {name: x for name, x in given.items() if name not in rules}
    expected = evaluate(framework, problem)

    keys = np.arange(j) < given["kv_lengths"][:, None]  # (b, j)
    pairs = keys[:, None, None, :] if given.get("mask") is None else given["mask"] & keys[:, None, None, :]
    if "q_segment_ids" in given:
        pairs = pairs & (given["q_segment_ids"][:, :, None] == given["kv_segment_ids"][:, None, :])[:, None]
    position = {name: given[name] for name in ("is_causal", "window_size", "q_offset") if name in given}
    as_mask = problem._replace(arguments=said | position | {"mask": pairs})
    assert_close(evaluate(framework, as_mask), expected, problem)

    if position.get("is_causal"):
        left, right = position.get("window_size") or (None, None)
        window = {"window_size": (left, 0 if right is None else min(right, 0)), "is_causal": False}
        assert_close(evaluate(framework, change(problem, **window)), expected, problem)

    everything = oracle.allowed(**without_dropout(given))  # a bias of -inf counts here as well
    as_mask = problem._replace(arguments=said | {"mask": everything})
    assert_close(evaluate(framework, as_mask), expected, problem)


def without_dropout(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in given.items() if not name.startswith("dropout")}


@law_of_meaning
def test_offsets_said_in_other_ways(framework: str, case: Case, rng: np.random.Generator) -> None:
    """An int, an array (), and an array (b,) of one number are one offset."""
    problem = simple(case.replace("causal", "offset_0") if case.level("position") == "anywhere" else case)
    b = problem.arguments["q"].shape[0]
    offset = int(rng.integers(-3, 12))
    expected = evaluate(framework, change(problem, q_offset=offset))
    for other in (np.array(offset), np.full(b, offset, np.int16)):
        assert_close(evaluate(framework, change(problem, q_offset=other)), expected, change(problem, q_offset=offset))


@law_of_meaning
def test_layouts(framework: str, case: Case, rng: np.random.Generator) -> None:
    """bnhd is bhnd with two axes exchanged, in arguments, output and gradients."""
    problem = simple(case)
    turned = change(problem, layout="bnhd", **{name: problem.arguments[name].swapaxes(1, 2).copy() for name in "qkv"})
    found = evaluate(framework, turned._replace(out_cotangent=problem.out_cotangent.swapaxes(1, 2).copy()))
    gradients = {name: x.swapaxes(1, 2) if name in "qkv" else x for name, x in found.gradients.items()}
    found = found._replace(out=found.out.swapaxes(1, 2), gradients=gradients)
    assert_close(found, evaluate(framework, problem), problem)


@law_of_meaning
def test_grouped_heads_are_repeated_heads(framework: str, case: Case, rng: np.random.Generator) -> None:
    """Query head n reads key/value head n // (h // hk), whose gradient is the sum over its readers."""
    problem = simple(case.replace(("heads_grouped", "heads_one")[int(rng.integers(2))]))
    h, hk = problem.arguments["q"].shape[1], problem.arguments["k"].shape[1]
    repeated = change(problem, **{name: problem.arguments[name].repeat(h // hk, 1) for name in "kv"})
    found = evaluate(framework, repeated)
    gradients = dict(found.gradients)
    for name in "kv":
        b, _, j, d = gradients[name].shape
        gradients[name] = gradients[name].reshape(b, hk, h // hk, j, d).sum(2)
    own = compare.budgets(repeated)
    room = compare.budgets(problem)
    expected = evaluate(framework, problem)
    for name in ("out", "lse", "dq", "dbias", "dsinks"):
        if name in room:
            a, b = (getattr(x, name) if name in ("out", "lse") else x.gradients[name[1:]] for x in (found, expected))
            np.testing.assert_allclose(a, b, rtol=0, atol=2 * room[name].maximum, err_msg=name)
    for name in "kv":  # each of the repeated gradients was rounded by itself
        atol = room[f"d{name}"].maximum + h // hk * own[f"d{name}"].maximum
        np.testing.assert_allclose(gradients[name], expected.gradients[name], rtol=0, atol=atol, err_msg=name)


@law_of_meaning
def test_scale_belongs_to_the_product(framework: str, case: Case, rng: np.random.Generator) -> None:
    """Half the scale and twice q, a power of two that rounds nothing, are the same to the bit."""
    problem = simple(case)
    scale = problem.arguments.get("scale", problem.arguments["q"].shape[3] ** -0.5)
    halved = change(problem, q=2 * problem.arguments["q"], scale=scale / 2)
    found, expected = evaluate(framework, halved), evaluate(framework, change(problem, scale=scale))
    np.testing.assert_array_equal(found.out, expected.out)
    if expected.lse is not None:
        np.testing.assert_array_equal(found.lse, expected.lse)
    for name, gradient in expected.gradients.items():
        # Half of a number that float16 only just holds may be rounded.
        factor, tiny = (2, dtypes.TINY[problem.dtypes["q"]]) if name == "q" else (1, 0)
        np.testing.assert_allclose(factor * found.gradients[name], gradient, rtol=0, atol=tiny, err_msg=name)


@pytest.mark.parametrize("framework", BRIDGES)
@pytest.mark.parametrize("bits", [32, 64])
def test_an_unsigned_id_is_no_negative_one_of_the_same_bits(framework: str, bits: int) -> None:
    x, negative = np.ones((1, 1, 1, 2), np.float32), np.array([[-1]], f"int{bits}")
    for q_ids, kv_ids in itertools.product((negative, negative.view(f"uint{bits}")), repeat=2):
        with jax.enable_x64(bits == 64):
            out = BRIDGES[framework].call({"q": x, "k": x, "v": x, "q_segment_ids": q_ids, "kv_segment_ids": kv_ids})
        assert (np.asarray(out) == (q_ids.dtype == kv_ids.dtype)).all()

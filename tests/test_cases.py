"""The case list covers what it claims, its levels mean what their names say, and its arrays are always the same."""

import hashlib
import itertools
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from attend_shared import oracle
from attend_shared.cases import (
    ALONE,
    CASES,
    FEATURES,
    LEVELS,
    PAIRS,
    Case,
    Problem,
    case,
    find,
    random_case,
    select,
)
from attend_shared.covering import Constraint, Space
from attend_shared.dtypes import LARGEST, accumulation, round_to
from attend_shared.factors import CONSTRAINTS, EDGES, FACTORS
from attend_shared.problems import excluded_keys, idle_rules

FACTOR_OF = {level.name: factor.name for factor in FACTORS for level in factor.levels}
PLAIN = {factor.name: factor.levels[0].name for factor in FACTORS}
RARE = ("sinks", "softcap", "score_fn", "mask_fn", "dropout", "lse")  # what few implementations have

Pair = frozenset[str]


@pytest.fixture(scope="module")
def problems() -> dict[Case, Problem]:
    start = time.perf_counter()
    built = {each: each.build() for each in CASES}
    assert time.perf_counter() - start < 60  # one to two seconds where nothing else runs
    return built


def all_pairs() -> set[Pair]:
    """Every two levels of two factors that take part in the covering array."""
    paired = [level.name for level in LEVELS.values() if level.paired]
    return {frozenset(two) for two in itertools.combinations(paired, 2) if FACTOR_OF[two[0]] != FACTOR_OF[two[1]]}


def impossible_pairs() -> dict[Pair, str]:
    """The pairs that a constraint names, with its reason."""
    return {
        frozenset(two): constraint.reason
        for constraint in CONSTRAINTS
        if len(constraint.forbids) == 2
        for two in itertools.product(*constraint.forbids)
    }


def met(cases: Iterable[Case]) -> set[Pair]:
    """The pairs that occur. At a shape where next to nothing happens, only the pairs with that shape count."""
    pairs: set[Pair] = set()
    for each in cases:
        shape = each.level("shape")
        if shape in EDGES:
            pairs |= {frozenset((shape, level)) for level in each.levels if level != shape}
        else:
            pairs |= set(map(frozenset, itertools.combinations(each.levels, 2)))
    return pairs


def arrays_of(problem: Problem) -> dict[str, Any]:
    cotangents = {"out_cotangent": problem.out_cotangent, "lse_cotangent": problem.lse_cotangent}
    tables = {name: x.table for name, x in problem.arguments.items() if name in ("score_fn", "mask_fn")}
    return {name: x for name, x in (problem.arguments | cotangents | tables).items() if isinstance(x, np.ndarray)}


def digest(problem: Problem) -> str:
    """Of every byte and every option."""
    total = hashlib.sha256()
    for name, value in sorted((problem.arguments | problem._asdict()).items()):
        if name in ("score_fn", "mask_fn"):
            name, value = f"{name} {value.kind}", value.table
        if isinstance(value, np.ndarray):
            total.update(f"{name} {value.dtype.str} {value.shape}".encode() + value.tobytes())
        elif name != "arguments":
            total.update(f"{name} {value!r}".encode())
    return total.hexdigest()


# The list.


def test_size_and_names() -> None:
    names = [each.name for each in CASES]
    assert 200 <= len(names) <= 310
    assert (*ALONE, *PAIRS) == CASES
    assert len(set(names)) == len(names)
    for each in CASES:
        assert re.fullmatch(r"[a-z0-9_]+(-[a-z0-9_]+)+", each.name)
        assert find(each.name) == each == case(*each.levels)
        assert str(each) == each.name


def test_every_level_stands_alone() -> None:
    for level in LEVELS.values():
        others = {name for name in case(*level.needs, level.name).levels if name not in PLAIN.values()}
        assert others <= {*level.needs, level.name}
        assert case(*level.needs, level.name) in ALONE


def test_every_pair_meets_or_is_named_as_impossible() -> None:
    impossible, found = impossible_pairs(), met(CASES)
    assert not found & impossible.keys()
    assert all_pairs() == (found & all_pairs()) | (impossible.keys() & all_pairs())
    assert all(len(reason) > 20 for reason in impossible.values())


def test_every_pair_meets_without_what_few_implementations_have() -> None:
    plain = {PLAIN[factor] for factor in RARE}
    usual = {two for two in all_pairs() if all(FACTOR_OF[level] not in RARE for level in two) and not two & set(EDGES)}
    found = met(each for each in CASES if plain <= set(each.levels))
    assert usual <= found | impossible_pairs().keys()


def test_a_missing_pair_is_noticed() -> None:
    """The test of the test: take out the cases with one pair, and that pair is missed."""
    pair = frozenset(("causal", "mask_dense"))
    missing = all_pairs() - met(each for each in CASES if not pair <= set(each.levels)) - impossible_pairs().keys()
    assert missing >= {pair}


def test_a_pair_at_an_edge_does_not_count() -> None:
    edge = case("no_key", "mask_dense", "bias_full")
    assert frozenset(("no_key", "bias_full")) in met([edge])
    assert frozenset(("mask_dense", "bias_full")) not in met([edge])


def test_clauses_and_features() -> None:
    """Every clause about a call's meaning has a factor; 3 and 9 are about combinations, 18 to 20 not about meaning."""
    assert {clause for factor in FACTORS for clause in factor.clauses} == set(range(1, 22)) - {3, 9, 18, 19, 20}
    assert "empty rows" in FEATURES
    counts = {feature: sum(feature in each.features for each in CASES) for feature in FEATURES}
    assert min(counts.values()) >= 5, counts


def test_lists_are_the_same_in_every_process() -> None:
    script = "from attend_shared.cases import CASES; import sys; sys.stdout.write(repr(CASES))"
    env = {"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(sys.path)}
    answer = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert answer.stdout == repr(CASES)


# The covering array.


def test_cover_finds_every_pair_of_a_space_by_brute_force() -> None:
    """Every pair that any allowed case of the full product has, and no forbidden combination of three."""
    factors = (("a0", "a1", "a2"), ("b0", "b1"), ("c0", "c1", "c2"), ("d0", "d1"))
    forbids = (
        (frozenset({"a1", "a2"}), frozenset({"b1"}), frozenset({"c2"})),
        (frozenset({"c0", "c1"}), frozenset({"d1"})),
        (frozenset({"a0"}), frozenset({"c2"})),
    )
    space = Space(factors, [Constraint("for this test", each) for each in forbids])

    def allowed(levels: tuple[str, ...]) -> bool:
        return not any(all(set(levels) & some for some in each) for each in forbids)

    def pairs(cases: Iterable[tuple[str, ...]]) -> set[Pair]:
        return {frozenset(two) for each in cases for two in itertools.combinations(each, 2)}

    product = [each for each in itertools.product(*factors) if allowed(each)]
    for seed in range(5):
        cases = space.cover(space.pairs(), seed=seed)
        assert all(map(allowed, cases))
        assert pairs(cases) == pairs(product)
        assert len(cases) < len(product)
        assert cases == space.cover(space.pairs(), seed=seed)
    for two in itertools.combinations(space.names, 2):
        assert space.feasible(two) == (frozenset(two) in pairs(product))


def test_a_space_needs_unique_names() -> None:
    with pytest.raises(ValueError, match="occur once"):
        Space([("a", "b"), ("b", "c")])


# What a level means.

Check = Callable[[dict[str, Any], Problem, Case], Any]


def _mask(*letters: str) -> Check:
    """A mask with these axes, each a letter of a size or 1, and with True and False in it."""

    def check(a: dict[str, Any], _: Problem, each: Case) -> bool:
        sizes = each.sizes._asdict() | {"1": 1}
        some = a["mask"].all() < a["mask"].any()
        return a["mask"].dtype == bool and some and a["mask"].shape == tuple(sizes[letter] for letter in letters)

    return check


def _bias(*letters: str) -> Check:
    def check(a: dict[str, Any], _: Problem, each: Case) -> bool:
        sizes = each.sizes._asdict() | {"1": 1}
        return np.isfinite(a["bias"]).all() and a["bias"].shape == tuple(sizes[letter] for letter in letters)

    return check


def _window(left: bool, right: int | bool, causal: bool = False) -> Check:
    """Whether there is a bound on the left, and one on the right or which."""

    def check(a: dict[str, Any], _: Problem, __: Case) -> bool:
        low, high = a["window_size"]
        matches = high == right if type(right) is int else (high is not None and high > 0) == right
        return (low is not None and low > 0) == left and matches and a.get("is_causal", False) == causal

    return check


def _logits(test: Callable[[np.ndarray, np.ndarray], Any]) -> Check:
    """Something about the logits at the default scale, (b, h, i, j), and v; heads are equal."""
    return lambda a, _, each: test(np.einsum("bhid,bhjd->bhij", a["q"], a["k"]) * each.sizes.d**-0.5, a["v"])


def _score(test: Callable[[np.ndarray, Any], Any]) -> Check:
    """Something about the table of a score_fn, which changes every score."""

    def check(a: dict[str, Any], problem: Problem, each: Case) -> bool:
        sizes, function = each.sizes, a["score_fn"]
        score = np.random.default_rng(0).standard_normal((sizes.b, sizes.h, sizes.i, sizes.j))
        changed = function(score, *np.ogrid[: sizes.b, : sizes.h, : sizes.i, : sizes.j]) != score
        known = function.table.dtype == np.float32 and problem.dtypes["table"] == "float32"
        return known and changed.mean() > 0.9 and test(function.table, sizes)

    return check


def _rule(*letters: str) -> Check:
    """A mask_fn with these axes, each a letter of a size or 1, and with True and False in it."""

    def check(a: dict[str, Any], _: Problem, each: Case) -> bool:
        b, h, i, j, _ = each.sizes
        mask = a["mask_fn"](*np.ogrid[:b, :h, :i, :j])
        sizes = each.sizes._asdict() | {"1": 1}
        return mask.all() < mask.any() and mask.shape == tuple(sizes[letter] for letter in letters)

    return check


MEANING: dict[str, Check] = {
    "mask_key": _mask("b", "j"),
    "mask_key_shared": _mask("1", "j"),
    "mask_key_rank4": _mask("b", "1", "1", "j"),
    "mask_left_padding": lambda a, *_: (np.diff(a["mask"].astype(int)) >= 0).all() and not a["mask"].all(),
    "mask_empty_item": lambda a, *_: a["mask"].ndim == 2 and a["mask"][:-1].any(1).all() and not a["mask"][-1].any(),
    "mask_head": _mask("1", "h", "1", "1"),
    "mask_head_key": _mask("b", "h", "1", "j"),
    "mask_rows": _mask("b", "1", "i", "1"),
    "mask_dense": _mask("b", "h", "i", "j"),
    "mask_dense_shared": _mask("1", "1", "i", "j"),
    "mask_empty_rows": lambda a, *_: not a["mask"].any(-1).all() and a["mask"].any(-1).any(),
    "bias_full": _bias("b", "h", "i", "j"),
    "bias_over_b": _bias("1", "h", "i", "j"),
    "bias_over_h": _bias("b", "1", "i", "j"),
    "bias_over_i": _bias("b", "h", "1", "j"),
    "bias_over_j": _bias("b", "h", "i", "1"),
    "bias_one": _bias("1", "1", "1", "1"),
    "bias_inf": lambda a, *_: np.isneginf(a["bias"]).any() and not np.isneginf(a["bias"]).all(-1).any(),
    "bias_inf_rows": lambda a, *_: 0 < np.isneginf(a["bias"]).all(-1).mean() < np.isneginf(a["bias"]).mean() < 0.5,
    "bias_lowest": lambda a, p, _: (
        0 < (a["bias"] == -LARGEST[p.dtypes["bias"]]).all(-1).mean() < 0.5 and np.isfinite(a["bias"]).all()
    ),
    "bias_float32": lambda _, p, __: p.dtypes["bias"] == "float32" != p.dtypes["q"],
    "bias_other": lambda _, p, __: p.dtypes["bias"] not in ("float32", p.dtypes["q"]),
    "causal": lambda a, *_: a["is_causal"] is True and "window_size" not in a,
    "window": _window(True, True),
    "window_left": _window(True, False),
    "window_right": _window(False, True),
    "window_self": _window(True, 0),
    "window_causal": _window(True, True, causal=True),
    "window_zero": lambda a, *_: a["window_size"] == (0, 0),
    "window_open": lambda a, *_: a["window_size"] == (None, None),
    "offset_0": lambda a, *_: a["q_offset"] == 0 and type(a["q_offset"]) is int,
    "offset_end": lambda a, _, each: a["q_offset"] == each.sizes.j - each.sizes.i and type(a["q_offset"]) is int,
    "offset_scalar": lambda a, _, each: (
        a["q_offset"].shape == () and a["q_offset"] not in (0, each.sizes.j - each.sizes.i)
    ),
    "offset_items": lambda a, *_: (
        a["q_offset"].shape == (3,) == np.unique(a["q_offset"]).shape and a["q_offset"].min() < 0
    ),
    "offset_far": lambda a, *_: {2**31 - 1, -(2**31)} < set(a["q_offset"].tolist()) and a["q_offset"].dtype == np.int32,
    "offset_int": lambda a, *_: a["q_offset"] < 0,
    "offset_huge": lambda a, *_: a["q_offset"] > 2**32 and not oracle.allowed(**a).any(),
    "offset_idle": lambda a, *_: a["q_offset"].shape == (3,) and oracle.allowed(**a).all(),
    "segments_both": lambda a, *_: a["q_segment_ids"].ndim == a["kv_segment_ids"].ndim == 2,
    "segments_q": lambda a, *_: "q_segment_ids" in a and "kv_segment_ids" not in a,
    "segments_kv": lambda a, *_: "kv_segment_ids" in a and "q_segment_ids" not in a,
    "segments_alien": lambda a, *_: all(
        set(x.tolist()) - set(y.tolist()) and set(y.tolist()) - set(x.tolist())
        for x, y in zip(a["q_segment_ids"], a["kv_segment_ids"], strict=True)
    ),
    "segments_negative": lambda a, *_: a["q_segment_ids"].min() < 0 and a["kv_segment_ids"].dtype == np.int8,
    "segments_mixed": lambda a, *_: (a["q_segment_ids"].dtype, a["kv_segment_ids"].dtype) == (np.uint8, np.int64),
    "lengths_kv": lambda a, *_: a["kv_lengths"].shape == (3,) and "q_lengths" not in a,
    "lengths_q": lambda a, *_: a["q_lengths"].shape == (3,) and "kv_lengths" not in a,
    "lengths_both": lambda a, *_: a["kv_lengths"].shape == (3,) == a["q_lengths"].shape,
    "lengths_outside": lambda a, _, each: (
        {0, -3} < {*a["q_lengths"].tolist(), *a["kv_lengths"].tolist()}
        and a["kv_lengths"].max() > each.sizes.j
        and a["q_lengths"].max() > each.sizes.i
    ),
    "lengths_mixed": lambda a, *_: (a["q_lengths"].dtype, a["kv_lengths"].dtype) == (np.uint8, np.int64),
    "sinks_own": lambda a, p, _: np.isfinite(a["sinks"]).all() and p.dtypes["sinks"] == p.dtypes["q"],
    "sinks_float32": lambda _, p, __: p.dtypes["sinks"] == "float32" != p.dtypes["q"],
    "sinks_other": lambda _, p, __: p.dtypes["sinks"] not in ("float32", p.dtypes["q"]),
    "sinks_inf": lambda a, *_: np.isneginf(a["sinks"]).sum() == 1,
    "softcap_2": lambda a, *_: a["softcap"] == 2.0,
    "softcap_30": lambda a, *_: a["softcap"] == 30.0,
    "scale_0": lambda a, *_: a["scale"] == 0.0,
    "scale_negative": lambda a, *_: a["scale"] < 0,
    "scale_10": lambda a, *_: a["scale"] == 10.0,
    "scale_tiny": lambda a, *_: a["scale"] == 0.001,
    "scale_int": lambda a, *_: a["scale"] == 1 and type(a["scale"]) is int,
    "score_relative": _score(lambda table, sizes: table.shape[0] == sizes.h and table.shape[1] % 2 == 1),
    "score_alibi": _score(lambda table, sizes: table.shape == (sizes.h,) and table.min() > 0),
    "score_temperature": _score(lambda table, sizes: table.shape == (sizes.b, sizes.h)),
    "score_bound": _score(lambda table, sizes: table.shape == (sizes.h,) and table.min() > 0),
    "rule_document": _rule("b", "1", "i", "j"),
    "rule_near": _rule("1", "h", "i", "j"),
    "rule_prefix": _rule("b", "1", "i", "j"),
    "rule_rows": lambda a, p, each: _rule("b", "1", "i", "1")(a, p, each) and not oracle.allowed(**a).any(-1).all(),
    "dropout_tenth": lambda a, *_: (
        a["dropout"] == 0.1 and type(a["dropout_seed"]) is int and a["dropout_seed"] >= 2**32
    ),
    "dropout_half": lambda a, *_: a["dropout"] == 0.5 and a["dropout_seed"].dtype == np.uint32 and a["dropout_seed"][1],
    "dropout_most": lambda a, *_: a["dropout"] == 0.75 and a["dropout_seed"] == 2**64 - 1,
    "dropout_unused": lambda a, *_: "dropout" not in a and "dropout_seed" in a,
    "heads_grouped": lambda a, *_: a["q"].shape[1] == 4 and a["k"].shape[1] == 2,
    "heads_one": lambda a, *_: a["q"].shape[1] == 4 and a["k"].shape[1] == 1,
    "value_smaller": lambda a, *_: a["v"].shape[3] < a["q"].shape[3],
    "value_larger": lambda a, *_: a["v"].shape[3] > a["q"].shape[3],
    "lse": lambda _, p, __: p.lse_cotangent is not None and p.lse_cotangent.all(),
    "bnhd": lambda a, _, each: a["layout"] == "bnhd" and a["q"].shape[1:3] == (each.sizes.i, each.sizes.h),
    "strided": lambda _, p, __: p.memory == "strided",
    "expanded": lambda a, p, _: (
        p.memory == "expanded" and (a["k"] == a["k"][:1]).all() and (a["v"] == a["v"][:1]).all()
    ),
    "poison_nan": lambda a, *_: np.isnan(a["k"]).any() and np.isnan(a["v"]).any() and np.isfinite(a["q"]).all(),
    "poison_inf": lambda a, *_: {-np.inf, np.inf} < set(a["k"].ravel().tolist()) and not np.isnan(a["v"]).any(),
    "poison_rows": lambda a, p, _: np.isnan(a["q"]).any() and np.isinf(p.out_cotangent).any(),
    "large": _logits(lambda s, _: s.std() > 15 and abs(s.mean()) < 3),
    "negative": _logits(lambda s, _: s.max() < -88),  # the float32 exponential of each is 0 or subnormal
    "constant": _logits(lambda s, v: s.std() < 0.1 * abs(s.mean()) and v.std() < 0.1 * v.mean()),
    "activations": _logits(lambda s, v: s[..., 0].mean() > s[..., 1:].mean() and np.abs(v).max() > 3 * v.std()),
}


def test_every_level_is_described() -> None:
    assert list(MEANING) == [n for n in LEVELS if FACTOR_OF[n] not in ("shape", "dtype") and n not in PLAIN.values()]


@pytest.mark.parametrize("level", MEANING)
def test_a_level_means_what_it_says(level: str) -> None:
    each = case(*LEVELS[level].needs, level)
    problem = each.build()
    assert MEANING[level](problem.arguments, problem, each)


@pytest.mark.parametrize(
    ("shape", "holds"),
    [
        ("square", lambda s: s.i == s.j),
        ("wide", lambda s: 1 < s.i < s.j),
        ("tall", lambda s: s.i > s.j > 1),
        ("decode", lambda s: s.i == 1 < s.j),
        ("items_as_queries", lambda s: s.b == s.i != s.j),
        ("heads_as_queries", lambda s: s.h == s.i == s.j),
        ("tiles_square", lambda s: s.i == s.j and s.i % 128 == 64),
        ("tiles_wide", lambda s: s.i % 64 == s.j % 64 == 1 and s.i < s.j),
        ("tiles_tall", lambda s: s.i % 128 == 1 and s.i > s.j),
        ("tiles_long", lambda s: s.i >= 128 and s.j == 2048 and s.d == 128),
        ("tiles_deep", lambda s: s.i > 16 and s.d == 64),
        ("one_key", lambda s: s.j == 1 < s.i),
        ("no_query", lambda s: s.i == 0 < s.j),
        ("no_key", lambda s: s.j == 0 < s.i),
        ("no_item", lambda s: s.b == 0 < s.i),
    ],
)
def test_a_shape_is_what_it_says(shape: str, holds: Callable[[Any], bool]) -> None:
    assert holds(case(shape).sizes)


def test_a_plain_case_has_nothing_else() -> None:
    problem = case().build()
    assert set(problem.arguments) == {"q", "k", "v"} == set(problem.dtypes)
    assert problem.lse_cotangent is None
    assert problem.memory == "contiguous"


# The arrays.


def test_shapes_and_dtypes(problems: dict[Case, Problem]) -> None:
    for each, (a, dtypes, out_cotangent, lse_cotangent, memory) in problems.items():
        b, h, i, j, d = each.sizes
        hk = {"heads_equal": h, "heads_grouped": 2, "heads_one": 1}[each.level("heads")]
        dv = {"value_equal": d, "value_smaller": d // 2, "value_larger": d + 8}[each.level("value size")]
        turn = (lambda *s: (s[0], s[2], s[1], s[3])) if each.level("layout") == "bnhd" else (lambda *s: s)
        assert a["q"].shape == turn(b, h, i, d), each
        assert a["k"].shape == turn(b, hk, j, d), each
        assert a["v"].shape == turn(b, hk, j, dv), each
        assert out_cotangent.shape == turn(b, h, i, dv), each
        assert h % hk == 0
        assert (lse_cotangent is None) == (each.level("lse") == "lse_none")
        assert lse_cotangent is None or lse_cotangent.shape == (b, h, i), each
        assert memory == each.level("memory")
        assert dtypes["q"] == dtypes["k"] == dtypes["v"] == each.level("dtype")
        given = a | ({"table": a["score_fn"].table} if "score_fn" in a else {})
        assert set(dtypes) == {"q", "k", "v", "bias", "sinks", "table"} & set(given), each
        floats = {name: (given[name], dtype) for name, dtype in dtypes.items()} | {"out": (out_cotangent, dtypes["q"])}
        if lse_cotangent is not None:
            floats["lse"] = lse_cotangent, accumulation(dtypes["q"])
        for name, (x, dtype) in floats.items():
            assert x.dtype == (np.float64 if dtype == "float64" else np.float32), (each, name)
            assert x.flags.c_contiguous, (each, name)
            np.testing.assert_array_equal(x, round_to(x, dtype), err_msg=f"{each} {name}")
        for name in ("mask", "bias"):
            if name in a and a[name].ndim == 4:
                assert all(size in (1, full) for size, full in zip(a[name].shape, (b, h, i, j), strict=True)), each
        for name in {"q_segment_ids", "kv_segment_ids", "q_lengths", "kv_lengths"} & set(a):
            assert a[name].shape == {"q_segment_ids": (b, i), "kv_segment_ids": (b, j)}.get(name, (b,)), each
            assert np.issubdtype(a[name].dtype, np.integer)


def test_poison_lies_only_where_nothing_may_leak_from(problems: dict[Case, Problem]) -> None:
    for each, (a, _, out_cotangent, lse_cotangent, _) in problems.items():
        poison, turned = each.level("poison"), each.level("layout") == "bnhd"
        q, k, v, cotangent = (x.swapaxes(1, 2) if turned else x for x in (a["q"], a["k"], a["v"], out_cotangent))
        for name in ("k", "v"):
            bad = ~np.isfinite({"k": k, "v": v}[name]).all((1, 3))  # (b, j)
            assert bad.any() == (poison in ("poison_nan", "poison_inf")), (each, name)
            for item, key in np.argwhere(bad):
                assert is_excluded(a, item, key), (each, name, item, key)
        rows = ~np.isfinite(q).all((1, 3)) | ~np.isfinite(cotangent).all((1, 3))
        if lse_cotangent is not None:
            rows |= ~np.isfinite(lse_cotangent).all(1)
        assert rows.any() == (poison == "poison_rows"), each
        for item, row in np.argwhere(rows):
            assert row >= a["q_lengths"][item], (each, item, row)
        for name in {"bias", "sinks"} & set(a):
            assert not np.isnan(a[name]).any() and not np.isposinf(a[name]).any(), each


def is_excluded(a: dict[str, Any], item: int, key: int) -> bool:
    """Whether one key is excluded for its whole item by one of the three means that the promise names."""
    by_mask = by_length = by_segment = False
    if "mask" in a:
        mask = a["mask"]
        if mask.ndim == 2:
            by_mask = not mask[item % len(mask), key]
        elif mask.shape[1] == mask.shape[2] == 1:
            by_mask = not mask[item % len(mask), 0, 0, key % mask.shape[3]]
    if "kv_lengths" in a:
        by_length = key >= a["kv_lengths"][item]
    if "q_segment_ids" in a and "kv_segment_ids" in a:
        by_segment = a["kv_segment_ids"][item, key] not in a["q_segment_ids"][item]
    return bool(by_mask or by_length or by_segment)


def test_excluded_keys_one_by_one(problems: dict[Case, Problem]) -> None:
    for each, problem in problems.items():
        if each.level("shape").startswith("tiles"):
            continue
        keys = excluded_keys(problem.arguments)
        assert keys.shape == (each.sizes.b, each.sizes.j)
        for item, key in np.ndindex(keys.shape):
            assert keys[item, key] == is_excluded(problem.arguments, item, key), (each, item, key)


def test_expanded_items_are_one(problems: dict[Case, Problem]) -> None:
    for each, problem in problems.items():
        if each.level("memory") == "expanded":
            for name in ("k", "v"):
                x = problem.arguments[name]
                np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape), err_msg=each.name)


def test_rules_leave_something_and_rule_something_out(problems: dict[Case, Problem]) -> None:
    """That two levels occur in one case is not enough: both must have an effect there, nearly always."""
    rules = {"mask": "mask", "bias": "bias", "window_size": "position", "is_causal": "position",
             "q_segment_ids": "segments", "kv_segment_ids": "segments", "q_lengths": "lengths",
             "kv_lengths": "lengths", "mask_fn": "mask_fn"}  # fmt: skip
    busy: set[Pair] = set()
    for each, problem in problems.items():
        if each.level("shape") in EDGES:
            continue
        left = oracle.allowed(**problem.arguments).sum(-1)
        # Some query has a choice, unless its position alone leaves it none.
        if "offset_huge" not in each.levels and each.level("position") != "window_zero":
            assert left.max() >= (1 if each.sizes.i == 1 else 2), each
        assert ("empty rows" not in each.features) or left.min() == 0, each
        idle = {rules.get(name, "") for name in idle_rules(problem.arguments)}
        if "position" in idle:
            idle.add("offset")
        levels = [level for level in each.levels if FACTOR_OF[level] not in idle]
        busy |= set(map(frozenset, itertools.combinations(levels, 2)))
    wanted = {two for two in all_pairs() - impossible_pairs().keys() if not two & set(EDGES)}
    silent = sorted(map(sorted, wanted - busy))
    assert len(silent) <= 0.01 * len(wanted), silent


def test_nothing_overflows(problems: dict[Case, Problem]) -> None:
    """The oracle's answers are finite, and those in float16 stay far from its largest number, 65504."""
    for each, problem in problems.items():
        answer = oracle.evaluate(problem)
        for name, x in {"out": answer.out, **answer.gradients}.items():
            assert np.isfinite(x).all(), (each, name)
            if problem.dtypes.get(name, problem.dtypes["q"]) == "float16":
                assert np.abs(x).max(initial=0) < 4096, (each, name)


# The same each time.

PINNED = {
    "square-float32": "d6d2c2106e6a7bd36ca5769e069d45ef72311fd364ae154877e3a2f7f311da31",
    "wide-bfloat16-mask_key-causal-offset_items-segments_alien-lengths_both-lse-bnhd-poison_nan": (
        "b56e87b94b7f83bbb3bfa25c476749d080f829617ff70a312117806fa96e3d2c"
    ),
    "tiles_wide-float16-bias_inf_rows-sinks_inf-dropout_half-heads_grouped-expanded": (
        "09df1c4d7368c9ecb3819b14b327bc3163d125b200dfeabf2eb1ed1496791b63"
    ),
}


def test_two_builds_are_equal(problems: dict[Case, Problem]) -> None:
    for each, problem in problems.items():
        again = each.build()
        assert digest(again) == digest(problem), each
        for name, x in arrays_of(again).items():
            assert not np.shares_memory(x, arrays_of(problem)[name]), (each, name)


def test_parts_do_not_shift_each_other() -> None:
    """q, k and v of a case depend on its name alone, and two names give two problems."""
    one, two = case("causal").build(), case("window").build()
    assert not np.array_equal(one.arguments["q"], two.arguments["q"])
    assert len({digest(each.build()) for each in CASES[:40]}) == 40


@pytest.mark.parametrize("name", PINNED)
def test_pinned(name: str) -> None:
    """A change here changes what every published figure was measured on."""
    assert find(name).name == name
    assert digest(find(name).build()) == PINNED[name]


# Finding cases.


def test_select() -> None:
    assert select("") == CASES
    assert select("no such case") == ()
    chosen = select("float16 causal !bfloat16 !window")
    assert chosen
    assert all(each.level("dtype") == "float16" and each.level("position") == "causal" for each in chosen)
    assert {each.level("heads") for each in select("grouped")} == {"heads_grouped", "heads_one"}  # by feature


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (("causal", "cuasal"), "levels: expected names from attend_shared.factors, got 'cuasal'. Did you mean causal?"),
        (("nosuch",), "levels: expected names from attend_shared.factors, got 'nosuch'. They stand in FACTORS there."),
        ((3,), "levels: expected names from attend_shared.factors, got 3. They stand in FACTORS there."),
        (("causal", "window"), "levels: expected one for position, got causal and window"),
        (
            ("wide", "segments_q"),
            "levels: segments_q, wide cannot meet: one array of ids stands for both sides only where",
        ),
        (
            ("poison_nan", "mask_dense"),
            "keys are poisoned only where a key mask, a length or a segment id excludes them",
        ),
        (("poison_nan", "mask_key", "expanded"), "poisoned only where all items exclude them"),
    ],
)
def test_wrong_levels(levels: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        case(*levels)


def test_replace() -> None:
    each = case("wide", "bfloat16", "causal", "offset_end")
    assert each.replace("float16", "mask_key").name == "wide-float16-mask_key-causal-offset_end"
    with pytest.raises(ValueError, match="an offset changes nothing"):
        each.replace("anywhere")


def test_random_cases_can_be_and_reach_every_level() -> None:
    rng = np.random.default_rng(0)
    cases = [random_case(rng) for _ in range(1500)]
    for each in cases:
        assert case(*each.levels) == each == find(each.name)
    reached = {level for each in cases for level in each.levels}
    assert LEVELS.keys() - reached == {"tiles_square", "tiles_wide", "tiles_tall", "tiles_long", "tiles_deep"}
    assert len(set(cases)) > 1400
    for each in cases[:60]:
        assert digest(each.build()) == digest(find(each.name).build())
        assert np.isfinite(oracle.evaluate(each.build()).out).all(), each

"""The oracle against plain loops, its gradients against differences, and what a formula leaves to the reader."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest

from attend_shared import oracle, philox

GIVEN = ("q", "k", "v", "bias", "sinks")  # what has a gradient

FEATURES = (
    "mask_key", "mask_key_shared", "mask_rows", "mask_dense", "causal", "window", "window_left", "window_right",
    "segments", "segments_one", "q_lengths", "kv_lengths", "bias", "bias_key", "bias_head", "bias_inf", "sinks",
    "sinks_inf", "softcap", "scale", "scale_negative", "dropout", "grouped", "one_head", "values", "bnhd", "wide",
    "tall",
)  # fmt: skip
SHAPES = ("wide", "tall")
EXCLUSIVE = (
    {"mask_key", "mask_key_shared", "mask_rows", "mask_dense"},
    {"window", "window_left", "window_right"},
    {"segments", "segments_one"},
    {"bias", "bias_key", "bias_head", "bias_inf"},
    {"sinks", "sinks_inf"},
    {"scale", "scale_negative"},
    {"grouped", "one_head"},
    {"wide", "tall"},
    {"segments_one", "wide", "tall"},
)


def can_meet(names):
    return all(len(group & set(names)) < 2 for group in EXCLUSIVE)


def build(*names, seed=0):
    """Arguments of a small call with these features, and cotangents for it."""
    assert set(names) <= set(FEATURES)
    rng = np.random.default_rng([seed, *(FEATURES.index(name) for name in sorted(names))])
    b, h, i, j, d = 2, 4, 5, 5, 3
    i, j = (4, 7) if "wide" in names else (7, 4) if "tall" in names else (i, j)
    hk = 2 if "grouped" in names else 1 if "one_head" in names else h
    dv = 5 if "values" in names else d
    given = {name: rng.standard_normal(shape) for name, shape in
             (("q", (b, h, i, d)), ("k", (b, hk, j, d)), ("v", (b, hk, j, dv)))}  # fmt: skip
    dout, dlse = rng.standard_normal((b, h, i, dv)), rng.standard_normal((b, h, i))
    for name in names:
        match name:
            case "mask_key" | "mask_key_shared":
                given["mask"] = rng.random((b if name == "mask_key" else 1, j)) < 0.7
            case "mask_rows" | "mask_dense":
                given["mask"] = rng.random((b, 1, i, 1) if name == "mask_rows" else (b, h, i, j)) < 0.7
            case "causal":
                given["is_causal"] = True
            case "window" | "window_left" | "window_right":
                given["window_size"] = {"window": (2, 1), "window_left": (1, None), "window_right": (None, 0)}[name]
            case "segments" | "segments_one":
                given["q_segment_ids"] = rng.integers(0, 2, (b, i))
                if name == "segments":
                    given["kv_segment_ids"] = rng.integers(0, 3, (b, j))
            case "q_lengths":
                given["q_lengths"] = np.array([i - 2, i + 3])
            case "kv_lengths":
                given["kv_lengths"] = np.array([-1, j - 1])
            case "bias" | "bias_key" | "bias_head" | "bias_inf":
                shape = {"bias_key": (b, 1, 1, j), "bias_head": (1, h, 1, 1)}.get(name, (b, h, i, j))
                given["bias"] = rng.standard_normal(shape)
                if name == "bias_inf":
                    given["bias"][rng.random(shape) < 0.3] = -np.inf
                    given["bias"][0, 1, 2] = -np.inf
            case "sinks" | "sinks_inf":
                given["sinks"] = rng.standard_normal(h)
                if name == "sinks_inf":
                    given["sinks"][1] = -np.inf
            case "softcap":
                given["softcap"] = 0.8
            case "scale" | "scale_negative":
                given["scale"] = 1.3 if name == "scale" else -0.4
            case "dropout":
                given |= {"dropout": 0.3, "dropout_seed": seed + 2**33}
    if set(names) & set(SHAPES) and ("is_causal" in given or "window_size" in given):
        given["q_offset"] = np.array([j - i, 1])
    if "bnhd" in names:
        given |= {name: given[name].swapaxes(1, 2) for name in "qkv"} | {"layout": "bnhd"}
        dout = dout.swapaxes(1, 2)
    return given, dout, dlse


def naive(
    q, k, v, mask=None, *, bias=None, is_causal=False, q_offset=0, window_size=(None, None), q_segment_ids=None,
    kv_segment_ids=None, q_lengths=None, kv_lengths=None, sinks=None, softcap=None, scale=None, dropout=0.0,
    dropout_seed=None, layout="bhnd",
):  # fmt: skip
    """The formula, number by number, for q_offset in all its forms but None with i != j."""
    if layout == "bnhd":
        q, k, v = q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)
    (b, h, i, d), (_, hk, j, dv) = q.shape, v.shape
    if mask is not None:
        mask = np.broadcast_to(mask.reshape(-1, 1, 1, j) if mask.ndim == 2 else mask, (b, h, i, j))
    bias = np.zeros((b, h, i, j)) if bias is None else np.broadcast_to(bias, (b, h, i, j))
    q_ids = q_segment_ids if q_segment_ids is not None else kv_segment_ids
    kv_ids = kv_segment_ids if kv_segment_ids is not None else q_segment_ids
    keep = philox.keep_mask(dropout_seed, (b, h, i, j), dropout) if dropout else np.ones((b, h, i, j))
    scale = 1 / math.sqrt(d) if scale is None else scale
    left, right = window_size
    out, lse, p = np.zeros((b, h, i, dv)), np.zeros((b, h, i)), np.zeros((b, h, i, j))
    for item, head, t in itertools.product(range(b), range(h), range(i)):
        offset = int(np.broadcast_to(q_offset, (b,))[item])
        total = math.exp(sinks[head]) if sinks is not None else 0.0
        exponentials = {}
        for key in range(j):
            if mask is not None and not mask[item, head, t, key]:
                continue
            if is_causal and not key <= t + offset:
                continue
            if left is not None and not t + offset - left <= key:
                continue
            if right is not None and not key <= t + offset + right:
                continue
            if q_ids is not None and q_ids[item, t] != kv_ids[item, key]:
                continue
            if q_lengths is not None and t >= q_lengths[item]:
                continue
            if kv_lengths is not None and key >= kv_lengths[item]:
                continue
            group = head // (h // hk)
            s = scale * sum(float(q[item, head, t, n]) * float(k[item, group, key, n]) for n in range(d))
            if softcap is not None:
                s = softcap * math.tanh(s / softcap)
            s += float(bias[item, head, t, key])
            exponentials[key] = math.exp(s)  # 0 for a bias of -inf
            total += math.exp(s)
        lse[item, head, t] = math.log(total) if total else -math.inf
        for key, exponential in exponentials.items():
            p[item, head, t, key] = exponential / total if total else 0.0
            dropped = p[item, head, t, key] * keep[item, head, t, key] / (1 - dropout)
            for n in range(dv):
                out[item, head, t, n] += dropped * float(v[item, head // (h // hk), key, n])
    return out.swapaxes(1, 2) if layout == "bnhd" else out, lse, p


COMBINATIONS = [names for size in (0, 1, 2) for names in itertools.combinations(FEATURES, size) if can_meet(names)]


def random_combination(seed, size=7):
    rng = np.random.default_rng(seed)
    names = []
    for name in rng.permutation(FEATURES):
        if len(names) < size and can_meet([*names, str(name)]):
            names.append(str(name))
    return tuple(names)


RANDOM = [random_combination(seed) for seed in range(60)]


# Forward.


@pytest.mark.parametrize("first", [None, *FEATURES])
def test_forward_is_the_formula(first):
    """Every feature alone and with every other."""
    chosen = [names for names in COMBINATIONS if names[:1] == ((first,) if first else ())]
    assert chosen
    for names in chosen:
        given, _, _ = build(*names)
        answer = oracle.attend(**given)
        for got, expected in zip(answer, naive(**given), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13, err_msg=str(names))


@pytest.mark.parametrize("names", RANDOM, ids="-".join)
def test_forward_of_random_combinations(names):
    given, _, _ = build(*names)
    answer = oracle.attend(**given)
    for got, expected in zip(answer, naive(**given), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)


def test_narrow_inputs_are_widened_exactly():
    given, dout, dlse = build("bias", "sinks", "softcap")
    narrow = {name: x.astype(np.float32) if name in GIVEN else x for name, x in given.items()}
    wide = {name: x.astype(np.float64) if name in GIVEN else x for name, x in narrow.items()}
    for got, expected in zip(oracle.attend(**narrow), oracle.attend(**wide), strict=True):
        assert got.dtype == np.float64
        np.testing.assert_array_equal(got, expected)
    dout, dlse = dout.astype(np.float32), dlse.astype(np.float32)
    found = oracle.backward(**narrow, out_cotangent=dout, lse_cotangent=dlse)
    expected = oracle.backward(**wide, out_cotangent=dout.astype(float), lse_cotangent=dlse.astype(float))
    for name in GIVEN:
        np.testing.assert_array_equal(found[name], expected[name])


def test_a_mask_of_rank_2_masks_keys_whatever_the_sizes():
    q = np.random.default_rng(0).standard_normal((4, 4, 4, 4))
    mask = np.tril(np.ones((4, 4), bool))
    answer, expected = oracle.attend(q, q, q, mask), oracle.attend(q, q, q, mask[:, None, None, :])
    np.testing.assert_array_equal(answer.out, expected.out)
    assert (answer.p[0, :, :, 1:] == 0).all() and (answer.p[3] > 0).all()


def test_query_heads_read_their_group():
    given, dout, dlse = build("grouped", "causal", "sinks")
    repeated = given | {name: given[name].repeat(2, axis=1) for name in "kv"}
    np.testing.assert_array_equal(oracle.attend(**given).out, oracle.attend(**repeated).out)
    found = oracle.backward(**given, out_cotangent=dout, lse_cotangent=dlse)
    expected = oracle.backward(**repeated, out_cotangent=dout, lse_cotangent=dlse)
    for name in "kv":
        b, h, j, size = expected[name].shape
        np.testing.assert_allclose(found[name], expected[name].reshape(b, h // 2, 2, j, size).sum(2), rtol=1e-14)


def test_layout_is_only_a_layout():
    given, dout, dlse = build("grouped", "values", "wide", "bias_key")
    other = given | {name: given[name].swapaxes(1, 2) for name in "qkv"} | {"layout": "bnhd"}
    answer, expected = oracle.attend(**other), oracle.attend(**given)
    np.testing.assert_array_equal(answer.out, expected.out.swapaxes(1, 2))
    np.testing.assert_array_equal(answer.lse, expected.lse)
    np.testing.assert_array_equal(answer.p, expected.p)
    found = oracle.backward(**other, out_cotangent=dout.swapaxes(1, 2), lse_cotangent=dlse)
    expected = oracle.backward(**given, out_cotangent=dout, lse_cotangent=dlse)
    for name, gradient in expected.items():
        np.testing.assert_array_equal(found[name], gradient.swapaxes(1, 2) if name in "qkv" else gradient)


@pytest.mark.parametrize("offset", [-9, -1, 0, 2, 9, 2**40])
def test_offset_in_all_its_forms(offset):
    given, _, _ = build("wide", "causal", "window_left")
    forms = [offset, np.int64(offset), np.array(offset), np.full(2, offset)]
    results = [oracle.allowed(**(given | {"q_offset": form})) for form in forms]
    for t, key in np.ndindex(4, 7):
        assert (results[0][:, :, t, key] == (t + offset - 1 <= key <= t + offset)).all()
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_offsets_by_item():
    x = np.zeros((3, 1, 3, 1))
    found = oracle.allowed(x, x, x, is_causal=True, q_offset=np.array([0, 1, -2], np.int32))[:, 0]
    np.testing.assert_array_equal(found.sum(2), [[1, 2, 3], [2, 3, 3], [0, 0, 1]])


def test_an_offset_without_positions_has_no_effect():
    given, _, _ = build("wide")
    expected = oracle.attend(**given).out
    for offset in (3, None):
        for window in (None, (None, None)):
            other = oracle.attend(**given, q_offset=offset, window_size=window).out
            np.testing.assert_array_equal(other, expected)


def test_one_side_of_segments_stands_for_both():
    given, _, _ = build()
    ids = np.array([[0, 0, 1, 1, -5]] * 2)
    expected = oracle.allowed(**given, q_segment_ids=ids, kv_segment_ids=ids)
    assert 0 < expected.sum() < expected.size
    np.testing.assert_array_equal(oracle.allowed(**given, q_segment_ids=ids), expected)
    np.testing.assert_array_equal(oracle.allowed(**given, kv_segment_ids=ids), expected)


def test_the_cap_comes_before_the_bias():
    x = np.ones((1, 1, 1, 1))
    answer = oracle.attend(x, x, x, scale=100.0, softcap=2.0, bias=3 * x)
    np.testing.assert_allclose(answer.lse.item(), 5.0, rtol=1e-15)


def test_a_finite_fill_over_a_whole_row_is_no_mask():
    """A row of the lowest finite numbers is a row of equal logits, though its lse has no room for log(j)."""
    given, dout, _ = build()
    low = np.full((2, 4, 5, 5), np.finfo(np.float32).min)
    answer = oracle.attend(**given, bias=low)
    np.testing.assert_allclose(answer.p, 1 / 5, rtol=1e-15)
    found = oracle.backward(**given, bias=low, out_cotangent=dout)
    expected = oracle.backward(**given, scale=0.0, out_cotangent=dout)
    np.testing.assert_allclose(found["v"], expected["v"], rtol=1e-14)


def test_large_logits_do_not_overflow():
    given, dout, dlse = build("sinks")
    answer = oracle.attend(**given, scale=1e4)
    np.testing.assert_allclose(answer.lse, np.max(1e4 * given["q"] @ given["k"].swapaxes(2, 3), axis=3).clip(
        given["sinks"][:, None]), rtol=1e-3)  # fmt: skip
    found = oracle.backward(**given, scale=1e4, out_cotangent=dout, lse_cotangent=dlse)
    assert all(np.isfinite(x).all() for x in found.values())


# Backward.


def objective(given, dout, dlse):
    answer = oracle.attend(**given)
    finite = np.isfinite(answer.lse)
    return np.sum(answer.out * dout) + np.sum(answer.lse[finite] * dlse[finite])


def difference(given, dout, dlse, name, direction, step=2e-5):
    ahead, behind = (given | {name: given[name] + sign * step * direction} for sign in (1, -1))
    return (objective(ahead, dout, dlse) - objective(behind, dout, dlse)) / (2 * step)


def assert_slopes(names, directions=2):
    given, dout, dlse = build(*names)
    found = oracle.backward(**given, out_cotangent=dout, lse_cotangent=dlse)
    assert set(found) == set(given) & set(GIVEN)
    rng = np.random.default_rng(1)
    for name, gradient in found.items():
        assert gradient.shape == given[name].shape and np.isfinite(gradient).all(), (names, name)
        for _ in range(directions):
            direction = rng.standard_normal(gradient.shape)
            expected = difference(given, dout, dlse, name, direction)
            np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-6, atol=1e-7, err_msg=str(names))


@pytest.mark.parametrize("first", [None, *FEATURES])
def test_backward_is_the_slope(first):
    """Every feature alone and with every other, with cotangents of out and lse, along random directions."""
    for names in COMBINATIONS:
        if names[:1] == ((first,) if first else ()):
            assert_slopes(names)


@pytest.mark.parametrize("names", RANDOM, ids="-".join)
def test_backward_of_random_combinations(names):
    assert_slopes(names)


@pytest.mark.parametrize(
    "names",
    [
        ("bias_inf", "sinks", "softcap", "dropout", "grouped", "values", "wide", "causal", "kv_lengths"),
        ("bias_key", "mask_rows", "softcap", "scale_negative", "one_head", "bnhd", "window", "segments"),
        ("bias_head", "sinks_inf", "mask_dense", "tall", "window_left", "dropout", "q_lengths"),
    ],
    ids="-".join,
)
def test_backward_element_by_element(names):
    given, dout, dlse = build(*names)
    found = oracle.backward(**given, out_cotangent=dout, lse_cotangent=dlse)
    for name, gradient in found.items():
        for index in np.ndindex(gradient.shape):
            direction = np.zeros(gradient.shape)
            direction[index] = 1.0
            expected = difference(given, dout, dlse, name, direction)
            np.testing.assert_allclose(gradient[index], expected, rtol=1e-5, atol=1e-7, err_msg=f"{name}{index}")


def test_without_a_cotangent_of_lse_it_is_zero():
    given, dout, dlse = build("sinks", "causal")
    found = oracle.backward(**given, out_cotangent=dout)
    expected = oracle.backward(**given, out_cotangent=dout, lse_cotangent=0 * dlse)
    for name, gradient in found.items():
        np.testing.assert_array_equal(gradient, expected[name])


def test_a_cotangent_of_lse_alone():
    """d lse / d s = p and d lse / d sink is the sink's probability."""
    given, dout, dlse = build("sinks", "bias", "kv_lengths")
    answer = oracle.attend(**given)
    found = oracle.backward(**given, out_cotangent=0 * dout, lse_cotangent=dlse)
    np.testing.assert_allclose(found["bias"], answer.p * dlse[..., None], atol=1e-15)
    p_sink = np.exp(given["sinks"][:, None] - answer.lse)
    np.testing.assert_allclose(found["sinks"], np.sum(p_sink * dlse, axis=(0, 2)), rtol=1e-13)
    np.testing.assert_array_equal(found["v"], 0)


def test_evaluate_is_both():
    given, dout, dlse = build("sinks", "bias_key", "bnhd")
    problem = SimpleNamespace(arguments=given, out_cotangent=dout, lse_cotangent=dlse)
    outcome, answer = oracle.evaluate(problem), oracle.attend(**given)
    np.testing.assert_array_equal(outcome.out, answer.out)
    np.testing.assert_array_equal(outcome.lse, answer.lse)
    assert list(outcome.gradients) == ["q", "k", "v", "bias", "sinks"]
    assert oracle.evaluate(SimpleNamespace(arguments=given, out_cotangent=dout, lse_cotangent=None)).lse is None


# Empty rows.

EMPTY = {
    "mask": {"mask": np.array([True, False, True, True, True])[None, None, :, None]},
    "mask and causal": {"mask": np.arange(5)[None] > 1, "is_causal": True},
    "offset": {"is_causal": True, "q_offset": np.array([-2, 0])},
    "window": {"window_size": (0, 0), "q_offset": -1},
    "segments": {"q_segment_ids": np.array([[0, 1, 2, 0, 7]] * 2), "kv_segment_ids": np.array([[0, 1, 1, 1, 0]] * 2)},
    "q_lengths": {"q_lengths": np.array([3, 0])},
    "kv_lengths": {"kv_lengths": np.array([0, 5])},
    "bias": {"bias": np.where(np.arange(5) == 2, -np.inf, 0.5)[None, None, :, None]},
    "everything": {"mask": np.zeros((1, 5), bool)},
}  # fmt: skip


@pytest.mark.parametrize("sinks", [None, "finite", "inf"])
@pytest.mark.parametrize("cause", EMPTY)
def test_empty_rows(cause, sinks):
    given, dout, dlse = build("grouped", "values")
    given |= EMPTY[cause]
    if sinks:
        given["sinks"] = np.array([0.5, -1.0, 2.0, -np.inf if sinks == "inf" else 0.1])
    empty = ~oracle.allowed(**given).any(3)
    assert empty.any()
    answer = oracle.attend(**given)
    assert (answer.out[empty] == 0).all() and (answer.p[empty] == 0).all()
    sink = np.broadcast_to(given.get("sinks", np.full(4, -np.inf))[:, None], empty.shape)
    np.testing.assert_array_equal(answer.lse[empty], sink[empty])
    assert not np.isnan(answer.lse).any()

    silent_lse = empty & (sink == -np.inf)
    found = oracle.backward(
        **given, out_cotangent=dout, lse_cotangent=np.where(silent_lse, np.nan, dlse)
    )  # of an lse of -inf it is ignored
    assert (found["q"][empty] == 0).all()
    expected = oracle.backward(
        **given, out_cotangent=np.where(empty[..., None], 0, dout), lse_cotangent=np.where(empty, 0, dlse)
    )
    for name, gradient in expected.items():
        if name == "sinks":  # d lse / d sink = 1
            gradient = gradient + np.sum(np.where(empty & (sink != -np.inf), dlse, 0), axis=(0, 2))
        np.testing.assert_allclose(found[name], gradient, rtol=1e-13, atol=1e-15, err_msg=name)


def test_a_bias_of_minus_infinity_is_a_mask_with_no_gradient():
    given, dout, dlse = build("causal")
    out_of = np.random.default_rng(3).random((2, 4, 5, 5)) < 0.4
    biased = given | {"bias": np.where(out_of, -np.inf, 0.0)}
    masked = given | {"mask": ~out_of}
    for got, expected in zip(oracle.attend(**biased), oracle.attend(**masked), strict=True):
        np.testing.assert_array_equal(got, expected)
    found = oracle.backward(**biased, out_cotangent=dout, lse_cotangent=dlse)
    assert (found["bias"][out_of] == 0).all()
    for name, gradient in oracle.backward(**masked, out_cotangent=dout, lse_cotangent=dlse).items():
        np.testing.assert_array_equal(found[name], gradient)


def test_a_sink_of_minus_infinity_is_no_sink():
    given, dout, dlse = build("kv_lengths")
    sunk = given | {"sinks": np.full(4, -np.inf)}
    for got, expected in zip(oracle.attend(**sunk), oracle.attend(**given), strict=True):
        np.testing.assert_array_equal(got, expected)
    found = oracle.backward(**sunk, out_cotangent=dout, lse_cotangent=dlse)
    np.testing.assert_array_equal(found.pop("sinks"), 0)
    for name, gradient in oracle.backward(**given, out_cotangent=dout, lse_cotangent=dlse).items():
        np.testing.assert_array_equal(found[name], gradient)


# Nothing leaks.


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "cause", ["mask of rank 2", "mask shared", "mask of rank 4", "kv_lengths", "segments", "q_lengths"]
)
def test_nothing_leaks(cause, poison):
    given, dout, dlse = build("grouped", "bias", "softcap", "dropout")
    keys = np.array([[False, True, False, False, True], [True, False, False, False, False]])
    rows = np.zeros((2, 5), bool)
    match cause:
        case "mask of rank 2":
            given["mask"] = ~keys
        case "mask shared":
            keys[:] = keys[:1]
            given["mask"] = ~keys[:1]
        case "mask of rank 4":
            given["mask"] = ~keys[:, None, None, :]
        case "kv_lengths":
            keys = np.arange(5) >= np.array([[3], [0]])
            given["kv_lengths"] = np.array([3, 0])
        case "segments":
            given |= {"q_segment_ids": np.ones((2, 5), int), "kv_segment_ids": np.where(keys, 2, 1)}
        case "q_lengths":
            keys[:] = False
            rows = np.arange(5) >= np.array([[2], [4]])
            given["q_lengths"] = np.array([2, 4])
    spoilt = dict(given)
    for name in "kv":
        spoilt[name] = np.where(keys[:, None, :, None], poison, given[name])
    spoilt["q"] = np.where(rows[:, None, :, None], poison, given["q"])
    spoilt_dout = np.where(rows[:, None, :, None], poison, dout)
    spoilt_dlse = np.where(rows[:, None, :], poison, dlse)
    assert sum(np.sum(spoilt[name] != given[name]) for name in "qkv") > 0
    for got, expected in zip(oracle.attend(**spoilt), oracle.attend(**given), strict=True):
        np.testing.assert_array_equal(got, expected)
    found = oracle.backward(**spoilt, out_cotangent=spoilt_dout, lse_cotangent=spoilt_dlse)
    expected = oracle.backward(**given, out_cotangent=dout, lse_cotangent=dlse)
    for name, gradient in expected.items():
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(found[name], gradient)
    sizes = oracle.terms(**spoilt, out_cotangent=spoilt_dout, lse_cotangent=spoilt_dlse)
    assert sizes == oracle.terms(**given, out_cotangent=dout, lse_cotangent=dlse)


# Sizes of 0.


@pytest.mark.parametrize(("b", "i", "j"), [sizes for sizes in itertools.product((0, 2), (0, 3), (0, 4)) if 0 in sizes])
@pytest.mark.parametrize("sinks", [False, True])
def test_sizes_of_0(b, i, j, sinks):
    given = {
        "q": np.ones((b, 4, i, 3)), "k": np.ones((b, 2, j, 3)), "v": np.ones((b, 2, j, 5)), "softcap": 1.0,
        "mask": np.ones((b, j), bool), "bias": np.ones((b, 1, i, j)), "is_causal": True, "q_offset": 9,
        "dropout": 0.5, "dropout_seed": 1,
    }  # fmt: skip
    if sinks:
        given["sinks"] = np.arange(4.0)
    answer = oracle.attend(**given)
    assert answer.p.shape == (b, 4, i, j)
    np.testing.assert_array_equal(answer.out, np.zeros((b, 4, i, 5)))
    expected = np.arange(4.0)[:, None] if sinks else -np.inf
    np.testing.assert_array_equal(answer.lse, np.broadcast_to(expected, (b, 4, i)))
    found = oracle.backward(**given, out_cotangent=np.ones((b, 4, i, 5)), lse_cotangent=np.ones((b, 4, i)))
    for name in set(GIVEN) & set(given):
        reached = b * i if name == "sinks" else 0  # every lse is a sink
        np.testing.assert_array_equal(found[name], np.full(given[name].shape, reached))


# The sizes of terms.


@pytest.mark.parametrize("finer", [1.0, 2.0**-3])
def test_terms_by_loops(finer):
    given, dout, dlse = build("softcap", "sinks", "bias_key")
    answer = oracle.attend(**given)
    scale, cap = 3**-0.5, 0.8
    slope = 1 - np.tanh(scale * given["q"] @ given["k"].swapaxes(2, 3) / cap) ** 2
    dp = dout @ given["v"].swapaxes(2, 3)
    delta = np.sum(answer.p * dp, axis=3, keepdims=True)
    rest = np.maximum(np.abs(delta), np.abs(dlse)[..., None])
    ds = answer.p * np.maximum(np.abs(dp), rest)
    of_q, of_v = np.zeros((2, 2, 4, 5)), np.zeros((2, 2, 4, 5))
    for index in np.ndindex(2, 4, 5, 5):
        *place, t, key = index
        for n, statistic in enumerate((np.max, np.mean)):
            k, cotangent = statistic(np.abs(given["k"][(*place, key)])), statistic(np.abs(dout[(*place, t)]))
            of_q[(n, *place, t)] = max(of_q[(n, *place, t)], scale * ds[index] * max(slope[index], finer) * k)
            of_v[(n, *place, key)] = max(of_v[(n, *place, key)], answer.p[index] * cotangent)
    by_delta = np.abs(scale * delta * ((answer.p * slope) @ given["k"]))
    of_q = np.maximum(of_q, (by_delta.max(3), by_delta.mean(3)))
    sizes = oracle.terms(**given, out_cotangent=dout, lse_cotangent=dlse, finer=finer)
    np.testing.assert_allclose(sizes["q"], (of_q[0].max(), of_q[1].mean()), rtol=1e-13)
    np.testing.assert_allclose(sizes["v"], (of_v[0].max(), of_v[1].mean()), rtol=1e-13)
    of_bias = np.sqrt((ds**2).sum(axis=(1, 2)))
    np.testing.assert_allclose(sizes["bias"], (of_bias.max(), of_bias.mean()), rtol=1e-13)
    of_sinks = np.sqrt(((np.exp(given["sinks"][:, None] - answer.lse) * rest[..., 0]) ** 2).sum(axis=(0, 2)))
    np.testing.assert_allclose(sizes["sinks"], (of_sinks.max(), of_sinks.mean()), rtol=1e-13)
    assert list(sizes) == ["lse", "q", "k", "v", "bias", "sinks"]


def test_terms_of_a_sum_that_cancels():
    """With one key a row p is 1 and ds is 0: what remains are the sizes of what cancels."""
    given, dout, _ = build()
    given["window_size"] = (0, 0)
    gradient = oracle.backward(**given, out_cotangent=dout)
    sizes = oracle.terms(**given, out_cotangent=dout)
    np.testing.assert_allclose(gradient["q"], 0, atol=1e-15)
    assert sizes["q"].largest > 0.1 and sizes["k"].largest > 0.1
    assert sizes["v"].largest == np.abs(gradient["v"]).max()


# Wrong calls: enough for a test of one's own to fail where it is wrong, the full checks being `attend`'s.


@pytest.mark.parametrize(
    ("names", "changes", "error", "text"),
    [
        ((), {"mask": np.zeros((2, 5))}, TypeError, "mask: expected bool.*bias"),
        ((), {"mask": np.ones((2, 4), bool)}, ValueError, "mask: expected rank 2"),
        ((), {"mask": np.ones((2, 5, 5), bool)}, ValueError, "mask: expected each axis"),
        ((), {"bias": np.ones((2, 5))}, ValueError, "bias: expected each axis"),
        ((), {"bias": np.ones((2, 2, 5, 5))}, ValueError, "bias: expected each axis"),
        (("wide",), {"is_causal": True}, ValueError, "q_offset: expected a value.*kv_len - q_len = 3"),
        (("wide",), {"window_size": (1, None)}, ValueError, "q_offset: expected a value"),
        (("wide",), {"q_segment_ids": np.ones((2, 4), int)}, ValueError, "segment ids: expected both"),
        ((), {"dropout": 0.5}, ValueError, "dropout_seed: expected a seed"),
        ((), {"layout": "bhdn"}, ValueError, "layout: expected"),
        ((), {"k": np.ones((2, 3, 5, 3)), "v": np.ones((2, 3, 5, 3))}, ValueError, "q, k, v: expected"),
        ((), {"v": np.ones((2, 4, 6, 3))}, ValueError, "q, k, v: expected"),
    ],
)  # fmt: skip
def test_wrong_calls(names, changes, error, text):
    given, dout, _ = build(*names)
    given |= changes
    for call in (oracle.attend, oracle.allowed):
        with pytest.raises(error, match=text):
            call(**given)
    with pytest.raises(error, match=text):
        oracle.backward(**given, out_cotangent=dout)


def test_wrong_cotangents():
    given, dout, dlse = build()
    for wrong in ({"out_cotangent": dout[:1]}, {"out_cotangent": dout, "lse_cotangent": dlse[:1]}):
        with pytest.raises(ValueError, match="cotangents: expected"):
            oracle.backward(**given, **wrong)

"""The comparison must be able to fail: planted faults, each caught in every result that it touches, at every dtype.

And it must not fail what is right. The budget's parts, the dtypes that it counts in, and the words of a mismatch are
tested here too.
"""

from functools import cache

import numpy as np
import pytest

from attend_shared import compare, dtypes, oracle, philox, reference
from attend_shared.cases import Problem, case

ALL = ("out", "lse", "dq", "dk", "dv")


# The problems that faults are planted in.


@cache
def problem(kind, dtype):
    """A call with the features of its kind, in arrays of its dtype."""
    rng = np.random.default_rng(0)
    b, h, hk, i, j, d, dv = 2, 4, 4, 24, 32, 16, 12
    if kind == "grouped":
        hk = 2
    if kind in ("window", "softcap", "plain"):
        i = j
    names = dict.fromkeys("qkv", dtype)
    given = {"q": (b, h, i, d), "k": (b, hk, j, d), "v": (b, hk, j, dv)}
    given = {name: dtypes.round_to(rng.standard_normal(shape), dtype) for name, shape in given.items()}
    match kind:
        case "mask":
            given["mask"] = rng.random((b, j)) < 0.6
        case "window":
            given["window_size"] = (9, 3)
        case "causal":
            given |= {"is_causal": True, "q_offset": j - i}
        case "empty":
            given["mask"] = np.arange(i)[None, None, :, None] % 5 > 0
        case "softcap":
            given |= {"softcap": 1.5, "bias": dtypes.round_to(rng.standard_normal((1, h, i, j)), dtype)}
        case "sinks":
            given["sinks"] = dtypes.round_to(3 + rng.standard_normal(h), dtype)  # against 32 keys
        case "dropout":
            given |= {"dropout": 0.2, "dropout_seed": 2**32 + 5}
        case "lengths":
            given |= {"q_lengths": np.array([i - 3, i]), "kv_lengths": np.array([j, j - 5])}
        case "segments":
            given |= {"q_segment_ids": np.arange(i)[None] // np.array([[6], [9]]),
                      "kv_segment_ids": np.arange(j)[None] // np.array([[8], [7]])}  # fmt: skip
    names |= {name: dtype for name in ("bias", "sinks") if name in given}
    dout = dtypes.round_to(rng.standard_normal((b, h, i, dv)), dtype)
    dlse = dtypes.round_to(rng.standard_normal((b, h, i)), dtypes.accumulation(dtype))
    return Problem(given, names, dout, dlse, "contiguous")


KINDS = (
    "plain", "mask", "window", "causal", "grouped", "empty", "softcap", "sinks", "dropout", "lengths", "segments",
)  # fmt: skip


@cache
def budgets(kind, dtype):
    return compare.budgets(problem(kind, dtype))


@cache
def right(kind, dtype):
    """The reference's own outcome, summed in an order that sets no budget."""
    return reference.evaluate(problem(kind, dtype), order=compare.ORDERS + 4)


def changed(given, **arguments):
    """The outcome of another call on the same arrays, rounded as the right one is."""
    return reference.evaluate(given._replace(arguments=given.arguments | arguments), order=9)


def with_gradients(outcome, **gradients):
    return outcome._replace(gradients=outcome.gradients | gradients)


# The faults: (kind of problem, results that must each be over budget, what goes wrong).


def scale_dropped(given, _):
    return changed(given, scale=1.0)


def mask_inverted(given, _):
    return changed(given, mask=~given.arguments["mask"])


def window_too_wide(given, _):
    left, right = given.arguments["window_size"]
    return changed(given, window_size=(left + 1, right))


def window_too_narrow(given, _):
    left, right = given.arguments["window_size"]
    return changed(given, window_size=(left, right - 1))


def window_shifted(given, _):
    return changed(given, q_offset=1)


def causal_without_itself(given, _):
    return changed(given, q_offset=given.arguments["q_offset"] - 1)


def top_left(given, _):
    return changed(given, q_offset=0)


def heads_tiled(given, _):
    h = given.arguments["q"].shape[1]
    k, v = (np.tile(given.arguments[name], (1, h // given.arguments[name].shape[1], 1, 1)) for name in "kv")
    outcome = changed(given, k=k, v=v)
    folded = {}
    for name in "kv":
        b, hk, j, size = given.arguments[name].shape
        folded[name] = outcome.gradients[name].reshape(b, h // hk, hk, j, size).sum(1)
    return with_gradients(outcome, **folded)


def empty_row_as_mean(given, outcome):
    """What a finite fill over the whole row gives: the mean of v, and 1 / j of the cotangent for every v."""
    empty = ~oracle.allowed(**given.arguments).any(3)
    v, dtype = np.float64(given.arguments["v"]), given.dtypes["v"]
    out = np.where(empty[..., None], v.mean(2, keepdims=True), outcome.out)
    dv = (
        outcome.gradients["v"]
        + np.sum(np.where(empty[..., None], given.out_cotangent, 0), 2, keepdims=True) / v.shape[2]
    )
    out, dv = (dtypes.round_to(x, dtype).astype(np.float64) for x in (out, dv))
    return with_gradients(outcome._replace(out=out), v=dv)


def softcap_after_bias(given, _):
    q, k, v, bias = (np.float64(given.arguments[name]) for name in ("q", "k", "v", "bias"))
    dout, dlse = np.float64(given.out_cotangent), given.lse_cotangent[..., None]
    scale, cap = q.shape[3] ** -0.5, given.arguments["softcap"]
    capped = np.tanh((scale * q @ k.swapaxes(2, 3) + bias) / cap)
    lse = np.log(np.sum(np.exp(cap * capped), axis=3, keepdims=True))
    p = np.exp(cap * capped - lse)
    dp = dout @ v.swapaxes(2, 3)
    ds = p * (dp - np.sum(p * dp, axis=3, keepdims=True) + dlse) * (1 - capped**2)
    results = {"out": p @ v, "q": scale * ds @ k, "k": scale * ds.swapaxes(2, 3) @ q, "v": p.swapaxes(2, 3) @ dout,
               "bias": ds.sum(0, keepdims=True)}  # fmt: skip
    results = {name: dtypes.round_to(x, given.dtypes["q"]).astype(np.float64) for name, x in results.items()}
    return compare.Outcome(results.pop("out"), lse[..., 0], results)


def dv_doubled(_, outcome):
    return with_gradients(outcome, v=2 * outcome.gradients["v"])


def lse_of_base_2(_, outcome):
    return outcome._replace(lse=outcome.lse / np.log(2))


def sinks_ignored(given, _):
    outcome = changed(given, sinks=np.full(4, -np.inf))
    return with_gradients(outcome, sinks=np.zeros(4))


def sinks_swapped(given, _):
    return changed(given, sinks=given.arguments["sinks"][::-1])


def dropout_of_another_seed(given, _):
    return changed(given, dropout_seed=given.arguments["dropout_seed"] >> 32)


def dropout_without_rescaling(given, outcome):
    share = 1 - given.arguments["dropout"]
    return with_gradients(outcome._replace(out=outcome.out * share), v=outcome.gradients["v"] * share)


def dropout_off(given, _):
    return changed(given, dropout=0.0)


def dropout_shared_by_heads(given, _):
    """One mask for all heads, as flax has by default."""
    b, h, i, j = 2, 4, 24, 32
    shared = np.broadcast_to(philox.keep_mask(given.arguments["dropout_seed"], (b, 1, i, j), 0.2), (b, h, i, j))
    p = oracle.attend(**given.arguments).p
    out = dtypes.round_to(p * shared / 0.8 @ np.float64(given.arguments["v"]), given.dtypes["q"])
    return reference.evaluate(given)._replace(out=np.float64(out))


def bias_gradient_not_summed(given, outcome):
    return with_gradients(outcome, bias=outcome.gradients["bias"] / 2)


def softcap_without_its_slope(given, outcome):
    """dq as if the cap were linear."""
    uncapped = changed(given, softcap=None, bias=given.arguments["bias"])
    return with_gradients(outcome, q=uncapped.gradients["q"], k=uncapped.gradients["k"])


def lengths_ignored(given, outcome):
    return changed(given, kv_lengths=None)


def segments_ignored(given, outcome):
    return changed(given, q_segment_ids=None, kv_segment_ids=None)


def lse_without_gradient(given, outcome):
    silent = given._replace(lse_cotangent=np.zeros_like(given.lse_cotangent))
    return outcome._replace(gradients=reference.evaluate(silent).gradients)


FAULTS = [
    ("plain", ALL, scale_dropped),
    ("mask", ALL, mask_inverted),
    ("window", ALL, window_too_wide),
    ("window", ALL, window_too_narrow),
    ("window", ALL, window_shifted),
    ("causal", ALL, causal_without_itself),
    ("causal", ALL, top_left),
    ("grouped", ALL, heads_tiled),
    ("empty", ("out", "dv"), empty_row_as_mean),
    ("softcap", (*ALL, "dbias"), softcap_after_bias),
    ("softcap", ("dbias",), bias_gradient_not_summed),
    ("softcap", ("dq", "dk"), softcap_without_its_slope),
    ("plain", ("dv",), dv_doubled),
    ("plain", ("lse",), lse_of_base_2),
    ("plain", ("dq", "dk"), lse_without_gradient),
    ("sinks", (*ALL, "dsinks"), sinks_ignored),
    ("sinks", (*ALL, "dsinks"), sinks_swapped),
    ("dropout", ("out", "dq", "dk", "dv"), dropout_of_another_seed),
    ("dropout", ("out", "dv"), dropout_without_rescaling),
    ("dropout", ("out", "dq", "dk", "dv"), dropout_off),
    ("dropout", ("out",), dropout_shared_by_heads),
    ("lengths", ALL, lengths_ignored),
    ("segments", ALL, segments_ignored),
]


@pytest.mark.parametrize("dtype", dtypes.FLOATS)
@pytest.mark.parametrize(("kind", "names", "fault"), FAULTS, ids=[fault.__name__ for *_, fault in FAULTS])
def test_planted_faults_are_caught(kind, names, fault, dtype):
    """By the outcome as a whole, and by each result that the fault touches, were it the only wrong one."""
    given, known = problem(kind, dtype), budgets(kind, dtype)
    good = right(kind, dtype)
    wrong = fault(given, good)
    with pytest.raises(compare.Mismatch):
        compare.check(wrong, given, known)
    for name in names:
        if name in ("out", "lse"):
            alone = good._replace(**{name: getattr(wrong, name)})
        else:
            alone = with_gradients(good, **{name[1:]: wrong.gradients[name[1:]]})
        with pytest.raises(compare.Mismatch, match=rf"^{name} "):
            compare.check(alone, given, known)


@pytest.mark.parametrize("dtype", dtypes.FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_right_passes(kind, dtype):
    given, known = problem(kind, dtype), budgets(kind, dtype)
    compare.check(right(kind, dtype), given, known)
    truth = oracle.evaluate(given)
    compare.check(truth, given)
    rounded = {name: dtypes.round_to(x, given.dtypes[name]) for name, x in truth.gradients.items()}
    compare.check(compare.Outcome(dtypes.round_to(truth.out, dtype), truth.lse, rounded), given, known)
    for row in compare.errors(right(kind, dtype), given, known):
        assert row.max_error <= row.max_budget and row.mean_error <= row.mean_budget


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("grouped", "dropout")])
def test_fused_kernels_of_low_precision_pass(kind):
    """p and ds rounded to bfloat16 before their products, delta from the rounded output: tensor cores ask for it."""
    given = problem(kind, "bfloat16")
    q, k, v = (np.float64(given.arguments[name]) for name in "qkv")
    dout, dlse = np.float64(given.out_cotangent), given.lse_cotangent[..., None]

    def low(x):
        return dtypes.round_to(x, "bfloat16").astype(np.float64)

    answer = oracle.attend(**given.arguments)
    cap = given.arguments.get("softcap")
    slope = 1.0 if cap is None else 1 - np.tanh(q.shape[3] ** -0.5 * q @ k.swapaxes(2, 3) / cap) ** 2
    out = low(low(answer.p) @ v)
    delta = np.sum(dout * out, axis=3, keepdims=True)
    ds = answer.p * (dout @ v.swapaxes(2, 3) - delta + np.where(answer.p.any(3, keepdims=True), dlse, 0))
    du = low(ds * slope) * q.shape[3] ** -0.5
    gradients = {"q": du @ k, "k": du.swapaxes(2, 3) @ q, "v": low(answer.p).swapaxes(2, 3) @ dout}
    if "bias" in given.dtypes:
        gradients["bias"] = ds.sum(0, keepdims=True)
    if "sinks" in given.dtypes:
        p_sink = np.exp(given.arguments["sinks"][:, None] - answer.lse)[..., None]
        gradients["sinks"] = np.sum(p_sink * (dlse - delta), axis=(0, 2, 3))
    outcome = compare.Outcome(out, answer.lse, {name: low(x) for name, x in gradients.items()})
    compare.check(outcome, given, budgets(kind, "bfloat16"))


def test_products_of_reduced_precision_are_no_float32():
    """TF32 keeps 10 bits of each factor: a float32 call that takes it is over budget in everything."""
    given, known = problem("plain", "float32"), budgets("plain", "float32")
    reduced = {name: dtypes.round_to(given.arguments[name], "float16") for name in "qkv"}
    for row in compare.errors(changed(given, **reduced), given, known):
        assert row.max_error > row.max_budget and row.mean_error > row.mean_budget, row


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_scale_rounded_into_q_is_caught(dtype):
    plain = problem("plain", dtype)
    given = plain._replace(arguments=plain.arguments | {"scale": 10.0})
    known = compare.budgets(given)
    compare.check(reference.evaluate(given, 5), given, known)
    q = dtypes.round_to(10.0 * given.arguments["q"], dtype)
    with pytest.raises(compare.Mismatch, match=r"^out "):
        compare.check(changed(given, q=q, scale=1.0), given, known)


# Maximum and mean.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_maximum_catches_one_bad_row_that_a_mean_hides(dtype):
    given, known = problem("plain", dtype), budgets("plain", dtype)
    wrong = right("plain", dtype).out.copy()
    wrong[1, 2, 17] += 1.05 * known["out"].maximum
    wrong = right("plain", dtype)._replace(out=wrong)
    row = compare.errors(wrong, given, known)[0]
    assert row.name == "out" and row.mean_error < row.mean_budget
    with pytest.raises(
        compare.Mismatch, match=r"out .* elements over the budget\n.*b=1, h=2, i=17, dv=\d+\)"
    ) as caught:
        compare.check(wrong, given, known)
    assert "only at b=1; h=2; i=17" in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mean_catches_a_small_error_everywhere(dtype):
    given, known = problem("plain", dtype), budgets("plain", dtype)
    good = right("plain", dtype)
    assert known["dk"].mean < known["dk"].maximum / 2
    wrong = with_gradients(good, k=known["dk"].expected + 0.6 * known["dk"].maximum)
    with pytest.raises(
        compare.Mismatch, match=r"^dk .*: mean error .* over the budget, by small errors of many elements"
    ):
        compare.check(wrong, given, known)


# What must be exact.


@pytest.mark.parametrize("name", [*ALL, "dbias"])
def test_a_single_nan_is_caught_anywhere(name):
    given, known, good = problem("softcap", "float32"), budgets("softcap", "float32"), right("softcap", "float32")
    array = (getattr(good, name) if name in ("out", "lse") else good.gradients[name[1:]]).copy()
    array[(0, 2, 5)] = np.nan
    wrong = good._replace(**{name: array}) if name in ("out", "lse") else with_gradients(good, **{name[1:]: array})
    with pytest.raises(compare.Mismatch, match=rf"^{name} .* elements NaN\n  worst at \(b=0, hk?=2, [ij]=5"):
        compare.check(wrong, given, known)
    rows = {row.name: row for row in compare.errors(wrong, given, known)}
    assert rows[name].max_error == rows[name].mean_error == np.inf


@pytest.mark.parametrize("value", [np.inf, -1e30, -2.4e38, 0.0])
def test_the_lse_of_an_empty_row_is_minus_infinity_exactly(value):
    given, known, good = problem("empty", "float32"), budgets("empty", "float32"), right("empty", "float32")
    assert (good.lse == -np.inf).any()
    wrong = good._replace(lse=np.where(good.lse == -np.inf, value, good.lse))
    with pytest.raises(compare.Mismatch, match=r"^lse .* -inf in one and finite in the other"):
        compare.check(wrong, given, known)


def test_the_lse_of_another_row_is_not():
    given, known, good = problem("plain", "float32"), budgets("plain", "float32"), right("plain", "float32")
    wrong = good.lse.copy()
    wrong[1, 3, 30] = -np.inf
    with pytest.raises(compare.Mismatch, match=r"^lse .* 1 of 256 elements -inf.*\n.*\(b=1, h=3, i=30\)"):
        compare.check(good._replace(lse=wrong), given, known)


TINY = 1e-30  # far below every budget


@pytest.mark.parametrize(
    ("kind", "name", "index"),
    [
        ("empty", "out", (1, 2, 5, 0)),
        ("empty", "dq", (1, 2, 5, 0)),
        ("lengths", "out", (0, 1, 21, 3)),
        ("lengths", "dq", (0, 1, 23, 3)),
        ("lengths", "dk", (1, 1, 27, 3)),
        ("lengths", "dv", (1, 1, 31, 3)),
    ],
)
def test_what_nothing_contributes_to_is_0_exactly(kind, name, index):
    given, known, good = problem(kind, "float32"), budgets(kind, "float32"), right(kind, "float32")
    array = (good.out if name == "out" else good.gradients[name[1:]]).copy()
    assert array[index] == 0
    array[index] = TINY
    wrong = good._replace(out=array) if name == "out" else with_gradients(good, **{name[1:]: array})
    with pytest.raises(compare.Mismatch, match=rf"^{name} .*: 1 of \d+ elements not exactly 0"):
        compare.check(wrong, given, known)


def test_a_bias_of_minus_infinity_and_a_sink_of_it_have_no_gradient():
    plain = problem("plain", "float32")
    bias = np.zeros((1, 1, 32, 32), np.float32)
    bias[0, 0, 3, 4] = -np.inf
    sinks = np.array([0.5, -np.inf, 1, 2], np.float32)
    given = plain._replace(
        arguments=plain.arguments | {"bias": bias, "sinks": sinks},
        dtypes=plain.dtypes | {"bias": "float32", "sinks": "float32"},
    )
    good = reference.evaluate(given)
    compare.check(good, given)
    for name, index in (("bias", (0, 0, 3, 4)), ("sinks", (1,))):
        array = good.gradients[name].copy()
        array[index] = TINY
        with pytest.raises(compare.Mismatch, match=rf"^d{name} .* 1 of \d+ elements not exactly 0"):
            compare.check(with_gradients(good, **{name: array}), given)


# The results themselves.


def test_results_must_be_there_and_have_their_shapes():
    given, known, good = problem("sinks", "float32"), budgets("sinks", "float32"), right("sinks", "float32")
    few = good._replace(gradients={name: x for name, x in good.gradients.items() if name != "sinks"})
    with pytest.raises(
        compare.Mismatch, match=r"results: expected out, lse, dq, dk, dv, dsinks; got out, lse, dq, dk, dv$"
    ):
        compare.check(few, given, known)
    with pytest.raises(compare.Mismatch, match=r"results: expected .*; got out, dq"):
        compare.errors(good._replace(lse=None), given, known)
    with pytest.raises(compare.Mismatch, match=r"results: expected out, dq, dk, dv, dsinks; got out, lse"):
        compare.check(good, given._replace(lse_cotangent=None))
    with pytest.raises(
        compare.Mismatch, match=r"out: expected shape \(b h i dv\) = \(2, 4, 24, 12\); got \(2, 4, 24, 1\)"
    ):
        compare.check(good._replace(out=good.out[..., :1]), given, known)
    with pytest.raises(
        compare.Mismatch, match=r"dk: expected shape \(b hk j d\) = \(2, 4, 32, 16\); got \(2, 32, 4, 16\)"
    ):
        compare.check(with_gradients(good, k=good.gradients["k"].swapaxes(1, 2)), given, known)


def test_a_mismatch_says_it_all():
    given, known, good = problem("grouped", "bfloat16"), budgets("grouped", "bfloat16"), right("grouped", "bfloat16")
    wrong = good.gradients["k"].copy()
    wrong[1, 0, 7, 3] += 4
    wrong[1, 1, 9, 2] += 2
    with pytest.raises(compare.Mismatch) as caught:
        compare.check(with_gradients(good, k=wrong), given, known)
    title, worst, rule, hint = str(caught.value).split("\n")
    assert title == "dk (bfloat16): 2 of 2048 elements over the budget"
    expected = known["dk"].expected[1, 0, 7, 3]
    assert worst.startswith(
        f"  worst at (b=1, hk=0, j=7, d=3): got {wrong[1, 0, 7, 3]:.9g}, expected {expected:.9g}, error 4"
    )
    assert rule.startswith(
        f"  budget {known['dk'].maximum:.3g} = 2 x {known['dk'].reference_max:.3g} (NumPy at this dtype)"
    )
    assert rule.endswith(f" + 4 ulp of {known['dk'].size.largest:.3g} (bfloat16)")
    assert hint == "  only at b=1; j=7, 9; d=2, 3"


def test_a_mismatch_names_axes_in_the_call_s_layout():
    plain = problem("plain", "float32")
    turned = plain.arguments | {name: plain.arguments[name].swapaxes(1, 2) for name in "qkv"} | {"layout": "bnhd"}
    given = plain._replace(arguments=turned, out_cotangent=plain.out_cotangent.swapaxes(1, 2))
    good = reference.evaluate(given)
    compare.check(good, given)
    wrong = good.out.copy()
    wrong[1, 30, 2, 5] = 9
    with pytest.raises(compare.Mismatch, match=r"worst at \(b=1, i=30, h=2, dv=5\): got 9, expected"):
        compare.check(good._replace(out=wrong), given)


def test_a_mismatch_sees_a_factor():
    given, known, good = problem("plain", "float32"), budgets("plain", "float32"), right("plain", "float32")
    with pytest.raises(compare.Mismatch, match=r"all of it is 2 times what is expected$"):
        compare.check(dv_doubled(given, good), given, known)
    with pytest.raises(compare.Mismatch, match=r"all of it is 1.4427 times .*: 1 / log\(2\), a logarithm of base 2$"):
        compare.check(lse_of_base_2(given, good), given, known)


def test_every_wrong_result_has_its_paragraph():
    given, known = problem("mask", "float32"), budgets("mask", "float32")
    with pytest.raises(compare.Mismatch) as caught:
        compare.check(mask_inverted(given, None), given, known)
    titles = [line.split(" ")[0] for line in str(caught.value).split("\n") if not line.startswith("  ")]
    assert titles == ["out", "lse", "dq", "dk", "dv"]


# The budget.


def test_the_rule_in_numbers():
    budget = budgets("plain", "bfloat16")["dv"]
    errors = [
        np.abs(reference.evaluate(problem("plain", "bfloat16"), order).gradients["v"] - budget.expected)
        for order in range(compare.ORDERS)
    ]
    largest, mean = np.abs(budget.expected).max(), np.abs(budget.expected).mean()
    assert budget.size == (largest, mean)
    assert budget.maximum == 2 * max(x.max() for x in errors) + 4 * dtypes.ulp(largest, "bfloat16")
    assert budget.mean == 2 * max(x.mean() for x in errors) + 4 * dtypes.ulp(mean, "bfloat16")
    assert budgets("plain", "bfloat16")["lse"].dtype == "float32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_gradient_that_is_0_by_mathematics_has_the_budget_of_its_terms(dtype):
    plain = problem("plain", dtype)
    given = plain._replace(arguments=plain.arguments | {"window_size": (0, 0)}, lse_cotangent=None)
    known = compare.budgets(given)["dq"]
    assert np.abs(known.expected).max() < 1e-13
    assert known.maximum == 2 * known.reference_max + 4 * dtypes.ulp(known.size.largest, dtype) > 0
    for order in (1, 5, 6):
        compare.check(reference.evaluate(given, order), given)
    outcome = reference.evaluate(given)
    v, dout = np.float64(given.arguments["v"]), np.float64(given.out_cotangent)
    dp = np.sum(dout * v, axis=3, keepdims=True)  # as if delta had been left out
    wrong = with_gradients(outcome, q=dp * given.arguments["k"] * 0.25)
    with pytest.raises(compare.Mismatch, match=r"^dq "):
        compare.check(wrong, given)


def test_an_ulp_is_that_of_the_coarser_dtype():
    plain = problem("plain", "float32")
    bias = np.random.default_rng(0).standard_normal((2, 4, 32, 32))
    for name, resolution in (("float64", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")):
        given = plain._replace(
            arguments=plain.arguments | {"bias": dtypes.round_to(bias, name)}, dtypes=plain.dtypes | {"bias": name}
        )
        budget = compare.budgets(given)["dbias"]
        assert (budget.dtype, budget.resolution) == (name, resolution)
        compare.check(reference.evaluate(given, 7), given)


def test_nothing_to_compare_is_no_error():
    given = Problem(
        {"q": np.ones((2, 1, 0, 4)), "k": np.ones((2, 1, 3, 4)), "v": np.ones((2, 1, 3, 4))},
        dict.fromkeys("qkv", "float64"), np.ones((2, 1, 0, 4)), np.ones((2, 1, 0)), "contiguous",
    )  # fmt: skip
    compare.check(reference.evaluate(given), given)
    rows = compare.errors(oracle.evaluate(given), given)
    assert [row.max_error for row in rows] == [0.0] * 5


def test_an_overflow_that_the_dtype_forces_is_no_error():
    x = np.full((1, 1, 1, 1), 2.0**15, np.float32)
    given = Problem({"q": x, "k": x, "v": x, "scale": 0.0}, dict.fromkeys("qkv", "float16"), 4 * x, None, "contiguous")
    outcome = reference.evaluate(given)
    assert outcome.gradients["v"].item() == np.inf
    compare.check(outcome, given)
    with pytest.raises(compare.Mismatch, match=r"^dv "):
        compare.check(with_gradients(outcome, v=-outcome.gradients["v"]), given)


def test_a_problem_beyond_its_dtype_has_no_budget():
    """The reference's error would be a budget in which everything passes."""
    plain = problem("plain", "float32")
    low = np.full((1, 1, 1, 1), -1e300)  # in float32 it is -inf, which would make every row empty
    given = plain._replace(arguments=plain.arguments | {"bias": low}, dtypes=plain.dtypes | {"bias": "float64"})
    with pytest.raises(ValueError, match=r"^out: expected a problem that float32 can hold; NumPy itself is off by"):
        compare.budgets(given)


def test_against_oracle():
    given = problem("causal", "float32")
    calls = []

    def mine(q, k, v, *, is_causal, q_offset, return_lse):
        calls.append(return_lse)
        s = q @ k.swapaxes(2, 3) / np.float32(4)
        s = np.where(np.tri(24, 32, q_offset, dtype=bool), s, -np.inf)
        e = np.exp(s)
        return e / e.sum(3, keepdims=True) @ v, np.log(e.sum(3))

    assert [row.name for row in compare.against_oracle(mine, given)] == ["out", "lse"]
    assert calls == [True]
    silent = given._replace(lse_cotangent=None)
    rows = compare.against_oracle(lambda **given: mine(**given, return_lse=False)[0], silent)
    assert [row.name for row in rows] == ["out"]
    rows = compare.against_oracle(lambda **_: reference.evaluate(given), given)
    assert [row.name for row in rows] == list(ALL)
    with pytest.raises(compare.Mismatch, match=r"^out .*\n"):
        compare.against_oracle(lambda *, q_offset, **rest: mine(**rest, q_offset=0), given)


def test_against_oracle_says_what_it_was_not_given():
    with pytest.raises(TypeError, match=r"^problem: expected a Problem, got Case\. Cases make one: case\(\.\.\.\)"):
        compare.against_oracle(lambda **_: 0, case("causal"))
    with pytest.raises(TypeError, match=r"^attention: expected \(out, lse\) where return_lse=True, got float"):
        compare.against_oracle(lambda q, **_: q, problem("causal", "float32"))



# The reference.


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_near_the_oracle(kind):
    """Absolutely, so that it cannot widen budgets by being wrong itself."""
    for dtype, limit in (("float64", 1e-14), ("float32", 4e-6), ("float16", 4e-3), ("bfloat16", 4e-2)):
        for order in (0, 1, 2):
            got, expected = reference.evaluate(problem(kind, dtype), order), oracle.evaluate(problem(kind, dtype))
            for (name, x), (_, y) in zip(compare._results(got), compare._results(expected), strict=True):
                np.testing.assert_allclose(x, y, rtol=limit, atol=limit, err_msg=f"{name} {dtype}")


def test_the_reference_rounds_to_the_dtypes():
    given = problem("softcap", "bfloat16")
    given = given._replace(dtypes=given.dtypes | {"bias": "float16"})
    outcome = reference.evaluate(given)
    np.testing.assert_array_equal(outcome.out, dtypes.round_to(outcome.out, "bfloat16"))
    np.testing.assert_array_equal(outcome.lse, dtypes.round_to(outcome.lse, "float32"))
    for name, x in outcome.gradients.items():
        np.testing.assert_array_equal(x, dtypes.round_to(x, given.dtypes[name]))
    assert (outcome.gradients["bias"] != dtypes.round_to(outcome.gradients["bias"], "bfloat16")).any()


# The dtypes.


def test_bfloat16_rounds_to_the_nearest_even_number():
    """Every pair of neighbours: what lies between goes to the nearer, the middle to the even one."""
    bits = np.arange(0x7F80, dtype=np.uint32)
    numbers = (bits << 16).view(np.float32).astype(np.float64)
    for sign in (1, -1):
        np.testing.assert_array_equal(dtypes.round_to(sign * numbers, "bfloat16"), sign * numbers)
        low, high = numbers[:-1], numbers[1:]
        middle = (low + high) / 2  # exact in float64, and but for subnormals in float32
        even = np.where(bits[:-1] % 2 == 0, low, high)
        np.testing.assert_array_equal(dtypes.round_to(sign * middle, "bfloat16"), sign * even)
        np.testing.assert_array_equal(dtypes.round_to(sign * np.nextafter(middle, np.inf), "bfloat16"), sign * high)
        np.testing.assert_array_equal(dtypes.round_to(sign * np.nextafter(middle, 0), "bfloat16"), sign * low)
        narrow = (sign * middle).astype(np.float32)
        exact = narrow == sign * middle
        assert exact[0x80:].all()
        np.testing.assert_array_equal(dtypes.round_to(narrow, "bfloat16")[exact], (sign * even)[exact])


@pytest.mark.parametrize("name", dtypes.FLOATS)
@pytest.mark.parametrize("wide", [np.float32, np.float64])
def test_rounding_keeps_what_is_no_number_and_overflows(name, wide):
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0], wide)
    rounded = dtypes.round_to(special, name)
    np.testing.assert_array_equal(rounded, special)
    np.testing.assert_array_equal(np.signbit(rounded[1:]), np.signbit(special[1:]))
    assert rounded.dtype == (np.float64 if name == "float64" else np.float32)
    payloads = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    assert np.isnan(dtypes.round_to(payloads, name)).all()
    largest = dtypes.LARGEST[name]
    assert dtypes.round_to(largest, name) == largest
    if name != "float64":
        half = (
            largest + float(dtypes.ulp(largest, name)) / 2
        )  # a tie with what would be the next number: even, so infinite
        assert dtypes.round_to(half, name) == np.inf and dtypes.round_to(-half, name) == -np.inf
        assert dtypes.round_to(np.nextafter(half, 0), name) == largest


def test_rounding_does_not_write():
    x = np.array([0.1, 0.2], np.float32)
    for name in dtypes.FLOATS:
        rounded = dtypes.round_to(x, name)
        rounded[:] = 7
    np.testing.assert_array_equal(x, np.array([0.1, 0.2], np.float32))
    assert dtypes.round_to(np.float32(0.1), "bfloat16").shape == ()
    np.testing.assert_array_equal(dtypes.round_to(x[::-1], "bfloat16"), dtypes.round_to(x, "bfloat16")[::-1])


@pytest.mark.parametrize("name", dtypes.FLOATS)
def test_an_ulp_is_the_distance_to_the_next_number(name):
    rng = np.random.default_rng(0)
    values = rng.standard_normal(500) * 2.0 ** rng.integers(-12, 12, 500)
    values = np.abs(dtypes.round_to(values, name).astype(np.float64))
    ulp = dtypes.ulp(values, name)
    if name == "float64":
        np.testing.assert_array_equal(ulp, np.spacing(values))
    else:
        above = values + ulp
        np.testing.assert_array_equal(dtypes.round_to(above, name), above)  # it is a number, and the next one:
        np.testing.assert_array_equal(dtypes.round_to(values + 0.49 * ulp, name), values)
        np.testing.assert_array_equal(dtypes.round_to(values + 0.51 * ulp, name), above)
    np.testing.assert_array_equal(dtypes.ulp(-values, name), ulp)
    assert dtypes.ulp(0.0, name) == dtypes.ulp(dtypes.TINY[name], name) == dtypes.TINY[name]
    assert dtypes.ulp(1.0, name) == dtypes.EPS[name]
    assert dtypes.ulp(np.inf, name) == dtypes.ulp(dtypes.LARGEST[name], name)
    assert np.isnan(dtypes.ulp(np.nan, name))


def test_names_of_dtypes():
    for call in (dtypes.accumulation, lambda name: dtypes.ulp(1.0, name), lambda name: dtypes.round_to(1.0, name)):
        with pytest.raises(ValueError, match="dtype: expected one of float16, bfloat16, float32, float64; got 'half'"):
            call("half")

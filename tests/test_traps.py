"""Where ports silently go wrong: each trap of docs/traps.md held against every implementation of both frameworks.

Most tests have one form (`hold`): a call that falls into the trap under a wrong reading. The wrong reading must be over
the error budget, or the test could not fail; every implementation that takes the call must be within it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from numpy.typing import NDArray

import attend_jax
import attend_torch
from attend_jax import convert as jax_convert
from attend_jax.arrays import SHAPES
from attend_jax.implementations import cudnn
from attend_shared import compare, oracle, philox
from attend_shared.call import Arrays, Call, check
from attend_shared.cases import Problem
from attend_shared.compare import Mismatch, Outcome
from attend_shared.dtypes import round_to
from attend_shared.errors import UnsupportedError
from attend_torch import convert as torch_convert
from attend_torch.implementations import sdpa as torch_sdpa

FRAMEWORKS = ("torch", "jax")
both_frameworks = pytest.mark.parametrize("framework", FRAMEWORKS)
PACKAGES: dict[str, Any] = {"torch": attend_torch, "jax": attend_jax}
BRIDGES: dict[str, Any] = {name: importlib.import_module(f"attend_{name}.bridge") for name in FRAMEWORKS}
LOWEST = float(np.finfo(np.float32).min)


def problem(
    shape: tuple[int, int, int, int, int] = (2, 4, 5, 5, 8),
    *,
    hk: int = 2,
    dv: int | None = None,
    dtype: str = "float32",
    lse: bool = False,
    **arguments: Any,
) -> Problem:
    """A call with normal q, k, v and cotangents; shape is (b, h, i, j, d)."""
    b, h, i, j, d = shape
    rng = np.random.default_rng(0)

    def draw(*size: int) -> NDArray[Any]:
        return round_to(rng.standard_normal(size), dtype)

    dv = d if dv is None else dv
    given = {"q": draw(b, h, i, d), "k": draw(b, hk, j, d), "v": draw(b, hk, j, dv), **arguments}
    if given.get("layout") == "bnhd":
        given |= {name: np.ascontiguousarray(given[name].swapaxes(1, 2)) for name in ("q", "k", "v")}
    dtypes = dict.fromkeys(("q", "k", "v"), dtype) | {name: "float32" for name in ("bias", "sinks") if name in given}
    out_cotangent = draw(b, h, i, dv) if given.get("layout") != "bnhd" else draw(b, i, h, dv)
    return Problem(given, dtypes, out_cotangent, draw(b, h, i).astype(np.float32) if lse else None, "contiguous")


def changed(it: Problem, **arguments: Any) -> Outcome:
    """The oracle's answer to another reading of the call."""
    return oracle.evaluate(it._replace(arguments=it.arguments | arguments))


def hold(framework: str, it: Problem, *wrong: Outcome, gradients: bool = False) -> dict[str, Outcome]:
    """Wrong readings are over the budget; every implementation that takes the call is within it, as einsum always does.

    Gradients are always checked in torch; in JAX, where they take long to compile, where the trap is about them.
    In torch a bias is also passed without asking for its gradient, since kernels are chosen by that.
    """
    known = compare.budgets(it)
    for reading in wrong:
        with pytest.raises(Mismatch):
            compare.check(reading, it, known)
    frozen = it._replace(dtypes={name: dtype for name, dtype in it.dtypes.items() if name != "bias"})
    forward = {name: budget for name, budget in known.items() if name in ("out", "lse")}
    unasked = {name: budget for name, budget in known.items() if name != "dbias"}
    evaluate = BRIDGES[framework].evaluate if gradients or framework == "torch" else forward_in_jax
    found = {}
    for each in PACKAGES[framework].implementations():
        if each.available:
            try:
                with jax.numpy_dtype_promotion("standard"):  # as JAX comes: under "strict" jax.nn takes float32 only
                    found[each.name] = evaluate(it, each.name)
            except UnsupportedError as refusal:
                assert each.name != "einsum", refusal
                continue
            compare.check(found[each.name], it, known if found[each.name].gradients else forward)
            if framework == "torch" and "bias" in it.dtypes:
                try:
                    outcome = evaluate(frozen, each.name)
                except UnsupportedError as refusal:
                    assert "bias" in str(refusal), refusal
                    continue
                compare.check(outcome, it, unasked)
    assert "einsum" in found
    return found


def forward_in_jax(it: Problem, implementation: str) -> Outcome:
    """out and lse alone."""
    given = {
        name: jnp.asarray(value, it.dtypes.get(name)) if isinstance(value, np.ndarray) else value
        for name, value in it.arguments.items()
    }
    lse = it.lse_cotangent is not None
    result = attend_jax.attend(**given, implementation=implementation, return_lse=lse)
    out, lse = (np.asarray(x, np.float64) for x in (result if lse else (result, None)))
    return Outcome(out, lse if lse.ndim else None, {})


def message(framework: str, error: type[Exception], /, **arguments: Any) -> str:
    """The text of the error that a call raises."""
    with pytest.raises(error) as caught:
        BRIDGES[framework].call(arguments)
    return str(caught.value)


def everywhere(error: type[Exception], **arguments: Any) -> str:
    """The text of the error, which is the same in both frameworks."""
    in_torch, in_jax = (message(framework, error, **arguments) for framework in FRAMEWORKS)
    assert in_torch == in_jax
    return in_torch


# Who may attend to whom.


@both_frameworks
def test_true_means_may_attend(framework: str) -> None:
    mask = np.array([[True, True, False, True, False], [True, False, False, False, True]])
    it = problem(mask=mask)
    hold(framework, it, changed(it, mask=~mask))


def test_masks_of_the_other_polarity_have_a_converter() -> None:
    ignore = np.array([[False, True]])
    assert torch_convert.mask_from_ignore(torch.from_numpy(ignore)).tolist() == [[True, False]]
    assert np.asarray(jax_convert.mask_from_ignore(ignore)).tolist() == [[True, False]]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_an_additive_mask_is_refused_by_name(dtype: type) -> None:
    text = everywhere(TypeError, **problem(mask=np.zeros((2, 1, 5, 5), dtype)).arguments)
    assert text.startswith("mask: expected bool")
    assert "bias=" in text


def test_an_additive_mask_has_a_converter() -> None:
    additive = np.array([[0, -1e4, -1e9, LOWEST, -np.inf]], np.float32)
    expected = [[True, False, False, False, False]]
    assert torch_convert.mask_from_additive(torch.from_numpy(additive)).tolist() == expected
    assert np.asarray(jax_convert.mask_from_additive(additive)).tolist() == expected


@both_frameworks
def test_a_mask_of_rank_2_masks_keys_even_where_it_fits_queries(framework: str) -> None:
    """b = i = j: (b, j) and (i, j) are one shape."""
    mask = np.tri(5, dtype=bool)
    it = problem((5, 2, 5, 5, 4), mask=mask)
    hold(framework, it, changed(it, mask=mask[None, None]))


def test_a_mask_of_rank_2_over_queries_is_refused() -> None:
    text = everywhere(ValueError, **problem(mask=np.tri(5, dtype=bool)).arguments)
    assert "(2, 5) or (1, 5)" in text
    assert "mask[None, None]" in text


def test_a_mask_of_rank_3_is_refused_even_where_it_fits_heads() -> None:
    """b = h: (b, i, j) and (h, i, j) are one shape."""
    text = everywhere(ValueError, **problem((4, 4, 5, 5, 8), mask=np.ones((4, 5, 5), bool)).arguments)
    assert "(b, i, j) as mask[:, None]" in text
    assert "(h, i, j) as mask[None]" in text


@both_frameworks
def test_a_mask_and_is_causal_are_anded(framework: str) -> None:
    mask = np.ones((2, 1, 5, 5), bool)
    mask[:, :, :, 1] = mask[:, :, 4, 0] = False
    it = problem(mask=mask, is_causal=True)
    hold(framework, it, changed(it, mask=None), changed(it, is_causal=False))


@both_frameworks
@pytest.mark.parametrize(("queries", "keys"), [(2, 5), (5, 2)])
def test_causal_has_two_alignments(framework: str, queries: int, keys: int) -> None:
    for offset, other in ((0, keys - queries), (keys - queries, 0)):
        it = problem((1, 2, queries, keys, 4), is_causal=True, q_offset=offset)
        hold(framework, it, changed(it, q_offset=other))


@pytest.mark.parametrize("option", [{"is_causal": True}, {"window_size": (1, None)}])
def test_causal_and_windows_ask_for_an_alignment(option: dict[str, Any]) -> None:
    text = everywhere(ValueError, **problem((1, 2, 2, 5, 4), **option).arguments)
    assert "q_offset=0" in text
    assert "q_offset=kv_len - q_len, here 3" in text


@both_frameworks
def test_a_window_does_not_count_the_query_itself(framework: str) -> None:
    it = problem((1, 2, 4, 6, 4), window_size=(2, 0), q_offset=2)
    hold(framework, it, changed(it, window_size=(1, 0)), changed(it, window_size=(3, 0)), changed(it, q_offset=0))


def test_a_window_of_one_number_is_refused() -> None:
    assert "(w - 1, 0)" in everywhere(TypeError, **problem(window_size=3).arguments)


@both_frameworks
def test_neighbouring_query_heads_share_a_key_head(framework: str) -> None:
    it = problem()
    order = [0, 2, 1, 3]  # in this order of the query heads, n // 2 reads what n % 2 reads
    swapped = it.arguments | {"q": it.arguments["q"][:, order]}
    tiled = oracle.evaluate(it._replace(arguments=swapped, out_cotangent=it.out_cotangent[:, order]))
    gradients = tiled.gradients | {"q": tiled.gradients["q"][:, order]}
    hold(framework, it, tiled._replace(out=tiled.out[:, order], gradients=gradients))


@both_frameworks
def test_either_layout_fits_where_heads_and_lengths_are_equal(framework: str) -> None:
    """h = i = j: nothing can be noticed, and the two answers differ. Other shapes are refused with the question."""
    it = problem((2, 4, 4, 4, 8), hk=4)
    as_bnhd = oracle.attend(**it.arguments, layout="bnhd").out
    assert np.abs(as_bnhd - oracle.attend(**it.arguments).out).max() > 0.1
    hold(framework, it._replace(arguments=it.arguments | {"layout": "bnhd"}), oracle.evaluate(it))
    arguments = problem((2, 4, 6, 5, 8), hk=2).arguments
    assert "is layout right?" in message(framework, ValueError, **arguments | {"layout": "bnhd"})


@both_frameworks
@pytest.mark.parametrize("keys", [0, 5])
def test_no_keys_give_nothing(framework: str, keys: int) -> None:
    """No keys at all, or none within kv_lengths: 0, and no gradient. The mean of the padding is the trap."""
    it = problem((2, 2, 3, keys, 4), kv_lengths=np.zeros(2, np.int32))
    for outcome in hold(framework, it, gradients=True).values():
        assert not outcome.out.any()
        assert not any(gradient.any() for gradient in outcome.gradients.values())


# Rows without a key, and what stands in for minus infinity.


@both_frameworks
def test_rows_emptied_by_a_mask(framework: str) -> None:
    mask = np.ones((2, 1, 5, 5), bool)
    mask[:, :, 3] = False
    it = problem(mask=mask, lse=True)
    truth = oracle.evaluate(it)
    mean = truth.out.copy()
    mean[:, :, 3] = it.arguments["v"].mean(2).repeat(2, 1)
    hold(framework, it, truth._replace(out=mean))
    hold(framework, it._replace(lse_cotangent=None), gradients=True)  # those without an lse take part here


@both_frameworks
def test_rows_emptied_by_a_bias(framework: str) -> None:
    bias = np.zeros((1, 4, 5, 5), np.float32)
    bias[:, :, 3] = -np.inf
    bias[:, 1, 0, 0] = -np.inf
    it = problem(bias=bias, is_causal=True)  # row 0 of head 1 is empty by both together
    for outcome in hold(framework, it, gradients=True).values():
        assert not outcome.out[:, :, 3].any()
        assert not outcome.out[:, 1, 0].any()


@both_frameworks
@pytest.mark.parametrize("fill", [-1e4, LOWEST])
def test_a_row_of_one_finite_fill_is_even(framework: str, fill: float) -> None:
    """Not empty: the mean of v, with the gradients of a mean."""
    bias = np.zeros((1, 1, 5, 5), np.float32)
    bias[:, :, 3] = fill
    it = problem(bias=bias, lse=True)
    truth = oracle.evaluate(it)
    emptied = truth.out.copy()
    emptied[:, :, 3] = 0
    hold(framework, it, truth._replace(out=emptied), gradients=True)


@both_frameworks
@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["plain", "causal"])
@pytest.mark.parametrize(
    ("keys", "lse", "dtype"), [(64, True, "float32"), (5, False, "float32"), (5, False, "bfloat16")]
)
def test_huge_logits_have_a_largest(framework: str, options: dict[str, Any], keys: int, lse: bool, dtype: str) -> None:
    """A product rounded in one place and not in another is no more the largest: 0 / 0, in jax.nn for few keys."""
    it = problem((1, 2, keys, keys, 16), scale=0.3, dtype=dtype, lse=lse, **options)
    given = it.arguments | {name: round_to(it.arguments[name] * 1e6, dtype) for name in "qk"}
    q, k = (given[name].astype(np.float64) for name in "qk")
    own = np.abs(0.3 * np.einsum("bhid,bhjd->bhij", q, k))
    assert own.max() > 1e12
    hold(framework, it._replace(arguments=given), gradients=True)


@both_frameworks
@pytest.mark.parametrize("size", [1e30, -1e30])
def test_a_sink_keeps_its_share_among_huge_logits(framework: str, size: float) -> None:
    """Two keys and the sink share a row: a weight made of lse, in which log(3) is lost, would be 1."""
    bias = np.array([size, size, -2e30, -np.inf, -np.inf], np.float32).reshape(1, 1, 1, 5)
    it = problem(bias=bias, sinks=np.full(4, size, np.float32), lse=True)
    truth = oracle.evaluate(it)
    by_lse = truth._replace(gradients=truth.gradients | {"sinks": 3 * truth.gradients["sinks"]})
    hold(framework, it, by_lse, gradients=True)


@both_frameworks
@pytest.mark.parametrize("sink", [1e5 + 0.3, 1e8 + 3, 1e30])
def test_a_sink_finer_than_the_logits_is_rounded_there_and_back(framework: str, sink: float) -> None:
    """float64 beside float32: less what it was rounded to, it is no 0."""
    it = problem(sinks=np.array([sink, 0.5, -sink, -np.inf]), lse=True)
    it = it._replace(dtypes=it.dtypes | {"sinks": "float64"})
    truth = oracle.evaluate(it)
    with np.errstate(over="ignore"):
        off = np.exp([sink - float(np.float32(sink)), 0, 0, 0])
    hold(
        framework,
        it,
        truth._replace(gradients=truth.gradients | {"sinks": off * truth.gradients["sinks"]}),
        gradients=True,
    )


@both_frameworks
def test_a_finite_bias_is_never_outranked_by_a_mask(framework: str) -> None:
    """Key 0 is masked, key 1 has the lowest finite bias: key 1 takes all the weight."""
    bias = np.zeros((1, 1, 5, 2), np.float32)
    bias[..., 1] = LOWEST
    it = problem((2, 4, 5, 2, 8), bias=bias, mask=np.array([[False, True]]))
    weight_on_key_0 = changed(it, mask=np.array([[True, False]]))
    for outcome in hold(framework, it, weight_on_key_0).values():
        assert np.array_equal(outcome.out, np.broadcast_to(it.arguments["v"][:, [0, 0, 1, 1], 1:], outcome.out.shape))


@both_frameworks
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_left_padding_with_causal(framework: str, dtype: str) -> None:
    """A length of 64, where a kernel's tile of 128 is half full, and rows that only padding precedes."""
    mask = np.arange(64) >= np.array([[0], [9]])
    it = problem((2, 2, 64, 64, 8), dtype=dtype, mask=mask, is_causal=True)
    hold(framework, it, changed(it, mask=None), gradients=True)


def test_cudnn_in_jax_refuses_what_it_means_otherwise() -> None:
    """Whatever this machine has: a refusal looks at shapes only."""
    q, bias = jax.ShapeDtypeStruct((2, 4, 64, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1, 4, 64, 64), jnp.bfloat16)

    def refusal(q: Any = q, k: Any = q, causal: bool = False, scale: float = 0.5, **arrays: Any) -> str | None:
        with jax.numpy_dtype_promotion("standard"):
            options = causal, None, None, scale, 0.0, False, "bhnd", None
            return cudnn.refusal(check(SHAPES, Arrays(q, k, k, **arrays), *options))

    assert refusal() is refusal(causal=True) is None
    assert None not in (refusal(scale=-0.5), refusal(causal=True, scale=-0.5))  # NaN
    assert refusal(q=jax.ShapeDtypeStruct((2, 4, 1, 64), jnp.bfloat16)) is None
    assert refusal(k=jax.ShapeDtypeStruct((2, 4, 65, 64), jnp.bfloat16)) is not None  # its gradient raises
    assert refusal(mask=jax.ShapeDtypeStruct((2, 64), jnp.bool_)) is not None
    assert refusal(mask=jax.ShapeDtypeStruct((2, 1, 1, 64), jnp.bool_)) is not None
    assert refusal(bias=bias) is not None


@both_frameworks
def test_nothing_leaks_from_excluded_keys_and_emptied_rows(framework: str) -> None:
    """A key mask, a length and a segment id that no query has, one in each item, and rows that q_lengths empties."""
    mask = np.ones((3, 6), bool)
    mask[0, 1] = False
    kv_segment_ids = np.zeros((3, 6), np.int32)
    kv_segment_ids[2, 2] = 9
    it = problem(
        (3, 4, 5, 6, 8),
        mask=mask,
        kv_lengths=np.array([6, 4, 6]),
        q_segment_ids=np.zeros((3, 5), np.int32),
        kv_segment_ids=kv_segment_ids,
        q_lengths=np.array([5, 5, 3]),
    )
    q, k, v = (it.arguments[name].copy() for name in ("q", "k", "v"))
    for item, key, value in ((0, 1, np.nan), (1, 4, np.inf), (1, 5, -np.inf), (2, 2, np.nan)):
        k[item, :, key] = v[item, :, key] = value
    cotangent = it.out_cotangent.copy()
    q[2, :, 3:] = np.nan
    cotangent[2, :, 3:] = np.inf
    poisoned = it._replace(arguments=it.arguments | {"q": q, "k": k, "v": v}, out_cotangent=cotangent)
    outcomes = hold(framework, poisoned, gradients=True)
    clean = oracle.evaluate(it)
    for outcome in outcomes.values():
        np.testing.assert_allclose(outcome.out, clean.out, atol=1e-5)
        for name, gradient in outcome.gradients.items():
            np.testing.assert_allclose(gradient, clean.gradients[name], atol=1e-5)


# Numbers.


@both_frameworks
def test_the_softcap_comes_before_the_bias(framework: str) -> None:
    bias = np.zeros((1, 1, 5, 5), np.float32)
    bias[..., 2] = 6.0
    it = problem(bias=bias, softcap=2.0)
    q, k, v = (np.float64(it.arguments[name]) for name in ("q", "k", "v"))
    s = q @ k.repeat(2, 1).swapaxes(2, 3) * 8**-0.5
    p = np.exp(2 * np.tanh((s + bias) / 2))
    capped_bias = p / p.sum(3, keepdims=True) @ v.repeat(2, 1)
    hold(framework, it, oracle.evaluate(it)._replace(out=capped_bias))


@both_frameworks
def test_the_softmax_is_not_taken_in_bfloat16(framework: str) -> None:
    """The budget of bfloat16 has room for that, so errors are compared with each other."""
    it = problem((1, 4, 128, 128, 32), dtype="bfloat16")
    q, k, v = (it.arguments[name].repeat(1 if name == "q" else 2, 1) for name in ("q", "k", "v"))
    s = round_to(round_to(q @ k.swapaxes(2, 3), "bfloat16") * 32**-0.5, "bfloat16")
    e = round_to(np.exp(s - s.max(3, keepdims=True)), "bfloat16")
    p = round_to(e / round_to(e.sum(3, keepdims=True), "bfloat16"), "bfloat16")
    expected = oracle.attend(**it.arguments).out

    def error(out: NDArray[Any]) -> float:
        return float(np.abs(out - expected).mean())

    outcomes = hold(framework, it)
    in_bfloat16 = error(round_to(p @ v, "bfloat16"))
    assert error(outcomes["einsum"].out) < 0.35 * in_bfloat16
    assert all(error(outcome.out) < 0.6 * in_bfloat16 for outcome in outcomes.values())


@both_frameworks
def test_float64_is_float64_throughout(framework: str) -> None:
    it = problem(dtype="float64")
    truth = oracle.evaluate(it)
    hold(framework, it, truth._replace(out=truth.out.astype(np.float32).astype(np.float64)), gradients=True)


@both_frameworks
def test_the_scale_is_not_rounded_into_q(framework: str) -> None:
    it = problem((2, 4, 16, 16, 8), dtype="bfloat16", scale=10.0)
    rounded = changed(it, q=round_to(10 * it.arguments["q"], "bfloat16"), scale=1.0)
    hold(framework, it, oracle.evaluate(it)._replace(out=rounded.out))


@both_frameworks
@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_a_scale_of_0_or_less_with_is_causal(framework: str, scale: float) -> None:
    it = problem(is_causal=True, scale=scale)
    hold(framework, it, changed(it, scale=0.35))


@pytest.mark.parametrize("refusal", [torch_sdpa.refusal, cudnn.refusal], ids=["sdpa", "cudnn"])
def test_kernels_on_a_gpu_that_take_a_scale_above_0_are_given_no_other(refusal: Callable[[Call], str | None]) -> None:
    """With or without a mask: they fill what is behind the last key before they scale, which nothing here can run."""
    q = jax.ShapeDtypeStruct((1, 2, 24, 32), jnp.float16)
    usual = check(SHAPES, Arrays(q, q, q), False, None, None, 0.2, 0.0, False, "bhnd", None)._replace(platform="cuda")
    assert refusal(usual) is None
    for scale in (0.0, -1.0):
        assert "takes a scale > 0" in (refusal(usual._replace(scale=scale)) or "")


@both_frameworks
def test_lse_is_natural_and_full_precision_and_minus_infinity_where_empty(framework: str) -> None:
    mask = np.ones((2, 1, 5, 5), bool)
    mask[:, :, 3] = False
    it = problem(dtype="bfloat16", mask=mask, lse=True)
    truth = oracle.evaluate(it)
    assert truth.lse is not None
    conventions = {
        "base 2": truth.lse / np.log(2),
        "in q's dtype": round_to(truth.lse, "bfloat16").astype(np.float64),
        "lowest where empty": np.maximum(truth.lse, -2.4e38),
        "infinite where empty": np.abs(truth.lse) * np.where(truth.lse == -np.inf, 1, np.sign(truth.lse)),
    }
    unused = {name: np.zeros_like(gradient) for name, gradient in truth.gradients.items()}
    wrong = [truth._replace(lse=lse) for lse in conventions.values()]
    found = hold(framework, it, *wrong, truth._replace(gradients=unused), gradients=True)
    fused = {each.name for each in PACKAGES[framework].implementations()} - set(found)
    for name in fused:  # a kernel without a differentiable lse says so
        explanation = dict(PACKAGES[framework].explain(*shapes(framework, it), return_lse=True).rows)
        assert explanation[name]


def shapes(framework: str, it: Problem) -> list[Any]:
    """q, k and v as shapes without contents."""
    sizes = [it.arguments[name].shape for name in ("q", "k", "v")]
    if framework == "torch":
        return [torch.empty(size, device="meta") for size in sizes]
    return [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]


@both_frameworks
@pytest.mark.parametrize("dv", [4, 12])
def test_values_may_have_another_head_size(framework: str, dv: int) -> None:
    hold(framework, problem(dv=dv))


def test_second_derivatives_in_torch_are_right_or_an_error() -> None:
    x = torch.linspace(-1, 1, 2 * 3 * 4, dtype=torch.float64).reshape(1, 2, 3, 4)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril(-1)  # row 0 is empty

    def loss(implementation: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda q: (attend_torch.attend(q, x, x.sin(), mask, implementation=implementation) ** 2).sum()

    q = x.cos().requires_grad_()
    hessian = torch.func.hessian(loss("einsum"))(q.detach())
    assert hessian.abs().max() > 1e-3
    slope, step = torch.func.grad(loss("einsum")), 1e-5
    numeric = (slope(q.detach() + step) - slope(q.detach() - step)) / (2 * step)
    torch.testing.assert_close(hessian.sum((-4, -3, -2, -1)), numeric, rtol=1e-6, atol=1e-8)
    tangent = torch.func.jvp(loss("einsum"), (q.detach(),), (torch.ones_like(q),))[1]
    torch.testing.assert_close(tangent, slope(q.detach()).sum())
    for each in attend_torch.implementations():
        if each.available:
            (first,) = torch.autograd.grad(loss(each.name)(q), q, create_graph=True)
            try:
                (second,) = torch.autograd.grad(first.sum(), q)
            except RuntimeError as error:  # the framework's own; NotImplementedError is one
                assert each.name != "einsum", error
            else:
                torch.testing.assert_close(second, hessian.sum((0, 1, 2, 3)))


def test_second_derivatives_in_jax_are_right_or_an_error() -> None:
    x = jnp.linspace(-1, 1, 2 * 3 * 4).reshape(1, 2, 3, 4)
    mask = np.tri(3, k=-1, dtype=bool)[None, None]  # row 0 is empty

    def loss(implementation: str) -> Callable[[jax.Array], jax.Array]:
        return lambda q: (attend_jax.attend(q, x, jnp.sin(x), mask, implementation=implementation) ** 2).sum()

    q, step = jnp.cos(x), 1e-2
    numeric = (jax.grad(loss("einsum"))(q + step) - jax.grad(loss("einsum"))(q - step)) / (2 * step)
    assert jnp.abs(numeric).max() > 1e-2
    for each in attend_jax.implementations():
        if each.available:
            try:
                first, second = jax.jvp(jax.grad(loss(each.name)), (q,), (jnp.ones_like(q),))
            except TypeError as error:  # the framework's own
                assert each.name != "einsum", error
                continue
            np.testing.assert_allclose(first, jax.grad(loss("einsum"))(q), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(second, numeric, rtol=1e-2, atol=1e-3)


# Dropout.


@both_frameworks
def test_dropout_is_independent_and_has_the_documented_bits(framework: str) -> None:
    it = problem(dropout=0.5, dropout_seed=2**63 + 5)
    keep = philox.keep_mask(2**63 + 5, (2, 4, 5, 5), 0.5)
    assert len({pattern.tobytes() for pattern in keep.reshape(8, 25)}) == 8  # no head or item shares another's
    shared = changed(it, mask=np.broadcast_to(keep[:1, :1], keep.shape), dropout=0.0)
    for outcome in hold(framework, it, shared).values():
        other = changed(it, dropout_seed=2**63 + 6)
        assert np.abs(outcome.out - other.out).max() > 0.1


def test_dropout_is_a_matter_of_training() -> None:
    x = torch.ones(1, 1, 4, 4)
    module = attend_torch.Attend(dropout=0.5).eval()
    assert torch.equal(module(x, x, x), x)
    assert not torch.equal(module.train()(x, x, x, dropout_seed=1), x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # Inductor's own
def test_dropout_bits_survive_torch_compile() -> None:
    q = torch.zeros(1, 2, 3, 1)
    v = torch.eye(7).expand(1, 2, 7, 7)  # out is p: what is dropped is 0

    def weights(seed: torch.Tensor) -> torch.Tensor:
        return attend_torch.attend(q, v[..., :1], v, dropout=0.3, dropout_seed=seed)

    compiled = torch.compile(weights, fullgraph=True)
    for seed in (0, 1, 2**31, 2**32 + 1, 2**63 - 1, -1, -(2**63), 1234567890123456789):
        keep = compiled(torch.tensor(seed)) != 0
        assert np.array_equal(keep.numpy(), philox.keep_mask(seed % 2**64, (1, 2, 3, 7), 0.3))


def test_seeds_beyond_31_bits_in_jax() -> None:
    q, v = jnp.zeros((1, 2, 3, 1)), jnp.broadcast_to(jnp.eye(7), (1, 2, 7, 7))

    def keep(seed: Any) -> NDArray[np.bool_]:
        return np.asarray(attend_jax.attend(q, v[..., :1], v, dropout=0.3, dropout_seed=seed) != 0)

    for seed in (2**31, 2**32 + 5, 2**64 - 1):
        expected = philox.keep_mask(seed, (1, 2, 3, 7), 0.3)
        words = np.array([seed % 2**32, seed // 2**32], np.uint32)
        for given in (seed, np.uint64(seed), words):
            assert np.array_equal(keep(given), expected)
        traced = jax.jit(lambda s: attend_jax.attend(q, v[..., :1], v, dropout=0.3, dropout_seed=s) != 0)
        assert np.array_equal(traced(words), expected)
    with pytest.raises(TypeError, match="uint32 array"):
        keep(np.array(2**32 + 5))  # 0-d and 64 bits: JAX would cut it


# Hosts.


def test_nnx_computes_the_same_with_and_without_a_dropout_rate() -> None:
    x = jnp.sin(jnp.arange(40.0)).reshape(1, 2, 5, 4)
    plain = attend_jax.Attend(is_causal=True)
    dropping = attend_jax.Attend(0.5, is_causal=True, rngs=nnx.Rngs(0), deterministic=True)
    assert np.array_equal(plain(x, x, x), dropping(x, x, x))
    with pytest.raises(ValueError, match="q_offset"):
        plain(x[:, :, :1], x, x)  # cached decoding: which key is the query's own is asked, not guessed


def test_train_and_eval_reach_the_nnx_module() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.attention = attend_jax.Attend(0.5, rngs=nnx.Rngs(0))

    model = Model()
    x = jnp.ones((1, 1, 4, 4))
    model.eval()
    assert model.attention.deterministic
    assert np.array_equal(model.attention(x, x, x), x)
    model.train()
    assert not model.attention.deterministic
    assert not np.array_equal(model.attention(x, x, x), x)
    assert not np.array_equal(model.attention(x, x, x), model.attention(x, x, x))


def test_nothing_shrinks_on_its_way_into_jax() -> None:
    if jax.config.jax_enable_x64:
        pytest.fail("this test is about JAX as it comes, without x64")
    x = np.ones((1, 1, 2, 4))
    narrow = {name: x.astype(np.float32) for name in "qkv"}
    for arguments in ({"q": x, "k": x, "v": x}, narrow | {"bias": x[:, :, :1, :1]}):
        assert "jax_enable_x64" in message("jax", TypeError, **arguments)
    with pytest.raises(TypeError, match="attend_jax takes JAX and NumPy arrays"):
        attend_jax.attend(*[torch.ones(1, 1, 2, 4)] * 3)
    assert not np.asarray(attend_jax.attend(**narrow, kv_lengths=np.array([-(2**40)]))).any()
    with pytest.raises(ValueError, match="32 bits"):
        attend_jax.attend(**narrow, q_segment_ids=np.array([[0, 2**40]]))

"""merge joins partial results over split keys to what one call over all keys gives, gradients included."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import attend_jax
import attend_torch
from attend_shared import oracle

B, H, HK, I, J, D = 2, 4, 2, 5, 12, 8  # noqa: E741
FRAMEWORKS = pytest.mark.parametrize("framework", ["torch", "jax"])


# Each program runs once.
pytestmark = pytest.mark.usefixtures("compile_fast")


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


Q, K, V = draw(B, H, I, D), draw(B, HK, J, D, seed=1), draw(B, HK, J, D, seed=2)
BIAS, SINKS = draw(1, H, I, J, seed=3), draw(H, seed=4)
OUT_COTANGENT, LSE_COTANGENT = draw(B, H, I, D, seed=5), draw(B, H, I, seed=6)
MASK = np.random.default_rng(7).random((B, 1, I, J)) < 0.6
MASK[0, 0, 0, :5] = False  # empty in the first part
MASK[0, 0, 1, 5:] = False  # in the others
MASK[1, 0, 2] = False  # in all
SPLITS = {"halves": [0, 6, 12], "uneven": [0, 1, 2, 11, 12], "an empty part": [0, 5, 5, 12], "one": [0, 12]}


def parts(arrays: dict[str, Any], bounds: list[int], attend: Any) -> tuple[list[Any], list[Any]]:
    """out and lse of each part of the keys; the sink belongs to the first."""
    found = []
    for n, (first, last) in enumerate(itertools.pairwise(bounds)):
        cut = {name: arrays[name][:, :, first:last] for name in ("k", "v")}
        cut |= {name: arrays[name][..., first:last] for name in ("mask", "bias")}
        sinks = {"sinks": arrays["sinks"]} if n == 0 else {}
        found.append(attend(q=arrays["q"], **cut, **sinks, return_lse=True, implementation="einsum"))
    outs, lses = zip(*found, strict=True)
    return list(outs), list(lses)


GIVEN = {"q": Q, "k": K, "v": V, "mask": MASK, "bias": BIAS, "sinks": SINKS}
FLOATS = ("q", "k", "v", "bias", "sinks")


def gradients(framework: str, bounds: list[int]) -> tuple[Any, Any, dict[str, Any]]:
    """out, lse, and the gradients of out * OUT_COTANGENT + lse * LSE_COTANGENT, in float64."""
    if framework == "torch":
        arrays = {name: torch.from_numpy(x) for name, x in GIVEN.items()}
        leaves = [arrays[name].requires_grad_() for name in FLOATS]
        out, lse = attend_torch.merge(*parts(arrays, bounds, attend_torch.attend))
        cotangents = [torch.from_numpy(x) for x in (OUT_COTANGENT, LSE_COTANGENT)]
        found = torch.autograd.grad([out, lse], leaves, cotangents)
        return out.detach(), lse.detach(), dict(zip(FLOATS, found, strict=True))

    def forward(floats: dict[str, Any]) -> Any:
        return attend_jax.merge(*parts({**floats, "mask": jnp.asarray(MASK)}, bounds, attend_jax.attend))

    with jax.enable_x64(True):
        floats = {name: jnp.asarray(GIVEN[name]) for name in FLOATS}
        (out, lse), back = jax.jit(lambda floats: jax.vjp(forward, floats))(floats)
        return out, lse, back((jnp.asarray(OUT_COTANGENT), jnp.asarray(LSE_COTANGENT)))[0]


@pytest.mark.parametrize(
    ("split", "framework"),
    [*((split, "torch") for split in SPLITS), ("an empty part", "jax"), ("one", "jax")],
)
def test_the_parts_are_the_whole(split: str, framework: str) -> None:
    """Against the oracle on all keys: rows that are empty in a part, in several, in all (but for its sink)."""
    out, lse, found = gradients(framework, SPLITS[split])
    expected = oracle.attend(**GIVEN)
    np.testing.assert_allclose(out, expected.out, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(lse, expected.lse, rtol=1e-12, atol=1e-13)
    back = oracle.backward(**GIVEN, out_cotangent=OUT_COTANGENT, lse_cotangent=LSE_COTANGENT)
    for name in FLOATS:
        np.testing.assert_allclose(found[name], back[name], rtol=1e-11, atol=1e-12, err_msg=name)


def merged(framework: str, outs: list[Any], lses: list[Any], dtype: str = "float32", **options: Any) -> list[Any]:
    """merge on NumPy arrays; out and lse as float64."""
    if framework == "torch":
        tensors = [torch.from_numpy(np.array(x)).to(getattr(torch, dtype)) for x in outs]
        out, lse = attend_torch.merge(tensors, [torch.from_numpy(np.array(x)).float() for x in lses], **options)
        assert str(out.dtype) == f"torch.{dtype}" and lse.dtype == torch.float32
        return [x.double().numpy() for x in (out, lse)]
    arrays = [jnp.asarray(x, dtype) for x in outs]
    out, lse = attend_jax.merge(arrays, [jnp.asarray(x, jnp.float32) for x in lses], **options)
    assert out.dtype == dtype and lse.dtype == np.float32
    return [np.asarray(x.astype(jnp.float32), np.float64) for x in (out, lse)]


@FRAMEWORKS
def test_parts_that_are_empty_weigh_nothing(framework: str) -> None:
    out, empty = draw(1, 1, 3, 2).astype(np.float32), np.zeros((1, 1, 3, 2), np.float32)
    lse, minus_inf = draw(1, 1, 3).astype(np.float32), np.full((1, 1, 3), -np.inf, np.float32)
    for before, after in ((0, 0), (1, 0), (0, 2), (2, 1)):
        outs, lses = [empty] * before + [out] + [empty] * after, [minus_inf] * before + [lse] + [minus_inf] * after
        found = merged(framework, outs, lses)
        np.testing.assert_allclose(found[0], out, rtol=1e-6)
        np.testing.assert_allclose(found[1], lse, rtol=1e-6)
    found = merged(framework, [empty, empty], [minus_inf, minus_inf])
    assert (found[0] == 0).all()
    assert (found[1] == -np.inf).all()


@FRAMEWORKS
def test_order_and_nesting_mean_nothing(framework: str) -> None:
    outs, lses = draw(4, 2, 3, 5, 2).astype(np.float32), draw(4, 2, 3, 5, seed=1).astype(np.float32)
    lses[1, 0] = lses[2, 0, 1] = -np.inf
    outs[1, 0] = outs[2, 0, 1] = 0
    together = merged(framework, list(outs), list(lses))
    backwards = merged(framework, list(outs[::-1]), list(lses[::-1]))
    pairs = [merged(framework, list(outs[n : n + 2]), list(lses[n : n + 2])) for n in (0, 2)]
    nested = merged(framework, [out for out, _ in pairs], [lse for _, lse in pairs])
    for other in (backwards, nested):
        for found, expected in zip(other, together, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@FRAMEWORKS
@pytest.mark.parametrize("top", [0.0, 1e4, -1e4, 1e30])
def test_lses_of_any_size(framework: str, top: float) -> None:
    """Nothing overflows, and what is far behind weighs nothing."""
    outs = [np.full((1, 1, 1, 1), x, np.float32) for x in (1.0, 3.0, 50.0)]
    lses = [np.full((1, 1, 1), x, np.float32) for x in (top, top, top - abs(top) - 200)]
    out, lse = merged(framework, outs, lses)
    np.testing.assert_allclose(out, 2.0, rtol=1e-6)
    np.testing.assert_allclose(lse, np.float32(top) + np.log(2), rtol=1e-6)


@FRAMEWORKS
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_floats_are_summed_in_float32(framework: str, dtype: str) -> None:
    """32 parts weigh half an ulp of the first each: summed in the dtype itself, they would be lost one by one."""
    ulp = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    outs = [np.full((1, 1, 1, 1), 1.0, np.float32), *[np.full((1, 1, 1, 1), -1.0, np.float32)] * 32]
    lses = [np.zeros((1, 1, 1), np.float32), *[np.full((1, 1, 1), np.log(ulp / 2), np.float32)] * 32]
    expected = (1 - 16 * ulp) / (1 + 16 * ulp)
    found, lse = merged(framework, outs, lses, dtype)
    np.testing.assert_allclose(found, expected, rtol=ulp)
    assert abs(expected - 1) > 8 * ulp
    np.testing.assert_allclose(lse, np.log(1 + 16 * ulp), rtol=1e-5)


@FRAMEWORKS
def test_layout(framework: str) -> None:
    outs, lses = draw(2, 2, 3, 5, 4).astype(np.float32), draw(2, 2, 3, 5).astype(np.float32)
    out, lse = merged(framework, list(outs), list(lses))
    turned = merged(framework, list(outs.swapaxes(2, 3)), list(lses), layout="bnhd")
    np.testing.assert_array_equal(turned[0].swapaxes(1, 2), out)
    np.testing.assert_array_equal(turned[1], lse)
    assert merged(framework, [np.zeros((0, 3, 0, 4))], [np.zeros((0, 3, 0))])[0].shape == (0, 3, 0, 4)


@FRAMEWORKS
def test_gradients_where_everything_is_empty_are_zero(framework: str) -> None:
    """And no NaN comes out of -inf - -inf, even where lse's cotangent is -inf."""
    out, minus_inf = np.ones((1, 1, 2, 2), np.float32), np.full((1, 1, 2), -np.inf, np.float32)
    if framework == "torch":
        leaves = [torch.from_numpy(x).requires_grad_() for x in (out, minus_inf.copy(), minus_inf)]
        merged, lse = attend_torch.merge([leaves[0], leaves[0]], leaves[1:])
        found = torch.autograd.grad(merged.sum() + (lse**2).sum(), leaves)
    else:

        def loss(out: Any, *lses: Any) -> Any:
            merged, lse = attend_jax.merge([out, out], list(lses))
            return merged.sum() + (lse**2).sum()

        found = jax.grad(loss, (0, 1, 2))(out, minus_inf, minus_inf)
    for gradient in found:
        np.testing.assert_array_equal(np.asarray(gradient), 0)


def test_both_frameworks_give_the_same_numbers() -> None:
    outs, lses = draw(3, 2, 3, 5, 4).astype(np.float32), 5 * draw(3, 2, 3, 5).astype(np.float32)
    answers = [merged(framework, list(outs), list(lses)) for framework in ("torch", "jax")]
    for ours, theirs in zip(*answers, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)

"""Dropout drops the same weights everywhere, independently, in the right share, with the right gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import attend_jax
import attend_jax.bridge
import attend_jax.philox
import attend_torch
import attend_torch.bridge
import attend_torch.philox
from attend_shared import compare, philox
from attend_shared.cases import case

FRAMEWORKS = pytest.mark.parametrize("framework", ["torch", "jax"])
SEEDS = (0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 123456789123, 0x9E3779B97F4A7C15)
FIVE = 5  # standard deviations


def keep_mask(framework: str, seed: int, shape: tuple[int, int, int, int], dropout: float) -> np.ndarray:
    """The keep mask of a framework's own generator."""
    if framework == "torch":
        words = attend_torch.philox.seed_words(seed, torch.device("cpu"))
        return attend_torch.philox.keep_mask(words, *shape, dropout).numpy()
    run = jax.jit(attend_jax.philox.keep_mask, static_argnums=(1, 2, 3, 4, 5))
    return np.asarray(run(attend_jax.philox.seed_words(seed), *shape, dropout))


def attended(framework: str, n: int, j: int, seed: Any, dropout: float, **options: Any) -> np.ndarray:
    """p after dropout of a call with equal logits: (b, h, i, j) = (2, 4, n, j)."""
    q, k = np.zeros((2, 4, n, 4), np.float32), np.zeros((2, 2, j, 4), np.float32)
    v = np.broadcast_to(np.eye(j, dtype=np.float32), (2, 2, j, j)).copy()
    if framework == "torch":
        options = {"dropout": dropout, "dropout_seed": seed, **options}
        return attend_torch.attend(*map(torch.from_numpy, (q, k, v)), **options).numpy()
    return np.asarray(attend_jax.attend(q, k, v, dropout=dropout, dropout_seed=seed, **options))


def serving(framework: str) -> list[str]:
    """The implementations that have dropout."""
    x = np.zeros((1, 1, 8, 8), np.float32)
    if framework == "torch":
        x = torch.from_numpy(x)
    package = attend_torch if framework == "torch" else attend_jax
    return [name for name, reason in package.explain(x, x, x, dropout=0.1, dropout_seed=0).rows if reason is None]


IMPLEMENTATIONS = [(framework, name) for framework in ("torch", "jax") for name in serving(framework)]
EACH = pytest.mark.parametrize(("framework", "implementation"), IMPLEMENTATIONS)


# What is tested here are bits, and a compilation for each shape.
pytestmark = pytest.mark.usefixtures("compile_fast")


# The same bits.


@FRAMEWORKS
def test_published_words(framework: str) -> None:
    """Those of clause 16 of docs/semantics.md."""
    ones = 2**32 - 1
    vectors = {
        ((0, 0, 0, 0), (0, 0)): "5f6fb709 0d893f64 4f121f81 4f730a48",
        ((ones,) * 4, (ones, ones)): "5207ddc2 45165e59 4d8ee751 8c52f662",
        ((5, 17, 3, 2), (123456789123 % 2**32, 123456789123 // 2**32)): "b801447a d1795165 1e292a83 ef6d7f96",
    }
    for (counter, key), words in vectors.items():
        if framework == "torch":
            found = attend_torch.philox.words(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
        else:
            counter, key = (tuple(jnp.uint32(x) for x in each) for each in (counter, key))
            found = attend_jax.philox.words(counter, key)
        assert " ".join(f"{int(word):08x}" for word in found) == words


@FRAMEWORKS
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (1, 2, 3, 4), (2, 2, 0, 3), (1, 1, 4, 0)])
def test_the_generators_agree(framework: str, shape: tuple[int, int, int, int]) -> None:
    for dropout in (0.1, 0.999):
        for seed in SEEDS:
            expected = philox.keep_mask(seed, shape, dropout)
            np.testing.assert_array_equal(keep_mask(framework, seed, shape, dropout), expected)


@EACH
@pytest.mark.parametrize(("n", "j"), [(5, 7), (70, 131), (130, 66)])
def test_every_implementation_drops_the_same(framework: str, implementation: str, n: int, j: int) -> None:
    """Over several tiles too, and beside what rules keys out."""
    expected = philox.keep_mask(99, (2, 4, n, j), 0.3)
    found = attended(framework, n, j, 99, 0.3, implementation=implementation)
    np.testing.assert_array_equal(found > 0, expected)
    np.testing.assert_allclose(found[expected], 1 / j / 0.7, rtol=1e-5)
    ahead = np.arange(j) > np.arange(n)[:, None]
    causal = attended(framework, n, j, 99, 0.3, implementation=implementation, is_causal=True, q_offset=0)
    np.testing.assert_array_equal(causal > 0, expected & ~ahead)


@FRAMEWORKS
@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_in_each_of_its_forms(framework: str, seed: int) -> None:
    words = np.array([seed % 2**32, seed // 2**32], np.uint32)
    forms: list[Any] = [seed, np.uint64(seed)]
    forms += [int(seed)] if seed >= 2**63 else [np.int64(seed)]
    if framework == "torch":
        signed = seed - 2**64 if seed >= 2**63 else seed
        forms += [torch.from_numpy(words), torch.tensor(signed, dtype=torch.int64)]
    else:
        forms += [words, jnp.asarray(words)]
    expected = philox.keep_mask(seed, (2, 4, 3, 5), 0.5)
    for form in forms:
        np.testing.assert_array_equal(attended(framework, 3, 5, form, 0.5, implementation="einsum") > 0, expected)


@FRAMEWORKS
def test_layout_does_not_count(framework: str) -> None:
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((2, 4, 6, 8)).astype(np.float32) for _ in range(3)]
    turned = [x.swapaxes(1, 2).copy() for x in inputs]
    bridge = attend_torch.bridge if framework == "torch" else attend_jax.bridge
    options = {"dropout": 0.5, "dropout_seed": 3}
    straight = bridge.call(dict(zip("qkv", inputs, strict=True)) | options)
    other = bridge.call(dict(zip("qkv", turned, strict=True)) | options | {"layout": "bnhd"})
    np.testing.assert_array_equal(np.asarray(other).swapaxes(1, 2), straight)


@FRAMEWORKS
def test_what_stays_the_same_when_a_call_grows(framework: str) -> None:
    """Counters are a call's own indices: more items, heads, queries or keys add weights and change none."""
    small = keep_mask(framework, 5, (2, 3, 4, 5), 0.5)
    np.testing.assert_array_equal(keep_mask(framework, 5, (3, 4, 6, 9), 0.5)[:2, :3, :4, :5], small)


# Shares.


@FRAMEWORKS
@pytest.mark.parametrize("dropout", [1e-11, 2.0**-32, 0.1, 0.5, 0.9, 1 - 2.0**-20])
def test_the_share_that_is_kept(framework: str, dropout: float) -> None:
    """Below 2**-32 nothing is dropped; what is kept is divided by 1 - dropout all the same."""
    mask = keep_mask(framework, 17, (8, 8, 64, 64), dropout)
    assert abs(mask.mean() - (1 - dropout)) <= FIVE * (dropout * (1 - dropout) / mask.size) ** 0.5
    if dropout < 2**-32:
        assert mask.all()
    found = attended(framework, 16, 16, 17, dropout, implementation="einsum")
    np.testing.assert_allclose(found[found > 0], 1 / 16 / (1 - dropout), rtol=1e-6)


def test_weights_are_dropped_independently() -> None:
    """Along every axis, and between seeds that differ in one bit: no pair of neighbours agrees too often."""
    masks = [keep_mask("torch", seed, (8, 8, 32, 32), 0.5) for seed in (6, 7, 6 + 2**32)]
    signs = [np.where(mask, 1.0, -1.0) for mask in masks]
    pairs = [(signs[0], signs[1]), (signs[0], signs[2]), (signs[0][..., :-4], signs[0][..., 4:])]
    for axis, n in enumerate(signs[0].shape):
        pairs.append((signs[0].take(range(n - 1), axis), signs[0].take(range(1, n), axis)))
    above = np.triu_indices(32, 1)  # query and key must not be interchangeable, nor item and head
    pairs.append((signs[0][..., *above], signs[0][..., *above[::-1]]))
    pairs.append((signs[0][*np.triu_indices(8, 1)], signs[0][*np.triu_indices(8, 1)[::-1]]))
    for a, b in pairs:
        assert abs((a * b).mean()) < FIVE / a.size**0.5
    for axis in ((0,), (1,), (2,), (3,), (0, 1), (2, 3)):  # the share in every slice
        shares = masks[0].mean(axis)
        count = masks[0].size / shares.size
        assert abs(shares - 0.5).max() < 6 * 0.5 / count**0.5


# Gradients and the rest of the formula.

CASES = (
    "square-float32-dropout_half-lse",
    "square-float64-causal-dropout_tenth-heads_grouped",
    "wide-bfloat16-mask_key-dropout_most-sinks_own-softcap_2",
    "tall-float32-bias_over_h-dropout_half-lengths_both-lse",
)


@pytest.mark.parametrize(
    ("framework", "implementation", "name"),
    # The parity tests have all of them; a JAX case costs a second to compile.
    [(*each, name) for each in IMPLEMENTATIONS for name in (CASES if each[0] == "torch" else CASES[2:])],
)
def test_gradients_are_the_oracles(framework: str, implementation: str, name: str) -> None:
    levels = name.split("-")
    problem = case(*levels).build()
    bridge = attend_torch.bridge if framework == "torch" else attend_jax.bridge
    compare.check(bridge.evaluate(problem, implementation), problem)


@FRAMEWORKS
def test_lse_is_that_before_dropout(framework: str) -> None:
    x = np.random.default_rng(0).standard_normal((1, 2, 5, 4)).astype(np.float32)
    bridge = attend_torch.bridge if framework == "torch" else attend_jax.bridge
    plain, dropped = (
        bridge.call({"q": x, "k": x, "v": x, "return_lse": True, **options})
        for options in ({}, {"dropout": 0.5, "dropout_seed": 1})
    )
    np.testing.assert_allclose(plain[1], dropped[1], rtol=1e-6)
    assert not np.allclose(plain[0], dropped[0])


@FRAMEWORKS
def test_dropped_weights_pass_no_gradient_and_the_mean_is_unchanged(framework: str) -> None:
    """Over many seeds the output is that without dropout."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, 4, 8)).astype(np.float32) for _ in range(3))
    count = 2000
    if framework == "torch":
        inputs = tuple(map(torch.from_numpy, (q, k, v)))
        seeds = torch.arange(count)
        outs = torch.func.vmap(
            lambda seed: attend_torch.attend(*inputs, dropout=0.5, dropout_seed=seed, implementation="einsum")
        )(seeds).numpy()
        plain = attend_torch.attend(*inputs, implementation="einsum").numpy()
    else:
        seeds = jnp.stack([jnp.arange(count, dtype=jnp.uint32), jnp.zeros(count, jnp.uint32)], 1)
        outs = np.asarray(jax.vmap(
            lambda seed: attend_jax.attend(q, k, v, dropout=0.5, dropout_seed=seed, implementation="einsum")
        )(seeds))  # fmt: skip
        plain = np.asarray(attend_jax.attend(q, k, v, implementation="einsum"))
    assert np.abs((outs.mean(0) - plain) / (outs.std(0) / count**0.5)).max() < FIVE

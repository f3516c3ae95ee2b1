"""What is blockwise's own in JAX: several blocks, blocks that are skipped, second derivatives, memory."""

import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attend_jax
from attend_jax import bridge
from attend_shared import blocks, cases, compare

# The list's arrays are small, so blocks are made small with them. JAX compiles each for a second or two: all levels
# alone where there is more than one block, and every fourth of the pairs.
SMALL = [case for case in cases.ALONE if min(case.sizes.i, case.sizes.j) > 16 and case.sizes.j < 1000]
SMALL += [case for case in cases.PAIRS[::4] if max(case.sizes.i, case.sizes.j) > 16]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16; what was compiled with others is forgotten, before and after."""
    jax.clear_caches()
    monkeypatch.setattr(blocks, "BLOCK", 16)
    yield
    jax.clear_caches()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_many_blocks_keep_every_clause(case: cases.Case, small_blocks: None) -> None:
    problem = case.build()
    compare.check(bridge.evaluate(problem, "blockwise"), problem)


def arrays(b: int, h: int, hk: int, i: int, j: int, d: int) -> list[jax.Array]:
    shapes = (b, h, i, d), (b, hk, j, d), (b, hk, j, d)
    return [jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate(shapes)]


RAGGED: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain": ((2, 4, 2, 600, 700, 16), {}),
    "causal": ((1, 2, 2, 600, 600, 16), {"is_causal": True}),
    "window, sinks, softcap, dropout": (
        (2, 4, 2, 300, 515, 16),
        {"is_causal": True, "q_offset": 215, "window_size": (100, None), "sinks": jnp.ones(4), "softcap": 5.0,
         "dropout": 0.2, "dropout_seed": 5},
    ),
    "bias over items, lengths": (
        (2, 2, 1, 300, 515, 8),
        {"bias": jax.random.normal(jax.random.key(3), (1, 2, 300, 515)), "kv_lengths": jnp.array([100, 600])},
    ),
    "bias over keys, dense mask": (
        (2, 2, 1, 300, 515, 8),
        {"bias": jax.random.normal(jax.random.key(3), (2, 1, 300, 1)),
         "mask": jax.random.bernoulli(jax.random.key(9), 0.5, (2, 2, 300, 515))},
    ),
    "documents": (
        (2, 2, 1, 515, 515, 8),
        {"q_segment_ids": jnp.arange(1030).reshape(2, 515) // 200, "is_causal": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RAGGED)
def test_ragged_blocks_agree_with_einsum_to_the_second_derivative(name: str, compile_fast_here: None) -> None:
    sizes, options = RAGGED[name]
    q, k, v = arrays(*sizes)
    floats = {key: options[key] for key in ("bias", "sinks") if key in options}
    rest = {key: value for key, value in options.items() if key not in floats}

    def everything(implementation: str) -> Any:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array, floats: dict) -> jax.Array:
            out, lse = attend_jax.attend(q, k, v, **rest, **floats, implementation=implementation, return_lse=True)
            weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
            # Not linear in either: what comes back to a gradient is a function of the arrays, too.
            return (jnp.sin(out) * weights).sum() + jnp.sin(jnp.where(jnp.isfinite(lse), lse, 0)).sum()

        def squared(q: jax.Array) -> jax.Array:
            return (jax.grad(loss)(q, k, v, floats) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, floats), jax.jit(jax.grad(squared))(q)

    truth = everything("einsum")
    for implementation in ("blockwise", "rowwise"):
        for expected, got in zip(jax.tree.leaves(truth), jax.tree.leaves(everything(implementation)), strict=True):
            # float32 sums of up to 700 terms in another order
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=5e-6 * float(jnp.abs(expected).max()))


def test_third_derivatives_agree_with_einsum() -> None:
    q, k, v = arrays(1, 2, 1, 5, 6, 4)

    def third(implementation: str) -> jax.Array:
        def loss(q: jax.Array) -> jax.Array:
            return jnp.sin(attend_jax.attend(q, k, v, implementation=implementation)).sum()

        of_square = jax.grad(lambda q: (jax.grad(loss)(q) ** 2).sum())
        return jax.grad(lambda q: (of_square(q) ** 2).sum())(q)

    expected = third("einsum")
    np.testing.assert_allclose(third("blockwise"), expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()))


def test_forward_mode_is_rowwise_and_agrees_with_einsum() -> None:
    q, k, v = arrays(1, 2, 1, 300, 300, 8)

    def tangent(implementation: str) -> tuple[jax.Array, jax.Array]:
        def forward(q: jax.Array, k: jax.Array) -> jax.Array:
            return attend_jax.attend(q, k, v, is_causal=True, implementation=implementation)

        return jax.jit(lambda q, k: jax.jvp(forward, (q, k), (k.repeat(2, 1), k)))(q, k)

    for expected, got in zip(tangent("einsum"), tangent("rowwise"), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="forward-mode"):  # JAX's own word: never a silent zero
        tangent("blockwise")


def visited(**options: Any) -> list[int]:
    """How many blocks of 256 keys each block of queries of 1024 visits, counted where a visit is made."""
    from attend_jax.attend import _canonical
    from attend_jax.implementations import blockwise
    from attend_shared.call import Arrays, canonical, check

    x = jnp.zeros((1, 1, 1024, 8))
    given = Arrays(x, x, x, **{name: options.pop(name) for name in list(options) if name in Arrays._fields})
    names = ("is_causal", "window_size", "softcap", "scale", "dropout", "return_lse", "layout", "implementation")
    defaults = dict(zip(names, (False, None, None, None, 0.0, False, "bhnd", None), strict=True))
    call = check(attend_jax.arrays.FRAMEWORK, given, *(defaults | options).values())
    given = canonical(call, jax.tree.map(jnp.asarray, _canonical(call, given)))
    tiles = blockwise._Tiles(call, blockwise.Floats(given.q, given.k, given.v, None, None), given)
    return [int(tiles.visits(jnp.int32(0), jnp.int32(block))[0]) for block in range(tiles.queries.count)]


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({}, [4, 4]),  # without positions and segments a block has 512 queries
        ({"is_causal": True}, [1, 2, 3, 4]),
        ({"window_size": (10, 10)}, [2, 3, 3, 2]),
        ({"is_causal": True, "window_size": (0, None)}, [1, 1, 1, 1]),
        ({"is_causal": True, "q_offset": jnp.int32(-300)}, [0, 1, 2, 3]),
        ({"kv_lengths": np.array([257])}, [2, 2]),
        ({"q_lengths": np.array([256])}, [4, 0]),
        ({"q_segment_ids": np.arange(1024)[None] // 256}, [1, 1, 1, 1]),
        ({"mask": (np.arange(1024) >= 768)[None]}, [1, 1]),
    ],
    ids=["all", "causal", "window", "diagonal", "offset", "kv lengths", "q lengths", "documents", "left padding"],
)  # fmt: skip
def test_blocks_that_are_ruled_out_are_not_visited(options: dict[str, Any], counts: list[int]) -> None:
    assert visited(**options) == counts


def test_a_scale_that_is_0_in_float32_gives_the_mean() -> None:
    q, k, v = arrays(1, 1, 1, 1, 3, 4)  # of a block of four keys
    out = attend_jax.attend(q, k, v, scale=1e-300, implementation="blockwise")
    np.testing.assert_allclose(out[0, 0, 0], v[0, 0].mean(0), rtol=1e-6)


def test_a_row_of_one_key_has_exact_zeros() -> None:
    """Its weight is 1 whatever its logit is: dp and delta, each rounded in its own way, must cancel."""
    q, k, v = arrays(2, 2, 1, 300, 300, 64)
    bias = jax.random.normal(jax.random.key(5), (1, 2, 300, 300))

    def loss(q: jax.Array, k: jax.Array, bias: jax.Array, window: tuple[int, int], dropout: float) -> jax.Array:
        out = attend_jax.attend(
            q, k, v, bias=bias, window_size=window, dropout=dropout, dropout_seed=3, implementation="blockwise"
        )
        return jnp.sin(jnp.arange(out.size, dtype="float32").reshape(out.shape) * out).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=(3, 4))
    assert [float(jnp.abs(x).max()) for x in gradients(q, k, bias, (0, 0), 0.1)] == [0, 0, 0]
    of_two = gradients(q, k, bias, (1, 0), 0.0)
    assert [bool(jnp.abs(x[:, :, 0]).max() == 0) for x in of_two] == [True, False, True]  # query 0 sees key 0 alone
    assert float(jnp.abs(of_two[0][:, :, 1:]).max(-1).min()) > 0


MEMORY = """
import os, resource, sys
import jax, jax.numpy as jnp
import attend_jax
n = int(sys.argv[1])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def gradient(q):
    options = dict(is_causal=True, sinks=jnp.zeros(2), implementation="blockwise")
    return jax.grad(lambda q: attend_jax.attend(q, q, q, **options).sum())(q)
jax.block_until_ready(jax.jit(gradient)(jnp.ones((1, 2, 512, 16))))  # what compiling costs
q = jnp.ones((1, 2, n, 16))
before = peak()
jax.block_until_ready(jax.jit(gradient)(q))
print(peak() - before)
"""


def test_memory_is_far_from_quadratic() -> None:
    run = subprocess.run([sys.executable, "-c", MEMORY, "8192"], capture_output=True, text=True, check=True)
    extra = float(re.findall(r"[-\d.]+", run.stdout)[-1])
    assert extra < 100, f"{extra} MB where the logits alone would be 512"

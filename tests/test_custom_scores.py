"""score_fn and mask_fn: one function for both frameworks, gradients of what it captures, memory linear in lengths."""

import gc
import importlib
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import attend_jax
import attend_jax.bridge
import attend_jax.linen
import attend_torch
import attend_torch.bridge
from attend_jax.functions import lift
from attend_jax.implementations import einsum as jax_einsum
from attend_jax.implementations import rowwise as jax_rowwise
from attend_shared import oracle
from attend_shared.call import Arrays, check
from attend_shared.cases import Problem
from attend_shared.errors import UnsupportedError
from attend_shared.functions import MaskFn, ScoreFn
from attend_shared.wrong_calls import WRONG_RESULTS, WrongCall
from attend_torch.implementations import einsum as torch_einsum
from attend_torch.implementations import rowwise as torch_rowwise

COMPUTE = importlib.import_module("attend_jax.attend")._compute
RNG = np.random.default_rng(21)
B, H, HK, D = 2, 4, 2, 8
I, J = 20, 24  # noqa: E741 - queries and keys
IMPLEMENTATIONS = ("einsum", "rowwise", "blockwise")
FRAMEWORKS = pytest.mark.parametrize("framework", ["torch", "jax"])
EACH = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


Q, K, V, DOUT, DLSE = normal(B, H, I, D), normal(B, HK, J, D), normal(B, HK, J, D), normal(B, H, I, D), normal(B, H, I)
REACH = 8
TABLES = {
    "relative": normal(H, 2 * REACH + 1),
    "alibi": np.array([0.5, 0.25, 0.125, 0.3]),
    "temperature": RNG.uniform(0.5, 1.5, (B, H)),
    "bound": RNG.uniform(0.25, 0.5, H),
}
IDS = RNG.integers(0, 3, (B, J))


def closer(score: Any, b: Any, h: Any, q_index: Any, kv_index: Any) -> Any:
    return score * (1 + 0.25 * b) - (h + 1) * 0.125 * abs(q_index - kv_index)


def strided(b: Any, h: Any, q_index: Any, kv_index: Any) -> Any:
    return ((q_index - kv_index) % 3 != 1) & (q_index != 7)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six queries at a time, so that 20 make three blocks and a rest."""
    for module in (torch_rowwise, jax_rowwise):
        monkeypatch.setattr(module, "LOGITS", 6 * B * H * J)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True, "q_offset": J - I},
    "window": {"window_size": (5, 2), "q_offset": 1},
    "window on the left": {"window_size": (3, None), "q_offset": 0},
    "behind all keys": {"is_causal": True, "q_offset": -8},
    "offsets": {"window_size": (4, 1), "q_offset": np.array([3, -2], np.int32)},
    "an offset": {"window_size": (2, 1), "q_offset": np.array(2, np.int32)},
    "segments": {"q_segment_ids": IDS[:, :I].astype(np.int32), "kv_segment_ids": IDS.astype(np.int32),
                 "is_causal": True, "q_offset": 4},
    "lengths": {"q_lengths": np.array([17, 20], np.int32), "kv_lengths": np.array([24, 9], np.int32),
                "window_size": (6, 6), "q_offset": 4},
    "dense": {"mask": RNG.random((B, 1, I, J)) < 0.7, "bias": normal(1, H, I, J), "sinks": normal(H),
              "is_causal": True, "q_offset": 2},
    "softcap": {"softcap": 1.5, "bias": normal(B, 1, 1, J), "scale": -0.4},
    "dropout": {"dropout": 0.3, "dropout_seed": 2**40 + 7, "is_causal": True, "q_offset": 4},
}  # fmt: skip


def problem(options: dict[str, Any], score: str, mask_fn: MaskFn | None = None) -> Problem:
    """In float64, so that what is compared is the algorithm."""
    functions: dict[str, Any] = {"score_fn": ScoreFn(score, TABLES[score])}
    if mask_fn is not None:
        functions["mask_fn"] = mask_fn
    names = ("q", "k", "v", "table", *({"bias", "sinks"} & set(options)))
    arguments = {"q": Q, "k": K, "v": V, **options, **functions}
    return Problem(arguments, dict.fromkeys(names, "float64"), DOUT, DLSE, "contiguous")


# The oracle.


def differences(given: dict[str, Any], name: str, at: tuple[int, ...], step: float = 1e-5) -> float:
    """The slope of sum(out * DOUT) + sum(lse * DLSE) along one element of q, k, v, bias or the table."""

    def loss(by: float) -> float:
        changed = dict(given)
        x = (given["score_fn"].table if name == "table" else given[name]).copy()
        x[at] += by
        changed |= {"score_fn": ScoreFn(given["score_fn"].kind, x)} if name == "table" else {name: x}
        answer = oracle.attend(**changed)
        return float((answer.out * DOUT).sum() + np.where(answer.lse == -np.inf, 0, answer.lse * DLSE).sum())

    return (loss(step) - loss(-step)) / (2 * step)


@pytest.mark.parametrize("score", TABLES)
def test_the_gradients_of_the_oracle_are_slopes(score: str) -> None:
    for options in ("softcap", "dense", "dropout"):
        given = problem(OPTIONS[options], score, MaskFn("document", IDS)).arguments
        found = oracle.backward(**given, out_cotangent=DOUT, lse_cotangent=DLSE)
        assert found["table"].shape == TABLES[score].shape
        for name in {"q", "k", "v", "bias", "table"} & set(found):
            for seed in range(3):
                at = tuple(np.random.default_rng(seed).integers(found[name].shape))
                assert found[name][at] == pytest.approx(differences(given, name, at), rel=1e-6, abs=1e-7), (name, at)


def test_the_oracle_is_the_formula() -> None:
    """Pair by pair, in plain loops."""
    given = problem(OPTIONS["softcap"], "alibi", MaskFn("document", IDS)).arguments
    answer = oracle.attend(**given)
    for b, h, t in ((0, 0, 0), (1, 3, 19), (1, 2, 7)):
        weights = {}
        for j in range(J):
            if IDS[b, t] == IDS[b, j]:
                score = 1.5 * np.tanh(-0.4 * (Q[b, h, t] @ K[b, h // 2, j]) / 1.5) + given["bias"][b, 0, 0, j]
                weights[j] = np.exp(score - TABLES["alibi"][h] * abs(t - j))
        total = sum(weights.values())
        np.testing.assert_allclose(answer.lse[b, h, t], np.log(total))
        out = sum(weight * V[b, h // 2, j] for j, weight in weights.items()) / total
        np.testing.assert_allclose(answer.out[b, h, t], out)


def test_the_oracle_takes_any_function_forward_and_known_ones_backward() -> None:
    oracle.attend(Q, K, V, score_fn=closer, mask_fn=strided)
    with pytest.raises(TypeError, match="score_fn: expected a ScoreFn, whose derivatives are known; got function"):
        oracle.backward(Q, K, V, score_fn=closer, out_cotangent=DOUT)


# One function for both frameworks.


def call(framework: str, implementation: Any, *arrays: np.ndarray, **options: Any) -> Any:
    """`attend` on NumPy arrays; NumPy results."""
    if framework == "torch":
        given = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
        result = attend_torch.attend(*map(torch.from_numpy, arrays), **given, implementation=implementation)
        return jax.tree.map(lambda x: x.numpy(), result)
    return jax.tree.map(np.asarray, attend_jax.attend(*arrays, **options, implementation=implementation))


@pytest.mark.parametrize("name", ["plain", "causal", "dense", "dropout"])
def test_the_same_function_everywhere(name: str, small_blocks: None) -> None:
    """The same objects go to torch, JAX and NumPy."""
    options = {key: x.astype(np.float32) if key in ("bias", "sinks") else x for key, x in OPTIONS[name].items()}
    functions = {"score_fn": closer, "mask_fn": strided}
    arrays = [x.astype(np.float32) for x in (Q, K, V)]
    expected = oracle.attend(*arrays, **options, **functions)
    assert (expected.lse[:, :, 7] == options.get("sinks", -np.inf)).all()
    for framework in ("torch", "jax"):
        for implementation in IMPLEMENTATIONS if framework == "torch" or name == "causal" else ("blockwise",):
            out, lse = call(framework, implementation, *arrays, **options, **functions, return_lse=True)
            np.testing.assert_allclose(out, expected.out, rtol=2e-5, atol=2e-6)
            np.testing.assert_allclose(lse, expected.lse, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_torch_is_the_oracle_in_blocks(name: str, small_blocks: None) -> None:
    for score in TABLES if name in ("plain", "dense") else ("relative",):
        held(attend_torch.bridge, problem(OPTIONS[name], score, MaskFn("document", IDS)), IMPLEMENTATIONS)


@pytest.mark.parametrize(
    ("name", "score"),
    [("window", "bound"), ("an offset", "temperature"), ("segments", "relative"), ("lengths", "alibi"),
     ("dense", "relative")],
)  # fmt: skip
def test_jax_is_the_oracle_in_blocks(name: str, score: str, small_blocks: None) -> None:
    held(attend_jax.bridge, problem(OPTIONS[name], score, MaskFn("document", IDS)), ("blockwise",))


def held(bridge: Any, given: Problem, implementations: tuple[str, ...]) -> None:
    """out, lse and every gradient, the table's among them."""
    expected = oracle.evaluate(given)
    assert expected.lse is not None
    assert np.abs(expected.gradients["table"]).max() > 1e-3
    for implementation in implementations:
        found = bridge.evaluate(given, implementation)
        np.testing.assert_allclose(found.out, expected.out, rtol=1e-10, atol=1e-11)
        np.testing.assert_allclose(found.lse, expected.lse, rtol=1e-10, atol=1e-11)
        assert found.gradients.keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            np.testing.assert_allclose(found.gradients[name], gradient, rtol=1e-9, atol=1e-10, err_msg=name)


# What a function is shown, and what it gives.


@FRAMEWORKS
@pytest.mark.parametrize("wrong", WRONG_RESULTS, ids=lambda wrong: wrong.name)
def test_wrong_results_are_told_in_the_same_words(wrong: WrongCall, framework: str) -> None:
    bridge = {"torch": attend_torch.bridge, "jax": attend_jax.bridge}[framework]
    with pytest.raises(wrong.error) as caught:
        bridge.call(wrong.build())
    assert (type(caught.value), str(caught.value)) == (wrong.error, wrong.text)


def test_what_torch_shows() -> None:
    seen = []

    def look(score: torch.Tensor, *pairs: torch.Tensor) -> torch.Tensor:
        seen.append((score.dtype, tuple(score.shape), [(x.dtype, tuple(x.shape)) for x in pairs]))
        return score

    x = torch.zeros(B, H, I, D, dtype=torch.bfloat16)
    attend_torch.attend(x, x, x, score_fn=look, implementation="einsum")
    shapes = [(B, 1, 1, 1), (1, H, 1, 1), (1, 1, I, 1), (1, 1, 1, I)]
    assert seen == [(torch.float32, (B, H, I, I), [(torch.int64, shape) for shape in shapes])]


def test_what_jax_shows() -> None:
    seen = []

    def look(score: jax.Array, *pairs: jax.Array) -> jax.Array:
        seen.append((score.dtype, score.shape, [(x.dtype, x.shape) for x in pairs]))
        return score

    x = jnp.zeros((B, H, I, D), jnp.bfloat16)
    attend_jax.attend(x, x, x, score_fn=look, implementation="einsum")
    shapes = [(B, 1, 1, 1), (1, H, 1, 1), (1, 1, I, 1), (1, 1, 1, I)]
    assert seen[0] == (jnp.float32, (B, H, I, I), [(jnp.int32, shape) for shape in shapes])
    assert {shape for _, shape, _ in seen[1:]} == {(1, 1, 1, 1)}, "then one pair"


@FRAMEWORKS
def test_a_score_of_minus_infinity_is_not_allowed(framework: str) -> None:
    where = {"torch": torch.where, "jax": jnp.where}[framework]
    arrays = [x.astype(np.float32) for x in (Q, K, V)]
    found = call(framework, "einsum", *arrays, return_lse=True,
                 score_fn=lambda s, b, h, q, k: where((k < 5) & (q != 3), s, -np.inf))  # fmt: skip
    expected = oracle.attend(*arrays, mask_fn=lambda b, h, q, k: (k < 5) & (q != 3))
    np.testing.assert_allclose(found[0], expected.out, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(found[1], expected.lse, rtol=2e-5, atol=2e-6)
    assert not found[0][:, :, 3].any()


@EACH
@FRAMEWORKS
def test_nothing_leaks_from_padding_or_through_what_is_captured(framework: str, implementation: str) -> None:
    """NaN in padded keys, in the table where they read it, and a bias of -inf: neither results nor gradients see it."""
    lengths = np.array([J, 9], np.int32)
    bias = np.where(np.arange(J) == 3, -np.inf, 0.5).astype(np.float32).reshape(1, 1, 1, J)
    clean = {"k": K.astype(np.float32), "v": V.astype(np.float32), "table": normal(B, J).astype(np.float32)}
    padded = np.arange(J) >= lengths[:, None]
    spoilt = {name: x.copy() for name, x in clean.items()}
    spoilt["k"][np.broadcast_to(padded[:, None, :, None], K.shape)] = np.nan
    spoilt["v"][np.broadcast_to(padded[:, None, :, None], V.shape)] = np.inf
    spoilt["table"][padded] = np.nan
    results = [gradients(framework, implementation, each, bias, lengths) for each in (clean, spoilt)]
    for one, two in zip(*results, strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_array_equal(one, two)


def gradients(
    framework: str, implementation: str, given: dict[str, Any], bias: np.ndarray, lengths: np.ndarray
) -> list[np.ndarray]:
    """out, and the gradients of q, k, v and of what the function captures."""
    q = Q.astype(np.float32)
    if framework == "torch":
        leaves = [torch.from_numpy(x).requires_grad_() for x in (q, given["k"], given["v"], given["table"])]

        def score_fn(s: Any, b: Any, h: Any, t: Any, j: Any) -> Any:
            return s * s * leaves[3][b, j]

        out = attend_torch.attend(*leaves[:3], bias=torch.from_numpy(bias), kv_lengths=torch.from_numpy(lengths),
                                  score_fn=score_fn, implementation=implementation)  # fmt: skip
        return [x.detach().numpy() for x in (out, *torch.autograd.grad((out**2).sum(), leaves))]

    def loss(q: Any, k: Any, v: Any, table: Any) -> Any:
        out = attend_jax.attend(q, k, v, bias=bias, kv_lengths=lengths, implementation=implementation,
                                score_fn=lambda s, b, h, t, j: s * s * table[b, j])  # fmt: skip
        return (out**2).sum(), out

    found, out = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(q, given["k"], given["v"], given["table"])
    return [np.asarray(x) for x in (out, *found)]


@EACH
@FRAMEWORKS
def test_rows_that_a_mask_fn_empties(framework: str, implementation: str) -> None:
    """out 0, lse -inf, no gradient, and a cotangent of lse there is ignored."""
    given = problem({}, "relative", MaskFn("rows", np.arange(J)[None].repeat(B, 0) % 3 != 1))
    dlse = DLSE.copy()
    dlse[:, :, 1::3] = np.nan
    bridge = {"torch": attend_torch.bridge, "jax": attend_jax.bridge}[framework]
    found, expected = bridge.evaluate(given._replace(lse_cotangent=dlse), implementation), oracle.evaluate(given)
    assert not found.out[:, :, 1::3].any() and not found.gradients["q"][:, :, 1::3].any()
    assert np.isneginf(found.lse[:, :, 1::3]).all()
    for name, gradient in expected.gradients.items():
        np.testing.assert_allclose(found.gradients[name], gradient, rtol=1e-9, atol=1e-10, err_msg=name)


@FRAMEWORKS
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_no_pair_is_none_to_show(framework: str, shape: tuple[int, ...]) -> None:
    b, i, j = shape
    q, k = np.zeros((b, H, i, D), np.float32), np.zeros((b, H, j, D), np.float32)

    def never(*_: Any) -> Any:
        raise AssertionError("there is no pair")

    for implementation in IMPLEMENTATIONS:
        out, lse = call(framework, implementation, q, k, k, score_fn=never, mask_fn=never, return_lse=True)
        assert not out.any() and np.isneginf(lse).all()


# Choice.


@FRAMEWORKS
def test_who_serves_it(framework: str) -> None:
    package = {"torch": attend_torch, "jax": attend_jax}[framework]
    shape = torch.empty(1, 2, 2048, 8) if framework == "torch" else jax.ShapeDtypeStruct((1, 2, 2048, 8), jnp.float32)
    rows = dict(package.explain(shape, shape, shape, mask_fn=strided).rows)
    served = {name for name, reason in rows.items() if reason is None}
    assert served == set(IMPLEMENTATIONS)
    assert rows["sdpa" if framework == "torch" else "xla"] == "it has no score_fn and no mask_fn"
    assert package.explain(shape, shape, shape, mask_fn=strided).chosen == "blockwise"
    small = shape[:, :, :16] if framework == "torch" else jax.ShapeDtypeStruct((1, 2, 16, 8), jnp.float32)
    assert package.explain(small, small, small, score_fn=closer).chosen == "einsum"
    x = np.zeros((1, 2, 4, 8), np.float32)
    with pytest.raises(UnsupportedError, match="it has no score_fn and no mask_fn"):
        call(framework, "sdpa" if framework == "torch" else "xla", x, x, x, score_fn=closer)


@pytest.mark.parametrize("kind", ["torch", "nnx", "linen"])
def test_modules_take_them_with_the_call(kind: str) -> None:
    arrays = [x.astype(np.float32) for x in (Q, K, V)]
    functions = {"score_fn": closer, "mask_fn": strided}
    expected = oracle.attend(*arrays, **functions).out
    if kind == "torch":
        found = attend_torch.Attend(flash=True)(*map(torch.from_numpy, arrays), **functions).numpy()
    elif kind == "nnx":
        found = attend_jax.Attend(flash=True)(*arrays, **functions)
    else:
        found = attend_jax.linen.Attend(flash=True).apply({}, *arrays, **functions)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


# Blocks.


def seen(monkeypatch: pytest.MonkeyPatch, module: Any, run: Callable[[], Any]) -> list[int]:
    """How many keys each block of queries is computed against."""
    keys: list[int] = []
    compute = module.compute

    def count(call: Any, arrays: Any, *first: Any) -> Any:
        keys.append(arrays.k.shape[2])
        return compute(call, arrays, *first)

    with monkeypatch.context() as patch:
        patch.setattr(module, "compute", count)
        run()
    return keys


SKIPS = pytest.mark.parametrize(
    ("options", "in_torch", "in_jax"),
    [
        ({}, [64] * 8, [64]),
        ({"is_causal": True}, [8, 16, 24, 32, 40, 48, 56, 64], [16, 32, 48, 64]),
        ({"window_size": (4, 0)}, [8, 12, 12, 12, 12, 12, 12, 12], [12]),
        ({"is_causal": True, "q_offset": -40}, [0, 0, 0, 0, 0, 8, 16, 24], [64]),
        ({"window_size": (4, None)}, [64, 60, 52, 44, 36, 28, 20, 12], [20, 36, 52, 64]),
        ({"window_size": (4, 4), "dropout": 0.5, "dropout_seed": 1}, [64] * 8, [64]),
        ({"q_segment_ids": np.arange(64, dtype=np.int32)[None] // 12}, [12, 24, 12, 12, 24, 12, 12, 16], [64]),
        ({"kv_lengths": np.array([20], np.int32)}, [20] * 8, [64]),
        ({"q_lengths": np.array([16], np.int32)}, [64, 64, 0, 0, 0, 0, 0, 0], [64]),
    ],
    ids=["all", "causal", "window", "offset", "left", "dropout", "segments", "kv_lengths", "q_lengths"],
)


@SKIPS
def test_keys_out_of_reach_are_skipped(
    options: dict[str, Any], in_torch: list[int], in_jax: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block has 8 queries; JAX compiles four groups of two blocks, or, for a window, one block for all."""
    x = normal(1, 1, 64, 4).astype(np.float32)
    monkeypatch.setattr(torch_rowwise, "LOGITS", 8 * 64)
    monkeypatch.setattr(jax_rowwise, "LOGITS", 8 * 64)
    found = seen(monkeypatch, torch_einsum, lambda: call("torch", "blockwise", x, x, x, score_fn=closer, **options))
    assert found == in_torch
    COMPUTE.clear_cache()
    found = seen(monkeypatch, jax_einsum, lambda: call("jax", "blockwise", x, x, x, score_fn=closer, **options))
    assert sorted(set(found)) == in_jax, "a body is traced more than once"


MEMORY = """
import re, sys
import numpy as np
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024
def near(table):
    return lambda score, b, h, q_index, kv_index: score + table[h, (kv_index - q_index).clip(-8, 8) + 8]
x, table = np.ones((1, 2, 8192, 16), np.float32), np.zeros((2, 17), np.float32)
def in_torch():
    import torch
    from attend_torch import attend
    torch.set_num_threads(1)
    leaves = [torch.from_numpy(x).requires_grad_(), torch.from_numpy(table).requires_grad_()]
    def run(n):
        q = leaves[0][:, :, :n]
        out = attend(q, q, q, score_fn=near(leaves[1]), window_size=(300, 0), implementation="blockwise")
        torch.autograd.grad(out.sum(), leaves)
    return run
def in_jax():
    import jax
    from attend_jax import attend
    def loss(q, table):
        return attend(q, q, q, score_fn=near(table), window_size=(300, 0), implementation="blockwise").sum()
    gradient = jax.jit(jax.grad(loss, (0, 1)))
    return lambda n: jax.block_until_ready(gradient(x[:, :, :n], table))
run = {"torch": in_torch, "jax": in_jax}[sys.argv[1]]()
run(512)
before = peak()
run(8192)
print(peak() - before)
"""


@FRAMEWORKS
def test_memory_is_far_from_quadratic(framework: str) -> None:
    run = subprocess.run([sys.executable, "-c", MEMORY, framework], capture_output=True, text=True, check=True)
    extra = float(re.findall(r"[-\d.]+", run.stdout)[-1])
    assert extra < 250, f"{extra} MB where the logits alone would be 512, and five arrays of them are made"


# JAX.


def relative(table: Any) -> Callable[..., Any]:
    return lambda s, b, h, q, k: s + table[h, (k - q).clip(-REACH, REACH) + REACH]


SMALL = [x[:1, :, :6].astype(np.float32) for x in (Q, K, V)]
TABLE = TABLES["relative"].astype(np.float32)


@pytest.fixture
def compiled() -> Iterator[Callable[[], int]]:
    """How many programs there are, of a cache that is empty at first."""
    COMPUTE.clear_cache()
    yield COMPUTE._cache_size


def test_jax_compiles_once_for_what_is_the_same(compiled: Callable[[], int]) -> None:
    def run(score_fn: Any, mask_fn: Any = None) -> np.ndarray:
        return np.asarray(attend_jax.attend(*SMALL, score_fn=score_fn, mask_fn=mask_fn, implementation="einsum"))

    first = run(relative(jnp.asarray(TABLE)))
    second = run(relative(jnp.asarray(TABLE + np.arange(2 * REACH + 1, dtype=np.float32))))
    assert compiled() == 1, "a new function, and what it captures is another array"
    assert not np.allclose(first, second)
    run(lambda s, b, h, q, k: s - 0.5 * (q - k))
    run(lambda s, b, h, q, k: s - 0.5 * (q - k))
    assert compiled() == 2
    assert not np.allclose(run(lambda s, b, h, q, k: s - 0.25 * (q - k)), run(lambda s, b, h, q, k: s - 0.5 * (q - k)))
    assert compiled() == 3, "another number is another program"
    run(lambda s, b, h, q, k: s - 0.5 * (k - q))
    assert compiled() == 4, "and so is another order"
    run(None, lambda b, h, q, k: q >= k)
    run(None, lambda b, h, q, k: q > k)
    run(None, lambda b, h, q, k: q >= k)
    assert compiled() == 6


def test_a_table_that_changes_is_read_anew() -> None:
    """The same function object: nothing that it captured before is remembered."""
    held: dict[str, Any] = {}

    def score_fn(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s + held["table"][h, k]

    for seed in (0, 1):
        table = np.random.default_rng(seed).standard_normal((H, 6)).astype(np.float32)
        expected = oracle.attend(*SMALL, bias=table[None, :, None]).out
        for framework, array in (("torch", torch.from_numpy), ("jax", jnp.asarray)):
            held["table"] = array(table)
            found = call(framework, None, *SMALL, score_fn=score_fn)
            np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


@FRAMEWORKS
def test_no_function_and_nothing_captured_is_kept(framework: str) -> None:
    class Captured:
        table = torch.from_numpy(TABLE) if framework == "torch" else jnp.asarray(TABLE)

    def run() -> tuple[Any, ...]:
        captured = Captured()

        def score_fn(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            return s + captured.table[h, k]

        call(framework, "blockwise", *SMALL, score_fn=score_fn)
        return weakref.ref(score_fn), weakref.ref(captured)

    watched = run()
    gc.collect()
    assert [each() for each in watched] == [None, None]


def test_jax_inside_transforms() -> None:
    """jit, grad, vmap over what is captured, scan, jvp, and a second derivative."""
    q, k, v = map(jnp.asarray, SMALL)

    def loss(table: Any, implementation: str = "blockwise") -> Any:
        out = attend_jax.attend(q, k, v, score_fn=relative(table), implementation=implementation)
        return (out.astype(jnp.float32) ** 2).sum()

    tables = jnp.stack([jnp.asarray(TABLE), 2 * jnp.asarray(TABLE), -jnp.asarray(TABLE)])
    each = jnp.stack([jax.grad(loss)(table) for table in tables])
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(loss)))(tables), each, rtol=1e-4, atol=1e-5)
    _, scanned = jax.lax.scan(lambda _, table: (None, jax.grad(loss)(table)), None, tables)
    np.testing.assert_allclose(scanned, each, rtol=1e-4, atol=1e-5)
    along = tables[0] ** 2
    _, pushed = jax.jvp(loss, (tables[0],), (along,))
    np.testing.assert_allclose(pushed, (each[0] * along).sum(), rtol=1e-4)
    hessians = [jax.jvp(jax.grad(lambda t: loss(t, name)), (tables[0],), (along,))[1]  # noqa: B023
                for name in ("einsum", "blockwise")]  # fmt: skip
    assert np.abs(hessians[0]).max() > 1e-3
    np.testing.assert_allclose(hessians[1], hessians[0], rtol=1e-3, atol=1e-5)


def test_programs_are_compared_by_what_they_do() -> None:
    def program(score_fn: Any = None, mask_fn: Any = None) -> Any:
        x = np.zeros((1, 1, 2, 2), np.float32)
        options = (False, None, None, None, 0.0, False, "bhnd", None, None, score_fn, mask_fn)
        lifted, _ = lift(check(attend_jax.arrays.FRAMEWORK, Arrays(x, x, x), *options))
        return lifted.score_fn or lifted.mask_fn

    def pair(make: Callable[[], Any]) -> tuple[Any, Any]:
        return program(make()), program(make())

    one, two = jnp.ones(4), jnp.ones(5)
    for make in (
        lambda: lambda s, b, h, q, k: s * one[k],
        lambda: lambda s, b, h, q, k: jnp.where(q > k, s, jnp.tanh(s) * 3.0),
        lambda: lambda s, b, h, q, k: jax.lax.fori_loop(0, 3, lambda n, x: x + q.astype(x.dtype), s),
        lambda: lambda s, b, h, q, k: jax.jit(lambda x: x + 1)(s),
    ):
        left, right = pair(make)
        assert left == right and hash(left) == hash(right)
    different = [
        program(lambda s, b, h, q, k: s * one[k]),
        program(lambda s, b, h, q, k: s * two[k]),
        program(lambda s, b, h, q, k: s * one[q]),
        program(lambda s, b, h, q, k: s + one[k]),
        program(lambda s, b, h, q, k: s * 2.0),
        program(lambda s, b, h, q, k: s * 2.5),
        program(lambda s, b, h, q, k: s.clip(-1, 1)),
        program(lambda s, b, h, q, k: s.clip(-1, 2)),
        program(lambda s, b, h, q, k: jax.lax.fori_loop(0, 3, lambda n, x: x + 1, s)),
        program(lambda s, b, h, q, k: jax.lax.fori_loop(0, 4, lambda n, x: x + 1, s)),
        program(lambda s, b, h, q, k: jax.lax.fori_loop(0, 4, lambda n, x: x + 2, s)),
        program(mask_fn=lambda b, h, q, k: q > k),
        program(mask_fn=lambda b, h, q, k: k > q),
    ]
    assert [[a == b for b in different] for a in different] == np.eye(len(different), dtype=bool).tolist()
    assert different[0] != "a program"


# torch.


def test_torch_func() -> None:
    """torch.func.grad goes through einsum; blocks would have to be kept there."""
    q, k, v, table = map(torch.from_numpy, (*SMALL, TABLE))

    def loss(table: torch.Tensor, implementation: str | None = None) -> torch.Tensor:
        return (attend_torch.attend(q, k, v, score_fn=relative(table), implementation=implementation) ** 2).sum()

    leaf = table.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, "blockwise"), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(table), expected, rtol=1e-4, atol=1e-5)
    batched = torch.func.vmap(torch.func.grad(loss))(torch.stack([table, table]))
    torch.testing.assert_close(batched[1], expected, rtol=1e-4, atol=1e-5)
    along = table**2
    _, pushed = torch.func.jvp(loss, (table,), (along,))
    torch.testing.assert_close(pushed, (expected * along).sum(), rtol=1e-4, atol=1e-5)
    with pytest.raises(UnsupportedError, match="cannot compute scores again"):
        torch.func.grad(lambda table: loss(table, "blockwise"))(table)


@pytest.mark.parametrize("implementation", ["einsum", "blockwise"])
def test_torch_second_derivatives(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those forward."""
    monkeypatch.setattr(torch_rowwise, "LOGITS", 2 * 2 * 4)
    inputs = [torch.from_numpy(x[:1, :2, :4, :3]).clone().requires_grad_() for x in (Q, K, V)]
    table = torch.from_numpy(TABLES["relative"][:2]).clone().requires_grad_()

    def run(*arrays: torch.Tensor) -> Any:
        return attend_torch.attend(*arrays[:3], score_fn=relative(arrays[3]), mask_fn=strided, return_lse=True,
                                   softcap=2.0, implementation=implementation)  # fmt: skip

    assert torch.autograd.gradcheck(run, (*inputs, table), fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, (*inputs, table), fast_mode=True)


@pytest.mark.parametrize("implementation", ["einsum", "blockwise"])
def test_torch_compile(implementation: str, small_blocks: None) -> None:
    """The whole graph at once, with the gradient of what is captured."""
    arrays = [torch.from_numpy(x.astype(np.float32)) for x in (Q, K, V)]
    tables = [torch.from_numpy(TABLE).clone().requires_grad_() for _ in range(2)]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return attend_torch.attend(q, k, v, score_fn=relative(table), mask_fn=strided, is_causal=True, q_offset=4,
                                   implementation=implementation)  # fmt: skip

    torch.compiler.reset()
    outs = [run(*arrays, tables[0]), torch.compile(run, fullgraph=True, backend="aot_eager")(*arrays, tables[1])]
    torch.testing.assert_close(outs[1], outs[0])
    found = [torch.autograd.grad((out**2).sum(), table)[0] for out, table in zip(outs, tables, strict=True)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_torch_autocast_does_not_reach_the_function() -> None:
    seen = []

    def look(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        seen.append((score.dtype, torch.is_autocast_enabled("cpu")))
        return score

    q, k, v = map(torch.from_numpy, SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend_torch.attend(q, k, v, score_fn=look).dtype == torch.bfloat16
    assert seen == [(torch.float32, False)]

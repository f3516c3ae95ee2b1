"""attend in JAX: under jit, grad, vmap, jvp, scan, remat and shard_map, with NumPy arrays, with and without x64."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attend_jax import attend, explain, merge
from attend_jax.implementations import einsum as einsum_file
from attend_shared import oracle, philox
from attend_shared.errors import UnsupportedError

B, H, HK, N, D = 2, 4, 2, 6, 8
CLOSE = {"rtol": 2e-5, "atol": 4e-6}  # the same float32 sums in another order, of values of size 1
SERVING = [name for name, reason in explain(*[np.zeros((B, H, N, D), np.float32)] * 3).rows if reason is None]
EACH = pytest.mark.parametrize("implementation", SERVING)


# What is tested here is which programs are made; parity tests run them as XLA makes them by default.
pytestmark = pytest.mark.usefixtures("compile_fast")


def draw(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def qkv(i: int = N, j: int = N) -> tuple[jax.Array, ...]:
    shapes = (B, H, i, D), (B, HK, j, D), (B, HK, j, D)
    return tuple(jnp.asarray(draw(*shape, seed=n)) for n, shape in enumerate(shapes))


def with_empty_rows() -> np.ndarray:
    """(b, 1, i, j): row 1 of item 0 allows no key, nor does item 1 allow any row but its last."""
    mask = np.ones((B, 1, N, N), np.bool_)
    mask[0, 0, 1] = False
    mask[1, 0, :-1] = False
    return mask


def einsum(*inputs: Any, **options: Any) -> Any:
    return attend(*inputs, implementation="einsum", **options)


def kept(out: Any) -> np.ndarray:
    """The keep mask, seen in the output of equal logits on an identity for v."""
    return np.asarray(out) > 0


def equal_logits(n: int = 8) -> tuple[jax.Array, ...]:
    zeros = jnp.zeros((B, H, n, D))
    return zeros, zeros, jnp.broadcast_to(jnp.eye(n), (B, H, n, n))


def assert_same(ours: Any, theirs: Any, **tolerance: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or CLOSE)), ours, theirs)


def value_and_gradients(function: Callable[..., Any], *inputs: Any) -> Any:
    """out, and the gradients of sin(out)."""

    def loss(*inputs: Any) -> Any:
        out = function(*inputs)
        return jnp.sin(out).sum(), out

    gradients, out = jax.grad(loss, tuple(range(len(inputs))), has_aux=True)(*inputs)
    return out, gradients


# Under one transformation at a time, every implementation.


@EACH
def test_jit_and_remat_change_nothing(implementation: str) -> None:
    mask = jnp.asarray(with_empty_rows())

    def run(q: Any, k: Any, v: Any) -> Any:
        return attend(q, k, v, mask, is_causal=True, implementation=implementation)

    expected = value_and_gradients(run, *qkv())
    assert_same(jax.jit(lambda *inputs: value_and_gradients(jax.checkpoint(run), *inputs))(*qkv()), expected)


@EACH
def test_vmap_is_a_loop(implementation: str) -> None:
    """Over everything that is data, gradients included."""
    lengths, offsets = jnp.array([[6, 2], [0, 9], [3, 3]]), jnp.array([0, -2, 3])
    queries, masks = draw(3, B, H, N, D, seed=5), draw(3, B, N, seed=6) < 0.7

    def run(q: Any, mask: Any, lengths: Any, offset: Any) -> Any:
        options = {"is_causal": True, "kv_lengths": lengths, "q_offset": offset, "implementation": implementation}
        return value_and_gradients(lambda q: attend(q, *qkv()[1:], mask, **options), q)

    lanes = [jnp.asarray(x) for x in (queries, masks, lengths, offsets)]
    alone = [run(*(x[n] for x in lanes)) for n in range(3)]
    assert_same(jax.jit(jax.vmap(run))(*lanes), jax.tree.map(lambda *parts: jnp.stack(parts), *alone))


@EACH
def test_a_scan_with_a_traced_offset_decodes_what_one_causal_call_gives(implementation: str) -> None:
    """Token by token against a cache that fills, and in chunks of two."""
    q, k, v = qkv()
    whole = attend(q, k, v, is_causal=True, implementation=implementation)

    def decode(size: int) -> Any:
        def step(cache: tuple, at: Any) -> tuple:
            rows = [jax.lax.dynamic_slice_in_dim(x, at, size, 2) for x in (q, k, v)]
            new = zip(cache, rows[1:], strict=True)
            cache = tuple(jax.lax.dynamic_update_slice_in_dim(*pair, at, 2) for pair in new)
            return cache, attend(rows[0], *cache, is_causal=True, q_offset=at, implementation=implementation)

        empty = jnp.full_like(k, 7.0), jnp.full_like(v, 7.0)  # what is not filled yet is ahead, and so not allowed
        _, parts = jax.lax.scan(step, empty, jnp.arange(0, N, size))  # (steps, b, h, size, d)
        return jnp.moveaxis(parts, 0, 2).reshape(B, H, N, D)

    assert_same(jax.jit(decode, static_argnums=0)(1), whole)
    assert_same(jax.jit(decode, static_argnums=0)(2), whole)


@EACH
def test_forward_mode_is_right_or_an_error(implementation: str) -> None:
    q, k, v = qkv()
    direction = jnp.asarray(draw(B, H, N, D, seed=9))

    def along(name: str) -> Any:
        return jax.jvp(lambda q: attend(q, k, v, is_causal=True, implementation=name), (q,), (direction,))

    try:
        found = along(implementation)
    except TypeError as error:
        assert "forward-mode" in str(error)
        assert implementation not in ("einsum", "xla")
    else:
        assert_same(found, along("einsum"))


@EACH
def test_empty_rows_make_no_nan_on_the_way(implementation: str, little_garbage: None) -> None:
    """Under JAX's own watch for NaN and for tracers that get out, with every cause of an empty row."""
    bias = np.zeros((1, 1, N, N), np.float32)
    bias[0, 0, :1] = -np.inf
    options = {"mask": with_empty_rows(), "bias": bias, "kv_lengths": np.array([4, 0]), "q_lengths": np.array([5, 6])}
    with jax.debug_nans(True), jax.checking_leaks():
        out, gradients = jax.jit(partial(value_and_gradients, partial(
            attend, **options, is_causal=True, implementation=implementation
        )))(*qkv())  # fmt: skip
        assert np.isfinite(out).all()
        assert all(np.isfinite(x).all() for x in gradients)
    assert (np.abs(out).sum((1, 3)) > 0).tolist() == [[False, False, True, True, True, False], [False] * 6]


@EACH
def test_strict_promotion_with_x64(implementation: str) -> None:
    """No dtype is widened unasked, whatever the integers are. Without x64 all of these tests run so: see conftest."""
    assert jax.config.jax_numpy_dtype_promotion == "strict"
    ids = np.arange(B * N, dtype=np.uint8).reshape(B, N) // 4
    bias = np.zeros((1, 1, N, N), np.float32)
    options: dict[str, Any] = {"mask": with_empty_rows(), "bias": bias, "window_size": (3, 1)}
    with jax.enable_x64(True):
        options |= {"q_segment_ids": ids, "kv_segment_ids": jnp.asarray(ids, jnp.int32)}
        options |= {"q_offset": np.array([0, 1], np.int16), "kv_lengths": np.array([2, 6])}
        run = partial(value_and_gradients, partial(attend, **options, implementation=implementation))
        out, gradients = jax.jit(run)(*qkv())
    assert {x.dtype for x in (out, *gradients)} == {np.dtype(np.float32)}


@EACH
def test_no_axis_is_added_unseen(implementation: str) -> None:
    """As by chex and some models, which ask JAX to raise where arrays of unlike ranks meet."""
    options: dict[str, Any] = {"mask": with_empty_rows(), "kv_lengths": np.array([2, 6]), "q_lengths": np.array([5, 6])}
    options |= {"q_offset": np.array([0, 1]), "window_size": (3, 1), "q_segment_ids": np.zeros((B, N), np.int32)}
    more = {"softcap": 3.0, "bias": jnp.zeros((1, 1, N, N)), "dropout": 0.2, "dropout_seed": 1, "return_lse": True}

    def loss(sinks: jax.Array | None, **options: Any) -> jax.Array:
        found = attend(*qkv(), sinks=sinks, **options, implementation=implementation)
        return sum((x.sum() for x in jax.tree.leaves(found)), jnp.float32(0))

    with jax.numpy_rank_promotion("raise"):
        loss(None, **options)
        with suppress(UnsupportedError):
            jax.grad(partial(loss, **options, **more))(jnp.zeros(H))


# Dropout seeds.


@pytest.mark.parametrize(
    "seed", [0, 7, 2**31, 2**32 + 1, 2**63, 2**64 - 1, np.uint64(2**64 - 1), np.int64(5), np.uint32(2**31)], ids=repr
)
def test_int_seeds(seed: Any) -> None:
    expected = philox.keep_mask(int(seed), (B, H, 8, 8), 0.4)
    np.testing.assert_array_equal(kept(einsum(*equal_logits(), dropout=0.4, dropout_seed=seed)), expected)


def test_traced_seeds_and_seeds_by_lane() -> None:
    seeds = np.array([[7, 0], [1, 2**31], [2**32 - 1, 2**32 - 1]], np.uint32)
    expected = [philox.keep_mask(seed, (B, H, 8, 8), 0.4) for seed in seeds]

    def run(seed: Any) -> Any:
        return einsum(*equal_logits(), dropout=0.4, dropout_seed=seed)

    np.testing.assert_array_equal(kept(jax.jit(run)(seeds[1])), expected[1])
    np.testing.assert_array_equal(kept(jax.vmap(run)(seeds)), expected)
    _, scanned = jax.lax.scan(lambda carry, seed: (carry, run(seed)), None, jnp.asarray(seeds))
    np.testing.assert_array_equal(kept(scanned), expected)


# Derivatives of einsum, to the second order.

SIZES = {"q": (1, 2, 3, 2), "k": (1, 1, 4, 2), "v": (1, 1, 4, 3), "bias": (1, 2, 1, 4), "sinks": (2,)}
HOLES = np.zeros((1, 2, 1, 4), np.bool_)
HOLES[0, 1, 0, 2] = True
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal, empty rows": {"mask": np.array([[False, True, True, False]]), "is_causal": True, "q_offset": 0},
    "softcap, window": {"softcap": 1.5, "window_size": (1, None), "q_offset": 1},
    "dropout": {"dropout": 0.4, "dropout_seed": 3},
    "lengths": {"q_lengths": np.array([2]), "kv_lengths": np.array([3])},
}


def tiny(seed: int = 0) -> dict[str, np.ndarray]:
    return {name: draw(*shape, seed=seed + n, dtype=np.float64) for n, (name, shape) in enumerate(SIZES.items())}


def loss(data: dict[str, Any], options: dict[str, Any]) -> Any:
    """Of out and lse, with -inf in the bias and in the lse of empty rows."""
    data = data | {"bias": jnp.where(HOLES, -jnp.inf, data["bias"])}
    out, lse = einsum(**data, **options, return_lse=True)
    return jnp.sin(out).sum() + jnp.cos(jnp.where(lse == -jnp.inf, 0, lse)).sum()


def oracle_gradient(data: dict[str, np.ndarray], options: dict[str, Any]) -> dict[str, np.ndarray]:
    """The gradient of `loss`, by the oracle's hand."""
    given = data | {"bias": np.where(HOLES, -np.inf, data["bias"])} | options
    answer = oracle.attend(**given)
    finite = np.where(np.isfinite(answer.lse), answer.lse, 0.0)
    return oracle.backward(**given, out_cotangent=np.cos(answer.out), lse_cotangent=-np.sin(finite))


@pytest.mark.parametrize("feature", FEATURES)
def test_first_and_second_derivatives_against_the_oracle(feature: str) -> None:
    """Reverse, forward, and forward over reverse; the second by differences of the oracle's gradients."""
    data, direction, options, step = tiny(), tiny(9), FEATURES[feature], 1e-5

    def at(scale: float) -> dict[str, np.ndarray]:
        return oracle_gradient({name: x + scale * direction[name] for name, x in data.items()}, options)

    first, ahead, behind = at(0.0), at(step), at(-step)
    with jax.enable_x64(True):

        @jax.jit
        def derivatives(data: Any, direction: Any) -> Any:
            gradient = jax.grad(loss)
            _, along = jax.jvp(lambda d: loss(d, options), (data,), (direction,))
            return along, *jax.jvp(lambda d: gradient(d, options), (data,), (direction,))

        along, gradient, second = derivatives(data, direction)
    for name in data:
        np.testing.assert_allclose(gradient[name], first[name], rtol=1e-12, atol=1e-13)
        difference = (ahead[name] - behind[name]) / (2 * step)  # right to step**2, some 1e-9 here
        np.testing.assert_allclose(second[name], difference, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(along, sum((first[name] * direction[name]).sum() for name in first), rtol=1e-12)


def test_hessian_is_symmetric_and_jacobians_agree() -> None:
    data = tiny()
    others = {name: x for name, x in data.items() if name != "q"}
    with jax.enable_x64(True):

        def of_q(q: Any) -> Any:
            return loss({"q": q, **others}, FEATURES["softcap, window"])

        full, other = jax.jit(lambda q: (jax.hessian(of_q)(q), jax.jacrev(jax.jacfwd(of_q))(q)))(data["q"])
        forward, reverse = jax.jit(lambda q: (jax.jacfwd(of_q)(q), jax.jacrev(of_q)(q)))(data["q"])
    n = data["q"].size
    assert np.abs(full).sum() > 0
    np.testing.assert_allclose(full, other, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(forward, reverse, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(full.reshape(n, n), full.reshape(n, n).T, rtol=1e-10, atol=1e-13)


def test_what_comes_back_through_an_lse_of_minus_infinity_is_ignored() -> None:
    """Not only 0: lse**2 sends back -inf. A sink of -inf is no sink, here too."""

    def squares(data: Any) -> Any:
        return (einsum(**data, mask=with_empty_rows(), return_lse=True)[1] ** 2).sum()

    data = dict(zip("qkv", qkv(), strict=True)) | {"bias": jnp.zeros((1, H, N, N)), "sinks": jnp.full(H, -jnp.inf)}
    gradients = jax.grad(squares)(data)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
    assert not gradients["sinks"].any()
    assert not gradients["q"][0, :, 1].any()
    assert gradients["q"][0, :, 0].any()


def test_merge_under_transformations() -> None:
    q, k, v = qkv()

    def split(q: Any) -> Any:
        parts = [einsum(q, k[:, :, part], v[:, :, part], return_lse=True) for part in (slice(0, 2), slice(2, None))]
        return merge(*zip(*parts, strict=True))

    def whole(q: Any) -> Any:
        return einsum(q, k, v, return_lse=True)

    def both(function: Callable[[Any], Any]) -> Any:
        def loss(q: Any) -> Any:
            return sum(jnp.sin(x).sum() for x in function(q))

        return jax.jit(jax.vmap(jax.value_and_grad(loss)))(jnp.stack([q, -q]))

    assert_same(both(split), both(whole))


# Arrays.


def test_numpy_arrays_are_taken_as_they_are() -> None:
    """int64 lengths, offsets and ids too: NumPy makes those unasked."""
    q, k, v = (np.asarray(x) for x in qkv())
    options: dict[str, Any] = {
        "mask": with_empty_rows(),
        "q_offset": np.array([0, 1]),
        "q_segment_ids": np.arange(B * N).reshape(B, N) // 4,
        "q_lengths": np.array([6, 2**40]),
        "kv_lengths": np.array([3, -(2**40)]),
    }
    copies = {name: x.copy() for name, x in options.items()}
    out, lse = einsum(q, k, v, **options, is_causal=True, return_lse=True)
    assert isinstance(out, jax.Array)
    expected = oracle.attend(q, k, v, **options, is_causal=True)
    assert_same((out, lse), (expected.out, expected.lse))
    for name, copy in copies.items():
        np.testing.assert_array_equal(options[name], copy)
        assert options[name].dtype == copy.dtype
    narrow = options | {"q_offset": np.array([0, 1], np.uint8), "kv_lengths": np.array([3, 0], np.int8),
                        "q_lengths": np.array([6, 255], np.uint64)}  # fmt: skip
    assert_same(einsum(q, k, v, **narrow, is_causal=True, return_lse=True), (out, lse), rtol=0)


@pytest.mark.parametrize("offset", [2**31, -(2**31) - 1, 2**40, 2**63, -(2**70), np.int64(2**40), np.uint64(2**63)])
def test_offsets_beyond_32_bits(offset: Any) -> None:
    out = einsum(*qkv(), window_size=(1, None), q_offset=offset)
    assert (np.asarray(out) == 0).all() if offset > 0 else (np.asarray(out) != 0).all()
    assert_same(einsum(*qkv(), is_causal=True, q_offset=offset), 0 * out if offset < 0 else einsum(*qkv()))


def test_x64_computes_in_float64_and_takes_wide_integers() -> None:
    wide = [np.asarray(x, np.float64) for x in qkv()]
    options = {"q_segment_ids": np.full((B, N), 2**40), "kv_lengths": np.array([2**40, 3]), "q_offset": np.array(1),
               "window_size": (3, 2)}  # fmt: skip
    options["q_segment_ids"][:, 3:] += 2**32  # the same in 32 bits
    with jax.enable_x64(True):
        out, lse = einsum(*wide, **options, return_lse=True)
        assert (out.dtype, lse.dtype) == (np.float64, np.float64)
        traced = jax.jit(lambda data: einsum(*wide, **data, window_size=(3, 2)))
        again = traced({name: x for name, x in options.items() if name != "window_size"})
    expected = oracle.attend(*wide, **options)
    assert_same((out, lse, again), (expected.out, expected.lse, expected.out), rtol=1e-12, atol=1e-13)


def test_float64_is_refused_rather_than_shrunk() -> None:
    with pytest.raises(TypeError, match=r"^q: expected a dtype that JAX keeps, got float64 of shape \(2, 4, 6, 8\)\. "):
        attend(*(np.asarray(x, np.float64) for x in qkv()))


@EACH
def test_eval_shape(implementation: str) -> None:
    def run(*inputs: Any) -> Any:
        return attend(*inputs, is_causal=True, implementation=implementation)

    out, gradients = jax.eval_shape(lambda *inputs: value_and_gradients(run, *inputs), *qkv())
    assert (out.shape, out.dtype) == ((B, H, N, D), np.float32)
    assert [x.shape for x in gradients] == [x.shape for x in qkv()]


def test_the_dtype_of_lse() -> None:
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in qkv()]
    out, lse = jax.eval_shape(lambda *inputs: einsum(*inputs, return_lse=True), *shapes)
    assert (out.shape, out.dtype) == ((B, H, N, D), jnp.bfloat16)
    assert (lse.shape, lse.dtype) == ((B, H, N), np.float32)


def test_explain_needs_shapes_only() -> None:
    data: dict[str, Any] = {
        "mask": np.ones((B, N), np.bool_),
        "bias": np.zeros((1, H, N, N), np.float32),
        "sinks": np.zeros(H, np.float32),
        "q_offset": np.zeros(B, np.int32),
        "q_segment_ids": np.zeros((B, N), np.int32),
        "q_lengths": np.zeros(B, np.int64),
        "kv_lengths": np.zeros(B, np.int32),
        "dropout_seed": np.zeros(2, np.uint32),
    }
    data |= dict(zip("qkv", qkv(), strict=True))
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in data.items()}
    for options in ({}, {"dropout": 0.1}, {"is_causal": True, "implementation": ["xla", "einsum"]}):
        assert explain(**shapes, **options) == explain(**data, **options)
    traced = []
    jax.eval_shape(lambda *inputs: traced.append(explain(*inputs)), *(shapes[name] for name in "qkv"))
    assert traced == [explain(*qkv())]


# What is compiled, and how often.


def test_one_compilation_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """New numbers, whether Python ints, NumPy or JAX arrays, are data; only what makes another program is traced."""
    traced, original = [], einsum_file.attend
    monkeypatch.setattr(einsum_file, "attend", lambda *arguments: traced.append(None) or original(*arguments))
    q, k, v = (x[:1] for x in qkv(4, 7))  # shapes that no other test has

    def over(name: str, *values: Any, **options: Any) -> int:
        before = len(traced)
        for value in values:
            einsum(q, k, v, **{name: value}, **options)
        return len(traced) - before

    window = {"window_size": (2, 1)}
    assert over("q_offset", 1, 2, np.int64(1), np.array(2), jnp.int32(1), jnp.array(2, jnp.int16), **window) == 1
    assert over("q_offset", np.array([1]), jnp.array([2]), **window) == 1  # (b,) is another shape
    assert over("q_offset", 0, 0, **window) == 1  # kinds of their own, which kernels have
    assert over("q_offset", 3, 3, **window) == 1
    seeds = (1, 2**40, np.uint64(7), np.array([1, 2], np.uint32), jnp.array([3, 4], jnp.uint32))
    assert over("dropout_seed", *seeds, dropout=0.5) == 1
    assert over("dropout_seed", *seeds) == 1  # without dropout it is not even passed on
    lengths = (np.array([1]), np.array([9], np.int32), np.array([3], np.uint8), jnp.array([0]))
    assert over("kv_lengths", *lengths) == 1
    assert over("scale", 0.5, np.float32(0.5), np.float64(0.5)) == 1
    assert over("window_size", (1, 0), [1, 0], (np.int64(1), 0), q_offset=0) == 1
    assert over("is_causal", True, np.True_, q_offset=0) == 1


def test_a_call_inside_jit_is_traced_once() -> None:
    traced = []

    @jax.jit
    def run(q: Any, k: Any, v: Any, offset: Any) -> Any:
        traced.append(None)
        return einsum(q, k, v, is_causal=True, q_offset=offset)

    for offset in (0, 1, -1):
        assert_same(run(*qkv(), offset), einsum(*qkv(), is_causal=True, q_offset=offset))
    assert len(traced) == 1


def test_uncompiled_it_says_the_same() -> None:
    options = {"mask": with_empty_rows(), "is_causal": True, "return_lse": True}
    expected = einsum(*qkv(), **options)
    with jax.disable_jit():
        assert_same(einsum(*qkv(), **options), expected)


def test_nothing_global_is_touched() -> None:
    before = dict(jax.config.values)
    for options in ({}, {"is_causal": True}, {"dropout": 0.5, "dropout_seed": 1}, {"return_lse": True}):
        for name, refused in explain(*qkv(), **options).rows:
            if refused is None:
                jax.eval_shape(lambda *inputs, o=options, n=name: attend(*inputs, **o, implementation=n), *qkv())
    attend(*qkv())
    assert dict(jax.config.values) == before


# Two devices, which only a process of its own can have on a CPU.

SCRIPT = """
    import json

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

    from attend_jax import attend, merge

    devices = jax.devices()
    assert len(devices) == 2
    mesh = Mesh(np.array(devices), ("x",))
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((4, 4, 6, 8)), jnp.float32) for _ in range(3))
    mask = jnp.asarray(rng.random((4, 6)) < 0.7)
    seeds = jnp.array([[1, 2], [3, 4]], jnp.uint32)
    found = {}


    def distance(a, b):
        return float(jnp.abs(jnp.asarray(np.asarray(a)) - jnp.asarray(np.asarray(b))).max())


    def shard_map(function, specs, out):
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out))


    # Over the batch and over the heads, gradients too, against one call on all of it.
    for name, spec, masks in (
        ("einsum", P("x"), P("x")), ("einsum", P(None, "x"), P()), ("blockwise", P("x"), P("x")),
    ):
        def run(q, k, v, mask):
            def loss(q):
                out = attend(q, k, v, mask, is_causal=True, implementation=name)
                return jnp.sin(out).sum(), out
            gradient, out = jax.grad(loss, has_aux=True)(q)
            return out, gradient
        parts = shard_map(run, (spec, spec, spec, masks), (spec, spec))(q, k, v, mask)
        found[f"{name} {spec}"] = max(map(distance, parts, run(q, k, v, mask)))

    # Dropout counts a shard's own indices: with a seed each, a shard is a call.
    def dropped(q, k, v, seed):
        return attend(q, k, v, dropout=0.5, dropout_seed=seed[0], implementation="einsum")
    parts = shard_map(dropped, (P("x"),) * 4, P("x"))(q, k, v, seeds)
    alone = [dropped(q[n : n + 2], k[n : n + 2], v[n : n + 2], seeds[n // 2 :]) for n in (0, 2)]
    found["dropout"] = distance(parts, jnp.concatenate(alone))

    # Keys over devices: each its part, then merge. Queries over devices: keys that all share have one gradient.
    for name in ("einsum", "blockwise"):
        def partial(q, k, v):
            out, lse = attend(q, k, v, return_lse=True, implementation=name)
            return out[None], lse[None]
        outs, lses = shard_map(partial, (P(), P(None, None, "x"), P(None, None, "x")), P("x"))(q, k, v)
        found[f"{name} keys over devices"] = distance(merge(list(outs), list(lses))[0], attend(q, k, v))

        def gradient(k, q, v, at):
            return jax.grad(lambda k: jnp.sin(attend(
                q, k, v, is_causal=True, q_offset=at, sinks=jnp.zeros(4), implementation=name)).sum())(k)
        starts = jnp.array([0, 3])
        summed = shard_map(lambda k, q, v, at: gradient(k, q, v, at[0]), (P(), P(None, None, "x"), P(), P("x")), P())
        found[f"{name} queries over devices"] = distance(summed(k, q, v, starts), gradient(k, q, v, 0))

    # Arrays that are spread already, without shard_map: XLA cuts the work.
    spread = [jax.device_put(x, NamedSharding(mesh, P("x"))) for x in (q, k, v, mask)]
    out = attend(*spread, implementation="einsum")
    found["spread"] = distance(out, attend(q, k, v, mask, implementation="einsum"))
    found["devices of out"] = len(out.devices())

    # A wrong device.
    here = [jax.device_put(x, devices[0]) for x in (q, k, v)]
    texts = {}
    others = {"k": k, "mask": mask, "bias": q[:, :, :, :6], "kv_lengths": jnp.full(4, 6), "q_offset": jnp.full(4, 0),
              "sinks": jnp.zeros(4), "dropout_seed": seeds[0], "q_segment_ids": jnp.zeros((4, 6), jnp.int32)}
    for name, x in others.items():
        arguments = dict(zip("qkv", here)) | {name: jax.device_put(x, devices[1])}
        try:
            attend(**arguments)
        except Exception as error:
            texts[name] = [type(error).__name__, str(error), str(devices[0]), str(devices[1])]
    try:
        merge([here[0], here[0]], [jnp.zeros((4, 4, 6)), jax.device_put(jnp.zeros((4, 4, 6)), devices[1])])
    except Exception as error:
        texts["merge"] = [type(error).__name__, str(error), str(devices[0]), str(devices[1])]
    found["texts"] = texts
    # What is not committed, or NumPy, goes where q is.
    there = [jax.device_put(x, devices[1]) for x in (q, k, v)]
    out = attend(*there, mask, kv_lengths=np.full(4, 6))
    found["follows q"] = out.devices() == {devices[1]}
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def two_devices() -> dict[str, Any]:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_shard_map(two_devices: dict[str, Any]) -> None:
    distances = {name: x for name, x in two_devices.items() if isinstance(x, float)}
    assert len(distances) == 9
    assert max(distances.values()) < 1e-5, distances
    assert two_devices["devices of out"] == 2


def test_another_device_is_a_wrong_argument(two_devices: dict[str, Any]) -> None:
    """In the words that test_wrong_calls holds torch to."""
    found = two_devices["texts"]
    assert len(found) == 9
    for name, (error, text, home, place) in found.items():
        argument, first = ("lses[1]", "outs[0]") if name == "merge" else (name, "q")
        expected = f"{argument}: expected device {home}, where {first} is, got {place}. Move it there first."
        assert (error, text) == ("ValueError", expected)
    assert two_devices["follows q"] is True

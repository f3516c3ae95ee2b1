"""FlashAttention-3 in JAX: what is refused and why, and how a call is put to the package, proved against the oracle.

What it shares with FlashAttention-4 is in test_fa4.py. The package does not run on a CPU, where `flash_fakes` stands in
for it.
"""

import ast
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

import attend_jax
import attend_jax.bridge
import flash_fakes
from attend_jax.arrays import SHAPES
from attend_jax.implementations import fa3, triton
from attend_shared import compare, flash
from attend_shared.call import Arrays, Call, check

INSTALL = 'pip install "attend-twin[fa3-jax]"'
ALL = {"dew-flash-attn-cu13": "0.3.6", "jax": "0.11.2", "jax-cuda13-plugin": "0.11.2"}
OFFSET = "it aligns causal and window with the last key, so q_offset must be the number 0 or kv_len - q_len"
SINKS = "its gradient of sinks is made of an out that is rounded to bfloat16, too coarse for"
NOT_LOOKED = "it takes segments that lie one after the other, and whether these do was not looked at"
WIDE = "it counts the numbers of an item in 32 bits, which these exceed"


def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def call_of(**options: Any) -> Call:
    static = {name: options.pop(name, default) for name, default in
              (("is_causal", False), ("window_size", None), ("softcap", None), ("scale", None), ("dropout", 0.0),
               ("return_lse", False))}  # fmt: skip
    arrays = Arrays(**{name: shape(2, 4, 96, 64) for name in "qkv"} | options)
    return check(SHAPES, arrays, *static.values(), "bhnd", None)._replace(platform="cuda")


LENGTHS, IDS, SHORT = shape(2, dtype=jnp.int32), shape(2, 96, dtype=jnp.int32), shape(2, 4, 8, 64)
ONE_ITEM = {name: shape(1, 4, 96, 64) for name in "qkv"} | {"q_segment_ids": shape(1, 96, dtype=jnp.int32)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, None),
        ({name: shape(2, 4, 96, 64, dtype=jnp.float16) for name in "qkv"}, None),
        ({"is_causal": True}, None),
        ({"window_size": (5, 3)}, None),
        ({"q": SHORT, "is_causal": True, "q_offset": 88}, None),
        ({"q": SHORT, "is_causal": True, "q_offset": 0}, None),
        ({"k": SHORT, "v": SHORT, "is_causal": True, "q_offset": -88}, None),
        ({"k": shape(2, 2, 96, 64), "v": shape(2, 2, 96, 64)}, None),
        ({"v": shape(2, 4, 96, 20)}, None),
        ({name: shape(2, 4, 96, 64, dtype=jnp.float32) for name in "qkv"},
         "it takes float16 and bfloat16, not float32"),
        ({"v": shape(2, 4, 96, 264)}, "it takes head sizes of up to 256, not 264"),
        ({name: shape(1, 65536, 8, 64) for name in "qkv"}, "it takes up to 65535 items and heads"),
        ({name: shape(1, 128, 131072, 128) for name in "qkv"}, WIDE),
        ({name: shape(4, 32, 131072, 128) for name in "qkv"}, None),
        ({"mask": shape(2, 96, dtype=bool)}, "it has no mask"),
        ({"bias": shape(1, 4, 96, 96)}, "it has no bias"),
        (ONE_ITEM, NOT_LOOKED),
        ({"q_segment_ids": IDS},
         "it takes segments of one item, not of 2, as a tile of packed keys may reach into the next item and bring NaN "
         "from there: put all in one row, with ids of their own"),
        (ONE_ITEM | {"kv_lengths": shape(1, dtype=jnp.int32)},
         "beside segments it has no lengths: give padding an id of its own instead"),
        ({"kv_lengths": LENGTHS}, "it has no lengths"),
        ({"q_lengths": LENGTHS}, "it has no lengths"),
        ({"dropout": 0.1, "dropout_seed": 0}, "it has no dropout"),
        ({"softcap": 30.0}, "it has no softcap"),
        ({"sinks": shape(4)}, None),
        ({"sinks": shape(4, dtype=jnp.float32)}, f"{SINKS} float32"),
        ({"sinks": shape(4, dtype=jnp.float16)}, f"{SINKS} float16"),
        ({"return_lse": True}, None),
        ({"scale": 0.0}, "it looks for the largest logit before it scales, which takes a scale > 0"),
        ({"scale": -1.0}, "it looks for the largest logit before it scales, which takes a scale > 0"),
        ({"is_causal": True, "q_offset": 3}, OFFSET),
        ({"is_causal": True, "q_offset": LENGTHS}, OFFSET),
    ],
)  # fmt: skip
def test_what_is_refused(options: dict[str, Any], words: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    call = call_of(**options)
    assert fa3.refusal(call) == words
    assert fa3.refusal(call._replace(platform="cpu")) == "it runs on an NVIDIA GPU"


def test_sinks_and_lse_take_kernels_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "unavailable", lambda: "it needs what is not here")
    words = [f"its gradient of {x} is made by Triton's kernels: it needs what is not here" for x in ("sinks", "lse")]
    calls = [call_of(**options) for options in ({"sinks": shape(4)}, {"return_lse": True}, {})]
    assert [fa3.refusal(call) for call in calls] == [*words, None]
    assert [fa3.refusal(call._replace(gradient=False)) for call in calls] == [None] * 3


@pytest.mark.parametrize(("count", "words"), [(65535, WIDE), (65536, "it takes up to 65535 segments"), (4095, None)])
def test_many_segments(count: int, words: str | None) -> None:
    """Each is a block of a grid, and filled up."""
    call = call_of(**ONE_ITEM)._replace(runs="packed", sequences=count)
    assert fa3.refusal(call) == words


def test_how_many_segments_there_are(fakes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    refusal = fa3.refusal
    monkeypatch.setattr(fa3, "refusal", lambda call: seen.append(call.sequences) or refusal(call))
    q = draw(1, 1, 9, 8)
    for ids in (np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2]]), np.arange(9)[None]):
        attend_jax.attend(q, q, q, q_segment_ids=ids, implementation="fa3")
    assert [count for count in seen if count] == [4, 16]  # powers of two


@pytest.mark.parametrize(
    ("installed", "words"),
    [
        ({}, f"it needs dew-flash-attn-cu13 0.3.6: {INSTALL}"),
        ({"dew-flash-attn-cu13": "0.4"}, f"it was proved with dew-flash-attn-cu13 0.3.6, not 0.4: {INSTALL}"),
        ({"jax": "0.10.2"}, f"it needs jax 0.11.2 or later, not 0.10.2: {INSTALL}"),
        ({"jax": "0.12"}, None),
        ({"jax-cuda13-plugin": None}, f"it needs jax-cuda13-plugin 0.11.2: {INSTALL}"),
        (ALL, None),
        ({"lost": "dew_flash_attn"}, f"dew-flash-attn-cu13 is here, but Python finds no dew_flash_attn: {INSTALL}"),
    ],
)
def test_what_is_installed(monkeypatch: pytest.MonkeyPatch, installed: dict[str, Any], words: str | None) -> None:
    there = {**ALL, **installed} if installed else {}

    def version(name: str) -> str:
        if there.get(name) is None:
            raise flash.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(flash, "version", version)
    monkeypatch.setattr(flash, "find_spec", lambda name: None if name == there.get("lost") else name)
    assert flash.missing(flash.DEW_FLASH_ATTN) == words


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fa3.unavailable() == fa3.MISSING == flash.missing(fa3.PACKAGE) is not None
    monkeypatch.setattr(fa3, "MISSING", None)
    assert fa3.unavailable() == "it needs an NVIDIA GPU"
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    older = "it was proved on compute capability 9.0 (Hopper), and this GPU has 8.0"
    for capability, words in (("9.0", None), ("8.0", older)):
        device = SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr("jax.devices", lambda device=device: [device])
        assert fa3.unavailable() == words


def test_nothing_of_theirs_is_imported_before_it_is_called() -> None:
    head = ast.parse(Path(fa3.__file__).read_text()).body
    names = [node.names[0].name for node in head if isinstance(node, ast.Import)]
    names += [str(node.module) for node in head if isinstance(node, ast.ImportFrom)]
    assert names
    assert not any(name.startswith("dew_flash_attn") for name in names)


BOUNDS = [(None, 0), (None, 3), (0, 0), (2, None), (1, 2), (9, 0), (0, 9)]


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("sizes", [(6, 6), (2, 6), (6, 2), (5, 1), (1, 5), (9, 4)])
@pytest.mark.parametrize("end", [False, True])
def test_what_has_no_part_is_cut_off(sizes: tuple[int, int], bounds: tuple, end: bool) -> None:
    """Then no bound is negative, no row is empty, and the pairs that are left are the same."""
    i, j = sizes
    at = j - i if end else 0
    options = {"q": shape(2, 4, i, 64), "k": shape(2, 4, j, 64), "v": shape(2, 4, j, 64)}
    call = call_of(**options, window_size=bounds, q_offset=at)
    query, key = np.arange(i)[:, None], np.arange(j)
    left, right = bounds
    ours = np.ones((i, j), bool)
    if left is not None:
        ours &= key >= query + at - left
    if right is not None:
        ours &= key <= query + at + right
    rows, keys = flash.reach(call)
    assert ours[rows].any(1).all()
    assert not np.delete(ours, range(i)[rows], 0).any()
    assert not ours[:, keys:].any()
    *_, causal, (left, right) = fa3._asked(call._replace(i=rows.stop - rows.start, j=keys), None)
    query, key = np.arange(rows.stop - rows.start)[:, None] + keys - (rows.stop - rows.start), np.arange(keys)
    theirs = np.ones_like(ours[rows, :keys])
    if left >= 0:
        theirs &= key >= query - left
    if right >= 0:
        theirs &= key <= query + right
    assert causal is (right == 0)
    np.testing.assert_array_equal(theirs, ours[rows, :keys])


@pytest.mark.parametrize(
    ("d", "dv", "expected"), [(64, 64, 64), (20, 20, 24), (80, 64, 80), (1, 100, 104), (256, 1, 256)]
)
def test_sizes(d: int, dv: int, expected: int) -> None:
    call = call_of(q=shape(2, 4, 8, d), k=shape(2, 4, 8, d), v=shape(2, 4, 8, dv))
    assert flash.size(call, fa3.PACKAGE) == expected


# Each program runs once.
pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_fakes.install(monkeypatch)


def test_right_wherever_it_serves(fakes: None) -> None:
    for case in flash_fakes.some(4, "lse", "softcap", "lengths")[3:]:
        problem = case.build()
        compare.check(attend_jax.bridge.evaluate(problem, "fa3"), problem)


def draw(*sizes: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(sizes), jnp.bfloat16)


def evaluated(name: str, i: int, j: int, **options: Any) -> tuple[np.ndarray, ...]:
    inputs = draw(2, 4, i, 16), draw(2, 2, j, 16, seed=1), draw(2, 2, j, 8, seed=2)
    out, pull = jax.vjp(lambda *x: attend_jax.attend(*x, implementation=name, **options), *inputs)
    return tuple(np.asarray(x, np.float32) for x in (out, *pull(draw(*out.shape, seed=3))))


@pytest.mark.parametrize("segments", [False, True])
def test_sinks(fakes: None, segments: bool) -> None:
    """Which the kernels have not: at any distance from the logits, -inf as well, and in packed sequences."""
    ids = np.array([[2, 2, 2, 0, 0, 1, 1, 1, 1]]) if segments else None

    def evaluated(name: str, dtype: Any) -> tuple[np.ndarray, ...]:
        inputs = [draw(1, h, 9, 16, seed=n).astype(dtype) for n, h in enumerate((4, 2, 2, 4))]
        sinks = jnp.array([0.5, -jnp.inf, 40.0, -30.0], dtype)
        out, pull = jax.vjp(
            lambda q, k, v, sinks: attend_jax.attend(
                q, k, v, sinks=sinks, is_causal=True, q_segment_ids=ids, kv_segment_ids=ids, implementation=name
            ), *inputs[:3], sinks,
        )  # fmt: skip
        return tuple(np.asarray(x, np.float64) for x in (out, *pull(inputs[3])))

    ours, theirs = evaluated("fa3", jnp.bfloat16), evaluated("einsum", jnp.float32)
    for mine, its in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, its, atol=0.02, rtol=0.02)
    assert (ours[-1][1], ours[-1][2] != 0, abs(ours[-1][3]) > 0) == (0, True, True)


@pytest.mark.parametrize(
    ("i", "j", "empty", "options"),
    [(5, 3, slice(0, 2), {"q_offset": -2}), (6, 2, slice(3, 6), {"q_offset": 0, "window_size": (1, 0)})],
)
def test_rows_without_a_key(fakes: None, i: int, j: int, empty: slice, options: dict[str, Any]) -> None:
    ours, theirs = (evaluated(name, i, j, is_causal=True, **options) for name in ("fa3", "einsum"))
    for mine, its in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, its, atol=0.03, rtol=0.02)
    for x in ours[:2]:
        assert not x[:, :, empty].any()


def test_rows_without_a_key_beside_sinks(fakes: None) -> None:
    """A sink of -inf is none: such a row has nothing at all, and is 0."""
    sinks = jnp.array([0.5, -jnp.inf, 40.0, -jnp.inf], jnp.bfloat16)

    def evaluated(name: str, dtype: Any) -> tuple[np.ndarray, ...]:
        q, k, v, dout = (draw(1, h, n, 16, seed=n).astype(dtype) for h, n in ((4, 5), (2, 3), (2, 3), (4, 5)))
        out, pull = jax.vjp(
            lambda q, k, v, sinks: attend_jax.attend(
                q, k, v, sinks=sinks, is_causal=True, q_offset=-2, implementation=name
            ), q, k, v, sinks.astype(dtype),
        )  # fmt: skip
        return tuple(np.asarray(x, np.float64) for x in (out, *pull(dout)))

    ours, theirs = evaluated("fa3", jnp.bfloat16), evaluated("einsum", jnp.float32)
    for mine, its in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, its, atol=0.03, rtol=0.02)
    assert not ours[0][:, :, :2].any()


def test_transforms(fakes: None) -> None:
    """Lanes are items of one call; forward mode raises."""
    q, k, v = draw(3, 2, 4, 7, 8), draw(2, 2, 7, 8, seed=1), draw(3, 2, 2, 7, 8, seed=2)

    def loss(q: Any, k: Any, v: Any) -> jax.Array:
        out = attend_jax.attend(q, k, v, is_causal=True, implementation="fa3")
        return jnp.sin(out.astype(jnp.float32)).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    together = jax.vmap(gradient, (0, None, 0))(q, k, v)
    apart = [gradient(q[n], k, v[n]) for n in range(3)]
    for lanes, each in zip(together, zip(*apart, strict=True), strict=True):
        np.testing.assert_array_equal(np.asarray(lanes, np.float32), np.asarray(jnp.stack(each), np.float32))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: loss(q, k, v[0]), (q[0],), (q[0],))


def test_in_a_shard_map_results_vary_as_inputs_do(fakes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel gives is typed as the same on every device, as what this stand-in gives is."""

    def forward(q: Any, *_: Any) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(q.shape, q.dtype), jnp.zeros((q.shape[0], q.shape[2], q.shape[1]))

    def backward(dout: Any, *kept: Any) -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros(x.shape, x.dtype) for x in kept[:3])

    monkeypatch.setattr(sys.modules["dew_flash_attn"], "_forward3", forward)
    monkeypatch.setattr(sys.modules["dew_flash_attn"], "_backward3", backward)

    def gradients(*floats: Any) -> Any:
        def loss(*floats: Any) -> jax.Array:
            return attend_jax.attend(*floats, implementation="fa3").astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1, 2))(*floats)

    specs = PartitionSpec(None, None, "x"), *(PartitionSpec(),) * 2  # each device has some queries, and all keys
    given = (shape(2, 4, 8, 16),) * 3
    mesh = AbstractMesh((2,), ("x",))
    found = jax.eval_shape(jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=specs), *given)
    assert [x.shape for x in found] == [x.shape for x in given]

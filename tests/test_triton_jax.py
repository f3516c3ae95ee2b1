"""Triton's kernels in JAX: batching, cotangents and shard_map, with stand-ins for what is launched."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import attend_jax
from attend_jax.arrays import FRAMEWORK as JAX
from attend_jax.implementations import einsum as jax_einsum
from attend_jax.implementations import triton as jax_triton
from attend_shared.call import Arrays, Call, canonical, check
from attend_shared.kernels import cache_folder


def by_einsum(call: Call, arrays: Arrays) -> tuple:
    ids = arrays.q_segment_ids if arrays.kv_segment_ids is None else arrays.kv_segment_ids
    return jax_einsum.attend(call, arrays._replace(kv_segment_ids=ids))


def fake_forward(call: Call, arrays: Arrays, alone: bool = False) -> tuple:
    seen.append(call.b)
    out, lse = by_einsum(call, arrays)
    spare = jnp.zeros((call.b, 1), jnp.float32)
    return out, lse, lse, lse, spare


def fake_gradients(
    call: Call, arrays: Arrays, saved: tuple, dout: Any, dlse: Any, wants_bias: bool = True
) -> tuple:  # fmt: skip
    wanted.append(wants_bias)
    with_lse.append(dlse is not None)
    names = [name for name in ("q", "k", "v", "bias", "sinks") if getattr(arrays, name) is not None]

    def function(*floats: Any) -> Any:
        return by_einsum(call, arrays._replace(**dict(zip(names, floats, strict=True))))

    (_, lse), back = jax.vjp(function, *(getattr(arrays, n) for n in names))
    found = dict(zip(names, back((dout, jnp.zeros_like(lse) if dlse is None else dlse)), strict=True))
    return tuple(found.get(name) for name in ("q", "k", "v", "bias", "sinks"))


seen: list[int] = []


wanted: list[bool] = []


with_lse: list[bool] = []


@pytest.mark.parametrize(
    ("options", "folds"),
    [
        ({}, True),
        ({"is_causal": True, "q_offset": "shared"}, True),
        ({"is_causal": True, "q_offset": "lanes"}, True),
        ({"mask": "shared", "kv_lengths": "lanes", "q_segment_ids": "shared"}, True),
        ({"sinks": "shared"}, False),
        ({"dropout": 0.5, "dropout_seed": "lanes"}, False),
        ({"bias": "shared"}, False),
    ],
    ids=str,
)
def test_lanes_are_more_items_of_one_call_in_jax(
    options: dict[str, Any], folds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax_triton, "_forward", fake_forward)
    monkeypatch.setattr(jax_triton, "_gradients", fake_gradients)
    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.standard_normal((3, 2, 2, 5, 4)), jnp.float32) for _ in range(3))
    made: dict[str, Any] = {
        "q_offset": jnp.asarray([0, 1, -1]), "mask": jnp.asarray(draw.random((3, 1, 5)) > 0.3),
        "kv_lengths": jnp.asarray([[5, 2], [0, 3], [4, 4]]),
        "q_segment_ids": jnp.asarray(draw.integers(0, 2, (3, 2, 5))),
        "sinks": jnp.zeros((3, 2)), "dropout_seed": jnp.asarray([[1, 2], [3, 4], [5, 6]], jnp.uint32),
        "bias": jnp.asarray(draw.standard_normal((3, 1, 2, 5, 5)), jnp.float32),
    }  # fmt: skip
    static = {name: value for name, value in options.items() if value not in ("shared", "lanes")}
    lanes = {name: made[name] for name, value in options.items() if value == "lanes"}
    shared = {name: made[name][0] for name, value in options.items() if value == "shared"}

    def loss(attention: Any, q: Any, k: Any, lanes: dict[str, Any]) -> Any:
        def inner(q: Any, k: Any) -> Any:
            out, lse = attention(q, k, lanes)
            return (out * jnp.arange(4, dtype=jnp.float32)).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

        value, gradients = jax.value_and_grad(inner, argnums=(0, 1))(q, k)
        return value, gradients

    def ours(q: Any, k: Any, lanes: dict[str, Any]) -> Any:
        given = Arrays(q, k, v[0], **lanes, **shared)
        call = check(JAX, given, static.get("is_causal", False), None, None,
                     None, static.get("dropout", 0.0), True, "bhnd", None)  # fmt: skip
        return jax_triton.attend(call, canonical(call, given))

    def truth(q: Any, k: Any, lanes: dict[str, Any]) -> Any:
        return attend_jax.attend(q, k, v[0], **lanes, **shared, **static, return_lse=True, implementation="einsum")

    seen.clear()
    found = jax.vmap(lambda q, k, lanes: loss(ours, q, k, lanes))(q, k, lanes)
    expected = jax.vmap(lambda q, k, lanes: loss(truth, q, k, lanes))(q, k, lanes)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert (max(seen) == 6) == folds


def test_a_bias_without_a_gradient_is_told_from_one_in_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler leaves half of a launch out, so dbias must not be made for nothing."""
    monkeypatch.setattr(jax_triton, "_forward", fake_forward)
    monkeypatch.setattr(jax_triton, "_gradients", fake_gradients)
    q, bias = jnp.ones((1, 2, 5, 4)), jnp.ones((1, 2, 5, 5))
    call = check(JAX, Arrays(q, q, q, bias=bias), False, None, None, None, 0.0, True, "bhnd", None)

    def loss(q: Any, bias: Any) -> Any:
        return jax_triton.attend(call, canonical(call, Arrays(q, q, q, bias=bias)))[0].sum()

    def layers(q: Any, bias: Any) -> Any:
        return jax.lax.scan(lambda x, _: (x + loss(x, bias), None), q, None, length=2)[0].sum()

    wanted.clear()
    for function in (loss, jax.jit(loss), jax.checkpoint(loss), layers):
        for places, found in ((0, [False]), (1, [True]), ((0, 1), [True])):
            jax.grad(function, places)(q, bias)
            assert wanted == found
            wanted.clear()


def test_no_zeros_are_made_for_an_lse_that_is_not_used_in_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch: they would be written and read, and the way back has a launch of its own for calls without them."""
    monkeypatch.setattr(jax_triton, "_forward", fake_forward)
    monkeypatch.setattr(jax_triton, "_gradients", fake_gradients)
    q = jnp.ones((1, 2, 5, 4))
    call = check(JAX, Arrays(q, q, q), False, None, None, None, 0.0, True, "bhnd", None)

    def out(q: Any) -> Any:
        return jax_triton.attend(call, canonical(call, Arrays(q, q, q)))[0].sum()

    def lse(q: Any) -> Any:
        return jax_triton.attend(call, canonical(call, Arrays(q, q, q)))[1].sum()

    lanes = jnp.ones((3, *q.shape))
    with_lse.clear()
    for function, at, expected in (
        (out, q, False), (jax.jit(out), q, False), (jax.checkpoint(out), q, False), (lse, q, True),
        (lambda q: jax.vmap(out)(q).sum(), lanes, False), (lambda q: jax.vmap(lse)(q).sum(), lanes, True),
    ):  # fmt: skip
        jax.grad(function)(at)
        assert {*with_lse} == {expected}
        with_lse.clear()


def test_in_a_shard_map_results_vary_as_inputs_do_in_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch's outputs are typed as the same on every device, as those of this stand-in are."""

    def triton_call(*_: Any, out_shape: Any, **options: Any) -> list[Any]:
        return [jnp.zeros(x.shape, x.dtype) for x in out_shape]

    monkeypatch.setitem(sys.modules, "jax_triton", SimpleNamespace(triton_call=triton_call))
    monkeypatch.setattr(jax_triton, "unavailable", lambda: None)
    monkeypatch.setattr(jax_triton, "refusal", lambda call: None)

    def gradients(q: Any, k: Any, v: Any, bias: Any, sinks: Any, seed: Any) -> Any:
        at = jax.lax.axis_index("x") * 4

        def loss(*floats: Any) -> Any:
            *qkv, bias, sinks = floats
            out, lse = attend_jax.attend(
                *qkv, bias=bias, sinks=sinks, is_causal=True, q_offset=at, dropout=0.5, dropout_seed=seed[0],
                return_lse=True, implementation="triton",
            )  # fmt: skip
            return out.sum() + lse.sum()

        return jax.grad(loss, argnums=(0, 1, 2, 3, 4))(q, k, v, bias, sinks)

    mesh = jax.sharding.AbstractMesh((2,), ("x",))
    rows, all_of = PartitionSpec(None, None, "x"), PartitionSpec()  # each device has some queries, and all keys
    specs = rows, all_of, all_of, rows, all_of
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 4, 8, 16),) * 3 + ((1, 4, 8, 8), (4,))]
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=(*specs, PartitionSpec("x")), out_specs=specs)
    found = jax.eval_shape(sharded, *given, jax.ShapeDtypeStruct((2, 2), jnp.uint32))
    assert [x.shape for x in found] == [x.shape for x in given]


@pytest.mark.parametrize("folder", [None, "", "/where/they/are"])
def test_what_importing_jax_triton_does_to_triton_elsewhere_is_undone(
    folder: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It empties TRITON_CACHE_DIR, with which Triton compiles nothing in the rest of the process."""
    (tmp_path / "jax_triton.py").write_text(f'import os\nos.environ["{cache_folder.VARIABLE}"] = ""\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "jax_triton", raising=False)
    monkeypatch.delenv(cache_folder.VARIABLE, raising=False)
    if folder is not None:
        monkeypatch.setenv(cache_folder.VARIABLE, folder)
    jax_triton.run([], {"q": jnp.zeros(1)})
    assert sys.modules.pop("jax_triton").__file__ == str(tmp_path / "jax_triton.py")
    assert os.environ.get(cache_folder.VARIABLE) == (folder or None)

"""FlashAttention-4: what is refused and why, and how a call is put to the packages, proved against the oracle.

Neither package runs on a CPU. `flash_fakes` stands in for both; what the kernels themselves do is shown on a GPU:
docs/implementations.md.
"""

import ast
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import attend_jax
import attend_jax.bridge
import attend_torch
import attend_torch.bridge
import flash_fakes
from attend_jax.implementations import fa4 as jax_fa4
from attend_jax.implementations import triton as jax_triton
from attend_shared import compare, flash
from attend_shared.call import Arrays, Call, check
from attend_torch.arrays import FRAMEWORK
from attend_torch.implementations import fa4

BRIDGES = {"torch": attend_torch.bridge, "jax": attend_jax.bridge}
MODULES = {"torch": fa4, "jax": jax_fa4}
INT = torch.int32


def call_of(**options: Any) -> Call:
    x = torch.empty(2, 4, 96, 64, dtype=torch.bfloat16, device="meta")
    static = {name: options.pop(name, default) for name, default in
              (("is_causal", False), ("window_size", None), ("softcap", None), ("scale", None), ("dropout", 0.0),
               ("return_lse", False))}  # fmt: skip
    arrays = Arrays(**{"q": x, "k": x, "v": x} | options)
    return check(FRAMEWORK, arrays, *static.values(), "bhnd", None)._replace(platform="cuda")


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


LENGTHS, IDS = meta(2, dtype=INT), meta(2, 96, dtype=INT)
ONE_ITEM = {name: meta(1, 4, 96, 64) for name in "qkv"} | {"q_segment_ids": meta(1, 96, dtype=INT)}
OWN_ENDS = (
    "it counts causal and window from the end of each item's own lengths, which is right only where one array is both "
    "q_lengths and kv_lengths"
)
BOTH = [
    ({}, None),
    ({"is_causal": True}, None),
    ({"window_size": (5, 5)}, None),
    ({"q_lengths": LENGTHS, "kv_lengths": LENGTHS}, None),
    ({"q_lengths": LENGTHS, "is_causal": True}, None),
    ({"q": meta(2, 4, 8, 64), "is_causal": True, "q_offset": 88}, None),
    ({"q": meta(2, 4, 8, 64), "is_causal": True, "q_offset": 0}, None),
    ({name: meta(2, 4, 96, 64, dtype=torch.float32) for name in "qkv"}, "it takes float16 and bfloat16, not float32"),
    ({name: meta(2, 4, 96, 64, dtype=torch.float64) for name in "qkv"}, "it takes float16 and bfloat16, not float64"),
    ({name: meta(2, 4, 96, 20) for name in "qkv"}, None),
    ({"v": meta(2, 4, 96, 264)}, "it takes head sizes of up to 256, not 264"),
    ({name: meta(65536, 1, 8, 64) for name in "qkv"}, "it takes up to 65535 items and heads"),
    ({"mask": meta(2, 96, dtype=torch.bool)}, "it has no mask"),
    ({"bias": meta(1, 4, 96, 96)}, "it has no bias"),
    (ONE_ITEM, "it takes segments that lie one after the other, and whether these do was not looked at"),
    ({"q_segment_ids": IDS},
     "it takes segments of one item, not of 2, as a tile of packed keys may reach into the next item and bring NaN "
     "from there: put all in one row, with ids of their own"),
    ({"q": meta(2, 4, 8, 64), "q_segment_ids": meta(2, 8, dtype=INT), "kv_segment_ids": IDS},
     "it takes segments that lie one after the other, in q as in k, so q_len must be kv_len, not 8 beside 96"),
    (ONE_ITEM | {"kv_lengths": meta(1, dtype=INT)},
     "beside segments it has no lengths: give padding an id of its own instead"),
    ({"dropout": 0.1, "dropout_seed": 0}, "it has no dropout"),
    ({"scale": 0.0}, "it looks for the largest logit before it scales, which takes a scale > 0"),
    ({"is_causal": True, "q_offset": 3},
     "it aligns causal and window with the last key, so q_offset must be the number 0 or kv_len - q_len"),
    ({"is_causal": True, "q_offset": LENGTHS},
     "it aligns causal and window with the last key, so q_offset must be the number 0 or kv_len - q_len"),
    ({"is_causal": True, "kv_lengths": LENGTHS}, OWN_ENDS),
    ({"is_causal": True, "kv_lengths": LENGTHS, "q_lengths": meta(2, dtype=INT)}, OWN_ENDS),
    ({"is_causal": True, "kv_lengths": LENGTHS, "q_lengths": LENGTHS, "q_offset": 0}, None),
    ({"is_causal": True, "kv_lengths": LENGTHS, "q_lengths": LENGTHS, "q": meta(2, 4, 8, 64), "q_offset": 0}, OWN_ENDS),
]  # fmt: skip
ONE = [
    ({"softcap": 30.0}, "it has no softcap"),
    ({"sinks": meta(4)}, "it has no sinks"),
]


@pytest.mark.parametrize(("options", "words"), BOTH)
def test_both_refuse_alike(options: dict[str, Any], words: str | None) -> None:
    call = call_of(**options)
    assert fa4.refusal(call) == jax_fa4.refusal(call) == words
    for module in MODULES.values():
        assert module.refusal(call._replace(platform="cpu")) == "it runs on an NVIDIA GPU"


@pytest.mark.parametrize(("options", "words"), ONE)
def test_what_only_torch_has(options: dict[str, Any], words: str) -> None:
    assert fa4.refusal(call_of(**options)) is None
    assert jax_fa4.refusal(call_of(**options)) == words


def test_in_a_shard_map_jax_takes_another() -> None:
    found: list[str | None] = []

    def ask(x: Any) -> Any:
        found.append(jax_fa4.refusal(call_of()))
        return x

    mesh, spec = jax.sharding.AbstractMesh((2,), ("x",)), jax.sharding.PartitionSpec("x")
    asked = jax.shard_map(ask, mesh=mesh, in_specs=spec, out_specs=spec)
    jax.eval_shape(asked, jax.ShapeDtypeStruct((2,), jnp.float32))
    assert found[0] == "inside a shard_map fa4-jax's gradients raise"


def test_gradients_of_lse_take_kernels_of_ours_in_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(return_lse=True)
    monkeypatch.setattr(jax_triton, "unavailable", lambda: "it needs what is not here")
    trained = call._replace(gradient=True)
    assert fa4.refusal(trained) is None
    words = "its gradient of lse is made by Triton's kernels: it needs what is not here"
    assert [jax_fa4.refusal(it) for it in (call, trained)] == [None, words]
    monkeypatch.setattr(jax_triton, "unavailable", lambda: None)
    assert jax_fa4.refusal(trained) is None


def test_softcap_and_lse() -> None:
    words = "its softcap is an approximate tanh, too coarse for an lse in float32"
    assert fa4.refusal(call_of(softcap=30.0, return_lse=True)) == words


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_sinks_of_another_dtype(name: str) -> None:
    words = f"its gradient of sinks is made of an out that is rounded to bfloat16, too coarse for {name}"
    assert fa4.refusal(call_of(sinks=meta(4, dtype=getattr(torch, name)))) == words


@pytest.mark.parametrize(
    ("installed", "words"),
    [
        ({}, 'it needs fa4-jax 0.1.0: pip install "attend-twin[fa4-jax]"'),
        ({"fa4-jax": "0.1.0"}, 'it needs jax-tvm-ffi 0.1.2: pip install "attend-twin[fa4-jax]"'),
        ({"fa4-jax": "0.2"}, 'it was proved with fa4-jax 0.1.0, not 0.2: pip install "attend-twin[fa4-jax]"'),
        ({"fa4-jax": "0.1.0", "jax-tvm-ffi": "0.1.3"},
         'it was proved with jax-tvm-ffi 0.1.2, not 0.1.3: pip install "attend-twin[fa4-jax]"'),
        ({"fa4-jax": "0.1.0", "jax-tvm-ffi": "0.1.2"}, None),
        ({"fa4-jax": "0.1.0", "jax-tvm-ffi": "0.1.2", "lost": "cutlass"},
         'fa4-jax is here, but Python finds no cutlass: pip install "attend-twin[fa4-jax]"'),
    ],
)  # fmt: skip
def test_what_is_installed(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], words: str | None) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise flash.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(flash, "version", version)
    monkeypatch.setattr(flash, "find_spec", lambda name: None if name == installed.get("lost") else name)
    assert flash.missing(flash.FA4_JAX) == words


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flash.wrong_device((9, 0)) is None
    older = "it was proved on compute capability 9.0 (Hopper), and this GPU has 8.0"
    assert flash.wrong_device((8, 0)) == older
    for module in MODULES.values():
        assert module.unavailable() == module.MISSING == flash.missing(module.PACKAGE) is not None
        monkeypatch.setattr(module, "MISSING", None)
    assert fa4.unavailable() == jax_fa4.unavailable() == "it needs an NVIDIA GPU"
    monkeypatch.setattr(fa4, "capability", lambda: "8.0")
    assert fa4.unavailable() == older


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_nothing_of_theirs_is_imported_before_it_is_called(module: Any) -> None:
    head = ast.parse(Path(module.__file__).read_text()).body
    names = [node.names[0].name for node in head if isinstance(node, ast.Import)]
    names += [str(node.module) for node in head if isinstance(node, ast.ImportFrom)]
    assert not any(name.startswith(("flash_attn", "fa4_jax", "cutlass")) for name in names)


@pytest.mark.parametrize(
    ("sizes", "offset", "bounds", "expected"),
    [
        ((6, 6), 0, (3, 2), (3, 2)),
        ((2, 6), 4, (3, 0), (3, 0)),
        ((4, 6), 0, (2, 2), (4, 0)),
        ((2, 6), 0, (0, 2), (4, -2)),
        ((6, 2), 0, (4, 0), (0, 4)),
        ((6, 2), 0, (1, None), (-3, None)),
        ((2, 6), 0, (None, 0), (None, -4)),
    ],
)
def test_windows_are_counted_from_the_last_key(
    sizes: tuple[int, int], offset: int, bounds: tuple, expected: tuple
) -> None:
    i, j = sizes
    call = call_of(q=meta(2, 4, i, 64), k=meta(2, 4, j, 64), v=meta(2, 4, j, 64), window_size=bounds, q_offset=offset)
    assert flash.window(call) == expected
    query, key = np.arange(i)[:, None], np.arange(j)
    ours, theirs = (
        (left is None or key >= query + at - left) & (right is None or key <= query + at + right)
        for (left, right), at in ((bounds, offset), (expected, j - i))
    )
    assert np.array_equal(*np.broadcast_arrays(ours, theirs))


@pytest.mark.parametrize(
    ("d", "dv", "expected"),
    [(64, 64, 64), (20, 20, 32), (80, 80, 96), (8, 100, 128), (192, 128, 192), (128, 192, 192), (256, 1, 256)],
)
def test_sizes_that_kernels_have(d: int, dv: int, expected: int) -> None:
    call = call_of(q=meta(2, 4, 8, d), k=meta(2, 4, 8, d), v=meta(2, 4, 8, dv))
    assert {flash.size(call, module.PACKAGE) for module in MODULES.values()} == {expected}


@pytest.mark.parametrize("xp", [np, jnp, torch], ids=["numpy", "jax", "torch"])
def test_lengths_as_they_act(xp: Any) -> None:
    lengths = xp.asarray([-3, 0, 5, 9, 2**30])
    assert np.asarray(flash.used(lengths, 8)).tolist() == [0, 0, 5, 8, 8]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_fakes.install(monkeypatch)


def test_torch_is_right_wherever_it_serves(fakes: None) -> None:
    able = flash_fakes.some(25)
    for case in able:
        problem = case.build()
        compare.check(attend_torch.bridge.evaluate(problem, "fa4"), problem)
    assert len({level for case in able for level in case.levels}) > 55


def test_jax_is_right_wherever_it_serves(fakes: None) -> None:
    for case in flash_fakes.some(2, "lse", "sinks", "softcap"):
        problem = case.build()
        compare.check(attend_jax.bridge.evaluate(problem, "fa4"), problem)


@pytest.mark.parametrize("name", ["fa4", "fa3"])
@pytest.mark.parametrize("which", ["plain", "window", "segments", "lengths"])
def test_an_lse_without_a_cotangent_leaves_jax_the_kernels_of_the_package(
    fakes: None, monkeypatch: pytest.MonkeyPatch, name: str, which: str
) -> None:
    """Whether it is asked for or not, under jit as well: dq, dk and dv are the same. `run` would be Triton's."""
    if (name, which) == ("fa3", "lengths"):
        return
    options: dict[str, Any] = {
        "plain": {}, "window": {"window_size": (2, 1)}, "segments": {"q_segment_ids": np.array([[1, 1, 0, 0, 0, 3]])},
        "lengths": {"q_lengths": jnp.array([4]), "kv_lengths": jnp.array([5])},
    }[which]  # fmt: skip
    monkeypatch.setattr(jax_triton, "run", None)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, heads, 6, 16)), jnp.bfloat16) for heads in (4, 2, 2))

    def loss(lse: bool, *floats: jax.Array) -> jax.Array:
        found = attend_jax.attend(*floats, return_lse=lse, implementation=name, **options)
        return jnp.sin((found[0] if lse else found).astype(jnp.float32)).sum()

    ours, theirs = (jax.grad(partial(loss, lse), (0, 1, 2)) for lse in (True, False))
    for found in (ours(q, k, v), jax.jit(ours)(q, k, v)):
        for a, b in zip(found, theirs(q, k, v), strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_lanes_of_lengths_are_items_in_jax(fakes: None) -> None:
    """Where sequences are packed fa4-jax itself raises."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((3, 1, 2, 6, 16)), jnp.bfloat16) for _ in range(3))
    lengths = jnp.array([[4], [6], [0]])

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
        out = attend_jax.attend(q, k, v, q_lengths=lengths, kv_lengths=lengths, implementation="fa4")
        return jnp.sin(out.astype(jnp.float32)).sum()

    gradient = jax.grad(loss, (0, 1, 2))
    together = jax.vmap(gradient)(q, k, v, lengths)
    apart = [gradient(*lane) for lane in zip(q, k, v, lengths, strict=True)]
    for lanes, each in zip(together, zip(*apart, strict=True), strict=True):
        np.testing.assert_array_equal(np.asarray(lanes, np.float32), np.asarray(jnp.stack(each), np.float32))


@pytest.mark.parametrize("name", ["fa4", "fa3"])
def test_lse_of_rows_without_a_key(fakes: None, name: str) -> None:
    q, k = (jnp.ones((1, 1, n, 16), jnp.bfloat16) for n in (5, 3))
    emptied: list[dict[str, Any]] = [{"is_causal": True, "q_offset": -2}]
    if name == "fa4":
        emptied.append({"is_causal": True, "q_offset": 0, "q_lengths": jnp.array([3])})
    for options in emptied:
        found, wanted = (
            attend_jax.attend(q, k, k, return_lse=True, implementation=each, **options)[1] for each in (name, "einsum")
        )
        assert np.isneginf(wanted).any()
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("framework", BRIDGES)
@pytest.mark.parametrize("window", [(None, 0), (2, 1)])
def test_one_array_of_lengths_and_positions(fakes: None, framework: str, window: tuple) -> None:
    """Padding on the right, in training: the one form of lengths beside causal that the packages mean exactly."""

    def padded(name: str) -> list[np.ndarray]:
        hidden = np.nan if name == "fa4" else 0
        return [np.where(poison[:, None, :, None], hidden, x) for x in (q, k, v)]

    rng = np.random.default_rng(0)
    q, k, v, weights = rng.standard_normal((4, 3, 2, 7, 8)).astype(np.float32)
    poison = np.arange(7) >= np.array([5, 7, 0])[:, None]
    answers = []
    for name in ("fa4", "einsum"):
        if framework == "torch":
            inputs = [torch.tensor(x).bfloat16().requires_grad_() for x in padded(name)]
            lengths: Any = torch.tensor([5, 7, -1])
            options = {"window_size": window, "q_lengths": lengths, "kv_lengths": lengths, "implementation": name}
            out = attend_torch.attend(*inputs, **options)
            gradients = torch.autograd.grad(out, inputs, torch.tensor(weights).bfloat16())
            answers.append([x.detach().float().numpy() for x in (out, *gradients)])
        else:
            lengths = jnp.asarray([5, 7, -1])
            options = {"window_size": window, "q_lengths": lengths, "kv_lengths": lengths, "implementation": name}
            primals = [jnp.asarray(x, jnp.bfloat16) for x in padded(name)]
            out, pull = jax.vjp(partial(attend_jax.attend, **options), *primals)
            answers.append([np.asarray(x, np.float32) for x in (out, *pull(jnp.asarray(weights, jnp.bfloat16)))])
    for ours, theirs in zip(*answers, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.04)
        assert not ours[poison[:, None, :, None] & np.ones_like(ours, bool)].any()


def arguments(layout: str) -> tuple[list[torch.Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 6, 16), (2, 2, 9, 16), (2, 2, 9, 8), (4,))
    q, k, v, sinks = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    q, k, v = ((x.transpose(1, 2).contiguous() if layout == "bnhd" else x) for x in (q, k, v))
    lengths = {"q_lengths": torch.tensor([4, 6]), "kv_lengths": torch.tensor([9, 3])}
    return [x.requires_grad_() for x in (q, k, v, sinks)], lengths | {"layout": layout}


def outcome(function: Any, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    out, lse = function(*inputs)
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    return out, lse, *torch.autograd.grad([out, lse], inputs, [weights, torch.ones_like(lse)])


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_a_compiler_takes_the_operator_whole(fakes: None, layout: str) -> None:
    inputs, options = arguments(layout)

    def function(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        return attend_torch.attend(q, k, v, sinks=sinks, return_lse=True, implementation="fa4", **options)

    eager = outcome(function, inputs)
    compiled = outcome(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs)
    for ours, theirs in zip(eager, compiled, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()


def test_transforms(fakes: None) -> None:
    inputs, options = arguments("bhnd")

    def function(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        return attend_torch.attend(q, k, v, sinks=sinks, return_lse=True, implementation="fa4", **options)

    plain, lanes = [x.detach() for x in inputs], [torch.stack([x, 2 * x]).detach() for x in inputs]
    for ours, theirs in zip(torch.func.vmap(function)(*lanes), function(*plain), strict=True):
        assert torch.equal(ours[0], theirs)
    gradients = torch.func.grad(lambda *x: function(*x)[0].float().sum(), (0, 1, 2, 3))(*plain)
    expected = torch.autograd.grad(function(*inputs)[0].float().sum(), inputs)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert torch.equal(ours, theirs)
    dq = torch.autograd.grad(function(*inputs)[0].float().sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="fa4 has first derivatives only; blockwise, rowwise"):
        torch.autograd.grad(dq.float().sum(), inputs[1])


def test_deterministic_kernels_where_torch_is_asked_for_them(fakes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, options = arguments("bhnd")
    interface = sys.modules["flash_attn.cute.interface"]
    backward, seen = interface._flash_attn_bwd, []

    def look(*given: Any, deterministic: bool, **others: Any) -> Any:
        seen.append(deterministic)
        return backward(*given, deterministic=deterministic, **others)

    monkeypatch.setattr(interface, "_flash_attn_bwd", look)
    for asked in (False, True):
        monkeypatch.setattr("torch.are_deterministic_algorithms_enabled", lambda asked=asked: asked)
        out = attend_torch.attend(*inputs[:3], implementation="fa4", **options)
        out.float().sum().backward()
    assert seen == [False, True]

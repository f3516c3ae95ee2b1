"""Weight rules: read in both directions, equal to the bit, and every misfit named at once."""

import functools
import itertools
import pickle
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import attend_jax.weights
import attend_torch.weights
from attend_shared import rules
from attend_shared.rules import Value, WeightsError, carry, parse, value

BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIZES = {"h": 4, "hk": 2, "g": 2}
# One line each, and the shapes of what it takes in torch.
LINES: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "as it is": ("norm.weight <-> norm.scale", {"norm.weight": (6,)}),
    "no axes": ("scale <-> temperature", {"scale": ()}),
    "empty": ("a <-> b : o i -> i o", {"a": (0, 3)}),
    "linear": ("fc.weight <-> dense.kernel : o i -> i o", {"fc.weight": (3, 5)}),
    "heads": ("q.weight <-> query.kernel : (h d) c -> c h d", {"q.weight": (12, 5)}),
    "a size of its own": ("q.weight <-> query.kernel : (h d) c -> c h d, h=6", {"q.weight": (12, 5)}),
    "numbers": ("l.{l}.e.{e}.w <-> {l}.{e}.w : a b -> b a", {"l.0.e.1.w": (2, 3), "l.10.e.0.w": (4, 3)}),
    "unit axis": ("conv.weight <-> conv.kernel : c 1 k -> k 1 c", {"conv.weight": (4, 1, 3)}),
    "contiguous qkv": ("qkv <-> {q|k|v}.kernel : (* h d) c -> c (* h) d", {"qkv": (24, 5)}),
    "contiguous grouped qkv": ("qkv <-> {q h|k hk|v hk}.kernel : (* d) c -> c * d", {"qkv": (24, 5)}),
    "qkv interleaved by head": ("qkv <-> {q|k|v}.kernel : (h * d) c -> c (h *) d", {"qkv": (24, 5)}),
    "qkv interleaved by group": ("qkv <-> {q g|k|v}.kernel : (hk * d) c -> c (hk *) d", {"qkv": (24, 5)}),
    "GPT-2's Conv1D": ("c_attn.weight <-> {q|k|v}.kernel : c (* h d) -> c (* h) d", {"c_attn.weight": (5, 24)}),
    "split there, joined here": ("{gate 7|up 2}.weight <-> mlp.kernel : * c -> c *",
                                 {"gate.weight": (7, 5), "up.weight": (2, 5)}),
    "tiled heads": ("q.weight <-> query.kernel : (g hk d) c -> c (hk g) d", {"q.weight": (12, 5)}),
}  # fmt: skip


def bits(x: Any) -> np.ndarray:
    raw = x.read() if isinstance(x, Value) else np.asarray(x)
    return np.ascontiguousarray(raw).view(BITS[raw.dtype.itemsize])


def random(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """Any bits at all, NaN and subnormals included."""
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, rules.ITEMSIZE[dtype]), np.uint8)
    return raw.view(dtype).reshape(shape)


# What a rule does.


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int64"])
def test_there_and_back_is_equal_to_the_bit(name: str, dtype: str) -> None:
    line, shapes = LINES[name]
    there = {path: random(shape, dtype, n) for n, (path, shape) in enumerate(shapes.items())}
    before = {path: array.copy() for path, array in there.items()}
    here = carry(there, [line], to="flax", sizes=SIZES)
    back = carry(here, [line], to="torch", sizes=SIZES)
    assert back.keys() == there.keys()
    for path, found in back.items():
        assert (found.shape, found.dtype) == (there[path].shape, dtype)
        np.testing.assert_array_equal(bits(found), bits(before[path]))
        np.testing.assert_array_equal(bits(there[path]), bits(before[path]), "the input is not written to")
    for found in here.values():
        assert found.read().shape == found.shape


def test_what_the_patterns_mean() -> None:
    w = np.arange(24 * 5).reshape(24, 5)
    one = carry({"qkv": w}, [LINES["contiguous grouped qkv"][0]], to="flax", sizes=SIZES)
    heads = w.reshape(8, 3, 5)  # four query heads, two of keys, two of values
    for name, part in (("q", heads[:4]), ("k", heads[4:6]), ("v", heads[6:])):
        np.testing.assert_array_equal(one[f"{name}.kernel"].array(), part.transpose(2, 0, 1))
    by_head = carry({"qkv": w}, [LINES["qkv interleaved by head"][0]], to="flax", sizes=SIZES)
    for n, name in enumerate("qkv"):
        np.testing.assert_array_equal(by_head[f"{name}.kernel"].array(), w.reshape(4, 3, 2, 5)[:, n].transpose(2, 0, 1))
    by_group = carry({"qkv": w}, [LINES["qkv interleaved by group"][0]], to="flax", sizes=SIZES)
    groups = w.reshape(2, 4, 3, 5)
    np.testing.assert_array_equal(by_group["q.kernel"].array(), groups[:, :2].reshape(4, 3, 5).transpose(2, 0, 1))
    np.testing.assert_array_equal(by_group["k.kernel"].array(), groups[:, 2].transpose(2, 0, 1))
    tiled = carry({"q.weight": w[:12]}, [LINES["tiled heads"][0]], to="flax", sizes=SIZES)["query.kernel"].array()
    for n, head in enumerate(w[:12].reshape(4, 3, 5)):  # head n reads key head n % 2 there, n // 2 here
        np.testing.assert_array_equal(tiled[:, (n % 2) * 2 + n // 2], head.T)


@given(st.permutations("abc"), st.lists(st.integers(1, 4), min_size=3, max_size=3), st.integers(0, 2))
def test_any_permutation_and_grouping(order: list[str], shape: list[int], fused: int) -> None:
    sides = ["a b c", " ".join(order)]
    grouped = sides[1].split()
    right = " ".join([f"({' '.join(grouped[: fused + 1])})", *grouped[fused + 1 :]])
    x = random(tuple(shape))
    sizes = dict(zip("abc", shape, strict=True))
    here = carry({"x": x}, [f"x <-> y : a b c -> {right}"], to="flax", sizes=sizes)
    assert here["y"].shape == here["y"].read().shape
    back = carry(here, [f"x <-> y : a b c -> {right}"], to="torch", sizes=sizes)
    np.testing.assert_array_equal(bits(back["x"]), bits(x))


def test_bfloat16_stays_bfloat16() -> None:
    array = torch.arange(6.0).reshape(3, 2).to(torch.bfloat16)
    here = carry({"fc.weight": array}, rules.linear("fc", "fc", bias=False), to="flax")["fc.kernel"]
    assert (here.dtype, here.read().dtype, here.array().dtype) == ("bfloat16", np.uint16, jnp.bfloat16)
    assert jnp.asarray(here.array()).dtype == jnp.bfloat16
    back = carry({"fc.kernel": jnp.asarray(here.array())}, rules.linear("fc", "fc", bias=False), to="torch")
    np.testing.assert_array_equal(back["fc.weight"].read(), array.view(torch.int16).numpy().view(np.uint16))


def test_nothing_is_read_before_it_is_asked_for() -> None:
    def read() -> np.ndarray:
        raise AssertionError("read")

    lazy = {"qkv": Value((24, 5), "float32", read)}
    here = carry(lazy, [LINES["contiguous qkv"][0]], to="flax", sizes=SIZES)
    assert {path: each.shape for path, each in here.items()} == dict.fromkeys(
        ("q.kernel", "k.kernel", "v.kernel"), (5, 4, 2)
    )
    with pytest.raises(AssertionError, match="read"):
        here["q.kernel"].read()


def test_expected_gives_the_order() -> None:
    lines = ["a <-> x", "b <-> y"]
    found = carry({"a": np.ones(1), "b": np.ones(2)}, lines, to="flax", expected={"y": (2,), "x": (1,)})
    assert list(found) == ["y", "x"]


# Tied parameters and buffers.

TIED = ["emb.weight <-> emb.embedding", "head.weight = emb.weight"]


def test_a_tied_parameter_may_be_there_or_not_or_stand_alone() -> None:
    w = random((4, 3))
    for there in ({"emb.weight": w}, {"emb.weight": w, "head.weight": w.copy()}, {"head.weight": w}):
        here = carry(there, TIED, to="flax")
        np.testing.assert_array_equal(bits(here["emb.embedding"]), bits(w))
        assert carry(here, TIED, to="torch").keys() == {"emb.weight"}


def test_a_tied_parameter_that_differs_is_named() -> None:
    here = carry({"emb.weight": np.zeros(3), "head.weight": np.ones(3)}, TIED, to="flax")
    with pytest.raises(WeightsError, match=r"unexpected: torch head\.weight is tied to emb\.weight, but"):
        here["emb.embedding"].read()


def test_a_buffer_is_passed_over() -> None:
    lines = ["w <-> w", "blocks.{l}.position_ids <-> -"]
    there = {"w": np.ones(2), "blocks.0.position_ids": np.arange(3), "blocks.1.position_ids": np.arange(3)}
    here = carry(there, lines, to="flax")
    assert here.keys() == {"w"}
    assert carry(here, lines, to="torch").keys() == {"w"}


# Errors.


def test_one_error_has_a_line_for_every_misfit() -> None:
    lines = [*rules.linear("layer.{l}", "layers.{l}"), "norm.weight <-> norm.scale"]
    there = {"layer.0.weight": np.ones((3, 2)), "layer.0.bias": np.ones(3), "layer.1.weight": np.ones((3, 4)),
             "layer.7.bias": np.ones(3), "extra": np.ones(1)}  # fmt: skip
    expected = {"layers.0.kernel": (2, 3), "layers.0.bias": (3,), "layers.1.kernel": (2, 3), "layers.1.bias": (3,),
                "norm.scale": (3,), "own": (1,)}  # fmt: skip
    with pytest.raises(WeightsError) as caught:
        carry(there, lines, to="flax", expected=expected)
    assert str(caught.value).split("\n") == [
        "6 parameters do not fit:",
        "  missing: torch norm.weight, flax norm.scale (3,)",
        "  missing: torch layer.1.bias, flax layers.1.bias (3,)",
        "  missing: flax own (1,): no rule makes it",
        "  unexpected: torch layer.7.bias (3,), flax layers.7.bias",
        "  unexpected: torch extra (1,): no rule takes it",
        "  misshapen: torch layer.1.weight, flax layers.1.kernel: expected (2, 3) for layers.1.kernel, got (4, 3)",
    ]
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.missing) == (str(caught.value), caught.value.missing)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((12,), r"expected '\(h d\) c' with h=4, got \(12,\)"),
        ((13, 5), r"expected '\(h d\) c' with h=4, got \(13, 5\)"),
    ],
)
def test_a_shape_that_the_pattern_does_not_take(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(WeightsError, match=words):
        carry({"q.weight": np.ones(shape)}, [LINES["heads"][0]], to="flax", sizes=SIZES)


def test_parts_must_go_together() -> None:
    line = "{gate|up}.weight <-> mlp.kernel : (* o) c -> c (* o)"
    with pytest.raises(WeightsError, match=r"missing: torch up\.weight, flax mlp\.kernel"):
        carry({"gate.weight": np.ones((2, 3))}, [line], to="flax")
    with pytest.raises(WeightsError, match="sizes that differ in c"):
        carry({"gate.weight": np.ones((2, 3)), "up.weight": np.ones((2, 4))}, [line], to="flax")
    with pytest.raises(WeightsError, match="expected one dtype for what is joined, got float64, float32"):
        carry({"gate.weight": np.ones((2, 3)), "up.weight": np.ones((2, 3), np.float32)}, [line], to="flax")


def test_a_size_that_is_not_given() -> None:
    with pytest.raises(WeightsError, match="the sizes of h, d are not given"):
        carry({"q.weight": np.ones((12, 5))}, [LINES["heads"][0]], to="flax")
    with pytest.raises(ValueError, match="the size h is not given"):
        carry({"qkv": np.ones((24, 5))}, [LINES["contiguous grouped qkv"][0]], to="flax")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a -> b", "expected `torch path <-> flax path`"),
        ("a <-> b : x y -> x z", "the same axes, each once"),
        ("a <-> b : x x -> x x", "the same axes, each once"),
        ("a <-> b : x y", "the same axes, each once"),
        ("a <-> b : (x y -> x y", "parentheses in pairs"),
        ("a <-> b : x-y -> x", "names of axes"),
        ("a <-> b : * y -> y *", r"\* in the pattern where, and only where"),
        ("a <-> {b|c} : x -> x", r"\* in the pattern where, and only where"),
        ("a <-> {b|c}", "expected a pattern"),
        ("{a|b} <-> {c|d} : * -> *", "several parts on one side at most"),
        ("a.{l} <-> b", r"the same \{numbers\}"),
        ("{a|b}.{c|d} <-> e : * -> *", "at most one pair of braces"),
        ("a <-> b : x -> x, x", "a size like h=12"),
        ("a.{l <-> b.{l", "braces around numbers"),
        ("a.{L} <-> b.{L}", "braces around numbers"),
        ("a.{l}.{l} <-> b.{l}.{l}", "each once"),
        ("a.{l} = b.{l}", "two names without braces"),
    ],
)
def test_a_line_that_is_no_rule(line: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(line)


def test_two_rules_for_one_parameter() -> None:
    with pytest.raises(ValueError, match=r"so does 'a\.\{n\} <-> b\.\{n\}' fit a\.0"):
        carry({"a.0": np.ones(1)}, ["a.0 <-> c", "a.{n} <-> b.{n}"][::-1], to="flax")
    with pytest.raises(ValueError, match="a second rule makes x"):
        carry({"a": np.ones(1), "b": np.ones(1)}, ["a <-> x", "b <-> x"], to="flax")
    with pytest.raises(ValueError, match="a second rule makes x"):  # a line given twice as well
        carry({"a": np.ones(1)}, ["a <-> x", "a <-> x"], to="flax")


def test_other_wrong_arguments() -> None:
    with pytest.raises(ValueError, match='to: expected "flax" or "torch", got \'jax\''):
        carry({}, [], to="jax")  # type: ignore[arg-type]
    for arguments, options, error, words in (
        (([1], []), {}, TypeError, "values: expected a mapping, got list"),
        (({}, "a <-> b"), {}, TypeError, "rules: expected lines, got one text"),
        (({}, [3]), {}, TypeError, "rule: expected a line of text, got int"),
        (({"a": 3}, ["a <-> b"]), {}, TypeError, "array: expected an array of NumPy, JAX or torch, got int"),
        (({}, []), {"expected": ["a"]}, TypeError, "expected: expected a mapping, got list"),
        (({}, []), {"sizes": {"h": "4"}}, TypeError, "sizes: expected a whole number >= 1 for h, got '4'"),
        (({}, []), {"sizes": {"h": -2}}, ValueError, "sizes: expected a whole number >= 1 for h, got -2"),
    ):
        with pytest.raises(error, match=words):
            carry(*arguments, **options, to="flax")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dims: expected 1, 2 or 3, got 4"):
        rules.conv("a", "b", dims=4)
    with pytest.raises(ValueError, match="names: expected four"):
        rules.attention("a", "b", names=("q", "k", "v"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kv_heads: expected a number that divides the 5 heads, got '2'"):
        rules.attention("a", "b", names=("q", "k", "v", "o"), heads="5", kv_heads="2", tiled=True)
    with pytest.raises(ValueError, match='fused: expected "qkv", "kv" or ""'):
        rules.lucidrains_attention("a", "b", fused="q")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a dtype out of"):
        value(np.zeros(2, np.complex64))


# Models as they stand.


def test_a_model_takes_arrays_and_none_that_would_be_cut() -> None:
    there, here = torch.nn.Linear(1, 1), nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    given = {"weight": np.full((1, 1), 2.0, np.float32), "bias": torch.ones(1)}
    attend_torch.weights.assign(there, given)
    assert there(torch.ones(1, 1)).item() == 3
    attend_jax.weights.assign(here, {"kernel": given["weight"], "bias": jnp.ones(1)})
    assert here(jnp.ones((1, 1))).item() == 3
    with pytest.raises(TypeError, match="kernel: float64 needs jax_enable_x64"):
        attend_jax.weights.assign(here, {"kernel": np.full((1, 1), 5.0), "bias": np.zeros(1, np.float32)})
    assert here(jnp.ones((1, 1))).item() == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_of_either_framework_gives_and_takes_its_parameters(dtype: str) -> None:
    lines = [*rules.linear("0", "layers.0"), *rules.batch_norm("1", "layers.1")]
    there = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5)).to(getattr(torch, dtype))
    here = nnx.Sequential(nnx.Linear(3, 5, rngs=nnx.Rngs(0)), nnx.BatchNorm(5, rngs=nnx.Rngs(0)))
    given = attend_torch.weights.values(there)
    before = {path: each.read().copy() for path, each in given.items()}
    attend_jax.weights.assign(here, carry(given, lines, to="flax", expected=attend_jax.weights.shapes(here)))
    assert here.layers[0].kernel.dtype == dtype
    back = carry(attend_jax.weights.values(here), lines, to="torch")
    for parameter in there.parameters():
        parameter.data.zero_()
    attend_torch.weights.assign(there, {**back, "1.num_batches_tracked": given["1.num_batches_tracked"]})
    assert attend_torch.weights.shapes(there) == {path: array.shape for path, array in before.items()}
    for path, each in attend_torch.weights.values(there).items():
        np.testing.assert_array_equal(bits(each), bits(before[path]))


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_parameters_that_do_not_fit_a_model_change_nothing(framework: str) -> None:
    model, weights = {
        "torch": (torch.nn.LayerNorm(3), attend_torch.weights),
        "jax": (nnx.BatchNorm(3, rngs=nnx.Rngs(0)), attend_jax.weights),
    }[framework]
    given = {path: value(np.full(shape, 7, np.float32)) for path, shape in weights.shapes(model).items()}
    wrong = {**given, "bias": value(np.full(4, 7, np.float32)), "other": given["bias"]}
    del wrong["weight" if framework == "torch" else "scale"]
    with pytest.raises(WeightsError) as caught:
        weights.assign(model, wrong)
    assert [len(each) for each in (caught.value.missing, caught.value.unexpected, caught.value.misshapen)] == [1, 1, 1]
    assert "bias: expected (3,), got (4,)" in str(caught.value)
    assert all((each.read() != 7).all() for each in weights.values(model).values())


@pytest.mark.parametrize(
    ("weights", "model", "what"),
    [(attend_torch.weights, torch.nn.Linear(1, 1), "a torch.nn.Module"),
     (attend_jax.weights, nnx.Linear(1, 1, rngs=nnx.Rngs(0)), "an nnx.Module")],
)  # fmt: skip
def test_what_is_no_model_or_no_mapping(weights: Any, model: Any, what: str) -> None:
    for call in (weights.shapes, weights.values, lambda x: weights.assign(x, {})):
        for wrong in (None, {"params": {}}):
            with pytest.raises(TypeError, match=rf"^model: expected {what}, got (None|dict)\. .*carry"):
                call(wrong)
    with pytest.raises(TypeError, match=r"^given: expected a mapping, got list\.$"):
        weights.assign(model, [np.ones((1, 1))])


# The ready rules, against the layers themselves.


def torch_weights(module: torch.nn.Module, prefix: str = "there") -> dict[str, Any]:
    return {f"{prefix}.{name}": x for name, x in module.state_dict().items()}


def nnx_shapes(module: nnx.Module, prefix: str = "here") -> dict[str, tuple[int, ...]]:
    state = nnx.to_flat_state(nnx.state(module, (nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, (prefix, *path))): x.shape for path, x in state}


LAYERS: dict[str, tuple[Any, list[str], Any]] = {
    "linear": (lambda: torch.nn.Linear(3, 5), rules.linear("there", "here"), lambda r: nnx.Linear(3, 5, rngs=r)),
    "conv 1": (lambda: torch.nn.Conv1d(4, 6, 3, groups=2), rules.conv("there", "here", dims=1),
               lambda r: nnx.Conv(4, 6, (3,), feature_group_count=2, rngs=r)),
    "conv 2": (lambda: torch.nn.Conv2d(4, 6, (3, 2), bias=False), rules.conv("there", "here", bias=False),
               lambda r: nnx.Conv(4, 6, (3, 2), use_bias=False, rngs=r)),
    "conv 3": (lambda: torch.nn.Conv3d(1, 2, (1, 2, 3)), rules.conv("there", "here", dims=3),
               lambda r: nnx.Conv(1, 2, (1, 2, 3), rngs=r)),
    "embedding": (lambda: torch.nn.Embedding(7, 3), rules.embedding("there", "here"),
                  lambda r: nnx.Embed(7, 3, rngs=r)),
    "layer norm": (lambda: torch.nn.LayerNorm(5), rules.layer_norm("there", "here"),
                   lambda r: nnx.LayerNorm(5, rngs=r)),
    "rms norm": (lambda: torch.nn.RMSNorm(5), rules.rms_norm("there", "here"), lambda r: nnx.RMSNorm(5, rngs=r)),
    "group norm": (lambda: torch.nn.GroupNorm(2, 4), rules.layer_norm("there", "here"),
                   lambda r: nnx.GroupNorm(4, 2, rngs=r)),
    "batch norm": (lambda: torch.nn.BatchNorm1d(4), rules.batch_norm("there", "here"),
                   lambda r: nnx.BatchNorm(4, rngs=r)),
    "attention": (lambda: torch.nn.MultiheadAttention(8, 4), rules.torch_attention("there", "here"),
                  lambda r: nnx.MultiHeadAttention(4, 8, decode=False, rngs=r)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_ready_rules_fit_the_layers_of_both_frameworks(name: str) -> None:
    make, lines, flax = LAYERS[name]
    module = make()
    there = torch_weights(module)
    here = carry(there, lines, to="flax", sizes=SIZES, expected=nnx_shapes(flax(nnx.Rngs(0))))
    back = carry(here, lines, to="torch", sizes=SIZES)
    assert {*back, *(path for path in there if "num_batches" in path)} == there.keys()
    for path, found in back.items():
        np.testing.assert_array_equal(bits(found), bits(there[path].detach().numpy()))


def tree(values: dict[str, Value]) -> dict[str, Any]:
    """Nested, as Linen has it; without the first part of each path."""
    out: dict[str, Any] = {}
    for path, each in values.items():
        *parents, last = path.split(".")[1:]
        functools.reduce(lambda node, name: node.setdefault(name, {}), parents, out)[last] = each.array()
    return out


@pytest.mark.parametrize(("bias", "separate"), [*itertools.product([True, False], repeat=2)])
def test_torch_attention_computes_the_same_in_linen(bias: bool, separate: bool) -> None:
    torch.manual_seed(0)
    kinds = {"kdim": 6, "vdim": 6} if separate else {}
    module = torch.nn.MultiheadAttention(8, 4, bias=bias, batch_first=True, **kinds)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x, y = torch.randn(2, 3, 8), torch.randn(2, 5, 6 if separate else 8)
    expected = module(x, y, y, need_weights=False)[0].detach().numpy()
    lines = rules.torch_attention("there", "here", bias=bias, separate=separate)
    params = tree(carry(torch_weights(module), lines, to="flax", sizes=SIZES))
    layer = nn.MultiHeadDotProductAttention(4, qkv_features=8, out_features=8, use_bias=bias)
    found = jax.jit(layer.apply)({"params": params}, x.numpy(), y.numpy())
    np.testing.assert_allclose(found, expected, atol=1e-5)


class Lucidrains(torch.nn.Module):
    """As so many repositories write it."""

    def __init__(self, fused: str) -> None:
        super().__init__()
        self.fused = fused
        for name in {"qkv": ("qkv",), "kv": ("q", "kv"), "": ("q", "k", "v")}[fused]:
            setattr(self, f"to_{name}", torch.nn.Linear(6, 8 * len(name), bias=False))
        self.to_out = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Dropout(0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        match self.fused:
            case "qkv":
                q, k, v = self.to_qkv(x).chunk(3, -1)
            case "kv":
                q, (k, v) = self.to_q(x), self.to_kv(x).chunk(2, -1)
            case _:
                q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        q, k, v = (each.unflatten(-1, (4, 2)).transpose(1, 2) for each in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", ["qkv", "kv", ""])
def test_lucidrains_attention_computes_the_same_in_nnx(fused: Any) -> None:
    torch.manual_seed(0)
    module, x = Lucidrains(fused), torch.randn(2, 3, 6)
    lines = rules.lucidrains_attention("there", "here", fused=fused, out="to_out.0", out_bias=True)
    layer = nn.MultiHeadDotProductAttention(4, qkv_features=8, out_features=6)
    made = tree(carry(torch_weights(module), lines, to="flax", sizes=SIZES))
    zeros = {name: {"bias": np.zeros((4, 2), np.float32)} for name in ("query", "key", "value")}
    params = {name: made[name] | zeros.get(name, {}) for name in made}
    np.testing.assert_allclose(
        jax.jit(layer.apply)({"params": params}, x.numpy()), module(x).detach().numpy(), atol=1e-6
    )


@pytest.mark.parametrize("tiled", [False, True])
def test_tiled_and_grouped_heads_compute_the_same(tiled: bool) -> None:
    """In torch query head n reads n % 2 if tiled, else n // 2; in Flax always n // 2."""
    torch.manual_seed(0)
    q, k, v, o = (torch.nn.Linear(a, b) for a, b in ((6, 12), (6, 6), (6, 6), (12, 6)))
    x = torch.randn(2, 3, 6)
    heads = [each(x).unflatten(-1, (-1, 3)).transpose(1, 2) for each in (q, k, v)]
    repeat = (lambda z: z.repeat(1, 2, 1, 1)) if tiled else (lambda z: z.repeat_interleave(2, 1))
    out = torch.nn.functional.scaled_dot_product_attention(heads[0], *map(repeat, heads[1:]))
    expected = o(out.transpose(1, 2).flatten(2)).detach().numpy()

    names = ("q", "k", "v", "o")
    there = {
        f"a.{name}.{part}": w
        for name, layer in zip(names, (q, k, v, o), strict=True)
        for part, w in layer.state_dict().items()
    }
    lines = rules.attention("a", "here", names=names, heads="4", kv_heads="2", tiled=tiled)
    params = {"params": tree(carry(there, lines, to="flax"))}
    layer = nnx.MultiHeadAttention(4, 6, qkv_features=12, num_kv_heads=2, decode=False, rngs=nnx.Rngs(0))
    for name in ("query", "key", "value", "out"):
        getattr(layer, name).kernel[...] = params["params"][name]["kernel"]
        getattr(layer, name).bias[...] = params["params"][name]["bias"]
    np.testing.assert_allclose(layer(jnp.asarray(x.numpy())), expected, atol=1e-6)

"""MultiHeadAttention in torch, NNX and Linen: the same weights give the same outputs, gradients and caches."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from einops import rearrange
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

import attend_jax
import attend_jax.linen
import attend_torch
from attend_jax.multihead import HIGHEST, product
from attend_shared.layers import Cache
from attend_shared.rotary import Rotary

B, N, J, C = 2, 6, 5, 12
RNG = np.random.default_rng(0)
X = RNG.standard_normal((B, N, C))
CONTEXT = RNG.standard_normal((B, J, 7))
LEFT_PADDED = np.array([[False, False, True, True, True, True], [True] * N])
POSITIONS = np.maximum(LEFT_PADDED.cumsum(1) - 1, 0)
SEGMENTS = np.array([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2]])
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip

# What torch's path and array is in Flax. The last stays as it is.
RULES = {
    "out.weight": "o (h d) -> h d o",
    "query.weight": "(h d) c -> c h d",
    "key.weight": "(h d) c -> c h d",
    "value.weight": "(h d) c -> c h d",
    "out.bias": "o -> o",
    "query.bias": "(h d) -> h d",
    "key.bias": "(h d) -> h d",
    "value.bias": "(h d) -> h d",
    "query_norm.weight": "d -> d",
    "key_norm.weight": "d -> d",
    "query_norm.bias": "d -> d",
    "key_norm.bias": "d -> d",
    "sinks": "h -> h",
}

# Errors relative to the largest number of their kind. Measured over all cases: at most 8e-16 and 7e-7; other machines
# round otherwise. A head, a position or a mask that is off shows as 1e-2 to 1.
FLOAT64, FLOAT32 = 1e-14, 3e-6


# Each program runs once.
pytestmark = pytest.mark.usefixtures("compile_fast")


class Case(NamedTuple):
    """Options of a layer, and what it is called with."""

    options: dict[str, Any]
    inputs: dict[str, Any] = {}  # noqa: RUF012


CASES = {
    "plain": Case({"num_heads": 3}),
    "grouped, head and value sizes of their own": Case(
        {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "value_dim": 5, "out_dim": 9, "use_bias": False}
    ),
    "llama: half-split rotary, causal": Case(
        {"num_heads": 3, "num_kv_heads": 1, "use_bias": False, "is_causal": True, "rotary": Rotary(scaling=LLAMA3)}
    ),
    "gpt-j: interleaved rotary of a part, left padding": Case(
        {"num_heads": 2, "head_dim": 6, "is_causal": True, "rotary": Rotary(100.0, 4, interleaved=True)},
        {"mask": LEFT_PADDED, "positions": POSITIONS},
    ),
    "qwen 3: RMS norm of each head, biases of some": Case(
        {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "qk_norm": "rms", "norm_eps": 1e-2, "is_causal": True,
         "use_bias": [True, False, True, False], "rotary": Rotary()}
    ),
    "layer norm, softcap, window": Case(
        {"num_heads": 3, "qk_norm": "layer", "softcap": 0.7, "scale": 1.7, "window_size": [2, 1]}
    ),
    "sinks, lengths, bias": Case(
        {"num_heads": 3, "sinks": True},
        {"kv_lengths": np.array([4, 6]), "q_lengths": np.array([6, 5]), "bias": RNG.standard_normal((1, 3, N, N))},
    ),
    "packed segments": Case(
        {"num_heads": 2, "rotary": Rotary(), "is_causal": True},
        {"q_segment_ids": SEGMENTS, "kv_segment_ids": SEGMENTS, "positions": np.arange(N)},
    ),
    "cross-attention": Case({"num_heads": 3, "kv_dim": 7, "num_kv_heads": 1}, {"context": CONTEXT}),
    "cross-attention, rotary, causal": Case(
        {"num_heads": 2, "kv_dim": 7, "rotary": Rotary(10.0), "is_causal": True, "dropout": 0.5},
        {"context": CONTEXT, "kv_positions": np.arange(J) * 2, "q_offset": 1, "mask": np.array([[True] * 4 + [False]]),
         "dropout_seed": 7},
    ),
    "dropout": Case(
        {"num_heads": 4, "num_kv_heads": 2, "head_dim": 3, "dropout": 0.4, "is_causal": True},
        {"dropout_seed": 123456789123},
    ),
}  # fmt: skip


def torch_layer(options: dict[str, Any], dtype: torch.dtype = torch.float64) -> attend_torch.MultiHeadAttention:
    """A layer whose parameters are all drawn, those that start at 0 or 1 as well."""
    layer = attend_torch.MultiHeadAttention(C, **options, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.5 * drawn + (parameter.ndim == 1))
    return layer


def to_flax(options: dict[str, Any], name: str, array: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """A parameter of torch, or its gradient, as Flax names and shapes it."""
    module, _, kind = name.rpartition(".")
    grouped = module in ("key", "value") and options.get("num_kv_heads")
    heads = {"h": grouped or options["num_heads"]} if "(h d)" in RULES[name] else {}
    path = (module, {"weight": "scale" if "norm" in module else "kernel"}.get(kind, kind)) if module else (name,)
    return path, rearrange(array, RULES[name], **heads)


def weights_of(layer: Any, options: dict[str, Any]) -> dict[tuple[str, ...], np.ndarray]:
    return dict(to_flax(options, name, p.detach().numpy()) for name, p in layer.named_parameters())


def shapes(flat: dict[tuple[str, ...], Any]) -> dict[tuple[str, ...], tuple[int, ...]]:
    return {path: x.shape for path, x in flat.items()}


def nnx_call(options: dict[str, Any], dtype: str) -> tuple[Callable[..., Any], Any]:
    """A function of (weights, inputs) and the layer's own weights, as a tree."""
    graph, state, others = nnx.split(
        attend_jax.MultiHeadAttention(C, **options, param_dtype=dtype, rngs=nnx.Rngs(0)), nnx.Param, ...
    )

    def call(weights: Any, **inputs: Any) -> Any:
        nnx.replace_by_pure_dict(state, weights)
        return nnx.merge(graph, state, others)(**inputs)

    return call, nnx.to_pure_dict(state)


def linen_call(options: dict[str, Any], dtype: str) -> tuple[Callable[..., Any], Any]:
    layer = attend_jax.linen.MultiHeadAttention(C, **options, param_dtype=dtype)
    context = np.zeros((B, J, options["kv_dim"]), dtype) if "kv_dim" in options else None

    def initial() -> Any:
        return layer.init(jax.random.key(0), np.zeros((B, J, C), dtype), context, q_offset=0, deterministic=True)

    def call(weights: Any, **inputs: Any) -> Any:
        return layer.apply({"params": weights}, **inputs, deterministic=False)

    return call, jax.eval_shape(initial)["params"]


CALLS = {"nnx": nnx_call, "linen": linen_call}


def differentiable(inputs: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The inputs with a gradient, x among them, and the others."""
    with_gradient = {"x": X} | {name: inputs[name] for name in ("context", "bias") if name in inputs}
    return with_gradient, {name: x for name, x in inputs.items() if name not in with_gradient}


class Outcome(NamedTuple):
    """What a layer gives, and the gradients of a loss over it."""

    out: np.ndarray
    inputs: dict[str, np.ndarray]
    weights: dict[tuple[str, ...], np.ndarray]


def cotangent(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(9).standard_normal(shape)


def in_torch(case: Case, layer: Any, dtype: torch.dtype = torch.float64) -> Outcome:
    x, rest = differentiable(case.inputs)
    leaves = {name: torch.from_numpy(array).to(dtype).requires_grad_() for name, array in x.items()}
    out = layer(**leaves, **{n: torch.from_numpy(a) if isinstance(a, np.ndarray) else a for n, a in rest.items()})
    out.backward(torch.from_numpy(cotangent(out.shape)).to(dtype))
    gradients = dict(to_flax(case.options, name, p.grad.numpy()) for name, p in layer.named_parameters())
    return Outcome(out.detach().numpy(), {name: leaf.grad.numpy() for name, leaf in leaves.items()}, gradients)


def in_flax(kind: str, case: Case, weights: dict[tuple[str, ...], np.ndarray], dtype: str = "float64") -> Outcome:
    call, own = CALLS[kind](case.options, dtype)
    assert shapes(flatten_dict(own)) == shapes(weights), "the same parameters in the same shapes"
    x, rest = differentiable(case.inputs)
    leaves = {name: jnp.asarray(array, dtype) for name, array in x.items()}
    tree = unflatten_dict({path: jnp.asarray(array, dtype) for path, array in weights.items()})

    @jax.jit
    def run(weights: Any, leaves: Any) -> Any:
        out, back = jax.vjp(lambda weights, leaves: call(weights, **leaves, **rest), weights, leaves)
        return out, *back(jnp.asarray(cotangent(out.shape), dtype))

    out, of_weights, of_leaves = run(tree, leaves)
    gradients = {path: np.asarray(x) for path, x in flatten_dict(of_weights).items()}
    return Outcome(np.asarray(out), {name: np.asarray(leaf) for name, leaf in of_leaves.items()}, gradients)


def agree(one: Outcome, other: Outcome, tolerance: float) -> None:
    """Errors relative to the largest number of each array; gradients relative to the largest of their kind."""
    np.testing.assert_allclose(one.out, other.out, rtol=0, atol=tolerance * np.abs(one.out).max())
    for ours, theirs in ((one.inputs, other.inputs), (one.weights, other.weights)):
        assert set(ours) == set(theirs)
        largest = max(np.abs(x).max() for x in ours.values())
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=tolerance * largest, err_msg=str(name))


# The three agree.


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_agree_in_float64(name: str) -> None:
    case = CASES[name]
    layer = torch_layer(case.options)
    expected, weights = in_torch(case, layer), weights_of(layer, case.options)
    assert all(np.abs(x).max() > 0 for x in expected.weights.values()), "every parameter has a part"
    with jax.enable_x64(True):
        for kind in CALLS:
            agree(expected, in_flax(kind, case, weights), FLOAT64)


@pytest.mark.parametrize(
    "fault",
    [{"rotary": Rotary()}, {"rotary": Rotary(interleaved=True, scaling=LLAMA3)}, {"rotary": None}, {"is_causal": False},
     {"scale": 0.501}, {"window_size": (4, None)}],
    ids=str,
)  # fmt: skip
def test_a_fault_is_seen_in_float32(fault: dict[str, Any]) -> None:
    case = CASES["llama: half-split rotary, causal"]
    right = in_torch(case, torch_layer(case.options))
    wrong = in_torch(case, torch_layer(case.options | fault))
    with pytest.raises(AssertionError):
        agree(right, wrong, 100 * FLOAT32)


@pytest.mark.parametrize("name", ["llama: half-split rotary, causal", "qwen 3: RMS norm of each head, biases of some"])
def test_outputs_and_gradients_agree_in_float32(name: str) -> None:
    case = CASES[name]
    layer = torch_layer(case.options)
    exact, weights = in_torch(case, layer), weights_of(layer, case.options)
    agree(exact, in_torch(case, torch_layer(case.options, torch.float32), torch.float32), FLOAT32)
    agree(exact, in_flax("nnx", case, weights, "float32"), FLOAT32)


@pytest.mark.parametrize("kind", ["torch", *CALLS])
def test_shorter_dtypes_come_and_go(kind: str) -> None:
    """bfloat16 in, bfloat16 out, and near what float64 gives; JAX under strict promotion."""
    case = CASES["qwen 3: RMS norm of each head, biases of some"]
    layer = torch_layer(case.options)
    weights, exact = weights_of(layer, case.options), layer(torch.from_numpy(X)).detach().numpy()
    if kind == "torch":
        out = torch_layer(case.options, torch.bfloat16)(torch.from_numpy(X).bfloat16())
        assert out.dtype == torch.bfloat16
        out = out.float().detach().numpy()
    else:
        call, _ = CALLS[kind](case.options, "bfloat16")
        short = unflatten_dict({path: jnp.asarray(x, "bfloat16") for path, x in weights.items()})
        out = call(short, x=jnp.asarray(X, "bfloat16"))
        assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=0.05 * np.abs(exact).max())


def test_flax_computes_in_dtype_and_keeps_param_dtype() -> None:
    for made in (
        attend_jax.MultiHeadAttention(C, 3, qk_norm="layer", sinks=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
        attend_jax.linen.MultiHeadAttention(C, 3, qk_norm="layer", sinks=True, dtype=jnp.bfloat16),
    ):
        x = X.astype(np.float32)
        if isinstance(made, nnx.Module):
            out, weights = made(x), nnx.to_pure_dict(nnx.state(made, nnx.Param))
        else:
            out, weights = made.init_with_output(jax.random.key(0), x)
        assert out.dtype == jnp.bfloat16
        assert {leaf.dtype.name for leaf in jax.tree.leaves(weights)} == {"float32"}
        assert made.make_cache(1, 4).k.dtype == jnp.bfloat16


# The same as other libraries.


@pytest.mark.parametrize("qwen", [False, True])
def test_it_is_the_attention_of_transformers(qwen: bool) -> None:
    shared: dict[str, Any] = {
        "hidden_size": C, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
        "attn_implementation": "eager",
    }  # fmt: skip
    host: Any
    if qwen:
        config = Qwen3Config(**shared, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
        host = modeling_qwen3.Qwen3Attention(config, 0)
        rotary, options = Rotary(1e6), {"qk_norm": "rms", "norm_eps": config.rms_norm_eps}
    else:
        config = LlamaConfig(**shared, rope_parameters={**LLAMA3, "rope_theta": 500.0})
        host = modeling_llama.LlamaAttention(config, 0)
        rotary, options = Rotary(500.0, scaling=LLAMA3), {}
    ours = attend_torch.MultiHeadAttention(
        C, 4, 2, 6, use_bias=False, rotary=rotary, is_causal=True, **options
    )
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj", "query_norm": "q_norm",
             "key_norm": "k_norm"}  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            module, _, kind = name.partition(".")
            drawn = torch.randn(parameter.shape, generator=generator)
            for one in (parameter, getattr(getattr(host, names[module]), kind)):
                one.copy_(drawn)
    x = torch.from_numpy(X).float()
    turned = (modeling_qwen3.Qwen3RotaryEmbedding if qwen else modeling_llama.LlamaRotaryEmbedding)(config)
    causal = torch.full((N, N), -torch.inf).triu(1)[None, None]
    expected, _ = host(x, position_embeddings=turned(x, torch.arange(N)[None]), attention_mask=causal)
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


def test_weights_of_torch_multihead_attention_carry_over() -> None:
    host = torch.nn.MultiheadAttention(C, 3, batch_first=True, dtype=torch.float64)
    ours = attend_torch.MultiHeadAttention(C, 3, dtype=torch.float64)
    parts = dict(zip(("query", "key", "value"), host.in_proj_weight.chunk(3), strict=True))
    state = {f"{name}.weight": part for name, part in parts.items()}
    state |= {f"{name}.bias": part for name, part in zip(parts, host.in_proj_bias.chunk(3), strict=True)}
    state |= {"out.weight": host.out_proj.weight, "out.bias": host.out_proj.bias}
    ours.load_state_dict(state)
    x = torch.from_numpy(X)
    ignored = torch.from_numpy(~LEFT_PADDED)
    torch.testing.assert_close(ours(x, mask=~ignored), host(x, x, x, key_padding_mask=ignored)[0])


def test_weights_of_flax_multihead_attention_are_ours() -> None:
    x = X.astype(np.float32)
    host = nnx.MultiHeadAttention(3, C, decode=False, rngs=nnx.Rngs(0))
    ours = attend_jax.MultiHeadAttention(C, 3, rngs=nnx.Rngs(1))
    nnx.update(ours, nnx.state(host, nnx.Param))
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose(ours(x), host(x), atol=1e-5)


# The cache.

DECODERS = {
    "grouped, half-split": (
        {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "is_causal": True, "rotary": Rotary()}, {}
    ),
    "window shorter than the prompt, interleaved": (
        {"num_heads": 2, "is_causal": True, "window_size": (1, None), "rotary": Rotary(interleaved=True)}, {}
    ),
    "window alone": ({"num_heads": 2, "window_size": (2, 0)}, {}),
    "left padding, sinks, softcap, norm": (
        {"num_heads": 3, "is_causal": True, "sinks": True, "softcap": 2.0, "qk_norm": "rms", "rotary": Rotary()},
        {"mask": LEFT_PADDED, "positions": POSITIONS},
    ),
}  # fmt: skip
SLOTS = N + 2
STEPS = {"one by one": [1] * N, "a prompt, then one by one": [4, 1, 1], "in two parts": [3, 3]}


def slots(mask: np.ndarray | None) -> dict[str, np.ndarray]:
    """A key mask over the slots of a cache; those beyond the end are never read."""
    return {} if mask is None else {"mask": np.pad(mask, ((0, 0), (0, SLOTS - N)), constant_values=True)}


@pytest.mark.parametrize("steps", STEPS.values(), ids=list(STEPS))
@pytest.mark.parametrize("name", DECODERS)
def test_cached_decoding_is_the_whole_pass(name: str, steps: list[int]) -> None:
    options, inputs = DECODERS[name]
    layer = torch_layer(options)
    whole = layer(torch.from_numpy(X), **{n: torch.from_numpy(x) for n, x in inputs.items()}).detach().numpy()
    for length in (0, torch.tensor(0)):
        cache, outs, start = layer.make_cache(B, SLOTS)._replace(length=length), [], 0
        empty = cache.k.clone()
        for i in steps:
            at = slice(start, start + i)
            data = slots(inputs.get("mask")) | {n: x[:, at] for n, x in inputs.items() if n == "positions"}
            given = {n: torch.from_numpy(x) for n, x in data.items()}
            before = cache.k
            out, cache = layer(torch.from_numpy(X[:, at]), **given, cache=cache)
            assert cache.k is not before
            outs.append(out.detach().numpy())
            start += i
        np.testing.assert_allclose(np.concatenate(outs, 1), whole, rtol=0, atol=1e-12)
        assert cache.length == N
        assert (empty == 0).all(), "a cache that was passed in stays as it was"


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("name", [name for name in DECODERS if name != "window alone"])
def test_cached_decoding_in_a_scan(name: str, kind: str) -> None:
    """The length is traced: one program for all steps, after a prompt of three."""
    options, inputs = DECODERS[name]
    layer = torch_layer(options)
    whole = layer(torch.from_numpy(X), **{n: torch.from_numpy(x) for n, x in inputs.items()}).detach().numpy()
    with jax.enable_x64(True):
        call, _ = CALLS[kind](options, "float64")
        weights = unflatten_dict({path: jnp.asarray(x) for path, x in weights_of(layer, options).items()})
        made = attend_jax.linen.MultiHeadAttention(C, **options).make_cache(B, SLOTS, jnp.float64)
        mask = slots(inputs.get("mask"))
        positions = jnp.asarray(inputs.get("positions", np.tile(np.arange(N), (B, 1))))

        @jax.jit
        def decode(weights: Any, x: Any, cache: Cache) -> Any:
            first, cache = call(weights, x=x[:, :3], positions=positions[:, :3], cache=cache, **mask)

            def step(cache: Cache, at: Any) -> tuple[Cache, Any]:
                token, position = at
                out, cache = call(weights, x=token[:, None], positions=position[:, None], cache=cache, **mask)
                return cache, out[:, 0]

            cache, rest = jax.lax.scan(step, cache, (x[:, 3:].swapaxes(0, 1), positions[:, 3:].T))
            return jnp.concatenate([first, rest.swapaxes(0, 1)], 1), cache

        out, cache = decode(weights, jnp.asarray(X), made)
        np.testing.assert_allclose(out, whole, rtol=0, atol=1e-12)
        assert (cache.length, cache.length.dtype) == (N, jnp.int32)


def test_the_caches_of_the_frameworks_are_the_same() -> None:
    options, _ = DECODERS["grouped, half-split"]
    layer = torch_layer(options)
    _, cache = layer(torch.from_numpy(X), cache=layer.make_cache(B, SLOTS))
    with jax.enable_x64(True):
        call, _ = nnx_call(options, "float64")
        weights = unflatten_dict({path: jnp.asarray(x) for path, x in weights_of(layer, options).items()})
        empty = attend_jax.linen.MultiHeadAttention(C, **options).make_cache(B, SLOTS, jnp.float64)
        _, in_jax = call(weights, x=jnp.asarray(X), cache=empty._replace(length=0))  # an int, outside jit
    for name, ours, theirs in zip(Cache._fields, cache, in_jax, strict=True):
        np.testing.assert_allclose(np.asarray(ours.detach()), np.asarray(theirs), atol=1e-12, err_msg=name)


@pytest.mark.parametrize("window", [None, (2, None), (None, 1)])
def test_what_is_not_filled_is_not_seen(window: tuple[int | None, int | None] | None) -> None:
    """A layer that is not causal attends to all that the cache holds, and NaN behind it does not matter."""
    layer = torch_layer({"num_heads": 2, "window_size": window})
    x = torch.from_numpy(X)
    lengths = torch.tensor([N - 1, N + 1])
    for length in (0, torch.tensor(0)):
        cache = layer.make_cache(B, SLOTS)._replace(length=length)
        filthy = cache._replace(k=cache.k + torch.nan, v=cache.v + torch.nan)
        out, _ = layer(x, cache=filthy)
        torch.testing.assert_close(out, layer(x))
        out, _ = layer(x, cache=filthy, kv_lengths=lengths)
        torch.testing.assert_close(out, layer(x, kv_lengths=lengths))


def test_what_is_not_filled_is_not_seen_in_jax() -> None:
    layer = attend_jax.MultiHeadAttention(X.shape[2], 2, rngs=nnx.Rngs(0))
    x = jnp.asarray(X, jnp.float32)
    for length in (0, jnp.int32(0)):
        cache = layer.make_cache(x.shape[0], x.shape[1] + 3)._replace(length=length)
        out, _ = layer(x, cache=cache._replace(k=cache.k + jnp.nan, v=cache.v + jnp.nan))
        np.testing.assert_allclose(out, layer(x), atol=1e-6)


def test_left_padding_is_as_if_it_were_not_there() -> None:
    options = DECODERS["left padding, sinks, softcap, norm"][0]
    layer = torch_layer(options)
    x = torch.from_numpy(X)
    out = layer(x, mask=torch.from_numpy(LEFT_PADDED), positions=torch.from_numpy(POSITIONS))
    torch.testing.assert_close(out[:1, 2:], layer(x[:1, 2:]))
    assert not torch.allclose(out[:1, 2:], layer(x, positions=torch.from_numpy(POSITIONS))[:1, 2:])


def test_positions_start_behind_the_cache() -> None:
    layer = torch_layer(DECODERS["grouped, half-split"][0])
    x = torch.from_numpy(X)
    _, cache = layer(x[:, :4], cache=layer.make_cache(B, SLOTS))
    by_itself, _ = layer(x[:, 4:], cache=cache)
    torch.testing.assert_close(by_itself, layer(x[:, 4:], cache=cache, positions=torch.tensor([4, 5]))[0])
    assert not torch.allclose(by_itself, layer(x[:, 4:], cache=cache, positions=torch.tensor([0, 5]))[0])


def test_an_overflow_cannot_pass_unseen() -> None:
    """An int length is an error; one that is data makes NaN, in this step and in every later one."""
    layer = torch_layer({"num_heads": 2, "is_causal": True})
    x = torch.from_numpy(X)
    full = layer.make_cache(B, N)
    with pytest.raises(ValueError, match="cache: expected room for 1 more beside 6 filled slots, got 6 slots"):
        layer(x[:, :1], cache=full._replace(length=N))
    out, cache = layer(x, cache=full)
    assert out.isfinite().all()
    for _ in range(2):
        out, cache = layer(x[:, :1], cache=cache)
        assert out.isnan().all()
    in_jax = attend_jax.MultiHeadAttention(C, 2, is_causal=True, rngs=nnx.Rngs(0))
    step = nnx.jit(lambda layer, x, cache: layer(x, cache=cache))
    cache = in_jax.make_cache(B, 2)
    for finite in (True, True, False, False):
        out, cache = step(in_jax, X[:, :1].astype(np.float32), cache)
        assert bool(jnp.isfinite(out).all()) is finite
        assert finite or bool(jnp.isnan(out).all())


def test_a_projected_context_serves_many_calls() -> None:
    case = CASES["cross-attention, rotary, causal"]
    layer = torch_layer(case.options).eval()
    x, context, kv_positions = (torch.from_numpy(each) for each in (X, CONTEXT, case.inputs["kv_positions"]))
    projected = layer.project(context, kv_positions)
    torch.testing.assert_close(
        layer(x, projected, q_offset=0), layer(x, context, kv_positions=kv_positions, q_offset=0), rtol=0, atol=0
    )
    weights = {path: x.astype(np.float32) for path, x in weights_of(layer, case.options).items()}
    linen = attend_jax.linen.MultiHeadAttention(C, **case.options)
    variables = {"params": unflatten_dict(weights)}
    in_linen = linen.apply(variables, CONTEXT.astype(np.float32), case.inputs["kv_positions"], method="project")
    for ours, theirs in zip(projected, in_linen, strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, atol=1e-5)
    out = linen.apply(variables, X.astype(np.float32), in_linen, q_offset=0, deterministic=True)
    np.testing.assert_allclose(out, layer(x, projected, q_offset=0).detach().numpy(), atol=1e-4)


# Training and evaluation.


def test_dropout_follows_the_modes() -> None:
    x = torch.from_numpy(X)
    layer = torch_layer({"num_heads": 2, "dropout": 0.5})
    assert not torch.equal(layer(x), layer(x)), "in training each call draws"
    torch.testing.assert_close(layer(x, dropout_seed=5), layer(x, dropout_seed=5), rtol=0, atol=0)
    layer.eval()
    assert torch.equal(layer(x), layer(x, dropout_seed=5))
    in_jax = attend_jax.MultiHeadAttention(C, 2, dropout=0.5, rngs=nnx.Rngs(0))
    y = X.astype(np.float32)
    assert not jnp.array_equal(in_jax(y), in_jax(y))
    assert jnp.array_equal(in_jax(y, rngs=nnx.Rngs(3)), in_jax(y, rngs=nnx.Rngs(3)))
    in_jax.eval()
    assert jnp.array_equal(in_jax(y), in_jax(y, dropout_seed=5))
    linen = attend_jax.linen.MultiHeadAttention(C, 2, dropout=0.5)
    variables = linen.init(jax.random.key(0), y, deterministic=True)
    with pytest.raises(ValueError, match="deterministic: expected True or False where dropout > 0"):
        linen.apply(variables, y)
    drawn = [
        linen.apply(variables, y, deterministic=False, rngs={"dropout": jax.random.key(n)}) for n in (0, 1, 0)
    ]
    assert not jnp.array_equal(drawn[0], drawn[1])
    assert jnp.array_equal(drawn[0], drawn[2])


# Initial weights.

WIDE: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "value_dim": 8, "kv_dim": 96, "out_dim": 24,
                        "sinks": True, "qk_norm": "layer"}  # fmt: skip
FANS = {"query": (64, 64), "key": (96, 32), "value": (96, 16), "out": (32, 24)}


def initial(kind: str) -> dict[tuple[str, ...], np.ndarray]:
    if kind == "torch":
        with torch.random.fork_rng():
            torch.manual_seed(5)
            layer = attend_torch.MultiHeadAttention(64, **WIDE)
        return weights_of(layer, WIDE)
    if kind == "nnx":
        layer = attend_jax.MultiHeadAttention(64, **WIDE, rngs=nnx.Rngs(5))
        tree = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    else:
        x, context = np.zeros((1, 2, 64), np.float32), np.zeros((1, 2, 96), np.float32)
        tree = attend_jax.linen.MultiHeadAttention(64, **WIDE).init(jax.random.key(5), x, context)["params"]
    return {path: np.asarray(x) for path, x in flatten_dict(tree).items()}


@pytest.mark.parametrize("kind", ["torch", *CALLS])
def test_weights_start_from_one_distribution(kind: str) -> None:
    """Uniform in (-a, a), by bounds, mean, deviation and the Kolmogorov-Smirnov distance at one seed."""
    weights = initial(kind)
    for name, fans in FANS.items():
        drawn = weights.pop((name, "kernel")).ravel().astype(np.float64)
        bound, n = np.sqrt(6 / sum(fans)), drawn.size
        assert n == fans[0] * fans[1]
        assert 0.99 * bound < np.abs(drawn).max() <= bound * (1 + 1e-6)
        assert abs(drawn.mean()) < 4 * bound / np.sqrt(3 * n)
        assert drawn.std() == pytest.approx(bound / np.sqrt(3), rel=4 / np.sqrt(n))
        expected = (np.sort(drawn) + bound) / (2 * bound)
        assert np.abs(expected - (np.arange(n) + 0.5) / n).max() < 1.95 / np.sqrt(n), "one in a thousand is further"
        assert len(np.unique(drawn)) > 0.9 * n
    for path, x in weights.items():
        assert (x == (path[-1] == "scale")).all(), path


def test_resetting_draws_anew() -> None:
    layer = torch_layer(WIDE)
    before = {name: x.detach().clone() for name, x in layer.named_parameters()}
    layer.reset_parameters()
    assert not any(torch.equal(x, before[name]) for name, x in layer.named_parameters())
    assert (layer.sinks == 0).all()


# What frameworks do with modules.


def test_torch_modules_are_copied_saved_and_compiled() -> None:
    layer = torch_layer({**DECODERS["grouped, half-split"][0], "qk_norm": "rms", "sinks": True}, torch.float32)
    x = torch.from_numpy(X).float()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    assert sorted(layer.state_dict()) == sorted(name for name, _ in layer.named_parameters()), "no buffers"
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        out, cache = compiled(x[:, :4], cache=layer.make_cache(B, SLOTS))
        torch.testing.assert_close(out, layer(x[:, :4]))
        out, cache = compiled(x[:, 4:], cache=cache)
        torch.testing.assert_close(out, layer(x)[:, 4:])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert layer(x[:, :2], cache=layer.make_cache(B, SLOTS, torch.bfloat16))[1].k.dtype == torch.bfloat16
    meta = attend_torch.MultiHeadAttention(C, 4, rotary=Rotary(dim=2), device="meta")
    assert meta.to_empty(device="cpu").load_state_dict(attend_torch.MultiHeadAttention(C, 4).state_dict())
    assert meta(x).shape == (B, N, C), "the frequencies are no buffer that the meta device loses"


def test_flax_modules_hold_their_parameters_and_no_more() -> None:
    layer = attend_jax.MultiHeadAttention(C, 4, rotary=Rotary(dim=2), qk_norm="rms", rngs=nnx.Rngs(0))
    assert jax.tree.structure(nnx.state(layer)) == jax.tree.structure(nnx.state(layer, nnx.Param))
    assert nnx.jit(lambda layer, x: layer(x))(layer, X.astype(np.float32)).shape == (B, N, C)
    linen = attend_jax.linen.MultiHeadAttention(C, 4, use_bias=[True, True, True, False], window_size=[1, None])
    assert hash(linen) == hash(linen.clone())


@pytest.mark.parametrize("kind", ["torch", *CALLS])
def test_lengths_may_be_0(kind: str) -> None:
    options = CASES["cross-attention"].options
    for x, context in ((X[:, :0], CONTEXT), (X, CONTEXT[:, :0]), (X[:0], CONTEXT[:0])):
        if kind == "torch":
            out: Any = torch_layer(options)(torch.from_numpy(x), torch.from_numpy(context)).detach()
        else:
            layer = torch_layer(options)
            weights = {path: np.float32(w) for path, w in weights_of(layer, options).items()}
            call, _ = CALLS[kind](options, "float32")
            out = call(unflatten_dict(weights), x=np.float32(x), context=np.float32(context))
        assert out.shape == x.shape
        assert np.isfinite(np.asarray(out)).all()


# Wrong calls, in the same words.

OK: dict[str, Any] = {"embed_dim": C, "num_heads": 4}
WRONG_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"embed_dim": 0}, ValueError, "embed_dim: expected a whole number >= 1, got int 0. The width of x."),
    ({"embed_dim": 12.0}, TypeError, "embed_dim: expected a whole number >= 1, got float 12.0."),
    ({"num_heads": True}, TypeError, "num_heads: expected a whole number >= 1, got bool True."),
    ({"num_heads": 5}, ValueError, "head_dim: expected a value, since 5 heads do not divide the width of 12, got None"),
    ({"num_kv_heads": 3}, ValueError, "num_kv_heads: expected a number that divides the 4 query heads, got int 3."),
    ({"num_kv_heads": 0}, ValueError, "num_kv_heads: expected a whole number >= 1, got int 0."),
    ({"head_dim": -1}, ValueError, "head_dim: expected a whole number >= 1, got int -1."),
    ({"value_dim": "8"}, TypeError, "value_dim: expected a whole number >= 1, got str '8'."),
    ({"kv_dim": 0}, ValueError, "kv_dim: expected a whole number >= 1, got int 0."),
    ({"out_dim": 0}, ValueError, "out_dim: expected a whole number >= 1, got int 0."),
    ({"use_bias": 1}, TypeError, "use_bias: expected a bool, or four of them for query, key, value and out, got int 1"),
    ({"use_bias": (True, False)}, ValueError, "use_bias: expected a bool, or four of them for query, key, value and o"),
    ({"qk_norm": "batch"}, ValueError, "qk_norm: expected None, \"rms\" or \"layer\", got str 'batch'."),
    ({"qk_norm": True}, ValueError, "qk_norm: expected None, \"rms\" or \"layer\", got bool True."),
    ({"norm_eps": -1e-6}, ValueError, "norm_eps: expected a number >= 0, got float -1e-06."),
    ({"rotary": 10000.0}, TypeError, "rotary: expected a Rotary, or None, got float 10000.0."),
    ({"rotary": Rotary()}, ValueError, "rotary: expected an even head_dim, since coordinates turn in pairs, got int 3"),
    ({"rotary": Rotary(dim=4)}, ValueError, "rotary: expected dim up to the head_dim of 3, got int 4."),
    ({"sinks": 4}, TypeError, "sinks: expected a bool, got int 4. True makes a parameter sinks (num_heads,), 0 at fir"),
    ({"window_size": 4}, TypeError, "window_size: expected a pair (left, right), each a whole number >= 0 or None"),
    ({"softcap": 0.0}, ValueError, "softcap: expected a number > 0, got float 0.0."),
    ({"dropout": 1.0}, ValueError, "dropout: expected a probability in [0, 1), got float 1.0."),
    ({"implementation": "flash"}, ValueError, "implementation: expected one of"),
]


def layers(options: dict[str, Any]) -> Iterator[tuple[Callable[..., Any], Callable[[Any], Any]]]:
    """Each kind: a function that makes a layer and calls it, and how it takes arrays."""
    options = OK | options

    def torch_call(*inputs: Any, **data: Any) -> Any:
        return attend_torch.MultiHeadAttention(**options)(*inputs, **data)

    def of_nnx(*inputs: Any, **data: Any) -> Any:
        return attend_jax.MultiHeadAttention(**options, rngs=nnx.Rngs(0))(*inputs, **data)

    def of_linen(*inputs: Any, **data: Any) -> Any:
        return attend_jax.linen.MultiHeadAttention(**options).init_with_output(jax.random.key(0), *inputs, **data)

    yield torch_call, lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x
    yield of_nnx, lambda x: x
    yield of_linen, lambda x: x


def told(options: dict[str, Any], error: type[Exception], *inputs: Any, **data: Any) -> str:
    """The one text of all three."""
    texts = set()
    for call, array in layers(options):
        with pytest.raises(error) as raised:
            call(*jax.tree.map(array, inputs, is_leaf=is_none), **jax.tree.map(array, data, is_leaf=is_none))
        assert type(raised.value) is error
        texts.add(str(raised.value))
    assert len(texts) == 1, texts
    return texts.pop()


def is_none(x: Any) -> bool:
    return x is None


@pytest.mark.parametrize(("options", "error", "text"), WRONG_OPTIONS, ids=lambda x: str(x)[:60])
def test_a_wrong_option_is_told_alike(options: dict[str, Any], error: type[Exception], text: str) -> None:
    assert text in told(options, error, X.astype(np.float32))


F32 = X.astype(np.float32)
K = np.zeros((B, 4, SLOTS, 3), np.float32)
GOOD = Cache(K, K, np.zeros((), np.int32))
WRONG_INPUTS: list[tuple[dict[str, Any], tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ({}, (F32[..., :5],), {}, ValueError, "x: expected (b, i, embed_dim) with embed_dim = 12, got float32 of shape (2"),
    ({}, (F32[0],), {}, ValueError, "x: expected (b, i, embed_dim) with embed_dim = 12, got float32 of shape (6, 12)."),
    ({}, ([1.0],), {}, TypeError, "x: expected an array of the framework that is called, got list (float 1.0)."),
    ({}, (F32.astype(np.int32),), {}, TypeError, "x: expected one of float16, bfloat16, float32, float64, got int32"),
    ({"kv_dim": 7}, (F32,), {}, ValueError, "context: expected (b, j, kv_dim) with kv_dim = 7, got None. x has width"),
    ({"kv_dim": 7}, (F32, F32), {}, ValueError, "context: expected (b, j, kv_dim) with b = 2 as in x and kv_dim = 7,"),
    ({}, (F32, F32[:1]), {}, ValueError, "context: expected (b, j, kv_dim) with b = 2 as in x and kv_dim = 12, got fl"),
    ({}, (F32, (K,)), {}, TypeError, "context: expected an array, or the pair (k, v) that project makes of one, got t"),
    ({}, (F32, GOOD), {}, TypeError, "context: expected an array, or the pair (k, v) that project makes of one, got C"),
    ({}, (F32, (K[:1], K)), {}, ValueError, "context.k: expected shape (2, 4, j, 3), got float32 of shape (1, 4, 8, 3"),
    ({}, (F32, (K, K[..., :2])), {}, ValueError, "context.v: expected shape (2, 4, j, 3), got float32 of shape (2, 4,"),
    ({}, (F32,), {"positions": F32[0, :, 0]}, TypeError, "positions: expected integers of shape (n,), (1, n) or (b, n"),
    ({}, (F32,), {"positions": POSITIONS[:, :3]}, ValueError, "positions: expected integers of shape (n,), (1, n) or"),
    ({}, (F32,), {"kv_positions": POSITIONS}, ValueError, "kv_positions: expected None where keys are not projected f"),
    ({}, (F32, F32), {"cache": GOOD}, ValueError, "cache: expected None where there is a context, got Cache"),
    ({}, (F32,), {"cache": (K, K, 0)}, TypeError, "cache: expected a Cache, or None, got tuple"),
    ({}, (F32,), {"cache": GOOD._replace(k=K[:1])}, ValueError, "cache.k: expected shape (2, 4, n, 3), got float32 of"),
    ({}, (F32,), {"cache": GOOD._replace(v=K[:, :, :5])}, ValueError, "cache.v: expected shape (2, 4, 8, 3), got floa"),
    ({}, (F32,), {"cache": GOOD._replace(length=-1)}, ValueError, "cache.length: expected a whole number >= 0, got in"),
    ({}, (F32,), {"cache": GOOD._replace(length=0.0)}, TypeError, "cache.length: expected integers of shape () = (),"),
    ({}, (F32,), {"cache": GOOD._replace(length=np.zeros(2, np.int32))}, ValueError, "cache.length: expected integers"),
    ({}, (F32,), {"cache": GOOD._replace(length=3)}, ValueError, "cache: expected room for 6 more beside 3 filled slo"),
    ({}, (np.tile(F32, (1, 2, 1)),), {"cache": GOOD}, ValueError, "cache: expected room for 12 more beside what it ma"),
    ({}, (F32,), {"cache": Cache(np.float16(K), np.float16(K), 0)}, TypeError, "cache.k: expected float32, the dtype"),
    ({}, (F32,), {"cache": GOOD, "q_offset": 0}, ValueError, "q_offset: expected None where there is a cache, got int"),
    ({}, (F32,), {"cache": GOOD, "kv_lengths": [3]}, TypeError, "kv_lengths: expected integers of shape (b,) = (2,),"),
    ({}, (F32,), {"cache": GOOD, "mask": LEFT_PADDED}, ValueError, "mask: expected a rank-2 key mask (b, j) = (2, 8)"),
    ({"is_causal": True}, (F32, F32[:, :4]), {}, ValueError, "q_offset: expected a value, since 6 queries against 4 k"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "inputs", "data", "error", "text"), WRONG_INPUTS, ids=[each[4][:60] for each in WRONG_INPUTS]
)
def test_a_wrong_input_is_told_alike(
    options: dict[str, Any], inputs: tuple[Any, ...], data: dict[str, Any], error: type[Exception], text: str
) -> None:
    assert text in told(options, error, *inputs, **data)


@pytest.mark.parametrize(("sizes", "error"), [((2.0, 3), TypeError), ((2, -3), ValueError), ((True, 3), TypeError)])
def test_a_wrong_cache_size_is_told_alike(sizes: Any, error: type[Exception]) -> None:
    texts = set()
    for made in (
        attend_torch.MultiHeadAttention(**OK),
        attend_jax.MultiHeadAttention(**OK, rngs=nnx.Rngs(0)),
        attend_jax.linen.MultiHeadAttention(**OK),
    ):
        with pytest.raises(error) as raised:
            made.make_cache(*sizes)
        texts.add(str(raised.value))
    assert len(texts) == 1
    assert "expected a whole number >= 0, got" in texts.pop()


@pytest.mark.parametrize("kind", ["torch", *CALLS])
def test_functions_reach_attend(kind: str) -> None:
    def near(b: Any, h: Any, query: Any, key: Any) -> Any:
        return query - key <= 1

    options = {"num_heads": 2, "is_causal": True}
    layer = torch_layer(options)
    expected = torch_layer({**options, "window_size": (1, None)})(torch.from_numpy(X)).detach().numpy()
    if kind == "torch":
        out = layer(torch.from_numpy(X), mask_fn=near).detach().numpy()
    else:
        weights = {path: np.float32(w) for path, w in weights_of(layer, options).items()}
        out = CALLS[kind](options, "float32")[0](unflatten_dict(weights), x=np.float32(X), mask_fn=near)
    np.testing.assert_allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize(("dtype", "rows"), [("float32", 0), ("float32", 3), ("bfloat16", 1), ("bfloat16", 3)])
def test_a_product_by_another_way_is_the_same(dtype: str, rows: int) -> None:
    """With the contracted axes where query, out and a tied head have them, gradients included."""
    draw = np.random.default_rng(0).standard_normal
    for x, kernel, axes in (
        ((1, rows, 64), (64, 3, 5), ((2,), (0,))),
        ((rows, 1, 4, 16), (4, 16, 7), ((2, 3), (0, 1))),
        ((1, rows, 64), (7, 64), ((2,), (1,))),
        ((rows, 33), (33, 7), ((1,), (0,))),
    ):
        given = [jnp.asarray(draw(shape), dtype) for shape in (x, kernel)]

        def call(function: Any, x: Any, kernel: Any, axes: Any = axes) -> Any:
            out, back = jax.vjp(lambda *both: function(*both, (axes, ((), ())), precision=HIGHEST), x, kernel)
            return out, *back(jnp.ones_like(out))

        found, expected = (jax.jit(call, static_argnums=0)(each, *given) for each in (product, jax.lax.dot_general))
        for one, other in zip(found, expected, strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            exact = np.asarray(other, np.float64)
            size = np.abs(exact).max(initial=1.0) * float(jnp.finfo(dtype).eps)
            assert np.abs(np.asarray(one, np.float64) - exact).max(initial=0.0) <= 4 * size

"""Attend as a module: torch.nn, Flax NNX and Flax Linen hold the same options and mean the same."""

import copy
import pickle
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import attend_jax.arrays
import attend_torch.arrays
from attend_jax.convert import seed_from_key
from attend_jax.implementations import EINSUM as JAX_EINSUM
from attend_jax.linen import Attend as LinenAttend
from attend_shared import UnsupportedError, choice, philox
from attend_shared.call import Arrays, Framework, check
from attend_torch.implementations import EINSUM as TORCH_EINSUM

B, H, N, D = 2, 4, 6, 8
RNG = np.random.default_rng(0)
Q, K, V = RNG.standard_normal((3, B, H, N, D)).astype(np.float32)
MASK = RNG.random((B, N)) < 0.7
FIVE = 5  # standard deviations


# What is tested here is what reaches attend: each program runs once.
pytestmark = pytest.mark.usefixtures("compile_fast")


def equal_logits(n: int = 16) -> tuple[np.ndarray, ...]:
    """q, k, v whose output shows the keep mask: equal logits on an identity."""
    zeros = np.zeros((B, H, n, D), np.float32)
    return zeros, zeros, np.broadcast_to(np.eye(n, dtype=np.float32), (B, H, n, n)).copy()


def kept(out: Any) -> np.ndarray:
    return np.asarray(out) > 0


def tensors(*arrays: Any) -> tuple[Any, ...]:
    return tuple(torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in arrays)


def call(kind: str, options: dict[str, Any], *inputs: Any, **data: Any) -> np.ndarray:
    """A module of one kind, made with these options, in evaluation."""
    if kind == "torch":
        named = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in data.items()}
        return attend_torch.Attend(**options).eval()(*tensors(*inputs), **named)
    if kind == "nnx":
        return attend_jax.Attend(**options, deterministic=True)(*inputs, **data)
    return LinenAttend(**options).apply({}, *inputs, **data, deterministic=True)


KINDS = pytest.mark.parametrize("kind", ["torch", "nnx", "linen"])


# All three.


@KINDS
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": -0.5, "softcap": 2.0}, {"window_size": [1, None]}, {"layout": "bnhd"},
     {"flash": False}, {"implementation": ["einsum"]}, {"dropout": 0.5}],
    ids=str,
)  # fmt: skip
def test_a_module_is_attend_with_its_options(kind: str, options: dict[str, Any]) -> None:
    data = {"mask": MASK, "bias": RNG.standard_normal((1, H, N, N)).astype(np.float32)}
    inputs = tuple(x.swapaxes(1, 2).copy() for x in (Q, K, V)) if "layout" in options else (Q, K, V)
    same = {name: x for name, x in options.items() if name not in ("flash", "dropout")}
    expected = attend_jax.attend(*inputs, **data, **{"implementation": "einsum"} | same)
    np.testing.assert_allclose(call(kind, options, *inputs, **data), expected, rtol=2e-5, atol=2e-6)


@KINDS
def test_every_argument_of_the_call_arrives(kind: str) -> None:
    """Each is given in a way that changes the answer."""
    ids = np.array([[0, 0, 1, 1, 2, 2]] * B, np.int32)
    data: dict[str, Any] = {
        "mask": MASK,
        "bias": RNG.standard_normal((1, H, N, N)).astype(np.float32),
        "q_offset": 2,
        "q_segment_ids": ids,
        "kv_segment_ids": ids[:, ::-1].copy(),
        "q_lengths": np.array([4, 6]),
        "kv_lengths": np.array([6, 3]),
        "sinks": np.ones(H, np.float32),
    }
    plain = np.asarray(call(kind, {"is_causal": True}, Q, K, V))
    for name, value in data.items():
        options = {"is_causal": name == "q_offset"}
        changed = np.asarray(call(kind, options, Q, K, V, **{name: value}))
        expected = attend_jax.attend(Q, K, V, **options, **{name: value}, implementation="einsum")
        np.testing.assert_allclose(changed, expected, rtol=2e-5, atol=2e-6, err_msg=name)
        assert not np.allclose(changed, plain), name
    out, lse = call(kind, {}, Q, K, V, return_lse=True)
    assert (out.shape, lse.shape) == (Q.shape, Q.shape[:3])


@KINDS
def test_flash(kind: str) -> None:
    """None chooses, True demands no q_len x kv_len array, False is einsum."""
    arguments = (Q, K, V)
    expected = attend_jax.attend(*arguments, implementation="einsum")
    for flash in (None, True, False):
        np.testing.assert_allclose(call(kind, {"flash": flash}, *arguments), expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(
        call(kind, {"flash": False, "softcap": 2.0}, *arguments),
        attend_jax.attend(*arguments, softcap=2.0, implementation="einsum"), rtol=2e-5, atol=2e-6,
    )  # fmt: skip
    package = attend_torch if kind == "torch" else attend_jax
    names = [each.name for each in package.implementations() if each.fused and each.available]
    call(kind, {"implementation": names}, *arguments)


@pytest.mark.parametrize(("framework", "entry", "inputs"), [
    (attend_torch.arrays.FRAMEWORK, TORCH_EINSUM, tensors(Q, K, V)),
    (attend_jax.arrays.FRAMEWORK, JAX_EINSUM, (Q, K, V)),
], ids=["torch", "jax"])  # fmt: skip
def test_flash_refuses_einsum(framework: Framework, entry: choice.Entry, inputs: tuple[Any, ...]) -> None:
    """With nothing else in the table flash=True is an error, not a q_len x kv_len array."""
    call = check(framework, Arrays(*inputs), False, None, None, None, 0.0, False, "bhnd", None, True)
    assert call.flash is True
    with pytest.raises(UnsupportedError) as caught:
        choice.choose((entry,), call)
    assert caught.value.reasons == (("einsum", "it makes a q_len x kv_len array, and flash=True allows none"),)


# torch.


def test_torch_train_and_eval() -> None:
    module, inputs = attend_torch.Attend(dropout=0.5), tensors(*equal_logits())
    assert module.training
    assert not kept(module(*inputs)).all()
    assert kept(module.eval()(*inputs)).all()
    parent = torch.nn.ModuleDict({"attend": module})
    parent.train()
    assert not kept(module(*inputs)).all()


def test_torch_draws_from_its_default_generator() -> None:
    module, inputs = attend_torch.Attend(dropout=0.5), tensors(*equal_logits())
    torch.manual_seed(3)
    first, second = module(*inputs), module(*inputs)
    torch.manual_seed(3)
    assert torch.equal(module(*inputs), first)
    assert torch.equal(module(*inputs), second)
    assert not torch.equal(first, second)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        seed = int(torch.randint(-(2**63), 2**63 - 1, ()))
    np.testing.assert_array_equal(kept(first), philox.keep_mask(seed % 2**64, (B, H, 16, 16), 0.5))


def test_torch_draws_only_where_it_needs_a_seed() -> None:
    inputs = tensors(Q, K, V)
    before = torch.get_rng_state()
    attend_torch.Attend()(*inputs)
    attend_torch.Attend(dropout=0.5).eval()(*inputs)
    attend_torch.Attend(dropout=0.5)(*inputs, dropout_seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    attend_torch.Attend(dropout=0.5)(*inputs)
    assert not torch.equal(torch.get_rng_state(), before)


def test_torch_copies_pickles_and_has_no_state() -> None:
    module = attend_torch.Attend(0.1, None, 0.5, is_causal=True, window_size=[3, 0], implementation=["einsum"])
    assert not list(module.parameters()) and not module.state_dict()
    shown = "Attend(dropout=0.1, scale=0.5, is_causal=True, window_size=(3, 0), implementation=('einsum',))"
    for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.half().double()):
        assert repr(each) == shown
        each.load_state_dict({})
        assert torch.equal(each.eval()(*tensors(Q, K, V)), module.eval()(*tensors(Q, K, V)))
    assert repr(attend_torch.Attend()) == "Attend()"
    assert repr(attend_torch.Attend(flash=True, softcap=30.0, layout="bnhd")) == (
        "Attend(flash=True, softcap=30.0, layout='bnhd')")  # fmt: skip


# NNX.


def test_nnx_train_and_eval() -> None:
    module, inputs = attend_jax.Attend(dropout=0.5, rngs=nnx.Rngs(0)), equal_logits()
    assert module.deterministic is False
    assert not kept(module(*inputs)).all()
    module.eval()
    assert module.deterministic is True
    assert kept(module(*inputs)).all()
    assert not kept(module(*inputs, deterministic=False)).all()  # the call has the last word
    module.train()
    assert not kept(module(*inputs)).all()
    assert kept(module(*inputs, deterministic=True)).all()
    assert kept(attend_jax.Attend(dropout=0.5, deterministic=True)(*inputs)).all()


def test_nnx_rngs_are_forked() -> None:
    """A module draws from a stream of its own, and takes nothing from the one that it was given."""
    rngs = nnx.Rngs(dropout=1)
    first, second = (attend_jax.Attend(dropout=0.5, rngs=rngs) for _ in range(2))
    count = int(rngs.dropout.count[...])
    assert count == 2  # one fork each
    drawn = [kept(module(*equal_logits())) for module in (first, first, second, second)]
    assert len({mask.tobytes() for mask in drawn}) == 4
    assert int(rngs.dropout.count[...]) == count
    again = attend_jax.Attend(dropout=0.5, rngs=nnx.Rngs(dropout=1))
    np.testing.assert_array_equal(kept(again(*equal_logits())), drawn[0])
    attend_jax.Attend(dropout=0.0, rngs=nnx.Rngs(params=0))  # nothing to drop, no stream needed


def test_nnx_takes_rngs_and_streams_with_the_call() -> None:
    module, inputs = attend_jax.Attend(dropout=0.5), equal_logits()
    masks = [kept(module(*inputs, rngs=rngs)) for rngs in (nnx.Rngs(dropout=5), nnx.Rngs(dropout=5).dropout)]
    expected = philox.keep_mask(np.asarray(seed_from_key(nnx.Rngs(dropout=5).dropout())), (B, H, 16, 16), 0.5)
    for mask in masks:
        np.testing.assert_array_equal(mask, expected)
    stream = attend_jax.Attend(dropout=0.5, rngs=nnx.Rngs(dropout=5).dropout)
    assert not kept(stream(*inputs)).all()
    given = kept(stream(*inputs, dropout_seed=9, rngs=nnx.Rngs(0)))  # a seed goes before any stream
    np.testing.assert_array_equal(given, philox.keep_mask(9, (B, H, 16, 16), 0.5))


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_flax_raises_where_it_would_drop_without_a_seed(kind: str) -> None:
    def run(**options: Any) -> Any:
        if kind == "nnx":
            return attend_jax.Attend(dropout=0.5)(*equal_logits(), **options)
        return LinenAttend(dropout=0.5).apply({}, *equal_logits(), deterministic=False, **options)

    with pytest.raises(ValueError, match=r"^dropout_seed: expected .* got None\. Pass a fresh seed .* rngs\."):
        run()
    np.testing.assert_array_equal(kept(run(dropout_seed=4)), philox.keep_mask(4, (B, H, 16, 16), 0.5))


def test_nnx_jit_split_and_merge() -> None:
    module = attend_jax.Attend(0.5, window_size=[40, 40], implementation=["einsum"], rngs=nnx.Rngs(0))
    twin, eager = nnx.clone(module), nnx.clone(module)
    graph, state = nnx.split(twin)
    assert not jax.tree.leaves(nnx.state(module, nnx.Param))
    run = nnx.jit(lambda module, *inputs: module(*inputs))
    drawn = [kept(run(module, *equal_logits())) for _ in range(2)]
    assert not np.array_equal(*drawn)  # the count is carried out of the jit
    np.testing.assert_array_equal(kept(eager(*equal_logits())), drawn[0])

    @jax.jit
    def pure(state: Any, *inputs: Any) -> Any:
        module = nnx.merge(graph, state)
        return module(*inputs), nnx.state(module)

    first, state = pure(state, *equal_logits())
    second, state = pure(state, *equal_logits())
    np.testing.assert_array_equal([kept(first), kept(second)], drawn)
    assert hash(graph) == hash(nnx.graphdef(nnx.clone(module)))


def test_nnx_inside_a_model() -> None:
    """train() and eval() of the model reach it, and so does a gradient."""

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.qkv = nnx.Linear(D, 3 * D, rngs=rngs)
            self.attend = attend_jax.Attend(dropout=0.5, is_causal=True, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            q, k, v = jnp.split(self.qkv(x)[:, None], 3, -1)
            return self.attend(q, k, v)

    model, x = Model(nnx.Rngs(0)), jnp.asarray(Q[:, 0])
    assert not np.array_equal(model(x), model(x))
    model.eval()
    np.testing.assert_array_equal(model(x), model(x))
    gradients = nnx.grad(lambda model: (model(x) ** 2).sum())(model)
    assert all(np.abs(leaf).sum() > 0 for leaf in jax.tree.leaves(gradients))


# Linen.


def test_linen_has_no_parameters_and_needs_no_stream_unless_it_drops() -> None:
    module, inputs = LinenAttend(dropout=0.5), equal_logits()
    assert module.init({}, *inputs, deterministic=True) == {}
    assert LinenAttend().init(jax.random.key(0), *inputs) == {}
    assert kept(LinenAttend().apply({}, *inputs)).all()  # without dropout deterministic need not be said
    assert kept(module.apply({}, *inputs, deterministic=True)).all()
    with pytest.raises(ValueError, match=r"^deterministic: expected True or False where dropout > 0, got None\. "):
        module.apply({}, *inputs)
    with pytest.raises(ValueError, match=r"^deterministic: expected True or False where dropout > 0, got None\. "):
        module.apply({}, *inputs, rngs={"dropout": jax.random.key(0)})


def test_linen_draws_from_make_rng() -> None:
    module, inputs = LinenAttend(dropout=0.5), equal_logits()

    def drop(key: int, **data: Any) -> np.ndarray:
        return kept(module.apply({}, *inputs, **data, deterministic=False, rngs={"dropout": jax.random.key(key)}))

    np.testing.assert_array_equal(drop(0), drop(0))
    assert not np.array_equal(drop(0), drop(1))
    np.testing.assert_array_equal(drop(0, dropout_seed=6), philox.keep_mask(6, (B, H, 16, 16), 0.5))
    jitted = jax.jit(lambda key: module.apply({}, *inputs, deterministic=False, rngs={"dropout": key}))
    np.testing.assert_array_equal(kept(jitted(jax.random.key(0))), drop(0))


def test_linen_takes_from_the_stream_only_where_it_drops() -> None:
    """Linen counts what a scope draws: the next key says whether a call drew one."""
    inputs = equal_logits()

    def draws(options: dict[str, Any], deterministic: bool | None, **data: Any) -> np.ndarray:
        rngs = {"dropout": jax.random.key(0)}
        module = LinenAttend(**options).bind({}, rngs=rngs)
        module(*inputs, **data, deterministic=deterministic)
        return jax.random.key_data(module.make_rng("dropout"))

    untouched = draws({}, None)
    np.testing.assert_array_equal(draws({"dropout": 0.5}, True), untouched)
    np.testing.assert_array_equal(draws({"dropout": 0.5}, False, dropout_seed=1), untouched)
    assert not np.array_equal(draws({"dropout": 0.5}, False), untouched)


def test_linen_modules_are_values() -> None:
    """Lists become tuples, so that equal modules are equal and a module may be a static argument."""
    first = LinenAttend(window_size=[1, 2], implementation=["einsum"])
    second = LinenAttend(window_size=(1, 2), implementation=("einsum",))
    assert first == second and hash(first) == hash(second)
    assert first.clone(scale=2.0).scale == 2.0
    run = jax.jit(lambda module, *inputs: module.apply({}, *inputs), static_argnums=0)
    np.testing.assert_array_equal(run(first, Q, K, V), run(second, Q, K, V))


def test_linen_inside_a_model() -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            q, k, v = jnp.split(nn.Dense(3 * D)(x)[:, None], 3, -1)
            return LinenAttend(dropout=0.5, is_causal=True)(q, k, v, deterministic=not train)

    x = jnp.asarray(Q[:, 0])
    variables = Model().init(jax.random.key(0), x, False)
    assert set(variables["params"]) == {"Dense_0"}
    keys = [{"dropout": jax.random.key(n)} for n in (0, 1)]
    assert not np.array_equal(*(Model().apply(variables, x, True, rngs=rngs) for rngs in keys))
    np.testing.assert_array_equal(*(Model().apply(variables, x, False, rngs=rngs) for rngs in keys))


# Dropout in training has the right size.


@KINDS
def test_the_share_that_is_kept(kind: str) -> None:
    inputs, p = equal_logits(64), 0.25
    if kind == "torch":
        out = attend_torch.Attend(dropout=p)(*tensors(*inputs))
    elif kind == "nnx":
        out = attend_jax.Attend(dropout=p, rngs=nnx.Rngs(0))(*inputs)
    else:
        out = LinenAttend(dropout=p).apply({}, *inputs, deterministic=False, rngs={"dropout": jax.random.key(0)})
    out = np.asarray(out)
    assert abs((out > 0).mean() - (1 - p)) < FIVE * (p * (1 - p) / out.size) ** 0.5
    np.testing.assert_allclose(out[out > 0], 1 / 64 / (1 - p), rtol=1e-6)

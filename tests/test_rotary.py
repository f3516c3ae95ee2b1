"""Rotary embeddings: the frequencies and the turning are those of transformers, and the same in both frameworks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama

import attend_jax.rotary
import attend_torch.rotary
from attend_shared.rotary import KINDS, Rotary, Rotation, rotation

B, H, N, D = 2, 3, 7, 8
RNG = np.random.default_rng(0)
X = RNG.standard_normal((B, H, N, D))
POSITIONS = np.array([[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 2, 3, 500]], np.int32)

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
SCALINGS: dict[str, tuple[dict[str, Any], float]] = {
    "default": ({"rope_type": "default"}, 10000.0),
    "linear": ({"rope_type": "linear", "factor": 8.0}, 1e6),  # Gemma 3
    "llama3": (
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
        500000.0,
    ),
    "llama3-of-another-context": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0,
         "original_max_position_embeddings": 100},
        100.0,
    ),
    "yarn": (YARN, 10000.0),
    "yarn-untruncated": ({**YARN, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0}, 10000.0),
    "yarn-with-its-own-factor": ({**YARN, "attention_factor": 0.7}, 10000.0),
    "yarn-of-deepseek": ({**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7}, 10000.0),
    "yarn-that-shrinks": ({**YARN, "factor": 0.5}, 10000.0),
}  # fmt: skip


def in_both(x: np.ndarray, positions: np.ndarray, turning: Rotation) -> tuple[np.ndarray, np.ndarray]:
    with jax.enable_x64(True):
        in_jax = np.asarray(attend_jax.rotary.rotate(x, positions, turning))
    return attend_torch.rotary.rotate(torch.from_numpy(x), torch.from_numpy(positions), turning).numpy(), in_jax


# Against transformers.


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_the_frequencies_are_those_of_transformers(name: str, head_dim: int) -> None:
    scaling, base = SCALINGS[name]
    config = LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, max_position_embeddings=4096,
        rope_parameters={**scaling, "rope_theta": base},
    )  # fmt: skip
    host = modeling_llama.LlamaRotaryEmbedding(config)
    ours = rotation(Rotary(base=base, scaling=scaling), head_dim)
    np.testing.assert_allclose(ours.frequencies, host.inv_freq.double().numpy(), rtol=1e-6)  # theirs are float32
    assert ours.factor == pytest.approx(host.attention_scaling, rel=1e-12)


def test_every_kind_is_held_against_transformers() -> None:
    assert {scaling["rope_type"] for scaling, _ in SCALINGS.values()} == set(KINDS)


def test_the_scalings_differ() -> None:
    """What they are held against would otherwise say little."""
    found = {
        name: rotation(Rotary(scaling=scaling), 64)[:2]
        for name, (scaling, _) in SCALINGS.items()
    }  # fmt: skip
    assert len(set(found.values())) == len(SCALINGS)


@pytest.mark.parametrize("name", ["default", "llama3", "yarn"])
def test_half_split_is_that_of_llama(name: str) -> None:
    scaling, base = SCALINGS[name]
    config = LlamaConfig(
        hidden_size=H * D, num_attention_heads=H, rope_parameters={**scaling, "rope_theta": base}
    )
    x, positions = torch.from_numpy(X).float(), torch.from_numpy(POSITIONS)
    cos, sin = modeling_llama.LlamaRotaryEmbedding(config)(x, positions)
    expected, _ = modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)
    for ours in in_both(x.numpy(), POSITIONS, rotation(Rotary(base=base, scaling=scaling), D)):
        np.testing.assert_allclose(ours, expected, atol=1e-4)  # float32 angles of up to 500
        np.testing.assert_allclose(ours[0], expected[0], atol=2e-6)  # of up to 6


def test_interleaved_is_that_of_gptj() -> None:
    table = modeling_gptj.create_sinusoidal_positions(512, D)[torch.from_numpy(POSITIONS)]  # (b n d)
    sin, cos = table.chunk(2, -1)
    x = torch.from_numpy(X).float()
    expected = modeling_gptj.apply_rotary_pos_emb(x.transpose(1, 2), sin, cos).transpose(1, 2)
    for ours in in_both(x.numpy(), POSITIONS, rotation(Rotary(interleaved=True), D)):
        np.testing.assert_allclose(ours, expected, atol=1e-4)
        np.testing.assert_allclose(ours[0], expected[0], atol=2e-6)


# What turning is.


def test_it_is_a_product_of_complex_numbers() -> None:
    turning = rotation(Rotary(base=50.0, dim=6, interleaved=True), D)
    frequencies = 50.0 ** (-np.arange(0, 6, 2) / 6)
    turned = (X[..., 0:6:2] + 1j * X[..., 1:6:2]) * np.exp(1j * POSITIONS[:, None, :, None] * frequencies)
    for ours in in_both(X, POSITIONS, turning):
        np.testing.assert_allclose(ours[..., 0:6:2], turned.real, atol=1e-12)
        np.testing.assert_allclose(ours[..., 1:6:2], turned.imag, atol=1e-12)
        assert (ours[..., 6:] == X[..., 6:]).all(), "what does not turn stays to the bit"


def test_one_layout_is_the_other_in_another_order() -> None:
    order = np.arange(D).reshape(2, D // 2).T.ravel()  # half-split coordinates, as interleaved ones come
    split = in_both(X, POSITIONS, rotation(Rotary(), D))[0]
    interleaved = in_both(X[..., order], POSITIONS, rotation(Rotary(interleaved=True), D))[0]
    np.testing.assert_array_equal(split[..., order], interleaved)
    assert not np.allclose(split, in_both(X, POSITIONS, rotation(Rotary(interleaved=True), D))[0])


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_depend_on_distances_only(interleaved: bool) -> None:
    turning = rotation(Rotary(interleaved=interleaved), D)

    def product(shift: int) -> np.ndarray:
        turned, _ = in_both(X, POSITIONS + shift, turning)
        return turned @ turned.swapaxes(2, 3)

    np.testing.assert_allclose(product(0), product(1000), atol=1e-10)
    assert not np.allclose(product(0), X @ X.swapaxes(2, 3))


def test_the_factor_of_yarn_multiplies() -> None:
    frequencies, factor, _ = rotation(Rotary(scaling=YARN), D)
    assert factor > 1.1
    plain, _ = in_both(X, POSITIONS, Rotation(frequencies, 1.0, False))
    for ours in in_both(X, POSITIONS, Rotation(frequencies, factor, False)):
        np.testing.assert_allclose(ours, factor * plain, atol=1e-12)


# The same in both frameworks.


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [None, 4])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_the_frameworks_agree(dtype: str, dim: int | None, interleaved: bool) -> None:
    """Rounded once, so that shorter dtypes differ by one unit where float32 results fall on two sides of a middle."""
    turning = rotation(Rotary(dim=dim, interleaved=interleaved), D)
    x = torch.from_numpy(X).to(getattr(torch, dtype))
    with jax.enable_x64(True):
        of_jax = attend_jax.rotary.rotate(jnp.asarray(x.double().numpy()).astype(dtype), POSITIONS, turning)
        in_jax = np.asarray(of_jax.astype(jnp.float64))
        assert of_jax.dtype.name == dtype
    in_torch = attend_torch.rotary.rotate(x, torch.from_numpy(POSITIONS), turning)
    assert in_torch.dtype == x.dtype
    unit = {"float64": 0.0, "float32": 0.0, "bfloat16": 2**-7, "float16": 2**-10}[dtype]
    wide = 1e-13 if dtype == "float64" else 1e-6
    np.testing.assert_allclose(in_torch.double().numpy(), in_jax, rtol=unit, atol=wide)
    # Nothing is rounded before it is turned: half a unit from what float64 gives, and what float32 makes of an angle.
    exact, _ = in_both(x.double().numpy(), POSITIONS, turning)
    np.testing.assert_allclose(in_jax, exact, rtol=unit / 2, atol=100 * wide)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
@pytest.mark.parametrize("shape", [(N,), (1, N), (B, N)])
def test_positions_may_have_any_integer_dtype(dtype: Any, shape: tuple[int, ...]) -> None:
    turning = rotation(Rotary(), D)
    few = np.broadcast_to(np.arange(3, 3 + N), shape)
    expected, _ = in_both(X, np.broadcast_to(few, (B, N)).astype(np.int32), turning)
    for ours in in_both(X, few.astype(dtype), turning):
        np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_the_gradient_turns_back() -> None:
    turning = rotation(Rotary(), D)
    x, positions = torch.from_numpy(X).requires_grad_(), torch.from_numpy(POSITIONS)
    cotangent = RNG.standard_normal(X.shape)
    attend_torch.rotary.rotate(x, positions, turning).backward(torch.from_numpy(cotangent))
    expected, _ = in_both(cotangent, -POSITIONS, turning)
    np.testing.assert_allclose(x.grad, expected, atol=1e-12)
    with jax.enable_x64(True):
        _, back = jax.vjp(lambda x: attend_jax.rotary.rotate(x, POSITIONS, turning), jnp.asarray(X))
        np.testing.assert_allclose(back(jnp.asarray(cotangent))[0], expected, atol=1e-12)


def test_it_compiles_whole() -> None:
    turning = rotation(Rotary(scaling=YARN), D)
    x, positions = torch.from_numpy(X).float(), torch.from_numpy(POSITIONS)
    compiled = torch.compile(attend_torch.rotary.rotate, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, positions, turning), attend_torch.rotary.rotate(x, positions, turning))
    in_jit = jax.jit(attend_jax.rotary.rotate, static_argnums=2)(X.astype(np.float32), POSITIONS, turning)
    np.testing.assert_allclose(in_jit, compiled(x, positions, turning), atol=2e-4)


def test_a_rotary_is_an_option() -> None:
    one, other = (Rotary(scaling=dict(items)) for items in (YARN.items(), reversed(YARN.items())))
    assert one == other
    assert hash(one) == hash(other)
    assert Rotary(scaling=one.scaling) == one
    assert Rotary(scaling={"type": "linear", "factor": 2}) == Rotary(scaling={"rope_type": "linear", "factor": 2})
    assert attend_torch.Rotary is attend_jax.Rotary is Rotary


# Wrong calls.

LLAMA3 = SCALINGS["llama3"][0]
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"base": "10000"}, TypeError, "base: expected a number, got str '10000'."),
    ({"base": 0}, ValueError, "base: expected a number > 0, got int 0."),
    ({"dim": 3}, ValueError, "dim: expected an even number >= 2, or None, got int 3."),
    ({"dim": 0}, ValueError, "dim: expected an even number >= 2, or None, got int 0."),
    ({"dim": 4.0}, TypeError, "dim: expected an even number >= 2, or None, got float 4.0."),
    ({"interleaved": 1}, TypeError, "interleaved: expected a bool, got int 1."),
    ({"scaling": "linear"}, TypeError, 'scaling: expected a mapping with "rope_type", as in config.json, or None, got'),
    ({"scaling": {"factor": 2.0}}, ValueError, 'expected one of "default", "linear", "llama3", "yarn", got None.'),
    ({"scaling": {"rope_type": "ntk"}}, ValueError, "got str 'ntk'. rope_type names the kind."),
    ({"scaling": {"rope_type": "dynamic", "factor": 2.0}}, ValueError, "got str 'dynamic'. Its frequencies follow"),
    ({"scaling": {"rope_type": "longrope"}}, ValueError, "got str 'longrope'. Its frequencies follow the longest"),
    ({"scaling": {"rope_type": "linear"}}, ValueError, 'scaling: expected "linear" with factor, got factor missing.'),
    ({"scaling": {"rope_type": "default", "factor": 2.0}}, ValueError, "with nothing more, got factor as well."),
    ({"scaling": {**LLAMA3, "rope_theta": 1e4}}, ValueError, "got rope_theta as well. Pass rope_theta as base."),
    ({"scaling": {"rope_type": "linear", "factor": "2"}}, TypeError, "['factor']: expected a number, got str '2'."),
    ({"scaling": {"rope_type": "linear", "factor": -1}}, ValueError, "['factor']: expected a number > 0, got int -1."),
    ({"scaling": {**YARN, "truncate": 1}}, TypeError, "scaling['truncate']: expected a bool, got int 1."),
    ({"scaling": YARN, "base": 1}, ValueError, 'base: expected a number > 1 in "yarn", got int 1.'),
    ({"scaling": {**LLAMA3, "high_freq_factor": 1.0}}, ValueError, "more than low_freq_factor, got float 1.0."),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "text"), WRONG, ids=lambda x: str(x)[:60])
def test_a_wrong_option_is_told(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        Rotary(**options)
    assert type(raised.value) is error
    assert text in str(raised.value)


@pytest.mark.parametrize(
    ("rotary", "head_dim", "text"),
    [(Rotary(), 5, "rotary: expected an even head_dim, since coordinates turn in pairs, got int 5. Pass Rotary("),
     (Rotary(dim=8), 6, "rotary: expected dim up to the head_dim of 6, got int 8. dim=None turns all of them.")],
)  # fmt: skip
def test_what_does_not_fit_the_head_is_told(rotary: Rotary, head_dim: int, text: str) -> None:
    with pytest.raises(ValueError) as raised:
        rotation(rotary, head_dim)
    assert text in str(raised.value)


@pytest.mark.parametrize(
    ("x", "positions", "error", "text"),
    [([1.0], POSITIONS, TypeError, "x: expected an array of the framework that is called, got list (float 1.0)."),
     (X[0], POSITIONS, ValueError, "x: expected (b, h, n, d) with d of at least 8, got float64 of shape (3, 7, 8)."),
     (X[..., :6], POSITIONS, ValueError, "with d of at least 8, got float64 of shape (2, 3, 7, 6)."),
     (X, POSITIONS * 1.0, TypeError, "positions: expected integers of shape (n,), (1, n) or (b, n) = (2, 7)"),
     (X, POSITIONS[:, :6], ValueError, "(n,), (1, n) or (b, n) = (2, 7), got int32 of shape (2, 6).")],
)  # fmt: skip
def test_wrong_arrays_are_told_alike(x: Any, positions: Any, error: type[Exception], text: str) -> None:
    told = set()
    calls: list[tuple[Callable[..., Any], Callable[[Any], Any]]] = [
        (attend_torch.rotary.rotate, lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x),
        (attend_jax.rotary.rotate, lambda x: x),
    ]
    for rotate, array in calls:
        with pytest.raises(error) as raised:
            rotate(array(x), array(positions), rotation(Rotary(), D))
        told.add(str(raised.value))
    assert len(told) == 1
    assert text in told.pop()

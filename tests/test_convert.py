"""Converters against the hosts whose masks and seeds they convert, the same in both frameworks."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attend_jax.convert
import attend_torch.convert
from attend_torch import attend

B, H, N, D = 2, 4, 6, 8
INTEGERS = (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64)


def in_both(name: str, array: np.ndarray, *arguments: Any, **options: Any) -> np.ndarray:
    """A converter in both frameworks, in JAX on JAX's arrays and on NumPy's, and compiled in both: one answer."""
    ours, theirs = getattr(attend_torch.convert, name), getattr(attend_jax.convert, name)

    def run(array: Any) -> Any:
        return theirs(array, *arguments, **options)

    def run_torch(array: torch.Tensor) -> torch.Tensor:
        return ours(array, *arguments, **options)

    found = [run_torch(torch.from_numpy(array)).numpy(), np.asarray(run(array))]
    if array.dtype.itemsize < 8:  # without x64 JAX arrays have no 64 bits
        found.append(np.asarray(run(jnp.asarray(array))))
    if array.dtype in (np.int32, np.float32, np.bool_):  # once is enough
        torch._dynamo.reset()
        found.append(np.asarray(jax.jit(run)(array)))
        found.append(torch.compile(run_torch, fullgraph=True, backend="eager")(torch.from_numpy(array)).numpy())
    with jax.enable_x64(True):
        found.append(np.asarray(run(jnp.asarray(array))))
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)
    return found[0]


def draw(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


# What is added to scores.


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(B, N), (1, N), (B, 1, N, N), (1, H, 1, N)])
def test_additive(dtype: Any, shape: tuple[int, ...]) -> None:
    """Every fill in use: -1e4, the lowest number of the dtype, -inf."""
    keep = np.random.default_rng(1).random(shape) < 0.6
    for fill in (-1e4, float(np.finfo(dtype).min), -np.inf):
        mask = in_both("mask_from_additive", np.where(keep, 0, fill).astype(dtype))
        assert mask.dtype == np.bool_
        np.testing.assert_array_equal(mask, keep)


def test_additive_in_bfloat16() -> None:
    additive, expected = [[0.0, -1e9, -np.inf, -900.0]], [[True, False, False, True]]
    ours = attend_torch.convert.mask_from_additive(torch.tensor(additive, dtype=torch.bfloat16))
    theirs = attend_jax.convert.mask_from_additive(jnp.asarray(additive, jnp.bfloat16))
    assert ours.tolist() == theirs.tolist() == expected


def test_the_threshold_is_not_allowed_itself() -> None:
    additive = np.array([[0.0, -5.0, -5.1]], np.float32)
    np.testing.assert_array_equal(in_both("mask_from_additive", additive, threshold=-5.0), [[True, False, False]])
    np.testing.assert_array_equal(in_both("mask_from_additive", additive, threshold=-6), [[True, True, True]])


@pytest.mark.parametrize(
    ("threshold", "error", "got"),
    [(0.0, ValueError, "float 0.0"), (5, ValueError, "int 5"), (float("nan"), ValueError, "float nan"),
     ("-1", TypeError, "str '-1'"), (None, TypeError, "None"), (True, TypeError, "bool True")],
)  # fmt: skip
def test_a_threshold_is_below_0(threshold: Any, error: type[Exception], got: str) -> None:
    for convert, zeros in ((attend_torch.convert, torch.zeros), (attend_jax.convert, jnp.zeros)):
        with pytest.raises(error, match=re.escape(f"threshold: expected a number < 0, got {got}.")):
            convert.mask_from_additive(zeros((1, 2)), threshold=threshold)


def test_additive_means_what_sdpa_makes_of_it() -> None:
    q = draw(B, H, N, D)
    additive = torch.where(torch.rand(B, 1, N, N, generator=torch.Generator().manual_seed(0)) < 0.6, 0.0, -torch.inf)
    expected = F.scaled_dot_product_attention(q, q, q, additive)
    out = attend(q, q, q, attend_torch.convert.mask_from_additive(additive))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


# True = ignore.


@pytest.mark.parametrize("shape", [(B, N), (B, 1, 1, N), (B, 1, N, N)])
def test_ignore(shape: tuple[int, ...]) -> None:
    ignore = np.random.default_rng(2).random(shape) < 0.5
    np.testing.assert_array_equal(in_both("mask_from_ignore", ignore), ~ignore)


@pytest.mark.parametrize("per_head", [False, True])
def test_masks_of_torch_multihead_attention(per_head: bool) -> None:
    """The whole module, with its attn_mask and its key_padding_mask, against attend on its own projections."""
    torch.manual_seed(0)
    host = torch.nn.MultiheadAttention(H * D, H, batch_first=True).eval()
    x = draw(B, N, H * D)
    generator = torch.Generator().manual_seed(1)
    attn_mask = torch.rand((B * H, N, N) if per_head else (N, N), generator=generator) < 0.3
    attn_mask[..., 0] = False  # the host has no answer for a row without keys
    padding = torch.tensor([[False] * N, [False] * 4 + [True] * 2])
    expected, _ = host(x, x, x, attn_mask=attn_mask, key_padding_mask=padding, need_weights=True)

    mask = attend_torch.convert.mask_from_mha(attn_mask, num_heads=H)
    mask = mask & attend_torch.convert.mask_from_ignore(padding)[:, None, None]
    q, k, v = F.linear(x, host.in_proj_weight, host.in_proj_bias).view(B, N, 3, H, D).unbind(2)
    out = attend(q, k, v, mask, layout="bnhd").flatten(2)
    torch.testing.assert_close(host.out_proj(out), expected, rtol=1e-5, atol=1e-5)


def test_mha_shapes() -> None:
    ignore = np.random.default_rng(3).random((B * H, N, 5)) < 0.5
    mask = in_both("mask_from_mha", ignore, num_heads=H)
    np.testing.assert_array_equal(mask, ~ignore.reshape(B, H, N, 5))
    np.testing.assert_array_equal(in_both("mask_from_mha", ignore[0], num_heads=H), ~ignore[:1, None][:, 0][None])
    assert in_both("mask_from_mha", ignore[:0], num_heads=H).shape == (0, H, N, 5)


# Packed sequences.


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize(
    ("bounds", "length", "ids"),
    [
        ([0, 2, 3], 3, [0, 0, 1]),
        ([0, 2, 3], 5, [0, 0, 1, -1, -1]),
        ([0, 2, 2, 4], 4, [0, 0, 2, 2]),  # a sequence without tokens
        ([0, 3, 3], 4, [0, 0, 0, -1]),  # the last one too
        ([0, 0, 2], 2, [1, 1]),
        ([0], 2, [-1, -1]),
        ([0, 5], 3, [0, 0, 0]),  # longer than what is there
        ([0, 1], 0, []),
    ],
    ids=str,
)
def test_cu_seqlens(bounds: list[int], length: int, ids: list[int], dtype: Any) -> None:
    np.testing.assert_array_equal(in_both("segments_from_cu_seqlens", np.array(bounds, dtype), length), [ids])


def test_cu_seqlens_keep_sequences_apart() -> None:
    bounds, length = [0, 3, 4, 9], 12
    q = draw(1, H, length, D)
    ids = attend_torch.convert.segments_from_cu_seqlens(torch.tensor(bounds, dtype=torch.int32), length)
    out = attend(q, q, q, q_segment_ids=ids, is_causal=True)
    for first, last in zip([*bounds, 9], [*bounds[1:], 9, 12], strict=True):
        part = q[:, :, first:last]
        alone = attend(part, part, part, is_causal=True)
        torch.testing.assert_close(out[:, :, first:last], alone, rtol=1e-5, atol=1e-6)


# Left padding.


@pytest.mark.parametrize("dtype", INTEGERS)
def test_left_padding(dtype: Any) -> None:
    mask = in_both("mask_from_left_padding", np.array([0, 2, 5, 100], dtype), 5)
    np.testing.assert_array_equal(mask, [[False] * 5, [False] * 3 + [True] * 2, [True] * 5, [True] * 5])
    wide = in_both("mask_from_left_padding", np.array([0, 1, 100], dtype), 300)  # beyond 8 bits
    assert wide.sum(1).tolist() == [0, 1, 100]
    assert in_both("mask_from_left_padding", np.array([1, 2], dtype), 0).shape == (2, 0)


def test_left_padding_moves_a_sequence_and_changes_nothing() -> None:
    q = draw(1, H, 4, D)
    padded = F.pad(q, (0, 0, 3, 0), value=torch.nan)
    mask = attend_torch.convert.mask_from_left_padding(torch.tensor([4]), 7)
    out = attend(padded.nan_to_num(), padded, padded, mask, is_causal=True)
    torch.testing.assert_close(out[:, :, 3:], attend(q, q, q, is_causal=True), rtol=1e-5, atol=1e-6)


# Seeds.


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_seeds_from_keys(implementation: str) -> None:
    key = jax.random.key(42, impl=implementation)
    words = np.asarray(jax.random.key_data(key))
    expected = words if len(words) == 2 else words[:2] ^ words[2:]
    seeds = [
        attend_jax.convert.seed_from_key(key),
        attend_jax.convert.seed_from_key(jax.random.key_data(key)),
        attend_jax.convert.seed_from_key(words),
        jax.jit(attend_jax.convert.seed_from_key)(key),
        attend_torch.convert.seed_from_key(words),
        attend_torch.convert.seed_from_key(jax.random.key_data(key)),
        attend_torch.convert.seed_from_key(torch.from_numpy(words.copy())),
    ]
    for seed in seeds:
        assert str(seed.dtype).removeprefix("torch.") == "uint32"
        np.testing.assert_array_equal(np.asarray(seed), expected)


def test_a_key_gives_the_same_dropout_in_both_frameworks() -> None:
    key = jax.random.fold_in(jax.random.key(1), 7)
    q = draw(B, H, N, D)
    options: dict[str, Any] = {"dropout": 0.4}
    ours = attend(q, q, q, **options, dropout_seed=attend_torch.convert.seed_from_key(jax.random.key_data(key)))
    x = jnp.asarray(q)
    theirs = attend_jax.attend(x, x, x, **options, dropout_seed=attend_jax.convert.seed_from_key(key))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    lanes = jax.vmap(attend_jax.convert.seed_from_key)(jax.random.split(key, 3))
    assert lanes.shape == (3, 2)
    assert len({tuple(lane.tolist()) for lane in np.asarray(lanes)}) == 3

"""What other libraries call a mask, in this library's terms. Written once over operators that all arrays share."""

from __future__ import annotations

from typing import Any

from attend_shared.call import Framework, describe


def _fail(error: type[Exception], argument: str, expected: str, got: Any, advice: str) -> Exception:
    return error(f"{argument}: expected {expected}, got {describe(got)}. {advice}")


def _check(framework: Framework, argument: str, value: Any, kinds: tuple[str, ...], ranks: tuple[int, ...], advice: str) -> None:
    expected = f"{' or '.join(kinds)} of rank {' or '.join(map(str, ranks))}"
    if not isinstance(value, framework.arrays) or not framework.dtype(value).startswith(kinds):
        raise _fail(TypeError, argument, expected, value, advice)
    if len(value.shape) not in ranks:
        raise _fail(ValueError, argument, expected, value, advice)


def mask_from_additive(framework: Framework, additive: Any, threshold: float) -> Any:
    """True where the additive mask is above the threshold."""
    _check(framework, "additive", additive, ("float", "bfloat"), (2, 4), "A boolean mask needs no conversion.")
    return additive > threshold


def mask_from_ignore(framework: Framework, ignore: Any) -> Any:
    """True where `ignore` is False."""
    _check(framework, "ignore", ignore, ("bool",), (2, 4), "mask_from_additive takes masks that are added to the scores.")
    return ~ignore


def mask_from_mha(framework: Framework, attn_mask: Any, num_heads: int) -> Any:
    """torch.nn.MultiheadAttention's (i, j) or (b * num_heads, i, j), True = ignore, as (b, h, i, j), True = attend."""
    _check(framework, "attn_mask", attn_mask, ("bool",), (2, 3), "Pass an additive attn_mask as bias=, with rank 4.")
    if len(attn_mask.shape) == 2:
        return ~attn_mask[None, None]
    if attn_mask.shape[0] % num_heads:
        raise _fail(ValueError, "attn_mask", f"a first axis of b * num_heads, a multiple of {num_heads}", attn_mask,
                    "Is num_heads right?")  # fmt: skip
    return ~attn_mask.reshape(-1, num_heads, *attn_mask.shape[1:])


def segments_from_cu_seqlens(framework: Framework, cu_seqlens: Any, position: Any) -> Any:
    """The number of boundaries at or before each position, minus 1; -1 past the last."""
    _check(framework, "cu_seqlens", cu_seqlens, ("int",), (1,), "It is [0, n1, n1 + n2, ...], as flash-attn's varlen takes it.")
    ids = (position[:, None] >= cu_seqlens[None, :]).sum(1) - 1
    last = cu_seqlens.shape[0] - 1
    return (ids - (last + 1) * (ids == last))[None]


def mask_from_left_padding(framework: Framework, lengths: Any, position: Any) -> Any:
    """True for the last lengths[b] of the positions."""
    _check(framework, "lengths", lengths, ("int",), (1,), "One number of real tokens for each batch item.")
    return position[None, :] >= position.shape[0] - lengths[:, None]


def fold_words(words: Any) -> Any:
    """The words of a JAX key as a dropout_seed: a threefry key's two, or the two halves of an rbg key's four, xored."""
    if str(words.dtype).removeprefix("torch.") != "uint32" or tuple(words.shape) not in ((2,), (4,)):
        raise _fail(TypeError, "key", "a JAX key, or its words as jax.random.key_data gives them: uint32 (2,) or (4,)", words,
                    "Keys go one at a time; split a batch of keys first.")  # fmt: skip
    return words if tuple(words.shape) == (2,) else words[:2] ^ words[2:]

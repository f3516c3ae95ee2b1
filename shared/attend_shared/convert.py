"""What other libraries call a mask, in this library's terms. Written once over operators that all arrays share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attend_shared.call import Framework, is_int, wrong

# Of a length and an array of integers: the indices up to the length, and the array, in one dtype on one device.
Positions = Callable[[int, Any], tuple[Any, Any]]


def _check(
    framework: Framework,
    argument: str,
    value: Any,
    expected: str,
    kinds: tuple[str, ...],
    ranks: tuple[int, ...],
    advice: str,
) -> None:
    if not isinstance(value, framework.arrays) or not framework.dtype(value).startswith(kinds):
        raise wrong(TypeError, argument, expected, value, advice)
    array: Any = value
    if len(array.shape) not in ranks:
        raise wrong(ValueError, argument, expected, value, advice)


def _check_count(argument: str, value: Any, least: int, advice: str) -> None:
    expected = f"a whole number >= {least}"
    if not is_int(value):
        raise wrong(TypeError, argument, expected, value, advice)
    if value < least:
        raise wrong(ValueError, argument, expected, value, advice)


def mask_from_additive(framework: Framework, additive: Any, threshold: float) -> Any:
    """True where the additive mask is above the threshold."""
    expected = "floating-point numbers, (b, j) or rank 4 against (b, h, i, j)"
    _check(framework, "additive", additive, expected, ("float", "bfloat"), (2, 4),
           "A boolean mask needs no conversion, and 0/1 integers only != 0.")  # fmt: skip
    is_number = isinstance(threshold, (int, float, np.integer, np.floating)) and not isinstance(threshold, bool)
    if not is_number or not threshold < 0:  # -inf is one, NaN is none
        raise wrong(ValueError if is_number else TypeError, "threshold", "a number < 0", threshold,
                    "0 is what an allowed key has added to its score.")  # fmt: skip
    return additive > threshold


def mask_from_ignore(framework: Framework, ignore: Any) -> Any:
    """True where `ignore` is False."""
    _check(framework, "ignore", ignore, "bool, (b, j) or rank 4 against (b, h, i, j)", ("bool",), (2, 4),
           "mask_from_additive takes what is added to scores, mask_from_mha a rank-3 attn_mask.")  # fmt: skip
    return ~ignore


def mask_from_mha(framework: Framework, attn_mask: Any, num_heads: int) -> Any:
    """torch.nn.MultiheadAttention's (i, j) or (b * num_heads, i, j), True = ignore, as (b, h, i, j), True = attend."""
    _check(framework, "attn_mask", attn_mask, "bool, (i, j) or (b * num_heads, i, j)", ("bool",), (2, 3),
           "Pass an additive attn_mask as bias=, with rank 4.")  # fmt: skip
    _check_count("num_heads", num_heads, 1, "It is that of the torch.nn.MultiheadAttention.")
    if len(attn_mask.shape) == 2:
        return ~attn_mask[None, None]
    size = attn_mask.shape[0]
    if size % num_heads:
        raise wrong(ValueError, "attn_mask", f"a first axis of b * num_heads, a multiple of {num_heads}", attn_mask,
                    "Is num_heads right?")  # fmt: skip
    return ~attn_mask.reshape(size // num_heads, num_heads, *attn_mask.shape[1:])


def segments_from_cu_seqlens(framework: Framework, cu_seqlens: Any, length: int, positions: Positions) -> Any:
    """The number of sequences that start at or before each position, minus 1; -1 past the end of the last.

    Before the first start, where there is none, it is -2: so each id stands in one run whatever cu_seqlens holds.
    """
    _check(framework, "cu_seqlens", cu_seqlens, "integers (n + 1,)", ("int", "uint"), (1,),
           "It is [0, n1, n1 + n2, ...], as flash-attn's varlen takes it.")  # fmt: skip
    _check_count("length", length, 0, "It is the packed length, padding included.")
    position, bounds = positions(length, cu_seqlens)
    started = position[:, None] >= bounds[None, :-1]  # (length, n)
    inside = position[:, None] < bounds[None, -1:]  # (length, 1)
    return ((started & inside).sum(1) - 1 - (inside & ~started.any(1)[:, None]).sum(1))[None]


def mask_from_left_padding(framework: Framework, lengths: Any, kv_len: int, positions: Positions) -> Any:
    """True for the last lengths[b] of the positions."""
    _check(
        framework, "lengths", lengths, "integers (b,)", ("int", "uint"), (1,), "The number of real tokens of each item."
    )
    _check_count("kv_len", kv_len, 0, "It is the padded length.")
    position, lengths = positions(kv_len, lengths)
    return position[None, :] >= kv_len - lengths[:, None]


def fold_words(words: Any) -> Any:
    """The words of a JAX key as a dropout_seed: a threefry key's two, or the two halves of an rbg key's four, xored."""
    dtype = str(getattr(words, "dtype", "")).removeprefix("torch.")
    if dtype != "uint32" or tuple(words.shape) not in ((2,), (4,)):
        expected = "a JAX key, or its words as jax.random.key_data gives them: uint32 (2,) or (4,)"
        raise wrong(TypeError, "key", expected, words,
                    "Keys go one at a time; split a batch of keys first.")  # fmt: skip
    return words if tuple(words.shape) == (2,) else words[:2] ^ words[2:]

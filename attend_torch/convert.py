"""What other libraries call a mask or a seed, turned into this library's arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from attend_shared import convert
from attend_torch.arrays import FRAMEWORK, positions
from attend_torch.runs import made


def mask_from_additive(additive: torch.Tensor, *, threshold: float = -1000.0) -> torch.Tensor:
    """A boolean mask (True = may attend) from one that is added to the scores: 0 and -10000, -1e9, finfo.min or -inf.

    mask = additive > threshold

    Args:
        additive: floating, rank 2 (b, j) or rank 4 against (b, h, i, j).
        threshold: below 0; at or below it a key is not allowed. A real bias (ALiBi, relative positions) is no mask:
            pass it as bias=.

    Returns:
        bool, the same shape.

    Raises:
        TypeError, ValueError: another dtype or rank, or a threshold that is no number below 0.

    Example:
        >>> mask_from_additive(torch.tensor([[0.0, -1e9]]))
        tensor([[ True, False]])
    """
    return convert.mask_from_additive(FRAMEWORK, additive, threshold)


def mask_from_ignore(ignore: torch.Tensor) -> torch.Tensor:
    """A boolean mask (True = may attend) from one in which True = ignore.

    That is the polarity of torch.nn.MultiheadAttention's key_padding_mask (b, j) and of TransformerEngine's
    attention_mask (b, 1, 1, j) or (b, 1, i, j).

    Args:
        ignore: bool, rank 2 (b, j) or rank 4 against (b, h, i, j).

    Returns:
        bool, the same shape.

    Raises:
        TypeError, ValueError: another dtype or rank.

    Example:
        >>> mask_from_ignore(torch.tensor([[False, True]]))
        tensor([[ True, False]])
    """
    return convert.mask_from_ignore(FRAMEWORK, ignore)


def mask_from_mha(attn_mask: torch.Tensor, *, num_heads: int) -> torch.Tensor:
    """A boolean mask (True = may attend) from torch.nn.MultiheadAttention's boolean attn_mask (True = ignore).

    Args:
        attn_mask: bool (i, j) or (b * num_heads, i, j).
        num_heads: the number of heads.

    Returns:
        bool (1, 1, i, j) or (b, num_heads, i, j).

    Raises:
        TypeError, ValueError: another dtype, rank or size.

    Example:
        >>> mask_from_mha(torch.tensor([[False, True]]), num_heads=2)
        tensor([[[[ True, False]]]])
    """
    return convert.mask_from_mha(FRAMEWORK, attn_mask, num_heads)


def segments_from_cu_seqlens(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """Segment ids for sequences packed one behind the other, from their cumulative lengths.

    Args:
        cu_seqlens: integers (n + 1,): 0, n1, n1 + n2, ..., as flash-attn's varlen functions take them.
        length: the packed length; positions from cu_seqlens[-1] on are padding and get the id -1, and those before
            cu_seqlens[0], which should be 0, -2.

    Returns:
        integers (1, length), for q_segment_ids and kv_segment_ids. Of these it is known, without reading them, that
        every segment is one run, which implementations that take packed sequences ask for.

    Raises:
        TypeError, ValueError: another dtype or rank.

    Example:
        >>> segments_from_cu_seqlens(torch.tensor([0, 2, 3]), 4)
        tensor([[ 0,  0,  1, -1]])
    """
    ids = convert.segments_from_cu_seqlens(FRAMEWORK, cu_seqlens, length, positions)
    made(ids, cu_seqlens)
    return ids


def mask_from_left_padding(lengths: torch.Tensor, kv_len: int) -> torch.Tensor:
    """A key mask for sequences that are padded on the left.

    Args:
        lengths: integers (b,), the number of real tokens of each batch item.
        kv_len: the padded length.

    Returns:
        bool (b, kv_len).

    Raises:
        TypeError, ValueError: another dtype or rank.

    Example:
        >>> mask_from_left_padding(torch.tensor([1, 3]), 3)
        tensor([[False, False,  True],
                [ True,  True,  True]])
    """
    return convert.mask_from_left_padding(FRAMEWORK, lengths, kv_len, positions)


def seed_from_key(key: Any) -> torch.Tensor:
    """A dropout_seed from a JAX key, the same in both frameworks.

    PyTorch: takes what jax.random.key_data gives, as an array that NumPy reads.

    Args:
        key: a JAX key, or its words: uint32 (2,), or (4,) of an rbg key.

    Returns:
        uint32 (2,).

    Raises:
        TypeError: another dtype or shape.

    Example:
        >>> seed_from_key(np.array([0, 42], np.uint32)).tolist()
        [0, 42]
    """
    return torch.from_numpy(convert.fold_words(np.asarray(key).copy() if hasattr(key, "__array__") else key))

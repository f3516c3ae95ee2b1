"""Dropout's random words: Philox4x32 with 7 rounds, counted by the call's own indices.

A word depends on a seed and on (batch item, query head, query, key) and on nothing else, so that every implementation,
on every device and in every tiling, drops the same pairs.

The generator is that of Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3 (SC 2011), whose
Philox4x32 passes BigCrush from 7 rounds on.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["ROUNDS", "keep_mask", "split_seed", "threshold", "words"]

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1, in 32 bits

_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def words(
    counter: Sequence[ArrayLike], key: Sequence[ArrayLike] | NDArray[np.uint32], rounds: int = ROUNDS
) -> NDArray[np.uint32]:
    """The four words of a counter under a key.

    One round takes (c0, c1, c2, c3) to (high(M1 c2) ^ c1 ^ k0, low(M1 c2), high(M0 c0) ^ c3 ^ k1, low(M0 c0)); between
    rounds each half of the key grows by its step.

    Args:
        counter: four arrays of integers in [0, 2**32), which broadcast against each other and against the key.
        key: two arrays of integers in [0, 2**32).
        rounds: 7; published test vectors of the same function exist for 10 as well.

    Returns:
        uint32, the broadcast shape with an axis of 4 after it.

    Example:
        >>> def show(x): return " ".join(f"{int(word):08x}" for word in x)
        >>> show(words((0, 0, 0, 0), (0, 0)))
        '5f6fb709 0d893f64 4f121f81 4f730a48'
        >>> ones = 0xFFFFFFFF
        >>> show(words((ones, ones, ones, ones), (ones, ones)))
        '5207ddc2 45165e59 4d8ee751 8c52f662'
        >>> show(words((5, 17, 3, 2), split_seed(123456789123)))   # keys 20 to 23 of query 17, head 3, batch item 2
        'b801447a d1795165 1e292a83 ef6d7f96'
    """
    # Products of two 32-bit numbers need 64 bits: everything is carried in uint64 with the upper half empty.
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    k0, k1 = (np.asarray(k, dtype=np.uint64) for k in key)
    for _ in range(rounds):
        product0 = c0 * np.uint64(MULTIPLIERS[0])
        product1 = c2 * np.uint64(MULTIPLIERS[1])
        c0, c1, c2, c3 = (product1 >> _32) ^ c1 ^ k0, product1 & _LOW, (product0 >> _32) ^ c3 ^ k1, product0 & _LOW
        k0 = (k0 + np.uint64(KEY_STEPS[0])) & _LOW
        k1 = (k1 + np.uint64(KEY_STEPS[1])) & _LOW
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def split_seed(seed: Any) -> NDArray[np.uint32]:
    """The two halves (low, high) of a seed, which are Philox's key.

    Args:
        seed: an integer in [0, 2**64), or a uint32 array (2,) = (low, high), which is returned as it is.

    Returns:
        uint32 (2,).

    Raises:
        TypeError: neither an integer nor a uint32 array (2,).
        ValueError: an integer out of range.

    Example:
        >>> split_seed(2**32 * 7 + 5)
        array([5, 7], dtype=uint32)
    """
    if isinstance(seed, np.ndarray) and seed.ndim:
        if seed.shape != (2,) or seed.dtype != np.uint32:
            raise TypeError(f"seed: expected a uint32 array (2,) = (low, high); got {seed.dtype} {seed.shape}")
        return seed
    if isinstance(seed, (bool, np.bool_)):
        raise TypeError("seed: expected an integer in [0, 2**64) or a uint32 array (2,); got a bool")
    try:
        number = operator.index(seed)
    except TypeError:
        kind = type(seed).__name__
        raise TypeError(f"seed: expected an integer in [0, 2**64) or a uint32 array (2,); got {kind}") from None
    if not 0 <= number < 2**64:
        raise ValueError(f"seed: expected an integer in [0, 2**64); got {number}")
    return np.array([number & 0xFFFFFFFF, number >> 32], dtype=np.uint32)


def threshold(dropout: float) -> int:
    """floor(dropout * 2**32): a pair is kept where its word is at least this.

    Example:
        >>> threshold(0.5) == 2**31, threshold(0.0), threshold(1 - 2**-53) == 2**32 - 1
        (True, 0, True)
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected 0 <= dropout < 1; got {dropout}")
    return int(float(dropout) * 2**32)  # a product with a power of 2 is exact


def keep_mask(
    seed: Any,
    shape: tuple[int, int, int, int],
    dropout: float,
    *,
    start: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> NDArray[np.bool_]:
    """Which pairs dropout keeps: word j % 4 of counter (j // 4, t, h, b) is at least floor(dropout * 2**32).

    Args:
        seed: see `split_seed`.
        shape: (b, h, i, j), with h the query heads.
        dropout: the share that is dropped, 0 <= dropout < 1.
        start: the call's indices of the first element, for a tile of a larger mask.

    Returns:
        bool (b, h, i, j), True where the pair is kept.

    Raises:
        TypeError, ValueError: see `split_seed` and `threshold`.

    Example:
        >>> keep_mask(7, (1, 1, 2, 6), 0.5).astype(int)
        array([[[[0, 0, 0, 1, 0, 0],
                 [0, 0, 1, 0, 1, 0]]]])
        >>> whole = keep_mask(7, (2, 3, 8, 8), 0.5)
        >>> tile = keep_mask(7, (1, 2, 4, 3), 0.5, start=(1, 1, 4, 2))
        >>> np.array_equal(tile, whole[1:2, 1:3, 4:8, 2:5])
        True
    """
    key, limit = split_seed(seed), np.uint32(threshold(dropout))
    b, h, i, j = shape
    b0, h0, i0, j0 = start
    queries = np.arange(i0, i0 + i, dtype=np.uint64)[:, None]
    blocks = np.arange(j0 // 4, -(-(j0 + j) // 4), dtype=np.uint64)
    keep = np.empty(shape, dtype=np.bool_)
    for item in range(b):  # one head at a time: the 64-bit words of a whole call would be many times its mask
        for head in range(h):
            drawn = words((blocks, queries, h0 + head, b0 + item), key).reshape(i, 4 * len(blocks))  # (i, blocks, 4)
            keep[item, head] = drawn[:, j0 % 4 : j0 % 4 + j] >= limit
    return keep

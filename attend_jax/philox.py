"""The keep mask of dropout in JAX: Philox4x32-7 counters, the same bits as everywhere else.

JAX has no 64-bit integers by default, so the high half of a product is put together from 16-bit halves.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from attend_shared.philox import KEY_STEPS, MULTIPLIERS, ROUNDS, split_seed, threshold


def _multiply(a: jax.Array, b: int) -> tuple[jax.Array, jax.Array]:
    """The high and low 32 bits of a uint32 product."""
    low16 = np.uint32(0xFFFF)
    b_low, b_high = np.uint32(b & 0xFFFF), np.uint32(b >> 16)
    a_low, a_high = a & low16, a >> np.uint32(16)
    middle = a_high * b_low + (a_low * b_low >> np.uint32(16))
    carry = a_low * b_high + (middle & low16)
    high = a_high * b_high + (middle >> np.uint32(16)) + (carry >> np.uint32(16))
    return high, a * np.uint32(b)


def words(counter: tuple[jax.Array, ...], key: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    """Philox4x32-7 on uint32 arrays.

    Args:
        counter: four arrays, broadcastable together.
        key: two scalar arrays.

    Returns:
        Four uint32 arrays of words.

    References:
        Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = _multiply(c0, MULTIPLIERS[0]), _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + np.uint32(KEY_STEPS[0]), k1 + np.uint32(KEY_STEPS[1])
    return c0, c1, c2, c3


def keep_block(
    seed: jax.Array, item: jax.Array, head: jax.Array, rows: jax.Array, quads: jax.Array, dropout: float
) -> jax.Array:
    """The keep mask of some queries and of keys by fours.

    Args:
        seed: uint32 (2,), the low and high 32 bits.
        item, head: the batch item and the query head, scalars or broadcastable to (..., n, m).
        rows: (n,), the queries.
        quads: (m,), fours of keys: key // 4.
        dropout: the probability of dropping.

    Returns:
        bool (..., n, 4 * m).
    """
    item, head, row, quad = (x.astype(jnp.uint32) for x in (item, head, rows[:, None], quads[None]))
    axes = range(max(item.ndim, head.ndim, 2) - 2)  # said outright: under jax_numpy_rank_promotion none is added unseen
    counter = jnp.expand_dims(quad, axes), jnp.expand_dims(row, axes), head, item
    drawn = jnp.stack(jnp.broadcast_arrays(*words(counter, (seed[0], seed[1]))), -1)
    return drawn.reshape(*drawn.shape[:-2], 4 * quads.size) >= np.uint32(threshold(dropout))


def keep_mask(seed: jax.Array, b: int, h: int, i: int, j: int, dropout: float, first: int | jax.Array = 0) -> jax.Array:
    """Which weights are kept.

    Args:
        seed: uint32 (2,), the low and high 32 bits.
        b, h, i, j: the sizes; h counts query heads.
        dropout: the probability of dropping.
        first: the index of the first of the i queries.

    Returns:
        bool (b, h, i, j).
    """
    item, head, rows, quads = (jnp.arange(n, dtype=jnp.int32) for n in (b, h, i, -(-j // 4)))
    kept = keep_block(seed, item[:, None, None, None], head[None, :, None, None], first + rows, quads, dropout)
    return kept[..., :j]


def seed_words(seed: int | np.integer | jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """A dropout_seed as uint32 (2,), the low and high 32 bits. An int is split here, before any jit."""
    if isinstance(seed, (int, np.integer)):
        return split_seed(seed)
    return seed

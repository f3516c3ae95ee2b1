"""Rotary position embeddings on JAX arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from attend_jax.arrays import FRAMEWORK, to_int32
from attend_jax.attend import Array
from attend_shared.rotary import Rotary, Rotation, check_rotate, rotation

__all__ = ["Rotary", "Rotation", "rotate", "rotation"]


def rotate(x: Array, positions: Array, turning: Rotation) -> jax.Array:
    """Turn the coordinates of queries or keys, pair by pair, by an angle that grows with the position.

        angle(position, n) = position * frequency[n]
        (x, y) -> factor * (x cos - y sin, y cos + x sin)

    Angles and products are float32 (float64 for float64), rounded once to the dtype of x. An angle is as exact as one
    product of float32: at position 100,000 some are off by up to 0.01, as in other libraries.

    Args:
        x: (b, h, n, d), floating.
        positions: integers (n,), (1, n) or (b, n).
        turning: what `rotation(Rotary(...), d)` gives; coordinates beyond its pairs stay as they are.

    Returns:
        The shape and dtype of x.

    Raises:
        TypeError, ValueError: a wrong argument.

    Example:
        >>> x = jnp.array([[[[1.0, 0.0], [1.0, 0.0]]]])                  # (b, h, n, d) = (1, 1, 2, 2)
        >>> np.asarray(rotate(x, jnp.array([0, 1]), rotation(Rotary(), 2)))[0, 0].round(4)
        array([[1.    , 0.    ],
               [0.5403, 0.8415]], dtype=float32)

    References:
        Su et al., RoFormer (2021).
    """
    check_rotate(FRAMEWORK, x, positions, turning)
    x = jnp.asarray(x)
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    frequencies = jnp.asarray(np.array(turning.frequencies), wide)
    angles = jnp.asarray(to_int32(positions)).astype(wide)[..., None] * frequencies  # (n|b n) r
    angles = angles[None, None] if angles.ndim == 2 else angles[:, None]  # (b|1, 1, n, r)
    cos, sin = turning.factor * jnp.cos(angles), turning.factor * jnp.sin(angles)
    pairs = len(turning.frequencies)
    turned, rest = x[..., : 2 * pairs].astype(wide), x[..., 2 * pairs :]
    if turning.interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :pairs], turned[..., pairs:]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if turning.interleaved:
        out = jnp.stack(parts, -1).reshape(turned.shape)  # (... r 2) -> (... 2 r)
    else:
        out = jnp.concatenate(parts, -1)
    return jnp.concatenate([out.astype(x.dtype), rest], -1)

"""Rotary position embeddings on torch tensors."""

from __future__ import annotations

import torch

from attend_shared.rotary import Rotary, Rotation, check_rotate, rotation
from attend_torch.arrays import FRAMEWORK

__all__ = ["Rotary", "Rotation", "rotate", "rotation"]


def rotate(x: torch.Tensor, positions: torch.Tensor, turning: Rotation) -> torch.Tensor:
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
        >>> x = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])               # (b, h, n, d) = (1, 1, 2, 2)
        >>> rotate(x, torch.tensor([0, 1]), rotation(Rotary(), 2))[0, 0]
        tensor([[1.0000, 0.0000],
                [0.5403, 0.8415]])

    References:
        Su et al., RoFormer (2021).
    """
    check_rotate(FRAMEWORK, x, positions, turning)
    wide = torch.promote_types(x.dtype, torch.float32)
    frequencies = torch.tensor(turning.frequencies, dtype=wide, device=x.device)
    angles = positions.to(wide)[..., None] * frequencies  # (n|b n) r
    angles = angles[None, None] if angles.ndim == 2 else angles[:, None]  # (b|1, 1, n, r)
    cos, sin = turning.factor * angles.cos(), turning.factor * angles.sin()
    pairs = len(turning.frequencies)
    turned, rest = x[..., : 2 * pairs].to(wide), x[..., 2 * pairs :]
    if turning.interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :pairs], turned[..., pairs:]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if turning.interleaved:
        out = torch.stack(parts, -1).flatten(-2)  # (... r 2) -> (... 2 r)
    else:
        out = torch.cat(parts, -1)
    return torch.cat([out.to(x.dtype), rest], -1)

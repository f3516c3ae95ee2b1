"""The keep mask of dropout in torch: Philox4x32-7 counters, the same bits as everywhere else.

The numbers are made by an operator of their own, so that a compiler takes them whole: traced into a graph, wrapping
64-bit products have come out wrong.
"""

from __future__ import annotations

from typing import Any

import torch

from attend_shared.philox import KEY_STEPS, MULTIPLIERS, ROUNDS, threshold

_MASK = 0xFFFFFFFF


def words(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-7 on int64 tensors that hold unsigned 32-bit words.

    Args:
        counter: four tensors, broadcastable together.
        key: two scalar tensors.

    Returns:
        Four tensors of words in [0, 2**32), int64.

    References:
        Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The product may wrap; its bits are right all the same, and the mask undoes the sign of the shift.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + KEY_STEPS[0] & _MASK, k1 + KEY_STEPS[1] & _MASK
    return c0, c1, c2, c3


def keep_block(
    seed: torch.Tensor, item: torch.Tensor, head: torch.Tensor, rows: torch.Tensor, quads: torch.Tensor, dropout: float
) -> torch.Tensor:
    """The keep mask of some queries and of keys by fours.

    Args:
        seed: int64 (2,), the low and high 32 bits.
        item, head: the batch item and the query head, scalars or broadcastable to (..., n, m).
        rows: (n,), the queries.
        quads: (m,), fours of keys: key // 4.
        dropout: the probability of dropping.

    Returns:
        bool (..., n, 4 * m).
    """
    drawn = torch.stack(torch.broadcast_tensors(*words((quads, rows[:, None], head, item), (seed[0], seed[1]))), -1)
    return drawn.flatten(-2) >= threshold(dropout)


@torch.library.custom_op("attend_torch::keep_mask", mutates_args=())
def keep_mask(seed: torch.Tensor, b: int, h: int, i: int, j: int, dropout: float, first: int = 0) -> torch.Tensor:
    """Which weights are kept.

    Args:
        seed: int64 (2,), the low and high 32 bits.
        b, h, i, j: the sizes; h counts query heads.
        dropout: the probability of dropping.
        first: the index of the first of the i queries.

    Returns:
        bool (b, h, i, j), on the device of seed.
    """
    item, head, rows, quads = (torch.arange(n, device=seed.device) for n in (b, h, i, -(-j // 4)))
    kept = keep_block(seed, item[:, None, None, None], head[:, None, None], first + rows, quads, dropout)
    return kept[..., :j].contiguous()


@keep_mask.register_fake
def _(seed: torch.Tensor, b: int, h: int, i: int, j: int, dropout: float, first: int = 0) -> torch.Tensor:
    return seed.new_empty((b, h, i, j), dtype=torch.bool)


@torch.library.register_vmap("attend_torch::keep_mask")
def _(
    info: Any, in_dims: tuple, seed: torch.Tensor, b: int, h: int, i: int, j: int, dropout: float, first: int = 0
) -> tuple[torch.Tensor, int]:
    lanes = seed.movedim(in_dims[0], 0).unbind()  # indices are local: each lane has its own seed
    return torch.stack([keep_mask(lane, b, h, i, j, dropout, first) for lane in lanes]), 0


def seed_words(seed: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """A dropout_seed as int64 (2,), the low and high 32 bits, on `device`.

    Args:
        seed: an int in [0, 2**64), a uint32 tensor (2,), or an int64 scalar tensor, read as its 64 bits.
    """
    if not isinstance(seed, torch.Tensor):
        words = torch.full((2,), int(seed) & _MASK, dtype=torch.int64, device=device)  # a copy from the host would wait
        words[1:].fill_(int(seed) >> 32)
        return words
    if seed.dtype == torch.uint32:
        return seed.to(device, torch.int64)
    seed = seed.to(device)
    return torch.stack([seed & _MASK, seed >> 32 & _MASK])

"""`Attend` for Flax Linen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn

from attend_jax.attend import Array, run
from attend_jax.convert import seed_from_key
from attend_shared.call import Arrays, check_module


class Attend(nn.Module):
    """`attend` as a module without parameters: it holds the options, the call brings the arrays.

    JAX: a Flax Linen module. It drops unless the call's deterministic, which must be given if dropout > 0; seeds come
    from make_rng("dropout").

        Attend(options)(q, k, v, mask, ...) = attend(q, k, v, mask, ..., options)

    Args:
        dropout: the probability of dropping a weight in training, 0 <= dropout < 1.
        flash: None chooses; True demands an implementation that makes no q_len x kv_len array beyond one that the
            caller passes; False is einsum.
        scale: any finite number; None is d ** -0.5.
        is_causal: key j is allowed where j <= t + q_offset.
        window_size: (left, right), each a whole number >= 0 or None; see `attend`.
        softcap: a number > 0, or None for none.
        layout: "bhnd" or "bnhd".
        implementation: a name, a sequence of names, or None; not together with flash.

    Called with q, k, v, mask, bias, q_offset, q_segment_ids, kv_segment_ids, q_lengths, kv_lengths, sinks,
    dropout_seed, return_lse, score_fn and mask_fn, all as in `attend`: functions come with the call, since what they
    capture, such as a model's table of biases, may change from call to call. Where it drops and is given no
    dropout_seed, it draws one.

    Returns:
        What `attend` returns.

    Raises:
        TypeError, ValueError: a wrong option, when the module is made; a wrong argument, when it is called.
        UnsupportedError: no implementation that was asked for can serve the call.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> attention = Attend(scale=1.0, is_causal=True)
        >>> x = jnp.eye(2)[None, None]                                   # (b, h, n, d) = (1, 1, 2, 2)
        >>> np.asarray(attention.apply({}, x, x, x))[0, 0].round(4)
        array([[1.    , 0.    ],
               [0.2689, 0.7311]], dtype=float32)

    References:
        docs/semantics.md: every argument with a worked example.
    """

    dropout: float = 0.0
    flash: bool | None = None
    scale: float | None = None
    is_causal: bool = False
    window_size: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    layout: str = "bhnd"
    implementation: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        self.window_size, self.implementation = check_module(
            self.dropout, self.flash, self.scale, self.is_causal, self.window_size, self.softcap, self.layout,
            self.implementation,
        )  # fmt: skip
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        mask: Array | None = None,
        *,
        bias: Array | None = None,
        q_offset: int | Array | None = None,
        q_segment_ids: Array | None = None,
        kv_segment_ids: Array | None = None,
        q_lengths: Array | None = None,
        kv_lengths: Array | None = None,
        sinks: Array | None = None,
        dropout_seed: int | Array | None = None,
        return_lse: bool = False,
        score_fn: Callable[..., Any] | None = None,
        mask_fn: Callable[..., Any] | None = None,
        deterministic: bool | None = None,
    ) -> Any:
        """`attend` with this module's options. Where it drops and is given no seed, it draws one with
        make_rng("dropout").

        Raises:
            ValueError: if dropout > 0 and deterministic is not given.
        """
        if self.dropout and deterministic is None:
            raise ValueError(
                "deterministic: expected True or False where dropout > 0, got None. "
                "Pass deterministic=not training; a Linen module does not know."
            )
        dropout = 0.0 if deterministic else self.dropout
        if dropout and dropout_seed is None and self.has_rng("dropout"):
            dropout_seed = seed_from_key(self.make_rng("dropout"))
        arrays = Arrays(
            q, k, v, mask, bias, q_offset, q_segment_ids, kv_segment_ids, q_lengths, kv_lengths, sinks, dropout_seed
        )
        return run(arrays, self.is_causal, self.window_size, self.softcap, self.scale, dropout, return_lse, self.layout,
                   self.implementation, self.flash, score_fn, mask_fn)  # fmt: skip

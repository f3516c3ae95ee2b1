"""Language models that read from left to right: Llama and its relatives, Gemma 2, GPT-2. One block, whose options say
which of them it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attend_jax.models import blocks
from attend_jax.models.blocks import LayerNorm, RMSNorm
from attend_jax.models.encoder import LogitsOutput
from attend_jax.multihead import MultiHeadAttention
from attend_jax.rotary import Rotary
from attend_shared.layers import Cache


class CausalLMOutput(NamedTuple):
    """What a language model gives.

    Attributes:
        logits: (b, n, vocabulary).
        past_key_values: the caches of its layers with the new keys and values, or None where none were passed.
        hidden_states: (b, n, width) of the embeddings and of every layer, the last after the final norm; None where
            they were not asked for.
    """

    logits: jax.Array
    past_key_values: tuple[Cache, ...] | None = None
    hidden_states: tuple[jax.Array, ...] | None = None


class DecoderOutput(NamedTuple):
    """What a language model without its head gives.

    Attributes:
        last_hidden_state: (b, n, width), after the final norm.
        past_key_values, hidden_states: as in `CausalLMOutput`.
    """

    last_hidden_state: jax.Array
    past_key_values: tuple[Cache, ...] | None = None
    hidden_states: tuple[jax.Array, ...] | None = None


HEADS = {"ForCausalLM": "tokens", "LMHeadModel": "tokens", "ForSequenceClassification": "text", "Model": ""}
"""What a class of transformers has on its decoder, by the end of its name; the first that fits."""


@dataclass(frozen=True)
class DecoderSizes:
    """What is to be built.

    Attributes:
        norm: "rms", "rms from one" or "layer".
        bias: of query, key, value and out.
        windows: of each layer, the tokens that a query sees, itself included; None is all that came before.
        positions: how many a table of learned positions has; None where there is none.
        post_norms: whether the two parts of a layer are normalised before they are added, as well as before they start.
        tied: whether the head is the table of tokens.
        head: out of `HEADS`.
        labels: what a head for texts tells apart.
        pad: the token after which nothing counts for such a head; None where there is none.
    """

    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str
    eps: float
    norm: str = "rms"
    bias: tuple[bool, bool, bool, bool] = (False, False, False, False)
    gated: bool = True
    mlp_bias: bool = False
    qk_norm: bool = False
    rotary: Rotary | None = None
    positions: int | None = None
    windows: tuple[int | None, ...] = ()
    softcap: float | None = None
    scale: float | None = None
    logit_softcap: float | None = None
    embed_scale: float = 1.0
    post_norms: bool = False
    tied: bool = True
    head: str = "tokens"
    labels: int = 0
    pad: int | None = None


def _norm(sizes: DecoderSizes, dtype: Any, rngs: nnx.Rngs) -> LayerNorm | RMSNorm:
    if sizes.norm == "layer":
        return LayerNorm(sizes.width, sizes.eps, dtype=dtype, rngs=rngs)
    return RMSNorm(sizes.width, sizes.eps, from_one=sizes.norm == "rms from one", dtype=dtype, rngs=rngs)


class DecoderLayer(nnx.Module):
    """x = x + attention(norm(x)); x = x + mlp(norm(x)); with post_norms each sum takes the norm of its second part."""

    def __init__(self, sizes: DecoderSizes, n: int, dtype: Any, rngs: nnx.Rngs) -> None:
        window = sizes.windows[n] if sizes.windows else None
        self.attention_norm = _norm(sizes, dtype, rngs)
        self.attention = MultiHeadAttention(
            sizes.width, sizes.heads, sizes.kv_heads, sizes.head_dim, use_bias=sizes.bias,
            qk_norm="rms" if sizes.qk_norm else None, norm_eps=sizes.eps, rotary=sizes.rotary, is_causal=True,
            window_size=None if window is None else (window - 1, 0), softcap=sizes.softcap, scale=sizes.scale,
            param_dtype=dtype, rngs=rngs,
        )  # fmt: skip
        self.mlp_norm = _norm(sizes, dtype, rngs)
        self.mlp = blocks.MLP(
            sizes.width, sizes.inner, sizes.activation, gated=sizes.gated, bias=sizes.mlp_bias, dtype=dtype, rngs=rngs
        )
        self.post_attention_norm = _norm(sizes, dtype, rngs) if sizes.post_norms else None
        self.post_mlp_norm = _norm(sizes, dtype, rngs) if sizes.post_norms else None

    def __call__(
        self, x: jax.Array, mask: jax.Array | None, bias: jax.Array | None, positions: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """x (b, i, width), mask (b, j), bias (b, 1, 1, j), positions (b, i)."""
        out = self.attention(self.attention_norm(x), mask=mask, bias=bias, positions=positions, cache=cache)
        out, cache = (out, None) if cache is None else out
        x = x + (out if self.post_attention_norm is None else self.post_attention_norm(out))
        out = self.mlp(self.mlp_norm(x))
        return x + (out if self.post_mlp_norm is None else self.post_mlp_norm(out)), cache


class CausalLM(nnx.Module):
    """Tokens to the logits of the token that follows each, or with another head or none."""

    def __init__(self, sizes: DecoderSizes, dtype: Any, rngs: nnx.Rngs) -> None:
        self.sizes = sizes
        self.dtype = dtype
        self.tokens = blocks.embed(sizes.vocabulary, sizes.width, dtype=dtype, rngs=rngs)
        self.positions = (
            None if sizes.positions is None else blocks.embed(sizes.positions, sizes.width, dtype=dtype, rngs=rngs)
        )
        self.layers = nnx.List([DecoderLayer(sizes, n, dtype, rngs) for n in range(sizes.layers)])
        self.norm = _norm(sizes, dtype, rngs)
        count = {"text": sizes.labels, "tokens": 0 if sizes.tied else sizes.vocabulary}.get(sizes.head, 0)
        self.head = blocks.linear(sizes.width, count, bias=False, dtype=dtype, rngs=rngs) if count else None

    def __call__(
        self, input_ids: Any, attention_mask: Any = None, *, past_key_values: tuple[Cache, ...] | None = None,
        position_ids: Any = None, logits_to_keep: int = 0, output_hidden_states: bool = False,
    ) -> CausalLMOutput | DecoderOutput | LogitsOutput:  # fmt: skip
        """The logits of a batch, after what the caches hold.

        Args:
            input_ids: integers (b, n).
            attention_mask: 1 or true for a real token: (b, n), or with caches (b, their size). None is all of them.
            past_key_values: what `make_caches` or the last call gave; None is no cache.
            position_ids: integers (b, n); None counts from 0, or from what the caches hold, padding included, as
                transformers does.
            logits_to_keep: for how many of the last tokens logits are made; 0 is all of them.
            output_hidden_states: whether to return what every layer gives.

        Returns:
            CausalLMOutput, or what there is without that head, under the names that transformers has.
        """
        ids = blocks.token_ids(input_ids)
        if self.sizes.head == "text" and past_key_values:
            raise ValueError("past_key_values: expected None, since a text is judged whole, got caches. Leave it out.")
        if self.sizes.head == "text" and self.sizes.pad is None and len(ids) > 1:
            raise ValueError(f"input_ids: expected a single text, since without a pad_token_id in the checkpoint it is "
                             f"unknown where others end, got {len(ids)}. Pass them one by one.")  # fmt: skip
        caches = past_key_values or (None,) * self.sizes.layers
        start = jnp.int32(0)
        keys = ids.shape[1]
        if past_key_values:
            start, keys = past_key_values[0].length, past_key_values[0].k.shape[2]
        mask = blocks.key_mask(attention_mask, (ids.shape[0], keys))
        if position_ids is None:
            position_ids = (start + jnp.arange(ids.shape[1], dtype=jnp.int32))[None]
        limit = self.sizes.positions
        if limit is not None and ids.shape[1] > limit:
            raise ValueError(f"input_ids: expected at most {limit} tokens, the positions that the model has, "
                             f"got {ids.shape[1]}. Cut the text.")  # fmt: skip
        x = self.tokens(ids)
        if self.sizes.embed_scale != 1.0:
            x = x * jnp.asarray(self.sizes.embed_scale, x.dtype)
        if self.positions is not None:
            x = x + self.positions(position_ids)
        bias = None
        if past_key_values:
            bias, mask = blocks.mask_bias(mask, x.dtype), None
        states, new = [x], list[Any]()
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer(x, mask, bias, position_ids, cache)
            states.append(x)
            new.append(cache)
        x = self.norm(x)
        kept = tuple(new) if past_key_values else None, (*states[:-1], x) if output_hidden_states else None
        if self.sizes.head == "":
            return DecoderOutput(x, *kept)
        if self.sizes.head == "text":
            assert self.head is not None
            return LogitsOutput(self.head(self._last(x, ids)), kept[1])
        last = x[:, -logits_to_keep:]
        logits = blocks.unembed(self.tokens, last) if self.head is None else self.head(last)
        if self.sizes.logit_softcap is not None:
            logits = self.sizes.logit_softcap * jnp.tanh(logits / self.sizes.logit_softcap)
        return CausalLMOutput(logits, *kept)

    def _last(self, x: jax.Array, ids: jax.Array) -> jax.Array:
        """What stands at the last token that is no padding, (b, width) of (b, n, width): by its id, not by the mask."""
        if self.sizes.pad is None:
            return x[:, -1]
        at = jnp.argmax(jnp.where(ids != self.sizes.pad, jnp.arange(ids.shape[1]), 0), 1)
        return jnp.take_along_axis(x, at[:, None, None], 1)[:, 0]

    @property
    def writes(self) -> bool:
        """Whether it gives the logits of tokens."""
        return self.sizes.head == "tokens"

    def make_caches(self, batch: int, length: int) -> tuple[Cache, ...]:
        """Empty caches, one for each layer, with room for `length` tokens."""
        return tuple(layer.attention.make_cache(batch, length) for layer in self.layers)

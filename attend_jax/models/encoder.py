"""Encoders that normalise after each part: BERT, and ALBERT, whose layers share their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attend_jax.models import blocks
from attend_jax.models.blocks import LayerNorm
from attend_jax.models.options import Options
from attend_jax.multihead import MultiHeadAttention


class EncoderOutput(NamedTuple):
    """What an encoder gives.

    Attributes:
        last_hidden_state: (b, n, width).
        pooler_output: (b, width), made of the first token; None where there is no pooler.
        hidden_states: (b, n, width) of the embeddings and of every layer, or None where they were not asked for.
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None


class LogitsOutput(NamedTuple):
    """What an encoder with a head gives.

    Attributes:
        logits: (b, labels) of a text or an image, (b, n, labels) of its tokens, (b, n, vocabulary) of masked ones.
        hidden_states: as in `EncoderOutput`.
    """

    logits: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None


class SpanOutput(NamedTuple):
    """Where an answer begins and ends in a text.

    Attributes:
        start_logits, end_logits: (b, n).
        hidden_states: as in `EncoderOutput`.
    """

    start_logits: jax.Array
    end_logits: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None


HEADS = {
    "Model": "", "ForMaskedLM": "vocabulary", "ForSequenceClassification": "text", "ForTokenClassification": "tokens",
    "ForQuestionAnswering": "span",
}  # fmt: skip
"""What a class of transformers has on its encoder, by the end of its name."""


@dataclass(frozen=True)
class EncoderSizes:
    """What is to be built. `embed_width` is that of the tables, which a dense layer widens where `expand` says so;
    `groups` is the number of layers with weights of their own, through which `layers` steps go in order; `head` is out
    of `HEADS`, and `labels` is how many things it tells apart."""

    vocabulary: int
    width: int
    embed_width: int
    inner: int
    layers: int
    groups: int
    heads: int
    positions: int
    types: int
    activation: str
    eps: float
    expand: bool = False
    head: str = ""
    labels: int = 0

    @property
    def pooled(self) -> bool:
        """Whether there is a pooler."""
        return self.head in ("", "text")


def check(options: Options, sizes: EncoderSizes) -> None:
    """What must divide what."""
    if sizes.width % sizes.heads:
        expected = f"a number that divides the hidden_size of {sizes.width}"
        raise options.wrong("num_attention_heads", expected, sizes.heads)
    if sizes.layers % sizes.groups:
        raise options.wrong("num_hidden_groups", f"a number that divides the {sizes.layers} layers", sizes.groups)
    if sizes.head == "vocabulary":
        options.choice("tie_word_embeddings", True, (True,))
    options.get("tie_word_embeddings")  # elsewhere there is nothing to tie
    if sizes.head == "span" and sizes.labels != 2:
        raise options.wrong("num_labels", "2, where an answer begins and where it ends", sizes.labels)


class EncoderLayer(nnx.Module):
    """x = norm(x + attention(x)); x = norm(x + mlp(x))."""

    def __init__(self, sizes: EncoderSizes, dtype: Any, rngs: nnx.Rngs) -> None:
        self.attention = MultiHeadAttention(sizes.width, sizes.heads, param_dtype=dtype, rngs=rngs)
        self.attention_norm = LayerNorm(sizes.width, sizes.eps, dtype=dtype, rngs=rngs)
        self.mlp = blocks.MLP(sizes.width, sizes.inner, sizes.activation, dtype=dtype, rngs=rngs)
        self.mlp_norm = LayerNorm(sizes.width, sizes.eps, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """(b, n, width) to the same; mask (b, n)."""
        x = self.attention_norm(x + self.attention(x, mask=mask))
        return self.mlp_norm(x + self.mlp(x))


class VocabularyHead(nnx.Module):
    """norm(act(dense(x))) against the table of tokens, plus a bias."""

    def __init__(self, sizes: EncoderSizes, dtype: Any, rngs: nnx.Rngs) -> None:
        self.activation = sizes.activation
        self.dense = blocks.linear(sizes.width, sizes.embed_width, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(sizes.embed_width, sizes.eps, dtype=dtype, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros((sizes.vocabulary,), dtype))

    def __call__(self, x: jax.Array, table: nnx.Embed) -> jax.Array:
        """(b, n, width) to (b, n, vocabulary)."""
        x = self.norm(blocks.ACTIVATIONS[self.activation](self.dense(x)))
        return blocks.unembed(table, x) + self.bias[...]


def _head(sizes: EncoderSizes, dtype: Any, rngs: nnx.Rngs) -> Any:
    if sizes.head == "vocabulary":
        return VocabularyHead(sizes, dtype, rngs)
    return blocks.linear(sizes.width, sizes.labels, dtype=dtype, rngs=rngs) if sizes.head else None


class Encoder(nnx.Module):
    """Token, position and type embeddings, layers, and a pooler on the first token or a head."""

    def __init__(self, sizes: EncoderSizes, dtype: Any, rngs: nnx.Rngs) -> None:
        self.sizes = sizes
        width = sizes.embed_width
        self.tokens = blocks.embed(sizes.vocabulary, width, dtype=dtype, rngs=rngs)
        self.positions = blocks.embed(sizes.positions, width, dtype=dtype, rngs=rngs)
        self.types = blocks.embed(sizes.types, width, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width, sizes.eps, dtype=dtype, rngs=rngs)
        self.expand = None if not sizes.expand else blocks.linear(width, sizes.width, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([EncoderLayer(sizes, dtype, rngs) for _ in range(sizes.groups)])
        self.pooler = blocks.linear(sizes.width, sizes.width, dtype=dtype, rngs=rngs) if sizes.pooled else None
        self.head = _head(sizes, dtype, rngs)

    def __call__(
        self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None, *,
        output_hidden_states: bool = False,
    ) -> EncoderOutput | LogitsOutput | SpanOutput:  # fmt: skip
        """Encode a batch.

        Args:
            input_ids: integers (b, n).
            attention_mask: (b, n), 1 or true for a real token; None is all of them.
            token_type_ids: integers (b, n); None is 0.
            output_hidden_states: whether to return what every layer gives.

        Returns:
            EncoderOutput, or what the head makes of it, under the names that transformers has.
        """
        ids = blocks.token_ids(input_ids)
        mask = blocks.key_mask(attention_mask, ids.shape)
        if ids.shape[1] > self.sizes.positions:
            raise ValueError(f"input_ids: expected at most {self.sizes.positions} tokens, the positions that the model "
                             f"has, got {ids.shape[1]}. Cut the text.")  # fmt: skip
        types = jnp.zeros_like(ids) if token_type_ids is None else jnp.asarray(token_type_ids)
        x = self.tokens(ids) + self.types(types) + self.positions(jnp.arange(ids.shape[1]))
        x = self.norm(x)
        x = x if self.expand is None else self.expand(x)
        states = [x]
        for n in range(self.sizes.layers):
            layer = self.layers[n * self.sizes.groups // self.sizes.layers]
            x = layer(x, mask)
            states.append(x)
        pooled = None if self.pooler is None else jnp.tanh(self.pooler(x[:, 0]))
        kept = tuple(states) if output_hidden_states else None
        if self.head is None:
            return EncoderOutput(x, pooled, kept)
        if self.sizes.head == "vocabulary":
            return LogitsOutput(self.head(x, self.tokens), kept)
        logits = self.head(x if pooled is None else pooled)
        if self.sizes.head == "span":
            return SpanOutput(logits[..., 0], logits[..., 1], kept)
        return LogitsOutput(logits, kept)

"""Models that read with an encoder and write with a decoder: T5, which reads tokens, and Whisper, which reads sound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attend_jax.models import blocks
from attend_jax.models.blocks import LayerNorm, RMSNorm
from attend_jax.models.encoder import EncoderOutput
from attend_jax.multihead import MultiHeadAttention
from attend_shared.layers import Cache


class Carried(NamedTuple):
    """What a decoder keeps from one token to the next.

    Attributes:
        caches: of its own tokens, one for each layer.
        contexts: keys and values that each layer made of what the encoder gave, once.
        mask: (b, n) bool, the real places of what the encoder read, or None.
    """

    caches: tuple[Cache | None, ...]
    contexts: tuple[tuple[jax.Array, jax.Array], ...]
    mask: jax.Array | None


class Seq2SeqOutput(NamedTuple):
    """What such a model gives. A stack's hidden states are its embeddings and what every layer gives, the last after
    the final norm; None where they were not asked for.

    Attributes:
        logits: (b, n, vocabulary) of the tokens that the decoder read.
        past_key_values: what the next call needs, or None where nothing was passed.
        decoder_hidden_states: (b, n, width) each.
        encoder_last_hidden_state: (b, m, width).
        encoder_hidden_states: (b, m, width) each.
    """

    logits: jax.Array
    past_key_values: Carried | None = None
    decoder_hidden_states: tuple[jax.Array, ...] | None = None
    encoder_last_hidden_state: jax.Array | None = None
    encoder_hidden_states: tuple[jax.Array, ...] | None = None


class Seq2SeqModelOutput(NamedTuple):
    """What such a model gives without its head.

    Attributes:
        last_hidden_state: (b, n, width) of the decoder, after the final norm.
        past_key_values, decoder_hidden_states, encoder_last_hidden_state, encoder_hidden_states: as in `Seq2SeqOutput`.
    """

    last_hidden_state: jax.Array
    past_key_values: Carried | None = None
    decoder_hidden_states: tuple[jax.Array, ...] | None = None
    encoder_last_hidden_state: jax.Array | None = None
    encoder_hidden_states: tuple[jax.Array, ...] | None = None


@dataclass(frozen=True)
class Stack:
    """Layers, heads and the inner width of an encoder or a decoder."""

    layers: int
    heads: int
    inner: int


@dataclass(frozen=True)
class Seq2SeqSizes:
    """What is to be built.

    Attributes:
        head_dim: None is width // heads.
        decoder: None where there is the encoder alone.
        bias: of query, key, value and out.
        scale: of the scores; None is 1 / sqrt(head_dim).
        buckets, distance: of relative positions, whose table the layers of a stack share; None where there is none.
        positions: the learned positions of the decoder; None where there are none.
        sound: bands of a spectrogram and places of the encoder, which has two convolutions before it; None is text.
        logit_scale: what the last hidden state is multiplied by before the head.
        tied: whether the head is the table of tokens.
        headed: whether the decoder has a head, which gives logits.
        clamp: whether float16 is kept within its range after every layer of the encoder.
    """

    vocabulary: int
    width: int
    head_dim: int | None
    encoder: Stack
    decoder: Stack | None
    activation: str
    norm: str
    eps: float
    bias: tuple[bool, bool, bool, bool]
    mlp_bias: bool
    gated: bool
    scale: float | None = None
    buckets: int | None = None
    distance: int = 0
    positions: int | None = None
    sound: tuple[int, int] | None = None
    logit_scale: float = 1.0
    tied: bool = True
    headed: bool = True
    clamp: bool = False


class Fixed(nnx.BatchStat):
    """Positions that a checkpoint holds and that training leaves alone."""


def distance_buckets(buckets: int, distance: int) -> np.ndarray:
    """The bucket of each distance from 0 to `distance`, all farther ones in the last: one each in the lower half, and
    then ever wider ones, in float32 as T5 has it."""
    exact = buckets // 2
    far = np.arange(distance + 1, dtype=np.int32)
    ratio = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(distance / exact))
    wide = exact + (ratio * np.float32(buckets - exact)).astype(np.int32)
    return np.where(far < exact, far, np.minimum(wide, buckets - 1))


def relative_bias(table: nnx.Embed, sizes: Seq2SeqSizes, q: jax.Array, count: int, both_ways: bool) -> jax.Array:
    """What T5 adds to the scores of queries at q (i,) and keys 0 to count - 1: (1, h, i, count)."""
    assert sizes.buckets is not None
    relative = jnp.arange(count, dtype=jnp.int32)[None] - q[:, None]  # (i, count)
    buckets = sizes.buckets // 2 if both_ways else sizes.buckets
    near = jnp.abs(relative) if both_ways else jnp.maximum(-relative, 0)
    bucket = jnp.asarray(distance_buckets(buckets, sizes.distance))[jnp.minimum(near, sizes.distance)]
    if both_ways:
        bucket = bucket + jnp.where(relative > 0, buckets, 0)
    return table(bucket).transpose(2, 0, 1)[None]


def _norm(sizes: Seq2SeqSizes, dtype: Any, rngs: nnx.Rngs) -> LayerNorm | RMSNorm:
    return (RMSNorm if sizes.norm == "rms" else LayerNorm)(sizes.width, sizes.eps, dtype=dtype, rngs=rngs)


class Seq2SeqLayer(nnx.Module):
    """x = x + attention(norm(x)); in a decoder x = x + cross(norm(x), context); x = x + mlp(norm(x))."""

    def __init__(self, sizes: Seq2SeqSizes, stack: Stack, decoder: bool, dtype: Any, rngs: nnx.Rngs) -> None:
        def attention(is_causal: bool) -> MultiHeadAttention:
            return MultiHeadAttention(
                sizes.width, stack.heads, None, sizes.head_dim, use_bias=sizes.bias, scale=sizes.scale,
                is_causal=is_causal, param_dtype=dtype, rngs=rngs,
            )  # fmt: skip

        self.attention_norm = _norm(sizes, dtype, rngs)
        self.attention = attention(decoder)
        self.cross_norm = _norm(sizes, dtype, rngs) if decoder else None
        self.cross = attention(False) if decoder else None
        self.mlp_norm = _norm(sizes, dtype, rngs)
        self.mlp = blocks.MLP(
            sizes.width, stack.inner, sizes.activation, gated=sizes.gated, bias=sizes.mlp_bias, dtype=dtype, rngs=rngs
        )

    def __call__(
        self, x: jax.Array, mask: jax.Array | None, bias: jax.Array | None, cache: Cache | None = None,
        context: tuple[jax.Array, jax.Array] | None = None, context_mask: jax.Array | None = None,
        context_bias: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:  # fmt: skip
        """x (b, i, width), mask (b, j), bias (1 or b, 1 or h, 1 or i, j); the context as `project` gave it, its mask
        (b, m) or its bias (b, 1, 1, m)."""
        out = self.attention(self.attention_norm(x), mask=mask, bias=bias, cache=cache)
        out, cache = (out, None) if cache is None else out
        x = x + out
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.cross(self.cross_norm(x), context, mask=context_mask, bias=context_bias)
        return x + self.mlp(self.mlp_norm(x)), cache


class Seq2SeqLM(nnx.Module):
    """A text or a spectrogram, and the tokens written so far, to the logits of the token that follows each; or what
    there is without the head, or without the decoder."""

    def __init__(self, sizes: Seq2SeqSizes, dtype: Any, rngs: nnx.Rngs) -> None:
        if dtype == jnp.float16 and not sizes.clamp:
            raise TypeError("dtype: expected bfloat16 or float32, since values of this family leave the range of "
                            "float16, got float16. Pass dtype=jnp.float32.")  # fmt: skip
        self.sizes = sizes
        self.dtype = dtype
        width = sizes.width
        self.tokens = blocks.embed(sizes.vocabulary, width, dtype=dtype, rngs=rngs)
        if sizes.sound is not None:
            bands, places = sizes.sound
            self.convolutions = nnx.List([
                nnx.Conv(inputs, width, (3,), strides=strides, padding=1, param_dtype=dtype, precision=blocks.HIGHEST,
                         rngs=rngs)
                for inputs, strides in ((bands, 1), (width, 2))
            ])  # fmt: skip
            self.encoder_positions = Fixed(jnp.zeros((places, width), dtype))
        if sizes.buckets is not None:
            self.encoder_bias = blocks.embed(sizes.buckets, sizes.encoder.heads, dtype=dtype, rngs=rngs)
        self.encoder = self._layers(sizes.encoder, False, dtype, rngs)
        self.encoder_norm = _norm(sizes, dtype, rngs)
        own = sizes.decoder is not None and sizes.headed and not sizes.tied
        self.head = blocks.linear(width, sizes.vocabulary, bias=False, dtype=dtype, rngs=rngs) if own else None
        if sizes.decoder is None:
            return
        if sizes.positions is not None:
            self.positions = blocks.embed(sizes.positions, width, dtype=dtype, rngs=rngs)
        if sizes.buckets is not None:
            self.decoder_bias = blocks.embed(sizes.buckets, sizes.decoder.heads, dtype=dtype, rngs=rngs)
        self.decoder = self._layers(sizes.decoder, True, dtype, rngs)
        self.decoder_norm = _norm(sizes, dtype, rngs)

    def _layers(self, stack: Stack, decoder: bool, dtype: Any, rngs: nnx.Rngs) -> nnx.List:
        return nnx.List([Seq2SeqLayer(self.sizes, stack, decoder, dtype, rngs) for _ in range(stack.layers)])

    def __call__(
        self, inputs: Any, attention_mask: Any = None, decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None, *, output_hidden_states: bool = False,
    ) -> Seq2SeqOutput | Seq2SeqModelOutput | EncoderOutput:  # fmt: skip
        """Read with the encoder, and with the decoder all that has been written so far.

        Args:
            inputs: input_ids, integers (b, m); or input_features, floating (b, bands, frames).
            attention_mask: (b, m), 1 or true for a real token; None is all of them. Sound has none.
            decoder_input_ids: integers (b, n); the first is usually decoder_start_token_id. None where there is no
                decoder.
            decoder_attention_mask: (b, n).
            output_hidden_states: whether to return what every layer gives.

        Returns:
            Seq2SeqOutput, or what there is of it, under the names that transformers has.
        """
        if self.sizes.decoder is None:
            states = self.encode(inputs, attention_mask)
            return EncoderOutput(states[-1], None, states if output_hidden_states else None)
        if decoder_input_ids is None:
            raise ValueError("decoder_input_ids: expected integers (b, n), got None. What has been written so far "
                             "begins with decoder_start_token_id.")  # fmt: skip
        states = self.encode(inputs, attention_mask)
        carried = self.begin(states[-1], attention_mask, None)
        out = self.decode(
            decoder_input_ids, decoder_attention_mask, past_key_values=carried,
            output_hidden_states=output_hidden_states,
        )  # fmt: skip
        return out._replace(
            past_key_values=None, encoder_last_hidden_state=states[-1],
            encoder_hidden_states=states if output_hidden_states else None,
        )  # fmt: skip

    @property
    def writes(self) -> bool:
        """Whether it gives the logits of tokens."""
        return self.sizes.decoder is not None and self.sizes.headed

    def encode(self, inputs: Any, attention_mask: Any = None) -> tuple[jax.Array, ...]:
        """The hidden states (b, m, width) of the encoder: embeddings, layers, the last after the norm."""
        bias = None
        if self.sizes.sound is None:
            ids = blocks.token_ids(inputs)
            mask = blocks.key_mask(attention_mask, ids.shape)
            x = self.tokens(ids)
        else:
            x, mask = self._listen(inputs, attention_mask), None
        if self.sizes.buckets is not None:
            bias = relative_bias(self.encoder_bias, self.sizes, jnp.arange(x.shape[1]), x.shape[1], True)
        states = [x]
        for layer in self.encoder:
            x, _ = layer(x, mask, bias)
            if x.dtype == jnp.float16:  # as transformers does
                most = jnp.finfo(x.dtype).max - jnp.float16(1000)
                x = jnp.clip(x, -most, most)
            states.append(x)
        return (*states[:-1], self.encoder_norm(x))

    def _listen(self, inputs: Any, attention_mask: Any) -> jax.Array:
        """A spectrogram (b, bands, frames) to (b, frames / 2, width)."""
        assert self.sizes.sound is not None
        features = jnp.asarray(inputs)
        bands, places = self.sizes.sound
        if features.ndim != 3 or features.shape[1:] != (bands, 2 * places):
            raise ValueError(f"input_features: expected (b, bands, frames) with {(bands, 2 * places)}, got "
                             f"{features.shape}. Pad or cut the sound as its feature extractor does.")  # fmt: skip
        if attention_mask is not None:
            raise ValueError("attention_mask: expected None, since the encoder hears silence as it hears sound, "
                             "got a mask. Leave it out.")  # fmt: skip
        x = features.astype(self.encoder_positions.dtype).transpose(0, 2, 1)
        for convolution in self.convolutions:
            x = jax.nn.gelu(convolution(x), approximate=False)
        return x + self.encoder_positions[...]

    def begin(self, encoder_hidden_state: jax.Array, attention_mask: Any, length: int | None) -> Carried:
        """What a decoder starts with.

        Args:
            encoder_hidden_state: (b, m, width), the last.
            attention_mask: (b, m), or None.
            length: the slots of the caches; None is no caches.
        """
        mask = blocks.key_mask(attention_mask, encoder_hidden_state.shape[:2])
        caches = [
            None if length is None else layer.attention.make_cache(encoder_hidden_state.shape[0], length)
            for layer in self.decoder
        ]
        contexts = [layer.cross.project(encoder_hidden_state) for layer in self.decoder if layer.cross is not None]
        return Carried(tuple(caches), tuple(contexts), mask)

    def decode(
        self, decoder_input_ids: Any, decoder_attention_mask: Any = None, *, past_key_values: Carried,
        position_ids: Any = None, logits_to_keep: int = 0, output_hidden_states: bool = False,
    ) -> Seq2SeqOutput | Seq2SeqModelOutput:  # fmt: skip
        """The logits of what has been written, after what the caches hold.

        Args:
            decoder_input_ids: integers (b, n).
            decoder_attention_mask: 1 or true for a real token: (b, n), or with caches (b, their size).
            past_key_values: what `begin` or the last call gave.
            position_ids: integers (b, n) of learned positions; None counts from 0, or from what the caches hold.
            logits_to_keep: for how many of the last tokens logits are made; 0 is all of them.
            output_hidden_states: whether to return what every layer gives.
        """
        ids = blocks.token_ids(decoder_input_ids)
        first = past_key_values.caches[0]
        start, keys = (jnp.int32(0), ids.shape[1]) if first is None else (first.length, first.k.shape[2])
        mask = blocks.key_mask(decoder_attention_mask, (ids.shape[0], keys))
        limit = self.sizes.positions
        if limit is not None and ids.shape[1] > limit:
            raise ValueError(f"decoder_input_ids: expected at most {limit} tokens, the positions that the model has, "
                             f"got {ids.shape[1]}. Cut the text.")  # fmt: skip
        here = start + jnp.arange(ids.shape[1], dtype=jnp.int32)
        x = self.tokens(ids)
        if limit is not None:
            x = x + self.positions(here[None] if position_ids is None else position_ids)
        bias = None
        if self.sizes.buckets is not None:
            bias = relative_bias(self.decoder_bias, self.sizes, here, keys, False)
        context_mask, context_bias = past_key_values.mask, None
        if first is not None:
            more, mask = blocks.mask_bias(mask, x.dtype), None
            bias = bias if more is None else more if bias is None else bias + more
            context_bias, context_mask = blocks.mask_bias(context_mask, x.dtype), None
        states, caches = [x], list[Any]()
        for layer, cache, context in zip(self.decoder, past_key_values.caches, past_key_values.contexts, strict=True):
            x, cache = layer(x, mask, bias, cache, context, context_mask, context_bias)
            states.append(x)
            caches.append(cache)
        x = self.decoder_norm(x)
        kept = past_key_values._replace(caches=tuple(caches)), (*states[:-1], x) if output_hidden_states else None
        if not self.sizes.headed:
            return Seq2SeqModelOutput(x, *kept)
        last = x[:, -logits_to_keep:]
        if self.sizes.logit_scale != 1.0:
            last = last * jnp.asarray(self.sizes.logit_scale, last.dtype)
        logits = blocks.unembed(self.tokens, last) if self.head is None else self.head(last)
        return Seq2SeqOutput(logits, *kept)

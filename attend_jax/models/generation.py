"""Text, one token after another, under jit with caches of a fixed size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attend_jax.models.blocks import key_mask, token_ids
from attend_shared import progress
from attend_shared.errors import UnsupportedError

CHUNK = 32
"""Tokens between two looks at whether everything has ended."""

# What generation_config.json may ask for besides, and the values at which it asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "repetition_penalty": (1.0,), "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,), "min_length": (0,), "min_new_tokens": (0,),
    "bad_words_ids": (), "forced_bos_token_id": (), "forced_eos_token_id": (), "forced_decoder_ids": (),
    "penalty_alpha": (0.0,), "guidance_scale": (1.0,),
    "sequence_bias": (), "constraints": (), "exponential_decay_length_penalty": (), "dola_layers": (),
    "watermarking_config": (), "stop_strings": (), "return_timestamps": (False,), "is_multilingual": (False,),
}  # fmt: skip
SETTLED = ("forced_decoder_ids", "is_multilingual")  # by decoder_input_ids, where they are given
ADVICE = "Tokens would not be those of transformers. Change the file, if that is what you want."


class Sampling(NamedTuple):
    """How a token is drawn from logits; static under jit."""

    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float


class Rules(NamedTuple):
    """What a checkpoint says of its tokens; static under jit.

    Attributes:
        eos: what ends a sequence.
        pad: what follows.
        never, never_first: tokens that are not made, and those that are not the first one made.
    """

    eos: tuple[int, ...]
    pad: int
    never: tuple[int, ...] = ()
    never_first: tuple[int, ...] = ()


class _Run(NamedTuple):
    """Where a generation stands.

    Attributes:
        tokens: (b, max_new_tokens), padding where there is none yet.
        step: how many there are.
        done: (b,), whether a sequence has ended.
        positions: (b,), of the last token.
        mask: (b, slots), which keys are real; None is all of them.
        carried: what the model keeps: its caches, and what a decoder reads of an encoder.
        key: for sampling.
    """

    tokens: jax.Array
    step: jax.Array
    done: jax.Array
    positions: jax.Array
    mask: jax.Array | None
    carried: Any
    key: jax.Array


def generate(
    model: Any,
    input_ids: Any,
    attention_mask: Any = None,
    decoder_input_ids: Any = None,
    *,
    max_new_tokens: int = 20,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    key: jax.Array | None = None,
    show_progress: bool | None = None,
) -> jax.Array:
    """Continue a batch of prompts. Compiled once for each shape; greedy tokens are those of transformers.

    A model with an encoder reads its inputs with that, and continues decoder_input_ids. A sequence that has ended is
    filled up with padding, and all of it ends with the longest.

    Args:
        model: a language model that `from_pretrained` made.
        input_ids: integers (b, n), padded on the left; for an encoder padded anywhere, or floating input_features
            (b, bands, frames).
        attention_mask: (b, n), 1 or true for a real token; None is, as in transformers, all that are no pad_token_id,
            unless that is a token that ends a sequence, or there is none.
        decoder_input_ids: integers (b, m) without padding, what is continued after an encoder, beginning with
            decoder_start_token_id; None is that alone. Whisper needs them: they say language, task and timestamps.
        max_new_tokens: how many tokens are made at most.
        do_sample: whether tokens are drawn; otherwise each is the likeliest.
        temperature: logits are divided by it before one is drawn.
        top_k: draw among so many of the likeliest; None is all.
        top_p: draw among the likeliest that together have this probability.
        eos_token_id: what ends a sequence, one or several; None is what the checkpoint says.
        pad_token_id: what follows; None is what the checkpoint says, or the first of eos_token_id.
        key: a JAX key; needed where do_sample.
        show_progress: whether to draw a bar on standard error; None does where that is a terminal.

    Returns:
        Integers (b, n + k) with k <= max_new_tokens: the prompts, or decoder_input_ids, and what follows.

    Raises:
        TypeError, ValueError: a wrong argument: which one, what was expected, what came, what to try.
        UnsupportedError: generation_config.json asks for what is not supported, such as beams.

    Example:
        >>> from attend_jax.models.decoder import CausalLM, DecoderSizes
        >>> sizes = DecoderSizes(7, 8, 16, 1, 2, 1, 4, "silu", 1e-6)
        >>> generate(CausalLM(sizes, jnp.float32, nnx.Rngs(0)), np.ones((2, 3), np.int32), max_new_tokens=4).shape
        (2, 7)

    References:
        docs/porting.md. Holtzman et al., The curious case of neural text degeneration (2020): top_p.
    """
    if not getattr(model, "writes", False):
        raise TypeError(f"model: expected a language model with its head, such as a LlamaForCausalLM, got "
                        f"{type(model).__name__}, which gives no logits of tokens here.")  # fmt: skip
    settings, rules = _settings(model, eos_token_id, pad_token_id, SETTLED if decoder_input_ids is not None else ())
    if attention_mask is None:
        attention_mask = _not_padding(input_ids, settings["pad_token_id"], rules.eos)
    ids, mask, given = _prompts(model, settings, input_ids, attention_mask, decoder_input_ids)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected a whole number >= 1, got {max_new_tokens!r}.")
    if not (_is_number(temperature) and temperature > 0):
        raise ValueError(f"temperature: expected a number > 0, got {temperature!r}. do_sample=False is the limit at 0.")
    if top_k is not None and not (isinstance(top_k, int) and not isinstance(top_k, bool) and top_k >= 1):
        raise ValueError(f"top_k: expected None or a whole number >= 1, got {top_k!r}.")
    if not (_is_number(top_p) and 0 < top_p <= 1):
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}.")
    if do_sample and key is None:
        raise ValueError("key: expected a JAX key where do_sample, got None. Pass jax.random.key(0).")
    limit = getattr(model.sizes, "positions", None)
    if limit is not None and ids.shape[1] + max_new_tokens - 1 > limit:
        most = limit - ids.shape[1] + 1
        raise ValueError(f"max_new_tokens: expected at most {most} after {ids.shape[1]} tokens, since the model has "
                         f"{limit} positions, got {max_new_tokens}.")  # fmt: skip
    sampling = Sampling(True, float(temperature), top_k, float(top_p)) if do_sample else Sampling(False, 1.0, None, 1.0)
    key = jax.random.key(0) if key is None else key
    graph, state = nnx.split(model)
    with progress.bar("generating", max_new_tokens, show_progress) as told:
        real = None if mask.all() else jnp.asarray(mask)
        run = _start(graph, state, given, ids, real, key, max_new_tokens, rules, sampling)
        step = int(run.step)
        told(step)
        while step < max_new_tokens and not bool(run.done.all()):
            run = _more(graph, state, run, rules, sampling)
            told(int(run.step) - step)
            step = int(run.step)
    return jnp.concatenate([ids, run.tokens[:, :step].astype(ids.dtype)], 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.floating)) and not isinstance(value, bool)


def _settings(
    model: Any, eos: int | Sequence[int] | None, pad: int | None, settled: tuple[str, ...]
) -> tuple[dict[str, Any], Rules]:  # fmt: skip
    """What the checkpoint says of generation, generation_config.json before config.json, and what follows of it."""
    texts = {name: getattr(model, name, "") for name in ("config_json", "generation_json")}
    settings = {name: json.loads(text) for name, text in texts.items() if text}
    asked = settings.get("generation_json", {})
    reasons = [
        (name, f"expected {' or '.join(map(repr, (None, *neutral)))}, got {asked[name]!r}")
        for name, neutral in NEUTRAL.items()
        if asked.get(name) is not None and asked[name] not in neutral and name not in settled
    ]
    if reasons:
        raise UnsupportedError(tuple(reasons), "generation_config.json asks for what is not supported:", ADVICE)
    both = {**settings.get("config_json", {}), **{name: x for name, x in asked.items() if x is not None}}
    eos = both.get("eos_token_id") if eos is None else eos
    ends = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    pad = both.get("pad_token_id") if pad is None else pad
    both["pad_token_id"] = pad
    source = asked or both  # config.json says nothing of them where there is the other file
    never, first = (tuple(source.get(name) or ()) for name in ("suppress_tokens", "begin_suppress_tokens"))
    return both, Rules(ends, (ends[0] if ends else 0) if pad is None else pad, never, first)


def _not_padding(input_ids: Any, pad: int | None, ends: tuple[int, ...]) -> np.ndarray | None:
    """Which tokens are real where nobody says it; None is all of them, as of anything else than tokens."""
    if pad is None or pad in ends or not np.issubdtype((ids := np.asarray(input_ids)).dtype, np.integer):
        return None
    return ids != pad if (ids == pad).any() else None


def _prompts(
    model: Any, settings: dict[str, Any], input_ids: Any, attention_mask: Any, decoder_input_ids: Any
) -> tuple[jax.Array, np.ndarray, tuple[Any, Any] | None]:
    """The tokens that are continued, which of them are real, and what an encoder is given; None where there is none."""
    if hasattr(model, "encode"):
        given = jnp.asarray(input_ids)
        if given.size == 0:
            raise ValueError(f"input_ids: expected something for the encoder to read, got shape {given.shape}.")
        start, speech = settings.get("decoder_start_token_id"), model.sizes.sound is not None
        if decoder_input_ids is None and (speech or not isinstance(start, int)):
            reason = "language, task and timestamps are up to them" if speech else "there is no decoder_start_token_id"
            raise ValueError(f"decoder_input_ids: expected integers (b, m), since {reason}, got None. "
                             "Pass what the answer begins with.")  # fmt: skip
        if decoder_input_ids is None:
            decoder_input_ids = np.full((given.shape[0], 1), start, np.int32)
        if (ids := jnp.asarray(decoder_input_ids)).ndim != 2 or ids.shape[0] != given.shape[0] or ids.size == 0:
            raise ValueError(f"decoder_input_ids: expected integers (b, m) with b = {given.shape[0]} as in input_ids "
                             f"and at least one token, got shape {ids.shape}.")  # fmt: skip
        if isinstance(start, int) and (np.asarray(ids[:, 0]) != start).any():
            raise ValueError(f"decoder_input_ids: expected rows that begin with {start}, the decoder_start_token_id, "
                             f"got {np.asarray(ids[:, 0]).tolist()}. Put it before them.")  # fmt: skip
        mask = attention_mask if speech else key_mask(attention_mask, given.shape)
        return token_ids(ids), np.ones(ids.shape, bool), (given, mask)
    if decoder_input_ids is not None:
        raise ValueError(f"decoder_input_ids: expected None, since {type(model).__name__} has no encoder, got some. "
                         "Its prompts are input_ids.")  # fmt: skip
    ids = token_ids(input_ids)
    if ids.size == 0:
        raise ValueError(f"input_ids: expected at least one prompt of one token, got shape {ids.shape}.")
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask: expected shape {ids.shape}, that of input_ids, got {mask.shape}. "
                         "Pass the tokenizer's own, 1 for a real token and 0 for padding.")  # fmt: skip
    if (mask[:, :-1] & ~mask[:, 1:]).any() or not mask[:, -1].all():
        raise ValueError('attention_mask: expected padding on the left only, so that every prompt ends in the last '
                         'column. Set the tokenizer\'s padding_side = "left".')  # fmt: skip
    return ids, mask, None


@partial(jax.jit, static_argnums=(0, 6, 7, 8))
def _start(
    graph: Any, state: Any, given: tuple[Any, Any] | None, ids: jax.Array, mask: jax.Array | None, key: jax.Array,
    count: int, rules: Rules, sampling: Sampling,
) -> _Run:  # fmt: skip
    """Read the prompts and make the first token."""
    model = nnx.merge(graph, state)
    b, n = ids.shape
    if given is None:
        carried = model.make_caches(b, n + count)
    else:
        carried = model.begin(model.encode(*given)[-1], given[1], n + count)
    if mask is None:
        positions, wide = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (b, n)), None
    else:
        positions = jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), 1) - 1, 0)
        wide = jnp.concatenate([mask, jnp.ones((b, count), bool)], 1)
    out = _writer(model)(ids, wide, past_key_values=carried, position_ids=positions, logits_to_keep=1)
    tokens = jnp.full((b, count), rules.pad, jnp.int32)
    run = _Run(tokens, jnp.int32(0), jnp.zeros(b, bool), positions[:, -1], wide, out.past_key_values, key)
    return _append(run, _without(out.logits[:, -1], rules.never_first), rules, sampling)


@partial(jax.jit, static_argnums=(0, 3, 4), donate_argnums=2)
def _more(graph: Any, state: Any, run: _Run, rules: Rules, sampling: Sampling) -> _Run:
    """Up to `CHUNK` more tokens, until every sequence has ended or the room is used up."""
    end = jnp.minimum(run.step + CHUNK, run.tokens.shape[1])

    def body(run: _Run) -> _Run:
        model = nnx.merge(graph, state)
        last = jax.lax.dynamic_index_in_dim(run.tokens, run.step - 1, 1)  # (b, 1)
        positions = run.positions + 1
        out = _writer(model)(last, run.mask, past_key_values=run.carried, position_ids=positions[:, None])
        run = run._replace(carried=out.past_key_values, positions=positions)
        return _append(run, out.logits[:, -1], rules, sampling)

    return jax.lax.while_loop(lambda run: (run.step < end) & ~run.done.all(), body, run)


def _writer(model: Any) -> Any:
    """What makes logits of tokens: the model, or its decoder."""
    return model.decode if hasattr(model, "decode") else model


def _without(logits: jax.Array, tokens: tuple[int, ...]) -> jax.Array:
    """Logits (b, vocabulary) under which these tokens are never drawn."""
    return logits.at[:, jnp.asarray(tokens, jnp.int32)].set(-jnp.inf) if tokens else logits


def _append(run: _Run, logits: jax.Array, rules: Rules, sampling: Sampling) -> _Run:
    """The next token of every sequence from its logits (b, vocabulary), padding where it has ended."""
    key, own = jax.random.split(run.key)
    token = draw(_without(logits, rules.never), own, sampling)
    token = jnp.where(run.done, jnp.int32(rules.pad), token)
    done = run.done
    for end in rules.eos:
        done = done | (token == end)
    tokens = jax.lax.dynamic_update_index_in_dim(run.tokens, token, run.step, 1)
    return run._replace(tokens=tokens, step=run.step + 1, done=done, key=key)


def draw(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """A token (b,) from logits (b, vocabulary): the likeliest, or drawn as `sampling` says."""
    if not sampling.do_sample:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None:
        least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = -jnp.sort(-logits, -1)
        before = jnp.cumsum(jax.nn.softmax(ordered, -1), -1) - jax.nn.softmax(ordered, -1)
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)

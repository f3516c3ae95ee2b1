"""Whisper: a spectrogram, and the tokens of what is said in it."""

from __future__ import annotations

from attend_jax.models.blocks import ACTIVATIONS
from attend_jax.models.family import Family, Plan, bare
from attend_jax.models.options import Options
from attend_jax.models.seq2seq import Seq2SeqLM, Seq2SeqSizes, Stack
from attend_shared.rules import attention, conv, embedding, layer_norm, linear


def plan(options: Options, architecture: str) -> Plan:
    """Two convolutions, fixed positions in the encoder, learned ones in the decoder; keys have no bias."""
    width = options.size("d_model", 384)
    encoder, decoder = _stack(options, "encoder", width), _stack(options, "decoder", width)
    bias = (True, False, True, True)
    sizes = Seq2SeqSizes(
        vocabulary=options.size("vocab_size", 51865),
        width=width,
        head_dim=None,
        encoder=encoder,
        decoder=decoder,
        activation=options.choice("activation_function", "gelu", ACTIVATIONS),
        norm="layer",
        eps=1e-5,
        bias=bias,
        mlp_bias=True,
        gated=False,
        positions=options.size("max_target_positions", 448),
        sound=(options.size("num_mel_bins", 80), options.size("max_source_positions", 1500)),
        tied=options.flag("tie_word_embeddings", True),
        headed=(headed := architecture == "WhisperForConditionalGeneration"),
        clamp=True,
    )
    options.choice("scale_embedding", False, (False,))  # transformers reads it and does nothing
    for name in ("init_std", "median_filter_width", "num_hidden_layers"):  # the last is another name of encoder_layers
        options.get(name)
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    rules = [
        *embedding("model.decoder.embed_tokens", "tokens"),
        *embedding("model.decoder.embed_positions", "positions"),
        "model.encoder.embed_positions.weight <-> encoder_positions",
        *conv("model.encoder.conv1", "convolutions.0", dims=1),
        *conv("model.encoder.conv2", "convolutions.1", dims=1),
    ]
    if sizes.tied and headed:
        rules.append("proj_out.weight = model.decoder.embed_tokens.weight")
    elif headed:
        rules += linear("proj_out", "head", bias=False)
    for stack, size in (("encoder", "h"), ("decoder", "k")):
        there, here = f"model.{stack}.layers.{{l}}", f"{stack}.{{l}}"
        parts = [("self_attn", "attention"), *([("encoder_attn", "cross")] if stack == "decoder" else [])]
        for one, other in parts:
            rules += attention(f"{there}.{one}", f"{here}.{other}", names=names, heads=size, kv_heads=size, bias=bias)
            rules += layer_norm(f"{there}.{one}_layer_norm", f"{here}.{other}_norm")
        rules += [
            *linear(f"{there}.fc1", f"{here}.mlp.up"),
            *linear(f"{there}.fc2", f"{here}.mlp.down"),
            *layer_norm(f"{there}.final_layer_norm", f"{here}.mlp_norm"),
            *layer_norm(f"model.{stack}.layer_norm", f"{stack}_norm"),
        ]
    counts = {"h": encoder.heads, "k": decoder.heads}
    if not headed:
        return Plan(lambda dtype, rngs: Seq2SeqLM(sizes, dtype, rngs), bare("model.", rules), counts)
    return Plan(lambda dtype, rngs: Seq2SeqLM(sizes, dtype, rngs), rules, counts, "model.")


def _stack(options: Options, name: str, width: int) -> Stack:
    """The sizes of the encoder or the decoder."""
    heads = options.size(f"{name}_attention_heads", 6)
    if width % heads:
        raise options.wrong(f"{name}_attention_heads", f"a number that divides the d_model of {width}", heads)
    return Stack(options.layers(f"{name}_layers", 4), heads, options.size(f"{name}_ffn_dim", 1536))


FAMILY = Family("whisper", "Whisper", ("WhisperForConditionalGeneration", "WhisperModel"), plan)

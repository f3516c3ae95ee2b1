"""T5, and T5 1.1, Flan-T5 and the like, which have gated MLPs and a head of their own."""

from __future__ import annotations

from attend_jax.models.blocks import ACTIVATIONS
from attend_jax.models.family import Family, Plan
from attend_jax.models.options import Options
from attend_jax.models.seq2seq import Seq2SeqLM, Seq2SeqSizes, Stack
from attend_shared.rules import attention, embedding, linear, rms_norm


def plan(options: Options, architecture: str) -> Plan:
    """Scores are not scaled; a table of relative positions in each stack, which all of its layers add."""
    width, heads, inner = options.size("d_model", 512), options.size("num_heads", 8), options.size("d_ff", 2048)
    layers = options.layers("num_layers", 6)
    gated, activation = _mlp(options)
    decodes, headed = architecture != "T5EncoderModel", architecture == "T5ForConditionalGeneration"
    buckets = options.size("relative_attention_num_buckets", 32, least=4, most=2**12)
    # Transformers 5 ties the heads of new models and writes so, but keeps one that differs, and does not scale then.
    scaled = options.flag("scale_decoder_outputs", options.flag("tie_word_embeddings", True))
    sizes = Seq2SeqSizes(
        vocabulary=options.size("vocab_size", 32128),
        width=width,
        head_dim=options.size("d_kv", 64),
        encoder=Stack(layers, heads, inner),
        decoder=Stack(options.layers("num_decoder_layers", layers), heads, inner) if decodes else None,
        activation=activation,
        norm="rms",
        eps=options.eps("layer_norm_epsilon", 1e-6),
        bias=(False,) * 4,
        mlp_bias=False,
        gated=gated,
        scale=1.0,
        buckets=buckets,
        distance=options.size("relative_attention_max_distance", 128, least=buckets // 2 + 1, most=2**20),
        logit_scale=width**-0.5 if scaled else 1.0,
        tied=scaled,
        headed=headed,
    )
    options.get("num_decoder_layers")
    options.get("n_positions")  # of the texts that it was trained on
    rules = [
        *embedding("shared", "tokens"),
        "encoder.embed_tokens.weight = shared.weight",
    ]
    names = ("q", "k", "v", "o")
    for stack, last in (("encoder", 1), ("decoder", 2))[: 1 + decodes]:
        there, here = f"{stack}.block.{{l}}.layer", f"{stack}.{{l}}"
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
        rules += [
            *embedding(first, f"{stack}_bias"),
            *attention(f"{there}.0.SelfAttention", f"{here}.attention", names=names, bias=False),
            *rms_norm(f"{there}.0.layer_norm", f"{here}.attention_norm"),
            *linear(f"{there}.{last}.DenseReluDense.wo", f"{here}.mlp.down", bias=False),
            *rms_norm(f"{there}.{last}.layer_norm", f"{here}.mlp_norm"),
            *rms_norm(f"{stack}.final_layer_norm", f"{stack}_norm"),
        ]
        for name, part in (("wi_0", "gate"), ("wi_1", "up")) if gated else (("wi", "up"),):
            rules += linear(f"{there}.{last}.DenseReluDense.{name}", f"{here}.mlp.{part}", bias=False)
    rules += [] if not decodes else [
        "decoder.embed_tokens.weight = shared.weight",
        # A table that T5 never had a use for, in checkpoints that were converted long ago.
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight <-> -",
        *attention("decoder.block.{l}.layer.1.EncDecAttention", "decoder.{l}.cross", names=names, bias=False),
        *rms_norm("decoder.block.{l}.layer.1.layer_norm", "decoder.{l}.cross_norm"),
    ]
    if headed:
        rules += ["lm_head.weight = shared.weight"] if sizes.tied else linear("lm_head", "head", bias=False)
    return Plan(lambda dtype, rngs: Seq2SeqLM(sizes, dtype, rngs), rules, {"h": heads})


def _mlp(options: Options) -> tuple[bool, str]:
    """Whether it is gated, and its activation, as feed_forward_proj says in one word."""
    words = {
        **{name: (False, name) for name in ACTIVATIONS},
        **{f"gated-{name}": (True, name) for name in ACTIVATIONS},
        "gated-gelu": (True, "gelu_new"),  # not what it says
    }
    word = options.choice("feed_forward_proj", "relu", tuple(words))
    gated, activation = words.get(word, (False, "relu"))
    options.choice("dense_act_fn", activation, (activation,))
    options.choice("is_gated_act", gated, (gated,))
    return gated, activation


FAMILY = Family("t5", "T5", ("T5ForConditionalGeneration", "T5Model", "T5EncoderModel"), plan)

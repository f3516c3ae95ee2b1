"""GPT-2, whose linear layers are stored the other way round (Conv1D), and query, key and value as one."""

from __future__ import annotations

from attend_jax.models import llama
from attend_jax.models.blocks import ACTIVATIONS
from attend_jax.models.decoder import CausalLM, DecoderSizes
from attend_jax.models.family import Family, Plan, bare
from attend_jax.models.options import Options
from attend_shared.rules import embedding, layer_norm


def plan(options: Options, architecture: str) -> Plan:
    """Learned positions, layer norms before each part."""
    width, heads = options.size("n_embd", 768), options.size("n_head", 12)
    if width % heads:
        raise options.wrong("n_head", f"a number that divides the n_embd of {width}", heads)
    sizes = DecoderSizes(
        vocabulary=options.size("vocab_size", 50257),
        width=width,
        inner=options.size("n_inner", 4 * width),
        layers=options.layers("n_layer", 12),
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        activation=options.choice("activation_function", "gelu_new", ACTIVATIONS),
        eps=options.eps("layer_norm_epsilon", 1e-5),
        norm="layer",
        bias=(True,) * 4,
        gated=False,
        mlp_bias=True,
        positions=options.size("n_positions", 1024),
        scale=None if options.flag("scale_attn_weights", True) else 1.0,
        tied=options.flag("tie_word_embeddings", True),
        **llama.head(options, architecture),
    )
    options.get("n_ctx")  # another name of n_positions
    options.choice("scale_attn_by_inverse_layer_idx", False, (False,))
    options.choice("reorder_and_upcast_attn", False, (False,))
    there, here = "transformer.h.{l}", "layers.{l}"
    rules = [
        *embedding("transformer.wte", "tokens"),
        *embedding("transformer.wpe", "positions"),
        *layer_norm(f"{there}.ln_1", f"{here}.attention_norm"),
        f"{there}.attn.c_attn.weight <-> {here}.attention.{{query|key|value}}.kernel : c (* h d) -> c (* h) d",
        f"{there}.attn.c_attn.bias <-> {here}.attention.{{query|key|value}}.bias : (* h d) -> (* h) d",
        f"{there}.attn.c_proj.weight <-> {here}.attention.out.kernel : (h d) c -> h d c",
        f"{there}.attn.c_proj.bias <-> {here}.attention.out.bias",
        f"{there}.attn.bias <-> -",
        f"{there}.attn.masked_bias <-> -",
        *layer_norm(f"{there}.ln_2", f"{here}.mlp_norm"),
        f"{there}.mlp.c_fc.weight <-> {here}.mlp.up.kernel",
        f"{there}.mlp.c_fc.bias <-> {here}.mlp.up.bias",
        f"{there}.mlp.c_proj.weight <-> {here}.mlp.down.kernel",
        f"{there}.mlp.c_proj.bias <-> {here}.mlp.down.bias",
        *layer_norm("transformer.ln_f", "norm"),
        *llama.head_rules(sizes, "transformer.wte.weight"),
    ]
    if sizes.head == "":
        return Plan(lambda dtype, rngs: CausalLM(sizes, dtype, rngs), bare("transformer.", rules), {"h": heads})
    return Plan(lambda dtype, rngs: CausalLM(sizes, dtype, rngs), rules, {"h": heads}, "transformer.")


FAMILY = Family("gpt2", "GPT-2", ("GPT2LMHeadModel", "GPT2Model", "GPT2ForSequenceClassification"), plan)

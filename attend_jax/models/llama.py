"""Llama, and what the families that grew out of it share."""

from __future__ import annotations

from typing import Any

from attend_jax.models.blocks import ACTIVATIONS
from attend_jax.models.decoder import HEADS, CausalLM, DecoderSizes
from attend_jax.models.family import Family, Plan, bare
from attend_jax.models.options import Options
from attend_jax.rotary import Rotary
from attend_shared.rules import attention, embedding, linear, rms_norm


def plan(options: Options, architecture: str) -> Plan:
    """Biases of attention and MLP as the config says."""
    bias = options.flag("attention_bias", False)
    mlp_bias = options.flag("mlp_bias", False)
    return finish(DecoderSizes(**common(options, architecture), bias=(bias,) * 4, mlp_bias=mlp_bias))


def classes(name: str) -> tuple[str, ...]:
    """Those of transformers whose checkpoints can be read."""
    return tuple(f"{name}{end}" for end in ("ForCausalLM", "Model", "ForSequenceClassification"))


def head(options: Options, architecture: str) -> dict[str, Any]:
    """What a class has on its decoder, as fields of `DecoderSizes`."""
    kind = next(kind for end, kind in HEADS.items() if architecture.endswith(end))
    if kind != "text":
        return {"head": kind}
    pad = options.get("pad_token_id")
    if pad is not None:
        pad = options.size("pad_token_id", least=0)
    return {"head": kind, "labels": options.labels(), "pad": pad}


def common(
    options: Options, architecture: str, *, kv_heads: int | None = None, head_dim: int | None = None,
    activation: str = "hidden_act", default: str = "silu", tied: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The options that all of these families have, as fields of `DecoderSizes`.

    Args:
        options: the config.
        architecture: the class of transformers.
        kv_heads: where num_key_value_heads is left out; None is as many as heads. One that is null is, everywhere.
        head_dim: where head_dim is left out; None is hidden_size // num_attention_heads.
        activation, default: the option of the activation, and its value where it is left out.
        tied: where tie_word_embeddings is left out.
    """
    width, heads = options.size("hidden_size"), options.size("num_attention_heads")
    fallback = width // heads if head_dim is None else head_dim
    if head_dim is None and options.get("head_dim") is None and width % heads:
        raise options.wrong("num_attention_heads", f"a number that divides the hidden_size of {width}", heads)
    given = options.has("num_key_value_heads") or kv_heads is None
    kv_heads = options.size("num_key_value_heads", heads if given else kv_heads)
    if heads % kv_heads:
        raise options.wrong("num_key_value_heads", f"a number that divides the {heads} heads", kv_heads)
    options.get("max_position_embeddings")  # a table of angles would need it
    head_dim = options.size("head_dim", fallback)
    if head_dim % 2:
        raise options.wrong("head_dim", "an even number", head_dim)
    return {
        "vocabulary": options.size("vocab_size"),
        "width": width,
        "inner": options.size("intermediate_size"),
        "layers": options.layers("num_hidden_layers"),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "activation": options.choice(activation, default, ACTIVATIONS),
        "eps": options.eps("rms_norm_eps", 1e-6),
        "rotary": rotary(options),
        "tied": options.flag("tie_word_embeddings", tied),
        **head(options, architecture),
    }


def rotary(options: Options) -> Rotary:
    """Rotary embeddings, from rope_parameters or, before transformers 5, from rope_theta and rope_scaling."""
    parameters = options.get("rope_parameters")
    theta, older = options.get("rope_theta"), options.get("rope_scaling")
    for name, value in (("rope_parameters", parameters), ("rope_scaling", older)):
        if not isinstance(value, (dict, type(None))):
            raise options.wrong(name, "an object", value)
    given = {"rope_theta": theta, **(older or {}), **(parameters or {})}
    base = given.pop("rope_theta", None)
    if "type" in given:
        given["rope_type"] = given.pop("type")
    if given.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
        options.refuse("rope_parameters", "partial_rotary_factor other than 1")
    if not given or given == {"rope_type": "default"}:
        given = {}
    try:
        return Rotary(base=10000.0 if base is None else base, scaling=given or None)
    except (TypeError, ValueError) as error:
        options.refuse("rope_parameters", str(error))
        return Rotary()


def windows(options: Options, layers: int, types: list[str]) -> tuple[int | None, ...]:
    """What each layer sees, from sliding_window and layer_types; the types are those where the config has none."""
    window = 4096 if not options.has("sliding_window") else options.get("sliding_window")
    if window is not None and options.has("sliding_window"):
        window = options.size("sliding_window")
    types = options.get("layer_types", types)
    kinds: dict[str, int | None] = {"sliding_attention": window, "full_attention": None}
    if not isinstance(types, list) or len(types) != layers or not all(isinstance(each, str) for each in types):
        raise options.wrong("layer_types", f"a list of {layers} texts", types)
    unknown = sorted(set(types) - set(kinds))
    if unknown:
        options.refuse("layer_types", f"expected {' or '.join(kinds)}, got {', '.join(unknown)}")
    return tuple(kinds.get(each) for each in types)


def rules(sizes: DecoderSizes) -> list[str]:
    """The names that all of these families have; norms are the two of Llama."""
    there, here = "model.layers.{l}", "layers.{l}"
    found = [
        *embedding("model.embed_tokens", "tokens"),
        *attention(
            f"{there}.self_attn", f"{here}.attention", names=("q_proj", "k_proj", "v_proj", "o_proj"), kv_heads="k",
            bias=sizes.bias,
        ),
        *linear(f"{there}.mlp.gate_proj", f"{here}.mlp.gate", bias=sizes.mlp_bias),
        *linear(f"{there}.mlp.up_proj", f"{here}.mlp.up", bias=sizes.mlp_bias),
        *linear(f"{there}.mlp.down_proj", f"{here}.mlp.down", bias=sizes.mlp_bias),
        *rms_norm(f"{there}.input_layernorm", f"{here}.attention_norm"),
        *rms_norm(f"{there}.post_attention_layernorm", f"{here}.mlp_norm"),
        *rms_norm("model.norm", "norm"),
        f"{there}.self_attn.rotary_emb.inv_freq <-> -",
    ]  # fmt: skip
    if sizes.qk_norm:
        found += rms_norm(f"{there}.self_attn.q_norm", f"{here}.attention.query_norm")
        found += rms_norm(f"{there}.self_attn.k_norm", f"{here}.attention.key_norm")
    return found + head_rules(sizes, "model.embed_tokens.weight")


def head_rules(sizes: DecoderSizes, table: str) -> list[str]:
    """The names of a head; `table` is that of the tokens."""
    if sizes.head != "tokens":
        return linear("score", "head", bias=False) if sizes.head else []
    return [f"lm_head.weight = {table}"] if sizes.tied else linear("lm_head", "head", bias=False)


def finish(sizes: DecoderSizes, lines: list[str] | None = None) -> Plan:
    """A plan for these sizes, under Llama's names unless others are given."""
    lines = rules(sizes) if lines is None else lines
    counts = {"h": sizes.heads, "k": sizes.kv_heads}
    if sizes.head == "":
        return Plan(lambda dtype, rngs: CausalLM(sizes, dtype, rngs), bare("model.", lines), counts)
    return Plan(lambda dtype, rngs: CausalLM(sizes, dtype, rngs), lines, counts, "model.")


FAMILY = Family("llama", "Llama", classes("Llama"), plan)

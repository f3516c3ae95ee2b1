"""Gemma 2: four norms in a layer, softcaps, a scale of its own, and a window in every other layer."""

from __future__ import annotations

from attend_jax.models import llama
from attend_jax.models.decoder import DecoderSizes
from attend_jax.models.family import Family, Plan
from attend_jax.models.options import Options
from attend_shared.rules import rms_norm


def plan(options: Options, architecture: str) -> Plan:
    """Norms are stored as their distance from 1; embeddings are multiplied by the root of their width."""
    fields = llama.common(
        options, architecture, kv_heads=4, head_dim=256, activation="hidden_activation", default="gelu_pytorch_tanh",
        tied=True,
    )  # fmt: skip
    if options.get("hidden_act", fields["activation"]) != fields["activation"]:  # an older name, which is not read
        options.refuse("hidden_act", f"expected that of hidden_activation, got {options.get('hidden_act')!r}")
    options.choice("use_bidirectional_attention", False, (False,))
    options.get("cache_implementation")  # ours has a fixed size
    layers = fields["layers"]
    types = ["full_attention" if n % 2 else "sliding_attention" for n in range(layers)]
    scalar = options.number("query_pre_attn_scalar", 256)
    if scalar <= 0:
        raise options.wrong("query_pre_attn_scalar", "a number > 0", scalar)
    bias = options.flag("attention_bias", False)
    sizes = DecoderSizes(
        **fields, norm="rms from one", bias=(bias,) * 4, windows=llama.windows(options, layers, types),
        softcap=_cap(options, "attn_logit_softcapping", 50.0), scale=scalar**-0.5,
        logit_softcap=_cap(options, "final_logit_softcapping", 30.0), embed_scale=fields["width"] ** 0.5,
        post_norms=True,
    )  # fmt: skip
    there, here = "model.layers.{l}", "layers.{l}"
    shared = [line for line in llama.rules(sizes) if "post_attention_layernorm" not in line]  # it is another one here
    rules = [
        *shared,
        *rms_norm(f"{there}.post_attention_layernorm", f"{here}.post_attention_norm"),
        *rms_norm(f"{there}.pre_feedforward_layernorm", f"{here}.mlp_norm"),
        *rms_norm(f"{there}.post_feedforward_layernorm", f"{here}.post_mlp_norm"),
    ]
    return llama.finish(sizes, rules)


def _cap(options: Options, name: str, default: float) -> float | None:
    """A softcap: one that is null is none."""
    if options.has(name) and options.get(name) is None:
        return None
    cap = options.number(name, default)
    if cap <= 0:
        raise options.wrong(name, "a number > 0, or null", cap)
    return cap


FAMILY = Family("gemma2", "Gemma 2", llama.classes("Gemma2"), plan)

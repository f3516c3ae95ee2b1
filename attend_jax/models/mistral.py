"""Mistral: Llama with a window in every layer."""

from __future__ import annotations

from attend_jax.models import llama
from attend_jax.models.decoder import DecoderSizes
from attend_jax.models.family import Family, Plan
from attend_jax.models.options import Options


def plan(options: Options, architecture: str) -> Plan:
    """sliding_window tokens are seen, the query's own included."""
    fields = llama.common(options, architecture, kv_heads=8)
    options.choice("layer_types", None, (None,))
    layers = fields["layers"]
    return llama.finish(DecoderSizes(**fields, windows=llama.windows(options, layers, ["sliding_attention"] * layers)))


FAMILY = Family("mistral", "Mistral", llama.classes("Mistral"), plan)

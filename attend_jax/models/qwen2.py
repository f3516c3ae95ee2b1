"""Qwen 2: Llama with biases of query, key and value, and windows from some layer on where they are asked for."""

from __future__ import annotations

from attend_jax.models import llama
from attend_jax.models.decoder import DecoderSizes
from attend_jax.models.family import Family, Plan
from attend_jax.models.options import Options


def plan(options: Options, architecture: str) -> Plan:
    """The output projection has no bias."""
    fields = llama.common(options, architecture, kv_heads=32)
    options.get("head_dim")
    seen = windows(options, fields["layers"])
    return llama.finish(DecoderSizes(**fields, bias=(True, True, True, False), windows=seen))


def windows(options: Options, layers: int) -> tuple[int | None, ...]:
    """sliding_window counts only where use_sliding_window is true; without layer_types the first max_window_layers
    layers see everything."""
    used, first = options.flag("use_sliding_window", False), options.size("max_window_layers", 28, least=0)
    types = ["sliding_attention" if used and n >= first else "full_attention" for n in range(layers)]
    seen = llama.windows(options, layers, types)
    return seen if used else (None,) * layers


FAMILY = Family("qwen2", "Qwen 2", llama.classes("Qwen2"), plan)

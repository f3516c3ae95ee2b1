"""Qwen 3: Llama with a norm on each head of queries and keys, and windows as in Qwen 2."""

from __future__ import annotations

from attend_jax.models import llama, qwen2
from attend_jax.models.decoder import DecoderSizes
from attend_jax.models.family import Family, Plan
from attend_jax.models.options import Options


def plan(options: Options, architecture: str) -> Plan:
    """Heads have a size of their own, 128 where the config does not say."""
    fields = llama.common(options, architecture, kv_heads=32, head_dim=128)
    bias = options.flag("attention_bias", False)
    seen = qwen2.windows(options, fields["layers"])
    return llama.finish(DecoderSizes(**fields, bias=(bias,) * 4, qk_norm=True, windows=seen))


FAMILY = Family("qwen3", "Qwen 3", llama.classes("Qwen3"), plan)

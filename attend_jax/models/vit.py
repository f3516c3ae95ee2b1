"""ViT."""

from __future__ import annotations

from attend_jax.models.blocks import ACTIVATIONS
from attend_jax.models.family import Family, Plan, under, unread
from attend_jax.models.options import Options
from attend_jax.models.vision import VisionEncoder, VisionSizes
from attend_shared.rules import attention, conv, layer_norm, linear


def plan(options: Options, architecture: str) -> Plan:
    """Sizes of images and patches are a number of pixels, or a height and a width."""
    width, heads = options.size("hidden_size", 768), options.size("num_attention_heads", 12)
    if width % heads:
        raise options.wrong("num_attention_heads", f"a number that divides the hidden_size of {width}", heads)
    bias = options.flag("qkv_bias", True)
    classifies = architecture == "ViTForImageClassification"
    sizes = VisionSizes(
        width=width,
        inner=options.size("intermediate_size", 3072),
        layers=options.layers("num_hidden_layers", 12),
        heads=heads,
        channels=options.size("num_channels", 3),
        image=(image := _pixels(options, "image_size", 224)),
        patch=_pixels(options, "patch_size", 16, most=image),
        bias=bias,
        activation=options.choice("hidden_act", "gelu", ACTIVATIONS),
        eps=options.eps("layer_norm_eps", 1e-12),
        pooled=options.size("pooler_output_size", width),
        pooled_activation=options.choice("pooler_act", "tanh", ACTIVATIONS),
        labels=options.labels() if classifies else 0,
    )
    options.get("encoder_stride")  # of a decoder that is not here
    there, here = "encoder.layer.{l}", "layers.{l}"
    rules = [
        "embeddings.cls_token <-> class_token",
        "embeddings.position_embeddings <-> positions",
        *conv("embeddings.patch_embeddings.projection", "patches"),
        *attention(
            f"{there}.attention",
            f"{here}.attention",
            names=("attention.query", "attention.key", "attention.value", "output.dense"),
            bias=(bias, bias, bias, True),
        ),
        *layer_norm(f"{there}.layernorm_before", f"{here}.attention_norm"),
        *layer_norm(f"{there}.layernorm_after", f"{here}.mlp_norm"),
        *linear(f"{there}.intermediate.dense", f"{here}.mlp.up"),
        *linear(f"{there}.output.dense", f"{here}.mlp.down"),
        *layer_norm("layernorm", "norm"),
        *(unread("pooler.dense") if classifies else linear("pooler.dense", "pooler")),
    ]
    prefix = "vit." if classifies else ""
    rules = under(prefix, rules) + (linear("classifier", "head") if classifies else [])
    return Plan(lambda dtype, rngs: VisionEncoder(sizes, dtype, rngs), rules, {"h": heads}, prefix)


def _pixels(options: Options, name: str, default: int, most: tuple[int, int] = (2**14, 2**14)) -> tuple[int, int]:
    """A height and a width."""
    value = options.get(name, default)
    both = value if isinstance(value, list) else [value, value]
    if len(both) != 2 or not all(type(x) is int and 1 <= x <= y for x, y in zip(both, most, strict=True)):
        raise options.wrong(name, f"a number of pixels, or two, up to {most}", value)
    return both[0], both[1]


FAMILY = Family("vit", "ViT", ("ViTModel", "ViTForImageClassification"), plan)

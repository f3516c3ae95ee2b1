"""ALBERT: BERT with narrow tables, and weights that layers share."""

from __future__ import annotations

from attend_jax.models.bert import with_head
from attend_jax.models.blocks import ACTIVATIONS
from attend_jax.models.encoder import HEADS, EncoderSizes, check
from attend_jax.models.family import Family, Plan, unread
from attend_jax.models.options import MOST_LAYERS, Options
from attend_shared.rules import attention, embedding, layer_norm, linear


def plan(options: Options, architecture: str) -> Plan:
    """The layers fall into groups, one after the other, whose weights are the same."""
    head = HEADS[architecture.removeprefix("Albert")]
    sizes = EncoderSizes(
        vocabulary=options.size("vocab_size"),
        width=options.size("hidden_size"),
        embed_width=options.size("embedding_size", 128),
        inner=options.size("intermediate_size"),
        layers=options.size("num_hidden_layers", most=MOST_LAYERS),
        groups=options.size("num_hidden_groups", 1),
        heads=options.size("num_attention_heads"),
        positions=options.size("max_position_embeddings", 512),
        types=options.size("type_vocab_size", 2),
        activation=options.choice("hidden_act", "gelu_new", ACTIVATIONS),
        eps=options.eps("layer_norm_eps", 1e-12),
        expand=True,
        head=head,
        labels=options.labels() if head else 0,
    )
    check(options, sizes)
    options.choice("position_embedding_type", "absolute", ("absolute",))
    options.choice("inner_group_num", 1, (1,))
    there, here = "encoder.albert_layer_groups.{l}.albert_layers.0", "layers.{l}"
    rules = [
        *embedding("embeddings.word_embeddings", "tokens"),
        *embedding("embeddings.position_embeddings", "positions"),
        *embedding("embeddings.token_type_embeddings", "types"),
        *layer_norm("embeddings.LayerNorm", "norm"),
        "embeddings.position_ids <-> -",
        *linear("encoder.embedding_hidden_mapping_in", "expand"),
        *attention(f"{there}.attention", f"{here}.attention", names=("query", "key", "value", "dense")),
        *layer_norm(f"{there}.attention.LayerNorm", f"{here}.attention_norm"),
        *linear(f"{there}.ffn", f"{here}.mlp.up"),
        *linear(f"{there}.ffn_output", f"{here}.mlp.down"),
        *layer_norm(f"{there}.full_layer_layer_norm", f"{here}.mlp_norm"),
        *(linear("pooler", "pooler") if sizes.pooled else unread("pooler")),
    ]
    return with_head(sizes, rules, "albert", "predictions", "predictions", "sop_classifier.classifier")


FAMILY = Family("albert", "ALBERT", tuple(f"Albert{end}" for end in HEADS), plan)

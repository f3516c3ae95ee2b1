"""BERT."""

from __future__ import annotations

from attend_jax.models.blocks import ACTIVATIONS
from attend_jax.models.encoder import HEADS, Encoder, EncoderSizes, check
from attend_jax.models.family import Family, Plan, under, unread
from attend_jax.models.options import Options
from attend_shared.rules import attention, embedding, layer_norm, linear


def plan(options: Options, architecture: str) -> Plan:
    """Post-norm layers; learned positions; a pooler, or a head."""
    head = HEADS[architecture.removeprefix("Bert")]
    width = options.size("hidden_size")
    sizes = EncoderSizes(
        vocabulary=options.size("vocab_size"),
        width=width,
        embed_width=width,
        inner=options.size("intermediate_size"),
        layers=(layers := options.layers("num_hidden_layers")),
        groups=layers,
        heads=options.size("num_attention_heads"),
        positions=options.size("max_position_embeddings"),
        types=options.size("type_vocab_size", 2),
        activation=options.choice("hidden_act", "gelu", ACTIVATIONS),
        eps=options.eps("layer_norm_eps", 1e-12),
        head=head,
        labels=options.labels() if head else 0,
    )
    check(options, sizes)
    options.choice("position_embedding_type", "absolute", ("absolute",))
    there, here = "encoder.layer.{l}", "layers.{l}"
    rules = [
        *embedding("embeddings.word_embeddings", "tokens"),
        *embedding("embeddings.position_embeddings", "positions"),
        *embedding("embeddings.token_type_embeddings", "types"),
        *layer_norm("embeddings.LayerNorm", "norm"),
        "embeddings.position_ids <-> -",
        *attention(
            f"{there}.attention",
            f"{here}.attention",
            names=("self.query", "self.key", "self.value", "output.dense"),
        ),
        *layer_norm(f"{there}.attention.output.LayerNorm", f"{here}.attention_norm"),
        *linear(f"{there}.intermediate.dense", f"{here}.mlp.up"),
        *linear(f"{there}.output.dense", f"{here}.mlp.down"),
        *layer_norm(f"{there}.output.LayerNorm", f"{here}.mlp_norm"),
        *(linear("pooler.dense", "pooler") if sizes.pooled else unread("pooler.dense")),
    ]
    return with_head(sizes, rules, "bert", "cls.predictions", "cls.predictions.transform", "cls.seq_relationship")


def with_head(
    sizes: EncoderSizes, rules: list[str], family: str, predictions: str, transform: str, pretrained: str
) -> Plan:
    """The plan of an encoder whose rules are these, alone or below a head.

    Args:
        family: what an encoder below a head is called.
        predictions, transform: of the head for a vocabulary, what has its bias, and what comes before.
        pretrained: a head that is not built, of the class that it was pretrained as.
    """
    head = sizes.head
    prefix = f"{family}." if head else ""
    rules = under(prefix, rules) + {
        "": [],
        "vocabulary": [
            *linear(f"{transform}.dense", "head.dense"),
            *layer_norm(f"{transform}.LayerNorm", "head.norm"),
            f"{predictions}.bias <-> head.bias",
            f"{predictions}.decoder.bias = {predictions}.bias",
            f"{predictions}.decoder.weight = {family}.embeddings.word_embeddings.weight",
            *unread(pretrained),
        ],
        "span": linear("qa_outputs", "head"),
    }.get(head, linear("classifier", "head"))
    return Plan(lambda dtype, rngs: Encoder(sizes, dtype, rngs), rules, {"h": sizes.heads}, prefix)


FAMILY = Family("bert", "BERT", tuple(f"Bert{end}" for end in HEADS), plan)

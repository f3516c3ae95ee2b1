"""config.json, option by option. What a family takes is checked; what it does not know is refused, all at once."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from attend_shared.checkpoints import CheckpointError
from attend_shared.errors import UnsupportedError

ADVICE = "It would compute something else, so nothing is loaded. docs/porting.md says what each family takes."
LARGEST = 2**24
"""The largest size that a config may ask for; the arrays are made only once the file has been found to hold them."""
MOST_LAYERS = 1024
LARGEST_FLOAT = sys.float_info.max

# What changes nothing that a model computes from its inputs: provenance, training, other outputs, other programs.
INERT = frozenset({
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "initializer_range",
    "initializer_factor", "use_cache", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
    "task_specific_params", "tokenizer_class", "prefix", "name_or_path", "output_attentions", "output_hidden_states",
    "output_past", "output_scores", "return_dict", "return_dict_in_generate", "torchscript", "use_bfloat16",
    "gradient_checkpointing", "chunk_size_feed_forward", "tf_legacy_loss", "remove_invalid_values", "pretraining_tp",
    "bos_token_id", "eos_token_id", "eos_token_ids", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id",
    "unk_token_id", "decoder_start_token_id", "max_length", "min_length", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences", "bad_words_ids",
    "forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids", "suppress_tokens", "begin_suppress_tokens",
    "exponential_decay_length_penalty", "is_encoder_decoder", "hidden_dropout_prob", "attention_probs_dropout_prob",
    "classifier_dropout", "classifier_dropout_prob", "attention_dropout", "dropout", "activation_dropout",
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "dropout_rate", "layerdrop", "encoder_layerdrop",
    "decoder_layerdrop", "use_weighted_layer_sum", "classifier_proj_size", "apply_spec_augment", "mask_time_prob",
    "mask_time_length", "mask_time_min_masks", "mask_feature_prob", "mask_feature_length", "mask_feature_min_masks",
    "median_filter_length",
})  # fmt: skip
# What would change it, and the values at which it does not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,), "is_decoder": (False,), "pruned_heads": ({},), "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (None,), "quantization_config": (None,), "sparsity_config": (None,),
    "auto_map": ({},), "down_scale_factor": (1,), "gap_size": (0,), "net_structure_type": (0,),
    "num_memory_blocks": (0,),
}  # fmt: skip


class Options:
    """The options of a config that is being read: each is taken by its name, and `done` refuses what nobody took.

    Args:
        config: what config.json says.
        where: the file, for errors.
        family: for errors.
        most_layers: as many as may have parameters of their own.
    """

    def __init__(
        self, config: Mapping[str, Any], where: str, family: str, most_layers: int = MOST_LAYERS
    ) -> None:  # fmt: skip
        self.config = dict(config)
        self.most_layers = min(most_layers, MOST_LAYERS)
        self.where = where
        self.family = family
        self.taken: set[str] = set()
        self.reasons: list[tuple[str, str]] = []

    def has(self, name: str) -> bool:
        """Whether it is there at all, null included."""
        return name in self.config

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or the default where there is none or it is null."""
        self.taken.add(name)
        value = self.config.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None, *, least: int = 1, most: int = LARGEST) -> int:
        """A whole number from `least` to `most`."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(name, f"a whole number from {least} to {most}", value)
        return value

    def layers(self, name: str, default: int | None = None) -> int:
        """A number of layers with parameters of their own: each is built before the file is compared with it."""
        return self.size(name, default, most=self.most_layers)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.get(name, default)
        # A whole number may be too large for a float to hold.
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST_FLOAT
        if not fits:
            raise self.wrong(name, "a finite number", value)
        return float(value)

    def eps(self, name: str, default: float) -> float:
        """What a norm adds to a variance: a number from 0 to 1."""
        value = self.number(name, default)
        if not 0 <= value <= 1:
            raise self.wrong(name, "a number from 0 to 1", value)
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def labels(self) -> int:
        """How many classes a classifier has: as many as id2label names, or num_labels; 2 where neither is there."""
        names, count = self.get("id2label"), self.get("num_labels")
        if names is not None and not (isinstance(names, dict) and names):
            raise self.wrong("id2label", "an object with a name for each label", names)
        if names is not None and count not in (None, len(names)):
            raise self.wrong("num_labels", f"{len(names)}, as many as id2label has", count)
        return self.size("num_labels", 2 if names is None else len(names))

    def choice(self, name: str, default: Any, allowed: Mapping[str, Any] | tuple[Any, ...]) -> Any:
        """One of those allowed; another is refused."""
        value = self.get(name, default)
        if not any(value == each and type(value) is type(each) for each in allowed):
            self.refuse(name, f"expected {' or '.join(repr(each) for each in allowed)}, got {value!r}")
        return value

    def refuse(self, name: str, reason: str) -> None:
        """Remember a reason; `done` raises with all of them."""
        self.reasons.append((name, reason))

    def done(self) -> None:
        """Refuse what was not taken and is not known to change nothing.

        Raises:
            UnsupportedError: with a reason for every option that cannot be honoured.
        """
        for name, value in self.config.items():
            if name in self.taken or name in INERT or name.startswith("_") or value is None:
                continue
            if name in NEUTRAL:
                if value not in NEUTRAL[name]:
                    self.refuse(name, f"expected {' or '.join(map(repr, NEUTRAL[name]))}, got {_short(value)}")
            else:
                self.refuse(name, f"no option of {self.family} that is known here, got {_short(value)}")
        if self.reasons:
            raise UnsupportedError(tuple(self.reasons), f"{self.where} asks for what is not supported:", ADVICE)

    def wrong(self, name: str, expected: str, value: Any) -> CheckpointError:
        """A value that no model can have."""
        return CheckpointError(f"{self.where}: {name}: expected {expected}, got {_short(value)}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

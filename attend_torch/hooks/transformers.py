"""Models of Hugging Face transformers on `attend`: register once, then load with attn_implementation="attend".

    attend_torch.hooks.transformers.register()
    model = AutoModel.from_pretrained(path, attn_implementation="attend")

transformers asks two functions by that name: one that makes a mask, once a forward pass, and one that attends, in every
layer. With the second alone there is no mask at all, and padding is dropped without a word: `register` registers both.
transformers is imported when something here is called, not before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import nn

from attend_shared.call import describe
from attend_shared.errors import UnsupportedError
from attend_torch.attend import attend
from attend_torch.module import Attend

OLDEST = "5.17"  # the oldest transformers whose mask functions are called as `_mask` is
# Parts of a name that transformers reads as its own: it looks for a package, a kernel or a model's permission.
RESERVED = ("eager", "flash", "flex_attention", "sdpa", "paged|", "/")
HEADLINE = "attend cannot stand in for the attention of this model with:"

# What a model may hand its attention function that changes the answer and has no argument of `attend`.
REFUSED = {
    "block_indices": ("it selects blocks of keys by rules of the model's own (MiniMax M3)",
                      'Load this model with attn_implementation="eager".'),
    "sinks": ("it is a sink for every query (Inkling 2), where attend has one for every head (s_aux)",
              'Load this model with attn_implementation="eager".'),
    "cache": ("continuous batching pages its cache, and its masks are made for transformers' own functions",
              "Use generate, which keeps an ordinary cache."),
}  # fmt: skip
NO_WEIGHTS = "a fused attention has no weights to return"
LOOK = 'Load with attn_implementation="eager" to get them, or take record(model) and attend_shared.oracle (its p).'
OWN = "it computes its own attention, never asks the registered function, and would add a boolean mask to its scores"
KEEP = (
    'Load it with "eager"; where it is one part of a model, attn_implementation={"": "attend", "its_config": "eager"}.'
)

# Options of a config with which None would be misread. With the first, PaliGemma's text layers call themselves not
# causal, and get causal masks all the same. With the second, Gemma 4 drops queries between layers, unseen by None.
NEEDS_MASK = ("use_bidirectional_attention", "num_kv_shared_layers")

_RECORDER = "_attend_recorder"


class Recorded(NamedTuple):
    """What one layer handed to `attend`.

    Attributes:
        name: the attention module, as in `model.named_modules()`.
        arguments: keywords of `attend`: q (b, h, i, d), k (b, hk, j, d), v (b, hk, j, dv), and those of mask, bias,
            is_causal, q_offset, sinks, softcap, scale, dropout, dropout_seed that the layer has. Tensors are detached
            copies.
    """

    name: str
    arguments: dict[str, Any]


def register(name: str = "attend", implementation: str | Sequence[str] | None = None) -> str:
    """Make `attend` known to transformers: its attention function and its mask function, under one name.

    Every model that takes its attention from transformers' AttentionInterface can then be loaded with
    attn_implementation=name, or switched with model.set_attn_implementation(name). What arrives from it, and becomes
    what:
      - attention_mask bool: mask. Floating (a relative bias, a caller's additive mask): bias, where finfo.min and below
        mean -inf. None: no mask, or causal where the model says so and there are as many queries as keys.
      - position_bias: bias. s_aux: sinks. softcap: softcap. scaling: scale. indices: a mask of the selected keys.
      - dropout: dropped in training only, with a seed from torch's default generator.
    sliding_window and chunks are in the mask already. Rows that may attend to nothing, which left padding makes, are 0;
    eager gives them the mean of all values. They are rows of padding, and no other row sees them.

    Calling it again replaces what it registered under that name.

    Args:
        name: what attn_implementation= is to be.
        implementation: as in `attend`.

    Returns:
        name.

    Raises:
        ImportError: transformers is missing or too old.
        TypeError, ValueError: a name that transformers takes for its own or that someone else registered; an unknown
            implementation.
    The model then raises, when it is run:
        UnsupportedError: output_attentions=True; a model that computes its own attention and would misread the mask
            (BLOOM, MPT, ...); arguments that change the answer and that `attend` does not have.
        ValueError: no mask, causal, and more than one query against another number of keys: no one says where they sit.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
        >>> model = LlamaModel._from_config(LlamaConfig(**sizes), attn_implementation=register()).eval()
        >>> tokens, padding = torch.tensor([[1, 2, 3], [0, 4, 5]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
        >>> model(tokens, attention_mask=padding).last_hidden_state.shape
        torch.Size([2, 3, 16])

    References:
        https://huggingface.co/docs/transformers/attention_interface
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {describe(name)}. It is what attn_implementation= is to be.")
    implementation = Attend(implementation=implementation).implementation  # checked, lists made tuples
    if not name or any(part in name for part in RESERVED):
        parts = ", ".join(f'"{part}"' for part in RESERVED)
        expected = f"one without {parts}, which transformers reads as its own"
        raise ValueError(f'name: expected {expected}, got {describe(name)}. Try "attend".')
    transformers = _transformers()
    from transformers.masking_utils import bidirectional_mask_function, eager_mask, sdpa_mask

    taken = transformers.AttentionInterface().get(name)
    if taken is not None and not _is_ours(taken):
        raise ValueError(f"name: expected one that no one else registered, got {describe(name)}. Try another.")
    transformers.AttentionInterface.register(name, partial(_attention, implementation))
    masks = sdpa_mask, eager_mask, bidirectional_mask_function
    transformers.AttentionMaskInterface.register(name, partial(_mask, *masks))
    return name


@contextmanager
def record(model: nn.Module) -> Iterator[list[Recorded]]:
    """Collect what every layer hands to `attend` while the model runs, for other implementations or the oracle.

    Args:
        model: loaded with attn_implementation= a name that `register` was given.

    Yields:
        a list that grows by one `Recorded` for every call of an attention module, in the order of the calls. It holds
        copies of all q, k and v: record one forward pass, not a training run.

    Raises:
        ValueError: no part of the model is on `attend`.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)
        >>> model = BertModel._from_config(BertConfig(**sizes), attn_implementation=register()).eval()
        >>> with record(model) as layers:
        ...     out = model(torch.tensor([[1, 2, 3]]), attention_mask=torch.tensor([[1, 1, 0]]))
        >>> [(layer.name, *layer.arguments) for layer in layers]
        [('encoder.layer.0.attention.self', 'q', 'k', 'v', 'mask', 'scale'),
         ('encoder.layer.1.attention.self', 'q', 'k', 'v', 'mask', 'scale')]
        >>> attend(**layers[0].arguments).shape
        torch.Size([1, 2, 3, 8])
    """
    interface = _transformers().AttentionInterface()
    found = {getattr(getattr(module, "config", None), "_attn_implementation", None) for module in model.modules()}
    names = sorted(name for name in found if isinstance(name, str))
    if not any(_is_ours(interface.get(name)) for name in names):
        got = ", ".join(f'"{name}"' for name in names) or "none"
        raise ValueError(
            f"model: expected one with an attn_implementation that register was given, got {got}. "
            "Call register first, then load the model or switch it with model.set_attn_implementation."
        )
    layers: list[Recorded] = []

    def recorder(name: str, arguments: dict[str, Any]) -> None:
        copies = {key: x.detach().clone() if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
        layers.append(Recorded(name, copies))

    for name, module in model.named_modules():
        module.__dict__[_RECORDER] = partial(recorder, name)
    try:
        yield layers
    finally:
        for module in model.modules():
            module.__dict__.pop(_RECORDER, None)


def _transformers() -> Any:
    advice = 'Install it: pip install "attend-twin[models]".'
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(f"transformers: expected {OLDEST} or later, and it is not installed. {advice}") from error
    if Version(transformers.__version__) < Version(OLDEST):
        raise ImportError(f"transformers: expected {OLDEST} or later, got {transformers.__version__}. {advice}")
    return transformers


def _is_ours(function: Any) -> bool:
    return isinstance(function, partial) and function.func is _attention


def _attention(
    implementation: str | tuple[str, ...] | None,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What AttentionInterface calls: out (b, i, h, dv), and no weights."""
    arguments = _arguments(module, query, key, value, attention_mask, **options)
    recorder = module.__dict__.get(_RECORDER)
    if recorder is not None:
        recorder(arguments)
    out = attend(**arguments, implementation=implementation)
    return out.transpose(1, 2).contiguous(), None  # models may view it as (b, i, h * dv)


def _arguments(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> dict[str, Any]:
    """What a model passes, in the words of `attend`: only what is there."""
    if _wants_weights(module, output_attentions):
        raise UnsupportedError((("output_attentions", NO_WEIGHTS),), HEADLINE, LOOK)
    for name, (reason, advice) in REFUSED.items():
        if others.get(name) is not None:
            raise UnsupportedError(((name, reason),), HEADLINE, advice)

    b = max(len(query), len(key))  # learned queries may come once for the whole batch
    q, k, v = (x if len(x) == b else x.expand(b, -1, -1, -1) for x in (query, key, value))
    i, j = q.shape[2], k.shape[2]
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v}
    mask, bias = _mask_and_bias(attention_mask, position_bias, j)
    if indices is not None:  # (b, i, n): sparse attention names the keys of every query
        nothing = torch.zeros((b, 1, i, j), dtype=torch.bool, device=q.device)
        selected = nothing.scatter(-1, indices[:, None].long(), True)
        mask = selected if mask is None else mask & selected
    if mask is not None:
        arguments["mask"] = mask
    if bias is not None:
        arguments["bias"] = bias
    is_causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if attention_mask is None and is_causal and i > 1:
        if i != j:
            raise ValueError(
                f"attention_mask: expected a mask, since {i} queries fit {j} keys in two ways where causal, got None. "
                "Pass a boolean mask (b, 1, i, j) where the model does not make one."
            )
        arguments |= {"is_causal": True, "q_offset": 0}
    for name, option in (("sinks", s_aux), ("softcap", softcap), ("scale", scaling)):
        if option is not None:
            arguments[name] = option
    if dropout and module.training:
        seed = torch.randint(-(2**63), 2**63 - 1, (), device=q.device)
        arguments |= {"dropout": dropout, "dropout_seed": seed}
    return arguments


def _wants_weights(module: nn.Module, output_attentions: bool | None) -> bool:
    """Whether output_attentions=True was asked of this forward pass, by keyword or in the config.

    Not every model hands the keyword on. Those that do not collect the weights from outside, and would give an empty
    tuple: the collector knows. It is not part of transformers' interface, so it is not relied upon to be there.
    """
    if output_attentions is None:
        output_attentions = getattr(getattr(module, "config", None), "output_attentions", False)
    if output_attentions or torch.compiler.is_compiling():
        return bool(output_attentions)
    from transformers.utils import output_capturing

    collector = getattr(output_capturing, "_active_collector", None)
    collected = collector.get() if collector is not None else None
    return collected is not None and any(name.endswith("attentions") for name in collected)


def _mask_and_bias(
    attention_mask: torch.Tensor | None, position_bias: torch.Tensor | None, j: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """mask and bias of `attend` from what transformers calls attention_mask and position_bias."""
    mask = bias = None
    if attention_mask is not None:
        attention_mask = attention_mask[..., :j]  # a caller's own may be as long as a static cache
        if not attention_mask.is_floating_point():
            # Expanded over the queries it is a key mask, as `_mask` makes it for padding.
            expanded = attention_mask.ndim == 4 and attention_mask.stride(2) == 0
            mask = attention_mask[:, :, :1] if expanded else attention_mask
        else:
            # finfo.min stands for "not allowed"; as a number it would make ordinary rows of those that allow nothing,
            # and swallow their logits. bfloat16's is the least far out of those that are cast to each other.
            least = torch.finfo(torch.float16 if attention_mask.dtype == torch.float16 else torch.bfloat16).min
            bias = attention_mask.masked_fill(attention_mask <= least, -torch.inf)
    if position_bias is not None:
        bias = position_bias[..., :j] if bias is None else bias + position_bias[..., :j]
    return mask, bias


def _mask(
    sdpa_mask: Any,
    eager_mask: Any,
    bidirectional: Any,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    config: Any = None,
    **options: Any,
) -> torch.Tensor | None:
    """What AttentionMaskInterface calls: bool (b, 1, i, j), or None where nothing is ruled out but by a plain causal.

    transformers' own mask for torch's attention leaves it out in more cases than can be told apart again: with a static
    cache None is causal from the top left, i < j. Here None is causal only where i == j.
    Families that transformers runs on no fused attention get its eager mask, of 0 and finfo.min, and never None: a
    layer that computes its own attention adds it, where True and False would count as 1 and 0, and None needs every
    layer to say rightly whether it is causal.
    """
    options |= {"batch_size": batch_size, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset,
                "mask_function": mask_function}  # fmt: skip
    if config is not None and not _takes_boolean(type(config)):
        return eager_mask(q_length=q_length, use_vmap=use_vmap, **options | {"allow_is_bidirectional_skip": False})
    if mask_function is bidirectional and not use_vmap:
        # Padding alone: one row for all queries, so that the whole stays a key mask of (b, j).
        row = sdpa_mask(q_length=1, allow_is_causal_skip=False, **options)
        return None if row is None else row.expand(-1, -1, q_length, -1)
    # A tensor for an offset comes from a static cache, whose later keys are not there yet.
    at_end = isinstance(q_offset, int) and kv_offset == 0 and q_offset == kv_length - q_length
    plain = at_end and q_length in (1, kv_length) and not any(getattr(config, option, None) for option in NEEDS_MASK)
    skip = allow_is_causal_skip and plain
    return sdpa_mask(q_length=q_length, allow_is_causal_skip=skip, use_vmap=use_vmap, **options)


@torch.compiler.assume_constant_result
def _takes_boolean(config: type) -> bool:
    """Whether transformers runs the models of this config on fused attention.

    Refused are those that ask for a mask and use it themselves alone. transformers has a flag for models that take
    other attention functions, but lets the rest pass too, and not all that use the interface have it.
    """
    from transformers import PreTrainedModel

    models = [model for model in _subclasses(PreTrainedModel) if getattr(model, "config_class", None) is config]
    if models and not any(model._supports_attention_backend or not _has_own_attention(model) for model in models):
        name = getattr(config, "model_type", config.__name__)
        raise UnsupportedError(((name, OWN),), HEADLINE, KEEP)
    return bool(models) and all(
        model._supports_sdpa or (model._supports_flash_attn and model._supports_attention_backend) for model in models
    )


def _subclasses(cls: Any) -> Iterator[Any]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _has_own_attention(model: type) -> bool:
    """Whether the file of a model defines attention layers and does not know the interface."""
    names = vars(sys.modules[model.__module__])
    own = (value for name, value in names.items() if "Attention" in name and isinstance(value, type))
    return "ALL_ATTENTION_FUNCTIONS" not in names and any(value.__module__ == model.__module__ for value in own)

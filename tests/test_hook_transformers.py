"""Models of transformers on `attend`: the same outputs and gradients as eager, in every way that a mask arrives."""

import copy
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn
from transformers import masking_utils as masks

from attend_shared import oracle
from attend_shared.compare import check
from attend_shared.problems import Problem
from attend_torch import UnsupportedError, attend, bridge
from attend_torch.hooks import transformers as hook

# float32 rounding of two layers. Errors are relative to the largest output, and to the largest gradient of any
# parameter, since some gradients are 0 but for rounding (a bias of the keys shifts every logit of a row alike).
# Measured: at most 1.1e-6 for outputs and 1.3e-6 for gradients; other machines round otherwise, so four times that. A
# mask that is lost or shifted shows as 1e-2 to 1.
TOLERANCE = 5e-6

B, N, PAD = 2, 9, 3
LEFT = torch.ones(B, N, dtype=torch.long)
LEFT[0, :PAD] = 0
RIGHT = LEFT.flip(1)
TOKENS = torch.randint(3, 60, (B, N), generator=torch.Generator().manual_seed(1))
MORE = torch.randint(3, 60, (B, 6), generator=torch.Generator().manual_seed(2))
SOUND = torch.randn(B, 16, 24, generator=torch.Generator().manual_seed(3))
PICTURE = torch.randn(B, 3, 16, 16, generator=torch.Generator().manual_seed(4))
STATES = torch.randn(B, 5, 32, generator=torch.Generator().manual_seed(5))
TOKEN_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, **TOKEN_IDS,
}  # fmt: skip
PLAIN: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER = {"vocab_size": 64, **PLAIN}
VISION = {**PLAIN, "image_size": 16, "patch_size": 4}
LATENT: dict[str, Any] = {  # a query head of 12, a value head of 6
    **DECODER, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 6, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER))


def mistral() -> nn.Module:
    return hf.MistralForCausalLM(hf.MistralConfig(**DECODER, sliding_window=4))


def gemma2() -> nn.Module:
    options = {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**DECODER, **options))


def gpt_oss() -> nn.Module:
    options = {"head_dim": 8, "sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    return hf.GptOssForCausalLM(hf.GptOssConfig(**DECODER, **options))


def llama4() -> nn.Module:
    options = {"head_dim": 8, "attention_chunk_size": 4, "num_local_experts": 2, "intermediate_size_mlp": 40}
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(**DECODER, **options))


def deepseek_v3() -> nn.Module:
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**LATENT))


def deepseek_v32() -> nn.Module:
    options = {"index_topk": 3, "index_head_dim": 8, "index_n_heads": 2}
    return hf.DeepseekV32ForCausalLM(hf.DeepseekV32Config(**LATENT, **options))


def bert() -> nn.Module:
    return hf.BertModel(hf.BertConfig(**ENCODER))


def gpt2(cross: bool = False) -> nn.Module:
    sizes = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, add_cross_attention=cross, **TOKEN_IDS))


def t5() -> nn.Module:
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    config = hf.T5Config(**sizes, relative_attention_num_buckets=8, decoder_start_token_id=0)
    return hf.T5ForConditionalGeneration(config)


def whisper() -> nn.Module:
    options = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    options |= {"encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_source_positions": 12, "max_target_positions": 16}
    options |= {"vocab_size": 64, "d_model": 32, "num_mel_bins": 16, "decoder_start_token_id": 1}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**TOKEN_IDS, **options))


def clip_text() -> nn.Module:
    return hf.CLIPTextModel(hf.CLIPTextConfig(**ENCODER, max_position_embeddings=16))


def vit() -> nn.Module:
    return hf.ViTModel(hf.ViTConfig(**VISION))


def swin() -> nn.Module:
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 4]}
    return hf.SwinModel(hf.SwinConfig(**sizes, window_size=4))


def bigbird_pegasus() -> nn.Module:  # its causal layers say that they are not
    sizes = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 40, "d_model": 32, "vocab_size": 64}
    config = hf.BigBirdPegasusConfig(**sizes, max_position_embeddings=64, is_decoder=True, **TOKEN_IDS)
    return hf.BigBirdPegasusForCausalLM(config)


def pegasus_x() -> nn.Module:  # its encoder computes its own attention and adds the mask
    sizes = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 40, "block_size": 4}
    sizes |= {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 40, "num_global_tokens": 2}
    config = hf.PegasusXConfig(**sizes, vocab_size=64, d_model=32, max_position_embeddings=64, **TOKEN_IDS)
    return hf.PegasusXForConditionalGeneration(config)


def splinter() -> nn.Module:  # its layers do not say that they are not causal
    return hf.SplinterModel(hf.SplinterConfig(**ENCODER))


def paligemma() -> nn.Module:  # its text layers say that they are not causal; without token_type_ids they are
    text = {"model_type": "gemma", **DECODER, "head_dim": 8}
    config = hf.PaliGemmaConfig(text_config=text, vision_config=VISION, projection_dim=32, image_token_id=63)
    return hf.PaliGemmaForConditionalGeneration(config)


def gemma4() -> nn.Module:  # its last layers get fewer queries than the first, logits_to_keep of them
    options = {"head_dim": 8, "global_head_dim": 8, "sliding_window": 32, "num_kv_shared_layers": 2}
    options |= {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "num_hidden_layers": 4}
    layers = ["sliding_attention", "full_attention"] * 2
    return hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**DECODER | options, layer_types=layers))


def git() -> nn.Module:  # its pictures go through the interface, its text does not
    return hf.GitModel(hf.GitConfig(**ENCODER, vision_config=VISION))


class Case(NamedTuple):
    """A model, what it is given, which rows of its output mean something, and what must arrive at `attend`."""

    model: Callable[[], nn.Module]
    inputs: dict[str, Any]
    keep: torch.Tensor | None
    arrives: set[str]


TEXT = {"input_ids": TOKENS}
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(B, -1)
CAUSAL = torch.ones(N, N).tril().bool() & LEFT.bool()[:, None, None, :]
ADDITIVE = torch.where(CAUSAL, 0.0, torch.finfo(torch.float32).min)
CASES = {
    "bert": Case(bert, TEXT, None, set()),
    "bert padded on the right": Case(bert, {**TEXT, "attention_mask": RIGHT}, RIGHT, {"mask"}),
    "bert padded on the left": Case(bert, {**TEXT, "attention_mask": LEFT}, LEFT, {"mask"}),
    "llama": Case(llama, TEXT, None, {"is_causal", "q_offset"}),
    "llama padded on the left": Case(llama, {**TEXT, "attention_mask": LEFT}, LEFT, {"mask"}),
    "llama padded on the right": Case(llama, {**TEXT, "attention_mask": RIGHT}, RIGHT, {"mask"}),
    "llama packed": Case(llama, {**TEXT, "position_ids": PACKED, "use_cache": False}, None, {"mask"}),
    "llama, an additive mask": Case(llama, {**TEXT, "attention_mask": ADDITIVE}, LEFT, {"bias"}),
    "mistral, window": Case(mistral, {**TEXT, "attention_mask": LEFT}, LEFT, {"mask"}),
    "gemma 2, softcap and window": Case(gemma2, {**TEXT, "attention_mask": LEFT}, LEFT, {"mask", "softcap"}),
    "gpt-oss, sinks and window": Case(gpt_oss, {**TEXT, "attention_mask": LEFT}, LEFT, {"mask", "sinks"}),
    "llama 4, chunks": Case(llama4, {**TEXT, "attention_mask": LEFT}, LEFT, {"mask"}),
    "deepseek v3, dv != d": Case(deepseek_v3, {**TEXT, "attention_mask": LEFT}, LEFT, {"mask"}),
    "deepseek v3.2, selected keys": Case(deepseek_v32, {**TEXT, "attention_mask": RIGHT}, RIGHT, {"mask"}),
    "gpt2": Case(gpt2, TEXT, None, {"is_causal", "q_offset"}),
    "gpt2, cross-attention": Case(
        lambda: gpt2(cross=True),
        {**TEXT, "attention_mask": LEFT, "encoder_hidden_states": STATES, "encoder_attention_mask": RIGHT[:, -5:]},
        LEFT, {"mask"},
    ),
    "t5, relative bias": Case(t5, {**TEXT, "decoder_input_ids": MORE}, None, {"bias", "is_causal", "q_offset"}),
    "t5, relative bias, padded": Case(
        t5, {**TEXT, "attention_mask": RIGHT, "decoder_input_ids": MORE, "decoder_attention_mask": LEFT[:, :6]},
        LEFT[:, :6], {"bias", "mask"},
    ),
    "whisper": Case(whisper, {"input_features": SOUND, "decoder_input_ids": MORE}, None, {"is_causal", "q_offset"}),
    "clip text": Case(clip_text, TEXT, None, {"is_causal", "q_offset"}),
    "clip text padded": Case(clip_text, {**TEXT, "attention_mask": RIGHT}, RIGHT, {"mask"}),
    "vit": Case(vit, {"pixel_values": PICTURE}, None, set()),
    "swin, relative bias and shifted windows": Case(swin, {"pixel_values": PICTURE}, None, {"bias"}),
    "bigbird-pegasus, is_causal said wrong": Case(bigbird_pegasus, TEXT, None, {"bias"}),
    "pegasus-x, half its own attention": Case(
        pegasus_x, {**TEXT, "attention_mask": RIGHT, "decoder_input_ids": MORE}, None, {"bias"}
    ),
    "splinter, is_causal not said": Case(splinter, TEXT, None, {"bias"}),
    "paligemma, is_causal said wrong": Case(paligemma, TEXT, None, {"mask"}),
    "gemma 4, queries dropped between layers": Case(gemma4, {**TEXT, "logits_to_keep": 3}, None, {"mask"}),
    "git, half its own attention": Case(git, {**TEXT, "pixel_values": PICTURE}, None, set()),
}  # fmt: skip
CACHED = {
    "llama": llama,
    "mistral": mistral,
    "gemma2": gemma2,
    "gpt_oss": gpt_oss,
    "deepseek_v3": deepseek_v3,
    "gpt2": gpt2,
}


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """`attend` is registered as a user does it, and unknown again afterwards."""
    hook.register()
    yield
    for interface in (hf.AttentionInterface, hf.AttentionMaskInterface):
        for name in [name for name in interface._global_mapping if name.startswith("attend")]:
            del interface._global_mapping[name]


def drawn(make: Callable[[], nn.Module]) -> nn.Module:
    """A model whose attention is far from uniform: at the usual initial weights a wrong mask hardly shows."""
    torch.manual_seed(0)
    model = make().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith(("bias", "sinks")):
            nn.init.normal_(parameter, std=0.25)
    return model


def on(model: nn.Module, name: str) -> nn.Module:
    model.set_attn_implementation(name)
    return model


def output(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    result = model(**inputs)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def evaluate(model: nn.Module, case: Case) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The rows of the output that mean something, and the gradients of all parameters for a random cotangent of them.

    Rows of padding are left out: they may attend to nothing, and get 0 where eager gives them the mean of all values.
    No other row sees them, since their keys are masked.
    """
    out = output(model, case.inputs)
    if case.keep is not None:
        out = out[case.keep.bool()]
    model.zero_grad(set_to_none=True)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(6)))
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close(got: torch.Tensor, expected: torch.Tensor, scale: float | None = None) -> None:
    scale = expected.abs().max().item() if scale is None else scale
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE * scale)


def far(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two results differ by what no rounding makes."""
    return (got - expected).abs().max().item() > 1e-2 * expected.abs().max().item()


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_eager(name: str) -> None:
    case = CASES[name]
    model = drawn(case.model)
    expected, expected_gradients = evaluate(on(model, "eager"), case)
    with hook.record(on(model, "attend")) as layers:
        got, gradients = evaluate(model, case)
    assert layers, "nothing went through attend"
    assert case.arrives == {key for layer in layers for key in layer.arguments} - {"q", "k", "v", "scale"}
    close(got, expected)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in expected_gradients.values())
    for parameter, gradient in gradients.items():
        close(gradient, expected_gradients[parameter], largest)


def in_chunks(model: nn.Module, cache: hf.Cache) -> torch.Tensor:
    """Logits of the left-padded prompt taken in chunks of 4, 3 and 1 tokens and 1 more, each against the cache."""
    logits = []
    with torch.no_grad():
        for first, last in itertools.pairwise((0, 4, 7, 8, 9)):
            inputs = {"input_ids": TOKENS[:, first:last], "attention_mask": LEFT[:, :last], "past_key_values": cache}
            logits.append(output(model, inputs))
    return torch.cat(logits, 1)[LEFT.bool()]


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_chunked_prefill_and_decoding_are_those_of_eager(name: str, kind: str) -> None:
    model = drawn(CACHED[name])

    def cache() -> hf.Cache:
        if kind == "dynamic":
            return hf.DynamicCache(config=model.config)
        return hf.StaticCache(config=model.config, max_cache_len=12)

    expected = in_chunks(on(model, "eager"), cache())
    got = in_chunks(on(model, "attend"), cache())
    close(got, expected)
    with torch.no_grad():  # positions of padding are not shifted here, as in the chunks
        whole = output(model, {**TEXT, "attention_mask": LEFT, "position_ids": torch.arange(N)[None]})
    close(got, whole[LEFT.bool()])


@pytest.mark.parametrize("name", [*CACHED, "t5", "whisper"])
def test_generation_is_that_of_eager(name: str) -> None:
    model = drawn({**CACHED, "t5": t5, "whisper": whisper}[name])
    inputs = {**TEXT, "attention_mask": RIGHT if name == "t5" else LEFT}
    if name == "whisper":
        inputs = {"input_features": SOUND}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}

    def generate(implementation: str) -> Any:
        return model.generate(**inputs, **options) if on(model, implementation) else None

    expected, got = generate("eager"), generate("attend")
    assert got.sequences.tolist() == expected.sequences.tolist()
    close(torch.stack(got.logits), torch.stack(expected.logits))


def test_bfloat16_models_stay_within_the_rounding_of_eager() -> None:
    model = drawn(llama)
    inputs = {**TEXT, "attention_mask": LEFT}
    exact = output(on(model, "eager"), inputs)[LEFT.bool()]
    model = model.bfloat16()
    eager, got = (output(on(model, name), inputs)[LEFT.bool()].float() for name in ("eager", "attend"))
    # Most of the error is of the layers around: attend may not add to it. A quarter is room for other roundings.
    assert (got - exact).abs().mean() <= 1.25 * (eager - exact).abs().mean()


def test_without_a_mask_function_padding_is_dropped_and_register_registers_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hf.AttentionInterface._global_mapping, "bare", hf.AttentionInterface()["attend"])
    for make, padding in ((bert, RIGHT), (llama, LEFT)):
        model = drawn(make)
        inputs = {**TEXT, "attention_mask": padding}
        expected, bare, got = (output(on(model, name), inputs)[padding.bool()] for name in ("eager", "bare", "attend"))
        assert far(bare, expected), "the trap is gone: attention functions without a mask function get a mask now"
        close(got, expected)


# Mask patterns with the keywords that transformers passes along with them.
FULL = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}
PATTERNS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "causal": (masks.causal_mask_function, {}),
    "bidirectional": (masks.bidirectional_mask_function, FULL),
    "window": (masks.sliding_window_causal_mask_function(5), {"local_size": 5}),
    "chunks": (masks.chunked_causal_mask_function(5, torch.zeros(B, dtype=torch.long)), {"local_size": 5}),
}


def plain(pattern: str, i: int, j: int) -> torch.Tensor:
    """What the attention function takes None for."""
    everything = torch.ones(i, j, dtype=torch.bool)
    return everything if i == 1 or pattern == "bidirectional" else everything.tril()


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_mask_that_is_left_out_can_be_told_from_every_other(pattern: str, static: bool) -> None:
    """Lengths and offsets of every kind of cache: a mask is the dense one, and None is what it is taken for."""
    function, options = PATTERNS[pattern]
    left_out = ambiguous = 0
    paddings = (None, "none", "left", "future")
    for i, seen, ahead, start, side in itertools.product((1, 2, 4), (0, 2, 5), (0, 2), (0, 2), paddings):
        if start > seen:
            continue
        j = seen + i + ahead - start  # a static cache has room ahead of the queries, a window forgets the start
        padding = None if side is None else torch.ones(B, start + j, dtype=torch.bool)
        if padding is not None:
            padding[0, :1] &= side != "left"
            padding[:, seen + i :] &= side != "future"
        call = {"batch_size": B, "q_length": i, "kv_length": j, "kv_offset": start, "attention_mask": padding}
        call |= {"q_offset": torch.tensor(seen) if static else seen, "mask_function": function}
        got = hf.AttentionMaskInterface()["attend"](**call, **options)
        dense = masks.sdpa_mask(**call, allow_is_causal_skip=False)
        left_out += got is None
        assert got is not None or pattern == "bidirectional" or i in (1, j)
        assert torch.equal(dense, plain(pattern, i, j).expand_as(dense) if got is None else got)
        ambiguous += 1 < i < j and pattern != "bidirectional" and masks.sdpa_mask(**call, **options) is None
    assert (left_out > 0) == (pattern == "bidirectional" or not static)
    assert ambiguous or pattern == "bidirectional", "transformers no longer leaves out masks with 1 < i < j"


def test_mask_functions_of_scalars_are_mapped_as_transformers_maps_them() -> None:
    """A model's own addition to a mask need not broadcast: it is written for one query and one key."""
    prefix = {"or_mask_function": lambda item, head, query, key: torch.stack([query, key]).amax() < 4}
    config = drawn(llama).config
    for padding in (None, LEFT):
        inputs = {"inputs_embeds": torch.empty(B, N, 32), "attention_mask": padding, "past_key_values": None}
        config._attn_implementation = "sdpa"
        expected = masks.create_causal_mask(config, **inputs, **prefix)
        config._attn_implementation = "attend"
        got = masks.create_causal_mask(config, **inputs, **prefix)
        assert got[1, 0, 0, 3]
        assert torch.equal(got, expected)


def test_padding_alone_stays_a_key_mask() -> None:
    model = on(drawn(bert), "attend")
    with hook.record(model) as layers:
        output(model, {**TEXT, "attention_mask": RIGHT})
    assert {layer.arguments["mask"].shape for layer in layers} == {(B, 1, 1, N)}


class Layer(nn.Module):
    """What an attention module of a model shows to the function that it calls."""

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.config = hf.PreTrainedConfig()


def call(layer: nn.Module, *arguments: Any, **options: Any) -> torch.Tensor:
    return hf.AttentionInterface()["attend"](layer, *arguments, **options)[0].transpose(1, 2)


def test_no_mask_is_what_the_keyword_or_else_the_module_says() -> None:
    q, k, v = torch.randn(3, B, 4, 5, 8, generator=torch.Generator().manual_seed(7))
    full, causal = attend(q, k, v), attend(q, k, v, is_causal=True)
    for said, keyword in itertools.product((True, False), (True, False, None)):
        expected = causal if (said if keyword is None else keyword) else full
        torch.testing.assert_close(call(Layer(said), q, k, v, None, is_causal=keyword), expected)
    silent = Layer(True)
    del silent.is_causal
    torch.testing.assert_close(call(silent, q, k, v, None), full)
    # One query of cached decoding sees every key, causal or not.
    torch.testing.assert_close(call(Layer(True), q[:, :, :1], k, v, None), attend(q[:, :, :1], k, v))
    with pytest.raises(ValueError, match="attention_mask: expected a mask, since 3 queries fit 5 keys in two ways"):
        call(Layer(True), q[:, :, :3], k, v, None)


def test_additive_masks() -> None:
    """finfo.min is "not allowed", in every dtype and in rows full of it; above it is a bias; long masks are cut."""
    q, k, v = torch.randn(3, B, 4, 5, 8, generator=torch.Generator().manual_seed(8))
    v.requires_grad_()
    may = torch.ones(B, 1, 5, 5).tril().bool()
    may[0, :, 2] = False  # a row that may attend to nothing
    relative = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(9))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        mask = torch.where(may, relative.to(dtype), torch.finfo(dtype).min)
        out = call(Layer(False), q, k, v, nn.functional.pad(mask, (0, 4)))
        expected = attend(q, k, v, may, bias=relative.to(dtype))
        torch.testing.assert_close(out, expected)
        assert not out[0, :, 2].any()
        for got, wanted in zip(*(torch.autograd.grad(x.square().sum(), v) for x in (out, expected)), strict=True):
            torch.testing.assert_close(got, wanted)
        mask = torch.where(may, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)
        both = call(Layer(False), q, k, v, mask, position_bias=relative)
        torch.testing.assert_close(both, attend(q, k, v, may, bias=relative))
    cast = torch.where(may, 0.0, torch.finfo(torch.bfloat16).min)  # made in bfloat16, and float32 since
    torch.testing.assert_close(call(Layer(False), q, k, v, cast), attend(q, k, v, may))
    with pytest.raises(TypeError, match="mask: expected bool"):
        call(Layer(False), q, k, v, may.long())


def test_one_set_of_learned_queries_serves_the_batch() -> None:
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(B, 2, 5, 8), torch.randn(B, 2, 5, 8)
    torch.testing.assert_close(call(Layer(False), q, k, v, None), attend(q.expand(B, -1, -1, -1), k, v))


def test_dropout_comes_from_torchs_generator_and_in_training_only() -> None:
    def make() -> nn.Module:
        return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, attention_dropout=0.4))

    model = on(drawn(make), "attend").train()

    def run(seed: int) -> tuple[torch.Tensor, list[hook.Recorded]]:
        torch.manual_seed(seed)
        with hook.record(model) as layers:
            return output(model, TEXT), layers

    (first, layers), (again, _), (other, _) = run(3), run(3), run(4)
    assert torch.equal(first, again)
    assert far(other, first)
    seeds = [layer.arguments["dropout_seed"].item() for layer in layers]
    assert len(set(seeds)) == len(layers) == 2
    assert {layer.arguments["dropout"] for layer in layers} == {0.4}
    q, k, v = torch.randn(3, B, 4, 5, 8)
    torch.testing.assert_close(call(Layer(False).eval(), q, k, v, None, dropout=0.4), attend(q, k, v))  # as eager does
    evaluated = output(model.eval(), TEXT)
    close(evaluated, output(on(model, "eager"), TEXT))
    assert far(first, evaluated)


def test_record_gives_what_the_oracle_and_every_implementation_take() -> None:
    counts = {"bert padded on the left": 2, "gpt-oss, sinks and window": 2, "t5, relative bias, padded": 6}
    for name, count in counts.items():
        make, inputs, _, _ = CASES[name]
        model = on(drawn(make), "attend")
        with hook.record(model) as layers:
            output(model, inputs)
        modules = dict(model.named_modules())
        assert len(layers) == count
        for layer in layers:
            assert layer.name in modules
            arguments = {key: x.numpy() if isinstance(x, torch.Tensor) else x for key, x in layer.arguments.items()}
            answer = oracle.attend(**arguments)
            dtypes = {key: "float32" for key in ("q", "k", "v", "bias", "sinks") if key in arguments}
            cotangent = np.random.default_rng(0).standard_normal(answer.out.shape).astype(np.float32)
            problem = Problem(arguments, dtypes, cotangent, None, "contiguous")
            served = []
            for implementation in bridge.implementations():
                try:
                    check(bridge.evaluate(problem, implementation), problem)
                except UnsupportedError:
                    continue
                served.append(implementation)
            assert "einsum" in served
            assert ("sdpa" in served) == (make is not gpt_oss), "sdpa serves all but sinks here"
        output(model, inputs)
        assert len(layers) == count, "it still records afterwards"


def test_record_refuses_a_model_that_is_not_on_attend() -> None:
    for model, got in ((on(drawn(bert), "eager"), 'got "eager"'), (nn.Linear(2, 2), "got none")):
        with pytest.raises(ValueError, match=got), hook.record(model):
            pass


def test_record_forgets_after_an_error() -> None:
    model = on(drawn(bert), "attend")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(ZeroDivisionError), hook.record(model):
        raise ZeroDivisionError
    assert before == {name: set(vars(module)) for name, module in model.named_modules()}


def siglip() -> nn.Module:  # hands no keyword on to its layers
    return hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION))


@pytest.mark.parametrize("make", [bert, llama, gpt2, t5, whisper, swin, siglip])
def test_output_attentions_is_refused_by_name(make: Callable[[], nn.Module]) -> None:
    model = on(drawn(make), "attend")
    inputs = next((case.inputs for case in CASES.values() if case.model is make), {"pixel_values": PICTURE})
    with pytest.raises(UnsupportedError, match="output_attentions: a fused attention has no weights to return"):
        model(**inputs, output_attentions=True)
    assert output(model, inputs) is not None
    with pytest.raises(ValueError, match="output_attentions"):  # transformers' own refusal
        model.config.output_attentions = True
    config = copy.deepcopy(model.config)
    config._output_attentions = True  # as it comes in from a file
    with pytest.raises(UnsupportedError, match="output_attentions"):
        type(model)(config)(**inputs)


def test_output_attentions_in_a_config_is_refused_without_transformers_collector() -> None:
    layer = Layer(False)
    layer.config._output_attentions = True
    q, k, v = torch.randn(3, B, 4, 5, 8)
    with pytest.raises(UnsupportedError, match="output_attentions"):
        call(layer, q, k, v, None)
    call(layer, q, k, v, None, output_attentions=False)  # the call knows better


def test_generate_refuses_output_attentions() -> None:
    with pytest.raises(UnsupportedError, match="output_attentions"):
        options = {"output_attentions": True, "return_dict_in_generate": True}
        on(drawn(llama), "attend").generate(TOKENS, max_new_tokens=1, **options)


@pytest.mark.parametrize(
    "config",
    [
        hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4),
        hf.MptConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=4),
        hf.GPTNeoXJapaneseConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
    ],
    ids=lambda config: config.model_type,
)
def test_models_that_compute_their_own_attention_are_refused(config: hf.PreTrainedConfig) -> None:
    model = hf.AutoModel.from_config(config, attn_implementation="attend").eval()
    with pytest.raises(UnsupportedError, match=f"{config.model_type}: it computes its own attention"):
        model(**TEXT, attention_mask=LEFT)


def test_falcon_refuses_any_registered_name_itself() -> None:
    config = hf.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True)
    with pytest.raises(KeyError, match="attend"):
        hf.AutoModel.from_config(config, attn_implementation="attend")


def test_a_boolean_mask_of_the_callers_own() -> None:
    """Rank 4, True = may attend. Eager cannot read it, so the same mask is given to it as numbers."""
    model = drawn(llama)
    expected = output(on(model, "eager"), {**TEXT, "attention_mask": ADDITIVE})
    got = output(on(model, "attend"), {**TEXT, "attention_mask": CAUSAL})
    close(got[LEFT.bool()], expected[LEFT.bool()])


@pytest.mark.parametrize("name", hook.REFUSED)
def test_arguments_that_attend_does_not_have_are_refused_by_name(name: str) -> None:
    q, k, v = torch.randn(3, B, 4, 5, 8)
    with pytest.raises(UnsupportedError, match=f"{name}: "):
        call(Layer(False), q, k, v, None, **{name: torch.zeros(1)})
    call(Layer(False), q, k, v, None, **{name: None})


def test_register_takes_a_name_and_an_implementation_and_may_be_called_again() -> None:
    assert hook.register() == hook.register() == "attend"
    assert hook.register("attend-einsum", ["einsum"]) == "attend-einsum"
    hook.register("attend-fused", "sdpa")
    q, k, v = torch.randn(3, B, 4, 5, 8)
    sinks = torch.zeros(4)
    functions = hf.AttentionInterface()
    assert torch.equal(
        functions["attend-einsum"](Layer(False), q, k, v, None, s_aux=sinks)[0].transpose(1, 2),
        attend(q, k, v, sinks=sinks, implementation="einsum"),
    )
    with pytest.raises(UnsupportedError, match="sdpa: it has no sinks"):
        functions["attend-fused"](Layer(False), q, k, v, None, s_aux=sinks)
    hook.register("attend-fused", "einsum")
    functions["attend-fused"](Layer(False), q, k, v, None, s_aux=sinks)
    model = hf.AutoModel.from_config(hf.BertConfig(**ENCODER), attn_implementation="attend-einsum").eval()
    with hook.record(model) as layers:
        output(model, TEXT)
    assert len(layers) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((3,), TypeError, "name: expected a str, got int 3."),
        (("",), ValueError, "name: expected one without"),
        (("sdpa",), ValueError, "which transformers reads as its own, got str 'sdpa'."),
        (("attend-flash",), ValueError, "which transformers reads as its own, got str 'attend-flash'."),
        (("attend/mine",), ValueError, "which transformers reads as its own"),
        (("taken",), ValueError, "name: expected one that no one else registered, got str 'taken'."),
        (("attend", "nonesuch"), ValueError, "implementation: expected one of"),
        (("attend", 3), TypeError, "implementation: expected"),
    ],
)
def test_register_refuses(arguments: tuple, error: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hf.AttentionInterface._global_mapping, "taken", print)
    before = dict(hf.AttentionInterface._global_mapping)
    with pytest.raises(error, match=text):
        hook.register(*arguments)
    assert before == hf.AttentionInterface._global_mapping


def test_transformers_is_imported_by_register_only() -> None:
    code = (
        "import sys, attend_torch.hooks, attend_torch.hooks.transformers as hook\n"
        "assert 'transformers' not in sys.modules\n"
        "sys.modules['transformers'] = None\n"
        "try: hook.register()\n"
        "except ImportError as error: assert 'it is not installed. Install it: pip install' in str(error), error\n"
        "else: raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_transformers_that_is_too_old_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.6")  # it puts another object there at times
    with pytest.raises(ImportError, match=r"transformers: expected 5\.17 or later, got 4\.57\.6"):
        hook.register()


def test_compiled_whole() -> None:
    """No graph break, and the refusal is there too. The compiler itself has no part in it."""
    model = on(drawn(llama), "attend")
    inputs = {**TEXT, "attention_mask": LEFT, "use_cache": False}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(output(compiled, inputs)[LEFT.bool()], output(model, inputs)[LEFT.bool()])


def test_attend_is_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registered function calls `attend` and nothing else: a wrong scale there shows in the model."""
    model = on(drawn(llama), "attend")
    expected = output(model, TEXT)
    monkeypatch.setattr(hook, "attend", lambda *, scale, **rest: attend(scale=2 * scale, **rest))
    assert far(output(model, TEXT), expected)

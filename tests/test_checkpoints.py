"""Checkpoint folders: read lazily, written whole or not at all, and whatever is wrong with one is named."""

import json
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from attend_shared import checkpoints
from attend_shared.checkpoints import CheckpointError, read_config, read_weights, write
from attend_shared.rules import Value

CONFIG = {"architectures": ["BertModel"], "model_type": "bert"}


@pytest.fixture
def there() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool)
    found = {f"layer.{n}.weight": (torch.randn(3, n + 1) * 9).to(dtype) for n, dtype in enumerate(dtypes)}
    return {**found, "scalar": torch.tensor(2.5), "none": torch.zeros(0, 4)}


def equal(found: dict[str, Value], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].shape, f"torch.{found[name].dtype}") == (tuple(tensor.shape), str(tensor.dtype))
        assert found[name].read().tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is right.


def test_what_the_library_writes_is_read(there: dict[str, torch.Tensor], tmp_path: Path) -> None:
    safetensors.torch.save_file(there, tmp_path / "model.safetensors")
    equal(read_weights(tmp_path), there)


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 100])
def test_what_is_written_the_library_reads(there: dict[str, torch.Tensor], tmp_path: Path, shard_bytes: int) -> None:
    folder, told = tmp_path / "deep" / "model", []
    write(folder, there, CONFIG, shard_bytes=shard_bytes, step=told.append)
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) is (shard_bytes == 100) is (folder / "model.safetensors.index.json").exists()
    found = {}
    for file in files:
        found |= safetensors.torch.load_file(file)
    assert found.keys() == there.keys()
    for name, tensor in there.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    equal(read_weights(folder), there)
    assert read_config(folder) == CONFIG
    assert sum(told) == sum(x.numel() * x.itemsize for x in there.values())
    assert names(tmp_path / "deep") == ["model"], "nothing is left beside it"


def test_values_are_views_of_the_file(tmp_path: Path) -> None:
    write(tmp_path / "m", {"w": np.arange(6.0).reshape(2, 3)}, {})
    array = read_weights(tmp_path / "m")["w"].read()
    assert not array.flags.owndata and not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1


def test_one_value_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[str] = []

    class Array(np.ndarray):
        def __array_finalize__(self, source: Any) -> None:
            alive.append("made")

        def __del__(self) -> None:
            alive.append("gone")

    def read() -> np.ndarray:
        assert alive.count("made") == alive.count("gone")
        return np.zeros(5, np.float32).view(Array)

    write(tmp_path / "m", {f"w{n}": Value((5,), "float32", read) for n in range(4)}, {})
    assert alive.count("made") >= 4


def test_a_folder_is_replaced_only_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    write(tmp_path / "m", {"w": np.zeros(1)}, {})  # an empty one will do
    with pytest.raises(CheckpointError, match=r"not there yet or is empty\. Pass overwrite=True"):
        write(tmp_path / "m", {"w": np.ones(1)}, {})
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "precious").touch()
    with pytest.raises(CheckpointError, match=r"to replace, found no config\.json in it"):
        write(tmp_path / "own", {}, {}, overwrite=True)
    (tmp_path / "own" / "precious").unlink()
    (tmp_path / "own").rmdir()
    (tmp_path / "m" / "old").touch()
    write(tmp_path / "m", {"w": np.ones(1)}, {}, overwrite=True)
    assert read_weights(tmp_path / "m")["w"].read()[0] == 1
    assert (names(tmp_path), names(tmp_path / "m")) == (["m"], ["config.json", "model.safetensors"])
    with pytest.raises(CheckpointError, match="expected a folder, found a file"):
        write(tmp_path / "m" / "config.json", {}, {}, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_cannot_be_finished_is_not_there(tmp_path: Path, overwrite: bool) -> None:
    if overwrite:
        write(tmp_path / "m", {"w": np.ones(1)}, {})

    def read() -> np.ndarray:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "m", {"a": np.ones(3), "b": Value((3,), "float32", read)}, {}, overwrite=overwrite)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "deep" / "er" / "m", {"b": Value((3,), "float32", read)}, {})
    assert names(tmp_path) == ["m"] * overwrite
    if overwrite:
        assert read_weights(tmp_path / "m")["w"].read()[0] == 1


def test_an_interrupted_replacement_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "m", {"w": np.ones(1)}, {})
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if target == tmp_path / "m" and ".partial" in str(self):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "m", {"w": np.zeros(1)}, {}, overwrite=True)
    assert names(tmp_path) == ["m"]
    assert read_weights(tmp_path / "m")["w"].read()[0] == 1


def test_a_new_folder_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    write(tmp_path / "m", {"w": np.ones(1)}, {})
    (tmp_path / "other").mkdir()
    assert (tmp_path / "m").stat().st_mode == (tmp_path / "other").stat().st_mode


# What is wrong.


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((3, {}, {}), {}, TypeError, "folder: expected the path of a folder, got int 3"),
        (("m", [1], {}), {}, TypeError, "values: expected a mapping, got list"),
        (("m", {}, None), {}, TypeError, "config: expected a mapping, got NoneType"),
        (("m", {"w": 3}, {}), {}, TypeError, "array: expected an array of NumPy, JAX or torch, got int"),
        (("m", {1: np.ones(1)}, {}), {}, CheckpointError, "names of parameters, texts but __metadata__, got 1"),
        (("m", {"__metadata__": np.ones(1)}, {}), {}, CheckpointError, "texts but __metadata__, got '__metadata__'"),
        (("m", {}, {}), {"files": {"../x": b""}}, CheckpointError, r"expected a plain file name, got '\.\./x'"),
        (("m", {}, {}), {"stem": "../x"}, CheckpointError, r"expected a plain file name, got '\.\./x'"),
        (("m", {}, {"a": {1}}), {}, TypeError, "not JSON serializable"),
    ],
)
def test_what_no_folder_can_be_written_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, options: Any, error: type[Exception], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        write(*arguments, **options)
    assert names(tmp_path) == []


def header(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> bytes:
    return json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


BAD_FILES: dict[str, bytes] = {
    "empty": b"",
    "a few bytes": b"abc",
    "a header longer than the file": header(b"{}", length=1 << 20),
    "an absurd header": header(b"{}", length=(1 << 64) - 1),
    "no JSON": header(b"not json"),
    "data missing": header(entry([4], [0, 16]), b"\0" * 15),
    "data left over": header(entry([4], [0, 16]), b"\0" * 17),
    "offsets and shape that differ": header(entry([5], [0, 16]), b"\0" * 16),
    "offsets backwards": header(entry([4], [16, 0]), b"\0" * 16),
    "an absurd shape": header(entry([1 << 62, 1 << 62], [0, 16]), b"\0" * 16),
    "a dtype of no one": header(entry([4], [0, 16], "F33"), b"\0" * 16),
    "overlapping offsets": header(
        b'{"v": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b'"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b"\0" * 4,
    ),
    "a negative size": header(entry([-4], [0, 16]), b"\0" * 16),
    "a deep header": header(b'{"a":' * 50_000),
    "a pickle": b"\x80\x04\x95" + bytes(40),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_safetensors_file_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(BAD_FILES[name])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or corrupt") as caught:
        read_weights(tmp_path)
    assert str(tmp_path) in str(caught.value)


TWICE = b"{" + entry([1], [0, 4])[1:-1] + b"," + entry([1], [0, 4])[1:]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header(TWICE, b"\0" * 4), "w: expected each name once"),
        (header(entry([0, 1 << 62], [0, 0])), r"w: expected a shape that an array can have, got \(0, 46"),
        (header(entry([1] * 70, [0, 4]), b"\0" * 4), "w: expected a shape that an array can have, got 70 axes"),
        (header(entry([2], [0, 1], "F4"), b"\0"), "w: expected a dtype out of F64, .*, got F4"),
    ],
    ids=["a name twice", "an absurd empty shape", "absurdly many axes", "a dtype that is not known"],
)
def test_a_parameter_that_no_array_can_hold_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    """The structure is right, so that the library does not mind."""
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_weights(tmp_path)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")  # it would wait for ever
    with pytest.raises(CheckpointError, match="expected a file, found a folder or a device"):
        read_weights(tmp_path)


@pytest.mark.parametrize("keep", [4, 60, 300, -1])
def test_a_truncated_file_is_named(there: dict[str, torch.Tensor], tmp_path: Path, keep: int) -> None:
    write(tmp_path / "m", there, {})
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or corrupt"):
        read_weights(tmp_path / "m")


def sharded(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    write(folder, {"a": np.ones(4), "b": np.ones(4)}, {}, shard_bytes=32)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(change(json.loads(index.read_text()))))
    return folder


def test_one_file_counts_before_shards_as_in_transformers(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", lambda index: index)
    safetensors.torch.save_file({"c": torch.ones(1)}, folder / "model.safetensors")
    assert read_weights(folder).keys() == {"c"}


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", lambda index: index)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 shards missing: model-00002-of-00002\.safetensors"):
        read_weights(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: [], "expected a JSON object, got list"),
        (lambda index: {}, "expected a weight_map"),
        (lambda index: {"weight_map": {"a": 3}}, "expected a weight_map"),
        (lambda index: {"weight_map": {"a": "../model.safetensors"}}, "names of safetensors files in this folder"),
        (lambda index: {"weight_map": {"a": "model.bin"}}, "names of safetensors files in this folder"),
        (lambda index: {"weight_map": index["weight_map"] | {"c": index["weight_map"]["a"]}}, "c in model-00001-of"),
    ],
)
def test_an_index_that_is_wrong(tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_weights(sharded(tmp_path / "m", change))


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "no JSON"), ("[1]", "got list"), ("[" * 100_000, "no JSON"), ("\ud800", "no JSON"), (None, "no such file")],
)
def test_a_config_that_is_wrong(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=words):
        read_config(tmp_path)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="found a file"):
        read_config(tmp_path / "file")
    with pytest.raises(CheckpointError, match="found nothing there"):
        read_config(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"Nothing is downloaded: .*hf download some/model --local-dir"):
        read_config("some/model")
    for read in (read_config, read_weights):
        with pytest.raises(TypeError, match="folder: expected the path of a folder, got int 3"):
            read(3)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="found neither"):
        read_weights(tmp_path)


def test_an_absurdly_large_json_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "JSON_LIMIT", 10)
    (tmp_path / "config.json").write_text('{"a": "long enough"}')
    with pytest.raises(CheckpointError, match="at most 10 bytes"):
        read_config(tmp_path)


class Trap:
    """What a pickle may do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)

    def __init__(self, folder: Path) -> None:
        self.folder = folder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.save({"w": Trap(tmp_path / "sprung")}, tmp_path / name)
    with pytest.raises(CheckpointError, match="a pickle, which can run code") as caught:
        read_weights(tmp_path)
    assert not (tmp_path / "sprung").exists()
    assert f"transformers.BertModel.from_pretrained({str(tmp_path)!r}, weights_only=True)" in str(caught.value)
    assert f".save_pretrained({str(tmp_path) + '-safetensors'!r})" in str(caught.value)


def test_the_command_names_no_more_than_a_class(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["x; import os"]}))
    with pytest.raises(CheckpointError, match=r"transformers\.AutoModel\.from_pretrained"):
        read_weights(tmp_path)


def test_the_command_is_no_more_than_it_seems_to_a_shell(tmp_path: Path) -> None:
    folder = tmp_path / 'a "b" $(touch sprung) `touch sprung`'
    folder.mkdir()
    (folder / "$(touch sprung).gguf").touch()
    with pytest.raises(CheckpointError) as caught:
        read_weights(folder)
    command = str(caught.value).partition("\n")[2].strip()
    assert command.startswith('python -c "')
    run = subprocess.run(["sh", "-c", f"printf %s {command.removeprefix('python -c ')}"], cwd=tmp_path,
                         capture_output=True, text=True, check=True)  # fmt: skip
    assert f"from_pretrained({str(folder)!r}, gguf_file='$(touch sprung).gguf')" in run.stdout
    assert names(tmp_path) == [folder.name]


def test_other_formats_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"GGUF.*\n.*gguf_file='model\.gguf'"):
        read_weights(tmp_path)

"""Checkpoint folders as Hugging Face's libraries write them: config.json and safetensors files, read without loading
them and written so that a reader never sees half a folder.

Nothing in a file is ever executed: a pickle is refused. What is read is checked first, the structure of a safetensors
file by the library of that name. Its writer wants every tensor in memory at once; the one here holds one at a time.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from attend_shared.rules import ITEMSIZE, RAW, Value, value

__all__ = ["FLAX", "CheckpointError", "has_weights", "read_config", "read_json", "read_weights", "write"]

CONFIG = "config.json"
FLAX = "flax_model"
"""The stem of files with a model's parameters under its Flax paths and in its Flax shapes."""

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)

JSON_LIMIT = 100 * 2**20
"""Bytes of a JSON file; the largest index of a published model has a few."""

RANK_LIMIT, SIZE_LIMIT = 32, 2**59
"""Axes and elements of a parameter, axes of size 0 aside; beyond that no array can be, not even an empty one."""

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
"""Names in a safetensors file, and ours."""

DROP = getattr(mmap, "MADV_DONTNEED", None)  # not on Windows

METADATA = "__metadata__"  # what a header has beside its tensors

FOREIGN = {
    "*.bin": "a pickle, which can run code when it is read", "*.pt": "a pickle, which can run code when it is read",
    "*.pth": "a pickle, which can run code when it is read", "*.ckpt": "a pickle, which can run code when it is read",
    "*.gguf": "GGUF", "*.h5": "TensorFlow's HDF5", "*.msgpack": "Flax's MessagePack",
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint folder cannot be read or written; the text names the file, and the parameter where it is one."""


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The config.json of a checkpoint folder.

    Args:
        folder: the path of the folder.

    Returns:
        What the file says, as it is.

    Raises:
        CheckpointError: there is no such folder or file, or it is no JSON object.
        TypeError: folder is no path.

    Example:
        >>> read_config("no such folder")
        Traceback (most recent call last):
        attend_shared.checkpoints.CheckpointError: no such folder: expected a checkpoint folder, found nothing there.
    """
    root = _path(folder)
    if not root.is_dir():
        kind = "a file" if root.exists() else "nothing there"
        hint = ""
        if HUB_NAME.fullmatch(str(root)) and not root.exists():
            hint = f" Nothing is downloaded: a model of the hub takes `hf download {root} --local-dir FOLDER` first."
        raise CheckpointError(f"{root}: expected a checkpoint folder, found {kind}.{hint}")
    return read_json(root / CONFIG)


def read_weights(folder: str | os.PathLike[str], stem: str = "model") -> dict[str, Value]:
    """The parameters of a checkpoint folder, in one file or in shards. Only headers are read; values when asked for.

    Args:
        folder: with model.safetensors, or with model.safetensors.index.json and the shards that it names.
        stem: what stands for "model" in these names; a folder that was ported to Flax has `FLAX`.

    Returns:
        By name. Values are views of the mapped file, read-only. Where there are both, the one file counts, as it does
        in transformers.

    Raises:
        CheckpointError: nothing to read, a file that is truncated, corrupt or missing, a parameter that is not where
            the index says, a dtype that is not known, or another format: a pickle is refused together with the command
            that converts it.
        TypeError: folder is no path.
        ImportError: safetensors is not installed.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp() + "/model"
        >>> write(folder, {"scale": np.ones(3, np.float32)}, {"model_type": "own"})
        >>> read_weights(folder)["scale"].array()
        array([1., 1., 1.], dtype=float32)

    References:
        https://github.com/huggingface/safetensors: the format.
    """
    root = _path(folder)
    weights, index = root / f"{stem}.safetensors", root / f"{stem}.safetensors.index.json"
    if weights.exists():
        return _file(weights)
    if index.exists():
        return _shards(index)
    raise CheckpointError(_nothing(root, weights.name, index.name))


def has_weights(folder: str | os.PathLike[str], stem: str = "model") -> bool:
    """Whether there are safetensors files of that stem, whole or not."""
    return any((_path(folder) / f"{stem}.safetensors{end}").exists() for end in ("", ".index.json"))


def write(
    folder: str | os.PathLike[str],
    values: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    files: Mapping[str, bytes] | None = None,
    stem: str = "model",
    shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    step: Callable[[int], None] | None = None,
) -> None:
    """Write a checkpoint folder: beside its place, then renamed, so that it is there whole or not at all.

    Args:
        folder: where; not there yet or empty, unless overwrite.
        values: by name, `Value` or arrays; one is in memory at a time.
        config: written as config.json.
        files: what further files hold, by name, such as a tokenizer's.
        stem: as in `read_weights`.
        shard_bytes: the most that one file holds, unless a single parameter is larger.
        overwrite: whether a checkpoint folder that is there, one with a config.json, may be replaced, with everything
            in it.
        step: called with the bytes of each parameter once it is written.

    Raises:
        CheckpointError: the folder is there and may not be replaced, a file stands where a folder around it would, or
            a name is not one that its kind can have.
        TypeError: folder is no path, values or config no mapping, or a value of a dtype that no checkpoint has.
        OSError: it cannot be written.

        After any of them what was there before is still there, and nothing else.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp(), "model")
        >>> write(folder, {"a": np.zeros(3), "b": np.zeros(3)}, {}, shard_bytes=30)
        >>> sorted(file.name for file in folder.iterdir())[1:3]
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    for argument, given in (("values", values), ("config", config)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{argument}: expected a mapping, got {type(given).__name__}.")
    target = _free(_path(folder).absolute(), overwrite)
    found = {name: x if isinstance(x, Value) else value(x) for name, x in values.items()}
    for name in found:
        if not isinstance(name, str) or name == METADATA:
            raise CheckpointError(f"{target}: expected names of parameters, texts but {METADATA}, got {name!r}.")
    for name in (stem, *(files or {})):
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
            raise CheckpointError(f"{target}: expected a plain file name, got {name!r}.")
    text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
    parents = [each for each in target.parents if not each.exists()]
    around = target.parents[len(parents)]
    if not around.is_dir():
        raise CheckpointError(f"{target}: expected a folder around it, found the file {around}.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_folder(target, found, text, files or {}, stem, shard_bytes, step or (lambda size: None))
    except BaseException:
        for each in parents:  # the deepest first; one that another program has begun to use stays
            with suppress(OSError):
                each.rmdir()
        raise


def _path(folder: str | os.PathLike[str]) -> Path:
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"folder: expected the path of a folder, got {type(folder).__name__} {folder!r}.")
    return Path(folder)


def _free(target: Path, overwrite: bool) -> Path:
    """The target, if a folder may be put there."""
    if not target.exists() and not target.is_symlink():
        return target
    if not target.is_dir():
        raise CheckpointError(f"{target}: expected a folder, found a file.")
    if not any(target.iterdir()):
        return target
    if not overwrite:
        raise CheckpointError(f"{target}: expected a folder that is not there yet or is empty. Pass overwrite=True, "
                              "or --overwrite, to replace it.")  # fmt: skip
    if not (target / CONFIG).is_file():
        raise CheckpointError(f"{target}: expected a checkpoint folder to replace, found no {CONFIG} in it. Remove it "
                              "yourself, if nothing in it is needed.")  # fmt: skip
    return target


def _write_folder(
    target: Path, found: Mapping[str, Value], config: str, files: Mapping[str, bytes], stem: str, shard_bytes: int,
    step: Callable[[int], None],
) -> None:  # fmt: skip
    around = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    beside = around / "folder"
    try:
        beside.mkdir()  # unlike the one around it, with the permissions that a new folder has
        for name, content in files.items():
            (beside / name).write_bytes(content)
        (beside / CONFIG).write_text(config)
        groups = _groups(found, shard_bytes)
        names = [f"{stem}.safetensors"] if len(groups) == 1 else [
            f"{stem}-{n + 1:05d}-of-{len(groups):05d}.safetensors" for n in range(len(groups))
        ]  # fmt: skip
        for name, group in zip(names, groups, strict=True):
            _write_file(beside / name, {each: found[each] for each in group}, step)
        if len(groups) > 1:
            where = {each: name for name, group in zip(names, groups, strict=True) for each in group}
            total = sum(each.nbytes for each in found.values())
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (beside / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        _put(beside, target)
    finally:
        shutil.rmtree(around, ignore_errors=True)


def _put(beside: Path, target: Path) -> None:
    """Rename a finished folder to its place; what is there goes away only once it stands."""
    if not target.exists():
        beside.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    target.rename(old / "folder")
    try:
        beside.rename(target)
    except BaseException:
        (old / "folder").rename(target)
        old.rmdir()
        raise
    shutil.rmtree(old)


def _groups(values: Mapping[str, Value], limit: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, each in values.items():
        if groups[-1] and size + each.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += each.nbytes
    return groups


def _write_file(file: Path, values: Mapping[str, Value], step: Callable[[int], None]) -> None:
    """A safetensors file: the length of its header, the header, and the values one after the other."""
    codes = {name: code for code, name in DTYPES.items()}
    order = sorted(values, key=lambda name: -ITEMSIZE[values[name].dtype])  # so that each is aligned
    header: dict[str, Any] = {METADATA: {"format": "pt"}}  # transformers wants to be told
    offset = 0
    for name in order:
        each = values[name]
        header[name] = {
            "dtype": codes[each.dtype], "shape": list(each.shape), "data_offsets": [offset, offset + each.nbytes]
        }  # fmt: skip
        offset += each.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            each = values[name]
            raw = np.ascontiguousarray(each.read())
            if raw.nbytes != each.nbytes:
                raise CheckpointError(f"{file.name}: {name}: expected {each.nbytes} bytes, got {raw.nbytes}.")
            out.write(raw.astype(raw.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data)
            step(each.nbytes)


# Reading.


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file that need not be one."""
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no such file.")
    if file.stat().st_size > JSON_LIMIT:
        raise CheckpointError(f"{file}: expected at most {JSON_LIMIT} bytes of JSON, got {file.stat().st_size}.")
    try:
        found = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(found).__name__}.")
    return found


def _shards(index: Path) -> dict[str, Value]:
    root = index.parent
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(f"{index}: expected a weight_map from names to files.")
    names: Sequence[str] = sorted(set(where.values()))
    for name in names:
        if re.fullmatch(r"[\w.-]+\.safetensors", name) is None:
            raise CheckpointError(f"{index}: expected names of safetensors files in this folder, got {name!r}.")
    absent = [name for name in names if not (root / name).is_file()]
    if absent:
        raise CheckpointError(f"{index}: {len(absent)} of {len(names)} shards missing: {', '.join(absent)}.")
    files = {name: _file(root / name) for name in names}
    lost = [f"{path} in {name}" for path, name in where.items() if path not in files[name]]
    if lost:
        raise CheckpointError(f"{index}: parameters that are not where it says: {', '.join(lost)}.")
    return {path: files[name][path] for path, name in where.items()}


def _file(file: Path) -> dict[str, Value]:
    """The parameters of one file, whose structure the library has checked: sizes, offsets, nothing out of bounds."""
    import safetensors

    if not file.is_file():
        raise CheckpointError(f"{file}: expected a file, found a folder or a device.")
    try:
        with safetensors.safe_open(file, framework="numpy"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or corrupt, or no safetensors file: {error}.") from error
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        pairs = json.loads(opened.read(length), object_pairs_hook=tuple)
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    found: dict[str, Value] = {}
    for name, more in pairs:
        if name == METADATA:
            continue
        facts = dict(more)
        if name in found:
            raise CheckpointError(f"{file}: {name}: expected each name once, found it again.")
        if facts["dtype"] not in DTYPES:
            raise CheckpointError(f"{file}: {name}: expected a dtype out of {', '.join(DTYPES)}, got {facts['dtype']}.")
        shape = tuple(facts["shape"])
        if len(shape) > RANK_LIMIT or math.prod(size for size in shape if size) > SIZE_LIMIT:
            raise CheckpointError(f"{file}: {name}: expected a shape that an array can have, got {_short(shape)}.")
        start, _ = facts["data_offsets"]
        found[name] = _view(mapped, 8 + length + start, shape, DTYPES[facts["dtype"]])
    return found


def _short(shape: tuple[int, ...]) -> str:
    return str(shape) if len(shape) <= RANK_LIMIT else f"{len(shape)} axes"


def _view(mapped: mmap.mmap, start: int, shape: tuple[int, ...], dtype: str) -> Value:
    raw = np.dtype(RAW.get(dtype, dtype)).newbyteorder("<")

    def read() -> np.ndarray:
        count = int(np.prod(shape, dtype=np.int64))
        if not count:
            return np.zeros(shape, raw)
        if DROP is not None:
            mapped.madvise(DROP)  # pages of what was read before: they come back where a view of them is still read
        return np.frombuffer(mapped, raw, count, start).reshape(shape)

    return Value(shape, dtype, read)


def _nothing(root: Path, file: str, index: str) -> str:
    """Why a folder without safetensors cannot be read, and what would make it one that can."""
    wanted = f"{root}: expected {file} or {index}"
    for pattern, kind in FOREIGN.items():
        files = sorted(root.glob(pattern))
        weights = [file for file in files if file.name != "training_args.bin"]
        if not weights:
            continue
        name = weights[0].name
        if pattern == "*.gguf":
            how = f"transformers.AutoModelForCausalLM.from_pretrained({str(root)!r}, gguf_file={name!r})"
        else:
            how = f"transformers.{_architecture(root)}.from_pretrained({str(root)!r}, weights_only=True)"
        code = f"import transformers; {how}.save_pretrained({str(root) + '-safetensors'!r})"
        # Names of files are whatever a download says; a shell must not read more into them.
        command = 'python -c "' + re.sub(r'([\\"$`])', r"\\\1", code) + '"'
        return f"{wanted}, found {name}, {kind}. Convert it, if you trust where it comes from:\n  {command}"
    return f"{wanted}, found neither."


def _architecture(root: Path) -> str:
    """The class that a config names, for a command that a person is shown."""
    try:
        names = read_json(root / CONFIG).get("architectures")
    except CheckpointError:
        names = None
    name = names[0] if isinstance(names, list) and names else None
    return name if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9]+", name) else "AutoModel"

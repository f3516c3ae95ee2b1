"""Checkpoint folders into NNX modules and back."""

from __future__ import annotations

import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attend_jax import weights
from attend_jax.models import albert, bert, gemma2, gpt2, llama, mistral, qwen2, qwen3, t5, vit, whisper
from attend_jax.models.family import Family, Plan
from attend_jax.models.options import ADVICE, MOST_LAYERS, Options
from attend_shared import checkpoints, progress
from attend_shared.checkpoints import CheckpointError
from attend_shared.errors import UnsupportedError
from attend_shared.rules import Value, WeightsError, carry

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (bert, albert, gpt2, llama, mistral, qwen2, qwen3, gemma2, vit, t5, whisper)
}
"""What can be read, by the model_type of config.json."""

GENERATION = "generation_config.json"
ALIBI = ("bloom", "mpt", "falcon")
READERS = 2
"""Parameters that are read at a time."""
ALIGNMENT = 64
"""Bytes; JAX takes memory of NumPy that is aligned so as it is on a CPU, and copies other memory."""
HEADLINE = "{} cannot be read:"


def from_pretrained(path: str | os.PathLike[str], dtype: Any = None, *, show_progress: bool | None = None) -> Any:
    """Read a Hugging Face checkpoint folder into a Flax NNX model. Neither torch nor transformers is needed.

    The model computes what the model of transformers computes in eval(): it has no dropout.

    Args:
        path: a folder with config.json and model.safetensors, or its shards and their index; or one that `attend port`
            made, with flax_model.safetensors.
        dtype: of the parameters and the computation, such as jnp.bfloat16; None keeps that of the checkpoint.
        show_progress: whether to draw a bar on standard error; None does where that is a terminal.

    Returns:
        The module. Called on input_ids and attention_mask, and what else the family takes, it returns a named tuple
        under the names of transformers: last_hidden_state, pooler_output, logits.

    Raises:
        CheckpointError: the folder or a file of it cannot be read; which file, which parameter, what is wrong.
        UnsupportedError: the family, the architecture or an option is not supported; each by its name.

    Example:
        >>> from_pretrained("no such folder")
        Traceback (most recent call last):
        attend_shared.checkpoints.CheckpointError: no such folder: expected a checkpoint folder, found nothing there.

    References:
        docs/porting.md: the families, their options, and how to add one.
    """
    config = checkpoints.read_config(path)
    folder = Path(path)
    plan = read_plan(config, str(folder / checkpoints.CONFIG))  # what is refused by name is, whatever the weights
    ported = checkpoints.has_weights(folder, checkpoints.FLAX) and not checkpoints.has_weights(folder)
    stored = checkpoints.read_weights(folder, checkpoints.FLAX if ported else "model")
    stored = stored if ported else plan.named(stored)
    plan = read_plan(config, str(folder / checkpoints.CONFIG), len(stored))
    kind = _dtype(folder, stored, dtype)
    graph, state = nnx.split(plan.abstract(kind))
    flat = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    expected = {name: leaf.shape for name, (_, leaf) in flat.items()}
    try:
        rules = [f"{name} <-> {name}" for name in expected] if ported else plan.rules
        found = carry(stored, rules, to="flax", sizes=plan.sizes, expected=expected)
        _check_dtypes(folder, found, dtype)
        with progress.bar(f"loading {folder.name}", sum(each.nbytes for each in found.values()), show_progress) as step:
            # The largest first, while there is little else: so pages of the file never add much to the model's memory.
            names = sorted(found, key=lambda name: -found[name].nbytes)
            with ThreadPoolExecutor(READERS) as pool:  # copying holds no lock of Python's
                for name, array in zip(names, pool.map(lambda name: _copied(found[name], dtype), names), strict=True):
                    where, leaf = flat[name]
                    flat[name] = where, leaf.replace(array)
                    step(found[name].nbytes)
    except WeightsError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    model: Any = nnx.merge(graph, nnx.from_flat_state(list(flat.values())))
    model.config_json = json.dumps(config, sort_keys=True)
    generation = folder / GENERATION
    model.generation_json = json.dumps(checkpoints.read_json(generation), sort_keys=True) if generation.exists() else ""
    return model


def _copied(value: Value, dtype: Any) -> jax.Array:
    """A parameter of a file on the device, in memory of its own: if it shared the file's, it would change with it."""
    array = value.array()
    if dtype is not None and array.dtype != dtype:
        return jnp.array(array, dtype, copy=True)
    if array.flags.c_contiguous and jax.default_backend() == "cpu":
        room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
        start = -room.ctypes.data % ALIGNMENT
        own = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        own[...] = array
        array = own
    return jax.device_put(array)


def save_pretrained(
    model: Any, path: str | os.PathLike[str], *, overwrite: bool = False, shard_bytes: int = 5 * 10**9,
    show_progress: bool | None = None,
) -> None:  # fmt: skip
    """Write a model that `from_pretrained` made as a folder that transformers loads.

    Args:
        model: the module, trained on or not.
        path: the folder: not there yet or empty, unless overwrite. It is there whole or not at all.
        overwrite: whether a folder that is there may be replaced.
        shard_bytes: the most that one file holds.
        show_progress: as in `from_pretrained`.

    Raises:
        TypeError: the module was not made by `from_pretrained`.
        CheckpointError, OSError: it cannot be written.

    Example:
        >>> save_pretrained(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), "folder")
        Traceback (most recent call last):
        TypeError: model: expected a model that from_pretrained made, got Linear. attend_shared.checkpoints.write \
writes any parameters.

    References:
        docs/porting.md.
    """
    config = json.loads(_settings(model, "config_json"))
    plan = read_plan(config, checkpoints.CONFIG)
    values = carry(weights.values(model), plan.rules, to="torch", sizes=plan.sizes)
    dtypes = Counter(each.dtype for each in values.values())
    config.pop("torch_dtype", None)
    config["dtype"] = dtypes.most_common(1)[0][0]
    generation = _settings(model, "generation_json")
    files = {GENERATION: json.dumps(json.loads(generation), indent=2).encode()} if generation else {}
    total = sum(each.nbytes for each in values.values())
    with progress.bar(f"writing {Path(path).name}", total, show_progress) as step:
        checkpoints.write(
            path, values, config, files=files, shard_bytes=shard_bytes, overwrite=overwrite, step=step
        )  # fmt: skip


def read_plan(config: dict[str, Any], where: str, most_layers: int = MOST_LAYERS) -> Plan:
    """What a config asks for; of layers at most as many as there are parameters.

    Raises:
        UnsupportedError: a family, an architecture or an option that is not supported.
        CheckpointError: a value that no model can have.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(FAMILIES)
        reason = f"expected one of {known}, got {name!r}"
        if name in ALIBI:
            reason += "; its ALiBi is no option of attend's hosts"
        raise UnsupportedError((("model_type", reason),), HEADLINE.format(where), ADVICE)
    family = FAMILIES[name]
    named = config.get("architectures") or [family.architectures[0]]
    if not isinstance(named, list) or len(named) != 1 or named[0] not in family.architectures:
        reason = f"expected a list of one, {' or '.join(family.architectures)}, got {named!r}"
        raise UnsupportedError((("architectures", reason),), HEADLINE.format(where), ADVICE)
    options = Options(config, where, family.title, most_layers)
    plan = family.plan(options, named[0])
    options.done()
    return plan


FLOATING = ("float16", "bfloat16", "float32", "float64")


def _check_dtypes(folder: Path, found: dict[str, Value], dtype: Any) -> None:
    """Every parameter must be floating, and one that JAX would cut must be asked to be cut."""
    wrong = [f"{name} ({each.dtype})" for name, each in found.items() if each.dtype not in FLOATING]
    if wrong:
        shown = ", ".join(wrong[:8]) + (" and more" if len(wrong) > 8 else "")
        raise CheckpointError(f"{folder}: expected floating parameters, got {shown}. Dequantize what is quantized.")
    wide = [name for name, each in found.items() if each.dtype == "float64"]
    if wide and dtype is None and not jax.config.read("jax_enable_x64"):
        raise CheckpointError(f"{folder}: {wide[0]}: it is float64, which needs jax_enable_x64; without it JAX would "
                              "cut it to float32. Pass dtype=jnp.float32 for that.")  # fmt: skip


def _dtype(folder: Path, weights: dict[str, Value], dtype: Any) -> Any:
    """The dtype that most parameters have, unless one is asked for."""
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype: expected None or a floating dtype, got {dtype}.")
    sizes: Counter[str] = Counter()
    for each in weights.values():
        sizes[each.dtype] += each.nbytes
    kinds = [kind for kind, _ in sizes.most_common() if kind in FLOATING]
    if not kinds:
        raise CheckpointError(f"{folder}: expected floating parameters, got {', '.join(sizes) or 'none at all'}.")
    kind = jnp.dtype(kinds[0] if dtype is None else dtype)
    if kind == jnp.float64 and not jax.config.read("jax_enable_x64"):
        raise TypeError("dtype: float64 needs jax_enable_x64, without which JAX would cut it to float32. "
                        "Pass dtype=jnp.float32.")  # fmt: skip
    return kind


def _settings(model: Any, name: str) -> str:
    text = getattr(model, name, None)
    if not isinstance(text, str):
        raise TypeError(f"model: expected a model that from_pretrained made, got {type(model).__name__}. "
                        "attend_shared.checkpoints.write writes any parameters.")  # fmt: skip
    return text

"""Porting a checkpoint folder: its parameters into the other framework's names and shapes, and the proof that both
models compute the same, layer by layer.

The proof runs the model of transformers twice, in float64 and in float32, and the Flax model in float32. What float32
costs transformers itself is the measure of what it may cost Flax. (Some models take their softmax and their norms in
float32 whatever they are given. What that costs is in both.)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from attend_shared import checkpoints
from attend_shared.checkpoints import CONFIG, FLAX, CheckpointError
from attend_shared.dtypes import ulp
from attend_shared.rules import WeightsError, carry

__all__ = ["Layer", "MissingError", "Ported", "need", "port", "quiet", "verify"]

FACTOR, ULPS = 4.0, 16.0
"""The budget of a layer: so many times the largest error that float32 makes in transformers, and so many units in the
last place of its largest value. A whole model multiplies what a single attention call may be off by."""

BESIDE = (".json", ".txt", ".model", ".jinja")
BESIDE_LIMIT = 50 * 2**20
SEED, BATCH, LENGTH, WRITTEN = 0, 3, 24, 10

EXTRAS = {"torch": "torch", "jax": "jax", "flax": "jax", "safetensors": "models", "transformers": "models"}
"""The extra that installs a package."""


class MissingError(Exception):
    """Something that is needed is not installed; the text says what to do."""


class Ported(NamedTuple):
    """What has been written.

    Attributes:
        parameters: how many arrays.
        nbytes: of all of them.
        seconds: that it took.
    """

    parameters: int
    nbytes: int
    seconds: float


class Layer(NamedTuple):
    """What a part of the model gives in Flax, against float64 in transformers.

    Attributes:
        name: of the part.
        shape: of what it gives.
        largest: of its values.
        error: the worst in Flax. reference: the worst in transformers, in float32.
        budget: the largest error that is right.
    """

    name: str
    shape: tuple[int, ...]
    largest: float
    error: float
    reference: float
    budget: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the budget; NaN is not."""
        return self.error <= self.budget


def port(
    source: Path, target: Path, to: Literal["flax", "torch"] = "flax", *, overwrite: bool = False,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Ported:  # fmt: skip
    """Write a checkpoint folder anew under the other framework's names and in its shapes, bit for bit.

    Args:
        source: a folder of transformers, or where to="torch" one that was ported to Flax.
        target: the folder to write, with everything else that the source has beside its weights.
        to: the framework.
        overwrite: whether a folder that is there may be replaced.
        step: called with the bytes that are done and all of them.

    Returns:
        What was written.

    Raises:
        CheckpointError: the source cannot be read, or the target may not be replaced.
        UnsupportedError: the source is not supported.
        ValueError: to is no framework.
        MissingError: JAX, Flax or safetensors is not installed.
        OSError: the target cannot be written.
    """
    if to not in ("flax", "torch"):
        raise ValueError(f'to: expected "flax" or "torch", got {to!r}.')
    need("jax", "flax", "safetensors")
    source, target = Path(source), Path(target)
    started = time.perf_counter()
    with _readable(source):
        config = checkpoints.read_config(source)
    here, there = (Path(os.path.realpath(folder)) for folder in (source, target))
    if there == here:
        raise CheckpointError(f"{target}: expected another folder than the source.")
    if there in here.parents:  # to overwrite it would take the source away
        raise CheckpointError(f"{target}: expected a folder that the source is not in.")
    plan = import_module("attend_jax.models.loading").read_plan(config, str(source / CONFIG))
    stem, other, turned = ("model", FLAX, "torch") if to == "flax" else (FLAX, "model", "flax")
    with _readable(source):
        if not checkpoints.has_weights(source, stem) and checkpoints.has_weights(source, other):
            expected = f"expected {stem}.safetensors or {stem}.safetensors.index.json, found those of {other}"
            raise CheckpointError(f'{source}: {expected}. Pass to="{turned}", or --to {turned}, to go the other way.')
        weights = checkpoints.read_weights(source, stem)
        files = _beside(source)
    weights = plan.named(weights) if to == "flax" else weights
    try:
        values = carry(weights, plan.rules, to=to, sizes=plan.sizes, expected=plan.shapes() if to == "flax" else None)
        total, done = sum(each.nbytes for each in values.values()), 0

        def advance(more: int) -> None:
            nonlocal done
            done += more
            step(done, total)

        checkpoints.write(
            target, values, config, files=files, stem=other, overwrite=overwrite, step=advance
        )  # fmt: skip
    except WeightsError as error:
        raise CheckpointError(f"{source}: {error}") from error
    return Ported(len(values), total, time.perf_counter() - started)


def verify(torch_folder: Path, flax_folder: Path) -> list[Layer]:
    """The same sample input through both models: random tokens with padding, or random pixels.

    Args:
        torch_folder: of transformers.
        flax_folder: of either kind.

    Returns:
        A row for the embeddings, for every layer, and for what comes out.

    Raises:
        CheckpointError, UnsupportedError: a folder cannot be read or is not supported.
        MissingError: torch or transformers is not installed.
    """
    need("torch", "transformers", "jax", "flax")
    torch, transformers, np_jax = (import_module(name) for name in ("torch", "transformers", "jax.numpy"))
    nnx = import_module("flax.nnx")
    torch_folder, flax_folder = Path(torch_folder), Path(flax_folder)
    config = checkpoints.read_config(torch_folder)
    loading = import_module("attend_jax.models.loading")
    loading.read_plan(config, str(torch_folder / CONFIG))
    named = config.get("architectures") or loading.FAMILIES[config["model_type"]].architectures
    kind = getattr(transformers, named[0])
    with quiet(transformers):  # the options that the file leaves out as well
        given, real = _sample(kind.config_class.from_pretrained(torch_folder, local_files_only=True).to_dict(), kind)

    def there(dtype: Any) -> dict[str, np.ndarray]:
        model = kind.from_pretrained(
            torch_folder, local_files_only=True, dtype=dtype, attn_implementation="eager", use_safetensors=True
        ).eval()
        tensors = {name: torch.from_numpy(x) for name, x in given.items()}
        tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
        with torch.no_grad():
            return _parts(model(**tensors, output_hidden_states=True), lambda x: x.double().numpy())

    model = import_module("attend_jax.models").from_pretrained(flax_folder, np_jax.float32, show_progress=False)
    first, *others = [(name, x.astype(np.int32) if x.dtype == np.int64 else x) for name, x in given.items()]
    call = nnx.jit(lambda model: model(first[1], **dict(others), output_hidden_states=True))
    here = _parts(call(model), lambda x: np.asarray(x, np.float64))
    with quiet(transformers):
        exact, single = there(torch.float64), there(torch.float32)
    return [_layer(name, here[name], single[name], exact[name], real) for name in exact]


def need(*names: str) -> None:
    """Raises MissingError unless all of these packages, each of `EXTRAS`, are installed."""
    lacking = [name for name in names if find_spec(name) is None]
    if lacking:
        extras = ",".join(dict.fromkeys(EXTRAS[name] for name in lacking))
        are = "is" if len(lacking) == 1 else "are"
        raise MissingError(f'{", ".join(lacking)} {are} not installed. pip install "attend-twin[{extras}]"')


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' own progress bars and remarks, which it goes back to afterwards."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _sample(config: dict[str, Any], kind: Any) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Inputs by name, that of the model first, and which tokens are real: ids and a mask; or the pixels of images or
    the bands of a spectrogram, where nothing is padding.

    Padding is on the right: on the left, rows of it would see nothing, which transformers' own attention turns to NaN
    in float64.
    """
    generator = np.random.default_rng(SEED)
    if "image_size" in config:
        size = config["image_size"]
        height, width = size if isinstance(size, list) else (size, size)
        shape = (BATCH, config.get("num_channels", 3), height, width)
        return {"pixel_values": generator.standard_normal(shape, np.float32)}, None
    written = {}
    if "decoder_input_ids" in signature(kind.forward).parameters:
        written["decoder_input_ids"] = generator.integers(0, config["vocab_size"], (BATCH, WRITTEN))
    if "num_mel_bins" in config:
        frames = (BATCH, config["num_mel_bins"], 2 * config.get("max_source_positions", 1500))
        return {"input_features": generator.standard_normal(frames, np.float32), **written}, None
    length = min(LENGTH, config.get("max_position_embeddings") or config.get("n_positions") or LENGTH)
    # Which class a text is of is read at its last token, and without a padding token it is unknown where others end.
    batch = 1 if kind.__name__.endswith("ForSequenceClassification") and config.get("pad_token_id") is None else BATCH
    ids = generator.integers(0, config["vocab_size"], (batch, length))
    padded = (config.get("sliding_window") or length) >= length  # or else rows of padding would see nothing, as above
    lengths = np.linspace(length, max(length // 3, 1) if padded else length, batch).astype(int)[:, None]
    mask = np.arange(length) < lengths
    return {"input_ids": ids, "attention_mask": mask.astype(np.int64), **written}, mask


def _parts(out: Any, numpy: Callable[[Any], np.ndarray]) -> dict[str, np.ndarray]:
    """What a model gives, part by part, by name."""
    found = {}
    for stack in ("", "encoder", "decoder"):
        states = getattr(out, f"{stack}_hidden_states" if stack else "hidden_states", None) or ()
        for n, x in enumerate(states):
            found[f"{stack} {f'layer {n}' if n else 'embeddings'}".strip()] = numpy(x)
    for name in ("last_hidden_state", "pooler_output", "logits", "start_logits", "end_logits"):
        if getattr(out, name, None) is not None:
            found[name] = numpy(getattr(out, name))
    return found


def _layer(name: str, here: np.ndarray, single: np.ndarray, exact: np.ndarray, real: np.ndarray | None) -> Layer:
    """The worst errors of a part; of padding nothing is asked."""
    if here.shape != exact.shape:
        raise CheckpointError(f"{name}: expected shape {exact.shape} as in transformers, got {here.shape}.")
    if real is not None and exact.ndim == 3 and exact.shape[:2] == real.shape:  # others are of a decoder
        here, single, exact = here[real], single[real], exact[real]
    largest = float(np.abs(exact).max())
    reference = float(np.abs(single - exact).max())
    budget = FACTOR * reference + ULPS * float(ulp(largest, "float32"))
    return Layer(name, tuple(here.shape), largest, float(np.abs(here - exact).max()), reference, budget)


@contextmanager
def _readable(source: Path) -> Iterator[None]:
    """What the system does not let be read is an error of the source."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or source}: it cannot be read: {error.strerror or error}.") from error


def _beside(folder: Path) -> dict[str, bytes]:
    """What a checkpoint folder has beside its weights and its config, such as a tokenizer."""
    return {
        file.name: file.read_bytes()
        for file in sorted(folder.iterdir())
        if file.is_file()
        and file.suffix in BESIDE
        and file.name != CONFIG
        and not file.name.endswith(".safetensors.index.json")
        and file.stat().st_size <= BESIDE_LIMIT
    }

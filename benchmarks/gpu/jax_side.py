"""Ours and the peers in JAX: what each makes of a workload, and how long its compiled calls take.

All take (b n h d), which is what jax.nn, Flax, tokamax and FA4 take. A program is compiled once, and kept in a folder
where one is named: compiling by many processes, then timing by one, would else compile twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import pickle
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import timing
from benchmarks.gpu.checking import Unsupported, allowed, compared, refuse, sliced
from benchmarks.gpu.learn import call_of
from benchmarks.gpu.workloads import CHOICE, FOLDER, REFERENCE, SEED, Workload, cumulative, options, own, structure

PACKAGES = (
    "jax", "jaxlib", "flax", "triton", "jax-triton", "tokamax", "fa4-jax", "dew-flash-attn-cu13", "nvidia-cudnn-cu13",
    "numpy",
)  # fmt: skip
LARGEST = 2**31  # logits up to which xla is measured
Array = jax.Array


class Nobody:
    """The server that cutejax would share kernels with: it has none, and takes none."""

    def hgetall(self, key: str) -> dict[bytes, bytes]:
        """Nothing."""
        return {}

    def hset(self, key: str, mapping: dict[str, bytes]) -> None:
        """Nothing."""


def keep_kernels() -> None:
    """Have the kernels of FA4 kept beside the programs: cutejax keeps what it compiles only where it has a server."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return
    try:
        import cutejax
    except ImportError:  # no FA4, or not all of it
        return
    place = str(Path(folder) / "kernels")
    cutejax.configure_cache(url="nobody", hmac_key="nobody", client_factory=Nobody, spool_dir=place)


def versions() -> dict[str, str]:
    """Of what has a say in the figures."""
    return timing.versions(PACKAGES)


def machine() -> dict[str, Any]:
    """The device, by its own words."""
    if jax.default_backend() != "gpu":
        raise Unsupported("JAX finds no GPU")
    device = jax.devices()[0]
    return {"device": device.device_kind, "capability": str(getattr(device, "compute_capability", ""))}


class Data(NamedTuple):
    """The arrays of a workload: sets of (b n h d) that one program takes in a row, and what rules pairs out."""

    sets: list[dict[str, Array]]
    given: dict[str, Array]


def data(load: Workload) -> Data:
    """Drawn from one seed."""
    dtype = jnp.dtype(load.dtype)
    shapes = {
        "q": (load.b, load.i, load.h, load.d), "k": (load.b, load.j, load.hk, load.d),
        "v": (load.b, load.j, load.hk, load.d), "cotangent": (load.b, load.i, load.h, load.d),
    }  # fmt: skip
    if load.bias is not None:
        shapes["bias"] = load.bias
    if load.sinks:
        shapes["sinks"] = (load.h,)
    sets = []
    for n in range(load.copies):
        keys = jax.random.split(jax.random.key(SEED + n), len(shapes))
        sets.append(
            {
                name: jax.random.normal(key, shape, dtype)
                for key, (name, shape) in zip(keys, shapes.items(), strict=True)
            }
        )
    return Data(sets, {name: jnp.asarray(x) for name, x in structure(load).items()})


def trained(load: Workload) -> list[str]:
    """What has a gradient."""
    return ["q", "k", "v", *["bias"] * load.trained, *["sinks"] * load.sinks]


class Prepared(NamedTuple):
    """One entry in one mode, compiled: the program, its arguments, and what the library chose."""

    program: Any
    arguments: tuple
    chosen: str | None
    extra: int


def attention(entry: str, load: Workload, inputs: Data) -> tuple[Callable[..., Any], dict[str, Array], str | None]:
    """A function of (given, q, k, v and what else there is), what it is given, and what the library chose."""
    if entry == CHOICE or own(entry):
        return _ours(own(entry), load, inputs)
    if entry.startswith("jax.nn"):
        return (*_jax_nn(entry.split()[1], load, inputs), None)
    peer = {"tokamax": _tokamax, "flax": _flax, "FA4": _fa4, "FA3": _fa3}[entry]
    return (*peer(load, inputs), None)


def _ours(name: str | None, load: Workload, inputs: Data) -> tuple[Callable[..., Any], dict[str, Array], str]:
    import attend_jax
    import attend_jax.convert

    asked: dict[str, Any] = {**options(load), "implementation": name, "layout": "bnhd"}
    if load.dropout:
        asked["dropout_seed"] = SEED
    arrays = {key: x for key, x in inputs.sets[0].items() if key != "cotangent"}

    makes = load.documents and load.b == 1 and name in (None, "fa4", "fa3")

    def structured(given: dict[str, Array]) -> dict[str, Array]:
        """Of ids that a program makes itself it knows what peers are told: where documents start."""
        if not makes:
            return given
        return {"q_segment_ids": attend_jax.convert.segments_from_cu_seqlens(cumulative(load), load.j)}

    def function(given: dict[str, Array], **arrays: Array) -> Any:
        return attend_jax.attend(**arrays, **structured(given), **asked)

    explanation = attend_jax.explain(**arrays, **structured(inputs.given), **asked)
    if explanation.chosen is None:
        raise Unsupported(dict(explanation.rows).get(str(name)) or f"attend_jax has no {name}")
    return function, {} if makes else inputs.given, explanation.chosen


def _dense(load: Workload, inputs: Data) -> Array:
    """What is allowed, as a boolean mask."""
    query, key = jnp.arange(load.i)[:, None] + load.offset, jnp.arange(load.j)
    may = jnp.ones((1, 1, 1, load.j), bool)
    return allowed(load, inputs.given, query, key, may)


def _lengths(load: Workload, inputs: Data) -> Array | None:
    """The number of keys of each item, where they are all on the left."""
    if load.keys == "lengths":
        return inputs.given["kv_lengths"]
    return inputs.given["mask"].sum(1, dtype=jnp.int32) if load.keys == "padding" else None


def _named(load: Workload, inputs: Data, full: bool, as_lengths: bool) -> tuple[dict[str, Any], dict[str, Array]]:
    """What jax.nn and tokamax share: options, and arrays by their names."""
    asked: dict[str, Any] = {}
    if load.documents or load.mask or load.keys == "holes" or (load.causal and load.offset):
        mask = _dense(load, inputs)
        return asked, {"mask": jnp.broadcast_to(mask, (*mask.shape[:2], load.i, load.j)) if full else mask}
    if load.causal:
        asked["is_causal"] = True
    if load.window is not None:
        asked["local_window_size"] = (load.window - 1, 0)
    lengths = _lengths(load, inputs)
    if lengths is None:
        return asked, {}
    if as_lengths or load.keys == "lengths":
        return asked, {"key_value_seq_lengths": lengths}
    return asked, {"mask": inputs.given["mask"][:, None, None]}


def _jax_nn(implementation: str, load: Workload, inputs: Data) -> tuple[Callable[..., Any], dict[str, Array]]:
    refuse((load.softcap, "softcap"), (load.sinks, "sinks"), (load.dropout, "dropout"))
    if load.lse:
        raise Unsupported("it has no lse")
    if implementation == "xla" and load.logits > LARGEST:
        raise Unsupported(f"not run: its logits are {4 * load.logits / 1e9:.0f} GB at a time")
    cudnn = implementation == "cudnn"  # a mask for whole items is not taken, and padding goes as lengths
    asked, given = _named(load, inputs, full=cudnn, as_lengths=cudnn)

    def function(given: dict[str, Array], q: Array, k: Array, v: Array, bias: Array | None = None) -> Array:
        return jax.nn.dot_product_attention(q, k, v, bias=bias, implementation=implementation, **asked, **given)

    return function, given


def _tokamax(load: Workload, inputs: Data) -> tuple[Callable[..., Any], dict[str, Array]]:
    try:
        import tokamax
    except ImportError as error:
        raise Unsupported(f"it is not installed ({error})") from error
    refuse((load.sinks, "sinks"), (load.dropout, "dropout"), (load.lse, "lse"))
    asked, given = _named(load, inputs, full=False, as_lengths=False)
    if load.softcap is not None:
        asked["logits_soft_cap"] = load.softcap

    def function(given: dict[str, Array], q: Array, k: Array, v: Array, bias: Array | None = None) -> Array:
        return tokamax.dot_product_attention(q, k, v, bias=bias, **asked, **given)

    return function, given


def _flax(load: Workload, inputs: Data) -> tuple[Callable[..., Any], dict[str, Array]]:
    from flax import linen

    if not (load.dropout and load.causal):
        raise Unsupported("it is measured with dropout alone, where jax.nn has none")

    def function(given: dict[str, Array], q: Array, k: Array, v: Array) -> Array:
        mask = linen.make_causal_mask(jnp.ones(q.shape[:2]))
        return linen.dot_product_attention(
            q, k, v, mask=mask, dropout_rng=jax.random.wrap_key_data(given["key"]), dropout_rate=load.dropout,
            broadcast_dropout=False, deterministic=False,
        )  # fmt: skip

    return function, {"key": jax.random.key_data(jax.random.key(SEED))}


def _fa4(load: Workload, inputs: Data) -> tuple[Callable[..., Any], dict[str, Array]]:
    try:
        import fa4_jax
    except ImportError as error:
        raise Unsupported(f"it is not installed ({error})") from error
    refuse(
        (load.softcap, "softcap"), (load.sinks, "sinks"), (load.dropout, "dropout"), (load.bias, "bias"),
        (load.dtype == "float32", "float32"), (load.mask or load.keys in ("padding", "holes"), "key mask"),
    )  # fmt: skip
    asked: dict[str, Any] = {"causal": load.causal, "return_lse": load.lse}
    if load.window is not None:
        asked["window_size"] = (load.window - 1, 0)
    if not (load.documents or load.keys):
        return (lambda given, q, k, v: fa4_jax.flash_attn(q, k, v, **asked)), {}
    parts = load.documents or 1
    of_q, of_k = (np.arange(0, load.b * n + 1, n // parts, dtype=np.int32) for n in (load.i, load.j))
    given = {"of_q": jnp.asarray(of_q), "of_k": jnp.asarray(of_k)}
    if load.keys:
        given["used"] = inputs.given["kv_lengths"]

    def packed(given: dict[str, Array], q: Array, k: Array, v: Array) -> Array:
        flat = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        out = fa4_jax.flash_attn_varlen(*flat, given["of_q"], given["of_k"], seqused_k=given.get("used"), **asked)
        return out.reshape(q.shape)

    return packed, given


def _fa3(load: Workload, inputs: Data) -> tuple[Callable[..., Any], dict[str, Array]]:
    try:
        import dew_flash_attn as fa3
    except ImportError as error:
        raise Unsupported(f"it is not installed ({error})") from error
    refuse(
        (load.softcap, "softcap"), (load.dropout, "dropout"), (load.bias, "bias"), (load.dtype == "float32", "float32"),
        (load.mask or load.keys, "key mask, nor lengths of keys alone"), (load.lse, "lse"),
    )  # fmt: skip
    asked: dict[str, Any] = {"is_causal": load.causal}
    if load.window is not None:
        asked["window_size"] = (load.window - 1, 0)
    if not load.documents:
        return (lambda given, q, k, v, sinks=None: fa3.flash_mha(q, k, v, sinks=sinks, **asked)), {}
    size = load.j // load.documents
    bounds = jnp.arange(0, load.b * load.j + 1, size, dtype=jnp.int32)

    def packed(given: dict[str, Array], q: Array, k: Array, v: Array) -> Array:
        flat = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        return fa3.flash_mha_varlen(*flat, given["bounds"], size, **asked).reshape(q.shape)

    return packed, {"bounds": bounds}


def _program(function: Callable[..., Any], load: Workload, mode: str) -> Callable[..., Any]:
    """All sets in a row, one program: what a call costs the host is shared among them."""
    wanted = trained(load)

    def one(given: dict[str, Array], arrays: dict[str, Array]) -> Any:
        arrays = dict(arrays)
        cotangent = arrays.pop("cotangent")
        if mode == "forward":
            return function(given, **arrays)
        fixed = {name: x for name, x in arrays.items() if name not in wanted}

        def first(*learned: Array) -> tuple[Array, Any]:
            out = function(given, **fixed, **dict(zip(wanted, learned, strict=True)))
            return (out[0], out) if isinstance(out, tuple) else (out, out)

        _, pull, out = jax.vjp(first, *(arrays[name] for name in wanted), has_aux=True)
        return out, pull(cotangent)

    return lambda given, sets: [one(given, arrays) for arrays in sets]


def compiled(entry: str, load: Workload, mode: str, inputs: Data) -> Prepared:
    """The entry's program."""
    function, given, chosen = attention(entry, load, inputs)
    if entry == CHOICE and chosen and mode == "forward":
        chosen = chosen_alone(load, chosen)
    key = f"{f'{CHOICE} {chosen}' if chosen else entry}|{load}|{mode}"
    if entry in ("FA3", "FA4") or chosen in ("fa3", "fa4"):  # their kernels live in the process that traced the call
        key = None
    arguments = (given, inputs.sets)
    program, memory = _compiled(key, _program(function, load, mode), arguments)
    return Prepared(program, arguments, chosen, int(memory[0] + memory[1] / len(inputs.sets)))


def chosen_alone(load: Workload, chosen: str) -> str:
    """What the choice takes of a workload where nothing is differentiated."""
    return import_module("attend_jax.attend").alone(call_of("jax", load), chosen)  # a function has the module's name


def _compiled(key: str | None, function: Callable[..., Any], arguments: tuple) -> tuple[Any, tuple[int, int]]:
    """A program and its bytes of temporaries and of results: from the folder, or compiled now and put there."""
    from jax.experimental import serialize_executable

    folder, file = os.environ.get(FOLDER), None
    if folder and key is not None:
        key = "|".join((key, *(f"{name}{x}" for name, x in versions().items())))
        file = Path(folder) / f"{hashlib.sha256(key.encode()).hexdigest()}.pickle"
        if file.exists():
            payload, *trees, memory = pickle.loads(file.read_bytes())
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # some of tokamax's programs cannot be read again
                return serialize_executable.deserialize_and_load(payload, *trees), memory
    program = jax.jit(function).lower(*arguments).compile()
    found: Any = program.memory_analysis()
    memory = (found.temp_size_in_bytes, found.output_size_in_bytes)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}")
        beside.write_bytes(pickle.dumps((*serialize_executable.serialize(program), memory)))
        beside.replace(file)
    return program, memory


# Correctness: as in torch.


def reference(load: Workload, inputs: Data, both: bool) -> dict[str, Array]:
    """out, and the gradients of q, k, v, of the part of the call that `sliced` takes."""
    import attend_jax

    item, heads, _ = sliced(load)
    first = inputs.sets[0]
    q, cotangent = (first[name][item : item + 1, :, :heads].astype(jnp.float32) for name in ("q", "cotangent"))
    k, v = (first[name][item : item + 1, :, :1].astype(jnp.float32) for name in ("k", "v"))
    asked = {**options(load), "implementation": "einsum", "layout": "bnhd"}
    asked.pop("return_lse", None)
    asked.pop("dropout", None)  # what drops out is the library's own affair
    given = {name: x[item : item + 1] if x.shape[0] > 1 else x for name, x in inputs.given.items()}
    if load.bias is not None:
        bias = first["bias"]
        item_of_bias = item if bias.shape[0] > 1 else 0
        given["bias"] = bias[item_of_bias : item_of_bias + 1, : heads if bias.shape[1] > 1 else 1].astype(jnp.float32)
    if load.sinks:
        given["sinks"] = first["sinks"][:heads].astype(jnp.float32)

    def function(q: Array, k: Array, v: Array, given: dict[str, Array]) -> Array:
        return attend_jax.attend(q, k, v, **given, **asked)

    def with_gradients(q: Array, k: Array, v: Array, cotangent: Array, given: dict[str, Array]) -> dict[str, Array]:
        out, pull = jax.vjp(lambda *x: function(*x, given), q, k, v)
        return {"out": out} | (dict(zip(("dq", "dk", "dv"), pull(cotangent), strict=True)) if both else {})

    arguments = (q, k, v, cotangent, given)
    return _compiled(f"{REFERENCE}|{load}|{both}", with_gradients, arguments)[0](*arguments)


def check(ready: Prepared, load: Workload, mode: str, expected: dict[str, Array]) -> dict[str, Any]:
    """The entry's errors against the reference; Unsupported where it computes something else."""
    results = ready.program(*ready.arguments)[0]
    if mode == "both":
        results, (dq, dk, dv, *_) = results
        found = {"dq": dq, "dk": dk, "dv": dv}
    else:
        found = {}
    found["out"] = results[0] if isinstance(results, tuple | list) else results
    item, heads, rows = sliced(load)
    sums = {}
    for name, x in found.items():
        x = np.asarray(x)[item : item + 1, rows:, : 1 if name in ("dk", "dv") else heads].astype(np.float32).ravel()
        y = np.asarray(expected[name][:, rows:]).ravel()
        sums[name] = (float(np.dot(x, x)), float(np.dot(x, y)), float(np.dot(y, y)))
    return compared(load, sums)


# Time.


def calibrate(ready: Prepared, load: Workload, least: float) -> dict[str, Any]:
    """How many calls of the program in a row make a run, by what one more call takes."""
    for _ in range(2):
        _in_a_row(ready, 1)
    one, three = _in_a_row(ready, 1)[0], _in_a_row(ready, 3)[0]
    each = max((three - one) / 2, one / 50)
    return {"extra": ready.extra, "calls": max(2, min(40, math.ceil(least / each))) if one < 0.2 else 1, "host": 0.0}


def _in_a_row(ready: Prepared, calls: int) -> tuple[float, float]:
    """Seconds of so many calls of the program, and of sending them off alone."""
    time.sleep(timing.REST)
    started = time.perf_counter()
    for _ in range(calls):
        results = ready.program(*ready.arguments)
    sent = time.perf_counter() - started
    jax.block_until_ready(results)
    return time.perf_counter() - started, sent


def run(ready: Prepared, load: Workload, calls: int) -> dict[str, float | None]:
    """One run: so many calls, and three times as many, whose difference has no start and no end; then one by itself."""
    few, many = 1.0, 0.0
    while many <= few:  # something came between
        few, _ = _in_a_row(ready, calls)
        many, sent = _in_a_row(ready, 3 * calls)
    single, _ = _in_a_row(ready, 1)
    each = load.copies * calls
    return {
        "ms": 1000 * (many - few) / (2 * each), "host": 1000 * sent / (3 * each),
        "single": 1000 * single if load.copies == 1 else None,
    }  # fmt: skip


def overheads() -> dict[str, list[float]]:
    """CPU microseconds of a call on (1, 16, 2, 64): jitted, and as it is called without a jit."""
    import attend_jax

    q = jax.random.normal(jax.random.key(0), (1, 16, 2, 64), jnp.bfloat16)

    def ours(q: Array) -> Array:
        return attend_jax.attend(q, q, q, is_causal=True, layout="bnhd")

    def cudnn(q: Array) -> Array:
        return jax.nn.dot_product_attention(q, q, q, is_causal=True, implementation="cudnn")

    jitted, peer = jax.jit(ours), jax.jit(cudnn)
    last: list[Any] = []

    def keeping(function: Callable[[Array], Array]) -> Callable[[], None]:
        return lambda: last.__setitem__(slice(None), [function(q)])

    calls = {
        f"{CHOICE}, jitted": keeping(jitted), "jax.nn cudnn, jitted": keeping(peer),
        f"{CHOICE}, not jitted": keeping(ours),
    }  # fmt: skip
    return timing.timed_on_host(calls, lambda: jax.block_until_ready(last))

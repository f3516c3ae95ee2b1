"""Ours and the peers in PyTorch: what each makes of a workload, and how long its calls take on the device."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable
from operator import sub
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.gpu import timing
from benchmarks.gpu.checking import Unsupported, allowed, compared, refuse, sliced
from benchmarks.gpu.workloads import CHOICE, SEED, TURNED, Workload, cumulative, options, own, structure

Tensor = torch.Tensor
CYCLES = 2.0e9  # a second of torch.cuda._sleep, at the most
QUEUED = 600  # launches that wait for the device; it holds about a thousand
PACKAGES = ("torch", "triton", "flash-attn-4", "nvidia-cudnn-cu13", "nvidia-cutlass-dsl", "numpy")


def versions() -> dict[str, str]:
    """Of what has a say in the figures."""
    return timing.versions(PACKAGES) | {"torch": torch.__version__, "CUDA": str(torch.version.cuda)}


def machine() -> dict[str, Any]:
    """The device, by its own words."""
    if not torch.cuda.is_available():
        raise Unsupported("torch finds no GPU")
    facts = torch.cuda.get_device_properties(0)
    return {
        "device": facts.name, "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count, "memory in GB": round(facts.total_memory / 1e9),
        "L2 in MB": round(facts.L2_cache_size / 1e6),
    }  # fmt: skip


def rates() -> dict[str, float]:
    """What this device reaches in this run: GB/s of copying (bytes read and bytes written), TFLOP/s of a product."""
    source = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)  # 1 GB
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copying, product = [], []
    for _ in range(7):
        copying.append(_on_device(lambda: target.copy_(source), 5)[0])
        product.append(_on_device(lambda: a @ b, 5)[0])
    return {
        "copy GB/s": 4 * source.numel() / sorted(copying)[3] / 1e6,
        "product TFLOP/s": 2 * 8192**3 / sorted(product)[3] / 1e9,
    }


class Data(NamedTuple):
    """The arrays of a workload on the device.

    Attributes:
        sets: q, k, v, the cotangent of out, and bias and sinks where there are, (b h n d); they take turns.
        turned: the same with q, k, v and the cotangent as (b n h d), for those who want them so.
        given: mask, segment ids, lengths.
    """

    sets: list[dict[str, Tensor]]
    turned: list[dict[str, Tensor]]
    given: dict[str, Tensor]


def data(load: Workload, device: str = "cuda") -> Data:
    """Drawn from one seed."""
    generator = torch.Generator(device).manual_seed(SEED)
    dtype = getattr(torch, load.dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    sets, turned = [], []
    for _ in range(load.copies):
        found = {
            "q": draw(load.b, load.h, load.i, load.d), "k": draw(load.b, load.hk, load.j, load.d),
            "v": draw(load.b, load.hk, load.j, load.d), "cotangent": draw(load.b, load.h, load.i, load.d),
        }  # fmt: skip
        if load.bias is not None:
            found["bias"] = draw(*load.bias)
        if load.sinks:
            found["sinks"] = draw(load.h)
        sets.append(found)
        turned.append(
            {name: x.transpose(1, 2).contiguous() if x.ndim == 4 and name != "bias" else x for name, x in found.items()}
        )
    for each in (*sets, *turned):
        for name in trained(load):
            each[name] = each[name].detach().requires_grad_()
    return Data(sets, turned, {name: torch.from_numpy(x.copy()).to(device) for name, x in structure(load).items()})


def trained(load: Workload) -> list[str]:
    """What has a gradient."""
    return ["q", "k", "v", *["bias"] * load.trained, *["sinks"] * load.sinks]


class Prepared(NamedTuple):
    """One entry, ready: its call by mode and set of inputs, and what the library chose in each mode."""

    call: Callable[[str, int], Any]
    chosen: dict[str, str] | None
    layout: str


def prepare(entry: str, load: Workload, inputs: Data) -> Prepared:
    """Unsupported, with a reason, where the entry has no such call."""
    layout, chosen = "bhnd", None
    around: Callable[[], Any] = contextlib.nullcontext
    if entry == CHOICE or own(entry):
        function, chosen = _ours(own(entry), load, inputs, layout)
    elif entry == TURNED:
        layout = "bnhd"
        function, chosen = _ours("triton", load, inputs, layout)
    elif entry.startswith("SDPA"):
        function, around = _sdpa(entry.removeprefix("SDPA").strip(), load, inputs)
    elif entry == "FlexAttention":
        function = _flex(load, inputs)
    elif entry == "FA4":
        function, layout = _fa4(load, inputs), "bnhd"
    else:
        raise ValueError(f"no entry {entry!r}")
    sets = inputs.sets if layout == "bhnd" else inputs.turned
    wanted = trained(load)

    def call(mode: str, n: int) -> Any:
        given = sets[n % len(sets)]
        arrays = {name: x for name, x in given.items() if name != "cotangent"}
        if mode == "forward":
            with torch.no_grad(), around():
                return function(**arrays)
        with around():
            out = function(**arrays)
            first = out[0] if isinstance(out, tuple) else out
            return out, torch.autograd.grad(first, [given[name] for name in wanted], given["cotangent"])

    return Prepared(call, chosen, layout)


def _ours(name: str | None, load: Workload, inputs: Data, layout: str) -> tuple[Callable[..., Any], dict[str, str]]:
    import attend_torch
    import attend_torch.convert

    asked: dict[str, Any] = {**options(load), **inputs.given, "implementation": name, "layout": layout}
    first = (inputs.sets if layout == "bhnd" else inputs.turned)[0]
    if load.documents and load.b == 1 and name in (None, "fa4"):  # once for all calls, as for all layers of a model
        bounds = torch.from_numpy(cumulative(load)).to(first["q"].device)
        asked["q_segment_ids"] = attend_torch.convert.segments_from_cu_seqlens(bounds, load.j)
    if load.dropout:
        asked["dropout_seed"] = torch.tensor([SEED, 0], dtype=torch.uint32, device=first["q"].device)
    arrays = {key: x for key, x in first.items() if key != "cotangent"}
    explanation = attend_torch.explain(**arrays, **asked)
    if explanation.chosen is None:
        raise Unsupported(dict(explanation.rows).get(str(name)) or f"attend_torch has no {name}")
    with torch.no_grad():
        alone = attend_torch.explain(**arrays, **asked).chosen
    chosen = {"forward": alone or explanation.chosen, "both": explanation.chosen}
    return (lambda **arrays: attend_torch.attend(**arrays, **asked)), chosen


def _rules(load: Workload) -> bool:
    """Whether anything but top-left causality rules pairs out."""
    return bool(load.window or load.documents or load.keys or load.mask or (load.causal and load.offset))


def _dense(load: Workload, inputs: Data) -> Tensor:
    """What is allowed, as the mask that SDPA takes: no axis larger than it must be."""
    device = inputs.sets[0]["q"].device
    query = torch.arange(load.i, device=device)[:, None] + load.offset
    key = torch.arange(load.j, device=device)
    may = torch.ones(1, 1, 1, load.j, dtype=torch.bool, device=device)
    return allowed(load, inputs.given, query, key, may)


def _sdpa(backend: str, load: Workload, inputs: Data) -> tuple[Callable[..., Any], Callable[[], Any]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    refuse((load.softcap, "softcap"), (load.sinks, "sinks"), (load.lse, "lse"))
    mask = _dense(load, inputs) if _rules(load) else None
    asked: dict[str, Any] = {
        "is_causal": load.causal and mask is None, "dropout_p": load.dropout, "enable_gqa": load.h != load.hk
    }  # fmt: skip

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask if bias is None else bias, **asked)

    kinds = {
        "cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }  # fmt: skip
    around = (lambda: sdpa_kernel(kinds[backend])) if backend else contextlib.nullcontext
    return function, around


def _flex(load: Workload, inputs: Data) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    if load.dropout:
        raise Unsupported("it has no dropout")
    given = inputs.given
    keys, ids, mask = given.get("mask"), given.get("q_segment_ids"), given.get("mask")
    lengths, offset, window, softcap = given.get("kv_lengths"), load.offset, load.window, load.softcap
    by_item = bool(load.keys)

    def may(b: Any, h: Any, i: Any, j: Any) -> Any:
        allowed = j >= 0
        if load.causal:
            allowed = allowed & (j <= i + offset)
        if window is not None:
            allowed = allowed & (j > i + offset - window)
        if ids is not None:
            allowed = allowed & (ids[b, i] == ids[b, j])
        if lengths is not None:
            allowed = allowed & (j < lengths[b])
        if load.mask and mask is not None:
            allowed = allowed & mask[0, 0, i, j]
        elif keys is not None:
            allowed = allowed & keys[b, j]
        return allowed

    block = None
    if load.causal or _rules(load):
        device = inputs.sets[0]["q"].device
        block = create_block_mask(may, load.b if by_item else None, None, load.i, load.j, device=device)
    grouped, by_bias = load.h != load.hk, (load.bias or (1,))[0]

    def whole(block: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None) -> Any:
        def score(s: Tensor, b: Any, h: Any, i: Any, j: Any) -> Tensor:
            if softcap is not None:
                return softcap * torch.tanh(s / softcap)
            if bias is not None:
                return s + (bias[0, h, i, j] if by_bias == 1 else bias[b, h, i, j])
            return s

        changes = score if softcap is not None or bias is not None else None
        if not load.lse and sinks is None:
            return flex_attention(q, k, v, score_mod=changes, block_mask=block, enable_gqa=grouped)
        out, aux = flex_attention(
            q, k, v, score_mod=changes, block_mask=block, enable_gqa=grouped, return_aux=AuxRequest(lse=True)
        )
        if sinks is None:
            return out, aux.lse
        return out * torch.sigmoid(aux.lse - sinks[:, None])[..., None].to(out.dtype)  # one more logit below the line

    compiled = torch.compile(whole, dynamic=False, backend="inductor" if inputs.sets[0]["q"].is_cuda else "eager")

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, sinks: Tensor | None = None) -> Any:
        return compiled(block, q, k, v, bias, sinks)

    return function


def _fa4(load: Workload, inputs: Data) -> Callable[..., Any]:
    try:
        from flash_attn.cute import interface as fa4
    except ImportError as error:
        raise Unsupported(f"it is not installed ({error})") from error
    refuse((load.dropout, "dropout"), (load.bias, "bias"), (load.mask, "mask (i, j)"))
    if load.keys in ("holes", "padding"):
        raise Unsupported("it has no key mask; with padding as lengths it has a row of its own")
    if load.dtype == "float32":
        raise Unsupported("it has no float32")
    asked: dict[str, Any] = {"causal": load.causal, "return_lse": load.lse}
    if load.window is not None:
        asked |= {"causal": False, "window_size": (load.window - 1, 0)}
    if load.softcap is not None:
        asked["softcap"] = load.softcap
    device = inputs.sets[0]["q"].device
    if load.documents:
        size = load.j // load.documents
        bounds = torch.arange(0, load.b * load.j + 1, size, dtype=torch.int32, device=device)

        def packed(q: Tensor, k: Tensor, v: Tensor) -> Any:
            flat = (x.flatten(0, 1) for x in (q, k, v))
            out = fa4.flash_attn_varlen_func(
                *flat, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=size, max_seqlen_k=size, **asked
            )
            return (out[0] if isinstance(out, tuple) else out).view(q.shape)

        return packed
    lengths = inputs.given.get("kv_lengths")

    def function(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Any:
        if lengths is not None:
            out = fa4.flash_attn_varlen_func(q, k, v, seqused_k=lengths, **asked)
        else:
            out = fa4.flash_attn_func(q, k, v, learnable_sink=sinks, **asked)
        return out if load.lse else out[0] if isinstance(out, tuple) else out

    return function


# Correctness: one item and the heads of one key/value head, in float32, by the formula.


def reference(load: Workload, inputs: Data, both: bool) -> dict[str, Tensor]:
    """out, and the gradients of q, k, v, of the part of the call that `sliced` takes."""
    import attend_torch

    item, heads, _ = sliced(load)
    q, k, v, cotangent = (
        inputs.sets[0][name][item : item + 1].detach().float() for name in ("q", "k", "v", "cotangent")
    )
    q, cotangent, k, v = q[:, :heads], cotangent[:, :heads], k[:, :1], v[:, :1]
    asked = dict(options(load))
    asked.pop("return_lse", None)
    for name, x in inputs.given.items():
        asked[name] = x[item : item + 1] if x.shape[0] > 1 else x
    if load.bias is not None:
        bias = inputs.sets[0]["bias"].detach()
        asked["bias"] = bias[item if bias.shape[0] > 1 else 0][None, : heads if bias.shape[1] > 1 else 1].float()
    if load.sinks:
        asked["sinks"] = inputs.sets[0]["sinks"].detach()[:heads].float()
    asked.pop("dropout", None)  # what drops out is the library's own affair
    given = [x.requires_grad_(both) for x in (q, k, v)]
    out = attend_torch.attend(*given, **asked, implementation="einsum")
    found = {"out": out.detach()}
    if both:
        found |= zip(("dq", "dk", "dv"), torch.autograd.grad(out, given, cotangent), strict=True)
    return found


def check(ready: Prepared, load: Workload, mode: str, expected: dict[str, Tensor]) -> dict[str, Any]:
    """The entry's errors against the reference; Unsupported where it computes something else."""
    results = ready.call(mode, 0)
    if mode == "both":
        out, (dq, dk, dv, *_) = results
        found = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    else:
        found = {"out": results}
    item, heads, rows = sliced(load)

    def part(name: str) -> Tensor:
        x = found[name][0] if name == "out" and isinstance(found[name], tuple) else found[name]
        x = x.detach()[item : item + 1]
        x = x.transpose(1, 2) if ready.layout == "bnhd" else x
        return x[:, : (1 if name in ("dk", "dv") else heads)].double()

    both = {name: (part(name), expected[name].double()) for name in found}

    def sums(x: Tensor, y: Tensor) -> tuple[float, float, float]:
        x, y = x[:, :, rows:], y[:, :, rows:]
        return float((x * x).sum()), float((x * y).sum()), float((y * y).sum())

    return compared(load, {name: sums(*pair) for name, pair in both.items()})


# Time.


def _on_device(call: Callable[[], Any], count: int, host: float = 2e-4) -> tuple[float, float]:
    """Milliseconds of a call on the device, `count` of them queued behind a wait, and of the host: the median call's.

    The first calls after a rest find the host's caches cold, and one may be interrupted: neither is what a call in a
    row costs. Where the wait ends before all are launched, the host was waited for as well: once more, behind a longer
    one.
    """
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        time.sleep(timing.REST)
        torch.cuda._sleep(int(CYCLES * min(0.3, 1.3 * host * count + 2e-4)))
        clock = [time.perf_counter()]
        begin.record()
        for _ in range(count):
            call()
            clock.append(time.perf_counter())
        late = begin.query()
        end.record()
        host = (clock[-1] - clock[0]) / count
        torch.cuda.synchronize()
        if not late:
            break
    return begin.elapsed_time(end) / count, 1000 * median(map(sub, clock[1:], clock))


def calibrate(ready: Prepared, mode: str, least: float) -> dict[str, Any]:
    """After two calls to warm up: how many in a row make a run, the host's part of a call, and its peak memory."""
    for n in range(2):
        ready.call(mode, n)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ready.call(mode, 0)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    started = time.perf_counter()
    ready.call(mode, 0)
    host = time.perf_counter() - started
    torch.cuda.synchronize()
    whole = time.perf_counter() - started
    count = max(2, min(math.ceil(least / whole), 40, int(0.15 / max(host, 1e-6)), QUEUED // 8))
    return {"extra": extra, "calls": count if whole < 0.2 else 1, "host": host}


def run(ready: Prepared, mode: str, calls: int, host: float) -> dict[str, float]:
    """One run: `calls` of them queued, then one by itself on an idle device, its launch included."""
    turn = itertools.count()
    device, launch = _on_device(lambda: ready.call(mode, next(turn)), calls, host)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    ready.call(mode, next(turn))
    end.record()
    torch.cuda.synchronize()
    return {"ms": device, "host": launch, "single": begin.elapsed_time(end)}


def overheads() -> dict[str, list[float]]:
    """CPU microseconds of a call on (1, 2, 16, 64), each of 9 interleaved runs of 100 calls."""
    import attend_torch

    q = torch.randn(1, 2, 16, 64, device="cuda", dtype=torch.bfloat16)
    calls: dict[str, Callable[[], Any]] = {"SDPA": lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True)}
    for name in (None, "sdpa", "triton", "fa4"):
        if name is None or attend_torch.explain(q, q, q, is_causal=True, implementation=name).chosen:
            calls[CHOICE if name is None else f"{CHOICE} {name}"] = _tiny(q, name)
    return timing.timed_on_host(calls, torch.cuda.synchronize)


def _tiny(q: Tensor, name: str | None) -> Callable[[], Any]:
    import attend_torch

    return lambda: attend_torch.attend(q, q, q, is_causal=True, implementation=name)


def forget() -> None:
    """What one workload leaves: programs and memory."""
    torch._dynamo.reset()
    torch.cuda.empty_cache()

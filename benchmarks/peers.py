"""Every entry of the tables as a function without arguments. A framework is imported where an entry needs it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.workloads import HEAD_SIZE, HEADS, Entry, Workload

SOFTCAP, DROPOUT, SEED = 30.0, 0.1, 20
WARM = 32
JAX_EVENT = "/jax/core/compile/backend_compile_duration"


class Prepared(NamedTuple):
    """A call, ready to be made.

    Attributes:
        call: makes it, waits for it, and returns its results.
        chosen: the implementation that it takes, where this library chooses.
        compile_seconds, compile_cpu_seconds: wall and CPU time of tracing and compiling it, where it was compiled here.
    """

    call: Callable[[], Any]
    chosen: str | None = None
    compile_seconds: float | None = None
    compile_cpu_seconds: float | None = None


@cache
def arrays(workload: Workload, layout: str) -> dict[str, np.ndarray]:
    """q, k, v, the cotangent of out, and what the feature needs, in float32."""
    random = np.random.default_rng(workload.n)
    dv = 2 * HEAD_SIZE if workload.feature == "dv = 2 d" else HEAD_SIZE

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    shape = {"bhnd": (1, HEADS, workload.n), "bnhd": (1, workload.n, HEADS)}[layout]
    sizes = {"q": HEAD_SIZE, "k": HEAD_SIZE, "v": dv, "cotangent": dv}
    found = {name: draw(*shape, size) for name, size in sizes.items()}
    if workload.feature.startswith("bias"):
        found["bias"] = draw(1, HEADS if workload.feature == "bias of each head" else 1, workload.n, workload.n)
    if workload.feature == "sinks":
        found["sinks"] = draw(HEADS)
    return found


def prepare(entry: Entry, workload: Workload) -> Prepared:
    """Everything but the call: inputs made, and compiled what is compiled."""
    return (_prepare_jax if entry.framework == "jax" else _prepare_torch)(entry, workload)


def _prepare_jax(entry: Entry, workload: Workload) -> Prepared:
    import jax
    import jax.numpy as jnp

    inputs = [jnp.asarray(x, workload.dtype) for x in arrays(workload, entry.layout).values()]
    attention = _jax_attention(entry.name, workload.causal)

    def with_gradients(q: Any, k: Any, v: Any, cotangent: Any) -> tuple:
        out, pull = jax.vjp(attention, q, k, v)
        return out, pull(cotangent)

    # What a first call loads is not its memory.
    jax.block_until_ready(jax.jit(jax.grad(lambda x: jnp.exp(x @ x).sum()))(jnp.ones((8, 8))))
    wall, cpu = time.perf_counter(), time.process_time()
    if workload.backward:
        compiled = jax.jit(with_gradients).lower(*inputs).compile()
    else:
        compiled, inputs = jax.jit(attention).lower(*inputs[:3]).compile(), inputs[:3]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    chosen = None
    if entry.name.startswith("attend_jax"):
        import attend_jax

        chosen = attend_jax.explain(*inputs[:3], is_causal=workload.causal, implementation=_named(entry)).chosen
    return Prepared(partial(_waited, compiled, *inputs), chosen, wall, cpu)


def _named(entry: Entry) -> str | None:
    """The implementation that the entry's name names: "attend_jax" alone leaves the choice."""
    return entry.name.partition(",")[0].partition(" ")[2] or None


def _jax_attention(name: str, causal: bool) -> Callable:
    import jax
    import jax.numpy as jnp

    if name == "jax.nn":
        return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=causal)
    if name == "flax.linen":
        from flax import linen

        def flax_attention(q: Any, k: Any, v: Any) -> Any:
            mask = linen.make_causal_mask(jnp.ones(q.shape[:2])) if causal else None
            return linen.dot_product_attention(q, k, v, mask=mask)

        return flax_attention
    if name == "jnp einsum and softmax":

        def naive(q: Any, k: Any, v: Any) -> Any:
            s = jnp.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
            if causal:
                s = jnp.where(jnp.tri(s.shape[2], s.shape[3], dtype=bool), s, -jnp.inf)
            return jnp.einsum("bhij,bhjd->bhid", jax.nn.softmax(s), v)

        return naive
    import attend_jax

    chosen = name.partition(" ")[2] or None
    return lambda q, k, v: attend_jax.attend(q, k, v, is_causal=causal, implementation=chosen)


def _prepare_torch(entry: Entry, workload: Workload) -> Prepared:
    import torch

    values = arrays(workload, entry.layout).items()
    inputs = {name: torch.from_numpy(x).to(getattr(torch, workload.dtype)) for name, x in values}
    cotangent = inputs.pop("cotangent")
    attention = _torch_attention(entry, workload)
    if entry.name.endswith("compiled"):
        attention = torch.compile(attention)
    trained = [x.requires_grad_(workload.backward) for x in inputs.values()]

    def call() -> Any:
        out = attention(**inputs)
        return (out, torch.autograd.grad(out, trained, cotangent)) if workload.backward else out

    if not entry.name.endswith("compiled") and workload.n > WARM:  # as above
        _prepare_torch(entry, workload._replace(n=WARM)).call()
    if entry.name.endswith("compiled"):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        return Prepared(call, None, time.perf_counter() - wall, time.process_time() - cpu)
    if not entry.name.startswith("attend_torch"):
        return Prepared(call)
    import attend_torch

    asked: dict[str, Any] = {**inputs, **_options(workload), "is_causal": workload.causal}
    return Prepared(call, attend_torch.explain(**asked, implementation=_named(entry)).chosen)


def _options(workload: Workload) -> dict[str, Any]:
    if workload.feature == "softcap":
        return {"softcap": SOFTCAP}
    if workload.feature == "dropout":
        return {"dropout": DROPOUT, "dropout_seed": _seed()}
    return {}


def _seed() -> Any:
    """A tensor: an int would be a constant of what torch.compile makes."""
    import torch

    return torch.tensor(SEED)


def _torch_attention(entry: Entry, workload: Workload) -> Callable:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    causal = workload.causal
    if entry.name.startswith("attend_torch"):
        import attend_torch

        options = {**_options(workload), "is_causal": causal, "implementation": _named(entry)}
        return lambda q, k, v, bias=None, sinks=None: attend_torch.attend(q, k, v, bias=bias, sinks=sinks, **options)
    if entry.name == "x-transformers":
        from x_transformers.attend import Attend

        attend = Attend(causal=causal)
        return lambda q, k, v: attend(q, k, v)[0]
    if entry.name == "torch SDPA, math path":

        def math_path(q: Any, k: Any, v: Any) -> Any:
            with sdpa_kernel(SDPBackend.MATH):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return math_path
    if workload.feature in ("softcap", "sinks"):  # what SDPA has not is written out, as models write it

        def written_out(q: Any, k: Any, v: Any, sinks: Any = None) -> Any:
            s = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            if sinks is None:
                return (SOFTCAP * torch.tanh(s / SOFTCAP)).softmax(-1) @ v
            column = sinks[None, :, None, None].expand(q.shape[0], -1, q.shape[2], 1)
            return torch.cat([s, column], -1).softmax(-1)[..., :-1] @ v

        return written_out
    dropout = DROPOUT if workload.feature == "dropout" else 0.0
    return lambda q, k, v, bias=None: F.scaled_dot_product_attention(q, k, v, bias, dropout, causal)


def _waited(function: Callable, *inputs: Any) -> Any:
    import jax

    return jax.block_until_ready(function(*inputs))


def products() -> dict[str, float]:
    """GFLOP/s of float32 products on this core by framework and size, and ns of an exponential; medians of a few."""
    import jax
    import jax.numpy as jnp
    import torch

    found = {}
    random = np.random.default_rng(0)

    def nanoseconds(call: Callable[[], Any], number: int) -> float:
        times = []
        for _ in range(6):
            begin = time.process_time()
            for _ in range(number):
                call()
            times.append((time.process_time() - begin) / number)
        return 1e9 * float(np.median(times[1:]))

    def rate(call: Callable[[], Any], flops: int) -> float:
        return flops / nanoseconds(call, max(1, 2**31 // flops))

    for rows, inner, columns in ((1024, 1024, 1024), (256, 64, 256), (256, 256, 64)):
        x, y = (random.standard_normal(shape, np.float32) for shape in ((rows, inner), (inner, columns)))
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        c, d = jnp.asarray(x), jnp.asarray(y)
        product = jax.jit(jnp.matmul).lower(c, d).compile()
        size, flops = f"{rows} x {inner} x {columns}", 2 * rows * inner * columns
        found[f"torch {size}"] = rate(partial(torch.matmul, a, b), flops)
        found[f"jax {size}"] = rate(partial(_waited, product, c, d), flops)
    x = random.standard_normal((512, 256), np.float32)  # a block of logits
    a, c = torch.from_numpy(x), jnp.asarray(x)
    exp = jax.jit(jnp.exp).lower(c).compile()
    for framework, call in (("torch", partial(torch.exp, a, out=a.clone())), ("jax", partial(_waited, exp, c))):
        found[f"exp in {framework}"] = nanoseconds(call, 200) / x.size
    return found


def compilations(n: int, backward: bool) -> int:
    """How often JAX compiles for two calls of one shape with the values of their arrays different."""
    import jax
    import jax.numpy as jnp

    import attend_jax

    def attention(q: Any, k: Any, v: Any) -> Any:
        return attend_jax.attend(q, k, v, implementation="blockwise")

    @jax.jit
    def gradients(q: Any, k: Any, v: Any) -> Any:
        out, pull = jax.vjp(attention, q, k, v)
        return out, pull(q)

    names = ("q", "k", "v")
    first = [jnp.asarray(arrays(Workload(n), "bhnd")[name]) for name in names]
    second = [jnp.asarray(x) for x in (np.roll(np.asarray(x), 1, 2) for x in first)]
    count = 0

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        nonlocal count
        count += event == JAX_EVENT

    jax.monitoring.register_event_duration_secs_listener(listen)
    for inputs in (first, second):
        jax.block_until_ready((gradients if backward else attention)(*inputs))
    return count


def versions() -> dict[str, str]:
    """Of Python and of every package that is measured, and a hash of the sources that this library's times hang on."""
    import hashlib
    import platform
    from importlib.metadata import version

    names = ("torch", "jax", "jaxlib", "flax", "x-transformers", "numpy", "attend-twin")
    root = Path(__file__).resolve().parent.parent
    sources = [*sorted(root.glob("attend_*/implementations/*.py")), *sorted(root.glob("attend_*/arrays.py"))]
    sources += [root / "shared" / "attend_shared" / f"{name}.py" for name in ("blocks", "meaning")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    return {"python": platform.python_version(), **{name: version(name) for name in names}, "sources": digest}

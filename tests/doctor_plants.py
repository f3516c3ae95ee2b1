"""Attentions for the doctor to find out: some planted, some as their libraries have them. It loads them by name in
processes of its own, so what is wrong with them is wrong there. And cases for attend parity that are lost there."""

from __future__ import annotations

import os
import signal
import time
from importlib import import_module
from typing import Any

import numpy as np

from attend_shared.cases import Case
from attend_shared.compare import Outcome
from attend_shared.errors import UnsupportedError
from attend_shared.problems import Problem


def wrong_at_64(problem: Problem, implementation: str, device: str) -> Outcome:
    """torch's implementation of that name, right but for lengths of 64 modulo 128: there out is 1 % too large."""
    import attend_torch.bridge
    from attend_torch.implementations import table

    module = next(entry.module for entry in table() if entry.name == implementation)
    right = module.attend

    def attend(call: Any, arrays: Any) -> Any:
        out, lse = right(call, arrays)
        return (out + 0.01 * out.detach() if call.i % 128 == 64 else out), lse

    module.attend = attend
    try:
        return attend_torch.bridge.evaluate(problem, implementation, device)
    finally:
        module.attend = right


def wrong_gradient(problem: Problem, implementation: str, device: str) -> Outcome:
    """The oracle's answer with one wrong number in dk."""
    outcome = right(problem, implementation, device)
    outcome.gradients["k"][0, 1, 2:3, 3] += 1  # a call of one key has no such number
    return outcome


def right(problem: Problem, implementation: str, device: str) -> Outcome:
    """The oracle's answer, in q's dtype."""
    from attend_shared import oracle
    from attend_shared.dtypes import round_to

    outcome = oracle.evaluate(problem)
    dtype = problem.dtypes["q"]
    gradients = {name: round_to(x, dtype).astype(np.float64) for name, x in outcome.gradients.items()}
    return Outcome(round_to(outcome.out, dtype).astype(np.float64), outcome.lse, gradients)


def trouble(problem: Problem, implementation: str, device: str) -> Outcome:
    """Right, but for one query: dies; one key: hangs; other lengths than 128: raises; a mask: refuses."""
    q, k = problem.arguments["q"].shape, problem.arguments["k"].shape
    if q[2] == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if k[2] == 1:
        time.sleep(600)
    if q[2] != 128:
        raise RuntimeError("an illegal memory access was encountered")
    if "mask" in problem.arguments:
        raise UnsupportedError(((implementation, "it has no mask"),))
    os.write(1, b"what a library prints is not an answer\n")
    return right(problem, implementation, device)


def deadly(problem: Problem, implementation: str, device: str) -> Outcome:
    """Dies every time."""
    os._exit(7)


class Lost(Case):
    """A case in which torch's einsum dies, and JAX's hangs."""

    def build(self) -> Problem:
        problem = super().build()
        _lose("torch", problem, lambda: os.kill(os.getpid(), signal.SIGSEGV))
        _lose("jax", problem, lambda: time.sleep(600))
        return problem


class Hung(Case):
    """A case in which torch's einsum hangs."""

    def build(self) -> Problem:
        problem = super().build()
        _lose("torch", problem, lambda: time.sleep(600))
        return problem


def _lose(framework: str, problem: Problem, lose: Any) -> None:
    bridge = import_module(f"attend_{framework}.bridge")
    right = bridge.evaluate

    def evaluate(asked: Problem, implementation: str, device: str) -> Outcome:
        if asked is problem and implementation == "einsum":
            lose()
        return right(asked, implementation, device)

    bridge.evaluate = evaluate


def fickle(problem: Problem, implementation: str, device: str) -> Outcome:
    """Right, with other bits each time."""
    outcome = right(problem, implementation, device)
    outcome.out[0, 0, 0, 0] *= 1 + 2.0**-30 * (time.perf_counter_ns() % 1000 + 1)
    return outcome


def _asked(problem: Problem, implementation: str) -> dict[str, Any]:
    """The arguments, if a library's own attention has them all."""
    asked = dict(problem.arguments)
    extra = sorted(asked.keys() - {"q", "k", "v", "mask", "bias", "is_causal", "scale"})
    if extra or problem.lse_cotangent is not None:
        raise UnsupportedError(((implementation, f"it has no {', '.join(extra) or 'lse'}"),))
    mask = asked.get("mask")
    if mask is not None and asked.get("is_causal"):
        square = np.tri(asked["q"].shape[2], asked["k"].shape[2], dtype=bool)
        asked |= {"mask": mask[:, None, None] & square, "is_causal": False}
    elif mask is not None and mask.ndim == 2:
        asked["mask"] = mask[:, None, None]
    return asked


def _of_bias(problem: Problem) -> dict[str, np.ndarray]:
    """The gradient of a bias, which these are not asked for, from the oracle."""
    from attend_shared import oracle

    return {"bias": oracle.evaluate(problem).gradients["bias"]} if "bias" in problem.arguments else {}


def raw_sdpa(problem: Problem, implementation: str, device: str) -> Outcome:
    """torch.nn.functional.scaled_dot_product_attention as it is, with a boolean mask."""
    import torch
    import torch.nn.functional as F

    asked = _asked(problem, implementation)
    dtype = getattr(torch, problem.dtypes["q"])
    q, k, v = leaves = [torch.from_numpy(asked[x]).to(device, dtype).requires_grad_() for x in "qkv"]
    mask = asked.get("mask", asked.get("bias"))
    if mask is not None:
        mask = torch.from_numpy(mask).to(device) if mask.dtype == np.bool_ else torch.from_numpy(mask).to(device, dtype)
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=asked.get("is_causal", False), scale=asked.get("scale"),
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    gradients = torch.autograd.grad(out, leaves, torch.from_numpy(problem.out_cotangent).to(device, dtype))
    held = [x.detach().to("cpu", torch.float64).numpy() for x in (out, *gradients)]
    return Outcome(held[0], None, dict(zip("qkv", held[1:], strict=True)) | _of_bias(problem))


def raw_jax_nn(problem: Problem, implementation: str, device: str) -> Outcome:
    """jax.nn.dot_product_attention as it is, "xla" or "cudnn" by the last word of its name."""
    import jax
    import jax.numpy as jnp

    asked = _asked(problem, implementation)
    dtype = jnp.dtype(problem.dtypes["q"])
    options: dict[str, Any] = {
        name: jnp.asarray(asked[name]) for name in ("mask", "bias") if asked.get(name) is not None
    }
    options |= {name: asked[name] for name in ("is_causal", "scale") if name in asked}

    @jax.jit
    def program(leaves: Any, cotangent: Any) -> Any:
        def forward(q: Any, k: Any, v: Any) -> Any:
            q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
            which: Any = implementation.split()[-1]
            return jax.nn.dot_product_attention(q, k, v, implementation=which, **options).swapaxes(1, 2)

        out, pullback = jax.vjp(forward, *leaves)
        return out, *pullback(cotangent)

    results = program([jnp.asarray(asked[x], dtype) for x in "qkv"], jnp.asarray(problem.out_cotangent, dtype))
    held = [np.asarray(x.astype(jnp.float32)).astype(np.float64) for x in results]
    return Outcome(held[0], None, dict(zip("qkv", held[1:], strict=True)) | _of_bias(problem))

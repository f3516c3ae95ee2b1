"""A problem in NumPy, taken through this framework: what tests, parity runs and the demo compare with the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attend_jax.attend import attend
from attend_jax.implementations import PACKING, table
from attend_shared.cases import Problem
from attend_shared.compare import Outcome


def devices() -> tuple[str, ...]:
    """The devices that a problem can be taken to here."""
    return {"cpu": ("cpu",), "gpu": ("cuda",)}.get(backend := jax.default_backend(), (backend,))


def evaluate(problem: Problem, implementation: str | Sequence[str] | None, device: str = "cpu") -> Outcome:
    """Forward and backward of `attend` on a problem, compiled as one program.

    Args:
        problem: see `attend_shared.cases.Problem`. Its memory says nothing here: JAX arrays have no strides.
        implementation: as in `attend`.
        device: where JAX runs, "cpu" or "cuda".

    Returns:
        out, lse (where the problem has its cotangent), and the gradients of q, k, v, and of bias, sinks and the table
        of a score_fn where given.

    Raises:
        UnsupportedError: where the implementation refuses.
    """
    if device not in devices():
        raise ValueError(
            f"device: expected one of {', '.join(devices())}, where JAX runs, got {device!r}. Set JAX_PLATFORMS."
        )
    wants_lse = problem.lse_cotangent is not None
    with jax.enable_x64(True) if "float64" in problem.dtypes.values() else nullcontext():
        arguments: dict[str, Any] = {
            name: jnp.asarray(value, problem.dtypes.get(name)) if isinstance(value, np.ndarray) else value
            for name, value in problem.arguments.items()
        }
        functions = {name: arguments.pop(name) for name in ("score_fn", "mask_fn") if name in arguments}
        if "score_fn" in functions:
            arguments["table"] = jnp.asarray(functions["score_fn"].table, problem.dtypes["table"])
        if "mask_fn" in functions:
            arguments["mask_fn table"] = jnp.asarray(functions["mask_fn"].table)
        leaves: dict[str, Any] = {name: arguments.pop(name) for name in problem.dtypes}
        data: dict[str, Any] = {
            name: arguments.pop(name) for name, value in list(arguments.items()) if isinstance(value, jax.Array)
            if not (implementation in PACKING and name.endswith("segment_ids"))  # which it must know by then
        }  # fmt: skip
        cotangents: Any = jnp.asarray(problem.out_cotangent, problem.dtypes["q"])
        if wants_lse:
            accumulation = "float64" if problem.dtypes["q"] == "float64" else "float32"
            cotangents = (cotangents, jnp.asarray(problem.lse_cotangent, accumulation))

        @jax.jit
        def program(leaves: dict, data: dict, cotangents: Any) -> tuple[Any, dict]:
            def forward(leaves: dict) -> Any:
                given = leaves | data | arguments
                tables = {"score_fn": given.pop("table", None), "mask_fn": given.pop("mask_fn table", None)}
                given |= {name: function.of(tables[name]) for name, function in functions.items()}
                return attend(**given, implementation=implementation, return_lse=wants_lse)

            result, pullback = jax.vjp(forward, leaves)
            return result, pullback(cotangents)[0]

        result, gradients = program(leaves, data, cotangents)
        out, lse = result if wants_lse else (result, None)
        return Outcome(
            _numpy(out), None if lse is None else _numpy(lse), {name: _numpy(x) for name, x in gradients.items()}
        )


def call(arguments: dict[str, Any], device: str = "cpu") -> Any:
    """`attend` on NumPy arguments as they are, for calls that must raise."""
    return attend(**arguments)


def implementations() -> tuple[str, ...]:
    """The names, in order of preference."""
    return tuple(entry.name for entry in table())


def _numpy(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x).astype(np.float64)

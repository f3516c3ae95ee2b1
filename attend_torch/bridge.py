"""A problem in NumPy, taken through this framework: what tests, parity runs and the demo compare with the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from attend_shared.cases import Problem
from attend_shared.compare import Outcome
from attend_torch.attend import attend
from attend_torch.implementations import table


def devices() -> tuple[str, ...]:
    """The devices that a problem can be taken to here."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def evaluate(problem: Problem, implementation: str | Sequence[str] | None, device: str = "cpu") -> Outcome:
    """Forward and backward of `attend` on a problem.

    Args:
        problem: see `attend_shared.cases.Problem`. Its memory is honoured: strided and expanded tensors stay so.
        implementation: as in `attend`.
        device: "cpu" or "cuda".

    Returns:
        out, lse (where the problem has its cotangent), and the gradients of q, k, v, and of bias, sinks and the table
        of a score_fn where given.

    Raises:
        UnsupportedError: where the implementation refuses.
    """
    arguments = _tensors(problem, device)
    tables = {name: arguments.pop(f"{name} table", None) for name in ("score_fn", "mask_fn")}
    captured = {"table": tables["score_fn"]}
    leaves = {name: (arguments | captured)[name].requires_grad_() for name in problem.dtypes}
    inputs: dict[str, Any] = {
        **arguments,
        **{name: arguments[name].of(table) for name, table in tables.items() if table is not None},
        **{name: _lay_out(name, leaves[name], problem.memory) for name in ("q", "k", "v")},
    }
    wants_lse = problem.lse_cotangent is not None
    result = attend(**inputs, implementation=implementation, return_lse=wants_lse)
    out, lse = result if wants_lse else (result, None)
    outputs, cotangents = [out], [_tensor(problem.out_cotangent, problem.dtypes["q"], device)]
    if lse is not None and problem.lse_cotangent is not None:
        outputs.append(lse)
        cotangents.append(torch.from_numpy(np.array(problem.lse_cotangent)).to(device, lse.dtype))
    wanted = {name: (inputs | captured)[name] for name in leaves}
    gradients = torch.autograd.grad(outputs, list(wanted.values()), cotangents, allow_unused=True)
    return Outcome(
        _numpy(out),
        None if lse is None else _numpy(lse),
        {
            name: np.zeros(tuple(x.shape)) if gradient is None else _numpy(gradient)
            for (name, x), gradient in zip(wanted.items(), gradients, strict=True)
        },
    )


def call(arguments: dict[str, Any], device: str = "cpu") -> Any:
    """`attend` on NumPy arguments as they are, for calls that must raise."""
    given: dict[str, Any] = {
        name: torch.from_numpy(x).to(device) if isinstance(x, np.ndarray) else x for name, x in arguments.items()
    }
    return attend(**given)


def implementations() -> tuple[str, ...]:
    """The names, in order of preference."""
    return tuple(entry.name for entry in table())


def _tensors(problem: Problem, device: str) -> dict[str, Any]:
    """The arguments, arrays as tensors; beside a function what it captures, as "score_fn table", "mask_fn table"."""
    given = problem.arguments
    tables = {f"{name} table": given[name].table for name in ("score_fn", "mask_fn") if name in given}
    dtypes = problem.dtypes | {"score_fn table": problem.dtypes.get("table")}
    return {
        name: _tensor(value, dtypes.get(name), device) if isinstance(value, np.ndarray) else value
        for name, value in (given | tables).items()
    }


def _tensor(value: np.ndarray, dtype: str | None, device: str) -> torch.Tensor:
    tensor = torch.from_numpy(np.array(value))  # a copy: what comes in is never written to
    return tensor.to(device, getattr(torch, dtype) if dtype else tensor.dtype)


def _lay_out(name: str, x: torch.Tensor, memory: str) -> torch.Tensor:
    """The same values in the memory that is asked for."""
    if memory == "strided":
        return torch.stack([x, torch.zeros_like(x)], 3).flatten(2, 3)[:, :, ::2]
    if memory == "expanded" and name != "q" and x.shape[0]:
        return x[:1].expand(x.shape)
    return x


def _numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().to("cpu", torch.float64).numpy()

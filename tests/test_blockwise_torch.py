"""What is blockwise's and rowwise's own in torch: several blocks, second derivatives, forward mode, a compiler."""

from typing import Any

import pytest
import torch

import attend_torch
from attend_shared import blocks, cases, compare
from attend_torch import bridge
from attend_torch.implementations import rowwise

SMALL = [case for case in cases.CASES if max(case.sizes.i, case.sizes.j) > 16]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_many_blocks_keep_every_clause(case: cases.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 16)  # the list's arrays are small, so blocks are made small with them
    monkeypatch.setattr(rowwise, "LOGITS", 2**9)
    problem = case.build()
    budgets = compare.budgets(problem)
    for implementation in ("blockwise", "rowwise"):
        compare.check(bridge.evaluate(problem, implementation), problem, budgets)


def arrays(*sizes: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    b, h, hk, i, j, d = sizes
    draw = torch.Generator().manual_seed(0)
    shapes = (b, h, i, d), (b, hk, j, d), (b, hk, j, d)
    return [torch.randn(shape, generator=draw, dtype=dtype).requires_grad_() for shape in shapes]


RAGGED: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain": ((2, 4, 2, 600, 700, 16), {}),
    "causal": ((1, 2, 2, 600, 600, 16), {"is_causal": True}),
    "window, sinks, softcap, dropout": (
        (2, 4, 2, 300, 515, 16),
        {"is_causal": True, "q_offset": 215, "window_size": (100, None), "sinks": torch.ones(4), "softcap": 5.0,
         "dropout": 0.2, "dropout_seed": 5},
    ),
    "bias over items, lengths": (
        (2, 2, 1, 300, 515, 8),
        {"bias": torch.linspace(-1, 1, 2 * 300 * 515).reshape(1, 2, 300, 515), "kv_lengths": torch.tensor([100, 600])},
    ),
    "documents": (
        (2, 2, 1, 515, 515, 8),
        {"q_segment_ids": torch.arange(1030).reshape(2, 515) // 200, "is_causal": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RAGGED)
def test_ragged_blocks_agree_with_einsum_to_the_second_derivative(name: str) -> None:
    sizes, options = RAGGED[name]
    found = {}
    for implementation in ("einsum", "blockwise", "rowwise"):
        inputs = arrays(*sizes)
        out, lse = attend_torch.attend(*inputs, **options, implementation=implementation, return_lse=True)
        weights = torch.arange(out.numel()).cos().reshape(out.shape)
        loss = (out * weights).sum() + lse.where(lse.isfinite(), 0).sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), inputs)
        found[implementation] = (out, *first, *second)
    for implementation in ("blockwise", "rowwise"):
        for expected, got in zip(found["einsum"], found[implementation], strict=True):
            # float32 sums of up to 700 terms in another order
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=5e-6 * expected.abs().max().item())


def test_derivatives_of_derivatives_in_float64() -> None:
    q, k, v = arrays(1, 2, 1, 5, 6, 3, dtype=torch.float64)
    sinks = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        return attend_torch.attend(
            *inputs[:3], sinks=inputs[3], is_causal=True, q_offset=-1, softcap=2.0, implementation="blockwise"
        )

    assert torch.autograd.gradcheck(function, (q, k, v, sinks))
    assert torch.autograd.gradgradcheck(function, (q, k, v, sinks))


def test_forward_mode_is_rowwise_and_agrees_with_einsum() -> None:
    q, k, v = (x.detach() for x in arrays(1, 2, 1, 300, 300, 8))

    def tangent(implementation: str) -> tuple[torch.Tensor, torch.Tensor]:
        def forward(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return attend_torch.attend(q, k, v, is_causal=True, implementation=implementation)

        return torch.func.jvp(forward, (q, k), (torch.cat([k, k], 1), k))

    for expected, got in zip(tangent("einsum"), tangent("rowwise"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_compiler_takes_it_whole() -> None:
    q, k, v = (x.detach() for x in arrays(1, 2, 1, 300, 300, 8))
    seed = torch.tensor(7)

    def function(q: torch.Tensor) -> torch.Tensor:
        return attend_torch.attend(q, k, v, dropout=0.5, dropout_seed=seed, implementation="blockwise")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), function(q), rtol=0, atol=0)

"""What is blockwise's and rowwise's own in torch: several blocks, what is skipped, derivatives, compilers, memory."""

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import attend_torch
from attend_shared import blocks, cases, compare
from attend_shared.call import Arrays, Call
from attend_torch import bridge
from attend_torch.implementations import blockwise, rowwise

SMALL = [case for case in cases.CASES if 16 < max(case.sizes.i, case.sizes.j) < 1000]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 queries and keys, and few rows: several of each, as small as arrays are in tests."""
    monkeypatch.setattr(blocks, "BLOCK", 16)
    monkeypatch.setattr(rowwise, "LOGITS", 2**9)


def read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let blockwise take arrays as if they lay on a GPU, whose contents it must not wait for."""
    canonical = blockwise.canonical

    def elsewhere(*arguments: Any) -> tuple[Call, Arrays]:
        call, data = canonical(*arguments)
        return call._replace(platform="cuda"), data

    monkeypatch.setattr(blockwise, "canonical", elsewhere)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_many_blocks_keep_every_clause(case: cases.Case, small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = case.build()
    budgets = compare.budgets(problem)
    for implementation in ("blockwise", "rowwise"):
        compare.check(bridge.evaluate(problem, implementation), problem, budgets)
    read_nothing(monkeypatch)
    compare.check(bridge.evaluate(problem, "blockwise"), problem, budgets)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def arrays(*sizes: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    b, h, hk, i, j, d = sizes
    shapes = (b, h, i, d), (b, hk, j, d), (b, hk, j, d)
    return [draw(*shape, seed=n, dtype=dtype).requires_grad_() for n, shape in enumerate(shapes)]


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
        {"bias": draw(1, 2, 300, 515, seed=3), "kv_lengths": torch.tensor([100, 600])},
    ),
    "bias over keys, dense mask": (
        (2, 2, 1, 300, 515, 8),
        {"bias": draw(2, 1, 300, 1, seed=3), "mask": draw(2, 2, 300, 515, seed=9) > 0},
    ),
    "documents": (
        (2, 2, 1, 515, 515, 8),
        {"q_segment_ids": torch.arange(1030).reshape(2, 515) // 200, "is_causal": True},
    ),
    "decoding": (
        (5, 4, 1, 1, 1100, 8),
        {"is_causal": True, "q_offset": torch.tensor([1099, 600, 3, 0, -1]), "mask": draw(5, 1100, seed=9) > 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RAGGED)
def test_ragged_blocks_agree_with_einsum_to_the_second_derivative(name: str) -> None:
    sizes, options = RAGGED[name]
    found = {}
    for implementation in ("einsum", "blockwise", "rowwise"):
        inputs = arrays(*sizes)
        floats = {key: options[key].clone().requires_grad_() for key in ("bias", "sinks") if key in options}
        out, lse = attend_torch.attend(*inputs, **options | floats, implementation=implementation, return_lse=True)
        weights = torch.arange(out.numel()).cos().reshape(out.shape)
        loss = (out * weights).sum() + lse.where(lse.isfinite(), 0).sum()
        first = torch.autograd.grad(loss, [*inputs, *floats.values()], create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), [*inputs, *floats.values()])
        found[implementation] = (out, *first, *second)
    for implementation in ("blockwise", "rowwise"):
        for expected, got in zip(found["einsum"], found[implementation], strict=True):
            # float32 sums of up to 1100 terms in another order
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=5e-6 * max(1.0, expected.abs().max().item()))


# What a block visits.


def visited(**options: Any) -> int:
    """How many blocks of 256 x 256 logits are made, of the 16 that 1024 queries and keys have."""
    seen: list[int] = []
    logits = blockwise._Tiles.logits

    def count(self: Any, tile: Any, *arguments: Any, **rest: Any) -> Any:
        seen.append((tile.rows.stop - tile.rows.start) * blockwise._width(tile))
        return logits(self, tile, *arguments, **rest)

    x = torch.zeros(1, 1, 1024, 8, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise._Tiles, "logits", count)
        out = attend_torch.attend(x, x, x, **options, implementation="blockwise")
        forward = sum(seen)
        out.sum().backward()
    assert sum(seen) == 2 * forward  # the way back visits what the way forward did
    return forward // 256**2


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 16),
        ({"is_causal": True}, 10),
        ({"window_size": (10, 10)}, 10),
        ({"is_causal": True, "window_size": (0, None)}, 4),
        ({"is_causal": True, "q_offset": torch.tensor(-300)}, 6),
        ({"kv_lengths": torch.tensor([257])}, 8),
        ({"q_lengths": torch.tensor([256])}, 8),  # without positions a block has 512 queries
        ({"q_lengths": torch.tensor([0])}, 0),
        ({"q_segment_ids": torch.arange(1024)[None] // 256}, 4),
        ({"mask": (torch.arange(1024) >= 768)[None]}, 4),
    ],
    ids=["all", "causal", "window", "diagonal", "offset", "kv lengths", "q lengths", "no queries", "documents",
         "left padding"],
)  # fmt: skip
def test_blocks_that_are_ruled_out_are_not_visited(options: dict[str, Any], count: int) -> None:
    assert visited(**options) == count


def test_without_reading_positions_still_rule_out(monkeypatch: pytest.MonkeyPatch) -> None:
    read_nothing(monkeypatch)
    assert visited(is_causal=True) == 10
    assert visited(is_causal=True, q_offset=torch.tensor(-300)) == 16
    assert visited(kv_lengths=torch.tensor([257])) == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_one_key_has_exact_zeros(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weight is 1 whatever its logit is: dp and delta, each rounded in its own way, must cancel."""
    bias = draw(1, 2, 300, 300, seed=5).requires_grad_()

    def gradients(window: tuple[int, int], dropout: float) -> tuple[torch.Tensor, ...]:
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in arrays(2, 2, 1, 300, 300, 64))
        out = attend_torch.attend(
            q, k, v, bias=bias, window_size=window, dropout=dropout, dropout_seed=3, implementation="blockwise"
        ).float()
        return torch.autograd.grad((torch.arange(out.numel()).reshape(out.shape) * out).sin().sum(), (q, k, bias))

    for read in (True, False):
        if not read:
            read_nothing(monkeypatch)
        for dropout in (0.0, 0.1):
            assert [x.abs().max().item() for x in gradients((0, 0), dropout)] == [0, 0, 0]
            of_two = gradients((1, 0), dropout)
            of_first = [x[:, :, 0].abs().max().item() == 0 for x in of_two]  # query 0 sees key 0 alone
            assert of_first == [True, False, True]
            assert of_two[0][:, :, 1:].abs().amin(-1).max() > 0


# Every derivative.

DOUBLE = torch.float64
SMALL_ARRAYS = (draw(2, 4, 33, 8, dtype=DOUBLE), draw(2, 2, 41, 8, seed=1, dtype=DOUBLE),
                draw(2, 2, 41, 5, seed=2, dtype=DOUBLE), draw(1, 4, 33, 41, seed=3, dtype=DOUBLE),
                draw(4, seed=4, dtype=DOUBLE))  # fmt: skip
TANGENTS = tuple(draw(*x.shape, seed=9, dtype=DOUBLE) for x in SMALL_ARRAYS)
EMPTY_ROWS = (draw(2, 1, 33, 41, seed=7) > 0) & (torch.arange(33) % 5 > 0)[:, None]


def loss(implementation: str, *floats: torch.Tensor, seed: Any = 5, lengths: Any = None) -> torch.Tensor:
    q, k, v, bias, sinks = floats
    out, lse = attend_torch.attend(
        q, k, v, EMPTY_ROWS, bias=bias, sinks=sinks, is_causal=True, q_offset=8, softcap=3.0, dropout=0.2,
        dropout_seed=seed, kv_lengths=lengths, return_lse=True, implementation=implementation,
    )  # fmt: skip
    return out.sin().sum() + lse.cos().sum()


def _gradient(implementation: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    return torch.func.grad(lambda *floats: loss(implementation, *floats), argnums=(0, 1, 2, 3, 4))


def _tangent(implementation: str) -> Callable[..., torch.Tensor]:
    return lambda *floats: torch.func.jvp(lambda *x: loss(implementation, *x), floats, TANGENTS)[1]


def _dual(implementation: str) -> Any:
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, SMALL_ARRAYS, TANGENTS)
        return forward_ad.unpack_dual(loss(implementation, *duals)).tangent


def _hidden_dual(implementation: str) -> Any:
    """Forward over reverse where no graph of the gradient is asked for."""
    leaves = [x.clone().requires_grad_() for x in SMALL_ARRAYS]
    with forward_ad.dual_level():
        value = loss(implementation, *map(forward_ad.make_dual, leaves, TANGENTS))
        return [forward_ad.unpack_dual(x).tangent for x in torch.autograd.grad(value, leaves)]


def _thrice(implementation: str) -> Any:
    leaves = [x.clone().requires_grad_() for x in SMALL_ARRAYS]
    results = [loss(implementation, *leaves)]
    for last in (False, False, True):
        norm = sum(x.square().sum() for x in results)
        results = list(torch.autograd.grad(norm, leaves, create_graph=not last))
    return results


def _of_lanes(implementation: str) -> Any:
    stacked = [torch.stack([x, x.flip(0), 2 * x]) for x in SMALL_ARRAYS]
    stacked[4] = SMALL_ARRAYS[4]
    dims = (0, 0, 0, 0, None)
    lanes = torch.func.vmap(lambda *x: loss(implementation, *x[:5], seed=x[5], lengths=x[6]), (*dims, 0, 0))
    return lanes(*stacked, torch.tensor([3, 4, 5]), torch.tensor([[41, 3], [20, 0], [1, 50]]))


def _hessian(implementation: str) -> Any:
    q, k, v = (x[:1, :1, :5] for x in SMALL_ARRAYS[:3])
    return torch.func.hessian(lambda q: attend_torch.attend(q, k, v, implementation=implementation).sin().sum())(q)


DERIVATIVES: dict[str, Callable[[str], Any]] = {
    "reverse": lambda name: _gradient(name)(*SMALL_ARRAYS),
    "forward": lambda name: _tangent(name)(*SMALL_ARRAYS),
    "forward, dual numbers": _dual,
    "reverse over reverse": lambda name: torch.func.vjp(_gradient(name), *SMALL_ARRAYS)[1](TANGENTS),
    "forward over reverse": lambda name: torch.func.jvp(_gradient(name), SMALL_ARRAYS, TANGENTS)[1],
    "forward over reverse, dual numbers": _hidden_dual,
    "reverse over forward": lambda name: torch.func.grad(_tangent(name), argnums=(0, 1, 2, 3, 4))(*SMALL_ARRAYS),
    "three times in reverse": _thrice,
    "lanes": _of_lanes,
    "gradients of lanes": lambda name: torch.func.vmap(
        lambda seed: torch.func.grad(lambda q: loss(name, q, *SMALL_ARRAYS[1:], seed=seed))(SMALL_ARRAYS[0])
    )(torch.tensor([3, 4])),
    "hessian": _hessian,
}


@pytest.mark.parametrize("kind", DERIVATIVES)
def test_every_derivative_is_einsums(kind: str, small_blocks: None) -> None:
    truth = torch.utils._pytree.tree_leaves(DERIVATIVES[kind]("einsum"))
    for implementation in ("blockwise", "rowwise"):
        found = torch.utils._pytree.tree_leaves(DERIVATIVES[kind](implementation))
        for expected, got in zip(truth, found, strict=True):
            assert expected.isfinite().all()
            size = max(1.0, expected.abs().max().item())
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11 * size)


def test_a_bias_without_a_gradient(small_blocks: None) -> None:
    """No array of its size is made for it, and second derivatives do not need one."""
    *floats, bias, sinks = SMALL_ARRAYS
    found = []
    for implementation in ("einsum", "blockwise"):
        leaves = [x.clone().requires_grad_() for x in floats]
        first = torch.autograd.grad(loss(implementation, *leaves, bias, sinks), leaves, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(x.sin().sum() for x in first), leaves)])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_derivatives_of_derivatives_by_differences() -> None:
    q, k, v = arrays(1, 2, 1, 5, 6, 3, dtype=DOUBLE)
    sinks = torch.zeros(2, dtype=DOUBLE, requires_grad=True)

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        return attend_torch.attend(
            *inputs[:3], sinks=inputs[3], is_causal=True, q_offset=-1, softcap=2.0, implementation="blockwise"
        )

    assert torch.autograd.gradcheck(function, (q, k, v, sinks), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (q, k, v, sinks), fast_mode=True)


# Where it is called from.


def test_a_compiler_takes_it_whole() -> None:
    seed = torch.tensor(7)

    def function(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return attend_torch.attend(
            q, k, k, is_causal=True, q_segment_ids=seed.new_zeros(1, q.shape[2]), dropout=0.5, dropout_seed=seed,
            return_lse=True, implementation="blockwise",
        )  # fmt: skip

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (300, 270):
        q, k, _ = arrays(1, 2, 1, n, n, 8)
        results = []
        for each in (function, compiled):
            out, lse = each(q, k)
            results.append([out, lse, *torch.autograd.grad(out.sin().sum() + lse.sum(), (q, k))])
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_a_compiler_follows_rowwise(small_blocks: None) -> None:
    q, k, v = arrays(1, 2, 1, 20, 24, 4)

    def function(q: torch.Tensor) -> torch.Tensor:
        return attend_torch.attend(q, k, v, is_causal=True, q_offset=4, implementation="rowwise")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(each(q).sin().sum(), (q, k, v)) for each in (function, compiled)]
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_operator_is_what_torch_expects() -> None:
    q, k, v = arrays(1, 2, 1, 20, 24, 4)
    given = Arrays(q, k, v, bias=draw(1, 1, 20, 24).requires_grad_(), sinks=draw(2).requires_grad_())
    options = (None, 0, 4, 0.5, 3.0, 0.0)  # left, right, offset, scale, softcap, dropout
    torch.library.opcheck(torch.ops.attend_torch.blockwise.default, (*given, *options))


def test_surroundings_change_nothing() -> None:
    """Autocast around the way back, another default device, no gradients: the same numbers."""
    q, k, v = arrays(1, 2, 1, 40, 40, 8)

    def call() -> torch.Tensor:
        return attend_torch.attend(q, k, v, is_causal=True, dropout=0.5, dropout_seed=3, implementation="blockwise")

    truth = torch.autograd.grad(call().sum(), (q, k, v))
    with torch.autocast("cpu"):
        out = attend_torch.attend(q, k, v, is_causal=True, implementation="blockwise")
        assert out.dtype == torch.bfloat16
    out = call()
    with torch.autocast("cpu"):
        torch.testing.assert_close(torch.autograd.grad(out.sum(), (q, k, v)), truth, rtol=0, atol=0)
    with torch.device("meta"):
        torch.testing.assert_close(torch.autograd.grad(call().sum(), (q, k, v)), truth, rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(call().clone(), out.detach(), rtol=0, atol=0)


def test_numbers_at_the_end_of_their_range(small_blocks: None) -> None:
    """The lowest sink and the lowest bias are numbers like others, and a row that sees nothing has its sink."""
    q, k, v = arrays(1, 2, 1, 20, 40, 4)
    lowest = torch.finfo(torch.float32).min
    options: dict[str, Any] = {"bias": torch.full((1, 1, 20, 40), lowest), "sinks": torch.full((2,), lowest)}
    for mask in (None, torch.zeros(1, 40, dtype=torch.bool)):
        results = [
            attend_torch.attend(q, k, v, mask, **options, return_lse=True, implementation=each)
            for each in ("einsum", "blockwise")
        ]
        torch.testing.assert_close(results[1], results[0])


def test_dropout_draws_the_same_numbers_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (np.arange(1, 3), np.arange(2, 5), np.arange(7, 30), np.arange(3, 9))
    whole = blockwise._kept([5, 6], *parts, 0.3)
    for counters in (1, 40, 200, 1000):
        monkeypatch.setattr(blockwise, "COUNTERS", counters)
        np.testing.assert_array_equal(blockwise._kept([5, 6], *parts, 0.3), whole)


MEMORY = """
import resource, sys
import torch
from attend_torch import attend
from attend_torch.implementations import rowwise
rowwise.LOGITS = 2**17
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def run(n, twice):
    q, bias = (torch.ones(1, 2, n, 16).requires_grad_(), torch.zeros(1, 2, 1, n).requires_grad_())
    options = dict(is_causal=True, bias=bias, sinks=torch.zeros(2), dropout=0.1, dropout_seed=1)
    out = attend(q, q, q, **options, implementation="blockwise")
    gradient, = torch.autograd.grad(out.sum(), q, create_graph=twice)
    if twice:
        torch.autograd.grad(gradient.sum(), bias)
for n, twice in ((8192, False), (2048, True)):
    run(512, twice)
    before = peak()
    run(n, twice)
    print(peak() - before)
"""


def test_memory_is_far_from_quadratic() -> None:
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    once, twice = map(float, re.findall(r"[-\d.]+", run.stdout))
    assert once < 40, f"{once} MB where the logits alone would be 512"
    assert twice < 60, f"{twice} MB where one array of logits would be 32, and a dozen are made"

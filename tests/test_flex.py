"""FlexAttention: what is handed to it, proved on a CPU by a stand-in that works as its kernels do."""

import gc
import os
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import AuxOutput, flex_attention

from attend_shared import cases, compare
from attend_shared.call import Arrays, check
from attend_shared.cases import Case
from attend_shared.errors import UnsupportedError
from attend_shared.kernels import cache_folder
from attend_shared.wrong_calls import WRONG_RESULTS, WrongCall
from attend_torch import attend, bridge, explain, programs
from attend_torch.arrays import FRAMEWORK
from attend_torch.implementations import flex, table

Tensor = torch.Tensor


class Kernel(torch.autograd.Function):
    """(scores, v) -> out, lse, the largest scores. As in the kernels, the way back makes the weights from lse."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        top = s.amax(-1, keepdim=True)
        weights = torch.exp(s - torch.where(top == -torch.inf, 0, top))
        total = weights.sum(-1, keepdim=True)
        out, lse = (weights / torch.where(total == 0, 1, total)) @ value, torch.log(total) + top
        ctx.save_for_backward(s, value, out, lse)
        ctx.mark_non_differentiable(top)
        return out, lse[..., 0], top[..., 0]

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor, _: Any) -> tuple[Tensor, Tensor]:
        s, value, out, lse = ctx.saved_tensors
        p = torch.exp(s - torch.where(lse == -torch.inf, 0, lse))
        ds = p * (dout @ value.mT - (out * dout).sum(-1, keepdim=True) + dlse[..., None])
        return ds, p.mT @ dout


def of_blocks(count: Tensor, index: Tensor) -> Tensor:
    """A list of blocks as bools (b, h, n, m)."""
    listed = torch.arange(index.shape[-1]) < count[..., None]
    dense = torch.zeros((*index.shape[:-1], index.shape[-1] + 1), dtype=torch.bool)
    return dense.scatter(-1, torch.where(listed, index.long(), index.shape[-1]), True)[..., :-1]


def of_pairs(blocks: Tensor, i: int, j: int) -> Tensor:
    return blocks.repeat_interleave(flex.SIZE, 2).repeat_interleave(flex.SIZE, 3)[:, :, :i, :j]


def stand_in(
    query: Tensor, key: Tensor, value: Tensor, *, score_mod: Any, block_mask: Any, scale: float, enable_gqa: bool,
    return_aux: Any,
) -> Any:  # fmt: skip
    """flex_attention as its kernels do it: only blocks that are listed, and mask_mod only in those to be looked at."""
    assert min(query.shape[3], value.shape[3]) >= flex.LEAST
    group = query.shape[1] // key.shape[1]
    assert enable_gqa == (group > 1)
    key, value = (x.float().repeat_interleave(group, 1) for x in (key, value))
    s = query.float() @ key.mT * scale
    b, h, q, k = (
        torch.arange(n, dtype=torch.int32).view([-1 if at == axis else 1 for at in range(4)])
        for axis, n in enumerate(s.shape)
    )
    if score_mod is not None:
        s = score_mod(s, b, h, q, k)
        assert s.dtype == torch.float32
        endless = torch.full_like(s, torch.inf).copysign(s.detach())
        s = torch.where(s.abs() * 1.4427 == torch.inf, endless, s)  # to base 2 it overflows
    if block_mask is not None:
        i, j = s.shape[2:]
        assert block_mask.shape[-2:] == (i, j)
        look, full = (
            of_blocks(count, index)
            for count, index in ((block_mask.kv_num_blocks, block_mask.kv_indices),
                                 (block_mask.full_kv_num_blocks, block_mask.full_kv_indices))
        )  # fmt: skip
        assert not (look & full).any()
        assert torch.equal(of_blocks(block_mask.q_num_blocks, block_mask.q_indices).mT, look)
        assert torch.equal(of_blocks(block_mask.full_q_num_blocks, block_mask.full_q_indices).mT, full)
        LOOKED.append((int(look.sum()), int(full.sum())))
        may = of_pairs(look, i, j) & block_mask.mask_mod(b, h, q, k) | of_pairs(full, i, j)
        s = torch.where(may, s, -torch.inf)
    out, lse, top = Kernel.apply(s, value)
    out = out.to(query.dtype)
    return out if return_aux is None else (out, AuxOutput(lse, top))


LOOKED: list[tuple[int, int]] = []  # the blocks of each call: to be looked at, and full


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[flex.Plan, bool]]:
    """FlexAttention on a CPU, not compiled; what would be compiled."""
    asked = []

    def compiled(plan: flex.Plan, any_size: bool) -> flex.Run:
        asked.append((plan, any_size))
        functions = (x and programs.function(x.pair, "pair") for x in (plan.score, plan.mask))
        return partial(flex.answer, plan, *functions, stand_in)

    monkeypatch.setattr(flex, "unavailable", lambda: None)
    monkeypatch.setattr(flex, "refusal", flex.cannot)
    monkeypatch.setattr(flex, "compiled", compiled)
    flex._sizes.cache_clear()
    return asked


def chosen() -> list[Case]:
    """Enough of the cases to have every level, the small ones first, and all with functions."""
    known: Counter[str] = Counter()
    taken = []
    for case in sorted(cases.CASES, key=lambda case: "tiles" in case.name):
        if any(not known[level] for level in case.levels) or any(x in case.name for x in ("score_", "rule_")):
            known.update(case.levels)
            taken.append(case)
    return taken


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("case", chosen(), ids=str)
def test_case(case: Case) -> None:
    problem = case.build()
    try:
        found = bridge.evaluate(problem, "flex")
    except UnsupportedError as error:
        dtypes = set(problem.dtypes.values())
        assert problem.arguments.get("dropout") or "float64" in dtypes or len(dtypes) > 1, error
        return
    compare.check(found, problem)


# The choice of calls.


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


X = draw(1, 2, 6, 16)
HALF = X.bfloat16()
TABLE = draw(2, 6, seed=1).requires_grad_()


ROUNDED = "would be made of an output rounded to bfloat16"


class Straight(torch.autograd.Function):
    """Rounding with the gradient of what is rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        return dout


def in_place(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return s.clone().add_(1)


def unrecorded(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    with torch.no_grad():
        return s * 2


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("x", "options", "words"),
    [
        (X.double(), {}, "it has no float64"),
        (X, {"dropout": 0.5, "dropout_seed": 1}, "it has no dropout that dropout_seed decides"),
        (draw(1, 1, 2, 257), {}, "it takes head sizes up to 256, not 257"),
        (HALF, {"sinks": torch.zeros(2)}, f"the gradient of float32 sinks {ROUNDED}"),
        (HALF, {"bias": TABLE[None, :, None]}, f"the gradient of a float32 bias {ROUNDED}"),
        (HALF, {"score_fn": lambda s, b, h, q, k: s + TABLE[h, k]},
         f"the gradient of a float32 array that score_fn captures {ROUNDED}"),
        (X, {"score_fn": in_place}, "FlexAttention cannot follow score_fn: aten.add_.Tensor changes what it is given"),
        (X, {"score_fn": unrecorded}, "FlexAttention cannot follow score_fn: it says itself what has a gradient"),
        (X, {"score_fn": lambda s, *_: Straight.apply(s)},
         "FlexAttention cannot follow score_fn: it has gradients of its own making"),
        (X, {"score_fn": lambda s, *_: s if TABLE[0, 0] > 0 else -s},
         "FlexAttention cannot follow score_fn: it looks at what arrays hold"),
        (X, {"score_fn": lambda s, *_: s * torch.tensor(2.0)},
         "FlexAttention cannot follow score_fn: it makes arrays that it could capture"),
        (X, {"score_fn": lambda s, *_: s - s.amax()},
         "FlexAttention cannot follow score_fn: aten.amax.default is not a function of single numbers"),
        (X, {"mask_fn": lambda b, h, q, k: (TABLE[h] * k > 0).any(-1)},
         "FlexAttention cannot follow mask_fn: it makes more than one number of a pair"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_it_says_what_it_does_not_take(x: Tensor, options: dict[str, Any], words: str) -> None:
    reasons = dict(explain(x, x, x, **options).rows)
    assert reasons["flex"] == words
    assert reasons["einsum"] is None


def test_gradients_in_float32_that_its_kernels_sum_or_round_otherwise_are_refused() -> None:
    x, table = draw(1, 2, 8, 16).requires_grad_(), torch.ones(2, requires_grad=True)

    def reason(dtype: torch.dtype = torch.float32, **options: Any) -> str:
        keys = options.pop("keys", 8)
        q, table_of = x.detach().to(dtype).requires_grad_(), table.detach().to(dtype).requires_grad_()
        if "score_fn" in options:
            options["score_fn"] = lambda s, b, h, i, j: s * table_of[h]
        given = Arrays(q, *(q[:, :, :keys],) * 2, bias=options.pop("bias", None), sinks=options.pop("sinks", None))
        call = check(FRAMEWORK, given, False, None, None, None, 0.0, False, "bhnd", None, **options)
        if "score_fn" in options:  # followed on a CPU
            return flex.cannot(call, kernels=True) or ""
        return flex.refusal(call._replace(platform="cuda")) or ""

    assert "pair by pair" in reason(score_fn=True)
    assert "beside a bias" in reason(bias=torch.zeros(1, 2, 8, 8))
    assert "of a single key" in reason(keys=1)
    assert "of sinks" in reason(sinks=torch.zeros(2))
    with torch.no_grad():
        assert reason(score_fn=True) == reason(bias=torch.zeros(1, 2, 8, 8)) == reason(keys=1) == ""
        assert reason(sinks=torch.zeros(2)) == ""
    for dtype in (torch.float16, torch.bfloat16):
        assert reason(dtype, score_fn=True) == reason(dtype, bias=torch.zeros(1, 2, 8, 8, dtype=dtype)) == ""
        assert reason(dtype, keys=1) == reason(dtype, sinks=torch.zeros(2, dtype=dtype)) == ""


@pytest.mark.parametrize("grouped", [False, True])
def test_its_kernel_for_few_queries_is_not_given_groups_of_heads(
    grouped: bool, on_cpu: list[tuple[flex.Plan, bool]]
) -> None:
    """In torch 2.11 it is wrong for 8 queries of 8 heads on 2."""
    q = draw(1, 8, 8, 16)
    k = q[:, :2] if grouped else q
    attend(q, k, k, implementation="flex")
    assert ("FORCE_USE_FLEX_ATTENTION" in flex.kernel_options(on_cpu[-1][0], 2**17)) == grouped


@pytest.mark.usefixtures("on_cpu")
def test_it_does_not_nest() -> None:
    def ours(x: Tensor) -> Tensor:
        return attend(x, x, x, score_fn=lambda s, *_: s * 2, implementation=["flex", "einsum"])

    expected = ours(X)
    torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="eager")(X), expected)
    torch.testing.assert_close(torch.func.vmap(ours)(X[None])[0], expected)
    with pytest.raises(UnsupportedError, match=r"it cannot be called inside torch\.func"):
        torch.func.grad(lambda x: attend(x, x, x, implementation="flex").sum())(X)


def test_it_comes_first_where_there_is_much_to_do() -> None:
    function = {"mask_fn": lambda b, h, q, k: q >= k}
    for n, first in ((64, ["einsum", "flex"]), (4096, ["flex", "einsum"]), (2**15, ["flex", "blockwise"])):
        x = torch.empty(1, 2, n, 16)
        call = check(FRAMEWORK, Arrays(x, x, x), False, None, None, None, 0.0, False, "bhnd", None, None, **function)
        names = [entry.name for entry in table(call._replace(platform="cuda"))]
        assert names[:2] == first
        assert sorted(names) == sorted(entry.name for entry in table())


def test_it_needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        assert flex.unavailable() in ("it needs an NVIDIA GPU", "it needs Triton, which torch brings along where it "
                                      "knows of NVIDIA GPUs")  # fmt: skip
    assert dict(explain(X.to("meta"), X.to("meta"), X.to("meta")).rows)["flex"]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("wrong", WRONG_RESULTS, ids=lambda wrong: wrong.name)
def test_wrong_results_have_the_same_words(wrong: WrongCall) -> None:
    given = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in wrong.build().items()}
    for _ in range(2):  # the second time the program is known
        with pytest.raises(wrong.error) as caught:
            attend(**given, implementation="flex")
        assert str(caught.value) == wrong.text


# Programs.


def alibi(table: Any) -> Callable[..., Any]:
    return lambda s, b, h, q, k: s - table[h] * abs(q - k)


def test_one_program_for_what_is_the_same(on_cpu: list[tuple[flex.Plan, bool]]) -> None:
    def plans(*functions: Callable[..., Any], x: Tensor = X) -> int:
        on_cpu.clear()
        for function in functions:
            attend(x, x, x, score_fn=function, implementation="flex")
        return len(set(on_cpu))

    slopes = torch.rand(2)
    assert plans(alibi(slopes), alibi(slopes + 1), lambda s, b, h, q, k: s - slopes[h] * abs(q - k)) == 1
    assert plans(*(lambda s, b, h, q, k, c=c: s * c for c in (0.5, 0.5, 0.25))) == 2, "a number is a part of it"
    assert plans(alibi(slopes), alibi(torch.rand(2, requires_grad=True)), alibi(slopes.double().float())) == 2
    held = {"table": slopes}
    assert plans(lambda s, b, h, q, k: s - held["table"][h] * abs(q - k), alibi(slopes)) == 1, "traced each time"
    held["table"] = slopes * 2
    of_dict = attend(X, X, X, score_fn=lambda s, b, h, q, k: s - held["table"][h] * abs(q - k), implementation="flex")
    torch.testing.assert_close(of_dict, attend(X, X, X, score_fn=alibi(slopes * 2), implementation="einsum"))


def test_some_sizes_have_programs_of_their_own(
    on_cpu: list[tuple[flex.Plan, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "EXACT", 4)
    for n in (3, 4, 5, 6, 7, 8, 3, 9):
        x, end = draw(1, 2, n, 16), draw(1, 2, n + 2, 16)
        found = attend(x, end, end, is_causal=True, q_offset=2, implementation="flex")
        torch.testing.assert_close(found, attend(x, end, end, is_causal=True, q_offset=2, implementation="einsum"))
    assert [any_size for _, any_size in on_cpu] == [False] * 4 + [True] * 2 + [False, True]
    assert len({plan for plan, any_size in on_cpu if any_size}) == 1


@pytest.mark.usefixtures("on_cpu")
def test_nothing_captured_is_kept() -> None:
    def run() -> tuple[Any, ...]:
        table = torch.rand(2)
        function = alibi(table)
        attend(X, X, X, score_fn=function, implementation="flex")
        return weakref.ref(table), weakref.ref(function)

    watched = run()
    gc.collect()
    assert [each() for each in watched] == [None, None]


@pytest.mark.usefixtures("on_cpu")
def test_what_does_not_depend_on_the_pair_comes_first() -> None:
    """With its gradient; a table that is read twice has that of both places; a number is read as an array of one."""
    table, scale = draw(2, 6, seed=3).requires_grad_(), torch.tensor(0.3, requires_grad=True)

    def score_fn(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        slopes = torch.arange(1, 3, device=s.device) / 4
        s = s * torch.exp(scale) + torch.tanh(table)[h, k] * table[h, q].detach() + table.softmax(-1)[h, q]
        return torch.where(k == 4, s.clamp(-2, float("inf")), s - slopes[h] * abs(q - k)).to(torch.float32)

    def gradients(implementation: str) -> tuple[Tensor, ...]:
        out = attend(X, X, X, score_fn=score_fn, is_causal=True, implementation=implementation)
        return torch.autograd.grad((out**2).sum(), (table, scale))

    for found, expected in zip(gradients("flex"), gradients("einsum"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert expected.abs().max() > 1e-3


FILLS = (-1e4, -1e9, torch.finfo(torch.float32).min)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("as_table", [False, True])
def test_rows_of_one_low_number(fill: float, as_table: bool) -> None:
    """lse of such a row says nothing of how many keys it has: weights made from it alone would be 1 each."""
    table = torch.full((6,), fill)

    def score_fn(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        low = table[k] if as_table else torch.full_like(s, fill)
        return torch.where((q == 2) | (k == 4), low, s)

    def run(implementation: str) -> tuple[Tensor, ...]:
        q, k, v = (draw(1, 2, 6, 16, seed=n).requires_grad_() for n in range(3))
        out, lse = attend(q, k, v, score_fn=score_fn, return_lse=True, implementation=implementation)
        return out, lse, *torch.autograd.grad((out**2).sum() + lse.clamp(min=-10).sum(), (q, k, v))

    for found, expected in zip(run("flex"), run("einsum"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("on_cpu")
def test_tiles_fit_beside_what_is_read_for_each_pair(on_cpu: list[tuple[flex.Plan, bool]]) -> None:
    """An H100 shares 227 KB, a consumer's GPU 99."""

    def options(x: Tensor, memory: int = 232448, **given: Any) -> dict[str, Any]:
        attend(x, x, x, **given, implementation="flex")
        return flex.kernel_options(on_cpu[-1][0], memory)

    table, dense, half = torch.rand(2, 6), torch.rand(6, 6), draw(1, 2, 6, 64, dtype=torch.bfloat16)
    assert options(X) == {"FLOAT32_PRECISION": "'ieee'"}
    assert options(half, score_fn=lambda s, b, h, q, k: s + table[h, q] - table[h, k]) == {}
    read = options(half, score_fn=lambda s, b, h, q, k: s + table[h, (q - k).abs()])
    assert (read["fwd_BLOCK_M"], read["fwd_BLOCK_N"], read["fwd_num_stages"]) == (128, 64, 3)
    twice = options(half, score_fn=lambda s, b, h, q, k: s + dense[q, k] + dense[k, q])
    assert (twice["fwd_BLOCK_M"], twice["fwd_BLOCK_N"], twice["fwd_num_stages"]) == (128, 64, 2)
    small = options(half, 101376, bias=torch.rand(1, 2, 6, 6))
    assert small["fwd_num_stages"] * small["fwd_BLOCK_M"] * small["fwd_BLOCK_N"] < 101376 / 4
    assert small["bwd_BLOCK_N1"] < read["bwd_BLOCK_N1"]
    assert options(half, mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))["fwd_num_stages"] == 3
    assert options(half, mask_fn=lambda b, h, q, k: dense[q, k] > 0)["bwd_num_warps"] == 8


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("largest", "dtype", "looks"),
    [(3.0, torch.bfloat16, 0), (-3e3, torch.bfloat16, 3), (-torch.inf, torch.bfloat16, 0), (3.0, torch.float32, 3)],
)
def test_rows_are_looked_through_where_a_number_is_large(largest: float, dtype: torch.dtype, looks: int) -> None:
    table = torch.tensor([1.0, 1.0, largest])
    q, k, v = (draw(1, 1, 200, 16, seed=n, dtype=dtype).requires_grad_() for n in range(3))
    functions = {"score_fn": lambda s, b, h, q, k: s + table[k % 3], "is_causal": True}
    LOOKED.clear()
    found = attend(q, k, v, **functions, implementation="flex")
    assert [sum(each) for each in LOOKED] == [looks, 3]
    expected = attend(q, k, v, **functions, implementation="einsum")
    for one, other in zip(torch.autograd.grad(found.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v)),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


# Blocks.

DOCUMENTS = torch.arange(512)[None] // 128


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("options", "looked", "full"),
    [
        ({"is_causal": True}, 4, 6),
        ({"window_size": (10, 10)}, 10, 0),
        ({"is_causal": True, "q_offset": torch.tensor([-128])}, 3, 3),
        ({"kv_lengths": torch.tensor([200])}, 4, 4),
        ({"q_lengths": torch.tensor([128])}, 0, 4),
        ({"q_segment_ids": DOCUMENTS}, 0, 4),
        ({"q_segment_ids": DOCUMENTS, "is_causal": True}, 4, 0),
        ({"mask": DOCUMENTS != 1}, 0, 12),
        ({"mask": torch.ones(1, 1, 512, 512, dtype=torch.bool).tril(), "kv_lengths": torch.tensor([128])}, 1, 3),
        ({"mask_fn": lambda b, h, q, k: DOCUMENTS[b, q] == DOCUMENTS[b, k]}, 0, 4),
        ({"mask_fn": lambda b, h, q, k: q >= k}, 4, 6),
        ({"mask_fn": lambda b, h, q, k: k < 200, "is_causal": True}, 4, 3),
        ({"mask_fn": lambda b, h, q, k: (h == 0) & (q == q)}, 0, 16),
    ],
)
def test_blocks_that_are_ruled_out_are_left_out(options: dict[str, Any], looked: int, full: int) -> None:
    x = draw(1, 2, 512, 16)
    LOOKED.clear()
    found = attend(x, x, x, **options, implementation="flex")
    assert [(looked, full)] == LOOKED
    torch.testing.assert_close(found, attend(x, x, x, **options, implementation="einsum"), rtol=1e-4, atol=1e-5)


def test_a_compiler_takes_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one, traced in one piece on a CPU, where it goes forward only, and once more for other sizes."""
    monkeypatch.setattr(flex, "unavailable", lambda: None)
    monkeypatch.setattr(flex, "refusal", flex.cannot)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(flex, "EXACT", 1)
    flex.compiled.cache_clear()
    flex._sizes.cache_clear()
    assert flex.flex_attention is flex_attention
    ids = torch.arange(40)[None] // 16

    def run(implementation: str, n: int) -> Tensor:
        x = draw(1, 2, n, 16)
        return attend(
            x, x, x, score_fn=alibi(torch.tensor([0.5, 0.25])), mask_fn=lambda b, h, q, k: ids[b, q] == ids[b, k],
            is_causal=True, kv_lengths=torch.tensor([n - 1]), implementation=implementation,
        )  # fmt: skip

    with torch.no_grad():
        for n in (20, 24, 30, 33):
            torch.testing.assert_close(run("flex", n), run("einsum", n), rtol=1e-4, atol=1e-5)
    assert flex.compiled.cache_info().currsize == 2


def test_its_compiler_finds_a_folder_where_jax_triton_left_none(
    on_cpu: list[tuple[flex.Plan, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache_folder.VARIABLE, "")
    x = draw(1, 2, 8, 16)
    attend(x, x, x, implementation="flex")
    assert on_cpu
    assert cache_folder.VARIABLE not in os.environ


@pytest.mark.parametrize("turned", [False, True])
def test_lists_are_contiguous_to_the_last_stride(turned: bool) -> None:
    """Kernels find the next item by the stride of the head, which where there is one head may be any number."""
    dense = torch.empty_strided((4, 1, 8, 8), (64, 256, 8, 1), dtype=torch.bool).copy_(draw(4, 1, 8, 8) > 0)
    counts, places = flex._listed(dense.mT if turned else dense)
    assert (counts.stride(), places.stride()) == ((8, 8, 1), (64, 64, 8, 1))


def test_layouts_are_fixed_where_the_compiler_would_not_keep_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(2, 1, 8, 16)
    asked: list[dict[str, Any]] = []

    def compile_nothing(_: Any, **options: Any) -> Callable[..., Any]:
        asked.append(options)
        return lambda *_: (x, None)

    monkeypatch.setattr(torch, "compile", compile_nothing)
    monkeypatch.setattr(flex, "unavailable", lambda: None)
    monkeypatch.setattr(flex, "refusal", flex.cannot)
    assert bool(flex.LAYOUTS_FIXED) == torch.__version__.startswith("2.11.")
    for n, fixed in enumerate(({}, {"max_autotune_gemm": True})):
        monkeypatch.setattr(flex, "LAYOUTS_FIXED", fixed)
        flex.compiled.cache_clear()
        attend(x, x, x, kv_lengths=torch.tensor([8, 3]), implementation="flex")
        assert asked[n]["options"] == (fixed or None)
    flex.compiled.cache_clear()

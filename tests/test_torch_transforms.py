"""attend in PyTorch: compiled, under autocast, under torch.func, differentiated twice, on meta and fake tensors."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from attend_shared import oracle, philox
from attend_torch import Attend, attend, explain, merge
from attend_torch.implementations import sdpa as sdpa_module

B, H, HK, N, D, DV = 2, 4, 2, 6, 8, 5
CLOSE = {"rtol": 1e-5, "atol": 2e-6}  # the same float32 sums in another order, of values of size 1
EXACT = {"rtol": 0.0, "atol": 0.0}
# What Inductor imports on its first call says so about itself.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def qkv(i: int = N, j: int = N, dtype: torch.dtype = torch.float32, dv: int = DV) -> tuple[torch.Tensor, ...]:
    shapes = (B, H, i, D), (B, HK, j, D), (B, HK, j, dv)
    return tuple(draw(*shape, seed=n, dtype=dtype) for n, shape in enumerate(shapes))


def with_empty_rows() -> torch.Tensor:
    """(b, 1, i, j): row 1 of item 0 allows no key, nor does item 1 allow any row but its last."""
    mask = torch.ones(B, 1, N, N, dtype=torch.bool)
    mask[0, 0, 1] = False
    mask[1, 0, :-1] = False
    return mask


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


# One of each kind of argument; each is a call on qkv().
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "key mask": {"mask": ids([1, 1, 0, 1, 1, 0], [1] * 6).bool()},
    "empty rows": {"mask": with_empty_rows(), "is_causal": True, "return_lse": True},
    "window": {"window_size": (2, 1), "q_offset": torch.tensor([0, 2])},
    "segments": {"q_segment_ids": ids([0, 0, 1, 1, 1, 2], [3] * 6)},
    "lengths": {"kv_lengths": ids([4, 6])[0], "q_lengths": ids([6, 2])[0], "return_lse": True},
    "everything else": {"bias": draw(1, H, N, N, seed=4), "sinks": draw(H, seed=5), "softcap": 2.0, "scale": -0.7,
                        "return_lse": True},
    "dropout": {"dropout": 0.3, "dropout_seed": torch.tensor(-7)},
    "dropout, two words": {"dropout": 0.3, "dropout_seed": torch.tensor([5, 9], dtype=torch.uint32)},
    "dropout, an int": {"dropout": 0.3, "dropout_seed": 2**63 + 1},
}  # fmt: skip
EACH_CALL = pytest.mark.parametrize("call", CALLS)


def flat(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def with_gradients(function: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """What a function gives, and the gradients of sin(out) + cos(lse), of an lse of -inf too."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    results = flat(function(*leaves))
    loss = results[0].sin().sum() + sum(x.cos().nan_to_num().sum() for x in results[1:])
    return (*(x.detach() for x in results), *torch.autograd.grad(loss, leaves))


def assert_same(ours: Any, theirs: Any, tolerance: dict[str, float]) -> None:
    for mine, other in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(mine, other, **tolerance)


def kept(out: torch.Tensor) -> np.ndarray:
    """The keep mask, seen in the output of equal logits on an identity for v."""
    return (out > 0).numpy()


def equal_logits(n: int) -> tuple[torch.Tensor, ...]:
    zeros = torch.zeros(B, H, n, D)
    return zeros, zeros, torch.eye(n).expand(B, H, n, n)


@pytest.fixture(autouse=True)
def compiler() -> Any:
    """Each test compiles from nothing, on one thread and without waiting for other processes."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


# torch.compile.


@EACH_CALL
def test_compiled_in_one_graph(call: str) -> None:
    """Traced forward and backward, with the operators that the eager call uses."""
    options = CALLS[call]

    def run(*inputs: torch.Tensor) -> Any:
        return attend(*inputs, **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(with_gradients(compiled, qkv()), with_gradients(run, qkv()), CLOSE)


def test_the_default_compiler_keeps_the_bits_of_dropout() -> None:
    """Whatever the seed and the length, in one compilation: seeds are tensors, lengths are dynamic.

    A module in training beside it draws a fresh mask each time, of the right density.
    """
    module = Attend(dropout=0.5)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return attend(q, k, v, dropout=0.3, dropout_seed=seed), module(q, k, v)

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    seeds = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 40).tolist()
    drawn = []
    for n, seed in enumerate([0, 1, -1, 2**31, 2**32, -(2**63), 2**63 - 1, *seeds]):
        size = (5, 6, 9, 17)[n % 4]
        with_seed, without = map(kept, compiled(*equal_logits(size), torch.tensor(seed)))
        expected = philox.keep_mask(seed % 2**64, (B, H, size, size), 0.3)
        np.testing.assert_array_equal(with_seed, expected, str(seed))
        drawn.append(without)
    assert len({mask.tobytes() for mask in drawn}) == len(drawn)
    size = sum(mask.size for mask in drawn)
    assert abs(sum(mask.sum() for mask in drawn) - size / 2) < 5 * size**0.5 / 2  # five standard deviations


def test_the_default_compiler_differentiates() -> None:
    options = CALLS["everything else"] | {"dropout": 0.3, "mask": with_empty_rows(), "is_causal": True}

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return attend(q, k, v, **options, dropout_seed=torch.tensor(11))

    compiled = torch.compile(run, fullgraph=True)
    assert_same(with_gradients(compiled, qkv()), with_gradients(run, qkv()), CLOSE)


def test_new_seeds_offsets_and_lengths_compile_nothing_new() -> None:
    counter = CompileCounter()

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **data: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, is_causal=True, dropout=0.3, **data)

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for n in range(4):
        data = {"dropout_seed": torch.tensor(n), "q_offset": torch.tensor(n), "kv_lengths": torch.tensor([n, 6])}
        assert_same(compiled(*qkv(), **data), run(*qkv(), **data), CLOSE)
    assert counter.frame_count == 1


def test_plain_numbers_as_arguments_of_a_compiled_function() -> None:
    """The second value of a number makes it a symbol: an offset in decoding, a scale, a seed."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offset: int, scale: float, seed: int) -> torch.Tensor:
        return attend(q, k, v, window_size=(3, 1), q_offset=offset, scale=scale, dropout=0.3, dropout_seed=seed)

    counter = CompileCounter()
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for n in range(12):
        numbers = (n % 5 + 1, 0.1 + n % 3, n)
        assert_same(compiled(*qkv(), *numbers), run(*qkv(), *numbers), CLOSE)
    assert counter.frame_count <= 4  # one, one with symbols, and bounds that an offset makes vacuous


def test_dynamic_sizes() -> None:
    """Also those that an offset is computed from, and a number of heads."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, is_causal=True, q_offset=k.shape[2] - q.shape[2])

    counter = CompileCounter()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    for i, j in ((6, 8), (3, 11), (9, 4)):
        assert_same(compiled(*qkv(i, j)), run(*qkv(i, j)), CLOSE)
    assert counter.frame_count <= 2


def test_a_module_in_training_and_in_evaluation() -> None:
    module = Attend(dropout=0.5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert not kept(compiled(*equal_logits(N))).all()
    module.eval()
    assert kept(compiled(*equal_logits(N))).all()
    module.train()
    assert not kept(compiled(*equal_logits(N))).all()


def test_autocast_inside_and_outside_of_what_is_compiled() -> None:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, softcap=2.0)

    def inside(*inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run(*inputs)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = run(*(x.bfloat16() for x in qkv()))
    assert_same(torch.compile(inside, fullgraph=True, backend="aot_eager")(*qkv()), expected, EXACT)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(compiled(*qkv()), expected, EXACT)
    assert compiled(*qkv()).dtype == torch.float32


def test_export() -> None:
    length = torch.export.Dim("length", min=2)
    module = Attend(is_causal=True).eval()
    program = torch.export.export(module, qkv(), dynamic_shapes=[{2: length}] * 3)
    assert_same(program.module()(*qkv(9, 9)), module(*qkv(9, 9)), CLOSE)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes are those of the trace
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@EACH_CALL
def test_torch_jit_trace(call: str) -> None:
    def run(*inputs: torch.Tensor) -> Any:
        return attend(*inputs, **CALLS[call])

    traced = torch.jit.trace(run, qkv())
    for inputs in (qkv(), tuple(-2 * x for x in qkv())):
        assert_same(traced(*inputs), run(*inputs), CLOSE)


# autocast.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_q_k_v_at_the_door_and_is_off_inside(dtype: torch.dtype) -> None:
    options = CALLS["everything else"]
    cast = tuple(x.to(dtype) for x in qkv())
    with torch.autocast("cpu", dtype):
        out, lse = attend(*qkv(), **options)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    # Were it on inside, the products would be rounded to 8 or 11 bits: not the same to the bit.
    assert_same((out, lse), attend(*cast, **options), EXACT)


def test_autocast_takes_mixed_dtypes_and_leaves_float64() -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attend(q, k.half(), v.bfloat16())
        wide = attend(q.double(), k.double(), v.double())
        with pytest.raises(TypeError, match=r"^k: expected float64, the dtype of q, got bfloat16"):
            attend(q.double(), k, v.double())
    assert_same(mixed, attend(q.bfloat16(), k.half().bfloat16(), v.bfloat16()), EXACT)
    assert_same(wide, attend(q.double(), k.double(), v.double()), EXACT)


def test_autocast_passes_gradients_back_in_their_own_dtype() -> None:
    bias = draw(1, 1, N, N, seed=6).double()
    leaves = [x.requires_grad_() for x in (*qkv(), bias)]
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*leaves[:3], bias=leaves[3])
    gradients = torch.autograd.grad(out.float().sin().sum(), leaves)
    assert [x.dtype for x in gradients] == [torch.float32] * 3 + [torch.float64]
    assert all(x.abs().sum() > 0 for x in gradients)


def test_explain_says_what_autocast_makes_of_a_call() -> None:
    q, k, v = qkv(dv=D)
    bias = torch.zeros(1, 1, N, N)
    assert explain(q, k, v, bias=bias).chosen == "sdpa"
    with torch.autocast("cpu", torch.bfloat16):
        explanation = explain(q, k, v, bias=bias)
        assert explanation.chosen == "einsum"
        attend(q, k, v, bias=bias, implementation=explanation.chosen)
    assert explanation == explain(q.bfloat16(), k.bfloat16(), v.bfloat16(), bias=bias)


# torch.func.


def einsum(*inputs: torch.Tensor, **options: Any) -> Any:
    return attend(*inputs, implementation="einsum", **options)


LANES = 3


def lanes(*shape: int) -> torch.Tensor:
    return draw(LANES, *shape, seed=7)


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ({"q": lanes(B, H, N, D)}, {"is_causal": True}),
        ({"q": lanes(B, H, N, D), "k": lanes(B, HK, N, D), "v": lanes(B, HK, N, DV)}, {"return_lse": True}),
        ({"mask": torch.rand(LANES, B, N, generator=torch.Generator().manual_seed(0)) < 0.5}, {"return_lse": True}),
        ({"bias": lanes(1, H, N, N), "sinks": lanes(H)}, {"softcap": 1.0}),
        ({"q_offset": torch.tensor([0, 1, -2])}, {"is_causal": True, "return_lse": True}),
        ({"q_lengths": torch.tensor([[1, 2], [6, 0], [3, 9]])}, {"return_lse": True}),
        ({"kv_lengths": torch.tensor([[0, 6], [6, 1], [2, 2]])}, {"is_causal": True}),
        ({"q_segment_ids": torch.arange(LANES * B * N).view(LANES, B, N) // 4}, {}),
        ({"dropout_seed": torch.tensor([1, -2, 2**40])}, {"dropout": 0.5}),
        ({"q": lanes(B, H, N, D), "dropout_seed": torch.arange(6).view(3, 2).to(torch.uint32)}, {"dropout": 0.5}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_vmap_is_a_loop(data: dict[str, torch.Tensor], options: dict[str, Any]) -> None:
    inputs = dict(zip("qkv", qkv(), strict=True))

    def run(lane: dict[str, torch.Tensor]) -> Any:
        return einsum(**(inputs | lane), **options)

    together = flat(vmap(run)(data))
    alone = [flat(run({name: x[n] for name, x in data.items()})) for n in range(LANES)]
    assert_same(together, tuple(torch.stack(parts) for parts in zip(*alone, strict=True)), CLOSE)


def test_vmap_within_vmap_and_over_gradients() -> None:
    seeds = torch.arange(4).view(2, 2)
    q, k, v = qkv()

    def gradient(seed: torch.Tensor) -> torch.Tensor:
        return grad(lambda q: einsum(q, k, v, dropout=0.5, dropout_seed=seed).sin().sum())(q)

    together = vmap(vmap(gradient))(seeds)
    for row, column in np.ndindex(2, 2):
        torch.testing.assert_close(together[row, column], gradient(seeds[row, column]), **CLOSE)


TINY = (1, 2, 1, 3, 4, 2, 3)  # b, h, hk, i, j, d, dv
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal, empty rows": {"mask": torch.tensor([[False, True, True, False]]), "is_causal": True, "q_offset": 0},
    "softcap, window": {"softcap": 1.5, "window_size": (1, None), "q_offset": 1},
    "dropout": {"dropout": 0.4, "dropout_seed": 3},
    "lengths": {"q_lengths": torch.tensor([2]), "kv_lengths": torch.tensor([3])},
}


def tiny() -> dict[str, torch.Tensor]:
    b, h, hk, i, j, d, dv = TINY
    shapes = {"q": (b, h, i, d), "k": (b, hk, j, d), "v": (b, hk, j, dv), "bias": (1, h, 1, j), "sinks": (h,)}
    return {name: draw(*shape, seed=n, dtype=torch.float64) for n, (name, shape) in enumerate(shapes.items())}


HOLES = torch.zeros(1, 2, 1, 4, dtype=torch.bool)
HOLES[0, 1, 0, 2] = True


def loss(data: dict[str, torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
    """Of out and lse, with -inf in the bias and in the lse of empty rows."""
    data = data | {"bias": torch.where(HOLES, -torch.inf, data["bias"])}
    out, lse = einsum(**data, **options, return_lse=True)
    return out.sin().sum() + torch.where(lse == -torch.inf, 0, lse).cos().sum()


def oracle_gradient(data: dict[str, torch.Tensor], options: dict[str, Any]) -> dict[str, np.ndarray]:
    """The gradient of `loss`, by the oracle's hand."""
    given = {name: x.numpy() for name, x in data.items()}
    given["bias"] = np.where(HOLES, -np.inf, given["bias"])
    given |= {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    answer = oracle.attend(**given)
    finite = np.where(np.isfinite(answer.lse), answer.lse, 0.0)
    return oracle.backward(**given, out_cotangent=np.cos(answer.out), lse_cotangent=-np.sin(finite))


@pytest.mark.parametrize("feature", FEATURES)
def test_first_and_second_derivatives_against_the_oracle(feature: str) -> None:
    """Reverse, forward, reverse over forward and over reverse; the second by differences of the oracle's gradients."""
    data, options = tiny(), FEATURES[feature]
    direction = {name: draw(*x.shape, seed=9 + n, dtype=torch.float64) for n, (name, x) in enumerate(data.items())}
    step = 1e-5

    def at(scale: float) -> dict[str, np.ndarray]:
        return oracle_gradient({name: x + scale * direction[name] for name, x in data.items()}, options)

    first, ahead, behind = at(0.0), at(step), at(-step)
    gradient = grad(loss)
    _, along = jvp(lambda d: loss(d, options), (data,), (direction,))
    _, forward_over_reverse = jvp(lambda d: gradient(d, options), (data,), (direction,))
    reverse_over_reverse = grad(lambda d: sum((gradient(d, options)[n] * direction[n]).sum() for n in d))(data)
    for name, got in gradient(data, options).items():
        np.testing.assert_allclose(got, first[name], rtol=1e-12, atol=1e-13)
        second = (ahead[name] - behind[name]) / (2 * step)  # right to step**2, some 1e-9 here
        np.testing.assert_allclose(forward_over_reverse[name], second, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(reverse_over_reverse[name], forward_over_reverse[name], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(along, sum((first[name] * direction[name].numpy()).sum() for name in first), rtol=1e-12)


def test_hessian_and_jacobians() -> None:
    data = tiny()
    others = {name: x for name, x in data.items() if name != "q"}

    def of_q(q: torch.Tensor) -> torch.Tensor:
        return loss({"q": q, **others}, FEATURES["softcap, window"])

    full = hessian(of_q)(data["q"])
    assert full.abs().sum() > 0
    torch.testing.assert_close(full, jacrev(jacfwd(of_q))(data["q"]), rtol=1e-12, atol=1e-14)
    n = data["q"].numel()
    torch.testing.assert_close(full.view(n, n), full.view(n, n).T, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("feature", FEATURES)
def test_gradcheck_twice(feature: str) -> None:
    """torch's own: against differences of `attend`, with autograd rather than torch.func, batched and forward too."""
    names = ("q", "k", "v", "bias", "sinks")
    options = FEATURES[feature]

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        return loss(dict(zip(names, inputs, strict=True)), options)

    inputs = [x.requires_grad_() for x in tiny().values()]
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, inputs, check_fwd_over_rev=True)


def test_others_raise_where_they_have_no_derivative() -> None:
    """sdpa on a CPU has a first derivative by reverse mode: what it lacks is torch's error, never a silent zero."""
    q, k, v = (x.double().requires_grad_() for x in qkv(dv=D))
    sdpa = partial(attend, implementation="sdpa", scale=0.25)  # of a power of two it is torch's on every processor
    with pytest.raises(NotImplementedError):
        jvp(lambda q: sdpa(q, k, v), (q,), (q,))
    first = torch.autograd.grad(sdpa(q, k, v).sin().sum(), q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(first.sum(), q)


@pytest.mark.parametrize("scales_factors", [False, True])
@pytest.mark.parametrize(("scale", "gradient"), [(0.3, True), (0.3, False), (-0.5, True)])
def test_gradients_are_of_the_logits_of_the_output(
    monkeypatch: pytest.MonkeyPatch, scales_factors: bool, scale: float, gradient: bool
) -> None:
    """Where torch's kernel rounds a scale otherwise on the way back, which is data of the processor, ours is taken."""
    monkeypatch.setattr(sdpa_module, "SCALES_FACTORS", scales_factors)
    x = [x.detach().requires_grad_(gradient) for x in qkv(dv=D)]
    out = attend(*x, implementation="sdpa", scale=scale)
    assert ("Scaled" in type(out.grad_fn).__name__) == (gradient and not (scales_factors and scale == 0.3))
    torch.testing.assert_close(out, einsum(*x, scale=scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_one_key_are_within_budget_for_any_number_of_queries(dtype: torch.dtype) -> None:
    """dp - delta is 0 for every query; what torch's kernel leaves of it adds up, and the budget does not grow."""
    x = [torch.randn(2, 2, n, 64, generator=torch.Generator().manual_seed(n), dtype=dtype) for n in (2048, 1, 1)]
    q, k, v = (x.requires_grad_() for x in x)
    for implementation in (None, "sdpa"):
        dq, dk, _ = torch.autograd.grad(attend(q, k, v, implementation=implementation).sin().sum(), (q, k, v))
        assert not dq.any() and not dk.any()


@pytest.mark.parametrize("which", ["lengths", "key mask", "mask", "mask of queries", "segments"])
def test_rows_that_see_one_key_have_no_part_in_dk(which: str) -> None:
    """Beside others that see more, whose gradients are einsum's; what is NaN stays so."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 64, generator=draw).requires_grad_() for n in (512, 512, 512))
    one = torch.arange(512) == 3
    rows = torch.stack([one.expand(512, 512), torch.rand(512, 512, generator=draw) < 0.5])[:, None]
    options: dict[str, Any] = {
        "lengths": {"kv_lengths": torch.tensor([1, 400])},
        "key mask": {"mask": torch.stack([one, ~one])},
        "mask": {"mask": rows},
        "mask of queries": {"mask": rows[:, :, :, 3:4], "kv_lengths": torch.tensor([1, 9])},
        "segments": {"q_segment_ids": torch.arange(512).clamp(max=1).expand(2, 512),
                     "kv_segment_ids": torch.stack([one.long(), torch.arange(512).clamp(max=1)])},
    }[which]  # fmt: skip
    weights = torch.randn(2, 2, 512, 64, generator=draw)

    def gradients(implementation: str) -> tuple[torch.Tensor, ...]:
        out = attend(q, k, v, implementation=implementation, **options)
        return out, *torch.autograd.grad(out, (q, k, v), weights)

    ours, theirs = gradients("sdpa"), gradients("einsum")
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)
    empty = theirs[2] == 0
    assert empty.any()
    assert not ours[2][empty].any()
    poisoned = q.detach().index_fill(2, torch.tensor([5]), torch.nan)
    found, wanted = (attend(poisoned, k, v, implementation=name, **options)[:, :, 5] for name in ("sdpa", "einsum"))
    assert torch.equal(found.isnan(), wanted.isnan())


def test_merge_under_func() -> None:
    q, k, v = (x.double() for x in qkv())

    def split(q: torch.Tensor) -> torch.Tensor:
        parts = [einsum(q, k[:, :, part], v[:, :, part], return_lse=True) for part in (slice(0, 2), slice(2, None))]
        out, lse = merge(*map(list, zip(*parts, strict=True)))
        return out.sin().sum() + lse.cos().sum()

    def whole(q: torch.Tensor) -> torch.Tensor:
        out, lse = einsum(q, k, v, return_lse=True)
        return out.sin().sum() + lse.cos().sum()

    torch.testing.assert_close(grad(split)(q), grad(whole)(q), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(jvp(grad(split), (q,), (q,)), jvp(grad(whole), (q,), (q,)), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(vmap(split)(torch.stack([q, -q])), torch.stack([split(q), split(-q)]))


def test_checkpointing_draws_the_same_dropout_again() -> None:
    module, inputs = Attend(dropout=0.5), qkv()

    def run(*inputs: torch.Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(module, *inputs, use_reentrant=False)

    torch.manual_seed(3)
    again = with_gradients(run, inputs)
    torch.manual_seed(3)
    assert_same(again, with_gradients(module, inputs), EXACT)


# Implementations that work by blocks, on lengths of several blocks.

LONG = 300
BLOCKS = pytest.mark.parametrize("implementation", ["blockwise", "rowwise"])
MIXED: dict[str, Any] = {
    "mask": torch.rand(B, LONG, generator=torch.Generator().manual_seed(0)) < 0.8,
    "kv_lengths": torch.tensor([LONG, 40]),
    "is_causal": True,
    "softcap": 2.0,
    "dropout": 0.3,
    "dropout_seed": torch.tensor(5),
    "return_lse": True,
}


@BLOCKS
def test_blocks_compile_and_need_no_data(implementation: str) -> None:
    def run(*inputs: torch.Tensor, **options: Any) -> Any:
        return attend(*inputs, **(MIXED | options), implementation=implementation)

    inputs = qkv(LONG, LONG)
    expected = with_gradients(run, inputs)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(with_gradients(compiled, inputs), expected, CLOSE)
    meta = {name: x.to("meta") for name, x in MIXED.items() if isinstance(x, torch.Tensor)}
    shapes = [(x.shape, x.dtype) for x in expected[:2]]
    assert [(x.shape, x.dtype) for x in run(*(x.to("meta") for x in inputs), **meta)] == shapes
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) for name, x in MIXED.items() if isinstance(x, torch.Tensor)}
        assert [(x.shape, x.dtype) for x in run(*map(mode.from_tensor, inputs), **fake)] == shapes


@BLOCKS
def test_blocks_differentiate_twice_and_batch_as_einsum_does(implementation: str) -> None:
    q, k, v = (x.double() for x in qkv(LONG, LONG))

    def run(q: torch.Tensor, seed: torch.Tensor, name: str) -> torch.Tensor:
        out, lse = attend(q, k, v, **(MIXED | {"dropout_seed": seed}), implementation=name)
        return out.sin().sum() + torch.where(lse == -torch.inf, 0, lse).cos().sum()

    def twice(name: str) -> torch.Tensor:
        return grad(lambda q: grad(run)(q, torch.tensor(5), name).sin().sum())(q)

    torch.testing.assert_close(twice(implementation), twice("einsum"), rtol=1e-9, atol=1e-11)
    seeds = torch.tensor([5, -6])
    lanes = [vmap(lambda seed, name=name: grad(run)(q, seed, name))(seeds) for name in (implementation, "einsum")]
    torch.testing.assert_close(*lanes, rtol=1e-9, atol=1e-11)


# Tensors without data, or laid out otherwise.


@EACH_CALL
def test_meta_and_fake_tensors_have_the_right_shapes(call: str) -> None:
    options, expected = CALLS[call], flat(attend(*qkv(), **CALLS[call]))

    def same(results: Any, device: str) -> None:
        for got, want in zip(flat(results), expected, strict=True):
            assert (got.shape, got.dtype, got.device.type) == (want.shape, want.dtype, device)

    meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    same(attend(*(x.to("meta") for x in qkv()), **meta), "meta")
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        same(attend(*map(mode.from_tensor, qkv()), **fake), "cpu")
        assert Attend(dropout=0.5)(*map(mode.from_tensor, qkv())).shape == expected[0].shape


def every_second(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, torch.full_like(x, torch.nan)], 3).flatten(2, 3)[:, :, ::2]


@EACH_CALL
@pytest.mark.parametrize(
    "lay_out",
    [every_second, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.mT.contiguous().mT,
     lambda x: x.flip(-1).contiguous().flip(-1)],
    ids=["rows of a larger block", "another layout", "columns", "reversed"],
)  # fmt: skip
def test_memory_layout_means_nothing(call: str, lay_out: Callable[[torch.Tensor], torch.Tensor]) -> None:
    options = CALLS[call]
    strided = with_gradients(lambda *inputs: attend(*map(lay_out, inputs), **options), qkv())
    assert_same(strided, with_gradients(lambda *inputs: attend(*inputs, **options), qkv()), CLOSE)


def test_expanded_inputs_sum_their_gradients() -> None:
    q, k, v = (x[:1].double() for x in qkv())
    options = {"mask": with_empty_rows(), "is_causal": True, "return_lse": True}

    def expanded(*inputs: torch.Tensor) -> Any:
        return attend(*(x.expand(B, -1, -1, -1) for x in inputs), **options)

    def copied(*inputs: torch.Tensor) -> Any:
        return attend(*(x.repeat(B, 1, 1, 1) for x in inputs), **options)

    assert_same(with_gradients(expanded, (q, k, v)), with_gradients(copied, (q, k, v)), {"rtol": 1e-12, "atol": 1e-12})


# What a call leaves alone.


def state() -> dict[str, Any]:
    """Everything global that a careless library touches."""
    return {
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "sdp": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ),
        "threads": torch.get_num_threads(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "warnings": list(warnings.filters),
        "anomaly": torch.is_anomaly_enabled(),
        "random numbers": torch.get_rng_state().tolist(),
        "random numbers of NumPy": np.random.get_state()[1].tolist(),  # noqa: NPY002
    }


@EACH_CALL
def test_nothing_global_is_touched_and_no_input_is_written_to(call: str) -> None:
    inputs, options = qkv(), CALLS[call]
    given = [*inputs, *(x for x in options.values() if isinstance(x, torch.Tensor))]
    copies, versions, before = [x.clone() for x in given], [x._version for x in given], state()
    with_gradients(lambda *inputs: attend(*inputs, **options), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        attend(*inputs, **options)
    explain(*inputs, **options)
    Attend(dropout=0.5)(*inputs, dropout_seed=1)
    assert state() == before
    assert [x._version for x in given] == versions
    for x, copy in zip(given, copies, strict=True):
        torch.testing.assert_close(x, copy, **EXACT)


@EACH_CALL
def test_inference_mode_and_no_grad(call: str) -> None:
    expected = attend(*qkv(), **CALLS[call])
    with torch.inference_mode():
        assert_same(attend(*qkv(), **CALLS[call]), expected, CLOSE)
        assert all(x.is_inference() for x in flat(attend(*qkv(), **CALLS[call])))
    leaves = [x.requires_grad_() for x in qkv()]
    with torch.no_grad():
        results = flat(attend(*leaves, **CALLS[call]))
    assert not any(x.requires_grad for x in results)
    assert_same(results, expected, CLOSE)


def test_the_default_dtype_has_no_say() -> None:
    expected = attend(*qkv(), **CALLS["everything else"])
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(attend(*qkv(), **CALLS["everything else"]), expected, EXACT)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_operator_of_dropout_is_a_good_operator() -> None:
    arguments = (torch.tensor([3, 4]), 2, 3, 4, 5, 0.5)
    checks = torch.library.opcheck(torch.ops.attend_torch.keep_mask.default, arguments)
    assert set(checks.values()) == {"SUCCESS"}

"""Calls that are recorded once and then launched alone: that they give the same, and when they must not be.

The package is one of the form of flash-attn-4, whose kernels compute on a CPU; what its own give is shown on a GPU.
"""

import functools
import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import attend_torch
import flash_fakes
from attend_torch import tape
from attend_torch.implementations import fa4

# As the package does it: a function looks at its arrays, makes memory, looks kernels up in a cache, and launches them.
PACKAGE = """
import torch
from typing import NamedTuple
class Aux(NamedTuple):
    tensors: object = None
class Sinks(NamedTuple):
    sinks: object
    dsinks: object
def _counted(name):
    counts[name] = counts.get(name, 0) + 1
def _get(function, key, kernel):
    if key not in function.compile_cache:
        function.compile_cache[key] = kernel
    return function.compile_cache[key]
def _flash_attn_fwd(q, k, v, *, out, return_lse, softmax_scale, **options):
    _counted("forward")
    if flaw == "another operation":
        q = q * 1
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    shape = (q.shape[0], q.shape[2], q.shape[1]) if q.ndim == 4 else (q.shape[1], q.shape[0])
    lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    key = (q.dtype, tuple(options))
    if key not in _flash_attn_fwd.compile_cache:
        _flash_attn_fwd.compile_cache[key] = kernels["forward"]
    given = (q.detach(), k.detach(), v.detach(), out.detach(), lse, softmax_scale, Aux(None), *options.values())
    if flaw == "another array":
        given = (*given, torch.arange(3))
    if flaw == "an object":
        given = (*given, object())
    if flaw == "names":
        _flash_attn_fwd.compile_cache[key](*given[:-1], learnable_sink=given[-1])
    else:
        _flash_attn_fwd.compile_cache[key](*given)
    return out, lse, None, None, None
_flash_attn_fwd.compile_cache = {}
def _before(lse, sums):
    if "before" not in _before.compile_cache:
        _before.compile_cache["before"] = kernels["before"]
    _before.compile_cache["before"](lse, sums)
_before.compile_cache = {}
def _after(sums, result, sinks):
    if "after" not in _after.compile_cache:
        _after.compile_cache["after"] = kernels["after"]
    _after.compile_cache["after"](sums, result, sinks)
_after.compile_cache = {}
def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale, *, learnable_sink, **options):
    _counted("backward")
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    dsinks = None if learnable_sink is None else torch.empty_like(learnable_sink)
    sums, more = torch.empty(lse.shape, dtype=torch.float32, device=q.device), torch.zeros(k.shape, dtype=torch.float32)
    _before(lse, sums)
    if "main" not in _flash_attn_bwd.compile_cache:
        _flash_attn_bwd.compile_cache["main"] = kernels["main"]
    _flash_attn_bwd.compile_cache["main"](q.detach(), k.detach(), v.detach(), out, dout, sums, softmax_scale,
        dq, more, dv, None if learnable_sink is None else Sinks(learnable_sink, dsinks), *options.values())
    _after(more, dk, Aux(None))
    return (dq, dk, dv) if learnable_sink is None else (dq, dk, dv, dsinks)
_flash_attn_bwd.compile_cache = {}
"""


def forward(q: Any, k: Any, v: Any, out: Any, lse: Any, scale: float, aux: tuple, *options: Any, **named: Any) -> None:
    assert aux == (None,)
    names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "softcap", "window_size_left",
             "window_size_right", "learnable_sink")  # fmt: skip
    given = dict(zip(names, options, strict=False)) | named
    lse.copy_(flash_fakes._flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=True, out=out, **given)[1])


def main(
    q: Any, k: Any, v: Any, out: Any, dout: Any, lse: Any, scale: float, dq: Any, dk: Any, dv: Any, sinks: Any,
    *options: Any,
) -> None:  # fmt: skip
    names = ("softcap", "window_size_left", "window_size_right", "cu_seqlens_q", "cu_seqlens_k", "seqused_q",
             "seqused_k", "deterministic", "dlse")  # fmt: skip
    found = flash_fakes._flash_attn_bwd(
        q, k, v, out, dout, lse, scale, learnable_sink=sinks and sinks.sinks, **dict(zip(names, options, strict=True))
    )
    dq.copy_(found[0])
    dk += found[1]  # into what must be zeros
    dv.copy_(found[2])
    if sinks:
        sinks.dsinks.copy_(found[3])


KERNELS = {
    "forward": forward, "main": main, "before": lambda lse, sums: sums.copy_(lse),
    "after": lambda sums, result, _: result.copy_(sums),
}  # fmt: skip


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Its module: counts says how often its functions were called, flaw what is wrong with them."""
    flash_fakes.install(monkeypatch)
    interface: Any = sys.modules["flash_attn.cute.interface"]
    vars(interface).update(counts={}, flaw="", kernels=dict(KERNELS))
    exec(PACKAGE, vars(interface))
    clear()
    yield interface
    clear()


def clear() -> None:
    for tapes in (fa4._FORWARD, fa4._BACKWARD):
        tapes.tapes.clear()


def draw(seed: int, h: int = 4, b: int = 2, i: int = 6, j: int = 6, d: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, h, i, d), (b, 2, j, d), (b, 2, j, d))
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def run(inputs: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """out and gradients."""
    leaves = [x.detach().requires_grad_() for x in (*inputs, *([options["sinks"]] if "sinks" in options else []))]
    if "sinks" in options:
        options |= {"sinks": leaves[3]}
    found = attend_torch.attend(*leaves[:3], implementation="fa4", **options)
    found = found if isinstance(found, tuple) else (found,)
    weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape) for x in found]
    return [*found, *torch.autograd.grad(found, leaves, weights)]


LENGTHS = torch.tensor([4, 6])
SINKS = torch.linspace(-1, 1, 4).bfloat16()
IDS = torch.tensor([[0, 0, 1, 1, 1, 2]])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"window_size": (2, 1)},
        {"return_lse": True},
        {"softcap": 3.0, "scale": 0.3},
        {"sinks": SINKS, "return_lse": True},
        {"q_lengths": LENGTHS, "kv_lengths": LENGTHS},
        {"q_segment_ids": IDS},
        {"q_segment_ids": IDS, "layout": "bnhd", "return_lse": True},
    ],
    ids=str,
)
def test_what_is_played_is_what_the_package_gives(package: Any, options: dict[str, Any]) -> None:
    b = 1 if "q_segment_ids" in options else 2
    given = [draw(seed, b=b) for seed in range(4)]
    if "layout" in options:
        given = [[x.transpose(1, 2).contiguous() for x in each] for each in given]
    played = [run(each, **options) for each in given]
    assert package.counts == {"forward": 2, "backward": 2}  # for two calls were played
    for inputs, ours in zip(given, played, strict=True):
        clear()
        for mine, theirs in zip(ours, run(inputs, **options), strict=True):
            assert torch.equal(mine, theirs)
            assert mine.stride() == theirs.stride()


@pytest.mark.parametrize("flaw", ["another operation", "another array", "an object", "names"])
def test_what_does_more_than_launch_is_left_to_the_package(package: Any, flaw: str) -> None:
    package.flaw = flaw
    if flaw in ("another array", "an object"):
        package.kernels["forward"] = lambda *given: forward(*given[:-1])
    given = [draw(seed) for seed in range(4)]
    found = [attend_torch.attend(*each, implementation="fa4") for each in given]
    assert package.counts == {"forward": 4}
    expected = [attend_torch.attend(*each, implementation="einsum") for each in given]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)


def test_a_function_of_another_form_is_left_as_it_is(package: Any) -> None:
    inner = package._flash_attn_fwd

    @functools.wraps(inner)
    def around(*given: Any, **options: Any) -> Any:
        return inner(*given, **options)

    package._flash_attn_fwd = around
    for seed in range(4):
        attend_torch.attend(*draw(seed), implementation="fa4")
    assert package.counts == {"forward": 4}


def shifted(x: torch.Tensor) -> torch.Tensor:
    """The same in memory that is not aligned."""
    flat = torch.empty(x.numel() + 64, dtype=x.dtype)
    skip = (-flat.data_ptr() % 16) // 2 + 1
    return flat[skip:][: x.numel()].view(x.shape).copy_(x)


def test_what_the_package_copies_is_copied(package: Any) -> None:
    for seed in range(4):
        q, k, v = draw(seed)
        apart = [torch.stack([x, x], -1)[..., 0] for x in (q, k, v)]
        for ours, theirs in zip(run(apart), run([q, k, v]), strict=True):
            assert torch.equal(ours, theirs)
    assert package.counts["forward"] == 4


def test_what_looks_different_is_recorded_anew(package: Any) -> None:
    q, k, v = draw(0, h=2)
    others: list[tuple[list[torch.Tensor], dict[str, Any]]] = [
        ([q, k, v], {}),
        ([shifted(q), k, v], {}),
        ([q, k.transpose(1, 2).contiguous().transpose(1, 2), v], {}),
        ([q, k[:1].expand(2, -1, -1, -1), v], {}),
        ([q.half(), k.half(), v.half()], {}),
        ([q, k, k], {}),
        ([q, k, v], {"scale": 0.5}),
        ([q, k, v], {"is_causal": True}),
    ]
    for count, (inputs, options) in enumerate(others):
        for _ in range(3):
            attend_torch.attend(*inputs, implementation="fa4", **options)
        assert package.counts["forward"] == 2 * (count + 1)
    a, b = ([q, k, x] for x in (v, k))
    for inputs in (a, b, a):
        expected = attend_torch.attend(*inputs, implementation="einsum")
        found = attend_torch.attend(*inputs, implementation="fa4")
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    assert package.counts["forward"] == 2 * len(others)


def test_the_package_is_as_it_was(package: Any) -> None:
    before = {name: value for name, value in vars(package).items() if name != "counts"}
    caches = package._flash_attn_fwd.compile_cache, package._flash_attn_bwd.compile_cache
    for _ in range(3):
        run(draw(0))
    assert {name: value for name, value in vars(package).items() if name != "counts"} == before
    assert all(a is b for a, b in zip(caches, (package._flash_attn_fwd.compile_cache,
                                               package._flash_attn_bwd.compile_cache), strict=True))  # fmt: skip
    assert set(caches[0].values()) == {forward}


def test_no_array_is_kept(package: Any) -> None:
    inputs = draw(0)
    kept = [weakref.ref(x) for x in inputs]
    for _ in range(3):
        kept += [weakref.ref(x) for x in run(inputs)]
    del inputs
    gc.collect()
    assert [x() for x in kept] == [None] * len(kept)


def test_what_looks_on_gets_the_package(package: Any) -> None:
    q, k, v = draw(0)
    for _ in range(3):
        attend_torch.attend(q, k, v, implementation="fa4")
    lanes = torch.func.vmap(lambda q: attend_torch.attend(q, k, v, implementation="fa4"))(torch.stack([q, 2 * q]))
    assert torch.equal(lanes[0], attend_torch.attend(q, k, v, implementation="fa4"))
    gradient = torch.func.grad(lambda q: attend_torch.attend(q, k, v, implementation="fa4").float().sum())(q)
    leaf = q.clone().requires_grad_()
    out = attend_torch.attend(leaf, k, v, implementation="fa4")
    assert torch.equal(gradient, torch.autograd.grad(out.float().sum(), leaf)[0])
    again = attend_torch.attend(leaf, k, v, implementation="fa4")
    (dq,) = torch.autograd.grad(again.float().sum(), leaf, create_graph=True)
    assert torch.equal(dq, gradient)
    with pytest.raises(RuntimeError, match="fa4 has first derivatives only"):
        dq.float().sum().backward()


def test_out_is_no_view_that_autograd_would_not_let_be_written_to(package: Any) -> None:
    leaf, k, v = draw(0)
    for x in (leaf, leaf.clone().requires_grad_()):
        for _ in range(3):
            out = attend_torch.attend(x, k, v, implementation="fa4")
            assert not out._is_view()


def test_an_error_leaves_nothing_behind(package: Any) -> None:
    def fail(*given: Any) -> None:
        raise RuntimeError("the device is lost")

    q, k, v = draw(0)
    attend_torch.attend(q, k, v, implementation="fa4")
    (key,) = package._flash_attn_fwd.compile_cache
    package._flash_attn_fwd.compile_cache[key] = fail
    with pytest.raises(RuntimeError, match="the device is lost"):
        attend_torch.attend(q, k, v, implementation="fa4")
    package._flash_attn_fwd.compile_cache[key] = forward
    found = [attend_torch.attend(q, k, v, implementation="fa4") for _ in range(2)]
    assert torch.equal(*found)
    assert package.counts == {"forward": 3}


def test_many_threads(package: Any) -> None:
    given = [draw(seed) for seed in range(4)]
    expected = [run(each, is_causal=True) for each in given]
    clear()
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(6):
            for ours, theirs in zip(run(given[n], is_causal=True), expected[n], strict=True):
                if not torch.equal(ours, theirs):
                    wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong


def test_what_is_compiled_meanwhile_is_recorded_later(package: Any) -> None:
    for n in range(5):
        if n == 1:
            package._flash_attn_fwd.compile_cache.clear()
        attend_torch.attend(*draw(n), implementation="fa4")
    assert package.counts == {"forward": 3}


def test_recordings_are_forgotten(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "KEPT", 3)
    for length in range(1, 9):
        attend_torch.attend(*draw(0, i=length, j=length), implementation="fa4")
        assert len(fa4._FORWARD.tapes) <= 3

"""How torch launches Triton's kernels: what is found anew in each call, and what is kept for calls that look alike.

No kernel runs: what Triton would compile is one that writes down what it is launched with, and arrays on a CPU stand in
for those on a GPU. What the kernels compute is for test_triton.py.
"""

import contextlib
import gc
import os
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attend_shared.call import Arrays, Call, canonical, check
from attend_shared.kernels import cache_folder
from attend_torch import again, launches
from attend_torch.arrays import FRAMEWORK
from attend_torch.implementations import triton
from conftest import require

require("triton")

HEAD = 13  # what the C launcher takes before the kernel's own arguments


class Machine:
    """A GPU that is not there: its current device and stream, and what was launched, by whom and with what."""

    def __init__(self) -> None:
        self.device, self.stream = -1, 7
        self.entered: list[int] = []
        self.seen: list[tuple[str, tuple]] = []
        self.hooks = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=SimpleNamespace(calls=[]))

    def compile(self, names: list[str], *arguments: Any, num_warps: int, num_stages: int, **constants: Any) -> Any:
        """What kernel[grid] is: it compiles for its arguments, which have these names, and launches."""
        if os.environ.get(cache_folder.VARIABLE) == "":
            raise RuntimeError("Could not create or locate cache dir")  # as Triton does
        self.seen.append(("compiled", (*arguments, *(constants[name] for name in names if name in constants))))
        run = SimpleNamespace(
            launch=lambda *given: self.seen.append(("launched", given)), global_scratch_size=0, profile_scratch_size=0,
            launch_cooperative_grid=False, launch_pdl=False,
        )  # fmt: skip
        return Grids(self.public, run=run, function=5, packed_metadata=(4, 1, 0))

    def public(self, *arguments: Any, stream: int) -> None:
        self.seen.append(("public", (stream, *arguments)))

    @contextlib.contextmanager
    def enter(self, device: int) -> Iterator[None]:
        self.entered.append(device)
        before, self.device = self.device, device
        yield
        self.device = before


class Grids(SimpleNamespace):
    """What is launched as this[grid](...)."""

    def __init__(self, launch: Callable[..., Any], **others: Any) -> None:
        super().__init__(launch=launch, **others)

    def __getitem__(self, grid: Any) -> Any:
        return self.launch


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    from triton import JITFunction

    from attend_shared.kernels import attention, bounds, gradients, keys, queries, sinks

    found = Machine()
    for module in (attention, bounds, gradients, keys, queries, sinks):
        for name, kernel in [*vars(module).items()]:
            if isinstance(kernel, JITFunction):
                names = kernel.arg_names
                monkeypatch.setattr(module, name, Grids(partial(found.compile, names), arg_names=names))
    knobs = SimpleNamespace(runtime=found.hooks)
    driver = launches._Driver(lambda: found.device, lambda device: found.stream, knobs)
    monkeypatch.setattr(launches, "_driver", lambda: driver)
    monkeypatch.setattr(launches, "_empty", lambda shape, strides, dtype: torch.empty(shape, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "device", found.enter)
    monkeypatch.setattr("triton.backends.nvidia.driver.CudaLauncher", SimpleNamespace)
    triton._plan.cache_clear()
    yield found
    triton._plan.cache_clear()  # of plans that hold such kernels


def draw(*shape: int, at: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Memory that begins `at` numbers behind a place that is aligned."""
    flat = torch.zeros(torch.Size(shape).numel() + 64, dtype=dtype)
    skip = -flat.data_ptr() % 16 // flat.element_size() + at
    return flat[skip:][: torch.Size(shape).numel()].view(shape)


def attend(q: Any, k: Any, v: Any, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What `attend` does behind the door on a GPU."""
    arrays = Arrays(q, k, v, **given)
    call = check(FRAMEWORK, arrays, False, None, None, None, 0.0, True, "bhnd", "triton")
    return triton.attend(call._replace(platform="cuda"), canonical(call, arrays))


def test_what_was_compiled_is_launched_with_addresses_in_the_places_of_arrays(machine: Machine) -> None:
    q, k, v = (draw(1, 2, 16, 64) for _ in range(3))
    attend(q, k, v)
    out, lse = attend(q, k, v)
    (first, arguments), (second, launched) = machine.seen
    assert (first, second) == ("compiled", "launched")
    assert launched[3:HEAD] == (7, 5, False, False, None, None, (4, 1, 0), None, None, None)
    given = launched[HEAD:]
    assert len(given) == len(arguments)
    places = [n for n, x in enumerate(arguments) if isinstance(x, torch.Tensor)]
    inputs, results = places[:-5], places[-5:]
    assert [given[n] for n in inputs[:3]] == [q.data_ptr(), k.data_ptr(), v.data_ptr()]
    assert [(arguments[n] is q, given[n]) for n in inputs[3:]] == [(True, 0)] * len(inputs[3:])  # what it has not got
    assert [given[n] for n in results[:2]] == [out.data_ptr(), lse.data_ptr()]
    assert all(given[n] == x for n, x in enumerate(arguments) if n not in places)


def test_triton_compiles_where_jax_triton_left_it_no_folder(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache_folder.VARIABLE, "")
    attend(*(draw(1, 2, 16, 64) for _ in range(3)))
    assert [what for what, _ in machine.seen] == ["compiled"]
    assert cache_folder.VARIABLE not in os.environ


ids = torch.zeros(1, 16, dtype=torch.int32)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"q": draw(1, 2, 16, 64, at=1)}),
        ({}, {"v": draw(1, 2, 16, 64, at=3)}),
        ({"kv_lengths": torch.zeros(1, dtype=torch.int32)}, {"kv_lengths": torch.zeros(1, dtype=torch.int64)}),
        ({"q_segment_ids": ids}, {"q_segment_ids": ids.long()}),
        ({}, {"k": draw(1, 16, 2, 64).transpose(1, 2)}),
        ({}, {name: draw(1, 2, 16, 64, dtype=torch.float16) for name in "qkv"}),
        ({}, {"device": 1}),
    ],
    ids=["q not aligned", "v not aligned", "lengths", "ids", "strides", "dtype", "device"],
)
def test_what_looks_different_is_compiled_anew_and_each_is_kept(
    one: dict[str, Any], other: dict[str, Any], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {name: draw(1, 2, 16, 64) for name in "qkv"}
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: machine.device)

    def kinds(given: dict[str, Any]) -> set[str]:
        machine.seen.clear()
        given = plain | given
        machine.device = given.pop("device", 0)
        attend(**given)
        return {kind for kind, _ in machine.seen}

    assert kinds(one) == {"compiled"}
    assert "compiled" in kinds(other)
    assert kinds(one) == kinds(other) == {"launched"}


def test_streams_and_devices_are_those_of_the_moment(machine: Machine) -> None:
    q = draw(1, 2, 16, 64)
    attend(q, q, q)
    for machine.stream in (11, 12):
        attend(q, q, q)
        assert machine.seen[-1][1][3] == machine.stream
    assert machine.entered == []
    machine.device = 3
    attend(q, q, q)
    assert (machine.entered, machine.device) == ([q.get_device()], 3)


def test_hooks_hear_of_launches(machine: Machine) -> None:
    q, hooks = draw(1, 2, 16, 64), machine.hooks
    attend(q, q, q)
    for name in ("launch_enter_hook", "launch_exit_hook"):
        for hook in (lambda metadata: None, SimpleNamespace(calls=[print])):
            before = getattr(hooks, name)
            setattr(hooks, name, hook)
            attend(q, q, q)
            setattr(hooks, name, before)
            attend(q, q, q)
            (heard, public), (direct, launched) = machine.seen[-2:]
            assert (heard, direct) == ("public", "launched")
            assert (public[0], len(public)) == (launched[3], 1 + len(launched[HEAD:]))
            assert public[1:4] == launched[HEAD:][:3] == (q.data_ptr(),) * 3


@pytest.mark.parametrize(
    ("name", "value"), [("_BASE_ARGS_FORMAT", launches.KNOWN_FORM + "O"), ("CudaLauncher", object)]
)
def test_a_launcher_that_is_not_known_is_left_to_triton(
    name: str, value: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"triton.backends.nvidia.driver.{name}", value)
    q = draw(1, 2, 16, 64)
    attend(q, q, q)
    attend(q, q, q)
    assert [kind for kind, _ in machine.seen] == ["compiled", "public"]


def asked(x: torch.Tensor, layout: str = "bhnd", return_lse: bool = True) -> Call:
    """A call of three such arrays and nothing else, on a GPU."""
    call = check(FRAMEWORK, Arrays(x, x, x), False, None, None, None, 0.0, return_lse, layout, "triton")
    return call._replace(platform="cuda")


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_the_shortest_way_launches_what_the_door_does(layout: str, machine: Machine) -> None:
    shape = (1, 2, 16, 64) if layout == "bhnd" else (1, 16, 2, 64)
    call, given = asked(draw(*shape), layout), [draw(*shape) for _ in range(3)]
    result, alone = triton.plain(call), triton.plain(call._replace(return_lse=False))
    assert result is not None and alone is not None
    for turn in range(3):
        given = [draw(*shape) for _ in range(3)]
        out, lse = result(*given)
        kind, launched = machine.seen[-1]
        assert kind == ("launched" if turn else "compiled")
        assert (out.shape, out.is_contiguous(), lse.shape) == (shape, True, (1, 2, 16))
        triton.attend(call, canonical(call, Arrays(*given)))
        kind, by_door = machine.seen[-1]
        assert kind == "launched"
        if turn:
            assert launched[HEAD : HEAD + 3] == tuple(x.data_ptr() for x in given)
            differ = [n for n, (x, y) in enumerate(zip(launched, by_door, strict=True)) if x != y]
            results = range(launched.index(out.data_ptr()), launched.index(out.data_ptr()) + 5)
            assert launched[results[1]] == lse.data_ptr()
            assert set(differ) <= set(results)
        assert alone(*given).shape == shape


def test_the_shortest_way_launches_all_there_is(machine: Machine) -> None:
    """Few queries and many keys: parts, and what joins them."""
    q, k, v = draw(1, 2, 1, 64), draw(1, 2, 4096, 64), draw(1, 2, 4096, 64)
    call = check(FRAMEWORK, Arrays(q, k, v), False, None, None, None, 0.0, True, "bhnd", "triton")
    result = triton.plain(call := call._replace(platform="cuda"))
    assert result is not None
    result(q, k, v)
    machine.seen.clear()
    kept = [result(q, k, v), triton.attend(call, Arrays(q, k, v))]
    assert [kind for kind, _ in machine.seen] == ["launched"] * 4
    ours, by_door = ([given for _, given in machine.seen[n : n + 2]] for n in (0, 2))
    same: dict[int, int] = {}  # what stands in one where another stands in the other, the same everywhere
    for mine, its in zip(ours, by_door, strict=True):
        for x, y in zip(mine, its, strict=True):
            assert (same.setdefault(x, y) if type(x) is int and x > 2**32 else x) == y
    assert all(x.data_ptr() in ours[1] for x in kept[0])
    parts = {x for x in ours[0][HEAD:] if type(x) is int and x > 2**32} & set(ours[1][HEAD:])
    assert parts, "what the first made is what the second takes"


def test_the_shortest_way_is_for_what_looks_the_same(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    q = draw(1, 2, 16, 64)
    result = triton.plain(asked(q))
    assert result is not None
    runs: list[Any] = []
    forward = triton._forward
    monkeypatch.setattr(triton, "_forward", lambda *given: runs.append(given) or forward(*given))

    def kinds(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[str, int]:
        runs.clear()
        result(q, k, v)
        return machine.seen[-1][0], len(runs)

    assert [kinds(q, q, q) for _ in range(2)] == [("compiled", 1), ("launched", 0)]
    other = draw(1, 16, 2, 64).transpose(1, 2)
    assert [kinds(q, other, q) for _ in range(2)] == [("compiled", 1), ("launched", 0)]
    turned = draw(1, 2, 64, 16).mT  # whose rows are copied
    assert [kinds(turned, q, q)[1] for _ in range(3)] == [1] * 3
    assert turned.data_ptr() not in machine.seen[-1][1]
    odd = draw(1, 2, 16, 64, at=3)
    assert [kinds(q, q, odd) for _ in range(2)] == [("compiled", 1), ("launched", 1)]
    assert kinds(q, q, q) == ("launched", 0)
    machine.stream = 11
    result(q, q, q)
    assert machine.seen[-1][1][3] == 11
    machine.hooks.launch_enter_hook = lambda metadata: None
    assert kinds(q, q, q) == ("public", 0)
    machine.hooks.launch_enter_hook = None
    machine.device = 3
    assert kinds(q, q, q) == ("launched", 1)
    assert (machine.entered, machine.device) == ([q.get_device()], 3)


MORE: dict[str, Callable[[], dict[str, Any]]] = {
    "nothing": dict,
    "key mask": lambda: {"mask": torch.ones(2, 64, dtype=torch.bool)},
    "mask": lambda: {"mask": torch.ones(1, 1, 64, 64, dtype=torch.bool)},
    "bias": lambda: {"bias": draw(1, 2, 64, 64)},
    "lengths": lambda: {"q_lengths": torch.ones(2, dtype=torch.int32), "kv_lengths": torch.ones(2, dtype=torch.int64)},
    "one array of ids": lambda: {"kv_segment_ids": torch.zeros(2, 64, dtype=torch.int64)},
    "two arrays of ids": lambda: {f"{name}_segment_ids": torch.zeros(2, 64, dtype=torch.int32) for name in ("q", "kv")},
    "an offset": lambda: {"is_causal": True, "q_offset": torch.zeros(2, dtype=torch.int64)},
    "sinks": lambda: {"sinks": draw(2)},
}  # fmt: skip
COPIED: dict[str, Callable[[], dict[str, Any]]] = {
    "unsigned ids": lambda: {"q_segment_ids": torch.zeros(2, 64, dtype=torch.uint8)},
    "lengths with gaps": lambda: {"kv_lengths": torch.ones(4, dtype=torch.int64)[::2]},
    "a seed": lambda: {"dropout": 0.5, "dropout_seed": torch.zeros(2, dtype=torch.uint32)},
    "rows with gaps": lambda: {"q": draw(2, 2, 64, 128)[..., ::2]},
}
CONVERTED = ("unsigned ids", "a seed")  # before autograd takes them


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("gradients", [False, True], ids=["alone", "gradients"])
@pytest.mark.parametrize("name", [*MORE, *COPIED])
def test_the_short_way_launches_what_the_long_way_does(
    name: str, gradients: bool, layout: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**MORE, **COPIED}[name]()
    changed, causal, dropout = options.pop("q", None), options.pop("is_causal", False), options.pop("dropout", 0.0)
    arrays = Arrays(*(draw(2, 2, 64, 64) for _ in range(3)), **options)
    arrays = arrays if changed is None else arrays._replace(q=changed)
    if layout == "bnhd":
        arrays = arrays._replace(**{each: getattr(arrays, each).transpose(1, 2) for each in ("q", "k", "v")})
    wanted = [x.requires_grad_(gradients) for x in arrays if isinstance(x, torch.Tensor) and x.is_floating_point()]
    call = check(FRAMEWORK, arrays, causal, None, None, None, dropout, True, layout, "triton")._replace(platform="cuda")
    form = partial(again.form, call)
    short, long = triton.short(call, form), []
    assert short is not None
    for each in ("_forward", "_backward"):
        way = getattr(triton, each)
        monkeypatch.setattr(triton, each, lambda *given, each=each, way=way: long.append(each) or way(*given))

    def launched(result: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> tuple[list[tuple], list[torch.Tensor]]:
        machine.seen.clear()
        out, lse = result()
        cotangent = torch.zeros_like(out)
        found = torch.autograd.grad(out, wanted, cotangent) if gradients else ()
        assert all(kind == "launched" for kind, _ in machine.seen) or machine.seen[0][0] == "compiled"
        return [given[HEAD:] for _, given in machine.seen], [out, lse, *found]

    def by_door() -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = triton.attend(call, form(arrays))
        return out.transpose(1, 2) if layout == "bnhd" else out, lse

    launched(lambda: short(arrays))
    long.clear()
    ours, results = launched(lambda: short(arrays))
    is_long = bool(long)
    assert is_long == (name in COPIED and not (gradients and name in CONVERTED))
    theirs, expected = launched(by_door)
    assert [(x.shape, x.stride(), x.dtype) for x in results] == [(x.shape, x.stride(), x.dtype) for x in expected]
    if is_long:
        return
    mine = {x.data_ptr() for x in arrays if isinstance(x, torch.Tensor)}
    same: dict[int, int] = {}  # what stands in one where another stands in the other, the same everywhere
    for one, other in zip(ours, theirs, strict=True):
        for x, y in zip(one, other, strict=True):
            assert (same.setdefault(x, y) if type(x) is int and x > 2**32 and x not in mine else x) == y


def test_the_short_way_is_for_what_looks_the_same(machine: Machine) -> None:
    x, mask = draw(1, 2, 64, 64), torch.ones(1, 64, dtype=torch.bool)
    call = check(FRAMEWORK, Arrays(x, x, x, mask), False, None, None, None, 0.0, True, "bhnd", "triton")
    call = call._replace(platform="cuda")
    short = triton.short(call, partial(again.form, call))
    assert short is not None

    def kinds(q: torch.Tensor, mask: torch.Tensor) -> set[str]:
        machine.seen.clear()
        short(Arrays(q, x, x, mask))
        return {kind for kind, _ in machine.seen}

    kinds(x, mask)
    odd, turned = draw(1, 2, 64, 64, at=3), draw(1, 64, 2, 64).transpose(1, 2)
    few = torch.ones(1, 128, dtype=torch.bool)[:, ::2]
    for q, its in ((x, mask), (odd, mask), (turned, mask), (x, few), (x, mask)):
        kinds(q, its)
        assert kinds(q, its) == {"launched"}
        assert q.data_ptr() in machine.seen[-1][1]
        assert any(its.data_ptr() in given for _, given in machine.seen)
    lazy = torch._neg_view(draw(1, 2, 64, 64))
    assert kinds(lazy, mask) == {"launched"}
    assert not any(lazy.data_ptr() in given for _, given in machine.seen)


def test_no_array_is_kept(machine: Machine) -> None:
    q = draw(1, 2, 16, 64).requires_grad_()
    call = asked(q)
    short = triton.short(call, partial(again.form, call))
    assert short is not None
    for way in (attend, attend, *[lambda *given: short(Arrays(*given))] * 3):
        out = way(q, q, q)[0]
        out.sum().backward()
    arrays = [weakref.ref(x) for x in (q, out, q.grad)]
    machine.seen.clear()
    del q, out
    gc.collect()
    assert [x() for x in arrays] == [None] * 3


@pytest.mark.parametrize("gradients", [False, True], ids=["alone", "gradients"])
def test_one_array_of_ids_is_not_two(gradients: bool, machine: Machine) -> None:
    x = draw(1, 2, 64, 64).requires_grad_(gradients)
    ids, others = (torch.zeros(1, 64, dtype=torch.int64) for _ in range(2))
    arrays = [Arrays(x, x, x, q_segment_ids=ids, kv_segment_ids=its) for its in (ids, others)]
    call = check(FRAMEWORK, arrays[0], False, None, None, None, 0.0, True, "bhnd", "triton")._replace(platform="cuda")
    form = partial(again.form, call)
    short = triton.short(call, form)
    assert short is not None

    def sent(both: Arrays, way: Callable[[Arrays], Any]) -> list[tuple]:
        machine.seen.clear()
        out, _ = way(both)
        if gradients:
            out.sum().backward()
        return [tuple(x for x in given[HEAD:] if type(x) is not int or x < 2**32) for _, given in machine.seen]

    for both in arrays * 2:
        sent(both, short)
    ours = [sent(both, short) for both in arrays]
    assert ours == [sent(both, lambda given: triton.attend(call, form(given))) for both in arrays]
    assert ours[0] != ours[1]  # where ids may differ, keys are looked for whose id no query has


def test_the_second_of_two_launches_writes_where_the_first_did(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dk and dv of segments, which one of two kernels makes."""
    monkeypatch.setattr(triton, "capability", lambda: "9.0")
    x = draw(1, 16, 2048, 128).requires_grad_()
    k, v = (draw(1, 16, 2048, 128).requires_grad_() for _ in range(2))
    ids = torch.zeros(1, 2048, dtype=torch.int32)
    arrays = Arrays(x, k, v, q_segment_ids=ids)
    call = check(FRAMEWORK, arrays, False, None, None, None, 0.0, True, "bhnd", "triton")._replace(platform="cuda")
    form = partial(again.form, call)
    short = triton.short(call, form)
    assert short is not None
    for way in (lambda: triton.attend(call, form(arrays)), lambda: short(arrays)):
        for turn in range(3):
            machine.seen.clear()
            out, _ = way()
            dk, dv = torch.autograd.grad(out, (k, v), torch.zeros_like(out))
            places = [dk.data_ptr(), dv.data_ptr()]
            (kind, first), (_, second) = machine.seen[-2:]
            assert kind == ("launched" if turn else kind)
            sent = [[y.data_ptr() if isinstance(y, torch.Tensor) else y for y in each] for each in (first, second)]
            assert [[each.count(place) for place in places] for each in sent] == [[1, 1], [2, 2]]
            assert dk.shape == dv.shape == k.shape


def test_known_ids_are_compared_by_one_launch(machine: Machine) -> None:
    from attend_torch.runs import _comparison

    now, then = torch.zeros(1, 3000, dtype=torch.int64), torch.zeros(1, 3000, dtype=torch.int64)
    for kind in ("compiled", "launched"):
        launches.run(_comparison(3000), {"now": now, "then": then})
        assert machine.seen[-1][0] == kind
    grid, given = machine.seen[-1][1][:3], machine.seen[-1][1][HEAD:]
    assert grid == (3, 1, 1) and given == (now.data_ptr(), then.data_ptr(), 3000, 1024)


def test_what_differs_stops_the_device_in_words() -> None:
    import triton as language
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from attend_shared.kernels import bounds
    from attend_shared.runs import CHANGED

    kinds = {"now": "*i64", "then": "*i64", "N": "i32", "BLOCK": "constexpr"}
    source = ASTSource(fn=bounds.compare, signature=kinds, constexprs={"BLOCK": 1024})
    options = {"debug": bounds.compare.debug, "sanitize_overflow": False}
    ptx = language.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert "__assertfail" in ptx
    assert ", ".join(map(str, CHANGED.encode())) in ptx

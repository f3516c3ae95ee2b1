"""A call like one before it is not checked and chosen for again; a call that differs in anything that counts is."""

import json
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import attend_torch
from attend_shared import avoid
from attend_shared.call import Arrays
from attend_torch import again
from attend_torch.implementations import einsum, sdpa
from test_doctor import content, rule


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape or (1, 2, 5, 4), dtype=dtype)


def three(**options: Any) -> list[torch.Tensor]:
    return [draw(**options) for _ in range(3)]


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[Arrays]:
    """The arrays of calls that came to the door."""
    seen: list[Arrays] = []
    check = again.check

    def watched(framework: Any, arrays: Arrays, *options: Any) -> Any:
        seen.append(arrays)
        return check(framework, arrays, *options)

    monkeypatch.setattr(again, "check", watched)
    return seen


def right(result: Any, *inputs: torch.Tensor, **given: Any) -> None:
    """What the oracle of tests, einsum in float64, has for it."""
    wide = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in given.items()}
    avoid.CHOICES.clear()
    expected = attend_torch.attend(*(x.double() for x in inputs), **wide | {"implementation": "einsum"})
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (result, expected)), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "nothing": dict,
    "causal": lambda: {"is_causal": True},
    "bnhd, lse": lambda: {"layout": "bnhd", "return_lse": True},
    "window": lambda: {"window_size": (1, None), "q_offset": 1},
    "names": lambda: {"implementation": ("sdpa", "einsum"), "softcap": 3.0, "scale": 0.7},
    "mask": lambda: {"mask": torch.rand(1, 5) > 0.4},
    "bias": lambda: {"bias": draw(1, 2, 5, 5)},
    "trained bias": lambda: {"bias": torch.nn.Parameter(draw(1, 2, 5, 5))},
    "sinks": lambda: {"sinks": draw(2)},
    "segments": lambda: {"q_segment_ids": torch.randint(2, (1, 5))},
    "lengths": lambda: {"q_lengths": torch.randint(1, 6, (1,)), "kv_lengths": torch.randint(1, 6, (1,))},
    "offset": lambda: {"q_offset": torch.randint(5, (1,)), "is_causal": True},
}


@pytest.mark.parametrize("name", GIVEN)
def test_like_calls_come_to_the_door_once_and_each_is_right(name: str, checked: list[Arrays]) -> None:
    results = []
    for _ in range(3):
        inputs, given = three(), GIVEN[name]()
        results.append((attend_torch.attend(*inputs, **given), inputs, given))
    assert len(checked) == 1
    for result, inputs, given in results:
        right(result, *inputs, **given)


CHANGES: dict[str, Callable[[], tuple[list[torch.Tensor], dict[str, Any]]]] = {
    "dtype": lambda: (three(dtype=torch.float64), {}),
    "shape": lambda: ([draw(1, 2, 4, 4), *three()[1:]], {}),
    "size of v": lambda: ([*three()[1:], draw(1, 2, 5, 6)], {}),
    "gradient": lambda: ([draw().requires_grad_(), *three()[1:]], {}),
    "gradient of v": lambda: ([*three()[1:], draw().requires_grad_()], {}),
    "scale": lambda: (three(), {"scale": 0.25}),
    "layout": lambda: (three(), {"layout": "bnhd"}),
    "lse": lambda: (three(), {"return_lse": True}),
    "causal": lambda: (three(), {"is_causal": True}),
    "offset": lambda: (three(), {"is_causal": True, "q_offset": 1}),
    "implementation": lambda: (three(), {"implementation": "einsum"}),
    "mask": lambda: (three(), {"mask": torch.ones(1, 5, dtype=torch.bool)}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_differs_comes_to_the_door(name: str, checked: list[Arrays]) -> None:
    attend_torch.attend(*three())
    inputs, given = CHANGES[name]()
    result = attend_torch.attend(*inputs, **given)
    assert len(checked) == 2
    right(result, *inputs, **given)


def test_one_array_of_lengths_is_not_two(checked: list[Arrays]) -> None:
    lengths = torch.tensor([4])
    for _ in range(2):
        attend_torch.attend(*three(), q_lengths=lengths, kv_lengths=lengths)
        attend_torch.attend(*three(), q_lengths=lengths, kv_lengths=lengths.clone())
    assert len(checked) == 2


def test_an_offset_is_that_of_the_call(checked: list[Arrays]) -> None:
    q, k, v = draw(1, 2, 3, 4), draw(), draw()
    offsets: list[Any] = [0, 2, -1, 2, np.int64(2), 0]
    found = [attend_torch.attend(q, k, v, is_causal=True, q_offset=offset) for offset in offsets]
    assert len(checked) == 4  # a number of NumPy's is looked at anew
    for offset, result in zip(offsets, found, strict=True):
        right(result, q, k, v, is_causal=True, q_offset=offset)
    attend_torch.attend(q, k, v, is_causal=True, q_offset=1)
    with pytest.raises(TypeError, match=r"^q_offset: expected "):
        attend_torch.attend(q, k, v, is_causal=True, q_offset=True)


def test_the_grad_mode_is_that_of_the_moment(checked: list[Arrays]) -> None:
    q, k, v = (x.requires_grad_() for x in three())
    bias = draw(1, 2, 5, 5)  # with which the choice hangs on it
    for _ in range(2):
        assert attend_torch.attend(q, k, v).requires_grad
        assert "ScaledDot" not in attend_torch.attend(q, k, v, bias=bias).grad_fn.name()
        with torch.no_grad():
            assert not attend_torch.attend(q, k, v).requires_grad
            assert not attend_torch.attend(q, k, v, bias=bias).requires_grad
    assert len(checked) == 4
    found: list[bool] = []
    with torch.no_grad():  # which is this thread's
        thread = threading.Thread(target=lambda: found.append(attend_torch.attend(q, k, v).requires_grad))
        thread.start()
        thread.join()
    assert found == [True]


EQUAL = {
    "is_causal": 0, "dropout": False, "scale": True, "softcap": True, "return_lse": 0, "window_size": (True, None),
}  # fmt: skip
RIGHT = {"scale": 1.0, "softcap": 1.0, "window_size": (1, None)}


@pytest.mark.parametrize("name", EQUAL)
@pytest.mark.parametrize("more", [{}, {"mask": torch.ones(1, 5, dtype=torch.bool)}], ids=["alone", "mask"])
def test_what_equals_a_right_option_is_refused(name: str, more: dict[str, Any]) -> None:
    attend_torch.attend(*three(), **more, **{name: RIGHT[name]} if name in RIGHT else {})
    with pytest.raises(TypeError, match=f"^{name}: expected "):
        attend_torch.attend(*three(), **more, **{name: EQUAL[name]})


WRONG: dict[str, Callable[[Any, Any, Any], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "array": lambda q, k, v: ((q, k, v.numpy()), {}),
    "dtype": lambda q, k, v: ((q, k.double(), v), {}),
    "device": lambda q, k, v: ((q, k, v.to("meta")), {}),
    "heads": lambda q, k, v: ((q[:, :1], k, v), {}),
    "length": lambda q, k, v: ((q, k, v[:, :, :4]), {}),
    "layout": lambda q, k, v: ((q, k, v), {"layout": "nbhd"}),
    "name": lambda q, k, v: ((q, k, v), {"implementation": "spda"}),
    "dropout": lambda q, k, v: ((q, k, v), {"dropout": 0.5}),
    "scale": lambda q, k, v: ((q, k, v), {"scale": float("nan")}),
    "seed": lambda q, k, v: ((q, k, v), {"dropout": 0.5, "dropout_seed": 2**64}),
    "bias": lambda q, k, v: ((q, k, v), {"bias": torch.zeros(1, 2, 5, 5, device="meta")}),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_in_the_same_words(name: str) -> None:
    args, given = WRONG[name](*three())
    with pytest.raises((TypeError, ValueError)) as first:
        attend_torch.attend(*args, **given)
    attend_torch.attend(*three())
    attend_torch.attend(*three(), bias=torch.zeros(1, 2, 5, 5))
    attend_torch.attend(*three(), dropout=0.5, dropout_seed=7)
    for _ in range(2):
        with pytest.raises(first.type) as then:
            attend_torch.attend(*args, **given)
        assert str(then.value) == str(first.value)


def test_what_nothing_serves_is_refused_each_time() -> None:
    for _ in range(2):
        with pytest.raises(attend_torch.UnsupportedError, match="it has no softcap"):
            attend_torch.attend(*three(), softcap=3.0, implementation="sdpa")


def test_rules_that_come_later_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for module in (sdpa, einsum):
        attend = module.attend
        monkeypatch.setattr(module, "attend", lambda *given, m=module, attend=attend: ran.append(m) or attend(*given))
    try:
        for _ in range(2):
            attend_torch.attend(*three())
        path = tmp_path / "machine.json"
        path.write_text(json.dumps(content(rule("torch", "sdpa", "any call"))))
        monkeypatch.setenv(avoid.VARIABLE, str(path))
        attend_torch.attend(*three())
        avoid.forget()
        for _ in range(2):
            attend_torch.attend(*three())
            attend_torch.attend(*three(), torch.ones(1, 5, dtype=torch.bool))
    finally:
        avoid.forget()
    assert ran[:3] == [sdpa] * 3
    assert sdpa not in ran[3:]


def test_what_takes_the_place_of_a_function_of_torch_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = three()
    attend_torch.attend(*inputs)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **options: q)
    assert attend_torch.attend(*inputs) is inputs[0]


class Marked(torch.Tensor):
    """A tensor of a class of its own, which sees what is done with it."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(getattr(function, "__name__", ""))
        return super().__torch_function__(function, types, args, kwargs or {})


def test_what_looks_on_sees_the_whole_call(checked: list[Arrays]) -> None:
    q, k, v = three()
    expected = attend_torch.attend(q, k, v)
    plain = partial(attend_torch.attend, implementation="einsum")  # which is Python throughout
    for _ in range(2):
        assert attend_torch.attend(q, k, v).equal(expected)
        assert plain(q, k, v).allclose(expected, atol=1e-6)
    assert len(checked) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert attend_torch.attend(q, k, v).dtype == plain(q, k, v).dtype == torch.bfloat16
    compiled = torch.compile(lambda *x: attend_torch.attend(*x), backend="eager", fullgraph=True)
    assert compiled(q, k, v).allclose(expected)
    lanes = torch.func.vmap(plain)(*(torch.stack([x, 2 * x]) for x in (q, k, v)))
    assert lanes[0].allclose(expected, atol=1e-6)
    gradient = torch.func.grad(lambda v: attend_torch.attend(q, k, v).sum())(v)
    assert gradient.sum().allclose(torch.tensor(float(q[..., 0].numel() * v.shape[-1])))
    tangent = torch.func.jvp(partial(plain, q, k), (v,), (v,))[1]
    assert tangent.allclose(expected, atol=1e-6)
    graph = make_fx(lambda q, k, v: attend_torch.attend(q, k, v))(q, k, v)
    assert any("attention" in str(node.target) for node in graph.graph.nodes)
    with FakeTensorMode() as mode:
        fake = attend_torch.attend(*(mode.from_tensor(x) for x in (q, k, v)))
    assert (type(fake).__name__, fake.shape) == ("FakeTensor", expected.shape)
    Marked.seen.clear()
    attend_torch.attend(q.as_subclass(Marked), k, v)
    assert "scaled_dot_product_attention" in Marked.seen
    with torch.device("meta"):  # which is where new tensors go, not old ones
        assert attend_torch.attend(q, k, v).equal(expected)
    assert attend_torch.attend(*(x.to("meta") for x in (q, k, v))).is_meta
    assert attend_torch.attend(q, k, v).equal(expected)


def test_nothing_is_shortened_where_something_looks_on() -> None:
    found: list[Any] = []

    def ask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found.append(again.result(q, k, v, False, None, None, None, 0.0, False, "bhnd", None))
        return q

    inputs = three()
    ask(*inputs)
    assert found.pop() is not None
    torch.func.vmap(ask)(*inputs)
    torch.func.grad(lambda q, k, v: ask(q, k, v).sum())(*inputs)
    torch.func.jvp(ask, tuple(inputs), tuple(inputs))
    torch.func.functionalize(ask)(*inputs)
    make_fx(ask)(*inputs)
    with torch.autograd.forward_ad.dual_level():
        ask(*inputs)
    with torch.autocast("cpu"):
        ask(*inputs)
    ask(inputs[0].as_subclass(Marked), *inputs[1:])
    assert found == [None] * 8


def test_a_module_calls_alike(checked: list[Arrays]) -> None:
    for flash in (None, True, False):
        checked.clear()
        layer = attend_torch.Attend(flash=flash, scale=0.3)
        for _ in range(3):
            inputs = three()
            assert layer(*inputs).allclose(attend_torch.attend(*inputs, scale=0.3, implementation="einsum"), atol=1e-6)
        assert len([1 for arrays in checked if arrays.q.shape == (1, 2, 5, 4)]) <= 2


def test_no_array_is_kept_and_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = three()
    weak = [weakref.ref(x) for x in inputs]
    attend_torch.attend(*inputs)
    attend_torch.attend(*inputs, kv_lengths=torch.tensor([3]))
    del inputs
    assert [x() for x in weak] == [None] * 3
    monkeypatch.setattr(avoid, "KEPT", 4)
    for n in range(1, 12):
        attend_torch.attend(*(draw(1, 1, n, 4) for _ in range(3)))
        assert len(avoid.CHOICES) <= 4


@pytest.mark.parametrize("masked", [False, True])
def test_kernels_read_memory_so_what_is_negated_lazily_is_negated(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    came, attend = [], sdpa.attend
    monkeypatch.setattr(sdpa, "attend", lambda call, arrays: came.append(arrays) or attend(call, arrays))
    q, k, v = three()
    lazy = torch.complex(q, k).conj().imag
    assert lazy.is_neg()
    mask = torch.ones(1, k.shape[2], dtype=torch.bool) if masked else None
    for _ in range(2):
        attend_torch.attend(q, k, v, mask, implementation="sdpa")  # its like is remembered
        found = attend_torch.attend(q, lazy, v, mask, implementation="sdpa")
        assert found.equal(attend_torch.attend(q, -k, v, mask, implementation="sdpa"))
    assert len(came) == 6 and not any(x.is_neg() for each in came for x in each[:3])

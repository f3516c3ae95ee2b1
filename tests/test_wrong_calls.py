"""A wrong argument raises the same error with the same words in both frameworks, and the first in a fixed order."""

import importlib
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import attend_jax
import attend_jax.bridge
import attend_jax.linen
import attend_torch
import attend_torch.bridge
from attend_shared.call import NAMES
from attend_shared.cases import CASES
from attend_shared.errors import ADVICE, HEADLINE, UnsupportedError
from attend_shared.wrong_calls import ORDER, WRONG_CALLS, WRONG_USES, WrongCall, right_call

CALLS = pytest.mark.parametrize("wrong", WRONG_CALLS, ids=lambda wrong: wrong.name)
FRAMEWORKS = pytest.mark.parametrize("framework", ["torch", "jax"])
BRIDGES = {"torch": attend_torch.bridge, "jax": attend_jax.bridge}


def error_of(function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> tuple[str, str]:
    """The name of the error that a call raises, and its text."""
    with pytest.raises((TypeError, ValueError)) as caught:
        function(*arguments, **keywords)
    return type(caught.value).__name__, str(caught.value)


def expected(wrong: WrongCall) -> tuple[str, str]:
    return wrong.error.__name__, wrong.text


def each_array(change: Callable[[np.ndarray], Any], value: Any) -> Any:
    """A value with its arrays changed, those in lists too."""
    if isinstance(value, list):
        return [each_array(change, item) for item in value]
    return change(value) if isinstance(value, np.ndarray) else value


def arguments_of(wrong: WrongCall, change: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """The arguments of a wrong call. What may be no array stays: there an array is the mistake."""
    options = ORDER[: ORDER.index("q")] + ORDER[ORDER.index("is_causal") : ORDER.index("mask")]
    return {name: x if name in options else each_array(change, x) for name, x in wrong.build().items()}


def named(text: str) -> str:
    """The argument that a text is about."""
    return text.partition(":")[0]


# The data.


def test_the_list_is_whole() -> None:
    names = [wrong.name for wrong in (*WRONG_CALLS, *WRONG_USES)]
    assert len(set(names)) == len(names)
    assert {named(wrong.text) for wrong in WRONG_CALLS} == set(ORDER), "every argument is wrong once at least"
    assert {wrong.function for wrong in WRONG_CALLS} == {"attend"}
    for wrong in (*WRONG_CALLS, *WRONG_USES):
        assert wrong.error in (TypeError, ValueError)
        argument, _, rest = wrong.text.partition(": expected ")
        wanted, _, rest = rest.partition(", got ")
        got, _, advice = rest.partition(". ")
        assert argument.split("[")[0] in wrong.build() or got == "None", wrong.name
        assert wanted and got and advice.endswith((".", "?")), wrong.name


@FRAMEWORKS
def test_the_call_that_all_of_them_change_is_right(framework: str) -> None:
    assert BRIDGES[framework].call(right_call()).shape == (2, 4, 6, 8)


# The same words.


@FRAMEWORKS
@CALLS
def test_attend(wrong: WrongCall, framework: str) -> None:
    assert error_of(BRIDGES[framework].call, wrong.build()) == expected(wrong)


@CALLS
def test_explain_takes_what_attend_takes(wrong: WrongCall) -> None:
    assert error_of(attend_torch.explain, **arguments_of(wrong, torch.from_numpy)) == expected(wrong)
    assert error_of(attend_jax.explain, **arguments_of(wrong, jnp.asarray)) == expected(wrong)


@CALLS
def test_shapes_alone_are_told_the_same(wrong: WrongCall) -> None:
    meta = arguments_of(wrong, lambda x: torch.from_numpy(x).to("meta"))
    shapes = arguments_of(wrong, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert error_of(attend_torch.explain, **meta) == expected(wrong)
    assert error_of(attend_jax.explain, **shapes) == expected(wrong)
    if all(isinstance(meta[name], torch.Tensor) for name in "qkv"):
        assert error_of(attend_torch.attend, **meta) == expected(wrong)


@CALLS
def test_traced_arrays_are_told_the_same(wrong: WrongCall) -> None:
    arguments = arguments_of(wrong, jnp.asarray)
    traced = {name: x for name, x in arguments.items() if isinstance(x, jax.Array)}
    fixed = {name: x for name, x in arguments.items() if name not in traced}
    traced |= {name: fixed.pop(name) for name in list(fixed) if isinstance(fixed[name], np.ndarray)}
    assert error_of(jax.jit(lambda data: attend_jax.attend(**data, **fixed)), traced) == expected(wrong)


MODULES = {
    "torch": (attend_torch.Attend, torch.from_numpy),
    "nnx": (attend_jax.Attend, jnp.asarray),
    "linen": (lambda **options: attend_jax.linen.Attend(**options).bind({}), jnp.asarray),
}


@pytest.mark.parametrize(
    ("wrong", "module"),
    # Without a seed torch draws one from its generator.
    [(w, m) for w in WRONG_CALLS for m in MODULES if (w.name, m) != ("dropout without a seed", "torch")],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_module_is_told_the_same_where_it_is_made_or_where_it_is_called(wrong: WrongCall, module: str) -> None:
    make, change = MODULES[module]
    arguments = arguments_of(wrong, change)
    options = {"is_causal", "window_size", "scale", "softcap", "dropout", "layout", "implementation"}
    fixed = {name: arguments.pop(name) for name in list(arguments) if name in options}
    extra = {"deterministic": False} if module == "linen" and "dropout" in fixed else {}
    assert error_of(lambda: make(**fixed)(**arguments, **extra)) == expected(wrong)


PACKAGES = ("attend_torch", "attend_jax", "attend_jax.linen")  # the last has nothing but Attend


@pytest.mark.parametrize(
    ("wrong", "package"),
    [(w, package) for w in WRONG_USES for package in PACKAGES[: 3 if w.function == "Attend" else 2]],
    ids=lambda value: getattr(value, "name", value),
)
def test_companions(wrong: WrongCall, package: str) -> None:
    module, _, name = wrong.function.rpartition(".")
    function = getattr(importlib.import_module(".".join(filter(None, (package, module)))), name)
    arguments = wrong.build()
    if package == "attend_torch" and wrong.function not in ("Attend", "convert.seed_from_key"):
        counts = ("length", "kv_len")
        arguments = {name: x if name in counts else each_array(torch.from_numpy, x) for name, x in arguments.items()}
    assert error_of(function, **arguments) == expected(wrong)


# The order.


def changes(wrong: WrongCall) -> dict[str, Any]:
    right = right_call()

    def same(name: str, x: Any) -> bool:
        usual = right.get(name)
        return usual is not None and isinstance(x, np.ndarray) and (x.shape, x.dtype) == (usual.shape, usual.dtype)

    return {name: x for name, x in wrong.build().items() if not same(name, x)}


def pairs(count: int) -> Iterator[tuple[WrongCall, WrongCall]]:
    """Random pairs that change different arguments: a size or layout is changed only where it is the mistake itself."""
    rng = np.random.default_rng(0)
    sizes = {"layout", "q", "k", "v"}
    calls = [wrong for wrong in WRONG_CALLS if not set(changes(wrong)) & sizes or named(wrong.text) in sizes]
    while count:
        first, second = (calls[n] for n in rng.integers(len(calls), size=2))
        if not set(changes(first)) & set(changes(second)):
            count -= 1
            yield first, second


def test_of_two_mistakes_both_frameworks_name_the_first() -> None:
    checked = set()
    for first, second in pairs(500):
        arguments = right_call(**changes(first), **changes(second))
        found = [error_of(bridge.call, dict(arguments)) for bridge in BRIDGES.values()]
        assert found[0] == found[1], (first.name, second.name)
        earlier = min(first, second, key=lambda wrong: ORDER.index(named(wrong.text)))
        if not {named(first.text), named(second.text)} <= {"q", "k", "v"}:  # among these a size can be judged two ways
            assert found[0] == expected(earlier), (first.name, second.name)
            checked.add((named(first.text), named(second.text)))
    assert len(checked) > 150


# What only one framework can get wrong.


def test_float64_in_jax_without_x64() -> None:
    text = ("expected a dtype that JAX keeps, got float64 of shape {}. float64 needs "
            'jax.config.update("jax_enable_x64", True); convert to float32 if that is enough.')  # fmt: skip
    wide = {name: x.astype(np.float64) for name, x in right_call().items()}
    bias, sinks = np.zeros((1, 1, 6, 6)), np.zeros(4)
    out, lse = np.zeros((2, 4, 6, 8)), np.zeros((2, 4, 6))
    for argument, value, call in (
        ("q", wide["q"], lambda: attend_jax.attend(**wide)),
        ("bias", bias, lambda: attend_jax.attend(**right_call(bias=bias))),
        ("sinks", sinks, lambda: attend_jax.attend(**right_call(sinks=sinks))),
        ("outs[0]", out, lambda: attend_jax.merge([out], [lse])),
        ("lses[0]", lse, lambda: attend_jax.merge([out.astype(np.float32)], [lse])),
    ):
        assert error_of(call) == ("TypeError", f"{argument}: " + text.format(value.shape))
    assert error_of(lambda: attend_jax.Attend()(**wide))[1].startswith("q: expected a dtype that JAX keeps")
    with jax.enable_x64(True):
        assert attend_jax.attend(**wide).dtype == np.float64


def test_ids_that_32_bits_do_not_hold_in_jax_without_x64() -> None:
    ids = np.full((2, 6), 2**31)
    text = "expected ids that 32 bits hold, got int64 up to 2147483648. Number the segments from 0."
    assert error_of(attend_jax.attend, **right_call(q_segment_ids=ids)) == ("ValueError", f"q_segment_ids: {text}")
    assert error_of(attend_jax.attend, **right_call(kv_segment_ids=ids)) == ("ValueError", f"kv_segment_ids: {text}")
    attend_jax.attend(**right_call(q_segment_ids=ids - 1))
    with jax.enable_x64(True):
        attend_jax.attend(**right_call(q_segment_ids=ids))


OTHERWISE = {
    "sparse": torch.Tensor.to_sparse,
    "mkldnn": torch.Tensor.to_mkldnn,
    "nested": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
}


@pytest.mark.parametrize("kind", OTHERWISE)
def test_sparse_and_nested_tensors_in_torch(kind: str) -> None:
    """In JAX such arrays are no arrays of its own."""
    given = {name: torch.from_numpy(x) for name, x in right_call(bias=np.ones((2, 1, 1, 6), np.float32)).items()}
    attend_torch.attend(**given)  # what is remembered of it is not of these
    for argument in ("q", "k", "v", "bias"):
        there = OTHERWISE[kind](given[argument])
        error, text = error_of(attend_torch.attend, **given | {argument: there})
        assert (error, named(text)) == ("TypeError", argument)
        assert ": expected a dense array, got one that is sparse or nested. " in text
    x = OTHERWISE[kind](given["q"])
    attend_torch.attend(*[given["q"]] * 3)
    for attend in (attend_torch.attend, attend_torch.explain, attend_torch.Attend()):
        assert error_of(attend, x, x, x) == ("TypeError", text.replace("bias", "q", 1))


def test_the_other_byte_order_in_jax() -> None:
    """Once a call like it is compiled, JAX reads such bytes as its own; torch has no tensors of them."""
    data = DATA | {"q": right_call()["q"], "cu_seqlens": np.array([0, 6], np.int32)}
    swapped = {name: x.astype(x.dtype.newbyteorder(">")) for name, x in data.items() if x.dtype != np.bool_}
    attend_jax.attend(**right_call())
    for argument in swapped:
        if argument == "cu_seqlens":
            call: Any = attend_jax.convert.segments_from_cu_seqlens
            error, text = error_of(call, swapped[argument], 6)
        else:
            error, text = error_of(attend_jax.attend, **right_call(**{argument: swapped[argument]}))
        assert (error, named(text)) == ("TypeError", argument)
        assert f"got {swapped[argument].dtype.str} of shape {data[argument].shape}. " in text
    assert error_of(attend_jax.merge, [swapped["q"]], [np.zeros((2, 4, 6), np.float32)])[0] == "TypeError"


def test_an_int64_scalar_is_a_seed_in_torch_only() -> None:
    arguments = right_call(dropout=0.1, dropout_seed=np.array(7))
    attend_torch.bridge.call(arguments)
    error, text = error_of(attend_jax.bridge.call, arguments)
    assert (error, named(text)) == ("TypeError", "dropout_seed")
    assert "got int64 of shape ()" in text


def test_arrays_of_the_other_framework() -> None:
    q = right_call()["q"]
    theirs, ours = jnp.asarray(q), torch.from_numpy(q)
    for attend, x, whose in ((attend_torch.attend, theirs, "jaxlib"), (attend_torch.attend, q, "numpy"),
                             (attend_jax.attend, ours, "torch")):  # fmt: skip
        text = ("q: expected an array of the framework that is called, got float32 of shape (2, 4, 6, 8). It is of "
                f"{whose}; attend_torch takes torch tensors, attend_jax takes JAX and NumPy arrays.")  # fmt: skip
        assert error_of(attend, x, x, x) == ("TypeError", text)


DATA = {
    "k": np.zeros((2, 2, 6, 8), np.float32),
    "v": np.zeros((2, 2, 6, 8), np.float32),
    "mask": np.ones((2, 6), np.bool_),
    "bias": np.zeros((1, 1, 6, 6), np.float32),
    "q_offset": np.zeros(2, np.int32),
    "q_segment_ids": np.zeros((2, 6), np.int32),
    "kv_segment_ids": np.zeros((2, 6), np.int32),
    "q_lengths": np.full(2, 6, np.int32),
    "kv_lengths": np.full(2, 6, np.int32),
    "sinks": np.zeros(4, np.float32),
    "dropout_seed": np.zeros(2, np.uint32),
}


@pytest.mark.parametrize("name", DATA)
def test_data_of_the_other_framework(name: str) -> None:
    """Whose shape and dtype are right, so that these would explain nothing."""
    right, theirs = right_call(), DATA[name]
    in_torch = {each: torch.from_numpy(right[each]) for each in "qkv"} | {name: theirs}
    in_jax = {each: right[each] for each in "qkv"} | {name: torch.from_numpy(theirs)}
    for attend, arguments, whose in ((attend_torch.attend, in_torch, "numpy"), (attend_jax.attend, in_jax, "torch")):
        text = (f"{name}: expected an array of the framework that is called, got {theirs.dtype} of shape "
                f"{theirs.shape}. It is of {whose}; attend_torch takes torch tensors, attend_jax takes JAX and NumPy "
                "arrays.")  # fmt: skip
        assert error_of(attend, **arguments) == ("TypeError", text)


@pytest.mark.parametrize("argument", DATA)
def test_another_device_in_torch(argument: str) -> None:
    """In JAX see test_jax_transforms, which has two devices."""
    there = torch.from_numpy(DATA[argument]).to("meta")
    here = {name: torch.from_numpy(x) for name, x in right_call().items()}
    text = f"{argument}: expected device cpu, where q is, got meta. Move it there first."
    assert error_of(attend_torch.attend, **here | {argument: there}) == ("ValueError", text)
    if argument not in "kv":
        moved = {name: x.to("meta") for name, x in here.items()}
        text = f"{argument}: expected device meta, where q is, got cpu. Move it there first."
        assert error_of(attend_torch.attend, **moved, **{argument: there.new_zeros(there.shape, device="cpu")}) == (
            "ValueError", text)  # fmt: skip


def test_a_scalar_may_stay_in_host_memory() -> None:
    meta = {name: torch.from_numpy(x).to("meta") for name, x in right_call().items()}
    scalars = {"q_offset": torch.tensor(1), "dropout_seed": torch.tensor(3)}
    out = attend_torch.attend(**meta, is_causal=True, dropout=0.5, **scalars)
    assert out.device.type == "meta"


def test_parts_on_two_devices() -> None:
    out, lse = torch.zeros(2, 4, 6, 8), torch.zeros(2, 4, 6)
    text = "{}: expected device cpu, where outs[0] is, got meta. Move it there first."
    assert error_of(attend_torch.merge, [out, out], [lse, lse.to("meta")]) == ("ValueError", text.format("lses[1]"))
    assert error_of(attend_torch.merge, [out, out.to("meta")], [lse, lse]) == ("ValueError", text.format("outs[1]"))


# Refusals.


def refusal(function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> UnsupportedError:
    with pytest.raises(UnsupportedError) as caught:
        function(*arguments, **keywords)
    return caught.value


@FRAMEWORKS
def test_a_name_of_the_other_framework_is_unsupported(framework: str) -> None:
    bridge = BRIDGES[framework]
    others = [name for name in NAMES if name not in bridge.implementations()]
    assert others
    reason = f"attend_{framework} has no implementation of this name"
    for name in others:
        error = refusal(bridge.call, right_call(implementation=name))
        assert error.reasons == ((name, reason),)
        assert str(error) == f"{HEADLINE}\n  {name}: {reason}\n{ADVICE}"
        assert bridge.call(right_call(implementation=[name, "einsum"])).shape == (2, 4, 6, 8)


@FRAMEWORKS
def test_a_refusal_carries_every_reason_in_the_order_asked(framework: str) -> None:
    bridge = BRIDGES[framework]
    arguments = right_call(softcap=30.0, return_lse=True, sinks=np.zeros(4, np.float32))
    explained = dict(explain(framework, arguments).rows)
    names = [name for name in reversed(NAMES) if explained.get(name, "") is not None]  # those that refuse
    assert len(names) >= 3
    error = refusal(bridge.call, arguments | {"implementation": names})
    assert [name for name, _ in error.reasons] == names
    for name, reason in error.reasons:
        assert reason == explained.get(name, f"attend_{framework} has no implementation of this name")
    assert isinstance(error, NotImplementedError)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.reasons, str(copy)) == (UnsupportedError, error.reasons, str(error))


def explain(framework: str, arguments: dict[str, Any]) -> Any:
    if framework == "jax":
        return attend_jax.explain(**arguments)
    return attend_torch.explain(**{name: each_array(torch.from_numpy, x) for name, x in arguments.items()})


@FRAMEWORKS
def test_einsum_refuses_nothing(framework: str) -> None:
    """None of the cases, by name: every level of every factor is among them."""
    for case in CASES:
        problem = case.build()
        arguments = {name: widened(name, x, problem.dtypes) for name, x in problem.arguments.items()}
        arguments |= {"implementation": "einsum", "return_lse": problem.lse_cotangent is not None}
        with jax.enable_x64(True):
            explanation = explain(framework, arguments)
        assert explanation.chosen == "einsum", case.name


def widened(name: str, value: Any, dtypes: dict[str, str]) -> Any:
    """In float64 where NumPy lacks the dtype: what is asked here is what einsum refuses, which no dtype may be."""
    wide = {"float16": np.float16, "float32": np.float32}
    return value.astype(wide.get(dtypes["q" if name in "qkv" else name], np.float64)) if name in dtypes else value


@FRAMEWORKS
def test_no_name_that_is_asked_for_gives_way(framework: str) -> None:
    """A named implementation is the one that runs, or an error: explain says which, and attend does it."""
    bridge = BRIDGES[framework]
    for arguments in (right_call(), right_call(softcap=2.0), right_call(return_lse=True), right_call(dropout_seed=1)):
        for name, reason in explain(framework, arguments).rows:
            explanation = explain(framework, arguments | {"implementation": name})
            assert explanation.chosen == (name if reason is None else None)
            if reason is not None:
                assert refusal(bridge.call, arguments | {"implementation": name}).reasons == ((name, reason),)

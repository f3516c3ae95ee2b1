"""Segments as packed sequences: when ids are runs, how that comes to be known, and that nothing else is taken for it.

flash-attn-4 and fa4-jax are stood in for by `flash_fakes`, as in test_fa4.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import attend_jax
import attend_jax.bridge
import attend_jax.convert
import attend_jax.runs
import attend_torch
import attend_torch.bridge
import attend_torch.convert
import attend_torch.runs
import flash_fakes
from attend_jax.arrays import SHAPES
from attend_jax.implementations import ENTRIES as JAX_ENTRIES
from attend_shared import compare, doctor, runs
from attend_shared.call import Arrays, check
from attend_shared.canaries import find
from attend_shared.choice import Entry
from attend_shared.errors import UnsupportedError
from attend_torch.implementations import ENTRIES

RNG = np.random.default_rng(0)
IDS = np.array([[5, 5, 5, 2, 2, 9, 9]])
BACK = np.array([[5, 5, 2, 2, 5, 5, 5]])


def same_pairs(ids: np.ndarray, bounds: np.ndarray) -> bool:
    """Whether equal ids are the pairs within one packed sequence."""
    of_run = np.searchsorted(bounds, np.arange(ids.shape[1]), side="right")
    return np.array_equal(ids[0, :, None] == ids[0], of_run[:, None] == of_run)


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8", "uint64"])
def test_starts_say_what_ids_say_or_are_none(dtype: str) -> None:
    packed = 0
    for _ in range(200):
        n = RNG.integers(1, 9)
        ids = RNG.integers(0, RNG.integers(1, 5), (1, n)).astype(dtype)
        if RNG.random() < 0.5:  # runs in some order
            ids = RNG.permutation(5).astype(dtype)[np.sort(ids, 1).astype(int)]
        bounds = runs.starts(ids)
        expected = len(np.unique(ids)) == 1 + np.count_nonzero(ids[0, 1:] != ids[0, :-1])  # as many ids as runs
        assert (bounds is not None) == expected
        if bounds is not None:
            packed += 1
            assert bounds.dtype == np.int32
            assert same_pairs(ids, bounds)
            assert (np.diff(bounds) > 0).all()
    assert 50 < packed < 200


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_cumulative_lengths_are_runs_whatever_they_hold(framework: str) -> None:
    module = {"torch": attend_torch, "jax": attend_jax}[framework]
    for number in range(30):  # JAX compiles for each size
        length = 6 if framework == "jax" else int(RNG.integers(1, 9))
        cu = RNG.integers(-3, 12, 4 if framework == "jax" else 1 + number % 6)
        cu = np.sort(cu) if RNG.random() < 0.7 else cu
        array: Any = torch.tensor(cu) if framework == "torch" else cu if number % 2 else jnp.asarray(cu)
        ids = module.convert.segments_from_cu_seqlens(array, length)
        key = attend_torch.runs._key([ids]) if framework == "torch" else (id(ids),)
        known = module.runs._KNOWN[key]
        assert known.made
        assert known.state == runs.PACKED
        bounds = np.asarray(known.starts)
        assert (bounds[0], bounds[-1]) == (0, length)
        assert (np.diff(bounds) >= 0).all()
        assert same_pairs(np.asarray(ids), bounds), (cu, length)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_fakes.install(monkeypatch)
    for module in (attend_torch.runs, attend_jax.runs):
        monkeypatch.setattr(module, "_KNOWN", {})


def torch_inputs(layout: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 7, 16), (1, 2, 7, 16), (1, 2, 7, 8))
    found = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    return [(x.transpose(1, 2).contiguous() if layout == "bnhd" else x).requires_grad_() for x in found]


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_torch_is_right(fakes: None, layout: str) -> None:
    inputs = torch_inputs(layout)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]).bfloat16().requires_grad_()
    ids = torch.tensor(IDS)
    for options in ({"is_causal": True}, {"window_size": (1, 2)}, {"window_size": (None, 0)}, {"window_size": (0, 0)},
                    {"sinks": sinks}):  # fmt: skip
        answers = []
        for name in ("fa4", "einsum"):
            out, lse = attend_torch.attend(
                *inputs, q_segment_ids=ids, return_lse=True, layout=layout, implementation=name, **options
            )
            wanted = [*inputs, *([sinks] if "sinks" in options else [])]
            weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
            answers.append([out, lse, *torch.autograd.grad([out, lse], wanted, [weights, torch.cos(lse.detach())])])
        for ours, theirs in zip(*answers, strict=True):
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours.float(), theirs.float(), atol=0.03, rtol=0.02)


@pytest.mark.parametrize(("packing", "layout"), [("fa4", "bhnd"), ("fa3", "bhnd"), ("fa3", "bnhd")])
def test_jax_is_right(fakes: None, packing: str, layout: str) -> None:
    inputs = [jnp.asarray(x.detach().float().numpy(), jnp.bfloat16) for x in torch_inputs(layout)]

    def loss(name: str, *inputs: Any) -> Any:
        out = attend_jax.attend(
            *inputs, q_segment_ids=IDS, kv_segment_ids=IDS.copy(), is_causal=True, layout=layout, implementation=name
        )
        return (out.astype(jnp.float32) * jnp.linspace(-1, 1, out.size).reshape(out.shape)).sum()

    ours, theirs = (jax.value_and_grad(partial(loss, name), (0, 1, 2))(*inputs) for name in (packing, "einsum"))
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=0.03, rtol=0.02)


@pytest.fixture
def looks(fakes: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by 1 with every look."""
    found: list[int] = []
    look = runs.look

    def counted(*ids: Any) -> Any:
        found.append(1)
        return look(*ids)

    monkeypatch.setattr(runs, "look", counted)
    return found


def ask(ids: Any, kv_ids: Any = None, name: Any = "fa4") -> torch.Tensor:
    q = torch.ones(1, 1, 7, 8, dtype=torch.bfloat16)
    return attend_torch.attend(q, q, q, q_segment_ids=ids, kv_segment_ids=kv_ids, implementation=name)


def test_a_tensor_is_looked_at_once(looks: list[int]) -> None:
    ids = torch.tensor(IDS)
    for _ in range(3):
        ask(ids)
        ask(ids, ids)
        ask(ids.detach()[:])  # a view is the same memory
        ask(ids.view(7)[None])
    assert len(looks) == 1
    ids[0, 0] = 4
    ask(ids)
    ask(ids)
    assert len(looks) == 2
    ask(ids.clone())
    assert len(looks) == 3
    ask(ids.int())
    assert len(looks) == 4
    wide = torch.tensor(np.concatenate([IDS, IDS], 1))
    ask(wide[:, :7])
    ask(wide[:, 7:])  # the same storage, elsewhere
    assert len(looks) == 6


def test_unsigned_ids_are_known_by_the_callers_own_tensor(looks: list[int]) -> None:
    ids = torch.tensor(IDS.astype(np.uint16))
    ask(ids)
    ask(ids)
    assert len(looks) == 1


def test_two_tensors(looks: list[int]) -> None:
    ids, other = torch.tensor(IDS), torch.tensor(IDS)
    for _ in range(2):
        ask(ids, other)
    assert len(looks) == 1
    other[0, 0] = 7
    with pytest.raises(UnsupportedError, match="kv_segment_ids: it expected the ids of q_segment_ids"):
        ask(ids, other)
    with pytest.raises(UnsupportedError, match="of their dtype, got another dtype or other ids"):
        ask(ids, ids.int())


def test_an_id_that_comes_back(looks: list[int]) -> None:
    for ids in (torch.tensor(BACK), torch.tensor(BACK.repeat(2, 0))[1:]):
        with pytest.raises(UnsupportedError, match="each id in one run, got an id that comes back"):
            ask(ids)
    assert ask(torch.tensor(BACK), name=("fa4", "einsum")).shape == (1, 1, 7, 8)
    with pytest.raises(UnsupportedError, match="expected each id in one run"):
        q = jnp.ones((1, 1, 7, 8), jnp.bfloat16)
        attend_jax.attend(q, q, q, q_segment_ids=BACK, implementation="fa4")


def test_what_is_gone_is_forgotten(looks: list[int]) -> None:
    known = attend_torch.runs._KNOWN
    kept = [torch.tensor(IDS) for _ in range(3)]
    for each in kept:
        ask(each)
    assert len(known) == 3
    del kept[1:], each
    gc.collect()
    ask(torch.tensor(IDS))
    assert len(known) == 2
    many = [torch.tensor(IDS) for _ in range(2 * runs.KEPT)]
    for each in many:
        ask(each)
    assert len(known) == runs.KEPT
    count = len(looks)
    ask(many[-1])
    assert len(looks) == count


def test_a_change_that_torch_does_not_count_is_no_wrong_answer(looks: list[int]) -> None:
    made = attend_torch.convert.segments_from_cu_seqlens(torch.tensor([0, 3, 5, 7]), 7)
    for ids in (torch.tensor(IDS), made):
        ask(ids)
        ids.numpy()[0, 0] = 9  # as a collective does, or a kernel of one's own
        with pytest.raises(RuntimeError, match="changed in a way that torch does not count"):
            ask(ids)


def test_inference_mode(looks: list[int]) -> None:
    with torch.inference_mode():
        ids = torch.tensor(IDS)
        ask(ids)
        ids[0, 0] = 4
        ask(ids)
    assert len(looks) == 2


NOT_KNOWN = "it must read segment ids before it is launched"


@pytest.mark.parametrize("how", ["make_fx", "grad", "vmap"])
def test_nothing_is_read_under_transforms(looks: list[int], how: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    transform: dict[str, Callable[..., Any]] = {
        "make_fx": lambda f: make_fx(lambda ids: f(ids))(torch.tensor(IDS)),
        "grad": lambda f: torch.func.grad(lambda x: f(torch.tensor(IDS)).float().sum() * x)(torch.tensor(1.0)),
        "vmap": lambda f: torch.func.vmap(f)(torch.tensor(IDS[None])),
    }
    with pytest.raises(UnsupportedError, match=NOT_KNOWN):
        transform[how](ask)
    transform[how](partial(ask, name=("fa4", "einsum")))
    assert not looks


def test_nothing_is_read_under_a_compiler(looks: list[int]) -> None:
    ids = torch.tensor(IDS)
    ask(ids)  # what is known is of no use to a program that other ids will come to
    with pytest.raises(Exception, match="Unsupported"):
        torch.compile(ask, fullgraph=True, backend="eager")(ids)
    compiled = torch.compile(partial(ask, name=("fa4", "einsum")), fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids), ask(ids, name="einsum"))
    assert len(looks) == 1


def reason(ids: Any, inputs: list[torch.Tensor], **options: Any) -> str | None:
    return dict(attend_torch.explain(*inputs, q_segment_ids=ids, **options).rows)["fa4"]


def first_of(monkeypatch: pytest.MonkeyPatch, framework: str, entries: dict[str, Entry]) -> None:
    """An order in which fa4 comes first, as on a GPU for which that was learnt."""
    table = (entries["fa4"], entries["einsum"])
    for part in ("attend", "again") if framework == "torch" else ("attend",):
        monkeypatch.setattr(sys.modules[f"attend_{framework}.{part}"], "table", lambda call=None: table)


def test_the_choice_reads_nothing(looks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    first_of(monkeypatch, "torch", ENTRIES)
    ids, inputs = torch.tensor(IDS), torch_inputs("bhnd")
    made = attend_torch.convert.segments_from_cu_seqlens(torch.tensor([0, 3, 5]), 7)
    assert reason(made, inputs) == runs.REASONS[runs.FEW]
    monkeypatch.setattr(runs, "WORTH", 0)
    assert reason(made, inputs) is None
    out = attend_torch.attend(*inputs, q_segment_ids=made, is_causal=True)
    expected = attend_torch.attend(*inputs, q_segment_ids=made, is_causal=True, implementation="fa4")
    assert out.grad_fn.name() == expected.grad_fn.name()
    assert torch.equal(out, expected)
    assert reason(ids, inputs) == runs.REASONS[runs.UNREAD]
    assert not looks
    assert reason(ids, inputs, implementation="fa4") is None
    assert len(looks) == 1
    assert reason(ids, inputs) == runs.REASONS[runs.UNREAD]  # whoever looked before
    made[0, 0] = 3  # no longer what it was made of
    assert reason(made, inputs) == runs.REASONS[runs.UNREAD]
    assert len(looks) == 1


def test_nothing_is_copied(looks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    interface, places = sys.modules["flash_attn.cute.interface"], []
    forward = interface._flash_attn_fwd

    def seen(*given: Any, **others: Any) -> Any:
        places.append([x.data_ptr() for x in given[:3]])
        return forward(*given, **others)

    monkeypatch.setattr(interface, "_flash_attn_fwd", seen)
    inputs = [torch.randn(1, heads, 7, 32).bfloat16() for heads in (4, 2, 2)]  # of a size that is not filled up
    turned = [torch.randn(1, 7, heads, 32).bfloat16() for heads in (4, 2, 2)]
    ids = torch.tensor(IDS)
    attend_torch.attend(*inputs, q_segment_ids=ids, implementation="fa4")
    attend_torch.attend(*turned, q_segment_ids=ids, layout="bnhd", implementation="fa4")
    assert places == [[x.data_ptr() for x in each] for each in (inputs, turned)]


def test_where_another_comes_first_nothing_is_read(looks: list[int]) -> None:
    ids = torch.tensor(IDS)
    ask(ids, name=("einsum", "fa4"))
    ask(ids, name=None)
    q = torch.ones(1, 1, 7, 8)
    with pytest.raises(UnsupportedError, match="it takes float16 and bfloat16, not float32"):
        attend_torch.attend(q, q, q, q_segment_ids=ids, implementation="fa4")
    assert not looks


def test_empty_arrays(looks: list[int]) -> None:
    q = torch.ones(1, 1, 0, 8, dtype=torch.bfloat16)
    ids = torch.zeros(1, 0, dtype=torch.int32)
    assert attend_torch.attend(q, q, q, q_segment_ids=ids, implementation="fa4").shape == q.shape
    assert not looks


# JAX.


def jax_ask(ids: Any, name: Any = "fa4", q: Any = None) -> jax.Array:
    q = jnp.linspace(-1, 1, 56).reshape(1, 1, 7, 8).astype(jnp.bfloat16) if q is None else q
    return attend_jax.attend(q, q, q, q_segment_ids=ids, implementation=name)


def test_jax_arrays_are_looked_at_once_and_numpy_arrays_each_time(looks: list[int]) -> None:
    ids = jnp.asarray(IDS)
    for _ in range(3):
        jax_ask(ids)
    assert len(looks) == 1
    assert len(attend_jax.runs._KNOWN) == 1
    host = IDS.copy()
    jax_ask(host)
    host[0, 0] = 4
    jax_ask(host)
    assert len(looks) == 3
    del ids
    gc.collect()
    assert not attend_jax.runs._KNOWN


def test_what_a_jit_knows(looks: list[int], little_garbage: None) -> None:
    ids = jnp.asarray(IDS)
    expected = jax_ask(ids, "einsum")
    np.testing.assert_array_equal(jax.jit(lambda: jax_ask(ids))(), expected)  # a constant
    with pytest.raises(UnsupportedError, match=NOT_KNOWN):
        jax.jit(jax_ask)(ids)
    for name in ("fa4", "fa3"):
        with pytest.raises(UnsupportedError, match=NOT_KNOWN):
            jax.vmap(partial(jax_ask, name=name))(ids[None])
    count = len(looks)

    @partial(jax.jit, static_argnums=1)
    def of_lengths(cu: jax.Array, name: str) -> jax.Array:
        return jax_ask(attend_jax.convert.segments_from_cu_seqlens(cu, 7), name)

    with jax.checking_leaks():
        for cu in ([0, 3, 5, 7], [0, 1, 1, 6]):
            *ours, theirs = (of_lengths(jnp.asarray(cu), name) for name in ("fa4", "fa3", "einsum"))
            for out in ours:
                np.testing.assert_array_equal(out, theirs)
    assert len(looks) == count


@pytest.mark.parametrize("name", ["fa4", "fa3"])
def test_lanes_are_packed_one_by_one(looks: list[int], name: str) -> None:
    """Each by its own runs, gradients as well: which packed sequences alone cannot do."""

    def gradients(x: jax.Array, cu: jax.Array, name: str) -> Any:
        ids = attend_jax.convert.segments_from_cu_seqlens(cu, 7)
        return jax.value_and_grad(lambda x: (jax_ask(ids, name, x).astype(jnp.float32) ** 2).sum())(x)

    x = jnp.linspace(-1, 1, 3 * 56).reshape(3, 1, 1, 7, 8).astype(jnp.bfloat16)
    cu = jnp.asarray([[0, 3, 5, 7], [0, 1, 1, 6], [7, 0, 2, 4]])
    ours, theirs = (jax.vmap(partial(gradients, name=each))(x, cu) for each in (name, "einsum"))
    for mine, its in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.astype(jnp.float32), its.astype(jnp.float32), atol=0.05, rtol=0.02)
    assert not looks


def test_the_choice_in_jax(looks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes what is known without a look."""
    order = [JAX_ENTRIES[name] for name in ("fa3", "fa4", "einsum")]
    monkeypatch.setattr(sys.modules["attend_jax.attend"], "table", lambda call=None: order)
    q, ids, cu = jnp.ones((1, 1, 7, 8), jnp.bfloat16), jnp.asarray(IDS), np.array([0, 3, 5])
    told: dict[str, dict[str, str | None]] = {}

    def choose(of: str, ids: Any) -> str | None:
        explanation = attend_jax.explain(q, q, q, q_segment_ids=ids)
        told[of] = dict(explanation.rows)
        return explanation.chosen

    def made(cu: Any) -> Any:
        return attend_jax.convert.segments_from_cu_seqlens(cu, 7)

    jax_ask(ids, "fa3")
    assert len(looks) == 1
    assert choose("ids", ids) == "einsum"  # whoever looked before
    assert choose("few", made(cu)) == "einsum"
    monkeypatch.setattr(runs, "WORTH", 0)
    assert choose("numpy", made(cu)) == "fa3"
    assert choose("array", made(jnp.asarray(cu))) == "fa3"
    jax.jit(lambda cu: (told.setdefault("chosen", {"jit": choose("jit", made(cu))}), cu)[1])(jnp.asarray(cu))
    assert told.pop("chosen") == {"jit": "fa3"}
    reasons = {of: (rows["fa3"], rows["fa4"]) for of, rows in told.items()}
    assert reasons == {
        "ids": (runs.REASONS[runs.UNREAD],) * 2, "few": (runs.REASONS[runs.FEW],) * 2,
        **dict.fromkeys(("numpy", "array", "jit"), (None, None)),
    }  # fmt: skip
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, ids)]
    explanation = attend_jax.explain(*shapes[:1] * 3, q_segment_ids=shapes[1], implementation="fa4")
    assert dict(explanation.rows)["fa4"] == runs.REASONS[runs.NOT_LOOKED]
    assert len(looks) == 1


@pytest.mark.parametrize(("lengths", "longest"), [([7], 7), ([3, 2, 2], 4), ([1] * 7, 1), ([2, 5], 7)])
def test_how_long_the_longest_run_is(fakes: None, lengths: list[int], longest: int) -> None:
    call = flash_call()
    cu = np.cumsum([0, *lengths])
    for bounds, expected in ((cu, longest), (jnp.asarray(cu), 7)):  # what is on the device is not waited for
        ids = attend_jax.convert.segments_from_cu_seqlens(bounds, 7)
        found = attend_jax.runs._KNOWN[(id(ids),)].starts
        assert attend_jax.runs.bounded(call, "fa3", found).longest == expected
        assert attend_jax.runs.bounded(call, "fa4", found) == call


def flash_call() -> Any:
    x, ids = jax.ShapeDtypeStruct((1, 1, 7, 8), jnp.bfloat16), jax.ShapeDtypeStruct((1, 7), jnp.int32)
    arrays = Arrays(x, x, x, q_segment_ids=ids)
    return check(SHAPES, arrays, False, None, None, None, 0.0, False, "bhnd", None)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9])
def test_runs_are_counted_in_powers_of_two(count: int) -> None:
    bounds = attend_jax.runs._rounded(np.arange(count + 1, dtype=np.int32))
    assert len(bounds) - 1 == 2 ** int(np.ceil(np.log2(count)))
    assert bounds.tolist() == [*range(count + 1), *[count] * (len(bounds) - count - 1)]


def test_the_doctor_asks_for_packed_sequences(fakes: None) -> None:
    for name, words in (("documents", None), ("foreign segments", "it takes segments of one item")):
        problem = find(name).build("bfloat16")
        for framework in ("torch", "jax"):
            explanation = doctor.explain(problem, framework, "cuda")
            for packing in ("fa4", "fa3")[: 1 if framework == "torch" else 2]:
                found = dict(explanation.rows)[packing]
                assert found == words if words is None else str(found).startswith(words)
                assert explanation.chosen != packing  # which reads nothing
    problem = find("documents").build("bfloat16")
    for module, packing in ((attend_torch.bridge, "fa4"), (attend_jax.bridge, "fa4"), (attend_jax.bridge, "fa3")):
        compare.check(module.evaluate(problem, packing), problem)


# One array for queries and keys, which kernels read once.


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
@pytest.mark.parametrize("given", ["once", "twice", "two"])
def test_ids_given_twice_are_one_array(given: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known by identity, as contents are never read: in torch, in JAX of NumPy and JAX arrays, and inside a jit."""
    found: list[bool] = []

    def spied(module: Any) -> None:
        compute = module.attend

        def spy(call: Any, arrays: Arrays) -> Any:
            found.append(arrays.q_segment_ids is arrays.kv_segment_ids)
            return compute(call, arrays)

        monkeypatch.setattr(module, "attend", spy)

    spied(ENTRIES["einsum"].module)
    spied(JAX_ENTRIES["einsum"].module)
    ids = np.array([[0, 0, 1, 1, 1]], dtype)

    def ask(attend: Any, q: Any, ids: Any, other: Any) -> Any:
        both = {"q_segment_ids": ids} | ({} if given == "once" else {"kv_segment_ids": other})
        return attend(q, q, q, **both, implementation="einsum")

    def compiled(q: Any, ids: Any, other: Any) -> Any:
        if given == "two":
            return jax.jit(partial(ask, attend_jax.attend))(q, ids, other)
        return jax.jit(lambda q, ids: ask(attend_jax.attend, q, ids, ids))(q, ids)

    x = np.ones((1, 1, 5, 4), np.float32)
    for function, q, make in (
        (partial(ask, attend_torch.attend), torch.tensor(x), torch.tensor),
        (partial(ask, attend_jax.attend), jnp.asarray(x), np.array),
        (partial(ask, attend_jax.attend), jnp.asarray(x), jnp.array),
        (compiled, jnp.asarray(x), jnp.array),
    ):
        jax.clear_caches()  # what was traced would not be traced again
        first = make(ids)
        function(q, first, make(ids) if given == "two" else first)
    jax.clear_caches()
    assert found == [given != "two"] * 4

"""What tests/test_triton.py has Triton's interpreter do, in a process of its own: it runs kernels in NumPy, on a CPU.

With NumPy 2.4 and later the interpreter needs help: it makes loop bounds of arrays of one element with int(), which
NumPy once allowed for arrays that have an axis.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton as language
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.language import core
from triton.runtime import interpreter

from attend_shared import cases, compare
from attend_shared.call import Arrays, canonical, check
from attend_shared.dtypes import round_to
from attend_shared.kernels import gluon_plan, sizes, tiles
from attend_shared.kernels import plan as plans
from attend_shared.kernels.arguments import Shared, ahead_of
from attend_shared.kernels.launch import Launch, Layout
from attend_shared.problems import Problem
from attend_torch import attend, bridge, launches
from attend_torch.arrays import FRAMEWORK
from attend_torch.implementations import triton

_patch = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_lang_tensor
_patch_all, _patched = interpreter._patch_lang, set[str]()


def _patch_lang(function: Any) -> Any:
    """Triton's, which goes through all of the language again for each function that a kernel calls, which is half of
    what a kernel takes; what one function of a module sees is patched for the others until the launch is over.
    """
    if function.__module__ in _patched:
        return None
    scope = _patch_all(function)
    _patched.add(function.__module__)
    restore = scope.restore

    def restore_all() -> None:
        restore()
        _patched.clear()

    scope.restore = restore_all
    return scope


interpreter._patch_lang = _patch_lang

# Every value has a type, with a name that is put together anew each time; few differ.
_np_dtype, _tuple_type = cache(interpreter._get_np_dtype), core._type_for_tuple_values
_types: dict[tuple[int, ...], Any] = {}


def _get_np_dtype(of: Any) -> Any:
    of = of.element_ty if isinstance(of, tl.block_type) else of
    return np.dtype(np.uint64) if isinstance(of, tl.pointer_type) else _np_dtype(of)


def _type_for_tuple_values(values: Any, fields: Any = None) -> Any:
    """Triton's; of the sizes of a block it is made once."""
    sizes = tuple(x.value if type(x) is tl.constexpr else x for x in values)
    if fields is not None or not all(type(x) is int for x in sizes):
        return _tuple_type(values, fields)
    if sizes not in _types:
        _types[sizes] = _tuple_type(values)
    return _types[sizes]


interpreter._get_np_dtype, core._type_for_tuple_values = _get_np_dtype, _type_for_tuple_values


def run_cases(*names: str) -> dict[str, str]:
    """The verdict of each."""
    return {name: run_case(name) for name in names}


def run_case(name: str, implementation: str = "triton") -> str:
    problem = cases.find(name).build()
    try:
        compare.check(bridge.evaluate(problem, implementation), problem)
    except compare.Mismatch as mismatch:
        return str(mismatch)
    return "ok"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def visits() -> dict[str, list[int]]:
    """How many tiles forward, query_gradients and key_gradients make, each of its dots counted once."""
    documents = torch.arange(256)[None] // 64
    hole = torch.ones(1, 256, dtype=torch.bool)
    hole[:, 64:192] = False
    calls: dict[str, dict[str, Any]] = {
        "all": {},
        "causal": {"is_causal": True},
        "window (10, 10)": {"window_size": (10, 10)},
        "diagonal": {"window_size": (0, 0)},
        "causal at offset -100": {"is_causal": True, "q_offset": torch.tensor([-100])},
        "kv_lengths 65": {"kv_lengths": torch.tensor([65])},
        "q_lengths 64": {"q_lengths": torch.tensor([64])},
        "nothing": {"kv_lengths": torch.tensor([0])},
        "documents of 64": {"q_segment_ids": documents},
        "documents in turn": {"q_segment_ids": documents % 2},
        "key mask with a hole": {"mask": hole},
        "key mask with a hole and a bias": {"mask": hole, "bias": torch.zeros(1, 1, 1, 256)},
        "left padding, causal": {"mask": (torch.arange(256) >= 128)[None], "is_causal": True},
        "every second key, causal": {"mask": (torch.arange(256) % 2 == 0)[None], "is_causal": True},
    }
    dots = 0
    make = interpreter.InterpreterBuilder.create_dot

    def count(self: Any, *arguments: Any) -> Any:
        nonlocal dots
        dots += 1
        return make(self, *arguments)

    interpreter.InterpreterBuilder.create_dot = count
    run = launches.run
    found: dict[str, list[int]] = {}

    def run_each(kernels: Any, arrays: Any) -> None:
        nonlocal dots
        products = {"forward": 2, "query_gradients": 3, "key_gradients": 4}
        for kernel in kernels:
            dots = 0
            run([kernel], arrays)
            if kernel.launch.kernel in products:
                found[name].append(dots // products[kernel.launch.kernel])

    launches.run = run_each
    x = torch.zeros(1, 1, 256, 16, requires_grad=True)
    sizes.SMALL_TILES = (sizes.SMALL_TILES[1],) * 2
    for name, options in calls.items():
        found[name] = []
        attend(x, x, x, **options, implementation="triton").sum().backward()
    return found


def whole() -> dict[str, list[float] | str]:
    """How many tiles of 64 x 64 logits forward, query_gradients and key_gradients (which looks at no key mask) make
    without a look at segments and key masks; or what is wrong with the result.

    What they look at is put out of force as soon as it is known which tiles are whole: no key has a segment that a
    query has, none is alive, and all that are packed stand where no query sees one. All weights of a row are equal
    here, and the cotangents make each of them count 1.
    """
    far, n = 2**63 - 1, torch.arange(256)
    foreign, dead = torch.zeros(1, 256, dtype=torch.int64), torch.ones(1, 256, dtype=torch.bool)
    foreign[:, 100], dead[:, 100] = 9, False
    calls: dict[str, dict[str, Any]] = {
        "documents of 128, causal": {"q_segment_ids": n[None] // 128, "is_causal": True},
        "documents of 96": {"q_segment_ids": n[None] // 96},
        "extreme ids": {"q_segment_ids": torch.where(n < 128, -far - 1, far)[None]},
        "one foreign id": {"q_segment_ids": foreign},
        "left padding, causal": {"mask": (n >= 70)[None], "is_causal": True, "bias": torch.zeros(1, 1, 1, 256)},
        "left padding, packed": {"mask": (n >= 70)[None], "is_causal": True, "q_offset": -1},
        "documents of 128, one dead key": {"q_segment_ids": n[None] // 128, "mask": dead},
    }
    run = launches.run
    spoilt: tuple[str, ...] = ()

    def run_each(kernels: Any, arrays: Any) -> None:
        for kernel in kernels:
            last = kernel.launch.kernel == "key_gradients"
            names = ("q_segment_ids", "kv_segment_ids", *(() if last else ("alive",)))
            kept = {name: arrays[name] for name in names if name in arrays}
            if kernel.launch.kernel in spoilt:
                arrays |= {name: torch.full_like(x, name == names[0]) for name, x in kept.items()}
                if kernel.launch.constants["PACKED"]:
                    kept["listed"] = arrays["listed"]
                    arrays["listed"] = torch.full_like(kept["listed"], 255)
            run([kernel], arrays)
            arrays |= kept

    launches.run = run_each
    sizes.SMALL_TILES = (sizes.SMALL_TILES[1],) * 2
    found: dict[str, list[float] | str] = {}
    for name, options in calls.items():
        inputs = [draw(1, 1, 256, 16, seed=seed).requires_grad_() for seed in range(3)]
        spoilt = ()
        ours, theirs = (
            torch.autograd.grad(attend(*inputs, **options, implementation=each).sin().sum(), inputs)
            for each in ("triton", "einsum")
        )
        try:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        except AssertionError as error:
            found[name] = str(error)
            continue
        q, k, v = torch.zeros(1, 1, 256, 16), torch.ones(1, 1, 256, 16), torch.zeros(1, 1, 256, 16)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out, lse = attend(*inputs, **options, scale=1.0, return_lse=True, implementation="triton")
        seen = lse.detach().exp()
        spoilt = ("query_gradients", "key_gradients")
        dq, _, dv = torch.autograd.grad((out, lse), inputs, (seen[..., None].expand_as(out), seen))
        spoilt = ("forward",)
        with torch.no_grad():
            lse = attend(*inputs, **options, scale=1.0, return_lse=True, implementation="triton")[1]
        counts = (lse.exp(), dq[..., 0], dv[..., 0])[: 3 if "q_segment_ids" in options else 2]
        found[name] = [round(x.sum().item() / 64**2, 2) for x in counts]
    return found


def packed() -> dict[str, list[str]]:
    """What of the places of keys, of how many lie below each, and of the first run, is not what NumPy finds."""
    j = 1300  # of three programs, whose words before them are counted in more than one turn
    random = np.random.default_rng(0)
    run = np.arange(j) >= 130
    masks = {
        "holes": random.random((2, j)) < 0.7,
        "few": random.random((2, j)) < 0.001,
        "runs": np.stack([run, run & (np.arange(j) != 1000)]),
        "none and all": np.stack([np.zeros(j, bool), np.ones(j, bool)]),
    }
    q, k, lengths = torch.zeros(2, 1, 1, 16), torch.zeros(2, 1, j, 16), torch.tensor([j, 1250])
    triton.plans.MANY = 32
    found: dict[str, list[str]] = {}
    for name, mask in masks.items():
        arrays = Arrays(q, k, k, torch.from_numpy(mask)[:, None, None], kv_lengths=lengths)
        call = check(FRAMEWORK, arrays, False, None, None, None, 0.0, False, "bhnd", None)
        plan, known = triton._prepare(call, arrays)
        launches.run(plan.forward[:2], known)
        there = mask & (np.arange(j) < lengths.numpy()[:, None])
        before, wrong = known["before"].numpy(), []
        groups = plan.forward[1].launch.constants["G"]
        for item in range(2):
            places = np.flatnonzero(there[item])
            if (known["listed"][item, : len(places)].numpy() != places).any():
                wrong.append(f"places of {item}")
            if (before[item, : j + 1] != np.searchsorted(places, np.arange(j + 1))).any():
                wrong.append(f"how many below in {item}")
            whole = [bool(there[item, n : n + groups].all()) and n + groups <= j for n in range(0, j, groups)]
            first = whole.index(True) if True in whole else len(whole)
            end = whole.index(False, first) if False in whole[first:] else len(whole)
            if list(before[item, j + 1 :]) != [first * groups, end * groups]:
                wrong.append(f"the run of {item}: {before[item, j + 1 :]} for {first * groups}, {end * groups}")
        found[name] = wrong
    return found


def _documents(ids: np.ndarray, h: int, hk: int, causal: bool) -> tuple[list[Launch], dict[str, torch.Tensor]]:
    """What finds runs and orders tiles of such segments, which ran, and the arrays."""
    q, k = (torch.zeros(len(ids), heads, ids.shape[1], 128, dtype=torch.float16) for heads in (h, hk))
    arrays = Arrays(q, k, k, q_segment_ids=torch.from_numpy(ids))
    call = check(FRAMEWORK, arrays, causal, None, None, None, 0.0, False, "bhnd", None)
    arrays = canonical(call, arrays)
    layout = Layout(q.stride()[:3], k.stride()[:3], k.stride()[:3], one_id=True)
    plan, known = triton._prepare(call, arrays)
    launches.run(plan.forward[:2], known)
    order = gluon_plan.order(call, Shared(call, layout, ahead_of(call, layout)), True, True)
    launches.run(launches.Kernels(order), known)
    return list(order), known


def ordered() -> dict[str, list[str]]:
    """What of the orders of tiles of queries and of keys is not as it is to be: each tile once; the first run of heads
    by how many blocks are visited; programs with shares alike.
    """
    random, heads, tiles, found = np.random.default_rng(0), {"queries": 32, "keys": 16}, 16, {}
    ids = np.sort(random.integers(0, 6, (2, tiles * 128)), 1)
    ids[1] = np.arange(tiles * 128) // 1024
    place = np.arange(tiles * 128)
    for causal in (False, True):
        _, known = _documents(ids, heads["queries"], heads["keys"], causal)
        for side, h in heads.items():
            order = known["query_order" if side == "queries" else "key_order"].numpy()
            programs, together = gluon_plan._rounds(h, tiles)
            starts, ends = (np.stack([np.searchsorted(x, x, each) for x in ids]) for each in ("left", "right"))
            if causal:
                starts, ends = (starts, place + 1 + 0 * ends) if side == "queries" else (place + 0 * starts, ends)
            tiled = starts.reshape(2, tiles, 128).min(-1) // 64, -(-ends.reshape(2, tiles, 128).max(-1) // 64)
            visited = np.repeat((tiled[1] - tiled[0])[:, None], h, 1).reshape(-1)
            wrong = [] if (np.sort(order) == np.arange(2 * h * tiles)).all() else ["not each tile once"]
            run = order[: together * tiles]
            if (np.diff(visited[run]) > 0).any() or (run >= together * tiles).any():
                wrong.append("the first run")
            shares = visited[order].reshape(-1, programs).sum(0)
            if shares.max() > 1.15 * shares.mean():
                wrong.append(f"shares {shares.max() / shares.mean():.2f}")
            found[f"{side}{', causal' * causal}"] = wrong
    return found


def spans() -> dict[str, list[str]]:
    """What of where runs begin and end, and of whether all ids have one run, is not what NumPy finds."""
    n, random, far = 700, np.random.default_rng(0), 2**63 - 1
    place, several = np.arange(n), np.sort(random.integers(1, 9, n))
    patterns: dict[str, tuple[list[np.ndarray], bool]] = {
        "one document": ([0 * place], True), "each its own": ([place], True), "sorted": ([several], True),
        "down": ([-place // 100], False),  # which is runs, but is not told from what is none
        "padding of 0 behind": ([np.where(place < 600, several, 0)], True),
        "padding of 0 before": ([np.where(place > 90, several, 0)], True),
        "padding of -1 behind": ([np.where(place < 699, several, -1)], True),
        "the first again at the end": ([np.where(place < 650, several, several[0])], False),
        "one foreign id": ([np.where(place == 333, 99, several)], False),
        "a fall in each part": ([several, place // 100 % 2], False), "in turn": ([place % 2], False),
        "from any on": ([np.roll(several, 77)], False),
        "from an id on": ([np.roll(several, -(several < 4).sum())], True),
        "items": ([several, 0 * place, np.where(place < 5, 7, 2)], True),
        "the last of many is none": ([several] * 16 + [several[::-1]], False),
        "extreme": ([np.where(place < 128, far, -far - 1)], True), "at a part's end": ([place // 128], True),
        "beyond parts": ([(place > 127).astype(int) + (place > 640)], True),
    }  # fmt: skip
    gluon_plan.RUN_MANY = 64  # in more than one turn
    found: dict[str, list[str]] = {}
    for name, (rows, expected) in patterns.items():
        ids = np.stack(rows).astype(np.int64)
        _, known = _documents(ids, 2, 1, True)
        wrong = []
        if bool(known["runs"].item()) != expected or (expected and not all(map(_is_runs, ids))):
            wrong.append(f"whether it is runs: {known['runs'].item()}")
        for item, row in enumerate(ids):
            edges = np.flatnonzero(np.diff(row, prepend=row[0] ^ 1, append=row[-1] ^ 1))
            at = np.searchsorted(edges, place, "right")
            if (known["spans"][item].numpy() != np.stack([edges[at - 1], edges[at]], 1)).any():
                wrong.append(f"spans of {item}")
        found[name] = wrong
    return found


def left() -> dict[str, list[str]]:
    """Which of dk and dv Triton's kernel did not leave as they were where ids are runs, or did not make where not."""
    x = [draw(1, 2, 80, 16, seed=seed).half() for seed in range(4)]
    arrays = Arrays(*x[:3], q_segment_ids=torch.arange(80)[None] // 30)
    call = check(FRAMEWORK, arrays, True, None, None, None, 0.0, False, "bhnd", None)
    arrays = canonical(call, arrays)
    plan, known = triton._forward(call, arrays)
    _, known = triton._backward(call, arrays, triton._saved(plan, known), x[3], None, (True,) * 3 + (False,) * 2)
    expected = {name: known[name] for name in ("dk", "dv")}
    kernels = plan.backward(known["dout"].stride()[:3], False, False, True)
    (launch,) = (each.launch for each in kernels if each.launch.kernel == "key_gradients")
    both = launch._replace(inputs=(*launch.inputs[:-1], "runs"), constants={**launch.constants, "RUNS": True})
    empty, found = launches._empty, {}
    launches._empty = lambda *x: empty(*x).fill_(7)
    for name, runs in {"runs": 1, "no runs": 0}.items():
        given = known | {"runs": torch.tensor([runs], dtype=torch.int32)}
        launches.run(launches.Kernels([both]), given)
        found[name] = [which for which, x in expected.items()
                       if not torch.equal(given[which], torch.full_like(x, 7) if runs else x)]  # fmt: skip
    return found


def _is_runs(ids: np.ndarray) -> bool:
    return len(np.unique(ids)) == 1 + np.count_nonzero(np.diff(ids))


def biases() -> dict[str, list[str]]:
    """What made dq and dbias, and what is off: by einsum, or where dq is not as a pass of its own makes it."""
    half, brain = torch.float16, torch.bfloat16
    mask = draw(2, 1, 18, 20, seed=8) > 0
    calls: dict[str, tuple[int, tuple[int, ...], Any, Any, dict[str, Any]]] = {
        # items, shape of the bias, dtypes of all and of the bias, options
        "of three items, causal": (3, (1, 1, 18, 20), half, half, {"is_causal": True, "q_offset": 0}),
        "rows that see nothing": (2, (1, 1, 18, 20), half, half, {"is_causal": True, "q_offset": -16}),
        "of each item, lengths and a mask": (2, (2, 1, 18, 20), torch.float32, torch.float32, {
            "mask": mask, "kv_lengths": torch.tensor([17, 0]), "q_lengths": torch.tensor([7, 18])}),
        "finer, softcap and dropout in a window": (2, (1, 1, 18, 20), brain, torch.float32, {
            "window_size": (9, 3), "q_offset": 5, "softcap": 2.0, "dropout": 0.3, "dropout_seed": 5}),
        "key mask": (2, (1, 1, 18, 20), half, half, {"mask": torch.arange(20)[None] % 5 > torch.tensor([[1], [4]])}),
        "of all heads": (2, (1, 1, 18, 20), half, half, {}),
        "of five items": (5, (1, 1, 18, 20), half, half, {}),
        "of two items in float32": (2, (1, 1, 18, 20), torch.float32, torch.float32, {}),
    }  # fmt: skip
    together, run, launched = plans._together, launches.run, list[str]()
    found: dict[str, list[str]] = {}

    def run_all(kernels: Any, arrays: Any) -> None:
        launched.extend(kernel.launch.kernel for kernel in kernels if "bias_" in kernel.launch.kernel)
        run(kernels, arrays)

    launches.run = run_all
    for name, (items, shape, dtype, of_bias, options) in calls.items():
        heads = 2 if name == "of all heads" else 1
        wide = [draw(items, heads, n, 16, seed=seed) for seed, n in enumerate((18, 20, 20))]
        kept = torch.arange(20) < options.get("kv_lengths", torch.tensor([20]))[:, None]
        inputs = [x.to(dtype) for x in wide] + [draw(*shape, seed=3).to(of_bias)]
        poisoned = [x.where(kept[:, None, :, None], float("nan")) for x in inputs[1:3]]
        cotangent = draw(items, heads, 18, 16, seed=4).to(dtype)

        def gradients(implementation: str, *x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            leaves = [y.clone().requires_grad_() for y in x]
            out = attend(*leaves[:3], bias=leaves[3], implementation=implementation, **options)  # noqa: B023
            return torch.autograd.grad(out, leaves, cotangent.to(out.dtype))  # noqa: B023

        launched.clear()
        ours = gradients("triton", inputs[0], *poisoned, inputs[3])
        found[name] = sorted(set(launched))
        plans._together = lambda *_: 0
        plans.plan.cache_clear()
        triton._plan.cache_clear()
        apart = gradients("triton", *inputs)
        plans._together = together
        plans.plan.cache_clear()
        triton._plan.cache_clear()
        exact = gradients("einsum", *(x.double() for x in inputs))
        found[name] += [f"other bits of {which}" for which, x, y in zip(("dq", "dk", "dv"), ours, apart, strict=False)
                        if not torch.equal(x, y)]  # fmt: skip
        for which, x, y in zip(("dq", "dk", "dv", "dbias"), ours, exact, strict=True):
            off = ((x - y).abs().max() / y.abs().max()).item()
            if not off < (2e-6 if x.dtype == torch.float32 else 2e-2):
                found[name].append(f"{which} is {off} off")
    return found


def huge() -> dict[str, list[float]]:
    """By how much out, and lse by itself, are off where a bias is as large as numbers go, or all but."""
    lowest, n = torch.finfo(torch.float32).min, torch.arange(64.0)
    rows = {
        "lowest": torch.full((64,), lowest),
        "lowest and none": torch.where(n < 20, lowest, 0),
        "almost lowest": torch.where(n == 40, 0.99 * lowest, lowest),
        "on both sides of where units change": torch.where(n < 16, 5.3e8, torch.where(n < 32, 5.4e8, 1)),
        "below it, rising": torch.where(n < 16, -5.4e8, -5.3e8),
        "in steps across it": 2.0**29 + 32 * (n - 40),
        "one smaller": torch.where(n == 7, 2e20, 3e20),
        "ten thousand": 1e4 + draw(64),
        "a million less": -1e6 + 32 * draw(64),
        "nothing": torch.full((64,), float("-inf")),
        "nothing, lowest, some": torch.where(n < 16, float("-inf"), torch.where(n < 32, lowest, -7)),
    }
    q, k, v = torch.zeros(1, 1, len(rows), 16).half(), draw(1, 1, 64, 16).half(), draw(1, 1, 64, 16, seed=1).half()
    bias = torch.stack(list(rows.values()))[None, None]
    out, lse = attend(q, k, v, bias=bias, return_lse=True, implementation="triton")
    wide = [x.double() for x in (q, k, v, bias)]
    exact, exact_lse = attend(*wide[:3], bias=wide[3], return_lse=True, implementation="einsum")
    off = (out - exact).abs().amax(-1).flatten()
    off_lse = torch.where(lse == exact_lse, 0, (lse - exact_lse) / exact_lse).abs().flatten()
    return {name: [off[n].item(), off_lse[n].item()] for n, name in enumerate(rows)}




def exact() -> dict[str, float]:
    """Of float32: the largest number in gradients that are 0, as rows see one key; and by what part of its largest a
    result is off where it is not, as lse has a gradient too, and where logits are large.
    """
    q, dout, k, v = (draw(1, 2, n, 16, seed=n) for n in (300, 301, 40, 41))
    dout, v, table = dout[:, :, :300], v[:, :, :40], draw(1, 2, 300, 40)
    mask = (torch.arange(40) == 7)[None]
    calls: dict[str, dict[str, Any]] = {
        "plain": {}, "softcap": {"softcap": 5.0}, "dropout": {"dropout": 0.3, "dropout_seed": 1},
        "bias": {"bias": table}, "bias of keys": {"bias": table[:, :, :1]},
        "dropout and bias": {"bias": table[:, :, :1], "dropout": 0.3, "dropout_seed": 1},
    }  # fmt: skip
    found = {}
    for name, options in calls.items():
        given = [x.clone().requires_grad_() for x in (q, k, options.get("bias", k))]
        rest = options | ({"bias": given[2]} if "bias" in options else {})
        out = attend(*given[:2], v, mask=mask, implementation="triton", **rest)
        gradients = torch.autograd.grad(out, given[: 3 if "bias" in options else 2], dout)
        found[name] = max(x.abs().max().item() for x in gradients)

    def off(q: torch.Tensor, k: torch.Tensor, sinks: torch.Tensor | None = None, **options: Any) -> float:
        results = []
        for name, dtype in ("triton", torch.float32), ("einsum", torch.float64):
            given = [None if x is None else x.to(dtype).requires_grad_() for x in (q, k, v, sinks)]
            out, lse = attend(*given[:3], sinks=given[3], return_lse=True, implementation=name, **options)
            loss = (out * dout.to(dtype)).sum() + (lse * table[:, :, :, 0]).sum()
            gradients = torch.autograd.grad(loss, [x for x in given if x is not None])
            results.append([x.double() for x in (out, *gradients)])
        return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results, strict=True))

    found["lse"] = off(q, k, mask=mask)
    alike = torch.full_like(q, 256.0), torch.full_like(k, 256.0)  # logits of 2^18
    found["large"] = off(*alike, sinks=torch.tensor([2.0**18, 2.0**18 + 1]))
    return found


def drawn() -> dict[str, str]:
    """Whether out, lse and gradients have the same bits where dropout's decisions are drawn once, in memory that holds
    something, for the way back or for both ways, as where each launch draws its own; and are einsum's.
    """
    half = {"dtype": torch.float16}
    calls: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
        "rows of heads, odd sizes": ((1, 2, 1, 21, 230, 8), {}),
        "causal at an offset": ((2, 1, 1, 130, 190, 8), {"is_causal": True, "q_offset": torch.tensor([70, -90])}),
        "a window": ((1, 1, 1, 150, 300, 8), {"window_size": (20, 3), "q_offset": 140, **half}),
        "lengths": ((2, 1, 1, 140, 150, 8), {
            "q_lengths": torch.tensor([20, 140]), "kv_lengths": torch.tensor([150, 9])}),
        "bias, mask and sinks": ((1, 2, 1, 130, 34, 8), {
            "bias": draw(1, 2, 130, 34, seed=1), "sinks": draw(2, seed=2), "mask": draw(1, 1, 130, 34, seed=3) > -1,
            **half}),
        "key mask and segments": ((1, 1, 1, 40, 40, 8), {
            "mask": draw(1, 40, seed=4) > 0, "softcap": 3.0, "q_segment_ids": torch.arange(40)[None] // 15,
            "kv_segment_ids": torch.arange(40)[None] // 15}),
        "dk and dv in two passes": ((1, 1, 1, 12, 34, 136), {"is_causal": True, "q_offset": 22, **half}),
    }  # fmt: skip
    found, once, empty = {}, plans.draws_once, launches._empty
    for name, ((b, h, hk, i, j, d), options) in calls.items():
        dtype = options.pop("dtype", torch.float32)
        inputs = {"q": draw(b, h, i, d), "k": draw(b, hk, j, d, seed=5), "v": draw(b, hk, j, d, seed=6)}
        inputs = {what: x.to(dtype).requires_grad_() for what, x in inputs.items()}
        inputs |= {what: options.pop(what).requires_grad_() for what in ("bias", "sinks") if what in options}

        def both_ways(implementation: str, inputs: Any = inputs, options: Any = options) -> tuple[torch.Tensor, ...]:
            out, lse = attend(
                **inputs, **options, dropout=0.3, dropout_seed=99, implementation=implementation, return_lse=True
            )
            gradients = torch.autograd.grad(out, tuple(inputs.values()), draw(*out.shape, seed=7).to(out.dtype))
            return out.detach(), lse.detach().clamp(min=-99), *gradients

        results = []
        for takes, filled in ((2.0, 0), (1.0, -1), (sizes.HELD, -1)):  # of the memory of the inputs
            plans.plan.cache_clear()
            triton._plan.cache_clear()
            plans.draws_once = lambda _, share=1.0, takes=takes: takes <= share
            launches._empty = lambda *x, filled=filled: empty(*x).fill_(filled) if x[2] == torch.int32 else empty(*x)
            results.append(both_ways("triton"))
        with torch.no_grad():  # what is kept is for a way back
            alone = attend(**inputs, **options, dropout=0.3, dropout_seed=99, implementation="triton")
        plans.draws_once, launches._empty = once, empty
        pairs = [pair for other in results[1:] for pair in zip(results[0], other, strict=True)]
        same = all(torch.equal(x, y) for x, y in [(results[0][0], alone), *pairs])
        others = both_ways("einsum")
        off = max((x.float() - y.float()).abs().max() / y.abs().max() for x, y in zip(results[0], others, strict=True))
        found[name] = "ok" if same and off < (1e-5 if dtype == torch.float32 else 5e-3) else f"same: {same}, off: {off}"
    return found


@language.jit
def _tanh_of(x, y, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(y + lanes, tiles._tanh(tl.load(x + lanes), 0.25, 3.0))


def softcap() -> dict[str, Any]:
    """tanh's largest error of itself, beside NumPy's, and what comes of numbers that are none; then calls of a few keys
    whose logits are so small that an ulp of the cap shows.
    """
    found: dict[str, Any] = {}
    for name, (least, most) in {"small": (1e-6, tiles.SMALL), "large": (tiles.SMALL, 20.0)}.items():
        x = torch.linspace(least, most, 2**12) * torch.tensor([1.0, -1.0]).repeat(2**11)
        y, true = torch.empty_like(x), 3 * np.tanh(x.double().numpy())
        _tanh_of[1,](4 * x, y, x.numel())
        found[name] = float(np.abs(y.numpy() / true - 1).max())
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e38, -1e-38, 2.0])
    y = torch.empty_like(x)
    _tanh_of[1,](x, y, 8)
    found["edges"] = [str(round(n, 4)) for n in y.tolist()]
    for name, finer in {"plain": "", "a finer bias": "bias", "finer sinks": "sinks"}.items():
        random = np.random.default_rng(12)
        q, k, v, cotangent = (round_to(random.standard_normal((1, 2, n, 16)), "bfloat16") for n in (15, 8, 8, 15))
        more = {"bias": (1, 2, 15, 8), "sinks": (2,)}
        has = {x: random.standard_normal(shape).astype(np.float32) for x, shape in more.items() if x == finer}
        problem = Problem(
            {"q": q, "k": k, "v": v, "softcap": 50.0, **has},
            dict.fromkeys("qkv", "bfloat16") | dict.fromkeys(has, "float32"),
            cotangent, random.standard_normal((1, 2, 15)).astype(np.float32), "contiguous",
        )  # fmt: skip
        try:
            compare.check(bridge.evaluate(problem, "triton"), problem)
            found[name] = "ok"
        except compare.Mismatch as mismatch:
            found[name] = str(mismatch)
    return found


def in_torch() -> dict[str, str]:
    """What surrounds the kernels in torch, against einsum."""
    q, k, v = (draw(2, 2, 20, 8, seed=n).requires_grad_() for n in range(3))
    sinks, bias = draw(2, seed=4).requires_grad_(), draw(1, 2, 20, 20, seed=5).requires_grad_()

    def near(got: Any, expected: Any) -> str:
        try:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        except AssertionError as error:
            return str(error)
        return "ok"

    def both(function: Callable[[str], Any]) -> str:
        return near(function("triton"), function("einsum"))

    def gradients(function: Callable[..., Any], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(function(*inputs).sin().sum(), inputs)

    found = {"vmap": both(lambda name: torch.func.vmap(
        torch.func.grad(lambda x: attend(x[None], k[:1], v[:1], is_causal=True, implementation=name).sin().sum())
    )(q.detach()))}  # fmt: skip

    def call(name: str) -> Callable[..., torch.Tensor]:
        def function(*x: torch.Tensor) -> torch.Tensor:
            return attend(*x[:3], sinks=x[3], bias=x[4], is_causal=True, implementation=name)

        return function

    mask = torch.arange(20)[None] % 3 > 0
    far = [torch.tensor(2**40), torch.tensor([2**30 - 1, -(2**40)])]
    rules: list[dict[str, Any]] = [{"is_causal": True}, {"window_size": (7, 3)}]
    found["a key mask, far off"] = both(lambda name: [
        attend(q, k, v, mask=mask, q_offset=at, return_lse=True, implementation=name, **rule)
        for at in far for rule in rules])  # fmt: skip
    compiled = torch.compile(call("triton"), fullgraph=True, backend="aot_eager")
    inputs = (q, k, v, sinks, bias)
    found["compiled"] = near(compiled(*inputs), call("einsum")(*inputs))
    found["compiled gradients"] = near(gradients(compiled, *inputs), gradients(call("einsum"), *inputs))
    found["expanded"] = both(lambda name: gradients(
        lambda q, k: attend(q, k[:1].expand(2, -1, -1, -1), v, implementation=name), q, k))  # fmt: skip
    found["last axis not contiguous"] = both(lambda name: gradients(
        lambda q, k: attend(q, k.mT.contiguous().mT, v, implementation=name), q, k))  # fmt: skip
    traced = make_fx(lambda *x: gradients(call("triton"), *x), tracing_mode="fake")(*inputs)
    found["traced"] = near(traced(*inputs), gradients(call("einsum"), *inputs))
    with FakeTensorMode() as fake:
        shapes = [fake.from_tensor(x) for x in inputs]
        kinds = [(type(x), x.shape, x.dtype) for x in (call("triton")(*shapes), *gradients(call("triton"), *shapes))]
    found["fake tensors"] = "ok" if kinds == [(FakeTensor, x.shape, x.dtype) for x in (q, *inputs)] else str(kinds)
    sizes = (4, 200), (2, 200), (2, 40)
    wide = [draw(1, heads, 20, size, seed=heads + size).half().requires_grad_() for heads, size in sizes]
    options: dict[str, Any] = {"is_causal": True, "dropout": 0.2, "dropout_seed": 7, "softcap": 5.0}
    ours, others = (gradients(partial(attend, **options, implementation=name), *wide) for name in ("triton", "einsum"))
    off = max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(ours, others, strict=True))
    found["dk and dv in two passes"] = "ok" if off < 2e-3 else f"{off} of the largest"
    data = (q, k, v, None, bias, None, None, None, None, None, sinks, None, None, 0, 0, 0.5, None, 0.0, True)
    torch.library.opcheck(torch.ops.attend_torch.triton.default, data, test_utils=("test_schema", "test_faketensor"))
    found["operator"] = "ok"
    first = torch.autograd.grad(attend(q, k, v, implementation="triton").sum(), q, create_graph=True)[0]
    try:
        first.sum().backward()
        found["second derivative"] = "it gave one"
    except RuntimeError as error:
        found["second derivative"] = str(error)
    return found


def coarse_sinks(*names: str) -> dict[str, Any]:
    """The verdict of each, by triton; by FlashAttention's package, which is stood in for; there, what is wrong where no
    row is made anew; and how far dsinks of packed sequences is off where few rows count.
    """
    import pytest
    import triton.language as tl

    import flash_fakes
    from attend_shared.kernels import sinks as kernels

    ids = torch.tensor([[2, 2, 2, 0, 0, 1, 1, 1, 1, 1, 1, 1]])
    q, k, v, dout = (draw(1, heads, 12, 16, seed=n) for n, heads in enumerate((4, 2, 2, 4)))
    given = [(x * size).bfloat16() for x, size in ((q, 9), (k, 1), (v, 1), (torch.tensor([5.0, -9.0, 20.0, 0.5]), 1))]
    dout[:, :, :9] = 0

    def dsinks_of(name: str, dtype: torch.dtype) -> torch.Tensor:
        q, k, v, sinks = (x.to(dtype).requires_grad_() for x in given)
        options = {"sinks": sinks, "q_segment_ids": ids, "window_size": (4, 2), "implementation": name}
        return torch.autograd.grad(attend(q, k, v, **options), sinks, dout.bfloat16().to(dtype))[0].double()

    of_triton = run_cases(*names)
    with pytest.MonkeyPatch.context() as patch:
        flash_fakes.install(patch, interpreted=True)
        ours, theirs = dsinks_of("fa4", torch.bfloat16), dsinks_of("einsum", torch.float64)
        verdicts = {name: run_case(name, "fa4") for name in names}
        patch.setattr(kernels, "FEW", tl.constexpr(0))
        coarse = {name: run_case(name, "fa4").partition(" ")[0] for name in names}
    off = ((ours - theirs).abs() / theirs.abs()).tolist()
    return {"triton": of_triton, "anew": verdicts, "coarse": coarse, "segments": off}


def lse_in_jax() -> dict[str, str]:
    """The verdicts of calls in JAX by FlashAttention's packages, which are stood in for, with a cotangent of lse; of
    packed sequences and lengths, by how much of its largest value a result is off.
    """
    import jax
    import jax.numpy as jnp
    import pytest

    import attend_jax
    import flash_fakes
    from attend_jax import bridge

    packed: dict[str, dict[str, Any]] = {
        "segments": {"q_segment_ids": np.array([[2, 2, 2, 0, 0, 1, 1, 1, 1]]), "is_causal": True},
        "lengths": {"q_lengths": np.array([5]), "kv_lengths": np.array([7])},
    }

    def results(name: str, dtype: Any, options: dict[str, Any]) -> list[np.ndarray]:
        given = (jnp.asarray(draw(1, h, 9, 16, seed=n).numpy(), jnp.float16) for n, h in enumerate((4, 2, 2, 4)))
        q, k, v, dout = (x.astype(dtype) for x in given)
        (out, lse), pull = jax.vjp(partial(attend_jax.attend, return_lse=True, implementation=name, **options), q, k, v)
        dlse = jnp.cos(jnp.arange(lse.size, dtype=lse.dtype)).reshape(lse.shape)
        return [np.asarray(x, np.float64) for x in (out, jnp.exp(lse), *pull((dout, dlse)))]

    verdicts = {}
    with pytest.MonkeyPatch.context() as patch:
        flash_fakes.install(patch, interpreted=True)
        for name, *without in (("fa4", "softcap", "sinks"), ("fa3", "softcap", "lengths")):
            for case in flash_fakes.some(12, *without):
                if "lse" in case.levels:
                    problem, verdict = case.build(), "ok"
                    try:
                        compare.check(bridge.evaluate(problem, name), problem)
                    except compare.Mismatch as mismatch:
                        verdict = str(mismatch)
                    verdicts[f"{name} {case.name}"] = verdict
            for which, options in packed.items():
                if which not in without:
                    pairs = zip(*(results(*it, options) for it in ((name, jnp.float16), ("einsum", jnp.float32))),
                                strict=True)  # fmt: skip
                    off = max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)
                    verdicts[f"{name} {which}"] = "ok" if off < 0.002 else f"{off}"
    return verdicts


TASKS: dict[str, Callable[..., Any]] = {
    "cases": run_cases, "visits": visits, "whole": whole, "packed": lambda: packed() | ordered(), "spans": spans,
    "left": left,
    "drawn": drawn,
    "torch": in_torch, "biases": biases, "huge": huge, "exact": exact, "softcap": softcap, "sinks": coarse_sinks,
    "lse": lse_in_jax,
}  # fmt: skip

if __name__ == "__main__":
    answer = TASKS[sys.argv[1]](*sys.argv[2:])
    sys.stdout.write(json.dumps(answer))

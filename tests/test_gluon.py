"""The kernels in Gluon, for compute capability 9.0: which calls they take, how they are launched, that they compile.

No interpreter runs them; that they are right is shown on a GPU: docs/kernel-notes.md.
"""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import pytest
import torch

from attend_jax import gluon
from attend_jax.arrays import FRAMEWORK as JAX
from attend_jax.implementations import triton as jax_triton
from attend_shared.call import Arrays, Call, canonical, check
from attend_shared.kernels import gluon_plan
from attend_shared.kernels import plan as plans
from attend_shared.kernels.launch import Launch, Layout
from attend_torch import launches
from attend_torch.implementations import blockwise as torch_blockwise
from attend_torch.implementations import triton
from compiling import LONG, call_of

ROWS64 = {name: x[..., :64] for name, x in LONG.items()}


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({}, "plain"),
        ({"is_causal": True}, "plain"),
        ({"k": LONG["k"][:, :2], "v": LONG["v"][:, :2]}, "plain"),
        ({"window_size": (None, 5)}, "plain"),
        ({"window_size": (500, 10)}, "forward"),
        ({"window_size": (500, 11)}, "plain"),
        ({"window_size": (5, None)}, "plain"),
        ({"softcap": 3.0}, "plain"),
        ({"softcap": 50.0, "window_size": (500, 11)}, "plain"),
        ({"softcap": 51.0}, "forward"),  # the chip's own tanh is too coarse for it,
        ({"softcap": 3.0, "return_lse": True}, "forward"),  # for lse in float32,
        ({"softcap": 3.0} | {name: x.half() for name, x in LONG.items()}, "forward"),  # and for float16
        ({"scale": -1.0}, "forward"),
        ({"sinks": torch.empty(4, device="meta")}, "forward"),
        ({"mask": torch.empty(2, 2048, dtype=torch.bool, device="meta")}, "forward"),
        ({"kv_lengths": torch.empty(2, dtype=torch.int64, device="meta")}, "forward"),
        ({"q_segment_ids": torch.empty(2, 2048, dtype=torch.int32, device="meta")}, "forward"),  # how short rows are?
        ({"dropout": 0.1, "dropout_seed": 1}, "forward"),
        ({"q_offset": 5, "is_causal": True}, "forward"),  # which is data in JAX
        ({"q": LONG["q"][:, :, :200], "q_offset": 0, "is_causal": True}, "plain"),
        ({"q": LONG["q"][:, :, :200], "q_offset": 1848, "is_causal": True}, "plain"),
        ({"q": LONG["q"][:, :, :100], "q_offset": 0}, "forward"),
        ({name: x[:, :, :-1] for name, x in LONG.items()}, "forward"),
        ({name: x[:, :, :1024] for name, x in LONG.items()}, "plain"),
        ({name: x[:, :, :896] for name, x in LONG.items()}, "forward"),
        ({name: x[..., :96] for name, x in LONG.items()}, "forward"),
        ({name: x.float() for name, x in LONG.items()}, "forward"),
        ({name: x.half() for name, x in LONG.items()}, "plain"),
        (ROWS64, "narrow"),
        (ROWS64 | {"is_causal": True}, "narrow"),
        (ROWS64 | {"is_causal": True, "sinks": torch.empty(4, dtype=torch.bfloat16, device="meta")}, "narrow"),
        (ROWS64 | {"sinks": torch.empty(4, device="meta")}, "narrow"),
        (ROWS64 | {"sinks": torch.empty(4, dtype=torch.float64, device="meta")}, "forward"),
        (ROWS64 | {"k": ROWS64["k"][:, :2], "v": ROWS64["v"][:, :2]}, "narrow"),
        (ROWS64 | {"window_size": (None, 5)}, "narrow"),
        (ROWS64 | {"window_size": (5, 0)}, "forward"),
        (ROWS64 | {"softcap": 3.0}, "forward"),
        (ROWS64 | {"kv_lengths": torch.empty(2, dtype=torch.int64, device="meta")}, "forward"),
        (ROWS64 | {"q": ROWS64["q"][:, :, :200], "q_offset": 1848, "is_causal": True}, "narrow"),
        (ROWS64 | {"q": ROWS64["q"][:, :, :191], "q_offset": 0}, "forward"),
        ({name: x[:, :, :-1] for name, x in ROWS64.items()}, "forward"),
        ({name: x[:, :, :1024] for name, x in ROWS64.items()}, "forward"),
        ({name: x.half() for name, x in ROWS64.items()}, "narrow"),
        ({name: x.float() for name, x in ROWS64.items()}, "forward"),
    ],
)
def test_what_the_kernel_of_compute_capability_9_takes(options: dict[str, Any], kernel: str) -> None:
    call = call_of(**LONG | options)
    x = (call.h * call.i * call.d, call.i * call.d, call.d)
    at = options.get("q_offset", 0)
    for layout, name in ((Layout(x, x, x, at=at, gluon=True), kernel), (Layout(x, x, x, at=at), "forward")):
        names = [each.kernel for each in plans.plan(call, layout).forward]
        assert [each for each in names if each in ("forward", "plain", "narrow")] == [name]


@pytest.mark.parametrize(
    ("capability", "release", "runs"),
    [("9.0", "3.6.0", True), ("9.0", "3.6.1", True), ("9.0", "3.7.0", False), ("9.0", "3.5.1", False),
     ("10.0", "3.6.0", False), ("8.0", "3.6.0", False), ("9.0", None, False)],
)  # fmt: skip
def test_where_the_kernel_of_compute_capability_9_runs(
    capability: str, release: str | None, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the release of Triton that it was proved with: Gluon changes from one to the next."""

    def version(name: str) -> str:
        if release is None:
            raise PackageNotFoundError(name)
        return release

    monkeypatch.setattr(gluon_plan, "version", version)
    assert gluon_plan.runs_gluon.__wrapped__(capability) == runs


def test_where_an_array_lies_does_not_decide_which_kernel_it_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bits would hang on it. Rows that do not begin at multiples of 16 bytes are copied, and nothing else is."""
    monkeypatch.setattr(triton, "capability", lambda: "9.0")
    rows = torch.randn(1, 2, 2048, 136).bfloat16()
    k = rows[..., :128]
    odd = torch.empty(k.numel() + 1, dtype=k.dtype)[1:].view(k.shape).copy_(k)
    for view, copied in (
        (k, False), (k[:, :1].expand(-1, 2, -1, -1), False), (k.transpose(1, 2).contiguous().transpose(1, 2), False),
        (odd, True), (rows[..., 1:129], True), (torch.empty(1, 2, 2048, 130).bfloat16()[..., :128].copy_(k), True),
        (k[:, :, :1].expand(-1, -1, 2048, -1), True),
    ):  # fmt: skip
        call = call_of(q=k, k=view, v=view)
        plan, known = triton._prepare(call, canonical(call, Arrays(k, view, view)))
        assert plan.forward[-1].launch.kernel == "plain"
        assert torch.equal(known["k"], view)
        assert (known["k"].data_ptr() != view.data_ptr()) == copied
        assert known["k"].data_ptr() % 16 == 0
        blocks = plan.forward[-1].launch.blocks["k"]
        heads = 1 if known["k"].stride(1) == 0 else 2
        assert blocks.shape == (1, heads, 2048, 128)
        assert torch.equal(known["k"].as_strided(blocks.shape, blocks.strides).expand(view.shape), view)


def test_a_bias_that_a_descriptor_cannot_load_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way back, as rows of q, k and v are: how it lies does not decide which kernel makes dk and dv."""
    monkeypatch.setattr(triton, "capability", lambda: "9.0")
    x = torch.zeros(1, 16, 1024, 64, dtype=torch.bfloat16)
    rows = torch.randn(2, 1024, 1032).bfloat16()
    bias = rows[:, None, :, :1024]
    for view, copied in (
        (bias, False), (bias[:1], False), (bias.transpose(2, 3), True), (rows[:, None, :, 1:1025], True),
        (bias[:, :, :1].expand(-1, -1, 1024, -1), True),
    ):  # fmt: skip
        q = x.expand(len(view), -1, -1, -1)
        call = call_of(q=q, k=q, v=q, bias=view)
        arrays = canonical(call, Arrays(q, q, q, bias=view))
        assert triton._prepare(call, arrays)[1]["bias"] is arrays.bias
        plan, known = triton._prepare(call, arrays, back=True)
        launches = [each.launch for each in plan.backward(q.stride()[:3], False, False, False)]
        (launch,) = (each for each in launches if each.kernel == "long_key_gradients")
        assert torch.equal(known["bias"], view)
        assert (known["bias"].data_ptr() != view.data_ptr() or known["bias"].stride() != view.stride()) == copied
        blocks = launch.blocks["bias"]
        assert blocks.shape == (len(view), 1, 1024, 1024)
        assert torch.equal(known["bias"].as_strided(blocks.shape, blocks.strides), view)


@pytest.mark.parametrize(("at", "kernel"), [(0, "plain"), (1848, "plain"), (5, "forward")])
def test_a_compiled_call_gets_the_same_kernel(at: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told a number where the eager call has a word for it."""
    monkeypatch.setattr(triton, "capability", lambda: "9.0")
    q, k = torch.zeros(1, 2, 200, 128, dtype=torch.bfloat16), torch.zeros(1, 1, 2048, 128, dtype=torch.bfloat16)
    eager = call_of(q=q, k=k, v=k, q_offset=at, is_causal=True)
    given = Arrays(q, k, k)
    compiled = torch_blockwise.canonical(given, None, 0, at, eager.scale, None, 0.0)
    for call, arrays in ((eager, canonical(eager, given._replace(q_offset=at))), compiled):
        plan, _ = triton._prepare(call._replace(platform="cuda"), arrays)
        assert plan.forward[-1].launch.kernel == kernel


@pytest.mark.parametrize(("return_lse", "kernel"), [(False, "plain"), (True, "forward")])
def test_a_compiled_call_is_told_whether_lse_is_wanted(
    return_lse: bool, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a softcap the kernel hangs on it, and out's bits on the kernel."""
    monkeypatch.setattr(triton, "capability", lambda: "9.0")
    x = torch.zeros(1, 2, 2048, 128, dtype=torch.bfloat16)
    eager = call_of(q=x, k=x, v=x, softcap=30.0, return_lse=return_lse)
    given = Arrays(x, x, x)
    compiled = triton._canonical(given, None, None, None, eager.scale, 30.0, 0.0, return_lse)
    for call, arrays in ((eager, canonical(eager, given)), compiled):
        plan, _ = triton._prepare(call._replace(platform="cuda"), arrays)
        assert plan.forward[-1].launch.kernel == kernel


def plain_launch(**options: Any) -> tuple[Call, Launch]:
    call = call_of(**LONG | options)
    x = (4 * 2048 * 128, 2048 * 128, 128)
    return call, plans.plan(call, Layout(x, x, x, gluon=True)).forward[-1]


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"window_size": (600, 0)}, {"softcap": 30.0}],
    ids=["full", "causal", "window", "softcap"],
)
def test_the_kernel_of_compute_capability_9_compiles_in_jax(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups of warps that compute, and one that loads, which jaxlib is told of."""
    monkeypatch.setattr(gluon_plan, "PERSISTENT", 32)
    plans.plan.cache_clear()
    call, launch = plain_launch(**options)
    plans.plan.cache_clear()
    assert launch.constants["EACH"] == 4
    assert launch.grid == (16, 2, 1)
    made = gluon.compiled(launch, [call.dtype] * 3 + [output.dtype for output in launch.outputs])
    assert made.warps == 12
    assert made.shared <= 227 * 1024
    for instruction in ("wgmma.mma_async", "setmaxnreg", "cp.async.bulk.tensor.4d"):
        assert instruction in made.ptx
    assert ("tanh.approx.f32" in made.ptx) == ("softcap" in options)
    assert made.boxes == ((3, (1, 1, 64, 64)), *((3, (1, 1, 128, 64)),) * 2)
    arguments = made.ptx.partition(".visible .entry plain(")[2].partition(")")[0].count(".param")
    # each descriptor has its sizes behind it, and jaxlib adds two for scratch memory
    assert arguments == len(launch.inputs) + 3 * 8 + len(launch.numbers) + len(launch.outputs) + 2


@pytest.mark.parametrize("sinks", [None, torch.float32], ids=["none", "sinks"])
def test_the_kernel_of_rows_of_64_compiles_in_jax(sinks: torch.dtype | None) -> None:
    """Three groups of warps that compute, and one that loads; what is finer than out is stored beside it."""
    given = {} if sinks is None else {"sinks": torch.empty(4, dtype=sinks, device="meta")}
    call = call_of(**ROWS64 | given)
    x = (4 * 2048 * 64, 2048 * 64, 64)
    launch = plans.plan(call, Layout(x, x, x, gluon=True)).forward[-1]
    dtypes = [call.dtype] * 3 + ["float32" if sinks else call.dtype]
    made = gluon.compiled(launch, dtypes + [output.dtype for output in launch.outputs])
    assert made.warps == 16
    assert made.shared <= 227 * 1024
    assert made.boxes == ((3, (1, 1, 64, 64)), *((3, (1, 1, 128, 64)),) * 2)
    for instruction in ("wgmma.mma_async", "setmaxnreg", "cp.async.bulk.tensor.4d", "cvt.rn.bf16x2.f32"):
        assert instruction in made.ptx
    arguments = made.ptx.partition(".visible .entry narrow(")[2].partition(")")[0].count(".param")
    assert arguments == 4 + 3 * 8 + len(launch.numbers) + len(launch.outputs) + 2


@pytest.mark.parametrize(("causal", "high"), [(False, 2**30), (True, 0)])
def test_one_kernel_of_rows_of_64_serves_full_and_causal_calls(causal: bool, high: int) -> None:
    call = call_of(**ROWS64, is_causal=causal)
    x = (4 * 2048 * 64, 2048 * 64, 64)
    launch = plans.plan(call, Layout(x, x, x, gluon=True)).forward[-1]
    assert launch.numbers[-2] == high
    assert launch.grid == (88, 1, 1)  # tiles: fewer than multiprocessors
    assert launch.blocks["q"].block == (1, 1, 64, 64)


@pytest.mark.parametrize(
    ("heads", "length", "high", "together"),
    [(64, 4096, 0, 16), (128, 2048, 0, 32), (16, 16384, 0, 16), (64, 4096, 2**30, 2), (4096, 4096, 0, 16)],
    ids=["many heads", "short rows", "long rows", "full", "very many"],
)
def test_shares_of_programs_are_alike(heads: int, length: int, high: int, together: int) -> None:
    blocks = -(-length // gluon_plan.NARROW.queries)
    assert gluon_plan._neighbours(heads, blocks, length, high) == together


def biases(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def keys_launches(one_id: bool = True, **options: Any) -> tuple[Call, list[Launch]]:
    """A call, and what makes its dk and dv."""
    call = call_of(**MANY | options)
    x, at = (call.h * call.i * call.d, call.i * call.d, call.d), options.get("q_offset", 0)
    bias = triton._strides(options.get("bias"))
    plan = plans.plan(call, Layout(x, x, x, bias=bias, at=at, one_id=one_id, gluon=True))
    found = plan.backward(x, False, False, False)
    launches = [each for each in found if each.kernel.endswith("key_gradients")]
    of_segments = [len(launches) == 2] if call.segments else []
    assert [*of_segments, *("key_order" in each.inputs for each in launches)].count(True) in (0, 2)
    assert ("find_runs" in [each.kernel for each in found]) == (len(launches) == 2)
    return call, launches


MANY = {name: torch.empty(2, 4, 2048, 128, dtype=torch.bfloat16, device="meta") for name in "qkv"}


IDS = torch.empty(2, 4096, dtype=torch.int32, device="meta")


MANY64 = {name: torch.empty(2, 4, 4096, 64, dtype=torch.bfloat16, device="meta") for name in "qkv"}


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, True),
        ({"is_causal": True}, True),
        ({"is_causal": True, "q": MANY["q"][:, :, :1023], "q_offset": 0}, False),  # few a key
        ({"is_causal": True, "q": MANY["q"][:, :, :1023], "q_offset": 1025}, False),
        ({"is_causal": True, "q": MANY["q"][:, :, :1024], "q_offset": 0}, True),
        ({"q": MANY["q"][:, :, :512], "q_offset": 0}, True),
        ({"q": MANY["q"][:, :, :512], "q_offset": 1536}, True),
        ({"is_causal": True, "q_offset": 5}, False),  # which is data in JAX
        ({"q": MANY["q"][:, :, :511], "q_offset": 0}, False),
        ({"window_size": (1023, 0)}, True),
        ({"window_size": (1022, 0)}, False),
        ({"window_size": (None, 5)}, True),
        ({name: x[:, :, :1999] for name, x in MANY.items()}, True),
        ({"k": MANY["k"][:, :, :1152], "v": MANY["v"][:, :, :1152], "q_offset": 0}, True),  # 72 tiles
        ({"k": MANY["k"][:, :, :1024], "v": MANY["v"][:, :, :1024], "q_offset": 0}, False),  # 64
        (
            {
                name: torch.empty(2, 64, 1024 if name == "q" else 127, 128, dtype=torch.bfloat16, device="meta")
                for name in "qkv"
            }
            | {"q_offset": 0},
            False,
        ),
        ({"scale": -1.0}, True),
        ({"sinks": torch.empty(4, dtype=torch.float64, device="meta")}, True),
        ({name: x.half() for name, x in MANY.items()}, True),
        ({name: x.float() for name, x in MANY.items()}, False),
        (MANY64, True),
        (MANY64 | {"is_causal": True}, True),
        (MANY64 | {"window_size": (2047, 0)}, True),
        (MANY64 | {"window_size": (2046, 0)}, False),
        ({name: x[:, :, :4000] for name, x in MANY64.items()} | {"is_causal": True}, True),
        ({name: x[..., :96] for name, x in MANY.items()}, False),
        ({"v": MANY["v"][..., :64]}, False),
        ({"softcap": 3.0}, False),
        ({"dropout": 0.1, "dropout_seed": 1}, False),
        ({"mask": torch.empty(2, 2048, dtype=torch.bool, device="meta")}, False),
        ({"bias": torch.empty(1, 4, 2048, 2048, device="meta")}, False),
        ({"scale": -1.0, "is_causal": True}, False),  # what is cut would be +inf,
        ({"scale": 0.0, "is_causal": True}, False),  # or NaN
        ({"bias": biases(2, 4, 2048, 2048)}, False),  # of rows of 128
        (MANY64 | {"bias": biases(2, 4, 4096, 4096)}, True),
        (MANY64 | {"bias": biases(1, 4, 4096, 4096).half(), "is_causal": True, "scale": -1.0}, True),
        (MANY64 | {"bias": biases(2, 1, 4096, 4096), "sinks": torch.empty(4, device="meta")}, True),
        (MANY64 | {"bias": biases(2, 4, 4096, 4096).float()}, False),
        (MANY64 | {"bias": biases(2, 4, 1, 4096)}, False),
        ({name: x[:, :, :4092] for name, x in MANY64.items()} | {"bias": biases(2, 4, 4092, 4092)}, False),
        (MANY64 | {"bias": biases(2, 4, 4096, 4096), "softcap": 3.0}, False),
        (MANY64 | {"bias": biases(2, 4, 4096, 4096), "q_segment_ids": IDS}, False),
        ({"kv_lengths": torch.empty(2, dtype=torch.int64, device="meta")}, False),
        ({"q_lengths": torch.empty(2, dtype=torch.int64, device="meta")}, False),
        ({"q_segment_ids": torch.empty(2, 2048, dtype=torch.int32, device="meta")}, False),  # 64 programs
    ],
)
def test_which_keys_have_a_kernel_of_compute_capability_9(options: dict[str, Any], taken: bool) -> None:
    call, launches = keys_launches(**options)
    assert [each.kernel for each in launches] == ["long_key_gradients" if taken else "key_gradients"]
    x = (call.h * call.i * call.d, call.i * call.d, call.d)
    bias = triton._strides(options.get("bias"))
    elsewhere = plans.plan(call, Layout(x, x, x, bias=bias, at=options.get("q_offset", 0)))
    elsewhere = elsewhere.backward(x, False, False, False)
    assert "key_gradients" in [each.kernel for each in elsewhere]


@pytest.mark.parametrize(
    ("options", "one_id", "both"),
    [
        ({}, True, True),
        ({"is_causal": True}, True, True),
        ({"window_size": (1023, 0)}, True, True),
        ({"window_size": (1022, 0)}, True, False),
        ({"is_causal": True}, False, False),
        ({"q_lengths": torch.empty(1, dtype=torch.int64, device="meta")}, True, False),
        ({"softcap": 3.0}, True, False),
        ({"scale": -1.0}, True, False),  # what is cut would be +inf
        ({"is_causal": True, "lengths": 4100}, True, True),  # dq by Triton's kernel
        ({"lengths": 3968}, True, True),
        ({"lengths": 2047}, True, False),
        ({"heads": 4}, True, True),
        ({"heads": 1}, True, False),
    ],
)
def test_dk_and_dv_of_segments_have_two_kernels_one_of_which_makes_them(
    options: dict[str, Any], one_id: bool, both: bool
) -> None:
    """Which of them, the device finds out: the second writes where the first did, or might have."""
    n, hk = options.get("lengths", 4096), options.get("heads", 16)
    q, k = (torch.empty(1, heads, n, 128, dtype=torch.bfloat16, device="meta") for heads in (16, hk))
    ids = torch.empty(1, n, dtype=torch.int64, device="meta")
    options = {name: x for name, x in options.items() if name not in ("lengths", "heads")}
    _, launches = keys_launches(one_id, q=q, k=k, v=k, q_segment_ids=ids, **options)
    assert [each.kernel for each in launches] == ["key_gradients", "long_key_gradients"][: 1 + both]
    first = launches[0]
    assert first.constants["RUNS"] == ("runs" in first.inputs) == both
    assert first.in_place == {}
    if both:
        second = launches[1]
        assert second.outputs == first.outputs
        assert second.in_place == {second.inputs.index("dk"): 0, second.inputs.index("dv"): 1}
        assert 120 <= second.grid[0] <= gluon_plan.PERSISTENT
        assert hk * -(-n // 128) % second.grid[0] == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "q": MANY["q"].repeat(1, 2, 1, 1)},
        MANY64 | {"window_size": (2047, 0)},
        "documents",
        MANY64 | {"bias": biases(1, 4, 4096, 4096), "is_causal": True},
    ],
    ids=["full", "causal, grouped heads", "rows of 64", "documents", "bias"],
)
def test_the_kernel_of_keys_compiles_in_jax(options: Any, tmp_path: Path) -> None:
    """Two groups of warps that compute, and one that loads; and ptxas lets products run beside all else."""
    import triton as language

    call, (*_, launch) = keys_launches(**DOCUMENTS | {"is_causal": True} if options == "documents" else options)
    assert launch.kernel == "long_key_gradients"
    dtypes = {"known": "float32"} | dict.fromkeys(("spans", "key_order", "runs"), "int32")
    made = gluon.compiled(launch, [dtypes.get(name or "", call.dtype) for name in (*launch.inputs, "dk", "dv")])
    assert made.warps == 12
    assert made.shared <= 227 * 1024
    biased = "bias" in launch.inputs
    assert made.boxes == (*((3, (1, 1, 64, 64)),) * 4, (0, (1, 64, 4)), *((3, (1, 1, 64, 64)),) * biased)
    assert ("ldmatrix.sync.aligned.m8n8.x4.trans" in made.ptx) == biased  # keys are its rows in registers
    arguments = made.ptx.partition(".visible .entry long_key_gradients(")[2].partition(")")[0].count(".param")
    numbers = [x for x in launch.numbers if x != 1]
    assert arguments == len(launch.inputs) + (4 + biased) * 8 + 6 + len(numbers) + len(launch.outputs) + 2
    tool = Path(language.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    (tmp_path / "x.ptx").write_text(made.ptx)
    command = [tool, "-v", "--gpu-name=sm_90a", tmp_path / "x.ptx", "-o", tmp_path / "x.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "Used" in said
    assert "serialized" not in said


@pytest.mark.parametrize("costs", [[66 - 2 * n for n in range(32)], [18 - 2 * n for n in range(8)], [66] * 32])
@pytest.mark.parametrize("heads", [16, 64])
def test_programs_have_shares_of_keys_that_are_alike(heads: int, costs: list[int]) -> None:
    programs, together = gluon_plan._shares(heads, costs)
    order = [cost for first in range(0, heads, together) for cost in costs for _ in range(min(together, heads - first))]
    turns = [order[n : n + programs] for n in range(0, len(order), programs)]
    share = [sum(t[n] if k % 2 == 0 else t[programs - 1 - n] for k, t in enumerate(turns)
                 if (n if k % 2 == 0 else programs - 1 - n) < len(t)) for n in range(programs)]  # fmt: skip
    assert sum(share) == heads * sum(costs)
    assert max(share) <= 1.05 * max(sum(share) / gluon_plan.PERSISTENT, max(costs))


def test_a_gradient_that_arrives_where_no_descriptor_reaches_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a sum is, whose strides are all 0; one number for all heads of a row is not."""
    monkeypatch.setattr(triton, "capability", lambda: "9.0")
    q = torch.randn(1, 9, 1024, 128).bfloat16()
    call = call_of(q=q, k=q, v=q)
    ran: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(launches, "run", lambda kernels, known: ran.append((kernels, known)))
    odd = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape).copy_(q)
    for dout, copied in ((q, False), (q[:, :1].expand(-1, 9, -1, -1), False), (odd, True),
                         (q[:1, :1, :1, :1].expand(1, 9, 1024, 128), True)):  # fmt: skip
        ran.clear()
        arrays = canonical(call, Arrays(q, q, q))
        triton._gradients(call, arrays, (q, None, None), dout, None, [False] * 5)
        ((kernels, known),) = ran
        assert torch.equal(known["dout"], dout)
        assert (known["dout"].data_ptr() != dout.data_ptr()) == copied
        (launch,) = (each.launch for each in kernels if each.launch.module == "keys")
        assert launch.blocks["dout"].shape == (1, 1 if dout.stride(1) == 0 and not copied else 9, 1024, 128)
        assert launch.constants["DOH"] == (launch.blocks["dout"].shape[1] > 1)


def fake_jaxlib(**parts: Any) -> SimpleNamespace:
    """What of jaxlib launches kernels, each part giving its arguments back."""

    class Part(tuple):
        def to_proto(self, name: str, _: bytes) -> bytes:
            told.append(self)
            return name.encode()

    return SimpleNamespace(**{
        "TritonKernel": lambda *given: given, "TritonKernelCall": lambda *given: Part(given),
        "create_array_parameter": lambda *given: "array", "create_scalar_parameter": lambda *given: given,
        "create_tma_descriptor_parameter": lambda **given: given,
    } | parts)  # fmt: skip


told: list[Any] = []


def test_what_jaxlib_is_told_of_a_kernel_in_gluon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each parameter that the kernel has, in order: a descriptor with its sizes, and no number that is 1."""
    monkeypatch.setitem(sys.modules, "jaxlib.gpu_triton", fake_jaxlib())
    monkeypatch.setattr(jaxlib, "gpu_triton", sys.modules["jaxlib.gpu_triton"], raising=False)
    assert gluon.available.__wrapped__()
    _, launch = plain_launch(k=LONG["k"][:, :1], v=LONG["v"][:, :1], is_causal=True)
    shapes = {"k": (2, 1, 2048, 128), "v": (2, 1, 2048, 128)}  # what the call has not got is any array
    inputs = [jax.ShapeDtypeStruct(shapes.get(name or "q", (2, 4, 2048, 128)), jnp.bfloat16) for name in launch.inputs]
    outputs = [jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype, _ in launch.outputs]
    told.clear()
    made = jax.jit(lambda *given: gluon.call(launch, given, outputs)).trace(*inputs)
    assert [(x.shape, str(x.dtype)) for x in made.out_info] == [(x.shape, x.dtype) for x in launch.outputs]
    ((kernel, *grid, parameters),) = told
    assert kernel[:4] == ("plain", 12, 1, kernel[3])
    assert grid == [16, 8, 1]
    described = {"elem_type": 9, "swizzle": 3, "shape": [2, 1, 2048, 128], "strides": [1048576, 262144, 128, 1],
                 "block_shape": [1, 1, 128, 64], "oob_fill": 0}  # fmt: skip
    queries = described | {"shape": [2, 4, 2048, 128], "block_shape": [1, 1, 64, 64]}
    of = [(each, *((n, "i32") for n in each["shape"]), *((n, "i64") for n in each["strides"]))
          for each in (queries, described, described)]  # fmt: skip
    scalars = [(n, "fp32" if isinstance(n, float) else "i32") for n in launch.numbers]
    assert parameters == [*of[0], *of[1], *of[2], *["array"] * (len(launch.inputs) - 3), *scalars, *["array"] * 5]


def test_in_jax_the_second_of_two_kernels_has_what_the_first_made_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jaxlib.gpu_triton", fake_jaxlib())
    monkeypatch.setattr(jaxlib, "gpu_triton", sys.modules["jaxlib.gpu_triton"], raising=False)
    _, (first, second) = keys_launches(**DOCUMENTS, is_causal=True)
    asked: list[dict[str, Any]] = []

    def triton_call(*given: Any, out_shape: list[Any], **options: Any) -> list[Any]:
        asked.append(options)
        return [jnp.zeros(x.shape, x.dtype) for x in out_shape]

    monkeypatch.setitem(sys.modules, "jax_triton", SimpleNamespace(triton_call=triton_call))
    kinds = {"known": ((1, 16, 4096, 2, 2), jnp.float32), "spans": ((1, 4096, 2), jnp.int32),
             "bounds": ((1, 256, 4), jnp.int32), "runs": ((1,), jnp.int32), "key_order": ((512,), jnp.int32),
             **dict.fromkeys(("q_segment_ids", "kv_segment_ids"), ((1, 4096), jnp.int32))}  # fmt: skip
    names = {name: None for name in (*first.inputs, *second.inputs) if name not in (None, "dk", "dv")}
    given = [jax.ShapeDtypeStruct(*kinds.get(name or "", ((1, 16, 4096, 128), jnp.bfloat16))) for name in names]

    def gradients(*arrays: Any) -> list[Any]:
        known = dict(zip(names, arrays, strict=True))
        jax_triton.run([first, second], known)
        return [known["dk"], known["dv"]]

    text = jax.jit(gradients).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    (call,) = (line for line in text.splitlines() if "triton_kernel_call" in line)
    for output, operand in enumerate((9, 10)):
        alias = f"output_tuple_indices = [{output}], operand_index = {operand}, operand_tuple_indices = []"
        assert alias in call
    assert asked[0]["input_output_aliases"] == {}


@pytest.mark.parametrize(
    "parts",
    [{"create_tma_descriptor_parameter": None}, {"TritonKernel": lambda name: name}, {"TritonKernelCall": None}],
    ids=["no descriptors", "other arguments", "no calls"],
)
def test_a_jaxlib_without_what_launches_it_takes_the_other_kernel(
    parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jaxlib.gpu_triton", fake_jaxlib(**parts))
    monkeypatch.setattr(jaxlib, "gpu_triton", sys.modules["jaxlib.gpu_triton"], raising=False)
    assert not gluon.available.__wrapped__()
    monkeypatch.setattr(jax_triton, "capability", lambda: "9.0")
    x = jnp.zeros((1, 1, 2048, 128), jnp.bfloat16)
    given = Arrays(x, x, x)
    call = check(JAX, given, False, None, None, None, 0.0, False, "bhnd", None)._replace(platform="cuda")
    for there, kernel in ((False, "forward"), (True, "plain")):
        monkeypatch.setattr(gluon, "available", lambda there=there: there)
        plan, _ = jax_triton._prepare(call, canonical(call, given))
        assert plan.forward[-1].kernel == kernel


DOCUMENTS = {name: torch.empty(1, 16, 4096, 128, dtype=torch.bfloat16, device="meta") for name in "qkv"} | {
    "q_segment_ids": torch.empty(1, 4096, dtype=torch.int64, device="meta")}  # fmt: skip


def dq_of(at: int = 0, **options: Any) -> tuple[Call, Launch]:
    """A call, and what makes its dq."""
    call = call_of(**options)
    x = (call.h * call.i * call.d, call.i * call.d, call.d)
    of_k = (call.hk * call.j * call.d, call.j * call.d, call.d)
    layout = Layout(x, of_k, of_k, at=at, one_id=True, gluon=True)
    found = plans.plan(call, layout).backward(x, True, True, False)
    (launch,) = (each for each in found if "dq" in (output.name for output in each.outputs))
    assert ("order_tiles" in [each.kernel for each in found]) == ("query_order" in launch.inputs)
    return call, launch


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, True),
        ({"is_causal": True}, True),
        ({"window_size": (1023, 0)}, True),
        ({"window_size": (1022, 0)}, False),
        ({"window_size": (None, 5)}, True),
        ({"sinks": torch.empty(4, device="meta")}, True),
        ({"k": LONG["k"][:, :2], "v": LONG["v"][:, :2]}, True),
        ({name: x.half() for name, x in LONG.items()}, True),
        ({name: x.float() for name, x in LONG.items()}, False),
        ({name: x[:, :, :1024] for name, x in LONG.items()}, True),
        ({name: x[:, :, :1024] for name, x in LONG.items()} | {"is_causal": True}, False),
        ({"q": LONG["q"][:, :, :128], "q_offset": 1920, "is_causal": True}, True),
        ({"q": LONG["q"][:, :, :127]}, False),
        ({"q_offset": 5, "is_causal": True}, False),
        ({"softcap": 3.0}, False),
        ({"scale": -1.0}, False),
        ({"kv_lengths": torch.empty(2, dtype=torch.int64, device="meta")}, False),
        (DOCUMENTS, True),
        (DOCUMENTS | {"is_causal": True, "window_size": (1022, 0)}, False),
        (DOCUMENTS | {"q_lengths": torch.empty(1, dtype=torch.int64, device="meta")}, False),
        ({"q_segment_ids": torch.empty(2, 2048, dtype=torch.int32, device="meta")}, False),  # 64 programs
        ({"mask": torch.empty(2, 2048, dtype=torch.bool, device="meta")}, False),
        ({"bias": torch.empty(1, 4, 2048, 2048, dtype=torch.bfloat16, device="meta")}, False),
        ({"dropout": 0.1, "dropout_seed": 1}, False),
        (ROWS64, False),
        (ROWS64 | {"is_causal": True}, False),
        (MANY64 | {"is_causal": True}, True),
        (MANY64 | {"window_size": (1500, 0)}, False),
    ],
)
def test_what_the_kernel_of_dq_takes(options: dict[str, Any], taken: bool) -> None:
    _, launch = dq_of(options.get("q_offset", 0), **LONG | options)
    assert (launch.kernel == "long_query_gradients") == taken


@pytest.mark.parametrize(
    ("rows", "programs", "warps"), [(DOCUMENTS, 128, 12), (MANY64, 132, 16)], ids=["documents of 128", "64"]
)
def test_the_kernel_of_dq_compiles_in_jax(rows: dict[str, Any], programs: int, warps: int) -> None:
    """Two or three groups of warps that compute, and one that loads."""
    call, launch = dq_of(**rows, is_causal=True)
    assert launch.grid == (programs, 1, 1)
    ids = dict.fromkeys(("q_segment_ids", "kv_segment_ids"), "int64")
    dtypes = ids | {"known": "float32", "bounds": "int32", "query_order": "int32"}
    made = gluon.compiled(launch, [dtypes.get(name or "", call.dtype) for name in (*launch.inputs, "dq")])
    assert made.warps == warps
    assert made.shared <= 227 * 1024
    assert made.boxes == ((3, (1, 1, 64, 64)),) * 4
    for instruction in ("wgmma.mma_async", "setmaxnreg", "cp.async.bulk.tensor.4d", "cvt.rn.bf16x2.f32"):
        assert instruction in made.ptx
    arguments = made.ptx.partition(".visible .entry long_query_gradients(")[2].partition(")")[0].count(".param")
    assert arguments == len(launch.inputs) + 4 * 8 + len(launch.numbers) - sum(gluon.fixed(launch)) + 1 + 2


@pytest.mark.parametrize(
    ("b", "length", "options", "together"),
    [(4, 4096, {"is_causal": True}, 1), (8, 2048, {"is_causal": True}, 1), (1, 16384, {"is_causal": True}, 16),
     (4, 4096, {}, 2)],
)  # fmt: skip
def test_dq_reads_the_keys_of_few_heads_at_a_time(b: int, length: int, options: dict[str, Any], together: int) -> None:
    """As long as programs have shares alike: keys and values of 64 heads are more than the L2 cache holds."""
    x = torch.empty(b, 16, length, 128, dtype=torch.bfloat16, device="meta")
    _, launch = dq_of(q=x, k=x, v=x, **options)
    names = launch.function.arg_names[len(launch.inputs) :]
    assert dict(zip(names, launch.numbers, strict=False))["together"] == together


@pytest.mark.parametrize("shift", [0, 1])
def test_a_cotangent_may_lie_anywhere(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a descriptor cannot take is copied."""
    monkeypatch.setattr(triton, "capability", lambda: "9.0")
    q, k = torch.zeros(1, 2, 1024, 128).bfloat16(), torch.zeros(1, 1, 1024, 128).bfloat16()
    call = call_of(q=q, k=k, v=k)
    arrays, seen = canonical(call, Arrays(q, k, k)), {}
    monkeypatch.setattr(launches, "run", lambda kernels, known: seen.update(known, kernels=kernels) or known.update(
        dict.fromkeys(("out", "lse", "dq", "dk", "dv"), q)))  # fmt: skip
    row = torch.randn(1024, 129).bfloat16()
    for dout in (row[:, shift : shift + 128].expand(1, 2, -1, -1), torch.ones(()).bfloat16().expand(q.shape)):
        triton._gradients(call, arrays, [q], dout, None, [True, True, True, False, False])
        assert torch.equal(seen["dout"], dout)
        assert seen["dout"].data_ptr() % 16 == 0
        (launch,) = (each.launch for each in seen["kernels"] if each.launch.kernel == "long_query_gradients")
        blocks = launch.blocks["dout"]
        assert all(stride % 8 == 0 for stride in blocks.strides[:-1])
        assert torch.equal(seen["dout"].as_strided(blocks.shape, blocks.strides).expand(dout.shape), dout)

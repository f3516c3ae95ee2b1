"""The Triton kernels, run by Triton's interpreter on a CPU, and compiled for a GPU that need not be there.

The interpreter must be asked for before Triton is imported, so what it runs is run by processes of their own
(tests/interpreter.py). That the same bits come out of JAX is shown on a GPU: docs/implementations.md.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import attend_jax
import attend_torch
from attend_jax import gluon
from attend_jax.implementations import triton as jax_triton
from attend_shared import cases
from attend_shared.cases import Case
from attend_shared.kernels import of_sinks, sizes
from attend_shared.kernels import plan as plans
from attend_shared.kernels.launch import Launch, Layout
from attend_torch.implementations import triton
from compiling import LONG, call_of, compile_for_hopper, disassembled
from sass import foreign_addresses

INTERPRETER = Path(__file__).parent / "interpreter.py"


SHARDS = 4


def interpret(task: str, *arguments: str) -> Any:
    """The answer of a process with the interpreter."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", INTERPRETER, task, *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def served(case: Case) -> bool:
    """Whether the kernels take it."""
    names, given = case.build().dtypes, case.build().arguments
    return names["q"] != "float64" and "score_fn" not in given and "mask_fn" not in given


def chosen() -> list[str]:
    """Enough of the list to have every level, small cases first."""
    known: Counter[str] = Counter()
    names = []
    able = [case for case in cases.CASES if served(case)]
    for case in sorted(able, key=lambda case: "tiles" in case.name):
        if any(not known[level] for level in case.levels):
            known.update(case.levels)
            names.append(case.name)
    return names


LOST = (  # in what out loses by its rounding: a row or two count for all
    "items_as_queries-bfloat16-sinks_inf-scale_int-value_larger-bnhd-expanded-large",
    "tall-float16-lengths_q-sinks_inf-dropout_unused-expanded-poison_rows-large",
)


def test_dsinks_where_few_rows_count() -> None:
    """Of `triton`; and with kernels of FlashAttention, which are stood in for."""
    assert interpret("cases", *LOST) == dict.fromkeys(LOST, "ok")
    found = interpret("sinks", *LOST)
    assert found["anew"] == dict.fromkeys(LOST, "ok")
    assert found["coarse"] == dict.fromkeys(LOST, "dsinks")
    assert max(found["segments"]) < 2**-6


def test_gradients_of_an_lse_that_others_made() -> None:
    """With FlashAttention's kernels in JAX, which are stood in for."""
    found = interpret("lse")
    assert found == dict.fromkeys(found, "ok")
    assert len(found) > 10


@pytest.mark.parametrize("shard", range(SHARDS))
def test_cases_are_within_the_budget(shard: int) -> None:
    names = chosen()[shard::SHARDS]
    assert len(names) > 10
    found = interpret("cases", *names)
    assert found == dict.fromkeys(names, "ok")


def test_blocks_that_are_ruled_out_are_not_visited() -> None:
    """Tiles of 64 x 64 logits, of the 16 that 256 queries and keys have: forward, for dq, and for dk and dv."""
    assert interpret("visits") == {
        "all": [16, 16, 16],
        "causal": [10, 10, 10],
        "window (10, 10)": [10, 10, 10],
        "diagonal": [4, 4, 4],
        "causal at offset -100": [6, 6, 6],
        "kv_lengths 65": [8, 8, 8],
        "q_lengths 64": [4, 4, 4],
        "nothing": [0, 0, 0],
        "documents of 64": [4, 4, 4],
        "documents in turn": [12, 12, 12],  # from the first block that matters to the last
        "key mask with a hole": [8, 8, 8],
        "key mask with a hole and a bias": [8, 8, 8],
        "left padding, causal": [3, 3, 3],
        "every second key, causal": [6, 6, 6],
    }


def test_whole_blocks_are_not_looked_at() -> None:
    """Of 16 tiles again; and a block that is not whole by one id, or one key, is looked at."""
    assert interpret("whole") == {
        "documents of 128, causal": [2, 2, 2],
        "documents of 96": [3, 3, 3],
        "extreme ids": [8, 8, 8],
        "one foreign id": [3, 3, 3],  # the first run of blocks
        "left padding, causal": [1, 1],
        "left padding, packed": [2.4, 2.4],  # a whole one, and what is allowed of a block of neighbours
        "documents of 128, one dead key": [6, 6, 7.97],  # what a dead key gets is thrown away
    }


def test_keys_are_packed_and_tiles_ordered() -> None:
    keys, tiles = ("holes", "few", "runs", "none and all"), ("queries", "keys", "queries, causal", "keys, causal")
    assert interpret("packed") == {name: [] for name in (*keys, *tiles)}


def test_runs_of_segments_are_found() -> None:
    """Where each begins and ends, and whether no id has two: it may miss that, but never says it of others."""
    found = interpret("spans")
    assert len(found) == 18 and not any(found.values()), found


def test_where_ids_are_runs_the_kernel_of_others_leaves_all_as_it_is() -> None:
    assert interpret("left") == {"runs": [], "no runs": []}


def test_a_bias_has_its_gradient_with_dq() -> None:
    """Where its tile is that of as many items as a program has room for; else a pass of its own."""
    together = ["query_and_bias_gradients"]
    assert interpret("biases") == {
        "of three items, causal": together,
        "rows that see nothing": together,
        "of each item, lengths and a mask": together,
        "finer, softcap and dropout in a window": together,
        "key mask": together,
        "of all heads": ["bias_gradients"],
        "of five items": ["bias_gradients"],
        "of two items in float32": ["bias_gradients"],
    }


def test_a_softcap_is_exact_where_logits_are_small() -> None:
    """To some ulp of themselves: an ulp of a cap of 50 is more than lse, and a finer bias's gradient, may be off by."""
    found = interpret("softcap")
    assert found.pop("small") < 1.5e-7
    assert found.pop("large") < 2.5e-7
    assert found.pop("edges") == ["3.0", "-3.0", "nan", "0.0", "-0.0", "3.0", "-0.0", "1.3864"]
    assert found == dict.fromkeys(("plain", "a finer bias", "finer sinks"), "ok")


def test_a_bias_may_be_as_large_as_numbers_go() -> None:
    """Exponents are taken in powers of 2 where that loses nothing."""
    for name, (off, of_lse) in interpret("huge").items():
        assert off < 5e-4, name
        assert of_lse < 2e-7, name


def test_float32_is_exact_where_a_row_has_one_key_and_where_logits_are_large() -> None:
    """dp - delta, which is 0 there, adds up over queries if it is not; and of large logits lse is no measure."""
    found = interpret("exact")
    assert found.pop("lse") < 1e-6
    assert found.pop("large") < 1e-6
    assert found == dict.fromkeys(found, 0)
    assert len(found) == 6


def test_dropout_drawn_once_gives_the_same_bits() -> None:
    found = interpret("drawn")
    assert len(found) == 7
    assert found == dict.fromkeys(found, "ok")


def test_what_the_interpreter_is_not_needed_for() -> None:
    """vmap, compilers, a second derivative, and arrays that lie otherwise or hold nothing, in one process."""
    found = interpret("torch")
    assert found.pop("second derivative").startswith("triton has first derivatives only")
    assert found == dict.fromkeys(found, "ok")
    assert set(found) == {
        "vmap", "compiled", "compiled gradients", "expanded", "last axis not contiguous", "traced", "fake tensors",
        "operator", "dk and dv in two passes", "a key mask, far off",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, None),
        ({name: torch.empty(1, 2, 8, 8, dtype=torch.float64, device="meta") for name in "qkv"}, "it has no float64"),
        ({name: torch.empty(1, 2, 8, 288, device="meta") for name in "qkv"}, "it takes head sizes of up to 256"),
    ],
)
def test_refusals(options: dict[str, Any], words: str | None) -> None:
    call = call_of(**options)
    assert triton.refusal(call) == jax_triton.refusal(call) == words
    assert triton.refusal(call._replace(platform="cpu")) == "it runs on an NVIDIA GPU"


def test_where_it_cannot_run_it_says_why() -> None:
    rows = {each.name: each for package in (attend_torch, attend_jax) for each in package.implementations()}
    if not torch.cuda.is_available():
        assert not rows["triton"].available
        assert rows["triton"].reason


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"bias": torch.empty(1, 4, 96, 96, device="meta"), "sinks": torch.empty(4, device="meta"), "dropout": 0.1,
         "softcap": 30.0, "mask": torch.empty(2, 1, 96, 96, dtype=torch.bool, device="meta"), "dropout_seed": 1},
        {"mask": torch.empty(2, 96, dtype=torch.bool, device="meta"), "window_size": (5, 0),
         "q_segment_ids": torch.empty(2, 96, dtype=torch.int32, device="meta"),
         "kv_lengths": torch.empty(2, dtype=torch.int64, device="meta"),
         "q_lengths": torch.empty(2, dtype=torch.int64, device="meta"),
         **{name: torch.empty(2, 4, 96, 40, device="meta") for name in "qkv"}},
        {"is_causal": True, "mask": torch.empty(2, 4, 96, 96, dtype=torch.bool, device="meta"),
         "q_segment_ids": torch.empty(2, 96, dtype=torch.int32, device="meta"),
         "kv_lengths": torch.empty(2, dtype=torch.int64, device="meta"),
         **{name: torch.empty(2, 4, 96, 12, dtype=torch.bfloat16, device="meta") for name in "qkv"}},
    ],
    ids=["causal", "pairs", "structure in float32", "short rows that are not aligned"],
)  # fmt: skip
def test_every_kernel_compiles_for_a_gpu(options: dict[str, Any]) -> None:
    call = call_of(**options)
    x = (call.h * 96 * call.d, 96 * call.d, call.d)
    pairs = {name: tuple(np.cumprod((*shape[:0:-1], 1)[::-1]).tolist()) if shape else None
             for name, shape in (("mask", call.mask), ("bias", call.bias))}  # fmt: skip
    plan = plans.plan(call, Layout(x, x, x, **pairs, one_id=True))
    launches = (*plan.forward, *plan.backward(x, call.bias is not None, True, False))
    dtypes = dict.fromkeys(("q", "k", "v", "dout"), call.dtype) | {"mask": "bool", "dlse": "float32"}
    dtypes |= {"bias": "float32", "sinks": "float32", "dropout_seed": "int64"}
    dtypes |= {"q_segment_ids": "int8", "kv_segment_ids": "int64", "q_lengths": "int64", "kv_lengths": "int64"}
    for launch in launches:
        dtypes |= {output.name: output.dtype for output in launch.outputs}
    for launch in launches:
        compiled = compile_for_hopper(launch, dtypes)
        if launch.kernel in ("forward", "query_gradients", "key_gradients", "query_and_bias_gradients"):
            small = launch.constants["BM"] < 64 and launch.kernel == "query_and_bias_gradients"
            assert ("wgmma.mma_async" in compiled.asm["ptx"]) != small
            assert ("cvt.rz.bf16x2.f32" in compiled.asm["ptx"]) == (call.dtype == "float32")
            assert "tf32" not in compiled.asm["ptx"]
            assert compiled.metadata.shared <= 227 * 1024
            assert foreign_addresses(disassembled(compiled.asm["cubin"])) == []


def given_by_triton(launch: Launch, backend: Any) -> list[tuple]:
    """What Triton's launcher has the compiler know of each argument: its type or "constexpr", and what else."""
    from triton.runtime.jit import create_function_from_signature

    kernel = launch.function
    array = torch.empty(8, dtype=torch.bfloat16)
    given = [*(array for _ in launch.inputs), *launch.given, *(array for _ in launch.outputs)]
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    known = bind(*given, **launch.constants, num_warps=launch.warps)[1]
    return [(kind, None if what == "" else what) for kind, what in known]


def given_by_jax(launch: Launch, backend: Any) -> list[tuple]:
    """The same of jax-triton 0.3.1: arrays are aligned, numbers are what they are, and what is 1 is fixed. And of what
    launches kernels in Gluon.
    """
    from triton._C.libtriton import native_specialize_impl

    array = SimpleNamespace(data_ptr=lambda: 16, dtype="bf16")
    pointer = native_specialize_impl(backend, array, False, True, True)
    numbers = [np.float32(x) if isinstance(x, float) else x for x in launch.given]
    fixed = gluon.fixed(launch) if launch.gluon else [x == 1 for x in numbers]
    kinds = [("constexpr", 1) if one else ("fp32" if isinstance(x, np.float32) else "i32", None)
             for x, one in zip(numbers, fixed, strict=True)]  # fmt: skip
    names = [name for name in launch.function.arg_names if name in launch.constants]
    constants = [("constexpr", launch.constants[name]) for name in names]
    return [*[pointer] * len(launch.inputs), *kinds, *[pointer] * len(launch.outputs), *constants]


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "sinks": torch.empty(4, device="meta"), "dropout": 0.1, "dropout_seed": 1},
        {"bias": torch.empty(1, 4, 96, 96, device="meta"), "mask": torch.empty(2, 96, dtype=torch.bool, device="meta")},
        {"bias": torch.empty(1, 4, 96, 1, device="meta"), "scale": 1.0},
        {"q_segment_ids": torch.empty(2, 96, dtype=torch.int32, device="meta"), "window_size": (16, 16)},
        {"mask": torch.empty(2, 96, dtype=torch.bool, device="meta"), "softcap": 16.0},
        {"q_lengths": torch.empty(2, dtype=torch.int64, device="meta"), "scale": 16.0},
        {"q": torch.empty(2, 4, 1, 64, device="meta"), **{n: torch.empty(2, 4, 4096, 64, device="meta") for n in "kv"}},
        {n: torch.empty(1, 1, 17, 16, dtype=torch.float16, device="meta") for n in "qkv"},
        {n: torch.empty(2, 4, 2048, 256, dtype=torch.bfloat16, device="meta") for n in "qkv"},
        {n: torch.empty(2, 4, 2048, 64, dtype=torch.bfloat16, device="meta") for n in "qkv"},
        {n: torch.empty(2, 4, 2048, 128, dtype=torch.bfloat16, device="meta") for n in "qkv"},
        {**{n: torch.empty(16, 16, 2048, 128, dtype=torch.bfloat16, device="meta") for n in "qkv"}, "is_causal": True},
    ],
    ids=["sinks and dropout", "bias and key mask", "bias of queries", "segments", "softcap", "lengths", "few queries",
         "one head", "long rows", "narrow", "plain", "long gradients"],
)  # fmt: skip
def test_both_frameworks_have_the_same_compiled(options: dict[str, Any]) -> None:
    """So that the GPU runs the same instructions, whatever the compiler makes of them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    call, backend = call_of(**options), make_backend(GPUTarget("cuda", 90, 32))
    pairs = {name: tuple(np.cumprod((*shape[:0:-1], 1)[::-1]).tolist()) if shape else None
             for name, shape in (("mask", call.mask), ("bias", call.bias))}  # fmt: skip
    q, k = ((heads * n * call.d, n * call.d, call.d) for n, heads in ((call.i, call.h), (call.j, call.hk)))
    plan = plans.plan(call, Layout(q, k, k, **pairs, gluon=True))
    for launch in (*plan.forward, *plan.backward(q, call.bias is not None, True, False)):
        assert given_by_triton(launch, backend) == given_by_jax(launch, backend)


def test_kernels_know_which_lengths_are_multiples_whoever_launches_them() -> None:
    q = torch.empty(2, 4, 2048, 64, dtype=torch.bfloat16, device="meta")
    call = call_of(q=q, k=q, v=q, q_segment_ids=torch.empty(2, 2048, dtype=torch.int32, device="meta"))
    strides = q.stride()[:3]
    launches = plans.plan(call, Layout(strides, strides, strides)).backward(strides, False, False, False)
    launch = next(each for each in launches if each.kernel == "query_gradients")
    dtypes = dict.fromkeys(("q", "k", "v", "dout"), call.dtype) | {"known": "float32"}
    dtypes |= dict.fromkeys(("q_segment_ids", "kv_segment_ids", "bounds", "alive", "listed", "before"), "int32")
    known, told = (compile_for_hopper(launch, dtypes, told=each).asm["ptx"] for each in (False, True))
    assert known == told
    odd = launch._replace(constants={**launch.constants, "I_UNIT": 1, "J_UNIT": 1})
    assert compile_for_hopper(odd, dtypes).asm["ptx"] != known


def test_what_makes_rows_anew_compiles_for_a_gpu() -> None:
    """With everything at once."""
    made = dict.fromkeys(("q_lengths", "kv_lengths", "q_offset"), torch.empty(2, dtype=torch.int64, device="meta"))
    made["q_segment_ids"] = made["kv_segment_ids"] = torch.empty(2, 96, dtype=torch.int32, device="meta")
    shapes = {"q": (2, 4, 96, 40), "k": (2, 4, 96, 40), "v": (2, 4, 96, 72), "sinks": (4,), "bias": (1, 4, 96, 96)}
    made |= {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    made["mask"] = torch.empty(2, 1, 96, 96, dtype=torch.bool, device="meta")
    call = call_of(**made, dropout=0.1, dropout_seed=1, softcap=30.0, window_size=(5, 3))
    q, v = (4 * 96 * 40, 96 * 40, 40), (4 * 96 * 72, 96 * 72, 72)
    layout = Layout(q, q, v, (9216, 0, 96, 1), (0, 9216, 96, 1), offset=2, one_id=True)
    backward = plans.plan(call, layout).backward(v, True, True, False)
    launch = next(each for each in backward if each.kernel == "sum_rows")
    dtypes = dict.fromkeys(("dout", *shapes), "bfloat16") | {"mask": "bool", "dropout_seed": "int64"}
    dtypes |= dict.fromkeys(("q_lengths", "kv_lengths", "q_offset"), "int64")
    dtypes |= {"q_segment_ids": "int32", "kv_segment_ids": "int32"}
    dtypes |= dict.fromkeys(("lse", "dlse", *of_sinks.WEIGHED), "float32")
    assert compile_for_hopper(launch, dtypes).metadata.shared <= 99 * 1024


@pytest.mark.parametrize(
    ("options", "weighed"),
    [
        ({}, True),
        ({"sinks": torch.empty(4, device="meta")}, False),
        ({"bias": torch.empty(1, 1, 1, 96, device="meta")}, False),
        ({n: torch.empty(2, 4, 96, 64, device="meta") for n in "qkv"}, False),
    ],
    ids=["q's dtype", "float32 sinks", "float32 bias", "float32"],
)
def test_rows_are_weighed_where_out_is_rounded_and_kept_so(options: dict[str, Any], weighed: bool) -> None:
    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    given = {n: torch.empty(2, 4, 96, 64, **half) for n in "qkv"} | {"sinks": torch.empty(4, **half)}
    x = (4 * 96 * 64, 96 * 64, 64)
    layout = Layout(x, x, x, bias=(0, 0, 0, 1) if "bias" in options else None)
    plan = plans.plan(call_of(**given | options), layout)
    kernels = [each.kernel for each in plan.backward(x, False, True, False)]
    assert kernels[: 2 + weighed] == ["row_sums", *["sum_rows"] * weighed, "sum_sinks"]


def test_rows_of_128_are_read_at_few_addresses() -> None:
    """Not at one for each row that a thread reads, which would be 64."""
    call = call_of(**LONG, kv_lengths=torch.empty(2, dtype=torch.int64, device="meta"))
    x = (4 * 2048 * 128, 2048 * 128, 128)
    (launch,) = plans.plan(call, Layout(x, x, x)).forward
    dtypes = dict.fromkeys(("q", "k", "v"), call.dtype) | {"kv_lengths": "int64"}
    code = disassembled(compile_for_hopper(launch, dtypes).asm["cubin"])
    assert len(set(re.findall(r"LDGSTS\S* \[.+?\], (?:desc\S+\[)?\[?(R\d+)", code))) < 32


def test_an_address_that_a_parameter_reaches_on_one_way_is_found() -> None:
    """As ptxas 12.8 made it: register 6 holds the base only where the first loop is run."""
    listing = """
        /*0010*/                   ULDC.64 UR6, c[0x0][0x220] ;
        /*0020*/               @P4 BRA `(.L_x_0) ;
        /*0030*/                   BRA `(.L_x_1) ;
.L_x_0:
        /*0040*/                   USGXT.U32 UR6, UR5, 0xe ;
        /*0050*/                   UMOV UR7, URZ ;
.L_x_1:
        /*0060*/                   UIADD3 UR22, UP0, UR6, 0x20, URZ ;
        /*0070*/                   UMOV UR23, 0xc0000010 ;
        /*0080*/                   HGMMA.64x16x16.F32 R56, R28, gdesc[UR20].tnspB, R56 ;
        /*0090*/                   EXIT ;
    """
    assert foreign_addresses(listing) == ["0080: UR6 of ULDC.64 UR6, c[0x0][0x220]"]
    assert foreign_addresses(listing.replace("@P4 BRA", "BRA")) == []


@pytest.mark.parametrize(
    ("b", "h", "hk", "i", "j", "d", "dropout", "drawn"),
    [
        (4, 16, 16, 4096, 4096, 64, 0.1, "back"),  # as many bytes as q, k, v and out have
        (4, 16, 16, 4097, 4096, 64, 0.1, ""),
        (4, 16, 16, 8192, 8192, 128, 0.1, "back"),
        (4, 16, 16, 4096, 4096, 128, 0.1, "forward"),  # half as many
        (4, 16, 16, 4097, 4096, 128, 0.1, "back"),
        (64, 16, 16, 64, 4096, 128, 0.1, "back"),  # as many rows again would be padding
        (1, 32, 8, 4096, 4096, 128, 0.1, "back"),
        (1, 32, 1, 4096, 4096, 64, 0.1, ""),
        (4, 16, 16, 2048, 2048, 64, 0.0, ""),
        (1, 1, 1, 512, 512, 64, 0.1, ""),  # a launch costs more
    ],
)
def test_dropout_is_drawn_once_where_that_takes_no_more_memory_than_the_inputs(
    b: int, h: int, hk: int, i: int, j: int, d: int, dropout: float, drawn: str
) -> None:
    """And for both ways where it takes no more than half of that."""
    q, k = (torch.empty(b, heads, n, d, dtype=torch.bfloat16, device="meta") for heads, n in ((h, i), (hk, j)))
    call = call_of(q=q, k=k, v=k, dropout=dropout, **({"dropout_seed": 1} if dropout else {}))
    assert (plans.draws_once(call), plans.keeps_drawn(call)) == (drawn != "", drawn == "forward")
    plan = plans.plan(call, Layout(q.stride()[:3], k.stride()[:3], k.stride()[:3]))
    ways = {"forward": plan.forward, "back": plan.backward(q.stride()[:3], False, False, False)}
    made = {way: each.outputs[0] for way, launches in ways.items() for each in launches if each.kernel == "draw"}
    assert [*made] == [drawn] * bool(drawn)
    assert "draw" not in {each.kernel for each in plan.alone}
    forward, alone = (launches[-1].constants.get("BN") for launches in (plan.forward, plan.alone))
    assert forward == alone  # on which the order of sums hangs
    if drawn:
        inputs = 2 * 2 * (q.numel() + k.numel())
        assert 4 * int(np.prod(made[drawn].shape)) <= inputs * (sizes.HELD if drawn == "forward" else 1)


def test_what_reads_drawn_bits_compiles_for_a_gpu() -> None:
    q = torch.empty(4, 16, 2048, 64, dtype=torch.bfloat16, device="meta")
    lengths = torch.empty(4, dtype=torch.int64, device="meta")
    given = {"q": q, "k": q, "v": q, "kv_lengths": lengths, "q_lengths": lengths, "dropout_seed": 1}
    call = call_of(**given, dropout=0.1, window_size=(500, 9))
    strides = q.stride()[:3]
    plan = plans.plan(call, Layout(strides, strides, strides))
    sums, *backward = plan.backward(strides, False, False, False)
    dtypes = dict.fromkeys(("q", "k", "v", "dout"), call.dtype) | dict.fromkeys(("q_lengths", "kv_lengths"), "int64")
    dtypes |= {"known": "float32", "drawn": "int32", "dropout_seed": "int64"}
    launches = *plan.forward, *backward
    assert [each.kernel for each in launches] == ["draw", "forward", "query_gradients", "key_gradients"]
    assert sums.kernel == "row_sums"
    for launch in launches:
        ptx = compile_for_hopper(launch, dtypes).asm["ptx"]
        multiplied = any(str(number) in ptx for number in (0xD2511F53, 2**32 - 0xD2511F53))  # by Philox
        assert multiplied == (launch.kernel == "draw")


@pytest.mark.parametrize("d", [128, 256])
def test_where_shared_memory_is_little_blocks_are_smaller(d: int) -> None:
    """99 KB a program, as compute capability 8.6, 8.9 and 12.0 have."""
    call = call_of(**{name: torch.empty(2, 4, 96, d, dtype=torch.bfloat16, device="meta") for name in "qkv"})
    x = (4 * 96 * d, 96 * d, d)
    plan = plans.plan(call, Layout(x, x, x, capability="8.6"))
    dtypes = dict.fromkeys(("q", "k", "v", "dout"), call.dtype)
    for launch in (*plan.forward, *plan.backward(x, False, False, False)):
        dtypes |= {output.name: output.dtype for output in launch.outputs}
        if launch.kernel in ("forward", "key_gradients"):
            assert compile_for_hopper(launch, dtypes, 86).metadata.shared <= 99 * 1024


def test_float32_is_multiplied_in_full_where_sums_of_shorter_products_were_not_tried() -> None:
    call = call_of(**{name: torch.empty(2, 4, 96, 64, device="meta") for name in "qkv"})
    x = (4 * 96 * 64, 96 * 64, 64)
    assert [sizes.in_full(call, each) for each in ("8.0", "9.0", "10.0", "")] == [True, False, True, True]
    others = {"dv": 128}, {"dv": 129}, {"dv": 32}, {"d": 32, "dv": 32}, {"i": 16}, {"i": 17}, {"dropout": 0.1}
    full = [False, True, True, False, True, False, False]
    assert [sizes.in_full(call._replace(**each), "9.0") for each in others] == full
    dtypes = dict.fromkeys(("q", "k", "v"), call.dtype)
    plan = plans.plan(call, Layout(x, x, x, capability="8.6"))
    dtypes |= {output.name: output.dtype for output in plan.forward[-1].outputs}
    compiled = compile_for_hopper(plan.forward[-1], dtypes, 86)
    assert "mma." not in compiled.asm["ptx"]
    assert "bf16" not in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 99 * 1024

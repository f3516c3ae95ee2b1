"""The Triton kernels, run by Triton's interpreter on a CPU, and compiled for a GPU that need not be there.

The interpreter must be asked for before Triton is imported, so what it runs is run by processes of their own
(tests/interpreter.py). That the same bits come out of JAX is shown on a GPU: docs/implementations.md.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec

import attend_jax
import attend_torch
from attend_jax import gluon
from attend_jax.arrays import FRAMEWORK as JAX
from attend_jax.implementations import einsum as jax_einsum
from attend_jax.implementations import triton as jax_triton
from attend_shared import cases
from attend_shared.call import Arrays, Call, canonical, check
from attend_shared.cases import Case
from attend_shared.kernels import gluon_plan, of_sinks, sizes
from attend_shared.kernels import plan as plans
from attend_shared.kernels.launch import Launch, Layout
from attend_torch import launches
from attend_torch.arrays import FRAMEWORK
from attend_torch.implementations import blockwise as torch_blockwise
from attend_torch.implementations import triton
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


def call_of(call: Call | None = None, **options: Any) -> Call:
    x = torch.empty(2, 4, 96, 64, dtype=torch.bfloat16, device="meta")
    static = {name: options.pop(name, default) for name, default in
              (("is_causal", False), ("window_size", None), ("softcap", None), ("scale", None), ("dropout", 0.0))}
    arrays = Arrays(**{"q": x, "k": x, "v": x} | options)
    return check(FRAMEWORK, arrays, *static.values(), False, "bhnd", None)._replace(platform="cuda")


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


def compile_for_hopper(
    launch: Launch, dtypes: dict[str, str], capability: int = 90, told: bool = False
) -> Any:  # fmt: skip
    """What the GPU would run. told: whether the compiler is told which numbers are multiples of 16."""
    import triton as language
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = launch.function
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int64": "i64", "int32": "i32", "uint8": "u8",
             "int8": "i8", "bool": "i1"}  # fmt: skip
    kinds = ["*" + short[dtypes[name or "q"]] for name in launch.inputs]
    kinds += ["constexpr" if x == 1 else "fp32" if isinstance(x, float) else "i32" for x in launch.given]
    kinds += ["*" + short[output.dtype] for output in launch.outputs]
    signature = dict(zip(kernel.arg_names, kinds, strict=False))
    multiples = {len(launch.inputs) + n for n, x in enumerate(launch.given) if told and x % 16 == 0}
    source = ASTSource(
        fn=kernel,
        signature=signature | dict.fromkeys(launch.constants, "constexpr"),
        constexprs={name: 1 for name, kind in signature.items() if kind == "constexpr"} | dict(launch.constants),
        attrs={(n,): [["tt.divisibility", 16]] for n, kind in enumerate(kinds)
               if kind.startswith("*") or (kind == "i32" and n in multiples)},
    )  # fmt: skip
    assert {*signature, *launch.constants} == {*kernel.arg_names}
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return language.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


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


def disassembled(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


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
    others = {"dv": 128}, {"dv": 129}, {"i": 16}, {"i": 17}, {"dropout": 0.1}
    full = [False, True, True, False, True]
    assert [sizes.in_full(call._replace(**each), "9.0") for each in others] == full
    dtypes = dict.fromkeys(("q", "k", "v"), call.dtype)
    plan = plans.plan(call, Layout(x, x, x, capability="8.6"))
    dtypes |= {output.name: output.dtype for output in plan.forward[-1].outputs}
    compiled = compile_for_hopper(plan.forward[-1], dtypes, 86)
    assert "mma." not in compiled.asm["ptx"]
    assert "bf16" not in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 99 * 1024


LONG = {name: torch.empty(2, 4, 2048, 128, dtype=torch.bfloat16, device="meta") for name in "qkv"}
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
        ({"softcap": 3.0}, "forward"),
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


def plain_launch(**options: Any) -> tuple[Call, Launch]:
    call = call_of(**LONG | options)
    x = (4 * 2048 * 128, 2048 * 128, 128)
    return call, plans.plan(call, Layout(x, x, x, gluon=True)).forward[-1]


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"window_size": (600, 0)}], ids=["full", "causal", "window"]
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


def keys_launches(one_id: bool = True, **options: Any) -> tuple[Call, list[Launch]]:
    """A call, and what makes its dk and dv."""
    call = call_of(**MANY | options)
    x, at = (call.h * call.i * call.d, call.i * call.d, call.d), options.get("q_offset", 0)
    plan = plans.plan(call, Layout(x, x, x, at=at, one_id=one_id, gluon=True))
    found = plan.backward(x, False, False, False)
    launches = [each for each in found if each.kernel.endswith("key_gradients")]
    of_segments = [len(launches) == 2] if call.segments else []
    assert [*of_segments, *("key_order" in each.inputs for each in launches)].count(True) in (0, 2)
    assert ("find_runs" in [each.kernel for each in found]) == (len(launches) == 2)
    return call, launches


MANY = {name: torch.empty(2, 4, 2048, 128, dtype=torch.bfloat16, device="meta") for name in "qkv"}
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
        ({"kv_lengths": torch.empty(2, dtype=torch.int64, device="meta")}, False),
        ({"q_lengths": torch.empty(2, dtype=torch.int64, device="meta")}, False),
        ({"q_segment_ids": torch.empty(2, 2048, dtype=torch.int32, device="meta")}, False),  # 64 programs
    ],
)
def test_which_keys_have_a_kernel_of_compute_capability_9(options: dict[str, Any], taken: bool) -> None:
    call, launches = keys_launches(**options)
    assert [each.kernel for each in launches] == ["long_key_gradients" if taken else "key_gradients"]
    x = (call.h * call.i * call.d, call.i * call.d, call.d)
    elsewhere = plans.plan(call, Layout(x, x, x, at=options.get("q_offset", 0))).backward(x, False, False, False)
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
        ({"scale": -1.0}, True, True),  # dq by Triton's kernel
        ({"is_causal": True, "lengths": 4100}, True, True),  # the same
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
    [{}, {"is_causal": True, "q": MANY["q"].repeat(1, 2, 1, 1)}, MANY64 | {"window_size": (2047, 0)}, "documents"],
    ids=["full", "causal, grouped heads", "rows of 64", "documents"],
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
    assert made.boxes == (*((3, (1, 1, 64, 64)),) * 4, (0, (1, 64, 4)))
    arguments = made.ptx.partition(".visible .entry long_key_gradients(")[2].partition(")")[0].count(".param")
    numbers = [x for x in launch.numbers if x != 1]
    assert arguments == len(launch.inputs) + 4 * 8 + 6 + len(numbers) + len(launch.outputs) + 2
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
    for output, operand in enumerate((8, 9)):
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


# JAX: what happens around the launches, with einsum in their place.


def by_einsum(call: Call, arrays: Arrays) -> tuple:
    ids = arrays.q_segment_ids if arrays.kv_segment_ids is None else arrays.kv_segment_ids
    return jax_einsum.attend(call, arrays._replace(kv_segment_ids=ids))


def fake_forward(call: Call, arrays: Arrays, alone: bool = False) -> tuple:
    seen.append(call.b)
    out, lse = by_einsum(call, arrays)
    spare = jnp.zeros((call.b, 1), jnp.float32)
    return out, lse, lse, lse, spare


def fake_gradients(
    call: Call, arrays: Arrays, saved: tuple, dout: Any, dlse: Any, wants_bias: bool = True
) -> tuple:  # fmt: skip
    wanted.append(wants_bias)
    with_lse.append(dlse is not None)
    names = [name for name in ("q", "k", "v", "bias", "sinks") if getattr(arrays, name) is not None]

    def function(*floats: Any) -> Any:
        return by_einsum(call, arrays._replace(**dict(zip(names, floats, strict=True))))

    (_, lse), back = jax.vjp(function, *(getattr(arrays, n) for n in names))
    found = dict(zip(names, back((dout, jnp.zeros_like(lse) if dlse is None else dlse)), strict=True))
    return tuple(found.get(name) for name in ("q", "k", "v", "bias", "sinks"))


seen: list[int] = []
wanted: list[bool] = []
with_lse: list[bool] = []


@pytest.mark.parametrize(
    ("options", "folds"),
    [
        ({}, True),
        ({"is_causal": True, "q_offset": "shared"}, True),
        ({"is_causal": True, "q_offset": "lanes"}, True),
        ({"mask": "shared", "kv_lengths": "lanes", "q_segment_ids": "shared"}, True),
        ({"sinks": "shared"}, False),
        ({"dropout": 0.5, "dropout_seed": "lanes"}, False),
        ({"bias": "shared"}, False),
    ],
    ids=str,
)
def test_lanes_are_more_items_of_one_call_in_jax(
    options: dict[str, Any], folds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax_triton, "_forward", fake_forward)
    monkeypatch.setattr(jax_triton, "_gradients", fake_gradients)
    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.standard_normal((3, 2, 2, 5, 4)), jnp.float32) for _ in range(3))
    made: dict[str, Any] = {
        "q_offset": jnp.asarray([0, 1, -1]), "mask": jnp.asarray(draw.random((3, 1, 5)) > 0.3),
        "kv_lengths": jnp.asarray([[5, 2], [0, 3], [4, 4]]),
        "q_segment_ids": jnp.asarray(draw.integers(0, 2, (3, 2, 5))),
        "sinks": jnp.zeros((3, 2)), "dropout_seed": jnp.asarray([[1, 2], [3, 4], [5, 6]], jnp.uint32),
        "bias": jnp.asarray(draw.standard_normal((3, 1, 2, 5, 5)), jnp.float32),
    }  # fmt: skip
    static = {name: value for name, value in options.items() if value not in ("shared", "lanes")}
    lanes = {name: made[name] for name, value in options.items() if value == "lanes"}
    shared = {name: made[name][0] for name, value in options.items() if value == "shared"}

    def loss(attention: Any, q: Any, k: Any, lanes: dict[str, Any]) -> Any:
        def inner(q: Any, k: Any) -> Any:
            out, lse = attention(q, k, lanes)
            return (out * jnp.arange(4, dtype=jnp.float32)).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

        value, gradients = jax.value_and_grad(inner, argnums=(0, 1))(q, k)
        return value, gradients

    def ours(q: Any, k: Any, lanes: dict[str, Any]) -> Any:
        given = Arrays(q, k, v[0], **lanes, **shared)
        call = check(JAX, given, static.get("is_causal", False), None, None,
                     None, static.get("dropout", 0.0), True, "bhnd", None)  # fmt: skip
        return jax_triton.attend(call, canonical(call, given))

    def truth(q: Any, k: Any, lanes: dict[str, Any]) -> Any:
        return attend_jax.attend(q, k, v[0], **lanes, **shared, **static, return_lse=True, implementation="einsum")

    seen.clear()
    found = jax.vmap(lambda q, k, lanes: loss(ours, q, k, lanes))(q, k, lanes)
    expected = jax.vmap(lambda q, k, lanes: loss(truth, q, k, lanes))(q, k, lanes)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert (max(seen) == 6) == folds


def test_a_bias_without_a_gradient_is_told_from_one_in_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler leaves half of a launch out, so dbias must not be made for nothing."""
    monkeypatch.setattr(jax_triton, "_forward", fake_forward)
    monkeypatch.setattr(jax_triton, "_gradients", fake_gradients)
    q, bias = jnp.ones((1, 2, 5, 4)), jnp.ones((1, 2, 5, 5))
    call = check(JAX, Arrays(q, q, q, bias=bias), False, None, None, None, 0.0, True, "bhnd", None)

    def loss(q: Any, bias: Any) -> Any:
        return jax_triton.attend(call, canonical(call, Arrays(q, q, q, bias=bias)))[0].sum()

    def layers(q: Any, bias: Any) -> Any:
        return jax.lax.scan(lambda x, _: (x + loss(x, bias), None), q, None, length=2)[0].sum()

    wanted.clear()
    for function in (loss, jax.jit(loss), jax.checkpoint(loss), layers):
        for places, found in ((0, [False]), (1, [True]), ((0, 1), [True])):
            jax.grad(function, places)(q, bias)
            assert wanted == found
            wanted.clear()


def test_no_zeros_are_made_for_an_lse_that_is_not_used_in_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch: they would be written and read, and the way back has a launch of its own for calls without them."""
    monkeypatch.setattr(jax_triton, "_forward", fake_forward)
    monkeypatch.setattr(jax_triton, "_gradients", fake_gradients)
    q = jnp.ones((1, 2, 5, 4))
    call = check(JAX, Arrays(q, q, q), False, None, None, None, 0.0, True, "bhnd", None)

    def out(q: Any) -> Any:
        return jax_triton.attend(call, canonical(call, Arrays(q, q, q)))[0].sum()

    def lse(q: Any) -> Any:
        return jax_triton.attend(call, canonical(call, Arrays(q, q, q)))[1].sum()

    lanes = jnp.ones((3, *q.shape))
    with_lse.clear()
    for function, at, expected in (
        (out, q, False), (jax.jit(out), q, False), (jax.checkpoint(out), q, False), (lse, q, True),
        (lambda q: jax.vmap(out)(q).sum(), lanes, False), (lambda q: jax.vmap(lse)(q).sum(), lanes, True),
    ):  # fmt: skip
        jax.grad(function)(at)
        assert {*with_lse} == {expected}
        with_lse.clear()


def test_in_a_shard_map_results_vary_as_inputs_do_in_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch's outputs are typed as the same on every device, as those of this stand-in are."""

    def triton_call(*_: Any, out_shape: Any, **options: Any) -> list[Any]:
        return [jnp.zeros(x.shape, x.dtype) for x in out_shape]

    monkeypatch.setitem(sys.modules, "jax_triton", SimpleNamespace(triton_call=triton_call))
    monkeypatch.setattr(jax_triton, "unavailable", lambda: None)
    monkeypatch.setattr(jax_triton, "refusal", lambda call: None)

    def gradients(q: Any, k: Any, v: Any, bias: Any, sinks: Any, seed: Any) -> Any:
        at = jax.lax.axis_index("x") * 4

        def loss(*floats: Any) -> Any:
            *qkv, bias, sinks = floats
            out, lse = attend_jax.attend(
                *qkv, bias=bias, sinks=sinks, is_causal=True, q_offset=at, dropout=0.5, dropout_seed=seed[0],
                return_lse=True, implementation="triton",
            )  # fmt: skip
            return out.sum() + lse.sum()

        return jax.grad(loss, argnums=(0, 1, 2, 3, 4))(q, k, v, bias, sinks)

    mesh = jax.sharding.AbstractMesh((2,), ("x",))
    rows, all_of = PartitionSpec(None, None, "x"), PartitionSpec()  # each device has some queries, and all keys
    specs = rows, all_of, all_of, rows, all_of
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 4, 8, 16),) * 3 + ((1, 4, 8, 8), (4,))]
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=(*specs, PartitionSpec("x")), out_specs=specs)
    found = jax.eval_shape(sharded, *given, jax.ShapeDtypeStruct((2, 2), jnp.uint32))
    assert [x.shape for x in found] == [x.shape for x in given]


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

"""Calls of kernels, and compiling for a GPU that need not be there."""

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from attend_shared.call import Arrays, Call, check
from attend_shared.kernels.launch import Launch
from attend_torch.arrays import FRAMEWORK

LONG = {name: torch.empty(2, 4, 2048, 128, dtype=torch.bfloat16, device="meta") for name in "qkv"}


def call_of(call: Call | None = None, **options: Any) -> Call:
    x = torch.empty(2, 4, 96, 64, dtype=torch.bfloat16, device="meta")
    static = {name: options.pop(name, default) for name, default in
              (("is_causal", False), ("window_size", None), ("softcap", None), ("scale", None), ("dropout", 0.0),
               ("return_lse", False))}
    arrays = Arrays(**{"q": x, "k": x, "v": x} | options)
    return check(FRAMEWORK, arrays, *static.values(), "bhnd", None)._replace(platform="cuda")


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


def disassembled(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout

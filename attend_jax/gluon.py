"""Launching kernels in Gluon from JAX: jax-triton compiles and launches only those in Triton's own language.

What it compiles to is launched as jax-triton launches its own, by the custom call "triton_kernel_call" of jaxlib.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import jax

from attend_shared.kernels.launch import Blocks, Launch

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32", "int64": "i64"}
CUDA_TYPES = {"float16": 6, "float32": 7, "bfloat16": 9}  # CUtensorMapDataType
Pairs = tuple[tuple[str, Any], ...]


class Compiled(NamedTuple):
    """What Triton made of a kernel.

    Attributes:
        name: in the PTX.
        ptx: its code.
        warps: how many a program has, with those that have roles of their own.
        shared: bytes of shared memory.
        boxes: for each tensor descriptor how its blocks are swizzled, and the shape of what is loaded at once.
    """

    name: str
    ptx: str
    warps: int
    shared: int
    boxes: tuple[tuple[int, tuple[int, ...]], ...] = ()


@cache
def available() -> bool:
    """Whether this jaxlib has what launches them, which is none of its public parts, and takes what is given to it."""
    try:
        from jaxlib import gpu_triton

        kernel = gpu_triton.TritonKernel("", 4, 1, 0, "", "", 90)
        parameters = [
            gpu_triton.create_array_parameter(0, 16), gpu_triton.create_scalar_parameter(1, "i32"),
            _described(gpu_triton, Blocks((8, 64), (64, 1), (8, 64)), "bfloat16", (3, (8, 64))),
        ]  # fmt: skip
        gpu_triton.TritonKernelCall(kernel, 1, 1, 1, parameters).to_proto("", b"")
    except (ImportError, AttributeError, TypeError):
        return False
    taken = {*inspect.signature(jax.ffi.ffi_call).parameters}
    return {"custom_call_api_version", "legacy_backend_config", "input_output_aliases"} <= taken


def call(launch: Launch, inputs: Sequence[Any], outputs: Sequence[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    """The outputs of a launch of a kernel in Gluon."""
    dtypes = tuple(str(x.dtype) for x in (*inputs, *outputs))
    given = tuple((launch.blocks.get(name or ""), dtype) for name, dtype in zip(launch.inputs, dtypes, strict=False))
    made = compiled(launch, dtypes)
    numbers = tuple(x for x, one in zip(launch.given, fixed(launch), strict=True) if not one)
    config: Any = _encoded(made, launch.grid, numbers, given, len(outputs))  # bytes, as jax-triton's
    function = jax.ffi.ffi_call(
        "triton_kernel_call", outputs, custom_call_api_version=2, legacy_backend_config=config,
        input_output_aliases=launch.in_place,
    )  # fmt: skip
    return list(function(*inputs))


def fixed(launch: Launch) -> list[bool]:
    """Which numbers are fixed when it is compiled, as in torch: those that are 1, unless the kernel forbids it."""
    parameters = launch.function.params[len(launch.inputs) :]
    return [x == 1 and not each.do_not_specialize for x, each in zip(launch.given, parameters, strict=False)]


def compiled(launch: Launch, dtypes: Sequence[str]) -> Compiled:
    """A kernel compiled for compute capability 9.0, for inputs and then outputs of these dtypes."""
    from attend_shared.kernels import hopper

    pointers = ["*" + SHORT[dtype] for dtype in dtypes]
    for name, (_, _, block) in launch.blocks.items():
        n = launch.inputs.index(name)
        pointers[n] = f"tensordesc<{SHORT[dtypes[n]]}{list(block)},{hopper.block_layout(block, dtypes[n])!r}>"
    numbers = ["constexpr" if one else "fp32" if isinstance(x, float) else "i32"
               for x, one in zip(launch.given, fixed(launch), strict=True)]  # fmt: skip
    count = len(launch.inputs)
    kinds = (*pointers[:count], *numbers, *pointers[count:])
    return _compiled(launch.function, kinds, tuple(launch.constants.items()), launch.warps, launch.stages)


@lru_cache(maxsize=256)
def _compiled(function: Any, kinds: tuple[str, ...], constants: Pairs, warps: int, stages: int) -> Compiled:
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.experimental.gluon._runtime import GluonASTSource

    fixed = dict(constants)
    signature = dict(zip(function.arg_names, kinds, strict=False)) | dict.fromkeys(fixed, "constexpr")
    fixed |= {name: 1 for name, kind in zip(function.arg_names, kinds, strict=False) if kind == "constexpr"}
    aligned = {(n,): [["tt.divisibility", 16]] for n, kind in enumerate(kinds) if kind.startswith("*")}
    source = GluonASTSource(function, signature, fixed, aligned)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    options = backend.parse_options({"num_warps": warps, "num_stages": stages})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    code = source.make_ir(backend.target, options, functions, modules, context)
    passes: dict[str, Any] = {}
    backend.add_stages(passes, options, source.language)
    about: dict[str, Any] = dict(options.__dict__)
    for name in ("ttgir", "llir", "ptx"):
        code = passes[name](code, about)
    boxes = tuple((each["swizzle"], tuple(each["block_size"])) for each in about["tensordesc_meta"] or ())
    return Compiled(about["name"], code, about["num_warps"], about["shared"], boxes)


@lru_cache(maxsize=256)
def _encoded(
    made: Compiled, grid: tuple[int, int, int], numbers: tuple[int | float, ...],
    inputs: tuple[tuple[Blocks | None, str], ...], outputs: int,
) -> bytes:  # fmt: skip
    """The launch as jaxlib reads it; of each input its blocks, if it is given as a descriptor, and its dtype."""
    from jaxlib import gpu_triton

    kernel = gpu_triton.TritonKernel(made.name, made.warps, 1, made.shared, made.ptx, "", 90)
    array = gpu_triton.create_array_parameter(0, 16)
    boxes = iter(made.boxes)
    parameters = []
    for blocks, dtype in inputs:
        parameters.append(array if blocks is None else _described(gpu_triton, blocks, dtype, next(boxes)))
        if blocks is not None:  # which follow a descriptor, whether they are read or not
            parameters += [gpu_triton.create_scalar_parameter(x, "i32") for x in blocks.shape]
            parameters += [gpu_triton.create_scalar_parameter(x, "i64") for x in blocks.strides]
    parameters += [gpu_triton.create_scalar_parameter(x, "fp32" if isinstance(x, float) else "i32")
                   for x in numbers]  # fmt: skip
    parameters += [array] * outputs
    return zlib.compress(gpu_triton.TritonKernelCall(kernel, *grid, parameters).to_proto(made.name, b""))


def _described(library: Any, blocks: Blocks, dtype: str, box: tuple[int, tuple[int, ...]]) -> Any:
    swizzle, block = box
    return library.create_tma_descriptor_parameter(
        elem_type=CUDA_TYPES[dtype], swizzle=swizzle, shape=list(blocks.shape), strides=list(blocks.strides),
        block_shape=list(block), oob_fill=0,
    )  # fmt: skip

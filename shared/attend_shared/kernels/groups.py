"""What kernels in Gluon whose programs stay have in common: which tiles they go over, and two numbers in a word."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

ROWS = gl.constexpr(64)  # of a group of warps
FLOAT16 = gl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")
BFLOAT16 = gl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")
BOTH = gl.constexpr("mov.b32 {$0, $1}, $2;")


@gluon.jit
def tiles_of(blocks, N):
    """How many tiles a program has: one of each run of as many as there are programs, from either end in turn."""
    programs, me = gl.num_programs(0), gl.program_id(0)
    runs, rest = blocks * N // programs, blocks * N % programs
    return runs + gl.where(gl.where(runs % 2 == 0, me, programs - 1 - me) < rest, 1, 0)


@gluon.jit
def tile_of(k, N, blocks, together):
    """The k-th tile of a program: its item and head in one number, and its block, the first of so many heads first."""
    programs, me = gl.num_programs(0), gl.program_id(0)
    at = k * programs + gl.where(k % 2 == 0, me, programs - 1 - me)
    before = at // (together * blocks) * together
    heads = gl.minimum(together, N - before)
    at -= before * blocks
    return before + at % heads, at // heads


@gluon.jit
def fetch(array, item, head, first, place, loaded):
    """Begin to load rows of a head."""
    tma.async_copy_global_to_shared(array, [item, head, first, 0], loaded, place)


@gluon.jit
def in_words(x, dtype: gl.constexpr, COLUMNS: gl.constexpr):
    """Rounded, two in a word: the compiler would carry them unrounded to the turn that multiplies them."""
    low, up = x.reshape((ROWS, COLUMNS // 2, 2)).split()
    return gl.inline_asm_elementwise(
        BFLOAT16 if dtype == gl.bfloat16 else FLOAT16, "=r,f,f", [low, up], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def operand(words, acc, dtype: gl.constexpr, COLUMNS: gl.constexpr):
    """Such words as the left side of a product that is added to acc."""
    if dtype == gl.bfloat16:
        low, up = gl.inline_asm_elementwise(
            BOTH, "=h,=h,r", [words], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=1
        )
    else:
        low, up = gl.inline_asm_elementwise(
            BOTH, "=h,=h,r", [words], dtype=(gl.float16, gl.float16), is_pure=True, pack=1
        )
    return gl.convert_layout(gl.join(low, up).reshape((ROWS, COLUMNS)), gl.DotOperandLayout(0, acc.type.layout, 2))

"""FlashAttention's packages: what they take, in words, and how a call is put to them.

flash-attn-4 for torch and fa4-jax for JAX have the same kernels, FlashAttention-4's; dew-flash-attn-cu13 has
FlashAttention-3's for JAX. Which calls they may have is decided here, once; a framework's file moves data and calls.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

from packaging.version import Version

from attend_shared import runs
from attend_shared.call import Call

# Of heads. Between the first some kernels of FlashAttention-4 cannot be compiled, and others, of an odd number of 16s,
# have wrong gradients: dq is summed in blocks of 16 and read in blocks of 32. FlashAttention-3 fills its tiles up by
# itself, from rows whose bytes are a multiple of 16.
SIZES, EIGHTS = (32, 64, 96, 128, 192, 256), tuple(range(8, 257, 8))
CAPABILITY = (9, 0)
MOST = 65535  # items and heads, of which a grid has one block each
TILE = 128  # queries or keys that FlashAttention-3 adds at the most, filling up


class Package(NamedTuple):
    """One of the packages.

    Attributes:
        name: on PyPI.
        version: the one that was held against the contract. What is called in it is not its public face.
        extra: of this project, which installs it.
        needs: other packages that it needs, as (name, version).
        least: the same, where a later version will do.
        modules: what it imports that others install; nvidia-cutlass-dsl's lies on a path of its own.
        sizes: of heads, to which others are filled up.
        softcap, lengths: whether it has them.
        sinks: why it serves none, or None.
        lse: whether its lse has a gradient; else Triton's kernels make that.
        wide: whether it counts the numbers of an item in more than 32 bits.
    """

    name: str
    version: str
    extra: str
    needs: tuple[tuple[str, str], ...]
    modules: tuple[str, ...]
    softcap: bool
    sinks: str | None
    lse: bool
    least: tuple[tuple[str, str], ...] = ()
    sizes: tuple[int, ...] = SIZES
    lengths: bool = True
    wide: bool = True


FLASH_ATTN_4 = Package(
    "flash-attn-4", "4.0.0b36", "fa4", (), ("flash_attn", "cutlass", "quack", "tvm_ffi"), True, None, True
)
# jax-tvm-ffi 0.1.3 registers its targets where jaxlib does not look.
FA4_JAX = Package(
    "fa4-jax", "0.1.0", "fa4-jax", (("jax-tvm-ffi", "0.1.2"),), ("fa4_jax", "cutlass", "cutejax", "tvm_ffi"),
    False, "it has no sinks", False,
)  # fmt: skip
# On GPUs of other generations it has FlashAttention-2, which nobody held against the contract.
DEW_FLASH_ATTN = Package(
    "dew-flash-attn-cu13", "0.3.6", "fa3-jax", (), ("dew_flash_attn",), False, None, False,
    least=(("jax", "0.11.2"), ("jax-cuda13-plugin", "0.11.2")), sizes=EIGHTS, lengths=False, wide=False,
)  # fmt: skip


def missing(package: Package) -> str | None:
    """Why the package cannot be used, as far as can be seen without importing it, or None."""
    install = f'pip install "attend-twin[{package.extra}]"'
    exact = ((package.name, package.version), *package.needs)
    for name, wanted in (*exact, *package.least):
        try:
            found = version(name)
        except PackageNotFoundError:
            return f"it needs {name} {wanted}: {install}"
        if (name, wanted) in exact and Version(found) != Version(wanted):
            return f"it was proved with {name} {wanted}, not {found}: {install}"
        if Version(found) < Version(wanted):
            return f"it needs {name} {wanted} or later, not {found}: {install}"
    lost = [module for module in package.modules if find_spec(module) is None]
    if lost:
        return f"{package.name} is here, but Python finds no {' and no '.join(lost)}: {install}"
    return None


def wrong_device(capability: tuple[int, ...]) -> str | None:
    """Why the kernels must not run on an NVIDIA GPU of this compute capability, or None."""
    if capability == CAPABILITY:
        return None
    return f"it was proved on compute capability 9.0 (Hopper), and this GPU has {'.'.join(map(str, capability))}"


def refusal(call: Call, package: Package, kernels: Callable[[], str | None] = lambda: None) -> str | None:
    """Why the package cannot serve this call, or None.

    Args:
        kernels: why there are no Triton kernels, which make the gradients of sinks and of some lse, or None.
    """
    if call.dtype not in ("float16", "bfloat16"):
        return f"it takes float16 and bfloat16, not {call.dtype}"
    if max(call.d, call.dv) > package.sizes[-1]:
        return f"it takes head sizes of up to {package.sizes[-1]}, not {max(call.d, call.dv)}"
    if max(call.b, call.h) > MOST:
        return f"it takes up to {MOST} items and heads"
    if call.sequences > MOST:
        return f"it takes up to {MOST} segments"
    if not package.wide and _tiled(call) >= 2**31:
        return "it counts the numbers of an item in 32 bits, which these exceed"
    if call.mask is not None:
        return "it has no mask"
    if call.bias is not None:
        return "it has no bias"
    if call.segments and call.i != call.j:
        return ("it takes segments that lie one after the other, in q as in k, so q_len must be kv_len, not "
                f"{call.i} beside {call.j}")  # fmt: skip
    if call.segments and call.b > 1:
        return (f"it takes segments of one item, not of {call.b}, as a tile of packed keys may reach into the next "
                "item and bring NaN from there: put all in one row, with ids of their own")  # fmt: skip
    if call.segments and (call.q_lengths or call.kv_lengths):
        return "beside segments it has no lengths: give padding an id of its own instead"
    if not package.lengths and (call.q_lengths or call.kv_lengths):
        return "it has no lengths"
    if call.dropout:
        return "it has no dropout"
    if call.softcap is not None and not package.softcap:
        return "it has no softcap"
    if call.sinks is not None and package.sinks:
        return package.sinks
    if call.sinks not in (None, call.dtype):
        return f"its gradient of sinks is made of an out that is rounded to {call.dtype}, too coarse for {call.sinks}"
    if call.sinks is not None and call.gradient and (without := kernels()):
        return f"its gradient of sinks is made by Triton's kernels: {without}"
    if call.return_lse and call.gradient and not package.lse and (without := kernels()):
        return f"its gradient of lse is made by Triton's kernels: {without}"
    if call.return_lse and call.softcap is not None:
        return "its softcap is an approximate tanh, too coarse for an lse in float32"
    if call.scale <= 0:
        return "it looks for the largest logit before it scales, which takes a scale > 0"
    if call.offset == "data":
        return "it aligns causal and window with the last key, so q_offset must be the number 0 or kv_len - q_len"
    if call.positional and call.kv_lengths and not (call.one_length and call.i == call.j):
        return ("it counts causal and window from the end of each item's own lengths, which is right only where one "
                "array is both q_lengths and kv_lengths")  # fmt: skip
    return runs.REASONS.get(call.runs) if call.segments else None


def counted(call: Call) -> tuple[bool, bool]:
    """Whether q_lengths and kv_lengths are for the kernel to heed.

    Where positions count, q_lengths alone would move them: those rows are computed, and emptied afterwards.
    """
    return call.q_lengths and (call.kv_lengths or not call.positional), call.kv_lengths


def size(call: Call, package: Package) -> int:
    """The head size with which a package gets the call: for d and dv alike, with zeros behind q, k and v.

    Zeros behind q and k change no logit, and zeros behind v become columns of out that are cut off.
    """
    return next(each for each in package.sizes if each >= max(call.d, call.dv))


def _tiled(call: Call) -> int:
    """The most numbers that an item of an array has, as FlashAttention-3 fills them up: each run, and the whole."""
    size = next(each for each in (64, 128, 192, 256) if each >= max(call.d, call.dv))
    return call.h * (max(call.i, call.j) + TILE * (call.sequences + 1)) * size


def window(call: Call) -> tuple[int | None, int | None]:
    """(left, right) as the packages count: from a query t that sits at key t + kv_len - q_len, whatever q_offset is.

    With offset the call's own, t + offset - left = t + (kv_len - q_len) - left', and right likewise. Either may come
    out negative: then the query's own place is outside.

    Example:
        >>> from types import SimpleNamespace
        >>> call = SimpleNamespace(i=3, j=5, left=4, right=0, offset="zero")
        >>> window(call), window(SimpleNamespace(**vars(call) | {"offset": "end"}))
        ((6, -2), (4, 0))
    """
    ahead = call.j - call.i if call.offset == "zero" else 0
    left = None if call.left is None else call.left + ahead
    right = None if call.right is None else call.right - ahead
    return left, right


def reach(call: Call) -> tuple[slice, int]:
    """The queries that positions leave a key, and how many keys there are up to the last that any of them may see.

    For these alone `window` has no negative bound, which FlashAttention-3 would take for none.

    Example:
        >>> from types import SimpleNamespace
        >>> causal = {"left": None, "right": 0}
        >>> reach(SimpleNamespace(i=3, j=5, offset="zero", **causal))
        (slice(0, 3, None), 3)
        >>> reach(SimpleNamespace(i=5, j=3, offset="end", **causal))
        (slice(2, 5, None), 3)
    """
    at = call.j - call.i if call.offset == "end" else 0
    first = 0 if call.right is None else max(0, -at - call.right)
    last = call.i if call.left is None else min(call.i, call.j + call.left - at)
    keys = call.j if call.right is None else min(call.j, last + at + call.right)
    return slice(first, last), keys


def used(lengths: Any, length: int) -> Any:
    """Lengths as they act: from 0 to what there is."""
    return lengths.clip(0, length)


def starts(items: int, length: int) -> range:
    """Where each of the items starts in the array that holds them one after the other, and where the last one ends.

    Example:
        >>> list(starts(3, 10))
        [0, 10, 20, 30]
    """
    return range(0, items * length + 1, length)

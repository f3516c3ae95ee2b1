"""What a plan is made of: launches of kernels as data, and how the arrays that they are given lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

from attend_shared.call import FAR

LOG2E = math.log2(math.e)
Strides = tuple[int, ...]


class Output(NamedTuple):
    """An array that a launch writes: whole, but for `listed`, of which nobody reads the rest. One that is an input as
    well is written where it is, or left: of the two launches that have it one writes it, which is found on the device.

    Attributes:
        name: in the dictionary of arrays.
        shape: contiguous.
        dtype: its plain name.
        used: whether it is written at all; where it is not, any place will do.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    used: bool = True


class Blocks(NamedTuple):
    """An array as a tensor descriptor has it, which loads a block of it at once.

    Attributes:
        shape, strides: its own, in elements.
        block: the shape of a block.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]


class Launch(NamedTuple):
    """One launch of a kernel: kernel[grid](*inputs, *numbers, *outputs, **constants).

    Attributes:
        kernel: its name.
        grid: how many programs along each axis.
        inputs: names of arrays; None where the call has no such array, and any will do.
        numbers: ints and floats (float32).
        outputs: what it writes.
        constants: what is fixed when it is compiled.
        warps, stages: num_warps and num_stages.
        module: where it is: "attention", "gradients", "dropout", "bounds", "sinks", "hopper", "narrow", "queries" or
            "keys".
        blocks: inputs that are given as tensor descriptors, by their names.
    """

    kernel: str
    grid: tuple[int, int, int]
    inputs: tuple[str | None, ...]
    numbers: tuple[int | float, ...]
    outputs: tuple[Output, ...]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    module: str = "attention"
    blocks: Mapping[str, Blocks] = {}

    @property
    def function(self) -> Any:
        """The kernel itself.

        Triton's launcher tells the compiler which numbers are multiples of 16, and jax-triton does not; what is laid
        out by that has another order of its sums. So neither does: kernels say it, of lengths, by `visits.told`.
        """
        found = getattr(import_module(f"attend_shared.kernels.{self.module}"), self.kernel)
        parameters = getattr(found, "params", ())  # the interpreter's has none
        for parameter in parameters[len(self.inputs) : len(self.inputs) + len(self.numbers)]:
            parameter.do_not_specialize_on_alignment = True
        return found

    @property
    def given(self) -> tuple[int | float, ...]:
        """The numbers as launchers get them: 1.0 is 1, which both fix when they compile; jax-triton fixes 1.0 too."""
        return tuple(1 if x == 1 else x for x in self.numbers)

    @property
    def in_place(self) -> dict[int, int]:
        """Which inputs are where which outputs are written."""
        return {self.inputs.index(each.name): n for n, each in enumerate(self.outputs) if each.name in self.inputs}

    @property
    def gluon(self) -> bool:
        """Whether it is in Gluon."""
        return self.module in ("hopper", "narrow", "queries", "keys")


class Layout(NamedTuple):
    """How the arrays of a call lie in memory: strides in elements, by the canonical axes, the last of q, k, v being 1.

    Attributes:
        q, k, v: (b, h, n).
        mask, bias: (b, h, i, j), 0 where an axis is 1; or None.
        offset: 0 where q_offset is a number (`at`), 1 where it is an array (), 2 where it is (b,).
        at: q_offset where it is a number.
        one_id: whether q_segment_ids and kv_segment_ids are the same array.
        capability: the compute capability of the GPU, such as "9.0": what tiles fit it, how float32 is multiplied.
        gluon: whether this GPU runs the kernels in Gluon; the rows of what those take must begin at multiples of 16
            bytes.
    """

    q: Strides
    k: Strides
    v: Strides
    mask: Strides | None = None
    bias: Strides | None = None
    offset: int = 0
    at: int = 0
    one_id: bool = False
    capability: str = "9.0"
    gluon: bool = False


class Tile(NamedTuple):
    """Sizes of a kernel's blocks, of queries and of keys, with its warps and stages."""

    queries: int
    keys: int
    warps: int
    stages: int


def padded(n: int) -> int:
    """The size of a tile that holds n, a power of 2."""
    return max(16, 1 << (n - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def far(x: int) -> int:
    """A bound, no further than counts."""
    return max(-FAR, min(FAR, x))

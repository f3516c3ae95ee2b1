"""How torch launches Triton's kernels.

A call of a short sequence takes longer to launch than to run, and Triton's own launcher looks at each of 60 to 90
arguments anew. So each call does only what may differ from the last: memory for results, addresses, the stream. All
else is looked up by what it hangs on. Launches go one of three ways, of which each needs what the one before it found:

- one by one, as Triton launches (`_Kernel`): in its interpreter, and where devices, dtypes or the alignment of arrays
  are new, for which it compiles;
- together, by what that compiled (`run`): arrays by name, of a call that was planned;
- together, with a caller's arrays as they came (`Alike`): nothing is planned, for a call with such strides was. Where
  all are aligned and on the current device, and kernels took them where they lay: none was copied or converted.

The last two call Triton's C launcher where that has the form that is known here and no profiler listens, else what
Triton's own calls do (`_launcher`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from attend_shared.kernels import cache_folder
from attend_shared.kernels.launch import Blocks, Launch
from attend_shared.kernels.sizes import INTERPRETED
from attend_torch.tape import current_device, empty_on, picks

Tensor = torch.Tensor
Launcher = Callable[[int, bool, Sequence[Any], Sequence[int]], None]
STRIDES = 64  # of arrays of calls alike


class _Kernel:
    """One launch, as Triton does it.

    Attributes:
        made: name, shape, strides and dtype of each array that it makes.
        outputs: names of these, in the places of its results.
        constants: their values, in its order.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.kernel = launch.function
        self.made = tuple((x.name, x.shape, _contiguous(x.shape), getattr(torch, x.dtype))
                          for x in launch.outputs if x.used and x.name not in launch.inputs)  # fmt: skip
        self.outputs = tuple(x.name if x.used else self.made[0][0] for x in launch.outputs)
        self.constants = tuple(launch.constants[name] for name in self.kernel.arg_names if name in launch.constants)

    def __call__(self, arrays: dict[str, Tensor]) -> Any:
        """Run it on the current device, its outputs put among the arrays, and give what was compiled for it."""
        launch, any_array = self.launch, arrays.get("q")
        for name, *how in self.made:
            arrays[name] = _empty(*how)
        inputs: list[Any] = [any_array if name is None else arrays[name] for name in launch.inputs]
        for name, blocks in launch.blocks.items():
            inputs[launch.inputs.index(name)] = _descriptor(arrays[name], blocks)
        return self.kernel[launch.grid](
            *inputs, *launch.given, *(arrays[name] for name in self.outputs), **launch.constants,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip


class Kernels(tuple[_Kernel, ...]):
    """Launches in order.

    Attributes:
        names: of the arrays that they take.
        made: of those that they make, in order.
        compiled: how each is launched, by the device and by dtypes and alignment of what they take.
        sent: how all of them are, by the same.
    """

    def __new__(cls, launches: Sequence[Launch]) -> Kernels:
        return super().__new__(cls, map(_Kernel, launches))

    def __init__(self, launches: Sequence[Launch]) -> None:
        self.made = tuple(name for kernel in self for name, *_ in kernel.made)
        names: dict[str, None] = {}
        made: set[str] = set()
        for kernel in self:
            names |= {name: None for name in kernel.launch.inputs if name is not None and name not in made}
            made |= {name for name, *_ in kernel.made}
        self.names = tuple(names)
        self.compiled: dict[tuple, list[Launcher]] = {}
        self.sent: dict[tuple, _Sent] = {}


def run(kernels: Kernels, arrays: dict[str, Tensor]) -> None:
    """Run them in order, their outputs put among the arrays, all of which are on one device."""
    if INTERPRETED:
        for kernel in kernels:
            kernel(arrays)
        return
    given = [arrays[name] for name in kernels.names]
    device, driver = given[0].get_device(), _driver()
    if device != driver.device():
        with torch.cuda.device(device):
            return run(kernels, arrays)
    places, odd = [0], 0  # 0: of what the call has not got
    for x in given:
        places.append(place := x.data_ptr())
        odd |= place
    key: tuple = device, *[x.dtype for x in given]
    if odd & 15:
        key = *key, *[place & 15 == 0 for place in places]
    sent = kernels.sent.get(key)
    if sent is not None:
        arrays.update(zip(kernels.made, sent(driver, device, given, places), strict=True))
        return
    cache_folder.restore()
    kernels.compiled[key] = compiled = [_launcher(kernel(arrays), kernel) for kernel in kernels]
    place_of: dict[str | None, int] = {None: 0} | {name: n for n, name in enumerate(kernels.names, 1)}
    kernels.sent[key] = _sent(kernels, compiled, place_of, len(places), kernels.made)


_Sent = Callable[["_Driver", int, list[Any], list[int]], Sequence[Any]]


def _sent(
    kernels: Kernels, compiled: Sequence[Launcher], place: dict[str | None, int], count: int,
    ends: Sequence[str | None],
) -> _Sent:  # fmt: skip
    """(driver, device, arrays, [0, *their addresses]) -> ends: launch them all. Both lists grow.

    Args:
        kernels: to launch.
        compiled: how each is launched, its arrays given as addresses.
        place: of the addresses of their arrays, and of 0, among `count`.
        ends: names of what they made, None for what there is not.
    """
    place, steps = dict(place), []
    for kernel, launch in zip(kernels, compiled, strict=True):
        inputs = picks([place[name] for name in kernel.launch.inputs])
        described = tuple((kernel.launch.inputs.index(name), place[name] - 1, blocks)
                          for name, blocks in kernel.launch.blocks.items())  # fmt: skip
        for name, *_ in kernel.made:
            place[name], count = count, count + 1
        made = tuple(each[1:] for each in kernel.made)
        steps.append((launch, inputs, described, made, picks([place[name] for name in kernel.outputs])))
    pick = picks([place[name] - 1 for name in ends])  # None is last

    def sent(driver: _Driver, device: int, arrays: list[Any], places: list[int]) -> Sequence[Any]:
        stream, heard = driver.stream(device), _is_heard(driver.knobs.runtime)
        for launch, inputs, described, made, results in steps:
            given: Any = inputs(places)
            if described:
                given = list(given)
                for n, at, blocks in described:
                    given[n] = _Source(arrays[at], blocks.shape, blocks.strides)
            for each in made:
                arrays.append(x := _empty(*each))
                places.append(x.data_ptr())
            launch(stream, heard, given, results(places))
        arrays.append(None)
        return pick(arrays)

    return sent


class Alike:
    """Calls that are alike but for strides: what arrays of these launch is found once.

    Attributes:
        names: of the arrays of such a call, each of which it may lack; numbers may stand among them.
        found: how arrays are sent off, by device, strides and what else differs; None where they cannot be.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.found: dict[tuple, _Sent | None] = {}

    def send(self, arrays: Iterable[Any], *more: Hashable) -> tuple[Sequence[Any] | None, tuple | None]:
        """The ends of a call that was kept, as they lie in memory, else None; and its key, None if it has none.

        Args:
            arrays: as the caller has them, in the order of the names.
            more: what else launches hang on.
        """
        given: list[Any] = []
        places, odd = [0], 0
        for x in arrays:
            if x is not None and x.__class__ is not int:
                given.append(x)
                places.append(place := x.data_ptr())
                odd |= place | x.is_neg()
        if odd & 15:
            return None, None
        device = given[0].get_device()
        key = device, *more, *[x.stride() for x in given]
        sent, driver = self.found.get(key), _driver()
        if sent is None or device != driver.device():
            return None, key
        return sent(driver, device, given, places), key

    def send_three(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Sequence[Any] | None, tuple | None]:
        """The same for three that are not negated lazily, written out: in a loop it takes 1.2 times as long."""
        device, places = q.get_device(), [0, q.data_ptr(), k.data_ptr(), v.data_ptr()]
        if (places[1] | places[2] | places[3]) & 15:
            return None, None
        key = device, q.stride(), k.stride(), v.stride()
        sent, driver = self.found.get(key), _driver()
        if sent is None or device != driver.device():
            return None, key
        return sent(driver, device, [q, k, v], places), key

    def keep(
        self, key: tuple | None, arrays: Iterable[Any], kernels: Kernels, known: dict[str, Tensor],
        ends: Sequence[str | None],
    ) -> None:  # fmt: skip
        """Keep what was launched for such arrays.

        Args:
            key: of `send`.
            arrays: as there.
            kernels: they ran.
            known: the arrays that they had and made.
            ends: names of what they made, in the order of the ends, None for what there is not.
        """
        if key is None or key in self.found:
            return
        if len(self.found) >= STRIDES:
            self.found.clear()
        self.found[key] = None
        given = [(name, x) for name, x in zip(self.names, arrays, strict=True) if isinstance(x, Tensor)]
        places: dict[str | None, int] = {None: 0}
        for name in kernels.names:
            its = known[name]
            fields = (name, *(("q_segment_ids", "kv_segment_ids") if name.endswith("segment_ids") else ()))
            for place, (field, x) in enumerate(given, 1):
                if field in fields and x.data_ptr() == its.data_ptr() and x.dtype == its.dtype:
                    places[name] = place
            if name not in places:
                return
        compiled = kernels.compiled[key[0], *[known[name].dtype for name in kernels.names]]
        self.found[key] = _sent(kernels, compiled, places, 1 + len(given), ends)


class _Source(NamedTuple):
    """What Triton's launcher makes a tensor descriptor of."""

    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str = "zero"


def _descriptor(x: Tensor, blocks: Blocks) -> Any:
    """The same, with all that Triton looks at when it compiles."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from attend_shared.kernels import hopper

    layout = hopper.block_layout(blocks.block, str(x.dtype).removeprefix("torch."))
    return TensorDescriptor(x, list(blocks.shape), list(blocks.strides), list(blocks.block), layout)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of an array that lies row by row."""
    strides = [1]
    for n in shape[:0:-1]:
        strides.append(strides[-1] * n)
    return tuple(strides[::-1])


_empty = empty_on("cpu" if INTERPRETED else "cuda")

# What Triton's C launcher takes before a kernel's own arguments: grid (3), stream, function, whether the launch is
# cooperative, whether it is dependent, two places of scratch memory, metadata, what hooks are told, two hooks.
KNOWN_FORM = "iiiKKppOOOOOO"


def _launcher(compiled: Any, kernel: _Kernel) -> Launcher:
    """(stream, heard, inputs, results) -> None: launch what Triton compiled, its arrays given as addresses.

    By its C launcher, where that has the form that is known here and nobody listens; else as Triton's own calls do.
    """
    from triton.backends.nvidia import driver

    grid, numbers, constants = kernel.launch.grid, kernel.launch.given, kernel.constants
    public, run = compiled[grid], compiled.run
    known = type(run) is driver.CudaLauncher and getattr(driver, "_BASE_ARGS_FORMAT", None) == KNOWN_FORM
    if not known or run.global_scratch_size or run.profile_scratch_size:
        return lambda stream, _, inputs, results: public(*inputs, *numbers, *results, *constants, stream=stream)
    launch, behind = run.launch, (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None,
                                  compiled.packed_metadata, None, None, None)  # fmt: skip

    def direct(stream: int, heard: bool, inputs: Sequence[Any], results: Sequence[int]) -> None:
        if heard:
            public(*inputs, *numbers, *results, *constants, stream=stream)
        else:
            launch(*grid, stream, *behind, *inputs, *numbers, *results, *constants)

    return direct


class _Driver(NamedTuple):
    """What gives the current device, and the current stream of a device, and where Triton keeps its hooks."""

    device: Callable[[], int]
    stream: Callable[[int], int]
    knobs: Any


@cache
def _driver() -> _Driver:
    from triton import knobs
    from triton.runtime import driver

    return _Driver(current_device, driver.active.get_current_stream, knobs)


def _is_heard(runtime: Any) -> bool:
    """Whether a profiler wants to be told of launches: whether there is a hook, other than a chain of none."""
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    if enter is not None and getattr(enter, "calls", True):
        return True
    return leave is not None and bool(getattr(leave, "calls", True))

"""Triton kernels for every clause, launched here as they are in JAX: the same bits in both.

The kernels and what a call launches are `attend_shared.kernels`. Here are the memory, the launches and the operator
that a compiler takes whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from attend_shared import meaning
from attend_shared.call import Arrays, Call, canonical
from attend_shared.kernels import plan as plans
from attend_shared.kernels.plan import BOUNDS, SAVED, Blocks, Launch, Layout
from attend_torch.arrays import is_traced, is_watched, needs_gradients
from attend_torch.implementations import blockwise, einsum, rowwise
from attend_torch.implementations.blockwise import COUNT, FLOATS
from attend_torch.machine import capability
from attend_torch.tape import current_device, empty_on, picks

Tensor = torch.Tensor
INSTALLED = find_spec("triton") is not None


def unavailable() -> str | None:
    """Why Triton's kernels cannot run here, or None."""
    return _unavailable()


unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in attend_torch.attend


def missing() -> str | None:
    """Why there are no Triton kernels at all, or None."""
    return None if INSTALLED else 'it needs Triton: pip install "attend-twin[triton]"'


@cache
def _unavailable() -> str | None:
    if without := missing():
        return without
    if plans.INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "it needs an NVIDIA GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs an NVIDIA GPU of compute capability 8.0 or later"
    return None


def refusal(call: Call) -> str | None:
    """Why Triton's kernels cannot serve this call, or None."""
    if call.platform != ("cpu" if plans.INTERPRETED else "cuda"):
        return "it runs on an NVIDIA GPU"
    return plans.refusal(call)


def attend(call: Call, arrays: Arrays) -> tuple[Tensor, Tensor]:
    """out (b h i dv) in q's dtype, and lse (b h i) in float32. Differentiable once, in reverse."""
    if call.is_empty:
        return einsum.attend(call, arrays)
    if is_traced(arrays.q):  # what looks on takes the operator whole
        offset = _offset(call, arrays)
        arrays = arrays if isinstance(arrays.q_offset, Tensor) else arrays._replace(q_offset=None)
        options = call.left, call.right, offset, call.scale, call.softcap, call.dropout
        out, lse, *_ = torch.ops.attend_torch.triton(*arrays, *options)
    elif is_watched():
        out, lse, *_ = _Attend.apply(call, *arrays)
    elif needs_gradients(arrays):
        out, lse = _Eager.apply(call, arrays, None, arrays.q, arrays.k, arrays.v, arrays.bias, arrays.sinks)
    else:
        _, known = _forward(call, arrays, True)
        out, lse = known["out"], known["lse"]
    return out, lse


def plain(call: Call) -> Callable[[Tensor, Tensor, Tensor], Any] | None:
    """(q, k, v) -> what `attend` of the library returns, for calls of nothing else, or None.

    What arrays of these strides launch is found once, and then sent off with their addresses.
    """
    if call.is_empty or plans.INTERPRETED:
        return None
    if call.gradient:
        recorded = _recorded(call, partial(canonical, call))
        return lambda q, k, v: recorded(Arrays(q, k, v))
    with_lse = call.return_lse
    found: dict[tuple, _Shortened | None] = {}

    def result(q: Tensor, k: Tensor, v: Tensor) -> Any:
        device, places = q.get_device(), [0, q.data_ptr(), k.data_ptr(), v.data_ptr()]
        key = device, q.stride(), k.stride(), v.stride()
        known, driver = found.get(key), _driver()
        if known is not None and not (places[1] | places[2] | places[3]) & 15 and device == driver.device():
            launch, ends = known
            values: list[Any] = [q, k, v]
            launch(driver.stream(device), _is_heard(driver.knobs.runtime), values, places)
            out, lse = ends(values)
            return (out, lse) if with_lse else out
        arrays = Arrays(q, k, v)
        plan, by_name = _forward(call, canonical(call, arrays), True)
        if not (places[1] | places[2] | places[3]) & 15:
            if len(found) >= STRIDES:
                found.clear()
            found[key] = _shortened(plan.alone, _tensors(arrays), by_name, ("out", "lse"))
        out = _turned(call, by_name["out"])
        return (out, by_name["lse"]) if with_lse else out

    return result


attend.plain = plain  # type: ignore[attr-defined]


class _Alike:
    """Calls that are alike but for strides: what arrays of these launch is found once.

    Attributes:
        call: at which nothing looks on.
        canonical: what gives arrays their one form.
        ends: names of what is given back, as it lies.
        alone: as in `Plan`.
    """

    def __init__(
        self, call: Call, canonical: Callable[[Arrays], Arrays], ends: Sequence[str], alone: bool = False
    ) -> None:
        self.call, self.canonical, self.ends, self.alone = call, canonical, ends, alone
        self.found: dict[tuple, _Shortened | None] = {}

    def __call__(self, arrays: Arrays) -> Sequence[Any]:
        """The ends; None for those that there are not."""
        given: list[Any] = []
        places, odd = [0], 0
        for x in arrays:
            if x is not None and x.__class__ is not int:
                given.append(x)
                places.append(place := x.data_ptr())
                odd |= place | x.is_neg()
        device = given[0].get_device()
        key = device, arrays.q_segment_ids is arrays.kv_segment_ids, *[x.stride() for x in given]
        found, driver = self.found.get(key), _driver()
        if found is not None and not odd & 15 and device == driver.device():
            launch, pick = found
            launch(driver.stream(device), _is_heard(driver.knobs.runtime), given, places)
            given.append(None)
            return pick(given)
        plan, known = _forward(self.call, self.canonical(arrays), self.alone)
        ends = _given(plan, known, self.ends)
        if not odd & 15 and key not in self.found:
            if len(self.found) >= STRIDES:
                self.found.clear()
            self.found[key] = _shortened(plan.ahead(self.alone), _tensors(arrays), known, ends)
        out = _turned(self.call, known["out"])
        return tuple(None if name is None else out if name == "out" else known[name] for name in ends)

    def back(
        self, arrays: Arrays, saved: Sequence[Tensor | None], dout: Tensor, dlse: Tensor | None,
        wanted: Sequence[bool],
    ) -> Sequence[Tensor | None]:  # fmt: skip
        """As `_gradients`, where a call of this came before."""
        given: list[Any] = []
        places, odd = [0], 0
        for x in (*arrays, *saved, dout, dlse):
            if x is not None and x.__class__ is not int:
                given.append(x)
                places.append(place := x.data_ptr())
                odd |= place | x.is_neg()
        device = dout.get_device()
        one_id = arrays.q_segment_ids is arrays.kv_segment_ids
        key = "back", device, wanted, dlse is None, one_id, *[x.stride() for x in given]
        found, driver = self.found.get(key), _driver()
        if found is None or odd & 15 or device != driver.device():
            kernels, known = _backward(self.call, arrays, saved, dout, dlse, wanted)
            if not odd & 15 and key not in self.found:
                if len(self.found) >= STRIDES:
                    self.found.clear()
                named = {**dict(zip(SAVED, saved, strict=True)), "dout": dout, "dlse": dlse}
                named = {**_tensors(arrays), **{name: x for name, x in named.items() if x is not None}}
                ends = [name if wants else None for name, wants in zip(GRADIENTS, wanted, strict=True)]
                self.found[key] = _shortened(kernels, named, known, ends)
            return _found(self.call, known, wanted)
        launch, pick = found
        launch(driver.stream(device), _is_heard(driver.knobs.runtime), given, places)
        given.append(None)
        gradients = pick(given)
        if self.call.layout == "bnhd":
            return [x if x is None or n > 2 else _turned(self.call, x) for n, x in enumerate(gradients)]
        return gradients


def short(call: Call, canonical: Callable[[Arrays], Arrays]) -> Callable[[Arrays], Any] | None:
    """(arrays as the caller has them) -> what `attend` of the library returns, where nothing looks on, or None.

    Args:
        call: any.
        canonical: what gives arrays their one form.
    """
    if call.is_empty or plans.INTERPRETED:
        return None
    if call.gradient:
        return _recorded(call, canonical)
    with_lse, alike = call.return_lse, _Alike(call, canonical, ("out", "lse"), True)

    def result(arrays: Arrays) -> Any:
        out, lse = alike(arrays)
        return (out, lse) if with_lse else out

    return result


def _recorded(call: Call, canonical: Callable[[Arrays], Arrays]) -> Callable[[Arrays], Any]:
    """The same where autograd is to know."""
    with_lse, alike = call.return_lse, _Alike(call, lambda arrays: arrays, SAVED)

    def result(arrays: Arrays) -> Any:
        arrays = canonical(arrays)
        out, lse = _Eager.apply(call, arrays, alike, arrays.q, arrays.k, arrays.v, arrays.bias, arrays.sinks)
        out = _turned(call, out)
        return (out, lse) if with_lse else out

    return result


attend.short = short  # type: ignore[attr-defined]

STRIDES = 64  # of arrays of calls alike
_Sent = Callable[[int, bool, list[Any], list[int]], None]
_Shortened = tuple[_Sent, Callable[[list[Any]], Sequence[Any]]]


def _shortened(
    kernels: Kernels, given: Mapping[str, Any], known: dict[str, Tensor], ends: Sequence[str | None]
) -> _Shortened | None:
    """How launches that ran are sent off with a caller's own arrays, and what then picks the ends; last of all is None.

    Args:
        kernels: they ran.
        given: the caller's arrays by name, in order; all begin at a multiple of 16 bytes.
        known: those that the kernels had and made.
        ends: names of what they made.

    Returns:
        None where what they had lies elsewhere than the caller's, or they cannot be sent.
    """
    places: dict[str | None, int] = {None: 0}
    for name in kernels.names:
        its = known[name]
        fields = (name, *(("q_segment_ids", "kv_segment_ids") if name.endswith("segment_ids") else ()))
        for place, (field, x) in enumerate(given.items(), 1):
            if field in fields and x.data_ptr() == its.data_ptr() and x.dtype == its.dtype:
                places[name] = place
        if name not in places:
            return None
    launch = _sent(kernels, places, 1 + len(given), known, known["q"].get_device())
    if launch is None:
        return None
    order: dict[str | None, int] = {None: -1} | {name: n for n, name in enumerate(kernels.made, len(given))}
    return launch, picks([order[name] for name in ends])


def _tensors(arrays: Arrays) -> dict[str, Tensor]:
    """Those that there are, by name."""
    return {name: x for name, x in zip(Arrays._fields, arrays, strict=True) if isinstance(x, Tensor)}


def _given(plan: _Plan, known: Mapping[str, Tensor], ends: Sequence[str]) -> list[str | None]:
    """The ends, None for those that there are not, and for bounds that the way back finds anew."""
    return [name if name in known and (name not in BOUNDS or name in plan.bounds) else None for name in ends]


def _sent(
    kernels: Kernels, place: dict[str | None, int], count: int, known: dict[str, Tensor], device: int
) -> _Sent | None:
    """(stream, heard, arrays, [0, *their addresses]) -> None: launch what was compiled for arrays that are aligned, and
    put what it makes behind them, as in `Kernels.made`.

    Args:
        kernels: which have run.
        place: of the addresses of their arrays, and of 0, among `count`.
        known: these arrays, and what was made of them.
        device: where.

    Returns:
        None where one of them was not compiled for such.
    """
    place, steps = dict(place), []
    for kernel in kernels:
        aligned = (True,) * (1 + len(kernel.given))
        launch = kernel.compiled.get((device, *(known[name].dtype for name in kernel.given), *aligned))
        if launch is None:
            return None
        inputs = picks([place[name] for name in kernel.launch.inputs])
        described = tuple((n, place[name] - 1, blocks) for n, name, blocks in kernel.described)
        for name, *_ in kernel.made:
            place[name], count = count, count + 1
        made = tuple(each[1:] for each in kernel.made)
        steps.append((launch, inputs, described, made, picks([place[name] for name in kernel.outputs])))

    def sent(stream: int, heard: bool, arrays: list[Any], places: list[int]) -> None:
        for launch, inputs, described, made, results in steps:
            given: Any = inputs(places)
            if described:
                given = list(given)
                for n, at, blocks in described:
                    given[n] = _source(arrays[at], blocks)
            for each in made:
                arrays.append(x := _empty(*each))
                places.append(x.data_ptr())
            launch(stream, heard, given, results(places))

    return sent


GRADIENTS = tuple(f"d{Arrays._fields[place]}" for place in FLOATS)
COMPILED = len(SAVED) - len(BOUNDS)  # of them are what the operator gives: the way back finds the bounds anew


class _Eager(torch.autograd.Function):
    """(call, arrays, how they are sent off or None, *those of them that have gradients) -> out, lse.

    For no transformation: a Function that has them looks its signature up each time it is called, and what else the way
    back needs would have to be among its results. Each of those, and each argument, costs time.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, arrays: Arrays, alike: _Alike | None, *_: Any) -> tuple[Tensor | None, ...]:
        if alike is None:
            output = _saved(*_forward(call, arrays))
        else:
            out, *others = alike(arrays)
            output = _turned(call, out), *others
        _keep(ctx, call, arrays, output)
        ctx.alike = alike
        return output[:2]

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
        return None, None, None, *_way_back(ctx, ctx.needs_input_grad[3:], dout, dlse, ctx.alike)


class _Attend(torch.autograd.Function):
    """(call, *arrays) -> out, lse, and what else the way back needs. For transformations."""

    @staticmethod
    def forward(call: Call, *arrays: Any) -> tuple[Tensor, ...]:
        return _whole(arrays[0], _saved(*_forward(call, Arrays(*arrays))))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.mark_non_differentiable(*output[2:])
        _keep(ctx, inputs[0], Arrays(*inputs[1:]), output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: Any) -> tuple:
        result: list[Tensor | None] = [None] * COUNT
        wanted = [ctx.needs_input_grad[1 + place] for place in FLOATS]
        for place, gradient in zip(FLOATS, _way_back(ctx, wanted, dout, dlse), strict=True):
            result[place] = gradient
        return None, *result

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        return rowwise.each_lane(_Attend.apply, info, in_dims, inputs)


def _keep(ctx: Any, call: Call, arrays: Arrays, output: Sequence[Tensor | None]) -> None:
    at = None if isinstance(arrays.q_offset, Tensor) else arrays.q_offset
    ctx.call, ctx.at = call, at  # a number is not for save_for_backward
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(arrays if at is None else arrays._replace(q_offset=None)), *output)


def _way_back(
    ctx: Any, wanted: Sequence[bool], dout: Tensor | None, dlse: Tensor | None, alike: _Alike | None = None
) -> Sequence[Tensor | None]:
    """The gradients of those that have some, None where they are not wanted."""
    tensors = ctx.saved_tensors
    arrays, saved = Arrays(*tensors[:COUNT]), tensors[COUNT:]
    if ctx.at is not None:
        arrays = arrays._replace(q_offset=ctx.at)
    dout = torch.zeros_like(saved[0]) if dout is None else dout
    if torch.is_grad_enabled() or is_watched():
        gradients = iter(_Gradients.apply(ctx.call, wanted, *arrays, *saved, dout, dlse))
        return [next(gradients) if wants else None for wants in wanted]
    if alike is not None:
        return alike.back(arrays, saved, dout, dlse, wanted)
    return _gradients(ctx.call, arrays, saved, dout, dlse, wanted)


def _wanted_gradients(call: Call, wanted: Sequence[bool], *inputs: Any) -> tuple[Tensor, ...]:
    """Those that are wanted, of (*arrays, *saved, dout, dlse)."""
    *saved, dout, dlse = inputs[COUNT:]
    gradients = _gradients(call, Arrays(*inputs[:COUNT]), saved, dout, dlse, wanted)
    return tuple(x for x in gradients if x is not None)


_Gradients = rowwise.first_only("triton", _wanted_gradients)


def _offset(call: Call, arrays: Arrays) -> int:
    """q_offset where it is a number."""
    if isinstance(arrays.q_offset, Tensor):
        return 0
    return meaning.offset_of(call, arrays)


def _rows(x: Tensor) -> Tensor:
    """x, its last axis contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _is_aligned(x: Tensor) -> bool:
    """Whether each row of x begins at a multiple of 16 bytes, in a place of its own."""
    a, b, c, _ = x.stride()
    return x.data_ptr() % 16 == 0 and (a | b | c) % 8 == 0 and c > 0


def _aligned(x: Tensor) -> Tensor:
    """The same numbers where they are: where an array lies must not decide which kernel it gets."""
    return x if _is_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def _strides(x: Tensor | None) -> tuple[int, ...] | None:
    """Strides of what broadcasts: 0 along axes of size 1."""
    return None if x is None else tuple(0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))


class _Source(NamedTuple):
    """What Triton's launcher makes a tensor descriptor of."""

    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str = "zero"


def _source(x: Tensor, blocks: Blocks) -> _Source:
    return _Source(x, blocks.shape, blocks.strides)


def _descriptor(x: Tensor, blocks: Blocks) -> Any:
    """The same, with all that Triton looks at when it compiles."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from attend_shared.kernels import hopper

    layout = hopper.block_layout(blocks.block, str(x.dtype).removeprefix("torch."))
    return TensorDescriptor(x, list(blocks.shape), list(blocks.strides), list(blocks.block), layout)


# A call of a short sequence takes longer to launch than to run. What follows does in each call only what may differ
# from the last: memory for results, addresses, the stream. All else is found by looking up what it hangs on.


class _Kernel:
    """One launch, and what Triton compiled it to, by what it looks at: devices, dtypes and whether arrays are aligned.

    Triton's own launcher looks at each argument anew, which takes many times as long as the launch.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.kernel = launch.function
        self.given = tuple({name: None for name in launch.inputs if name is not None})
        self.made = tuple((x.name, x.shape, _contiguous(x.shape), getattr(torch, x.dtype))
                          for x in launch.outputs if x.used and x.name not in self.given)  # fmt: skip
        self.outputs = tuple(x.name if x.used else self.made[0][0] for x in launch.outputs)
        self.constants = tuple(launch.constants[name] for name in self.kernel.arg_names if name in launch.constants)
        order = [None, *self.given, *(name for name, *_ in self.made)]
        self.inputs, self.results = (picks([*map(order.index, names)]) for names in (launch.inputs, self.outputs))
        self.described = tuple((launch.inputs.index(name), name, blocks) for name, blocks in launch.blocks.items())
        self.compiled: dict[tuple, Callable[[int, bool, tuple, tuple], None]] = {}

    def __call__(self, arrays: dict[str, Tensor], device: int, stream: int, heard: bool) -> None:
        """Run it on the current device, its outputs put among the arrays. heard: as in `_is_heard`."""
        given = [arrays[name] for name in self.given]
        places = [0, *[x.data_ptr() for x in given]]  # 0: of what the call has not got
        key = (device, *[x.dtype for x in given], *[place % 16 == 0 for place in places])
        for name, shape, strides, dtype in self.made:
            arrays[name] = made = _empty(shape, strides, dtype)
            places.append(made.data_ptr())
        launch = self.compiled.get(key)
        if launch is None:
            self._compile(arrays, key)
        else:
            inputs = self.inputs(places)
            if self.described:
                inputs = self._described(inputs, arrays, _source)
            launch(stream, heard, inputs, self.results(places))

    def _described(self, inputs: Sequence[Any], arrays: dict[str, Tensor], make: Callable[..., Any]) -> tuple:
        """The inputs, some of them by what a tensor descriptor is made of."""
        described = list(inputs)
        for n, name, blocks in self.described:
            described[n] = make(arrays[name], blocks)
        return tuple(described)

    def _compile(self, arrays: dict[str, Tensor], key: tuple) -> None:
        """Run it as Triton's launcher does, and keep what that compiled."""
        launch, any_array = self.launch, arrays.get("q")
        inputs = [any_array if name is None else arrays[name] for name in launch.inputs]
        compiled = self.kernel[launch.grid](
            *self._described(inputs, arrays, _descriptor), *launch.given,
            *(arrays[name] for name in self.outputs), **launch.constants,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
        if not plans.INTERPRETED:
            self.compiled[key] = _launcher(compiled, launch, self.constants)


class Kernels(tuple[_Kernel, ...]):
    """Launches in order, and how they are sent off together where all arrays are aligned, by devices and dtypes.

    Attributes:
        names: of the arrays that they take.
        made: of those that they make, in order.
    """

    def __new__(cls, launches: Sequence[Launch]) -> Kernels:
        return super().__new__(cls, map(_Kernel, launches))

    def __init__(self, launches: Sequence[Launch]) -> None:
        self.made = tuple(name for kernel in self for name, *_ in kernel.made)
        names: dict[str, None] = {}
        made: set[str] = set()
        for kernel in self:
            names |= {name: None for name in kernel.given if name not in made}
            made |= {name for name, *_ in kernel.made}
        self.names = tuple(names)
        self.sent: dict[tuple, _Sent] = {}


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of an array that lies row by row."""
    strides = [1]
    for n in shape[:0:-1]:
        strides.append(strides[-1] * n)
    return tuple(strides[::-1])


_empty = empty_on("cpu" if plans.INTERPRETED else "cuda")

# What Triton's C launcher takes before a kernel's own arguments: grid (3), stream, function, whether the launch is
# cooperative, whether it is dependent, two places of scratch memory, metadata, what hooks are told, two hooks.
KNOWN_FORM = "iiiKKppOOOOOO"


def _launcher(compiled: Any, what: Launch, constants: tuple) -> Callable[[int, bool, tuple, tuple], None]:
    """(stream, heard, inputs, results) -> None: launch what Triton compiled, its arrays given as addresses.

    By its C launcher, where that has the form that is known here and nobody listens; else as Triton's own calls do.
    """
    from triton.backends.nvidia import driver

    grid, numbers = what.grid, what.given
    public, run = compiled[grid], compiled.run
    known = type(run) is driver.CudaLauncher and getattr(driver, "_BASE_ARGS_FORMAT", None) == KNOWN_FORM
    if not known or run.global_scratch_size or run.profile_scratch_size:
        return lambda stream, _, inputs, results: public(*inputs, *numbers, *results, *constants, stream=stream)
    launch, behind = run.launch, (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None,
                                  compiled.packed_metadata, None, None, None)  # fmt: skip

    def direct(stream: int, heard: bool, inputs: tuple, results: tuple) -> None:
        if heard:
            public(*inputs, *numbers, *results, *constants, stream=stream)
        else:
            launch(*grid, stream, *behind, *inputs, *numbers, *results, *constants)

    return direct


class _Plan:
    """A plan, ready to run."""

    def __init__(self, call: Call, layout: Layout) -> None:
        plan = plans.plan(call, layout)
        inputs = {name for launch in plan.forward for name in launch.inputs}
        self.names = [name for name in _SMALL if name in inputs]
        self.bounds = plan.bounds
        self.aligned = plan.aligned
        self.forward = Kernels(plan.forward)
        self.alone = self.forward if plan.alone is plan.forward else Kernels(plan.alone)
        self.backward = lru_cache(maxsize=64)(lambda *how: Kernels(plan.backward(*how)))

    def ahead(self, alone: bool) -> Kernels:
        """What is launched on the way forward. alone: there is none back."""
        return self.alone if alone else self.forward


@lru_cache(maxsize=1024)
def _plan(
    call: Call, q: tuple, k: tuple, v: tuple, mask: tuple | None, bias: tuple | None, offset: int, at: int, one_id: bool
) -> _Plan:
    """For arrays of these strides; the others as in `Layout`."""
    gluon = plans.runs_gluon(capability())
    return _Plan(call, Layout(q[:3], k[:3], v[:3], mask, bias, offset, at, one_id, capability(), gluon))


_SMALL = ("q_offset", "q_segment_ids", "kv_segment_ids", "q_lengths", "kv_lengths", "sinks", "dropout_seed")


def _prepare(call: Call, arrays: Arrays) -> tuple[_Plan, dict[str, Tensor]]:
    """What the call launches, and its arrays by name."""
    q, k, v, mask, bias, at, q_ids, kv_ids, *_ = arrays
    of_q, of_k, of_v = q.stride(), k.stride(), v.stride()
    if not of_q[3] == of_k[3] == of_v[3] == 1:
        q, k, v = _rows(q), _rows(k), _rows(v)
        of_q, of_k, of_v = q.stride(), k.stride(), v.stride()
    known = {"q": q, "k": k, "v": v}
    if mask is not None:
        known["mask"] = mask
    if bias is not None:
        known["bias"] = bias
    offset = 0
    if at is None:
        at = 0
    elif isinstance(at, Tensor):
        offset, at = at.ndim + 1, 0
    plan = _plan(call, of_q, of_k, of_v, _strides(mask), _strides(bias), offset, at, q_ids is kv_ids)
    if plan.aligned and not all(map(_is_aligned, (q, k, v))):  # what is copied is
        return _prepare(call, arrays._replace(q=_aligned(q), k=_aligned(k), v=_aligned(v)))
    for name in plan.names:
        known[name] = getattr(arrays, name).contiguous()
    return plan, known


def ready(launches: Sequence[Launch]) -> Kernels:
    """Launches of another implementation, for `run`."""
    return Kernels(launches)


def run(kernels: Kernels, arrays: dict[str, Tensor]) -> None:
    """Run them in order, their outputs put among the arrays, all of which are on one device."""
    if plans.INTERPRETED:
        for kernel in kernels:
            kernel(arrays, -1, 0, False)
        return
    given = [arrays[name] for name in kernels.names]
    device, driver = given[0].get_device(), _driver()
    if device != driver.device():
        with torch.cuda.device(device):
            return run(kernels, arrays)
    stream, heard = driver.stream(device), _is_heard(driver.knobs.runtime)
    places, any_place = [0], 0
    for x in given:
        places.append(at := x.data_ptr())
        any_place |= at
    if any_place & 15:
        for kernel in kernels:
            kernel(arrays, device, stream, heard)
        return
    key = device, *[x.dtype for x in given]
    launch = kernels.sent.get(key)
    if launch is not None:
        launch(stream, heard, given, places)
        arrays.update(zip(kernels.made, given[len(kernels.names) :], strict=True))
        return
    for kernel in kernels:
        kernel(arrays, device, stream, heard)
    place: dict[str | None, int] = {None: 0} | {name: n for n, name in enumerate(kernels.names, 1)}
    launch = _sent(kernels, place, len(places), arrays, device)
    if launch is not None:
        kernels.sent[key] = launch


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


def _turned(call: Call, x: Tensor) -> Tensor:
    """(b h n d) of what lies as the caller laid it out, or the opposite."""
    return x.transpose(1, 2) if call.layout == "bnhd" else x


def _forward(call: Call, arrays: Arrays, alone: bool = False) -> tuple[_Plan, dict[str, Tensor]]:
    """What was launched, and its arrays by name: inputs and outputs, out (b h i dv) among them. alone: as in `Plan`."""
    plan, known = _prepare(call, arrays)
    run(plan.ahead(alone), known)
    known["out"] = _turned(call, known["out"])
    return plan, known


def _saved(plan: _Plan, known: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    """Those of `SAVED`, None where the way back does not need them."""
    return tuple(None if name is None else known[name] for name in _given(plan, known, SAVED))


def _whole(nothing: Tensor, output: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The output, an empty array in the place of each that there is not, for those who take arrays alone."""
    return tuple(nothing.new_empty(0, dtype=torch.float32) if x is None else x for x in output)


def _gradients(
    call: Call, arrays: Arrays, saved: Sequence[Tensor | None], dout: Tensor, dlse: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of `FLOATS`, None for those that are not wanted. saved: as `SAVED`, or its head."""
    _, known = _backward(call, arrays, saved, dout, dlse, wanted)
    return _found(call, known, wanted)


def _backward(
    call: Call, arrays: Arrays, saved: Sequence[Tensor | None], dout: Tensor, dlse: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Kernels, dict[str, Tensor]]:  # fmt: skip
    """What was launched, and its arrays by name."""
    plan, known = _prepare(call, arrays)
    for name, x in zip(SAVED, saved, strict=False):
        if x is not None and x.numel():
            known[name] = x
    dout = _rows(dout.resolve_neg())
    known["out"], known["dout"] = _turned(call, known["out"]), _aligned(dout) if plan.aligned else dout
    if dlse is not None:
        known["dlse"] = dlse.resolve_neg().contiguous()
    has_bounds = bool(plan.bounds) and all(name in known for name in plan.bounds)
    kernels = plan.backward(known["dout"].stride()[:3], wanted[3], dlse is not None, has_bounds)
    run(kernels, known)
    return kernels, known


def _found(call: Call, known: dict[str, Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of `FLOATS`, None for those that are not wanted."""
    found = [known[name] if wants else None for name, wants in zip(GRADIENTS, wanted, strict=True)]
    if call.layout == "bnhd":
        found[:3] = [None if x is None else _turned(call, x) for x in found[:3]]
    return found


# The operators, for compilers: triton(*arrays, *options), and triton_gradients(*arrays, *saved, wants_bias, *options).


def _operator(*inputs: Any) -> tuple[Tensor, ...]:
    found = _saved(*_forward(*blockwise.canonical(inputs[:COUNT], *inputs[COUNT:])))
    return _whole(inputs[0], found[:COMPILED])


def _operator_fake(*inputs: Any) -> tuple[Tensor, ...]:
    data = Arrays(*inputs[:COUNT])
    q, v = data.q, data.v
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    finer = q.dtype != torch.float32 and any(x is not None and x.dtype != q.dtype for x in (data.bias, data.sinks))
    b, h, i = q.shape[:3]
    rows = plans.padded_rows(i)
    plain = data.bias is None and data.sinks is None
    shapes = (b, h, i), (b, h, rows), (0,) if plain else (b, h, rows), out.shape if finer else (0,)
    saved = [q.new_empty(shape, dtype=torch.float32) for shape in (*shapes, (0,))]
    if inputs[-1]:
        call, _ = blockwise.canonical(inputs[:COUNT], *inputs[COUNT:])
        if plans.keeps_drawn(call):
            saved[-1] = q.new_empty(plans.drawn_shape(call), dtype=torch.int32)
    return out, *saved


def _operator_gradients(*inputs: Any) -> tuple[Tensor, ...]:
    """dq, dk, dv, dbias and dsinks, the last two of shape (0,) where there are none or they are not wanted."""
    behind = COUNT + COMPILED
    saved, (dout, dlse, wants_bias) = inputs[COUNT:behind], inputs[behind : behind + 3]
    call, arrays = blockwise.canonical(inputs[:COUNT], *inputs[behind + 3 :])
    wanted = True, True, True, wants_bias, arrays.sinks is not None
    gradients = _gradients(call, arrays, saved, dout, dlse, wanted)
    return tuple(dout.new_empty(0) if x is None else x for x in gradients)


def _operator_gradients_fake(*inputs: Any) -> tuple[Tensor, ...]:
    data, wants_bias = Arrays(*inputs[:COUNT]), inputs[COUNT + COMPILED + 2]
    nothing = data.q.new_empty(0)
    dbias = data.bias.new_empty(data.bias.shape) if wants_bias else nothing
    dsinks = nothing if data.sinks is None else data.sinks.new_empty(data.sinks.shape)
    return *(x.new_empty(x.shape) for x in data[:3]), dbias, dsinks


def _keep_operator(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.options = inputs[COUNT:]
    ctx.save_for_backward(*inputs[:COUNT], *output)


def _derive(ctx: Any, dout: Tensor, dlse: Tensor, *_: Any) -> tuple:
    wants_bias = ctx.needs_input_grad[FLOATS[3]]
    gradients = torch.ops.attend_torch.triton_gradients(*ctx.saved_tensors, dout, dlse, wants_bias, *ctx.options)
    result: list[Tensor | None] = [None] * (COUNT + len(ctx.options))
    for place, gradient in zip(FLOATS, gradients, strict=True):
        result[place] = gradient if ctx.needs_input_grad[place] else None
    return tuple(result)


_FIVE, _SIX = ("(" + ", ".join(["Tensor"] * n) + ")" for n in (5, 6))
_TENSORS = ", ".join(f"Tensor {name}" for name in (*SAVED[:COMPILED], "dout", "dlse"))
_LIBRARY = torch.library.Library("attend_torch", "FRAGMENT")
_LIBRARY.define(f"triton({blockwise.ARRAYS}, {blockwise.OPTIONS}) -> {_SIX}")
_LIBRARY.define(
    f"triton_gradients({blockwise.ARRAYS}, {_TENSORS}, bool wants_bias, {blockwise.OPTIONS}) -> {_FIVE}"
)
for _name, _function, _fake in (
    ("triton", _operator, _operator_fake),
    ("triton_gradients", _operator_gradients, _operator_gradients_fake),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attend_torch::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("attend_torch::triton", _derive, setup_context=_keep_operator, lib=_LIBRARY)

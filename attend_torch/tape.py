"""A package's function at the cost of the kernels that it launches.

Between its arguments and its kernels such a function decides which kernels they are and what memory they need, anew in
each call, for longer than a short call runs. All of that hangs on shapes, strides, dtypes and options. So a call that
looks like one before it is recorded: which kernels were launched, with which of its arrays, memory and constants in
which places. Calls that look the same after that launch the same.

Nothing of the package is changed. What is recorded runs in a copy of its functions, which find there, in the place of
each cache of compiled kernels, one that writes down what is launched, while torch tells what else is done with arrays.
A call that does more with one than to look at it in another way, copy it or make memory is not taken for a list of
launches, and is left to the package, as is a function of another form.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Tensor = torch.Tensor
Values = list[Any]
CACHE = "compile_cache"  # the attribute under which functions of the package keep what they compiled
KEPT = 4096  # recordings
NEW, LEFT = "new", "left"  # a call that looks like none before it, and those that are left to the package

_aten = torch.ops.aten
_MEMORY = {
    _aten.empty.memory_format: False, _aten.empty_strided.default: False, _aten.empty_like.default: False,
    _aten.new_empty.default: False, _aten.zeros.default: True, _aten.zeros_like.default: True,
}  # fmt: skip
"""What makes memory, and whether it is of zeros."""
_VIEWS = {_aten.transpose.int, _aten.squeeze.dim, _aten.unsqueeze.default, _aten.detach.default}
"""What looks at memory in another way."""


class Tapes:
    """Recordings of one function, by what its calls look like.

    Attributes:
        tapes: for what calls look like `NEW`, `LEFT`, or how they are played: (arrays) -> results.
    """

    def __init__(self, call: Callable[..., tuple[Tensor | None, ...]]) -> None:
        """call: (function, arrays, options) -> results, where the function is the package's, or acts as it does."""
        self.call = call
        self.tapes: dict[Hashable, Any] = {}

    def __call__(
        self, function: Any, arrays: Sequence[Tensor | None], options: tuple, alike: Hashable
    ) -> tuple[Tensor | None, ...]:
        """What the call gives.

        Args:
            function: the package's.
            arrays: the first on the device that the call runs on.
            options: constants.
            alike: what options and the shapes and dtypes of arrays hang on, or these themselves.
        """
        device = arrays[0].get_device()  # type: ignore[union-attr]
        if device >= 0 and device != current_device():
            with torch.cuda.device(device):
                return self(function, arrays, options, alike)
        given = [x for x in arrays if x is not None]
        places = [x.data_ptr() for x in given]
        # Kernels are compiled for alignment; and where arrays are one, it cannot be told which of them was meant.
        key = (function, device, alike, *[x.stride() for x in given], *[at & 15 for at in places],
               *map(places.index, places))  # fmt: skip
        tape = self.tapes.get(key)
        if tape is None or tape is LEFT:
            results = self.call(function, arrays, options)  # which compiles what was not compiled before
            if tape is None:
                if len(self.tapes) >= KEPT:
                    self.tapes.clear()
                self.tapes[key] = NEW
            return results
        if tape is NEW:
            results, self.tapes[key] = _recorded(self.call, function, arrays, options)
            return results
        return tape(arrays)


def _recorded(
    call: Callable[..., tuple], function: Any, arrays: Sequence[Tensor | None], options: tuple
) -> tuple[tuple, Any]:
    """What the call gives, and its recording, or `LEFT`, or `NEW` where it compiled."""
    tape = _Tape(arrays)
    heard = _heard(function, tape)
    if heard is None:
        return call(function, arrays, options), LEFT
    with tape:
        results = call(heard, arrays, options)
    return results, tape.played(results)


def _heard(function: Any, tape: _Tape) -> Any:
    """A copy of the function, and of those of its module that it may call, which tell the tape what they launch."""
    if not isinstance(function, FunctionType) or not hasattr(function, CACHE):
        return None
    module, its_name = function.__globals__, function.__name__
    if module.get(its_name) is not function:
        return None
    copies = dict(module)
    for name, each in module.items():
        if isinstance(each, FunctionType) and each.__globals__ is module:
            copy = FunctionType(each.__code__, copies, each.__name__, each.__defaults__, each.__closure__)
            copy.__kwdefaults__ = each.__kwdefaults__
            vars(copy).update(vars(each))
            if hasattr(each, CACHE):
                setattr(copy, CACHE, _Cache(getattr(each, CACHE), tape))
            copies[name] = copy
    return copies[its_name]


class _Cache:
    """The package's cache of what it compiled, which gives kernels that are heard."""

    def __init__(self, cache: Any, tape: _Tape) -> None:
        self.cache, self.tape = cache, tape

    def __contains__(self, key: Any) -> bool:
        return key in self.cache

    def __setitem__(self, key: Any, kernel: Any) -> None:
        self.cache[key] = kernel
        self.tape.compiled = True

    def __getitem__(self, key: Any) -> Callable[..., Any]:
        kernel = self.cache[key]
        return lambda *given, **named: self.tape.launch(kernel, given, named)


class _Value(int):
    """The place of an array among the values that a tape is played with."""


class _Step(NamedTuple):
    """What a tape does at once.

    Attributes:
        kind: of `_KINDS`.
        taken: what it takes: places of values, and constants.
        how: what else it is made of.
        made: the place of the value that it adds, or None.
    """

    kind: str
    taken: tuple
    how: tuple
    made: int | None


class _Tape(TorchDispatchMode):
    """What a call launches, and what memory it makes."""

    def __init__(self, arrays: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.values: list[Tensor | None] = list(arrays)  # all kept, so that no two have the same address
        self.count = len(arrays)
        self.roots: dict[int, int] = {}  # of what each view is one
        self.steps: list[_Step] = []
        self.fits, self.launching, self.compiled = True, False, False

    def __torch_dispatch__(self, function: Any, types: Any, given: tuple = (), named: dict | None = None) -> Any:
        found = function(*given, **(named or {}))
        if self.launching:  # what hands an array over may look at it in another way
            return found
        if (zeros := _MEMORY.get(function)) is not None:
            self._add("memory", (), (tuple(found.shape), found.stride(), found.dtype, zeros, found.is_cuda), found)
        elif function in _VIEWS:
            self._view(given[0], found)
        elif function is _aten.clone.default:
            self._add("clone", (self._place(given[0]),), (named or {},), found)
        else:
            self.fits = False
        return found

    def _add(self, kind: str, taken: tuple, how: tuple, value: Any) -> Any:
        self.steps.append(_Step(kind, taken, how, len(self.values)))
        self.values.append(value)
        return _Value(len(self.values) - 1)

    def _view(self, of: Tensor, found: Tensor) -> None:
        """Write down what is looked at in another way; of what was given, without the gradient that it may need."""
        place = self._place(of)
        if place is not None and (place < self.count or (found.shape, found.stride()) != (of.shape, of.stride())):
            root: Any = self.roots.get(place, place)
            offset = found.storage_offset() - self.values[root].storage_offset()
            self.roots[self._add("view", (root,), (tuple(found.shape), found.stride(), offset), found)] = root

    def launch(self, kernel: Any, given: tuple, named: dict) -> Any:
        """Run a kernel, and write it down."""
        if named:
            self.fits = False
        placed = tuple(map(self._placed, given))
        self.steps.append(_Step("launch", placed, (kernel,), None))
        self.launching = True
        try:
            return kernel(*given, **named)
        finally:
            self.launching = False

    def _placed(self, x: Any) -> Any:
        """An argument, arrays as the places of the values that they are."""
        if isinstance(x, Tensor):
            return self._place(x)
        if isinstance(x, tuple):
            inner = tuple(map(self._placed, x))
            return self._add("tuple", inner, (type(x),), None) if any(isinstance(n, _Value) for n in inner) else x
        if x is not None and type(x) not in (bool, int, float, str):
            self.fits = False
        return x

    def _place(self, x: Tensor) -> Any:
        at = x.data_ptr()
        for n, value in reversed([*enumerate(self.values)]):
            if value is not None and at and value.data_ptr() == at and (value.dtype, value.shape, value.stride()) == (
                x.dtype, x.shape, x.stride()
            ):  # fmt: skip
                return _Value(n)
        self.fits = False
        return None

    def played(self, results: Sequence[Tensor | None]) -> Any:
        """(arrays) -> results, by what was written down; or `LEFT` or `NEW`."""
        ends = tuple(None if x is None else self._place(x) for x in results)
        self.values.clear()  # what was copied to be heard is a circle, and forgotten late
        if self.compiled or not self.fits:
            return NEW if self.compiled else LEFT
        taken = [x for step in self.steps if step.kind != "view" for x in step.taken]
        used = {x for x in (*taken, *ends) if isinstance(x, _Value)}
        steps = [step for step in self.steps if step.kind != "view" or step.made in used]
        given = [*(step.taken for step in steps), ends]
        constants = [x for each in given for x in each if not isinstance(x, _Value)]
        order = [*range(self.count), *(step.made for step in steps if step.made is not None)]
        place_of = {n: len(constants) + place for place, n in enumerate(order)}
        numbers = iter(range(len(constants)))
        places = [[place_of[x] if isinstance(x, _Value) else next(numbers) for x in each] for each in given]
        run = tuple(_KINDS[step.kind](at, *step.how) for step, at in zip(steps, places[:-1], strict=True))
        last = picks(places[-1])

        def play(arrays: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
            values = [*constants, *arrays]
            for step in run:
                step(values)
            return last(values)

        return play


def picks(places: Sequence[int]) -> Callable[[Values], tuple]:
    """What takes the values at these places of a list."""
    if len(places) == 1:
        (at,) = places
        return lambda values: (values[at],)
    return itemgetter(*places) if places else lambda values: ()


# What a tape does, step by step, with all values that there are by then: constants, arrays, and what steps add.


def _memory(
    _: Sequence[int], shape: tuple, strides: tuple, dtype: torch.dtype, zeros: bool, cuda: bool
) -> Callable[[Values], Any]:
    empty = _EMPTY[cuda]
    if zeros:
        return lambda values: values.append(empty(shape, strides, dtype).zero_())
    return lambda values: values.append(empty(shape, strides, dtype))


def _view(places: Sequence[int], shape: tuple, strides: tuple, offset: int) -> Callable[[Values], Any]:
    (at,) = places
    return lambda values: values.append(_reinterpret(values[at], shape, strides, offset))


def _clone(places: Sequence[int], named: dict[str, Any]) -> Callable[[Values], Any]:
    (at,) = places
    return lambda values: values.append(values[at].detach().clone(**named))


def _tuple(places: Sequence[int], kind: type) -> Callable[[Values], Any]:
    make, take = getattr(kind, "_make", kind), picks(places)
    return lambda values: values.append(make(take(values)))


def _launch(places: Sequence[int], kernel: Callable[..., Any]) -> Callable[[Values], Any]:
    take = picks(places)
    return lambda values: kernel(*take(values))


_KINDS: dict[str, Callable[..., Callable[[Values], Any]]] = {
    "memory": _memory, "view": _view, "clone": _clone, "tuple": _tuple, "launch": _launch
}  # fmt: skip


# What compiled programs take, at a third of the cost of what the language has for it.


def _guards(name: str) -> Any:
    return getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), name, None)


def empty_on(kind: str) -> Callable[[tuple, tuple, torch.dtype], Tensor]:
    """(shape, strides, dtype) -> memory on the current device of this kind: "cuda" or "cpu"."""
    found = _guards(f"_empty_strided_{kind}")
    return found or (lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=kind))


_EMPTY = {True: empty_on("cuda"), False: empty_on("cpu")}
_reinterpret: Callable[[Tensor, tuple, tuple, int], Tensor] = _guards("_reinterpret_tensor") or (
    lambda x, shape, strides, offset: x.detach().as_strided(shape, strides, x.storage_offset() + offset)
)
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)

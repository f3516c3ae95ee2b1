"""score_fn and mask_fn as programs: traced for one pair, in a form that a compiler of kernels takes.

A kernel needs a function of numbers, whose operations are known and one by one. So a function is traced as JAX traces
it: for one pair, without data. What does not depend on the pair comes before it, as plain torch, and has its gradient
there. What does is source over torch's operators, equal to any other that does the same, whichever function it came
from; what it reads of arrays comes to it as inputs, one for every place where it reads one.

Tracing takes milliseconds. It is left out where a function is known to be what another was: the same code, over numbers
that are equal, functions of which that is true, and arrays of the same kind. Nothing of what was captured is kept.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from attend_shared.call import Call
from attend_torch.arrays import custom

Tensor = torch.Tensor
NAMES = "score_fn", "mask_fn"
KEPT = 256  # programs
PAIR = "score", "b", "h", "q_index", "kv_index"
aten = torch.ops.aten
SHAPES = {  # which change the shape of what is one number, and nothing else
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.permute.default, aten.transpose.int,
    aten.alias.default, aten.clone.default, aten.lift_fresh.default, aten.lift_fresh_copy.default,
}  # fmt: skip
MAKERS = {aten.scalar_tensor.default, aten.full_like.default, aten.zeros_like.default, aten.ones_like.default}
LARGE = 4096
PLACES = "device", "layout", "pin_memory", "memory_format"  # arguments that say nothing about a number


class Untraceable(Exception):
    """A function is not a program, for the reason that is given in words."""


class Program(NamedTuple):
    """What a function does to one pair.

    Attributes:
        before: source of `before(*captured) -> inputs`, in torch: what does not depend on the pair.
        pair: source of `pair(score, b, h, q_index, kv_index, *inputs)`, of numbers, or of arrays that broadcast.
        reads: which of `PAIR` it depends on.
        of_pairs: which inputs are read at an index that both the query and the key decide, or the score: once a pair.
        reads_floats, holds_large: whether it reads floats, and whether it holds a number beyond `LARGE`: without either
            what it gives is large only where an index or a score is.
    """

    before: str
    pair: str
    reads: frozenset[str]
    of_pairs: tuple[int, ...]
    reads_floats: bool
    holds_large: bool


class Lifted(NamedTuple):
    """A program, and the tensors that its function captured, in the order in which `before` takes them."""

    program: Program
    captured: tuple[Tensor, ...]

    def inputs(self) -> tuple[Tensor, ...]:
        """What the program reads, made of what was captured; differentiable."""
        return function(self.program.before, "before")(*self.captured)


@functools.lru_cache(maxsize=KEPT)
def function(source: str, name: str) -> Callable[..., Any]:
    """The function of this name in the source."""
    names: dict[str, Any] = {"torch": torch, "inf": float("inf"), "nan": float("nan")}
    exec(compile(source, f"<{name}>", "exec"), names)  # its text was written here, below
    return names[name]


def lift(call: Call) -> tuple[Lifted | None, Lifted | None]:
    """The score_fn and the mask_fn of a call, None where there is none.

    Raises:
        Untraceable: one of them is not a program.
        TypeError, ValueError: one of them gives something else than it should, in the words of every implementation.
    """
    lifted = [None if getattr(call, name) is None else _lift(call, name) for name in NAMES]
    return lifted[0], lifted[1]


def _lift(call: Call, name: str) -> Lifted:
    tensors: list[Tensor] = []
    try:
        key = _key(getattr(call, name), tensors)
    except _Unknown:
        program, constants = _trace(call, name, None)
        return Lifted(program, tuple(constants))
    asked = _Asked(name, key, call, tensors)
    try:
        program = _known(asked)
    finally:
        asked.behind = None
    if name == "score_fn" and "score" not in program.reads:  # whether its result has a shape for each pair
        with _fake_mode():
            _check(call._replace(mask_fn=None), _device(call, tensors))
    return Lifted(program, tuple(tensors))


class _Unknown(Exception):
    """Something of which it cannot be told whether it is what it was."""


class _Asked:
    """The key of a function in `_known`, and, until it is found, the function."""

    def __init__(self, name: str, key: Hashable, call: Call, tensors: list[Tensor]) -> None:
        self.name, self.key = name, (name, call.accumulation, call.platform, key)
        self.behind: tuple[Call, list[Tensor]] | None = (call, tensors)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Asked) and self.key == other.key


@functools.lru_cache(maxsize=KEPT)
def _known(asked: _Asked) -> Program:
    assert asked.behind is not None
    call, tensors = asked.behind
    return _trace(call, asked.name, tensors)[0]


SIMPLE = (bool, int, str, bytes, complex, type(None), torch.dtype, torch.device, type(...))
PURE = ("torch", "numpy", "math", "operator", "builtins", "_operator")  # modules whose functions stay what they are


def _key(value: Any, tensors: list[Tensor]) -> Hashable:
    """What is equal for values that make no difference to a trace; the tensors among them are listed, each once.

    Raises:
        _Unknown: it cannot be told.
    """
    kind = type(value)
    if kind in SIMPLE:
        return kind, value
    if kind is float:
        return repr(value)  # which tells 0.0 from -0.0, and is equal for NaN
    if kind in (Tensor, torch.nn.Parameter, FakeTensor):
        place = next((n for n, x in enumerate(tensors) if x is value), len(tensors))
        if place == len(tensors):
            tensors.append(value)
        return kind, place, value.dtype, tuple(value.shape), value.device, value.requires_grad
    if kind is tuple:
        return kind, *(_key(x, tensors) for x in value)
    if kind is types.FunctionType:
        try:
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
        except ValueError:  # not filled yet
            raise _Unknown from None
        named = [value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__]
        given = (value.__defaults__, tuple(sorted((value.__kwdefaults__ or {}).items())))
        return value.__code__, *(_key(x, tensors) for x in (*given, *cells, *named))
    if kind is functools.partial:
        return kind, _key((value.func, value.args, tuple(sorted(value.keywords.items()))), tensors)
    if kind is types.ModuleType and value.__name__.split(".")[0] in PURE:
        return kind, value.__name__
    module = getattr(value, "__module__", None)
    if (kind is type or kind is types.BuiltinFunctionType) and (module or "builtins").split(".")[0] in PURE:
        return kind, module, getattr(value, "__qualname__", None), id(value)
    raise _Unknown


def _names(code: types.CodeType) -> list[str]:
    """The names that code, and code inside it, may look up among globals."""
    inner = [x for x in code.co_consts if isinstance(x, types.CodeType)]
    return [*code.co_names, *(name for each in inner for name in _names(each))]


class _Grad(TorchFunctionMode):
    """Notices when it is said for which operations a graph is recorded: a trace does not tell."""

    said = False

    def __torch_function__(self, function: Any, _: Any, arguments: Any = (), options: Any = None) -> Any:
        self.said |= function is torch._C._set_grad_enabled
        return function(*arguments, **(options or {}))


def _trace(call: Call, name: str, tensors: Sequence[Tensor] | None) -> tuple[Program, list[Tensor]]:
    """The program of a function, over these tensors; without them, over those that it reads, which are given back."""
    device, wide = _device(call, tensors), getattr(torch, call.accumulation)
    is_score = name == "score_fn"
    others: dict[str, Any] = {other: None for other in NAMES if other != name}
    mode = _fake_mode()
    refusal = f"FlexAttention cannot follow {name}:"
    watch = _Grad()

    def one(*pair: Tensor) -> Any:
        result = getattr(call, name)(*pair)
        if isinstance(result, Tensor) and _own_gradient(result):
            raise Untraceable(f"{refusal} it has gradients of its own making")
        return result

    try:
        with torch.inference_mode(False), torch.enable_grad(), mode:
            _check(call._replace(**others), device)
            pair = [torch.empty((1, 1, 1, 1), dtype=torch.int64, device=device) for _ in range(4)]
            if is_score:
                pair.insert(0, torch.empty((1, 1, 1, 1), dtype=wide, device=device, requires_grad=True))
            with watch:
                graph = make_fx(one, tracing_mode="real", _allow_non_fake_inputs=True)(*pair)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise Untraceable(f"{refusal} it looks at what arrays hold") from error
    if watch.said:
        raise Untraceable(f"{refusal} it says itself what has a gradient")
    graph.graph.eliminate_dead_code()
    constants = {node.name: _constant(graph, node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    if tensors is None and not any(isinstance(x, FakeTensor) for x in constants.values()):
        tensors = list({id(x): x for x in constants.values()}.values())
    places = {id(x): n for n, x in enumerate(tensors or ())}
    if tensors is None or any(id(x) not in places for x in constants.values()):
        raise Untraceable(f"{refusal} it makes arrays that it could capture")
    names = {node: f"c{places[id(constants[node.name])]}" for node in graph.graph.nodes if node.op == "get_attr"}
    return _render(graph.graph, PAIR if is_score else PAIR[1:], names, len(tensors), refusal), list(tensors)


def _fake_mode() -> FakeTensorMode:
    """Arrays without data: as they are made here already, or in a mode of its own."""
    return detect_fake_mode() or FakeTensorMode(allow_non_fake_inputs=True)


def _device(call: Call, tensors: Sequence[Tensor] | None) -> torch.device:
    """Where a call runs, as far as is known."""
    return next((x.device for x in tensors or () if x.device.type == call.platform), torch.device(call.platform))


def _check(call: Call, device: torch.device) -> None:
    """Raise what `custom` does, for all pairs."""
    wide = getattr(torch, call.accumulation)
    custom(call, torch.empty((call.b, call.h, call.i, call.j), dtype=wide, device=device), None)


def _constant(module: Any, target: str) -> Tensor:
    for part in target.split("."):
        module = getattr(module, part)
    return module


def _own_gradient(result: Tensor) -> bool:
    """Whether the graph behind a tensor has a step that was written in Python."""
    todo, seen = [result.grad_fn], set()
    while todo:
        step = todo.pop()
        if step is None or step in seen:
            continue
        seen.add(step)
        if isinstance(step, torch.autograd.function.BackwardCFunction):
            return True
        todo += [before for before, _ in step.next_functions]
    return False


def _render(graph: Graph, pair: Sequence[str], names: dict[Node, str], captured: int, refusal: str) -> Program:
    """The source of a graph."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    names |= zip(placeholders, pair, strict=True)
    varies = set(placeholders)
    behind: dict[Node, set[str]] = {node: {names[node]} for node in placeholders}  # what a node depends on
    before, lines, inputs, of_pairs = [], [], [], []
    reads_floats = holds_large = False

    def text(value: Any) -> str:
        if isinstance(value, Node):
            return names[value] if value in varies or value not in hoisted else number(value)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(text, value))}]"
        return repr(value)

    def plain(value: Any) -> str:
        if isinstance(value, Node):
            return names[value]
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(plain, value))}]"
        return f"torch.{value!r}" if isinstance(value, torch.device) else repr(value)

    def array(node: Node) -> str:
        inputs.append(names[node])
        return f"x{len(inputs) - 1}"

    def number(node: Node) -> str:
        """One number that does not depend on the pair: an array of one, read at 0."""
        if node.meta["val"].numel() != 1:
            raise Untraceable(f"{refusal} it makes more than one number of a pair")
        inputs.append(f"{names[node]}.reshape(1)")
        return f"x{len(inputs) - 1}[b * 0]"

    hoisted = set(names) - varies
    output = ""
    for node in graph.nodes:
        if node.op == "output":
            output = text(node.args[0])
            continue
        if node.op != "call_function":
            continue
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
            raise Untraceable(f"{refusal} {target} changes what it is given")
        names[node] = f"n{len(names)}"
        given = node.all_input_nodes
        if not varies.intersection(given) and (given or target not in MAKERS):
            hoisted.add(node)
            before.append(f"{names[node]} = {_call(target, node.args, node.kwargs, plain)}")
            continue
        varies.add(node)
        for value in _leaves((node.args, node.kwargs)):
            if isinstance(value, Node):
                reads_floats |= value not in varies and value.meta["val"].is_floating_point()
            elif isinstance(value, (int, float)):
                holds_large |= LARGE < abs(value) < float("inf")
        if node.meta["val"].numel() != 1:
            raise Untraceable(f"{refusal} it makes more than one number of a pair")
        behind[node] = set().union(*(behind.get(x, ()) for x in given))
        options = {name: value for name, value in node.kwargs.items() if name not in PLACES}
        if target is aten.index.Tensor:
            table, at = node.args
            whole = len(at) == table.meta["val"].ndim and all(isinstance(x, Node) for x in at)
            if table in varies or not whole or any(x.meta["val"].dtype in (torch.bool, torch.uint8) for x in at):
                raise Untraceable(f"{refusal} it makes more than one number of a pair")
            if behind[node] >= {"q_index", "kv_index"} or "score" in behind[node]:
                of_pairs.append(len(inputs))
            line = f"{array(table)}[{', '.join(map(text, at))},]"
        elif target in SHAPES:
            line = text(node.args[0])
        elif target is aten.detach.default:
            line = f"{text(node.args[0])}.detach()"
        elif target is aten._to_copy.default:
            line = f"{text(node.args[0])}.to({text(options.get('dtype', node.meta['val'].dtype))})"
        elif torch.Tag.pointwise in target.tags or target in MAKERS:
            line = _call(target, node.args, options, text)
        else:
            raise Untraceable(f"{refusal} {target} is not a function of single numbers")
        lines.append(f"{names[node]} = {line}")
    result = graph.output_node().args[0]
    reads = behind.get(result, set()) if isinstance(result, Node) else set()
    return Program(
        _source("before", [f"c{n}" for n in range(captured)], before, f"({''.join(f'{x}, ' for x in inputs)})"),
        _source("pair", [*PAIR, *(f"x{n}" for n in range(len(inputs)))], lines, output),
        frozenset(reads), tuple(of_pairs), reads_floats, holds_large,
    )  # fmt: skip


def _source(name: str, arguments: Sequence[str], lines: Sequence[str], result: str) -> str:
    return "\n".join([f"def {name}({', '.join(arguments)}):", *(f"    {x}" for x in (*lines, f"return {result}")), ""])


def _leaves(value: Any) -> Iterator[Any]:
    """What arguments hold."""
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, dict):
        yield from _leaves(tuple(value.values()))
    else:
        yield value


def _call(target: Any, arguments: Sequence[Any], options: Mapping[str, Any], text: Callable[[Any], str]) -> str:
    given = [*map(text, arguments), *(f"{name}={text(value)}" for name, value in options.items())]
    return f"torch.ops.{target}({', '.join(given)})"

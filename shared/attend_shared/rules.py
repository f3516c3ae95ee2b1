"""Weight rules: which parameter of a PyTorch model is which of a Flax model, one line each, read in both directions.

    encoder.layer.{l}.attention.self.query.weight <-> encoder.layers.{l}.attention.query.kernel : (h d) c -> c h d

The path in PyTorch, the path in Flax, and an einops pattern whose left side is the array in PyTorch. `{l}` stands for a
whole number, the same on both sides. No pattern means that the array stays as it is. Sizes that a shape alone does not
give are passed by name, or stand at the end of the line: `: (h d) c -> c h d, h=12`.

One parameter that is several elsewhere names its parts in braces, and `*` is the axis along which they are joined:

    attn.c_attn.weight <-> attention.{query|key|value}.kernel : c (* h d) -> c (* h) d      GPT-2: three equal parts
    qkv_proj.weight <-> attention.{query h|key k|value k}.kernel : (* d) c -> c * d         as many heads as it says
    query_key_value.weight <-> attention.{query|key|value}.kernel : (h * d) c -> c (h *) d  interleaved by head

The size of a part along `*` is 1, a number, or the name of a size. Two lines have no counterpart:

    lm_head.weight = model.embed_tokens.weight    the same parameter by another name: it may be absent, and if it is
                                                  there it must be equal; it is not written
    embeddings.position_ids <-> -                 a buffer: passed over where it comes, never written

Nothing here knows a framework. A parameter travels as `Value`: shape, dtype by name, and a function that reads it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import einops
import numpy as np

__all__ = [
    "ITEMSIZE", "Rule", "Value", "WeightsError", "attention", "batch_norm", "carry", "conv", "embedding", "fitting",
    "layer_norm", "linear", "lucidrains_attention", "parse", "rms_norm", "torch_attention", "value",
]  # fmt: skip

RAW = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
"""The dtypes that NumPy lacks, and those whose bits carry them."""

ITEMSIZE = {
    "float64": 8, "int64": 8, "uint64": 8, "float32": 4, "int32": 4, "uint32": 4, "float16": 2, "bfloat16": 2,
    "int16": 2, "uint16": 2, "bool": 1, "int8": 1, "uint8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip
"""Bytes of an element, by dtype."""

PART = re.compile(r"\{([^{}|]+(?:\|[^{}|]+)+)\}")
NUMBER = re.compile(r"\{([a-z]\w*)\}")
JOINED = "joined"  # what einops sees instead of *


class Value(NamedTuple):
    """A parameter that is read when it is asked for.

    Attributes:
        shape: of the array.
        dtype: by name, without a framework's prefix.
        read: gives the array in NumPy. What NumPy has no dtype for comes as its bits: bfloat16 as uint16.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """The bytes that it takes."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    def array(self) -> np.ndarray:
        """In NumPy under its own dtype; that of bfloat16 comes from ml_dtypes, which JAX brings along."""
        raw = self.read()
        if self.dtype not in RAW:
            return raw
        import ml_dtypes

        return raw.view(getattr(ml_dtypes, self.dtype))


class Part(NamedTuple):
    """A path of a rule and, where several are joined, its size along `*`: a number or the name of a size."""

    path: str
    size: str = "1"


class Rule(NamedTuple):
    """A line that has been read.

    Attributes:
        line: as it was written.
        torch, flax: the paths; several on a side that is joined on the other; none in flax for a buffer.
        pattern: the two sides of the einops pattern, or two empty texts.
        sizes: those that the line gives.
        alias: of which parameter in PyTorch this one is another name, or an empty text.
    """

    line: str
    torch: tuple[Part, ...]
    flax: tuple[Part, ...]
    pattern: tuple[str, str] = ("", "")
    sizes: tuple[tuple[str, int], ...] = ()
    alias: str = ""


class WeightsError(ValueError):
    """Parameters and rules do not fit together. The text has a line for each.

    Attributes:
        missing, unexpected, misshapen: a line of the text each, both paths in it.
    """

    def __init__(self, missing: Sequence[str], unexpected: Sequence[str], misshapen: Sequence[str]) -> None:
        self.missing, self.unexpected, self.misshapen = tuple(missing), tuple(unexpected), tuple(misshapen)
        kinds = ("missing", self.missing), ("unexpected", self.unexpected), ("misshapen", self.misshapen)
        lines = [f"  {kind}: {text}" for kind, texts in kinds for text in texts]
        noun = "parameter does" if len(lines) == 1 else "parameters do"
        super().__init__("\n".join([f"{len(lines)} {noun} not fit:", *lines]))

    def __reduce__(self) -> tuple[type[WeightsError], tuple]:
        return WeightsError, (self.missing, self.unexpected, self.misshapen)


def value(array: Any) -> Value:
    """A parameter from an array of NumPy, JAX or torch, whose memory it shares where it can.

    Args:
        array: any shape and dtype; on any device. Not written to, and read when the value is.

    Returns:
        Value.

    Raises:
        TypeError: no array, or one of a dtype that no checkpoint has.

    Example:
        >>> value(np.ones((2, 3), np.float32))[:2]
        ((2, 3), 'float32')
    """
    if not hasattr(array, "dtype") or not hasattr(array, "shape"):
        raise TypeError(f"array: expected an array of NumPy, JAX or torch, got {type(array).__name__}.")
    dtype = str(array.dtype).removeprefix("torch.")
    if dtype not in ITEMSIZE:
        raise TypeError(f"array: expected a dtype out of {', '.join(ITEMSIZE)}, got {dtype}.")

    def read() -> np.ndarray:
        if hasattr(array, "detach"):  # torch, which gives NumPy no bfloat16 either
            tensor = array.detach().cpu()
            if dtype not in RAW:
                return tensor.numpy()
            empty = tensor.new_empty(0)
            bits = empty.short() if RAW[dtype] == "uint16" else empty.byte()
            return tensor.contiguous().view(bits.dtype).numpy().view(RAW[dtype])
        found = np.asarray(array)
        return found.view(RAW[dtype]) if dtype in RAW else found

    return Value(tuple(int(size) for size in array.shape), dtype, read)


def fitting(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Any]) -> dict[str, Value]:
    """What is given, as values, if it is all the parameters of a model and nothing else.

    Args:
        expected: the shapes of all parameters, by path.
        given: `Value`, or arrays, by path.

    Raises:
        TypeError: what is given is no mapping, or holds what is no array.
        WeightsError: a parameter is missing, unexpected or misshapen.

    Example:
        >>> fitting({"bias": (2,)}, {"bias": np.zeros(2, np.float32)})["bias"].dtype
        'float32'
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"given: expected a mapping, got {type(given).__name__}.")
    found = {path: x if isinstance(x, Value) else value(x) for path, x in given.items()}
    missing = [path for path in expected if path not in found]
    unexpected = [path for path in found if path not in expected]
    misshapen = [
        f"{path}: expected {shape}, got {found[path].shape}"
        for path, shape in expected.items()
        if path in found and found[path].shape != shape
    ]
    if missing or unexpected or misshapen:
        raise WeightsError(missing, unexpected, misshapen)
    return found


# Reading rules.


@lru_cache(maxsize=4096)
def parse(line: str) -> Rule:
    """Read a rule.

    Args:
        line: "torch path <-> flax path", then " : pattern" if the array does not stay as it is, then sizes.

    Returns:
        Rule.

    Raises:
        TypeError: the line is no text.
        ValueError: the line is no rule: what is wrong with it.

    Example:
        >>> parse("fc.weight <-> dense.kernel : o i -> i o").pattern
        ('o i', 'i o')
    """
    if not isinstance(line, str):
        raise TypeError(f"rule: expected a line of text, got {type(line).__name__}.")
    alias = re.fullmatch(r"(\S+)\s+=\s+(\S+)", line.strip())
    if alias is not None:
        if re.search(r"[{}]", line):
            raise _bad(line, "expected two names without braces; write a line for each number")
        return Rule(line, (Part(alias[1]),), (), alias=alias[2])
    head, _, tail = line.partition(" : ")
    paths = [side.strip() for side in head.split(" <-> ")]
    if len(paths) != 2 or not all(paths):
        raise _bad(line, "expected `torch path <-> flax path`, or `name = name`")
    if paths[1] == "-":
        return Rule(line, _parts(line, paths[0]), ())
    torch, flax = (_parts(line, path) for path in paths)
    pattern, *given = (part.strip() for part in tail.split(","))
    sizes = []
    for text in given:
        size = re.fullmatch(r"([a-z]\w*)=(\d+)", text)
        if size is None:
            raise _bad(line, f"expected a size like h=12, got {text!r}")
        sizes.append((size[1], int(size[2])))
    if len(torch) > 1 and len(flax) > 1:
        raise _bad(line, "expected several parts on one side at most")
    joined = len(torch) > 1 or len(flax) > 1
    if not pattern:
        if joined:
            raise _bad(line, "expected a pattern, whose * is the axis along which the parts are joined")
        sides = ("", "")
    else:
        left, arrow, right = (side.strip() for side in pattern.partition("->"))
        sides = (left, right)
        names = [sorted(itertools.chain(*_axes(line, side))) for side in sides]
        if not arrow or names[0] != names[1] or any(len(set(each)) < len(each) for each in names):
            raise _bad(line, "expected the same axes, each once, on both sides of ->")
        if ("*" in names[0]) != joined:
            raise _bad(line, "expected * in the pattern where, and only where, a side has several parts")
    if len({tuple(sorted(NUMBER.findall(part.path))) for part in (*torch, *flax)}) > 1:
        raise _bad(line, "expected the same {numbers} in every path")
    return Rule(line, torch, flax, sides, tuple(sizes))


def _bad(line: str, text: str) -> ValueError:
    return ValueError(f"rule {line!r}: {text}.")


def _parts(line: str, path: str) -> tuple[Part, ...]:
    """The paths that braces with bars stand for."""
    numbers = NUMBER.findall(path)
    if len(set(numbers)) < len(numbers) or re.search(r"[{}]", NUMBER.sub("", PART.sub("", path))):
        raise _bad(line, f"expected braces around numbers such as {{l}}, each once, or around parts, got {path!r}")
    braces = PART.findall(path)
    if len(braces) > 1 or " " in PART.sub("", path):
        raise _bad(line, f"expected a path with at most one pair of braces with parts, got {path!r}")
    if not braces:
        return (Part(path),)
    parts = []
    for text in braces[0].split("|"):
        name, _, size = text.strip().partition(" ")
        parts.append(Part(PART.sub(name, path), size.strip() or "1"))
    return tuple(parts)


def _axes(line: str, side: str) -> list[list[str]]:
    """The names of each axis of an array: `(h d) 1 c` is [[h, d], [], [c]]."""
    groups: list[list[str]] = []
    inside = False
    for token in re.findall(r"\(|\)|[^\s()]+", side):
        if token in "()":
            if inside is (token == "("):
                raise _bad(line, f"expected parentheses in pairs, got {side!r}")
            inside = token == "("
            if inside:
                groups.append([])
        elif token == "1":
            if not inside:
                groups.append([])
        elif re.fullmatch(r"\*|[a-z]\w*", token) is None:
            raise _bad(line, f"expected names of axes, got {token!r}")
        elif inside:
            groups[-1].append(token)
        else:
            groups.append([token])
    if inside:
        raise _bad(line, f"expected parentheses in pairs, got {side!r}")
    return groups


@lru_cache(maxsize=4096)
def _matcher(path: str) -> re.Pattern[str]:
    parts = NUMBER.split(path)
    return re.compile("".join(f"(?P<{x}>0|[1-9][0-9]*)" if n % 2 else re.escape(x) for n, x in enumerate(parts)))


# Carrying values over.


class _Job(NamedTuple):
    """A rule with its numbers filled in."""

    rule: Rule
    sources: tuple[str, ...]
    targets: tuple[str, ...]


def carry(
    values: Mapping[str, Any],
    rules: Iterable[str],
    *,
    to: Literal["flax", "torch"],
    sizes: Mapping[str, int] | None = None,
    expected: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Value]:
    """The same parameters under the other framework's names, in its shapes, bit for bit. Nothing is read yet.

        carry(carry(x, rules, to="flax"), rules, to="torch") == x

    Args:
        values: by path, with dots between its parts: `Value`, or arrays of NumPy, JAX or torch of any shape and dtype.
        rules: a line for each parameter; see the head of this module.
        to: the framework whose names and shapes are wanted.
        sizes: of axes, by name, such as the number of heads; of a line's own sizes those win.
        expected: the shapes of all parameters that are wanted, by path; None asks for whatever the rules make.

    Returns:
        By path, in the order of `expected` where it is given.

    Raises:
        TypeError: values or expected is no mapping, rules is one text, a size is no whole number.
        ValueError: a line that is no rule, or two of which a parameter fits both; a size below 1.
        WeightsError: with a line for every parameter that is missing, unexpected or misshapen.

    Example:
        >>> weights = {"fc.weight": np.arange(6.0).reshape(3, 2)}
        >>> flax = carry(weights, ["fc.weight <-> dense.kernel : o i -> i o"], to="flax")
        >>> flax["dense.kernel"].array()
        array([[0., 2., 4.],
               [1., 3., 5.]])
    """
    if to not in ("flax", "torch"):
        raise ValueError(f'to: expected "flax" or "torch", got {to!r}.')
    _check_carry(values, rules, sizes, expected)
    parsed = [parse(line) for line in rules]
    given = {path: x if isinstance(x, Value) else value(x) for path, x in values.items()}
    known = dict(sizes or {})
    given, used = _aliases(given, parsed, to)
    ours = [rule for rule in parsed if rule.flax and not rule.alias]
    source, target = ("torch", "flax") if to == "flax" else ("flax", "torch")
    jobs = _jobs(ours, given, expected or {}, source, target)

    missing, unexpected, misshapen = [], [], []
    found: dict[str, Value] = {}
    for job in jobs:
        wanted = [path for path in job.targets if expected is None or path in expected]
        there = [path for path in job.sources if path in given]
        used |= set(there)
        both = f"{source} {_names(job.sources)}, {target} {_names(job.targets)}"
        if not wanted:
            unexpected += [f"{source} {path} {given[path].shape}, {target} {_names(job.targets)}" for path in there]
            continue
        missing += [
            f"{source} {path}, {target} {_names(job.targets)}{_wanted(expected, wanted)}"
            for path in job.sources
            if path not in given
        ]
        if len(there) < len(job.sources):
            continue
        if len({given[path].dtype for path in there}) > 1:
            dtypes = ", ".join(given[path].dtype for path in there)
            misshapen.append(f"{both}: expected one dtype for what is joined, got {dtypes}")
            continue
        try:
            made = _move(job, [given[path] for path in job.sources], known, to)
        except ArithmeticError as error:
            misshapen.append(f"{both}: {error}")
            continue
        for path, result in zip(job.targets, made, strict=True):
            if path in found:
                raise _bad(job.rule.line, f"a second rule makes {path}")
            found[path] = result
            if expected is not None and path in expected and tuple(expected[path]) != result.shape:
                misshapen.append(f"{both}: expected {tuple(expected[path])} for {path}, got {result.shape}")
    made_by_none = [path for path in expected or {} if not any(path in job.targets for job in jobs)]
    missing += [f"{target} {path} {tuple((expected or {})[path])}: no rule makes it" for path in made_by_none]
    unexpected += [f"{source} {path} {given[path].shape}: no rule takes it" for path in given if path not in used]
    if missing or unexpected or misshapen:
        raise WeightsError(missing, unexpected, misshapen)
    return found if expected is None else {path: found[path] for path in expected}


def _check_carry(values: Any, rules: Any, sizes: Any, expected: Any) -> None:
    """What would otherwise fail far from where it came from."""
    for argument, given in (("values", values), ("sizes", sizes), ("expected", expected)):
        if not isinstance(given, Mapping) and (given is not None or argument == "values"):
            raise TypeError(f"{argument}: expected a mapping, got {type(given).__name__}.")
    if isinstance(rules, str):
        raise TypeError("rules: expected lines, got one text. Put it into a list.")
    for name, size in (sizes or {}).items():
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
            raise TypeError(f"sizes: expected a whole number >= 1 for {name}, got {size!r}.")
        if size < 1:
            raise ValueError(f"sizes: expected a whole number >= 1 for {name}, got {size}.")


def _names(paths: Sequence[str]) -> str:
    return " + ".join(paths)


def _wanted(expected: Mapping[str, tuple[int, ...]] | None, paths: Sequence[str]) -> str:
    return "" if expected is None else " " + ", ".join(str(tuple(expected[path])) for path in paths)


def _aliases(given: dict[str, Value], rules: Sequence[Rule], to: str) -> tuple[dict[str, Value], set[str]]:
    """Tied parameters under their one name, which is checked when it is read; and what nothing need take."""
    given = dict(given)
    used: set[str] = set()
    if to == "torch":
        return given, used
    for rule in rules:
        if rule.alias and rule.torch[0].path in given:
            name = rule.torch[0].path
            used.add(name)
            first = given.get(rule.alias)
            given[rule.alias] = given[name] if first is None else _tied(name, given[name], rule.alias, first)
        elif not rule.alias and not rule.flax:
            used |= {path for path in given if any(_matcher(part.path).fullmatch(path) for part in rule.torch)}
    return given, used


def _tied(name: str, other: Value, path: str, first: Value) -> Value:
    def read() -> np.ndarray:
        found, again = first.read(), other.read()
        same = first.shape == other.shape and first.dtype == other.dtype
        if not same or found.tobytes() != again.tobytes():
            raise WeightsError((), [f"torch {name} is tied to {path}, but their values differ"], ())
        return found

    return first._replace(read=read)


def _jobs(
    rules: Sequence[Rule], given: Mapping[str, Value], expected: Mapping[str, Any], source: str, target: str
) -> list[_Job]:
    """Every rule that something given or expected asks for, once; one without numbers is always asked for."""
    found: dict[tuple[int, tuple[str, ...]], _Job] = {
        (n, ()): _filled(rule, {}, source, target)
        for n, rule in enumerate(rules)
        if not NUMBER.search(rule.torch[0].path)
    }
    for side, paths in ((target, expected), (source, given)):
        table = [(n, rule, [_matcher(part.path) for part in getattr(rule, side)]) for n, rule in enumerate(rules)]
        exact = {part.path: (n, rule) for n, rule, _ in table for part in getattr(rule, side)}
        open_ended = [each for each in table if NUMBER.search(each[1].torch[0].path)]
        for path in paths:
            takers: list[tuple[int, Rule, dict[str, str]]] = [(*exact[path], {})] if path in exact else []
            for n, rule, matchers in open_ended:
                takers += [(n, rule, match.groupdict()) for each in matchers if (match := each.fullmatch(path))]
            if len(takers) > 1:
                raise _bad(takers[0][1].line, f"so does {takers[1][1].line!r} fit {path}")
            for n, rule, numbers in takers:
                key = (n, tuple(numbers[name] for name in sorted(numbers)))
                found.setdefault(key, _filled(rule, numbers, source, target))
    return list(found.values())


def _filled(rule: Rule, numbers: Mapping[str, str], source: str, target: str) -> _Job:
    def fill(parts: tuple[Part, ...]) -> tuple[str, ...]:
        return tuple(NUMBER.sub(lambda match: numbers[match[1]], part.path) for part in parts)

    return _Job(rule, fill(getattr(rule, source)), fill(getattr(rule, target)))


def _move(job: _Job, sources: list[Value], sizes: dict[str, int], to: str) -> list[Value]:
    """The targets of a rule, from its sources. An ArithmeticError says what is wrong with a shape."""
    rule = job.rule
    if not rule.pattern[0]:
        return sources
    left, right = rule.pattern if to == "flax" else rule.pattern[::-1]
    known = sizes | dict(rule.sizes)
    joined = rule.torch if len(rule.torch) > 1 else rule.flax
    stars = [_size(part.size, known, rule) for part in joined] if len(joined) > 1 else []
    split = len(job.targets) > 1
    axes: dict[str, int] = {}
    for n, each in enumerate(sources):
        if stars:
            known["*"] = sum(stars) if split else stars[n]
        solved = _solve(_axes(rule.line, left), left, each.shape, known)
        clash = [name for name in solved if name != "*" and axes.get(name, solved[name]) != solved[name]]
        if clash:
            raise ArithmeticError(f"expected parts alike but for *, got sizes that differ in {', '.join(clash)}")
        axes |= solved
    out = []
    starts = [0, *itertools.accumulate(stars)]
    for n in range(len(job.targets)):
        here = axes | ({"*": stars[n] if split else sum(stars)} if stars else {})
        shape = tuple(math.prod(here[name] for name in group) for group in _axes(rule.line, right))
        cut = (starts[n], starts[n + 1]) if split else None
        out.append(Value(shape, sources[0].dtype, _reader(sources, left, right, here, stars, cut)))
    return out


def _size(text: str, sizes: Mapping[str, int], rule: Rule) -> int:
    if text.isdecimal():
        return int(text)
    if text not in sizes:
        raise _bad(rule.line, f"the size {text} is not given")
    return sizes[text]


def _solve(groups: list[list[str]], side: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> dict[str, int]:
    """The size of every axis of a pattern's side, from a shape."""
    wrong = f"expected {side!r}{_given(groups, sizes)}, got {shape}"
    if len(groups) != len(shape):
        raise ArithmeticError(wrong)
    found: dict[str, int] = {}
    for group, size in zip(groups, shape, strict=True):
        unknown = [name for name in group if name not in sizes]
        known = math.prod(sizes[name] for name in group if name in sizes)
        if len(unknown) > 1:
            raise ArithmeticError(f"{wrong}; the sizes of {', '.join(unknown)} are not given")
        if known == 0 or size % known or (not unknown and size != known):
            raise ArithmeticError(wrong)
        found |= {name: sizes[name] if name in sizes else size // known for name in group}
    return found


def _given(groups: list[list[str]], sizes: Mapping[str, int]) -> str:
    named = [f"{name}={sizes[name]}" for group in groups for name in group if name in sizes]
    return f" with {', '.join(named)}" if named else ""


def _reader(
    sources: list[Value], left: str, right: str, axes: dict[str, int], stars: list[int], cut: tuple[int, int] | None
) -> Callable[[], np.ndarray]:
    """What gives a target's array: rearranged, and cut out of its source or joined from several where it must be."""
    plain = {name: size for name, size in axes.items() if name != "*"}

    def read() -> np.ndarray:
        if not stars:
            return einops.rearrange(sources[0].read(), f"{left} -> {right}", **plain)
        before, after = (side.replace("*", JOINED) for side in (left, right))
        names = re.findall(r"[a-z]\w*", before)
        flat, star = " ".join(names), names.index(JOINED)
        totals = [sum(stars)] if cut else stars
        pieces = [
            einops.rearrange(each.read(), f"{before} -> {flat}", **plain, **{JOINED: total})
            for each, total in zip(sources, totals, strict=True)
        ]
        if cut:
            whole = pieces[0][(slice(None),) * star + (slice(*cut),)]
        else:
            whole = np.concatenate(pieces, axis=star)
        return einops.rearrange(whole, f"{flat} -> {after}")

    return read


# Ready rules. They are lines like any other: print them, change them, leave one out.


def _paths(torch: str, flax: str) -> tuple[str, str]:
    return (f"{torch}." if torch else ""), (f"{flax}." if flax else "")


def linear(torch: str, flax: str, *, bias: bool = True) -> list[str]:
    """torch.nn.Linear and Flax's Linear or Dense.

    Example:
        >>> linear("fc", "dense")
        ['fc.weight <-> dense.kernel : o i -> i o', 'fc.bias <-> dense.bias']
    """
    t, f = _paths(torch, flax)
    return [f"{t}weight <-> {f}kernel : o i -> i o"] + [f"{t}bias <-> {f}bias"] * bias


def conv(torch: str, flax: str, *, dims: int = 2, bias: bool = True) -> list[str]:
    """torch.nn.Conv1d, Conv2d or Conv3d, groups included, and Flax's Conv.

    Raises:
        ValueError: dims is not 1, 2 or 3.

    Example:
        >>> conv("stem", "stem", bias=False)
        ['stem.weight <-> stem.kernel : o i y x -> y x i o']
    """
    t, f = _paths(torch, flax)
    if dims not in (1, 2, 3):
        raise ValueError(f"dims: expected 1, 2 or 3, got {dims!r}.")
    space = " ".join("zyx"[3 - dims :])
    return [f"{t}weight <-> {f}kernel : o i {space} -> {space} i o"] + [f"{t}bias <-> {f}bias"] * bias


def embedding(torch: str, flax: str) -> list[str]:
    """torch.nn.Embedding and Flax's Embed.

    Example:
        >>> embedding("wte", "tokens")
        ['wte.weight <-> tokens.embedding']
    """
    t, f = _paths(torch, flax)
    return [f"{t}weight <-> {f}embedding"]


def layer_norm(torch: str, flax: str, *, bias: bool = True) -> list[str]:
    """torch.nn.LayerNorm or GroupNorm and Flax's.

    Example:
        >>> layer_norm("ln", "norm")
        ['ln.weight <-> norm.scale', 'ln.bias <-> norm.bias']
    """
    t, f = _paths(torch, flax)
    return [f"{t}weight <-> {f}scale"] + [f"{t}bias <-> {f}bias"] * bias


def rms_norm(torch: str, flax: str) -> list[str]:
    """torch.nn.RMSNorm and Flax's.

    Example:
        >>> rms_norm("norm", "norm")
        ['norm.weight <-> norm.scale']
    """
    return layer_norm(torch, flax, bias=False)


def batch_norm(torch: str, flax: str) -> list[str]:
    """torch.nn.BatchNorm1d, 2d or 3d and Flax's, running statistics included.

    Example:
        >>> batch_norm("bn", "norm")[2:]
        ['bn.running_mean <-> norm.mean', 'bn.running_var <-> norm.var', 'bn.num_batches_tracked <-> -']
    """
    t, f = _paths(torch, flax)
    return [*layer_norm(torch, flax), f"{t}running_mean <-> {f}mean", f"{t}running_var <-> {f}var",
            f"{t}num_batches_tracked <-> -"]  # fmt: skip


def attention(
    torch: str, flax: str, *, names: tuple[str, str, str, str], heads: str = "h", kv_heads: str = "h",
    bias: bool | tuple[bool, bool, bool, bool] = True, tiled: bool = False,
) -> list[str]:  # fmt: skip
    """Four Linear layers by their names (query, key, value, out), and Flax's attention, Linen or NNX.

    Args:
        torch, flax: the paths of the two modules.
        names: of the four layers in torch.
        heads, kv_heads: names of the sizes, or numbers.
        bias: whether the layers have one, all alike or each.
        tiled: whether query head n reads key head n % kv_heads in torch, as in x-transformers; Flax groups them. Then
            the size g is heads // kv_heads, unless both are numbers.

    Returns:
        The lines. They leave the size of a head to the shapes.

    Raises:
        ValueError: not four names, or numbers of heads that do not divide.

    Example:
        >>> attention("attn", "attention", names=("q_proj", "k_proj", "v_proj", "o_proj"), bias=False)[0]
        'attn.q_proj.weight <-> attention.query.kernel : (h d) c -> c h d'
    """
    if len(names) != 4:
        raise ValueError(f"names: expected four, of query, key, value and out, got {names!r}.")
    if heads.isdecimal() and kv_heads.isdecimal() and int(heads) % max(int(kv_heads), 1):
        raise ValueError(f"kv_heads: expected a number that divides the {heads} heads, got {kv_heads!r}.")
    t, f = _paths(torch, flax)
    biases = (bias,) * 4 if isinstance(bias, bool) else bias
    h, h_size = ("n", f", n={heads}") if heads.isdecimal() else (heads, "")
    hk, hk_size = ("m", f", m={kv_heads}") if kv_heads.isdecimal() else (kv_heads, "")
    if tiled:  # head g * kv_heads + m becomes m * groups + g
        groups = f", g={int(heads) // int(kv_heads)}" if heads.isdecimal() and kv_heads.isdecimal() else ""
        q_there, q_here, q_size = f"g {hk} d", f"({hk} g) d", hk_size + groups
    else:
        q_there, q_here, q_size = f"{h} d", f"{h} d", h_size
    sides = ((q_there, q_here, q_size), (f"{hk} d", f"{hk} d", hk_size), (f"{hk} d", f"{hk} d", hk_size))
    lines = []
    for name, part, (there, here, size), has in zip(names, ("query", "key", "value"), sides, biases, strict=False):
        lines.append(f"{t}{name}.weight <-> {f}{part}.kernel : ({there}) c -> c {here}{size}")
        lines += [f"{t}{name}.bias <-> {f}{part}.bias : ({there}) -> {here}{size}"] * has
    lines.append(f"{t}{names[3]}.weight <-> {f}out.kernel : c ({q_there}) -> {q_here} c{q_size}")
    return lines + [f"{t}{names[3]}.bias <-> {f}out.bias"] * biases[3]


def torch_attention(torch: str, flax: str, *, bias: bool = True, separate: bool = False) -> list[str]:
    """torch.nn.MultiheadAttention and Flax's attention, Linen or NNX; the size h is its number of heads.

    Args:
        torch, flax: the paths of the two modules.
        bias: as it was made.
        separate: True where kdim or vdim is given, so that three matrices stand for one. bias_k and bias_v have no
            counterpart.

    Returns:
        The lines.

    Example:
        >>> torch_attention("attn", "attention", bias=False)[0]
        'attn.in_proj_weight <-> attention.{query|key|value}.kernel : (* h d) c -> c (* h) d'
    """
    t, f = _paths(torch, flax)
    if separate:
        lines = [
            f"{t}{name[0]}_proj_weight <-> {f}{name}.kernel : (h d) c -> c h d" for name in ("query", "key", "value")
        ]
    else:
        lines = [f"{t}in_proj_weight <-> {f}{{query|key|value}}.kernel : (* h d) c -> c (* h) d"]
    lines += [f"{t}in_proj_bias <-> {f}{{query|key|value}}.bias : (* h d) -> (* h) d"] * bias
    lines.append(f"{t}out_proj.weight <-> {f}out.kernel : c (h d) -> h d c")
    return lines + [f"{t}out_proj.bias <-> {f}out.bias"] * bias


def lucidrains_attention(
    torch: str, flax: str, *, fused: Literal["qkv", "kv", ""] = "qkv", out: str = "to_out", bias: bool = False,
    out_bias: bool = False,
) -> list[str]:  # fmt: skip
    """The to_qkv (or to_q and to_kv, or to_q, to_k and to_v) and to_out of many repositories, and Flax's attention.

    Args:
        torch, flax: the paths of the two modules.
        fused: what one layer makes.
        out: the name of the last layer, often "to_out" or "to_out.0".
        bias, out_bias: whether the layers have one.

    Returns:
        The lines; the size h is the number of heads.

    Raises:
        ValueError: fused is none of the three.

    Example:
        >>> lucidrains_attention("attn", "attention")[0]
        'attn.to_qkv.weight <-> attention.{query|key|value}.kernel : (* h d) c -> c (* h) d'
    """
    t, f = _paths(torch, flax)
    if fused not in ("qkv", "kv", ""):
        raise ValueError(f'fused: expected "qkv", "kv" or "", got {fused!r}.')
    single = {"qkv": (), "kv": ("query",), "": ("query", "key", "value")}[fused]
    lines = []
    for name in single:
        lines.append(f"{t}to_{name[0]}.weight <-> {f}{name}.kernel : (h d) c -> c h d")
        lines += [f"{t}to_{name[0]}.bias <-> {f}{name}.bias : (h d) -> h d"] * bias
    if fused:
        parts = "{query|key|value}" if fused == "qkv" else "{key|value}"
        lines.append(f"{t}to_{fused}.weight <-> {f}{parts}.kernel : (* h d) c -> c (* h) d")
        lines += [f"{t}to_{fused}.bias <-> {f}{parts}.bias : (* h d) -> (* h) d"] * bias
    lines.append(f"{t}{out}.weight <-> {f}out.kernel : c (h d) -> h d c")
    return lines + [f"{t}{out}.bias <-> {f}out.bias"] * out_bias

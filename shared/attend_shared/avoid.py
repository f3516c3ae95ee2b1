"""What the choice should not take on this machine, from a file that `attend doctor` writes.

The file is named by the environment variable ATTEND_AVOID and read once, at the first choice. It is data: JSON of at
most `LIMIT` bytes in one strict form. It says for which machines it was written, and holds for no other: a newer torch,
another GPU, and its rules are left out, which `explain` says.

A rule names an implementation, a dtype, and traits: predicates over what is known of a call before it runs. All of a
rule's traits must hold. Whether a gradient will be taken is not known before a call runs (in JAX never), so what is
wrong in a gradient alone is left out of forward passes, too.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Hashable, Iterable
from importlib import import_module, metadata
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

from attend_shared.call import DTYPES, NAMES, Call

__all__ = ["AVOIDED", "FORMAT", "LIMIT", "RESULTS", "TRAITS", "VARIABLE", "VERSION", "AvoidFileError", "Avoided",
           "Machine", "Rule", "distributions", "forget", "in_force", "machine", "note", "parse", "processor", "read",
           "why", "words"]  # fmt: skip

VARIABLE = "ATTEND_AVOID"
FORMAT, VERSION = "attend doctor", 1
AVOIDED = "it is avoided"  # how a reason begins that is none to refuse

LIMIT = 2**21
"""Bytes that a file may have: more than a run of everything writes where everything is wrong."""

RESULTS = ("out", "lse", "dq", "dk", "dv", "dbias", "dsinks", "crashed", "hung")
"""What can be wrong: results, that its process died or raised, that it gave no answer in time."""

TRAITS: dict[str, Callable[[Call], bool]] = {
    "any call": lambda call: True,
    "q_len == 1": lambda call: call.i == 1,
    "q_len > 512": lambda call: call.i > 512,
    "q_len >= 1024": lambda call: call.i >= 1024,
    "q_len % 8 != 0": lambda call: call.i % 8 != 0,
    "q_len % 128 == 64": lambda call: call.i % 128 == 64,
    "kv_len == 1": lambda call: call.j == 1,
    "kv_len >= 2048": lambda call: call.j >= 2048,
    "kv_len >= 2048, d == 64": lambda call: call.j >= 2048 and call.d == 64,
    "kv_len >= 4096": lambda call: call.j >= 4096,
    "kv_len % 8 != 0": lambda call: call.j % 8 != 0,
    "kv_len % 32 == 1": lambda call: call.j % 32 == 1,
    "kv_len % 128 == 64": lambda call: call.j % 128 == 64,
    "d % 8 != 0": lambda call: call.d % 8 != 0,
    "d % 16 != 0": lambda call: call.d % 16 != 0,
    "d == 128": lambda call: call.d == 128,
    "d > 128": lambda call: call.d > 128,
    "dv != d": lambda call: call.dv != call.d,
    "grouped heads": lambda call: call.hk != call.h,
    "layout bnhd": lambda call: call.layout == "bnhd",
    "causal": lambda call: call.right == 0 and call.left is None,
    "window": lambda call: call.left is not None or call.right not in (None, 0),
    "q_offset": lambda call: call.offset != "zero",
    "key mask": lambda call: call.key_masked,
    "dense mask": lambda call: call.mask is not None and not call.key_masked,
    "segment ids": lambda call: call.segments,
    "q_lengths": lambda call: call.q_lengths,
    "kv_lengths": lambda call: call.kv_lengths,
    "may have empty rows": lambda call: _may_empty(call),
    "bias": lambda call: call.bias is not None,
    "sinks": lambda call: call.sinks is not None,
    "softcap": lambda call: call.softcap is not None,
    "scale <= 0": lambda call: call.scale <= 0,
    "dropout": lambda call: call.dropout > 0,
    "lse": lambda call: call.return_lse,
}
"""What can be known of a call without its data, by the name that the file has for it."""


def _may_empty(call: Call) -> bool:
    """Whether some data would leave a row without a key."""
    if call.mask is not None or call.segments or call.q_lengths or call.kv_lengths or call.bias is not None:
        return True
    beyond = call.left is not None and call.i - 1 - call.left >= call.j
    return beyond or (call.offset == "end" and call.i > call.j) or call.offset == "data"


class AvoidFileError(ValueError):
    """A file that is not what `attend doctor` writes: which one, where in it, what was expected and what came."""


class Machine(NamedTuple):
    """What a finding holds for.

    Attributes:
        framework, platform: "torch" or "jax"; "cpu" or "cuda".
        device: the name of the GPU, or the kind of processor.
        capability: a GPU's compute capability; of a processor what torch makes of it, or "".
        versions: of the framework and of the libraries of kernels, by name.
    """

    framework: str
    platform: str
    device: str
    capability: str
    versions: dict[str, str]


class Rule(NamedTuple):
    """What not to take.

    Attributes:
        framework, platform, implementation, dtype: of what.
        traits: names of `TRAITS`; for calls of which all hold.
        results: of `RESULTS`, what was wrong.
        canaries: what showed it, as in `attend_shared.canaries`.
    """

    framework: str
    platform: str
    implementation: str
    dtype: str
    traits: tuple[str, ...]
    results: tuple[str, ...]
    canaries: tuple[str, ...]


class Avoided(NamedTuple):
    """A file's contents, but for the results that it has for people.

    Attributes:
        path: of the file.
        machines: for which it holds, one for each framework and platform.
        rules: what it says.
    """

    path: str
    machines: tuple[Machine, ...]
    rules: tuple[Rule, ...]


# In force.

_READ: list[Avoided | None] = []
_FOUND: dict[tuple[str, str], tuple[_Reason, ...]] = {}
CHOICES: dict[Hashable, Any] = {}  # what a framework remembers of its choices, by what they hang on besides
KEPT = 4096  # of them


class _Reason(NamedTuple):
    """A rule as the choice takes it."""

    implementation: str
    dtype: str
    traits: tuple[str, ...]
    text: str


def in_force(framework: str, platform: str) -> bool:
    """Whether there are rules for calls that run there. Read once, then at the cost of a look-up.

    Args:
        framework: "torch" or "jax".
        platform: as in `attend_shared.call.Call`.

    Raises:
        AvoidFileError: the file of ATTEND_AVOID cannot be read.
    """
    try:
        return bool(_FOUND[framework, platform])
    except KeyError:
        _FOUND[framework, platform] = found = _reasons(framework, platform)
        return bool(found)


def why(implementation: str, call: Call) -> str | None:
    """Why this call should not take an implementation, in words, or None. Where rules are in force."""
    for name, dtype, traits, text in _FOUND[call.framework, call.platform]:
        if name == implementation and dtype == call.dtype and all(TRAITS[trait](call) for trait in traits):
            return text
    return None


def words(rule: Rule, file: str) -> str:
    """A rule as a reason.

    Args:
        rule: what was found.
        file: the name of the file that has it.

    Example:
        >>> rule = Rule("torch", "cuda", "sdpa", "bfloat16", ("kv_len == 1", "lse"), ("out", "dq"), ("one key",))
        >>> words(rule, "doctor.json")
        'it is avoided: doctor.json has its out and dq wrong in bfloat16 where kv_len == 1 and lse'
    """
    wrong = [name for name in rule.results if name not in ("crashed", "hung")]
    said = [f"its {_and(wrong)} wrong"] if wrong else []
    said += ["it down as crashing"] if "crashed" in rule.results else []
    said += ["it down as hanging"] if "hung" in rule.results else []
    return f"{AVOIDED}: {file} has {_and(said)} in {rule.dtype} where {_and(rule.traits)}"


def note(framework: str, platform: str) -> str | None:
    """Why the file of ATTEND_AVOID says nothing about calls that run there, in words; None where it does, or is not.

    Raises:
        AvoidFileError: it cannot be read.
    """
    avoided = _file()
    if avoided is None:
        return None
    reason = _stranger(avoided, framework, platform)
    return None if reason is None else f"{VARIABLE}={avoided.path} is not applied: {reason}"


def forget() -> None:
    """Read ATTEND_AVOID again at the next choice. What has been compiled keeps what was chosen for it."""
    _READ.clear()
    _FOUND.clear()
    CHOICES.clear()


def remember(key: Hashable, choice: Any) -> None:
    """Add to what was chosen while these rules are in force."""
    if len(CHOICES) >= KEPT:
        CHOICES.clear()
    CHOICES[key] = choice


def _file() -> Avoided | None:
    if not _READ:
        path = os.environ.get(VARIABLE)
        try:
            _READ.append(read(path) if path else None)
        except AvoidFileError as error:  # of a call, which has nothing else that says where the file comes from
            raise AvoidFileError(f"{VARIABLE}={error}") from None
    return _READ[0]


def _reasons(framework: str, platform: str) -> tuple[_Reason, ...]:
    avoided = _file()
    if avoided is None or _stranger(avoided, framework, platform) is not None:
        return ()
    file = Path(avoided.path).name
    return tuple(
        _Reason(rule.implementation, rule.dtype, rule.traits, words(rule, file))
        for rule in avoided.rules
        if (rule.framework, rule.platform) == (framework, platform)
    )


def _stranger(avoided: Avoided, framework: str, platform: str) -> str | None:
    """Why a file says nothing of this machine, or None."""
    there = [it for it in avoided.machines if (it.framework, it.platform) == (framework, platform)]
    if not there:
        return f"it was not written for {framework} on {platform}"
    here = machine(framework, platform)
    if here is None:
        return f"{framework} has no {platform} here"
    return _difference(there[0], here)


def _difference(there: Machine, here: Machine) -> str | None:
    if there.device != here.device:
        return f"it was written for {there.device or 'no known device'}, and here is {here.device}"
    if there.capability != here.capability:
        return f"it was written for {there.capability or 'no capability'}, and here is {here.capability or 'none'}"
    for name in {**here.versions, **there.versions}:
        its, ours = there.versions.get(name), here.versions.get(name)
        if its != ours:
            return f"it was written with {name} {its or 'missing'}, and here it is {ours or 'missing'}"
    return None


# This machine.


def machine(framework: str, platform: str) -> Machine | None:
    """This machine as a framework sees it, or None where it has no such platform."""
    found: Machine | None = import_module(f"attend_{framework}.machine").machine(platform)
    return found


def processor() -> str:
    """The kind of processor."""
    return platform.machine() or "unknown processor"


def distributions(names: Iterable[str]) -> dict[str, str]:
    """The versions of those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


# The file.


def read(path: str | os.PathLike[str]) -> Avoided:
    """Read a file.

    Args:
        path: where it is.

    Raises:
        AvoidFileError: it is not there, too large, or not in the form.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb", opener=lambda file, flags: os.open(file, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            if not S_ISREG(os.fstat(file.fileno()).st_mode):
                raise AvoidFileError(f"{name}: expected a file that attend doctor wrote, got something else.")
            text = file.read(LIMIT + 1)
    except OSError as error:
        said = error.strerror or type(error).__name__
        raise AvoidFileError(f"{name}: expected a file that attend doctor wrote, got: {said}.") from error
    if len(text) > LIMIT:
        raise AvoidFileError(f"{name}: expected at most {LIMIT} bytes, got more. attend doctor wrote no such file.")
    return parse(text, name)


def parse(text: bytes, path: str) -> Avoided:
    """A file's contents from its bytes, checked throughout.

    Args:
        text: JSON.
        path: for the words of an error.

    Raises:
        AvoidFileError: with the place in the file.
    """
    try:
        found = json.loads(text.decode(), parse_constant=_constant, object_pairs_hook=_pairs)
    except (ValueError, RecursionError) as error:
        said = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise AvoidFileError(f"{path}: expected JSON as attend doctor writes it, got: {said}.") from error
    form = _Form(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise form.wrong("format", f"{FORMAT!r}", found.get("format") if isinstance(found, dict) else found)
    if type(found.get("version")) is not int or found["version"] != VERSION:
        raise form.wrong("version", f"{VERSION}, which this release of attend reads", found.get("version"))
    form.fields("", found, ("format", "version", "written", "gradients", "machines", "avoid", "results"))
    form.text("written", found["written"])
    if not isinstance(found["gradients"], bool):
        raise form.wrong("gradients", "true or false", found["gradients"])
    form.items("results", found["results"], dict)  # for people: not looked into
    machines = [form.machine(f"machines[{n}]", it) for n, it in enumerate(form.items("machines", found["machines"]))]
    for n, it in enumerate(machines):
        if any(it[:2] == other[:2] for other in machines[:n]):
            raise form.wrong(f"machines[{n}]", "one for each framework and platform", f"{it.framework} twice")
    rules = [form.rule(f"avoid[{n}]", it) for n, it in enumerate(form.items("avoid", found["avoid"]))]
    return Avoided(path, tuple(machines), tuple(rules))


def _constant(name: str) -> Any:
    raise ValueError(f"{name}, which JSON does not have")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name that comes twice in one object")
    return found


class _Form(NamedTuple):
    """The form that a file must have; its methods raise where it has not."""

    path: str

    def wrong(self, where: str, expected: str, got: Any) -> AvoidFileError:
        shown = repr(got)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return AvoidFileError(f"{self.path}: {where}: expected {expected}, got {shown}. Write it anew: attend doctor.")

    def fields(self, where: str, it: Any, names: tuple[str, ...]) -> None:
        if not isinstance(it, dict):
            raise self.wrong(where, "an object", it)
        for name in names:
            if name not in it:
                raise self.wrong(f"{where}.{name}".lstrip("."), "a value", None)
        for name in it:
            if name not in names:
                raise self.wrong(where or "the file", f"no fields but {', '.join(names)}", name)

    def text(self, where: str, it: Any) -> str:
        if not isinstance(it, str) or not it.isprintable():
            raise self.wrong(where, "text that can be printed", it)
        return it

    def one_of(self, where: str, it: Any, names: Iterable[str]) -> str:
        names = tuple(names)
        if not isinstance(it, str) or it not in names:
            raise self.wrong(where, f"one of {', '.join(names)}", it)
        return it

    def items(self, where: str, it: Any, kind: type = list) -> Any:
        if not isinstance(it, kind):
            raise self.wrong(where, "a list" if kind is list else "an object", it)
        return it

    def names(self, where: str, it: Any, names: Iterable[str]) -> tuple[str, ...]:
        found = tuple(self.one_of(f"{where}[{n}]", x, names) for n, x in enumerate(self.items(where, it)))
        if not found:
            raise self.wrong(where, "at least one", it)
        return found

    def machine(self, where: str, it: Any) -> Machine:
        self.fields(where, it, Machine._fields)
        versions = self.items(f"{where}.versions", it["versions"], dict)
        return Machine(
            self.one_of(f"{where}.framework", it["framework"], ("torch", "jax")),
            self.one_of(f"{where}.platform", it["platform"], ("cpu", "cuda")),
            self.text(f"{where}.device", it["device"]),
            self.text(f"{where}.capability", it["capability"]),
            {self.text(f"{where}.versions", name): self.text(f"{where}.versions.{name}", version)
             for name, version in versions.items()},
        )

    def rule(self, where: str, it: Any) -> Rule:
        self.fields(where, it, Rule._fields)
        return Rule(
            self.one_of(f"{where}.framework", it["framework"], ("torch", "jax")),
            self.one_of(f"{where}.platform", it["platform"], ("cpu", "cuda")),
            self.one_of(f"{where}.implementation", it["implementation"], NAMES),
            self.one_of(f"{where}.dtype", it["dtype"], DTYPES),
            self.names(f"{where}.traits", it["traits"], TRAITS),
            self.names(f"{where}.results", it["results"], RESULTS),
            tuple(self.text(f"{where}.canaries[{n}]", x)
                  for n, x in enumerate(self.items(f"{where}.canaries", it["canaries"]))),
        )  # fmt: skip


def _and(names: Iterable[str]) -> str:
    *before, last = names
    return f"{', '.join(before)} and {last}" if before else last

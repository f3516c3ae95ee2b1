"""The choice among implementations. A named one never gives way to another, and no exception is swallowed.

What the file of ATTEND_AVOID rules out (`attend_shared.avoid`) is not chosen; asked for by name, it runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from attend_shared import avoid
from attend_shared.call import Call
from attend_shared.errors import UnsupportedError

NO_FUNCTIONS = "it has no score_fn and no mask_fn"
FOREIGN = "attend_{} has no implementation of this name"


class Implementation(NamedTuple):
    """One implementation on this machine.

    Attributes:
        name: as in `implementation=`.
        fused: whether it makes no q_len x kv_len array beyond one that the caller passed.
        available: whether it can run here at all.
        reason: why not, or None.
    """

    name: str
    fused: bool
    available: bool
    reason: str | None


class Explanation(NamedTuple):
    """Which implementation a call gets, and why the others do not serve it. str() is a table.

    Attributes:
        chosen: the name, or None where none can serve.
        rows: (name, None or the reason why it refuses or is avoided), in order of preference; last those that were
            asked for and that only the other framework has.
        notes: what else bears on the choice: that the file of ATTEND_AVOID does not hold for this machine.

    Example:
        >>> print(Explanation("einsum", (("sdpa", "it has no softcap"), ("einsum", None))))
        implementation  serves  why not
        sdpa            no      it has no softcap
        einsum          chosen
    """

    chosen: str | None
    rows: tuple[tuple[str, str | None], ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        cells = [("implementation", "serves", "why not")]
        cells += [(n, "chosen" if n == self.chosen else "no" if why else "yes", why or "") for n, why in self.rows]
        wide = max(len(row[0]) for row in cells)
        lines = (f"{name:{wide}}  {serves:6}  {why}".rstrip() for name, serves, why in cells)
        return "\n".join((*lines, *self.notes))


class Entry(NamedTuple):
    """A line of a framework's table of implementations.

    Attributes:
        name: as in `implementation=`.
        fused: as in `Implementation`.
        module: has `unavailable() -> None or a reason`, `refusal(call) -> None or a reason` (cheap and pure), and
            `attend(call, arrays) -> (out, lse or None)`.
        custom: whether it takes score_fn and mask_fn.
    """

    name: str
    fused: bool
    module: Any
    custom: bool = False


def refusal(entry: Entry, call: Call) -> str | None:
    """Why this implementation cannot serve this call, in words, or None."""
    if call.flash and not entry.fused:
        return "it makes a q_len x kv_len array, and flash=True allows none"
    if call.custom and not entry.custom:
        return entry.module.unavailable() or NO_FUNCTIONS
    return entry.module.unavailable() or entry.module.refusal(call)


def choose(table: Iterable[Entry], call: Call) -> Entry:
    """The first that can serve: of the names asked for, or else of the table, which is in order of preference.

    Raises:
        UnsupportedError: with every reason, where none can.
        AvoidFileError: the file of ATTEND_AVOID cannot be read.
    """
    reasons = []
    if call.names is None:
        avoids = avoid.in_force(call.framework, call.platform)
        for entry in table:
            reason = refusal(entry, call)
            if avoids and reason is None:
                reason = avoid.why(entry.name, call)
            if reason is None:
                return entry
            reasons.append((entry.name, reason))
    else:
        table = tuple(table)
        for name in call.names:
            asked = _named(table, name)
            reason = refusal(asked, call) if asked else FOREIGN.format(call.framework)
            if reason is None and asked:
                return asked
            reasons.append((name, str(reason)))
    raise UnsupportedError(tuple(reasons))


def explain(table: Iterable[Entry], call: Call) -> Explanation:
    """What `choose` would do, without doing it and without raising."""
    table = tuple(table)
    avoids = avoid.in_force(call.framework, call.platform)
    refused = {entry.name: refusal(entry, call) for entry in table}
    refused |= {name: FOREIGN.format(call.framework) for name in call.names or () if name not in refused}
    rows = tuple((name, reason or (avoid.why(name, call) if avoids else None)) for name, reason in refused.items())
    # Asked for by name, what is avoided runs.
    names, reasons = (refused, dict(rows)) if call.names is None else (call.names, refused)
    chosen = next((name for name in names if reasons[name] is None), None)
    note = avoid.note(call.framework, call.platform)
    return Explanation(chosen, rows, () if note is None else (note,))


def implementations(table: Iterable[Entry]) -> tuple[Implementation, ...]:
    """The table as a user sees it."""
    reasons = [(entry, entry.module.unavailable()) for entry in table]
    return tuple(Implementation(entry.name, entry.fused, reason is None, reason) for entry, reason in reasons)


def _named(table: Iterable[Entry], name: str) -> Entry | None:
    """The entry of this name; a loop, which for so few is faster than to make a dictionary of them."""
    for entry in table:
        if entry.name == name:
            return entry
    return None

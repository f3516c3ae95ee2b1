"""The orders of implementations that a benchmark teaches: what `attend_shared.measured` is made of."""

from __future__ import annotations

from typing import NamedTuple


class Order(NamedTuple):
    """What a rule says.

    Attributes:
        names: of implementations, the fastest first, for a call of which a gradient may be asked.
        forward: the same for one of which none can be.
        times: milliseconds of a call in a row of such calls, by workload and implementation: (forward, forward and
            backward), or (forward,). Empty where the order is what is expected, and nothing was measured.
    """

    names: tuple[str, ...]
    forward: tuple[str, ...]
    times: dict[str, dict[str, tuple[float, ...]]]


class Device(NamedTuple):
    """A device on which was measured.

    Attributes:
        name, date, file: which, when, and the results in this project's repository.
        versions: by framework, then by package.
        orders: by framework, then by the name of a rule.
    """

    name: str
    date: str
    file: str
    versions: dict[str, dict[str, str]]
    orders: dict[str, dict[str, Order]]

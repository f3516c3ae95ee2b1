"""Which implementation is fastest on a GPU: rules, and the orders that were measured for them.

A rule is a feature of a call; of the rules that hold, the first counts. What it says, an order of names for each
framework, was learnt from the benchmark of one device (`attend_shared.measured`, which `python -m benchmarks.gpu.learn`
writes), and holds for devices of the same compute capability. Elsewhere the frameworks keep an order that is safe.
An order decides among those that can serve a call; it never makes one serve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from attend_shared import measured
from attend_shared.call import Call
from attend_shared.choice import Entry, Explanation
from attend_shared.orders import Order

EXTRAS = {
    ("torch", "fa4"): "fa4",
    ("jax", "fa4"): "fa4-jax",
    ("jax", "fa3"): "fa3-jax",
    ("torch", "triton"): "triton",
    ("jax", "triton"): "triton-jax",
}
VERY_SHORT, SHORT, FEW = 128, 512, 16  # queries and keys of a short call; queries of a step of decoding
QUICK = 2**25  # logits of all heads, up to which the host takes longer to send a call off than the device to run it


class Rule(NamedTuple):
    """A feature that decides.

    Attributes:
        name: in words.
        holds: whether a call has it.
    """

    name: str
    holds: Callable[[Call], bool]


RULES = (
    Rule("few queries", lambda call: call.i <= FEW),
    Rule("float32", lambda call: call.dtype == "float32"),
    Rule("dropout", lambda call: call.dropout > 0),
    Rule("a bias", lambda call: call.bias is not None),
    Rule("a mask that is no key mask", lambda call: call.mask is not None and not call.key_masked),
    Rule("segment ids", lambda call: call.segments),
    Rule("a softcap", lambda call: call.softcap is not None),
    Rule("a window", lambda call: call.left is not None or call.right not in (None, 0)),
    Rule("a key mask, causal", lambda call: call.mask is not None and call.right == 0),
    Rule("a key mask", lambda call: call.mask is not None),
    Rule("lengths", lambda call: call.q_lengths or call.kv_lengths),
    Rule("sinks", lambda call: call.sinks is not None),
    Rule("lse", lambda call: call.return_lse),
    Rule("an offset", lambda call: call.right is not None and call.offset != "zero"),
    Rule("few logits", lambda call: call.b * call.h * call.i * call.j <= QUICK),
    Rule("very short sequences", lambda call: call.i <= VERY_SHORT and call.j <= VERY_SHORT),
    Rule("short sequences", lambda call: call.i <= SHORT and call.j <= SHORT),
    Rule("all pairs, head sizes up to 128", lambda call: call.left is None and call.right is None and call.d <= 128),
    Rule("head sizes up to 64", lambda call: call.d <= 64),
    Rule("head sizes up to 96", lambda call: call.d <= 96),
    Rule("head sizes up to 128", lambda call: call.d <= 128),
    Rule("larger head sizes", lambda call: True),
)


def rule(call: Call) -> Rule:
    """The first that holds.

    Args:
        call: any.
    """
    return next(each for each in RULES if each.holds(call))


def order(call: Call, capability: str) -> tuple[str, ...] | None:
    """The implementations that were measured for such calls on such a device, the fastest first; None if none were.

    Where no gradient can be asked of the call, forward alone counts.

    Args:
        call: it runs on a GPU.
        capability: the compute capability of that GPU, such as "9.0".
    """
    device = measured.DEVICES.get(capability)
    if device is None or call.custom or call.dtype == "float64":
        return None
    found = device.orders[call.framework].get(rule(call).name)
    return found and (found.names if call.gradient else found.forward)


def ordered(first: Iterable[str] | None, safe: Iterable[Entry], entries: Mapping[str, Entry]) -> Iterable[Entry]:
    """The entries of some names, then those of the safe order that are not among them.

    Args:
        first: names, or None.
        safe: the order where nothing was measured.
        entries: by name.
    """
    if first is None:
        yield from safe
        return
    names = tuple(first)
    for name in names:
        yield entries[name]
    for entry in safe:
        if entry.name not in names:
            yield entry


def explained(explanation: Explanation, table: Iterable[Entry], call: Call, capability: str) -> Explanation:
    """An explanation with why the order on a GPU is as it is, and what an extra that is not installed would gain.

    Args:
        explanation: of the call.
        table: in order of preference, for this call.
        call: any.
        capability: of the GPU, or "".
    """
    if call.platform != "cuda" or call.names is not None:
        return explanation
    names = order(call, capability)
    if names is None:
        what = "score_fn and mask_fn" if call.custom else "float64" if call.dtype == "float64" else ""
        where = f"with {what}" if what else f"on compute capability {capability}" if capability else "without a GPU"
        note = f"order: the safe one, for nothing was measured {where}"
        return explanation._replace(notes=(note, *explanation.notes))
    device, it = measured.DEVICES[capability], rule(call)
    found = device.orders[call.framework][it.name]
    versions = ", ".join(f"{name} {version}" for name, version in device.versions[call.framework].items())
    known = f"from {device.name}, {device.date}, {versions}" if found.times else "as expected: not measured yet"
    alone = "" if call.gradient else " without gradients"
    lines = [f"order: {', '.join(names)}, the rule for {it.name}{alone}, {known}"]
    for entry in table:
        if entry.name == explanation.chosen:
            break
        extra = EXTRAS.get((call.framework, entry.name))
        if extra and "pip install" in (entry.module.unavailable() or "") and entry.module.refusal(call) is None:
            lines.append(_gain(entry.name, extra, explanation.chosen, found))
    return explanation._replace(notes=(*lines, *explanation.notes))


def _gain(name: str, extra: str, chosen: str | None, found: Order) -> str:
    """What an extra would gain, from the first workload on which both were measured."""
    text = f'{name} would come first here: pip install "attend-twin[{extra}]"'
    for workload, times in found.times.items():
        mine, its = times.get(str(chosen)), times.get(name)
        if mine and its:
            ms = [" / ".join(f"{x:.3g}" for x in each) for each in (its, mine)]
            return f"{text}; {workload}: {ms[0]} ms, and {chosen} {ms[1]} ms (forward / with gradients)"
    return text

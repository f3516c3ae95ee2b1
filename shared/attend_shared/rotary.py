"""Rotary position embeddings: how fast each pair of coordinates turns, in float64, before any framework has a say.

    angle(position, n) = position * frequency[n]            frequency[n] = base ** (-2 n / dim), then scaled
    (x, y) -> factor * (x cos - y sin, y cos + x sin)       for each pair (x, y) of coordinates

What pairs with what is the layout: half-split (Llama, Qwen, Gemma: n with n + dim / 2) or interleaved (GPT-J: 2 n with
2 n + 1). One is the other with its coordinates in another order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from attend_shared.call import Framework, check_array, check_integers, is_int, number, wrong

# The keys of a scaling, as config.json names them: those that each kind needs, and those that it may have.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
KIND_NAMES = "one of " + ", ".join(f'"{kind}"' for kind in KINDS)
MOVING = ("dynamic", "longrope")  # their frequencies follow the longest sequence seen so far


@dataclass(frozen=True)
class Rotary:
    """What rotary embeddings a layer has: hashable options, no arrays.

    Args:
        base: the wavelength of the slowest pair is about 2 pi base; config.json calls it rope_theta.
        dim: how many coordinates of a head turn, an even number; the others stay as they are. None is all of them.
        interleaved: coordinate 2 n pairs with 2 n + 1, as in GPT-J; otherwise n with n + dim / 2, as in Llama.
        scaling: None, or the entry of config.json that stretches the positions: {"rope_type": kind, ...}, where kind is
            "default", "linear" {factor}, "llama3" {factor, low_freq_factor, high_freq_factor,
            original_max_position_embeddings} or "yarn" {factor, original_max_position_embeddings, and if wanted
            attention_factor, beta_fast, beta_slow, mscale, mscale_all_dim, truncate}. It is kept as a tuple of pairs.

    Raises:
        TypeError, ValueError: a wrong argument, an unknown kind, a key that is missing or unknown to its kind.

    Example:
        >>> Rotary(base=500000.0, scaling={"rope_type": "linear", "factor": 8}).scaling
        (('factor', 8), ('rope_type', 'linear'))
        >>> Rotary(scaling={"rope_type": "dynamic", "factor": 2})
        Traceback (most recent call last):
        ...
        ValueError: scaling: expected one of "default", "linear", "llama3", "yarn", got str 'dynamic'. Its frequencies \
follow the longest sequence seen so far, so that keys of a cache would not fit the queries that come later.

    References:
        Su et al., RoFormer (2021). Chen et al., Extending context window via positional interpolation (2023): linear.
        Llama Team, The Llama 3 herd of models (2024). Peng et al., YaRN (2023).
    """

    base: float = 10000.0
    dim: int | None = None
    interleaved: bool = False
    scaling: Mapping[str, Any] | tuple[tuple[str, Any], ...] | None = None

    def __post_init__(self) -> None:
        advice = "config.json calls it rope_theta."
        if number("base", self.base, advice) <= 0:
            raise wrong(ValueError, "base", "a number > 0", self.base, advice)
        if self.dim is not None:
            _check_dim(self.dim)
        if not isinstance(self.interleaved, bool):
            raise wrong(TypeError, "interleaved", "a bool", self.interleaved,
                        "True pairs 2 n with 2 n + 1 (GPT-J), False pairs n with n + dim / 2 (Llama).")  # fmt: skip
        if self.scaling is not None:
            object.__setattr__(self, "scaling", _scaling(self.scaling))
            if ("rope_type", "yarn") in (self.scaling or ()) and self.base <= 1:
                raise wrong(ValueError, "base", 'a number > 1 in "yarn"', self.base, advice)


class Rotation(NamedTuple):
    """A `Rotary` worked out for a head size.

    Attributes:
        frequencies: dim / 2 numbers, radians per position, in float64.
        factor: what both results of a pair are multiplied by: 1, but for YaRN.
        interleaved: as in `Rotary`.
    """

    frequencies: tuple[float, ...]
    factor: float
    interleaved: bool


@lru_cache(maxsize=256)
def rotation(rotary: Rotary, head_dim: int) -> Rotation:
    """The frequencies of a `Rotary` for a head size, in float64.

    Args:
        rotary: the options.
        head_dim: coordinates of a head; even, or `rotary.dim` says how many of them turn.

    Returns:
        Rotation(frequencies, factor, interleaved).

    Raises:
        ValueError: dim does not fit into the head, or the head is odd.

    Example:
        >>> rotation(Rotary(base=100.0), 4)
        Rotation(frequencies=(1.0, 0.1), factor=1.0, interleaved=False)
    """
    dim = check_fits(rotary, head_dim)
    frequencies = [1.0 / rotary.base ** (2 * n / dim) for n in range(dim // 2)]
    options = dict(rotary.scaling or ())
    kind, factor = options.get("rope_type", "default"), 1.0
    if kind == "linear":
        frequencies = [each / options["factor"] for each in frequencies]
    elif kind == "llama3":
        frequencies = [_llama3(each, options) for each in frequencies]
    elif kind == "yarn":
        frequencies, factor = _yarn(frequencies, rotary.base, dim, options)
    return Rotation(tuple(frequencies), factor, rotary.interleaved)


def check_fits(rotary: Rotary, head_dim: int) -> int:
    """How many coordinates of a head turn.

    Raises:
        ValueError: more than the head has, or an odd number.
    """
    if rotary.dim is None:
        if head_dim % 2:
            raise wrong(ValueError, "rotary", "an even head_dim, since coordinates turn in pairs", head_dim,
                        "Pass Rotary(dim=...) for the coordinates that turn.")  # fmt: skip
        return head_dim
    if rotary.dim > head_dim:
        raise wrong(ValueError, "rotary", f"dim up to the head_dim of {head_dim}", rotary.dim,
                    "dim=None turns all of them.")  # fmt: skip
    return rotary.dim


def check_rotate(framework: Framework, x: Any, positions: Any, turning: Rotation) -> None:
    """The arguments of `rotate`.

    Raises:
        TypeError, ValueError: which argument, what was expected, what came, what to try.
    """
    check_array(framework, "x", x)
    dim = 2 * len(turning.frequencies)
    if len(x.shape) != 4 or x.shape[3] < dim:
        raise wrong(ValueError, "x", f"(b, h, n, d) with d of at least {dim}", x,
                    "Split the heads out of the last axis.")  # fmt: skip
    check_positions(framework, "positions", positions, x.shape[0], x.shape[2])


def check_positions(framework: Framework, argument: str, value: Any, b: int, n: int) -> None:
    """Integers (n,), (1, n) or (b, n).

    Raises:
        TypeError, ValueError: in the words of the door.
    """
    advice = "They turn queries and keys only; who may attend to whom is said by mask, is_causal and window_size."
    check_integers(framework, argument, value, ((n,), (1, n), (b, n)), "(n,), (1, n) or (b, n)", advice)


def _check_dim(dim: Any) -> None:
    if not is_int(dim):
        raise wrong(TypeError, "dim", "an even number >= 2, or None", dim, "None turns the whole head.")
    if dim < 2 or dim % 2:
        raise wrong(ValueError, "dim", "an even number >= 2, or None", dim, "None turns the whole head.")


def _scaling(scaling: Any) -> tuple[tuple[str, Any], ...]:
    """The pairs of a scaling, sorted, once they are what their kind takes."""
    try:
        options = dict(scaling)
    except (TypeError, ValueError):
        raise wrong(TypeError, "scaling", 'a mapping with "rope_type", as in config.json, or None', scaling,
                    f"rope_type is {KIND_NAMES}.") from None  # fmt: skip
    if "type" in options:  # what older configs call it
        options.setdefault("rope_type", options.pop("type"))
    kind = options.get("rope_type")
    if not isinstance(kind, str) or kind not in KINDS:
        advice = "rope_type names the kind."
        if kind in MOVING:
            advice = ("Its frequencies follow the longest sequence seen so far, so that keys of a cache would not fit "
                      "the queries that come later.")  # fmt: skip
        raise wrong(ValueError, "scaling", KIND_NAMES, kind, advice)
    needed, allowed = KINDS[kind]
    missing = [name for name in needed if options.get(name) is None]
    unknown = sorted(set(options) - {"rope_type", *needed, *allowed})
    if missing or unknown:
        names = ", ".join((*needed, *(f"{name} or not" for name in allowed))) or "nothing more"
        found = f"{', '.join(map(str, missing))} missing" if missing else f"{', '.join(map(str, unknown))} as well"
        raise ValueError(f'scaling: expected "{kind}" with {names}, got {found}. Pass rope_theta as base.')
    if not isinstance(options.get("truncate", True), bool):
        raise wrong(TypeError, "scaling['truncate']", "a bool", options["truncate"],
                    "True rounds the ends of the ramp.")  # fmt: skip
    for name, value in options.items():
        if name not in ("rope_type", "truncate") and value is not None:
            argument = f"scaling[{name!r}]"
            if number(argument, value, f'It is a number in "{kind}".') <= 0:
                raise wrong(ValueError, argument, "a number > 0", value, f'It is a number in "{kind}".')
    if kind == "llama3" and not options["high_freq_factor"] > options["low_freq_factor"]:
        raise wrong(ValueError, "scaling['high_freq_factor']", "more than low_freq_factor", options["high_freq_factor"],
                    "Between the two, frequencies pass from divided to untouched.")  # fmt: skip
    return tuple(sorted(options.items()))


def _llama3(frequency: float, options: dict[str, Any]) -> float:
    """Slow pairs slower by the factor, fast ones as they are, those between by a mixture of both."""
    turns = options["original_max_position_embeddings"] * frequency / (2 * math.pi)  # over the original context
    low, high = options["low_freq_factor"], options["high_freq_factor"]
    kept = min(max((turns - low) / (high - low), 0.0), 1.0)
    return frequency * (kept + (1 - kept) / options["factor"])


def _yarn(frequencies: list[float], base: float, dim: int, options: dict[str, Any]) -> tuple[list[float], float]:
    """Pairs that turn beta_fast times or more over the original context stay, those that turn beta_slow times or less
    are slowed by the factor, and a ramp over their index lies between; logits grow by the factor squared."""
    stretch, context = options["factor"], options["original_max_position_embeddings"]

    def index(turns: float) -> float:
        """Where among the coordinates a pair turns so many times over the original context."""
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = index(options.get("beta_fast") or 32), index(options.get("beta_slow") or 1)
    if options.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    last = last + 0.001 if first == last else last
    slowed = [min(max((n - first) / (last - first), 0.0), 1.0) for n in range(dim // 2)]
    scaled = [each * (1 - s + s / stretch) for each, s in zip(frequencies, slowed, strict=True)]

    def growth(mscale: float) -> float:
        return 1.0 if stretch <= 1 else 0.1 * mscale * math.log(stretch) + 1.0

    factor = options.get("attention_factor")
    if factor is None:
        factor = growth(1.0)
        if options.get("mscale") and options.get("mscale_all_dim"):
            factor = growth(options["mscale"]) / growth(options["mscale_all_dim"])
    return scaled, float(factor)

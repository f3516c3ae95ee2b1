"""The cases that every implementation is run on, as data, and the arrays of each.

A case is one level of each factor in `attend_shared.factors`. `ALONE` has every level against a plain call; `PAIRS` is
a covering array, in which every two levels that can meet do meet, at a shape where it shows; `CASES` is both. A case's
name is made of its levels, and its arrays of its name: a name is enough to run it again, in this process or another,
listed or not.

Example:
    >>> each = case("decode", "bfloat16", "mask_key", "lse")
    >>> each.name, each.build().arguments["mask"].shape
    ('decode-bfloat16-mask_key-lse', (5, 17))
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

import numpy as np

from attend_shared.covering import Space
from attend_shared.factors import CONSTRAINTS, EDGES, FACTORS, SIZES, Level, Sizes
from attend_shared.problems import Problem, build

__all__ = ["ALONE", "CASES", "FEATURES", "LEVELS", "PAIRS", "Case", "Problem", "case", "find", "random_case", "select"]

LEVELS: dict[str, Level] = {level.name: level for factor in FACTORS for level in factor.levels}
SPACE = Space([[level.name for level in factor.levels] for factor in FACTORS], CONSTRAINTS)
FEATURES: tuple[str, ...] = tuple(dict.fromkeys(feature for level in LEVELS.values() for feature in level.features))

_PLACE = {factor.name: place for place, factor in enumerate(FACTORS)}
_PLAIN = frozenset(factor.levels[0].name for factor in FACTORS if factor.name not in ("shape", "dtype"))
# A covering array without these is what implementations that lack them can be tested on.
_RARE = ("sinks", "softcap", "score_fn", "mask_fn", "dropout", "lse")

if TYPE_CHECKING:
    ALONE: tuple[Case, ...]
    PAIRS: tuple[Case, ...]
    CASES: tuple[Case, ...]


@dataclass(frozen=True)
class Case:
    """One combination of levels.

    Attributes:
        levels: the name of one level of each factor, in the order of `attend_shared.factors.FACTORS`.
    """

    levels: tuple[str, ...]

    @cached_property
    def name(self) -> str:
        """The levels that are not plain, joined by "-"; shape and dtype always. Fit for a test's id."""
        return "-".join(level for level in self.levels if level not in _PLAIN)

    @property
    def features(self) -> tuple[str, ...]:
        """The rows of the tables in which this case counts, in the order of `FEATURES`."""
        mine = {feature for level in self.levels for feature in LEVELS[level].features}
        return tuple(feature for feature in FEATURES if feature in mine)

    @property
    def sizes(self) -> Sizes:
        """b, h, i, j and d."""
        return SIZES[self.level("shape")]

    def level(self, factor: str) -> str:
        """The level of one factor.

        Example:
            >>> case("causal").level("position")
            'causal'
        """
        return self.levels[_PLACE[factor]]

    def replace(self, *levels: str) -> Case:
        """The same case but for these levels, checked as in `case`.

        Example:
            >>> case("causal", "lse").replace("bfloat16", "window").name
            'square-bfloat16-window-lse'
        """
        given = {SPACE.home[SPACE.index[level]] for level in levels if level in SPACE.index}
        return case(*levels, *(level for place, level in enumerate(self.levels) if place not in given))

    def build(self) -> Problem:
        """The arrays, the same each time."""
        return build(self.name, dict(zip(_PLACE, self.levels, strict=True)))

    def __str__(self) -> str:
        return self.name


def case(*levels: str) -> Case:
    """The case with these levels, and the plain level of every other factor.

    Args:
        levels: names from `attend_shared.factors.FACTORS`, at most one of each factor, in any order.

    Returns:
        The case.

    Raises:
        ValueError: an unknown level, two of one factor, or levels that cannot meet, with the reason.

    Example:
        >>> case("causal", "softcap_30").name
        'square-float32-causal-softcap_30'
        >>> case("wide", "causal")
        Traceback (most recent call last):
        ValueError: levels: wide, causal, offset_default cannot meet: where i != j, causal and windows need an offset
    """
    chosen: dict[int, str] = {}
    for level in levels:
        if level not in LEVELS:
            close = difflib.get_close_matches(str(level), LEVELS, 3)
            raise ValueError(f"levels: expected names from attend_shared.factors, got {level!r}. "
                             + (f"Did you mean {' or '.join(close)}?" if close else "They stand in FACTORS there."))
        place = SPACE.home[SPACE.index[level]]
        if chosen.setdefault(place, level) != level:
            raise ValueError(f"levels: expected one for {FACTORS[place].name}, got {chosen[place]} and {level}")
    full = tuple(chosen.get(place, factor.levels[0].name) for place, factor in enumerate(FACTORS))
    for constraint in CONSTRAINTS:
        met = [level for forbidden in constraint.forbids for level in full if level in forbidden]
        if len(met) == len(constraint.forbids):
            raise ValueError(f"levels: {', '.join(met)} cannot meet: {constraint.reason}")
    return Case(full)


def find(name: str) -> Case:
    """The case of a name, whether it is in `CASES` or not.

    Args:
        name: level names joined by "-", as `Case.name` gives them.

    Raises:
        ValueError: as in `case`.

    Example:
        >>> find("tall-float64-causal-offset_end").sizes
        Sizes(b=3, h=4, i=21, j=9, d=12)
    """
    return case(*name.split("-"))


def select(pattern: str) -> tuple[Case, ...]:
    """The cases of `CASES` that a pattern describes, in order.

    Args:
        pattern: words; a case is taken if each occurs in its name or in one of its features. A word with "!" before it
            must not occur. No words: every case.

    Example:
        >>> {(each.level("position"), each.level("lse")) for each in select("window_left !lse")}
        {('window_left', 'lse_none')}
    """

    def described(each: Case) -> bool:
        text = "\n".join((each.name, *each.features))
        return all((word[1:] not in text) if word[0] == "!" else (word in text) for word in pattern.split())

    return tuple(each for each in _cases() if described(each))


def random_case(rng: np.random.Generator) -> Case:
    """Any case that can be, at a shape without tiles; each factor is plain half the time.

    Args:
        rng: what decides.

    Example:
        >>> random_case(np.random.default_rng(0)).name == random_case(np.random.default_rng(0)).name
        True
    """
    tiles = [name for name in SIZES if name.startswith("tiles")]

    def prefer(_: int, open_: int) -> list[int]:
        levels = [level for level in range(open_.bit_length()) if open_ >> level & 1]
        shuffled = [levels[n] for n in rng.permutation(len(levels))]
        plain = levels[0] if rng.random() < 0.5 else shuffled[0]
        return [plain, *(level for level in shuffled if level != plain)]

    order = [int(place) for place in rng.permutation(len(FACTORS))]
    chosen = SPACE.complete(SPACE.everything & ~SPACE.bits(tiles), order, prefer)
    assert chosen is not None  # the plain case is always allowed
    return Case(tuple(name for name in SPACE.names if chosen >> SPACE.index[name] & 1))


# The lists.


@cache
def _alone() -> tuple[Case, ...]:
    """Every level of every factor with what it needs; where shape has a say, against i < j too; and known traps."""
    alone = [case(*level.needs, level.name) for level in LEVELS.values()]
    return tuple(dict.fromkeys([*alone, *(case(*levels.split()) for levels in _WIDE + _TRAPS)]))


@cache
def _pairs() -> tuple[Case, ...]:
    """Three covering arrays: without what few implementations have, with it, and at the shapes where little happens."""
    paired = SPACE.bits(level.name for level in LEVELS.values() if level.paired)
    rare = [level.name for factor in _RARE for level in FACTORS[_PLACE[factor]].levels[1:]]
    edges = SPACE.bits(EDGES)
    usual = SPACE.masks[_PLACE["shape"]] & ~edges
    dtypes = SPACE.bits(("float32", "bfloat16"))  # what most implementations have
    arrays = (
        SPACE.cover(SPACE.pairs(), paired & ~edges & ~SPACE.bits(rare), dtypes)
        + SPACE.cover(SPACE.meeting(rare), paired & ~edges, dtypes)
        + SPACE.cover(SPACE.meeting(EDGES), paired & ~usual, dtypes)
    )
    alone = set(_alone())
    return tuple(each for each in dict.fromkeys(map(Case, arrays)) if each not in alone)


@cache
def _cases() -> tuple[Case, ...]:
    return _alone() + _pairs()


if not TYPE_CHECKING:

    def __getattr__(name: str) -> tuple[Case, ...]:
        """The lists, made when they are first asked for."""
        lists = {"ALONE": _alone, "PAIRS": _pairs, "CASES": _cases}
        if name not in lists:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return lists[name]()


# What means something else where i < j.
_WIDE = (
    "wide mask_key",
    "wide mask_dense",
    "wide causal offset_0",
    "wide causal offset_end",
    "wide causal offset_items",
    "wide window offset_0",
    "wide window offset_end",
    "wide window_left offset_end",
    "wide window_right offset_end",
    "wide window_self offset_end",
    "wide window_causal offset_end",
    "wide segments_both",
    "wide lengths_both",
    "wide bnhd",
)

# Combinations that ports are known to get wrong, beyond what stands alone.
_TRAPS = (
    "poison_nan mask_key_rank4",
    "poison_inf mask_key_shared expanded",
    "poison_nan lengths_kv",
    "poison_nan segments_alien",
    "poison_rows lengths_both lse",
    "tiles_square bfloat16 mask_left_padding causal",
    "tiles_square float16 mask_left_padding causal",
    "tiles_tall bfloat16 causal offset_end",
    "tiles_tall float32 window offset_0 lengths_both",
    "causal scale_negative",
    "bfloat16 scale_0",
    "bfloat16 scale_negative mask_empty_rows",
    "softcap_2 bias_full",
    "bias_lowest mask_key causal",
    "mask_empty_rows sinks_own lse",
    "mask_empty_rows lse",
    "scale_10 bfloat16",
    "heads_grouped dropout_tenth",
    "decode mask_empty_rows bias_inf_rows window_causal offset_0 dropout_tenth",
    "score_relative wide bfloat16 lse",
    "score_bound softcap_2 bias_inf_rows lse",
    "score_temperature poison_nan mask_key",
    "score_alibi tiles_wide causal offset_end",
    "rule_rows sinks_own lse",
    "rule_prefix score_relative dropout_half heads_grouped",
)

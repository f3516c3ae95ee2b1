"""Covering arrays: a short list of cases in which every pair of choices occurs that can occur.

A case chooses one level of each factor. The full product of the factors of `attend` has some 10**13 cases; most faults
need one choice or two that meet, and for those a few hundred cases are enough. Levels have unique names, so a case is a
tuple of names, one for each factor in order. The first level of a factor is its plain one, taken where nothing is won
by another.

Sets of levels are kept as the bits of an int, which makes counting the pairs that a level would win one operation.

References:
    D. M. Cohen, S. R. Dalal, M. L. Fredman, G. C. Patton. The AETG system: an approach to testing based on
    combinatorial design. IEEE Transactions on Software Engineering 23 (7), 1997.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple


class Constraint(NamedTuple):
    """A combination that cannot be, or would say nothing.

    Attributes:
        reason: why, in words.
        forbids: sets of level names, each within one factor; a case with one of each set is forbidden.
    """

    reason: str
    forbids: tuple[frozenset[str], ...]


class Space:
    """The factors with their levels, and what cannot be combined.

    Args:
        factors: the level names of each factor, the plain one first. No name occurs twice.
        constraints: what is forbidden.

    Example:
        >>> wet = Constraint("no umbrella in the sun", (frozenset({"sun"}), frozenset({"umbrella"})))
        >>> space = Space([("sun", "rain"), ("hat", "umbrella"), ("walk", "ride")], [wet])
        >>> len(space.cover(space.pairs())), space.feasible(["sun", "umbrella"])
        (5, False)
    """

    def __init__(self, factors: Sequence[Sequence[str]], constraints: Sequence[Constraint] = ()) -> None:
        self.names = tuple(name for factor in factors for name in factor)
        self.index = {name: n for n, name in enumerate(self.names)}
        if len(self.index) != len(self.names):
            raise ValueError("factors: expected level names that occur once")
        self.masks = tuple(self.bits(factor) for factor in factors)  # the levels of each factor
        self.home = tuple(n for n, factor in enumerate(factors) for _ in factor)  # level -> its factor
        self.everything = self.bits(self.names)
        self.forbidden = tuple(
            tuple((self.masks[self.home[self.index[next(iter(levels))]]], self.bits(levels)) for levels in each.forbids)
            for each in constraints
        )

    def bits(self, names: Iterable[str]) -> int:
        """The set of these levels."""
        return sum(1 << self.index[name] for name in names)

    def pairs(self) -> list[int]:
        """Every pair of levels of two factors: for each level, the set of the others that it should meet."""
        return [self.everything & ~self.masks[home] for home in self.home]

    def meeting(self, some: Collection[str]) -> list[int]:
        """The pairs of which one level at least is among these."""
        some_bits = self.bits(some)
        return [wanted if some_bits >> level & 1 else wanted & some_bits for level, wanted in enumerate(self.pairs())]

    def choose(self, open_: int, level: int) -> int | None:
        """What stays open once this level is chosen: the forbidden is removed. None where nothing would be left."""
        open_ = open_ & ~self.masks[self.home[level]] | 1 << level
        changed = True
        while changed:
            changed = False
            for forbidden in self.forbidden:
                escape = None  # the one factor by which the combination can still be avoided
                for mask, levels in forbidden:
                    if open_ & mask & ~levels:
                        if escape is not None:
                            break
                        escape = mask, levels
                else:
                    if escape is None:
                        return None
                    mask, levels = escape
                    if open_ & levels:
                        open_ &= ~levels
                        changed = True
        return open_

    def complete(self, open_: int, order: Sequence[int], prefer: Callable[[int, int], Iterable[int]]) -> int | None:
        """Choose a level of each factor, going back where that leads nowhere.

        Args:
            open_: the levels that may be chosen.
            order: the factors, in the order of choosing.
            prefer: from the chosen so far and a factor's open levels, the levels in the order to try them.

        Returns:
            The set of the chosen levels, or None where no case is allowed.
        """

        def descend(open_: int, depth: int, chosen: int) -> int | None:
            if depth == len(order):
                return chosen
            for level in prefer(chosen, open_ & self.masks[order[depth]]):
                left = self.choose(open_, level)
                if left is not None:
                    result = descend(left, depth + 1, chosen | 1 << level)
                    if result is not None:
                        return result
            return None

        return descend(open_, 0, 0)

    def feasible(self, names: Iterable[str], domain: int | None = None) -> bool:
        """Whether an allowed case has these levels."""
        open_: int | None = self.everything if domain is None else domain
        for name in names:
            if open_ is None or not open_ >> self.index[name] & 1:
                return False
            open_ = self.choose(open_, self.index[name])
        return open_ is not None and self.complete(open_, range(len(self.masks)), lambda _, f: _levels(f)) is not None

    def cover(
        self,
        wanted: Sequence[int],
        domain: int | None = None,
        balanced: int = 0,
        candidates: int = 4,
        seed: int = 0,
    ) -> list[tuple[str, ...]]:
        """Cases in which every wanted pair occurs, as far as it is feasible; greedy, and the same each time.

        Args:
            wanted: for each level, the set of levels that it should meet, as `pairs` and `meeting` give them.
            domain: the levels that may occur; all by default.
            balanced: levels that are plain alike: where nothing is won, the one of them that is used least is taken.
            candidates: how many cases are tried for each one taken.
            seed: of the orders in which factors are decided.

        Returns:
            The cases, each a tuple of level names, one for each factor.
        """
        domain = self.everything if domain is None else domain
        rng = random.Random(seed)
        shared = [bool(self.masks[home] & balanced) for home in self.home]
        rank = [0 if balanced >> level & 1 or not shared[level] else sys.maxsize for level in range(len(shared))]
        left = [pairs & domain if domain >> level & 1 else 0 for level, pairs in enumerate(wanted)]
        cases = []
        while any(left):
            best, best_gain = 0, 0
            for _ in range(candidates):
                case = self._candidate(left, domain, rank, rng)
                gain = sum((left[level] & case).bit_count() for level in _levels(case))
                if gain > best_gain:
                    best, best_gain = case, gain
            if not best:  # every candidate started from a pair that cannot be
                continue
            for level in _levels(best):
                left[level] &= ~best
                rank[level] += balanced >> level & 1
            cases.append(tuple(self.names[level] for level in _levels(best)))
        return cases

    def _candidate(self, left: list[int], domain: int, rank: list[int], rng: random.Random) -> int:
        """A case that starts from an uncovered pair and takes what wins most; among equals, the lowest rank.

        0 where no case has that pair, which is then struck out.
        """
        weight = [pairs.bit_count() for pairs in left]
        top = max(weight)
        if not top:
            return 0
        first = rng.choice([level for level, each in enumerate(weight) if each == top])
        partners = list(_levels(left[first]))
        top = max(weight[level] for level in partners)
        second = rng.choice([level for level in partners if weight[level] == top])
        others = [n for n in range(len(self.masks)) if n not in (self.home[first], self.home[second])]
        rng.shuffle(others)

        def prefer(chosen: int, open_: int) -> list[int]:
            return sorted(_levels(open_), key=lambda level: (-(left[level] & chosen).bit_count(), rank[level]))

        open_ = self.choose(domain, first)
        open_ = None if open_ is None or not open_ >> second & 1 else self.choose(open_, second)
        case = None if open_ is None else self.complete(open_, [self.home[first], self.home[second], *others], prefer)
        if case is None:
            left[first] &= ~(1 << second)
            left[second] &= ~(1 << first)
        return case or 0


def _levels(bits: int) -> Iterator[int]:
    """The levels of a set, in order."""
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest

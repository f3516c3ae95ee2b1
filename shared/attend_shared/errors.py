"""Errors that both frameworks raise with the same words."""

from __future__ import annotations

HEADLINE = "no implementation that was asked for can serve this call:"
ADVICE = 'Try implementation="einsum", which refuses nothing, or attend.explain(...) for the whole table.'


class UnsupportedError(NotImplementedError):
    """No implementation that was asked for can serve this call.

    Args:
        reasons: pairs of (implementation name, why it refuses), in the order in which they were asked. A hook into a
            host gives the names of the host's options instead.
        headline, advice: the lines before and after the reasons.

    Attributes:
        reasons: the same pairs, for programs that decide by them.

    Example:
        >>> print(UnsupportedError((("sdpa", "it has no softcap"),)))
        no implementation that was asked for can serve this call:
          sdpa: it has no softcap
        Try implementation="einsum", which refuses nothing, or attend.explain(...) for the whole table.
    """

    def __init__(self, reasons: tuple[tuple[str, str], ...], headline: str = HEADLINE, advice: str = ADVICE) -> None:
        self.reasons = tuple(reasons)
        self._words = headline, advice
        super().__init__("\n".join([headline, *(f"  {name}: {reason}" for name, reason in self.reasons), advice]))

    def __reduce__(self) -> tuple[type[UnsupportedError], tuple]:
        return (UnsupportedError, (self.reasons, *self._words))

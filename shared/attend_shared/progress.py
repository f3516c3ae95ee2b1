"""A bar for what takes long, on standard error; nothing where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

__all__ = ["bar"]


@contextmanager
def bar(text: str, total: int, shown: bool | None = None) -> Iterator[Callable[[int], None]]:
    """A bar while the block runs, which leaves nothing behind.

    Args:
        text: what is being done.
        total: in the unit of the steps.
        shown: whether to draw it; None does where standard error is a terminal. It takes rich.

    Yields:
        A function that is told each time how much more is done.

    Example:
        >>> with bar("reading", 3) as step:
        ...     step(1)
    """
    if shown is None:
        shown = sys.stderr.isatty()
    if not shown or find_spec("rich") is None:
        yield lambda more: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *times, console=Console(stderr=True), transient=True) as drawn:
        task = drawn.add_task(text, total=total)
        yield lambda more: drawn.advance(task, more)

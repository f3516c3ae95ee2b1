"""What the commands share: what they are told, where they print and write, and how they end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from attend_shared import parity, report
from attend_shared.parity import FRAMEWORKS, Twin
from attend_shared.processes import processors

SHOWN = 5  # failures that are printed in full
STYLES = {"ok": "green", "passed": "green", "failed": "bold red", "refused": "dim", "safe": "green", "refuses": "dim",
          "wrong": "bold red", "crashed": "bold red", "hung": "bold red", "not run": "yellow"}  # fmt: skip

framework_option = click.option(
    "--framework",
    "frameworks",
    multiple=True,
    type=click.Choice(FRAMEWORKS),
    help="Only this one; may be given again. Default: those that are installed.",
)
implementation_option = click.option(
    "--implementation", "implementations", multiple=True, metavar="NAME", help="Only this one; may be given again."
)


class Wrong(click.ClickException):
    """What was asked for cannot be done: one line, exit status 2."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(plain(message))


def settle(device: str) -> None:
    """What JAX reads once, when it is loaded: a GPU is shared with torch, and left alone where it is not asked for."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if device == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def load(frameworks: Sequence[str]) -> tuple[list[Twin], list[str]]:
    """The frameworks that are there, and what to say of those that are not; asked for by name, one must be there."""
    twins, missing = [], []
    for framework in dict.fromkeys(frameworks) or FRAMEWORKS:
        try:
            twins.append(parity.load(framework))
        except parity.MissingError as error:
            if frameworks:
                raise Wrong(f"--framework: {error}") from error
            missing.append(str(error))
    if not twins:
        raise Wrong("\n".join(["No framework is installed.", *missing]))
    return twins, missing


def check_implementations(implementations: Sequence[str], twins: Sequence[Twin]) -> None:
    """Raises Wrong unless each of these is one of a framework that runs."""
    names = [it.name for twin in twins for it in twin.table]
    for name in implementations:
        if name not in names:
            raise Wrong(f"--implementation: expected one of {', '.join(dict.fromkeys(names))}, got {name!r}.")


def check_limit(limit: float) -> None:
    """Raises Wrong where so many seconds cannot be waited for."""
    if not limit <= threading.TIMEOUT_MAX:  # NaN is not, either
        raise Wrong(f"--limit: expected at most {threading.TIMEOUT_MAX:.0f} seconds, got {limit:g}.")


def console() -> Console:
    """Standard output; what is not a terminal has no width to keep to."""
    console = Console(highlight=False, soft_wrap=False)
    return console if console.is_terminal else Console(highlight=False, width=max(console.width, 120))


@contextmanager
def stoppable() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end the block, and not the command with all that it has found. Gives the signals that came."""
    came: list[int] = []

    def stop(number: int, _: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    mine = threading.current_thread() is threading.main_thread()  # no other may
    signals = [it for it in (signal.SIGINT, signal.SIGTERM) if mine and signal.getsignal(it) is not signal.SIG_IGN]
    before = {it: signal.signal(it, stop) for it in signals}
    try:
        yield came
    except KeyboardInterrupt:
        if not came:  # raised by no signal that is caught here
            came.append(signal.SIGINT)
    finally:
        for it, handler in before.items():
            signal.signal(it, handler)


def stopped_at(came: Sequence[int], done: int, total: int) -> tuple[int, int] | None:
    """How much was done of how much, where a signal came before all was."""
    return (done, total) if came and done < total else None


def most_jobs(out: Console, jobs: int | None) -> int:
    """How many processes to start: each has a framework or two in memory, and more than processors gain nothing. Where
    it is not said, one for every two processors."""
    there = processors()
    if jobs is None:
        return max(1, there // 2)
    if jobs > there:
        say(out, f"--jobs {jobs}: {there}, one for each processor", "dim")
    return min(jobs, there)


def check_files(files: Mapping[str, Path | None]) -> None:
    """Before anything is computed: whether files, by their options, can be where they are to be written."""
    there: dict[str, str] = {}
    for option, file in files.items():
        if file is None:
            continue
        if not file.name:
            raise Wrong(f"{option}: expected the name of a file to write, got none.")
        folder = file.absolute().parent
        try:
            if not folder.is_dir():
                raise Wrong(f"{file}: there is no folder {file.parent} to write it to.")
            beside = report.beside(file)
        except OSError as error:
            raise unwritten(file, error) from error
        if not beside:
            continue
        if not os.access(folder, os.W_OK | os.X_OK):
            raise Wrong(f"{file}: it cannot be written: nothing may be made in {folder}.")
        first = there.setdefault(os.path.realpath(file), option)
        if first != option:
            raise Wrong(f"{option}: expected another file than that of {first}, got {file} for both.")


def write(path: Path, content: str | bytes, replace: bool = True) -> None:
    """Write a file whole or not at all; one that is there gives way, or not."""
    try:
        report.write(path, content, replace=replace)
    except FileExistsError as error:
        raise Wrong(f"{path}: there is such a file by now. --force replaces it.") from error
    except OSError as error:
        raise unwritten(path, error) from error


def unwritten(path: Path, error: OSError) -> Wrong:
    """The error to raise where something cannot be written."""
    return Wrong(f"{path}: it cannot be written: {error.strerror or error}.")


def progress_bar() -> Progress:
    """A bar on standard error that leaves nothing behind."""
    columns = (TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    left = (TextColumn("left"), TimeRemainingColumn())
    return Progress(*columns, *left, console=Console(stderr=True), transient=True)


def plain(text: str) -> str:
    """Text with what a terminal would not show, or would obey, spelt out: names in files may be anything."""
    return "".join(x if x.isprintable() or x in "\n\t" else ascii(x)[1:-1] for x in text)


def say(out: Console, text: str, style: str = "") -> None:
    """Text as it is, its lines left whole so that they can be copied."""
    out.print(Text(plain(text), style), soft_wrap=True)


def table_of(heads: Sequence[str], title: str | None = None) -> Table:
    """An empty table; a head with "#" before it is a column of numbers."""
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for head in heads:
        justify: Any = "right" if head.startswith("#") else "left"
        table.add_column(head.lstrip("#"), justify=justify, overflow="fold")
    return table


def print_refused(out: Console, counted: str, refused: Sequence[tuple[str, str, str, int]]) -> None:
    """The table of refusals: framework, implementation, reason, and how many of what is counted."""
    if refused:
        table = table_of(("implementation", f"#{counted}", "reason"), "Refused")
        for framework, implementation, reason, n in refused:
            table.add_row(f"{framework} {implementation}", str(n), Text(reason))
        out.print(table)

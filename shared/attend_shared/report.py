"""What a parity run leaves behind: JSON for programs, one page of HTML for people."""

from __future__ import annotations

import html
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from attend_shared.parity import CHECKS, EVERYTHING, Difference, Result, Summary, reasons, stop_words, summarise

__all__ = ["Apart", "Run", "as_html", "as_json", "finite", "number", "plain", "repeat", "write"]


class Run(NamedTuple):
    """A parity run.

    Attributes:
        device: in words.
        versions: of what took part.
        missing: for each framework that is not installed, how to get it.
        results: of every case on every implementation, and of every wrong call.
        differences: between the frameworks, of every case.
        seconds: what all of it took, oracle included.
        stopped: of a run that was stopped before its end, how many cases were run and how many were asked for, wrong
            calls among them.
    """

    device: str
    versions: dict[str, str]
    missing: tuple[str, ...]
    results: tuple[Result, ...]
    differences: tuple[Difference, ...]
    seconds: float
    stopped: tuple[int, int] | None = None

    @property
    def failures(self) -> tuple[Result, ...]:
        """What is wrong, in order."""
        return tuple(result for result in self.results if result.verdict == "failed")

    @property
    def summaries(self) -> list[Summary]:
        """The rows of the table; those of one implementation stand together."""
        return summarise(self.results)

    @property
    def apart(self) -> list[Apart]:
        """The worst difference of every two implementations that were compared."""
        groups: dict[tuple[tuple[str, str], tuple[str, str]], list[Difference]] = {}
        for each in self.differences:
            groups.setdefault((each.first, each.second), []).append(each)
        return [
            Apart(" ".join(first), " ".join(second), len(group), max(group, key=lambda each: each.share))
            for (first, second), group in groups.items()
        ]

    @property
    def verdict(self) -> str:
        """The run in one line."""
        counts = Counter(result.verdict for result in self.results)
        head = "" if self.stopped else "passed"
        head = ", ".join(filter(None, ["FAILED" if counts["failed"] else head, stop_words(self.stopped, "cases")]))
        return (f"{head}: {counts['ok']} results as they should be, {counts['refused']} refused with a reason, "
                f"{counts['failed']} wrong, in {self.seconds:.0f} s")  # fmt: skip


class Apart(NamedTuple):
    """Two implementations of different frameworks, the cases that they were compared in, and where they differ most."""

    first: str
    second: str
    cases: int
    worst: Difference


def repeat(result: Result) -> str:
    """The command that runs one result again; a wrong call has none of its own."""
    if result.implementation == CHECKS:
        return f"attend parity --framework {result.framework} --case {CHECKS}"
    return f"attend parity --framework {result.framework} --implementation {result.implementation} --case {result.case}"


def number(value: float) -> str:
    """A share of a budget in few letters.

    Example:
        >>> number(0.25), number(0.0), number(1234.5), number(float("inf"))
        ('0.25', '0', '1.2e+03', 'inf')
    """
    return (
        "0"
        if value == 0
        else f"{value:.2f}"
        if 0.005 <= value < 1000
        else f"{value:.1e}"
        if math.isfinite(value)
        else "inf"
    )


def as_json(run: Run) -> dict[str, Any]:
    """Everything about a run in what JSON has; infinity is the text "inf".

    Args:
        run: see `Run`.

    Returns:
        verdict: "passed", "failed" or, of a run that was stopped and had found nothing wrong, "stopped"; stopped: None,
        or done and of, how many of the cases that were asked for were run; device, versions, missing, seconds; rows
        (one for each implementation and feature); differences (the worst of every two implementations); refusals
        (counted); failures (how many); results (every one, with the error and budget of out, lse and each gradient).
    """
    return {
        "verdict": "failed" if run.failures else "stopped" if run.stopped else "passed",
        "stopped": run.stopped and {"done": run.stopped[0], "of": run.stopped[1]},
        "device": run.device,
        "versions": run.versions,
        "missing": list(run.missing),
        "seconds": round(run.seconds, 3),
        "rows": [finite({**row._asdict(), "verdict": row.verdict}) for row in run.summaries],
        "differences": [
            finite({"first": it.first, "second": it.second, "cases": it.cases, "share": it.worst.share,
                    "worst": it.worst.worst, "case": it.worst.case})
            for it in run.apart
        ],
        "refusals": [
            {"framework": framework, "implementation": name, "reason": why, "cases": n}
            for framework, name, why, n in reasons(run.results)
        ],
        "failures": len(run.failures),
        "results": [plain(result) for result in run.results],
    }  # fmt: skip


def plain(result: Result) -> dict[str, Any]:
    """One result in what JSON has."""
    return finite({**result._asdict(), "errors": [finite(row._asdict()) for row in result.errors]})


def finite(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields, with text for the numbers that JSON lacks."""
    return {name: str(x) if isinstance(x, float) and not math.isfinite(x) else x for name, x in fields.items()}


def beside(path: Path) -> bool:
    """Whether `write` makes a new file there, so that its folder must let it; else what is there is written to."""
    return not path.is_symlink() and (not path.exists() or path.is_file())


def write(path: Path, content: str | bytes, replace: bool = True) -> None:
    """Write a file beside its name and rename it there, so that no one finds half of it.

    Args:
        path: in a folder that exists. What is there and no plain file, such as /dev/stdout, stays and is written to.
        content: text becomes UTF-8.
        replace: whether a file that is there gives way.

    Raises:
        FileExistsError: one is there, and does not.
    """
    if not replace and path.exists():
        raise FileExistsError(f"{path} is there")
    content = content.encode() if isinstance(content, str) else content
    if not beside(path):
        path.write_bytes(content)
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# The page.

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; --paper: #fff; --good: #1a7f4b;
        --bad: #c02b2b; --bar: #7aa2d6; --fill: #f4f6f9 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --soft: #97a3b3; --line: #333c48; --paper: #14181e; --good: #4cc38a; --bad: #ff7b72;
          --bar: #4f7cb8; --fill: #1c222b } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
       max-width: 62rem; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 0 .3rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
p, li { color: var(--soft) } .verdict { font-weight: 600; font-size: 1.1rem } .ok { color: var(--good) }
.failed { color: var(--bad); font-weight: 600 } .refused { color: var(--soft) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .22rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
th { font-weight: 600; color: var(--soft); font-size: .85rem } td.n, th.n { text-align: right }
tr.all td { background: var(--fill); font-weight: 600 }
.bar { display: inline-block; height: .6rem; background: var(--bar); border-radius: 2px; vertical-align: middle }
.scale { display: inline-block; width: 9rem; border-right: 2px solid var(--bad) }
pre { background: var(--fill); padding: .8rem; overflow-x: auto; font-size: .8rem } details { margin: .4rem 0 }
code { font-size: .85rem; overflow-wrap: anywhere } summary { cursor: pointer; font-weight: 600 }
"""


def as_html(run: Run) -> str:
    """A run as one page that needs nothing else: no script, no font, no picture from elsewhere.

    Args:
        run: see `Run`.
    """
    state = "failed" if run.failures else "stopped" if run.stopped else "ok"
    facts = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    parts = [
        "<!doctype html>", '<html lang="en">', '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<title>attend parity</title>", f"<style>{_STYLE}</style>",
        "<h1>attend parity</h1>",
        f'<p class="verdict {state}">{_text(run.verdict)}</p>',
        f"<p>{_text(run.device)}<br>{_text(facts)}</p>",
        *(f"<p>{_text(line)}</p>" for line in run.missing),
    ]  # fmt: skip
    if run.failures:
        parts += ["<h2>What is wrong</h2>"]
        parts += [
            f"<details open><summary>{_text(f'{it.framework} {it.implementation}: {it.case}')}</summary>"
            f"<pre>{_text(f'{it.text}')}\n\n{_text(repeat(it))}</pre></details>"
            for it in run.failures
        ]
    if run.apart:
        parts += [
            "<h2>Between the frameworks</h2>",
            "<p>The largest difference of two results as a share of the error budget.</p>",
        ]
        pairs = [
            (
                _text(it.first),
                _text(it.second),
                str(it.cases),
                number(it.worst.share),
                _in(it.worst.worst, it.worst.case),
            )
            for it in run.apart
        ]
        parts += _table(("one", "other", "#cases", "#difference / budget", "worst in"), [("", pair) for pair in pairs])
    parts += [
        "<h2>Against the oracle</h2>",
        "<p>The worst error of out, lse and every gradient as a share of its budget. A bar that reaches the line is at "
        "its budget. A case counts in every feature that it has.</p>",
    ]
    for name in dict.fromkeys((row.framework, row.implementation) for row in run.summaries):
        rows = [row for row in run.summaries if (row.framework, row.implementation) == name]
        parts += [f"<h2>{_text(' '.join(name))}</h2>"]
        parts += _table(("feature", "#cases", "#refused", "#error / budget", "", "verdict", "worst in", "#seconds"),
                        [("all" if row.feature == EVERYTHING else "", _cells(row)) for row in rows])  # fmt: skip
    refused = reasons(run.results)
    if refused:
        parts += ["<h2>Refusals</h2>"]
        lines = [(_text(f"{framework} {name}"), str(n), _text(why)) for framework, name, why, n in refused]
        parts += _table(("implementation", "#cases", "reason"), [("", line) for line in lines])
    return "\n".join([*parts, "</html>", ""])


def _cells(row: Summary) -> tuple[str, ...]:
    width = min(row.share, 1.0) * 9
    bar = f'<span class="scale"><span class="bar" style="width:{width:.2f}rem"></span></span>' if row.worst else ""
    said = f"{row.failed} failed" if row.failed else row.verdict
    verdict = f'<span class="{row.verdict}">{said}</span>'
    return (_text(row.feature), str(row.cases), str(row.refused), number(row.share) if row.worst else "", bar, verdict,
            _in(row.worst, row.case), f"{row.seconds:.1f}")  # fmt: skip


def _in(worst: str, case: str) -> str:
    return f"{_text(worst)} <code>{_text(case)}</code>" if worst else ""


def _table(heads: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """A table of cells that are HTML; a head with "#" before it is a column of numbers."""
    marks = [' class="n"' if head.startswith("#") else "" for head in heads]
    cells = "".join(f"<th{mark}>{_text(head.lstrip('#'))}" for head, mark in zip(heads, marks, strict=True))
    lines = ["<table>", f"<tr>{cells}"]
    for kind, row in rows:
        cells = "".join(f"<td{mark}>{cell}" for cell, mark in zip(row, marks, strict=True))
        lines.append(f'<tr class="{kind}">{cells}' if kind else f"<tr>{cells}")
    return [*lines, "</table>"]


def _text(text: str) -> str:
    return html.escape(text)

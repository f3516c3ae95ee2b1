"""attend parity: every case on every implementation; what it prints and writes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from attend_shared import cases, parity, report, wrong_calls
from attend_shared.call import DTYPES
from attend_shared.cases import Case
from attend_shared.command.common import (
    SHOWN,
    STYLES,
    Wrong,
    check_files,
    check_implementations,
    check_limit,
    console,
    framework_option,
    implementation_option,
    load,
    most_jobs,
    print_refused,
    progress_bar,
    say,
    settle,
    stoppable,
    stopped_at,
    table_of,
    write,
)
from attend_shared.parity import CHECKS, EVERYTHING, Result, Summary


@click.command("parity")
@framework_option
@implementation_option
@click.option(
    "--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="Only cases of this one; may be given again."
)
@click.option(
    "--device", type=click.Choice(("cpu", "cuda")), default="cpu", show_default=True, help="Where to compute."
)
@click.option(
    "--case",
    "pattern",
    default="",
    metavar="PATTERN",
    help="Only this case; or those in whose name or features every word of PATTERN occurs, and no !word; "
    f'or "{CHECKS}": only the calls that must raise.',
)
@click.option(
    "--jobs", type=click.IntRange(1), default=1, show_default=True,
    help="Processes that share the cases, at most one for each processor.",
)  # fmt: skip
@click.option(
    "--limit", type=click.FloatRange(0, min_open=True),
    help="Seconds that an implementation may take for a case before it counts as hung. A single process, too, is then "
    f"not the command's own. Default: {parity.LIMIT:g} for several, none for one.",
)  # fmt: skip
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything to this file."
)
@click.option("--html", "html_file", type=click.Path(dir_okay=False, path_type=Path), help="Write a page to this file.")
def parity_command(
    frameworks: tuple[str, ...],
    implementations: tuple[str, ...],
    dtypes: tuple[str, ...],
    device: str,
    pattern: str,
    jobs: int,
    limit: float | None,
    json_file: Path | None,
    html_file: Path | None,
) -> None:
    """Run every case on every implementation, against the oracle and across the frameworks.

    Stopped by Ctrl-C or SIGTERM it prints and writes what it has found until then, marked as not whole.

    Exit status: 0 if all is as it should be, 1 if anything is not, 2 if it cannot be run; 130 (Ctrl-C) or 143 (SIGTERM)
    if it was stopped.
    """  # fmt: skip
    if limit is not None:
        check_limit(limit)
    check_files({"--json": json_file, "--html": html_file})
    chosen = _cases(pattern, dtypes)
    calls = wrong_calls.WRONG_CALLS if pattern in ("", CHECKS) and not implementations and not dtypes else ()
    if not chosen and not calls:
        raise Wrong(f"--case: {CHECKS} are of no implementation or dtype. Leave --implementation and --dtype out.")
    settle(device)
    twins, missing = load(frameworks)
    check_implementations(implementations, twins)
    try:
        place = parity.where(twins, device)
    except ValueError as error:
        raise Wrong(f"--device: {error}") from error
    versions = parity.versions(twins)
    out = console()
    for line in (place, ", ".join(f"{name} {version}" for name, version in versions.items()), *missing):
        say(out, line, "dim")

    jobs = most_jobs(out, jobs)
    started = time.perf_counter()
    found: list[parity.Report] = []
    checks: list[Result] = []
    total = len(chosen) + len(calls) * len(twins)
    with stoppable() as stopped, progress_bar() as progress:
        task = progress.add_task("parity", total=total)
        for result in parity.call_wrongly(twins, device, calls):
            checks.append(result)
            progress.update(task, advance=1, description=CHECKS)
        with closing(parity.run(twins, chosen, device, implementations, jobs, limit)) as reports:
            for each in reports:
                if stopped:  # what a framework made of it is no result
                    break
                found.append(each)
                progress.update(task, advance=1, description=each.case.level("shape"))
    order = {case: n for n, case in enumerate(chosen)}
    found.sort(key=lambda each: order[each.case])
    run = report.Run(
        place, versions, tuple(missing), (*(it for each in found for it in each.results), *checks),
        tuple(it for each in found for it in each.differences), time.perf_counter() - started,
        stopped_at(stopped, len(found) + len(checks), total),
    )  # fmt: skip

    _print_run(out, run)
    if json_file is not None:
        write(json_file, json.dumps(report.as_json(run), indent=1, allow_nan=False) + "\n")
    if html_file is not None:
        write(html_file, report.as_html(run))
    for file in (json_file, html_file):
        if file is not None:
            say(out, f"written: {file}", "dim")
    if run.stopped:
        raise SystemExit(128 + stopped[0])
    if run.failures:
        raise SystemExit(1)


def _cases(pattern: str, dtypes: Sequence[str]) -> tuple[Case, ...]:
    """The cases that are asked for: one by its name, listed or not, or those that a pattern describes."""
    if pattern == CHECKS:
        return ()
    listed = cases.select("")
    chosen = tuple(case for case in listed if case.name == pattern) or cases.select(pattern)
    if not chosen:
        try:
            chosen = (cases.find(pattern),)
        except ValueError as error:
            raise Wrong(f"--case: no case is described by {pattern!r}. As a name: {error}") from error
    kept = tuple(case for case in chosen if not dtypes or case.level("dtype") in dtypes)
    if not kept:
        raise Wrong(f"--dtype: none of the {len(chosen)} cases is {' or '.join(dtypes)}.")
    return kept


def _print_run(out: Console, run: report.Run) -> None:
    table = table_of(("implementation", "feature", "#cases", "#refused", "#error/budget", "verdict", "#seconds"))
    previous = None
    for row in run.summaries:
        whole = row.feature == EVERYTHING
        name = (row.framework, row.implementation)
        if name != previous:
            table.add_section()
            nothing = whole and row.verdict == "refused"  # its rows would say the same over and over
        if whole or not nothing:
            table.add_row(" ".join(name) if name != previous else "", *_cells(row), style="bold" if whole else None)
        previous = name
    out.print(table)
    if run.apart:
        table = table_of(
            ("one framework", "the other", "#cases", "#difference/budget", "worst in"), "Between the frameworks"
        )
        for apart in run.apart:
            where = f"{apart.worst.worst} {apart.worst.case}".strip()
            table.add_row(apart.first, apart.second, str(apart.cases), report.number(apart.worst.share), Text(where))
        out.print(table)
    print_refused(out, "cases", parity.reasons(run.results))
    for result in run.failures[:SHOWN]:
        say(out, f"{result.framework} {result.implementation}: {result.case}", STYLES["failed"])
        say(out, f"{result.text}\n")
        say(out, f"again: {report.repeat(result)}\n", "dim")
    if len(run.failures) > SHOWN:
        say(out, f"and {len(run.failures) - SHOWN} more, all of them in the files of --json and --html\n")
    say(out, run.verdict, STYLES["failed" if run.failures else "not run" if run.stopped else "ok"])


def _cells(row: Summary) -> tuple[str | Text, ...]:
    verdict = f"{row.failed} failed" if row.failed else row.verdict
    error = report.number(row.share) if row.worst else ""
    refused = str(row.refused) if row.refused else ""
    return row.feature, str(row.cases), refused, error, Text(verdict, STYLES[row.verdict]), f"{row.seconds:.1f}"

"""The command `attend`: bench, demo, doctor, parity, explain, port.

Frameworks are loaded where they are asked for, and only those.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from attend_shared import avoid, cases, demo, doctor, doctor_picture, parity, pictures, port, report, wrong_calls
from attend_shared.call import DTYPES, LAYOUTS, NAMES
from attend_shared.cases import Case
from attend_shared.checkpoints import SIZE_LIMIT, CheckpointError
from attend_shared.errors import UnsupportedError
from attend_shared.parity import CHECKS, EVERYTHING, FRAMEWORKS, Result, Summary, Twin
from attend_shared.processes import processors

__all__ = ["main"]

DIGITS = 100  # of a number; Python reads no more than 4300
SHOWN = 5  # failures that are printed in full
STYLES = {"ok": "green", "passed": "green", "failed": "bold red", "refused": "dim", "safe": "green", "refuses": "dim",
          "wrong": "bold red", "crashed": "bold red", "hung": "bold red", "not run": "yellow"}  # fmt: skip
SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}


class Wrong(click.ClickException):
    """What was asked for cannot be done: one line, exit status 2."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(_plain(message))


class Shape(click.ParamType):
    """Sizes with commas between them: 1,8,1024,64."""

    name = "shape"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """A tuple of sizes."""
        if isinstance(value, tuple):
            return value
        parts = str(value).strip("()[] ").split(",")
        if not all(part.strip().isdecimal() for part in parts):
            self.fail(f"expected sizes like 1,8,1024,64, got {value!r}", param, ctx)
        if any(len(part) > DIGITS for part in parts):
            self.fail(f"expected sizes of at most {DIGITS} digits, got {max(map(len, parts))}", param, ctx)
        sizes = tuple(int(part) for part in parts)
        if math.prod(size for size in sizes if size) > SIZE_LIMIT:
            self.fail(f"expected sizes that an array can have, got {value!r}", param, ctx)
        return sizes


class Window(click.ParamType):
    """left,right, each a whole number or none."""

    name = "left,right"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int | None, ...]:
        """The tuple that `attend` takes; its checks say what is wrong with the numbers."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip().lower() for part in str(value).strip("() ").split(",")]
        if not all(part == "none" or part.removeprefix("-").isdecimal() for part in parts):
            self.fail(f"expected two numbers or none, like 127,0 or none,0, got {value!r}", param, ctx)
        if any(len(part) > DIGITS for part in parts):
            self.fail(f"expected numbers of at most {DIGITS} digits, got {max(map(len, parts))}", param, ctx)
        return tuple(None if part == "none" else int(part) for part in parts)


def _version() -> str:
    try:
        return metadata.version("attend-twin")
    except metadata.PackageNotFoundError:
        return "not installed as a distribution"


class Commands(click.Group):
    """Where Ctrl-C is not the command's own to deal with, its exit status is 130, as of any program."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Aborted!", err=True)
            raise SystemExit(128 + signal.SIGINT) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(_version(), prog_name="attend")
def main() -> None:
    """One attention call with one answer in PyTorch and in JAX."""


# attend parity


@main.command("parity")
@click.option(
    "--framework",
    "frameworks",
    multiple=True,
    type=click.Choice(FRAMEWORKS),
    help="Only this one; may be given again. Default: those that are installed.",
)
@click.option(
    "--implementation", "implementations", multiple=True, metavar="NAME", help="Only this one; may be given again."
)
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
    json_file: Path | None,
    html_file: Path | None,
) -> None:
    """Run every case on every implementation, against the oracle and across the frameworks.

    Stopped by Ctrl-C or SIGTERM it prints and writes what it has found until then, marked as not whole.

    Exit status: 0 if all is as it should be, 1 if anything is not, 2 if it cannot be run; 130 (Ctrl-C) or 143 (SIGTERM)
    if it was stopped.
    """  # fmt: skip
    _check_files({"--json": json_file, "--html": html_file})
    chosen = _cases(pattern, dtypes)
    calls = wrong_calls.WRONG_CALLS if pattern in ("", CHECKS) and not implementations and not dtypes else ()
    if not chosen and not calls:
        raise Wrong(f"--case: {CHECKS} are of no implementation or dtype. Leave --implementation and --dtype out.")
    _settle(device)
    twins, missing = _load(frameworks)
    names = [it.name for twin in twins for it in twin.table]
    for name in implementations:
        if name not in names:
            raise Wrong(f"--implementation: expected one of {', '.join(dict.fromkeys(names))}, got {name!r}.")
    try:
        place = parity.where(twins, device)
    except ValueError as error:
        raise Wrong(f"--device: {error}") from error
    versions = parity.versions(twins)
    out = _console()
    for line in (place, ", ".join(f"{name} {version}" for name, version in versions.items()), *missing):
        _say(out, line, "dim")

    jobs = _jobs(out, jobs)
    started = time.perf_counter()
    found: list[parity.Report] = []
    checks: list[Result] = []
    total = len(chosen) + len(calls) * len(twins)
    with _stoppable() as stopped, _progress() as progress:
        task = progress.add_task("parity", total=total)
        for result in parity.call_wrongly(twins, device, calls):
            checks.append(result)
            progress.update(task, advance=1, description=CHECKS)
        with closing(parity.run(twins, chosen, device, implementations, jobs)) as reports:
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
        _stopped(stopped, len(found) + len(checks), total),
    )  # fmt: skip

    _print_run(out, run)
    if json_file is not None:
        _write(json_file, json.dumps(report.as_json(run), indent=1, allow_nan=False) + "\n")
    if html_file is not None:
        _write(html_file, report.as_html(run))
    for file in (json_file, html_file):
        if file is not None:
            _say(out, f"written: {file}", "dim")
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


def _settle(device: str) -> None:
    """What JAX reads once, when it is loaded: a GPU is shared with torch, and left alone where it is not asked for."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if device == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _load(frameworks: Sequence[str]) -> tuple[list[Twin], list[str]]:
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


def _print_run(out: Console, run: report.Run) -> None:
    table = _table(("implementation", "feature", "#cases", "#refused", "#error/budget", "verdict", "#seconds"))
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
        table = _table(
            ("one framework", "the other", "#cases", "#difference/budget", "worst in"), "Between the frameworks"
        )
        for apart in run.apart:
            where = f"{apart.worst.worst} {apart.worst.case}".strip()
            table.add_row(apart.first, apart.second, str(apart.cases), report.number(apart.worst.share), Text(where))
        out.print(table)
    refused = parity.reasons(run.results)
    if refused:
        table = _table(("implementation", "#cases", "reason"), "Refused")
        for framework, implementation, reason, n in refused:
            table.add_row(f"{framework} {implementation}", str(n), Text(reason))
        out.print(table)
    for result in run.failures[:SHOWN]:
        _say(out, f"{result.framework} {result.implementation}: {result.case}", STYLES["failed"])
        _say(out, f"{result.text}\n")
        _say(out, f"again: {report.repeat(result)}\n", "dim")
    if len(run.failures) > SHOWN:
        _say(out, f"and {len(run.failures) - SHOWN} more, all of them in the files of --json and --html\n")
    _say(out, run.verdict, STYLES["failed" if run.failures else "not run" if run.stopped else "ok"])


def _cells(row: Summary) -> tuple[str | Text, ...]:
    verdict = f"{row.failed} failed" if row.failed else row.verdict
    error = report.number(row.share) if row.worst else ""
    refused = str(row.refused) if row.refused else ""
    return row.feature, str(row.cases), refused, error, Text(verdict, STYLES[row.verdict]), f"{row.seconds:.1f}"


# attend explain


@main.command("explain")
@click.option("--framework", required=True, type=click.Choice(FRAMEWORKS))
@click.option("--q", required=True, type=Shape(), help="For example 1,8,1024,64.")
@click.option("--k", type=Shape(), help="Default: as q.")
@click.option("--v", type=Shape(), help="Default: as k.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Of q, k, v and sinks.")
@click.option("--layout", type=click.Choice(LAYOUTS), default="bhnd", show_default=True)
@click.option("--mask", type=Shape(), help="A boolean mask: b,j or rank 4.")
@click.option("--bias", type=Shape(), help="A bias, rank 4.")
@click.option("--bias-dtype", type=click.Choice(DTYPES), help="Default: as q.")
@click.option("--causal", is_flag=True)
@click.option("--window", type=Window(), help="window_size, for example 127,0 or none,0.")
@click.option("--q-offset", metavar="INT|data", help="An int, or data for an integer array (b,).")
@click.option("--segments", is_flag=True, help="Segment ids of queries and keys.")
@click.option("--q-lengths", is_flag=True)
@click.option("--kv-lengths", is_flag=True)
@click.option("--sinks", is_flag=True)
@click.option("--softcap", type=float)
@click.option("--scale", type=float)
@click.option("--dropout", type=float, default=0.0, help="With a seed.")
@click.option("--lse", is_flag=True, help="return_lse.")
@click.option(
    "--implementation",
    "implementations",
    multiple=True,
    type=click.Choice(NAMES),
    help="Ask for this one; given again, for the first that can.",
)
@click.option("--device", type=click.Choice(("cpu", "cuda")), help="Default: the GPU, where there is one.")
def explain_command(framework: str, device: str | None, **options: Any) -> None:
    """Which implementation a call gets, and why the others do not serve it. Only shapes are needed.

    Exit status: 0 if the call is right, 2 if an argument is wrong.
    """
    _settle("" if device is None else device)
    try:
        twin = parity.load(framework)
    except parity.MissingError as error:
        raise Wrong(str(error)) from error
    there = twin.bridge.devices()
    if device is not None and framework == "jax" and device not in there:
        raise Wrong(f"--device: JAX runs on {', '.join(there)} here.")
    float64 = "float64" in (options["dtype"], options["bias_dtype"])
    with parity.shapes(framework, device or there[-1], float64) as shape:
        try:
            explanation = twin.package.explain(**_arguments(shape, **options))
        except (TypeError, ValueError) as error:
            raise Wrong(str(error)) from error
    click.echo(_plain(str(explanation)))


def _arguments(
    shape: Any, *, q: tuple[int, ...], k: tuple[int, ...] | None, v: tuple[int, ...] | None, dtype: str, layout: str,
    mask: tuple[int, ...] | None, bias: tuple[int, ...] | None, bias_dtype: str | None, causal: bool, window: Any,
    q_offset: str | None, segments: bool, q_lengths: bool, kv_lengths: bool, sinks: bool, softcap: float | None,
    scale: float | None, dropout: float, lse: bool, implementations: tuple[str, ...],
) -> dict[str, Any]:  # fmt: skip
    """The arguments of `explain`, their arrays made by `shape`."""
    k = q if k is None else k
    v = k if v is None else v
    # Sizes of what follows from q and k; with a wrong rank the checks never get that far.
    heads, length = (1, 2) if layout == "bhnd" else (2, 1)
    b, h, i, j = ((*q, 0, 0, 0)[0], (*q, 0, 0, 0)[heads], (*q, 0, 0, 0)[length], (*k, 0, 0, 0)[length])
    found: dict[str, Any] = {
        "q": shape(q, dtype), "k": shape(k, dtype), "v": shape(v, dtype), "is_causal": causal, "window_size": window,
        "softcap": softcap, "scale": scale, "dropout": dropout, "return_lse": lse, "layout": layout,
        "implementation": implementations or None,
    }  # fmt: skip
    if mask is not None:
        found["mask"] = shape(mask, "bool")
    if bias is not None:
        found["bias"] = shape(bias, bias_dtype or dtype)
    elif bias_dtype is not None:
        raise Wrong("--bias-dtype: expected --bias as well, whose dtype it is.")
    if q_offset is not None:
        found["q_offset"] = shape((b,), "int32") if q_offset == "data" else _int(q_offset)
    if segments:
        found |= {"q_segment_ids": shape((b, i), "int32"), "kv_segment_ids": shape((b, j), "int32")}
    if q_lengths:
        found["q_lengths"] = shape((b,), "int32")
    if kv_lengths:
        found["kv_lengths"] = shape((b,), "int32")
    if sinks:
        found["sinks"] = shape((h,), dtype)
    if dropout:
        found["dropout_seed"] = 0
    return found


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise Wrong(f"--q-offset: expected an int or data, got {text!r}.") from error


# attend doctor


@main.command("doctor")
@click.option(
    "--framework",
    "frameworks",
    multiple=True,
    type=click.Choice(FRAMEWORKS),
    help="Only this one; may be given again. Default: those that are installed.",
)
@click.option("--device", type=click.Choice(("cpu", "cuda")), help="Default: the GPU, where a framework has one.")
@click.option(
    "--implementation", "implementations", multiple=True, metavar="NAME", help="Only this one; may be given again."
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(DTYPES),
    help=f"Only this one; may be given again. Default: {', '.join(doctor.DTYPES)}.",
)
@click.option("--quick", is_flag=True, help=f"The calls that fail most often, in {' and '.join(doctor.QUICK_DTYPES)}.")
@click.option("--forward", is_flag=True, help="Judge out and lse alone, for a machine that never trains.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"Write a file that makes the choice avoid what is wrong, for {avoid.VARIABLE}.",
)
@click.option("--force", is_flag=True, help="Replace the files of --output and --picture.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw it as a PNG; needs matplotlib.")
@click.option(
    "--jobs", type=click.IntRange(1),
    help="Processes at a time, at most one for each processor. Default: one for every two.",
)  # fmt: skip
@click.option(
    "--limit", type=click.FloatRange(0, min_open=True), default=doctor.LIMIT, show_default=True,
    help="Seconds that a call may take before it counts as hung.",
)  # fmt: skip
def doctor_command(
    frameworks: tuple[str, ...],
    device: str | None,
    implementations: tuple[str, ...],
    dtypes: tuple[str, ...],
    quick: bool,
    forward: bool,
    output: Path | None,
    force: bool,
    picture: Path | None,
    jobs: int | None,
    limit: float,
) -> None:
    """Run the calls that kernels are known to get wrong on every implementation of this machine, forward and backward.

    Each implementation runs in processes of its own, so that one that crashes or hangs is a finding like any other.

    Exit status: 0 if everything that implementation=None takes is right here, whatever else is wrong; 1 if something
    that it takes is wrong, crashes or hangs; 2 if it cannot be run; 130 (Ctrl-C) or 143 (SIGTERM) if it was stopped,
    when it prints what it has found and writes no file. A file that ATTEND_AVOID names has its say in what is taken.
    """
    if not limit <= threading.TIMEOUT_MAX:  # NaN is not, either
        raise Wrong(f"--limit: expected at most {threading.TIMEOUT_MAX:.0f} seconds, got {limit:g}.")
    _check_files({"--output": output, "--picture": picture})
    for file in (output, picture):
        if file is not None and file.exists() and not force:
            raise Wrong(f"{file}: there is such a file. --force replaces it.")
    if picture is not None and find_spec("matplotlib") is None:
        raise Wrong('--picture: it needs matplotlib, which is not installed. pip install "attend-twin[demo]"')
    _settle("" if device is None else device)
    twins, missing = _load(frameworks)
    names = [it.name for twin in twins for it in twin.table]
    for name in implementations:
        if name not in names:
            raise Wrong(f"--implementation: expected one of {', '.join(dict.fromkeys(names))}, got {name!r}.")
    platforms = {twin.framework: device or twin.bridge.devices()[-1] for twin in twins}
    try:
        for framework, platform in platforms.items():
            where = [twin for twin in twins if twin.framework == framework]
            parity.where(where, platform)
            missing += [note] if (note := avoid.note(framework, platform)) else []
    except avoid.AvoidFileError as error:
        raise Wrong(str(error)) from error
    except ValueError as error:
        raise Wrong(f"--device: {error}") from error
    if avoids := os.environ.get(avoid.VARIABLE):
        missing += [f"{avoid.VARIABLE}={avoids} has its say in what implementation=None takes"]
    machines = tuple(it for key in platforms.items() if (it := avoid.machine(*key)) is not None)
    out = _console()
    for it in machines:
        versions = ", ".join(f"{name} {version}" for name, version in it.versions.items())
        _say(out, f"{it.framework} on {it.platform}: {' '.join((it.device, it.capability)).strip()}; {versions}", "dim")
    for line in missing:
        _say(out, line, "dim")

    started = time.perf_counter()
    them = doctor.targets(twins, platforms, implementations)
    pairs = doctor.plan(dtypes or (doctor.QUICK_DTYPES if quick else doctor.DTYPES), quick)
    findings: list[doctor.Finding] = []
    jobs = _jobs(out, jobs or max(1, processors() // 2))
    total = len(them) * len(pairs)
    with _stoppable() as stopped, _progress() as progress:
        task = progress.add_task("doctor", total=total)
        with closing(doctor.examine(them, pairs, jobs=jobs, limit=limit, gradients=not forward)) as examined:
            for finding in examined:
                findings.append(finding)
                progress.update(task, advance=1, description=f"{finding.framework} {finding.implementation}")
    order = {(it.framework, it.implementation): n for n, it in enumerate(them)}
    place = {(canary.name, dtype): n for n, (canary, dtype) in enumerate(pairs)}
    findings.sort(key=lambda it: (order[it.framework, it.implementation], place[it.canary, it.dtype]))
    device_words = ", ".join(dict.fromkeys(it.device for it in machines))
    run = doctor.Run(device_words, machines, tuple(missing), tuple(findings), not forward,
                     time.perf_counter() - started, _stopped(stopped, len(findings), total))  # fmt: skip

    _print_doctor(out, run, them)
    if run.stopped:  # half a file would let through what was not run, and may not take the place of a whole one
        for file in (output, picture):
            if file is not None:
                _say(out, f"not written, as the run is not whole: {file}")
        raise SystemExit(128 + stopped[0])
    if output is not None:
        _write(output, json.dumps(doctor.as_json(run), indent=1, allow_nan=False) + "\n", force)
        _say(out, f"written: {output}", "dim")
    if picture is not None:
        _write(picture, doctor_picture.draw(run), force)
        _say(out, f"written: {picture}", "dim")
    if run.bad:
        name = "FILE" if output is None else os.path.abspath(output)
        first = "attend doctor --output FILE writes what to avoid; " if output is None else ""
        _say(out, f"{first}to have the choice avoid what is wrong: export {avoid.VARIABLE}={name}")
    if run.taken:
        raise SystemExit(1)


def _print_doctor(out: Console, run: doctor.Run, them: Sequence[doctor.Target]) -> None:
    found: dict[tuple[str, str, str], list[doctor.Finding]] = {}
    for it in run.findings:
        found.setdefault((it.framework, it.implementation, it.canary), []).append(it)
    rows = list(dict.fromkeys(it.canary for it in run.findings))
    served = {(it.framework, it.implementation) for it in run.findings if it.verdict != "refuses"}
    for framework in dict.fromkeys(it.framework for it in them if (it.framework, it.implementation) in served):
        names = [it.implementation for it in them if it.framework == framework]
        names = [name for name in names if (framework, name) in served]
        table = _table(("call", *names), framework)
        table.columns[0].no_wrap = True
        for row in rows:
            table.add_row(row, *(_cell(found.get((framework, name, row), [])) for name in names))
        out.print(table)
    _say(out, "* is what implementation=None takes; - refuses, as what is not listed does throughout\n", "dim")
    again = [it for it in run.findings if it.bits is not None]
    if again:
        table = _table(("implementation", "the same bits twice", "other bits, and in what"), "Run twice")
        for each in dict.fromkeys((it.framework, it.implementation) for it in again):
            mine = [it for it in again if (it.framework, it.implementation) == each]
            other = [f"{it.canary} {SHORT[it.dtype]}: {', '.join(it.bits)}" for it in mine if it.bits]
            table.add_row(" ".join(each), f"{len(mine) - len(other)} of {len(mine)}", Text("; ".join(other)))
        out.print(table)
    refused = doctor.reasons(run.findings)
    if refused:
        table = _table(("implementation", "#calls", "reason"), "Refused")
        for framework, implementation, reason, n in refused:
            table.add_row(f"{framework} {implementation}", str(n), Text(reason))
        out.print(table)
    shown = len(run.bad) if run.stopped else SHOWN  # no file has the rest
    for it in run.bad[:shown]:
        taken = ", which implementation=None takes" if it.chosen else ""
        said = it.verdict if it.verdict != "wrong" else f"{', '.join(it.results)} wrong"
        _say(out, f"{it.framework} {it.implementation} {it.dtype}, {it.canary}: {said}{taken}", STYLES[it.verdict])
        _say(out, f"{it.text}\n")
    if len(run.bad) > shown:
        _say(out, f"and {len(run.bad) - shown} more, all of them in the file of --output\n")
    _say(out, run.verdict, STYLES["failed" if run.taken else "not run" if run.stopped else "ok"])


def _cell(found: Sequence[doctor.Finding]) -> Text:
    """What came of a call in all dtypes: what is not as good as the rest with its dtypes."""
    chosen = "*" if any(it.chosen for it in found) else ""
    said = list(dict.fromkeys(it.verdict for it in found))
    if said == ["refuses"]:
        return Text("-", STYLES["refuses"])
    if said == ["safe"]:
        return Text(f"safe{chosen}", STYLES["safe"])
    parts = []
    for verdict in doctor.VERDICTS:
        mine = [it for it in found if it.verdict == verdict]
        if mine and verdict != "refuses":
            word = verdict.upper() if verdict == "wrong" else verdict
            parts.append(Text(f"{word} {' '.join(SHORT[it.dtype] for it in mine)}", STYLES[verdict]))
    return Text(", ").join(parts) + Text(chosen)


# attend demo


@main.command("demo")
@click.option(
    "--out",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Where to write demo.png and demo.json.",
)
def demo_command(folder: Path) -> None:
    """Embed sentences with MiniLM on attend, hold every attention call of it against the oracle, and port it to Flax.

    Exit status: 0 if everything is within its budget, 1 if not, 2 if it cannot be run.
    """
    there = next(it for it in (folder.absolute(), *folder.absolute().parents) if os.path.exists(it))
    _check_files({"--out": there / "demo.png"})  # the folders between are made
    _settle("cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    started = time.perf_counter()
    out = _console()
    try:
        with _progress() as progress:
            task = progress.add_task("loading", total=demo.STEPS)
            done = itertools.count()
            found = demo.run(lambda text: progress.update(task, completed=next(done), description=text))
            try:
                folder.mkdir(parents=True, exist_ok=True)
                pictures.draw(found, folder / "demo.png")
            except OSError as error:
                raise _unwritten(folder, error) from error
            _write(folder / "demo.json", json.dumps(demo.as_json(found), indent=1, allow_nan=False) + "\n")
    except (demo.MissingError, avoid.AvoidFileError) as error:
        raise Wrong(str(error)) from error
    _print_demo(out, found, time.perf_counter() - started)
    _say(out, f"written: {folder / 'demo.png'}, {folder / 'demo.json'}", "dim")
    if not found.passed:
        raise SystemExit(1)


def _print_demo(out: Console, found: demo.Demo, seconds: float) -> None:
    _say(out, ", ".join(f"{name} {version}" for name, version in found.versions.items()), "dim")
    table = _table(("#", "sentence", "#tokens", "#padding", "#nearest", "#similarity"), "What the embeddings say")
    for n, (sentence, tokens) in enumerate(zip(found.sentences, found.tokens, strict=True)):
        padding = tokens.count("[PAD]")
        others = found.similarities[n].copy()
        others[n] = -1.0
        nearest = int(others.argmax())
        real = str(len(tokens) - padding)
        table.add_row(str(n + 1), Text(sentence), real, str(padding or ""), str(nearest + 1), f"{others[nearest]:.3f}")
    out.print(table)
    table = _table(("what", "#off by", "#limit", "verdict"), "The whole model")
    for check in found.checks:
        verdict = "ok" if check.passed else "failed"
        numbers = (f"{x:.1e}" if x else "0" for x in (check.error, check.limit))
        table.add_row(Text(check.name), *numbers, Text(verdict, STYLES[verdict]))
    out.print(table)
    rows = demo.rows(found)
    layers = list(dict.fromkeys(result.case for result in found.results))
    heads = ("implementation", *(f"#{layer}" for layer in layers), "verdict", "#seconds")
    table = _table(heads, "Every attention call of it, forward and backward: the worst error as a share of its budget")
    for row in rows:
        shares = ("" if share is None else report.number(share) for share in row.shares)
        table.add_row(
            f"{row.framework} {row.implementation}",
            *shares,
            Text(row.verdict, STYLES[row.verdict]),
            f"{row.seconds:.1f}",
        )
    out.print(table)
    for row in rows:
        if row.text is not None:
            _say(out, f"{row.framework} {row.implementation}: {row.verdict}\n  {row.text}\n", STYLES[row.verdict])
    table = _table(("sentence", "another", "#torch", "#Flax", "#difference"), "The port: how alike the sentences are")
    for a in range(0, len(found.sentences) - 1, 2):
        for b in (a + 1, a + 2):
            if b < len(found.sentences):
                there, here = found.similarities[a, b], found.port.similarities[a, b]
                table.add_row(
                    Text(found.sentences[a]), Text(found.sentences[b]), f"{there:.6f}", f"{here:.6f}",
                    f"{abs(there - here):.0e}",
                )  # fmt: skip
    out.print(table)
    times = ", ".join(f"{name} {took:.2f} s" for name, took in found.port.seconds.items())
    _say(out, f"{times}\n", "dim")
    held = sum(result.verdict == "ok" for result in found.results)
    verdict = f"passed: {held} attention calls within their budgets" if found.passed else "FAILED: see above"
    _say(out, f"{verdict}, in {seconds:.0f} s", STYLES["ok" if found.passed else "failed"])


# attend port


@main.command("port")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(("flax", "torch")), default="flax", show_default=True)
@click.option("--verify", "verified", is_flag=True, help="Run both models on sample input; takes torch, transformers.")
@click.option("--overwrite", is_flag=True, help="Replace TARGET if it is a checkpoint folder.")
def port_command(source: Path, target: Path, to: Any, verified: bool, overwrite: bool) -> None:
    """Write the checkpoint folder SOURCE anew as TARGET, for Flax or back for transformers.

    A folder for Flax has flax_model.safetensors, which attend_jax.models.from_pretrained reads as well.

    Exit status: 0 if it is done, 1 if a layer is over its budget, 2 if it cannot be done.
    """
    _settle("cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    out = _console()
    try:
        if verified:  # before anything is written
            port.need("torch", "transformers", "jax", "flax")
        with _progress() as progress:
            task = progress.add_task("porting", total=None)
            try:
                done = port.port(
                    source, target, to, overwrite=overwrite,
                    step=lambda bytes_done, total: progress.update(task, completed=bytes_done, total=total),
                )  # fmt: skip
            except OSError as error:
                raise _unwritten(target, error) from error
        size = f"{done.parameters} parameters, {done.nbytes / 1e6:.1f} MB"
        _say(out, f"written: {target} ({size}, in {done.seconds:.1f} s)")
        if not verified:
            return
        layers = port.verify(*((source, target) if to == "flax" else (target, source)))
    except (CheckpointError, UnsupportedError, port.MissingError, avoid.AvoidFileError, OSError) as error:
        raise Wrong(str(error)) from error
    table = _table(("what", "#largest", "#error", "#error of torch", "#budget", "verdict"),
                   "On random tokens in float32, against transformers in float64")  # fmt: skip
    for layer in layers:
        verdict = "ok" if layer.passed else "failed"
        numbers = (f"{x:.1e}" for x in (layer.error, layer.reference, layer.budget))
        table.add_row(layer.name, f"{layer.largest:.3g}", *numbers, Text(verdict, STYLES[verdict]))
    out.print(table)
    wrong = sum(not layer.passed for layer in layers)
    verdict = f"FAILED: {wrong} of {len(layers)} over their budget" if wrong else "passed: the same in every layer"
    _say(out, verdict, STYLES["failed" if wrong else "ok"])
    if wrong:
        raise SystemExit(1)


# attend bench


@main.command("bench", context_settings={"ignore_unknown_options": True})
@click.option("--device", type=click.Choice(("cpu", "cuda")), help="Default: the GPU, where there is one.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench_command(device: str | None, arguments: tuple[str, ...]) -> None:
    """Measure time and memory of attention against its peers here. The benchmarks are in a checkout of this project.

    ARGUMENTS are those of the benchmark, which lists them: attend bench --device cpu -- --help, or cuda.

    Exit status: that of the benchmark; 2 if there is none; 130 (Ctrl-C) or 143 (SIGTERM) if it was stopped.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "gpu" / "__main__.py").is_file():
        raise Wrong(
            "The benchmarks are not installed with the packages. Get a checkout of this project, and in it: "
            'pip install -e ".[all]", then attend bench.'
        )
    if device is None:
        _settle("")
        twins, _ = _load(())
        device = "cuda" if any("cuda" in twin.bridge.devices() for twin in twins) else "cpu"
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    module = {"cpu": "benchmarks.cpu", "cuda": "benchmarks.gpu"}[device]
    benchmark = subprocess.Popen([sys.executable, "-m", module, *arguments], env={**os.environ, "PYTHONPATH": path})
    with _stoppable() as stopped:
        benchmark.wait()
    benchmark.kill()
    status = benchmark.wait()
    raise SystemExit(128 + stopped[0] if stopped else status)


# What they share.


def _console() -> Console:
    """Standard output; what is not a terminal has no width to keep to."""
    console = Console(highlight=False, soft_wrap=False)
    return console if console.is_terminal else Console(highlight=False, width=max(console.width, 120))


@contextmanager
def _stoppable() -> Iterator[list[int]]:
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


def _stopped(came: Sequence[int], done: int, total: int) -> tuple[int, int] | None:
    """How much was done of how much, where a signal came before all was."""
    return (done, total) if came and done < total else None


def _jobs(out: Console, jobs: int) -> int:
    """How many processes to start: each has a framework or two in memory, and more than processors gain nothing."""
    there = processors()
    if jobs > there:
        _say(out, f"--jobs {jobs}: {there}, one for each processor", "dim")
    return min(jobs, there)


def _check_files(files: Mapping[str, Path | None]) -> None:
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
            raise _unwritten(file, error) from error
        if not beside:
            continue
        if not os.access(folder, os.W_OK | os.X_OK):
            raise Wrong(f"{file}: it cannot be written: nothing may be made in {folder}.")
        first = there.setdefault(os.path.realpath(file), option)
        if first != option:
            raise Wrong(f"{option}: expected another file than that of {first}, got {file} for both.")


def _write(path: Path, content: str | bytes, replace: bool = True) -> None:
    try:
        report.write(path, content, replace=replace)
    except FileExistsError as error:
        raise Wrong(f"{path}: there is such a file by now. --force replaces it.") from error
    except OSError as error:
        raise _unwritten(path, error) from error


def _unwritten(path: Path, error: OSError) -> Wrong:
    return Wrong(f"{path}: it cannot be written: {error.strerror or error}.")


def _progress() -> Progress:
    """A bar on standard error that leaves nothing behind."""
    columns = (TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    left = (TextColumn("left"), TimeRemainingColumn())
    return Progress(*columns, *left, console=Console(stderr=True), transient=True)


def _plain(text: str) -> str:
    """Text with what a terminal would not show, or would obey, spelt out: names in files may be anything."""
    return "".join(x if x.isprintable() or x in "\n\t" else ascii(x)[1:-1] for x in text)


def _say(out: Console, text: str, style: str = "") -> None:
    """Text as it is, its lines left whole so that they can be copied."""
    out.print(Text(_plain(text), style), soft_wrap=True)


def _table(heads: Sequence[str], title: str | None = None) -> Table:
    """An empty table; a head with "#" before it is a column of numbers."""
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for head in heads:
        justify: Any = "right" if head.startswith("#") else "left"
        table.add_column(head.lstrip("#"), justify=justify, overflow="fold")
    return table


if __name__ == "__main__":
    main()

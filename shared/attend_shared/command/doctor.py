"""attend doctor: what is right on this machine; what it prints and writes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from attend_shared import avoid, doctor, doctor_picture, parity
from attend_shared.call import DTYPES
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

SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}


@click.command("doctor")
@framework_option
@click.option("--device", type=click.Choice(("cpu", "cuda")), help="Default: the GPU, where a framework has one.")
@implementation_option
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
    check_limit(limit)
    check_files({"--output": output, "--picture": picture})
    for file in (output, picture):
        if file is not None and file.exists() and not force:
            raise Wrong(f"{file}: there is such a file. --force replaces it.")
    if picture is not None and find_spec("matplotlib") is None:
        raise Wrong('--picture: it needs matplotlib, which is not installed. pip install "attend-twin[demo]"')
    settle("" if device is None else device)
    twins, missing = load(frameworks)
    check_implementations(implementations, twins)
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
    out = console()
    for it in machines:
        versions = ", ".join(f"{name} {version}" for name, version in it.versions.items())
        say(out, f"{it.framework} on {it.platform}: {' '.join((it.device, it.capability)).strip()}; {versions}", "dim")
    for line in missing:
        say(out, line, "dim")

    started = time.perf_counter()
    them = doctor.targets(twins, platforms, implementations)
    pairs = doctor.plan(dtypes or (doctor.QUICK_DTYPES if quick else doctor.DTYPES), quick)
    findings: list[doctor.Finding] = []
    jobs = most_jobs(out, jobs)
    total = len(them) * len(pairs)
    with stoppable() as stopped, progress_bar() as progress:
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
                     time.perf_counter() - started, stopped_at(stopped, len(findings), total))  # fmt: skip

    _print_doctor(out, run, them)
    if run.stopped:  # half a file would let through what was not run, and may not take the place of a whole one
        for file in (output, picture):
            if file is not None:
                say(out, f"not written, as the run is not whole: {file}")
        raise SystemExit(128 + stopped[0])
    if output is not None:
        write(output, json.dumps(doctor.as_json(run), indent=1, allow_nan=False) + "\n", force)
        say(out, f"written: {output}", "dim")
    if picture is not None:
        write(picture, doctor_picture.draw(run), force)
        say(out, f"written: {picture}", "dim")
    if run.bad:
        name = "FILE" if output is None else os.path.abspath(output)
        first = "attend doctor --output FILE writes what to avoid; " if output is None else ""
        say(out, f"{first}to have the choice avoid what is wrong: export {avoid.VARIABLE}={name}")
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
        table = table_of(("call", *names), framework)
        table.columns[0].no_wrap = True
        for row in rows:
            table.add_row(row, *(_cell(found.get((framework, name, row), [])) for name in names))
        out.print(table)
    say(out, "* is what implementation=None takes; - refuses, as what is not listed does throughout\n", "dim")
    again = [it for it in run.findings if it.bits is not None]
    if again:
        table = table_of(("implementation", "the same bits twice", "other bits, and in what"), "Run twice")
        for each in dict.fromkeys((it.framework, it.implementation) for it in again):
            mine = [it for it in again if (it.framework, it.implementation) == each]
            other = [f"{it.canary} {SHORT[it.dtype]}: {', '.join(it.bits)}" for it in mine if it.bits]
            table.add_row(" ".join(each), f"{len(mine) - len(other)} of {len(mine)}", Text("; ".join(other)))
        out.print(table)
    print_refused(out, "calls", doctor.reasons(run.findings))
    shown = len(run.bad) if run.stopped else SHOWN  # no file has the rest
    for it in run.bad[:shown]:
        taken = ", which implementation=None takes" if it.chosen else ""
        said = it.verdict if it.verdict != "wrong" else f"{', '.join(it.results)} wrong"
        say(out, f"{it.framework} {it.implementation} {it.dtype}, {it.canary}: {said}{taken}", STYLES[it.verdict])
        say(out, f"{it.text}\n")
    if len(run.bad) > shown:
        say(out, f"and {len(run.bad) - shown} more, all of them in the file of --output\n")
    say(out, run.verdict, STYLES["failed" if run.taken else "not run" if run.stopped else "ok"])


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

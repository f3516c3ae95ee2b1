"""Tables, aims, plot and page from the results of a run: `python -m benchmarks.report FILE` renews docs with them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table as ConsoleTable

from benchmarks.workloads import (
    COMPILED,
    ENTRIES,
    FEATURES,
    HEAD_SIZE,
    HEADS,
    LENGTHS,
    LINEAR,
    OF_SDPA,
    WITHOUT,
    Workload,
)

DOCS = Path(__file__).resolve().parent.parent / "docs"
SECTION = re.compile(r"(?<=<!-- generated: benchmarks -->\n).*?(?=<!-- end -->)", re.DOTALL)
MODES = [(causal, backward) for causal in (False, True) for backward in (False, True)]
FITTED = ((False, False), (True, True))


class Table(NamedTuple):
    """Rows of cells under a header, and remarks below."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def for_page(self) -> str:
        """Markdown."""
        lines = [f"### {self.title}", "", "| " + " | ".join(self.header) + " |", "|---" * len(self.header) + "|"]
        lines += ["| " + " | ".join(cell or "–" for cell in row) + " |" for row in self.rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes), *([""] if self.notes else [])])

    def for_console(self) -> ConsoleTable:
        """For rich."""
        table = ConsoleTable(title=self.title, title_justify="left")
        for n, name in enumerate(self.header):
            table.add_column(name, justify="left" if n == 0 else "right")
        for row in self.rows:
            table.add_row(*(cell or "–" for cell in row))
        return table


class Aim(NamedTuple):
    """What was aimed at, and what a run reached."""

    what: str
    aim: str
    reached: str
    met: bool | None


def times(record: dict[str, Any]) -> list[float]:
    """CPU seconds of every run."""
    return [run["cpu"] for run in record["runs"]]


def spread(record: dict[str, Any]) -> float:
    """The slowest run less the fastest, as a part of the median."""
    return (max(times(record)) - min(times(record))) / median(times(record))


def milliseconds(record: dict[str, Any] | None) -> str:
    """Median, spread, and the number of runs where it is below five; nothing where nothing ran."""
    if record is None or not record["runs"]:
        return ""
    value, count = 1000 * median(times(record)), len(record["runs"])
    text = f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
    remark = "1 run" if count == 1 else f"{100 * spread(record):.0f} %" + (f", {count} runs" if count < 5 else "")
    return f"{text} ({remark})"


class Results:
    """The measurements of a run, by workload and entry."""

    def __init__(self, run: dict[str, Any]) -> None:
        self.run = run
        self.records = run["measurements"]

    def all(self, entry: str, workload: Workload) -> list[dict[str, Any]]:
        """The measurements of one entry on one workload: at most one in a shared process, and one in its own."""
        return [each for each in self.records if each["entry"] == entry and Workload(**each["workload"]) == workload]

    def timed(self, entry: str, workload: Workload) -> dict[str, Any] | None:
        """The measurement in a shared process, warm, where there is one with runs; or the other."""
        found = self.all(entry, workload)
        return max(found, key=lambda each: (bool(each["runs"]), not each["fresh"]), default=None)

    def extra(self, entry: str, workload: Workload) -> float | None:
        """Extra peak megabytes, from the first call of a process of its own."""
        found = (each["runs"][0] for each in self.all(entry, workload) if each["fresh"] and each["runs"])
        return next((run["extra"] / 1e6 for run in found), None)

    def ratio(self, slower: str, faster: str, workload: Workload) -> tuple[float, float, float, int] | None:
        """Median, least and greatest of the ratios of CPU times, run for run, and their number."""
        pairs = [
            (a, b) for a in self.all(slower, workload) for b in self.all(faster, workload)
            if a["fresh"] == b["fresh"] and a["runs"] and b["runs"]
        ]  # fmt: skip
        if not pairs:
            return None
        warm = min(pairs, key=lambda pair: pair[0]["fresh"])
        found = [x / y for x, y in zip(*map(times, warm), strict=False)]
        return median(found), min(found), max(found), len(found)

    def reasons(self, entries: Iterable[str], workloads: Iterable[Workload]) -> tuple[str, ...]:
        """Why nothing ran, in words, where something was to."""
        found: dict[str, list[str]] = {}
        names = list(entries)
        for workload in workloads:
            planned = {name: self.all(name, workload) for name in names}
            planned = {name: records for name, records in planned.items() if records}
            missing = {name: records for name, records in planned.items() if not any(each["runs"] for each in records)}
            what = ", ".join(part for part in (workload.feature, f"{workload.n}") if part)
            by_reason: dict[str, list[str]] = {}
            for name, records in missing.items():
                by_reason.setdefault(records[0]["not_run"], []).append(name)
            for reason, who in by_reason.items():
                everyone = len(who) == len(planned) > 1
                found.setdefault(reason, []).append(f"all at {what}" if everyone else f"{' and '.join(who)} at {what}")
        return tuple(f"Not run, {why}: {'; '.join(who)}." for why, who in found.items())


def lengths(run: dict[str, Any]) -> list[int]:
    """Those of the run."""
    return [n for n in LENGTHS if any(each["workload"]["n"] == n for each in run["measurements"])]


def by_length(results: Results) -> list[Table]:
    """A table of times for each mode."""
    tables = []
    for causal, backward in MODES:
        loads = [Workload(n, causal, backward) for n in lengths(results.run)]
        cells = [(entry.name, *(milliseconds(results.timed(entry.name, load)) for load in loads)) for entry in ENTRIES]
        rows = [row for row in cells if any(row[1:])]
        if rows:
            notes = results.reasons((entry.name for entry in ENTRIES), loads)
            header = ("", *(f"{load.n}" for load in loads))
            tables.append(Table(f"CPU milliseconds: {loads[0].name}", header, rows, notes))
    return tables


def memory(results: Results) -> list[Table]:
    """Extra peak megabytes by length and mode."""
    tables = []
    for causal, backward in MODES:
        loads = [Workload(n, causal, backward) for n in lengths(results.run)]
        values = {entry.name: [results.extra(entry.name, load) for load in loads] for entry in ENTRIES}
        kept = [n for n in range(len(loads)) if any(each[n] is not None for each in values.values())]
        rows = [(name, *(megabytes(each[n]) for n in kept)) for name, each in values.items() if any(each)]
        if rows:
            header = ("", *(f"{loads[n].n}" for n in kept))
            tables.append(Table(f"Extra peak memory, MB: {loads[0].name}", header, rows))
    return tables


def megabytes(value: float | None) -> str:
    """As tables write it."""
    return "" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def against(found: tuple[float, float, float, int] | None, unit: str = "x") -> str:
    """A ratio with its extremes and its count."""
    if found is None:
        return "not run"
    middle, low, high, count = found
    digits = 3 if middle < 2 else 2
    return f"{middle:.{digits}f}{unit}" + (f" ({low:.2f} to {high:.2f}, {count} runs)" if count > 1 else " (1 run)")


def features(results: Results) -> list[Table]:
    """What torch's fused path does not serve."""
    rows, loads = [], []
    for n in lengths(results.run):
        for feature in FEATURES:
            load = Workload(n, False, True, feature=feature)
            loads.append(load)
            for without, ours in ((WITHOUT.name, "attend_torch blockwise"), (COMPILED[0].name, COMPILED[1].name)):
                records = [results.timed(name, load) for name in (without, ours)]
                if any(record and record["runs"] for record in records):
                    extra = [megabytes(results.extra(name, load)) for name in (without, ours)]
                    label = f"{feature}{', compiled' if 'compiled' in without else ''}"
                    ratio = against(results.ratio(without, ours, load))
                    rows.append((label, f"{n}", *(milliseconds(record) for record in records), ratio, *extra))
    header = ("forward + backward with", "tokens", "without, ms", "blockwise, ms", "faster by", "without, MB",
              "blockwise, MB")  # fmt: skip
    names = (WITHOUT.name, "attend_torch blockwise", *(entry.name for entry in COMPILED))
    notes = results.reasons(names, loads)
    return [Table("What torch's fused path does not serve", header, rows, notes)] if rows else []


def bfloat16(results: Results) -> list[Table]:
    """Forward at 2048."""
    load = Workload(2048, dtype="bfloat16")
    rows = [(entry.name, milliseconds(results.timed(entry.name, load))) for entry in ENTRIES]
    rows = [row for row in rows if row[1]]
    return [Table(f"CPU milliseconds: {load.name}, 2048 tokens", ("", "2048"), rows)] if rows else []


class Fit(NamedTuple):
    """A straight line through extra memory against length, by least squares.

    Attributes:
        entry, mode, tokens: whose, of what (its n says nothing), at which lengths.
        slope, start: MB for 1024 tokens, and MB at 0.
        worst: the largest residual, as a part of the largest memory.
    """

    entry: str
    mode: Workload
    tokens: list[int]
    slope: float
    start: float
    worst: float


def fits(results: Results) -> list[Fit]:
    """Over 2048 tokens and more, where three lengths or more were measured."""
    found = []
    for entry in LINEAR:
        for causal, backward in FITTED:
            points = [(n, results.extra(entry.name, Workload(n, causal, backward))) for n in LENGTHS if n >= 2048]
            known = [(n, extra) for n, extra in points if extra is not None]
            if len(known) >= 3:
                n, extra = np.array(known, float).T
                columns = np.stack([n / 1024, np.ones_like(n)], 1)
                (slope, start), *_ = np.linalg.lstsq(columns, extra, rcond=None)
                worst = float(np.abs(columns @ (slope, start) - extra).max() / extra.max())
                mode = Workload(0, causal, backward)
                found.append(Fit(entry.name, mode, n.astype(int).tolist(), float(slope), float(start), worst))
    return found


def growth(results: Results) -> list[Table]:
    """The fits, and the power of the length that time and memory grow with from the first to the last."""
    rows = []
    for fit in fits(results):
        ends = fit.tokens[0], fit.tokens[-1]
        first, last = (results.extra(fit.entry, fit.mode._replace(n=n)) or 0.0 for n in ends)
        power = f"{np.log(last / first) / np.log(ends[1] / ends[0]):.2f}" if first and last else ""
        line = f"{fit.slope:.2f} MB per 1024 tokens {'+' if fit.start >= 0 else '-'} {abs(fit.start):.1f} MB"
        tokens = ", ".join(map(str, fit.tokens))
        rows.append((fit.entry, fit.mode.name, tokens, line, f"{100 * fit.worst:.1f} %", power))
    header = ("", "mode", "tokens", "least squares", "worst residual, of the largest", "grows as length to the power")
    return [Table("Memory against length", header, rows)] if rows else []


class Choice(NamedTuple):
    """What implementation=None took, against the fastest entry of its framework, itself included."""

    workload: Workload
    framework: str
    chosen: str
    best: str
    slower_by: float
    allowed: float

    @property
    def is_within(self) -> bool:
        """Whether it is slower by no more than is allowed."""
        return self.slower_by <= self.allowed


def choices(results: Results) -> list[Choice]:
    """At every workload where a framework has its choice timed, or has an entry that is what it would choose."""
    found = []
    for load in dict.fromkeys(Workload(**each["workload"]) for each in results.records if not each["fresh"]):
        for framework in ("jax", "torch"):
            ours = results.timed(f"attend_{framework}", load)
            group = [  # with a feature, other code is not an implementation of the same call
                each for each in results.records if Workload(**each["workload"]) == load and not each["fresh"]
                and each["runs"] and each["framework"] == framework and "compiled" not in each["entry"]
                and (not load.feature or each["entry"].startswith("attend") or load.feature in OF_SDPA)
            ]  # fmt: skip
            if ours and ours["runs"]:
                best = min(group, key=lambda each: median(times(each)))
                slower_by = median(times(ours)) / median(times(best)) - 1
                allowed = max(0.05, spread(ours), spread(best))
                found.append(Choice(load, framework, ours["chosen"], best["entry"], slower_by, allowed))
    return found


def choice(results: Results) -> list[Table]:
    """The choice at every shape where it was timed."""
    rows = [
        (f"{each.workload.n}", each.workload.name, each.framework, each.chosen, each.best,
         f"{100 * each.slower_by:+.1f} %", f"{100 * each.allowed:.0f} %", "yes" if each.is_within else "no")
        for each in sorted(choices(results), key=lambda each: (each.framework, each.workload))
    ]  # fmt: skip
    header = ("tokens", "mode", "framework", "None takes", "the fastest", "slower by", "spread or 5 %", "within")
    return [Table("implementation=None against the fastest in the table", header, rows)] if rows else []


def compiling(results: Results) -> list[Table]:
    """What JAX takes to compile, and how often it does."""
    rows = []
    for n in lengths(results.run):
        for causal, backward in MODES:
            load = Workload(n, causal, backward)
            found = [
                {each[unit] for each in results.all(name, load) if each.get(unit)}
                for name in ("attend_jax blockwise", "jax.nn") for unit in ("compile_seconds", "compile_cpu_seconds")
            ]  # fmt: skip
            if found[0] and n in (2048, 8192):
                rows.append((f"{n}", load.name, *(", ".join(f"{x:.1f}" for x in sorted(each)) for each in found)))
    notes = tuple(
        f"{name.capitalize()}: {count} compilation{'s' * (count != 1)} for two calls of one shape."
        for name, count in results.run["compilations"].items()
    )
    header = ("tokens", "mode", "attend_jax blockwise, wall", "CPU", "jax.nn, wall", "CPU")
    return [Table("Seconds of tracing and compiling", header, rows, notes)] if rows else []


def floor(results: Results) -> list[Table]:
    """What 2048 tokens cost at the least: products and exponentials at the rates of this core, and bytes to move."""
    known = results.run["products"]
    rates = {name: value for name, value in known.items() if not name.startswith("exp")}
    exps = {name: value for name, value in known.items() if name not in rates}  # ns
    rate = max(rates.values())
    names = ("torch SDPA", "attend_torch blockwise", "attend_jax blockwise", "jax.nn")
    rows = []
    for backward in (False, True):
        load = Workload(2048, False, backward)
        products = 4 * load.n**2 * HEAD_SIZE * HEADS * (3.5 if backward else 1)
        linear = 4 * load.n * HEAD_SIZE * HEADS * (12 if backward else 4)
        least = 1000 * products / rate / 1e9
        found = [results.timed(name, load) for name in names]
        reached = (f"{1000 * median(times(each)) / least:.2f}x" if each and each["runs"] else "" for each in found)
        sizes = (f"{x / 1e6:.0f}" for x in (linear, load.logits))
        ms_of_exp = f"{(1 + backward) * load.logits / 4 * min(exps.values()) / 1e6:.1f}" if exps else ""
        rows.append((load.name, f"{products / 1e9:.1f}", f"{least:.1f}", ms_of_exp, *sizes, *reached))
    header = ("2048 tokens", "GFLOP", "ms at that rate", "ms of exponentials", "MB in and out",
              "MB of one array of logits", *names)  # fmt: skip
    notes = [f"The rate: {rate:.0f} GFLOP/s, the best of {', '.join(f'{name} {x:.0f}' for name, x in rates.items())}."]
    if exps:
        notes.append(f"ns of an exponential: {', '.join(f'{name} {x:.2f}' for name, x in exps.items())}.")
    return [Table("The floor", header, rows, tuple(notes))]


def aims(results: Results) -> list[Aim]:
    """Every aim with what was reached: the median decides."""
    jax, torch, found = "attend_jax blockwise", "attend_torch blockwise", []

    def faster(than: str, ours: str, load: Workload, least: float, what: str) -> None:
        ratio = results.ratio(than, ours, load)
        found.append(Aim(what, f"at least {least}x", against(ratio), None if ratio is None else ratio[0] >= least))

    def under(ours: str, load: Workload, most: float) -> None:
        extra = results.extra(ours, load)
        reached = "not run" if extra is None else f"{megabytes(extra)} MB"
        met = None if extra is None else extra < most
        found.append(Aim(f"extra memory of {ours}, {load.name}, {load.n}", f"under {most:.0f} MB", reached, met))

    for n, causal, backward, dtype, least in (
        (2048, False, False, "float32", 3.3), (2048, False, True, "float32", 2.6), (8192, False, False, "float32", 4.5),
        (8192, False, True, "float32", 2.4), (2048, True, False, "float32", 5.5), (2048, True, True, "float32", 4.0),
        (2048, False, False, "bfloat16", 5.5),
    ):  # fmt: skip
        load = Workload(n, causal, backward, dtype)
        faster("jax.nn", jax, load, least, f"{jax} faster than jax.nn, {load.name}, {n}")
    under(jax, Workload(8192), 200)
    under(jax, Workload(8192, backward=True), 350)
    for n in (2048, 8192):
        for backward, most in ((False, 1.25), (True, 1.5)):
            load = Workload(n, False, backward)
            ratio = results.ratio(jax, "torch SDPA", load)
            met = None if ratio is None else ratio[0] <= most
            what = f"{jax} against torch SDPA, {load.name}, {n}"
            found.append(Aim(what, f"at most {most}x its time", against(ratio), met))
    long = results.timed(jax, Workload(32768, True, True))
    reached = milliseconds(long)
    done = True if reached else None
    found.append(Aim("32768 tokens, causal, forward + backward in JAX", "completes", f"{reached or 'not run'}", done))
    for fit in fits(results):
        if fit.entry == jax:
            whole = (fit.tokens[0], fit.tokens[-1]) == (2048, LENGTHS[-1])
            what = f"memory of {jax} linear over 2048 to 32768, {fit.mode.name}"
            reached = f"worst residual {100 * fit.worst:.1f} % of the largest, {fit.tokens[0]} to {fit.tokens[-1]}"
            found.append(Aim(what, "a straight line", reached, fit.worst < 0.05 if whole else None))
    for feature in FEATURES:
        if feature != "bias of each head":
            load = Workload(8192, False, True, feature=feature)
            extras = [results.extra(name, load) for name in (WITHOUT.name, torch)]
            less = None if extras[0] is None or not extras[1] else extras[0] / extras[1]
            reached = "not run" if less is None else f"{less:.1f}x"
            met = None if less is None else less >= 10
            found.append(Aim(f"{torch} less memory, {feature}, 8192", "at least 10x", reached, met))
            if feature == "dropout":
                for n in (2048, 8192):
                    what = f"{torch} at least equal under torch.compile, dropout, {n}"
                    faster(COMPILED[0].name, COMPILED[1].name, load._replace(n=n), 1, what)
            else:
                faster(WITHOUT.name, torch, load, 1, f"{torch} faster, {feature}, 8192")
    made = choices(results)
    if made:
        late = [each for each in made if not each.is_within]
        reached = f"{len(made) - len(late)} of {len(made)}"
        if late:
            miss = max(late, key=lambda each: each.slower_by - each.allowed)
            where = f"{miss.framework}, {miss.workload.name}, {miss.workload.n}"
            reached += f"; the worst {where}: {100 * miss.slower_by:.0f} % slower"
        what = "implementation=None within 5 % or the spread of the fastest"
        found.append(Aim(what, "at every shape", reached, not late))
    for backward in (False, True):
        load = Workload(8192, False, backward)
        record = results.timed(jax, load) or {}
        clock, seconds = (record.get(name) for name in ("compile_seconds", "compile_cpu_seconds"))
        reached = "not run" if seconds is None else f"{seconds:.1f} s, {clock:.1f} s by the clock"
        met = None if seconds is None else seconds < 5
        found.append(Aim(f"CPU time of compiling {jax}, {load.name}, 8192", "under 5 s", reached, met))
    counts = results.run["compilations"]
    if counts:
        reached = ", ".join(f"{name}: {count}" for name, count in counts.items())
        met = set(counts.values()) == {1}
        found.append(Aim(f"compilations of {jax} for two calls of one shape", "1", reached, met))
    return found


def verdicts(results: Results) -> list[Table]:
    """The aims as a table."""
    words = {True: "yes", False: "no", None: "not run"}
    rows = [(each.what, each.aim, each.reached, words[each.met]) for each in aims(results)]
    return [Table("What was aimed at, and what was reached", ("", "aimed at", "reached", "met"), rows)]


def show(console: Console, shown: Iterable[Table], out: Path) -> None:
    """Print tables, and where every run is."""
    for table in shown:
        console.print(table.for_console())
        for note in table.notes:
            console.print(f"  {note}", style="dim", highlight=False)
    console.print(f"Every run is in {out}.", highlight=False)


def tables(run: dict[str, Any]) -> list[Table]:
    """All of them, in the order of the page."""
    results = Results(run)
    parts = (verdicts, floor, by_length, memory, growth, bfloat16, features, choice, compiling)
    return [table for part in parts for table in part(results)]


def summary(run: dict[str, Any]) -> str:
    """How many aims were met, and which were missed."""
    found = aims(Results(run))
    met, missed, left = ([each for each in found if each.met is verdict] for verdict in (True, False, None))
    text = f"Of {len(found)} aims {len(met)} are met, {len(missed)} missed, and {len(left)} not measured to the end."
    each = "; ".join(f"{aim.what}, {aim.aim}: {aim.reached}" for aim in missed)
    return f"{text} Missed: {each}." if missed else text


def section(run: dict[str, Any]) -> str:
    """The generated part of the page."""
    where, versions = run["machine"], run["versions"]
    facts = ", ".join(f"{name} {value}" for name, value in where.items())
    packages = ", ".join(f"{name} {value}" for name, value in versions.items())
    sessions = "; ".join(
        f"{each['started'][:16].replace('T', ' ')} UTC, {each['seconds'] / 60:.0f} of at most {each['minutes']:.0f} "
        f"minutes, {each['lanes']} measurements at a time, load of the machine before it {each['load at start']:.1f}"
        + (f", jobs with the words '{each['again']}' anew, sources {each['sources']}" if "again" in each else "")
        for each in run["sessions"]
    )
    about = f"{facts[0].upper()}{facts[1:]}. {packages}. Measured on {sessions}."
    return "\n".join(["", about, "", summary(run), "", *(table.for_page() for table in tables(run)), ""])


def plot(run: dict[str, Any], path: Path) -> None:
    """Time and memory against length, both axes logarithmic."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    results = Results(run)
    colours = {"jax.nn": "#d55e00", "attend_jax blockwise": "#0072b2", "torch SDPA": "#333333",
               "torch SDPA, math path": "#cc79a7", "attend_torch blockwise": "#009e73"}  # fmt: skip
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7.5), sharex=True, layout="constrained")
    for column, (causal, backward) in enumerate(FITTED):
        for row, unit in enumerate(("CPU seconds", "extra peak MB")):
            axis = axes[row][column]
            for name, colour in colours.items():
                points = []
                for n in LENGTHS:
                    load = Workload(n, causal, backward)
                    record = results.timed(name, load)
                    seconds = median(times(record)) if record and record["runs"] else None
                    if value := results.extra(name, load) if row else seconds:
                        points.append((n, value))
                if points:
                    axis.loglog(*zip(*points, strict=True), "o-", color=colour, label=name, markersize=4, base=10)
            axis.set(ylabel=unit, title=f"{Workload(0, causal, backward).name}: {'memory' if row else 'time'}")
            axis.set_xticks(LENGTHS, [str(n) for n in LENGTHS], rotation=30)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            if row:
                axis.set_xlabel("tokens")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"float32 (1, {HEADS}, tokens, {HEAD_SIZE}), one CPU core")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def publish(run: dict[str, Any]) -> None:
    """Renew docs/results/cpu.json, docs/benchmarks-cpu.png and the generated part of docs/benchmarks-cpu.md."""
    (DOCS / "results").mkdir(exist_ok=True)
    (DOCS / "results" / "cpu.json").write_text(json.dumps(run, indent=1) + "\n")
    page = DOCS / "benchmarks-cpu.md"
    page.write_text(SECTION.sub(lambda _: section(run), page.read_text()))
    plot(run, DOCS / "benchmarks-cpu.png")


if __name__ == "__main__":
    publish(json.loads(Path(sys.argv[1]).read_text()))

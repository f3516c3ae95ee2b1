"""Tables, aims, plot and page from a run on a GPU: `python -m benchmarks.gpu.report FILE` renews docs with them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.gpu import workloads
from benchmarks.gpu.checking import RATE, rate
from benchmarks.gpu.workloads import CHOICE, MODES, OURS, PEERS, TIME_IS_UP, Workload, flops, own
from benchmarks.report import DOCS, SECTION, Aim, Table

RESULTS = DOCS / "results" / "gpu-h100.json"
FRAMEWORKS = ("torch", "jax")
NAMED = {"torch": "PyTorch", "jax": "JAX"}
CLOSE = 0.03  # what counts as equal
SCATTERED = 0.3  # a spread with which a median is not judged by
COLOURS = ("#0072b2", "#56b4e9", "#333333", "#cc79a7", "#d55e00")
WORDS = {"forward": "forward", "both": "forward + backward"}


def times(record: dict[str, Any]) -> list[float]:
    """Milliseconds of every run."""
    return [run["ms"] for run in record["runs"]]


def costs(record: dict[str, Any]) -> list[float]:
    """What a call takes in a row of such calls, in every run: the device's part or the host's, whichever is longer.

    The host's is the least of all runs, of each the median call: what else a machine does only adds to it.
    """
    least = min(run["host"] for run in record["runs"])
    return [max(run["ms"], least) for run in record["runs"]]


By = Callable[[dict[str, Any]], list[float]]


def spread(record: dict[str, Any], by: By = times) -> float:
    """The middle half of the runs, its width as a part of the median: of five runs or seven, all but the outermost."""
    ordered = sorted(by(record))
    cut = len(ordered) // 4
    inner = ordered[cut : len(ordered) - cut]
    return (inner[-1] - inner[0]) / median(ordered)


def tells(record: dict[str, Any]) -> bool:
    """Whether there are runs, and they do not scatter so much that their median says nothing."""
    return bool(record["runs"]) and spread(record) <= SCATTERED


def number(value: float) -> str:
    """Three digits."""
    return (
        f"{value:.0f}"
        if value >= 100
        else f"{value:.1f}"
        if value >= 10
        else f"{value:.2f}"
        if value >= 1
        else f"{value:.3f}"
    )


def cell(records: Sequence[dict[str, Any] | None], bold: Sequence[bool] = (False, False)) -> str:
    """forward / forward + backward, in ms; "no" where the entry has no such call; nothing where it was not asked."""
    if not any(each and each["not_run"] != TIME_IS_UP for each in records):
        return ""
    found = [number(median(times(each))) if each and each["runs"] else "–" for each in records]
    if set(found) == {"–"}:
        return "no"
    return " / ".join(f"**{text}**" if best else text for text, best in zip(found, bold, strict=False))


class Ratio(NamedTuple):
    """How many times as fast one is: the median of the ratios run for run, the spread of both, how many runs."""

    value: float
    spread: float
    count: int


class Results:
    """The measurements of a run, by framework, workload, entry and mode."""

    def __init__(self, run: dict[str, Any]) -> None:
        self.run = run
        self.loads = {name: _load(values) for name, values in run["workloads"].items()}
        self.records = {
            (each["framework"], each["workload"], each["entry"], each["mode"]): each for each in run["measurements"]
        }
        for framework, name, _, mode in list(self.records):
            self._check_rates(framework, name, mode)

    def _check_rates(self, framework: str, name: str, mode: str) -> None:
        """Mark a peer whose dropout has another rate than it was told."""
        dropout = self.loads[name].dropout
        ours = self.get(framework, name, f"{CHOICE} triton", mode) or self.get(framework, name, CHOICE, mode)
        if not dropout or ours is None:
            return
        for (of, load, entry, its_mode), each in self.records.items():
            if (of, load, its_mode) == (framework, name, mode) and not entry.startswith(CHOICE) and each["runs"]:
                found = rate(each["errors"]["scatter"], ours["errors"]["scatter"], dropout)
                if abs(found - dropout) > RATE:
                    each.update(runs=[], not_run=f"it computes something else: it drops {found:.3f}, not {dropout}")

    def get(self, framework: str, name: str, entry: str, mode: str) -> dict[str, Any] | None:
        """The measurement, if there are runs that tell something."""
        found = self.records.get((framework, name, entry, mode))
        return found if found and tells(found) else None

    def ms(self, framework: str, name: str, entry: str, mode: str) -> float | None:
        """The median."""
        found = self.get(framework, name, entry, mode)
        return median(times(found)) if found else None

    def best(self, framework: str, name: str, mode: str, of: Callable[[str], bool], by: By = times) -> str | None:
        """The fastest entry among those that `of` lets in."""
        among = [
            (median(by(each)), entry) for (its, load, entry, its_mode), each in self.records.items()
            if (its, load, its_mode) == (framework, name, mode) and tells(each) and of(entry)
        ]  # fmt: skip
        return min(among)[1] if among else None

    def ratio(
        self, name: str, mode: str, slower: tuple[str, str], faster: tuple[str, str], by: By = times
    ) -> Ratio | None:
        """Of two (framework, entry): runs of one framework are interleaved, and compared run for run."""
        one, other = (self.get(framework, name, entry, mode) for framework, entry in (slower, faster))
        if not one or not other:
            return None
        noise = max(spread(one, by), spread(other, by))
        if slower[0] == faster[0]:
            found = [a / b for a, b in zip(by(one), by(other), strict=False)]
            return Ratio(median(found), noise, len(found))
        return Ratio(median(by(one)) / median(by(other)), noise, min(len(one["runs"]), len(other["runs"])))

    def names(self) -> list[str]:
        """Workloads of which anything ran, in the order of importance."""
        return [
            name for name in self.loads if any(key[1] == name and each["runs"] for key, each in self.records.items())
        ]


def _load(values: dict[str, Any]) -> Workload:
    return Workload(**{key: tuple(x) if isinstance(x, list) else x for key, x in values.items()})


def is_ours(entry: str) -> bool:
    """One of this library's implementations, by name."""
    return own(entry) is not None


def is_peer(entry: str) -> bool:
    """Another library."""
    return not entry.startswith(CHOICE)


ALIKE = {
    "triton": {"torch": workloads.TURNED, "jax": f"{CHOICE} triton"}, "fa4": dict.fromkeys(FRAMEWORKS, f"{CHOICE} fa4")
}  # fmt: skip
"""What is compared across frameworks: `triton` on rows that lie alike."""


# Aims.


def aims(results: Results) -> list[Aim]:
    """Every aim with what was reached: the median decides."""
    found: list[Aim] = []

    def least(
        what: str, name: str, mode: str, slower: tuple[str, str], faster: tuple[str, str], at_least: float
    ) -> None:
        ratio = results.ratio(name, mode, slower, faster)
        reached = "not run" if ratio is None else f"{ratio.value:.2f}x ({100 * ratio.spread:.0f} %)"
        met = None if ratio is None else ratio.value >= at_least
        found.append(Aim(f"{what}: {name}, {WORDS[mode]}", f"at least {at_least:g}x", reached, met))

    triton = ("torch", f"{CHOICE} triton")
    for load, of_cudnn in (
        (workloads.FULL_64, 1.0), (workloads.CAUSAL_64, 1.0), (workloads.FULL_128, 0.9), (workloads.CAUSAL_128, 0.9)
    ):  # fmt: skip
        least("triton against cuDNN", load.name, "forward", ("torch", "SDPA cuDNN"), triton, of_cudnn)
        least("triton against cuDNN", load.name, "both", ("torch", "SDPA cuDNN"), triton, 0.8)
    flex = ("torch", "FlexAttention")
    for load, times_flex in ((workloads.WINDOW, 1.2), (workloads.DOCUMENTS, 1.2), (workloads.CAUSAL_PADDED, 1.5)):
        least("triton against FlexAttention", load.name, "both", flex, triton, times_flex)
    for load in (workloads.SOFTCAP, workloads.BIAS_OF_HEADS, workloads.DROPOUT_64):
        for framework in FRAMEWORKS:
            for mode in MODES:
                best = results.best(framework, load.name, mode, is_peer)
                if framework == "jax" and load.dropout:
                    continue
                what = f"triton in {NAMED[framework]} against the best peer{f' ({best})' if best else ''}"
                least(what, load.name, mode, (framework, best or ""), (framework, f"{CHOICE} triton"), 1.0)
    for mode in MODES:
        least(
            "triton in JAX against Flax",
            workloads.DROPOUT_64.name,
            mode,
            ("jax", "flax"),
            ("jax", f"{CHOICE} triton"),
            5.0,
        )
    for mode in MODES:
        least("triton against FA4", workloads.SINKS.name, mode, ("torch", "FA4"), triton, 0.85)
    found += _decoding(results)
    found += _overheads(results)
    found += _across(results, 1.05)
    for framework in FRAMEWORKS:
        found += _choices(results, framework)
    return found


def _decoding(results: Results) -> list[Aim]:
    """Against reading keys and values once, at the rate at which this device copied in this run."""
    load = workloads.DECODING
    copied = results.run["rates"].get("copy GB/s")
    found = []
    for framework in FRAMEWORKS:
        for entry in (f"{CHOICE} triton", CHOICE):
            value = results.ms(framework, load.name, entry, "forward")
            what = f"{entry} in {NAMED[framework]}, {load.name}, against reading k and v once"
            if value is None or copied is None:
                found.append(Aim(what, "at most 1.1x", "not told", None))
            else:
                once = 2 * load.b * load.hk * load.j * load.d * 2 / copied / 1e6
                found.append(Aim(what, "at most 1.1x", f"{value / once:.2f}x of {once:.3f} ms", value <= 1.1 * once))
    return found


def _overheads(results: Results) -> list[Aim]:
    """What a call from torch costs the CPU beyond SDPA."""
    known = results.run["overheads"].get("torch", {})
    found = []
    for entry in (CHOICE, f"{CHOICE} triton", f"{CHOICE} fa4"):
        if entry in known and "SDPA" in known:
            more = median(known[entry]) - median(known["SDPA"])
            reached = f"{more:.0f} us beyond the {median(known['SDPA']):.0f} of SDPA"
            found.append(Aim(f"{entry} launched from torch", "under 30 us beyond SDPA", reached, more < 30))
        elif not entry.endswith("fa4"):
            found.append(Aim(f"{entry} launched from torch", "under 30 us beyond SDPA", "not told", None))
    return found


def _across(results: Results, most: float) -> list[Aim]:
    """`triton` in both frameworks, where both were measured with the same sources."""
    of, ratios = ALIKE["triton"], {}
    for load in results.names():
        for mode in MODES:
            ratio = results.ratio(load, mode, ("jax", of["jax"]), ("torch", of["torch"]))
            both = [results.records[its, load, of[its], mode]["session"] for its in FRAMEWORKS if ratio]
            sources = {
                results.run["sessions"][session]["sources"].get(framework)
                for session, framework in zip(both, FRAMEWORKS, strict=False)
            }
            if ratio and len(sources) == 1:
                ratios[load, mode] = ratio.value
    what = "triton in JAX against torch, rows (b, n, h, d) in both"
    if not ratios:
        return [Aim(what, f"at most {most:g}x its time, everywhere", "not told", None)]
    late = {key: value for key, value in ratios.items() if value > most}
    (load, mode), worst = max(ratios.items(), key=lambda each: each[1])
    middle = median(ratios.values())
    reached = (
        f"{len(ratios) - len(late)} of {len(ratios)}; median {middle:.2f}x, worst {worst:.2f}x: {load}, {WORDS[mode]}"
    )
    return [Aim(what, f"at most {most:g}x its time, everywhere", reached, not late)]


class Choice(NamedTuple):
    """What implementation=None took, against the fastest of ours, or of the peers."""

    framework: str
    name: str
    mode: str
    chosen: str
    best: str
    slower_by: float
    allowed: float

    @property
    def is_within(self) -> bool:
        """Whether it is slower by no more than is allowed."""
        return self.slower_by <= self.allowed


def choices(results: Results, framework: str, among: Callable[[str], bool]) -> list[Choice]:
    """At every workload and mode where both were measured."""
    found = []
    for name in results.names():
        for mode in MODES:
            best = results.best(framework, name, mode, among, costs)
            mine = results.get(framework, name, CHOICE, mode)
            if mine and best:
                ratio = results.ratio(name, mode, (framework, CHOICE), (framework, best), costs)
                assert ratio is not None
                found.append(
                    Choice(framework, name, mode, mine["chosen"], best, ratio.value - 1, max(CLOSE, ratio.spread))
                )
    return found


def _choices(results: Results, framework: str) -> list[Aim]:
    aims = []
    for whose, among in (("implementation of ours", is_ours), ("peer", is_peer)):
        found = choices(results, framework, among)
        what = f"implementation=None in {NAMED[framework]} within 3 % or the spread of the best {whose}"
        late = [each for each in found if not each.is_within]
        reached = f"{len(found) - len(late)} of {len(found)}"
        if late:
            worst = max(late, key=lambda each: each.slower_by - each.allowed)
            reached += (
                f"; the worst {100 * worst.slower_by:+.0f} % against {worst.best}: {worst.name}, {WORDS[worst.mode]}"
            )
        aims.append(Aim(what, "everywhere", reached if found else "not run", not late if found else None))
    return aims


def missed(results: Results) -> list[Table]:
    """Where the choice is behind, one by one."""
    rows = []
    for framework in FRAMEWORKS:
        for among in (is_ours, is_peer):
            rows += [
                (NAMED[framework], each.name, WORDS[each.mode], each.chosen, each.best,
                 f"{100 * each.slower_by:+.0f} %",
                 f"{100 * each.allowed:.0f} %")
                for each in choices(results, framework, among) if not each.is_within
            ]  # fmt: skip
    header = ("", "workload", "mode", "None took", "the fastest", "slower by", "allowed")
    return [Table("Where implementation=None is behind", header, rows)] if rows else []


# Tables.


def verdicts(results: Results) -> list[Table]:
    """The aims as a table."""
    words = {True: "yes", False: "no", None: "not run"}
    rows = [(each.what, each.aim, each.reached, words[each.met]) for each in aims(results)]
    return [Table("What was aimed at, and what was reached", ("", "aimed at", "reached", "met"), rows)]


def columns(results: Results, framework: str) -> list[str]:
    """The entries of which anything ran, ours first."""
    order = (CHOICE, *(f"{CHOICE} {name}" for name in OURS[framework]), workloads.TURNED, *PEERS[framework])
    ran = {entry for (its, _, entry, _), each in results.records.items() if its == framework and each["runs"]}
    return [entry for entry in order if entry in ran]


def by_workload(results: Results) -> list[Table]:
    """Milliseconds on the device."""
    tables = []
    for framework in FRAMEWORKS:
        entries = columns(results, framework)
        rows = []
        for name in results.names():
            records = {
                entry: [results.records.get((framework, name, entry, mode)) for mode in MODES] for entry in entries
            }
            modes = workloads.modes(results.loads[name])
            best = [results.best(framework, name, mode, lambda entry: True) for mode in modes]
            if any(best):
                texts = (
                    cell([records[entry][n] for n in range(len(modes))], [each == entry for each in best])
                    for entry in entries
                )
                rows.append((name, *texts))
        if rows:
            tables.append(
                Table(f"{NAMED[framework]}: milliseconds, forward / forward + backward", ("", *entries), rows)
            )
    return tables


def rates(results: Results) -> list[Table]:
    """TFLOP/s on the products of allowed pairs."""
    tables = []
    for framework in FRAMEWORKS:
        rows = []
        for name in results.names():
            load = results.loads[name]
            texts = []
            for mode in MODES:
                for among in (lambda entry: entry == CHOICE, is_peer):
                    best = results.best(framework, name, mode, among)
                    value = results.ms(framework, name, best, mode) if best else None
                    rate = f"{flops(load, mode) / value / 1e9:.0f}" if value else ""
                    texts.append(f"{rate} ({best})" if rate and best != CHOICE else rate)
            if any(texts):
                rows.append((name, f"{flops(load, 'forward') / 1e9:.0f}", *texts))
        header = ("", "GFLOP forward", "forward", "best peer", "forward + backward", "best peer")
        if rows:
            tables.append(Table(f"{NAMED[framework]}: TFLOP/s on useful work, implementation=None", header, rows))
    return tables


def across(results: Results) -> list[Table]:
    """The same kernels launched by either framework."""
    rows = []
    for name in results.names():
        texts = []
        for of in ALIKE.values():
            for mode in MODES:
                ratio = results.ratio(name, mode, ("jax", of["jax"]), ("torch", of["torch"]))
                texts.append(f"{ratio.value:.2f}x" if ratio else "")
        if any(texts):
            rows.append((name, *texts))
    header = ("", "triton, forward", "forward + backward", "fa4, forward", "forward + backward")
    return [Table("The time in JAX by the time in PyTorch", header, rows)] if rows else []


def spreads(results: Results) -> list[Table]:
    """How much the runs of an entry differ, and what a single call on an idle device takes."""
    rows = []
    for framework in FRAMEWORKS:
        entries = columns(results, framework)
        for entry in entries:
            found = [
                each
                for (its, _, its_entry, _), each in results.records.items()
                if (its, its_entry) == (framework, entry) and each["runs"]
            ]
            noise = sorted(100 * spread(each) for each in found)
            rows.append((NAMED[framework], entry, str(len(found)), f"{median(noise):.1f} %", f"{noise[-1]:.0f} %"))
    header = ("", "entry", "measurements", "spread, median", "largest")
    return [Table("Spread: the middle half of the runs, as a part of the median", header, rows)] if rows else []


def singles(results: Results) -> list[Table]:
    """One call on an idle device, its launch included, where it differs."""
    tables = []
    short = [name for name in results.names() if (results.ms("torch", name, CHOICE, "forward") or 1) < 0.4]
    for framework in FRAMEWORKS:
        entries, rows = columns(results, framework), []
        for name in short:
            texts = []
            for entry in entries:
                single = [
                    [run["single"] for run in each["runs"] if run.get("single")]
                    for mode in MODES if (each := results.get(framework, name, entry, mode))
                ]  # fmt: skip
                texts.append(" / ".join(number(median(each)) for each in single if each))
            if any(texts):
                rows.append((name, *texts))
        if rows:
            tables.append(
                Table(f"{NAMED[framework]}: milliseconds of a single call on an idle device", ("", *entries), rows)
            )
    return tables


def memory(results: Results) -> list[Table]:
    """Peak of what a call allocates, results included, inputs not."""
    tables = []
    for framework in FRAMEWORKS:
        entries, rows = columns(results, framework), []
        for name in results.names():
            texts = []
            for entry in entries:
                found = [results.get(framework, name, entry, mode) for mode in MODES]
                texts.append(" / ".join(f"{each['extra'] / 1e6:.0f}" for each in found if each))
            if any(texts):
                rows.append((name, *texts))
        if rows:
            tables.append(
                Table(f"{NAMED[framework]}: extra peak memory, MB, forward / forward + backward", ("", *entries), rows)
            )
    return tables


def overheads(results: Results) -> list[Table]:
    """CPU time of launching."""
    rows = [
        (NAMED[framework], entry, f"{median(found):.1f}", f"{min(found):.1f} to {max(found):.1f}")
        for framework, known in results.run["overheads"].items() for entry, found in known.items()
    ]  # fmt: skip
    return (
        [Table("CPU microseconds of a call, causal (1, 2, 16, 64), forward", ("", "entry", "median", "all runs"), rows)]
        if rows
        else []
    )


def reasons(results: Results) -> list[Table]:
    """Who was not timed, and why."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for (framework, name, entry, mode), each in results.records.items():
        if each["not_run"]:
            where = found.setdefault((NAMED[framework], entry, each["not_run"]), [])
            text = name if not results.loads[name].backward else f"{name}, {WORDS[mode]}"
            if mode == "both" and f"{name}, forward" in where:
                where[where.index(f"{name}, forward")] = name
            else:
                where.append(text)
    rows = [(*key, "; ".join(where) if len(where) <= 4 else f"{len(where)} workloads") for key, where in found.items()]
    return [Table("Not timed", ("", "entry", "why", "where"), sorted(rows))] if rows else []


def tables(run: dict[str, Any]) -> list[Table]:
    """All of them, in the order of the page."""
    results = Results(run)
    parts = (verdicts, by_workload, missed, rates, across, memory, overheads, singles, spreads, reasons)
    return [table for part in parts for table in part(results)]


def summary(results: Results) -> str:
    """How many aims were met."""
    found = aims(results)
    met, late, left = ([each for each in found if each.met is verdict] for verdict in (True, False, None))
    verdict = f"{len(met)} are met, {len(late)} missed, and {len(left)} not measured or too scattered"
    return f"Of {len(found)} aims {verdict}."


def _measured(run: dict[str, Any], session: int | None = None) -> dict[str, list[str]]:
    """The workloads of which there are runs, by framework: of a session, or of all."""
    known = {
        (each["framework"], each["workload"])
        for each in run["measurements"] if session in (None, each["session"]) and each["runs"]
    }  # fmt: skip
    found = {framework: [name for name in run["workloads"] if (framework, name) in known] for framework in FRAMEWORKS}
    return {framework: names for framework, names in found.items() if names}


def _session(run: dict[str, Any], n: int) -> str:
    """When, how long, what; nothing where later sessions have measured all of it anew."""
    each, found = run["sessions"][n], _measured(run, n)
    if not found:
        return ""
    parts = "; ".join(f"{NAMED[framework]}: {', '.join(names)}" for framework, names in found.items())
    return (
        f"{each['started'][:16].replace('T', ' ')} UTC, {each['seconds'] / 60:.1f} minutes, "
        f"{each['repeats']} runs of each, sources {' and '.join(dict.fromkeys(each['sources'].values()))}"
        + (f" ({parts})" if len(run["sessions"]) > 1 else "")
    )


def section(run: dict[str, Any]) -> str:
    """The generated part of the page."""
    results = Results(run)
    facts = ", ".join(f"{name} {value}" for name, value in run["machine"].items())
    packages = "; ".join(
        f"in the process of {NAMED[framework]}: " + ", ".join(f"{name} {value}" for name, value in versions.items())
        for framework, versions in run["versions"].items()
    )
    sessions = "; ".join(filter(None, (_session(run, n) for n in range(len(run["sessions"])))))
    rates = ", ".join(f"{value:.0f} {name}" for name, value in run["rates"].items())
    about = f"{facts[0].upper()}{facts[1:]}. {packages[0].upper()}{packages[1:]}. Measured on {sessions}."
    about += f" In this run: {rates}."
    for framework, names in _measured(run).items():
        left = [load.name for load in workloads.WORKLOADS if load.name not in names]
        if left:
            about += f" For want of time {NAMED[framework]} was not asked for: {'; '.join(left)}."
    parts = (table.for_page().replace("|  |", "| – |") for table in tables(run))
    return "\n".join(["", about, "", summary(results), "", *parts, ""])


def plot(run: dict[str, Any], path: Path) -> None:
    """TFLOP/s on useful work, forward + backward (forward where there is no other), by workload."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    results = Results(run)
    names = results.names()
    shown = {
        "torch": (CHOICE, f"{CHOICE} triton", "SDPA", "FlexAttention", "FA4"),
        "jax": (CHOICE, f"{CHOICE} triton", "jax.nn cudnn", "tokamax", "FA4"),
    }  # fmt: skip
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 1.5 + 0.34 * len(names)), sharey=True, layout="constrained")
    for axis, framework in zip(axes, FRAMEWORKS, strict=True):
        for n, (entry, colour) in enumerate(zip(shown[framework], COLOURS, strict=True)):
            points = []
            for row, name in enumerate(names):
                mode = "both" if results.loads[name].backward else "forward"
                if value := results.ms(framework, name, entry, mode):
                    points.append((flops(results.loads[name], mode) / value / 1e9, row + 0.16 * (n - 2)))
            if points:
                axis.scatter(*zip(*points, strict=True), s=26, color=colour, label=entry, zorder=3)
        axis.set(title=f"{NAMED[framework]}: TFLOP/s on useful work, forward + backward", xlim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def publish(run: dict[str, Any]) -> None:
    """Renew docs/results/gpu-h100.json, docs/benchmarks-gpu.png and the generated part of docs/benchmarks-gpu.md."""
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(run, separators=(",", ":")).replace("},{", "},\n{") + "\n")
    page = DOCS / "benchmarks-gpu.md"
    page.write_text(SECTION.sub(lambda _: section(run), page.read_text()))
    plot(run, DOCS / "benchmarks-gpu.png")


if __name__ == "__main__":
    publish(json.loads(Path(sys.argv[1]).read_text()))

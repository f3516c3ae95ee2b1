"""attend demo: MiniLM on attend; what it prints and writes."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from attend_shared import avoid, demo, pictures, report
from attend_shared.command.common import (
    STYLES,
    Wrong,
    check_files,
    console,
    progress_bar,
    say,
    settle,
    table_of,
    unwritten,
    write,
)


@click.command("demo")
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
    check_files({"--out": there / "demo.png"})  # the folders between are made
    settle("cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    started = time.perf_counter()
    out = console()
    try:
        with progress_bar() as progress:
            task = progress.add_task("loading", total=demo.STEPS)
            done = itertools.count()
            found = demo.run(lambda text: progress.update(task, completed=next(done), description=text))
            try:
                folder.mkdir(parents=True, exist_ok=True)
                pictures.draw(found, folder / "demo.png")
            except OSError as error:
                raise unwritten(folder, error) from error
            write(folder / "demo.json", json.dumps(demo.as_json(found), indent=1, allow_nan=False) + "\n")
    except (demo.MissingError, avoid.AvoidFileError) as error:
        raise Wrong(str(error)) from error
    _print_demo(out, found, time.perf_counter() - started)
    say(out, f"written: {folder / 'demo.png'}, {folder / 'demo.json'}", "dim")
    if not found.passed:
        raise SystemExit(1)


def _print_demo(out: Console, found: demo.Demo, seconds: float) -> None:
    say(out, ", ".join(f"{name} {version}" for name, version in found.versions.items()), "dim")
    table = table_of(("#", "sentence", "#tokens", "#padding", "#nearest", "#similarity"), "What the embeddings say")
    for n, (sentence, tokens) in enumerate(zip(found.sentences, found.tokens, strict=True)):
        padding = tokens.count("[PAD]")
        others = found.similarities[n].copy()
        others[n] = -1.0
        nearest = int(others.argmax())
        real = str(len(tokens) - padding)
        table.add_row(str(n + 1), Text(sentence), real, str(padding or ""), str(nearest + 1), f"{others[nearest]:.3f}")
    out.print(table)
    table = table_of(("what", "#off by", "#limit", "verdict"), "The whole model")
    for check in found.checks:
        verdict = "ok" if check.passed else "failed"
        numbers = (f"{x:.1e}" if x else "0" for x in (check.error, check.limit))
        table.add_row(Text(check.name), *numbers, Text(verdict, STYLES[verdict]))
    out.print(table)
    rows = demo.rows(found)
    layers = list(dict.fromkeys(result.case for result in found.results))
    heads = ("implementation", *(f"#{layer}" for layer in layers), "verdict", "#seconds")
    title = "Every attention call of it, forward and backward: the worst error as a share of its budget"
    table = table_of(heads, title)
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
            say(out, f"{row.framework} {row.implementation}: {row.verdict}\n  {row.text}\n", STYLES[row.verdict])
    table = table_of(("sentence", "another", "#torch", "#Flax", "#difference"), "The port: how alike the sentences are")
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
    say(out, f"{times}\n", "dim")
    held = sum(result.verdict == "ok" for result in found.results)
    verdict = f"passed: {held} attention calls within their budgets" if found.passed else "FAILED: see above"
    say(out, f"{verdict}, in {seconds:.0f} s", STYLES["ok" if found.passed else "failed"])

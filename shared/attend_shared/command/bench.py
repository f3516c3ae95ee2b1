"""attend bench: the benchmarks of a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click

from attend_shared.command.common import Wrong, load, settle, stoppable


@click.command("bench", context_settings={"ignore_unknown_options": True})
@click.option("--device", type=click.Choice(("cpu", "cuda")), help="Default: the GPU, where there is one.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench_command(device: str | None, arguments: tuple[str, ...]) -> None:
    """Measure time and memory of attention against its peers here. The benchmarks are in a checkout of this project.

    ARGUMENTS are those of the benchmark, which lists them: attend bench --device cpu -- --help, or cuda.

    Exit status: that of the benchmark; 2 if there is none; 130 (Ctrl-C) or 143 (SIGTERM) if it was stopped.
    """
    root = Path(__file__).resolve().parents[3]
    if not (root / "benchmarks" / "gpu" / "__main__.py").is_file():
        raise Wrong(
            "The benchmarks are not installed with the packages. Get a checkout of this project, and in it: "
            'pip install -e ".[all]", then attend bench.'
        )
    if device is None:
        settle("")
        twins, _ = load(())
        device = "cuda" if any("cuda" in twin.bridge.devices() for twin in twins) else "cpu"
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    module = {"cpu": "benchmarks.cpu", "cuda": "benchmarks.gpu"}[device]
    benchmark = subprocess.Popen([sys.executable, "-m", module, *arguments], env={**os.environ, "PYTHONPATH": path})
    with stoppable() as stopped:
        benchmark.wait()
    benchmark.kill()
    status = benchmark.wait()
    raise SystemExit(128 + stopped[0] if stopped else status)

"""attend port: a checkpoint folder for the other framework, and the proof of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from attend_shared import avoid, port
from attend_shared.checkpoints import CheckpointError
from attend_shared.command.common import STYLES, Wrong, console, progress_bar, say, settle, table_of, unwritten
from attend_shared.errors import UnsupportedError


@click.command("port")
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
    settle("cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    out = console()
    try:
        if verified:  # before anything is written
            port.need("torch", "transformers", "jax", "flax")
        with progress_bar() as progress:
            task = progress.add_task("porting", total=None)
            try:
                done = port.port(
                    source, target, to, overwrite=overwrite,
                    step=lambda bytes_done, total: progress.update(task, completed=bytes_done, total=total),
                )  # fmt: skip
            except OSError as error:
                raise unwritten(target, error) from error
        size = f"{done.parameters} parameters, {done.nbytes / 1e6:.1f} MB"
        say(out, f"written: {target} ({size}, in {done.seconds:.1f} s)")
        if not verified:
            return
        layers = port.verify(*((source, target) if to == "flax" else (target, source)))
    except (CheckpointError, UnsupportedError, port.MissingError, avoid.AvoidFileError, OSError) as error:
        raise Wrong(str(error)) from error
    table = table_of(("what", "#largest", "#error", "#error of torch", "#budget", "verdict"),
                   "On random tokens in float32, against transformers in float64")  # fmt: skip
    for layer in layers:
        verdict = "ok" if layer.passed else "failed"
        numbers = (f"{x:.1e}" for x in (layer.error, layer.reference, layer.budget))
        table.add_row(layer.name, f"{layer.largest:.3g}", *numbers, Text(verdict, STYLES[verdict]))
    out.print(table)
    wrong = sum(not layer.passed for layer in layers)
    verdict = f"FAILED: {wrong} of {len(layers)} over their budget" if wrong else "passed: the same in every layer"
    say(out, verdict, STYLES["failed" if wrong else "ok"])
    if wrong:
        raise SystemExit(1)

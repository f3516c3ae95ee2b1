"""The command `attend`: a module for each of its commands, and what they share.

Frameworks are loaded where they are asked for, and only those.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import click

from attend_shared.command.bench import bench_command
from attend_shared.command.common import stoppable
from attend_shared.command.demo import demo_command
from attend_shared.command.doctor import doctor_command
from attend_shared.command.explain import explain_command
from attend_shared.command.parity import parity_command
from attend_shared.command.port import port_command

__all__ = ["main"]


def _version() -> str:
    try:
        return metadata.version("attend-twin")
    except metadata.PackageNotFoundError:
        return "not installed as a distribution"


class Commands(click.Group):
    """Where Ctrl-C or SIGTERM is not the command's own to deal with, it takes away what it has half written, and its
    exit status is 130 or 143, as of any program."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with stoppable() as stopped:
            return super().invoke(ctx)
        click.echo("Aborted!", err=True)
        raise SystemExit(128 + stopped[0])


@click.group(
    cls=Commands,
    commands=(bench_command, demo_command, doctor_command, explain_command, parity_command, port_command),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(_version(), prog_name="attend")
def main() -> None:
    """One attention call with one answer in PyTorch and in JAX."""

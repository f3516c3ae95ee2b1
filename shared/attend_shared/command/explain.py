"""attend explain: its options as the arguments of `explain`."""

from __future__ import annotations

import math
from typing import Any

import click

from attend_shared import parity
from attend_shared.call import DTYPES, LAYOUTS, NAMES
from attend_shared.checkpoints import SIZE_LIMIT
from attend_shared.command.common import Wrong, plain, settle
from attend_shared.parity import FRAMEWORKS

DIGITS = 100  # of a number; Python reads no more than 4300


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


@click.command("explain")
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
    settle("" if device is None else device)
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
    click.echo(plain(str(explanation)))


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

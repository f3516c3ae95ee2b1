"""Fill in what these pages say of the code: `python docs/generate.py` rewrites it, tests/test_docs.py checks it.

Two things are generated: the text block under a Python block, which is what the block prints, and the section of
implementations.md between its two markers.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np

from attend_jax.implementations import table as table_of_jax
from attend_shared.call import NAMES, Call
from attend_shared.choice import NO_FUNCTIONS, Entry
from attend_shared.shapes import Shape, call_of
from attend_torch.implementations import table as table_of_torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
# In an order that does not depend on this machine.
TABLES = {
    framework: sorted(table(), key=lambda entry: NAMES.index(entry.name))
    for framework, table in (("torch", table_of_torch), ("jax", table_of_jax))
}
ON_GPUS = "fa4", "fa3", "cudnn", "triton", "flex"
PLATFORMS = dict.fromkeys(ON_GPUS, ("cuda",))  # of implementations that run on some machines only
TITLES = {"torch": "PyTorch", "jax": "JAX", "cpu": "CPU", "cuda": "GPU"}
BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<printed>.*?)```\n)?", re.DOTALL)
SECTION = re.compile(r"(?<=<!-- generated: implementations -->\n).*?(?=<!-- end -->)", re.DOTALL)


class Feature(NamedTuple):
    """A row of the table: a call that needs one thing."""

    name: str
    arguments: dict[str, Any]


B, H, N, D = 2, 8, 256, 64
INT = "int32"


def _qkv(
    q_len: int = N, kv_len: int = N, kv_heads: int = H, d: int = D, dv: int = D, dtype: str = "bfloat16"
) -> dict[str, Shape]:
    return {
        "q": Shape((B, H, q_len, d), dtype),
        "k": Shape((B, kv_heads, kv_len, d), dtype),
        "v": Shape((B, kv_heads, kv_len, dv), dtype),
    }


KEY_MASK, DENSE_MASK = Shape((B, N), "bool"), Shape((B, 1, N, N), "bool")
FEATURES = (
    Feature("nothing but q, k, v in bfloat16", {}),
    Feature("float16", _qkv(dtype="float16")),
    Feature("float32", _qkv(dtype="float32")),
    Feature("float64", _qkv(dtype="float64")),
    Feature("grouped heads", _qkv(kv_heads=2)),
    Feature("d = 256", _qkv(d=256, dv=256)),
    Feature("d = 20", _qkv(d=20, dv=20)),
    Feature("dv != d", _qkv(dv=32)),
    Feature("kv_len 0", _qkv(kv_len=0)),
    Feature("key mask (b, j)", {"mask": KEY_MASK}),
    Feature("mask (b, 1, i, j)", {"mask": DENSE_MASK}),
    Feature("is_causal", {"is_causal": True}),
    Feature("is_causal, scale <= 0", {"is_causal": True, "scale": -1.0}),
    Feature("is_causal, q_offset = kv_len - q_len", {**_qkv(q_len=64), "is_causal": True, "q_offset": N - 64}),
    Feature("is_causal, q_offset an array", {"is_causal": True, "q_offset": Shape((B,), INT)}),
    Feature("is_causal, key mask", {"is_causal": True, "mask": KEY_MASK}),
    Feature("is_causal, kv_lengths", {"is_causal": True, "kv_lengths": Shape((B,), INT)}),
    Feature("window (left, 0)", {"window_size": (64, 0)}),
    Feature("window (left, right)", {"window_size": (64, 64)}),
    Feature("segment ids", {"q_segment_ids": Shape((B, N), INT)}),
    Feature("kv_lengths", {"kv_lengths": Shape((B,), INT)}),
    Feature("q_lengths, kv_lengths", {"q_lengths": Shape((B,), INT), "kv_lengths": Shape((B,), INT)}),
    Feature("bias (1, h, i, j)", {"bias": Shape((1, H, N, N))}),
    Feature("bias with a gradient", {"bias": Shape((1, H, N, N), trained=True)}),
    Feature("bias of another dtype than q", {"bias": Shape((1, H, N, N), "float32")}),
    Feature("bias, key mask", {"bias": Shape((1, H, N, N)), "mask": KEY_MASK}),
    Feature("softcap", {"softcap": 30.0}),
    Feature("sinks", {"sinks": Shape((H,))}),
    Feature("score_fn or mask_fn", {"score_fn": lambda score, b, h, q_index, kv_index: score}),
    Feature("dropout", {"dropout": 0.1, "dropout_seed": 0}),
    Feature("return_lse", {"return_lse": True}),
)


def call(framework: str, platform: str, feature: Feature, flash: bool | None = None) -> Call:
    """The call of a feature."""
    return call_of(framework, platform, {**_qkv(), **feature.arguments, "flash": flash})


@mock.patch("attend_jax.implementations.triton.unavailable", lambda: None)
@mock.patch("attend_torch.implementations.triton.missing", lambda: None)
def cell(entry: Entry, framework: str, platform: str, feature: Feature, reasons: list[str]) -> str:
    """"fused", "yes", or the numbers of the reasons why not, where everything is installed."""
    asked = call(framework, platform, feature)
    if asked.custom and not entry.custom:
        reason = NO_FUNCTIONS
    else:
        reason = entry.module.refusal(asked)
    if reason is None:
        fused = entry.fused and entry.module.refusal(call(framework, platform, feature, flash=True)) is None
        return "fused" if fused else "yes"
    if reason not in reasons:
        reasons.append(reason)
    return f"no ({reasons.index(reason) + 1})"


def columns() -> Iterator[tuple[str, list[str], list[str]]]:
    """For each implementation and kind of machine its title and cells; one column where both machines have the same."""
    reasons: list[str] = []
    for framework, table in TABLES.items():
        for entry in table:
            title = f"{TITLES[framework]} `{entry.name}`"
            platforms = PLATFORMS.get(entry.name, ("cpu", "cuda"))
            found = {p: [cell(entry, framework, p, feature, reasons) for feature in FEATURES] for p in platforms}
            if all(cells == found[platforms[0]] for cells in found.values()):
                yield title, found[platforms[0]], reasons
            else:
                for platform, cells in found.items():
                    yield f"{title}, {TITLES[platform]}", cells, reasons


def section() -> str:
    """The generated part of implementations.md."""
    lines = ["", "| framework | name | fused | what it is |", "|---|---|---|---|"]
    for framework, table in TABLES.items():
        for entry in table:
            about = " ".join(str(entry.module.__doc__).split("\n\n")[0].split())
            lines.append(f"| {TITLES[framework]} | `{entry.name}` | {'yes' if entry.fused else 'no'} | {about} |")
    found = list(columns())
    lines += ["", "| a call with | " + " | ".join(title for title, _, _ in found) + " |"]
    lines.append("|---" * (len(found) + 1) + "|")
    for row, feature in enumerate(FEATURES):
        lines.append(f"| {feature.name} | " + " | ".join(cells[row] for _, cells, _ in found) + " |")
    reasons = found[-1][2]
    lines += ["", "Why not, in the words of the error:", ""]
    lines += [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join(lines) + "\n\n"


def page(text: str, name: str) -> str:
    """A page with its generated parts renewed: its Python blocks are run, top to bottom, in one namespace."""
    space: dict[str, Any] = {"__name__": name}

    def run(block: re.Match[str]) -> str:
        out = io.StringIO()
        # The line numbers of the page, so that a failure points into it.
        code = "\n" * text.count("\n", 0, block.start("code")) + block["code"]
        with contextlib.redirect_stdout(out):
            exec(compile(code, name, "exec"), space)
        printed = out.getvalue()
        if not printed:
            return f"```python\n{block['code']}```\n"
        return f"```python\n{block['code']}```\n\n```text\n{printed}```\n"

    with np.printoptions():
        text = BLOCK.sub(run, text)
    with jax.numpy_dtype_promotion("standard"):  # as JAX comes; strict promotion is one more reason to refuse
        return SECTION.sub(lambda _: section(), text)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path.read_text(), path.name))

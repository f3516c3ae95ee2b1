"""CPU time of calls that only send work off, and what figures hang on."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

CALLS, RUNS, WARM = 100, 9, 20
REST = 0.01  # seconds without work before a run: an H100 that has none lowers its clock after about 20 ms of products
ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "attend_*/implementations/*.py", "attend_*/a*.py", "attend_*/runs.py", "attend_torch/tape.py",
    "attend_jax/gluon.py", "shared/attend_shared/kernels/*.py",
)  # fmt: skip


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of Python, of those packages that are installed, and a hash of the sources that this library's times hang on."""
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    sources = sorted(path for pattern in SOURCES for path in ROOT.glob(pattern))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    return {**found, "sources": digest}


def timed_on_host(calls: dict[str, Callable[[], Any]], wait: Callable[[], Any]) -> dict[str, list[float]]:
    """Microseconds of each call in each of RUNS interleaved runs; the device is idle before one, and not waited for."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(WARM):
            call()
        wait()
    for _ in range(RUNS):
        for name, call in calls.items():
            started = time.perf_counter()
            for _ in range(CALLS):
                call()
            found[name].append(1e6 / CALLS * (time.perf_counter() - started))
            wait()
    return found

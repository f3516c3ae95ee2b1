"""ruff and mypy find nothing, and the rules that keep the packages apart can fail."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BANNED = {
    "shared/attend_shared": ("torch", "jax", "jaxlib", "flax", "attend_torch", "attend_jax"),
    "attend_torch": ("jax", "jaxlib", "flax", "attend_jax"),
    "attend_jax": ("torch", "attend_torch"),
}
ALLOWED = {
    "shared/attend_shared": ("numpy", "einops", "packaging"),
    "attend_torch": ("torch", "attend_shared"),
    "attend_jax": ("jax", "flax", "attend_shared"),
    "tests": ("torch", "jax", "flax", "attend_shared", "attend_torch", "attend_jax"),
}


def run(*command: str, source: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, input=source, capture_output=True, text=True)


def ruff(folder: str, source: str) -> str:
    """What ruff says of a file with this source in this folder."""
    name = f"--stdin-filename={folder}/probe.py"
    return run("ruff", "check", "--output-format=concise", name, "-", source=source).stdout


def test_ruff_is_clean() -> None:
    result = run("ruff", "check", ".")
    assert result.returncode == 0, result.stdout + result.stderr


def test_mypy_is_clean() -> None:
    result = run("mypy")
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_mypy_does_not_follow_is_named_nowhere() -> None:
    """What it would not know the type of, it would not check."""
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    (unread,) = (it["module"] for it in overrides if it.get("follow_imports") == "skip")
    for path in (path for folder in BANNED for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text()
        assert [name for name in unread if name.removesuffix(".*") in text] == [], path


@pytest.mark.parametrize(("folder", "package"), [(folder, name) for folder, names in BANNED.items() for name in names])
def test_ruff_refuses_an_import_against_the_direction(folder: str, package: str) -> None:
    assert "TID251" in ruff(folder, f"import {package}\n\nprobe = {package}\n")
    assert "TID251" in ruff(folder, f"from {package}.part import probe\n\nprobe()\n")
    assert "TID251" in ruff(folder, f"def probe() -> object:\n    import {package}\n\n    return {package}\n")


@pytest.mark.parametrize(("folder", "package"), [(folder, name) for folder, names in ALLOWED.items() for name in names])
def test_ruff_lets_an_import_along_the_direction_pass(folder: str, package: str) -> None:
    assert ruff(folder, f"import {package}\n\nprobe = {package}\n") == "All checks passed!\n"


def test_mypy_refuses_a_wrong_type(tmp_path: Path) -> None:
    """The project's own settings, on a file that is wrong in two ways."""
    (tmp_path / "probe.py").write_text("def probe(size: int):\n    return size\n\n\nprobe('one')\n")
    result = run("mypy", "--config-file=pyproject.toml", "--cache-dir=/dev/null", str(tmp_path / "probe.py"))
    assert "no-untyped-def" in result.stdout
    assert "arg-type" in result.stdout

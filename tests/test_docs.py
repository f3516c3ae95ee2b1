"""The pages say what the code does: every Python block runs and prints what stands below it, tables are up to date,
links lead somewhere, and the tests that docs/traps.md names exist."""

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
CLAUSES = 21
TRAPS = 33


def load() -> ModuleType:
    """docs/generate.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """What links into a page may point at: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def functions_in(path: Path) -> set[str]:
    """The names of the test functions of a file."""
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_print_what_stands_below_them_and_tables_are_up_to_date(page: Path) -> None:
    """`python docs/generate.py` renews both."""
    text = page.read_text()
    assert load().page(text, page.name) == text


def test_a_wrong_result_in_a_page_is_noticed() -> None:
    page = "```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n"
    assert load().page(page, "page") == page.replace("3", "2")
    with pytest.raises(ZeroDivisionError):
        load().page("```python\n1 / 0\n```\n", "page")


def test_the_table_of_implementations_is_marked() -> None:
    with jax.numpy_dtype_promotion("standard"):
        section = load().section()
    text = (ROOT / "docs" / "implementations.md").read_text()
    assert f"<!-- generated: implementations -->\n{section}<!-- end -->" in text
    assert any(line.startswith("| softcap |") and "no (" in line for line in section.splitlines())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            file, _, anchor = target.partition("#")
            there = (page.parent / file).resolve() if file else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


def test_every_clause_has_an_example() -> None:
    text = (ROOT / "docs" / "semantics.md").read_text()
    parts = re.split(r"^### (\d+)\. ", text.partition("## Attend, the module")[0], flags=re.MULTILINE)
    assert [int(number) for number in parts[1::2]] == list(range(1, CLAUSES + 1))
    assert [number for number, part in zip(parts[1::2], parts[2::2], strict=True) if "```python" not in part] == []


def test_every_trap_names_tests_that_exist_or_says_why_not() -> None:
    text = (ROOT / "docs" / "traps.md").read_text()
    parts = re.split(r"^### (\d+)\. ", text, flags=re.MULTILINE)
    assert [int(number) for number in parts[1::2]] == list(range(1, TRAPS + 1))
    for part in parts[2::2]:
        named = re.findall(r"`(tests/\w+\.py)::(\w+)`", part)
        assert named or "Documentation only: " in part, part
        for file, name in named:
            assert name in functions_in(ROOT / file), f"{file}::{name}"


def test_every_test_of_a_trap_is_in_the_page() -> None:
    text = (ROOT / "docs" / "traps.md").read_text()
    tests = {name for name in functions_in(ROOT / "tests" / "test_traps.py") if name.startswith("test_")}
    assert {name for name in tests if f"`tests/test_traps.py::{name}`" not in text} == set()

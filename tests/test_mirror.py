"""attend_torch and attend_jax are twins: the same files, names, signatures and docstrings, or a written reason."""

import dataclasses
import importlib
import inspect
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import attend_jax
import attend_jax.linen
import attend_torch
from attend_jax.implementations import table as jax_table
from attend_shared import wrong_calls
from attend_torch.implementations import table as torch_table

ROOT = Path(__file__).parent.parent
PACKAGES = ("attend_torch", "attend_jax")

# What exists on one side only, and why.
ONE_SIDED_FILES = {
    "attend_torch/implementations/sdpa.py": "torch's own attention",
    "attend_torch/implementations/flex.py": "torch's own attention with functions",
    "attend_torch/again.py": "a compiled program has no door; in torch each call comes by it",
    "attend_torch/tape.py": "a compiled program launches kernels; what a package does before it does is paid in torch",
    "attend_torch/launches.py": "a compiled program launches kernels; JAX does it by jax-triton",
    "attend_torch/programs.py": "FlexAttention takes functions of single numbers; JAX traces in functions.py",
    "attend_jax/implementations/xla.py": "JAX's own attention",
    "attend_jax/implementations/fa3.py": "a package of FlashAttention-3 as it was released is there for JAX alone",
    "attend_jax/implementations/cudnn.py": "JAX's own attention on NVIDIA GPUs, where torch's is inside sdpa",
    "attend_torch/hooks/transformers.py": "the host is a PyTorch library",
    "attend_torch/hooks/x_transformers.py": "the host is a PyTorch library",
    "attend_jax/hooks/flax.py": "the host is a JAX library",
    "attend_jax/functions.py": "a compiled call must not keep a caller's function, nor be compiled anew for each",
    "attend_jax/gluon.py": "Triton launches these kernels in torch itself",
    **{
        f"attend_jax/models/{name}.py": "PyTorch has these models in transformers"
        for name in (
            "__init__", "albert", "bert", "blocks", "decoder", "encoder", "family", "gemma2", "generation", "gpt2",
            "llama", "loading", "mistral", "options", "qwen2", "qwen3", "seq2seq", "t5", "vision", "vit", "whisper",
        )
    },
    "attend_jax/linen/__init__.py": "Flax has two kinds of modules, PyTorch one",
    "attend_jax/linen/module.py": "Flax has two kinds of modules, PyTorch one",
    "attend_jax/linen/multihead.py": "Flax has two kinds of modules, PyTorch one",
}
ONE_SIDED_NAMES = {
    "attend_torch.arrays.negated": "torch negates lazily",
    "attend_torch.arrays.signed": "torch compares and subtracts few unsigned integers",
    "attend_torch.arrays.is_traced": "JAX traces everything",
    "attend_torch.arrays.is_watched": "JAX traces everything",
    "attend_torch.arrays.needs_gradients": "JAX differentiates functions",
    "attend_torch.arrays.device_type": "without making a device object, which an eager call would feel",
    "attend_jax.arrays.SHAPES": "shapes without data are a type of their own in JAX, in torch a device",
    "attend_jax.arrays.to_int32": "without x64 JAX has no 64-bit integers",
    "attend_jax.arrays.segment_ids": "JAX compares one dtype with itself only",
    "attend_jax.arrays.varying": "the type of an array in a shard_map says between which devices it varies",
    "attend_jax.arrays.alike": "the type of an array in a shard_map says between which devices it varies",
    "attend_jax.attend.Array": "JAX takes NumPy arrays as well",
    "attend_jax.attend.alone": "a program in JAX has what is differentiated and what is not; a call in torch is either",
    "attend_jax.convert.Array": "JAX takes NumPy arrays as well",
    "attend_jax.runs.bounded": "fa3, which asks how long the longest run is, is in JAX alone",
    "attend_jax.multihead.HIGHEST": "torch multiplies float32 in full unless it is told otherwise",
    "attend_jax.multihead.product": "XLA needs to be led to a fast product of few rows on a CPU",
}
OTHER_SIGNATURES = {
    "arrays.indices": "torch must know on which device",
    "multihead.Norm": "made with device and dtype in torch, with param_dtype in Flax",
    "multihead.empty_cache": "torch must know on which device",
    "multihead.filled": "torch must know on which device",
    "philox.keep_mask": "an operator of torch's, so that a compiler takes it whole",
    "philox.seed_words": "torch must know on which device",
}
INTERFACE = {"unavailable": [], "refusal": ["call"], "attend": ["call", "arrays"]}  # of an implementation
# What the frameworks force on the modules: parameters after ours, with their defaults.
MODULES = {"Attend": "module", "MultiHeadAttention": "multihead"}
NEEDED = inspect.Parameter.empty
FORCED = {
    "attend_torch.Attend": {},
    "attend_jax.Attend": {"deterministic": False, "rngs": None},
    "attend_jax.linen.Attend": {"parent": "flax", "name": "flax"},  # what every Linen module has
    "attend_torch.Attend()": {},
    "attend_jax.Attend()": {"deterministic": None, "rngs": None},
    "attend_jax.linen.Attend()": {"deterministic": None},
    "attend_torch.MultiHeadAttention": {"device": None, "dtype": None},
    "attend_jax.MultiHeadAttention": {
        "dtype": None, "param_dtype": jnp.float32, "deterministic": False, "rngs": NEEDED,
    },
    "attend_jax.linen.MultiHeadAttention": {
        "dtype": None, "param_dtype": jnp.float32, "parent": "flax", "name": "flax",
    },
    "attend_torch.MultiHeadAttention()": {},
    "attend_jax.MultiHeadAttention()": {"deterministic": None, "rngs": None},
    "attend_jax.linen.MultiHeadAttention()": {"deterministic": None},
}  # fmt: skip


def files(package: str) -> set[str]:
    folder = ROOT / package
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in found if path.parts[0] != "__pycache__" and path.suffix != ".pyc"}


def modules() -> list[str]:
    """What both packages have, as names after the package's."""
    shared = sorted(files("attend_torch") & files("attend_jax"))
    parts = [Path(name).with_suffix("").parts for name in shared if name.endswith(".py")]
    return [".".join(each[:-1] if each[-1] == "__init__" else each) for each in parts]


def twins(module: str) -> list[types.ModuleType]:
    return [importlib.import_module(f"{package}.{module}".rstrip(".")) for package in PACKAGES]


def public(module: types.ModuleType) -> set[str]:
    """The names that a module defines, imports left out."""
    if hasattr(module, "__all__"):
        return set(module.__all__)
    tree = compile(inspect.getsource(module), "", "exec").co_names
    return {
        name
        for name in tree
        if name in vars(module)
        and not name.startswith("_")
        and not isinstance(vars(module)[name], types.ModuleType)
        and not imported(module, name)
    }


def imported(module: types.ModuleType, name: str) -> bool:
    return bool(re.search(rf"^(from .* )?import .*\b{name}\b|^    {name},$", inspect.getsource(module), re.MULTILINE))


def functions(module: str) -> list[str]:
    """The callables that both twins of a module define."""
    torch, jax = twins(module)
    names = public(torch) & public(jax)
    return sorted(name for name in names if callable(getattr(torch, name)) and callable(getattr(jax, name)))


FUNCTIONS = [
    (module, name)
    for module in modules()
    if module and not module.startswith("implementations")
    for name in functions(module)
    if name not in MODULES
]
DOCUMENTED = [  # for users
    *(each for each in FUNCTIONS if each[0] in ("attend", "convert", "rotary")),
    *((module, name) for name, module in MODULES.items()),
]


def parameters(function: Callable[..., Any]) -> list[tuple[str, str, Any]]:
    """Names, kinds and defaults, in order; of a method without self."""
    signature = inspect.signature(function)
    return [(p.name, p.kind.name, p.default) for p in signature.parameters.values() if p.name != "self"]


def split(docstring: str) -> tuple[str, list[str], str]:
    """A docstring without its framework lines and its example; those lines; the example."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    lines = [text for text in paragraphs if text.startswith(("PyTorch: ", "JAX: "))]
    rest = "\n\n".join(text for text in paragraphs if text not in lines)
    before, found, after = rest.partition("Example:\n")
    example, _, references = after.partition("References:\n")
    return before + found + references, lines, example


# Files and names.


def test_files() -> None:
    torch, jax = (files(package) for package in PACKAGES)
    one_sided = {f"attend_torch/{name}" for name in torch - jax} | {f"attend_jax/{name}" for name in jax - torch}
    assert one_sided == set(ONE_SIDED_FILES)
    assert all(ONE_SIDED_FILES.values())


def test_names() -> None:
    """But for what is inside an implementation, which is a framework's own affair."""
    one_sided = set()
    for module in modules():
        if module.startswith("implementations"):
            continue
        (torch, jax), names = twins(module), [public(each) for each in twins(module)]
        one_sided |= {f"{torch.__name__}.{name}" for name in names[0] - names[1]}
        one_sided |= {f"{jax.__name__}.{name}" for name in names[1] - names[0]}
    assert one_sided == set(ONE_SIDED_NAMES)
    assert all(ONE_SIDED_NAMES.values())


def test_implementations_are_three_functions() -> None:
    for package, table in (("attend_torch", torch_table()), ("attend_jax", jax_table())):
        names = [entry.name for entry in table]
        for entry in table:
            assert entry.module.__name__ == f"{package}.implementations.{entry.name}"
            shapes = {name: [p for p, _, _ in parameters(getattr(entry.module, name))] for name in INTERFACE}
            assert shapes == INTERFACE
        in_folder = {Path(name).stem for name in files(package) if name.startswith("implementations/")} - {"__init__"}
        assert in_folder == set(names), "one file each, all in the table"


def test_the_packages_offer_the_same() -> None:
    assert attend_torch.__all__ == attend_jax.__all__
    for name in ("Explanation", "Implementation", "UnsupportedError"):
        assert getattr(attend_torch, name) is getattr(attend_jax, name)
    assert {"attend", "Attend", "merge", "explain", "implementations", "convert"} <= set(attend_torch.__all__)


# Signatures.


@pytest.mark.parametrize(("module", "name"), FUNCTIONS)
def test_signatures(module: str, name: str) -> None:
    torch, jax = (getattr(each, name) for each in twins(module))
    assert (parameters(torch) == parameters(jax)) is (f"{module}.{name}" not in OTHER_SIGNATURES)


def test_explain_takes_what_attend_takes() -> None:
    for package in (attend_torch, attend_jax):
        assert parameters(package.explain) == parameters(package.attend)


def test_the_order_of_the_checks_is_that_of_all_arguments() -> None:
    assert set(wrong_calls.ORDER) == {name for name, _, _ in parameters(attend_torch.attend)}


OPTIONS = [name for name, _, _ in parameters(attend_torch.Attend)]


@pytest.mark.parametrize("package", ["attend_torch", "attend_jax", "attend_jax.linen"])
def test_attend_differs_by_what_flax_forces(package: str) -> None:
    module = importlib.import_module(package).Attend
    call = module.forward if package == "attend_torch" else module.__call__
    ours = [each for each in parameters(attend_torch.attend) if each[0] not in OPTIONS]
    found = {name: default for name, _, default in parameters(call)}
    forced = FORCED[f"{package}.Attend()"]
    assert parameters(call)[: len(ours)] == ours
    assert dict(list(found.items())[len(ours) :]) == forced

    made = parameters(module.__init__)
    assert [name for name, _, _ in made] == OPTIONS + list(FORCED[f"{package}.Attend"])
    defaults = {name: default for name, _, default in parameters(attend_torch.attend)} | {"flash": None}
    assert {name: default for name, _, default in made if name in OPTIONS} == {name: defaults[name] for name in OPTIONS}
    if package != "attend_jax.linen":  # fields have no kinds
        kinds = [kind for _, kind, _ in made]
        assert kinds == ["POSITIONAL_OR_KEYWORD"] * 3 + ["KEYWORD_ONLY"] * (len(kinds) - 3)
    if package == "attend_jax":
        assert {name: default for name, _, default in made if name not in OPTIONS} == FORCED["attend_jax.Attend"]


LAYER = [each for each in parameters(attend_torch.MultiHeadAttention) if each[0] not in ("device", "dtype")]


@pytest.mark.parametrize("package", ["attend_torch", "attend_jax", "attend_jax.linen"])
def test_multihead_attention_differs_by_what_the_frameworks_force(package: str) -> None:
    module = importlib.import_module(package).MultiHeadAttention
    made, forced = parameters(module.__init__), FORCED[f"{package}.MultiHeadAttention"]
    ours = made[: len(LAYER)]
    assert [(name, default) for name, _, default in ours] == [(name, default) for name, _, default in LAYER]
    assert [name for name, _, _ in made[len(LAYER) :]] == list(forced)
    if package != "attend_jax.linen":  # fields have no kinds
        assert ours == LAYER
        assert {name: default for name, _, default in made[len(LAYER) :]} == forced

    call = module.forward if package == "attend_torch" else module.__call__
    ours = parameters(attend_torch.MultiHeadAttention.forward)
    assert parameters(call)[: len(ours)] == ours
    assert {name: d for name, _, d in parameters(call)[len(ours) :]} == FORCED[f"{package}.MultiHeadAttention()"]
    for method in ("project", "make_cache"):
        ours = parameters(getattr(attend_torch.MultiHeadAttention, method))
        assert parameters(getattr(module, method)) == ours


def test_multihead_attention_takes_what_attend_takes() -> None:
    """But for what it has of its own, and q, k, v, sinks, layout and lse, which it makes or has no place for."""
    given = {name for name, _, _ in parameters(attend_torch.attend)}
    layer = [*LAYER, *parameters(attend_torch.MultiHeadAttention.forward)]
    assert given - {name for name, _, _ in layer} == {"q", "k", "v", "layout", "return_lse"}
    defaults = {name: default for name, _, default in parameters(attend_torch.Attend)}
    assert all(default == defaults[name] for name, _, default in LAYER if name in defaults)


def test_the_fields_of_linen_are_the_arguments_of_the_constructor() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(attend_jax.linen.Attend)}
    assert list(fields) == [*OPTIONS, "parent", "name"]
    assert [fields[name] for name in OPTIONS] == [default for _, _, default in parameters(attend_torch.Attend)]


def shown(function: Callable[..., Any]) -> str:
    """A signature as the docs write it."""
    text, starred = [], False
    for name, kind, default in parameters(function):
        if kind == "KEYWORD_ONLY" and not starred:
            text.append("*")
            starred = True
        text.append(name if default is inspect.Parameter.empty else f"{name}={default!r}".replace("'", '"'))
    return f"({', '.join(text)})"


def test_the_docs_show_these_signatures() -> None:
    page = " ".join((ROOT / "docs" / "semantics.md").read_text().split())
    assert f"attend{shown(attend_torch.attend)} -> out, or (out, lse)" in page
    assert f"Attend{shown(attend_torch.Attend)}" in page
    assert f"Attend.__call__{shown(attend_torch.Attend.forward)}" in page
    page = " ".join((ROOT / "docs" / "layers.md").read_text().split())
    options = shown(attend_torch.MultiHeadAttention).replace(", device=None, dtype=None", "")
    assert f"MultiHeadAttention{options}" in page
    assert f"MultiHeadAttention.__call__{shown(attend_torch.MultiHeadAttention.forward)}" in page


# Docstrings.


@pytest.mark.parametrize(("module", "name"), DOCUMENTED)
def test_docstrings(module: str, name: str) -> None:
    torch, jax = (split(getattr(each, name).__doc__) for each in twins(module))
    assert torch[0] == jax[0], "only a paragraph that starts with the framework's name may differ, and the example"
    assert len(torch[1]) == len(jax[1]) <= 1
    assert all(line.startswith("PyTorch: ") for line in torch[1])
    assert all(line.startswith("JAX: ") for line in jax[1])
    assert bool(torch[2]) == bool(jax[2])
    assert torch[2].count(">>>") == jax[2].count(">>>") or name in MODULES  # Linen and NNX import what they use


def test_the_docstrings_of_methods() -> None:
    """The same but for the lines on what the frameworks force."""
    made = attend_torch.MultiHeadAttention, attend_jax.MultiHeadAttention, attend_jax.linen.MultiHeadAttention
    calls = [each.forward if each is made[0] else each.__call__ for each in made]
    texts = [re.sub(r"\n *deterministic.*", "", str(call.__doc__)) for call in calls]
    assert texts[0] == texts[1] == texts[2]
    for method in ("project", "make_cache"):
        assert len({getattr(each, method).__doc__ for each in made}) == 1


def test_the_docstrings_of_linen() -> None:
    for name in MODULES:
        ours, linen = (split(getattr(package, name).__doc__) for package in (attend_jax, attend_jax.linen))
        assert (ours[0], len(linen[1])) == (linen[0], 1)
    ours, linen = split(attend_jax.Attend.__doc__), split(attend_jax.linen.Attend.__doc__)
    assert ours[2].replace("attention(x, x, x)", "attention.apply({}, x, x, x)") == linen[2]


@pytest.mark.parametrize("package", PACKAGES)
def test_what_users_call_is_documented_in_full(package: str) -> None:
    twin = importlib.import_module(package)
    convert = importlib.import_module(f"{package}.convert")
    callables = {"attend", "explain", "implementations", "merge", *MODULES}
    for owner, name in [(twin, name) for name in callables] + [(convert, name) for name in public(convert) - {"Array"}]:
        function = getattr(owner, name)
        docstring = inspect.cleandoc(function.__doc__)
        assert docstring.split("\n")[0].endswith("."), f"{name}: the first line is a sentence"
        sections = re.findall(r"^(Args|Returns|Raises|Example|References):$", docstring, re.MULTILINE)
        assert "Returns" in sections and "Example" in sections, name
        if name not in ("implementations", *MODULES):
            told = re.search(r"^Args:\n(.*?)^Returns:", docstring, re.MULTILINE | re.DOTALL)
            assert told and "Raises" in sections, name
            named = set(re.findall(r"^    (\w+):", told[1], re.MULTILINE))
            assert named == {parameter for parameter, _, _ in parameters(function)} or name == "explain", name


# The tests of this file can fail.


def test_a_difference_is_seen() -> None:
    def one(q: int, *, scale: float = 1.0) -> None:
        """It does.

        PyTorch: here.

        Args:
            q: a number.

        Example:
            >>> one(1)
        """

    def two(q: int, *, scale: float = 2.0) -> None:
        """It does.

        JAX: there.

        Args:
            q: another number.

        Example:
            >>> two(1)
        """

    assert parameters(one) != parameters(two)
    assert split(one.__doc__ or "")[0] != split(two.__doc__ or "")[0]
    assert split(one.__doc__ or "")[0] == split((two.__doc__ or "").replace("another", "a"))[0]
    assert split(two.__doc__ or "")[1:] == (["JAX: there."], "    >>> two(1)")

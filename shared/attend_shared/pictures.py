"""The picture of the demo: what heads look at, and how far every layer of every implementation is from the oracle.

matplotlib is imported when something is drawn, and used without pyplot: no backend is chosen, no figure is kept.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attend_shared.report import write

if TYPE_CHECKING:
    from attend_shared.demo import Demo

__all__ = ["HEADS", "SENTENCE", "draw"]

SENTENCE = 8
"""The sentence whose attention is drawn; it is shorter than the longest, so padding follows."""

HEADS = (
    (1, 3, "looks at the token before", None),
    (4, 2, "finds what a pronoun stands for", ("it", "animal")),
    (6, 12, "brings the subject to every token", None),
)
"""Layer and head, both from 1, what is to be seen there, and the query and key to mark."""

INK, SOFT, LINE, BUDGET = "#1c2430", "#5b6675", "#d9dee5", "#c02b2b"
COLOURS = {"torch": "#d9480f", "jax": "#1864ab"}
# One shape for one role: that of a framework's own attention, of blocks, of the formula as it is written.
MARKERS = {"sdpa": "o", "xla": "o", "cudnn": "P", "blockwise": "^", "rowwise": "s", "einsum": "D"}
RESULTS = {"out": "output", "dq": "gradient of q", "dk": "gradient of k", "dv": "gradient of v"}


def draw(demo: Demo, path: Path) -> None:
    """Draw what a demo found.

    Args:
        demo: see `attend_shared.demo.Demo`.
        path: of a PNG, in a folder that exists.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 9, "text.color": INK, "axes.labelcolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT,
        "axes.edgecolor": LINE, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titlecolor": INK,
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(14, 9.6), dpi=100, facecolor="white")
        FigureCanvasAgg(figure)
        figure.text(0.035, 0.965, "What MiniLM looks at", fontsize=15, fontweight="bold")
        what = "attention probabilities, float64 oracle; hatched: padding, exactly 0"
        figure.text(0.035, 0.943, f"“{demo.sentences[SENTENCE]}”  {what}", color=SOFT)
        what = "largest error against the oracle on real activations and gradients, float32; above the red line is over"
        figure.text(0.035, 0.415, "How exact every layer is", fontsize=15, fontweight="bold")
        figure.text(0.035, 0.393, f"{what} the budget", color=SOFT)
        _maps(figure, demo)
        _errors(figure, demo)
        held = io.BytesIO()
        figure.savefig(held, format="png", metadata={"Software": None})
    write(path, held.getvalue())


def _maps(figure: Any, demo: Demo) -> None:
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm
    from matplotlib.patches import Rectangle

    colours = LinearSegmentedColormap.from_list("attention", ["#ffffff", "#d0e2f5", "#6ea8dc", "#1f5fa8", "#0b2545"])
    grid = figure.add_gridspec(1, len(HEADS), left=0.07, right=0.93, top=0.895, bottom=0.525, wspace=0.22)
    tokens = demo.tokens[SENTENCE]
    real = len([token for token in tokens if token != "[PAD]"])
    image = None
    for place, (layer, head, words, marked) in enumerate(HEADS):
        p = demo.p[layer - 1][SENTENCE, head - 1, :real]  # (query key), queries that are padding left out
        axes = figure.add_subplot(grid[0, place])
        image = axes.imshow(p, cmap=colours, norm=PowerNorm(0.6, 0.0, 1.0), aspect="auto")
        axes.set_title(f"layer {layer}, head {head}", fontweight="bold", pad=18)
        axes.text(0, 1.018, words, transform=axes.transAxes, color=SOFT)
        axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontfamily="monospace", fontsize=8)
        axes.set_yticks(range(real), tokens[:real], fontfamily="monospace", fontsize=8)
        axes.set_xticks(np.arange(len(tokens)) - 0.5, minor=True)
        axes.set_yticks(np.arange(real) - 0.5, minor=True)
        axes.grid(which="minor", color="#eef1f5", linewidth=0.6)
        axes.tick_params(which="both", length=0)
        padding = Rectangle((real - 0.5, -0.5), len(tokens) - real, real, linewidth=0)
        padding.set(facecolor="#f4f6f9", edgecolor=LINE, hatch="////")
        axes.add_patch(padding)
        if marked is not None and set(marked) <= set(tokens):
            row, column = tokens.index(marked[0]), tokens.index(marked[1])
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=BUDGET, linewidth=1.8))
            axes.annotate(
                f"{marked[0]} → {marked[1]}: {p[row, column]:.2f}", (column + 0.55, row), (column + 2.4, row + 0.05),
                color=BUDGET, fontweight="bold", va="center", arrowprops={"arrowstyle": "-", "color": BUDGET},
                bbox={"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none", "alpha": 0.9},
            )  # fmt: skip
        axes.set_xlabel("key", loc="right")
        if place == 0:
            axes.set_ylabel("query", loc="top")
    bar = figure.colorbar(image, cax=figure.add_axes((0.945, 0.525, 0.009, 0.37)), ticks=[0, 0.1, 0.25, 0.5, 1])
    bar.outline.set_visible(False)
    bar.ax.set_title("p", loc="left", color=SOFT, fontsize=9)


def _errors(figure: Any, demo: Demo) -> None:
    layers = list(dict.fromkeys(it.case for it in demo.results))
    # result -> implementation -> layer, from 1 -> its error; what refused a layer or raised has none there
    errors: dict[str, dict[str, dict[int, float]]] = {result: {} for result in RESULTS}
    budgets: dict[str, dict[int, float]] = {result: {} for result in RESULTS}
    markers = {}
    for it in demo.results:
        name, layer = f"{it.framework} {it.implementation}", layers.index(it.case) + 1
        for row in it.errors:
            errors[row.name].setdefault(name, {})[layer] = row.max_error
            budgets[row.name][layer] = row.max_budget
            markers[name] = (MARKERS.get(it.implementation, "v"), COLOURS[it.framework])
    if not markers:
        return
    grid = figure.add_gridspec(1, len(RESULTS), left=0.07, right=0.985, top=0.345, bottom=0.105, wspace=0.24)
    edges = np.arange(len(layers) + 1) + 0.5
    for place, (result, words) in enumerate(RESULTS.items()):
        axes = figure.add_subplot(grid[0, place])
        budget = [budgets[result].get(layer, np.nan) for layer in range(1, len(layers) + 1)]
        axes.stairs(budget, edges, color=BUDGET, linewidth=1.8, baseline=None, label="budget")
        values = [*budget, *(error for found in errors[result].values() for error in found.values())]
        finite = [value for value in values if 0 < value < np.inf]
        bottom, top = 10.0 ** np.floor(np.log10(min(finite) / 1.3)), 10.0 ** np.ceil(np.log10(max(finite) * 1.3))
        axes.set_yscale("log")
        axes.set_ylim(bottom, top)
        for n, (name, (marker, colour)) in enumerate(markers.items()):
            found = errors[result].get(name, {})
            beside = 0.8 * ((n + 0.5) / len(markers) - 0.5)  # side by side in their layer
            heights = [min(error, top) for error in found.values()]  # an infinite error stands at the top
            look = {"marker": marker, "markerfacecolor": colour, "markeredgecolor": "white", "markeredgewidth": 0.6}
            places = [layer + beside for layer in found]
            axes.plot(places, heights, label=name, linestyle="none", markersize=5.5, clip_on=False, **look)
        over = {"color": BUDGET, "alpha": 0.06, "linewidth": 0}
        axes.fill_between(np.repeat(edges, 2)[1:-1], np.repeat(budget, 2), top, **over)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xticks(range(1, len(layers) + 1))
        axes.set_xlabel("layer")
        axes.set_title(words, fontweight="bold")
        axes.grid(axis="y", color="#eef1f5")
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if place == 0:
            axes.set_ylabel("largest error")
            handles, labels = axes.get_legend_handles_labels()
            legend = {"loc": "lower left", "bbox_to_anchor": (0.06, 0.008), "ncol": len(labels)}
            figure.legend(handles, labels, **legend, frameon=False, handlelength=1.4, labelcolor=INK)

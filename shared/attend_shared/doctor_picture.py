"""The picture of `attend doctor`: calls against implementations, how near to its budget each came, and what is wrong.

matplotlib is imported when something is drawn, and used without pyplot: no backend is chosen, no figure is kept.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from attend_shared.canaries import CANARIES
from attend_shared.pictures import BUDGET, INK, LINE, SOFT

if TYPE_CHECKING:
    from attend_shared.doctor import Run

__all__ = ["draw"]


def draw(run: Run) -> bytes:
    """A PNG of a run: a square for each dtype, coloured by the worst error as a share of its budget.

    Args:
        run: see `attend_shared.doctor.Run`.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    colours = LinearSegmentedColormap.from_list("share", ["#eaf3fb", "#9cc4e8", "#2f6fb0"])
    order = {canary.name: n for n, canary in enumerate(CANARIES)}
    rows = sorted({it.canary for it in run.findings}, key=lambda name: order.get(name, -1))
    columns = list(dict.fromkeys((it.framework, it.implementation) for it in run.findings if it.verdict != "refuses"))
    dtypes = list(dict.fromkeys(it.dtype for it in run.findings))
    found = {(it.framework, it.implementation, it.canary, it.dtype): it for it in run.findings}
    across = max(0.2 * len(dtypes), 0.78) * len(columns)
    wide, high = max(3.4 + across, 7.2), 2.0 + 0.19 * len(rows)
    with rc_context({"font.size": 8, "text.color": INK, "xtick.color": INK, "ytick.color": INK}):
        figure = Figure(figsize=(wide, high), dpi=110, facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_axes((3.2 / wide, 0.6 / high, across / wide, 0.19 * len(rows) / high))
        for y, row in enumerate(rows):
            for column, (framework, name) in enumerate(columns):
                for part, dtype in enumerate(dtypes):
                    it = found.get((framework, name, row, dtype))
                    if it is None:
                        continue
                    look: dict[str, Any] = {"facecolor": "white", "edgecolor": LINE, "linewidth": 0.5}
                    if it.verdict == "safe":
                        look["facecolor"] = colours(float(np.clip(it.share, 0, 1)))
                    elif it.verdict == "refuses":
                        look |= {"hatch": "/////", "edgecolor": "#e4e8ee"}
                    else:
                        look["facecolor"] = BUDGET if it.verdict in ("wrong", "crashed", "hung") else SOFT
                    x = column + part / len(dtypes)
                    axes.add_patch(Rectangle((x, y), 1 / len(dtypes), 1, **look))
                    if it.chosen:
                        at = x + 0.5 / len(dtypes), y + 0.5
                        axes.plot(*at, marker=".", markersize=3, color="white" if it.share > 0.6 else INK)
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(rows), 0)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        axes.set_xticks(np.arange(len(columns)) + 0.5, ["\n".join(" ".join(each).split()) for each in columns])
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        for column in range(len(columns) + 1):
            axes.axvline(column, color=SOFT, linewidth=0.8)
        figure.text(0.01, 1 - 0.3 / high, "attend doctor", fontsize=14, fontweight="bold")
        said = f"{run.device}; in each column {', '.join(dtypes)}, from the left"
        figure.text(0.01, 1 - 0.55 / high, said, color=SOFT)
        keys = [Patch(facecolor=colours(share), edgecolor=LINE, label=f"{share:g} of its budget")
                for share in (0.0, 0.5, 1.0)]  # fmt: skip
        keys += [Patch(facecolor=BUDGET, label="wrong, crashed or hung"),
                 Patch(facecolor="white", edgecolor="#c9d0d9", hatch="/////", label="refused")]  # fmt: skip
        figure.legend(handles=keys, loc="lower left", ncol=len(keys), frameon=False, bbox_to_anchor=(0.0, 0.0),
                      handlelength=1.2, columnspacing=1.2)  # fmt: skip
        figure.text(0.01, 0.38 / high, "a dot: what implementation=None takes", color=SOFT)
        held = io.BytesIO()
        figure.savefig(held, format="png", metadata={"Software": None})
    return held.getvalue()

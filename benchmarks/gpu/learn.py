"""The orders of implementations that a run teaches: `python -m benchmarks.gpu.learn FILE` writes them down.

They go to attend_shared/measured.py. For each framework and rule (`attend_shared.devices.RULES`), over the workloads
under that rule: for each implementation, the geometric mean of its time by that of our fastest one there. The order
is by these means: one of forward, for calls without gradients, and one of forward + backward.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from attend_shared.call import Arrays, Call, check
from attend_shared.devices import RULES, rule
from benchmarks.gpu.report import CLOSE, FRAMEWORKS, RESULTS, Results, costs, spread
from benchmarks.gpu.workloads import CHOICE, MODES, Workload, own, structure
from benchmarks.gpu.workloads import options as options_of

TARGET = Path(__file__).resolve().parents[2] / "shared" / "attend_shared" / "measured.py"
LAST = ("blockwise", "xla", "einsum")  # which are for what the others refuse: the frameworks order them by size
SHOWN = ("torch", "CUDA", "triton", "flash-attn-4", "jax", "jaxlib", "jax-triton", "fa4-jax", "dew-flash-attn-cu13")
# What is put first until it is measured, by what is known of the kernels: structure stays structure, and what is
# launched slowly does not come first where there is little to do.
EXPECTED: dict[str, dict[str, tuple[str, ...]]] = {
    "torch": {
        "float32": ("triton", "blockwise", "einsum"),
        "few queries": ("sdpa", "triton", "flex", "fa4"),
        "a mask that is no key mask": ("triton", "sdpa", "flex"),
        "a key mask": ("triton", "flex", "sdpa"),
        "lengths": ("fa4", "triton", "flex", "sdpa"),
        "sinks": ("fa4", "triton", "flex"),
        "lse": ("fa4", "triton", "flex"),
        "an offset": ("fa4", "triton", "flex", "sdpa"),
        "few logits": ("sdpa", "triton", "fa4", "flex"),
        "short sequences": ("sdpa", "triton", "fa4", "flex"),
        "head sizes up to 96": ("fa4", "sdpa", "triton", "flex"),
        "larger head sizes": ("sdpa", "fa4", "triton", "flex"),
    },
    "jax": {
        "few queries": ("cudnn", "triton", "fa4", "fa3"),
        "a mask that is no key mask": ("triton",),
        "a key mask": ("triton",),
        "lengths": ("cudnn", "fa4", "triton"),
        "sinks": ("triton",),
        "lse": ("triton",),
        "an offset": ("fa4", "fa3", "triton"),
        "a bias": ("triton",),
        "few logits": ("fa4", "fa3", "cudnn", "triton"),
        "very short sequences": ("fa4", "fa3", "cudnn", "triton"),
        "short sequences": ("fa4", "fa3", "cudnn", "triton"),
        "head sizes up to 64": ("fa4", "fa3", "cudnn", "triton"),
        "head sizes up to 96": ("fa4", "fa3", "cudnn", "triton"),
        "larger head sizes": ("fa4", "fa3", "triton"),
    },
}
HEAD = '''"""What was measured on GPUs, and the orders that follow: written by `python -m benchmarks.gpu.learn`."""

from __future__ import annotations

from attend_shared.orders import Device, Order
'''


def call_of(framework: str, load: Workload) -> Call:
    """The call that a workload is, on a GPU, from shapes alone."""
    if framework == "torch":
        import torch

        from attend_torch.arrays import FRAMEWORK as known

        def shape(sizes: tuple[int, ...], dtype: str, learns: bool = False) -> Any:
            return torch.empty(sizes, dtype=getattr(torch, dtype), device="meta", requires_grad=learns)
    else:
        import jax

        from attend_jax.arrays import SHAPES as known

        def shape(sizes: tuple[int, ...], dtype: str, learns: bool = False) -> Any:
            return jax.ShapeDtypeStruct(sizes, dtype)

    axes = (1, 2) if framework == "torch" else (2, 1)  # torch is measured in one layout, JAX in the other
    layout = "bhnd" if framework == "torch" else "bnhd"

    def laid(heads: int, length: int) -> tuple[int, ...]:
        sizes = [load.b, 0, 0, load.d]
        sizes[axes[0]], sizes[axes[1]] = heads, length
        return tuple(sizes)

    given = {name: shape(x.shape, str(x.dtype)) for name, x in structure(load).items()}
    asked = options_of(load)
    arrays = Arrays(
        *(
            shape(laid(*each), load.dtype, load.backward)
            for each in ((load.h, load.i), (load.hk, load.j), (load.hk, load.j))
        ),
        mask=given.get("mask"),
        bias=None if load.bias is None else shape(load.bias, load.dtype, load.trained),
        q_offset=asked.get("q_offset"),
        q_segment_ids=given.get("q_segment_ids"),
        kv_lengths=given.get("kv_lengths"),
        sinks=shape((load.h,), load.dtype, True) if load.sinks else None,
        dropout_seed=0 if load.dropout else None,
    )
    options = (asked.get("is_causal", False), asked.get("window_size"), asked.get("softcap"), None, load.dropout)
    return check(known, arrays, *options, load.lse, layout, None)._replace(platform="cuda")


class Loss(NamedTuple):
    """Where the order takes what is not the fastest: by how much it is slower, and by how much it may be."""

    framework: str
    rule: str
    name: str
    mode: str
    taken: str
    best: str
    slower_by: float
    allowed: float


def measured(results: Results, framework: str) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """By rule, workload and mode: the milliseconds of each of our implementations, those of the choice among them."""
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for name in results.names():
        load = results.loads[name]
        for mode in MODES:
            runs: dict[str, list[Any]] = {}
            for (its, its_load, entry, its_mode), each in results.records.items():
                who = each["chosen"] if entry == CHOICE else own(entry)
                if (its, its_load, its_mode) == (framework, name, mode) and each["runs"] and who:
                    runs.setdefault(who, []).extend(each["runs"])
            if runs:
                times = {who: median(costs({"runs": its_runs})) for who, its_runs in runs.items()}
                found.setdefault(rule(call_of(framework, load)).name, {}).setdefault(name, {})[mode] = times
    return found


Orders = dict[str, dict[str, tuple[str, ...]]]  # by rule and mode


def orders(results: Results, framework: str) -> Orders:
    """The fastest in the mean first."""
    by_mode = {mode: _orders(results, framework, mode) for mode in MODES}
    return {each: {mode: by_mode[mode][each] for mode in MODES} for each in by_mode[MODES[0]]}


def _orders(results: Results, framework: str, mode: str) -> dict[str, tuple[str, ...]]:
    found = {}
    for each, loads in measured(results, framework).items():
        logs: dict[str, list[float]] = {}
        counting = (mode,) if any(mode in modes for modes in loads.values()) else MODES
        for modes in loads.values():
            for times in (modes[it] for it in counting if it in modes):
                best = min(times.values())
                for name, value in times.items():
                    logs.setdefault(name, []).append(math.log(value / best))
        means = {name: sum(values) / len(values) for name, values in logs.items() if name not in LAST}
        last = each == "float32"  # where these are what there is
        if last:
            means = {name: sum(values) / len(values) for name, values in logs.items()}
        found[each] = tuple(sorted(means, key=lambda name: means[name]))
    return {each.name: found[each.name] for each in RULES if each.name in found}


def losses(results: Results, framework: str, by_rule: Orders) -> Iterator[Loss]:
    """What each measured workload loses by the order of its rule; 0 where it takes the fastest."""
    for each, loads in measured(results, framework).items():
        for name, modes in loads.items():
            for mode, times in modes.items():
                taken = next((it for it in by_rule.get(each, {}).get(mode, ()) if it in times), None)
                if taken is None:
                    continue
                best = min(times, key=lambda it: times[it])
                both = [results.get(framework, name, f"{CHOICE} {it}", mode) for it in (taken, best)]
                ratio = results.ratio(
                    name, mode, (framework, f"{CHOICE} {taken}"), (framework, f"{CHOICE} {best}"), costs
                )
                if ratio is None:  # they scatter
                    continue
                allowed = max(CLOSE, *(spread(record, costs) for record in both if record))
                yield Loss(framework, each, name, mode, taken, best, ratio.value - 1, allowed)


def source(results: Results) -> str:
    """The text of attend_shared/measured.py."""
    run = results.run
    lines = [HEAD, "DEVICES = {", f"    {json.dumps(run['machine']['capability'])}: Device("]
    lines += [
        f"        name={json.dumps(run['machine']['device'])},",
        f'        date="{run["sessions"][0]["started"][:10]}",',
    ]
    lines += [f'        file="docs/results/{RESULTS.name}",', "        versions={"]
    for framework, versions in run["versions"].items():
        lines.append(f'            "{framework}": {{')
        lines += [f'                "{name}": "{version}",' for name, version in versions.items() if name in SHOWN]
        lines.append("            },")
    lines += ["        },", "        orders={"]
    for framework in FRAMEWORKS:
        lines.append(f'            "{framework}": {{')
        known = measured(results, framework)
        learnt = orders(results, framework)
        for each in {**EXPECTED[framework], **learnt}:
            if each not in learnt:
                names = EXPECTED[framework][each]
                lines.append(f'                "{each}": Order({_tuple(names)}, {_tuple(names)}, {{}}),')
                continue
            names = learnt[each]["both"]
            lines += [
                f'                "{each}": Order(',
                f"                    {_tuple(names)},",
                f"                    {_tuple(learnt[each]['forward'])},",
                "                    {",
            ]
            for load, modes in known[each].items():
                lines.append(f'                        "{load}": {{')
                for name in names:
                    values = [f"{modes[mode][name]:.4g}" for mode in MODES if name in modes.get(mode, {})]
                    if len(values) == len(modes):
                        lines.append(
                            f'                            "{name}": ({", ".join(values)}{"," * (len(values) == 1)}),'
                        )
                lines.append("                        },")
            lines += ["                    },", "                ),"]
        lines.append("            },")
    lines += ["        },", "    ),", "}", ""]
    return "\n".join(lines)


def _tuple(names: tuple[str, ...]) -> str:
    return "(" + ", ".join(f'"{name}"' for name in names) + ("," if len(names) == 1 else "") + ")"


def main(file: Path) -> None:
    """Write the module, and print what its orders lose."""
    results = Results(json.loads(file.read_text()))
    TARGET.write_text(source(results))
    for framework in FRAMEWORKS:
        by_rule = orders(results, framework)
        for each, by_mode in by_rule.items():
            print(f"{framework}: {each}: {', '.join(by_mode['both'])}; forward {', '.join(by_mode['forward'])}")
        for loss in losses(results, framework, by_rule):
            if loss.slower_by > loss.allowed:
                late = f"{100 * loss.slower_by:+.0f} % against {loss.best} ({100 * loss.allowed:.0f} % allowed)"
                print(f"  {loss.framework} {loss.name}, {loss.mode} [{loss.rule}]: {loss.taken} {late}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)

"""Triton kernels for every clause, launched here as they are in torch: the same bits in both.

The kernels and what a call launches are `attend_shared.kernels`. Here are the memory, the launches, which jax-triton
makes, and how they batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from packaging.version import Version

from attend_jax import gluon
from attend_jax.arrays import varying
from attend_jax.implementations import einsum
from attend_jax.implementations.blockwise import Floats
from attend_jax.machine import capability
from attend_shared.call import Arrays, Call
from attend_shared.kernels import cache_folder
from attend_shared.kernels import plan as plans
from attend_shared.kernels.gluon_plan import runs_gluon
from attend_shared.kernels.launch import LOG2E, Launch, Layout
from attend_shared.kernels.plan import BOUNDS, SAVED, Plan
from attend_shared.kernels.sizes import padded_rows

Array = jax.Array


@cache
def unavailable() -> str | None:
    """Why Triton's kernels cannot run here, or None."""
    if find_spec("triton") is None or find_spec("jax_triton") is None:
        return 'it needs Triton and jax-triton: pip install "attend-twin[triton-jax]"'
    try:
        ours, theirs = Version(version("jax-triton")), Version(version("triton"))
    except PackageNotFoundError:
        return None
    if ours >= Version("0.4") and theirs < Version("3.7"):
        return f"jax-triton {ours} finds no GPU with triton {theirs}: it takes 0.3.1"
    return None


def refusal(call: Call) -> str | None:
    """Why Triton's kernels cannot serve this call, or None."""
    if call.platform != "cuda":
        return "it runs on an NVIDIA GPU"
    return plans.refusal(call)


def attend(call: Call, arrays: Arrays) -> tuple[Array, Array]:
    """out (b h i dv) in q's dtype, and lse (b h i) in float32. Differentiable once, in reverse."""
    if call.is_empty:
        return einsum.attend(call, arrays)
    floats = Floats(arrays.q, arrays.k, arrays.v, arrays.bias, arrays.sinks)
    if arrays.q_segment_ids is arrays.kv_segment_ids:  # which a transformation would not see
        arrays = arrays._replace(kv_segment_ids=None)
    return _attend(call, floats, arrays._replace(q=None, k=None, v=None, bias=None, sinks=None))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: Call, floats: Floats, data: Arrays) -> tuple[Array, Array]:
    return batching(call, partial(_forward, alone=True))(data._replace(**floats._asdict()))[:2]


def _attend_fwd(call: Call, floats: Floats, data: Arrays) -> tuple:
    saved = batching(call, _forward)(data._replace(**floats._asdict()))
    return saved[:2], (floats, data, saved)


def _attend_fwd_of(call: Call, floats: Any, data: Any) -> tuple:
    """As `_attend_fwd`, of primals that say whether they have a gradient: a launch that makes dq and dbias is left out
    by no compiler where dbias is not asked for.
    """
    values, rest = jax.tree.map(lambda x: x.value, (floats, data))
    result, kept = _attend_fwd(call, values, rest)
    wants_bias = floats.bias is not None and floats.bias.perturbed
    return result, (*kept, () if wants_bias else None)  # structure, which is no array


def _attend_bwd(call: Call, kept: tuple, cotangents: tuple) -> tuple:
    floats, data, saved, wants_bias = kept
    dout, dlse = cotangents
    dout = instantiated(dout, floats.q)
    dlse = None if isinstance(dlse, SymbolicZero) else dlse  # whose zeros would be written, and read
    function = _gradients if wants_bias == () else partial(_gradients, wants_bias=False)
    return Floats(*batching(call, function)(data._replace(**floats._asdict()), saved, dout, dlse)), None


def instantiated(x: Any, like: Array) -> Array:
    """A cotangent, zeros in full, over the axes of a mesh along which the other array varies."""
    return varying([jnp.zeros(x.shape, x.dtype)], like)[0] if isinstance(x, SymbolicZero) else x


_attend.defvjp(_attend_fwd_of, _attend_bwd, symbolic_zeros=True)


def batching(call: Call, function: Callable) -> Callable:
    """function(call, arrays, ...) of arrays, which jax.vmap makes one call of more items where it can.

    Dropout counts the items of a call, dbias and dsinks are sums over them, and of packed sequences there is one: there
    lanes go one after the other.
    """
    batched = jax.custom_batching.custom_vmap(partial(function, call))

    @batched.def_vmap
    def rule(lanes: int, are: Any, *inputs: Any) -> tuple:
        outputs_are = jax.tree.map(lambda _: True, jax.eval_shape(*_lane(partial(function, call), are, inputs)))
        if call.dropout or call.sinks or call.bias or call.runs:
            inner = batching(call, function)
            stacked, rest = _split(are, inputs)
            return lax.map(lambda some: inner(*_joined(are, some, rest)), stacked), outputs_are

        def fold(name: str, x: Any, is_batched: bool) -> Any:
            if x is None:
                return None
            if name == "q_offset" and x.ndim == int(is_batched):  # (): one for each lane
                x = x[:, None] if is_batched else x[None, None]
                x = jnp.broadcast_to(x, (lanes, call.b))
            else:
                x = x if is_batched else x[None]
                x = jnp.broadcast_to(x, (lanes, call.b, *x.shape[2:]))
            return x.reshape(lanes * call.b, *x.shape[2:])

        arrays, *rest = inputs
        of_arrays, *of_rest = are
        folded = Arrays(*(fold(*each) for each in zip(Arrays._fields, arrays, of_arrays, strict=True)))
        others = jax.tree.map(partial(fold, ""), tuple(rest), tuple(of_rest))
        mask = None if call.mask is None else (lanes * call.b, *call.mask[1:])
        result = function(call._replace(b=lanes * call.b, mask=mask), folded, *others)
        return jax.tree.map(lambda x: x.reshape(lanes, call.b, *x.shape[1:]), result), outputs_are

    return batched


def _lane(function: Callable, are: Any, inputs: Any) -> tuple:
    """The function and the shapes of one lane's inputs."""
    return function, *jax.tree.map(lambda x, is_batched: jax.eval_shape(lambda y: y[0] if is_batched else y, x),
                                   inputs, tuple(are))  # fmt: skip


def _split(are: Any, inputs: Any) -> tuple[list, list]:
    """The inputs that have lanes, and those that have not."""
    flags, values = jax.tree.leaves(are), jax.tree.leaves(inputs)
    return ([x for x, flag in zip(values, flags, strict=True) if flag],
            [x for x, flag in zip(values, flags, strict=True) if not flag])  # fmt: skip


def _joined(are: Any, some: Sequence[Array], rest: Sequence[Array]) -> Any:
    """The opposite of `_split`."""
    flags, structure = jax.tree.flatten(are)
    turns = {True: iter(some), False: iter(rest)}
    return jax.tree.unflatten(structure, [next(turns[flag]) for flag in flags])


def _prepare(call: Call, arrays: Arrays) -> tuple[Plan, dict[str, Array]]:
    """What the call launches, and its arrays by name, as they lie in memory."""
    bnhd = call.layout == "bnhd"
    offset = arrays.q_offset.ndim + 1 if call.offset == "data" else 0
    one_id = arrays.kv_segment_ids is None
    q, k, v = (_strides(x, bnhd) for x in arrays[:3])
    layout = Layout(q, k, v, _pair_strides(arrays.mask), _pair_strides(arrays.bias), offset, 0, one_id,
                    capability(), runs_gluon(capability()) and gluon.available())  # fmt: skip
    if one_id:
        arrays = arrays._replace(kv_segment_ids=arrays.q_segment_ids)
    known = {name: x for name, x in arrays._asdict().items() if x is not None}
    known |= {name: _turned(call, x) for name, x in zip("qkv", arrays[:3], strict=True)}
    return plans.plan(call, layout), known


def _turned(call: Call, x: Array) -> Array:
    """(b h n d) as the caller laid it out, or the opposite: two turns are none to XLA."""
    return x.swapaxes(1, 2) if call.layout == "bnhd" else x


def _strides(x: Array, bnhd: bool) -> tuple[int, int, int]:
    """By (b, h, n), of (b h n d) as the caller laid it out."""
    _, h, n, d = x.shape
    return (h * n * d, d, h * d) if bnhd else (h * n * d, n * d, d)


def _pair_strides(x: Array | None) -> tuple[int, ...] | None:
    if x is None:
        return None
    sizes = [*x.shape[1:], 1]
    return tuple(0 if n == 1 else int(np.prod(sizes[axis:])) for axis, n in enumerate(x.shape))


def run(launches: Sequence[Launch], arrays: dict[str, Array]) -> None:
    """Run the launches in order, their outputs put among the arrays."""
    with cache_folder.kept():
        import jax_triton

    nothing = arrays["q"]
    for launch in launches:
        given = [nothing if name is None else arrays[name] for name in launch.inputs]
        outputs = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for _, shape, dtype, _ in launch.outputs]
        if launch.gluon:
            made = gluon.call(launch, given, outputs)
        else:
            numbers = [np.float32(x) if isinstance(x, float) else x for x in launch.given]
            made = jax_triton.triton_call(
                *given, *numbers, kernel=launch.function, grid=launch.grid, name=launch.kernel, out_shape=outputs,
                num_warps=launch.warps, num_stages=launch.stages, input_output_aliases=launch.in_place,
                **launch.constants,
            )  # fmt: skip
        made = varying(made, nothing)  # of which a launch says nothing
        arrays.update(zip((output.name for output in launch.outputs), made, strict=True))


def _forward(call: Call, arrays: Arrays, alone: bool = False) -> tuple[Array | None, ...]:
    """out (b h i dv), and the others of `SAVED`, None those that the way back does not take. alone: as in `Plan`."""
    plan, known = _prepare(call, arrays)
    run(plan.alone if alone else plan.forward, known)
    bounds = (known[name] if name in plan.bounds else None for name in BOUNDS)
    return _turned(call, known["out"]), *map(known.get, SAVED[1 : -len(BOUNDS)]), *bounds


def gradients_of(call: Call, arrays: Arrays, out: Array, lse: Array, dout: Array, dlse: Array) -> tuple:
    """As `_gradients`, of out and lse (b h i) that other kernels made, for calls without bias and dropout."""
    behind = ((0, 0), (0, 0), (0, padded_rows(call.i) - call.i))
    top = jnp.pad(jnp.where(lse == -jnp.inf, jnp.inf, LOG2E * lse), behind, constant_values=jnp.inf)
    inverse = None
    if call.sinks:  # a row's weight of its sink
        shares = jnp.exp(arrays.sinks.astype(jnp.float32)[:, None] - jnp.where(lse == -jnp.inf, jnp.inf, lse))
        inverse = jnp.pad(shares, behind)
    saved = {"out": out, "lse": lse, "top": top, "inverse": inverse}
    return _gradients(call, arrays, tuple(map(saved.get, SAVED)), dout, dlse, bounded=False)


def _gradients(
    call: Call, arrays: Arrays, saved: tuple, dout: Array, dlse: Array | None, wants_bias: bool = True,
    bounded: bool = True,
) -> tuple:  # fmt: skip
    """dq, dk, dv, dbias, dsinks; None for what the call has not got, or is not wanted.

    bounded: whether what is saved has the bounds that the plan's way forward finds out.
    """
    plan, known = _prepare(call, arrays)
    known |= zip(SAVED, saved, strict=True)
    known |= {"out": _turned(call, saved[0]), "dout": _turned(call, dout)} | ({} if dlse is None else {"dlse": dlse})
    strides = _strides(dout, call.layout == "bnhd")
    wants_bias = call.bias is not None and wants_bias
    run(plan.backward(strides, wants_bias, dlse is not None, bounded and bool(plan.bounds)), known)
    gradients = [_turned(call, known[name]) for name in ("dq", "dk", "dv")]
    return *gradients, known.get("dbias"), known.get("dsinks")

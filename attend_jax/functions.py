"""score_fn and mask_fn as programs: traced once a call, for one pair, with what they capture as an argument.

A function may capture arrays, and in JAX a captured array may be a tracer: a compiled call must neither keep it nor be
compiled anew for it. So each call traces its functions outside the inner jit. What they do is a program, which is equal
to any other that does the same, whichever function it came from; what they capture goes along as data, and has its
gradient. Inside, a program of one pair is mapped over the axes that its arguments have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from attend_jax.arrays import custom
from attend_shared.call import Call

Captured = tuple[tuple[Any, ...], tuple[Any, ...]]
NAMES = "score_fn", "mask_fn"
INT32 = jnp.dtype(jnp.int32)


@dataclass(frozen=True, eq=False)
class Program:
    """What a function does to one pair, its arguments of shape (1, 1, 1, 1). Equal where the same is done.

    Attributes:
        jaxpr: of a result, with what is captured as its constants.
    """

    jaxpr: Jaxpr

    def __hash__(self) -> int:
        return hash((*(eqn.primitive.name for eqn in self.jaxpr.eqns), *(str(x.aval) for x in self.jaxpr.constvars)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and _alike(self.jaxpr, other.jaxpr)


def lift(call: Call) -> tuple[Call, Captured]:
    """The call with programs for its functions, and what these capture.

    Raises:
        TypeError, ValueError: a function gives something else than it should, for all pairs or for one.
    """
    if call.is_empty:
        return call._replace(custom=False, score_fn=None, mask_fn=None), ((), ())
    wide = jnp.dtype(call.accumulation)
    changes: dict[str, Any] = {}
    captured: list[tuple[Any, ...]] = []
    # Integers times floats are what they are in other frameworks, also where JAX is told to be strict.
    with jax.numpy_dtype_promotion("standard"):
        for sizes in ((call.b, call.h, call.i, call.j), (1, 1, 1, 1)):
            jax.eval_shape(lambda s: custom(call, s, None), jax.ShapeDtypeStruct(sizes, wide))
        for name in NAMES:
            function, constants = getattr(call, name), ()
            if function is not None:
                score = [jax.ShapeDtypeStruct((1, 1, 1, 1), wide)] if name == "score_fn" else []
                # JAX remembers what it traced by the function; of the caller's it would not see what changed since.
                fresh = partial(_call, function)
                traced = jax.make_jaxpr(fresh)(*score, *[jax.ShapeDtypeStruct((1, 1, 1, 1), INT32)] * 4)
                changes[name], constants = Program(traced.jaxpr), tuple(traced.consts)
            captured.append(constants)
    return call._replace(**changes), (captured[0], captured[1])


def _call(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    return function(*arrays)


def lower(call: Call, captured: Captured) -> Call:
    """The call of `lift` with functions again, of arrays that broadcast against each other, over what they capture."""
    score_fn, mask_fn = (
        _function(program, constants) if isinstance(program, Program) else None
        for program, constants in zip((call.score_fn, call.mask_fn), captured, strict=True)
    )
    return call._replace(score_fn=score_fn, mask_fn=mask_fn)


def _function(program: Program, constants: Sequence[Any]) -> Callable[..., jax.Array]:
    """A program of one pair as a function of arrays of rank 4. Of what it does not read it has no axes."""
    jaxpr = program.jaxpr
    read = {x for eqn in jaxpr.eqns for x in eqn.invars if not isinstance(x, Literal)}

    def one(*numbers: jax.Array) -> jax.Array:
        return jax.core.eval_jaxpr(jaxpr, constants, *(x.reshape(1, 1, 1, 1) for x in numbers))[0].reshape(())

    def function(*arrays: jax.Array) -> jax.Array:
        is_score = len(arrays) == 5
        arrays = tuple(
            x if var in read or (is_score and not n) else x[:1, :1, :1, :1]
            for n, (x, var) in enumerate(zip(arrays, jaxpr.invars, strict=True))
        )
        shape = np.broadcast_shapes(*(x.shape for x in arrays))
        mapped = one
        for axis in (3, 2, 1, 0):  # axes of size 1 are left out; of the others the first is always the next
            if shape[axis] > 1:
                mapped = jax.vmap(mapped, tuple(0 if x.shape[axis] > 1 else None for x in arrays))
        return mapped(*(x.reshape([n for n in x.shape if n > 1]) for x in arrays)).reshape(shape)

    return function


def _alike(a: Jaxpr, b: Jaxpr) -> bool:
    """Whether two programs are one but for the names of their variables."""
    names: dict[Any, Any] = {}

    def named(xs: Sequence[Any], ys: Sequence[Any]) -> bool:
        names.update(zip(xs, ys, strict=False))
        return len(xs) == len(ys) and all(x.aval == y.aval for x, y in zip(xs, ys, strict=True))

    def same(xs: Sequence[Any], ys: Sequence[Any]) -> bool:
        return len(xs) == len(ys) and all(
            x.aval == y.aval and (np.array_equal(x.val, y.val) if isinstance(y, Literal) else False)
            if isinstance(x, Literal)
            else names.get(x) is y
            for x, y in zip(xs, ys, strict=True)
        )

    return (
        named((*a.constvars, *a.invars), (*b.constvars, *b.invars))
        and len(a.eqns) == len(b.eqns)
        and all(
            x.primitive is y.primitive
            and same(x.invars, y.invars)
            and _same(x.params, y.params)
            and named(x.outvars, y.outvars)
            for x, y in zip(a.eqns, b.eqns, strict=True)
        )
        and same(a.outvars, b.outvars)
    )


def _same(a: Any, b: Any) -> bool:
    """Whether two parameters of an operation are equal; False where that cannot be told."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, ClosedJaxpr):
        return _same(a.jaxpr, b.jaxpr) and len(a.consts) == len(b.consts) and all(map(_same, a.consts, b.consts))
    if isinstance(a, Jaxpr):
        return _alike(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return not isinstance(a, (jax.Array, np.ndarray)) and (a == b) is True

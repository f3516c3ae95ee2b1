"""How the door looks at JAX and NumPy arrays, and the index arrays that the meaning is written over."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attend_shared import meaning
from attend_shared.call import FAR, Arrays, Call, Framework, dtype_of


def _device(array: Any) -> Any:
    """The one device an array is committed to; tracers, NumPy arrays, and what is spread or free to move have none."""
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer) or not array.committed:
        return None
    devices = array.devices()
    return next(iter(devices)) if len(devices) == 1 else None


def _platform(array: Any) -> str:
    return {"gpu": "cuda"}.get(platform := jax.default_backend(), platform)


FRAMEWORK = Framework(
    name="jax",
    arrays=(jax.Array, np.ndarray),
    dtype=dtype_of,  # JAX would read an array of the other byte order as one of its own
    device=_device,
    platform=_platform,
    has_float64=lambda: bool(jax.config.read("jax_enable_x64")),
    wants_gradient=lambda array: True,
    takes_int64_seed=False,
)
SHAPES = FRAMEWORK._replace(arrays=(jax.Array, np.ndarray, jax.ShapeDtypeStruct))


def to_int32(value: Any) -> Any:
    """Lengths and offsets as int32: what lies further than any array reaches may lie at that distance."""
    if isinstance(value, (int, np.integer)):
        return np.int32(min(max(int(value), -FAR), FAR))
    if value.dtype.name in ("uint32", "int64", "uint64"):
        value = value.clip(max=FAR) if value.dtype.name.startswith("uint") else value.clip(-FAR, FAR)
    return value.astype(np.int32)


def segment_ids(q_ids: Any, kv_ids: Any) -> tuple[Any, Any]:
    """Both ids in one dtype that holds their values: int64 where JAX has it and they need it, else int32."""
    wide = jax.config.read("jax_enable_x64") and any(
        x.dtype.name in ("uint32", "int64", "uint64") for x in (q_ids, kv_ids)
    )
    dtype = np.int64 if wide else np.int32
    if q_ids is kv_ids:
        q_ids = q_ids.astype(dtype)
        return q_ids, q_ids
    signed = [x.dtype.kind == "i" for x in (q_ids, kv_ids)]
    if signed[0] != signed[1]:  # an unsigned id that the dtype does not hold is no signed one
        most = np.iinfo(dtype).max
        q_ids, kv_ids = (x if s or x.dtype.itemsize < np.dtype(dtype).itemsize else x.clip(max=most)
                         for x, s in zip((q_ids, kv_ids), signed, strict=True))  # fmt: skip
    return q_ids.astype(dtype), kv_ids.astype(dtype)


def _in_shard_map() -> bool:
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def varying(arrays: Any, like: jax.Array) -> Any:
    """The same values, typed in a shard_map as varying between the devices that `like` varies between, too."""
    if not _in_shard_map():
        return arrays
    any_number = like[(slice(1),) * like.ndim].astype(jnp.float32).sum()  # 0 of an empty array
    return jax.tree.map(lambda x: jnp.where(False, any_number.astype(x.dtype), x), arrays)


def alike(arrays: Any) -> Any:
    """In a shard_map: the same values, typed as varying between all devices that any of them varies between.

    What a loop or a kernel makes of them is then typed as each of them is, and their gradients are summed over devices.
    XLA drops the choice that this is written as.
    """
    if not _in_shard_map():
        return arrays
    first = (varying(jnp.zeros(()), jax.lax.stop_gradient(x)) for x in jax.tree.leaves(arrays))
    all_of = functools.reduce(jnp.add, first)
    return varying(arrays, all_of)


def indices(call: Call) -> tuple[jax.Array, jax.Array]:
    """The indices of all queries (i,) and all keys (j,), int32."""
    return jnp.arange(call.i, dtype=jnp.int32), jnp.arange(call.j, dtype=jnp.int32)


def positions(length: int, integers: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
    """The indices up to a length, and integers to compare them with, both int32."""
    return jnp.arange(length, dtype=jnp.int32), jnp.asarray(to_int32(integers))


def allowed(call: Call, arrays: Arrays) -> jax.Array | None:
    """`meaning.allowed` for the whole call: bool, broadcastable to (b, h, i, j), or None."""
    return meaning.allowed(call, arrays, *indices(call))


def custom(
    call: Call, s: jax.Array, may: jax.Array | None, first: int | jax.Array = 0, first_key: int | jax.Array = 0
) -> tuple[jax.Array, jax.Array | None]:
    """`meaning.custom` for logits (b h n m) of all heads, and which pairs are allowed; first, first_key: of n and m."""
    b, h, query, key = (jnp.arange(n, dtype=jnp.int32) for n in s.shape)
    pairs = (b[:, None, None, None], h[None, :, None, None], (first + query)[None, None, :, None],
             (first_key + key)[None, None, None])  # fmt: skip
    return meaning.custom(FRAMEWORK, call, s, may, pairs, jnp.where)


def contains(ids: jax.Array, wanted: jax.Array) -> jax.Array:
    """Which of wanted (b, m) are among ids (b, n), in memory linear in both: bool (b, m).

    Sorted together, ids before wanted where equal, an element is present if the nearest of ids before it is its equal.
    """
    n = ids.shape[1]
    values = jnp.concatenate([ids, wanted], 1)
    order = jnp.argsort(values, 1, stable=True)
    values = jnp.take_along_axis(values, order, 1)
    place = jnp.broadcast_to(jnp.arange(order.shape[1]), order.shape)
    nearest = jax.lax.cummax(jnp.where(order < n, place, -1), 1)
    found = (jnp.take_along_axis(values, nearest.clip(0), 1) == values) & (nearest >= 0)
    return jnp.take_along_axis(found, jnp.argsort(order, 1), 1)[:, n:]


def hide(call: Call, arrays: Arrays) -> Arrays:
    """`meaning.hide` for the whole call."""
    return meaning.hide(call, arrays, *indices(call), jnp.where, contains)


def hide_rows(call: Call, arrays: Arrays, out: jax.Array) -> jax.Array:
    """0 in the rows of out (b h i dv) that q_lengths empties, which keeps their cotangents out as well."""
    rows: Any = meaning.dead_queries(call, arrays, indices(call)[0])
    return jnp.where(rows[:, None, :, None], 0, out)

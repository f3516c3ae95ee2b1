"""Attention by blocks of queries against blocks of keys, in memory linear in the lengths, on any device.

A block of queries goes over the blocks of keys that it can see, and keeps a running maximum m, a running total and a
running output; blocks that positions, segments, lengths or a key mask rule out are not visited. The way back visits
the same blocks and makes the weights again from m and total, which say what lse cannot when its ulp is large.

References:
    Milakov, Gimelshein: Online normalizer calculation for softmax (2018). Rabe, Staats: Self-attention does not need
    O(n^2) memory (2021). Dao, Fu, Ermon, Rudra, Ré: FlashAttention (2022).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attend_jax import philox
from attend_jax.arrays import hide, hide_rows, varying
from attend_jax.implementations import einsum, rowwise
from attend_shared import blocks, meaning
from attend_shared.blocks import Blocks, Seen
from attend_shared.call import Arrays, Call

Array = jax.Array
ROUNDINGS = 4  # of a product of two vectors, by which dp and delta may differ where they are equal by mathematics


def unavailable() -> str | None:
    """None: it can always run."""
    return None


def refusal(call: Call) -> str | None:
    """None: it serves every call."""
    return None


def attend(call: Call, arrays: Arrays) -> tuple[Array, Array]:
    """out (b h i dv) in q's dtype, and lse (b h i) in the accumulation dtype.

    Differentiable in reverse any number of times; `rowwise` has forward mode too.
    """
    if call.is_empty:
        return einsum.attend(call, arrays)
    if call.custom:
        return rowwise.attend(call, arrays)
    arrays = hide(call, arrays)
    floats = Floats(arrays.q, arrays.k, arrays.v, arrays.bias, arrays.sinks)
    out, lse = _attend(call, floats, arrays._replace(q=None, k=None, v=None, bias=None, sinks=None))
    return hide_rows(call, arrays, out) if call.q_lengths else out, lse


class Floats(NamedTuple):
    """What has a derivative."""

    q: Any
    k: Any
    v: Any
    bias: Any
    sinks: Any


def _attend(call: Call, floats: Floats, data: Arrays) -> tuple[Array, Array]:
    return _results(call, floats, data, *_forward(call, *lax.stop_gradient((floats, data))))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _results(call: Call, floats: Floats, data: Arrays, out: Array, m: Array, total: Array) -> tuple[Array, Array]:
    """out and lse, which are functions of floats, of what the way forward kept, which is not."""
    return out.astype(floats.q.dtype), _lse(m, total)


def _results_fwd(call: Call, *given: Any) -> tuple:
    """Itself, and not what it does: where a gradient is differentiated, so is this."""
    return _results(call, *given), given


def _results_bwd(call: Call, saved: tuple, cotangents: tuple) -> tuple:
    return _gradients(call, *saved, *cotangents), None, None, None, None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(
    call: Call, floats: Floats, data: Arrays, out: Array, m: Array, total: Array, dout: Array, dlse: Array
) -> Floats:
    return _backward(call, floats, data, out, m, total, dout, dlse)


def _gradients_fwd(
    call: Call, floats: Floats, data: Arrays, out: Array, m: Array, total: Array, dout: Array, dlse: Array
) -> tuple:
    return _gradients(call, floats, data, out, m, total, dout, dlse), (floats, data, dout, dlse)


def _gradients_bwd(call: Call, saved: tuple, cotangents: Floats) -> tuple:
    """Second derivatives are those of the same attention by rows: out, m and total are functions of floats there."""
    floats, data, dout, dlse = saved

    def gradients(floats: Floats, dout: Array, dlse: Array) -> Floats:
        return jax.vjp(lambda floats: rowwise.rows(call, data._replace(**floats._asdict())), floats)[1]((dout, dlse))[0]

    dfloats, ddout, ddlse = jax.vjp(gradients, floats, dout, dlse)[1](cotangents)
    return dfloats, None, None, None, None, ddout, ddlse


_results.defvjp(_results_fwd, _results_bwd)
_gradients.defvjp(_gradients_fwd, _gradients_bwd)


def _lse(m: Array, total: Array) -> Array:
    return jnp.where(total == 0, -jnp.inf, m + jnp.log(jnp.where(total == 0, 1, total)))


class _Tiles:
    """The blocks of one call: how they are cut, what they hold, which of them a block of queries visits."""

    def __init__(self, call: Call, floats: Floats, data: Arrays) -> None:
        self.call, self.bias, self.data = call, floats.bias, data
        self.wide = jnp.dtype(call.accumulation)
        self.group = call.h // call.hk
        # The finer the blocks, the more is skipped; the larger, the less every operation weighs.
        self.queries = blocks.cut(call.i, 1 if call.positional or call.segments else 2)
        self.keys = blocks.cut(call.j, multiple=4)  # dropout draws keys by fours
        # Products of bfloat16 are exact in float32, in which they are summed. float16 would lose small gradients.
        self.factor = jnp.dtype(call.dtype) if call.dtype == "bfloat16" else self.wide
        # What out loses by weights so short would show in the gradient of a bias or of sinks that are not.
        others = [x.dtype for x in (floats.bias, floats.sinks) if x is not None]
        self.weight = self.factor if all(dtype == self.factor for dtype in others) else self.wide
        # What logits are still to be multiplied by: the largest can be taken first where nothing is added to them. Not
        # by what is 0 in their dtype: those of -inf would be NaN.
        apart = call.softcap is None and floats.bias is None and call.scale >= jnp.finfo(self.wide).tiny
        self.unit = call.scale if apart else 1.0
        self.q = _pad(floats.q, self.queries).reshape(call.b * call.hk, self.group, self.queries.padded, call.d)
        self.k = _pad(floats.k, self.keys).reshape(call.b * call.hk, self.keys.padded, call.d)
        self.v = _pad(floats.v, self.keys).reshape(call.b * call.hk, self.keys.padded, call.dv)
        first = jnp.arange(self.keys.count, dtype=jnp.int32) * self.keys.size
        self.key_blocks = Seen(first, jnp.minimum(first + self.keys.size, call.j) - 1)
        self.all_visible = not (
            call.positional or call.segments or call.q_lengths or call.kv_lengths or call.key_masked
        )
        if call.segments:
            self.q_ids = jnp.pad(data.q_segment_ids, ((0, 0), (0, self.queries.padded - call.i)), mode="edge")
            self.kv_ids = jnp.pad(data.kv_segment_ids, ((0, 0), (0, self.keys.padded - call.j)), mode="edge")
        if call.key_masked:
            mask = jnp.pad(data.mask[:, 0, 0, :], ((0, 0), (0, self.keys.padded - data.mask.shape[3])), mode="edge")
            self.some_key = mask.reshape(mask.shape[0], self.keys.count, self.keys.size).any(-1)  # (b|1, count)

    def rows(self, block: Array) -> Array:
        """The indices of the queries of a block."""
        return block * self.queries.size + jnp.arange(self.queries.size, dtype=jnp.int32)

    def columns(self, block: Array) -> Array:
        """The indices of the keys of a block."""
        return block * self.keys.size + jnp.arange(self.keys.size, dtype=jnp.int32)

    def visits(self, item: Array, block: Array) -> tuple[Array, Array]:
        """How many blocks of keys a block of queries of a batch item visits, and which: (), (count,)."""
        call, count = self.call, self.keys.count
        if self.all_visible:
            return jnp.int32(count), jnp.arange(count, dtype=jnp.int32)
        one = self.item(item, self.rows(block))
        queries = Seen(block * self.queries.size, jnp.minimum((block + 1) * self.queries.size, call.i) - 1)
        keys = self.key_blocks
        if call.segments:
            ids = self.kv_ids[item].reshape(count, self.keys.size)
            queries = queries._replace(low_id=one.q_segment_ids.min(), high_id=one.q_segment_ids.max())
            keys = keys._replace(low_id=ids.min(1), high_id=ids.max(1))
        if call.q_lengths:
            queries = queries._replace(length=one.q_lengths[0])
        if call.kv_lengths:
            keys = keys._replace(length=one.kv_lengths[0])
        offset = meaning.offset_of(call, one) if call.positional else 0
        some = blocks.visible(call, offset.reshape(()) if isinstance(offset, Array) else offset, queries, keys)
        if call.key_masked:
            some = some & self.some_key[item if self.some_key.shape[0] > 1 else 0]
        return some.sum(dtype=jnp.int32), jnp.nonzero(some, size=count, fill_value=0)[0].astype(jnp.int32)

    def item(self, item: Array, rows: Array, columns: Array | None = None) -> Arrays:
        """The integers of one batch item, as arrays of a batch of one, their segment ids those of rows and columns."""
        call, data = self.call, self.data

        def pick(x: Array) -> Array:
            return lax.dynamic_slice_in_dim(x, item, 1)

        offset = data.q_offset
        if offset is not None and offset.ndim:
            offset = pick(offset)
        return Arrays(
            None, None, None, q_offset=offset,
            q_segment_ids=pick(self.q_ids)[:, rows] if call.segments else None,
            kv_segment_ids=pick(self.kv_ids)[:, columns] if call.segments and columns is not None else None,
            q_lengths=pick(data.q_lengths) if call.q_lengths else None,
            kv_lengths=pick(data.kv_lengths) if call.kv_lengths else None,
        )  # fmt: skip

    def of_pairs(self, x: Array, item: Array, head: Array, block: Array, key_block: Array) -> Array:
        """A block of a mask or bias (b|1, h|1, i|1, j|1): (queries or 1, keys or 1).

        Nothing is padded but the block: one that reaches over the end is read from the end, and moved.
        """
        start = [item if x.shape[0] > 1 else np.int32(0), head if x.shape[1] > 1 else np.int32(0)]
        sizes, moves, padding = [1, 1], [], []
        for length, at, cut in ((x.shape[2], block, self.queries), (x.shape[3], key_block, self.keys)):
            size = 1 if length == 1 else min(cut.size, length)
            start.append(jnp.int32(0) if length == 1 else jnp.minimum(at * cut.size, length - size))
            moves.append(None if length == 1 or cut.padded == length else start[-1] - at * cut.size)
            padding.append((0, 0 if length == 1 else cut.size - size))
            sizes.append(size)
        x = lax.dynamic_slice(x, start, sizes)[0, 0]
        for axis, move in enumerate(moves):
            x = x if move is None else jnp.roll(x, move, axis)
        return jnp.pad(x, padding)

    def logits(
        self, item: Array, head: Array, block: Array, q: Array, key_block: Array, k: Array
    ) -> tuple[Array, Array | None]:
        """The logits of a block over `unit`, -inf where not allowed, and for the way back tanh of the softcap."""
        call, capped = self.call, None
        s = self.dot(q, k, 1, 1)
        if call.softcap is not None:
            capped = jnp.tanh(s * call.scale / call.softcap)
            s = call.softcap * capped
        elif self.unit == 1:
            s = einsum.times(s, call.scale)
        rows, columns = self.rows(block), self.columns(key_block)
        may = None
        if call.masked:
            may = meaning.structured(call, self.item(item, rows, columns), rows, columns)
            may = None if may is None else may[0, 0]
        if call.mask is not None:
            may = meaning.both(may, self.of_pairs(self.data.mask, item, head, block, key_block))
        if self.bias is not None:
            bias = self.of_pairs(self.bias, item, head, block, key_block).astype(self.wide)
            s = s + bias
            may = meaning.both(may, bias != -jnp.inf)
        if self.keys.padded != call.j:
            may = meaning.both(may, (columns < call.j)[None])
        return (s if may is None else jnp.where(may, s, -jnp.inf)), capped

    def dot(self, a: Array, b: Array, axis_a: int, axis_b: int, factor: np.dtype | None = None) -> Array:
        """The product over these axes, of factors in `factor`, summed in the accumulation dtype."""
        a, b = (x.astype(factor or self.factor) for x in (a, b))
        axes = (((axis_a,), (axis_b,)), ((), ()))
        return lax.dot_general(a, b, axes, precision=einsum.HIGHEST, preferred_element_type=self.wide)

    def keep(self, item: Array, head: Array, block: Array, key_block: Array) -> Array:
        """What dropout multiplies the weights of a block by: 0 or 1 / (1 - dropout)."""
        quads = key_block * (self.keys.size // 4) + jnp.arange(self.keys.size // 4, dtype=jnp.int32)
        kept = philox.keep_block(self.data.dropout_seed, item, head, self.rows(block), quads, self.call.dropout)
        return jnp.where(kept, jnp.asarray(1 / (1 - self.call.dropout), self.wide), 0)


def _pad(x: Array, cut: Blocks) -> Array:
    """Zeros behind axis 2 up to the end of the last block."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, cut.padded - x.shape[2]), (0, 0))) if cut.padded != x.shape[2] else x


def _each(function: Any, inputs: Any) -> Any:
    """`lax.map`: one after the other on a CPU, where products of two axes are the fastest, all at once elsewhere."""
    return lax.map(function, inputs) if jax.default_backend() == "cpu" else jax.vmap(function)(inputs)


def _forward(call: Call, floats: Floats, data: Arrays) -> tuple[Array, Array, Array]:
    """out (b h i dv), not yet rounded, and (b h i) m, a row's largest logit, and total, its sum of exp(s - m)."""
    tiles = _Tiles(call, floats, data)
    queries, keys, wide = tiles.queries, tiles.keys, tiles.wide
    sinks = jnp.full(call.h, -jnp.inf, wide) if floats.sinks is None else floats.sinks.astype(wide)

    def of_head(inputs: tuple) -> tuple:
        n, q, k, v = inputs  # (), (group, i, d), (j, d), (j, dv)
        item = n // call.hk

        def of_block(turn: Array) -> tuple:
            member, block = turn // queries.count, turn % queries.count
            head = n % call.hk * tiles.group + member
            at = member, block * queries.size, np.int32(0)
            rows = lax.dynamic_slice(q, at, (1, queries.size, call.d))[0]
            count, which = tiles.visits(item, block)

            def visit(turn: Array, state: tuple) -> tuple:
                m, total, out = state
                key_block = which[turn]
                k_block = lax.dynamic_slice_in_dim(k, key_block * keys.size, keys.size)
                v_block = lax.dynamic_slice_in_dim(v, key_block * keys.size, keys.size)
                s, _ = tiles.logits(item, head, block, rows, key_block, k_block)
                top = jnp.maximum(m, s.max(1) * tiles.unit)
                shift = jnp.where(top == -jnp.inf, 0, top)
                p = jnp.exp(einsum.times(s, tiles.unit) - shift[:, None])
                shrink = jnp.exp(m - shift)
                total = total * shrink + p.sum(1)
                if call.dropout:
                    p = p * tiles.keep(item, head, block, key_block)
                return top, total, out * shrink[:, None] + tiles.dot(p, v_block, 1, 0, tiles.weight)

            m = jnp.broadcast_to(sinks[head], (queries.size,))
            start = m, jnp.where(m == -jnp.inf, 0, jnp.ones_like(m)), jnp.zeros((queries.size, call.dv), wide)
            m, total, out = lax.fori_loop(0, count, visit, varying(start, rows))
            return out / jnp.where(total == 0, 1, total)[:, None], m, total

        return _each(of_block, jnp.arange(tiles.group * queries.count, dtype=jnp.int32))

    heads = jnp.arange(call.b * call.hk, dtype=jnp.int32)
    out, m, total = _each(of_head, (heads, tiles.q, tiles.k, tiles.v))
    out, m, total = (x.reshape(call.b, call.h, queries.padded, *x.shape[3:])[:, :, : call.i] for x in (out, m, total))
    return out, m, total


def _backward(
    call: Call, floats: Floats, data: Arrays, out: Array, m: Array, total: Array, dout: Array, dlse: Array
) -> Floats:
    """The gradients of a call from what its way forward kept."""
    tiles = _Tiles(call, floats, data)
    queries, keys, wide = tiles.queries, tiles.keys, tiles.wide
    shape = (call.b * call.hk, tiles.group, queries.padded)
    dlse = jnp.where(total == 0, 0, dlse)
    terms = out * dout.astype(wide)
    slope = dlse - terms.sum(-1)  # what every logit of a row gets besides its own share
    log_total = jnp.log(jnp.where(total == 0, 1, total))

    def lay_out(x: Array) -> Array:
        return _pad(x if x.ndim == 4 else x[..., None], queries).reshape(*shape, -1)

    shift = jnp.where(m == -jnp.inf, 0, m)
    facts = [shift, log_total, slope]
    # A row of a single key has dp = delta, and they cancel but for the rounding of each. Where total is 1 to the last
    # bit, what is below the rounding of such a product is put to 0; elsewhere the bound is below 0.
    single = call.masked or floats.bias is not None or call.j == 1
    if single:
        bound = ROUNDINGS * jnp.finfo(wide).eps * (jnp.abs(terms).sum(-1) + jnp.abs(dlse))
        facts += [dlse, jnp.where(total == 1, bound, -1)]
    stats = lay_out(jnp.stack(facts, -1))
    dout = lay_out(dout)
    dbias = None
    if floats.bias is not None:
        sizes = [x if x == 1 else cut.padded for x, cut in zip(floats.bias.shape[2:], (queries, keys), strict=True)]
        dbias = jnp.zeros((*floats.bias.shape[:2], *sizes), wide)

    def of_head(dbias: Array | None, inputs: tuple) -> tuple:
        n, q, k, v, dout, stats = inputs  # as in _forward, dout as q, stats (group, i, facts)
        item = n // call.hk

        def of_block(state: tuple, turn: Array) -> tuple:
            member, block = turn // queries.count, turn % queries.count
            head = n % call.hk * tiles.group + member

            def rows_of(x: Array) -> Array:
                return lax.dynamic_slice(x, (member, block * queries.size, np.int32(0)), (1, queries.size, x.shape[2]))[
                    0
                ]

            rows, do, (shift, log_total, slope, *lone) = rows_of(q), rows_of(dout), rows_of(stats).T[..., None]
            count, which = tiles.visits(item, block)

            def visit(turn: Array, state: tuple) -> tuple:
                dk, dv, dbias, dq = state
                key_block = which[turn]
                k_block = lax.dynamic_slice_in_dim(k, key_block * keys.size, keys.size)
                v_block = lax.dynamic_slice_in_dim(v, key_block * keys.size, keys.size)
                s, capped = tiles.logits(item, head, block, rows, key_block, k_block)
                p = jnp.exp(einsum.times(s, tiles.unit) - shift - log_total)
                dp = tiles.dot(do, v_block, 1, 1)
                weights = p
                if call.dropout:
                    keep = tiles.keep(item, head, block, key_block)
                    weights, dp = p * keep, dp * keep
                dp = dp + slope
                if single:
                    own, bound = lone
                    dp = jnp.where(jnp.abs(dp - own) <= bound, own, dp)
                ds = p * dp
                if dbias is not None:
                    dbias = _add_block(dbias, tiles, item, head, block, key_block, ds)
                if capped is not None:
                    ds = ds * (1 - capped) * (1 + capped)
                dk = _add(dk, tiles.dot(rows, ds, 0, 0), key_block)
                dv = _add(dv, tiles.dot(do, weights, 0, 0), key_block)
                return dk, dv, dbias, dq + tiles.dot(ds, k_block, 1, 0)

            dq = varying(jnp.zeros((queries.size, call.d), wide), rows)
            *state, dq = lax.fori_loop(0, count, visit, (*state, dq))
            return tuple(state), (dq * call.scale).astype(floats.q.dtype)

        # Transposed, since products whose result has many columns and few rows are twice as fast on a CPU.
        empty = (jnp.zeros((keys.count, size, keys.size), wide) for size in (call.d, call.dv))
        turns = jnp.arange(tiles.group * queries.count, dtype=jnp.int32)
        start: Any = (*varying(tuple(empty), q), dbias)
        swept: Any = lax.scan(of_block, start, turns)
        (dk, dv, dbias), dq = swept
        return dbias, (dq, (dk * call.scale).astype(floats.k.dtype), dv.astype(floats.v.dtype))

    heads = jnp.arange(call.b * call.hk, dtype=jnp.int32)
    inputs = heads, tiles.q, tiles.k, tiles.v, dout, stats
    if dbias is None:
        dq, dk, dv = _each(lambda inputs: of_head(None, inputs)[1], inputs)
    else:  # heads in turn, since they may add to the same bias
        dbias, (dq, dk, dv) = lax.scan(of_head, varying(dbias, floats.q), inputs)
    dq = dq.reshape(call.b, call.h, queries.padded, call.d)[:, :, : call.i]
    dk, dv = (x.swapaxes(2, 3).reshape(call.b, call.hk, keys.padded, -1)[:, :, : call.j] for x in (dk, dv))
    if dbias is not None and floats.bias is not None:
        dbias = dbias[:, :, : floats.bias.shape[2], : floats.bias.shape[3]].astype(floats.bias.dtype)
    dsinks = None
    if floats.sinks is not None:
        weight = jnp.exp(floats.sinks.astype(wide)[None, :, None] - shift - log_total)  # (b h i)
        dsinks = (weight * slope).sum((0, 2)).astype(floats.sinks.dtype)
    return Floats(dq, dk, dv, dbias, dsinks)


def _add(x: Array, block: Array, at: Array) -> Array:
    return lax.dynamic_update_index_in_dim(x, lax.dynamic_index_in_dim(x, at, 0, False) + block, at, 0)


def _add_block(
    dbias: Array, tiles: _Tiles, item: Array, head: Array, block: Array, key_block: Array, ds: Array
) -> Array:
    """A block of logits' gradients added to the bias's, summed over the axes along which the bias is broadcast."""
    b, h, i, j = dbias.shape
    ds = ds.sum(0, keepdims=True) if i == 1 else ds
    ds = ds.sum(1, keepdims=True) if j == 1 else ds
    starts = item, head, block * tiles.queries.size, key_block * tiles.keys.size
    zero = np.int32(0)  # a plain 0 would be of 64 bits where there are any
    at = [start if size > 1 else zero for start, size in zip(starts, (b, h, i, j), strict=True)]
    return lax.dynamic_update_slice(dbias, lax.dynamic_slice(dbias, at, (1, 1, *ds.shape)) + ds[None, None], at)

"""Attention by blocks of queries against blocks of keys, in memory linear in the lengths, on any device.

A block of queries goes over the blocks of keys that it can see, and keeps a running maximum m, a running total and a
running output; blocks that positions, segments, lengths or a key mask rule out are not visited. The way back visits
the same blocks and makes the weights again from m and total, which say what lse cannot when its ulp is large.

Both ways are operators of their own: a compiler takes them whole, and inside them nothing records a graph, so that
tiles of logits are made in place, in the same few buffers.

References:
    Milakov, Gimelshein: Online normalizer calculation for softmax (2018). Rabe, Staats: Self-attention does not need
    O(n^2) memory (2021). Dao, Fu, Ermon, Rudra, Ré: FlashAttention (2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from attend_shared import blocks, meaning
from attend_shared import philox as numpy_philox
from attend_shared.blocks import Blocks, Seen
from attend_shared.call import Arrays, Call, check
from attend_torch import philox
from attend_torch.arrays import FRAMEWORK, hide, hide_rows
from attend_torch.implementations import einsum, rowwise

Tensor = torch.Tensor
LOG2E = math.log2(math.e)
COUNTERS = 2**14  # of dropout's words, drawn at once
ROUNDINGS = 4  # of a product of two vectors, by which dp and delta may differ where they are equal by mathematics
PATTERNS = 16  # tiles cut by position that are kept to be used again


def unavailable() -> str | None:
    """None: it can always run."""
    return None


def refusal(call: Call) -> str | None:
    """Why it cannot serve this call, or None."""
    return rowwise.refusal(call)


def attend(call: Call, arrays: Arrays) -> tuple[Tensor, Tensor]:
    """out (b h i dv) in q's dtype, and lse (b h i) in the accumulation dtype.

    Differentiable any number of times, forward and reverse; all but first derivatives in reverse are `rowwise`'s.
    """
    if call.is_empty:
        return einsum.attend(call, arrays)
    if call.custom:
        return rowwise.attend(call, arrays)
    arrays = hide(call, arrays)
    offset = 0
    if call.positional and not isinstance(arrays.q_offset, Tensor):
        offset = {"zero": 0, "end": call.j - call.i, "data": arrays.q_offset}[call.offset]
        arrays = arrays._replace(q_offset=None)
    options = call.left, call.right, offset, call.scale, call.softcap, call.dropout
    if torch.compiler.is_compiling():  # it takes the operator whole, with its first derivatives
        out, lse, _, _ = torch.ops.attend_torch.blockwise(*arrays, *options)
    else:
        out, lse, _, _ = _Attend.apply(options, *arrays)
    out = out.to(arrays.q.dtype)
    return hide_rows(call, arrays, out) if call.q_lengths else out, lse


COUNT = len(Arrays._fields)
FLOATS = tuple(Arrays._fields.index(name) for name in ("q", "k", "v", "bias", "sinks"))  # what has a derivative


class _Attend(torch.autograd.Function):
    """(options, *arrays) -> out, lse, m, total."""

    @staticmethod
    def forward(options: tuple, *arrays: Any) -> tuple[Tensor, ...]:
        return torch.ops.attend_torch.blockwise(*arrays, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        options, *arrays = inputs
        ctx.mark_non_differentiable(*output[2:])
        _keep(ctx, (*arrays, *options), output)
        ctx.save_for_forward(*arrays)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor, *_: Any) -> tuple:
        wanted = ctx.needs_input_grad
        gradients = _Gradients.apply(wanted[1 + FLOATS[3]], ctx.options, *ctx.saved_tensors, dout, dlse)
        return _among(1 + COUNT, gradients, [1 + place for place in FLOATS], wanted)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> tuple:
        function, places, floats = _answer(ctx)
        along = [rowwise.filled(tangents[place], x) for place, x in zip(places, floats, strict=True)]
        return *rowwise.pushed(function, floats, along), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        return rowwise.each_lane(_Attend.apply, info, in_dims, inputs)


class _Gradients(torch.autograd.Function):
    """(whether dbias is wanted, options, *arrays, out, m, total, dout, dlse) -> dq, dk, dv, dbias, dsinks."""

    @staticmethod
    def forward(wants_bias: bool, options: tuple, *inputs: Any) -> tuple[Tensor, ...]:
        return torch.ops.attend_torch.blockwise_gradients(*inputs, wants_bias, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.wants_bias, ctx.options, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        function, given, places, inputs = _pullback(ctx)
        gradients = torch.func.vjp(function, *inputs)[1](tuple(cotangents[FLOATS.index(place)] for place in given))
        behind = 2 + COUNT + 3  # wants_bias, options, arrays, and what is saved
        places = [behind, behind + 1, *(2 + place for place in places)]
        return _among(behind + 2, gradients, places, ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, _wants: Any, _options: Any, *tangents: Any) -> tuple:
        function, given, places, inputs = _pullback(ctx)
        along = [rowwise.filled(tangents[n], x) for n, x in zip((COUNT + 3, COUNT + 4, *places), inputs, strict=True)]
        pushed = dict(zip(given, rowwise.pushed(function, inputs, along), strict=True))
        return tuple(pushed[place] if place in pushed else inputs[0].new_zeros(0) for place in FLOATS)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        return rowwise.each_lane(_Gradients.apply, info, in_dims, inputs)


def _answer(ctx: Any) -> tuple[Callable, list[int], list[Tensor]]:
    """The same attention by rows, as a function of what has a derivative: it, the places of its arguments, and them.

    Second derivatives and those forward are taken of it, where out, m and total are functions of the arrays.
    """
    call, arrays = canonical(ctx.saved_tensors[:COUNT], *ctx.options)
    places = [place for place in FLOATS if arrays[place] is not None]

    def function(*floats: Tensor) -> tuple[Tensor, Tensor]:
        names = (Arrays._fields[place] for place in places)
        out, lse = rowwise.rows(call, arrays._replace(**dict(zip(names, floats, strict=True))))
        return out.to(lse.dtype), lse

    return function, places, [arrays[place] for place in places]


def _pullback(ctx: Any) -> tuple[Callable, list[int], list[int], list[Tensor]]:
    """The gradients of `_answer`, as a function of (dout, dlse, *floats), with the places of those that are given."""
    answer, places, floats = _answer(ctx)
    given = [place for place in places if place != FLOATS[3] or ctx.wants_bias]

    def function(dout: Tensor, dlse: Tensor, *floats: Tensor) -> tuple[Tensor, ...]:
        gradients = dict(zip(places, torch.func.vjp(answer, *floats)[1]((dout, dlse)), strict=True))
        return tuple(gradients[place] for place in given)

    return function, given, places, [*ctx.saved_tensors[-2:], *floats]


def _among(count: int, values: Sequence[Any], places: Sequence[int], wanted: Sequence[bool]) -> tuple:
    """The values at their places of `count`, where they are wanted; None elsewhere."""
    result = [None] * count
    for place, value in zip(places, values, strict=True):
        result[place] = value if wanted[place] else None
    return tuple(result)


def canonical(
    arrays: Sequence[Tensor | None], left: int | None, right: int | None, offset: int, scale: float,
    softcap: float | None, dropout: float,
) -> tuple[Call, Arrays]:  # fmt: skip
    """The call that these arrays and options are, its offset an int or a tensor among the arrays."""
    data = Arrays(*arrays)
    call = check(
        FRAMEWORK, data._replace(q_offset=None, dropout_seed=None), False, None, softcap, scale, 0.0, True, "bhnd", None
    )
    call = call._replace(left=left, right=right, offset="data", dropout=dropout)
    return call, data if data.q_offset is not None else data._replace(q_offset=offset)


# The operators: blockwise(*arrays, *options), and blockwise_gradients(*arrays, *saved, wants_bias, *options).


def _attend(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out (b h i dv), lse, m and total (b h i), all in the accumulation dtype.

    m is the largest logit of a row, sink included, in units of `_Tiles.unit`; total is the sum of exp(s - m).
    """
    with torch.autocast(inputs[0].device.type, enabled=False):
        return _forward(*canonical(inputs[:COUNT], *inputs[COUNT:]))


def _attend_fake(q: Tensor, _: Tensor, v: Tensor, *__: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, lse, m, total = (q.new_empty((*q.shape[:3], *size), dtype=wide) for size in ((v.shape[3],), (), (), ()))
    return out, lse, m, total


def _gradients(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dbias and dsinks, the last two of shape (0,) where there are none or they are not wanted."""
    with torch.autocast(inputs[0].device.type, enabled=False):  # a caller may go backward inside it
        return _backward(*canonical(inputs[:COUNT], *inputs[COUNT + 6 :]), *inputs[COUNT : COUNT + 6])


def _gradients_fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    data, wants_bias = Arrays(*inputs[:COUNT]), inputs[COUNT + 5]
    nothing = data.q.new_empty(0)
    dq, dk, dv = (x.new_empty(x.shape) for x in (data.q, data.k, data.v))
    dbias = data.bias.new_empty(data.bias.shape) if wants_bias else nothing
    return dq, dk, dv, dbias, nothing if data.sinks is None else data.sinks.new_empty(data.sinks.shape)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    """What the way back needs."""
    out, _, m, total = output
    ctx.options = tuple(inputs[COUNT:])
    ctx.save_for_backward(*inputs[:COUNT], out, m, total)


def _derive(ctx: Any, dout: Tensor, dlse: Tensor, *_: Any) -> tuple:
    """First derivatives of the operator."""
    wanted = ctx.needs_input_grad
    gradients = _Gradients.forward(wanted[FLOATS[3]], ctx.options, *ctx.saved_tensors, dout, dlse)
    return _among(COUNT + len(ctx.options), gradients, FLOATS, wanted)


ARRAYS = ", ".join(f"Tensor{'' if name in 'qkv' else '?'} {name}" for name in Arrays._fields)
_SAVED = "Tensor out, Tensor m, Tensor total, Tensor dout, Tensor dlse, bool wants_bias"
OPTIONS = "SymInt? left, SymInt? right, SymInt offset, float scale, float? softcap, float dropout"
_LIBRARY = torch.library.Library("attend_torch", "FRAGMENT")
_LIBRARY.define(f"blockwise({ARRAYS}, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)")
_LIBRARY.define(f"blockwise_gradients({ARRAYS}, {_SAVED}, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
for _name, _function, _fake in (
    ("blockwise", _attend, _attend_fake),
    ("blockwise_gradients", _gradients, _gradients_fake),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attend_torch::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("attend_torch::blockwise", _derive, setup_context=_keep, lib=_LIBRARY)


class _Slab(NamedTuple):
    """The heads that are computed at once: all of some items, or some of one item."""

    items: slice
    kv_heads: slice
    heads: slice
    n: int  # items times key/value heads


class _Tile(NamedTuple):
    """A block of queries against a block of keys, of a slab.

    Attributes:
        rows, columns: the queries and the keys.
        placed, free: whether positions, and whether all else, let every query see every key, as far as is known.
    """

    slab: _Slab
    rows: slice
    columns: slice
    placed: bool
    free: bool


def _width(tile: _Tile) -> int:
    return tile.columns.stop - tile.columns.start


class _Tiles:
    """The blocks of one call: how they are cut, what they hold, which of them a block of queries visits.

    Arrays of a slab are (n, rows, ...), its items and key/value heads in one axis, and the queries of all heads that
    share a key/value head in the other: so that a tile is one matrix product, or a few of them.
    """

    def __init__(self, call: Call, data: Arrays) -> None:
        self.call, self.data = call, data
        self.wide = getattr(torch, call.accumulation)
        self.group = call.h // call.hk
        self.on_cpu = call.platform == "cpu"  # there data may be read: elsewhere that would wait for the device
        # exp2 is several times as fast as exp where weights vanish. What a caller adds may be as low as numbers go:
        # there logits stay themselves until the largest is taken off.
        plain = data.bias is None and data.sinks is None and self.wide != torch.float64
        self.unit = LOG2E if plain else 1.0
        self.lowest = torch.finfo(self.wide).min
        # The finer the blocks, the more is skipped; the larger, the less every operation weighs.
        block = blocks.BLOCK
        coarse = 1 if call.positional or call.segments else 2
        self.queries = _cut(call.i, max(1, coarse * block // self.group) if self.on_cpu else block)
        self.keys = _cut(call.j, block, 4)  # dropout draws keys by fours
        # How many neighbouring blocks of keys may be one tile, by the logits that it then has: on a CPU heads come one
        # by one where they are large, elsewhere all at once.
        rows, lanes = self.group * self.queries.size, call.b * call.hk
        most = (4 if self.on_cpu else 512) * block**2
        self.joined = max(1, most // (rows * self.keys.size * (1 if self.on_cpu else lanes)))
        self.slabs = self._slabs(max(1, most // (rows * min(call.j, self.joined * self.keys.size))))
        self.buffers: dict[str, Tensor] = {}
        self.patterns: dict[tuple[int, int, int], Tensor] = {}
        self.seed = data.dropout_seed.tolist() if call.dropout and self.on_cpu else None
        self._look()

    def _slabs(self, lanes: int) -> list[_Slab]:
        call, group = self.call, self.group
        items = _cut(call.b, max(1, lanes // call.hk))
        heads = _cut(call.hk, min(call.hk, lanes))
        starts = ((at * items.size, n * heads.size) for at in range(items.count) for n in range(heads.count))
        slabs = []
        for item, head in starts:
            end, stop = min(call.b, item + items.size), min(call.hk, head + heads.size)
            n = (end - item) * (stop - head)
            slabs.append(_Slab(slice(item, end), slice(head, stop), slice(head * group, stop * group), n))
        return slabs

    def _look(self) -> None:
        """Which blocks of queries may see which blocks of keys: some, placed and free, bool (b, queries, keys)."""
        call, data = self.call, self.data
        queries, keys = self.queries, self.keys
        i, j = (torch.arange(n.count, device="cpu") * n.size for n in (queries, keys))
        of_i = Seen(i[:, None], (i + queries.size).clamp(max=call.i)[:, None] - 1)
        of_j = Seen(j, (j + keys.size).clamp(max=call.j) - 1)
        offset = data.q_offset
        known = call._replace(segments=False, q_lengths=False, kv_lengths=False)
        if isinstance(offset, Tensor):
            known = known if self.on_cpu else known._replace(left=None, right=None)
            offset = offset.reshape(-1, 1, 1) if self.on_cpu else 0
        if self.on_cpu:
            known = known._replace(segments=call.segments, q_lengths=call.q_lengths, kv_lengths=call.kv_lengths)
            if call.segments:
                low, high = _extremes(data.q_segment_ids, queries)
                of_i = of_i._replace(low_id=low[:, :, None], high_id=high[:, :, None])
                low, high = _extremes(data.kv_segment_ids, keys)
                of_j = of_j._replace(low_id=low[:, None], high_id=high[:, None])
            if call.q_lengths:
                of_i = of_i._replace(length=data.q_lengths[:, None, None])
            if call.kv_lengths:
                of_j = of_j._replace(length=data.kv_lengths[:, None, None])
        some = blocks.visible(known, offset, of_i, of_j)
        placed = covered(known._replace(segments=False, q_lengths=False, kv_lengths=False), offset, of_i, of_j)
        free = covered(known._replace(left=None, right=None), offset, of_i, of_j)
        if call.key_masked and self.on_cpu:
            parts = data.mask[:, 0, 0].expand(-1, call.j).split(keys.size, 1)
            some = some & torch.stack([part.any(1) for part in parts], 1)[:, None]
            free = free & torch.stack([part.all(1) for part in parts], 1)[:, None]
        elif call.mask is not None:
            free = free & False
        if not self.on_cpu:
            free = free & (not (call.segments or call.q_lengths or call.kv_lengths))
            placed = placed & (known.positional == call.positional)
        shape = call.b, queries.count, keys.count
        self.some, self.placed, self.free = (x.expand(shape) for x in (some, placed, free))

    def walk(self, slab: _Slab) -> Iterator[tuple[slice, list[_Tile]]]:
        """Every block of queries of a slab, and the tiles that it visits: neighbours of one kind are one tile."""
        size = self.keys.size
        for block in range(self.queries.count):
            rows = slice(block * self.queries.size, min((block + 1) * self.queries.size, self.call.i))
            some = self.some[slab.items, block].any(0).tolist()
            kinds = list(zip(*(x[slab.items, block].all(0).tolist() for x in (self.placed, self.free)), strict=True))
            visits, n = [], 0
            while n < self.keys.count:
                end = n + 1
                if some[n]:
                    while end < min(n + self.joined, self.keys.count) and some[end] and kinds[end] == kinds[n]:
                        end += 1
                    visits.append(_Tile(slab, rows, slice(n * size, min(end * size, self.call.j)), *kinds[n]))
                n = end
            yield rows, visits

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Memory for one tile, always the same for a name."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, dtype=self.wide, device=self.data.q.device)
        return self.buffers[name][:size].view(shape)

    def keys_of(self, x: Tensor, slab: _Slab) -> Tensor:
        """k or v of a slab: (n, j, size), wide and in one piece."""
        return x[slab.items, slab.kv_heads].to(self.wide).contiguous().flatten(0, 1)

    def queries_of(self, x: Tensor, slab: _Slab, rows: slice) -> Tensor:
        """Some rows of q, or of something like it, (b h i ...): (n, rows, ...), wide."""
        part = x[slab.items, slab.heads, rows].to(self.wide)
        return part.reshape(slab.n, -1, *part.shape[3:])

    def by_head(self, x: Tensor, slab: _Slab) -> Tensor:
        """(n, rows, ...) as (items, heads, queries, ...)."""
        return x.view(slab.items.stop - slab.items.start, slab.heads.stop - slab.heads.start, -1, *x.shape[2:])

    def of_pairs(self, x: Tensor, tile: _Tile) -> Tensor:
        """A tile of a mask or bias (b|1, h|1, i|1, j|1)."""
        places = (tile.slab.items, tile.slab.heads, tile.rows, tile.columns)
        return x[tuple(slice(None) if n == 1 else place for n, place in zip(x.shape, places, strict=True))]

    def logits(self, tile: _Tile, q: Tensor, k: Tensor, capped: bool = False) -> tuple[Tensor, Tensor | None]:
        """The logits of a tile times `unit`, -inf where not allowed, and if `capped` the tanh of the softcap."""
        call, data = self.call, self.data
        k = k[:, tile.columns]
        shape = *q.shape[:2], k.shape[1]
        s, tanh = self.buffer("s", *shape), None
        alpha = call.scale * self.unit if call.softcap is None else call.scale / call.softcap
        torch.baddbmm(s, q, k.mT, beta=0, alpha=alpha, out=s)
        if call.softcap is not None:
            tanh = torch.tanh(s, out=self.buffer("tanh", *shape) if capped else s)
            torch.mul(tanh, call.softcap * self.unit, out=s)
        view = s if tile.placed and tile.free and data.bias is None else self.by_head(s, tile.slab)
        if data.bias is not None:
            view.add_(self.of_pairs(data.bias, tile).to(self.wide))
        if not tile.placed:
            torch.minimum(view, self.positions(tile), out=view)
        if not tile.free:
            for may in self.rules(tile):
                torch.minimum(view, self.bound(may), out=view)
        return s, tanh

    def bound(self, may: Tensor) -> Tensor:
        """inf where allowed, -inf elsewhere: minimum is many times as fast as masked_fill on a CPU."""
        return (may.view(torch.uint8).to(self.wide) - 0.5) * math.inf

    def positions(self, tile: _Tile) -> Tensor:
        """The bound that positions set: tiles at the same distance from the diagonal share it."""
        call, offset = self.call._replace(segments=False, q_lengths=False, kv_lengths=False), self.data.q_offset
        if isinstance(offset, Tensor):
            offset = offset[tile.slab.items] if offset.ndim else offset
            if not self.on_cpu or offset.numel() > 1:
                return self.bound(self.structured(call, Arrays(None, None, None, q_offset=offset), tile))
            offset = int(offset)
        rows, columns = tile.rows, tile.columns
        key = (rows.stop - rows.start, columns.stop - columns.start, columns.start - rows.start - offset)
        if key not in self.patterns:
            if len(self.patterns) == PATTERNS:
                self.patterns.clear()
            self.patterns[key] = self.bound(self.structured(call, Arrays(None, None, None, q_offset=offset), tile))
        return self.patterns[key]

    def rules(self, tile: _Tile) -> Iterator[Tensor]:
        """What else than positions allows a tile: bools that broadcast to it."""
        data, items = self.data, tile.slab.items
        call = self.call._replace(left=None, right=None)
        if call.segments or call.q_lengths or call.kv_lengths:
            yield self.structured(call, Arrays(
                None, None, None,
                q_segment_ids=data.q_segment_ids[items, tile.rows] if call.segments else None,
                kv_segment_ids=data.kv_segment_ids[items, tile.columns] if call.segments else None,
                q_lengths=data.q_lengths[items] if call.q_lengths else None,
                kv_lengths=data.kv_lengths[items] if call.kv_lengths else None,
            ), tile)  # fmt: skip
        if data.mask is not None:
            yield self.of_pairs(data.mask, tile)

    def structured(self, call: Call, data: Arrays, tile: _Tile) -> Tensor:
        """`meaning.structured` of a tile."""
        device = self.data.q.device
        return meaning.structured(call, data, _range(tile.rows, device), _range(tile.columns, device))

    def keep(self, tile: _Tile) -> Tensor:
        """1 where dropout keeps a weight, else 0: (n, rows, columns)."""
        slab, dropout = tile.slab, self.call.dropout
        parts = (slab.items, slab.heads, tile.rows, slice(tile.columns.start // 4, -(-tile.columns.stop // 4)))
        if self.seed is None:
            item, head, rows, quads = (_range(x, self.data.q.device) for x in parts)
            kept = philox.keep_block(
                self.data.dropout_seed, item[:, None, None, None], head[:, None, None], rows, quads, dropout
            )
        else:
            items, heads, of_rows, of_keys = (np.arange(x.start, x.stop) for x in parts)
            kept = torch.from_numpy(_kept(self.seed, items, heads, of_rows, of_keys, dropout))
        return kept[..., : _width(tile)].reshape(slab.n, -1, _width(tile)).view(torch.uint8).to(self.wide)


def covered(call: Call, offset: Any, queries: Seen, keys: Seen) -> Any:
    """Whether every query of the block may see every key of each block, by positions, lengths and segments.

    Arguments and result as in `blocks.visible`. Where it is True nothing has to be looked up for single pairs.
    """
    every = keys.last < call.j
    if call.right is not None:
        every = every & (keys.last - queries.first - call.right <= offset)
    if call.left is not None:
        every = every & (keys.first - queries.last + call.left >= offset)
    if call.segments:
        every = every & (keys.low_id == keys.high_id) & (queries.low_id == queries.high_id)
        every = every & (keys.low_id == queries.low_id)
    if call.kv_lengths:
        every = every & (keys.last < keys.length)
    if call.q_lengths:
        every = every & (queries.last < queries.length)
    return every


def _cut(length: int, most: int, multiple: int = 1) -> Blocks:
    """The fewest blocks of about `most`, as equal as can be, their size a multiple of `multiple`; none is empty."""
    size = -(-length // -(-length // most))
    size = -(-size // multiple) * multiple
    return Blocks(size, -(-length // size))


def _kept(
    seed: list[int], items: np.ndarray, heads: np.ndarray, rows: np.ndarray, quads: np.ndarray, dropout: float
) -> np.ndarray:
    """`philox.keep_block` on a CPU, where NumPy's integer products are twice as fast: bool (lanes, rows, 4 * quads).

    Lanes are heads of items. Words are drawn for as many counters at a time as stay in a core's cache.
    """
    item, head = np.repeat(items, len(heads))[:, None, None], np.tile(heads, len(items))[:, None, None]
    kept = np.empty((len(item), len(rows), 4 * len(quads)), np.bool_)
    some = max(1, COUNTERS // len(quads))  # rows
    lanes = max(1, some // len(rows))
    for lane in range(0, len(item), lanes):
        for row in range(0, len(rows), some):
            part = kept[lane : lane + lanes, row : row + some]
            counter = quads, rows[row : row + some, None], head[lane : lane + lanes], item[lane : lane + lanes]
            words = numpy_philox.words(counter, seed).reshape(part.shape)
            np.greater_equal(words, np.uint32(numpy_philox.threshold(dropout)), out=part)
    return kept


def _extremes(ids: Tensor, cut: Blocks) -> tuple[Tensor, Tensor]:
    """The least and the greatest id of each block: (b, count) each."""
    low, high = zip(*(torch.aminmax(part, dim=1) for part in ids.split(cut.size, 1)), strict=True)
    return torch.stack(low, 1), torch.stack(high, 1)


def _range(part: slice, device: torch.device) -> Tensor:
    return torch.arange(part.start, part.stop, device=device)


def _forward(call: Call, data: Arrays) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tiles = _Tiles(call, data)
    m, total = (data.q.new_empty((call.b, call.h, call.i), dtype=tiles.wide) for _ in range(2))
    out = m.new_empty((*m.shape, call.dv))
    sinks = data.q.new_full((call.h,), -math.inf, dtype=tiles.wide) if data.sinks is None else data.sinks.to(tiles.wide)
    m.copy_((sinks * tiles.unit).clamp(min=tiles.lowest)[:, None])  # not -inf: what is taken off a logit must be finite
    total.copy_((sinks != -math.inf)[:, None])
    for slab in tiles.slabs:
        k, v = tiles.keys_of(data.k, slab), tiles.keys_of(data.v, slab)
        for rows, visits in tiles.walk(slab):
            at = slab.items, slab.heads, rows
            if not visits:
                out[at] = 0
                continue
            q, top, sums = (tiles.queries_of(x, slab, rows) for x in (data.q, m, total))
            answer = q.new_zeros((*q.shape[:2], call.dv))
            for turn, tile in enumerate(visits):
                s, _ = tiles.logits(tile, q, k)
                old, top = top, torch.maximum(top, s.amax(-1))
                p = _weights(tiles, s, top)
                shrink = _weights(tiles, old - top)
                sums = torch.addcmul(p.sum(-1), sums, shrink)
                if call.dropout:
                    p.mul_(tiles.keep(tile))
                if turn:
                    answer.mul_(shrink[..., None])
                answer.baddbmm_(p, v[:, tile.columns])
            answer.div_((torch.where(sums == 0, 1, sums) * (1 - call.dropout))[..., None])
            out[at], m[at], total[at] = (tiles.by_head(x, slab) for x in (answer, top, sums))
    return out, m / tiles.unit + total.log(), m, total


def _weights(tiles: _Tiles, s: Tensor, top: Tensor | None = None) -> Tensor:
    """exp of logits less the largest of their row, in place."""
    if top is not None:
        s.sub_(top[..., None])
    if tiles.wide == torch.float64:
        return s.exp_()
    return (s if tiles.unit == LOG2E else s.mul_(LOG2E)).exp2_()


def _lone(
    tiles: _Tiles, slab: _Slab, rows: slice, visits: list[_Tile], out: Tensor, total: Tensor, dout: Tensor, dlse: Tensor
) -> tuple[Tensor, Tensor] | None:
    """dlse and a bound, (n, rows, 1): dp + slope that is as near to dlse as its bound is dlse. None: no row has one.

    A row of a single key has dp = delta, and they cancel but for the rounding of each. Where total is 1 to the last
    bit, what is below the rounding of such a product is put to 0; elsewhere the bound is below 0. There is no such row
    where a tile lets every query see several keys.
    """
    if tiles.data.bias is None and any(tile.placed and tile.free and _width(tile) > 1 for tile in visits):
        return None
    at = slab.items, slab.heads, rows
    single = total[at] == 1
    if tiles.on_cpu and not single.any():
        return None
    size = (out[at] * dout[at]).abs().sum(-1) + dlse[at].abs()
    bound = torch.where(single, ROUNDINGS * torch.finfo(tiles.wide).eps * size, -1)
    return dlse[at].reshape(slab.n, -1, 1), bound.reshape(slab.n, -1, 1)


def _backward(
    call: Call, data: Arrays, out: Tensor, m: Tensor, total: Tensor, dout: Tensor, dlse: Tensor, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of a call from what its way forward kept."""
    tiles = _Tiles(call, data)
    dq, dk, dv = (x.new_empty(x.shape) for x in (data.q, data.k, data.v))
    inverse = torch.where(total == 0, 0, 1 / total)
    dlse = torch.where(total == 0, 0, dlse)
    slope = torch.empty_like(dlse, dtype=torch.float64)  # what every logit of a row gets besides its own share
    dbias = data.q.new_empty(0)
    if wants_bias:
        once = data.bias.shape == (call.b, call.h, call.i, call.j)  # nothing is summed
        dbias = data.bias.new_zeros(data.bias.shape, dtype=None if once else tiles.wide)
    for slab in tiles.slabs:
        k, v = tiles.keys_of(data.k, slab), tiles.keys_of(data.v, slab)
        # Sums in the accumulation dtype: in place where that is k's own.
        dk_slab, dv_slab = (x[slab.items, slab.kv_heads].flatten(0, 1).to(tiles.wide) for x in (dk, dv))
        turns = list(tiles.walk(slab))
        # Where one block of queries visits every key there is nothing to add to.
        beta = 0 if len(turns) == 1 and sum(map(_width, turns[0][1])) == call.j else 1
        if beta:
            dk_slab.zero_()
            dv_slab.zero_()
        for rows, visits in turns:
            at = slab.items, slab.heads, rows
            slope[at] = dlse[at] - (out[at].double() * dout[at].double()).sum(-1)
            q, do, top, share, one = (tiles.queries_of(x, slab, rows) for x in (data.q, dout, m, slope, inverse))
            lone = _lone(tiles, slab, rows, visits, out, total, dout, dlse)
            share, one = share[..., None], one[..., None]
            do = do / (1 - call.dropout) if call.dropout else do
            do_over_l, q_over_l = do * one, q * one  # weights are divided by total where there are fewer columns
            dq_rows = torch.zeros_like(q)
            for tile in visits:
                k_tile, v_tile = k[:, tile.columns], v[:, tile.columns]
                s, tanh = tiles.logits(tile, q, k, capped=True)
                p = weights = _weights(tiles, s, top)
                dp = tiles.buffer("dp", *p.shape)
                if call.dropout:
                    keep = tiles.keep(tile)
                    torch.bmm(do, v_tile.mT, out=dp).mul_(keep).add_(share)
                    weights = keep.mul_(p)
                else:
                    torch.baddbmm(share, do, v_tile.mT, out=dp)
                if lone is not None:
                    own, bound = lone
                    torch.where(torch.abs(dp - own) <= bound, own, dp, out=dp)
                dv_slab[:, tile.columns].baddbmm_(weights.mT, do_over_l, beta=beta)
                ds = p.mul_(dp)
                if wants_bias:
                    part = tiles.of_pairs(dbias, tile)
                    part += tiles.by_head(ds * one, slab).sum_to_size(part.shape)
                if tanh is not None:
                    torch.ops.aten.tanh_backward.grad_input(ds, tanh, grad_input=ds)
                dk_slab[:, tile.columns].baddbmm_(ds.mT, q_over_l, beta=beta, alpha=call.scale)
                dq_rows.baddbmm_(ds, k_tile, alpha=call.scale)
            dq[at] = tiles.by_head(dq_rows.mul_(one), slab)
        if dk_slab.dtype != dk.dtype:
            for whole, part in ((dk, dk_slab), (dv, dv_slab)):
                of_slab = whole[slab.items, slab.kv_heads]
                of_slab.copy_(part.view(of_slab.shape))
    if wants_bias:
        dbias = dbias.to(data.bias.dtype)
    dsinks = data.q.new_empty(0)
    if data.sinks is not None:
        sinks = data.sinks.to(tiles.wide).double()  # as m has it: a float64 sink was rounded on the way forward
        weight = (sinks[:, None] - m).exp() * (inverse * slope)  # (b h i)
        dsinks = weight.sum((0, 2)).to(data.sinks.dtype)
    return dq, dk, dv, dbias, dsinks

"""Stand-ins for the packages of FlashAttention, for machines that have neither them nor a GPU.

They take the arguments that the packages take and mean by them what the packages mean, in einsum and float64: causal
and window are counted from the ends of the used lengths; rows and keys beyond those are read where a tile reads them,
and rows beyond them are not written. So a call that comes out right here was put to the package in the right words.
"""

from __future__ import annotations

import itertools
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from attend_shared import cases
from attend_shared.cases import Case
from attend_shared.factors import FACTORS, SIZES
from attend_shared.kernels import of_sinks
from attend_shared.kernels.launch import Launch

HAVE_NOT = {  # levels of factors, which the list of cases below is without
    "sinks": ("sinks_float32", "sinks_other"), "dropout": ("dropout_tenth", "dropout_half", "dropout_most"),
    "dtype": ("float32", "float64"), "scale": ("scale_0", "scale_negative"),
    "offset": ("offset_scalar", "offset_items", "offset_far", "offset_int", "offset_huge", "offset_idle"),
}  # fmt: skip
HAVE_NONE = ("mask", "bias", "segments", "score_fn", "mask_fn")  # factors, of which only the plain level is there
GARBAGE = float("nan")  # what lies in memory that was not written


def install(monkeypatch: pytest.MonkeyPatch, interpreted: bool = False) -> None:
    """The packages, as if they were installed, and no GPU were needed; interpreted: our own kernels run as they are."""
    from attend_jax.implementations import fa3
    from attend_jax.implementations import fa4 as jax_fa4
    from attend_jax.implementations import triton as jax_triton
    from attend_torch import launches
    from attend_torch.implementations import fa4 as torch_fa4

    interface = ModuleType("flash_attn.cute.interface")
    vars(interface).update(_flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)
    cute, flash_attn = ModuleType("flash_attn.cute"), ModuleType("flash_attn")
    vars(flash_attn)["cute"], vars(cute)["interface"] = cute, interface
    fa4_jax = ModuleType("fa4_jax")
    attention = ModuleType("fa4_jax.attention")
    vars(attention).update(fa4_vjp_p=SimpleNamespace(bind=_fa4_vjp), _make_config=_make_config)
    vars(fa4_jax).update(flash_attn=flash_attn_jax, flash_attn_varlen=flash_attn_varlen, attention=attention)
    dew_flash_attn = ModuleType("dew_flash_attn")
    vars(dew_flash_attn).update(_forward3=_forward3, _backward3=_backward3)
    for module in (flash_attn, cute, interface, fa4_jax, attention, dew_flash_attn):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    if not interpreted:
        monkeypatch.setattr(of_sinks, "launches", lambda *given: given)
        monkeypatch.setattr(torch_fa4, "_kernels", lambda *given: given)
        monkeypatch.setattr(launches, "run", _of_sinks)
        monkeypatch.setattr(jax_triton, "run", _of_sinks)
    else:
        monkeypatch.setattr(jax_triton, "run", _interpreted)
        monkeypatch.setattr(jax_triton, "capability", lambda: "9.0")
    monkeypatch.setattr(jax_triton, "unavailable", lambda: None)
    for ours in (torch_fa4, jax_fa4, fa3):
        refusal = ours.refusal
        monkeypatch.setattr(ours, "unavailable", lambda: None)
        monkeypatch.setattr(ours, "refusal", lambda call, r=refusal: r(call._replace(platform="cuda")))


def domains(*without: str) -> list[set[str]]:
    """The levels of cases that a package serves: lengths of keys or positions, softcap or lse.

    Args:
        without: factors that a package has not.
    """
    everything = {
        level.name
        for factor in FACTORS
        for level in factor.levels
        if level.name not in HAVE_NOT.get(factor.name, ())
        and (factor.name not in (*HAVE_NONE, *without) or level is factor.levels[0])
    }
    positions, lengths = (
        {level.name for factor in FACTORS if factor.name == name for level in factor.levels[1:]}
        for name in ("position", "lengths")
    )
    return [everything - positions - {"lse"}, everything - (lengths - {"lengths_q"}) - {"softcap_2", "softcap_30"}]


def covering(*without: str) -> list[Case]:
    """Cases in which every two levels meet that a package may have to serve at once: some 200, for a GPU."""
    space = cases.SPACE
    found = (space.cover(space.pairs(), space.bits(domain), space.bits(("bfloat16",))) for domain in domains(*without))
    return list(dict.fromkeys(Case(levels) for each in found for levels in each))


def some(number: int, *without: str) -> list[Case]:
    """Cases of each kind, drawn at random but the same each time, at shapes without tiles."""
    rng, space = np.random.default_rng(0), cases.SPACE
    tiles = {name for name in SIZES if name.startswith("tiles")}
    found = []
    for domain in domains(*without):
        for _ in range(number):
            order = [int(place) for place in rng.permutation(len(FACTORS))]
            chosen = space.complete(
                space.bits(domain - tiles), order,
                lambda _, open_: [int(n) for n in rng.permutation(open_.bit_length()) if open_ >> int(n) & 1],
            )  # fmt: skip
            assert chosen is not None
            found.append(Case(tuple(name for name in space.names if chosen >> space.index[name] & 1)))
    return found


# flash-attn-4: (b n h d), k and v with fewer heads.


def _logits(
    q: Any, k: Any, scale: float, softcap: float | None, left: Any, right: Any, q_used: Any, kv_used: Any
) -> Any:
    """Logits (b h i j), -inf where the pair is not allowed; and the derivative of the softcap."""
    assert all(x is None or x.dtype == torch.int32 for x in (q_used, kv_used))
    i, j = q.shape[1], k.shape[1]
    q_used = torch.full((q.shape[0],), i) if q_used is None else q_used
    kv_used = torch.full((q.shape[0],), j) if kv_used is None else kv_used
    s = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    slope = torch.ones_like(s)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
        slope = 1 - (s / softcap) ** 2
    key, query = torch.arange(j)[None, None, None, :], torch.arange(i)[None, None, :, None]
    at = query + (kv_used - q_used)[:, None, None, None]
    may = (key < kv_used[:, None, None, None]).expand(s.shape)
    if left is not None:
        may = may & (key >= at - left)
    if right is not None:
        may = may & (key <= at + right)
    return torch.where(may, s, -torch.inf), slope, query < q_used[:, None, None, None]


def _wide(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert all(size in (32, 64, 96, 128, 192, 256) for size in (q.shape[3], v.shape[3]))
    assert not any(x.requires_grad for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    return q.double(), *(x.double().repeat_interleave(group, 2) for x in (k, v))


def _packed(starts: Any, total: int) -> list[slice]:
    """The sequences that starts say, each after the other, without a gap."""
    assert starts.dtype == torch.int32
    bounds = starts.tolist()
    assert bounds == sorted(bounds)
    assert (bounds[0], bounds[-1]) == (0, total)
    return [slice(*each) for each in itertools.pairwise(bounds)]


def _flash_attn_fwd(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, seqused_q: Any, seqused_k: Any, softmax_scale: float,
    softcap: float | None, window_size_left: int | None, window_size_right: int | None, learnable_sink: Any,
    return_lse: bool, out: Any,
) -> tuple:  # fmt: skip
    assert return_lse
    options = (softmax_scale, softcap, window_size_left, window_size_right, learnable_sink, True)
    if cu_seqlens_q is not None:
        assert cu_seqlens_k is cu_seqlens_q
        assert seqused_q is seqused_k is None
        assert out.ndim == q.ndim == 3
        found = [
            _flash_attn_fwd(q[at][None], k[at][None], v[at][None], None, None, None, None, *options, out[at][None])[1]
            for at in _packed(cu_seqlens_q, len(q))
        ]
        return out, torch.cat([lse[0] for lse in found], 1), None, None, None
    q, k, v = _wide(q, k, v)
    s, _, written = _logits(q, k, softmax_scale, softcap, window_size_left, window_size_right, seqused_q, seqused_k)
    if learnable_sink is not None:
        s = torch.cat([s, learnable_sink.double()[None, :, None, None].expand(*s.shape[:3], 1)], 3)
    lse = s.logsumexp(3)
    p = torch.exp(s - torch.where(lse == -torch.inf, 0, lse)[..., None])[..., : k.shape[1]]
    found = torch.einsum("bhij,bjhd->bihd", p, v)  # 0 * NaN is NaN, as in a tile that is loaded whole
    written = written[:, 0]
    out.copy_(torch.where(written[..., None], found, GARBAGE))
    return out, torch.where(written.transpose(1, 2), lse, GARBAGE).float(), None, None, None


def _flash_attn_bwd(
    q: Any, k: Any, v: Any, out: Any, dout: Any, lse: Any, softmax_scale: float, softcap: float,
    window_size_left: int | None, window_size_right: int | None, cu_seqlens_q: Any, cu_seqlens_k: Any, seqused_q: Any,
    seqused_k: Any, deterministic: bool, dlse: Any, learnable_sink: Any,
) -> tuple:  # fmt: skip
    assert out.shape == dout.shape
    assert isinstance(deterministic, bool)
    assert learnable_sink is None  # its gradient of sinks is not asked for
    if cu_seqlens_q is not None:
        assert cu_seqlens_k is cu_seqlens_q
        assert lse.shape == (q.shape[1], len(q))
        options = (softmax_scale, softcap, window_size_left, window_size_right, None, None, None, None, deterministic)
        found = [
            _flash_attn_bwd(
                *(x[at][None] for x in (q, k, v, out, dout)), lse[None, :, at], *options,
                None if dlse is None else dlse[None, :, at], None,
            )
            for at in _packed(cu_seqlens_q, len(q))
        ]  # fmt: skip
        return tuple(torch.cat([each[n][0] for each in found]) for n in range(3))
    dtype, hk = q.dtype, k.shape[2]
    q, k, v = _wide(q, k, v)
    s, slope, written = _logits(
        q, k, softmax_scale, softcap or None, window_size_left, window_size_right, seqused_q, seqused_k
    )
    rows = written[:, 0].transpose(1, 2)  # (b 1 i)
    lse = torch.where(rows, lse.double(), 0)
    p = torch.exp(s - torch.where(lse == -torch.inf, 0, lse)[..., None]) * written
    dout, out = dout.double(), torch.where(rows.transpose(1, 2)[..., None], out.double(), 0)
    delta = torch.einsum("bihd,bihd->bhi", dout, out) - (0 if dlse is None else torch.where(rows, dlse, 0))
    ds = p * (torch.einsum("bihd,bjhd->bhij", dout, v) - delta[..., None]) * slope * softmax_scale
    dq, dk = torch.einsum("bhij,bjhd->bihd", ds, k), torch.einsum("bhij,bihd->bjhd", ds, q)
    dv = torch.einsum("bhij,bihd->bjhd", p, dout)
    dq = torch.where(rows.transpose(1, 2)[..., None], dq, GARBAGE)
    if seqused_k is not None:
        keys = (torch.arange(k.shape[1]) < seqused_k[:, None])[:, :, None, None]
        dk, dv = torch.where(keys, dk, GARBAGE), torch.where(keys, dv, GARBAGE)
    dk, dv = (x.unflatten(2, (hk, -1)).sum(3) for x in (dk, dv))
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


# Our own kernels of `attend_shared.kernels.sinks`, which tests/interpreter.py runs: here with every row made anew.


def _of_sinks(launches: tuple, known: dict[str, Any]) -> None:
    rows, *strides = launches
    is_torch = isinstance(known["q"], torch.Tensor)
    xp, full = (np, {}) if is_torch else (jnp, {"precision": "highest"})

    def read(name: str, of: tuple[int, ...] | None = None) -> Any:
        x = known[name]
        if is_torch:
            assert of in (None, x.stride()[:3])
            assert of or x.is_contiguous()
            return x.detach().double().numpy() if x.is_floating_point() else x.numpy()
        if of:
            assert of == (x.shape[1] * x.shape[2] * x.shape[3], x.shape[3], x.shape[2] * x.shape[3])
            x = x.swapaxes(1, 2)
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    q, k, v, out, dout = (read(name, of) for name, of in zip(("q", "k", "v", "out", "dout"), strides, strict=True))
    assert out.shape == dout.shape == q.shape == (rows.b, rows.h, rows.i, rows.d)
    assert k.shape == v.shape == (rows.b, rows.hk, rows.j, rows.d)
    k, v = (xp.repeat(x, rows.h // rows.hk, 1) for x in (k, v))
    lse, sinks = read("lse"), read("sinks")[:, None]
    i_end = read("q_lengths")[:, None, None] if rows.q_lengths else rows.i
    j_end = (read("kv_lengths") if rows.kv_lengths else xp.full(rows.b, rows.j))[:, None, None, None]
    query, key = xp.arange(rows.i)[:, None], xp.arange(rows.j)
    at = query + j_end - (i_end[..., None] if rows.q_lengths else i_end)
    may = xp.broadcast_to(key < j_end, (rows.b, 1, rows.i, rows.j))
    if rows.starts:
        starts = read("starts")
        assert starts.shape == (rows.starts,)
        run = xp.searchsorted(starts, xp.arange(rows.i), side="right")
        at, may = query, may & (run[:, None] == run)
    if rows.left is not None:
        may = may & (key >= at - rows.left)
    if rows.right is not None:
        may = may & (key <= at + rows.right)
    s = rows.scale * xp.matmul(q, k.swapaxes(2, 3), **full)
    if rows.softcap is not None:
        s = rows.softcap * xp.tanh(s / rows.softcap)
    alive = xp.broadcast_to(xp.arange(rows.i) < i_end, lse.shape) & (lse != -math.inf)
    lse = xp.where(alive, lse, math.inf)
    p = xp.exp(xp.where(may, s - lse[..., None], -math.inf))
    dp = xp.matmul(xp.where(alive[..., None], dout, 0), xp.nan_to_num(v).swapaxes(2, 3), **full)
    delta = xp.where(p > 0, p * dp, 0).sum(3)
    if rows.dlse:
        delta -= xp.where(alive, read("dlse"), 0)
    found = -xp.where(sinks == -math.inf, 0, xp.exp(sinks - lse) * delta).sum((0, 2))
    known["dsinks"] = torch.tensor(np.asarray(found)).to(known["sinks"]) if is_torch else found.astype(rows.sinks)


def _interpreted(launches: list[Launch], known: dict[str, Any]) -> None:
    """JAX's launches by Triton's interpreter, which is torch's. int64, which is for other launches, stays there."""
    from attend_torch.launches import Kernels, run

    given = {name: x for name, x in known.items() if x is not None}
    made = {output.name: jax.ShapeDtypeStruct(output.shape, output.dtype) for it in launches for output in it.outputs
            if output.used and output.dtype != "int64"}  # fmt: skip

    def tensor(x: Any) -> torch.Tensor:
        x = np.array(x)
        is_short = x.dtype == jnp.bfloat16
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if is_short else torch.from_numpy(x)

    def array(x: torch.Tensor) -> np.ndarray:
        return x.view(torch.int16).numpy().view(jnp.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()

    def compute(given: dict[str, Any]) -> dict[str, np.ndarray]:
        tensors = {name: tensor(x) for name, x in given.items()}
        run(Kernels(launches), tensors)
        return {name: array(tensors[name]) for name in made}

    known.update(jax.pure_callback(compute, made, given))


# fa4-jax: the same, and packed (items after one another), where rows that are not used are defined as 0.


def flash_attn_jax(
    q: Any, k: Any, v: Any, *, window_size: tuple[int | None, int | None], scale: float, return_lse: bool = False
) -> Any:  # fmt: skip
    found = _jax(q, k, v, window_size, scale, None, None)
    return found if return_lse else found[0]


def flash_attn_varlen(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, *, seqused_q: Any = None, seqused_k: Any = None,
    window_size: tuple[int | None, int | None], scale: float, defined_padding: bool = False, return_lse: bool = False,
) -> Any:  # fmt: skip
    if cu_seqlens_k is cu_seqlens_q:  # segments: as one item, of pairs within the same run
        assert seqused_q is seqused_k is None
        assert not defined_padding  # which costs the filling of every result
        out, lse = _no_lanes(_of_runs, window_size, scale)(q, k, v, cu_seqlens_q)
    else:
        assert defined_padding
        given = (q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
        out, lse = _no_lanes(_of_items, window_size, scale)(*given)
    return (out, lse) if return_lse else out


def _no_lanes(function: Any, *options: Any) -> Any:
    """The function with options behind its arrays, for which jax.vmap raises as the package does."""
    batched = jax.custom_batching.custom_vmap(lambda *arrays: function(*arrays, *options))

    @batched.def_vmap
    def rule(*_: Any) -> Any:
        raise NotImplementedError("vmap over flash_attn_varlen is not supported")

    return batched


def _of_runs(q: Any, k: Any, v: Any, starts: Any, window: tuple[int | None, int | None], scale: float) -> tuple:
    assert starts.dtype == jnp.int32
    run = jnp.searchsorted(starts, jnp.arange(len(q)), side="right")
    return tuple(x[0] for x in _jax(*(x[None] for x in (q, k, v)), window, scale, None, None, run))


def _of_items(q: Any, k: Any, v: Any, of_q: Any, of_k: Any, q_used: Any, kv_used: Any, *options: Any) -> tuple:
    b = len(of_q) - 1
    assert len(of_k) - 1 == b
    out, lse = _jax(*(x.reshape(b, -1, *x.shape[1:]) for x in (q, k, v)), *options, q_used, kv_used)
    return out.reshape(*q.shape[:2], v.shape[2]), lse.swapaxes(0, 1).reshape(q.shape[1], -1)


def _make_config(
    q: Any, causal: bool, window: Any, scale: float, mask: None, backend: None, varlen: bool,
    defined_padding: bool = False,
) -> tuple:  # fmt: skip
    assert (causal, mask, backend) == (False, None, None)
    assert q.ndim == (3 if varlen else 4)
    return window, scale, varlen, defined_padding


def _fa4_vjp(
    q: Any, k: Any, v: Any, out: Any, lse: Any, dout: Any, *bounds: Any, cfg: tuple, has_d_lse: bool
) -> tuple:  # fmt: skip
    window, scale, varlen, defined_padding = cfg
    assert not has_d_lse  # which raises
    assert out.shape == dout.shape == (*q.shape[:-1], v.shape[-1])
    assert varlen == bool(bounds)
    if not varlen:
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        return jax.vjp(lambda *x: _jax(*x, window, scale, None, None)[0], q, k, v)[1](dout)
    of_q, of_k, q_used, kv_used = bounds
    assert q_used.shape == kv_used.shape == (len(of_q) - 1,)
    assert lse.shape == q.shape[1::-1]
    assert defined_padding == (of_q is not of_k)
    if defined_padding:
        assert q_used.dtype == kv_used.dtype == jnp.int32
        return _no_lanes(_pulled, _of_items, window, scale)(dout, q, k, v, *bounds)
    assert q_used is kv_used
    return _no_lanes(_pulled, _of_runs, window, scale)(dout, q, k, v, of_q)


def _pulled(dout: Any, q: Any, k: Any, v: Any, *rest: Any) -> tuple:
    """The gradients of a function that comes behind its integers, before its options."""
    *bounds, function, window, scale = rest
    return jax.vjp(lambda *x: function(*x, *bounds, window, scale)[0], q, k, v)[1](dout)


def _jax(
    q: Any, k: Any, v: Any, window: tuple[int | None, int | None], scale: float, q_used: Any, kv_used: Any,
    run: Any = None,
) -> tuple:  # fmt: skip
    """out (b i h d) and lse (b h i)."""
    assert q.dtype in (jnp.float16, jnp.bfloat16)
    (b, i, h, _), j, dtype = q.shape, k.shape[1], q.dtype
    q_used = jnp.full((b,), i) if q_used is None else q_used
    kv_used = jnp.full((b,), j) if kv_used is None else kv_used
    rows = (jnp.arange(i) < q_used[:, None])[:, :, None, None]
    keys = (jnp.arange(j) < kv_used[:, None])[:, :, None, None]
    q = jnp.where(rows, q.astype(jnp.float32), 0)  # what lies behind is not loaded
    k, v = (jnp.where(keys, jnp.repeat(x.astype(jnp.float32), h // x.shape[2], 2), 0) for x in (k, v))
    s = scale * jnp.einsum("bihd,bjhd->bhij", q, k, precision="highest")
    at = jnp.arange(i)[:, None] + (kv_used - q_used)[:, None, None, None]
    may = (jnp.arange(j) < kv_used[:, None])[:, None, None, :]
    if window[0] is not None:
        may &= jnp.arange(j) >= at - window[0]
    if window[1] is not None:
        may &= jnp.arange(j) <= at + window[1]
    if run is not None:
        may &= run[:, None] == run
    may = jnp.broadcast_to(may, s.shape) & rows.swapaxes(1, 2)
    some = may.any(3, keepdims=True)
    s = jnp.where(may, s, jnp.where(some, -math.inf, 0))
    p = jnp.where(may, jax.nn.softmax(s, 3), 0)
    out = jnp.einsum("bhij,bjhd->bihd", p, v, precision="highest")
    lse = jax.lax.stop_gradient(jnp.where(some[..., 0], jax.nn.logsumexp(s, 3), -math.inf))
    return jnp.where(rows, out, 0).astype(dtype), lse


# dew-flash-attn: (b n h d) without lengths, or packed (n h d); -1 is no bound, and no other bound is negative.


def _runs3(starts: Any, longest: Any, length: int) -> Any:
    """Of which run each token is. The gradients of what lies further than the longest are not written."""
    (of_q, of_k), (most_q, most_k) = starts, longest
    assert of_q is of_k
    assert of_q.dtype == jnp.int32
    assert type(most_q) is type(most_k) is int
    assert most_q == most_k
    run = jnp.searchsorted(of_q, jnp.arange(length), side="right")
    return run, (jnp.arange(length) - of_q[run - 1] < most_q)[:, None, None]


def _forward3(
    q: Any, k: Any, v: Any, starts: Any, longest: Any, scale: float, causal: bool, window: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    if starts is not None:
        run, _ = _runs3(starts, longest, len(q))
        out, lse = _forward_of(*(x[None] for x in (q, k, v)), scale, causal, window, run)
        return out[0], lse[0]
    assert longest is None
    return _forward_of(q, k, v, scale, causal, window)


def _forward_of(
    q: Any, k: Any, v: Any, scale: float, causal: bool, window: tuple[int, int], run: Any = None
) -> tuple[jax.Array, jax.Array]:
    s = _scores(q, k, v, scale, causal, window, run)
    lse = jax.nn.logsumexp(s, 3)
    values = jnp.repeat(v.astype(jnp.float32), q.shape[2] // k.shape[2], 2)
    out = jnp.einsum("bhij,bjhd->bihd", jnp.exp(s - lse[..., None]), values, precision="highest")
    return out.astype(q.dtype), lse


def _backward3(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, starts: Any, longest: Any, scale: float, causal: bool,
    window: tuple[int, int],
) -> tuple[jax.Array, ...]:  # fmt: skip
    assert dout.dtype == q.dtype == out.dtype
    assert dout.shape == q.shape == out.shape
    if starts is not None:
        run, written = _runs3(starts, longest, len(q))
        found = _backward_of(*(x[None] for x in (dout, q, k, v, out, lse)), scale, causal, window, run)
        return tuple(jnp.where(written, x[0], GARBAGE) for x in found)
    assert longest is None
    return _backward_of(dout, q, k, v, out, lse, scale, causal, window)


def _backward_of(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, scale: float, causal: bool, window: tuple[int, int],
    run: Any = None,
) -> tuple[jax.Array, ...]:  # fmt: skip
    s, group, dtype = _scores(q, k, v, scale, causal, window, run), q.shape[2] // k.shape[2], q.dtype
    dout, q, k, v, out = (x.astype(jnp.float32) for x in (dout, q, *(jnp.repeat(x, group, 2) for x in (k, v)), out))
    p = jnp.exp(s - lse[..., None])
    delta = (out * dout).sum(3).swapaxes(1, 2)
    ds = scale * p * (jnp.einsum("bihd,bjhd->bhij", dout, v, precision="highest") - delta[..., None])
    dq = jnp.einsum("bhij,bjhd->bihd", ds, k, precision="highest")
    dk, dv = (jnp.einsum("bhij,bihd->bjhd", *pair, precision="highest") for pair in ((ds, q), (p, dout)))
    dk, dv = (x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(3) for x in (dk, dv))
    return tuple(x.astype(dtype) for x in (dq, dk, dv))


def _scores(
    q: Any, k: Any, v: Any, scale: float, causal: bool, window: tuple[int, int], run: Any = None
) -> jax.Array:  # fmt: skip
    """(b h i j), -inf where the pair is not allowed."""
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (jnp.float16, jnp.bfloat16)
    assert k.shape == v.shape
    assert q.shape[3] == k.shape[3] <= 256
    assert q.shape[3] % 8 == 0
    assert all(type(bound) is int and bound >= -1 for bound in window)
    assert causal is (window[1] == 0)
    q, k = q.astype(jnp.float32), jnp.repeat(k.astype(jnp.float32), q.shape[2] // k.shape[2], 2)
    s = scale * jnp.einsum("bihd,bjhd->bhij", q, k, precision="highest")
    at, key = np.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1], np.arange(k.shape[1])
    may = np.ones((q.shape[1], k.shape[1]), bool)
    if window[0] >= 0:
        may &= key >= at - window[0]
    if window[1] >= 0:
        may &= key <= at + window[1]
    assert may.any(1).all()
    return jnp.where(may if run is None else may & (run[:, None] == run), s, -math.inf)

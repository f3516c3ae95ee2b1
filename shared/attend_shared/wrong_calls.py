"""Calls that must raise, as data: the same exception with the same words in both frameworks.

`WRONG_CALLS` are calls of `attend`, `WRONG_USES` those of `Attend`, `merge` and the converters. `WRONG_RESULTS` are
calls of `attend` in which what a function gives is wrong: that is found where the function is called, and `explain`
calls none. A text here is the whole message. Arguments are NumPy; a framework turns arrays into its own. What is wrong
in one framework only, or names a device, stands in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from attend_shared.call import NAMES

__all__ = ["ORDER", "WRONG_CALLS", "WRONG_RESULTS", "WRONG_USES", "WrongCall", "right_call"]

ORDER = (
    "layout", "q", "k", "v", "is_causal", "window_size", "scale", "softcap", "dropout", "return_lse", "implementation",
    "score_fn", "mask_fn", "mask", "bias", "q_offset", "q_segment_ids", "kv_segment_ids", "q_lengths", "kv_lengths",
    "sinks", "dropout_seed",
)  # fmt: skip
"""The arguments of `attend` in the order in which they are checked: of two wrong ones the first is named."""


_NAMES = ", ".join(f'"{name}"' for name in NAMES)


@dataclass(frozen=True)
class WrongCall:
    """A call that must raise.

    Attributes:
        name: of the case.
        error: TypeError or ValueError.
        text: the whole message.
        build: gives the arguments, by keyword.
        function: what is called: "attend", "merge", "Attend" (made, not called), or a converter, such as
            "convert.mask_from_mha".
    """

    name: str
    error: type[Exception]
    text: str
    build: Callable[[], dict[str, Any]]
    function: str = "attend"


def right_call(**changes: Any) -> dict[str, Any]:
    """A right call, q (2, 4, 6, 8), k and v (2, 2, 6, 8), with these changes."""
    return {"q": _f(2, 4, 6, 8), "k": _f(2, 2, 6, 8), "v": _f(2, 2, 6, 8)} | changes


def _f(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def _i(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


def _t(*shape: int) -> np.ndarray:
    return np.ones(shape, np.bool_)


def _u(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.uint32)


WRONG_CALLS: tuple[WrongCall, ...] = (
    WrongCall(
        "layout unknown", ValueError,
        "layout: expected one of \"bhnd\", \"bnhd\", got str 'bshd'. bhnd is (batch, heads, length, head size), bnhd "
        "is (batch, length, heads, head size).",
        lambda: right_call(layout="bshd"),
    ),
    WrongCall(
        "layout none", ValueError,
        'layout: expected one of "bhnd", "bnhd", got None. bhnd is (batch, heads, length, head size), bnhd is '
        "(batch, length, heads, head size).",
        lambda: right_call(layout=None),
    ),
    WrongCall(
        "layout an array", ValueError,
        'layout: expected one of "bhnd", "bnhd", got int32 of shape (2,). bhnd is (batch, heads, length, head '
        "size), bnhd is (batch, length, heads, head size).",
        lambda: right_call(layout=_i(2)),
    ),
    WrongCall(
        "q a list", TypeError,
        "q: expected an array of the framework that is called, got list (list (float 1.0)). attend_torch takes "
        "torch tensors, attend_jax takes JAX and NumPy arrays.",
        lambda: right_call(q=[[1.0]]),
    ),
    WrongCall(
        "q none", TypeError,
        "q: expected an array of the framework that is called, got None. attend_torch takes torch tensors, "
        "attend_jax takes JAX and NumPy arrays.",
        lambda: right_call(q=None),
    ),
    WrongCall(
        "k a number", TypeError,
        "k: expected an array of the framework that is called, got float 1.0. attend_torch takes torch tensors, "
        "attend_jax takes JAX and NumPy arrays.",
        lambda: right_call(k=1.0),
    ),
    WrongCall(
        "q rank 3", ValueError,
        "q: expected rank 4, (b, h, i, d), got float32 of shape (4, 6, 8). Split the heads out of the last axis, "
        "and add a batch axis if there is none.",
        lambda: right_call(q=_f(4, 6, 8)),
    ),
    WrongCall(
        "v rank 3, bnhd", ValueError,
        "v: expected rank 4, (b, j, hk, dv), got float32 of shape (2, 6, 8). Split the heads out of the last "
        "axis, and add a batch axis if there is none.",
        lambda: right_call(v=_f(2, 6, 8), layout="bnhd"),
    ),
    WrongCall(
        "q integers", TypeError,
        "q: expected one of float16, bfloat16, float32, float64, got int32 of shape (2, 4, 6, 8). Convert it "
        "first.",
        lambda: right_call(q=_i(2, 4, 6, 8)),
    ),
    WrongCall(
        "q complex", TypeError,
        "q: expected one of float16, bfloat16, float32, float64, got complex64 of shape (2, 4, 6, 8). Convert it "
        "first.",
        lambda: right_call(q=_f(2, 4, 6, 8).astype(np.complex64)),
    ),
    WrongCall(
        "k float16 beside float32", TypeError,
        "k: expected float32, the dtype of q, got float16 of shape (2, 2, 6, 8). Give q, k and v one dtype.",
        lambda: right_call(k=_f(2, 2, 6, 8).astype(np.float16)),
    ),
    WrongCall(
        "v integers beside float32", TypeError,
        "v: expected float32, the dtype of q, got int32 of shape (2, 2, 6, 8). Give q, k and v one dtype.",
        lambda: right_call(v=_i(2, 2, 6, 8)),
    ),
    WrongCall(
        "no query heads", ValueError,
        'q: expected (b, h, i, d) with at least one head and a head size of at least 1, in layout "bhnd", got '
        "float32 of shape (2, 0, 6, 8). Only batch and lengths may be 0.",
        lambda: right_call(q=_f(2, 0, 6, 8)),
    ),
    WrongCall(
        "no head size", ValueError,
        'q: expected (b, h, i, d) with at least one head and a head size of at least 1, in layout "bhnd", got '
        "float32 of shape (2, 4, 6, 0). Only batch and lengths may be 0.",
        lambda: right_call(q=_f(2, 4, 6, 0)),
    ),
    WrongCall(
        "batch differs", ValueError,
        'k: expected (b, hk, j, d) with b = 2 and d = 8 as in q, in layout "bhnd", got float32 of shape (3, 2, 6,'
        " 8). q has shape (2, 4, 6, 8); is layout right?",
        lambda: right_call(k=_f(3, 2, 6, 8)),
    ),
    WrongCall(
        "batch differs, bnhd", ValueError,
        'v: expected (b, j, hk, dv) with b = 2, hk = 6 and j = 2 as in k, in layout "bnhd", got float32 of shape '
        "(3, 2, 6, 8). k has shape (2, 2, 6, 8); is layout right?",
        lambda: right_call(v=_f(3, 2, 6, 8), layout="bnhd"),
    ),
    WrongCall(
        "head size differs", ValueError,
        'k: expected (b, hk, j, d) with b = 2 and d = 8 as in q, in layout "bhnd", got float32 of shape (2, 2, 6,'
        " 16). q has shape (2, 4, 6, 8); is layout right?",
        lambda: right_call(k=_f(2, 2, 6, 16)),
    ),
    WrongCall(
        "v has other heads", ValueError,
        'v: expected (b, hk, j, dv) with b = 2, hk = 2 and j = 6 as in k, in layout "bhnd", got float32 of shape '
        "(2, 4, 6, 8). k has shape (2, 2, 6, 8); is layout right?",
        lambda: right_call(v=_f(2, 4, 6, 8)),
    ),
    WrongCall(
        "v has other length", ValueError,
        'v: expected (b, hk, j, dv) with b = 2, hk = 2 and j = 6 as in k, in layout "bhnd", got float32 of shape '
        "(2, 2, 5, 8). k has shape (2, 2, 6, 8); is layout right?",
        lambda: right_call(v=_f(2, 2, 5, 8)),
    ),
    WrongCall(
        "v head size 0", ValueError,
        'v: expected a value head size of at least 1, in layout "bhnd", got float32 of shape (2, 2, 6, 0). Only '
        "batch and lengths may be 0.",
        lambda: right_call(v=_f(2, 2, 6, 0)),
    ),
    WrongCall(
        "heads do not divide", ValueError,
        'k: expected a number of key/value heads that divides the 4 heads of q, in layout "bhnd", got float32 of '
        "shape (2, 3, 6, 8). Query head n reads key/value head n // (h // hk); is layout right?",
        lambda: right_call(k=_f(2, 3, 6, 8), v=_f(2, 3, 6, 8)),
    ),
    WrongCall(
        "no key/value heads", ValueError,
        'k: expected a number of key/value heads that divides the 4 heads of q, in layout "bhnd", got float32 of '
        "shape (2, 0, 6, 8). Query head n reads key/value head n // (h // hk); is layout right?",
        lambda: right_call(k=_f(2, 0, 6, 8), v=_f(2, 0, 6, 8)),
    ),
    WrongCall(
        "is_causal an int", TypeError,
        "is_causal: expected a bool, got int 1. Pass a causal mask that depends on data as mask=.",
        lambda: right_call(is_causal=1),
    ),
    WrongCall(
        "is_causal none", TypeError,
        "is_causal: expected a bool, got None. Pass a causal mask that depends on data as mask=.",
        lambda: right_call(is_causal=None),
    ),
    WrongCall(
        "is_causal an array", TypeError,
        "is_causal: expected a bool (known in Python, before anything is compiled), got bool of shape (). If it "
        "is known by then, pass its .tolist(). Pass a causal mask that depends on data as mask=.",
        lambda: right_call(is_causal=np.array(True)),
    ),
    WrongCall(
        "window a bare int", TypeError,
        "window_size: expected a pair (left, right), each a whole number >= 0 or None, got int 3. A window of w "
        "tokens that includes the query's own is (w - 1, 0); None is no bound.",
        lambda: right_call(window_size=3),
    ),
    WrongCall(
        "window text", TypeError,
        "window_size: expected a pair (left, right), each a whole number >= 0 or None, got str '3'. A window of w"
        " tokens that includes the query's own is (w - 1, 0); None is no bound.",
        lambda: right_call(window_size="3"),
    ),
    WrongCall(
        "window an array", TypeError,
        "window_size: expected a pair (left, right), each a whole number >= 0 or None (known in Python, before "
        "anything is compiled), got int32 of shape (2,). If it is known by then, pass its .tolist(). A window of "
        "w tokens that includes the query's own is (w - 1, 0); None is no bound.",
        lambda: right_call(window_size=_i(2)),
    ),
    WrongCall(
        "window negative", ValueError,
        "window_size: expected a pair (left, right), each a whole number >= 0 or None, got tuple (int -1, int 0)."
        " A window of w tokens that includes the query's own is (w - 1, 0); None is no bound.",
        lambda: right_call(window_size=(-1, 0)),
    ),
    WrongCall(
        "window of three", ValueError,
        "window_size: expected a pair (left, right), each a whole number >= 0 or None, got tuple (int 1, int 2, "
        "int 3). A window of w tokens that includes the query's own is (w - 1, 0); None is no bound.",
        lambda: right_call(window_size=(1, 2, 3)),
    ),
    WrongCall(
        "window of floats", TypeError,
        "window_size: expected a pair (left, right), each a whole number >= 0 or None, got tuple (float 1.0, "
        "None). A window of w tokens that includes the query's own is (w - 1, 0); None is no bound.",
        lambda: right_call(window_size=(1.0, None)),
    ),
    WrongCall(
        "window of bools", TypeError,
        "window_size: expected a pair (left, right), each a whole number >= 0 or None, got list (bool True, int "
        "0). A window of w tokens that includes the query's own is (w - 1, 0); None is no bound.",
        lambda: right_call(window_size=[True, 0]),
    ),
    WrongCall(
        "window of arrays", TypeError,
        "window_size: expected a pair (left, right), each a whole number >= 0 or None (known in Python, before "
        "anything is compiled), got int32 of shape (). If it is known by then, pass its .tolist(). A window of w "
        "tokens that includes the query's own is (w - 1, 0); None is no bound.",
        lambda: right_call(window_size=(_i(), 0)),
    ),
    WrongCall(
        "scale an array", TypeError,
        "scale: expected a number (known in Python, before anything is compiled), got float32 of shape (). If it "
        "is known by then, pass its .tolist(). Pass None for d ** -0.5; a learned or per-head scale multiplies q.",
        lambda: right_call(scale=_f()),
    ),
    WrongCall(
        "scale a bool", TypeError,
        "scale: expected a number, got bool True. Pass None for d ** -0.5; a learned or per-head scale multiplies"
        " q.",
        lambda: right_call(scale=True),
    ),
    WrongCall(
        "scale text", TypeError,
        "scale: expected a number, got str 'auto'. Pass None for d ** -0.5; a learned or per-head scale "
        "multiplies q.",
        lambda: right_call(scale="auto"),
    ),
    WrongCall(
        "scale complex", TypeError,
        "scale: expected a number, got complex 1j. Pass None for d ** -0.5; a learned or per-head scale "
        "multiplies q.",
        lambda: right_call(scale=1j),
    ),
    WrongCall(
        "scale infinite", ValueError,
        "scale: expected a finite number, got float inf. Pass None for d ** -0.5; a learned or per-head scale "
        "multiplies q.",
        lambda: right_call(scale=float("inf")),
    ),
    WrongCall(
        "scale nan", ValueError,
        "scale: expected a finite number, got float16 nan. Pass None for d ** -0.5; a learned or per-head scale "
        "multiplies q.",
        lambda: right_call(scale=np.float16("nan")),
    ),
    WrongCall(
        "scale beyond float64", ValueError,
        "scale: expected a finite number, got int of 1027 bits. Pass None for d ** -0.5; a learned or per-head "
        "scale multiplies q.",
        lambda: right_call(scale=10**309),
    ),
    WrongCall(
        "softcap zero", ValueError,
        "softcap: expected a number > 0, got float 0.0. Pass None for no softcap.",
        lambda: right_call(softcap=0),
    ),
    WrongCall(
        "softcap negative", ValueError,
        "softcap: expected a number > 0, got float -30.0. Pass None for no softcap.",
        lambda: right_call(softcap=-30.0),
    ),
    WrongCall(
        "softcap nan", ValueError,
        "softcap: expected a finite number, got float nan. Pass None for no softcap.",
        lambda: right_call(softcap=float("nan")),
    ),
    WrongCall(
        "softcap an array", TypeError,
        "softcap: expected a number (known in Python, before anything is compiled), got float32 of shape (). If "
        "it is known by then, pass its .tolist(). Pass None for no softcap.",
        lambda: right_call(softcap=_f()),
    ),
    WrongCall(
        "dropout one", ValueError,
        "dropout: expected a probability in [0, 1), got float 1.0. Pass 0 for no dropout.",
        lambda: right_call(dropout=1.0, dropout_seed=0),
    ),
    WrongCall(
        "dropout negative", ValueError,
        "dropout: expected a probability in [0, 1), got float -0.1. Pass 0 for no dropout.",
        lambda: right_call(dropout=-0.1, dropout_seed=0),
    ),
    WrongCall(
        "dropout nan", ValueError,
        "dropout: expected a finite number, got float nan. Pass 0 for no dropout.",
        lambda: right_call(dropout=float("nan"), dropout_seed=0),
    ),
    WrongCall(
        "dropout none", TypeError,
        "dropout: expected a number, got None. Pass 0 for no dropout.",
        lambda: right_call(dropout=None),
    ),
    WrongCall(
        "dropout a bool", TypeError,
        "dropout: expected a number, got bool False. Pass 0 for no dropout.",
        lambda: right_call(dropout=False),
    ),
    WrongCall(
        "dropout an array", TypeError,
        "dropout: expected a number (known in Python, before anything is compiled), got float32 of shape (). If "
        "it is known by then, pass its .tolist(). Pass 0 for no dropout.",
        lambda: right_call(dropout=_f(), dropout_seed=0),
    ),
    WrongCall(
        "return_lse an int", TypeError,
        "return_lse: expected a bool, got int 1. It decides what is returned, so it cannot be data.",
        lambda: right_call(return_lse=1),
    ),
    WrongCall(
        "return_lse an array", TypeError,
        "return_lse: expected a bool (known in Python, before anything is compiled), got bool of shape (). If it "
        "is known by then, pass its .tolist(). It decides what is returned, so it cannot be data.",
        lambda: right_call(return_lse=np.array(True)),
    ),
    WrongCall(
        "implementation unknown", ValueError,
        f"implementation: expected one of {_NAMES}, got str 'flash3'. Pass None for the fastest that can.",
        lambda: right_call(implementation="flash3"),
    ),
    WrongCall(
        "implementation unknown in a list", ValueError,
        f"implementation: expected one of {_NAMES}, got list (str 'einsum', str 'flash3'). Pass None for the "
        "fastest that can.",
        lambda: right_call(implementation=["einsum", "flash3"]),
    ),
    WrongCall(
        "implementation an empty sequence", ValueError,
        f"implementation: expected one of {_NAMES}, got tuple (). Pass None for the fastest that can.",
        lambda: right_call(implementation=()),
    ),
    WrongCall(
        "implementation a number", TypeError,
        f"implementation: expected None, a name, or a sequence of names, got int 3. The names are {_NAMES}.",
        lambda: right_call(implementation=3),
    ),
    WrongCall(
        "implementation a set", TypeError,
        f"implementation: expected None, a name, or a sequence of names, got set. The names are {_NAMES}.",
        lambda: right_call(implementation={"einsum"}),
    ),
    WrongCall(
        "score_fn an array", TypeError,
        "score_fn: expected None, or a function (score, b, h, q_index, kv_index) of scores, got float32 of shape "
        "(1, 4, 6, 6). An array of what is added to scores is bias=.",
        lambda: right_call(score_fn=_f(1, 4, 6, 6)),
    ),
    WrongCall(
        "score_fn a name", TypeError,
        "score_fn: expected None, or a function (score, b, h, q_index, kv_index) of scores, got str 'alibi'. An array "
        "of what is added to scores is bias=.",
        lambda: right_call(score_fn="alibi"),
    ),
    WrongCall(
        "mask_fn an array", TypeError,
        "mask_fn: expected None, or a function (b, h, q_index, kv_index) of bool, got bool of shape (1, 1, 6, 6). An "
        "array of which pairs are allowed is mask=.",
        lambda: right_call(mask_fn=_t(1, 1, 6, 6)),
    ),
    WrongCall(
        "score_fn wrong, mask too", TypeError,
        "score_fn: expected None, or a function (score, b, h, q_index, kv_index) of scores, got bool True. An array of "
        "what is added to scores is bias=.",
        lambda: right_call(score_fn=True, mask_fn=True, mask=_f(2, 6)),
    ),
    WrongCall(
        "mask float", TypeError,
        "mask: expected bool, where True means may attend, got float32 of shape (2, 1, 6, 6). Pass additive "
        "scores (0 and -inf, ALiBi) as bias=, and integers as mask != 0.",
        lambda: right_call(mask=_f(2, 1, 6, 6)),
    ),
    WrongCall(
        "mask integers", TypeError,
        "mask: expected bool, where True means may attend, got int32 of shape (2, 6). Pass additive scores (0 and"
        " -inf, ALiBi) as bias=, and integers as mask != 0.",
        lambda: right_call(mask=_i(2, 6)),
    ),
    WrongCall(
        "mask text", TypeError,
        "mask: expected an array of the framework that is called, got str 'causal'. attend_torch takes torch "
        "tensors, attend_jax takes JAX and NumPy arrays.",
        lambda: right_call(mask="causal"),
    ),
    WrongCall(
        "mask a list", TypeError,
        "mask: expected an array of the framework that is called, got list (list (bool True)). attend_torch takes"
        " torch tensors, attend_jax takes JAX and NumPy arrays.",
        lambda: right_call(mask=[[True]]),
    ),
    WrongCall(
        "mask (i, j) as rank 2", ValueError,
        "mask: expected a rank-2 key mask (b, j) = (2, 6) or (1, 6), got bool of shape (6, 6). Write a mask of "
        "(query, key) as mask[None, None].",
        lambda: right_call(mask=_t(6, 6)),
    ),
    WrongCall(
        "mask (b, 1)", ValueError,
        "mask: expected a rank-2 key mask (b, j) = (2, 6) or (1, 6), got bool of shape (2, 1). Write a mask of "
        "(query, key) as mask[None, None].",
        lambda: right_call(mask=_t(2, 1)),
    ),
    WrongCall(
        "mask rank 0", ValueError,
        "mask: expected rank 4, or rank 2 for a key mask, against (b, h, i, j) = (2, 4, 6, 6), got bool of shape "
        "(). Write (i, j) as mask[None, None], (b, i, j) as mask[:, None], (h, i, j) as mask[None], (b, j) as "
        "mask[:, None, None].",
        lambda: right_call(mask=np.array(True)),
    ),
    WrongCall(
        "mask rank 1", ValueError,
        "mask: expected rank 4, or rank 2 for a key mask, against (b, h, i, j) = (2, 4, 6, 6), got bool of shape "
        "(6,). Write (i, j) as mask[None, None], (b, i, j) as mask[:, None], (h, i, j) as mask[None], (b, j) as "
        "mask[:, None, None].",
        lambda: right_call(mask=_t(6)),
    ),
    WrongCall(
        "mask rank 3", ValueError,
        "mask: expected rank 4, or rank 2 for a key mask, against (b, h, i, j) = (2, 4, 6, 6), got bool of shape "
        "(2, 6, 6). Write (i, j) as mask[None, None], (b, i, j) as mask[:, None], (h, i, j) as mask[None], (b, j)"
        " as mask[:, None, None].",
        lambda: right_call(mask=_t(2, 6, 6)),
    ),
    WrongCall(
        "mask of other heads", ValueError,
        "mask: expected each axis 1 or full, against (b, h, i, j) = (2, 4, 6, 6), got bool of shape (2, 2, 6, 6)."
        " The axes are (b, h, i, j) in both layouts.",
        lambda: right_call(mask=_t(2, 2, 6, 6)),
    ),
    WrongCall(
        "mask in the layout of q", ValueError,
        "mask: expected each axis 1 or full, against (b, h, i, j) = (2, 4, 6, 6), got bool of shape (2, 6, 4, 6)."
        " The axes are (b, h, i, j) in both layouts.",
        lambda: right_call(mask=_t(2, 6, 4, 6), layout="bnhd", q=_f(2, 6, 4, 8), k=_f(2, 6, 2, 8), v=_f(2, 6, 2, 8)),
    ),
    WrongCall(
        "bias bool", TypeError,
        "bias: expected one of float16, bfloat16, float32, float64, got bool of shape (1, 1, 6, 6). Pass a "
        "boolean array as mask=.",
        lambda: right_call(bias=_t(1, 1, 6, 6)),
    ),
    WrongCall(
        "bias integers", TypeError,
        "bias: expected one of float16, bfloat16, float32, float64, got int32 of shape (1, 1, 6, 6). Convert it "
        "first.",
        lambda: right_call(bias=_i(1, 1, 6, 6)),
    ),
    WrongCall(
        "bias a number", TypeError,
        "bias: expected an array of the framework that is called, got float 0.5. attend_torch takes torch "
        "tensors, attend_jax takes JAX and NumPy arrays.",
        lambda: right_call(bias=0.5),
    ),
    WrongCall(
        "bias rank 2", ValueError,
        "bias: expected rank 4, against (b, h, i, j) = (2, 4, 6, 6), got float32 of shape (6, 6). Write (i, j) as"
        " bias[None, None], (b, i, j) as bias[:, None], (h, i, j) as bias[None], (b, j) as bias[:, None, None].",
        lambda: right_call(bias=_f(6, 6)),
    ),
    WrongCall(
        "bias of other length", ValueError,
        "bias: expected each axis 1 or full, against (b, h, i, j) = (2, 4, 6, 6), got float32 of shape (1, 1, 6, "
        "5). The axes are (b, h, i, j) in both layouts.",
        lambda: right_call(bias=_f(1, 1, 6, 5)),
    ),
    WrongCall(
        "causal, lengths differ, no offset", ValueError,
        "q_offset: expected a value, since 4 queries against 6 keys can be aligned in two ways, got None. Pass "
        "q_offset=0 (query t sits at key t, as in torch SDPA and jax.nn) or q_offset=kv_len - q_len, here 2 (the "
        "last query sits at the last key, as in flash-attn and cached decoding).",
        lambda: right_call(q=_f(2, 4, 4, 8), is_causal=True),
    ),
    WrongCall(
        "window, lengths differ, no offset", ValueError,
        "q_offset: expected a value, since 4 queries against 6 keys can be aligned in two ways, got None. Pass "
        "q_offset=0 (query t sits at key t, as in torch SDPA and jax.nn) or q_offset=kv_len - q_len, here 2 (the "
        "last query sits at the last key, as in flash-attn and cached decoding).",
        lambda: right_call(q=_f(2, 4, 4, 8), window_size=(1, None)),
    ),
    WrongCall(
        "offset a float", TypeError,
        "q_offset: expected an int, or integers of shape () or (b,) = (2,), got float 1.0. Query t sits at key "
        "position t + q_offset.",
        lambda: right_call(is_causal=True, q_offset=1.0),
    ),
    WrongCall(
        "offset a bool", TypeError,
        "q_offset: expected an int, or integers of shape () or (b,) = (2,), got bool True. Query t sits at key "
        "position t + q_offset.",
        lambda: right_call(is_causal=True, q_offset=True),
    ),
    WrongCall(
        "offset text", TypeError,
        "q_offset: expected an int, or integers of shape () or (b,) = (2,), got str 'end'. Query t sits at key "
        "position t + q_offset.",
        lambda: right_call(is_causal=True, q_offset="end"),
    ),
    WrongCall(
        "offset of another shape", ValueError,
        "q_offset: expected an int, or integers of shape () or (b,) = (2,), got int32 of shape (3,). Query t sits"
        " at key position t + q_offset.",
        lambda: right_call(is_causal=True, q_offset=_i(3)),
    ),
    WrongCall(
        "offset of floats", TypeError,
        "q_offset: expected an int, or integers of shape () or (b,) = (2,), got float32 of shape (2,). Query t "
        "sits at key position t + q_offset.",
        lambda: right_call(is_causal=True, q_offset=_f(2)),
    ),
    WrongCall(
        "offset wrong where it has no effect", ValueError,
        "q_offset: expected an int, or integers of shape () or (b,) = (2,), got int32 of shape (2, 1). Query t "
        "sits at key position t + q_offset.",
        lambda: right_call(q_offset=_i(2, 1)),
    ),
    WrongCall(
        "segments of floats", TypeError,
        "q_segment_ids: expected integers of shape (b, i) = (2, 6), got float32 of shape (2, 6). A query attends "
        "to the keys that have its id.",
        lambda: right_call(q_segment_ids=_f(2, 6)),
    ),
    WrongCall(
        "segments of bools", TypeError,
        "kv_segment_ids: expected integers of shape (b, j) = (2, 6), got bool of shape (2, 6). A query attends to"
        " the keys that have its id.",
        lambda: right_call(kv_segment_ids=_t(2, 6)),
    ),
    WrongCall(
        "segments of another shape", ValueError,
        "q_segment_ids: expected integers of shape (b, i) = (2, 6), got int32 of shape (6,). A query attends to "
        "the keys that have its id.",
        lambda: right_call(q_segment_ids=_i(6)),
    ),
    WrongCall(
        "segments of another length", ValueError,
        "kv_segment_ids: expected integers of shape (b, j) = (2, 6), got int32 of shape (2, 5). A query attends "
        "to the keys that have its id.",
        lambda: right_call(q_segment_ids=_i(2, 6), kv_segment_ids=_i(2, 5)),
    ),
    WrongCall(
        "segments a list", TypeError,
        "kv_segment_ids: expected integers of shape (b, j) = (2, 6), got list (int 0, int 1). A query attends to "
        "the keys that have its id.",
        lambda: right_call(kv_segment_ids=[0, 1]),
    ),
    WrongCall(
        "segments of queries alone", ValueError,
        "kv_segment_ids: expected integers of shape (b, j) = (2, 6), got None. One side may stand for both only "
        "where there are as many queries as keys.",
        lambda: right_call(q=_f(2, 4, 4, 8), q_segment_ids=_i(2, 4)),
    ),
    WrongCall(
        "segments of keys alone", ValueError,
        "q_segment_ids: expected integers of shape (b, i) = (2, 4), got None. One side may stand for both only "
        "where there are as many queries as keys.",
        lambda: right_call(q=_f(2, 4, 4, 8), kv_segment_ids=_i(2, 6)),
    ),
    WrongCall(
        "lengths of floats", TypeError,
        "kv_lengths: expected integers of shape (b,) = (2,), got float32 of shape (2,). One length for each batch"
        " item.",
        lambda: right_call(kv_lengths=_f(2)),
    ),
    WrongCall(
        "lengths of bools", TypeError,
        "q_lengths: expected integers of shape (b,) = (2,), got bool of shape (2,). One length for each batch "
        "item.",
        lambda: right_call(q_lengths=_t(2)),
    ),
    WrongCall(
        "lengths of another shape", ValueError,
        "q_lengths: expected integers of shape (b,) = (2,), got int32 of shape (2, 1). One length for each batch "
        "item.",
        lambda: right_call(q_lengths=_i(2, 1)),
    ),
    WrongCall(
        "lengths of another batch", ValueError,
        "kv_lengths: expected integers of shape (b,) = (2,), got int32 of shape (3,). One length for each batch "
        "item.",
        lambda: right_call(kv_lengths=_i(3)),
    ),
    WrongCall(
        "lengths an int", TypeError,
        "kv_lengths: expected integers of shape (b,) = (2,), got int 3. One length for each batch item.",
        lambda: right_call(kv_lengths=3),
    ),
    WrongCall(
        "lengths a list", TypeError,
        "q_lengths: expected integers of shape (b,) = (2,), got list (int 6, int 3). One length for each batch "
        "item.",
        lambda: right_call(q_lengths=[6, 3]),
    ),
    WrongCall(
        "sinks of another shape", ValueError,
        "sinks: expected shape (h,) = (4,), got float32 of shape (2,). One extra logit for each query head.",
        lambda: right_call(sinks=_f(2)),
    ),
    WrongCall(
        "sinks rank 2", ValueError,
        "sinks: expected shape (h,) = (4,), got float32 of shape (4, 1). One extra logit for each query head.",
        lambda: right_call(sinks=_f(4, 1)),
    ),
    WrongCall(
        "sinks integers", TypeError,
        "sinks: expected one of float16, bfloat16, float32, float64, got int32 of shape (4,). Convert it first.",
        lambda: right_call(sinks=_i(4)),
    ),
    WrongCall(
        "sinks a list", TypeError,
        "sinks: expected an array of the framework that is called, got list (float 0.0, float 0.0, float 0.0, "
        "float 0.0, ...). attend_torch takes torch tensors, attend_jax takes JAX and NumPy arrays.",
        lambda: right_call(sinks=[0.0] * 6),
    ),
    WrongCall(
        "dropout without a seed", ValueError,
        "dropout_seed: expected an int in [0, 2**64) or a uint32 array (2,) where dropout > 0, got None. Pass a "
        "fresh seed for each step, or dropout=0 for none; a Flax module can draw one from its rngs.",
        lambda: right_call(dropout=0.1),
    ),
    WrongCall(
        "seed negative", ValueError,
        "dropout_seed: expected an int in [0, 2**64) or a uint32 array (2,) = (low, high), got int -1. Split a "
        "64-bit seed as (seed % 2**32, seed // 2**32); convert.seed_from_key takes a JAX key.",
        lambda: right_call(dropout=0.1, dropout_seed=-1),
    ),
    WrongCall(
        "seed too large", ValueError,
        "dropout_seed: expected an int in [0, 2**64) or a uint32 array (2,) = (low, high), got int "
        "18446744073709551616. Split a 64-bit seed as (seed % 2**32, seed // 2**32); convert.seed_from_key takes "
        "a JAX key.",
        lambda: right_call(dropout=0.1, dropout_seed=2**64),
    ),
    WrongCall(
        "seed a float", TypeError,
        "dropout_seed: expected an int in [0, 2**64) or a uint32 array (2,) = (low, high), got float 1.0. Split a"
        " 64-bit seed as (seed % 2**32, seed // 2**32); convert.seed_from_key takes a JAX key.",
        lambda: right_call(dropout=0.1, dropout_seed=1.0),
    ),
    WrongCall(
        "seed a bool", TypeError,
        "dropout_seed: expected an int in [0, 2**64) or a uint32 array (2,) = (low, high), got bool True. Split a"
        " 64-bit seed as (seed % 2**32, seed // 2**32); convert.seed_from_key takes a JAX key.",
        lambda: right_call(dropout=0.1, dropout_seed=True),
    ),
    WrongCall(
        "seed a tuple", TypeError,
        "dropout_seed: expected an int in [0, 2**64) or a uint32 array (2,) = (low, high), got tuple (int 0, int "
        "1). Split a 64-bit seed as (seed % 2**32, seed // 2**32); convert.seed_from_key takes a JAX key.",
        lambda: right_call(dropout=0.1, dropout_seed=(0, 1)),
    ),
    WrongCall(
        "seed of int32", TypeError,
        "dropout_seed: expected an int in [0, 2**64) or a uint32 array (2,) = (low, high), got int32 of shape "
        "(2,). Split a 64-bit seed as (seed % 2**32, seed // 2**32); convert.seed_from_key takes a JAX key.",
        lambda: right_call(dropout=0.1, dropout_seed=_i(2)),
    ),
    WrongCall(
        "seed of another shape", ValueError,
        "dropout_seed: expected an int in [0, 2**64) or a uint32 array (2,) = (low, high), got uint32 of shape "
        "(3,). Split a 64-bit seed as (seed % 2**32, seed // 2**32); convert.seed_from_key takes a JAX key.",
        lambda: right_call(dropout=0.1, dropout_seed=_u(3)),
    ),
    WrongCall(
        "seed a scalar array", ValueError,
        "dropout_seed: expected an int in [0, 2**64) or a uint32 array (2,) = (low, high), got uint32 of shape "
        "(). Split a 64-bit seed as (seed % 2**32, seed // 2**32); convert.seed_from_key takes a JAX key.",
        lambda: right_call(dropout=0.1, dropout_seed=_u()),
    ),
    WrongCall(
        "seed wrong where it has no effect", ValueError,
        "dropout_seed: expected an int in [0, 2**64) or a uint32 array (2,) = (low, high), got uint32 of shape "
        "(4,). Split a 64-bit seed as (seed % 2**32, seed // 2**32); convert.seed_from_key takes a JAX key.",
        lambda: right_call(dropout_seed=_u(4)),
    ),
)  # fmt: skip

WRONG_RESULTS: tuple[WrongCall, ...] = (
    WrongCall(
        "score_fn gives nothing", TypeError,
        "score_fn: expected a result of float32 and shape (2, 4, 6, 6), those of score, got None. Return score "
        "changed; convert what is added to it to its dtype.",
        lambda: right_call(score_fn=lambda score, b, h, q_index, kv_index: None),
    ),
    WrongCall(
        "score_fn gives a number", TypeError,
        "score_fn: expected a result of float32 and shape (2, 4, 6, 6), those of score, got float 0.5. Return score "
        "changed; convert what is added to it to its dtype.",
        lambda: right_call(score_fn=lambda score, b, h, q_index, kv_index: 0.5),
    ),
    WrongCall(
        "score_fn gives bool", TypeError,
        "score_fn: expected a result of float32 and shape (2, 4, 6, 6), those of score, got bool of shape (2, 4, 6, "
        "6). Return score changed; convert what is added to it to its dtype.",
        lambda: right_call(score_fn=lambda score, b, h, q_index, kv_index: score > kv_index),
    ),
    WrongCall(
        "score_fn forgets the score", ValueError,
        "score_fn: expected a result of float32 and shape (2, 4, 6, 6), those of score, got float32 of shape "
        "(1, 1, 6, 6). Return score changed, pair by pair: score + table[h, kv_index], for example.",
        lambda: right_call(score_fn=lambda score, b, h, q_index, kv_index: 0.5 * (kv_index - q_index)),
    ),
    WrongCall(
        "score_fn drops keys", ValueError,
        "score_fn: expected a result of float32 and shape (2, 4, 6, 6), those of score, got float32 of shape "
        "(2, 4, 6, 3). Return score changed, pair by pair: score + table[h, kv_index], for example.",
        lambda: right_call(score_fn=lambda score, b, h, q_index, kv_index: score[..., ::2]),
    ),
    WrongCall(
        "mask_fn gives a bool of Python", TypeError,
        "mask_fn: expected a result of bool, each axis 1 or full, against (b, h, i, j) = (2, 4, 6, 6), got bool True. "
        "Compare, and combine with &, | and ~; what changes scores is a score_fn.",
        lambda: right_call(mask_fn=lambda b, h, q_index, kv_index: True),
    ),
    WrongCall(
        "mask_fn gives floats", TypeError,
        "mask_fn: expected a result of bool, each axis 1 or full, against (b, h, i, j) = (2, 4, 6, 6), got float32 of "
        "shape (1, 1, 6, 6). Compare, and combine with &, | and ~; what changes scores is a score_fn.",
        lambda: right_call(mask_fn=lambda b, h, q_index, kv_index: (q_index >= kv_index) * 1.0),
    ),
    WrongCall(
        "mask_fn gives rank 2", ValueError,
        "mask_fn: expected a result of bool, each axis 1 or full, against (b, h, i, j) = (2, 4, 6, 6), got bool of "
        "shape (6, 6). Its arguments broadcast against each other; keep their axes.",
        lambda: right_call(mask_fn=lambda b, h, q_index, kv_index: (q_index >= kv_index)[0, 0]),
    ),
    WrongCall(
        "mask_fn gives other keys", ValueError,
        "mask_fn: expected a result of bool, each axis 1 or full, against (b, h, i, j) = (2, 4, 6, 6), got bool of "
        "shape (1, 1, 1, 3). Its arguments broadcast against each other; keep their axes.",
        lambda: right_call(mask_fn=lambda b, h, q_index, kv_index: (kv_index > 1)[..., ::2]),
    ),
)  # fmt: skip

WRONG_USES: tuple[WrongCall, ...] = (
    WrongCall(
        "Attend: layout unknown", ValueError,
        "layout: expected one of \"bhnd\", \"bnhd\", got str 'bshd'. bhnd is (batch, heads, length, head size), bnhd "
        "is (batch, length, heads, head size).",
        lambda: {"layout": "bshd"}, "Attend",
    ),
    WrongCall(
        "Attend: is_causal an int", TypeError,
        "is_causal: expected a bool, got int 1. Pass a causal mask that depends on data as mask=.",
        lambda: {"is_causal": 1}, "Attend",
    ),
    WrongCall(
        "Attend: window a bare int", TypeError,
        "window_size: expected a pair (left, right), each a whole number >= 0 or None, got int 3. A window of w "
        "tokens that includes the query's own is (w - 1, 0); None is no bound.",
        lambda: {"window_size": 3}, "Attend",
    ),
    WrongCall(
        "Attend: scale an array", TypeError,
        "scale: expected a number (known in Python, before anything is compiled), got float32 of shape (). If it "
        "is known by then, pass its .tolist(). Pass None for d ** -0.5; a learned or per-head scale multiplies q.",
        lambda: {"scale": _f()}, "Attend",
    ),
    WrongCall(
        "Attend: softcap zero", ValueError,
        "softcap: expected a number > 0, got float 0.0. Pass None for no softcap.",
        lambda: {"softcap": 0.0}, "Attend",
    ),
    WrongCall(
        "Attend: dropout one", ValueError,
        "dropout: expected a probability in [0, 1), got float 1.0. Pass 0 for no dropout.",
        lambda: {"dropout": 1.0}, "Attend",
    ),
    WrongCall(
        "Attend: dropout text", TypeError,
        "dropout: expected a number, got str '0.1'. Pass 0 for no dropout.",
        lambda: {"dropout": "0.1"}, "Attend",
    ),
    WrongCall(
        "Attend: flash an int", TypeError,
        "flash: expected None, True or False, got int 1. None chooses, True allows no q_len x kv_len array, False"
        " is einsum.",
        lambda: {"flash": 1}, "Attend",
    ),
    WrongCall(
        "Attend: flash a NumPy bool", TypeError,
        "flash: expected None, True or False, got numpy bool True. None chooses, True allows no q_len x kv_len "
        "array, False is einsum.",
        lambda: {"flash": np.True_}, "Attend",
    ),
    WrongCall(
        "Attend: flash text", TypeError,
        "flash: expected None, True or False, got str 'einsum'. None chooses, True allows no q_len x kv_len "
        "array, False is einsum.",
        lambda: {"flash": "einsum"}, "Attend",
    ),
    WrongCall(
        "Attend: flash with implementation", ValueError,
        "implementation: expected None where flash is given, got str 'einsum'. flash says what the implementation"
        " may do, implementation says which it is: pass one of them.",
        lambda: {"flash": True, "implementation": "einsum"}, "Attend",
    ),
    WrongCall(
        "Attend: flash off with implementation", ValueError,
        "implementation: expected None where flash is given, got tuple (str 'sdpa', str 'einsum'). flash says "
        "what the implementation may do, implementation says which it is: pass one of them.",
        lambda: {"flash": False, "implementation": ("sdpa", "einsum")}, "Attend",
    ),
    WrongCall(
        "Attend: implementation unknown", ValueError,
        f"implementation: expected one of {_NAMES}, got str 'flash3'. Pass None for the fastest that can.",
        lambda: {"implementation": "flash3"}, "Attend",
    ),
    WrongCall(
        "Attend: implementation a number", TypeError,
        f"implementation: expected None, a name, or a sequence of names, got int 3. The names are {_NAMES}.",
        lambda: {"implementation": 3}, "Attend",
    ),
    WrongCall(
        "merge: layout unknown", ValueError,
        "layout: expected one of \"bhnd\", \"bnhd\", got str 'bshd'. bhnd is (batch, heads, length, head size), bnhd "
        "is (batch, length, heads, head size).",
        lambda: {"outs": [_f(2, 4, 6, 8)], "lses": [_f(2, 4, 6)], "layout": "bshd"}, "merge",
    ),
    WrongCall(
        "merge: outs an array", TypeError,
        "outs: expected a list or tuple of arrays, got float32 of shape (2, 4, 6, 8). One array for each part.",
        lambda: {"outs": _f(2, 4, 6, 8), "lses": [_f(2, 4, 6)]}, "merge",
    ),
    WrongCall(
        "merge: lses none", TypeError,
        "lses: expected a list or tuple of arrays, got None. One array for each part.",
        lambda: {"outs": [_f(2, 4, 6, 8)], "lses": None}, "merge",
    ),
    WrongCall(
        "merge: no parts", ValueError,
        "lses: expected as many parts as outs, and at least one, got 0 for 0. Pass what attend(..., "
        "return_lse=True) gave for each part.",
        lambda: {"outs": [], "lses": []}, "merge",
    ),
    WrongCall(
        "merge: a part without lse", ValueError,
        "lses: expected as many parts as outs, and at least one, got 1 for 2. Pass what attend(..., "
        "return_lse=True) gave for each part.",
        lambda: {"outs": [_f(2, 4, 6, 8)] * 2, "lses": [_f(2, 4, 6)]}, "merge",
    ),
    WrongCall(
        "merge: out a list", TypeError,
        "outs[0]: expected an array of the framework that is called, got list (float 1.0). attend_torch takes "
        "torch tensors, attend_jax takes JAX and NumPy arrays.",
        lambda: {"outs": [[1.0]], "lses": [_f(2, 4, 6)]}, "merge",
    ),
    WrongCall(
        "merge: lse none", TypeError,
        "lses[0]: expected an array of the framework that is called, got None. attend_torch takes torch tensors, "
        "attend_jax takes JAX and NumPy arrays.",
        lambda: {"outs": [_f(2, 4, 6, 8)], "lses": [None]}, "merge",
    ),
    WrongCall(
        "merge: out integers", TypeError,
        "outs[0]: expected one of float16, bfloat16, float32, float64, got int32 of shape (2, 4, 6, 8). Pass what"
        " attend(..., return_lse=True) gave for each part.",
        lambda: {"outs": [_i(2, 4, 6, 8)], "lses": [_f(2, 4, 6)]}, "merge",
    ),
    WrongCall(
        "merge: outs of two dtypes", TypeError,
        "outs[1]: expected float32, the dtype of outs[0], got float16 of shape (2, 4, 6, 8). Give all parts one "
        "dtype.",
        lambda: {"outs": [_f(2, 4, 6, 8), _f(2, 4, 6, 8).astype(np.float16)], "lses": [_f(2, 4, 6)] * 2}, "merge",
    ),
    WrongCall(
        "merge: out rank 3", ValueError,
        "outs[0]: expected rank 4, (b, h, i, dv), got float32 of shape (4, 6, 8). Pass what attend(..., "
        "return_lse=True) gave.",
        lambda: {"outs": [_f(4, 6, 8)], "lses": [_f(4, 6)]}, "merge",
    ),
    WrongCall(
        "merge: outs of two shapes", ValueError,
        "outs[1]: expected the shape of outs[0], (2, 4, 6, 8), got float32 of shape (2, 4, 5, 8). Parts split the"
        " keys, not the queries.",
        lambda: {"outs": [_f(2, 4, 6, 8), _f(2, 4, 5, 8)], "lses": [_f(2, 4, 6), _f(2, 4, 5)]}, "merge",
    ),
    WrongCall(
        "merge: lse float16", TypeError,
        "lses[0]: expected one of float32, float64, got float16 of shape (2, 4, 6). Pass what attend(..., "
        "return_lse=True) gave for each part.",
        lambda: {"outs": [_f(2, 4, 6, 8)], "lses": [_f(2, 4, 6).astype(np.float16)]}, "merge",
    ),
    WrongCall(
        "merge: lse in the layout of out", ValueError,
        "lses[0]: expected shape (b, h, i) = (2, 4, 6), got float32 of shape (2, 6, 4). lse is (b, h, i) in both "
        "layouts; is layout right?",
        lambda: {"outs": [_f(2, 6, 4, 8)], "lses": [_f(2, 6, 4)], "layout": "bnhd"}, "merge",
    ),
    WrongCall(
        "merge: lse rank 4", ValueError,
        "lses[0]: expected shape (b, h, i) = (2, 4, 6), got float32 of shape (2, 4, 6, 1). lse is (b, h, i) in "
        "both layouts; is layout right?",
        lambda: {"outs": [_f(2, 4, 6, 8)], "lses": [_f(2, 4, 6, 1)]}, "merge",
    ),
    WrongCall(
        "additive: a boolean mask", TypeError,
        "additive: expected floating-point numbers, (b, j) or rank 4 against (b, h, i, j), got bool of shape (2, "
        "6). A boolean mask needs no conversion, and 0/1 integers only != 0.",
        lambda: {"additive": _t(2, 6)}, "convert.mask_from_additive",
    ),
    WrongCall(
        "additive: integers", TypeError,
        "additive: expected floating-point numbers, (b, j) or rank 4 against (b, h, i, j), got int32 of shape (2,"
        " 6). A boolean mask needs no conversion, and 0/1 integers only != 0.",
        lambda: {"additive": _i(2, 6)}, "convert.mask_from_additive",
    ),
    WrongCall(
        "additive: none", TypeError,
        "additive: expected floating-point numbers, (b, j) or rank 4 against (b, h, i, j), got None. A boolean "
        "mask needs no conversion, and 0/1 integers only != 0.",
        lambda: {"additive": None}, "convert.mask_from_additive",
    ),
    WrongCall(
        "additive: rank 3", ValueError,
        "additive: expected floating-point numbers, (b, j) or rank 4 against (b, h, i, j), got float32 of shape "
        "(2, 6, 6). A boolean mask needs no conversion, and 0/1 integers only != 0.",
        lambda: {"additive": _f(2, 6, 6)}, "convert.mask_from_additive",
    ),
    WrongCall(
        "ignore: floats", TypeError,
        "ignore: expected bool, (b, j) or rank 4 against (b, h, i, j), got float32 of shape (2, 6). "
        "mask_from_additive takes what is added to scores, mask_from_mha a rank-3 attn_mask.",
        lambda: {"ignore": _f(2, 6)}, "convert.mask_from_ignore",
    ),
    WrongCall(
        "ignore: rank 1", ValueError,
        "ignore: expected bool, (b, j) or rank 4 against (b, h, i, j), got bool of shape (6,). mask_from_additive"
        " takes what is added to scores, mask_from_mha a rank-3 attn_mask.",
        lambda: {"ignore": _t(6)}, "convert.mask_from_ignore",
    ),
    WrongCall(
        "attn_mask: floats", TypeError,
        "attn_mask: expected bool, (i, j) or (b * num_heads, i, j), got float32 of shape (6, 6). Pass an additive"
        " attn_mask as bias=, with rank 4.",
        lambda: {"attn_mask": _f(6, 6), "num_heads": 4}, "convert.mask_from_mha",
    ),
    WrongCall(
        "attn_mask: rank 4", ValueError,
        "attn_mask: expected bool, (i, j) or (b * num_heads, i, j), got bool of shape (2, 4, 6, 6). Pass an "
        "additive attn_mask as bias=, with rank 4.",
        lambda: {"attn_mask": _t(2, 4, 6, 6), "num_heads": 4}, "convert.mask_from_mha",
    ),
    WrongCall(
        "attn_mask: not a multiple of the heads", ValueError,
        "attn_mask: expected a first axis of b * num_heads, a multiple of 4, got bool of shape (6, 6, 6). Is "
        "num_heads right?",
        lambda: {"attn_mask": _t(6, 6, 6), "num_heads": 4}, "convert.mask_from_mha",
    ),
    WrongCall(
        "num_heads: 0", ValueError,
        "num_heads: expected a whole number >= 1, got int 0. It is that of the torch.nn.MultiheadAttention.",
        lambda: {"attn_mask": _t(8, 6, 6), "num_heads": 0}, "convert.mask_from_mha",
    ),
    WrongCall(
        "num_heads: a float", TypeError,
        "num_heads: expected a whole number >= 1, got float 4.0. It is that of the torch.nn.MultiheadAttention.",
        lambda: {"attn_mask": _t(8, 6, 6), "num_heads": 4.0}, "convert.mask_from_mha",
    ),
    WrongCall(
        "cu_seqlens: floats", TypeError,
        "cu_seqlens: expected integers (n + 1,), got float32 of shape (3,). It is [0, n1, n1 + n2, ...], as "
        "flash-attn's varlen takes it.",
        lambda: {"cu_seqlens": _f(3), "length": 6}, "convert.segments_from_cu_seqlens",
    ),
    WrongCall(
        "cu_seqlens: a list", TypeError,
        "cu_seqlens: expected integers (n + 1,), got list (int 0, int 2, int 6). It is [0, n1, n1 + n2, ...], as "
        "flash-attn's varlen takes it.",
        lambda: {"cu_seqlens": [0, 2, 6], "length": 6}, "convert.segments_from_cu_seqlens",
    ),
    WrongCall(
        "cu_seqlens: rank 2", ValueError,
        "cu_seqlens: expected integers (n + 1,), got int32 of shape (1, 3). It is [0, n1, n1 + n2, ...], as "
        "flash-attn's varlen takes it.",
        lambda: {"cu_seqlens": _i(1, 3), "length": 6}, "convert.segments_from_cu_seqlens",
    ),
    WrongCall(
        "length: negative", ValueError,
        "length: expected a whole number >= 0, got int -1. It is the packed length, padding included.",
        lambda: {"cu_seqlens": _i(3), "length": -1}, "convert.segments_from_cu_seqlens",
    ),
    WrongCall(
        "length: an array", TypeError,
        "length: expected a whole number >= 0, got int32 of shape (). It is the packed length, padding included.",
        lambda: {"cu_seqlens": _i(3), "length": _i()}, "convert.segments_from_cu_seqlens",
    ),
    WrongCall(
        "lengths: floats", TypeError,
        "lengths: expected integers (b,), got float32 of shape (2,). The number of real tokens of each item.",
        lambda: {"lengths": _f(2), "kv_len": 6}, "convert.mask_from_left_padding",
    ),
    WrongCall(
        "lengths: rank 2", ValueError,
        "lengths: expected integers (b,), got int32 of shape (2, 1). The number of real tokens of each item.",
        lambda: {"lengths": _i(2, 1), "kv_len": 6}, "convert.mask_from_left_padding",
    ),
    WrongCall(
        "kv_len: none", TypeError,
        "kv_len: expected a whole number >= 0, got None. It is the padded length.",
        lambda: {"lengths": _i(2), "kv_len": None}, "convert.mask_from_left_padding",
    ),
    WrongCall(
        "key: an int", TypeError,
        "key: expected a JAX key, or its words as jax.random.key_data gives them: uint32 (2,) or (4,), got int 3."
        " Keys go one at a time; split a batch of keys first.",
        lambda: {"key": 3}, "convert.seed_from_key",
    ),
    WrongCall(
        "key: none", TypeError,
        "key: expected a JAX key, or its words as jax.random.key_data gives them: uint32 (2,) or (4,), got None. "
        "Keys go one at a time; split a batch of keys first.",
        lambda: {"key": None}, "convert.seed_from_key",
    ),
    WrongCall(
        "key: a batch of keys", TypeError,
        "key: expected a JAX key, or its words as jax.random.key_data gives them: uint32 (2,) or (4,), got uint32"
        " of shape (5, 2). Keys go one at a time; split a batch of keys first.",
        lambda: {"key": _u(5, 2)}, "convert.seed_from_key",
    ),
    WrongCall(
        "key: other integers", TypeError,
        "key: expected a JAX key, or its words as jax.random.key_data gives them: uint32 (2,) or (4,), got int32 "
        "of shape (2,). Keys go one at a time; split a batch of keys first.",
        lambda: {"key": _i(2)}, "convert.seed_from_key",
    ),
)  # fmt: skip

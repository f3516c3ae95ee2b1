"""The door: every argument of `attend` is checked here, once, and becomes one canonical form.

Behind the door there are two things. `Call` says everything about a call that is not data: shapes, dtypes, the
options. It is hashable, so it is a static argument of a JAX jit and all that an implementation may look at before it
serves or refuses. `Arrays` carries the data. Nothing here reads an array's contents.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

DTYPES = ("float16", "bfloat16", "float32", "float64")
# Of implementations of either framework.
NAMES = ("fa4", "fa3", "sdpa", "cudnn", "triton", "flex", "blockwise", "xla", "rowwise", "einsum")
LAYOUTS = ("bhnd", "bnhd")
LAYOUT_NAMES = 'one of "bhnd", "bnhd"'
LAYOUT_ADVICE = "bhnd is (batch, heads, length, head size), bnhd is (batch, length, heads, head size)."
SCORE_FN, MASK_FN = "(score, b, h, q_index, kv_index)", "(b, h, q_index, kv_index)"
LARGEST = sys.float_info.max
FAR = 2**30  # a distance between positions that no array reaches; offsets are cut to it, so that 32 bits hold them


_new = tuple.__new__  # what a NamedTuple's own constructor calls, at half the cost; the door is paid on every call


class Framework(NamedTuple):
    """What the door must know of a framework, so that it needs to import none.

    Args:
        name: "torch" or "jax".
        arrays: the type, or types, of this framework's arrays.
        dtype: an array's dtype by its plain name, for example "bfloat16".
        device: an array's device, to be compared and shown, or None where it has no say in where the call runs.
        platform: where a call on this query runs: "cpu", "cuda", "tpu" or "meta".
        has_float64: whether float64 arrays stay float64 here (JAX: only with x64).
        wants_gradient: whether a gradient may be asked of an array (JAX cannot know: always True).
        takes_int64_seed: whether an int64 scalar array is a dropout_seed here.
        is_dense: whether an array is a plain one of its shape, neither sparse nor nested.
    """

    name: str
    arrays: type | tuple[type, ...]
    dtype: Callable[[Any], str]
    device: Callable[[Any], Any]
    platform: Callable[[Any], str]
    has_float64: Callable[[], bool]
    wants_gradient: Callable[[Any], bool]
    takes_int64_seed: bool
    is_dense: Callable[[Any], bool] = lambda array: True


class Call(NamedTuple):
    """Everything about a call that is not data, in one canonical form.

    Letters: b batch, h query heads, hk key/value heads, i query length, j key length, d head size, dv value head size.

    Attributes:
        framework, platform: "torch" or "jax", and where it runs.
        dtype: of q, k, v and out.
        b, h, hk, i, j, d, dv: the sizes.
        layout: the caller's layout; `Arrays` is (b h n d) whatever it is.
        mask: the rank-4 shape of the mask against (b, h, i, j), or None. A rank-2 key mask counts as (b, 1, 1, j).
        bias, bias_dtype: the same for the bias, with its dtype.
        left, right: key j is allowed for query t where t + offset - left <= j <= t + offset + right; None is no bound.
            is_causal is right = 0. A bound that can exclude nothing, as far as the offset is known, is None.
        offset: "zero", "end" (kv_len - q_len), or "data": then it is `Arrays.q_offset`.
        segments, q_lengths, kv_lengths: whether they are given.
        sinks: their dtype, or None.
        softcap, scale, dropout: floats; softcap None is off.
        return_lse: whether lse is wanted.
        bias_gradient: whether there is a bias of which a gradient may be asked.
        biased_gradient: whether there is a bias, and a gradient may be asked of q, k or v.
        gradient: whether a gradient may be asked of any array.
        flash: None, or True where an array of q_len x kv_len is not allowed.
        names: the implementations that were asked for, or None for a choice.
        custom: whether there is a score_fn or a mask_fn.
        score_fn, mask_fn: None, or the caller's functions, as `attend` describes them. What they capture is no part of
            a call: JAX makes them programs over data before a call is compared with others.
        one_length: whether one array is both q_lengths and kv_lengths.
        runs: what segment ids are, where they were looked at (`attend_shared.runs`): then the starts of runs stand for
            ids in `Arrays`.
        sequences: how many runs there are, empty ones too. longest: how many tokens the longest has, or more, where an
            implementation asks for it.
    """

    framework: str
    platform: str
    dtype: str
    b: int
    h: int
    hk: int
    i: int
    j: int
    d: int
    dv: int
    layout: str
    mask: tuple[int, ...] | None
    bias: tuple[int, ...] | None
    bias_dtype: str | None
    left: int | None
    right: int | None
    offset: str
    segments: bool
    q_lengths: bool
    kv_lengths: bool
    sinks: str | None
    softcap: float | None
    scale: float
    dropout: float
    return_lse: bool
    bias_gradient: bool
    biased_gradient: bool
    gradient: bool
    flash: bool | None
    names: tuple[str, ...] | None
    custom: bool = False
    score_fn: Callable[..., Any] | None = None
    mask_fn: Callable[..., Any] | None = None
    one_length: bool = False
    runs: str = ""
    sequences: int = 0
    longest: int = 0

    @property
    def accumulation(self) -> str:
        """The dtype in which logits, softmax, lse and sums are kept."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def positional(self) -> bool:
        """Whether positions rule anything out."""
        return self.left is not None or self.right is not None

    @property
    def masked(self) -> bool:
        """Whether anything at all may be ruled out, but for a bias of -inf."""
        return self.mask is not None or self.positional or self.segments or self.q_lengths or self.kv_lengths

    @property
    def key_masked(self) -> bool:
        """Whether the mask excludes keys for whole batch items: its head and query axes are both 1."""
        return self.mask is not None and self.mask[1] == 1 and self.mask[2] == 1

    @property
    def is_empty(self) -> bool:
        """Whether there is no logit to compute."""
        return self.b == 0 or self.i == 0 or self.j == 0


class Arrays(NamedTuple):
    """The data of a call. Behind the door: (b h n d), masks and biases of rank 4, both segment ids or none.

    Attributes:
        q, k, v: (b h i d), (b hk j d), (b hk j dv).
        mask: bool, rank 4, or None. bias: rank 4, or None.
        q_offset: None, a Python int, or an integer array () or (b,).
        q_segment_ids, kv_segment_ids: integers (b i) and (b j), or None.
        q_lengths, kv_lengths: integers (b,), or None.
        sinks: (h,), or None.
        dropout_seed: the key of the random numbers, as the framework carries it, or None.
    """

    q: Any
    k: Any
    v: Any
    mask: Any = None
    bias: Any = None
    q_offset: Any = None
    q_segment_ids: Any = None
    kv_segment_ids: Any = None
    q_lengths: Any = None
    kv_lengths: Any = None
    sinks: Any = None
    dropout_seed: Any = None


def dtype_of(array: Any) -> str:
    """The plain name of an array's dtype; of NumPy's other byte order as NumPy writes it, ">f4".

    Example:
        >>> dtype_of(np.zeros(2, np.float32)), dtype_of(np.zeros(2, ">f4"))
        ('float32', '>f4')
    """
    dtype = array.dtype
    if not getattr(dtype, "isnative", True):
        return str(dtype.str)
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def describe(value: Any) -> str:
    """A value in words that do not depend on the framework: dtypes without prefix, shapes as tuples.

    Example:
        >>> describe(np.zeros((2, 3), np.float32)), describe(3), describe("x"), describe(None)
        ('float32 of shape (2, 3)', 'int 3', "str 'x'", 'None')
    """
    if value is None:
        return "None"
    if hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, np.generic):
        return f"{dtype_of(value)} of shape {_shape(value)}"
    kind = type(value).__name__
    if isinstance(value, np.bool_):  # where Python's alone will do
        return f"numpy bool {value.item()!r}"
    if isinstance(value, np.generic):
        return f"{kind} {value.item()!r}"
    if isinstance(value, int) and value.bit_length() > 80:
        return f"{kind} of {value.bit_length()} bits"
    if isinstance(value, (bool, int, float, complex, str)):
        shown = repr(value)
        return f"{kind} {shown if len(shown) <= 60 else shown[:57] + '...'}"
    if isinstance(value, (tuple, list)):
        items = [describe(item) for item in value[:4]] + ["..."] * (len(value) > 4)
        return f"{kind} ({', '.join(items)})"
    return kind


def check(
    framework: Framework,
    arrays: Arrays,
    is_causal: Any,
    window_size: Any,
    softcap: Any,
    scale: Any,
    dropout: Any,
    return_lse: Any,
    layout: Any,
    implementation: Any,
    flash: bool | None = None,
    score_fn: Any = None,
    mask_fn: Any = None,
) -> Call:
    """Check the arguments of `attend` in one fixed order and say what they mean.

    Args:
        framework: how this framework's arrays are looked at.
        arrays: the data as the caller passed it.
        is_causal, window_size, softcap, scale, dropout, return_lse, layout, implementation: as in `attend`.
        flash: as in `Attend`; False is the implementation "einsum".
        score_fn, mask_fn: as in `attend`. They are called where scores are made, not here.

    Returns:
        The call; `canonical` gives the data its form.

    Raises:
        TypeError, ValueError: a wrong argument, with its name, what was expected, what came and what to try.
    """
    q, k, v, mask, bias, q_offset, q_segment_ids, kv_segment_ids, q_lengths, kv_lengths, sinks, seed = arrays
    if not (isinstance(layout, str) and layout in LAYOUTS):
        raise wrong(ValueError, "layout", LAYOUT_NAMES, layout, LAYOUT_ADVICE)
    b, h, hk, i, j, d, dv = _sizes(framework, q, k, v, layout)
    dtype = _qkv_dtype(framework, q, k, v)

    is_causal, left, right, softcap, scale, dropout = _options(is_causal, window_size, softcap, scale, dropout)
    windowed = left is not None or right is not None
    if is_causal:
        right = 0 if right is None else min(right, 0)
    scale = d**-0.5 if scale is None else scale
    if return_lse is not True and return_lse is not False and not isinstance(return_lse, np.bool_):
        raise _static("return_lse", "a bool", return_lse, "It decides what is returned, so it cannot be data.")
    names = None if implementation is None and flash is None else _names(implementation, flash)
    custom = False
    if score_fn is not None or mask_fn is not None:
        custom = _functions(score_fn, mask_fn)

    if mask is not None:
        mask = _mask_shape(framework, mask, b, h, i, j)
    bias_dtype = None
    if bias is not None:
        bias_dtype = _float_array(framework, "bias", bias)
        bias = _rank4("bias", bias, b, h, i, j)
    offset = "zero"
    if q_offset is not None:
        offset, left, right = _offset(framework, q_offset, b, i, j, left, right)
    elif i != j and (is_causal or windowed):
        queries, keys = f"{i} quer{'y' if i == 1 else 'ies'}", f"{j} key{'' if j == 1 else 's'}"
        raise wrong(
            ValueError, "q_offset", f"a value, since {queries} against {keys} can be aligned in two ways", None,
            "Pass q_offset=0 (query t sits at key t, as in torch SDPA and jax.nn) "
            f"or q_offset=kv_len - q_len, here {j - i} "
            "(the last query sits at the last key, as in flash-attn and cached decoding).")  # fmt: skip
    segments = False
    if q_segment_ids is not None or kv_segment_ids is not None:
        segments = _segments(framework, q_segment_ids, kv_segment_ids, b, i, j)
    if q_lengths is not None:
        check_integers(framework, "q_lengths", q_lengths, ((b,),), "(b,)", "One length for each batch item.")
    if kv_lengths is not None:
        check_integers(framework, "kv_lengths", kv_lengths, ((b,),), "(b,)", "One length for each batch item.")
    sinks_dtype = None
    if sinks is not None:
        sinks_dtype = _float_array(framework, "sinks", sinks)
        if _shape(sinks) != (h,):
            raise wrong(ValueError, "sinks", f"shape (h,) = ({h},)", sinks, "One extra logit for each query head.")
    if seed is not None:
        _seed(framework, seed)
    elif dropout > 0:
        raise wrong(ValueError, "dropout_seed", "an int in [0, 2**64) or a uint32 array (2,) where dropout > 0", None,
                     "Pass a fresh seed for each step, or dropout=0 for none; "
                     "a Flax module can draw one from its rngs.")  # fmt: skip
    extras = (
        mask is not None
        or bias is not None
        or q_offset is not None
        or segments
        or sinks is not None
        or seed is not None
    )
    extras = extras or q_lengths is not None or kv_lengths is not None
    home = framework.device(q)
    if extras or not (framework.device(k) == framework.device(v) == home):
        _same_device(framework, arrays, home)

    wanted = framework.wants_gradient
    of_qkv, of_bias = wanted(q) or wanted(k) or wanted(v), bias is not None and wanted(arrays.bias)
    return _new(Call, (
        framework.name, framework.platform(q), dtype, b, h, hk, i, j, d, dv, layout, mask, bias, bias_dtype,
        left, right, offset if left is not None or right is not None else "zero", segments,
        q_lengths is not None, kv_lengths is not None, sinks_dtype, softcap, scale, dropout, bool(return_lse),
        of_bias, bias is not None and of_qkv, of_qkv or of_bias or (sinks is not None and wanted(sinks)),
        flash or None, names, custom, score_fn, mask_fn, q_lengths is not None and q_lengths is kv_lengths, "", 0, 0,
    ))  # fmt: skip


def check_module(
    dropout: Any, flash: Any, scale: Any, is_causal: Any, window_size: Any, softcap: Any, layout: Any,
    implementation: Any,
) -> tuple[tuple[int | None, int | None] | None, tuple[str, ...] | str | None]:  # fmt: skip
    """Check what `Attend` is made with, when it is made, by the same rules and in the same words as `attend`.

    Returns:
        window_size and implementation, lists turned into tuples.

    Raises:
        TypeError, ValueError: a wrong argument.
    """
    if not (isinstance(layout, str) and layout in LAYOUTS):
        raise wrong(ValueError, "layout", LAYOUT_NAMES, layout, LAYOUT_ADVICE)
    _options(is_causal, window_size, softcap, scale, dropout)
    if flash is not None and flash is not True and flash is not False:
        raise wrong(
            TypeError,
            "flash",
            "None, True or False",
            flash,
            "None chooses, True allows no q_len x kv_len array, False is einsum.",
        )
    if flash is not None and implementation is not None:
        raise wrong(ValueError, "implementation", "None where flash is given", implementation,
                     "flash says what the implementation may do, implementation says which it is: "
                     "pass one of them.")  # fmt: skip
    names = _names(implementation, None)
    window = None if window_size is None else (window_size[0], window_size[1])
    return window, implementation if isinstance(implementation, str) else names


def _functions(score_fn: Any, mask_fn: Any) -> bool:
    if score_fn is not None and not callable(score_fn):
        raise wrong(TypeError, "score_fn", f"None, or a function {SCORE_FN} of scores", score_fn,
                     "An array of what is added to scores is bias=.")  # fmt: skip
    if mask_fn is not None and not callable(mask_fn):
        raise wrong(TypeError, "mask_fn", f"None, or a function {MASK_FN} of bool", mask_fn,
                     "An array of which pairs are allowed is mask=.")  # fmt: skip
    return True


def _options(
    is_causal: Any, window_size: Any, softcap: Any, scale: Any, dropout: Any
) -> tuple[bool, int | None, int | None, float | None, float | None, float]:
    """The options that decide about numbers: is_causal, left, right, softcap, scale, dropout."""
    if is_causal is not True and is_causal is not False and not isinstance(is_causal, np.bool_):
        raise _static("is_causal", "a bool", is_causal, "Pass a causal mask that depends on data as mask=.")
    left, right = (None, None) if window_size is None else _window(window_size)
    if scale is not None:
        scale = number("scale", scale, "Pass None for d ** -0.5; a learned or per-head scale multiplies q.")
    if softcap is not None:
        softcap = number("softcap", softcap, "Pass None for no softcap.")
        if not softcap > 0:
            raise wrong(ValueError, "softcap", "a number > 0", softcap, "Pass None for no softcap.")
        softcap = softcap if softcap < 1e30 else None  # cap * tanh(x / cap) is x there, and float32 has no 1e39
    if dropout.__class__ is not float or dropout:
        dropout = number("dropout", dropout, "Pass 0 for no dropout.")
        if not 0 <= dropout < 1:
            raise wrong(ValueError, "dropout", "a probability in [0, 1)", dropout, "Pass 0 for no dropout.")
    return bool(is_causal), left, right, softcap, scale, dropout


def canonical(call: Call, arrays: Arrays) -> Arrays:
    """Give the data its one form: (b h n d), rank-4 mask and bias, both segment ids, and nothing that has no effect.

    Written with indexing and `swapaxes`, which NumPy, torch and JAX arrays share; every step is a view.
    """
    changes: dict[str, Any] = {}
    if call.layout == "bnhd":
        changes = {name: getattr(arrays, name).swapaxes(1, 2) for name in ("q", "k", "v")}
    if call.mask is not None and len(arrays.mask.shape) == 2:
        changes["mask"] = arrays.mask[:, None, None, :]
    if call.segments:
        q_ids, kv_ids = arrays.q_segment_ids, arrays.kv_segment_ids
        changes["q_segment_ids"] = kv_ids if q_ids is None else q_ids
        changes["kv_segment_ids"] = q_ids if kv_ids is None else kv_ids
    if call.offset != "data":
        if arrays.q_offset is not None:
            changes["q_offset"] = None
    elif isinstance(arrays.q_offset, np.integer):
        changes["q_offset"] = min(max(int(arrays.q_offset), -FAR), FAR)
    elif isinstance(arrays.q_offset, int) and not -FAR <= arrays.q_offset <= FAR:
        changes["q_offset"] = FAR if arrays.q_offset > 0 else -FAR
    if arrays.dropout_seed is not None and not call.dropout:
        changes["dropout_seed"] = None
    return arrays._replace(**changes) if changes else arrays


def wrong(error: type[Exception], argument: str, expected: str, got: Any, advice: str) -> Exception:
    """The one form of all texts: which argument, what was expected, what came, what to try."""
    return error(f"{argument}: expected {expected}, got {describe(got)}. {advice}")


def _static(argument: str, expected: str, got: Any, advice: str) -> Exception:
    """A TypeError for a static argument; arrays, which a jit would trace, get told apart."""
    if hasattr(got, "shape") and hasattr(got, "dtype") and not isinstance(got, np.generic):
        expected = f"{expected} (known in Python, before anything is compiled)"
        advice = f"If it is known by then, pass its .tolist(). {advice}"
    return wrong(TypeError, argument, expected, got, advice)


def _shape(array: Any) -> tuple[int, ...]:
    return tuple(array.shape)


def check_array(framework: Framework, argument: str, value: Any) -> None:
    """Raise TypeError unless the value is an array of this framework."""
    if not isinstance(value, framework.arrays):
        whose = f"It is of {type(value).__module__.partition('.')[0]}; " if hasattr(value, "dtype") else ""
        raise wrong(TypeError, argument, "an array of the framework that is called", value,
                     f"{whose}attend_torch takes torch tensors, attend_jax takes JAX and NumPy arrays.")  # fmt: skip
    if not framework.is_dense(value):
        raise TypeError(
            f"{argument}: expected a dense array, got one that is sparse or nested. Sequences of many lengths are one "
            "array padded, with q_lengths and kv_lengths, or packed, with segment ids."
        )


def _foreign(framework: Framework, argument: str, value: Any) -> None:
    """Raise TypeError where the value is an array, but of another framework, whose dtype and shape may be right."""
    if hasattr(value, "dtype") and not isinstance(value, np.generic):
        check_array(framework, argument, value)


def _sizes(framework: Framework, q: Any, k: Any, v: Any, layout: str) -> tuple[int, ...]:
    types, dense = framework.arrays, framework.is_dense
    if not (
        isinstance(q, types) and isinstance(k, types) and isinstance(v, types) and dense(q) and dense(k) and dense(v)
    ):
        for name, value in (("q", q), ("k", k), ("v", v)):
            check_array(framework, name, value)
            _rank(name, value, layout)
    of_q, of_k, of_v = q.shape, k.shape, v.shape
    if not len(of_q) == len(of_k) == len(of_v) == 4:
        for name, value in (("q", q), ("k", k), ("v", v)):
            _rank(name, value, layout)
    if layout == "bhnd":
        (b, h, i, d), (kb, hk, j, kd), (vb, vh, vj, dv) = of_q, of_k, of_v
    else:
        (b, i, h, d), (kb, j, hk, kd), (vb, vj, vh, dv) = of_q, of_k, of_v
    if kb != b or kd != d or vb != b or vh != hk or vj != j or not hk or h % hk or not h or not d or not dv:
        _wrong_sizes(q, k, v, layout, (b, h, d), (kb, hk, j, kd), (vb, vh, vj, dv))
    return b, h, hk, i, j, d, dv


def _rank(name: str, value: Any, layout: str) -> None:
    if len(value.shape) != 4:
        raise wrong(ValueError, name, f"rank 4, {_letters(name, layout)}", value,
                     "Split the heads out of the last axis, and add a batch axis if there is none.")  # fmt: skip


def _letters(name: str, layout: str) -> str:
    heads, length = ("h", "i") if name == "q" else ("hk", "j")
    size = "dv" if name == "v" else "d"
    return f"(b, {heads}, {length}, {size})" if layout == "bhnd" else f"(b, {length}, {heads}, {size})"


def _wrong_sizes(q: Any, k: Any, v: Any, layout: str, of_q: tuple, of_k: tuple, of_v: tuple) -> None:
    b, h, d = of_q
    kb, hk, j, kd = of_k
    vb, vh, vj, _ = of_v
    where = f', in layout "{layout}"'
    if not h or not d:
        expected = f"{_letters('q', layout)} with at least one head and a head size of at least 1{where}"
        raise wrong(ValueError, "q", expected, q,
                     "Only batch and lengths may be 0.")  # fmt: skip
    if kb != b or kd != d:
        raise wrong(ValueError, "k", f"{_letters('k', layout)} with b = {b} and d = {d} as in q{where}", k,
                     f"q has shape {_shape(q)}; is layout right?")  # fmt: skip
    if vb != b or vh != hk or vj != j:
        raise wrong(ValueError, "v", f"{_letters('v', layout)} with b = {b}, hk = {hk} and j = {j} as in k{where}", v,
                     f"k has shape {_shape(k)}; is layout right?")  # fmt: skip
    if not hk or h % hk:
        raise wrong(ValueError, "k", f"a number of key/value heads that divides the {h} heads of q{where}", k,
                     "Query head n reads key/value head n // (h // hk); is layout right?")  # fmt: skip
    raise wrong(ValueError, "v", f"a value head size of at least 1{where}", v, "Only batch and lengths may be 0.")


def _qkv_dtype(framework: Framework, q: Any, k: Any, v: Any) -> str:
    dtype = framework.dtype(q)
    if dtype not in DTYPES:
        raise wrong(TypeError, "q", f"one of {', '.join(DTYPES)}", q, "Convert it first.")
    if not k.dtype == v.dtype == q.dtype:
        name, value = ("k", k) if k.dtype != q.dtype else ("v", v)
        raise wrong(TypeError, name, f"{dtype}, the dtype of q", value, "Give q, k and v one dtype.")
    if dtype == "float64":
        check_float64(framework, "q", q)
    return dtype


def check_float64(framework: Framework, argument: str, value: Any) -> None:
    """Raise TypeError where the framework would shrink a float64 array."""
    if not framework.has_float64():
        raise wrong(TypeError, argument, "a dtype that JAX keeps", value,
                     'float64 needs jax.config.update("jax_enable_x64", True); '
                     "convert to float32 if that is enough.")  # fmt: skip


def _float_array(framework: Framework, argument: str, value: Any) -> str:
    check_array(framework, argument, value)
    dtype = framework.dtype(value)
    if dtype not in DTYPES:
        hint = "Pass a boolean array as mask=." if dtype == "bool" else "Convert it first."
        raise wrong(TypeError, argument, f"one of {', '.join(DTYPES)}", value, hint)
    if dtype == "float64":
        check_float64(framework, argument, value)
    return dtype


def number(argument: str, value: Any, advice: str) -> float:
    """A finite static number as a float; anything else raises."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (float, int, np.floating, np.integer)):
        raise _static(argument, "a number", value, advice)
    try:
        number = float(value)
    except OverflowError:  # an int that no float64 holds
        number = float("inf")
    if not -LARGEST <= number <= LARGEST:  # not math.isfinite: torch.compile may have a symbol here
        raise wrong(ValueError, argument, "a finite number", value, advice)
    return number


def _window(window_size: Any) -> tuple[int | None, int | None]:
    advice = "A window of w tokens that includes the query's own is (w - 1, 0); None is no bound."
    expected = "a pair (left, right), each a whole number >= 0 or None"
    if not isinstance(window_size, (tuple, list)):
        raise _static("window_size", expected, window_size, advice)
    if len(window_size) != 2:
        raise wrong(ValueError, "window_size", expected, window_size, advice)
    bounds: list[int | None] = []
    for bound in window_size:
        if bound is not None:
            if isinstance(bound, (bool, np.bool_)) or not isinstance(bound, (int, np.integer)):
                raise _static("window_size", expected, bound if hasattr(bound, "shape") else window_size, advice)
            if bound < 0:
                raise wrong(ValueError, "window_size", expected, window_size, advice)
            bound = int(bound) if bound < FAR // 2 else None
        bounds.append(bound)
    return bounds[0], bounds[1]


def _names(implementation: Any, flash: bool | None) -> tuple[str, ...] | None:
    if flash is not None:
        return ("einsum",) if flash is False else None
    if implementation is None:
        return None
    if implementation.__class__ is str and implementation in NAMES:
        return (implementation,)
    names = (implementation,) if isinstance(implementation, str) else implementation
    right = isinstance(names, (tuple, list)) and all(isinstance(name, str) for name in names)
    if right and names and all(name in NAMES for name in names):
        return tuple(names)
    listed = ", ".join(f'"{name}"' for name in NAMES)
    if not right:
        raise wrong(
            TypeError,
            "implementation",
            "None, a name, or a sequence of names",
            implementation,
            f"The names are {listed}.",
        )
    raise wrong(ValueError, "implementation", f"one of {listed}", implementation, "Pass None for the fastest that can.")


def _mask_shape(framework: Framework, mask: Any, b: int, h: int, i: int, j: int) -> tuple[int, ...]:
    check_array(framework, "mask", mask)
    if framework.dtype(mask) != "bool":
        raise wrong(TypeError, "mask", "bool, where True means may attend", mask,
                     "Pass additive scores (0 and -inf, ALiBi) as bias=, and integers as mask != 0.")  # fmt: skip
    shape = _shape(mask)
    if len(shape) == 2:
        if shape[0] not in (1, b) or shape[1] != j:
            raise wrong(ValueError, "mask", f"a rank-2 key mask (b, j) = ({b}, {j}) or (1, {j})", mask,
                         "Write a mask of (query, key) as mask[None, None].")  # fmt: skip
        return (shape[0], 1, 1, j)
    return _rank4("mask", mask, b, h, i, j)


def _rank4(argument: str, value: Any, b: int, h: int, i: int, j: int) -> tuple[int, ...]:
    shape = _shape(value)
    if len(shape) != 4:
        ranks = "rank 4, or rank 2 for a key mask" if argument == "mask" else "rank 4"
        raise wrong(ValueError, argument, f"{ranks}, against (b, h, i, j) = ({b}, {h}, {i}, {j})", value,
                     f"Write (i, j) as {argument}[None, None], (b, i, j) as {argument}[:, None], "
                     f"(h, i, j) as {argument}[None], (b, j) as {argument}[:, None, None].")  # fmt: skip
    if any(size not in (1, full) for size, full in zip(shape, (b, h, i, j), strict=True)):
        raise wrong(ValueError, argument, f"each axis 1 or full, against (b, h, i, j) = ({b}, {h}, {i}, {j})", value,
                     "The axes are (b, h, i, j) in both layouts.")  # fmt: skip
    return shape


def is_int(value: Any) -> bool:
    """A Python or NumPy integer; a bool is none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))


def _offset(
    framework: Framework, q_offset: Any, b: int, i: int, j: int, left: int | None, right: int | None
) -> tuple[str, int | None, int | None]:
    """The kind of offset, and the bounds without those that it makes vacuous."""
    if not is_int(q_offset):
        check_integers(
            framework, "q_offset", q_offset, ((), (b,)), "() or (b,)", "Query t sits at key position t + q_offset."
        )
        return "data", left, right
    if isinstance(q_offset, np.integer):  # in its own bits the sums below might wrap
        q_offset = int(q_offset)
    if right is not None and q_offset + right >= j - 1:
        right = None
    if left is not None and i - 1 + q_offset - left <= 0:
        left = None
    return "zero" if q_offset == 0 else "end" if q_offset == j - i else "data", left, right


def check_integers(
    framework: Framework, argument: str, value: Any, shapes: tuple[tuple[int, ...], ...], letters: str, advice: str
) -> None:
    """Raise unless the value is an array of integers, of one of these shapes."""
    expected = f"integers of shape {letters} = {shapes[-1]}"
    if argument == "q_offset":
        expected = f"an int, or {expected}"
    if not isinstance(value, framework.arrays):
        _foreign(framework, argument, value)
        raise wrong(TypeError, argument, expected, value, advice)
    if not framework.dtype(value).startswith(("int", "uint")):
        raise wrong(TypeError, argument, expected, value, advice)
    if _shape(value) not in shapes:
        raise wrong(ValueError, argument, expected, value, advice)


def _segments(framework: Framework, q_ids: Any, kv_ids: Any, b: int, i: int, j: int) -> bool:
    advice = "A query attends to the keys that have its id."
    if q_ids is not None:
        check_integers(framework, "q_segment_ids", q_ids, ((b, i),), "(b, i)", advice)
    if kv_ids is not None:
        check_integers(framework, "kv_segment_ids", kv_ids, ((b, j),), "(b, j)", advice)
    if i != j and (q_ids is None or kv_ids is None):
        missing, letters = (
            ("q_segment_ids", f"(b, i) = ({b}, {i})") if q_ids is None else ("kv_segment_ids", f"(b, j) = ({b}, {j})")
        )
        raise wrong(ValueError, missing, f"integers of shape {letters}", None,
                     "One side may stand for both only where there are as many queries as keys.")  # fmt: skip
    return True


def _seed(framework: Framework, seed: Any) -> None:
    expected = "an int in [0, 2**64) or a uint32 array (2,) = (low, high)"
    advice = "Split a 64-bit seed as (seed % 2**32, seed // 2**32); convert.seed_from_key takes a JAX key."
    if is_int(seed):
        if not 0 <= seed < 2**64:
            raise wrong(ValueError, "dropout_seed", expected, seed, advice)
        return
    if not isinstance(seed, framework.arrays):
        _foreign(framework, "dropout_seed", seed)
        raise wrong(TypeError, "dropout_seed", expected, seed, advice)
    dtype = framework.dtype(seed)
    if framework.takes_int64_seed and dtype == "int64" and _shape(seed) == ():
        return
    if dtype != "uint32":
        raise wrong(TypeError, "dropout_seed", expected, seed, advice)
    if _shape(seed) != (2,):
        raise wrong(ValueError, "dropout_seed", expected, seed, advice)


def _same_device(framework: Framework, arrays: Arrays, home: Any) -> None:
    """All arrays where q is. Scalars in host memory may stay there: sending one along is what every framework does."""
    for name, value in zip(Arrays._fields, arrays, strict=True):
        if not isinstance(value, framework.arrays):
            continue
        place = framework.device(value)
        if (
            place != home
            and place is not None
            and home is not None
            and not (str(place) == "cpu" and _shape(value) == ())
        ):
            raise ValueError(f"{name}: expected device {home}, where q is, got {place}. Move it there first.")

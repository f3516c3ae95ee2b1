"""What `MultiHeadAttention` checks, in the same words in every framework: its options, its inputs and its cache."""

from __future__ import annotations

from typing import Any, NamedTuple

from attend_shared.call import (
    DTYPES,
    Framework,
    check_array,
    check_float64,
    check_integers,
    describe,
    is_int,
    number,
    wrong,
)
from attend_shared.rotary import Rotary, check_fits, check_positions

NORMS = ("rms", "layer")


class Sizes(NamedTuple):
    """The sizes of a layer, none of them None.

    Attributes:
        embed_dim, kv_dim, out_dim: widths of x, of the context, and of what comes out.
        h, hk: query heads, key/value heads. d, dv: size of a head of q and k, of v.
        bias: whether the projections to q, k, v and to the output have one.
    """

    embed_dim: int
    kv_dim: int
    out_dim: int
    h: int
    hk: int
    d: int
    dv: int
    bias: tuple[bool, bool, bool, bool]


class Cache(NamedTuple):
    """Keys and values of what came before: an array of fixed size, passed in and returned.

    Attributes:
        k: (b, hk, n, d), rotated already where the layer is rotary.
        v: (b, hk, n, dv).
        length: how many of the n slots are filled: an int, or an integer array () that a compiled function may carry.
    """

    k: Any
    v: Any
    length: Any


def check_layer(
    embed_dim: Any, num_heads: Any, num_kv_heads: Any, head_dim: Any, value_dim: Any, kv_dim: Any, out_dim: Any,
    use_bias: Any, qk_norm: Any, norm_eps: Any, rotary: Any, sinks: Any,
) -> Sizes:  # fmt: skip
    """The options of a layer, checked in this order; those of `Attend` are checked by `Attend`.

    Returns:
        The sizes.

    Raises:
        TypeError, ValueError: which option, what was expected, what came, what to try.
    """
    embed_dim = _size("embed_dim", embed_dim, "The width of x.")
    h = _size("num_heads", num_heads, "The number of query heads.")
    hk = h
    if num_kv_heads is not None:
        hk = _size("num_kv_heads", num_kv_heads, "None is as many as num_heads.")
        if h % hk:
            raise wrong(ValueError, "num_kv_heads", f"a number that divides the {h} query heads", num_kv_heads,
                        "Query head n reads key/value head n // (num_heads // num_kv_heads).")  # fmt: skip
    if head_dim is not None:
        d = _size("head_dim", head_dim, "None is embed_dim // num_heads.")
    elif embed_dim % h:
        raise wrong(ValueError, "head_dim", f"a value, since {h} heads do not divide the width of {embed_dim}", None,
                    "Pass head_dim, or a num_heads that divides embed_dim.")  # fmt: skip
    else:
        d = embed_dim // h
    dv = d if value_dim is None else _size("value_dim", value_dim, "The size of a value head; None is head_dim.")
    kv_dim = embed_dim if kv_dim is None else _size("kv_dim", kv_dim, "The width of context; None is embed_dim.")
    out_dim = embed_dim if out_dim is None else _size("out_dim", out_dim, "None is embed_dim.")
    bias = _biases(use_bias)
    if qk_norm is not None and not (isinstance(qk_norm, str) and qk_norm in NORMS):
        raise wrong(ValueError, "qk_norm", 'None, "rms" or "layer"', qk_norm, "It is over each head's head_dim.")
    advice = "Added to the mean square, or to the variance, before its root."
    if number("norm_eps", norm_eps, advice) < 0:
        raise wrong(ValueError, "norm_eps", "a number >= 0", norm_eps, advice)
    if rotary is not None:
        if not isinstance(rotary, Rotary):
            raise wrong(TypeError, "rotary", "a Rotary, or None", rotary, "Rotary() is that of Llama with base 10000.")
        check_fits(rotary, d)
    if not isinstance(sinks, bool):
        raise wrong(TypeError, "sinks", "a bool", sinks, "True makes a parameter sinks (num_heads,), 0 at first.")
    return Sizes(embed_dim, kv_dim, out_dim, h, hk, d, dv, bias)


def check_inputs(
    framework: Framework, sizes: Sizes, x: Any, context: Any, positions: Any, kv_positions: Any, cache: Any,
    q_offset: Any, kv_lengths: Any,
) -> None:  # fmt: skip
    """The inputs of a layer, in this order, before anything is projected; `attend` checks the rest.

    Raises:
        TypeError, ValueError: which argument, what was expected, what came, what to try.
    """
    _features(framework, "x", x, "(b, i, embed_dim)", sizes.embed_dim, None)
    b, i, _ = x.shape
    if context is None:
        if sizes.kv_dim != sizes.embed_dim:
            raise wrong(ValueError, "context", f"(b, j, kv_dim) with kv_dim = {sizes.kv_dim}", None,
                        f"x has width {sizes.embed_dim}, so it cannot be its own context.")  # fmt: skip
    elif isinstance(context, tuple):
        _projected(framework, sizes, context, b)
    else:
        _features(framework, "context", context, "(b, j, kv_dim)", sizes.kv_dim, b)
    if positions is not None:
        check_positions(framework, "positions", positions, b, i)
    if kv_positions is not None:
        if context is None or isinstance(context, tuple):
            raise wrong(ValueError, "kv_positions", "None where keys are not projected from a context", kv_positions,
                        "Keys of x stand at positions; project takes the positions of a context.")  # fmt: skip
        check_positions(framework, "kv_positions", kv_positions, b, context.shape[1])
    if cache is None:
        return
    if context is not None:
        raise wrong(ValueError, "cache", "None where there is a context", cache,
                    "Pass project(context) as context to compute its keys and values once.")  # fmt: skip
    _cache(framework, sizes, cache, b, i)
    if q_offset is not None:
        raise wrong(ValueError, "q_offset", "None where there is a cache", q_offset,
                    "Query t stands at key cache.length + t.")  # fmt: skip
    if kv_lengths is not None:
        check_integers(framework, "kv_lengths", kv_lengths, ((b,),), "(b,)", "One length for each batch item.")
    home = framework.device(x)
    for name, value in zip(Cache._fields, cache, strict=True):
        place = framework.device(value) if isinstance(value, framework.arrays) else None
        if home is not None and place not in (None, home) and not (str(place) == "cpu" and name == "length"):
            raise ValueError(f"cache.{name}: expected device {home}, where x is, got {place}. Move it there first.")


def check_context(framework: Framework, sizes: Sizes, context: Any, kv_positions: Any) -> None:
    """The arguments of `project`.

    Raises:
        TypeError, ValueError: as for a layer's inputs.
    """
    _features(framework, "context", context, "(b, j, kv_dim)", sizes.kv_dim, None)
    if kv_positions is not None:
        check_positions(framework, "kv_positions", kv_positions, context.shape[0], context.shape[1])


def check_store(cache: Cache, k: Any, v: Any) -> None:
    """New keys and values against the cache that takes them: one dtype.

    Raises:
        TypeError: the cache has another one.
    """
    for name, old, new in (("k", cache.k, k), ("v", cache.v, v)):
        if old.dtype != new.dtype:
            dtype = describe(new).partition(" ")[0]
            raise wrong(TypeError, f"cache.{name}", f"{dtype}, the dtype of the new keys and values", old,
                        "Pass it as dtype to make_cache.")  # fmt: skip


def check_cache_size(batch: Any, length: Any) -> None:
    """The arguments of `make_cache`.

    Raises:
        TypeError, ValueError: not whole numbers >= 0.
    """
    for name, value in (("batch", batch), ("length", length)):
        if not is_int(value):
            raise wrong(TypeError, name, "a whole number >= 0", value, "It is the size of an array.")
        if value < 0:
            raise wrong(ValueError, name, "a whole number >= 0", value, "It is the size of an array.")


def _size(argument: str, value: Any, advice: str) -> int:
    if not is_int(value):
        raise wrong(TypeError, argument, "a whole number >= 1", value, advice)
    if value < 1:
        raise wrong(ValueError, argument, "a whole number >= 1", value, advice)
    return int(value)


def _biases(use_bias: Any) -> tuple[bool, bool, bool, bool]:
    if isinstance(use_bias, bool):
        return (use_bias,) * 4
    expected = "a bool, or four of them for query, key, value and out"
    if not isinstance(use_bias, (tuple, list)) or not all(isinstance(each, bool) for each in use_bias):
        raise wrong(TypeError, "use_bias", expected, use_bias, "Qwen 2 has (True, True, True, False).")
    if len(use_bias) != 4:
        raise wrong(ValueError, "use_bias", expected, use_bias, "Qwen 2 has (True, True, True, False).")
    query, key, value, out = use_bias
    return query, key, value, out


def _floating(framework: Framework, argument: str, value: Any) -> None:
    check_array(framework, argument, value)
    if framework.dtype(value) not in DTYPES:
        raise wrong(TypeError, argument, f"one of {', '.join(DTYPES)}", value, "Convert it first.")
    if framework.dtype(value) == "float64":
        check_float64(framework, argument, value)


def _features(framework: Framework, argument: str, value: Any, letters: str, width: int, b: int | None) -> None:
    _floating(framework, argument, value)
    name = letters.rpartition(", ")[2].rstrip(")")
    batch = "" if b is None else f"b = {b} as in x and "
    shape = tuple(value.shape)
    if len(shape) != 3 or shape[2] != width or b not in (None, shape[0]):
        raise wrong(ValueError, argument, f"{letters} with {batch}{name} = {width}", value,
                    "The widths are those that the layer was made with.")  # fmt: skip


def _projected(framework: Framework, sizes: Sizes, context: tuple, b: int) -> None:
    if len(context) != 2 or isinstance(context, Cache):
        raise wrong(TypeError, "context", "an array, or the pair (k, v) that project makes of one", context,
                    "A Cache of the layer's own past is passed as cache=.")  # fmt: skip
    for name, value, d in (("k", context[0], sizes.d), ("v", context[1], sizes.dv)):
        _floating(framework, f"context.{name}", value)
        shape = tuple(value.shape)
        if len(shape) != 4 or shape != (b, sizes.hk, shape[2], d):
            raise wrong(ValueError, f"context.{name}", f"shape ({b}, {sizes.hk}, j, {d})", value,
                        "Pass what project made of the context.")  # fmt: skip


def _cache(framework: Framework, sizes: Sizes, cache: Any, b: int, i: int) -> None:
    advice = "Pass what make_cache or the last call returned."
    if not isinstance(cache, Cache):
        raise wrong(TypeError, "cache", "a Cache, or None", cache, advice)
    _floating(framework, "cache.k", cache.k)
    _floating(framework, "cache.v", cache.v)
    n = cache.k.shape[2] if len(cache.k.shape) == 4 else 0
    for name, value, d in (("k", cache.k, sizes.d), ("v", cache.v, sizes.dv)):
        if tuple(value.shape) != (b, sizes.hk, n, d):
            slots = "n" if name == "k" else n
            raise wrong(ValueError, f"cache.{name}", f"shape ({b}, {sizes.hk}, {slots}, {d})", value, advice)
    length, filled = cache.length, 0
    if is_int(length):
        if length < 0:
            raise wrong(ValueError, "cache.length", "a whole number >= 0", length, advice)
        filled = length
    else:
        check_integers(framework, "cache.length", length, ((),), "()", f"It may be an int as well. {advice}")
    if filled + i > n:
        held = f"{filled} filled slots" if filled else "what it may hold already"
        raise ValueError(
            f"cache: expected room for {i} more beside {held}, got {n} slots. Make a longer one with make_cache."
        )


def sees_no_later(is_causal: bool, window_size: tuple[int | None, int | None] | None) -> bool:
    """Whether no query sees a key after its own, so that slots of a cache that are not filled yet are never read."""
    return is_causal or (window_size is not None and window_size[1] == 0)

"""What a case can be about: the factors of a call, the levels of each, and which levels cannot meet.

Data only. `cases` turns levels into arrays and picks the combinations; tables of what is tested are made from the
names, the features and the sentences here. A level's name occurs once in all factors, so names alone describe a case.
"""

from __future__ import annotations

from typing import NamedTuple

from attend_shared.covering import Constraint


class Sizes(NamedTuple):
    """b batch, h query heads, i query length, j key length, d head size."""

    b: int
    h: int
    i: int
    j: int
    d: int


class Level(NamedTuple):
    """One choice for a factor.

    Attributes:
        name: letters, digits and underscores; part of the names of cases.
        doc: what the call gets.
        features: the rows of the tables in which a case with this level counts.
        needs: what must be set besides for this level to mean anything, where it stands alone.
        paired: whether it takes part in the covering array; else it is tested alone only.
    """

    name: str
    doc: str
    features: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    paired: bool = True


class Factor(NamedTuple):
    """One thing that a call decides.

    Attributes:
        name: in words.
        doc: what it is.
        clauses: the clauses of docs/semantics.md that it is about.
        levels: the choices; the first is the plain one, which a case's name leaves out (but for shape and dtype).
    """

    name: str
    doc: str
    clauses: tuple[int, ...]
    levels: tuple[Level, ...]


SIZES = {
    "square": Sizes(3, 4, 12, 12, 16),
    "wide": Sizes(3, 4, 9, 21, 8),
    "tall": Sizes(3, 4, 21, 9, 12),
    "decode": Sizes(5, 4, 1, 17, 16),
    "items_as_queries": Sizes(5, 4, 5, 11, 8),
    "heads_as_queries": Sizes(3, 8, 8, 8, 8),
    "tiles_square": Sizes(3, 4, 192, 192, 16),
    "tiles_wide": Sizes(3, 4, 65, 193, 24),
    "tiles_tall": Sizes(3, 4, 129, 65, 16),
    "tiles_long": Sizes(1, 1, 130, 2048, 128),
    "tiles_deep": Sizes(1, 2, 40, 72, 64),
    "one_key": Sizes(3, 4, 5, 1, 8),
    "no_query": Sizes(3, 4, 0, 7, 8),
    "no_key": Sizes(3, 4, 6, 0, 8),
    "no_item": Sizes(0, 4, 6, 9, 8),
}
EDGES = ("one_key", "no_query", "no_key", "no_item")  # so little happens there that a pair is not tested by them

FACTORS = (
    Factor(
        "shape",
        "how many queries and keys there are",
        (),
        (
            Level("square", "i = j = 12", ("shape: i = j",)),
            Level("wide", "i = 9 < j = 21", ("shape: i < j",)),
            Level("tall", "i = 21 > j = 9, d = 12", ("shape: i > j",)),
            Level("decode", "i = 1 query against j = 17 keys", ("shape: i = 1",)),
            Level("items_as_queries", "b = i = 5: a (b, j) mask has the shape of an (i, j) mask", ("shape: b = i",)),
            Level("heads_as_queries", "h = i = j = 8: either layout fits", ("shape: h = i",)),
            Level("tiles_square", "i = j = 192: whole tiles of 64, not of 128", ("shape: several tiles",)),
            Level("tiles_wide", "i = 65, j = 193: one past a tile of 64 or 128", ("shape: several tiles",)),
            Level("tiles_tall", "i = 129, j = 65: one past a tile, i > j", ("shape: several tiles",), paired=False),
            Level("tiles_long", "i = 130, j = 2048, d = 128: for kernels of long rows", ("shape: several tiles",),
                  ("bfloat16", "causal", "offset_end"), paired=False),
            Level("tiles_deep", "i = 40, j = 72, d = 64: more queries than decoding has, in heads that are as wide as "
                  "usual", ("shape: several tiles",), ("value_smaller",), paired=False),
            Level("one_key", "j = 1: every weight is 1 or 0", ("shape: j = 1",)),
            Level("no_query", "i = 0", ("shape: i = 0",)),
            Level("no_key", "j = 0: every row is empty", ("shape: j = 0", "empty rows")),
            Level("no_item", "b = 0", ("shape: b = 0",)),
        ),
    ),
    Factor(
        "dtype",
        "of q, k, v and out",
        (14,),
        tuple(Level(name, name, (f"dtype: {name}",)) for name in ("float32", "bfloat16", "float16", "float64")),
    ),
    Factor(
        "mask",
        "boolean, True may attend",
        (1, 2),
        (
            Level("mask_none", "no mask"),
            Level("mask_key", "(b, j), a key mask", ("mask: key",)),
            Level("mask_key_shared", "(1, j), a key mask for all items", ("mask: key",)),
            Level("mask_key_rank4", "(b, 1, 1, j), a key mask in rank 4", ("mask: key",)),
            Level("mask_left_padding", "(b, j), the first keys are padding: with causal, empty rows",
                  ("mask: key", "empty rows"), ("causal",), paired=False),
            Level("mask_empty_item", "(b, j), False throughout for the last item", ("mask: key", "empty rows")),
            Level("mask_head", "(1, h, 1, 1), one head has no keys", ("mask: head", "empty rows")),
            Level("mask_head_key", "(b, h, 1, j), other keys for each head", ("mask: head",), paired=False),
            Level("mask_rows", "(b, 1, i, 1), whole rows", ("mask: dense", "empty rows"), paired=False),
            Level("mask_dense", "(b, h, i, j)", ("mask: dense",)),
            Level("mask_dense_shared", "(1, 1, i, j), for all items and heads", ("mask: dense",)),
            Level("mask_empty_rows", "(b, 1, i, j), some rows False throughout", ("mask: dense", "empty rows")),
        ),
    ),
    Factor(
        "bias",
        "added to the logits after the softcap",
        (2, 10),
        (
            Level("bias_none", "no bias"),
            Level("bias_full", "(b, h, i, j)", ("bias",)),
            Level("bias_over_b", "(1, h, i, j), broadcast over the batch", ("bias", "bias: broadcast")),
            Level("bias_over_h", "(b, 1, i, j), broadcast over heads", ("bias", "bias: broadcast")),
            Level("bias_over_i", "(b, h, 1, j), broadcast over queries", ("bias", "bias: broadcast")),
            Level("bias_over_j", "(b, h, i, 1), broadcast over keys", ("bias", "bias: broadcast")),
            Level("bias_one", "(1, 1, 1, 1), broadcast over everything", ("bias", "bias: broadcast"), paired=False),
            Level("bias_inf", "(b, h, i, j) with entries of -inf", ("bias", "bias: -inf"), paired=False),
            Level("bias_inf_rows", "(b, h, i, j) with entries and whole rows of -inf",
                  ("bias", "bias: -inf", "empty rows")),
            Level("bias_lowest", "(b, h, i, j) with entries and whole rows of the lowest finite number of its dtype "
                  "(of float32 for float64)", ("bias", "bias: lowest finite")),
        ),
    ),
    Factor(
        "bias dtype",
        "of bias and of its gradient",
        (14,),
        (
            Level("bias_own", "q's dtype"),
            Level("bias_float32", "float32 where q has another", ("bias: another dtype",), ("bias_full", "bfloat16")),
            Level("bias_other", "float16 for bfloat16, bfloat16 for float16 and float64, float64 for float32",
                  ("bias: another dtype",), ("bias_full", "bfloat16")),
        ),
    ),
    Factor(
        "position",
        "what a query's position rules out",
        (5, 6),
        (
            Level("anywhere", "nothing"),
            Level("causal", "is_causal", ("causal",)),
            Level("window", "window_size = (left, right)", ("window",)),
            Level("window_left", "window_size = (left, None)", ("window",)),
            Level("window_right", "window_size = (None, right)", ("window",)),
            Level("window_self", "window_size = (w - 1, 0)", ("window",)),
            Level("window_causal", "window_size = (left, right) and is_causal", ("window", "causal")),
            Level("window_zero", "window_size = (0, 0)", ("window",), paired=False),
            Level("window_open", "window_size = (None, None), which rules out nothing", ("window",), paired=False),
        ),
    ),
    Factor(
        "offset",
        "where queries sit among the keys",
        (4,),
        (
            Level("offset_default", "not given"),
            Level("offset_0", "the int 0", ("offset: top-left",), ("causal",)),
            Level("offset_end", "the int j - i", ("offset: bottom-right",), ("causal",)),
            Level("offset_scalar", "an array (), neither 0 nor j - i", ("offset: data",), ("causal",)),
            Level("offset_items", "an array (b,) with a negative value", ("offset: data",), ("causal",)),
            Level("offset_far", "an array (b,) with the largest and smallest int32", ("offset: data", "empty rows"),
                  ("causal",)),
            Level("offset_int", "a negative int", ("offset: data", "empty rows"), ("causal",), paired=False),
            Level("offset_huge", "the int 2**40: the window is behind every key", ("offset: data", "empty rows"),
                  ("window",), paired=False),
            Level("offset_idle", "an array (b,) without causal or window, which changes nothing", ("offset: data",),
                  paired=False),
        ),
    ),
    Factor(
        "segments",
        "ids of queries and keys",
        (7,),
        (
            Level("segments_none", "not given"),
            Level("segments_both", "q_segment_ids and kv_segment_ids", ("segments",)),
            Level("segments_q", "q_segment_ids for both sides", ("segments",)),
            Level("segments_kv", "kv_segment_ids for both sides", ("segments",)),
            Level("segments_alien", "keys with an id that no query has, and a query with an id that no key has",
                  ("segments", "empty rows")),
            Level("segments_negative", "int8 ids, negative ones among them", ("segments",), paired=False),
            Level("segments_mixed", "uint8 ids for queries, int64 for keys", ("segments",), paired=False),
        ),
    ),
    Factor(
        "lengths",
        "how many queries and keys of an item are real",
        (8,),
        (
            Level("lengths_none", "not given"),
            Level("lengths_kv", "kv_lengths", ("lengths",)),
            Level("lengths_q", "q_lengths", ("lengths", "empty rows")),
            Level("lengths_both", "q_lengths and kv_lengths", ("lengths", "empty rows")),
            Level("lengths_outside", "both, with values below 0, 0, and above i and j", ("lengths", "empty rows")),
            Level("lengths_mixed", "both, uint8 and int64", ("lengths", "empty rows"), paired=False),
        ),
    ),
    Factor(
        "sinks",
        "an extra logit for each head",
        (15,),
        (
            Level("sinks_none", "not given"),
            Level("sinks_own", "in q's dtype", ("sinks",)),
            Level("sinks_float32", "float32 where q has another dtype", ("sinks", "sinks: another dtype"),
                  ("bfloat16",), paired=False),
            Level("sinks_other", "float16 for bfloat16, bfloat16 for float16 and float64, float64 for float32",
                  ("sinks", "sinks: another dtype"), ("bfloat16",)),
            Level("sinks_inf", "-inf for one head", ("sinks",)),
        ),
    ),
    Factor(
        "softcap",
        "a bound on the logits",
        (12,),
        (
            Level("softcap_none", "not given"),
            Level("softcap_2", "2.0: most logits are bent", ("softcap",)),
            Level("softcap_30", "30.0", ("softcap",)),
        ),
    ),
    Factor(
        "scale",
        "of the logits",
        (12,),
        (
            Level("scale_default", "not given: d ** -0.5"),
            Level("scale_0", "0.0: every logit is equal", ("scale",)),
            Level("scale_negative", "-0.3", ("scale",)),
            Level("scale_10", "10.0", ("scale",)),
            Level("scale_tiny", "0.001", ("scale",)),
            Level("scale_int", "the int 1", ("scale",), paired=False),
        ),
    ),
    Factor(
        "score_fn",
        "a function of the logits, after the bias",
        (21,),
        (
            Level("score_none", "not given"),
            Level("score_relative", "a table (h, n) by distance is added", ("score_fn",)),
            Level("score_alibi", "a slope (h,) times the distance is taken off", ("score_fn",), paired=False),
            Level("score_temperature", "a factor (b, h)", ("score_fn",), paired=False),
            Level("score_bound", "s / (1 + |s| / cap), 1 / cap (h,)", ("score_fn",)),
        ),
    ),
    Factor(
        "mask_fn",
        "a function of indices, True may attend",
        (21,),
        (
            Level("rule_none", "not given"),
            Level("rule_document", "ids (b, n) of both are equal", ("mask_fn",)),
            Level("rule_near", "a window by position for each head, widths (h,)", ("mask_fn",), paired=False),
            Level("rule_prefix", "causal but for a prefix of lengths (b,)", ("mask_fn",), paired=False),
            Level("rule_rows", "some rows may not attend at all", ("mask_fn", "empty rows")),
        ),
    ),
    Factor(
        "dropout",
        "of the weights",
        (16,),
        (
            Level("dropout_none", "0"),
            Level("dropout_tenth", "0.1, the seed an int above 2**32", ("dropout",)),
            Level("dropout_half", "0.5, the seed two uint32", ("dropout",)),
            Level("dropout_most", "0.75, the seed 2**64 - 1", ("dropout",)),
            Level("dropout_unused", "0 with a seed, which changes nothing", ("dropout",), paired=False),
        ),
    ),
    Factor(
        "heads",
        "how many query heads share a key/value head",
        (13,),
        (
            Level("heads_equal", "hk = h"),
            Level("heads_grouped", "hk = 2 < h", ("grouped heads",)),
            Level("heads_one", "hk = 1", ("grouped heads",)),
        ),
    ),
    Factor(
        "value size",
        "the head size of v and out",
        (14,),
        (
            Level("value_equal", "dv = d"),
            Level("value_smaller", "dv = d / 2", ("dv != d",)),
            Level("value_larger", "dv = d + 8", ("dv != d",)),
        ),
    ),
    Factor("lse", "whether lse is asked for, with a cotangent", (17,),
           (Level("lse_none", "return_lse=False"), Level("lse", "return_lse=True", ("lse",)))),
    Factor("layout", "the order of the axes", (),
           (Level("bhnd", "batch, heads, length, size"), Level("bnhd", "batch, length, heads, size", ("layout",)))),
    Factor(
        "memory",
        "how q, k and v lie there",
        (),
        (
            Level("contiguous", "one block"),
            Level("strided", "every second row of a larger block", ("not contiguous",)),
            Level("expanded", "k and v are one item, expanded over the batch", ("not contiguous",)),
        ),
    ),
    Factor(
        "poison",
        "what lies where nothing may leak from",
        (11,),
        (
            Level("poison_none", "ordinary numbers"),
            Level("poison_nan", "NaN in keys and values that are excluded for a whole item", ("poison",),
                  ("mask_key",)),
            Level("poison_inf", "+inf and -inf in those", ("poison",), ("mask_key",)),
            Level("poison_rows", "NaN and inf in q, and in the cotangents, of rows that q_lengths empties", ("poison",),
                  ("lengths_q",)),
        ),
    ),
    Factor(
        "data",
        "what q, k and v are like",
        (),
        (
            Level("normal", "independent normal numbers"),
            Level("large", "logits far apart: most weights are 0 or 1"),
            Level("negative", "every logit far below 0: exp underflows unless the largest is taken off"),
            Level("constant", "nearly the same everywhere: gradients are small differences"),
            Level("activations", "rotations by position, outlier channels and a first key that draws weight"),
        ),
    ),
)  # fmt: skip

_SHAPES, _MASKS, _SEGMENTS, _LENGTHS = (
    frozenset(level.name for level in factor.levels)
    for factor in FACTORS
    if factor.name in ("shape", "mask", "segments", "lengths")
)
_OBLONG = frozenset(name for name, sizes in SIZES.items() if sizes.i != sizes.j)
_POSITIONED = frozenset(("causal", "window", "window_left", "window_right", "window_self", "window_causal",
                         "window_zero", "window_open"))  # fmt: skip
_KEY_MASKS = frozenset(("mask_key", "mask_key_shared", "mask_key_rank4", "mask_left_padding", "mask_empty_item"))
_KEY_POISON = frozenset(("poison_nan", "poison_inf"))


def _only(name: str, *sets: frozenset[str] | tuple[str, ...], reason: str) -> Constraint:
    return Constraint(reason, (frozenset((name,)), *map(frozenset, sets)))


# Constraints of two sets are pairs that cannot be; the longer ones leave every pair possible.
CONSTRAINTS = (
    Constraint("one array of ids stands for both sides only where i = j",
               (frozenset(("segments_q", "segments_kv")), _OBLONG)),
    Constraint("where i != j, causal and windows need an offset",
               (_OBLONG, _POSITIONED, frozenset(("offset_default",)))),
    Constraint("an offset changes nothing where no position is ruled out: offset_idle shows it alone",
               (frozenset(("anywhere",)),
                frozenset(("offset_0", "offset_end", "offset_scalar", "offset_items", "offset_far", "offset_int",
                           "offset_huge")))),
    Constraint("offset_idle is an offset where no position is ruled out", (frozenset(("offset_idle",)), _POSITIONED)),
    Constraint("there is no bias to have a dtype",
               (frozenset(("bias_none",)), frozenset(("bias_float32", "bias_other")))),
    _only("float32", ("bias_float32",), reason="float32 is q's own dtype: bias_own is that case"),
    _only("float32", ("sinks_float32",), reason="float32 is q's own dtype: sinks_own is that case"),
    _only("bias_lowest", ("score_temperature", "score_bound"),
          reason="the lowest finite number overflows when it is multiplied, and comes back when it is bent"),
    Constraint("keys are poisoned only where a key mask, a length or a segment id excludes them for a whole item",
               (_KEY_POISON, _MASKS - _KEY_MASKS, _SEGMENTS - {"segments_alien"},
                frozenset(("lengths_none", "lengths_q")))),
    Constraint("keys that all items share are poisoned only where all items exclude them",
               (_KEY_POISON, frozenset(("expanded",)), _MASKS - {"mask_key_shared"})),
    Constraint("there are no keys to poison", (_KEY_POISON, frozenset(("no_key", "no_item")))),
    _only("poison_rows", ("lengths_none", "lengths_kv"), reason="rows are poisoned only where q_lengths empties them"),
    _only("poison_rows", ("no_query", "no_item"), reason="there are no rows to poison"),
)  # fmt: skip

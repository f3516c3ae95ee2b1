"""How large blocks are, and from where on which way is the faster one, as measured: see docs/kernel-notes.md."""

from __future__ import annotations

import os

from attend_shared.call import Call
from attend_shared.kernels.launch import Tile, cdiv, padded

# Whether Triton's interpreter runs the kernels, on a CPU; Triton looks once, when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
SMALL_TILES = Tile(16, 16, 1, 1), Tile(64, 64, 1, 1)  # there: many blocks, but not too many
TILES: dict[tuple[str, int, int], Tile] = {
    # (kernel, bytes of an element, the larger of d and dv, padded)
    ("forward", 2, 64): Tile(64, 64, 4, 3),
    ("forward", 2, 128): Tile(64, 64, 4, 3),
    ("forward", 2, 256): Tile(128, 64, 8, 2),
    ("forward with dropout", 2, 64): Tile(64, 64, 4, 2),
    ("forward with dropout", 2, 128): Tile(64, 64, 4, 2),
    ("query_gradients", 2, 64): Tile(64, 64, 4, 3),
    ("query_gradients with a window", 2, 128): Tile(64, 64, 4, 2),
    ("query_gradients with segments", 2, 128): Tile(64, 64, 4, 2),
    ("query_gradients", 2, 128): Tile(128, 64, 8, 3),
    ("query_gradients", 2, 256): Tile(128, 64, 8, 1),
    ("key_gradients", 2, 64): Tile(64, 64, 4, 3),
    ("key_gradients", 2, 128): Tile(64, 64, 4, 2),
    ("key_gradients", 2, 256): Tile(32, 128, 8, 2),  # dk alone
    ("value_gradients", 2, 256): Tile(64, 128, 8, 2),
    ("key_gradients with dropout", 2, 128): Tile(32, 64, 4, 3),
    ("key_gradients with softcap", 2, 128): Tile(32, 64, 4, 3),
    ("key_gradients with a window", 2, 128): Tile(32, 64, 4, 3),
    ("key_gradients with segments", 2, 128): Tile(32, 64, 4, 3),
    ("bias_gradients", 2, 64): Tile(64, 64, 4, 3),
    ("bias_gradients", 2, 128): Tile(64, 64, 8, 2),
    ("bias_gradients", 2, 256): Tile(64, 32, 8, 1),
    ("query_and_bias_gradients", 2, 64): Tile(64, 64, 4, 3),
    ("query_and_bias_gradients", 2, 128): Tile(64, 64, 4, 2),
    ("query_and_bias_gradients of items", 2, 64): Tile(128, 32, 8, 2),
    ("query_and_bias_gradients of items", 2, 128): Tile(128, 32, 8, 2),
    ("forward", 4, 64): Tile(64, 64, 4, 3),
    ("forward", 4, 128): Tile(64, 64, 4, 1),
    ("forward", 4, 256): Tile(32, 16, 4, 1),
    ("query_gradients", 4, 64): Tile(64, 64, 4, 1),
    ("query_gradients", 4, 128): Tile(128, 32, 8, 1),
    ("query_gradients", 4, 256): Tile(16, 16, 4, 1),
    ("query_and_bias_gradients", 4, 64): Tile(32, 32, 4, 2),
    ("key_gradients", 4, 64): Tile(64, 64, 4, 2),
    ("key_gradients", 4, 128): Tile(32, 128, 8, 1),
    ("key_gradients", 4, 256): Tile(16, 16, 4, 1),
    ("bias_gradients", 4, 64): Tile(32, 32, 4, 2),
    ("bias_gradients", 4, 128): Tile(32, 32, 4, 1),
    ("bias_gradients", 4, 256): Tile(16, 16, 4, 1),
    # forward where keys are seen in parts; its queries are those that at most share a program
    ("split", 2, 64): Tile(64, 64, 4, 3),
    ("split", 2, 128): Tile(64, 64, 4, 3),
    ("split", 2, 256): Tile(64, 32, 4, 2),
    ("split", 4, 64): Tile(64, 32, 4, 2),
    ("split", 4, 128): Tile(32, 32, 4, 2),
    ("split", 4, 256): Tile(16, 16, 4, 2),
}
IN_FULL: dict[tuple[str, int], Tile] = {
    # of float32 where its products are not put together from those of bfloat16: (kernel, as above)
    ("forward", 64): Tile(64, 32, 4, 2),
    ("query_gradients", 64): Tile(32, 32, 4, 2),
    ("key_gradients", 64): Tile(32, 32, 4, 2),
    ("forward", 128): Tile(32, 32, 4, 2),
    ("query_gradients", 128): Tile(32, 32, 4, 1),
    ("key_gradients", 128): Tile(32, 32, 4, 1),
}
PERSISTENT = 132  # programs that stay, one a multiprocessor, each of which goes over its share of the tiles
ROWS = 64  # at a time, in row_sums
MANY = 256  # at a time, in sum_sinks, key_ranges, pack_keys, overlaps and list_blocks
WORDS = 32  # of a bit for each key, that a program of pack_keys does
MUCH_SHARED = ("9.0", "10.0", "10.3")  # compute capabilities whose programs may have 227 KB of shared memory
BY_THIRDS = ("9.0",)  # where products of float32 are put together from those of bfloat16; 10.0 has no room for the sums
FEW = 16  # queries, up to which products of float32 are made in full all the same
PADDED = 128  # the rows of what the way back takes of each row are a multiple of it, and of every block of queries
DRAWN = Tile(128, 128, 1, 1) if INTERPRETED else Tile(128, 32, 2, 1)  # of `draw`, at a time
DRAWN_TURNS = 4  # times, in a program
MUCH_DRAWN = 0 if INTERPRETED else 2**22  # pairs, from which on drawing them anew costs more than a launch
HELD = 0.5  # of the memory of q, k, v and out: what is drawn may take so much where it is kept for the way back
PROGRAMS = 8 * PERSISTENT  # that fill a GPU
PART = 1 if INTERPRETED else 8  # blocks of keys in a part, at least


def in_full(call: Call, capability: str) -> bool:
    """Whether products of float32 are made in full, rather than put together from those of bfloat16."""
    # The parts of rows of 256 fill the registers; few queries wait for memory; and where values are the narrower,
    # Triton 3.6's products of parts read beyond their shared memory (d = 64 with dv of 8 to 32, d = 128 with 32).
    wide, narrow = max(call.d, call.dv) > 128, padded(call.dv) < padded(call.d)
    return capability not in BY_THIRDS or wide or narrow or call.i <= FEW


def tile(kernel: str, call: Call, capability: str, drawn: bool = False) -> Tile:
    """The sizes of a kernel's blocks for a call, on a GPU of this compute capability. drawn: whether forward has bits.

    How many keys forward has at a time must not hang on that, nor its results.
    """
    if INTERPRETED:
        return SMALL_TILES[call.i * call.j > 64**2]
    width, size = 4 if call.dtype == "float32" else 2, max(64, padded(call.d), padded(call.dv))
    has = {"bits": drawn, "dropout": call.dropout, "softcap": call.softcap is not None,
           "a window": call.left is not None, "segments": call.segments}  # fmt: skip
    with_what = next((f" with {what}" for what in has if has[what]), "")
    found = next(TILES[key] for key in ((name, width, size) for name in (kernel + with_what, kernel)) if key in TILES)
    if width == 4:
        return IN_FULL.get((kernel, size), found) if in_full(call, capability) else found
    if capability not in MUCH_SHARED:
        return Tile(min(found.queries, 64 if size < 256 else 32), 32, 4, 2 if size < 256 else 1)
    return found


def padded_rows(i: int) -> int:
    """The rows that `top` and its like have for a head, for i queries."""
    return cdiv(i, PADDED) * PADDED


def parts(call: Call, capability: str) -> int:
    """In how many parts the keys are seen, each with the queries of all heads that read them together; 0: not so."""
    size = tile("split", call, capability)
    if call.segments or call.h // call.hk * call.i > size.queries:
        return 0
    number = min(64, cdiv(call.j, size.keys) // PART, cdiv(PROGRAMS, call.b * call.hk))
    return number if number > 1 else 0

"""The calls that are measured on a GPU, each named once, and who computes them. No framework is imported here.

A workload is written in the arguments of `attend`; what a peer calls them is the affair of its adapter.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np

HOLES, SEED = 0.3, 20
FOLDER = "ATTEND_BENCH_PROGRAMS"  # the environment's name of a folder for what JAX compiles
BACKWARD = 2.5  # times the products of the forward pass: five of the size of which that has two


class Workload(NamedTuple):
    """One call, with the gradients of all that has one where `backward` is set.

    Attributes:
        b, h, hk, i, j, d: as everywhere; dv is d.
        causal: is_causal; with i != j the last query sits at the last key.
        window: None, or how many tokens a query sees with its own (causal).
        documents: how many there are in a row, all as long, as segment ids; 0 is none.
        keys: "", "padding" or "holes" (a key mask), or "lengths" (kv_lengths that say what "padding" does).
        bias: the shape of a bias, or None. trained: whether it has a gradient.
        sinks, softcap, dropout, lse: as in `attend`.
        mask: whether there is a mask (1, 1, i, j) that is no structure.
        dtype: of all arrays.
        backward: whether it is measured with gradients as well.
    """

    b: int
    h: int
    hk: int
    i: int
    j: int
    d: int
    causal: bool = False
    window: int | None = None
    documents: int = 0
    keys: str = ""
    bias: tuple[int, ...] | None = None
    trained: bool = False
    sinks: bool = False
    softcap: float | None = None
    dropout: float = 0.0
    lse: bool = False
    mask: bool = False
    dtype: str = "bfloat16"
    backward: bool = True

    @property
    def name(self) -> str:
        """In words, then b x h x n x d."""
        words = {
            "documents": f"{self.documents} documents", "window": f"window {self.window}",
            "bias": f"{'trained ' * self.trained}bias {self.bias}", "softcap": f"softcap {self.softcap}",
            "dropout": f"dropout {self.dropout}", "lse": "with lse", "mask": "mask (i, j)", "sinks": "sinks",
        }  # fmt: skip
        said = [words[name] for name in words if getattr(self, name)]
        said += {"": [], "padding": ["padded keys"], "holes": ["key mask with holes"], "lengths": ["key lengths"]}[
            self.keys
        ]
        said += ["causal"] if self.causal else [] if said or self.i == 1 else ["full"]
        said += ["decoding"] if self.i == 1 else []
        heads = f"{self.h}" if self.h == self.hk else f"{self.h}/{self.hk}"
        length = f"{self.j}" if self.i == self.j else f"{self.i}:{self.j}"
        kind = "" if self.dtype == "bfloat16" else f" {self.dtype}"
        return f"{', '.join(said)} {self.b}x{heads}x{length}x{self.d}{kind}"

    @property
    def offset(self) -> int:
        """The key position of query 0."""
        return self.j - self.i

    @property
    def logits(self) -> int:
        """How many there are, allowed or not."""
        return self.b * self.h * self.i * self.j

    @property
    def plain(self) -> bool:
        """Whether positions alone rule pairs out, and every peer has the call."""
        return not (self.documents or self.keys or self.bias or self.sinks or self.softcap or self.dropout or self.mask)

    @property
    def size(self) -> int:
        """Bytes of q, k, v, out and bias."""
        width = 4 if self.dtype == "float32" else 2
        return width * (self.b * self.d * (2 * self.h * self.i + 2 * self.hk * self.j) + math.prod(self.bias or (0,)))

    @property
    def copies(self) -> int:
        """How many sets of inputs take turns, so that what one call leaves in the L2 cache does not help the next."""
        return min(8, max(1, -(-150_000_000 // self.size))) if self.size < 100_000_000 else 1


def plain(b: int, h: int, n: int, d: int, **more: Any) -> Workload:
    """As many keys as queries, and as many key heads as query heads unless hk says otherwise."""
    return Workload(b, h, more.pop("hk", h), n, more.pop("j", n), d, **more)


def causal(b: int, h: int, n: int, d: int, **more: Any) -> Workload:
    """The same, causal."""
    return plain(b, h, n, d, causal=True, **more)


# In order of importance: a run that is out of time keeps its head.
FULL_128, FULL_64 = plain(4, 16, 4096, 128), plain(4, 16, 4096, 64)
CAUSAL_128, CAUSAL_64 = causal(4, 16, 4096, 128), causal(4, 16, 4096, 64)
WINDOW = causal(1, 16, 16384, 128, window=1024)
DOCUMENTS = causal(1, 16, 16384, 128, documents=8)
CAUSAL_PADDED = causal(4, 16, 4096, 64, keys="padding")
PADDED, WITH_HOLES = plain(4, 16, 4096, 64, keys="padding"), plain(4, 16, 4096, 64, keys="holes")
SOFTCAP = causal(4, 16, 4096, 128, softcap=30.0)
DROPOUT_64, DROPOUT_128 = causal(4, 16, 4096, 64, dropout=0.1), causal(4, 16, 4096, 128, dropout=0.1)
BIAS_OF_HEADS = plain(4, 16, 2048, 64, bias=(1, 16, 2048, 2048), trained=True)
BIAS_OF_ITEMS = plain(4, 16, 2048, 64, bias=(4, 16, 2048, 2048), trained=True)
SINKS = causal(4, 16, 4096, 64, sinks=True)
DECODING = plain(8, 32, 1, 128, hk=8, j=32768, backward=False)
GROUPED = causal(1, 32, 8192, 128, hk=8)
SHORT = plain(8, 16, 512, 64)
SHORTEST = plain(512, 12, 128, 64)
FLOAT32 = causal(1, 16, 4096, 64, dtype="float32")
DENSE = plain(4, 16, 4096, 64, mask=True)
PIECE = causal(1, 32, 512, 128, hk=8, j=8192)
SOFTCAP_WINDOW = causal(2, 16, 4096, 128, softcap=50.0, window=1024)
WORKLOADS = (
    CAUSAL_128, WINDOW, DOCUMENTS, CAUSAL_PADDED, SOFTCAP, DROPOUT_64, BIAS_OF_HEADS, SINKS, DECODING, SHORT, CAUSAL_64,
    FULL_128, FULL_64, GROUPED, WITH_HOLES, PADDED, plain(64, 16, 256, 64), BIAS_OF_ITEMS, DROPOUT_128,
    causal(1, 16, 16384, 128), causal(4, 16, 4096, 96), causal(4, 16, 4096, 256),
    plain(1, 16, 4096, 64, bias=(1, 16, 4096, 4096), backward=False), causal(4, 16, 4096, 64, keys="lengths"),
    causal(4, 16, 4096, 128, lse=True), SHORTEST, DECODING._replace(keys="lengths"), PIECE,
    plain(64, 12, 512, 64, keys="padding"), DENSE, FLOAT32, SOFTCAP_WINDOW,
    causal(64, 16, 256, 64),
)  # fmt: skip
TRY_OUT = (
    CAUSAL_64._replace(b=2, h=4, hk=4, i=1024, j=1024), CAUSAL_128._replace(b=2, h=4, hk=2, i=1024, j=1024),
    WINDOW._replace(h=2, hk=2, i=2048, j=2048, window=256), DOCUMENTS._replace(h=2, hk=2, i=2048, j=2048),
    CAUSAL_PADDED._replace(h=2, hk=2, i=1024, j=1024), WITH_HOLES._replace(h=2, hk=2, i=1024, j=1024),
    SOFTCAP._replace(b=2, h=2, hk=2, i=1024, j=1024), DROPOUT_64._replace(b=2, h=2, hk=2, i=1024, j=1024),
    BIAS_OF_HEADS._replace(h=2, hk=2, i=512, j=512, bias=(1, 2, 512, 512)),
    SINKS._replace(b=2, h=2, hk=2, i=1024, j=1024), DECODING._replace(b=2, j=4096),
    causal(2, 4, 1024, 64, keys="lengths"), causal(2, 4, 1024, 64, lse=True), causal(1, 8, 256, 128, hk=2, j=1024),
)  # fmt: skip

# Who computes them. "attend" leaves the choice, and "attend NAME" is that implementation; the others are peers.
CHOICE = "attend"
PEERS = {
    "torch": ("SDPA", "SDPA cuDNN", "SDPA flash", "SDPA efficient", "FlexAttention", "FA4"),
    "jax": ("jax.nn xla", "jax.nn cudnn", "tokamax", "flax", "FA3", "FA4"),
}
OURS = {
    "torch": ("triton", "fa4", "sdpa", "flex", "blockwise", "einsum"),
    "jax": ("triton", "fa4", "fa3", "cudnn", "blockwise", "xla", "einsum"),
}
TURNED = "attend triton (b n h d)"  # in torch, with rows that lie as they do in JAX
REFERENCE = "reference"  # what all are compared with; it is compiled like an entry
TIME_IS_UP = "the time of this run was up"
MODES = ("forward", "both")  # "both" is forward + backward


def own(entry: str) -> str | None:
    """The implementation that an entry names, or None; so too for TURNED, which is no choice of its own."""
    return entry.removeprefix(f"{CHOICE} ") if entry.startswith(f"{CHOICE} ") and entry != TURNED else None


ONLY: dict[str, tuple[Workload, ...]] = {
    # What takes long to compile or to run is asked where it is in question, and not everywhere.
    "attend blockwise": (CAUSAL_64, BIAS_OF_HEADS, FLOAT32),
    "attend flex": (
        CAUSAL_64, FULL_128, WINDOW, DOCUMENTS, CAUSAL_PADDED, PADDED, SOFTCAP, SINKS, DECODING, GROUPED, SHORT, DENSE,
        PIECE,
    ),
    "FlexAttention": (
        CAUSAL_128, CAUSAL_64, FULL_128, WINDOW, DOCUMENTS, CAUSAL_PADDED, PADDED, WITH_HOLES, SOFTCAP, BIAS_OF_HEADS,
        BIAS_OF_ITEMS, SINKS, DECODING, GROUPED, SHORT, DENSE, PIECE, SOFTCAP_WINDOW,
    ),
    "attend einsum": (BIAS_OF_HEADS, DECODING, SHORT, FLOAT32, SHORTEST),
    "attend xla": (SHORT, SHORTEST, DECODING),
    "jax.nn xla": (CAUSAL_64, FULL_128, BIAS_OF_HEADS, SHORT, DECODING),
    "tokamax": (
        CAUSAL_128, CAUSAL_64, WINDOW, CAUSAL_PADDED, PADDED, WITH_HOLES, SOFTCAP, BIAS_OF_HEADS, BIAS_OF_ITEMS,
        DECODING, SHORT,
    ),
    "flax": (DROPOUT_64, DROPOUT_128),
}  # fmt: skip


def entries(framework: str, load: Workload) -> tuple[str, ...]:
    """Who is asked to compute it: the choice, our implementations, the peers."""
    turned = (TURNED,) if framework == "torch" else ()
    everyone = (CHOICE, *(f"{CHOICE} {name}" for name in OURS[framework]), *turned, *PEERS[framework])
    return tuple(entry for entry in everyone if entry not in ONLY or load in ONLY[entry] or load in TRY_OUT)


def modes(load: Workload) -> tuple[str, ...]:
    """Those in which it is measured."""
    return MODES if load.backward else MODES[:1]


@cache
def structure(load: Workload) -> dict[str, np.ndarray]:
    """The arguments that rule pairs out and are arrays: mask (b, j) or (1, 1, i, j), segment ids, kv_lengths."""
    found: dict[str, np.ndarray] = {}
    lengths = load.j - load.j * np.arange(load.b) // load.b
    if load.keys == "lengths":
        found["kv_lengths"] = lengths.astype(np.int32)
    elif load.keys == "padding":
        found["mask"] = np.arange(load.j) < lengths[:, None]
    elif load.keys == "holes":
        found["mask"] = np.random.default_rng(SEED).random((load.b, load.j)) >= HOLES
    elif load.mask:
        found["mask"] = np.random.default_rng(SEED).random((1, 1, load.i, load.j)) >= HOLES
    if load.documents:
        ids = np.arange(load.j) * load.documents // load.j
        found["q_segment_ids"] = np.broadcast_to(ids, (load.b, load.j)).astype(np.int32)
    return found


def cumulative(load: Workload) -> np.ndarray:
    """Where the documents of one item start, and where the last ends: what segment ids are made of."""
    return np.searchsorted(structure(load)["q_segment_ids"][0], np.arange(load.documents + 1)).astype(np.int32)


def options(load: Workload) -> dict[str, Any]:
    """The arguments of `attend` that are no arrays."""
    found: dict[str, Any] = {}
    if load.causal:
        found["is_causal"] = True
        if load.offset:
            found["q_offset"] = load.offset
    if load.window is not None:
        found["window_size"] = (load.window - 1, 0)
    if load.softcap is not None:
        found["softcap"] = load.softcap
    if load.dropout:
        found["dropout"] = load.dropout
    if load.lse:
        found["return_lse"] = True
    return found


@cache
def pairs(load: Workload) -> int:
    """How many pairs of a query and a key are allowed, in all items and heads: only their products are useful work."""
    given = structure(load)
    if load.mask:
        return load.b * load.h * int(given["mask"].sum())
    query = np.arange(load.i) + load.offset
    first, last = np.zeros(load.i, np.int64), np.full(load.i, load.j - 1)
    if load.causal:
        last = np.minimum(last, query)
    if load.window is not None:
        first = np.maximum(first, query - load.window + 1)
    if load.documents:
        ids = given["q_segment_ids"][0]
        first = np.maximum(first, np.searchsorted(ids, ids, "left"))
        last = np.minimum(last, np.searchsorted(ids, ids, "right") - 1)
    keys = np.ones((load.b, load.j), np.int64)
    if "mask" in given:
        keys = given["mask"].astype(np.int64)
    elif "kv_lengths" in given:
        keys = (np.arange(load.j) < given["kv_lengths"][:, None]).astype(np.int64)
    before = np.concatenate([np.zeros((load.b, 1), np.int64), keys.cumsum(1)], 1)
    seen = before[:, np.maximum(last + 1, first)] - before[:, first]
    return load.h * int(seen.sum())


def flops(load: Workload, mode: str) -> float:
    """Floating point operations of the products of allowed pairs: 2 d + 2 dv a pair forward, 2.5 times that back."""
    return 4.0 * load.d * pairs(load) * (1 + (mode == "both") * BACKWARD)


def by_name() -> dict[str, Workload]:
    """All of them."""
    return {load.name: load for load in (*WORKLOADS, *TRY_OUT)}

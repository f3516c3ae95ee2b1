"""The calls that are measured, and the groups in which they are measured together, in order of importance."""

from __future__ import annotations

from typing import NamedTuple

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
HEADS, HEAD_SIZE = 8, 64
FEATURES = ("bias", "bias of each head", "softcap", "sinks", "dv = 2 d", "dropout")
OF_SDPA = ("bias", "bias of each head", "dv = 2 d")  # those that torch's attention has as this library means them
REPEATS = 5


class Workload(NamedTuple):
    """One call on q, k, v of (1, HEADS, n, HEAD_SIZE), all of them drawn from one seed.

    Attributes:
        n: queries and keys.
        causal: with is_causal.
        backward: with the gradients of all that has one.
        dtype: of q, k, v.
        feature: "", or one of FEATURES.
    """

    n: int
    causal: bool = False
    backward: bool = False
    dtype: str = "float32"
    feature: str = ""

    @property
    def name(self) -> str:
        """As tables write it, without the length."""
        parts = [self.feature, "" if self.dtype == "float32" else self.dtype, "causal" if self.causal else "full"]
        return ", ".join([part for part in parts if part] + ["forward + backward" if self.backward else "forward"])

    @property
    def logits(self) -> int:
        """Bytes of one q_len x kv_len array of all heads in float32."""
        return 4 * HEADS * self.n * self.n


class Entry(NamedTuple):
    """One way to compute a workload.

    Attributes:
        name: as tables write it.
        framework: "jax" or "torch".
        arrays: how many q_len x kv_len arrays of all heads it holds at its worst, forward and with gradients, in
            float32, as measured. It says what not to start, nothing else. 0 is linear memory.
        layout: of the arrays that it takes.
    """

    name: str
    framework: str
    arrays: tuple[float, float] = (0, 0)
    layout: str = "bhnd"

    def needs(self, workload: Workload) -> int:
        """About how many bytes it takes at its worst."""
        linear = 16 * 4 * HEADS * workload.n * HEAD_SIZE + 2**27
        arrays = self.arrays[workload.backward] + (workload.feature in ("softcap", "dropout") and self.arrays[1] > 3)
        bias = {"bias": 1 / HEADS, "bias of each head": 1}.get(workload.feature, 0) * 2 * workload.logits
        return int(arrays * workload.logits + bias + linear)


JAX_NN = Entry("jax.nn", "jax", (2.3, 5.5), "bnhd")
JAX_BLOCKWISE, JAX_CHOICE = Entry("attend_jax blockwise", "jax"), Entry("attend_jax", "jax")
SDPA, MATH = Entry("torch SDPA", "torch"), Entry("torch SDPA, math path", "torch", (2.3, 3.1))
TORCH_BLOCKWISE, TORCH_CHOICE = Entry("attend_torch blockwise", "torch"), Entry("attend_torch", "torch")
JAX_OTHERS = (
    Entry("jnp einsum and softmax", "jax", (2.0, 5.5)),
    Entry("flax.linen", "jax", (2.3, 5.5), "bnhd"),
    Entry("attend_jax einsum", "jax", (2.3, 4.5)),
    Entry("attend_jax rowwise", "jax"),
)
TORCH_OTHERS = (
    Entry("x-transformers", "torch", (3.4, 4.5)),
    Entry("attend_torch einsum", "torch", (3.4, 7.3)),
    Entry("attend_torch rowwise", "torch"),
)
PRINCIPAL = (JAX_NN, JAX_BLOCKWISE, SDPA, MATH, TORCH_BLOCKWISE)
CHOICES = (JAX_CHOICE, TORCH_CHOICE)
LINEAR = (JAX_BLOCKWISE, SDPA, TORCH_BLOCKWISE)
ENTRIES = (JAX_NN, *JAX_OTHERS, JAX_BLOCKWISE, JAX_CHOICE, SDPA, MATH, *TORCH_OTHERS, TORCH_BLOCKWISE, TORCH_CHOICE)
# Without this library a feature takes SDPA's math path where SDPA has it, and is written out where it has not.
WITHOUT = Entry("torch without us", "torch", (2.3, 3.1))
COMPILED = (
    Entry("torch without us, compiled", "torch", (2.3, 2.6)),
    Entry("attend_torch blockwise, compiled", "torch"),
)
BFLOAT16 = (JAX_NN, JAX_BLOCKWISE, JAX_CHOICE, SDPA, TORCH_BLOCKWISE, TORCH_CHOICE)


class Job(NamedTuple):
    """Entries measured on one workload, in rounds: each entry once a round.

    Attributes:
        workload: what.
        entries: by whom.
        fresh: each entry in a process of its own, whose first call gives its peak memory; otherwise all share one.
        rounds: at most.
        allowance: CPU seconds for an entry, which gets as many rounds as fit in (one at least), and for the principal
            entries.
    """

    workload: Workload
    entries: tuple[Entry, ...]
    fresh: bool = False
    rounds: int = REPEATS
    allowance: tuple[float, float] = (5, 70)

    @property
    def title(self) -> str:
        """In words."""
        return f"{self.workload.name}, {self.workload.n} tokens{', a process each' * self.fresh}"


def jobs(minutes: float) -> list[Job]:
    """All of it, the most important first: a run that is cut short keeps its head, and repeats what is long less."""
    long, longest = (REPEATS, 3) if minutes >= 60 else (3, 1)
    modes = [(causal, backward) for causal in (False, True) for backward in (False, True)]
    found = [Job(Workload(32768, True, True), (JAX_BLOCKWISE,), True, 1)]
    found += [Job(Workload(2048, *mode), ENTRIES) for mode in modes]
    found += [Job(Workload(8192), (JAX_NN, *LINEAR, MATH), True)]
    found += [Job(Workload(8192, False, True), (JAX_NN, *LINEAR, MATH), True, long)]
    found += [Job(Workload(2048, dtype="bfloat16"), BFLOAT16)]
    for n, fresh in ((2048, False), (8192, True)):
        for feature in FEATURES:
            if n == 2048 or feature != "bias of each head":
                load = Workload(n, False, True, feature=feature)
                found.append(Job(load, _of_feature(load, fresh), fresh, longest if fresh else REPEATS))
    for n in (16384, 4096, 2048, 32768):
        for causal, backward in ((False, False), (True, True)):
            entries = LINEAR if not (n == 32768 and causal) else LINEAR[1:]
            if n > 2048 or causal:
                found.append(Job(Workload(n, causal, backward), entries, True, 1))
    found += [Job(Workload(n, *mode), ENTRIES) for n in (1024, 256, 512) for mode in modes]
    for n in (1024, 512, 256):  # where the choice changes
        loads = [Workload(n, False, True, feature=feature) for feature in FEATURES]
        found += [Job(load, _of_feature(load, False)) for load in loads]
    found += [Job(Workload(2048, False, backward), ENTRIES, True, 1) for backward in (False, True)]
    long_ones = (*LINEAR, JAX_NN, MATH)
    found += [Job(Workload(8192, True, backward), long_ones, True, longest, (5, 35)) for backward in (True, False)]
    found += [Job(Workload(4096, *mode), (*PRINCIPAL, *CHOICES), allowance=(5, 15)) for mode in modes]
    found += [Job(Workload(512, False, backward), ENTRIES, True, 1) for backward in (False, True)]
    found += [Job(Workload(8192, False, backward), (*JAX_OTHERS, *TORCH_OTHERS), True, 1) for backward in (False, True)]
    found += [Job(Workload(n), (JAX_NN, MATH, *JAX_OTHERS, *TORCH_OTHERS), True, 1) for n in (16384, 32768)]
    return found


def _of_feature(load: Workload, fresh: bool) -> tuple[Entry, ...]:
    ours = (TORCH_BLOCKWISE,) if fresh else (TORCH_BLOCKWISE, TORCH_CHOICE, TORCH_OTHERS[1])
    return (WITHOUT, *ours, *(COMPILED if load.feature == "dropout" and load.n >= 2048 else ()))


def quick() -> list[Job]:
    """The smallest workload, once: whether everything runs."""
    return [Job(Workload(256), ENTRIES, rounds=1), Job(Workload(256), (JAX_BLOCKWISE, TORCH_BLOCKWISE), True, 1)]

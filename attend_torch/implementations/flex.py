"""torch.nn.attention.flex_attention, compiled: custom scores on a GPU in one kernel that leaves blocks out.

What a call rules out becomes two things. Lists of blocks of queries and keys say which blocks have no pair, which have
every pair, and which must be looked at: they come from positions, lengths, segments and masks, and from a mask_fn by a
pass over its pairs that stores none. In blocks that must be looked at a function of the pair decides. Softcap, bias and
score_fn are a function of the score. All of it, from what is hidden to the sinks, is one compiled program for each kind
of call.

References:
    Dong, Feng, Guessous, Liang, He: Flex Attention: a programming model for generating optimized attention kernels
    (2024).
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention, noop_mask
from torch.nn.functional import pad

from attend_shared import blocks
from attend_shared.blocks import Seen
from attend_shared.call import FAR, Arrays, Call
from attend_shared.kernels import cache_folder
from attend_torch import programs
from attend_torch.arrays import hide, hide_rows
from attend_torch.implementations import einsum
from attend_torch.implementations.blockwise import covered
from attend_torch.programs import Program, Untraceable

Tensor = torch.Tensor
Function = Callable[..., Tensor]  # (score, b, h, q_index, kv_index, *inputs), of a program
Run = Callable[..., tuple[Tensor, "Tensor | None"]]
TORCH = Version(torch.__version__).release[:2]
SIZE = 128  # queries and keys of a block
LEAST, MOST = 16, 256  # head sizes that its kernels take
EXACT = 16  # sizes of a call that get a program of their own; later ones share one that takes any
KEPT = 256  # programs
LOW, LOWEST = -1e38, torch.finfo(torch.float32).min
FLOOR = -(2.0**33)
LARGE = 128  # from which on what is read makes scores that may be far from 0
# Queries and keys of a tile, and how many tiles ahead are brought, the largest first, by the bytes of a number; on the
# way back with the warps.
TILES = {
    2: ((128, 64, 3), (128, 64, 2), (64, 64, 2), (64, 32, 3), (64, 32, 2), (32, 32, 2), (32, 32, 1), (16, 16, 1)),
    4: ((128, 32, 3), (64, 32, 3), (32, 32, 3), (32, 32, 2), (32, 32, 1), (16, 16, 1)),
}
TILES_BACK = {
    2: ((64, 128, 3, 8), (64, 128, 2, 8), (64, 64, 3, 4), (64, 64, 2, 4), (32, 64, 2, 4), (32, 32, 2, 4),
        (32, 32, 1, 4), (16, 16, 1, 4)),
    4: ((16, 16, 1, 4),),
}  # fmt: skip
INSTALLED = find_spec("triton") is not None
# In torch 2.11 the compiler writes a kernel by strides that arrays of the same program do not have yet, and gives them
# others: it read lists of blocks of every item but the first from somewhere else. It keeps to them where a product has
# no other kernel to fall back to. This program has no products; 2.12 keeps to them anyway. It takes two to three times
# as long to compile so, and is asked for where the program makes the lists.
LAYOUTS_FIXED: dict[str, Any] = (
    {"max_autotune_gemm": True, "max_autotune_gemm_backends": "TRITON"} if TORCH == (2, 11) else {}
)


def unavailable() -> str | None:
    """Why FlexAttention's kernels cannot run here, or None."""
    if not INSTALLED:
        return "it needs Triton, which torch brings along where it knows of NVIDIA GPUs"
    if not torch.cuda.is_available():
        return "it needs an NVIDIA GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs an NVIDIA GPU of compute capability 8.0 or later"
    return None


def refusal(call: Call) -> str | None:
    """Why FlexAttention cannot serve this call, or None."""
    if call.platform != "cuda":
        return "it runs on an NVIDIA GPU"
    return cannot(call, kernels=True)


def cannot(call: Call, kernels: bool = False) -> str | None:
    """The same, wherever it runs; with `kernels`, what those of a GPU get wrong as well."""
    if kernels and call.dtype == "float32" and call.gradient:
        if call.biased_gradient:  # forward and back do not round scores alike
            return "its float32 gradients beside a bias miss the error budget where scores are large"
        if call.j == 1:
            return "its float32 gradient of a single key, which is 0, misses the error budget"
        if call.sinks:  # sigmoid's slope x (1 - x) loses what is small behind 1
            return "its float32 gradient of sinks misses the error budget where rows are long"
    if call.dtype == "float64":
        return "it has no float64"
    rounded = "would be made of an output rounded to"
    half = call.dtype in ("float16", "bfloat16")
    if half and call.sinks not in (None, call.dtype):
        return f"the gradient of {call.sinks} sinks {rounded} {call.dtype}"
    if half and call.bias_gradient and call.bias_dtype != call.dtype:
        return f"the gradient of a {call.bias_dtype} bias {rounded} {call.dtype}"
    if call.dropout:
        return "it has no dropout that dropout_seed decides"
    if max(call.d, call.dv) > MOST:
        return f"it takes head sizes up to {MOST}, not {max(call.d, call.dv)}"
    if torch.compiler.is_compiling():
        return "it is a compiled program, and cannot become a part of another"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "it cannot be called inside torch.func"
    if call.custom and not call.is_empty and (call.platform != "cuda" or torch.cuda.is_available()):
        try:
            score, _ = programs.lift(call)
        except Untraceable as reason:
            return str(reason)
        for x in score.captured if score and torch.is_grad_enabled() else ():
            if x.requires_grad and kernels and not half:
                return "it sums the gradient of what score_fn captures pair by pair, and misses float32's error budget"
            if x.requires_grad and half and x.dtype != getattr(torch, call.dtype):
                dtype = str(x.dtype).removeprefix("torch.")
                return f"the gradient of a {dtype} array that score_fn captures {rounded} {call.dtype}"
    return None


class Data(NamedTuple):
    """The tensors of a call, none with gaps.

    Attributes:
        arrays: canonical, but the bias without axes of size 1; q_offset an int, or int64 () or (b,), wherever positions
            rule something out.
        flat: the mask without axes of size 1.
        score, mask: what the programs of score_fn and mask_fn read.
    """

    arrays: Arrays
    flat: Tensor | None
    score: tuple[Tensor, ...]
    mask: tuple[Tensor, ...]


class Plan(NamedTuple):
    """What a program is compiled for.

    Attributes:
        call: the call without its functions.
        score, mask: what these do.
        kinds: of all tensors what else a compiler looks at.
        inputs: how many arrays score reads.
        graph: whether a gradient may be asked for.
    """

    call: Call
    score: Program | None
    mask: Program | None
    kinds: tuple[Any, ...]
    inputs: int
    graph: bool


def attend(call: Call, arrays: Arrays) -> tuple[Tensor, Tensor | None]:
    """out (b h i dv) in q's dtype, and lse (b h i) in float32 where it is asked for. First derivatives, in reverse."""
    if call.is_empty:
        return einsum.attend(call, arrays)
    cache_folder.restore()
    score, mask = programs.lift(call)
    device = arrays.q.device
    arrays = _dense(call, arrays)
    data = Data(
        arrays, None if arrays.mask is None else _flat(arrays.mask),
        # Each place has its own copy of what has a gradient: of one array at two places torch takes none.
        tuple((x.clone() if x.requires_grad else x).to(device).contiguous() for x in score.inputs()) if score else (),
        tuple(x.detach().to(device).contiguous() for x in mask.inputs()) if mask else (),
    )  # fmt: skip
    plan = Plan(
        call._replace(score_fn=None, mask_fn=None, names=None, flash=None),
        score.program if score else None, mask.program if mask else None, *_kinds(data),
    )  # fmt: skip
    alike, size = _any_size(plan)
    sizes = _sizes(alike)
    if size in sizes or len(sizes) < EXACT:
        sizes[size] = None
        return compiled(plan, False)(data, _known(plan, data))
    offset = data.arrays.q_offset
    if isinstance(offset, int) and call.offset != "zero":
        data = data._replace(arrays=data.arrays._replace(q_offset=_tensor(offset, device)))
    return compiled(alike, True)(data, _known(plan, data))


@functools.lru_cache(maxsize=KEPT)
def compiled(plan: Plan, any_size: bool) -> Run:
    """A program. Its code is an object of its own, since dynamo counts, by code, what it may compile anew."""

    score, mask = (x and programs.function(x.pair, "pair") for x in (plan.score, plan.mask))
    attention = functools.partial(flex_attention, kernel_options=kernel_options(plan, _shared_memory(plan.kinds[-1])))

    def run(data: Data, lists: tuple[Tensor, ...] | None) -> tuple[Tensor, Tensor | None]:
        return answer(plan, score, mask, attention, data, lists)

    code = run.__code__.replace(co_name=f"flex_{next(_COUNT)}")
    own = types.FunctionType(code, run.__globals__, code.co_name, None, run.__closure__)
    fixed = LAYOUTS_FIXED if any_size or _by_data(plan.call, plan.mask) or plan.call.offset == "data" else {}
    return torch.compile(own, fullgraph=True, dynamic=None if any_size else False, options=dict(fixed) or None)


_COUNT = itertools.count()


def _shared_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory that the threads of one block may share."""
    properties: Any = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return properties.shared_memory_per_block_optin if properties else 0


def kernel_options(plan: Plan, memory: int) -> dict[str, Any]:
    """What the kernels are told: to multiply float32 in full, and tiles that fit where entries are read for each pair.

    They bring such entries to shared memory as they bring k and v, some tiles ahead, and do not count them: their own
    tiles would ask for more than there is.
    """
    options: dict[str, Any] = {"FLOAT32_PRECISION": "'ieee'"} if plan.call.dtype == "float32" else {}
    if plan.call.h != plan.call.hk:
        # In torch 2.11 its kernel for few queries, which takes the heads of a group together, was wrong for 8 queries
        # of 8 heads on 2, and found no tile for 65 queries.
        options["FORCE_USE_FLEX_ATTENTION"] = True
    entries, wide = _bytes_of_pairs(plan), 4 if plan.call.dtype == "float32" else 2
    if not entries:
        return options
    row = wide * (_power_of_two(plan.call.d) + _power_of_two(plan.call.dv))  # of k and v, or of q and dout
    for i, j, ahead in TILES[wide]:
        if ahead * j * (row + i * entries) + i * row < memory * 0.85:
            options |= {"fwd_BLOCK_M": i, "fwd_BLOCK_N": j, "fwd_num_stages": ahead}
            break
    for i, j, ahead, warps in TILES_BACK[wide]:
        if ahead * i * (row + j * entries) + j * row < memory * 0.85:
            options |= {"bwd_BLOCK_M1": i, "bwd_BLOCK_N1": j, "bwd_BLOCK_M2": j, "bwd_BLOCK_N2": i,
                        "bwd_num_stages": ahead, "bwd_num_warps": warps}  # fmt: skip
            break
    return options


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, LEAST - 1).bit_length()


def _bytes_of_pairs(plan: Plan) -> int:
    """Bytes that are read of arrays for each pair."""
    call, kinds = plan.call, plan.kinds
    after = len(Arrays._fields)
    scores = plan.score.of_pairs if plan.score else ()
    behind = after + plan.inputs
    masks = plan.mask.of_pairs if plan.mask else ()
    sizes = [kinds[place][0].itemsize for place in (*(after + n for n in scores), *(behind + n for n in masks))]
    if call.bias is not None and min(call.bias[2:]) > 1:
        sizes.append(kinds[Arrays._fields.index("bias")][0].itemsize)
    if call.mask is not None and min(call.mask[2:]) > 1:
        sizes.append(1)
    return sum(sizes)


@functools.lru_cache(maxsize=KEPT)
def _sizes(_: Plan) -> dict[tuple[Any, ...], None]:
    """The sizes of this plan that have a program of their own."""
    return {}


def _any_size(plan: Plan) -> tuple[Plan, tuple[Any, ...]]:
    """A plan without its sizes, and these. What has size 1, and what has no other kind, stays."""
    call = plan.call

    def some(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if shape is None else tuple(min(n, 2) for n in shape)

    alike = call._replace(b=min(call.b, 2), i=min(call.i, 2), j=min(call.j, 2), mask=some(call.mask),
                          bias=some(call.bias))  # fmt: skip
    of_inputs = tuple((kind[0], some(kind[1]), *kind[2:]) if isinstance(kind, tuple) else kind for kind in plan.kinds)
    same = call.i == call.j, call.i == call.b
    return plan._replace(call=alike, kinds=(*of_inputs[:-1], same, of_inputs[-1])), (call, plan.kinds)


def _kinds(data: Data) -> tuple[tuple[Any, ...], int, bool]:
    """Of each tensor what a compiler looks at, how many score reads, and whether a gradient may be asked for."""
    tensors = [*data.arrays, *data.score, *data.mask]
    shapes = [(x.dtype, tuple(x.shape), x.requires_grad) if isinstance(x, Tensor) else x is None for x in tensors]
    graph = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)
    around = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), data.arrays.q.device
    return (*shapes, *around), len(data.score), graph


def _tensor(offset: int, device: torch.device) -> Tensor:
    """An int on the device, put there by a kernel: a copy would wait."""
    return torch.full((), offset, dtype=torch.int64, device=device)


def _dense(call: Call, arrays: Arrays) -> Arrays:
    """Every array without gaps, as the caller laid it out, and the offset as `Data` has it."""
    offset: Any = None
    if call.positional:
        offset = {"zero": 0, "end": call.j - call.i, "data": arrays.q_offset}[call.offset]
        if isinstance(offset, Tensor):
            offset = offset.long().clamp(-FAR, FAR)
        elif call.offset == "data":  # another at every step: no constant
            offset = _tensor(offset, arrays.q.device)

    def rows(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2) if call.layout == "bnhd" else x.contiguous()

    q, k, v = (rows(x) for x in arrays[:3])
    rest = {name: None if x is None else x.contiguous() for name, x in list(arrays._asdict().items())[3:]
            if name not in ("q_offset", "dropout_seed")}  # fmt: skip
    if rest["bias"] is not None:
        rest["bias"] = _table(rest["bias"])
    return Arrays(q, k, v, q_offset=offset, **rest)


def _table(bias: Tensor) -> Tensor:
    """A bias as kernels read it: without axes of size 1, and summed over what is left out in the dtype that it is in.

    A reshape inside a function of scores would have no gradient there, nor has a captured view in each of torch's
    backends: it is a copy.
    """
    whole = all(n > 1 for n in bias.shape)
    bias = bias if whole and bias.dtype != torch.float64 else bias.float()
    bias = _flat(bias)
    return bias.clone() if bias.requires_grad and bias._is_view() else bias


def _flat(x: Tensor) -> Tensor:
    """Without axes of size 1."""
    return x if min(x.shape) > 1 else x.reshape([n for n in x.shape if n > 1] or [1])


def answer(
    plan: Plan, score: Function | None, mask: Function | None, attention: Callable[..., Any], data: Data,
    lists: tuple[Tensor, ...] | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """out, and lse where it is asked for, by something that works as FlexAttention does."""
    arrays = data.arrays
    call = plan.call._replace(b=arrays.q.shape[0], i=arrays.q.shape[2], j=arrays.k.shape[2])
    arrays = hide(call._replace(mask=None if arrays.mask is None else tuple(arrays.mask.shape)), arrays)
    q, k, v = (_wide(x) for x in arrays[:3])
    block_mask, of_mask = None, noop_mask
    if call.masked or plan.mask is not None:
        if lists is None:
            reads = plan.mask.reads if plan.mask else frozenset()
            lists = _lists(*_look(call, mask, reads, arrays, data.mask))
        of_mask = functools.partial(_may, call, mask, arrays._replace(mask=data.flat), data.mask)
        block_mask = _block_mask((call.i, call.j), lists, of_mask)
    score_mod = functools.partial(_score, call, score, arrays, data.score)
    kernel = functools.partial(attention, block_mask=block_mask, scale=call.scale, enable_gqa=call.h != call.hk)
    far = _may_be_far(call, plan)
    wants_lse = call.return_lse or arrays.sinks is not None
    top = None
    if far and plan.graph:
        if lists is None:
            lists = _lists(*_look(call, None, frozenset(), arrays, ()))
        top = _largest(attention, call, lists, of_mask, _are_far(plan, arrays, data), q, k, score_mod)
        score_mod = functools.partial(_centred, score_mod, *_middle(top))
    elif far:
        score_mod = functools.partial(_lifted, score_mod)
    found = kernel(
        q, k, v, score_mod=score_mod if far or plan.score is not None or call.softcap is not None else None,
        return_aux=AuxRequest(lse=True) if wants_lse else None,
    )  # fmt: skip
    out, lse = (found[0], found[1].lse) if wants_lse else (found, None)
    out = out[..., : call.dv]
    if lse is not None:
        lse = lse if not far else _raised(lse) if top is None else _returned(lse, top)
        empty = lse == -torch.inf
        lse = torch.where(empty, -torch.inf, lse)
        if arrays.sinks is not None:
            out, lse = _with_sinks(out, lse, empty, arrays.sinks.float()[:, None])
    return hide_rows(call, arrays, out) if call.q_lengths else out, lse if call.return_lse else None


def _wide(x: Tensor) -> Tensor:
    """With a last axis that its kernels take."""
    return x if x.shape[3] >= LEAST else pad(x, (0, LEAST - x.shape[3]))


def _with_sinks(out: Tensor, lse: Tensor, empty: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse with one more logit in the denominator. An empty row has the lse of its sink."""
    finite = torch.where(empty, 0, lse)  # so that no difference is inf - inf
    share = torch.where(empty, 0, torch.sigmoid(finite - sinks))
    lse = torch.where(empty, sinks, torch.logaddexp(finite, sinks))
    lse = torch.where(lse == -torch.inf, -torch.inf, lse)
    return (out.float() * share[..., None]).to(out.dtype), lse


# Scores. Kernels take them to base 2, and make the weights of the way back from lse. So a score near the lowest number
# overflows, and beside a large one the sum behind lse is lost: every weight of a row of -1e9 would come back as 1.


def _may_be_far(call: Call, plan: Plan) -> bool:
    """Whether scores may be so far from 0, by more than a product of q and k is, that weights made from lse show it."""
    score = plan.score
    of_function = score is not None and (score.reads_floats or score.holds_large or call.dtype == "float32")
    return call.bias is not None or of_function


def _lifted(score_mod: Function, *pair: Tensor) -> Tensor:
    """Scores below LOW at half their distance from it, in order still."""
    s = score_mod(*pair)
    return torch.where(s < LOW, s * 0.5 + 0.5 * LOW, s)


def _raised(lse: Tensor) -> Tensor:
    """The lse, or the largest score, of rows whose every score was lifted: there the sum has no say."""
    low = (lse < LOW) & (lse != -torch.inf)
    return torch.where(low, lse + torch.maximum(lse - LOW, LOWEST - lse), lse)


def _are_far(plan: Plan, arrays: Arrays, data: Data) -> Tensor | bool:
    """Whether they are, as far as what is read tells: a bool on the device, which nobody waits for."""
    if plan.call.dtype == "float32" or (plan.score is not None and plan.score.holds_large):
        return True
    tables = [x for x in (arrays.bias, *data.score) if x is not None and x.is_floating_point()]
    large = [(torch.where(x.isinf(), 0, x.detach()).abs().amax() > LARGE) for x in tables]
    return functools.reduce(torch.logical_or, large)


def _largest(
    attention: Callable[..., Any], call: Call, lists: tuple[Tensor, ...], mask_mod: Function, far: Tensor | bool,
    q: Tensor, k: Tensor, score_mod: Function,
) -> Tensor:  # fmt: skip
    """About the largest score of each row (b, h, i); -inf everywhere, without a look, where no score is far from 0."""
    with torch.no_grad():
        lists = tuple(x if n % 2 else (x * far).to(torch.int32) for n, x in enumerate(lists))  # how many blocks
        found = attention(
            q, k, k.new_zeros((*k.shape[:3], LEAST)), score_mod=functools.partial(_lifted, score_mod),
            block_mask=_block_mask((call.i, call.j), lists, mask_mod), scale=call.scale, enable_gqa=call.h != call.hk,
            return_aux=AuxRequest(max_scores=True),
        )  # fmt: skip
        return _raised(found[1].max_scores)


def _middle(top: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of what is taken off the scores of a row: its largest; below FLOOR each score itself, but for -inf.

    So low a score tells of nothing that a kernel could still take apart.
    """
    low, none = (top < FLOOR) & (top != -torch.inf), top == -torch.inf
    middle = torch.where(none, 0, top)
    return torch.where(low, LOWEST, middle), torch.where(low, torch.inf, middle)


def _centred(score_mod: Function, least: Tensor, most: Tensor, *pair: Tensor) -> Tensor:
    """Scores less what is between the bounds of their row; the gradient is that of the score."""
    s, row = score_mod(*pair), pair[1:4]
    return s - torch.minimum(torch.maximum(s, least[row]), most[row]).detach()


def _returned(lse: Tensor, top: Tensor) -> Tensor:
    """The lse of rows that were centred."""
    low = (top < FLOOR) & (top != -torch.inf)
    lse = lse + torch.where(low | (top == -torch.inf), 0, top)
    return torch.where(low, lse + (top - lse).detach(), lse)


def _score(
    call: Call, function: Function | None, arrays: Arrays, inputs: tuple[Tensor, ...],
    score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor,
) -> Tensor:  # fmt: skip
    """What softcap, bias and score_fn make of one score."""
    s, nothing = score.float(), None
    if call.softcap is not None:
        s = call.softcap * torch.tanh(s / call.softcap)
    if arrays.bias is not None:
        bias = arrays.bias[_entry(call.bias or (), (b, h, q, k))].float()
        if function is not None:
            nothing = bias == -torch.inf
            s = torch.where(nothing, 0.0, s + bias)
        else:
            s = s + bias
    if function is not None:
        s = function(s, b, h, q, k, *inputs).float()
    if nothing is not None:
        s = torch.where(nothing, -torch.inf, s)
    return s


def _entry(shape: tuple[int, ...], pair: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Where an array of pairs (b|1, h|1, i|1, j|1), without its axes of size 1, has that of one pair."""
    return tuple(x for n, x in zip(shape, pair, strict=True) if n > 1) or (pair[0] * 0,)


# Pairs, and blocks of them.


def _may(
    call: Call, function: Function | None, arrays: Arrays, inputs: tuple[Tensor, ...],
    b: Tensor, h: Tensor, q: Tensor, k: Tensor,
) -> Tensor:  # fmt: skip
    """Whether a pair is allowed: `meaning.allowed` for one, but for a bias of -inf, which stays a score."""
    rules = []
    if call.positional:
        offset = arrays.q_offset
        offset = offset if isinstance(offset, int) else _of_item(offset, b)
        if call.right is not None:
            rules.append(k - q - call.right <= offset)
        if call.left is not None:
            rules.append(k - q + call.left >= offset)
    if call.segments:
        rules.append(arrays.q_segment_ids[b, q] == arrays.kv_segment_ids[b, k])
    if call.kv_lengths:
        rules.append(k < arrays.kv_lengths[b])
    if call.q_lengths:
        rules.append(q < arrays.q_lengths[b])
    if arrays.mask is not None:
        rules.append(arrays.mask[_entry(call.mask or (), (b, h, q, k))])
    if function is not None:
        rules.append(function(None, b, h, q, k, *inputs))
    return functools.reduce(torch.logical_and, rules)


def _of_item(x: Tensor, b: Tensor) -> Tensor:
    return x.reshape(1)[b * 0] if x.ndim == 0 else x[b]


def _look(
    call: Call, mask_fn: Function | None, reads: frozenset[str], arrays: Arrays, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Which blocks have a pair that is allowed, and which have no other: bool (b|1, h|1, blocks, blocks) each."""
    device = arrays.q.device
    i, j = (torch.arange(-(-n // SIZE), device=device) * SIZE for n in (call.i, call.j))
    of_i = Seen(i[:, None], (i + SIZE).clamp(max=call.i)[:, None] - 1)
    of_j = Seen(j, (j + SIZE).clamp(max=call.j) - 1)
    offset = arrays.q_offset
    if isinstance(offset, Tensor):
        offset = offset.reshape(-1, 1, 1)
    if call.segments:
        low, high = _extremes(arrays.q_segment_ids)
        of_i = of_i._replace(low_id=low[:, :, None], high_id=high[:, :, None])
        low, high = _extremes(arrays.kv_segment_ids)
        of_j = of_j._replace(low_id=low[:, None], high_id=high[:, None])
    if call.q_lengths:
        of_i = of_i._replace(length=arrays.q_lengths[:, None, None])
    if call.kv_lengths:
        of_j = of_j._replace(length=arrays.kv_lengths[:, None, None])
    some, every = blocks.visible(call, offset, of_i, of_j), covered(call, offset, of_i, of_j)
    some, every = (x.expand(*x.shape[:-2], len(i), len(j)).reshape(-1, 1, len(i), len(j)) for x in (some, every))
    if arrays.mask is not None:
        some, every = some & _any(arrays.mask), every & ~_any(~arrays.mask)
    if mask_fn is not None:
        found, all_of = _search(call, mask_fn, reads, inputs, len(i), len(j), device)
        some, every = some & found, every & all_of
    return some, every


def _extremes(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest id of each block (b, blocks); behind the end the last one is repeated."""
    at = torch.arange(-(-ids.shape[1] // SIZE) * SIZE, device=ids.device).clamp(max=ids.shape[1] - 1)
    of_blocks = ids[:, at].unflatten(1, (-1, SIZE))
    return of_blocks.amin(2), of_blocks.amax(2)


def _any(mask: Tensor) -> Tensor:
    """Whether a block of pairs holds one that is True; axes of size 1 stay."""
    for axis in (2, 3):
        n = mask.shape[axis]
        if n > 1:
            at = torch.arange(-(-n // SIZE) * SIZE, device=mask.device).clamp(max=n - 1)
            mask = mask.index_select(axis, at).unflatten(axis, (-1, SIZE)).any(axis + 1)
    return mask


def _search(
    call: Call,
    mask_fn: Function,
    reads: frozenset[str],
    inputs: tuple[Tensor, ...],
    i: int,
    j: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The blocks in which a mask_fn allows some pairs, and all: (b|1, h|1, i|1, j|1) each."""

    def indices(name: str, count: int, length: int, *shape: int) -> Tensor:
        n = torch.arange(count if name in reads else 1, dtype=torch.int32, device=device)
        return n.clamp(max=length - 1).view(shape if name in reads else (1,) * 6)

    may = mask_fn(
        None, indices("b", call.b, call.b, -1, 1, 1, 1, 1, 1), indices("h", call.h, call.h, 1, -1, 1, 1, 1, 1),
        indices("q_index", i * SIZE, call.i, 1, 1, i, SIZE, 1, 1),
        indices("kv_index", j * SIZE, call.j, 1, 1, 1, 1, j, SIZE), *inputs,
    )  # fmt: skip
    return may.any(5).any(3), may.all(5).all(3)


def _lists(some: Tensor, every: Tensor) -> tuple[Tensor, ...]:
    """Blocks in FlexAttention's form: those to look at and those that are full, by queries and by keys."""
    looked, full = some & ~every, some & every
    return *_listed(looked), *_listed(full), *_listed(looked.mT), *_listed(full.mT)


def _block_mask(sizes: tuple[int, int], lists: tuple[Tensor, ...], mask_mod: Function) -> BlockMask:
    look, of_look, full, of_full, look_q, of_look_q, full_q, of_full_q = lists
    return BlockMask(sizes, look, of_look, full, of_full, look_q, of_look_q, full_q, of_full_q, (SIZE, SIZE), mask_mod)


def _listed(dense: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of a row are True (b, h, n), and which, these first (b, h, n, m).

    Both contiguous to the stride of an axis of size 1, by which kernels find the next item.
    """
    first = torch.argsort(dense.to(torch.int32), dim=-1, descending=True, stable=True)
    return dense.sum(-1, dtype=torch.int32), first.to(torch.int32, memory_format=torch.contiguous_format)


def _by_data(call: Call, mask_fn: Program | None) -> bool:
    """Whether data decides which blocks are visited, so that the program makes the lists."""
    return bool(call.segments or call.q_lengths or call.kv_lengths or call.mask is not None or mask_fn is not None)


def _known(plan: Plan, data: Data) -> tuple[Tensor, ...] | None:
    """The lists, where nothing but sizes decides them."""
    call, offset = plan.call, data.arrays.q_offset
    if _by_data(call, plan.mask) or not call.positional or isinstance(offset, Tensor):
        return None
    only = call._replace(
        dtype="", b=1, h=1, hk=1, d=1, dv=1, layout="", bias=None, bias_dtype=None, offset="", sinks=None,
        softcap=None, scale=1.0, return_lse=False, bias_gradient=False, biased_gradient=False,
        gradient=False,
    )  # fmt: skip
    return _by_position(only, offset, data.arrays.q.device)


@functools.lru_cache(maxsize=16)
def _by_position(call: Call, offset: int, device: torch.device) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):  # they may be used where a graph is recorded
        nothing = torch.empty(0, device=device)
        return _lists(*_look(call, None, frozenset(), Arrays(nothing, None, None, q_offset=offset), ()))

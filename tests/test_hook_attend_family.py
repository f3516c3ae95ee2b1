"""`Attend` in the place of the Attend of voicebox-pytorch, gigagan-pytorch and x-transformers: the same numbers."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import attend_torch
from attend_torch import UnsupportedError
from attend_torch.hooks import x_transformers as hook
from conftest import require

# What voicebox and gigagan import for audio, images and training, which neither their Transformer nor their Attention
# touches: audio and vision libraries must match the torch build, the rest would be installed for nothing.
ABSENT = {
    "voicebox_pytorch": (
        "torchode torchdiffeq naturalspeech2_pytorch naturalspeech2_pytorch.aligner naturalspeech2_pytorch.utils "
        "naturalspeech2_pytorch.utils.tokenizer naturalspeech2_pytorch.naturalspeech2_pytorch audiolm_pytorch "
        "spear_tts_pytorch gateloop_transformer torchaudio torchaudio.transforms torchaudio.functional vocos "
        "accelerate accelerate.utils"
    ),
    "gigagan_pytorch": "torchvision kornia kornia.filters ema_pytorch open_clip numerize accelerate accelerate.utils",
}
# Both sides do the same float32 sums in another order, some tens of terms each, through a layer or two and back.
# Besides, a rounding of a logit s moves its weight by s roundings, and s reaches 10 under qk-norm: measured, less than
# 16 in all. 48 leaves a factor of three; a wrong key is off by 2**16 or more.
ROUNDINGS = 48


class StandIn(ModuleType):
    """An empty module: whatever is asked of it is an empty class."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def load(host: str, module: str) -> Iterator[ModuleType]:
    """A host's module among stand-ins, all of them gone from sys.modules afterwards."""
    require(host)
    before = dict(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        for name in ABSENT[host].split():
            patch.setitem(sys.modules, name, StandIn(name))
        try:
            yield importlib.import_module(module)
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] == host and name not in before]:
                del sys.modules[name]


@pytest.fixture(scope="module")
def voicebox() -> Iterator[ModuleType]:
    yield from load("voicebox_pytorch", "voicebox_pytorch.voicebox_pytorch")


@pytest.fixture(scope="module")
def gigagan() -> Iterator[ModuleType]:
    yield from load("gigagan_pytorch", "gigagan_pytorch.unet_upsampler")


@pytest.fixture(scope="module")
def xt() -> ModuleType:
    require("x_transformers")
    return importlib.import_module("x_transformers.x_transformers")


def test_stand_ins_do_not_stay() -> None:
    for host in ("voicebox_pytorch", "gigagan_pytorch"):
        before = set(sys.modules)
        loading = load(host, f"{host}.attend")
        assert isinstance(next(loading).Attend, type)
        assert {host, *ABSENT[host].split()} <= set(sys.modules)
        loading.close()
        assert not {name for name in set(sys.modules) - before if name.partition(".")[0] == host}
        assert not any(isinstance(sys.modules.get(name), StandIn) for name in set(ABSENT[host].split()) - before)


def twins(host: ModuleType, ours: type, make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """The host's module with `ours` in the place of its Attend, and as it is, with the same weights."""
    theirs = make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "Attend", ours)
        mine = make()
    replaced = sum(isinstance(module, ours) for module in mine.modules())
    assert replaced == sum(isinstance(module, host.Attend) for module in theirs.modules()) > 0
    assert mine.load_state_dict(theirs.state_dict()) == ([], [])  # nothing missing, nothing left: Attend has no weights
    return mine.eval(), theirs.eval()


def close(ours: torch.Tensor, theirs: torch.Tensor, largest: torch.Tensor | None = None) -> None:
    """Within ROUNDINGS of float32 of the largest value."""
    scale = float((theirs if largest is None else largest).detach().abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDINGS * 2**-23 * scale)


def agree(mine: nn.Module, theirs: nn.Module, x: torch.Tensor, **call: Any) -> None:
    """The same output, and the same gradients of the input and of every weight."""
    sides = []
    for module in (mine, theirs):
        leaf = x.detach().clone().requires_grad_(x.is_floating_point())
        out = module(leaf, **call)
        torch.manual_seed(5)
        out.backward(torch.randn_like(out))
        sides.append((out, {"x": leaf.grad} | {name: p.grad for name, p in module.named_parameters()}))
        module.zero_grad()
    (out, gradients), (want, wanted) = sides
    close(out, want)
    given = {name: g for name, g in wanted.items() if g is not None}
    assert given.keys() == {name for name, g in gradients.items() if g is not None}
    largest = torch.stack([g.abs().max() for g in given.values()])
    for name, g in given.items():
        close(gradients[name], g, largest)


def lengths_mask(b: int, n: int, *lengths: int) -> torch.Tensor:
    return torch.arange(n) < torch.tensor(lengths)[:, None].expand(b, 1)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_voicebox_transformer(voicebox: ModuleType, flash: bool, qk_norm: bool, masked: bool) -> None:
    """RoPE, register tokens, scale=10 under qk-norm, a (b, n) mask; flash=True is held against their flash=False."""
    torch.manual_seed(0)

    def make() -> nn.Module:
        return voicebox.Transformer(dim=24, depth=2, dim_head=8, heads=3, num_register_tokens=2, attn_qk_norm=qk_norm)

    mine, theirs = twins(voicebox, attend_torch.Attend, make)
    attends = [module for module in mine.modules() if isinstance(module, attend_torch.Attend)]
    assert [(a.scale, a.flash) for a in attends] == 2 * [(10 if qk_norm else None, False)]
    for attend in attends:
        attend.flash = flash
    agree(mine, theirs, torch.randn(3, 9, 24), mask=lengths_mask(3, 9, 9, 5, 1) if masked else None)


def test_voicebox_batch_item_without_a_key(voicebox: ModuleType) -> None:
    """Without register tokens an item may be all padding: 0 here, the mean of v there, and nothing else differs."""
    torch.manual_seed(0)
    make = partial(voicebox.Attention, dim=24, dim_head=8, heads=3, qk_norm=True)
    mine, theirs = twins(voicebox, attend_torch.Attend, make)
    x, mask = torch.randn(2, 5, 24), lengths_mask(2, 5, 3, 0)
    ours, own = mine(x, mask=mask), theirs(x, mask=mask)
    close(ours[0], own[0])
    assert (ours[1] == 0).all()
    mean = theirs.to_out(theirs.to_qkv(x[1]).chunk(3, -1)[2].mean(0, keepdim=True))
    close(own[1], mean.expand_as(own[1]))


def test_voicebox_dropout_in_training(voicebox: ModuleType) -> None:
    torch.manual_seed(0)
    mine, _ = twins(voicebox, attend_torch.Attend, lambda: voicebox.Attention(dim=24, dim_head=8, heads=3, dropout=0.5))
    x = torch.randn(2, 5, 24)
    still = mine(x)
    mine.train()
    torch.manual_seed(1)
    first, second = mine(x), mine(x)
    torch.manual_seed(1)
    assert torch.equal(mine(x), first)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, still)


@pytest.mark.parametrize("flash", [False, True])
def test_gigagan_transformer(gigagan: ModuleType, flash: bool) -> None:
    """(b, h, x * y, d) without a mask, q and k and v strided."""
    torch.manual_seed(0)
    make = partial(gigagan.Transformer, dim=16, dim_head=8, heads=2)
    _, theirs = twins(gigagan, attend_torch.Attend, partial(make, flash_attn=False))
    mine, _ = twins(gigagan, attend_torch.Attend, partial(make, flash_attn=flash))
    mine.load_state_dict(theirs.state_dict())
    assert [m.flash for m in mine.modules() if isinstance(m, attend_torch.Attend)] == [flash]
    agree(mine, theirs, torch.randn(2, 16, 3, 4))


def attends(xt: ModuleType, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and theirs, alone."""
    return hook.Attend(**options), xt.Attend(**options)


def compare(mine: nn.Module, theirs: nn.Module, arrays: dict[str, torch.Tensor | None], **call: Any) -> None:
    """The same output and gradients of q, k, v and attn_bias."""
    sides = []
    for module in (mine, theirs):
        leaves = {n: None if x is None else x.clone().requires_grad_(x.is_floating_point()) for n, x in arrays.items()}
        out, _ = module(**leaves, **call)
        torch.manual_seed(5)
        out.backward(torch.randn_like(out))
        sides.append((out, {n: x.grad for n, x in leaves.items() if x is not None and x.requires_grad}))
    (out, gradients), (want, wanted) = sides
    close(out, want)
    largest = torch.stack([g.abs().max() for g in wanted.values()])
    for name, g in wanted.items():
        close(gradients[name], g, largest)


def qkv(i: int = 5, j: int = 5, hk: int = 4) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(2)
    return {"q": torch.randn(2, 4, i, 8), "k": torch.randn(2, hk, j, 8), "v": torch.randn(2, hk, j, 6)}


@pytest.mark.parametrize("scale", [None, 2, -0.3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("i", "j", "hk"), [(5, 5, 4), (5, 5, 2), (3, 7, 2), (1, 7, 1), (7, 3, 4)])
def test_x_transformers_attend(xt: ModuleType, i: int, j: int, hk: int, causal: bool, scale: float | None) -> None:
    """Tiled heads, bottom-right causal, scale. With i > j causal empties rows, and then only full rows are compared."""
    mine, theirs = attends(xt, causal=causal, scale=scale, heads=4)
    arrays = qkv(i, j, hk)
    if causal and i > j:
        ours, own = mine(**arrays)[0], theirs(**arrays)[0]
        close(ours[:, :, i - j :], own[:, :, i - j :])
        assert (ours[:, :, : i - j] == 0).all()
        close(own[:, :, : i - j], arrays["v"].mean(2, keepdim=True).expand(2, 4, i - j, 6))
    else:
        compare(mine, theirs, arrays)


def test_x_transformers_heads_are_tiled_there_and_grouped_in_attend(xt: ModuleType) -> None:
    arrays = qkv(hk=2)
    out, _ = hook.Attend(heads=4)(**arrays)
    grouped = attend_torch.attend(**arrays)
    close(out[:, [0, 3]], grouped[:, [0, 3]])
    assert (out - grouped)[:, [1, 2]].abs().amax((0, 2, 3)).min() > 0.1


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("hk", [2, 4])
@pytest.mark.parametrize(
    "shape", [(2, 7), (1, 7), (2, 1, 1, 7), (1, 1, 5, 7), (1, 4, 5, 7), (2, 4, 5, 7), (2, 4, 1, 7)], ids=str
)
def test_x_transformers_masks(xt: ModuleType, shape: tuple[int, ...], hk: int, causal: bool) -> None:
    torch.manual_seed(3)
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True  # no row is empty
    mine, theirs = attends(xt, causal=causal, heads=4)
    compare(mine, theirs, {**qkv(5, 7, hk), "mask": mask})


@pytest.mark.parametrize("hk", [2, 4])
@pytest.mark.parametrize("shape", [(5, 7), (4, 5, 7), (1, 4, 5, 7), (2, 4, 5, 7), (2, 1, 1, 7)], ids=str)
def test_x_transformers_attn_bias(xt: ModuleType, shape: tuple[int, ...], hk: int) -> None:
    torch.manual_seed(3)
    mine, theirs = attends(xt, causal=True, heads=4)
    compare(mine, theirs, {**qkv(5, 7, hk), "attn_bias": torch.randn(shape), "mask": lengths_mask(2, 7, 7, 4)})


def test_x_transformers_causal_of_the_call_stands_over_the_constructors(xt: ModuleType) -> None:
    for made, called in ((True, False), (False, True)):
        compare(*attends(xt, causal=made, heads=4), qkv(), causal=called)


def test_x_transformers_rows_that_mask_and_causal_empty_together(xt: ModuleType) -> None:
    """Left padding: 0 here; there 0 only if the mask alone empties the row, else the mean of v, later keys included."""
    mine, theirs = attends(xt, causal=True, heads=4)
    arrays = qkv()
    mask = torch.arange(5) >= torch.tensor([2, 0])[:, None]
    ours, own = mine(**arrays, mask=mask)[0], theirs(**arrays, mask=mask)[0]
    close(ours[1], own[1])
    close(ours[0, :, 2:], own[0, :, 2:])
    assert (ours[0, :, :2] == 0).all()
    close(own[0, :, :2], arrays["v"][0].mean(1, keepdim=True).expand(4, 2, 6))
    mask[0] = False
    ours, own = mine(**arrays, mask=mask)[0], theirs(**arrays, mask=mask)[0]
    assert (ours[0] == 0).all()
    assert (own[0] == 0).all()
    close(ours[1], own[1])


def decoder(xt: ModuleType, **options: Any) -> nn.Module:
    layers = xt.Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, **options)
    return xt.TransformerWrapper(num_tokens=20, max_seq_len=32, attn_layers=layers)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_kv_heads": 2, "alibi_pos_bias": True},
        {"attn_one_kv_head": True, "rotary_pos_emb": True},
        {"attn_qk_norm": True},
        {"attn_num_mem_kv": 2},
        {"rel_pos_bias": True},
        {"attn_flash": True},
        {"attn_max_attend_past": 3},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_x_transformers_decoder(xt: ModuleType, options: dict[str, Any]) -> None:
    """Ids go in, so gradients are those of the weights; padding on the right."""
    torch.manual_seed(0)
    mine, theirs = twins(xt, hook.Attend, lambda: decoder(xt, **options))
    agree(mine, theirs, torch.randint(0, 20, (3, 9)), mask=lengths_mask(3, 9, 9, 6, 2))


def test_x_transformers_encoder_and_cross_attention(xt: ModuleType) -> None:
    torch.manual_seed(0)
    mine, theirs = twins(
        xt, hook.Attend, lambda: xt.Encoder(dim=32, depth=2, heads=4, attn_dim_head=8, attn_kv_heads=2)
    )
    agree(mine, theirs, torch.randn(2, 7, 32), mask=lengths_mask(2, 7, 7, 4))
    mine, theirs = twins(
        xt, hook.Attend, lambda: xt.Decoder(dim=32, depth=1, heads=4, attn_dim_head=8, cross_attend=True)
    )
    agree(mine, theirs, torch.randn(2, 5, 32), context=torch.randn(2, 7, 32), context_mask=lengths_mask(2, 7, 7, 4))


def test_x_transformers_cached_generation(xt: ModuleType) -> None:
    """The host's own loop, key/value cache and all, gives the same logits at every step."""
    torch.manual_seed(0)
    mine, theirs = twins(xt, hook.Attend, lambda: decoder(xt, attn_kv_heads=2, alibi_pos_bias=True))
    caches = [None, None]
    ids = torch.randint(0, 20, (2, 4))
    with torch.no_grad():
        for _ in range(4):
            steps = [
                side(ids, cache=cache, return_intermediates=True)
                for side, cache in zip((mine, theirs), caches, strict=True)
            ]
            caches = [cache for _, cache in steps]
            close(steps[0][0], steps[1][0])
            ids = torch.cat((ids, steps[1][0][:, -1:].argmax(-1)), 1)
        assert caches[0].attn_intermediates[0].cached_kv[0].shape[-2] == 7


def test_x_transformers_constructor_is_theirs_and_refuses_the_rest_by_name(xt: ModuleType) -> None:
    """Every argument of theirs is one of ours with the same default; each that changes the numbers is refused."""
    ours, own = (inspect.signature(cls).parameters for cls in (hook.Attend, xt.Attend))
    assert [*ours] == [*own, "implementation"]
    call, own_call = (inspect.signature(cls.forward).parameters for cls in (hook.Attend, xt.Attend))
    assert [*call] == [*own_call]
    without_effect = {"heads", "qk_norm", "flash", "sparse_topk_straight_through", "gumbel_softmax_temp", "row_mask"}
    without_effect |= {"gumbel_softmax_hard", "logit_softclamp_value"}
    served = {"dropout", "causal", "scale", "q", "k", "v", "mask", "attn_bias", "self"}
    assert {*hook.REFUSED} == {*own, *own_call} - without_effect - served
    on = {"sparse_topk": 2, "custom_attn_fn": torch.sigmoid, "cope": nn.Identity(), "sdp_kwargs": {"enable_math": True}}
    for name in hook.REFUSED.keys() & own.keys():
        with pytest.raises(UnsupportedError) as error:
            hook.Attend(**{name: on.get(name, True)})
        assert error.value.reasons == ((name, hook.REFUSED[name]),)
    assert isinstance(hook.Attend(**{name: own[name].default for name in own if name != "self"}), nn.Module)


def test_x_transformers_refusals_name_every_option_and_what_to_do(xt: ModuleType) -> None:
    with pytest.raises(UnsupportedError) as error:
        hook.Attend(sigmoid=True, softclamp_logits=True)
    assert str(error.value).splitlines() == [
        "attend cannot stand in for the Attend of x_transformers with:",
        "  sigmoid: its weights are not a softmax of the logits",
        "  softclamp_logits: it clamps after attn_bias is added, where attend caps before",
        "Leave them at their defaults, or keep the Attend of x_transformers for this layer.",
    ]
    logits = torch.zeros(2, 4, 5, 5)
    with pytest.raises(UnsupportedError) as error:
        hook.Attend()(**qkv(), prev_attn=logits, attn_delta=logits, flash_pack_seq_kwargs={})
    assert [name for name, _ in error.value.reasons] == ["prev_attn", "attn_delta", "flash_pack_seq_kwargs"]


def test_x_transformers_softclamp_is_not_softcap_where_there_is_a_bias(xt: ModuleType) -> None:
    """Why softclamp_logits is refused: their bias goes in before the cap."""
    arrays, bias = qkv(), 3 * torch.ones(1, 1, 1, 5).cumsum(-1)
    theirs = xt.Attend(softclamp_logits=True, logit_softclamp_value=2.0)
    close(theirs(**arrays)[0], attend_torch.attend(**arrays, softcap=2.0))
    assert (
        theirs(**arrays, attn_bias=bias)[0] - attend_torch.attend(**arrays, bias=bias, softcap=2.0)
    ).abs().max() > 0.1


def test_x_transformers_logits_that_are_not_there_cannot_be_read(xt: ModuleType) -> None:
    """With None in their place, residual attention would go on without them and say nothing."""
    _, intermediates = hook.Attend()(**qkv())
    assert isinstance(intermediates, xt.Intermediates)
    assert intermediates.cached_kv is None
    assert "Intermediates" in repr(intermediates)
    for name in ("qk_similarities", "pre_softmax_attn", "post_softmax_attn"):
        with pytest.raises(UnsupportedError, match=f"{name}: a fused attention keeps neither logits nor weights"):
            getattr(intermediates, name)
    mine, _ = twins(xt, hook.Attend, lambda: decoder(xt, residual_attn=True))
    with pytest.raises(UnsupportedError, match="pre_softmax_attn"):
        mine(torch.zeros(1, 3, dtype=torch.long))


def test_x_transformers_dropout_in_training(xt: ModuleType) -> None:
    arrays, module = qkv(), hook.Attend(dropout=0.5)
    torch.manual_seed(1)
    first, second = module(**arrays)[0], module(**arrays)[0]
    torch.manual_seed(1)
    assert torch.equal(module(**arrays)[0], first)
    assert not torch.equal(first, second)
    close(module.eval()(**arrays)[0], xt.Attend(dropout=0.5).eval()(**arrays)[0])


def test_x_transformers_wrong_arguments_are_attends_own() -> None:
    with pytest.raises(ValueError, match="dropout: expected a probability"):
        hook.Attend(dropout=1.5)
    with pytest.raises(ValueError, match="implementation: expected one of"):
        hook.Attend(implementation="nonesuch")
    with pytest.raises(ValueError, match="k: expected a number of key/value heads that divides the 4 heads of q"):
        hook.Attend()(**qkv(hk=3))
    assert repr(hook.Attend(causal=True, scale=10)) == "Attend(causal=True, scale=10)"

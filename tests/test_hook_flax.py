"""Flax's own attention modules with `attend` inside give what they give with Flax's attention inside."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attend_jax import UnsupportedError, attend
from attend_jax.convert import seed_from_key
from attend_jax.hooks.flax import linen_attention_fn, nnx_attention_fn

# Each program runs once.
pytestmark = pytest.mark.usefixtures("compile_fast")

# Both sides do the same float32 sums in another order. A dot of n terms is off by about sqrt(n) / 2 roundings of its
# largest partial sum; projections, logits, values and output (n <= 24) follow each other, a gradient twice over, and
# they add up like a random walk: measured, less than 4. 16 leaves a factor of four; a wrong key is off by 2**16 or
# more.
ROUNDINGS = 16
B, N, F, H = 3, 6, 24, 4


def assert_close(ours: Any, theirs: Any) -> None:
    """Equal structure, shapes and dtypes, every value within ROUNDINGS of the largest of all.

    Of all, since some gradients are sums that cancel: that of the key's bias is 0 but for rounding.
    """
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    bound = ROUNDINGS * 2**-23 * max(float(np.abs(want).max()) for want in jax.tree.leaves(theirs))
    for (path, want), got in zip(jax.tree_util.tree_leaves_with_path(theirs), jax.tree.leaves(ours), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        np.testing.assert_allclose(got, want, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))


def assert_differ(ours: Any, theirs: Any) -> None:
    """Further apart than 1 percent of the largest value."""
    assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() > 0.01 * np.abs(np.asarray(theirs)).max()


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def key_mask() -> np.ndarray:
    """(b, j), with 6, 4 and 1 real keys."""
    return np.arange(N)[None] < np.array([6, 4, 1])[:, None]


MASKS: Mapping[str, Any] = {
    "none": None,
    "bool (b 1 1 j)": key_mask()[:, None, None],
    "float 0/1 causal (b 1 i j)": nn.make_causal_mask(jnp.ones((B, N))),
    "float, several values (b 1 i j)": 2.5 * nn.make_attention_mask(jnp.ones((B, N)), np.float32(key_mask())),
    "int (1 h i j)": (np.random.default_rng(1).random((1, H, N, N)) < 0.7).astype(np.int32) | np.eye(N, dtype=np.int32),
    "bool (b h i j)": (np.random.default_rng(2).random((B, H, N, N)) < 0.5) | np.eye(N, dtype=bool),
}


def linen_layer(attention_fn: Callable = nn.dot_product_attention, **options: Any) -> nn.MultiHeadDotProductAttention:
    options = {"num_heads": H, "bias_init": nn.initializers.normal(0.5)} | options
    return nn.MultiHeadDotProductAttention(attention_fn=attention_fn, **options)


def nnx_layer(attention_fn: Callable = nnx.dot_product_attention, **options: Any) -> nnx.MultiHeadAttention:
    options = {"decode": False, "bias_init": nnx.initializers.normal(0.5), "rngs": nnx.Rngs(0, dropout=7)} | options
    return nnx.MultiHeadAttention(H, F, attention_fn=attention_fn, **options)


def linen_run(layer: nn.Module, x: jax.Array, **call: Any) -> Any:
    """Output, and gradients of everything that has one."""
    params = jax.jit(layer.init)(jax.random.key(3), x)["params"]

    def loss(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = layer.apply({"params": params}, x, **call)
        return (out * draw(*out.shape, seed=9)).sum(), out

    gradients, out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    return out, gradients


def nnx_run(layer: nnx.Module, x: jax.Array, **call: Any) -> Any:
    """The same for NNX."""

    def loss(layer: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = layer(x, **call)
        return (out * draw(*out.shape, seed=9)).sum(), out

    gradients, out = nnx.jit(nnx.grad(loss, argnums=(0, 1), has_aux=True))(layer, x)
    return out, (nnx.to_pure_dict(gradients[0]), gradients[1])


def function_run(fn: Callable, mask: Any, **call: Any) -> Any:
    """Output, and gradients of query, key and value."""
    arrays = tuple(draw(B, N, H, 5, seed=s) for s in range(3))

    def loss(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = fn(*arrays, mask=mask, **call)
        return (out * draw(*out.shape, seed=9)).sum(), out

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)


@pytest.mark.parametrize("mask", MASKS)
def test_the_functions_agree_with_flaxs_own(mask: str) -> None:
    theirs = function_run(nn.dot_product_attention, MASKS[mask])
    for fn in (linen_attention_fn, nnx_attention_fn):
        assert_close(function_run(fn, MASKS[mask]), theirs)
    both = np.tril(np.ones((N, N), bool)) & (True if MASKS[mask] is None else np.asarray(MASKS[mask]) != 0)
    assert_close(
        function_run(nnx_attention_fn, MASKS[mask], is_causal=True), function_run(nn.dot_product_attention, both)
    )


@pytest.mark.parametrize("mask", ["none", "float 0/1 causal (b 1 i j)"])
def test_linen_agrees_with_its_own_attention(mask: str) -> None:
    x, options = draw(B, N, F), {"normalize_qk": mask == "none", "force_fp32_for_softmax": True}
    assert_close(
        *(
            linen_run(linen_layer(fn, **options), x, mask=MASKS[mask])
            for fn in (linen_attention_fn, nn.dot_product_attention)
        )
    )


@pytest.mark.parametrize(("mask", "is_causal"), [("none", True), ("float, several values (b 1 i j)", False)])
def test_nnx_agrees_with_its_own_attention(mask: str, is_causal: bool) -> None:
    x, call, options = draw(B, N, F), {"mask": MASKS[mask], "is_causal": is_causal}, {"normalize_qk": mask == "none"}
    assert_close(
        *(nnx_run(nnx_layer(fn, **options), x, **call) for fn in (nnx_attention_fn, nnx.dot_product_attention))
    )


def test_nnx_grouped_heads() -> None:
    x, call = draw(B, N, F), {"mask": MASKS["bool (b h i j)"], "is_causal": True}
    assert_close(
        *(nnx_run(nnx_layer(fn, num_kv_heads=2), x, **call) for fn in (nnx_attention_fn, nnx.dot_product_attention))
    )
    assert_close(*(nnx_layer(fn, num_kv_heads=1)(x, **call) for fn in (nnx_attention_fn, nnx.dot_product_attention)))


def test_cross_attention_and_its_causal_alignment() -> None:
    """More keys than queries: Flax aligns is_causal top-left, and so does the hook unless it is told otherwise."""
    x, memory = draw(B, 4, F), draw(B, N, F, seed=1)
    assert_close(*(nnx_layer(fn)(x, memory, is_causal=True) for fn in (nnx_attention_fn, nnx.dot_product_attention)))
    right = nnx_layer(partial(nnx_attention_fn, q_offset=N - 4))(x, memory, is_causal=True)
    seen = jnp.tril(jnp.ones((4, N), bool), N - 4)[None, None]
    assert_close(right, nnx_layer()(x, memory, mask=seen))
    assert_differ(right, nnx_layer()(x, memory, is_causal=True))


@pytest.mark.parametrize("batch", [(), (2,), (2, 1, 3)])
@pytest.mark.parametrize("kind", ["none", "full", "ones", "short"])
def test_leading_batch_axes_are_folded(batch: tuple[int, ...], kind: str) -> None:
    q, k, v = (draw(*batch, N, H, 5, seed=s) for s in range(3))
    random = np.random.default_rng(4).random((*batch, 1, N, N)) < 0.6
    random |= np.eye(N, dtype=bool)
    first = random.reshape(-1, N, N)[0]
    mask = {"none": None, "full": random, "ones": first.reshape(*(1 for _ in batch), 1, N, N), "short": first}[kind]
    bias = None if kind == "none" else draw(*batch[-1:], 1, N, N, seed=5)
    theirs = nn.dot_product_attention(q, k, v, bias, mask)
    for fn in (linen_attention_fn, nnx_attention_fn):
        assert_close(fn(q, k, v, bias, mask), theirs)


def test_modules_take_leading_batch_axes() -> None:
    x, mask = draw(2, 3, N, F), nn.make_causal_mask(jnp.ones((2, 3, N)))
    variables = linen_layer().init(jax.random.key(3), x)
    assert_close(
        *(linen_layer(fn).apply(variables, x, mask=mask) for fn in (linen_attention_fn, nn.dot_product_attention))
    )
    assert_close(*(nnx_layer(fn)(x, mask=mask) for fn in (nnx_attention_fn, nnx.dot_product_attention)))


def test_batch_axes_of_size_0() -> None:
    q = draw(2, 0, N, H, 5)
    assert linen_attention_fn(q, q, q, mask=jnp.ones((2, 0, 1, 1, N))).shape == (2, 0, N, H, 5)


def test_linen_gives_a_function_with_keyword_arguments_no_mask_and_ours_gets_it() -> None:
    seen = {}

    def swallows(query: jax.Array, key: jax.Array, value: jax.Array, **keywords: Any) -> jax.Array:
        seen.update(keywords)
        return nn.dot_product_attention(query, key, value, **keywords)

    x, mask = draw(B, N, F), MASKS["float 0/1 causal (b 1 i j)"]
    variables = linen_layer().init(jax.random.key(3), x)
    swallowed, theirs, ours, bound = (
        linen_layer(fn).apply(variables, x, mask=mask)
        for fn in (
            swallows,
            nn.dot_product_attention,
            linen_attention_fn,
            partial(linen_attention_fn, implementation="einsum"),
        )
    )
    assert seen == {}
    assert_differ(swallowed, theirs)
    assert_close(ours, theirs)
    assert_close(bound, theirs)


def test_everything_that_flax_passes_is_named() -> None:
    """Also what a later Flax will pass: the test asks the installed one."""
    seen: set[str] = set()

    def probe(query: jax.Array, key: jax.Array, value: jax.Array, **keywords: Any) -> jax.Array:
        seen.update(keywords)
        return query

    x = draw(B, N, F)
    nnx_layer(probe)(x)
    assert {"mask", "is_causal", "module", "dropout_rng"} <= seen <= set(inspect.signature(nnx_attention_fn).parameters)
    seen.clear()
    probe.__signature__ = inspect.signature(nn.dot_product_attention)  # type: ignore[attr-defined]
    linen_layer(probe).init(jax.random.key(3), x, sow_weights=True)
    assert (
        {"mask", "module", "qk_attn_weights_einsum", "dropout_rng"}
        <= seen
        <= set(inspect.signature(linen_attention_fn).parameters)
    )
    for fn in (linen_attention_fn, nnx_attention_fn):
        assert all(p.kind is not p.VAR_KEYWORD for p in inspect.signature(fn).parameters.values())


def test_linen_dropout() -> None:
    x = draw(B, N, F)
    layer = linen_layer(linen_attention_fn, dropout_rate=0.5)
    variables = layer.init(jax.random.key(3), x, deterministic=True)
    run = partial(layer.apply, variables, x)
    still = run(deterministic=True)
    assert_close(still, linen_layer(dropout_rate=0.5).apply(variables, x, deterministic=True))
    first, again, other = (run(deterministic=False, rngs={"dropout": jax.random.key(seed)}) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert_differ(first, still)
    assert_differ(first, other)
    shared = linen_layer(linen_attention_fn, dropout_rate=0.5, broadcast_dropout=False)
    np.testing.assert_array_equal(
        first, shared.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(1)})
    )


def test_nnx_dropout() -> None:
    x = draw(B, N, F)

    def layer(fn: Callable = nnx_attention_fn, seed: int = 7, **options: Any) -> nnx.MultiHeadAttention:
        return nnx_layer(fn, dropout_rate=0.5, rngs=nnx.Rngs(0, dropout=seed), **options)

    still = layer()(x, deterministic=True)
    assert_close(still, layer(nnx.dot_product_attention)(x, deterministic=True))
    made = layer()
    first, second = made(x, deterministic=False), made(x, deterministic=False)
    np.testing.assert_array_equal(first, layer()(x, deterministic=False))
    np.testing.assert_array_equal(first, layer(broadcast_dropout=False)(x, deterministic=False))
    assert_differ(first, still)
    assert_differ(first, second)
    assert_differ(first, layer(seed=8)(x, deterministic=False))


@pytest.mark.parametrize(
    "key", [jax.random.key(5), jax.random.PRNGKey(5), jax.random.key(5, impl="rbg")], ids=["threefry", "raw", "rbg"]
)
def test_dropout_is_attends_own_with_the_seed_of_the_key(key: jax.Array) -> None:
    q, k, v = (draw(2, 3, N, H, 5, seed=s) for s in range(3))
    want = attend(
        *(x.reshape(6, N, H, 5) for x in (q, k, v)), dropout=0.3, dropout_seed=seed_from_key(key), layout="bnhd"
    )
    for fn in (linen_attention_fn, nnx_attention_fn):
        np.testing.assert_array_equal(fn(q, k, v, dropout_rng=key, dropout_rate=0.3), want.reshape(q.shape))
        assert_close(fn(q, k, v, dropout_rate=0.3, deterministic=True), nn.dot_product_attention(q, k, v))


def test_linen_cached_decoding() -> None:
    x = draw(2, 2, N, F)
    variables = linen_layer().init(jax.random.key(3), x)
    whole = linen_layer().apply(variables, x, mask=nn.make_causal_mask(jnp.ones((2, 2, N))))
    layer = linen_layer(linen_attention_fn, decode=True)
    cache = jax.tree.map(jnp.zeros_like, layer.init(jax.random.key(3), x)["cache"])

    @jax.jit
    def step(cache: Any, x: jax.Array) -> Any:
        out, changed = layer.apply({**variables, "cache": cache}, x, mutable=["cache"])
        return out, changed["cache"]

    for t in range(N):
        out, cache = step(cache, x[:, :, t : t + 1])
        assert_close(out, whole[:, :, t : t + 1])


@pytest.mark.parametrize("is_causal", [False, True])
def test_nnx_cached_decoding(is_causal: bool) -> None:
    """is_causal changes nothing there. With Flax's own it hides every key but the first: a documented difference."""
    x, options = draw(B, N, F), {"num_kv_heads": 2}
    whole = nnx_layer(**options)(x, is_causal=True)
    ours, theirs = (nnx_layer(fn, **options) for fn in (nnx_attention_fn, nnx.dot_product_attention))
    for layer in (ours, theirs):
        layer.decode = True
        layer.init_cache(x.shape)
    step = nnx.jit(lambda layer, x: layer(x, is_causal=is_causal))
    last = []
    for t in range(N):
        last = [step(layer, x[:, t : t + 1]) for layer in (ours, theirs)]
        assert_close(last[0], whole[:, t : t + 1])
    if is_causal:
        assert_differ(last[1], whole[:, -1:])
        layer = nnx_layer(**options)
        assert_close(last[1], first_value(layer, x))
    else:
        assert_close(last[1], whole[:, -1:])


def first_value(layer: nnx.MultiHeadAttention, x: jax.Array) -> jax.Array:
    """What attention to key 0 alone comes to, (b, 1, f)."""
    value = jnp.repeat(layer.value(x[:, :1]), H // layer.num_kv_heads, -2)
    return layer.out(value)


def test_a_row_without_a_key_is_0_where_flax_gives_the_mean() -> None:
    q, k, v = (draw(B, N, H, 5, seed=s) for s in range(3))
    mask = np.ones((B, 1, N, N), bool)
    mask[1, :, 2] = False
    empty = (1, 2)
    for fn, own in ((linen_attention_fn, nn.dot_product_attention), (nnx_attention_fn, nnx.dot_product_attention)):
        ours, theirs = fn(q, k, v, mask=mask), own(q, k, v, mask=mask)
        np.testing.assert_array_equal(ours[empty], 0)
        np.testing.assert_allclose(theirs[empty], v[1].mean(0), atol=1e-6)
        assert_close(ours.at[empty].set(0), theirs.at[empty].set(0))
        leak = jax.grad(lambda v, fn=fn: fn(q, k, v, mask=mask)[empty].sum())(v)
        np.testing.assert_array_equal(leak, 0)


def test_half_precision_modules_keep_their_dtype() -> None:
    """Within 8 roundings of that dtype: Flax rounds logits, weights, sums and projections to it, one by one."""
    x, dtype = draw(B, N, F), jnp.bfloat16
    with jax.numpy_dtype_promotion("standard"):  # Flax's own functions need it
        variables = linen_layer().init(jax.random.key(3), x)
        pairs = (
            [linen_layer(fn, dtype=dtype).apply(variables, x) for fn in (linen_attention_fn, nn.dot_product_attention)],
            [nnx_layer(fn, dtype=dtype)(x) for fn in (nnx_attention_fn, nnx.dot_product_attention)],
        )
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype == dtype
        bound = 8 * float(jnp.finfo(dtype).eps) * float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), rtol=0, atol=bound)


def test_dtype_is_honoured_and_precision_never_shortens_a_product() -> None:
    q, k, v = (draw(B, N, H, 5, seed=s) for s in range(3))
    for fn in (linen_attention_fn, nnx_attention_fn):
        assert fn(q, k, v, dtype=jnp.bfloat16).dtype == jnp.bfloat16
        assert fn(*(x.astype(jnp.bfloat16) for x in (q, k, v)), dtype=jnp.float32).dtype == jnp.float32
        for precision in (None, "default", jax.lax.Precision.HIGHEST):
            np.testing.assert_array_equal(fn(q, k, v, precision=precision), fn(q, k, v))


def test_sown_weights_and_replaced_einsums_are_refused_by_name() -> None:
    x = draw(B, N, F)
    with pytest.raises(UnsupportedError, match="sow_weights: a fused attention has no weights"):
        linen_layer(linen_attention_fn).init(jax.random.key(3), x, sow_weights=True)
    with pytest.raises(UnsupportedError, match="sow_weights: a fused attention has no weights"):
        nnx_layer(nnx_attention_fn)(x, sow_weights=True)
    layer = linen_layer(
        linen_attention_fn,
        qk_attn_weights_einsum_cls=lambda: jnp.einsum,
        attn_weights_value_einsum_cls=lambda: jnp.einsum,
    )
    with pytest.raises(UnsupportedError) as error:
        layer.init(jax.random.key(3), x)
    assert [name for name, _ in error.value.reasons] == ["qk_attn_weights_einsum", "attn_weights_value_einsum"]


@pytest.mark.parametrize("options", [
    {"window_size": (2, 1)}, {"softcap": 1.5}, {"scale": 0.1}, {"sinks": np.float32([0.5, -1, 2, 0])},
    {"implementation": "einsum"},
], ids=lambda options: next(iter(options)))  # fmt: skip
def test_options_of_attend_are_bound_with_partial(options: dict[str, Any]) -> None:
    x, mask = draw(B, N, F), MASKS["bool (b 1 1 j)"]
    for fn, module in ((linen_attention_fn, linen_layer), (nnx_attention_fn, nnx_layer)):
        seen = []

        def spy(query: jax.Array, key: jax.Array, value: jax.Array, seen: list = seen, **others: Any) -> jax.Array:
            seen.append((query, key, value))
            return query

        layer = module(partial(fn, **options))
        if module is linen_layer:
            variables = layer.init(jax.random.key(3), x)
            out = layer.apply(variables, x, mask=mask)
            linen_layer(spy).apply(variables, x, mask=mask)
            project = partial(linen_layer(lambda *qkv: attend(*qkv, mask, layout="bnhd", **options)).apply, variables)
        else:
            out = jax.jit(lambda x, layer=layer: layer(x, mask=mask))(x)
            nnx_layer(spy)(x, mask=mask)
            project = nnx_layer(lambda q, k, v, **others: attend(q, k, v, mask, layout="bnhd", **options))
        assert_close(out, project(x))
        if "implementation" not in options:
            assert_differ(fn(*seen[0], mask=mask, **options), fn(*seen[0], mask=mask))


@pytest.mark.parametrize(("call", "words"), [
    ({"mask": np.ones((2, 1, 1, N), bool)}, r"mask: expected a shape that broadcasts .* \(3,\), got bool"),
    ({"mask": np.ones((B, 1, 1, 1, N), bool)}, r"mask: expected a shape that broadcasts to \(\*batch, h, i, j\)"),
    ({"mask": np.ones((B, 1, 1, N + 1), bool)}, r"mask: expected each axis 1 or full, .* = \(3, 4, 6, 6\)"),
    ({"bias": np.ones((2, 1, 1, N), np.float32)}, r"bias: expected a shape that broadcasts"),
    ({"dropout_rate": 0.5}, r"dropout_rng: expected a JAX key where dropout_rate > 0 and deterministic is False"),
    ({"dropout_rate": 1.0, "dropout_rng": jax.random.key(0)}, r"dropout: expected a probability in \[0, 1\)"),
], ids=["batch", "rank", "keys", "bias", "key", "rate"])  # fmt: skip
def test_wrong_arguments_say_what_to_do(call: dict[str, Any], words: str) -> None:
    q = draw(B, N, H, 5)
    for fn in (linen_attention_fn, nnx_attention_fn):
        with pytest.raises(ValueError, match=words):
            fn(q, q, q, **call)


def test_batch_axes_that_differ_are_not_folded_together() -> None:
    q, k = draw(2, 3, N, H, 5), draw(3, 2, N, H, 5)
    for fn in (linen_attention_fn, nnx_attention_fn):
        with pytest.raises(
            ValueError, match=r"key: expected \(\*batch, j, hk, d\) with the batch axes \(2, 3\) of query, got"
        ):
            fn(q, k, k)
        with pytest.raises(ValueError, match=r"query: expected \(\*batch, i, h, d\), got float32 of shape \(6, 5\)"):
            fn(q[0, 0, :, 0], k, k)


def test_a_window_in_cached_decoding_needs_an_offset() -> None:
    q, k = draw(B, 1, H, 5), draw(B, N, H, 5)
    with pytest.raises(ValueError, match="q_offset: expected a value, since 1 query against 6 keys"):
        nnx_attention_fn(q, k, k, is_causal=True, window_size=(2, 0))
    ours = nnx_attention_fn(q, k, k, is_causal=True, window_size=(2, 0), q_offset=jnp.int32(4))
    assert_close(ours, attend(q, k, k, np.isin(np.arange(N), [2, 3, 4])[None], layout="bnhd"))

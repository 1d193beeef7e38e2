"""Factored per-example gradients against the gradients themselves, formed one by one with `vmap`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdp_jax import bookkeeping

D, K, CLASSES = 10, 12, 7


@pytest.fixture(autouse=True)
def every_leaf_is_large(monkeypatch):
    monkeypatch.setattr(bookkeeping, "SMALL", 1)


def normal(seed: int, *shape: int):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 0.4)


def weighted_sum(fun, weights, *examples, skipped=None):
    """Norms of the leaves, their sums with the same weights for each, and aux."""
    skipped = jnp.zeros(len(weights), bool) if skipped is None else skipped
    weigh = lambda skipped, norms: (jax.tree.map(lambda _: weights[: len(skipped)], norms), norms)  # noqa: E731
    sums, norms, aux = bookkeeping.weighted_sum(fun, weigh, skipped, examples)
    return jax.tree.leaves(norms), jax.tree.leaves(sums), aux


def cross_entropy(logits, label):
    return -jax.nn.log_softmax(logits)[label]


def layer_norm(h, scale):
    return scale * (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)


def attention(h, w):
    q, k, v = (jnp.einsum("td,dnh->tnh", h, w["qkv"][i]) for i in range(3))
    scores = jax.nn.softmax(jnp.einsum("tnh,snh->nts", q, k), -1)
    return jnp.einsum("nts,snh,nhd->td", scores, v, w["out"])


# Each model: (parameters, loss of one example). An example is x (positions, D) and a label.
def mlp():
    params = {"in": normal(0, D, K), "bias": normal(1, K), "out": normal(2, K, CLASSES)}
    return params, lambda p, x, y: cross_entropy(jax.nn.gelu(x @ p["in"] + p["bias"]).mean(0) @ p["out"], y)


def vit():
    params = {
        "embed": normal(0, D, K),
        "norm": normal(1, K),
        "attention": {"qkv": normal(2, 3, K, 2, K // 2), "out": normal(3, 2, K // 2, K)},
        "up": normal(4, K, 2 * K),
        "down": normal(5, 2 * K, K),
        "head": normal(6, K, CLASSES),
    }

    def loss(p, x, y):
        h = x @ p["embed"]
        h = h + attention(layer_norm(h, p["norm"]), p["attention"])
        h = h + jax.nn.gelu(h @ p["up"]) @ p["down"]
        return cross_entropy(h.mean(0) @ p["head"], y)

    return params, loss


def tied_embedding():
    params = {"table": normal(0, CLASSES, D), "mix": normal(1, D, D)}

    def loss(p, x, y):
        h = jnp.tanh((x + p["table"][jnp.arange(len(x)) % CLASSES]) @ p["mix"]) @ p["mix"].T
        return cross_entropy(h.mean(0) @ p["table"].T, y)

    return params, loss


def conv_stem():
    params = {"kernel": normal(0, 3, D, K), "head": normal(1, K, CLASSES)}

    def loss(p, x, y):
        h = jax.lax.conv_general_dilated(x[None], p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        return cross_entropy(jax.nn.relu(h[0]).mean(0) @ p["head"], y)

    return params, loss


def scan_over_layers(remat: bool = False):
    params = {
        "embed": normal(0, D, K),
        "layers": {"w": normal(1, 3, K, K), "b": normal(2, 3, K)},
        "head": normal(3, K, CLASSES),
    }

    def loss(p, x, y):
        def layer(h, w):
            return h + jnp.tanh(h @ w["w"] + w["b"]), None

        h, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x @ p["embed"], p["layers"])
        return cross_entropy(h.mean(0) @ p["head"], y)

    return params, loss


def patch_embedding():
    params = {"kernel": normal(0, 2, 5, 3, K), "head": normal(1, K, CLASSES)}

    def loss(p, x, y):
        picture = jnp.outer(x[0], jnp.sin(jnp.arange(4.0) + x[-1, :4])).reshape(1, 10, 4, 1) * jnp.arange(1.0, 4)
        layout = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(picture, p["kernel"].swapaxes(0, 1), (5, 2), "VALID", dimension_numbers=layout)
        return cross_entropy(jax.nn.gelu(h).mean((0, 1, 2)) @ p["head"], y)

    return params, loss


def embedding():
    params = {"table": normal(0, 9, K), "place": normal(1, 5, K), "head": normal(2, K, CLASSES)}

    def loss(p, x, y):
        tokens = (jnp.abs(x[:, 0]) * 40).astype(int) % 9  # some of them more than once
        h = p["table"][tokens] + jnp.take(p["place"], jnp.arange(len(x)), axis=0)
        return cross_entropy(jnp.tanh(h * (1 + x.sum())).mean(0) @ p["head"], y)

    return params, loss


def stacked_layers():
    """A Python loop over layers whose weights lie in one array."""
    params = {"layers": normal(0, 3, D, D), "head": normal(1, D, CLASSES)}

    def loss(p, x, y):
        for i in range(3):
            x = x + jnp.tanh(x @ p["layers"][i])
        return cross_entropy(x.mean(0) @ p["head"], y)

    return params, loss


@jax.custom_vjp
def rectified(h, w):
    return jax.nn.relu(h @ w)


rectified.defvjp(
    lambda h, w: (rectified(h, w), (h, w)),
    lambda kept, g: ((g * (kept[0] @ kept[1] > 0)) @ kept[1].T, kept[0].T @ (g * (kept[0] @ kept[1] > 0))),
)


def custom_rule():
    params = {"in": normal(0, D, K), "head": normal(1, K, CLASSES)}
    return params, lambda p, x, y: cross_entropy(rectified(x, p["in"]).mean(0) @ p["head"], y)


def scan_in_remat():
    """One layer of weights used in every step, and a stack of others; all of it inside a remat."""
    params, stacked = scan_over_layers()
    params = {**params, "shared": normal(4, K, K)}

    def loss(p, x, y):
        return stacked({**p, "embed": p["embed"] @ p["shared"]}, x, y) + jnp.sum((x @ p["embed"] @ p["shared"]) ** 2)

    return params, jax.checkpoint(loss)


def remat():
    params, loss = mlp()
    return params, lambda p, x, y: jax.checkpoint(loss)(p, jnp.tanh(x), y)


def layer_norm_only():
    params, loss = vit()
    rest = {name: value for name, value in params.items() if name != "norm"}
    return {"norm": params["norm"]}, lambda p, x, y: loss({**rest, **p}, x, y)


def adapters():
    base = normal(0, D, K)
    params = {"a": normal(1, D, 2), "b": normal(2, 2, K), "head": normal(3, K, CLASSES)}
    return params, lambda p, x, y: cross_entropy(jnp.tanh(x @ (base + p["a"] @ p["b"])).mean(0) @ p["head"], y)


def clips_mean():
    params, loss = vit()
    return params, lambda p, x, y: jax.vmap(lambda clip: loss(p, clip, y))(jnp.stack([x, x[::-1] * 0.5])).mean()


def residual():
    params, loss = vit()
    return params, lambda p, x, y: loss(p, x, y) - loss(p, x * 0.9, y)


MODELS = {
    "mlp": mlp,
    "vit": vit,
    "tied embedding": tied_embedding,
    "conv stem": conv_stem,
    "patch embedding": patch_embedding,
    "embedding": embedding,
    "stacked layers": stacked_layers,
    "custom rule": custom_rule,
    "scan in remat": scan_in_remat,
    "scan": scan_over_layers,
    "remat": remat,
    "scan and remat": functools.partial(scan_over_layers, True),
    "layer norm only": layer_norm_only,
    "adapters": adapters,
    "mean over clips": clips_mean,
    "residual": residual,
}


def batch(size: int, positions: int):
    return normal(10 + size, size, positions, D), jnp.arange(size) % CLASSES


SIZES = [(1, 1), (7, 5)]


@pytest.mark.parametrize(
    ("name", "size", "positions"),
    [*((name, *size) for name in MODELS for size in SIZES), ("vit", 64, 5), ("vit", 0, 5)],
)
def test_norms_and_weighted_sum_equal_those_of_formed_gradients(name, size, positions):
    with jax.enable_x64(True):
        params, loss = MODELS[name]()
        x, y = batch(size, positions)
        weights = normal(3, size)

        @jax.jit
        def oracle(p):
            formed = jax.vmap(jax.grad(loss), (None, 0, 0))(p, x, y)
            squares = [jnp.sum(jnp.square(leaf), range(1, leaf.ndim)) for leaf in jax.tree.leaves(formed)]
            return [jnp.sqrt(square) for square in squares], jax.tree.map(
                lambda leaf: jnp.tensordot(weights, leaf, 1), formed
            )

        @jax.jit
        def ours(p):
            return weighted_sum(lambda x, y: (jax.grad(loss)(p, x, y), loss(p, x, y)), weights, x, y)

        exact, total = oracle(params)
        norms, sums, values = ours(params)
        np.testing.assert_allclose(values, jax.vmap(lambda x, y: loss(params, x, y))(x, y), rtol=1e-9)
        np.testing.assert_allclose(norms, exact, rtol=1e-9, atol=1e-9)
        for got, want in zip(sums, jax.tree.leaves(total), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12 * np.abs(want).max(initial=0))


def plan(name: str) -> dict[str, str]:
    """How each leaf of a model's gradient is treated; nothing is computed."""
    params, loss = MODELS[name]()
    ways = bookkeeping.explain(lambda x, y: (jax.grad(loss)(params, x, y), ()), batch(2, 3))
    return {jax.tree_util.keystr(path): way for path, way in jax.tree.leaves_with_path(ways)}


@pytest.mark.parametrize(
    ("name", "leaf", "way"),
    [
        ("vit", "['up']", "gram"),
        ("vit", "['down']", "gram"),
        ("vit", "['norm']", "value"),
        ("residual", "['up']", "gram: pair"),
        ("tied embedding", "['table']", "form"),
        ("patch embedding", "['kernel']", "gram"),
        ("conv stem", "['kernel']", "form"),
        ("embedding", "['table']", "gram: scattered"),
        ("stacked layers", "['layers']", "form"),
        ("custom rule", "['in']", "gram"),
        ("scan", "['layers']['w']", "inside"),
        ("remat", "['in']", "inside"),
        ("scan and remat", "['layers']['w']", "inside"),
        ("scan in remat", "['layers']['w']", "inside"),
    ],
)
def test_which_way_a_leaf_goes(name, leaf, way):
    assert plan(name)[leaf].startswith(way)


def test_close_views_do_not_cancel():
    """The two views of a record differ by 1e-4, their gradients by as little: in float32, Gram matrices of the two
    products would cancel to noise, and to something negative for some records."""
    with jax.enable_x64(True):
        params, loss = vit()
        x, y = batch(16, 5)
        other = x + 1e-4 * normal(8, *x.shape)

        def difference(p, x, other, y):
            return jax.tree.map(jnp.subtract, jax.grad(loss)(p, x, y), jax.grad(loss)(p, other, y))

        @jax.jit
        def norms(p, x, other):
            fun = lambda *one: (difference(p, *one), ())  # noqa: E731
            ways = jax.tree.leaves(bookkeeping.explain(fun, (x, other, y)))
            assert any(way.startswith("gram: pair") for way in ways)
            return jnp.linalg.norm(jnp.stack(weighted_sum(fun, jnp.ones(16), x, other, y)[0]), axis=0)

        exact = norms(params, x, other)
        single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, x, other))
        np.testing.assert_allclose(norms(*single), exact, rtol=2e-2)  # the views themselves are rounded to 6e-8


@pytest.mark.parametrize("name", ["mlp", "embedding", "conv stem", "scan", "residual", "adapters"])
def test_dropped_examples_contribute_exactly_nothing(name):
    params, loss = MODELS[name]()
    x, y = batch(4, 3)
    dropped = jnp.array([False, True, True, False])
    weights = jnp.array([0.3, 0.0, 0.0, 0.7])

    @jax.jit
    def total(x):
        return weighted_sum(lambda x, y: (jax.grad(loss)(params, x, y), ()), weights, x, y, skipped=dropped)[1]

    jax.tree.map(np.testing.assert_array_equal, total(x.at[1].set(jnp.nan).at[2, 0, 0].set(jnp.inf)), total(x))


def test_effects_are_refused_rather_than_lost():
    def fun(x):
        jax.debug.print("{}", x.sum())
        return jax.grad(lambda p: jnp.sum(x @ p))(normal(0, D, K)), ()

    with pytest.raises(NotImplementedError, match="effects"):
        weighted_sum(fun, jnp.ones(2), normal(1, 2, 3, D))


def test_low_precision_products_are_summed_in_float32():
    """A sum of 4096 equal bfloat16 gradients: float32 sums are right, bfloat16 ones stop growing at 256."""
    p, x = jnp.zeros((4, 4), jnp.bfloat16), jnp.ones((4096, 2, 4), jnp.bfloat16)
    fun = lambda x: (jax.grad(lambda p: jnp.sum((x @ p).astype(jnp.float32)))(p), ())  # noqa: E731
    norms, sums, _ = weighted_sum(fun, jnp.ones(4096), x)
    np.testing.assert_array_equal(sums[0], np.full((4, 4), 8192))
    assert norms[0].dtype == jnp.float32


@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_indices_outside_a_table_add_nothing(mode):
    """As in the gather they come from: out of bounds is dropped, or clipped to the last row."""
    table, tokens = normal(0, 6, K), jnp.array([[1, 1, 17], [5, 9, 9]])

    formed = jax.vmap(lambda tokens: jax.grad(gathered)(table, tokens, mode))(tokens)
    fun = lambda tokens: (jax.grad(gathered)(table, tokens, mode), ())  # noqa: E731
    assert bookkeeping.explain(fun, (tokens,)).startswith("gram")
    norms, sums, _ = weighted_sum(fun, jnp.array([2.0, 1.0]), tokens)
    np.testing.assert_allclose(norms[0], jnp.sqrt(jnp.sum(formed**2, (1, 2))), rtol=1e-5)
    np.testing.assert_allclose(sums[0], 2 * formed[0] + formed[1], rtol=1e-5)


def gathered(table, tokens, mode):
    """Rows outside have a gradient of their own, which must go nowhere."""
    rows = table.at[tokens].get(mode=mode, **({"fill_value": 1.0} if mode == "fill" else {}))
    return jnp.sum(rows**2)

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


@pytest.mark.parametrize(("size", "positions"), [(1, 1), (7, 5)])
@pytest.mark.parametrize("name", MODELS)
def test_norms_and_weighted_sum_equal_those_of_formed_gradients(name, size, positions):
    with jax.enable_x64(True):
        params, loss = MODELS[name]()
        x, y = batch(size, positions)

        def gradient(p, x, y):
            return jax.grad(loss)(p, x, y), loss(p, x, y)

        weights = normal(3, size)

        @jax.jit
        def oracle(p):
            formed = jax.vmap(lambda x, y: gradient(p, x, y)[0])(x, y)
            squares = [jnp.sum(jnp.square(leaf).reshape(size, -1), 1) for leaf in jax.tree.leaves(formed)]
            return squares, jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1), formed)

        @jax.jit
        def ours(p):
            factored, values = bookkeeping.factored_vmap(gradient, (None, 0, 0))(p, x, y)
            enclosed, _ = bookkeeping.factored_vmap(gradient, (None, 0, 0), enclose=True)(p, x, y)
            return factored.squared_norms(), enclosed.squared_norms(), factored.weighted_sum(weights), values

        squares, total = oracle(params)
        norms, norms_inside, got, values = ours(params)
        np.testing.assert_allclose(values, jax.vmap(lambda x, y: loss(params, x, y))(x, y), rtol=1e-9)
        np.testing.assert_allclose(norms, squares, rtol=1e-9, atol=1e-18)
        np.testing.assert_allclose(norms_inside, squares, rtol=1e-9, atol=1e-18)
        jax.tree.map(
            lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12 * np.abs(want).max()),
            got,
            total,
        )


def plan(name: str, enclose: bool = False) -> tuple[dict[str, str], bool]:
    """How each leaf of a model's gradient is treated, and whether sums can be had; nothing is computed."""
    params, loss = MODELS[name]()
    found = []

    def trace(p, x, y):
        fun = bookkeeping.factored_vmap(lambda p, x, y: (jax.grad(loss)(p, x, y), ()), (None, 0, 0), enclose=enclose)
        factored, _ = fun(p, x, y)
        ways = jax.tree.leaves_with_path(factored.explain())
        found.append(({jax.tree_util.keystr(path): way for path, way in ways}, factored.has_sums))
        return factored.squared_norms()

    jax.eval_shape(trace, params, *batch(2, 3))
    return found[0]


def test_large_leaves_of_a_vision_transformer_stay_factored():
    ways, has_sums = plan("vit")
    assert has_sums
    assert ways["['up']"].startswith("gram")
    assert ways["['down']"].startswith("gram")
    assert ways["['norm']"].startswith("value")


def test_the_signed_factors_of_a_residual_are_formed_not_subtracted_as_gram_matrices():
    ways, _ = plan("residual")
    assert ways["['up']"].startswith("form: a sum (2 products)")


@pytest.mark.parametrize("name", ["scan", "remat", "scan and remat"])
def test_norms_inside_a_scan_or_remat_need_no_formed_leaf(name):
    ways, has_sums = plan(name, enclose=True)
    assert not has_sums
    assert any(way.startswith("inside") for way in ways.values())


def test_dropped_examples_contribute_exactly_nothing():
    params, loss = mlp()
    x, y = batch(4, 3)
    bad = x.at[1].set(jnp.nan).at[2, 0, 0].set(jnp.inf)
    weights, dropped = jnp.array([0.3, 0.0, 0.0, 0.7]), jnp.array([False, True, True, False])

    @jax.jit
    def total(x):
        fun = bookkeeping.factored_vmap(lambda p, x, y: (jax.grad(loss)(p, x, y), ()), (None, 0, 0))
        return fun(params, x, y)[0].drop(dropped).weighted_sum(weights)

    jax.tree.map(np.testing.assert_array_equal, total(bad), total(x))


def test_effects_are_refused_rather_than_lost():
    def fun(p, x):
        jax.debug.print("{}", x.sum())
        return jax.grad(lambda p: jnp.sum(x @ p))(p), ()

    with pytest.raises(NotImplementedError, match="effects"):
        bookkeeping.factored_vmap(fun, (None, 0))(normal(0, D, K), normal(1, 2, 3, D))


def test_low_precision_products_are_summed_in_float32():
    """A sum of 4096 equal bfloat16 gradients: float32 sums are right, bfloat16 ones stop growing at 256."""
    p, x = jnp.zeros((4, 4), jnp.bfloat16), jnp.ones((4096, 2, 4), jnp.bfloat16)
    fun = bookkeeping.factored_vmap(
        lambda p, x: (jax.grad(lambda p: jnp.sum((x @ p).astype(jnp.float32)))(p), ()), (None, 0)
    )
    factored, _ = fun(p, x)
    np.testing.assert_array_equal(factored.weighted_sum(jnp.ones(4096)), np.full((4, 4), 8192))
    assert factored.squared_norms()[0].dtype == jnp.float32

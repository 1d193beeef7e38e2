import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdp_jax.config import ViTConfig
from maskdp_jax.data import Views
from maskdp_jax.model import Network
from maskdp_jax.objectives import Objective

CLASSES = 3


@pytest.fixture(scope="module")
def network():
    return Network(ViTConfig(width=16, depth=1, heads=2, tubelet=(2, 8, 8)), 2, 8, CLASSES, seed=0)


@pytest.fixture(scope="module")
def params(network):
    return network.init | {"head.kernel": jax.random.normal(jax.random.key(1), (16, CLASSES))}


@pytest.fixture(scope="module")
def record() -> Views:
    """One record of two clips and an empty place."""
    rng = np.random.default_rng(0)
    composite, public = rng.integers(0, 256, (2, 3, 2, 8, 8, 3), dtype=np.uint8)
    return Views(composite, public, np.array([0, 2, 0]), np.array([0.5, 0.5, 0], np.float32), np.array(False))


def close(one, other, tolerance=1e-4):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=tolerance), one, other)


def loss(network, params, video, label):
    return -jax.nn.log_softmax(network.logits(params, video[None])[0])[label]


@pytest.fixture(scope="module")
def gradients(network, params, record):
    """By hand: the mean over the record's two clips of ∇L on either view."""

    def mean(params, video):
        return sum(loss(network, params, video[k], record.label[k]) for k in range(2)) / 2

    grad = jax.jit(jax.grad(mean))
    return grad(params, record.composite), grad(params, record.public)


@pytest.mark.parametrize("name", ["dp_sgd", "maskdp_two_step", "maskdp_residual"])
def test_terms_of_one_path(network, params, record, gradients, name):
    objective = Objective(network, name)
    weights = objective.start(params, {})
    full, public = gradients
    expected = full if name != "maskdp_residual" else jax.tree.map(jnp.subtract, full, public)
    close(jax.jit(objective.term)(objective.noisy(weights), weights, record), expected)


def test_term_of_two_paths(network, params, record):
    """∇_W of cross-entropy by hand: λ·mean_k gap_k ⊗ (softmax − onehot)."""
    objective = Objective(network, "maskdp", lambda_=0.7)
    weights = objective.start(params, {})
    weights = weights._replace(head={"kernel": jax.random.normal(jax.random.key(2), (16, CLASSES))})
    features, logits = jax.jit(network.features), jax.jit(network.logits)
    gap = (features(params, record.composite[:2]) - features(params, record.public[:2])) / 4
    logits = logits(params, record.public[:2]) + 0.7 * gap @ weights.head["kernel"]
    errors = jax.nn.softmax(logits) - jax.nn.one_hot(record.label[:2], CLASSES)
    close(jax.jit(objective.term)(weights.head, weights, record), {"kernel": 0.7 * gap.T @ errors / 2}, 1e-5)


@pytest.mark.parametrize("name", ["maskdp", "maskdp_residual"])
def test_equal_views_are_seen_byte_for_byte(network, name, record):
    twice = jax.tree.map(lambda x: np.stack([x, x]), record)
    twice.public[1] = twice.composite[1]
    assert Objective(network, name).unchanged(twice).tolist() == [False, True]
    twice.public[1, 0, 0, 0, 0, 0] ^= 1
    assert not Objective(network, name).unchanged(twice).any()


@pytest.mark.parametrize("name", ["dp_sgd", "maskdp_two_step"])
def test_swapped_terms_are_never_dropped(network, name, record):
    twice = jax.tree.map(lambda x: np.stack([x, x]), record)
    assert not Objective(network, name).unchanged(twice._replace(public=twice.composite)).any()


@pytest.mark.parametrize("name", ["public_only", "maskdp"])
def test_no_private_pixel_reaches_the_exact_gradient(network, params, record, gradients, name):
    batch = jax.tree.map(lambda x: np.stack([x, x]), record)
    batch = batch._replace(padding=np.array([False, True]))
    objective = Objective(network, name)
    run = jax.jit(objective.exact)
    _, gradient = run(params, {}, batch)
    close(gradient, gradients[1])
    _, other = run(params, {}, batch._replace(composite=255 - batch.composite))
    jax.tree.map(np.testing.assert_array_equal, gradient, other)


def test_public_view_passes_the_private_path_by(network, params, record):
    """h(0; W) = 0 for every W, and λ = 0 is `public_only`."""
    objective = Objective(network, "maskdp")
    weights = objective.start(params, {})._replace(head={"kernel": jnp.full((16, CLASSES), 1e6)})
    plain = jax.jit(network.logits)(params, record.public)
    for answer in (
        jax.jit(objective.logits)(weights, record.public, record.public),
        jax.jit(Objective(network, "maskdp", lambda_=0.0).logits)(weights, record.composite, record.public),
    ):
        np.testing.assert_allclose(answer, plain, rtol=1e-5, atol=1e-5)


def test_empty_places_do_not_count(network, params, record):
    objective = Objective(network, "dp_sgd")
    weights = objective.start(params, {})
    term = jax.jit(objective.term)
    filled = record._replace(composite=record.composite.copy())
    filled.composite[2] = 77
    close(term(params, weights, record), term(params, weights, filled))

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maskdp.errors import UserError
from maskdp_jax.config import ViTConfig
from maskdp_jax.model import Network, fits, refuse_mixing

CONFIG = ViTConfig(width=32, depth=2, heads=2, tubelet=(2, 8, 8))


@pytest.fixture(scope="module")
def network():
    return Network(CONFIG, 4, 16, 3, seed=0)


@pytest.fixture(scope="module")
def params(network):
    """A head that is not 0, so that logits say something."""
    return network.init | {"head.kernel": 0.1 * jax.random.normal(jax.random.key(1), (32, 3))}


def videos(count: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (count, 4, 16, 16, 3), dtype=np.uint8))


def test_head_starts_at_zero(network):
    assert not np.asarray(jax.jit(network.logits)(network.init, videos(3))).any()


def test_logits_are_the_head_of_the_features(network, params):
    video = videos(3)
    by_hand = jax.jit(network.features)(params, video) @ params["head.kernel"] + params["head.bias"]
    np.testing.assert_allclose(jax.jit(network.logits)(params, video), by_hand, rtol=1e-4, atol=1e-5)


def test_no_record_reaches_the_output_of_another(network, params):
    """∂(output i)/∂(input j) = 0 for i ≠ j, exactly (rule 7)."""
    logits = jax.jit(lambda x: network.logits(params, x))
    derivative = np.asarray(jax.jit(jax.jacrev(lambda x: logits(x).sum(-1)))(videos(2).astype(jnp.float32)))
    assert not derivative[0, 1].any()
    assert not derivative[1, 0].any()
    assert derivative[0, 0].any()


def test_batchnorm_is_refused():
    class Mixing(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    with pytest.raises(UserError, match=r"norm is a BatchNorm"):
        refuse_mixing(Mixing())


def test_time_and_place_matter(network, params):
    video = videos(1)
    both = jnp.concatenate([video, video[:, ::-1], video[:, :, ::-1]])
    plain, backwards, upside_down = jax.jit(network.features)(params, both)
    assert not np.allclose(plain, backwards, atol=1e-4)
    assert not np.allclose(plain, upside_down, atol=1e-4)


def test_tubelet_must_divide_the_clip():
    with pytest.raises(UserError, match="tubelet"):
        Network(dataclasses.replace(CONFIG, tubelet=(2, 5, 5)), 4, 16, 3, seed=0)


def test_trunk_is_taken_and_head_kept_fresh(network, params):
    other = {name: value + 1 for name, value in params.items() if not name.startswith("head.")}
    other |= {"head.kernel": jnp.ones((32, 9)), "head.bias": jnp.ones(9)}
    taken = fits(other, network.init, head=False)
    np.testing.assert_array_equal(taken["norm.scale"], network.init["norm.scale"] + 1)
    np.testing.assert_array_equal(taken["head.kernel"], network.init["head.kernel"])
    with pytest.raises(UserError, match=r"head\.bias"):
        fits(other, network.init, head=True)

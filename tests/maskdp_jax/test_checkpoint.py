import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdp.errors import UserError
from maskdp_jax.checkpoint import Checkpoints, released, split
from maskdp_jax.keys import RunSecret
from maskdp_jax.objectives import Weights
from maskdp_jax.step import State


def state(step: int) -> State:
    value = jnp.arange(3.0) + step
    weights = Weights({"blocks.0.a": value}, {}, {}, {"kernel": -value})
    return State(jnp.int32(step), weights, {"kernel": 2 * value}, ({"trace": value},), ())


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secrets")
    return [RunSecret.create(folder / name, name, "config", "data") for name in "ab"]


def test_newest_state_comes_back_exactly(tmp_path, secrets):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None
    for step in (1, 2, 5):
        checkpoints.save(state(step), secrets[0])
    assert checkpoints.latest() == 5
    for like in (state(0), jax.eval_shape(lambda: state(0))):
        restored = checkpoints.restore(like, secrets[0])
        assert jax.tree.structure(restored) == jax.tree.structure(state(0))
        jax.tree.map(np.testing.assert_array_equal, restored, state(5))
    with pytest.raises(UserError, match="another secret"):
        checkpoints.restore(state(0), secrets[1])
    checkpoints.close()
    assert sum(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir()) == 2


def test_no_checkpoint_is_said_so(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        Checkpoints(tmp_path).restore(state(0))


def test_average_is_what_is_released():
    assert released(state(1)).head["kernel"].tolist() == [2, 4, 6]


def test_split_by_name():
    params = {name: np.zeros(1) for name in ("blocks.0.norm_mlp.scale", "blocks.1.norm_mlp.scale", "head.bias")}
    trained, fixed = split(params, (r"blocks\.1\..*norm", "head"))
    assert set(trained) == {"blocks.1.norm_mlp.scale", "head.bias"}
    assert set(fixed) == {"blocks.0.norm_mlp.scale"}
    with pytest.raises(UserError, match="not a regular expression"):
        split(params, ("(",))
    with pytest.raises(UserError, match="matches no parameter"):
        split(params, ("head", "tail"))

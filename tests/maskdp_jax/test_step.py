import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from maskdp_jax import parallel, step
from maskdp_jax.config import ParallelConfig, ViTConfig
from maskdp_jax.data import Views
from maskdp_jax.lattice import Lattice
from maskdp_jax.mechanism import Mechanism
from maskdp_jax.model import Network
from maskdp_jax.noise import gaussian
from maskdp_jax.objectives import Objective

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sharded():
    """One noisy step: of `maskdp` on 1 device, on 2 in microbatches, on 4 by pmap; of the residual on 1 and 4.

    And one with the exact release: of `maskdp` on 1, 2, 4 and 8 devices and by pmap, one record at a time.
    """
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(ROOT / "tests/maskdp_jax/sharded_steps.py")]
    done = subprocess.run(words, env=os.environ | flags, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout)


CASES = [("maskdp", "two"), ("maskdp", "pmap"), ("maskdp_residual", "four")]


@pytest.mark.parametrize(("name", "devices"), CASES)
def test_devices_see_the_norms_of_one(sharded, name, devices):
    """Rule 3: were gradients summed over devices before clipping, norms would be larger."""
    alone = np.array(sharded[name]["one"]["norms"])
    assert (alone > 0).sum() == 6
    np.testing.assert_allclose(sharded[name][devices]["norms"], alone, rtol=1e-4)


@pytest.mark.parametrize(("name", "devices"), CASES)
def test_devices_make_the_step_of_one(sharded, name, devices):
    """Rule 4: noise is added once to the global sum, so neither its draw nor its scale knows the devices."""
    alone = sharded[name]["one"]["weights"]
    np.testing.assert_allclose(sharded[name][devices]["weights"], alone, rtol=1e-4, atol=1e-4)


def test_exact_release_is_the_same_to_the_bit_on_any_number_of_devices(sharded):
    heads = [steps["head"] for name, steps in sharded["maskdp"].items() if name.startswith("exact")]
    assert len(heads) == 5
    assert len(set(heads[0])) > 40
    assert all(head == heads[0] for head in heads)
    inexact = sharded["maskdp"]["one"]
    assert np.std(np.subtract(heads[0], inexact["head"])) < 3 * np.std(inexact["head"])


# --- one device -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    return Network(ViTConfig(width=16, depth=1, heads=2, tubelet=(2, 8, 8)), 2, 8, 3, seed=0)


def batch(rows: int) -> Views:
    rng = np.random.default_rng(0)
    composite, public = rng.integers(0, 256, (2, rows, 1, 2, 8, 8, 3), dtype=np.uint8)
    return Views(composite, public, np.arange(rows)[:, None] % 3, np.ones((rows, 1), np.float32), np.zeros(rows, bool))


class Release:
    """W's noised sum for `maskdp`, compiled once."""

    def __init__(self, network, noise: float, clip: float = 0.1, exact: bool = False):
        self.objective = Objective(network, "maskdp")
        self.weights = jax.device_get(self.objective.start(network.init, {}))
        given = {"noise_multiplier": noise, "l2_clip_norm": clip, "exact": exact}
        self.mechanism = Mechanism(num_units=8, batch_size=4, steps=1, **given)
        layout = parallel.Layout(ParallelConfig(devices=1))

        def one(weights, views, key):
            total, norms = step.release(self.objective, self.mechanism, layout, weights, views, key)
            return weights, total, norms

        self._run = layout.mapped(one)

    def __call__(self, views: Views, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        _, total, norms = self._run(self.weights, views, np.full(8, seed, np.uint32))
        return np.asarray(total["kernel"]), np.asarray(norms)


@pytest.fixture(scope="module")
def silent(network):
    return Release(network, 0.0)


def test_divisor_is_public(silent):
    """Rule 1: one record or eight in the batch, the same constant divides."""
    views = batch(8)
    alone = views._replace(padding=np.arange(8) > 0)
    others = views._replace(padding=np.arange(8) == 0)
    np.testing.assert_allclose(silent(alone)[0] + silent(others)[0], silent(views)[0], rtol=1e-4, atol=1e-7)
    assert np.linalg.norm(silent(alone)[0]) == pytest.approx(0.1 / 4, rel=1e-4)


def test_one_record_moves_the_sum_by_the_clip_norm_at_most(silent):
    views = batch(8)
    zeroed = views._replace(composite=views.composite.copy())
    zeroed.composite[3] = zeroed.public[3]
    moved = np.linalg.norm(silent(views)[0] - silent(zeroed)[0])
    assert 0 < moved <= 0.1 / silent.mechanism.divisor


def test_equal_views_contribute_exactly_nothing(silent):
    views = batch(8)
    total, norms = silent(views._replace(composite=views.public))
    assert not total.any()
    assert not norms.any()


def test_empty_batch_is_noise_alone(network):
    """Rule 2: padding adds exactly 0 and the step still adds its noise, of the stated scale."""
    noisy = Release(network, 3.0)
    empty = batch(8)._replace(padding=np.ones(8, bool))
    total, _ = noisy(empty, seed=5)
    expected = noisy.mechanism.noise_stddev * gaussian(np.full(8, 5, np.uint32), (16 * 3,)) / 4
    np.testing.assert_allclose(total.ravel(), expected, rtol=1e-5)
    draws = np.concatenate([noisy(empty, seed)[0].ravel() for seed in range(60)])
    assert draws.std() == pytest.approx(3.0 * 0.1 / 4, rel=0.06)


def test_exact_release_is_the_clipped_sum_and_noise_on_the_lattice(network, silent):
    """Without noise the sum to rounding, with it whole multiples of the spacing; padding adds exactly 0."""
    views = batch(8)._replace(padding=np.arange(8) == 2)
    exact = Release(network, 0.0, exact=True)
    lattice = Lattice.plan(0.0, 0.1, 8, 48)
    total, norms = exact(views)
    expected, expected_norms = silent(views)
    np.testing.assert_allclose(total, expected, atol=4.5 * lattice.spacing / 4)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-4)
    noisy = Release(network, 3.0, exact=True)
    spacing = Lattice.plan(3.0, 0.1, 8, 48).spacing / 4
    draws = np.concatenate([noisy(views._replace(padding=np.ones(8, bool)), seed)[0].ravel() for seed in range(60)])
    assert np.array_equal(np.float64(draws) / spacing % 1, np.zeros(len(draws)))
    assert draws.std() == pytest.approx(3.0 * 0.1 / 4, rel=0.06)


def test_private_head_is_averaged_over_the_second_half():
    empty = {}
    state = step.State(np.int32(0), step.Weights(empty, empty, empty, {"kernel": 0.0}), {"kernel": 0.0}, None, None)
    for iterate in (5.0, 7.0, 1.0, 2.0, 3.0, 6.0):
        state = state._replace(weights=state.weights._replace(head={"kernel": iterate}))
        state = step._finished(state, 6)
    assert float(state.average["kernel"]) == pytest.approx((2 + 3 + 6) / 3)


def test_layout_pads_rows_to_devices_and_microbatches():
    layout = parallel.Layout(ParallelConfig(devices=1, microbatch=4))
    assert [layout.padded(slots) for slots in (1, 4, 5, 9)] == [1, 4, 8, 12]
    assert layout.microbatch(12) == 4
    assert parallel.Layout(ParallelConfig(devices=1)).microbatch(12) is None


def test_schedule_warms_up_and_ends_at_zero(toy, tmp_path):
    from maskdp import config
    from maskdp_jax.config import TrainConfig

    words = toy.arguments(tmp_path, tmp_path, optim__steps=20, optim__warmup_steps=5, objective__learning_rate=1.0)
    optimizers = step.Optimizers.from_config(config.parse(TrainConfig, [*words, "--optim.momentum", "0"], "train"))
    state, sizes = optimizers.noisy.init(np.zeros(1)), []
    for _ in range(21):
        update, state = optimizers.noisy.update(np.ones(1), state)
        sizes.append(-float(update[0]))
    assert sizes[0] == 0
    assert max(sizes) == sizes[5] == pytest.approx(1.0)
    assert sizes[-1] == pytest.approx(0.0, abs=1e-6)
    assert isinstance(optimizers.exact, optax.GradientTransformation)

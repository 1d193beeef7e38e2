"""Run by `test_step.py` with 8 emulated devices: one step of two objectives on 1, 2, 4 and 8 of them. Prints JSON."""

import json
import sys

import jax
import numpy as np
import optax

from maskdp_jax import parallel, step
from maskdp_jax.config import ParallelConfig, ViTConfig
from maskdp_jax.data import Views
from maskdp_jax.mechanism import Mechanism
from maskdp_jax.model import Network
from maskdp_jax.objectives import Objective

LAYOUTS = {
    "one": ParallelConfig(devices=1),
    "two": ParallelConfig(devices=2, microbatch=2),
    "four": ParallelConfig(devices=4),
    "pmap": ParallelConfig(devices=4, device_map="pmap"),
}
EXACT = {f"exact on {devices}": ParallelConfig(devices=devices, microbatch=1) for devices in (1, 2, 4, 8)}
EXACT["exact by pmap"] = ParallelConfig(devices=2, device_map="pmap", microbatch=1)
CASES = {"maskdp": ("one", "two", "pmap"), "maskdp_residual": ("one", "four")}


def views(seed: int, rows: int) -> Views:
    rng = np.random.default_rng(seed)
    composite, public = rng.integers(0, 256, (2, rows, 1, 2, 8, 8, 3), dtype=np.uint8)
    padding = np.zeros(rows, bool)
    padding[[1, rows - 1]] = True
    return Views(composite, public, np.arange(rows)[:, None] % 3, np.ones((rows, 1), np.float32), padding)


def one_step(network: Network, name: str, layout: parallel.Layout, exact: bool) -> dict[str, list[float]]:
    """All weights and the norms after one noisy step from the same start."""
    params = network.init | {"head.kernel": jax.random.normal(jax.random.key(1), (16, 3))}
    objective = Objective(network, name)
    given = {"objective": name, "noise_multiplier": 0.1, "l2_clip_norm": 0.5, "public_batch": 8, "exact": exact}
    mechanism = Mechanism(num_units=8, batch_size=4, steps=3, **given)
    optimizers = step.Optimizers(optax.sgd(1.0), optax.sgd(1.0))
    state = layout.replicate(step.start(objective, optimizers, params, {}))
    batch = layout.shard(step.StepBatch(views(0, 8), views(1, 8)))
    keys = np.arange(8, dtype=np.uint32)
    state, _, norms = step.make_step(objective, mechanism, optimizers, layout)(state, batch, keys)
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).tolist()  # noqa: E731
    everything = (state.weights.theta, state.weights.head)
    return {"norms": np.ravel(norms).tolist(), "weights": flat(everything), "head": flat(state.weights.head or [0.0])}


def main() -> None:
    network = Network(ViTConfig(width=16, depth=1, heads=2, tubelet=(2, 8, 8)), 2, 8, 3, seed=0)
    found = {
        name: {key: one_step(network, name, parallel.Layout(LAYOUTS[key]), False) for key in keys}
        for name, keys in CASES.items()
    }
    found["maskdp"] |= {key: one_step(network, "maskdp", parallel.Layout(at), True) for key, at in EXACT.items()}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

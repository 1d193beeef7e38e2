"""What the exact release costs: time of one training step in integers over the same step in floating point.

    python benchmarks/exact_release.py --json

head    `maskdp`: the private head alone is noised (width · classes parameters).
model   `dp_sgd`: all parameters are, and the exact release forms each record's gradient, `--microbatch` at a time.

Both steps take turns within a round; the ratio is the median over rounds.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np

from maskdp_jax import parallel, step
from maskdp_jax.config import DataConfig as Data
from maskdp_jax.config import DPSGDConfig, MaskDPConfig, ParallelConfig, TrainConfig, ViTConfig
from maskdp_jax.data import Views
from maskdp_jax.mechanism import Mechanism
from maskdp_jax.model import Network
from maskdp_jax.objectives import Objective


def views(rows: int, frames: int, size: int) -> Views:
    """`rows` records of one clip of noise."""
    shape = (2, rows, 1, frames, size, size, 3)
    composite, public = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return Views(composite, public, np.zeros((rows, 1), int), np.ones((rows, 1), np.float32), np.zeros(rows, bool))


def case(name: str, given: argparse.Namespace) -> dict[str, float | int | str]:
    """Times of both steps of one case, in seconds."""
    objective_config = MaskDPConfig(noise_multiplier=1.0) if name == "head" else DPSGDConfig(noise_multiplier=1.0)
    network = Network(ViTConfig(width=given.width, depth=given.depth), given.frames, given.size, given.classes, seed=0)
    objective = Objective.from_config(network, objective_config)
    optimizers = step.Optimizers.from_config(TrainConfig(out="-", data=Data(path="-"), objective=objective_config))
    layout = parallel.Layout(ParallelConfig(devices=1, microbatch=0 if name == "head" else given.microbatch))
    rows = views(given.batch, given.frames, given.size)
    runs = {}
    for exact in (False, True):
        mechanism = Mechanism(
            10 * given.batch,
            given.batch,
            10**6,
            objective=objective.name,
            noise_multiplier=1.0,
            max_batch=given.batch,
            exact=exact,
        )
        compiled = step.make_step(objective, mechanism, optimizers, layout)
        state = layout.replicate(step.start(objective, optimizers, network.init, {}))
        batch = layout.shard(step.StepBatch(rows, rows if name == "head" else None))
        runs[exact] = [compiled, state, batch]
    coordinates = sum(leaf.size for leaf in jax.tree.leaves(objective.noisy(runs[True][1].weights)))
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(given.rounds + 1):
        for exact, (compiled, state, batch) in runs.items():
            began = time.perf_counter()
            state, *_ = jax.block_until_ready(compiled(state, batch, np.full(8, turn, np.uint32)))
            runs[exact][1] = state
            if turn:  # the first compiles
                times[exact].append(time.perf_counter() - began)
    return {
        "case": name,
        "coordinates": coordinates,
        "float_seconds": statistics.median(times[False]),
        "exact_seconds": statistics.median(times[True]),
        "ratio": statistics.median(b / a for a, b in zip(times[False], times[True])),
    }


def main() -> None:
    """Prints a row a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=("head", "model"), default=("head", "model"))
    sizes = {
        "width": 128,
        "depth": 4,
        "frames": 8,
        "size": 64,
        "classes": 60,
        "batch": 32,
        "microbatch": 8,
        "rounds": 7,
    }
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    rows = [case(name, given) for name in given.case]
    if given.json:
        print(json.dumps({"device": jax.devices()[0].device_kind, "rows": rows}, indent=2))
        return
    for row in rows:
        times = f"{row['float_seconds']:.3f} s in floats, {row['exact_seconds']:.3f} s exact"
        print(f"{row['case']:6} {row['coordinates']:>10} coordinates  {times}: {row['ratio']:.2f}x")


if __name__ == "__main__":
    main()

"""Time and memory of clipped gradients of a vision transformer: ours, jax_privacy's, Opacus's.

    python benchmarks/clipping.py --case vit residual
    python benchmarks/clipping.py --width 384 --batch 64 --memory_limit 8 --json

Every row computes Σ_i min(1, C/‖g_i‖)·g_i over one batch and nothing more; the first row of each framework is the plain
gradient of the summed loss, and the others are stated as ratios to it. C is far below every norm, so that each example
is clipped and a wrong norm shows in the result. Opacus (optional: `pip install 'maskdp[bench]'`) gets the same network
with the same weights, so its gradients are compared with jax_privacy's, too. Each framework multiplies at its own
default precision.

time        Median over rounds of (this row's time / its framework's plain gradient in the same round); all rows take
            turns within a round, so that whatever else the machine does falls on all of them.
temporary   What XLA says at compile time that the program needs besides its arguments and results. Not for torch.
peak        Measured over one step in a fresh process: the most memory held during the step less what was held before it
            and less the gradient. On a GPU from the framework's allocator; on a CPU only for torch, from the resident
            set (Linux), since XLA's own figure leaves nothing open there.
largest     With --memory_limit: the largest batch for which arguments, results and temporaries fit, by bisection over
            compiled programs that are never run (to one part in 16). Not for torch.
error       Largest difference to jax_privacy's gradient, over the largest entry, of the worst leaf.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import json
import multiprocessing
import operator
import os
import pathlib
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # processes and frameworks share the card

import jax
import jax.numpy as jnp
import jax_privacy
import numpy as np
import rich.console
import rich.table

import maskdp_jax.clipping

CASES = {
    "vit": "plain functions",
    "remat": "jax.checkpoint around each block",
    "scan": "lax.scan over stacked blocks",
    "scan_remat": "lax.scan over checkpointed blocks",
    "residual": "L(x) − L(x̃), twice the passes in every row",
    "layernorm": "only the LayerNorms are trained",
    "bf16": "float32 weights, bfloat16 compute",
}
JAX_METHODS = ("gradient", "maskdp", "jax_privacy")
TORCH_METHODS = ("gradient", "opacus hooks", "opacus ghost")
TORCH_CASES = ("vit", "layernorm")
PATCH, CLASSES = 1536, 60
CLIP_NORM = 1e-3


@dataclasses.dataclass(frozen=True)
class Shape:
    width: int
    depth: int
    heads: int
    tokens: int
    batch: int


# The network, in jax


def parameters(shape: Shape) -> dict[str, Any]:
    keys = iter(jax.random.split(jax.random.key(0), 2 + 4 * shape.depth))

    def linear(fan_in, fan_out):
        weight = jax.random.normal(next(keys), (fan_in, fan_out)) / fan_in**0.5
        return {"weight": weight, "bias": jnp.zeros(fan_out)}

    def norm():
        return {"weight": jnp.ones(shape.width), "bias": jnp.zeros(shape.width)}

    def block():
        width = shape.width
        return {
            "norm1": norm(),
            "qkv": linear(width, 3 * width),
            "out": linear(width, width),
            "norm2": norm(),
            "up": linear(width, 4 * width),
            "down": linear(4 * width, width),
        }

    return {
        "embed": linear(PATCH, shape.width),
        "blocks": [block() for _ in range(shape.depth)],
        "norm": norm(),
        "head": linear(shape.width, CLASSES),
    }


def linear(layer, x):
    return x @ layer["weight"] + layer["bias"]


def norm(layer, x):
    y = x.astype(jnp.float32)
    y = (y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(y.var(-1, keepdims=True) + 1e-5)
    return y.astype(x.dtype) * layer["weight"] + layer["bias"]


def block(layers, x, *, heads):
    q, k, v = (
        part.reshape(*x.shape[:2], heads, -1)
        for part in jnp.split(linear(layers["qkv"], norm(layers["norm1"], x)), 3, -1)
    )
    x = x + linear(layers["out"], jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
    return x + linear(layers["down"], jax.nn.gelu(linear(layers["up"], norm(layers["norm2"], x))))


def cross_entropy(params, x, y, *, heads, case):
    """The sum over the batch."""
    layers = functools.partial(block, heads=heads)
    if case == "bf16":
        params, x = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, x))
    if "remat" in case:
        layers = jax.checkpoint(layers)
    x = linear(params["embed"], x)
    if "scan" in case:
        x, _ = jax.lax.scan(lambda x, layer: (layers(layer, x), None), x, params["blocks"])
    else:
        for layer in params["blocks"]:
            x = layers(layer, x)
    logits = linear(params["head"], norm(params["norm"], x).mean(1)).astype(jnp.float32)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).sum()


def problem(shape: Shape, case: str) -> tuple[Callable, Callable]:
    """The loss (trainable, frozen, batch) -> sum over the batch, and the function that makes its arguments."""
    entropy = functools.partial(cross_entropy, heads=shape.heads, case=case)

    def loss(trainable, frozen, batch):
        params = jax.tree.map(lambda t, f: f if t is None else t, trainable, frozen, is_leaf=lambda x: x is None)
        value = entropy(params, batch["x"], batch["y"])
        return value - entropy(params, batch["blank"], batch["y"]) if case == "residual" else value

    def arguments():
        params = parameters(shape)
        if "scan" in case:
            params["blocks"] = jax.tree.map(lambda *layers: jnp.stack(layers), *params["blocks"])
        learns = jax.tree_util.tree_map_with_path(
            lambda path, _: case != "layernorm" or "norm" in jax.tree_util.keystr(path), params
        )
        x = jax.random.normal(jax.random.key(1), (shape.batch, shape.tokens, PATCH))
        batch = {"x": x, "y": jax.random.randint(jax.random.key(2), (shape.batch,), 0, CLASSES)}
        if case == "residual":
            batch["blank"] = x * (jnp.arange(shape.tokens) % 2)[:, None]
        return (
            jax.tree.map(lambda leaf, learn: leaf if learn else None, params, learns),
            jax.tree.map(lambda leaf, learn: None if learn else leaf, params, learns),
            batch,
        )

    return loss, arguments


@functools.cache
def compiled(shape: Shape, case: str, method: str) -> jax.stages.Compiled:
    loss, arguments = problem(shape, case)
    options = {"l2_clip_norm": CLIP_NORM, "batch_argnums": 2}
    gradient = {
        "gradient": lambda: jax.grad(loss),
        "maskdp": lambda: maskdp_jax.clipping.clipped_grad(loss, **options),
        "jax_privacy": lambda: jax_privacy.clipped_grad(loss, **options),
    }[method]()
    return jax.jit(gradient).lower(*jax.eval_shape(arguments)).compile()


def jax_step(shape: Shape, case: str, method: str) -> Callable[[], Any]:
    run, arguments = compiled(shape, case, method), jax.block_until_ready(jax.jit(problem(shape, case)[1])())
    return lambda: jax.block_until_ready(run(*arguments))


# The same network, in torch


def torch_step(shape: Shape, case: str, method: str) -> Callable[[], Any]:
    """A step that returns the gradient as a tree like that of `jax_step`, of torch tensors."""
    import opacus
    import torch
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            width = shape.width
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            q, k, v = (
                part.unflatten(-1, (shape.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
            )
            x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return x + self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Linear(PATCH, shape.width), nn.LayerNorm(shape.width)
            self.blocks = nn.Sequential(*(Block() for _ in range(shape.depth)))
            self.head = nn.Linear(shape.width, CLASSES)

        def forward(self, x):
            return self.head(self.norm(self.blocks(self.embed(x))).mean(1))

    warnings.filterwarnings("ignore", "Full backward hook is firing")  # pixels need no gradient
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainable, frozen, batch = jax.tree.map(np.array, jax.jit(problem(shape, case)[1])())
    network = Network()
    own = dict(network.named_parameters())
    for leaves, learns in ((trainable, True), (frozen, False)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(leaves):
            parameter = own[jax.tree_util.keystr(path, simple=True, separator=".")]
            parameter.data = torch.from_numpy(leaf.T.copy())  # jax: (in, out), torch: (out, in)
            parameter.requires_grad = learns
    network.to(device)
    x, y = (torch.from_numpy(batch[name]).to(device) for name in "xy")
    y = y.long()

    entropy = nn.CrossEntropyLoss(reduction="sum")
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    options = {
        "noise_multiplier": 0.0,
        "max_grad_norm": CLIP_NORM,
        "expected_batch_size": None,
        "loss_reduction": "sum",
    }
    optimizer = torch.optim.SGD(learned, lr=0.0)
    model, criterion, finish, result = network, entropy, lambda: None, "grad"
    if method == "opacus hooks":
        model = opacus.GradSampleModule(network, loss_reduction="sum")
        optimizer = DPOptimizer(optimizer, **options)
        finish, result = optimizer.clip_and_accumulate, "summed_grad"
    elif method == "opacus ghost":
        model = GradSampleModuleFastGradientClipping(network, loss_reduction="sum", max_grad_norm=CLIP_NORM)
        optimizer = DPOptimizerFastGradientClipping(optimizer, **options)
        criterion = DPLossFastGradientClipping(model, optimizer, entropy, loss_reduction="sum")

    def step():
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        finish()
        if device == "cuda":
            torch.cuda.synchronize()
        return jax.tree_util.tree_map_with_path(
            lambda path, _: getattr(own[jax.tree_util.keystr(path, simple=True, separator=".")], result).t(), trainable
        )

    return step


# Measurements


def make_step(shape: Shape, case: str, framework: str, method: str) -> Callable[[], Any]:
    return {"jax": jax_step, "torch": torch_step}[framework](shape, case, method)


def peak_memory(shape: Shape, case: str, framework: str, method: str) -> int | None:
    """Bytes, see the top of this file; to be called in a fresh process. None: this machine does not tell."""
    step = make_step(shape, case, framework, method)
    if framework == "torch" and jax.default_backend() == "cpu":
        status = pathlib.Path("/proc/self/status")
        if not status.exists():
            return None
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is held now
        field = lambda name: 1024 * int(status.read_text().partition(name)[2].split()[0])  # noqa: E731
        before, gradient = field("VmRSS:"), step()
        after = field("VmHWM:")
    elif framework == "jax":
        device = jax.devices()[0]
        before, gradient = device.memory_stats()["bytes_in_use"], step()
        after = device.memory_stats()["peak_bytes_in_use"]
    else:
        import torch

        torch.cuda.reset_peak_memory_stats()
        before, gradient = torch.cuda.memory_allocated(), step()
        after = torch.cuda.max_memory_allocated()
    return after - before - sum(leaf.nbytes for leaf in jax.tree.leaves(gradient))


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


def largest_batch(shape: Shape, case: str, method: str, limit: float) -> int:
    """The largest batch whose compiled program fits in `limit` bytes, to one part in 16; 0 if a single one does not."""

    def fits(batch):
        memory = compiled(dataclasses.replace(shape, batch=batch), case, method).memory_analysis()
        needed = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        return needed <= limit

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def worst_error(gradient: Any, reference: Any) -> float:
    def error(one, other):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        return float(np.abs(one - other).max() / np.abs(other).max())

    return max(map(error, jax.tree.leaves(gradient), jax.tree.leaves(reference)))


def measure(shape: Shape, case: str, rounds: int, memory_limit: float | None) -> list[dict[str, Any]]:
    """One record for each row of `case`."""
    keys = [("jax", method) for method in JAX_METHODS]
    if case in TORCH_CASES and importlib.util.find_spec("opacus"):
        keys += [("torch", method) for method in TORCH_METHODS]
    steps = {key: make_step(shape, case, *key) for key in keys}

    def first_step(key):
        to_host = np.asarray if key[0] == "jax" else lambda leaf: leaf.detach().cpu().numpy().copy()
        return jax.tree.map(to_host, steps[key]())

    reference = first_step(("jax", "jax_privacy"))
    errors = {key: worst_error(first_step(key), reference) for key in keys if key[1] not in ("gradient", "jax_privacy")}
    steps["jax", "gradient"]()
    if ("torch", "gradient") in steps:
        steps["torch", "gradient"]()

    seconds = {key: [] for key in keys}
    for _ in range(rounds):
        for key in keys:
            start = time.perf_counter()
            steps[key]()
            seconds[key].append(time.perf_counter() - start)
    steps.clear()
    gc.collect()

    on_cpu = jax.default_backend() == "cpu"
    rows = []
    for framework, method in keys:
        own, plain = seconds[framework, method], seconds[framework, "gradient"]
        row = {
            "case": case,
            "framework": framework,
            "method": method,
            "time_ratio": statistics.median(map(operator.truediv, own, plain)),
            "seconds": statistics.median(own),
            "temporary_bytes": None,
            "peak_bytes": None,
            "largest_batch": None,
            "error": errors.get((framework, method)),
        }
        if framework == "jax":
            row["temporary_bytes"] = compiled(shape, case, method).memory_analysis().temp_size_in_bytes
            row["largest_batch"] = memory_limit and largest_batch(shape, case, method, memory_limit)
        if framework == "torch" or not on_cpu:
            row["peak_bytes"] = in_fresh_process(peak_memory, shape, case, framework, method)
        rows.append(row)
    return rows


def table(case: str, rows: list[dict[str, Any]]) -> rich.table.Table:
    result = rich.table.Table(title=f"{case}: {CASES[case]}", title_justify="left")
    for column in ("framework", "method", "time", "seconds", "temporary MB", "peak MB", "largest batch", "error"):
        result.add_column(column, justify="left" if column in ("framework", "method") else "right")
    for row in rows:
        cells = (
            f"{row['time_ratio']:.2f}×",
            f"{row['seconds']:.3f}",
            *(row[name] and f"{row[name] / 1e6:.0f}" for name in ("temporary_bytes", "peak_bytes")),
            row["largest_batch"] and str(row["largest_batch"]),
            row["error"] and f"{row['error']:.1e}",
        )
        result.add_row(row["framework"], row["method"], *(cell or "–" for cell in cells))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    for name, default in (("width", 768), ("depth", 4), ("heads", 12), ("tokens", 196), ("batch", 8), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--memory_limit", type=float, metavar="GIB", help="also find the largest batch that fits")
    parser.add_argument("--json", action="store_true", help="print JSON, not tables")
    arguments = parser.parse_args()
    shape = Shape(*(getattr(arguments, field.name) for field in dataclasses.fields(Shape)))
    limit = arguments.memory_limit and arguments.memory_limit * 2**30

    rows = []
    for case in arguments.case:
        rows += measure(shape, case, arguments.rounds, limit)
        if not arguments.json:
            rich.console.Console().print(table(case, [row for row in rows if row["case"] == case]))
    if arguments.json:
        packages = ("jax", "jax-privacy", "torch", "opacus")
        installed = {name.metadata["Name"].lower().replace("_", "-") for name in importlib.metadata.distributions()}
        print(
            json.dumps(
                {
                    "device": jax.devices()[0].device_kind,
                    "versions": {name: importlib.metadata.version(name) for name in packages if name in installed},
                    "shape": dataclasses.asdict(shape),
                    "rounds": arguments.rounds,
                    "rows": rows,
                },
                indent=2,
            )
        )


if __name__ == "__main__":
    main()

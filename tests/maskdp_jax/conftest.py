"""A small two-layer dataset: the avatar's colour tells part of the label, the scene behind it the rest."""

import pathlib
import types

import numpy as np
import pytest

from maskdp import layers

LABELS = ("wave", "bend", "jump", "sit")
COLOURS = np.array([[220, 60, 60], [60, 200, 60], [60, 60, 220], [200, 200, 60]])


def clip(
    number: int, rng: np.random.Generator, *, side: int = 16, frames: int = 4, tells: float = 0.6
) -> layers.TwoLayerClip:
    """A square avatar whose colour is the label's with probability `tells`, over stripes in one of two directions.

    Direction and brightness of the stripes are the label's two bits, under noise.
    """
    label = int(rng.integers(4))
    shown = label if rng.random() < tells else int(rng.integers(4))
    rgba = np.zeros((frames, side, side, 4), np.uint8)
    edge = side // 2
    top, left = rng.integers(0, side - edge, 2)
    rgba[:, top : top + edge, left : left + edge, :3] = COLOURS[shown]
    rgba[:, top : top + edge, left : left + edge, 3] = 255
    stripes = np.arange(side) % 4 // 2 * 120 - 60 + (70 if label % 2 else 170)
    scene = np.broadcast_to(stripes if label < 2 else stripes[:, None], (side, side))
    private = np.clip(scene[None, :, :, None] + rng.normal(0, 25, (frames, side, side, 3)), 0, 255).astype(np.uint8)
    return layers.TwoLayerClip(
        rgba=rgba,
        private=private,
        label=label,
        clip_id=f"video{number // 2:04d}-{number % 2}",
        video_id=f"video{number // 2:04d}",
        scene_id=f"room{number % 5}",
        subject_ids=(f"person{number % 7}",),
        source="0" * 64,
        fps=25.0,
    )


def write(folder: pathlib.Path, counts: dict[str, int], seed: int = 0, context: str = "none") -> pathlib.Path:
    """A dataset of `counts` clips a split under `folder`."""
    rng = np.random.default_rng(seed)
    first = {split: 1000 * place for place, split in enumerate(counts)}  # no video is in two splits
    splits = {split: [clip(first[split] + n, rng) for n in range(count)] for split, count in counts.items()}
    layers.write_dataset(folder, splits, LABELS, private_format="png", context=context)
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> pathlib.Path:
    """40 training clips (20 videos) and 16 test clips."""
    return write(tmp_path_factory.mktemp("data"), {"train": 40, "test": 16})


def arguments(data: pathlib.Path, out: pathlib.Path, objective: str = "maskdp", **changes) -> list[str]:
    """Command-line words of a run of a model of two blocks, 32 wide."""
    words = {
        "out": out,
        "data.path": data,
        "data.frames": 4,
        "data.size": 16,
        "model.width": 32,
        "model.depth": 2,
        "model.heads": 2,
        "model.tubelet": "[2,8,8]",
        "objective.type": objective,
        "objective.noise_multiplier": 1.0,
        "optim.steps": 4,
        "optim.batch": 8,
        "optim.public_batch": 8,
        "optim.warmup_steps": 1,
        "every.checkpoint": 2,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return [word for key, value in words.items() if value is not None for word in (f"--{key}", str(value))]


@pytest.fixture(scope="session")
def trained_run(dataset, tmp_path_factory) -> pathlib.Path:
    """The folder of a finished `maskdp` run of four steps."""
    from maskdp import config
    from maskdp_jax import config as typed
    from maskdp_jax import train

    words = arguments(dataset, tmp_path_factory.mktemp("runs") / "maskdp", every__evaluate=2, every__log=1)
    return train.train(config.parse(typed.TrainConfig, words, "train"))


@pytest.fixture(scope="session")
def toy() -> types.SimpleNamespace:
    """The functions above, for tests that need data or runs of their own."""
    return types.SimpleNamespace(LABELS=LABELS, clip=clip, write=write, arguments=arguments)

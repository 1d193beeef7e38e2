"""Utility: does a small action model that learned from avatars know the action in the recording, and the reverse?"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from anonymize.audit.findings import Finding, interval
from anonymize.audit.treatments import Crops, balanced, network_input
from maskdp import progress
from maskdp.config import positive

LEARNT = ("original", "anonymized", "silhouette", "box")


@dataclasses.dataclass(frozen=True)
class UtilityConfig:
    """The pupil.

    Attributes:
        frames: of a clip.
        repeats: networks, averaged.
        steps, batch, learning_rate: of Adam.
    """

    frames: int = 8
    repeats: int = 1
    steps: int = 400
    batch: int = 24
    learning_rate: float = 2e-3

    def __post_init__(self):
        positive(self, "frames", "repeats", "steps", "batch", "learning_rate")


class ActionNet(nn.Module):
    """Clips (N, T, 3, S, S) to logits: convolutions over space and time on the pictures and their changes."""

    def __init__(self, classes: int):
        super().__init__()
        widths = (6, 16, 32, 64)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv3d(a, b, 3, (1, 2, 2), 1), nn.GroupNorm(8, b), nn.ReLU())
                for a, b in itertools.pairwise(widths)
            ),
            nn.AdaptiveAvgPool3d((4, 3, 3)),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 36, classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        change = torch.diff(x, dim=1, prepend=x[:, :1])
        return self.layers(torch.cat([x, 3 * change], 2).movedim(1, 2))


def trained(clips: Sequence[Crops], treatment: str, classes: int, config: UtilityConfig, seed: int, advance):
    """An `ActionNet` that learned from the clips under a treatment."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    labels = np.array([clip.label for clip in clips])
    net = ActionNet(classes)
    optimizer = torch.optim.AdamW(net.parameters(), config.learning_rate, weight_decay=0.01)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - step / config.steps)
        picks = balanced(labels, rng, config.batch)
        batch = np.stack([clips[i].action[treatment] for i in picks])
        mirrored = rng.uniform(size=len(batch)) < 0.5
        batch[mirrored] = batch[mirrored, :, :, ::-1]
        reach = batch.shape[2] // 20
        shifts = rng.integers(-reach, reach + 1, (len(batch), 2))
        batch = np.stack([np.roll(clip, shift, (1, 2)) for clip, shift in zip(batch, shifts)])
        loss = F.cross_entropy(net(network_input(batch)), torch.from_numpy(labels[picks]), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        advance()
    return net.eval()


@torch.no_grad()
def correct(net: ActionNet, clips: Sequence[Crops], treatment: str) -> np.ndarray:
    """(N,) 1 where the action is named right."""
    named = [int(net(network_input(clip.action[treatment][None])).argmax()) for clip in clips]
    return np.array([float(name == clip.label) for name, clip in zip(named, clips)])


def check(clips: Sequence[Crops], classes: int, config: UtilityConfig, seed: int) -> list[Finding]:
    """Trained on the split `train`, tested on `test`: each treatment on itself, on recordings, and from recordings."""
    train = [clip for clip in clips if clip.split == "train" and clip.label >= 0]
    test = [clip for clip in clips if clip.split == "test" and clip.label >= 0]
    if not train or not test:
        return [Finding("action accuracy", None, "not checked: needs labelled clips in splits train and test")]
    right: dict[tuple[str, str], np.ndarray] = {}
    with progress.bar("utility", len(LEARNT) * config.repeats * config.steps, "steps") as advance:
        for name in LEARNT:
            nets = [trained(train, name, classes, config, seed + r, advance) for r in range(config.repeats)]
            for seen in LEARNT if name == "original" else {"original", name}:
                right[name, seen] = np.mean([correct(net, test, seen) for net in nets], 0)
    videos = [clip.video for clip in test]
    figures = {pair: interval(values, videos) for pair, values in right.items()}
    findings = [
        Finding(
            f"action accuracy, {name}",
            None,
            f"on itself {figures[name, name]}"
            + (
                ""
                if name == "original"
                else f", on recordings {figures[name, 'original']}, from recordings {figures['original', name]}"
            ),
            {f"{a} to {b}": dataclasses.asdict(value) for (a, b), value in figures.items() if name in (a, b)},
        )
        for name in LEARNT
    ]
    gains = {
        other: interval(right["anonymized", "original"] - right[other, "original"], videos)
        for other in ("silhouette", "box")
    }
    findings.append(
        Finding(
            "learnt from avatars rather than masked-out people, tested on recordings: accuracy gained",
            None,
            ", ".join(f"over {other} {gain}" for other, gain in gains.items())
            + f"; {len(train)} clips to learn from, {len(test)} to test, chance {1 / classes:.0%}",
            {other: dataclasses.asdict(gain) for other, gain in gains.items()},
        )
    )
    return findings

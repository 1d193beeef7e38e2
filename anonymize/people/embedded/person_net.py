"""The embedded person network: a small U-Net from a frame and its motion to a person mask and 14 joint heat maps.

It is trained on procedural renders alone (`train_person_net.py`): no photograph, no downloaded weights.
"""

import functools
import importlib.resources
import pathlib

import cv2
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

JOINTS = (
    *("nose", "neck", "left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist"),
    *("left_hip", "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle"),
)
MIRRORED = (0, 1, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12)
PAIRS = tuple((left, right) for left, right in enumerate(MIRRORED) if left < right)
STRIDE = 32  # sides of the network's input are multiples of this
WEIGHTS = "assets/person_net.safetensors"


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class _InvertedResidual(nn.Module):
    """Expansion by 3, a 5×5 (or strided 3×3) depthwise convolution, projection (arXiv 1801.04381, section 3.3)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        hidden, size = 3 * inputs, 5 if stride == 1 else 3
        self.shortcut = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, size, stride, size // 2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


class PersonNet(nn.Module):
    """U-Net of 1.4 M parameters. Input (N, 5, H, W): light-normalised RGB, |I − background|, |I − previous|.

    Returns:
        mask logits (N, 1, H, W) and joint heat maps (N, 14, H/2, W/2), the joints in the order of `JOINTS`.
    """

    def __init__(self):
        super().__init__()
        w = (24, 40, 64, 112, 176)
        self.stem = _convolution(5, w[0], 2)
        self.down1 = nn.Sequential(_convolution(w[0], w[1], 2), _convolution(w[1], w[1]))
        self.down2 = nn.Sequential(_convolution(w[1], w[2], 2), _convolution(w[2], w[2]), _convolution(w[2], w[2]))
        self.down3 = nn.Sequential(_convolution(w[2], w[3], 2), *(_InvertedResidual(w[3], w[3]) for _ in range(3)))
        self.down4 = nn.Sequential(
            _InvertedResidual(w[3], w[4], 2), _InvertedResidual(w[4], w[4]), _InvertedResidual(w[4], w[4])
        )
        self.up3 = _convolution(w[4] + w[3], w[3])
        self.up2 = _convolution(w[3] + w[2], w[2])
        self.up1 = _convolution(w[2] + w[1], w[1])
        self.up0 = _convolution(w[1] + w[0], 24)
        self.head = nn.Conv2d(24, 1 + len(JOINTS), 1)
        self.detail = _convolution(24, 8)
        self.refine = nn.Sequential(nn.Conv2d(13, 8, 3, 1, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 1, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a = self.stem(x)
        b = self.down1(a)
        c = self.down2(b)
        d = self.down3(c)
        d = self.up3(torch.cat([_resize(self.down4(d), d), d], 1))
        c = self.up2(torch.cat([_resize(d, c), c], 1))
        b = self.up1(torch.cat([_resize(c, b), b], 1))
        a = self.up0(torch.cat([_resize(b, a), a], 1))
        coarse = self.head(a)
        fine = self.refine(torch.cat([_resize(self.detail(a), x), x], 1))
        return _resize(coarse[:, :1], x) + fine, coarse[:, 1:]


def _resize(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def network_input(rgb: torch.Tensor, from_background: torch.Tensor, from_previous: torch.Tensor) -> torch.Tensor:
    """(N, H, W, 3), (N, H, W), (N, H, W), all 0..255, to the network's (N, 5, H, W)."""
    colour = rgb.float().permute(0, 3, 1, 2) / 127.5 - 1
    motion = [(difference.float() / 64).clamp(0, 2)[:, None] for difference in (from_background, from_previous)]
    return torch.cat([normalised_light(colour), *motion], 1)


def normalised_light(colour: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) with each picture's mean taken to 0 and its standard deviation to 0.6."""
    mean = colour.mean((1, 2, 3), keepdim=True)
    return (colour - mean) / colour.std((1, 2, 3), keepdim=True).clamp_min(0.08) * 0.6


@functools.cache
def load(path: pathlib.Path | None = None) -> PersonNet:
    """The trained network in evaluation mode, with the weights that are shipped or those of a file."""
    path = path or importlib.resources.files("anonymize") / WEIGHTS
    net = PersonNet()
    net.load_state_dict({k: v.float() for k, v in safetensors.torch.load(path.read_bytes()).items()})
    return net.eval().to(memory_format=torch.channels_last)


@torch.inference_mode()
def evaluate(
    net: PersonNet, frame: np.ndarray, background: np.ndarray, previous: np.ndarray, height: int, mirror: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """One pass of the network over one frame.

    Args:
        frame: (H, W, 3) uint8.
        background, previous: (H, W, 3) uint8; the frame itself where nothing is known of motion.
        height: the height in pixels at which the network looks; the width follows.
        mirror: look at the mirrored frame.

    Returns:
        person probability (H, W) float32 and joint heat maps (14, h, w) float32 on the network's half grid.
    """
    width = max(round(height * frame.shape[1] / frame.shape[0] / STRIDE), 1) * STRIDE

    def shrink(image: np.ndarray) -> np.ndarray:
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        return np.ascontiguousarray(image[:, ::-1]) if mirror else image

    small = shrink(frame)
    motion = [cv2.absdiff(small, shrink(other)).max(-1) for other in (background, previous)]
    x = network_input(*(torch.from_numpy(a)[None] for a in (small, *motion)))
    logits, heat = net(x.contiguous(memory_format=torch.channels_last))
    probability, heat = logits[0, 0].sigmoid().numpy(), heat[0].numpy()
    if mirror:
        probability, heat = probability[:, ::-1], heat[list(MIRRORED)][:, :, ::-1]
    probability = cv2.resize(np.ascontiguousarray(probability), frame.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    return probability, np.ascontiguousarray(heat)


def still_person(net: PersonNet, image: np.ndarray, heights: tuple[int, ...] = (128, 192)) -> np.ndarray:
    """Person probability (H, W) of a picture (H, W, 3) uint8 without any motion: the least over the heights."""
    return np.min([evaluate(net, image, image, image, height)[0] for height in heights], axis=0)


def pieces(frame: np.ndarray, heights: tuple[int, ...] = (128, 192), least: float = 0.015) -> np.ndarray:
    """(H, W) bool: what looks like a person in a picture (H, W, 3) uint8 at all heights, without pieces smaller than
    `least` of the picture."""
    likely = (still_person(load(), frame, heights) > 0.5).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(likely)
    large = stats[:, cv2.CC_STAT_AREA] > least * likely.size
    large[0] = False
    return large[labels]

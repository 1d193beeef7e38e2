"""Frames as a model wants them: resized, scaled and normalised by the numbers of its folder's preprocessor config."""

import dataclasses
import json
import pathlib

import numpy as np
import torch
import torch.nn.functional as F

from maskdp.errors import UserError

IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
_BILINEAR, _BICUBIC = 2, 3  # PIL's numbers


@dataclasses.dataclass(frozen=True)
class ModelInput:
    """What one model's pictures look like.

    Attributes:
        height, width: pixels.
        mean, std: of each channel, on the scale 0..1.
        keep_aspect: the shape of the frame is kept, and the side that needs less change gets its size.
        multiple: sides are multiples of so many pixels.
        bicubic: rather than bilinear; both with anti-aliasing.
    """

    height: int
    width: int
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    keep_aspect: bool = False
    multiple: int = 1
    bicubic: bool = False

    @classmethod
    def read(cls, folder: pathlib.Path, **defaults) -> "ModelInput":
        """From the preprocessor config in `folder`; `defaults` (its keys) hold where it or a key is missing.

        Raises:
            UserError: the file cannot be read, or asks for what is not understood.
        """
        file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
        try:
            found = json.loads(file.read_text()) if file else {}
            found = {**defaults, **found.get("image_processor", found)}
            height, width = (int(found["size"][side]) for side in ("height", "width"))
            resample = int(found.get("resample", _BILINEAR))
            mean, std = (
                (tuple(map(float, found[name])) for name in IMAGENET) if found["do_normalize"] else ((0.0,), (1.0,))
            )
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{file}: not a preprocessor config with a size of height and width") from None
        if resample not in (_BILINEAR, _BICUBIC) or found.get("rescale_factor", 1 / 255) != 1 / 255:
            raise UserError(f"{file}: expected resample 2 or 3 and rescale_factor 1/255")
        keep = bool(found.get("keep_aspect_ratio", False))
        multiple = int(found.get("ensure_multiple_of") or 1)
        return cls(height, width, mean, std, keep, multiple, resample == _BICUBIC)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which a frame of this height and width is looked at."""
        down, across = self.height / height, self.width / width
        if self.keep_aspect:
            down = across = min(down, across, key=lambda scale: abs(1 - scale))
        return tuple(max(round(s / self.multiple), 1) * self.multiple for s in (down * height, across * width))

    def __call__(self, frames: np.ndarray) -> torch.Tensor:
        """(N, H, W, 3) uint8 RGB → (N, 3, h, w) float32."""
        pictures = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
        mode = "bicubic" if self.bicubic else "bilinear"
        pictures = F.interpolate(
            pictures, self.size(*frames.shape[1:3]), mode=mode, antialias=True, align_corners=False
        )
        return self.normalised(pictures)

    def normalised(self, pictures: torch.Tensor) -> torch.Tensor:
        """(N, 3, h, w), 0..255, scaled to 0..1 and normalised."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (pictures.clamp(0, 255) / 255 - mean) / std

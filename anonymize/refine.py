"""Optional refinement of rendered avatars by a diffusion model with ControlNet inpainting, from a local folder.

The model sees the rendered avatar on neutral ground and control maps of the avatar alone; the avatar's alpha is kept.
Off unless `refine.folder` names a diffusers pipeline. Nothing is downloaded.
"""

import dataclasses
import hashlib
import json
import pathlib

import cv2
import numpy as np
import torch

from anonymize.wardrobe import Identity
from maskdp import layers
from maskdp.config import one_of, positive
from maskdp.errors import UserError

PROMPTS = (
    "a photo of a person in everyday clothes, natural skin, soft daylight, sharp focus",
    "a photo of a person in sportswear, realistic fabric, even studio light",
    "a photo of a person at home in casual clothes, detailed face and hands",
    "a documentary photo of a person in work clothes, realistic texture, neutral light",
)
NEGATIVE_PROMPT = "deformed, extra limbs, blurry, cartoon, mannequin, text"
CONTROLS = ("depth", "canny")
_STEP = 64  # pixels; sides of the model's pictures are multiples of this


@dataclasses.dataclass(frozen=True)
class RefineConfig:
    """The refinement.

    Attributes:
        folder: a saved `StableDiffusionControlNetInpaintPipeline`; empty for no refinement.
        controls: what each of the pipeline's ControlNets sees, in their order, of `depth` and `canny`.
        steps: denoising steps.
        strength: how much is left to the model, 0 nothing to 1 everything.
        size: the shorter side at which the model works, pixels, rounded to 64.
        context: `none`, or `scene`: the ground is the scene, for looks. The dataset then says so, and no masked-DP ε is
            stated for it.
    """

    folder: str = ""
    controls: tuple[str, ...] = ("depth",)
    steps: int = 20
    strength: float = 0.5
    size: int = 512
    context: str = "none"

    def __post_init__(self):
        positive(self, "steps", "size")
        one_of(self, "context", layers.CONTEXTS)
        if self.context == "scene" and not self.folder:
            raise UserError("refine.context: scene without a refine.folder, expected a model that makes use of it")
        if not 0 < self.strength <= 1:
            raise UserError(f"refine.strength: {self.strength}, expected a number above 0, at most 1")
        if not self.controls or set(self.controls) - set(CONTROLS):
            raise UserError(f"refine.controls: {list(self.controls)}, expected some of {', '.join(CONTROLS)}")


class ControlNetRefiner:
    """Redraws avatars with the pipeline in `config.folder`.

    Raises:
        UserError: the folder is missing, is not such a pipeline, or has another number of ControlNets.
    """

    def __init__(self, config: RefineConfig):
        from diffusers import StableDiffusionControlNetInpaintPipeline

        index = pathlib.Path(config.folder) / "model_index.json"
        expected = StableDiffusionControlNetInpaintPipeline.__name__
        if not index.is_file():
            raise UserError(f"refine.folder: {config.folder}: no model_index.json there, expected a saved {expected}")
        try:
            found = json.loads(index.read_text()).get("_class_name")
            if found != expected:
                raise UserError(f"refine.folder: {config.folder}: holds a {found}, expected a {expected}")
            self.pipeline = StableDiffusionControlNetInpaintPipeline.from_pretrained(
                config.folder, local_files_only=True, safety_checker=None
            )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"refine.folder: {config.folder}: cannot be loaded ({reason})") from None
        nets = len(getattr(self.pipeline.controlnet, "nets", [self.pipeline.controlnet]))
        if nets != len(config.controls):
            raise UserError(f"refine.controls: {len(config.controls)} for a pipeline of {nets} ControlNets")
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        self.config = config

    def __call__(
        self, rgba: np.ndarray, depth: np.ndarray, identity: Identity, ground: np.ndarray | None = None
    ) -> np.ndarray:
        """The public layer redrawn, frame by frame from the same noise; alpha stays as it is.

        Guarantees: with `ground` None the result is a function of the rendered avatars, the identity and the model.

        Args:
            rgba: (T, H, W, 4) uint8; depth: (T, H, W) metres, infinite where nothing is.
            identity: who it is, drawn from the wardrobe's secret; the prompt and the noise follow from it.
            ground: (T, H, W, 3) uint8, the scene that the model may look at; a constant where None.
        """
        out = rgba.copy()
        seed = int.from_bytes(hashlib.sha256(repr(identity).encode()).digest()[:8]) >> 1
        views = layers.public_view(rgba) if ground is None else layers.composite(rgba, ground)
        for t in np.flatnonzero(rgba[..., 3].any((1, 2))):
            shown = rgba[t, ..., 3] > 0
            out[t, ..., :3][shown] = self._redrawn(views[t], rgba[t], depth[t], seed)[shown]
        return out

    def _redrawn(self, view: np.ndarray, rgba: np.ndarray, depth: np.ndarray, seed: int) -> np.ndarray:
        from PIL import Image

        height, width = view.shape[:2]
        scale = self.config.size / min(height, width)
        size = [max(_STEP, round(side * scale / _STEP) * _STEP) for side in (width, height)]

        def picture(array: np.ndarray) -> Image.Image:
            return Image.fromarray(cv2.resize(array, size, interpolation=cv2.INTER_LINEAR))

        maps = {"depth": _depth_map, "canny": _edge_map}
        controls = [picture(maps[name](rgba, depth)) for name in self.config.controls]
        result = self.pipeline(
            PROMPTS[seed % len(PROMPTS)],
            negative_prompt=NEGATIVE_PROMPT,
            image=picture(view),
            mask_image=picture((rgba[..., 3] > 0).astype(np.uint8) * 255),
            control_image=controls if len(controls) > 1 else controls[0],
            num_inference_steps=self.config.steps,
            strength=self.config.strength,
            width=size[0],
            height=size[1],
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        return cv2.resize(np.asarray(result), (width, height), interpolation=cv2.INTER_AREA)


def _depth_map(rgba: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Nearness, as the depth ControlNets expect it: (H, W, 3) uint8, white nearest, black where nothing is."""
    shown = np.isfinite(depth)
    near, far = depth[shown].min(), depth[shown].max()
    nearness = 255 - 155 * (np.where(shown, depth, near) - near) / max(far - near, 1e-6)
    return np.repeat(np.where(shown, nearness, 0).astype(np.uint8)[..., None], 3, 2)


def _edge_map(rgba: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Canny edges of the avatars over a constant: (H, W, 3) uint8."""
    return np.repeat(cv2.Canny(layers.public_view(rgba), 60, 140)[..., None], 3, 2)

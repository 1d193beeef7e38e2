"""What paints the places of a scene that no frame shows: its own textures, or a diffusion model from a local folder."""

import dataclasses

import draccus
import numpy as np

from anonymize.scene import texture
from anonymize.scene.removal import Inpaint
from anonymize.vision import cues, diffusion
from maskdp.config import one_of, positive

PROMPTS = {
    "any": "an empty place, nobody there, natural light, realistic photo",
    "indoors": "an empty room, furniture, bare floor and walls, nobody there, realistic photo",
    "outdoors": "an empty place outdoors, open ground, nobody there, daylight, realistic photo",
}
"""The bank. A prompt is chosen by the user for a whole dataset; it never tells what is in the source."""

NEGATIVE_PROMPT = "person, people, human, face, body, hands, silhouette, shadow of a person, text, watermark"
CLASSES = ("StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline")
_STEP = 64  # pixels; sides of the model's pictures are multiples of this


@dataclasses.dataclass(frozen=True)
class InpaintConfig(draccus.ChoiceRegistry):
    """Base of the backends; `inpaint.type` chooses. `load()` gives what `removal.remove` paints with: what paints the
    scene of a shot, once, and what paints each frame that belongs to none."""

    @classmethod
    def default_choice_name(cls) -> str:
        return "opencv"


@InpaintConfig.register_subclass("opencv")
@dataclasses.dataclass(frozen=True)
class OpenCVInpaint(InpaintConfig):
    """Scenes are filled with their own textures (`texture`); frames without one have the colours of the rim carried on.

    Attributes:
        textures: false: scenes are painted as frames are (Telea 2004), which takes no time.
        radius: pixels around each painted one that Telea's method looks at.
    """

    textures: bool = True
    radius: float = 5.0

    def __post_init__(self):
        positive(self, "radius")

    def load(self) -> tuple[Inpaint, Inpaint]:
        def telea(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
            return cues.inpainted(picture, hole, self.radius)

        return (texture.filled if self.textures else telea), telea


@InpaintConfig.register_subclass("diffusers")
@dataclasses.dataclass(frozen=True)
class DiffusersInpaint(InpaintConfig):
    """A Stable Diffusion (SD or SDXL) inpaint pipeline.

    Attributes:
        folder: a saved `StableDiffusionInpaintPipeline` or `StableDiffusionXLInpaintPipeline`.
        prompt: one of the bank, `any`, `indoors` or `outdoors`.
        steps: denoising steps.
        guidance: weight of the prompt.
        size: the shorter side at which the model works, pixels, rounded to 64.
    """

    folder: str = ""
    prompt: str = "any"
    steps: int = 30
    guidance: float = 7.5
    size: int = 512

    def __post_init__(self):
        positive(self, "steps", "guidance", "size")
        one_of(self, "prompt", PROMPTS)
        diffusion.check("inpaint.folder", self.folder, CLASSES)

    def load(self) -> tuple[Inpaint, Inpaint]:
        painter = DiffusionPainter(self)
        return painter, painter


class DiffusionPainter:
    """Paints holes with the pipeline in `config.folder`, always from the same noise, so that what is painted in two
    frames of one place differs no more than their surroundings do."""

    def __init__(self, config: DiffusersInpaint):
        self.config = config
        self.pipeline = diffusion.load("inpaint.folder", config.folder, CLASSES)

    def __call__(self, picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 with the hole (H, W) bool painted; a function of the pixels outside it."""
        import torch
        from PIL import Image

        start = cues.inpainted(picture, hole)
        if hole.all() or not hole.any():
            return start
        height, width = hole.shape
        scale = self.config.size / min(height, width)
        size = tuple(max(_STEP, round(side * scale / _STEP) * _STEP) for side in (width, height))
        painted = self.pipeline(
            PROMPTS[self.config.prompt],
            negative_prompt=NEGATIVE_PROMPT,
            image=Image.fromarray(diffusion.resized(start, size)),
            mask_image=Image.fromarray(diffusion.resized(hole.astype(np.uint8) * 255, size)),
            num_inference_steps=self.config.steps,
            guidance_scale=self.config.guidance,
            strength=1.0,
            width=size[0],
            height=size[1],
            generator=torch.Generator().manual_seed(0),
        ).images[0]
        return np.where(hole[..., None], diffusion.resized(np.asarray(painted), (width, height)), picture)

"""Optional refinement: avatars redrawn by a diffusion model from a local folder, one person at a time.

The model sees the rendered avatar on neutral ground, control maps of the avatars alone (`control`) and a prompt made of
the avatar's own identity. Its colours replace the rendered ones where that avatar is nearest; alpha stays as rendered.
"""

import dataclasses
import hashlib
from typing import ClassVar, Protocol

import cv2
import draccus
import numpy as np

from anonymize.avatar.wardrobe import Cloth, Colour, Identity
from anonymize.refine import control
from anonymize.vision import diffusion
from maskdp import layers
from maskdp.config import one_of, positive
from maskdp.errors import UserError

PROMPTS = (
    "a photo of {}, natural skin, soft daylight, sharp focus",
    "a documentary photo of {}, realistic fabric, neutral light",
    "a photo of {}, detailed face and hands, even studio light",
    "a film still of {}, realistic texture, soft light",
)
"""The bank. What stands for {} comes from the identity, which is drawn from the wardrobe's secret."""

NEGATIVE_PROMPT = "deformed, extra limbs, blurry, cartoon, mannequin, text"
_COLOUR_NAMES = {
    "black": (0.1, 0.1, 0.11),
    "white": (0.92, 0.92, 0.9),
    "grey": (0.5, 0.5, 0.5),
    "navy": (0.13, 0.19, 0.36),
    "blue": (0.24, 0.42, 0.68),
    "light blue": (0.5, 0.68, 0.82),
    "red": (0.65, 0.14, 0.16),
    "coral": (0.82, 0.38, 0.3),
    "green": (0.17, 0.4, 0.28),
    "olive": (0.47, 0.52, 0.31),
    "yellow": (0.8, 0.65, 0.22),
    "beige": (0.78, 0.7, 0.56),
    "blond": (0.7, 0.54, 0.32),
    "purple": (0.42, 0.27, 0.44),
    "pink": (0.78, 0.56, 0.65),
    "brown": (0.34, 0.22, 0.14),
    "auburn": (0.52, 0.24, 0.13),
    "teal": (0.15, 0.47, 0.5),
}


# --------------------------------------------------------------------------------------------------------- the settings


@dataclasses.dataclass(frozen=True)
class RefineConfig(draccus.ChoiceRegistry):
    """Base of the backends; `refine.type` chooses. `load()` gives the `Refiner`, or None.

    Attributes:
        context: `none`, or `scene`: the ground is the scene, for looks. The dataset then says so, and no masked-DP ε is
            stated for it.
    """

    context: str = "none"

    def __post_init__(self):
        one_of(self, "context", layers.CONTEXTS)

    @classmethod
    def default_choice_name(cls) -> str:
        return "none"

    def load(self) -> "Refiner | None":
        raise NotImplementedError


@RefineConfig.register_subclass("none")
@dataclasses.dataclass(frozen=True)
class NoRefinement(RefineConfig):
    """Avatars stay as they are rendered."""

    def __post_init__(self):
        if self.context != "none":
            raise UserError("refine.context: scene without a refine.type, expected a model that makes use of it")

    def load(self) -> None:
        return None


@dataclasses.dataclass(frozen=True)
class DiffusionConfig(RefineConfig):
    """What all diffusion backends share.

    Attributes:
        folder: the saved pipeline.
        steps: denoising steps.
        size: side of the square picture of a person at which the model works, pixels, rounded to 64.
    """

    folder: str = ""
    steps: int = 20
    size: int = 512

    CLASSES: ClassVar[tuple[str, ...]]

    def __post_init__(self):
        super().__post_init__()
        positive(self, "steps", "size")
        diffusion.check("refine.folder", self.folder, self.CLASSES)


@RefineConfig.register_subclass("controlnet")
@dataclasses.dataclass(frozen=True)
class ControlNetConfig(DiffusionConfig):
    """Stable Diffusion (SD or SDXL) with ControlNet inpainting, frame by frame from the same noise.

    Attributes:
        folder: a saved `StableDiffusionControlNetInpaintPipeline` or `StableDiffusionXLControlNetInpaintPipeline`.
        controls: what each of the pipeline's ControlNets sees, in their order, of `depth`, `canny` and `pose`.
        strength: how much is left to the model, 0 nothing to 1 everything.
        guidance: weight of the prompt.
    """

    controls: tuple[str, ...] = ("depth",)
    strength: float = 0.5
    guidance: float = 7.5

    CLASSES = ("StableDiffusionControlNetInpaintPipeline", "StableDiffusionXLControlNetInpaintPipeline")

    def __post_init__(self):
        super().__post_init__()
        positive(self, "guidance")
        if not 0 < self.strength <= 1:
            raise UserError(f"refine.strength: {self.strength}, expected a number above 0, at most 1")
        if self.steps * self.strength < 1:
            raise UserError(
                f"refine.steps: {self.steps} times strength {self.strength} leaves no step, expected 1 or more"
            )
        if not self.controls or set(self.controls) - set(control.CONTROLS):
            raise UserError(f"refine.controls: {list(self.controls)}, expected some of {', '.join(control.CONTROLS)}")

    def load(self) -> "Refiner":
        return Refiner(self, ControlNet(self), self.controls)


@dataclasses.dataclass(frozen=True)
class WanConfig(DiffusionConfig):
    """What the Wan video pipelines share.

    Attributes:
        guidance: weight of the prompt.
        length: frames drawn at once, 4n + 1, from 17 to 145; a longer clip goes on from the last frames drawn, and a
            shorter one is padded with its last frame.
    """

    guidance: float = 5.0
    length: int = 81

    def __post_init__(self):
        super().__post_init__()
        positive(self, "guidance")
        if self.length % 4 != 1 or not 17 <= self.length <= 145:
            raise UserError(f"refine.length: {self.length}, expected 4n + 1 frames, from 17 to 145")


@RefineConfig.register_subclass("wan_vace")
@dataclasses.dataclass(frozen=True)
class VaceConfig(WanConfig):
    """Wan VACE: video inpainting after a control map and a picture of the avatar, consistent over time.

    Attributes:
        folder: a saved `WanVACEPipeline`.
        control: the map drawn into the place of the avatar, `depth`, `canny` or `pose`.
    """

    control: str = "depth"

    CLASSES = ("WanVACEPipeline",)

    def __post_init__(self):
        super().__post_init__()
        one_of(self, "control", control.CONTROLS)

    def load(self) -> "Refiner":
        from anonymize.refine.wan import Vace

        return Refiner(self, Vace(self), (self.control,))


@RefineConfig.register_subclass("wan_animate")
@dataclasses.dataclass(frozen=True)
class AnimateConfig(WanConfig):
    """Wan Animate: a picture of the avatar set in motion by its skeleton and its face, consistent over time.

    Attributes:
        folder: a saved `WanAnimatePipeline`.
    """

    guidance: float = 1.0
    length: int = 77

    CLASSES = ("WanAnimatePipeline",)

    def load(self) -> "Refiner":
        from anonymize.refine.wan import Animate

        return Refiner(self, Animate(self), ())


# ----------------------------------------------------------------------------------------------------------- one person


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What the renderer made of a clip. No pixel of a source is in it.

    Attributes:
        rgba: (T, H, W, 4) uint8.
        depth: (T, H, W) metres, infinite where nothing is.
        person: (T, H, W) int16, number of the avatar that is nearest; -1 where nothing is.
        keypoints: (T, P, 18, 2) pixels, in the order of `control.SMPLX_KEYPOINTS`; NaN where hidden or absent.
    """

    rgba: np.ndarray
    depth: np.ndarray
    person: np.ndarray
    keypoints: np.ndarray


@dataclasses.dataclass(frozen=True)
class Portrait:
    """One person in the n frames where they are seen, cut out in squares that follow them, at the model's size S.

    Attributes:
        views: (n, S, S, 3) uint8, the avatars over the ground.
        places: (n, S, S) bool, where this person's colours are to be redrawn.
        maps: control maps by name, each (n, S, S, 3) uint8.
        keypoints: (n, 18, 2), this person's in pixels of the square.
        prompt, seed: of this person's identity; equal in all frames.
        in_scene: whether the ground is the scene.
    """

    views: np.ndarray
    places: np.ndarray
    maps: dict[str, np.ndarray]
    keypoints: np.ndarray
    prompt: str
    seed: int
    in_scene: bool


class Backend(Protocol):
    """A model that redraws."""

    def __call__(self, portrait: Portrait) -> np.ndarray:
        """The portrait's frames redrawn, (n, S, S, 3) uint8."""
        ...


class Refiner:
    """Redraws the avatars of a clip.

    Args:
        config: its size and context.
        backend: what redraws a portrait.
        controls: the control maps that the backend needs.
    """

    def __init__(self, config: DiffusionConfig, backend: Backend, controls: tuple[str, ...]):
        self.context, self.backend, self.controls = config.context, backend, controls
        self.size = max(round(config.size / 64), 1) * 64

    def __call__(self, drawing: Drawing, identities: list[Identity], ground: np.ndarray | None = None) -> np.ndarray:
        """The public layer with other colours, (T, H, W, 4) uint8. Alpha stays as rendered, and RGB is 0 where it is 0.

        Guarantees: with `ground` None the result is a function of the drawing, the identities and the model.

        Args:
            identities: who the avatars are, in the order of `drawing.person`.
            ground: (T, H, W, 3) uint8, the scene that the model may look at; a constant where None.
        """
        out = drawing.rgba.copy()
        views = layers.public_view(drawing.rgba) if ground is None else layers.composite(drawing.rgba, ground)
        draw = {"depth": lambda: control.depth_maps(drawing.depth), "canny": lambda: control.edge_maps(drawing.rgba)}
        maps = {name: draw[name]() for name in self.controls if name in draw}
        for number, identity in enumerate(identities):
            mine = (drawing.person == number) & (drawing.rgba[..., 3] > 0)
            times = np.flatnonzero(mine.any((1, 2)))
            if not len(times):
                continue
            windows = _Windows.around(mine[times], self.size)
            keypoints = windows.points(drawing.keypoints[times])
            cut = {name: windows.cut(pictures[times], 0) for name, pictures in maps.items()}
            if "pose" in self.controls:
                cut["pose"] = control.pose_maps(keypoints, self.size)
            portrait = Portrait(
                views=windows.cut(views[times], layers.FILL),
                places=windows.cut(mine[times].astype(np.uint8) * 255, 0) > 127,
                maps=cut,
                keypoints=keypoints[:, number],
                prompt=prompt(identity),
                seed=_seed(identity),
                in_scene=ground is not None,
            )
            for t, picture in zip(times, windows.back(self.backend(portrait), mine.shape[1:])):
                opaque = mine[t] & (drawing.rgba[t, ..., 3] == 255)
                out[t, ..., :3][mine[t]] = _carried_on(picture, opaque)[mine[t]]
        return out


@dataclasses.dataclass(frozen=True)
class _Windows:
    """Squares of one side (pixels) that follow somebody smoothly: their upper left corners (n, 2) x, y; and the size at
    which they are cut out."""

    corners: np.ndarray
    side: int
    size: int

    @classmethod
    def around(cls, masks: np.ndarray, size: int, smoothing: int = 9) -> "_Windows":
        """Windows that hold what the masks (n, H, W) bool show, with a margin."""
        boxes = np.array([cv2.boundingRect(mask.astype(np.uint8)) for mask in masks], float)
        low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        around = np.pad((low + high) / 2, ((smoothing // 2,) * 2, (0, 0)), mode="edge")
        centres = np.lib.stride_tricks.sliding_window_view(around, smoothing, axis=0).mean(-1)
        half = 1.1 * np.maximum(high - centres, centres - low).max() + 1
        return cls(np.floor(centres - half).astype(int), int(np.ceil(2 * half)), size)

    def cut(self, pictures: np.ndarray, beyond: int) -> np.ndarray:
        """The squares out of pictures (n, H, W) or (n, H, W, 3) uint8, at the size; `beyond` the picture's edge."""
        wide = [cv2.copyMakeBorder(p, *(self.side,) * 4, cv2.BORDER_CONSTANT, value=(beyond,) * 3) for p in pictures]
        squares = [p[self._square(corner)] for p, corner in zip(wide, self.corners)]
        return np.stack([diffusion.resized(square, (self.size, self.size)) for square in squares])

    def back(self, squares: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """Pictures of this (H, W) with the squares (n, S, S, 3) where they were cut out; 0 elsewhere."""
        wide = np.zeros((len(squares), shape[0] + 2 * self.side, shape[1] + 2 * self.side, 3), np.uint8)
        for picture, square, corner in zip(wide, squares, self.corners):
            picture[self._square(corner)] = diffusion.resized(square, (self.side, self.side))
        return wide[:, self.side : -self.side, self.side : -self.side]

    def points(self, points: np.ndarray) -> np.ndarray:
        """Points (n, ..., 2) of the pictures in pixels of the squares."""
        corners = self.corners.reshape(len(points), *(1,) * (points.ndim - 2), 2)
        return (points - corners) * (self.size / self.side)

    def _square(self, corner: np.ndarray) -> tuple[slice, slice]:
        x, y = (corner + self.side).clip(0)
        return slice(y, y + self.side), slice(x, x + self.side)


def _carried_on(picture: np.ndarray, opaque: np.ndarray) -> np.ndarray:
    """The picture with every pixel outside `opaque` in the colour of the nearest one inside: an outline half covered
    would else hold some of the ground."""
    if not opaque.any():
        return picture
    _, nearest = cv2.distanceTransformWithLabels(
        (~opaque).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    colours = np.zeros((nearest.max() + 1, 3), np.uint8)
    colours[nearest[opaque]] = picture[opaque]
    return colours[nearest]


def _seed(identity: Identity) -> int:
    return int.from_bytes(hashlib.sha256(repr(identity).encode()).digest()[:8]) >> 1


def prompt(identity: Identity) -> str:
    """What the avatar wears, in words, in a sentence from the bank; a function of the identity alone."""
    hair = {
        "bald": "a bald head",
        "cap": f"a cap over {_colour(identity.hair)} hair",
        "bob": f"{_colour(identity.hair)} hair in a bob",
        "bun": f"{_colour(identity.hair)} hair in a bun",
        "ponytail": f"{_colour(identity.hair)} hair in a ponytail",
    }.get(identity.hair_style, f"{identity.hair_style} {_colour(identity.hair)} hair")
    top = f"a {_cloth(identity.top)} {'long-sleeved' if identity.sleeve > 1 else 'short-sleeved'} top"
    jacket = f", an open {_cloth(identity.jacket)} jacket" if identity.jacket else ""
    bottom = "skirt" if identity.skirt else "trousers" if identity.leg > 1.2 else "shorts"
    person = f"a person with {hair}{' and a beard' if identity.beard else ''}, wearing {top}{jacket}, "
    person += f"{_cloth(identity.bottom)} {bottom} and {_cloth(identity.shoes)} shoes"
    return PROMPTS[_seed(identity) % len(PROMPTS)].format(person)


def _cloth(cloth: Cloth) -> str:
    if cloth.pattern == "plain":
        return _colour(cloth.colour)
    pattern = {"stripe": "striped", "check": "chequered", "print": "printed"}[cloth.pattern]
    return f"{pattern} {_colour(cloth.colour)} and {_colour(cloth.second)}"


def _colour(colour: Colour) -> str:
    return min(_COLOUR_NAMES, key=lambda name: float(np.square(np.subtract(_COLOUR_NAMES[name], colour)).sum()))


# ----------------------------------------------------------------------------------------------------------- ControlNet


class ControlNet:
    """Redraws frame by frame with the pipeline in `config.folder`, each frame from the same noise.

    Raises:
        UserError: the folder is missing, is not such a pipeline, or has another number of ControlNets.
    """

    def __init__(self, config: ControlNetConfig):
        self.config = config
        self.pipeline = diffusion.load("refine.folder", config.folder, config.CLASSES)
        nets = len(getattr(self.pipeline.controlnet, "nets", [self.pipeline.controlnet]))
        if nets != len(config.controls):
            raise UserError(f"refine.controls: {len(config.controls)} for a pipeline of {nets} ControlNets")

    def __call__(self, portrait: Portrait) -> np.ndarray:
        """See `Backend`."""
        import torch
        from PIL import Image

        size = portrait.views.shape[1]
        redrawn = []
        for index, view in enumerate(portrait.views):
            maps = [Image.fromarray(portrait.maps[name][index]) for name in self.config.controls]
            result = self.pipeline(
                portrait.prompt,
                negative_prompt=NEGATIVE_PROMPT,
                image=Image.fromarray(view),
                mask_image=Image.fromarray(portrait.places[index].astype(np.uint8) * 255),
                control_image=maps if len(maps) > 1 else maps[0],
                num_inference_steps=self.config.steps,
                strength=self.config.strength,
                guidance_scale=self.config.guidance,
                width=size,
                height=size,
                generator=torch.Generator().manual_seed(portrait.seed),
            )
            redrawn.append(np.asarray(result.images[0]))
        return np.stack(redrawn)

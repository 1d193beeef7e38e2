"""The video backends of the refinement: Wan VACE and Wan Animate, which redraw a whole clip consistently over time."""

import numpy as np

from anonymize.refine import control
from anonymize.refine.refiner import NEGATIVE_PROMPT, AnimateConfig, Portrait, VaceConfig
from anonymize.vision import diffusion

OVERLAP = 5  # frames of one stretch that the next goes on from, 4n + 1
SHORTEST = 17  # frames; of fewer, Wan VACE makes nothing of use
TOKENS = 512  # of a prompt; Wan's transformers are built for it


def _pictures(frames: np.ndarray) -> list:
    from PIL import Image

    return [Image.fromarray(frame) for frame in frames]


def _best(portrait: Portrait) -> int:
    """The frame that shows most of the avatar."""
    return int(portrait.places.sum((1, 2)).argmax())


def _embedded(pipeline, prompt: str):
    """Wan's text embedding (1, 512, D) of a prompt, 0 beyond its end.

    The pipelines' own function wants ftfy, which mends broken text; ours is whole.
    """
    import torch

    tokens = pipeline.tokenizer(
        prompt,
        padding="max_length",
        max_length=TOKENS,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    ).to(pipeline.text_encoder.device)
    with torch.no_grad():
        states = pipeline.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return states * tokens.attention_mask[..., None].to(states.dtype)


class Vace:
    """Redraws with the `WanVACEPipeline` in `config.folder`.

    The control map is drawn into the avatar's place, the ground around it is kept, and the rendered avatar where it is
    seen best is the picture of reference. Stretches longer than `config.length` go on from the last frames drawn.
    """

    def __init__(self, config: VaceConfig):
        self.config = config
        self.pipeline = diffusion.load("refine.folder", config.folder, config.CLASSES)

    def __call__(self, portrait: Portrait) -> np.ndarray:
        """See `refine.Backend`."""
        places = portrait.places[..., None]
        frames = np.where(places, portrait.maps[self.config.control], portrait.views)
        redrawn = np.zeros_like(frames)
        for start in range(0, max(len(frames) - OVERLAP, 1), self.config.length - OVERLAP):
            part = slice(start, start + self.config.length)
            known = OVERLAP if start else 0
            video, mask = frames[part].copy(), places[part].copy()
            video[:known], mask[:known] = redrawn[part][:known], False
            redrawn[part][known:] = self._drawn(video, mask, portrait)[known:]
        return redrawn

    def _drawn(self, video: np.ndarray, mask: np.ndarray, portrait: Portrait) -> np.ndarray:
        import torch

        spare = max(SHORTEST - len(video), -(len(video) - 1) % 4)
        video, mask = (np.concatenate([array, array[-1:].repeat(spare, 0)]) for array in (video, mask))
        size = video.shape[1]
        result = self.pipeline(
            video=_pictures(video),
            mask=_pictures(mask.repeat(3, -1).astype(np.uint8) * 255),
            reference_images=_pictures(portrait.views[[_best(portrait)]]),
            prompt_embeds=_embedded(self.pipeline, portrait.prompt),
            negative_prompt_embeds=_embedded(self.pipeline, NEGATIVE_PROMPT),
            height=size,
            width=size,
            num_frames=len(video),
            num_inference_steps=self.config.steps,
            guidance_scale=self.config.guidance,
            generator=torch.Generator().manual_seed(portrait.seed),
            output_type="np",
        ).frames[0]
        return (result[: len(video) - spare] * 255).round().astype(np.uint8)


class Animate:
    """Redraws with the `WanAnimatePipeline` in `config.folder`.

    The rendered avatar where it is seen best is set in motion by its skeleton and its face. In a scene, the avatar's
    place in it is redrawn (`replace`); on neutral ground, everything (`animate`).
    """

    def __init__(self, config: AnimateConfig):
        self.config = config
        self.pipeline = diffusion.load("refine.folder", config.folder, config.CLASSES)

    def __call__(self, portrait: Portrait) -> np.ndarray:
        """See `refine.Backend`."""
        import torch

        total, size = portrait.views.shape[:2]
        times = np.arange(max(total, OVERLAP + 1)).clip(max=total - 1)  # fewer are no video to the pipeline
        face_size = self.pipeline.transformer.config.motion_encoder_size
        scene = {}
        if portrait.in_scene:
            places = portrait.places[times][..., None]
            scene = {
                "mode": "replace",
                "background_video": _pictures(np.where(places, 0, portrait.views[times]).astype(np.uint8)),
                "mask_video": _pictures(places.repeat(3, -1).astype(np.uint8) * 255),
            }
        result = self.pipeline(
            image=_pictures(portrait.views[[_best(portrait)]])[0],
            pose_video=_pictures(control.pose_maps(portrait.keypoints[times, None], size)),
            face_video=_pictures(faces(portrait, face_size)[times]),
            prompt_embeds=_embedded(self.pipeline, portrait.prompt),
            negative_prompt_embeds=_embedded(self.pipeline, NEGATIVE_PROMPT),
            height=size,
            width=size,
            segment_frame_length=self.config.length,
            prev_segment_conditioning_frames=OVERLAP,
            num_inference_steps=self.config.steps,
            guidance_scale=self.config.guidance,
            generator=torch.Generator().manual_seed(portrait.seed),
            output_type="np",
            **scene,
        ).frames[0]
        return (result[:total] * 255).round().astype(np.uint8)


def faces(portrait: Portrait, size: int) -> np.ndarray:
    """The rendered avatar's face, (n, size, size, 3) uint8: a square around what is seen of it; black where hidden."""
    out = np.zeros((len(portrait.views), size, size, 3), np.uint8)
    for picture, view, points in zip(out, portrait.views, portrait.keypoints):
        seen = points[list(control.FACE)]
        seen = seen[np.isfinite(seen).all(-1)]
        if len(seen) and np.isfinite(points[control.NECK]).all():
            centre = seen.mean(0)
            half = max(0.8 * float(np.hypot(*(centre - points[control.NECK]))), 2.0)
            (x0, y0), (x1, y1) = (np.array([centre - half, centre + half]).round().astype(int)).clip(0, len(view))
            if x1 > x0 and y1 > y0:
                picture[:] = diffusion.resized(view[y0:y1, x0:x1], (size, size))
    return out

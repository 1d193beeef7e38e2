"""People in single frames by RT-DETR, RT-DETRv2 or D-FINE (arXiv 2304.08069, 2407.17140, 2410.13842)."""

import pathlib

import numpy as np
import torch

from anonymize import weights
from anonymize.people.models.model_input import IMAGENET, ModelInput
from maskdp.errors import UserError

KINDS = ("rt_detr", "rt_detr_v2", "d_fine")


class Detector:
    """The detector in `folder`/detector.

    Raises:
        UserError: missing, not such a model, or one that knows no class `person`.
    """

    def __init__(self, folder: pathlib.Path):
        from transformers import AutoModelForObjectDetection

        self.model = weights.load(folder, "detector", AutoModelForObjectDetection, KINDS)
        place = folder / "detector"
        self.input = ModelInput.read(place, size={"height": 640, "width": 640}, do_normalize=False, **IMAGENET)
        named = {name.lower(): number for number, name in self.model.config.id2label.items()}
        if "person" not in named:
            raise UserError(f"{place}: knows no class 'person' (id2label of config.json)")
        self._person = int(named["person"])

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray, threshold: float) -> list[np.ndarray]:
        """People in each of (N, H, W, 3) uint8: (M, 5) float32 xyxy in pixels and score, the surest first."""
        height, width = frames.shape[1:3]
        out = self.model(pixel_values=self.input(frames).to(self.model.device))
        scores = out.logits[..., self._person].sigmoid()
        centre, size = out.pred_boxes.split(2, -1)
        corners = torch.cat([centre - size / 2, centre + size / 2], -1)
        boxes = corners * torch.tensor([width, height] * 2, device=corners.device)
        found = torch.cat([boxes, scores[..., None]], -1).float().cpu().numpy()
        return [people[people[:, 4].argsort()[::-1]] for people in (f[f[:, 4] > threshold] for f in found)]

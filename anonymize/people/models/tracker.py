"""Outlines of people through a clip, from boxes in one frame, by SAM 2 video (arXiv 2408.00714)."""

import pathlib

import numpy as np
import torch
import torch.nn.functional as F

from anonymize import weights
from anonymize.people.models.model_input import IMAGENET, ModelInput

KINDS = ("sam2_video", "sam2")
_CORNERS = (2, 3)  # SAM's labels of a box's upper left and lower right corner


class _Pictures:
    """The frames of a session, each made ready when it is looked at, so that few are held."""

    def __init__(self, frames: np.ndarray, model_input: ModelInput):
        self._frames, self._input = frames, model_input

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, t: int) -> torch.Tensor:
        return self._input(self._frames[t : t + 1])[0]


class Tracker:
    """The tracker in `folder`/tracker.

    Raises:
        UserError: missing or not such a model.
    """

    def __init__(self, folder: pathlib.Path):
        from transformers import Sam2VideoModel

        self.model = weights.load(folder, "tracker", Sam2VideoModel, KINDS)
        side = int(np.max(self.model.config.image_size))
        read = ModelInput.read(folder / "tracker", size={"height": side, "width": side}, do_normalize=True, **IMAGENET)
        self.input = ModelInput(side, side, read.mean, read.std)

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray, start: int, boxes: np.ndarray) -> np.ndarray:
        """Follows what fills `boxes` (N, 4) xyxy of frame `start` forwards and backwards.

        Returns:
            (N, T, H, W) float16, the logit of each pixel to belong to each of them; above 0 it does.
        """
        session = self._session(frames, start, boxes)
        height, width = frames.shape[1:3]
        logits = np.zeros((len(boxes), len(frames), height, width), np.float16)
        self.model(session, frame_idx=start)
        for reverse in (False, True):
            for out in self.model.propagate_in_video_iterator(session, start_frame_idx=start, reverse=reverse):
                full = F.interpolate(out.pred_masks.float(), (height, width), mode="bilinear", align_corners=False)
                logits[:, out.frame_idx] = full[:, 0].clamp(-100, 100).cpu().numpy()
        return logits

    def _session(self, frames: np.ndarray, start: int, boxes: np.ndarray):
        from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

        height, width = frames.shape[1:3]
        device = self.model.device
        session = Sam2VideoInferenceSession(
            video_height=height,
            video_width=width,
            inference_device=device,
            inference_state_device=device,
            dtype=self.model.dtype,
        )
        session.processed_frames = _Pictures(frames, self.input)
        scale = np.array([self.input.width / width, self.input.height / height], np.float32)
        labels = torch.tensor(_CORNERS, dtype=torch.int32)[None, None]
        for number, box in enumerate(boxes):
            corners = torch.from_numpy(box.reshape(1, 1, 2, 2).astype(np.float32) * scale)
            place = session.obj_id_to_idx(number)
            session.add_point_inputs(place, start, {"point_coords": corners, "point_labels": labels})
        session.obj_with_new_inputs = list(range(len(boxes)))
        return session

"""Diffusion pipelines from local folders: nothing is downloaded or unpickled, no code comes along."""

import json
import pathlib
from collections.abc import Sequence

import cv2
import numpy as np

from anonymize import weights
from maskdp.errors import UserError


def check(key: str, folder: str, classes: Sequence[str]) -> dict:
    """What is saved in a folder (its model_index.json), where that is one of the pipeline classes that will do.

    Args:
        key: the setting that names the folder, for the message.

    Raises:
        UserError: the folder is missing or holds something else.
    """
    index = pathlib.Path(folder) / "model_index.json"
    expected = " or ".join(classes)
    if not folder:
        raise UserError(f"{key}: missing, expected the folder of a saved {expected}")
    if not index.is_file():
        raise UserError(f"{key}: {folder}: no model_index.json there, expected a saved {expected}")
    try:
        saved = json.loads(index.read_text())
        found = saved.get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{key}: {index}: cannot be read ({error})") from None
    if found not in classes:
        raise UserError(f"{key}: {folder}: holds a {found}, expected a {expected}")
    return saved


def load(key: str, folder: str, classes: Sequence[str]):
    """The pipeline saved in a folder (by `save_pretrained` of diffusers), on the GPU where there is one.

    Raises:
        UserError: as `check`; or the pipeline is incomplete, is not what `maskdp weights fetch refine` recorded beside
            it, or has weights that are not safetensors.
    """
    saved = check(key, folder, classes)
    place = pathlib.Path(folder).resolve()
    if place.name in weights.record(place.parent):
        weights.held_against_record(place.parent, place.name)
    import diffusers
    import torch
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    gpu = torch.cuda.is_available()
    try:
        pipeline = getattr(diffusers, saved["_class_name"]).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.bfloat16 if gpu else torch.float32,
            **({"safety_checker": None} if "safety_checker" in saved else {}),
        )
    except Exception as error:  # each part of a pipeline has its own loader, and those raise whatever they like
        raise UserError(f"{key}: {folder}: cannot be loaded ({' '.join(str(error).split())})") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if gpu else "cpu")


def resized(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture at another (width, height)."""
    shrinks = size[0] * size[1] < picture.shape[0] * picture.shape[1]
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)

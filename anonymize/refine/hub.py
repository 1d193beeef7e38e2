"""Pipelines of the refinement from the Hub: pinned at the first fetch and held against that ever after."""

import dataclasses
import fnmatch
import json
import pathlib

from anonymize import weights
from maskdp import atomic
from maskdp.errors import UserError


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Where a pipeline comes from.

    Attributes:
        class_name: the diffusers class that it is saved as.
        repository: of the pipeline.
        controlnet: repository of the ControlNet that joins it; empty: none does.
        settings: how `maskdp anonymize` is told to use it.
    """

    class_name: str
    repository: str
    controlnet: str
    settings: str


PIPELINES = {
    "sd": Pipeline(
        "StableDiffusionControlNetInpaintPipeline",
        "stable-diffusion-v1-5/stable-diffusion-inpainting",
        "lllyasviel/control_v11f1p_sd15_depth",
        "--refine.type controlnet --refine.controls [depth]",
    ),
    "sdxl": Pipeline(
        "StableDiffusionXLControlNetInpaintPipeline",
        "diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
        "diffusers/controlnet-depth-sdxl-1.0",
        "--refine.type controlnet --refine.controls [depth] --refine.size 1024",
    ),
    "vace": Pipeline("WanVACEPipeline", "Wan-AI/Wan2.1-VACE-1.3B-diffusers", "", "--refine.type wan_vace"),
}
INDEX = "model_index.json"
_SUFFIXES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model")
_UNWANTED = ("*.fp16.*", "*.non_ema.*", "safety_checker/*", "*.bin.index.json")


def fetch(folder: pathlib.Path, kind: str) -> None:
    """Gets a pipeline into FOLDER/KIND, ready for `refine.folder`, unless it is there.

    Guarantees: the first fetch records repositories, commits and the SHA-256 of every file in FOLDER/weights.json;
    later ones fetch those commits, and every load is held against the files. Nothing but safetensors is fetched.

    Raises:
        UserError: no such kind; as `weights.download`; or what is there is not what was recorded.
    """
    if kind not in PIPELINES:
        raise UserError(f"--kind: {kind!r}, expected one of {', '.join(PIPELINES)}")
    pipeline, recorded = PIPELINES[kind], weights.record(folder)
    if not weights.there_already(folder, kind):
        with atomic.folder(folder / kind) as aside:
            parts = {kind: weights.download(aside, pipeline.repository, recorded.get(f"{kind} as listed"), _wanted)}
            index = json.loads((aside / INDEX).read_text())
            if pipeline.controlnet:
                name = f"{kind} controlnet"
                net = aside / "controlnet"
                parts[name] = weights.download(net, pipeline.controlnet, recorded.get(name), _is_controlnet)
                index["controlnet"] = ["diffusers", "ControlNetModel"]
            if "safety_checker" in index:
                index["safety_checker"] = [None, None]
            (aside / INDEX).write_text(json.dumps({**index, "_class_name": pipeline.class_name}, indent=2))
            parts[f"{kind} as listed"] = parts[kind]
            parts[kind] = {**parts[kind], "files": _files(aside)}
            same = not recorded.get(kind) or recorded[kind]["files"] == parts[kind]["files"]
            if not same:
                raise UserError(f"{folder / kind}: not the files that {folder / weights.RECORD} records")
        atomic.write_json(folder / weights.RECORD, {**recorded, **parts})
        print(f"{folder / kind}: {pipeline.repository} at {parts[kind]['revision']}")
    print(f"use it by {pipeline.settings} --refine.folder {folder / kind}")


def _files(place: pathlib.Path) -> dict[str, str]:
    return {str(file.relative_to(place)): weights.sha256(file) for file in sorted(place.rglob("*")) if file.is_file()}


def _wanted(name: str) -> bool:
    """Whether a file belongs to a saved pipeline: its index, or configuration and safetensors of one of its parts."""
    if any(fnmatch.fnmatch(name, pattern) for pattern in _UNWANTED):
        return False
    return name == INDEX or (name.count("/") == 1 and any(fnmatch.fnmatch(name, suffix) for suffix in _SUFFIXES))


def _is_controlnet(name: str) -> bool:
    return name in ("config.json", "diffusion_pytorch_model.safetensors")

"""What paints the rest: OpenCV by default, or a real diffusers pipeline with tiny random weights from a folder."""

import pathlib
import shutil

import numpy as np
import pytest

from anonymize.config import AnonymizeConfig
from anonymize.people import People
from anonymize.scene import texture
from anonymize.scene.inpaint import DiffusersInpaint, OpenCVInpaint
from anonymize.scene.removal import remove
from anonymize.vision.cues import inpainted
from maskdp import config
from maskdp.errors import UserError


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)


@pytest.fixture
def hole():
    hole = np.zeros((60, 80), bool)
    hole[20:40, 30:60] = True
    return hole


def painter(folder, **changes):
    return DiffusersInpaint(folder=folder, steps=2, size=64, **changes).load()[0]


def test_textures_are_the_default_for_scenes_and_telea_for_frames(picture, hole):
    settings = config.parse(AnonymizeConfig, ["--out", "x"], "anonymize")
    assert settings.inpaint == OpenCVInpaint()
    scene, frame = settings.inpaint.load()
    assert np.array_equal(scene(picture, hole), texture.filled(picture, hole))
    assert np.array_equal(frame(picture, hole), inpainted(picture, hole))
    plain, _ = OpenCVInpaint(textures=False).load()
    assert np.array_equal(plain(picture, hole), inpainted(picture, hole))


@pytest.mark.parametrize("kind", ["sd_inpaint", "sdxl_inpaint"])
def test_a_pipeline_paints_the_hole_and_nothing_else_and_reads_nothing_of_it(tiny, picture, hole, kind):
    paint = painter(tiny(kind))
    painted = paint(picture, hole)
    assert np.array_equal(painted[~hole], picture[~hole])
    assert not np.array_equal(painted[hole], inpainted(picture, hole)[hole])
    other = picture.copy()
    other[hole] = 255 - other[hole]
    assert np.array_equal(paint(other, hole)[hole], painted[hole])
    assert np.array_equal(paint(picture, np.zeros_like(hole)), picture)
    assert np.ptp(paint(picture, np.ones_like(hole))) == 0


def test_the_prompt_comes_from_the_bank(tiny, picture, hole):
    folder = tiny("sd_inpaint")
    indoors, outdoors = (painter(folder, prompt=name)(picture, hole) for name in ("indoors", "outdoors"))
    assert not np.array_equal(indoors, outdoors)
    with pytest.raises(UserError, match="prompt: 'a man in red', expected one of any, indoors, outdoors"):
        DiffusersInpaint(folder=folder, prompt="a man in red")


def test_frames_painted_alone_get_the_same_noise_and_do_not_flicker(tiny, picture, hole):
    """Two shots of one frame each: what they show is equal, and so is what is painted."""
    removal = np.stack([hole, hole])
    found = People((), removal, False, None, None, None, {})
    paint = painter(tiny("sd_inpaint"))
    result = remove(np.stack([picture, picture]), found, inpaint_alone=paint)
    assert np.array_equal(result.frames[0], result.frames[1])


def test_a_folder_that_will_not_do_is_one_clear_line(tiny, tmp_path):
    with pytest.raises(UserError, match=r"^inpaint.folder: missing, expected the folder of a saved StableDiffusionInp"):
        DiffusersInpaint()
    with pytest.raises(UserError, match=r"^inpaint.folder: /nowhere: no model_index.json there"):
        DiffusersInpaint(folder="/nowhere")
    with pytest.raises(UserError, match="holds a StableDiffusionControlNetInpaintPipeline, expected a StableDiff"):
        DiffusersInpaint(folder=tiny("sd_control"))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        DiffusersInpaint(folder=str(tmp_path))
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionInpaintPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}'
    )
    with pytest.raises(UserError, match="cannot be loaded") as error:
        painter(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"])
def test_weights_that_would_have_to_be_unpickled_are_refused(tiny, tmp_path, part):
    import torch
    from safetensors.torch import load_file

    folder = shutil.copytree(tiny("sd_inpaint"), tmp_path / "pickled")
    (safe,) = pathlib.Path(folder / part).parent.glob("*.safetensors")
    torch.save(load_file(safe), folder / part)
    safe.unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        painter(str(folder))


def test_the_config_that_comes_with_the_project(tiny):
    file, folder = str(config.bundled("anonymize/inpaint_diffusers.yaml")), tiny("sd_inpaint")
    options = ["--config_path", file, "--out", "x", "--inpaint.folder", folder]
    assert config.parse(AnonymizeConfig, options, "anonymize").inpaint == DiffusersInpaint(folder=folder)

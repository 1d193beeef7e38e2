"""The diffusion backend: a real ControlNet-inpaint pipeline with tiny random weights, saved and loaded offline."""

import json

import numpy as np
import pytest
import torch

from anonymize.refine import ControlNetRefiner, RefineConfig
from anonymize.wardrobe import Wardrobe
from maskdp import layers
from maskdp.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    from diffusers import (
        AutoencoderKL,
        ControlNetModel,
        DDIMScheduler,
        StableDiffusionControlNetInpaintPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("pipeline")
    ends = ["<|startoftext|>", "<|endoftext|>"]
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {token: i for i, token in enumerate([*letters, *(f"{a}</w>" for a in letters), *ends])}
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(path, model_max_length=77)
    width, (start, end) = 32, (vocabulary[token] for token in ends)
    text = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    for layer in (control.controlnet_mid_block, control.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(layer.weight)  # zero at birth, and the control map would not matter
    pipeline = StableDiffusionControlNetInpaintPipeline(
        vae=AutoencoderKL(
            block_out_channels=[8, 16],
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            latent_channels=4,
            norm_num_groups=8,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        controlnet=control,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(path / "saved")
    return str(path / "saved")


@pytest.fixture(scope="module")
def refiner(folder) -> ControlNetRefiner:
    return ControlNetRefiner(RefineConfig(folder=folder, steps=2, strength=1.0, size=64))


def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Two frames of a disc with a soft rim, and its depth; the second frame is empty."""
    y, x = np.mgrid[:48, :48]
    cover = np.clip(16 - np.hypot(x - 24, y - 24), 0, 1)
    rgba = np.zeros((2, 48, 48, 4), np.uint8)
    rgba[0, cover > 0, :3] = (180, 90, 40)
    rgba[0, ..., 3] = cover * 255
    rgba[rgba[..., 3] == 0] = 0
    depth = np.where(rgba[..., 3] > 0, 3 + x / 48, np.inf).astype(np.float32)
    return rgba, depth


IDENTITY = Wardrobe(b"\1" * 32).identity("a")


def test_alpha_is_kept_the_contract_holds_and_the_avatar_is_redrawn(refiner):
    rgba, depth = drawn()
    out = refiner(rgba, depth, IDENTITY)
    assert np.array_equal(out[..., 3], rgba[..., 3])
    layers.check_layers(out, np.zeros_like(out[..., :3]), "clip")
    assert not np.array_equal(out[0], rgba[0])
    assert not out[1].any()


def test_noise_and_prompt_follow_from_the_identity(refiner):
    rgba, depth = drawn()
    first = refiner(rgba, depth, IDENTITY)
    assert np.array_equal(first, refiner(rgba, depth, IDENTITY))
    assert not np.array_equal(first, refiner(rgba, depth, Wardrobe(b"\2" * 32).identity("a")))


def test_only_the_scene_context_looks_at_the_scene(refiner):
    rgba, depth = drawn()
    dark, light = (np.full((2, 48, 48, 3), value, np.uint8) for value in (0, 255))
    alone = refiner(rgba, depth, IDENTITY)
    assert not np.array_equal(refiner(rgba, depth, IDENTITY, dark), refiner(rgba, depth, IDENTITY, light))
    assert np.array_equal(alone, refiner(rgba, depth, IDENTITY, np.full_like(dark, layers.FILL)))


def test_the_control_map_matters(refiner):
    rgba, depth = drawn()
    turned = np.where(np.isfinite(depth), 7 - depth, np.inf)
    assert not np.array_equal(refiner(rgba, depth, IDENTITY), refiner(rgba, turned, IDENTITY))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no model_index.json"),
        (
            lambda path: (path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'),
            "holds a FluxPipeline",
        ),
        (lambda path: (path / "model_index.json").write_text("{"), "cannot be loaded"),
        (
            lambda path: (path / "model_index.json").write_text(
                '{"_class_name": "StableDiffusionControlNetInpaintPipeline", "unet": ["diffusers", '
                '"UNet2DConditionModel"]}'
            ),
            "cannot be loaded",
        ),
    ],
)
def test_a_folder_that_is_no_pipeline_is_one_clear_line(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        ControlNetRefiner(RefineConfig(folder=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_number_of_controls_must_be_the_pipelines(folder):
    with pytest.raises(UserError, match="2 for a pipeline of 1"):
        ControlNetRefiner(RefineConfig(folder=folder, controls=("depth", "canny")))


def test_config_refuses_nonsense():
    with pytest.raises(UserError, match="scene"):
        RefineConfig(context="scene")
    with pytest.raises(UserError, match="controls"):
        RefineConfig(controls=("pose",))

"""Models and pipelines with tiny random weights, built offline from the libraries' own classes, saved to folders."""

import functools
import json
import pathlib
from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[[str], str]:
    """The folder of a tiny pipeline by name, built when it is first asked for; see `BUILDERS`."""

    @functools.cache
    def folder(name: str) -> str:
        import torch

        torch.set_num_threads(1)
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp(name)
        BUILDERS[name](path).save_pretrained(path / "saved")
        return str(path / "saved")

    return folder


def clip_tokenizer(path: pathlib.Path):
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(path, model_max_length=77)


def clip_config(tokenizer):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


def image_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=[8, 8, 8, 16],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    )


def unet(channels: int, xl: bool = False):
    from diffusers import UNet2DConditionModel

    size = {"sample_size": 8, "in_channels": channels, "layers_per_block": 1, "norm_num_groups": 8}
    if xl:
        return UNet2DConditionModel(
            **size,
            out_channels=4,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
            cross_attention_dim=64,
        )
    return UNet2DConditionModel(
        **size,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
        cross_attention_dim=32,
    )


def control_net(net):
    import torch
    from diffusers import ControlNetModel

    control = ControlNetModel.from_unet(net, conditioning_embedding_out_channels=(8, 8, 8, 16))
    for layer in (control.controlnet_mid_block, control.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(layer.weight)  # zero at birth, and the control map would not matter
    return control


def sd(path: pathlib.Path, channels: int, kind: str, nets: int = 0):
    import diffusers
    from transformers import CLIPTextModel

    tokenizer, net = clip_tokenizer(path), unet(channels)
    controls = [control_net(unet(4)) for _ in range(nets)]
    return getattr(diffusers, kind)(
        vae=image_vae(),
        text_encoder=CLIPTextModel(clip_config(tokenizer)),
        tokenizer=tokenizer,
        unet=net,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **({"controlnet": controls if nets > 1 else controls[0]} if nets else {}),
    )


def sdxl(path: pathlib.Path, channels: int, kind: str, nets: int = 0):
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    tokenizer, net = clip_tokenizer(path), unet(channels, xl=True)
    config = clip_config(tokenizer)
    return getattr(diffusers, kind)(
        vae=image_vae(),
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=net,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        **({"controlnet": control_net(net)} if nets else {}),
    )


def wan_parts() -> dict:
    """What the Wan pipelines share: tokenizer, text encoder, VAE and scheduler."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    letters = ["<pad>", "</s>", "<unk>", *(chr(code) for code in range(33, 127))]
    words = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(letters)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return {
        "tokenizer": PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        "text_encoder": UMT5EncoderModel(
            UMT5Config(vocab_size=len(letters), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        "vae": AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    }


def wan_transformer(kind: str, **own):
    import diffusers

    return getattr(diffusers, kind)(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
        **own,
    )


def vace(path: pathlib.Path):
    from diffusers import WanVACEPipeline

    transformer = wan_transformer(
        "WanVACETransformer3DModel", in_channels=4, num_layers=2, vace_layers=[0], vace_in_channels=2 * 4 + 64
    )
    return WanVACEPipeline(transformer=transformer, **wan_parts())


def animate(path: pathlib.Path):
    from diffusers import WanAnimatePipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    transformer = wan_transformer(
        "WanAnimateTransformer3DModel",
        in_channels=2 * 4 + 4,
        latent_channels=4,
        num_layers=1,
        image_dim=16,
        motion_encoder_channel_sizes={str(2**k): 8 for k in range(2, 6)},
        motion_encoder_size=16,
        inject_face_latents_blocks=1,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    return WanAnimatePipeline(
        transformer=transformer,
        image_encoder=CLIPVisionModel(vision),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28),
        **wan_parts(),
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> pathlib.Path:
    """A complete weights folder of tiny random models."""
    import torch

    from tests.anonymize import tiny_models

    torch.set_num_threads(1)
    return tiny_models.save(tmp_path_factory.mktemp("weights"))


BUILDERS = {
    "sd_inpaint": lambda path: sd(path, 9, "StableDiffusionInpaintPipeline"),
    "sdxl_inpaint": lambda path: sdxl(path, 9, "StableDiffusionXLInpaintPipeline"),
    "sd_control": lambda path: sd(path, 4, "StableDiffusionControlNetInpaintPipeline", 1),
    "sd_controls": lambda path: sd(path, 9, "StableDiffusionControlNetInpaintPipeline", 3),
    "sdxl_control": lambda path: sdxl(path, 4, "StableDiffusionXLControlNetInpaintPipeline", 1),
    "vace": vace,
    "animate": animate,
}

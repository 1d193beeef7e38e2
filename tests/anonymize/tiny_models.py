"""Complete model folders with tiny random weights, built offline from the library's own classes."""

import json
import pathlib

import torch
import transformers as hf


def detector(family: str = "rt_detr") -> torch.nn.Module:
    sizes = dict(
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 24, 32],
        d_model=32,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=10,
        decoder_layers=2,
        decoder_in_channels=[32] * 3,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        id2label={0: "chair", 1: "person"},
    )
    resnet = dict(
        embedding_size=10, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, out_features=["stage2", "stage3", "stage4"]
    )
    if family == "d_fine":
        hgnet = hf.HGNetV2Config(
            stem_channels=[3, 8, 8],
            stage_in_channels=[8, 16, 16, 24],
            stage_mid_channels=[8, 8, 8, 8],
            stage_out_channels=[16, 16, 24, 32],
            stage_num_blocks=[1] * 4,
            stage_numb_of_layers=[1] * 4,
            hidden_sizes=[16, 16, 24, 32],
            depths=[1] * 4,
            embedding_size=8,
            out_features=["stage2", "stage3", "stage4"],
        )
        return hf.DFineForObjectDetection(hf.DFineConfig(backbone_config=hgnet, **sizes))
    config, model = {
        "rt_detr": (hf.RTDetrConfig, hf.RTDetrForObjectDetection),
        "rt_detr_v2": (hf.RTDetrV2Config, hf.RTDetrV2ForObjectDetection),
    }[family]
    return model(config(backbone_config=hf.RTDetrResNetConfig(**resnet), **sizes))


def tracker() -> torch.nn.Module:
    side, width = 64, 128
    vision = dict(
        backbone_config=dict(
            model_type="sam2_hiera_det_model",
            hidden_size=12,
            num_attention_heads=1,
            blocks_per_stage=[1, 2, 2, 1],
            embed_dim_per_stage=[12, 24, 48, 96],
            num_attention_heads_per_stage=[1, 2, 4, 8],
            global_attention_blocks=[4],
            window_size_per_stage=[4, 2, 4, 2],
            image_size=[side, side],
            window_positional_embedding_background_size=[7, 7],
        ),
        fpn_hidden_size=width,
        backbone_channel_list=[96, 48, 24, 12],
        backbone_feature_sizes=[[side // 4] * 2, [side // 8] * 2, [side // 16] * 2],
    )
    return hf.Sam2VideoModel(
        hf.Sam2VideoConfig(
            vision_config=vision,
            image_size=side,
            prompt_encoder_config=dict(hidden_size=width, image_size=side, patch_size=16),
            mask_decoder_config=dict(
                hidden_size=width,
                iou_head_hidden_dim=width,
                mlp_dim=32,
                num_attention_heads=4,
                attention_downsample_rate=2,
            ),
            memory_attention_hidden_size=width,
            memory_attention_num_layers=1,
            memory_attention_num_attention_heads=1,
            memory_attention_feed_forward_hidden_size=32,
            memory_encoder_hidden_size=width,
            memory_encoder_output_channels=64,
            memory_attention_rope_feat_sizes=[side // 16] * 2,
            mask_downsampler_embed_dim=width,
            memory_fuser_embed_dim=width,
            memory_fuser_intermediate_dim=width,
        )
    )


def keypoints(joints: int = 17) -> torch.nn.Module:
    backbone = hf.VitPoseBackboneConfig(
        image_size=[64, 48],
        patch_size=[16, 16],
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        out_indices=[2],
    )
    return hf.VitPoseForPoseEstimation(hf.VitPoseConfig(backbone_config=backbone, num_labels=joints))


def depth() -> torch.nn.Module:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = hf.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        out_features=stages,
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    return hf.DepthAnythingForDepthEstimation(
        hf.DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=32,
            neck_hidden_sizes=[8] * 4,
            fusion_hidden_size=8,
            head_hidden_size=8,
            patch_size=14,
        )
    )


PREPROCESSORS = {
    "detector": {"size": {"height": 64, "width": 96}, "do_normalize": False, "resample": 2},
    "tracker": {"size": {"height": 64, "width": 64}, "do_normalize": True, "resample": 2},
    "keypoints": {"size": {"height": 64, "width": 48}, "do_normalize": True},
    "depth": {
        "size": {"height": 56, "width": 56},
        "do_normalize": True,
        "resample": 3,
        "keep_aspect_ratio": True,
        "ensure_multiple_of": 14,
    },
}
MEANS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """The model with weights large enough that its pixels and prompts matter; at birth they hardly do."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    return model


def save(folder: pathlib.Path) -> pathlib.Path:
    """A whole weights folder."""
    torch.manual_seed(0)
    models = {"detector": detector(), **{p.__name__: lively(p()) for p in (tracker, keypoints, depth)}}
    for part, model in models.items():
        model.save_pretrained(folder / part)
        (folder / part / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSORS[part], **MEANS}))
    return folder

"""One small architecture of each module of timm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.sweep.entries import AbsentError, Entry, Sample

BLOCKS, STAGES, LAYERS = "blocks.*", "stages.*", "layers.*"


def _sized(size: int, **options: Any) -> tuple[int, dict[str, Any]]:
    """Return a size of images that the model has to be told, with its other options."""
    return size, {"img_size": size, **options}


VIT = _sized(32, depth=4)
CNN: tuple[int, dict[str, Any]] = (64, {})

FAMILIES: dict[str, tuple[str, tuple[int, dict[str, Any]], str | None]] = {
    "beit": ("beit_base_patch16_224", _sized(32, depth=4, embed_dim=192, num_heads=3), BLOCKS),
    "byoanet": ("halonet26t", (256, {}), STAGES),
    "byobnet": ("mobileone_s1", (32, {}), STAGES),
    "cait": ("cait_xxs24_224", _sized(32, depth=4), BLOCKS),
    "coat": ("coat_lite_tiny", _sized(64), None),
    "convit": ("convit_tiny", _sized(32, depth=12), BLOCKS),
    "convmixer": ("convmixer_768_32", (28, {}), BLOCKS),
    "convnext": ("convnext_atto", CNN, STAGES),
    "cpubone": ("cpubone_nano", CNN, STAGES),
    "crossvit": ("crossvit_tiny_240", (240, {}), BLOCKS),
    "csatv2": ("csatv2", CNN, STAGES),
    "cspnet": ("cs3darknet_focus_s", CNN, STAGES),
    "cspnext": ("cspnext_tiny", CNN, STAGES),
    "davit": ("davit_tiny", (64, {"depths": (1, 1, 1, 1), "embed_dims": (24, 48, 96, 192)}), STAGES),
    "deepseek_vit": ("deepseek_vit_412m", _sized(28, depth=4, embed_dim=96, num_heads=3), "encoder.blocks.*"),
    "deit": ("deit_tiny_patch16_224", VIT, BLOCKS),
    "densenet": ("densenet121", (32, {}), "features.denseblock*"),
    "dla": ("dla46_c", CNN, "level*"),
    "dpn": ("dpn48b", CNN, "features.conv*"),
    "edgenext": ("edgenext_xx_small", CNN, STAGES),
    "efficientformer": ("efficientformer_l1", (224, {}), STAGES),
    "efficientformer_v2": ("efficientformerv2_s0", _sized(64), STAGES),
    "efficientnet": ("efficientnet_b0", CNN, BLOCKS),
    "efficientvim": ("efficientvim_m1", CNN, STAGES),
    "efficientvit_mit": ("efficientvit_b0", CNN, STAGES),
    "efficientvit_msra": ("efficientvit_m0", _sized(64), STAGES),
    "eva": ("eva02_tiny_patch14_224", _sized(28, depth=4), BLOCKS),
    "fasternet": ("fasternet_t0", CNN, STAGES),
    "fastvit": ("fastvit_t8", CNN, STAGES),
    "focalnet": ("focalnet_tiny_srf", CNN, LAYERS),
    "gcvit": ("gcvit_xxtiny", _sized(224), STAGES),
    "gemma4_vit": ("gemma4_vit_167m", _sized(48, depth=4, embed_dim=96, num_heads=3), "encoder.blocks.*"),
    "ghostnet": ("ghostnet_050", CNN, BLOCKS),
    "hardcorenas": ("hardcorenas_a", CNN, BLOCKS),
    "hgnet": ("hgnetv2_b0", CNN, STAGES),
    "hiera": ("hiera_tiny_224", _sized(64, stages=(1, 1, 2, 1)), BLOCKS),
    "hieradet_sam2": ("sam2_hiera_tiny", (224, {}), BLOCKS),
    "hrnet": ("hrnet_w18_small", CNN, "stage?"),
    "iformer": ("iformer_t", CNN, STAGES),
    "inception_next": ("inception_next_atto", CNN, STAGES),
    "inception_resnet_v2": ("inception_resnet_v2", (128, {}), None),
    "inception_v3": ("inception_v3", (128, {}), None),
    "inception_v4": ("inception_v4", (128, {}), "features.*"),
    "lcnetv2": ("lcnetv2_small", CNN, "stages.*"),
    "levit": ("levit_128s", _sized(224), STAGES),
    "lowformer": ("lowformer_b0", CNN, STAGES),
    "mambaout": ("mambaout_femto", CNN, STAGES),
    "maxxvit": ("coatnet_nano_rw_224", _sized(64), STAGES),
    "metaformer": ("poolformer_s12", CNN, STAGES),
    "mlp_mixer": ("mixer_s32_224", _sized(64), BLOCKS),
    "mobilenetv3": ("mobilenetv3_small_050", CNN, BLOCKS),
    "mobilenetv5": ("mobilenetv5_300m", (64, {"channel_multiplier": 0.25}), None),
    "mobilevit": ("mobilevit_xxs", CNN, STAGES),
    "mvitv2": ("mvitv2_tiny", _sized(64), STAGES),
    "naflexvit": ("naflexvit_base_patch16_gap", (32, {"depth": 4, "embed_dim": 96, "num_heads": 3}), BLOCKS),
    "nasnet": ("nasnetalarge", CNN, None),
    "nest": ("nest_tiny", _sized(224), None),
    "nextvit": ("nextvit_small", CNN, STAGES),
    "nfnet": ("nf_resnet26", CNN, STAGES),
    "pit": ("pit_ti_224", _sized(64), "transformers.*"),
    "pnasnet": ("pnasnet5large", (64, {}), None),
    "pvt_v2": ("pvt_v2_b0", CNN, STAGES),
    "qwen3_vit": ("qwen3_vit_88m", _sized(32, depth=4), "encoder.blocks.*"),
    "rdnet": ("rdnet_tiny", CNN, "dense_stages.*"),
    "regnet": ("regnety_002", CNN, "s?"),
    "repghost": ("repghostnet_050", CNN, BLOCKS),
    "repvit": ("repvit_m0_9", CNN, STAGES),
    "res2net": ("res2net50_14w_8s", CNN, "layer*"),
    "resnest": ("resnest14d", CNN, "layer*"),
    "resnet": ("resnet10t", CNN, "layer*"),
    "resnetv2": ("resnetv2_18", CNN, STAGES),
    "rexnet": ("rexnet_100", CNN, "features.*"),
    "selecsls": ("selecsls42b", CNN, "features.*"),
    "senet": ("legacy_seresnet18", CNN, "layer*"),
    "sequencer": ("sequencer2d_s", _sized(56, layers=(1, 1, 2, 1)), STAGES),
    "shvit": ("shvit_s1", (128, {}), STAGES),
    "sknet": ("skresnet18", CNN, "layer*"),
    "starnet": ("starnet_s050", CNN, STAGES),
    "swiftformer": ("swiftformer_xs", CNN, STAGES),
    "swin_transformer": (
        "swin_tiny_patch4_window7_224",
        _sized(56, depths=(2, 2, 2), embed_dim=24, num_heads=(1, 2, 4)),
        LAYERS,
    ),
    "swin_transformer_v2": (
        "swinv2_tiny_window8_256",
        _sized(64, depths=(2, 2, 2), embed_dim=24, num_heads=(1, 2, 4)),
        LAYERS,
    ),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", _sized(224, depths=(1, 1, 2, 1), embed_dim=24), STAGES),
    "tiny_vit": ("tiny_vit_5m_224", CNN, STAGES),
    "tnt": ("tnt_s_patch16_224", _sized(32, depth=4), BLOCKS),
    "tresnet": ("tresnet_m", CNN, "body.layer*"),
    "twins": ("twins_svt_small", _sized(64, depths=(1, 1, 2, 1)), None),
    "vgg": ("vgg11_bn", (64, {"mlp_ratio": 0.125}), None),
    "visformer": ("visformer_tiny", _sized(64), "stage?"),
    "vision_transformer": ("vit_tiny_patch16_224", VIT, BLOCKS),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", _sized(64, depth=4), BLOCKS),
    "vision_transformer_relpos": (
        "vit_relpos_small_patch16_224",
        _sized(32, depth=4, embed_dim=96, num_heads=3),
        BLOCKS,
    ),
    "vision_transformer_sam": (
        "samvit_base_patch16_224",
        _sized(64, depth=4, embed_dim=96, num_heads=3),
        BLOCKS,
    ),
    "vitamin": ("vitamin_small_224", _sized(64), None),
    "volo": ("volo_d1_224", _sized(64), "network.*"),
    "vovnet": ("ese_vovnet19b_slim_dw", CNN, STAGES),
    "xception": ("legacy_xception", (64, {}), None),
    "xception_aligned": ("xception41", CNN, BLOCKS),
    "xcit": ("xcit_nano_12_p16_224", _sized(64, depth=4), BLOCKS),
}

WEIGHTS: dict[str, float] = {
    "hrnet_w18_small": 20.0,
    "halonet26t": 9.0,
    "nasnetalarge": 9.0,
    "pnasnet5large": 9.0,
    "sam2_hiera_tiny": 8.0,
    "gcvit_xxtiny": 7.0,
    "convmixer_768_32": 6.0,
    "inception_resnet_v2": 5.0,
    "inception_v4": 5.0,
    "mobilenetv5_300m": 5.0,
    "focalnet_tiny_srf": 4.0,
    "nest_tiny": 4.0,
    "crossvit_tiny_240": 4.0,
}


def entries() -> list[Entry]:
    """Return an entry for each family."""
    return [
        Entry("timm", family, name, partial(_find, name, *size), glob, WEIGHTS.get(name, 2.0))
        for family, (name, size, glob) in FAMILIES.items()
    ]


def _find(name: str, size: int, options: dict[str, Any]) -> Callable[[], Sample]:
    try:
        import timm
    except ImportError as error:
        raise AbsentError(str(error)) from error
    if not timm.is_model(name):
        raise AbsentError(f"timm has no model {name!r}")
    return partial(_make, name, size, options)


def _make(name: str, size: int, options: dict[str, Any]) -> Sample:
    import timm
    import torch

    model = timm.create_model(name, num_classes=10, **options)
    return Sample(model, torch.randn(2, 3, size, size), torch.randint(0, 10, (2,)))

"""One small architecture of each family of torchvision.

Quantised models are left out: they have no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.sweep.entries import AbsentError, Entry, Sample

IMAGE = (2, 3, 64, 64)
VIDEO = (2, 3, 8, 32, 32)

CLASSIFIERS: dict[str, tuple[str, Sequence[int], dict[str, Any], str | None]] = {
    "alexnet": ("alexnet", IMAGE, {}, None),
    "convnext": ("convnext_tiny", IMAGE, {}, "features.*"),
    "densenet": ("densenet121", (2, 3, 32, 32), {}, "features.denseblock*"),
    "efficientnet": ("efficientnet_b0", IMAGE, {}, "features.*"),
    "efficientnet_v2": ("efficientnet_v2_s", (2, 3, 32, 32), {}, "features.*"),
    "googlenet": ("googlenet", IMAGE, {"init_weights": False}, "inception*"),
    "inception": ("inception_v3", (2, 3, 299, 299), {"init_weights": False}, "Mixed_*"),
    "mnasnet": ("mnasnet0_5", IMAGE, {}, None),
    "mobilenet_v2": ("mobilenet_v2", IMAGE, {}, None),
    "mobilenet_v3": ("mobilenet_v3_small", IMAGE, {}, "features.*"),
    "regnet": ("regnet_y_400mf", IMAGE, {}, "trunk_output.*"),
    "resnet": ("resnet18", IMAGE, {}, "layer*"),
    "shufflenet": ("shufflenet_v2_x0_5", IMAGE, {}, "stage*"),
    "squeezenet": ("squeezenet1_1", IMAGE, {}, None),
    "swin": ("swin_t", IMAGE, {}, "features.*"),
    "swin_v2": ("swin_v2_t", IMAGE, {}, "features.*"),
    "vgg": ("vgg11_bn", IMAGE, {}, None),
    "mc3": ("mc3_18", VIDEO, {}, "layer*"),
    "r3d": ("r3d_18", VIDEO, {}, "layer*"),
    "r2plus1d": ("r2plus1d_18", VIDEO, {}, "layer*"),
    "s3d": ("s3d", (2, 3, 16, 224, 224), {}, None),
    "swin3d": ("swin3d_t", VIDEO, {}, "features.*"),
}
SEGMENTERS = {
    "fcn": ("fcn_resnet50", {"aux_loss": True}),
    "deeplab": ("deeplabv3_mobilenet_v3_large", {"aux_loss": True}),
    "lraspp": ("lraspp_mobilenet_v3_large", {}),
}
DETECTORS = (
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fcos_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
)
WEIGHTS: dict[str, float] = {
    "s3d": 20.0,
    "ssd300_vgg16": 12.0,
    "vgg11_bn": 9.0,
    "inception_v3": 9.0,
    "raft_small": 7.0,
    "densenet121": 6.0,
    "alexnet": 5.0,
    "swin_t": 5.0,
    "swin_v2_t": 5.0,
    "fcn_resnet50": 5.0,
    "googlenet": 4.0,
}


def entries() -> list[Entry]:
    """Return an entry for each family."""
    found = [
        _entry(family, name, partial(_classifier, shape, options), glob)
        for family, (name, shape, options, glob) in CLASSIFIERS.items()
    ]
    found += [
        _entry(family, name, partial(_segmenter, options), "backbone.*" if family != "fcn" else None)
        for family, (name, options) in SEGMENTERS.items()
    ]
    found += [_entry(name.split("_")[0], name, _detector) for name in DETECTORS]
    found.append(_entry("raft", "raft_small", _flow))
    found.append(_entry("vit", "vit_b_16", _vit, "encoder.layers.*"))
    found.append(_entry("maxvit", "maxvit_t", _maxvit, "blocks.*"))
    found.append(_entry("mvit", "mvit_v2_s", _mvit, "blocks.*"))
    return found


def _entry(family: str, name: str, make: Callable[[Any], Sample], glob: str | None = None) -> Entry:
    return Entry("torchvision", family, name, partial(_find, name, make), glob, WEIGHTS.get(name, 3.0))


def _find(name: str, make: Callable[[Any], Sample]) -> Callable[[], Sample]:
    try:
        from torchvision import models
    except ImportError as error:
        raise AbsentError(str(error)) from error
    if name not in models.list_models():
        raise AbsentError(f"torchvision has no model {name!r}")
    return partial(make, models.get_model_builder(name))


def _classifier(shape: Sequence[int], options: dict[str, Any], build: Any) -> Sample:
    import torch
    from torch.nn import functional

    def with_auxiliaries(output: Any, target: Any) -> Any:
        main, *auxiliary = (o for o in output if o is not None)
        terms = [functional.cross_entropy(o, target) for o in auxiliary]
        return functional.cross_entropy(main, target) + 0.3 * sum(terms)

    model = build(weights=None, num_classes=10, **options)
    loss = with_auxiliaries if "init_weights" in options else "cross_entropy"
    return Sample(model, torch.randn(*shape), torch.randint(0, 10, shape[:1]), loss)


def _segmenter(options: dict[str, Any], build: Any) -> Sample:
    import torch
    from torch.nn import functional

    def loss(output: Any, target: Any) -> Any:
        main = functional.cross_entropy(output["out"], target)
        return main + 0.5 * functional.cross_entropy(output["aux"], target) if "aux" in output else main

    model = build(weights=None, weights_backbone=None, num_classes=5, **options)
    return Sample(model, torch.randn(*IMAGE), torch.randint(0, 5, (2, 64, 64)), loss)


def _detector(build: Any) -> Sample:
    import torch

    sizes = {} if "ssd" in build.__name__ else {"min_size": 96, "max_size": 96}
    model = build(weights=None, weights_backbone=None, num_classes=3, **sizes)
    images = [torch.rand(3, 96, 96) for _ in range(2)]
    found = {
        "boxes": torch.tensor([[10.0, 10.0, 60.0, 60.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 96, 96, dtype=torch.uint8),
        "keypoints": torch.tensor([[[20.0, 20.0, 1.0]] * 17]),
    }
    return Sample(model, (images, [found, found]), None, lambda output, target: sum(output.values()))


def _flow(build: Any) -> Sample:
    import torch

    images = torch.randn(2, 3, 128, 128), torch.randn(2, 3, 128, 128)

    def loss(output: Any, target: Any) -> Any:
        return sum((flow - target).abs().mean() for flow in output)

    return Sample(build(weights=None), images, torch.zeros(2, 2, 128, 128), loss)


def _vit(build: Any) -> Sample:
    import torch
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=4, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    return Sample(model, torch.randn(2, 3, 32, 32), torch.randint(0, 10, (2,)))


def _maxvit(build: Any) -> Sample:
    import torch
    from torchvision.models import MaxVit

    model = MaxVit(
        input_size=(64, 64),
        stem_channels=16,
        partition_size=2,
        block_channels=[16, 32, 64, 64],
        block_layers=[1, 1, 1, 1],
        head_dim=16,
        stochastic_depth_prob=0.0,
        num_classes=10,
    )
    return Sample(model, torch.randn(*IMAGE), torch.randint(0, 10, (2,)))


def _mvit(build: Any) -> Sample:
    import torch
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    def block(heads: int, before: int, after: int, query: int, key: int) -> Any:
        return MSBlockConfig(heads, before, after, [3, 3, 3], [3, 3, 3], [1, query, query], [1, key, key])

    model = MViT(
        spatial_size=(32, 32),
        temporal_size=4,
        block_setting=[block(1, 16, 32, 1, 2), block(2, 32, 32, 2, 1), block(2, 32, 32, 1, 1)],
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        num_classes=10,
    )
    return Sample(model, torch.randn(2, 3, 4, 32, 32), torch.randint(0, 10, (2,)))

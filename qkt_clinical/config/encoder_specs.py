"""The pretrained encoders on the allow-list. Free of torch, so that they are listed at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qkt_clinical.catalog import EncoderName

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class EncoderSpec:
    """An architecture on the allow-list, and what its usual weights expect of images."""

    library: Literal["timm", "monai"]
    architecture: str
    features: int
    """F."""
    side: int
    """Pixels along an edge of the images that it was trained on."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Per channel, of images in [0, 1]."""
    spatial_dims: Literal[2, 3] = 2

    @property
    def channels(self) -> int:
        """Of its input; grey images are repeated."""
        return len(self.mean)


ENCODERS: Mapping[EncoderName, EncoderSpec] = {
    "resnet18": EncoderSpec("timm", "resnet18", 512, 224, *IMAGENET),
    "resnet50": EncoderSpec("timm", "resnet50", 2048, 224, *IMAGENET),
    "efficientnet-b0": EncoderSpec("timm", "efficientnet_b0", 1280, 224, *IMAGENET),
    "efficientnet-lite0": EncoderSpec("timm", "tf_efficientnet_lite0", 1280, 224, *HALF),
    "convnext-tiny": EncoderSpec("timm", "convnext_tiny", 768, 224, *IMAGENET),
    "vit-small": EncoderSpec("timm", "vit_small_patch16_224", 384, 224, *HALF),
    "vit-base": EncoderSpec("timm", "vit_base_patch16_224", 768, 224, *HALF),
    "dinov2-small": EncoderSpec("timm", "vit_small_patch14_dinov2", 384, 518, *IMAGENET),
    "medicalnet-resnet10": EncoderSpec("monai", "resnet10", 512, 64, (0.5,), (0.5,), spatial_dims=3),
}

"""Pretrained architectures by allow-listed name, and the extractor that a network makes of one."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkt_clinical.catalog import EncoderName
from qkt_clinical.config.encoder_specs import ENCODERS, EncoderSpec
from qkt_clinical.data.inputs import MEAN, STD
from qkt_clinical.models.libraries import monai_networks, timm_library
from qkt_clinical.records.card import EncoderPart

NORMALISATIONS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def encoder_architecture(name: EncoderName) -> nn.Module:
    """Images (N, channels, *spatial), as its weights expect them, to features (N, F).

    Raises:
        QktError: timm is not installed.
    """
    spec = ENCODERS[name]
    if spec.library == "monai":
        return _medicalnet()
    varies = {"dynamic_img_size": True} if spec.architecture.startswith("vit") else {}
    network: nn.Module = timm_library().create_model(
        spec.architecture, pretrained=False, num_classes=0, **varies
    )
    return network


def _medicalnet() -> nn.Module:
    """ResNet-10 for volumes as MedicalNet trained it (Chen et al., 2019, arXiv 1904.00625)."""
    return monai_networks().resnet10(  # type: ignore[no-any-return]
        spatial_dims=3,
        n_input_channels=1,
        feed_forward=False,
        shortcut_type="B",
        bias_downsample=False,
    )


def encoder_input(images: Tensor, spec: EncoderSpec, side: int) -> Tensor:
    """Images (N, C, *spatial) in [0, 1] to (N, channels, side, ...) as the encoder's weights expect them."""
    size = (side,) * spec.spatial_dims
    if tuple(images.shape[2:]) != size:
        flat = spec.spatial_dims == 2
        images = F.interpolate(
            images,
            size,
            mode="bicubic" if flat else "trilinear",
            align_corners=False,
            antialias=flat and min(images.shape[2:]) > side,
        ).clamp(0.0, 1.0)
    broadcast = (1, spec.channels, *(1,) * spec.spatial_dims)
    mean, std = (torch.tensor(v, device=images.device).view(broadcast) for v in (spec.mean, spec.std))
    return (images - mean) / std


class EncoderExtractor(nn.Module):
    """A pretrained network as extractor: network input (N, C, *spatial) to features (N, F)."""

    def __init__(self, part: EncoderPart) -> None:
        super().__init__()
        self.part = part
        self.network = encoder_architecture(part.name)

    def learnt(self) -> list[nn.Parameter]:
        """The parameters that training changes, by the mode."""
        match self.part.mode:
            case "frozen":
                return []
            case "adapters":
                layers = [m for m in self.network.modules() if isinstance(m, NORMALISATIONS)]
                return [p for layer in layers for p in layer.parameters(recurse=False)]
            case "finetune":
                return list(self.network.parameters())

    def unchanged(self) -> frozenset[str]:
        """Names in ``network``'s state of the tensors that training leaves as they are, by the mode.

        A normalisation layer that is trained changes its statistics too, not its weight and bias alone.
        """
        match self.part.mode:
            case "frozen":
                return frozenset(self.network.state_dict())
            case "adapters":
                layers = [n for n, m in self.network.named_modules() if isinstance(m, NORMALISATIONS)]
                return frozenset(n for n in self.network.state_dict() if n.rpartition(".")[0] not in layers)
            case "finetune":
                return frozenset()

    def train(self, mode: bool = True) -> Self:
        """Training mode, in which a frozen one stays as it is: its statistics too."""
        return super().train(mode and self.part.mode != "frozen")

    def prepared(self, images: Tensor) -> Tensor:
        """Network input as the encoder's first layer sees it: of its size, channels and scale."""
        return encoder_input(images * STD + MEAN, ENCODERS[self.part.name], self.part.side)

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, F)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.part.mode != "frozen"):
            out: Tensor = self.network(self.prepared(images))
        return F.normalize(out, dim=1) if self.part.unit_length else out

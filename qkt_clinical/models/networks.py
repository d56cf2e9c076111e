"""Networks by allow-listed name, split into a feature extractor and a classification head."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkt_clinical.config.encoder_specs import ENCODERS
from qkt_clinical.errors import ConfigError, DeviceError
from qkt_clinical.models.encoder_network import EncoderExtractor
from qkt_clinical.models.libraries import WithoutValues, monai_networks
from qkt_clinical.models.low_rank import convolutions, factorised, replace_module
from qkt_clinical.records.card import NetworkSpec


class Classifier(nn.Module):
    """``head(extractor(x))``: images (N, C, *spatial) to features (N, F) to logits (N, classes)."""

    def __init__(self, spec: NetworkSpec, extractor: nn.Module, features: int) -> None:
        super().__init__()
        self.spec = spec
        self.extractor = extractor
        self.head = nn.Linear(features, spec.classes)

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (N, F), float32."""
        out: Tensor = self.extractor(images)
        return out

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes)."""
        out: Tensor = self.head(self.extractor(images))
        return out


class MergedExtractor(nn.Module):
    """The extractors of a merged low-rank network: features (N, F_i) one after another, (N, sum F_i)."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, images: Tensor) -> Tensor:
        """Features of all branches."""
        return torch.cat([branch(images) for branch in self.branches], dim=1)


def _resnet(spec: NetworkSpec, inplanes: list[int], layers: list[int], stem: int) -> tuple[nn.Module, int]:
    nets = monai_networks()
    body = nets.ResNet(
        "basic",
        layers,
        inplanes,
        spatial_dims=spec.spatial_dims,
        n_input_channels=spec.in_channels,
        conv1_t_size=stem,
        conv1_t_stride=1,
        no_max_pool=True,
        num_classes=spec.classes,
        feed_forward=False,
        bias_downsample=False,
    )
    return body, inplanes[-1]


GROUPS = 8
"""Of group norm."""


def _with_group_norm(module: nn.Module) -> None:
    """Replace every batch norm by group norm, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d | nn.BatchNorm3d):
            setattr(module, name, nn.GroupNorm(GROUPS, child.num_features))
        else:
            _with_group_norm(child)


def _densenet(spec: NetworkSpec, init: int, growth: int, blocks: tuple[int, ...]) -> tuple[nn.Module, int]:
    nets = monai_networks()
    body = nets.DenseNet(
        spec.spatial_dims,
        spec.in_channels,
        spec.classes,
        init_features=init,
        growth_rate=growth,
        block_config=blocks,
    )
    features = body.class_layers.out.in_features
    body.class_layers.out = nn.Identity()
    return body, features


def _efficientnet(spec: NetworkSpec) -> tuple[nn.Module, int]:
    nets = monai_networks()
    body = nets.EfficientNetBN(
        "efficientnet-b0",
        pretrained=False,
        spatial_dims=spec.spatial_dims,
        in_channels=spec.in_channels,
        num_classes=spec.classes,
    )
    features = body._fc.in_features
    body._fc = nn.Identity()
    return body, features


def _merged(spec: NetworkSpec) -> tuple[nn.Module, int]:
    extractors, features = [], 0
    for branch in spec.branches:
        source = build(
            spec.model_copy(update={"name": branch.name, "encoder": branch.encoder, "branches": ()})
        )
        for name, (convolution, rank) in convolutions(source.extractor, branch.rank).items():
            replace_module(source.extractor, name, factorised(convolution, rank))
        extractors.append(source.extractor)
        features += source.head.in_features
    return MergedExtractor(extractors), features


def build(spec: NetworkSpec, *, seed: int | None = None) -> Classifier:
    """Build a network; with ``seed`` its initial weights depend on the seed and the spec alone."""
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        match spec.name:
            case "resnet-small":
                body, features = _resnet(spec, [16, 32, 64, 128], [1, 1, 1, 1], 3)
            case "resnet-small-gn":
                body, features = _resnet(spec, [16, 32, 64, 128], [1, 1, 1, 1], 3)
                _with_group_norm(body)
            case "resnet18":
                body, features = _resnet(spec, [64, 128, 256, 512], [2, 2, 2, 2], 3)
            case "densenet-small":
                body, features = _densenet(spec, 16, 12, (3, 3, 3))
            case "densenet121":
                body, features = _densenet(spec, 64, 32, (6, 12, 24, 16))
            case "efficientnet-b0":
                body, features = _efficientnet(spec)
            case "encoder":
                assert spec.encoder is not None
                body, features = EncoderExtractor(spec.encoder), ENCODERS[spec.encoder.name].features
            case "amalgam":  # the stored name, see records.card.MERGED
                body, features = _merged(spec)
        return Classifier(spec, body, features)


@torch.no_grad()
def multiply_adds(network: nn.Module, shape: Sequence[int]) -> int:
    """Multiply-adds of all convolutions and linear layers for one image (C, *spatial)."""
    counts: list[int] = []

    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        weight = module.get_parameter("weight")
        counts.append(output[0].numel() * weight[0].numel())

    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Conv3d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        network(torch.zeros(1, *shape, device=next(network.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return sum(counts)


def fast_layout(network: Classifier) -> Classifier:
    """Store 2D weights channels-last: the same function, a fifth faster to train on a CPU."""
    if network.spec.spatial_dims == 2:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def outline(spec: NetworkSpec) -> Classifier:
    """The network without a byte for its weights, on the meta device."""
    with torch.device("meta"), WithoutValues():
        return build(spec)


def tensor_specs(spec: NetworkSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name to shape and dtype of every tensor of the network's state, without allocating one."""
    network = outline(spec)
    return {name: (tuple(t.shape), t.dtype) for name, t in network.state_dict().items()}


def check_size(spec: NetworkSpec, size: tuple[int, ...]) -> None:
    """Refuse images that the network cannot take, before anything is allocated.

    Raises:
        ConfigError: the images are too small for the network's downsampling.
    """
    network = outline(spec)
    with torch.device("meta"):
        try:
            network(torch.empty(2, spec.in_channels, *size))
        except RuntimeError:
            raise ConfigError(
                f"images of {'x'.join(map(str, size))} are too small for {spec.name}",
                remedy="Use a smaller network or a larger image size in site.yaml.",
                code="size",
            ) from None


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU.

    Raises:
        DeviceError: ``cuda`` was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("no CUDA device", remedy="Use --device cpu or --device auto.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def begin_computing(device: str, threads: int) -> torch.device:
    """The device that this process computes on from now on, on a CPU with so many threads.

    Args:
        device: as of :func:`pick_device`.
        threads: the last digits of weights depend on their number. ``OMP_NUM_THREADS``, by which clusters say
            how many cores a job has, counts before it.

    Raises:
        DeviceError: ``cuda`` was asked for and there is none.
    """
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(threads)
    return pick_device(device)

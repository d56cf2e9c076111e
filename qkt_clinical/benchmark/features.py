"""Features of a frozen encoder: of every image of a benchmark once, found again by the image's digest."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qkt_clinical.benchmark.simulate import channels_first
from qkt_clinical.common.files import new_folder
from qkt_clinical.data.prepared import Images
from qkt_clinical.datasets.medmnist_file import read_medmnist
from qkt_clinical.models.encoders import Encoder, encode
from qkt_clinical.models.networks import multiply_adds

FEATURES = "features.safetensors"
IMAGES_PER_FILE = 500
SPLITS = ("train", "val", "test")
DIGEST_BYTES = 16


def digests_of(images: Images) -> NDArray[np.uint8]:
    """(N, 16) digests of images (N, C, *spatial)."""
    found = [hashlib.blake2b(np.ascontiguousarray(i).tobytes(), digest_size=DIGEST_BYTES) for i in images]
    return np.frombuffer(b"".join(d.digest() for d in found), np.uint8).reshape(len(images), DIGEST_BYTES)


def pieces(files: Sequence[Path]) -> Iterator[str]:
    """Names of the pieces that features are computed in: ``<file>:<split>:<number>``."""
    for file in files:
        parts = read_medmnist(file)
        for split in SPLITS:
            for number in range(math.ceil(len(parts[split].labels) / IMAGES_PER_FILE)):
                yield f"{file.stem}:{split}:{number}"


def write_piece(
    folder: Path, name: str, files: Sequence[Path], encoder: Encoder, side: int, device: torch.device
) -> None:
    """Compute the features of one piece and write them into ``folder``."""
    from safetensors.torch import save_file

    stem, split, number = name.split(":")
    file = next(f for f in files if f.stem == stem)
    start = int(number) * IMAGES_PER_FILE
    images = channels_first(read_medmnist(file)[split].images)[start : start + IMAGES_PER_FILE]
    spec = encoder.spec
    shape = (spec.channels, *(side,) * spec.spatial_dims)
    tensors = {
        "features": encode(encoder, images, side, device),
        "digests": torch.from_numpy(digests_of(images).copy()),
        "multiply_adds": torch.tensor(multiply_adds(encoder.network, shape)),
    }
    with new_folder(folder / name) as passing:
        save_file(tensors, passing / FEATURES)


class FeatureBank:
    """All features of a run, on the CPU.

    Args:
        folder: of its pieces.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file

        found = [load_file(file) for file in sorted(folder.glob(f"*/{FEATURES}"))]
        self._features = torch.cat([piece["features"] for piece in found])
        digests = np.concatenate([piece["digests"].numpy() for piece in found])
        self._row = {digest.tobytes(): row for row, digest in enumerate(digests)}
        self.multiply_adds = int(found[0]["multiply_adds"])
        """Of the encoder, for one image."""

    def of(self, images: Images) -> Tensor:
        """Features (N, F), float32, of images (N, C, *spatial) of the run's files."""
        return self._features[[self._row[d.tobytes()] for d in digests_of(images)]]

"""A site's images as features of the encoder that hospitals have in common, each split once."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from qkt_clinical.catalog import Split
from qkt_clinical.common.files import digest_bytes, passing_file
from qkt_clinical.config.encoder_specs import ENCODERS
from qkt_clinical.config.params import EncoderFile
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.prepared import PreparedSite
from qkt_clinical.errors import ConfigError
from qkt_clinical.models.encoder_network import EncoderExtractor
from qkt_clinical.models.encoders import Encoder, encode, load_encoder, shared_extractor, shared_features
from qkt_clinical.models.tensor_file import read_tensors
from qkt_clinical.stages.recipe import prepared_digest

FEATURES = "features"


class SiteEncoder:
    """The shared encoder of ``params.yaml`` at one site; its weights are read when they are needed.

    Args:
        root: workspace, from which the path of the weights is taken.

    Raises:
        ConfigError: the site's images are not such as it takes (code ``encoder-input``).
    """

    def __init__(self, root: Path, file: EncoderFile, prepared: PreparedSite, device: torch.device) -> None:
        if prepared.manifest.normalisation != "unit":
            raise ConfigError(
                "an encoder takes images in [0, 1], these are standardised one by one",
                remedy="Set normalisation: unit in site.yaml, or leave shared_encoder out of params.yaml.",
                code="encoder-input",
                site=prepared.manifest.site,
            )
        self.root, self.file, self.prepared, self.device = root, file, prepared, device
        self._encoder: Encoder | None = None

    @property
    def encoder(self) -> Encoder:
        """With its weights.

        Raises:
            EncoderError: they cannot be used; see :func:`~qkt_clinical.models.encoders.load_encoder`.
        """
        if self._encoder is None:
            self._encoder = load_encoder(self.file.name, self.root / self.file.weights, self.file.digest)
        return self._encoder

    @property
    def extractor(self) -> EncoderExtractor:
        """As part of a student."""
        return shared_extractor(self.encoder, self.file.side)

    def features(self, split: Split) -> Tensor:
        """Features (N, F) of length 1 of a split's images, kept below ``.qkt`` for the next time."""
        from safetensors.torch import save_file

        images, _ = self.prepared.part(split)
        site, width = self.prepared.manifest.site, ENCODERS[self.file.name].features
        data = prepared_digest(self.prepared.manifest)
        made_of = [data, self.file.name, self.file.digest, self.file.side, self.device.type]
        key = digest_bytes(json.dumps(made_of).encode())[:16]
        path = Workspace(self.root).scratch / "encoded" / f"{site}-{split}-{key}.safetensors"
        wanted = {FEATURES: ((len(images), width), torch.float32)}
        try:
            return read_tensors(path, wanted, _unusable, what="the cache")[0][FEATURES]
        except (OSError, _Unusable):
            pass  # not there, or torn: computed once more
        found = shared_features(encode(self.encoder, images, self.file.side, self.device))
        path.parent.mkdir(parents=True, exist_ok=True)
        with passing_file(path) as passing:
            save_file({FEATURES: found.contiguous()}, passing)
        return found


class _Unusable(ConfigError):
    """A file of the cache that is none."""


def _unusable(what: str, _: str) -> _Unusable:
    return _Unusable(what, remedy="")

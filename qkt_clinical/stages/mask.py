"""Stage ``mask``: which classes a teacher knows, from its bundle alone."""

from __future__ import annotations

from pathlib import Path

from qkt_clinical.common.files import write_json
from qkt_clinical.common.seeding import derive
from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.errors import BundleError
from qkt_clinical.models.bundle import load_bundle
from qkt_clinical.models.encoders import encoders_of
from qkt_clinical.qkt.masks import compute_mask
from qkt_clinical.records.card import MASK, Mask


def mask_site(root: Path, site: str, params: Params) -> Mask:
    """Compute a teacher's mask and write ``models/teachers/<site>/mask.json``.

    It opens no image. On the CPU always, so that whoever holds the bundle gets the same mask.

    Raises:
        BundleError: the bundle is not valid, or its network gives no finite answer to noise.
    """
    folder = Workspace(root).teacher(site)
    (folder / MASK).unlink(missing_ok=True)
    bundle = load_bundle(folder, encoders_of(root, params))
    try:
        mask = compute_mask(
            bundle.network,
            bundle.card.input.shape,
            bundle.card.classes,
            threshold=params.mask.threshold,
            probes=params.mask.probes,
            seed=derive(params.seed, "mask"),
        )
    except BundleError as error:
        raise error.at(stage="mask", site=site) from None
    write_json(folder / MASK, mask.model_dump(mode="json"))
    return mask

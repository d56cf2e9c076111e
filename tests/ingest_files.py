"""Small hospitals written by the tests of ingest themselves: DICOM, NIfTI, images, npz."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import yaml
from numpy.typing import NDArray
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as Items

from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.prepared import Manifest, PreparedSite, load_prepared
from qkt_clinical.errors import FileRejected
from qkt_clinical.ingest import check_file, ingest_site

CLASSES = ("solid", "cavity", "calcified")
SITE = "alder"
LITTLE = "1.2.840.10008.1.2.1"
AXIAL = (1, 0, 0, 0, 1, 0)


def params(**changes: Any) -> Params:
    return Params.model_validate({"classes": CLASSES, "sites": [SITE], "queries": {}, **changes})


def hospital(root: Path, kind: str, **changes: Any) -> Path:
    """Write site.yaml and return the (empty) data folder."""
    config = {
        "name": SITE,
        "source": {"kind": kind, "path": "data"},
        "label": {"from": "folder"},
        "patient": {"from": "none"},
        "image": {"size": [8, 8], "channels": 1},
        **changes,
    }
    data = root / "hospitals" / SITE / "data"
    data.mkdir(parents=True, exist_ok=True)
    (data.parent / "site.yaml").write_text(yaml.safe_dump(config))
    return data


def ingest(root: Path, **changes: Any) -> tuple[Manifest, PreparedSite]:
    manifest = ingest_site(root, SITE, params(**changes))
    return manifest, load_prepared(Workspace(root).prepared(SITE))


def uid(*names: object) -> str:
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:12], 'big')}"


IDENTITY = "PLANTEDIDENTITY"
IDENTITIES = (IDENTITY, "19420317", "101112.13", "097Y", "3680043.42.42")
"""What :func:`plant_identities` writes: a name, a birthday, a time, an age, a UID."""
_PLANTED = {
    **dict.fromkeys(("PN", "LO", "SH", "ST", "LT", "UT", "UC", "UR", "CS", "AE"), IDENTITY),
    "DA": "19420317",
    "DT": "19420317101112.13",
    "TM": "101112.131415",
    "AS": "097Y",
    "UI": "1.2.826.0.1.3680043.42.42.42",
}


def plant_identities(data: Dataset) -> None:
    """Write an identity into every standard element that can hold one and is empty, and into private and
    nested ones."""
    for tag, (vr, _, _, retired, keyword) in DicomDictionary.items():
        ours = not keyword or tag >> 16 in (0x0000, 0x0002, 0x7FE0) or retired == "Retired"
        if not ours and vr in _PLANTED and keyword not in data and keyword != "SpecificCharacterSet":
            setattr(data, keyword, _PLANTED[vr])
    nested = Dataset()
    nested.PatientName, nested.PatientID, nested.PatientBirthDate = IDENTITY, IDENTITY, "19420317"
    for sequence in ("ReferencedPatientSequence", "OtherPatientIDsSequence", "RequestAttributesSequence"):
        setattr(data, sequence, Items([nested]))
    data.private_block(0x0011, IDENTITY, create=True).add_new(0x01, "LO", IDENTITY)


def dicom(pixels: NDArray[Any], *, patient: str = "P-1", syntax: str = LITTLE, **tags: Any) -> FileDataset:
    """A CT-like data set of (H, W), (H, W, 3) or (F, H, W); ``tags`` override anything, None removes."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID = meta.MediaStorageSOPClassUID
    data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = uid(pixels.tobytes(), patient, tags)
    data.SeriesInstanceUID = uid(patient, "series")
    data.PatientID, data.PatientName, data.Modality = patient, f"Doe^{patient}", "CT"
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    data.SamplesPerPixel = 3 if colour else 1
    data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        data.PlanarConfiguration = 0
    elif pixels.ndim == 3:
        data.NumberOfFrames = len(pixels)
    data.Rows, data.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
    data.BitsAllocated = data.BitsStored = 8 * pixels.dtype.itemsize
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelSpacing = [1.0, 1.0]
    data.PixelData = pixels.tobytes()
    for name, value in tags.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    return data


def save(data: FileDataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def series(
    folder: Path,
    volume: NDArray[Any],
    *,
    step: float = 2.0,
    spacing: Sequence[float] = (1.0, 1.0),
    orientation: Sequence[float] = AXIAL,
    origin: Sequence[float] = (0.0, 0.0, 0.0),
    names: Sequence[str] | None = None,
    leave_out: Sequence[int] = (),
    **tags: Any,
) -> list[Path]:
    """One file per slice of (D, H, W), placed along the slice normal."""
    row, column = np.array(orientation[:3], float), np.array(orientation[3:], float)
    normal = np.cross(row, column)
    paths = []
    for k, pixels in enumerate(volume):
        if k in leave_out:
            continue
        position = np.array(origin, float) + k * step * normal
        data = dicom(
            pixels,
            ImagePositionPatient=position.tolist(),
            ImageOrientationPatient=list(orientation),
            **{"PixelSpacing": list(spacing), "SeriesInstanceUID": uid(folder), "InstanceNumber": 1, **tags},
        )
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = uid(folder, k)
        paths.append(save(data, folder / (names[k] if names else f"{k:03d}.dcm")))
    return paths


def nifti(path: Path, voxels: NDArray[Any], affine: NDArray[Any] | Sequence[float] = (-1, -1, 1)) -> Path:
    """A NIfTI-1 file of (X, Y, Z); three numbers make a diagonal affine."""
    matrix = np.asarray(affine, dtype=float)
    matrix = np.diag([*matrix, 1.0]) if matrix.ndim == 1 else matrix
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, matrix, dtype=voxels.dtype), path)
    return path


def noise(seed: int, *shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def verdict(path: Path) -> str | None:
    """The reason code of one file, None where it is readable."""
    try:
        check_file(path, max_file_mb=10)
    except FileRejected as rejected:
        return rejected.code
    return None

"""File formats of the phantom hospitals: one function per format, deterministic to the byte.

Each takes images, class words and patient ids, and writes below ``folder`` (the later ``data/``).
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pydicom.dataset import FileDataset

MICROSCOPY = "1.2.840.10008.5.1.4.1.1.77.1.2"
CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
JPEG_2000_LOSSLESS = "1.2.840.10008.1.2.4.90"

PIXEL_UM = 0.6
"""Edge of a smear image's pixel in micrometres: a neutrophil of 13 micrometres fills two thirds of 32."""

MILLIMETRE, MICRON = 2, 3
"""NIfTI's codes for units of length."""

RGB24 = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
"""NIfTI's own RGB data type (code 128): cannot be mistaken for a time series of three."""


def uid(*names: str) -> str:
    """A DICOM UID below 2.25 (ISO/IEC 9834-8) that depends on ``names`` alone."""
    return f"2.25.{int.from_bytes(hashlib.sha256(chr(0).join(names).encode()).digest()[:16], 'big')}"


def table(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


# --- DICOM --------------------------------------------------------------------------------------


def _dicom(site: str, seed: int, patient: str, *, sop_class: str, series: str) -> FileDataset:
    """A data set with patient, study, series and equipment filled in; identities are plainly invented."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import UID

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(sop_class)
    meta.TransferSyntaxUID = UID(EXPLICIT_LITTLE)
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    number = "".join(c for c in patient if c.isdigit())
    data.SpecificCharacterSet = "ISO_IR 192"
    data.SOPClassUID = sop_class
    data.StudyInstanceUID = uid("phantom", site, str(seed), patient)
    data.SeriesInstanceUID = uid("phantom", site, str(seed), patient, series)
    data.PatientName = f"PHANTOM^{number}"
    data.PatientID = patient
    data.PatientBirthDate = f"{1930 + int(number) * 7 % 75}0101"
    data.PatientSex = "FMO"[int(number) % 3]
    data.StudyID, data.SeriesNumber = patient, 1
    data.StudyDate = data.SeriesDate = data.ContentDate = "20000101"
    data.StudyTime = data.SeriesTime = data.ContentTime = "120000"
    data.AccessionNumber = f"PHANTOM-{site.upper()[:4]}-{number[-3:]}"
    data.ReferringPhysicianName = "PHANTOM^REFERRER"
    data.InstitutionName = f"Phantom Hospital {site.capitalize()}"
    data.Manufacturer = "phantom"
    data.ManufacturerModelName = f"phantom {site}"
    data.DeviceSerialNumber = "0"
    data.SoftwareVersions = "1"
    return data


def _identify(data: FileDataset, image: str, number: int) -> None:
    """Make the data set one particular image of its series."""
    from pydicom.uid import UID

    own = UID(uid("phantom", data.SeriesInstanceUID, image))
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = own
    data.InstanceNumber = number


def _save(data: FileDataset, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def smear_dicom(
    image: NDArray[np.uint8], *, site: str, seed: int, patient: str, number: int, diagnosis: str | None
) -> FileDataset:
    """A VL Microscopic Image from (H, W, 3) uint8; ``diagnosis`` goes to AdmittingDiagnosesDescription."""
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence as Items

    data = _dicom(site, seed, patient, sop_class=MICROSCOPY, series="smear")
    _identify(data, str(number), number)
    data.Modality = "GM"
    data.ImageType = ["ORIGINAL", "PRIMARY"]
    data.SeriesDescription = "Blood smear, Pappenheim stain"
    data.AcquisitionDateTime = "20000101120000"
    data.LossyImageCompression = "00"
    data.AcquisitionContextSequence = Items([])
    data.ContainerIdentifier = f"SLIDE-{patient}"
    data.IssuerOfTheContainerIdentifierSequence = Items([])
    data.ContainerTypeCodeSequence = Items([])
    specimen = Dataset()
    specimen.SpecimenIdentifier = f"SMEAR-{patient}"
    specimen.SpecimenUID = uid("phantom", site, str(seed), patient, "specimen")
    specimen.IssuerOfTheSpecimenIdentifierSequence = Items([])
    specimen.SpecimenPreparationSequence = Items([])
    data.SpecimenDescriptionSequence = Items([specimen])
    if diagnosis is not None:
        data.AdmittingDiagnosesDescription = diagnosis
    data.PixelSpacing = [PIXEL_UM / 1000, PIXEL_UM / 1000]
    data.Rows, data.Columns, data.SamplesPerPixel = image.shape
    data.PhotometricInterpretation, data.PlanarConfiguration = "RGB", 0
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    data.PixelData = image.tobytes()
    return data


def write_dicom_by_patient(
    folder: Path,
    images: NDArray[np.uint8],
    words: Sequence[str],
    patients: Sequence[str],
    *,
    site: str,
    seed: int,
) -> None:
    """One folder per patient, one uncompressed file per image, the diagnosis in a DICOM tag."""
    for i, (image, word, patient) in enumerate(zip(images, words, patients, strict=True)):
        data = smear_dicom(image, site=site, seed=seed, patient=patient, number=i + 1, diagnosis=word)
        _save(data, folder / patient / f"{i + 1:04d}.dcm")


def write_dicom_compressed(
    folder: Path,
    images: NDArray[np.uint8],
    words: Sequence[str],
    patients: Sequence[str],
    *,
    site: str,
    seed: int,
) -> None:
    """One folder of JPEG 2000 lossless files, diagnoses in ``labels.csv``, patients in the tags."""
    rows = []
    for i, (image, word, patient) in enumerate(zip(images, words, patients, strict=True)):
        data = smear_dicom(image, site=site, seed=seed, patient=patient, number=i + 1, diagnosis=None)
        data.compress(JPEG_2000_LOSSLESS, generate_instance_uid=False)
        _save(data, folder / f"IM{i + 1:05d}.dcm")
        rows.append((f"IM{i + 1:05d}.dcm", word))
    table(folder / "labels.csv", ("file", "diagnosis"), rows)


def grid_origin(shape: tuple[int, ...], spacing: tuple[float, ...]) -> tuple[float, ...]:
    """Position (z, y, x) of the first voxel's centre in millimetres, the grid's middle being 0."""
    return tuple(round(-(n - 1) / 2 * s, 6) for n, s in zip(shape, spacing, strict=True))


def write_series(
    folder: Path,
    volume: NDArray[np.int16],
    numbers: Sequence[int],
    *,
    spacing: tuple[float, float, float],
    site: str,
    seed: int,
    patient: str,
    series: str,
) -> None:
    """One CT series, a file ``<InstanceNumber>.dcm`` per slice.

    Args:
        folder: the series' own.
        volume: (D, H, W) Hounsfield units, axes running to the patient's head, back and left.
        numbers: InstanceNumber per slice.
        spacing: millimetres between slices, rows and columns.
        site, seed, patient, series: what the identifiers derive from.
    """
    data = _dicom(site, seed, patient, sop_class=CT, series=series)
    data.Modality = "CT"
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.SeriesDescription = "Chest phantom"
    data.PatientPosition = "HFS"
    data.FrameOfReferenceUID = uid("phantom", site, str(seed), patient, series, "frame")
    data.PositionReferenceIndicator = ""
    data.KVP, data.AcquisitionNumber = 120, 1
    data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    data.PixelSpacing = [spacing[1], spacing[2]]
    data.SliceThickness = spacing[0]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    _, data.Rows, data.Columns = volume.shape
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.RescaleIntercept, data.RescaleSlope, data.RescaleType = -1024, 1, "HU"
    data.WindowCenter, data.WindowWidth = -300, 1400
    origin = grid_origin(volume.shape, spacing)
    stored = (volume.astype(np.int32) + 1024).astype("<u2")
    # One data set for all slices: building a header takes ten times as long as writing it.
    for k, number in enumerate(numbers):
        _identify(data, str(k), number)
        data.ImagePositionPatient = [origin[2], origin[1], round(origin[0] + k * spacing[0], 6)]
        data.PixelData = stored[k].tobytes()
        _save(data, folder / f"{number:03d}.dcm")


def write_ct_series(
    folder: Path,
    volumes: NDArray[np.int16],
    words: Sequence[str],
    patients: Sequence[str],
    *,
    spacing: tuple[float, float, float],
    site: str,
    seed: int,
    rng: np.random.Generator,
) -> None:
    """One folder per patient and series, one file per slice, diagnoses per series in ``series.csv``.

    In a third of the series InstanceNumber runs from head to foot, in another it follows no order at
    all: only ImagePositionPatient tells where a slice lies. File names follow InstanceNumber.
    """
    rows = []
    for i, (volume, word, patient) in enumerate(zip(volumes, words, patients, strict=True)):
        series = f"series-{i + 1:04d}"
        numbers = np.arange(len(volume)) + 1
        if i % 3 == 1:
            numbers = numbers[::-1]
        elif i % 3 == 2:
            numbers = rng.permutation(numbers)
        write_series(
            folder / patient / series,
            volume,
            numbers.tolist(),
            spacing=spacing,
            site=site,
            seed=seed,
            patient=patient,
            series=series,
        )
        rows.append((f"{patient}/{series}", word))
    table(folder / "series.csv", ("series", "diagnosis"), rows)


# --- NIfTI --------------------------------------------------------------------------------------


def nifti_bytes(
    image: NDArray[Any],
    spacing: tuple[float, float, float],
    *,
    flip: tuple[bool, bool, bool] = (False, False, False),
) -> bytes:
    """A gzipped NIfTI-1 file of ``image`` (D, H, W), axes running to head, back and left.

    ``spacing`` runs (slice, row, column), in millimetres, or micrometres for RGB24.

    NIfTI stores (i, j, k) = (column, row, slice). ``flip`` (column, row, slice) reverses a stored axis
    and its sign in the affine together, so that the image in space stays the same.
    """
    import nibabel

    data = image.transpose(2, 1, 0)
    # NIfTI's world runs to the right, front and head; ours to the left, back and head.
    step = np.array([-spacing[2], -spacing[1], spacing[0]])
    origin = np.array(grid_origin(image.shape, spacing))[::-1] * [-1.0, -1.0, 1.0]
    for axis, flipped in enumerate(flip):
        if flipped:
            data = np.flip(data, axis)
            origin[axis] += step[axis] * (data.shape[axis] - 1)
            step[axis] *= -1
    affine = np.diag([*step, 1.0])
    affine[:3, 3] = origin
    file = nibabel.Nifti1Image(  # type: ignore[no-untyped-call]
        np.ascontiguousarray(data), affine, dtype=image.dtype
    )
    file.header["xyzt_units"] = MICRON if image.dtype == RGB24 else MILLIMETRE
    return gzip.compress(file.to_bytes(), compresslevel=6, mtime=0)


def write_nifti(
    folder: Path,
    images: NDArray[Any],
    words: Sequence[str],
    patients: Sequence[str],
    *,
    spacing: tuple[float, float, float],
    flip: tuple[bool, bool, bool],
    names: str,
    listing: str,
    key: str,
    by_class: bool = False,
) -> None:
    """One ``.nii.gz`` per image and a CSV file.

    Args:
        images: (N, D, H, W) int16, or (N, H, W, 3) uint8 written as RGB24 of one slice.
        names: file name relative to ``folder``, with ``{i}`` for the image's number.
        listing: name of the CSV file; columns ``key``, diagnosis and patient.
        key: heading of the column with the file; ``name`` holds the name without extensions, any
            other heading the path relative to ``folder``.
        by_class: put files in one folder per class, and leave the diagnosis out of the CSV file.
    """
    rows = []
    for i, (image, word, patient) in enumerate(zip(images, words, patients, strict=True)):
        if image.dtype == np.uint8:
            image = np.ascontiguousarray(image).view(RGB24)[..., 0][None]
        name = (f"{word}/" if by_class else "") + names.format(i=i + 1)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(nifti_bytes(image, spacing, flip=flip))
        entry = path.name.removesuffix(".nii.gz") if key == "name" else name
        rows.append((entry, patient) if by_class else (entry, word, patient))
    table(folder / listing, (key, "patient") if by_class else (key, "diagnosis", "patient"), rows)


# --- plain images and npz -----------------------------------------------------------------------


def write_class_folders(
    folder: Path, images: NDArray[np.uint8], words: Sequence[str], patients: Sequence[str]
) -> None:
    """``<class word>/<number>.png`` and ``patients.csv`` (file, patient)."""
    from PIL import Image

    rows = []
    for i, (image, word, patient) in enumerate(zip(images, words, patients, strict=True)):
        name = f"{word}/{i + 1:04d}.png"
        (folder / word).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name, compress_level=6)
        rows.append((name, patient))
    table(folder / "patients.csv", ("file", "patient"), rows)


def write_npz(
    folder: Path,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    patients: Sequence[str],
    *,
    rng: np.random.Generator,
    shares: tuple[float, float] = (0.7, 0.8),
) -> None:
    """MedMNIST's layout plus ``*_groups``; 70 % of the patients train, 10 % validate, 20 % test.

    ``shares`` are where val and test begin.
    """
    groups = np.array(patients, dtype=np.str_)
    everyone = rng.permutation(np.unique(groups))
    cuts = [round(share * len(everyone)) for share in shares]
    arrays: dict[str, NDArray[Any]] = {}
    for name, members in zip(("train", "val", "test"), np.split(everyone, cuts), strict=True):
        chosen = np.flatnonzero(np.isin(groups, members))
        arrays[f"{name}_images"] = images[chosen]
        arrays[f"{name}_labels"] = labels[chosen, None].astype(np.uint8)
        arrays[f"{name}_groups"] = groups[chosen]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "images.npz").write_bytes(buffer.getvalue())

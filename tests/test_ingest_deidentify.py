from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset

from qkt_clinical.ingest.deidentify import (
    KEPT,
    coarsened_age,
    coarsened_date,
    may_show_face,
    remap_uid,
    suspects_text,
)
from qkt_clinical.ingest.deidentify import deidentify as to_json
from tests.ingest_files import IDENTITIES, dicom, plant_identities

SALT = b"0123456789abcdef0123456789abcdef"
PIXELS = np.zeros((4, 4), dtype=np.uint8)


def deidentify(data: Dataset, salt: bytes) -> Dataset:
    """What is kept, as a data set."""
    return Dataset.from_json(to_json(data, salt))


def written(data: Dataset) -> bytes:
    stream = io.BytesIO()
    data.save_as(stream, implicit_vr=False, little_endian=True)
    return stream.getvalue()


def test_of_a_header_full_of_identities_none_is_left() -> None:
    data = Dataset()
    plant_identities(data)
    assert len(data) > 1500
    kept = deidentify(data, SALT)
    content = written(kept) + repr(kept.to_json_dict()).encode()
    for secret in IDENTITIES:
        assert secret.encode() not in content
    assert kept.PatientAge == "090Y"
    assert kept.StudyDate == "19420101"
    assert not any(element.tag.is_private for element in kept.iterall())
    assert set(kept.dir()) <= {
        *KEPT,
        "PatientIdentityRemoved",
        "LongitudinalTemporalInformationModified",
        "DeidentificationMethod",
        "DeidentificationMethodCodeSequence",
    }


def test_what_was_done_is_recorded_as_the_standard_asks() -> None:
    kept = deidentify(dicom(PIXELS), SALT)
    assert kept.PatientIdentityRemoved == "YES"
    assert kept.LongitudinalTemporalInformationModified == "MODIFIED"
    codes = [(c.CodeValue, c.CodingSchemeDesignator) for c in kept.DeidentificationMethodCodeSequence]
    assert codes == [("113100", "DCM"), ("113107", "DCM"), ("113108", "DCM")]
    assert "PixelData" not in kept
    assert dcmread(io.BytesIO(written(kept)), force=True) == kept


def test_what_is_known_to_be_harmless_stays() -> None:
    data = dicom(PIXELS, SliceThickness=1.25, BodyPartExamined="CHEST", ImageType=["ORIGINAL", "AXIAL"])
    data.PatientSex, data.PatientWeight, data.ImagePositionPatient = "F", 61.5, [1.0, -2.0, 3.5]
    kept = deidentify(data, SALT)
    assert (kept.Modality, kept.PatientSex, kept.BodyPartExamined) == ("CT", "F", "CHEST")
    assert (kept.SliceThickness, kept.PatientWeight) == (1.25, 61.5)
    assert list(kept.ImagePositionPatient) == [1.0, -2.0, 3.5]
    assert list(kept.ImageType) == ["ORIGINAL", "AXIAL"]
    assert "PatientName" not in kept
    assert data.PatientName == "Doe^P-1", "the file's own header is left as it is"


def test_a_name_in_a_coded_element_goes() -> None:
    data = dicom(PIXELS, BodyPartExamined="DOE JANE", ImageType=["ORIGINAL", "DOE"])
    data.PatientSex, data.Modality = "DOE", "DOE"
    kept = deidentify(data, SALT)
    assert not {"BodyPartExamined", "ImageType", "PatientSex", "Modality"} & set(kept.dir())


def test_a_value_that_cannot_be_read_goes() -> None:
    stream = io.BytesIO()
    data = dicom(PIXELS, SliceThickness=2.0)
    data.save_as(stream, enforce_file_format=True)
    broken = stream.getvalue().replace(b"DS\x04\x002.0 ", b"DS\x04\x00Doe ")
    assert broken != stream.getvalue()
    assert "SliceThickness" not in deidentify(dcmread(io.BytesIO(broken)), SALT)


def test_uids_are_remapped_alike_within_a_site_and_not_across_sites() -> None:
    one, other = dicom(PIXELS), dicom(PIXELS, InstanceNumber=2)
    first, second = deidentify(one, SALT), deidentify(other, SALT)
    assert first.SeriesInstanceUID == second.SeriesInstanceUID != one.SeriesInstanceUID
    assert first.SOPInstanceUID != second.SOPInstanceUID
    assert first.SeriesInstanceUID != deidentify(one, SALT[::-1]).SeriesInstanceUID
    assert first.SOPClassUID == one.SOPClassUID, "a UID of the standard names no object"


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=6))
def test_a_remapped_uid_is_a_uid(parts: list[int]) -> None:
    new = remap_uid(".".join(map(str, (1, 3, *parts))), SALT)
    assert new.startswith("2.25.")
    assert len(new) <= 64
    assert new[5:].isdigit()
    assert new[5:] == str(int(new[5:]))


@pytest.mark.parametrize(
    ("age", "kept"),
    [
        ("042Y", "042Y"),
        ("089Y", "089Y"),
        ("090Y", "090Y"),
        ("103Y", "090Y"),
        ("018M", "001Y"),
        ("003D", "000Y"),
        ("052W", "000Y"),
        ("Doe", None),
    ],
)
def test_ages(age: str, kept: str | None) -> None:
    assert coarsened_age(age) == kept


@pytest.mark.parametrize(("date", "kept"), [("20240229", "20240101"), ("Doe", None), ("2024", None)])
def test_dates(date: str, kept: str | None) -> None:
    assert coarsened_date(date) == kept


@pytest.mark.parametrize(
    ("tags", "suspected"),
    [
        ({}, False),
        ({"Modality": "US"}, True),
        ({"Modality": "US", "BurnedInAnnotation": "NO"}, False),
        ({"BurnedInAnnotation": "YES"}, True),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, True),
        ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, True),
        ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL"]}, False),
    ],
)
def test_text_in_the_pixels_is_suspected_by_rules(tags: dict[str, Any], suspected: bool) -> None:
    assert suspects_text(dicom(PIXELS, **tags)) == suspected


@pytest.mark.parametrize(
    ("modality", "part", "face"), [("CT", "HEAD", True), ("MR", "BRAIN", True), ("CT", "CHEST", False)]
)
def test_a_head_may_show_a_face(modality: str, part: str, face: bool) -> None:
    assert may_show_face(dicom(PIXELS, Modality=modality, BodyPartExamined=part)) == face
    assert not may_show_face(dicom(PIXELS, Modality="XC", BodyPartExamined=part))

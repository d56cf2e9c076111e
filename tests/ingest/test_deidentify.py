from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag

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
WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
SLIDE = {"Modality": "SM", "SOPClassUID": WHOLE_SLIDE}


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


MADE_UP = [
    "1.2.840.10008.19420317.4711",
    "1.2.840.10008.5.1.4.1.1.4.20240115.101112.4711",
    "1.2.840.10008.1.2.0",
    "1.2.840.10008",
    "1.2.840.113619.2.55.19420317",
    "2.25.19420317",
]


@pytest.mark.parametrize("made_up", MADE_UP)
@pytest.mark.parametrize("keyword", [name for name in KEPT if name.endswith("UID")])
def test_only_uids_that_the_standard_lists_stay(keyword: str, made_up: str) -> None:
    data = dicom(PIXELS)
    data.add_new(keyword, "UI", made_up)
    assert f"'{made_up}'" not in repr(to_json(data, SALT))
    assert getattr(deidentify(data, SALT), keyword) == remap_uid(made_up, SALT) != made_up
    for listed in ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.4.1.1"):
        data.add_new(keyword, "UI", listed)
        assert getattr(deidentify(data, SALT), keyword) == listed


NUMBERS = [name for name in KEPT if dictionary_VR(name) in ("DS", "IS", "FD", "FL")]


@pytest.mark.parametrize("text", ["NaN", "nan", "inf", "-Infinity", "1e999", "19420317", "1.5\\NaN"])
@pytest.mark.parametrize("keyword", NUMBERS)
def test_a_number_that_is_none_or_may_be_a_date_goes(keyword: str, text: str) -> None:
    data = dicom(PIXELS)
    tag = Tag(keyword)
    data[tag] = RawDataElement(tag, "DS", len(text), text.encode(), 0, False, True)
    kept = json.loads(json.dumps(to_json(data, SALT), allow_nan=False))
    assert f"{int(tag):08X}" not in kept
    assert "19420317" not in repr(kept)


@pytest.mark.parametrize(
    ("keyword", "value"), [("PatientWeight", 4711), ("PatientSize", 1942), ("PatientSize", -1)]
)
def test_a_number_that_cannot_be_true_goes(keyword: str, value: float) -> None:
    assert keyword not in deidentify(dicom(PIXELS, **{keyword: value}), SALT)


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
        ({"ImageType": ["DERIVED", "SECONDARY", "DOSE_INFO"]}, True),
        ({"ImageType": ["ORIGINAL", "SECONDARY", "AXIAL", "DOSE_INFO"]}, True),
        ({"ImageType": ["DERIVED", "SECONDARY", "OTHER", "CT_SOM5 PROT"]}, True),
        ({"ImageType": ["DERIVED", "SECONDARY", "Screen Capture"]}, True),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, False),
        ({"SeriesDescription": "Dose Report"}, True),
        ({"SeriesDescription": "Patient Protocol"}, True),
        ({"SeriesDescription": "low dose thorax"}, False),
        ({"Modality": "MR", "ImageType": ["ORIGINAL", "PRIMARY", "ASL", "LABEL"]}, False),
        ({"Modality": "GM", "ImageType": ["ORIGINAL", "PRIMARY", "LABEL"]}, True),
        ({"Modality": "OT"}, True),
        ({"Modality": "HC"}, True),
        ({"ConversionType": "SD"}, True),
        ({"ConversionType": "DF"}, True),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.1"}, True),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.77.1.4"}, True),
        ({**SLIDE, "ImageType": ["ORIGINAL", "PRIMARY", "LABEL", "NONE"]}, True),
        ({**SLIDE, "ImageType": ["ORIGINAL", "PRIMARY", "label", "NONE"], "BurnedInAnnotation": "NO"}, True),
        ({**SLIDE, "ImageType": ["ORIGINAL", "PRIMARY", "OVERVIEW", "NONE"]}, True),
        ({**SLIDE, "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER", "RESAMPLED"]}, True),
        ({**SLIDE, "ImageType": ["DERIVED", "PRIMARY", "OVERVIEW"], "BurnedInAnnotation": "NO"}, False),
        ({**SLIDE, "ImageType": ["DERIVED", "PRIMARY", "VOLUME", "NONE"]}, False),
        ({**SLIDE, "SpecimenLabelInImage": "YES"}, True),
        ({"SOPClassUID": WHOLE_SLIDE, "ImageType": ["ORIGINAL", "PRIMARY", "LABEL"]}, True),
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

"""What of a DICOM header may be kept: an allow-list of elements and of their values.

After the Basic Application Level Confidentiality Profile of DICOM PS3.15 Annex E, with the options *Retain
Longitudinal Temporal Information with Modified Dates* (of a date the year is left) and *Retain Patient
Characteristics* (sex, age, size and weight). The profile lists what to remove; here what is not named is
removed: private elements, all sequences, every element of free text. Of coded elements only values of the
standard's own lists are kept, so that a name typed into one of them goes too.

Nothing here makes an image anonymous. Pixels may show a name (:func:`suspects_text`) or a face
(:func:`may_show_face`), and rare findings identify by themselves.
"""

from __future__ import annotations

import hmac
import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from qkt_clinical.ingest.codes import DAMAGE
from qkt_clinical.ingest.readers.elements import tag_of, values, word

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

METHOD = "qkt-clinical allow-list after PS3.15 Annex E"
CODES: tuple[tuple[str, str], ...] = (
    ("113100", "Basic Application Confidentiality Profile"),
    ("113107", "Retain Longitudinal Temporal Information Modified Dates Option"),
    ("113108", "Retain Patient Characteristics Option"),
)
"""De-identification Method Code Sequence (CID 7050), scheme DCM."""
OLDEST = 89
"""Years; who is older becomes 90, as the HIPAA Safe Harbor has it."""

LARGEST = 1e7
"""Numbers from here on may be a birthday written as one (19420317) or the number of a record; they go."""


def _terms(text: str) -> frozenset[str]:
    return frozenset(text.split())


MODALITIES = _terms(
    """
    AR AS AU BDUS BI BMD CFM CR CT CTPROTOCOL DG DMS DOC DX ECG EEG EMG EOG EPS ES FID GM HC HD IO
    IOL IVOCT IVUS KER KO LEN LS M3D MG MR NM OAM OCT OP OPM OPT OPTBSV OPTENF OPV OSS OT PA PLAN
    POS PR PT PX REG RESP RF RG RTDOSE RTIMAGE RTINTENT RTPLAN RTRAD RTRECORD RTSEGANN RTSTRUCT RWV
    SEG SM SMR SR SRF STAIN TEXTUREMAP TG US VA XA XAPROTOCOL XC
    """
)
BODY_PARTS = _terms(
    """
    ABDOMEN ABDOMENPELVIS ADRENAL ANKLE ANUS AORTA APPENDIX ARM AXILLA BACK BILEDUCT BLADDER
    BRACHIALPLEXUS BRAIN BREAST BRONCHUS BUTTOCK CALCANEUS CALF CAROTID CEREBELLUM CERVIX CHEEK
    CHEST CHESTABDOMEN CHESTABDPELVIS CIRCLEOFWILLIS CLAVICLE COCCYX COLON CORNEA CORONARYARTERY
    CSPINE CTSPINE DUODENUM EAR ELBOW ESOPHAGUS EXTREMITY EYE EYELID FACE FEMUR FINGER FOOT FOREARM
    GALLBLADDER HAND HEAD HEADNECK HEART HIP HUMERUS ILEUM ILIUM IAC JAW JEJUNUM KIDNEY KNEE LARYNX
    LEG LIVER LSPINE LSSPINE LUNG MANDIBLE MAXILLA MEDIASTINUM MOUTH NECK NECKCHEST NECKCHESTABDOMEN
    NECKCHESTABDPELV NOSE ORBIT OVARY PANCREAS PAROTID PATELLA PELVIS PENIS PHARYNX PROSTATE RADIUS
    RECTUM RIB SACRUM SCALP SCAPULA SCLERA SCROTUM SHOULDER SINUS SKULL SPINE SPLEEN SSPINE STERNUM
    STOMACH SUBMANDIBULAR TESTIS THIGH THYMUS THYROID TIBIA TLSPINE TMJ TOE TONGUE TRACHEA TSPINE
    ULNA URETER URETHRA UTERUS VAGINA VULVA WHOLEBODY WRIST ZYGOMA
    """
)
IMAGE_TYPES = _terms(
    """
    ORIGINAL DERIVED PRIMARY SECONDARY AXIAL LOCALIZER MPR MIP MINIP VOLUME PROJECTION_IMAGE
    REFORMATTED M P R I FFE SE M_FFE M_SE NORM DIS2D DIS3D OTHER MIXED NONE
    """
)
PHOTOMETRIC = _terms("MONOCHROME1 MONOCHROME2 RGB YBR_FULL YBR_FULL_422 YBR_ICT YBR_RCT") | {"PALETTE COLOR"}

Rule = Callable[[Any, bytes], Any]
"""Value and salt to what is kept of it; None: nothing."""

_UID = re.compile(r"[0-9.]{1,64}")


def salted(salt: bytes, *words: str) -> str:
    """First 16 hexadecimal digits of HMAC-SHA256(salt, words)."""
    text = "\0".join(words).encode("utf-8", "surrogateescape")
    return hmac.digest(salt, text, "sha256").hex()[:16]


def remap_uid(value: str, salt: bytes) -> str:
    """A UID of the site's own making: the same for the same UID and salt, useless without the salt.

    UIDs that the standard lists name no object and stay. A root is no sign of one: devices make UIDs below
    the standard's own, with dates and numbers of patients in them.
    """
    from pydicom.uid import UID

    if UID(value).type:  # of PS3.6 Annex A
        return value
    digest = hmac.digest(salt, b"uid\0" + value.encode("utf-8", "surrogateescape"), "sha256")
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"


def coarsened_date(value: str) -> str | None:
    """``YYYYMMDD`` to the first day of its year; None if it is no date."""
    return f"{value[:4]}0101" if re.fullmatch(r"(1[89]|20)\d{6}", value) else None


def coarsened_age(value: str) -> str | None:
    """``nnnD``, ``nnnW``, ``nnnM`` or ``nnnY`` in whole years, 90 for all that are older; None if no age."""
    if not re.fullmatch(r"\d{3}[DWMY]", value):
        return None
    per_year = {"D": 365.25, "W": 52.18, "M": 12, "Y": 1}[value[3]]
    years = int(int(value[:3]) / per_year)
    return f"{years if years <= OLDEST else OLDEST + 1:03d}Y"


def _uid(value: Any, salt: bytes) -> str | None:
    text = str(value)
    return remap_uid(text, salt) if _UID.fullmatch(text) else None


def _date(value: Any, _: bytes) -> str | None:
    return coarsened_date(str(value))


def _age(value: Any, _: bytes) -> str | None:
    return coarsened_age(str(value))


def _number(value: Any, _: bytes) -> float | int | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not math.isfinite(value) or abs(value) >= LARGEST:
        return None
    return int(value) if isinstance(value, int) else float(value)


def _up_to(largest: float) -> Rule:
    """A number that can be what it says: a birthday or a record's number in its place goes."""

    def rule(value: Any, salt: bytes) -> float | int | None:
        number = _number(value, salt)
        return number if number is not None and 0 <= number <= largest else None

    return rule


def _among(allowed: frozenset[str]) -> Rule:
    def rule(value: Any, _: bytes) -> str | None:
        return str(value) if str(value) in allowed else None

    return rule


_YES_NO = _among(frozenset({"YES", "NO"}))
_LATERALITY = _among(frozenset({"L", "R", "B", "U"}))

KEPT: Mapping[str, Rule] = MappingProxyType(
    {
        # what kind of object, and which study, series and image belong together
        "SOPClassUID": _uid,
        "SOPInstanceUID": _uid,
        "StudyInstanceUID": _uid,
        "SeriesInstanceUID": _uid,
        "FrameOfReferenceUID": _uid,
        "ImageType": _among(IMAGE_TYPES),
        "Modality": _among(MODALITIES),
        "BurnedInAnnotation": _YES_NO,
        "RecognizableVisualFeatures": _YES_NO,
        "LossyImageCompression": _among(frozenset({"00", "01"})),
        # when, by the year
        "StudyDate": _date,
        "SeriesDate": _date,
        "AcquisitionDate": _date,
        "ContentDate": _date,
        # the patient's characteristics
        "PatientSex": _among(frozenset({"M", "F", "O"})),
        "PatientAge": _age,
        "PatientSize": _up_to(3.0),
        "PatientWeight": _up_to(1000.0),
        # what was looked at
        "BodyPartExamined": _among(BODY_PARTS),
        "Laterality": _LATERALITY,
        "ImageLaterality": _LATERALITY,
        "PatientPosition": _among(
            _terms("HFP HFS HFDR HFDL FFDR FFDL FFP FFS LFP LFS RFP RFS AFDR AFDL PFDR PFDL")
        ),
        "ViewPosition": _among(_terms("AP PA LL RL RLD LLD RLO LLO CC MLO ML LM LMO XCC XCCL XCCM")),
        # how
        "KVP": _number,
        "ExposureTime": _number,
        "XRayTubeCurrent": _number,
        "SliceThickness": _number,
        "SpacingBetweenSlices": _number,
        "GantryDetectorTilt": _number,
        "RepetitionTime": _number,
        "EchoTime": _number,
        "InversionTime": _number,
        "FlipAngle": _number,
        "MagneticFieldStrength": _number,
        # the picture
        "InstanceNumber": _number,
        "ImagePositionPatient": _number,
        "ImageOrientationPatient": _number,
        "PixelSpacing": _number,
        "ImagerPixelSpacing": _number,
        "NumberOfFrames": _number,
        "SamplesPerPixel": _number,
        "PhotometricInterpretation": _among(PHOTOMETRIC),
        "Rows": _number,
        "Columns": _number,
        "BitsAllocated": _number,
        "BitsStored": _number,
        "HighBit": _number,
        "PixelRepresentation": _number,
        "WindowCenter": _number,
        "WindowWidth": _number,
        "RescaleSlope": _number,
        "RescaleIntercept": _number,
    }
)
"""DICOM keyword to what is kept of each of its values; all else is left out."""


@cache
def _kept() -> Mapping[int, tuple[str, str, str]]:
    """Tags of :data:`KEPT` to their keywords, eight digits and value representations."""
    tags = {tag_of(keyword): keyword for keyword in KEPT}
    return {tag: (keyword, f"{int(tag):08X}", vr) for (tag, vr), keyword in tags.items()}


def deidentify(data: Dataset, salt: bytes) -> dict[str, Any]:
    """What may be kept of a header, in the DICOM JSON model (PS3.18 Annex F), marked as PS3.15 asks.

    Args:
        data: as read; left as it is. Pixels are not taken over.
        salt: the site's secret, see :func:`qkt_clinical.ingest.stage.read_salt`.

    Returns:
        Allow-listed elements, UIDs remapped, dates and ages coarsened; PatientIdentityRemoved, and how.
        An element of which one value is not allowed is left out whole.
    """
    kept: dict[str, Any] = {}
    by_tag = _kept()
    for tag in by_tag.keys() & data.keys():
        keyword, digits, vr = by_tag[tag]
        try:
            found = [KEPT[keyword](value, salt) for value in values(data, keyword)]
        except DAMAGE:
            continue
        if found and all(v is not None for v in found):
            kept[digits] = {"vr": vr, "Value": found}
    kept["00120062"] = {"vr": "CS", "Value": ["YES"]}  # Patient Identity Removed
    kept["00120063"] = {"vr": "LO", "Value": [METHOD]}  # De-identification Method
    kept["00120064"] = {"vr": "SQ", "Value": [_code(*code) for code in CODES]}  # and its codes
    kept["00280303"] = {"vr": "CS", "Value": ["MODIFIED"]}  # Longitudinal Temporal Information Modified
    return kept


def _code(value: str, meaning: str) -> dict[str, Any]:
    return {
        "00080100": {"vr": "SH", "Value": [value]},
        "00080102": {"vr": "SH", "Value": ["DCM"]},
        "00080104": {"vr": "LO", "Value": [meaning]},
    }


# --- what a header cannot take away -----------------------------------------------------------------

_STORAGE = "1.2.840.10008.5.1.4.1.1."
_WRITTEN = frozenset(
    {
        *(f"{_STORAGE}7{rest}" for rest in ("", ".1", ".2", ".3", ".4")),  # secondary capture
        *(f"{_STORAGE}{number}" for number in ("3", "3.1", "6", "6.1", "6.2")),  # ultrasound
        *(f"{_STORAGE}77.1.{number}" for number in ("1", "1.1", "4", "4.1")),  # endoscopy, photographs
        *(f"1.2.840.10008.5.1.1.{number}" for number in ("29", "30")),  # prints
    }
)
"""Kinds of objects that often show writing."""
_WRITES_ON_IMAGES = _terms("US IVUS BDUS SC ES XC DOC OT SR ECG HC RG")
"""Modalities whose devices often write names and dates into the picture, or that are pictures of writing."""
_SLIDES = frozenset(f"{_STORAGE}77.1.{number}" for number in ("2", "3", "6"))
_SHOWS_LABEL = _terms("LABEL OVERVIEW LOCALIZER")
"""Of a slide: its label, the slide with its label, and the older word for the latter."""
_SCREENS = re.compile(
    r"SCREEN|REPORT|CAPTURE|SNAP.?SHOT|PASTED|HARD.?COPY|\bPRINT|DOSE.?(INFO|SUMMARY|SHEET)|\bPROT(OCOL)?\b"
)
_REPORTS = re.compile(
    r"SCREEN.?(SAVE|SHOT|CAPTURE|DUMP)|DOSE.?(REPORT|INFO|SUMMARY|SHEET)|PATIENT.?PROTOCOL|SCANNED.?DOC"
)
_CONVERTED = _terms("DV DF SD SI DRW")
"""Conversion types of video, film, paper and drawings."""
_HEADS = _terms("HEAD BRAIN SKULL FACE HEADNECK ORBIT SINUS JAW MAXILLA MANDIBLE IAC EAR NOSE")


def suspects_text(data: Dataset) -> bool:
    """Whether writing may be burned into the pixels, by what the header says.

    A slide's label is writing, whatever its header says: converters write ``BurnedInAnnotation`` without
    looking. Else that decides where it is set. Without it suspect are secondary captures, prints and scans,
    modalities whose devices write on the picture, pictures of slides that show the label, and image types or
    series of screens and reports.
    """
    types = tuple(str(value).strip(" \0").upper() for value in values(data, "ImageType"))
    slide = word(data, "Modality") == "SM" or word(data, "SOPClassUID") in _SLIDES
    said = word(data, "BurnedInAnnotation")
    label = "LABEL" in types and word(data, "Modality") != "MR"  # there: blood that was labelled
    if slide and label:
        return True
    if said in ("YES", "NO"):
        return said == "YES"
    return (
        label
        or _of_a_kind_with_writing(data)
        or (slide and not _SHOWS_LABEL.isdisjoint(types))
        or word(data, "SpecimenLabelInImage") == "YES"
        or _SCREENS.search(" ".join(types)) is not None
        or _REPORTS.search(_description(data)) is not None
    )


def _description(data: Dataset) -> str:
    """What the series is called, in capitals; ASCII is all that is looked for, whatever its character set."""
    item: Any = data.get_item(tag_of("SeriesDescription")[0])
    raw = "" if item is None else item.value
    return (raw.decode("latin-1") if isinstance(raw, bytes) else str(raw)).upper()


def _of_a_kind_with_writing(data: Dataset) -> bool:
    return (
        word(data, "SOPClassUID") in _WRITTEN
        or word(data, "Modality") in _WRITES_ON_IMAGES
        or word(data, "ConversionType") in _CONVERTED
    )


def may_show_face(data: Dataset) -> bool:
    """Whether a face could be rendered from it: CT, MR or PET of the head."""
    return word(data, "Modality") in ("CT", "MR", "PT") and word(data, "BodyPartExamined") in _HEADS

"""Why a file is rejected: stable reason codes with their meaning and remedy, for reports and docs.

Codes are an interface: scripts and reports compare them. They are added, never renamed. No message
holds anything read from a file, since tag values and names may be patient data.
"""

from __future__ import annotations

import logging
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import NamedTuple

from qkt_clinical.errors import FileRejected


class Reason(NamedTuple):
    """What a code means and what to do about it."""

    meaning: str
    remedy: str


REASONS: Mapping[str, Reason] = MappingProxyType(
    {
        # the file itself
        "unreadable": Reason("the file cannot be opened", "Check permissions, links and the disk."),
        "not-a-file": Reason("a pipe, socket or device, not a file", "Take it out of the source folder."),
        "outside-source": Reason(
            "a link leads out of the source folder",
            "Copy the file into the source folder, or link data/ itself.",
        ),
        "path-too-long": Reason(
            "its path is longer than the system can open",
            "Move it up, or give the folders above it shorter names.",
        ),
        "empty": Reason("the file has no bytes", "Export it again."),
        "too-large": Reason(
            "stored or declared size exceeds ingest.max_file_mb",
            "Raise ingest.max_file_mb if the file is sound.",
        ),
        "other-kind": Reason(
            "not a file of the kind that site.yaml names", "Move it elsewhere or correct source.kind."
        ),
        "side-file": Reason("a table, text or index beside the images", "Nothing to do: it holds no image."),
        "duplicate": Reason("the same pixels as an accepted image", "Nothing to do: one copy was kept."),
        "duplicate-conflict": Reason(
            "the same pixels under two labels", "Find out which label is right and remove the other copy."
        ),
        # labels and patients
        "label-missing": Reason("no label", "Add it to the label column, folder or tag."),
        "label-unknown": Reason(
            "the label is no class of the federation", "Add the word to label_map, or leave the file out."
        ),
        "label-ambiguous": Reason(
            "the row of the label table fits another file too",
            "List every file of that name by its path, relative to the source folder.",
        ),
        "label-conflict": Reason(
            "two labels for one image", "Leave one row or one value per image or series."
        ),
        "patient-missing": Reason("no patient id", "Add it: without it patients cannot be kept apart."),
        "patient-ambiguous": Reason(
            "the row of the patient table fits another file too",
            "List every file of that name by its path, relative to the source folder.",
        ),
        "patient-conflict": Reason("two patient ids for one image", "Leave one patient per image or series."),
        "held-back-patient": Reason(
            "a held-back image of a patient who has other images at this hospital",
            "Put all images of a patient into the held-back folder, or none.",
        ),
        # any image
        "dimensions": Reason(
            "flat image where volumes are wanted, or the reverse",
            "Correct image.size, or leave the file out.",
        ),
        "multi-frame": Reason("several frames without a place in space", "Split it into single images."),
        "spacing-missing": Reason(
            "no pixel spacing, but image.spacing_mm is set",
            "Set image.spacing_mm to null, or add the spacing.",
        ),
        "no-finite-values": Reason("every value is NaN or infinite", "Export it again."),
        "contrast-lost": Reason(
            "an image became one even grey on the way to what site.yaml asks for",
            "Correct image.window, or the window in the file; small findings need a larger image.size.",
        ),
        "colour-unknown": Reason(
            "a colour space that cannot be turned into RGB", "Export it as RGB or greyscale."
        ),
        "resampled-too-large": Reason(
            "at image.spacing_mm the image would have far too many pixels, or none",
            "Check its pixel spacing and image.spacing_mm in site.yaml.",
        ),
        "header-unreadable": Reason("the header is damaged", "Export it again."),
        "truncated": Reason("the file ends before its pixels do", "Copy or export it again."),
        "pixels-undecodable": Reason("the pixels cannot be decoded", "Export it again, best uncompressed."),
        "decoder-crashed": Reason(
            "the decoder ended its process, by a defect or for want of memory",
            "Export it again, best uncompressed; if it is sound, use fewer --workers.",
        ),
        "geometry-invalid": Reason("position, orientation or spacing make no sense", "Export it again."),
        # DICOM
        "not-dicom": Reason("no DICOM Part 10 file", "Unpack it, or export it with its file header."),
        "no-pixel-data": Reason("a DICOM object without pixels", "Leave it out."),
        "non-image-object": Reason(
            "an object that describes other images (segmentation, index, matrix)", "Leave it out."
        ),
        "transfer-syntax-missing": Reason("the file header names no transfer syntax", "Export it again."),
        "transfer-syntax-unsupported": Reason(
            "a compression without a decoder here", "Export it uncompressed."
        ),
        "burned-in-suspected": Reason(
            "writing may be burned into the pixels, by what the header says",
            "Look at the images; if none shows a name, set burned_in: accept in site.yaml.",
        ),
        "mosaic": Reason(
            "many slices as tiles of one picture (Siemens mosaic)",
            "Convert it to NIfTI or to single slices, with dcm2niix for one.",
        ),
        "localiser": Reason(
            "a scout from which a scan was planned, no part of a volume", "Nothing to do: leave it out."
        ),
        "geometry-missing": Reason(
            "no series, position, orientation or spacing",
            "Export it with its place in space (DICOM: ImagePositionPatient; NIfTI: qform or sform).",
        ),
        "orientation-mixed": Reason(
            "slices of different orientation in one series", "Export localisers apart."
        ),
        "sizes-mixed": Reason("slices of different size or kind in one series", "Export the series again."),
        "slice-missing": Reason("a slice is missing in the series", "Export the whole series."),
        "slice-duplicate": Reason("two different slices at one position", "Export phases or echoes apart."),
        "spacing-uneven": Reason("slices are unevenly spaced", "Reconstruct the series with even spacing."),
        "slices-shifted": Reason("slices are shifted (gantry tilt)", "Reconstruct the series without tilt."),
        "too-few-slices": Reason("a series of one slice is no volume", "Export the whole series."),
        "series-incomplete": Reason("another file of the series was rejected", "See that file's reason."),
        # NIfTI
        "not-nifti": Reason("no NIfTI file", "Convert it to NIfTI."),
        "pair-missing": Reason("a NIfTI header without its .img", "Add the .img file beside it."),
        "affine-conflict": Reason(
            "qform and sform differ in the sides or the spacing that they give",
            "Find out which is right and set the code of the other to 0.",
        ),
        "time-series": Reason(
            "several volumes over time in one file", "Split it into single volumes, or set image.volume."
        ),
        "volume-missing": Reason(
            "fewer volumes in the file than image.volume asks for", "Correct image.volume in site.yaml."
        ),
        # pictures
        "not-picture": Reason("no PNG, JPEG or TIFF file", "Export it as PNG, JPEG or TIFF."),
        # npz
        "not-npz": Reason("no npz file", "Write it with numpy.savez or numpy.savez_compressed."),
        "npz-layout": Reason(
            "arrays do not follow MedMNIST's layout",
            "Store train_images, train_labels and the same for val and test; labels are integers.",
        ),
        "object-array": Reason(
            "holds Python objects, which are never loaded", "Store numbers or text instead."
        ),
    }
)

DAMAGE: tuple[type[Exception], ...] = (
    # pydicom, nibabel, Pillow and their decoders let these escape on damaged files: conversions of
    # nonsense values, reads past the end, look-ups of absent elements, failed decoders, deep nesting.
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,  # Pillow on broken PNG chunks
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What the reading libraries raise on damaged files; nothing else is ever turned into a rejection."""


def reject(code: str) -> FileRejected:
    """The rejection with this code; its words come from :data:`REASONS`."""
    meaning, remedy = REASONS[code]
    return FileRejected(meaning, remedy=remedy, code=code)


@contextmanager
def reading(code: str, *more: type[Exception]) -> Iterator[None]:
    """Turn what a library raises on a damaged file into the rejection ``code``.

    The cause is cut off on purpose: its message may quote tag values.

    Args:
        code: reason code of the rejection.
        more: further exception types of the library at hand.

    Raises:
        FileRejected: the one raised inside, or a new one.
    """
    try:
        yield
    except FileRejected:
        raise
    except MemoryError:
        raise reject("too-large") from None
    except (*DAMAGE, *more):
        raise reject(code) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the reading libraries: their warnings and log lines quote values from the files."""
    loggers = [
        logging.getLogger(name) for name in ("pydicom", "nibabel", "nibabel.global", "PIL", "tifffile")
    ]
    before = [logger.disabled for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.disabled = True
        try:
            yield
        finally:
            for logger, value in zip(loggers, before, strict=True):
                logger.disabled = value

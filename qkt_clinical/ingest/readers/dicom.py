"""Source kind ``dicom``: a file is a flat image, or its header tells of which volume it is a part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qkt_clinical.ingest.readers import dicom_file, dicom_series
from qkt_clinical.ingest.readers.base import COLUMNS, DecodeResults, Judge, SeriesReader
from qkt_clinical.ingest.readers.dicom_series import Scan
from qkt_clinical.ingest.source import Found, HeaderFacts, Request, SourceFile, Unit


class DicomReader(SeriesReader):
    """DICOM Part 10 files, flat or in series. Scanners often write UIDs as names: an ending is not needed."""

    kind = "dicom"
    suffixes = ("", ".dcm", ".dicom", ".dic", ".ima")
    libraries = ("imagecodecs", "nibabel", "pydicom", "pyjpegls", "pylibjpeg", "pylibjpeg-openjpeg")
    label_sources = COLUMNS | {"tag"}
    keeps_headers = True

    def sniff(self, head: bytes, ending: str) -> bool:
        """By the letters behind the preamble."""
        return head[128:] == b"DICM"

    def reads_headers(self, request: Request) -> bool:
        """Of volumes."""
        return request.volumes

    def facts(self, file: SourceFile, request: Request) -> Mapping[str, object]:
        """See :func:`~qkt_clinical.ingest.readers.dicom_series.scan`."""
        return dicom_series.scan(file, request).as_dict()

    def grouped(self, headers: Sequence[HeaderFacts]) -> list[Unit]:
        """See :func:`~qkt_clinical.ingest.readers.dicom_series.series`."""
        facts = {header.file: header.facts for header in headers}
        groups = dicom_series.series([Scan.from_dict(facts[file], file) for file in facts])
        named = (tuple(scan.file for scan in group) for group in groups)
        return [Unit(files, tuple(facts[file] for file in files)) for files in named]

    def read(self, unit: Unit, request: Request) -> DecodeResults:
        """A flat image, or a volume of which the headers are known."""
        if not unit.facts:
            return [dicom_file.read(unit.files[0], request)]
        scans = [Scan.from_dict(*pair) for pair in zip(unit.facts, unit.files, strict=True)]
        return list(dicom_series.read_series(scans, request))

    def check(self, path: Path, max_bytes: int, judge: Judge) -> Found:
        """See :func:`~qkt_clinical.ingest.readers.dicom_file.check`."""
        return dicom_file.check(path, max_bytes, judge)

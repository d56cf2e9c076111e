"""What a reader of one kind of source tells of itself and does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from qkt_clinical.ingest.arrays import Picture
from qkt_clinical.ingest.codes import reject
from qkt_clinical.ingest.source import DecodeResult, Found, HeaderFacts, Request, SourceFile, Unit

Judge = Callable[[Picture], None]
"""Refuses a decoded image that ingest would refuse; see :func:`qkt_clinical.ingest.check.judge`."""

COLUMNS = frozenset({"folder", "csv"})
"""Where values stand beside files of every kind."""


class DecodeResults(Protocol):
    """The images of a unit, one by one, and how many there are; a list is one."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[DecodeResult]: ...


class Reader(ABC):
    """Reads the files of one kind of source.

    Instances hold nothing: they are sent to worker processes. What is set here is what most kinds want.
    """

    kind: str
    """As ``source.kind`` of site.yaml names it."""
    suffixes: tuple[str, ...] = ()
    """Endings of its files' names, in small letters, with the dot; an empty one for those nobody knows."""
    libraries: tuple[str, ...] = ()
    """Distributions that decode: with another version of one, files are decoded again."""
    label_sources: frozenset[str] = COLUMNS
    """What ``from`` of a column of site.yaml may say; ``npz`` stands for the source's own arrays. Patients
    may come from ``none`` besides."""
    has_files: bool = True
    """Whether the source is a folder of files, or one."""
    one_file: bool = False
    """Whether the source is a single file."""
    remembered: bool = True
    """Whether what was decoded is kept for the next run. Labels, patients, splits and items of images are not
    kept: a reader that gives such is not remembered."""
    keeps_headers: bool = False
    """Whether images come with a header that is stored, de-identified."""
    gives_splits: bool = False
    """Whether images may come with the split that they belong to."""
    numbers_classes: bool = False
    """Whether labels are the numbers of the federation's classes unless site.yaml maps them."""

    def sniff(self, head: bytes, ending: str) -> bool:
        """Whether a file is surely of this kind; by its ending it may be still.

        Args:
            head: the file's first 132 bytes, or what there is.
            ending: of its name, as :func:`~qkt_clinical.ingest.readers.suffix` gives it.
        """
        return False

    def units(self, files: Sequence[SourceFile]) -> list[Unit]:
        """The files that are read together, in the order of their names; here each by itself."""
        return [Unit((file,)) for file in files]

    @abstractmethod
    def read(self, unit: Unit, request: Request) -> DecodeResults:
        """Decode what a unit holds.

        Raises:
            FileRejected: any code of one file; of its first file. Going through the images raises nothing.
        """

    def check(self, path: Path, max_bytes: int, judge: Judge) -> Found:
        """Decode a file by itself, whatever site it may belong to.

        Args:
            path: of the file.
            max_bytes: that it may take, decoded too.
            judge: to be shown the images.

        Raises:
            FileRejected: with the reason.
        """
        raise reject("other-kind")


class SeriesReader(Reader):
    """Reads files of which only the headers tell which of them make one image."""

    def reads_headers(self, request: Request) -> bool:
        """Whether that is so of the images wanted; where it is not, files are read by themselves."""
        return True

    @abstractmethod
    def facts(self, file: SourceFile, request: Request) -> Mapping[str, object]:
        """What a file's header says, as JSON may hold it, with nothing in it that names a patient.

        Raises:
            FileRejected: any code of one file.
        """

    @abstractmethod
    def grouped(self, headers: Sequence[HeaderFacts]) -> list[Unit]:
        """The files of each image with their facts, sorted."""

"""Labels and patient ids per image: from a folder's name, a CSV file, a DICOM tag or the source's arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from qkt_clinical.config.site import Column, SiteConfig, Subgroup
from qkt_clinical.errors import ConfigError
from qkt_clinical.ingest.codes import reject
from qkt_clinical.ingest.deidentify import salted
from qkt_clinical.ingest.identity import normal_name, normal_patient
from qkt_clinical.ingest.readers import reader_of, readers
from qkt_clinical.ingest.readers.base import Reader
from qkt_clinical.ingest.source import Ready, SourceFile
from qkt_clinical.ingest.subgroups import TAGS, UNKNOWN, group_of
from qkt_clinical.ingest.tables import Finder, read_table

SAID = {"tag": "a DICOM tag"}
"""Words for a column's ``from`` where it is none itself."""


def check_columns(config: SiteConfig, classes: Sequence[str], file: Path) -> None:
    """Refuse combinations that can never work, before a file is opened.

    Raises:
        ConfigError: naming the key of site.yaml.
    """
    reader = reader_of(config.source.kind, site=config.name, file=file)
    problems = [
        *_column_problems(config, reader),
        *_subgroup_problems(config, reader),
        *_class_problems(config, classes),
    ]
    if config.splits == "given" and not reader.gives_splits:
        able = " and ".join(kind for kind, other in readers().items() if other.gives_splits)
        problems.append(f"splits: given is for {able} files")
    if config.held_back is not None and not reader.has_files:
        problems.append(f"held_back: a source of kind {reader.kind} has no folder")
    if problems:
        raise ConfigError(
            "; ".join(problems), remedy="Correct site.yaml.", file=file, site=config.name, stage="ingest"
        )


def _wrong_source(name: str, source: str, allowed: Iterable[str], kind: str) -> str:
    said, choice = SAID.get(source, source), " or ".join(repr(word) for word in sorted(allowed))
    return f"{name} comes from {said}, but the source is {kind}: it must come from {choice}"


def _column_problems(config: SiteConfig, reader: Reader) -> Iterator[str]:
    for name, column in (("label", config.label), ("patient", config.patient)):
        if column.source == "none":
            if name == "label":
                yield "label needs a source"
        elif column.source not in reader.label_sources:
            yield _wrong_source(name, column.source, reader.label_sources, reader.kind)
        if column.source == "tag" and column.tag is not None and not _is_keyword(column.tag):
            yield f"{name}: {column.tag!r} is no DICOM keyword"


def _subgroup_problems(config: SiteConfig, reader: Reader) -> Iterator[str]:
    allowed = reader.label_sources - {"npz"}
    for name, column in config.subgroups.items():
        where = f"subgroups.{name}"
        if not allowed:
            yield f"{where}: a source of kind {reader.kind} has no such columns"
        elif column.source not in allowed:
            yield _wrong_source(where, column.source, allowed, reader.kind)
        elif column.source == "tag" and column.tag not in TAGS:
            yield f"{where}: {column.tag!r} is none of {', '.join(sorted(TAGS))}"


def _class_problems(config: SiteConfig, classes: Sequence[str]) -> Iterator[str]:
    words = Counter(normal_name(word) for word in config.label_map)
    yield from (f"label_map names {word!r} twice" for word, times in words.items() if times > 1)
    strange = sorted({v for v in config.label_map.values() if v not in classes})
    if strange:
        yield f"label_map leads to {', '.join(strange)}, not among the federation's classes"


def _is_keyword(tag: str) -> bool:
    from pydicom.datadict import tag_for_keyword

    return tag_for_keyword(tag) is not None


class Lookup:
    """Finds one column's value for an image.

    Args:
        column: of site.yaml.
        what: ``label`` or ``patient``; the reason codes begin with it.
        root: the source folder.
        site: for errors.
        salt: the site's secret. UIDs and tags of an image come salted.
        files: all that the source holds.
        below: a folder such as ``held-back/`` from which folders and a table's rows count, of files in it.
    """

    def __init__(
        self,
        column: Column,
        what: str,
        root: Path,
        *,
        site: str,
        salt: bytes,
        files: Sequence[SourceFile] = (),
        below: str = "",
    ) -> None:
        self.column = column
        self.what = what
        self._below = below
        table = read_table(column, root / below, site=site) if column.source == "csv" else {}
        self._find = Finder(table, _named_from(below, files) if below else files)
        self._by_uid = {salted(salt, "value", key): values for key, values in table.items()}

    def __call__(self, sample: Ready) -> str:
        """The value; salted if it stands in a tag.

        Raises:
            FileRejected: ``label-missing``, ``label-ambiguous`` and ``label-conflict``; the same of patients.
        """
        values = self.values(sample)
        if values is None:
            raise reject(f"{self.what}-ambiguous")
        if len(values) > 1:
            raise reject(f"{self.what}-conflict")
        if not values:
            raise reject(f"{self.what}-missing")
        return next(iter(values))

    def values(self, sample: Ready) -> set[str] | None:
        """All values that the column gives to an image, in their normal form; None where it is ambiguous."""
        found = self._spelt(sample)
        if found is None:
            return None
        if self.column.source in ("tag", "none"):  # salted, in its normal form before; the file itself
            return found
        if self.what == "patient":
            found = {normal_patient(value, "LO") for value in found}
        return {normal_name(value) for value in found} - {""}

    def _spelt(self, sample: Ready) -> set[str] | None:
        source, column = self.column.source, self.column
        files = _named_from(self._below, sample.files) if self._below else sample.files
        if source == "csv":
            found = self._find(files)
            return _among(self._by_uid, sample.keys) if found == set() else found
        if source == "tag":
            return set(sample.tags.get(column.tag or "", ()))
        if source == "folder":
            parents = [PurePosixPath(file.name).parts[:-1] for file in files]
            return {parts[column.level] for parts in parents if len(parts) > column.level}
        if source == "npz":
            value = sample.label if self.what == "label" else sample.patient
            return {value} if value else set()
        # none: every image is a patient of its own
        return {"\0".join((sample.files[0].name if sample.files else "", sample.item or ""))}


class GroupLookup:
    """Finds the group of an image in one column of site.yaml's ``subgroups``.

    Args:
        name, column: of site.yaml.
        root, site, salt, files, below: see :class:`Lookup`.
    """

    def __init__(
        self,
        name: str,
        column: Subgroup,
        root: Path,
        *,
        site: str,
        salt: bytes,
        files: Sequence[SourceFile] = (),
        below: str = "",
    ) -> None:
        self.name, self.bands = name, column.bands
        self._lookup = (
            None
            if column.source == "tag"
            else Lookup(column, "group", root, site=site, salt=salt, files=files, below=below)
        )

    def __call__(self, sample: Ready) -> str:
        """The group; ``unknown`` where there is none, or two."""
        if self._lookup is None:
            return sample.subgroups.get(self.name, UNKNOWN)
        found = {group_of(value, self.bands) for value in self._lookup.values(sample) or ()}
        return found.pop() if len(found) == 1 else UNKNOWN


def _named_from(below: str, files: Sequence[SourceFile]) -> tuple[SourceFile, ...]:
    """The files of a folder, by their paths relative to it."""
    return tuple(
        SourceFile(file.name.removeprefix(below), file.place) for file in files if file.name.startswith(below)
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long: the source's own table says so
        return False


class SiteColumns(NamedTuple):
    """What finds label, patient and groups of a site's images."""

    label: Lookup
    patient: Lookup
    groups: tuple[GroupLookup, ...]
    """Sorted by name."""


def site_columns(
    config: SiteConfig, root: Path, *, salt: bytes, files: Sequence[SourceFile], below: str = ""
) -> SiteColumns:
    """The columns of site.yaml, ready to look up.

    Args:
        config: of the site.
        root, salt, files: see :class:`Lookup`.
        below: the held-back folder, with a slash at its end, to look up its files: folders count from it, and
            so do the rows of a table that lies in it; a table that does not is the source's own.

    Raises:
        ConfigError: a table cannot be used.
    """

    def start(column: Column) -> str:
        own_table = column.source == "csv" and _is_file(root / below / (column.file or ""))
        return below if own_table or column.source == "folder" else ""

    def found(column: Column, what: str) -> Lookup:
        return Lookup(column, what, root, site=config.name, salt=salt, files=files, below=start(column))

    return SiteColumns(
        found(config.label, "label"),
        found(config.patient, "patient"),
        tuple(
            GroupLookup(name, c, root, site=config.name, salt=salt, files=files, below=start(c))
            for name, c in sorted(config.subgroups.items())
        ),
    )


def _among(table: Mapping[str, set[str]], keys: Sequence[str]) -> set[str]:
    return set().union(*(table.get(key, set()) for key in keys))

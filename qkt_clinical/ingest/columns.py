"""Labels and patient ids per image: from a folder's name, a CSV file, a DICOM tag or the source's arrays."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from qkt_clinical.config import Column, SiteConfig, Subgroup
from qkt_clinical.errors import ConfigError
from qkt_clinical.ingest.codes import reject
from qkt_clinical.ingest.deidentify import salted
from qkt_clinical.ingest.identity import normal_name, normal_patient
from qkt_clinical.ingest.source import Ready, stem
from qkt_clinical.ingest.subgroups import TAGS, UNKNOWN, group_of

MAX_TABLE_BYTES = 256_000_000


def check_columns(config: SiteConfig, classes: Sequence[str], file: Path) -> None:
    """Refuse combinations that can never work, before a file is opened.

    Raises:
        ConfigError: naming the key of site.yaml.
    """
    problems = []
    kind = config.source.kind
    arrays = kind in ("npz", "phantom")
    for name, column in (("label", config.label), ("patient", config.patient)):
        if column.source == "tag" and kind != "dicom":
            problems.append(f"{name} comes from a DICOM tag, but the source is {kind}")
        if (column.source == "npz") != arrays and not (
            name == "patient" and arrays and column.source == "none"
        ):
            problems.append(
                f"{name} must come from 'npz' (the source's own arrays) for a source of kind {kind}"
                if arrays
                else f"{name} comes from npz, but the source is {kind}"
            )
        if column.source == "tag" and column.tag is not None and not _is_keyword(column.tag):
            problems.append(f"{name}: {column.tag!r} is no DICOM keyword")
    for name, column in config.subgroups.items():
        where = f"subgroups.{name}"
        if arrays:
            problems.append(f"{where}: a source of kind {kind} has no such columns")
        elif column.source == "tag" and kind != "dicom":
            problems.append(f"{where} comes from a DICOM tag, but the source is {kind}")
        elif column.source == "tag" and column.tag not in TAGS:
            problems.append(f"{where}: {column.tag!r} is none of {', '.join(sorted(TAGS))}")
    if config.label.source == "none":
        problems.append("label needs a source")
    if config.splits == "given" and kind != "npz":
        problems.append("splits: given is for npz files")
    strange = sorted({v for v in config.label_map.values() if v not in classes})
    if strange:
        problems.append(f"label_map leads to {', '.join(strange)}, not among the federation's classes")
    if problems:
        raise ConfigError(
            "; ".join(problems), remedy="Correct site.yaml.", file=file, site=config.name, stage="ingest"
        )


def _is_keyword(tag: str) -> bool:
    from pydicom.datadict import tag_for_keyword

    return tag_for_keyword(tag) is not None


def _key(text: str) -> str:
    return normal_name(text.strip().replace("\\", "/").removeprefix("./").rstrip("/"))


def read_table(column: Column, root: Path, *, site: str) -> dict[str, set[str]]:
    """The values that a CSV file gives to each key; empty values are left out.

    Comma, semicolon or tab, whichever the heading holds most; UTF-8.

    Raises:
        ConfigError: absent, outside the source folder, too large, not a CSV file, or without a column.
    """
    assert column.file is not None  # Column's own validation
    path = root / column.file

    def wrong(message: str) -> ConfigError:
        return ConfigError(
            message, remedy="Correct the file or site.yaml.", file=column.file, site=site, stage="ingest"
        )

    try:
        if not path.resolve().is_relative_to(root.resolve()):
            raise wrong("lies outside the source folder")
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise wrong(f"larger than {MAX_TABLE_BYTES} bytes")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise wrong(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise wrong("not UTF-8") from None
    heading = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=heading.count)
    table: dict[str, set[str]] = {}
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        names = [name.strip() for name in rows.fieldnames or ()]
        rows.fieldnames = names
        for name in (column.key, column.column):
            if name not in names:
                raise wrong(f"no column {name!r}")
        for row in rows:
            key, value = row[str(column.key)], row[str(column.column)]
            if key and value and value.strip():
                table.setdefault(_key(key), set()).add(value.strip())
    except csv.Error:
        raise wrong("not a CSV file") from None
    return table


class Lookup:
    """Finds one column's value for an image.

    Args:
        column: of site.yaml.
        what: ``label`` or ``patient``; the reason codes begin with it.
        root: the source folder.
        site: for errors.
        salt: the site's secret. UIDs and tags of an image come salted.
    """

    def __init__(self, column: Column, what: str, root: Path, *, site: str, salt: bytes) -> None:
        self.column = column
        self.what = what
        self.table = read_table(column, root, site=site) if column.source == "csv" else {}
        self._by_uid = {salted(salt, "value", key): values for key, values in self.table.items()}

    def __call__(self, sample: Ready) -> str:
        """The value; salted if it stands in a tag.

        Raises:
            FileRejected: ``label-missing``, ``label-conflict``, ``patient-missing``, ``patient-conflict``.
        """
        values = self.values(sample)
        if len(values) > 1:
            raise reject(f"{self.what}-conflict")
        if not values:
            raise reject(f"{self.what}-missing")
        return next(iter(values))

    def values(self, sample: Ready) -> set[str]:
        """All values that the column gives to an image, in their normal form."""
        found = self._spelt(sample)
        if self.column.source in ("tag", "none"):  # salted, in its normal form before; the file itself
            return found
        if self.what == "patient":
            found = {normal_patient(value, "LO") for value in found}
        return {normal_name(value) for value in found} - {""}

    def _spelt(self, sample: Ready) -> set[str]:
        source, column = self.column.source, self.column
        if source == "csv":
            by_name = next((found for keys in _keys(sample) if (found := _among(self.table, keys))), set())
            return by_name or _among(self._by_uid, sample.keys)
        if source == "tag":
            return set(sample.tags.get(column.tag or "", ()))
        if source == "folder":
            parents = [PurePosixPath(file.name).parts[:-1] for file in sample.files]
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
        root: the source folder.
        site: for errors.
        salt: the site's secret.
    """

    def __init__(self, name: str, column: Subgroup, root: Path, *, site: str, salt: bytes) -> None:
        self.name, self.bands = name, column.bands
        self._lookup = None if column.source == "tag" else Lookup(column, "group", root, site=site, salt=salt)

    def __call__(self, sample: Ready) -> str:
        """The group; ``unknown`` where there is none, or two."""
        if self._lookup is None:
            return sample.subgroups.get(self.name, UNKNOWN)
        found = {group_of(value, self.bands) for value in self._lookup.values(sample)}
        return found.pop() if len(found) == 1 else UNKNOWN


def _among(table: Mapping[str, set[str]], keys: Sequence[str]) -> set[str]:
    return set().union(*(table.get(key, set()) for key in keys))


def _keys(sample: Ready) -> Iterator[tuple[str, ...]]:
    """Names under which a CSV file may list an image, the most exact first.

    A file by its path, its name, or its name without extensions; a series also by its folder's path
    or name. Either may also be listed by its UID.
    """
    paths = [PurePosixPath(normal_name(file.name)) for file in sample.files]
    yield tuple(path.as_posix() for path in paths)
    yield tuple(path.name for path in paths)
    yield tuple(stem(path.name) for path in paths)
    if len(paths) > 1:
        folders = sorted({path.parent for path in paths})
        yield tuple(folder.as_posix() for folder in folders)
        yield tuple(folder.name for folder in folders)

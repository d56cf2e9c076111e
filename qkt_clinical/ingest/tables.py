"""CSV files of labels and patients: read whole and strictly, and searched by the names of files.

A table that could be read in two ways is an error that says what to do: a label taken from the wrong column
or row spoils every figure and is seen by nobody.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from qkt_clinical.config.site import Column
from qkt_clinical.errors import ConfigError, FileRejected
from qkt_clinical.ingest.identity import normal_name
from qkt_clinical.ingest.listing import stem
from qkt_clinical.ingest.source import SourceFile, whole_file

MAX_TABLE_BYTES = 256_000_000
DELIMITERS = ",;\t|"
AS_UTF8 = "Save it as 'CSV UTF-8' (in Excel: Save as, file type CSV UTF-8)."
UNPACK = "Unpack it, or save the sheet as 'CSV UTF-8', and name that file in site.yaml."
CORRECT = "Correct the file or site.yaml."
SEP_LINE = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
"""First line by which Excel is told the delimiter."""
STARTS = {
    b"\xff\xfe": ("UTF-16, not UTF-8", AS_UTF8),
    b"\xfe\xff": ("UTF-16, not UTF-8", AS_UTF8),
    b"\x1f\x8b": ("packed by gzip, not a CSV file", UNPACK),
    b"PK\x03\x04": ("an Excel workbook or a zip file, not a CSV file", UNPACK),
    b"\xd0\xcf\x11\xe0": ("an old Excel workbook, not a CSV file", UNPACK),
}
"""How files begin that are no text in UTF-8."""

Wrong = Callable[[str, str], ConfigError]
"""Message and remedy to the error that names the table."""


def key_of(text: str) -> str:
    """A cell that names a file or folder, as it is compared."""
    return normal_name(text).strip().replace("\\", "/").removeprefix("./").rstrip("/")


def folded(text: str) -> str:
    """The same text for spellings that differ in capital letters alone."""
    return normal_name(normal_name(text).casefold())


def read_table(column: Column, root: Path, *, site: str) -> dict[str, set[str]]:
    """The values that a CSV file gives to each key; empty values are left out.

    Comma, semicolon, tab or bar, whichever makes the two columns appear; UTF-8, with or without its mark.
    Headings are compared without the spaces around them and, where that leaves one, without regard to capital
    letters.

    Raises:
        ConfigError: absent, outside the source folder, too large, not text in UTF-8, not a CSV file, without
            a column or with two of its name.
    """
    assert column.file is not None  # Column's own validation

    def wrong(message: str, remedy: str) -> ConfigError:
        return ConfigError(message, remedy=remedy, file=column.file, site=site, stage="ingest")

    text = _text(root, column.file, wrong)
    asked = str(column.key), str(column.column)
    rows = _rows(text, asked, wrong)
    names = next(rows, (0, []))[1]
    key_at, value_at = (_place(names, name, wrong) for name in asked)
    table: dict[str, set[str]] = {}
    for line, row in rows:
        if any(cell.strip() for cell in row[len(names) :]):
            raise wrong(
                f"line {line} holds {len(row)} cells under {len(names)} headings",
                "Put text that holds the delimiter into quotation marks, or correct the line.",
            )
        if len(row) > max(key_at, value_at) and row[key_at].strip() and row[value_at].strip():
            table.setdefault(key_of(row[key_at]), set()).add(normal_name(row[value_at]).strip())
    return table


def _text(root: Path, name: str, wrong: Wrong) -> str:
    """A table's whole text, of a plain file below ``root``."""
    try:
        path = (root / name).resolve()
    except (OSError, RuntimeError, ValueError):  # a link in a circle, a NUL in the name
        raise wrong("cannot be read", CORRECT) from None
    if not path.is_relative_to(root.resolve()):
        raise wrong("lies outside the source folder", CORRECT)
    try:
        data = whole_file(path, MAX_TABLE_BYTES)
    except FileRejected as rejected:
        missing = rejected.code == "unreadable" and not path.exists()
        raise wrong(f"cannot be read: {'no such file' if missing else rejected.message}", CORRECT) from None
    for start, (message, remedy) in STARTS.items():
        if data.startswith(start):
            raise wrong(message, remedy)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise wrong("not UTF-8", AS_UTF8) from None
    if "\0" in text:
        raise wrong("holds NUL characters, so it is no text", AS_UTF8)
    return text


def _rows(text: str, asked: Sequence[str], wrong: Wrong) -> Iterator[tuple[int, list[str]]]:
    """Rows with their line numbers, the headings first; empty lines are left out."""
    stream = io.StringIO(text, newline=None)  # an old Mac's line ends too
    first = stream.readline()
    told = SEP_LINE.fullmatch(first.rstrip("\n"))
    if told is None:
        stream.seek(0)
    delimiter = told[1] if told else _delimiter(first, asked)
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield reader.line_num + (told is not None), row
    except csv.Error as error:
        where = f"line {reader.line_num + (told is not None)}"
        if "field larger" in str(error) or "unexpected end" in str(error):
            message = f"{where}: a quotation mark is not closed, or a cell is longer than a page"
        else:
            message = f"{where}: not a CSV file ({error})"
        raise wrong(message, "Correct the line, or save the table as CSV UTF-8 again.") from None


def _delimiter(heading: str, asked: Sequence[str]) -> str:
    """That which makes the columns asked for appear, else the one that stands most often in the heading."""
    for delimiter in DELIMITERS:
        try:
            names = {folded(name.strip()) for name in next(csv.reader([heading], delimiter=delimiter), [])}
        except csv.Error:
            continue
        if all(folded(name.strip()) in names for name in asked):
            return delimiter
    return max(DELIMITERS, key=heading.count)


def _place(names: Sequence[str], asked: str, wrong: Wrong) -> int:
    """Which column a name of site.yaml means.

    Raises:
        ConfigError: none, or two of them.
    """
    fits = [i for i, name in enumerate(names) if folded(name.strip()) == folded(asked.strip())]
    if not fits:
        raise wrong(f"no column {asked!r}", CORRECT)
    if len(fits) > 1:
        both = " and ".join(f"{names[i].strip()!r} (column {i + 1})" for i in fits)
        raise wrong(f"two columns of one name: {both}", "Rename one of them, here and in site.yaml.")
    return fits[0]


# --- which row is a file's ----------------------------------------------------------------------------


def _spellings(name: str) -> tuple[tuple[str, str], ...]:
    """Under what a table may list a file, most exact first, and what of the source that is.

    Its path, its name, its name without ending; its folder's path and name, for a series.
    """
    folder, _, last = name.rpartition("/")
    return (
        (name, name),
        (last, name),
        (stem(last), stem(name)),
        (folder, folder),
        (folder.rpartition("/")[2], folder),
    )


OWN, WITH_FOLDERS = 3, 5
"""Of the spellings those that may stand for one file, and for a series."""


class Finder:
    """Finds the row of a table that is a file's.

    Args:
        table: key to values.
        files: all that the source holds: a row that fits two of them is neither's.
    """

    def __init__(self, table: Mapping[str, set[str]], files: Sequence[SourceFile]) -> None:
        self._table = table
        self._spelt: dict[str, list[str]] = {}
        for key in table:
            self._spelt.setdefault(folded(key), []).append(key)
        self._fits: dict[tuple[int, str], set[tuple[str, str]]] = {}
        for file in files if table else ():
            for tier, (text, place) in enumerate(_spellings(file.name)):
                if (like := folded(key_of(text))) in self._spelt:
                    self._fits.setdefault((tier, like), set()).add((key_of(text), place))

    def __call__(self, files: Sequence[SourceFile]) -> set[str] | None:
        """The values of one image's files; None where a row fits another file as well, or two rows this."""
        for tier in range(WITH_FOLDERS if len(files) > 1 else OWN):
            spellings = [_spellings(file.name)[tier] for file in files]
            own = {place for _, place in spellings}
            found: set[str] = set()
            for text, _ in spellings:
                row = self._row(tier, key_of(text), own)
                if row is None:
                    return None
                found |= row
            if found:
                return found
        return set()

    def _row(self, tier: int, key: str, own: set[str]) -> set[str] | None:
        rows = self._spelt.get(folded(key), [])
        fits = self._fits.get((tier, folded(key)), set())
        if key in self._table:
            places = {place for spelt, place in fits if spelt == key}
        elif len(rows) > 1:
            return None
        else:
            places = {place for _, place in fits}
        if not rows:
            return set()
        return None if places - own else self._table[key if key in self._table else rows[0]]

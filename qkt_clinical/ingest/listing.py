"""Which files lie in a source folder, and which of them are images of its kind."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from qkt_clinical.ingest.readers import reader_of, suffix
from qkt_clinical.ingest.source import Refusal, SourceFile

SIDE_SUFFIXES = frozenset(
    f".{ending}"
    for ending in (
        *(
            "bval",
            "bvec",
            "csv",
            "db",
            "doc",
            "docx",
            "dvc",
            "htm",
            "html",
            "ini",
            "inf",
            "json",
            "log",
            "md",
        ),
        *("md5", "ods", "pdf", "rtf", "sha256", "tsv", "txt", "xls", "xlsx", "xml", "yaml", "yml"),
    )
)
"""Tables, texts and indexes that lie beside images; never read as images."""

LONGEST_PATH = os.pathconf("/", "PC_PATH_MAX")
"""Bytes of a path from which on the system opens nothing by it."""


class Listing(NamedTuple):
    """Files to read and files refused unread, both sorted by name."""

    files: list[SourceFile]
    refused: list[Refusal]


def stem(name: str) -> str:
    """The name without its known ending."""
    return name[: len(name) - len(suffix(name))]


def is_side_file(name: str) -> bool:
    """Whether a name is that of a table, text or index, or hidden."""
    last = PurePosixPath(name).name
    return (
        last.startswith((".", "~$"))
        or last.upper() in {"DICOMDIR", "README", "LICENSE", "LICENCE", "CHANGES"}
        or PurePosixPath(last.lower()).suffix in SIDE_SUFFIXES
    )


def _walk(root: Path) -> Iterator[tuple[SourceFile, str | None]]:
    """Every entry below ``root`` that is no folder, and the code where it must not be opened.

    Folder after folder without recursion, since backups of backups nest by the thousand. A folder that is
    one of those above it (a mount or junction in a circle) is not entered again.
    """
    above: list[tuple[int, int]] = []
    waiting: list[tuple[str, str, int]] = [(str(root), "", 0)]
    while waiting:
        place, prefix, depth = waiting.pop()
        file = SourceFile(prefix.rstrip("/") or ".", place)
        if len(os.fsencode(place)) >= LONGEST_PATH:
            yield file, "path-too-long"
            continue
        try:
            state = Path(place).stat(follow_symlinks=False)
            with os.scandir(place) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            yield file, "unreadable"
            continue
        del above[depth:]
        if (state.st_dev, state.st_ino) in above:
            continue
        above.append((state.st_dev, state.st_ino))
        for entry in entries:
            if _is_folder(entry):
                waiting.append((entry.path, f"{prefix}{entry.name}/", depth + 1))
            else:
                yield from _judged(entry, prefix, root)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _judged(entry: os.DirEntry[str], prefix: str, root: Path) -> Iterator[tuple[SourceFile, str | None]]:
    """An entry that is no folder and the code that bars it; none for a link to a folder inside.

    Only of links is it asked where they lead: resolving every path would take a tenth of reading it. A link
    to a file inside the source stands for that file, which is opened by its own path.
    """
    file = SourceFile(prefix + entry.name, entry.path)
    if len(os.fsencode(entry.path)) >= LONGEST_PATH:
        yield file, "path-too-long"
        return
    try:
        if entry.is_file(follow_symlinks=False):
            yield file, None
            return
        real = Path(entry.path).resolve()
        if not real.is_relative_to(root):
            yield file, "outside-source"
            return
        mode = real.stat().st_mode
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        yield file, "unreadable"
        return
    if not stat.S_ISDIR(mode):
        yield SourceFile(file.name, str(real)), None if stat.S_ISREG(mode) else "not-a-file"


def list_files(folder: Path, kind: str, *, held_back: Path | None = None) -> Listing:
    """Files below ``folder`` that a reader of ``kind`` should open, in sorted order.

    ``folder`` itself may be a symbolic link; a link below it that leads out of it is refused. Tables,
    texts, hidden files and DICOMDIR are left out, and so is all that lies in ``held_back``, or leads there.

    Raises:
        ConfigError: no such kind of source.
    """
    root, own = folder.resolve(), reader_of(kind).suffixes
    kept = None if held_back is None else held_back.resolve()
    files: list[SourceFile] = []
    refused: list[Refusal] = []
    for file, barred in _walk(root):
        if is_side_file(file.name) or (kept is not None and _lies_in(file, kept, root)):
            continue
        code = barred or (None if suffix(file.name) in own else "other-kind")
        if code is None:
            files.append(file)
        else:
            refused.append(Refusal((file,), code))
    return Listing(sorted(files, key=lambda f: f.name), sorted(refused, key=lambda r: r.files))


def _lies_in(file: SourceFile, folder: Path, root: Path) -> bool:
    """Whether a file lies in a folder below ``root`` by its name, or by the place where a link leads."""
    inside = f"{folder.relative_to(root).as_posix()}/"
    return f"{file.name}/".startswith(inside) or f"{file.place}/".startswith(f"{folder}/")


def list_all(folder: Path) -> list[tuple[SourceFile, str | None]]:
    """Every visible file below ``folder`` with the code that bars it from being opened, sorted."""
    root = folder.resolve()
    found = [pair for pair in _walk(root) if not pair[0].name.rpartition("/")[2].startswith(".")]
    return sorted(found, key=lambda pair: pair[0].name)

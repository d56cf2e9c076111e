"""What was decoded of a site's files, in one SQLite file of the scratch folder.

An ingest that was interrupted goes on from it, and one new file costs one decode: a result is found again as
long as its files keep their size and times, and as long as what is asked of them, this code and the libraries
that decode stay the same. Memory holds no image but the one at hand. Names, patient ids and UIDs stand in it
salted only. It is no output: delete it whenever the place is wanted.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.errors import SourceError
from qkt_clinical.ingest.arrays import as_float
from qkt_clinical.ingest.deidentify import salted
from qkt_clinical.ingest.readers.base import Reader
from qkt_clinical.ingest.source import Header, HeaderFacts, Ready, Refusal, Request, SourceFile

Result = Ready | Refusal | HeaderFacts
LAYOUT = 1
"""Of the tables; a file of another is thrown away."""
LIBRARIES = ("monai", "numpy", "scipy", "torch")
"""That bring what was decoded to what a site wants."""
FORGOTTEN = b""
"""Key of what is not to be found again."""
KEPT_S = 1.0
"""So much work at most is lost when the process is killed."""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def recipe(request: Request, reader: Reader) -> bytes:
    """Digest of all that decides what a file becomes, but for the file: request, code and libraries."""
    total = hashlib.sha256()
    for path in (*sorted(Path(__file__).parent.rglob("*.py")), Path(inspect.getfile(type(reader)))):
        total.update(path.read_bytes())
    libraries = [_version(name) for name in (*LIBRARIES, *reader.libraries)]
    words = [reader.kind, request.spec.model_dump_json(), *request.tags, request.max_bytes, request.burned_in]
    total.update(repr((words, request.subgroups, libraries)).encode())
    total.update(request.salt)
    return total.digest()


def as_text(result: Result, files: Sequence[SourceFile], header: Header | None = None) -> str:
    """A result as JSON; its files by their place among those of its unit. ``header`` is an image's."""
    if isinstance(result, HeaderFacts):
        return json.dumps({"facts": dict(result.facts)})
    places = {file: place for place, file in enumerate(files)}
    held: dict[str, Any] = {"files": [places[file] for file in result.files]}
    if isinstance(result, Refusal):
        held["code"] = result.code
    else:
        held |= {
            "shape": result.image.shape,
            "print": result.fingerprint,
            "hashes": result.hashes,
            "spacing": result.spacing_mm,
            "tags": {name: sorted(values) for name, values in result.tags.items()},
            "keys": result.keys,
            "face": result.face,
            "subgroups": dict(result.subgroups),
            "header": None if header is None else header.kept,
        }
    return json.dumps(held, separators=(",", ":"))


def _as_image(held: dict[str, Any], data: bytes) -> NDArray[Any]:
    shape = tuple(held["shape"])
    dtype = np.uint8 if len(data) == int(np.prod(shape)) else np.float32
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def _from_text(text: str, data: bytes | None, files: Sequence[SourceFile]) -> Result:
    held = json.loads(text)
    if "facts" in held:
        return HeaderFacts(files[0], held["facts"])
    named = tuple(files[i] for i in held["files"])
    if "code" in held:
        return Refusal(named, held["code"])
    return Ready(
        files=named,
        image=_as_image(held, data or b""),
        fingerprint=held["print"],
        hashes=(held["hashes"][0], held["hashes"][1]),
        spacing_mm=None if held["spacing"] is None else tuple(held["spacing"]),
        tags={name: frozenset(values) for name, values in held["tags"].items()},
        keys=tuple(held["keys"]),
        face=held["face"],
        subgroups=held["subgroups"],
    )


class ScratchStore:
    """Results by the unit of files that they were made from.

    Args:
        path: of the file.
        site: for errors.
        salt: the site's secret.
        recipe: see :func:`recipe`; None to keep nothing when it is closed.

    Raises:
        SourceError: the file cannot be written.
    """

    def __init__(self, path: Path, *, site: str, salt: bytes, recipe: bytes | None) -> None:
        self._site, self._salt, self._recipe = site, salt, recipe or b""
        self._passing: Path | None = None if recipe else path.with_name(f"{path.name}.{os.getpid()}.part")
        self._used: set[bytes] = set()
        self._kept_at = time.monotonic()
        with self._safely():
            self._base = self._opened(path)
            self.known = frozenset(row[0] for row in self._base.execute("SELECT DISTINCT key FROM results"))
        """Keys of the units whose results it held when it was opened."""

    @contextmanager
    def _safely(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError):
            raise SourceError(
                "the scratch file of this site cannot be written or read",
                remedy="Make room on the disk, or delete the file, and run the stage again.",
                code="scratch",
                stage="ingest",
                site=self._site,
                file=Path(".qkt") / f"ingest-{self._site}.sqlite",
            ) from None

    def _opened(self, path: Path) -> sqlite3.Connection:
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._passing is None:
            try:
                return _connected(path)
            except sqlite3.OperationalError:  # another process works on this site
                self._passing = path.with_name(f"{path.name}.{os.getpid()}.part")
            except sqlite3.DatabaseError:  # damaged, or of another version
                path.unlink()
                return _connected(path)
        self._passing.unlink(missing_ok=True)
        return _connected(self._passing)

    def __enter__(self) -> ScratchStore:
        return self

    def __exit__(self, *_: object) -> None:
        with self._safely():
            self._base.execute("COMMIT")
            self._base.close()
            if self._passing is not None:
                self._passing.unlink()

    def key(self, step: str, files: Sequence[SourceFile]) -> bytes:
        """Of a unit: its files' salted names, sizes and times, and the recipe."""
        total = hashlib.blake2b(self._recipe + step.encode(), digest_size=16)
        for file in files:
            try:
                found = file.path.stat()
            except OSError:
                return os.urandom(16)  # never found again
            times = (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            total.update(f"{salted(self._salt, 'file', file.name)} {times}\n".encode())
        return total.digest()

    def put(self, key: bytes, results: Sequence[tuple[Result, str]]) -> list[int]:
        """Keep the results of a unit, each with its :func:`as_text`, whole or not at all; their numbers."""
        self._used.add(key)
        with self._safely():
            numbers = [
                self._base.execute(
                    "INSERT INTO results (key, held, image) VALUES (?, ?, ?)",
                    (key, text, r.image.data if isinstance(r, Ready) else None),
                ).lastrowid
                for r, text in results
            ]
            if time.monotonic() - self._kept_at > KEPT_S:
                self._base.execute("COMMIT")
                self._base.execute("BEGIN IMMEDIATE")
                self._kept_at = time.monotonic()
        return [number or 0 for number in numbers]

    def get(self, key: bytes, files: Sequence[SourceFile]) -> list[tuple[int, Result]]:
        """Results of a known unit, each with its number."""
        self._used.add(key)
        with self._safely():
            rows = self._base.execute(
                "SELECT id, held, image FROM results WHERE key = ? ORDER BY id", (key,)
            ).fetchall()
        return [(number, _from_text(held, data, files)) for number, held, data in rows]

    def image(self, number: int) -> NDArray[Any]:
        """A result's image."""
        held, data = self._row(number)
        return _as_image(held, data)

    def header(self, number: int) -> dict[str, Any] | None:
        """What is kept of the DICOM header of a result's image."""
        header: dict[str, Any] | None = self._row(number)[0]["header"]
        return header

    def _row(self, number: int) -> tuple[dict[str, Any], bytes]:
        with self._safely():
            row = self._base.execute("SELECT held, image FROM results WHERE id = ?", (number,)).fetchone()
        return json.loads(row[0]), row[1]

    def tidy(self) -> None:
        """Forget all that was neither put nor got since it was opened."""
        with self._safely():
            for key in self.known - self._used:
                self._base.execute("DELETE FROM results WHERE key = ?", (key,))


def _connected(path: Path) -> sqlite3.Connection:
    base = sqlite3.connect(path, timeout=0, isolation_level=None)
    base.execute("PRAGMA locking_mode = EXCLUSIVE")
    base.execute("PRAGMA journal_mode = WAL")
    base.execute("PRAGMA synchronous = NORMAL")
    base.execute("BEGIN IMMEDIATE")
    if base.execute("PRAGMA user_version").fetchone()[0] not in (0, LAYOUT):
        base.close()
        raise sqlite3.DatabaseError
    base.execute(
        "CREATE TABLE IF NOT EXISTS results (id INTEGER PRIMARY KEY, key BLOB, held TEXT, image BLOB)"
    )
    base.execute("CREATE INDEX IF NOT EXISTS by_key ON results (key)")
    base.execute("DELETE FROM results WHERE key = ?", (FORGOTTEN,))
    base.execute(f"PRAGMA user_version = {LAYOUT}")
    return base


class Stack:
    """Images of a store in a row, as one array would hold them, with one in memory at a time.

    Args:
        store: open.
        numbers: of the results.
        dtype: float32 if one of them is; 8-bit ones become 0..1 then, so that the order does not matter.
    """

    def __init__(self, store: ScratchStore, numbers: Sequence[int], dtype: np.dtype[Any]) -> None:
        self._store, self._numbers = store, numbers
        self.dtype = dtype
        self.shape = (len(numbers), *store.image(numbers[0]).shape)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> NDArray[Any]:
        image = self._store.image(self._numbers[index])
        return image if image.dtype == self.dtype else as_float(image)

"""Writing files so that nothing is ever half-written, and digests of what was written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


def digest_bytes(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's content in hexadecimal, read in pieces."""
    total = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(CHUNK):
            total.update(piece)
    return total.hexdigest()


def digest_folder(folder: Path, names: Iterable[str] | None = None) -> str:
    """SHA-256 over relative names and contents of every file below ``folder``, or of those named, sorted."""
    total = hashlib.sha256()
    paths = folder.rglob("*") if names is None else (folder / name for name in names)
    for path in sorted(p for p in paths if p.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()}\0{digest_file(path)}\n".encode())
    return total.hexdigest()


def to_json(value: Any) -> str:
    """Stable JSON text: sorted keys, two spaces, a final newline; NaN and infinities are refused."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step: temporary name first, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``to_json(value)`` in one step."""
    write_text(path, to_json(value))


def write_json_list(path: Path, values: Iterable[Any]) -> None:
    """Write a JSON list, one value a line, with one in memory at a time; the file must be nobody's yet."""
    with path.open("w", encoding="utf-8") as stream:
        for i, value in enumerate(values):
            text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
            stream.write(f"{',' if i else '['}\n{text}")
        stream.write("\n]\n")


def sweep(target: Path) -> None:
    """Remove what a process that has ended left beside ``target`` while it made it anew."""
    for path in target.parent.glob(f".{target.name}.*.*"):
        number = path.name.removeprefix(f".{target.name}.").partition(".")[0]
        if path.suffix in (".part", ".old") and number.isdecimal() and not _alive(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``target``; on success it replaces ``target``, else it is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old)
        else:
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

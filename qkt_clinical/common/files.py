"""Writing files so that nothing is ever half-written, and digests of what was written."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
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


@contextmanager
def owners_alone() -> Iterator[None]:
    """What the process makes within the block can be read by its owner alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step: temporary name first, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _passing(path, "part")
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


def _passing(target: Path, ending: str) -> Path:
    """A name beside ``target`` that no other process has: numbers of processes come again."""
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.{ending}")


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Lock a folder, by which :func:`sweep` knows that its process lives.

    Raises:
        OSError: somebody holds it, it is not there, or the file system knows no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def sweep(target: Path) -> None:
    """Remove what a process that has ended left beside ``target`` while it made it anew."""
    for path in sorted(target.parent.glob(f".{target.name}.*")):
        if re.fullmatch(r"[0-9a-f]+\.(part|old)", path.name.removeprefix(f".{target.name}.")):
            with suppress(OSError), _held(path):
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def passing_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` that is gone after the block, unless it was renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        while True:
            temporary = _passing(target, "part")
            temporary.mkdir()
            try:
                stack.enter_context(_held(temporary))
            except (BlockingIOError, FileNotFoundError):
                continue  # it is swept: nobody held it for a moment
            except OSError:
                pass  # a file system without locks, where nothing is swept
            if temporary.is_dir():
                break
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        yield temporary


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``target``; on success it replaces ``target``, else it is removed."""
    with passing_folder(target) as temporary:
        yield temporary
        if not target.exists():
            temporary.rename(target)
            return
        old = _passing(target, "old")
        target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)

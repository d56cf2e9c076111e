"""Atomic writing of files, safe reading of files from elsewhere, and digests of both."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

CHUNK_SIZE = 1 << 20


class TooLarge(OSError):
    """A file is larger than allowed."""


@contextmanager
def plain_file(path: Path) -> Iterator[BinaryIO]:
    """Open a plain file for reading; whoever made it cannot make the reader wait or look elsewhere.

    Raises:
        OSError: it cannot be opened, or is a link, a folder, a pipe or a device.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError(errno.EINVAL, "no plain file", str(path))
        yield stream


def read_plain(path: Path, max_bytes: int) -> bytes:
    """Read a plain file through one handle, so that the hashed and the parsed bytes are the same.

    Args:
        max_bytes: bytes that it may hold.

    Raises:
        TooLarge: it holds more; no more than ``max_bytes`` were read.
        OSError: see :func:`plain_file`.
    """
    with plain_file(path) as stream:
        content = stream.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise TooLarge(errno.EFBIG, f"larger than {max_bytes} bytes", str(path))
    return content


def copy_plain(source: Path, target: Path, max_bytes: int) -> str:
    """Copy a plain file, in chunks and in one step; SHA-256 of what was copied.

    Raises:
        TooLarge: it holds more than ``max_bytes`` bytes; nothing is left at ``target``.
        OSError: see :func:`plain_file`.
    """
    total, left = hashlib.sha256(), max_bytes
    with plain_file(source) as stream, passing_file(target) as temporary, temporary.open("wb") as out:
        while chunk := stream.read(min(CHUNK_SIZE, left + 1)):
            left -= len(chunk)
            if left < 0:
                raise TooLarge(errno.EFBIG, f"larger than {max_bytes} bytes", str(source))
            total.update(chunk)
            out.write(chunk)
    return total.hexdigest()


def digest_bytes(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's content in hexadecimal, read in chunks."""
    total = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_SIZE):
            total.update(chunk)
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


def copy_folder(source: Path, target: Path, max_bytes: int = 1 << 34) -> None:
    """Copy the plain files of a folder that came from elsewhere; links, pipes and devices are left out.

    Args:
        max_bytes: bytes of a file at most.

    Raises:
        TooLarge: a file holds more.
    """
    for folder, _, names in os.walk(source):
        for name in names:
            path = Path(folder) / name
            if stat.S_ISREG(path.lstat().st_mode):
                copy_plain(path, target / path.relative_to(source), max_bytes)


@contextmanager
def passing_file(target: Path) -> Iterator[Path]:
    """Yield a unique name beside ``target``; after the block, the file of that name replaces it.

    Where the block fails, or the disk does, ``target`` is as it was and nothing is left beside it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _passing(target, "part")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step: temporary name first, then rename."""
    with passing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``to_json(value)`` in one step."""
    write_text(path, to_json(value))


def write_json_list(path: Path, values: Iterable[Any]) -> None:
    """Write a JSON list, one value per line and one in memory at a time; the file must not exist yet."""
    with path.open("w", encoding="utf-8") as stream:
        for i, value in enumerate(values):
            text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
            stream.write(f"{',' if i else '['}\n{text}")
        stream.write("\n]\n")


def _passing(target: Path, ending: str) -> Path:
    """A unique name beside ``target``; process ids alone would repeat."""
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.{ending}")


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Lock a folder, which shows :func:`sweep` that its process is alive.

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
    """Remove temporary files beside ``target`` that a process left when it ended early."""
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

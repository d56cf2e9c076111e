"""Download MedMNIST files, each verified by its checksum, through pooch.

Addresses and MD5 sums stand in ``medmnist.json``, taken over from the package ``medmnist`` (which is
no dependency: it would bring a second build of torch).
"""

from __future__ import annotations

import difflib
import json
import logging
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from qkt_clinical.errors import FetchError

TIMEOUT_S = 30.0
"""Seconds without a byte from the server before the download counts as failed."""
CHUNK_SIZE = 1 << 18


@dataclass(frozen=True)
class Dataset:
    """One MedMNIST data set."""

    name: str
    title: str
    task: str
    """``multi-class``, ``binary-class``, ``ordinal-regression`` or ``multi-label, binary-class``."""
    dims: int
    channels: int
    licence: str
    """Of the images; they are not covered by this project's licence."""
    classes: tuple[str, ...]
    """In the order of the labels 0, 1, ..."""
    files: dict[int, tuple[str, str]]
    """Edge length in pixels to file name and MD5 sum."""


@cache
def _table() -> dict[str, Any]:
    text = files("qkt_clinical.datasets").joinpath("medmnist.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def list_datasets() -> dict[str, Dataset]:
    """Every data set that can be fetched, by name."""
    return {
        name: Dataset(
            name=name,
            title=entry["title"],
            task=entry["task"],
            dims=entry["dims"],
            channels=entry["channels"],
            licence=entry["licence"],
            classes=tuple(entry["classes"]),
            files={int(size): (f["file"], f["md5"]) for size, f in entry["sizes"].items()},
        )
        for name, entry in _table()["datasets"].items()
    }


def class_names(file: Path) -> tuple[str, ...] | None:
    """The classes of a MedMNIST file, known by its name; None for any other file."""
    for dataset in list_datasets().values():
        if file.name in (name for name, _ in dataset.files.values()):
            return dataset.classes
    return None


def fetch(
    name: str, folder: Path, *, size: int = 28, base_url: str | None = None, progress: bool = True
) -> Path:
    """Download a data set into ``folder`` unless it is there already, and return the file's path.

    The file appears under its name only when complete and verified. A file of that name with a wrong
    checksum is replaced.

    Args:
        name: one of :func:`list_datasets`.
        folder: made if absent.
        size: edge length of the images in pixels: 28, 64, 128 or 224 (3D: 28 or 64).
        base_url: a mirror that holds the files under the same names; default: Zenodo.
        progress: draw a progress bar on standard error.

    Raises:
        FetchError: with the codes ``fetch-unknown`` (no such data set or size), ``fetch-checksum``,
            ``fetch-http`` (the server's answer is an error), ``fetch-connection`` (no connection, cut
            or stalled) and ``fetch-disk``.
    """
    dataset = _find(name)
    if size not in dataset.files:
        raise FetchError(
            f"{name} comes in sizes {', '.join(map(str, dataset.files))}, not {size}",
            remedy="Choose one of these with --size.",
            code="fetch-unknown",
        )
    file, md5 = dataset.files[size]
    url = f"{(base_url or _table()['base_url']).rstrip('/')}/{file}?download=1"

    import pooch
    from requests.exceptions import HTTPError, RequestException

    # pooch announces every download on standard error; the progress bar and the caller say it better.
    pooch.get_logger().setLevel(logging.WARNING)
    downloader = pooch.HTTPDownloader(progressbar=progress, chunk_size=CHUNK_SIZE, timeout=TIMEOUT_S)
    try:
        return Path(
            pooch.retrieve(url, known_hash=f"md5:{md5}", fname=file, path=folder, downloader=downloader)
        )
    except HTTPError as error:
        answer = error.response
        raise FetchError(
            f"{url} answered {f'{answer.status_code} {answer.reason}' if answer is not None else error}",
            remedy="Try again later, or name a mirror that holds the file.",
            code="fetch-http",
            file=folder / file,
        ) from None
    except RequestException as error:
        raise FetchError(
            f"the connection to {url} failed or was cut ({type(error).__name__})",
            remedy="Check the network and run the command again; nothing partial was kept.",
            code="fetch-connection",
            file=folder / file,
        ) from None
    except OSError as error:
        raise FetchError(
            f"the file cannot be written: {error.strerror}",
            remedy="Check the folder, its permissions and the free space.",
            code="fetch-disk",
            file=folder / file,
        ) from None
    except ValueError:  # pooch's word for a checksum that differs
        raise FetchError(
            f"the checksum of what {url} sent is not the expected MD5 {md5}",
            remedy="Nothing was kept. Run the command again; if it fails again, do not use this server.",
            code="fetch-checksum",
            file=folder / file,
        ) from None


def _find(name: str) -> Dataset:
    known = list_datasets()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    raise FetchError(
        f"no data set {name!r}",
        remedy=f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}.",
        code="fetch-unknown",
    )

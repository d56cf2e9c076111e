"""The files of a registered version, read from the registry one by one, each up to a limit.

Whoever may write to the registry chooses what a version's files are called, how large they are said to be,
and where they lie. So names and sizes are judged before anything moves, and what moves is counted.
"""

from __future__ import annotations

import hashlib
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import quote, urlsplit

from qkt_clinical.common.files import CHUNK_SIZE, plain_file
from qkt_clinical.records.card import CARD, WEIGHTS, Card
from qkt_clinical.records.decisions import site_of
from qkt_clinical.records.registered import (
    BESIDE,
    CHECKS,
    MLMODEL,
    Entries,
    UnsoundVersion,
    check_beside,
    check_places,
    data_folder,
    digest_of,
    list_files,
    plain_entries,
    read_mlmodel,
    size_limit,
    unsound,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from requests import Response

HOPS = 3
"""A version names a logged model, and that one its folder."""
STORES = {"s3", "gs", "wasb", "wasbs", "abfs", "abfss"}
"""Stores of objects whose own client holds the keys; MLflow's client is not sent to any other address."""
UNLISTED = (KeyError, TypeError, ValueError, AttributeError)
"""What MLflow raises on an answer of a server that is no list of files."""


class _Store(Protocol):
    def entries(self, folder: str) -> Entries:
        """Entries of a folder."""

    def pieces(self, place: str) -> Iterator[bytes]:
        """A file's content, in chunks."""


class _Folder(NamedTuple):
    """Files on this machine. Links, and what is no plain file, are refused rather than followed."""

    root: Path

    def entries(self, folder: str) -> Entries:
        return plain_entries(self.root, folder)

    def pieces(self, place: str) -> Iterator[bytes]:
        with plain_file(self.root / place) as stream:
            while chunk := stream.read(CHUNK_SIZE):
                yield chunk


class _Remote(NamedTuple):
    """Files that MLflow's client lists; an MLflow server streams them, other stores' go by a passing file."""

    store: Any

    def entries(self, folder: str) -> Entries:
        try:
            found = self.store.list_artifacts(folder or None)
            return [(str(f.path), None if f.is_dir else int(f.file_size or 0)) for f in found]
        except UNLISTED:
            raise unsound("its files cannot be listed") from None

    def pieces(self, place: str) -> Iterator[bytes]:
        from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

        if not isinstance(self.store, HttpArtifactRepository):
            with tempfile.TemporaryDirectory() as folder:
                got = Path(self.store.download_artifacts(place, folder))
                yield from _Folder(got.parent).pieces(got.name)
            return
        creds = get_default_host_creds(self.store.artifact_uri)  # type: ignore[no-untyped-call]
        asked: Response = http_request(creds, f"/{quote(place)}", "GET", stream=True)  # type: ignore[no-untyped-call]
        with closing(asked) as answer:
            answer.raise_for_status()
            yield from answer.iter_content(chunk_size=CHUNK_SIZE)


def _address(client: MlflowClient, model: str, number: str) -> str:
    """Address of a version's files."""
    found = str(client.get_model_version_download_uri(model, number))
    for _ in range(HOPS):
        if urlsplit(found).scheme != "models":
            return found
        named = urlsplit(found).path.strip("/").split("/")
        if len(named) != 1:
            break
        found = str(client.get_logged_model(named[0]).artifact_location)
    raise unsound("its files lie nowhere")


def _open_store(client: MlflowClient, model: str, number: str) -> _Store:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.utils.file_utils import local_file_uri_to_path

    address = _address(client, model, number)
    parts, server = urlsplit(address), urlsplit(client.tracking_uri)
    if parts.scheme in ("mlflow-artifacts", "http", "https"):
        # MLflow sends name and password along; a version may not say to whom.
        if parts.netloc not in ("", server.netloc) or server.scheme not in ("http", "https"):
            raise unsound("its files lie with another server")
        return _Remote(get_artifact_repository(address, tracking_uri=client.tracking_uri))
    if parts.scheme in STORES:
        return _Remote(get_artifact_repository(address, tracking_uri=client.tracking_uri))
    if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost"):
        raise unsound(f"its files lie in a store of another kind: {parts.scheme[:20]!r}")
    place: str = local_file_uri_to_path(address)  # type: ignore[no-untyped-call]
    return _Folder(Path(place).resolve())


class VersionFiles:
    """The files of one version of a model, named as in MLflow.

    Args:
        client: an open client, see :func:`qkt_clinical.tracking.client.connect`.
        model: ``teacher.<site>`` or ``student.<site>.<query>``.
        number: of the version.

    Raises:
        RegistryError: a name that is none.
        UnsoundVersion: the files lie where no client of ours goes, or are not ours by name or size.
        QktError: MLflow cannot be reached or refuses, code ``mlflow``.
    """

    def __init__(self, client: MlflowClient, model: str, number: str) -> None:
        self.data = data_folder(model)
        self.model, self.number = model, number
        with self._named():
            self._store = _open_store(client, model, number)
            self.listed = dict(list_files(self._store.entries, self.data))
            check_places(self.listed, self.data)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors within the block name the version and its site."""
        try:
            yield
        except UnsoundVersion as error:
            if error.where.site is None:
                error.message = f"version {self.number} of {self.model}: {error.message}"
            raise error.at(site=site_of(self.model)) from None

    def pieces(self, place: str, max_bytes: int | None = None) -> Iterator[bytes]:
        """A file's content, in chunks.

        Args:
            place: as in ``listed``.
            max_bytes: bytes at most; None for what such a file may have.

        Raises:
            UnsoundVersion: there is no such file, or it is larger; codes ``bundle-missing``, ``bundle-size``.
        """
        limit = size_limit(place, self.data)
        with self._named():
            if place not in self.listed or limit is None:
                raise unsound(f"{place} is missing", "bundle-missing")
            left = max_bytes = limit if max_bytes is None else min(max_bytes, limit)
            if self.listed[place] > max_bytes:
                raise unsound(f"{place} has {self.listed[place]} bytes, more than {max_bytes}", "bundle-size")
            for chunk in self._store.pieces(place):
                left -= len(chunk)
                if left < 0:
                    raise unsound(f"{place} is larger than the registry says", "bundle-size")
                yield chunk

    def read(self, place: str) -> bytes:
        """A small file's content."""
        return b"".join(self.pieces(place))

    def save(self, place: str, target: Path, max_bytes: int | None = None) -> str:
        """Write a file to ``target`` in one step; SHA-256 of the bytes written."""
        target.parent.mkdir(parents=True, exist_ok=True)
        passing = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
        total = hashlib.sha256()
        try:
            with passing.open("xb") as stream:
                for chunk in self.pieces(place, max_bytes):
                    total.update(chunk)
                    stream.write(chunk)
            passing.replace(target)
        finally:
            passing.unlink(missing_ok=True)
        return total.hexdigest()

    def digest(self, place: str) -> str:
        """SHA-256 of a file."""
        total = hashlib.sha256()
        for chunk in self.pieces(place):
            total.update(chunk)
        return total.hexdigest()

    def check(self, digest: str, known: Mapping[str, str] | None = None, target: Path | None = None) -> None:
        """Hold every file against what this package registers, and the bundle against its digest.

        Args:
            digest: of the bundle's folder, from a record.
            known: SHA-256 of files of the bundle that were fetched before, by name within the bundle.
            target: an empty folder that all files are written to.

        Raises:
            UnsoundVersion: codes ``version-loader``, ``version-digest``, ``bundle-size``.
        """
        with self._named():
            self._check_beside(target)
            self._check_sizes()
            found = digest_of(dict(self._digests(known or {}, target)))
            if found != digest:
                raise unsound(
                    f"its files have digest {found}, registered is {digest[:100]!r}", "version-digest"
                )

    def _check_beside(self, target: Path | None) -> None:
        for place in BESIDE:
            if place not in self.listed:
                continue
            if place in CHECKS:
                content = self.read(place)
                check_beside(place, content, self.data)
                if place == MLMODEL:
                    self._check_named(content)
                if target is not None:
                    (target / place).write_bytes(content)
            elif target is not None:
                self.save(place, target / place)

    def _check_named(self, content: bytes) -> None:
        """Refuse the files of another model: a card speaks of one alone."""
        card = (read_mlmodel(content).get("metadata") or {}).get("model_card") or {}
        if not isinstance(card, dict) or card.get("name", self.model) != self.model:
            raise unsound("its model card is that of another model", "version-loader")

    def _check_sizes(self) -> None:
        """Hold weights against their cards before they are fetched."""
        for place, size in self.listed.items():
            folder, _, name = place.rpartition("/")
            if name != WEIGHTS:
                continue
            try:
                said = Card.model_validate_json(self.read(f"{folder}/{CARD}")).weights.bytes
            except ValueError:
                raise unsound(f"{folder}/{CARD} is no card", "bundle-card") from None
            if said != size:
                raise unsound(f"{place} has {size} bytes, {said} by its card", "bundle-size")

    def _digests(self, known: Mapping[str, str], target: Path | None) -> Iterator[tuple[str, str]]:
        for place in self.listed:
            if not place.startswith(f"{self.data}/"):
                continue
            name = place.removeprefix(f"{self.data}/")
            if target is not None:
                yield name, self.save(place, target / place)
            else:
                yield name, known.get(name) or self.digest(place)

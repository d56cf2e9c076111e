"""Stage ``ingest``: a site's files to a prepared site."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.catalog import SPLITS
from qkt_clinical.config import Params, SiteConfig, Workspace, load_site, site_folder
from qkt_clinical.data import Images, Manifest, load_prepared, write_prepared
from qkt_clinical.errors import FileRejected, PreparedError, SourceError
from qkt_clinical.ingest.arrays import Picture, in_words, prepare
from qkt_clinical.ingest.codes import REASONS, quiet, reject
from qkt_clinical.ingest.columns import Lookup, check_columns
from qkt_clinical.ingest.integrity import render_integrity
from qkt_clinical.ingest.leakage import Crossing, Hashes, across_sites, hashes_of, same_pixels
from qkt_clinical.ingest.source import (
    Header,
    Listing,
    Outcome,
    Reading,
    Refusal,
    Request,
    Sample,
    SourceFile,
    list_files,
    suffix,
)
from qkt_clinical.ingest.splits import assign, keep_given
from qkt_clinical.seeding import derive

MEGABYTE = 1_000_000
FACE = "facial-surface"
"""Risk of an image from which a face could be rendered."""


# --- names that carry no patient data -------------------------------------------------------------


def read_salt(folder: Path) -> bytes:
    """The site's secret salt ``.salt``, made on first use (readable by its owner alone).

    It makes patient and file ids of one site useless to anyone else; it never leaves the site.

    Raises:
        SourceError: the file holds too little.
    """
    path = folder / ".salt"
    if not path.exists():
        part = path.with_name(f".salt.{os.getpid()}.part")
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(secrets.token_hex(16) + "\n")
        try:
            os.link(part, path)  # fails if another process was faster: both then use that one
        except FileExistsError:
            pass
        finally:
            part.unlink()
    salt = path.read_bytes().strip()
    if len(salt) < 32:
        raise SourceError(
            "the salt is shorter than 32 characters",
            remedy="Delete the file: a new one is made, and every patient gets a new id.",
            stage="ingest",
            site=folder.name,
            file=path,
        )
    return salt


def salted(salt: bytes, *words: str) -> str:
    """First 16 hexadecimal digits of HMAC-SHA256(salt, words)."""
    text = "\0".join(words).encode("utf-8", "surrogateescape")
    return hmac.new(salt, text, hashlib.sha256).hexdigest()[:16]


def file_id(salt: bytes, name: str) -> str:
    """A file's name in ``integrity.json``: a salted hash of its path, and its ending if it is a known one."""
    return salted(salt, "file", name) + suffix(name)


def locate(root: Path, site: str) -> dict[str, str]:
    """At the site itself: file id of ``integrity.json`` to path relative to the source folder."""
    config = load_site(root, site)
    if config.source.kind == "phantom":
        return {}
    salt = read_salt(site_folder(root, site))
    listing = _list(config, _source_path(root, config))
    files = [*listing.files, *(f for refusal in listing.refused for f in refusal.files)]
    return {file_id(salt, file.name): file.name for file in files}


def find_crossings(root: Path, sites: Sequence[str]) -> list[Crossing]:
    """Where one of these hospitals trains on pixels that another one is tested on, by hashes alone.

    Raises:
        PreparedError: a site is not prepared.
    """
    found = {}
    for site in sites:
        folder = Workspace(root).prepared(site)
        splits = load_prepared(folder).splits
        try:
            hashes = np.load(folder / "hashes.npy", allow_pickle=False)
        except (OSError, ValueError):
            raise PreparedError(
                "no hashes", remedy="Run 'qkt ingest' for this site again.", site=site, file=folder
            ) from None
        found[site] = (hashes, splits["train"], splits["test"])
    return list(across_sites(found))


# --- the source -----------------------------------------------------------------------------------


def _source_path(root: Path, config: SiteConfig) -> Path:
    path = site_folder(root, config.name) / config.source.path
    if not path.exists():
        raise SourceError(
            f"no source at {config.source.path}",
            remedy="Put the files there, or make it a link to the folder where they are.",
            stage="ingest",
            site=config.name,
            file=Path("hospitals") / config.name / config.source.path,
        )
    return path


def _list(config: SiteConfig, path: Path) -> Listing:
    """The files to read; a source may also be one file."""
    if path.is_dir():
        return list_files(path, config.source.kind)
    return Listing([SourceFile(path.name, path.resolve())], [])


def _read(config: SiteConfig, files: list[SourceFile], request: Request) -> Reading:
    kind = config.source.kind
    if kind == "dicom":
        from qkt_clinical.ingest import dicom

        return dicom.read(files, request)
    if kind == "nifti":
        from qkt_clinical.ingest import nifti

        return nifti.read(files, request)
    if kind == "images":
        from qkt_clinical.ingest import images

        return images.read(files, request)
    if kind == "phantom":
        from qkt_clinical.ingest import phantom

        return phantom.read(request)
    from qkt_clinical.ingest import npz

    if len(files) > 1:
        raise SourceError(
            f"{len(files)} npz files, expected one",
            remedy="Name the file in source.path, such as data/images.npz.",
            stage="ingest",
            site=config.name,
        )
    return npz.read(files, request) if files else Reading(0, iter(()))


# --- the images on their way to disk ----------------------------------------------------------------


class Stack:
    """Prepared images, written to a scratch file one after the other.

    The file holds uint8 as long as every image does; the first float32 image turns it into float32, the
    8-bit ones becoming 0..1. So the result does not depend on which came first.
    """

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.stream = stream
        self.path = path
        self.count = 0
        self.shape: tuple[int, ...] | None = None
        self.dtype: type[np.uint8] | type[np.float32] = np.uint8

    def append(self, image: NDArray[np.uint8] | NDArray[np.float32]) -> None:
        """Add one image; all have one shape."""
        self.shape = image.shape
        if image.dtype == np.float32 and self.dtype is np.uint8:
            self._widen()
        if image.dtype != self.dtype:
            image = _as_float(image)
        self.stream.write(np.ascontiguousarray(image).data)
        self.count += 1

    def _widen(self) -> None:
        if self.count:
            narrow = np.array(self._open(np.uint8, "r"))
            self.stream.seek(0)
            for image in narrow:
                self.stream.write(_as_float(image).data)
        self.dtype = np.float32

    def _open(self, dtype: type[Any], mode: Any) -> NDArray[Any]:
        self.stream.flush()
        return np.memmap(self.path, dtype=dtype, mode=mode, shape=(self.count, *(self.shape or ())))

    def images(self, keep: list[int]) -> Images:
        """The images at these ascending positions, memory-mapped; the others are overwritten."""
        stored = self._open(self.dtype, "r+")
        for new, old in enumerate(keep):
            if new != old:
                stored[new] = stored[old]
        return stored[: len(keep)]


def _as_float(image: NDArray[Any]) -> NDArray[np.float32]:
    return np.ascontiguousarray(image.astype(np.float32) / np.float32(255))


@contextmanager
def _stack(scratch: Path, site: str) -> Iterator[Stack]:
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / f"ingest-{site}-{os.getpid()}.part"
    try:
        with path.open("w+b") as stream:
            yield Stack(stream, path)
    finally:
        path.unlink(missing_ok=True)


@dataclass
class _Gathered:
    """What has been accepted so far, in the order of the stack."""

    labels: list[int] = field(default_factory=list)
    patients: list[str] = field(default_factory=list)
    given: list[str] = field(default_factory=list)
    files: list[tuple[SourceFile, ...]] = field(default_factory=list)
    headers: list[Header | None] = field(default_factory=list)
    spacings: list[tuple[float, ...] | None] = field(default_factory=list)
    by_pixels: dict[bytes, int] = field(default_factory=dict)
    withdrawn: set[int] = field(default_factory=set)
    copies: dict[int, list[tuple[SourceFile, ...]]] = field(default_factory=dict)
    """Position of an accepted image to the files refused as copies of it."""
    refusals: list[Refusal] = field(default_factory=list)


# --- the stage --------------------------------------------------------------------------------------


def ingest_site(
    root: Path, site: str, params: Params, *, progress: Callable[[int, int], None] | None = None
) -> Manifest:
    """Read a site's files and write its prepared site, ``data/prepared/<site>/``.

    The same files, site.yaml, params and salt give the same bytes, in whatever order the file system
    lists them. Files that cannot be used are recorded with a reason code and the rest goes on.

    Args:
        root: the workspace.
        site: folder name below ``hospitals/``.
        params: ``seed``, ``classes`` and ``ingest`` are used.
        progress: called with steps done and steps in all (files; images of an npz file).

    Raises:
        ConfigError: site.yaml, or a table that it names, cannot be used.
        SourceError: no source, or not one usable image in it.
    """
    config = load_site(root, site)
    folder = site_folder(root, site)
    check_columns(config, params.classes, folder / "site.yaml")
    workspace = Workspace(root)
    salt = read_salt(folder)
    request = Request(
        spec=config.image,
        tags=tuple(sorted({c.tag for c in (config.label, config.patient) if c.tag is not None})),
        max_bytes=params.ingest.max_file_mb * MEGABYTE,
        site=site,
        seed=params.seed,
        salt=salt,
        burned_in=config.burned_in == "accept",
    )
    if config.source.kind == "phantom":
        source, listing = folder, Listing([], [])
    else:
        path = _source_path(root, config)
        source, listing = path if path.is_dir() else path.parent, _list(config, path)
    label = Lookup(config.label, "label", source, site=site)
    patient = Lookup(config.patient, "patient", source, site=site)
    with _stack(workspace.scratch, site) as stack, quiet():
        reading = _read(config, listing.files, request)
        gathered = _Gathered(refusals=list(listing.refused))
        done = 0
        for outcome in reading.outcomes:
            done += 1 if outcome.item is not None else len(outcome.files)
            _take(outcome, config, params, label, patient, stack, gathered)
            if progress is not None:
                progress(min(done, reading.total), reading.total)
        kept = [i for i in range(stack.count) if i not in gathered.withdrawn]
        integrity = _integrity(config, listing.files, gathered, kept, salt)
        if not kept:
            raise _nothing(site, integrity)
        labels = np.array([gathered.labels[i] for i in kept], dtype=np.int64)
        headers = [gathered.headers[i] for i in kept]
        faces = sum(h is not None and h.face for h in headers)
        patients = [gathered.patients[i] for i in kept]
        splits = _split(config, params, patients, labels, [gathered.given[i] for i in kept])
        images, groups = stack.images(kept), np.array([salted(salt, p) for p in patients], dtype=np.str_)
        hashes = hashes_of(images)
        _refuse_copies(hashes, groups, splits, site)
        return write_prepared(
            workspace.prepared(site),
            site=site,
            source_kind=config.source.kind,
            classes=params.classes,
            images=images,
            labels=labels,
            groups=groups,
            splits=splits,
            spacing_mm=config.image.spacing_mm,
            normalisation=config.image.normalisation,
            transforms=in_words(config.image),
            integrity=integrity,
            headers=[None if h is None else dict(h.kept) for h in headers],
            risks={FACE: faces} if faces else {},
            hashes=hashes,
            page=lambda manifest: render_integrity(
                manifest,
                images,
                labels,
                groups,
                splits,
                hashes,
                integrity,
                [gathered.spacings[i] for i in kept],
            ),
        )


def _take(
    outcome: Outcome,
    config: SiteConfig,
    params: Params,
    label: Lookup,
    patient: Lookup,
    stack: Stack,
    gathered: _Gathered,
) -> None:
    """Accept one sample, or note why not."""
    if isinstance(outcome, Refusal):
        gathered.refusals.append(outcome)
        return
    try:
        kind = _class_of(label(outcome), config, params)
        owner = patient(outcome)
        image = prepare(outcome.picture, config.image)
        _refuse_copy(outcome, kind, gathered, stack.count)
    except FileRejected as rejected:
        gathered.refusals.append(Refusal(outcome.files, rejected.code, outcome.item))
        return
    stack.append(image)
    gathered.labels.append(kind)
    gathered.patients.append(owner)
    gathered.given.append(outcome.split or "")
    gathered.files.append(outcome.files)
    gathered.headers.append(outcome.header)
    gathered.spacings.append(outcome.picture.spacing_mm)


def _refuse_copies(
    hashes: Hashes, groups: NDArray[np.str_], splits: dict[str, NDArray[np.int64]], site: str
) -> None:
    """Refuse a site of which two splits hold the same prepared pixels.

    Copies among the files are left out one by one before; these became alike only when prepared.

    Raises:
        SourceError: ``pixels-in-two-splits``, naming salted patient ids.
    """
    owners = sorted(
        {str(groups[i]) for pair in same_pixels(hashes, [splits[s] for s in SPLITS]) for i in pair}
    )
    if owners:
        raise SourceError(
            f"the same pixels in two splits, of patients {', '.join(owners[:20])}",
            remedy="Give both copies one patient id, or leave one of them out.",
            code="pixels-in-two-splits",
            stage="ingest",
            site=site,
        )


def _class_of(word: str, config: SiteConfig, params: Params) -> int:
    """Index of a site's word in the federation's classes.

    Raises:
        FileRejected: ``label-unknown``.
    """
    if config.source.kind == "npz" and not config.label_map:
        index = int(word)
        if not 0 <= index < len(params.classes):
            raise reject("label-unknown")
        return index
    name = config.label_map.get(word, word)
    if name not in params.classes:
        raise reject("label-unknown")
    return params.classes.index(name)


def _refuse_copy(sample: Sample, kind: int, gathered: _Gathered, position: int) -> None:
    """Refuse pixels that were accepted before; if the labels differ, withdraw the earlier one too.

    One image in two splits, or under two labels, would spoil every figure measured on it.

    Raises:
        FileRejected: ``duplicate`` or ``duplicate-conflict``.
    """
    earlier = gathered.by_pixels.setdefault(_fingerprint(sample.picture), position)
    if earlier == position:
        return
    if gathered.labels[earlier] != kind and earlier not in gathered.withdrawn:
        gathered.withdrawn.add(earlier)
        for files in (gathered.files[earlier], *gathered.copies.get(earlier, ())):
            gathered.refusals.append(Refusal(files, "duplicate-conflict"))
    if earlier in gathered.withdrawn:
        raise reject("duplicate-conflict")
    gathered.copies.setdefault(earlier, []).append(sample.files)
    raise reject("duplicate")


def _fingerprint(picture: Picture) -> bytes:
    pixels = picture.pixels
    pixels = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("="))
    total = hashlib.sha256(f"{pixels.shape} {pixels.dtype} {picture.inverted}".encode())
    total.update(pixels.data)
    return total.digest()


def _split(
    config: SiteConfig, params: Params, patients: list[str], labels: NDArray[np.int64], given: list[str]
) -> dict[str, NDArray[np.int64]]:
    fractions = {s: float(getattr(params.ingest.splits, s)) for s in SPLITS}
    seed = derive(params.seed, "ingest", config.name)
    if config.splits == "given":
        return keep_given(given, patients, labels, fractions, seed, site=config.name)
    return assign(patients, labels, fractions, seed)


def _integrity(
    config: SiteConfig, files: list[SourceFile], gathered: _Gathered, kept: list[int], salt: bytes
) -> list[dict[str, Any]]:
    """One row per file, sorted by id, and one per rejected image of a file that holds many."""
    codes: dict[SourceFile, str | None] = {file: None for i in kept for file in gathered.files[i]}
    items: list[tuple[SourceFile | None, str, str]] = []
    for refusal in gathered.refusals:
        if refusal.item is not None:
            items.append((refusal.files[0] if refusal.files else None, refusal.item, refusal.code))
        else:
            codes.update(dict.fromkeys(refusal.files, refusal.code))
    # The reader never names the .img of a pair, nor an npz file of which every image was rejected.
    missing = [file for file in files if file not in codes]
    if config.source.kind == "npz":
        codes.update(dict.fromkeys(missing, None))
    rows = [_row(config, file_id(salt, file.name), code) for file, code in codes.items()]
    for owner, item, code in items:
        rows.append({**_row(config, "" if owner is None else file_id(salt, owner.name), code), "item": item})
    return sorted(rows, key=lambda row: (row["file"], row.get("item", "")))


def _row(config: SiteConfig, file: str, code: str | None) -> dict[str, Any]:
    return {"file": file, "accepted": code is None, "code": code, "kind": config.source.kind}


def _nothing(site: str, integrity: list[dict[str, Any]]) -> SourceError:
    counts = Counter(row["code"] for row in integrity if not row["accepted"])
    if not counts:
        return SourceError(
            "the source holds no file of its kind",
            remedy="Check source.kind and source.path in site.yaml.",
            stage="ingest",
            site=site,
        )
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return SourceError(
        "no usable image: " + ", ".join(f"{n} {code} ({REASONS[code].meaning})" for code, n in ranked),
        remedy=REASONS[ranked[0][0]].remedy,
        stage="ingest",
        site=site,
    )

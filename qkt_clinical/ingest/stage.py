"""Stage ``ingest``: a site's files to a prepared site."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.catalog import HELD_BACK, SPLITS
from qkt_clinical.common.files import new_folder, write_json
from qkt_clinical.common.seeding import derive
from qkt_clinical.config.loading import load_site
from qkt_clinical.config.params import Params
from qkt_clinical.config.site import SiteConfig
from qkt_clinical.config.workspace import Workspace, site_folder
from qkt_clinical.data.integrity import (
    INTEGRITY,
    FileOutcome,
    read_integrity,
    rejected_by_code,
    write_integrity,
)
from qkt_clinical.data.prepared import (
    Consent,
    Manifest,
    load_held_back,
    load_prepared,
    read_manifest,
    write_prepared,
)
from qkt_clinical.errors import FileRejected, PreparedError, SourceError
from qkt_clinical.ingest.arrays import in_words
from qkt_clinical.ingest.codes import REASONS, quiet, reject
from qkt_clinical.ingest.columns import SiteColumns, check_columns, site_columns
from qkt_clinical.ingest.decode import decoded
from qkt_clinical.ingest.deidentify import salted
from qkt_clinical.ingest.held_back import HeldBackCheck, groups_among, held_back_folder, list_held_back
from qkt_clinical.ingest.identity import PLACEHOLDERS, normal_name, normal_patient
from qkt_clinical.ingest.integrity import render_integrity
from qkt_clinical.ingest.leakage import Crossing, Hashes, Held, across_sites, same_pixels
from qkt_clinical.ingest.listing import Listing, list_files
from qkt_clinical.ingest.readers import reader_of, suffix
from qkt_clinical.ingest.readers.base import Reader
from qkt_clinical.ingest.readers.elements import tag_of
from qkt_clinical.ingest.source import Decoded, Ready, Refusal, Request, SourceFile, whole_file
from qkt_clinical.ingest.splits import assign, empty_splits, keep_given
from qkt_clinical.ingest.store import ScratchStore, Stack, recipe
from qkt_clinical.ingest.subgroups import pooled

MEGABYTE = 1_000_000
FACE = "facial-surface"
"""Risk of an image from which a face could be rendered."""
UNKNOWN_PATIENTS = "patients-unknown"


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
    try:
        salt = whole_file(path.resolve(), MEGABYTE).strip()
    except FileRejected as rejected:
        raise SourceError(
            f"the salt cannot be read: {rejected.message}",
            remedy="It is a text file of one line, readable by its owner: bring it back from a copy.",
            stage="ingest",
            site=folder.name,
            file=path,
        ) from None
    if len(salt) < 32:
        raise SourceError(
            "the salt is shorter than 32 characters",
            remedy="Delete the file: a new one is made, and every patient gets a new id.",
            stage="ingest",
            site=folder.name,
            file=path,
        )
    return salt


def file_id(salt: bytes, name: str) -> str:
    """A file's name in ``integrity.json``: a salted hash of its path, and its ending if it is a known one."""
    return salted(salt, "file", name) + suffix(name)


def locate(root: Path, site: str) -> dict[str, str]:
    """At the site itself: file id of ``integrity.json`` to path relative to the source folder."""
    config = load_site(root, site)
    folder = site_folder(root, site)
    reader = reader_of(config.source.kind, site=site, file=folder / "site.yaml")
    if not reader.has_files:
        return {}
    salt = read_salt(folder)
    listings = _source(root, config, reader)[1:]
    files = [
        file
        for listing in listings
        for file in (*listing.files, *(f for refusal in listing.refused for f in refusal.files))
    ]
    return {file_id(salt, file.name): file.name for file in files}


def find_crossings(root: Path, sites: Sequence[str]) -> list[Crossing]:
    """Where one of these hospitals trains on what another one is tested on, by hashes and salted ids alone.

    Raises:
        PreparedError: a site is not prepared.
    """
    found = {}
    for site in sites:
        folder = Workspace(root).prepared(site)
        prepared = load_prepared(folder)
        hashes, patients, test = _hashes(folder, site), prepared.groups, prepared.splits["test"]
        apart = load_held_back(Workspace(root).held_back(site))
        if apart is not None:  # tested on like the test split
            test = np.concatenate([test, len(patients) + apart.splits[HELD_BACK]])
            hashes = np.concatenate([hashes, _hashes(apart.folder, site)])
            patients = np.concatenate([patients, apart.groups])
        found[site] = Held(hashes, patients, prepared.splits["train"], test)
    return list(across_sites(found))


def _hashes(folder: Path, site: str) -> Hashes:
    try:
        hashes: Hashes = np.load(folder / "hashes.npy", allow_pickle=False)
    except (OSError, ValueError):
        raise PreparedError(
            "no hashes", remedy="Run 'qkt ingest' for this site again.", site=site, file=folder
        ) from None
    return hashes


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


def _list(config: SiteConfig, path: Path, held_back: Path | None) -> Listing:
    """The files to read; a source may also be one file."""
    if path.is_dir():
        return list_files(path, config.source.kind, held_back=held_back)
    if not path.is_file():
        return Listing([], [Refusal((SourceFile(path.name, str(path)),), "not-a-file")])
    return Listing([SourceFile(path.name, str(path.resolve()))], [])


class _Source(NamedTuple):
    """The folder from which names of files count, the files, and those that are held back."""

    folder: Path
    listing: Listing
    held_back: Listing


def _source(root: Path, config: SiteConfig, reader: Reader) -> _Source:
    """What a site's source holds.

    Raises:
        SourceError: no source, several files where one is wanted, or no folder as ``held_back`` names it.
    """
    nothing = Listing([], [])
    if not reader.has_files:
        return _Source(site_folder(root, config.name), nothing, nothing)
    path = _source_path(root, config)
    folder = path if path.is_dir() else path.parent
    apart = held_back_folder(config, folder, whole=path.is_dir())
    listing = _list(config, path, apart)
    held_back = nothing
    if apart is not None and config.held_back is not None:
        held_back = list_held_back(apart, config.held_back, reader.kind)
    for files in (listing.files, held_back.files):
        if reader.one_file and len(files) > 1:
            raise SourceError(
                f"{len(files)} {reader.kind} files, expected one",
                remedy=f"Name the file in source.path, such as data/images{reader.suffixes[0]}.",
                stage="ingest",
                site=config.name,
            )
    return _Source(folder, listing, held_back)


@dataclass
class _Gathered:
    """What has been accepted so far; one entry each in the order in which it came."""

    numbers: list[int] = field(default_factory=list)
    """In the store."""
    labels: list[int] = field(default_factory=list)
    patients: list[str] = field(default_factory=list)
    given: list[str] = field(default_factory=list)
    files: list[tuple[SourceFile, ...]] = field(default_factory=list)
    hashes: list[tuple[int, int]] = field(default_factory=list)
    faces: list[bool] = field(default_factory=list)
    subgroups: list[list[str]] = field(default_factory=list)
    """A group for every column."""
    eight_bit: bool = True
    """Whether every image is."""
    spacings: list[tuple[float, ...] | None] = field(default_factory=list)
    prints: list[str] = field(default_factory=list)
    by_pixels: dict[str, int] = field(default_factory=dict)
    withdrawn: set[int] = field(default_factory=set)
    copies: dict[int, list[tuple[SourceFile, ...]]] = field(default_factory=dict)
    """Position of an accepted image to the files refused as copies of it."""
    refusals: list[Refusal] = field(default_factory=list)

    @property
    def kept(self) -> list[int]:
        """Positions of the images that stay accepted."""
        return [i for i in range(len(self.numbers)) if i not in self.withdrawn]


@dataclass(frozen=True)
class _Work:
    """What reads a site's files, be they held back or not."""

    config: SiteConfig
    params: Params
    reader: Reader
    request: Request
    classes: dict[str, int]
    """See :func:`_words`."""
    store: ScratchStore
    workers: int
    step: Callable[[int, int], Any]


# --- the stage --------------------------------------------------------------------------------------


def ingest_site(
    root: Path,
    site: str,
    params: Params,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Read a site's files and write its prepared site, ``data/prepared/<site>/``, and its consent beside it.

    The same files, site.yaml, params and salt give the same bytes, in whatever order the file system
    lists them and however many processes decode them. Files that cannot be used are recorded with a reason
    code and the rest goes on. What was decoded stays in the scratch folder, see
    :mod:`qkt_clinical.ingest.store`: an interrupted run goes on from there.

    Args:
        root: the workspace.
        site: folder name below ``hospitals/``.
        params: ``seed``, ``classes`` and ``ingest`` are used.
        workers: processes that decode, at most. With more than one, the caller's main module must be
            importable without effects (``if __name__ == "__main__":``).
        progress: called with steps done and steps in all (files, twice where headers are read first;
            images of an npz file).

    Raises:
        ConfigError: site.yaml, or a table that it names, cannot be used.
        SourceError: no source, not one usable image in it, or no room for the scratch file.
    """
    config = load_site(root, site)
    folder = site_folder(root, site)
    check_columns(config, params.classes, folder / "site.yaml")
    reader = reader_of(config.source.kind, site=site, file=folder / "site.yaml")
    workspace = Workspace(root)
    salt = read_salt(folder)
    request = _request(config, params, salt)
    source = _source(root, config, reader)
    files = source.listing.files
    columns = site_columns(config, source.folder, salt=salt, files=files)
    apart = _held_columns(config, source, salt)
    classes = _words(config, reader, params, salt)
    scratch = workspace.scratch / f"ingest-{site}.sqlite"
    made_by = recipe(request, reader) if reader.remembered else None
    with quiet(), ScratchStore(scratch, site=site, salt=salt, recipe=made_by) as store:
        step = progress or (lambda done, total: None)
        work = _Work(config, params, reader, request, classes, store, workers, step)
        gathered = _gather(work, source.listing, columns)
        held_back = None if apart is None else _gather(work, source.held_back, apart, _bar(work, gathered))
        store.tidy()
        if (place := workspace.held_back(site)).exists():
            _empty(place)  # those of the last run may be of patients who are trained on now
        consent = Consent(pictures=config.pictures)
        manifest, subgroups = _write(workspace, work, gathered, files, columns, consent)
        _empty(place)
        if held_back is not None:
            _write_held_back(workspace, work, held_back, source.held_back.files, columns, subgroups)
    return manifest


def _empty(folder: Path) -> None:
    """Leave an empty folder there."""
    with new_folder(folder):
        pass


def _request(config: SiteConfig, params: Params, salt: bytes) -> Request:
    return Request(
        spec=config.image,
        tags=tuple(sorted({c.tag for c in (config.label, config.patient) if c.tag is not None})),
        max_bytes=params.ingest.max_file_mb * MEGABYTE,
        site=config.name,
        seed=params.seed,
        salt=salt,
        burned_in=config.burned_in == "accept",
        subgroups=tuple(
            (n, c.tag, c.bands) for n, c in sorted(config.subgroups.items()) if c.tag is not None
        ),
    )


def _held_columns(config: SiteConfig, source: _Source, salt: bytes) -> SiteColumns | None:
    """What finds label, patient and groups of held-back images; None where there can be none."""
    if config.held_back is None:
        return None
    files = [*source.listing.files, *source.held_back.files]
    return site_columns(config, source.folder, salt=salt, files=files, below=f"{config.held_back}/")


def _gather(
    work: _Work, listing: Listing, columns: SiteColumns, bar: HeldBackCheck | None = None
) -> _Gathered:
    """Read the files and judge what they hold."""
    gathered = _Gathered(refusals=list(listing.refused))
    if not listing.files and work.reader.has_files:
        return gathered
    found = decoded(
        work.reader.kind, listing.files, work.request, work.store, workers=work.workers, step=work.step
    )
    for number, image in found:
        _take(number, image, work.classes, columns, gathered, bar)
    return gathered


def _bar(work: _Work, gathered: _Gathered) -> HeldBackCheck:
    kept = gathered.kept
    return HeldBackCheck.of(
        work.config,
        work.request.salt,
        patients={gathered.patients[i] for i in kept},
        labels={gathered.prints[i]: gathered.labels[i] for i in kept},
        pixels={gathered.hashes[i][0] for i in kept},
    )


def _write(
    workspace: Workspace,
    work: _Work,
    gathered: _Gathered,
    files: list[SourceFile],
    columns: SiteColumns,
    consent: Consent,
) -> tuple[Manifest, dict[str, NDArray[np.str_]]]:
    """Divide the accepted images among the splits and write them; the manifest, and each image's groups.

    Raises:
        SourceError: there is none, or two splits hold the same prepared pixels.
    """
    config, site, salt, kept = work.config, work.config.name, work.request.salt, gathered.kept
    outcomes = _outcomes(work.reader, files, gathered, kept, salt)
    if not kept:
        raise _nothing(site, outcomes)
    labels = np.array([gathered.labels[i] for i in kept], dtype=np.int64)
    patients = [gathered.patients[i] for i in kept]
    prints = [gathered.prints[i] for i in kept]
    unknown = _are_placeholders(config, patients, salt)
    if unknown:
        patients = [f"image {fingerprint}" for fingerprint in prints]
    splits = _split(
        config, work.params, _unsalted(config, patients, prints), labels, [gathered.given[i] for i in kept]
    )
    groups = np.array([salted(salt, p) for p in patients], dtype=np.str_)
    hashes = np.array([gathered.hashes[i] for i in kept], dtype=np.uint64)
    _refuse_copies(hashes, groups, splits, site)
    subgroups = {
        column.name: pooled(
            column.name,
            [gathered.subgroups[i][place] for i in kept],
            patients,
            banded=column.bands is not None,
            site=site,
        )
        for place, column in enumerate(columns.groups)
    }
    write_json(workspace.consent(site), consent.model_dump(mode="json"))
    manifest = _store(workspace.prepared(site), work, gathered, groups, splits, outcomes, subgroups, unknown)
    return manifest, subgroups


def _write_held_back(
    workspace: Workspace,
    work: _Work,
    gathered: _Gathered,
    files: list[SourceFile],
    columns: SiteColumns,
    known: Mapping[str, NDArray[np.str_]],
) -> None:
    """Write the held-back images; where none was accepted, only why.

    Args:
        known: groups of the site's other images.
    """
    folder, salt, kept = workspace.held_back(work.config.name), work.request.salt, gathered.kept
    outcomes = _outcomes(work.reader, files, gathered, kept, salt)
    if not kept:
        with new_folder(folder) as temporary:
            write_integrity(temporary, outcomes)
        return
    groups = np.array([salted(salt, gathered.patients[i]) for i in kept], dtype=np.str_)
    subgroups = {
        column.name: groups_among(
            [gathered.subgroups[i][place] for i in kept],
            known[column.name],
            banded=column.bands is not None,
        )
        for place, column in enumerate(columns.groups)
    }
    splits = {HELD_BACK: np.arange(len(kept))}
    _store(folder, work, gathered, groups, splits, outcomes, subgroups, 0)


def _store(
    folder: Path,
    work: _Work,
    gathered: _Gathered,
    groups: NDArray[np.str_],
    splits: dict[str, NDArray[np.int64]],
    outcomes: list[FileOutcome],
    subgroups: Mapping[str, NDArray[np.str_]],
    unknown: int,
) -> Manifest:
    """Write the accepted images; of ``unknown`` of them nobody knows the patient."""
    config, kept = work.config, gathered.kept
    labels = np.array([gathered.labels[i] for i in kept], dtype=np.int64)
    numbers = [gathered.numbers[i] for i in kept]
    faces = sum(gathered.faces[i] for i in kept)
    images = Stack(work.store, numbers, np.dtype(np.uint8 if gathered.eight_bit else np.float32))
    hashes = np.array([gathered.hashes[i] for i in kept], dtype=np.uint64)
    return write_prepared(
        folder,
        site=config.name,
        source_kind=config.source.kind,
        classes=work.params.classes,
        images=images,
        labels=labels,
        groups=groups,
        splits=splits,
        spacing_mm=config.image.spacing_mm,
        normalisation=config.image.normalisation,
        transforms=in_words(config.image),
        outcomes=outcomes,
        headers=map(work.store.header, numbers) if work.reader.keeps_headers else None,
        risks={k: n for k, n in ((FACE, faces), (UNKNOWN_PATIENTS, unknown)) if n},
        hashes=hashes,
        subgroups=subgroups,
        page=lambda manifest: render_integrity(
            manifest,
            images,
            labels,
            groups,
            splits,
            hashes,
            outcomes,
            [gathered.spacings[i] for i in kept],
        ),
        parts=tuple(splits),
    )


def held_back_counts(root: Path, site: str) -> tuple[int, int] | None:
    """Images that a site's last ingest held back for evaluation, and files that it rejected of these.

    None where site.yaml names no such images.
    """
    folder = Workspace(root).held_back(site)
    if not (folder / INTEGRITY).is_file():
        return None
    outcomes = read_integrity(folder)
    written = (folder / "manifest.json").is_file()
    images = read_manifest(folder).count if written else 0
    return images, sum(not o.accepted for o in outcomes)


def held_back_warnings(counts: tuple[int, int] | None) -> list[tuple[str, str]]:
    """Code and words of what a person should know of held-back images; ``counts`` of the function above."""
    if counts is None or counts[0]:
        return []
    return [
        (
            "held-back-empty",
            "no held-back image could be used: answers are judged on other hospitals' images. "
            "integrity.json in data/held_back/ says why.",
        )
    ]


def _take(
    number: int,
    found: Decoded,
    classes: dict[str, int],
    columns: SiteColumns,
    gathered: _Gathered,
    bar: HeldBackCheck | None,
) -> None:
    """Accept one image, or note why not."""
    if isinstance(found, Refusal):
        gathered.refusals.append(found)
        return
    try:
        word = columns.label(found)
        if word not in classes:
            raise reject("label-unknown")
        owner = columns.patient(found)
        if bar is not None:
            bar(found, classes[word], owner)
        _refuse_copy(found, classes[word], gathered)
    except FileRejected as rejected:
        gathered.refusals.append(Refusal(found.files, rejected.code, found.item))
        return
    gathered.numbers.append(number)
    gathered.labels.append(classes[word])
    gathered.patients.append(owner)
    gathered.given.append(found.split or "")
    gathered.files.append(found.files)
    gathered.prints.append(found.fingerprint)
    gathered.hashes.append(found.hashes)
    gathered.faces.append(found.face)
    gathered.subgroups.append([column(found) for column in columns.groups])
    gathered.eight_bit &= found.image.dtype == np.uint8
    gathered.spacings.append(found.spacing_mm)


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


def _are_placeholders(config: SiteConfig, patients: Sequence[str], salt: bytes) -> int:
    """The number of images, if one word of an anonymiser stands for the patients of them all; else 0.

    Nobody can tell these patients apart then. Taken for one they would leave every split but one empty, so
    that each image counts as a patient of its own, as with ``patient: {from: none}``, and people are told.
    """
    words: Iterable[str] = PLACEHOLDERS
    if config.patient.source == "tag":
        words = (salted(salt, "value", word) for word in PLACEHOLDERS)
    alike = len(patients) > 1 and len(set(patients)) == 1
    return len(patients) if alike and patients[0] in words else 0


def warnings_of(manifest: Manifest, fractions: Mapping[str, float]) -> list[tuple[str, str]]:
    """Code and words of what a person should know of a site that was taken: no error, but not well either.

    Args:
        manifest: of the site.
        fractions: wanted share of each split.
    """
    found = []
    if UNKNOWN_PATIENTS in manifest.risks:
        found.append(
            (
                UNKNOWN_PATIENTS,
                "one word of an anonymiser stands for the patients of all images, so that one patient's may "
                "stand in two splits and figures may be too good. Export with pseudonyms, or name a column "
                "of ids under patient in site.yaml.",
            )
        )
    empty = empty_splits(manifest.patients, fractions)
    return [*found, ("split-empty", empty)] if empty else found


def _words(config: SiteConfig, reader: Reader, params: Params, salt: bytes) -> dict[str, int]:
    """A site's words, as :class:`Lookup` gives them, to indices of the federation's classes."""
    if reader.numbers_classes and not config.label_map:
        return {str(index): index for index in range(len(params.classes))}
    words = {name: name for name in params.classes} | config.label_map
    if config.label.source == "tag":
        vr = tag_of(config.label.tag or "")[1]
        words = {salted(salt, "value", normal_patient(word, vr)): name for word, name in words.items()}
    else:
        words = {normal_name(word): name for word, name in words.items()}
    return {word: params.classes.index(name) for word, name in words.items()}


def _refuse_copy(found: Ready, kind: int, gathered: _Gathered) -> None:
    """Refuse pixels that were accepted before; if the labels differ, withdraw the earlier one too.

    One image in two splits, or under two labels, would spoil every figure measured on it.

    Raises:
        FileRejected: ``duplicate`` or ``duplicate-conflict``.
    """
    position = len(gathered.numbers)
    earlier = gathered.by_pixels.setdefault(found.fingerprint, position)
    if earlier == position:
        return
    if gathered.labels[earlier] != kind and earlier not in gathered.withdrawn:
        gathered.withdrawn.add(earlier)
        for files in (gathered.files[earlier], *gathered.copies.get(earlier, ())):
            gathered.refusals.append(Refusal(files, "duplicate-conflict"))
    if earlier in gathered.withdrawn:
        raise reject("duplicate-conflict")
    gathered.copies.setdefault(earlier, []).append(found.files)
    raise reject("duplicate")


def _unsalted(config: SiteConfig, patients: list[str], prints: list[str]) -> list[str]:
    """Names of patients by which to divide them: with a new salt, or at another place, as before.

    Ids from tags come salted; the least fingerprint of a patient's images stands for it.
    """
    if config.patient.source != "tag":
        return patients
    least: dict[str, str] = {}
    for patient, found in zip(patients, prints, strict=True):
        least[patient] = min(least.get(patient, found), found)
    return [least[patient] for patient in patients]


def _split(
    config: SiteConfig, params: Params, patients: list[str], labels: NDArray[np.int64], given: list[str]
) -> dict[str, NDArray[np.int64]]:
    fractions = {s: float(getattr(params.ingest.splits, s)) for s in SPLITS}
    seed = derive(params.seed, "ingest", config.name)
    if config.splits == "given":
        return keep_given(given, patients, labels, fractions, seed, site=config.name)
    return assign(patients, labels, fractions, seed)


def _outcomes(
    reader: Reader, files: list[SourceFile], gathered: _Gathered, kept: list[int], salt: bytes
) -> list[FileOutcome]:
    """One of every file, sorted by id, and one of every rejected image of a file that holds many."""
    codes: dict[SourceFile, str | None] = {file: None for i in kept for file in gathered.files[i]}
    items: list[tuple[SourceFile | None, str, str]] = []
    for refusal in gathered.refusals:
        if refusal.item is not None:
            items.append((refusal.files[0] if refusal.files else None, refusal.item, refusal.code))
        else:
            codes.update(dict.fromkeys(refusal.files, refusal.code))
    # Readers may name the first file of a unit alone, and none of which every image was rejected by itself.
    for unit in reader.units(files):
        first = next((codes[file] for file in unit.files if file in codes), None)
        codes |= {file: first for file in unit.files if file not in codes}

    def outcome(file: str, code: str | None, item: str | None = None) -> FileOutcome:
        return FileOutcome(file=file, accepted=code is None, code=code, kind=reader.kind, item=item)

    found = [outcome(file_id(salt, file.name), code) for file, code in codes.items()]
    found += [
        outcome("" if owner is None else file_id(salt, owner.name), code, item) for owner, item, code in items
    ]
    return sorted(found, key=lambda o: (o.file, o.item or ""))


def _nothing(site: str, outcomes: list[FileOutcome]) -> SourceError:
    counts = rejected_by_code(outcomes)
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

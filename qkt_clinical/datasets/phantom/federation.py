"""The phantom hospitals: their images, stains and scanners, file formats, and queries."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from qkt_clinical.catalog import BLOOD_CELLS, DEFAULT_BUDGET, LESIONS
from qkt_clinical.common.files import digest_bytes, new_folder, passing_file, write_json, write_text
from qkt_clinical.common.seeding import derive
from qkt_clinical.config.policy import OPEN_POLICY, POLICY
from qkt_clinical.datasets.phantom import ct, delivery, smear
from qkt_clinical.errors import ConfigError

VERSION = 5
"""Goes up when the same seed gives other files."""
STAMP = ".phantom.json"
HELD_BACK = "held-back"
"""Folder below ``data/`` with images for evaluation alone, at hospitals that ask."""
NAMES_HELD_BACK = re.compile(rf"^held_back: *{HELD_BACK}$", re.MULTILINE)
HELD_BACK_IMAGES = 60
"""Of every class that a hospital asks for, at its default number of images."""
FEWEST_HELD_BACK = 8
FIRST_HELD_BACK = 5000
"""Number of the first patient of whom an image is held back, at least."""
MIN_IMAGES = 20
"""Below this a hospital could not have ten patients and a rare class."""

Dims = Literal[2, 3]


@dataclass(frozen=True)
class PhantomHospital:
    """One phantom hospital."""

    words: dict[str, str]
    """Class to the hospital's own word for it."""
    shares: tuple[float, ...]
    """Of the images, per class in the order of ``words``; a rare class has 0."""
    patients: int
    """At the default number of images."""
    look: smear.Stain | ct.Scanner
    letter: str
    """Begins this hospital's patient ids."""
    site_yaml: str
    queries: dict[str, str]
    """Query name to the text of its file."""
    images: int = 500
    """The default number of images."""
    size: int = 32
    """Height and width of delivered smear images."""
    rare: str | None = None
    """A class of which there is only a handful of images."""
    strange: dict[str, str] = field(default_factory=dict)
    """Own word for a class asked for that the hospital does not hold, where it is not the federation's."""

    @property
    def asked(self) -> tuple[str, ...]:
        """Classes that one of the queries asks for, sorted."""
        texts = map(yaml.safe_load, self.queries.values())
        return tuple(sorted({name for text in texts for name in text["classes"]}))


def _query(comment: str, classes: str, method: str) -> str:
    return f"# {comment}\nclasses: [{classes}]\nmethod: {method}\nbudget: {DEFAULT_BUDGET}\n"


SMEAR_GROUPS = """subgroups:
  sex: {from: tag, tag: PatientSex}
  scanner: {from: tag, tag: ManufacturerModelName}
"""
SMEAR_SPEC = """image:
  size: [32, 32]
  channels: 3
  normalisation: unit
pictures: true # of drawings
"""
CT_SPEC = """image:
  size: [24, 24, 24]
  spacing_mm: [2.5, 2.5, 2.5]
  channels: 1
  window: {center: -300, width: 1400}
  normalisation: unit
pictures: true # of drawings
"""

SMEARS: dict[str, PhantomHospital] = {
    "aster": PhantomHospital(
        words={"lymphocyte": "lymphocyte", "monocyte": "monocyte", "neutrophil": "neutrophil"},
        shares=(0.33, 0.25, 0.42),
        patients=50,
        look=smear.Stain(glass=(252, 234, 212), dyes=(1.0, 1.0, 1.0), strength=1.0, blur=0.45, noise=3.0),
        letter="A",
        site_yaml=f"""\
# Phantom hospital: DICOM microscopy, one uncompressed file per cell, one folder per patient.
name: aster
source: {{kind: dicom, path: data}}
label: {{from: tag, tag: AdmittingDiagnosesDescription}}
patient: {{from: tag, tag: PatientID}}
held_back: held-back
{SMEAR_GROUPS}{SMEAR_SPEC}""",
        queries={
            "basophil": _query(
                "Aster has never seen a basophil and asks to tell one from the cells it knows.",
                "basophil",
                "qkt",
            ),
            "erythroblast-platelet": _query(
                "Aster asks for two classes at once, neither of which it has ever seen.",
                "erythroblast, platelet",
                "qkt",
            ),
        },
    ),
    "birch": PhantomHospital(
        words={"basophil": "BAS", "eosinophil": "EOS", "neutrophil": "NEU", "platelet": "PLT"},
        shares=(0.22, 0.25, 0.33, 0.20),
        patients=60,
        look=smear.Stain(glass=(232, 229, 241), dyes=(0.96, 1.06, 0.90), strength=1.1, blur=0.60, noise=3.0),
        letter="B",
        site_yaml=f"""\
# Phantom hospital: DICOM microscopy, JPEG 2000 lossless, all files in one folder, diagnoses in a table.
name: birch
source: {{kind: dicom, path: data}}
label: {{from: csv, file: labels.csv, key: file, column: diagnosis}}
patient: {{from: tag, tag: PatientID}}
label_map: {{BAS: basophil, EOS: eosinophil, NEU: neutrophil, PLT: platelet}}
{SMEAR_GROUPS}{SMEAR_SPEC}""",
        queries={},
    ),
    "cedar": PhantomHospital(
        words={"erythroblast": "erythroblast", "ig": "ig", "lymphocyte": "lymphocyte"},
        shares=(0.36, 0.28, 0.36),
        patients=45,
        look=smear.Stain(glass=(248, 229, 230), dyes=(0.88, 1.08, 0.97), strength=0.98, blur=0.50, noise=4.5),
        letter="C",
        site_yaml=f"""\
# Phantom hospital: NIfTI, one RGB24 slice per cell, diagnoses and patients in a table.
name: cedar
source: {{kind: nifti, path: data}}
label: {{from: csv, file: labels.csv, key: file, column: diagnosis}}
patient: {{from: csv, file: labels.csv, key: file, column: patient}}
held_back: held-back
{SMEAR_SPEC}""",
        queries={
            "platelet": _query(
                "Cedar has never seen a platelet and asks to tell one from the cells it knows.",
                "platelet",
                "qkt",
            )
        },
    ),
    "dahlia": PhantomHospital(
        words={"basophil": "basophil", "monocyte": "monocyte", "platelet": "platelet"},
        shares=(0.32, 0.40, 0.28),
        patients=40,
        look=smear.Stain(
            glass=(234, 238, 230), dyes=(1.05, 0.96, 1.0), strength=0.84, blur=0.75, noise=2.5, gamma=1.05
        ),
        letter="D",
        site_yaml=f"""\
# Phantom hospital: NIfTI, one RGB24 slice per cell, stored the other way round than Cedar's, below images/.
name: dahlia
source: {{kind: nifti, path: data}}
label: {{from: csv, file: cells.csv, key: name, column: diagnosis}}
patient: {{from: csv, file: cells.csv, key: name, column: patient}}
held_back: held-back
{SMEAR_SPEC}""",
        queries={
            "eosinophil": _query(
                "Dahlia asks for eosinophils; the teachers' own networks answer, nothing is distilled.",
                "eosinophil",
                "routed",
            )
        },
    ),
    "elm": PhantomHospital(
        words={
            "eosinophil": "eosinophils",
            "ig": "left-shift",
            "monocyte": "monocytes",
            "neutrophil": "segmented",
        },
        shares=(0.30, 0.0, 0.26, 0.44),
        patients=70,
        look=smear.Stain(glass=(252, 250, 246), dyes=(1.03, 0.98, 1.08), strength=1.12, blur=0.35, noise=2.0),
        letter="E",
        size=40,
        rare="ig",
        site_yaml=f"""\
# Phantom hospital: PNG files of 40 pixels in one folder per class, named in the laboratory's own words.
name: elm
source: {{kind: images, path: data}}
label: {{from: folder, level: 0}}
patient: {{from: csv, file: patients.csv, key: file, column: patient}}
held_back: held-back
label_map: {{eosinophils: eosinophil, left-shift: ig, monocytes: monocyte, segmented: neutrophil}}
{SMEAR_SPEC}""",
        queries={
            "ig": _query(
                "Elm has a handful of immature granulocytes, and asks those alone who know them.",
                "ig",
                "qkt-light",
            )
        },
    ),
    "fern": PhantomHospital(
        words={"eosinophil": "0", "erythroblast": "1", "ig": "2", "lymphocyte": "3"},
        shares=(0.22, 0.20, 0.30, 0.28),
        patients=55,
        look=smear.Stain(glass=(222, 226, 236), dyes=(1.08, 0.95, 0.88), strength=0.95, blur=0.55, noise=5.0),
        letter="F",
        site_yaml=f"""\
# Phantom hospital: one npz file in MedMNIST's layout, with patient ids and its own split.
name: fern
source: {{kind: npz, path: data/images.npz}}
label: {{from: npz}}
patient: {{from: npz}}
held_back: held-back
label_map: {{0: eosinophil, 1: erythroblast, 2: ig, 3: lymphocyte, 4: basophil}}
splits: given
{SMEAR_SPEC}""",
        queries={
            "basophil": _query(
                "Fern has never named a basophil and asks all who know one, or its own classes.",
                "basophil",
                "qkt",
            )
        },
        strange={"basophil": "4"},
    ),
}

CHESTS: dict[str, PhantomHospital] = {
    "north": PhantomHospital(
        words={"solid": "solid", "ground-glass": "ground-glass", "cavity": "cavity"},
        shares=(0.36, 0.34, 0.30),
        patients=64,
        images=96,
        look=ct.Scanner(shape=(32, 32, 32), spacing=(2.0, 2.0, 2.0), noise=28.0, sharpness=2.2),
        letter="N",
        site_yaml=f"""\
# Phantom hospital: CT as NIfTI volumes in one folder per lesion class, patients in a table.
name: north
source: {{kind: nifti, path: data}}
label: {{from: folder, level: 0}}
patient: {{from: csv, file: patients.csv, key: file, column: patient}}
held_back: held-back
{CT_SPEC}""",
        queries={
            "calcified": _query(
                "North has never seen a calcified lesion and asks to tell one from those it knows.",
                "calcified",
                "qkt",
            )
        },
    ),
    "south": PhantomHospital(
        words={"cavity": "cavitating", "calcified": "calcification"},
        shares=(0.5, 0.5),
        patients=66,
        images=90,
        look=ct.Scanner(shape=(20, 32, 32), spacing=(3.25, 2.0, 2.0), noise=40.0, sharpness=1.8, offset=6.0),
        letter="S",
        site_yaml=f"""\
# Phantom hospital: CT as DICOM series, one folder per patient and series, diagnoses per series in a table.
name: south
source: {{kind: dicom, path: data}}
label: {{from: csv, file: series.csv, key: series, column: diagnosis}}
patient: {{from: tag, tag: PatientID}}
held_back: held-back
label_map: {{calcification: calcified, cavitating: cavity}}
{CT_SPEC}""",
        queries={
            "ground-glass": _query(
                "South has never seen a ground-glass lesion and asks to tell one from those it knows.",
                "ground-glass",
                "qkt",
            )
        },
    ),
    "east": PhantomHospital(
        words={"solid": "solid", "ground-glass": "ground-glass", "calcified": "calcified"},
        shares=(0.34, 0.32, 0.34),
        patients=60,
        images=96,
        look=ct.Scanner(shape=(32, 30, 30), spacing=(2.0, 2.2, 2.2), noise=22.0, sharpness=3.2, offset=-8.0),
        letter="E",
        site_yaml=f"""\
# Phantom hospital: CT as NIfTI volumes stored in another orientation, diagnoses and patients in a table.
name: east
source: {{kind: nifti, path: data}}
label: {{from: csv, file: labels.csv, key: file, column: diagnosis}}
patient: {{from: csv, file: labels.csv, key: file, column: patient}}
{CT_SPEC}""",
        queries={},
    ),
}

FEDERATIONS: MappingProxyType[int, tuple[dict[str, PhantomHospital], tuple[str, ...]]] = MappingProxyType(
    {2: (SMEARS, BLOOD_CELLS), 3: (CHESTS, LESIONS)}
)


def _hospital(site: str) -> tuple[PhantomHospital, tuple[str, ...], Dims]:
    if site in SMEARS:
        return SMEARS[site], BLOOD_CELLS, 2
    if site in CHESTS:
        return CHESTS[site], LESIONS, 3
    raise ConfigError(
        f"no phantom hospital {site!r}", remedy=f"Known ones: {', '.join([*SMEARS, *CHESTS])}.", site=site
    )


# --- what a hospital holds ----------------------------------------------------------------------


def _count(hospital: PhantomHospital, images: int | None) -> int:
    count = hospital.images if images is None else images
    if count < MIN_IMAGES:
        raise ConfigError(
            f"{count} images per phantom hospital", remedy=f"Ask for at least {MIN_IMAGES}, or leave it out."
        )
    return count


def _assign(
    hospital: PhantomHospital, classes: tuple[str, ...], count: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Class index and patient number of each image; every patient has at least one."""
    rare = 0 if hospital.rare is None else min(10, max(8, count // 10))
    own = np.array([classes.index(c) for c in hospital.words])
    shares = np.array(hospital.shares)
    numbers = np.floor(shares / shares.sum() * (count - rare)).astype(np.int64)
    numbers[int(np.argmax(shares))] += count - rare - int(numbers.sum())
    labels = rng.permutation(np.repeat(own, numbers))
    patients = min(count - rare, max(10, round(hospital.patients * count / hospital.images)))
    extra = count - rare - patients
    if isinstance(hospital.look, ct.Scanner):
        # A patient has one scan or two.
        owners = np.concatenate([np.arange(patients), rng.permutation(patients)[:extra]])
        owners = np.concatenate([owners, rng.integers(0, patients, count - len(owners))])
    else:
        busy = rng.dirichlet(np.full(patients, 4.0))
        owners = np.concatenate([np.arange(patients), rng.choice(patients, extra, p=busy)])
    owners = rng.permutation(owners)
    if hospital.rare is not None:
        few = rng.permutation(patients)[np.arange(rare) % min(patients, 10)]
        where = rng.integers(0, len(labels) + 1, rare)
        labels = np.insert(labels, where, classes.index(hospital.rare))
        owners = np.insert(owners, where, few)
    return labels.astype(np.int64), owners.astype(np.int64)


def render_images(
    site: str, *, seed: int = 0, images: int | None = None
) -> tuple[NDArray[np.uint8] | NDArray[np.int16], NDArray[np.int64], list[str]]:
    """Draw the images of one phantom hospital, in memory.

    Args:
        site: name of a phantom hospital, 2D or 3D.
        seed: of the federation; a hospital's images depend on it and on ``site`` alone.
        images: how many; the hospital's default where not given.

    Returns:
        Images (N, H, W, 3) uint8, or (N, D, H, W) int16 in Hounsfield units with axes running to
        the patient's head, back and left; labels (N,) int64, indices into ``catalog.BLOOD_CELLS`` or
        ``catalog.LESIONS``; patient ids.

    Raises:
        ConfigError: no such phantom hospital, or fewer images than ``MIN_IMAGES``.
    """
    hospital, classes, _ = _hospital(site)
    rng = np.random.default_rng(derive(seed, "phantom", site))
    labels, owners = _assign(hospital, classes, _count(hospital, images), rng)
    return _drawn(hospital, labels, owners, rng), labels, [_patient(hospital, p) for p in owners.tolist()]


def _patient(hospital: PhantomHospital, number: int) -> str:
    return f"PHANTOM-{hospital.letter}{number + 1:04d}"


def _drawn(
    hospital: PhantomHospital,
    labels: NDArray[np.int64],
    owners: NDArray[np.int64],
    rng: np.random.Generator,
) -> NDArray[np.uint8] | NDArray[np.int16]:
    if isinstance(hospital.look, smear.Stain):
        return smear.render_cells(labels, owners, hospital.look, size=hospital.size, rng=rng)
    return ct.render_chests(labels, hospital.look, rng=rng)[0]


def render_held_back(
    site: str, *, seed: int = 0, images: int | None = None
) -> tuple[NDArray[np.uint8] | NDArray[np.int16], NDArray[np.int64], list[str]]:
    """Draw images of the classes that a phantom hospital asks for, as it would take them itself.

    Each is of a patient of its own. They come from a seed of their own: no other image depends on them.

    Args:
        site, seed, images: as of :func:`render_images`; a smaller hospital holds fewer back.

    Returns:
        As of :func:`render_images`; no image at a hospital that asks for nothing.

    Raises:
        ConfigError: as of :func:`render_images`.
    """
    hospital, classes, _ = _hospital(site)
    count = _count(hospital, images)
    each = min(HELD_BACK_IMAGES, max(FEWEST_HELD_BACK, round(HELD_BACK_IMAGES * count / hospital.images)))
    rng = np.random.default_rng(derive(seed, "phantom", site, HELD_BACK))
    labels = rng.permutation(np.repeat([classes.index(c) for c in hospital.asked], each)).astype(np.int64)
    owners = np.arange(len(labels), dtype=np.int64)
    # Beyond the numbers of all other patients, of whom there are no more than images.
    first = max(FIRST_HELD_BACK, count)
    patients = [_patient(hospital, first + p) for p in owners.tolist()]
    return _drawn(hospital, labels, owners, rng), labels, patients


# --- delivery -----------------------------------------------------------------------------------


def _deliver(site: str, folder: Path, *, seed: int, images: int | None, held_back: bool) -> None:
    """Write a hospital's files, and below them those that it holds back, if it does."""
    rng = np.random.default_rng(derive(seed, "phantom", site, "delivery"))
    _write_files(site, folder, render_images(site, seed=seed, images=images), seed=seed, rng=rng)
    if not held_back:
        return
    rng = np.random.default_rng(derive(seed, "phantom", site, HELD_BACK, "delivery"))
    held = render_held_back(site, seed=seed, images=images)
    _write_files(site, folder / HELD_BACK, held, seed=seed, rng=rng, held_back=True)


def _write_files(
    site: str,
    folder: Path,
    drawn: tuple[NDArray[np.uint8] | NDArray[np.int16], NDArray[np.int64], list[str]],
    *,
    seed: int,
    rng: np.random.Generator,
    held_back: bool = False,
) -> None:
    hospital, classes, _ = _hospital(site)
    pictures, labels, patients = drawn
    own = hospital.words | hospital.strange
    words = [own.get(classes[i], classes[i]) for i in labels]
    smear_nifti: dict[str, Any] = {"spacing": (1.0, delivery.PIXEL_UM, delivery.PIXEL_UM)}
    spacing = hospital.look.spacing if isinstance(hospital.look, ct.Scanner) else (1.0, 1.0, 1.0)
    if pictures.dtype == np.uint8:
        cells = pictures.astype(np.uint8, copy=False)
        if site == "aster":
            delivery.write_dicom_by_patient(folder, cells, words, patients, site=site, seed=seed)
        elif site == "birch":
            delivery.write_dicom_compressed(folder, cells, words, patients, site=site, seed=seed)
        elif site == "cedar":
            delivery.write_nifti(
                folder, cells, words, patients, **smear_nifti,
                flip=(False, False, False), names="smear-{i:04d}.nii.gz", listing="labels.csv", key="file",
            )  # fmt: skip
        elif site == "dahlia":
            delivery.write_nifti(
                folder, cells, words, patients, **smear_nifti,
                flip=(True, False, False), names="images/cell{i:04d}.nii.gz", listing="cells.csv", key="name",
            )  # fmt: skip
        elif site == "elm":
            delivery.write_class_folders(folder, cells, words, patients)
        else:
            codes = np.array([int(w) for w in words], dtype=np.int64)
            shares = (0.0, 0.0) if held_back else (0.7, 0.8)
            delivery.write_npz(folder, cells, codes, patients, rng=rng, shares=shares)
        return
    chests = pictures.astype(np.int16, copy=False)
    if site == "south":
        delivery.write_ct_series(
            folder, chests, words, patients, spacing=spacing, site=site, seed=seed, rng=rng
        )
    elif site == "north":
        delivery.write_nifti(
            folder, chests, words, patients, spacing=spacing, flip=(False, False, False),
            names="chest-{i:04d}.nii.gz", listing="patients.csv", key="file", by_class=True,
        )  # fmt: skip
    else:
        delivery.write_nifti(
            folder, chests, words, patients, spacing=spacing, flip=(True, True, True),
            names="ct-{i:04d}.nii.gz", listing="labels.csv", key="file",
        )  # fmt: skip


def _state(stamp: Path) -> dict[str, Any] | None:
    try:
        state = json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def _write_site(root: Path, site: str, *, seed: int, images: int | None) -> None:
    hospital, _, dims = _hospital(site)
    folder = root / "hospitals" / site
    data, stamp = folder / "data", folder / STAMP
    wanted = {"version": VERSION, "dims": dims, "seed": seed, "images": _count(hospital, images)}
    state = _state(stamp)
    if data.is_symlink() or (data.exists() and state is None):
        raise ConfigError(
            "data/ is there, but the phantom did not write it and will not replace it",
            remedy="Give your hospital another name, or move the folder away.",
            site=site,
            file=data,
        )
    texts = {"site.yaml": hospital.site_yaml, POLICY: OPEN_POLICY}
    texts |= {f"queries/{n}.yaml": t for n, t in hospital.queries.items()}
    # Phantom identities are no secret, so this salt may be known; a real hospital's is drawn by ingest.
    texts[".salt"] = digest_bytes(f"phantom salt {site}".encode()) + "\n"
    for name, text in sorted(texts.items()):
        if not (folder / name).exists():
            write_text(folder / name, text)
    if state == {**wanted, "complete": True} and data.is_dir():
        return
    # First the claim, last the proof: cut short in between, the next run knows that data/ is ours to replace.
    write_json(stamp, {**wanted, "complete": False})
    with new_folder(data) as temporary:
        # A site.yaml that somebody edited may not name them: they would be taken for training images.
        named = NAMES_HELD_BACK.search((folder / "site.yaml").read_text(encoding="utf-8"))
        _deliver(site, temporary, seed=seed, images=images, held_back=named is not None)
    write_json(stamp, {**wanted, "complete": True})


def write_federation(
    root: Path,
    *,
    dims: Dims = 2,
    seed: int = 0,
    images_per_site: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Write the phantom hospitals below ``root/hospitals``.

    Each gets ``site.yaml``, ``policy.yaml``, ``queries/*.yaml``, ``.salt`` (all left alone where they exist,
    so that edits stay), ``data/``, and, last, the stamp ``.phantom.json``. A hospital whose stamp says the
    same version, seed and size is skipped. Same arguments, same bytes.

    Args:
        root: the workspace.
        dims: 2 for six hospitals with blood smears, 3 for three with CT volumes.
        seed: of everything drawn.
        images_per_site: at least ``MIN_IMAGES``; where not given 500 in 2D and 90 to 96 in 3D.
        progress: called with (hospitals done, hospitals) after each one.

    Returns:
        The hospitals' names, sorted.

    Raises:
        ConfigError: a hospital's ``data/`` exists and is not the phantom's, or too few images.
    """
    sites = sorted(FEDERATIONS[dims][0])
    for done, site in enumerate(sites, start=1):
        _write_site(root, site, seed=seed, images=images_per_site)
        if progress is not None:
            progress(done, len(sites))
    return sites


def phantom_params(dims: Dims) -> dict[str, Any]:
    """The part of ``params.yaml`` that belongs to the phantom: classes, sites and queries."""
    hospitals, classes = FEDERATIONS[dims]
    return {
        "classes": list(classes),
        "sites": sorted(hospitals),
        "queries": {
            f"{site}-{query}": {"hospital": site, "query": query}
            for site in sorted(hospitals)
            for query in sorted(hospitals[site].queries)
        },
    }


# --- contact sheet ------------------------------------------------------------------------------


def _examples(
    hospital: PhantomHospital, classes: tuple[str, ...], columns: int, seed: int
) -> NDArray[np.uint8]:
    """(classes, columns, S, S, 3): every class as this hospital would show it, whether it has any or not."""
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), columns)
    rng = np.random.default_rng(derive(seed, "phantom sheet", hospital.letter))
    look = hospital.look
    if isinstance(look, smear.Stain):
        owners = np.arange(len(labels), dtype=np.int64)
        images = smear.render_cells(labels, owners, look, size=hospital.size, rng=rng)
    else:
        volumes, centres = ct.render_chests(labels, look, rng=rng)
        middle = np.rint(centres[:, 0] / look.spacing[0] + (look.shape[0] - 1) / 2).astype(np.int64)
        slices = volumes[np.arange(len(labels)), middle].astype(np.float32)
        grey = np.clip((slices + 1000.0) / 1400.0, 0.0, 1.0) * 255.0
        images = np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)
    return images.reshape(len(classes), columns, *images.shape[1:])


def render_sheet(path: Path, *, dims: Dims = 2, seed: int = 0) -> None:
    """Write a contact sheet as PNG: a row per class, columns of examples under every hospital's look."""
    from PIL import Image, ImageDraw, ImageFont

    hospitals, classes = FEDERATIONS[dims]
    columns, tile, gap, left, top = (2, 96, 4, 120, 28) if dims == 2 else (4, 96, 4, 120, 28)
    block = columns * (tile + gap) + gap
    sheet = Image.new("RGB", (left + block * len(hospitals), top + len(classes) * (tile + gap)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for row, name in enumerate(classes):
        pen.text((8, top + row * (tile + gap) + tile // 2), name, fill="black", font=font, anchor="lm")
    for site_number, site in enumerate(sorted(hospitals)):
        x0 = left + site_number * block
        pen.text((x0 + block // 2, top // 2), site, fill="black", font=font, anchor="mm")
        examples = _examples(hospitals[site], classes, columns, seed)
        for row, column in np.ndindex(len(classes), columns):
            picture = Image.fromarray(examples[row, column]).resize((tile, tile), Image.Resampling.BICUBIC)
            sheet.paste(picture, (x0 + column * (tile + gap), top + row * (tile + gap)))
    with passing_file(path) as temporary:
        sheet.save(temporary, format="PNG")

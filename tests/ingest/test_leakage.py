from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from qkt_clinical.cli import main
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.errors import SourceError
from qkt_clinical.ingest import find_crossings
from qkt_clinical.ingest.leakage import (
    Crossing,
    Held,
    across_sites,
    difference_hash,
    hashes_of,
    look_alike,
    pixel_hash,
    same_pixels,
)
from tests.ingest_files import CLASSES, SITE, dicom, hospital, ingest, noise, save


def parts(*positions: list[int]) -> list[NDArray[np.int64]]:
    return [np.array(p, dtype=np.int64) for p in positions]


def smooth(seed: int, size: int = 32) -> NDArray[np.uint8]:
    """An image with structure, as pictures have it: noise made large."""
    small = PIL.Image.fromarray(noise(seed, 6, 6))
    return np.asarray(small.resize((size, size), PIL.Image.Resampling.BICUBIC))


def test_difference_hash_by_hand() -> None:
    ramp = np.tile(np.arange(9, dtype=np.uint8), (8, 1))
    assert difference_hash(ramp[None]) == 2**64 - 1
    assert difference_hash(ramp[None, :, ::-1]) == 0
    one = np.zeros((8, 9), dtype=np.uint8)
    one[0, 1] = 1  # brighter than its left neighbour: the first of 64 bits
    assert difference_hash(one[None]) == 2**63


def test_copies_that_were_changed_a_little_look_alike() -> None:
    image = smooth(0)
    brighter = np.clip(image.astype(int) + 9, 0, 255).astype(np.uint8)
    smaller = np.asarray(PIL.Image.fromarray(image).resize((24, 24)).resize((32, 32)))
    looks = [difference_hash(i[None]) for i in (image, brighter, smaller, smooth(1))]
    assert (looks[0] ^ looks[1]).bit_count() <= 3
    assert (looks[0] ^ looks[2]).bit_count() <= 3
    assert (looks[0] ^ looks[3]).bit_count() > 10
    assert len({pixel_hash(i[None]) for i in (image, brighter, smaller)}) == 3


def test_pairs_are_found_across_parts_alone() -> None:
    images = np.stack([smooth(0), smooth(1), smooth(0), smooth(0), np.full((32, 32), 7, np.uint8)])[:, None]
    images = np.concatenate([images, images[4:]])  # two even images, which are no copies of anything
    hashes = np.array([hashes_of(image) for image in images], dtype=np.uint64)
    assert hashes.shape == (6, 2)
    assert hashes.dtype == np.uint64
    assert list(same_pixels(hashes, parts([0, 1, 2, 4], [3, 5]))) == [(0, 3)]
    assert look_alike(hashes, parts([0, 1, 2, 4], [3, 5])) == [(0, 3), (2, 3)]
    assert look_alike(hashes, parts([0, 2, 3, 4, 5], [1])) == []


def test_every_pair_within_three_bits_is_found() -> None:
    rng = np.random.default_rng(0)
    looks = rng.integers(1, 2**63, 60, dtype=np.uint64)
    for i in range(0, 60, 2):  # every other one is its neighbour with up to five bits flipped
        flipped = sum(1 << int(b) for b in rng.choice(63, i % 6, replace=False))
        looks[i + 1] = looks[i] ^ np.uint64(flipped)
    hashes = np.stack([np.arange(1, 61, dtype=np.uint64), looks], axis=1)
    where = parts(list(range(0, 60, 2)), list(range(1, 60, 2)))
    expected = [
        (a, b) for a in where[0] for b in where[1] if (int(looks[a]) ^ int(looks[b])).bit_count() <= 3
    ]
    assert sorted((min(p), max(p)) for p in expected) == look_alike(hashes, where)
    assert len(expected) >= 15


def test_one_hospitals_training_images_among_anothers_test_images() -> None:
    a = np.array([[1, 0], [2, 0b111], [0, 0]], np.uint64)
    b = np.array([[2, 0b111], [3, 0b110], [0, 0], [4, 0b11110000], [5, 0]], np.uint64)
    patients_a, patients_b = np.array(["p", "q", "r"]), np.array(["s", "t", "u", "v", "p"])
    sites = {
        "a": Held(a, patients_a, *parts([0, 1, 2], [])),
        "b": Held(b, patients_b, *parts([], [0, 1, 2, 3, 4])),
    }
    # b's first test image is one of a's, its second only looks like one, its last is of a's patient p.
    assert list(across_sites(sites)) == [Crossing("a", "b", 1, ("p", "s"), 1)]
    sites = {name: held._replace(train=held.test, test=held.train) for name, held in sites.items()}
    assert list(across_sites(sites)) == [Crossing("b", "a", 1, ("p", "q"), 0)]


def test_copies_that_only_preparing_made_alike_stop_a_site(tmp_path: Path) -> None:
    folder = hospital(tmp_path, "dicom", patient={"from": "tag", "tag": "PatientID"})

    def write(number: int, *, changed: bool) -> None:
        """One of six images in twice the size; changed, it differs where only the full size shows it."""
        image = np.repeat(np.repeat(noise(number % 6, 8, 8) // 8 * 8, 2, axis=0), 2, axis=1).astype(int)
        if changed:
            image[0::2, 0::2] += 1
            image[1::2, 1::2] -= 1
        data = dicom(np.clip(image, 0, 255).astype(np.uint8), patient=f"P-{number}")
        save(data, folder / "solid" / f"{number}.dcm")

    for number in range(12):
        write(number, changed=False)
    assert ingest(tmp_path)[0].rejected == {"duplicate": 6}, "equal files are left out one by one"
    for number in range(6, 12):
        write(number, changed=True)
    with pytest.raises(SourceError, match="the same pixels in two splits") as caught:
        ingest(tmp_path)
    assert caught.value.code == "pixels-in-two-splits"
    assert "P-" not in str(caught.value)


def test_crossings_of_prepared_sites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = hospital(tmp_path, "images")
    for number in range(20):
        (folder / "solid").mkdir(exist_ok=True)
        PIL.Image.fromarray(noise(number, 8, 8)).save(folder / "solid" / f"{number}.png")
    ingest(tmp_path)
    prepared = Workspace(tmp_path).prepared(SITE)
    assert find_crossings(tmp_path, [SITE]) == []
    other = prepared.with_name("birch")
    other.mkdir()
    for file in prepared.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    splits = json.loads((other / "splits.json").read_text())
    splits["test"], splits["train"] = splits["train"], splits["test"]
    (other / "splits.json").write_text(json.dumps(splits))
    found = find_crossings(tmp_path, [SITE, "birch"])
    assert [(c.trains, c.tests) for c in found] == [(SITE, "birch"), ("birch", SITE)]
    assert found[0].images == len(splits["test"])
    (tmp_path / "params.yaml").write_text(
        json.dumps({"classes": CLASSES, "sites": [SITE, "birch"], "queries": {}})
    )
    with pytest.raises(SystemExit) as ended:
        main(["ingest", "leakage", "--root", str(tmp_path), "--json"])
    assert ended.value.code == 1
    assert json.loads(capsys.readouterr().out)[0] == json.loads(json.dumps(found[0]._asdict()))
    assert len(found[0].patients) == len(splits["test"])


def test_the_integrity_page_of_a_site(tmp_path: Path) -> None:
    folder = hospital(tmp_path, "images")
    for kind, count in (("solid", 12), ("cavity", 3)):
        (folder / kind).mkdir()
        for number in range(count):
            PIL.Image.fromarray(smooth(number + 20 * (kind == "cavity"), 8)).save(
                folder / kind / f"{number}.png"
            )
    brighter = np.clip(smooth(0, 8).astype(int) + 2, 0, 255).astype(np.uint8)
    for number in range(8):  # copies of one image, brighter: some of them fall into another split
        PIL.Image.fromarray(brighter + np.uint8(number)).save(folder / "solid" / f"Doe-{number}.png")
    (folder / "solid" / "Doe.png").write_bytes(b"no picture")
    manifest, _ = ingest(tmp_path)
    page = (Workspace(tmp_path).prepared(SITE) / "integrity.html").read_text()
    assert manifest.rejected == {"not-picture": 1}
    assert "not-picture" in page
    assert "Export it as PNG, JPEG or TIFF." in page
    assert "Doe" not in page
    assert page.count("data:image/png;base64,") > 2
    assert "pairs of different patients" in page
    rows = page[page.index("<h2>Images by class") : page.index("<h2>Rejected")]
    cavity = rows[rows.index("cavity") : rows.index("calcified")]
    assert "&lt;5" in cavity
    assert not {"1", "2", "3"} & set(re.findall(r'<td class="n">([^<]*)</td>', cavity))
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "hospitals", again / "hospitals")
    ingest(again)
    assert (Workspace(again).prepared(SITE) / "integrity.html").read_text() == page

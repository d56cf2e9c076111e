"""Decoding through the store: incremental, resumable, the same result with and without it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from qkt_clinical.common.files import digest_folder
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.errors import SourceError
from qkt_clinical.ingest import codes, decode, ingest_site, store
from qkt_clinical.ingest.readers import dicom_series, images
from tests.ingest_files import (
    IDENTITIES,
    SITE,
    hospital,
    ingest,
    noise,
    params,
    plant_identities,
    save,
    series,
    uid,
)
from tests.ingest_files import dicom as data_set

VOLUME = noise(3, 4, 5, 6)


def scratch(root: Path) -> Path:
    return root / ".qkt" / f"ingest-{SITE}.sqlite"


def prepared(root: Path) -> str:
    return digest_folder(Workspace(root).prepared(SITE))


class Counter:
    """Counts the calls of a function of a module."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.calls = 0
        self.true: Callable[..., Any] = getattr(module, name)
        monkeypatch.setattr(module, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.true(*args, **kwargs)

    def since(self) -> int:
        """Calls since it was asked last."""
        calls, self.calls = self.calls, 0
        return calls


def pictures(root: Path, numbers: range) -> Path:
    folder = hospital(root, "images") / "solid"
    folder.mkdir(exist_ok=True)
    for number in numbers:
        PIL.Image.fromarray(noise(number, 9, 9)).save(folder / f"{number}.png")
    return folder


def test_one_new_file_costs_one_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = Counter(monkeypatch, images, "_picture")
    folder = pictures(tmp_path, range(12))
    (folder / "bad.png").write_bytes(b"no picture")
    ingest(tmp_path)
    first = prepared(tmp_path)
    assert decodes.since() == 13
    ingest(tmp_path)
    assert decodes.since() == 0, "not even the file that was refused"
    assert prepared(tmp_path) == first
    pictures(tmp_path, range(12, 13))
    ingest(tmp_path)
    assert decodes.since() == 1
    with_store = prepared(tmp_path)
    PIL.Image.fromarray(noise(99, 9, 9)).save(folder / "5.png")
    (folder / "6.png").unlink()
    assert ingest(tmp_path)[0].count == 12
    assert decodes.since() == 1, "the file that was written anew"
    pictures(tmp_path, range(5, 7))
    scratch(tmp_path).unlink()
    ingest(tmp_path)
    assert decodes.since() == 14
    assert prepared(tmp_path) == with_store


def test_what_the_machine_may_be_to_blame_for_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path, range(6))
    true = images._picture

    def out_of_memory(path: Path, max_bytes: int, *, volumes: bool | None) -> Any:
        if path.name.endswith("3.png"):
            raise codes.reject("too-large")
        return true(path, max_bytes, volumes=volumes)

    monkeypatch.setattr(images, "_picture", out_of_memory)
    assert ingest(tmp_path)[0].rejected == {"too-large": 1}
    monkeypatch.setattr(images, "_picture", true)
    decodes = Counter(monkeypatch, images, "_picture")
    assert ingest(tmp_path)[0].rejected == {}
    assert decodes.since() == 1


def test_what_is_asked_decides_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = Counter(monkeypatch, images, "_picture")
    folder = pictures(tmp_path, range(4))
    ingest(tmp_path)
    assert decodes.since() == 4
    ingest(tmp_path, ingest={"splits": {"train": 0.25, "calibration": 0.25, "val": 0.25, "test": 0.25}})
    assert decodes.since() == 0
    hospital(tmp_path, "images", image={"size": [4, 4], "channels": 1})
    ingest(tmp_path)
    assert decodes.since() == 4
    (folder.parent.parent / ".salt").unlink()
    ingest(tmp_path)
    assert decodes.since() == 4


def test_an_interrupted_ingest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = Counter(monkeypatch, images, "_picture")
    pictures(tmp_path, range(20))

    def stop(done: int, total: int) -> None:
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest_site(tmp_path, SITE, params(), progress=stop)
    assert not Workspace(tmp_path).prepared(SITE).exists()
    assert decodes.since() == 15
    ingest(tmp_path)
    assert decodes.since() == 5


def test_series_are_read_again_only_if_they_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads, decodes = (
        Counter(monkeypatch, dicom_series, "scan"),
        Counter(monkeypatch, dicom_series, "read_series"),
    )
    folder = hospital(tmp_path, "dicom", image={"size": [4, 5, 6], "channels": 1}) / "solid"
    for number in range(3):
        series(folder / str(number), VOLUME + np.uint8(number))
    _, site = ingest(tmp_path)
    first = np.array(site.images)
    assert (heads.since(), decodes.since()) == (12, 3)
    _, site = ingest(tmp_path)
    np.testing.assert_array_equal(site.images, first)
    assert (heads.since(), decodes.since()) == (0, 0)
    series(folder / "3", VOLUME + np.uint8(9))
    assert ingest(tmp_path)[0].count == 4
    assert (heads.since(), decodes.since()) == (4, 1)


def test_acquisitions_of_one_series_are_volumes_of_their_own(tmp_path: Path) -> None:
    folder = hospital(tmp_path, "dicom", image={"size": [4, 5, 6], "channels": 1}) / "solid"
    for number in (1, 2):
        series(
            folder / str(number),
            VOLUME // np.uint8(number),
            SeriesInstanceUID=uid("both"),
            AcquisitionNumber=number,
        )
    # A scanner that counts up with every slice made one volume nevertheless.
    for k, part in enumerate(series(folder / "3", VOLUME // np.uint8(3))):
        data = data_set(
            VOLUME[k] // np.uint8(3),
            SeriesInstanceUID=uid("counted"),
            AcquisitionNumber=k,
            ImagePositionPatient=[0, 0, 2.0 * k],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            PixelSpacing=[1.0, 1.0],
        )
        save(data, part)
    manifest, site = ingest(tmp_path)
    assert manifest.rejected == {}
    found = {image.tobytes() for image in np.array(site.images)}
    assert found == {(VOLUME // np.uint8(n)).tobytes() for n in (1, 2, 3)}


def test_two_ingests_of_one_site_at_a_time(tmp_path: Path) -> None:
    pictures(tmp_path, range(6))
    ingest(tmp_path)
    first = prepared(tmp_path)
    base = sqlite3.connect(scratch(tmp_path))
    base.execute("BEGIN EXCLUSIVE")
    ingest(tmp_path)
    base.close()
    assert prepared(tmp_path) == first
    assert [p.name for p in (tmp_path / ".qkt").iterdir()] == [scratch(tmp_path).name]


@pytest.mark.parametrize("damage", [b"no database" * 400, b""])
def test_a_damaged_store_is_begun_anew(tmp_path: Path, damage: bytes) -> None:
    pictures(tmp_path, range(6))
    ingest(tmp_path)
    first = prepared(tmp_path)
    scratch(tmp_path).write_bytes(damage)
    ingest(tmp_path)
    assert prepared(tmp_path) == first


def test_no_room_for_the_store_is_one_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path, range(3))
    hospital(tmp_path, "images", image={"size": [64, 64], "channels": 1})
    true = store._connected

    def full(path: Path) -> sqlite3.Connection:
        base = true(path)
        base.execute("PRAGMA max_page_count = 1")
        return base

    monkeypatch.setattr(store, "_connected", full)
    with pytest.raises(SourceError, match="scratch file") as caught:
        ingest(tmp_path)
    assert caught.value.code == "scratch"


def test_several_processes_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "in_order", eager(decode.in_order))
    folder = pictures(tmp_path, range(40))
    (folder / "bad.png").write_bytes(b"no picture")
    ingest_site(tmp_path, SITE, params(), workers=2)
    first = prepared(tmp_path)
    scratch(tmp_path).unlink()
    ingest_site(tmp_path, SITE, params(), workers=1)
    assert prepared(tmp_path) == first


def eager(true: Callable[..., Any]) -> Callable[..., Any]:
    """Start processes however little there is to do."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        from qkt_clinical.common import workers

        workers.WORTH_S, before = {"fork": 0.0, "spawn": 0.0}, workers.WORTH_S
        workers.PROBE_S, probe = 0.0, workers.PROBE_S
        try:
            yield from true(*args, **kwargs)
        finally:
            workers.WORTH_S, workers.PROBE_S = before, probe

    return changed


def test_the_store_holds_no_identity(tmp_path: Path) -> None:
    folder = hospital(
        tmp_path,
        "dicom",
        image={"size": [4, 5, 6], "channels": 1},
        patient={"from": "tag", "tag": "PatientName"},
        burned_in="accept",
    )
    for k, path in enumerate(series(folder / "solid" / IDENTITIES[0], VOLUME)):
        data = data_set(
            VOLUME[k],
            ImagePositionPatient=[0, 0, 2.0 * k],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            PixelSpacing=[1.0, 1.0],
        )
        plant_identities(data)
        data.save_as(path, enforce_file_format=True)
    assert ingest(tmp_path)[0].count == 1
    sources = b"".join(p.read_bytes() for p in folder.rglob("*.dcm"))
    assert all(identity.encode() in sources for identity in IDENTITIES), "they were planted"
    content = scratch(tmp_path).read_bytes()
    assert len(content) > 1000
    for identity in IDENTITIES:
        assert identity.encode() not in content

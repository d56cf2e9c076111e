"""A kind of source is one file and one entry: this file, and :func:`register`."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from qkt_clinical import ingest as package
from qkt_clinical.cli import main
from qkt_clinical.errors import ConfigError
from qkt_clinical.ingest import check_file, locate
from qkt_clinical.ingest.arrays import Picture, eight_bit_limits
from qkt_clinical.ingest.codes import reading, reject
from qkt_clinical.ingest.readers import readers, register
from qkt_clinical.ingest.readers.base import DecodeResults, Judge, Reader
from qkt_clinical.ingest.source import DecodedImage, Found, Request, Unit, bounded_pixels, whole_file
from tests.ingest_files import CLASSES, SITE, hospital, ingest, nifti, noise

MAGIC = b"P5"


class GreymapReader(Reader):
    """Portable greymaps of eight bits: a line each for magic, size and maximum, then the pixels."""

    kind = "greymap"
    suffixes = (".pgm",)

    def sniff(self, head: bytes, ending: str) -> bool:
        return head.startswith(MAGIC)

    def read(self, unit: Unit, request: Request) -> DecodeResults:
        (file,) = unit.files
        return [DecodedImage((file,), self._picture(file.path, request.max_bytes))]

    def check(self, path: Path, max_bytes: int, judge: Judge) -> Found:
        picture = self._picture(path, max_bytes)
        judge(picture)
        return Found(picture.pixels.shape, str(picture.pixels.dtype))

    def _picture(self, path: Path, max_bytes: int) -> Picture:
        with reading("header-unreadable"):
            magic, size, _, data = whole_file(path, max_bytes).split(b"\n", 3)
            width, height = map(int, size.split())
        if magic != MAGIC:
            raise reject("not-picture")
        bounded_pixels((height, width), 8, max_bytes)
        if len(data) < height * width:
            raise reject("truncated")
        pixels = np.frombuffer(data, np.uint8, height * width).reshape(height, width)
        return Picture(pixels, limits=eight_bit_limits(pixels.dtype), eight_bit=True)


class PackReader(GreymapReader):
    """Many greymaps in one file, with their classes: a kind that is not remembered."""

    kind = "pack"
    suffixes = (".pack",)
    label_sources = frozenset({"npz"})
    one_file = True
    remembered = False

    def sniff(self, head: bytes, ending: str) -> bool:
        return False

    def read(self, unit: Unit, request: Request) -> DecodeResults:
        (file,) = unit.files
        images = np.frombuffer(whole_file(file.path, request.max_bytes), np.uint8).reshape(-1, 8, 8)
        return [
            DecodedImage((file,), Picture(image), label=CLASSES[i % 3], item=str(i))
            for i, image in enumerate(images)
        ]


@pytest.fixture
def registered() -> Iterator[None]:
    for reader in (GreymapReader(), PackReader()):
        register(reader)
    yield
    for kind in ("greymap", "pack"):
        del readers()[kind]


def greymap(path: Path, number: int) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"P5\n8 8\n255\n" + noise(number, 8, 8).tobytes())


def test_a_new_kind_is_ingested(tmp_path: Path, registered: None) -> None:
    folder = hospital(tmp_path, "greymap", image={"size": [8, 8], "channels": 1})
    for i in range(12):
        greymap(folder / CLASSES[i % 3] / f"{i}.pgm", i)
    (folder / "solid" / "cut.pgm").write_bytes(b"P5\n8 8\n255\n")
    PIL.Image.fromarray(noise(99, 8, 8)).save(folder / "solid" / "other.png")
    manifest, site = ingest(tmp_path)
    assert (manifest.count, manifest.source_kind) == (12, "greymap")
    assert manifest.rejected == {"truncated": 1, "other-kind": 1}
    wanted = sorted(noise(i, 8, 8).tobytes() for i in range(12))
    assert sorted(image.tobytes() for image in site.images) == wanted
    assert {name.rsplit(".", 1)[-1] for name in locate(tmp_path, SITE)} == {"pgm", "png"}
    first = np.array(site.images)
    np.testing.assert_array_equal(np.array(ingest(tmp_path)[1].images), first)  # out of the store


def test_a_new_kind_is_checked(tmp_path: Path, registered: None, capsys: pytest.CaptureFixture[str]) -> None:
    greymap(tmp_path / "a.pgm", 1)
    greymap(tmp_path / "named.otherwise", 2)
    (tmp_path / "cut.pgm").write_bytes(b"P5\n8 8\n255\n")
    PIL.Image.fromarray(noise(3, 8, 8)).save(tmp_path / "b.png")
    nifti(tmp_path / "c.nii", noise(4, 8, 8, 4))
    with pytest.raises(SystemExit) as left:
        main(["ingest", "check", str(tmp_path), "--json"])
    assert left.value.code == 1
    rows = {row["file"]: row for row in json.loads(capsys.readouterr().out)}
    assert {name: (row["kind"], row["code"]) for name, row in rows.items()} == {
        "a.pgm": ("greymap", None),
        "named.otherwise": ("greymap", None),
        "cut.pgm": (None, "truncated"),
        "b.png": ("images", None),
        "c.nii": ("nifti", None),
    }


def test_a_new_kind_may_bring_its_own_labels(tmp_path: Path, registered: None) -> None:
    folder = hospital(tmp_path, "pack", label={"from": "npz"})
    (folder / "all.pack").write_bytes(noise(0, 12, 8, 8).tobytes())
    manifest, site = ingest(tmp_path)
    assert manifest.count == 12
    assert np.bincount(site.labels).tolist() == [4, 4, 4]
    hospital(tmp_path, "pack")
    with pytest.raises(ConfigError, match=r"label comes from folder.* must come from 'npz'"):
        ingest(tmp_path)


def test_an_unknown_kind_is_one_typed_error(tmp_path: Path) -> None:
    hospital(tmp_path, "greymap")
    for act in (lambda: ingest(tmp_path), lambda: locate(tmp_path, SITE)):
        with pytest.raises(
            ConfigError, match="'greymap' is none of dicom, nifti, images, npz, phantom"
        ) as caught:
            act()
        assert caught.value.where.site == SITE


def test_what_is_registered_takes_nothing_from_others(registered: None) -> None:
    class Taken(GreymapReader):
        suffixes = (".new",)

    class Ending(GreymapReader):
        kind = "other"
        suffixes = (".png",)

    class Unnamed(GreymapReader):
        kind = "../x"
        suffixes = (".new",)

    for reader in (Taken(), Ending(), Unnamed()):
        with pytest.raises(ValueError, match=r"new kind|read as images"):
            register(reader)
    assert set(readers()) == {"dicom", "nifti", "images", "npz", "phantom", "greymap", "pack"}


def test_every_reader_reads_what_it_says_it_does(tmp_path: Path) -> None:
    for kind, reader in readers().items():
        assert kind == reader.kind
        assert reader.label_sources <= {"folder", "csv", "tag", "npz"}
        assert bool(reader.suffixes) == reader.has_files
        kept = {"label", "patient"} if "npz" in reader.label_sources else set()
        assert not (kept and reader.remembered), "labels of images are not kept for the next run"
    PIL.Image.fromarray(noise(0, 8, 8)).save(tmp_path / "a.png")
    assert check_file(tmp_path / "a.png")[0] == "images"


def test_outside_their_files_no_kind_is_known_by_name() -> None:
    """No chain of kinds in the stage, the check, the command: each would have to be found for a new one."""
    room = Path(package.__file__).parent
    files = [*room.glob("*.py"), room.parent / "cli" / "ingest.py", room.parent / "catalog.py"]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                words = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                text = ast.unparse(node)
                assert "kind" not in text or not words & set(readers()), f"{file.name}: {text}"

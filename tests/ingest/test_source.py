"""What lies in a source folder: names, links, pipes and depth; and how names are shown."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from qkt_clinical.cli.options import print_json, say
from qkt_clinical.errors import FileRejected
from qkt_clinical.ingest import check_file, check_folder
from qkt_clinical.ingest.listing import LONGEST_PATH, list_all, list_files
from qkt_clinical.ingest.source import opened
from tests.ingest_files import hospital, ingest, noise


def png(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed, 8, 8)).save(path)
    return path


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """A source with 1,100 folders in one another and 30 whose names are as long as names can be."""
    folder = hospital(tmp_path, "images")
    png(folder / "solid" / "a.png")
    for name, times in (("d", 1_100), ("n" * 250, 30)):
        inside = os.open(folder, os.O_RDONLY)
        for _ in range(times):
            os.mkdir(name, dir_fd=inside)
            further = os.open(name, os.O_RDONLY, dir_fd=inside)
            os.close(inside)
            inside = further
        os.close(os.open("b.png", os.O_CREAT | os.O_WRONLY, dir_fd=inside))
        os.close(inside)
    yield tmp_path
    subprocess.run(["rm", "-rf", str(folder)], check=True)  # deeper than shutil can walk


def test_folders_of_any_depth(deep: Path) -> None:
    manifest, _ = ingest(deep)
    assert manifest.rejected == {"empty": 1, "path-too-long": 1}
    codes = [row["code"] for row in check_folder(deep / "hospitals" / "alder" / "data")]
    assert sorted(map(str, codes)) == ["None", "empty", "path-too-long"]


def test_a_file_in_a_folder_whose_path_is_nearly_too_long(tmp_path: Path) -> None:
    inside = tmp_path
    while len(str(inside)) + 251 < LONGEST_PATH - 100:
        inside /= "n" * 250
    if len(str(inside)) < LONGEST_PATH - 100:
        inside /= "m" * (LONGEST_PATH - 100 - len(str(inside)) - 1)
    inside.mkdir(parents=True)
    place = os.open(inside, os.O_RDONLY)
    for name in ("a.png", "b" * 150 + ".png"):
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=place))
    os.close(place)
    assert sorted(str(code) for _, code in list_all(tmp_path)) in (
        ["None", "path-too-long"],
        ["None", "None"],
    )
    subprocess.run(["rm", "-rf", str(tmp_path / ("n" * 250))], check=True)


def test_links_pipes_sockets_and_circles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    png(folder / "a.png")
    (folder / "inside.png").symlink_to("a.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "self.png").symlink_to("self.png")
    (folder / "circle").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    monkeypatch.chdir(folder)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.png")
    codes = {"inside.png": None, "zero.png": "outside-source", "self.png": "unreadable"}
    codes |= {"a.png": None, "pipe.png": "not-a-file", "socket.png": "not-a-file"}
    assert {file.name: code for file, code in list_all(folder)} == codes
    listing = list_files(folder, "images")
    assert {refusal.files[0].name: refusal.code for refusal in listing.refused} == {
        name: code for name, code in codes.items() if code
    }
    assert [file.place for file in listing.files] == [str(folder.resolve() / "a.png")] * 2


@pytest.mark.parametrize("name", ["zero.png", "pipe.png", "folder.png"])
def test_a_file_named_by_hand_is_a_plain_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(FileRejected) as caught:
        check_file(tmp_path / name)
    assert caught.value.code == "not-a-file"


def test_no_link_is_followed_when_a_file_is_opened(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(png(tmp_path / "a.png"))
    with pytest.raises(FileRejected) as caught, opened(tmp_path / "link.png", 1_000):
        pass
    assert caught.value.code == "unreadable"


# --- names as they are shown ------------------------------------------------------------------------

ODD = (
    b"M\xfcller.png",
    "Müller.png".encode(),
    b"\x1b[31mred.png",
    b"two\nlines.png",
    "\x9b\u202e.png".encode(),
)
LOCALES = {
    "utf-8": {"PYTHONIOENCODING": "utf-8:strict"},
    "ascii": {"PYTHONIOENCODING": "ascii:strict"},
    "c": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


@pytest.mark.parametrize("locale", LOCALES)
def test_names_are_shown_escaped_and_json_is_strict_in_any_locale(tmp_path: Path, locale: str) -> None:
    png(tmp_path / "data" / "a.png")
    for i, name in enumerate(ODD):
        (tmp_path / "data" / os.fsdecode(name)).write_bytes(png(tmp_path / "a.png", i).read_bytes())
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONIOENCODING", "LC_ALL", "LANG")}
    for options in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "qkt_clinical.cli", "ingest", "check", str(tmp_path / "data"), *options],
            capture_output=True,
            env=environment | LOCALES[locale],
            check=False,
        )
        assert done.returncode == 0, done.stderr
        text = done.stdout.decode("utf-8")
        assert all(c.isprintable() or c == "\n" for c in text)
        if options:
            names = {row["file"] for row in json.loads(text)}
            assert {"M\\udcfcller.png", "two\nlines.png", "\x1b[31mred.png"} <= names
            assert locale == "c" or {"Müller.png", "\x9b\u202e.png"} <= names  # there file names are ASCII
            assert not any("\ud800" <= c <= "\udfff" for name in names for c in name)
        else:
            assert "two\\nlines.png: accepted" in text
            assert "\\x1b[31mred.png: accepted" in text


def test_json_without_numbers_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("nan"), (float("inf"), 1.5)], "b\udcfc": "\x1b\u2028ü"})
    text = capsys.readouterr().out
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, [None, 1.5]],
        "b\\udcfc": "\x1b\u2028ü",
    }
    assert "ü" in text
    assert "\x1b" not in text
    say("class \x1b[2J\r\x07")
    assert capsys.readouterr().out == "class \\x1b[2J\\r\\x07\n"


def test_spacing_is_that_of_the_affine(tmp_path: Path) -> None:
    """What a damaged pixdim says is not shown where a sound sform stands beside it."""
    blob = bytearray(nibabel.Nifti1Image(np.ones((4, 5, 6), np.int16), np.diag([2, 3, 4, 1])).to_bytes())
    blob[80:84] = np.array([np.nan], "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(blob)
    assert check_file(tmp_path / "a.nii")[1].spacing_mm == (2.0, 3.0, 4.0)

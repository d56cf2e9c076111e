"""Tables of labels and patients: what could be read in two ways is an error, and errors say the remedy."""

from __future__ import annotations

import gzip
import io
import os
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qkt_clinical.config.site import Column
from qkt_clinical.errors import ConfigError, SourceError
from qkt_clinical.ingest.source import SourceFile
from qkt_clinical.ingest.tables import Finder, read_table
from tests.ingest_files import SITE, hospital, ingest, noise

COLUMN = Column(source="csv", file="t.csv", key="file", column="dx")
ROWS = {"a.png": {"solid"}, "b.png": {"cavity"}}


def table(folder: Path, data: bytes) -> dict[str, set[str]]:
    (folder / "t.csv").write_bytes(data)
    return read_table(COLUMN, folder, site=SITE)


@pytest.mark.parametrize(
    "data",
    [
        b"file,dx\na.png,solid\nb.png,cavity\n",
        b"\xef\xbb\xbffile;dx\r\na.png;solid\r\nb.png;cavity\r\n",
        b"file\tdx\ra.png\tsolid\rb.png\tcavity",
        b"sep=;\r\nfile;dx\r\na.png;solid\r\nb.png;cavity\r\n",
        b'"sep=|"\nfile|dx\na.png|solid\nb.png|cavity\n',
        b"\n\n File , DX \n./a.png, solid \n\nb.png/,cavity,\n",
        b'file;"dx";"age, in years, months, days"\na.png;solid;"40,2"\nb.png;cavity;41\n',
        b'file,dx,note\na.png,solid,"two\nlines"\nb.png,cavity,"a "" mark"\n',
        b"file,note,note,dx\na.png,x,y,solid\nb.png,x,y,cavity\n",
    ],
)
def test_tables_as_programs_write_them(tmp_path: Path, data: bytes) -> None:
    assert table(tmp_path, data) == ROWS


SAVE = "CSV UTF-8"
WRONG: dict[str, tuple[bytes, str, str]] = {
    "latin": ("file,dx\nä.png,solid\n".encode("latin-1"), "not UTF-8", SAVE),
    "utf-16": ("file,dx\na.png,solid\n".encode("utf-16"), "UTF-16", SAVE),
    "nul": (b"file,dx\na.png,so\0lid\n", "NUL", SAVE),
    "gzip": (gzip.compress(b"file,dx\n") + b"more", "gzip", "Unpack"),
    "workbook": (b"PK\x03\x04 and so on", "Excel workbook", SAVE),
    "open mark": (b'file,dx\na.png,"solid\nb.png,cavity\n', "line 3: a quotation mark is not closed", SAVE),
    "long cell": (b"file,dx\na.png," + b"x" * 200_000 + b"\n", "line 2: .* longer than a page", SAVE),
    "after a mark": (b'file,dx\n"a"b.png,solid\n', "line 2: not a CSV file", SAVE),
    "shifted": (b"file,dx\na.png,3,5,solid\n", "line 2 holds 4 cells under 2 headings", "quotation marks"),
    "twice": (b"file,dx,dx\na.png,solid,cavity\n", r"'dx' \(column 2\) and 'dx' \(column 3\)", "Rename"),
    "spaces": (b"file,dx, dx \na.png,solid,cavity\n", "two columns of one name", "Rename"),
    "capitals": (b"file,dx,DX\na.png,solid,cavity\n", "'dx' .* and 'DX'", "Rename"),
    "keys": (b"file,dx,File\na.png,solid,b.png\n", "'file' .* and 'File'", "Rename"),
    "no column": (b"file,diagnosis\na.png,solid\n", "no column 'dx'", "Correct"),
    "empty": (b"", "no bytes", "Correct"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_say_what_to_do(tmp_path: Path, name: str) -> None:
    data, message, remedy = WRONG[name]
    with pytest.raises(ConfigError, match=message) as caught:
        table(tmp_path, data)
    assert remedy in caught.value.remedy
    assert (caught.value.where.file, caught.value.where.site) == ("t.csv", SITE)


def test_headings_that_are_one_name_in_unicode(tmp_path: Path) -> None:
    both = [unicodedata.normalize(form, "größe") for form in ("NFC", "NFD")]
    (tmp_path / "t.csv").write_text(f"file,{both[0]},{both[1]}\na.png,1,2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="two columns"):
        read_table(COLUMN.model_copy(update={"column": both[0]}), tmp_path, site=SITE)


@pytest.mark.parametrize("make", ["pipe", "link to a device", "link outside", "folder", "nothing"])
def test_a_table_is_a_plain_file_inside(tmp_path: Path, make: str) -> None:
    path = tmp_path / "t.csv"
    match make:
        case "pipe":
            os.mkfifo(path)
        case "link to a device":
            path.symlink_to("/dev/zero")
        case "link outside":
            path.symlink_to(Path(__file__))
        case "folder":
            path.mkdir()
    with pytest.raises(ConfigError, match=r"cannot be read|outside"):
        read_table(COLUMN, tmp_path, site=SITE)


def find(rows: dict[str, str], names: list[str], *files: str) -> Any:
    """Values that a table gives to the files of one image, None if that is ambiguous."""
    held = {key: {value} for key, value in rows.items()}
    return Finder(held, [SourceFile(name, name) for name in names])([SourceFile(f, f) for f in files])


NFC, NFD = (unicodedata.normalize(form, "Läsion.png") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("rows", "names", "expected"),
    [
        ({"a.png": "s"}, ["x/a.png"], {"s"}),
        ({"a.png": "s"}, ["x/a.png", "y/a.png"], None),
        ({"a": "s"}, ["x/a.png", "y/a.png"], None),
        ({"a": "s"}, ["x/a.png", "x/a.tif"], {"s"}),
        ({"x/a.png": "s", "a.png": "t"}, ["x/a.png", "y/a.png"], {"s"}),
        ({"A.PNG": "s"}, ["x/a.png"], {"s"}),
        ({"A.png": "s", "a.PNG": "t"}, ["x/a.png"], None),
        ({"A.png": "s", "a.png": "t"}, ["x/a.png"], {"t"}),
        ({"A.png": "s"}, ["x/a.png", "x/A.png"], None),
        ({NFC: "s"}, [f"x/{NFD}"], {"s"}),
        ({NFC.upper(): "s"}, [f"x/{NFD}"], {"s"}),
        ({NFC: "s"}, [f"x/{NFD}", f"x/{NFC}"], None),
        ({"b.png": "s"}, ["x/a.png", "y/a.png"], set()),
    ],
)
def test_which_row_is_the_first_files(rows: dict[str, str], names: list[str], expected: Any) -> None:
    assert find(rows, names, names[0]) == expected


def test_a_series_is_found_by_its_folder() -> None:
    names = ["p/s1/1.dcm", "p/s1/2.dcm", "q/s1/1.dcm", "q/s1/2.dcm"]
    assert find({"p/s1": "s"}, names, *names[:2]) == {"s"}
    assert find({"s1": "s"}, names, *names[:2]) is None
    assert find({"1.dcm": "s"}, names, *names[:2]) is None
    assert find({"s1": "s"}, names[:2], *names[:2]) == {"s"}


def png(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed, 8, 8)).save(path)


def test_a_row_that_fits_two_files_is_neither_ones(tmp_path: Path) -> None:
    column = {"from": "csv", "file": "t.csv", "key": "file"}
    patient = {**column, "column": "pid"}
    folder = hospital(tmp_path, "images", label={**column, "column": "dx"}, patient=patient)
    for i, name in enumerate(("x/a.png", "y/a.png", "x/b.png")):
        png(folder / name, i)
    (folder / "t.csv").write_text("file,dx,pid\na.png,solid,P1\nb.png,cavity,P2\n")
    manifest, site = ingest(tmp_path)
    assert manifest.rejected == {"label-ambiguous": 2}
    np.testing.assert_array_equal(site.labels, [1])
    (folder / "l.csv").write_text("file,dx\nx/a.png,solid\ny/a.png,solid\nb.png,cavity\n")
    hospital(tmp_path, "images", label={**column, "column": "dx", "file": "l.csv"}, patient=patient)
    assert ingest(tmp_path)[0].rejected == {"patient-ambiguous": 2}


def test_folders_that_are_one_name_in_unicode_are_one_patient_and_one_class(tmp_path: Path) -> None:
    label, patient = {"from": "folder", "level": 0}, {"from": "folder", "level": 1}
    words = [unicodedata.normalize(form, "Höhle") for form in ("NFC", "NFD")]
    folder = hospital(tmp_path, "images", label=label, patient=patient, label_map={words[1]: "cavity"})
    for i, (word, person) in enumerate(((words[0], NFC), (words[1], NFD), ("solid", NFC))):
        png(folder / word / person / f"{i}.png", i)
    manifest, site = ingest(tmp_path)
    assert manifest.rejected == {}
    assert len(set(site.groups)) == 1
    assert sorted(site.labels) == [0, 1, 1]


def test_label_map_with_one_word_twice(tmp_path: Path) -> None:
    kinds = {"NFC": "cavity", "NFD": "solid"}
    words = {unicodedata.normalize(form, "Höhle"): kind for form, kind in kinds.items()}
    png(hospital(tmp_path, "images", label_map=words) / "solid" / "a.png", 0)
    with pytest.raises(ConfigError, match="label_map names"):
        ingest(tmp_path)


def test_two_arrays_of_one_name_in_an_npz(tmp_path: Path) -> None:
    def array(values: Any) -> bytes:
        stream = io.BytesIO()
        np.save(stream, values)
        return stream.getvalue()

    folder = hospital(tmp_path, "npz", label={"from": "npz"})
    with zipfile.ZipFile(folder / "images.npz", "w") as archive:
        archive.writestr("train_images.npy", array(noise(0, 4, 8, 8)))
        archive.writestr("train_labels.npy", array(np.zeros(4, np.int64)))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("train_labels.npy", array(np.ones(4, np.int64)))
    with pytest.raises(SourceError, match="npz-layout"):
        ingest(tmp_path)

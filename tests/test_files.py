from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from qkt_clinical.common.files import (
    CHUNK,
    digest_bytes,
    digest_file,
    digest_folder,
    new_folder,
    sweep,
    to_json,
    write_json,
)
from qkt_clinical.common.seeding import derive


def test_digests_by_hand(tmp_path: Path) -> None:
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert digest_bytes(b"") == empty
    data = bytes(range(256)) * (CHUNK // 128)
    (tmp_path / "a").write_bytes(data)
    assert digest_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_digest_of_named_files_is_that_of_a_folder_with_them_alone(tmp_path: Path) -> None:
    for folder, names in (("whole", "abc"), ("part", "ab")):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text(name)
    assert digest_folder(tmp_path / "whole", ("b", "a", "absent")) == digest_folder(tmp_path / "part")


def test_digest_of_a_folder_sees_names_and_contents_not_order(tmp_path: Path) -> None:
    def folder(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return digest_folder(tmp_path / name)

    first = folder("1", {"a": "x", "b/c": "y"})
    assert folder("2", {"b/c": "y", "a": "x"}) == first
    assert folder("3", {"a": "x", "b/c": "z"}) != first
    assert folder("4", {"a": "x", "b/d": "y"}) != first
    assert folder("5", {"a": "y", "b/c": "x"}) != first


def test_json_is_stable_and_finite() -> None:
    assert to_json({"b": 1, "a": [0.5, "ä"]}) == '{\n  "a": [\n    0.5,\n    "ä"\n  ],\n  "b": 1\n}\n'
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            to_json({"a": value})


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_json(path, "\ud800")
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_new_folder_replaces_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    for text in ("one", "two"):
        with new_folder(target) as folder:
            (folder / text).write_text(text)
            assert not (target / text).exists()
        assert [p.name for p in target.iterdir()] == [text]
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_new_folder_that_fails_leaves_what_was(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def fail() -> None:
        with new_folder(target) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("cut")

    with pytest.raises(RuntimeError, match="cut"):
        fail()
    assert list(tmp_path.iterdir()) == []
    with new_folder(target) as folder:
        (folder / "whole").write_text("x")
    with pytest.raises(RuntimeError, match="cut"):
        fail()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "whole"]


def _half_made(target: Path, made: multiprocessing.synchronize.Event) -> None:
    with new_folder(target) as folder:
        (folder / "half").write_text("x")
        made.set()
        time.sleep(60)


def test_sweeping_takes_what_ended_processes_left_whatever_their_number(tmp_path: Path) -> None:
    target = tmp_path / "q"
    context = multiprocessing.get_context("spawn")
    made = context.Event()
    process = context.Process(target=_half_made, args=(target, made))
    process.start()
    assert made.wait(60)
    (living,) = tmp_path.iterdir()
    sweep(target)
    assert (living / "half").is_file(), "its process is at work"
    process.kill()
    process.join()
    # A container's process has the number of its forerunner.
    for name in (f".q.{os.getpid()}.part", f".q.{os.getpid()}.old", ".q.0a1b.old", ".q.x.part", ".qq.1.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    with new_folder(target) as own:
        sweep(target)
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([own.name, ".q.x.part", ".qq.1.part"])
    assert [p.name for p in target.iterdir()] == []


def test_what_a_forerunner_left_is_not_in_the_way(tmp_path: Path) -> None:
    target = tmp_path / "q"
    for ending in ("part", "old"):
        left = tmp_path / f".q.{os.getpid()}.{ending}"
        left.mkdir()
        (left / "half").write_text("x")
    for text in ("one", "two"):
        with new_folder(target) as folder:
            (folder / text).write_text(text)
        assert [p.name for p in target.iterdir()] == [text]


def test_a_folder_that_cannot_take_its_place_leaves_what_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "q"
    with new_folder(target) as folder:
        (folder / "first").write_text("x")
    rename = Path.rename

    def refuse(self: Path, to: Path) -> Path:
        if self.suffix == ".part":
            raise PermissionError("no")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError), new_folder(target) as folder:
        (folder / "second").write_text("x")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["q", "q/first"]


def test_seeds_depend_on_every_name_and_its_place() -> None:
    seeds = [derive(0), derive(1), derive(0, "a"), derive(0, "a", "b"), derive(0, "b", "a"), derive(0, "ab")]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**63 for s in seeds)
    # By hand: the first 8 bytes of sha256("7\0train"), without the lowest bit.
    digest = hashlib.sha256(b"7\0train").hexdigest()
    assert derive(7, "train") == int(digest[:16], 16) // 2

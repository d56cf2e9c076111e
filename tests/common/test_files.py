from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import qkt_clinical
from qkt_clinical.common.files import (
    CHUNK_SIZE,
    TooLarge,
    copy_folder,
    copy_plain,
    digest_bytes,
    digest_file,
    digest_folder,
    new_folder,
    read_plain,
    sweep,
    to_json,
    write_json,
    write_text,
)
from qkt_clinical.common.seeding import derive


def test_digests_by_hand(tmp_path: Path) -> None:
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert digest_bytes(b"") == empty
    data = bytes(range(256)) * (CHUNK_SIZE // 128)
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


# --- files of others ------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


NOT_PLAIN: dict[str, Callable[[Path], object]] = {
    "link": lambda p: p.symlink_to(p.with_name("other")),
    "link to nothing": lambda p: p.symlink_to("nowhere"),
    "link to an endless device": lambda p: p.symlink_to("/dev/zero"),
    "pipe": pipe,
    "folder": lambda p: p.mkdir(),
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_what_is_no_plain_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    (tmp_path / "other").write_bytes(b"secret")
    path = tmp_path / "file"
    NOT_PLAIN[kind](path)
    start = time.monotonic()
    with pytest.raises(OSError, match=r"\[Errno \d+\]"):
        read_plain(path, 100)
    with pytest.raises(OSError, match=r"\[Errno \d+\]"):
        copy_plain(path, tmp_path / "copy", 100)
    assert time.monotonic() - start < 5, "a pipe would wait for ever"
    assert not (tmp_path / "copy").exists()


def test_a_device_is_no_plain_file() -> None:
    with pytest.raises(OSError, match="no plain file"):
        read_plain(Path("/dev/zero"), 100)


def test_no_more_is_read_than_may_be(tmp_path: Path) -> None:
    path, copy = tmp_path / "file", tmp_path / "copy"
    path.write_bytes(b"x" * 100)
    assert read_plain(path, 100) == b"x" * 100
    assert copy_plain(path, copy, 100) == digest_bytes(b"x" * 100)
    assert copy.read_bytes() == b"x" * 100
    copy.unlink()
    for most in (0, 99):
        with pytest.raises(TooLarge):
            read_plain(path, most)
        with pytest.raises(TooLarge):
            copy_plain(path, copy, most)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_copied_folder_holds_plain_files_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "a").write_text("a")
    for number, make in enumerate(NOT_PLAIN.values()):
        make(source / f"n{number}")
    (source / "out").symlink_to("/etc", target_is_directory=True)
    copy_folder(source, tmp_path / "copy")
    assert [p.name for p in sorted((tmp_path / "copy").rglob("*"))] == ["deep", "a"]


def test_many_writers_of_one_file_leave_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    texts = [str(i) * 100_000 for i in range(8)]

    def write(text: str) -> None:
        for _ in range(10):
            write_text(path, text)

    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(write, texts))
    assert path.read_text() in texts
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


FIXED = re.compile(r'"[^"{]*\.part"|\{path\.name\}\.part|\{site\}\.part')


def test_nobody_writes_under_a_name_that_another_writer_has_too() -> None:
    package = Path(qkt_clinical.__file__).parent
    found = {f.name: FIXED.findall(f.read_text(encoding="utf-8")) for f in package.rglob("*.py")}
    assert {name: names for name, names in found.items() if names} == {}

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qkt_clinical.datasets import medmnist as module
from qkt_clinical.datasets.medmnist import class_names, fetch, list_datasets
from qkt_clinical.errors import FetchError

CONTENT = bytes(range(256)) * 4096  # 1 MiB, several chunks


@dataclass
class Mirror:
    """A file server on localhost. ``missing_bytes`` are declared but never sent."""

    url: str = ""
    status: int = 200
    content: bytes = CONTENT
    missing_bytes: int = 0
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    state = Mirror()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            if state.status != 200:
                self.send_error(state.status)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(state.content) + state.missing_bytes))
            self.end_headers()
            self.wfile.write(state.content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/files"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table with the checksum of what the mirror sends, as real files are too large for a test."""
    table = {
        "base_url": "http://127.0.0.1:9",  # nothing listens there: a test that forgets its mirror fails
        "datasets": {
            "bloodmnist": {
                "title": "BloodMNIST",
                "task": "multi-class",
                "dims": 2,
                "channels": 3,
                "licence": "CC BY 4.0",
                "classes": ["a", "b"],
                "sizes": {
                    "28": {"file": "bloodmnist.npz", "md5": hashlib.md5(CONTENT).hexdigest()},
                    "64": {"file": "bloodmnist_64.npz", "md5": "0" * 32},
                },
            }
        },
    }
    monkeypatch.setattr(module, "_table", lambda: table)


def test_download_is_verified_and_kept(mirror: Mirror, known: None, tmp_path: Path) -> None:
    path = fetch("bloodmnist", tmp_path / "new" / "folder", base_url=mirror.url, progress=False)
    assert path == tmp_path / "new" / "folder" / "bloodmnist.npz"
    assert path.read_bytes() == CONTENT
    assert mirror.asked == ["/files/bloodmnist.npz?download=1"]
    assert [p.name for p in path.parent.iterdir()] == ["bloodmnist.npz"]


def test_second_call_downloads_nothing(mirror: Mirror, known: None, tmp_path: Path) -> None:
    first = fetch("bloodmnist", tmp_path, base_url=mirror.url, progress=False)
    assert fetch("bloodmnist", tmp_path, base_url=mirror.url, progress=False) == first
    assert len(mirror.asked) == 1


def test_a_damaged_file_is_downloaded_again(mirror: Mirror, known: None, tmp_path: Path) -> None:
    (tmp_path / "bloodmnist.npz").write_bytes(CONTENT[:-1])
    assert fetch("bloodmnist", tmp_path, base_url=mirror.url, progress=False).read_bytes() == CONTENT


def test_progress_bar_reaches_the_end(
    mirror: Mirror, known: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fetch("bloodmnist", tmp_path, base_url=mirror.url, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "100%" in err
    assert "1.05M/1.05M" in err


def assert_fails(mirror: Mirror, folder: Path, code: str, size: int = 28) -> FetchError:
    with pytest.raises(FetchError) as caught:
        fetch("bloodmnist", folder, size=size, base_url=mirror.url, progress=False)
    assert caught.value.code == code
    assert caught.value.remedy
    assert list(folder.iterdir()) == []
    return caught.value


def test_wrong_checksum(mirror: Mirror, known: None, tmp_path: Path) -> None:
    error = assert_fails(mirror, tmp_path, "fetch-checksum", size=64)
    assert "0" * 32 in error.message
    assert mirror.asked == ["/files/bloodmnist_64.npz?download=1"]


def test_cut_connection(mirror: Mirror, known: None, tmp_path: Path) -> None:
    mirror.missing_bytes = 1000
    assert_fails(mirror, tmp_path, "fetch-connection")


def test_cut_connection_keeps_no_more_than_before(mirror: Mirror, known: None, tmp_path: Path) -> None:
    mirror.missing_bytes = 1000
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FetchError):
        fetch("bloodmnist", tmp_path, base_url=mirror.url, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_missing_file(mirror: Mirror, known: None, tmp_path: Path) -> None:
    mirror.status = 404
    assert "404 Not Found" in assert_fails(mirror, tmp_path, "fetch-http").message


def test_no_server(mirror: Mirror, known: None, tmp_path: Path) -> None:
    with pytest.raises(FetchError) as caught:
        fetch("bloodmnist", tmp_path, progress=False)
    assert caught.value.code == "fetch-connection"
    assert mirror.asked == []


def test_stalled_server(mirror: Mirror, known: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT_S", 0.2)
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
        mirror.url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert_fails(mirror, tmp_path, "fetch-connection")


def test_folder_that_is_a_file(mirror: Mirror, known: None, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(FetchError) as caught:
        fetch("bloodmnist", tmp_path / "taken", base_url=mirror.url, progress=False)
    assert caught.value.code == "fetch-disk"


def test_unknown_name_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="bloodmnist") as caught:
        fetch("blodmnist", tmp_path)
    assert caught.value.code == "fetch-unknown"


def test_unknown_size(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="28, 64, not 128"):
        fetch("organmnist3d", tmp_path, size=128)


def test_table_is_complete() -> None:
    datasets = list_datasets()
    assert len(datasets) == 18
    assert sum(d.dims == 3 for d in datasets.values()) == 6
    sums = []
    for name, dataset in datasets.items():
        assert list(dataset.files) == ([28, 64] if dataset.dims == 3 else [28, 64, 128, 224])
        assert dataset.licence.startswith("CC BY")
        assert len(dataset.classes) == len(set(dataset.classes)) >= 2
        for size, (file, md5) in dataset.files.items():
            assert file == (f"{name}.npz" if size == 28 else f"{name}_{size}.npz")
            assert re.fullmatch(r"[0-9a-f]{32}", md5)
            sums.append(md5)
    assert len(sums) == len(set(sums)) == 60


def test_class_names_by_file_name() -> None:
    assert class_names(Path("x/pneumoniamnist_224.npz")) == ("normal", "pneumonia")
    assert class_names(Path("x/pneumoniamnist_300.npz")) is None

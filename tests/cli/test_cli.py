from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from qkt_clinical import __version__
from qkt_clinical.catalog import STAGES
from qkt_clinical.cli import main
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.models.bundle import write_bundle
from tests.four_hospitals import CLASSES, PARAMS, SHAPE, write_hospitals
from tests.places import ROOT
from tests.sample_run import sample_params, write_pictures, write_sample_run
from tests.shapes import spec

HEAVY = (
    *("torch", "monai", "mlflow", "sklearn", "pandas", "matplotlib", "scipy", "dvc", "pydicom", "nibabel"),
    *("pydantic", "rich", "yaml", "numpy"),
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_hospitals(tmp_path)
    data = PARAMS.model_dump(mode="json") | {"queries": {"aster-q": {"hospital": "aster", "query": "q"}}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(data))
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    code: Any = 0
    try:
        main([str(a) for a in arguments])
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    return int(code or 0), out, err


# --- help is quick --------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("query",), ("ingest",), ("registry",), ("federation",), ("train",)])
def test_help_is_quick_and_loads_nothing_heavy(tmp_path: Path, words: tuple[str, ...]) -> None:
    code = f"""
import sys
try:
    from qkt_clinical.cli import main
    main([*{words!r}, "--help"])
finally:
    print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)
"""
    best = 9.0
    for _ in range(10):  # the first run may have to compile; a busy machine makes several runs slow
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        assert process.stderr is not None
        out, err = process.stdout.read(), process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        assert err.splitlines()[-1] == "[]"
        assert "Exit codes" in out
        best = min(best, usage.ru_utime + usage.ru_stime)
        if best < 0.3:
            break
    assert best < 0.3


def test_every_stage_is_a_command_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for stage in STAGES:
        assert f" {stage} " in out
        code, text, _ = run(capsys, stage, "--help")
        assert code == 0
        assert "--root" in text or "Commands" in text


def test_the_installed_command_prints_its_version() -> None:
    command = Path(sys.executable).parent / "qkt"
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{__version__}\n"


# --- exit codes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("plan", "--no-such-option"),
        ("train", "--device", "tpu"),
        ("phantom", "--dims", "4"),
        ("phantom", "--images-per-site", "many"),
        ("plan", "a", "b", "c"),
    ],
)
def test_wrong_use_ends_with_2(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert "Usage: qkt" in err or "Usage:" in err


@pytest.mark.parametrize(
    ("arguments", "error", "remedy"),
    [
        (("plan",), "config", "Check the path"),
        (("ingest", "aster"), "config", "Check the path"),
        (("summary",), "config", "Run 'dvc repro'"),
    ],
)
def test_an_empty_folder_ends_with_1_and_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], error: str, remedy: str
) -> None:
    code, out, err = run(capsys, *arguments, "--root", tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith(f"error [{error}]: ")
    assert remedy in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("plan", "zinnia", "q"), "config", "no hospital 'zinnia'"),
        (("plan", "astre", "q"), "config", "no hospital 'astre'"),
        (("plan", "birch"), "config", "no query of birch"),
        (("plan", "../../etc", "q"), "config", "is no site name"),
        (("train", "birch"), "prepared", "qkt ingest"),
        (("train", "birch", "--json"), "prepared", "qkt ingest"),
        (("mask", "zinnia"), "bundle-missing", "qkt train zinnia"),
        (("mask", "birch"), "bundle-size", "send it again"),
        (("transfer", "aster", "q"), "bundle-size", "send it again"),
    ],
)
def test_what_a_user_can_put_right_ends_with_1_and_one_line(
    capsys: pytest.CaptureFixture[str], root: Path, arguments: tuple[str, ...], error: str, words: str
) -> None:
    code, out, err = run(capsys, *arguments, "--root", root)
    assert (code, out) == (1, "")
    assert err.startswith(f"error [{error}]: ")
    assert words in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_no_traceback_from_the_process_either(root: Path) -> None:
    (root / "params.yaml").write_text("classes: [a\n")
    command = [sys.executable, "-m", "qkt_clinical.cli", "plan", "-C", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error [config]: not valid YAML")
    assert done.stderr.count("\n") == 1


# --- results --------------------------------------------------------------------------------------


def test_plan_in_words_and_as_json(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    code, out, err = run(capsys, "plan", "-C", root)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("aster/q: birch, cedar; ")
    assert lines[1:] == [
        "  + birch: knows c",
        "  + cedar: knows c",
        "  - dahlia: does not know c or a class of the hospital's own",
    ]
    code, out, err = run(capsys, "plan", "aster", "q", "-C", root, "--json")
    assert (code, err) == (0, "")
    (plan,) = json.loads(out)
    assert [t["site"] for t in plan["teachers"] if t["relevant"]] == ["birch", "cedar"]
    assert plan == json.loads((Workspace(root).fetched("aster", "q") / "plan.json").read_text())


def test_mask_in_words_and_as_json(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    from qkt_clinical.models.networks import build

    network = build(spec("densenet-small"), seed=0)
    card = {
        "kind": "teacher",
        "site": "birch",
        "classes": CLASSES,
        "input": {"shape": SHAPE, "normalisation": "unit", "spacing_mm": None},
        "training": {},
    }
    write_bundle(Workspace(root).teacher("birch"), network, card)
    code, out, err = run(capsys, "mask", "birch", "-C", root, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)["birch"]
    assert set(found) == {"known", "scores", "threshold"}
    assert list(found["scores"]) == list(CLASSES)
    assert found["known"] == [c for c in CLASSES if found["scores"][c] >= found["threshold"]]
    code, out, _ = run(capsys, "mask", "birch", "-C", root)
    assert (code, out) == (0, f"birch: knows {', '.join(found['known'])}\n")


@pytest.mark.parametrize(
    "content", ["{", "[]x", '[{"hospital": "a"}]', "[NaN]", '{"a": 1}', "[1]", "[" * 100_000, "\xff\xfe"]
)
def test_a_damaged_summary_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str
) -> None:
    path = Workspace(tmp_path).reports / "queries.json"
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="latin-1")
    code, out, err = run(capsys, "summary", "-C", tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith("error [outputs]: ")
    assert str(path) in err
    assert err.count("\n") == 1


def test_summary_prints_the_table_of_a_run(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    figures = {"query_accuracy": 0.0, "retained_accuracy": 0.9, "balanced_accuracy": 0.6}
    rows = [
        {
            "hospital": "aster",
            "query": "q",
            "classes": ["c"],
            "method": "qkt",
            "teachers": ["birch", "cedar"],
            "bytes_moved": 2_500_000,
            "before": figures,
            "after": figures | {"query_accuracy": 0.875, "balanced_accuracy": 0.9},
        }
    ]
    path = Workspace(root).reports / "queries.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(rows))
    code, out, err = run(capsys, "summary", "-C", root)
    assert (code, err) == (0, "")
    for word in ("aster", "birch, cedar", "0.000 → 0.875", "0.600 → 0.900", "2.5 MB"):
        assert word in out
    code, out, _ = run(capsys, "summary", "-C", root, "--json")
    old = {"test_images": "others", "others": None}  # of before answers were judged on own images
    assert (code, json.loads(out)) == (0, [rows[0] | old])
    own = rows[0] | {
        "test_images": "own",
        "others": {"before": figures, "after": figures | {"query_accuracy": 1}},
    }
    path.write_text(json.dumps([own]))
    code, out, _ = run(capsys, "summary", "-C", root)
    first, second = (line for line in out.splitlines() if "0.000 → " in line)
    assert "own" in first
    assert "0.000 → 0.875" in first
    assert "others" in second
    assert "0.000 → 1.000" in second
    assert "whose scanner and stain may give them away" in out
    code, out, _ = run(capsys, "summary", "-C", root, "--json")
    assert (code, json.loads(out)) == (0, [own])


def test_a_damaged_summary_names_its_file(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    path = Workspace(root).reports / "queries.json"
    path.parent.mkdir(parents=True)
    for text in ("", "[", "{}", "[1]", '[{"hospital": "a"}]', "\x00", "null", "[" * 100_000):
        path.write_text(text)
        for extra in ((), ("--json",)):
            code, out, err = run(capsys, "summary", "-C", root, *extra)
            assert (code, out) == (1, ""), text[:20]
            assert err.startswith("error [outputs]: ")
            assert err.count("\n") == 1
    path.unlink()
    path.mkdir()
    code, _, err = run(capsys, "summary", "-C", root)
    assert (code, err.startswith("error [outputs]: ")) == (1, True)


# --- what comes from elsewhere does not steer the terminal ----------------------------------------

HOSTILE = "a\x1b[31mred\x1b]0;title\x07\r\x9b2J\x7f\u202e\ud800[bold]b"


def test_nothing_printed_holds_a_control_character(capsys: pytest.CaptureFixture[str]) -> None:
    from qkt_clinical.cli.options import print_json, say

    say(HOSTILE)
    text = HOSTILE.replace("\ud800", "")  # no text in UTF-8: stands as its escape
    print_json({text: [text, "\U000e0001"]})
    out = capsys.readouterr().out
    assert all(c.isprintable() for c in out.replace("\n", ""))
    assert "[bold]b" in out
    assert json.loads(out.partition("\n")[2]) == {text: [text, "\U000e0001"]}


def test_an_error_and_a_table_are_printed_without_them(
    capsys: pytest.CaptureFixture[str], root: Path
) -> None:
    code, _, err = run(capsys, "plan", HOSTILE.replace("\ud800", ""), "q", "-C", root)
    assert code == 1
    assert err.count("\n") == 1
    assert err.rstrip("\n").isprintable()
    figures = {"query_accuracy": 0.0, "retained_accuracy": 0.9, "balanced_accuracy": 0.6}
    name = HOSTILE.replace("\ud800", "")
    row = {"hospital": name, "query": name, "classes": [name], "method": name, "teachers": [name]}
    path = Workspace(root).reports / "queries.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([row | {"bytes_moved": 1, "before": figures, "after": figures}]))
    code, out, _ = run(capsys, "summary", "-C", root)
    assert code == 0
    assert all(c.isprintable() for c in out.replace("\n", ""))
    assert "[bold]" in out.replace("\n", "").replace(" ", "")


def test_no_command_prints_past_the_escape() -> None:
    """Whoever adds a command prints with say() or print_json()."""
    allowed = {"options.py": 2, "app.py": 1, "benchmark.py": 1, "query.py": 1, "federation.py": 1}
    for file in sorted((ROOT / "qkt_clinical" / "cli").glob("*.py")):
        text = file.read_text()
        assert len(re.findall(r"(?<![\w.])print\(", text)) == allowed.get(file.name, 0), file.name
        assert "typer.echo" not in text


# --- a disk that is full, a folder that may not be written ----------------------------------------


class Disk:
    """Refuses to write below a folder, as long as ``number`` is set."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.folder = ""

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.number is None or event not in ("open", "os.mkdir", "sqlite3.connect"):
            return
        path = arguments[0]
        writes = event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and isinstance(path, str | Path) and str(path).startswith(self.folder):
            raise OSError(self.number, os.strerror(self.number), str(path))


DISK = Disk()
WRITERS = (
    *(("report",), ("gate",), ("track",), ("evaluate",), ("train", "h0"), ("mask", "h0"), ("plan",)),
    ("query", "new", "h0", "another", "--classes", "platelet"),
)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    params = sample_params(train={"epochs": 1})
    write_sample_run(root, params, weights=True)
    write_pictures(root, params, params.sites)
    labels = np.load(Workspace(root).prepared("h0") / "labels.npy")
    labels[:] = np.arange(len(labels)) % 2  # a teacher needs two classes
    np.save(Workspace(root).prepared("h0") / "labels.npy", labels, allow_pickle=False)
    splits = Workspace(root).prepared("h0") / "splits.json"
    found = json.loads(splits.read_text())
    found["val"], found["train"] = found["train"][:4], found["train"][4:]
    splits.write_text(json.dumps(found))
    (root / "hospitals" / "h0").mkdir(parents=True)
    (root / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    sys.addaudithook(DISK.hook)  # there is no way to take it away again
    DISK.folder = str(root)
    return root


@pytest.mark.parametrize(
    ("words", "number"),
    [
        *((words, "ENOSPC") for words in WRITERS),
        *((WRITERS[0], number) for number in ("EDQUOT", "EROFS", "EACCES", "EIO")),
        *((words, "EROFS") for words in WRITERS[1:3]),
    ],
)
def test_what_cannot_be_written_is_one_line(
    capsys: pytest.CaptureFixture[str], whole_run: Path, number: str, words: tuple[str, ...]
) -> None:
    DISK.number = getattr(errno, number)
    try:
        code, out, err = run(capsys, *words, "-C", whole_run)
    finally:
        DISK.number = None
    assert (code, out) == (1, "")
    (line,) = [line for line in err.splitlines() if not re.match(r"(train|transfer) .*: \d+/\d+", line)]
    assert line.startswith("error [disk-full]: " if number in ("ENOSPC", "EDQUOT") else "error [system]: ")
    assert str(whole_run) not in line

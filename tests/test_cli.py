from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qkt_clinical import __version__
from qkt_clinical.catalog import STAGES
from qkt_clinical.cli import main
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.models.bundle import write_bundle
from tests.four_hospitals import CLASSES, PARAMS, SHAPE, write_hospitals
from tests.shapes import spec

HEAVY = ("torch", "monai", "mlflow", "sklearn", "pandas", "matplotlib", "scipy", "dvc", "pydicom", "nibabel")


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


def test_help_is_quick_and_loads_nothing_heavy(tmp_path: Path) -> None:
    code = f"""
import sys
try:
    from qkt_clinical.cli import main
    main(["--help"])
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
        if best < 0.5:
            break
    assert best < 0.5


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
    assert (code, json.loads(out)) == (0, rows)

"""dvc.yaml against the code: what a stage imports and reads is what its deps and params list."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.dependencies import closure, code_list, code_text, entry, files_of, imports
from pipelines.start import of_all, of_query, of_site, start
from qkt_clinical.catalog import STAGES
from qkt_clinical.config.loading import load_params
from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import PRIVATE, keep_private
from qkt_clinical.datasets.phantom import phantom_params, write_federation
from qkt_clinical.datasets.workspace import write_workspace
from qkt_clinical.errors import ConfigError
from tests.four_hospitals import write_hospitals
from tests.places import ROOT

pytestmark = pytest.mark.slow


def dvc_stages() -> dict[str, dict[str, Any]]:
    """Stage name to its body; of a foreach stage the body of one."""
    found = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    return {name: body.get("do", body) for name, body in found.items()}


BODIES = dvc_stages()
FOREACH = {
    name: body.get("foreach")
    for name, body in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items()
}


def keys(listed: list[Any]) -> list[str]:
    """Names in a list of DVC outs, of which some carry settings."""
    return [next(iter(item)) if isinstance(item, dict) else item for item in listed]


def outputs(stage: str) -> list[str]:
    body = BODIES[stage]
    return [name for part in ("outs", "metrics", "plots") for name in keys(body.get(part, []))]


def test_the_imports_are_followed() -> None:
    """The follower itself, on what is known: a lazy import, a package, a chain."""
    assert ROOT / "qkt_clinical" / "records" / "card.py" in closure(entry("mask"))
    assert ROOT / "qkt_clinical" / "stages" / "__init__.py" in closure(entry("mask"))
    assert ROOT / "qkt_clinical" / "training" / "classifier.py" not in closure(entry("mask"))
    assert ROOT / "qkt_clinical" / "datasets" / "phantom" / "__init__.py" in closure(entry("ingest"))


def test_stages_are_those_of_the_catalog_in_their_order() -> None:
    assert tuple(BODIES) == tuple(STAGES)
    modules = {p.stem for p in (ROOT / "pipelines").glob("*.py")} - {"__init__", "dependencies", "start"}
    assert modules == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_the_code_of_a_stage_is_written_down(stage: str) -> None:
    assert f"pipelines/code/{stage}.txt" in BODIES[stage]["deps"]
    assert not any(d.startswith("qkt_clinical") for d in BODIES[stage]["deps"])
    written = (ROOT / "pipelines" / "code" / f"{stage}.txt").read_text()
    assert written == code_list(stage), "the code has changed: run 'make deps' and commit what it writes"


def test_comments_and_docstrings_are_no_change_of_the_code() -> None:
    plain = 'x = "a # b"\n\n\ndef f():\n    return f"{x} # {1}"\n'
    told = (
        '"""What it is."""\n# Why.\nx = "a # b"  # said\n'
        '\ndef f():\n    """Says."""\n    return f"{x} # {1}"\n'
    )
    assert code_text(told) == code_text(plain)
    assert code_text(plain.replace("1", "2")) != code_text(plain)


def test_what_a_package_carries_counts_too() -> None:
    assert "qkt_clinical/ingest/templates/integrity.html" in code_list("ingest")
    assert "qkt_clinical/report/templates/base.html" in code_list("report")


@pytest.mark.parametrize("stage", STAGES)
def test_the_command_is_the_stages_module(stage: str) -> None:
    assert BODIES[stage]["cmd"] == f"python3 -m pipelines.{stage}", "a shell reads it: no names"
    tree = ast.parse(entry(stage).read_text())
    (main,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main"]
    wanted = {"${sites}": ["site"], "${queries}": ["hospital", "query"], None: []}[FOREACH[stage]]
    assert [a.arg for a in main.args.args] == ["params", *wanted]


def params_read(stage: str) -> set[str]:
    """Keys of params.yaml that the room a stage calls reads, as ``params.<key>``, with what of a section."""
    found: set[str] = set()
    starting = {n for n in imports(entry(stage)) if n.startswith("pipelines.start")}
    starting |= {"qkt_clinical.config.params", "qkt_clinical.common.console"}
    for module in imports(entry(stage)) - starting:
        for file in files_of(module)[1:]:
            room = sorted(file.parent.glob("*.py")) if file.name == "__init__.py" else [file]
            if room[0].parent.name == "stages":
                room = [file]
            for part in room:
                nodes = [
                    n
                    for n in ast.walk(ast.parse(part.read_text(encoding="utf-8")))
                    if isinstance(n, ast.Attribute)
                ]
                inner = {id(node.value) for node in nodes}
                keys = {ast.unparse(node) for node in nodes if id(node) not in inner}
                found |= {key.removeprefix("params.") for key in keys if re.fullmatch(r"params(\.\w+)+", key)}
    return {key for key in found if key.split(".")[0] in Params.model_fields}


def covers(listed: str, read: str) -> bool:
    """Whether a key that a stage lists is one that it reads, or a section of it."""
    return read == listed or read.startswith(f"{listed}.")


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_there_and_every_key_read_is_listed(stage: str) -> None:
    listed = set(BODIES[stage]["params"])
    assert {key.split(".")[0] for key in listed} <= set(yaml.safe_load((ROOT / "params.yaml").read_text()))
    assert params_read(stage)
    assert not [read for read in params_read(stage) if not any(covers(key, read) for key in listed)]


@pytest.mark.parametrize("stage", ["ingest", "train", "mask", "plan", "transfer"])
def test_costly_stages_list_no_key_that_they_do_not_read(stage: str) -> None:
    read = params_read(stage)
    assert not [key for key in BODIES[stage]["params"] if not any(covers(key, r) for r in read)]


def test_no_output_belongs_to_two_stages_and_none_goes_backwards() -> None:
    owners: dict[str, str] = {}
    for stage in BODIES:
        for name in outputs(stage):
            assert name not in owners
            owners[name] = stage
    order = list(BODIES)
    for stage in BODIES:
        for dep in BODIES[stage]["deps"]:
            for output, owner in owners.items():
                if output == dep or output.startswith(f"{dep}/"):
                    assert order.index(owner) < order.index(stage), f"{stage} reads {output} of {owner}"


def test_checkpoints_are_no_outputs() -> None:
    assert not any(name.startswith(".qkt") for stage in BODIES for name in outputs(stage))


def test_committed_params_name_a_stage_each_for_sites_and_queries() -> None:
    params = load_params(ROOT)
    found = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for stage in ("ingest", "train", "mask"):
        assert found[stage]["foreach"] == "${sites}"
    for stage in ("plan", "transfer"):
        assert found[stage]["foreach"] == "${queries}"
    for key, ref in params.queries.items():
        assert (ROOT / "hospitals" / ref.hospital / "queries" / f"{ref.query}.yaml").is_file(), key


def test_a_stage_module_runs_and_its_errors_are_lines(tmp_path: Path) -> None:
    write_hospitals(tmp_path)
    (tmp_path / "params.yaml").write_text(
        "classes: [a, b, c, d]\nsites: [aster, birch, cedar, dahlia]\nqueries: {}\n"
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        code = (
            "import sys, runpy; sys.path.insert(0, sys.argv.pop(1)); "
            "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=False)"
        )
        return subprocess.run(
            [sys.executable, "-c", code, str(ROOT), *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    done = run("pipelines.plan", "aster", "q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "models" / "fetched" / "aster" / "q" / "plan.json").is_file()
    done = run("pipelines.plan", "zinnia", "q")
    assert done.returncode == 1
    assert done.stderr.startswith("error [config]: no hospital 'zinnia' (stage plan, site zinnia)")
    assert done.stderr.count("\n") == 1


# --- names that would be commands -----------------------------------------------------------------

EVIL = ("basophil;touch X;", "$(touch X)", "'; touch X; '", "`touch X`", "a&&touch X", "a\ntouch X\n", "../X")
PLACES = ("site", "key", "hospital", "query")


def with_evil(text: str, place: str) -> dict[str, Any]:
    """Params with the text at one place; a hospital of that name is among the sites, and the first."""
    site = text if place in ("site", "hospital") else "aster"
    ref = {"hospital": site, "query": text if place == "query" else "q"}
    return {
        "classes": ["a", "b", "c", "d"],
        "sites": [site, "birch", "cedar"],
        "queries": {text if place == "key" else "aster-q": ref},
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("place", PLACES)
def test_a_stage_refuses_names_that_are_none_before_it_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    place: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [stage])
    for text in EVIL:
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(with_evil(text, place)))
        monkeypatch.setenv("DVC_STAGE", f"{stage}@{text}")

        def main(*_: object) -> None:
            raise AssertionError("it was run")

        with pytest.raises(SystemExit) as end:
            start(stage, {"${sites}": of_site, "${queries}": of_query, None: of_all}[FOREACH[stage]], main)
        assert end.value.code == 1
        err = capsys.readouterr().err
        assert err.startswith("error [config]: ")
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (EVIL[0], "site"),
        (EVIL[1], "key"),
        # Every stage is tried with every place above; DVC takes seconds for each.
        pytest.param(EVIL[2], "query", marks=pytest.mark.nightly),
        pytest.param(EVIL[3], "hospital", marks=pytest.mark.nightly),
    ],
)
def test_dvc_runs_no_command_out_of_params(tmp_path: Path, text: str, place: str) -> None:
    write_hospitals(tmp_path)
    write_workspace(tmp_path, {"classes": ["a", "b", "c", "d"], "sites": ["aster"], "queries": {}})
    params = yaml.safe_load((tmp_path / "params.yaml").read_text())
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params | with_evil(text, place)))
    for site in {"aster", "birch", "cedar", text}:  # all that DVC asks of a stage before it runs it
        folder = tmp_path / "hospitals" / site
        (folder / "data").mkdir(parents=True, exist_ok=True)
        for file in (
            folder / "site.yaml",
            folder / "queries" / "q.yaml",
            folder / "queries" / f"{text}.yaml",
        ):
            file.parent.mkdir(exist_ok=True)
            file.write_text("{}")
    done = dvc(tmp_path, "repro")
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("error [")]
    assert len(told) == 1, done.stdout + done.stderr
    assert told[0].startswith("error [config]: ")
    assert not list(tmp_path.rglob("X"))


def dvc(root: Path, *words: str, folder: str = ".") -> subprocess.CompletedProcess[str]:
    """DVC in a workspace, under a generous umask."""
    programs = Path(sys.executable).parent
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [programs / "dvc", *words],
        cwd=root / folder,
        env={**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1", "HOME": str(root)},
        capture_output=True,
        text=True,
        check=False,
        umask=0o022,
    )


def test_whose_turn_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    params = load_params(ROOT)
    for address in ("train@birch", "../dvc.yaml:train@birch"):  # from the workspace, and from a folder in it
        monkeypatch.setenv("DVC_STAGE", address)
        assert of_site(params, []) == ["birch"]
    monkeypatch.setenv("DVC_STAGE", "transfer@aster-erythroblast-platelet")
    assert of_query(params, []) == ["aster", "erythroblast-platelet"]
    assert of_query(params, ["elm", "ig"]) == ["elm", "ig"], "what a person says comes first"
    assert of_site(params, ["elm"]) == ["elm"]
    assert of_all(params, []) == []
    for address in ("", "train", "train@", "train@zinnia"):
        monkeypatch.setenv("DVC_STAGE", address)
        for whom in (of_site, of_query):
            with pytest.raises(ConfigError):
                whom(params, [])
    for whom, words in ((of_site, ["a", "b"]), (of_query, ["a"]), (of_all, ["a"])):
        with pytest.raises(ConfigError):
            whom(params, words)


# --- what other users of the machine may read -----------------------------------------------------


def test_nothing_of_a_hospital_is_open_to_other_users(tmp_path: Path) -> None:
    write_federation(tmp_path, images_per_site=20)
    (tmp_path / "hospitals" / "aster" / ".salt").chmod(0o644)
    write_workspace(tmp_path, phantom_params(2))
    done = dvc(tmp_path, "repro", "../dvc.yaml:ingest@aster", folder="hospitals")
    assert done.returncode == 0, done.stdout + done.stderr
    done = dvc(tmp_path, "repro", "ingest@birch")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / ".qkt" / "dvc" / "repo").is_dir()
    for name in (".qkt", ".dvc/cache", ".dvc/tmp", "data", "hospitals/aster/.salt"):
        assert not (tmp_path / name).stat().st_mode & 0o077, name


def test_private_folders_that_are_open_are_closed(tmp_path: Path) -> None:
    for name in PRIVATE:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name).chmod(0o777)
    keep_private(tmp_path)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in PRIVATE} == {0o700}
    keep_private(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_the_checkout_and_a_workspace_have_one_dvc_configuration(tmp_path: Path) -> None:
    write_workspace(tmp_path, {"classes": ["a", "b"], "sites": ["aster"], "queries": {}})
    config = (tmp_path / ".dvc" / "config").read_text()
    assert config == (ROOT / ".dvc" / "config").read_text()
    assert "site_cache_dir = .qkt/dvc\n" in config
    assert "no_scm = true\n" in config

"""dvc.yaml against the code: what a stage imports and reads is what its deps and params list."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from qkt_clinical.catalog import STAGES
from qkt_clinical.config import Params, load_params
from tests.four_hospitals import write_hospitals

ROOT = Path(__file__).resolve().parent.parent


def dvc_stages() -> dict[str, dict[str, Any]]:
    """Stage name to its body; of a foreach stage the body of one."""
    found = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    return {name: body.get("do", body) for name, body in found.items()}


BODIES = dvc_stages()


def files_of(module: str) -> list[Path]:
    """The files that are run when a dotted name is imported: every package's ``__init__`` on the way."""
    found, parts = [], module.split(".")
    for end in range(1, len(parts) + 1):
        place = ROOT.joinpath(*parts[:end])
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                found.append(file)
    return found


@cache
def imports(file: Path) -> frozenset[str]:
    """Every module of ours that a file names, wherever in it the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports are not followed"
            names |= {str(node.module), *(f"{node.module}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
    return frozenset(n for n in names if n.split(".")[0] in ("qkt_clinical", "pipelines"))


def closure(start: Path) -> set[Path]:
    """All of our files that are run when a file is."""
    seen: set[Path] = set()
    waiting = [start]
    while waiting:
        file = waiting.pop()
        if file not in seen:
            seen.add(file)
            waiting += [f for module in imports(file) for f in files_of(module)]
    return seen


def entry(stage: str) -> Path:
    return ROOT / "pipelines" / f"{stage}.py"


def code_deps(stage: str) -> list[str]:
    return [d for d in BODIES[stage]["deps"] if d.split("/")[0] in ("qkt_clinical", "pipelines")]


def keys(listed: list[Any]) -> list[str]:
    """Names in a list of DVC outs, of which some carry settings."""
    return [next(iter(item)) if isinstance(item, dict) else item for item in listed]


def outputs(stage: str) -> list[str]:
    body = BODIES[stage]
    return [name for part in ("outs", "metrics", "plots") for name in keys(body.get(part, []))]


def test_the_imports_are_followed() -> None:
    """The follower itself, on what is known: a lazy import, a package, a chain."""
    assert ROOT / "qkt_clinical" / "card.py" in closure(entry("mask"))
    assert ROOT / "qkt_clinical" / "stages" / "__init__.py" in closure(entry("mask"))
    assert ROOT / "qkt_clinical" / "training.py" not in closure(entry("mask"))
    assert ROOT / "qkt_clinical" / "phantom" / "__init__.py" in closure(entry("ingest"))


def test_stages_are_those_of_the_catalog_in_their_order() -> None:
    assert tuple(BODIES) == tuple(STAGES)
    modules = {p.stem for p in (ROOT / "pipelines").glob("*.py")} - {"__init__"}
    assert modules == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_code_deps_are_what_the_stage_imports(stage: str) -> None:
    listed = code_deps(stage)
    needed = {f.relative_to(ROOT).as_posix() for f in closure(entry(stage))} | {"pipelines/__init__.py"}
    files = {d for d in listed if d.endswith(".py")}
    folders = {d for d in listed if not d.endswith(".py")}
    assert len(listed) == len(files) + len(folders), "nothing is listed twice"
    assert all((ROOT / d).is_dir() for d in folders)
    inside = {f for f in needed if any(f.startswith(f"{d}/") for d in folders)}
    assert needed - inside - files == set(), "imported, but a change of it would not run the stage again"
    assert files - needed == set(), "listed, but not imported: a change of it would run the stage for nothing"
    assert files & inside == set(), "listed by its folder already"
    for folder in folders:
        assert any(f.startswith(f"{folder}/") for f in needed), f"nothing of {folder} is imported"


@pytest.mark.parametrize("stage", STAGES)
def test_the_command_is_the_stages_module(stage: str) -> None:
    assert BODIES[stage]["cmd"].startswith(f"python3 -m pipelines.{stage}")
    names = BODIES[stage]["cmd"].split()[3:]
    tree = ast.parse(entry(stage).read_text())
    (main,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main"]
    assert len(main.args.args) == len(names)


def params_read(stage: str) -> set[str]:
    """Keys of params.yaml that the room a stage calls reads, as ``params.<key>``."""
    found: set[str] = set()
    for module in imports(entry(stage)) - {"qkt_clinical.config", "qkt_clinical.console"}:
        for file in files_of(module)[1:]:
            room = sorted(file.parent.glob("*.py")) if file.name == "__init__.py" else [file]
            if room[0].parent.name == "stages":
                room = [file]
            for part in room:
                for node in ast.walk(ast.parse(part.read_text(encoding="utf-8"))):
                    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                        found |= {node.attr} if node.value.id == "params" else set()
    return found & set(Params.model_fields)


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_there_and_every_key_read_is_listed(stage: str) -> None:
    listed = set(BODIES[stage]["params"])
    assert listed <= set(yaml.safe_load((ROOT / "params.yaml").read_text()))
    assert params_read(stage)
    assert params_read(stage) <= listed


@pytest.mark.parametrize("stage", ["ingest", "train", "mask", "plan", "transfer"])
def test_costly_stages_list_no_key_that_they_do_not_read(stage: str) -> None:
    assert set(BODIES[stage]["params"]) == params_read(stage)


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

"""dvc.yaml against the code: what a stage imports and reads is what its deps and params list."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.dependencies import closure, code_list, code_text, entry, files_of, imports
from qkt_clinical.catalog import STAGES
from qkt_clinical.config.loading import load_params
from qkt_clinical.config.params import Params
from tests.four_hospitals import write_hospitals

ROOT = Path(__file__).resolve().parent.parent


def dvc_stages() -> dict[str, dict[str, Any]]:
    """Stage name to its body; of a foreach stage the body of one."""
    found = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    return {name: body.get("do", body) for name, body in found.items()}


BODIES = dvc_stages()


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
    modules = {p.stem for p in (ROOT / "pipelines").glob("*.py")} - {"__init__", "dependencies"}
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
    assert BODIES[stage]["cmd"].startswith(f"python3 -m pipelines.{stage}")
    names = BODIES[stage]["cmd"].split()[3:]
    tree = ast.parse(entry(stage).read_text())
    (main,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main"]
    assert len(main.args.args) == len(names)


def params_read(stage: str) -> set[str]:
    """Keys of params.yaml that the room a stage calls reads, as ``params.<key>``."""
    found: set[str] = set()
    for module in imports(entry(stage)) - {"qkt_clinical.config.params", "qkt_clinical.common.console"}:
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

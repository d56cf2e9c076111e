"""What the architecture promises of the rooms, held against their source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from qkt_clinical.catalog import STAGES
from tests.places import ROOT

PACKAGE = ROOT / "qkt_clinical"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [f.relative_to(ROOT).as_posix() for f in FILES]
ROOMS = (
    "errors",
    "catalog",
    "task",
    "config",
    "common",
    "data",
    "records",
    "models",
    "training",
    "qkt",
    "evaluation",
    "datasets",
    "ingest",
    "serving",
    "stages",
    "baselines",
    "report",
    "tracking",
    "jobs",
    "federation",
    "repro",
    "benchmark",
    "cli",
)
"""From the bottom up: a room imports only rooms that stand before it, so that there is no circle either."""


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(file: Path, *, lazily: bool = True) -> set[str]:
    """Every dotted name a file imports; without ``lazily`` only at its top level."""
    nodes: Iterator[ast.AST] = ast.walk(tree(file)) if lazily else iter(tree(file).body)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
    return names


def roots(file: Path, *, lazily: bool = True) -> set[str]:
    return {n.split(".")[0] for n in imported(file, lazily=lazily)}


def room(file: Path) -> str:
    """A file's first name below the package: ``masking``, ``ingest``, ``report``."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms_used(file: Path) -> set[str]:
    return {n.split(".")[1] for n in imported(file) if n.startswith("qkt_clinical.")}


def calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the dotted name of what is called."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_every_room_has_its_place() -> None:
    assert {room(f) for f in FILES} - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_imports_go_down(file: Path) -> None:
    above = set(ROOMS[ROOMS.index(room(file)) + 1 :]) if room(file) in ROOMS else set()
    assert rooms_used(file) & above == set()


def test_the_benchmark_uses_the_federation_late() -> None:
    for file in (f for f in FILES if room(f) == "benchmark"):
        assert not any("federation" in name.split(".") for name in imported(file, lazily=False)), file


OF_LABELS = {
    "argmax",
    "softmax",
    "log_softmax",
    "cross_entropy",
    "nll_loss",
    "binary_cross_entropy_with_logits",
}
NOT_OF_LABELS = {
    "qkt/masks.py conviction": "what a network says of noise, of which there is no label",
    "benchmark/mask_estimators.py _mean_softmax": "the same by other estimators",
    "qkt/masks.py gap_threshold": "the widest gap between the scores of a mask",
    "datasets/partition.py dirichlet_shares": "the hospital with the largest share of a class",
    "datasets/phantom/federation.py _assign": "the class that a generated hospital has most of",
    "ingest/splits.py assign": "the split that lacks most patients",
}
"""Functions that call one of them about something else."""


def functions_of_labels(file: Path) -> set[str]:
    """Module and innermost function of every use of a name in ``OF_LABELS``."""
    place, found = file.relative_to(PACKAGE).as_posix(), set()

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if name in OF_LABELS or (isinstance(node, ast.alias) and node.name.rsplit(".", 1)[-1] in OF_LABELS):
            found.add(f"{place} {function}")
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(tree(file), "")
    return found


def test_only_a_task_knows_how_labels_are_answered() -> None:
    found = {use for file in FILES if room(file) != "task" for use in functions_of_labels(file)}
    assert found == set(NOT_OF_LABELS)


def test_only_a_task_is_taken_by_name_where_work_begins() -> None:
    """The method, training, evaluation and baselines are given the task and choose none."""
    used = {
        room(f) for f in FILES if {"qkt_clinical.task.task_of", "qkt_clinical.task.MULTICLASS"} & imported(f)
    }
    assert used == {"serving", "stages", "federation", "benchmark"}


def test_only_the_federation_and_federated_baselines_import_flare() -> None:
    """Of the baselines those alone that are methods on it; nothing but the federation imports them."""
    importing = {f for f in FILES if "nvflare" in roots(f)}
    methods = {f for f in importing if room(f) == "baselines" and "nvflare" in roots(f, lazily=False)}
    assert {room(f) for f in importing} == {"baselines", "federation"}
    assert {f.stem for f in methods} == {"fedavg", "fedprox", "scaffold"}
    names = {f"qkt_clinical.baselines.{f.stem}" for f in methods}
    assert {room(f) for f in FILES if f not in methods and names & imported(f)} == {"federation"}


def test_only_tracking_imports_mlflow() -> None:
    assert {room(f) for f in FILES if "mlflow" in roots(f)} == {"tracking"}
    for file in (f for f in FILES if room(f) == "tracking"):
        assert "mlflow" not in roots(file, lazily=False), file


@pytest.mark.slow
def test_the_core_loads_no_outer_room_when_it_runs() -> None:
    code = """
import sys
import qkt_clinical.stages.train, qkt_clinical.stages.mask, qkt_clinical.stages.transfer
import qkt_clinical.stages.evaluate, qkt_clinical.qkt.planning, qkt_clinical.ingest, qkt_clinical.serving
outer = {"qkt_clinical.cli", "qkt_clinical.tracking", "qkt_clinical.report", "mlflow", "sklearn", "monai"}
print(sorted(outer & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


OUTSIDE = {"os", "io", "json", "pathlib", "shutil", "tempfile", "subprocess", "socket", "yaml", "safetensors"}
PURE = [f for f in FILES if room(f) == "qkt"] + [PACKAGE / "evaluation" / "metrics.py"]


@pytest.mark.parametrize("file", PURE, ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_the_method_does_no_io(file: Path) -> None:
    outside = {
        "os",
        "io",
        "json",
        "pathlib",
        "shutil",
        "tempfile",
        "subprocess",
        "socket",
        "yaml",
        "safetensors",
    }
    assert roots(file) & outside == set()
    assert not any(
        n.startswith(("qkt_clinical.common.files", "qkt_clinical.common.locks")) for n in imported(file)
    )
    found = {name for name, _ in calls(file)}
    assert found & {"open", "print", "input", "torch.load", "torch.save", "np.load", "np.save"} == set()


WITHOUT_TORCH = (
    "catalog",
    "config",
    "errors",
    "common/console",
    "common/files",
    "common/locks",
    "data/prepared",
    "config/encoder_specs",
    "records",
    "qkt/planning",
    "report",
    "stages/plan",
)


@pytest.mark.parametrize("place", WITHOUT_TORCH)
def test_what_plans_and_help_need_is_free_of_torch(place: str) -> None:
    start = PACKAGE / f"{place}.py"
    waiting, seen = [start] if start.is_file() else sorted((PACKAGE / place).rglob("*.py")), set()
    while waiting:
        file = waiting.pop()
        seen.add(file)
        assert roots(file) & {"torch", "monai", "sklearn"} == set(), file
        modules = {n for n in imported(file) if n.startswith("qkt_clinical.")}
        files = {PACKAGE.parent.joinpath(*n.split(".")).with_suffix(".py") for n in modules}
        waiting += [f for f in files if f.is_file() and f not in seen]
    assert seen


# --- nothing that could run what it reads ---------------------------------------------------------

UNPICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
RUNNERS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.save",
    "yaml.load",
    "yaml.unsafe_load",
}


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_nothing_read_can_run(file: Path) -> None:
    names = imported(file)
    if "pickle.UnpicklingError" in names:  # what torch raises where it refuses to run something
        names -= {"pickle", "pickle.UnpicklingError"}
    assert {n.split(".")[0] for n in names} & UNPICKLERS == set()
    for name, call in calls(file):
        assert name not in RUNNERS, f"line {call.lineno}: {name}"
        assert name.split(".")[0] not in UNPICKLERS, f"line {call.lineno}: {name}"
        if name == "torch.load":  # by the unpickler that makes tensors alone, of a file that a user imports
            assert file.name == "encoders.py", f"line {call.lineno}"
            assert {k.arg: ast.unparse(k.value) for k in call.keywords}["weights_only"] == "True"
        assert name.rsplit(".", 1)[-1] not in {"system", "popen", "load_pickle"}, (
            f"line {call.lineno}: {name}"
        )
        words = {k.arg: k.value for k in call.keywords}
        pickles = words.get("allow_pickle")
        assert pickles is None or ast.unparse(pickles) == "False", f"line {call.lineno}"
        shell = words.get("shell")
        assert shell is None or ast.unparse(shell) == "False", f"line {call.lineno}"
        if name in {"np.load", "numpy.load", "np.save"}:
            assert pickles is not None, f"line {call.lineno}: {name} says nothing about pickle"


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_errors_are_caught_by_name(file: Path) -> None:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
            names = {ast.unparse(n) for n in ast.walk(node.type) if isinstance(n, ast.Name)}
            again = any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(node))
            assert again or names & {"Exception", "BaseException"} == set(), f"line {node.lineno}"


# --- one name for one thing -----------------------------------------------------------------------


def test_stage_module_subcommand_and_description_bear_one_name() -> None:
    text = "".join(
        (PACKAGE / "cli" / f"{name}.py").read_text(encoding="utf-8") for name in ("stages", "ingest")
    )
    for stage in STAGES:
        assert (ROOT / "pipelines" / f"{stage}.py").is_file()
        assert f"\ndef {stage}(" in text
        assert f'"""Stage ``{stage}``' in (ROOT / "pipelines" / f"{stage}.py").read_text(encoding="utf-8")


def public_names() -> dict[str, set[str]]:
    """Public classes and type aliases of the package, each with the modules that define one."""
    found: dict[str, set[str]] = {}
    for file, node in ((f, n) for f in FILES for n in tree(f).body):
        name = node.name if isinstance(node, ast.ClassDef) else None
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.BinOp):
            name = ast.unparse(node.targets[0])
        if name and re.fullmatch("[A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*", name):
            found.setdefault(name, set()).add(file.relative_to(PACKAGE).as_posix())
    return found


def test_one_name_means_one_thing() -> None:
    assert {name: files for name, files in public_names().items() if len(files) > 1} == {}


def test_pages_and_model_cards_do_not_know_each_other() -> None:
    report = {f.stem: imported(f) for f in FILES if room(f) == "report"}
    cards = {"model_card", "model_card_text"}
    pages = set(report) - cards - {"write", "__init__"}
    for ones, others in ((cards, pages), (pages, cards)):
        for name in ones:
            known = {n.removeprefix("qkt_clinical.report.").split(".")[0] for n in report[name]}
            assert not known & others, name


RECORDED = {"evaluate.py", "gate.py"}


def test_files_with_a_model_are_read_through_it() -> None:
    """Who reads what another stage wrote does not take a JSON file apart by itself."""
    readers = [f for f in FILES if room(f) in {"report", "evaluation"} or f.name in RECORDED]
    for file in (f for f in readers if room(f) != "benchmark"):
        found = {name.rsplit(".", 1)[-1] for name, _ in calls(file)}
        assert not found & {"loads", "load", "model_validate_json", "validate_json"}, file


def test_pipelines_stay_thin() -> None:
    for file in sorted((ROOT / "pipelines").glob("*.py")):
        if file.stem not in STAGES:
            continue
        functions = [n for n in ast.walk(tree(file)) if isinstance(n, ast.FunctionDef)]
        assert [f.name for f in functions] == ["main"]
        assert not any(isinstance(n, ast.If | ast.For | ast.While) for n in ast.walk(functions[0]))

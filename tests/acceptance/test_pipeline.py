"""The whole pipeline, with the real programs, in a workspace of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import pydicom
import pytest

from qkt_clinical.common.files import digest_file, digest_folder
from qkt_clinical.config.loading import load_params, parse
from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.datasets.phantom import phantom_params, write_federation
from qkt_clinical.datasets.workspace import write_workspace
from tests.ingest_files import IDENTITIES, IDENTITY, plant_identities

pytestmark = [pytest.mark.acceptance, pytest.mark.slow]

QUICK = {
    "train": {"epochs": 4, "batch_size": 16},
    "transfer": {"images": 16},
    "mask": {"probes": 24},
    "evaluate": {"bootstrap": 20},
}
COARSE = (
    ("size: [24, 24, 24]", "spacing_mm: [2.5, 2.5, 2.5]"),
    ("size: [16, 16, 16]", "spacing_mm: [3.75, 3.75, 3.75]"),
)
"""What a hospital's images are resampled to, and voxels that take less than a third of the time."""
BIN = Path(sys.executable).parent


def run(workspace: Path, *words: str) -> str:
    """Run a program of the environment in a workspace; its output, both streams."""
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(
        [str(BIN / words[0]), *words[1:]],
        cwd=workspace,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(
    scope="module",
    params=[("east", "south"), pytest.param(("east", "north", "south"), marks=pytest.mark.nightly)],
    ids=["two", "three"],
)
def volumes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A 3D federation, NIfTI and DICOM, after one ``dvc repro``, and what that printed.

    Names of people stand wherever a hospital's files can hold one. A query is answered by each method that
    leads to another kind of student: merged, and routed with its experts.
    """
    root, sites = tmp_path_factory.mktemp("volumes"), request.param
    write_federation(root, dims=3, images_per_site=20)
    for folder in (root / "hospitals").iterdir():
        if folder.name not in sites:
            shutil.rmtree(folder)
            continue
        plant(folder / "data")
        settings = (folder / "site.yaml").read_text(encoding="utf-8")
        for fine, coarse in zip(*COARSE, strict=True):
            assert fine in settings
            settings = settings.replace(fine, coarse)
        (folder / "site.yaml").write_text(settings, encoding="utf-8")
    phantom = phantom_params(3)
    queries = {k: q for k, q in phantom["queries"].items() if q["hospital"] in sites}
    queries["east-cavity"] = {"hospital": "east", "query": "cavity"}
    asked = root / "hospitals" / "east" / "queries" / "cavity.yaml"
    asked.parent.mkdir(exist_ok=True)
    asked.write_text("classes: [cavity]\nmethod: routed\nbudget: 0.05\n", encoding="utf-8")
    write_workspace(root, phantom | {"sites": list(sites), "queries": queries} | QUICK)
    return root, run(root, "dvc", "repro")


def plant(data: Path) -> None:
    """Identities in headers, names of files and folders, tables, and in a file that will be rejected."""
    for table in data.glob("*.csv"):
        text = table.read_text(encoding="utf-8")
        for word in ("PHANTOM", "ct-", "chest-"):
            text = text.replace(word, f"{IDENTITY}-{word}")
        table.write_text(text, encoding="utf-8")
    for number, path in enumerate(sorted(data.rglob("*"), reverse=True)):
        if path.name.endswith(".nii.gz"):
            image = nibabel.load(path)
            for field in ("descrip", "db_name", "aux_file", "intent_name"):
                image.header[field] = IDENTITY
            nibabel.save(image, path)
        elif path.suffix == ".dcm":
            header = pydicom.dcmread(path)
            header.PatientID = f"{IDENTITY}-{header.PatientID}"
            header.PatientName = IDENTITY
            if number % 10 == 0:  # two in every series: a full header takes long to write
                plant_identities(header)
            header.save_as(path)
        if path.name.startswith(("PHANTOM", "ct-", "chest-")):
            path.rename(path.with_name(f"{IDENTITY}-{path.name}"))
    (data / f"{IDENTITY}.dcm").write_bytes(b"\0" * 128 + b"DICM" + IDENTITY.encode())
    (data / f"{IDENTITY}.nii").write_bytes(IDENTITY.encode() * 40)


def read(path: Path) -> Any:
    """JSON of a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def test_three_dimensions_end_to_end(volumes: tuple[Path, str]) -> None:
    root, _ = volumes
    params = load_params(root)
    rows = read(root / "reports" / "queries.json")
    assert {(r["hospital"], r["query"]) for r in rows} == {
        (q.hospital, q.query) for q in params.queries.values()
    }
    for row in rows:
        assert row["teachers"]
        assert row["bytes_moved"] > 0
        assert row["before"]["query_accuracy"] == 0.0  # the class is absent
        student = read(root / "models" / "students" / row["hospital"] / row["query"] / "bundle.json")
        assert student["network"]["spatial_dims"] == 3
        assert len(student["input"]["shape"]) == 4
    holders = {p.parent.relative_to(root / "models") for p in root.glob("models/**/reference.json")}
    assert holders == {
        *(Path("teachers") / s for s in params.sites),
        *(Path("students") / r["hospital"] / r["query"] for r in rows),
    }, "beside every own model, and with none that was fetched"
    kinds = {read(root / "data" / "prepared" / s / "manifest.json")["source_kind"] for s in params.sites}
    assert kinds == {"dicom", "nifti"}
    page = (root / "reports" / "index.html").read_text(encoding="utf-8")
    assert all(row["hospital"] in page for row in rows)
    assert not [p for p in root.joinpath("models").rglob("*") if p.suffix in {".pt", ".pth", ".pkl", ".bin"}]


def test_no_identity_leaves_the_hospitals_own_folders(volumes: tuple[Path, str]) -> None:
    """Outputs, DVC's files and cache, MLflow's rows and artifacts, the report, and all that was printed."""
    root, printed = volumes
    headers = read(root / "data" / "prepared" / "south" / "headers.json")
    assert headers[0]["00120062"]["Value"] == ["YES"], "headers are there, and marked as de-identified"
    for site in load_params(root).sites:
        rejected = read(root / "data" / "prepared" / site / "manifest.json")["rejected"]
        assert sum(rejected.values()) >= 1
    noted = root / ".qkt" / "dvc"  # DVC notes names of the files that it has hashed: for their owner alone
    assert noted.is_dir()
    assert (root / ".qkt").stat().st_mode & 0o077 == 0
    own = (root / "hospitals", noted)
    files = [p for p in root.rglob("*") if p.is_file() and not any(o in p.parents for o in own)]
    assert {"mlflow.db", "dvc.lock", "index.html", "integrity.json"} <= {p.name for p in files}
    sources = [p for p in (root / "hospitals").rglob("*") if p.is_file()]
    for secret in IDENTITIES:
        assert any(secret.encode() in p.read_bytes() for p in sources), "it was planted"
        assert secret not in printed
        assert not [p for p in files if secret in str(p.relative_to(root))]
    for path in files:
        content = path.read_bytes()
        assert not [secret for secret in IDENTITIES if secret.encode() in content], path


def test_a_second_repro_runs_nothing(volumes: tuple[Path, str]) -> None:
    root, first = volumes
    assert "Running stage 'train@south'" in first
    again = run(root, "dvc", "repro")
    assert "Running stage" not in again
    assert "Data and pipelines are up to date." in again


def test_dvc_shows_metrics_and_plots(volumes: tuple[Path, str]) -> None:
    root, _ = volumes
    metrics = json.loads(run(root, "dvc", "metrics", "show", "--json"))
    files = metrics[""]["data"]
    assert "mean" in files["reports/metrics.json"]["data"]
    assert "models/teachers/south/metrics.json" in files
    run(root, "dvc", "plots", "show", "--out", "plots")
    assert (root / "plots" / "index.html").stat().st_size > 0


def test_an_empty_registry_is_rebuilt(volumes: tuple[Path, str]) -> None:
    root, _ = volumes
    before = read(root / "reports" / "track.json")
    (root / "mlflow.db").unlink()
    shutil.rmtree(root / "mlartifacts")
    run(root, "qkt", "track")
    assert read(root / "reports" / "track.json") == before
    assert (root / "mlflow.db").is_file()


def test_a_query_job_needs_no_other_hospitals_data(volumes: tuple[Path, str], tmp_path: Path) -> None:
    root, _ = volumes
    asking, name = "south", "ground-glass"
    alone = tmp_path / "alone"
    shutil.copytree(root, alone, symlinks=True, ignore=shutil.ignore_patterns(".dvc", "mlartifacts", "plots"))
    for site in load_params(root).sites:
        if site != asking:
            shutil.rmtree(alone / "hospitals" / site)
            shutil.rmtree(alone / "data" / "prepared" / site)
    expected = digest_folder(Workspace(alone).student(asking, name))
    shutil.rmtree(alone / "models" / "students")
    shutil.rmtree(alone / "models" / "fetched")
    run(alone, "qkt", "plan", asking, name)
    run(alone, "qkt", "transfer", asking, name)
    assert digest_folder(Workspace(alone).student(asking, name)) == expected


def test_one_hospitals_change_leaves_the_others_alone(volumes: tuple[Path, str]) -> None:
    """Runs last: it changes the shared workspace."""
    root, _ = volumes
    table = root / "hospitals" / "east" / "data" / "labels.csv"
    lines = table.read_text(encoding="utf-8").splitlines()
    table.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    sites = load_params(root).sites
    output = run(root, "dvc", "repro", *(f"mask@{site}" for site in sites))
    assert "Running stage 'ingest@east'" in output
    assert "Running stage 'train@east'" in output
    for site in sites:
        for stage in ("ingest", "train", "mask"):
            unchanged = f"Stage '{stage}@{site}' didn't change, skipping" in output
            assert unchanged or site == "east"
    outdated = json.loads(run(root, "dvc", "status", "--json"))
    assert {"transfer@east-cavity", "evaluate"} <= set(outdated), "what is made of it would run again"
    if len(sites) > 2:  # nightly: and it does
        rest = run(root, "dvc", "repro")
        assert "Running stage 'transfer@east-cavity'" in rest
        assert "Running stage 'evaluate'" in rest
    rejected = read(root / "data" / "prepared" / "east" / "manifest.json")["rejected"]
    assert rejected == {"label-missing": 1, "not-nifti": 1, "other-kind": 1}


def pipeline(root: Path, params: Params) -> None:
    """Every stage in this process, in the order of ``params``."""
    from qkt_clinical.ingest import ingest_site
    from qkt_clinical.stages.evaluate import evaluate_queries
    from qkt_clinical.stages.mask import mask_site
    from qkt_clinical.stages.plan import plan_query
    from qkt_clinical.stages.train import train_site
    from qkt_clinical.stages.transfer import transfer_query

    for site in params.sites:
        ingest_site(root, site, params)
        train_site(root, site, params)
        mask_site(root, site, params)
    for ref in params.queries.values():
        plan_query(root, ref.hospital, ref.query, params)
        transfer_query(root, ref.hospital, ref.query, params)
    evaluate_queries(root, params)


@pytest.mark.nightly  # that of teachers and of a query's classes is turned round every time: tests/stages
@pytest.mark.parametrize("sites", [("aster", "birch", "dahlia"), tuple(phantom_params(2)["sites"])], ids=len)
def test_the_order_of_hospitals_changes_nothing(sites: tuple[str, ...], tmp_path: Path) -> None:
    phantom = phantom_params(2)
    queries = {
        key: ref
        for key, ref in phantom["queries"].items()
        if ref["hospital"] in sites and (len(sites) > 3 or key != "aster-erythroblast-platelet")
    }
    settings = phantom | {
        "sites": sites,
        "queries": queries,
        "train": {"epochs": 4, "batch_size": 16},
        "transfer": {"images": 40},
        "evaluate": {"bootstrap": 20},
    }
    backwards = settings | {"sites": sites[::-1], "queries": dict(reversed(list(queries.items())))}
    write_federation(tmp_path, dims=2, images_per_site=60)
    digests = []
    for number, chosen in enumerate((settings, backwards)):
        root = tmp_path / str(number)
        shutil.copytree(tmp_path / "hospitals", root / "hospitals")
        pipeline(root, parse(Params, chosen, file="params.yaml"))
        digests.append(
            {
                str(path.relative_to(root)): digest_file(path)
                for folder in ("data/prepared", "models", "reports")
                for path in sorted((root / folder).rglob("*"))
                if path.is_file()
            }
        )
    assert digests[0] == digests[1]

"""Who may open the images that a site keeps for evaluation alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from qkt_clinical.catalog import BLOOD_CELLS, HELD_BACK
from qkt_clinical.common.files import digest_folder
from qkt_clinical.config.loading import parse
from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.datasets.phantom import write_federation
from qkt_clinical.ingest import ingest_site
from qkt_clinical.stages.train import train_site
from tests.places import ROOT

OPEN_IT = {
    *("data/prepared.py", "ingest/stage.py", "stages/evaluate.py", "report/pictures.py"),
}
"""Files of the package that may open prepared held-back images."""


def test_only_ingest_evaluate_and_the_reports_pictures_open_held_back_images() -> None:
    package = ROOT / "qkt_clinical"
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        opens = "load_held_back" in text or ".held_back(" in text
        assert not opens or path.relative_to(package).as_posix() in OPEN_IT, path


def test_no_stage_that_trains_or_plans_depends_on_them() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    reading = {name for name, stage in stages.items() if "held_back" in str(stage.get("do", stage)["deps"])}
    assert reading == {"evaluate", "report"}


@pytest.mark.slow
def test_a_teacher_is_the_same_bytes_whatever_is_held_back(tmp_path: Path) -> None:
    write_federation(tmp_path, images_per_site=40)
    params = parse(
        Params,
        {
            "classes": BLOOD_CELLS,
            "sites": ["cedar"],
            "queries": {},
            "device": "cpu",
            "train": {"epochs": 2},
        },
        file="params.yaml",
    )
    space = Workspace(tmp_path)
    made = []
    for change in ("whole", "corrupt", "gone", "not named"):
        data = tmp_path / "hospitals" / "cedar" / "data"
        if change == "corrupt":
            for path in (data / "held-back").glob("*.nii.gz"):
                path.write_bytes(b"damaged")
        if change in ("gone", "not named"):
            shutil.rmtree(data / "held-back", ignore_errors=True)
            site = data.parent / "site.yaml"
            site.write_text(site.read_text().replace("held_back: held-back\n", ""))
        ingest_site(tmp_path, "cedar", params)
        if change == "whole":
            apart = np.load(space.held_back("cedar") / "images.npy", mmap_mode="r")
            assert len(apart) == 8
        shutil.rmtree(space.teacher("cedar"), ignore_errors=True)
        shutil.rmtree(space.scratch, ignore_errors=True)
        train_site(tmp_path, "cedar", params, device="cpu")
        made.append((digest_folder(space.prepared("cedar")), digest_folder(space.teacher("cedar"))))
    assert len(set(made)) == 1, HELD_BACK

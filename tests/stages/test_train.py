"""A site's two networks: the teacher, which others get, and its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.prepared import write_prepared
from qkt_clinical.models.bundle import load_bundle
from qkt_clinical.stages.train import train_site, trained_digest
from qkt_clinical.training.classifier import at_home
from tests.places import ROOT
from tests.shapes import CLASSES, same, shapes, state

pytestmark = pytest.mark.slow

SITE = "aster"


def params(**train: object) -> Params:
    return Params.model_validate(
        {
            "seed": 3,
            "device": "cpu",
            "classes": CLASSES,
            "sites": [SITE],
            "queries": {},
            "train": {"epochs": 3, "appearance_images": 28, **train},
        }
    )


def prepare(root: Path, normalisation: str = "unit") -> None:
    images, labels = shapes((0, 1), 20, 5)
    splits = {"train": (0, 28), "calibration": (28, 32), "val": (32, 36), "test": (36, 40)}
    order = np.random.default_rng(0).permutation(len(labels))
    write_prepared(
        Workspace(root).prepared(SITE),
        site=SITE,
        source_kind="images",
        classes=CLASSES,
        images=images[order] if normalisation == "unit" else images[order].astype(np.float32) / 255,
        labels=labels[order],
        groups=np.array([f"p{i}" for i in range(len(labels))]),
        splits={name: np.arange(*ends, dtype=np.int64) for name, ends in splits.items()},
        spacing_mm=None,
        normalisation=normalisation,
        transforms=(),
        outcomes=[],
    )


def test_the_teacher_has_seen_changing_appearance_and_the_own_network_has_not(tmp_path: Path) -> None:
    prepare(tmp_path)
    space = Workspace(tmp_path)
    train_site(tmp_path, SITE, params(appearance=1.0))
    own, teacher = load_bundle(tmp_path / "models" / "own" / SITE), load_bundle(space.teacher(SITE))
    assert space.own(SITE) == own.folder
    assert not same(state(own.network), state(teacher.network))
    assert sorted(teacher.class_means) == [0, 1]
    assert not own.class_means, "nobody gets them"
    assert own.card.image_statistics == teacher.card.image_statistics
    # The own network is what training without appearance gives, bit for bit.
    train_site(tmp_path, SITE, params(appearance=0.0))
    assert same(state(load_bundle(space.own(SITE)).network), state(own.network))


@pytest.mark.parametrize("few", [False, True])
def test_where_appearance_stays_one_network_is_both(tmp_path: Path, few: bool) -> None:
    prepare(tmp_path)
    space = Workspace(tmp_path)
    told: list[tuple[int, int]] = []
    train = {"appearance": 1.0, "appearance_images": 29} if few else {"appearance": 0.0}
    train_site(tmp_path, SITE, params(**train, patience=9), progress=lambda *step: told.append(step))
    assert told[-1] == (3, 3), "trained once"
    own, teacher = load_bundle(space.own(SITE)), load_bundle(space.teacher(SITE))
    assert own.folder != teacher.folder
    assert same(state(own.network), state(teacher.network))


def test_progress_of_two_trainings_is_told_as_of_one(tmp_path: Path) -> None:
    prepare(tmp_path)
    told: list[tuple[int, int]] = []
    train_site(tmp_path, SITE, params(appearance=1.0, patience=9), progress=lambda *step: told.append(step))
    assert told[-1] == (6, 6)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_training_is_made_again_if_the_own_network_was_touched(tmp_path: Path) -> None:
    prepare(tmp_path)
    space = Workspace(tmp_path)
    train_site(tmp_path, SITE, params(appearance=1.0))
    before = trained_digest(space, SITE)
    card = space.own(SITE) / "bundle.json"
    card.write_text(card.read_text() + " ")
    assert trained_digest(space, SITE) != before


def test_a_workspace_of_before_has_one_network(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    assert space.own(SITE) == space.teacher(SITE)


def test_what_a_hospital_keeps_is_read_by_nobody_else() -> None:
    """Own networks are a dependency of what the hospital does with its own images, never of a plan."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    reading = {name for name, stage in stages.items() if "models/own" in str(stage.get("do", stage)["deps"])}
    assert reading == {"transfer", "evaluate"}


def test_the_own_networks_training_differs_in_appearance_alone() -> None:
    train = params(appearance=1.0, epochs=7).train
    assert at_home(train) == train.model_copy(update={"appearance": 0.0})

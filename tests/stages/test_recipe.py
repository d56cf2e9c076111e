"""What artefacts are made of: dvc.yaml, checkpoints, jobs and the federation say the same."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from qkt_clinical.config.loading import parse
from qkt_clinical.config.params import Params, SharedEncoderParams
from qkt_clinical.config.query import QueryConfig
from qkt_clinical.data.prepared import Manifest
from qkt_clinical.stages.recipe import (
    SECTIONS,
    Recipe,
    mask_recipe,
    plan_recipe,
    train_recipe,
    transfer_recipe,
)
from tests.places import ROOT

PARAMS = parse(Params, yaml.safe_load((ROOT / "params.yaml").read_text()), file="params.yaml")
QUERY = QueryConfig(classes=("c",))
MANIFEST = Manifest(
    format="qkt-prepared/1",
    site="aster",
    source_kind="images",
    classes=("a", "b", "c"),
    count=1,
    shape=(3, 16, 16),
    dtype="uint8",
    spacing_mm=None,
    normalisation="unit",
    transforms=(),
    counts={},
    patients={},
    rejected={},
    risks={},
    digests={"images.npy": "0" * 64},
)
READ_DATA = {"train", "plan", "transfer"}
ONE, OTHER = "1" * 64, "2" * 64


def recipes(params: Params = PARAMS, data: Manifest = MANIFEST, **changed: Any) -> dict[str, Recipe]:
    """Of every stage, with the same reads unless changed."""
    read = {"own": ONE, "fetched": ONE, "device": "cpu", "query": QUERY, "name": "q"} | changed
    return {
        "train": train_recipe(params, data, read["device"]),
        "mask": mask_recipe(params, read["own"]),
        "plan": plan_recipe(params, read["query"], data, {"birch": read["fetched"]}),
        "transfer": transfer_recipe(
            params,
            read["name"],
            read["query"],
            data,
            own=read["own"],
            fetched=read["fetched"],
            device=read["device"],
        ),
    }


def changed(first: dict[str, Recipe], second: dict[str, Recipe]) -> set[str]:
    """Stages whose artefact must be made anew."""
    return {stage for stage in first if first[stage].digest != second[stage].digest}


def listed(stage: str) -> list[str]:
    """Sections of params.yaml under a stage of dvc.yaml."""
    body = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]
    return list(body.get("do", body)["params"])


@pytest.mark.parametrize("stage", sorted(SECTIONS))
def test_a_recipe_has_the_sections_that_dvc_lists(stage: str) -> None:
    assert sorted(SECTIONS[stage]) == sorted(listed(stage))
    more = recipes(PARAMS.model_copy(update={"threads": 7}))[stage].params
    assert sorted(more) == sorted(listed(stage))
    assert sorted(recipes()[stage].params) == sorted(set(listed(stage)) - {"threads"}), (
        "the default is not told"
    )


CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"seed": PARAMS.seed + 1},
    "threads": {"threads": PARAMS.threads + 1},
    "mask": {"mask": PARAMS.mask.model_copy(update={"threshold": 0.123})},
    "train": {"train": PARAMS.train.model_copy(update={"epochs": PARAMS.train.epochs + 1})},
    "transfer": {"transfer": PARAMS.transfer.model_copy(update={"screening": not PARAMS.transfer.screening})},
    "sites": {"sites": PARAMS.sites[::-1]},
    "shared_encoder": {
        "shared_encoder": SharedEncoderParams(name="resnet18", weights="w.safetensors", digest="0" * 64)
    },
    "evaluate": {"evaluate": PARAMS.evaluate.model_copy(update={"bootstrap": 7})},
    "gate": {"gate": PARAMS.gate.model_copy(update={"query_images": 7})},
    "track": {"track": PARAMS.track.model_copy(update={"experiment": "x"})},
}


@pytest.mark.parametrize("section", sorted(CHANGES))
def test_a_changed_section_makes_anew_what_reads_it_and_nothing_else(section: str) -> None:
    after = recipes(PARAMS.model_copy(update=CHANGES[section]))
    assert changed(recipes(), after) == {stage for stage in SECTIONS if section in listed(stage)}


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({"device": "cuda"}, {"train", "transfer"}),
        ({"own": OTHER}, {"mask", "transfer"}),
        ({"fetched": OTHER}, {"plan", "transfer"}),
        ({"query": QueryConfig(classes=("c",), budget=0.1)}, {"plan", "transfer"}),
        ({"name": "other"}, {"transfer"}),
        (
            {"data": MANIFEST.model_copy(update={"digests": {"images.npy": OTHER}})},
            {"train", "plan", "transfer"},
        ),
        ({"data": MANIFEST.model_copy(update={"classes": ("c", "b", "a")})}, {"train", "plan", "transfer"}),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_a_stage_reads_counts(change: dict[str, Any], stages: set[str]) -> None:
    assert changed(recipes(), recipes(**change)) == stages


def test_what_was_asked_for_is_not_what_works() -> None:
    """``auto`` and ``cpu`` make the same bytes where there is no other processor."""
    asked = recipes(PARAMS.model_copy(update={"device": "cpu"}))
    assert changed(recipes(PARAMS.model_copy(update={"device": "auto"})), asked) == set()

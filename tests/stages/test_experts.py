"""The experts that a routed student keeps: as fetched, or as they were brought to the hospital's images."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from qkt_clinical.common.files import digest_folder, write_json
from qkt_clinical.models.bundle import Bundle, load_bundle, write_bundle
from qkt_clinical.models.networks import build
from qkt_clinical.qkt.adaptation import measure_statistics, with_statistics
from qkt_clinical.qkt.panel import Teacher
from qkt_clinical.qkt.steps import Answer
from qkt_clinical.records.card import MASK, MEANS, REFERENCE
from qkt_clinical.stages.transfer import write_experts
from tests.shapes import CLASSES, CPU, same, spec, state


def fetched(root: Path, site: str, seed: int) -> Bundle:
    folder = root / "teachers" / site
    folder.mkdir(parents=True)
    card = {
        "kind": "teacher",
        "site": site,
        "classes": CLASSES,
        "input": {"shape": (3, 16, 16), "normalisation": "unit", "spacing_mm": None},
        "training": {"epochs": 3},
    }
    write_bundle(folder, build(spec(), seed=seed), card)
    mask: dict[str, Any] = {"estimator": "combined", "probes": 8, "seed": 0, "classes": CLASSES}
    count = len(CLASSES)
    mask |= {"scores": [1.0] * count, "threshold": 0.3, "automatic": True, "known": [True] * count}
    write_json(folder / MASK, mask)
    write_json(folder / REFERENCE, {"private": site})
    return load_bundle(folder)


def test_an_adapted_expert_is_written_as_such_and_the_others_as_they_came(tmp_path: Path) -> None:
    bundles = [
        fetched(tmp_path / "fetched", site, seed) for seed, site in enumerate(("birch", "cedar", "dahlia"))
    ]
    before = digest_folder(tmp_path / "fetched")
    birch, cedar, left_out = map(Teacher.of, bundles)
    images = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    network = with_statistics(
        birch.network, measure_statistics(birch.network, images, seed=0, device=CPU), 0.5
    )
    adapted = Teacher("birch", network, birch.claimed, share=0.5)
    answer = SimpleNamespace(
        teachers=(adapted, cedar, left_out), decision=SimpleNamespace(experts=("birch", "cedar"))
    )
    found = tmp_path / "experts"
    for site in ("birch", "cedar"):
        (found / site).mkdir(parents=True)
    write_experts(found, tmp_path / "fetched", bundles, cast(Answer, answer))
    assert sorted(p.name for p in found.iterdir()) == ["birch", "cedar"]
    here = load_bundle(found / "birch")
    assert same(state(here.network), state(network))
    assert here.card.training == {
        "epochs": 3,
        "adaptation_share": 0.5,
        "sent_weights": bundles[0].card.weights.sha256,
    }
    assert here.mask == bundles[0].mask
    for file in (tmp_path / "fetched" / "teachers" / "cedar").iterdir():
        copied = found / "cedar" / file.name
        assert file.name in (REFERENCE, MEANS) or copied.read_bytes() == file.read_bytes()
    assert not (found / "birch" / REFERENCE).exists()
    assert digest_folder(tmp_path / "fetched") == before, "what was fetched stays as it is"

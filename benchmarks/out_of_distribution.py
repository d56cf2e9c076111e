"""Which images are flagged as out of distribution.

``python -m benchmarks.out_of_distribution [--root WORKSPACE]``

Needs a workspace of 2D images with three channels in which the stages ``train`` and ``transfer`` have run
(``make demo``, ``make pbc28``). Prints, for every teacher and every student, the share of images that an
answer flags as out of distribution: of the hospital's own test patients (a false alarm each), of other
hospitals' patients, and of images that no hospital would send on purpose.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf
from torch.nn import functional

from benchmarks.tables import Row, markdown
from qkt_clinical.common.seeding import derive
from qkt_clinical.config.loading import load_params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import PreparedSite, load_prepared
from qkt_clinical.datasets.phantom.ct import Scanner, render_chests
from qkt_clinical.models.bundle import Bundle, load_bundle
from qkt_clinical.models.inference import predict
from qkt_clinical.models.out_of_distribution import load_reference, responses, scores, threshold_of

Floats = NDArray[np.float32]
COUNT, TILES = 200, 4
CT = Scanner(shape=(9, 32, 32), spacing=(2.0, 1.0, 1.0), noise=30.0, sharpness=1.0)
WINDOW = (-1000.0, 400.0)
"""Hounsfield units shown black and white."""


def chests(shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """Middle slices of generated CT, (COUNT, *shape): another modality."""
    volumes, _ = render_chests(rng.integers(0, 4, COUNT), CT, rng=rng)
    low, high = WINDOW
    slices = torch.from_numpy(((volumes[:, volumes.shape[1] // 2] - low) / (high - low)).astype(np.float32))
    scaled = functional.interpolate(slices.clamp(0, 1)[:, None], shape[1:], mode="bilinear", antialias=True)
    return np.ascontiguousarray(scaled.expand(-1, shape[0], -1, -1).numpy())


def mosaic(images: Floats, rng: np.random.Generator) -> Floats:
    """The images cut into 4 x 4 tiles that are put together in another order."""
    count, channels, height, width = images.shape
    h, w = height // TILES, width // TILES
    tiles = images[:, :, : h * TILES, : w * TILES].reshape(count, channels, TILES, h, TILES, w)
    tiles = tiles.transpose(0, 2, 4, 1, 3, 5).reshape(count, TILES * TILES, channels, h, w)
    mixed = tiles[:, rng.permutation(TILES * TILES)].reshape(count, TILES, TILES, channels, h, w)
    return np.ascontiguousarray(
        mixed.transpose(0, 3, 1, 4, 2, 5).reshape(count, channels, h * TILES, w * TILES)
    )


def strange(own: Floats, rng: np.random.Generator) -> dict[str, Floats]:
    """Images made of the hospital's own test images, or of nothing."""
    shape = own.shape[1:]
    colour = own.mean(axis=(0, 2, 3), keepdims=True)
    return {
        "noise, uniform": rng.random((COUNT, *shape), dtype=np.float32),
        "noise, Gaussian": np.clip(rng.normal(0.5, 0.2, (COUNT, *shape)), 0, 1).astype(np.float32),
        "black": np.zeros((1, *shape), np.float32),
        "white": np.ones((1, *shape), np.float32),
        "blank, in the mean colour": np.broadcast_to(colour, (1, *shape)).astype(np.float32),
        "inverted colours": 1 - own,
        "half as bright": own / 2,
        "CT": chests(shape, rng),
        "red and blue swapped": np.ascontiguousarray(own[:, ::-1]),
        "grey": np.repeat(own.mean(axis=1, keepdims=True), shape[0], axis=1),
        "tiles in another order": mosaic(own, rng),
    }


def part(site: PreparedSite, classes: tuple[int, ...], *, without: bool = False) -> Floats:
    """A site's test images of the classes, or of all others, as a request holds them."""
    images, labels = site.part("test")
    chosen = images[np.isin(labels, classes, invert=without)]
    return (chosen / np.float32(255)).astype(np.float32) if chosen.dtype == np.uint8 else chosen


def flagged(bundle: Bundle, images: Floats) -> float:
    """Share of images that are flagged."""
    reference = load_reference(bundle)
    if reference is None or reference.threshold is None:
        raise SystemExit(f"{bundle.folder} has no reference: run the stages 'train' and 'transfer' first")
    found = scores(reference, responses(bundle.network, to_input(images, bundle.card.input.normalisation)))
    return float((found > reference.threshold).mean())


def measure(
    bundle: Bundle, sites: Mapping[str, PreparedSite], asked: tuple[int, ...], seed: int
) -> dict[str, float]:
    """Share flagged per set of images."""
    own = sites[bundle.card.site]
    local = tuple(c for c in own.local_classes() if c not in asked)
    others = [site for name, site in sorted(sites.items()) if name != own.name]
    test = part(own, local)
    sets = {"own test patients": test}
    if asked:
        sets["classes asked for"] = np.concatenate([part(s, asked) for s in (own, *others)])
    sets["other hospitals, own classes"] = np.concatenate([part(s, local) for s in others])
    sets["other hospitals, other classes"] = np.concatenate(
        [part(s, (*local, *asked), without=True) for s in others]
    )
    sets |= strange(test, np.random.default_rng(derive(seed, "unlike", own.name)))
    return {name: flagged(bundle, images) for name, images in sets.items() if len(images)}


def by_features(bundle: Bundle, own: PreparedSite, sets: Sequence[Floats]) -> list[float]:
    """Share flagged per set by what was not chosen: Mahalanobis distance on the network's features."""
    cpu, kind = torch.device("cpu"), bundle.card.input.normalisation

    def features(images: Any) -> NDArray[np.float64]:
        found: NDArray[np.float64] = (
            predict(bundle.network, to_input(images, kind), cpu, features=True).double().numpy()
        )
        return found

    with torch.inference_mode():
        training = features(own.part("train")[0])
        centre = training.mean(axis=0)
        inverse = np.linalg.inv(ledoit_wolf(training - centre, assume_centered=True)[0])

        def distance(images: Any) -> NDArray[np.float64]:
            away = features(images) - centre
            return np.asarray(np.einsum("nd,de,ne->n", away, inverse, away))

        threshold = threshold_of(distance(own.part("calibration")[0]))
        return [float((distance(images) > threshold).mean()) for images in sets]


def _table(found: list[dict[str, float]]) -> list[Row]:
    rows: list[Row] = []
    for name in max(found, key=len):
        values = [f[name] for f in found if name in f]
        rows.append(
            {"images": name, "mean": float(np.mean(values)), "minimum": min(values), "maximum": max(values)}
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path())
    root: Path = parser.parse_args().root
    params, space = load_params(root), Workspace(root)
    sites = {name: load_prepared(space.prepared(name)) for name in params.sites}
    teachers = [measure(load_bundle(space.teacher(name)), sites, (), params.seed) for name in sorted(sites)]
    print(f"Share of images flagged, {len(teachers)} teachers\n\n{markdown(_table(teachers))}\n")
    students: list[dict[str, float]] = []
    answers: list[Row] = []
    for _, ref in sorted(params.queries.items()):
        bundle = load_bundle(space.student(ref.hospital, ref.query))
        decision: Any = bundle.card.decision
        students.append(found := measure(bundle, sites, decision.query, params.seed))
        own = sites[ref.hospital]
        asked = [
            part(s, decision.query) for s in (own, *(s for n, s in sorted(sites.items()) if s is not own))
        ]
        other_way = by_features(bundle, own, [part(own, decision.local), np.concatenate(asked)])
        answers.append(
            {
                "hospital": ref.hospital,
                "query": ref.query,
                "method": decision.method,
                "own test patients": found["own test patients"],
                "classes asked for": found["classes asked for"],
                "own, by features": other_way[0],
                "asked, by features": other_way[1],
            }
        )
    print(f"The same, {len(students)} students\n\n{markdown(_table(students))}\n")
    print(f"Query by query\n\n{markdown(answers)}")


if __name__ == "__main__":
    main()

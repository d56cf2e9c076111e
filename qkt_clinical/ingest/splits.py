"""Patient-wise splits: a patient is never divided, each class's share per split is near what is wanted.

scikit-learn's StratifiedGroupKFold makes folds of one size only and may leave a rare class out of a fold,
so the assignment is our own: first seats for rare classes, then the largest patients first, each to
the split that lacks its classes most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.catalog import SPLITS
from qkt_clinical.errors import SourceError

SEATS: tuple[str, ...] = ("train", "test", "val", "calibration")
"""A class with k patients gets one into each of the first k."""

Positions = NDArray[np.int64]


def assign(
    patients: Sequence[str], labels: NDArray[np.int64], fractions: Mapping[str, float], seed: int
) -> dict[str, Positions]:
    """Divide images among splits without dividing a patient.

    The result depends on the patients' ids, their images' classes and the seed; neither on the order of
    the images nor on anything random outside.

    Args:
        patients: (N,) patient id per image.
        labels: (N,) class per image.
        fractions: split to its share of the images; they sum to 1. A split with share 0 gets none.
        seed: breaks ties between patients alike.

    Returns:
        Split to sorted image indices. Every class with at least k patients has one in each of the
        first k of :data:`SEATS`, unless its patients are needed by rarer classes too.
    """
    if len(patients) == 0:
        return {s: np.empty(0, dtype=np.int64) for s in fractions}
    names, owner = np.unique(np.asarray(patients, dtype=np.str_), return_inverse=True)
    classes, kind = np.unique(labels, return_inverse=True)
    counts = np.zeros((len(names), len(classes)))
    np.add.at(counts, (owner, kind), 1)
    splits = [s for s in SEATS if fractions.get(s, 0.0) > 0]
    share = np.array([fractions[s] for s in splits])
    totals = counts.sum(axis=0)
    wanted = share[:, None] * totals
    got = np.zeros_like(wanted)
    chosen = np.full(len(names), -1)
    order = np.random.default_rng(seed).permutation(len(names))

    def seat(patient: int, split: int) -> None:
        chosen[patient] = split
        got[split] += counts[patient]

    weight = 1.0 / totals**2
    members = (counts > 0).sum(axis=0)
    for c in np.argsort(members, kind="stable"):
        for split in range(min(len(splits), int(members[c]))):
            if got[split, c] > 0:
                continue
            free = order[(chosen[order] < 0) & (counts[order, c] > 0)]
            if len(free) == 0:
                break
            miss = (got[split] + counts[free] - wanted[split]) ** 2 @ weight
            seat(int(free[np.argmin(miss)]), split)
    rest = order[chosen[order] < 0]
    # Sizes in powers of two: largest first balances best, but within a size the seed decides.
    size = np.floor(np.log2(counts[rest].sum(axis=1)))
    for patient in rest[np.argsort(-size, kind="stable")]:
        lack = (wanted - got) @ (counts[patient] * weight)
        seat(int(patient), int(np.argmax(lack)))
    where = chosen[owner]
    return {
        s: np.flatnonzero(where == splits.index(s)) if s in splits else np.empty(0, np.int64)
        for s in fractions
    }


def empty_splits(patients: Mapping[str, int], fractions: Mapping[str, float]) -> str | None:
    """What to tell of a site of which a split that should have images has none; None if all is well.

    Args:
        patients: split to its number of patients.
        fractions: as of :func:`assign`.
    """
    empty = [s for s in SPLITS if fractions.get(s, 0.0) > 0 and not patients[s]]
    if not empty:
        return None
    count = sum(patients.values())
    one = " (is it an id that an anonymiser wrote for everybody?)" if count == 1 else ""
    return (
        f"no images for {' and '.join(empty)}: the site has {count} patient{'s' * (count != 1)}{one}, and a "
        f"patient is never divided. Add patients, or correct patient in site.yaml."
    )


def keep_given(
    given: Sequence[str],
    patients: Sequence[str],
    labels: NDArray[np.int64],
    fractions: Mapping[str, float],
    seed: int,
    *,
    site: str,
) -> dict[str, Positions]:
    """Keep train, val and test as given and carve calibration out of train, patient-wise.

    Calibration gets the share of train that it has of train and calibration in ``fractions``.

    Raises:
        SourceError: a patient stands in two given splits.
    """
    owners = {
        s: {p for p, g in zip(patients, given, strict=True) if g == s} for s in ("train", "val", "test")
    }
    if sum(map(len, owners.values())) != len(set().union(*owners.values())):
        raise SourceError(
            "a patient stands in two of the given splits",
            remedy="Set splits: patient in site.yaml, or divide the file by patients.",
            code="patient-in-two-splits",
            site=site,
        )
    where = np.asarray(given)
    train = np.flatnonzero(where == "train")
    both = fractions["train"] + fractions["calibration"]
    carved = assign(
        [patients[i] for i in train.tolist()],
        labels[train],
        {
            "train": fractions["train"] / both if both else 1.0,
            "calibration": fractions["calibration"] / both if both else 0.0,
        },
        seed,
    )
    parts = {s: train[carved[s]] if s in carved else np.flatnonzero(where == s) for s in SPLITS}
    return {s: part.astype(np.int64) for s, part in parts.items()}

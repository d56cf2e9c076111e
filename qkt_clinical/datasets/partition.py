"""Divide one data set among hospitals: by class, or by a Dirichlet distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.errors import ConfigError

Indices = NDArray[np.int64]

MIN_IMAGES = 5
"""Dirichlet: a share of fewer training images than this is none, so that a held class can be learned."""

DRAWS = 1000


# --- partitions (pure) ----------------------------------------------------------------------------


def pathological_shares(
    classes: int, *, hospitals: int, classes_per_hospital: int, seed: int = 0
) -> NDArray[np.float64]:
    """Shares (hospitals, classes): every hospital holds ``classes_per_hospital`` classes.

    The number of hospitals that hold a class differs by at most one between classes; those that hold
    it share it evenly.

    Raises:
        ConfigError: too few places for all classes, or more classes per hospital than there are.
    """
    if classes_per_hospital > classes or hospitals * classes_per_hospital < classes:
        raise ConfigError(
            f"{hospitals} hospitals with {classes_per_hospital} classes each cannot hold all of {classes}",
            remedy="Choose at most as many classes per hospital as there are, and enough hospitals for all.",
        )
    rng = np.random.default_rng(seed)
    held = np.zeros((hospitals, classes), dtype=bool)
    for hospital in held:
        # The least held classes first, chance among equals: holders never differ by more than one.
        order = np.lexsort((rng.random(classes), held.sum(axis=0)))
        hospital[order[:classes_per_hospital]] = True
    shares: NDArray[np.float64] = held / held.sum(axis=0)
    return shares


def dirichlet_shares(
    counts: NDArray[np.int64], *, hospitals: int, beta: float, seed: int = 0
) -> NDArray[np.float64]:
    """Shares (hospitals, classes): every class is divided in proportions drawn from Dirichlet(beta).

    Shares below ``MIN_IMAGES`` training images are taken as none. Draws are repeated until every hospital
    holds at least two classes and a quarter of an even share of all images.

    Args:
        counts: (classes,) training images per class, each at least 1.
        hospitals: at least 2.
        beta: concentration; the smaller, the more the hospitals differ.
        seed: of the draws.

    Raises:
        ConfigError: no draw satisfies the floor.
    """
    rng = np.random.default_rng(seed)
    for _ in range(DRAWS):
        shares: NDArray[np.float64] = rng.dirichlet(np.full(hospitals, beta), size=len(counts)).T.copy()
        largest = shares.argmax(axis=0)
        shares[shares * counts < MIN_IMAGES] = 0.0
        empty = shares.sum(axis=0) == 0.0
        shares[largest[empty], empty] = 1.0
        shares /= shares.sum(axis=0)
        enough = shares @ counts >= counts.sum() / (4 * hospitals)
        if enough.all() and (np.count_nonzero(shares, axis=1) >= 2).all():
            return shares
    raise ConfigError(
        f"{DRAWS} draws with beta {beta:g} left a hospital without images or with a single class",
        remedy="Choose a greater beta or fewer hospitals.",
    )


def divide(
    labels: NDArray[np.int64],
    groups: NDArray[Any] | None,
    shares: NDArray[np.float64],
    *,
    seed: int = 0,
) -> list[Indices]:
    """Divide images among hospitals by ``shares``.

    Without groups, class counts differ from the exact share by less than one image, and every image
    goes to one hospital. With groups (patients), a group goes to one hospital as a whole, to the one
    that lacks its images most; images of classes of which that hospital has no share are left out.

    Args:
        labels: (N,) class indices.
        groups: (N,) patient ids, or None.
        shares: (hospitals, classes), columns sum to 1.
        seed: of the order in which images or groups are dealt out.

    Returns:
        Per hospital the sorted indices of its images; no index stands in two.
    """
    rng = np.random.default_rng(seed)
    hospitals, classes = shares.shape
    if groups is None:
        owner = np.empty(len(labels), dtype=np.int64)
        for c in range(classes):
            index = rng.permutation(np.flatnonzero(labels == c))
            owner[index] = np.repeat(np.arange(hospitals), _quotas(len(index), shares[:, c]))
        return [np.flatnonzero(owner == h) for h in range(hospitals)]
    ids, member = np.unique(groups, return_inverse=True)
    content = np.zeros((len(ids), classes), dtype=np.int64)
    np.add.at(content, (member, labels), 1)
    owner = _assign_groups(content, shares, rng)[member]
    owner[shares[owner, labels] == 0.0] = -1
    return [np.flatnonzero(owner == h) for h in range(hospitals)]


def partition_pathological(
    labels: NDArray[np.int64],
    groups: NDArray[Any] | None = None,
    *,
    hospitals: int,
    classes_per_hospital: int,
    seed: int = 0,
) -> list[Indices]:
    """Indices (sorted) per hospital, a few classes each. See :func:`pathological_shares`, :func:`divide`."""
    shares = pathological_shares(
        int(labels.max()) + 1, hospitals=hospitals, classes_per_hospital=classes_per_hospital, seed=seed
    )
    return divide(labels, groups, shares, seed=seed)


def partition_dirichlet(
    labels: NDArray[np.int64],
    groups: NDArray[Any] | None = None,
    *,
    hospitals: int,
    beta: float,
    seed: int = 0,
) -> list[Indices]:
    """Indices (sorted) per hospital, label-skewed. See :func:`dirichlet_shares`, :func:`divide`."""
    shares = dirichlet_shares(np.bincount(labels), hospitals=hospitals, beta=beta, seed=seed)
    return divide(labels, groups, shares, seed=seed)


def choose_queries(held: NDArray[np.bool_], count: int | None, *, seed: int = 0) -> list[tuple[int, int]]:
    """Choose (hospital, class) pairs to ask for: absent at the hospital, held by another.

    Args:
        held: (hospitals, classes), whether a hospital has training images of a class.
        count: how many; None: one per hospital, as far as there are any.
        seed: decides among equals.

    Returns:
        Sorted pairs, spread evenly over hospitals first and classes second.

    Raises:
        ConfigError: fewer such pairs than asked for, or none.
    """
    candidates = np.argwhere(~held & held.any(axis=0))
    wanted = min(len(held), len(candidates)) if count is None else count
    if wanted > len(candidates) or len(candidates) == 0:
        raise ConfigError(
            f"{wanted} absent single-class queries asked for, {len(candidates)} exist",
            remedy="Ask fewer queries, or let the hospitals differ more (fewer classes each, smaller beta).",
        )
    chance = np.random.default_rng(seed).permutation(len(candidates))
    hospital, asked = candidates.T
    by_hospital = np.zeros(held.shape[0], dtype=np.int64)
    by_class = np.zeros(held.shape[1], dtype=np.int64)
    chosen = np.zeros(len(candidates), dtype=bool)
    for _ in range(wanted):
        order = np.lexsort((chance, by_class[asked], by_hospital[hospital], chosen))
        best = order[0]  # ``chosen`` is the first key: those taken already come last
        chosen[best] = True
        by_hospital[hospital[best]] += 1
        by_class[asked[best]] += 1
    while (swap := _evening_swap(hospital, asked, chosen, by_class, chance)) is not None:
        given_up, taken = swap
        chosen[given_up], chosen[taken] = False, True
        by_class[asked[given_up]] -= 1
        by_class[asked[taken]] += 1
    return [(int(h), int(c)) for h, c in candidates[chosen]]


def _evening_swap(
    hospital: Indices, asked: Indices, chosen: NDArray[np.bool_], by_class: Indices, chance: Indices
) -> tuple[int, int] | None:
    """A chosen and a free pair of one hospital whose swap evens out the queried classes, or None.

    Every such exchange lowers the sum of squares of ``by_class``, so their sequence ends.
    """
    taken, free = np.flatnonzero(chosen), np.flatnonzero(~chosen)
    gain = by_class[asked[taken]][:, None] - by_class[asked[free]][None, :]
    gain[hospital[taken][:, None] != hospital[free][None, :]] = 0
    if gain.size == 0 or gain.max() < 2:
        return None
    give, take = np.nonzero(gain == gain.max())
    first = np.lexsort((chance[free[take]], chance[taken[give]]))[0]
    return int(taken[give[first]]), int(free[take[first]])


def _quotas(count: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Whole numbers summing to ``count``, each within one of ``count * shares``: largest remainders."""
    exact = count * shares
    # A share that should be whole can lie a rounding error below it (3 * (1/3) of 6, say).
    quotas = np.floor(exact + 1e-9).astype(np.int64)
    left = count - int(quotas.sum())
    quotas[np.argsort(quotas - exact, kind="stable")[:left]] += 1
    return quotas


def _assign_groups(
    content: NDArray[np.int64], shares: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Owner of every group: largest groups first, each where it lowers the squared distance to target most.

    Args:
        content: (groups, classes) images of each class.
        shares: (hospitals, classes).
        rng: order among groups of one size.
    """
    totals = content.sum(axis=0)
    target = shares * totals
    weight = 1.0 / np.maximum(totals, 1)  # otherwise the largest class alone would decide
    have = np.zeros_like(target)
    owner = np.empty(len(content), dtype=np.int64)
    order = rng.permutation(len(content))
    order = order[np.argsort(-content[order].sum(axis=1), kind="stable")]
    for group in order:
        usable = np.where(shares > 0.0, content[group], 0)
        change = (weight * usable * (usable + 2.0 * (have - target))).sum(axis=1)
        change[usable.sum(axis=1) == 0] = np.inf
        best = int(change.argmin())
        owner[group] = best
        have[best] += usable[best]
    return owner

"""Phase 2 for absent query classes: discriminant analysis on the student's frozen features.

The hospital's own images show where its classes lie among the features of all networks, its own and the
teachers', also those classes that a teacher never saw. Where the query lies, the teachers' *class means* say:
mean features of their own images of the class. With one covariance within classes, measured on the hospital's
images, that gives the linear discriminant of every class (Fisher, 1936): for the query a direction in which
the hospital's own images hardly vary. No gradient, no image of the query.

The student's features are those of several networks side by side, one *part* each. Among the features of a
part that has no mean of the query, its own above all, the query is put amid the local classes, where it is as
far from one as from another.

Pure functions of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qkt_clinical.models.class_means import mean_features

SHRINKAGE = 0.2
"""Share of the covariance that is the same for all features of a part (Friedman, 1989)."""
SHARED_SHRINKAGE = 0.5
"""The same for a shared encoder, whose features are more than images, and whose class means may be noisy."""
FLOOR = 1e-6
"""Of a part's variance, as a share of its mean square: features that hardly vary say nothing."""


def aligned_mean(query: int, there: Mapping[int, Tensor], here: Mapping[int, Tensor]) -> Tensor:
    """Where a query class lies among the features of a teacher at the asking hospital, (F,).

    The teacher's own mean, moved as the classes that both have moved from one hospital to the other.

    Args:
        there: class means of the teacher, the query's among them.
        here: of the asking hospital's images.
    """
    shared = sorted(set(there) & set(here))
    if not shared:
        return there[query]
    return there[query] + torch.stack([here[c] - there[c] for c in shared]).mean(dim=0)


def _part_variances(residuals: Tensor, features: Tensor, widths: Sequence[int]) -> Tensor:
    """For every feature the mean variance within classes of its part, (F,)."""
    parts = zip(residuals.split(list(widths), dim=1), features.split(list(widths), dim=1), strict=True)
    levels = [
        (r.square().mean() + FLOOR * f.square().mean()).clamp(min=1e-30).expand(r.shape[1]) for r, f in parts
    ]
    return torch.cat(levels)


def discriminant_rows(
    features: Tensor,
    labels: Tensor,
    widths: Sequence[int],
    class_means: Sequence[Sequence[Mapping[int, Tensor]]],
    query: Sequence[int],
    classes: int,
) -> tuple[Tensor, Tensor]:
    """A head that tells the local classes and the query apart: linear discriminants.

    Args:
        features: (N, F) of the hospital's own images, of several parts side by side.
        labels: (N,); every class among them is local.
        widths: of the parts, F in all.
        class_means: per part what each of its teachers says, class to (F_i,); of the own network nothing.
        query: class indices, none of them local.
        classes: C.

    Returns:
        weight (C, F) and bias (C,), 0 for classes that are neither local nor asked for.
    """
    seen = features.double()
    means = mean_features(seen, labels)
    local = sorted(means)
    centre = torch.stack([means[c] for c in local]).mean(dim=0)
    here = {c: m.split(list(widths)) for c, m in means.items()}
    amid = centre.split(list(widths))
    for q in query:
        parts = []
        for i, of_part in enumerate(class_means):
            moved = {c: m[i] for c, m in here.items()}
            places = [
                aligned_mean(q, {c: m.double() for c, m in there.items()}, moved)
                for there in of_part
                if q in there
            ]
            parts.append(torch.stack(places).mean(dim=0) if places else amid[i])
        means[q] = torch.cat(parts)
    return _rows_of(seen, labels, means, local, widths, classes, SHRINKAGE)


def no_longer_than_one(mean: Tensor) -> Tensor:
    """A class mean (F,) over an encoder's features, which have length 1: what is longer is cut to that.

    Noise makes means of few images longer, and whoever sent a long one would outweigh all other teachers.
    """
    length: Tensor = torch.linalg.vector_norm(mean)
    return mean / length.clamp(min=1.0)


def shared_rows(
    features: Tensor,
    labels: Tensor,
    class_means: Sequence[Mapping[int, Tensor]],
    query: Sequence[int],
    classes: int,
) -> tuple[Tensor, Tensor]:
    """The same over features of an encoder that all hospitals have: every teacher may say where a query lies.

    Args:
        features: (N, F) of the hospital's own images; labels: (N,).
        class_means: of each teacher, class to its mean (F,).
        query: class indices; each has a teacher's mean or, where it is rare, own images, which count like a
            teacher.
        classes: C.

    Returns:
        weight (C, F) and bias (C,), 0 for classes that are neither local nor asked for.
    """
    seen = features.double()
    here = mean_features(seen, labels)
    local = sorted(set(here) - set(query))
    own = {c: here[c] for c in local}
    there = [{c: no_longer_than_one(m.double()) for c, m in held.items()} for held in class_means]
    asked = {}
    for q in query:
        places = [aligned_mean(q, held, own) for held in there if q in held]
        asked[q] = torch.stack(places + ([here[q]] if q in here else [])).mean(dim=0)
    return _rows_of(seen, labels, own | asked, local, [seen.shape[1]], classes, SHARED_SHRINKAGE)


def _rows_of(
    seen: Tensor,
    labels: Tensor,
    means: Mapping[int, Tensor],
    local: Sequence[int],
    widths: Sequence[int],
    classes: int,
    shrinkage: float,
) -> tuple[Tensor, Tensor]:
    """Linear discriminants of the classes that have a mean, with the covariance of the images seen."""
    centre = torch.stack([means[c] for c in local]).mean(dim=0)
    residuals = seen - torch.stack([means[c] for c in labels.tolist()])
    level = shrinkage * _part_variances(residuals, seen, widths)
    relevant = sorted(means)
    away = torch.stack([means[c] - centre for c in relevant], dim=1)
    # (level + k R'R)^-1 by the identity of Woodbury: as large as there are images, not as features.
    k = (1 - shrinkage) / max(1, len(seen) - len(local))
    scaled = residuals / level
    system = torch.eye(len(seen), dtype=seen.dtype) / k + scaled @ residuals.T
    directions = away / level[:, None] - scaled.T @ torch.linalg.solve(system, scaled @ away)
    weight, bias = torch.zeros(classes, seen.shape[1]), torch.zeros(classes)
    weight[relevant] = directions.T.to(weight)
    bias[relevant] = (-0.5 * (away * directions).sum(dim=0) - centre @ directions).to(bias)
    return weight, bias

"""Which teachers are believed: what they say, held against the asking hospital's images. Pure functions.

A teacher may claim classes that it does not know, have learned wrong labels, or lean towards one class
whatever it sees. The asking hospital holds its network and images of its own that are certainly not the
query's, and asks three things, in this order:

1. **Claims.** What does the network itself show of the classes that its mask claims? Anybody who holds it
   can read it again (:func:`qkt_clinical.qkt.masks.shown_classes`). A claim that it does not bear out is not
   believed; for its other classes the teacher is heard.
2. **Labels.** Does it name held-out images of classes that both hold as the hospital does? A teacher that
   names those of a class less often than by drawing lots among its classes is not heard.
3. **Experts.** Where other experts for a class find an image of the hospital's own more like that class than
   others of the same kind, so should this one, more than it finds it like its other classes. A teacher that
   agrees more about other classes than about those of the same name is not heard.

Nobody is turned away for want of evidence: who shares no class with anybody is heard, and the verdict says
so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from qkt_clinical.qkt.consensus import margin

FALSE_ALARM = 0.01
"""How often a teacher that names images of shared classes by drawing lots is turned away for its labels; one
that knows them better is so still less often."""
LEAST_AGREEMENT = 0.0
"""A teacher below it agrees with the other experts more about other classes than about those of one name."""


@dataclass(frozen=True)
class Verdict:
    """What became of one teacher, and why."""

    site: str
    heard: bool
    reason: str
    dismissed: tuple[int, ...] = ()
    """Classes that it claims and that are not believed."""
    recalls: Mapping[int, float] = field(default_factory=dict)
    """Share of the hospital's own held-out images of a shared class that it names so, among its classes."""
    agreement: float | None = None
    """With the other experts, in [-2, 2], see :func:`agreement`; None: no class in common."""


def lots(named: int, count: int, classes: int) -> float:
    """How likely at most ``named`` of ``count`` images are named right by lots drawn among ``classes``."""
    from scipy.stats import binom

    return float(binom.cdf(named, count, 1 / classes))


def recalled(logits: Tensor, labels: Tensor, known: Sequence[int], named: int) -> tuple[int, int]:
    """How many images of a class a network names so among the classes that it knows, and of how many.

    Args:
        logits: (N, C).
        labels: (N,).
    """
    known, mine = sorted(known), logits[labels == named]
    right = mine[:, known].argmax(dim=1) == known.index(named)
    return int(right.sum()), len(mine)


def directions(logits: Tensor, labels: Tensor, known: Sequence[int]) -> Tensor:
    """A network's margins (N, K) for the classes it knows, in their order, each as a direction of length 1.

    What tells the hospital's own classes apart is taken out first: all networks that know them share it.

    Args:
        logits: (N, C).
        labels: (N,), the hospital's own.
    """
    margins = torch.stack([margin(logits.double(), c, known) for c in known], dim=1)
    for label in labels.unique():
        margins[labels == label] -= margins[labels == label].mean(dim=0)
    return F.normalize(margins, dim=0)


def agreement(judged: Tensor, known: Sequence[int], other: Tensor, others: Sequence[int]) -> list[float]:
    """How far a network agrees with another about the classes that both know, one figure a class.

    Args:
        judged: (N, K) of the network that is judged, see :func:`directions`; known: its K classes.
        other: (N, L) of the other; others: its L classes.

    Returns:
        Per class that both know: the correlation of their margins for it, less the mean correlation of the
        other's margin for it with those that the judged network has for its other classes.
    """
    found = []
    for named in sorted(set(known) & set(others)):
        alike = judged.T @ other[:, list(others).index(named)]
        same = alike[list(known).index(named)]
        rest = (alike.sum() - same) / max(1, len(known) - 1)
        found.append(float(same - rest))
    return found


def _by_labels(
    logits: Tensor, labels: Tensor, known: Sequence[int], local: Sequence[int]
) -> tuple[dict[int, float], list[int], list[int]]:
    """Recall of every shared class; those named less often than by lots; those named more often."""
    shared = [c for c in local if c in known and bool((labels == c).any())]
    recalls, below, above = {}, [], []
    for c in shared if len(known) > 1 else ():
        right, count = recalled(logits, labels, known, c)
        recalls[c] = right / count
        if lots(right, count, len(known)) < FALSE_ALARM / len(shared):
            below.append(c)
        if 1 - lots(right - 1, count, len(known)) < FALSE_ALARM:
            above.append(c)
    return recalls, below, above


def _by_experts(
    seen: Sequence[Tensor], known: Sequence[Sequence[int]], anchored: Sequence[bool]
) -> list[tuple[float | None, bool]]:
    """Per teacher its mean agreement with the others, and whether that is ground to turn it away.

    The others are those whose labels the hospital's own images bear out, or, where none of them shares a
    class, all. Two strangers who disagree do not show which of them is wrong.
    """
    found: list[tuple[float | None, bool]] = []
    for i, classes in enumerate(known):
        able = [j for j in range(len(known)) if j != i and set(classes) & set(known[j])]
        others = [j for j in able if anchored[j]] or able
        each = [a for j in others for a in agreement(seen[i], classes, seen[j], known[j])]
        telling = any(anchored[j] for j in others) or len(others) > 1
        found.append((sum(each) / len(each) if each else None, telling and not anchored[i]))
    return found


def judge_teachers(
    sites: Sequence[str],
    logits: Sequence[Tensor],
    claimed: Sequence[Sequence[int]],
    shown: Sequence[Sequence[int] | None],
    local: Sequence[int],
    labels: Tensor,
) -> list[Verdict]:
    """Judge every teacher.

    Args:
        sites: of the teachers.
        logits: (N, C) each, on the asking hospital's own held-out images of local classes.
        claimed: the classes that each teacher's mask claims.
        shown: those that each network shows; None: nobody has read it again, and the mask is believed.
        local: the hospital's own classes beside the query.
        labels: (N,), each in ``local``.

    Returns:
        One verdict per teacher, in their order.
    """
    known = [
        tuple(c for c in sorted(claims) if seen is None or c in seen)
        for claims, seen in zip(claimed, shown, strict=True)
    ]
    dismissed = [tuple(c for c in sorted(a) if c not in b) for a, b in zip(claimed, known, strict=True)]
    tried = [_by_labels(z, labels, k, local) for z, k in zip(logits, known, strict=True)]
    reasons = [_silenced(k, below) for k, (_, below, _) in zip(known, tried, strict=True)]
    anchored = [bool(above) for _, _, above in tried]
    seen_as = [directions(z, labels, k) if k else z[:, :0] for z, k in zip(logits, known, strict=True)]
    found: list[float | None] = [None] * len(sites)
    while True:
        left = [i for i, reason in enumerate(reasons) if not reason]
        judged = _by_experts(
            [seen_as[i] for i in left], [known[i] for i in left], [anchored[i] for i in left]
        )
        for i, (value, _) in zip(left, judged, strict=True):
            found[i] = value
        low = [
            (value, i)
            for i, (value, telling) in zip(left, judged, strict=True)
            if telling and value is not None and value < LEAST_AGREEMENT
        ]
        if not low:
            break
        # One at a time, the worst first: it may be the reason why another seems to disagree.
        reasons[min(low)[1]] = "agrees with the other experts more about other classes than about its own"
    return [
        Verdict(
            site=site,
            heard=not reasons[i],
            reason=reasons[i] or _heard(anchored[i], found[i]),
            dismissed=dismissed[i],
            recalls=tried[i][0],
            agreement=found[i],
        )
        for i, site in enumerate(sites)
    ]


def _silenced(known: Sequence[int], below: Sequence[int]) -> str:
    """Why a teacher is not heard, whatever the other experts say; empty where it may be."""
    if not known:
        return "its network shows none of the classes that it claims"
    return "names images of a shared class less often so than by drawing lots" if below else ""


def _heard(anchored: bool, agrees: float | None) -> str:
    """Why a teacher is heard."""
    if anchored:
        return "names images of a shared class as the hospital does"
    if agrees is None:
        return "shares no class with anybody who could tell"
    return "agrees with the other experts" if agrees >= LEAST_AGREEMENT else "too few experts to tell"

"""Teacher screening: which teachers take part in an answer. Pure functions.

A teacher may claim classes that it does not know, have learned wrong labels, or lean towards one class
whatever it sees. The asking hospital holds its network and images of its own that are certainly not the
query's, and asks three things, in this order:

1. **Claims.** Which of the classes that its mask claims does the network itself bear out? Anybody who holds
   it can read it again (:func:`qkt_clinical.qkt.masks.verified_classes`); and what it says of a class must
   depend on the image (:func:`qkt_clinical.qkt.soundness.indistinct`). A claim that is not verified does not
   count; with its other classes the teacher is included.
2. **Labels.** Does it name held-out images of classes that both hold as the hospital does? A teacher that
   names those of a class, or of all shared classes together, less often than by chance is excluded (Holm's
   rule over these tests). Where its images look unlike the hospital's, an honest teacher may misname a class:
   then the classes that it names less often than by chance do not count, and it is excluded only if it names
   all shared ones together so. Its labels are borne out if it names all together more often than by chance,
   and better than a network that gives every image one name.
3. **Experts.** Where other experts for a class find an image of the hospital's own more like that class than
   others of the same kind, so should this one, more than it finds it like its other classes. A teacher that
   does not agree more about classes of the same name than about others is excluded.

Nobody is excluded for want of evidence: who shares no class with anybody is included, and the result says
so. Networks that give no usable answer at all are set aside before (:mod:`qkt_clinical.qkt.soundness`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from qkt_clinical.qkt.consensus import margin
from qkt_clinical.qkt.soundness import ROUNDING, indistinct
from qkt_clinical.task import Task

FALSE_ALARM = 0.01
"""How often a teacher that names images of shared classes by chance is excluded for its labels; one that
knows them better is so still less often."""
MIN_AGREEMENT = 0.0
"""A teacher at or below it agrees with the other experts no more about its own classes than about others."""


@dataclass(frozen=True)
class ScreeningResult:
    """Whether a teacher is included in the answer, and why."""

    site: str
    included: bool
    reason: str
    unverified: tuple[int, ...] = ()
    """Classes that it claims and its network does not support."""
    named: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """Of the hospital's own held-out images of a shared class: how many it names so among its classes, and
    how many there are."""
    agreement: float | None = None
    """With the other experts, in [-2, 2], see :func:`agreement`; None: nothing to compare."""
    misnamed: tuple[int, ...] = ()
    """Classes that do not count: it names the hospital's images of them less often so than by chance."""

    @property
    def recalls(self) -> dict[int, float]:
        """Recall of each shared class."""
        return {c: right / count for c, (right, count) in self.named.items()}


def chance_level(correct: int, count: int, classes: int) -> float:
    """P(X <= correct) for X ~ Binomial(count, 1 / classes): chance-level accuracy."""
    from scipy.stats import binom

    return float(binom.cdf(correct, count, 1 / classes))


def count_recalled(
    logits: Tensor, labels: Tensor, known: Sequence[int], named: int, *, task: Task
) -> tuple[int, int]:
    """Number of images of a class that a network recalls among the classes that it knows, and their total.

    Args:
        logits: (N, C).
        labels: (N,).
    """
    known, mine = sorted(known), logits[labels == named]
    right = task.answer(mine[:, known]) == known.index(named)
    return int(right.sum()), len(mine)


def margin_directions(logits: Tensor, labels: Tensor, known: Sequence[int]) -> Tensor:
    """A network's margins (N, K) for the classes it knows, in their order, each as a direction of length 1.

    What tells the hospital's own classes apart is taken out first: all networks that know them share it. A
    margin of which nothing but rounding is left then has no direction: it is 0.

    Args:
        logits: (N, C).
        labels: (N,), the hospital's own.
    """
    margins = torch.stack([margin(logits.double(), c, known) for c in known], dim=1)
    noise = ROUNDING * float(logits.abs().max()) * len(logits) ** 0.5
    for label in labels.unique():
        margins[labels == label] -= margins[labels == label].mean(dim=0)
    directions = F.normalize(margins, dim=0)
    return torch.where(margins.norm(dim=0) > noise, directions, torch.zeros_like(directions))


def agreement(screened: Tensor, known: Sequence[int], other: Tensor, others: Sequence[int]) -> list[float]:
    """Agreement of two networks on the classes that both know, one figure per class.

    Args:
        screened: (N, K) of the network in question, see :func:`margin_directions`; known: its K classes.
        other: (N, L) of the other; others: its L classes.

    Returns:
        Per class that both know and of which both margins have a direction: the correlation of their margins
        for it, less the mean correlation of the other's margin for it with those that the network in question
        has for its other classes.
    """
    found = []
    for named in sorted(set(known) & set(others)):
        mine, theirs = screened[:, list(known).index(named)], other[:, list(others).index(named)]
        if not bool(mine.any()) or not bool(theirs.any()):
            continue
        alike = screened.T @ theirs
        same = alike[list(known).index(named)]
        rest = (alike.sum() - same) / max(1, len(known) - 1)
        found.append(float(same - rest))
    return found


@dataclass(frozen=True)
class _LabelTest:
    """Result of testing a teacher against the hospital's own labels."""

    named: Mapping[int, tuple[int, int]]
    misnamed: tuple[int, ...] = ()
    """Classes with an accuracy below chance."""
    refuted: bool = False
    """Accuracy below chance on all shared classes together."""
    borne_out: bool = False
    """More often right than by chance, and than with one name for every image."""


def _test_labels(
    logits: Tensor, labels: Tensor, known: Sequence[int], local: Sequence[int], task: Task
) -> _LabelTest:
    """Test all shared classes, each alone and all together."""
    shared = [c for c in local if c in known and bool((labels == c).any())]
    if len(known) < 2 or not shared:
        return _LabelTest({})
    named = {c: count_recalled(logits, labels, known, c, task=task) for c in shared}
    right, count = (sum(numbers) for numbers in zip(*named.values(), strict=True))
    each = [chance_level(r, n, len(known)) for r, n in named.values()]
    level = FALSE_ALARM / (len(shared) + (len(shared) > 1))
    mean_recall = sum(r / n for r, n in named.values()) / len(shared)
    return _LabelTest(
        named,
        misnamed=tuple(c for c, chance in zip(shared, each, strict=True) if chance < level),
        refuted=chance_level(right, count, len(known)) < level,
        borne_out=1 - chance_level(right - 1, count, len(known)) < FALSE_ALARM
        and (len(shared) == 1 or mean_recall > 1 / len(shared)),
    )


def _test_experts(
    directions: Sequence[Tensor], known: Sequence[Sequence[int]], borne_out: Sequence[bool]
) -> list[tuple[float | None, bool]]:
    """Mean agreement of each teacher with the others, and whether it is excluded for it.

    The others are those whose labels the hospital's own images bear out, or, where none of them shares a
    class, all. Two strangers who disagree do not show which of them is wrong.
    """
    found: list[tuple[float | None, bool]] = []
    for i, classes in enumerate(known):
        able = [j for j in range(len(known)) if j != i and set(classes) & set(known[j])]
        others = [j for j in able if borne_out[j]] or able
        each = [a for j in others for a in agreement(directions[i], classes, directions[j], known[j])]
        telling = any(borne_out[j] for j in others) or len(others) > 1
        found.append((sum(each) / len(each) if each else None, telling and not borne_out[i]))
    return found


def screen_teachers(
    sites: Sequence[str],
    logits: Sequence[Tensor],
    claimed: Sequence[Sequence[int]],
    verified: Sequence[Sequence[int] | None],
    local: Sequence[int],
    labels: Tensor,
    *,
    task: Task,
    unlike: Sequence[bool] | None = None,
) -> list[ScreeningResult]:
    """Screen teachers whose answers are usable.

    Args:
        sites: of the teachers.
        logits: (N, C) each, on the asking hospital's own held-out images of local classes.
        claimed: the classes that each teacher's mask claims.
        verified: those that each network shows; None: nobody has read it again, and the mask counts.
        local: the hospital's own classes beside the query.
        labels: (N,), each in ``local``.
        unlike: whether each teacher's images look unlike the hospital's; None: none do.

    Returns:
        One result per teacher, in their order.
    """
    known = [_verified(claims, seen, z) for claims, seen, z in zip(claimed, verified, logits, strict=True)]
    tests = [_test_labels(z, labels, k, local, task) for z, k in zip(logits, known, strict=True)]
    lenient = [False] * len(sites) if unlike is None else unlike
    reasons = [_why_excluded(k, test, far) for k, test, far in zip(known, tests, lenient, strict=True)]
    misnamed = [() if reason else test.misnamed for reason, test in zip(reasons, tests, strict=True)]
    known = [tuple(c for c in k if c not in wrong) for k, wrong in zip(known, misnamed, strict=True)]
    borne_out = [
        (_test_labels(z, labels, k, local, task) if wrong else test).borne_out
        for z, k, wrong, test in zip(logits, known, misnamed, tests, strict=True)
    ]
    directions = [
        margin_directions(z, labels, k) if k else z[:, :0] for z, k in zip(logits, known, strict=True)
    ]
    found: list[float | None] = [None] * len(sites)
    while True:
        left = [i for i, reason in enumerate(reasons) if not reason]
        compared = _test_experts(
            [directions[i] for i in left], [known[i] for i in left], [borne_out[i] for i in left]
        )
        for i, (value, _) in zip(left, compared, strict=True):
            found[i] = value
        low = [
            (value, i)
            for i, (value, telling) in zip(left, compared, strict=True)
            if telling and value is not None and value <= MIN_AGREEMENT
        ]
        if not low:
            break
        # One at a time, the worst first: it may be the reason why another seems to disagree.
        reasons[min(low)[1]] = "agrees with the other experts no more about its own classes than about others"
    return [
        ScreeningResult(
            site=site,
            included=not reasons[i],
            reason=reasons[i] or _why_included(borne_out[i], found[i]),
            unverified=tuple(c for c in sorted(claimed[i]) if c not in {*known[i], *misnamed[i]}),
            misnamed=misnamed[i],
            named=tests[i].named,
            agreement=found[i],
        )
        for i, site in enumerate(sites)
    ]


def _verified(claimed: Sequence[int], verified: Sequence[int] | None, logits: Tensor) -> tuple[int, ...]:
    """The claims that the network supports."""
    claims = [c for c in sorted(claimed) if verified is None or c in verified]
    same = indistinct(logits, claims)
    return tuple(c for c in claims if c not in same)


def _why_excluded(known: Sequence[int], test: _LabelTest, unlike: bool) -> str:
    """Reason to exclude a teacher regardless of the other experts; empty if there is none."""
    if not known:
        return "its network shows none of the classes that it claims"
    refuted = test.refuted or set(known) == set(test.misnamed) or (bool(test.misnamed) and not unlike)
    return "names images of shared classes less often so than by chance" if refuted else ""


def _why_included(borne_out: bool, agrees: float | None) -> str:
    """Reason to include a teacher."""
    if borne_out:
        return "names images of shared classes as the hospital does"
    if agrees is None:
        return "shares no class with anybody who could tell"
    return "agrees with the other experts" if agrees > MIN_AGREEMENT else "too few experts to tell"

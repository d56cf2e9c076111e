"""Plan of a query: the relevant teachers, the reasons, and the bytes to fetch. Free of torch.

Plans are made from cards and masks alone; the weights of a teacher that is not relevant are never moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qkt_clinical.catalog import BY_MEANS, ENCODED_METHODS
from qkt_clinical.config.query import QueryConfig
from qkt_clinical.errors import QueryError
from qkt_clinical.records.card import ImageStatistics
from qkt_clinical.records.plan import Asking, Candidate, Offer, Plan

UNLIKE = 0.3
"""An image shift beyond it is told as a warning; ``python -m benchmarks.shift`` prints those of sites."""
NO_MEANS = "shares no class means by the hospital's encoder"
NO_NETWORK = "keeps its network, and shares class means alone"
NO_FILE = "its network reads the features of an encoder that the hospital does not have"
LEAST_SPREAD = 0.01
"""Added to every standard deviation: channels that are the same everywhere have none."""


def image_shift(one: ImageStatistics, other: ImageStatistics) -> float | None:
    """How far the training images of two hospitals lie apart; 0 is not at all, and both ways the same.

    The symmetric Kullback-Leibler divergence between normal distributions of the pixels, and between those of
    the differences of neighbouring pixels, averaged over both and over channels, as
    :func:`qkt_clinical.qkt.adaptation.shift` does for the layers of a network.

    Returns:
        None where the channels differ in number.
    """
    if len(one.mean) != len(other.mean):
        return None

    def apart(spread: float, spread_there: float, moved: float) -> float:
        here, there = ((s + LEAST_SPREAD) ** 2 for s in (spread, spread_there))
        return (there / here + here / there - 2 + moved**2 * (1 / there + 1 / here)) / 4

    pixels = [
        apart(s, t, m - n) for m, s, n, t in zip(one.mean, one.spread, other.mean, other.spread, strict=True)
    ]
    gradients = [apart(g, h, 0.0) for g, h in zip(one.gradient, other.gradient, strict=True)]
    return (sum(pixels) + sum(gradients)) / (2 * len(pixels))


def images_apart(shift: float | None) -> str:
    """An image shift in words, to follow others; nothing where it is not known."""
    if shift is None:
        return ""
    return f"; image shift {shift:.2f}" + (
        ", its images look unlike the hospital's" if shift > UNLIKE else ""
    )


def assess_offer(
    offer: Offer, asking: Asking, query: QueryConfig, images: ImageStatistics | None = None
) -> Candidate:
    """Decide from its card and mask whether a teacher is relevant to the query.

    One that knows only classes of the hospital's own does too: images of the query are strange to it.
    ``qkt-light`` and ``qkt-means`` go without those. How far its images lie from the hospital's is told, and
    decides nothing.

    Args:
        images: of the asking hospital, where they are known.
    """
    card, mask = offer.card, offer.mask
    wanted = [c for c in query.classes if c in mask.classes]
    teaches = tuple(c for c in wanted if mask.knows(c))
    rivals = tuple(c for c in asking.local(query) if mask.knows(c))
    light = query.method in ("qkt-light", BY_MEANS)
    included = bool(rivals) and not light
    if card.site in query.exclude_teachers:
        reason = "excluded by the query"
    elif card.classes != asking.classes:
        reason = "has another label space"
    elif card.input.shape != asking.shape or card.input.normalisation != asking.normalisation:
        shapes = ["x".join(map(str, s)) for s in (card.input.shape, asking.shape)]
        reason = (
            f"takes {shapes[0]} {card.input.normalisation} images, not {shapes[1]} {asking.normalisation}"
        )
    elif not teaches and not included:
        reason = "does not know " + " or ".join(query.classes)
        reason += "" if light else " or a class of the hospital's own"
    elif query.method != BY_MEANS and card.network_kept:
        reason = NO_NETWORK
    elif query.method != BY_MEANS and card.without_encoder not in (None, *asking.encoders):
        assert card.network.encoder is not None, "the card was checked"
        reason = f"{NO_FILE}: {card.network.encoder.name}, {str(card.without_encoder)[:8]}"
    elif query.method == BY_MEANS and (
        card.encoder_means is None or card.shared_encoder != asking.shared_encoder
    ):
        reason = NO_MEANS
    else:
        reason = ""
    shift = (
        None
        if images is None or card.image_statistics is None
        else image_shift(images, card.image_statistics)
    )
    return Candidate(
        site=card.site,
        relevant=not reason,
        reason=reason or "knows " + " and ".join(teaches or rivals) + ("" if teaches else ", no query class"),
        teaches=teaches,
        rivals=rivals,
        known=tuple(c for c, k in zip(mask.classes, mask.known, strict=True) if k),
        scores={c: mask.scores[mask.classes.index(c)] for c in wanted},
        threshold=mask.threshold,
        bytes=offer.bytes_moved(query.method),
        digest=offer.digest,
        image_shift=None if shift is None else round(shift, 3),
    )


def _capped(candidates: Sequence[Candidate], query: QueryConfig) -> list[Candidate]:
    """Keep at most ``max_teachers``, those with the highest scores, but one for every class taught."""
    if query.max_teachers is None:
        return list(candidates)
    kept: set[str] = set()
    ranked = sorted(
        (c for c in candidates if c.relevant),
        key=lambda c: (-max((c.scores[n] for n in c.teaches), default=0.0), c.site),
    )
    for name in query.classes:
        first = next((c.site for c in ranked if name in c.teaches), None)
        if first is not None and not any(c.site in kept and name in c.teaches for c in ranked):
            kept.add(first)
    for candidate in ranked:
        if len(kept) < query.max_teachers:
            kept.add(candidate.site)
    return [
        c
        if not c.relevant or c.site in kept
        else c.model_copy(update={"relevant": False, "reason": f"beyond max_teachers {query.max_teachers}"})
        for c in candidates
    ]


def _check_encoder(
    hospital: str,
    asking: Asking,
    query: QueryConfig,
    offers: Sequence[Offer],
    candidates: Sequence[Candidate],
) -> None:
    """Refuse a method by class means where a query class has none by the hospital's own encoder."""
    encoder = asking.shared_encoder
    if encoder is None:
        raise QueryError(
            f"method {query.method} takes an encoder that hospitals have in common, and none is set here",
            remedy="Set shared_encoder in params.yaml (docs/encoders.md), or method: qkt in the query file.",
            code="no-encoder",
            site=hospital,
            stage="plan",
        )
    have = {o.card.site for o in offers if o.card.shared_encoder == encoder}
    asked = _taught(candidates)
    held = {c for t in candidates if t.relevant and t.site in have for c in t.teaches}
    if without := sorted(asked - held):
        others = {o.card.site: o.card.shared_encoder for o in offers if o.card.shared_encoder}
        said = ", ".join(f"{s} {e.name} of {e.side} pixels, {e.digest[:8]}" for s, e in others.items())
        raise QueryError(
            f"no teacher of {', '.join(without)} shares class means by {encoder.name} of {encoder.side} "
            f"pixels, {encoder.digest[:8]}; others': {said or 'none'}",
            remedy="Agree on one encoder and train with it again, or set method: qkt in the query file.",
            code="no-encoder",
            site=hospital,
            stage="plan",
        )


def _remedy(candidates: Sequence[Candidate], uncovered: Sequence[str]) -> str:
    """What to do where no usable teacher knows a class."""
    if all(any(t.reason == NO_NETWORK and c in t.teaches for t in candidates) for c in uncovered):
        return "Set method: qkt-means in the query file, which takes class means alone (docs/encoders.md)."
    if any(t.reason.startswith(NO_FILE) and set(t.teaches) & set(uncovered) for t in candidates):
        return "Get that file and set shared_encoder or train.encoder in params.yaml (docs/encoders.md)."
    return "Ask for a class that some hospital knows, or lower mask.threshold in params.yaml."


def _taught(candidates: Iterable[Candidate]) -> set[str]:
    """Query classes that somebody teaches who can be used, or could if class means were shared."""
    return {c for t in candidates if t.relevant or t.reason == NO_MEANS for c in t.teaches}


def make_plan(
    hospital: str,
    name: str,
    query: QueryConfig,
    asking: Asking,
    offers: Iterable[Offer],
    images: ImageStatistics | None = None,
) -> Plan:
    """Plan a query.

    Args:
        hospital: the asking site; its own teacher is left out.
        asking: the asking site.
        offers: of all teachers there are, in any order.
        images: what the asking site's training images look like, where its own teacher's card says so.

    Raises:
        QueryError: a class is unknown to the federation, or no teacher knows it, or the hospital has no class
            of its own beside the query.
    """
    strange = [c for c in query.classes if c not in asking.classes]
    if strange:
        raise QueryError(
            f"query {name!r} asks for {', '.join(strange)}, which is no class of the federation",
            remedy=f"Choose among {', '.join(asking.classes)}.",
            site=hospital,
            stage="plan",
        )
    others = sorted((o for o in offers if o.card.site != hospital), key=lambda o: o.card.site)
    candidates = _capped([assess_offer(offer, asking, query, images) for offer in others], query)
    covered = _taught(candidates)
    uncovered = tuple(c for c in query.classes if c not in covered)
    if uncovered:
        scores = {
            c: ", ".join(f"{t.site} {t.scores[c]:.2f}" for t in candidates if c in t.scores)
            for c in uncovered
        }
        raise QueryError(
            f"no usable teacher knows {', '.join(uncovered)} (mask scores: "
            + "; ".join(f"{c}: {s or 'none'}" for c, s in scores.items())
            + ")",
            remedy=_remedy(candidates, uncovered),
            code="uncovered",
            site=hospital,
            stage="plan",
        )
    if query.method in ENCODED_METHODS:
        _check_encoder(hospital, asking, query, others, candidates)
    local = asking.local(query)
    if not local:
        raise QueryError(
            "the hospital has no class of its own beside the query",
            remedy="Add training images of at least one other class.",
            site=hospital,
            stage="plan",
        )
    return Plan(
        hospital=hospital,
        query=name,
        classes=query.classes,
        method=query.method,
        budget=query.budget,
        local=local,
        teachers=tuple(candidates),
        uncovered=(),
        bytes_moved=sum(c.bytes for c in candidates if c.relevant),
    )


def at_risk(plan: Plan) -> list[tuple[str, tuple[str, ...]]]:
    """Classes at risk of confusion: per class asked for, own classes that no fetched teacher knows beside it.

    Such a teacher would know both: nobody has ever seen images of the two side by side.
    """
    found = []
    for asked in plan.classes:
        told = {c for t in plan.teachers if t.relevant and asked in t.known for c in t.known}
        if apart := tuple(c for c in plan.local if c not in told):
            found.append((asked, apart))
    return found

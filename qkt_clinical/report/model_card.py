"""Model cards: description, origin, figures and known failures of a teacher or student.

One object for all places: ``model_card.json`` and ``model_card.md`` in MLflow, the description of a
registered version, and the report. It is derived from a run's outputs by rule, so that the same outputs give
the same card; nobody fills anything in. Free of torch and MLflow. Counts of images appear as a report may
show them and
figures as they may leave the hospital (:mod:`qkt_clinical.records.published`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from qkt_clinical import __version__
from qkt_clinical.catalog import BY_MEANS
from qkt_clinical.common.disclosure import shown_count, too_few
from qkt_clinical.common.files import digest_bytes, digest_file, to_json
from qkt_clinical.config.params import Params
from qkt_clinical.data.prepared import Manifest
from qkt_clinical.records.base import Estimate
from qkt_clinical.records.card import Card, told_epsilon
from qkt_clinical.records.model_card import (
    Calibration,
    CardData,
    CardFigure,
    CardTeacher,
    KnownFailure,
    MethodFacts,
    ModelCard,
    PointEstimate,
    Provenance,
    Tested,
)
from qkt_clinical.records.outputs import AnswerOutputs, Outputs, QueryOutputs, SiteOutputs
from qkt_clinical.records.published import PublishedEvaluation
from qkt_clinical.records.training import TeacherMetrics

LOW_RECALL = 0.8
"""A class of which more than one image in five is missed is named among the known failures."""

FORGOTTEN = 0.05
"""So is one that lost this much recall, or any that chance does not explain."""

CONFUSED = 0.05
"""And a pair of classes of which this share of the one is taken for the other; the worst three at most."""

MAX_CONFUSED = 3

INTENDED = (
    "Research on knowledge transfer between hospitals: {what}, for images prepared as those of {site} are, "
    "read by people who can see the image and this card."
)

TESTED_ON = {
    "own": "the hospital's own images of patients that no model was trained on: of its test split, and those "
    "that it holds back for evaluation",
    "others": "test images of patients that no model was trained on. Where they are another hospital's, "
    "stain or scanner may help to tell the query apart: read the figures as an upper bound",
}
"""Whose images of the query judged an answer, in words."""
NOT_INTENDED = (
    "Not a medical device and not for diagnosis: no decision about a patient may rest on it. Not for images "
    "of another kind, another hospital or another scanner without an evaluation there, and not for classes "
    "that it does not answer for."
)

METHODS = {
    "teacher": "One network, trained on the hospital's own images alone.",
    "qkt": "One network. It took up the extractors of the relevant teachers beside its own, made smaller on "
    "the hospital's own images unless theirs look unlike them (phase 1); then its head was set for all "
    "relevant classes (phase 2).",
    "qkt-light": "One network. It took up the extractors of the teachers that know the query beside its own, "
    "made much smaller (phase 1); then its head was set for all relevant classes (phase 2).",
    "qkt-statistics": "One network. As with qkt, it took up the relevant teachers' extractors beside its "
    "own; a pretrained encoder that the hospitals have in common stands beside them, with what class means "
    "of its features say.",
    "qkt-means": "One network: the hospital's own, and beside it a pretrained encoder that the hospitals "
    "have in common, with what other hospitals' class means of its features say. No other hospital's "
    "network took part.",
    "routed": "Several networks side by side: the hospital's own and the relevant teachers', unreduced, each "
    "used for the classes that it knows.",
}


# --- parts ------------------------------------------------------------------------------------------


def _negated(loss: Estimate | None) -> Estimate | None:
    """A loss as a change."""
    if loss is None:
        return None
    return Estimate(value=0.0 - loss.value, low=0.0 - loss.high, high=0.0 - loss.low)


def _shown_images(number: int | str) -> str:
    return number if isinstance(number, str) else shown_count(number)


def _data(manifest: Manifest | None) -> CardData | None:
    if manifest is None:
        return None
    return CardData(
        site=manifest.site,
        source_kind=manifest.source_kind,
        digest=digest_bytes(to_json(manifest.digests).encode()),
        images={s: {c: shown_count(n) for c, n in found.items()} for s, found in manifest.counts.items()},
        patients={s: shown_count(n) for s, n in manifest.patients.items()},
    )


def _settings(parts: Mapping[str, object]) -> dict[str, float | int | str | bool | None]:
    """The settings that are single values."""
    return {k: v for k, v in parts.items() if v is None or isinstance(v, float | int | str | bool)}


def _trained_with(card: Card) -> str | None:
    version = card.training.get("version")
    return None if version is None else str(version)


def _low_recall(recall: Mapping[str, float | None], told: Mapping[str, float | None]) -> list[KnownFailure]:
    """Classes with low recall; the number of missed images is given unless suppressed."""
    found = []
    for name, value in recall.items():
        if value is None or value >= LOW_RECALL:
            continue
        shown = told.get(name)
        share = f"More than {100 * (1 - LOW_RECALL):.0f}%" if shown is None else f"{100 * (1 - shown):.0f}%"
        found.append(
            KnownFailure(
                kind="low-recall",
                classes=(name,),
                figure=shown,
                threshold=LOW_RECALL,
                text=f"{share} of the images of {name} are missed.",
            )
        )
    return found


def _values(figures: Mapping[str, Estimate | None]) -> dict[str, float | None]:
    return {name: None if figure is None else figure.value for name, figure in figures.items()}


def _forgotten(query: QueryOutputs) -> list[KnownFailure]:
    """Own classes with lower recall than before; the loss is given unless suppressed."""
    found = []
    for name in query.evaluation.relevant:
        lost = query.evaluation.class_forgetting.get(name)
        if name not in query.evaluation.local or lost is None:
            continue
        if lost.value < FORGOTTEN and lost.low <= 0:
            continue
        shown = query.published.class_forgetting.get(name)
        by = "" if shown is None else f", by {100 * shown.value:.1f} points"
        chance = " Chance can explain it." if lost.low <= 0 else ""
        found.append(
            KnownFailure(
                kind="forgotten",
                classes=(name,),
                figure=None if shown is None else shown.value,
                threshold=FORGOTTEN,
                text=f"{name} is recalled less{by}.{chance}",
            )
        )
    return found


def _few(
    counts: Mapping[str, int], kind: str, wanted: int, shown: Mapping[str, str] = MappingProxyType({})
) -> list[KnownFailure]:
    """Classes with fewer images of that kind than the gate wants; ``shown`` are counts told otherwise."""
    return [
        KnownFailure(
            kind="few-test-images",
            classes=(c,),
            threshold=wanted,
            text=f"{shown.get(c, shown_count(n))} {kind} images of {c}: "
            + ("too few to give figures." if too_few(n) else "its figures say little."),
        )
        for c, n in counts.items()
        if n < wanted
    ]


def _confused(
    relevant: Sequence[str],
    confusion: Sequence[Sequence[int] | None],
    told: Sequence[Sequence[int | None] | None],
) -> list[KnownFailure]:
    """The most confused pairs; classes without images, or with a suppressed row, are left out.

    Args:
        relevant: the classes.
        confusion: numbers of images, truth in rows.
        told: the same in whole percent, as far as it may be told.
    """
    pairs = [
        (row[j] / sum(row), truth, answer, (told[i] or row)[j])
        for i, (truth, row) in enumerate(zip(relevant, confusion, strict=True))
        for j, answer in enumerate(relevant)
        if row and i != j and told[i] is not None
    ]
    worst = sorted((p for p in pairs if p[0] >= CONFUSED), key=lambda p: (-p[0], p[1], p[2]))[:MAX_CONFUSED]
    return [
        KnownFailure(
            kind="confused",
            classes=(truth, answer),
            figure=None if percent is None else percent / 100,
            threshold=CONFUSED,
            text=f"{'Some' if percent is None else f'{percent}%'} of the images of {truth} "
            f"are taken for {answer}.",
        )
        for _, truth, answer, percent in worst
    ]


NO_DIFFERENTIAL_PRIVACY = (
    "Weights are not anonymous. No differential privacy was applied. Attacks that ask whether an image was "
    "among the training images were tried on simulated hospitals, not on this very network: they found "
    "somewhat more than guessing would where classes are hard to tell apart (docs/privacy.md). Attacks that "
    "try to bring images back were not tried: nothing rules them out."
)

OWN_NUMBERS = (
    "This card gives numbers of images and patients, those below five as '<5', and no figure that rests on "
    "fewer than five images of a class; from figures over several classes more may be reckoned. It belongs "
    "to the hospital's registry. It is not among the files that go to other hospitals (bundle.json, "
    "weights.safetensors, mask.json)."
)

OWN_REFERENCE = (
    "Nor is reference.json, by which out-of-distribution images are flagged: it holds the mean and "
    "the spread, over the training images, of what the network's first layer makes of an image, so their "
    "overall colour and contrast. Whoever may read the registry may read it."
)


def _training_privacy(card: Card) -> str:
    """Differential privacy of the training images, if any."""
    said = card.training
    if "epsilon" not in said:
        return NO_DIFFERENTIAL_PRIVACY
    return (
        f"Trained with differential privacy (DP-SGD): epsilon {said['epsilon']} at delta {said['delta']}, "
        f"noise multiplier {said['noise_multiplier']}, gradients cut to {said['clip']}. This holds for "
        "single images of the training split, not for patients of several images; as long as the hospital's "
        "salt stays secret; and for the weights and what follows from them, such as the mask, alone. What an "
        "epsilon is worth: docs/privacy.md."
    )


def _teacher_privacy(card: Card, known: Sequence[str], masked: bool) -> tuple[str, ...]:
    shown = (", ".join(known) or "none") if masked else "not probed here"
    return (
        "Whoever holds the bundle can find out which classes the hospital trained on, without an image, by "
        f"noise alone, from about five images of a class upwards; the mask says: {shown}. Its scores, "
        "and the weights, tell roughly of which class there were more images (docs/privacy.md). It does not "
        "say how good the teacher is.",
        *_class_means_privacy(card),
        _training_privacy(card),
        OWN_NUMBERS,
        OWN_REFERENCE,
    )


def _class_means_privacy(card: Card) -> tuple[str, ...]:
    if not card.class_means:
        return ()
    means = [("its own", told_epsilon(card, "means_epsilon"))]
    if card.shared_encoder:
        means.append((card.shared_encoder.name, told_epsilon(card, "shared_epsilon")))
    told = " and ".join(
        f"of {whose} {f'with noise of epsilon {epsilon:g}' if epsilon else 'exactly'}"
        for whose, epsilon in means
    )
    return (
        "Its files hold mean features of every class of five training images or more, some hundred "
        f"numbers a class: {told} (docs/privacy.md).",
    )


def _student_privacy(query: AnswerOutputs) -> tuple[str, ...]:
    teachers = query.plan.relevant
    method = query.plan.method
    if not teachers:
        holds = "It holds no other hospital's network."
    elif method == BY_MEANS:
        holds = (
            f"It holds no other hospital's network; rows of its head were made from class means of "
            f"{', '.join(teachers)}."
        )
    elif method == "routed":
        holds = f"It holds whole copies of the teachers of {', '.join(teachers)}."
    else:
        holds = f"Its weights hold, or were made from, parts of the teachers of {', '.join(teachers)}."
    return (
        f"{holds} Whoever is given this student is given what those show of their hospitals: which classes "
        "each trained on, and whatever else can be drawn from weights.",
        "bundle.json names the classes that the hospital has, and those that it asked for.",
        NO_DIFFERENTIAL_PRIVACY,
        OWN_NUMBERS,
        OWN_REFERENCE,
    )


# --- cards ------------------------------------------------------------------------------------------


def _teacher_figures(told: TeacherMetrics | None) -> list[CardFigure]:
    if told is None:
        return []

    def point(value: float | None) -> PointEstimate | None:
        return None if value is None else PointEstimate(value=value)

    figures = [CardFigure(name="recall", class_name=c, after=point(v)) for c, v in told.recall.items()]
    if told.balanced_accuracy is None:
        return figures
    return [CardFigure(name="balanced accuracy", after=point(told.balanced_accuracy)), *figures]


def teacher_model_card(site: SiteOutputs, params: Params) -> ModelCard:
    """The card of a site's teacher; figures are those on its validation images, without intervals.

    Raises:
        ValueError: there is no teacher here.
    """
    card = site.card
    if card is None:
        raise ValueError(f"no teacher of {site.name}")
    known = tuple(card.classes) if site.mask is None else tuple(c for c in card.classes if site.mask.knows(c))
    told = site.published_metrics
    recall, shown = ({}, {}) if site.metrics is None or told is None else (site.metrics.recall, told.recall)
    figures = _teacher_figures(told)
    failures = _low_recall(recall, shown)
    validation = {} if site.manifest is None else site.manifest.counts.get("val", {})
    failures += _few(validation, "validation", params.gate.query_images)
    failures.append(
        KnownFailure(
            kind="not-tested",
            text="Figures are those on validation images, by which the epoch was chosen: they flatter. "
            "Neither calibration nor intervals were measured, and the gate does not judge teachers.",
        )
    )
    return ModelCard(
        name=f"teacher.{site.name}",
        kind="teacher",
        site=site.name,
        query=None,
        intended_use=INTENDED.format(what="to teach other hospitals' students", site=site.name),
        not_intended=NOT_INTENDED,
        answers_for=known,
        asked=(),
        data=_data(site.manifest),
        tested=None
        if site.metrics is None
        else Tested(
            on="validation images of the hospital's own patients",
            sites=(site.name,),
            images={c: shown_count(n) for c, n in validation.items()},
            confidence=None,
        ),
        method=MethodFacts(
            name="teacher",
            words=METHODS["teacher"],
            network=card.network,
            settings=_settings({**params.train.model_dump(mode="json"), **card.training}),
            input=card.input,
            bytes=card.weights.bytes,
            passes_per_prediction=1,
        ),
        figures=tuple(figures),
        gain_p=None,
        calibration=None,
        gate="not judged",
        known_failures=tuple(failures),
        privacy=_teacher_privacy(card, known, site.mask is not None),
        provenance=Provenance(
            bundle=str(site.card_digest),
            weights=card.weights.sha256,
            data=site.data_digest,
            teachers={},
            parameters=digest_bytes(
                to_json(
                    {
                        "seed": params.seed,
                        "train": params.train.model_dump(mode="json"),
                        "mask": params.mask.model_dump(mode="json"),
                    }
                ).encode()
            ),
            evaluation=None,
            trained_with=_trained_with(card),
            described_with=__version__,
        ),
    )


def _student_figures(query: QueryOutputs) -> list[CardFigure]:
    e = query.published
    pairs = [
        ("balanced accuracy", "balanced_accuracy", e.gain),
        ("query accuracy", "query_accuracy", e.query_gain),
        ("retained accuracy", "retained_accuracy", _negated(e.forgetting)),
        ("AUROC, query against the rest", "auroc", None),
    ]
    figures = [
        CardFigure(
            name=name,
            before=getattr(e.before, attribute),
            after=getattr(e.after, attribute),
            change=change,
        )
        for name, attribute, change in pairs
    ]
    for name, attribute in (
        ("recall", "recall"),
        ("precision", "precision"),
        ("AUROC", "class_auroc"),
        ("AUPRC", "class_auprc"),
    ):
        before, after = getattr(e.before, attribute), getattr(e.after, attribute)
        figures += [
            CardFigure(
                name=name,
                class_name=c,
                before=before.get(c),
                after=after.get(c),
                change=_negated(e.class_forgetting.get(c)) if name == "recall" else None,
            )
            for c in e.relevant
        ]
    return figures + _others_figures(e)


def _others_figures(e: PublishedEvaluation) -> list[CardFigure]:
    """Figures on other hospitals' images of the query, where those on own images stand first."""
    if e.others is None:
        return []
    return [
        CardFigure(
            name=f"{name}, on other hospitals' images of the query",
            before=getattr(e.others.before, attribute),
            after=getattr(e.others.after, attribute),
        )
        for name, attribute in (
            ("balanced accuracy", "balanced_accuracy"),
            ("query accuracy", "query_accuracy"),
        )
    ]


def _no_gain(gain: Estimate) -> str:
    """Statement for a gain in balanced accuracy whose interval is not above zero."""
    if gain.value == 0:
        return "Balanced accuracy is that of the hospital's own model: nothing was gained."
    if gain.value > 0:
        return "Chance can explain the gain in balanced accuracy."
    chance = " Chance can explain it." if gain.high >= 0 else ""
    return f"Balanced accuracy is lower than that of the hospital's own model.{chance}"


def _student_failures(query: QueryOutputs, params: Params) -> list[KnownFailure]:
    e, told = query.evaluation, query.published
    failures = _low_recall(_values(e.after.recall), _values(told.after.recall))
    failures += _forgotten(query)
    failures += _confused(e.relevant, e.after.confusion, told.after.confusion)
    if e.gain.low <= 0:
        low = None if told.gain is None else told.gain.low
        failures.append(KnownFailure(kind="no-gain", figure=low, threshold=0.0, text=_no_gain(e.gain)))
    failures += _few(
        {c: e.test_images.get(c, 0) for c in e.relevant}, "test", params.gate.query_images, told.test_images
    )
    verdict = query.published_verdict
    if verdict is None:
        failures.append(KnownFailure(kind="not-judged", text="The gate has not judged this answer."))
        return failures
    for rule in verdict.rules:
        if not rule.passed:
            whole = rule.rule == "query_images"
            figure = rule.note or "none"
            if rule.figure is not None:
                figure = shown_count(int(rule.figure)) if whole else f"{rule.figure:.3f}"
            failures.append(
                KnownFailure(
                    kind="gate",
                    figure=None if whole else rule.figure,
                    threshold=rule.threshold,
                    text=f"Gate rule {rule.rule} is not met: {rule.meaning}, {figure}, "
                    f"{rule.bound} {rule.threshold:g} wanted.",
                )
            )
    return failures


def _student_method(answer: AnswerOutputs, params: Params) -> MethodFacts:
    card, plan = answer.card, answer.plan
    return MethodFacts(
        name=plan.method,
        words=METHODS[plan.method],
        network=card.network,
        settings=_settings({**params.transfer.model_dump(mode="json"), **card.training}),
        teachers=tuple(
            CardTeacher(site=t.site, digest=t.digest, teaches=t.teaches, reason=t.reason)
            for t in plan.teachers
            if t.relevant
        ),
        input=card.input,
        bytes=card.weights.bytes,
        passes_per_prediction=1 if card.decision is None else card.decision.passes,
    )


def _parameters(params: Params) -> str:
    """Digest of the parameters that affect an answer; queries of other hospitals do not."""
    used = params.model_dump(
        mode="json", include={"seed", "classes", "train", "mask", "transfer", "evaluate"}
    )
    return digest_bytes(to_json(used).encode())


def _student_provenance(
    answer: AnswerOutputs, site: SiteOutputs | None, params: Params, evaluation: str | None
) -> Provenance:
    return Provenance(
        bundle=answer.card_digest,
        weights=answer.card.weights.sha256,
        data=None if site is None else site.data_digest,
        teachers={t.site: t.digest for t in answer.plan.teachers if t.relevant},
        parameters=_parameters(params),
        evaluation=evaluation,
        trained_with=_trained_with(answer.card),
        described_with=__version__,
    )


def unmeasured_model_card(answer: AnswerOutputs, outputs: Outputs) -> ModelCard:
    """The card of a student without an evaluation: it has no figures except those of the budget."""
    plan, second = answer.plan, answer.phases.phase2
    site = outputs.site(plan.hospital)
    return ModelCard(
        name=answer.model,
        kind="student",
        site=plan.hospital,
        query=plan.query,
        intended_use=INTENDED.format(what=f"to recognise {', '.join(plan.classes)} too", site=plan.hospital),
        not_intended=NOT_INTENDED,
        answers_for=tuple(c for c in answer.card.classes if c in {*plan.local, *plan.classes}),
        asked=plan.classes,
        data=_data(None if site is None else site.manifest),
        tested=None,
        method=_student_method(answer, outputs.params),
        figures=(),
        gain_p=None,
        calibration=Calibration(
            ece_before=None,
            ece=None,
            budget=second.budget,
            given_away=second.false_query_rate,
            own_images=_shown_images(second.own_images),
            offsets=second.offsets,
        ),
        gate="not judged",
        known_failures=(
            KnownFailure(
                kind="not-tested",
                text=f"The hospital has no test images of {', '.join(plan.classes)}: nobody has measured "
                "how well they are recognised, nor what was forgotten.",
            ),
            KnownFailure(kind="not-judged", text="The gate has not judged this answer."),
        ),
        privacy=_student_privacy(answer),
        provenance=_student_provenance(answer, site, outputs.params, None),
    )


def student_model_card(query: QueryOutputs, outputs: Outputs) -> ModelCard:
    """The card of an answered query's student."""
    e, params, second = query.published, outputs.params, query.phases.phase2
    site = outputs.site(e.hospital)
    return ModelCard(
        name=query.model,
        kind="student",
        site=e.hospital,
        query=e.query,
        intended_use=INTENDED.format(what=f"to recognise {', '.join(e.classes)} too", site=e.hospital),
        not_intended=NOT_INTENDED,
        answers_for=e.relevant,
        asked=e.classes,
        data=_data(None if site is None else site.manifest),
        tested=Tested(
            on=TESTED_ON[e.test_images_from],
            sites=e.test_sites,
            images=e.test_images,
            confidence=params.evaluate.confidence,
        ),
        method=_student_method(query, params),
        figures=tuple(_student_figures(query)),
        gain_p=e.gain_p,
        calibration=Calibration(
            ece_before=e.before.ece,
            ece=e.after.ece,
            budget=second.budget,
            given_away=second.false_query_rate,
            own_images=_shown_images(second.own_images),
            offsets=second.offsets,
        ),
        gate="not judged" if query.verdict is None else "passed" if query.verdict.passed else "failed",
        known_failures=tuple(_student_failures(query, params)),
        privacy=_student_privacy(query),
        provenance=_student_provenance(query, site, params, digest_file(query.evaluation_file)),
    )

"""``reports/queries.json`` and ``reports/metrics.json``: the main figures of a run.

For programs in the hospital's own workspace, with all their digits.
"""

from __future__ import annotations

from pydantic import ConfigDict, RootModel

from qkt_clinical.config.base import Fraction
from qkt_clinical.records.base import Number, Record, SignedFraction
from qkt_clinical.records.evaluation import Evaluation, ImagesFrom, Scores

DIGITS = 6


class Headline(Record):
    """Accuracies of one model: means of recalls over the query, the own classes, and all of these."""

    query_accuracy: Fraction
    retained_accuracy: Fraction
    balanced_accuracy: Fraction

    @classmethod
    def of(cls, scores: Scores) -> Headline:
        """The values without their intervals."""
        return cls(**{name: getattr(scores, name).value for name in cls.model_fields})


class OthersSummary(Record):
    """Accuracies on other hospitals' images of the query, whose scanner and stain may give them away."""

    before: Headline
    after: Headline


class QuerySummary(Record):
    """One answered query in ``reports/queries.json``."""

    hospital: str
    query: str
    classes: tuple[str, ...]
    method: str
    teachers: tuple[str, ...]
    bytes_moved: Number
    before: Headline
    after: Headline
    test_images: ImagesFrom = "others"
    """Whose images of the query ``before`` and ``after`` rest on."""
    others: OthersSummary | None = None
    """Beside figures on own images: those on other hospitals'."""

    @classmethod
    def of(cls, evaluation: Evaluation) -> QuerySummary:
        """Summary of an evaluation."""
        others = evaluation.others
        return cls(
            hospital=evaluation.hospital,
            query=evaluation.query,
            classes=evaluation.classes,
            method=evaluation.method,
            teachers=evaluation.teachers,
            bytes_moved=evaluation.bytes_moved,
            before=Headline.of(evaluation.before),
            after=Headline.of(evaluation.after),
            test_images=evaluation.test_images_from,
            others=None
            if others is None
            else OthersSummary(before=Headline.of(others.before), after=Headline.of(others.after)),
        )


class QuerySummaries(RootModel[tuple[QuerySummary, ...]]):
    """``reports/queries.json``."""

    model_config = ConfigDict(frozen=True)


class QueryMetrics(Headline):
    """One entry of ``reports/metrics.json``: accuracies of the answer, and what was gained and forgotten."""

    gain: SignedFraction
    forgetting: SignedFraction

    @classmethod
    def of_query(cls, evaluation: Evaluation) -> QueryMetrics:
        """Those of an evaluation."""
        return cls(
            **Headline.of(evaluation.after).model_dump(),
            gain=evaluation.gain.value,
            forgetting=evaluation.forgetting.value,
        )


class RunMetrics(RootModel[dict[str, QueryMetrics]]):
    """``reports/metrics.json``: by the query's name in ``params.yaml``, and their ``mean``."""

    model_config = ConfigDict(frozen=True)

    @classmethod
    def of(cls, queries: dict[str, QueryMetrics]) -> RunMetrics:
        """Of the queries by name, with their mean."""
        if not queries:
            return cls({})
        mean = {
            name: round(sum(getattr(m, name) for m in queries.values()) / len(queries), DIGITS)
            for name in QueryMetrics.model_fields
        }
        return cls({**queries, "mean": QueryMetrics.model_validate(mean)})

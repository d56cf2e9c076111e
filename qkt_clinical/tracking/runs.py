"""The pipeline's outputs as MLflow runs with parameters, metrics, curves and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qkt_clinical import __version__
from qkt_clinical.common.disclosure import shown_figure
from qkt_clinical.common.files import digest_bytes, digest_folder, to_json
from qkt_clinical.common.system_metrics import read_system_metrics
from qkt_clinical.common.wording import points, size, words
from qkt_clinical.config.params import Params
from qkt_clinical.records.base import Estimate
from qkt_clinical.records.card import CARD, MASK, REFERENCE, Card
from qkt_clinical.records.decisions import NONE
from qkt_clinical.records.model_card import ModelCard
from qkt_clinical.records.outputs import AnswerOutputs, Outputs, QueryOutputs, SiteOutputs, flat
from qkt_clinical.records.plan import shared_files
from qkt_clinical.records.published import PublishedEvaluation, PublishedScores
from qkt_clinical.report.model_card import student_model_card, teacher_model_card, unmeasured_model_card
from qkt_clinical.report.model_card_text import to_markdown, to_summary
from qkt_clinical.report.page import gain_bars, recall_bars, render_chart, render_reliability

DIGEST, KIND, GATE, VERDICT = "qkt.digest", "qkt.kind", "qkt.gate", "qkt.verdict"
CARD_DIGEST = "qkt.bundle"

MAX_PARAM, MAX_TAG, MAX_NOTE = 6000, 5000, 5000


@dataclass(frozen=True)
class Item:
    """One run to mirror."""

    kind: str
    name: str
    digest: str
    note: str
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    dataset: Mapping[str, Any] | None = None
    below: str | None = None
    """The site below whose run this one hangs, where there is one; else it hangs below the pipeline's."""
    model: Model | None = None


@dataclass(frozen=True)
class Model:
    """One version of a registered model."""

    name: str
    folder: Path
    card: Card
    digest: str
    model_card: ModelCard
    tags: Mapping[str, str]
    files: tuple[str, ...] | None = None
    """Those of the folder's files that go to the registry; None for all."""

    @property
    def note(self) -> str:
        """Description of a version."""
        return to_summary(self.model_card)[:MAX_NOTE]


def key(name: str) -> str:
    """Part of a metric's name, at most 200 characters.

    Letters, digits, ``-`` and blanks stay, others become their code point, so that two names never meet.
    """
    text = "".join(c if c.isalnum() or c in "- " else f"_{ord(c):x}_" for c in name) or "_"
    return text if len(text) <= 200 else f"{text[:180]}_{digest_bytes(name.encode())[:16]}"


def curves_of(prefix: str, rows: Sequence[Mapping[str, float]]) -> dict[str, list[tuple[int, float]]]:
    """Convert rows per epoch, or per layer, to series of (epoch or layer, value)."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        axis = next((name for name in ("layer number", "epoch") if name in row), None)
        for name, value in row.items():
            if axis is not None and name != axis:
                series.setdefault(f"{prefix}/{key(name)}", []).append((int(row[axis]), value))
    return series


# --- what is mirrored ----------------------------------------------------------------------------


def _digest(value: Any) -> str:
    return digest_bytes(to_json(value).encode())


def _dataset(site: SiteOutputs | None) -> dict[str, Any] | None:
    """A hospital's data by digest; counts stay with the site, shape and type are on the card anyway."""
    if site is None or site.manifest is None:
        return None
    return {
        "name": site.name,
        "digest": site.data_digest,
        "profile": {"shape": site.manifest.shape, "dtype": site.manifest.dtype},
    }


def _shown_row(row: Mapping[str, float]) -> dict[str, float]:
    """A row of a training's curves; its score is a mean of recalls on validation images."""
    return {name: shown_figure(value) if name == "score" else value for name, value in row.items()}


def _texts(card: ModelCard) -> dict[str, str]:
    return {"model_card.json": to_json(card.model_dump(mode="json")), "model_card.md": to_markdown(card)}


def site_item(site: SiteOutputs, params: Params) -> Item | None:
    """The run of a site and its teacher; None where there is no teacher here."""
    if site.teacher is None or site.card is None:
        return None
    used = {
        "seed": params.seed,
        **flat("train", params.train.model_dump(mode="json")),
        **flat("mask", params.mask.model_dump(mode="json")),
    }
    files = {
        n: site.teacher / n for n in (*shared_files(site.card), REFERENCE) if (site.teacher / n).is_file()
    }
    # The figures of training are the run's; whoever fetches the teacher has no use for them.
    registered = digest_folder(site.teacher, files)
    known = [] if site.mask is None else [c for c in site.card.classes if site.mask.knows(c)]
    metrics: dict[str, float] = {}
    told = site.published_metrics
    if told is not None:
        metrics = {f"recall/{key(c)}": v for c, v in told.recall.items() if v is not None}
        metrics |= {"epochs": told.epochs, "best_epoch": told.best_epoch}
        if told.balanced_accuracy is not None:
            metrics["balanced_accuracy"] = told.balanced_accuracy
    note = f"Teacher of {site.name}: {site.card.network.name}, knows {words(known) or 'nothing by its mask'}."
    bundle = str(site.card_digest)
    tags = {"qkt.site": site.name, CARD_DIGEST: bundle, "qkt.data": site.data_digest or "not here"}
    card = teacher_model_card(site, params)
    return Item(
        kind="site",
        name=site.name,
        digest=_digest(
            {
                "folder": digest_folder(site.teacher),
                "card": card.model_dump(mode="json"),
                "params": used,
            }
        ),
        note=note,
        params=used | {"network_bytes": site.card.weights.bytes},
        metrics=metrics,
        curves=curves_of("curve", [_shown_row(row) for row in site.curves]),
        tags=tags,
        files={name: path for name, path in files.items() if name in (CARD, MASK)},
        texts=_texts(card),
        dataset=_dataset(site),
        model=Model(card.name, site.teacher, site.card, registered, card, tags, tuple(sorted(files))),
    )


def _answer_params(answer: AnswerOutputs, params: Params) -> dict[str, Any]:
    plan = answer.plan
    return {
        "seed": params.seed,
        "hospital": plan.hospital,
        "query": plan.query,
        "classes": ", ".join(plan.classes),
        "method": plan.method,
        "budget": plan.budget,
        "teachers": ", ".join(plan.relevant),
        **flat("transfer", params.transfer.model_dump(mode="json")),
    }


def _answer_metrics(answer: AnswerOutputs) -> dict[str, float]:
    second, decision = answer.phases.phase2, answer.card.decision
    return {
        "bytes_moved": answer.plan.bytes_moved,
        "passes_per_prediction": 1 if decision is None else decision.passes,
        **({} if second.false_query_rate is None else {"given_away": second.false_query_rate}),
        **{f"offset/{key(c)}": v for c, v in second.offsets.items()},
    }


def _answer_curves(answer: AnswerOutputs) -> dict[str, list[tuple[int, float]]]:
    first, second = answer.phases.phase1, answer.phases.phase2
    return curves_of("phase2", second.curves) | ({} if first is None else curves_of("phase1", first.curves))


def _answer_tags(answer: AnswerOutputs, site: SiteOutputs | None) -> dict[str, str]:
    return {
        "qkt.site": answer.plan.hospital,
        "qkt.query": answer.plan.query,
        "qkt.method": answer.plan.method,
        CARD_DIGEST: answer.card_digest,
        "qkt.data": (site.data_digest if site else None) or "not here",
    }


def _answer_files(answer: AnswerOutputs) -> dict[str, Path]:
    return {name: answer.student / name for name in ("plan.json", "phases.json")}


def answer_item(answer: AnswerOutputs, outputs: Outputs) -> Item:
    """The run of a student without an evaluation."""
    plan, site = answer.plan, outputs.site(answer.plan.hospital)
    used, tags = _answer_params(answer, outputs.params), _answer_tags(answer, site)
    tags |= {GATE: "not judged", f"{GATE}_unmet": NONE, VERDICT: NONE}
    card = unmeasured_model_card(answer, outputs)
    folder = answer.folder_digest
    return Item(
        kind="query",
        name=answer.name,
        digest=_digest({"folder": folder, "card": card.model_dump(mode="json"), "params": used}),
        note=f"{plan.hospital} asks for {words(plan.classes)}; method {plan.method}, teachers "
        f"{words(plan.relevant) or 'none'}, {size(plan.bytes_moved)} moved. Not measured.",
        params=used,
        metrics=_answer_metrics(answer),
        curves=_answer_curves(answer),
        tags=tags,
        files=_answer_files(answer),
        texts=_texts(card),
        dataset=_dataset(site),
        below=plan.hospital,
        model=Model(card.name, answer.student, answer.card, folder, card, tags),
    )


def _score_metrics(prefix: str, scores: PublishedScores) -> dict[str, float]:
    names = ("query_accuracy", "retained_accuracy", "balanced_accuracy", "auroc", "ece")
    named = {n: getattr(scores, n) for n in names}
    named |= {f"recall/{key(c)}": interval for c, interval in scores.recall.items()}
    return {f"{prefix}/{n}": i.value for n, i in named.items() if i is not None}


def _others_metrics(e: PublishedEvaluation) -> dict[str, float]:
    """Accuracies on other hospitals' images of the query, where the main ones rest on own images."""
    if e.others is None:
        return {}
    found = {
        f"others/{when}/{name}": getattr(side, name)
        for when, side in (("before", e.others.before), ("after", e.others.after))
        for name in ("query_accuracy", "balanced_accuracy")
    }
    return {name: figure.value for name, figure in found.items() if figure is not None}


def _unmet(query: QueryOutputs) -> str:
    """Rules of the gate that an answer does not meet."""
    rules = () if query.verdict is None else query.verdict.rules
    return ", ".join(rule.rule for rule in rules if not rule.passed) or NONE


def _change(figure: Estimate | None) -> str:
    """A difference with its interval, in words."""
    if figure is None:
        return "not told"
    return f"{points(figure.value)} points ({points(figure.low)} to {points(figure.high)})"


def _tag(figure: Estimate | None) -> str:
    return NONE if figure is None else f"{figure.value:.2f}"


def query_item(query: QueryOutputs, outputs: Outputs) -> Item:
    """The run of an answered query and its student."""
    e, params, verdict = query.published, outputs.params, query.published_verdict
    site = outputs.site(e.hospital)
    used = _answer_params(query, params) | flat("evaluate", params.evaluate.model_dump(mode="json"))
    metrics = _answer_metrics(query) | _score_metrics("before", e.before) | _score_metrics("after", e.after)
    metrics |= _others_metrics(e)
    for name, interval in (("gain", e.gain), ("forgetting", e.forgetting), ("query_gain", e.query_gain)):
        if interval is not None:
            metrics |= {name: interval.value, f"{name}/low": interval.low, f"{name}/high": interval.high}
    note = (
        f"{e.hospital} asks for {words(e.classes)}; method {e.method}, teachers "
        f"{words(e.teachers) or 'none'}, {size(e.bytes_moved)} moved. "
        f"Balanced accuracy {_change(e.gain)}, forgetting {_change(e.forgetting)}."
    )
    tags = _answer_tags(query, site) | {
        GATE: "not judged" if verdict is None else ("passed" if verdict.passed else "failed"),
        f"{GATE}_unmet": _unmet(query),
        VERDICT: NONE if verdict is None else verdict.model_dump_json(),
        "qkt.test_images": e.test_images_from,
        "qkt.balanced_accuracy": _tag(e.after.balanced_accuracy),
        "qkt.forgetting": _tag(e.forgetting),
    }
    card = student_model_card(query, outputs)
    folder = query.folder_digest
    return Item(
        kind="query",
        name=query.name,
        digest=_digest(
            {
                "folder": folder,
                "card": card.model_dump(mode="json"),
                "gate": None if verdict is None else verdict.model_dump(mode="json"),
                "params": used,
            }
        ),
        note=note,
        params=used,
        metrics=metrics,
        curves=_answer_curves(query),
        tags=tags,
        files=_answer_files(query),
        texts={
            **_texts(card),
            **({} if verdict is None else {"gate.json": to_json(verdict.model_dump(mode="json"))}),
            "evaluation.json": to_json(e.model_dump(mode="json")),
            "reliability.svg": render_reliability(e),
            "recall.svg": render_chart("bars", f"Recall per class: {query.name}", recall_bars(e)),
        },
        dataset=_dataset(site),
        below=e.hospital,
        model=Model(card.name, query.student, query.card, folder, card, tags),
    )


def with_system_metrics(item: Item, scratch: Path) -> Item:
    """The item with MLflow's "system metrics" of making its model, if they were sampled."""
    series: dict[str, list[tuple[int, float]]] = {}
    for step, sample in enumerate(read_system_metrics(scratch, item.tags.get(CARD_DIGEST, ""))):
        for name, value in sample.items():
            series.setdefault(f"system/{name}", []).append((step, value))
    return replace(item, curves={**item.curves, **series})


def pipeline_item(outputs: Outputs, items: Sequence[Item]) -> Item:
    """The parent run of all others."""
    contents = {f"{i.kind} {i.name}": i.digest for i in items}
    told = [q.published for q in outputs.queries]
    metrics: dict[str, float] = {"queries": len(told), "sites": len(outputs.sites)}
    for name, figures in (
        ("gain", [e.gain for e in told]),
        ("forgetting", [e.forgetting for e in told]),
        ("balanced_accuracy", [e.after.balanced_accuracy for e in told]),
    ):
        values = [figure.value for figure in figures if figure is not None]
        metrics |= {name: sum(values) / len(values)} if values else {}
    if told:
        metrics["bytes_moved"] = sum(e.bytes_moved for e in told)
        metrics["queries_below_own_model"] = sum(q.evaluation.gain.value < 0 for q in outputs.queries)
    chart = render_chart("dumbbells", "Balanced accuracy before and after, per query", gain_bars(told))
    return Item(
        kind="pipeline",
        name="pipeline",
        digest=_digest({"contents": contents, "params": outputs.params_digest}),
        note=f"{len(outputs.queries)} queries answered among {len(outputs.sites)} hospitals.",
        params={
            "seed": outputs.params.seed,
            "classes": ", ".join(outputs.params.classes),
            "sites": ", ".join(outputs.params.sites),
            "version": __version__,
        },
        metrics=metrics,
        tags={"qkt.params": outputs.params_digest},
        texts={"contents.json": to_json(contents), "gain.svg": chart},
    )

"""Which stage's turn it is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qkt_clinical.repro.agenda import Agenda

ORDER = ("ingest@a", "train@a", "ingest@b", "train@b", "evaluate", "report")
NEEDS = {
    "train@a": frozenset({"ingest@a"}),
    "train@b": frozenset({"ingest@b"}),
    "evaluate": frozenset({"train@a", "train@b"}),
    "report": frozenset({"evaluate"}),
}


def test_a_stage_starts_when_those_it_reads_of_are_done() -> None:
    agenda = Agenda(ORDER, NEEDS)
    assert [agenda.next(), agenda.next(), agenda.next()] == ["ingest@a", "ingest@b", None]
    agenda.done("ingest@b")
    assert [agenda.next(), agenda.next()] == ["train@b", None]
    agenda.done("train@b")
    assert agenda.next() is None, "evaluate needs both"
    agenda.done("ingest@a")
    assert agenda.next() == "train@a"
    agenda.done("train@a")
    assert [agenda.next(), agenda.next()] == ["evaluate", None]
    agenda.done("evaluate")
    assert (agenda.next(), agenda.over) == ("report", False)
    agenda.done("report")
    assert agenda.over


def test_nobody_waits_for_what_need_not_run() -> None:
    agenda = Agenda(ORDER, NEEDS, ended=("ingest@a", "train@a", "ingest@b"))
    assert [agenda.next(), agenda.next()] == ["train@b", None]
    agenda.done("train@b")
    assert agenda.next() == "evaluate"
    assert Agenda(ORDER, NEEDS, ended=ORDER).over


def test_a_failure_ends_all_that_need_it_and_nothing_else() -> None:
    agenda = Agenda(ORDER, NEEDS)
    assert [agenda.next(), agenda.next()] == ["ingest@a", "ingest@b"]
    assert agenda.failed("ingest@a") == ["train@a", "evaluate", "report"]
    agenda.done("ingest@b")
    assert agenda.next() == "train@b"
    agenda.done("train@b")
    assert agenda.over


@st.composite
def graphs(draw: st.DrawFn) -> tuple[tuple[str, ...], dict[str, frozenset[str]]]:
    """Stages in an order in which each stands behind what it needs."""
    count = draw(st.integers(1, 12))
    names = tuple(f"s{n}" for n in range(count))
    needs = {n: frozenset(draw(st.sets(st.sampled_from(names[:i])))) for i, n in enumerate(names) if i}
    return names, needs


@given(graphs(), st.integers(1, 4), st.data())
def test_every_stage_runs_once_after_its_needs_or_not_at_all(
    graph: tuple[tuple[str, ...], dict[str, frozenset[str]]], jobs: int, data: st.DataObject
) -> None:
    order, needs = graph
    broken = data.draw(st.sets(st.sampled_from(order)))
    agenda, running, done, dropped = Agenda(order, needs), list[str](), list[str](), list[str]()
    failed = set[str]()
    while not agenda.over:
        while len(running) < jobs and (name := agenda.next()):
            assert needs.get(name, frozenset()) <= set(done)
            running.append(name)
        assert running, "it never waits for nothing"
        ended = running.pop(data.draw(st.integers(0, len(running) - 1)))
        if ended in broken:
            failed.add(ended)
            dropped += agenda.failed(ended)
        else:
            agenda.done(ended)
            done.append(ended)
    assert sorted([*done, *failed, *dropped]) == sorted(order)
    for name in dropped:
        assert needs[name] & (failed | set(dropped))

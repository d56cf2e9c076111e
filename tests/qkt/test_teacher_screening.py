from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qkt_clinical.qkt.teacher_screening import (
    FALSE_ALARM,
    ScreeningResult,
    agreement,
    chance_level,
    count_recalled,
    margin_directions,
    screen_teachers,
)
from qkt_clinical.task import MULTICLASS

CLASSES = 6
LABELS = torch.tensor([0] * 30 + [1] * 30)
"""The asking hospital's own images: of classes 0 and 1."""
TRAITS = torch.randn(60, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
"""How far an image looks like each class beyond what its label says: what all who know a class see."""


def expert(known: Sequence[int], seed: int = 1) -> Tensor:
    """Logits (60, 6) of a network that knows these classes and has seen the others never."""
    noise = torch.randn(60, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits = torch.full((60, CLASSES), -20.0, dtype=torch.float64)
    for c in known:
        logits[:, c] = 2 * TRAITS[:, c] + 0.5 * noise[:, c] + 9 * (c == LABELS)
    return logits


def renamed(known: Sequence[int], seed: int = 1) -> Tensor:
    """The same with each class under the name of the next."""
    logits = expert(known, seed)
    wrong = logits.clone()
    wrong[:, list(known)] = logits[:, [*known[1:], known[0]]]
    return wrong


def screened(
    teachers: dict[str, tuple[Tensor, tuple[int, ...]]], verified: dict[str, tuple[int, ...]] | None = None
) -> dict[str, ScreeningResult]:
    results = screen_teachers(
        list(teachers),
        [logits for logits, _ in teachers.values()],
        [known for _, known in teachers.values()],
        [(verified or {}).get(site) for site in teachers],
        (0, 1),
        LABELS,
        task=MULTICLASS,
    )
    assert [v.site for v in results] == list(teachers)
    return {v.site: v for v in results}


HONEST = {
    "birch": (expert((0, 2, 3), 1), (0, 2, 3)),
    "cedar": (expert((1, 3, 4), 2), (1, 3, 4)),
    "dahlia": (expert((2, 3, 4), 3), (2, 3, 4)),
    "elm": (expert((3, 4, 5), 4), (3, 4, 5)),
}
"""Dahlia and elm share no class with the hospital."""


def test_chance_level_by_hand() -> None:
    assert chance_level(0, 3, 3) == pytest.approx(8 / 27)
    assert chance_level(1, 2, 2) == pytest.approx(3 / 4)
    assert chance_level(5, 5, 4) == 1


def test_recall_is_among_the_classes_that_are_known() -> None:
    logits = torch.tensor([[1.0, 9.0, 0.0], [0.0, 9.0, 1.0], [5.0, 0.0, 0.0]])
    assert count_recalled(logits, torch.tensor([0, 0, 2]), (2, 0), 0, task=MULTICLASS) == (1, 2)
    assert count_recalled(logits, torch.tensor([0, 0, 2]), (0, 1, 2), 1, task=MULTICLASS) == (0, 0)


def test_agreement_by_hand() -> None:
    # Two margins at right angles: what the one says of class 3, the other says of class 5.
    one = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert agreement(one, (3, 5), one, (3, 5)) == [1.0, 1.0]
    assert agreement(one, (3, 5), one.flip(1), (3, 5)) == [-1.0, -1.0]
    assert agreement(one, (3, 5), one[:, :1], (3,)) == [1.0]
    assert agreement(one, (3, 5), one, (0, 1)) == []
    assert agreement(one[:, :1], (3,), one, (3, 5)) == [1.0]


def test_directions_do_not_show_what_the_labels_tell() -> None:
    logits = expert((0, 2, 3))
    seen = margin_directions(logits, LABELS, (0, 2, 3))
    assert seen.shape == (60, 3)
    torch.testing.assert_close(seen.norm(dim=0), torch.ones(3, dtype=torch.float64))
    shifted = logits + 7 * (LABELS == 1)[:, None] + torch.arange(CLASSES) + 100 * torch.eye(CLASSES)[5]
    torch.testing.assert_close(margin_directions(3 * shifted, LABELS, (0, 2, 3)), seen)


def test_honest_teachers_are_included() -> None:
    found = screened(HONEST)
    assert all(v.included and not v.unverified for v in found.values())
    assert found["birch"].reason == "names images of shared classes as the hospital does"
    assert found["birch"].recalls == {0: pytest.approx(29 / 30)}
    assert (found["elm"].reason, found["elm"].recalls) == ("agrees with the other experts", {})
    assert all(v.agreement is not None and v.agreement > 0.5 for v in found.values())


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        ("birch", "names images of shared classes less often so than by chance"),
        ("dahlia", "agrees with the other experts no more about its own classes than about others"),
    ],
)
def test_wrong_labels_are_seen_in_shared_classes_or_by_the_other_experts(site: str, reason: str) -> None:
    known = HONEST[site][1]
    found = screened({**HONEST, site: (renamed(known), known)})
    assert not found[site].included
    assert found[site].reason == reason
    assert all(v.included for name, v in found.items() if name != site)


def test_two_bad_teachers_of_four() -> None:
    bad = {site: (renamed(HONEST[site][1]), HONEST[site][1]) for site in ("cedar", "elm")}
    assert {site for site, v in screened({**HONEST, **bad}).items() if not v.included} == set(bad)


def test_a_claim_that_the_network_does_not_show_does_not_count() -> None:
    liar = (HONEST["elm"][0], (2, 3, 4, 5))
    honest = {site: known for site, (_, known) in HONEST.items()}
    found = screened({**HONEST, "elm": liar}, verified=honest)
    assert found["elm"].included
    assert found["elm"].unverified == (2,)
    alone = screened(HONEST, verified=honest)
    assert {s: v.agreement for s, v in found.items()} == {s: v.agreement for s, v in alone.items()}
    none = screened({**HONEST, "elm": liar}, verified={"elm": ()})["elm"]
    assert not none.included
    assert none.reason == "its network shows none of the classes that it claims"
    assert none.unverified == (2, 3, 4, 5)


def test_a_leaning_towards_one_class_is_seen_where_a_class_is_shared() -> None:
    leaning = HONEST["birch"][0].clone()
    leaning[:, 3] += 100
    found = screened({**HONEST, "birch": (leaning, (0, 2, 3))})["birch"]
    assert (found.included, found.recalls) == (False, {0: 0.0})


def test_want_of_evidence_excludes_nobody() -> None:
    stranger = {"elm": (renamed((3, 4, 5)), (3, 4, 5))}
    alone = screened(stranger)["elm"]
    assert alone.included
    assert (alone.reason, alone.agreement) == ("shares no class with anybody who could tell", None)
    two = screened({**stranger, "dahlia": HONEST["dahlia"]})
    assert {v.reason for v in two.values()} == {"too few experts to tell"}
    assert all(v.included for v in two.values())


def test_few_images_or_a_single_class_are_no_evidence() -> None:
    few = torch.arange(60) % 30 < 3  # three of each class: chance would miss all of them once in three times
    assert chance_level(0, 3, 3) > FALSE_ALARM
    wrong = renamed((0, 2, 3))[few]
    (result,) = screen_teachers(["birch"], [wrong], [(0, 2, 3)], [None], (0, 1), LABELS[few], task=MULTICLASS)
    assert result.included
    assert result.recalls == {0: 0.0}
    (single,) = screen_teachers(["birch"], [expert((3,))], [(3,)], [None], (0, 1), LABELS, task=MULTICLASS)
    assert single.included
    assert single.recalls == {}


def test_who_knows_nothing_of_a_class_is_seldom_excluded() -> None:
    """The stated rate: names drawn among three classes, on 30 images of one shared class."""
    draw = torch.Generator().manual_seed(0)
    known = (0, 2, 3)
    alarms = 0
    for _ in range(400):
        (v,) = screen_teachers(
            ["a"],
            [torch.randn(60, CLASSES, generator=draw)],
            [known],
            [None],
            (0, 1),
            LABELS,
            task=MULTICLASS,
        )
        alarms += not v.included
    assert alarms / 400 <= 2 * FALSE_ALARM


def test_order_of_teachers_does_not_matter() -> None:
    bad = {**HONEST, "elm": (renamed((3, 4, 5)), (3, 4, 5))}
    turned = screened(dict(reversed(bad.items())))
    found = screened(bad)
    assert {s: v.included for s, v in turned.items()} == {s: v.included for s, v in found.items()}


def test_shared_classes_are_tested_together_where_each_alone_shows_nothing() -> None:
    labels = torch.arange(4).repeat(6)
    known = (0, 1, 2, 3)
    wrong = torch.nn.functional.one_hot((labels + 1) % 4, CLASSES).double() + 0.1 * TRAITS[:24]
    assert chance_level(0, 6, 4) > FALSE_ALARM, "six images of one class are no evidence"
    (result,) = screen_teachers(["birch"], [wrong], [known], [None], known, labels, task=MULTICLASS)
    assert not result.included
    assert result.named == dict.fromkeys(known, (0, 6))


def test_one_name_for_every_image_bears_no_label_out() -> None:
    logits = 0.1 * TRAITS.clone()
    logits[:, 0] += 9
    result = screened({"birch": (logits, (0, 1, 2))})["birch"]
    assert result.named == {0: (30, 30), 1: (0, 30)}
    assert not result.included
    few = torch.arange(60) % 30 < 4
    (result,) = screen_teachers(
        ["birch"], [logits[few]], [(0, 1, 2)], [None], (0, 1), LABELS[few], task=MULTICLASS
    )
    assert result.reason != "names images of shared classes as the hospital does"


def test_an_agreement_of_nothing_is_no_agreement() -> None:
    # What is left of a constant network's margins is rounding: it has no direction to compare.
    constant = torch.full((60, CLASSES), 7.0) + 1e-7 * TRAITS.float()
    assert not margin_directions(constant, LABELS, (2, 3, 4)).any()
    seen = margin_directions(HONEST["dahlia"][0], LABELS, (2, 3, 4))
    assert agreement(torch.zeros_like(seen), (2, 3, 4), seen, (2, 3, 4)) == []
    assert agreement(seen, (2, 3, 4), torch.zeros_like(seen), (2, 3, 4)) == []
    found = screened({**HONEST, "elm": (constant, (3, 4, 5))})
    assert not found["elm"].included
    assert found["elm"].agreement is None
    assert all(r.included for site, r in found.items() if site != "elm")


# --- teachers from elsewhere ----------------------------------------------------------------------


def from_elsewhere(logits: Tensor, known: tuple[int, ...], unlike: bool) -> ScreeningResult:
    (result,) = screen_teachers(
        ["birch"], [logits], [known], [None], (0, 1), LABELS, task=MULTICLASS, unlike=[unlike]
    )
    return result


def misnames(named: int) -> Tensor:
    """An expert that gives every image of a class another one's name."""
    logits = expert((0, 1, 3))
    logits[named == LABELS, named] = -30.0
    return logits


def test_a_class_that_a_teacher_from_elsewhere_misnames_does_not_count() -> None:
    known = (0, 1, 3)
    at_home = from_elsewhere(misnames(1), known, unlike=False)
    assert not at_home.included, "whose images look alike has no excuse"
    assert at_home.misnamed == ()
    far = from_elsewhere(misnames(1), known, unlike=True)
    assert far.included
    assert (far.misnamed, far.unverified) == ((1,), ())
    assert far.named[1][0] == 0
    assert far.recalls[0] > 0.9
    sound = from_elsewhere(expert(known), known, unlike=True)
    assert (sound.included, sound.misnamed) == (True, ())


def test_wrong_labels_have_no_excuse_elsewhere_either() -> None:
    known = (0, 1, 3)
    far = from_elsewhere(renamed(known), known, unlike=True)
    assert not far.included
    assert far.reason == "names images of shared classes less often so than by chance"
    single = from_elsewhere(misnames(1)[:, [0, 1, 3]], (1, 2), unlike=True)
    assert not single.included, "nothing that it says of a shared class counts"

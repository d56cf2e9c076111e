"""Spellings that are one name or one patient, and such as are two."""

import unicodedata

import pytest

from qkt_clinical.ingest.identity import normal_name, normal_patient


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_is_the_same_in_both_forms_of_unicode(form: str) -> None:
    assert normal_name(unicodedata.normalize(form, "Müller_ÅÉ가")) == "Müller_ÅÉ가"


@pytest.mark.parametrize("name", [" a b ", "x²", "Straße", "a/B.dcm", "surrogate\udcff"])
def test_a_name_is_left_as_it_is_otherwise(name: str) -> None:
    assert normal_name(name) == name


@pytest.mark.parametrize(
    ("vr", "spellings"),
    [
        ("LO", ["P1", "P1 ", " P1", "  P1  ", "P1\0", "P1 \0", "P1\u00a0", "\uff30\uff11"]),
        ("SH", ["M\u00fcller", "Mu\u0308ller", "M\u00fcller "]),
        ("UI", ["1.2.3", "1.2.3\0"]),
        ("LT", ["P1", "P1 "]),
        ("PN", ["Doe^Jane", "Doe^Jane^^^", "Doe ^ Jane", " Doe^Jane \0", "Doe^Jane==", "Doe^Jane^ ^=^^= "]),
        ("PN", ["Yamada^Tarou=山田^太郎", "Yamada^Tarou^=山田^太郎^^=", "Ｙamada^Tarou=山田 ^太郎"]),
        ("PN", ["", "^^^^", "==", " ^ = "]),
    ],
)
def test_spellings_of_one_patient(vr: str, spellings: list[str]) -> None:
    assert len({normal_patient(s, vr) for s in spellings}) == 1


@pytest.mark.parametrize(
    ("vr", "first", "second"),
    [
        ("LO", "P1", "p1"),
        ("LO", "P 1", "P1"),
        ("LO", "P1^", "P1"),
        ("LO", "01", "1"),
        ("LT", " P1", "P1"),
        ("PN", "Doe^Jane", "Doe^jane"),
        ("PN", "Doe^^Jane", "Doe^Jane"),
        ("PN", "Doe^Jane", "Jane^Doe"),
        ("PN", "=Doe", "Doe"),
    ],
)
def test_two_patients_stay_two(vr: str, first: str, second: str) -> None:
    assert normal_patient(first, vr) != normal_patient(second, vr)

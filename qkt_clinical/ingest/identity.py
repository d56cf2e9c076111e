"""When two spellings are one name or one patient: Unicode normal forms and padding by value representation.

A patient spelt in two ways would stand in two splits, so what means the same is compared as the same.
"""

from __future__ import annotations

import unicodedata

PADDING = " \0"
TRAILING = frozenset({"LT", "ST", "UC", "UR", "UT"})
"""Value representations in which only spaces at the end are padding (DICOM PS3.5, 6.2)."""

_WORDS = """
    anon anonym anonymous anonymized anonymised anonymize anonymise anonymous^anonymous anonymous^patient
    deidentified de-identified deidentified^patient pseudonymized pseudonymised removed redacted deleted
    unknown none null nil nan na n/a n.a. noid no_id noname no_name noname^noname patient test dummy default
    hidden confidential - -- --- . ? * #
"""
PLACEHOLDERS = frozenset(
    {
        *(
            spelt
            for word in _WORDS.split()
            for spelt in (word, word.upper(), word.capitalize(), word.title())
        ),
        *(sign * length for sign in "0xX9" for length in range(1, 17)),
    }
)
"""What anonymisers and tables write where a patient's id was."""


def normal_name(text: str) -> str:
    """A folder's or file's name, or a key of a CSV file, as it is compared: in Unicode's form NFC.

    macOS writes an umlaut as two characters, Windows and most tables as one; both are one text by the
    standard. NFKC would go too far: it makes one of ``x²`` and ``x2``, which may be two files. Nothing is
    stripped.
    """
    return unicodedata.normalize("NFC", text)


def normal_patient(text: str, vr: str) -> str:
    """A patient's id or name as it is compared with others.

    In Unicode's form NFKC, so that wide and narrow letters (Japanese systems write either) and odd spaces
    are one: two patients taken for one only stay together in a split, one taken for two would stand in
    two. Padding goes as the value representation has it; case stays.

    Args:
        text: one value.
        vr: value representation; ``LO`` for what comes from a folder or a table.

    Returns:
        The same text for all spellings of one value. Of a person's name (PN) padding within components,
        and components and groups that are empty at the end, are gone too.
    """
    plain = unicodedata.normalize("NFKC", text)
    if vr in TRAILING:
        return plain.rstrip(PADDING)
    if vr != "PN":
        return plain.strip(PADDING)
    groups = ["^".join(part.strip(PADDING) for part in group.split("^")) for group in plain.split("=")]
    return "=".join(group.rstrip("^") for group in groups).rstrip("=")

from __future__ import annotations

import re
from typing import get_args

from qkt_clinical.catalog import STAGES
from qkt_clinical.cli.query import query_app
from qkt_clinical.config.query import QueryConfig
from qkt_clinical.ingest import reasons
from qkt_clinical.jobs.state import State
from tests.places import ROOT

DOCS = ROOT / "docs"


def test_every_reason_code_is_explained() -> None:
    text = (DOCS / "ingest.md").read_text()
    rows = [f"| `{code}` | {meaning} | {remedy} |" for code, (meaning, remedy) in reasons.items()]
    assert text[text.index("| --- | --- | --- |\n| `unreadable`") :].splitlines()[1:] == rows


def test_every_command_key_and_state_of_a_query_is_explained() -> None:
    text = (DOCS / "query.md").read_text()
    first = " ".join(re.findall(r"^\| (.+?) \|", text, re.MULTILINE))
    for command in query_app.registered_commands:
        assert f"`{command.name} " in first, command.name
    for state in get_args(State):
        assert f"| `{state}` |" in text, state
    for key in QueryConfig.model_fields:
        assert f"\n{key}: " in text, key


def test_every_stage_is_explained() -> None:
    text = (DOCS / "pipeline.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(STAGES)


def anchors(text: str) -> set[str]:
    """Where links may lead to in a page: its headings as GitHub and GitLab name them."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", prose, re.MULTILINE):
        words = re.sub(r"\]\([^)]*\)", "", heading).strip().lower()
        found.append(re.sub(r"[^\w\- ]", "", words).replace(" ", "-"))
    return {f"{name}-{found[:i].count(name)}" if name in found[:i] else name for i, name in enumerate(found)}


def test_anchors_are_headings_outside_code() -> None:
    text = "# A `b` & C\n## [Link](x.md)s, too\n```\n# no heading\n```\n## A `b` & C\n"
    assert anchors(text) == {"a-b--c", "links-too", "a-b--c-1"}


def test_links_lead_somewhere() -> None:
    root = DOCS.parent
    followed = 0
    for page in [*root.glob("*.md"), *DOCS.glob("*.md")]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if target.startswith("http"):
                continue
            name, _, anchor = target.partition("#")
            there = page.parent / name if name else page
            assert there.exists(), f"{page.name}: {target}"
            if anchor:
                followed += 1
                assert anchor in anchors(there.read_text(encoding="utf-8")), f"{page.name}: {target}"
    assert followed, "there are such links"

"""Write query files, and add answered queries to the pipeline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from qkt_clinical.catalog import DEFAULT_BUDGET
from qkt_clinical.common.files import passing_file, write_text
from qkt_clinical.common.locks import lock
from qkt_clinical.config.loading import load_params, parse, read_yaml
from qkt_clinical.config.params import Params
from qkt_clinical.config.query import QueryConfig, QueryRef
from qkt_clinical.config.workspace import Workspace, query_file
from qkt_clinical.errors import ConfigError, QueryError
from qkt_clinical.records.card import CARD


def new_query(
    root: Path,
    hospital: str,
    name: str,
    classes: Sequence[str],
    params: Params,
    *,
    method: str = "qkt",
    budget: float = DEFAULT_BUDGET,
    max_teachers: int | None = None,
    exclude_teachers: Sequence[str] = (),
) -> Path:
    """Write ``hospitals/<hospital>/queries/<name>.yaml`` and return its path.

    Raises:
        ConfigError: no such hospital, a malformed name or value, or a query of that name is there already.
        QueryError: a class is none of the federation's.
    """
    path = query_file(root, hospital, name)
    said = {
        "classes": list(classes),
        "method": method,
        "budget": budget,
        "max_teachers": max_teachers,
        "exclude_teachers": list(exclude_teachers),
    }
    query = parse(QueryConfig, said, file=path, site=hospital)
    strange = [c for c in query.classes if c not in params.classes]
    if strange:
        raise QueryError(
            f"{', '.join(strange)} is no class of the federation",
            remedy=f"Choose among {', '.join(params.classes)}.",
            site=hospital,
            code="class-unknown",
        )
    if path.exists():
        raise ConfigError(
            f"{hospital} has a query {name!r} already",
            remedy="Choose another name, or change the file.",
            file=path,
            site=hospital,
            code="query-exists",
        )
    lines = {
        "classes": f"[{', '.join(_word(c) for c in query.classes)}]",
        "method": f"{query.method} # qkt | qkt-light | routed",
        "budget": f"{query.budget!r} # false-query rate: at most {100 * query.budget:g} % of today's images",
    }
    if query.max_teachers is not None:
        lines["max_teachers"] = str(query.max_teachers)
    if query.exclude_teachers:
        lines["exclude_teachers"] = f"[{', '.join(_word(s) for s in query.exclude_teachers)}]"
    write_text(path, "".join(f"{key}: {value}\n" for key, value in lines.items()))
    return path


def _word(text: str) -> str:
    """A scalar within a list in YAML's flow style."""
    return yaml.safe_dump([text], default_flow_style=True, width=10_000, allow_unicode=True).strip()[1:-1]


def tell_pipeline(root: Path, hospital: str, name: str, teachers: Sequence[str] = ()) -> bool:
    """Add a query to ``queries`` in ``params.yaml``, so that ``dvc repro`` knows it; False if it does.

    One line is added and everything else, comments too, stays as it is.

    Args:
        teachers: sites whose teachers the query uses.

    Raises:
        ConfigError: the file is not laid out so that a line can be added, or ``dvc repro`` could not use a
            teacher: its site is not in the file, or neither its bundle nor its hospital is here.
    """
    path = root / "params.yaml"
    with lock(Workspace(root).scratch / "params.lock"):  # two workers may have answered at the same moment
        params = load_params(root)
        ref = QueryRef(hospital=hospital, query=name)
        if ref in params.queries.values():
            return False
        if absent := [site for site in teachers if not _available(root, params, site)]:
            raise ConfigError(
                f"no teacher of {', '.join(absent)} is in this workspace",
                remedy=f"'qkt query run {hospital} {name}' tells the pipeline where there is.",
                code="no-teachers",
            )
        key = f"{hospital}-{name}"[:63]
        number = 2
        while key in params.queries:  # 'a-b' asks 'c', and 'a' asks 'b-c'
            key, number = f"{hospital}-{name}"[:60] + f"-{number}", number + 1
        text = path.read_text(encoding="utf-8")
        changed = _with_line(text, f"  {_word(key)}: {{hospital: {_word(hospital)}, query: {_word(name)}}}\n")
        wanted = params.model_copy(update={"queries": {**params.queries, key: ref}})
        with passing_file(path) as temporary:
            temporary.write_text(changed, encoding="utf-8")
            if parse(Params, read_yaml(temporary), file=path) != wanted:
                raise ConfigError(
                    "a query cannot be added by itself to a file laid out so",
                    remedy=f"Add '{key}: {{hospital: {hospital}, query: {name}}}' under queries.",
                    file=path,
                )
    return True


def _available(root: Path, params: Params, site: str) -> bool:
    """Whether the stage ``plan`` finds a site's teacher, or the pipeline makes it."""
    bundle, hospital = Workspace(root).teacher(site) / CARD, root / "hospitals" / site / "site.yaml"
    return site in params.sites and (bundle.is_file() or hospital.is_file())


def _with_line(text: str, line: str) -> str:
    """``text`` with a line after the last entry of the block ``queries:``."""
    empty = re.search(r"^queries:[ \t]*\{[ \t]*\}", text, re.MULTILINE)
    if empty:
        return f"{text[: empty.start()]}queries:\n{line.rstrip()}{text[empty.end() :]}"
    block = re.search(r"^queries:[ \t]*(?:#.*)?\n(?:(?:[ \t]+.*)?\n)*?(?=^\S|\Z)", text, re.MULTILINE)
    if block is None:
        return text
    body = block.group().rstrip("\n") + "\n"
    return text[: block.start()] + body + line + text[block.start() + len(body) :]

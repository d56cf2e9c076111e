"""``qkt registry``: review what was learned, and say which version is in use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qkt_clinical.cli.options import EPILOG, HERE, Json, Root, group, print_json, say

registry_app = group(
    no_args_is_help=True,
    help="Models registered in MLflow: which is in use, and who decided so.",
)

ModelName = Annotated[str, typer.Argument(help="teacher.<site> or student.<site>.<query>.")]

WhichVersion = Annotated[str, typer.Argument(help="A number or an alias: candidate, champion.")]


@registry_app.command("list", epilog=EPILOG)
def registry_list(root: Root = HERE, as_json: Json = False) -> None:
    """Name all models with their versions, aliases and what the gate said."""
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.tracking.registry import open_registry

    with open_registry(root, load_params(root)) as registry:
        models = registry.models()
    if as_json:
        print_json(models)
        return
    for model in models:
        aliases = ", ".join(f"{alias} {number}" for alias, number in model["aliases"].items())
        judged = ", ".join(f"{n} {g}" for n, g in zip(model["versions"], model["gate"], strict=True) if g)
        say(f"{model['name']}: {aliases or 'no alias'}{f'; gate: {judged}' if judged else ''}")


@registry_app.command("show", epilog=EPILOG)
def registry_show(
    model: ModelName, version: WhichVersion = "candidate", root: Root = HERE, as_json: Json = False
) -> None:
    """Show a version: description, tags, and every decision about its model."""
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.tracking.registry import open_registry

    with open_registry(root, load_params(root)) as registry:
        found = registry.show(model, version)
    if as_json:
        print_json(found)
        return
    say(f"{found['name']} version {found['version']} ({', '.join(found['aliases']) or 'no alias'})")
    for line in (found["description"] or "").splitlines():
        say(line)
    for tag, value in found["tags"].items():
        say(f"  {tag}: {value}")
    for d in found["decisions"]:
        say(f"{d['decision']} by {d['by']}: {d['reason'] or 'no reason given'}")


@registry_app.command("diff", epilog=EPILOG)
def registry_diff(
    model: ModelName,
    first: WhichVersion = "champion",
    second: WhichVersion = "candidate",
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Say in which tags two versions of a model differ."""
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.tracking.registry import open_registry

    with open_registry(root, load_params(root)) as registry:
        found = registry.diff(model, first, second)
    if as_json:
        print_json(found)
    else:
        for tag, (one, two) in found.items():
            say(f"{tag}: {one} | {two}")
        say(f"{len(found)} differences between {first} and {second}")


@registry_app.command("fetch", epilog=EPILOG)
def registry_fetch(
    model: ModelName,
    version: WhichVersion,
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Write a version's files to a folder after every check, to serve it from there."""
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.tracking.registry import open_registry

    with open_registry(root, load_params(root)) as registry:
        digest = registry.fetch(model, version, folder)
    if as_json:
        print_json({"model": model, "folder": str(folder), "digest": digest})
    else:
        say(f"{folder}: {model}, digest {digest}")


@registry_app.command("promote", epilog=EPILOG)
def registry_promote(
    model: ModelName,
    version: WhichVersion = "candidate",
    reviewer: Annotated[str | None, typer.Option(help="Who overrides what speaks against it.")] = None,
    reason: Annotated[str | None, typer.Option(help="Why; it is kept.")] = None,
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Put a version into use (alias champion); exit code 1 if the gate speaks against it."""
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.tracking.registry import open_registry

    with open_registry(root, load_params(root)) as registry:
        decision = registry.promote(model, version, by=reviewer, reason=reason)
    _say_decision(decision.model_dump(mode="json"), as_json)


@registry_app.command("rollback", epilog=EPILOG)
def registry_rollback(
    model: ModelName,
    reviewer: Annotated[str, typer.Option(help="Who takes it back.")],
    reason: Annotated[str, typer.Option(help="Why; it is kept.")],
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Take the version in use back: the champion before it is the champion again."""
    from qkt_clinical.config.loading import load_params
    from qkt_clinical.tracking.registry import open_registry

    with open_registry(root, load_params(root)) as registry:
        decision = registry.rollback(model, by=reviewer, reason=reason)
    _say_decision(decision.model_dump(mode="json"), as_json)


def _say_decision(decision: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(decision)
        return
    say(f"{decision['model']}: {decision['decision']} by {decision['by']}; now in use: {decision['digest']}")
    for objection in decision["overridden"]:
        say(f"  overridden: {objection}")

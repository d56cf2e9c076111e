"""Read configuration files: bounded, as plain data, with errors that name key and remedy."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from qkt_clinical.config.params import Params
from qkt_clinical.config.policy import POLICY, Policy
from qkt_clinical.config.query import QueryConfig
from qkt_clinical.config.site import SiteConfig
from qkt_clinical.config.workspace import query_file, site_folder
from qkt_clinical.errors import ConfigError, PolicyError

MAX_CONFIG_BYTES = 1_000_000

# --- loading --------------------------------------------------------------------------------------

Model = TypeVar("Model", bound=BaseModel)


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Keys that the nested model at ``location`` (without its last part) accepts."""
    current: Any = model
    for part in location[:-1]:
        fields = getattr(current, "model_fields", {})
        name = next((n for n, f in fields.items() if part in (n, f.alias)), None)
        if name is None:
            return []
        current = fields[name].annotation
    return [f.alias or n for n, f in getattr(current, "model_fields", {}).items()]


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(str(p) for p in item["loc"]) or "the file"
        if item["type"] == "extra_forbidden":
            key = str(item["loc"][-1])
            near = difflib.get_close_matches(key, _known_keys(model, item["loc"]), n=1)
            lines.append(f"unknown key {where}" + (f", did you mean {near[0]!r}?" if near else ""))
        else:
            lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')}")
    return "; ".join(lines)


def parse(model: type[Model], data: Any, *, file: Path | str, site: str | None = None) -> Model:
    """Validate ``data`` as ``model``.

    Raises:
        ConfigError: naming every wrong key, with the nearest known key for a misspelt one.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(
            _explain(model, error), remedy="Correct the file and run again.", file=file, site=site
        ) from None


class _PlainLoader(yaml.SafeLoader):
    """The safe loader without aliases: a few hundred bytes of nested merges would fill the memory."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed here")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Any:
    """Read a small YAML file with the safe loader, without aliases.

    Raises:
        ConfigError: absent, too large, not UTF-8 or not YAML.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(
                f"larger than {MAX_CONFIG_BYTES} bytes",
                remedy="Check that this is the right file.",
                file=path,
            )
        loader = _PlainLoader(path.read_text(encoding="utf-8"))
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except OSError as error:
        raise ConfigError(
            f"cannot be read: {error.strerror}", remedy="Check the path and its permissions.", file=path
        ) from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        # ValueError: not UTF-8, a date that does not exist, an integer of thousands of digits.
        first = str(error).splitlines()[0]
        raise ConfigError(f"not valid YAML: {first}", remedy="Correct the file.", file=path) from None


def load_params(root: Path) -> Params:
    """Read ``<root>/params.yaml``."""
    path = root / "params.yaml"
    return parse(Params, read_yaml(path), file=path)


def load_site(root: Path, site: str) -> SiteConfig:
    """Read ``<root>/hospitals/<site>/site.yaml``; its name must be the folder's."""
    path = site_folder(root, site) / "site.yaml"
    config = parse(SiteConfig, read_yaml(path), file=path, site=site)
    if config.name != site:
        raise ConfigError(
            f"name is {config.name!r} in folder {site!r}", remedy="Give both one name.", file=path, site=site
        )
    return config


def load_policy(root: Path, site: str) -> Policy:
    """Read ``<root>/hospitals/<site>/policy.yaml``.

    Raises:
        PolicyError: absent or not a policy; nothing may be sent then.
    """
    try:
        path = site_folder(root, site) / POLICY
        return parse(Policy, read_yaml(path), file=path, site=site)
    except ConfigError as error:
        raise PolicyError(
            f"no valid policy, so nothing is sent: {error.message}",
            remedy=f"Correct hospitals/{site}/{POLICY}; docs/federation.md shows one.",
            file=error.where.file,
            site=site,
        ) from None


def load_query(root: Path, site: str, query: str) -> QueryConfig:
    """Read :func:`query_file`."""
    path = query_file(root, site, query)
    return parse(QueryConfig, read_yaml(path), file=path, site=site)

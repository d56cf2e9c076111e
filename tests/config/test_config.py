from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from qkt_clinical.catalog import BLOOD_CELLS, SPLITS
from qkt_clinical.config.loading import MAX_CONFIG_BYTES, load_params, load_query, load_site, parse, read_yaml
from qkt_clinical.config.params import Params, SplitFractions
from qkt_clinical.config.query import QueryConfig
from qkt_clinical.config.site import Column, ImageSpec, SiteConfig, Source
from qkt_clinical.config.workspace import Workspace, site_folder
from qkt_clinical.errors import ConfigError

SITE = """
name: aster
source: {kind: images}
label: {from: folder}
patient: {from: none}
image: {size: [32, 32]}
"""


def params(**changes: Any) -> Params:
    data = {"classes": ["a", "b"], "sites": ["aster"], "queries": {}, **changes}
    return parse(Params, data, file="params.yaml")


def hospital(root: Path, text: str = SITE, name: str = "aster") -> Path:
    folder = root / "hospitals" / name
    (folder / "queries").mkdir(parents=True)
    (folder / "site.yaml").write_text(text, encoding="utf-8")
    return folder


# --- what is committed ----------------------------------------------------------------------------


def test_committed_params_and_hospitals_load(repository: Path) -> None:
    committed = load_params(repository)
    assert committed.classes == BLOOD_CELLS
    for site in committed.sites:
        assert load_site(repository, site).name == site
    for ref in committed.queries.values():
        query = load_query(repository, ref.hospital, ref.query)
        assert set(query.classes) <= set(committed.classes)
    listed = {(r.hospital, r.query) for r in committed.queries.values()}
    files = {(f.parent.parent.name, f.stem) for f in repository.glob("hospitals/*/queries/*.yaml")}
    assert listed == files


def test_committed_presets_are_params(repository: Path) -> None:
    presets = sorted((repository / "qkt_clinical" / "datasets" / "presets").glob("*.yaml"))
    assert "pbc28" in [file.stem for file in presets]
    for file in presets:
        assert isinstance(read_yaml(file), dict)


def test_committed_params_spell_out_every_key(repository: Path) -> None:
    """A reader of params.yaml sees all there is to change; the file and the defaults cannot drift apart."""
    written = read_yaml(repository / "params.yaml")
    whole = load_params(repository).model_dump(mode="json")
    assert set(written) == set(whole)
    for name, section in written.items():
        if isinstance(whole[name], dict):
            assert set(section) == set(whole[name])


# --- wrong keys and values ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"traim": {}}, ["unknown key traim", "did you mean 'train'"]),
        ({"train": {"epoch": 3}}, ["unknown key train.epoch", "did you mean 'epochs'"]),
        ({"ingest": {"splits": {"trian": 0.5}}}, ["unknown key ingest.splits.trian", "'train'"]),
        ({"xyzzy": 1}, ["unknown key xyzzy"]),
        ({"sites": ["aster", "aster"]}, ["sites", "aster", "twice"]),
        ({"classes": ["a", "a", "b"]}, ["classes", "twice"]),
        ({"classes": ["a"]}, ["classes"]),
        ({"sites": []}, ["sites"]),
        ({"sites": ["../etc"]}, ["sites.0"]),
        ({"sites": ["Aster"]}, ["sites.0"]),
        ({"sites": ["a" * 64]}, ["sites.0"]),
        ({"queries": {"q": {"hospital": "birch", "query": "b"}}}, ["'birch'", "not among sites"]),
        ({"queries": {"q": {"hospital": "aster", "query": "../b"}}}, ["queries.q.query"]),
        ({"train": {"learning_rate": float("nan")}}, ["train.learning_rate"]),
        ({"train": {"learning_rate": float("inf")}}, ["train.learning_rate", "finite"]),
        ({"train": {"network": "resnet50"}}, ["train.network", "resnet-small"]),
        ({"train": {"batch_size": 1}}, ["train.batch_size"]),
        ({"mask": {"threshold": 0}}, ["mask.threshold"]),
        ({"transfer": {"surprise": 0.4}}, ["unknown key transfer.surprise"]),
        ({"transfer": {"phase1": "transplant"}}, ["transfer.phase1"]),
        ({"transfer": {"distillation": {"epochs": 3}}}, ["transfer.distillation"]),
        ({"transfer": {"trust": False}}, ["transfer.trust"]),
        ({"mask": {"estimator": "combined"}}, ["mask.estimator"]),
        ({"transfer": {"rank": 0}}, ["transfer.rank"]),
        ({"transfer": {"light_rank": 1.1}}, ["transfer.light_rank"]),
        ({"transfer": {"images": 0}}, ["transfer.images"]),
        ({"evaluate": {"confidence": 1.0}}, ["evaluate.confidence"]),
        ({"device": "tpu"}, ["device", "cuda"]),
        ({"seed": -1}, ["seed"]),
    ],
)
def test_wrong_params_are_refused_by_name(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        params(**changes)
    for word in words:
        assert word in caught.value.message


def test_no_suggestion_where_nothing_is_near() -> None:
    with pytest.raises(ConfigError) as caught:
        params(xyzzy=1)
    assert "did you mean" not in caught.value.message


def test_every_wrong_key_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        params(seed=-1, traim={}, device="tpu")
    assert all(word in caught.value.message for word in ("seed", "traim", "device"))


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_params_that_are_no_mapping(data: Any) -> None:
    with pytest.raises(ConfigError, match="the file"):
        parse(Params, data, file="params.yaml")


def test_params_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        params().seed = 3  # type: ignore[misc]


def test_shares_of_splits_sum_to_one() -> None:
    assert sum(SplitFractions().of(s) for s in SPLITS) == pytest.approx(1.0)  # type: ignore[arg-type]
    assert SplitFractions(train=0.7, calibration=0.1, val=0.1, test=0.1).of("train") == 0.7
    with pytest.raises(ConfigError, match=r"sum to 1\.1, not 1"):
        params(ingest={"splits": {"train": 0.65, "calibration": 0.15, "val": 0.1, "test": 0.2}})
    with pytest.raises(ConfigError, match=r"ingest\.splits\.train"):
        params(ingest={"splits": {"train": -0.1, "calibration": 0.8, "val": 0.1, "test": 0.2}})


# --- site.yaml ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["data", "data/a/b", "data/images.npz"])
def test_sources_below_data(path: str) -> None:
    assert Source(kind="images", path=path).path == path


@pytest.mark.parametrize("path", ["", ".", "/etc", "..", "data/../..", "data/../../x", "other", "/data"])
def test_sources_outside_data_are_refused(path: str) -> None:
    with pytest.raises(ValidationError, match="must be 'data' or below it"):
        Source(kind="images", path=path)


@pytest.mark.parametrize(
    ("data", "missing"),
    [
        ({"from": "csv", "file": "l.csv", "column": "c"}, "needs file, column and key"),
        ({"from": "csv", "key": "k", "column": "c"}, "needs file, column and key"),
        ({"from": "tag"}, "needs tag"),
    ],
)
def test_columns_must_be_complete(data: dict[str, Any], missing: str) -> None:
    with pytest.raises(ValidationError, match=missing):
        Column.model_validate(data)


@pytest.mark.parametrize(
    "data",
    [
        {"size": [32]},
        {"size": [2, 2, 2, 2]},
        {"size": [3, 32]},
        {"size": [32, 4096]},
        {"size": [32, 32], "spacing_mm": [1.0]},
        {"size": [32, 32], "spacing_mm": [1.0, 0.0]},
        {"size": [32, 32], "channels": 2},
        {"size": [32, 32], "window": {"center": 40, "width": 0}},
        {"size": [32, 32], "window": {"center": float("nan"), "width": 80}},
    ],
)
def test_wrong_image_wishes(data: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ImageSpec.model_validate(data)


def test_label_map_takes_numbers_as_words() -> None:
    site = SiteConfig.model_validate(yaml.safe_load(SITE) | {"label_map": {0: "a", "x": "b"}})
    assert site.label_map == {"0": "a", "x": "b"}


def test_site_is_loaded_by_its_folder(tmp_path: Path) -> None:
    hospital(tmp_path)
    assert load_site(tmp_path, "aster").source.kind == "images"
    hospital(tmp_path, SITE, "birch")
    with pytest.raises(ConfigError, match="name is 'aster' in folder 'birch'") as caught:
        load_site(tmp_path, "birch")
    assert caught.value.where.site == "birch"


def test_unknown_site_gets_a_suggestion(tmp_path: Path) -> None:
    hospital(tmp_path)
    with pytest.raises(ConfigError, match="no hospital 'astor'") as caught:
        site_folder(tmp_path, "astor")
    assert caught.value.remedy == "Did you mean 'aster'? Known sites: aster."
    with pytest.raises(ConfigError) as caught:
        site_folder(tmp_path, "zz")
    assert caught.value.remedy == "Known sites: aster."


@pytest.mark.parametrize("name", ["", "..", "a/b", "Aster", "-x", "aster\n", "a" * 64, "ä"])
def test_names_that_could_leave_the_folder(tmp_path: Path, name: str) -> None:
    hospital(tmp_path)
    with pytest.raises(ConfigError, match="is no site name"):
        load_site(tmp_path, name)
    with pytest.raises(ConfigError, match="is no query name"):
        load_query(tmp_path, "aster", name)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("classes: []", "classes"),
        ("classes: [a]\nmethod: best", "method"),
        ("classes: [a]\nbudget: 0", "budget"),
        ("classes: [a]\nbudget: 0.51", "budget"),
        ("classes: [a]\nbudget: .nan", "budget"),
        ("classes: [a]\nmax_teachers: 0", "max_teachers"),
        ("classes: [a]\nexclude_teachers: ['../x']", "exclude_teachers"),
        ("classes: [a]\nbugdet: 0.1", "did you mean 'budget'"),
        ("classes: a", "classes"),
    ],
)
def test_wrong_queries(tmp_path: Path, text: str, word: str) -> None:
    folder = hospital(tmp_path)
    (folder / "queries" / "q.yaml").write_text(text)
    with pytest.raises(ConfigError, match=word) as caught:
        load_query(tmp_path, "aster", "q")
    assert caught.value.where.file == str(folder / "queries" / "q.yaml")


def test_query_defaults() -> None:
    query = QueryConfig(classes=("a",))
    assert (query.method, query.budget, query.max_teachers, query.exclude_teachers) == ("qkt", 0.03, None, ())


# --- YAML -----------------------------------------------------------------------------------------

BOMB = "a0: &a0 {k: v}\n" + "".join(
    f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    "content",
    [
        b"a: [1",
        b"\xff\xfe\xfa",
        b"a: \x00",
        b"- a\nb: c",
        b"a: !!python/object/apply:os.system ['true']",
        b"a: !!python/name:os.system",
        b"[" * 20_000,
        b"{" * 20_000,
        b"a: 2024-13-45",
        b"a: " + b"1" * 6_000,
        b"a: 0b_",
        b"? {x: [1]}\n: 2",
        b"a: 1\n---\nb: 2",
        BOMB.encode(),
        LAUGHS.encode(),
    ],
    ids=[
        "cut",
        "not-utf8",
        "nul",
        "mixed",
        "call",
        "name",
        "deep-list",
        "deep-map",
        "no-date",
        "long-number",
        "no-number",
        "map-as-key",
        "two-documents",
        "merge-bomb",
        "alias-bomb",
    ],
)
def test_text_that_is_no_plain_yaml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not valid YAML") as caught:
        load_params(tmp_path)
    assert caught.value.where.file == str(path)


def test_oversize_and_absent_files(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    with pytest.raises(ConfigError, match="cannot be read"):
        load_params(tmp_path)
    path.write_bytes(b"#" * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than"):
        load_params(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_params(tmp_path)


def test_workspace_keeps_scratch_apart_from_outputs(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    outputs = [
        space.prepared("a"),
        space.teacher("a"),
        space.fetched("a", "q"),
        space.student("a", "q"),
        space.reports,
    ]
    assert len({*outputs, space.scratch}) == 6
    assert not any(o.is_relative_to(space.scratch) or space.scratch.is_relative_to(o) for o in outputs)

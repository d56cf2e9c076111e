"""Versions that somebody else put into the registry: nothing of them runs, and none is put into use."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from qkt_clinical.common.files import digest_folder
from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.errors import BundleError, InputError, QktError
from qkt_clinical.records.card import CARD, MASK, WEIGHTS
from qkt_clinical.records.decisions import CHAMPION, RegistryError, decisions_file, keep_decision
from qkt_clinical.records.registered import MLMODEL, UnsoundVersion
from qkt_clinical.serving import _load_pyfunc
from qkt_clinical.stages.gate import gate_queries
from qkt_clinical.tracking.client import find_version
from qkt_clinical.tracking.mirror import track
from qkt_clinical.tracking.registry import Registry, open_registry
from qkt_clinical.tracking.runs import DIGEST
from qkt_clinical.tracking.teachers import (
    Registered,
    check_teacher_version,
    fetch_file,
    registered_teachers,
)
from tests.sample_run import SHAPE, sample_params, write_sample_run
from tests.tracking.test_registry import LENIENT, decided

pytestmark = pytest.mark.slow

NAME, DATA = "student.h0.q0", "data/q0"


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Params]:
    """A workspace whose first versions are sound; forged ones are added, and none is ever in use."""
    root = tmp_path_factory.mktemp("forged")
    params = sample_params(sites=2, gate=LENIENT)
    write_sample_run(root, params, weights=True)
    (root / "params.yaml").write_text(params.model_dump_json())
    track(root, params)
    return root, params


@pytest.fixture(scope="module")
def opened(space: tuple[Path, Params]) -> Iterator[Registry]:
    with open_registry(*space) as registry:
        yield registry


@pytest.fixture
def registry(opened: Registry) -> Iterator[Registry]:
    """The registry, which has its sound versions alone again afterwards."""
    yield opened
    for version in opened.client.search_model_versions():
        if int(version.version) > 1:
            opened.client.delete_model_version(version.name, str(version.version))


def files_of(registry: Registry, name: str, number: str = "1") -> Path:
    return Path(registry.client.get_model_version_download_uri(name, number).removeprefix("file://"))


def register(registry: Registry, name: str, folder: Path | str, tags: dict[str, str] | None = None) -> str:
    """A version as anybody with access to the registry can make one, with the tags of the sound one."""
    source = folder if isinstance(folder, str) else folder.as_uri()
    own = registry.client.get_model_version(name, "1").tags if tags is None else tags
    return str(registry.client.create_model_version(name, source, tags=dict(own)).version)


def forge(registry: Registry, target: Path, change: Callable[[Path], None], name: str = NAME) -> str:
    """A copy of the sound version, changed, with all of its tags."""
    shutil.copytree(files_of(registry, name), target)
    change(target)
    return register(registry, name, target)


# --- what is changed ------------------------------------------------------------------------------


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    described = yaml.safe_load((folder / MLMODEL).read_text())
    change(described)
    (folder / MLMODEL).write_text(yaml.safe_dump(described))


def flavor(**changed: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda m: m["flavors"]["python_function"].update(changed))


def top(**changed: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda m: m.update(changed))


def runs(folder: Path) -> str:
    """Code that leaves a trace where it ran."""
    return f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()\n"


def a_loader_of_its_own(folder: Path) -> None:
    (folder / "code").mkdir()
    (folder / "code" / "evil_loader.py").write_text(
        runs(folder) + "def _load_pyfunc(path):\n    raise SystemExit('ran')\n"
    )
    flavor(loader_module="evil_loader", code="code")(folder)


def our_loader_shadowed(folder: Path) -> None:
    package = folder / "code" / "qkt_clinical"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(runs(folder))
    (package / "serving.py").write_text(runs(folder))
    flavor(code="code")(folder)


def a_pickle(folder: Path) -> None:
    # As pickle writes os.system("touch ran"), spelt out: nothing here may import the module.
    (folder / "python_model.pkl").write_bytes(
        b"\x80\x04cos\nsystem\n(S'touch " + str(folder / "ran").encode() + b"'\ntR."
    )
    flavor(loader_module="mlflow.pyfunc.model", python_model="python_model.pkl", cloudpickle_version="3.0")(
        folder
    )


def a_file_more(name: str) -> Callable[[Path], None]:
    def add(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(runs(folder))

    return add


def line(name: str, text: str) -> Callable[[Path], None]:
    def add(folder: Path) -> None:
        with (folder / name).open("a") as stream:
            stream.write(f"\n{text}\n")

    return add


def described(text: str) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        (folder / MLMODEL).write_text(text)

    return put


def a_link(name: str) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        (folder / name).rename(folder.with_name(f"{folder.name}-moved"))
        (folder / name).symlink_to(folder.with_name(f"{folder.name}-moved"))

    return put


def a_pipe(folder: Path) -> None:
    os.mkfifo(folder / DATA / MASK)


def endless(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, 1 << 42)


def gone(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def another_bit(name: str) -> Callable[[Path], None]:
    def flip(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-2] ^= 1
        (folder / name).write_bytes(data)

    return flip


def other_weights_that_fit(folder: Path) -> None:
    another_bit(f"{DATA}/{WEIGHTS}")(folder)
    card = json.loads((folder / DATA / CARD).read_text())
    from qkt_clinical.common.files import digest_file

    card["weights"]["sha256"] = digest_file(folder / DATA / WEIGHTS)
    (folder / DATA / CARD).write_text(json.dumps(card))


def card_of_another(folder: Path) -> None:
    edit(folder, lambda m: m["metadata"]["model_card"].update(name="student.h1.q1"))


def data_moved(folder: Path) -> None:
    (folder / DATA).rename(folder / "data" / "q1")
    flavor(data="data/q1")(folder)


def two_flavors(folder: Path) -> None:
    edit(folder, lambda m: m["flavors"].update(sklearn={"pickled_model": "model.pkl"}))


EVIL = "evil @ https://127.0.0.1:9/evil-1.0.tar.gz"
FORGED: dict[str, Callable[[Path], None]] = {
    "a loader of its own": a_loader_of_its_own,
    "our loader shadowed": our_loader_shadowed,
    "a pickle": a_pickle,
    "a pickle nobody names": a_file_more("python_model.pkl"),
    "code nobody names": a_file_more("code/evil.py"),
    "code in the bundle": a_file_more(f"{DATA}/evil.py"),
    "a package in the bundle": a_file_more(f"{DATA}/experts/h1/evil.py"),
    "another module of ours": flavor(loader_module="qkt_clinical.stages.train"),
    "no loader": flavor(loader_module=None),
    "code elsewhere": flavor(code="../../elsewhere"),
    "data elsewhere": flavor(data="../../elsewhere"),
    "data by an absolute path": flavor(data="/etc"),
    "data of another": data_moved,
    "settings for the loader": flavor(model_config={"a": 1}),
    "an environment elsewhere": flavor(env={"conda": "../conda.yaml", "virtualenv": "python_env.yaml"}),
    "another flavour": two_flavors,
    "resources": top(resources={"databricks": {}}),
    "an example elsewhere": top(
        saved_input_example_info={"type": "ndarray", "artifact_path": "../../secret.json"}
    ),
    "variables": top(env_vars=["AWS_SECRET_ACCESS_KEY"]),
    "external": top(metadata={"mlflow.model.is_external": True}),
    "the card of another": card_of_another,
    "a description that is none": described("[" * 5000),
    "tags of Python": described("!!python/object/apply:os.system ['true']"),
    "maps that grow": described(
        "a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(60))
    ),
    "a list without end": described("- a\n" * 240_000),
    "an index of its own": line("requirements.txt", "--index-url http://127.0.0.1:9/"),
    "a package of its own": line("requirements.txt", EVIL),
    "a package by name": line("requirements.txt", "evil==1.0"),
    "a package by conda": line("conda.yaml", "# x\nchannels: [evil]"),
    "a package by Python": line("python_env.yaml", f"build_dependencies: ['{EVIL}']"),
    "a link": a_link(f"{DATA}/{WEIGHTS}"),
    "a link to a folder": a_link(DATA),
    "a pipe": a_pipe,
    "endless weights": endless(f"{DATA}/{WEIGHTS}"),
    "an endless card": endless(f"{DATA}/{CARD}"),
    "an endless description": endless(MLMODEL),
    "no weights": gone(f"{DATA}/{WEIGHTS}"),
    "no description": gone(MLMODEL),
    "other weights": another_bit(f"{DATA}/{WEIGHTS}"),
    "other weights that fit": other_weights_that_fit,
    "another plan": another_bit(f"{DATA}/plan.json"),
    "a part less": gone(f"{DATA}/plan.json"),
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_a_forged_version_is_neither_promoted_nor_fetched_nor_run(
    registry: Registry, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    folder = tmp_path / "forged"
    number = forge(registry, folder, change)
    for attempt in (
        lambda: registry.promote(NAME, number),
        lambda: registry.promote(NAME, number, by="R. Viewer", reason="it looked sound"),
        lambda: registry.fetch(NAME, number, tmp_path / "fetched"),
    ):
        with pytest.raises(UnsoundVersion) as caught:
            attempt()
        assert isinstance(caught.value, RegistryError | BundleError)
        assert f"version {number} of {NAME}" in str(caught.value)
        assert caught.value.where.site == "h0"
    digest = registry.version(NAME, "1").tags[DIGEST]
    assert find_version(registry.client, NAME, digest) == "1", "a newer one has the tag"
    assert CHAMPION not in registry.client.get_registered_model(NAME).aliases
    assert not decisions_file(registry.root, "h0").exists()
    assert [p.name for p in tmp_path.rglob("ran")] == []
    assert not (tmp_path / "fetched").exists()


def test_mlflow_itself_runs_what_is_refused_here(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.pyfunc

    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "forged"
    number = forge(registry, folder, a_loader_of_its_own)
    with pytest.raises(SystemExit):
        mlflow.pyfunc.load_model(f"models:/{NAME}/{number}")
    assert (folder / "ran").exists()


def test_a_sound_version_is_fetched_and_answers_from_there(registry: Registry, tmp_path: Path) -> None:
    import mlflow.pyfunc

    digest = registry.fetch(NAME, "1", tmp_path / "fetched")
    assert digest == digest_folder(Workspace(registry.root).student("h0", "q0"))
    assert digest_folder(tmp_path / "fetched") == digest_folder(files_of(registry, NAME))
    assert mlflow.pyfunc.load_model(str(tmp_path / "fetched")).loader_module == "qkt_clinical.serving"
    with pytest.raises(QktError) as caught:
        registry.fetch(NAME, "1", tmp_path / "fetched")
    assert caught.value.code == "folder-exists"


def test_a_forged_version_with_a_digest_of_its_own_was_not_judged(registry: Registry, tmp_path: Path) -> None:
    """Its tags say what they like: passed, and even the digest is that of its files."""
    folder = tmp_path / "forged"
    shutil.copytree(files_of(registry, NAME), folder)
    other_weights_that_fit(folder)
    edit(folder, lambda m: m.update(metadata=None))
    digest = digest_folder(folder / DATA)
    own = registry.client.get_model_version(NAME, "1").tags
    verdict = json.dumps(json.loads(own["qkt.verdict"]) | {"digest": digest})
    number = register(registry, NAME, folder, {**own, DIGEST: digest, "qkt.verdict": verdict})
    registry.client.set_registered_model_alias(NAME, "candidate", number)
    try:
        with pytest.raises(RegistryError, match="not judged by the gate") as caught:
            registry.promote(NAME, "candidate")
        assert caught.value.code == "gate-not-passed"
    finally:
        registry.client.set_registered_model_alias(NAME, "candidate", "1")


@pytest.mark.parametrize(
    "source",
    [
        "http://127.0.0.1:9/api/2.0/mlflow-artifacts/artifacts/x",
        "mlflow-artifacts://127.0.0.1:9/x",
        "ftp://127.0.0.1:9/x",
        "sftp://127.0.0.1:9/x",
        "dbfs:/x",
        "file://127.0.0.1/x",
        "file:///nowhere/at/all",
        "file:///etc",
        "models:/student.h0.q0/1/../2",
    ],
)
def test_files_are_fetched_from_no_address_of_a_versions_own(registry: Registry, source: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        number = register(registry, NAME, source)
    except MlflowException:
        return  # MLflow's own check was first
    with pytest.raises(QktError) as caught:
        registry.promote(NAME, number, by="R. Viewer", reason="it looked sound")
    assert caught.value.code in ("version-files", "bundle-missing", "mlflow")


def test_a_champion_is_restored_and_taken_back_to_by_its_files(tmp_path: Path) -> None:
    params = sample_params(sites=2, gate=LENIENT)
    write_sample_run(tmp_path, params, weights=True)
    first = track(tmp_path, params)["models"][NAME]
    with open_registry(tmp_path, params) as registry:
        registry.promote(NAME, "1")
        forged = forge(registry, tmp_path / "forged", a_loader_of_its_own)
        for alias in ("champion", "candidate"):
            registry.client.set_registered_model_alias(NAME, alias, forged)
        with pytest.raises(UnsoundVersion):
            registry.fetch(NAME, "champion", tmp_path / "fetched")
    assert track(tmp_path, params)["models"][NAME] == first
    with open_registry(tmp_path, params) as registry:
        assert registry.show(NAME, "champion")["version"] == registry.show(NAME, "candidate")["version"] == 1
        # A second champion is decided on; back to the first, of which only the forged version is left.
        keep_decision(tmp_path, decided("0" * 64))
        shutil.rmtree(files_of(registry, NAME))
        with pytest.raises(RegistryError) as caught:
            registry.rollback(NAME, by="R. Viewer", reason="it was not")
        assert caught.value.code == "no-earlier-champion"
    assert not list(tmp_path.rglob("ran"))


# --- teachers -------------------------------------------------------------------------------------


def test_garbage_in_the_registry_is_set_aside_and_told(registry: Registry, tmp_path: Path) -> None:
    client = registry.client
    sound = {t.site: t for t in registered_teachers(client)}
    assert set(sound) == {"h0", "h1"}
    names = [
        "teacher.UPPER",
        "teacher.",
        "teacher.a.b",
        "teacher.x' or '1",
        "teacher.\x1b[2Jx",
        "teacher.left",
    ]
    names += ["teacher.untagged", "teacher.sham"]
    for name in names:
        client.create_registered_model(name)
        number = client.create_model_version(name, (tmp_path / "x").as_uri()).version
        if name != "teacher.left":
            client.set_registered_model_alias(name, "candidate", number)
    client.set_model_version_tag("teacher.sham", "1", DIGEST, "../../x")
    for _ in range(30):
        client.create_model_version("teacher.h1", (tmp_path / "x").as_uri())
    told: dict[str, str] = {}
    try:
        found = registered_teachers(client, set_aside=told.__setitem__)
        assert {t.site: t for t in found} == sound
        assert set(told) == set(names)
        assert {m["name"] for m in registry.models()} >= set(names)
        with pytest.raises(UnsoundVersion):
            fetch_file(Registered("h1", "2", sound["h1"].digest), CARD, tmp_path / CARD, 10_000)
    finally:
        for name in names:
            client.delete_registered_model(name)


def test_what_a_registry_says_is_no_escape_sequence_on_the_terminal(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    from qkt_clinical.cli import main

    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202ereversed\r"
    client, name = registry.client, "student.h1.q1"
    number = register(registry, name, files_of(registry, name))
    client.update_model_version(name, number, f"first line\nsecond {evil}")
    client.set_model_version_tag(name, number, "qkt.gate", evil)
    client.create_registered_model(f"other{evil}")
    try:
        for words in (["list"], ["show", name, number], ["diff", name, "1", number]):
            with pytest.raises(SystemExit) as ended:
                main(["registry", *words, "--root", str(registry.root)])
            assert not ended.value.code
            out = capsys.readouterr().out
            assert re.findall(r"[^\x20-\x7e\n]", out.replace("·", "").replace("–", "")) == []
            assert "owned" in out
        assert "first line\nsecond" in out or words[0] == "diff"
    finally:
        client.delete_registered_model(f"other{evil}")


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "no.json", "", ".", "x\x00y"])
def test_no_file_is_fetched_that_no_teacher_has(registry: Registry, tmp_path: Path, name: str) -> None:
    (teacher, *_) = registered_teachers(registry.client)
    with pytest.raises(BundleError) as caught:
        fetch_file(teacher, name, tmp_path / "got", 10_000)
    assert caught.value.code == "bundle-missing"
    assert list(tmp_path.iterdir()) == []


def test_a_file_larger_than_allowed_is_not_moved(registry: Registry, tmp_path: Path) -> None:
    (teacher, *_) = registered_teachers(registry.client)
    with pytest.raises(BundleError) as caught:
        fetch_file(teacher, CARD, tmp_path / "got", 10)
    assert caught.value.code == "bundle-size"
    assert list(tmp_path.iterdir()) == []


def test_the_bytes_that_were_fetched_are_the_registered_ones(registry: Registry, tmp_path: Path) -> None:
    (teacher, *_) = registered_teachers(registry.client)
    known = {n: fetch_file(teacher, n, tmp_path / n, 10**8) for n in (CARD, MASK, WEIGHTS)}
    check_teacher_version(teacher, known)
    with pytest.raises(UnsoundVersion) as caught:
        check_teacher_version(teacher, known | {MASK: "0" * 64})
    assert caught.value.code == "version-digest"
    with pytest.raises(UnsoundVersion):
        check_teacher_version(teacher._replace(digest="0" * 64), known)


# --- serving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_a_changed_folder_is_not_served(
    registry: Registry, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    """Where our loader is asked at all."""
    folder = tmp_path / "served"
    shutil.copytree(files_of(registry, NAME), folder)
    change(folder)
    if change in (card_of_another, FORGED["no description"], data_moved):
        return  # a folder that names another model is whole in itself; that it is asked for is the registry's
    with pytest.raises(QktError):
        _load_pyfunc(str(folder / DATA))
    assert not list(tmp_path.rglob("ran"))


GRID = np.zeros((1, *SHAPE)).tolist()
REQUESTS = {
    "dark": ({"inputs": (np.zeros((1, *SHAPE)) - 7).tolist()}, "application/json"),
    "no number": (json.dumps({"inputs": GRID}).replace("0.0", "NaN", 1), "application/json"),
    "infinite": (json.dumps({"inputs": GRID}).replace("0.0", "1e999", 1), "application/json"),
    "another shape": ({"inputs": [[1.0]]}, "application/json"),
    "text": ({"inputs": "x"}, "application/json"),
    "letters": ({"inputs": [["a"]]}, "application/json"),
    "nothing": ({"inputs": [None]}, "application/json"),
    "a table": ({"dataframe_split": {"columns": ["a"], "data": [[1]]}}, "application/json"),
    "cut off": ("{", "application/json"),
    "CSV": ("a,b\n1,2", "text/csv"),
    "no parquet": ("PAR1", "application/vnd.apache.parquet"),
}


@pytest.mark.parametrize(("body", "kind"), REQUESTS.values(), ids=REQUESTS)
def test_a_server_answers_what_it_refuses_without_paths(
    registry: Registry, body: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``mlflow models serve`` does; over HTTP in test_servers.py."""
    import mlflow.pyfunc
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc import scoring_server

    monkeypatch.setattr(scoring_server, "_handle_serving_error", scoring_server._handle_serving_error)
    model = mlflow.pyfunc.load_model(str(files_of(registry, NAME)))
    text = body if isinstance(body, str) else json.dumps(body)
    with pytest.raises(MlflowException) as caught:
        scoring_server.invocations(text.encode(), kind, model, model.metadata.get_input_schema())
    answer = caught.value.serialize_as_json()
    assert caught.value.get_http_status_code() == 400
    assert json.loads(answer)["message"]
    for path in ("Traceback", "site-packages", str(registry.root), str(Path(sys.prefix)), ".py"):
        assert path not in answer
    if isinstance(caught.value, InputError):
        assert json.loads(answer)["code"] == caught.value.code == "input-values"


def test_gate_record_is_what_was_judged(space: tuple[Path, Params]) -> None:
    root, params = space
    (verdict, *_) = gate_queries(root, params)
    assert verdict.digest == digest_folder(Workspace(root).student("h0", "q0"))

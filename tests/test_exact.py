"""The same bytes on every processor: others are stood in for by what can be turned off of this one."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from qkt_clinical.config.site import ImageSpec
from qkt_clinical.ingest.arrays import resample
from tests.ingest_files import noise
from tests.places import ROOT

pytestmark = pytest.mark.slow

PROGRAM = """
import hashlib
import numpy as np
from qkt_clinical.config.site import ImageSpec, Window
from qkt_clinical.datasets.phantom import ct, render_images, smear
from qkt_clinical.ingest.arrays import Picture, prepare
from qkt_clinical.ingest.leakage import hashes_of

def tell(name, *arrays):
    print(name, hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest())

labels = np.arange(16, dtype=np.int64) % 8
tell("density", smear._draw(labels, 32, np.random.default_rng(0)))
tell("blurred", smear._blurred(np.random.default_rng(1).random((4, 3, 16, 16), dtype=np.float32),
                               np.linspace(0.2, 1.4, 4, dtype=np.float32)))
for site in ("dahlia", "elm", "south"):
    tell(site, render_images(site, images=20)[0])
random = np.random.default_rng(2)
pictures = {
    "grey": (Picture(random.integers(0, 256, (41, 37, 3), dtype=np.uint8), colour=True, limits=(0.0, 255.0),
                     eight_bit=True), ImageSpec(size=(24, 24), channels=1)),
    "grey as it is": (Picture(random.integers(0, 256, (24, 24, 3), dtype=np.uint8), colour=True,
                     limits=(0.0, 255.0)), ImageSpec(size=(24, 24), channels=1)),
    "larger and smaller": (Picture(random.integers(0, 4096, (31, 90)).astype(np.uint16)),
                     ImageSpec(size=(64, 24), channels=3, normalisation="zscore")),
    "volume": (Picture(random.normal(0, 500, (21, 23, 19)), spacing_mm=(3.1, 0.9, 1.3)),
               ImageSpec(size=(36, 12, 15), channels=1, spacing_mm=(1.8, 1.7, 1.7),
                         window=Window(center=-100, width=1500))),
}
for name, (picture, spec) in pictures.items():
    made = prepare(picture, spec)
    tell(name, made, np.array(hashes_of(made), dtype=np.uint64))
"""


def others() -> dict[str, dict[str, str]]:
    """Names of stand-ins, and the environment that makes each."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    found = [name for name in __cpu_dispatch__ if __cpu_features__.get(name)]
    widest = {"NPY_DISABLE_CPU_FEATURES": found[-1]} if found else {}
    return {
        "no wide registers in numpy": {"NPY_DISABLE_CPU_FEATURES": " ".join(found)} if found else {},
        "none of the widest": widest,
        "another C library": {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX"},
        "an old processor in OpenBLAS and torch": {
            "OPENBLAS_CORETYPE": "Prescott",
            "ATEN_CPU_CAPABILITY": "default",
            "MKL_CBWR": "COMPATIBLE",
        },
        "several threads": {"OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "4"},
    }


def outcome(environment: dict[str, str]) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def here() -> dict[str, str]:
    return outcome({})


@pytest.mark.parametrize("name", others())
def test_the_bytes_are_the_same_on_another_processor(here: dict[str, str], name: str) -> None:
    assert len(here) == 9
    assert outcome(others()[name]) == here


@pytest.mark.parametrize(("old", "new"), [(1.0, 2.0), (2.0, 2.5), (3.25, 2.5), (1.0, 0.7), (0.5, 2.1)])
def test_what_changes_its_spacing_stays_where_it_is(old: float, new: float) -> None:
    """A ramp stays a ramp about the same centre, and a mirror image stays one."""
    length = 40
    many = round(length * old / new)
    wanted = ImageSpec(size=(many, 8), channels=1, spacing_mm=(new, 1.0))
    millimetres = ((np.arange(length) - (length - 1) / 2) * old).astype(np.float32)
    image = np.broadcast_to(millimetres[None, :, None], (1, length, 8)).copy()
    found = resample(image, (old, 1.0), wanted)
    expected = (np.arange(many) - (many - 1) / 2) * new
    edge = max(2, round(3 * max(1.0, old / new)))  # where the repeated edge is smoothed in
    np.testing.assert_allclose(found[0, edge:-edge, 0], expected[edge:-edge], atol=1e-4)
    random = noise(3, 1, length, 8).astype(np.float32)
    mirrored = resample(random[:, ::-1].copy(), (old, 1.0), wanted)[:, ::-1]
    np.testing.assert_allclose(mirrored, resample(random, (old, 1.0), wanted), atol=1e-4)


def test_growing_is_what_monai_does() -> None:
    import torch
    from monai.data import MetaTensor
    from monai.transforms import Spacing

    image = noise(0, 1, 20, 13).astype(np.float32)
    change = Spacing(
        pixdim=(2.5, 1.0), mode="bilinear", padding_mode="border", scale_extent=True, align_corners=True
    )
    affine = torch.diag(torch.tensor([3.25, 1.0, 1.0], dtype=torch.float64))
    expected = np.asarray(change(MetaTensor(torch.as_tensor(image), affine=affine)))
    wanted = ImageSpec.model_construct(size=expected.shape[1:], spacing_mm=(2.5, 1.0))
    np.testing.assert_allclose(resample(image, (3.25, 1.0), wanted), expected, atol=1e-2)

"""Students and teachers as MLflow models: files without pickle."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from qkt_clinical.records.registered import LOADER, requirements_of
from qkt_clinical.tracking.runs import DIGEST, Model

if TYPE_CHECKING:
    from mlflow import MlflowClient


NEUTRAL = {"mlflow.user": "qkt-clinical", "mlflow.source.name": "qkt track", "mlflow.source.type": "LOCAL"}
"""In place of the names of a user and a script, which say nothing about a result."""

MAX_EXAMPLE = 200_000
"""Input examples are JSON; one with more numbers would outweigh the network."""


def _save_model(model: Model, run: str, model_id: str, folder: Path) -> None:
    """Write the pyfunc model: bundle, loader module, signature, requirements; no pickle."""
    import mlflow.models
    import mlflow.pyfunc
    import numpy as np
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    bundle = model.folder
    if model.files is not None:
        bundle = folder.parent / model.folder.name  # the name is part of the place within the version
        bundle.mkdir()
        for name in model.files:
            shutil.copyfile(model.folder / name, bundle / name)
    shape = model.card.input.shape
    answers: list[ColSpec | TensorSpec] = [ColSpec(DataType.string, "label")]
    # The names are those of serving, which is not imported here: it would load torch.
    answers += [ColSpec(DataType.double, f"probability_{c}") for c in model.card.classes]
    if (decision := model.card.decision) is not None:
        answers.append(ColSpec(DataType.double, "budget"))
        answers += [ColSpec(DataType.double, f"offset_{model.card.classes[q]}") for q in decision.query]
    answers.append(ColSpec(DataType.boolean, "unlike_training", required=False))
    for name in ("unlike_training_score", "unlike_training_threshold"):
        answers.append(ColSpec(DataType.double, name, required=False))
    signature = mlflow.models.ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, *shape))]), outputs=Schema(answers)
    )
    example = np.zeros((1, *shape), dtype=np.float32)
    mlflow.pyfunc.save_model(
        path=str(folder),
        loader_module=LOADER,
        data_path=str(bundle),
        mlflow_model=mlflow.models.Model(run_id=run, model_id=model_id, model_uuid=model_id),
        signature=signature,
        input_example=example if example.size <= MAX_EXAMPLE else None,
        pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in requirements_of(model.card)],
        metadata={"digest": model.digest, "model_card": model.model_card.model_dump(mode="json")},
    )


def register_version(
    client: MlflowClient, experiment: str, run: str, model: Model, extra: Mapping[str, str]
) -> str:
    """Make a new version of a model and return its number."""
    from mlflow.exceptions import MlflowException

    tags = {DIGEST: model.digest, **model.tags, **extra}
    logged = client.create_logged_model(
        experiment, name=model.name.replace(".", "-"), source_run_id=run, tags={**NEUTRAL, **tags}
    )
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            _save_model(model, run, logged.model_id, folder)
            client.log_model_artifacts(logged.model_id, str(folder))
    except (MlflowException, OSError):
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    made = client.create_model_version(
        model.name,
        source=f"models:/{logged.model_id}",
        run_id=run,
        model_id=logged.model_id,
        tags=tags,
        description=model.note,
    )
    return str(made.version)

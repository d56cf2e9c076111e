"""Federated baselines as parts of an NVIDIA FLARE job: a hospital's trainer, the server's file and its order.

Rounds, messages, averages and control variates are FLARE's own, chosen by a method's file among the
baselines. Only weights and running statistics travel. Counters of batches, which no prediction reads, stay
where they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey, make_model_learnable
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from qkt_clinical.baselines.fedavg import FedAvg
from qkt_clinical.baselines.federated import (
    FederatedMethod,
    round_draw,
    round_rate,
    train_round,
)
from qkt_clinical.baselines.fedprox import FedProx
from qkt_clinical.baselines.params import FederatedParams
from qkt_clinical.baselines.scaffold import Scaffold
from qkt_clinical.catalog import DEFAULT_TASK
from qkt_clinical.common.files import passing_file
from qkt_clinical.data.inputs import to_input
from qkt_clinical.federation.flare import workspace_of
from qkt_clinical.models.networks import Classifier, build, fast_layout
from qkt_clinical.records.card import NetworkSpec
from qkt_clinical.task import task_of

Arrays = dict[str, NDArray[Any]]

METHODS: Mapping[str, type[FederatedMethod]] = {"fedavg": FedAvg, "fedprox": FedProx, "scaffold": Scaffold}

IMAGES = "train.safetensors"
"""A site's images and labels, in its workspace."""
FIRST_NETWORK = "first.safetensors"
"""The global network's arrays before the first round, in the server's workspace."""
NETWORK = "network.safetensors"
"""The global network's arrays after the last round, in the server's workspace."""


def arrays_of(network: Classifier) -> Arrays:
    """Weights and running statistics."""
    state = network.state_dict().items()
    return {k: np.ascontiguousarray(v.cpu().numpy()) for k, v in state if v.is_floating_point()}


def set_arrays(network: Classifier, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write what :func:`arrays_of` read into a network of the same specification."""
    state = network.state_dict()
    for name, array in arrays.items():
        state[name].copy_(torch.from_numpy(array))


class Trainer(Executor):  # type: ignore[misc]
    """Executor of a hospital: one round on its own images.

    Args:
        algorithm: a name of ``METHODS``.
        spec: of the network.
        params: see :class:`~qkt_clinical.baselines.params.FederatedParams`.
        seed: of order and views of the images.
        device: where it trains.
        threads: of torch on the CPU; the last digits of a network depend on how many.
        normalisation: of the images.
    """

    def __init__(
        self,
        algorithm: str,
        spec: dict[str, Any],
        params: dict[str, Any],
        seed: int,
        device: str,
        threads: int,
        normalisation: str = "unit",
    ) -> None:
        super().__init__()
        self.algorithm, self.spec, self.params, self.seed = algorithm, spec, params, seed
        self.device, self.threads, self.normalisation = device, threads, normalisation

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Read the images once."""
        if event_type != EventType.START_RUN:
            return
        from safetensors.numpy import load_file

        torch.set_num_threads(self.threads)
        root, self._site = workspace_of(fl_ctx)
        held = load_file(root / IMAGES)
        self._inputs = to_input(held["images"], self.normalisation)
        self._labels = torch.from_numpy(held["labels"])
        self._settings = FederatedParams.model_validate(self.params)
        device = torch.device(self.device)
        # Its weights come with the first round.
        self._network = fast_layout(build(NetworkSpec.model_validate(self.spec), seed=self.seed)).to(device)
        self._method = METHODS[self.algorithm]()
        self._method.begin(self._network)

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Train one round."""
        received = FLModelUtils.from_shareable(shareable)
        set_arrays(self._network, received.params)
        local, meta = self._method.local_round(self._network, received, partial(self._round, received))
        meta[FLMetaKey.NUM_STEPS_CURRENT_ROUND] = len(self._labels)  # FLARE's name for a site's weight
        return FLModelUtils.to_shareable(FLModel(params=arrays_of(local), meta=meta))

    def _round(self, received: FLModel, **changed: Any) -> Classifier:
        number = received.current_round + 1
        return train_round(
            self._network,
            self._inputs,
            self._labels,
            self._settings,
            task=task_of(DEFAULT_TASK),
            learning_rate=round_rate(self._settings, number, received.total_rounds),
            draw=round_draw(self.seed, self._site, number),
            device=torch.device(self.device),
            **changed,
        )


class NetworkFile(ModelPersistor):  # type: ignore[misc]
    """The global network on the server: begins and ends as safetensors (FLARE's file is pickled)."""

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        """Before the first round."""
        from safetensors.numpy import load_file

        return make_model_learnable(load_file(workspace_of(fl_ctx)[0] / FIRST_NETWORK), {})

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        """After every round."""
        from safetensors.numpy import save_file

        path = workspace_of(fl_ctx)[0] / NETWORK
        with passing_file(path) as temporary:
            save_file(model[ModelLearnableKey.WEIGHTS], temporary)

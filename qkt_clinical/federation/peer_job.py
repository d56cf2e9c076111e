"""Federated baselines as parts of an NVIDIA FLARE job: a hospital's trainer, the server's file and its order.

Rounds, messages, averages and control variates are FLARE's own: the controllers ``FedAvg`` (for FedProx too)
and ``Scaffold``, and the helpers ``PTFedProxLoss`` and ``PTScaffoldHelper``. Only weights and running
statistics travel. Counters of batches, which no prediction reads, stay where they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
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
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.app_constant import AlgorithmConstants
from nvflare.app_common.utils.fedprox_utils import get_fedprox_mu
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.base_fedavg import BaseFedAvg
from nvflare.app_common.workflows.scaffold import Scaffold
from nvflare.app_opt.pt.fedproxloss import PTFedProxLoss
from nvflare.app_opt.pt.scaffold import PTScaffoldHelper
from torch import Tensor

from qkt_clinical.baselines.federated import first_network, round_draw, round_rate, train_round
from qkt_clinical.baselines.params import FederatedParams
from qkt_clinical.catalog import DEFAULT_TASK
from qkt_clinical.common.files import passing_file
from qkt_clinical.data.inputs import to_input
from qkt_clinical.federation.flare import workspace_of
from qkt_clinical.models.networks import Classifier
from qkt_clinical.records.card import NetworkSpec
from qkt_clinical.task import task_of

Arrays = dict[str, NDArray[Any]]

IMAGES = "train.safetensors"
"""A site's images and labels, in its workspace."""
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
    """Executor of a hospital: one round on its own images, by the algorithm that the server's message names.

    Args:
        spec: of the network.
        params: see :class:`~qkt_clinical.baselines.params.FederatedParams`.
        seed: of order and views of the images.
        device: where it trains.
        threads: of torch on the CPU; the last digits of a network depend on how many.
        normalisation: of the images.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        params: dict[str, Any],
        seed: int,
        device: str,
        threads: int,
        normalisation: str = "unit",
    ) -> None:
        super().__init__()
        self.spec, self.params, self.seed = spec, params, seed
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
        self._network = first_network(NetworkSpec.model_validate(self.spec), self.seed).to(device)
        self._scaffold = PTScaffoldHelper()
        self._scaffold.init(self._network)

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Train one round."""
        received = FLModelUtils.from_shareable(shareable)
        set_arrays(self._network, received.params)
        if AlgorithmConstants.SCAFFOLD_CTRL_GLOBAL in received.meta:
            local, meta = self._scaffold_round(received)
        else:
            proximal = AlgorithmConstants.FEDPROX_MU in received.meta
            penalty = self._distance(get_fedprox_mu(received)) if proximal else None
            local, meta = self._round(received, penalty=penalty), {}
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

    def _distance(self, mu: float) -> Callable[[Classifier], Tensor]:
        start = copy.deepcopy(self._network).requires_grad_(False)
        term = PTFedProxLoss(mu)
        return lambda local: term(local, start)

    def _scaffold_round(self, received: FLModel) -> tuple[Classifier, dict[str, Any]]:
        helper, rates = self._scaffold, []
        helper.load_global_controls(received.meta[AlgorithmConstants.SCAFFOLD_CTRL_GLOBAL])
        controls = helper.get_params()

        def correct(local: Classifier, rate: float) -> None:
            helper.model_update(local, rate, *controls)
            rates.append(rate)

        local = self._round(received, after_step=correct)
        # The helper divides the way that was gone by steps times rate; the rate is not the same in all.
        helper.terms_update(local, sum(rates) / len(rates), *controls, self._network)
        return local, {AlgorithmConstants.SCAFFOLD_CTRL_DIFF: helper.get_delta_controls()}


class NetworkFile(ModelPersistor):  # type: ignore[misc]
    """The global network on the server: begins by a seed, ends as safetensors (FLARE's file is pickled)."""

    def __init__(self, spec: dict[str, Any], seed: int) -> None:
        super().__init__()
        self.spec, self.seed = spec, seed

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        """Before the first round."""
        network = first_network(NetworkSpec.model_validate(self.spec), self.seed)
        return make_model_learnable(arrays_of(network), {})

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        """After every round."""
        from safetensors.numpy import save_file

        path = workspace_of(fl_ctx)[0] / NETWORK
        with passing_file(path) as temporary:
            save_file(model[ModelLearnableKey.WEIGHTS], temporary)


def by_name(results: Sequence[FLModel]) -> list[FLModel]:
    """Replies sorted by site name: the last digits of a sum depend on its order."""
    return sorted(results, key=lambda result: str(result.meta["client_name"]))


class OrderedMean(ModelAggregator):  # type: ignore[misc]
    """FLARE's weighted mean, of all replies at once instead of as they arrive."""

    def __init__(self) -> None:
        super().__init__()
        self._replies: list[FLModel] = []

    def accept_model(self, model: FLModel) -> None:
        """Keep a reply."""
        self._replies.append(model)

    def aggregate_model(self) -> FLModel:
        """The mean of the round's replies."""
        return BaseFedAvg.aggregate_fn(by_name(self._replies))

    def reset_stats(self) -> None:
        """Begin a round."""
        self._replies = []


class OrderedScaffold(Scaffold):  # type: ignore[misc]
    """FLARE's SCAFFOLD, its sums in an order that does not depend on who replies first."""

    def aggregate(self, results: list[FLModel], aggregate_fn: Any = None) -> FLModel:
        """The means of networks and control variates."""
        return super().aggregate(by_name(results), aggregate_fn)

    def update_model(self, model: FLModel, aggr_result: FLModel) -> FLModel:
        """The next round's model, without last round's control variates: FLARE would send them, unread."""
        updated = super().update_model(model, aggr_result)
        updated.meta = {k: v for k, v in updated.meta.items() if k != AlgorithmConstants.SCAFFOLD_CTRL_DIFF}
        return updated

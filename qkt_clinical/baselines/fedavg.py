"""FedAvg (McMahan et al., 2017): after every round the mean of the hospitals' networks, weighed by images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.workflows.base_fedavg import BaseFedAvg
from nvflare.app_common.workflows.fedavg import FedAvg as FlareFedAvg

from qkt_clinical.baselines.federated import by_name
from qkt_clinical.models.networks import Classifier


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


class FedAvg:
    """See :class:`~qkt_clinical.baselines.federated.FederatedMethod`."""

    def controller(self, proximal: float, **settings: Any) -> Any:
        """FLARE's own."""
        return FlareFedAvg(aggregator=OrderedMean(), **settings)

    def begin(self, network: Classifier) -> None:
        """Nothing is kept between rounds."""

    def local_round(
        self, network: Classifier, received: FLModel, train: Callable[..., Classifier]
    ) -> tuple[Classifier, dict[str, Any]]:
        """Train; no word besides the network."""
        return train(), {}

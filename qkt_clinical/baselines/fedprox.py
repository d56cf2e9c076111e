"""FedProx (Li et al., 2020): FedAvg, with a penalty on the way that a hospital's network goes in a round."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fedprox_utils import get_fedprox_mu
from nvflare.app_common.workflows.fedavg import FedAvg as FlareFedAvg
from nvflare.app_opt.pt.fedproxloss import PTFedProxLoss

from qkt_clinical.baselines.fedavg import FedAvg, OrderedMean
from qkt_clinical.models.networks import Classifier


class FedProx(FedAvg):
    """See :class:`~qkt_clinical.baselines.federated.FederatedMethod`."""

    def controller(self, proximal: float, **settings: Any) -> Any:
        """FLARE's FedAvg, which sends ``mu`` with the network."""
        return FlareFedAvg(aggregator=OrderedMean(), fedprox_mu=proximal, **settings)

    def local_round(
        self, network: Classifier, received: FLModel, train: Callable[..., Classifier]
    ) -> tuple[Classifier, dict[str, Any]]:
        """Train with FLARE's term: ``mu / 2`` times the squared distance from the global network."""
        start = copy.deepcopy(network).requires_grad_(False)
        term = PTFedProxLoss(get_fedprox_mu(received))
        return train(penalty=lambda local: term(local, start)), {}

"""SCAFFOLD (Karimireddy et al., 2020): FedAvg, with control variates against the hospitals' own drift."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.app_constant import AlgorithmConstants
from nvflare.app_common.workflows.scaffold import Scaffold as FlareScaffold
from nvflare.app_opt.pt.scaffold import PTScaffoldHelper

from qkt_clinical.baselines.federated import by_name
from qkt_clinical.models.networks import Classifier


class OrderedScaffold(FlareScaffold):  # type: ignore[misc]
    """FLARE's SCAFFOLD, its sums in an order that does not depend on who replies first."""

    def aggregate(self, results: list[FLModel], aggregate_fn: Any = None) -> FLModel:
        """The means of networks and control variates."""
        return super().aggregate(by_name(results), aggregate_fn)

    def update_model(self, model: FLModel, aggr_result: FLModel) -> FLModel:
        """The next round's model, without last round's control variates: FLARE would send them, unread."""
        updated = super().update_model(model, aggr_result)
        updated.meta = {k: v for k, v in updated.meta.items() if k != AlgorithmConstants.SCAFFOLD_CTRL_DIFF}
        return updated


class Scaffold:
    """See :class:`~qkt_clinical.baselines.federated.FederatedMethod`."""

    def controller(self, proximal: float, **settings: Any) -> Any:
        """FLARE's own."""
        return OrderedScaffold(**settings)

    def begin(self, network: Classifier) -> None:
        """The hospital's control variate, zero at first."""
        self._helper = PTScaffoldHelper()
        self._helper.init(network)

    def local_round(
        self, network: Classifier, received: FLModel, train: Callable[..., Classifier]
    ) -> tuple[Classifier, dict[str, Any]]:
        """Train with corrected steps; the change of the control variate goes with the network."""
        helper, rates = self._helper, []
        helper.load_global_controls(received.meta[AlgorithmConstants.SCAFFOLD_CTRL_GLOBAL])
        controls = helper.get_params()

        def correct(local: Classifier, rate: float) -> None:
            helper.model_update(local, rate, *controls)
            rates.append(rate)

        local = train(after_step=correct)
        # The helper divides the way that was gone by steps times rate; the rate is not the same in all.
        helper.terms_update(local, sum(rates) / len(rates), *controls, network)
        return local, {AlgorithmConstants.SCAFFOLD_CTRL_DIFF: helper.get_delta_controls()}

"""Teachers under differential privacy: DP-SGD through Opacus (extra ``qkt-clinical[privacy]``).

What is protected is the single image of the training split: whoever sees the weights can hardly tell whether
one image more or less was there. A patient of several images is protected less. Classes are not balanced and
no epoch is chosen, since numbers of images per class and validation images would enter unprotected.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qkt_clinical.augment import augment
from qkt_clinical.card import NetworkSpec
from qkt_clinical.config import PrivacyParams, TrainParams
from qkt_clinical.data import Images, Labels
from qkt_clinical.errors import ConfigError, QktError
from qkt_clinical.networks import Classifier, build, fast_layout
from qkt_clinical.seeding import derive
from qkt_clinical.training import History, generator, learning_rate_factor, to_input

WARMUP = 0.1
"""Share of all steps in which the learning rate rises."""
AT_ONCE = 64
"""Images whose gradients are computed at once."""


def require_opacus() -> None:
    """Do nothing where Opacus is installed.

    Raises:
        QktError: it is not, code ``opacus-missing``.
    """
    if find_spec("opacus") is None:
        raise QktError(
            "Opacus is not installed, which differential privacy needs",
            remedy="Install it with pip install 'qkt-clinical[privacy]', or leave train.privacy out.",
            code="opacus-missing",
        )


def check_delta(privacy: PrivacyParams, images: int) -> None:
    """Refuse a delta that lets one of so many images be given away altogether.

    Raises:
        ConfigError: delta is one over the number of images, or more.
    """
    if privacy.delta * images >= 1:
        raise ConfigError(
            f"train.privacy.delta is {privacy.delta:g}, which is not below one over the number of images",
            remedy="Choose a smaller delta.",
            code="privacy-delta",
        )


def set_gradients(network: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """Every image's own gradient, (N, *shape) at ``grad_sample`` of each parameter, where Opacus looks.

    Not by Opacus' hooks, which do not bear that residual networks add in place.

    Args:
        images: (N, C, *spatial); N may be 0.
        labels: (N,).

    Returns:
        The sum of the images' cross-entropies.
    """
    weights = {name: p.detach() for name, p in network.named_parameters()}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(network, weights, (image[None],))
        return F.cross_entropy(logits, label[None])

    if len(labels):
        each: Any = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(None, 0, 0), chunk_size=AT_ONCE)
        gradients, losses = each(weights, images, labels)
    else:  # Poisson sampling may draw nobody; noise is added all the same.
        gradients = {name: p.new_zeros(0, *p.shape) for name, p in weights.items()}
        losses = images.new_zeros(0)
    for name, parameter in network.named_parameters():
        parameter.grad_sample = gradients[name]  # type: ignore[attr-defined]
    total: Tensor = losses.sum()
    return total


def train_private(
    spec: NetworkSpec,
    train: tuple[Images, Labels],
    params: TrainParams,
    privacy: PrivacyParams,
    *,
    seed: int,
    secret: str,
    site: str,
    normalisation: str = "unit",
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Classifier, History]:
    """Build a site's network and train it with DP-SGD, from the start: nothing is kept between epochs.

    Args:
        params: batches are of ``batch_size`` images on average; ``patience`` has no meaning.
        secret: from which, with the seed, sampling and noise are drawn; whoever knows it can take the noise
            off again.

    Returns:
        The network and its history, in which ``privacy`` says what the accountant found.

    Raises:
        QktError: Opacus is not installed.
        ConfigError: delta is too large for so many images, or so small an epsilon cannot be reached.
    """
    require_opacus()
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    inputs, labels = to_input(train[0], normalisation), torch.from_numpy(train[1])
    check_delta(privacy, len(labels))
    network = fast_layout(build(spec, seed=derive(seed, "train", site)).to(device)).train()
    draw = generator(seed, "private", site, secret)
    noise = torch.Generator(device).manual_seed(derive(seed, "noise", site, secret))
    index = TensorDataset(torch.arange(len(labels)))
    with warnings.catch_warnings():
        # That noise comes from a seed is said in docs/privacy.md; what Renyi's orders bound is only where the
        # accountant looks.
        warnings.filterwarnings("ignore", message="Secure RNG turned off|Optimal order is")
        engine = PrivacyEngine()
        try:
            _, optimizer, batches = engine.make_private_with_epsilon(
                module=network,
                optimizer=torch.optim.AdamW(
                    network.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay
                ),
                data_loader=DataLoader(index, min(params.batch_size, len(labels)), generator=draw),
                target_epsilon=privacy.epsilon,
                target_delta=privacy.delta,
                epochs=params.epochs,
                max_grad_norm=privacy.clip,
                noise_generator=noise,
                grad_sample_mode="no_op",
            )
        except ValueError:
            raise ConfigError(
                f"train.privacy.epsilon {privacy.epsilon:g} cannot be reached",
                remedy="Choose a larger epsilon, fewer epochs or smaller batches.",
                code="privacy-epsilon",
            ) from None
    history, step, steps = History(), 0, params.epochs * len(batches)
    for epoch in range(1, params.epochs + 1):
        total = 0.0
        for (drawn,) in batches:
            for group in optimizer.param_groups:
                group["lr"] = params.learning_rate * learning_rate_factor(step, steps, WARMUP)
            images = inputs[drawn].to(device)
            optimizer.zero_grad(set_to_none=True)
            seen = augment(images, params.augment, draw) if len(drawn) else images
            total += float(set_gradients(network, seen, labels[drawn].to(device)))
            optimizer.step()
            step += 1
        history.curves.append({"epoch": float(epoch), "loss": total / len(labels)})
        if progress:
            progress(epoch, params.epochs)
    for parameter in network.parameters():
        parameter.grad = parameter.grad_sample = parameter.summed_grad = None  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is")
        spent = engine.get_epsilon(privacy.delta)
    history.best_epoch = len(history.curves)
    history.privacy = {
        "epsilon": math.ceil(spent * 1000) / 1000,
        "delta": privacy.delta,
        "clip": privacy.clip,
        "noise_multiplier": round(float(optimizer.noise_multiplier), 6),
        "protected": "image",
    }
    network.eval()
    return network, history

"""Teachers under differential privacy: DP-SGD through Opacus (extra ``qkt-clinical[privacy]``).

What is protected is the single image of the training split: whoever sees the weights can hardly tell whether
one image more or less was there. A patient of several images is protected less. No epoch is chosen, since
validation images would enter unprotected; and classes are balanced by numbers of images that are noisy
themselves, for which a part of epsilon is spent.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qkt_clinical.common.extras import require_extra
from qkt_clinical.common.seeding import derive
from qkt_clinical.config.params import PrivacyParams, TrainParams
from qkt_clinical.data.inputs import to_input
from qkt_clinical.data.prepared import Images, Labels
from qkt_clinical.errors import ConfigError
from qkt_clinical.models.generator import generator
from qkt_clinical.models.networks import Classifier, build, fast_layout
from qkt_clinical.records.card import NetworkSpec
from qkt_clinical.task import Task
from qkt_clinical.training.augment import augment
from qkt_clinical.training.loop import History, learning_rate_factor

WARMUP = 0.1
"""Share of all steps in which the learning rate rises."""
AT_ONCE = 32
"""Images whose gradients are computed at once."""
COUNTING = 0.05
"""Share of epsilon for the numbers of images per class."""


def check_delta(privacy: PrivacyParams, images: int) -> None:
    """Refuse a delta at which one of so many images could be disclosed altogether.

    Raises:
        ConfigError: delta is one over the number of images, or more.
    """
    if privacy.delta * images >= 1:
        raise ConfigError(
            f"train.privacy.delta is {privacy.delta:g}, which is not below one over the number of images",
            remedy="Choose a smaller delta.",
            code="privacy-delta",
        )


def noisy_counts(counts: Tensor, epsilon: float, draw: torch.Generator) -> Tensor:
    """Numbers of images per class, (classes,), by the Laplace mechanism: one image changes one number by one.

    Of classes without any image 0; which classes there are is not protected. By inversion, since torch's own
    Laplace distribution takes no generator.
    """
    uniform = torch.rand(len(counts), generator=draw, dtype=torch.float64) - 0.5
    noise = -uniform.sign() * torch.log1p(-2 * uniform.abs()) / epsilon
    return torch.where(counts > 0, (counts + noise).clamp(min=1.0), 0.0)


def log_prior(counts: Tensor) -> Tensor:
    """Logit adjustment (classes,) by log class frequencies, which cancels the preference for large classes.

    See Menon et al. 2021, section 5. Weights, which balance classes where there is no privacy,
    are lost where each image's gradient is cut to the same norm. Classes that the site never saw get 0: their
    rows only ever fall, as in any teacher, which is what masks read.
    """
    held = counts > 0
    return torch.where(held, torch.log(counts / counts[held].mean()), 0.0).float()


def set_gradients(
    network: Classifier, images: Tensor, labels: Tensor, prior: Tensor, *, task: Task
) -> Tensor:
    """Every image's own gradient, (N, *shape) at ``grad_sample`` of each parameter, where Opacus looks.

    Not by Opacus' hooks, which do not bear that residual networks add in place.

    Args:
        images: (N, C, *spatial); N may be 0.
        labels: (N,).
        prior: (classes,) is added to every image's logits, see :func:`log_prior`.

    Returns:
        The sum of the images' losses.
    """
    weights = {name: p.detach() for name, p in network.named_parameters()}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(network, weights, (image[None],))
        return task.losses(logits + prior, label[None]).sum()

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
    task: Task,
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
    require_extra("opacus")
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    inputs, labels = to_input(train[0], normalisation), torch.from_numpy(train[1])
    check_delta(privacy, len(labels))
    network = fast_layout(build(spec, seed=derive(seed, "train", site)).to(device)).train()
    draw = generator(seed, "private", site, secret)
    noise = torch.Generator(device).manual_seed(derive(seed, "noise", site, secret))
    counting = COUNTING * privacy.epsilon
    images_of = torch.from_numpy(task.counts(train[1], spec.classes))
    counts = noisy_counts(images_of, counting, generator(seed, "counts", site, secret))
    prior = log_prior(counts).to(device)
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
                target_epsilon=privacy.epsilon - counting,
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
            total += float(set_gradients(network, seen, labels[drawn].to(device), prior, task=task))
            optimizer.step()
            step += 1
        history.curves.append({"epoch": float(epoch), "loss": total / len(labels)})
        if progress:
            progress(epoch, params.epochs)
    for parameter in network.parameters():
        parameter.grad = parameter.grad_sample = parameter.summed_grad = None  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is")
        spent = engine.get_epsilon(privacy.delta) + counting
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

"""Phase 1: the merged low-rank network. Teachers' extractors are reduced in rank without training.

A network that learns a teacher's features on local images alone follows the teacher there and nowhere
else: of what the teacher makes of a class that the hospital does not have, little is left. The teacher's own
filters keep it. So a student takes up the extractors themselves, each convolution reduced to the output
directions that matter, one layer after the other, so that later layers make up for what earlier ones lost.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkt_clinical.models.encoder_network import EncoderExtractor
from qkt_clinical.models.generator import generator
from qkt_clinical.models.inference import IMAGES_PER_BATCH
from qkt_clinical.models.low_rank import Convolution, convolutions, factorised, replace_module
from qkt_clinical.models.networks import Classifier, MergedExtractor, build, multiply_adds
from qkt_clinical.records.card import ENCODER, MERGED, Branch, NetworkSpec

SAMPLES = 4096
"""Patches at most on which a layer is reproduced."""
WIDE_PATCH, WIDE_SAMPLES = 1000, 1024
"""Layers of larger patches than the first see so many: the system is then of patches seen, not of weights."""
WORK = 2e11
"""Multiply-adds, about, that go into seeing what layers are given at most: deep networks see fewer views."""
MIN_VIEWS = 16
CHUNK_SIZE = 2**22
"""Values of input at most in one pass, so that large images and volumes fit into memory."""
PULL = 0.1
"""Ridge penalty that holds the weights to the teacher's, in units of the patches' mean square."""
ISOTROPIC = 0.3
"""Share of the output directions' weight that does not depend on local images: other classes need others."""


@dataclass(frozen=True)
class _LayerOutput:
    """Where a layer was looked at, and what the teacher's own layer said there."""

    index: tuple[Tensor, ...]
    """Image number, then one output position per spatial axis; each (S,)."""
    output: Tensor
    """(S, out), without bias."""


def patches(convolution: Convolution, inputs: Tensor, index: Sequence[Tensor]) -> Tensor:
    """Input patches of a convolution at output positions, (S, in * kernel), as in ``weight.flatten(1)``.

    Args:
        inputs: (N, in, *spatial).
        index: image number, then output positions, each (S,).
    """
    padding: Any = convolution.padding
    pads = [p for size in reversed(padding) for p in (size, size)]
    view = F.pad(inputs, pads)
    dims = len(convolution.kernel_size)
    for axis in range(dims):
        view = view.unfold(2 + axis, convolution.kernel_size[axis], convolution.stride[axis])
    images, *positions = index
    # (N, in, *out, *kernel) at (image, position): (S, in, *kernel).
    at: Any = (images, slice(None), *positions)
    return view[at].reshape(len(images), -1)


def _observe(
    source: nn.Module, layers: dict[str, Convolution], views: Tensor, share: float, draw: torch.Generator
) -> dict[str, _LayerOutput]:
    """One pass of the teacher over views: every layer's output at random positions, in running order.

    Args:
        share: of a layer's positions, which is looked at here.
    """
    seen: dict[str, _LayerOutput] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(module: nn.Module, _: Any, output: Tensor) -> None:
            count, _channels, *spatial = output.shape
            total = count * math.prod(spatial)
            most = math.ceil(samples_of(layers[name].weight[0].numel()) * share)
            flat = torch.randperm(total, generator=draw)[:most]
            index = torch.unravel_index(flat, (count, *spatial))
            images, *positions = (i.to(output.device) for i in index)
            at: Any = (images, slice(None), *positions)
            values = output[at]
            bias = module.bias
            seen[name] = _LayerOutput(
                (images, *positions), values - bias if isinstance(bias, Tensor) else values
            )

        return keep

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        source(views)
    finally:
        for handle in handles:
            handle.remove()
    return seen


class _Reached(Exception):
    """A layer was reached; what follows need not be computed."""


def _settled(network: nn.Module, layers: Mapping[str, nn.Module], view: Tensor) -> dict[str, tuple[str, ...]]:
    """For every layer the modules that have given their output for good when it is reached.

    Those that are called once in a pass; of modules within one another the outermost.

    Args:
        view: (1, C, *spatial).
    """
    done: list[str] = []
    at_start: dict[str, tuple[str, ...]] = {}

    def ended(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, _output: done.append(name)

    def started(name: str) -> Callable[[nn.Module, Any], None]:
        def note(_module: nn.Module, _inputs: Any) -> None:
            at_start.setdefault(name, tuple(done))

        return note

    handles = [m.register_forward_hook(ended(name)) for name, m in network.named_modules() if name]
    handles += [layer.register_forward_pre_hook(started(name)) for name, layer in layers.items()]
    try:
        network(view)
    finally:
        for handle in handles:
            handle.remove()
    once = {name for name, calls in Counter(done).items() if calls == 1}
    found = {}
    for layer, before in at_start.items():
        alone = [name for name in before if name in once]
        parents = {f"{name}." for name in alone}
        found[layer] = tuple(n for n in alone if not any(n.startswith(p) for p in parents))
    return found


@contextlib.contextmanager
def _answering(network: nn.Module, kept: Mapping[str, list[Tensor]], turn: list[int]) -> Iterator[None]:
    """Let modules say again what they said, batch number ``turn[0]``, whatever they are given."""

    def again(name: str) -> Callable[..., Tensor]:
        return lambda *_: kept[name][turn[0]].clone()  # what follows may work in place

    modules = {name: network.get_submodule(name) for name in kept}
    for name, module in modules.items():
        module.forward = again(name)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def _inputs_of(
    network: nn.Module, layer: nn.Module, views: Tensor, kept: dict[str, list[Tensor]], settled: Sequence[str]
) -> Tensor:
    """The inputs of a layer when the network processes the views.

    Args:
        kept: outputs, by batch, of modules that had settled when the layer before was reached; afterwards
            of those ``settled``, so that nothing is computed twice.
    """
    given: list[Tensor] = []
    new: dict[str, list[Tensor]] = {name: [] for name in settled if name not in kept}
    turn = [0]

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        given.append(inputs[0])
        raise _Reached

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _inputs, output: new[name].append(output.clone())

    handles = [network.get_submodule(name).register_forward_hook(note(name)) for name in new]
    handles.append(layer.register_forward_pre_hook(keep))
    try:
        with _answering(network, kept, turn):
            for number, part in enumerate(views.split(IMAGES_PER_BATCH[views.device.type])):
                turn[0] = number
                with contextlib.suppress(_Reached):
                    network(part)
    finally:
        for handle in handles:
            handle.remove()
    kept.update(new)
    for name in set(kept) - set(settled):
        del kept[name]
    return torch.cat(given)


def samples_of(patch: int) -> int:
    """Patches at most on which a layer is reproduced, by the number of values in one."""
    return SAMPLES if patch <= WIDE_PATCH else WIDE_SAMPLES


def corrected_weights(weight: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Weights (out, P), double, that give the ``outputs`` of the ``inputs``, held to ``weight``.

    Ridge regression about the old weights, with a penalty of :data:`PULL` times the mean square of a patch's
    values. Its normal equations have one unknown per value of a patch, or, where that is less, one per patch.

    Args:
        weight: (out, P), double.
        inputs: patches (S, P), in single precision.
        outputs: (S, out), likewise.
    """
    # Products of many patches in single precision, which is enough for them; what is solved in double.
    samples, patch = inputs.shape
    held = PULL * float((inputs**2).mean().clamp(min=1e-12))
    if patch <= samples:
        system = (inputs.T @ inputs).double() / samples + held * torch.eye(patch, dtype=weight.dtype)
        wanted = (inputs.T @ outputs).double() / samples + held * weight.T
        solved: Tensor = torch.linalg.solve(system, wanted).T
        return solved
    system = (inputs @ inputs.T).double() + samples * held * torch.eye(samples, dtype=weight.dtype)
    missing = (outputs - inputs @ weight.T.to(inputs.dtype)).double()
    counts = torch.cholesky_solve(missing, torch.linalg.cholesky(system))
    return weight + (counts.T.to(inputs.dtype) @ inputs).double()


def reduce_layer(weight: Tensor, inputs: Tensor, outputs: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Factorise a layer's weights (out, P) into ``wide @ narrow`` of the rank, fitted to its inputs now.

    The weights are first corrected so that the patches ``inputs`` (S, P), which earlier layers changed, give
    the teacher's ``outputs`` (S, out) again: least squares, held to the old weights. Then the ``rank``
    directions of the outputs that carry most are kept, their weight being partly that of these patches,
    partly that of patches of any kind.

    Returns:
        wide (out, rank), narrow (rank, P), and the share of the outputs' energy that is lost on the patches.
    """
    u, y = inputs, outputs
    w = corrected_weights(weight.double(), u, y)
    said = (u @ w.T.to(u.dtype)).double()
    local, anywhere = said.T @ said, w @ w.T
    weights = (1 - ISOTROPIC) * local / local.trace().clamp(min=1e-12)
    weights = weights + ISOTROPIC * anywhere / anywhere.trace().clamp(min=1e-12)
    directions = torch.linalg.eigh(weights).eigenvectors[:, -rank:]
    narrow = directions.T @ w
    kept = said @ directions @ directions.T
    lost = ((kept - y) ** 2).sum() / (y**2).sum().clamp(min=1e-12)
    return directions.to(weight.dtype), narrow.to(weight.dtype), float(lost)


def _branch(spec: NetworkSpec, rank: float) -> Branch:
    return Branch.model_validate({"name": spec.name, "encoder": spec.encoder, "rank": rank})


def full_rank(source: Classifier) -> tuple[nn.Module, Branch]:
    """A network's own extractor unchanged, and its entry in the card."""
    return source.extractor, _branch(source.spec, 1.0)


@torch.no_grad()
def reduce_extractor(
    source: Classifier, share: float, views: Tensor, *, seed: int, device: torch.device
) -> tuple[nn.Module, Branch, list[float]]:
    """A network's extractor with ``share`` of its convolutions' rank.

    Args:
        source: left as it is; it sees the views once.
        share: 1 keeps the extractor bit for bit.
        views: (N, C, *spatial) of local images.

    Returns:
        The extractor on the CPU in evaluation mode, what a card says of it, and the energy lost per layer.
    """
    extractor = copy.deepcopy(source.extractor).to(device).eval().requires_grad_(False)
    branch = _branch(source.spec, share)
    layers = convolutions(extractor, share)
    if not layers:
        return extractor.cpu(), branch, []
    work = multiply_adds(build(source.spec, seed=0).eval().extractor, views.shape[1:])
    prefixes = work * (len(layers) + 1) / 2
    views = views[: max(MIN_VIEWS, int(WORK / prefixes))].to(device)
    parts = views.split(max(1, CHUNK_SIZE // views[0].numel()))
    draw = generator(seed, "transplant")  # the stream of the first version: answers keep their bytes
    plain = {name: layer for name, (layer, _) in layers.items()}
    seen = [_observe(extractor, plain, part, len(part) / len(views), draw) for part in parts]
    settled = _settled(extractor, plain, views[:1])
    kept: list[dict[str, list[Tensor]]] = [{} for _ in parts]
    losses = []
    for name in seen[0]:
        layer, rank = layers[name]
        given = []
        for part, outputs, looked in zip(parts, kept, seen, strict=True):
            inputs = _inputs_of(extractor, layer, part, outputs, settled[name])
            given.append(patches(layer, inputs, looked[name].index).cpu())
        said = [looked[name].output.cpu() for looked in seen]
        wide, narrow, lost = reduce_layer(
            layer.weight.flatten(1).cpu(), torch.cat(given), torch.cat(said), rank
        )
        smaller = factorised(layer, rank).to(device)
        weights = smaller.state_dict()
        weights["0.weight"].copy_(narrow.reshape(weights["0.weight"].shape))
        weights["1.weight"].copy_(wide.reshape(weights["1.weight"].shape))
        if layer.bias is not None:
            weights["1.bias"].copy_(layer.bias)
        replace_module(extractor, name, smaller)
        losses.append(lost)
    return extractor.cpu(), branch, losses


@torch.no_grad()
def beside_encoder(network: Classifier, encoder: EncoderExtractor, rows: tuple[Tensor, Tensor]) -> Classifier:
    """A merged network with one more extractor, and the rows of the head over its features.

    Args:
        network: left as it is; the new one shares its extractors.
        rows: weight (C, F of the encoder) and bias (C,), added to what the network says.
    """
    branch = Branch.model_validate({"name": ENCODER, "encoder": encoder.part, "rank": 1.0})
    spec = NetworkSpec.model_validate({**dict(network.spec), "branches": (*network.spec.branches, branch)})
    branches = network.get_submodule("extractor.branches").children()
    weight = torch.cat([network.head.weight, rows[0].to(network.head.weight)], dim=1)
    with torch.random.fork_rng(devices=[]):  # a new layer draws values, which are overwritten
        merged = Classifier(spec, MergedExtractor([*branches, encoder]), weight.shape[1])
    merged.head.weight.copy_(weight)
    merged.head.bias.copy_(network.head.bias + rows[1].to(network.head.bias))
    return merged.eval()


@torch.no_grad()
def merge_networks(
    source: Classifier,
    parts: Sequence[tuple[nn.Module, Branch]],
    rows: Sequence[tuple[Tensor, Tensor]],
) -> Classifier:
    """Merge all extractors into one network, whose head sums the rows over each extractor's features.

    Args:
        source: the asking hospital's network, for what is not a matter of branches.
        parts: extractor and branch, in order.
        rows: weight (C, F_i) and bias (C,) per part, see :func:`qkt_clinical.qkt.consensus.consensus_rows`.
    """
    branches = tuple(b for _, b in parts)
    spec = NetworkSpec.model_validate(
        {**dict(source.spec), "name": MERGED, "encoder": None, "branches": branches}
    )
    network = build(spec, seed=0)
    for number, (extractor, _) in enumerate(parts):
        network.get_submodule(f"extractor.branches.{number}").load_state_dict(extractor.state_dict())
    network.head.weight.copy_(torch.cat([weight for weight, _ in rows], dim=1))
    network.head.bias.copy_(torch.stack([bias for _, bias in rows]).sum(dim=0))
    return network.eval()

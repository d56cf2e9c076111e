"""Names that the CLI, the configuration, the docs and the tests share. Imports nothing heavy."""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal, get_args

Network = Literal[
    "resnet-small", "resnet-small-gn", "resnet18", "densenet-small", "densenet121", "efficientnet-b0"
]
EncoderName = Literal[
    "resnet18",
    "resnet50",
    "efficientnet-b0",
    "efficientnet-lite0",
    "convnext-tiny",
    "vit-small",
    "vit-base",
    "dinov2-small",
    "medicalnet-resnet10",
]
"""Pretrained networks whose features can be used, see ``models/encoders.py``."""
EncoderMode = Literal["frozen", "adapters", "finetune"]
"""What of a pretrained network training changes: nothing, its normalisation layers, or all of it."""
WITHOUT_BATCH_NORM: tuple[Network, ...] = ("resnet-small-gn",)
"""Networks that train image by image, as differential privacy asks; the others mix images in batch norm."""
Estimator = Literal[
    "gaussian-noise",
    "uniform-noise",
    "smooth-noise",
    "mixed-noise",
    "batch-norm-noise",
    "feature-noise",
    "head-row-norm",
    "combined",
]
DEFAULT_ESTIMATOR: Estimator = "combined"
"""The estimator of masks; the benchmark compares it with the others."""
Method = Literal["qkt", "qkt-light", "routed", "qkt-statistics", "qkt-means"]
DEFAULT_METHOD: Method = "qkt"
TaskName = Literal["multiclass"]
"""What labels can mean, see ``task.py``."""
DEFAULT_TASK: TaskName = "multiclass"
"""Where nothing says what labels mean: ``params.yaml`` and bundles do not yet."""
DEFAULT_BUDGET = 0.03
"""Largest false-query rate, where a query does not say.

The gate's default lets 10 points of forgetting pass at the upper end of an interval: of a hundred test images
0.05 leaves chance little room.
"""
Device = Literal["auto", "cpu", "cuda"]
Split = Literal["train", "calibration", "val", "test"]
Partition = Literal["pathological", "dirichlet"]
OnOff = Literal["on", "off"]
Regime = Literal["absent", "rare", "truly-absent"]
EvaluationSplit = Literal["test", "val"]

NETWORKS: tuple[str, ...] = get_args(Network)
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
METHODS: tuple[Method, ...] = get_args(Method)
DEVICES: tuple[str, ...] = get_args(Device)
SPLITS: tuple[str, ...] = get_args(Split)
HELD_BACK = "held_back"
"""Split of the images that a site keeps for ``evaluate`` alone; they lie apart from the others."""
ON_STATISTICS: Method = "qkt-statistics"
"""The method whose student has a frozen encoder beside the networks that ``qkt`` merges."""
BY_MEANS: Method = "qkt-means"
"""The method whose student has a frozen encoder beside its own network, and no other hospital's."""
ENCODED_METHODS: tuple[Method, ...] = (ON_STATISTICS, BY_MEANS)
"""Those by class means over the features of a frozen encoder."""
BY_NETWORKS: tuple[Method, ...] = tuple(m for m in METHODS if m != BY_MEANS)
"""Those in which other hospitals' networks take part."""
ENCODER_BASELINES: tuple[str, ...] = (
    "statistics",
    "statistics-centred",
    "statistics-dp",
    "gaussian-heads",
    "federated-head",
)
"""Baselines over the features of a frozen encoder that all hospitals have."""
WITH_ENCODER: tuple[str, ...] = (*ENCODER_BASELINES, *ENCODED_METHODS)
"""All of the benchmark that takes one."""
BASELINES: tuple[str, ...] = (
    "local",
    "finetune",
    "ensemble-prob",
    "ensemble-logit",
    "ensemble-adapted",
    "fens",
    "one-shot-average",
    "distill-all",
    "fedavg",
    "fedprox",
    "scaffold",
    *ENCODER_BASELINES,
)
"""Baselines in the benchmark."""
BENCHMARK_METHODS: tuple[str, ...] = tuple(m for m in (*BASELINES, *METHODS) if m not in WITH_ENCODER)
"""What ``qkt benchmark --methods all`` stands for, with ``--encoder`` those of ``WITH_ENCODER`` too.

Ablations are named one by one or as ``ablations``.
"""
OWN_WITH_QUERY, POOLED = "own-with-query", "pooled"
REFERENCES: tuple[str, ...] = (OWN_WITH_QUERY, POOLED)
"""What ``all`` stands for besides with ``--sites``: bounds that need the hidden images or everybody's."""

STAGES: MappingProxyType[str, str] = MappingProxyType(
    {
        "ingest": "turn a hospital's files into arrays with patient-wise splits",
        "train": "train a hospital's teacher on its own images",
        "mask": "find out which classes a teacher knows, without any image",
        "plan": "choose the relevant teachers of a query and fetch their bundles",
        "transfer": "answer a query: phase 1 and phase 2 on the asking hospital's images",
        "evaluate": "measure every answer on held-out patients, before and after",
        "gate": "judge every answer by the rules that it must meet to be let into use",
        "report": "write the HTML report",
        "track": "mirror the outputs to MLflow: runs, models, registry",
    }
)

BLOOD_CELLS: tuple[str, ...] = (
    "basophil",
    "eosinophil",
    "erythroblast",
    "ig",
    "lymphocyte",
    "monocyte",
    "neutrophil",
    "platelet",
)
"""Label order of the blood-cell data sets (BloodMNIST's); the phantom uses the same names."""

LESIONS: tuple[str, ...] = ("solid", "ground-glass", "cavity", "calcified")
"""Label order of the 3D phantom."""

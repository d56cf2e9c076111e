"""``qkt benchmark``: every method on simulated hospitals, or on real sites with a file each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qkt_clinical.catalog import (
    BENCHMARK_METHODS,
    REFERENCES,
    WITH_ENCODER,
    Device,
    EncoderMode,
    EncoderName,
    EvaluationSplit,
    Network,
    OnOff,
    Partition,
    Regime,
)
from qkt_clinical.cli.options import Json, print_json, say
from qkt_clinical.common.console import progress
from qkt_clinical.errors import ConfigError, QktError


def benchmark(
    out: Annotated[
        Path, typer.Option(help="Folder for results and for what a resumed run needs.", file_okay=False)
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Labelled npz in MedMNIST's layout, divided among simulated hospitals.",
            metavar="FILE.npz",
            show_default=False,
        ),
    ] = None,
    sites: Annotated[
        list[Path] | None,
        typer.Option(
            help="Real hospitals in place of --data: a folder with one such npz each, or once for each file.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    ask: Annotated[str, typer.Option(help="With --sites: who asks, names with commas; all.")] = "",
    query_classes: Annotated[
        str, typer.Option(help="With --sites: what is asked for, names with commas; all.")
    ] = "",
    partition: Annotated[
        Partition, typer.Option(help="A few classes for each hospital, or skewed proportions.")
    ] = "pathological",
    hospitals: Annotated[int, typer.Option(min=2, help="How many.")] = 6,
    classes_per_hospital: Annotated[int, typer.Option(min=2, help="For pathological.")] = 3,
    beta: Annotated[float, typer.Option(min=0.001, help="Concentration for dirichlet.")] = 0.3,
    regime: Annotated[
        Regime,
        typer.Option(help="Ask for classes without, or with a few images; truly-absent: with --sites."),
    ] = "absent",
    samples_per_rare_class: Annotated[
        int, typer.Option("--samples-per-rare-class", "--rare-images", min=1, max=50, help="For rare.")
    ] = 20,
    query_size: Annotated[int, typer.Option(min=1, help="Classes per query.")] = 1,
    seeds: Annotated[str, typer.Option(help="Each divides the data and trains anew.")] = "0,1,2",
    methods: Annotated[
        str,
        typer.Option(
            help=f"all ({', '.join(BENCHMARK_METHODS)}; with --sites {' and '.join(REFERENCES)}; with "
            f"--encoder {' and '.join(WITH_ENCODER)}), ablations, or names with commas."
        ),
    ] = "all",
    rounds: Annotated[
        str, typer.Option(help="Federations are trained for so many each; the best on val counts.")
    ] = "20,50",
    network: Annotated[Network, typer.Option(help="Of every hospital.")] = "resnet-small",
    appearance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=2.0,
            help="Strength of random stains and contrast in training; 1 with --sites, else 0.",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, max=10_000, help="Of a hospital's network, at most.")] = 30,
    min_batches: Annotated[
        int, typer.Option(min=1, max=1000, help="Of an epoch, at least, in every training.")
    ] = 1,
    packed: Annotated[
        OnOff, typer.Option(help="Whether teachers leave with their weights in a byte each.")
    ] = "off",
    adapt: Annotated[
        OnOff, typer.Option(help="Whether QKT brings teachers to the asking hospital's images.")
    ] = "on",
    encoder: Annotated[
        EncoderName | None,
        typer.Option(help="Pretrained; class statistics read its features.", show_default=False),
    ] = None,
    encoder_weights: Annotated[
        Path | None,
        typer.Option(
            help="Its weights, from 'qkt encoder import'.", metavar="FILE.safetensors", show_default=False
        ),
    ] = None,
    encoder_mode: Annotated[
        EncoderMode | None,
        typer.Option(
            help="Every hospital's network starts with the encoder, and trains so much of it.",
            show_default=False,
        ),
    ] = None,
    encoder_size: Annotated[
        int, typer.Option(min=16, max=518, help="Pixels to which its images are resized.")
    ] = 112,
    max_queries: Annotated[int | None, typer.Option(min=1, help="At most so many per seed.")] = None,
    budget: Annotated[
        float, typer.Option(min=0.0001, max=0.9999, help="Largest false-query rate on own images.")
    ] = 0.02,
    split: Annotated[EvaluationSplit, typer.Option(help="Tune on val, report on test.")] = "test",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; one per core, or one on CUDA.", show_default=False)
    ] = None,
    device: Annotated[Device, typer.Option(help="Where networks run.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Compare all methods on simulated hospitals or real sites: every query of every seed, one table."""
    from qkt_clinical.baselines.params import BaselineParams, FederatedParams, FinetuneParams
    from qkt_clinical.benchmark.runner import run
    from qkt_clinical.benchmark.settings import BenchmarkSettings, EncoderUse, parse_list, parse_numbers
    from qkt_clinical.benchmark.summary import methods_table
    from qkt_clinical.config.params import TrainParams, TransferParams
    from qkt_clinical.models.encoders import digest_weights

    if (data is None) == (not sites):
        raise ConfigError(
            "exactly one of --data and --sites is needed",
            remedy="Give --data FILE.npz to simulate hospitals, or --sites DIR for real ones.",
        )
    if (encoder is None) != (encoder_weights is None):
        raise ConfigError(
            "--encoder and --encoder-weights belong together",
            remedy="Give both, or none of them.",
        )
    used = None
    if encoder and encoder_weights:
        used = EncoderUse(name=encoder, digest=digest_weights(encoder_weights), side=encoder_size)
    if encoder_mode and used is None:
        raise ConfigError("--encoder-mode without an encoder", remedy="Give --encoder and --encoder-weights.")
    if appearance is None:
        appearance = 1.0 if sites else 0.0
    federated = FederatedParams(appearance=appearance, min_batches=min_batches)
    settings = BenchmarkSettings(
        sites=bool(sites),
        ask=parse_list(ask),
        query_classes=parse_list(query_classes),
        partition=partition,
        hospitals=hospitals,
        classes_per_hospital=classes_per_hospital,
        beta=beta,
        regime=regime,
        samples_per_rare_class=samples_per_rare_class,
        query_size=query_size,
        seeds=parse_numbers(seeds, "--seeds"),
        methods=parse_list(methods),
        rounds=parse_numbers(rounds, "--rounds", minimum=1),
        max_queries=max_queries,
        budget=budget,
        split=split,
        device=device,
        encoder=used,
        train=TrainParams(
            network=network,
            encoder=used.start(encoder_mode) if used and encoder_mode else None,
            epochs=epochs,
            appearance=appearance,
            min_batches=min_batches,
            packed=packed == "on",
        ),
        baselines=BaselineParams(
            finetune=FinetuneParams(min_batches=min_batches), federated=federated, scaffold=federated
        ),
        transfer=TransferParams(adaptation=adapt == "on"),
    )
    try:
        with progress("benchmark", quiet=as_json) as step:
            result = run(
                data or sites or [],
                out,
                settings,
                encoder_weights=encoder_weights,
                workers=workers,
                resume=resume,
                progress=step,
            )
    except KeyboardInterrupt:
        raise QktError(
            "stopped; what was finished is kept", remedy="Add --resume to go on.", code="stopped"
        ) from None
    if as_json:
        print_json(result["summary"])
    else:
        print(methods_table(result["summary"]))
        say(f"files: {out}")

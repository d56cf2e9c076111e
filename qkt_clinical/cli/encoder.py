"""``qkt encoder``: pretrained encoders and the files of their weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from qkt_clinical.catalog import EncoderName
from qkt_clinical.cli.options import EPILOG, Json, group, print_json, say

encoder_app = group(
    no_args_is_help=True,
    help="Pretrained encoders: which there are, and the files of their weights.",
)

WeightsFile = Annotated[Path, typer.Argument(metavar="FILE", help="Weights of an encoder.", dir_okay=False)]


@encoder_app.command("list", epilog=EPILOG)
def encoder_list(as_json: Json = False) -> None:
    """Name all encoders on the allow-list, with their features and what they expect of images."""
    from qkt_clinical.config.encoder_specs import ENCODERS

    if as_json:
        print_json({name: asdict(spec) for name, spec in ENCODERS.items()})
        return
    for name, spec in ENCODERS.items():
        size = "x".join([str(spec.side)] * spec.spatial_dims)
        say(f"{name}: {spec.features} features, images of {size}, {spec.library} {spec.architecture}")


@encoder_app.command("show", epilog=EPILOG)
def encoder_show(
    file: WeightsFile,
    name: Annotated[EncoderName, typer.Option("--name", help="Encoder that the weights belong to.")],
    as_json: Json = False,
) -> None:
    """Check a weights file, and show its digest."""
    from qkt_clinical.models.encoders import load_encoder

    encoder = load_encoder(name, file)
    shown = {"name": name, "digest": encoder.digest, "bytes": file.stat().st_size, **asdict(encoder.spec)}
    if as_json:
        print_json(shown)
        return
    for key, value in shown.items():
        say(f"{key}: {value}")


@encoder_app.command("import", epilog=EPILOG)
def encoder_import(
    file: WeightsFile,
    name: Annotated[EncoderName, typer.Option("--name", help="Encoder that the weights belong to.")],
    out: Annotated[Path, typer.Option(help="Safetensors file to write.", dir_okay=False)],
    as_json: Json = False,
) -> None:
    """Make a safetensors file of weights that torch stored; nothing in them is run."""
    from qkt_clinical.models.encoders import import_weights

    found = import_weights(file, name, out)
    if as_json:
        print_json({"name": name, "file": str(out), **asdict(found)})
        return
    say(f"{out}: {found.bytes} bytes, SHA-256 {found.digest}")
    if found.matched == "order":
        say("Names are another program's: tensors were told by their order, and every shape agrees.")
    if found.left_out:
        say(f"Left out: {', '.join(found.left_out[:5])}{' and more' if len(found.left_out) > 5 else ''}")
    say("Which licence do these weights have? It is not in the file: note it beside the digest.")

"""``qkt phantom``, ``qkt federate``, ``qkt fetch``: hospitals to try things on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qkt_clinical.catalog import Method
from qkt_clinical.cli.options import HERE, Json, Root, print_json, say
from qkt_clinical.common.console import progress


def phantom(
    dims: Annotated[int, typer.Option(min=2, max=3, help="2: blood smears, 3: small CT volumes.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws other patients.")] = 0,
    images_per_site: Annotated[int | None, typer.Option(min=20, help="Images per hospital.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Draw a contact sheet into this PNG and stop.")] = None,
    root: Root = HERE,
    as_json: Json = False,
) -> None:
    """Generate the embedded federation: hospitals with phantom images in real file formats."""
    from qkt_clinical.config.workspace import keep_private
    from qkt_clinical.datasets.phantom import render_sheet, write_federation

    three: Literal[2, 3] = 3 if dims == 3 else 2
    if sheet is not None:
        render_sheet(sheet, dims=three, seed=seed)
        say(f"sheet: {sheet}")
        return
    with progress("phantom", quiet=as_json) as step:
        keep_private(root)
        sites = write_federation(root, dims=three, seed=seed, images_per_site=images_per_site, progress=step)
    if as_json:
        print_json({"sites": sites})
    else:
        say(f"hospitals: {', '.join(sites)}")


def federate(
    source: Annotated[Path, typer.Argument(help="Labelled npz in MedMNIST's layout.", metavar="FILE.npz")],
    out: Annotated[Path, typer.Option(help="The workspace to write.")],
    preset: Annotated[str | None, typer.Option(help="Settings that come with the package: pbc28.")] = None,
    partition: Annotated[
        Literal["pathological", "dirichlet"] | None,
        typer.Option(help="A few classes for each hospital, or skewed proportions."),
    ] = None,
    hospitals: Annotated[int | None, typer.Option(min=2, help="How many.")] = None,
    classes_per_hospital: Annotated[int | None, typer.Option(min=2, help="For pathological.")] = None,
    beta: Annotated[float | None, typer.Option(help="Concentration for dirichlet.")] = None,
    queries: Annotated[int | None, typer.Option(min=1, help="How many absent classes are asked for.")] = None,
    method: Annotated[Method | None, typer.Option(help="With which queries are answered.")] = None,
    budget: Annotated[float | None, typer.Option(help="Budget of every query.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the partition and of the queries.")] = None,
    as_json: Json = False,
) -> None:
    """Turn one labelled npz into simulated hospitals, a workspace for 'dvc repro'."""
    from qkt_clinical.datasets.simulated import federate as divide
    from qkt_clinical.datasets.simulated import load_preset
    from qkt_clinical.datasets.workspace import write_workspace

    base = load_preset(preset) if preset else None
    if base is None and partition is None:
        raise typer.BadParameter("give --partition or --preset")
    given = {
        "partition": partition,
        "hospitals": hospitals,
        "classes_per_hospital": classes_per_hospital,
        "beta": beta,
        "queries": queries,
        "method": method,
        "budget": budget,
        "seed": seed,
    }
    arguments = (base.federate.model_dump() if base else {}) | {
        k: v for k, v in given.items() if v is not None
    }
    made = divide(source, out, **arguments)
    # Hospitals made of one file look alike: no network need be made for others' scanners and stains.
    alike = {"train": {"appearance": 0.0}}
    write_workspace(out, {**(base.params if base else alike), **made.as_params()})
    if as_json:
        print_json(made.as_params())
    else:
        say(f"{out}: {len(made.sites)} hospitals, {len(made.queries)} queries; next: cd {out} && dvc repro")


def fetch(
    name: Annotated[str | None, typer.Argument(help="Data set; without it they are listed.")] = None,
    size: Annotated[int, typer.Option(help="Edge length in pixels: 28, 64, 128 or 224.")] = 28,
    out: Annotated[Path, typer.Option(help="Folder for the file.")] = Path("data/medmnist"),
    base_url: Annotated[str | None, typer.Option(help="A mirror with the same file names.")] = None,
    as_json: Json = False,
) -> None:
    """Download a MedMNIST data set, checked against its MD5 sum."""
    from qkt_clinical.datasets.medmnist import fetch as download
    from qkt_clinical.datasets.medmnist import list_datasets

    if name is None:
        known = list_datasets()
        if as_json:
            print_json(sorted(known))
        else:
            for known_name in sorted(known):
                say(known_name)
        return
    path = download(name, out, size=size, base_url=base_url, progress=not as_json)
    if as_json:
        print_json({"file": path.as_posix()})
    else:
        say(str(path))

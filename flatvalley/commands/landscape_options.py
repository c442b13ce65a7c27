"""Options that the commands of the landscape share."""

from typing import Annotated

import typer

from flatvalley.studies.landscape_networks import POLICIES, PRECISIONS

PLACE = (
    "Folder of a `flatvalley train` or `flatvalley prune` run, of one of a training's runs in it, "
    "or a safetensors file."
)

Network = Annotated[str, typer.Argument(help=PLACE)]
Samples = Annotated[
    int | None, typer.Option(help="Training samples to look at. Default: up to 10,000.")
]
Norm = Annotated[str, typer.Option("--batch-norm", help=f"One of {', '.join(POLICIES)}.")]
InBits = Annotated[
    str,
    typer.Option(
        "--precision",
        help=f"Of forward passes: {' or '.join(PRECISIONS)}, whose deviation is measured.",
    ),
]
Workers = Annotated[int, typer.Option(help="Processes that share the points.")]
Model = Annotated[
    str | None, typer.Option(help="Of a file of weights: a name, or package.module:factory.")
]
Data = Annotated[
    str | None, typer.Option(help="Of a file: a data set, a folder, or package.module:factory.")
]
Criterion = Annotated[
    str | None, typer.Option(help="Of a file: cross-entropy, or package.module:factory.")
]
Device = Annotated[str, typer.Option(help="Where to compute, e.g. cuda.")]

"""Options that commands of `dataflex-cli` share or have many of; nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from gradstore.cli.options import path_at_home

Config = Annotated[
    Path,
    typer.Argument(help="YAML or JSON configuration.", metavar="CONFIG", parser=path_at_home),
]


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """The options of `replay` that say what is differentiated, and at what cost."""

    config: Config
    targets: Annotated[
        str, typer.Option(help="sets: mean loss of each target set; rows: each target row's.")
    ] = "sets"
    float32: Annotated[
        bool, typer.Option("--float32", help="Differentiate in float32: faster, less exact.")
    ] = False
    segment: Annotated[
        int | None, typer.Option(help="Steps between kept states; default: the fewest states.")
    ] = None
    hours: Annotated[float, typer.Option(help="Refuse a replay that takes longer.")] = 1.0
    memory: Annotated[float, typer.Option(help="Refuse above so many GiB of states.")] = 8.0

"""Options that the commands of `dataflex-cli gradstore` share, and the way they print."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradstore.errors import BadInput
from gradstore.format.names import printable
from gradstore.storage.location import Location, at_user_home, is_address

if TYPE_CHECKING:
    from gradstore.cluster.options import RayOptions
    from gradstore.scoring.products import InnerProduct
    from gradstore.store.texts import RowTexts

#: What a command says where it cannot show rows themselves.
NO_TEXT = (
    "This store keeps no text of its rows: run `dataflex-cli gradstore build` again with "
    "store_text: true to see them here."
)
_SHOWN_CHARACTERS = 200

app = typer.Typer(help="Build, inspect and query gradient stores.", no_args_is_help=True)


def path_at_home(text: str) -> Path:
    """Return the path that a word names; `~/` counts where no shell has replaced it (`-o=~/x`)."""
    if is_address(text):
        raise BadInput(f"{text!r} is no path: give a file or folder of this machine (a store alone "
                       "may lie elsewhere).")  # fmt: skip
    return Path(text).expanduser()


if TYPE_CHECKING:
    StoreValue = Location
else:
    StoreValue = Path  # Typer takes no unions; the parser makes the value

StorePath = Annotated[
    StoreValue,
    typer.Argument(
        help="Folder of the store, s3://BUCKET/PREFIX, or https://HOST of a service.",
        metavar="STORE",
        parser=at_user_home,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Checkpoints = Annotated[str, typer.Option(help="Checkpoints to combine: last, all or a number.")]
Run = Annotated[str, typer.Option(help="Prefix of the generations (gradstore_run).")]
Targets = Annotated[
    list[str] | None, typer.Option("--target", help="Target set; repeat for several. Default: all.")
]
Subtasks = Annotated[
    str, typer.Option(help="Cut the one target set into sub-tasks of these sizes, such as 16,16.")
]
Aggregation = Annotated[str, typer.Option(help="Over sub-tasks: max or mean.")]
Normalize = Annotated[
    str, typer.Option(help="Whose norms products are divided by: cosine (both), target, none.")
]
Preconditioner = Annotated[
    str,
    typer.Option(
        help="none; fisher: in the metric of the training rows' second moment (features of "
        "gradient_type sgd or sign); subspace: in the main directions of the target rows."
    ),
]
Damping = Annotated[float, typer.Option(help="Of fisher, in mean eigenvalues.")]


def written_to(what: str) -> Any:  # noqa: ANN401 - Typer's option
    """Declare `-o PATH`, the file that a command writes; `what` it is, for the help."""
    return typer.Option("-o", "--output", help=what, metavar="PATH", parser=path_at_home)


Output = Annotated[Path | None, written_to("rows.parquet, .csv or .jsonl")]


@dataclass(frozen=True, kw_only=True)
class OnEngine:
    """The options of every command that may run on a cluster."""

    engine: Annotated[
        str | None,
        typer.Option(
            help="ray: work on a Ray cluster, whose nodes see the store's file system.",
            metavar="ray",
        ),
    ] = None
    address: Annotated[
        str | None,
        typer.Option(
            help="Of the Ray cluster that this machine is a node of: auto, or HOST:PORT of its "
            "head; default: one is started here for the call."
        ),
    ] = None
    actors: Annotated[
        int | None, typer.Option(help="Processes on it; default: as many as there is room for.")
    ] = None
    cpus_per_actor: Annotated[
        float, typer.Option(help="CPUs, and threads, of each; 0.5 for half of one.")
    ] = 1.0

    def ray(
        self, gpus_per_actor: float | None = None, memory_per_actor: float | None = None
    ) -> RayOptions | None:
        """Check and join the options; None where no engine is asked for.

        Raises:
            BadInput: an unknown engine, options of an engine without one, or a number out of range.
        """
        from gradstore.cluster.options import RayOptions

        if self.engine not in (None, "ray"):
            raise BadInput(f"engine is {self.engine!r}; use --engine ray, or leave --engine out.")
        options = RayOptions(
            address=self.address,
            actors=self.actors,
            cpus_per_actor=self.cpus_per_actor,
            gpus_per_actor=gpus_per_actor,
            memory_per_actor=memory_per_actor,
        )
        if self.engine is None and options != RayOptions():
            raise BadInput("--address, --actors and what an actor takes need --engine ray.")
        return None if self.engine is None else options


@dataclass(frozen=True, kw_only=True)
class Question:
    """The options of every command that scores training rows."""

    store: StorePath
    checkpoints: Checkpoints = "last"
    run: Run = ""
    target: Targets = None
    subtasks: Subtasks = ""
    aggregation: Aggregation = "max"
    normalize: Normalize = "cosine"
    preconditioner: Preconditioner = "none"
    damping: Damping = 1.0

    def product(self) -> InnerProduct:
        """Check and join the options of the inner product.

        Raises:
            BadInput: an unknown name, or damping out of range.
        """
        from gradstore.scoring.products import InnerProduct

        return InnerProduct(self.normalize, self.preconditioner, self.damping)  # type: ignore[arg-type]

    def subtask_sizes(self) -> list[int] | None:
        """Read the sizes of sub-tasks; None where each target set is one.

        Raises:
            BadInput: they are no whole numbers.
        """
        try:
            return [int(size) for size in self.subtasks.split(",")] if self.subtasks else None
        except ValueError:
            raise BadInput(f"subtasks is {self.subtasks!r}; give sizes such as 16,16.") from None


def with_options(*kinds: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of some dataclasses in place of its first parameters."""
    asked = [inspect.signature(kind, eval_str=True).parameters for kind in kinds]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[len(kinds) :]

        @wraps(command)
        def run(**options: Any) -> None:  # noqa: ANN401 - what Typer parsed
            made = [
                kind(**{name: options.pop(name) for name in names})
                for kind, names in zip(kinds, asked, strict=True)
            ]
            command(*made, **options)

        keyword = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
        given = [each for names in asked for each in names.values()]
        run.__signature__ = inspect.Signature([*given, *keyword])  # type: ignore[attr-defined]
        return run

    return decorate


def print_json(content: object) -> None:
    """Print one JSON document on stdout, and nothing else."""
    typer.echo(json.dumps(content, indent=1, allow_nan=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table on stdout; cells are text, never markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    # A pipe has no width: cells are not truncated there, so that names can be searched.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def read_text(texts: RowTexts, row: int) -> dict[str, str]:
    """Return prompt and response of a row."""
    (text,) = texts.read([row])
    return {"prompt": text.prompt, "response": text.response}


def shown(text: Mapping[str, str]) -> str:
    """Return prompt and response for a table's cell, long ones cut in the middle."""
    return f"{_cut(text['prompt'])} → {_cut(text['response'])}"


def _cut(text: str) -> str:
    line = " ".join(text.split())
    if len(line) <= _SHOWN_CHARACTERS:
        return line
    half = _SHOWN_CHARACTERS // 2
    return f"{line[:half]} … {line[-half:]}"

"""The command that asks who helped one target row: query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradstore.cli.options import (
    NO_TEXT,
    AsJson,
    Checkpoints,
    Run,
    StorePath,
    app,
    print_json,
    print_table,
    read_text,
    shown,
    with_options,
)
from gradstore.errors import BadInput
from gradstore.format.names import printable

if TYPE_CHECKING:
    from pathlib import Path

    from gradstore.scoring.comparable import CheckpointFeatures
    from gradstore.scoring.query import RowInfluence
    from gradstore.store.generation import Generation


@dataclass(frozen=True, kw_only=True)
class Near:
    """The options of `query` that trade rows for time.

    Raises:
        BadInput: a recall of an exact answer.
    """

    approximate: Annotated[
        bool,
        typer.Option(help="Look through lists of near rows (FAISS IVF) rather than at all rows."),
    ] = False
    recall: Annotated[
        float | None,
        typer.Option(help="Of --approximate: share of the true best rows to find. Default: 0.95."),
    ] = None

    def __post_init__(self) -> None:
        """Check it before a store is opened."""
        if self.recall is not None and not self.approximate:
            raise BadInput(
                f"--recall {self.recall:g} needs --approximate; without it nothing is missed."
            )

    def answer(
        self, pairs: list[CheckpointFeatures], target_row: int, top: int, cache: Path | None
    ) -> tuple[RowInfluence, dict[str, Any]]:
        """Ask; return the answer, and what is to be told of how it was found."""
        from gradstore.scoring.query import query_influence
        from gradstore.similarity.approximate import RECALL, query_lists

        if not self.approximate:
            return query_influence(pairs, target_row, top=top), {}
        recall = RECALL if self.recall is None else self.recall
        near = query_lists(pairs, target_row, top=top, recall=recall, cache_dir=cache)
        told = {name: getattr(near, name) for name in ("recall", "nprobe", "lists", "says")}
        return near.answer, {"approximate": told}


@app.command()
@with_options(Near)
def query(
    near: Near,
    store: StorePath,
    target_row: Annotated[int, typer.Option(help="Row of the target set, from 0.")],
    top: Annotated[int, typer.Option(help="Rows to show on each side.")] = 10,
    checkpoints: Checkpoints = "last",
    run: Run = "",
    target: Annotated[str, typer.Option(help="Target set; default: the first.")] = "",
    as_json: AsJson = False,
) -> None:
    """Show who helped and who hurt one target row."""
    from gradstore.scoring.pairing import checkpoint_features, parse_which
    from gradstore.store.reader import open_store

    opened = open_store(store)
    pairs = checkpoint_features(
        opened, parse_which(checkpoints), run=run, targets=[target] if target else None
    )
    answer, told = near.answer(pairs, target_row, top, opened.index_folder)
    train: Generation = pairs[-1].train  # type: ignore[assignment]
    texts = opened.texts(train)
    sides = {"helped": answer.helped, "hurt": answer.hurt}
    listed: dict[str, list[dict[str, Any]]] = {
        side: [
            {"row": int(i), "score": float(answer.values[i]), "source": _source(train, int(i))}
            | ({} if texts is None else read_text(texts, int(i)))
            for i in rows
        ]
        for side, rows in sides.items()
    }
    asked: Generation = pairs[-1].targets[0]  # type: ignore[assignment]
    wanted = opened.texts(asked)
    about = {} if wanted is None else read_text(wanted, target_row)
    if as_json:
        print_json({"target": asked.name, "target_row": target_row, **about,
                    "skipped": dict(answer.skipped), **told, **listed})  # fmt: skip
        return
    if about:
        typer.echo(printable(f"{asked.name}, row {target_row}: {shown(about)}"))
    for side, entries in listed.items():
        print_table(
            ("rank", "row", "cosine", f"source ({side})", *(("text",) if texts else ())),
            [
                (n, e["row"], f"{e['score']:+.4f}", e["source"], *((shown(e),) if texts else ()))
                for n, e in enumerate(entries, 1)
            ],
        )
    if told:
        typer.echo(told["approximate"]["says"])
    if texts is None:
        typer.echo(NO_TEXT)


def _source(train: Generation, row: int) -> str:
    sources = train.sources
    return f"{sources[row][0]}[{sources[row][1]}]" if sources else ""

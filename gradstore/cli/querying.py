"""The command that asks who helped one target row: query."""

from __future__ import annotations

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
)
from gradstore.errors import BadInput
from gradstore.format.names import printable

if TYPE_CHECKING:
    from gradstore.store.generation import Generation


@app.command()
def query(
    store: StorePath,
    target_row: Annotated[int, typer.Option(help="Row of the target set, from 0.")],
    top: Annotated[int, typer.Option(help="Rows to show on each side.")] = 10,
    checkpoints: Checkpoints = "last",
    run: Run = "",
    target: Annotated[str, typer.Option(help="Target set; default: the first.")] = "",
    approximate: Annotated[
        bool,
        typer.Option(help="Look through lists of near rows (FAISS IVF) rather than at all rows."),
    ] = False,
    recall: Annotated[
        float | None,
        typer.Option(help="Of --approximate: share of the true best rows to find. Default: 0.95."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show who helped and who hurt one target row."""
    from gradstore.scoring.pairing import checkpoint_features, parse_which
    from gradstore.scoring.query import query_influence
    from gradstore.store.reader import open_store

    if recall is not None and not approximate:
        raise BadInput(f"--recall {recall:g} needs --approximate; without it nothing is missed.")
    opened = open_store(store)
    pairs = checkpoint_features(
        opened, parse_which(checkpoints), run=run, sets=[target] if target else None
    )
    told: dict[str, Any] = {}
    if approximate:
        from gradstore.similarity.approximate import RECALL, query_lists

        near = query_lists(
            pairs, target_row, top=top, recall=RECALL if recall is None else recall,
            cache_dir=opened.index_folder,
        )  # fmt: skip
        answer = near.answer
        told = {"approximate": {"recall": near.recall, "nprobe": near.nprobe, "lists": near.lists,
                                "says": near.says}}  # fmt: skip
    else:
        answer = query_influence(pairs, target_row, top=top)
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

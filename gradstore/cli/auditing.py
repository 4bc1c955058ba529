"""The command that looks for what is wrong with a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradstore.cli.options import (
    AsJson,
    Run,
    StorePath,
    Targets,
    app,
    print_json,
    print_table,
    shown,
    written_to,
)
from gradstore.errors import expect_whole
from gradstore.format.names import printable

if TYPE_CHECKING:
    from gradstore.similarity.audit import Audit


@app.command()
def audit(
    store: StorePath,
    output: Annotated[
        Path | None, written_to("audit.parquet, .csv or .jsonl: every row with every signal.")
    ] = None,
    top: Annotated[int, typer.Option(help="Rows to show.")] = 20,
    checkpoints: Annotated[
        str, typer.Option(help="Checkpoints to average over: last, all or a number.")
    ] = "all",
    run: Run = "",
    target: Targets = None,
    neighbours: Annotated[
        int | None, typer.Option(help="Nearest rows each row is compared with. Default: 10.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find rows that are probably wrong, repeat others, hurt every target or can't be used."""
    from gradstore.pace import Pace, long_pass
    from gradstore.scoring.pairing import parse_which
    from gradstore.similarity.audit import AuditOptions
    from gradstore.similarity.audit import audit as audit_rows
    from gradstore.storage.tables import check_suffix, write_table
    from gradstore.store.reader import open_store

    if output is not None:
        check_suffix(output)
    expect_whole(top, "top")
    opened = open_store(store)
    rows = max((g.rows for g in opened.generations()), default=0)
    pace = Pace(rows, lambda seconds: typer.echo(long_pass("neighbours", rows, seconds), err=True))
    found = audit_rows(
        opened,
        checkpoints=parse_which(checkpoints),
        run=run,
        targets=target or None,
        options=AuditOptions(neighbours=neighbours),
        on_rows=pace.advance,
    )
    if output is not None:
        write_table(output, found.table)
    first = found.table.slice(0, top).to_pylist()
    if as_json:
        print_json({"generation": found.generation, "checkpoints": list(found.checkpoints),
                    "targets": list(found.targets), "rows": found.table.num_rows,
                    "counts": found.counts, "notes": list(found.notes), "top": first})  # fmt: skip
        return
    _print_summary(found)
    print_table(
        ("rank", "row", "source", "suspicion", "text", "reasons"), [_line(row) for row in first]
    )
    if output is not None:
        typer.echo(f"every row and signal: {output}")


def _print_summary(found: Audit) -> None:
    steps = ", ".join(str(step) for step in found.checkpoints)
    typer.echo(
        printable(f"{found.generation}: {found.table.num_rows:,} rows, checkpoints {steps}, ")
        + f"{len(found.targets)} target set(s)"
    )
    words = {
        "repeated_text": "repeat an earlier text",
        "repeated_gradient": "repeat an earlier gradient",
        "answer_conflict": "answer a prompt otherwise than another row",
        "hurts_all_targets": "hurt every target set",
    }
    counted = [
        f"{count:,} {words.get(name, f'can not be used ({name})')}"
        for name, count in found.counts.items()
        if count
    ]
    typer.echo("; ".join(counted) or "no row repeats another, hurts every target or is unusable")
    for note in found.notes:
        typer.echo(f"note: {note}")


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    """Give the cells of one row of the table on the screen."""
    source = "" if row["source_set"] is None else f"{row['source_set']}[{row['source_row']}]"
    suspicion = "" if row["suspicion"] is None else f"{row['suspicion']:.3f}"
    text = "" if row["prompt"] is None else shown(row)
    return str(row["rank"]), str(row["row"]), source, suspicion, text, row["reasons"]

"""Commands that look into a store and rank its rows: info, verify, score, select."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradstore.cli.choosing import Asked
from gradstore.cli.options import (
    AsJson,
    OnEngine,
    Question,
    StorePath,
    app,
    path_at_home,
    print_json,
    print_table,
    with_options,
    written_to,
)
from gradstore.cli.reranking import Again
from gradstore.errors import BadInput, DamagedData
from gradstore.format.names import printable

if TYPE_CHECKING:
    import pyarrow as pa

    from gradstore.cluster.options import RayOptions
    from gradstore.scoring.comparable import CheckpointFeatures
    from gradstore.scoring.influence import Scores
    from gradstore.scoring.products import InnerProduct
    from gradstore.store.generation import Generation
    from gradstore.store.reader import Store
    from gradstore.store.texts import RowTexts


@app.command()
def info(store: StorePath, as_json: AsJson = False) -> None:
    """Show what a store holds."""
    from gradstore.store.reader import open_store

    content = open_store(store).info()
    if as_json:
        print_json(content)
        return
    typer.echo(f"store {store}  uuid {content['store_uuid']}  schema {content['schema_version']}")
    print_table(
        ("generation", "rows", "usable", "skipped", "dim", "dtype", "projection", "MB",
         "committed"),
        [
            (e["name"], e["rows"], e["usable_rows"], counted(e["status"]), e["dim"], e["dtype"],
             e["projection"].get("method", e["feature"]), f"{e['bytes'] / 1e6:.1f}", e["committed"])
            for e in content["generations"]
        ],
    )  # fmt: skip


@app.command()
def verify(store: StorePath, as_json: AsJson = False) -> None:
    """Check every byte against its checksum; exit 4 if one is wrong."""
    from gradstore.store.reader import open_store
    from gradstore.store.verify import verify_store

    report = verify_store(store)
    faults = [asdict(fault) for fault in report.faults]
    if as_json:
        print_json({"ok": not faults, "faults": faults, "files": report.files,
                    "bytes": report.bytes})  # fmt: skip
    if faults:
        lines = [str(fault) for fault in report.faults[:20]]
        raise DamagedData(
            f'store "{store}" is damaged in {len(faults)} place(s):\n  ' + "\n  ".join(lines)
        )
    if not as_json:
        generations = len(open_store(store).generations())
        typer.echo(
            f"store {store}: {report.files} files, {report.bytes:,} bytes, {generations} "
            "generations, all as committed."
        )


@app.command()
@with_options(Question, OnEngine)
def score(
    question: Question,
    engine: OnEngine,
    output: Annotated[Path | None, written_to("scores.parquet, .csv or .jsonl")] = None,
    as_json: AsJson = False,
) -> None:
    """Score every training row by its cosine influence on the target."""
    from gradstore.storage.tables import check_suffix, write_table

    if output is not None:
        check_suffix(output)
    options = engine.ray()
    store, pairs = _opened(question)
    scores = _scored(question, pairs, options)
    train: Generation = pairs[-1].train  # type: ignore[assignment]
    if output is not None:
        write_table(output, _table_of(train, scores, store.texts(train)))
    if as_json:
        print_json(
            {
                "generation": train.name,
                "targets": [t.name for t in pairs[-1].targets],  # type: ignore[attr-defined]
                "rows": train.rows,
                "usable_rows": int(scores.usable.sum()),
                "skipped": dict(scores.skipped),
                "scores": [s if u else None for s, u in
                           zip(scores.values.tolist(), scores.usable.tolist(), strict=True)],
            }
        )  # fmt: skip
        return
    typer.echo(printable(_summary(train, scores)))
    if output is not None:
        typer.echo(f"scores of all rows: {output}")


@app.command()
@with_options(Question, Asked, Again)
def select(
    question: Question,
    asked: Asked,
    again: Again,
    output: Annotated[Path | None, written_to("selected.jsonl, .csv or .parquet")] = None,
    as_dataset: Annotated[
        Path | None,
        typer.Option(
            help="New folder: a LlamaFactory data set of the rows, in their own format.",
            metavar="DIR",
            parser=path_at_home,
        ),
    ] = None,
) -> None:
    """Write the rows that help the target most, best first."""
    from gradstore.scoring.as_dataset import check_folder, training_keys, write_dataset
    from gradstore.scoring.selection import write_selected
    from gradstore.storage.tables import check_suffix

    if output is None and as_dataset is None:
        raise BadInput("give a file with -o, a folder with --as-dataset, or both.")
    if output is not None:
        check_suffix(output)
    if as_dataset is not None:
        check_folder(as_dataset)
    store, pairs = _opened(question)
    asked.check(pairs)
    second = again.opened(question, pairs, asked.choice())
    scores = _scored(question, pairs)
    train: Generation = pairs[-1].train  # type: ignore[assignment]
    texts = store.texts(train)
    usable = int(scores.usable.sum())
    if second is None:
        rows, values = asked.rows(pairs, scores, question.product()), scores.values
    else:
        rows, values = again.rows(question, second, asked.choice(), scores)
    if output is not None:
        write_selected(output, rows, values, sources=train.sources,
                       row_hashes=train.row_hash, texts=texts)  # fmt: skip
        typer.echo(f"{len(rows)} of {usable} usable rows written to {output}")
    if as_dataset is not None:
        names = write_dataset(as_dataset, rows, values, texts)
        typer.echo(f"{len(rows)} of {usable} usable rows written as data sets to {as_dataset}")
        assert texts is not None  # or nothing was written
        keys = training_keys(as_dataset, names, texts, train.record)
        typer.echo(printable(f"train on them: {keys}"))


def _opened(question: Question) -> tuple[Store, list[CheckpointFeatures]]:
    from gradstore.scoring.pairing import checkpoint_features, parse_which
    from gradstore.store.reader import open_store

    question.product()
    store = open_store(question.store)
    which = parse_which(question.checkpoints)
    return store, checkpoint_features(
        store, which, run=question.run, targets=question.target or None
    )


def _scored(
    question: Question, pairs: list[CheckpointFeatures], options: RayOptions | None = None
) -> Scores:
    from gradstore.pace import Pace, long_pass
    from gradstore.scoring.influence import influence_scores

    product = question.product()
    if product.preconditioner == "subspace":
        typer.echo(f"subspace: {_kept(pairs)}", err=True)
    elif product.preconditioner == "fisher":
        typer.echo(f"fisher: {_fitted(pairs, product)}", err=True)
    n = pairs[-1].train.rows
    pace = Pace(n, lambda seconds: typer.echo(long_pass("scores", n, seconds), err=True))
    engine = None
    if options is not None:
        from gradstore.scoring.engines import RayScan

        engine = RayScan(question.store, options, lambda line: typer.echo(line, err=True))
    return influence_scores(
        pairs,
        subtask_sizes=question.subtask_sizes(),
        aggregation=question.aggregation,  # type: ignore[arg-type]
        on_rows=pace.advance,
        product=product,
        engine=engine,
    )


def _table_of(train: Generation, scores: Scores, texts: RowTexts | None) -> pa.Table:
    """Make a table: row, score, usable, best_subtask, source_set, source_row, row_hash, text."""
    import pyarrow as pa

    sources = train.sources
    text = {} if texts is None else texts.table(["prompt", "response"])
    return pa.table(
        {
            "row": pa.array(range(train.rows), pa.int64()),
            "score": pa.array(scores.values, pa.float32(), from_pandas=True),
            "usable": pa.array(scores.usable, pa.bool_()),
            "best_subtask": pa.array(scores.best_subtask, pa.int32()),
            "source_set": pa.array([s[0] for s in sources] if sources else [None] * train.rows,
                                   pa.string()),
            "source_row": pa.array([s[1] for s in sources] if sources else [None] * train.rows,
                                   pa.int64()),
            "row_hash": pa.array([bytes(h).hex() for h in train.row_hash], pa.string()),
            **{name: text[name] for name in ("prompt", "response") if texts is not None},
        }
    )  # fmt: skip


def _kept(checkpoints: Sequence[CheckpointFeatures]) -> str:
    from gradstore.scoring.subspace import subspace_told

    told = subspace_told(checkpoints)
    each = ", ".join(map(str, told["dims"]))
    return f"{each} dimensions keep {told['kept']:.0%} of the {told['rows']} target rows' squares"


def _fitted(checkpoints: Sequence[CheckpointFeatures], product: InnerProduct) -> str:
    told = product.metric.told(checkpoints)
    levels = ", ".join(f"{level:.3g}" for level in told["level"])
    rows = ", ".join(f"{rows:,}" for rows in told["rows"])
    return f"damping level {levels} ({told['damping']:g} times the mean eigenvalue), of {rows} rows"


def _summary(train: Generation, scores: Scores) -> str:
    import numpy as np

    good = scores.values[scores.usable]
    quartiles = ", ".join(f"{q:+.4f}" for q in np.quantile(good, [0, 0.25, 0.5, 0.75, 1]))
    skipped = counted(scores.skipped) or "none"
    return (
        f"{train.name}: {len(good)} of {train.rows} rows scored, skipped: {skipped}\n"
        f"score minimum, quartiles, maximum: {quartiles}\n"
        "above 0: a step with the row lowers the target's loss further than one without it"
    )


def counted(status: Mapping[str, int]) -> str:
    """Write why rows are not usable and how many: `3 masked, 1 nonfinite`; "" where all are."""
    return ", ".join(f"{count} {why}" for why, count in status.items() if count and why != "ok")

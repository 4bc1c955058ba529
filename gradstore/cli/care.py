"""Commands that care for a store: gc."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from gradstore.cli.options import AsJson, StorePath, app, print_json, print_table

if TYPE_CHECKING:
    from gradstore.store.cleaning import CleanUp

DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")]


@app.command()
def gc(
    store: StorePath,
    keep_generations: Annotated[
        int | None,
        typer.Option(help="Newest steps to keep of train and of each target set. Default: all."),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Remove what a store no longer needs: scratch of dead processes, attempts that failed."""
    from gradstore.storage.local import StoreFiles
    from gradstore.store.cleaning import clean_store, plan_clean_up
    from gradstore.store.held import held_store
    from gradstore.store.reader import open_store

    if dry_run:
        opened = open_store(store)
        found = plan_clean_up(StoreFiles(store), opened, keep_generations)
    else:
        with held_store(store) as (files, view):
            found = clean_store(files, view, keep_generations)
            opened = view()
    if as_json:
        print_json({"removed": not dry_run, "bytes": found.bytes,
                    "removals": [asdict(each) for each in found.removals],
                    "kept_unfinished": _unfinished(found, opened.planned())})  # fmt: skip
        return
    _print_clean_up(found, opened.planned(), dry_run=dry_run)


def _print_clean_up(found: CleanUp, planned: list[str], *, dry_run: bool) -> None:
    if found.removals:
        print_table(
            ("why", "what", "bytes"), [(r.why, r.path, f"{r.bytes:,}") for r in found.removals]
        )
    counts = Counter(each.why for each in found.removals)
    parts = ", ".join(f"{count} {why}" for why, count in counts.items())
    verb = "would be removed" if dry_run else "removed"
    typer.echo(f"{found.bytes:,} bytes {verb}" + (f": {parts}" if parts else ""))
    if unfinished := _unfinished(found, planned):
        typer.echo(f"kept: {', '.join(unfinished)}, not finished; the build goes on with what is")


def _unfinished(found: CleanUp, planned: list[str]) -> list[str]:
    return [name for name in planned if name not in found.abandoned]

"""Commands that care for a store: gc, repair."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradstore.cli.options import AsJson, StorePath, app, print_json, print_table
from gradstore.errors import DamagedData
from gradstore.format.names import printable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gradstore.store.cleaning import CleanUp
    from gradstore.store.damage import Damage
    from gradstore.store.repair import Recompute

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


def repair_told(
    store: Path, recompute: Recompute | None = None, *, dry_run: bool, as_json: bool
) -> None:
    """Repair a store and print what was damaged, what is whole again, and what helps.

    Args:
        store: its folder.
        recompute: from the run's configuration, where that was given.
        dry_run: only say what is damaged.
        as_json: print JSON.

    Raises:
        DamagedData: something is damaged still.
    """
    from gradstore.store.damage import assess
    from gradstore.store.repair import Repaired, repair_store

    if dry_run:
        found = tuple(assess(store))
        result = Repaired(found, found)
    else:
        result = repair_store(store, recompute)
    mended = [damage for damage in result.found if damage not in result.left]
    if as_json:
        print_json({"ok": not result.left, "mended": [_plain(each) for each in mended],
                    "left": [_plain(each) for each in result.left],
                    "notes": list(result.notes)})  # fmt: skip
    else:
        for head, listed in (("whole again", mended), ("damaged", result.left)):
            if listed:
                print_table((head, "rows", "files", "what helps"), [_cells(d) for d in listed])
        typer.echo(f"store {store}: {len(mended)} thing(s) whole again, {len(result.left)} damaged")
        for note in result.notes:
            typer.echo(printable(note))
    if result.left:
        raise DamagedData(f'store "{store}" {_next_step(result.left, recompute, dry_run)}')


def _next_step(left: Sequence[Damage], recompute: Recompute | None, dry_run: bool) -> str:
    remedies = {damage.remedy for damage in left}
    if dry_run and "store" in remedies:
        return "is damaged. Run the command without --dry-run."
    if recompute is None and "config" in remedies:
        return (
            "is damaged still. Give the configuration of its run or build: "
            "`dataflex-cli gradstore repair STORE CONFIG`."
        )
    return (
        "is damaged still; the table says what is lost. Restore those files from a copy, or build "
        "another store with gradstore=PATH."
    )


def _plain(damage: Damage) -> dict[str, Any]:
    unit = damage.unit
    return {
        "what": damage.what,
        "generation": damage.generation or None,
        "unit": None if unit is None else unit.index,
        "rows": None if unit is None else [unit.start, unit.stop],
        "sources": [list(source) for source in damage.sources],
        "files": [asdict(fault) for fault in damage.faults],
        "remedy": damage.remedy,
        "says": damage.says,
    }


def _cells(damage: Damage) -> tuple[str, ...]:
    unit, rows = damage.unit, ""
    if unit is not None:
        rows = f"{unit.start} to {unit.stop - 1}"
        if damage.sources:
            ends = dict.fromkeys(
                f"{name}[{at}]" for name, at in damage.sources[:: max(1, len(damage.sources) - 1)]
            )
            rows += f" ({' to '.join(ends)})"
    title = damage.what if unit is None else f"{damage.generation}, unit {unit.index}"
    return title, rows, "\n".join(fault.file for fault in damage.faults), damage.says

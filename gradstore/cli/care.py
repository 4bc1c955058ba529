"""Commands that care for a store: gc, repair, forget, migrate."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradstore.cli.options import AsJson, StorePath, app, print_json, print_table
from gradstore.errors import BadInput, DamagedData
from gradstore.format.layout import receipt_path
from gradstore.format.names import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradstore.format.forgotten import Receipt, Request
    from gradstore.storage.location import Location
    from gradstore.store.cleaning import CleanUp
    from gradstore.store.damage import Damage
    from gradstore.store.forgetting import Affected
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
    from gradstore.storage.places import files_at
    from gradstore.store.cleaning import clean_store, plan_clean_up
    from gradstore.store.held import held_store
    from gradstore.store.reader import open_store

    if dry_run:
        opened = open_store(store)
        found = plan_clean_up(files_at(store), opened, keep_generations)
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


@app.command()
def forget(
    store: StorePath,
    row: Annotated[
        list[int] | None, typer.Option(help="Row of the training set, from 0; repeat for several.")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="Data set, or a row of its file; repeat.", metavar="NAME[:INDEX]"),
    ] = None,
    target: Annotated[str, typer.Option(help="Target set that --row counts in.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; there is no way back.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Remove rows from every generation, text and index of a store, for good, with a receipt.

    Rows of equal content go with them. Without --row and --source an interrupted removal is
    finished.
    """
    from gradstore.store.asked_rows import AlreadyRemoved, asked_rows
    from gradstore.store.forgetting import affected, finish_removals, request_for
    from gradstore.store.forgetting import forget as remove
    from gradstore.store.held import held_store

    with held_store(store) as (files, view):
        begun = view().requests()
        receipts = [] if dry_run else finish_removals(files, view)
        try:
            hashes = asked_rows(files, view(), row or (), source or (), target)
        except AlreadyRemoved:
            if not receipts:
                raise
            hashes = set()  # the removal that was finished now is the one that is asked for again
        if hashes:
            request = request_for(files, view(), hashes)
            found = affected(files, view(), request.key, set(request.ids))
            if as_json and dry_run:
                print_json({"distinct_rows": len(hashes), **asdict(found)})
            elif not as_json:
                _print_affected(found, len(hashes))
            if not dry_run:
                _confirm(yes)
                receipts.append(remove(files, view, request))
    if not hashes and not receipts:
        _say_where_it_stands(begun)
    elif as_json and receipts:
        print_json([receipt.to_dict() for receipt in receipts])
    for receipt in () if as_json else receipts:
        typer.echo(
            f"forgotten; the receipt is {store / receipt_path(receipt.number)}. Not reached: the "
            "data set's own files, reports, selections and tables made of it, copies and backups."
        )


@app.command()
def migrate(store: StorePath, as_json: AsJson = False) -> None:
    """Verify a store of an older schema and bring it to today's, in place, by one rename."""
    from gradstore.format.layout import NEEDS
    from gradstore.store.migration import migrate_store

    before, now = migrate_store(store)
    if as_json:
        print_json({"before": before, "now": now, "needs": NEEDS[now]})
        return
    done = f"was schema {before} and is {now} now" if before != now else f"has schema {now} already"
    typer.echo(f"store {store} {done}; {NEEDS[now]} reads it. No other byte changed.")


def _say_where_it_stands(begun: Sequence[tuple[Request, Receipt | None]]) -> None:
    """Say how far removals are, where no rows were named."""
    if not begun:
        raise BadInput("no removal was begun here; give --row N or --source NAME[:INDEX].")
    left = sum(receipt is None for _, receipt in begun)
    rest = f"{left} not finished: run without --dry-run" if left else "nothing is left to do"
    typer.echo(f"{len(begun)} removal(s) begun, {rest}.")


def _print_affected(found: Affected, distinct: int) -> None:
    listed = [(name, str(count), "written anew" if name in found.newest else "removed")
              for name, count in found.rows.items()]  # fmt: skip
    listed += [(name, "", "not finished: removed") for name in found.unfinished]
    print_table(("generation", "rows", "what happens to it"), listed)
    typer.echo(
        f"{distinct} distinct row(s); text of {len(found.texts)} row set(s) is written anew, every "
        f"index removed; {found.chunk_bytes:,} bytes of features are replaced"
    )


def _confirm(yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise BadInput("nothing was removed: there is no way back, so add --yes.")
    typer.confirm("Remove these rows for good?", abort=True)


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
    store: Location, recompute: Recompute | None = None, *, dry_run: bool, as_json: bool
) -> None:
    """Repair a store and print what was damaged, what is whole again, and what helps.

    Args:
        store: where it is.
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

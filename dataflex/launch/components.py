"""The catalogue of `dataflex-cli components`: every registered strategy and its parameters."""

from __future__ import annotations

import inspect
from typing import Any

from rich.markup import escape

from dataflex.config.parameters import describe
from dataflex.config.presets import presets_of
from dataflex.config.registry import (
    KINDS,
    PACKAGES,
    declarations,
    descriptions,
    parameters,
    strategies,
)
from dataflex.run.strategy import Strategy


def catalogue() -> list[dict[str, Any]]:
    """List the strategies: kind, name, summary, paper, presets, parameters with defaults.

    `accepts` says in words what each parameter may be, for those whose annotation is checked;
    `describes` what it is, for those that the docstring explains.
    """
    buckets = {kind: bucket for bucket, kind in KINDS.values()}
    return [
        {
            "kind": kind,
            "name": name,
            "summary": (inspect.getdoc(cls) or "").split("\n")[0],
            "paper": getattr(cls, "paper", Strategy.paper),  # a registered class may have no base
            "presets": sorted(
                key
                for key, preset in presets_of(buckets[kind]).items()
                if preset.get("name", key) == name
            ),
            "parameters": {
                key: None if p.default is p.empty else _plain(p.default)
                for key, p in parameters(cls).items()
            },
            "accepts": {key: describe(known.hint) for key, known in declarations(cls).items()},
            "describes": {
                key: words for key, words in descriptions(cls).items() if key in parameters(cls)
            },
        }
        for kind in PACKAGES
        for name, cls in strategies(kind).items()
    ]


def show(entries: list[dict[str, Any]]) -> None:
    """Print the catalogue, one table per kind of strategy."""
    from rich.console import Console
    from rich.table import Table

    train_types = {kind: train_type for train_type, (_, kind) in KINDS.items()}
    console = Console()
    for kind in PACKAGES:
        table = Table(title=f"train_type: {train_types[kind]}", title_justify="left",
                      show_lines=True)  # fmt: skip
        for column in ("component_name", "what it does", "component_params"):
            table.add_column(column)
        for entry in (e for e in entries if e["kind"] == kind):
            others = [preset for preset in entry["presets"] if preset != entry["name"]]
            name = entry["name"] + "".join(f"\n  {preset}" for preset in others)
            summary = "\n".join(filter(None, (entry["summary"], entry["paper"])))
            settings = "\n".join(
                f"{key}: {default}" + (f"  # {accepts[key]}" if key in accepts else "")
                for accepts in [entry["accepts"]]
                for key, default in entry["parameters"].items()
            )
            table.add_row(escape(name), escape(summary), escape(settings))
        if table.row_count:
            console.print(table)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value

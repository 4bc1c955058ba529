"""What `dataflex-cli components` prints: every registered strategy and its parameters."""

from __future__ import annotations

import inspect
from typing import Any

from dataflex.registry import PACKAGES, parameters, strategies


def catalogue() -> list[dict[str, Any]]:
    """One entry per strategy: kind, name, summary, parameters with defaults."""
    return [
        {
            "kind": kind,
            "name": name,
            "summary": (inspect.getdoc(cls) or "").split("\n")[0],
            "parameters": {
                key: None if p.default is p.empty else _plain(p.default)
                for key, p in parameters(cls).items()
            },
        }
        for kind in PACKAGES
        for name, cls in strategies(kind).items()
    ]


def show(entries: list[dict[str, Any]]) -> None:
    """Print the catalogue as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Strategies (component_name or preset `name`)", show_lines=True)
    for column in ("kind", "name", "what it does", "component_params and defaults"):
        table.add_column(column)
    for entry in entries:
        settings = "\n".join(f"{k}: {v}" for k, v in entry["parameters"].items())
        table.add_row(entry["kind"], entry["name"], entry["summary"], settings)
    Console().print(table)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value

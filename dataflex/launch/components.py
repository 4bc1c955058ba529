"""The catalogue of `dataflex-cli components`: every strategy, and what each of its names sets."""

from __future__ import annotations

import inspect
import json
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
    """List the strategies: kind, name, summary, paper, presets, parameters and their values.

    `parameters` are the values that a run with `component_name: NAME` works with: those of the
    preset of that name, and the constructor's defaults for the rest; `preset_parameters` the same
    for each preset. `accepts` says in words what each parameter may be, for those whose annotation
    is checked; `describes` what it is, for those that the docstring explains.
    """
    buckets = {kind: bucket for bucket, kind in KINDS.values()}
    return [
        {
            "kind": kind,
            "name": name,
            "summary": (inspect.getdoc(cls) or "").split("\n")[0],
            "paper": getattr(cls, "paper", Strategy.paper),  # a registered class may have no base
            **_values(cls, name, presets_of(buckets[kind])),
            "accepts": {key: describe(known.hint) for key, known in declarations(cls).items()},
            "describes": {
                key: words for key, words in descriptions(cls).items() if key in parameters(cls)
            },
        }
        for kind in PACKAGES
        for name, cls in strategies(kind).items()
    ]


def _values(cls: type, name: str, presets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the presets of a strategy, and what each and its own name set, defaults included."""
    defaults = {
        key: None if p.default is p.empty else _plain(p.default)
        for key, p in parameters(cls).items()
    }
    merged = {
        key: {**defaults, **(preset.get("params") or {})}
        for key, preset in sorted(presets.items())
        if preset.get("name", key) == name
    }
    return {
        "presets": list(merged),
        "parameters": merged.get(name, defaults),
        "preset_parameters": merged,
    }


def other_presets(entry: dict[str, Any]) -> list[tuple[list[str], dict[str, Any]]]:
    """List an entry's presets of other names: those that are alike, and what they set differently.

    Returns:
        Names, and the values that differ from the entry's `parameters`.
    """
    found: list[tuple[list[str], dict[str, Any]]] = []
    for name, values in entry["preset_parameters"].items():
        if name == entry["name"]:
            continue
        own = entry["parameters"]
        other = {key: value for key, value in values.items() if value != own.get(key)}
        alike = next((names for names, known in found if known == other), None)
        if alike is None:
            found.append(([name], other))
        else:
            alike.append(name)
    return found


def as_yaml(value: object) -> str:
    """Return a parameter's value as a configuration would hold it, on one line."""
    return value if isinstance(value, str) else json.dumps(value)


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
            table.add_row(escape(name), escape(summary), escape("\n".join(_settings(entry))))
        if table.row_count:
            console.print(table)


def _settings(entry: dict[str, Any]) -> list[str]:
    """Return the lines of the last column: each parameter, then what other presets set."""
    accepts = entry["accepts"]
    lines = [
        f"{key}: {as_yaml(value)}" + (f"  # {accepts[key]}" if key in accepts else "")
        for key, value in entry["parameters"].items()
    ]
    for names, differing in other_presets(entry):
        lines += [f"{', '.join(names)}:"]
        lines += [f"  {key}: {as_yaml(value)}" for key, value in differing.items()]
    return lines


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value

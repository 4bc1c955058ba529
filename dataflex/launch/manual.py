"""The keys of a configuration by group, a line each: the end of `dataflex-cli train --help`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from dataflex.bridge.arguments import described_keys
from dataflex.config.keys import DataFlexConfig
from dataflex.config.sources import SourceField, find_class

#: Column at which what a key means begins, unless its name is longer.
_INDENT = 29


def key_lines(width: int) -> Iterator[str]:
    """Yield the lines of the list: DataFlex's keys, then LlamaFactory's by argument class.

    Args:
        width: columns; what a key means is cut to one line of them.
    """
    ours = find_class(DataFlexConfig.__module__, DataFlexConfig.__name__)
    yield "Keys of CONFIG"
    yield from _group("DataFlex", list(ours.fields().values()) if ours is not None else [], width)
    groups: dict[str, list[SourceField]] = {}
    for key in described_keys().values():
        groups.setdefault(key.owner, []).append(key)
    for owner, keys in groups.items():
        package, _, name = owner.partition(".")
        title = {"llamafactory": "LlamaFactory", "transformers": "Transformers"}.get(package)
        yield from _group(f"{title or package}: {name}", keys, width)


def _group(title: str, keys: list[SourceField], width: int) -> Iterator[str]:
    yield ""
    yield f"{title}:"
    for key in keys:
        name = f"  {key.name} ".ljust(_INDENT)
        words = textwrap.shorten(
            key.help, max(20, width - len(name)), placeholder=" ...", break_on_hyphens=False
        )
        yield f"{name}{words}"

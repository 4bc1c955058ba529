"""`dataflex-cli gradstore`: look into a store, verify it, ask it, and care for it."""

from gradstore.cli import asking, auditing, care, querying, serving  # noqa: F401 - their commands
from gradstore.cli.options import (
    Checkpoints,
    Output,
    Run,
    StorePath,
    app,
    path_at_home,
    print_json,
    with_options,
)

__all__ = [
    "Checkpoints",
    "Output",
    "Run",
    "StorePath",
    "app",
    "path_at_home",
    "print_json",
    "with_options",
]

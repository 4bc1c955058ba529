"""`dataflex-cli gradstore`: look into a store, verify it, and ask it."""

from gradstore.cli import asking, auditing, serving  # noqa: F401 - their commands
from gradstore.cli.options import app, path_at_home, print_json

__all__ = ["app", "path_at_home", "print_json"]

"""Commands, called in this process, on a store that has something to say to each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from gradstore.cli import app
from gradstore.format.text_table import Text

if TYPE_CHECKING:
    from conftest import StoreKit


class Commands:
    """`commands("score", STORE, "--json")`: what a command says, or the error it ends with."""

    def __init__(self, kit: StoreKit) -> None:
        self._kit = kit

    def __call__(self, *arguments: object) -> Any:
        found = CliRunner().invoke(app, [str(each) for each in arguments])
        if found.exception is not None and not isinstance(found.exception, SystemExit):
            raise found.exception
        return json.loads(found.stdout) if "--json" in arguments else found.stdout

    def store(self, place: str | Path) -> None:
        """Build a store of two checkpoints, with text."""
        kit = self._kit
        with kit.writer(place) as writer:
            writer.keep_texts(kit.rows(24), [Text(f"p {i}", f"r {i}", 3) for i in range(24)])
            for step in (1, 2):
                kit.add(writer, f"train/{step}", 24)
                kit.add(writer, f"target/dev/{step}", 8)

    def without_ids(self, answer: Any) -> Any:
        """Keep of an answer what two stores of the same content share."""
        if isinstance(answer, dict):
            drop = ("store_uuid", "head", "commit", "path", "store")
            return {k: self.without_ids(v) for k, v in answer.items() if k not in drop}
        if isinstance(answer, list):  # only a folder has empty ones that could be removed
            return [self.without_ids(each) for each in answer if "staging" not in str(each)]
        return answer


@pytest.fixture
def commands(kit: StoreKit) -> Commands:
    return Commands(kit)

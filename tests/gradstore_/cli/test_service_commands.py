"""Every command takes the address of a service, and says of it what it says of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gradstore.cli import app
from gradstore.errors import BadInput
from gradstore.format.text_table import Text
from gradstore.store.repair import repair_store
from gradstore.store.verify import verify_store


def told(*arguments: object) -> Any:
    found = CliRunner().invoke(app, [str(each) for each in arguments])
    if found.exception is not None:
        raise found.exception
    return json.loads(found.stdout) if "--json" in arguments else found.stdout


def build(kit: Any, place: str | Path) -> None:
    with kit.writer(place) as writer:
        writer.keep_texts(kit.rows(24), [Text(f"p {i}", f"r {i}", 3) for i in range(24)])
        for name, n in (("train/1", 24), ("target/dev/1", 8), ("train/2", 24), ("target/dev/2", 8)):
            kit.add(writer, name, n)


def without_ids(answer: Any) -> Any:
    """An answer without what differs between any two stores."""
    if isinstance(answer, dict):
        drop = ("store_uuid", "head", "commit", "path", "store")
        return {k: without_ids(v) for k, v in answer.items() if k not in drop}
    if isinstance(answer, list):  # a service shows no empty folder that could be removed
        return [without_ids(each) for each in answer if "staging" not in str(each)]
    return answer


def test_commands_answer_of_a_service_as_of_a_folder(
    kit: Any, service: Any, tmp_path: Path
) -> None:
    build(kit, service.address)
    build(kit, tmp_path / "s")
    for command in (["info"], ["verify"], ["score", "--checkpoints", "all"],
                    ["query", "--target-row", 1, "--top", 3],
                    ["gc", "--keep-generations", 1, "--dry-run"],
                    ["gc", "--keep-generations", 1], ["info"], ["verify"]):  # fmt: skip
        name, *options = command
        answers = [
            told(name, store, *options, "--json") for store in (service.address, tmp_path / "s")
        ]
        assert without_ids(answers[0]) == without_ids(answers[1]), command
    for number, store in enumerate((service.address, tmp_path / "s")):
        told("select", store, "-k", 5, "-o", tmp_path / f"{number}.jsonl")
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes() != b""


def test_what_is_damaged_and_committed_is_repaired_where_it_lies(kit: Any, service: Any) -> None:
    build(kit, service.address)
    chunk = service.folder / "generations/train/1/row_hash/c/0/0"
    chunk.write_bytes(b"")
    with pytest.raises(BadInput, match="damaged is repaired where the store lies"):
        repair_store(service.address)
    service.stop()
    assert repair_store(service.folder).left == ()
    assert verify_store(service.folder).ok
    service.start()
    assert verify_store(service.address).ok

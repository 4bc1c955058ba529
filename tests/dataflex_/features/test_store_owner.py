"""Whose store it is, space by space, and whose output folder."""

from __future__ import annotations

import errno
import fcntl
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dataflex.features.store_owner import check_owner
from dataflex.run.output_owner import own_output
from gradstore.errors import ProvenanceMismatch, StoreBusy
from gradstore.format.names import GenerationName
from gradstore.format.records import RowSet, embedding_record, row_hash
from gradstore.store.reader import Store, open_store
from gradstore.store.writer import StoreWriter

ROWS = RowSet.from_hashes([row_hash([i], [i]) for i in range(4)])


def run(run_id: str, rows: RowSet = ROWS, prefix: str = "") -> Any:
    data = SimpleNamespace(train=SimpleNamespace(row_set=rows), targets=[])
    config = SimpleNamespace(store_run=prefix)
    return SimpleNamespace(run_id=run_id, data=data, config=config)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Embeddings of the model in training, by run "a", and of another model, by anybody."""
    with StoreWriter(tmp_path / "s", space="own", provenance={}) as writer:
        for space, owner in ((writer, "a"), (writer.with_space("minilm", {}), "ff")):
            name = GenerationName("train", 0)
            record = embedding_record(name, space=space.space, run_id=owner, model_hash="ff")
            generation = space.begin(record, ROWS, dim=2)
            ones = np.ones(4)
            generation.write_unit(0, np.ones((4, 2)), ones, np.zeros(4, np.uint8), ones)
            generation.commit()
    return open_store(tmp_path / "s")


def test_embeddings_of_another_run_are_refused_where_this_run_would_write_them(
    store: Store,
) -> None:
    check_owner(store, run("b"))
    check_owner(store, run("a"), space="own")
    check_owner(store, run("b", prefix="mine"), space="own")
    with pytest.raises(ProvenanceMismatch, match=r"own/train/0 was made by run a, this is run b"):
        check_owner(store, run("b"), space="own")


def test_embeddings_of_a_model_that_is_not_trained_are_shared(store: Store) -> None:
    for run_id in ("a", "b"):
        check_owner(store, run(run_id), space="minilm", run_id="ff")
    with pytest.raises(ProvenanceMismatch, match="by run ff, this is run ee"):
        check_owner(store, run("a"), space="minilm", run_id="ee")


def test_a_prefix_that_belongs_to_another_space_is_refused(store: Store) -> None:
    with pytest.raises(ProvenanceMismatch, match="is of space 'minilm', this run writes to 'grad"):
        check_owner(store, run("ff", prefix="minilm"))


def test_rows_are_compared_with_those_of_any_space(store: Store) -> None:
    other = RowSet.from_hashes([row_hash([i], [i]) for i in range(1, 5)])
    with pytest.raises(ProvenanceMismatch, match=r"train\.rows differs.*stored with minilm/train"):
        check_owner(store, run("a", other))


def test_an_output_folder_has_one_run_until_it_ends(tmp_path: Path) -> None:
    first = own_output(tmp_path)
    with pytest.raises(StoreBusy, match="choose another output_dir"):
        own_output(tmp_path)
    first.release()
    own_output(tmp_path).release()


def test_without_flock_a_run_trains_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING):
        own_output(tmp_path).release()
    assert f"{tmp_path} cannot be locked" in caplog.text
    assert "Function not implemented" in caplog.text

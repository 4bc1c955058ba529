"""The text of a row set: kept once, read by position, crash-safe, never shown damaged."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstore.errors import BadInput, DamagedData, StoreIOError
from gradstore.format import text_table
from gradstore.format.commits import Commit
from gradstore.format.text_table import Text
from gradstore.scoring.frames import open_store as open_asked
from gradstore.storage.local import StoreFiles
from gradstore.storage.reading import ReadFiles
from gradstore.store.reader import open_store
from gradstore.store.verify import verify_store

N = 600
HOSTILE = ["<script>alert(1)</script>", "\x1b[31m\x00\u202e", "[/]", "\ud800 half", "x" * 100_000]


def texts(n: int = N) -> list[Text]:
    answers = HOSTILE + [f"answer {i}" for i in range(len(HOSTILE), n)]
    return [
        Text(f"question {i}", answers[i], i + 3, json.dumps({"q": i, "a": answers[i]}))
        for i in range(n)
    ]


@pytest.fixture
def store(kit: Any, fast_path: Path) -> Path:
    path = fast_path / "s"
    with kit.writer(path) as writer:
        writer.keep_texts(kit.rows(N), texts(), {"set one": {"columns": {"prompt": "q"}}})
        kit.add(writer, n=N)
    return path


def test_rows_come_back_with_origin_and_hash_in_the_order_asked_for(kit: Any, store: Path) -> None:
    opened = open_store(store)
    generation = opened.generation("train/1")
    found = opened.texts(generation)
    assert found is not None
    assert len(found) == N
    wanted = [599, 0, 256, 255, 0]
    for row, text in zip(wanted, found.read(wanted), strict=True):
        expected = texts()[row]
        assert (text.row, text.data_set, text.source_row) == (row, "set one", row)
        assert (text.prompt, text.tokens) == (expected.prompt, expected.tokens)
        assert text.response == expected.response.replace("\ud800", "?")
        assert text.original == expected.original
        assert text.row_hash == kit.rows(N).hashes[row].tobytes().hex()
    with pytest.raises(BadInput, match="rows are 0 to 599"):
        found.read([600])
    assert found.formats == {"set one": {"columns": {"prompt": "q"}}}
    assert found.table(["row"])["row"].to_pylist() == list(range(N))
    with pytest.raises(BadInput, match="no column 'words'"):
        found.table(["words"])


def test_threads_read_the_same_table_at_once_and_its_bytes_are_checked_once(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_store(store)
    found = opened.texts(opened.generation("train/1"))
    assert found is not None

    class OfOneThread(pq.ParquetFile):
        def __init__(self, source: Any) -> None:
            super().__init__(source)
            self.thread = threading.get_ident()

        def read_row_group(self, *args: Any) -> Any:
            assert self.thread == threading.get_ident()
            return super().read_row_group(*args)

    monkeypatch.setattr(pq, "ParquetFile", OfOneThread)
    mapped, whole = [], ReadFiles.map
    monkeypatch.setattr(ReadFiles, "map", lambda *a: mapped.append(a) or whole(*a))

    def look(seed: int) -> None:
        for row in np.random.default_rng(seed).integers(0, N, 40).tolist():
            assert found.read([row])[0].prompt == f"question {row}"
            assert found.table(["prompt"])["prompt"][row].as_py() == f"question {row}"

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(look, seed) for seed in range(8)]:
            done.result(60)
    assert len(mapped) == 1


def test_any_parquet_reader_opens_the_table(store: Path) -> None:
    (folder,) = (store / "texts").iterdir()
    assert pq.read_table(folder)["prompt"].to_pylist() == [text.prompt for text in texts()]


def test_generations_of_the_same_rows_share_one_table_which_is_written_once(
    kit: Any, store: Path
) -> None:
    def never() -> Iterator[Text]:
        raise AssertionError("read again")
        yield

    with kit.writer(store) as writer:
        writer.keep_texts(kit.rows(N), never())
        kit.add(writer, "train/2", n=N)
        kit.add(writer, "target/other/2", n=5)
    opened = open_store(store)
    assert opened.texts(opened.generation("train/2")) is opened.texts(opened.generation("train/1"))
    assert opened.texts(opened.generation("target/other/2")) is None
    assert [entry["text"] for entry in opened.info()["generations"]] == [True, True, False]


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_parts_hold_every_row_once_in_order_however_they_are_cut(sizes: list[int]) -> None:
    from gradstore.store import text_writer

    limit, text_writer.PART_BYTES = text_writer.PART_BYTES, 50
    try:
        given_texts = [Text("p" * size, "", i) for i, size in enumerate(sizes)]
        parts = list(text_writer._cut(given_texts))
    finally:
        text_writer.PART_BYTES = limit
    assert [text for part in parts for text in part] == given_texts
    assert all(sum(len(text.prompt) for text in part[:-1]) < 50 for part in parts)


def test_a_large_table_is_cut_into_parts(
    kit: Any, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstore.store.text_writer.PART_ROWS", 256)
    path = fast_path / "s"
    with kit.writer(path) as writer:
        writer.keep_texts(kit.rows(N), texts())
        kit.add(writer, n=N)
    opened = open_store(path)
    found = opened.texts(opened.generation("train/1"))
    assert found is not None
    assert [text.prompt for text in found.read([255, 256, 599, 511, 512])] == [
        f"question {i}" for i in (255, 256, 599, 511, 512)
    ]
    assert len(list((path / "texts").glob("*/*.parquet"))) == 3
    assert verify_store(path).ok


@pytest.mark.parametrize("n", [N - 1, N + 1])
def test_another_number_of_texts_than_rows_is_refused_and_nothing_committed(
    kit: Any, fast_path: Path, n: int
) -> None:
    with kit.writer(fast_path / "s") as writer:
        with pytest.raises(BadInput, match="texts for 600 rows"):
            writer.keep_texts(kit.rows(N), texts(n))
        assert writer.store.head is None


def test_a_flipped_byte_a_missing_part_and_a_foreign_file_are_reported(store: Path) -> None:
    (part,) = (store / "texts").glob("*/*.parquet")
    data = part.read_bytes()
    places = np.random.default_rng(0).integers(0, len(data), 40)
    for place in places:
        part.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        opened = open_store(store)
        with pytest.raises(DamagedData, match=r"parquet.*expected sha256"):
            opened.texts(opened.generation("train/1")).read([0])  # type: ignore[union-attr]
        assert not verify_store(store).ok
    for content in (None, b"", data + b"x"):
        part.unlink()
        if content is not None:
            part.write_bytes(content)
        opened = open_store(store)
        with pytest.raises(DamagedData, match="expected"):
            opened.texts(opened.generation("train/1")).read([0])  # type: ignore[union-attr]
        assert not verify_store(store).ok
        part.write_bytes(data)
    assert verify_store(store).ok
    part.with_name("1.parquet").write_bytes(data)
    assert "no file of this name" in str(verify_store(store).faults[0])


def test_a_sealed_table_of_other_columns_or_rows_is_damage(store: Path) -> None:
    """Whoever re-seals a commit around another file still gets no other rows shown."""
    from gradstore.format.canonical import canonical_json, parse, seal
    from gradstore.store.texts import RowTexts

    (part,) = (store / "texts").glob("*/*.parquet")
    commit = open_store(store).commits[0]
    table = pq.read_table(part)
    for other in (table.drop(["tokens"]), table.slice(1), table.slice(0, 300)):
        pq.write_table(other, part, row_group_size=256)
        document = parse((store / "commits/1.json").read_bytes())
        data = part.read_bytes()
        import hashlib

        document["texts"][0]["parts"] = [[N, len(data), hashlib.sha256(data).hexdigest()]]
        forged = Commit.from_bytes(canonical_json(seal(document)))
        assert forged.sha256 != commit.sha256
        with pytest.raises(DamagedData, match="other columns or rows"):
            RowTexts(StoreFiles(store), forged.texts[0]).read([0])


def test_a_store_needs_a_newer_release_from_its_first_text_on(kit: Any, fast_path: Path) -> None:
    path = fast_path / "s"
    kit.build(path, n=N)
    assert open_store(path).schema_version == 1
    plain = (path / "commits/1.json").read_bytes()
    assert "texts" not in json.loads(plain)
    with kit.writer(path) as writer:
        writer.keep_texts(kit.rows(N), texts())
    opened = open_store(path)
    assert opened.schema_version == 2
    assert "0.2.0" in (path / "zarr.json").read_text()
    assert (path / "commits/1.json").read_bytes() == plain
    assert opened.texts(opened.generation("train/1")) is not None
    assert verify_store(path).ok


@pytest.mark.parametrize("number", range(1, 60))
def test_a_crash_at_any_step_loses_nothing_and_the_next_try_succeeds(
    kit: Any, fast_path: Path, number: int
) -> None:
    class Crash(BaseException):
        pass

    steps = 0

    def hook(operation: str, path: Path) -> None:
        nonlocal steps
        steps += 1
        if steps == number:
            raise Crash

    path = fast_path / "s"
    kit.build(path, n=20)
    try:
        with kit.writer(path, StoreFiles(path, hook)) as writer:
            writer.keep_texts(kit.rows(20), texts(20))
    except Crash:
        pass
    assert verify_store(path).ok
    with kit.writer(path) as writer:
        writer.keep_texts(kit.rows(20), texts(20))
        writer.clean()
    opened = open_store(path)
    assert opened.texts(opened.generation("train/1")).read([19])[0].prompt == "question 19"  # type: ignore[union-attr]
    assert verify_store(path).ok


def test_another_text_left_by_a_dead_writer_makes_way(kit: Any, store: Path) -> None:
    rows = kit.rows(7)
    folder = store / text_table.texts_path(rows.sha256)
    folder.mkdir()
    (folder / "0.parquet").write_bytes(b"half")
    with kit.writer(store) as writer:
        writer.keep_texts(rows, texts(7))
        kit.add(writer, "target/seven/1", n=7)
    assert verify_store(store).ok


def test_a_full_disk_is_told_and_leaves_the_store_as_it_was(kit: Any, store: Path) -> None:
    def hook(operation: str, path: Path) -> None:
        if operation == "write" and "staging" in path.parts:
            raise OSError(28, "No space left on device")

    with kit.writer(store, StoreFiles(store, hook)) as writer:
        with pytest.raises(StoreIOError, match=r"needs .* free"):
            writer.keep_texts(kit.rows(30), texts(30))
    assert verify_store(store).ok


def test_clean_up_removes_the_text_of_rows_that_no_generation_has(kit: Any, store: Path) -> None:
    with kit.writer(store) as writer:
        writer.keep_texts(kit.rows(30), texts(30))
        kit.add(writer, "target/thirty/1", n=30)
        kit.add(writer, "target/thirty/2", n=30)
        kit.add(writer, "train/2", n=N)
        assert len(list((store / "texts").iterdir())) == 2
        writer.clean(keep_generations=1)
        assert len(list((store / "texts").iterdir())) == 2
    opened = open_store(store)
    assert opened.texts(opened.generation("target/thirty/2")) is not None
    with kit.writer(store) as writer:  # rows planned for are kept, others go
        writer.keep_texts(kit.rows(31), texts(31))
        writer.keep_texts(kit.rows(32), texts(32))
        writer.begin(kit.record("target/planned/1"), kit.rows(32), dim=4, unit_rows=16)
        writer.clean()
        kept = {path.name for path in (store / "texts").iterdir()}
        assert kit.rows(32).sha256 in kept
        assert kit.rows(31).sha256 not in kept
        writer.keep_texts(kit.rows(31), texts(31))  # and may come again
        kit.add(writer, "target/again/1", n=31)
        again = writer.store.generation("target/again/1")
        assert writer.store.texts(again) is not None
    assert verify_store(store).ok


Forge = Callable[[dict[str, Any]], None]


@pytest.mark.parametrize(
    "forge",
    [
        lambda d: d.update(texts=[]),
        lambda d: d["texts"][0].update(parts=[]),
        lambda d: d["texts"][0].update(rows_sha256="../x"),
        lambda d: d["texts"][0].update(parts=[[1, -1, "0" * 64]]),
        lambda d: d["texts"][0].update(parts=[[True, 1, "0" * 64]]),
        lambda d: d["texts"][0].update(parts=[[1, 1]]),
        lambda d: d["texts"][0].update(parts=7),
        lambda d: d.update(texts=[3]),
        lambda d: d.update(texts=d["texts"] * 2),
        lambda d: d.update(generations=["train/1"]),
        lambda d: d.update(schema_version=1),
    ],
)
def test_a_commit_of_text_with_impossible_values_is_none(store: Path, forge: Forge) -> None:
    from gradstore.format.canonical import canonical_json, parse, seal

    document = parse((store / "commits/1.json").read_bytes())
    forge(document)
    with pytest.raises(ValueError, match=r"commit|canonical|rows|sha256"):
        Commit.from_bytes(canonical_json(seal(document)))


def test_frames_hold_rows_and_scores_by_position(kit: Any, store: Path) -> None:
    with kit.writer(store) as writer:
        kit.add(writer, "target/t/1", n=30, feature="sgd", optimizer_hash=None)
    opened = open_asked(store)
    rows = opened.rows_frame("train/1")
    assert list(rows.columns) == ["data_set", "source_row", "prompt", "response", "target_tokens",
                                  "status", "norm", "row_hash"]  # fmt: skip
    assert rows.loc[7, "prompt"] == "question 7"
    assert rows.loc[3, "status"] == "non_finite"
    scores = opened.scores_frame()
    usable = scores["score"].dropna()
    assert usable.is_monotonic_decreasing
    assert scores.loc[3].isna()["score"]
    assert len(usable) == (rows["status"] == "ok").sum()
    assert scores.loc[usable.index[0], "prompt"] == f"question {usable.index[0]}"
    assert "prompt" not in opened.scores_frame(text=False).columns
    assert opened.rows_frame("target/t/1")["prompt"].isna().all()
    assert type(opened.refresh()) is type(opened)

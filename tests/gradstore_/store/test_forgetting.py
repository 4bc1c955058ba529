"""Forgetting: nothing of a row is left, other rows keep their bytes, a kill is finished."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from typer.testing import CliRunner

from gradstore.cli import app
from gradstore.errors import BadInput, DamagedData, ProvenanceMismatch, StoreIOError
from gradstore.format import forgotten
from gradstore.format.forgotten import Request
from gradstore.format.layout import RowStatus
from gradstore.format.records import RowSet, row_hash
from gradstore.format.text_table import Text
from gradstore.scoring.influence import influence_scores
from gradstore.scoring.pairing import checkpoint_features
from gradstore.storage.local import StoreFiles
from gradstore.store.asked_rows import asked_rows
from gradstore.store.forgetting import affected, finish_removals, forget, request_for
from gradstore.store.held import held_store
from gradstore.store.reader import Store, open_store
from gradstore.store.verify import verify_store

if TYPE_CHECKING:
    from conftest import StoreKit

N = 40
ROW = 21
SECRET = "my telephone number is 555-0199"
NAMES = ("train/1", "train/2", "target/a/1", "target/a/2")


def rows_of(kit: StoreKit) -> RowSet:
    """Rows 0-19 of one data set, 20-39 of another; row 33 has the content of row 21."""
    hashes = kit.rows(N).hashes.copy()
    hashes[33] = hashes[ROW]
    sources = [("open", i) for i in range(20)] + [("private", i) for i in range(20)]
    return RowSet(hashes, tuple(sources))


def texts() -> list[Text]:
    said = [f"question {i}" for i in range(N)]
    said[ROW] = said[33] = SECRET
    return [Text(each, "r", 7, json.dumps({"q": each})) for each in said]


def features(kit: StoreKit, step: int) -> np.ndarray:
    values = np.random.default_rng(step).standard_normal((N, kit.dim)).astype(np.float32)
    values[33] = values[ROW]
    return values


def add(kit: StoreKit, writer: Any, name: str, **changes: Any) -> None:
    rows = rows_of(kit) if name.startswith("train") else kit.rows(8, first=70)
    begun = writer.begin(kit.record(name, **changes), rows, dim=kit.dim, dtype=kit.dtype,
                         unit_rows=16)  # fmt: skip
    kit.fill(begun, features(kit, int(name[-1]))[: len(rows)])
    begun.commit()


@pytest.fixture
def store(request: pytest.FixtureRequest, kit: StoreKit, fast_path: Path) -> Path:
    """Two checkpoints, an earlier attempt, an unfinished one, text, an index and quarantine."""
    kit.dtype = getattr(request, "param", kit.dtype)
    path = fast_path / "s"
    with kit.writer(path) as writer:
        writer.keep_texts(rows_of(kit), texts(), {"private": {"formatting": "alpaca"}})
        for name in NAMES:
            add(kit, writer, name)
        add(kit, writer, "train/1", adapter_hash="replayed")
        begun = writer.begin(kit.record("train/3"), rows_of(kit), dim=kit.dim, dtype=kit.dtype,
                             unit_rows=16)  # fmt: skip
        kit.fill(begun, features(kit, 3), units=2)
    commit = open_store(path).generation("train/2").commit_sha
    (path / "index" / commit).mkdir(parents=True)
    values = open_store(path).generation("train/2").raw(1)[ROW - 16]
    (path / "index" / commit / "faiss.bin").write_bytes(values.tobytes() * 3)
    (path / "index" / ".part.partial").mkdir()
    (path / "index" / ".part.partial" / "faiss.bin").write_bytes(values.tobytes())
    (path / "staging" / "quarantine").mkdir(parents=True)
    (path / "staging" / "quarantine" / "0").write_bytes(values.tobytes())
    return path


def remove(store: Path, files: StoreFiles | None = None, **asked: Any) -> Any:
    with held_store(store, files) as (held, view):
        hashes = asked_rows(held, view(), **(asked or {"rows": [ROW]}))
        return forget(held, view, request_for(held, view(), hashes))


def contents(store: Path) -> dict[str, bytes]:
    """Every file of a store; of Parquet, which compresses, what a reader reads."""
    import pyarrow.parquet as pq

    found = {}
    for path in store.rglob("*"):
        if path.is_file():
            found[path.relative_to(store).as_posix()] = path.read_bytes() + (
                repr(pq.read_table(path).to_pylist()).encode()
                + repr(pq.read_schema(path).metadata).encode()
                if path.suffix == ".parquet"
                else b""
            )
    return found


def traces(kit: StoreKit, opened: Store) -> dict[str, bytes]:
    """Byte strings by which the row would be found anywhere in the store."""
    digest = rows_of(kit).hashes[ROW].tobytes()
    found = {"hash": digest, "hash in hex": digest.hex().encode(), "text": b"555-0199"}
    for generation in opened.generations(superseded=True):
        if generation.role == "train" and kit.dtype != "1bit":  # one byte is found everywhere
            name = generation.name
            found[f"features of {name}"] = generation.raw(1)[ROW - 16].tobytes()
    return found


def check_gone(store: Path, wanted: dict[str, bytes]) -> None:
    """No trace of the row is left in any file."""
    there = contents(store)
    for trace, needle in wanted.items():
        assert not [name for name, data in there.items() if needle in data], trace


def bytes_by_row(opened: Store) -> dict[str, list[bytes]]:
    """Everything that is stored of each row, by the generation's name without attempt."""
    found = {}
    for g in opened.generations():
        raw = np.concatenate([g.raw(unit) for unit in range(len(g.units))])
        columns = (raw, g.scale, g.norm, g.status, g.tokens, g.row_hash)
        found[str(g.record.name)] = [
            b"".join(np.ascontiguousarray(c[i]).tobytes() for c in columns) for i in range(g.rows)
        ]
    return found


@pytest.mark.parametrize("store", ["float16", "float32", "int8", "1bit"], indirect=True)
def test_nothing_of_a_row_is_left_and_the_other_rows_are_the_same_to_the_bit(
    kit: StoreKit, store: Path
) -> None:
    before = open_store(store)
    wanted, kept = traces(kit, before), bytes_by_row(before)
    scores = influence_scores(checkpoint_features(before, "all"))
    there = contents(store)
    for trace, needle in wanted.items():  # the search finds what there is to be found
        assert any(needle in data for data in there.values()), trace
    receipt = remove(store)
    check_gone(store, wanted)
    assert verify_store(store).faults == ()
    now = open_store(store)
    gone = [ROW, 33]  # 33 has the same content
    for name, rows in bytes_by_row(now).items():
        changed = [i for i, row in enumerate(rows) if row != kept[name][i]]
        assert changed == (gone if name.startswith("train") else []), name
    after = influence_scores(checkpoint_features(now, "all"))
    others = np.setdiff1d(np.arange(N), gone)
    assert after.values[others].tobytes() == scores.values[others].tobytes()
    assert np.flatnonzero(~after.usable).tolist() == gone
    assert after.skipped["forgotten"] == 2
    read = now.texts(now.generation("train/1"))
    assert read is not None
    assert [text.prompt for text in read.read([20, ROW, 22])] == ["question 20", "", "question 22"]
    assert read.read([ROW])[0].data_set == "forgotten"
    assert dict(receipt.rows) == {"train/1.3": 2, "train/2.2": 2}
    assert set(receipt.removed) == {"train/1", "train/1.2", "train/2"}
    assert now.schema_version == 3
    assert receipt.commit_before == before.head.sha256 if before.head else False
    assert receipt.commit_after == (now.head.sha256 if now.head else None)
    assert now.planned() == []
    assert now.commits[: len(before.commits)] == before.commits


def test_a_resume_of_the_same_data_set_does_not_bring_a_row_back(
    kit: StoreKit, store: Path
) -> None:
    remove(store)
    with kit.writer(store) as writer:
        begun = writer.begin(kit.record("train/2"), rows_of(kit), dim=4, unit_rows=16)
        assert (begun.name, begun.pending) == ("train/2.2", [])
        add(kit, writer, "train/4")  # computes the row's feature again, as a model would
        writer.keep_texts(rows_of(kit), texts())
        changed = rows_of(kit).hashes.copy()
        changed[ROW] = np.frombuffer(row_hash([9], [9]), np.uint8)  # its place was blanked
        begun = writer.begin(kit.record("train/5"), RowSet(changed, rows_of(kit).sources), dim=4)
        kit.fill(begun, features(kit, 5))
        begun.commit()
        changed[0] = changed[ROW]
        with pytest.raises(ProvenanceMismatch, match="rows differ, first row 0"):
            writer.begin(kit.record("train/6"), RowSet(changed, rows_of(kit).sources), dim=4)
        fresh = RowSet(rows_of(kit).hashes[ROW - 1 : ROW + 1])  # another set with the row
        begun = writer.begin(kit.record("target/b/4"), fresh, dim=4)
        kit.fill(begun, features(kit, 4)[ROW - 1 : ROW + 1])
        begun.commit()
        with pytest.raises(BadInput, match="row 1 of target/c/4 has the hash that stands"):
            writer.begin(kit.record("target/c/4"), fresh.without(np.array([False, True])), dim=4)
    now = open_store(store)
    for name, row in (("train/4", ROW), ("train/5", ROW), ("target/b/4", 1)):
        generation = now.generation(name)
        assert generation.status[row] == RowStatus.FORGOTTEN
        assert np.isnan(generation.read(row, row + 1)).all()
        assert generation.usable[row - 1]
    assert len(now.text_commits()) == 1
    assert not [name for name, data in contents(store).items() if b"555-0199" in data]
    assert verify_store(store).ok


def small(kit: StoreKit, path: Path) -> None:
    """One checkpoint of 24 rows, an earlier attempt, an unfinished one, and text."""
    rows = rows_of(kit)
    some = RowSet(rows.hashes[:24], rows.sources and rows.sources[:24])
    with kit.writer(path) as writer:
        writer.keep_texts(some, texts()[:24])
        for name, adapter in (("train/1", "first"), ("train/1", "second"), ("train/2", "first")):
            begun = writer.begin(kit.record(name, adapter_hash=adapter), some, dim=4, unit_rows=16)
            kit.fill(begun, features(kit, 1)[:24], units=2 if name == "train/1" else 1)
            if not begun.pending:
                begun.commit()


def check_finished(
    kit: StoreKit, left: Path, expected: dict[str, list[bytes]], wanted: dict[str, bytes]
) -> None:
    """The removal is complete, its receipt says so, and nothing of the row is left."""
    opened = open_store(left)
    ((_, receipt),) = opened.requests()
    assert receipt is not None
    assert dict(receipt.rows) == {"train/1.3": 1}
    assert bytes_by_row(opened) == expected
    check_gone(left, wanted)


def finished(kit: StoreKit, left: Path, k: int) -> bool:
    """Go on after a crash; return whether the removal had begun."""
    begun = any((left / "forgotten").glob("1.request.json"))
    if not begun:
        remove(left)
    elif k % 2:
        CliRunner().invoke(app, ["forget", str(left)], catch_exceptions=False)
    else:
        kit.writer(left).close()  # whoever writes next finishes it first
    return begun


def test_fault_16_a_kill_at_every_operation_has_not_begun_or_is_finished_by_the_next_call(
    kit: StoreKit, crashes: Any, fast_path: Path
) -> None:
    path = fast_path / "s"
    small(kit, path)
    wanted = traces(kit, open_store(path))
    kills = crashes.Kills(path, [])
    remove(path, StoreFiles(path, kills))
    expected, begun = bytes_by_row(open_store(path)), 0
    for k, (left, _) in enumerate(kills.each(fast_path)):
        assert open_store(left).generations()  # readers see whole generations all the time
        begun += finished(kit, left, k)
        check_finished(kit, left, expected, wanted)
        if k % 5 == 0:
            assert verify_store(left).faults == (), k
    assert 100 < begun < k


def test_fault_17_after_a_power_loss_a_removal_has_not_begun_or_is_finished_by_the_next_call(
    kit: StoreKit, crashes: Any, fast_path: Path
) -> None:
    """And once it has returned, no power loss brings anything of the row back."""
    path = fast_path / "s"
    small(kit, path)
    wanted = traces(kit, open_store(path))
    losses = crashes.PowerLosses(path, [])
    remove(path, StoreFiles(path, losses))
    expected, begun = bytes_by_row(open_store(path)), 0
    for k, (left, _) in enumerate(losses.each(fast_path)):
        assert verify_store(left).faults == (), k
        begun += finished(kit, left, k)
        check_finished(kit, left, expected, wanted)
    assert 20 < begun < k
    crashes.write_contents(losses.now(), fast_path / "at the end")
    losses.close()
    check_finished(kit, fast_path / "at the end", expected, wanted)


def test_fault_17_a_kill_before_a_folder_is_synced_and_then_a_power_loss_bring_no_row_back(
    kit: StoreKit, crashes: Any, fast_path: Path
) -> None:
    """What a killed process has removed the next one no longer finds, and has to sync."""
    origin = fast_path / "origin"
    small(kit, origin)
    wanted = traces(kit, open_store(origin))
    k, died, expected = 0, True, None
    while died:
        path = fast_path / f"s{k}"
        shutil.copytree(origin, path)
        losses = crashes.PowerLosses(path, [], keeps=False)
        dies = crashes.KillBefore(k, losses, ("fsync_dir",))
        try:
            remove(path, StoreFiles(path, dies))
        except dies.Killed:
            if any((path / "forgotten").glob("1.request.json")):
                with held_store(path, StoreFiles(path, losses)) as (held, view):
                    finish_removals(held, view)
            else:
                remove(path, StoreFiles(path, losses))
        died = dies.dead
        crashes.write_contents(losses.now(), fast_path / f"left{k}")
        losses.close()
        expected = expected or bytes_by_row(open_store(path))
        check_finished(kit, fast_path / f"left{k}", expected, wanted)
        assert verify_store(fast_path / f"left{k}").faults == (), k
        k += 1
    assert k > 40


def test_a_full_disk_or_damage_is_told_before_anything_is_begun(
    kit: StoreKit, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(store)
    with monkeypatch.context() as patch:
        patch.setattr(StoreFiles, "free_bytes", lambda self: 100)
        with pytest.raises(StoreIOError, match="100 are free"):
            remove(store)
    chunk = store / "generations/train/2/features/c/2/0"
    good = chunk.read_bytes()
    chunk.write_bytes(good[:-9] + b"\x7f" + good[-8:])
    with pytest.raises(DamagedData, match="nothing was removed"):
        remove(store)
    chunk.write_bytes(good)
    changed = {name for name, data in contents(store).items() if before.get(name) != data}
    assert changed <= {"writer.lock"}


def test_rows_are_named_by_position_by_data_set_or_by_a_row_of_its_file(
    kit: StoreKit, store: Path
) -> None:
    files = StoreFiles(store)
    opened = open_store(store)
    hashes = [one.tobytes() for one in rows_of(kit).hashes]
    assert asked_rows(files, opened, [3, 4]) == {hashes[3], hashes[4]}
    assert asked_rows(files, opened, sources=["private:1"]) == {hashes[ROW]}
    assert asked_rows(files, opened, sources=["private"]) == set(hashes[20:])
    other = kit.rows(8, first=70).hashes[2].tobytes()
    assert asked_rows(files, opened, [2], target="a") == {other}
    for asked, match in (
        ({"rows": [40]}, "rows 0 to 39"),
        ({"rows": [-1]}, "rows 0 to 39"),
        ({"rows": [0], "target": "b"}, "no target set 'b'"),
        ({"sources": ["nobody"]}, "Data sets: open, private, set one"),
        ({"sources": ["private:20"]}, "no row of source"),
    ):
        with pytest.raises(BadInput, match=match):
            asked_rows(files, opened, **asked)  # type: ignore[arg-type]
    remove(store, sources=["private"])
    with pytest.raises(BadInput, match="removed before"):
        asked_rows(files, open_store(store), [ROW])
    assert not [name for name, data in contents(store).items() if b"private" in data]
    remove(store, rows=[0])
    (first, _), (second, _) = open_store(store).requests()
    assert first.key == second.key
    assert np.flatnonzero(open_store(store).generation("train/2").usable).tolist() == list(
        range(1, 20)
    )


def test_the_command_asks_first_and_prints_a_receipt(kit: StoreKit, store: Path) -> None:
    def told(*arguments: object) -> Any:
        found = CliRunner().invoke(app, ["forget", str(store), *map(str, arguments)])
        if found.exception is not None and not isinstance(found.exception, SystemExit):
            raise found.exception
        return found.stdout

    before = contents(store)
    plan = json.loads(told("--row", ROW, "--dry-run", "--json"))
    assert (plan["distinct_rows"], plan["unfinished"]) == (1, ["train/3"])
    assert plan["rows"] == {"train/1": 2, "train/1.2": 2, "train/2": 2}
    with pytest.raises(BadInput, match="add --yes"):
        told("--row", ROW)
    with pytest.raises(BadInput, match="no removal was begun"):
        told()
    assert {n for n, d in contents(store).items() if before.get(n) != d} <= {"writer.lock"}
    (receipt,) = json.loads(told("--row", ROW, "--yes", "--json"))
    assert "nothing is left to do" in told()
    with pytest.raises(BadInput, match="removed before"):
        told("--row", ROW, "--yes")
    lying = (store / "forgotten/1.receipt.json").read_bytes()
    assert json.loads(lying) == receipt
    request = Request.from_bytes((store / "forgotten/1.request.json").read_bytes())
    assert len(request.ids) == 1
    (store / "forgotten/1.receipt.json").write_bytes(lying.replace(b'"number":1', b'"number":2'))
    (fault,) = verify_store(store).faults
    assert fault.file == "forgotten/1.receipt.json"


def test_a_set_that_is_removed_whole_takes_no_other_set_with_it(
    kit: StoreKit, fast_path: Path
) -> None:
    path = fast_path / "s"
    with kit.writer(path) as writer:
        kit.add(writer, "train/1", 24)
        kit.add(writer, "target/a/1", 3)
    remove(path, rows=[0, 1, 2], target="a")
    with kit.writer(path) as writer:
        begun = writer.begin(kit.record("target/b/1"), kit.rows(3, first=90), dim=kit.dim,
                             dtype=kit.dtype)  # fmt: skip
    assert not begun.plan.rows.forgotten.any()


def test_another_set_with_the_same_other_rows_keeps_what_is_in_the_removed_ones_place(
    kit: StoreKit, fast_path: Path
) -> None:
    path = fast_path / "s"
    with kit.writer(path) as writer:
        kit.add(writer, "train/1", 24)
        begun = writer.begin(kit.record("target/a/1"), kit.rows(3, first=70), dim=kit.dim,
                             dtype=kit.dtype)  # fmt: skip
        kit.fill(begun, features(kit, 1)[:3])
        begun.commit()
    remove(path, rows=[1], target="a")
    hashes = kit.rows(3, first=70).hashes.copy()
    hashes[1] = kit.rows(1, first=95).hashes
    with kit.writer(path) as writer:
        found = {
            name: writer.begin(kit.record(f"target/{name}/2"), RowSet(hashes), dim=kit.dim,
                               dtype=kit.dtype).plan.rows.forgotten.tolist()
            for name in ("a", "b")
        }  # fmt: skip
    assert found == {"a": [False, True, False], "b": [False] * 3}


def test_two_requests_follow_each_other_under_one_lock(kit: StoreKit, fast_path: Path) -> None:
    """The first has written units: its own staging is no other process's."""
    path = fast_path / "s"
    with kit.writer(path) as writer:
        kit.add(writer, "train/1", 24)
    with held_store(path) as (files, view):
        for row in (5, 6):
            forget(files, view, request_for(files, view(), asked_rows(files, view(), rows=[row])))
    assert open_store(path).generation("train/1").plan.rows.forgotten.nonzero()[0].tolist() == [
        5,
        6,
    ]


def test_a_damaged_plan_that_was_never_committed_stops_neither_clean_up_nor_removal(
    kit: StoreKit, store: Path
) -> None:
    plan = store / "plans" / "train" / "3.json"
    content = bytearray(plan.read_bytes())
    content[50] ^= 1
    plan.write_bytes(content)
    with kit.writer(store) as writer:
        writer.clean()
    remove(store)
    assert verify_store(store).ok


def test_a_mistyped_row_is_refused_where_an_interrupted_removal_was_finished(
    kit: StoreKit, fast_path: Path
) -> None:
    """That removal's receipt is not an answer to this question; the same row again is."""
    from gradstore.cli.care import forget as command

    path = fast_path / "s"
    with kit.writer(path) as writer:
        kit.add(writer, "train/1", 24)
    for row in (5, 6):
        with held_store(path) as (files, view):
            request = request_for(files, view(), asked_rows(files, view(), rows=[row]))
            files.make_directory("forgotten")
            files.publish(f"forgotten/{request.number}.request.json", request.to_bytes())
        if row == 5:
            with pytest.raises(BadInput, match="row 4711 was asked for"):
                command(path, row=[4711], yes=True)
        else:
            command(path, row=[6], yes=True)
        assert all(receipt is not None for _, receipt in open_store(path).requests())


def test_rows_are_found_by_their_source_in_the_memory_of_one_data_set(
    kit: StoreKit, fast_path: Path
) -> None:
    """However many generations have it, and without an object for each of its rows."""
    n = 200_000
    hashes = np.random.default_rng(0).integers(0, 256, (n, 16), np.uint8)
    rows = RowSet(hashes, [(("poems", "sums: all")[i % 2], i // 2) for i in range(n)])

    def peak(wanted: str) -> int:
        files, store = StoreFiles(fast_path / "s"), open_store(fast_path / "s")
        tracemalloc.start()
        try:
            found = asked_rows(files, store, sources=[wanted])
            assert found == {hashes[7].tobytes()}
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peaks = []
    with kit.writer(fast_path / "s") as writer:
        for step in (1, 2, 3):
            writer.begin(kit.record(f"train/{step}"), rows, dim=4, unit_rows=1 << 16)
            peaks.append(peak("sums: all:3"))
    assert peaks[0] < 150 * n
    assert peaks[2] < peaks[0] + 60 * n


def test_rows_of_a_set_that_many_generations_have_are_hashed_once(
    kit: StoreKit, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    ids = forgotten._ids

    def counted(rows: RowSet, key: str) -> Any:
        asked.append(len(rows))
        return ids(rows, key)

    monkeypatch.setattr(forgotten, "_ids", counted)
    files, opened = StoreFiles(store), open_store(store)
    hashes = asked_rows(files, opened, rows=[1])
    request = request_for(files, opened, hashes)
    asked.clear()
    found = affected(files, opened, request.key, set(request.ids))
    train = [c for c in opened.live_commits(superseded=True) if c.generation.startswith("train/")]
    assert len(train) > 1
    assert found.rows == dict.fromkeys([commit.generation for commit in train], 1)
    distinct = {g.plan.rows.sha256 for g in opened.generations(superseded=True)}
    distinct |= set(opened.text_commits())
    assert len(asked) == len(distinct) < len(opened.live_commits(superseded=True))

"""What a writer in a bucket has sent, and what arrives only when another has taken its place.

No server of a bucket can refuse it, so each such write has a name or a condition by which it does
no harm. The proxy holds one request, and the sender's signs of life, while the next takes over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gradstore.errors import StoreBusy, StoreError, StoreIOError
from gradstore.format.layout import FORGOTTEN_VERSION
from gradstore.format.text_table import Text
from gradstore.storage import bucket as bucket_module
from gradstore.storage import object_lock
from gradstore.storage.leases import Worker
from gradstore.storage.location import location
from gradstore.storage.objects import ObjectFiles
from gradstore.storage.processes import Process
from gradstore.store.asked_rows import asked_rows
from gradstore.store.cleaning import clean_store
from gradstore.store.forgetting import forget, request_for
from gradstore.store.held import held_store
from gradstore.store.reader import open_store
from gradstore.store.verify import verify_store
from gradstore.store.writer import StoreWriter

if TYPE_CHECKING:
    from conftest import StoreKit

SILENT = 0.6
N, UNIT_ROWS = 12, 4
#: Rows that each of two computations gives: the same but for rounding, so to say.
FIRST, SECOND = 1, 2


class Overtaken:
    """A writer of another machine whose network stands still from one of its requests on.

    Attributes:
        told: what its work raised in the end, None where it ended well.
    """

    def __init__(self, faulty: Any) -> None:
        self._faulty = faulty
        self._wanted: Callable[[Any], bool] = lambda _: False
        self._arrived, self._gate = threading.Event(), threading.Event()
        self._own = ""
        self._thread: threading.Thread | None = None
        self.told: BaseException | None = None
        #: What the proxy answers in the server's place, once the network goes on.
        self.answer: tuple[int, bytes] | None = None

    def begins(self, act: Callable[[], object], wanted: Callable[[Any], bool]) -> None:
        """Start its work; return when the first request that is wanted is on its way."""
        self._wanted = wanted
        self._faulty.before = self._hold

        def work() -> None:
            machine.name = "overtaken"
            try:
                act()
            except StoreError as error:
                self.told = error

        self._thread = threading.Thread(target=work)
        self._thread.start()
        assert self._arrived.wait(30), "no such request"

    def goes_on(self) -> None:
        """Let the network go on; return when all has landed and the writer has ended."""
        self._gate.set()
        assert self._thread is not None
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _hold(self, asked: Any) -> tuple[int, bytes] | None:
        if asked.method == "PUT" and asked.key.endswith("/owner") and not self._own:
            self._own = asked.key.removesuffix("owner")
        if self._arrived.is_set() and asked.method == "PUT" and asked.key.startswith(self._own):
            self._gate.wait(60)
        elif not self._arrived.is_set() and self._wanted(asked):
            self._arrived.set()
            self._gate.wait(60)
            return self.answer
        return None


machine = threading.local()


@pytest.fixture
def overtaken(faulty: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Overtaken]:
    """The writer; nobody knows of a process whether it lives but by its signs of life."""
    monkeypatch.setattr(object_lock, "SILENT_SECONDS", SILENT)
    name = classmethod(lambda cls: cls(getattr(machine, "name", "next"), 1, "1"))
    monkeypatch.setattr(Process, "this", name)
    monkeypatch.setattr(Process, "lives", lambda _: None)
    made = Overtaken(faulty)
    yield made
    made._gate.set()
    faulty.before = lambda _: None


@pytest.fixture
def place(faulty: Any, use_server: Callable[[str], str]) -> str:
    """An empty prefix behind the proxy."""
    return use_server(faulty.address)


def put(key: str) -> Callable[[Any], bool]:
    return lambda asked: asked.method == "PUT" and asked.key.endswith(key)


def removal(key: str) -> Callable[[Any], bool]:
    """One or many: of many the body lists the keys."""
    return lambda asked: (
        (asked.method == "DELETE" and key in asked.key)
        or (asked.method == "POST" and key.encode() in asked.body)
    )


def files_of(place: str, hook: Callable[[str, Path], None] | None = None) -> ObjectFiles:
    return ObjectFiles(location(place), hook)  # type: ignore[arg-type]


def features(kit: StoreKit, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((N, kit.dim))
    return values.astype(np.float32)


def write(
    kit: StoreKit,
    place: str,
    seed: int,
    *,
    files: ObjectFiles | None = None,
    worker: Worker | None = None,
    **changes: Any,
) -> None:
    """Build train/1 as one computation gives it."""
    with StoreWriter(place, provenance=kit.provenance, files=files, worker=worker) as writer:
        begun = writer.begin(kit.record(**changes), kit.rows(N), dim=4, unit_rows=UNIT_ROWS)
        for unit in begun.claimed():
            k = unit.stop - unit.start
            begun.write_unit(
                unit.index, features(kit, seed)[unit.start : unit.stop], np.ones(k, np.float32),
                np.zeros(k, np.uint8), np.arange(k, dtype=np.int32),
            )  # fmt: skip
        begun.commit()


def end_group(kit: StoreKit, place: str) -> None:
    """Take the lock over from workers, whom another worker would join."""
    kit.writer(place).close()


def computations(kit: StoreKit, place: str) -> list[int]:
    """Verify the store; return by which computation each unit of train/1 is, whole."""
    assert verify_store(place).ok
    found = open_store(place).generation("train/1").read(0, N)
    by = []
    for start in range(0, N, UNIT_ROWS):
        rows = slice(start, start + UNIT_ROWS)
        near = [np.allclose(found[rows], features(kit, seed)[rows], rtol=2e-3) for seed in (1, 2)]
        assert sum(near) == 1, f"rows {rows} are torn"
        by.append(1 + near.index(True))
    return by


# ---- writes that land under the next writer's hands -------------------------------------------

CHUNK, RECORD = "train/1/features/c/1/0", "train/1/units/1.json"


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "worker"])
@pytest.mark.parametrize(
    ("late", "lands_before", "second"),
    [
        (CHUNK, f"link generations/{CHUNK}", SECOND),
        (RECORD, f"link generations/{CHUNK}", FIRST),
        (RECORD, f"link generations/{RECORD}", SECOND),
    ],
    ids=["a chunk", "a record, of a unit that is whole", "a record, of chunks that are replaced"],
)
def test_a_unit_is_of_one_computation_though_parts_of_another_land_while_it_is_written(
    kit: StoreKit,
    overtaken: Overtaken,
    place: str,
    late: str,
    lands_before: str,
    second: int,
    shared: bool,
) -> None:
    worker = Worker(1, 1) if shared else None
    overtaken.begins(lambda: write(kit, place, FIRST, worker=worker), put(late))
    if shared:
        end_group(kit, place)

    def land(operation: str, path: Path) -> None:
        if f"{operation} {path}" == lands_before:
            overtaken.goes_on()

    write(kit, place, SECOND, files=files_of(place, land), worker=worker)
    assert isinstance(overtaken.told, StoreBusy), "it is told"
    assert computations(kit, place) == [FIRST, second, SECOND]


def test_a_plan_that_lands_late_is_superseded_like_any_that_was_left(
    kit: StoreKit, overtaken: Overtaken, place: str
) -> None:
    key = "plans/train/1.json"
    overtaken.begins(lambda: write(kit, place, FIRST, adapter_hash="other"), put(key))

    def land(operation: str, path: Path) -> None:
        if f"{operation} {path}" == f"link {key}":
            overtaken.goes_on()

    write(kit, place, SECOND, files=files_of(place, land))
    assert [c.generation for c in open_store(place).commits] == ["train/1.2"]
    assert computations(kit, place) == [SECOND] * 3


def test_nothing_left_half_written_is_removed_whose_name_is_written_again(
    kit: StoreKit, faulty: Any, place: str
) -> None:
    """A removal can't have a condition, so one that lands late would take the next writer's."""

    def die(operation: str, path: Path) -> None:
        if str(path).endswith("units/1.json"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(kit, place, FIRST, files=files_of(place, die))
    removed: list[Any] = []

    def note(asked: Any) -> None:
        if removal("generations/")(asked):
            removed.append((asked.method, asked.key))

    faulty.before = note
    write(kit, place, SECOND)
    assert removed == []
    assert computations(kit, place) == [FIRST, SECOND, SECOND]


def texts(what: str) -> list[Text]:
    return [Text(f"{what} {i}", "r", 1) for i in range(N)]


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "worker"])
def test_a_text_that_a_dead_writer_left_is_replaced_and_not_removed(
    kit: StoreKit, faulty: Any, place: str, shared: bool
) -> None:
    def die(operation: str, path: Path) -> None:
        if str(path).startswith("commits/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with kit.writer(place, files_of(place, die)) as writer:
            writer.keep_texts(kit.rows(N), texts("before"))
    removed: list[Any] = []
    names = removal(f"{place.removeprefix('s3://features/')}/texts/")
    faulty.before = lambda asked: removed.append(asked) if names(asked) else None
    worker = Worker(1, 1) if shared else None
    with StoreWriter(place, provenance=kit.provenance, worker=worker) as writer:
        writer.keep_texts(kit.rows(N), texts("now"))
        kit.add(writer, "train/1", N)
    store = open_store(place)
    kept = store.texts(store.generation("train/1"))
    assert kept is not None
    assert kept.read([3])[0].prompt == "now 3"
    assert removed == []
    assert verify_store(place).ok


# ---- what workers agree on --------------------------------------------------------------------


def test_a_choice_that_lands_late_is_none_of_the_next_group(
    kit: StoreKit, overtaken: Overtaken, place: str
) -> None:
    one = Worker(1, 1)
    overtaken.begins(lambda: write(kit, place, FIRST, worker=one), put("/1.chosen"))
    end_group(kit, place)
    landed: list[str] = []

    def land(operation: str, path: Path) -> None:
        if path.name == "1.1" and not landed:  # the next group's claim on the unit
            landed.append(str(path))
            overtaken.goes_on()

    write(kit, place, SECOND, files=files_of(place, land), worker=one)
    assert landed != []
    assert computations(kit, place) == [FIRST, SECOND, SECOND]


def test_a_clean_up_that_lands_late_takes_nothing_that_the_next_group_agreed_on(
    kit: StoreKit, overtaken: Overtaken, place: str
) -> None:
    with StoreWriter(place, provenance=kit.provenance, worker=Worker(1, 1)) as writer:
        writer._lock._when_last = lambda: None  # it leaves what a killed group leaves
    overtaken.begins(lambda: kit.writer(place).close(), removal("staging/leases"))
    with StoreWriter(place, provenance=kit.provenance, worker=Worker(1, 1)) as writer:
        overtaken.goes_on()
        writer.with_space("minilm", {"encoder": "a"})
        begun = writer.begin(kit.record(), kit.rows(N), dim=4, unit_rows=UNIT_ROWS)
        kit.fill(begun, features(kit, FIRST))
        begun.commit()
    assert computations(kit, place) == [FIRST] * 3


def test_a_choice_whose_answer_was_lost_names_what_is_still_there(
    kit: StoreKit, faulty: Any, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_module, "PATIENCE_SECONDS", 0.2)
    lost: list[Any] = []

    def lose(asked: Any) -> tuple[int, bytes] | None:
        if put("/1.chosen")(asked) and (not lost or lost[0].key == asked.key):
            lost.append(asked)
            return 503, b""
        return None

    with StoreWriter(place, provenance=kit.provenance, worker=Worker(2, 2)) as other:
        with StoreWriter(place, provenance=kit.provenance, worker=Worker(1, 2)) as writer:
            begun = writer.begin(kit.record(), kit.rows(N), dim=4, unit_rows=UNIT_ROWS)
            faulty.before = lose
            with pytest.raises(StoreIOError):
                kit.fill(begun, features(kit, FIRST))
            faulty.before = lambda _: None
        prefix = place.removeprefix("s3://features/")
        key = lost[0].key.removeprefix(f"{prefix}/")
        assert files_of(place).bucket.put_new(key, lost[0].body), "it lands at last"
        begun = other.begin(kit.record(), kit.rows(N), dim=4, unit_rows=UNIT_ROWS)
        for unit in begun.claimed():
            rows = slice(unit.start, unit.stop)
            k = unit.stop - unit.start
            begun.write_unit(unit.index, features(kit, SECOND)[rows], np.ones(k, np.float32),
                             np.zeros(k, np.uint8), np.arange(k))  # fmt: skip
        begun.commit()
    assert computations(kit, place) == [FIRST, FIRST, SECOND]


# ---- commits, and the root ---------------------------------------------------------------------


@pytest.mark.parametrize("how", ["abandoned", "forgotten"])
def test_a_commit_that_lands_late_never_names_what_was_removed(
    kit: StoreKit, overtaken: Overtaken, place: str, how: str
) -> None:
    overtaken.begins(lambda: write(kit, place, FIRST), put("commits/1.json"))
    if how == "abandoned":
        with kit.writer(place) as writer:
            other = kit.record(adapter_hash="other")
            writer.begin(other, kit.rows(N), dim=4, unit_rows=UNIT_ROWS)
            writer.clean()
    with held_store(place) as (held, view):
        if how == "forgotten":
            rows = kit.rows(N).hashes[:1]
            asked = {bytes(row) for row in rows}
            forget(held, view, request_for(held, view(), asked))
    overtaken.goes_on()
    assert isinstance(overtaken.told, StoreBusy)
    store = open_store(place)
    assert [c.kind for c in store.commits] == ["retire"]
    assert store.generations() == []
    assert verify_store(place).ok
    write(kit, place, SECOND)  # under a name that nobody ever had
    names = [c.generations for c in open_store(place).commits if c.kind == "generation"]
    assert names == [("train/1.3" if how == "abandoned" else "train/1.2",)]
    if how == "abandoned":
        assert computations(kit, place) == [SECOND] * 3
    with held_store(place) as (held, view):
        clean_store(held, view, None)


def test_a_root_that_lands_late_does_not_lower_the_schema(
    kit: StoreKit, overtaken: Overtaken, place: str
) -> None:
    write(kit, place, FIRST)

    def keep() -> None:
        with kit.writer(place) as writer:
            writer.keep_texts(kit.rows(N), texts("late"))

    prefix = place.removeprefix("s3://features/")
    root = lambda asked: asked.method == "PUT" and asked.key == f"{prefix}/zarr.json"  # noqa: E731
    overtaken.begins(keep, root)
    with held_store(place) as (held, view):
        forget(held, view, request_for(held, view(), asked_rows(held, view(), [2])))
    overtaken.goes_on()
    assert isinstance(overtaken.told, StoreBusy)
    assert open_store(place).schema_version == FORGOTTEN_VERSION
    assert verify_store(place).ok


# ---- the look at one's own lock ----------------------------------------------------------------


def test_a_write_is_not_sent_again_once_another_has_the_lock(
    kit: StoreKit, overtaken: Overtaken, place: str, faulty: Any
) -> None:
    key = f"{place.removeprefix('s3://features/')}/plans/train/1.json"
    overtaken.answer = (503, b"<Code>SlowDown</Code>")
    overtaken.begins(lambda: write(kit, place, FIRST), put(key))
    with kit.writer(place):
        overtaken.goes_on()
    assert isinstance(overtaken.told, StoreBusy)
    assert faulty.asked.count(f"PUT {key}") == 1


def test_a_service_that_lost_the_lock_of_its_bucket_changes_nothing_there(
    kit: StoreKit, overtaken: Overtaken, serve_writable: Any, place: str
) -> None:
    machine.name = "server"
    keeping = serve_writable(place).writing.keeping
    del machine.name
    keeping._lock._ends.set()
    with kit.writer(place):
        with pytest.raises(StoreBusy, match="another writes store"):
            keeping.put("staging/1-a/1", b"late", None, None)
    assert not files_of(place).has("staging/1-a/1")


def test_what_changes_only_as_it_was_seen_is_left_where_there_is_nothing(
    faulty: Any, place: str
) -> None:
    """Amazon S3 answers If-Match with 404 then, others with 412."""
    objects = files_of(place).bucket
    objects.put("a", b"1")
    found = objects.get("a")
    assert found is not None
    objects.delete(["a"])
    assert not objects.swap("a", b"2", found.e_tag)
    gone = b"<Error><Code>NoSuchKey</Code></Error>"
    faulty.before = lambda asked: (404, gone) if asked.method == "PUT" else None
    assert not objects.swap("a", b"2", found.e_tag)
    assert objects.get("a") is None

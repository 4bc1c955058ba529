"""The files of a store that clients change: the store's lock, the clients' lock, and each change.

The server holds the store's own lock as long as it takes writes, so nobody writes past it. Among
its clients it keeps another one: the object `writer.lock` that they change by If-Match, as they
would in a bucket. It lies in staging, so that it survives a restart of the server, and is gone when
somebody else had the store.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

from gradstore.errors import BadInput, DamagedFile
from gradstore.format.canonical import parse
from gradstore.format.layout import METADATA
from gradstore.format.paths import StorePath, check_parts, file_at
from gradstore.serve.checking import Checks
from gradstore.serve.problems import Missing, Refusal
from gradstore.serve.removing import needed
from gradstore.serve.served import Served
from gradstore.serve.turns import Turns
from gradstore.storage.leases import LEASES
from gradstore.storage.local import STAGING, StoreFiles
from gradstore.storage.location import ObjectPath
from gradstore.storage.lock import LOCK
from gradstore.storage.objects import ObjectFiles
from gradstore.storage.places import files_at, lock_of
from gradstore.storage.reading import ReadFiles
from gradstore.store.empty_place import check_empty
from gradstore.store.reader import Store

#: Folder in staging of what the server itself keeps, and the clients' lock in it.
SERVICE = "service"
_LOCK = f"{STAGING}/{SERVICE}/lock"

#: Changes that are made at the same time.
CHANGES_AT_ONCE = 16

_DAMAGED = "What is damaged is repaired where the store lies (`gradstore repair`)"

#: Kinds of files whose check must still hold when they get their names.
_IN_ORDER = ("commit", "root", "request", "receipt")

#: Bytes of the clients' lock.
_LOCK_BYTES = 1 << 16


def tag_of(data: bytes | memoryview) -> str:
    """Return the ETag of some bytes."""
    return f'"{hashlib.sha256(data).hexdigest()}"'


def kind_of(files: ReadFiles, path: str) -> str:
    """Return the kind of a path; "nothing" below what is no folder, as in a bucket."""
    try:
        return files.kind(path)
    except DamagedFile:
        return "nothing"


class Keeping:
    """Changes of one store's files, from several threads.

    Args:
        served: the store, which there need not be yet.

    Raises:
        BadInput: the folder holds something else, or the store lies behind another service.
        StoreBusy: another process writes to it.
        StoreIOError: it can't be written.
    """

    def __init__(self, served: Served) -> None:
        if isinstance(served.path, ObjectPath) and served.path.is_service:
            raise BadInput(f'store "{served.path}" is behind a service already; have that one take '
                           "the writes")  # fmt: skip
        self._served = served
        self._held = files_at(served.path)
        if not self._held.has(METADATA):
            check_empty(self._held)
            self._held.make_root()
        self._lock = lock_of(self._held, instead="stop it, and start this server then")
        self._lock.acquire()
        self._free: queue.SimpleQueue[StoreFiles] = queue.SimpleQueue()
        writers = [files_at(served.path) for _ in range(CHANGES_AT_ONCE)]
        for each in writers:
            if isinstance(each, ObjectFiles) and isinstance(self._held, ObjectFiles):
                each.bucket.guard = self._held.bucket.guard  # of the one that holds the lock
            self._free.put(each)
        #: Folders in staging that no client sees or changes.
        self.hidden = frozenset({SERVICE, self._held.own, *(each.own for each in writers)})
        #: Held while what is checked must stay as it is until the change is made: of what is
        #: committed or removed, and of what is replaced.
        self._order, self._replacing = threading.Lock(), threading.Lock()
        self._checks = Checks(served.files, self._view)
        #: Shared by changes, had alone by a change of the clients' lock: so no change of a writer
        #: that lost the lock comes after it.
        self._turns = Turns()
        with self._writer() as files:
            self._holders = _holders(files.read_if_there(_LOCK))

    def close(self) -> None:
        """Let the store go."""
        while not self._free.empty():
            self._free.get().close()
        self._lock.release()
        self._held.close()

    # ---- changes -----------------------------------------------------------------------------

    def read_lock(self) -> bytes | None:
        """Return the clients' lock, None where nobody has taken it."""
        with self._writer() as files:
            return files.read_if_there(_LOCK)

    def put(
        self, path: str, data: bytes, if_match: str | None, if_none_match: str | None,
        writer: str = "",
    ) -> bool:  # fmt: skip
        """Write a file, durably.

        Args:
            path: of the file.
            data: its bytes.
            if_match: ETag of the bytes that it must have.
            if_none_match: "*" where there must be none.
            writer: token of the holder of the clients' lock that it is for, "" for no holder.

        Returns:
            True where it is new, False where it was there.

        Raises:
            BadInput: no file of a store, or what it holds is no such file's.
            Refusal: the condition does not hold, is missing, or something must come before.
            ProvenanceMismatch: lists every difference from what is stored.
            StoreIOError: it can't be written.
        """
        where = self._seen(path)
        if if_none_match not in (None, "*"):
            raise BadInput(f"If-None-Match is {if_none_match!r}; only * is taken with PUT")
        if where.kind == "lock":
            with self._turns.alone():
                new = self._swap(_LOCK, data, if_match, if_none_match, most_bytes=_LOCK_BYTES)
                self._holders = _holders(data)
                return new
        if if_match is not None:
            if where.kind != "staging":
                raise Refusal(428, "condition-required", f"{path} never changes: write it with "
                              "If-None-Match: *")  # fmt: skip
            return self._swap(path, data, if_match, None)
        if if_none_match is None:
            return self._replace(where, data, writer)
        with self._order if where.kind in _IN_ORDER else nullcontext():
            there = self._served.files.has(path)
            if where.kind not in ("staging", "claim"):
                self._checks.check(where, data)
            with self._turns.shared(), self._writer() as files:
                self._check_holder(path, writer)
                if not files.publish(path, data):
                    raise _taken(path)
            return not there

    def remove(self, paths: Iterable[str], writer: str = "") -> None:
        """Remove files; what is no file, or is not there, is passed over.

        Raises:
            BadInput: a path that no store has.
            Refusal: something committed needs one of them; nothing was removed.
        """
        wanted = [check_parts(path) for path in paths]
        with self._order:
            self._check_removable(wanted)
            with self._turns.shared(), self._writer() as files:
                for path in wanted:
                    self._check_holder(path, writer)
                for path in wanted:
                    if path and kind_of(files, path) == "file":
                        files.remove(path)
            self._checks.forget_plans()

    def copy(self, source: str, target: str) -> None:
        """Copy a file into staging, as when a damaged one is set aside.

        Raises:
            Missing: there is none.
            Refusal: the target is not in staging, or is taken.
        """
        if self._seen(target).kind != "staging":
            raise Refusal(422, "bad-input", f"{target} is not in staging, and copies go nowhere "
                          "else")  # fmt: skip
        data = self._served.files.read_if_there(self._seen(source).path)
        if data is None:
            raise Missing(f"{source} is not there")
        with self._writer() as files:
            if not files.publish(target, data):
                raise _taken(target)

    # ---- private helpers ---------------------------------------------------------------------

    def _view(self) -> Store | None:
        try:
            return self._served.view()
        except Missing:
            return None

    @contextmanager
    def _writer(self) -> Iterator[StoreFiles]:
        """Lend the files of one thread."""
        files = self._free.get()
        try:
            yield files
        finally:
            self._free.put(files)

    def _seen(self, path: str) -> StorePath:
        """Tell what a path is; of the server's own folders a client sees nothing."""
        found = file_at(path)
        if found.kind == "staging" and path.split("/")[1] in self.hidden:
            raise BadInput(f"{path!r} is in a folder of the server's own")
        return found

    def _swap(
        self, path: str, data: bytes, if_match: str | None, if_none_match: str | None,
        most_bytes: int | None = None,
    ) -> bool:  # fmt: skip
        """Replace a file that has an ETag, or write one that there is not."""
        if if_match is None and if_none_match is None:
            raise Refusal(428, "condition-required", f"{path} changes only with If-Match, or "
                          "If-None-Match: * where there is none")  # fmt: skip
        if most_bytes is not None and len(data) > most_bytes:
            raise BadInput(f"{LOCK} takes {most_bytes:,} bytes at most")
        with self._replacing, self._writer() as files:
            found = files.read_if_there(path)
            tag = None if found is None else tag_of(found)
            if tag != if_match:
                raise _taken(path)
            files.make_directory(path.rpartition("/")[0])
            files.replace(path, data, found)
            return found is None

    def _check_holder(self, path: str, writer: str) -> None:
        """Refuse a writer that does not hold the clients' lock, or no longer.

        What is in staging is a writer's own, but for claims: it may be written before the lock is
        taken. Who names itself no holder may write while there is none.
        """
        if path.startswith(f"{STAGING}/") and not path.startswith(f"{LEASES}/"):
            return
        if writer in self._holders if writer else not self._holders:
            return
        who = ", ".join(self._holders.values()) or "nobody"
        raise Refusal(409, "not-the-writer", f"{path} is not changed: the store is held by {who}, "
                      "and not, or no longer, by who asks. Run again: what is finished is reused",
                      exit_code=6)  # fmt: skip

    def _replace(self, where: StorePath, data: bytes, writer: str) -> bool:
        """Write a file without a condition, where that can lose nothing that was published."""
        if where.kind not in ("staging", "root"):
            raise Refusal(428, "condition-required", f"{where.path} is never overwritten: write it "
                          f"with If-None-Match: *. {_DAMAGED}")  # fmt: skip
        # In this order: who changes the clients' lock has its turn alone, and then replaces.
        in_order = self._order if where.kind == "root" else nullcontext()
        with in_order, self._turns.shared(), self._replacing:
            with self._writer() as files:
                found = files.read_if_there(where.path)
                if where.kind == "root":
                    self._checks.check_newer_root(data)
                self._check_holder(where.path, writer)
                files.make_directory(where.path.rpartition("/")[0])
                files.replace(where.path, data, found)
            return found is None

    def _check_removable(self, paths: Iterable[str]) -> None:
        for path in paths:
            top, _, below = path.partition("/")
            if top == STAGING and below.split("/")[0] in self.hidden:
                raise BadInput(f"{path!r} is in a folder of the server's own")
            if path == LOCK:
                raise BadInput(f"{LOCK} is not removed; write one without holders in its place")
        for path, needs in needed(self._view(), paths):
            raise Refusal(409, "committed", f"{path} is needed by {needs}, and what is committed "
                          f"is not removed. Retire it first (`gradstore gc`). {_DAMAGED}"
                          )  # fmt: skip


def _holders(record: bytes | None) -> dict[str, str]:
    """Map the tokens of the clients' lock's holders to who they are."""
    try:
        holders = parse(record or b"{}").get("holders", [])
        return {str(each["token"]): str(each["who"]) for each in holders}
    except (ValueError, TypeError, KeyError):
        return {}


def _taken(path: str) -> Refusal:
    return Refusal(412, "taken", f"{path} holds other bytes than this request expects; read it, "
                   "and compare")  # fmt: skip

"""Requests to a server of objects: what may be asked, tried again, and how a failure is judged.

`s3` and `service` speak to one kind of server each. A request that got no answer, or one that a
moment may change, is sent again for a while. So a conditional write may meet its own object:
whoever asked compares what is there with what it wrote.
"""

from __future__ import annotations

import logging
import random
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from gradstore.errors import StoreError
from gradstore.storage.location import ObjectPath

_log = logging.getLogger(__name__)

#: Seconds after its first failure for which a request is sent again, and for which the first of all
#: is, whose endpoint may be wrong.
PATIENCE_SECONDS, FIRST_PATIENCE_SECONDS = 60.0, 5.0

#: The same where a server that is well asks to come back later, since others write, too.
BUSY_PATIENCE_SECONDS = 600.0

#: Seconds between two tries, at first and at most; a server may ask for more.
_FIRST_WAIT_SECONDS, _WAIT_SECONDS = 0.05, 5.0

T = TypeVar("T")


class Found(NamedTuple):
    """An object as it was read.

    Attributes:
        data: its bytes, (size,) uint8; none where it is larger than was asked for.
        size: in bytes.
        e_tag: the server's name for this content.
    """

    data: memoryview
    size: int
    e_tag: str


class Failure(NamedTuple):
    """Meaning of a failed request.

    Attributes:
        answered: a server of the right kind answered.
        may_pass: the same request may be answered otherwise a moment later.
        reason: in a line, without what may be secret.
        wait_seconds: that the server asks to wait for.
        is_busy: the server is well, and has no room just now.
    """

    answered: bool
    may_pass: bool
    reason: str
    wait_seconds: float = 0.0
    is_busy: bool = False


class Bucket(ABC):
    """Objects below one place of a server; keys are relative to it. Used from several threads.

    Args:
        place: where they are.
    """

    def __init__(self, place: ObjectPath) -> None:
        self.place = place
        #: Name of the writer that uses it, which a service compares with the lock's holders.
        self.writer = ""
        #: Called with the keys before each try of a change; raises where the lock may be lost.
        self.guard: Callable[[Sequence[str]], None] = lambda _: None
        self._answered = False

    @abstractmethod
    def get(self, key: str, most_bytes: int = sys.maxsize) -> Found | None:
        """Read an object; None where there is none.

        Args:
            key: its key.
            most_bytes: of a larger one nothing is read but its size.
        """

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Return an object's size in bytes; None where there is none."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> str | None:
        """Write an object, whatever was there; return its version where old ones are kept."""

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object that there is not; False, and no change, where there is another.

        Where there is one of the very same bytes, as after an answer that was lost, it may be
        either; so after False compare what is there.
        """
        return self._put_if("write", key, data, None)

    def swap(self, key: str, data: bytes, e_tag: str | None) -> bool:
        """Write an object in place of the one with an ETag; None: of nothing.

        Returns:
            Whether it holds `data` now, of which no two writers may write the same.
        """
        if self._put_if("replace", key, data, e_tag):
            return True
        found = self.get(key)
        return found is not None and found.data == data

    @abstractmethod
    def _put_if(self, verb: str, key: str, data: bytes, e_tag: str | None) -> bool:
        """Write on the condition that an object has an ETag; None: that there is none."""

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; a missing one is no error."""

    @abstractmethod
    def copy(self, key: str, target: str) -> None:
        """Copy an object within the server."""

    @abstractmethod
    def sizes(self, folder: str) -> dict[str, int]:
        """Map the key of every object below a folder to its size; what was written last may lack.

        Args:
            folder: the keys' beginning, up to a slash; "" for all.
        """

    @abstractmethod
    def has_below(self, folder: str) -> bool:
        """Tell whether a listing shows an object below a folder."""

    @abstractmethod
    def names(self, folder: str) -> set[str]:
        """List the names right below a folder; what was written last may lack."""

    @abstractmethod
    def check_writable(self) -> None:
        """Refuse a place that is known to take no writes, before anything is written.

        Raises:
            StoreError: it takes none of this process.
        """

    # ---- failures ----------------------------------------------------------------------------

    @abstractmethod
    def _failures(self) -> tuple[type[Exception], ...]:
        """Return the classes of what a failed request raises."""

    @abstractmethod
    def _judged(self, error: Exception) -> Failure:
        """Judge a failed request."""

    @abstractmethod
    def _failed(self, what: str, error: Exception, failure: Failure, again: str) -> StoreError:
        """Make the error that a user sees.

        Args:
            what: 'cannot write "..."'.
            error: of the last try.
            failure: the same, judged.
            again: how often it was tried again, "" for never.
        """

    def _changed(self, verb: str, keys: Sequence[str], act: Callable[[], T]) -> T:
        """Return what a request gives that changes objects; the guard is asked before each try."""

        def guarded() -> T:
            self.guard(keys)
            return act()

        return self._tried(verb, keys[0], guarded)

    def _tried(self, verb: str, key: str, act: Callable[[], T]) -> T:
        """Return what a request gives, sent again while its failure may pass.

        Raises:
            StoreError: it failed, or failed for too long.
        """
        failing_since, tries = 0.0, 0
        while True:
            try:
                result = act()
            except self._failures() as error:
                failure = self._judged(error)
                self._answered = self._answered or failure.answered
                now = time.monotonic()
                failing_since = failing_since or now
                patience = PATIENCE_SECONDS if self._answered else FIRST_PATIENCE_SECONDS
                patience = BUSY_PATIENCE_SECONDS if failure.is_busy else patience
                wait = min(_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2**tries) * random.uniform(0.5, 1)
                wait = max(wait, failure.wait_seconds * random.uniform(1, 1.25))
                if not failure.may_pass or now - failing_since + wait > patience:
                    what = f'cannot {verb} "{self.place / key if key else self.place}"'
                    again = f", and again {tries} time(s)" if tries else ""
                    raise self._failed(what, error, failure, again) from error
                if not tries:
                    _log.info("%s: trying again: %s", self.place / key, failure.reason)
                time.sleep(wait)
                tries += 1
            else:
                self._answered = True
                return result

"""Chunks of a committed generation: each checked before its first use, some kept mapped."""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from gradstore.errors import DamagedFile, Fault
from gradstore.format.layout import CRC_BYTES, ArraySpec, generation_path
from gradstore.format.plans import Plan
from gradstore.storage.reading import ReadFiles
from gradstore.store.unit_files import check_chunk

_MAPS_KEPT = 16

#: Bytes of a chunk above which a reader maps it.
_READ_BYTES = 1 << 26
T = TypeVar("T")


class Chunks:
    """Chunks of one generation, for several threads.

    Size and crc32c of a chunk are checked once per process.

    Args:
        files: the store's files.
        plan: the generation's plan.
        sums: (units, arrays) uint32, crc32c of each chunk, arrays in the order of the plan.
        explain: called with the generation's name when a file is not as it should be; may raise
            what the cause really is.
    """

    def __init__(
        self,
        files: ReadFiles,
        plan: Plan,
        sums: npt.NDArray[np.uint32],
        explain: Callable[[str], None] | None = None,
    ) -> None:
        self._files, self._plan, self._sums, self._explain = files, plan, sums, explain
        self._base = generation_path(plan.name)
        self._checked = np.zeros(sums.shape, dtype=bool)
        self._place = {spec.name: place for place, spec in enumerate(plan.arrays)}
        self._maps: OrderedDict[str, np.ndarray] = OrderedDict()
        self._guard = threading.Lock()  # of the maps
        # Units that were read last: of each of several threads, which take rows in order.
        self._last: deque[int] = deque([-1], maxlen=16)

    def mapped(self, spec: ArraySpec, unit: int, *, keep: bool = True) -> np.ndarray:
        """Map one chunk, without its crc32c.

        Args:
            spec: of which array.
            unit: of which unit.
            keep: whether it may be read again soon; the last few maps are kept.

        Returns:
            The chunk, padding included, read-only.

        Raises:
            DamagedFile: it is not the committed one.
        """
        name = spec.chunk_path(unit)
        with self._guard:
            if name in self._maps:
                self._maps.move_to_end(name)
                return self._maps[name]
        if keep:
            self._read_ahead(spec, unit)
        size, path = spec.chunk_bytes(self._plan.unit_rows), f"{self._base}/{name}"
        mapped = self._told(lambda: self._files.map(path, size))
        self._check(path, mapped, (unit, self._place[spec.name]))
        little = np.dtype(spec.dtype).newbyteorder("<")
        shape = spec.chunk_shape(self._plan.unit_rows)
        chunk = np.frombuffer(mapped[:-CRC_BYTES], dtype=little).reshape(shape)
        if keep:
            with self._guard:
                self._maps[name] = chunk
                while len(self._maps) > _MAPS_KEPT:
                    self._maps.popitem(last=False)
        return chunk

    def reader(self, spec: ArraySpec) -> Callable[[int, int, int], np.ndarray]:
        """Return what reads rows of an array for one thread that goes over many of them once.

        A chunk is read into memory of the reader's. A map takes four times as long: its pages are
        looked up one by one, and let go of in all processors.

        Returns:
            (unit, start, stop) -> rows [start, stop) of the chunk, in the stored dtype, until the
            next call. It raises DamagedFile where a chunk is not the committed one.
        """
        size, place = spec.chunk_bytes(self._plan.unit_rows), self._place[spec.name]
        little = np.dtype(spec.dtype).newbyteorder("<")
        shape = spec.chunk_shape(self._plan.unit_rows)[1:]
        width = (size - CRC_BYTES) // self._plan.unit_rows
        if size > _READ_BYTES or self._files.whole_only:
            return lambda unit, start, stop: self.mapped(spec, unit)[start:stop]
        # It begins with a page, and a process that is forked has its own.
        memory = memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

        def read(unit: int, start: int, stop: int) -> np.ndarray:
            self._read_ahead(spec, unit)
            path = f"{self._base}/{spec.chunk_path(unit)}"
            whole = not self._checked[unit, place]
            first, length = (0, size) if whole else (start * width, (stop - start) * width)
            parts = [(first, memory[:length])]
            self._told(lambda: self._files.read_parts(path, size, parts))
            if whole:
                self._check(path, memory, (unit, place))
            found = memory[start * width - first : stop * width - first]
            return np.frombuffer(found, little).reshape(stop - start, *shape)

        return read

    def rows(self, spec: ArraySpec, rows: np.ndarray) -> np.ndarray:
        """Read rows here and there, each chunk opened once.

        Args:
            spec: of which array.
            rows: (k,) positions within the generation, in any order.

        Returns:
            (k, ...) values in the stored dtype.

        Raises:
            DamagedFile: a chunk is not the committed one.
        """
        little = np.dtype(spec.dtype).newbyteorder("<")
        found = np.empty((len(rows), *spec.chunk_shape(self._plan.unit_rows)[1:]), little)
        if not found.size:
            return found
        units, within = np.divmod(rows, self._plan.unit_rows)
        in_turn = np.argsort(units, kind="stable")
        each = zip(*(of[in_turn].tolist() for of in (units, within)), in_turn.tolist(), strict=True)
        width, buffer = found[0].nbytes, found.data.cast("B")
        checked = self._checked[:, self._place[spec.name]]
        size = spec.chunk_bytes(self._plan.unit_rows)
        for unit, of_unit in groupby(each, key=itemgetter(0)):
            places = [(at, place) for _, at, place in of_unit]
            name = spec.chunk_path(unit)
            if checked[unit] and name not in self._maps:
                parts = [(at * width, buffer[place * width : (place + 1) * width])
                         for at, place in places]  # fmt: skip
                path = f"{self._base}/{name}"
                self._told(partial(self._files.read_parts, path, size, parts))
            else:
                chunk = self.mapped(spec, unit)
                for at, place in places:
                    found[place] = chunk[at]
        return found

    def _check(self, path: str, data: memoryview, chunk_of: tuple[int, int]) -> None:
        """Compare a whole chunk with its crc32c, the first time."""
        if not self._checked[chunk_of]:
            fault = check_chunk(path, data, int(self._sums[chunk_of]))
            if fault is not None:
                raise self.damaged(fault)
            self._checked[chunk_of] = True

    def _told(self, read: Callable[[], T]) -> T:
        """Read; where a file is not as it should be let `explain` say why."""
        try:
            return read()
        except DamagedFile:
            if self._explain is not None:
                self._explain(self._plan.name)
            raise

    def _read_ahead(self, spec: ArraySpec, unit: int) -> None:
        """Begin to read the next chunks, where the one before was among the last."""
        follows = unit - 1 in self._last
        self._last.append(unit)
        if follows:
            units = range(unit, min(unit + self._files.reads_ahead, len(self._sums)))
            size = spec.chunk_bytes(self._plan.unit_rows)
            self._files.soon({f"{self._base}/{spec.chunk_path(each)}": size for each in units})

    def damaged(self, fault: Fault) -> DamagedFile:
        """Make the error of a file that is not as it was committed."""
        return DamagedFile(fault, str(self._files.root))

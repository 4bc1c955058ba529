"""Sources of rows: each row's data set, and its index in the file, held as numbers."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput, expect

#: Pairs that are made at a time for whoever goes through all of them.
_AT_ONCE = 4096


def check_sources(sources: object, rows: int) -> None:
    """Raise BadInput unless there is a pair (data set, index in its file) for each row."""
    fits = isinstance(sources, Sequence) and not isinstance(sources, str)
    count = len(sources) if isinstance(sources, Sequence) else 0
    wanted = f"a pair (data set, index in its file) for each of {rows:,} rows"
    expect(fits and count == rows, f"sources, {count:,} of them,", sources, wanted)
    first = sources[0] if isinstance(sources, Sequence) and count else ("", 0)
    pair = isinstance(first, Sequence) and not isinstance(first, str) and len(first) == 2
    expect(pair, "the first of sources", first, wanted)


class Sources(Sequence[tuple[str, int]]):
    """A sequence of n pairs (data set, index in its file), in 12 bytes a row instead of 100.

    A slice of it is a tuple of pairs. It is equal to every sequence of the same pairs.

    Attributes:
        names: of the data sets.
        code: (n,) int32, each row's data set as a position in `names`.
        row: (n,) int64, its index in the data set's file.
    """

    __slots__ = ("code", "names", "row")

    def __init__(
        self, names: Sequence[str], code: npt.NDArray[np.int32], row: npt.NDArray[np.int64]
    ) -> None:
        self.names, self.code, self.row = tuple(names), code, row

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, int]]) -> Sources:
        """Hold pairs, the names of their data sets sorted.

        Raises:
            BadInput: they are no pairs of a text and a whole number of 64 bits.
        """
        if isinstance(pairs, Sources):
            return pairs
        try:
            names = sorted({name for name, _ in pairs})
            number = {name: code for code, name in enumerate(names)}
            code = np.fromiter((number[name] for name, _ in pairs), np.int32, len(pairs))
            row = np.fromiter((operator.index(at) for _, at in pairs), np.int64, len(pairs))
            if not all(isinstance(name, str) for name in names):
                raise TypeError("a data set's name is no text")
        except (TypeError, ValueError, OverflowError) as error:
            raise BadInput(
                f"sources are no pairs (data set, index in its file): {error}; "
                'give ("my set", 0) and the like'
            ) from error
        return cls(names, code, row)

    def replaced(self, rows: npt.NDArray[np.bool_], pair: tuple[str, int]) -> Sources:
        """Return the same pairs, with `pair` where `rows` (n,) bool is True.

        The names are those that are left, sorted, as `of` holds them.
        """
        names = [*self.names, pair[0]]
        code = np.where(rows, np.int32(len(self.names)), self.code)
        used = np.unique(code).tolist()
        left = sorted({names[each] for each in used})
        number = np.zeros(len(names), np.int32)
        number[used] = [left.index(names[each]) for each in used]
        return Sources(left, number[code], np.where(rows, np.int64(pair[1]), self.row))

    def __len__(self) -> int:
        return len(self.code)

    @overload
    def __getitem__(self, place: int) -> tuple[str, int]: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[tuple[str, int], ...]: ...
    def __getitem__(self, place: int | slice) -> tuple[str, int] | tuple[tuple[str, int], ...]:
        if isinstance(place, slice):
            return tuple(self._pairs(place))
        return self.names[self.code[place]], int(self.row[place])

    def __iter__(self) -> Iterator[tuple[str, int]]:
        for start in range(0, len(self), _AT_ONCE):
            yield from self._pairs(slice(start, start + _AT_ONCE))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        if isinstance(other, Sources) and self.names == other.names:
            return np.array_equal(self.code, other.code) and np.array_equal(self.row, other.row)
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"<Sources: {len(self):,} rows of {', '.join(self.names)}>"

    def _pairs(self, place: slice) -> Iterable[tuple[str, int]]:
        names = map(self.names.__getitem__, self.code[place].tolist())
        return zip(names, self.row[place].tolist(), strict=True)

"""Keeping the text of a row set: parts first, then one commit that names them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from gradstore.errors import BadInput, DamagedFile, Fault, expect, expect_whole
from gradstore.format.commits import Commit
from gradstore.format.layout import TEXTS_VERSION
from gradstore.format.records import RowSet
from gradstore.format.text_table import (
    PART_BYTES,
    PART_ROWS,
    Formats,
    Text,
    TextPart,
    TextTable,
    part_bytes,
    part_path,
    same_rows,
)
from gradstore.storage.leases import Leases
from gradstore.storage.local import StoreFiles
from gradstore.store.generation_writer import publish_commit, raise_schema
from gradstore.store.own_units import quarantine
from gradstore.store.reader import Store
from gradstore.store.unit_files import publish_anew

#: In place of the text of a row that was removed on request.
_NOTHING = Text("", "", 0)


def keep_texts(
    files: StoreFiles,
    view: Callable[[], Store],
    rows: RowSet,
    texts: Iterable[Text],
    formats: Formats | None = None,
    *,
    leases: Leases | None = None,
) -> None:
    """Write and commit the text of `rows`, unless the store keeps it; under the writer's lock.

    A crash leaves parts without a commit; they are written again. Of several workers one writes;
    the others wait, since the text comes before the generation in the chain of commits.

    Args:
        files: the store's files.
        view: gives the store as it is now.
        rows: n rows, in order.
        texts: one for each row; read only where the store does not keep them.
        formats: of their `original`, by data set.
        leases: of a worker among others.

    Raises:
        BadInput: there are more or fewer texts than rows, or what is given is no `Text`.
        StoreIOError: the disk is full, or cannot be written.
    """
    rows = view().without_forgotten(rows)

    def kept() -> bool:
        return rows.sha256 in view().text_commits()

    def keep() -> None:
        _keep(files, view, _Table(rows, texts, formats or {}), shared=leases is not None)

    if leases is not None:
        leases.once(f"texts/{rows.sha256}", kept, keep, "the text of the rows")
    elif not kept():
        keep()


@dataclass(frozen=True)
class _Table:
    """The text of a row set, as it was given."""

    rows: RowSet
    texts: Iterable[Text]
    formats: Formats


def _keep(files: StoreFiles, view: Callable[[], Store], table: _Table, *, shared: bool) -> None:
    rows = table.rows
    parts: list[TextPart] = []
    first = 0
    for chunk in _cut(table.texts):
        if first + len(chunk) > len(rows):
            raise BadInput(f"more than {len(rows):,} texts for {len(rows):,} rows: give one each")
        gone = rows.forgotten[first : first + len(chunk)].tolist()
        chunk = [_NOTHING if left_out else text
                 for text, left_out in zip(chunk, gone, strict=True)]  # fmt: skip
        data = part_bytes(rows, first, chunk, table.formats)
        data = _publish(files, part_path(rows.sha256, len(parts)), data, shared=shared)
        parts.append(TextPart(len(chunk), len(data), hashlib.sha256(data).hexdigest()))
        first += len(chunk)
    if first != len(rows):
        raise BadInput(f"{first:,} texts for {len(rows):,} rows: give one for each row")
    store = view()
    raise_schema(files, store, TEXTS_VERSION)
    draft = Commit(
        number=len(store.commits) + 1,
        store_uuid=store.uuid,
        parent=None if store.head is None else store.head.sha256,
        kind="texts",
        generations=(),
        texts=(TextTable(rows.sha256, tuple(parts)),),
    )
    publish_commit(files, draft, view, shared=shared)


def _cut(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Cut texts into what one part holds."""
    left = map(_checked, texts)
    while chunk := list(islice(left, 1)):
        size = _size(chunk[0])
        while len(chunk) < PART_ROWS and size < PART_BYTES:
            more = next(left, None)
            if more is None:
                break
            chunk.append(more)
            size += _size(more)
        yield chunk


def _checked(text: Text) -> Text:
    """Return a text; raise BadInput for anything else."""
    wanted = "Text(prompt, response, tokens) for each row"
    expect(isinstance(text, Text), "one of texts", text, wanted)
    expect(isinstance(text.prompt, str), "prompt", text.prompt, wanted)
    expect(isinstance(text.response, str), "response", text.response, wanted)
    expect(text.original is None or isinstance(text.original, str), "original", text.original,
           "the row as JSON, or None")  # fmt: skip
    expect_whole(text.tokens, "tokens", None)
    return text


def _size(text: Text) -> int:
    return len(text.prompt) + len(text.response) + len(text.original or "")


def _publish(files: StoreFiles, path: str, data: bytes, *, shared: bool) -> bytes:
    """Publish a part; return its bytes, which another worker may have spelled otherwise."""
    if files.publish(path, data):
        return data
    if shared:
        found = files.read(path)
        if same_rows(found, data):
            return found
    if publish_anew(files, path, data):
        return data
    if shared:
        fault = Fault(path, "the text of these rows", "other text")
        raise DamagedFile(fault, str(files.root))
    quarantine(files, path)  # of a writer that died before it committed
    if not files.publish(path, data):
        raise DamagedFile(Fault(path, "no file", "another writer's"), str(files.root))
    return data

"""Migration of a store to today's schema, in place, by one rename.

Every schema so far only added: documents and chunks of an earlier one are valid in the later ones,
byte for byte. So the root, which says what a reader must understand, is all there is to change, and
a crash leaves the old root or the new one. A later schema that changes more will write beside.
"""

from __future__ import annotations

from gradstore.errors import DamagedData
from gradstore.format.layout import NEEDS
from gradstore.storage.local import StoreFiles
from gradstore.storage.location import Place
from gradstore.store.forgetting import finish_removals
from gradstore.store.generation_writer import raise_schema
from gradstore.store.held import held_store
from gradstore.store.verify import verify_store


def migrate_store(path: Place, files: StoreFiles | None = None) -> tuple[int, int]:
    """Bring a store to today's schema, after every byte of it was verified.

    Args:
        path: where the store is.
        files: the store's files, for tests that interrupt them.

    Returns:
        The schema before, and the schema now.

    Raises:
        BadInput: there is no store.
        DamagedData: it is damaged; nothing was changed.
        StoreBusy: another process writes to it.
    """
    newest = max(NEEDS)
    with held_store(path, files) as (held, view):
        before = view().schema_version
        if before == newest:
            return before, newest
        report = verify_store(path)
        if not report.ok:
            raise DamagedData(
                f'store "{path}" is not migrated: {report.faults[0]}. Run `dataflex-cli gradstore '
                "repair` first"
            )
        finish_removals(held, view)
        raise_schema(held, view(), newest)
    return before, newest

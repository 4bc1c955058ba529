"""Checks of the documents of a removal that somebody asked for, which a client gives.

A request is carried out by whoever writes next, and those that come after it are numbered on from
it: so one that is out of place would stop every later writer.
"""

from __future__ import annotations

from gradstore.errors import BadInput
from gradstore.format.forgotten import Receipt, Request
from gradstore.format.layout import FORGOTTEN_VERSION, request_path
from gradstore.format.paths import StorePath
from gradstore.serve.problems import out_of_order, reading
from gradstore.storage.reading import ReadFiles
from gradstore.store.forgetting import affected
from gradstore.store.reader import Store


def check_request(files: ReadFiles, store: Store, where: StorePath, data: bytes) -> None:
    """Check a request before it is published under a free name.

    Args:
        files: the store's files.
        store: as it is now.
        where: its path.
        data: its bytes.

    Raises:
        BadInput: it is none, or is of another store or of commits that this one has not.
        Refusal: something must come before it.
        DamagedData: an earlier request is damaged.
    """
    with reading(where.path):
        request = Request.from_bytes(data)
    if (request.number, request.store_uuid) != (where.number, store.uuid):
        raise BadInput(f"{where.path} is request {request.number} of {request.store_uuid}")
    earlier = [each for each, _ in store.requests()]
    if where.number <= len(earlier):
        return  # the same bytes again, or taken
    if where.number != len(earlier) + 1:
        raise out_of_order(f"{where.path} is no successor of request {len(earlier)}")
    if store.schema_version < FORGOTTEN_VERSION:
        raise out_of_order(
            f"{where.path} needs schema {FORGOTTEN_VERSION}: raise that of zarr.json first, which "
            f"is {store.schema_version}"
        )
    seals = [None, *(commit.sha256 for commit in store.commits)]
    if request.commits >= len(seals) or request.commit_before != seals[request.commits]:
        raise BadInput(
            f"{where.path} names commit {request.commits} as {request.commit_before}, which is "
            f"none of this store's {len(store.commits)}"
        )
    if earlier and request.key != earlier[0].key:
        raise BadInput(f"{where.path} has another key than the requests before it")


def check_receipt(files: ReadFiles, store: Store, where: StorePath, data: bytes) -> None:
    """Check a receipt before it is published under a free name; see `check_request`.

    Raises:
        BadInput: it is none, or no receipt of this store's request.
        Refusal: something must come before it: the request, or the removal of its rows.
        DamagedData: a plan or a text is damaged, so that what is left is not known.
    """
    with reading(where.path):
        receipt = Receipt.from_bytes(data)
        asked = files.read_if_there(request_path(where.number))
        if asked is None:
            raise out_of_order(f"{where.path} comes before its request")
        request = Request.from_bytes(asked)
    told = (receipt.number, receipt.store_uuid, receipt.request_sha256)
    same = (receipt.asked, receipt.commit_before) == (request.asked, request.commit_before)
    if told != (where.number, store.uuid, request.to_dict()["sha256"]) or not same:
        raise BadInput(f"{where.path} is no receipt of this store's request {where.number}")
    if files.has(where.path):
        return  # the same bytes again, or taken
    if receipt.commit_after != (None if store.head is None else store.head.sha256):
        raise out_of_order(f"{where.path} is not of commit {len(store.commits)}, the newest")
    left = affected(files, store, request.key, set(request.ids))
    if names := [*left.rows, *left.unfinished, *left.texts]:
        raise out_of_order(
            f"{where.path} comes before the removal of the rows: {names[0]} still has some"
        )

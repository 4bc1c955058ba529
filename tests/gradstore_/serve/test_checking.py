"""What is well-formed and false: a server that takes writes compares it with what it is about."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from gradstore.format.canonical import canonical_json, seal
from gradstore.format.commits import Commit
from gradstore.format.forgotten import Receipt, Request, row_ids
from gradstore.format.layout import root_json
from gradstore.format.text_table import Text, TextPart, TextTable, part_bytes, part_path
from gradstore.format.unit_records import UnitRecord, crc32c
from gradstore.storage.wire import content_digest
from gradstore.store.forgetting import forget, request_for
from gradstore.store.held import held_store
from gradstore.store.verify import verify_store

if TYPE_CHECKING:
    from conftest import StoreKit

UNIT, STATUS = "generations/train/1/units/0.json", "generations/train/1/status/c/0"
COMMIT = "commits/1.json"
_ORDER = ("^generations/zarr.json", "^zarr.json", "^spaces/", "^plans/", "/zarr.json$", "/c/",
          "/units/", "^texts/", "^commits/", "^forgotten/")  # fmt: skip


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a store but its lock and staging, in the order of writing."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes()
             for path in folder.rglob("*") if path.is_file()}  # fmt: skip
    kept = {name: data for name, data in found.items()
            if name.split("/")[0] not in ("staging", "writer.lock")}  # fmt: skip
    rank = {name: next(i for i, form in enumerate(_ORDER) if re.search(form, name))
            for name in kept}  # fmt: skip
    return dict(sorted(kept.items(), key=lambda each: (rank[each[0]], each[0])))


class Client:
    """A client that writes what it likes."""

    def __init__(self, service: Any) -> None:
        self.folder = service.folder
        headers = {"Authorization": f"Bearer {service.write_key}"}
        self.http = httpx.Client(base_url=service.address, headers=headers, timeout=30)

    def put(self, path: str, data: bytes) -> httpx.Response:
        once = {} if path == "zarr.json" else {"If-None-Match": "*"}
        headers = {"Content-Digest": content_digest(data), **once}
        return self.http.put(f"/v1/files/{path}", content=data, headers=headers)

    def put_all(self, files: dict[str, bytes], *but: str) -> None:
        for path, data in files.items():
            if path not in but:
                headers = {"Content-Digest": content_digest(data), "If-None-Match": "*"}
                answer = self.http.put(f"/v1/files/{path}", content=data, headers=headers)
                assert answer.status_code == 201, (path, answer.text)


@pytest.fixture
def client(service: Any) -> Iterator[Client]:
    made = Client(service)
    yield made
    made.http.close()


def refused(answer: httpx.Response, says: str) -> None:
    assert answer.status_code in (409, 422), answer.text
    assert says in answer.json()["detail"]


@pytest.fixture
def files(kit: StoreKit, tmp_path: Path) -> dict[str, bytes]:
    kit.build(tmp_path / "reference")
    return files_of(tmp_path / "reference")


@pytest.mark.parametrize(
    ("status", "says"),
    [
        ({"ok": 16}, "counts rows"),
        ({"ok": 14, "masked": 2}, "counts rows"),
        ({"ok": 15, "odd": 1}, "no status"),
        ({"ok": "16"}, "no whole number"),
        ({"ok": 17, "masked": -1}, "no whole number"),
        ([16], "no mapping"),
    ],
)
def test_a_record_whose_counts_are_not_those_of_its_rows_is_refused(
    client: Client, files: dict[str, bytes], status: Any, says: str
) -> None:
    client.put_all(files, UNIT, COMMIT)
    record, _ = UnitRecord.from_bytes(files[UNIT])
    assert record.status == {"ok": 14, "non_finite": 1, "zero_norm": 1}
    lying = canonical_json(seal({**record.to_dict(), "status": status}))
    refused(client.put(UNIT, lying), says)
    assert client.put(UNIT, files[UNIT]).status_code == 201
    assert client.put(COMMIT, files[COMMIT]).status_code == 201
    assert verify_store(client.folder).ok


def test_a_status_that_there_is_not_is_refused_with_its_chunk(
    client: Client, files: dict[str, bytes]
) -> None:
    client.put_all(files, STATUS, UNIT, COMMIT)
    codes = bytes([6]) + files[STATUS][1:-4]
    refused(client.put(STATUS, codes + crc32c(codes).to_bytes(4, "little")), "the status 6")
    assert client.put(STATUS, files[STATUS]).status_code == 201


def test_counts_are_those_of_the_rows_and_not_of_the_padding(
    client: Client, files: dict[str, bytes]
) -> None:
    """The last unit has 8 rows in a chunk of 16."""
    last = "generations/train/1/units/2.json"
    client.put_all(files, last, COMMIT)
    record, _ = UnitRecord.from_bytes(files[last])
    assert sum(record.status.values()) == 8
    assert client.put(last, files[last]).status_code == 201


# ---- text ------------------------------------------------------------------------------------


@pytest.fixture
def with_text(kit: StoreKit, tmp_path: Path) -> dict[str, bytes]:
    with kit.writer(tmp_path / "texts") as writer:
        kit.add(writer, n=40)
        writer.keep_texts(kit.rows(40), [Text(f"q{i}", f"a{i}", 3) for i in range(40)])
    return files_of(tmp_path / "texts")


def in_another_order(kit: StoreKit) -> bytes:
    return part_bytes(kit.rows(40, first=1), 0, [Text("q", "a", 3)] * 40, {})


def test_a_text_of_other_rows_is_not_committed(
    kit: StoreKit, client: Client, with_text: dict[str, bytes]
) -> None:
    sha = kit.rows(40).sha256
    path, second = part_path(sha, 0), "commits/2.json"
    real = Commit.from_bytes(with_text[second])
    for data in (in_another_order(kit), b"PAR1 and nothing else PAR1"):
        client.http.post("/v1/removals", json={"paths": [path]}).raise_for_status()
        missing = {name: each for name, each in with_text.items() if name not in (path, second)}
        missing = {n: each for n, each in missing.items() if not (client.folder / n).exists()}
        client.put_all(missing)
        assert client.put(path, data).status_code == 201
        part = TextPart(40, len(data), hashlib.sha256(data).hexdigest())
        named = replace(real, texts=(TextTable(sha, (part,)),)).to_bytes()
        refused(client.put(second, named), "names other text")
        refused(client.put(second, with_text[second]), "comes before")
    client.http.post("/v1/removals", json={"paths": [path]}).raise_for_status()
    assert client.put(path, with_text[path]).status_code == 201
    assert client.put(second, with_text[second]).status_code == 201
    refused(client.put(part_path(sha, 1), with_text[path]), "no part of the text")
    assert verify_store(client.folder).ok


# ---- removals on request ---------------------------------------------------------------------


def request(files: dict[str, bytes], **changes: Any) -> bytes:
    head = Commit.from_bytes(files[COMMIT])
    asked = Request(1, head.store_uuid, "now", "1" * 32, ("2" * 32,), 1, head.sha256)
    return replace(asked, **changes).to_bytes()


@pytest.mark.parametrize(
    ("number", "changes", "says"),
    [
        (7, {"number": 7}, "no successor of request 0"),
        (1, {"store_uuid": "another"}, "request 1 of another"),
        (1, {"commits": 2}, "none of this store's"),
        (1, {"commits": 0}, "none of this store's"),
        (1, {"commit_before": "0" * 64}, "none of this store's"),
        (1, {"ids": ("x",)}, "16 bytes in hex"),
        (1, {"key": "short"}, "16 bytes in hex"),
    ],
)
def test_a_request_that_is_out_of_place_is_refused_and_the_store_goes_on(
    client: Client, files: dict[str, bytes], number: int, changes: dict[str, Any], says: str
) -> None:
    client.put_all(files)
    uuid = Commit.from_bytes(files[COMMIT]).store_uuid
    path = "forgotten/1.request.json"
    refused(client.put(path, request(files)), "needs schema 3")
    assert client.put("zarr.json", root_json(uuid, 3)).status_code == 200
    refused(client.put(f"forgotten/{number}.request.json", request(files, **changes)), says)
    assert verify_store(client.folder).ok
    assert client.put(path, request(files)).status_code == 201
    assert client.put(path, request(files)).status_code == 200
    second = request(files, number=2, key="3" * 32)
    refused(client.put("forgotten/2.request.json", second), "another key")
    assert verify_store(client.folder).ok


def test_a_receipt_is_taken_when_nothing_of_its_rows_is_left(
    kit: StoreKit, client: Client, files: dict[str, bytes], tmp_path: Path
) -> None:
    client.put_all(files)
    head = Commit.from_bytes(files[COMMIT])
    client.put("zarr.json", root_json(head.store_uuid, 3)).raise_for_status()
    ids = tuple(row_ids(kit.rows(1), "1" * 32))
    asked = request(files, ids=ids)
    path = "forgotten/1.receipt.json"
    sha = Request.from_bytes(asked).to_dict()["sha256"]
    receipt = Receipt(1, head.store_uuid, sha, "now", "then", head.sha256, head.sha256, {}, (), (),
                      0)  # fmt: skip
    refused(client.put(path, receipt.to_bytes()), "before its request")
    client.put("forgotten/1.request.json", asked).raise_for_status()
    refused(client.put(path, receipt.to_bytes()), "train/1 still has some")
    other = replace(receipt, commit_after="0" * 64)
    refused(client.put(path, other.to_bytes()), "the newest")
    other = replace(receipt, asked="never")
    refused(client.put(path, other.to_bytes()), "no receipt")


def test_a_removal_through_the_service_passes_every_check(
    kit: StoreKit, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADSTORE_WRITE_TOKEN", service.write_key)
    with kit.writer(service.address) as writer:
        kit.add(writer, n=40)
        writer.keep_texts(kit.rows(40), [Text(f"q{i}", f"a{i}", 3) for i in range(40)])
    with held_store(service.address) as (held, view):
        hashes = {kit.rows(40).hashes[i].tobytes() for i in (2, 7)}
        receipt = forget(held, view, request_for(held, view(), hashes))
    assert receipt.removed == ("train/1",)
    assert verify_store(service.folder).ok

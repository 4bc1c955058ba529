"""What a server that takes writes lets in: each answer's status, and what is there after it."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import Request

from gradstore.errors import BadInput, StoreBusy
from gradstore.format.canonical import canonical_json
from gradstore.format.commits import Commit
from gradstore.format.plans import Plan
from gradstore.format.provenance import provenance_bytes
from gradstore.format.unit_records import UnitRecord
from gradstore.serve.intake import Intake, Limits
from gradstore.serve.keeping import tag_of
from gradstore.serve.problems import Refusal
from gradstore.storage.wire import content_digest
from gradstore.store.reader import open_store
from gradstore.store.verify import verify_store
from gradstore.store.writer import StoreWriter

if TYPE_CHECKING:
    from conftest import StoreKit

PROBLEM = "application/problem+json"
PLAN, UNIT = "plans/train/1.json", "generations/train/1/units/0.json"
CHUNK = "generations/train/1/features/c/0/0"
SPACE = "spaces/gradient/provenance.json"

#: Files in the order in which a store is made.
_ORDER = ("^generations/zarr.json", "^zarr.json", "^spaces/", "^plans/", "/zarr.json$", "/c/",
          "/units/", "^commits/")  # fmt: skip


@pytest.fixture
def files(kit: StoreKit, tmp_path: Path) -> dict[str, bytes]:
    """Every file of a store with one generation of three units, in the order of writing."""
    folder = tmp_path / "reference"
    kit.build(folder)
    found = {path.relative_to(folder).as_posix(): path.read_bytes()
             for path in folder.rglob("*") if path.is_file()}  # fmt: skip
    found.pop("writer.lock")
    return dict(sorted(found.items(), key=lambda each: (rank(each[0]), each[0])))


def rank(path: str) -> int:
    """Place of a file in the order of writing."""
    return next(i for i, form in enumerate(_ORDER) if re.search(form, path))


class Writer:
    """A client that keeps to no order and no rule but those it is told."""

    def __init__(self, service: Any, key: str | None = None) -> None:
        self.service = service
        headers = {"Authorization": f"Bearer {key or service.write_key}"}
        self.client = httpx.Client(base_url=service.address, headers=headers, timeout=30)

    def put(self, path: str, data: bytes, **headers: str | None) -> httpx.Response:
        given = {"Content-Digest": content_digest(data), "If-None-Match": "*"}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        sent = {name: value for name, value in {**given, **named}.items() if value is not None}
        return self.client.put(f"/v1/files/{path}", content=data, headers=sent)

    def put_until(self, files: dict[str, bytes], last: str) -> None:
        """Write everything that comes before a file."""
        for path, data in files.items():
            if path == last:
                return
            assert self.put(path, data).status_code == 201, path

    def remove(self, *paths: str) -> httpx.Response:
        return self.client.post("/v1/removals", json={"paths": paths})


@pytest.fixture
def client_of() -> Iterator[Callable[..., Writer]]:
    """Make clients of a server, with the key that writes or another."""
    made = []

    def make(service: Any, key: str | None = None) -> Writer:
        made.append(Writer(service, key))
        return made[-1]

    yield make
    for each in made:
        each.client.close()


@pytest.fixture
def writer(service: Any, client_of: Callable[..., Writer]) -> Writer:
    return client_of(service)


def refused(answer: httpx.Response, status: int, title: str, *says: str) -> Any:
    """The problem document of a refusal."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == PROBLEM
    told = answer.json()
    assert told["type"] == f"urn:gradstore:{title}"
    for each in says:
        assert each in told["detail"]
    return told


def published(folder: Path) -> set[str]:
    """Paths of all files of a store but for its lock and staging."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {path for path in found if path.split("/")[0] not in ("staging", "writer.lock")}


# ---- who may ---------------------------------------------------------------------------------


def test_only_the_key_that_writes_writes_and_only_in_the_header(
    service: Any, files: dict[str, bytes], client_of: Callable[..., Writer]
) -> None:
    data = files["zarr.json"]
    reader = client_of(service, service.read_key)
    refused(reader.put("zarr.json", data), 403, "read-key", "may only read")
    refused(reader.remove("zarr.json"), 403, "read-key")
    copy = {"source": "zarr.json", "target": "staging/quarantine/0"}
    refused(reader.client.post("/v1/copies", json=copy), 403, "read-key")
    for key in ("wrong-key-of-nobody", service.write_key[:-1], service.write_key + "x"):
        refused(client_of(service, key).put("zarr.json", data), 401, "no-token")
    with httpx.Client(base_url=service.address) as client:
        headers = {"Content-Digest": content_digest(data), "If-None-Match": "*"}
        port = service.address.rpartition(":")[2]
        for where, shown in (
            ("", {"Cookie": f"gradstore-{port}={service.write_key}"}),
            (f"?token={service.write_key}", {}),
            ("", {"Authorization": f"Basic {service.write_key}"}),
        ):
            answer = client.put(f"/v1/files/zarr.json{where}", content=data,
                                headers={**headers, **shown})  # fmt: skip
            refused(answer, 401, "no-token")
        # A page of another site, and another name than the server's.
        bearer = {"Authorization": f"Bearer {service.write_key}", **headers}
        for name, value in (("Origin", "https://evil.example"), ("Host", "evil.example")):
            answer = client.put(
                "/v1/files/zarr.json", content=data, headers={**bearer, name: value}
            )
            assert answer.status_code == 403
    assert published(service.folder) == set()
    assert client_of(service).put("zarr.json", data).status_code == 201
    assert reader.client.get("/v1/files/zarr.json").content == data


def test_without_writable_every_write_is_refused(
    ask: Callable[..., Any], store_path: Path, token: str
) -> None:
    client = ask(store_path)
    for method, path in (("PUT", "files/commits/9.json"), ("POST", "removals"), ("POST", "copies")):
        answer = client.request(method, f"/v1/{path}", json={})
        assert answer.status_code in (404, 405), path
        assert answer.headers["gradstore-most-bytes"] == "0"
    assert client.get("/v1/files/commits/1.json").status_code == 200
    assert "put" not in client.get("/v1/openapi.json").text


# ---- order, and agreement with what is stored ------------------------------------------------


def test_files_put_in_their_order_make_the_store_that_they_are_of(
    kit: StoreKit, writer: Writer, files: dict[str, bytes]
) -> None:
    writer.put_until(files, "")
    assert published(writer.service.folder) == set(files)
    assert verify_store(writer.service.folder).ok
    for path, data in files.items():
        again = writer.put(path, data)
        assert again.status_code == 200, f"{path}: the same bytes again are no fault"
        read = writer.client.get(f"/v1/files/{path}")
        assert (read.content, read.headers["content-digest"]) == (data, content_digest(data))
        assert read.headers["etag"] == again.headers["etag"]


@pytest.mark.parametrize(
    "path",
    [CHUNK, UNIT, "generations/train/1/zarr.json", "generations/train/1/features/zarr.json"],
)
def test_before_its_plan_nothing_of_a_generation_is_taken(
    writer: Writer, files: dict[str, bytes], path: str
) -> None:
    writer.put_until(files, PLAN)
    there = published(writer.service.folder)
    refused(writer.put(path, files[path]), 409, "out-of-order", f"write {PLAN} first")
    assert published(writer.service.folder) == there


def test_each_thing_that_comes_too_early_is_told_what_comes_before(
    writer: Writer, files: dict[str, bytes]
) -> None:
    for path, first in ((PLAN, "zarr.json"), (SPACE, "zarr.json"), ("commits/1.json", "zarr.json"),
                        (PLAN, SPACE), ("commits/1.json", PLAN), (UNIT, CHUNK)):  # fmt: skip
        for each, data in files.items():
            if each == first:
                break
            writer.put(each, data).raise_for_status()
        refused(writer.put(path, files[path]), 409, "out-of-order", first)
    assert UNIT not in published(writer.service.folder)
    assert "commits/1.json" not in published(writer.service.folder)


def changed_plan(kit: StoreKit, data: bytes, **changes: Any) -> bytes:
    plan, _ = Plan.from_bytes(data)
    record = {k: v for k, v in changes.items() if hasattr(plan.record, k)}
    rest = {k: v for k, v in changes.items() if k not in record}
    return replace(plan, record=replace(plan.record, **record), **rest).to_bytes()


def test_a_plan_other_than_the_one_there_is_refused_with_every_difference(
    kit: StoreKit, writer: Writer, files: dict[str, bytes]
) -> None:
    writer.put_until(files, CHUNK)
    other = changed_plan(kit, files[PLAN], adapter_hash="cc", attention="sdpa", autocast="bfloat16",
                         dtype="bfloat16", rows=kit.rows(41))  # fmt: skip
    told = refused(writer.put(PLAN, other), 409, "provenance-mismatch", "this run has")
    named = {line.split(" differs")[0] for line in told["differences"]}
    assert named == {"adapter_hash", "attention", "autocast", "dtype", "rows"}
    assert told["exit_code"] == 3
    assert (writer.service.folder / PLAN).read_bytes() == files[PLAN]


def test_fault_11_another_provenance_is_refused_with_every_difference(
    kit: StoreKit, writer: Writer, files: dict[str, bytes]
) -> None:
    writer.put_until(files, PLAN)
    other = {**kit.provenance, "template": "llama3", "cutoff_len": 7,
             "projection": {**kit.provenance["projection"], "seed": 1}}  # fmt: skip
    told = refused(writer.put(SPACE, provenance_bytes("gradient", other)), 409,
                   "provenance-mismatch")  # fmt: skip
    named = {line.split(" differs")[0] for line in told["differences"]}
    assert named == {"template", "cutoff_len", "projection.seed"}


def test_what_cannot_be_compared_with_committed_generations_is_refused(
    kit: StoreKit, writer: Writer, files: dict[str, bytes]
) -> None:
    writer.put_until(files, "")
    plan = "plans/train/2.json"
    second = {"name": "train/2", "step": 2}
    for changes, field in (({"rows": kit.rows(40, first=1)}, "train.rows"), ({"dim": 8}, "dim")):
        data, _ = Plan.from_bytes(files[PLAN])
        made = replace(data, name="train/2", record=replace(data.record, **second), **changes)
        told = refused(writer.put(plan, made.to_bytes()), 409, "provenance-mismatch")
        assert [line.split(" differs")[0] for line in told["differences"]] == [field]
    other = changed_plan(kit, files[PLAN], run_id="another")
    named = replace(Plan.from_bytes(other)[0], name="train/1.2").to_bytes()
    told = refused(writer.put("plans/train/1.2.json", named), 409, "provenance-mismatch")
    assert told["differences"][0].startswith("train/1: run_id differs")


def test_a_file_that_is_not_what_its_path_says_is_refused(
    kit: StoreKit, writer: Writer, files: dict[str, bytes]
) -> None:
    spoiled = bytearray(files[CHUNK])
    spoiled[3] ^= 1
    scale = "generations/train/1/scale/c/0"
    hashes = "generations/train/1/row_hash/c/0/0"
    record = UnitRecord.from_bytes(files["generations/train/1/units/1.json"])[0]
    writer.put_until(files, "commits/1.json")
    for path, data, says in (
        ("generations/train/1/features/c/3/0", files[CHUNK], "3 units of features"),
        ("generations/train/1/losses/c/0", files[scale], "no chunk of the plan"),
        (CHUNK, bytes(spoiled), "crc32c of its values"),
        (CHUNK, files[CHUNK][:-1], "are planned"),
        (hashes, files["generations/train/1/row_hash/c/1/0"], "other row hashes than the plan"),
        (UNIT, canonical_json(record.to_dict()), "no record of unit 0"),
        (UNIT, b"{}", "not what its name says"),
        ("generations/train/1/units/3.json", files[UNIT], "no unit of the plan"),
        ("generations/train/1/features/zarr.json", files["zarr.json"], "must hold"),
        ("generations/a/zarr.json", b"{}", "must hold"),
        ("plans/train/3.json", files[PLAN], "holds the plan of train/1"),
        (PLAN, files[PLAN][:-1], "not what its name says"),
        (f"texts/{'a' * 64}/0.parquet", b"no Parquet", "no Parquet file"),
        (f"curvature/{'a' * 64}.safetensors", b"no factors", ""),
        ("forgotten/1.request.json", b"{}", "not what its name says"),
        ("forgotten/1.receipt.json", b"{}", "not what its name says"),
        ("commits/1.json", b"[]", "not what its name says"),
        ("spaces/other/provenance.json", files[SPACE], "not what its name says"),
    ):
        answer = writer.put(path, data)
        assert answer.status_code in (409, 422), (path, answer.text)
        assert says in answer.json()["detail"], path
    assert published(writer.service.folder) == set(files) - {"commits/1.json"}
    writer.put("commits/1.json", files["commits/1.json"]).raise_for_status()
    assert verify_store(writer.service.folder).ok


# ---- commits ---------------------------------------------------------------------------------


def committing(files: dict[str, bytes], **changes: Any) -> bytes:
    return replace(Commit.from_bytes(files["commits/1.json"]), **changes).to_bytes()


def test_a_commit_of_units_that_are_not_finished_or_others_is_refused(
    writer: Writer, files: dict[str, bytes]
) -> None:
    last = "generations/train/1/units/2.json"
    writer.put_until(files, last)
    commit = "commits/1.json"
    refused(writer.put(commit, files[commit]), 409, "out-of-order", last, "no file")
    writer.put(last, files[last]).raise_for_status()
    units = Commit.from_bytes(files[commit]).units
    for changes, says in (
        ({"units": (*units[:2], "0" * 64)}, "not finished"),
        ({"units": units[:2]}, "other units"),
        ({"plan_sha256": "0" * 64}, "another plan"),
        ({"chunk_bytes": 7}, "says 7 bytes"),
        ({"store_uuid": "another"}, "no successor"),
        ({"parent": "0" * 64}, "no successor"),
        ({"kind": "retire", "plan_sha256": "", "units": (), "chunk_bytes": 0}, "train/1"),
    ):
        answer = writer.put(commit, committing(files, **changes))
        assert answer.status_code in (409, 422), changes
        assert says in answer.json()["detail"], changes
    chunk = writer.service.folder / CHUNK
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-1])
    refused(writer.put(commit, files[commit]), 409, "out-of-order", CHUNK)
    chunk.write_bytes(whole)
    assert commit not in published(writer.service.folder)
    assert writer.put(commit, files[commit]).status_code == 201


def test_fault_18_of_two_committers_one_wins_and_the_other_is_told(
    kit: StoreKit, writer: Writer, files: dict[str, bytes]
) -> None:
    writer.put_until(files, "")
    other = committing(files, parent="0" * 64)
    refused(writer.put("commits/1.json", other), 412, "taken")
    third = committing(files, number=3)
    refused(writer.put("commits/3.json", third), 409, "out-of-order", "no successor of commit 1")
    again = committing(files, number=2, parent=Commit.from_bytes(files["commits/1.json"]).sha256)
    refused(writer.put("commits/2.json", again), 422, "bad-input", "committed before")
    assert len(open_store(writer.service.folder).commits) == 1


# ---- conditions ------------------------------------------------------------------------------


def test_what_is_published_is_never_overwritten(writer: Writer, files: dict[str, bytes]) -> None:
    writer.put_until(files, "")
    for path, data in files.items():
        tag = writer.client.get(f"/v1/files/{path}").headers["etag"]
        spoiled = data.replace(b"1", b"2", 1) if path != "zarr.json" else data[:-1]
        for condition in ({"If_None_Match": None}, {"If_None_Match": None, "If_Match": tag}):
            answer = writer.put(path, spoiled, **condition)
            assert answer.status_code in (422, 428), (path, answer.text)
        assert writer.put(path, data, If_None_Match='"a-tag"').status_code == 422
        assert (writer.service.folder / path).read_bytes() == data
    claim = "staging/leases/a/0.1"
    refused(writer.put(claim, b"one", If_None_Match=None), 428, "condition-required")
    assert writer.put(claim, b"one").status_code == 201
    refused(writer.put(claim, b"two"), 412, "taken")


def test_the_root_can_only_be_raised_to_a_later_schema(
    writer: Writer, files: dict[str, bytes]
) -> None:
    from gradstore.format.layout import root_json

    writer.put_until(files, "")
    uuid = open_store(writer.service.folder).uuid
    for data in (root_json("another", 2), b"{}"):
        answer = writer.put("zarr.json", data, If_None_Match=None)
        assert answer.status_code == 422
    assert writer.put("zarr.json", root_json(uuid, 2), If_None_Match=None).status_code == 200
    lower = writer.put("zarr.json", root_json(uuid, 1), If_None_Match=None)
    refused(lower, 422, "bad-input", "only raise the schema")
    assert open_store(writer.service.folder).schema_version == 2


def test_of_two_that_change_the_lock_from_the_same_state_one_does(writer: Writer) -> None:
    assert writer.client.get("/v1/files/writer.lock").status_code == 404
    refused(writer.put("writer.lock", b"a", If_None_Match=None), 428, "condition-required")
    first = writer.put("writer.lock", b"a")
    assert first.status_code == 201
    refused(writer.put("writer.lock", b"b"), 412, "taken")
    tag = first.headers["etag"]
    second = writer.put("writer.lock", b"b", If_None_Match=None, If_Match=tag)
    assert second.status_code == 200
    refused(writer.put("writer.lock", b"c", If_None_Match=None, If_Match=tag), 412, "taken")
    assert writer.client.get("/v1/files/writer.lock").content == b"b"
    answer = writer.put("writer.lock", bytes(1 << 17), If_None_Match=None, If_Match="x")
    refused(answer, 422, "bad-input", "65,536 bytes at most")


def test_signs_of_life_and_changes_of_the_lock_never_wait_for_each_other(service: Any) -> None:
    keeping, failed = service.writing.keeping, []

    def live(number: int) -> None:
        for count in range(60):
            keeping.put(f"staging/{number}/owner", b"%d" % count, None, None)

    def change(_: int) -> None:
        for count in range(60):
            found = keeping.read_lock()
            data = b'{"count":%d}' % count
            try:
                keeping.put("writer.lock", data, tag_of(found) if found else None,
                            None if found else "*")  # fmt: skip
            except Refusal as error:
                failed.append(error)

    threads = [threading.Thread(target=act, args=(i,), daemon=True)
               for i in range(4) for act in (live, change if not i else live)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not [thread for thread in threads if thread.is_alive()]
    assert failed == []


# ---- bodies ----------------------------------------------------------------------------------


_DIGESTS = (None, "", "sha-256=:AAAA:", "sha-256=AAAA", "crc32c=:AAAAAA==:", "sha-256=:!!!!:",
            content_digest(b"other bytes"))  # fmt: skip


def test_a_body_without_its_digest_is_refused_before_anything_is_seen(writer: Writer) -> None:
    for digest in _DIGESTS:
        answer = writer.put("staging/a/b", b"some bytes", Content_Digest=digest)
        title = "other-digest" if digest == _DIGESTS[-1] else "no-digest"
        refused(answer, 400, title, "Content-Digest")
    assert not (writer.service.folder / "staging/a").exists()
    several = f"sha-512=:AAAA:, {content_digest(b'some bytes')}"
    assert writer.put("staging/a/b", b"some bytes", Content_Digest=several).status_code == 201


def test_a_body_needs_its_length_and_keeps_to_the_limit(
    serve_writable: Callable[..., Any], tmp_path: Path, client_of: Callable[..., Writer]
) -> None:
    service = serve_writable(tmp_path / "served", Limits(body_bytes=1000))
    writer = client_of(service)
    assert writer.client.get("/v1/files/a").headers["gradstore-most-bytes"] == "1000"
    refused(writer.put("staging/a/b", bytes(1001)), 413, "too-large", "1,001", "--max-body 1 ")
    much = writer.put("staging/a/b", bytes((1 << 21) + 1))
    refused(much, 413, "too-large", "start it with --max-body 3 or more")
    chunked = writer.client.put("/v1/files/staging/a/b", content=iter([b"a"]),
                                headers={"Content-Digest": content_digest(b"a")})  # fmt: skip
    refused(chunked, 411, "no-length")
    assert writer.put("staging/a/b", bytes(1000)).status_code == 201


def raw(service: Any, path: str, declared: int, digest: bytes) -> socket.socket:
    """A connection on which a PUT has begun."""
    host, _, port = service.address.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    head = (f"PUT /v1/files/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nIf-None-Match: *\r\n"
            f"Authorization: Bearer {service.write_key}\r\nContent-Length: {declared}\r\n"
            f"Content-Digest: {content_digest(digest)}\r\n\r\n")  # fmt: skip
    connection.sendall(head.encode())
    return connection


def test_of_a_body_that_is_cut_short_nothing_is_seen(
    service: Any, client_of: Callable[..., Writer]
) -> None:
    with raw(service, "staging/a/b", 20_000, b"12345") as connection:
        connection.sendall(b"12345")
        while not service.writing.intake._bodies:
            time.sleep(0.01)
    writer = client_of(service)
    deadline = time.monotonic() + 10
    while service.writing.intake._bodies and time.monotonic() < deadline:
        time.sleep(0.01)
    assert service.writing.intake._bodies == 0
    assert writer.client.get("/v1/files/staging/a/b").status_code == 404
    assert not (service.folder / "staging/a").exists()


def test_a_body_that_ends_early_is_told_apart_from_a_changed_one() -> None:
    """A proxy may pass one on as whole: the digest fits what came, the length does not."""
    sent = [{"type": "http.request", "body": b"12345", "more_body": False}]

    async def receive() -> Any:
        return sent.pop(0)

    digest = content_digest(b"12345").encode()
    scope = {"type": "http", "headers": [(b"content-digest", digest)]}
    for size, says in ((10, "has 5 bytes, 10 were declared"), (3, "more than 3 bytes, 3 were")):
        sent[:] = [{"type": "http.request", "body": b"12345", "more_body": False}]
        with pytest.raises(Refusal, match=says) as told:
            asyncio.run(Intake(Limits()).received(Request(scope, receive), size))
        assert (told.value.status, told.value.title) == (400, "other-length")


def test_a_client_that_is_too_slow_is_let_go_of(
    serve_writable: Callable[..., Any], tmp_path: Path
) -> None:
    service = serve_writable(tmp_path / "served", Limits(pause_seconds=0.3))
    with raw(service, "staging/a/b", 10, b"1234567890") as connection:
        connection.sendall(b"12345")
        assert connection.recv(20).startswith(b"HTTP/1.1 408")
    assert not (service.folder / "staging/a").exists()


def test_beyond_its_limits_a_server_says_when_to_come_back(
    serve_writable: Callable[..., Any], tmp_path: Path, client_of: Callable[..., Writer]
) -> None:
    service = serve_writable(tmp_path / "served", Limits(bodies=2, flight_bytes=100_000))
    writer = client_of(service)
    with raw(service, "staging/a/b", 60_000, bytes(60_000)) as first:
        while not service.writing.intake._bodies:
            time.sleep(0.01)
        answer = writer.put("staging/a/c", bytes(50_000))
        refused(answer, 429, "too-many-writes", "60,000 bytes")
        assert answer.headers["retry-after"] == "1"
        with raw(service, "staging/a/d", 20_000, bytes(20_000)):
            while service.writing.intake._bodies < 2:
                time.sleep(0.01)
            refused(writer.put("staging/a/c", bytes(17_000)), 429, "too-many-writes")
            assert writer.put("staging/a/owner", b"1").status_code == 201, "a sign of life"
        first.sendall(bytes(60_000))
        assert first.recv(20).startswith(b"HTTP/1.1 201")
    assert writer.put("staging/a/e", bytes(500_000)).status_code == 201, "alone it may be larger"


def test_fault_20_a_full_disk_is_told_and_leaves_nothing(
    writer: Writer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.put_until(files, CHUNK)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("gradstore.storage.local._write_whole", full)
        told = refused(writer.put(CHUNK, files[CHUNK]), 507, "disk-full", "No space left")
    assert told["exit_code"] == 5
    assert CHUNK not in published(writer.service.folder)
    assert writer.put(CHUNK, files[CHUNK]).status_code == 201


# ---- paths -----------------------------------------------------------------------------------

_ESCAPES = ("../secret", "..%2fsecret", "%2e%2e/secret", "staging/../../secret", "/etc/passwd",
            "%2fetc%2fpasswd", "staging/..%2f..%2f..%2fsecret", "staging/a%00b", "staging",
            "generations/train/1/../../../../secret", "plans/..%2f..%2fsecret.json", "index/a/b",
            "staging/a%5cb", "staging/.hidden/a", "commits/01.json", "",
            "generations/train/1/features/c/-1/0", "spaces/a%2fb/provenance.json",
            "staging/" + "/".join("a" * 30), "staging/" + "a" * 300)  # fmt: skip


def test_no_path_leads_out_of_the_store_or_to_a_file_that_none_has(
    writer: Writer, tmp_path: Path
) -> None:
    folder = writer.service.folder.parent
    (folder / "secret").write_text("kept to itself")
    before = sorted(folder.rglob("*"))
    data = b"taken"
    for path in _ESCAPES:
        # As it is spelled: no client of ours sends these, nor tidies them up.
        url = httpx.URL(writer.service.address).copy_with(raw_path=f"/v1/files/{path}".encode())
        headers = {"Content-Digest": content_digest(data)}
        for extra in ({}, {"If-None-Match": "*"}, {"If-Match": '"a"'}):
            answer = writer.client.put(url, content=data, headers={**headers, **extra})
            assert answer.status_code in (404, 405, 422), (path, answer.text)
        found = writer.client.get(url)
        assert b"kept to itself" not in found.content
        assert found.status_code in (404, 422) or not path
        decoded = httpx.URL(f"http://a/{path}").path[1:]
        for body in ({"source": decoded, "target": "staging/quarantine/0"},
                     {"source": "zarr.json", "target": decoded}):  # fmt: skip
            assert writer.client.post("/v1/copies", json=body).status_code in (404, 422)
        assert writer.remove(decoded).status_code in (200, 422)
    assert (folder / "secret").read_text() == "kept to itself"
    assert sorted(folder.rglob("*")) == before


def test_a_link_that_lies_in_the_store_is_not_followed(
    writer: Writer, files: dict[str, bytes], tmp_path: Path
) -> None:
    writer.put_until(files, "")
    (tmp_path / "secret").write_text("kept to itself")
    (writer.service.folder / "staging" / "out").symlink_to(tmp_path)
    (writer.service.folder / "commits" / "2.json").symlink_to(tmp_path / "secret")
    assert writer.client.get("/v1/files/staging/out/secret").status_code == 404
    assert writer.client.get("/v1/files/commits/2.json").status_code == 404
    assert writer.put("staging/out/new", b"new").status_code == 409
    assert not (tmp_path / "new").exists()


def test_below_a_file_there_is_nothing_as_in_a_bucket(writer: Writer) -> None:
    """Of a writer that was killed while it tried the conditions there is one, in staging."""
    writer.put("staging/probe-a", b"first").raise_for_status()
    for method in ("GET", "HEAD"):
        assert writer.client.request(method, "/v1/files/staging/probe-a/owner").status_code == 404
    for deep in ("true", "false"):
        for below in ("staging/probe-a", "staging/probe-a/b", "staging/none"):
            found = writer.client.get(f"/v1/files?below={below}&deep={deep}")
            assert (found.status_code, any(found.json().values())) == (200, False)
    assert writer.remove("staging/probe-a/owner").status_code == 200
    assert writer.client.get("/v1/files/staging/probe-a").content == b"first"
    assert writer.remove("staging/probe-a").status_code == 200
    assert writer.client.get("/v1/files/staging/probe-a").status_code == 404


def test_the_servers_own_folders_are_seen_and_changed_by_nobody(writer: Writer) -> None:
    writer.put("writer.lock", b"{}").raise_for_status()
    writer.put("staging/1-a/owner", b"{}").raise_for_status()
    listed = writer.client.get("/v1/files?below=staging").json()["files"]
    assert set(listed) == {"staging/1-a/owner"}
    names = writer.client.get("/v1/files?below=staging&deep=false").json()["names"]
    assert names == ["1-a"]
    own = sorted(path.name for path in (writer.service.folder / "staging").iterdir())
    assert len(own) >= 3
    for name in set(own) - {"1-a"}:
        assert writer.put(f"staging/{name}/a", b"").status_code == 422
        assert writer.remove(f"staging/{name}/lock").status_code == 422
        assert writer.client.get(f"/v1/files/staging/{name}/lock").status_code == 404
    assert writer.remove("writer.lock").status_code == 422
    assert writer.client.get("/v1/files/writer.lock").content == b"{}"


# ---- removals --------------------------------------------------------------------------------


def test_what_is_committed_is_not_removed_and_the_rest_is(
    kit: StoreKit, writer: Writer, files: dict[str, bytes]
) -> None:
    writer.put_until(files, "commits/1.json")
    extra = "generations/train/1/scale/c/0"
    assert writer.remove(extra, "staging/no/such", "generations/train").status_code == 200
    assert extra not in published(writer.service.folder)
    writer.put(extra, files[extra]).raise_for_status()
    writer.put("commits/1.json", files["commits/1.json"]).raise_for_status()
    for path in files:
        told = refused(writer.remove("staging/a/b", path), 409, "committed", path)
        assert "gradstore gc" in told["detail"]
    assert published(writer.service.folder) == set(files)
    head = Commit.from_bytes(files["commits/1.json"])
    retired = Commit(2, head.store_uuid, head.sha256, "retire", ("train/1",)).to_bytes()
    writer.put("commits/2.json", retired).raise_for_status()
    gone = [path for path in files if "train/1" in path]
    assert writer.remove(*gone).status_code == 200
    assert published(writer.service.folder) & set(gone) == set()
    refused(writer.put(CHUNK, files[CHUNK]), 409, "out-of-order", "comes before its plan")


def test_a_copy_goes_into_staging_and_nowhere_else(writer: Writer, files: dict[str, bytes]) -> None:
    writer.put_until(files, PLAN)
    for source, target, status in (
        ("zarr.json", "staging/quarantine/0", 200), ("zarr.json", "staging/quarantine/0", 200),
        (SPACE, "staging/quarantine/0", 412), ("commits/1.json", "staging/quarantine/1", 404),
        ("zarr.json", "commits/1.json", 422), ("zarr.json", "staging/service/lock", 422),
    ):  # fmt: skip
        answer = writer.client.post("/v1/copies", json={"source": source, "target": target})
        assert answer.status_code == status, (source, target, answer.text)
    assert writer.client.get("/v1/files/staging/quarantine/0").content == files["zarr.json"]


# ---- who else writes -------------------------------------------------------------------------


def test_fault_18_a_server_and_a_writer_beside_it_refuse_each_other_by_name(
    kit: StoreKit, service: Any, serve_writable: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(StoreBusy, match=rf"host \S+, pid {os.getpid()}, since"):
        StoreWriter(service.folder, provenance=kit.provenance)
    with kit.writer(tmp_path / "other") as _:
        with pytest.raises(StoreBusy, match="stop it, and start this server then"):
            serve_writable(tmp_path / "other")
    service.stop()
    kit.build(service.folder)
    service.start()


def test_a_folder_that_is_something_else_is_not_made_a_store(
    serve_writable: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(BadInput, match=r"holds 'thesis\.tex'"):
        serve_writable(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_before_the_store_is_made_the_pages_say_so(service: Any) -> None:
    with httpx.Client(base_url=service.address) as client:
        headers = {"Authorization": f"Bearer {service.read_key}"}
        told = refused(client.get("/v1/stores", headers=headers), 404, "missing")
        assert "no store" in json.dumps(told)

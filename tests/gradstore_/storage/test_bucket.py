"""What a user is told about a bucket that can't be used: the value, the place and the next step."""

from __future__ import annotations

import sys
import time
import urllib.request
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from gradstore.errors import BadInput, StoreIOError
from gradstore.storage import bucket as bucket_module
from gradstore.storage.location import ObjectPath, location
from gradstore.store.asked_rows import asked_rows
from gradstore.store.forgetting import forget, request_for
from gradstore.store.held import held_store
from gradstore.store.reader import open_store

if TYPE_CHECKING:
    from conftest import StoreKit


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("s3://", "'' is no name of a bucket"),
        ("s3://Upper/a", "'Upper' is no name of a bucket"),
        ("s3://bucket/a/../b", "'..' can't be part of a prefix"),
        ("s3://bucket/a b", "'a b' can't be part of a prefix"),
        ("s3://bucket/a%2f", "can't be part of a prefix"),
        (
            "gs://bucket/a",
            "gs:// is not known; give a folder, or s3://BUCKET/PREFIX or https://HOST",
        ),
        ("ftp://host/a", "ftp:// is not known"),
        (7, "the store is 7; give a path, or s3://BUCKET/PREFIX or https://HOST"),
    ],
)
def test_an_address_that_cannot_be_is_refused(address: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        open_store(address)


def test_an_address_is_one_place_however_it_is_written() -> None:
    assert location("s3://bucket/a/b/") == location("s3:/bucket/a/b") == ObjectPath("bucket", "a/b")


def test_without_obstore_a_user_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(BadInput, match=r"pip install 'dataflex-gradstore\[s3\]'"):
        open_store("s3://bucket/a")


def test_a_missing_bucket_is_told_from_a_missing_store(bucket: str) -> None:
    with pytest.raises(BadInput, match=f'no store at "{bucket}"'):
        open_store(bucket)
    with pytest.raises(StoreIOError, match='there is no bucket "elsewhere" at http://'):
        open_store("s3://elsewhere/a")


def test_a_server_that_is_not_there_is_told_soon_and_without_a_secret(
    use_server: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_module, "FIRST_PATIENCE_SECONDS", 0.2)
    place = use_server("http://user:word@127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(StoreIOError, match=r"at http://127\.0\.0\.1:9: ") as told:
        open_store(place)
    assert "word" not in str(told.value)
    assert time.monotonic() - began < 3


def test_refused_credentials_are_told_with_what_to_set(faulty: Any, use_server: Any) -> None:
    place = use_server(faulty.address)
    faulty.before = lambda _: (403, b"<Code>AccessDenied</Code><Message>no</Message>")
    with pytest.raises(StoreIOError, match=r"403 \(AccessDenied: no\).*AWS_SECRET_ACCESS_KEY"):
        open_store(place)


def test_a_clock_that_is_off_is_told_instead_of_credentials(faulty: Any, use_server: Any) -> None:
    place = use_server(faulty.address)
    skewed = b"<Code>RequestTimeTooSkewed</Code><Message>The difference is too large.</Message>"
    faulty.before = lambda _: (403, skewed)
    with pytest.raises(StoreIOError, match=r"\(RequestTimeTooSkewed: .* clock is minutes") as told:
        open_store(place)
    assert "AWS_" not in str(told.value)


def test_a_key_without_its_secret_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(BadInput, match="AWS_ACCESS_KEY_ID has no secret"):
        open_store(bucket)


def test_rows_are_not_forgotten_in_a_bucket_that_keeps_versions(
    kit: StoreKit, object_server: str, use_server: Callable[[str], str]
) -> None:
    place = use_server(object_server).replace("features", "versioned")
    configuration = (b'<VersioningConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
                     b"<Status>Enabled</Status></VersioningConfiguration>")  # fmt: skip
    for path, body in (("", None), ("?versioning", configuration)):
        request = urllib.request.Request(
            f"{object_server}/versioned{path}", body, {"content-type": "text/xml"}, method="PUT"
        )
        urllib.request.urlopen(request).close()
    kit.build(place, n=4)
    with held_store(place) as (files, view):
        request = request_for(files, view(), asked_rows(files, view(), [2]))
        with pytest.raises(StoreIOError, match='"versioned" keeps the versions'):
            forget(files, view, request)
        assert view().requests() == []

"""The cached index of one commit: `<cache>/<commit sha>[suffix]/faiss.bin` and `index.json`.

The folder is published whole by one rename; of its files only index.json is ever replaced, whole,
where more is measured. faiss.bin is parsed only after its sha256 has been checked: a damaged index
file usually loads without complaint.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from gradstore.errors import BadInput, StoreIOError
from gradstore.format.canonical import Json, sha256_json
from gradstore.format.foreign import read_object
from gradstore.storage.hashing import sha256_file
from gradstore.storage.replace import replace_file, sync_file, sync_folder, write_synced

_log = logging.getLogger(__name__)

FORMAT = 1
_SHA = re.compile(r"[0-9a-f]{16,128}")


class IndexCache:
    """One commit's folder in the index cache.

    Args:
        folder: holds one sub-folder per commit sha; created when needed.
        identity: what makes an index the right one; has `commit_sha`. Any difference from what
            index.json says means: build again.
        suffix: of the sub-folder's name, for a further kind of index of the same commit.

    Attributes:
        measured: what was recorded with the index that `sound_file` found; None before, and where
            nothing was.

    Raises:
        BadInput: the commit sha is no lower-case hex string (it names a folder).
    """

    def __init__(self, folder: Path, identity: Mapping[str, str | int], suffix: str = "") -> None:
        sha = str(identity["commit_sha"])
        if not _SHA.fullmatch(sha):
            raise BadInput(
                f"commit sha {sha!r} is no hex digest; it can't name an index; "
                "give the generation's commit_sha"
            )
        self._folder = folder
        self._place = folder / f"{sha}{suffix}"
        self._identity = {"format": FORMAT, **identity}
        self.measured: Json = None

    def sound_file(self) -> Path | None:
        """Return faiss.bin if it exists, belongs to this commit and is undamaged; else None.

        Says why in a warning, unless there simply is no index yet.
        """
        manifest_path, index_path = self._place / "index.json", self._place / "faiss.bin"
        if not self._place.is_dir():
            return None
        try:
            manifest = read_object(manifest_path.read_bytes())
            differing = [k for k, v in self._identity.items() if manifest.get(k) != v]
            if differing:
                raise ValueError(f"index.json has another {', '.join(differing)}")
            measured = manifest.get("measured")
            if measured is not None and sha256_json(measured) != manifest.get("measured_sha256"):
                raise ValueError("what index.json says was measured is not what was recorded")
            found = sha256_file(index_path, fresh=True)
            if found != manifest.get("sha256"):
                raise ValueError(f"sha256 of faiss.bin is {found}, not {manifest.get('sha256')}")
        except (OSError, StoreIOError, ValueError) as error:
            self.warn(error)
            return None
        self.measured = measured
        return index_path

    def warn(self, reason: Exception) -> None:
        """Log why the cached index is not used."""
        _log.warning("index %s can't be used, building it again: %s", self._place, reason)

    def publish(self, write: Callable[[Path], None], measured: Json = None) -> None:
        """Store a new index; on failure log the reason and keep the index in memory.

        Args:
            write: writes the index to the path it is given; may raise OSError or RuntimeError
                (FAISS reports a full disk so).
            measured: plain JSON values to keep beside it; None keeps nothing.
        """
        token = f".{self._place.name}.{secrets.token_hex(4)}"
        fresh, old = self._folder / f"{token}.partial", self._folder / f"{token}.old"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            fresh.mkdir()
            write(fresh / "faiss.bin")
            sync_file(fresh / "faiss.bin")
            sha256 = sha256_file(fresh / "faiss.bin", fresh=True)
            write_synced(fresh / "index.json", self._manifest(sha256, measured))
            sync_folder(fresh)
            if self._place.exists():
                os.rename(self._place, old)
            os.rename(fresh, self._place)
            sync_folder(self._folder)
        except (OSError, StoreIOError, RuntimeError) as error:
            lost = getattr(error, "errno", None) in (errno.ENOTEMPTY, errno.EEXIST)
            if lost and self._place.is_dir():
                _log.info("another process published index %s first", self._place)
            else:
                _log.warning("index kept in memory only, can't write %s: %s", self._place, error)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)

    def record(self, measured: Json) -> None:
        """Replace what is kept beside the published index; on failure log the reason.

        Args:
            measured: plain JSON values.
        """
        path = self._place / "index.json"
        try:
            sha256 = str(read_object(path.read_bytes()).get("sha256"))
            replace_file(path, self._manifest(sha256, measured))
        except (OSError, StoreIOError, ValueError) as error:
            _log.warning("what was measured is not kept, can't write %s: %s", path, error)

    def _manifest(self, sha256: str, measured: Json) -> bytes:
        beside = {}
        if measured is not None:
            beside = {"measured": measured, "measured_sha256": sha256_json(measured)}
        manifest = {**self._identity, **beside, "sha256": sha256}
        return (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()

"""The cached index of one commit: `<cache>/<commit sha>/faiss.bin` and `index.json`.

The folder is published whole by one rename and never changed afterwards. faiss.bin is parsed only
after its sha256 has been checked: a damaged index file usually loads without complaint.
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
from gradstore.format.foreign import read_object
from gradstore.storage.hashing import sha256_file
from gradstore.storage.replace import sync_file, sync_folder, write_synced

_log = logging.getLogger(__name__)

FORMAT = 1
_SHA = re.compile(r"[0-9a-f]{16,128}")


class IndexCache:
    """One commit's folder in the index cache.

    Args:
        folder: holds one sub-folder per commit sha; created when needed.
        identity: what makes an index the right one; has `commit_sha`. Any difference from what
            index.json says means: build again.

    Raises:
        BadInput: the commit sha is no lower-case hex string (it names a folder).
    """

    def __init__(self, folder: Path, identity: Mapping[str, str | int]) -> None:
        sha = str(identity["commit_sha"])
        if not _SHA.fullmatch(sha):
            raise BadInput(
                f"commit sha {sha!r} is no hex digest; it can't name an index; "
                "give the generation's commit_sha"
            )
        self._folder = folder
        self._place = folder / sha
        self._identity = {"format": FORMAT, **identity}

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
            found = sha256_file(index_path, fresh=True)
            if found != manifest.get("sha256"):
                raise ValueError(f"sha256 of faiss.bin is {found}, not {manifest.get('sha256')}")
        except (OSError, StoreIOError, ValueError) as error:
            self.warn(error)
            return None
        return index_path

    def warn(self, reason: Exception) -> None:
        """Log why the cached index is not used."""
        _log.warning("index %s can't be used, building it again: %s", self._place, reason)

    def publish(self, write: Callable[[Path], None]) -> None:
        """Store a new index; on failure log the reason and keep the index in memory.

        Args:
            write: writes the index to the path it is given; may raise OSError or RuntimeError
                (FAISS reports a full disk so).
        """
        token = f".{self._place.name}.{secrets.token_hex(4)}"
        fresh, old = self._folder / f"{token}.partial", self._folder / f"{token}.old"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            fresh.mkdir()
            write(fresh / "faiss.bin")
            sync_file(fresh / "faiss.bin")
            manifest = {**self._identity, "sha256": sha256_file(fresh / "faiss.bin", fresh=True)}
            text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
            write_synced(fresh / "index.json", text.encode())
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

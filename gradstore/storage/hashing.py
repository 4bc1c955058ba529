"""Hashes of big files, folders and tensors; files are hashed once per process.

The cache key (path, size, mtime_ns, inode) is only a speed-up: `fresh=True` ignores it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradstore.errors import BadInput, StoreIOError
from gradstore.format.canonical import canonical_json

if TYPE_CHECKING:
    import numpy as np
    import torch


class FileHashes:
    """sha256 of files, remembered by (path, size, mtime_ns, inode).

    Args:
        cache: JSON file that keeps the hashes between processes; None keeps them in memory. A cache
            that can't be read or written is ignored: it is a speed-up, not a fact.
    """

    def __init__(self, cache: str | Path | None = None) -> None:
        self._cache = None if cache is None else Path(cache)
        self._known: dict[str, str] = {}
        if self._cache is not None:
            self._known = _load(self._cache)

    def sha256(self, path: str | Path, *, fresh: bool = False) -> str:
        """Return the sha256 of one file in hex.

        Args:
            path: the file.
            fresh: hash it again whatever the cache says.

        Raises:
            StoreIOError: it can't be read.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
                if fresh or key not in self._known:
                    self._known[key] = hashlib.file_digest(file, "sha256").hexdigest()
                    self._save()
        except OSError as error:
            raise StoreIOError(f'cannot hash "{path}": {error.strerror}') from error
        return self._known[key]

    def _save(self) -> None:
        if self._cache is None:
            return
        partial = self._cache.with_name(f"{self._cache.name}.{os.getpid()}")
        try:
            partial.write_bytes(canonical_json(self._known))
            partial.replace(self._cache)
        except OSError:
            partial.unlink(missing_ok=True)


def _load(path: Path) -> dict[str, str]:
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(known, dict) or not all(isinstance(v, str) for v in known.values()):
        return {}
    return known


_hashes = FileHashes()


def sha256_file(path: str | Path, *, fresh: bool = False) -> str:
    """Return the sha256 of one file in hex, hashed once per process unless it changes."""
    return _hashes.sha256(path, fresh=fresh)


def hash_folder_files(
    folder: str | Path, patterns: Sequence[str] = ("*",), *, fresh: bool = False
) -> dict[str, str]:
    """Map name -> sha256 for the files of a folder (not below it) that match any pattern.

    Raises:
        BadInput: the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f'"{folder}" is not a folder; nothing to hash')
    names = {path.name for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {name: sha256_file(folder / name, fresh=fresh) for name in sorted(names)}


def tensor_hash(tensors: Iterable[tuple[str, torch.Tensor | np.ndarray]]) -> str:
    """Compute the sha256 of named tensors in order: names, dtypes, shapes and values.

    Args:
        tensors: (name, tensor of any shape and dtype, on any device) in a fixed order.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        head = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        digest.update(canonical_json(head))
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: torch.Tensor | np.ndarray) -> memoryview:
    import numpy as np

    if isinstance(tensor, np.ndarray):
        array = tensor
    else:
        import torch

        flat = tensor.detach().cpu().contiguous().reshape(-1)
        array = flat.view(torch.uint8).numpy()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data

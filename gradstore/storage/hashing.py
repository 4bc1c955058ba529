"""Hashes of big files, folders and tensors; files are hashed once per process.

What is remembered by (path, size, mtime_ns, inode) is only a speed-up: `fresh=True` ignores it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradstore.errors import BadInput, StoreIOError
from gradstore.format.canonical import canonical_json

if TYPE_CHECKING:
    import numpy as np
    import torch


#: sha256 in hex by `path|size|mtime_ns|inode`, of the files that this process has hashed.
_known: dict[str, str] = {}


def sha256_file(path: str | Path, *, fresh: bool = False) -> str:
    """Return the sha256 of one file in hex, hashed once per process unless it changes.

    Args:
        path: the file.
        fresh: hash it again whatever is remembered of it.

    Raises:
        StoreIOError: it can't be read.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
            if fresh or key not in _known:
                _known[key] = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StoreIOError(
            f'cannot hash "{path}": {error.strerror}; see that it can be read'
        ) from error
    return _known[key]


def hash_folder_files(
    folder: str | Path, patterns: Sequence[str] = ("*",), *, fresh: bool = False
) -> dict[str, str]:
    """Map name -> sha256 for the files of a folder (not below it) that match any pattern.

    Raises:
        BadInput: the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f'"{folder}" is not a folder; nothing to hash: check the path')
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

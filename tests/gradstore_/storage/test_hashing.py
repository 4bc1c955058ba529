"""Hashes of files, folders and tensors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from gradstore.errors import BadInput, StoreIOError
from gradstore.storage import hashing


def test_a_file_is_hashed_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"one")
    first = hashing.sha256_file(file)
    assert first == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    stat = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert hashing.sha256_file(file) == first
    assert hashing.sha256_file(file, fresh=True) != first
    file.write_bytes(b"three")
    assert hashing.sha256_file(file) != first
    with pytest.raises(StoreIOError, match="cannot hash"):
        hashing.sha256_file(tmp_path / "none")


def test_a_folder_is_hashed_file_by_file(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", "c.bin"):
        (tmp_path / name).write_text(name)
    assert list(hashing.hash_folder_files(tmp_path, ["*.json"])) == ["a.json", "b.json"]
    with pytest.raises(BadInput, match="not a folder"):
        hashing.hash_folder_files(tmp_path / "none")


def test_a_tensor_hash_depends_on_name_order_shape_dtype_and_bits() -> None:
    a, b = torch.arange(6.0), torch.ones(2, 3, dtype=torch.bfloat16)
    base = hashing.tensor_hash([("a", a), ("b", b)])
    assert hashing.tensor_hash([("a", a.clone().requires_grad_()), ("b", b)]) == base
    assert hashing.tensor_hash([("a", a.numpy()), ("b", b)]) == base
    others = [
        [("b", b), ("a", a)],
        [("c", a), ("b", b)],
        [("a", a.reshape(2, 3)), ("b", b)],
        [("a", a.double()), ("b", b)],
        [("a", a + 1e-6), ("b", b)],
    ]
    assert len({base, *(hashing.tensor_hash(other) for other in others)}) == 6

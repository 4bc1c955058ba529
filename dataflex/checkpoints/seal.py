"""The seal of a checkpoint: `dataflex/manifest.json`, sizes and checksums of its files.

It is written last, when every rank's files and trainer_state.json are on disk: a checkpoint that
has one was whole, and one whose files no longer agree with it has been damaged or changed since.
Paths in it are relative to the checkpoint, which may be moved or copied.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from dataflex.config.parameters import Natural
from dataflex.run.documents import read_document
from gradstore.errors import BadInput, DamagedData
from gradstore.format import canonical
from gradstore.storage.hashing import sha256_file
from gradstore.storage.replace import replace_file, sync_file, sync_folder

MANIFEST = "dataflex/manifest.json"
SCHEMA = 1

#: What a resume, or DeepSpeed and FSDP in one, would read of files that the manifest does not list.
#: Anything else may be put beside a checkpoint's own files: notes, converted weights.
READ = ("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json",
        "pytorch_model*", "trainer_state.json", "optimizer.pt", "optimizer.bin", "optimizer_*",
        "scheduler.pt", "scaler.pt", "rng_state*", "latest", "global_step*",
        "dataflex/*")  # fmt: skip

NEXT = (
    "Restore the file from a copy (remove one that was added), or name another checkpoint with "
    "resume_from_checkpoint (one that was changed on purpose can be sealed again, by "
    "dataflex.checkpoints.seal.seal(Path('CHECKPOINT')) in Python)."
)


@dataclass(frozen=True)
class Entry:
    """The size and the checksum of one file."""

    bytes: Natural
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of the manifest: files by their path in the checkpoint."""

    schema: int
    files: dict[str, Entry]


def seal(checkpoint: Path) -> None:
    """Write the manifest of all files in a checkpoint, which are on disk before it is.

    Raises:
        StoreIOError: a file cannot be read, or the manifest cannot be written.
    """
    names = list(_files(checkpoint))
    for folder in {(checkpoint / name).parent for name in names}:
        sync_folder(folder)
    with _workers() as workers:
        list(workers.map(lambda name: sync_file(checkpoint / name), names))
        entries = list(workers.map(lambda name: _entry(checkpoint / name), names))
    manifest = Manifest(SCHEMA, dict(zip(names, entries, strict=True)))
    sealed = canonical.canonical_json(canonical.seal(asdict(manifest)))
    replace_file(checkpoint / MANIFEST, sealed)


def is_sealed(checkpoint: Path) -> bool:
    """Return whether a checkpoint has a manifest."""
    return (checkpoint / MANIFEST).is_file()


def verify(checkpoint: Path, only: Sequence[str] = ("*",)) -> None:
    """Compare a checkpoint's files with its manifest; one without a manifest is let through.

    Args:
        checkpoint: its folder.
        only: patterns of the files to compare. All of them are read, so this takes as long as
            reading them does. With the default, files that a resume would read and the manifest
            does not list are refused too.

    Raises:
        DamagedData: the first file that is missing, differs or was added.
    """
    listed = _listed(checkpoint)
    if listed is None:
        return
    names = [name for name in listed if _matches(name, only)]
    for name in names:  # sizes first: they cost nothing
        path, size = checkpoint / name, listed[name].bytes
        if not path.is_file():
            raise _damaged(path, "is missing")
        if (found := path.stat().st_size) != size:
            raise _damaged(path, f"has {found:,} bytes, but was saved with {size:,}")
    if "*" in only:
        for name in _files(checkpoint):
            if name not in listed and _matches(name, READ):
                raise _damaged(
                    checkpoint / name,
                    "is not among the files that were saved, and a resume would read it",
                )
    with _workers() as workers:
        digests = workers.map(lambda name: sha256_file(checkpoint / name, fresh=True), names)
        for name, digest in zip(names, digests, strict=True):
            if digest != listed[name].sha256:
                raise _damaged(
                    checkpoint / name,
                    "does not hold the bytes that were saved (its sha256 differs)",
                )


def _damaged(path: Path, what: str) -> DamagedData:
    return DamagedData(f"{path} {what}: the checkpoint is damaged. {NEXT}")


def _listed(checkpoint: Path) -> dict[str, Entry] | None:
    """Read the manifest's files; None where there is no manifest."""
    path = checkpoint / MANIFEST
    try:
        canonical.unseal(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _damaged(path, f"is damaged ({error})") from error
    manifest = read_document(path, Manifest, NEXT)
    if manifest.schema != SCHEMA:
        raise BadInput(
            f"{path} has schema {manifest.schema}, this version reads {SCHEMA}: use the version "
            "of DataFlex that wrote the checkpoint, or a newer one."
        )
    return manifest.files


def _entry(path: Path) -> Entry:
    return Entry(path.stat().st_size, sha256_file(path, fresh=True))


def _files(checkpoint: Path) -> Iterator[str]:
    """Yield the relative path of each file but the manifest, in rising order.

    Hidden files are those of a file manager or a synchronisation, never the Trainer's.
    """
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        left_out = name == MANIFEST or name.endswith(".partial") or path.name.startswith(".")
        if path.is_file() and not left_out:
            yield name


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _workers() -> ThreadPoolExecutor:
    """Threads for hashing: hashlib lets them run beside each other."""
    return ThreadPoolExecutor(min(4, os.cpu_count() or 1))

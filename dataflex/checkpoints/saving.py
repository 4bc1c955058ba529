"""Saving a checkpoint: room for it made, a full disk told, older ones removed when it is sealed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from gradstore.errors import StoreIOError

#: What torch says, in a RuntimeError, where a file could not be written.
TORCH_WRITE_FAULTS = ("PytorchStreamWriter", "inline_container", "file write failed",
                      "Parent directory")  # fmt: skip


@contextlib.contextmanager
def disk_faults(folder: Path) -> Iterator[None]:
    """Turn what torch, safetensors and the system raise for a failed write into one message.

    Args:
        folder: what is being saved.

    Raises:
        StoreIOError: a file could not be written.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError, StoreIOError) as error:
        if isinstance(error, RuntimeError):
            ours = any(words in str(error) for words in TORCH_WRITE_FAULTS)
        else:  # an OSError without a number is a hub's, not the disk's
            ours = not isinstance(error, OSError) or error.errno is not None
        if not ours:
            raise
        raise StoreIOError(_told(folder, error)) from error


def _told(folder: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
    free = ""
    with contextlib.suppress(OSError):
        free = f"; {shutil.disk_usage(folder.parent).free / 2**20:,.0f} MiB are free there"
    return (
        f"{folder} cannot be saved ({reason}{free}). Earlier checkpoints are untouched: make room, "
        "then run the same command again with resume_from_checkpoint=true (without it if there is "
        "none yet)."
    )


def clear_place(checkpoint: Path) -> None:
    """Remove what a killed or earlier run left under the name of a checkpoint about to be saved.

    Nothing of it may be sealed with the new one, such as the random states of further ranks.

    Raises:
        StoreIOError: it cannot be removed.
    """
    try:
        if checkpoint.is_dir():
            shutil.rmtree(checkpoint)
    except OSError as error:
        raise StoreIOError(
            f"{checkpoint} cannot be replaced ({error.strerror}): remove it, or choose another "
            "output_dir."
        ) from error


def remove_older(
    found: list[Path], limit: int | None, present: Path, best: Path | None, own: set[Path]
) -> None:
    """Remove checkpoints until `limit` are left: those of no use to this run, then by their steps.

    The Trainer would go by the folders' times, which a copy or a touched file changes. Those of
    this run at a later step stay, beyond the limit: it goes on from an earlier one, and will
    replace or pass them.

    Args:
        found: the checkpoint folders of an output_dir, by rising step.
        limit: `save_total_limit`; None or 0 keeps all.
        present: the one just saved, which stays.
        best: the best one, which stays.
        own: those that this run has written whole.
    """
    if not limit or limit < 0:
        return
    ahead = set(found[found.index(present) + 1 :]) & own
    kept = {present, *({best} & set(found) if best is not None else ())} - ahead
    surplus = len(found) - len(ahead) - max(limit, len(kept))
    useless_first = sorted(found, key=lambda path: path in own)  # stable: by step within the two
    going = [path for path in useless_first if path not in kept | ahead]
    for path in going[: max(0, surplus)]:
        shutil.rmtree(path, ignore_errors=True)

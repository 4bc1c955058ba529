"""Checkpoints that are whole: sealed when every file is there, and only then replacing older ones.

The Trainer removes older checkpoints before LlamaFactory's callbacks have added their files to the
new one. So its own removal is held back, and a last callback seals the new checkpoint first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dataflex.checkpoints.folders import checkpoints, of_run
from dataflex.checkpoints.saving import clear_place, disk_faults, remove_older
from dataflex.checkpoints.seal import seal
from dataflex.run.ranks import Ranks
from dataflex.trainers.job import Run
from gradstore.errors import BadInput


class SealedCheckpoints:
    """Mixin before a Trainer; `seal_last` gives it a `Sealer` as its last callback."""

    run: Run
    args: Any
    state: Any
    add_callback: Any
    remove_callback: Any

    #: The user's `save_total_limit` while a checkpoint is saved.
    _users_limit: int | None = None

    def seal_last(self) -> None:
        """Put the sealer behind every other callback, once, however often the Trainer trains."""
        self.remove_callback(Sealer)
        self.add_callback(Sealer(self.run.ranks, self.run.run_id))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Save into an empty folder; older checkpoints stay."""
        folder = checkpoint_folder(self.args, self.state)
        self.run.ranks.decide(lambda: clear_place(folder))
        with self._limit(None) as self._users_limit, disk_faults(folder):
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def save_model(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the Trainer's own
        """Save with the user's `save_total_limit`, which training_args.bin keeps."""
        limit = self.args.save_total_limit
        with self._limit(self._users_limit if limit is None else limit):
            super().save_model(*args, **kwargs)  # type: ignore[misc]

    @contextlib.contextmanager
    def _limit(self, value: int | None) -> Iterator[int | None]:
        """Set `save_total_limit` for the block; give what it was."""
        held, self.args.save_total_limit = self.args.save_total_limit, value
        try:
            yield held
        finally:
            self.args.save_total_limit = held

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:  # noqa: ANN401
        """Load them; states of another optimizer are refused in one message."""
        try:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"optimizer.pt or scheduler.pt of {str(checkpoint)!r} does not fit this run's "
                f"optimizer ({error}). Restore the optimizer's settings, or start a new run with "
                "overwrite_output_dir: true."
            ) from error


class Sealer(TrainerCallback):
    """Callback that seals each checkpoint, then applies `save_total_limit`.

    It must be the last one: LlamaFactory's write a processor's files into checkpoints.
    """

    def __init__(self, ranks: Ranks, run_id: str) -> None:
        self.ranks = ranks
        self.run_id = run_id

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Seal the checkpoint just saved, once every rank has written its files."""
        folder = checkpoint_folder(args, state)
        self.ranks.gather(lambda: None)

        def finish() -> None:
            if args.should_save:
                with disk_faults(folder):
                    seal(folder)
                best = state.best_model_checkpoint and Path(state.best_model_checkpoint)
                found = checkpoints(Path(args.output_dir))
                own = of_run(found, self.run_id)
                remove_older(found, args.save_total_limit, folder, best, own)

        self.ranks.gather(finish)


def checkpoint_folder(args: Any, state: Any) -> Path:  # noqa: ANN401 - the Trainer's
    """Return the folder that the Trainer saves its present step in."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
